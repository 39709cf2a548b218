"""How every command of `python -m` ends, and how it reads its arguments."""

import argparse
import os
import select
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

import torch

from .kernels.devices import DEVICES, named, nearest

BROKEN_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE has ended, as `yes | head -1` ends


def positive(text: str, kind: type = int) -> Any:
    """A number of an argument, for argparse."""
    try:
        number = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None
    if not number > 0:  # nor NaN
        raise argparse.ArgumentTypeError(f"should be a positive number, got: {text}")
    return number


def duration(text: str) -> float:
    """Seconds, for argparse."""
    return positive(text, float)


def present(text: str) -> torch.device:
    """A device that is there, for argparse."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without that kind
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return device


def known_gpu(text: str) -> str:
    """The key in DEVICES of a GPU that is known by name, written as `explain` takes it, for argparse."""
    found = named(text)
    for key, gpu in DEVICES.items():
        if gpu is found:
            return key
    if found is not None:
        raise argparse.ArgumentTypeError(f"{found.name}: too old for the kernels, or told by its sizes alone")
    raise argparse.ArgumentTypeError(f"unknown GPU {text!r}; the nearest are {', '.join(map(repr, nearest(text)))}")


def _has_gone(stream: TextIO) -> bool:
    """Whether nobody reads this stream any more. What is written to it from here on goes nowhere then."""
    if not hasattr(select, "poll"):  # Windows, where it is another error
        return False
    poll = select.poll()
    poll.register(stream, 0)  # POLLERR and POLLHUP are told all the same
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return True


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Call a command, and exit with its status: quietly, and with BROKEN_PIPE, where whoever read its output has gone
    (`| head -3`).
    """
    status: int | str | None = 1
    try:
        try:
            status = main()
        except SystemExit as ended:  # of argparse, which has printed
            status = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        if not any([_has_gone(stream) for stream in (sys.stdout, sys.stderr)]):
            raise  # another pipe: a mistake
        status = BROKEN_PIPE
    sys.exit(status)
