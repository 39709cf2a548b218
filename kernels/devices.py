"""The GPUs that are known here, by name: what plans, tests and estimates must know of them. Pure Python."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What the plan must know of a GPU. arch: compute capability * 10; shared_memory: bytes a program may use."""

    name: str
    arch: int
    multiprocessors: int
    shared_memory: int
    gigahertz: float
    l2_bytes: int
    memory_gigabytes_per_second: float


# Multiprocessors, shared memory and caches as the vendor publishes them; clocks and bandwidths as they are sustained,
# some 10 % below what is published.
DEVICES = {
    "h200": Device("NVIDIA H200", 90, 132, 232448, 1.8, 60 << 20, 3900),
    "h100": Device("NVIDIA H100", 90, 132, 232448, 1.8, 50 << 20, 2600),
    "h100pcie": Device("NVIDIA H100 PCIe", 90, 114, 232448, 1.6, 50 << 20, 1800),
    "a100": Device("NVIDIA A100", 80, 108, 166912, 1.4, 40 << 20, 1800),
    "b200": Device("NVIDIA B200", 100, 148, 232448, 1.9, 126 << 20, 7000),
    "a10": Device("NVIDIA A10", 86, 72, 101376, 1.6, 6 << 20, 540),
    "a10g": Device("NVIDIA A10G", 86, 80, 101376, 1.6, 6 << 20, 540),
    "a6000": Device("NVIDIA RTX A6000", 86, 84, 101376, 1.7, 6 << 20, 690),
    "l4": Device("NVIDIA L4", 89, 58, 101376, 1.9, 48 << 20, 270),
    "l40s": Device("NVIDIA L40S", 89, 142, 101376, 2.4, 96 << 20, 780),
    "rtx3080": Device("NVIDIA RTX 3080", 86, 68, 101376, 1.7, 5 << 20, 690),
    "rtx3090": Device("NVIDIA RTX 3090", 86, 82, 101376, 1.7, 6 << 20, 850),
    "rtx4080": Device("NVIDIA RTX 4080", 89, 76, 101376, 2.5, 64 << 20, 650),
    "rtx4090": Device("NVIDIA RTX 4090", 89, 128, 101376, 2.5, 72 << 20, 950),
    "rtx5080": Device("NVIDIA RTX 5080", 120, 84, 101376, 2.6, 64 << 20, 860),
    "rtx5090": Device("NVIDIA RTX 5090", 120, 170, 101376, 2.4, 96 << 20, 1650),
}
# Known by name, so that the answer can be that they are too old.
TOO_OLD = {
    "t4": Device("NVIDIA T4", 75, 40, 65536, 1.5, 4 << 20, 270),
    "v100": Device("NVIDIA V100", 70, 80, 98304, 1.5, 6 << 20, 800),
}
# What a name may go on with and still mean the same GPU: "A100-SXM4-80GB", "H100 80GB HBM3". (Not "Ti", "Laptop", ...)
SAME_GPU = re.compile(r"sxm[0-9]*|pcie|hbm[0-9]*e?|[0-9]+gb")


def named(name: str) -> Device | None:
    """The GPU that a name means, as people or PyTorch write it: "H200", "NVIDIA H100 80GB HBM3", "rtx 4090", "3090".
    None where it means none that is known here.
    """
    vendor = ("nvidia", "geforce", "tesla", "gpu")
    words = [word for word in re.findall("[a-z0-9]+", name.lower()) if word not in vendor]
    for count in range(len(words), 0, -1):
        joined = "".join(words[:count])
        for key in (joined, f"rtx{joined}", joined.removeprefix("rtx")):
            found = DEVICES.get(key) or TOO_OLD.get(key)
            if found is not None:
                return found if all(map(SAME_GPU.fullmatch, words[count:])) else None
    return None
