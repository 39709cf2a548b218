"""Layers side by side with torch.nn, shared by the tests of the layers: the same weights, inputs and gradients in
both.
"""

import contextlib

import pytest
import torch
from torch import Tensor

import rnn_gpu
from rnn_gpu import reference, settings
from rnn_gpu.backends import CELL_OF_MODE
from tests import interpreter
from tests.problems import RoundedProducts, round_to_tf32
from tests.tolerances import assert_close_to_oracle

INTERPRETED = interpreter.INTERPRETED or interpreter.ON_MACHINE  # the kernels run on CPU tensors
BACKEND = "triton" if INTERPRETED else "torch"
# `pytestmark` of files whose tests run twice: once on torch, and once on the kernels (tests/interpreter.py).
ON_BOTH_BACKENDS = [pytest.mark.interpreted] if INTERPRETED else []


@contextlib.contextmanager
def exchanging_in_full():
    """The backend of this run, several programs, and products in full, to be compared with PyTorch's on a CPU."""
    before = torch._C._get_cudnn_allow_tf32()
    torch._C._set_cudnn_allow_tf32(False)  # what torch.backends.cudnn.allow_tf32 sets; torch.export reads it back
    with rnn_gpu.backend(BACKEND), settings.always_exchange():
        yield
    torch._C._set_cudnn_allow_tf32(before)


STATES = {"LSTM": 2, "GRU": 1, "RNN": 1}


def pair(name: str, *args, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs):
    """A layer of rnn_gpu in `dtype`, and torch.nn's in float64 with exactly the same weights."""
    torch.manual_seed(seed)
    ours = getattr(rnn_gpu, name)(*args, **kwargs).to(dtype)
    oracle = getattr(torch.nn, name)(*args, **kwargs).double()
    oracle.load_state_dict({key: value.double() for key, value in ours.state_dict().items()})
    return ours, oracle


def block_diagonal(weight_hh: Tensor, heads: int) -> Tensor:
    """weight_hh [G*H, H/heads] of a layer with heads, with zeros between its blocks: [G*H, H]."""
    size = weight_hh.shape[1]
    return torch.cat([torch.block_diag(*gate.split(size)) for gate in weight_hh.split(heads * size)])


def same(layer: torch.nn.RNNBase, dtype: torch.dtype) -> torch.nn.RNNBase:
    """torch.nn's layer in `dtype` with the weights of `layer`: the peer of the error rule."""
    name = layer.mode.split("_")[0]
    own = {"RNN": ("nonlinearity",), "LSTM": ("proj_size",), "GRU": ()}[name]
    peer = getattr(torch.nn, name)(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        bidirectional=layer.bidirectional,
        **{key: getattr(layer, key) for key in own},
    ).to(dtype)
    peer.load_state_dict({key: value.to(dtype) for key, value in layer.state_dict().items()})
    return peer


def cudnn_multiplies_in_full(layer: torch.nn.RNNBase) -> bool:
    """Whether cuDNN makes products of a float32 layer on a GPU in full although tf32 is on: where its small persistent
    kernels serve, sizes measured on an H200 with cuDNN 9.19; and where H is no multiple of 8, by one layer of 300 units
    there, whose gradient of c0 had 0.54 times the error of loops rounded to tf32, ours 1.0. (Elsewhere it may do so,
    too, which changes a single result by a few percent: tests/test_accuracy.py.)
    """
    return layer.hidden_size <= (384 if layer.mode.startswith("RNN") else 192) or layer.hidden_size % 8 > 0


def by_loops(layer: torch.nn.RNNBase, rounding=lambda operand: operand) -> torch.nn.RNNBase:
    """The layer, computed by plain loops over time, the operands of whose products are rounded by a function.
    batch_first or not, no dropout, no projection.
    """

    def forward(input, hx):
        states = hx if isinstance(hx, tuple) else (hx,)
        directions, each = 2 if layer.bidirectional else 1, 4 if layer.bias else 2
        y, final = input.transpose(0, 1) if layer.batch_first else input, []
        with RoundedProducts(rounding):
            for first in range(0, layer.num_layers * directions, directions):
                found = []
                for n in range(first, first + directions):
                    weights = [*layer._flat_weights[n * each : (n + 1) * each], None, None][:4]
                    start = [state[n] for state in states]
                    cell = CELL_OF_MODE[layer.mode]
                    found.append(reference.layer(cell, y, *weights, *start, reverse=n > first))
                y = torch.cat([one[0] for one in found], -1)
                final += [one[1 : 1 + len(states)] for one in found]
        final = tuple(torch.stack(parts) for parts in zip(*final, strict=True))
        return y.transpose(0, 1) if layer.batch_first else y, final if len(final) == 2 else final[0]

    layer.forward = forward
    return layer


def by_rounded_loops(layer: torch.nn.RNNBase) -> torch.nn.RNNBase:
    """The same with operands rounded to tf32: the peer of a result in tf32 where cuDNN would multiply in full."""
    return by_loops(layer, round_to_tf32)


def away_from_the_kink(layer: torch.nn.RNNBase) -> None:
    """Change the weights of an RNN with relu, so that of inputs and states that are not negative each unit is either
    always on or always off. Near the kink rounding decides which of them are on, and norms compare nothing.
    """
    for weight in layer.parameters():
        on = torch.arange(len(weight), device=weight.device).view(-1, *[1] * (weight.dim() - 1)) % 3 > 0
        share = 1.5 * weight[0].numel() ** -0.5  # so that states keep their size from step to step and layer to layer
        weight.data = torch.where(on, 1, -1).to(weight) * share * weight.data.abs()


def draw(layer: torch.nn.RNNBase, time: int, batch: int | None, seed: int = 1) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Input and initial states in float32 for a layer; batch None: unbatched."""
    generator = torch.Generator().manual_seed(seed)
    rows = () if batch is None else (batch,)
    shape = (batch, time) if layer.batch_first and batch is not None else (time, *rows)
    input = torch.randn(*shape, layer.input_size, generator=generator)
    sets = layer.num_layers * (2 if layer.bidirectional else 1)
    count = 2 if layer.mode == "LSTM" else 1
    return input, tuple(torch.randn(sets, *rows, layer.hidden_size, generator=generator) for _ in range(count))


def outcome(layer: torch.nn.RNNBase, input: Tensor, states, backend: str, seed: int = 2) -> dict[str, Tensor]:
    """Outputs, final states, and the gradients of input, states and parameters for fixed random gradients.

    states None: the layer's own zeros. Everything is cast to the dtype of the layer.
    """
    dtype = next(layer.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    leaves = {"input": input.to(dtype).requires_grad_()}
    hx = None
    if states is not None:
        leaves |= {f"hx{i}": state.to(dtype).requires_grad_() for i, state in enumerate(states)}
        hx = tuple(leaves[f"hx{i}"] for i in range(len(states)))
        hx = hx if len(hx) == 2 else hx[0]
    leaves |= dict(layer.named_parameters())
    with rnn_gpu.backend(backend):
        output, final = layer(leaves["input"], hx)
    results = {"output": output} | {
        f"final{i}": s for i, s in enumerate(final if isinstance(final, tuple) else (final,))
    }
    gradients = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results.values()]
    found = torch.autograd.grad(list(results.values()), list(leaves.values()), gradients)
    results = {name: result.detach() for name, result in results.items()}
    return results | {f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def assert_saved_tensors_may_be_strided(layer: torch.nn.RNNBase, oracle: torch.nn.RNNBase) -> None:
    """Gradients on the kernels, where hooks give back what was saved in other strides."""
    input, _ = draw(layer, 3, 2)
    pack = lambda t: t.transpose(0, -1).contiguous()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.transpose(0, -1)), rnn_gpu.backend("triton"):
        layer(input)[0].sum().backward()
    oracle(input.double())[0].sum().backward()
    peer = same(layer, torch.float32)
    peer(input)[0].sum().backward()
    for a, e, p in zip(layer.parameters(), oracle.parameters(), peer.parameters(), strict=True):
        assert_close_to_oracle(a.grad, e.grad, p.grad)
