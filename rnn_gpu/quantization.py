"""What torch.ao.quantization sees of this library's modules: it looks for torch.nn's classes by name, and passes by."""

import warnings
from typing import Any


class NotQuantized:
    """A module that warns when torch.ao.quantization passes it by: the attribute `qconfig` is what it sets on every
    module before it looks for those that it can quantize.
    """

    __jit_unused_properties__ = ("qconfig",)  # torch.jit.script compiles properties otherwise

    @property
    def qconfig(self) -> Any:
        """As torch.ao.quantization has set it; AttributeError where it has not."""
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        warnings.warn(
            f"torch.ao.quantization leaves rnn_gpu.{type(self).__name__} as it is: to quantize it, call "
            "rnn_gpu.restore_rnns(model) before (docs/limits.md)",
            stacklevel=2,
        )
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]
