from __future__ import annotations

import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, distributions, nn

from miracle_ban import convert, kl
from miracle_ban.layers import Posterior, posteriors, use_mode

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2, padding=1), (2, 2, 2)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 2, 2, 3)),
}


def noisy(layer: nn.Module, per_unit: bool = False) -> nn.Module:
    """A converted layer with posteriors of all sizes."""
    bnn = convert(layer, per_unit=per_unit)
    with torch.no_grad():
        for p in posteriors(bnn).values():
            p.mean.normal_()
            p.log_std.uniform_(-3.0, 0.5)
    return bnn


def drawn_weights(bnn: nn.Module, count: int) -> dict[str, Tensor]:
    return {n: p.mean.detach() + p.log_std.detach().exp() * torch.randn(count, *p.mean.shape) for n, p in posteriors(bnn).items()}


@pytest.mark.parametrize("name", LAYERS)
def test_local_noise_has_the_mean_and_variance_of_direct_draws(name):
    make, shape = LAYERS[name]
    layer = make()
    bnn, x, n = noisy(layer), torch.randn(shape), 20_000
    assert bnn.conversion.modules == {"": "local"}
    with torch.no_grad():
        local = bnn(x.expand(n, *shape)).double()  # the noise of every row is its own
        direct = torch.func.vmap(lambda weights: torch.func.functional_call(layer, weights, x[None])[0])(drawn_weights(bnn, n)).double()
        with use_mode(bnn, "mean"):
            mean = bnn(x[None])[0].double()
    # false alarm 1e-6 for all outputs of a layer together; a variance's own spread is var * sqrt(2 / n) for normal outputs
    z = stats.norm.isf(helpers.FALSE_ALARM / (4 * mean.numel()))
    for draws in (local, direct):
        assert bool(((draws.mean(0) - mean).abs() < z * draws.std(0) / math.sqrt(len(draws))).all())
    ratio = local.var(0) / direct.var(0)
    assert bool(((ratio - 1).abs() < z * math.sqrt(4 / n)).all())
    first = local.flatten(1)[:, 0].numpy()
    assert stats.kstest((first - first.mean()) / first.std(), "norm").pvalue > helpers.FALSE_ALARM


def test_layers_without_local_noise_draw_their_weights_once_per_call():
    bnn = noisy(nn.Embedding(5, 3))
    out = bnn(torch.tensor([1, 1, 4]))
    assert out[0].equal(out[1])
    assert not bnn(torch.tensor([1])).equal(out[:1])
    n = 4000
    draws = torch.stack([bnn(torch.tensor([4]))[0] for _ in range(n)]).detach().double()
    p = posteriors(bnn)["weight"]
    std = p.log_std[4].detach().exp().double()
    z = stats.norm.isf(helpers.FALSE_ALARM / 12)  # false alarm 1e-6 for all three values and both moments
    assert bool(((draws.mean(0) - p.mean[4].detach()).abs() < z * std / math.sqrt(n)).all())
    assert bool(((draws.var(0) / std**2 - 1).abs() < z * math.sqrt(2 / n)).all())


class TwoUses(nn.Module):
    """Two layers with one weight; their outputs' difference is zero if both see the same draw."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_tied_weights_have_one_draw_per_forward_pass():
    bnn, x = convert(TwoUses()), torch.randn(3, 4)
    assert len(posteriors(bnn)) == 1
    a, b = bnn(x)
    c, d = bnn(x)
    assert a.equal(b)
    assert c.equal(d)
    assert not a.equal(c)


def expected_kl(p: Posterior, prior_std: Tensor) -> Tensor:
    q = distributions.Normal(p.mean.double(), p.log_std.double().exp())
    prior = distributions.Normal(torch.zeros_like(q.mean), prior_std.double().expand_as(q.mean))
    return distributions.kl_divergence(q, prior)


@pytest.mark.parametrize("per_unit", [False, True])
def test_kl_is_the_sum_over_all_weights_with_the_best_prior(per_unit):
    bnn = noisy(helpers.TinyNet(), per_unit)
    total = torch.zeros((), dtype=torch.float64)
    for p in posteriors(bnn).values():
        second = p.mean.double() ** 2 + p.log_std.double().exp() ** 2
        by_unit = per_unit and second.dim() > 1
        prior = (second.mean(tuple(range(1, second.dim())), keepdim=True) if by_unit else second.mean()).sqrt()
        every = expected_kl(p, prior)
        total = total + every.sum()
        other = expected_kl(p, 1.1 * prior).sum()  # any other scale is worse
        assert float(other.detach()) > float(every.sum().detach())
    assert float(kl(bnn).detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert kl(bnn).shape == ()


def test_kl_to_a_frozen_prior():
    bnn = noisy(nn.Linear(6, 4))
    p = posteriors(bnn)["weight"]
    std = torch.rand(4, 1) + 0.5
    p.freeze_prior(std)
    assert torch.allclose(p.kl().double(), expected_kl(p, std).sum(), rtol=1e-5)
    assert torch.allclose(p.kl_per_weight().double(), expected_kl(p, std), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_elbo():
    bnn, x = noisy(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3))), torch.randn(8, 1, 5, 5)
    (F.cross_entropy(bnn(x), torch.arange(8) % 3) + 1e-3 * kl(bnn)).backward()
    for p in posteriors(bnn).values():
        for grad in (p.mean.grad, p.log_std.grad):
            assert bool(torch.isfinite(grad).all())
            assert float(grad.abs().max()) > 0


def test_gradients_of_a_draw_are_those_of_mean_plus_noise_times_standard_deviation():
    torch.manual_seed(0)
    net = convert(nn.Conv2d(2, 3, 3)).double()
    held, x = posteriors(net), torch.randn(4, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    own = [x, *(v for p in held.values() for v in (p.mean, p.log_std))]
    torch.manual_seed(1)
    out = net(x)
    found = torch.autograd.grad(out.square().sum(), own)
    torch.manual_seed(1)
    (mean, var), (b_mean, b_var) = held["weight"].moments(), held["bias"].moments()
    wanted = F.conv2d(x, mean, b_mean) + F.conv2d(x.square(), var, b_var).sqrt() * torch.randn_like(out)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), own))


def test_draws_go_through_the_transforms_of_torch_func():
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    x = torch.randn(5, 4)

    def energy(row: Tensor) -> Tensor:
        return net(row[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(energy), randomness="different")(x)
    assert each.shape == x.shape
    assert bool(torch.isfinite(each).all())
    value, change = torch.func.jvp(energy, (x[0],), (x[1],))
    assert value.shape == change.shape == ()


def test_gradient_of_the_kl_is_that_of_torch_distributions():
    bnn = noisy(nn.Linear(5, 3))
    p = posteriors(bnn)["weight"]
    p.freeze_prior(torch.tensor([[0.7]]))
    ours = torch.autograd.grad(p.kl(), [p.mean, p.log_std])
    theirs = torch.autograd.grad(expected_kl(p, torch.tensor([[0.7]])).sum(), [p.mean, p.log_std])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_fixed_weights_are_constants_without_kl_and_noise():
    bnn, x = noisy(nn.Linear(6, 4)), torch.randn(3, 6)
    weight, bias = posteriors(bnn)["weight"], posteriors(bnn)["bias"]
    before = float(weight.kl().detach())
    weight.freeze_prior(torch.tensor([[1.0]]))
    each = weight.kl_per_weight().detach().flatten()
    at = torch.tensor([0, 5, 23])
    weight.fix(at, torch.tensor([1.0, -2.0, 3.0]))
    assert before > 0
    assert weight.kl_per_weight().flatten()[at].tolist() == [0.0, 0.0, 0.0]
    assert float(weight.kl().detach()) == pytest.approx(float(each.sum() - each[at].sum()), rel=1e-5)
    mean, var = weight.moments()
    assert mean.flatten()[at].tolist() == [1.0, -2.0, 3.0]
    assert var.flatten()[at].tolist() == [0.0, 0.0, 0.0]
    assert int((var == 0).sum()) == 3
    (kl(bnn) + bnn(x).sum()).backward()
    assert weight.mean.grad.flatten()[at].tolist() == [0.0, 0.0, 0.0]
    assert weight.log_std.grad.flatten()[at].tolist() == [0.0, 0.0, 0.0]
    for p in (weight, bias):
        p.fix(torch.arange(p.mean.numel()), torch.ones(p.mean.numel()))
    with torch.no_grad():
        assert torch.allclose(bnn(x), x.sum(1, keepdim=True) + 1, atol=1e-4)
        assert torch.allclose(bnn(x), bnn(x), atol=1e-4)
    assert float(kl(bnn).detach()) == 0.0


def test_modes_are_put_back_even_after_an_error():
    bnn = noisy(nn.Linear(6, 4))

    def fail() -> None:
        with use_mode(bnn, "mean"):
            assert {p.mode for p in posteriors(bnn).values()} == {"mean"}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {p.mode for p in posteriors(bnn).values()} == {"draw"}


def test_an_error_in_forward_leaves_no_stale_draw():
    bnn = convert(TwoUses())
    with pytest.raises(RuntimeError):
        bnn(torch.randn(3, 5))
    a, b = bnn(torch.randn(3, 4))
    assert a.equal(b)
    x = torch.eye(4)
    assert not bnn(x)[0].equal(bnn(x)[0])


def test_kept_units_come_first_and_the_rest_is_zero():
    p = Posterior("w", torch.arange(12.0).reshape(4, 3))
    p.select(0, torch.tensor([2, 0]))
    p.select(1, torch.tensor([1]))
    assert p.kept == (2, 1)
    assert p.full_shape == (4, 3)
    p.mode = "mean"
    full = p.current().detach()
    assert full.shape == (4, 3)
    assert full[:2, 0].tolist() == [7.0, 1.0]
    assert float(full.abs().sum()) == 8.0


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 0), (2, 3, 1, 2)])
def test_posteriors_of_any_shape(shape):
    p = Posterior("w", torch.ones(shape))
    assert bool(torch.isfinite(p.kl()))
    assert p.current().shape == shape


def test_a_tensor_of_zeros_has_a_finite_posterior():
    p = Posterior("w", torch.zeros(5))
    assert bool(torch.isfinite(p.kl()))
    assert float(p.log_std.detach().exp().min()) > 0
