"""Branches, barriers, and what changes nothing here. (PTX ISA 9.7.12, 9.7.13)"""

from .decode import ACT, BARRIER, BRANCH, EXIT, Decoder, Instruction, instruction
from .parse import Statement


@instruction("bra", "uni")
def bra(d: Decoder, s: Statement) -> Instruction:
    """9.7.12.3."""
    return Instruction(s, BRANCH, target=d.kernel.labels[s.operands[0]])


@instruction("ret exit")
def end(d: Decoder, s: Statement) -> Instruction:
    """9.7.12.6, 9.7.12.7."""
    return Instruction(s, EXIT)


@instruction("trap")
def trap(d: Decoder, s: Statement) -> Instruction:
    """9.7.19.4."""
    return d.act(lambda run, mask: run.fail("the kernel traps", mask))


@instruction("bar barrier", "sync aligned warp cta")
def barrier(d: Decoder, s: Statement) -> Instruction:
    """9.7.13.1: barrier 0 of all threads; 9.7.13.2: of a warp."""
    if s.has("warp"):
        return d.act(lambda run, mask: run.warp_barrier(), together=True)
    if s.operands not in (("0",), ()):
        raise ValueError("only barrier 0, of all threads")
    return Instruction(s, BARRIER, together=True)


@instruction("fence membar", "acq_rel sc gpu sys cta gl proxy async shared global alias acquire release")
def fence(d: Decoder, s: Statement) -> Instruction:
    """9.7.13.4: whatever the thread has stored before is seen before what it stores after; `.sc` and membar: who fences
    so later sees it, too; `.proxy.async`: products of four warps may read it (warpgroup.py).
    """
    if s.has("async"):
        return Instruction(s, ACT, lambda run, mask: run.fence_proxy(mask))
    acquires, releases = not s.has("release"), not s.has("acquire")
    if s.has("cta", "proxy"):
        return Instruction(s, ACT, lambda run, mask: run.fence_own(mask, acquires, releases) if s.has("cta") else None)
    sequential = s.has("sc") or s.op[0] == "membar"
    return Instruction(s, ACT, lambda run, mask: run.fence(mask, acquires, releases, sequential), fences=True)


@instruction("nanosleep pmevent griddepcontrol", "u32 wait launch_dependents")
def nothing(d: Decoder, s: Statement) -> Instruction:
    """9.7.19: time does not pass here."""
    return Instruction(s, ACT, lambda run, mask: None)
