"""The examples run, and what they compute beside the layers is right."""

import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rnn_gpu

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
HELPERS = {"common", "distributed_training"}  # what others import; what tests/test_distributed.py runs
sys.path.insert(0, str(ROOT / "examples"))


def needs(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: it comes with the extra `examples`")


@pytest.mark.compiled  # with TRITON_INTERPRET=1 the kernels take CPU tensors
@pytest.mark.parametrize("name", [*(name for name in EXAMPLES if name not in HELPERS), "long_memory of a copy"])
def test_an_example_runs(name, tmp_path):
    """Catches: an example that fails, needs what the extra `examples` does not bring, or leaves no picture."""
    name, *copying = name.split(" of a ")
    for package in ("tqdm", "matplotlib", "num2words", "espeakng_loader"):
        needs(package)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(ROOT / "build")}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--device", "cpu"]
    command += ["--problem", *copying, "--clip", "1"] if copying else []
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0 and "could not fetch" in done.stderr:
        pytest.skip(f"no package index in reach: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not judged" in done.stdout
    assert (f"picture: {name}.png" in done.stdout) == (tmp_path / f"{name}.png").exists()


def test_a_missing_package_is_named(monkeypatch):
    """Catches: a traceback where a line would do."""
    import common

    with pytest.raises(SystemExit, match=r'pip install "rnn-gpu\[examples\]"'):
        common.need("a_package_that_is_not_there")


def test_an_example_that_falls_short_says_so(capsys):
    """Catches: a verdict that nobody hears of."""
    import common

    options = common.parser("An example.", seconds=1).parse_args([])
    assert common.verdict(options, one=("1 of 1", True)) == 0
    assert common.verdict(options, one=("1 of 1", True), other=("0 of 1", False)) == 1
    assert "FAILED: other: 0 of 1" in capsys.readouterr().out
    assert common.verdict(options, one=("not promised", None)) == 0
    assert "not judged: one" in capsys.readouterr().out


def test_what_would_stop_an_example_at_its_end_stops_it_at_once(monkeypatch, capsys, tmp_path):
    """Catches: training for nothing, and tracebacks where a line would do."""
    needs("matplotlib")
    import common

    for wrong in (
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--device", "gpu"],
        ["--picture", str(tmp_path / "none" / "a.png")],
        ["--picture", "a.odd"],
        ["--backend", "triton", "--device", "cpu"],
    ):
        monkeypatch.setattr(sys, "argv", ["example.py", *wrong])
        with pytest.raises(SystemExit) as stopped:
            common.read_options(common.parser("An example.", seconds=1))
        assert stopped.value.code == 2 and f"argument {wrong[0]}: " in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["example.py"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r'matplotlib.*pip install "rnn-gpu\[examples\]"'):
        common.read_options(common.parser("An example.", seconds=1))


def test_an_example_that_learnt_nothing_ends_with_status_1(monkeypatch, capsys, tmp_path):
    """Catches: a script that trains, misses what it promised, and ends as if it had not."""
    needs("matplotlib")
    import reinforcement_learning

    options = [
        "--seconds",
        "0.01",
        "--device",
        "cpu",
        "--mazes",
        "4",
        "--steps",
        "4",
        "--hidden-size",
        "4",
        "--picture",
    ]
    monkeypatch.setattr(sys, "argv", ["reinforcement_learning.py", *options, str(tmp_path / "a.png")])
    with rnn_gpu.backend("torch"):  # which the script changes
        assert reinforcement_learning.main() == 1
    assert "FAILED: memory" in capsys.readouterr().out and (tmp_path / "a.png").exists()


def test_mazes_that_do_not_end_are_wrong():
    """Catches: a rate over those episodes alone that ended; later episodes of a maze that count as its first."""
    from reinforcement_learning import FORWARD, LEFT, Agent, success

    options, agent = SimpleNamespace(device=torch.device("cpu")), Agent(4)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.zero_()
        agent.policy.bias[FORWARD] = 1.0
        assert success(agent, options) == 0.0
        agent.policy.bias[LEFT] = 2.0  # into walls, for ever
        assert success(agent, options) == 0.0


def test_the_trigram_model_is_a_distribution():
    """Catches: a baseline whose probabilities do not add up to 1, so that it would be too easy or too hard to beat."""
    from common import KneserNey

    generator = random.Random(0)
    text = [generator.randrange(10) ** 2 // 9 for _ in range(300)]
    model = KneserNey(text, words=12)
    for context in ((1, 2), (0, 0), (7, 7), (11, 11), (0, 11)):
        assert math.isclose(sum(model.probability((*context, word)) for word in range(12)), 1.0, rel_tol=1e-9)


def test_beam_search_finds_the_likeliest(monkeypatch):
    """Catches: states or beginnings that are mixed up. A beam that holds all beginnings against trying every string."""
    import translation

    monkeypatch.setattr(translation, "LONGEST", 3)
    torch.manual_seed(1)
    model = translation.Translator(words=6, pieces=5, hidden_size=8).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # so that the letters before make a difference
    source, lengths = torch.randint(6, (4, 3)), torch.tensor([4, 2, 3])
    memory, valid = model.encode(source, lengths)

    def likelihood(row: int, pieces: tuple[int, ...]) -> float:
        """Log-probability of these pieces, by the call that training makes: START, pieces -> pieces."""
        given = torch.tensor([[translation.START, *pieces[:-1]]]).t()
        logits, _, _ = model.decode(given, memory[:, row : row + 1], valid[:, row : row + 1])
        return logits[:, 0].log_softmax(1).gather(1, torch.tensor(pieces).unsqueeze(1)).sum().item()

    found = translation.search(model, source, lengths, beam=125)
    for row, answer in enumerate(found):
        strings = [s for n in (1, 2, 3) for s in itertools.product(range(5), repeat=n)]
        ended = [s for s in strings if 2 not in s[:-1] and (s[-1] == 2 or len(s) == 3)]
        best = max(ended, key=lambda pieces: likelihood(row, pieces))
        assert answer == [n for n in best if n != translation.END]


def test_pieces_make_the_text_again():
    """Catches: pieces that lose a letter, or that are no shorter than letters."""
    from translation import Pieces

    texts = [f"{a} {b}" for a in ("vier", "vierzig", "vierhundert") for b in ("zwei", "zweihundert")]
    pieces = Pieces(texts, count=12)
    assert len(pieces.names) <= 3 + len(set("".join(texts))) + 12
    for text in texts:
        assert pieces.text(pieces.encode(text)) == text and len(pieces.encode(text)) < len(text) / 2


def test_advantages_are_sums_of_what_was_better_than_expected():
    """Catches: rewards carried over the end of an episode. Against the definition, term by term, in float64."""
    from reinforcement_learning import DISCOUNT, TRACE, Rollout, advantages

    torch.manual_seed(0)
    values, rewards = torch.randn(2, 6, 2, dtype=torch.float64)
    ended, following = torch.rand(6, 2) < 0.3, torch.randn(2, dtype=torch.float64)
    actual = advantages(Rollout(None, None, None, None, rewards, ended, None, following), values)
    later = torch.cat([values[1:], following.unsqueeze(0)])
    for row in range(2):
        for start in range(6):
            total, factor = 0.0, 1.0
            for step in range(start, 6):
                on = float(not ended[step, row])
                total += factor * (rewards[step, row] + DISCOUNT * on * later[step, row] - values[step, row])
                factor *= DISCOUNT * TRACE * on
            assert math.isclose(actual[start, row], total, rel_tol=1e-12, abs_tol=1e-12)


def test_training_sees_nothing_of_what_the_backtest_forecasts():
    """Catches: a future that leaks into windows, or into what they are scaled with."""
    from forecasting import TRAINED, Windows

    torch.manual_seed(0)
    values = torch.randn(200)
    other = torch.where(torch.arange(200) < round(TRAINED * 200), values, torch.randn(200))
    one, two = (Windows(series, season=6, past=12) for series in (values, other))
    assert torch.equal(one.test, two.test) and not set(one.test.tolist()) & set(one.validation.tolist())
    assert one.training.max() + 6 <= one.validation.min(), "their futures overlap"
    for rows in (one.training, one.validation):
        assert torch.equal(one.inputs[:, rows], two.inputs[:, rows]) and torch.equal(
            one.targets[rows], two.targets[rows]
        )
    first = one.test[0]
    assert torch.equal(one.inputs[:, first], two.inputs[:, first]) and not torch.equal(one.future, two.future)


def test_what_a_word_adds_is_a_difference_of_ratings():
    """Catches: a word that changes nothing and gets a bar; a padded row that knows of its padding."""
    from sentiment import BagOfWords, Rater

    torch.manual_seed(0)
    model = Rater(BagOfWords(9), hidden_size=8, pooling="mean").double().eval()
    words = torch.randint(1, 9, (5,))
    alone = [model(words[: n + 1].unsqueeze(1), torch.tensor([n + 1])) for n in range(5)]
    before = [model.head.bias, *alone[:-1]]
    torch.testing.assert_close(model.added(words), torch.cat(alone) - torch.cat(before))


def test_errors_of_digits_are_edits():
    """Catches: a rate that counts less than was put in, left out or changed."""
    from speech_recognition import edits

    assert edits([1, 2, 3], [1, 2, 3]) == 0
    assert edits([], [1, 2]) == edits([1, 2], []) == edits([2, 1], [1, 2]) == 2
    assert edits([1, 3, 4, 5], [1, 2, 3, 5]) == 2
