"""How the kernels run on CPU tensors in this process, and schedules for them: `with concurrent_programs(seed):` around
any call of a layer or a launcher.

    TRITON_INTERPRET=1        in Triton's interpreter (kernels/interpreter.py)
    RNN_GPU_TEST_MACHINE=1    compiled, on the machine for PTX (kernels/machine); RNN_GPU_TEST_ARCH=80: for that
    architecture
"""

import contextlib
import os

from rnn_gpu.kernels import interpreter, machine
from rnn_gpu.kernels.interpreter import interpreting

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_MACHINE = os.environ.get("RNN_GPU_TEST_MACHINE") == "1"
ARCH = int(os.environ.get("RNN_GPU_TEST_ARCH", "90"))

__all__ = ["ARCH", "INTERPRETED", "ON_MACHINE", "concurrent_programs", "interpreting"]


@contextlib.contextmanager
def concurrent_programs(seed: int = 0, torn: bool = False, leave_out=()):
    """Schedules drawn from a seed, by whatever runs the kernels here. On the machine every store is torn; `torn` makes
    it later. -> what `on_machine` gives, or None.
    """
    if ON_MACHINE:
        with on_machine(seed, delay=0.05 if torn else 0.3, leave_out=leave_out) as log:
            yield log
    else:
        with interpreter.concurrent_programs(seed, torn, leave_out):
            yield


@contextlib.contextmanager
def on_machine(seed: int, **schedule):
    """The machine, for the architecture of this process; nothing may be prefetched that does not exist."""
    with machine.on_machine(ARCH, seed, **schedule) as log:
        yield log
    outside = [name for name, counts in log if counts.prefetched_outside]
    assert not outside, f"{outside[0]} prefetched from an address that does not exist"
