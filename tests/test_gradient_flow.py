"""rnn_gpu.gradient_flow: against autograd, step by step, on loops of torch.nn's own cells."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_gpu
from rnn_gpu.flow import GradientFlow, gradient_flow
from tests.tolerances import assert_same_mathematics

T, B, I, H = 5, 3, 2, 4


def by_cells(layer: torch.nn.RNNBase, input: Tensor, lengths: list[int], resets: Tensor, loss) -> Tensor:
    """The norms of each row [L, D, T, B], by torch.nn's cells, one row and step at a time. Without projection."""
    name = layer.mode.split("_")[0]
    steps: dict[tuple[int, int, int, int], Tensor] = {}
    directions, final = 2 if layer.bidirectional else 1, []
    for index in range(layer.num_layers):
        output = []
        for way in range(directions):
            more = {"nonlinearity": layer.nonlinearity} if name == "RNN" else {}
            cell = getattr(torch.nn, f"{name}Cell")(input.shape[-1], H, **more).double()
            suffix = f"l{index}{'_reverse' if way else ''}"
            cell.load_state_dict({key: getattr(layer, f"{key}_{suffix}") for key in cell.state_dict()})
            rows, last = [], []
            for b in range(B):
                state = torch.zeros(1, H, dtype=torch.float64)
                state = (state, state) if name == "LSTM" else state
                y = {t: torch.zeros(1, H, dtype=torch.float64) for t in range(T)}
                for t in range(lengths[b]) if way == 0 else reversed(range(lengths[b])):
                    if resets[t, b]:
                        state = tuple(torch.zeros_like(s) for s in state) if name == "LSTM" else torch.zeros_like(state)
                    state = cell(input[t, b : b + 1], state)
                    h = state[0] if name == "LSTM" else state
                    h.retain_grad()
                    steps[index, way, t, b] = y[t] = h
                rows.append(torch.cat([y[t] for t in range(T)]))
                last.append(state[0] if name == "LSTM" else state)
            output.append(torch.stack(rows, 1))
            final.append(torch.cat(last))
        input = torch.cat(output, -1)
    loss(input, torch.stack(final)).backward()
    found = torch.zeros(layer.num_layers, directions, T, B, dtype=torch.float64)
    for place, h in steps.items():
        found[place] = 0 if h.grad is None else h.grad.norm()
    return found


def of_output(output: Tensor, h_n: Tensor) -> Tensor:
    return (output**2).sum() + h_n.sum()


@pytest.mark.parametrize("library", [torch.nn, rnn_gpu], ids=lambda library: library.__name__)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_norms_are_autograds_at_every_step(library, name):
    """Catches: a gradient without the output's part or the later steps', steps of a reverse direction in the wrong
    order, rows past their end, resets that let a gradient through, the loss by default.
    """
    layer = getattr(library, name)(I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    input = torch.randn(T, B, I, dtype=torch.float64)
    lengths, resets = [5, 0, 3], torch.rand(T, B) < 0.2
    h_of = lambda state: state[0] if name == "LSTM" else state
    loss = lambda output, state: of_output(output, h_of(state))
    flow = gradient_flow(layer, input, loss=loss, lengths=lengths, resets=resets)
    expected = by_cells(layer, input, lengths, resets, of_output)
    assert_same_mathematics(flow.rows, expected)
    assert_same_mathematics(flow.norms, expected.norm(dim=-1))
    flow = gradient_flow(layer, input, lengths=torch.tensor(lengths))
    never = torch.zeros(T, B, dtype=torch.bool)
    assert_same_mathematics(flow.rows, by_cells(layer, input, lengths, never, lambda _, h_n: h_n[-2:].sum()))
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_layouts_give_the_same_norms():
    """Catches: rows of packed input in their sorted order, batch_first, unbatched input, a state of the user's that is
    not used, frozen parameters, input made under inference_mode.
    """
    layer = rnn_gpu.GRU(I, H, dtype=torch.float64)
    input, h0 = torch.randn(T, B, I, dtype=torch.float64), torch.randn(1, B, H, dtype=torch.float64)
    lengths = [2, 5, 3]
    flow = gradient_flow(layer, input, h0, lengths=lengths)
    packed = pack_padded_sequence(input, torch.tensor(lengths), enforce_sorted=False)
    assert_same_mathematics(gradient_flow(layer, packed, h0).rows, flow.rows)
    one = gradient_flow(layer, input[:, 1], h0[:, 1], loss=lambda output, h_n: h_n.sum())
    assert_same_mathematics(one.rows, flow.rows[..., 1:2])
    layer.batch_first = True
    layer.requires_grad_(False)
    assert_same_mathematics(gradient_flow(layer, input.transpose(0, 1), h0, lengths=lengths).rows, flow.rows)
    with torch.inference_mode(), rnn_gpu.backend("torch"):
        assert_same_mathematics(gradient_flow(layer, input.transpose(0, 1), h0, lengths=lengths).rows, flow.rows)
        again = pack_padded_sequence(input.clone(), torch.tensor(lengths), enforce_sorted=False)
    assert_same_mathematics(gradient_flow(layer, again, h0).rows, flow.rows)


def test_a_loss_is_given_output_and_states_whatever_the_layer_gives():
    """Catches: a loss that is called with the cells of every step, too; one that is no function."""
    with pytest.raises(TypeError, match="loss should be a function of output and final states, got: int"):
        gradient_flow(rnn_gpu.GRU(3, 4), torch.randn(4, 2, 3), loss=3)
    layer, input = rnn_gpu.LSTM(I, H, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    loss = lambda output, state: of_output(output, state[1])
    expected = gradient_flow(layer, input, loss=loss)
    layer.return_cells = True
    assert_same_mathematics(gradient_flow(layer, input, loss=loss).rows, expected.rows)


def test_projected_states():
    """Catches: the gradient by what is projected instead of by h."""
    layer = torch.nn.LSTM(I, H, proj_size=3, dtype=torch.float64)
    input = torch.randn(T, B, I, dtype=torch.float64)
    flow = gradient_flow(layer, input, loss=lambda output, _: (output**2).sum())
    h, c = torch.zeros(B, 3, dtype=torch.float64), torch.zeros(B, H, dtype=torch.float64)
    states = []
    for x in input:
        sums = x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0
        i, f, g, o = sums.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()) @ layer.weight_hr_l0.T
        states.append(h)
    gradients = torch.autograd.grad(sum((h**2).sum() for h in states), states)
    assert_same_mathematics(flow.rows[0, 0], torch.stack(gradients).norm(dim=-1))


def test_parametrized_weights_and_16_bits():
    """Catches: weights that a class made by parametrize has as properties; norms in 16 bits."""
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.GRU(I, H, dtype=torch.bfloat16), "weight_hh_l0")
    flow = gradient_flow(layer, torch.randn(T, B, I, dtype=torch.bfloat16))
    assert flow.norms.dtype == torch.float32 and flow.norms.shape == (1, 1, T) and bool((flow.norms > 0).all())


def test_plot(tmp_path):
    """Catches: lines that are missing, or on a linear axis."""
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: it comes with the extra `perf`")
    matplotlib.use("Agg")
    layer = rnn_gpu.RNN(I, H, num_layers=2, bidirectional=True)
    flow = gradient_flow(layer, torch.randn(T, B, I))
    axes = flow.plot()
    assert len(axes.lines) == 4 and axes.get_yscale() == "log" and axes.get_legend() is not None
    assert axes.lines[3].get_ydata().tolist() == pytest.approx(flow.norms[1, 1].tolist())
    assert flow.plot(axes) is axes and len(axes.lines) == 8
    axes.figure.savefig(tmp_path / "flow.png")
    assert GradientFlow(torch.ones(1, 1, 3), torch.ones(1, 1, 3, 1)).plot().get_legend() is None
    matplotlib.pyplot.close("all")


def test_errors_say_what_is_wrong():
    """Catches: an error from deep inside."""
    layer, input = torch.nn.RNN(I, H), torch.randn(T, B, I)
    for bad in (torch.nn.Linear(I, H), torch.nn.RNNCell(I, H)):
        expected = f"gradient_flow expects an LSTM, GRU or RNN layer, got: {type(bad).__name__}"
        with pytest.raises(TypeError, match=expected):
            gradient_flow(bad, input)
    with pytest.raises(RuntimeError, match=r"Expected loss to give one number, got \[5, 3, 4\]"):
        gradient_flow(layer, input, loss=lambda output, _: output)
    with pytest.raises(RuntimeError, match="Expected a loss that depends on what the layer returned"):
        gradient_flow(layer, input, loss=lambda output, _: torch.zeros(()))
    with pytest.raises(RuntimeError, match="Expected lengths size"):
        gradient_flow(layer, input, lengths=[1])
