"""What only a GPU can show: real memory, real schedules, cuDNN beside it.

    pytest -m gpu                  one test at a time: they share the device and measure nothing
    pytest -m "gpu and slow"       the long sweeps and the soak

The launchers first, for they hide nothing; then the layers as users call them.
"""

import copy
import dataclasses
import inspect
import itertools

import pytest
import torch

pytest.importorskip("triton")

import rnn_gpu
from rnn_gpu import backends, settings, wavefront, zoo
from rnn_gpu.equations import BUILT_IN
from rnn_gpu.kernels import launch
from rnn_gpu.kernels.plan import Plan
from rnn_gpu.kernels.spec import CELLS
from tests import wide_cells
from tests.layers import away_from_the_kink, by_rounded_loops, cudnn_multiplies_in_full, draw, outcome, same
from tests.problems import (
    Data,
    Poison,
    Problem,
    assert_no_other_h_n,
    assert_right,
    assert_same_bits,
    assert_same_exceptions,
    bits,
    by_reference,
    changed,
    data,
    loop,
    oracle,
    plans,
    run,
    run_backward,
    run_forward,
)
from tests.tolerances import assert_close_to_oracle

pytestmark = [pytest.mark.gpu]

LAYERS = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", dict(nonlinearity="tanh")),
    "rnn_relu": ("RNN", dict(nonlinearity="relu")),
}
KINDS = [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, None), (torch.bfloat16, None)]

every_cell = pytest.mark.parametrize("cell", BUILT_IN)
every_kind = pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=["fp32-ieee", "fp32-tf32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def no_launch_gave_up():
    """A wait that did not end is told at the next call only: ask after every test, so that it names the right one; and
    whether any h_n was wrong, which only now costs nothing.
    """
    yield
    launch.check()
    assert_no_other_h_n()


def gpu_problem(*args, **kwargs) -> Problem:
    return Problem(*args, device="cuda", **kwargs)


def gpu_plans(problem: Problem, **options) -> tuple[Plan, Plan]:
    """The plans for this very device."""
    return plans(problem, device=backends.device_of("cuda"), **options)


def by_torch_nn(problem: Problem, given: Data) -> dict:
    """The results by cuDNN: torch.nn's layer with the identity as its input weight, so that x_part is its input.

    Its gradient of that input is d_input; d_hidden it does not show.
    """
    spec, gates = CELLS[problem.cell], CELLS[problem.cell].gates
    size = problem.hidden_size
    found = []
    for n in range(problem.sets):
        options = dict(nonlinearity=problem.cell.removeprefix("rnn_")) if spec.gates == 1 else {}
        layer_class = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(problem.cell, torch.nn.RNN)
        layer = layer_class(gates * size, size, **options).to(problem.device, problem.dtype)
        with torch.no_grad():
            layer.weight_ih_l0.copy_(torch.eye(gates * size))
            layer.weight_hh_l0.copy_(given.weight_hh[n])
            layer.bias_ih_l0.zero_()
            layer.bias_hh_l0.zero_()
            if given.bias_hn is not None:
                layer.bias_hh_l0[2 * size :] = given.bias_hn[n]
        x = given.x_part[:, :, n].flip(0) if problem.reverse(n) else given.x_part[:, :, n]
        d_y = given.d_y[:, :, n].flip(0) if problem.reverse(n) else given.d_y[:, :, n]
        x = x.contiguous().requires_grad_()
        states = [given.h0[n][None].clone().requires_grad_()]
        d_states = [given.d_h_n[n][None]]
        if given.c0 is not None:
            states.append(given.c0[n][None].clone().requires_grad_())
            d_states.append(given.d_c_n[n][None])
        y, last = layer(x, tuple(states) if len(states) == 2 else states[0])
        last = last if isinstance(last, tuple) else (last,)
        d_x, *d_start = torch.autograd.grad((y, *last), (x, *states), (d_y, *d_states))
        if problem.reverse(n):
            y, d_x = y.flip(0), d_x.flip(0)
        results = dict(y=y.detach(), d_input=d_x, d_h0=d_start[0][0])
        if given.c0 is not None:
            results |= dict(c_n=last[1][0].detach(), d_c0=d_start[1][0])
        found.append(results)
    return {
        name: torch.stack([results[name] for results in found], 2 if name in ("y", "d_input") else 0)
        for name in found[0]
    }


# ---- The launchers: right results ------------------------------------------------------------------------------------


@pytest.mark.covering(("cell", "dtype", "precision", "hidden_size"), ("cell", "sets", "reversed_sets"))
@every_cell
@every_kind
@pytest.mark.parametrize(("sets", "reversed_sets"), [(1, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize(
    ("hidden_size", "batch"), [(1, 5), (7, 17), (33, 1), (64, 64), (200, 5), (512, 17), (1024, 16)]
)
def test_forward_and_backward_are_right(cell, dtype, precision, sets, reversed_sets, hidden_size, batch, tf32):
    """Catches whatever the interpreter cannot show: layouts, caches, rounding of the hardware, a compiler's mistake."""
    problem = gpu_problem(cell, hidden_size, batch, 20, dtype, precision, sets, reversed_sets)
    tf32(precision)
    peer = loop(problem)
    for alone in (False, True) if hidden_size <= 64 else (False,):
        found = run(problem, gpu_plans(problem, alone=alone))
        launch.check("cuda")
        assert_right(problem, found, peer=peer)


@every_cell
@every_kind
@pytest.mark.parametrize(("hidden_size", "batch"), [(64, 16), (256, 16), (768, 8), (1024, 64)])
def test_errors_are_no_larger_than_those_of_torch_nn(cell, dtype, precision, hidden_size, batch, tf32):
    """Catches a result that is right, but worse than what users have today."""
    problem = gpu_problem(cell, hidden_size, batch, 50, dtype, precision)
    tf32(precision)
    found, expected = run(problem, gpu_plans(problem, alone=True)), oracle(problem)
    small = cudnn_multiplies_in_full(getattr(rnn_gpu, LAYERS[cell][0])(1, hidden_size))
    peer = loop(problem) if precision == "tf32" and small else by_torch_nn(problem, data(problem))
    for name, of_torch in peer.items():
        assert_close_to_oracle(found[name], expected[name], of_torch, f"{problem} {name}")


@pytest.mark.slow
@every_cell
@every_kind
@pytest.mark.parametrize("hidden_size", [64, 100, 128, 192, 256, 384, 512, 640, 768, 1000, 1024, 1280, 1536, 2048])
def test_every_plan_of_this_device_is_right(cell, dtype, precision, hidden_size, tf32):
    """Catches a plan that the planner chooses at some size and that is wrong, does not compile, or does not fit."""
    tf32(precision)
    for batch, (sets, reversed_sets) in itertools.product((1, 16, 64, 256), ((1, 0), (2, 2))):
        problem = gpu_problem(cell, hidden_size, batch, 4, dtype, precision, sets, reversed_sets)
        try:
            both = gpu_plans(problem, alone=True)
        except AssertionError as error:
            assert sets == 2, error  # two directions of a large layer may need more programs than there are
            continue
        given = data(problem)
        assert_right(problem, run(problem, both), given, peer=loop(problem, given))
        launch.check("cuda")


@pytest.mark.parametrize("cut", [
    dict(units=32), dict(units=64), dict(slices=2), dict(slices=4), dict(slices=1, batch_slices=1),
    dict(registers=1, shared=1), dict(registers=0, shared=2), dict(registers=0, shared=0), dict(rows=16),
], ids=lambda cut: "-".join(f"{key}{value}" for key, value in cut.items()))  # fmt: skip
@pytest.mark.parametrize("waits", [1, 2, 4])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_ways_to_cut_a_problem_are_right(cell, waits, cut):
    """Catches a cut that the planner chooses elsewhere and that is wrong on real memory."""
    problem = gpu_problem(cell, 512, 40, 8, torch.bfloat16)
    assert_right(problem, run(problem, gpu_plans(problem, waits=waits, **cut)))


# ---- Long sequences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", [1, 2, 3, 100, 1000])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_lengths_up_to_a_thousand_are_right(cell, time):
    """Catches an error that grows with time, and a first or a last step that is special."""
    problem = gpu_problem(cell, 96, 5, time, torch.float32, "ieee")
    given = data(problem)
    assert_right(problem, run(problem, gpu_plans(problem)), given)


@pytest.mark.parametrize("alone", [False, True], ids=["exchanged", "alone"])
@pytest.mark.parametrize("time", [65_536, 100_000])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_hundred_thousand_steps_are_right_at_both_ends(cell, time, alone):
    """Catches a counter of 16 bits, a slow drift, and a wait that is bounded over all steps instead of over each.

    A plain loop takes minutes here. But a recurrence forgets: the last steps follow from the state before them, and
    the gradients of the last steps from nothing before. All steps in one launch equal those in ten, bit for bit.
    """
    problem = gpu_problem(cell, 64, 2, time, torch.float32, "ieee")
    given = data(problem)
    both = gpu_plans(problem, alone=alone)
    found = run(problem, both, given)
    launch.check("cuda")
    assert all(tensor.isfinite().all() for tensor in found.values())

    state, carry, piece = given.h0, given.c0, -(-time // 10)
    for k in range(0, time, piece):
        part = dataclasses.replace(problem, time=min(piece, time - k))
        x_part = given.x_part[k : k + piece].contiguous()
        y, carry, _, _ = run_forward(part, both[0], dataclasses.replace(given, x_part=x_part, h0=state, c0=carry))
        assert torch.equal(bits(found["y"][k : k + piece]), bits(y)), f"steps from {k}"
        if k + piece < time:
            state = y[-1].transpose(0, 1).contiguous()
            if k + 2 * piece >= time:
                before_last = k + piece, state, carry
    assert carry is None or torch.equal(bits(found["c_n"]), bits(carry))

    k, state, carry = before_last
    skipped = time - k - 200  # the oracle's loop over the last 200 steps, from the state of the kernels
    start = dataclasses.replace(problem, time=skipped)
    x_part = given.x_part[k : k + skipped].contiguous()
    y, carry, _, _ = run_forward(start, both[0], dataclasses.replace(given, x_part=x_part, h0=state, c0=carry))
    tail = dataclasses.replace(problem, time=200)
    tail_data = dataclasses.replace(
        given, x_part=given.x_part[-200:], d_y=given.d_y[-200:], h0=y[-1].transpose(0, 1), c0=carry
    )
    expected, peer = oracle(tail, tail_data), loop(tail, tail_data)
    for name in ("y", "d_input", "d_hidden"):
        assert_close_to_oracle(found[name][-200:], expected[name], peer[name], f"the end of {name}")


def test_more_elements_than_32_bits_can_count():
    """Catches an offset of 32 bits: T * B * G * H passes 2^31 here, and the last rows must still be right."""
    free, _ = torch.cuda.mem_get_info()
    if free < 32 << 30:
        pytest.skip("needs 32 GB of free memory")
    time, batch, size = 2100, 512, 512
    problem = gpu_problem("lstm", size, batch, time, torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    x_part = torch.randn(time, batch, 1, 4 * size, generator=generator, device="cuda", dtype=torch.bfloat16)
    assert x_part.numel() > 1 << 31
    small = data(dataclasses.replace(problem, time=1))
    # Only the last steps of a few rows are compared, and only in them flow gradients.
    d_y = torch.zeros(time, batch, 1, size, device="cuda", dtype=torch.bfloat16)
    d_y[-20:] = torch.randn(20, batch, 1, size, generator=generator, device="cuda", dtype=torch.bfloat16)
    given = dataclasses.replace(small, x_part=x_part, d_y=d_y)
    both = gpu_plans(problem)
    y, c_n, aux, gates = run_forward(problem, both[0], given)
    d_gates, _ = run_backward(problem, both[1], given, y, aux, gates)
    launch.check("cuda")
    rows = torch.tensor([0, 1, batch - 2, batch - 1], device="cuda")
    tail = dataclasses.replace(problem, time=20, batch=4)
    tail_data = dataclasses.replace(
        given,
        x_part=x_part[-20:, rows],
        d_y=d_y[-20:, rows],
        h0=y[-21, rows].transpose(0, 1),
        c0=aux[-21, rows, :, :size].transpose(0, 1),
        d_h_n=given.d_h_n[:, rows],
        d_c_n=given.d_c_n[:, rows],
    )
    # c0 stays in float32: rounding it to the problem's type would be an error of the test's own.
    expected, peer = by_reference(tail, tail_data, torch.float64), by_reference(tail, tail_data, torch.bfloat16)
    assert_close_to_oracle(y[-20:, rows], expected["y"], peer["y"], "y")
    assert_close_to_oracle(c_n[:, rows].bfloat16(), expected["c_n"], peer["c_n"], "c_n")
    d_input = d_gates[-20:, rows].flatten(3)
    assert_close_to_oracle(d_input, expected["d_input"], peer["d_input"], "d_input")


# ---- Many launches ---------------------------------------------------------------------------------------------------


@every_cell
@every_kind
def test_repeated_runs_are_equal_to_the_last_bit(cell, dtype, precision):
    """Catches a race: a tile used before it was whole, a result that depends on which program came first."""
    problem = gpu_problem(cell, 512, 16, 100, dtype, precision, 2, 2)
    both = gpu_plans(problem)
    expected = run(problem, both)
    for number in range(20):
        assert_same_bits(run(problem, both), expected, f"in run {number}")


def test_uninitialised_memory_never_reaches_a_result(monkeypatch):
    """Catches reading what nobody wrote: on a GPU, fresh memory often holds an earlier run's right results."""
    for cell, (dtype, precision), alone in itertools.product(BUILT_IN, KINDS, (False, True)):
        problem = gpu_problem(cell, 33, 19, 5, dtype, precision, 2, 2)
        with monkeypatch.context() as patch:
            poison = Poison(patch)
            found = run(problem, gpu_plans(problem, alone=alone))
        assert poison.given
        assert_right(problem, found)


def test_two_streams_at_once():
    """Catches state that launches share: a status word, a buffer, memory given back too early."""
    problems = [
        gpu_problem("lstm", 256, 8, 300, torch.bfloat16, seed=1),
        gpu_problem("gru", 256, 16, 300, torch.float16, seed=2),
    ]
    both = [gpu_plans(problem) for problem in problems]
    expected = [run(problem, p) for problem, p in zip(problems, both, strict=True)]
    given = [data(problem) for problem in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(20):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[n].append(run(problems[n], both[n], given[n]))
    torch.cuda.synchronize()
    for n in range(2):
        for number, results in enumerate(found[n]):
            assert_same_bits(results, expected[n], f"on stream {n}, run {number}")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_a_cuda_graph_replays(cell):
    """Catches a fill or a launch that is not captured: the second replay would find the first one's data as its own."""
    problem = gpu_problem(cell, 256, 16, 50, torch.bfloat16)
    both = gpu_plans(problem)
    inputs = [data(dataclasses.replace(problem, seed=seed)) for seed in range(4)]
    expected = [run(problem, both, given) for given in inputs]
    static = Data(*(None if tensor is None else tensor.clone() for tensor in dataclasses.astuple(inputs[0])))
    run(problem, both, static)  # compiled, and the status word allocated, before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(problem, both, static)
    for number in (1, 2, 3, 0, 0, 2):
        for field in dataclasses.fields(Data):
            if (tensor := getattr(static, field.name)) is not None:
                tensor.copy_(getattr(inputs[number], field.name))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, expected[number], f"replayed with data {number}")
    launch.check("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_ten_thousand_launches(cell):
    """Catches what happens once in a thousand times: a torn value, a store seen too early, a wait that never ends.

    The count of wrong values stays on the device, so that launches follow each other without a pause.
    """
    cases = []
    for hidden_size, batch, dtype in ((256, 8, torch.float16), (512, 16, torch.bfloat16), (1024, 16, torch.bfloat16)):
        problem = gpu_problem(cell, hidden_size, batch, 40, dtype)
        both = gpu_plans(problem)
        expected = run(problem, both)
        assert_right(problem, expected)
        cases.append((problem, both, data(problem), expected))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(5_000):  # a forward and a backward each
        problem, both, given, expected = cases[number % len(cases)]
        for name, tensor in run(problem, both, given).items():
            wrong += (bits(tensor) != bits(expected[name])).sum()
        if number % 500 == 0:
            launch.check("cuda")
    launch.check("cuda")
    assert wrong.item() == 0


# ---- What must be an error -------------------------------------------------------------------------------------------


def test_a_grid_too_large_is_an_error_and_not_a_hang():
    """Catches a launch whose programs cannot all run at once being accepted, where it would wait for ever."""
    problem = gpu_problem("lstm", 256, 1, 2, torch.bfloat16)
    forward_plan, _ = gpu_plans(problem)
    programs = 40 * backends.device_of("cuda").multiprocessors  # more than 32 programs never share a multiprocessor
    batch_slices = -(-programs // forward_plan.unit_slices)
    batch = batch_slices * forward_plan.rows * forward_plan.slices
    large = dataclasses.replace(problem, batch=batch)
    too_many = changed(dataclasses.replace(forward_plan, batch_size=batch), batch_slices=batch_slices)
    with pytest.raises(RuntimeError):
        run_forward(large, too_many, data(large))
        torch.cuda.synchronize()
    small = gpu_problem("lstm", 256, 8, 5, torch.bfloat16)
    assert_right(small, run(small, gpu_plans(small)))  # the device is as good as before


def test_a_wait_that_does_not_end_is_an_error_that_names_the_launch(monkeypatch):
    """Catches a status word that the host never sees: written to pinned memory, read without a synchronisation."""
    problem = gpu_problem("gru", 512, 16, 200, torch.float16)
    both = gpu_plans(problem)
    run(problem, both)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "WAIT_LIMIT", 0)
        y, _, _, _ = run_forward(problem, both[0], data(problem))
        with pytest.raises(RuntimeError, match="gru forward, T 200, B 16"):
            launch.check("cuda")
    assert y.isnan().any()
    launch.check("cuda")  # told once
    assert_right(problem, run(problem, both))


@pytest.mark.parametrize("alone", [False, True], ids=["exchanged", "alone"])
@every_cell
@every_kind
def test_nan_goes_where_the_oracle_has_it(cell, dtype, precision, alone):
    """Catches a NaN of the hardware's own, its low bits set, that rounding to tf32 makes a number; a wait for it."""
    problem = gpu_problem(cell, 40, 5, 6, dtype, precision)
    both = gpu_plans(problem, alone=alone)
    whole = torch.int32 if dtype == torch.float32 else torch.int16  # of the same width, holds all ones
    made_here = torch.zeros(1, dtype=dtype, device="cuda") / torch.zeros(1, dtype=dtype, device="cuda")
    for pattern in (-1, made_here.view(whole).item(), torch.iinfo(whole).max):
        for name, where in dict(x_part=(1, 2, 0, 3), h0=(0, 2, 3), d_y=(4, 2, 0, 3), d_h_n=(0, 2, 3)).items():
            tensor = getattr(data(problem), name).clone()
            tensor.view(whole)[where] = pattern
            given = dataclasses.replace(data(problem), **{name: tensor})
            found = run(problem, both, given)
            launch.check("cuda")
            assert_same_exceptions(found, oracle(problem, given), f"with {pattern & 0xFFFFFFFF:x} in {name}")


# ---- The layers ------------------------------------------------------------------------------------------------------


def layer_results(layer: torch.nn.Module, x: torch.Tensor, states: tuple, d_outputs: tuple) -> dict:
    """Outputs, final states, and gradients of everything that has one, by name."""
    x = x.clone().requires_grad_()
    states = tuple(state.clone().requires_grad_() for state in states)
    output, last = layer(x, states if len(states) == 2 else states[0])
    outputs = (output, *last) if isinstance(last, tuple) else (output, last)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(outputs, (x, *states, *parameters), d_outputs)
    names = ("x", *("h0", "c0")[: len(states)], *names)
    found = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
    found |= {f"gradient of {name}": tensor for name, tensor in zip(names, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


@every_cell
@every_kind
@pytest.mark.parametrize(
    ("hidden_size", "options"),
    [
        (48, dict()),
        (256, dict(num_layers=2, bidirectional=True, batch_first=True)),
        (300, dict(bias=False)),
        (512, dict(bidirectional=True)),
    ],
    ids=["small", "stacked", "no-bias", "both-ways"],
)
def test_layers_are_as_good_as_torch_nn(cell, dtype, precision, hidden_size, options, tf32):
    """Catches a layer that loads torch.nn's state dict and computes something else, or less exactly."""
    tf32(precision)
    name, more = LAYERS[cell]
    options = options | more
    theirs = getattr(torch.nn, name)(40, hidden_size, **options).to("cuda", dtype)
    if cell == "rnn_relu":
        away_from_the_kink(theirs)
    ours = getattr(rnn_gpu, name)(40, hidden_size, **options).to("cuda", dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = getattr(torch.nn, name)(40, hidden_size, **options).double()
    exact.load_state_dict(theirs.state_dict())
    time, batch, directions = 30, 9, 2 if options.get("bidirectional") else 1
    states = directions * options.get("num_layers", 1)

    def draw(*shape):
        return torch.randn(*shape).to("cuda", dtype)

    def drawn(*shape):
        return draw(*shape).abs() if cell == "rnn_relu" else draw(*shape)

    shape = (batch, time) if options.get("batch_first") else (time, batch)
    count = 2 if cell == "lstm" else 1
    x, h = drawn(*shape, 40), tuple(drawn(states, batch, hidden_size) for _ in range(count))
    d = (draw(*shape, directions * hidden_size), *(draw(states, batch, hidden_size) for _ in range(count)))
    with rnn_gpu.backend("triton"):
        found = layer_results(ours, x, h, d)
    rnn_gpu.check()
    in_full = precision == "tf32" and cudnn_multiplies_in_full(ours)
    peer = layer_results(by_rounded_loops(theirs) if in_full else theirs, x, h, d)
    expected = layer_results(
        exact, x.cpu().double(), tuple(s.cpu().double() for s in h), tuple(t.cpu().double() for t in d)
    )
    for key, tensor in found.items():
        assert_close_to_oracle(tensor.cpu(), expected[key], peer[key].cpu(), f"{cell} {key}")


@pytest.mark.parametrize(("dtype", "precision"), [KINDS[0], KINDS[3]], ids=["fp32-ieee", "bf16"])
@pytest.mark.parametrize(("heads", "hidden_size"), [(1, 256), (4, 512), (4, 64)])
@pytest.mark.parametrize("cell", [*(layer.__name__ for layer in zoo.ZOO), "LSTM", "GRU", "wide"])
def test_other_cells_and_heads_are_right(cell, heads, hidden_size, dtype, precision, tf32):
    """Catches several states, parameters, eight gates or heads that a GPU has in another order than the interpreter."""
    tf32(precision)
    made = rnn_gpu.layer(wide_cells.wide(8)) if cell == "wide" else getattr(zoo, cell, None) or getattr(rnn_gpu, cell)
    ours = made(40, hidden_size, heads=heads, bidirectional=True).to("cuda", dtype)
    exact = copy.deepcopy(ours).cpu().double()
    x = torch.randn(20, 9, 40).to(dtype)
    expected, peer = outcome(exact, x, None, "torch"), outcome(ours, x.cuda(), None, "torch")
    found = outcome(ours, x.cuda(), None, "triton")
    rnn_gpu.check()
    for key, tensor in found.items():
        assert_close_to_oracle(tensor.cpu(), expected[key], peer[key].cpu(), f"{cell} {key}")


def stack_and_peers(cell, dtype, hidden_size, layers, **options):
    """A stack on the GPU, the same in float64 on the CPU, and torch.nn's on the GPU."""
    name, more = LAYERS[cell]
    ours = getattr(rnn_gpu, name)(40, hidden_size, num_layers=layers, **more, **options).to("cuda", dtype)
    if cell == "rnn_relu":
        away_from_the_kink(ours)
    return ours, copy.deepcopy(ours).cpu().double(), same(ours, dtype).cuda()


def forced_together(monkeypatch):
    """All layers of a stack in one launch, wherever there is such a plan, whatever the model says is faster."""

    def one_launch(call, hidden_size, like, rows, layers, dropout, frozen=0):
        return (layers,) if call.route == "direct" else (1,) * layers

    assert inspect.signature(one_launch).parameters.keys() == inspect.signature(wavefront.groups).parameters.keys()
    for module in ("functional", "stack_operators"):
        monkeypatch.setattr(f"rnn_gpu.{module}.groups", one_launch)


@every_cell
@every_kind
@pytest.mark.parametrize(("layers", "hidden_size", "batch"), [(2, 33, 5), (4, 128, 16), (8, 64, 9), (3, 256, 40)])
def test_layers_side_by_side_are_as_good_as_torch_nn(
    cell, dtype, precision, layers, hidden_size, batch, tf32, monkeypatch
):
    """Catches what the interpreter cannot show of a stack in one launch: two sources of a state on real memory, layers
    that run ahead of others, and results that differ from one run to the next.
    """
    forced_together(monkeypatch)
    tf32(precision)
    ours, exact, theirs = stack_and_peers(cell, dtype, hidden_size, layers)
    in_full = precision == "tf32" and cudnn_multiplies_in_full(ours)
    input, states = draw(ours, 30, batch)
    if cell == "rnn_relu":
        input, states = input.abs(), tuple(state.abs() for state in states)
    given = input.cuda().to(dtype), tuple(state.cuda().to(dtype) for state in states)
    found = outcome(ours, *given, "triton")
    rnn_gpu.check()
    peer = outcome(by_rounded_loops(theirs) if in_full else theirs, *given, "torch")
    expected = outcome(exact, given[0].cpu(), tuple(state.cpu() for state in given[1]), "torch")
    for key, tensor in found.items():
        assert_close_to_oracle(tensor.cpu(), expected[key], peer[key].cpu(), f"{cell} {key}")
    for number in range(5):
        assert_same_bits(outcome(ours, *given, "triton"), found, f"in run {number}")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("kind", ["lengths", "resets"])
def test_stacks_of_sequences_that_end_early_or_start_anew(cell, kind, monkeypatch):
    """Catches a layer side by side with others that waits for a row which has ended, or keeps a state over a reset."""
    forced_together(monkeypatch)
    ours, exact, theirs = stack_and_peers(cell, torch.bfloat16, 128, 3)
    theirs = copy.deepcopy(exact).to("cuda", torch.bfloat16)  # a layer of ours, since torch.nn's take no masks
    given = dict(lengths=torch.arange(9) * 3) if kind == "lengths" else dict(resets=torch.rand(30, 9) < 0.2)
    x = torch.randn(30, 9, 40)

    def results(layer, backend, like):
        input = x.to(like).requires_grad_()
        with rnn_gpu.backend(backend):
            output, final = layer(input, **{name: mask.to(like.device) for name, mask in given.items()})
        final = final if isinstance(final, tuple) else (final,)
        ones = [torch.ones_like(one) for one in (output, *final)]
        gradients = torch.autograd.grad((output, *final), (input, *layer.parameters()), ones)
        return [output, *final, *gradients]

    on_gpu = torch.zeros(0, device="cuda", dtype=torch.bfloat16)
    found = results(ours, "triton", on_gpu)
    rnn_gpu.check()
    expected = results(exact, "torch", torch.zeros(0, dtype=torch.float64))
    peer = results(theirs, "torch", on_gpu)
    for number, (a, e, p) in enumerate(zip(found, expected, peer, strict=True)):
        assert_close_to_oracle(a.detach().cpu(), e.detach(), p.detach().cpu(), f"{cell} result {number}")


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_dropout_between_layers_side_by_side_is_that_of_one_by_one(cell, graph, monkeypatch, tf32):
    """Catches masks that a GPU draws in another order than layer after layer would, in a graph, too."""
    ours, _, _ = stack_and_peers(cell, torch.float32, 100, 3, dropout=0.4)
    input, states = draw(ours, 30, 9)
    given = input.cuda(), tuple(state.cuda() for state in states)

    def results():
        torch.manual_seed(7)
        found = outcome(ours, *given, "triton")
        rnn_gpu.check()
        return found

    found = {}
    for precision in ("ieee", "tf32"):
        tf32(precision)
        with settings.layer_by_layer():
            found[precision] = results()
    tf32("ieee")
    forced_together(monkeypatch)
    if graph:
        ours.compile(fullgraph=True, backend="aot_eager")  # inductor draws otherwise
    for key, tensor in results().items():
        assert_close_to_oracle(
            tensor.cpu(), found["ieee"][key].double().cpu(), found["tf32"][key].cpu(), f"{cell} {key}"
        )


def test_a_layer_in_a_cuda_graph():
    """Catches a synchronisation, or an allocation outside the pool, in what a user captures."""
    layer = rnn_gpu.LSTM(64, 256).to("cuda", torch.bfloat16)
    x = torch.randn(20, 8, 64, device="cuda", dtype=torch.bfloat16)
    with rnn_gpu.backend("triton"), torch.no_grad():
        expected = [layer(x)[0].clone(), layer(2 * x)[0].clone()]
        static = x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = layer(static)
        for factor in (2, 1, 2):
            static.copy_(factor * x)
            graph.replay()
            assert torch.equal(bits(output), bits(expected[factor - 1]))
    rnn_gpu.check()


def test_auto_serves_cuda_tensors_and_says_what_it_chose():
    """Catches a default under which no kernel ever runs, and one that fails where no kernel fits."""
    for name, hidden_size, dtype in (
        ("LSTM", 1024, torch.bfloat16),
        ("GRU", 64, torch.float64),
        ("RNN", 256, torch.float16),
    ):
        layer = getattr(rnn_gpu, name)(32, hidden_size).to("cuda", dtype)
        x = torch.randn(5, 4, 32, device="cuda", dtype=dtype)
        output, _ = layer(x)
        assert output.shape == (5, 4, hidden_size) and output.isfinite().all()
        output.sum().backward()
    rnn_gpu.check()
