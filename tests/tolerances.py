"""The one place where tolerances live, and the one error rule of the project.

The rule, per tensor, by norm. With error = norm(result - oracle) and the oracle computed in float64:

    error <= max(PEER_FACTOR * error of the peer, FLOOR_EPS * eps of the result's dtype * norm(oracle))

The peer is torch.nn's result on the same data in the same dtype, or a plain loop's in that dtype where
torch.nn cannot compute in it (tf32 on a CPU). So a result has to be about as good as what users have today,
whatever the dtype and the length of the sequence, and no tolerance is picked by hand. The floor is for peers
that happen to be nearly exact: without it some right results fail.

And in the mean: over a sample of problems, the mean ratio of a result's error to the peer's is at most 1, but for what
the sample itself leaves uncertain (`assert_no_worse_in_the_mean`). The factor above allows for single results, whose
errors are random; it would also let every result be a little worse.

By norm and not by element, because rounding errors scale with the largest terms of a sum, not with its
result. Anything not finite, on any side, fails. No test has a tolerance of its own.
"""

import math

import torch
from torch import Tensor

PEER_FACTOR = 1.5
FLOOR_EPS = 4

# Two float64 computations of the same mathematics in another order, relative by norm. Measured over 8,861
# comparisons of the oracle's tests with other seeds: median 6e-17, largest 3e-13, where a sum of few terms
# cancels. A wrong term, or a step in float32, is at least 1e-8.
SAME_MATHEMATICS = 1e-11

# The standard errors of the mean that a sample may lie above 1: a mean that is 1 lies higher once in 740 samples.
NOISE_FACTOR = 3
# But never more than this, however little a sample shows.
MOST_NOISE = 0.1

# The functions of kernels/cells.py: largest error in units in the last place of float32, for (from, to, at from, at to)
# of x, in between on a straight line; tanh by |x|. Correctly rounded is 0.5. A sixth above what was measured over every
# 128th float32 in the interpreter, where exp2 and the reciprocal are correctly rounded. For x < 0 the argument of exp2
# is rounded, which costs sigmoid 2.5 + 1.2 |x| (kernels/cells.py says why it may).
FUNCTION_ULPS = {
    "tanh": ((0, 0.65, 0.9, 0.9), (0.65, 1, 1.9, 1.9), (1, 2, 1.4, 1.4), (2, torch.inf, 0.75, 0.75)),
    "sigmoid": ((-87.3, 0, 107.3, 2.5), (0, 4, 1.3, 1.3), (4, torch.inf, 0.65, 0.65)),
}
# What exp2 (2) and the reciprocal (1) of a GPU may add, by the PTX manual, in units of the last place of their own.
GPU_ULPS = 3

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def norm(tensor: Tensor) -> float:
    """Euclidean norm of all elements, computed in float64 on the CPU; 0.0 for an empty tensor."""
    return torch.linalg.vector_norm(tensor.detach().cpu().double()).item()


def absolute_error(actual: Tensor, oracle: Tensor) -> float:
    """norm(actual - oracle) in float64. Refuses other shapes, which broadcasting would hide."""
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    return norm(actual.detach().cpu().double() - oracle.detach().cpu().double())


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """Error over the oracle's norm, in float64. An oracle of norm zero gives 0.0 if met exactly, else inf."""
    error, scale = absolute_error(actual, oracle), norm(oracle)
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return error / scale


def allowed_error(dtype: torch.dtype, peer_error: float, oracle: Tensor) -> float:
    """The right side of the rule; peer_error is absolute, 0.0 where there is no peer."""
    return max(PEER_FACTOR * peer_error, FLOOR_EPS * EPS[dtype] * norm(oracle))


def assert_close_to_oracle(actual: Tensor, oracle: Tensor, peer: Tensor | None = None, name: str = "result") -> None:
    """Apply the rule. Without a peer only the floor is allowed, which few results but plain copies meet."""
    assert oracle.dtype == torch.float64, f"{name}: the oracle is {oracle.dtype}, expected float64"
    peer_error = 0.0
    if peer is not None:
        assert peer.dtype == actual.dtype, f"{name}: the peer is {peer.dtype}, the result {actual.dtype}"
        peer_error = absolute_error(peer, oracle)
    error, allowed = absolute_error(actual, oracle), allowed_error(actual.dtype, peer_error, oracle)
    # "<=" is false for NaN; the second test keeps a peer that overflowed from allowing everything.
    if not (error <= allowed and allowed < float("inf")):
        raise AssertionError(
            f"{name} ({actual.dtype}, shape {tuple(actual.shape)}): error {error:.3e}, allowed {allowed:.3e} "
            f"(peer's error {peer_error:.3e}, norm of the oracle {norm(oracle):.3e})"
        )


def assert_same_mathematics(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Two float64 results of the same mathematics: equal but for the order of operations."""
    assert actual.dtype == expected.dtype == torch.float64, f"{name}: {actual.dtype} and {expected.dtype}"
    error = relative_error(actual, expected)
    assert error <= SAME_MATHEMATICS, f"{name}: relative error {error:.3e}, allowed {SAME_MATHEMATICS:.0e}"


def assert_no_worse_in_the_mean(errors: list[tuple[float, float]], name: str = "result") -> None:
    """The rule in the mean, for pairs (error, error of the peer), one of each problem of a sample.

    The mean is that of the ratio's logarithm: of two equals either is then as often above the other, which no
    arithmetic mean of ratios gives.
    """
    assert all(peer > 0 for _, peer in errors), f"{name}: an exact peer leaves nothing to compare"
    logarithms = torch.tensor(errors, dtype=torch.float64).log().diff(dim=1).neg()
    mean, noise = logarithms.mean().item(), NOISE_FACTOR * logarithms.std().item() / len(errors) ** 0.5
    allowed = min(noise, MOST_NOISE)
    if not mean <= allowed:  # also for NaN
        raise AssertionError(
            f"{name}: mean ratio of the errors {math.exp(mean):.4f} over {len(errors)} problems, "
            f"allowed {math.exp(allowed):.4f}"
        )
