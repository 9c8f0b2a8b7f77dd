"""Learning by recursion: equations 26 and 27 by hand, Bayesian linear regression in the limit, a tiny classification."""

from __future__ import annotations

import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from miracle_ban import convert
from miracle_ban.errors import MiracleError
from miracle_ban.layers import example_gradients, loss_at, posteriors, use_mode
from miracle_ban.recursion import MeanPrecision, fit_recursively

QUIET = {"progress": False}


def pair(mean: list[float], std: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64).log()


@pytest.mark.parametrize("epochs", [1, 4])
def test_one_step_is_the_update_of_the_equations(epochs):
    pairs = [pair([1.0, -2.0], [0.5, 0.1]), pair([0.3], [2.0])]
    gradients = [[3.0, -0.7], [0.25]]
    expected = []
    for (mean, log_std), own in zip(pairs, gradients, strict=True):
        for m, s, g in zip(mean.tolist(), log_std.exp().tolist(), own, strict=True):
            precision = 1 / s**2 + g**2 / epochs  # (27)
            expected.append((m - g / precision / epochs, precision**-0.5))  # (26)
    optimizer = MeanPrecision(pairs, epochs)
    for (mean, _), own in zip(pairs, gradients, strict=True):
        mean.grad = torch.tensor(own, dtype=torch.float64)
    optimizer.step()
    found = [(m, math.exp(s)) for mean, log_std in pairs for m, s in zip(mean.tolist(), log_std.tolist(), strict=True)]
    assert [v for f in found for v in f] == pytest.approx([v for e in expected for v in e], rel=1e-12)


def test_a_batch_gives_the_sum_of_its_examples_squares():
    mean, log_std = pair([1.0, -2.0], [0.5, 0.1])
    each = torch.tensor([[3.0, 1.0], [-2.5, 0.5], [0.1, -4.0]], dtype=torch.float64)
    mean.grad = each.sum(0)
    MeanPrecision([(mean, log_std)], epochs=2).step([each.square().sum(0)])
    for k, (m, s) in enumerate(((1.0, 0.5), (-2.0, 0.1))):
        own = each[:, k].tolist()
        precision = 1 / s**2 + sum(g * g for g in own) / 2
        assert float(log_std[k].exp()) == pytest.approx(precision**-0.5, rel=1e-12)
        assert float(mean[k]) == pytest.approx(m - sum(own) / 2 / precision, rel=1e-12)


def test_a_pair_without_a_gradient_stays():
    mean, log_std = pair([1.0], [0.5])
    MeanPrecision([(mean, log_std)], epochs=1).step()
    assert mean.tolist() == [1.0]
    assert log_std.exp().tolist() == pytest.approx([0.5])


@pytest.mark.parametrize("epochs", [0, 0.5, -1])
def test_less_than_one_epoch_is_refused(epochs):
    with pytest.raises(MiracleError, match="epochs"):
        MeanPrecision([pair([1.0], [0.5])], epochs)
    with pytest.raises(MiracleError, match="epochs"):
        fit_recursively(convert(nn.Linear(2, 2)), [], F.cross_entropy, epochs=epochs, **QUIET)


def test_one_pass_of_linear_regression_comes_to_the_exact_posterior():
    """y = w x + noise, one weight, one example at a time; 400 regressions side by side, the rules work on each weight alone.

    In units where noise and E[x^2] are 1, the precision after step i is about k + i, k being that of the prior, and the gradient at
    drawn weights is x (noise + x (error of the mean + draw)). Its square has mean 1 + 2 E[x^4] / (k + i) and variance
    3 E[x^4] - 1 = 4.4 for uniform x. The mean misses the exact one by what a precision that is off by a random walk of that variance,
    and the draws, contribute: a sum of terms of variance (4.4 + E[x^4]) / (k + i), over the precision.
    """
    replicas, n, k, noise = 400, 3000, 300, 0.6
    unit = 1 / noise**2
    truth = 0.2 + torch.randn(replicas, dtype=torch.float64) / math.sqrt(k * unit)  # drawn from the prior
    mean, log_std = pair([0.2], [(k * unit) ** -0.5])
    mean, log_std = mean.repeat(replicas), log_std.repeat(replicas)
    precision = torch.full_like(mean, k * unit)
    eta = precision * mean  # of the exact posterior
    optimizer = MeanPrecision([(mean, log_std)], epochs=1)
    for _ in range(n):
        x = math.sqrt(3) * (2 * torch.rand(replicas, dtype=torch.float64) - 1)
        y = truth * x + noise * torch.randn(replicas, dtype=torch.float64)
        w = mean + log_std.exp() * torch.randn_like(mean)
        mean.grad = -(y - w * x) * x * unit
        optimizer.step()
        precision += x**2 * unit
        eta += x * y * unit
    found = (-2 * log_std).exp() / unit
    fourth, log_ratio = 9 / 5, math.log((k + n) / k)
    z = stats.norm.isf(helpers.FALSE_ALARM / (8 * replicas))  # false alarm 1e-6 for all that follows, by Bonferroni
    bias, spread = 2 * fourth * log_ratio, math.sqrt((3 * fourth - 1) * n)
    spread *= 1.1  # 2 E[x^4] / (k + i), at most 1.2 %, comes on top of the noise's variance; the rest is for tails of a sum of squares
    assert bool(((found - k - n - bias).abs() < z * spread).all())
    assert abs(float(found.mean()) - k - n - bias) < z * spread / math.sqrt(replicas)
    miss = (mean - eta / precision) * math.sqrt(unit) * (k + n)
    spread = 1.1 * math.sqrt((3 * fourth - 1 + fourth) * log_ratio)
    assert bool((miss.abs() < z * spread).all())
    assert abs(float(miss.mean())) < z * spread / math.sqrt(replicas)
    assert z * spread / (k + n) < 0.5 / math.sqrt(k + n)  # a fraction of the posterior's standard deviation


def classification() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    images, labels = helpers.blobs(256, seed=0)
    return convert(helpers.TinyNet()), list(zip(images.split(16), labels.split(16), strict=True))


def test_learning_by_recursion_lowers_the_loss():
    images, labels = helpers.blobs(512, seed=0)
    bnn = convert(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    before = [(p.mean.detach().clone(), 3 * p.mean.detach().square().mean().sqrt()) for p in posteriors(bnn).values()]
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    history = fit_recursively(bnn, batches, F.cross_entropy, epochs=4, prior_std=3.0, **QUIET)
    assert len(history) == 4
    assert history[-1] < 0.5 * history[0]
    with use_mode(bnn, "mean"):
        assert helpers.error_rate(bnn) < 0.1
    for p, (mean, std) in zip(posteriors(bnn).values(), before, strict=True):
        assert bool((p.log_std.exp() < std * 1.0001).all())  # precisions only grow
        assert float(p.log_std.detach().exp().min()) < 0.99 * float(std)
        assert not torch.equal(p.mean, mean)


def test_a_step_of_training_is_that_of_its_examples_gradients_at_the_drawn_weights():
    bnn, batches = classification()
    other = classification()[0]
    x, y = batches[0]
    torch.manual_seed(5)
    history = fit_recursively(bnn, [(x, y)], F.cross_entropy, epochs=1, prior_std=0.2, **QUIET)
    torch.manual_seed(5)
    held = list(posteriors(other).values())
    stds = [0.2 * p.mean.detach().square().mean().sqrt() for p in held]
    weights = [p.mean.detach() + std * torch.randn_like(p.mean) for p, std in zip(held, stds, strict=True)]
    net = helpers.TinyNet()
    leaves = [w.clone().requires_grad_() for w in weights]
    losses = F.cross_entropy(torch.func.functional_call(net, dict(zip(posteriors(other), leaves, strict=True)), x), y, reduction="none")
    each = [torch.autograd.grad(value, leaves, retain_graph=True) for value in losses]
    assert history == pytest.approx([float(losses.mean().detach())], rel=1e-5)
    for k, (p, q) in enumerate(zip(posteriors(bnn).values(), held, strict=True)):
        own = torch.stack([g[k] for g in each])
        precision = 1 / stds[k] ** 2 + own.square().sum(0)
        assert torch.allclose((-2 * p.log_std).exp(), precision, rtol=1e-4)
        assert torch.allclose(p.mean, q.mean - own.sum(0) / precision, rtol=1e-4, atol=1e-6)


def test_gradients_of_examples_are_those_of_one_backward_pass_each():
    bnn, batches = classification()
    x, y = batches[0][0][:5], batches[0][1][:5]
    means = [p.mean.detach() for p in posteriors(bnn).values()]
    found = example_gradients(bnn, means, F.cross_entropy, x, y)
    for i in range(5):
        leaves = [m.clone().requires_grad_() for m in means]
        expected = torch.autograd.grad(loss_at(bnn, leaves, F.cross_entropy, x[i : i + 1], y[i : i + 1]), leaves)
        for all_of_them, own in zip(found, expected, strict=True):
            assert torch.allclose(all_of_them[i], own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(bad):
    bnn, batches = classification()
    with pytest.raises(MiracleError, match="loss"):
        fit_recursively(bnn, batches, lambda out, y: F.cross_entropy(out, y) * bad, epochs=2, **QUIET)
