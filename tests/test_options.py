"""What the layers can do beyond torch.nn's: dropout of recurrent weights and states, zoneout, clipped gradients, the
cells of every step; on torch, and on the kernels.
"""

import contextlib
import copy
import functools
import io
import pickle

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_gpu
from rnn_gpu import aten, settings, zoo
from rnn_gpu.backends import CELL_OF_MODE
from rnn_gpu.kernels.spec import CELLS
from rnn_gpu.rows import Rows
from tests.layers import BACKEND, ON_BOTH_BACKENDS, block_diagonal, exchanging_in_full, pair
from tests.tolerances import assert_close_to_oracle

pytestmark = ON_BOTH_BACKENDS

STACK = {"bidirectional": True, "num_layers": 2}
NAMES = "LSTM", "GRU", "RNN"


@pytest.fixture(autouse=True)
def one_backend():
    """See `exchanging_in_full`."""
    with exchanging_in_full():
        yield


def with_gradients(run, weights, input) -> dict[str, torch.Tensor]:
    """The results of run(input), and the gradients of a fixed loss by its input and by the weights, by name."""
    input = input.detach().requires_grad_()
    output, states = run(input)
    results = [output, *(states if isinstance(states, tuple) else (states,))]
    generator = torch.Generator().manual_seed(5)
    gradients = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    found = torch.autograd.grad(results, [input, *weights.values()], gradients)
    results = {f"result {i}": result.detach() for i, result in enumerate(results)}
    return results | {f"gradient of {k}": d for k, d in zip(("input", *weights), found, strict=True)}


@contextlib.contextmanager
def masks_of_a_forward():
    """A list that gets the `Rows` of each layer of a forward, with the masks that were drawn for it."""
    found, draw = [], rnn_gpu.functional.drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rnn_gpu.functional, "drawn", lambda *given: found.append(draw(*given)) or found[-1])
        yield found


def by_hand(layer, weights, input, states=None, lengths=None, resets=None, drawn=()):
    """What a layer gives, one row and one step at a time, with its options: output [T, B, D*H], the states as a tuple,
    and what a cell carries after every step, of the last layer. weights: by name. drawn: of `masks_of_a_forward`. In
    the dtype of the weights.
    """
    rates = (layer.zoneout if isinstance(layer.zoneout, tuple) else (layer.zoneout,) * 2) if not layer.training else ()

    def kept(i, mask, new, old, place):
        """i: 0 for c, 1 for h."""
        if mask is not None:
            return torch.where(mask[place].bool(), old, new)
        return rates[i] * old + (1 - rates[i]) * new if rates else new

    cell, (time, batch, _), size = CELL_OF_MODE[layer.mode], input.shape, layer.hidden_size
    wide, finals = layer.proj_size or size, []
    for number in range(layer.num_layers):
        ways = [f"l{number}", f"l{number}_reverse"][: 2 if layer.bidirectional else 1]
        y, cells = ([[None] * batch for _ in ways] for _ in range(2))
        for n, way in enumerate(ways):
            w_ih, w_hh, b_ih, b_hh = (
                weights[f"{key}_{way}"] for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            w_hh = w_hh if layer.heads == 1 else block_diagonal(w_hh, layer.heads)
            for b in range(batch):
                start = [s[len(finals) // batch, b] for s in states] if states else [input.new_zeros(wide)]
                h, c = start[0], start[1] if len(start) == 2 else input.new_zeros(size) if cell == "lstm" else start[0]
                steps, length = {}, time if lengths is None else lengths[b]
                for t in reversed(range(length)) if n else range(length):
                    if resets is not None and resets[t, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    before, masks = (h, c), drawn[number] if drawn else Rows(time, batch)
                    dropped = 1 if masks.dropped is None else masks.dropped[n, b].to(h.dtype)
                    h_part = w_hh @ (dropped * h) + (b_hh if cell == "gru" else 0)
                    x_part = w_ih @ input[t, b] + b_ih + (0 if cell == "gru" else b_hh)
                    gates = x_part.view(-1, size).unbind(), h_part.view(-1, size).unbind()
                    h, carry = CELLS[cell].step(*gates, (c,) if CELLS[cell].carried else ())
                    c = carry[0] if carry else h
                    place = (t * batch if masks.offsets is None else int(masks.offsets[t])) + b, n
                    h = kept(1, masks.kept_h, h, before[0], place)
                    c = kept(0, masks.kept_c, c, before[1], place) if cell == "lstm" else h
                    if layer.clip is not None and h.requires_grad:
                        h.register_hook(lambda d: d.clamp(-layer.clip, layer.clip))
                    h = weights[f"weight_hr_{way}"] @ h if layer.proj_size else h
                    steps[t] = h, c
                none = input.new_zeros(wide), input.new_zeros(size)
                y[n][b], cells[n][b] = (torch.stack([steps.get(t, none)[i] for t in range(time)]) for i in (0, 1))
                finals.append((h, c))
        input, cells = (torch.cat([torch.stack(rows, 1) for rows in found], 2) for found in (y, cells))
    finals = [torch.stack(part).unflatten(0, (-1, batch)) for part in zip(*finals, strict=True)]
    return input, tuple(finals) if cell == "lstm" else finals[0], cells


MASKS = {
    "dense": {},
    "lengths": {"lengths": [4, 0, 2]},
    "resets": {"resets": [[False, True, False], [False, False, True], [True, False, False], [False, False, False]]},
}


def assert_as_by_hand(layer, masks: str = "dense", run=None, seed: int = 1) -> None:
    """The layer's results and gradients, T 4 and B 3, in float32, against the loops of this file in float64; their peer
    is the same loop in float32.
    """
    masks, generator = dict(MASKS[masks]), torch.Generator().manual_seed(seed)
    if "resets" in masks:
        masks["resets"] = torch.tensor(masks["resets"])
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
    given = [draw(4, 3, layer.input_size), *(draw(count, 3, size) for size in sizes)]
    given += [parameter.detach() for parameter in layer.parameters()]
    names = ["input", "h_0", "c_0"][: 1 + len(sizes)] + list(dict(layer.named_parameters()))

    def outcome(run, dtype):
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in zip(names, given, strict=True)}
        states = tuple(leaves[name] for name in ("h_0", "c_0") if name in leaves)
        output, final, *cells = run(leaves, leaves["input"], states)
        results = [output, *(final if isinstance(final, tuple) else (final,)), *cells]
        again = torch.Generator().manual_seed(seed + 1)
        weighted = [(r * torch.randn(r.shape, generator=again, dtype=torch.float64).to(dtype)).sum() for r in results]
        found = torch.autograd.grad(sum(weighted), list(leaves.values()))
        results = {f"result {i}": result.detach() for i, result in enumerate(results)}
        return results | {f"gradient of {name}": d for name, d in zip(names, found, strict=True)}

    def ours(leaves, input, states):
        weights = {name: leaves[name] for name, _ in layer.named_parameters()}
        hx = states if len(states) == 2 else states[0]
        return functional_call(layer, weights, (input, hx), masks)

    def loop(leaves, input, states):
        results = by_hand(layer, leaves, input, states, **masks, drawn=drawn)
        return results if layer.return_cells else results[:2]

    with masks_of_a_forward() as drawn:
        actual = outcome(run or ours, torch.float32)
    expected, peer = outcome(loop, torch.float64), outcome(loop, torch.float32)
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert_close_to_oracle(value, expected[key], peer[key], key)


# ---- weight_dropout --------------------------------------------------------------------------------------------------


def dropped(layer, seed: int, p: float) -> dict[str, torch.Tensor]:
    """The masks that a forward after torch.manual_seed(seed) draws, times 1/(1-p)."""
    torch.manual_seed(seed)
    ones = [(name, torch.ones_like(w)) for name, w in layer.named_parameters() if "weight_hh" in name]
    return {name: dropout(one, p) for name, one in ones}


@pytest.mark.parametrize(
    "name, kwargs", [("LSTM", {"proj_size": 3}), ("LSTM", STACK), ("GRU", STACK), ("RNN", {})], ids=str
)
def test_weight_dropout_is_dropout_of_recurrent_weights(name, kwargs):
    """Catches: other weights dropped, a mask without its scale, one that the gradient does not pass, one in eval."""
    layer, oracle = pair(name, 3, 12, **kwargs, seed=1)
    layer.weight_dropout = 0.4
    _, peer = pair(name, 3, 12, **kwargs, seed=1)
    peer = peer.float()
    input, masks = torch.randn(4, 3, 3), dropped(layer, 7, 0.4)
    torch.manual_seed(7)
    actual = with_gradients(layer, dict(layer.named_parameters()), input)

    def by_hand(other, dtype):
        parameters = dict(other.named_parameters())
        weights = {k: w * masks[k].to(dtype) if k in masks else w for k, w in parameters.items()}
        return with_gradients(lambda x: functional_call(other, weights, (x,)), parameters, input.to(dtype))

    expected, floats = by_hand(oracle, torch.float64), by_hand(peer, torch.float32)
    for key, value in actual.items():
        assert_close_to_oracle(value, expected[key], floats[key], key)
    layer.eval()
    torch.testing.assert_close(layer(input)[0], functional_call(peer, {}, (input,))[0])


@pytest.mark.parametrize("name", NAMES)
def test_weight_dropout_with_masks_packed_and_compiled(name):
    """Catches: a route on which the weights stay whole, or that breaks the graph; another mask in the backward."""
    layer, other = getattr(rnn_gpu, name)(3, 12, weight_dropout=0.5), getattr(rnn_gpu, name)(3, 12)
    other.load_state_dict(layer.state_dict())
    masks = dropped(layer, 3, 0.5)
    weights = {k: w * masks[k] if k in masks else w for k, w in other.named_parameters()}
    whole = functional_call(other, weights, (input := torch.randn(4, 3, 3),))[0]
    lengths = torch.tensor([4, 2, 1])
    valid = (torch.arange(4).unsqueeze(1) < lengths).unsqueeze(2)
    packed = pack_padded_sequence(input, lengths)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    runs = (
        (lambda: layer(input)[0], whole),
        (lambda: layer(input, lengths=lengths)[0], whole * valid),
        (lambda: layer(packed)[0].data, pack_padded_sequence(whole, lengths).data),
        (lambda: compiled(input)[0], whole),
    )
    for run, expected in runs:
        torch.manual_seed(3)
        actual = run()
        torch.testing.assert_close(actual, expected)
        of_weight = torch.autograd.grad(actual.sum(), layer.weight_hh_l0)[0]
        assert bool((of_weight[masks["weight_hh_l0"] == 0] == 0).all()) and bool(of_weight.any())


def test_weight_dropout_draws_from_its_distribution():
    """Catches: a rate that is not p, the same mask in every forward, rates 0 and 1."""
    layer = rnn_gpu.LSTM(2, 64, weight_dropout=0.3)
    first, second = (layer._dropped(layer._weights())[1] for _ in range(2))
    kept = first != 0
    assert abs(kept.float().mean() - 0.7) < 6 * (0.3 * 0.7 / kept.numel()) ** 0.5
    torch.testing.assert_close(first[kept], layer.weight_hh_l0.detach()[kept] / 0.7)
    assert not torch.equal(kept, second != 0)
    layer.weight_dropout = 1.0
    _, weight_hh, *_ = layer._dropped(layer._weights())
    assert not weight_hh.any()


# ---- return_cells and clip -------------------------------------------------------------------------------------------


def each(cases: list[tuple], *shown: tuple):
    """Parameters: each case with each of MASKS, but those not `shown` (numbers of cases, names of masks) are slow."""
    found = [
        pytest.param(*case, masks, marks=[] if (number, masks) in shown else pytest.mark.slow)
        for number, case in enumerate(cases)
        for masks in MASKS
    ]
    return pytest.mark.parametrize("name, kwargs, masks", found)


@each(
    [("LSTM", kwargs) for kwargs in ({}, STACK, {"proj_size": 5}, {"memory": "lean"}, {"clip": 0.3})],
    (0, "resets"), (1, "lengths"), (2, "dense"), (3, "lengths"), (4, "dense"),
)  # fmt: skip
def test_cells_of_every_step(name, kwargs, masks):
    """Catches: cells of another layer or direction, of steps past a row's end; a gradient that is not theirs, or that
    is added to other steps or rows.
    """
    assert_as_by_hand(rnn_gpu.LSTM(3, 12, return_cells=True, **kwargs), masks)


@each(
    [("LSTM", STACK), ("LSTM", {"proj_size": 5}), ("GRU", STACK), ("RNN", {})],
    (0, "dense"), (1, "lengths"), (2, "resets"), (3, "lengths"),
)  # fmt: skip
def test_clip_of_the_gradient_of_h_at_every_step(name, kwargs, masks):
    """Catches: a part of the gradient that is added after it was clipped (the output's, the final state's, the GRU's
    direct path), a limit on the cell's gradient.
    """
    torch.manual_seed(3)
    layer = getattr(rnn_gpu, name)(3, 12, clip=0.4, **kwargs)
    assert_as_by_hand(layer, masks)


def test_clip_leaves_nothing_beyond():
    """Catches: a limit that is not the one given, whatever the loss; a NaN that is lost."""
    for name in NAMES:
        layer = getattr(rnn_gpu, name)(3, 12, clip=1e-3)
        flow = rnn_gpu.gradient_flow(layer, torch.randn(6, 2, 3), loss=lambda output, _: 100 * output.sum())
        assert flow.rows.max() > 1  # before it is clipped
        (d_bias,) = torch.autograd.grad(1e3 * layer(torch.randn(6, 2, 3))[0].sum(), layer.bias_ih_l0)
        assert d_bias.abs().max() <= 6 * 2 * 1e-3 * 6 and bool(d_bias.any())  # an LSTM adds up c's gradient over steps
        (nan,) = torch.autograd.grad(layer(torch.randn(6, 2, 3))[0].sum() * torch.nan, layer.bias_ih_l0)
        assert bool(nan.isnan().all())


@pytest.mark.parametrize("name", NAMES)
def test_options_compiled_exported_mapped_and_differentiated_twice(name):
    """Catches: an option that another route forgets, or that breaks a graph."""
    options = {"clip": 0.2} | ({"return_cells": True} if name == "LSTM" else {})
    layer = getattr(rnn_gpu, name)(3, 12, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_as_by_hand(layer, run=lambda leaves, input, states: functional_call(
        compiled, {f"_orig_mod.{k}": w for k, w in leaves.items() if k in dict(layer.named_parameters())},
        (input, states if len(states) == 2 else states[0])))  # fmt: skip
    input = torch.randn(2, 4, 3, 3)
    program = torch.export.export(layer, (input[0],)).module()
    for ours, theirs in zip(program(input[0]), layer(input[0]), strict=True):
        torch.testing.assert_close(ours, theirs)
    parameters = dict(layer.named_parameters())

    def loss(weights, x):
        output, _, *cells = functional_call(layer, weights, (x,))
        return output.square().sum() + sum(c.square().sum() for c in cells)

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, input)
    for v in range(2):
        alone = torch.autograd.grad(loss(parameters, input[v]), list(parameters.values()), create_graph=True)
        for a, b in zip(mapped.values(), alone, strict=True):
            torch.testing.assert_close(a[v], b)
    with pytest.raises(RuntimeError, match="gradients of a layer with clip= are no function's gradients"):
        torch.autograd.grad(alone[0].sum(), layer.weight_hh_l0)


def test_cells_differentiated_twice():
    """Catches: cells left out of the second derivative."""
    layer, input = rnn_gpu.LSTM(3, 12, return_cells=True), torch.randn(4, 3, 3)

    def second(run, dtype):
        weights = {name: w.detach().to(dtype).requires_grad_() for name, w in layer.named_parameters()}
        _, _, cells = run(weights, input.to(dtype))
        first = torch.autograd.grad(cells.square().sum(), weights["weight_hh_l0"], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), weights["weight_hh_l0"])[0]

    loop = functools.partial(by_hand, layer)
    actual = second(lambda weights, x: functional_call(layer, weights, (x,)), torch.float32)
    assert_close_to_oracle(actual, second(loop, torch.float64), second(loop, torch.float32))


def test_cells_of_packed_and_unbatched_input_and_without_gradients():
    """Catches: cells in the padded layout, in the sorted order, with a dimension too many; none in inference."""
    layer, input = rnn_gpu.LSTM(3, 12, return_cells=True), torch.randn(4, 3, 3)
    lengths = torch.tensor([2, 4, 1])
    output, states, cells = layer(input, lengths=lengths)
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    with torch.no_grad():
        packed_output, packed_states, packed_cells = layer(packed)
    torch.testing.assert_close(pad_packed_sequence(packed_cells)[0], cells)
    torch.testing.assert_close(pad_packed_sequence(packed_output)[0], output)
    torch.testing.assert_close(packed_states, states)
    assert torch.equal(cells[lengths - 1, torch.arange(3)], states[1][0])
    with torch.inference_mode():
        one = layer(input[:, 1])
    assert one[2].shape == (4, 12)
    torch.testing.assert_close(one[2], cells[:, 1])
    layer.batch_first = True
    torch.testing.assert_close(layer(input.transpose(0, 1), lengths=lengths)[2], cells.transpose(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(input)[2].dtype == torch.bfloat16
    cells.zero_()  # memory of its own
    assert bool(torch.autograd.grad(output.sum(), layer.weight_hh_l0)[0].any())


def test_inference_takes_no_loop_for_clip_and_keeps_no_graph(monkeypatch):
    """Catches: compiled, mapped and exported forwards on PyTorch's kernels that a limit of gradients sends to the loop
    over time, or that make a graph for a backward because cells are asked for.
    """
    layer, input = rnn_gpu.LSTM(3, 12, clip=0.2), torch.randn(4, 3, 3)
    compiled = lambda: torch.compile(layer, fullgraph=True, backend="aot_eager")(input)
    with rnn_gpu.backend("torch"):
        expected = layer(input)
        monkeypatch.setattr(aten, "_with_autograd", lambda *given: pytest.fail("a graph"))
        with monkeypatch.context() as patch:
            patch.setattr(aten, "reference_layer", lambda *given: pytest.fail("the loop"))
            with torch.no_grad():
                torch.testing.assert_close(compiled(), expected)
            if aten.EXPORT_SHOWS:  # elsewhere an export looks like a graph that a backward may follow
                torch.testing.assert_close(torch.export.export(layer, (input,)).module()(input), expected)
            mapped = torch.func.vmap(lambda x: layer(x)[0])(input[None])
            torch.testing.assert_close(mapped[0], expected[0])
        layer.return_cells = True
        with torch.no_grad():
            torch.testing.assert_close(compiled()[:2], expected)


def test_wrong_clips_and_cells():
    """Catches: a limit that zeroes or turns the gradient; cells of a layer that has none."""
    for name in NAMES:
        for wrong in (0, -1.0, float("nan"), True, "1"):
            with pytest.raises(ValueError, match="clip should be a positive number, got: "):
                getattr(rnn_gpu, name)(3, 4, clip=wrong)
    for name in ("GRU", "RNN"):
        with pytest.raises(ValueError, match="return_cells argument is only supported for LSTM"):
            getattr(rnn_gpu, name)(3, 4, return_cells=True)


# ---- recurrent_dropout and zoneout -----------------------------------------------------------------------------------

BOTH = {"recurrent_dropout": 0.4, "zoneout": 0.3}


@each(
    [
        ("LSTM", BOTH | STACK),
        ("LSTM", {"zoneout": (0.5, 0.2), "memory": "lean", "return_cells": True}),
        ("GRU", BOTH | {"memory": "lean", "clip": 0.3}),
        ("RNN", BOTH | {"bidirectional": True}),
        ("LSTM", {"recurrent_dropout": 0.4}),
        ("GRU", {"zoneout": 0.3}),
    ],
    (0, "dense"), (1, "resets"), (2, "lengths"), (3, "lengths"),
)  # fmt: skip
def test_recurrent_dropout_and_zoneout(name, kwargs, masks):
    """Catches: another mask in the backward or at a later step, a state that is kept and not its gradient, c kept
    before tanh instead of after, the mask on the GRU's direct path, masks of another row, layer or direction.
    """
    assert_as_by_hand(getattr(rnn_gpu, name)(3, 12, **kwargs), masks)


@pytest.mark.parametrize("name, zoneout", [("LSTM", (0.5, 0.2)), ("GRU", 0.3), ("RNN", 0.3)])
def test_zoneout_in_eval_is_its_expectation(name, zoneout):
    """Catches: a mask drawn in eval, a part of the state without its gradient; dropout in eval."""
    layer = getattr(rnn_gpu, name)(3, 12, zoneout=zoneout, recurrent_dropout=0.5, weight_dropout=0.5).eval()
    assert_as_by_hand(layer, "lengths")
    layer.zoneout = 0.0
    plain = getattr(torch.nn, name)(3, 12)
    plain.load_state_dict(layer.state_dict())
    input = torch.randn(4, 3, 3)
    torch.testing.assert_close(layer(input), plain(input))


def test_masks_of_programs_that_hold_all_units(monkeypatch):
    """Catches: masks that only programs which exchange their state know."""
    monkeypatch.setattr(settings, "_allow_alone", True)
    for name in NAMES:
        assert_as_by_hand(getattr(rnn_gpu, name)(3, 12, **BOTH), "lengths")


@pytest.mark.parametrize("cls, memory", [(zoo.PeepholeLSTM, "lean"), (zoo.SLSTM, "full"), (zoo.MGU, "lean")])
def test_masks_of_other_cells(cls, memory):
    """Catches: a state of several, or a parameter's gradient, that knows no mask; gates made again without it."""
    layer, input = cls(3, 12, memory=memory, clip=0.3, **BOTH), torch.randn(4, 3, 3)
    found = []
    for backend in ("torch", BACKEND):
        torch.manual_seed(4)
        with rnn_gpu.backend(backend):
            output, states = layer(input, lengths=[4, 0, 2])
        states = states if isinstance(states, tuple) else (states,)
        loss = output.square().sum() + sum(state.sum() for state in states)
        found.append([output, *states, *torch.autograd.grad(loss, list(layer.parameters()))])
    torch.testing.assert_close(*found)


def test_masks_of_packed_input_lie_as_it_does():
    """Catches: masks read as if packed rows were padded."""
    layer, input, lengths = rnn_gpu.LSTM(3, 12, **BOTH), torch.randn(4, 3, 3), [4, 2, 1]
    with masks_of_a_forward() as drawn:
        output, states = layer(pack_padded_sequence(input, torch.tensor(lengths)))
    assert drawn[0].kept_h.shape == (7, 1, 12) and drawn[0].dropped.shape == (1, 3, 12)
    weights = dict(layer.named_parameters())
    expected, finals, _ = by_hand(layer, weights, input, lengths=lengths, drawn=drawn)
    torch.testing.assert_close(pad_packed_sequence(output)[0], expected)
    torch.testing.assert_close(states, finals)
    found, wanted = (torch.autograd.grad(y.sum(), list(weights.values())) for y in (output.data, expected))
    torch.testing.assert_close(found, wanted)


def test_masks_are_drawn_from_their_distributions():
    """Catches: rates that are not those asked for, c's and h's exchanged, a scale left out, the same mask again,
    numbers that do not come from torch's generator.
    """
    layer, input = rnn_gpu.LSTM(2, 32, recurrent_dropout=0.3, zoneout=(0.5, 0.1)), torch.randn(6, 20, 2)

    def draw(seed):
        torch.manual_seed(seed)
        with masks_of_a_forward() as drawn, torch.no_grad(), rnn_gpu.backend("torch"):
            layer(input)
        return drawn[0]

    first, again, other = draw(1), draw(1), draw(2)
    for name, p in (("dropped", 0.7), ("kept_h", 0.1), ("kept_c", 0.5)):
        mask = getattr(first, name)
        assert torch.equal(mask, getattr(again, name)) and not torch.equal(mask, getattr(other, name))
        assert abs((mask != 0).double().mean() - p) < 6 * (p * (1 - p) / mask.numel()) ** 0.5
    assert set(first.dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert first.kept_h.dtype == torch.int8
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(draw(1).kept_h, first.kept_h)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_that_is_kept_does_not_see_what_is_not(name):
    """Catches: a mask that is multiplied with, which makes NaN of the other value's NaN or infinity."""
    layer, input = getattr(rnn_gpu, name)(3, 32, zoneout=0.5), torch.randn(3, 2, 3)
    input[2, 0] = torch.nan
    with masks_of_a_forward() as drawn:
        output = layer(input.requires_grad_())[0]
    kept = drawn[0].kept_h.view(3, 2, 32).bool()
    assert torch.equal(output[2].isnan(), ~kept[2] & torch.tensor([[True], [False]]))
    assert torch.equal(output[2][kept[2]], output[1][kept[2]])
    (gradient,) = torch.autograd.grad(output, input, torch.where(kept[1, :, :1], torch.inf, 1.0).expand(output.shape))
    with rnn_gpu.backend("torch"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rnn_gpu.functional, "drawn", lambda *_: drawn[0])
        output = layer(input)[0]
        expected = torch.autograd.grad(output, input, torch.where(kept[1, :, :1], torch.inf, 1.0).expand(output.shape))
    assert torch.equal(gradient.isnan(), expected[0].isnan())


@pytest.mark.parametrize("name", NAMES)
def test_masks_compiled_and_mapped(name):
    """Catches: a route that forgets a mask, a graph that breaks, members of a batch that share what they should not."""
    layer, input = getattr(rnn_gpu, name)(3, 12, **BOTH), torch.randn(2, 4, 3, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    weights = dict(layer.named_parameters())
    found = []
    for run in (layer, compiled):
        torch.manual_seed(3)
        output = run(input[0])[0]
        found.append((output, *torch.autograd.grad(output.square().sum(), list(weights.values()))))
    torch.testing.assert_close(*found)
    loss = lambda weights, x: functional_call(layer, weights, (x,))[0].square().sum()
    torch.manual_seed(3)
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")(weights, input)
    torch.testing.assert_close([mapped[name][0] for name in weights], list(found[0][1:]))
    torch.manual_seed(3)
    different = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(
        weights, input[:1].expand(2, -1, -1, -1)
    )
    assert not torch.equal(*different["weight_hh_l0"])


def test_wrong_rates():
    """Catches: a pair for cells without c, rates that are none, options that a projection would change."""
    for name in NAMES:
        for wrong in (-0.1, 1.5, True, "0.5"):
            for option in ("recurrent_dropout", "zoneout"):
                with pytest.raises(ValueError, match=rf"{option} should be a number in range \[0, 1\] representing"):
                    getattr(rnn_gpu, name)(3, 4, **{option: wrong})
    for name, wrong in (("GRU", (0.1, 0.1)), ("RNN", (0.1, 0.1)), ("LSTM", (0.1, 0.1, 0.1))):
        with pytest.raises(
            ValueError, match="zoneout should be a number, or for the LSTM a pair of them, of c and of h"
        ):
            getattr(rnn_gpu, name)(3, 4, zoneout=wrong)
    for option in BOTH:
        with pytest.raises(ValueError, match="recurrent_dropout and zoneout are not supported with proj_size"):
            rnn_gpu.LSTM(3, 4, proj_size=2, **{option: 0.1})


# ---- All options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_options_are_kept_and_shown(name):
    """Catches: an option lost by pickle or deepcopy, shown where it was not given, or in the state dict."""
    options = {"weight_dropout": 0.25, "recurrent_dropout": 0.5, "zoneout": 0.1, "clip": 2.0} | (
        {"return_cells": True} if name == "LSTM" else {}
    )
    layer, plain = getattr(rnn_gpu, name)(3, 4, **options), getattr(rnn_gpu, name)(3, 4)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=True)
    for one in (layer, *copies):
        assert all(getattr(one, option) == value for option, value in options.items())
        assert all(f"{option}={value}" in repr(one) for option, value in options.items())
    assert not any(option in repr(plain) for option in options)
    assert layer.state_dict().keys() == getattr(torch.nn, name)(3, 4).state_dict().keys()


def test_layers_with_options_are_not_restored():
    """Catches: a layer of torch.nn's that computes something else than the layer it was."""
    model = torch.nn.ModuleDict({"plain": rnn_gpu.GRU(3, 4), "dropped": rnn_gpu.GRU(3, 4, weight_dropout=0.5)})
    with pytest.warns(UserWarning, match=r"whose options torch.nn does not know: dropped \(weight_dropout=0.5\)"):
        rnn_gpu.restore_rnns(model)
    assert type(model["plain"]) is torch.nn.GRU and type(model["dropped"]) is rnn_gpu.GRU
    assert rnn_gpu.replace_rnns(model)["plain"].weight_dropout == 0


def test_options_are_checked_when_they_are_changed():
    """Catches: a setting that is none, found deep inside a call, or never; one that is kept though it was refused."""
    for name in NAMES:
        layer = getattr(rnn_gpu, name)(3, 4)
        wrong = {"memory": "none", "weight_dropout": 2, "recurrent_dropout": -1, "zoneout": (0.1,), "clip": -1}
        for option, value in (wrong if name == "LSTM" else wrong | {"return_cells": True}).items():
            with pytest.raises(ValueError, match=option):
                setattr(layer, option, value)
        assert not layer.option_text() and layer.memory is None
        layer.clip, layer.memory = 1, "lean"
        assert (layer.clip, layer.memory) == (1.0, "lean")
    with pytest.raises(ValueError, match="not supported with proj_size"):
        rnn_gpu.LSTM(3, 4, proj_size=2).zoneout = 0.1


@pytest.mark.parametrize("wrong", [-0.1, 1.5, True, "0.5", None])
def test_wrong_probabilities(wrong):
    """Catches: a value that is no probability, found only in the first forward, or never."""
    for name in NAMES:
        with pytest.raises(ValueError, match=r"weight_dropout should be a number in range \[0, 1\] representing"):
            getattr(rnn_gpu, name)(3, 4, weight_dropout=wrong)
