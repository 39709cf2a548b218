"""Problems for the launchers, shared by the interpreted tests and those on a GPU.

A problem is a few numbers; `data` draws its tensors, `plans` cuts it into programs, `run` gives it to the kernels,
`oracle` and `loop` compute the same with rnn_gpu.reference, and `assert_right` compares. Results are dicts by
name, the same names everywhere:

    y         [T, B, N, H]    outputs                       d_input  [T, B, N, G*H]  by the input side of the gate sums
    c_n       [N, B, H]       final carry, LSTM alone       d_hidden [T, B, N, G*H]  by their hidden side
    d_h0      [N, B, H]                                     d_c0     [N, B, H]       LSTM alone

T steps, B rows, N weight sets, G gates, H hidden units; gates in the order of torch.nn.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rnn_gpu import reference
from rnn_gpu.kernels.plan import DEVICES, Device, Plan, plan
from rnn_gpu.kernels.spec import CELLS, chunk_width, padded, runs_backwards
from tests.tolerances import assert_close_to_oracle


@dataclass(frozen=True)
class Problem:
    """What is to be computed. precision: "ieee" or "tf32" for float32, else None; reversed_sets as layer.py has it."""

    cell: str
    hidden_size: int
    batch: int
    time: int
    dtype: torch.dtype = torch.float32
    precision: str | None = None
    sets: int = 1
    reversed_sets: int = 0
    bias: bool = True
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        """Short, for the names of tests."""
        kind = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[self.dtype_name]
        kind += f"-{self.precision}" if self.precision else ""
        return f"{self.cell}-H{self.hidden_size}-B{self.batch}-T{self.time}-{kind}-N{self.sets}-rev{self.reversed_sets}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def reverse(self, n: int) -> bool:
        """Whether set n runs backwards in time."""
        return runs_backwards(self.reversed_sets, n)


@dataclass(frozen=True, eq=False)
class Data:
    """The tensors of a problem, as the launchers take them; any gradient may be None."""

    x_part: Tensor
    weight_hh: Tensor
    bias_hn: Tensor | None
    h0: Tensor
    c0: Tensor | None
    d_y: Tensor | None
    d_h_n: Tensor | None
    d_c_n: Tensor | None


@lru_cache(maxsize=64)
def data(problem: Problem) -> Data:
    """Random tensors, the same for equal problems. Do not write to them."""
    generator = torch.Generator().manual_seed(problem.seed)
    gates, size = CELLS[problem.cell].gates, problem.hidden_size
    time, batch, sets = problem.time, problem.batch, problem.sets

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(device=problem.device, dtype=problem.dtype)

    lstm = problem.cell == "lstm"
    x_part = draw(time, batch, sets, gates * size)
    # Strong enough that every state matters to its neighbours in the next step.
    scale = size**-0.5
    if problem.cell == "rnn_relu":
        # Far from the kink, where anybody's rounding error turns a derivative of 0 into 1 and norms compare nothing.
        x_part, scale = x_part + 4 * x_part.sign(), scale / 4
    return Data(
        x_part=x_part,
        weight_hh=draw(sets, gates * size, size, scale=scale),
        bias_hn=draw(sets, size, scale=0.3) if problem.cell == "gru" and problem.bias else None,
        h0=draw(sets, batch, size),
        c0=draw(sets, batch, size) if lstm else None,
        d_y=draw(time, batch, sets, size),
        d_h_n=draw(sets, batch, size),
        d_c_n=draw(sets, batch, size) if lstm else None,
    )


# ---- The oracle and a peer -------------------------------------------------------------------------------------------


def round_to_tf32(values: Tensor) -> Tensor:
    """float32 rounded to tf32 to nearest, as cuDNN does with the operands of a product."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class RoundedProduct(torch.autograd.Function):
    """a [..., K] @ b [K, N] with rounded operands; so are the products of its backward."""

    @staticmethod
    def forward(ctx, a, b, rounding):
        a, b = rounding(a), rounding(b)
        ctx.save_for_backward(a, b)
        ctx.rounding = rounding
        return a @ b

    @staticmethod
    def backward(ctx, d):
        (a, b), d = ctx.saved_tensors, ctx.rounding(d)
        return d @ b.mT, a.flatten(0, -2).mT @ d.flatten(0, -2), None


class RoundedProducts(TorchFunctionMode):
    """Within this context the operands of float32 products are rounded, by a function or to a dtype, and nothing else:
    what tensor cores do, and a CPU has no tf32 of its own.
    """

    def __init__(self, rounding):
        super().__init__()
        self.rounding = (lambda a: a.to(rounding).float()) if isinstance(rounding, torch.dtype) else rounding

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            assert len(args) == 2 and args[1].dim() == 2
            if args[0].dtype == torch.float32:
                return RoundedProduct.apply(*args, self.rounding)
        return function(*args, **(kwargs or {}))


def by_reference(problem: Problem, given: Data, dtype: torch.dtype) -> dict[str, Tensor]:
    """The results by the readable loops, computed in dtype."""

    def of_set(tensor: Tensor | None, n: int, dim: int = 0) -> Tensor | None:
        return None if tensor is None else tensor.select(dim, n).to(dtype)

    per_set = []
    for n in range(problem.sets):
        x_part, d_y = of_set(given.x_part, n, 2), of_set(given.d_y, n, 2)
        weight_hh, bias_hn = of_set(given.weight_hh, n), of_set(given.bias_hn, n)
        h0, c0, d_h_n, d_c_n = (of_set(tensor, n) for tensor in (given.h0, given.c0, given.d_h_n, given.d_c_n))
        start = (problem.cell, x_part, weight_hh, bias_hn, h0, c0)
        y, _, c_n = reference.recurrence(*start, problem.reverse(n))
        d_y = torch.zeros_like(y) if d_y is None else d_y
        d_h_n = torch.zeros_like(h0) if d_h_n is None else d_h_n
        d_c_n = torch.zeros_like(c0) if d_c_n is None and c0 is not None else d_c_n
        d_hidden, d_input, d_h0, d_c0 = reference.recurrence_backward(*start, y, d_y, d_h_n, d_c_n, problem.reverse(n))
        per_set.append(dict(y=y, c_n=c_n, d_input=d_input, d_hidden=d_hidden, d_h0=d_h0, d_c0=d_c0))
    sets_at = {"y": 2, "d_input": 2, "d_hidden": 2}
    return {
        name: torch.stack([results[name] for results in per_set], sets_at.get(name, 0))
        for name, first in per_set[0].items()
        if first is not None
    }


def oracle(problem: Problem, given: Data | None = None) -> dict[str, Tensor]:
    """The results in float64."""
    return by_reference(problem, given, torch.float64) if given is not None else _oracle(problem)


def loop(problem: Problem, given: Data | None = None) -> dict[str, Tensor]:
    """The results by plain loops in the problem's own dtype and precision: the peer of tolerances.py."""
    if given is None:
        return _loop(problem)
    if problem.precision == "tf32":
        with RoundedProducts(round_to_tf32):
            return by_reference(problem, given, problem.dtype)
    return by_reference(problem, given, problem.dtype)


@lru_cache(maxsize=64)
def _oracle(problem: Problem) -> dict[str, Tensor]:
    return oracle(problem, data(problem))


@lru_cache(maxsize=64)
def _loop(problem: Problem) -> dict[str, Tensor]:
    return loop(problem, data(problem))


# ---- Plans -----------------------------------------------------------------------------------------------------------


def plans(
    problem: Problem, alone: bool = False, device: Device = DEVICES["h200"], waits: int | None = None, **changes
) -> tuple[Plan, Plan]:
    """The planner's plans forward and backward, with `changes` to both (see `changed`), and `waits` to the backward.

    alone: one program may hold all units, and for the problems of these tests then does.
    """
    found = []
    for backward in (False, True):
        p = plan(
            problem.cell, problem.hidden_size, problem.batch, problem.sets, problem.dtype_name, device,
            backward, problem.precision, allow_alone=alone,
        )  # fmt: skip
        assert isinstance(p, Plan), f"no plan for {problem}: {p}"
        if backward and waits is not None and CELLS[problem.cell].gates > 1:
            p = dataclasses.replace(p, waits=waits)
        found.append(changed(p, **changes) if changes else p)
    return found[0], found[1]


def changed(p: Plan, **changes) -> Plan:
    """A plan that the planner did not choose: with `changes`, and everything else that follows from them.

    registers, shared: chunks of weights kept there, as far as there are so many; all others are streamed.
    """
    gates, size = CELLS[p.cell].gates, padded(p.hidden_size, p.dtype)
    if changes.get("units") == 8 and (p.backward or gates == 1):
        changes["units"] = 16  # a tile of weights has 16 rows at least
    if "units" in changes:
        if "gates_per_tile" not in changes and gates == 3:
            changes["gates_per_tile"] = 2 if changes["units"] == 8 else 1
        changes["unit_slices"] = -(-size // changes["units"])
    if {"warps", "registers", "shared"} & set(changes):
        warps = changes.get("warps", p.warps)
        chunks = -(-size // chunk_width(warps, p.dtype))
        registers = min(changes.get("registers", chunks), chunks)
        shared = min(changes.get("shared", 0), chunks - registers)
        changes |= dict(registers=registers, shared=shared, streamed=chunks - registers - shared)
    p = dataclasses.replace(p, **changes)
    wanted = -(-p.batch_size // (p.rows * p.slices))
    batch_slices = changes.get("batch_slices", wanted)
    return dataclasses.replace(p, batch_slices=batch_slices, launches=-(-wanted // batch_slices))


# ---- The kernels -----------------------------------------------------------------------------------------------------


# Whether a forward's h_n were others than its last outputs, of each on a GPU: to look at once would wait for the
# device, which would end what streams do at the same time, and no CUDA graph could hold it.
unlike_last: list[Tensor] = []


def assert_no_other_h_n() -> None:
    """What `run_forward` has found since the last time, on a GPU."""
    found, unlike_last[:] = [*unlike_last], []
    assert not any(found), "h_n is not the last output"


def run_forward(problem: Problem, forward_plan: Plan, given: Data, saving: str = "full"):
    """layer.forward on a copy of x_part -> y, c_n, aux, and that copy: the gates, if `saving` is "full". h_n must
    be the outputs of each set's last step: AssertionError; on a GPU by `assert_no_other_h_n`.
    """
    from rnn_gpu.kernels import layer

    gates = given.x_part.flatten(0, 1).clone()
    rows = layer.Rows(problem.time, problem.batch)
    states = given.h0, given.c0
    c_n = (
        None if given.c0 is None else torch.empty_like(given.c0, dtype=torch.float32)
    )  # all that the kernel knows of c
    y, h_n, c_n, aux, _ = layer.forward(
        forward_plan, gates, given.weight_hh, given.bias_hn, *states, rows, problem.reversed_sets, saving, c_n
    )
    steps = (problem.time, problem.batch)
    for n, last in enumerate(h_n):
        shown = y.unflatten(0, steps)[0 if problem.reverse(n) else -1, :, n]
        unlike_last.append((bits(last) != bits(shown)).any())
    if y.device.type == "cpu":
        assert_no_other_h_n()
    return y.unflatten(0, steps), c_n, None if aux is None else aux.unflatten(0, steps), gates.unflatten(0, steps)


def run_backward(problem: Problem, backward_plan: Plan, given: Data, y: Tensor, aux: Tensor | None, gates: Tensor):
    """layer.backward from what `run_forward` left -> d_gates [T, B, N, E, H], d_carry_0."""
    from rnn_gpu.kernels import layer

    d_gates, d_carry_0, *_ = layer.backward(
        backward_plan,
        None if given.d_y is None else given.d_y.flatten(0, 1),
        given.d_h_n,
        given.d_c_n,
        given.weight_hh,
        gates.flatten(0, 1) if CELLS[problem.cell].saves else None,
        None if aux is None else aux.flatten(0, 1),
        y.flatten(0, 1),
        given.h0,
        given.c0,
        layer.Rows(problem.time, problem.batch),
        problem.reversed_sets,
    )
    return d_gates.unflatten(0, (problem.time, problem.batch)), d_carry_0


def run(problem: Problem, both: tuple[Plan, Plan], given: Data | None = None) -> dict[str, Tensor]:
    """Forward and backward by the kernels, under whatever schedule the caller has set."""
    given = data(problem) if given is None else given
    y, c_n, aux, gates = run_forward(problem, both[0], given)
    return results(problem, given, y, c_n, *run_backward(problem, both[1], given, y, aux, gates))


def results(
    problem: Problem, given: Data, y: Tensor, c_n: Tensor | None, d_gates: Tensor, d_carry_0: Tensor | None
) -> dict[str, Tensor]:
    """What the launchers returned, by name, in the problem's dtype.

    The product that leads to h0 belongs to the caller of the launchers: it is made here, in float64.
    """
    cell = CELLS[problem.cell]
    d_hidden = torch.stack([d_gates[:, :, :, cell.slot_order.index(g)] for g in range(cell.gates)], 3).flatten(3)
    d_h0 = []
    for n in range(problem.sets):
        first = problem.time - 1 if problem.reverse(n) else 0
        d_h0.append(d_hidden[first, :, n].double() @ given.weight_hh[n].double())
        if cell.carries_h:
            d_h0[n] += d_carry_0[n].double()
    found = dict(
        y=y,
        c_n=c_n,
        d_input=d_gates[:, :, :, cell.slots - cell.gates :].flatten(3),
        d_hidden=d_hidden,
        d_h0=torch.stack(d_h0),
        d_c0=d_carry_0 if cell.states else None,
    )
    return {name: tensor.to(problem.dtype) for name, tensor in found.items() if tensor is not None}


# ---- Comparisons -----------------------------------------------------------------------------------------------------


def assert_right(
    problem: Problem,
    actual: dict[str, Tensor],
    given: Data | None = None,
    peer: dict[str, Tensor] | None = None,
) -> None:
    """The error rule of tolerances.py, for every result; the peer is the plain loop unless given."""
    expected = oracle(problem, given)
    peer = loop(problem, given) if peer is None else peer
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_close_to_oracle(tensor, expected[name], peer[name], f"{problem} {name}")


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, every NaN as the same one: schedules do not choose between NaNs, hardware may."""
    whole = tensor.masked_fill(tensor != tensor, torch.nan)
    return whole.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    """Every result equal to the last bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(bits(tensor), bits(expected[name])), f"{name} differs {what}"


def assert_same_exceptions(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    """NaN where NaN is expected, infinities where those are, and numbers everywhere else."""
    for name, tensor in actual.items():
        wanted = expected[name]
        assert torch.equal(tensor.isnan(), wanted.isnan()), f"{name}: NaN in other places {what}"
        for infinity in (float("inf"), -float("inf")):
            assert torch.equal(tensor == infinity, wanted == infinity), f"{name}: {infinity} in other places {what}"


class Poison:
    """Stands in for torch.empty: what nobody wrote is NaN, so a result which reads it shows. Keeps what it gave."""

    def __init__(self, monkeypatch):
        self.empty = torch.empty
        self.given: list[Tensor] = []
        monkeypatch.setattr(torch, "empty", self)

    def __call__(self, *args, **kwargs) -> Tensor:
        tensor = self.empty(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        self.given.append(tensor)
        return tensor
