"""Who is timed: this library and what one would use instead, all behind the same few lines.

A provider takes the weights of a torch.nn layer and gives a function from the input to the output. Its weights keep
torch.nn's names and layout, so that gradients can be compared tensor by tensor. The adapters of flashrnn and torchrl
import them when asked; what cannot run says why (`Unavailable`), and the benchmark repeats it.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rnn_gpu

from .cases import Case
from .ledger import version_of

CLASSES = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}


class Unavailable(Exception):
    """A provider cannot serve a case; the message says why."""


@dataclass
class Candidate:
    """A layer ready to be called.

    call: input -> output, laid out as [T, B, ...], or [B, T, ...] if batch_first. parameters: those with a gradient, by
    the names of torch.nn. detail: which kernels serve it.
    """

    call: Callable[[Tensor], Tensor]
    parameters: dict[str, Tensor]
    detail: str
    batch_first: bool = False


def torch_layer(case: Case, device, dtype: torch.dtype, library=nn, **options) -> nn.RNNBase:
    """torch.nn's layer of a case, or another library's that has the same classes."""
    name, more = CLASSES[case.cell]
    options = options | more | dict(num_layers=case.layers, bidirectional=case.directions == 2)
    return getattr(library, name)(case.hidden_size, case.hidden_size, **options, device=device, dtype=dtype)


def _like(weights: nn.RNNBase, case: Case, library=nn, **options) -> nn.RNNBase:
    """A layer of `library` with a copy of these weights."""
    parameter = next(weights.parameters())
    layer = torch_layer(case, parameter.device, parameter.dtype, library, **options)
    layer.load_state_dict(weights.state_dict())
    return layer


class TorchNN:
    """torch.nn: cuDNN on a GPU, ATen's own kernels on a CPU."""

    name = "torch.nn"

    def version(self) -> str:
        """Of the package."""
        return torch.__version__

    def candidate(self, weights: nn.RNNBase, case: Case) -> Candidate:
        """The layer with these weights; Unavailable where it cannot be."""
        layer = _like(weights, case)
        # In bfloat16 PyTorch puts no layer's weights into one piece, says so of every layer, and nobody can change it.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        on_gpu = next(layer.parameters()).is_cuda
        detail = "ATen" if not on_gpu else "cuDNN" if torch.backends.cudnn.enabled else "ATen on CUDA"
        return Candidate(lambda x: layer(x)[0], dict(layer.named_parameters()), detail)


class RnnGpu:
    """This library, on one of its backends; on a CPU on "torch", PyTorch's own kernels."""

    def __init__(self, name: str = "rnn_gpu", backend: str = "triton", memory: str = "full", side_by_side: bool = True):
        self.name, self.backend, self.memory, self.side_by_side = name, backend, memory, side_by_side

    def version(self) -> str:
        """Of the package."""
        return rnn_gpu.__version__

    def candidate(self, weights: nn.RNNBase, case: Case) -> Candidate:
        """The layer with these weights; Unavailable, in the backend's words, where the kernels cannot serve it."""
        from rnn_gpu import backends, settings

        layer = _like(weights, case, rnn_gpu)
        parameter = next(layer.parameters())
        backend = self.backend if parameter.is_cuda else "torch"
        detail = backend if parameter.is_cuda else "ATen through rnn_gpu"
        if parameter.is_cuda:
            device = backends.device_of(parameter.device)
            choice = backends.kernels_for(layer, case.batch_size, parameter.dtype, device, training=True)
            if backend == "triton" and not choice.plans:
                raise Unavailable(choice.reason)
            if backend == "auto":
                detail = f"auto: {choice.name}"

        def call(x: Tensor) -> Tensor:
            with contextlib.ExitStack() as stack:
                stack.enter_context(rnn_gpu.backend(backend))
                stack.enter_context(rnn_gpu.memory(self.memory))
                if not self.side_by_side:
                    stack.enter_context(settings.layer_by_layer())
                return layer(x)[0]

        return Candidate(call, dict(layer.named_parameters()), detail)


class CompiledCells:
    """torch.nn's cells in a Python loop over time, each step compiled: what one writes for a cell of one's own."""

    name = "compiled cells"

    def version(self) -> str:
        """Of the package."""
        return torch.__version__

    def candidate(self, weights: nn.RNNBase, case: Case) -> Candidate:
        """The loop with these weights."""
        # Past the limit torch.compile goes on without compiling, and says so to nobody who does not read its log.
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64
        parameter = next(weights.parameters())
        name, more = CLASSES[case.cell]
        parameters, cells = {}, []
        options = dict(device=parameter.device, dtype=parameter.dtype)
        with torch.no_grad():
            for layer in range(case.layers):
                for direction in range(case.directions):
                    suffix = f"_l{layer}{'_reverse' if direction else ''}"
                    features = case.hidden_size * (case.directions if layer else 1)
                    cell = getattr(nn, f"{name}Cell")(features, case.hidden_size, **more, **options)
                    for kind, own in cell.named_parameters():
                        own.copy_(getattr(weights, kind + suffix))
                        parameters[kind + suffix] = own
                    cells.append(torch.compile(cell))

        def call(x: Tensor) -> Tensor:
            sequence = x.unbind(0)
            for layer in range(case.layers):
                outputs = []
                for direction in range(case.directions):
                    cell = cells[layer * case.directions + direction]
                    state, steps = None, []
                    for step in reversed(sequence) if direction else sequence:
                        state = cell(step, state)
                        steps.append(state[0] if case.cell == "lstm" else state)
                    outputs.append(steps[::-1] if direction else steps)
                sequence = [torch.cat(step, -1) for step in zip(*outputs, strict=True)] if direction else outputs[0]
            return torch.stack(list(sequence))

        return Candidate(call, parameters, "torch.compile of a step, Python loop")


def _one_layer_one_way(case: Case, who: str) -> None:
    if case.layers > 1 or case.directions > 1:
        raise Unavailable(f"this adapter of {who} has one layer and one direction")


class FlashRNN:
    """flashrnn (Pöppel et al., https://pypi.org/project/flashrnn), whose kernels take the input part of the gates.

    The product with the input is torch's, in front of it. The GRU runs on "cuda", which flashrnn itself takes for it.
    """

    name = "flashrnn"

    def __init__(self, backend: str = "cuda_fused"):
        self.backend = backend
        self.functions = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "elman"}

    def version(self) -> str:
        """Of the package."""
        return version_of("flashrnn")

    def candidate(self, weights: nn.RNNBase, case: Case) -> Candidate:
        """The layer with these weights, batch first, as flashrnn has it."""
        _one_layer_one_way(case, "flashrnn")
        if case.cell not in self.functions:
            raise Unavailable(f"flashrnn has no {case.cell}")
        parameter = next(weights.parameters())
        if not parameter.is_cuda and self.backend.startswith("cuda"):
            raise Unavailable("flashrnn's kernels need a CUDA device")
        try:
            from flashrnn import flashrnn
        except Exception as error:  # it builds CUDA code when it is imported: much can fail
            raise Unavailable(f"flashrnn cannot be imported: {error}") from error
        function = getattr(flashrnn, "flashrnn", flashrnn)  # some versions have a module of the same name here
        backend = "cuda" if case.cell == "gru" and self.backend == "cuda_fused" else self.backend
        layer, size = _like(weights, case), case.hidden_size
        w_ih, w_hh, b_ih, b_hh = (
            getattr(layer, f"{kind}_l0") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )

        def call(x: Tensor) -> Tensor:
            gates = nn.functional.linear(x, w_ih).view(*x.shape[:2], -1, 1, size)  # [B, T, G, heads, H]
            recurrent = w_hh.view(-1, 1, size, size)  # [G, heads, H, H before]
            if case.cell == "gru":  # its slots: hidden n, r, z, input n; the first three have a hidden side
                recurrent = torch.stack([recurrent[2], recurrent[0], recurrent[1]])
                inner, outer = b_ih.view(3, 1, size), b_hh.view(3, 1, size)
                bias = torch.stack([outer[2], inner[0] + outer[0], inner[1] + outer[1], inner[2]])
            else:
                bias = (b_ih + b_hh).view(-1, 1, size)
            states, _ = function(
                gates, recurrent, bias, function=self.functions[case.cell], backend=backend, dtype=case.dtype
            )
            return states[0].reshape(*x.shape[:2], size)  # [S, B, T, heads, H]: h is the first of the states

        return Candidate(call, dict(layer.named_parameters()), backend, batch_first=True)


class TorchRL:
    """torchrl's LSTMModule and GRUModule with their Triton kernels, called with a TensorDict, as they have to be."""

    name = "torchrl"

    def __init__(self, backend: str = "triton"):
        self.backend = backend

    def version(self) -> str:
        """Of the package."""
        return version_of("torchrl")

    def candidate(self, weights: nn.RNNBase, case: Case) -> Candidate:
        """The module with these weights, batch first, no step starting anew."""
        if case.cell not in ("lstm", "gru"):
            raise Unavailable(f"torchrl has no module for {case.cell}")
        if case.dtype != "float32":
            raise Unavailable("torchrl's kernels keep weights and states in float32")
        if case.directions > 1:
            raise Unavailable("torchrl takes cuDNN for both directions")
        parameter = next(weights.parameters())
        if not parameter.is_cuda and self.backend == "triton":
            raise Unavailable("torchrl's kernels need a CUDA device")
        try:
            from tensordict import TensorDict
            from torchrl.modules import GRUModule, LSTMModule
        except Exception as error:
            raise Unavailable(f"torchrl cannot be imported: {error}") from error
        states = ["h", "c"] if case.cell == "lstm" else ["h"]
        try:
            module = (LSTMModule if case.cell == "lstm" else GRUModule)(
                input_size=case.hidden_size,
                hidden_size=case.hidden_size,
                num_layers=case.layers,
                in_keys=["x", *states, "is_init"],
                out_keys=["y", *[("next", state) for state in states]],
                recurrent_backend=self.backend,
                default_recurrent_mode=True,
                device=parameter.device,
            )
        except TypeError as error:
            raise Unavailable(f"this version of torchrl has no recurrent_backend: {error}") from error
        parameters = {name.rsplit(".", 1)[-1]: own for name, own in module.named_parameters()}
        with torch.no_grad():
            for name, own in parameters.items():
                own.copy_(getattr(weights, name))
        rows = {}  # the states and marks for each size of input, made once

        def call(x: Tensor) -> Tensor:
            shape = x.shape[:2]
            if shape not in rows:
                rows[shape] = {state: x.new_zeros(*shape, case.layers, case.hidden_size) for state in states}
                rows[shape]["is_init"] = torch.zeros(*shape, 1, dtype=torch.bool, device=x.device)
            return module(TensorDict({"x": x, **rows[shape]}, shape))["y"]

        return Candidate(call, parameters, self.backend, batch_first=True)


PROVIDERS = {
    provider.name: provider
    for provider in (
        RnnGpu(),
        RnnGpu("auto", "auto"),
        RnnGpu("lean", memory="lean"),
        RnnGpu("layer by layer", side_by_side=False),
        TorchNN(),
        CompiledCells(),
        FlashRNN(),
        TorchRL(),
    )
}
# The others are asked for by name: they are not installed everywhere, and compiled cells take half a minute a case.
DEFAULT_PROVIDERS = ("rnn_gpu", "torch.nn")


@contextlib.contextmanager
def float32_precision(precision: str):
    """Within this context all float32 products, of RNNs and others, are made as "tf32" or "ieee" says.

    PyTorch's own default is tf32 inside cuDNN's RNNs and full products elsewhere, this library's input products among
    them: then the two would not do the same work.
    """
    switches = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = precision
    try:
        yield
    finally:
        for switch, setting in zip(switches, before, strict=True):
            switch.fp32_precision = setting


def interpreted() -> bool:
    """Whether Triton's interpreter would run the kernels, which measures nothing."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
