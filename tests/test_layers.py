"""The layers as drop-ins for torch.nn on PyTorch's own kernels: constructors, parameters, results, errors, backends,
explain.
"""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch

import rnn_gpu
from tests.layers import STATES, draw, outcome, pair, same

NAMES = tuple(STATES)
SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 2, "batch_first": True, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("kwargs", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_torch_nn_on_the_cpu(name, kwargs):
    """Catches: any difference, to the bit, from torch.nn where torch.nn's own kernels run; an override that changes
    results.
    """
    ours, _ = pair(name, 5, 7, **kwargs)
    theirs = same(ours, torch.float32)
    input, states = draw(ours, 4, 3)
    for given in (None, states):
        mine, other = (outcome(layer, input, given, "auto") for layer in (ours, theirs))
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_weights_and_state_dicts_go_both_ways(name):
    """Catches: parameters of another order, name, shape or initialisation, and state dicts that only load one way."""
    kwargs = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(3)
    ours = getattr(rnn_gpu, name)(4, 6, **kwargs)
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(4, 6, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    getattr(torch.nn, name)(4, 6, **kwargs).load_state_dict(ours.state_dict())
    getattr(rnn_gpu, name)(4, 6, **kwargs).load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "name, args, kwargs",
    [
        *[(name, (3, 0), {}) for name in NAMES],
        *[(name, (0, 3), {}) for name in NAMES],
        *[(name, (3, 4, 0), {}) for name in NAMES],
        *[(name, (3.0, 4), {}) for name in NAMES],
        *[(name, (3, 4), {"dropout": 1.5}) for name in NAMES],
        *[(name, (3, 4), {"dropout": True}) for name in NAMES],
        *[(name, (3, 4), {"bias": 1}) for name in NAMES],
        *[(name, (3, 4), {"batch_first": 0}) for name in NAMES],
        *[(name, (3, 4), {"proj_size": 2}) for name in ("GRU", "RNN")],
        ("LSTM", (3, 4), {"proj_size": 4}),
        ("LSTM", (3, 4), {"proj_size": -1}),
        ("RNN", (3, 4), {"nonlinearity": "sigmoid"}),
        ("RNN", (3, 4, 1, "elu"), {}),
        *[(name, (3, 4), {"no_such_argument": 1}) for name in NAMES],
    ],
)
def test_bad_constructor_arguments_raise_as_in_torch_nn(name, args, kwargs):
    """Catches: another exception type or another text than torch.nn's, or none."""
    with pytest.raises(Exception) as theirs:
        getattr(torch.nn, name)(*args, **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(rnn_gpu, name)(*args, **kwargs)
    if not isinstance(theirs.value, TypeError) or "unexpected keyword" not in str(theirs.value):
        assert str(ours.value) == str(theirs.value)


def test_rnn_takes_the_nonlinearity_fourth_by_position():
    """Catches: a shifted positional argument, which would read bias as the nonlinearity or the reverse."""
    layer = rnn_gpu.RNN(3, 4, 2, "relu", False)
    assert (layer.nonlinearity, layer.mode, layer.bias, layer.num_layers) == ("relu", "RNN_RELU", False, 2)


def test_dropout_on_one_layer_warns():
    """Catches: the loss of torch.nn's warning."""
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        rnn_gpu.LSTM(3, 4, dropout=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_packed_input_and_projection_go_to_torch(name):
    """Catches: a packed input or a projection that the wrapper does not hand on untouched on the CPU."""
    kwargs = {"proj_size": 3} if name == "LSTM" else {}
    torch.manual_seed(0)
    ours = getattr(rnn_gpu, name)(5, 7, **kwargs)
    theirs = getattr(torch.nn, name)(5, 7, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 5) for n in (2, 4, 3)], enforce_sorted=False)
    mine, other = ours(packed), theirs(packed)
    assert torch.equal(mine[0].data, other[0].data)
    for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in (mine[1], other[1])), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name):
    """Catches: a layer that cannot be copied, pickled, or used from its copy."""
    layer = getattr(rnn_gpu, name)(3, 4)
    input = torch.randn(2, 1, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(input)[0], layer(input)[0])


def test_arguments_of_forward_are_named_as_in_torch_nn():
    """Catches: calls by keyword, `layer(input=..., hx=...)`, that stop working."""
    assert list(inspect.signature(rnn_gpu.LSTM.forward).parameters) == ["self", "input", "hx", "lengths", "resets"]


def test_backend_context():
    """Catches: a setting that leaks out of its context, also by an exception, or an unknown name taken silently."""
    before = rnn_gpu.current_backend()
    with rnn_gpu.backend("torch"):
        assert rnn_gpu.current_backend() == "torch"
        with pytest.raises(RuntimeError), rnn_gpu.backend("auto"):
            raise RuntimeError
        assert rnn_gpu.current_backend() == "torch"
    assert rnn_gpu.current_backend() == before
    with pytest.raises(ValueError, match="Unknown backend 'cuda'"), rnn_gpu.backend("cuda"):
        pass


@pytest.mark.compiled  # with TRITON_INTERPRET=1 the kernels take CPU tensors
def test_triton_on_cpu_tensors_raises_and_says_why():
    """Catches: a silent fall-back where the user asked for the kernels."""
    with rnn_gpu.backend("triton"), pytest.raises(RuntimeError, match=r"the input is on cpu.*TRITON_INTERPRET=1"):
        rnn_gpu.LSTM(3, 4)(torch.randn(2, 1, 3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["h200", "h100", "a100", "rtx3090", "rtx4090", "rtx5090", "b200"])
def test_explain_says_what_and_why(name, device):
    """Catches: an explanation without the plan, the reason or the estimate, or one that fails for a known device."""
    text = rnn_gpu.explain(getattr(rnn_gpu, name)(512, 512, dtype=torch.bfloat16), 16, device)
    for word in ("backend 'auto' takes", "forward:", "backward:", "programs", "estimated", "us a step", "cuDNN"):
        assert word in text


def test_explain_names_the_reason_for_torch():
    """Catches: a fall-back whose reason the user never sees; wrong arguments accepted."""
    assert "float64" in rnn_gpu.explain(rnn_gpu.LSTM(8, 8).double(), 4, "h200")
    with pytest.raises(ValueError, match="CUDA device or a GPU it knows"):
        rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "cpu")
    with pytest.raises(ValueError, match="Unknown device 'gtx 970'"):
        rnn_gpu.explain(rnn_gpu.LSTM(8, 8), 4, "gtx 970")
    with pytest.raises(TypeError, match="Linear"):
        rnn_gpu.explain(torch.nn.Linear(3, 4), 4)


def test_explain_says_where_the_factors_of_a_projection_would_be_better():
    """Catches: a projected layer explained as a plain one; advice given where the product stays on the chip."""
    small = rnn_gpu.explain(rnn_gpu.LSTM(64, 256, proj_size=64, dtype=torch.bfloat16), 8, "h200")
    large = rnn_gpu.explain(rnn_gpu.LSTM(64, 4096, proj_size=64, dtype=torch.bfloat16), 8, "h200")
    assert "projection:" in small and "no extra exchange" in small
    assert "the factors would be better" in large


def test_works_without_triton():
    """Catches: an import of Triton on the way to `import rnn_gpu`, a layer on ATen, explain, or python -m rnn_gpu."""
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import runpy, torch, rnn_gpu
output, _ = rnn_gpu.LSTM(3, 4)(torch.randn(2, 1, 3))
output.sum().backward()
print(rnn_gpu.explain(rnn_gpu.LSTM(3, 4), 2, "h200"))
rnn_gpu.check()
runpy.run_module("rnn_gpu", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_results_in_its_dtype(name, dtype):
    """Catches: results or states in another type than autocast's, as torch.nn gives, or none where ATen refuses
    float16.
    """
    layer = getattr(rnn_gpu, name)(4, 8, num_layers=2, bidirectional=True)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    for input in (torch.randn(3, 2, 4), packed):
        with torch.autocast("cpu", dtype):
            output, states = layer(input)
        output = output.data if input is packed else output
        assert {t.dtype for t in (output, *(states if isinstance(states, tuple) else (states,)))} == {dtype}
        layer.zero_grad()
        output.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
        with torch.no_grad():
            exact, _ = layer(input)
        torch.testing.assert_close(output.float(), exact.data if input is packed else exact, atol=0.03, rtol=0.03)
