"""What of perf/ launches kernels, in Triton's interpreter."""

import pytest
import torch

from rnn_gpu.kernels.plan import DEVICES, plan

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", [pytest.param("lstm", marks=pytest.mark.slow), "gru"])
def test_the_judge_of_layers_side_by_side_knows_right_from_wrong(cell, backward, monkeypatch):
    """Catches: layers that are never timed, because what they have to give is computed otherwise; a judge without an
    eye for the layers' order.
    """
    from perf import tune

    monkeypatch.setattr(tune, "CHECKED_STEPS", 4)
    p = plan(cell, 24, 3, 1, "float32", DEVICES["h200"], backward, "ieee", layers=2)
    judge = tune.Judge(p, torch.device("cpu"))
    assert judge.ratio(p) <= 1
    weight_ih, weight_hh, *biases = judge.data.weights
    judge.data.weights = weight_ih, weight_hh[::-1], *biases
    assert judge.ratio(p) > 1


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_launch_after_a_variant_without_the_wait_is_as_ever(backward):
    """Catches: a variant that waits, and one whose words that nobody waited for the next launch takes for an error."""
    from perf import variants
    from perf.tune import Recurrence
    from rnn_gpu.kernels import launch

    p = plan("gru", 40, 2, 1, "float32", DEVICES["h200"], backward, "tf32", allow_alone=False)
    data = Recurrence.draw(p, 3, torch.device("cpu"))
    expected = data.run(p, fresh=True).clone()
    with variants.variant("wait", p):
        found = data.run(p, fresh=True)
        assert not torch.equal(found, expected), "it has waited, or need not: this shows nothing"
        assert launch.status_word(torch.device("cpu")).item() == 0
    torch.testing.assert_close(data.run(p, fresh=True), expected, rtol=0, atol=0, equal_nan=True)
