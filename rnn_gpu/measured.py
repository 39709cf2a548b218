"""What was measured on this machine, and is taken in place of an estimate: in memory, and in files in Triton's cache.

A choice has a key, which says of what it was measured (device, versions, shape), and is kept from then on: whoever asks
again gets the same. Files are one for each key, written whole or not at all; the first to write one is obeyed by all
others that measured the same meanwhile. What is wrong with a file, or with the folder, costs a measurement and no more.

Nothing is read from a file unless it was asked for, by RNN_GPU_AUTOTUNE=1 or by `autotune` for the same key: a process
that does neither has the same choices on every machine, those of the model, or those that come with the library: of a
device by its name and of these very kernels, in whatever versions of all else (`python -m perf.tune --ship` writes
them). What measures stands in autotuning.py.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .kernels.devices import Device
from .kernels.plan import CUT, Measured
from .kernels.spec import integer_from_environment

Key = str  # a JSON object, sorted
FOLDER = "rnn_gpu"  # in Triton's cache
SHIPPED = os.path.join(os.path.dirname(__file__), "measured.json")  # choices that come with the library, if any do

logger = logging.getLogger("rnn_gpu")

# Whether calls of new shapes are measured (RNN_GPU_AUTOTUNE): read here, so that importing the package checks it.
automatic = integer_from_environment("RNN_GPU_AUTOTUNE", 0, largest=1, smallest=0) == 1


class Rival(NamedTuple):
    """Which backend was the faster one, "triton" or "torch", microseconds a step of both, and when."""

    name: str
    ours: float
    theirs: float
    when: str


_known: dict[Key, dict[str, Any]] = {}
_missing: set[Key] = set()  # keys without a file: it is looked for once
_tried: dict[Key, dict[str, Any]] = {}  # what goes before, while it is timed


@functools.cache
def versions() -> dict[str, Any]:
    """What a measurement holds for, beside the device and the shape."""
    from . import __version__

    triton = importlib.import_module("triton") if importlib.util.find_spec("triton") else None
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    here = torch.cuda.is_available()
    cudnn: Any = torch.backends.cudnn
    return {
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "rnn_gpu": __version__,
        "kernels": _digest_of_kernels(),
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if here else None,
        "driver": driver() if here and driver else None,
    }


def _digest_of_kernels() -> str:
    """A few digits that change with the kernels: what was measured of others says nothing. (With all that is compiled,
    and how it is launched; but not with how plans are chosen.)
    """
    from .kernels import plan
    from .kernels.fingerprint import spelled

    folder, found = os.path.dirname(plan.__file__), hashlib.sha256(spelled(plan.pause_of).encode())
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), "rb") as file:
                text = file.read()
            if b"\n@triton.jit" in text or name == "launch.py":
                found.update(text)
    return found.hexdigest()[:12]


def _key(what: str, device: Device, **shape: Any) -> Key:
    where = {"device": device.name, "multiprocessors": device.multiprocessors}
    return json.dumps({"what": what, **where, **versions(), **shape}, sort_keys=True)


def key_of_plan(
    cell: str, hidden_size: int, batch_size: int, sets: int, dtype: str, device: Device, backward: bool,
    precision: str | None, ragged: bool, limits: tuple[int, bool], saving: str, layers: int = 1,
) -> Key:  # fmt: skip
    """The key of a pass. saving: what the forward keeps, which is nothing to a backward. layers: side by side."""
    return _key(
        "plan", device, cell=cell, hidden_size=hidden_size, batch_size=batch_size, sets=sets, dtype=dtype,
        backward=backward, precision=precision, ragged=ragged, limits=limits, saving=None if backward else saving,
        layers=layers,
    )  # fmt: skip


def key_of_groups(
    cell: str, hidden_size: int, batch_size: int, sets: int, dtype: str, device: Device, layers: int,
    precision: str | None, ragged: bool, limits: tuple[int, bool],
) -> Key:  # fmt: skip
    """The key of how the layers of a stack are put into launches: the same way in training and in inference."""
    return _key(
        "groups", device, cell=cell, hidden_size=hidden_size, batch_size=batch_size, sets=sets, dtype=dtype,
        layers=layers, precision=precision, ragged=ragged, limits=limits,
    )  # fmt: skip


def key_of_layer(
    cell: str, hidden_size: int, batch_size: int, sets: int, dtype: str, device: Device, layers: int, projected: int,
    precision: str | None, ragged: bool, limits: tuple[int, bool], saving: str, reweighted: bool, heads: int,
) -> Key:  # fmt: skip
    """The key of a comparison with PyTorch's own kernels, hidden_size and sets as a plan has them. saving: "nothing" in
    inference; reweighted: `backends.other_weights`.
    """
    return _key(
        "backend", device, cell=cell, hidden_size=hidden_size, batch_size=batch_size, sets=sets, dtype=dtype,
        layers=layers, projected=projected, precision=precision, ragged=ragged, limits=limits, saving=saving,
        reweighted=reweighted, heads=heads,
    )  # fmt: skip


# ---- What is known ---------------------------------------------------------------------------------------------------


def plan(key: Key) -> Measured | None:
    """The plan that was measured for a key, if any."""
    found = _tried.get(key) or look_up(key)
    if found is None:
        return None
    chosen = found.get("cut")
    if not isinstance(chosen, dict) or not all(isinstance(chosen.get(name), int) for name in CUT):
        return None
    return Measured(tuple(int(chosen[name]) for name in CUT), found["when"])


def groups(key: Key) -> tuple[int, ...]:
    """How many layers of a stack each launch takes, as was measured for a key; () where nothing was."""
    sizes = (_tried.get(key) or look_up(key) or {}).get("groups")
    return tuple(sizes) if isinstance(sizes, list) and all(isinstance(size, int) for size in sizes) else ()


def rival(key: Key) -> Rival | None:
    """The backend that was measured for a key, if any."""
    found = look_up(key)
    if found is None or found.get("name") not in ("triton", "torch"):
        return None
    ours, theirs = found.get("ours"), found.get("theirs")
    if not isinstance(ours, float) or not isinstance(theirs, float):
        return None
    return Rival(found["name"], ours, theirs, found["when"])


def anything() -> bool:
    """Whether anything may be known: asked first, since to make a key takes longer."""
    return automatic or bool(_known) or bool(_tried) or bool(shipped())


def look_up(key: Key) -> dict[str, Any] | None:
    """What holds for a key: what was measured here, or what came with the library; None where there is neither."""
    found = known(key, automatic)
    return shipped().get(_of_any_version(key)) if found is None and shipped() else found


def known(key: Key, on_disk: bool) -> dict[str, Any] | None:
    """What was measured here, from memory or, if `on_disk`, from its file; None where nothing was."""
    found = _known.get(key)
    if found is None and on_disk and key not in _missing:
        found = _read(_path(key), key)
        if found is None:
            _missing.add(key)
        else:
            _known[key] = found
    return found


def keep(key: Key, found: dict[str, Any], again: bool = False) -> dict[str, Any]:
    """Keep what was found, in memory and in a file -> what holds from now on: what another process has written for the
    same key meanwhile, unless it was measured `again`.
    """
    _missing.discard(key)
    _known[key] = _write(_path(key), key, found, again)
    return _known[key]


@contextlib.contextmanager
def trying(choices: dict[Key, dict[str, Any]]) -> Iterator[None]:
    """Within this context these go before all else."""
    _tried.update(choices)
    try:
        yield
    finally:
        for key in choices:
            _tried.pop(key, None)


def forget() -> None:
    """Forget what is in memory; files stay."""
    _known.clear()
    _missing.clear()


def _of_any_version(key: Key) -> Key:
    """A key without what changes from one installation to another."""
    fields = {name: value for name, value in json.loads(key).items() if name == "kernels" or name not in versions()}
    return json.dumps(fields, sort_keys=True)


@functools.cache
def shipped(path: str = SHIPPED) -> dict[Key, dict[str, Any]]:
    """The choices that come with the library, by key: none where there is no such file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return {json.dumps(one["key"], sort_keys=True): one["found"] for one in json.load(file)}


def write_shipped(path: str) -> int:
    """Write all that this process has measured as what `shipped` reads -> how many choices."""
    rows = [{"key": json.loads(_of_any_version(key)), "found": found} for key, found in sorted(_known.items())]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=0)
    return len(rows)


# ---- Files -----------------------------------------------------------------------------------------------------------


def folder() -> str:
    """Where the files lie: in Triton's cache, wherever that is."""
    if importlib.util.find_spec("triton"):
        return os.path.join(importlib.import_module("triton").knobs.cache.dir, FOLDER)
    default = os.path.join(os.path.expanduser("~"), ".triton", "cache")
    return os.path.join(os.environ.get("TRITON_CACHE_DIR") or default, FOLDER)


def _path(key: Key) -> str:
    return os.path.join(folder(), hashlib.sha256(key.encode()).hexdigest()[:32] + ".json")


def _read(path: str, key: Key) -> dict[str, Any] | None:
    """What a file says of a key; None where there is no file, or anything is wrong with it."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        logger.warning("rnn_gpu: a measured choice cannot be read, and is measured again when asked for: %s", error)
        return None
    good = (
        isinstance(content, dict) and content.get("key") == json.loads(key) and isinstance(content.get("found"), dict)
    )
    return content["found"] if good and isinstance(content["found"].get("when"), str) else None


def _write(path: str, key: Key, found: dict[str, Any], again: bool) -> dict[str, Any]:
    """Write a file, whole or not at all -> what it says now: of several who write the first, unless `again`."""
    text = json.dumps({"key": json.loads(key), "found": found}, indent=1)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            if not again:
                try:
                    os.link(temporary, path)  # fails where there is one
                    return found
                except FileExistsError:
                    if (first := _read(path, key)) is not None:
                        return first
            os.replace(temporary, path)
            temporary = ""
        finally:
            if temporary:
                os.unlink(temporary)
    except OSError as error:
        logger.warning("rnn_gpu: a measured choice could not be written, and holds for this process alone: %s", error)
    return found
