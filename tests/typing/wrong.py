"""What a type checker has to object to: every line that says `wrong`, and no other. It is never run."""

import torch

import rnn_gpu

rnn_gpu.LSTM(3, 4, memory="leen")  # wrong
rnn_gpu.GRU(3, 4, proj_size=2)  # wrong
rnn_gpu.RNN(3, 4, nonlinearity="sigmoid")  # wrong
rnn_gpu.LSTM(3)  # wrong
rnn_gpu.LSTM(3, 4, layers=2)  # wrong
rnn_gpu.LSTM(3, "4")  # wrong
rnn_gpu.backend("cuda")  # wrong
rnn_gpu.memory("leen")  # wrong
rnn_gpu.max_programs("3")  # wrong
rnn_gpu.explain(rnn_gpu.LSTM(3, 4), 16, precision="tf16")  # wrong
rnn_gpu.explain(rnn_gpu.LSTM(3, 4), "16")  # wrong
rnn_gpu.LSTM(3, 4)(torch.randn(5, 2, 3), torch.zeros(1, 2, 4))  # wrong
rnn_gpu.GRU(3, 4)(torch.randn(5, 2, 3), length=[5, 2])  # wrong
rnn_gpu.layer("lstm")  # wrong
rnn_gpu.check_cell("lstm")  # wrong
rnn_gpu.zoo.MGU(3, 4, memory="leen")  # wrong
rnn_gpu.zoo.MGU(3, 4, proj_size=2)  # wrong
rnn_gpu.zoo.MGU(3, 4)(torch.randn(5, 2, 3), length=[5, 2])  # wrong
rnn_gpu.GRU(3, 4)(torch.randn(5, 2, 3), lengths=[5, 2])
