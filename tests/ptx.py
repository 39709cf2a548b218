"""Small kernels in PTX for tests of the machine: `lanes` gives every lane of a warp its own operands and runs a few
instructions.
"""

import numpy as np
import torch

from rnn_gpu.kernels.machine.launch import Machine
from rnn_gpu.kernels.machine.parse import WIDTH
from rnn_gpu.kernels.machine.schedule import Counts, Schedule
from rnn_gpu.kernels.machine.values import UNSIGNED

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
"""


def kernel(parameters: int, body: str) -> str:
    """A kernel with so many pointers p0, p1, ... as parameters, in the registers %p0..., and %tid in `tid`."""
    heads = ", ".join(f".param .u64 param_{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [param_{i}];" for i in range(parameters))
    return f"""{HEAD}
.visible .entry probe({heads}) {{
.reg .b32 tid;
.reg .b64 %rd<{parameters + 1}>, offset;
mov.u32 tid, %tid.x;
{loads}
{body}
ret;
}}"""


def launch(body: str, tensors, grid=1, warps: int = 1, shared: int = 0, **schedule) -> Counts:
    """Run `kernel` on these tensors."""
    machine = Machine(kernel(len(tensors), body), warps, shared)
    return machine.run((grid,), list(tensors), schedule=Schedule(**schedule))


def lanes(code: str, outputs: dict[str, str], inputs: dict[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Run `code` on registers by name: {name: type} for outputs, {name: (type, one number for each lane)} for inputs ->
    outputs as unsigned integers of their width; predicates as 0 and 1. A register may be both.
    """
    body, tensors, found = [], [], {}
    types = {name: kind for name, (kind, _) in inputs.items()} | outputs
    for name, kind in types.items():
        body.append(f".reg .{kind if kind == 'pred' else 'b' + str(8 * max(2, WIDTH[kind]))} {name};")
    for name, (kind, values) in inputs.items():
        width = max(1, WIDTH[kind])
        values = np.broadcast_to(np.asarray(values), 32)
        data = values.astype(UNSIGNED[width]) if values.dtype.kind in "bui" else values
        tensors.append(torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy()))
        body.append(f"mad.wide.u32 offset, tid, {width}, %rd{len(tensors) - 1};")
        if kind == "pred":
            body.append(f"{{ .reg .b16 x; ld.global.u8 x, [offset]; setp.ne.b16 {name}, x, 0; }}")
        else:
            body.append(f"ld.global.b{8 * width} {name}, [offset];")
    body.append(code)
    for name, kind in outputs.items():
        width = 4 if kind == "pred" else WIDTH[kind]
        tensors.append(torch.zeros(32 * width, dtype=torch.uint8))
        found[name] = tensors[-1].numpy().view(UNSIGNED[width])
        body.append(f"mad.wide.u32 offset, tid, {width}, %rd{len(tensors) - 1};")
        if kind == "pred":
            body.append(f"{{ .reg .b32 x; selp.b32 x, 1, 0, {name}; st.global.b32 [offset], x; }}")
        else:
            body.append(f"st.global.b{8 * width} [offset], {name};")
    launch("\n".join(body), tensors)
    return found


def value_of(code: str, kind: str, *inputs: tuple[str, np.ndarray]) -> np.ndarray:
    """`code` with $0 for the result and $1, $2... for the inputs -> the result, as unsigned integers."""
    named = {f"x{i + 1}": given for i, given in enumerate(inputs)}
    for i in range(len(inputs), -1, -1):
        code = code.replace(f"${i}", "x0" if i == 0 else f"x{i}")
    return lanes(code, {"x0": kind}, named)["x0"]
