"""What the kernels cost: timed on a GPU, and machine code counted offline. README.md lists the scripts."""

import os

# Before torch is imported: idle OpenMP threads must sleep. Where they spin on busy cores, a call of 23 ms on the CPU
# can stall for seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
