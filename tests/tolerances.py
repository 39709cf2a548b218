"""The one place where tolerances live, and the one error rule of the project.

The rule, per tensor, by norm. With error = norm(result - oracle) and the oracle computed in float64:

    error <= max(PEER_FACTOR * error of the peer, FLOOR_EPS * eps of the result's dtype * norm(oracle))

The peer is torch.nn's result on the same data in the same dtype, or a plain loop's in that dtype where
torch.nn cannot compute in it (tf32 on a CPU). So a result has to be about as good as what users have today,
whatever the dtype and the length of the sequence, and no tolerance is picked by hand. The floor is for peers
that happen to be nearly exact: without it some right results fail.

By norm and not by element, because rounding errors scale with the largest terms of a sum, not with its
result. Anything not finite, on any side, fails. No test has a tolerance of its own.
"""

import torch
from torch import Tensor

PEER_FACTOR = 1.5
FLOOR_EPS = 4

# Two float64 computations of the same mathematics in another order, relative by norm. Measured over 8,861
# comparisons of the oracle's tests with other seeds: median 6e-17, largest 3e-13, where a sum of few terms
# cancels. A wrong term, or a step in float32, is at least 1e-8.
SAME_MATHEMATICS = 1e-11

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
