"""Layers side by side with torch.nn, shared by the tests of the layers: the same weights, inputs and gradients in
both.
"""

import os

import pytest
import torch
from torch import Tensor

import rnn_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "torch"
# `pytestmark` of files whose tests run twice: once on torch, and with TRITON_INTERPRET=1 on the kernels.
ON_BOTH_BACKENDS = [pytest.mark.interpreted] if INTERPRETED else []

STATES = {"LSTM": 2, "GRU": 1, "RNN": 1}


def pair(name: str, *args, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs):
    """A layer of rnn_gpu in `dtype`, and torch.nn's in float64 with exactly the same weights."""
    torch.manual_seed(seed)
    ours = getattr(rnn_gpu, name)(*args, **kwargs).to(dtype)
    oracle = getattr(torch.nn, name)(*args, **kwargs).double()
    oracle.load_state_dict({key: value.double() for key, value in ours.state_dict().items()})
    return ours, oracle


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
    gradients = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype) for r in results.values()]
    found = torch.autograd.grad(list(results.values()), list(leaves.values()), gradients)
    results = {name: result.detach() for name, result in results.items()}
    return results | {f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)}
