"""Which backend serves a call, and why.

"triton": the persistent kernels. "torch": PyTorch's own layers (ATen, cuDNN). "auto", the default: the kernels for
CUDA tensors wherever they can serve the call and are predicted to be faster, torch elsewhere.
"""

import functools
import importlib.util
import logging
import os
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from . import measured, settings
from .equations import CELL_OF_MODE
from .kernels import cudnn, machine
from .kernels import plan as planning
from .kernels.devices import DEVICES, Device, named, nearest, of_sizes
from .kernels.spec import CELLS, TRITON_VERSIONS

Sizes = tuple[str, int, int, int, str]  # cell, hidden units, batch, sets, type

logger = logging.getLogger("rnn_gpu")


# ---- The route of a call ---------------------------------------------------------------------------------------------


def transforming() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) is at work on a call that nobody compiles."""
    return torch._C._are_functorch_transforms_active()


def plainly_torch(input: Any) -> bool:
    """Whether a call without masks that nobody compiles is torch.nn's own and nothing else; asked first, since one step
    takes microseconds.

    input: a tensor or a PackedSequence.
    """
    return (
        settings.current_backend() != "triton"
        and not getattr(input, "is_cuda", False)
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def route(
    module: Any,
    input: torch.Tensor,
    time: int,
    batch_size: int,
    dtype: torch.dtype,
    packed: bool,
    masked: bool,
    reweighted: bool = False,
    beyond: bool = False,
    unknown: bool = False,
) -> str:
    """How a call is computed: one of `functional.ROUTES`, or "torch.nn" where that class's own forward is.

    input: the input, or, if `packed`, the data of a PackedSequence; time: T; dtype: that of the computation; masked:
    with lengths or resets; reweighted: with other weights than the layer's own (`other_weights`); beyond: with what
    PyTorch's own kernels do not know; unknown: PyTorch has no such layer. RuntimeError where backend "triton" was asked
    for and cannot serve the call.
    """
    tracing = torch.compiler.is_compiling()
    if tracing and torch.onnx.is_in_onnx_export():
        if module.has_another_forward():
            raise RuntimeError(
                f"torch.onnx.export cannot export {module.option_text()}: ONNX has no such operator; call "
                "model.eval() for dropout, and set the others to their defaults (docs/limits.md)"
            )
        return "reference" if unknown else "onnx"
    if not tracing and torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export():  # dynamo=False
        if masked:
            raise RuntimeError(
                "torch.onnx.export(dynamo=False) cannot export lengths and resets: use dynamo=True (docs/limits.md)"
            )
        if reweighted or module.has_another_forward():
            raise RuntimeError(
                f"torch.onnx.export(dynamo=False) cannot export {module.option_text()}: use dynamo=True for heads, "
                "call model.eval() for dropout, and set the others to their defaults (docs/limits.md)"
            )
        return "reference" if unknown else "torch.nn"
    least_time = choose(module, input, batch_size, dtype, packed or masked)
    kernels = least_time is not None and (tracing or masked or reweighted or time >= least_time)
    if tracing:
        return "kernels" if kernels else "opaque"
    if forward_ad._current_level >= 0:
        return "reference"  # no fused kernel has a forward-mode derivative
    return "kernels" if kernels else route_of_torch(module, input, masked, reweighted, beyond, unknown)


def route_of_torch(
    module: torch.nn.RNNBase,
    input: torch.Tensor,
    masked: bool,
    reweighted: bool,
    beyond: bool = False,
    unknown: bool = False,
) -> str:
    """The route of a call that PyTorch's own kernels serve, and nobody compiles; arguments as of `route`."""
    if transforming():
        return "opaque"
    if beyond:
        return "reference"
    # cuDNN's own backward refuses a forward in eval mode; ours asks it for what a training forward keeps.
    if (masked or unknown) and (input.is_meta or isinstance(input, FakeTensor)):
        return "opaque"  # which knows the shapes of its results without looking at the masks
    in_eval_mode = input.is_cuda and torch.is_grad_enabled() and not module.training
    return "aten" if masked or reweighted or unknown or in_eval_mode else "torch.nn"


# ---- What is here ----------------------------------------------------------------------------------------------------


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used, or None."""
    if torch.version.hip is not None and not interpreting():  # whose GPUs are "cuda" to PyTorch, too
        return "the kernels are for NVIDIA GPUs, and this PyTorch is built for AMD's"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@functools.cache
def triton_untested() -> str | None:
    """Why "auto" leaves the kernels alone with the Triton that is installed, or None; says so once.

    Another version may lay tensors out in another way, which is slow, or move a wait, which would be an error. Backend
    "triton" looks for both in the machine code of each kernel before its first launch.
    """
    if triton_missing():
        return None
    from .kernels import machine_code

    if not machine_code.untested():
        return None
    tried = f"{TRITON_VERSIONS[0]} to {TRITON_VERSIONS[-1]}"
    reason = f"its kernels have been tried with Triton {tried}, not with {machine_code.installed()}"
    logger.warning(
        "rnn_gpu: PyTorch's own kernels serve all layers: %s. Backend 'triton' takes them all the same", reason
    )
    return reason


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, or the machine for PTX, so that they take CPU tensors."""
    as_triton_reads_it = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    return as_triton_reads_it or machine.running()


@functools.cache
def _properties(index: int) -> Device:
    found: Any = torch.cuda.get_device_properties(index)
    arch = found.major * 10 + found.minor
    like = named(found.name) or of_sizes(arch, found.multi_processor_count)
    return Device(
        name=found.name,
        arch=arch,
        multiprocessors=found.multi_processor_count,
        shared_memory=getattr(found, "shared_memory_per_block_optin", like.shared_memory),  # not all of AMD's have it
        gigahertz=getattr(found, "clock_rate", 0) / 1e6 or like.gigahertz,  # a driver may know none
        l2_bytes=found.L2_cache_size,
        memory_gigabytes_per_second=like.memory_gigabytes_per_second,
    )


def device_of(device: torch.device | str) -> Device:
    """What the plan must know of a device: "cuda", "cuda:1", a torch.device, or the name of a GPU, such as "H200", or
    its sizes (`kernels.devices.named`). ValueError for what is neither.
    """
    if isinstance(device, str) and (known := named(device)) is not None:
        return known
    try:
        device = torch.device(device)
    except RuntimeError:
        if not isinstance(device, str):  # a number, where there is no such GPU
            raise
        raise ValueError(
            f"Unknown device {device!r}. Select a torch device or a GPU that is known by name, such as "
            f"{', '.join(map(repr, nearest(device)))} (`python -m rnn_gpu explain --devices` lists all); or give "
            "a GPU's compute capability and size: 'sm_89, 24 multiprocessors'."
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"device {str(device)!r} is not available: PyTorch finds no GPU here")
        return _properties(torch.cuda.current_device() if device.index is None else device.index)
    return DEVICES["h200"]  # the interpreter, and plans made where there is no GPU


def precision_of(dtype: str) -> str | None:
    """How float32 products are made, as PyTorch's switches for RNNs say: "tf32" or "ieee"; None for 16-bit types."""
    if dtype != "float32":
        return None
    # As PyTorch resolves it from all of its switches, old and new: after cudnn.allow_tf32 = False it is "none".
    return "tf32" if _switch.fp32_precision == "tf32" else "ieee"


_switch: Any = torch.backends.cudnn.rnn  # looked up once: it is asked at every call


def name_of(dtype: torch.dtype) -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")


# ---- What of a layer a choice depends on -----------------------------------------------------------------------------


def _problem(module: torch.nn.RNNBase, batch_size: int, dtype: torch.dtype) -> Sizes:
    """Cell, hidden units, batch, sets and type of a call, as `plan_for` takes them: no graph can hold a module. Heads
    are sets of fewer units (heads.py).
    """
    heads, directions = heads_of(module), 2 if module.bidirectional else 1
    return cell_of(module), module.hidden_size // heads, batch_size, directions * heads, name_of(dtype)


def heads_of(module: torch.nn.Module) -> int:
    """Heads of a layer, of this library's or of torch.nn's."""
    heads: Any = module.heads if hasattr(type(module), "heads") else 1
    return int(heads)


def cell_of(module: torch.nn.RNNBase) -> str:
    """The name of a layer's cell, of this library's or of torch.nn's layers."""
    return CELL_OF_MODE.get(module.mode, module.mode)


def together_of(module: torch.nn.RNNBase, training: bool) -> int:
    """How many layers of a module may run side by side: all, where what is between them is known within a launch, and
    no backward makes their gates again (lean memory). training: whether there is a backward.
    """
    dropped = module.training and module.dropout >= 1
    lean = saving_of(module, training) == "lean"
    one_by_one = module.bidirectional or module.proj_size or heads_of(module) > 1 or beyond_aten(module)
    return 1 if one_by_one or dropped or lean else module.num_layers


def drops_between(module: torch.nn.RNNBase, training: bool) -> bool:
    """Whether there is dropout between layers that may run side by side."""
    if not module.training or module.dropout == 0:  # no value of a comparison, which Dynamo may have as a symbol
        return False
    return together_of(module, training) > 1


def beyond_aten(module: Any) -> bool:
    """Whether a layer asks for what PyTorch's own kernels do not know."""
    return isinstance(module, torch.nn.RNNBase) and getattr(module, "_beyond_aten", bool)()


def other_weights(module: torch.nn.RNNBase) -> bool:
    """Whether PyTorch's own kernels are given other recurrent weights than a layer's own now, and take another route:
    where some are dropped, and where there are several heads.
    """
    return heads_of(module) > 1 or (module.training and getattr(module, "weight_dropout", 0.0) > 0)


def saving_of(module: torch.nn.RNNBase, training: bool) -> str:
    """What the forward of a layer keeps for a backward: "nothing", "lean" or "full"."""
    return getattr(module, "memory", None) or settings.current_memory() if training else "nothing"


# ---- The backend of a call -------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A backend, "triton" or "torch", the reason, and the plans of the passes where the kernels could serve.

    measured: when the two backends were timed against each other, "" where the reason is an estimate or there is none.
    groups: those of each group of a stack's layers that run side by side; plans: of the first group. least_time: T from
    which on "auto" takes the kernels, whose calls take the host longer.
    """

    name: str
    reason: str
    plans: tuple[planning.Plan, ...] = ()
    measured: str = ""
    groups: tuple[tuple[planning.Plan, ...], ...] = ()
    least_time: int = 1


def choose(
    module: torch.nn.RNNBase, input: torch.Tensor, batch_size: int, dtype: torch.dtype, ragged: bool = False
) -> int | None:
    """T from which on the kernels serve a call, or None: PyTorch's own do. RuntimeError where "triton" was asked for
    and cannot serve it.

    input: the input, or the data of a PackedSequence; dtype: that of the computation; ragged: rows end early or start
    anew.
    """
    wanted = settings.current_backend()
    if wanted == "torch" or (wanted == "auto" and input.device.type != "cuda"):
        return None  # with nothing else read or made, which a compiled graph would look at in every call
    if input.device.type != "cuda" and not (input.device.type == "cpu" and interpreting()):
        raise RuntimeError(
            f"backend 'triton' cannot serve this call: the input is on {input.device.type}. It takes CUDA tensors "
            "(or CPU tensors with TRITON_INTERPRET=1, set before Python starts)."
        )
    training = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        where = -1 if input.device.index is None else input.device.index
        problem = _problem(module, 1, dtype)
        together = together_of(module, training), drops_between(module, training)
        how = ragged, wanted, (module.num_layers, heads_of(module)), beyond_aten(module), *together
        reason = _why_not_compiled(problem, input.device.type, where, *how)
        if reason and wanted == "triton":
            raise RuntimeError(f"backend 'triton' cannot serve this call: {reason}.")
        return None if reason else 1
    if isinstance(batch_size, torch.SymInt):  # of make_fx: what is chosen for the size that it traces with
        batch_size = batch_size.node.hint
    precision = precision_of("float32") if dtype == torch.float32 else None
    sizes = module.mode, module.hidden_size, heads_of(module), module.num_layers, module.bidirectional
    kind = *sizes, batch_size, dtype, input.device
    choices = precision, beyond_aten(module), together_of(module, training), drops_between(module, training)
    key: tuple[Any, ...] = settings.in_force(), kind, training, ragged, *choices
    if measured.anything():  # which is of all that its key says
        key = *key, saving_of(module, training), module.proj_size, other_weights(module)
    choice = _chosen.get(key)
    if choice is None:
        choice = _chosen[key] = _choose(wanted, module, input, batch_size, dtype, training, ragged)
    return choice.least_time if choice.name == "triton" else None


# The choices by all that they depend on, because the same is asked at every call of a layer.
_chosen: dict[tuple[Any, ...], Choice] = {}
_forgotten = 0  # how often they were forgotten


def choose_anew() -> None:
    """Forget what was chosen: something else has been measured."""
    global _forgotten
    _forgotten += 1
    _chosen.clear()


def in_force() -> tuple[Any, ...]:
    """All settings that a choice between the backends, and between plans, depends on."""
    return settings.in_force(), _forgotten


def _choose(
    wanted: settings.Backend, module: Any, input: Any, batch_size: int, dtype: torch.dtype, training: bool, ragged: bool
) -> Choice:
    """`choose` where nothing is compiled and Triton may be used."""
    if missing := triton_missing() or (triton_untested() if wanted == "auto" else None):
        choice = Choice("torch", missing)
    else:
        choice = kernels_for(module, batch_size, dtype, device_of(input.device), training, ragged)
    if wanted == "auto":
        if choice.name == "torch":
            _log_once(module, choice)
        return choice
    if not choice.plans:
        raise RuntimeError(f"backend 'triton' cannot serve this call: {choice.reason}.")
    return choice._replace(name="triton", least_time=1)


@torch.compiler.assume_constant_result
def _why_not_compiled(
    problem: Sizes, kind: str, index: int, ragged: bool, wanted: str, layers: tuple[int, int] = (1, 1),
    beyond: bool = False, together: int = 1, drops: bool = False,
) -> str:  # fmt: skip
    """Why the kernels do not serve a layer, or "": asked once while torch.compile traces, for any batch and length.

    The estimate for one row, forward and backward, stands for all: a graph that chose between backends by the size of
    the batch would be compiled anew for every size. wanted: the backend in force; "triton" compares with nothing, nor
    does a layer `beyond` what PyTorch's own kernels know.
    """
    if missing := triton_missing() or (triton_untested() if wanted == "auto" else None):
        return missing
    device = device_of(torch.device(kind, index) if index >= 0 else kind)
    choice = _weighed(problem, device, True, ragged, layers=layers, together=together, drops=drops)
    return "" if choice.name == "triton" or (choice.plans and (beyond or wanted == "triton")) else choice.reason


def kernels_for(
    module: Any,
    batch_size: int,
    dtype: torch.dtype,
    device: Device,
    training: bool,
    ragged: bool = False,
    precision: str | None = None,
) -> Choice:
    """Whether the kernels can serve a call of `module`, and whether they are predicted to be the faster choice.

    ragged: rows end early or start anew. precision: of float32 products; None: as PyTorch's switches say. It does not
    ask whether Triton is installed.
    """
    problem = _problem(module, batch_size, dtype)
    choice = _weighed(
        problem, device, training, ragged, precision, layers=(module.num_layers, heads_of(module)),
        saving=saving_of(module, training), together=together_of(module, training),
        drops=drops_between(module, training),
    )  # fmt: skip
    if beyond_aten(module):
        choice = choice._replace(least_time=1)
        if choice.plans:
            choice = choice._replace(name="triton", reason=f"PyTorch's own kernels do not know {module.option_text()}")
        return choice
    if not choice.plans or not measured.anything():
        return choice
    found = measured.rival(key_of(module, problem, device, training, ragged, precision))
    if found is None:
        return choice
    both = " forward and backward" if training else ""
    reason = f"measured {found.when}: {found.ours:.2f} us a step{both}, PyTorch's own {found.theirs:.2f}"
    return choice._replace(name=found.name, reason=reason, measured=found.when, least_time=1)


def _weighed(
    problem: Sizes,
    device: Device,
    training: bool,
    ragged: bool,
    precision: str | None = None,
    layers: tuple[int, int] = (1, 1),
    saving: str = "full",
    together: int = 1,
    drops: bool = False,
) -> Choice:
    """`kernels_for` by the estimates alone, for a `_problem` of a module with so many layers and heads; together: of
    which layers so many may run side by side, with dropout between them (`drops`).
    """
    if reason := CELLS[problem[0]].without_kernels:
        return Choice("torch", f"{reason}: it runs as a loop over time in PyTorch, by its step")
    groups = groups_for(
        problem, device, training, ragged, together, precision=precision, saving=saving, drops=drops
    )  # fmt: skip
    if isinstance(groups, str):
        return Choice("torch", groups)
    ours = sum(p.microseconds for plans in groups for p in plans) / together
    estimate = f"estimated {ours:.1f} us a step{' forward and backward' if training else ''}"
    if CELLS[problem[0]].mode is None:
        return Choice("triton", f"{estimate}; PyTorch has no such layer", groups[0], groups=groups)
    theirs = sum(cudnn.cudnn_microseconds(p, device, *layers) for p in groups[0])
    estimate += f", cuDNN {theirs:.1f}{', for each layer' if layers[0] > 1 else ''}"
    if theirs < ours:
        return Choice("torch", estimate, groups[0], groups=groups)
    launches = len(groups) * (layers[0] // together)  # of all layers
    least = cudnn.least_time((theirs - ours) * layers[0] / launches, problem[-1], training)
    return Choice("triton", estimate, groups[0], groups=groups, least_time=least)


def key_of(
    module: torch.nn.RNNBase, problem: Sizes, device: Device, training: bool, ragged: bool,
    precision: str | None,
) -> measured.Key:  # fmt: skip
    """Under which key a comparison of the backends for a call is kept."""
    return measured.key_of_layer(
        *problem, device, module.num_layers, module.proj_size, precision or precision_of(problem[-1]), ragged,
        settings.limits(), saving_of(module, training), other_weights(module), heads_of(module),
    )  # fmt: skip


_logged: set[tuple[Any, ...]] = set()


def _log_once(module: torch.nn.RNNBase, choice: Choice) -> None:
    """Say once for each kind of layer that "auto" fell back, not again for every batch size: a warning where the
    kernels cannot serve it, for information where they can and are estimated to be slower.
    """
    kind = module.mode, module.hidden_size, heads_of(module), module.bidirectional, bool(choice.plans)
    if kind not in _logged:
        _logged.add(kind)
        level = logging.INFO if choice.plans else logging.WARNING
        logger.log(level, "%s: PyTorch's own kernels serve it, not rnn_gpu's: %s", module, choice.reason)


# ---- Plans -----------------------------------------------------------------------------------------------------------


def plan_for(
    cell: str,
    hidden_size: int,
    batch_size: int,
    sets: int,
    dtype: str,
    device: Device,
    backward: bool,
    ragged: bool = False,
    under: tuple[int, bool] | None = None,
    precision: str | None = None,
    saving: str = "full",
    layers: int = 1,
) -> planning.Plan | str:
    """The plan of one pass, or why there is none: the one that was measured to be the fastest, or the model's.

    ragged: rows end early or start anew. under: `limits`, or now's. precision: of float32 products; None: as PyTorch's
    switches say. saving: what a forward keeps, for what was measured. layers: of a stack, that run side by side.
    """
    cap, alone = settings.limits() if under is None else under
    problem = cell, hidden_size, batch_size, sets, dtype, device, backward
    precision, found = precision or precision_of(dtype), None
    if measured.anything():
        found = measured.plan(measured.key_of_plan(*problem, precision, ragged, (cap, alone), saving, layers))
    return planning.cached_plan(*problem, precision, cap or None, alone, ragged, found, layers)


def groups_for(
    problem: Sizes,
    device: Device,
    training: bool,
    ragged: bool,
    layers: int,
    under: tuple[int, bool] | None = None,
    precision: str | None = None,
    saving: str = "full",
    drops: bool = False,
) -> tuple[tuple[planning.Plan, ...], ...] | str:
    """The launches of a stack: of each group of its layers the plans of the passes (`kernels.plan.in_groups`); or why
    there is none: the groups that were measured to be the fastest, or the model's. The same groups in training and in
    inference, where there is a backward: so are the results. drops: dropout between the layers, which takes as many
    registers as ragged rows do.
    """

    def plan_of(size: int, backward: bool) -> planning.Plan | str:
        apart = ragged or (drops and size > 1)
        return plan_for(
            *problem, device, backward, apart, under=under, precision=precision, saving=saving, layers=size
        )  # fmt: skip

    passes, together = (False, True) if training else (False,), layers if settings.side_by_side() else 1
    sizes: tuple[int, ...] = ()
    if together > 1 and measured.anything():
        sizes = measured.groups(key_of_groups(problem, device, ragged or drops, layers, under, precision))
    found = planning.in_groups(together, (False, True) if together > 1 else passes, plan_of, device, sizes)
    if isinstance(found, str) and not training:
        found = planning.in_groups(together, passes, plan_of, device, sizes)
    if isinstance(found, str):
        return found
    return tuple(plans[: len(passes)] for plans in found) * (layers // together)


def step_microseconds(groups: tuple[tuple[planning.Plan, ...], ...], frozen: int, device: Device) -> float:
    """What the passes of a stack's groups are estimated to take a step, with the products for their first layers. Those
    of the first `frozen` layers alone have no backward.
    """
    total, count = 0.0, 0
    for plans in groups:
        count += plans[0].layers
        passes = plans[:1] if count <= frozen else plans
        total += sum(p.microseconds + planning.product_microseconds(p, device) for p in passes)
    return total


def key_of_groups(
    problem: Sizes, device: Device, ragged: bool, layers: int, under: tuple[int, bool] | None = None,
    precision: str | None = None,
) -> measured.Key:  # fmt: skip
    """Under which key the groups of a stack's layers are kept. Arguments as of `groups_for`."""
    precision = precision or precision_of(problem[-1])
    return measured.key_of_groups(*problem, device, layers, precision, ragged, under or settings.limits())
