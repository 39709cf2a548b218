"""What PyTorch's own kernels take where the persistent ones do not run: cuDNN's time of a step, as it was measured, and
T from which on a call of the persistent kernels is done sooner. Pure Python.
"""

from dataclasses import replace
from math import ceil

from .devices import Device
from .plan import Plan, product_microseconds
from .spec import CELLS, itemsize

# Measured on the H200 that plan.py's model is of (cuDNN 9.19): a step of a layer with I = H, its products included.
# Without a persistent kernel it launches several kernels a step, and that is what it takes, until the arithmetic takes
# longer. Forward and backward, and for each unit. (In bfloat16 the host sets the time: by the faster of two days'
# hosts, 22 cases up to 1536 units. On the other day a step took a fifth longer.)
CUDNN_STEP = {
    "bfloat16": ((12.7, 0.0011), (18.1, 0.0038)),
    "float16": ((5.9, 0.0022), (10.3, 0.0022)),
    "float32": ((9.0, 0.009), (18.0, 0.009)),
}
CUDNN_WORK = (8.4, 12.6)  # for each 1e9 operations of the recurrent product
CUDNN_SMALL = (2.1, 2.3)  # its persistent kernel for few units
# float16, one direction, B 16: units, forward, backward. (B 64 has no such kernel beyond 128 units.)
CUDNN_PERSISTENT = (
    (128, 1.76, 2.15), (256, 1.83, 3.83), (512, 1.81, 4.01), (768, 2.08, 4.47), (1024, 2.15, 5.41)
)  # fmt: skip
PERSISTENT_BATCH = 63
# What a call of a layer takes the host more than one of torch.nn's, in inference and forward and backward (T 2,
# 2026-11-27, float32: 18 to 84 and 243 to 300); nothing in bfloat16, whose weights PyTorch gathers anew for cuDNN at
# every call.
CALL_MORE = {"float32": (60.0, 270.0), "float16": (60.0, 270.0), "bfloat16": (0.0, 0.0)}


def cudnn_microseconds(p: Plan, device: Device, layers: int = 1, heads: int = 1) -> float:
    """Estimated time of a step of the recurrence with cuDNN as PyTorch drives it, for the problem of a plan in a module
    of so many layers: what was measured of a layer, less its large products. Heads, which the plan has as sets, cuDNN
    does not know: it takes all in one.
    """
    if heads > 1:
        p = replace(p, hidden_size=p.hidden_size * heads, sets=p.sets // heads)
    spec, bytes_ = CELLS[p.cell], itemsize(p.dtype)
    product = 2e-9 * spec.gates * p.hidden_size**2 * p.batch_size * p.sets  # 1e9 operations
    small = p.hidden_size <= ((256 if p.backward else 384) if spec.gates == 1 else (128 if p.backward else 192))
    small = small and p.dtype != "bfloat16" and p.sets == layers == 1
    static = p.dtype == "float16" and spec.gates != 3 and p.sets == layers == 1 and p.batch_size % 8 == 0
    static = static and p.hidden_size <= 1024 and p.hidden_size % 128 == 0 and p.batch_size <= PERSISTENT_BATCH
    if static:
        took = next(times[p.backward] for units, *times in CUDNN_PERSISTENT if units >= p.hidden_size)
    elif small:
        took = CUDNN_SMALL[p.backward]
    else:
        weights = spec.gates * p.hidden_size**2 * bytes_ * p.sets
        memory = 0.0 if weights <= device.l2_bytes else weights / device.memory_gigabytes_per_second / 1e3
        step, unit = CUDNN_STEP[p.dtype][p.backward]
        took = max((step + unit * p.hidden_size) * p.sets, CUDNN_WORK[p.backward] * product, memory)
    return max(took - (3 if p.backward else 1) * product_microseconds(p, device), took / 2)


def least_time(saved: float, dtype: str, training: bool) -> int:
    """T from which on a layer, or layers side by side, of which a step takes so many microseconds less than with cuDNN,
    are done sooner as a call.
    """
    return max(1, ceil(CALL_MORE[dtype][training] / max(saved, 1e-6)))
