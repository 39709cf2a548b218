"""A user's script as type checkers see it: every expression has the type that it is said to have."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from typing_extensions import assert_type

import rnn_gpu


class Tagger(torch.nn.Module):
    def __init__(self, features: int, tags: int) -> None:
        super().__init__()
        self.lstm = rnn_gpu.LSTM(features, 8, num_layers=2, bidirectional=True, memory="lean")
        self.gru = rnn_gpu.GRU(16, 8, batch_first=True, device="cpu", dtype=torch.float32)
        self.head = torch.nn.Linear(8, tags)

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        output, (h_n, c_n) = self.lstm(input, lengths=lengths)
        assert_type(output, Tensor)
        assert_type(h_n, Tensor)
        assert_type(c_n, Tensor)
        output, h_n = self.gru(output.transpose(0, 1), resets=None)
        assert_type(h_n, Tensor)
        scores: Tensor = self.head(output)
        return scores


model = rnn_gpu.replace_rnns(Tagger(3, 4))
assert_type(model, Tagger)
assert_type(rnn_gpu.restore_rnns(model), Tagger)
packed = pack_padded_sequence(torch.randn(5, 2, 3), [5, 2])
found, states = rnn_gpu.LSTM(3, 4)(packed)
assert_type(found, PackedSequence)
assert_type(states, tuple[Tensor, Tensor])
output, h = rnn_gpu.RNN(3, 4, nonlinearity="relu")(torch.randn(5, 2, 3), lengths=[5, 2])
output, states = rnn_gpu.LSTM(3, 4)(torch.randn(5, 2, 3), states)
with rnn_gpu.backend("torch"), rnn_gpu.max_programs(None), rnn_gpu.memory("full"):
    assert_type(rnn_gpu.explain(rnn_gpu.LSTM(3, 4), batch_size=16, device="h200", precision="tf32"), str)
    rnn_gpu.explain(model, 16, torch.device("cuda") if torch.cuda.is_available() else None)
rnn_gpu.backend("auto")


@rnn_gpu.backend("torch")
def half(x: float) -> float:
    return x / 2


assert_type(half(3.0), float)
cell, state = rnn_gpu.LSTMCell(3, 4), rnn_gpu.GRUCell(3, 4)(torch.randn(2, 3))
rnn_gpu.check()
