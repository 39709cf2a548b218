"""What orders strong accesses and atomics of several programs, on the machine for PTX: what a missing release, acquire
or fence lets others see must be seen, what PTX forbids never. (Plain accesses: test_machine.py)
"""

import pytest
import torch
import triton
import triton.language as tl

from rnn_gpu.kernels.machine import Fault, on_machine
from tests.ptx import launch

pytestmark = [pytest.mark.compiled]

SEEDS = 20


def zeros(count: int = 64) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


# ---- Messages: data, and a flag behind it ----------------------------------------------------------------------------

MESSAGES = 24
# Program 0 writes each message and its flag, program 1 waits for the flag and keeps what it finds of the message.
HAND_OVER = f"""
.reg .pred p; .reg .b32 program, n, flag, data, t; .reg .b64 at, kept;
setp.ne.u32 p, tid, 0; @p bra END; mov.u32 program, %ctaid.x; mov.b32 n, 0; mov.b64 at, %rd0; mov.b64 kept, %rd1;
NEXT: setp.ne.u32 p, program, 0; @p bra READ; $WRITE $RELEASE $SET bra ON;
READ: $GET setp.eq.u32 p, flag, 0; @p bra READ; $ACQUIRE $FIND st.global.b32 [kept], data;
ON: add.u32 n, n, 1; add.u64 at, at, 4; add.u64 kept, kept, 4; setp.lt.u32 p, n, {MESSAGES}; @p bra NEXT;
END:
"""
FENCE, FLAG = "fence.acq_rel.gpu;", f"[at+{4 * MESSAGES}]"
WRITES = {
    "store": "st.relaxed.gpu.global.b32 [at], 42;",
    "red": "red.relaxed.gpu.global.add.u32 [at], 42;",
    "atom": "atom.relaxed.gpu.global.exch.b32 t, [at], 42;",
}
SETS = {
    "store": f"st.relaxed.gpu.global.b32 {FLAG}, 1;",
    "red": f"red.relaxed.gpu.global.or.b32 {FLAG}, 1;",
    "atom": f"atom.relaxed.gpu.global.exch.b32 t, {FLAG}, 1;",
}
GETS = {
    "load": f"ld.relaxed.gpu.global.b32 flag, {FLAG};",
    "atom": f"atom.relaxed.gpu.global.cas.b32 flag, {FLAG}, 7, 7;",
}
FINDS = {
    "load": "ld.relaxed.gpu.global.b32 data, [at];",
    "atom": "atom.relaxed.gpu.global.add.u32 data, [at], 0;",
}


def missing(seed: int, **parts: str) -> int:
    """How many messages program 1 did not find behind their flags."""
    code, kept = HAND_OVER, zeros(MESSAGES)
    for name, text in (dict(release="", acquire="") | parts).items():
        code = code.replace(f"${name.upper()}", text)
    launch(code, [zeros(2 * MESSAGES), kept], grid=2, seed=seed, early=0.5)
    assert set(kept.tolist()) <= {0, 42}
    return int((kept == 0).sum())


@pytest.mark.parametrize(
    ("write", "set_", "get", "find"),
    [
        ("store", "store", "load", "load"),
        ("store", "red", "load", "atom"),
        ("red", "store", "load", "load"),
        ("red", "atom", "atom", "atom"),
        ("atom", "red", "load", "load"),
        ("atom", "store", "atom", "atom"),
    ],
)
def test_a_flag_brings_a_message_with_a_release_and_an_acquire_alone(write, set_, get, find):
    """Catches atomics that count as done for everybody, or in order: with one side of the two, or none, each seed shows
    a flag without its message; with both no seed does.
    """
    parts = dict(write=WRITES[write], set=SETS[set_], get=GETS[get], find=FINDS[find])
    for seed in range(4):
        assert missing(seed, **parts) > 0
        assert missing(seed, release=FENCE, **parts) > 0
        assert missing(seed, acquire=FENCE, **parts) > 0
        assert missing(seed, release=FENCE, acquire=FENCE, **parts) == 0


@triton.jit
def messages_kernel(x, flags, y, COUNT: tl.constexpr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr):
    """Program 0 publishes x by atomics, number after number, program 1 collects it in y."""
    for i in range(COUNT):
        if tl.program_id(0) == 0:
            tl.atomic_add(x + i, 42, sem="relaxed")
            tl.atomic_xchg(flags + i, 1, sem=RELEASE)
        else:
            while tl.atomic_add(flags + i, 0, sem=ACQUIRE) == 0:
                pass
            tl.store(y + i, tl.atomic_add(x + i, 0, sem="relaxed"))


@pytest.mark.parametrize(
    ("release", "acquire", "right"),
    [("release", "acquire", True), ("relaxed", "acquire", False), ("release", "relaxed", False)],
)
def test_a_missing_release_or_acquire_between_relaxed_atomics_is_found(release, acquire, right):
    """Catches the same in Triton's own words: a mistake of `sem=` in every seed, and none where there is none."""
    for seed in range(SEEDS):
        x, flags, y = zeros(48), zeros(48), zeros(48)
        with on_machine(90, seed=seed):
            messages_kernel[(2,)](x, flags, y, 48, release, acquire, num_warps=1)
        assert (y == 42).all() == right


# ---- Two programs that store and load --------------------------------------------------------------------------------

# Both store their word and load the other's, in `ROUNDS` places, and meet between them.
ROUNDS = 24
BUFFERED = f"""
.reg .pred p; .reg .b32 program, n, found, t; .reg .b64 own, other, kept;
setp.ne.u32 p, tid, 0; @p bra END; mov.u32 program, %ctaid.x; mov.b32 n, 0;
mad.wide.u32 own, program, 4, %rd0; xor.b32 t, program, 1; mad.wide.u32 other, t, 4, %rd0;
mad.wide.u32 kept, program, 4, %rd1;
NEXT: $STORE $FENCE $LOAD st.global.b32 [kept], found;
add.u64 own, own, 8; add.u64 other, other, 8; add.u64 kept, kept, 8; add.u32 n, n, 1;
red.release.gpu.global.add.u32 [%rd2], 1;
WAIT: ld.acquire.gpu.global.b32 t, [%rd2]; shr.u32 t, t, 1; setp.lt.u32 p, t, n; @p bra WAIT;
setp.lt.u32 p, n, {ROUNDS}; @p bra NEXT;
END:
"""


@pytest.mark.parametrize(
    ("fence", "possible"),
    [("", True), ("fence.acq_rel.gpu;", True), ("fence.sc.gpu;", False), ("membar.gl;", False)],
)
@pytest.mark.parametrize(
    ("store", "load"),
    [
        ("st.relaxed.gpu.global.b32 [own], 1;", "atom.acq_rel.gpu.global.add.u32 found, [other], 0;"),
        ("st.release.gpu.global.b32 [own], 1;", "ld.acquire.gpu.global.b32 found, [other];"),
        ("atom.acq_rel.gpu.global.exch.b32 t, [own], 1;", "ld.relaxed.gpu.global.b32 found, [other];"),
        ("atom.acq_rel.gpu.global.exch.b32 t, [own], 1;", "atom.acq_rel.gpu.global.add.u32 found, [other], 0;"),
    ],
)
def test_two_programs_may_both_miss_the_others_store(store, load, fence, possible):
    """Catches stores that are visible behind any fence, or done because they are atomic; and `fence.sc` that is not."""
    for seed in range(4):
        kept = zeros(2 * ROUNDS)
        code = BUFFERED.replace("$STORE", store).replace("$FENCE", fence).replace("$LOAD", load)
        launch(code, [zeros(2 * ROUNDS), kept, zeros()], grid=2, seed=seed, early=0.5)
        assert (kept.view(ROUNDS, 2) == 0).all(1).any() == possible


# ---- What PTX forbids ------------------------------------------------------------------------------------------------

LOAD, STORE = "ld.relaxed.gpu.global.b32", "st.relaxed.gpu.global.b32"
GET, PUT = "ld.acquire.gpu.global.b32", "st.release.gpu.global.b32"
X, Y = "[%rd0]", "[%rd0+128]"
FORBIDDEN = {  # name -> what the programs do, with results in a and b; those of which program never happen together
    "a release passes on what its thread has seen": (
        f"{STORE} {X}, 1;",
        f"{LOAD} a, {X}; setp.eq.u32 p, a, 0; @p bra END; {PUT} {Y}, 1;",
        f"{GET} a, {Y}; {LOAD} b, {X};",
        (2, 1, 0),
    ),
    "and what it has acquired": (
        f"{STORE} {X}, 1; {PUT} {Y}, 1;",
        f"{GET} a, {Y}; setp.eq.u32 p, a, 0; @p bra END; {PUT} [%rd0+256], 1;",
        f"{GET} a, [%rd0+256]; {LOAD} b, {X};",
        (2, 1, 0),
    ),
    "an atomic goes on with a release": (
        f"{STORE} {X}, 1; {PUT} {Y}, 1;",
        f"atom.relaxed.gpu.global.add.u32 a, {Y}, 1;",
        f"{GET} a, {Y}; {LOAD} b, {X};",
        (2, 2, 0),
    ),
    "a place does not become older": (
        f"{STORE} {X}, 1;",
        f"atom.relaxed.gpu.global.add.u32 a, {Y}, 1;",
        f"{LOAD} a, {X}; {LOAD} b, {X};",
        (2, 1, 0),
    ),
    "nor by an atomic": (
        f"red.relaxed.gpu.global.add.u32 {X}, 1;",
        f"red.relaxed.gpu.global.or.b32 {X}, 0;",
        f"{LOAD} a, {X}; atom.relaxed.gpu.global.add.u32 b, {X}, 0;",
        (2, 1, 0),
    ),
    "a thread sees what it has stored": (
        f"red.relaxed.gpu.global.add.u32 {Y}, 1;",
        f"red.relaxed.gpu.global.add.u32 {X}, 1;",
        f"atom.relaxed.gpu.global.exch.b32 t, {X}, 2; {LOAD} b, {X}; mov.b32 a, 0;",
        (2, 0, 0),
    ),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_never_happens(name):
    """Catches a memory that is weaker than PTX's: false alarms in programs that are right."""
    *programs, (who, a, b) = FORBIDDEN[name]
    code = f"""
    .reg .pred p; .reg .b32 program, a, b, t; setp.ne.u32 p, tid, 0; @p bra END; mov.u32 program, %ctaid.x;
    mov.b32 a, 9; mov.b32 b, 9; setp.eq.u32 p, program, 1; @p bra SECOND; setp.eq.u32 p, program, 2; @p bra THIRD;
    {programs[0]} bra END; SECOND: {programs[1]} bra END; THIRD: {programs[2]}
    END: setp.ne.u32 p, tid, 0; @p ret; mad.wide.u32 offset, program, 8, %rd1; st.global.v2.b32 [offset], {{a, b}};
    """
    seen = set()
    for seed in range(100):
        out = zeros(6)
        launch(code, [zeros(96), out], grid=3, seed=seed, early=0.5)
        seen.add(tuple(out[2 * who : 2 * who + 2].tolist()))
    assert (a, b) not in seen and len(seen) > 1 - (a == 0), seen


# ---- What must not be written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "grid", "right"),
    [
        ("ld.global.nc.b32 x, [%rd0];", "st.global.b32 [%rd0+4], 1;", 1, True),
        ("ld.global.nc.b32 x, [%rd0];", "ld.global.nc.b32 x, [%rd0];", 2, True),
        ("ld.global.nc.b32 x, [%rd0];", "st.global.b32 [%rd0], 1;", 1, False),
        ("st.global.b32 [%rd0], 1;", "ld.global.nc.b32 x, [%rd0];", 1, False),
        ("ld.global.nc.b32 x, [%rd0];", "st.relaxed.gpu.global.b32 [%rd0], 1;", 2, False),
        ("ld.global.nc.b32 x, [%rd0];", "red.relaxed.gpu.global.add.u32 [%rd0], 1;", 2, False),
        ("ld.acquire.gpu.global.b32 x, [%rd0]; ld.global.nc.b32 x, [%rd0];", "st.release.gpu.global.b32 [%rd0], 1;", 2,
         False),
    ],
)  # fmt: skip
def test_what_is_loaded_as_constant_is_not_written(first, second, grid, right):
    """Catches `ld.global.nc` as a plain load: of what the program itself, or another one, writes, before or after."""
    code = f"""
    .reg .pred p; .reg .b32 x; setp.ne.u32 p, tid, 0; @p bra END; mov.u32 x, %ctaid.x; setp.eq.u32 p, x, 1;
    @p bra SECOND; {first} setp.eq.u32 p, x, x; {"" if grid == 1 else "bra END;"} SECOND: {second} END:
    """
    for seed in range(SEEDS):
        if right:
            launch(code, [zeros()], grid=grid, seed=seed)
        else:
            with pytest.raises(Fault, match=r"ld\.global\.nc (of argument 0|reads in this launch)"):
                launch(code, [zeros()], grid=grid, seed=seed)


OTHER = "xor.b32 x, tid, 32; mad.wide.u32 offset, x, 16, %rd0; st.global.b32 [offset], 1;"


@pytest.mark.parametrize(
    ("before", "behind", "said"),
    [
        ("", "st.global.b32 [offset], 1;", None),
        ("", f"bar.sync 0; {OTHER}", None),
        (
            "st.global.b32 [offset], 1;",
            "",
            "a store to argument 0 that an asynchronous copy reads which was not waited",
        ),
        ("red.global.add.u32 [offset], 1;", "", "an atomic on argument 0 that an asynchronous copy reads"),
        (f"bar.sync 0; {OTHER}", "", "a store to argument 0 that an asynchronous copy reads which was not waited for"),
        (
            "",
            OTHER,
            "race: another thread has read this of arg|race: warp ., lane .* wrote|that an asynchronous copy reads",
        ),
        (
            "bar.sync 0;",
            OTHER,
            "race: another thread has read this of arg|race: warp ., lane .* wrote|asynchronous copy",
        ),
    ],
)
def test_the_source_of_an_asynchronous_copy_is_read_until_its_wait(before, behind, said):
    """Catches copies that count as read when they begin: a source that is written before the wait, or by another thread
    with no barrier behind it.
    """
    code = f"""
    .reg .b32 to, x; shl.b32 to, tid, 4; mad.wide.u32 offset, tid, 16, %rd0;
    cp.async.cg.shared.global [to], [offset], 16; cp.async.commit_group; {before} cp.async.wait_group 0; {behind}
    bar.sync 0; ld.shared.b32 x, [to];
    """
    for seed in range(SEEDS):
        if said is None:
            launch(code, [zeros(256)], warps=2, shared=1024, seed=seed)
        else:
            with pytest.raises(Fault, match=said):
                launch(code, [zeros(256)], warps=2, shared=1024, seed=seed)


# ---- What is one's own -----------------------------------------------------------------------------------------------


@triton.jit
def own_kernel(x, y, COUNT: tl.constexpr):
    """Program 0 makes each x five, all others leave it as it is; each keeps what it then finds in y."""
    program = tl.program_id(0)
    for i in range(COUNT):
        tl.atomic_max(x + i, tl.where(program == 0, 5, 0), sem="relaxed")
        tl.store(y + program * COUNT + i, tl.load(x + i, volatile=True))


@pytest.mark.parametrize("programs", [2, 4])
def test_a_thread_sees_what_it_has_written_itself(programs):
    """Catches a value that counts as made by the last atomic there, though that has left it as it is: the thread that
    made it then seems to come before itself.
    """
    for seed in range(SEEDS):
        x, y = zeros(16), zeros(16 * programs)
        with on_machine(90, seed=seed):
            own_kernel[(programs,)](x, y, 16, num_warps=1)
        assert (y[:16] == 5).all() and set(y.tolist()) <= {0, 5}


@triton.jit
def lock_kernel(total, lock):
    while tl.atomic_cas(lock, 0, 1, sem="acquire") == 1:
        pass
    value = tl.load(total)
    tl.debug_barrier()
    tl.store(total, value + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0, sem="release")


@pytest.mark.parametrize("programs", [2, 3, 8])
def test_a_lock_that_is_right_is_given_back(programs):
    """Catches the same where it ends in a wait for ever: who gives a lock back comes behind its own taking."""
    for seed in range(SEEDS):
        total, lock = torch.zeros(1), zeros(1)
        with on_machine(90, seed=seed, patience=500):
            lock_kernel[(programs,)](total, lock, num_warps=1)
        assert total.item() == programs and lock.item() == 0


@triton.jit
def read_and_written_kernel(x, y):
    """Program 0 reads x plainly, then writes it by an atomic, as program 1 does, and nothing orders the two."""
    if tl.program_id(0) == 0:
        value = tl.load(x)
        tl.debug_barrier()
        tl.atomic_xchg(x, 7, sem="relaxed")
        tl.store(y, value)
    else:
        tl.atomic_xchg(x, 9, sem="relaxed")


def test_an_atomic_of_ones_own_does_not_hide_a_plain_load():
    """Catches a reader that is forgotten when its program writes there strongly, which orders nobody behind it."""
    for seed in range(SEEDS):
        with pytest.raises(Fault, match="plain"), on_machine(90, seed=seed):
            read_and_written_kernel[(2,)](zeros(1), zeros(1), num_warps=1)
