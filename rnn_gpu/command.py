"""How every command of `python -m` ends."""

import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

BROKEN_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE has ended, as `yes | head -1` ends


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
