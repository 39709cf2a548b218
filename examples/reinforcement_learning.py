"""Remember a cue: an agent with an LSTM learns, by reward alone, a task that no agent without memory can do.

    python examples/reinforcement_learning.py               40 seconds of training on two CPU cores

The task is a T-maze (after Bakker 2002): the first observation of an episode says left or right, then comes a
corridor of random length where every step looks the same, and at its end the agent has to turn to the side it was
told. Many mazes run side by side, and episodes end and begin anywhere inside a rollout. The agent acts step by step,
its state in hand; it learns, by proximal policy optimisation, from a whole rollout in one call, with `resets=` where
episodes begin: the same numbers as by stepping through time again, in less time.

Shapes: T steps of a rollout, B mazes, A actions, H hidden size.
"""

import dataclasses
import math
import sys

import common
import torch
from torch import Tensor, nn
from torch.nn import functional

import rnn_gpu

FORWARD, LEFT, RIGHT = range(3)
SHORTEST, LONGEST = 4, 10  # steps of a corridor
DISCOUNT, TRACE = 0.98, 0.95  # gamma, and the lambda of generalised advantage estimation (Schulman et al. 2016)
ENTROPY, VALUE = 0.01, 0.5  # weights of these parts of the loss
EPOCHS, CLIP = 4, 0.2  # updates from a rollout, and how far a probability may move in them
LEARNING_RATE = 5e-3


# ---- The task ------------------------------------------------------------------------------------------------


class Mazes:
    """B corridors side by side, each of which starts anew where it ends.

    An observation [4]: told left, told right (1 at the first step alone), at the junction, and noise.
    """

    def __init__(self, count: int, device: torch.device):
        self.count, self.device = count, device
        self.starts = torch.ones(count, dtype=torch.bool, device=device)  # where an episode begins with this step
        self.side, self.left = self.fresh()  # LEFT or RIGHT; steps to the junction

    def fresh(self) -> tuple[Tensor, Tensor]:
        """A side and a length for every maze."""
        draw = lambda low, high: torch.randint(low, high + 1, (self.count,), device=self.device)
        return draw(LEFT, RIGHT), draw(SHORTEST, LONGEST)

    def observe(self) -> Tensor:
        """What the agent sees now: [B, 4]."""
        told = functional.one_hot(self.side - LEFT, 2) * self.starts.unsqueeze(1)
        noise = torch.rand(self.count, 1, device=self.device)
        return torch.cat([told, (self.left == 0).unsqueeze(1), noise], 1)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Act; the rewards [B]: 1 for the right turn, -1 for the wrong, -0.1 for walls; and what ended."""
        at_junction = self.left == 0
        turned, forward = actions != FORWARD, actions == FORWARD
        ended = at_junction & turned
        rewards = torch.where(ended, torch.where(actions == self.side, 1.0, -1.0), -0.1 * (at_junction | turned))
        self.left = self.left - (forward & ~at_junction).long()
        side, left = self.fresh()
        self.side, self.left = torch.where(ended, side, self.side), torch.where(ended, left, self.left)
        self.starts = ended
        return rewards, ended


# ---- The agent -----------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """An LSTM, and from its output the policy and the value of the state."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.lstm = rnn_gpu.LSTM(4, hidden_size)
        self.policy = nn.Linear(hidden_size, 3)
        self.value = nn.Linear(hidden_size, 1)

    def forward(self, observations: Tensor, starts: Tensor, state=None) -> tuple[Tensor, Tensor, tuple]:
        """observations [T, B, 4], starts bool [T, B] -> log-probabilities [T, B, A], values [T, B], the last state."""
        output, state = self.lstm(observations, state, resets=starts)
        return self.policy(output).log_softmax(2), self.value(output).squeeze(2), state


@dataclasses.dataclass
class Rollout:
    """What happened in T steps, everything [T, B] or [T, B, ...]; and the agent's state before them."""

    observations: Tensor
    starts: Tensor
    actions: Tensor
    chosen: Tensor  # the actions' log-probabilities as the agent took them, step by step
    rewards: Tensor
    ended: Tensor
    state: tuple | None
    following: Tensor  # the value of what comes after, [B]


@torch.no_grad()
def act(agent: Agent, mazes: Mazes, steps: int, state, greedy: bool = False, forgetful: bool = False):
    """Act for so many steps, one call a step: the rollout, and the state after it."""
    before, rows = state, []
    for _ in range(steps):
        observation = mazes.observe()
        starts = torch.ones_like(mazes.starts) if forgetful else mazes.starts
        logits, _, state = agent(observation.unsqueeze(0), starts.unsqueeze(0), state)
        actions = logits[0].argmax(1) if greedy else torch.multinomial(logits[0].exp(), 1).squeeze(1)
        rewards, ended = mazes.step(actions)
        rows.append(
            (observation, starts, actions, logits[0].gather(1, actions.unsqueeze(1)).squeeze(1), rewards, ended)
        )
    _, following, _ = agent(mazes.observe().unsqueeze(0), mazes.starts.unsqueeze(0), state)
    return Rollout(*(torch.stack(parts) for parts in zip(*rows, strict=True)), before, following[0]), state


def advantages(rollout: Rollout, values: Tensor) -> Tensor:
    """How much better each action was than expected, by generalised advantage estimation: [T, B]."""
    result, later, following = torch.empty_like(values), torch.zeros_like(values[0]), rollout.following
    for step in reversed(range(len(values))):
        on = (~rollout.ended[step]).to(values)  # nothing is carried over the end of an episode
        surprise = rollout.rewards[step] + DISCOUNT * on * following - values[step]
        later = surprise + DISCOUNT * TRACE * on * later
        result[step], following = later, values[step]
    return result


def learn(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, learning_rate: float) -> None:
    """Updates by proximal policy optimisation (Schulman et al. 2017), each from one call over the whole rollout."""
    gain = None
    for _ in range(EPOCHS):
        logits, values, _ = agent(rollout.observations, rollout.starts, rollout.state)
        if gain is None:
            gain = advantages(rollout, values.detach())
            returns, gain = values.detach() + gain, (gain - gain.mean()) / (gain.std() + 1e-5)
        chosen = logits.gather(2, rollout.actions.unsqueeze(2)).squeeze(2)
        ratio = (chosen - rollout.chosen).exp()
        better = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
        entropy = -(logits.exp() * logits).sum(2)
        loss = (VALUE * (values - returns).pow(2) - better - ENTROPY * entropy).mean()
        common.update(optimizer, loss, learning_rate, clip=0.5)


@torch.no_grad()
def success(agent: Agent, options, forgetful: bool = False) -> float:
    """The part of fresh mazes whose first episode ends on the right side; one that does not end in time is wrong.

    forgetful: the state is wiped before every step.
    """
    rollout, _ = act(agent, Mazes(1000, options.device), 5 * LONGEST, None, greedy=True, forgetful=forgetful)
    first = rollout.ended.int().argmax(0, keepdim=True)  # step at which each episode ends
    right = rollout.ended.any(0) & (rollout.rewards.gather(0, first)[0] > 0)
    return right.float().mean().item()


@torch.no_grad()
def compare_with_stepping(agent: Agent, rollout: Rollout) -> float:
    """Largest difference of log-probabilities between one call with `resets=` and acting step by step; prints times."""

    def together() -> Tensor:
        return agent(rollout.observations, rollout.starts, rollout.state)[0]

    def apart() -> None:
        state = rollout.state
        for observation, starts in zip(rollout.observations, rollout.starts, strict=True):
            _, _, state = agent(observation.unsqueeze(0), starts.unsqueeze(0), state)

    logits, times = together(), [common.milliseconds(rollout.starts.device, call) for call in (together, apart)]
    print(f"a rollout of {len(logits)} steps: {times[0]:.1f} ms in one call, {times[1]:.1f} ms step by step")
    chosen = logits.gather(2, rollout.actions.unsqueeze(2)).squeeze(2)
    return (chosen - rollout.chosen).abs().max().item()


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = common.parser(__doc__, seconds=40)
    parser.add_argument("--hidden-size", type=int, default=32, help="units of the layer")
    parser.add_argument("--mazes", type=int, default=128, help="that run side by side")
    parser.add_argument("--steps", type=int, default=32, help="of a rollout")
    options = common.read_options(parser)
    if options.quick:
        options.hidden_size, options.mazes, options.steps = 8, 8, 16

    agent, mazes = Agent(options.hidden_size).to(options.device), Mazes(options.mazes, options.device)
    optimizer = torch.optim.Adam(agent.parameters())
    state, curve, rate = None, [], math.nan

    def step(learning_rate: float = 0.0) -> None:
        nonlocal state, rate
        rollout, state = act(agent, mazes, options.steps, state)
        learn(agent, optimizer, rollout, learning_rate)
        rate = (rollout.rewards[rollout.ended] > 0).float().mean().item()
        curve.append(rate)

    for passed in common.budget(options.seconds, lambda: f"{rate:.0%} of episodes right"):
        step(LEARNING_RATE * common.schedule(passed))

    rollout, _ = act(agent, mazes, options.steps, state)
    difference = compare_with_stepping(agent, rollout)
    print(f"largest difference of a log-probability between the two: {difference:.1e}")
    reached, without = success(agent, options), success(agent, options, forgetful=True)
    picture = common.figure(7, 3)
    axes = picture.subplots()
    axes.plot(curve, linewidth=1)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="rollouts", ylabel="episodes that end right", title="learning to remember the cue", ylim=(0, 1.02))
    common.save(picture, options)
    common.compare_speed(options, step)
    return common.verdict(
        options,
        memory=(
            f"{reached:.1%} of episodes end right, at least 95 %; {without:.1%} where its state is wiped at every step",
            reached >= 0.95,
        ),
        resets=(f"one call and steps differ by {difference:.1e}, at most 1e-2", difference <= 1e-2),
    )


if __name__ == "__main__":
    sys.exit(main())
