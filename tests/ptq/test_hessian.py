import pytest
import torch

from bitnet.errors import InputError
from bitnet.ptq import LayerStats
from bitnet.ptq.hessian import inverse_factor, relative_error


def test_the_factor_squares_to_the_damped_inverse():
    x = torch.randn(400, 50, dtype=torch.float64) * torch.linspace(0.1, 3, 50)
    hessian = x.T @ x / 400
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(50)
    factor = inverse_factor(hessian.float(), 0.05)
    upper = factor.upper.double()
    assert torch.equal(upper.tril(-1), torch.zeros(50, 50, dtype=torch.float64))
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(50, dtype=torch.float64), atol=1e-4)
    order = torch.randperm(50)
    upper = inverse_factor(hessian.float(), 0.05, order).upper.double()
    assert torch.allclose(upper.T @ upper @ damped[order][:, order], torch.eye(50, dtype=torch.float64), atol=1e-4)


def test_inputs_that_are_never_active_are_named_and_stand_alone():
    x = torch.randn(100, 6)
    x[:, [1, 4]] = 0
    factor = inverse_factor(x.T @ x, 0.01, torch.tensor([5, 4, 3, 2, 1, 0]))
    assert factor.dead.tolist() == [False, True, False, False, True, False]
    assert factor.upper[1].tolist() == [0, 1, 0, 0, 0, 0]


def test_a_singular_hessian_gets_as_much_damping_as_it_needs_and_says_so():
    x = torch.randn(1, 64)
    singular = x.T @ x
    assert inverse_factor(singular, 0.01).damping == 0.01
    noise = torch.randn(64, 64).triu(1) * 0.004 * singular.diagonal().mean()
    indefinite = singular + noise + noise.T
    factor = inverse_factor(indefinite, 0.01)
    assert factor.damping > 0.01
    stats = LayerStats(n_tokens=1, hessian=indefinite)
    stats.inverse_factor(0.01)
    assert stats.damping == factor.damping


def test_what_cannot_be_a_hessian_is_refused():
    with pytest.raises(InputError, match="NaN or infinity"):
        inverse_factor(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), 0.01)
    with pytest.raises(InputError, match="negative diagonal"):
        inverse_factor(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), 0.01)
    with pytest.raises(InputError, match="not positive definite"):
        inverse_factor(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), 0.01)
    with pytest.raises(InputError, match="damping must be"):
        inverse_factor(torch.eye(2), 0.0)


def test_layers_with_the_same_inputs_share_one_factorization():
    stats = LayerStats(n_tokens=1, hessian=torch.eye(4))
    assert stats.inverse_factor(0.01) is stats.inverse_factor(0.01)
    assert stats.inverse_factor(0.01) is not stats.inverse_factor(0.02)


def test_the_relative_error_is_that_of_the_outputs():
    x, weight = torch.randn(300, 20), torch.randn(5, 20)
    rounded = weight.round()
    expected = ((x @ (weight - rounded).T).square().sum() / (x @ weight.T).square().sum()).item()
    assert relative_error(weight, rounded, x.T @ x / 300) == pytest.approx(expected, rel=1e-4)
    assert relative_error(torch.zeros(2, 20), torch.zeros(2, 20), x.T @ x) == 0
