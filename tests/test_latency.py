"""The clock for machine code: its arithmetic, its fit, and a bound for the way of each documented plan."""

import dataclasses

import pytest

from perf import latency
from perf.resources import documented
from rnn_gpu.kernels.plan import DEVICES, Plan, plan

pytestmark = pytest.mark.compiled

# Microseconds of the way of each documented plan: cell, backward, H, type, precision, tiles, units (Triton 3.7.1)
BOUNDS = {
    ("lstm", False, 1024, "float16", None, 1, 16): 1.19,
    ("lstm", False, 1024, "bfloat16", None, 1, 16): 1.19,
    ("lstm", False, 1024, "float32", "tf32", 1, 16): 1.84,
    ("lstm", False, 1024, "float32", "ieee", 1, 16): 6.57,
    ("gru", False, 1024, "float16", None, 1, 16): 1.11,
    ("gru", False, 1024, "bfloat16", None, 1, 16): 1.11,
    ("gru", False, 1024, "float32", "tf32", 1, 16): 1.52,
    ("gru", False, 1024, "float32", "ieee", 1, 16): 6.49,
    ("rnn_tanh", False, 1024, "float16", None, 1, 16): 0.93,
    ("rnn_tanh", False, 1024, "bfloat16", None, 1, 16): 0.93,
    ("rnn_tanh", False, 1024, "float32", "tf32", 1, 16): 1.08,
    ("rnn_tanh", False, 1024, "float32", "ieee", 1, 16): 4.34,
    ("lstm", True, 1024, "float16", None, 1, 16): 1.46,
    ("lstm", True, 1024, "bfloat16", None, 1, 16): 1.47,
    ("lstm", True, 1024, "float32", "tf32", 1, 16): 3.19,
    ("lstm", True, 1024, "float32", "ieee", 1, 16): 11.62,
    ("gru", True, 1024, "float16", None, 1, 16): 1.25,
    ("gru", True, 1024, "bfloat16", None, 1, 16): 1.25,
    ("gru", True, 1024, "float32", "tf32", 1, 16): 2.36,
    ("gru", True, 1024, "float32", "ieee", 1, 16): 9.55,
    ("rnn_tanh", True, 1024, "float16", None, 1, 16): 0.97,
    ("rnn_tanh", True, 1024, "bfloat16", None, 1, 16): 0.97,
    ("rnn_tanh", True, 1024, "float32", "tf32", 1, 16): 1.09,
    ("rnn_tanh", True, 1024, "float32", "ieee", 1, 16): 4.31,
    ("lstm", False, 128, "bfloat16", None, 1, 16): 0.43,
    ("lstm", False, 256, "bfloat16", None, 1, 16): 0.60,
    ("lstm", False, 512, "bfloat16", None, 1, 16): 0.74,
    ("lstm", False, 650, "bfloat16", None, 1, 16): 1.10,
    ("lstm", False, 768, "bfloat16", None, 1, 16): 1.05,
    ("lstm", False, 1536, "bfloat16", None, 1, 16): 2.15,
    ("lstm", False, 2048, "bfloat16", None, 2, 16): 3.24,
    ("lstm", True, 128, "bfloat16", None, 1, 16): 0.60,
    ("lstm", True, 256, "bfloat16", None, 1, 16): 0.68,
    ("lstm", True, 512, "bfloat16", None, 1, 16): 0.92,
    ("lstm", True, 650, "bfloat16", None, 1, 16): 1.09,
    ("lstm", True, 768, "bfloat16", None, 1, 16): 1.13,
    ("lstm", True, 1536, "bfloat16", None, 1, 32): 3.28,
    ("lstm", True, 2048, "bfloat16", None, 1, 32): 4.69,
    ("gru", False, 128, "bfloat16", None, 1, 16): 0.41,
    ("gru", False, 256, "bfloat16", None, 1, 16): 0.59,
    ("gru", False, 512, "bfloat16", None, 1, 16): 0.73,
    ("gru", False, 650, "bfloat16", None, 1, 16): 0.94,
    ("gru", False, 768, "bfloat16", None, 1, 16): 1.00,
    ("gru", False, 1536, "bfloat16", None, 2, 16): 2.27,
    ("gru", False, 2048, "bfloat16", None, 2, 16): 2.97,
    ("gru", True, 128, "bfloat16", None, 1, 16): 0.59,
    ("gru", True, 256, "bfloat16", None, 1, 16): 0.60,
    ("gru", True, 512, "bfloat16", None, 1, 16): 0.83,
    ("gru", True, 650, "bfloat16", None, 1, 16): 0.95,
    ("gru", True, 768, "bfloat16", None, 1, 32): 1.09,
    ("gru", True, 1536, "bfloat16", None, 1, 32): 2.41,
    ("gru", True, 2048, "bfloat16", None, 1, 32): 3.71,
    ("rnn_tanh", False, 256, "bfloat16", None, 1, 32): 0.57,
    ("rnn_tanh", False, 512, "bfloat16", None, 1, 32): 0.66,
    ("rnn_tanh", False, 650, "bfloat16", None, 1, 32): 0.80,
    ("rnn_tanh", False, 768, "bfloat16", None, 1, 32): 0.80,
    ("rnn_tanh", False, 1536, "bfloat16", None, 1, 32): 0.99,
    ("rnn_tanh", False, 2048, "bfloat16", None, 1, 32): 1.13,
    ("rnn_tanh", True, 128, "bfloat16", None, 1, 16): 0.28,
    ("rnn_tanh", True, 256, "bfloat16", None, 1, 16): 0.51,
    ("rnn_tanh", True, 512, "bfloat16", None, 1, 16): 0.57,
    ("rnn_tanh", True, 650, "bfloat16", None, 1, 32): 0.74,
    ("rnn_tanh", True, 768, "bfloat16", None, 1, 32): 0.78,
    ("rnn_tanh", True, 1536, "bfloat16", None, 1, 32): 0.97,
    ("rnn_tanh", True, 2048, "bfloat16", None, 1, 32): 1.23,
    ("lstm", False, 256, "bfloat16", None, 4, 16): 2.03,
    ("lstm", False, 512, "bfloat16", None, 4, 16): 3.40,
    ("lstm", False, 1024, "bfloat16", None, 4, 16): 4.20,
    ("lstm", True, 256, "bfloat16", None, 4, 16): 2.94,
    ("lstm", True, 512, "bfloat16", None, 4, 16): 3.79,
}

LOOP = """
.L_x_0:
        /*0000*/                   LDG.E.STRONG.GPU R1, desc[UR4][R2.64] ;  /* 0x0000000000000000 */
                                                                            /* 0x{0:016x} */
        /*0010*/                   FADD R3, R1, R1 ;                        /* 0x0000000000000000 */
                                                                            /* 0x{1:016x} */
        /*0020*/                   STG.E.STRONG.GPU desc[UR4][R2.64], R3 ;  /* 0x0000000000000000 */
                                                                            /* 0x{2:016x} */
        /*0030*/              @!P0 BRA `(.L_x_0) ;                          /* 0x0000000000000000 */
                                                                            /* 0x{3:016x} */
"""


def control(stall: int, write: int = 7, wait: int = 0) -> int:
    """The upper half of an instruction with these control bits."""
    return (stall | write << 5 | 7 << 8 | wait << 11) << 41


def walked(*controls: int, waiting: bool = True) -> latency.Walk:
    lines, labels = latency.parsed(LOOP.format(*controls))
    assert [line.name for line in lines] == ["LDG", "FADD", "STG", "BRA"] and labels == {".L_x_0": 0}
    return latency.Walk(lines, labels, warps=1, waiting=waiting)


def test_a_step_takes_its_stalls_and_the_latencies_that_it_waits_for():
    """Catches control bits read from another place, and a scoreboard that nobody waits for."""
    stalls = walked(control(2), control(4), control(5), control(9), waiting=False)
    assert stalls.microseconds * 1000 * latency.CLOCK == pytest.approx(20)
    awaited = walked(control(2, write=3), control(4, wait=1 << 3), control(5), control(9), waiting=False)
    cycles = latency.LATENCY["LDG"] + 4 + 5 + 9
    assert awaited.microseconds * 1000 * latency.CLOCK == pytest.approx(cycles)
    (longest, text, _), *_ = latency.waits(awaited, 1)
    assert "FADD" in text and longest * latency.CLOCK == pytest.approx(latency.LATENCY["LDG"])


def test_a_spilled_word_is_waited_for():
    """Catches registers that spill at no cost."""
    loop = LOOP.replace("FADD R3, R1, R1 ", "LDL R3, [R1]    ").format(
        control(2), control(4, write=3), control(5, wait=1 << 3), control(9)
    )
    spilling = latency.Walk(*latency.parsed(loop), warps=1, waiting=False)
    assert spilling.microseconds * 1000 * latency.CLOCK == pytest.approx(2 + latency.LATENCY["LDL"] + 5 + 9)


def test_the_lines_fit_what_was_measured():
    """Catches a table that was spoiled, and a fit that has become a guess."""
    for backward in (False, True):
        for several in (False, True):
            found = sorted(abs(error) for error in latency.errors(backward, several))
            assert len(found) >= 8
            assert found[len(found) // 2] < 0.20 and found[-1] < 0.40, (backward, several, found)


def test_the_command_says_where_a_step_waits(capsys):
    """Catches a command that dies, waits without their lines, and an estimate without what an H200 took."""
    assert latency.main(["lstm", "512", "bf16", "--waits", "3"]) == 0
    text = capsys.readouterr().out
    assert "measured with commit 3a3b8ba" in text and "median error" in text and "exchange.py:" in text
    assert "; an H200 took 1.08 us" in text
    assert latency.main(["lstm", "64", "bf16"]) == 1  # one program alone


def test_a_pause_takes_its_cycles():
    """Catches a loop on the clock that is walked as one of polls, or not at all."""
    p = plan("lstm", 256, 16, 1, "bfloat16", DEVICES["h200"])
    alone = [latency.estimate(dataclasses.replace(p, pause=pause)).alone for pause in (300, 900)]
    assert alone[1] - alone[0] == pytest.approx(600 / latency.CLOCK / 1000, abs=0.02)


def bounded() -> list:
    """Some documented plans; all of them with the slow tests."""
    found, seen = [], set()
    for plans in documented(90).values():
        for p in plans:
            way = "backward" if p.backward else "forward"
            name = f"{p.cell}-{way}-H{p.hidden_size}-{p.dtype}-{p.precision}-{p.slices}-{p.units}"
            if isinstance(p, Plan) and not (p.alone or p.layered) and name not in seen:
                seen.add(name)
                often = p.hidden_size in (256, 512) and p.cell == "lstm" and p.slices == 1
                found.append(pytest.param(p, id=name, marks=[] if often else [pytest.mark.slow]))
    return found


@pytest.mark.parametrize("p", bounded())
def test_no_documented_way_has_grown(p):
    """Catches a step that takes longer: each way, in microseconds, with a tenth of room (Triton's versions differ)."""
    limit = BOUNDS[p.cell, p.backward, p.hidden_size, p.dtype, p.precision, p.slices, p.units]
    assert latency.estimate(p).way <= 1.1 * limit


def test_the_plan_of_a_small_batch_is_one_that_can_be_walked():
    """Catches a plan without a loop that publishes."""
    p = plan("gru", 256, 16, 1, "float16", DEVICES["h200"], True)
    assert 0.3 < latency.estimate(p).way < 5
