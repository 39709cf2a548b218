"""A stand-in for a GPU: what a call of a layer asks of the device, counted, and what it must not ask for, refused.

Tensors of the device "meta" stand for those of a GPU: they have shapes and no values, so nothing that waits for the
device can work on them, and a tensor that Python made on the host is seen as soon as it meets them. The launches of the
kernels are left out, and counted too.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rnn_gpu import backends, base, operators
from rnn_gpu.kernels import launch
from rnn_gpu.kernels.plan import DEVICES
from rnn_gpu.library import BODIES

DEVICE = torch.device("meta")

# Operators that start no kernel: new memory, and other views of memory that there is.
FREE = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "unfold", "movedim",
}  # fmt: skip
# Those whose results have a shape that only the device knows: the host waits for it.
WAITING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "is_nonzero",
}
# The operators of this library whose body, and not its stand-in for shapes, is to be seen.
OPENED = operators.recurrence, operators.recurrence_backward, operators.saved_again


class DeviceWork(TorchDispatchMode):
    """Counts the kernels that a GPU would run, by name; AssertionError for what copies to or from the host, or waits.

    given: the tensors that are on the device before. What is made of Python's data comes to an operator as a tensor
    whose memory is none of theirs, nor any operator's result.
    """

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.kernels = Counter()
        self.memory = {}  # all memory of the device: held here, so that no address is used twice
        self.know(given)

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Take the memory of tensors as the device's."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.memory[storage._cdata] = storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func in OPENED:
            with self:
                return BODIES[func](*args, **kwargs)
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t.device == DEVICE for t in given]
        assert not (any(here) and name in WAITING), f"{func} waits for the device"
        assert not (any(here) and name == "repeat_interleave" and kwargs.get("output_size") is None), "waits"
        # A number is handed over with the kernel; a tensor of the host would have to be copied.
        ours = [on and t.untyped_storage()._cdata in self.memory for t, on in zip(given, here, strict=True)]
        strangers = [t for t, our in zip(given, ours, strict=True) if not our and t.dim() > 0]
        assert not (any(here) and strangers), f"{func} takes a tensor of the host, or made of Python's data"
        found = func(*args, **kwargs)
        results = [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]
        there = any(t.device == DEVICE for t in results)
        assert not (there and given and not any(here) and name != "empty_like"), f"{func} copies to the device"
        assert not (any(here) and any(t.device != DEVICE for t in results)), f"{func} copies from the device"
        self.know(t for t in results if t.device == DEVICE)
        if there and name not in FREE and any(t.numel() for t in results):
            self.kernels[name] += 1
        return found

    @property
    def total(self) -> int:
        """All kernels."""
        return self.kernels.total()


@contextlib.contextmanager
def pretending(monkeypatch: pytest.MonkeyPatch, given: Iterable[Tensor]) -> Iterator[DeviceWork]:
    """Within this context, layers on the device "meta" are served by the kernels, whose launches are counted only.

    given: parameters, and whatever else is on the device before.
    """
    work = DeviceWork(given)

    def instead(prepared, *_):
        work.kernels[prepared.kernel.__name__] += 1

    with monkeypatch.context() as patch:
        patch.setattr(backends, "plainly_torch", lambda input: False)
        patch.setattr(backends, "choose", lambda *_, **__: 1)
        patch.setattr(backends, "device_of", lambda device: DEVICES["h200"])
        patch.setattr(launch, "_start", instead)
        patch.setattr(base, "directly", lambda tensors: not torch._C._are_functorch_transforms_active())
        with work:
            yield work


def autocast(patch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Autocast to `dtype`, which the device "meta" does not know."""
    patch.setattr(base, "_computed_in", lambda tensor: dtype if tensor.is_floating_point() else tensor.dtype)
