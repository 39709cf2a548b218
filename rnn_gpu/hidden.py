"""Recurrent layers that a model does not know of: in plain containers, where torch.nn.Module looks for none.

Anything may hang on a module: what loads when it is looked at, what raises, what holds the world. So nothing but
containers, dataclasses and modules are looked into, near ones first and nothing twice; an error ends a look without a
word; and looks are counted.
"""

import collections
import dataclasses
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules.rnn import RNNBase, RNNCellBase

RECURRENT = RNNBase, RNNCellBase
REGISTERED = "_modules", "_parameters", "_buffers"  # the attributes of a module that hold its parts
# What is inside none; most of what containers hold, and not even queued.
ATOMS = {int, float, complex, bool, str, bytes, type(None), torch.Tensor, torch.nn.Parameter}
MOST_LOOKS = 10_000  # of an attribute: a list of numbers may be long, and layers lie near its beginning or nowhere
MOST_IN_ALL = 20 * MOST_LOOKS  # of a model: tenths of a second
LONGEST = 100  # characters of the way to a layer


def hidden_layers(model: torch.nn.Module, wanted: Callable[[torch.nn.Module], bool]) -> list[str]:
    """The ways to recurrent layers and cells that are wanted and no part of the model: of each attribute of its modules
    the first, and how many more.
    """
    search, found = _Search(model, wanted), []
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in REGISTERED or not (ways := search.within(attribute, value)):
                continue
            way = f"{name}.{ways[0]}".lstrip(".")
            way = way if len(way) <= LONGEST else f"{way[: LONGEST // 2]}...{way[-LONGEST // 2 :]}"
            found.append(f"{way} and {len(ways) - 1} more" if len(ways) > 1 else way)
    return found


class _Search:
    """What has been seen of a model. seen: by its identity; apart: modules that do not hold the model."""

    def __init__(self, model: torch.nn.Module, wanted: Callable[[torch.nn.Module], bool]):
        self.model, self.wanted, self.left = model, wanted, MOST_IN_ALL
        self.seen = {id(module) for module in model.modules()}
        self.apart: set[int] = set()

    def within(self, way: str, value: Any) -> list[str]:
        """The ways to layers in the value of an attribute."""
        found, waiting, looks = [], collections.deque([(way, value)]), min(MOST_LOOKS, self.left)
        self.left -= looks
        while waiting:
            way, one = waiting.popleft()
            if type(one) in ATOMS or id(one) in self.seen:
                continue
            inside: list[tuple[str, Any]] = []
            try:
                if isinstance(one, RECURRENT):
                    found += [way] if self.wanted(one) else []
                elif not (isinstance(one, torch.nn.Module) and self._holds_the_model(one)):
                    inside.extend(itertools.islice(_inside(one), looks))
            except Exception:  # whose it is may raise what it likes
                continue
            looks -= len(inside)
            if inside or isinstance(one, RECURRENT):
                self.seen.add(id(one))
            waiting.extend((way + step, inner) for step, inner in inside if type(inner) not in ATOMS)
        self.left += looks
        return found

    def _holds_the_model(self, module: torch.nn.Module) -> bool:
        if id(module) in self.apart:
            return False
        parts = list(module.modules())
        if any(one is self.model for one in parts):
            return True
        self.apart.update(map(id, parts))
        return False


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container, a dataclass or a module holds, each with how Python writes the way to it; nothing of others."""
    if isinstance(value, torch.nn.Module):
        yield from ((f".{name}", one) for name, one in value.named_children())
        yield from ((f".{name}", one) for name, one in vars(value).items() if name not in REGISTERED)
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]" if isinstance(key, str | int) else "[...]", one) for key, one in value.items())
    elif isinstance(value, list | tuple | collections.deque):
        yield from ((f"[{index}]", one) for index, one in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from (("[...]", one) for one in value)
    elif isinstance(value, types.SimpleNamespace):
        yield from ((f".{name}", one) for name, one in vars(value).items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{one.name}", getattr(value, one.name, None)) for one in dataclasses.fields(value))
