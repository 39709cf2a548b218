"""What is measured: the cases, the grids they come from, the work in them, and the floor below which no time can be.

T time steps, B rows of the batch, H hidden units, I input features (always H here), G gates, L layers, D directions.
"""

import itertools
from dataclasses import asdict, dataclass

from rnn_gpu.dtypes import dtype_name
from rnn_gpu.kernels.plan import Device
from rnn_gpu.kernels.spec import CELLS, itemsize

MODES = {
    "inference": "forward without autograd",
    "forward": "forward that keeps what the backward needs",
    "forward+backward": "forward, then the gradients of the input and of every weight",
}
SHORT = {"T": "time", "B": "batch_size", "H": "hidden_size", "L": "layers", "D": "directions"}


@dataclass(frozen=True)
class Case:
    """A recurrent layer and the size of its input. The input has as many features as the layer has hidden units."""

    cell: str
    dtype: str
    hidden_size: int
    batch_size: int
    time: int
    layers: int = 1
    directions: int = 1

    def __str__(self) -> str:
        """As a row of a table says it."""
        shape = f"H {self.hidden_size:4} B {self.batch_size:3} T {self.time:4}"
        more = f" L {self.layers}" if self.layers > 1 else ""
        return f"{self.cell} {self.dtype} {shape}{more}{' both ways' if self.directions == 2 else ''}"

    @property
    def key(self) -> tuple:
        """All that tells one case from another, in the order of the ledger's columns."""
        return tuple(asdict(self).values())


def product(cells, dtypes, hidden_sizes, batch_sizes, times=(1024,), layers=(1,), directions=(1,)) -> list[Case]:
    """All cases of the given values, smaller ones first within a cell and type."""
    return [
        Case(*values)
        for values in itertools.product(cells, dtypes, hidden_sizes, batch_sizes, times, layers, directions)
    ]


def core() -> list[Case]:
    """The 111 cases that ratios and geometric means are quoted on: what people use, and a few that are hard."""
    return list(dict.fromkeys([*long(), *short(), *selected(stacks(), ["cell=lstm", "dtype=bfloat16"])]))


def long() -> list[Case]:
    """The 58 of them in which the step counts and the host does not."""
    return [
        *product(["lstm"], ["bfloat16", "float16", "float32"], [128, 256, 512, 768, 1024], [16, 64]),
        *product(["gru"], ["bfloat16", "float32"], [256, 512, 1024], [16, 64]),
        *product(["rnn_tanh"], ["bfloat16"], [512, 1024], [16]),
        *product(["lstm"], ["bfloat16"], [650, 1536, 2048], [16, 64]),
        *product(["lstm"], ["bfloat16"], [512], [1, 128, 256], [128]),
        *product(["lstm"], ["bfloat16"], [512], [16], [1024], [2], [1, 2]),
        *product(["lstm", "gru"], ["bfloat16"], [512], [16], [1024], [1], [2]),
        *product(["lstm"], ["float16"], [512], [16], [1024], [4], [1]),
    ]


def short() -> list[Case]:
    """The 36 of them with sequences as most people have them, where the host counts as much as the step."""
    return product(["lstm", "gru"], ["bfloat16"], [128, 256, 512], [16, 64], [32, 64, 128])


def stacks() -> list[Case]:
    """Layers upon layers, which may run side by side: against "layer by layer", and against cuDNN."""
    return product(["lstm", "gru"], ["bfloat16", "float16"], [256, 512, 1024], [16, 64], [1024], [2, 4, 8])


def full() -> list[Case]:
    """Everything, the core and stacks first: thousands of cases, which --resume fills in over time."""
    everything = product(
        ["lstm", "gru", "rnn_tanh"],
        ["bfloat16", "float16", "float32"],
        [64, 128, 256, 512, 650, 768, 1024, 1536, 2048],
        [1, 8, 16, 32, 64, 128, 256],
        [1024, 128],
        [1, 2, 4],
        [1, 2],
    )
    return list(dict.fromkeys([*core(), *stacks(), *everything]))


def quick() -> list[Case]:
    """A look of less than three minutes."""
    return [
        *product(["lstm"], ["bfloat16"], [256, 1024], [16], [512]),
        *product(["lstm"], ["float16"], [512], [16], [512]),
        *product(["gru"], ["bfloat16"], [512], [64], [512]),
        *product(["lstm"], ["float32"], [512], [16], [512]),
    ]


def tiny() -> list[Case]:
    """What a CPU times in seconds: enough to see that everything works."""
    return [
        *product(["lstm", "gru", "rnn_tanh"], ["float32"], [64], [4], [16]),
        *product(["lstm"], ["bfloat16"], [64], [4], [16]),
        Case("lstm", "float32", 64, 4, 16, layers=2, directions=2),
    ]


GRIDS = {"quick": quick, "core": core, "long": long, "short": short, "stacks": stacks, "full": full, "tiny": tiny}


def selected(cases: list[Case], conditions: list[str]) -> list[Case]:
    """The cases that meet every condition, such as "cell=lstm,gru" or "H=512". ValueError for one nobody can meet."""
    for condition in conditions:
        name, separator, values = condition.partition("=")
        field = SHORT.get(name, name)
        if not separator or field not in Case.__dataclass_fields__:
            known = ", ".join([*Case.__dataclass_fields__, *SHORT])
            raise ValueError(f"unknown condition {condition!r}: NAME=VALUE[,VALUE...] with one of {known}")
        wanted = {dtype_name(value) if field == "dtype" else value for value in values.split(",")}
        known = sorted({getattr(case, field) for case in cases})
        cases = [case for case in cases if str(getattr(case, field)) in wanted]
        if known and not cases:
            raise ValueError(f"no case has {condition}: there is {name} {', '.join(map(str, known))}")
    return cases


def rows_of(case: Case) -> list[tuple[int, int]]:
    """(input features, hidden units) of every layer and direction."""
    sizes = []
    for layer in range(case.layers):
        features = case.hidden_size * (case.directions if layer else 1)
        sizes += [(features, case.hidden_size)] * case.directions
    return sizes


def step_flops(case: Case) -> tuple[int, int]:
    """Operations of a time step forward, all layers: of the products with the input, of those with the hidden state."""
    each = 2 * CELLS[case.cell].gates * case.batch_size
    rows = rows_of(case)
    return sum(each * h * i for i, h in rows), sum(each * h * h for _, h in rows)


def flops(case: Case, mode: str) -> int:
    """Operations of a call, products alone. A backward has twice as many: gradients of states and of weights."""
    return sum(step_flops(case)) * case.time * (3 if mode == "forward+backward" else 1)


# The floor. All of these are the vendor's or others' published figures, none is a measurement of this project.
# Operations of a multiprocessor in a clock, dense, on tensor cores with float32 sums: 16 bit; tf32 is half of it.
TENSOR_FLOPS = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
PLAIN_FLOPS = {80: 128}  # full float32, without tensor cores; 256 elsewhere
# A state has to get from one multiprocessor to another: a store to and a load from the nearer half of the second-level
# cache, 258 cycles each on an H200.
EXCHANGE_MICROSECONDS = 0.28
EQUATIONS_MICROSECONDS = 0.05  # a product's last instruction, a sigmoid and a tanh one after another: about 100 cycles
ON_ONE_MULTIPROCESSOR = (256 << 10) + (228 << 10)  # bytes of registers and of shared memory: more weights need several


@dataclass(frozen=True)
class Floor:
    """Microseconds a step that no program can go below on a device, by what sets the bound. An estimate.

    chain: what every step must wait for. work: all products at the device's peak. memory: input, output and weights,
    once. docs/performance.md says more.
    """

    chain: float
    work: float
    memory: float

    @property
    def microseconds(self) -> float:
        """The largest of the three: at best they overlap completely."""
        return max(self.chain, self.work, self.memory)


def floor(case: Case, mode: str, device: Device, precision: str | None = None) -> Floor | None:
    """The floor of a case, or None for a device whose peak is not known here. precision: "ieee" or "tf32" for
    float32.
    """
    if device.arch not in TENSOR_FLOPS:
        return None
    a_clock = TENSOR_FLOPS[device.arch] // (2 if case.dtype == "float32" else 1)
    if case.dtype == "float32" and precision == "ieee":
        a_clock = PLAIN_FLOPS.get(device.arch, 256)
    peak = a_clock * device.multiprocessors * device.gigahertz * 1e3  # operations a microsecond
    input_flops, hidden_flops = step_flops(case)
    size, gates = itemsize(case.dtype), CELLS[case.cell].gates
    exchanged = gates * case.hidden_size**2 * size > ON_ONE_MULTIPROCESSOR
    chain = EQUATIONS_MICROSECONDS + (EXCHANGE_MICROSECONDS if exchanged else 0.0) + hidden_flops / case.layers / peak
    weights = sum(gates * h * (i + h) for i, h in rows_of(case)) * size / case.time
    passed = (
        case.batch_size * case.hidden_size * (1 + case.directions) * size
    )  # the input, read, and the output, written
    forward = (chain, (input_flops + hidden_flops) / peak, weights + passed)
    if mode == "forward+backward":  # a second chain; twice the work; both read again, both gradients, the weights' too
        forward = (2 * forward[0], 3 * forward[1], 3 * weights + 3 * passed)
    chain, work, moved = forward
    return Floor(chain, work, moved / (device.memory_gigabytes_per_second * 1e3))
