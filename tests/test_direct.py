"""Launches without Triton's binder: the same call as Triton's own, seen by a driver that only notes it, with no GPU."""

import contextlib
import types

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

import rnn_gpu
from perf.overhead import launches_left_out
from rnn_gpu.kernels import backward, direct, forward, launch, prepare
from rnn_gpu.kernels.machine.library import specialized
from rnn_gpu.kernels.plan import DEVICES, plan

pytestmark = [pytest.mark.compiled]


class Noted:
    """What Triton gives for a compiled kernel, and takes for a driver: notes every launch."""

    function, packed_metadata, name, num_ctas = "function", "metadata", "kernel", 1

    def __init__(self):
        self.calls = []

    def run(self, *arguments):
        self.calls.append(arguments)

    def launch_metadata(self, *_):
        return None


@pytest.fixture
def noted(monkeypatch):
    """A driver of a device that does not exist."""
    noted = Noted()
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = types.SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 77, get_current_target=lambda: target
    )
    monkeypatch.setattr(triton.runtime.jit.driver, "_active", driver, raising=False)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", lambda *_, **__: noted)
    return noted


def same(a, b) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b)


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_prepared_launch_hands_over_what_triton_does(cell, backwards, noted):
    """Catches: arguments in another order, a constant that is missing, a version of Triton that calls otherwise."""
    assert direct._known, "a version of Triton that nobody has compared"
    p = plan(cell, 64, 4, 1, "bfloat16", DEVICES["h200"], backwards)
    kernel = backward.backward if backwards else forward.forward
    prepared = direct.Prepared(kernel, launch.constants(p, 0), launch.options(p))
    word, none = torch.zeros(4, dtype=torch.int32), ("resets", "lengths", "offsets")
    numbers = ("T", "B", "begin", "limit", "launch")
    given = tuple(3 if name in numbers else None if name in none else word for name in prepared.names)
    for _ in range(3):
        prepared.launch((5, 1, 1), 77, given)
    first, *others = noted.calls
    assert len(others) == 2 and prepared.compiled is noted
    assert [*first[:6]] == [5, 1, 1, 77, "function", "metadata"]
    for other in others:
        assert other[:6] == first[:6] and len(other) == len(first)
        assert all(map(same, other[9:], first[9:])), "but for metadata and hooks, which nobody has set"


def test_a_prepared_launch_tells_who_wants_to_know(noted):
    """Catches: a profiler of Triton's that sees the first launch alone."""
    prepared = direct.Prepared(
        prepare.prepare_backward,
        dict(G=1, E=1, COUNT=1, PLANES=1, H=8, HS=8, N=1, ROTATION=0, FURTHER=0, DTYPE=tl.float32, BLOCK=64, TILE=16)
        | dict(PRECISION=None),
        dict(num_warps=4),
    )
    given = tuple(3 if name in ("R", "B", "fills", "zeros", "states", "far") else None for name in prepared.names)
    prepared.launch((5, 1, 1), 77, given)
    told = lambda metadata: None
    triton.knobs.runtime.launch_enter_hook.add(told)
    try:
        prepared.launch((5, 1, 1), 77, given)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(told)
    assert noted.calls[1][7] is triton.knobs.runtime.launch_enter_hook


@contextlib.contextmanager
def as_compiled_for(monkeypatch):
    """Within this context launches are left out, and each `Prepared` is given what its first one would have been
    compiled for: where 16 divides an address, and which numbers are 1, is compiled into a kernel.
    """
    first, count = {}, 0

    def see(prepared, device, grid, arguments):
        nonlocal count
        count += 1
        given = dict(zip(prepared.kernel.arg_names, (*arguments, *prepared.tail), strict=True))
        found = specialized(prepared.kernel, given)
        before = first.setdefault(id(prepared), (found, prepared))[0]
        differ = [name for a, b in zip(found, before, strict=True) for name in a | b if a.get(name) != b.get(name)]
        assert not differ, f"{prepared.kernel.__name__}: {differ}"

    with launches_left_out(), monkeypatch.context() as patch:
        patch.setattr(launch, "_start", see)
        patch.setattr(launch, "_ready", {})
        patch.setattr(launch, "_prepared", {})
        yield
    assert count > len(first) > 0, "nothing was launched twice"


@pytest.mark.parametrize("rates", [(1, 0.25), (1, (1, 0.25)), (0.25, 1)])
def test_rates_are_no_part_of_a_kernel(rates, monkeypatch):
    """Catches: zoneout=1 compiled into a kernel that serves every other rate from then on."""
    layer, input = rnn_gpu.LSTM(3, 8).eval(), torch.randn(4, 2, 3)
    with as_compiled_for(monkeypatch), torch.no_grad():
        for layer.zoneout in rates:
            layer(input)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_an_ensemble_has_masks_where_kernels_expect_them(name, monkeypatch):
    """Catches: masks of members, one after another in memory, that begin elsewhere than those of the first."""
    members = [getattr(rnn_gpu, name)(3, 20) for _ in range(3)]
    weights, _ = torch.func.stack_module_state(members)
    inputs, lengths, resets = torch.randn(3, 4, 5, 3), torch.randint(0, 5, (3, 5)), torch.rand(3, 4, 5) < 0.4

    def loss(weights, input, lengths, resets):
        masks = dict(lengths=lengths, resets=resets)
        return torch.func.functional_call(members[0], weights, (input,), masks)[0].sum()

    with as_compiled_for(monkeypatch):
        torch.func.vmap(torch.func.grad(loss))(weights, inputs, lengths, resets)


@pytest.mark.parametrize("options", [
    {}, {"num_layers": 2}, {"bidirectional": True}, {"memory": "lean"}, {"heads": 3}, {"recurrent_dropout": 0.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_tensors_may_begin_anywhere(name, options, monkeypatch):
    """Catches: an input, a state, a weight or a gradient at an address for which a remembered kernel was not made."""
    layer = getattr(rnn_gpu, name)(3, 9, **options)
    sets = layer.num_layers * (2 if layer.bidirectional else 1)

    def elsewhere(tensor, by):
        room = torch.zeros(by + tensor.numel(), dtype=tensor.dtype)
        return room[by:].view(tensor.shape).copy_(tensor).detach()

    with as_compiled_for(monkeypatch):
        for by in (0, 1, 2, 4, 1):
            for parameter in layer.parameters():
                parameter.data = elsewhere(parameter, by)
            states = [elsewhere(torch.zeros(sets, 5, 9), by).requires_grad_() for _ in range(layer._states)]
            for given in ({}, {"lengths": elsewhere(torch.tensor([4, 1, 0, 3, 2]), by)}):
                input = elsewhere(torch.randn(4, 5, 3), by).requires_grad_()
                output, _ = layer(input, tuple(states) if layer._states > 1 else states[0], **given)
                output.backward(elsewhere(output, by))


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sets", [1, 2])
def test_what_prepares_the_buffers_compiles(sets, backwards, dtype, arch):
    """Catches: a kernel that the interpreter runs and no compiler takes; fills of less than 16 bytes at a time."""
    kernel = prepare.prepare_backward if backwards else prepare.prepare_forward
    fixed = dict(G=3, H=40, HS=40, N=sets, DTYPE={"bf16": tl.bfloat16, "fp32": tl.float32}[dtype], BLOCK=prepare.BLOCK)
    fixed |= (
        dict(
            E=4,
            COUNT=1,
            PLANES=1,
            ROTATION=2,
            FURTHER=0,
            TILE=prepare.TILE,
            PRECISION="tf32" if dtype == "fp32" else None,
        )
        if backwards
        else dict(APART=1, PADDED=None)
    )
    fixed |= {name: None for name in kernel.arg_names if name.endswith("_1") and sets == 1}
    words, numbers = ("y", "d_gates"), ("R", "B", "I", "fills", "states", "sums", "weights", "zeros", "far")
    types = {
        name: "constexpr" if name in fixed else "i32" if name in numbers else f"*{'i32' if name in words else dtype}"
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")
    }
    source = triton.compiler.ASTSource(kernel, types, fixed, aligned)
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", arch, 32))
    assert "st.global.v4.b32" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 64 * 64 * 4 * 2
