"""A kernel launched again and again with the same compile-time arguments, without Triton's binder: what depends on the
version of Triton.

Triton's own launch binds some forty arguments by name and looks each of them over before it finds the kernel that it
compiled; most of a launch's time on the host. What it finds is called the same way in the versions below.
"""

import triton

from .interpreter import interpreting
from .machine_code import untested

# Whether compiled kernels are called as below: seen in the source of the versions that the kernels were tried with, and
# compared by a test with what Triton itself hands over.
_known = not untested() and not interpreting()


class Prepared:
    """A kernel with its compile-time arguments, and with the options it is compiled with.

    All launches of one `Prepared` must have arguments of the same types, None at the same places, the same device, and
    addresses that are multiples of 16 where the kernel's are specialized on that. check: it is given
    the compiled kernel before the first launch.
    """

    def __init__(self, kernel, constants: dict, options: dict, check=None):
        self.kernel, self.keywords = kernel, constants | options
        count = len(kernel.arg_names) - len(constants)
        assert set(kernel.arg_names[count:]) == set(constants), "compile-time arguments come last"
        self.names = tuple(kernel.arg_names[:count])
        self.tail = tuple(constants[name] for name in kernel.arg_names[count:])
        self.compiled, self.check = None, check

    def launch(self, grid: tuple[int, int, int], stream: int | None, arguments: tuple) -> None:
        """Launch on a stream of the current device, None in the interpreter; arguments: all but the compile-time
        ones.
        """
        compiled = self.compiled
        if self.check is not None:
            self.check(self.kernel.warmup(*arguments, grid=grid, **self.keywords))
            self.check = None
        if compiled is None or _hooked():
            compiled = self.kernel[grid](*arguments, **self.keywords)
            self.compiled = compiled if _known and _callable_directly(compiled) else None
        else:
            run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
            run(*grid, stream, function, metadata, None, None, None, *arguments, *self.tail)


def _hooked() -> bool:
    """Whether somebody wants to be told of launches, as Triton's profiler does."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _callable_directly(compiled) -> bool:
    """Whether Triton gave what the versions above give."""
    return all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata"))
