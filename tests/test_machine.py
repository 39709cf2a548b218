"""The machine for PTX as an adversary: its memory, its schedules, and the mistakes it must find, in small kernels and
planted in those of this library. (Single instructions: test_machine_instructions.py)
"""

import contextlib
import re

import pytest
import torch
import triton
import triton.language as tl

from rnn_gpu.kernels.machine import Fault, on_machine, running
from rnn_gpu.kernels.machine.library import MEANT
from tests.problems import Problem, assert_right, plans, run
from tests.ptx import launch

pytestmark = [pytest.mark.compiled]


def zeros(count: int = 64) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


# ---- What programs see of each other ---------------------------------------------------------------------------------

# Program 0 writes what program 1 reads, in two places; program 1 keeps what it saw, flag first. $...: what varies.
PASS_ON = """
.reg .pred first, again; .reg .b32 program, flag, data; .reg .b64 own;
setp.ne.u32 first, tid, 0; @first bra END;
mov.u32 program, %ctaid.x; setp.ne.u32 first, program, 0; @first bra READ;
$STORE_DATA.b32 [%rd0], 42; $BETWEEN $STORE_FLAG.b32 [%rd0+128], 1; bra END;
READ: $LOAD_FLAG.b32 flag, [%rd0+128]; setp.eq.u32 again, flag, 0; $AGAIN
$LOAD_DATA.b32 data, [%rd0]; st.global.v2.b32 [%rd1], {flag, data};
END:
"""


FENCE, WRITE, READ = "fence.acq_rel.gpu;", "st.relaxed.gpu.global", "ld.relaxed.gpu.global"


def passed_on(seed: int, again: bool = True, delay: float = 0.3, **parts: str) -> tuple[int, int]:
    """Flag and data as program 1 saw them."""
    known = dict(
        store_data="st.global",
        store_flag="st.global",
        load_flag="ld.volatile.global",
        between="",
        load_data="ld.volatile.global",
    )
    code = PASS_ON.replace("$AGAIN", "@again bra READ;" if again else "")
    for name, text in (known | parts).items():
        code = code.replace(f"${name.upper()}", text)
    buffer, out = zeros(), zeros(2)
    launch(code, [buffer, out], grid=2, seed=seed, delay=delay)
    return tuple(out.tolist())


def test_stores_of_a_thread_are_seen_in_any_order():
    """Catches a memory too kind: a reader that trusts a flag must be seen to fail."""
    assert {passed_on(seed) for seed in range(30)} == {(1, 0), (1, 42)}


@pytest.mark.parametrize(
    "parts",
    [
        {"between": "fence.acq_rel.gpu;"},
        {"between": "fence.sc.gpu;"},
        {"between": "membar.gl;"},
        {"store_flag": "st.release.gpu.global"},
        {"store_flag": "red.release.gpu.global.add"},
    ],
    ids=lambda p: next(iter(p.values())),
)
def test_fences_and_releases_order_stores(parts):
    """Catches a fence that does nothing, and a reader without one that is served in order."""
    parts = dict(store_flag=WRITE, load_flag=READ) | parts
    assert {passed_on(seed, load_data=f"{FENCE} {READ}", **parts) for seed in range(30)} == {(1, 42)}
    assert {passed_on(seed, load_data=READ, **parts) for seed in range(30)} == {(1, 0), (1, 42)}


def test_a_place_does_not_become_older():
    """Catches loads of one place that are served out of order, the program's own stores among them."""
    code = """
    .reg .pred p; .reg .b32 program, x, y; setp.ne.u32 p, tid, 0; @p bra END;
    mov.u32 program, %ctaid.x; setp.ne.u32 p, program, 0; @p bra READ; st.global.b32 [%rd0], 1; bra END;
    READ: $OWN AGAIN: ld.relaxed.gpu.global.b32 x, [%rd0$AT]; ld.relaxed.gpu.global.b32 y, [%rd0$AT];
    setp.eq.u32 p, x, 0; @p bra AGAIN; st.global.v2.b32 [%rd1], {x, y};
    END:
    """
    for own, at in (("", ""), ("st.relaxed.gpu.global.b32 [%rd0+4], 1;", "+4")):
        for seed in range(20):
            out = zeros(2)
            launch(code.replace("$OWN", own).replace("$AT", at), [zeros(), out], grid=2, seed=seed)
            assert out.tolist() == [1, 1]


def test_a_plain_load_of_what_another_program_writes_is_a_fault():
    """Catches polls, or anything else, that a cache may serve: whichever comes first, the load or the store."""
    for seed in range(5):
        with pytest.raises(Fault, match="plain"):
            passed_on(seed, load_data="ld.global")
        with pytest.raises(Fault, match="plain"):
            passed_on(seed, again=False, load_flag="ld.global.cg")


def test_an_atomic_brings_no_other_store_with_it():
    """Catches a memory too kind: an atomic on a place that is still on its way makes nothing else visible."""
    atomic = "st.global.b32 [%rd0+128], 0; red.relaxed.gpu.global.add"
    parts = dict(store_flag=atomic, load_flag=READ, load_data=f"{FENCE} {READ}")
    assert {passed_on(seed, delay=0.05, **parts) for seed in range(30)} == {(1, 0), (1, 42)}


def test_what_was_released_and_acquired_may_be_loaded_plainly():
    """Catches false alarms where programs hand data on as PTX wants it."""
    for seed in range(10):
        assert passed_on(
            seed, store_flag="st.release.gpu.global", load_flag="ld.acquire.gpu.global", load_data="ld.global"
        ) == (1, 42)


@pytest.mark.parametrize(
    ("between", "write", "read", "after", "ordered"),
    [
        (FENCE, WRITE, READ, FENCE, True),
        ("membar.gl;", "st.volatile.global", "ld.volatile.global", "fence.sc.sys;", True),
        (FENCE, "red.relaxed.gpu.global.add", READ, FENCE, True),
        (FENCE, WRITE, "ld.acquire.gpu.global", "", True),
        ("", "st.release.gpu.global", READ, FENCE, True),
        ("fence.release.gpu;", WRITE, READ, "fence.acquire.gpu;", True),
        ("", WRITE, READ, FENCE, False),
        (FENCE, WRITE, READ, "", False),
        (FENCE, "st.global", READ, FENCE, False),
        (FENCE, WRITE, f"{FENCE} {READ}", "", False),
        ("fence.acq_rel.cta;", WRITE, READ, FENCE, False),
        (FENCE, WRITE, READ, "membar.cta;", False),
        (FENCE, "st.relaxed.cta.global", READ, FENCE, False),
        ("fence.acquire.gpu;", WRITE, READ, FENCE, False),
        (FENCE, WRITE, READ, "fence.release.gpu;", False),
    ],
)
def test_a_strong_access_with_a_fence_releases_or_acquires(between, write, read, after, ordered):
    """Catches false alarms where fences order relaxed accesses, and a fence on one side only, or on the wrong one, that
    passes.
    """
    parts = dict(between=between, store_flag=write, load_flag=read, load_data=f"{after} ld.global")
    for seed in range(4):
        with contextlib.nullcontext() if ordered else pytest.raises(Fault, match="plain"):
            assert passed_on(seed, **parts) == (1, 42)


def test_a_fence_releases_only_what_is_before_it():
    """Catches a fence that orders what is stored between it and the flag."""
    for seed in range(4):
        with pytest.raises(Fault, match="plain"):
            passed_on(
                seed, store_data=f"{FENCE} st.global", store_flag=WRITE, load_flag=READ, load_data=f"{FENCE} ld.global"
            )


@pytest.mark.parametrize("relaxed", ["none", "one", "all"])
@pytest.mark.parametrize(("before", "after"), [
    ("red.relaxed.gpu.global.add.u32 [%rd0], 5;", "ld.global.b32 x, [%rd0];"),
    ("ld.global.b32 x, [%rd0];", "st.global.b32 [%rd0], 20;"),
    ("ld.global.b32 x, [%rd0];", "st.volatile.global.b32 [%rd0], 20;"),
])  # fmt: skip
def test_the_last_of_several_programs_knows_of_all_of_them(before, after, relaxed):
    """Catches false alarms where one of many goes on alone, as behind a barrier of all programs; and one that knows of
    some only.
    """
    code = f"""
    .reg .pred p; .reg .b32 x, n; setp.ne.u32 p, tid, 0; @p bra END; {before}
    mov.u32 n, %ctaid.x; setp.lt.u32 p, n, {dict(none=0, one=1, all=4)[relaxed]};
    @p atom.relaxed.gpu.global.add.u32 n, [%rd0+128], 1; @!p atom.acq_rel.gpu.global.add.u32 n, [%rd0+128], 1;
    setp.ne.u32 p, n, 3; @p bra END;
    {after} ld.global.b32 x, [%rd0]; st.global.b32 [%rd1], x; END:
    """
    for seed in range(6):
        out = zeros(1)
        fault = pytest.raises(Fault, match=r"(several|which|another) program")
        with contextlib.nullcontext() if relaxed == "none" else fault:
            launch(code, [zeros(), out], grid=4, seed=seed)
            assert out.item() == 20


# All threads of program 0 store a word, its first one sets a flag that the first one of program 1 waits for. Thread
# $READER of that one keeps word $WORD.
HAND_ON = """
.reg .pred p; .reg .b32 program, flag, data;
mov.u32 program, %ctaid.x; setp.ne.u32 p, program, 0; @p bra READ;
mad.wide.u32 offset, tid, 4, %rd0; st.global.b32 [offset+128], 42; $BEFORE
setp.ne.u32 p, tid, 0; @p bra END; $SET.b32 [%rd0], 1; bra END;
READ: setp.ne.u32 p, tid, 0; @p bra SEEN;
AGAIN: ld.acquire.gpu.global.b32 flag, [%rd0]; setp.eq.u32 p, flag, 0; @p bra AGAIN;
SEEN: $AFTER setp.ne.u32 p, tid, $READER; @p bra END; $LOAD.b32 data, [%rd0+128+4*$WORD]; st.global.b32 [%rd1], data;
END:
"""


def handed_on(seed: int, before: str, word: int, after: str = "", reader: int = 0, delay: float = 0.3, **parts: str):
    """What thread `reader` of program 1 saw."""
    known = dict(set="st.release.gpu.global", load="ld.global", before=before, after=after, reader=str(reader))
    code = HAND_ON.replace("128+4*$WORD", str(128 + 4 * word))
    for name, text in (known | parts).items():
        code = code.replace(f"${name.upper()}", text)
    out = zeros(1)
    launch(code, [zeros(128), out], grid=2, warps=2, seed=seed, delay=delay)
    return out.item()


@pytest.mark.parametrize(
    ("before", "word", "after", "reader", "ordered"),
    [
        ("", 0, "", 0, True),
        ("", 1, "", 0, False),
        ("bar.warp.sync -1;", 1, "", 0, True),
        ("bar.warp.sync -1;", 32, "", 0, False),
        ("bar.sync 0;", 32, "", 0, True),
        ("bar.sync 0;", 32, "", 32, False),
        ("bar.sync 0;", 32, "bar.sync 0;", 32, True),
    ],
)
def test_threads_release_and_acquire_for_themselves_and_what_is_behind_a_barrier(before, word, after, reader, ordered):
    """Catches a missing barrier before a lock is let go, or after it is taken."""
    for seed in range(5):
        if ordered:
            assert handed_on(seed, before, word, after, reader) == 42
        else:
            with pytest.raises(Fault, match=r"a plain load of argument 0, which program .* writes"):
                handed_on(seed, before, word, after, reader)


def test_a_fence_orders_what_its_thread_stored_and_what_is_before_a_barrier():
    """Catches fences that make visible what other warps are still storing."""
    parts = dict(set="fence.acq_rel.gpu; st.relaxed.gpu.global", load="ld.volatile.global", delay=0.02)
    assert {handed_on(seed, "bar.sync 0;", 32, **parts) for seed in range(20)} == {42}
    assert {handed_on(seed, "", 32, **parts) for seed in range(20)} == {0, 42}


@pytest.mark.parametrize(
    ("release", "acquire"),
    [
        ("st.release.$.global.b32 [%rd0], 1;", "ld.acquire.$.global.b32 flag, [%rd0];"),
        ("atom.release.$.global.exch.b32 flag, [%rd0], 1;", "atom.acquire.$.global.add.u32 flag, [%rd0], 0;"),
    ],
)
@pytest.mark.parametrize("scopes", ["gpu gpu", "sys gpu", "cta gpu", "gpu cta"])
def test_scope_cta_orders_nothing_between_programs(release, acquire, scopes):
    """Catches a lock between programs that is one within a program only."""
    first, second = scopes.split()
    code = f"""
    .reg .pred p; .reg .b32 flag, data; setp.ne.u32 p, tid, 0; @p bra END;
    mov.u32 flag, %ctaid.x; setp.ne.u32 p, flag, 0; @p bra READ;
    st.global.b32 [%rd0+128], 42; {release.replace("$", first)} bra END;
    READ: {acquire.replace("$", second)} setp.eq.u32 p, flag, 0; @p bra READ; ld.global.b32 data, [%rd0+128];
    END:
    """
    for seed in range(3):
        with pytest.raises(Fault, match=r"(which|another) program") if "cta" in scopes else contextlib.nullcontext():
            launch(code, [zeros()], grid=2, seed=seed)


@pytest.mark.parametrize(("first", "second", "races"), [
    ("st.global.b32 [%rd0], 5;", "st.volatile.global.b32 [%rd0], 6;", True),
    ("st.global.b32 [%rd0], 5;", "atom.global.add.u32 x, [%rd0], 1;", True),
    ("st.global.b32 [%rd0], 5; st.relaxed.gpu.global.b32 [%rd0], 7;", "red.global.add.u32 [%rd0], 1;", True),
    ("st.relaxed.cta.global.b32 [%rd0], 5;", "st.relaxed.gpu.global.b32 [%rd0], 6;", True),
    ("red.relaxed.cta.global.add.u32 [%rd0], 1;", "red.relaxed.cta.global.add.u32 [%rd0], 1;", True),
    ("ld.relaxed.cta.global.b32 x, [%rd0];", "st.relaxed.gpu.global.b32 [%rd0], 6;", True),
    ("st.relaxed.gpu.global.b32 [%rd0], 5;", "st.volatile.global.b32 [%rd0], 6;", False),
    ("st.relaxed.gpu.global.b32 [%rd0], 5;", "ld.relaxed.sys.global.b32 x, [%rd0];", False),
    ("ld.relaxed.cta.global.b32 x, [%rd0];", "ld.relaxed.cta.global.b32 x, [%rd0];", False),
])  # fmt: skip
def test_what_two_programs_do_to_one_place(first, second, races):
    """Catches a strong store or an atomic after a plain store, and scope `cta` between programs, in one order only; and
    a strong store that hides a plain one.
    """
    code = ".reg .pred p; .reg .b32 x; setp.ne.u32 p, tid, 0; @p bra END; mov.u32 x, %ctaid.x; setp.eq.u32 p, x, 0;"
    code += f"@p bra FIRST; {second} bra END;"
    for seed in range(8):
        with pytest.raises(Fault, match=r"(which|another) program") if races else contextlib.nullcontext():
            launch(f"{code} FIRST: {first} END:", [zeros()], grid=2, seed=seed)


def test_scope_cta_is_strong_within_a_program():
    """Catches a false alarm at threads of one program whose accesses are strong for it, and one that is missed at a
    plain store among them.
    """
    code = """
    .reg .b32 x; ld.relaxed.cta.global.b32 x, [%rd0]; atom.relaxed.cta.global.add.u32 x, [%rd0], 1;
    st.relaxed.cta.global.b32 [%rd0+4], 5; ld.relaxed.cta.global.b32 x, [%rd0+4]; $
    """
    for seed in range(4):
        out = zeros()
        launch(code.replace("$", ""), [out], warps=2, seed=seed)
        assert out[:2].tolist() == [64, 5]
        with pytest.raises(Fault, match="race: "):
            launch(code.replace("$", "st.global.b32 [%rd0+4], 6;"), [zeros()], warps=2, seed=seed)


def test_an_acquire_of_what_was_there_before_the_release_orders_nothing():
    """Catches an acquire that does not ask whether it saw the release."""
    parts = dict(store_flag="st.release.gpu.global", load_flag="ld.acquire.gpu.global", load_data="ld.global")
    seen = set()
    for seed in range(40):
        try:
            seen.add(passed_on(seed, again=False, **parts))
        except Fault as fault:
            seen.add("plain" if "plain" in str(fault) else str(fault))
    assert seen == {(1, 42), "plain"}


@pytest.mark.parametrize(
    ("between", "write", "after", "orders"),
    [
        ("", "st.volatile.global", FENCE, False),
        ("fence.acq_rel.cta;", "st.volatile.global", "membar.cta;", True),
        ("", "st.release.cta.global", FENCE, True),
        (FENCE, "st.volatile.global", FENCE, True),
        (FENCE, "st.volatile.global", "membar.cta;", True),
        (FENCE, "st.volatile.global", "ld.acquire.cta.global.b32 flag, [%rd0+128];", True),
        (FENCE, "st.volatile.global", "", False),
    ],
)
def test_stores_are_seen_in_any_order_by_other_threads_of_the_program(between, write, after, orders):
    """Catches a memory too kind to threads that trust a flag of their own program, and a fence that orders nothing."""
    code = f"""
    .reg .pred p; .reg .b32 flag, data; setp.eq.u32 p, tid, 0; @p bra WRITE; setp.ne.u32 p, tid, 32; @p bra END;
    READ: ld.volatile.global.b32 flag, [%rd0+128]; setp.eq.u32 p, flag, 0; @p bra READ;
    {after} ld.volatile.global.b32 data, [%rd0]; st.global.b32 [%rd1], data; bra END;
    WRITE: st.global.b32 [%rd0], 42; {between} {write}.b32 [%rd0+128], 1;
    END:
    """
    seen = set()
    for seed in range(30):
        out = zeros(1)
        launch(code, [zeros(), out], warps=2, seed=seed, delay=0.05)
        seen.add(out.item())
    assert seen == ({42} if orders else {0, 42})


def test_a_thread_sees_its_own_stores_at_once():
    """Catches a delay where there must be none, in part of an element too."""
    for seed in range(5):
        out = zeros()
        launch(
            """
            .reg .b32 x, y; .reg .b16 h; mad.wide.u32 offset, tid, 4, %rd0;
            mov.b32 x, 0x12345678; st.global.b32 [offset], x;
            ld.volatile.global.b32 y, [offset]; ld.global.b16 h, [offset+2];
            cvt.u32.u16 x, h; xor.b32 x, x, y; st.global.b32 [offset], x;
            """,
            [out],
            seed=seed,
            delay=0.01,
        )
        assert (out[:32] == 0x12345678 ^ 0x1234).all()


def test_a_vector_is_torn_between_its_elements_and_no_element_is():
    """Catches vectors that land whole, so that a reader of one word seems to do."""
    seen = set()
    for seed in range(40):
        buffer, out = zeros(), zeros(4)
        launch(
            """
            .reg .pred p; .reg .b32 program, x<4>;
            setp.ne.u32 p, tid, 0; @p bra END;
            mov.u32 program, %ctaid.x; setp.ne.u32 p, program, 0; @p bra READ;
            st.global.v4.b32 [%rd0], {-1, -1, -1, -1}; bra END;
            READ: ld.volatile.global.v4.b32 {x0, x1, x2, x3}, [%rd0];
            or.b32 program, x0, x1; or.b32 program, program, x2; or.b32 program, program, x3;
            setp.eq.u32 p, program, 0; @p bra READ;
            st.global.v4.b32 [%rd1], {x0, x1, x2, x3};
            END:
            """,
            [buffer, out],
            grid=2,
            seed=seed,
        )
        assert set(out.tolist()) <= {0, -1}
        seen.add(tuple(out.tolist()))
    assert len(seen) > 4


def test_two_programs_that_write_the_same_are_a_fault():
    """Catches a tile that two programs own."""
    with pytest.raises(Fault, match=r"which program .* writes too"):
        launch("mad.wide.u32 offset, tid, 4, %rd0; st.global.b32 [offset], tid;", [zeros()], grid=2)


# ---- Within a program ------------------------------------------------------------------------------------------------

EXCHANGE = """
.reg .b32 mine, other, x; shl.b32 mine, tid, 2; xor.b32 other, mine, $DISTANCE;
st.shared.b32 [mine], tid; $BARRIER ld.shared.b32 x, [other]; $AFTER st.shared.b32 [mine], x;
mad.wide.u32 offset, tid, 4, %rd0; st.global.b32 [offset], x;
"""


@pytest.mark.parametrize(("distance", "barrier"), [(128, "bar.sync 0;"), (4, "bar.warp.sync -1;"), (4, "bar.sync 0;")])
def test_threads_with_a_barrier_between_them(distance, barrier):
    """Catches false alarms, and barriers that do not wait."""
    for seed in range(5):
        out = zeros()
        code = EXCHANGE.replace("$DISTANCE", str(distance)).replace("$BARRIER", barrier).replace("$AFTER", barrier)
        launch(code, [out], warps=2, shared=256, seed=seed)
        assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ (distance // 4))


@pytest.mark.parametrize(
    ("distance", "barrier", "after", "why"),
    [
        (128, "", "bar.sync 0;", "read before it is written|race"),
        (128, "bar.warp.sync -1;", "bar.sync 0;", "read before it is written|race"),
        (128, "bar.sync 0;", "", "race: another thread has read|race: warp 0"),
        (128, "bar.sync 0;", "bar.warp.sync -1;", "race: another thread has read|race: warp 0"),
        (4, "", "bar.sync 0;", "race: warp . lane"),
        (4, "bar.sync 0;", "", "race: another thread has read"),
    ],
)
def test_threads_without_one_are_a_fault(distance, barrier, after, why):
    """Catches races between warps, and between the lanes of one warp, whichever order they happened to come in."""
    code = EXCHANGE.replace("$DISTANCE", str(distance)).replace("$BARRIER", barrier).replace("$AFTER", after)
    for seed in range(5):
        with pytest.raises(Fault, match=why.replace("warp . lane", "warp ., lane")):
            launch(code, [zeros()], warps=2, shared=256, seed=seed)


@pytest.mark.parametrize(
    ("values", "behind", "why"),
    [
        ("7 7", "bar.sync 0;", None),
        ("7 8", "bar.sync 0;", "another thread wrote this|two warps write|other values"),
        # No numbers that differ in rounding: large integers, and pairs of bfloat16 (1, 1) and (1, 1 / 64).
        ("300000000 300000007", "bar.sync 0;", "another thread wrote this|two warps write|other values"),
        ("0x3f803f80 0x3f803c80", "bar.sync 0;", "another thread wrote this|two warps write|other values"),
        ("7 7", "", "wrote this shared memory, and no barrier|another thread has read|read before it is written"),
        ("7 7", "st.shared.b32 [global_smem], 8; bar.sync 0;", "another thread wrote this"),
    ],
)
def test_several_warps_may_store_the_same_to_shared_memory(values, behind, why):
    """Catches false alarms at tiles with fewer elements than threads; other values, reads without a barrier behind, and
    a store of one warp that hides another one's.
    """
    first, second = values.split()
    code = f"""
    .reg .pred p; .reg .b32 x; setp.lt.u32 p, tid, 32; selp.b32 x, {first}, {second}, p; st.shared.b32 [global_smem], x;
    {behind} ld.shared.b32 x, [global_smem]; mad.wide.u32 offset, tid, 4, %rd0; st.global.b32 [offset], x;
    """
    for seed in range(8):
        out = zeros()
        with contextlib.nullcontext() if why is None else pytest.raises(Fault, match=why):
            launch(code, [out], warps=2, shared=16, seed=seed)
            assert (out == 7).all()


@pytest.mark.parametrize("missing", [None, "before", "behind"])
def test_atomics_on_shared_memory_race_with_loads_and_stores_alone(missing):
    """Catches a barrier left out before or behind atomics, and a false alarm of one atomic at another."""
    before, behind = ("" if missing == which else "bar.sync 0;" for which in ("before", "behind"))
    why = "wrote this shared memory|read before it is written" if missing == "before" else "an atomic of another thread"
    for seed in range(3):
        out = zeros()
        with contextlib.nullcontext() if missing is None else pytest.raises(Fault, match=why):
            launch(
                f"""
                .reg .pred p; .reg .b32 x; setp.eq.u32 p, tid, 0; @p st.shared.b32 [global_smem], 0; {before}
                atom.shared.add.u32 x, [global_smem], 1; red.shared.add.u32 [global_smem], tid; {behind}
                ld.shared.b32 x, [global_smem]; mad.wide.u32 offset, tid, 4, %rd0; st.global.b32 [offset], x;
                """,
                [out],
                warps=2,
                shared=16,
                seed=seed,
            )
            assert (out == 64 + 63 * 32).all()


def test_a_race_in_global_memory_within_a_program_is_a_fault():
    """Catches a store that another warp reads with no barrier between."""
    code = """
    .reg .b32 x, y; mad.wide.u32 offset, tid, 4, %rd0; st.global.b32 [offset], tid; $
    xor.b32 y, tid, 32; mad.wide.u32 offset, y, 4, %rd0; ld.global.b32 x, [offset];
    """
    launch(code.replace("$", "bar.sync 0;"), [zeros()], warps=2)
    for seed in range(5):
        with pytest.raises(Fault, match="race: "):
            launch(code.replace("$", ""), [zeros()], warps=2, seed=seed)


@pytest.mark.parametrize(
    "write",
    [
        "st.volatile.global.b32 [%rd0], 5;",
        "st.relaxed.gpu.global.b32 [%rd0], 5;",
        "st.mmio.relaxed.sys.global.b32 [%rd0], 5;",
        "atom.global.add.u32 x, [%rd0], 5;",
        "red.relaxed.gpu.global.add.u32 [%rd0], 5;",
    ],
)
def test_a_strong_store_or_an_atomic_after_a_plain_load_is_a_fault(write):
    """Catches checks of plain stores alone, between programs and within one."""
    code = """
    .reg .pred p; .reg .b32 x; mov.u32 x, $MINE; setp.eq.u32 p, x, 0; @p bra WRITE;
    ld.global.b32 x, [%rd0]; mad.wide.u32 offset, tid, 4, %rd1; st.global.b32 [offset], x; bra END; WRITE: $WRITE END:
    """.replace("$WRITE", write)
    for seed in range(10):
        with pytest.raises(Fault, match=r"plain load|loaded plainly"):
            launch(code.replace("$MINE", "%ctaid.x"), [zeros(), zeros()], grid=2, seed=seed)
        with pytest.raises(Fault, match="race: "):
            launch(code.replace("$MINE", "%tid.x"), [zeros(), zeros()], warps=2, seed=seed)


@pytest.mark.parametrize(
    "write", ["st.volatile.global.b32 [offset], 5;", "red.relaxed.gpu.global.add.u32 [offset], 5;"]
)
@pytest.mark.parametrize("distance", [1, 32])
def test_a_strong_store_or_an_atomic_after_a_plain_store_is_a_fault(write, distance):
    """Catches a tile that is cleared and added to by other threads with no barrier between, in whatever order."""
    code = f"""
    .reg .b32 other; mad.wide.u32 offset, tid, 4, %rd0; st.global.b32 [offset], 0; $
    xor.b32 other, tid, {distance}; mad.wide.u32 offset, other, 4, %rd0; {write}
    """
    for seed in range(10):
        launch(code.replace("$", "bar.sync 0;"), [zeros()], warps=2, seed=seed)
        with pytest.raises(Fault, match="race: another thread wrote this of argument 0"):
            launch(code.replace("$", ""), [zeros()], warps=2, seed=seed)


def test_warps_that_stand_together_part():
    """Catches warps in lockstep: each stores, then looks at the other's place, and either may be far ahead, or neither
    sees the other's store yet.
    """
    code = """
    .reg .b32 other, x; mad.wide.u32 offset, tid, 4, %rd0; st.volatile.global.b32 [offset], 7;
    xor.b32 other, tid, 32; mad.wide.u32 offset, other, 4, %rd0; ld.volatile.global.b32 x, [offset];
    mad.wide.u32 offset, tid, 4, %rd1; st.global.b32 [offset], x;
    """
    seen = set()
    for seed in range(60):
        out = zeros()
        launch(code, [zeros(), out], warps=2, seed=seed)
        seen.add((out[0].item(), out[32].item()))
    assert seen == {(7, 7), (7, 0), (0, 7), (0, 0)}


def test_an_asynchronous_copy_nobody_waits_for_is_a_fault():
    """Catches a wait_group that is left out, one that leaves a group too many, and one of some lanes alone."""
    code = """
    .reg .b32 to, x; shl.b32 to, tid, 4; mad.wide.u32 offset, tid, 16, %rd0;
    cp.async.cg.shared.global [to], [offset], 16; cp.async.commit_group; cp.async.commit_group; $
    bar.sync 0; ld.shared.b32 x, [to];
    """
    launch(code.replace("$", "cp.async.wait_group 1;"), [zeros(128)], shared=512)
    for wait in ("", "cp.async.wait_group 2;"):
        with pytest.raises(Fault, match=r"^race: an asynchronous copy to this .* was not waited for\n"):
            launch(code.replace("$", wait), [zeros(128)], shared=512)
    some = ".reg .pred p; setp.lt.u32 p, tid, 9; @p cp.async.wait_group 0;"
    with pytest.raises(Fault, match=r"^only some lanes reach what a whole warp does"):
        launch(code.replace("$", some), [zeros(128)], shared=512)


# ---- Addresses, barriers and waits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            "mad.wide.u32 offset, tid, 8, %rd0; st.global.b32 [offset+4], tid;",
            "store outside of argument 0, at byte 132 of 128",
        ),
        ("mad.wide.u32 offset, tid, 4, %rd0; ld.global.b32 x, [offset+-4];", "load outside of all allocations"),
        ("mad.wide.u32 offset, tid, 4, %rd0; ld.global.v2.b32 {x, y}, [offset];", "misaligned load of 8 bytes"),
        ("shl.b32 x, tid, 2; st.shared.b32 [x+4], tid;", "store at byte 128 of 128"),
        ("mov.b32 x, 2; st.shared.b32 [x], tid;", "misaligned store of 4 bytes"),
        ("atom.global.add.u32 x, [%rd0+128], 1;", "atomic outside of argument 0"),
        ("red.global.add.v2.f32 [%rd0+4], {tid, tid};", "misaligned atomic of 8 bytes"),
        ("ld.shared.b32 x, [global_smem];", "read before it is written"),
        (
            ".local .align 4 .b8 own[8]; st.local.b32 [own], tid; ld.local.b32 x, [own+4];",
            "^local memory is read before",
        ),
        (".local .align 4 .b8 own[8]; ld.local.v2.b32 {x, y}, [own+4];", "misaligned load of 8 bytes"),
        (".local .align 4 .b8 own[8]; st.local.b32 [own+8], tid;", "store at byte 8 of 8 bytes of local memory"),
        ("setp.lt.u32 p, tid, 5; @p bar.sync 0;", "lanes of a warp"),
        ("setp.lt.u32 p, tid, 5; @p bra AWAY; bar.sync 0; AWAY:", "only some lanes"),
        ("setp.lt.u32 p, tid, 5; @p shfl.sync.bfly.b32 x, tid, 1, 31, -1;", "only some lanes"),
        (
            "setp.lt.u32 p, tid, 5; @p bra ONE; vote.sync.any.pred p, p, -1; ONE: redux.sync.or.b32 x, tid, -1;",
            "only some lanes",
        ),
        ("shfl.sync.bfly.b32 x, tid, 1, 31, 0xffff;", "mask of some lanes"),
        (
            "setp.lt.u32 p, tid, 32; @p bra AWAY; bar.sync 0; AWAY:",
            "a barrier that some warps of the program never reach",
        ),
        (
            "AGAIN: ld.volatile.global.b32 x, [%rd0]; setp.eq.u32 p, x, 0; @p bra AGAIN;",
            r"what nobody writes any more .*: this one for argument 0, byte 0 of 128\n.*, lanes 0-31: ld",
        ),
        ("AGAIN: mov.b32 x, 1; bra AGAIN;", "no end after"),
        ("add.s32 x, x, 1;", r"^x is read, and nothing has written it\n.*, lanes 0-31"),
        ("@p mov.b32 x, 1;", "^p is read, and nothing has written it"),
        (
            "setp.lt.u32 p, tid, 5; @p bra ON; @p mov.b32 x, 1; ON: add.s32 x, x, 1;",
            r"^x is read, and nothing has written it\n.* warp 0, lanes 0-4:",
        ),
        ("trap;", "the kernel traps"),
        ("setp.eq.u32 p, tid, 31; @p trap;", r"the kernel traps\n.* warp 0, lane 31: "),
    ],
)
def test_faults(code, why):
    """Catches a mistake that runs on, and a message that does not say what it is, where, and how to see it again."""
    with pytest.raises(Fault, match=why) as error:
        launch(
            ".reg .pred p; .reg .b32 x, y;" + code, [zeros(32)], warps=2, shared=128, seed=7, budget=5000, patience=200
        )
    text = str(error.value)
    assert "program (0, 0, 0), warp" in text and "kernel probe" in text and "seed=7" in text
    named = re.search(r"warp \d.*?: (.*)\n  kernel", text)[1]
    assert named == "ret" or named in code


@triton.jit
def locked_kernel(lock, x, CHANGES: tl.constexpr):
    """Programs take a lock that nobody gives back, or wait for a count that never comes."""
    if CHANGES:
        tl.atomic_add(lock, 1)
        while tl.atomic_add(lock, 0, sem="acquire") < 3:
            pass
    else:
        while tl.atomic_cas(lock, 0, 1, sem="acquire") == 1:
            pass
    tl.store(x + tl.program_id(0), 1)


@pytest.mark.parametrize(
    "code",
    [
        "setp.lt.u32 p, tid, 32; AGAIN: @p ld.volatile.global.b32 x, [%rd0]; setp.eq.u32 q, x, 0; @q bra AGAIN;",
        "mov.b32 x, 0; AGAIN: ld.volatile.global.b32 x, [%rd0]; bar.sync 0; setp.eq.u32 q, x, 0; @q bra AGAIN;",
    ],
    ids=["by some warps", "with a barrier"],
)
def test_the_word_of_a_wait(code):
    """Catches: a wait that names no word, or ends in another error, where warps that run together ask nothing, or where
    those that asked stand at a barrier when it is given up.
    """
    code = ".reg .pred p, q; .reg .b32 x; mov.b32 x, 0; " + code
    for seed in range(30):
        with pytest.raises(Fault, match=r"nobody writes any more .*: this one for argument 0, byte 0 of 128\n"):
            launch(code, [zeros(32)], warps=2, shared=128, seed=seed, budget=50_000, patience=100)


@pytest.mark.parametrize("changes", [False, True])
def test_a_wait_through_atomics_that_never_ends_is_found(changes):
    """Catches atomics that change nothing, or barriers in the loop of a wait, that count as news."""
    with (
        pytest.raises(Fault, match=r"^all warps wait for .* \(patience=200\)"),
        on_machine(patience=200, budget=100_000),
    ):
        locked_kernel[(2,)](zeros(1), zeros(2), changes)


def test_half_of_a_pair_may_be_junk():
    """Catches false alarms at what Triton makes: pairs of which a half is used; and the same junk for all."""
    seen = []
    for seed in range(2):
        out = zeros(32)
        launch(
            """
            .reg .pred p; .reg .b16 low, other; .reg .b32 x; cvt.u16.u32 low, tid; setp.lt.u32 p, tid, 32; @p bra ON;
            mov.b16 other, 1; ON: mov.b32 x, {low, other}; mad.wide.u32 offset, tid, 4, %rd0; st.global.b32 [offset], x;
            """,
            [out],
            seed=seed,
        )
        assert torch.equal(out & 0xFFFF, torch.arange(32, dtype=torch.int32))
        seen.append(set((out >> 16).tolist()))
    assert len(seen[0]) > 16 and seen[0] != seen[1]


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("mov.b32 x, {low, none}; st.global.b16 [offset], x;", 0x0102),
        ("mov.b32 x, {low, none}; mov.b32 {low, none}, x; st.global.b16 [offset], low;", 0x0102),
        ("mov.b32 x, {none, low}; shr.u32 x, x, 16; st.global.b32 [offset], x;", 0x0102),
        ("mov.b32 x, {low, none}; and.b32 x, x, 0xffff; st.global.b32 [offset], x;", 0x0102),
        ("mov.b32 x, {low, none}; or.b32 x, x, 0xffff0000; xor.b32 x, x, 3; st.global.b32 [offset], x;", 0xFFFF0101),
        ("mov.b32 x, {low, none}; prmt.b32 x, x, nothing, 0x1011; st.global.b32 [offset], x;", 0x01020101),
        ("prmt.b32 x, nothing, 7, 0x4444; shfl.sync.bfly.b32 x, x, 1, 31, -1; st.global.b32 [offset], x;", 0x07070707),
        ("mov.b32 x, {low, none}; add.u32 x, x, 0x10001; cvt.u16.u32 low, x; st.global.b16 [offset], low;", 0x0103),
        ("and.b32 x, nothing, 7; prmt.b32 x, 9, x, 0x3210; st.global.b32 [offset], x;", 9),
        ("mov.b32 x, {low, none}; st.global.b32 [offset], x;", "x"),
        ("mov.b32 x, {none, low}; cvt.u16.u32 half, x; st.global.b16 [offset], half;", "half"),
        ("prmt.b32 x, nothing, 7, 0x4441; st.global.b32 [offset], x;", "x"),
        ("prmt.b32 x, nothing, 7, 0x444b; st.global.b8 [offset], x;", "x"),
        ("mov.b32 x, {none, low}; add.u32 y, x, 1; shr.u32 z, y, 16; st.global.b16 [offset], z;", "z"),
        ("shl.b32 x, nothing, 8; st.global.b16 [offset], x;", "x"),
        ("shfl.sync.bfly.b32 x, nothing, 1, 31, -1; st.global.b32 [offset], x;", "x"),
        ("setp.eq.u32 p, nothing, 0; @p st.global.b32 [offset], 1;", "p"),
        ("mov.b32 x, {low, none}; cvt.u64.u32 far, x; add.s64 place, far, %rd0; st.global.b32 [place], 1;", "place"),
    ],
)  # fmt: skip
def test_what_nothing_wrote_may_be_handed_on_and_not_be_looked_at(code, kept):
    """Catches false alarms at bytes that are dropped later, and junk that is stored, decides or is an address."""
    head = """
    .reg .pred p; .reg .b16 low, none, half; .reg .b32 x, y, z, nothing; .reg .b64 far, place;
    mov.b16 low, 0x0102; mov.b64 offset, %rd0;
    """
    out = zeros(1)
    fault = pytest.raises(Fault, match=f"^{kept} is read, and nothing has written it")
    with fault if isinstance(kept, str) else contextlib.nullcontext():
        launch(head + code, [out], seed=3)
        assert out.item() & 0xFFFFFFFF == kept


def test_lanes_that_part_meet_again():
    """Catches divergence that loses lanes, loops of other lengths in each lane included."""
    for seed in range(5):
        out = zeros()
        launch(
            """
            .reg .pred p; .reg .b32 n, sum; mov.b32 n, tid; mov.b32 sum, 0;
            AGAIN: setp.eq.u32 p, n, 0; @p bra DONE; add.s32 sum, sum, n; sub.s32 n, n, 1; bra AGAIN;
            DONE: shfl.sync.bfly.b32 n, sum, 1, 31, -1; mad.wide.u32 offset, tid, 4, %rd0; st.global.b32 [offset], n;
            """,
            [out],
            warps=2,
            seed=seed,
        )
        expected = [(i ^ 1) * ((i ^ 1) + 1) // 2 for i in range(64)]
        assert out.tolist() == expected


# ---- Schedules -------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_a_launch():
    """Catches a failure that cannot be seen again, and seeds that change nothing."""
    problem = Problem("rnn_tanh", 40, 3, 3, torch.float16)
    both = plans(problem, units=16)
    logs = []
    for seed in (1, 1, 2):
        with on_machine(seed=seed) as log:
            run(problem, both)
        logs.append(log)
    assert logs[0] == logs[1] != logs[2]


@triton.jit
def numbered_kernel(x):
    """All programs to the same place."""
    tl.store(x, tl.program_id(0))


def test_a_message_says_which_seed_and_which_launch():
    """Catches a seed that, given again, draws other launches, and settings named that nobody gave."""
    texts = []
    for _ in range(2):
        with pytest.raises(Fault) as error, on_machine(seed=3, patience=200) as log:
            numbered_kernel[(1,)](zeros())
            numbered_kernel[(2,)](zeros())
        assert len(log) == 1
        texts.append(str(error.value))
    assert texts[0] == texts[1] and texts[0].endswith("\n  kernel numbered_kernel, launch 2, seed=3, patience=200")


OTHERS = {  # the code, how it is launched, and what the other one did
    "shl.b32 x, tid, 2; xor.b32 y, x, 128; st.shared.b32 [x], tid; bar.sync 0; st.shared.b32 [y], tid;"
    "ld.shared.b32 y, [x];": (dict(warps=2), r"warp \d, lane \d+: (st|ld)\.shared"),
    "st.volatile.global.b32 [%rd0], 1; ld.global.b32 x, [%rd0];": (
        dict(grid=2),
        r"program \(\d, 0, 0\), warp 0, lane \d+: (st\.volatile|ld\.global)",
    ),
    "setp.eq.u32 p, tid, 0; @p st.global.b32 [%rd0], 1; ld.global.b32 x, [%rd0];": (
        dict(warps=2),
        r"program \(0, 0, 0\), warp \d, lane \d+: (@p st|ld)\.global",
    ),
    "shl.b32 x, tid, 4; mad.wide.u32 offset, tid, 16, %rd0; cp.async.cg.shared.global [x], [offset], 16;"
    "st.global.b32 [offset], 1;": (dict(), r"warp 0, lane 0: cp\.async\.cg"),
    "shl.b32 x, tid, 4; mad.wide.u32 offset, tid, 16, %rd0; cp.async.cg.shared.global [x], [offset], 16;"
    "ld.shared.b32 y, [x];": (dict(), r"warp 0, lane 0: cp\.async\.cg"),
    "ld.global.nc.b32 x, [%rd0]; st.global.b32 [%rd0], 1;": (dict(), r"warp 0, lane 31: ld\.global\.nc"),
}


@pytest.mark.parametrize("code", OTHERS)
def test_a_message_names_the_other_one(code):
    """Catches a race of which one side is told alone."""
    how, other = OTHERS[code]
    for seed in range(5):
        with pytest.raises(Fault, match=rf"\n  the other one: .*{other}.*\n  kernel probe, launch 1, seed={seed}"):
            launch(".reg .pred p; .reg .b32 x, y;" + code, [zeros(256)], shared=1024, seed=seed, **how)


@triton.jit
def shifted_kernel(x, BLOCK: tl.constexpr):
    """Moves x by one, with no barrier between what is loaded and stored."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at + 1)
    tl.store(x + at, values)


def test_a_message_names_both_lines():
    """Catches another one whose line of Python is not told."""
    first = shifted_kernel.fn.__code__.co_firstlineno
    with pytest.raises(Fault) as error, on_machine(seed=5):
        shifted_kernel[(1,)](zeros(129), 128)
    lines = re.findall(r"from test_machine.py:(\d+)", str(error.value))
    assert len(lines) == 2 and all(3 < int(line) - first < 7 for line in lines), str(error.value)
    assert "the other one: program (0, 0, 0), warp" in str(error.value)


def test_contexts_open_and_close(monkeypatch):
    """Catches launches that stay on the machine after its context, and settings that are passed over."""
    assert not running()
    with on_machine():
        assert running()
        with on_machine(arch=80) as log:
            numbered_kernel[(0,)](zeros())  # of no program
            assert log[0][1].draws == 0
        assert running()
    assert not running()
    with pytest.raises(TypeError, match=r"unexpected .* 'speed': it takes delay, slow, early"), on_machine(speed=3):
        pass
    with (
        pytest.raises(ValueError, match="arch to be 80, 86, 89, 90, 100, 103, 120 or 121, but got 130"),
        on_machine(arch=130),
    ):
        pass
    for wrong in (dict(early=2), dict(part=-0.1), dict(patience=0), dict(races="no")):
        with pytest.raises((ValueError, TypeError), match=f"expected {next(iter(wrong))} to be"), on_machine(**wrong):
            numbered_kernel[(1,)](zeros())
    with on_machine():
        with pytest.raises(KeyError, match="no argument and no option 'warps'"):
            numbered_kernel[(1,)](zeros(), warps=4)
        with pytest.raises(TypeError, match=r"no tensors of torch\.complex64"):
            numbered_kernel[(1,)](torch.zeros(4, dtype=torch.complex64))
        with pytest.raises(TypeError, match="no arguments of tuple"):
            numbered_kernel[(1,)]((1, 2))


@triton.jit
def halved_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) >> 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_tensors(dtype):
    """Catches: a type of torch's that the machine does not take, or takes for its signed one."""
    values = [(1 << min(8 * dtype.itemsize, 63) - 1) + 4, 3, 7, 8]
    x, y = torch.tensor(values).to(dtype), torch.zeros(4, dtype=dtype)
    with on_machine():
        halved_kernel[(1,)](x, y, 4)
    assert y.to(torch.int64).tolist() == [value >> 1 for value in values]


def test_what_is_meant_is_said():
    """Catches a race that is excused without a reason."""
    assert {m.argument for m in MEANT} <= {"status", "x_part"} and all(len(m.why) > 40 for m in MEANT)


# ---- Mistakes planted in our kernels ---------------------------------------------------------------------------------

PROBLEM = Problem("lstm", 64, 13, 4, torch.bfloat16)
BARRIER = re.compile(r"\n\tbar\.sync[^;]*;")
POLL = r"ld\.(?:volatile|relaxed\.gpu)\.global"


def changed(text: str, pattern: str, replacement, count: int = 0) -> str:
    """re.sub that must change something."""
    result = re.sub(pattern, replacement, text, count=count)
    if result == text:
        raise LookupError(f"nothing in the PTX looks like {pattern!r}: plant the mistake in another way")
    return result


def loop_of(text: str) -> tuple[int, int]:
    """The time loop: from the label that the last branch back goes to, to that branch."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$L__BB\w+):", text, re.M)}
    spans = []
    for m in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\w+);", text):
        if labels.get(m[1], m.start()) < m.start():
            spans.append((m.start() - labels[m[1]], labels[m[1]], m.start()))
    return max(spans)[1:]


def without_barrier(number: int):
    def edit(text: str) -> str:
        begin, end = loop_of(text)
        found = [m for m in BARRIER.finditer(text) if begin < m.start() < end]
        m = found[number % len(found)]
        return text[: m.start()] + text[m.end() :]

    return edit


def published_beside_its_place(text: str) -> str:
    """The first publishing store writes to the neighbour of its place."""
    stores = list(re.finditer(r"st\.global\.cg\.b16 \[ (%rd\d+) \+ 0 \]|st\.global\.cg\.b16 \[(%rd\d+)\]", text))
    if not stores:
        raise LookupError("no publishing stores of 16 bits")
    m = stores[0]
    return text[: m.start()] + m[0].replace("]", "+2 ]").replace("+ 0 +2", "+ 2") + text[m.end() :]


PUBLISHED = re.compile(r"(@%p\d+ )?st\.global\.cg\.(b\d+) \[ ?(%rd\d+) ?(\+ ?\d+)? ?\], \{ (%\w+) \};")


def published_in_the_loop(text: str) -> list[re.Match]:
    begin, end = loop_of(text)
    found = [m for m in PUBLISHED.finditer(text) if begin < m.start() < end]
    if not found:
        raise LookupError("nothing is published in the loop")
    return found


def unpublished(text: str) -> str:
    for m in reversed(published_in_the_loop(text)):
        text = text[: m.start()] + text[m.end() :]
    return text


def publish_behind_the_wait(text: str) -> str:
    """What a step publishes is stored when the wait of the next step is over."""
    found = published_in_the_loop(text)
    begin, _ = loop_of(text)
    declared, first, later = [], [], []
    for i, m in reversed(list(enumerate(found))):
        guard, kind, place, offset, value = m.groups()
        declared.append(f".reg .pred late{i}; .reg .b64 place{i}; .reg .{kind} value{i};")
        first.append(f"setp.ne.b32 late{i}, 0, 0;")
        later.append(f"@late{i} st.global.cg.{kind} [place{i}{(offset or '').replace(' ', '')}], {{value{i}}};")
        kept = f"mov.b64 place{i}, {place}; mov.{kind} value{i}, {value};"
        condition = f"mov.pred late{i}, {guard[1:-1]};" if guard else f"setp.eq.b32 late{i}, 0, 0;"
        text = text[: m.start()] + kept + " " + condition + text[m.end() :]
    behind = text.index("DONE:", begin)  # the end of the first wait of a step
    behind = text.index("// end inline asm", behind)
    text = text[:behind] + " ".join(later) + "\n" + text[behind:]
    return text[:begin] + " ".join(declared + first) + "\n" + text[begin:]


def shuffle_in_part(text: str) -> str:
    """Five lanes of each warp exchange a register in every step; the kernels have no shuffle of their own."""
    begin, _ = loop_of(text)
    at = text.index("// begin inline asm", begin)
    shuffle = "@part shfl.sync.bfly.b32 lane, lane, 1, 31, -1;"
    head = ".reg .pred part; .reg .b32 lane; mov.u32 lane, %laneid; setp.lt.u32 part, lane, 5;"
    return f"{text[:at]}\n{{ {head} {shuffle} }}\n{text[at:]}"


def swapped_rows(text: str) -> str:
    return changed(text, r"(mma\.sync\S+ \{[^}]*\}, \{) ?(%r\d+), (%r\d+)", r"\1 \3, \2")


BARRIER_MISSED = "Fault: race: .* this shared memory, and no barrier since"
NEVER = "Fault: all warps wait for what nobody writes any more .*: this one for $PUBLISHED, byte"
PARTED = "Fault: only some lanes reach what a whole warp does"
WRONG = r"AssertionError: \S+ $RESULT "
PASSES = {  # pass -> what it publishes, and the first of its results that is compared
    "forward": {"$PUBLISHED": "y", "$RESULT": "y"},
    "backward": {"$PUBLISHED": "d_gates", "$RESULT": "d_input"},
}
MISTAKES = {  # name -> the mistake, and what is to be said of it
    "barrier 0 of a step left out": (without_barrier(0), BARRIER_MISSED),
    "barrier 1 of a step left out": (without_barrier(1), BARRIER_MISSED),
    "the last barrier of a step left out": (without_barrier(-1), BARRIER_MISSED),
    "polls may be served by a cache": (
        lambda t: changed(t, POLL, "ld.global"),
        "Fault: a plain load of $PUBLISHED, which program .* writes in this launch; no release .* orders it",
    ),
    "published beside its place": (
        published_beside_its_place,
        f"{NEVER}|Fault: a store to $PUBLISHED, which program .* writes too",
    ),
    "published by nobody": (unpublished, NEVER),
    "published behind the next wait": (publish_behind_the_wait, NEVER),
    "a wait that tests some of its vectors": (
        lambda t: changed(t, r"or\.pred (some\w*), \1, p[1-9]\d*\w*;", ""),
        WRONG,
    ),
    "a wait that tests half of each word": (lambda t: changed(t, "0x80008000", "0x8000"), WRONG),
    "a wait that does not look again": (lambda t: changed(t, r"@!(some\w*) bra", "bra"), WRONG),
    "rows of a fragment exchanged": (swapped_rows, WRONG),
    "a product in part of a warp": (lambda t: changed(t, r"\t(mma\.sync)", r"\t@%p1 \1", 1), PARTED),
    "a shuffle in part of a warp": (shuffle_in_part, PARTED),
    "a misaligned vector": (
        lambda t: changed(t, POLL + r"(\.v4\.b32 [^\[]*\[ ?%rd\d+) ?(?:\+ ?0)? ?\]", r"ld.volatile.global\1+4]", 1),
        "Fault: a misaligned load of 16 bytes",
    ),
    "a store out of bounds": (
        lambda t: changed(t, r"(st\.global\.cg\.\S+ \[ ?%rd\d+) ?(?:\+ ?0)? ?\]", r"\1+1073741824]", 1),
        "Fault: a store outside of $PUBLISHED",
    ),
}
NOT_IN = {("a wait that tests some of its vectors", "forward")}  # it waits for one vector


def outcome(edit, seed: int, problem: Problem = PROBLEM, slices: int = 1, **schedule) -> str:
    """What the machine says of the kernels with a mistake in them: "right", or what is wrong."""
    try:
        with on_machine(seed=seed, edit=edit, **dict(budget=200_000, patience=200) | schedule):
            assert_right(problem, run(problem, plans(problem, units=16, slices=slices)))
    except (Fault, AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "right"


def test_a_race_on_what_spare_rows_load_is_found_elsewhere():
    """Catches races that are excused beside those that are meant: here a second sub-slice is spare, and stands at the
    last row.
    """
    spare = Problem("lstm", 64, 3, 4, torch.bfloat16)
    saved_beside = lambda t: changed(t, r"(st\.global\.b16 \[ ?%rd\d+) ?(?:\+ ?0)? ?\]", r"\1+2]", 1)
    assert outcome(None, 1, spare, slices=2) == "right"
    planted = lambda ptx: saved_beside(ptx) if ".entry forward(" in ptx else ptx
    assert re.match("Fault: (a store to|race: another thread) .*x_part", outcome(planted, 1, spare, slices=2))


@pytest.mark.parametrize("kernel", PASSES)
@pytest.mark.parametrize("name", MISTAKES)
def test_control_a_planted_mistake_is_found(name, kernel):
    """Catches a machine that is too kind for this mistake in one pass; all other kernels stay as they are."""
    edit, said = MISTAKES[name]
    for text, this in PASSES[kernel].items():
        said = said.replace(text, this)
    planted = lambda ptx: edit(ptx) if f".entry {kernel}(" in ptx else ptx
    if (name, kernel) in NOT_IN:
        with pytest.raises(LookupError):
            outcome(planted, 0)
        return
    found = []
    while len(found) < 4 and not (found and re.match(said, found[-1])):
        found.append(outcome(planted, len(found)))
    assert re.match(said, found[-1]), found


def test_control_without_a_mistake_all_is_right():
    """Catches controls that show nothing, because whatever runs in them fails."""
    assert [outcome(None, seed) for seed in range(2)] == ["right", "right"]


def test_a_bound_of_zero_and_a_program_that_is_left_out_are_found(monkeypatch):
    """Catches waits that are not needed in these controls."""
    from rnn_gpu.kernels import launch as launchers

    with monkeypatch.context() as patch:
        patch.setattr(launchers, "WAIT_LIMIT", 0)
        assert "did not end" in outcome(None, 1)
    with monkeypatch.context() as patch:
        patch.setattr(launchers, "WAIT_LIMIT", 200)
        left_out = lambda name, index: name == "forward" and index == (1, 0, 0)
        assert "did not end" in outcome(None, 1, leave_out=left_out, patience=20_000)
