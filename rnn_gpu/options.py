"""What layers have beyond torch.nn: the options, as their constructors take and show them, and what each may be."""

import inspect
import numbers
import types
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar, get_type_hints

from . import settings

Class = TypeVar("Class", bound=type)
# By default; as constructors take them; and of a probability that of what.
OPTIONS: dict[str, Any] = {
    "memory": None,
    "heads": 1,
    "weight_dropout": 0.0,
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
    "clip": None,
    "return_cells": False,
}
PROBABILITIES = {
    "weight_dropout": "a recurrent weight being zeroed",
    "recurrent_dropout": "a unit's hidden state being zeroed before the recurrent product",
    "zoneout": "a unit keeping its state",
}


class _Options(TypedDict, total=False):
    memory: settings.Memory | None
    heads: int
    weight_dropout: float
    recurrent_dropout: float
    clip: float | None


class LSTMOptions(_Options, total=False):
    """The arguments of an LSTM beyond torch.nn's."""

    zoneout: float | tuple[float, float]
    return_cells: bool


class Options(_Options, total=False):
    """Those of other layers."""

    zoneout: float
    return_cells: bool
    proj_size: None  # to be told that it is the LSTM's


def showing(options: type) -> Callable[[settings.Function], settings.Function]:
    """Decorates an __init__(..., **options): help and inspect show the options by name."""

    def showing(function: Any) -> Any:
        signature: Any = inspect.signature(function)
        *given, last = signature.parameters.values()
        kinds = get_type_hints(options)
        named = [
            last.replace(name=name, kind=last.KEYWORD_ONLY, default=default, annotation=kinds[name])
            for name, default in OPTIONS.items()
        ]
        function.__signature__ = signature.replace(parameters=[*given, *named])
        return function

    return showing


def named(cls: Class) -> Class:
    """Decorates a class of layers: the methods that users call bear its name, and with them Python's own errors about
    their arguments, wherever they are inherited from.
    """
    for name in ("__init__", "forward"):
        if name not in vars(cls):
            method: Any = getattr(cls, name)
            given = method.__code__, method.__globals__, name, method.__defaults__, method.__closure__
            own: Any = types.FunctionType(*given)
            own.__kwdefaults__, own.__annotations__ = method.__kwdefaults__, method.__annotations__
            own.__dict__.update(vars(method))
            own.__qualname__ = f"{cls.__qualname__}.{name}"
            setattr(cls, name, own)
    return cls


def probability(name: str, value: float, of: str) -> float:
    """The value; ValueError, in the words of torch.nn's dropout, for what is no probability."""
    if not isinstance(value, numbers.Number) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1] representing the probability of {of}")
    return value


def divisor(name: str, value: int, of: str, whole: int) -> int:
    """The value; TypeError for what is no int, ValueError for what does not divide `whole`, in the words of torch.nn's
    layers.
    """
    if not isinstance(value, int):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be greater than zero")
    if whole % value != 0:
        raise ValueError(f"{of} must be divisible by {name}, got: {whole} and {value}")
    return int(value)


def positive(name: str, value: float) -> float:
    """The value as a float; ValueError for what is no positive number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} should be a positive number, got: {value!r}")
    return float(value)
