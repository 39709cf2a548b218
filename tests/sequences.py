"""Sequences of different lengths, or that start anew, through a layer and through torch.nn one sequence at a time."""

import torch
from torch import Tensor

import rnn_gpu


def states_of(layer: torch.nn.RNNBase, batch: int, dtype: torch.dtype, seed: int = 3) -> tuple[Tensor, ...]:
    """Random initial states of a layer."""
    generator = torch.Generator().manual_seed(seed)
    sets = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: 2 if layer.mode == "LSTM" else 1]
    return tuple(torch.randn(sets, batch, size, generator=generator).to(dtype) for size in sizes)


def as_hx(states):
    """Two states as a tuple, one as itself: what torch.nn takes."""
    return states if len(states) == 2 else states[0]


def as_tuple(hx):
    """The reverse of `as_hx`."""
    return hx if isinstance(hx, tuple) else (hx,)


def one_at_a_time(layer: torch.nn.RNNBase, input: Tensor, states, lengths, resets=None) -> tuple[Tensor, ...]:
    """torch.nn on each row alone, cut at its end and, where it starts anew, into pieces: (padded output, final states).

    input [T, B, I]. One layer, one direction for resets (a piece's end is then the next one's beginning).
    """
    time, batch = input.shape[:2]
    directions = 2 if layer.bidirectional else 1
    outputs, finals = [], []
    for b in range(batch):
        length = int(lengths[b])
        now = tuple(state[:, b : b + 1] for state in states)
        starts = [] if resets is None else [t for t in range(length) if resets[t, b]]
        pieces = []
        for start, stop in zip([0, *starts], [*starts, length], strict=True):
            if start in starts:
                now = tuple(torch.zeros_like(state) for state in now)
            if stop > start:
                output, hx = layer(input[start:stop, b : b + 1], as_hx(now))
                pieces.append(output)
                now = as_tuple(hx)
        width = (layer.proj_size or layer.hidden_size) * directions
        pieces.append(input.new_zeros(time - length, 1, width))
        outputs.append(torch.cat(pieces))
        finals.append(now)
    return torch.cat(outputs, 1), *(torch.cat(parts, 1) for parts in zip(*finals, strict=True))


def gradients(results: tuple[Tensor, ...], leaves: list[Tensor], seed: int = 4) -> list[Tensor]:
    """The gradients of leaves for fixed random gradients of results."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    return list(torch.autograd.grad(results, leaves, chosen))


def outcome(run, layer: torch.nn.RNNBase, input: Tensor, states, backend: str = "torch") -> list[Tensor]:
    """run(layer, input, states) -> results; then the gradients of input, states and parameters, all in one list."""
    dtype = next(layer.parameters()).dtype
    input = input.to(dtype).requires_grad_()
    states = tuple(state.to(dtype).requires_grad_() for state in states)
    with rnn_gpu.backend(backend):
        results = run(layer, input, states)
    leaves = [input, *states, *layer.parameters()]
    return [r.detach() for r in results] + gradients(results, leaves)
