"""How torch.func.vmap sees the operators: rules that run V problems at once.

Where the weights are shared, the V problems are more rows of the batch. Where each has weights of its own (an
ensemble), the kernels take them as more weight sets, in as many launches as it takes; ATen knows no such thing, and the
problems run one after another. Importing this module registers the rules.

Each tensor of an operator is of one of these kinds, which say where the batch and the weight sets lie:

    rows      [R, N, ...]  R = T * B rows of all steps      lengths  [B]
    input     [R, I]       the same without weight sets     resets   [T, B]
    state     [N, B, ...]                                   offsets  [T+1], packed: has no V
    weight    [N, ...]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import aten, backends, operators
from .call import Inputs

MASKS = {"lengths": "lengths", "offsets": "offsets", "resets": "resets"}
ROWS = MASKS | {"dropped": "state", "kept_h": "rows", "kept_c": "rows"}
RECURRENCE = {"x_part": "rows", "weight_hh": "weight", "bias_hn": "weight", "h0": "state", "c0": "state"}
RECURRENCE |= {"parameters": "weight"} | ROWS
RECURRENCE_RESULTS = ("rows", "state", "state", "rows", "rows", "rows")
GRADIENTS = {"d_y": "rows", "d_h_n": "state", "d_c_n": "state", "d_cells": "rows"}
RECURRENCE_BACKWARD = (
    GRADIENTS
    | {"weight_hh": "weight", "gates": "rows", "aux": "rows", "carries": "rows", "y": "rows"}
    | {"h0": "state", "c0": "state", "parameters": "weight"}
    | ROWS
)
ATEN = dict(zip(Inputs._fields, ["input", *["weight"] * 5, *["state"] * 3, "weight"], strict=True)) | ROWS


def _members(tensor: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    """[V, ...]: the tensor with its V in front, where it has one, else repeated."""
    if tensor is None:
        return None
    return tensor.unsqueeze(0).expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _is_placeholder(tensor: Tensor | None) -> bool:
    """Whether a tensor [V, ...] only says that there is none: an operator has to return something."""
    return tensor is None or (tensor.dim() <= 2 and tensor.shape[-1] == 0)


def _into_batch(tensor: Tensor, kind: str, time: int) -> Tensor:
    """[V, ...] with V taken into the rows of the batch."""
    if kind in ("rows", "input"):
        return tensor.unflatten(1, (time, -1)).transpose(0, 1).flatten(0, 2)
    if kind in ("state", "resets"):
        return tensor.transpose(0, 1).flatten(1, 2)
    return tensor.flatten(0, 1)  # lengths


def _out_of_batch(tensor: Tensor, kind: str, time: int, count: int) -> Tensor:
    """The way back."""
    if kind in ("rows", "input"):
        return tensor.unflatten(0, (time, count, -1)).transpose(0, 1).flatten(1, 2)
    return tensor.unflatten(1, (count, -1)).transpose(0, 1)  # state


def _into_sets(tensor: Tensor, kind: str) -> Tensor:
    """[V, ...] with V taken into the weight sets."""
    return tensor.transpose(0, 1).flatten(1, 2) if kind == "rows" else tensor.flatten(0, 1)


def _out_of_sets(tensor: Tensor, kind: str, count: int) -> Tensor:
    """The way back."""
    if kind == "rows":
        return tensor.unflatten(1, (count, -1)).transpose(0, 1)
    return tensor.unflatten(0, (count, -1))


def _by_rows(run: Callable, given: dict, kinds: dict, results: tuple, time: int, count: int) -> list[Tensor]:
    """Run V problems that share their weights, whose tensors are given as [V, ...]. -> results [V, ...]."""
    folded = {}
    for name, tensor in given.items():
        if tensor is None or kinds[name] == "weight":
            folded[name] = None if tensor is None else tensor[0]
        else:
            folded[name] = tensor[0] if _is_placeholder(tensor) else _into_batch(tensor, kinds[name], time)
    found = run(**folded)
    return [
        _members(r, None, count) if _is_placeholder(r) else _out_of_batch(r, kind, time, count)
        for r, kind in zip(found, results, strict=True)
    ]


def _by_sets(run: Callable, given: dict, kinds: dict, results: tuple, most: int, count: int) -> list[Tensor]:
    """Run V problems with weights of their own as weight sets, `most` of them at once: one where masks differ."""
    parts = []
    for begin in range(0, count, most):
        taken = min(most, count - begin)
        folded = {}
        for name, tensor in given.items():
            if tensor is None or kinds[name] in MASKS or _is_placeholder(tensor):
                folded[name] = None if tensor is None else tensor[begin]
            else:
                folded[name] = _into_sets(tensor[begin : begin + taken], kinds[name])
        found = run(**folded)
        parts.append(
            [
                _members(r, None, taken) if _is_placeholder(r) else _out_of_sets(r, kind, taken)
                for r, kind in zip(found, results, strict=True)
            ]
        )
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _split(info, in_dims: tuple, arguments: tuple, kinds: dict) -> tuple[int, dict, set, tuple]:
    """What a rule is given -> V; the tensors by name, as [V, ...]; which of them are mapped; the other arguments.

    RuntimeError for packed sequences: V of them are not one.
    """
    count, names = info.batch_size, list(kinds)
    tensors = dict(zip(names, arguments[: len(names)], strict=True))
    if tensors["offsets"] is not None:
        raise RuntimeError("torch.func.vmap over packed sequences is not supported: give padded input and lengths")
    dims = dict(zip(names, in_dims[: len(names)], strict=True))
    given = {name: _members(tensor, dims[name], count) for name, tensor in tensors.items()}
    return count, given, {name for name, dim in dims.items() if dim is not None}, arguments[len(names) :]


def _one_by_one(run: Callable, given: dict, count: int) -> list[Tensor]:
    """Run V problems one after another."""
    found = [run(**{name: t if t is None else t[v] for name, t in given.items()}) for v in range(count)]
    return [torch.stack(part) for part in zip(*found, strict=True)]


def _sets_at_once(given: dict, how: tuple, count: int, backward: bool) -> int:
    """How many problems with weights of their own a launch can take."""
    _, cell, _, max_programs, alone, *_ = how
    sets, hidden_size = given["weight_hh"].shape[1], given["weight_hh"].shape[-1]
    like, batch = given["h0"], given["h0"].shape[2]
    ragged = given["lengths"] is not None or given["resets"] is not None
    device, name = backends.device_of(like.device), backends.name_of(like.dtype)
    while count > 1:
        found = backends.plan_for(
            cell, hidden_size, batch, sets * count, name, device, backward, ragged, (max_programs, alone)
        )
        if not isinstance(found, str):
            break
        count = -(-count // 2)
    return count


def _kernel_rule(operator: Callable, kinds: dict, results: tuple, backward: bool):
    """The rule for one of the two passes of the kernels."""

    def rule(info, in_dims, *arguments):
        count, given, mapped, how = _split(info, in_dims, arguments, kinds)
        run = lambda **folded: operator(*(folded[name] for name in kinds), *how)
        if not any(kinds[name] == "weight" for name in mapped):
            found = _by_rows(run, given, kinds, results, how[0], count)
        else:
            # Sets that run backwards in time are every second one: of one set, or of two, for each problem.
            most = 1 if mapped & set(MASKS) else _sets_at_once(given, how, count, backward)
            found = _by_sets(run, given, kinds, results, most, count)
        return tuple(found), (0,) * len(found)

    return rule


def _aten_rule(info, in_dims, *arguments):
    count, given, mapped, (*how, _) = _split(info, in_dims, arguments, ATEN)
    run = lambda **folded: aten.aten_layer(*(folded[name] for name in ATEN), *how, False)[:4]  # keeps nothing
    if any(ATEN[name] == "weight" for name in mapped):
        found = _one_by_one(run, given, count)
    else:
        found = _by_rows(run, given, ATEN, ("rows", "state", "state", "rows"), how[0], count)
    return (*found, torch.empty(0, dtype=torch.int64, device="cpu")), (0, 0, 0, 0, None)


def _aten_backward_rule(info, in_dims, *arguments):
    """One problem after another: the gradient of shared weights is wanted of each problem alone."""
    kinds = GRADIENTS | ATEN
    count, given, _, how = _split(info, in_dims, arguments, kinds)
    found = _one_by_one(lambda **one: aten.aten_layer_backward(*(one[name] for name in kinds), *how), given, count)
    return tuple(found), (0,) * len(found)


def _register(operator: Callable, rule: Callable) -> None:
    """Let vmap take a rule; over no problems at all that of one, of zeros, whose results are left out."""

    def of_any(info, in_dims, *arguments):
        if info.batch_size > 0:
            return rule(info, in_dims, *arguments)
        one = [
            given.new_zeros([*given.shape[:dim], 1, *given.shape[dim + 1 :]]) if isinstance(dim, int) else given
            for given, dim in zip(arguments, in_dims, strict=True)
        ]
        found, dims = rule(info._replace(batch_size=1), in_dims, *one)
        pairs = zip(found, dims, strict=True)
        return tuple(one if dim is None else one.narrow(dim, 0, 0) for one, dim in pairs), dims

    torch.library.register_vmap(operator, of_any)


_register(operators.recurrence, _kernel_rule(operators.recurrence, RECURRENCE, RECURRENCE_RESULTS, False))
_register(
    operators.recurrence_backward,
    _kernel_rule(operators.recurrence_backward, RECURRENCE_BACKWARD, ("rows", "state", "state", "state"), True),
)
_register(aten.aten_layer, _aten_rule)
_register(aten.aten_layer_backward, _aten_backward_rule)
