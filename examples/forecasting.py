"""Forecast sunspots, CO2 and El Niño several steps ahead, with intervals, against four simple forecasts.

    python examples/forecasting.py                      15 seconds of training a series, on two CPU cores
    python examples/forecasting.py --series co2 --seconds 60

The series come with the package statsmodels, whose wheel pip fetches at the first run: sunspots year by year since
1700; month by month CO2 over Mauna Loa since 1958, and the temperature of the sea where El Niño warms it since 1950.
The simple forecasts are the last value; the value of a season ago; the same and the growth since a season ago; and what
is usual, the mean of each phase of the season (each month). Of these one LSTM a series takes the one that is best on
the training windows; it reads a window of the past, and says how the next season will deviate from that forecast, at
the quantiles 0.1, 0.5 and 0.9. It is trained on the first three quarters of the series; the backtest forecasts from
every step of the rest, as if it were the present, and judges by the best of the four on these steps.

Shapes: W values of a window of the past, P periods of a season, which are forecast; Q quantiles; B windows.
"""

import copy
import csv
import math
import sys

import common
import torch
from torch import Tensor, nn

import rnn_gpu

PACKAGE = "statsmodels==0.14.4"
QUANTILES = torch.tensor([0.1, 0.5, 0.9])
TRAINED = 0.75  # part of a series that is trained on
FITTED = 0.85  # part of the training windows that is fitted; the others say when to stop
LEARNING_RATE = 3e-3
BATCH_SIZE = 64


# ---- Data ----------------------------------------------------------------------------------------------------


def read_table(name: str) -> list[list[str]]:
    """The rows of a data set of statsmodels, without the line of titles."""
    return list(csv.reader(common.read_wheel(PACKAGE, f"statsmodels/datasets/{name}/{name}.csv").splitlines()))[1:]


def sunspots() -> tuple[Tensor, float, float]:
    """Sunspots of each year: the values, the first one's year, values in a year."""
    return torch.tensor([float(count) for _, count in read_table("sunspots")]), 1700.0, 1.0


def co2() -> tuple[Tensor, float, float]:
    """CO2, the mean of each month's weeks, in parts per million; a month without one has the mean of its neighbours."""
    months: dict[tuple[int, int], list[float]] = {}
    for date, value in read_table("co2"):
        months.setdefault((int(date[:4]), int(date[4:6])), []).extend([float(value)] if value else [])
    means = [sum(weeks) / len(weeks) if weeks else math.nan for _, weeks in sorted(months.items())]
    values = torch.tensor(means)
    known = torch.nonzero(~values.isnan()).flatten()
    for month in torch.nonzero(values.isnan()).flatten().tolist():
        before, after = known[known < month][-1], known[known > month][0]
        values[month] = torch.lerp(values[before], values[after], (month - before) / (after - before))
    return values, 1958 + 2 / 12, 12.0


def elnino() -> tuple[Tensor, float, float]:
    """Temperature of the sea's surface, in degrees Celsius, of each month."""
    return torch.tensor([float(value) for row in read_table("elnino") for value in row[1:]]), 1950.0, 12.0


# The periods of a season; how many of the past a forecast sees; the unit.
SERIES = {"sunspots": (sunspots, 11, 44, "sunspots"), "co2": (co2, 12, 36, "ppm"), "elnino": (elnino, 12, 36, "°C")}


class Windows:
    """A series cut into windows: the past [windows, W], the season after, and simple forecasts of it [windows, P]."""

    def __init__(self, values: Tensor, season: int, past: int):
        cut = values.unfold(0, season + past + season, 1)  # one season more, before the window, to compare it with
        self.past, self.future = cut[:, season : season + past], cut[:, season + past :]
        self.origins = torch.arange(len(cut)) + season + past  # where in the series each forecast begins
        present = round(TRAINED * len(values))
        known = torch.nonzero(self.origins + season <= present).flatten()  # their futures have happened
        fitted = int(FITTED * len(known))
        self.training, self.validation = known[: fitted - season], known[fitted:]  # the futures of neither overlap
        self.test = torch.nonzero(self.origins >= present).flatten()
        means = torch.stack([values[phase:present:season].mean() for phase in range(season)])
        usual = means.repeat(len(values) // season + 1)[: len(values)].unfold(0, cut.shape[1], 1)
        season_ago, last = cut[:, past : season + past], self.past[:, -1:]
        self.simple = {
            "last value": last.expand_as(self.future),
            "season ago": season_ago,
            "and growth": season_ago + last - self.past[:, -1 - season : -season],
            "usual": usual[:, season + past :],
        }
        self.start = min(self.simple, key=lambda name: self.error(self.simple[name], self.training))

        deviations = self.past - cut[:, :past]  # from the season before, along the window
        level = usual[:, season : season + past] if self.start == "usual" else self.past.mean(1, keepdim=True)
        channels = [channel / channel[self.training].std() for channel in (deviations, self.past - level)]
        self.inputs = torch.stack(channels, 2).transpose(0, 1).contiguous()  # [W, windows, 2]
        targets = self.future - self.simple[self.start]
        self.scale = targets[self.training].std()
        self.targets = targets / self.scale  # [windows, P]

    def error(self, forecasts: Tensor, rows: Tensor) -> float:
        """Mean absolute error of forecasts of all windows [windows, P], on some of them."""
        return (forecasts - self.future)[rows].abs().mean().item()


# ---- The model -----------------------------------------------------------------------------------------------


class Forecaster(nn.Module):
    """An LSTM over the window; from its last state the deviations of the next season, at every quantile."""

    def __init__(self, season: int, hidden_size: int, dropout: float = 0.5):
        super().__init__()
        self.lstm = rnn_gpu.LSTM(2, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, season * len(QUANTILES))

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [W, B, 2] -> deviations [B, P, Q], in ascending order of the quantiles."""
        _, (h_n, _) = self.lstm(inputs)
        return self.head(self.dropout(h_n[0])).unflatten(1, (-1, len(QUANTILES))).sort(2).values


def pinball(predicted: Tensor, targets: Tensor) -> Tensor:
    """The loss whose minimum is the quantile (Koenker and Bassett 1978): predicted [B, P, Q], targets [B, P]."""
    below = targets.unsqueeze(2) - predicted
    quantiles = QUANTILES.to(predicted.device)
    return torch.maximum(quantiles * below, (quantiles - 1) * below).mean()


def train(windows: Windows, season: int, options) -> tuple[Forecaster, object]:
    """A forecaster of this series, trained for the budget, and the function that makes one step.

    A series is short, and learnt by heart in seconds: what is kept is the mean of the weights over some hundred steps
    (Polyak and Juditsky 1992), which depends less on chance than those of one step, when it was best on the validation.
    """
    model = Forecaster(season, options.hidden_size).to(options.device)
    mean, updates = copy.deepcopy(model), 0
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    inputs, targets = windows.inputs.to(options.device), windows.targets.to(options.device)
    loss, least, best = torch.tensor(math.nan), math.inf, model

    def step(rate: float = 0.0) -> None:
        nonlocal loss, updates
        rows = windows.training[torch.randint(len(windows.training), (BATCH_SIZE,))].to(options.device)
        noisy = inputs[:, rows] + 0.3 * torch.randn(inputs.shape[0], BATCH_SIZE, 2, device=options.device)
        loss = pinball(model(noisy), targets[rows])
        common.update(optimizer, loss, rate * LEARNING_RATE)
        updates += 1
        with torch.no_grad():
            for average, latest in zip(mean.parameters(), model.parameters(), strict=True):
                average.lerp_(latest, max(0.01, 1 / updates))

    for passed in common.budget(options.seconds, lambda: f"pinball loss {loss.item():.3f}"):
        step(common.schedule(passed))
        if updates % 20 == 1:
            mean.eval()
            with torch.no_grad():
                found = pinball(mean(inputs[:, windows.validation]), targets[windows.validation]).item()
            if found < least:
                least, best = found, copy.deepcopy(mean)
    return best, step


@torch.no_grad()
def backtest(model: Forecaster, windows: Windows, device: torch.device) -> Tensor:
    """Forecasts from every step, with the past of each alone: [windows, P, Q]."""
    model.eval()
    return windows.simple[windows.start].unsqueeze(2) + windows.scale * model(windows.inputs.to(device)).cpu()


# ---- The command ---------------------------------------------------------------------------------------------


def draw(axes, name: str, values: Tensor, windows: Windows, forecasts: Tensor) -> None:
    """The end of the series, and the forecasts of the backtest that follow on one another."""
    _, season, _, unit = SERIES[name]
    first = int(windows.origins[windows.test[0]])
    _, start, per_year = SERIES[name][0]()
    years = start + torch.arange(len(values)) / per_year
    axes.plot(
        years[first - 2 * season :], values[first - 2 * season :], color="black", linewidth=1, label="what happened"
    )
    for row in windows.test[::season]:
        forecast, origin = forecasts[row], windows.origins[row]
        when = years[origin : origin + season]
        axes.fill_between(when, forecast[:, 0], forecast[:, -1], color="tab:blue", alpha=0.25, linewidth=0)
        axes.plot(when, forecast[:, 1], color="tab:blue", linewidth=1)
    axes.set_title(f"{name}, {unit}: forecasts of {season} steps, with the interval for 80 %", fontsize=10)


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = common.parser(__doc__, seconds=15)
    parser.add_argument(
        "--series", choices=SERIES, nargs="+", default=list(SERIES), help="which; --seconds is for each"
    )
    parser.add_argument("--hidden-size", type=int, default=32, help="units of the layer")
    options = common.read_options(parser)
    if options.quick:
        options.hidden_size = 8

    picture = common.figure(8, 1.9 * len(options.series))
    all_axes = picture.subplots(len(options.series), squeeze=False)[:, 0]
    better, lines = [], []
    for name, axes in zip(options.series, all_axes, strict=True):
        read, season, past, unit = SERIES[name]
        values, _, _ = read()
        windows = Windows(values, season, past)
        print(f"{name}: {len(values)} values, {len(windows.training)} windows to train on, {len(windows.test)} to test")
        model, step = train(windows, season, options)
        forecasts = backtest(model, windows, options.device)
        simple = [windows.error(forecast, windows.test) for forecast in windows.simple.values()]
        ours = windows.error(forecasts[:, :, 1], windows.test)
        inside = (forecasts[:, :, 0] <= windows.future) & (windows.future <= forecasts[:, :, -1])
        covered = inside[windows.test].float().mean().item()
        errors = "".join(f"{error:12.2f}" for error in (*simple, ours))
        lines.append(f"{name:10s} {unit:9s}{errors}{covered:14.0%}   {windows.start}")
        better.append(ours < min(simple))
        draw(axes, name, values, windows, forecasts)
    titles = "".join(f"{title:>12s}" for title in (*windows.simple, "LSTM"))
    print(f"\nmean absolute error {titles}{'in interval':>14s}   starts from")
    print("\n".join(lines))
    common.save(picture, options)
    common.compare_speed(options, step)
    wanted = min(2, len(better))
    words = f"better than the best simple forecast on {sum(better)} of {len(better)} series, at least {wanted}"
    return common.verdict(options, forecasts=(words, sum(better) >= wanted))


if __name__ == "__main__":
    sys.exit(main())
