"""Settings of the whole process: which backend, what training keeps, how many programs may run at the same time.

Environment variables, read when rnn_gpu is imported:

    RNN_GPU_BACKEND       auto, triton or torch
    RNN_GPU_MEMORY        full or lean: what training keeps for the backward
    RNN_GPU_MAX_PROGRAMS  most programs that may have to run at the same time (default: one for each multiprocessor)
    RNN_GPU_ALONE         0: exchange between programs even where one could hold all units (for tests)
    RNN_GPU_AUTOTUNE      1: the first call of a shape is measured (autotuning.py)
    RNN_GPU_WAIT_LIMIT    polls before a wait becomes an error (kernels/spec.py)

Others that begin so are named in a warning, but for RNN_GPU_TEST_..., which are the tests' own.
"""

import contextlib
import functools
import inspect
import operator
import os
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, cast, get_args

from .kernels.spec import choice_from_environment, integer_from_environment

Backend = Literal["auto", "triton", "torch"]
Memory = Literal["full", "lean"]
Function = TypeVar("Function", bound=Callable[..., Any])
BACKENDS, MEMORY = get_args(Backend), get_args(Memory)
_NAMES = "BACKEND", "MEMORY", "MAX_PROGRAMS", "ALONE", "AUTOTUNE", "WAIT_LIMIT"
VARIABLES = tuple(f"RNN_GPU_{name}" for name in _NAMES)


def checked_backend(name: Backend) -> Backend:
    """The name; ValueError for one that is no backend's."""
    if name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}. Select from {', '.join(map(repr, BACKENDS))}.")
    return name


def checked_memory(setting: Memory) -> Memory:
    """The setting; ValueError for one that is none."""
    if setting not in MEMORY:
        raise ValueError(f"Unknown memory setting {setting!r}. Select from {', '.join(map(repr, MEMORY))}.")
    return setting


def positive_integer(name: str, value: Any) -> int:
    """The value as an int. TypeError where it is no integer, ValueError where it is less than 1."""
    try:
        number = operator.index(value)
    except TypeError:
        got = repr(value) if isinstance(value, str | float | None) else type(value).__name__  # no whole tensor
        raise TypeError(f"{name} should be an integer, got: {got}") from None
    if number < 1:
        raise ValueError(f"{name} should be a positive number, got: {number}")
    return number


# Plain globals, not context variables: torch.compile can trace these.
_backend: Backend = choice_from_environment("RNN_GPU_BACKEND", BACKENDS)
_memory: Memory = choice_from_environment("RNN_GPU_MEMORY", MEMORY)
_max_programs = integer_from_environment("RNN_GPU_MAX_PROGRAMS", None)
_wavefront = True
_allow_alone = integer_from_environment("RNN_GPU_ALONE", 1, largest=1, smallest=0) == 1
for _name in sorted(os.environ):
    if _name.startswith("RNN_GPU_") and not _name.startswith("RNN_GPU_TEST_") and _name not in VARIABLES:
        warnings.warn(f"the environment variable {_name} does nothing; there are {', '.join(VARIABLES)}", stacklevel=2)


class _Setting:
    """A setting of the whole process, used as torch.set_grad_enabled is: in force from the call on; a context that
    ends sets it back; as a decorator it holds while the function runs, and not while a generator or a coroutine waits.
    """

    def __init__(self, value: Any):
        self._value, self._before = value, self._exchanged(value)

    @staticmethod
    def _exchanged(value: Any) -> Any:
        """Make `value` the setting -> what it was before."""
        raise NotImplementedError

    def __repr__(self) -> str:  # what a notebook shows after a line that sets one
        return f"rnn_gpu.{type(self).__name__}({self._value!r})"

    def __enter__(self) -> None:
        self._exchanged(self._value)

    def __exit__(self, *error: object) -> None:
        self._exchanged(self._before)

    def __call__(self, function: Function) -> Function:
        """Decorate a function. RuntimeError for a class, as in PyTorch, and for an asynchronous generator."""
        self._exchanged(self._before)
        if inspect.isclass(function) or inspect.isasyncgenfunction(function):
            name = type(self).__name__
            raise RuntimeError(
                f"rnn_gpu.{name} cannot decorate classes and asynchronous generators: decorate functions, or write "
                f"`with rnn_gpu.{name}({self._value!r}):` inside"
            )
        again: Any = lambda: type(self)(self._value)
        run: Any = function

        def within(*args: Any, **kwargs: Any) -> Any:
            with again():
                return run(*args, **kwargs)

        def generator(*args: Any, **kwargs: Any) -> Any:
            return (yield from _step_by_step(again, run(*args, **kwargs)))

        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await _step_by_step(again, run(*args, **kwargs))

        decorated: Any = within
        if inspect.isgeneratorfunction(function):
            decorated = generator
        elif inspect.iscoroutinefunction(function):
            decorated = coroutine
        return cast(Function, functools.wraps(function)(decorated))


@types.coroutine
def _step_by_step(setting: Callable[[], _Setting], inner: Any) -> Any:
    """Run a generator or a coroutine, each piece of it between two waits within the setting."""
    try:
        with setting():
            found = inner.send(None)
        while True:
            try:
                given = yield found
            except GeneratorExit:
                with setting():
                    inner.close()
                raise
            except BaseException as error:
                with setting():
                    found = inner.throw(error)
            else:
                with setting():
                    found = inner.send(given)
    except StopIteration as end:
        return end.value


class backend(_Setting):
    """Let layers use the backend `name`: "auto", "triton" or "torch". ValueError for another name.

    `rnn_gpu.backend("torch")` holds from then on, in all threads; `with rnn_gpu.backend("torch"):` until the block
    ends; `@rnn_gpu.backend("torch")` while the function runs (a generator or a coroutine: not while it waits).
    "triton" raises a RuntimeError that says why where the kernels cannot serve a call; "auto" falls back and logs it
    once.

    >>> with backend("torch"):
    ...     current_backend()
    'torch'
    """

    def __init__(self, name: Backend):
        super().__init__(checked_backend(name))

    @staticmethod
    def _exchanged(value: Backend) -> Backend:
        global _backend
        before, _backend = _backend, value
        return before


class max_programs(_Setting):
    """Let at most `count` programs of a launch have to run at the same time; None: one for each multiprocessor.

    A setter, context or decorator, as `backend` is. Leave room where collectives hold multiprocessors: a launch that
    needs them all waits until they are free. TypeError for what is no integer, ValueError for less than 1.
    """

    def __init__(self, count: int | None):
        super().__init__(count if count is None else positive_integer("max_programs", count))

    @staticmethod
    def _exchanged(value: int | None) -> int | None:
        global _max_programs
        before, _max_programs = _max_programs, value
        return before


class memory(_Setting):
    """Let layers keep for the backward what `setting` says, "full" or "lean". ValueError for another setting.

    A setter, context or decorator, as `backend` is. "full" (the default): outputs, gates and cell states. "lean":
    outputs and the LSTM's cell states alone; the backward makes the gates again by one product with the input and the
    hidden states. A layer made with memory= keeps its own setting. Only the kernels know the difference.
    """

    def __init__(self, setting: Memory):
        super().__init__(checked_memory(setting))

    @staticmethod
    def _exchanged(value: Memory) -> Memory:
        global _memory
        before, _memory = _memory, value
        return before


def current_backend() -> Backend:
    """The backend in force: "auto", "triton" or "torch"."""
    return _backend


def current_memory() -> Memory:
    """What layers keep for the backward now: "full" or "lean"."""
    return _memory


@contextlib.contextmanager
def always_exchange() -> Iterator[None]:
    """Within this context, programs exchange their state even where one could hold all units: for tests on small
    layers.
    """
    global _allow_alone
    before, _allow_alone = _allow_alone, False
    try:
        yield
    finally:
        _allow_alone = before


@contextlib.contextmanager
def layer_by_layer() -> Iterator[None]:
    """Within this context, the layers of a stack run one after another: for tests, and to compare."""
    global _wavefront
    before, _wavefront = _wavefront, False
    try:
        yield
    finally:
        _wavefront = before


def side_by_side() -> bool:
    """Whether the layers of a stack may run side by side now."""
    return _wavefront


def limits() -> tuple[int, bool]:
    """What plans may use now: most programs at the same time, 0 for the device's limit; whether one may hold all units.

    A layer's backward keeps to those of its forward.
    """
    return _max_programs or 0, _allow_alone


def in_force() -> tuple[Any, ...]:
    """All of them, for what depends on them."""
    return _backend, _memory, _max_programs, _allow_alone, _wavefront
