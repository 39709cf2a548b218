"""A user's script as type checkers see it: every expression has the type that it is said to have."""

from collections.abc import Callable
from typing import Any

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


def step(x: tuple[Tensor, ...], r: tuple[Tensor, ...], carry: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    h = torch.tanh(x[0] + r[0])
    return h, (h,)


Plain = rnn_gpu.layer(rnn_gpu.Cell("Plain", ("n",), step, carries_h=True))
assert_type(Plain, type[rnn_gpu.CellLayer])


class Reader(torch.nn.Module):
    rnn: rnn_gpu.CellLayer

    def __init__(self, kind: type[rnn_gpu.CellLayer]) -> None:
        super().__init__()
        self.rnn = kind(3, 4, num_layers=2, zoneout=0.1, memory="lean")

    def forward(self, input: Tensor) -> Tensor:
        output, _ = self.rnn(input, lengths=[5, 2])
        assert_type(output, Tensor)
        return output


assert_type(Reader(Plain)(torch.randn(5, 2, 3)).shape, Any)
readers: list[rnn_gpu.CellLayer] = [Reader(rnn_gpu.zoo.MGU).rnn, rnn_gpu.zoo.SLSTM(3, 4)]
found_by_cell: rnn_gpu.Cell = readers[0].cell
assert isinstance(readers[1], rnn_gpu.CellLayer)
assert_type(rnn_gpu.replace_rnns(readers[0]), rnn_gpu.CellLayer)
rnn_gpu.init.orthogonal_(readers[0])
check: Callable[[type[rnn_gpu.CellLayer]], object] = rnn_gpu.check_cell
