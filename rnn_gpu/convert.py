"""Swap torch.nn's recurrent layers and cells inside a model for those of rnn_gpu, and back.

Only the class of a module is changed (`module.__class__ = ...`); the object stays the one it was. A new object that
shares the parameters would do for the optimizer, but everything else that knows the old one would be left behind:
hooks that hold the module, its place in other containers and in plain attributes, a wrapper's or a profiler's
references, `weakref`s. The classes of both libraries hold the same attributes (both derive from RNNBase), so nothing
has to be converted, shared modules stay shared, and going back is the same thing again.

torch.nn.utils.parametrize gives each parametrized module a class of its own, in which the parametrized tensors are
properties. Such a class is made again on the new base.

What was not done is said in warnings, and never by an exception: the call stands in scripts that load one model or
another. A model without anything recurrent is told, too: whoever asked for faster layers would else look for the reason
everywhere but here. (PyTorch's own converters, `convert_sync_batchnorm` for one, say nothing; but what they change
shows in results, and this in nothing but the time.) A second call on a model that is done says nothing.
"""

import warnings
from typing import TypeVar

import torch
from torch.nn.utils import parametrize

from .cells import GRUCell, LSTMCell, RNNCell
from .hidden import RECURRENT, hidden_layers
from .modules import GRU, LSTM, RNN
from .own import CellLayer

Model = TypeVar("Model", bound=torch.nn.Module)

OURS = {
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.RNN: RNN,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
    torch.nn.RNNCell: RNNCell,
}
LAYERS = LSTM, GRU, RNN
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def replace_rnns(model: Model) -> Model:
    """Make every torch.nn.LSTM, GRU, RNN and cell in `model` one of rnn_gpu, in place; the model is returned.

    Parameters, buffers, hooks, names, the training flag, weight_norm and parametrizations stay as they are, because
    the modules do: an optimizer made before keeps working. Calling it again changes nothing. Sub-classes are left
    alone, since they may override what rnn_gpu relies on, and one UserWarning names them all; others name layers that
    no module sees, in lists, tuples, sets, dicts, dataclasses and modules inside of these, nested in any way, and say
    so where there is nothing recurrent in the model. Call it last: after the model has been built and initialised,
    before DistributedDataParallel, `fully_shard` and `torch.compile`.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GRU(4, 5))
    >>> type(replace_rnns(model)[1])
    <class 'rnn_gpu.modules.GRU'>
    """
    return _swap(model, OURS, "replace_rnns", RECURRENT, done=(*THEIRS, CellLayer))


def restore_rnns(model: Model) -> Model:
    """Make every rnn_gpu layer and cell in `model` one of torch.nn, in place; the model is returned.

    The way back from `replace_rnns`, and the way to torch.nn for layers built with rnn_gpu: before torch.jit.script,
    quantize_dynamic or torch.fx, and before a whole model is pickled for a place without rnn_gpu. Sub-classes of
    rnn_gpu's classes are left alone, and so are layers of cells that torch.nn does not have, and those with an option
    that changes results and that torch.nn does not know, such as weight_dropout; UserWarnings name them all, and say so
    where there is nothing recurrent in the model. (Set the option to 0 before to do without it.)

    >>> type(restore_rnns(LSTM(3, 4)))
    <class 'torch.nn.modules.rnn.LSTM'>
    """
    return _swap(model, THEIRS, "restore_rnns", tuple(THEIRS), done=())


def _swap(
    model: Model, table: dict[type, type], caller: str, family: tuple[type, ...], done: tuple[type, ...]
) -> Model:
    """Change the class of every module in `model` that `table` has; warn of others in `family` but not in `done`."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller} expects a torch.nn.Module, got: {type(model).__name__}")
    left_alone, options, cells = [], [], []
    for name, module in model.named_modules():
        new = class_after(module, table)
        more = module.option_text() if table is THEIRS and isinstance(module, LAYERS) else ""
        if new is not None and more:
            options.append(f"{name or 'the model itself'} ({more})")
        elif new is not None:
            module.__class__ = new
            module.__dict__.pop("_known_calls", None)  # ready.py's, which no pickle of torch.nn's layer is to name
        elif table is THEIRS and isinstance(module, CellLayer):
            cells.append(f"{name or 'the model itself'} ({module.cell.name})")
        elif isinstance(module, family) and not isinstance(module, done):
            found = type(module)
            left_alone.append(f"{name or 'the model itself'} ({found.__module__}.{found.__qualname__})")
    if left_alone:
        warnings.warn(
            f"{caller} left sub-classes alone, which may override what it relies on: {', '.join(left_alone)}",
            stacklevel=3,
        )
    if options:
        warnings.warn(
            f"{caller} left layers alone whose options torch.nn does not know: {', '.join(options)}", stacklevel=3
        )
    if cells:
        warnings.warn(f"{caller} left cells alone that torch.nn does not have: {', '.join(cells)}", stacklevel=3)
    hidden = hidden_layers(model, lambda layer: class_after(layer, table) is not None)
    if hidden:
        warnings.warn(
            f"{caller} left layers alone that are no part of the model, nor are their parameters: {', '.join(hidden)}. "
            "A torch.nn.ModuleList or ModuleDict in place of a plain one makes them a part",
            stacklevel=3,
        )
    elif not any(isinstance(module, RECURRENT) for module in model.modules()):
        warnings.warn(
            f"{caller} changed nothing: there is no LSTM, GRU, RNN or cell in {type(model).__name__}{_instead(model)}",
            stacklevel=3,
        )
    return model


def _instead(model: torch.nn.Module) -> str:
    """What a model without recurrent layers holds: what bears their name, or what else there is."""
    kinds = {  # original_name: of what was scripted
        name or "the model itself": getattr(one, "original_name", type(one).__name__)
        for name, one in model.named_modules()
    }
    alike = [f"{name} ({kind})" for name, kind in kinds.items() if any(word in kind for word in ("LSTM", "GRU", "RNN"))]
    if alike:
        return f"; scripted, quantized or written in another way: {', '.join(alike)}"
    others = sorted({*kinds.values()} - {type(model).__name__})
    return f", which holds {', '.join(others[:6])}{', ...' if len(others) > 6 else ''}" if others else ""


def class_after(module: torch.nn.Module, table: dict[type, type]) -> type | None:
    """The class that `module` is to have, or None where it stays as it is."""
    cls = type(module)
    if cls in table:
        return table[cls]
    # A class made by parametrize, for this module: `class ParametrizedLSTM(LSTM)` with a property for each tensor.
    if parametrize.is_parametrized(module) and cls.__module__ == parametrize.__name__ and cls.__bases__[0] in table:
        return type(cls.__name__, (table[cls.__bases__[0]],), dict(vars(cls)))
    return None
