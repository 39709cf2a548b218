"""What the layers share: a call's way from torch.nn's checks, in torch.nn's words, to the backend that serves it.

They derive from torch.nn's own `RNNBase`, so parameters, names, initialisation, state dicts and repr are PyTorch's.
"""

import operator
import weakref
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import dropout
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import is_tensor_like

from . import backends, distributed, measured, onnx, ready, settings
from .call import Call, directly
from .functional import recurrent_stack
from .heads import whole
from .kernels.spec import CELLS
from .options import OPTIONS, PROBABILITIES, divisor, positive, probability
from .quantization import NotQuantized
from .rows import Rows, packed_rows, past_the_end

State = TypeVar("State", Tensor, tuple[Tensor, Tensor])  # h, or h and c
INTEGERS = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64


@torch.compiler.assume_constant_result  # torch.compile cannot look into it before PyTorch 2.13
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; some devices, meta for one, know none."""
    return _knows_autocast(tensor.device.type) and torch.is_autocast_enabled(tensor.device.type)


def _computed_in(tensor: Tensor) -> torch.dtype:
    """The dtype a tensor is computed in: autocast's where that is on, but for float64 and what is not floating."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point() or not _autocasts(tensor):
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def _sequences(packed: PackedSequence, hx) -> int:
    """The number of sequences in packed input, from a shape where there is one: torch.compile knows shapes, not
    values.
    """
    if packed.sorted_indices is not None:
        return packed.sorted_indices.size(0)
    if torch.compiler.is_compiling() and hx is not None:
        return (hx if isinstance(hx, Tensor) else hx[0]).size(1)
    return int(packed.batch_sizes[0])


def _lengths(lengths: Tensor | Sequence[int]) -> Tensor:
    """Lengths as a tensor; a list becomes one on the CPU. TypeError for anything else than integers."""
    if isinstance(lengths, Tensor):
        if lengths.dtype not in INTEGERS:
            raise TypeError(f"lengths should be an integer tensor, got: {lengths.dtype}")
        return lengths
    try:
        given = list(lengths)
        # A mask; or what has no order of its own.
        if any(isinstance(length, bool) for length in given) or isinstance(lengths, (Set, Mapping)):
            raise TypeError
        # operator.index makes a constant of what torch.compile has as a symbol
        integers = [length if isinstance(length, int) else operator.index(length) for length in given]
    except TypeError:
        raise TypeError(f"lengths should be a tensor or a list of integers, got: {lengths!r}") from None
    return torch.tensor(integers, dtype=torch.int64, device="cpu")


def _check_range(lengths: Tensor, time: int) -> None:
    """RuntimeError for lengths that are not within 0..T, but only where it costs nothing to look: on a GPU the host
    would have to wait, and a graph or a transform holds no values.
    """
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if backends.transforming() or torch._C._len_torch_dispatch_stack() > 0 or lengths.numel() == 0:
        return
    least, most = min(values := lengths.tolist()), max(values)
    if least < 0 or most > time:
        raise RuntimeError(f"Expected lengths between 0 and {time}, got {least if least < 0 else most}")


def _check_resets(resets: Tensor) -> None:
    """TypeError where resets are no tensor of bools."""
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets should be a tensor, got: {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"resets should be a bool tensor, got: {resets.dtype}")


def _cast(value, dtype: torch.dtype):
    """Tensors, tuples of them and packed sequences in dtype; None stays."""
    if value is None or isinstance(value, Tensor | PackedSequence):
        return None if value is None else value.to(dtype)
    return tuple(_cast(one, dtype) for one in value)


class _Layer(NotQuantized, RNNBase, Generic[State]):
    """What the three layers share: the choice of the backend, and torch.nn's checks in torch.nn's words.

    State: what initial and final states are, a tensor or a pair of them.
    """

    # torch.nn's class of the same name, whose forward serves the backend "torch"; None: there is none (own.py).
    _torch_class: Any
    memory: settings.Memory | None = None  # "full", "lean" or, None, as `rnn_gpu.memory` says
    weight_dropout: float = 0.0  # probability of a recurrent weight being zeroed, in training
    recurrent_dropout: float = 0.0  # probability of a unit's h being zeroed before the recurrent product, in training
    zoneout: float | tuple[float, float] = 0.0  # probability of a unit keeping its h (LSTM: of c, and of h) in a step
    clip: float | None = None  # limit of the gradient of h at every step, by element
    return_cells: bool = False  # of the LSTM: c of every step is a result
    heads: int = 1  # blocks along the diagonal of the recurrent weight
    _known_calls: Any = None  # how plain calls went, by all that they depend on (ready.py)
    _watch: Any = None  # sees the h of every step: of `gradient_flow` alone, for the length of a call

    def _build(
        self, mode: str, sizes: tuple[Any, ...], device: torch.device | str | int | None, dtype: torch.dtype | None,
        options: Any,
    ) -> None:  # fmt: skip
        """torch.nn's constructor, with its checks, and the options. sizes: all arguments but for the first and the last
        two. TypeError and ValueError for options that are none.
        """
        options = dict(options)
        if "proj_size" in options:  # None or 0, too, as torch.nn
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        for name in options.keys() - OPTIONS.keys():
            raise TypeError(f"{type(self).__init__.__qualname__}() got an unexpected keyword argument {name!r}")
        heads, unknown = options.pop("heads", 1), self._torch_class is None  # to PyTorch
        others = heads != 1 or unknown  # weights of other shapes than torch.nn's
        RNNBase.__init__(self, mode, *sizes, device="meta" if others else device, dtype=dtype)
        if unknown:
            del self.mode  # the class has it
        if others:
            self.__dict__["heads"] = divisor("heads", heads, "hidden_size", self.hidden_size)
            if self.heads > 1 and self.proj_size > 0:
                raise ValueError("heads are not supported with proj_size")
            self._make_weights(device, dtype)
        for name, value in options.items():
            setattr(self, name, value)

    def _make_weights(self, device: torch.device | str | int | None, dtype: torch.dtype | None) -> None:
        """The weights of this cell and its heads, with initial values, in place of those that torch.nn has made."""
        cell, own = CELLS[backends.cell_of(self)], self._parameters
        shapes = {name: own[name].shape for name in self._flat_weights_names}
        own.clear()
        for names in self._all_weights:
            names.extend(names[0].replace("weight_ih", parameter) for parameter in cell.parameters)
            for name in names:
                shape = [cell.gates * self.hidden_size, *shapes[name][1:]] if name in shapes else [self.hidden_size]
                if name.startswith("weight_hh_l"):
                    shape[1] //= self.heads
                setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def __setattr__(self, attr: str, value: Any) -> None:
        """As torch.nn; ValueError for settings of an option that are none."""
        super().__setattr__(attr, self._checked(attr, value) if attr in OPTIONS else value)

    def _checked(self, option: str, value: Any) -> Any:
        """The value of one of OPTIONS as it is kept."""
        if option == "memory":
            return None if value is None else settings.checked_memory(value)
        if option == "clip":
            return None if value is None else positive(option, value)
        if option == "return_cells":
            if value and self._states == 1:
                raise ValueError(
                    "return_cells argument is only supported for LSTM and cells with states: the state of RNN and GRU "
                    "is the output"
                )
            return bool(value)
        if option == "heads":
            raise AttributeError("heads cannot be changed: the recurrent weights have their shape from it")
        pair = option == "zoneout" and isinstance(value, tuple | list)
        if pair and (self.mode != "LSTM" or len(value) != 2):
            raise ValueError("zoneout should be a number, or for the LSTM a pair of them, of c and of h")
        rates = [probability(option, rate, PROBABILITIES[option]) for rate in (value if pair else [value])]
        if option != "weight_dropout" and self.proj_size > 0 and any(rates):
            raise ValueError("recurrent_dropout and zoneout are not supported with proj_size")
        return tuple(rates) if pair else rates[0]

    def option_text(self) -> str:
        """The options that change results and that torch.nn does not know, as in the layer's repr; "" for none."""
        values = {name: getattr(self, name) for name in OPTIONS if name != "memory"}
        return ", ".join(f"{name}={value}" for name, value in values.items() if value != OPTIONS[name])

    def extra_repr(self) -> str:
        """As torch.nn's, with the options that were given."""
        memory = "" if self.memory is None else f"memory={self.memory}"
        return ", ".join(filter(None, (super().extra_repr(), memory, self.option_text())))

    @property
    def _states(self) -> int:
        """Tensors in the layer's state."""
        return 1 + len(CELLS[backends.cell_of(self)].states)

    def __getstate__(self) -> dict[str, Any]:
        """As torch.nn, without what is remembered of calls."""
        return {name: value for name, value in super().__getstate__().items() if name != "_known_calls"}

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for before it compiles: RuntimeError that says what to do instead."""
        raise RuntimeError(
            f"torch.jit.script cannot compile rnn_gpu.{type(self).__name__}: call rnn_gpu.restore_rnns(model) before "
            "(docs/limits.md)"
        )

    # ---- The way of a call -------------------------------------------------------------------------------------------

    if TYPE_CHECKING:  # torch.nn.Module says that a call gives Any

        @overload
        def __call__(
            self,
            input: Tensor,
            hx: State | None = None,
            *,
            lengths: Tensor | Sequence[int] | None = None,
            resets: Tensor | None = None,
        ) -> tuple[Tensor, State]: ...

        @overload
        def __call__(self, input: PackedSequence, hx: State | None = None) -> tuple[PackedSequence, State]: ...

        def __call__(self, *arguments: Any, **masks: Any) -> Any: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> Any:
        """As torch.nn, and with sequences of different lengths, or that start anew, inside a padded batch.

        input: [T, B, I], [B, T, I] if batch_first, [T, I] unbatched, or a PackedSequence.
        hx: initial states [L*D, B, H], zeros by default; for the LSTM a pair (h_0, c_0).
        lengths: steps of each row, an integer tensor [B] (unbatched: [] or [1]), best on the device of the input, or a
        list; in any order, zero allowed. Outputs past a row's end are zero, its final state is that at its end, the
        reverse direction starts there. Outside of 0..T: RuntimeError for a list or a tensor on the CPU; elsewhere
        (on a GPU, in a graph) taken as the nearer of the two, because nobody looks.
        resets: bool tensor laid out as input without its last dimension, true where a row's state is zeroed before the
        step (in the order in which each direction runs).
        -> output [T, B, D*H] (or as the input is laid out) and final states [L*D, B, H]. Errors are those of torch.nn.
        """
        if forward_ad._current_level >= 0:  # a graph would leave tangents out, inductor's without a word
            return self._outside_of_graphs(input, hx, lengths, resets)
        known = None if torch.compiler.is_compiling() else self._known_calls
        if known and lengths is None and resets is None and (key := ready.key_of(self, input, hx)) is not None:
            found = ready.again(self, known, key, input, hx)
            if found is not None:
                return found
        return self._any_forward(input, hx, lengths, resets)

    @torch.compiler.disable(reason="forward-mode derivatives of rnn_gpu's layers are computed outside of graphs")
    def _outside_of_graphs(self, input, hx, lengths, resets):
        """Every call in a dual level: what Dynamo leaves to Python because of a tangent it leaves frame by frame."""
        return self._any_forward(input, hx, lengths, resets)

    def _any_forward(self, input, hx, lengths, resets):
        """A call that is not remembered: checked, its route chosen, computed."""
        compiling = torch.compiler.is_compiling()
        if not isinstance(input, (Tensor, PackedSequence)):
            return self._forward_other(input, hx, lengths is not None or resets is not None)
        if type(input) is not Tensor and distributed.is_dtensor(input):
            return distributed.forward(self, input, hx, lengths, resets)
        reweighted, beyond = backends.other_weights(self), self._beyond_aten()
        unknown = self._torch_class is None  # to PyTorch
        plain = lengths is None and resets is None and self._watch is None and not (reweighted or beyond or unknown)
        if plain and not compiling and backends.plainly_torch(input):
            return self._torch_class.forward(self, input, hx)
        packed = isinstance(input, PackedSequence)
        if self._wants_another(input):
            return self._as_torch_nn(input, hx)  # which raises, in torch.nn's words
        data = input.data if packed else input
        dtype = _computed_in(data)
        batch_size = data.size(0 if self.batch_first else 1) if data.dim() == 3 else 1
        time = data.size(1 if self.batch_first and data.dim() == 3 else 0) if data.dim() > 0 else 0
        if packed:
            time, batch_size = len(input.batch_sizes), _sequences(input, hx)
        masked = lengths is not None or resets is not None
        if packed and masked:
            raise ValueError("lengths and resets are for padded input, got a PackedSequence")
        if not compiling and measured.automatic and self._watch is None:
            from . import autotuning

            autotuning.first_call(self, input, lengths, resets, batch_size, dtype)
        how, key = (data, time, batch_size, dtype, packed, masked, reweighted, beyond, unknown), None
        route = "reference" if self._watch else backends.route(self, *how)
        if route == "kernels" and not masked and not compiling:
            key = ready.key_of(self, input, hx)
            route = backends.route(self, *how)  # under what the key says, whatever has changed before it was made
        return self._by_route(route, input, hx, batch_size, dtype, lengths, resets, key)

    def _by_route(
        self, route: str, input: Tensor | PackedSequence, hx: Any, batch_size: int, dtype: torch.dtype, lengths, resets,
        key: ready.Key | None = None,
    ) -> Any:  # fmt: skip
        """A call on one of `functional.ROUTES`, or "torch.nn". key: under which it is remembered, if it is."""
        if route == "torch.nn":
            return self._forward_torch(input, hx)
        if route == "onnx" and self.proj_size > 0 and hx is not None:
            onnx.refuse(onnx.NO_PROJECTION)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, batch_size, dtype, route)
        return self._forward_rows(input, hx, dtype, lengths, resets, route, key)

    def _forward_torch(self, input, hx):
        """PyTorch's own kernels; under autocast with results in its dtype, as torch.nn gives for some layers."""
        data = input.data if isinstance(input, PackedSequence) else input
        if not _autocasts(data):
            return self._torch_class.forward(self, input, hx)
        dtype = _computed_in(data)
        weights = self._weights()
        states = () if hx is None else tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        good = hx is None or (len(states) == 2 if self.mode == "LSTM" else isinstance(hx, Tensor))
        tensors = *states, *weights
        if not good or not all(isinstance(t, Tensor) and _computed_in(t) == dtype for t in tensors):
            return self._torch_class.forward(self, input, hx)  # which raises, in torch.nn's words
        if data.device.type == "cuda":  # autocast flattens the weights for cuDNN, and always in float16
            return _cast(self._torch_class.forward(self, input, hx), dtype)
        cast = self.with_weights([weight.to(dtype) for weight in weights])
        with torch.autocast(data.device.type, enabled=False):
            return self._torch_class.forward(cast, _cast(input, dtype), _cast(hx, dtype))

    def _forward_rows(self, input: Tensor, hx, dtype: torch.dtype, lengths, resets, route: str, key=None):
        """Dense input, on any route but torch.nn's own forward."""
        if lengths is not None:
            lengths = _lengths(lengths)
        if resets is not None:
            _check_resets(resets)
        name = self._torch_class.__name__ if self._torch_class is not None else type(self).__name__
        if input.dim() not in (2, 3):
            tensor = " tensor" if name == "RNN" else ""
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead")
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            lengths, resets = self._unbatched_masks(input, lengths, resets)
        if hx is None and route in ("kernels", "opaque"):  # which begin at zero with no tensor
            states = None
            self.check_input(input, None)
        else:
            states = self._initial_states(input, hx, batched)
            self.check_forward_args(input, states if len(states) > 1 else states[0], None)
        input = input.transpose(0, 1) if self.batch_first else input
        if input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        rows = self._masked_rows(input, lengths, resets)
        if rows.lengths is not None:  # what stands in the padding, NaN perhaps, must not reach the weights' gradients
            input = input.masked_fill(past_the_end(rows).unsqueeze(2), 0)
        *flat, final = self._run(input.flatten(0, 1), states, rows, dtype, route, key)
        outputs = []  # not written into `flat`: to torch.compile it is a tuple, before PyTorch 2.13
        for output in flat:
            output = output.unflatten(0, (rows.time, rows.batch))
            output = output.transpose(0, 1) if self.batch_first else output
            outputs.append(output if batched else output.squeeze(0 if self.batch_first else 1))
        if not batched:
            final = tuple(state.squeeze(1) for state in final)
        return outputs[0], final if len(final) > 1 else final[0], *outputs[1:]

    def _forward_packed(self, input: PackedSequence, hx, batch: int, dtype: torch.dtype, route: str):
        """A PackedSequence, read as it lies."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        several = self._states > 1
        self.check_input(data, batch_sizes)
        rows = packed_rows(batch_sizes, batch, data.size(0), data.device)
        if unsorted_indices is not None and unsorted_indices.size(0) != batch:
            got = unsorted_indices.size(0)
            raise RuntimeError(f"Expected unsorted_indices of the {batch} sequences that were packed, got {got}")
        if hx is None:
            states = None if route == "kernels" else self._zero_states(data, batch)
        else:
            if self._torch_class is None:
                self._check_tensors(hx)
            elif several:
                self._check_count(hx)
            self._check_sizes(tuple(hx) if several else (hx,), batch)  # before permuting, which would cut them
            hx = self.permute_hidden(tuple(hx) if several else hx, sorted_indices)
            states = tuple(hx) if several else (hx,)
        *outputs, final = self._run(data, states, rows, dtype, route)
        final = self.permute_hidden(final if several else final[0], unsorted_indices)
        output, *cells = (PackedSequence(one, batch_sizes, sorted_indices, unsorted_indices) for one in outputs)
        return output, final, *cells

    def _run(
        self, input: Tensor, states: tuple[Tensor, ...] | None, rows: Rows, dtype: torch.dtype, route: str, key=None
    ):
        """Rows [R, I] and states, None for zeros on the kernels -> output [R, D*H], with `return_cells` c of every
        step [R, D*H], and the tuple of final states.
        """
        weights, compiling = self._weights(), torch.compiler.is_compiling()
        if compiling or torch._C._get_tracing_state() is None:  # torch.jit.trace warns of every size that is compared
            self._check_weights(weights)
        states, weights = states or (), self._dropped(weights)
        self._check_devices(input, states, weights)
        if input.dtype != dtype or any(tensor.dtype != dtype for tensor in (*states, *weights)):  # autocast
            input, states = input.to(dtype), [state.to(dtype) for state in states]
            weights = [weight.to(dtype) for weight in weights]
        heads = self.heads if route == "kernels" else 1
        if heads != self.heads:
            named = zip(self._flat_weights_names, weights, strict=True)
            weights = [whole(w, self.heads) if name.startswith("weight_hh_l") else w for name, w in named]
        tensors = input, *states, *weights
        if route == "kernels" and heads == 1 and directly(tensors):
            route = "direct"
        saving, transformed = "nothing", not compiling and backends.transforming()
        if transformed:  # who differentiates does not show here, and cannot make the gates again
            saving = "full"
        elif torch.is_grad_enabled() and (
            # A transform inside a graph (torch.compile of torch.func.grad) does not show in its tensors, either.
            (compiling and route == "kernels") or any(tensor.requires_grad for tensor in tensors)
        ):
            saving = self.memory or settings.current_memory()
        if self.return_cells and saving == "nothing" and route in ("kernels", "direct"):  # which keep c for a backward
            saving = "lean"
        cell, (sets, reversed_sets) = backends.cell_of(self), (2, 2) if self.bidirectional else (1, 0)
        h0, *beside = states or (None,)
        c0 = torch.cat(beside, -1) if len(beside) > 1 else beside[0] if beside else None
        dropout = self.dropout if self.training else 0.0
        zoneout = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)  # of c, of h
        clip = self.clip
        if clip is not None and (torch.onnx.is_in_onnx_export() or not torch.is_grad_enabled()):
            clip = None  # which is for gradients alone
        call = Call(
            cell, sets, reversed_sets, biases=self.bias, projected=self.proj_size > 0, route=route, saving=saving,
            limits=settings.limits(), functional=transformed, cells=self.return_cells, clip=clip, watch=self._watch,
            zoneout=(zoneout[1], zoneout[0] if self._states > 1 else 0.0) if any(zoneout) else None,
            recurrent_dropout=self.recurrent_dropout if self.training else 0.0, training=self.training, heads=heads,
            precision=backends.precision_of(backends.name_of(dtype)) if route == "direct" else None,
        )  # fmt: skip
        output, h_n, c_n, cells = recurrent_stack(call, rows, input, h0, c0, weights, dropout)
        if key is not None:
            ready.remember(self, key, weights, call, dropout)
        outputs = (output,) if cells is None else (output, cells)
        if self._states > 2 and cells is not None:
            of_states = cells.unflatten(1, (sets, self._states - 1, self.hidden_size)).unbind(2)
            outputs = output, *(one.flatten(1).contiguous() for one in of_states)
        if self._states > 2:
            return *outputs, (h_n, *(state.contiguous() for state in c_n.chunk(self._states - 1, -1)))
        return *outputs, (h_n,) if c_n is None else (h_n, c_n)

    # ---- What is asked on the way ------------------------------------------------------------------------------------

    def _slow_forward(self, input, hx=None, lengths=None, resets=None):
        """What torch.nn.Module calls while traced: torch.onnx.export(dynamo=False) gives all arguments in order."""
        return super()._slow_forward(input, hx, lengths=lengths, resets=resets)

    def _forward_other(self, input: object, hx: object, masked: bool) -> Any:
        """Input that is neither a tensor nor a PackedSequence: torch.nn's own error, but for torch.fx; its result for
        what has a `__torch_function__`. masked: with lengths or resets.
        """
        if isinstance(input, torch.fx.Proxy):
            raise torch.fx.proxy.TraceError(
                f"torch.fx cannot trace rnn_gpu.{type(self).__name__}: call rnn_gpu.restore_rnns(model) before, and "
                "rnn_gpu.replace_rnns on the traced module; or trace with a Tracer whose is_leaf_module says True for "
                "torch.nn.RNNBase (docs/limits.md)"
            )
        result = self._as_torch_nn(input, hx)
        beyond = masked or self._beyond_aten() or backends.other_weights(self) or self._watch is not None
        if is_tensor_like(input) and not beyond and settings.current_backend() != "triton":
            return result
        raise TypeError(f"input should be a tensor or a PackedSequence, got: {type(input).__name__}")

    def _as_torch_nn(self, input, hx):
        """torch.nn's own forward."""
        return self._torch_class.forward(self, input, hx)

    def _wants_another(self, input: Tensor | PackedSequence) -> bool:
        """Whether the weights are computed in another dtype than the input."""
        data, named = input.data if isinstance(input, PackedSequence) else input, self._flat_weights[0]
        if named.dtype == data.dtype:
            return False
        dtype = _computed_in(data)
        # Asked of the weights of the call before first: to read them again may cost a parametrization.
        return _computed_in(named) != dtype and _computed_in(self._weights()[0]) != dtype

    def _beyond_aten(self) -> bool:
        """Whether a call asks for what PyTorch's own kernels do not know."""
        return self.has_another_forward() or (self.clip is not None and torch.is_grad_enabled())

    def has_another_forward(self) -> bool:
        """Whether the results are now others than those of PyTorch's own kernels."""
        if self.zoneout != 0 or (self.training and self.recurrent_dropout > 0):
            return True  # and no value of a comparison, which Dynamo may have as a symbol
        return self.return_cells

    # ---- Weights -----------------------------------------------------------------------------------------------------

    def _weights(self) -> list[Tensor]:
        """The weights of this call, in torch.nn's order.

        Kept for the next call where they are the layer's own parameters. Others, of a parametrization or put in by
        `torch.func.functional_call`, are this call's alone: a transform's tensors must not outlive it.
        """
        named, read = self._named_weights(), self._flat_weights
        same = len(read) == len(named) and all(w is other for w, other in zip(named, read, strict=True))
        if same or self._are_read(named):
            return read
        if all(isinstance(weight, torch.nn.Parameter) for weight in named):
            self._keep(named)
        return named

    def _named_weights(self) -> list[Tensor | None]:
        """The tensors that bear the weights' names now, each read once: torch.nn reads a parametrized one up to four
        times a forward.
        """
        own = self._parameters  # the dictionary first: torch.nn.Module's accessors are slow
        return [own[name] if name in own else getattr(self, name, None) for name in self._flat_weights_names]

    def _are_read(self, named: list[Tensor | None]) -> bool:
        """Whether `_flat_weights` was made from these tensors. What a user has put into it since then counts, as in
        torch.nn, until a weight is another tensor.
        """
        refs = self._flat_weight_refs
        if len(refs) != len(named):
            return False
        # A weight that is missing says nothing, as in torch.nn, which goes on with the tensor that it had.
        return all(w is None or r is None or r() is w for w, r in zip(named, refs, strict=True))

    def _keep(self, named: list[Tensor | None]) -> None:
        self._flat_weights = named
        self._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in named]

    def _dropped(self, weights: list[Tensor]) -> list[Tensor]:
        """The weights with `weight_dropout` on the recurrent ones, where it is on."""
        if not (self.training and self.weight_dropout > 0):
            return weights
        pairs = zip(self._flat_weights_names, weights, strict=True)
        rates = ((self.weight_dropout if name.startswith("weight_hh_l") else 0, weight) for name, weight in pairs)
        return [dropout(weight, rate) if rate else weight for rate, weight in rates]

    def with_weights(self, weights: list[Tensor]):
        """This layer with other tensors in place of its weights, for the length of a call."""
        other = object.__new__(type(self))
        of_call = {"_flat_weights": weights, "_weights": lambda: weights, "_update_flat_weights": lambda: None}
        other.__dict__ = self.__dict__ | of_call
        return other

    def _update_flat_weights(self) -> None:
        """For torch.nn's own forward: new weights are read, and made the one chunk of memory that cuDNN wants."""
        named = self._named_weights()
        if not self._are_read(named):
            self._keep(named)
            self.flatten_parameters()

    def flatten_parameters(self) -> None:
        """As torch.nn, but not under `fully_shard`: it gathers weights into memory of its own before each forward,
        and would not reach weights that were moved out of it. Nor those of several heads, which cuDNN does not know.
        """
        if self.heads == 1 and not getattr(self, "_is_fsdp_managed_module", False):
            super().flatten_parameters()

    # ---- Rows and states, and torch.nn's checks ----------------------------------------------------------------------

    def _unbatched_masks(self, input: Tensor, lengths: Tensor | None, resets: Tensor | None):
        """The masks of unbatched input, lengths [] or [1] and resets [T], as those of a batch of one row."""
        time = input.size(1 if self.batch_first else 0)
        if resets is not None and resets.shape != (time,):
            raise RuntimeError(f"Expected resets size {[time]}, got {list(resets.shape)}")
        lengths = lengths if lengths is None or lengths.dim() > 0 else lengths.unsqueeze(0)
        return lengths, resets if resets is None else resets.unsqueeze(0 if self.batch_first else 1)

    def _masked_rows(self, input: Tensor, lengths: Tensor | None, resets: Tensor | None) -> Rows:
        """The rows of dense input [T, B, I] with the user's masks, checked."""
        time, batch = input.shape[:2]
        if lengths is not None:
            if lengths.shape != (batch,):
                raise RuntimeError(f"Expected lengths size {[batch]}, got {list(lengths.shape)}")
            _check_range(lengths, time)
            wide = lengths.dtype if lengths.dtype in (torch.int32, torch.int64) else torch.int32  # T must fit in it
            lengths = lengths.to(input.device, wide).clamp(0, time).int()
        if resets is not None:
            got = list(resets.shape)
            resets = resets.transpose(0, 1) if self.batch_first and resets.dim() == 2 else resets
            if resets.shape != (time, batch):
                laid_out = [batch, time] if self.batch_first else [time, batch]
                raise RuntimeError(f"Expected resets size {laid_out}, got {got}")
            resets = resets.to(input.device, torch.int8).contiguous()
        return Rows(time, batch, lengths, None, resets)

    def _zero_states(self, input: Tensor, batch: int) -> tuple[Tensor, ...]:
        """Initial states of zeros [L*D, B, H]: one, or two for the LSTM."""
        sets = self.num_layers * (2 if self.bidirectional else 1)
        h0 = input.new_zeros(sets, batch, self.proj_size or self.hidden_size)
        return h0, *(input.new_zeros(sets, batch, self.hidden_size) for _ in range(self._states - 1))

    def _initial_states(self, input: Tensor, hx, batched: bool) -> tuple[Tensor, ...]:
        """The initial states [L*D, B, H] as a tuple: zeros where the user gave none."""
        if hx is None:
            return self._zero_states(input, input.size(0 if self.batch_first else 1))
        several = self._states > 1
        if self._torch_class is None:
            self._check_tensors(hx)
        rank, kind = (3, "batched 3-D") if batched else (2, "unbatched 2-D")
        if any((hx[i] if several else hx).dim() != rank for i in range(self._states)):  # one after another, as torch.nn
            if several:
                got = ", ".join(f"{hx[i].dim()}-D" for i in range(self._states))
                raise RuntimeError(f"For {kind} input, hx and cx should also be {rank}-D but got ({got}) tensors")
            raise RuntimeError(f"For {kind} input, hx should also be {rank}-D but got {hx.dim()}-D tensor")
        states = tuple(hx[i] for i in range(self._states)) if several else (hx,)
        if several and batched:  # unbatched, torch.nn makes a pair of whatever has two
            self._check_count(hx)
        return states if batched else tuple(state.unsqueeze(1) for state in states)

    def _check_tensors(self, hx) -> None:
        """The errors for states of a cell that torch.nn does not have, which are no tensor, or no tuple of them."""
        if self._states > 1:
            self._check_count(hx)
        for state in hx if self._states > 1 else (hx,):
            if not isinstance(state, Tensor):
                kind = "tuple of Tensors, not tuple of" if self._states > 1 else "Tensor, not"
                name = CELLS[backends.cell_of(self)].name
                raise TypeError(f"{name}(): argument 'hx' must be {kind} {type(state).__name__}")

    def _check_count(self, hx) -> None:
        """The error of torch.nn's LSTM for states that are no pair; or no tuple of as many as the cell has."""
        name = CELLS[backends.cell_of(self)].name
        if isinstance(hx, Tensor):
            raise TypeError(f"{name}(): argument 'hx' must be tuple of Tensors, not Tensor")
        if len(hx) != self._states:
            count = "two" if self._states == 2 else str(self._states)
            raise RuntimeError(f"{name} expects {count} hidden states")

    def _check_sizes(self, states: tuple[Tensor, ...], batch: int) -> None:
        """torch.nn's errors for states [L*D, B, H] of other sizes, from shapes alone: no graph holds values."""
        sets = self.num_layers * (2 if self.bidirectional else 1)
        for i, state in enumerate(states):
            which = f"hidden[{i}]" if len(states) > 1 else "hidden"
            expected = sets, batch, self.hidden_size if i > 0 else self.proj_size or self.hidden_size
            self.check_hidden_size(state, expected, f"Expected {which} size {{}}, got {{}}")

    def _check_weights(self, weights: list[Tensor]) -> None:
        """RuntimeError for weights of another number or size than the layer's, which a kernel would read past their
        end; TypeError for none. In torch.nn's words where it has some.
        """
        cell = CELLS[backends.cell_of(self)]
        gates, state = cell.gates * self.hidden_size, self.proj_size or self.hidden_size
        directions = 2 if self.bidirectional else 1
        sizes: list[tuple[int, ...]] = [(gates, self.input_size), (gates, state // self.heads)]
        sizes += [(gates,)] * (2 if self.bias else 0) + [(state, self.hidden_size)] * (1 if self.proj_size else 0)
        sizes += [(self.hidden_size,)] * len(cell.parameters)
        count, each = self.num_layers * directions, len(sizes)
        if len(weights) != count * each:
            got = f"expected {count * each}, got {len(weights)}"
            raise RuntimeError(f"got an incorrect number of RNN parameters: {got}")
        for i, weight in enumerate(weights):  # by place: what the layer was made as does not count
            expected = (gates, directions * state) if i % each == 0 and i >= directions * each else sizes[i % each]
            if weight is None:
                raise TypeError(f"expected Tensor as element {i} in argument 2, but got NoneType")
            if weight.shape != expected:
                raise RuntimeError(f"Expected {self._flat_weights_names[i]} size {expected}, got {list(weight.shape)}")

    def _check_devices(self, input: Tensor, states: tuple[Tensor, ...], weights: list[Tensor]) -> None:
        """RuntimeError where a tensor is on another device than the input, or is computed in another dtype."""
        dtype = _computed_in(input)
        for what, tensor in [("hidden", state) for state in states] + [("parameter", w) for w in weights]:
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {what} tensors are not at the same device, found input tensor at {input.device} "
                    f"and {what} tensor at {tensor.device}"
                )
            if tensor.dtype != input.dtype and _computed_in(tensor) != dtype:
                raise RuntimeError(
                    f"Input and {what} tensors are not the same dtype, found input tensor with {input.dtype} "
                    f"and {what} tensor with {tensor.dtype}"
                )
