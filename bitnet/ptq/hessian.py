"""The second-order error of a layer, and the triangular factor that error compensation works with.

For inputs x the layer's squared output error is ``tr(D H D^T)`` with D the error of its weights and H the mean of
x x^T. GPTQ and its relatives need U, upper triangular with ``H^-1 = U^T U``. It comes from one factorization: where J
reverses the order of all columns and ``J H J = L L^T``, it is ``U = J L^-1 J``. No inverse of H is formed.

H is singular where inputs are linearly dependent or never active, so it is damped: ``H + d mean(diag H) I``. Where that
does not suffice in float32 the factorization is tried in float64, and then with ten times the damping, up to 1. The
damping that was used is part of the result. Source: GPTQ, arXiv:2210.17323, sec. 3.3.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitnet.errors import InputError


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """``H^-1 = upper^T upper`` of a damped Hessian.

    Attributes:
        upper: float32 [in, in], upper triangular.
        dead: inputs that were zero in every token; their column of H is that of the identity.
        damping: share of the mean diagonal that was added.
    """

    upper: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    damping: float


def inverse_factor(hessian: Float[Tensor, "in in"], damping: float, order: Tensor | None = None) -> InverseFactor:
    """Factor the inverse of ``hessian``, its rows and columns taken in ``order`` where one is given.

    Raises:
        InputError: NaN or infinity in the Hessian, a damping outside (0, 1], or no damping up to 1 makes it positive
            definite.
    """
    if not 0 < damping <= 1:
        raise InputError(f"damping must be above 0 and at most 1 (a share of the mean diagonal), got {damping}")
    if not bool(torch.isfinite(hessian).all()):
        raise InputError("the Hessian holds NaN or infinity: the layer's inputs do; check the model and its text")
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool((diagonal < 0).any()):
        raise InputError(
            f"the Hessian has {int((diagonal < 0).sum())} negative diagonal entries: it is no mean of x x^T"
        )
    mean = float(diagonal.double().mean()) or 1.0
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    dead, backwards = dead[order], order.flip(0)
    for share in _escalation(damping):
        for dtype in (torch.float32, torch.float64):
            damped = hessian[backwards[:, None], backwards].to(dtype)  # one copy: with the factor and H itself, three
            damped.diagonal().add_(share * mean)
            damped.diagonal()[dead.flip(0)] = 1.0
            lower, failed = torch.linalg.cholesky_ex(damped)
            del damped
            if int(failed) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
                upper = triangular_inverse_(lower).flip(0, 1).float().contiguous()
                return InverseFactor(upper, dead, share)
    raise InputError("the Hessian is not positive definite, whatever the damping: it is no mean of x x^T")


def triangular_inverse_(lower: Float[Tensor, "n n"], leaf: int = 128) -> Float[Tensor, "n n"]:
    """The inverse of a lower triangular matrix, in its place.

    By halves, ``[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]``: a third of the arithmetic of solving for the
    identity, and nearly all of it in matrix products.
    """
    n = len(lower)
    if n <= leaf:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    half = n // 2
    first = triangular_inverse_(lower[:half, :half], leaf)
    second = triangular_inverse_(lower[half:, half:], leaf)
    lower[half:, :half] = second @ lower[half:, :half] @ first.neg()
    return lower


def relative_error(
    weight: Float[Tensor, "out in"], quantized: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> float:
    """``tr(D H D^T) / tr(W H W^T)``, D = W - Q: the output's squared error as a share of the output. 0 for W = 0."""
    weight = weight.to(hessian.dtype)
    difference = weight - quantized.to(hessian.dtype)
    error = float(((difference @ hessian) * difference).sum(dtype=torch.float64))
    size = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
    return error / size if size > 0 else 0.0


def _escalation(damping: float) -> list[float]:
    shares = [damping]
    while shares[-1] < 1:
        shares.append(min(10 * shares[-1], 1.0))
    return shares
