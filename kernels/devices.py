"""The GPUs that are known here, by name: what plans, tests and estimates must know of them. Pure Python."""

import dataclasses
import difflib
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


# Bytes that a program may use, by compute capability * 10.
SHARED = {60: 49152, 61: 49152, 70: 98304, 75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
SHARED |= {103: SHARED[100], 120: 101376, 121: 101376}


def _of(arch: int, rows: str) -> dict[str, Device]:
    """Devices of one compute capability, a line each: name, multiprocessors, gigahertz, MiB of L2 cache, gigabytes a
    second. The key is the name in one word: "RTX 4070 Ti" is rtx4070ti.
    """
    found = {}
    for line in rows.strip().splitlines():
        *name, multiprocessors, gigahertz, l2, bandwidth = line.split()
        found["".join(name).lower().replace("-", "")] = Device(
            " ".join(("NVIDIA", *name)), arch, int(multiprocessors), SHARED[arch], float(gigahertz), int(l2) << 20,
            float(bandwidth),
        )  # fmt: skip
    return found


# Multiprocessors and shared memory as the vendor publishes them, or the devices themselves say. Clocks and bandwidths
# as they are sustained, some 10 % below what is published; they, and the caches, only weigh in estimates, and of a
# device that is there clock and cache are its own.
DEVICES = {
    **_of(90, """
        H200            132 1.8  60 3900
        H100            132 1.8  50 2600
        H100 PCIe       114 1.6  50 1800
        H100 NVL        132 1.7  50 3500
        H200 NVL        132 1.7  60 4300
        H800            132 1.8  50 2600
        H20              78 1.8  60 3600
        GH200           132 1.8  50 3600
    """),
    **_of(80, """
        A100            108 1.4  40 1800
        A800            108 1.4  40 1800
        A30              56 1.4  24  840
    """),
    **_of(100, """
        B200            148 1.9 126 7000
        GB200           152 1.9 126 7000
    """),
    **_of(103, """
        B300            148 1.9 126 7000
        GB300           152 1.9 126 7000
    """),
    **_of(86, """
        A2               10 1.7   2  180
        A10              72 1.6   6  540
        A10G             80 1.6   6  540
        A40              84 1.7   6  630
        RTX A2000        26 1.2   3  260
        RTX A4000        48 1.5   4  400
        RTX A4500        56 1.6   6  580
        RTX A5000        64 1.7   6  690
        RTX A5500        80 1.7   6  690
        RTX A6000        84 1.7   6  690
        RTX 3050         20 1.7   2  200
        RTX 3060         28 1.7   3  320
        RTX 3060 Ti      38 1.7   4  400
        RTX 3070         46 1.7   4  400
        RTX 3070 Ti      48 1.7   4  550
        RTX 3080         68 1.7   5  690
        RTX 3080 12GB    70 1.7   6  820
        RTX 3080 Ti      80 1.7   6  820
        RTX 3090         82 1.7   6  850
        RTX 3090 Ti      84 1.8   6  910
        RTX 3050 6GB     18 1.5   2  150
        RTX 3060 Laptop  30 1.5   3  300
        RTX 3070 Laptop  40 1.5   4  400
        RTX 3070 Ti Laptop 46 1.5 4  400
        RTX 3080 Laptop  48 1.5   4  400
        RTX 3080 Ti Laptop 58 1.5 6  460
    """),
    **_of(89, """
        L4               58 1.9  48  270
        L20              92 2.4  96  780
        L40             142 2.4  96  780
        L40S            142 2.4  96  780
        RTX 4000 Ada     48 2.1  48  320
        RTX 4500 Ada     60 2.4  48  390
        RTX 5000 Ada    100 2.4  64  520
        RTX 6000 Ada    142 2.4  96  870
        RTX 4060         24 2.4  24  250
        RTX 4060 Ti      34 2.5  32  260
        RTX 4070         46 2.4  36  450
        RTX 4070 SUPER   56 2.4  48  450
        RTX 4070 Ti      60 2.5  48  450
        RTX 4070 Ti SUPER 66 2.5 48  610
        RTX 4080         76 2.5  64  650
        RTX 4080 SUPER   80 2.5  64  660
        RTX 4090        128 2.5  72  950
        RTX 4090 D      114 2.5  72  950
        RTX 4050 Laptop  20 2.2  12  170
        RTX 4060 Laptop  24 2.2  32  230
        RTX 4070 Laptop  36 2.0  32  230
        RTX 4080 Laptop  58 2.0  48  390
        RTX 4090 Laptop  76 1.9  64  520
    """),
    **_of(120, """
        RTX 5060         30 2.4  32  400
        RTX 5060 Ti      36 2.5  32  400
        RTX 5070         48 2.4  48  600
        RTX 5070 Ti      70 2.4  48  800
        RTX 5080         84 2.6  64  860
        RTX 5090        170 2.4  96 1650
        RTX 5090 D      170 2.4  96 1650
        RTX 5060 Laptop  26 2.2  32  350
        RTX 5070 Laptop  36 2.0  32  350
        RTX 5070 Ti Laptop 46 2.0 48 600
        RTX 5080 Laptop  60 2.0  64  800
        RTX 5090 Laptop  82 2.0  64  800
        RTX PRO 4000     70 2.4  48  600
        RTX PRO 4500     82 2.4  64  800
        RTX PRO 5000    110 2.4  96 1200
        RTX PRO 6000    188 2.4 128 1600
        RTX PRO 6000 Max-Q 188 2.1 128 1600
    """),
    **_of(121, """
        GB10             48 2.4  24  250
    """),
}  # fmt: skip
# Known by name, so that the answer can be that they are too old.
TOO_OLD = {
    **_of(60, "P100 56 1.3 4 650"),
    **_of(61, """
        GTX 1060         10 1.7   2  180
        GTX 1070         15 1.7   2  230
        GTX 1080         20 1.7   2  290
        GTX 1080 Ti      28 1.6   3  440
    """),
    **_of(70, """
        V100             80 1.5   6  800
        TITAN V          80 1.4   5  590
    """),
    **_of(75, """
        T4               40 1.5   4  270
        GTX 1650         14 1.6   1  120
        GTX 1660         22 1.7   2  170
        GTX 1660 Ti      24 1.7   2  260
        RTX 2060         30 1.7   3  310
        RTX 2060 SUPER   34 1.6   4  400
        RTX 2070         36 1.6   4  400
        RTX 2070 SUPER   40 1.7   4  400
        RTX 2080         46 1.7   4  400
        RTX 2080 SUPER   48 1.8   4  450
        RTX 2080 Ti      68 1.5   5  550
        TITAN RTX        72 1.7   6  600
        Quadro RTX 6000  72 1.7   6  600
        Quadro RTX 8000  72 1.7   6  600
    """),
}  # fmt: skip
# What a name may go on with and still mean the same GPU: "A100-SXM4-80GB", "H100 80GB HBM3". (Not "Ti", "Laptop", ...)
SAME_GPU = re.compile(r"sxm[0-9]*|pcie|hbm[0-9]*e?|[0-9]+gb?|generation|workstation|server|edition")
# A GPU by its sizes: "sm_89, 24 multiprocessors".
BY_HAND = re.compile(r"(?:sm_?|compute capability )([0-9]{1,2})\.?([0-9])\W+([0-9]+) *(?:multiprocessors|sms)")


def _words(name: str) -> list[str]:
    """The words of a name that tell GPUs apart."""
    vendor = ("nvidia", "geforce", "tesla", "gpu", "blackwell")
    one_word = re.sub(r"\b([0-9]+) gb\b", r"\1gb", name.lower())
    return [word for word in re.findall("[a-z0-9]+", one_word) if word not in vendor]


def named(name: str) -> Device | None:
    """The GPU that a name means, as people or PyTorch write it: "H200", "NVIDIA H100 80GB HBM3", "rtx 4090", "3090"; or
    its sizes, "sm_89, 24 multiprocessors". None where it means none that is known here.
    """
    sizes = BY_HAND.fullmatch(name.strip().lower())
    if sizes is not None:
        major, minor, multiprocessors = map(int, sizes.groups())
        return of_sizes(10 * major + minor, multiprocessors) if multiprocessors > 0 else None
    words = _words(name)
    for count in range(len(words), 0, -1):
        joined = "".join(words[:count])
        for key in (joined, f"rtx{joined}", f"gtx{joined}", joined.removeprefix("rtx")):
            found = DEVICES.get(key) or TOO_OLD.get(key)
            if found is not None:
                return found if all(map(SAME_GPU.fullmatch, words[count:])) else None
    return None


def nearest(name: str) -> list[str]:
    """The names of the few known GPUs that are most like a name that means none."""
    known = {re.sub("^(rtx|gtx)", "", key): gpu for key, gpu in (DEVICES | TOO_OLD).items()}
    alike = difflib.get_close_matches(re.sub("^(rtx|gtx)", "", "".join(_words(name))), known, 4, 0.5)
    found = [known[key].name for key in alike or ("h200", "a100", "4090")]
    return [one.removeprefix("NVIDIA ") for one in found]


def of_sizes(arch: int, multiprocessors: int) -> Device:
    """A GPU of which no more is known; the rest is that of the known one that is most like it."""
    like = min(
        (*DEVICES.values(), *TOO_OLD.values()),
        key=lambda known: (abs(known.arch - arch), abs(known.multiprocessors - multiprocessors)),
    )
    name = f"a GPU of compute capability {arch // 10}.{arch % 10}"
    return dataclasses.replace(like, name=name, arch=arch, multiprocessors=multiprocessors)
