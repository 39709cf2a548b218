"""What torch.nn's recurrent layers promise, as tests that any backend has to pass, and PyTorch's own samples.

`Machinery` and `Errors` are collected twice: by test_contract.py on PyTorch's kernels and by
test_contract_interpreted.py on ours in Triton's interpreter. Wherever torch.nn has an answer, it is the expected one.
"""

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence

import rnn_gpu
from tests.layers import STATES, draw, outcome, pair, same
from tests.tolerances import assert_close_to_oracle

NAMES = tuple(STATES)
CELLS = ("LSTMCell", "GRUCell", "RNNCell")

every_layer = pytest.mark.parametrize("name", NAMES)


def assert_like_torch_nn(ours, theirs, backend: str) -> None:
    """The error rule for results and all gradients of two float32 layers with the same weights; both are used up."""
    input, states = draw(ours, 4, 3)
    peer = outcome(copy_of(theirs), input, states, "torch")
    expected = outcome(theirs.double(), input, states, "torch")
    actual = outcome(ours, input, states, backend)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert_close_to_oracle(actual[key], value, peer[key], key)


def copy_of(layer):
    """A copy, also of a layer that holds weights made of others, which deepcopy refuses."""
    layer._flat_weights = [w.detach() if w.grad_fn is not None else w for w in layer._flat_weights]
    for key, value in vars(layer).items():
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            vars(layer)[key] = value.detach()
    return copy.deepcopy(layer)


def changed_alike(change, name: str, **kwargs):
    """A layer of rnn_gpu and one of torch.nn with the same weights, both changed by `change`, which returns a layer."""
    ours, _ = pair(name, 5, 20, **kwargs)
    theirs = same(ours, torch.float32)
    changed = []
    for layer in (ours, theirs):
        torch.manual_seed(4)
        changed.append(change(layer))
    return changed


class Half(torch.nn.Module):
    """A parametrization that halves a weight and counts how often it is evaluated."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, weight):
        self.count += 1
        return weight / 2


class WeightDrop(torch.nn.Module):
    """Weight drop as AWD-LSTM does it: the layer's recurrent weight is set anew before every forward."""

    def __init__(self, layer, mask):
        super().__init__()
        self.layer = layer
        self.register_buffer("mask", mask)
        raw = layer.weight_hh_l0
        del layer._parameters["weight_hh_l0"]
        self.weight_hh_l0_raw = torch.nn.Parameter(raw.detach().clone())

    def forward(self, input, hx=None):
        self.layer.weight_hh_l0 = self.weight_hh_l0_raw * self.mask
        return self.layer(input, hx)


class Machinery:
    """What programs do to layers, other than calling them. Sub-classes name the backend."""

    backend: str

    @every_layer
    def test_weight_norm_by_hook(self, name):
        """Catches: a stale weight where torch.nn.utils.weight_norm sets a new one before every forward."""

        def change(layer):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                torch.nn.utils.weight_norm(layer, "weight_hh_l0")
            with torch.no_grad():
                layer.weight_hh_l0_g.mul_(1.5)
            return layer

        ours, theirs = changed_alike(change, name)
        assert {"weight_hh_l0_g", "weight_hh_l0_v"} <= set(dict(ours.named_parameters()))
        assert_like_torch_nn(ours, theirs, self.backend)
        torch.nn.utils.remove_weight_norm(ours, "weight_hh_l0")
        torch.nn.utils.remove_weight_norm(theirs.float(), "weight_hh_l0")
        assert_like_torch_nn(ours, theirs, self.backend)

    @every_layer
    def test_weight_norm_by_parametrization(self, name):
        """Catches: gradients that do not reach the originals of a parametrized weight, and one that cannot be taken
        off again.
        """

        def change(layer):
            parametrizations.weight_norm(layer, "weight_hh_l0")
            with torch.no_grad():
                layer.parametrizations.weight_hh_l0.original0.mul_(1.5)
            return layer

        ours, theirs = changed_alike(change, name)
        assert_like_torch_nn(ours, theirs, self.backend)
        for layer in (ours, theirs.float()):
            parametrize.remove_parametrizations(layer, "weight_hh_l0")
        assert type(ours) is getattr(rnn_gpu, name)
        assert_like_torch_nn(ours, theirs, self.backend)

    @every_layer
    @pytest.mark.parametrize(
        "norm", [torch.nn.utils.spectral_norm, parametrizations.spectral_norm], ids=["hook", "new"]
    )
    def test_spectral_norm(self, name, norm):
        """Catches: a weight that is not divided by its largest singular value, or gradients that ignore it."""

        def change(layer):
            # Many power iterations: a norm that has not converged makes weights that amplify every rounding error.
            norm(layer, "weight_hh_l0", n_power_iterations=50)
            if norm is torch.nn.utils.spectral_norm:  # the new one iterates when it is made
                layer(torch.ones(1, 1, 5))
            return layer.eval()

        assert_like_torch_nn(*changed_alike(change, name), self.backend)

    @every_layer
    def test_spectral_norm_advances_once_a_forward(self, name):
        """Catches: a power iteration that takes several steps a forward, as in torch.nn, so that the weight the layer
        uses depends on how often it was looked at.
        """
        layer = parametrizations.spectral_norm(getattr(rnn_gpu, name)(5, 20), "weight_hh_l0")
        norm = layer.parametrizations.weight_hh_l0[0]
        before = copy.deepcopy(norm)
        with rnn_gpu.backend(self.backend), torch.no_grad():
            layer(torch.randn(2, 1, 5))
            before(layer.parametrizations.weight_hh_l0.original)
        assert torch.equal(norm._u, before._u) and torch.equal(norm._v, before._v)

    @every_layer
    def test_parametrized_weight_is_evaluated_once_a_forward(self, name):
        """Catches: the four evaluations a forward of torch.nn, which cost time and draw several masks of a random
        parametrization.
        """

        def change(layer):
            for weight in layer._flat_weights_names:
                parametrize.register_parametrization(layer, weight, Half())
            return layer

        ours, theirs = changed_alike(change, name, num_layers=2, bidirectional=True)
        lists = ours.parametrizations.values()
        for _ in range(2):
            for each in lists:
                each[0].count = 0
            with rnn_gpu.backend(self.backend):
                ours(torch.randn(2, 1, 5))
            assert [each[0].count for each in lists] == [1] * 16
        assert_like_torch_nn(ours, theirs, self.backend)

    @every_layer
    def test_weight_drop_by_setattr(self, name):
        """Catches: a forward with the weight of the call before, where a program sets `layer.weight_hh_l0` to a plain
        tensor.
        """
        ours, peer = changed_alike(lambda layer: WeightDrop(layer, (torch.rand(20) > 0.5).float()), name)
        oracle, found = copy.deepcopy(peer).double(), []
        for module, backend in ((ours, self.backend), (oracle, "torch"), (peer, "torch")):
            for factor in (2, 0.5):  # a first forward with another weight
                module.weight_hh_l0_raw.data *= factor
                with rnn_gpu.backend(backend):
                    output, _ = module(torch.ones(4, 3, 5, dtype=module.weight_hh_l0_raw.dtype))
            found.append((output, *torch.autograd.grad(output.pow(2).sum(), list(module.parameters()))))
        for actual, expected, peers in zip(*found, strict=True):
            assert_close_to_oracle(actual, expected, peers)

    @every_layer
    def test_pruning(self, name):
        """Catches: a mask that is not applied, or gradients that do not reach the weight under it."""

        def change(layer):
            prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
            return prune.random_structured(layer, "weight_ih_l0", amount=1, dim=0)

        ours, theirs = changed_alike(change, name)
        assert (ours.weight_hh_l0 == 0).float().mean() == pytest.approx(0.5, abs=0.02)
        assert_like_torch_nn(ours, theirs, self.backend)
        for layer in (ours, theirs.float()):
            prune.remove(layer, "weight_hh_l0")
        assert_like_torch_nn(ours, theirs, self.backend)

    @every_layer
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies(self, name, how):
        """Catches: a copy that cannot be made after a forward, computes otherwise, or shares weights with the
        original.
        """

        def change(layer):
            with rnn_gpu.backend(self.backend if isinstance(layer, getattr(rnn_gpu, name)) else "torch"):
                layer(torch.randn(2, 1, 5))[0].sum().backward()
            if how == "deepcopy":
                return copy.deepcopy(layer)
            if how == "pickle":
                return pickle.loads(pickle.dumps(layer))
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            return torch.load(file, weights_only=False)

        ours, theirs = changed_alike(change, name, num_layers=2)
        assert type(ours) is getattr(rnn_gpu, name)
        assert_like_torch_nn(ours, theirs, self.backend)
        other = copy.deepcopy(ours)
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        assert ours.weight_hh_l0.any() and other._flat_weights[1] is other.weight_hh_l0

    @every_layer
    def test_old_pickles(self, name):
        """Catches: a layer from a pickle of an old PyTorch (no proj_size, no flat weights, weights as tensors in
        all_weights) that fails or computes with other weights.
        """

        def change(layer):
            state = layer.__getstate__()
            for key in ("proj_size", "_flat_weights", "_flat_weights_names", "_all_weights"):
                del state[key]
            state["all_weights"] = layer.all_weights
            old = type(layer).__new__(type(layer))
            old.__setstate__(state)
            return old

        ours, theirs = changed_alike(change, name, num_layers=2, bidirectional=True)
        assert ours.proj_size == 0 and ours._flat_weights_names == theirs._flat_weights_names
        assert_like_torch_nn(ours, theirs, self.backend)

    @every_layer
    def test_load_state_dict_by_assignment(self, name):
        """Catches: a forward with the weights from before load_state_dict(assign=True)."""

        def change(layer):
            with torch.no_grad(), rnn_gpu.backend(self.backend if layer.__module__ == "rnn_gpu.modules" else "torch"):
                layer(torch.randn(2, 1, 5))
            layer.load_state_dict({key: torch.randn_like(p) / 4 for key, p in layer.state_dict().items()}, assign=True)
            return layer

        assert_like_torch_nn(*changed_alike(change, name), self.backend)

    @every_layer
    def test_meta_device_then_to_empty(self, name):
        """Catches: weights left on the meta device in a list of the layer's own after to_empty."""

        def change(layer):
            with torch.device("meta"):
                empty = type(layer)(5, 20, num_layers=2)
            assert all(p.is_meta for p in empty.parameters())
            empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
            return empty

        ours, theirs = changed_alike(change, name, num_layers=2)
        assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
        assert_like_torch_nn(ours, theirs, self.backend)

    @every_layer
    def test_functional_call(self, name):
        """Catches: a call with the layer's own weights instead of those given, gradients that do not reach those
        given, or weights that stay behind after the call.
        """
        ours, oracle = pair(name, 5, 20)
        peer = same(ours, torch.float32)
        weights = {key: torch.randn_like(value) / 4 for key, value in ours.state_dict().items()}
        input = torch.randn(4, 3, 5)
        found = []
        for layer, backend in ((ours, self.backend), (oracle, "torch"), (peer, "torch")):
            dtype = layer.weight_hh_l0.dtype
            given = {key: value.to(dtype).requires_grad_() for key, value in weights.items()}
            with rnn_gpu.backend(backend):
                output, _ = torch.func.functional_call(layer, given, (input.to(dtype),))
                gradients = torch.autograd.grad(output.pow(2).sum(), list(given.values()))
                own, _ = layer(input.to(dtype))
            found.append((output, own, *gradients))
        for actual, expected, peers in zip(*found, strict=True):
            assert_close_to_oracle(actual, expected, peers)

    @every_layer
    def test_sub_class_with_its_own_initialisation(self, name):
        """Catches: reset_parameters that is not called by the constructor, or is overruled."""

        class _L(getattr(rnn_gpu, name)):
            def reset_parameters(self):
                for key, value in self.named_parameters():
                    (torch.nn.init.zeros_ if "bias" in key else torch.nn.init.orthogonal_)(value)

        ours = _L(5, 20)
        assert not ours.bias_hh_l0.any()
        theirs = same(ours, torch.float32)
        assert_like_torch_nn(ours, theirs, self.backend)

    @every_layer
    def test_replicas_of_data_parallel(self, name):
        """Catches: a replica that computes with the original's weights, changes the original's lists, or whose
        gradients do not reach the original. The steps are those of torch.nn.parallel.replicate.
        """

        def change(layer):
            replica = layer._replicate_for_data_parallel()
            replica._former_parameters = {}
            for key, value in layer.named_parameters():
                copied = value * 1.5
                setattr(replica, key, copied)
                replica._former_parameters[key] = copied
            return replica

        ours, oracle = pair(name, 5, 20, num_layers=2)
        peer = same(ours, torch.float32)
        input, found = torch.randn(4, 3, 5), []
        for layer, backend in ((ours, self.backend), (oracle, "torch"), (peer, "torch")):
            flat = list(layer._flat_weights)
            with rnn_gpu.backend(backend):
                output, _ = change(layer)(input.to(layer.weight_hh_l0.dtype))
            assert all(a is b for a, b in zip(layer._flat_weights, flat, strict=True))
            found.append((output, *torch.autograd.grad(output.pow(2).sum(), list(layer.parameters()))))
        for actual, expected, peers in zip(*found, strict=True):
            assert_close_to_oracle(actual, expected, peers)

    @every_layer
    def test_hooks(self, name):
        """Catches: hooks of modules and parameters, on which DistributedDataParallel, profilers and fused optimizers
        rely, that do not run, run twice, or whose results are ignored.
        """
        layer, seen = getattr(rnn_gpu, name)(5, 20), []
        layer.register_forward_pre_hook(lambda module, args: seen.append("before") or (args[0] * 2, *args[1:]))
        layer.register_forward_hook(lambda module, args, result: seen.append("after") or (result[0] + 1, result[1]))
        layer.register_full_backward_hook(lambda module, d_input, d_output: seen.append("backward"))
        for key, value in layer.named_parameters():
            value.register_post_accumulate_grad_hook(functools.partial(lambda key, _: seen.append(key), key))
        input = torch.randn(4, 3, 5, requires_grad=True)
        with rnn_gpu.backend(self.backend):
            output, _ = layer(input)
            output.sum().backward()
            bare, _ = layer.forward(2 * input)
        assert torch.equal(output, bare + 1)
        assert sorted(seen) == sorted(["before", "after", "backward", *dict(layer.named_parameters())])

    @every_layer
    def test_lists_of_weights_after_every_move(self, name):
        """Catches: lists of weights that are not those of the layer after half(), to() and the like, and results in
        the type from before.
        """
        layer = getattr(rnn_gpu, name)(5, 20, num_layers=2, bidirectional=True)
        moves = [torch.nn.Module.half, torch.nn.Module.double, torch.nn.Module.float, torch.nn.Module.bfloat16]
        for move in [*moves, lambda m: m.to(torch.float32), lambda m: m.to("cpu", torch.bfloat16), lambda m: m.float()]:
            move(layer)
            layer.flatten_parameters()
            parameters = list(layer.parameters())
            assert all(a is b for a, b in zip(layer._flat_weights, parameters, strict=True))
            listed = [weight for each in layer.all_weights for weight in each]
            assert all(a is b for a, b in zip(listed, parameters, strict=True))
            assert layer._flat_weights_names == list(dict(layer.named_parameters()))
            if self.backend != "triton" or parameters[0].dtype != torch.float64:
                with rnn_gpu.backend(self.backend):
                    output, _ = layer(torch.randn(2, 1, 5).to(parameters[0].dtype))
                assert output.dtype == parameters[0].dtype

    @every_layer
    def test_weights_that_lie_anywhere(self, name):
        """Catches: a warning about weights that are not one contiguous chunk, or wrong results with weights that are
        views, transposed, or tied.
        """

        def change(layer):
            chunk = torch.nn.Parameter(layer.weight_hh_l0.detach().clone()).data.t().contiguous().t()
            layer.weight_hh_l0 = torch.nn.Parameter(chunk)
            layer.weight_ih_l1 = torch.nn.Parameter(layer.weight_ih_l1.detach().repeat(1, 2)[:, :20])
            layer.weight_hh_l1 = layer.weight_hh_l0
            return layer

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours, theirs = changed_alike(change, name, num_layers=2)
            assert not ours.weight_hh_l0.is_contiguous()
            assert_like_torch_nn(ours, theirs, self.backend)

    @every_layer
    def test_optimizer_made_before_the_replacement(self, name):
        """Catches: replace_rnns that makes new parameters, so that an optimizer trains the old ones."""
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"rnn": getattr(torch.nn, name)(5, 20), "head": torch.nn.Linear(20, 1)})
        theirs = copy.deepcopy(model)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, theirs)]
        rnn_gpu.replace_rnns(model)
        assert type(model["rnn"]) is getattr(rnn_gpu, name)
        input = torch.randn(4, 3, 5)
        for _ in range(2):
            for m, optimizer in zip((model, theirs), optimizers, strict=True):
                with rnn_gpu.backend(self.backend):
                    loss = m["head"](m["rnn"](input)[0]).pow(2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert_like_torch_nn(model["rnn"], theirs["rnn"], self.backend)

    @every_layer
    def test_replacement_of_a_parametrized_layer(self, name):
        """Catches: a parametrization that is lost, frozen or not removable once the layer has changed its class."""

        def change(layer):
            layer = getattr(torch.nn, name)(5, 20)
            parametrizations.weight_norm(layer, "weight_hh_l0")
            parametrize.register_parametrization(layer, "bias_hh_l0", Half())
            return layer

        ours, theirs = changed_alike(change, name)
        other = copy.deepcopy(ours)
        assert rnn_gpu.replace_rnns(ours) is ours and isinstance(ours, getattr(rnn_gpu, name))
        assert type(other).__bases__ == (getattr(torch.nn, name),)  # a copy made before shared its class
        assert parametrize.is_parametrized(ours, "weight_hh_l0")
        assert_like_torch_nn(ours, theirs, self.backend)
        for layer in (ours, theirs.float()):
            for key in ("weight_hh_l0", "bias_hh_l0"):
                parametrize.remove_parametrizations(layer, key)
        assert type(ours) is getattr(rnn_gpu, name)
        assert_like_torch_nn(ours, theirs, self.backend)


def _states(name: str, *shape, **kwargs):
    zeros = torch.zeros(*shape, **kwargs)
    return (zeros, zeros.clone()) if name == "LSTM" else zeros


# What is wrong, and the arguments for a layer of input size 3 and hidden size 6 (2 layers): name -> (input, hx).
BAD_CALLS = {
    "input 1-D": lambda name: (torch.zeros(3), None),
    "input 4-D": lambda name: (torch.zeros(2, 2, 2, 3), None),
    "float16 input": lambda name: (torch.zeros(4, 2, 3, dtype=torch.float16), None),
    "integer input": lambda name: (torch.zeros(4, 2, 3, dtype=torch.int64), None),
    "float16 input, unbatched": lambda name: (torch.zeros(4, 3, dtype=torch.float16), None),
    "feature size": lambda name: (torch.zeros(4, 2, 7), None),
    "feature size, unbatched": lambda name: (torch.zeros(4, 7), None),
    "state of other layers": lambda name: (torch.zeros(4, 2, 3), _states(name, 1, 2, 6)),
    "state of another batch": lambda name: (torch.zeros(4, 2, 3), _states(name, 2, 7, 6)),
    "state of another size": lambda name: (torch.zeros(4, 2, 3), _states(name, 2, 2, 5)),
    "2-D state": lambda name: (torch.zeros(4, 2, 3), _states(name, 2, 6)),
    "3-D state, unbatched": lambda name: (torch.zeros(4, 3), _states(name, 2, 1, 6)),
    "4-D state": lambda name: (torch.zeros(4, 2, 3), _states(name, 2, 1, 2, 6)),
    "state of another size, unbatched": lambda name: (torch.zeros(4, 3), _states(name, 2, 5)),
    "no steps": lambda name: (torch.zeros(0, 2, 3), None),
    "no steps, no rows": lambda name: (torch.zeros(0, 0, 3), None),
    "no steps, unbatched": lambda name: (torch.zeros(0, 3), None),
    "state on another device": lambda name: (torch.zeros(4, 2, 3), _states(name, 2, 2, 6, device="meta")),
}
# Where torch.nn's text depends on the kernel that happens to find it: only the type has to be the same.
BAD_CALLS_OF_ANY_TEXT = {
    "state of another type": lambda name: (torch.zeros(4, 2, 3), _states(name, 2, 2, 6, dtype=torch.float64)),
}


class Errors:
    """Every error of forward, in torch.nn's types and words. Sub-classes name the backend."""

    backend: str

    @pytest.mark.parametrize("what", [*BAD_CALLS, *BAD_CALLS_OF_ANY_TEXT])
    @every_layer
    def test_bad_calls_raise_as_in_torch_nn(self, name, what):
        """Catches: another exception type or text than torch.nn's, or a call that goes through."""
        input, hx = {**BAD_CALLS, **BAD_CALLS_OF_ANY_TEXT}[what](name)
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            getattr(torch.nn, name)(3, 6, num_layers=2)(input, hx)
        with rnn_gpu.backend(self.backend), pytest.raises(type(theirs.value)) as ours:
            getattr(rnn_gpu, name)(3, 6, num_layers=2)(input, hx)
        if what in BAD_CALLS:
            assert str(ours.value) == str(theirs.value)

    @every_layer
    def test_bad_calls_of_batch_first_raise_as_in_torch_nn(self, name):
        """Catches: the batch and time dimensions confused in an error."""
        for input, hx in ((torch.zeros(2, 0, 3), None), (torch.zeros(2, 4, 3), _states(name, 1, 4, 6))):
            with pytest.raises(RuntimeError) as theirs:
                getattr(torch.nn, name)(3, 6, batch_first=True)(input, hx)
            with rnn_gpu.backend(self.backend), pytest.raises(RuntimeError) as ours:
                getattr(rnn_gpu, name)(3, 6, batch_first=True)(input, hx)
            assert str(ours.value) == str(theirs.value)

    @every_layer
    def test_weight_of_another_type_raises(self, name):
        """Catches: a layer whose weights have two types, which torch.nn refuses, computed silently."""
        for library in (torch.nn, rnn_gpu):
            layer = getattr(library, name)(3, 6)
            layer.weight_hh_l0.data = layer.weight_hh_l0.data.double()
            with rnn_gpu.backend(self.backend if library is rnn_gpu else "torch"), pytest.raises(RuntimeError):
                layer(torch.zeros(4, 2, 3))

    @every_layer
    def test_weight_on_another_device_raises_as_in_torch_nn(self, name):
        """Catches: a layer half moved to another device that fails inside a kernel, or not at all."""
        found = []
        for library in (torch.nn, rnn_gpu):
            layer = getattr(library, name)(3, 6)
            layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.to("meta"))
            with (
                rnn_gpu.backend(self.backend if library is rnn_gpu else "torch"),
                pytest.raises(RuntimeError) as raised,
            ):
                layer(torch.zeros(4, 2, 3))
            found.append(str(raised.value))
        assert found[0] == found[1]

    @every_layer
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_empty_batch(self, name, batch_first):
        """Catches: a failure, other shapes than torch.nn's, or gradients that are not zero where the batch is empty."""
        found = []
        for library, backend in ((torch.nn, "torch"), (rnn_gpu, self.backend)):
            layer = getattr(library, name)(3, 6, num_layers=2, bidirectional=True, batch_first=batch_first)
            input = torch.zeros(*((0, 4) if batch_first else (4, 0)), 3, requires_grad=True)
            with rnn_gpu.backend(backend):
                output, states = layer(input)
            output.sum().backward()
            assert input.grad.shape == input.shape and not any(p.grad.any() for p in layer.parameters())
            found.append([t.shape for t in (output, *(states if isinstance(states, tuple) else (states,)))])
        assert found[0] == found[1]


# ---- PyTorch's own samples -------------------------------------------------------------------------------------------


@functools.cache
def module_infos() -> dict:
    """PyTorch's descriptions of the recurrent modules, by name, from the torch wheel (needs expecttest)."""
    pytest.importorskip("expecttest")
    frozen = torch.backends.flags_frozen()
    from torch.testing._internal.common_modules import module_db

    if not frozen:  # the import forbids to set flags of torch.backends, which other tests of this process do
        vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True
    names = {*NAMES, *CELLS}
    return {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in names}


def samples(name: str, dtype: torch.dtype, training: bool, packed: bool = False) -> list:
    """PyTorch's sample inputs of a module; packed: also those with packed input."""
    more = {"with_packed_sequence": True} if packed and name in ("GRU", "RNN") else {}
    return list(module_infos()[name].module_inputs_func(None, "cpu", dtype, True, training, **more))


def error_samples(name: str, dtype: torch.dtype, training: bool) -> list:
    """PyTorch's wrong constructions and calls of a module."""
    return list(module_infos()[name].module_error_inputs_func(None, "cpu", dtype, False, training))


def tensors(value) -> list[torch.Tensor]:
    """The tensors of a nested result, a packed sequence's data among them."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for part in value for t in tensors(part)]


def module_of(library, name: str, sample, dtype: torch.dtype, training: bool):
    """The module of a sample, from torch.nn or rnn_gpu, with the same weights in both."""
    torch.manual_seed(0)
    arguments = sample.constructor_input
    module = getattr(library, name)(*arguments.args, **{"dtype": dtype, **arguments.kwargs})
    return module.train(training)


def assert_sample(name: str, sample, dtype: torch.dtype, training: bool, backend: str) -> None:
    """A sample on PyTorch's kernels as on torch.nn, results and gradients, to the bit, and as its reference says."""
    modules = [module_of(library, name, sample, dtype, training) for library in (rnn_gpu, torch.nn)]
    mine, theirs = (results_of(module, sample, b) for module, b in zip(modules, (backend, "torch"), strict=True))
    for actual, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert_reference(modules[0], sample, backend)


def assert_sample_on_kernels(name: str, sample, training: bool) -> None:
    """A sample on the kernels, within the tolerances of torch.testing, as in PyTorch's own test of these samples.

    In training gradients as torch.nn's, at an eighth of the sample's values: at up to 9 the gates are saturated, and
    gradients are differences of nearly equal numbers, in layers of 2 or 3 units, which neither those tolerances nor a
    rule by norm are made for. Else results at their full values, as PyTorch's reference says.
    """
    ours, theirs = (module_of(library, name, sample, torch.float32, training) for library in (rnn_gpu, torch.nn))
    if not training:
        assert_reference(ours, sample, "triton")
        return
    mine, expected = results_of(ours, sample, "triton", 0.125), results_of(theirs, sample, "torch", 0.125)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b)


def results_of(module, sample, backend: str, factor: float = 1.0) -> list[torch.Tensor]:
    """Results and gradients of a sample, its values multiplied by `factor`."""
    arguments = sample.forward_input
    args, kwargs = copied(arguments.args, factor), copied(arguments.kwargs, factor)
    with rnn_gpu.backend(backend):
        results = tensors(module(*args, **kwargs))
    leaves = [t for t in tensors([*args, *kwargs.values()]) if t.requires_grad] + list(module.parameters())
    return [*results, *torch.autograd.grad(sum(t.pow(2).mean() for t in results), leaves)]


def assert_reference(module, sample, backend: str) -> None:
    """The results of a sample as PyTorch's reference of it says, run on PyTorch's kernels; packed input has none."""
    arguments = sample.forward_input
    packed = any(isinstance(argument, PackedSequence) for argument in arguments.args)
    with torch.no_grad():
        with rnn_gpu.backend(backend):
            actual = module(*arguments.args, **arguments.kwargs)
        with rnn_gpu.backend("torch"):
            if packed:
                expected = module(*arguments.args, **arguments.kwargs)
            else:
                expected = sample.reference_fn(module, *arguments.args, **arguments.kwargs)
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b)


def copied(value, factor: float = 1.0):
    """Leaves of their own for every tensor of nested arguments, multiplied by `factor`."""
    if isinstance(value, torch.Tensor):
        return (value.detach() * factor).requires_grad_(value.requires_grad)
    if isinstance(value, PackedSequence):
        return value._replace(data=copied(value.data, factor))
    if isinstance(value, dict):
        return {key: copied(part, factor) for key, part in value.items()}
    return tuple(copied(part, factor) for part in value) if isinstance(value, (tuple, list)) else value


def assert_error_sample(name: str, error, dtype: torch.dtype, training: bool, backend: str) -> None:
    """A wrong construction or call raises on rnn_gpu what PyTorch says it must."""
    sample = error.module_error_input
    with rnn_gpu.backend(backend):
        if error.error_on.name == "CONSTRUCTION_ERROR":
            with pytest.raises(error.error_type, match=error.error_regex):
                module_of(rnn_gpu, name, sample, dtype, training)
            return
        module = module_of(rnn_gpu, name, sample, dtype, training)
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*sample.forward_input.args, **sample.forward_input.kwargs)
