"""The machine code of the kernels, compiled for GPUs that need not be there: what the interpreter cannot show.

No spill, shared memory as the plan says, nothing but the state through shared memory where weights stay in registers,
the instruction counts that the layouts of tiles.py are for, and the order of publish and poll, which the exchange rests
on.
"""

import dataclasses
import functools
import json
import os
import re
import warnings

import pytest
import torch

pytest.importorskip("triton")

from perf import resources
from rnn_gpu.equations import BUILT_IN
from rnn_gpu.kernels import launch, layer, machine_code
from rnn_gpu.kernels.compiled import Resources, compile_kernel, compile_plan, signature
from rnn_gpu.kernels.direct import Prepared
from rnn_gpu.kernels.machine.code import Code
from rnn_gpu.kernels.machine_code import is_poll, is_publish, published_before_the_next_poll
from rnn_gpu.kernels.plan import DEVICES, POLL_CYCLES, SPARE_BYTES, Plan, every_plan, plan
from rnn_gpu.kernels.spec import CELLS, padded

pytestmark = pytest.mark.compiled

compiled = functools.lru_cache(maxsize=None)(compile_plan)


def planned(arch, cell, dtype, hidden_size, batch=8, backward=False, sets=1, precision=None, **changes) -> Plan:
    device = DEVICES[resources.ARCHITECTURES[arch]]
    p = plan(cell, hidden_size, batch, sets, dtype, device, backward, precision)
    assert isinstance(p, Plan), p
    return dataclasses.replace(p, **changes)


def first(arch, cell, dtype, hidden_size, backward=False, sets=1, ragged=False) -> Plan:
    """The plan in which one program holds all units, if there is one, whether or not it is the one to take."""
    device = DEVICES[resources.ARCHITECTURES[arch]]
    return every_plan(cell, hidden_size, 16, sets, dtype, device, backward, ragged=ragged)[0]


def all_in_registers(p: Plan) -> bool:
    return not p.alone and p.shared == p.streamed == 0


def polled_vectors(p: Plan) -> int:
    """Loads of vectors that a thread awaits in a step: of the chunks that are held, and, in a loop that counts once, of
    one that stands for the rest. Where not all weights are in registers each stands there twice (exchange.py, AT_ONCE).
    """
    slots = (CELLS[p.cell].gates if p.backward else 1) * (2 if p.shared + p.streamed else 1)
    return slots * (p.registers + p.shared + bool(p.streamed)) * p.slices * (p.rows // 8)


def loads_that_polls_wait_for(r: Resources) -> list[str]:
    """Plain loads on their way in a scoreboard while what was polled is waited for in the same one: the wait is for
    both.
    """
    found, on_their_way = [], {}
    for instruction, (sets, waits) in zip(r.step * 2, r.scoreboards * 2, strict=True):  # twice: round the loop's end
        for scoreboard in (scoreboard for scoreboard in range(6) if waits >> scoreboard & 1):
            loads = on_their_way.pop(scoreboard, [])
            found += [load for load in loads if not is_poll(load)] if any(map(is_poll, loads)) else []
        if machine_code.name_of(instruction) == "LDG" and "STRONG.SYS" not in instruction:
            on_their_way.setdefault(sets, []).append(instruction)
    return found


# Bytes of stack, where one version spills. Triton 3.6: three instructions of 1,132 in the largest LSTM's backward; to
# read a chunk of weights again in every step instead would cost more, and in all versions.
SPILLED = {("3.6", "lstm", "bfloat16", 2048, True): 8}
# And of plans with several tiles in turn or 16 rows, where some words of the second tile find no register. What would
# avoid it costs more by the model, and by the clock of the machine code (docs/design.md). A few of the rest, in the
# grid.
SPILLED_BY_MORE_TILES, SPILLED_IN_THE_GRID = 448, 64


def assert_sound(p: Plan, r: Resources, spilled: int = 0) -> None:
    """What must hold for every plan. spilled: bytes of stack that are let pass."""
    known = max(spilled, SPILLED.get((r.triton[:3], p.cell, p.dtype, p.hidden_size, p.backward), 0))
    if p.rows * p.slices > 8 and not p.alone:
        known = SPILLED_BY_MORE_TILES
    assert r.problem is None or 0 < r.stack <= known, f"{r.problem}, {r.registers} registers, {p}"
    assert r.shared <= p.shared_bytes, f"takes {r.shared} bytes of shared memory, the plan says {p.shared_bytes}"
    matrix = r.count(*resources.TENSOR_CORE)
    assert (matrix > 0) == (p.precision != "ieee"), "products not on the tensor cores, or not in full precision"
    if p.alone:
        assert not any(map(is_poll, r.step)), "one program has nobody to wait for"
        return
    assert published_before_the_next_poll(r.before, r.step), "a poll stands before what it may be waiting for"
    assert sum(map(is_poll, r.step)) == polled_vectors(p), "a wait has copies, or is left out"
    if p.precision != "ieee":
        assert r.count("BAR") <= 2 * p.slices, "more barriers than those of the sum over the warps"
    # In a forward with one chunk the assembler gives the loads of the input part, which stand just before the only poll
    # and are prefetched, the poll's own scoreboard: a first look then waits for both, and what that costs nobody has
    # measured.
    # And where many vectors are read at once, one of six scoreboards serves both; behind a pause that is longer than a
    # load from the second-level cache this holds up nobody.
    if not p.streamed and (p.registers + p.shared > 1 or p.backward) and p.pause < POLL_CYCLES:
        assert not loads_that_polls_wait_for(r), "a wait for the neighbours is one for memory, too"
    if all_in_registers(p):
        assert r.count("LDSM") == 0, "an operand goes through shared memory in every step"
        assert r.count("SHFL") == 0, "the load's layout is not that of the matrix instruction (LAYOUT in tiles.py)"


# Every architecture: cell, type, precision, hidden size, batch; each forward and backward. One program (H 64), one
# chunk, several, units that pad the last slice, both kinds of float32, weights in shared memory, weights read again.
EVERYWHERE = [
    ("lstm", "bfloat16", None, 1024, 8),
    ("gru", "float16", None, 512, 8),
    ("rnn_tanh", "bfloat16", None, 1024, 64),
    ("lstm", "float32", "tf32", 200, 8),
    ("gru", "float32", "ieee", 256, 8),
    ("lstm", "bfloat16", None, 64, 16),
    ("gru", "float32", "tf32", 33, 3),
]
# The main device: more of each kind.
MAIN = [
    ("gru", "bfloat16", None, 1024, 8, 1),
    ("lstm", "float16", None, 300, 8, 2),
    ("lstm", "bfloat16", None, 2048, 8, 1),
    ("rnn_relu", "float32", "tf32", 512, 8, 2),
    ("gru", "bfloat16", None, 128, 64, 1),
    ("gru", "bfloat16", None, 1001, 8, 1),
    ("lstm", "float32", "ieee", 24, 8, 1),
    ("gru", "float32", "tf32", 768, 8, 1),
]
PASSES = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@PASSES
@pytest.mark.parametrize(("cell", "dtype", "precision", "hidden_size", "batch"), EVERYWHERE)
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_a_plan_compiles_without_spilling_and_fits(arch, cell, dtype, precision, hidden_size, batch, backward):
    """Catches a residency rule that promises too much, a layout that a compiler reads otherwise, a poll moved ahead."""
    p = planned(arch, cell, dtype, hidden_size, batch, backward, precision=precision)
    assert_sound(p, compiled(p, arch))


@PASSES
@pytest.mark.parametrize(("cell", "dtype", "precision", "hidden_size", "batch", "sets"), MAIN)
def test_more_plans_of_the_main_device_are_sound(cell, dtype, precision, hidden_size, batch, sets, backward):
    """Catches the same where rows and units are masked, two directions run, weights are in shared memory."""
    p = planned(90, cell, dtype, hidden_size, batch, backward, sets, precision)
    assert_sound(p, compiled(p, 90))


@pytest.mark.parametrize(
    ("rows", "backward"), [("lengths", False), ("packed", False), ("packed", True), ("resets", True)]
)
def test_sequences_of_any_length_do_not_spill(rows, backward):
    """Catches masks, offsets and a second source of the state that take more registers than the plan left."""
    p = plan("lstm", 1024, 8, 1, "float16", DEVICES["h200"], backward, ragged=True)
    r = compiled(p, 90, rows)
    assert_sound(p, r)
    assert p.streamed == p.shared == 0 and r.count("LDSM") == 0


@pytest.mark.parametrize(("arch", "cell", "dtype", "hidden_size", "backward"), [
    (86, "lstm", "bfloat16", 2048, False),
    (86, "gru", "bfloat16", 2048, True),
    (120, "gru", "float32", 2048, False),
])  # fmt: skip
def test_streamed_weights_do_not_spill(arch, cell, dtype, hidden_size, backward):
    """Catches the compiler unrolling the loop over streamed weights, which fetches more than the registers hold."""
    p = planned(arch, cell, dtype, hidden_size, backward=backward)
    assert p.streamed > 1, "not the case this test is about"
    r = compiled(p, arch)
    assert_sound(p, r)
    # Matrix instructions of 16 x 8, two for the K of a chunk: of the held chunks, and of one that stands for the rest.
    gates = CELLS[cell].gates
    tile_gates = gates if backward else -(-gates // p.gates_per_tile) * p.gates_per_tile
    chunk = 2 * (tile_gates * p.units // 16) * (p.rows // 8) * p.slices
    assert r.count(*resources.TENSOR_CORE) == (p.registers + p.shared + 1) * chunk


@pytest.mark.parametrize(("backward", "most"), [(False, 290), (True, 580)], ids=["forward", "backward"])
def test_the_step_of_the_main_case_stays_short(backward, most):
    """Catches a change that makes a step of the LSTM with 1024 units issue more: a conversion, a barrier, a reload."""
    p = planned(90, "lstm", "bfloat16", 1024, 8, backward)
    assert (p.units, p.rows, p.slices, p.warps) == (16, 8, 1, 8) and all_in_registers(p)
    r = compiled(p, 90)
    assert_sound(p, r)
    assert r.count() <= most
    assert r.count("BAR") == 2
    assert r.count("LDSM") == 0 and r.count("LDS") <= 12
    assert r.count("HMMA") == 32


@pytest.mark.parametrize(("cell", "hidden_size", "forward", "backward"), [
    ("lstm", 64, 348, 327),
    ("lstm", 128, 376, 380),
    ("gru", 64, 249, 305),
    ("gru", 128, 272, 350),
    ("rnn_tanh", 64, 128, 109),
    ("rnn_tanh", 128, 147, 131),
])  # fmt: skip
def test_the_step_of_a_lone_program_stays_short(cell, hidden_size, forward, backward):
    """Catches weights that fall back to shared memory, and tiles that are converted between product and memory."""
    for back, most in ((False, forward), (True, backward)):
        p = first(90, cell, "bfloat16", hidden_size, back)
        assert p.alone and (p.units, p.warps) == (hidden_size, hidden_size // 16)
        r = compiled(p, 90)
        assert_sound(p, r)
        assert r.count() <= most + 15
        assert r.count("BAR") == 2 and r.count("SHFL", "LDS", "STS") == 0
        # The state alone is in shared memory, and read in pieces of four matrices of 8 x 8.
        slots = 1 if not back or cell == "rnn_tanh" else 4
        assert r.shared == slots * p.warps * p.units * p.rows * 2 == p.shared_bytes - SPARE_BYTES
        assert r.count("LDSM") == slots * p.units // 32


@pytest.mark.parametrize(("dtype", "hidden_size"), [("bfloat16", 128), ("bfloat16", 121), ("float32", 61)])
def test_the_tightest_lone_kernel_has_room_for_ragged_rows_or_is_not_taken(dtype, hidden_size):
    """Catches masks and addresses of ragged rows that make the LSTM's backward spill: odd H has no room for them."""
    for sets in (1, 2):
        p = first(80, "lstm", dtype, hidden_size, True, sets, ragged=True)
        assert p.alone == (hidden_size % 2 == 0)
        assert_sound(p, compile_plan(p, 80, "packed"))


STACKS = [
    (90, "lstm", "bfloat16", None, 512, 16, 4, "dense"),
    (90, "gru", "float16", None, 256, 16, 8, "resets"),
    (90, "lstm", "bfloat16", None, 512, 16, 4, "dropout"),
    (120, "lstm", "bfloat16", None, 256, 8, 2, "dense"),
]
MORE_STACKS = [
    (arch, *problem, rows)
    for arch in (80, 86, 90, 100, 120)
    for problem in (
        ("lstm", "bfloat16", None, 256, 64, 2),
        ("lstm", "bfloat16", None, 512, 16, 4),
        ("lstm", "float16", None, 768, 16, 2),
        ("gru", "bfloat16", None, 512, 16, 4),
        ("gru", "float32", "tf32", 256, 16, 4),
        ("gru", "float32", "ieee", 64, 8, 2),
        ("lstm", "float32", "tf32", 256, 16, 4),
        ("lstm", "bfloat16", None, 100, 5, 3),
        ("rnn_tanh", "bfloat16", None, 1024, 16, 4),
        ("rnn_relu", "float32", "tf32", 768, 64, 2),
    )
    for rows in ("dense", "lengths", "packed", "resets", "dropout")
]
# Instructions that store to or load from local memory, at most: a few words of a plan with weights of both sources in
# registers (float16, H 768, backward: 6, with dropout 16; the RNN, H 1024, with dropout forward: 18).
FEW_SPILLS = 20


@PASSES
@pytest.mark.parametrize(
    ("arch", "cell", "dtype", "precision", "hidden_size", "batch", "layers", "rows"),
    [*STACKS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_STACKS)],
)
def test_layers_side_by_side_compile_without_spilling(
    arch, cell, dtype, precision, hidden_size, batch, layers, rows, backward
):
    """Catches a second source of the state that takes more registers than the plan left, makes the compiler convert a
    layout, or lets a poll pass a publish.
    """
    device = DEVICES[resources.ARCHITECTURES[arch]]
    kind = dict(ragged=rows != "dense", layers=layers)
    p = plan(cell, hidden_size, batch, 1, dtype, device, backward, precision, **kind)
    often = (arch, cell, dtype, precision, hidden_size, batch, layers, rows) in STACKS
    if isinstance(p, str):
        assert not often, p
        return
    r = compile_plan(p, arch, "dense", ("dropout",)) if rows == "dropout" else compile_plan(p, arch, rows)
    assert r.problem is None or r.spills <= (0 if often else FEW_SPILLS), f"{r.problem}, {r.registers} registers, {p}"
    assert r.shared <= r.shared_limit
    assert r.shared <= p.shared_bytes
    assert published_before_the_next_poll(r.before, r.step), "a poll stands before what it may be waiting for"
    assert sum(map(is_poll, r.step)) >= polled_vectors(p), "a wait is left out"
    if all_in_registers(p):
        assert r.count("SHFL", "LDSM") == 0
        assert r.count("BAR") == 2 * p.slices or rows == "resets"  # then of both sources apart
        assert sum(map(is_poll, r.step)) == polled_vectors(p), "a wait has copies"


@PASSES
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("device", ["h200", "a100", "rtx3090", "b200"])
def test_common_sizes_keep_all_weights_in_registers(device, cell, dtype, backward):
    """Catches a rule more careful than the compiler asks for. (Pure Python; that these compile is tested above.)"""
    for hidden_size in (256, 384, 512, 640, 768, 896, 1000, 1024):
        p = plan(cell, hidden_size, 8, 1, dtype, DEVICES[device], backward)
        assert p.alone or all_in_registers(p), f"H {hidden_size}: {p}"


@PASSES
def test_2048_units_stay_on_the_chip_of_the_main_device(backward):
    """Catches shared memory not used for what the registers do not hold."""
    p = planned(90, "lstm", "bfloat16", 2048, 8, backward)
    assert p.streamed == 0 and p.registers > 0 and p.shared > 0


# Controls: each of the checks above can fail.


def test_weights_beyond_the_registers_are_reported_as_spilling():
    """Control: catches a report that finds no spill where there must be some."""
    p = planned(90, "lstm", "bfloat16", 1536, 8, backward=True, waits=1, registers=6, shared=0)
    r = compiled(p, 90)
    assert r.spills > 0 and r.stack > 0
    assert "spills" in r.problem
    with pytest.raises(AssertionError, match="spills"):
        assert_sound(p, r)


def test_too_much_shared_memory_is_reported():
    """Control: catches a report that compares shared memory with no limit, or with that of another device."""
    large = planned(90, "rnn_tanh", "bfloat16", 2048, 8, units=32, registers=0, shared=8)
    for arch, fits in ((90, True), (86, False)):
        r = compiled(large, arch)
        assert r.shared > 100 << 10
        assert (r.problem is None) == fits, f"sm_{arch}: {r.problem}"


def test_weights_read_from_shared_memory_are_counted():
    """Control: catches a count of LDSM and LDS that sees nothing."""
    held = planned(90, "rnn_tanh", "float32", 512, 8)
    assert all_in_registers(held)
    reading = dataclasses.replace(held, registers=0, shared=held.registers)
    assert compiled(reading, 90).count("LDSM", "LDS") > compiled(held, 90).count("LDSM", "LDS")


def test_a_poll_ahead_of_a_publish_is_noticed():
    """Control: catches a check of the order that any order passes."""
    r = compiled(planned(90, "lstm", "bfloat16", 1024, 8), 90)
    polls = [i for i in r.step if is_poll(i)]
    assert polls and any(map(is_publish, r.step))
    assert published_before_the_next_poll(r.before, r.step)
    # The next step's polls at the end of the loop, after the publish, are no fault, but before it they are; either way
    # they need a first copy in front of the loop.
    rest = tuple(i for i in r.step if not is_poll(i))
    assert not published_before_the_next_poll((*r.before, *polls), (*polls, *rest))
    assert not published_before_the_next_poll(r.before, (*rest, *polls))
    assert not published_before_the_next_poll(r.before, rest)
    assert not published_before_the_next_poll(r.before, tuple(i for i in r.step if not is_publish(i)))


def test_a_load_beside_the_polls_is_noticed():
    """Control: catches a check of the scoreboards that none can fail."""
    r = compiled(planned(90, "lstm", "bfloat16", 1024, 8), 90)
    assert not loads_that_polls_wait_for(r)
    shared = next(sets for i, (sets, _) in zip(r.step, r.scoreboards, strict=True) if is_poll(i))
    first = next(n for n, i in enumerate(r.step) if is_poll(i))
    step = (*r.step[:first], "LDG.E.U16 R18, desc[UR14][R168.64]", *r.step[first:])
    scoreboards = (*r.scoreboards[:first], (shared, 0), *r.scoreboards[first:])
    found = loads_that_polls_wait_for(dataclasses.replace(r, step=step, scoreboards=scoreboards))
    assert found == ["LDG.E.U16 R18, desc[UR14][R168.64]"] * 2


def test_a_kernel_of_an_unknown_triton_is_looked_at_before_its_first_launch(monkeypatch):
    """Catches a kernel that is launched although it waits too early, or is slow, and a complaint about a good one."""
    p = planned(90, "lstm", "bfloat16", 1024, 8)
    kernel = compile_kernel(p, 90)
    usage, code = machine_code.machine_code(kernel.asm["cubin"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine_code.complain(kernel, p.alone)
    first, poll, publish = (
        next(line for line in code.splitlines() if found(line))
        for found in (lambda line: "/*0000*/" in line, is_poll, is_publish)
    )
    too_early = code.replace(first, f"{first}\n{poll}")  # a copy for the first step, in front of the loop
    shuffle = publish.replace("STG.E.U16.STRONG.GPU", "SHFL.IDX PT")
    slow = code.replace(publish, f"{shuffle}\n{publish}")
    assert too_early != code != slow and shuffle != publish
    for planted, raised in (
        (too_early, pytest.raises(RuntimeError, match="moves a wait")),
        (slow, pytest.warns(UserWarning, match="is slow")),
    ):
        monkeypatch.setattr(machine_code, "machine_code", lambda cubin, planted=planted: (usage, planted))
        with raised:
            machine_code.complain(kernel, p.alone)


def test_a_kernel_is_checked_once_and_before_it_runs():
    """Catches a check that comes too late, comes again, or hides the kernel."""
    events = []

    class Kernel:
        arg_names = ("x", "N")

        def warmup(self, *arguments, grid, **keywords):
            events.append("compiled")
            return "a kernel"

        def __getitem__(self, grid):
            return lambda *arguments, **keywords: events.append("launched")

    prepared = Prepared(Kernel(), dict(N=3), {}, lambda kernel: events.append(f"checked {kernel}"))
    for _ in range(2):
        prepared.launch((1, 1, 1), None, (0,))
    assert events == ["compiled", "checked a kernel", "launched", "launched"]


def test_instructions_are_told_apart():
    """Catches a pattern that takes another load for a poll, or another store for a publish."""
    assert is_poll("LDG.E.128.STRONG.GPU R28, desc[UR18][R160.64]")
    assert not is_poll("LDG.E.STRONG.SYS R28, desc[UR18][R160.64]")
    assert not is_poll("LDG.E.128 R28, desc[UR18][R160.64]") and not is_poll("LDS.128 R28, [R9]")
    assert is_publish("@P0 STG.E.U16.STRONG.GPU desc[UR18][R26.64], R163")
    assert not is_publish("@P0 STG.E.U16 desc[UR18][R28.64], R31")
    assert (
        machine_code.name_of("@!UP0 LDG.E R4, [R2]") == "LDG" and machine_code.name_of("BRA.U UP0, `(.L_x_3)") == "BRA"
    )


# What is compiled is what would be launched.


@PASSES
@pytest.mark.parametrize("cell", BUILT_IN)
@pytest.mark.parametrize("options", [(), ("clip", "cells", "recurrent_dropout", "zoneout")], ids=["plain", "options"])
@pytest.mark.parametrize(("dtype", "rows"), [("float32", "dense"), ("bfloat16", "packed"), ("bfloat16", "resets")])
def test_signatures_are_those_of_a_launch(monkeypatch, cell, dtype, rows, options, backward):
    """Catches a kernel compiled here with other types than a launch passes: then nothing above speaks of what runs."""
    p = planned(90, cell, dtype, 40, 2, backward)
    kind, spec, (T, B, N, H) = getattr(torch, dtype), CELLS[cell], (3, 2, 1, 40)
    where = dict(
        lengths=torch.full((B,), T, dtype=torch.int32),
        offsets=torch.arange(T + 1) * B,
        resets=torch.zeros(T, B, dtype=torch.int8),
    )
    where = layer.Rows(T, B, **{name: where[name] for name in resources.ROWS[rows]})
    if options:
        kept = torch.zeros(T * B, N, H, dtype=torch.int8)
        where = where._replace(dropped=torch.ones(N, B, H), kept_h=kept, kept_c=kept if spec.states else None)
    passed = {}
    monkeypatch.setattr(launch, "run", lambda *arguments: passed.update(arguments[-1]))
    monkeypatch.setattr(launch, "prepare_buffers", lambda *arguments: None)
    h0, weight = torch.zeros(N, B, H, dtype=kind), torch.zeros(N, spec.gates * H, H, dtype=kind)
    c0 = h0 if spec.states else None
    gates = torch.zeros(T * B, N, spec.gates * H, dtype=kind)
    if backward:
        aux = torch.zeros(T * B, N, padded(H, dtype), dtype=torch.float32 if spec.states else kind)
        y = torch.zeros(T * B, N, H, dtype=kind)
        saved = gates if spec.saves else None, None if spec.reads_h else aux
        more = dict(d_cells=y if spec.states else None, clip=0.5, carries=aux) if options else {}
        layer.backward(p, y, h0, c0, weight, *saved, y, h0, c0, where, 0, **more)
    else:
        bias = torch.zeros(N, H, dtype=kind) if spec.apart else None
        layer.forward(p, gates, weight, bias, h0, c0, where, 0, "full")
    numbers = ("T", "B", "begin", "limit", "launch")
    tensors = {name: value for name, value in passed.items() if name not in numbers}
    tensors |= {name: getattr(where, name) for name in ("lengths", "offsets", "resets")}
    names = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.int32: "*i32",
        torch.int64: "*i64",
        torch.int8: "*i8",
    }
    of = lambda value: None if value is None else "fp32" if isinstance(value, float) else names[value.dtype]
    types = {name: of(value) for name, value in tensors.items()}
    options = options if spec.states else [option for option in options if option != "cells"]
    assert signature(p, rows, options) == types | {"status": "*i32", "pause": "i32" if p.pause else None}


# The command.


def test_the_command_prints_a_table_and_json(capsys):
    """Catches a command that cannot be run, and JSON that another program cannot read."""
    arguments = ["--arch", "86", "--cell", "rnn_relu", "--dtype", "bfloat16", "--hidden-size", "16", "--jobs", "1"]
    assert resources.main([*arguments, "--quick", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["arch"] == 86 and len(report["kernels"]) == 2
    for kernel in report["kernels"]:
        assert kernel["plan"]["cell"] == "rnn_relu" and kernel["problem"] is None
        assert kernel["registers"] > 0 and kernel["step"]["all"] > kernel["step"]["HMMA"] > 0


def test_the_command_fails_where_a_kernel_spills(monkeypatch, capsys):
    """Catches an exit status of 0 in spite of a spill, or of a kernel that does not compile."""
    sound = Resources(90, "3", 100, 0, 0, 1024, (), ("HMMA R0, R1, R2, R3",))
    arguments = ["--quick", "--cell", "lstm", "--dtype", "bfloat16", "--hidden-size", "256"]
    for result, status in (
        (sound, 0),
        (dataclasses.replace(sound, spills=3, stack=24), 1),
        (dataclasses.replace(sound, shared=232449), 1),
        ("does not compile: reason", 1),
    ):
        monkeypatch.setattr(
            resources, "compile_all", lambda plans, arch, jobs, rows, result=result: ((p, result) for p in plans)
        )
        assert resources.main(arguments) == status
        printed = capsys.readouterr().out
        assert "lstm" in printed and ("<- " in printed or "reason" in printed) == bool(status)


def assert_all_sound(wanted: list[Plan], arch: int, rows: str = "dense") -> None:
    """All of them compiled, on all cores."""
    faults = []
    for p, r in resources.compile_all(wanted, arch, os.cpu_count() or 1, rows):
        try:
            assert not isinstance(r, str), r
            assert_sound(p, r, SPILLED_IN_THE_GRID)
        except AssertionError as error:
            faults.append(f"{resources.describe(p)}: {error}")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["dense", "packed"])
@pytest.mark.parametrize("cell", BUILT_IN)
@pytest.mark.parametrize("arch", list(resources.ARCHITECTURES))
def test_the_whole_grid_is_sound(arch, cell, rows):
    """Catches what the sample above leaves out: all sizes, types, numbers of rows, both directions of a layer."""
    assert_all_sound(resources.plans("full", arch, cells=[cell], rows=rows)[0], arch, rows)


@pytest.mark.parametrize(
    ("cell", "hidden_size", "batch", "dtype", "precision"),
    [("lstm", 1024, 256, "bfloat16", None), ("gru", 1024, 64, "float32", "tf32")],
)
def test_no_thread_holds_the_words_of_all_slots_of_wide_tiles(cell, hidden_size, batch, dtype, precision):
    """Catches backward plans that spill a thousand words and more: these two did, 1,800 instructions a step."""
    p = planned(90, cell, dtype, hidden_size, batch, True, precision=precision)
    assert p.rows == 8 and p.slices < 4


@pytest.mark.parametrize(("cell", "hidden_size", "batch"), [("lstm", 768, 64), ("gru", 1024, 64)])
def test_tiles_in_turn_read_weights_from_shared_memory_each(cell, hidden_size, batch):
    """Catches weights that are read once for all tiles, for which registers have no room: Triton 3.8 sees to that where
    nothing stands between the tiles.
    """
    p = planned(90, cell, "bfloat16", hidden_size, batch, True)
    assert p.slices == 2 and p.shared > 0, "not the case this test is about"
    assert compiled(p, 90).problem is None


@pytest.mark.slow
def test_the_usual_grid_is_sound():
    """Catches what the whole grid leaves out: batches of 16."""
    assert_all_sound(resources.plans("usual", 90)[0], 90)


@pytest.mark.parametrize("arch", list(resources.ARCHITECTURES))
def test_the_machine_knows_what_the_compiler_makes(arch):
    """Catches an instruction of one architecture, or of another Triton, that no test on the machine would meet."""
    for cell, dtype, precision, hidden_size, batch in EVERYWHERE[3:7]:
        p = planned(arch, cell, dtype, hidden_size, batch, hidden_size % 3 > 0, precision=precision)
        Code(compile_kernel(p, arch).asm["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize("rows", list(resources.ROWS))
@pytest.mark.parametrize("arch", list(resources.ARCHITECTURES))
def test_the_machine_knows_all_of_a_grid(arch, rows):
    """The same of every cell, type and way that rows can lie, odd sizes too."""
    for p in (
        resources.plans("quick", arch, rows=rows)[0] + resources.plans("usual", arch, hidden_sizes=(33,), rows=rows)[0]
    ):
        Code(compile_kernel(p, arch, rows).asm["ptx"])


@PASSES
@pytest.mark.parametrize("rows", ["dense", "lengths", "packed", "resets"])
def test_nothing_that_can_be_large_is_multiplied_in_32_bits(rows, backward):
    """Catches an offset that wraps round: the number of a weight set times its weights passes 2^31 in an ensemble of
    32,768 layers of 128 units, T or B times a row in other large problems.
    """
    p = planned(90, "lstm", "bfloat16", 64, backward=backward, sets=3)
    text = compile_kernel(p, 90, rows).asm["ttir"]
    large = {"%T", "%B", "%begin", *re.findall(r"(%\S+) = tt\.get_program_id z", text)}
    assert len(large) == 4 and "arith.muli" in text
    for line in text.splitlines():
        if "arith.muli" in line and re.search(r": i32\b", line):
            found = large & set(re.findall(r"%\w+", line.partition("=")[2]))
            assert not found or (backward and found == {"%B"}), line  # layer.py refuses such a batch
