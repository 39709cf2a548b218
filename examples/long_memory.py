"""Remember for 1,000 steps: the adding and the copy problem, vanishing gradients, and the initialisation that helps.

    python examples/long_memory.py                two models, up to two minutes of training each on two CPU cores
    python examples/long_memory.py --problem copy --longest 500 --seconds 600

Both problems are after Hochreiter and Schmidhuber (1997), in the form of Arjovsky, Shah and Bengio (2016): add the two
numbers of a sequence that are marked, or repeat the symbols that stood at its start. An LSTM with PyTorch's initial
weights forgets within some tens of steps: the picture shows how much of a loss at the last step reaches the steps
before it (`rnn_gpu.gradient_flow`). Chrono initialisation (Tallec and Ollivier 2018), `rnn_gpu.init.chrono_`, lets the
forget gates begin with memories of up to `--longest` steps. Training begins with short sequences and makes them longer
whenever it has solved them; then the same with PyTorch's initial weights, for as many time steps as chrono took: they
start later, and may catch up, because short sequences teach them what chrono knows from the beginning.

Shapes: T steps, B sequences, H hidden size.
"""

import math
import sys

import common
import torch
from torch import Tensor, nn
from torch.nn import functional

import rnn_gpu

LEARNING_RATE = 1e-2
LARGEST_GRADIENT_NORM = 1.0
FIRST = 50  # steps of the first sequences
SHORTEST, LONGEST = 100, 2000  # that --longest may be


# ---- The problems --------------------------------------------------------------------------------------------


class Adding:
    """Numbers in 0..1 beside marks, of which there are two, one in each half of the sequence: what is their sum?

    The error is the mean square; whoever always says 1 has 1/6.
    """

    inputs, outputs, baseline, solved = 2, 1, 1 / 6, 0.01

    def draw(self, steps: int, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs [T, B, 2] and sums [B]."""
        numbers, marks = torch.rand(steps, batch_size, device=device), torch.zeros(steps, batch_size, device=device)
        rows = torch.arange(batch_size, device=device)
        marks[torch.randint(steps // 2, (batch_size,), device=device), rows] = 1.0
        marks[torch.randint(steps // 2, steps, (batch_size,), device=device), rows] = 1.0
        return torch.stack([numbers, marks], 2), (numbers * marks).sum(0)

    def error(self, output: Tensor, targets: Tensor) -> Tensor:
        """Of what the model says after the last step."""
        return functional.mse_loss(output[-1, :, 0], targets)


class Copy:
    """Some symbols, then blanks, then a sign at which the symbols are to be repeated.

    The error is the cross entropy of a repeated symbol, in nats; whoever guesses has log 8.
    """

    kinds, symbols = 8, 5
    blank, sign = kinds, kinds + 1
    inputs, outputs, baseline, solved = kinds + 2, kinds, math.log(kinds), 0.1

    def draw(self, steps: int, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs [T, B, 10], one of which is 1, and the symbols [symbols, B]."""
        symbols = torch.randint(self.kinds, (self.symbols, batch_size), device=device)
        shown = torch.full((steps, batch_size), self.blank, device=device)
        shown[: self.symbols], shown[-self.symbols] = symbols, self.sign
        return functional.one_hot(shown, self.inputs).float(), symbols

    def error(self, output: Tensor, targets: Tensor) -> Tensor:
        """Of what the model says in the last steps."""
        return functional.cross_entropy(output[-self.symbols :].flatten(0, 1), targets.flatten())


PROBLEMS = {"adding": Adding, "copy": Copy}


# ---- The model -----------------------------------------------------------------------------------------------


class Model(nn.Module):
    """An LSTM and a linear head."""

    def __init__(self, problem, hidden_size: int, clip: float | None):
        super().__init__()
        self.lstm = rnn_gpu.LSTM(problem.inputs, hidden_size, clip=clip)
        self.head = nn.Linear(hidden_size, problem.outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [T, B, I] -> what it says after each step [T, B, outputs]."""
        return self.head(self.lstm(inputs)[0])


def initialise(layer: rnn_gpu.LSTM, how: str, longest: int) -> None:
    """Initial weights: "default", PyTorch's; "unit forget bias" and "chrono", with orthogonal recurrent weights."""
    if how != "default":
        rnn_gpu.init.orthogonal_(layer)
        layer.bias_ih_l0.data.zero_()
        layer.bias_hh_l0.data.zero_()
    if how == "unit forget bias":
        rnn_gpu.init.unit_forget_bias_(layer)
    elif how == "chrono":
        rnn_gpu.init.chrono_(layer, longest)


def draw_gradients(axes, problem, options) -> None:
    """How much of a loss at the last step reaches each step, with every initialisation, before any training."""
    inputs, targets = problem.draw(options.longest, 16, options.device)
    for number, how in enumerate(("default", "unit forget bias", "chrono")):
        torch.manual_seed(options.seed)
        model = Model(problem, options.hidden_size, options.clip).to(options.device)
        initialise(model.lstm, how, options.longest)
        flow = rnn_gpu.gradient_flow(
            model.lstm, inputs, loss=lambda output, states, head=model.head: problem.error(head(output), targets)
        )
        flow.plot(axes).lines[-1].set(label=how, color=f"C{number}")
        first, last = flow.norms[0, 0, 0].item(), flow.norms[0, 0, -1].item()
        print(f"{how:18s} of the gradient at the last step {first / last:.0e} reaches the first")
    axes.set(title="before training", ylim=(1e-24, 10))
    axes.legend()


# ---- Training ------------------------------------------------------------------------------------------------


def lengths(longest: int) -> list[int]:
    """Longer and longer, each about twice the one before, and the longest last."""
    rungs = [longest]
    while rungs[0] > 1.5 * FIRST:
        rungs.insert(0, max(FIRST, rungs[0] // 2))
    return rungs


def train(problem, how: str, most: float, options):
    """Train until the longest sequences are solved, or the time is over, or `most` thousand time steps were trained on.

    Its error on new sequences of the longest length; thousands of time steps, T and error of every update; and the
    function that makes one.
    """
    torch.manual_seed(options.seed)
    model = Model(problem, options.hidden_size, options.clip).to(options.device)
    initialise(model.lstm, how, options.longest)
    optimizer = torch.optim.Adam(model.parameters())
    rungs, recent, curve, trained_on = lengths(options.longest), [], [], 0

    def step() -> Tensor:
        inputs, targets = problem.draw(rungs[0], options.batch_size, options.device)
        loss = problem.error(model(inputs), targets)
        common.update(optimizer, loss, LEARNING_RATE, LARGEST_GRADIENT_NORM)
        return loss.detach()

    print(f"\n{how}:")
    for _ in common.budget(options.seconds, lambda: f"T {rungs[0]}, error {curve[-1][2]:.4f}"):
        recent.append(step().item())
        trained_on += rungs[0]
        curve.append((trained_on / 1000, rungs[0], recent[-1]))
        if curve[-1][0] >= most:
            break
        if len(recent) >= 20 and sum(recent[-20:]) / 20 < problem.solved * (0.5 if len(rungs) == 1 else 1):
            if len(rungs) == 1:
                break
            common.say(f"  T {rungs.pop(0)} solved after {len(curve)} updates")
            recent.clear()
    inputs, targets = problem.draw(options.longest, 500, options.device)
    with torch.no_grad():
        error = problem.error(model(inputs), targets).item()
    return error, curve, step


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = common.parser(__doc__, seconds=120)
    parser.add_argument("--problem", choices=PROBLEMS, default="adding", help="what is to be remembered")
    parser.add_argument("--longest", type=int, default=1000, help=f"T at last, {SHORTEST} to {LONGEST}")
    parser.add_argument("--hidden-size", type=int, default=64, help="units of the layer")
    parser.add_argument("--clip", type=float, help="largest gradient of h at any step; slow without a GPU")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences in a training step")
    options = common.read_options(parser)
    if not SHORTEST <= options.longest <= LONGEST:
        parser.error(f"argument --longest: {SHORTEST} to {LONGEST}, got {options.longest}")
    if options.quick:
        options.hidden_size, options.batch_size, options.longest = 8, 4, 20
    problem = PROBLEMS[options.problem]()

    picture = common.figure(10, 3.6)
    left, right = picture.subplots(1, 2)
    draw_gradients(left, problem, options)
    results, most = {}, math.inf
    for how in ("chrono", "default"):
        error, curve, _ = results[how] = train(problem, how, most, options)
        most = curve[-1][0]  # the other trains on no more than chrono needed
        print(f"{how}: error {error:.4f} on new sequences, T {options.longest}; {problem.baseline:.4f} without memory")
        trained_on, steps, errors = zip(*curve, strict=True)
        right.plot(trained_on, errors, linewidth=0.8, label=f"{how}, up to T {steps[-1]}")
    right.axhline(problem.baseline, color="black", linestyle=":", linewidth=0.8)
    right.set(
        yscale="log",
        xlabel="thousand time steps trained on",
        ylabel="error",
        title=f"{options.problem}: T grows to {options.longest}",
    )
    right.legend()
    common.save(picture, options)
    common.compare_speed(options, results["chrono"][2])
    error = results["chrono"][0]
    words = f"error {error:.4f} with chrono at T {options.longest}, less than {problem.solved}"
    return common.verdict(options, memory=(words, error < problem.solved))


if __name__ == "__main__":
    sys.exit(main())
