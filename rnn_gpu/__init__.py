"""Recurrent layers for PyTorch whose whole time loop runs in one persistent Triton kernel.

>>> import torch, rnn_gpu
>>> lstm = rnn_gpu.LSTM(10, 20)  # in place of torch.nn.LSTM
>>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))

LSTM, GRU, RNN; LSTMCell, GRUCell, RNNCell     what torch.nn has, under the same names
replace_rnns, restore_rnns                     the layers of a model that exists, and back
backend, memory, max_programs                  settings: from here on, as a context, or as a decorator
explain, autotune                              which kernels run a layer, and why; which are fastest on this GPU
check, gradient_flow                           did every launch end; how far back gradients reach
init                                           initial values that help to remember
Cell, layer, CellLayer, check_cell; zoo        cells of your own, and five that are there

`python -m rnn_gpu` says what runs on this machine, and whether it is right. docs/start.md leads on.
"""

import torch

from . import batching as batching  # registers the rules of torch.func.vmap
from . import init as init
from . import zoo as zoo
from .autotuning import autotune
from .cell_check import CellError, check_cell
from .cells import GRUCell, LSTMCell, RNNCell
from .convert import replace_rnns, restore_rnns
from .explanation import explain
from .flow import GradientFlow, gradient_flow
from .kernels.spec import Cell
from .modules import GRU, LSTM, RNN
from .own import CellLayer, layer
from .settings import backend, current_backend, current_memory, max_programs, memory

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "CellError",
    "CellLayer",
    "GRUCell",
    "GradientFlow",
    "LSTMCell",
    "RNNCell",
    "autotune",
    "backend",
    "check",
    "check_cell",
    "current_backend",
    "current_memory",
    "explain",
    "gradient_flow",
    "init",
    "layer",
    "max_programs",
    "memory",
    "replace_rnns",
    "restore_rnns",
    "zoo",
]

# torch.load(weights_only=True), the default, then takes whole layers: like those of torch.nn they hold weights and
# numbers, and loading one runs no code but their own.
torch.serialization.add_safe_globals([LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell, *zoo.ZOO])


def __dir__() -> list[str]:
    """What is there for users, and what a shell completes: not the files of the package."""
    return [*__all__, "__version__"]


def check(device: torch.device | str | int | None = None) -> None:
    """Did every launch come to its end? Wait for `device` (default: all that were used) and raise RuntimeError if a
    wait inside a kernel on it did not end.

    Every call of a layer looks for such an error without waiting; this looks at once, after the replay of a CUDA
    graph for instance. It looks at no numbers: `python -m rnn_gpu` says whether the kernels are right on a machine,
    `check_cell` whether a cell of your own is, and `explain` what would run. It needs a device that is there, and not
    the name of a GPU: TypeError for what is no device, and RuntimeError, as from torch.device, for a string that names
    none, such as "H200", and for a GPU that is not there.
    """
    if not isinstance(device, torch.device | str | int | None) or isinstance(device, bool):
        raise TypeError(
            f"check expects a device, got: {type(device).__name__} (explain says which kernels serve a layer, "
            "check_cell whether a cell is right)"
        )
    chosen = None if device is None else torch.device(device)
    if chosen is not None and chosen.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {str(chosen)!r} is not available: PyTorch finds no GPU here")
    from .backends import triton_missing

    if not triton_missing():
        from .kernels import launch

        launch.check(chosen)
