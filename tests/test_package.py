"""The archives that users install from: built from what git has, and tried outside of the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    """The files of the checkout that git knows, or would take."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_archives_hold_what_they_must_and_work(tmp_path):
    """Catches: a module, the kernels, py.typed or the tests left out of an archive; one that cannot be built from the
    source archive, or does not work outside of a checkout; a description that a package index would not show.
    """
    pytest.importorskip("build", reason="build is not installed: it comes with the extra `dev`")
    pytest.importorskip("twine", reason="twine is not installed: it comes with the extra `dev`")
    names, source, dist = tracked(), tmp_path / "source", tmp_path / "dist"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run("-m", "build", "--no-isolation", "--outdir", dist, source, cwd=tmp_path)  # the wheel from the source archive
    run("-m", "twine", "check", "--strict", *dist.iterdir(), cwd=tmp_path)
    (wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in names if name.startswith("rnn_gpu/") and name.endswith((".py", "py.typed"))}
    kernels = {f"rnn_gpu/{name}" for name in names if name.startswith("kernels/")}
    assert modules | kernels <= packed
    assert all(name.startswith(("rnn_gpu/", "rnn_gpu-")) for name in packed), "nothing else at the top"
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {name for name in names if name.startswith(("docs/", "examples/", "perf/", "tests/")) or "/" not in name}
    assert wanted - {".gitignore"} <= inside
    run("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "installed", wheel, cwd=tmp_path)
    program = (
        "import rnn_gpu, rnn_gpu.kernels.plan, torch; print(rnn_gpu.__file__); "
        "rnn_gpu.LSTM(3, 4)(torch.randn(2, 1, 3))[0].sum().backward(); rnn_gpu.explain(rnn_gpu.LSTM(3, 4), 2, 'h200')"
    )
    printed = run("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert str(tmp_path / "installed") in printed
