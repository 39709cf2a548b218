"""Layers of cells that PyTorch does not have: `layer` makes the class of one from its description."""

import importlib
import inspect
import sys
import textwrap
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import _Layer
from .kernels.spec import CELLS, Cell, register
from .options import Options, named, showing
from .reference import check_step


class CellLayer(_Layer[Any]):
    """The base of the layers of all such cells, and their type in annotations; `layer` makes their classes.

    T steps, B rows, I = input_size, H = hidden_size, L = num_layers, D = 2 if bidirectional else 1.

    layer(input, hx=zeros, *, lengths=None, resets=None) -> output, final states
        input [T, B, I] ([B, T, I] if batch_first, [T, I] unbatched, or a PackedSequence); output [T, B, D*H];
        states [L*D, B, H]: h, or for a cell with states the tuple of h and those; lengths: integers [B], steps of each
        row; resets: bools [T, B], true where a row starts anew

    num_layers: layers above each other. bias: with b_ih and b_hh. dropout: between layers, in training.
    memory: what training keeps on the kernels, "full" or "lean"; None: as `rnn_gpu.memory` says at each call.
    heads: blocks along the diagonal of the recurrent weights: weight_hh_l0 is [G*H, H/heads].
    weight_dropout, recurrent_dropout: probability of a recurrent weight, or of a unit's h before the recurrent product,
    being zeroed, in training. zoneout: probability of a unit keeping its h, and, by another draw, all its states, in a
    step. clip: limit of the gradient of h at every step. return_cells: the states of every step are further results,
    one for each, in the order of the cell, [T, B, D*H] of the last layer.
    Parameters: weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0, and the cell's own, NAME_l0 [H]; further layers and
    the other direction as in torch.nn.

    On the kernels where the cell has Triton functions, and a plan exists; elsewhere by the cell's step, a loop over
    time in PyTorch: slow, and right.
    """

    cell: Cell
    mode: str  # the name in CELLS, which is none of torch.nn's modes, in their place
    _torch_class = None
    _checked_step = False  # not before functions that it uses may stand below it

    @showing(Options)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Arguments and initialisation as torch.nn's layers; options: see the class. ValueError, before the first
        layer is made, for a cell whose step is none. TypeError for a class without a cell, as this one.
        """
        if getattr(self, "cell", None) is None:
            raise TypeError(f"{type(self).__name__} has no cell: rnn_gpu.layer(cell) makes the class of a layer")
        if not self._checked_step:
            check_step(self.cell)
            type(self)._checked_step = True
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        self._build("RNN_TANH", sizes, device, dtype, options)  # one gate and no memory, to begin with

    def _as_torch_nn(self, input: Any, hx: Any) -> Any:
        """Where the built-in layers ask torch.nn's own forward for its error: the same for input of another type."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input should be a tensor or a PackedSequence, got: {type(input).__name__}")
        self.check_input(input, None)
        weight: Any = self._flat_weights[0]
        raise ValueError(f"input must have the type {weight.dtype}, got type {input.dtype}")

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """torch.nn's errors for input and states of other sizes."""
        self.check_input(input, batch_sizes)
        batch = input.size(0 if self.batch_first else 1) if batch_sizes is None else int(batch_sizes[0])
        self._check_sizes(hidden if isinstance(hidden, tuple) else (hidden,), batch)

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The rows of the states in another order."""
        if permutation is None:
            return hx
        if isinstance(hx, Tensor):
            return hx.index_select(1, permutation)
        return tuple(state.index_select(1, permutation) for state in hx)

    def flatten_parameters(self) -> None:
        """Nothing: that is for cuDNN."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any module; but a class that was given another name than its cell is looked up under that."""
        cls, module = type(self), sys.modules.get(type(self).__module__)
        names = [name for name, value in vars(module).items() if value is cls] if module is not None else []
        if not names or cls.__qualname__ in names:
            return super().__reduce_ex__(protocol)
        return _empty, (cls.__module__, names[0]), self.__getstate__()


def _empty(module: str, name: str) -> CellLayer:
    """A layer of the class of that name, for pickle to fill."""
    cls = getattr(importlib.import_module(module), name)
    empty: CellLayer = cls.__new__(cls)
    return empty


def layer(cell: Cell) -> type[CellLayer]:
    """The class of a layer of `cell`: torch.nn's constructor, parameters and results, and the options of this library's
    own layers; its help() says what the docstring of the step does. TypeError for what is no Cell.

    Assign it to a name at the top of a module, best the cell's own, so that its layers can be pickled.

    >>> from rnn_gpu.equations import LSTM
    >>> print(layer(LSTM)(3, 4))
    lstm(3, 4)
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"layer expects a Cell, got: {type(cell).__name__}")
    name = register(cell)
    module = sys._getframe(1).f_globals.get("__name__", __name__)
    gates, own = ", ".join(cell.gate_names), "".join(f", {one}" for one in cell.parameters)
    states = f"(h, {', '.join(cell.states)})" if cell.states else "h"
    doc = f"A layer of the cell {cell.name}: gates {gates}{own and f'; parameters {own[2:]}'}; state {states}.\n\n    "
    if inspect.isfunction(cell.step) and (said := inspect.getdoc(cell.step)):
        doc += textwrap.indent(said, "    ").strip() + "\n\n    "
    doc += (CellLayer.__doc__ or "").partition("\n\n    ")[2]
    namespace = dict(cell=CELLS[name], mode=name, __module__=module, __qualname__=cell.name, __doc__=doc)
    return named(type(cell.name, (CellLayer,), namespace))
