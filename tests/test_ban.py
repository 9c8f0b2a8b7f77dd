"""Bayesian attention: the paper's equations against brute force, what it reduces to, gates, packages for contexts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, distributions, nn

from miracle_ban import BayesianAttention, ban, convert, decode, encode, fit, kl, load, save
from miracle_ban.ban import Subsets, add_evidence, correlations, importance, product_of_experts
from miracle_ban.convert import conversion, drop_units
from miracle_ban.errors import MiracleError, MismatchError
from miracle_ban.layers import Law, posteriors, use_mode
from miracle_ban.teaching import Taught, imitation, mean_network
from miracle_ban.train import train_step

QUIET = {"progress": False}
NOISE = 0.7  # standard deviation of the targets of linear regression
OPEN, SHUT = 2.0, -1.0  # chances of gates, before they are clamped


class Mlp(nn.Module):
    """Points of the plane, 4 classes."""

    def __init__(self, units: int = 16):
        super().__init__()
        self.fc1 = nn.Linear(2, units)
        self.fc2 = nn.Linear(units, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of four Gaussian blobs, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (count,), generator=generator)
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    return corners[label] + 0.3 * torch.randn(count, 2, generator=generator), label


def noisy(net: nn.Module) -> nn.Module:
    """A converted network with posteriors of all sizes, wider than the prior among them."""
    bnn = convert(net)
    with torch.no_grad():
        for p in posteriors(bnn).values():
            p.mean.normal_()
            p.log_std.uniform_(-3.0, 0.5)
    return bnn


def attached(net: nn.Module, inputs: Tensor, **options) -> tuple[nn.Module, BayesianAttention]:
    """A noisy converted network and attention that belongs to it."""
    bnn, attention = noisy(net), BayesianAttention(nn.Flatten(), latent=3, **options)
    attention.attach(bnn, inputs)
    return bnn, attention


def set_gates(attention: BayesianAttention, chances: dict[str, Tensor | float]) -> None:
    """Gates that are the same for every z."""
    last = attention.gate_network[2]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.cat([torch.zeros(n) + chances[name] for name, n in attention.units.items()]))


def set_free(attention: BayesianAttention) -> None:
    """Gates and attention that depend on z as much as they can."""
    with torch.no_grad():
        if attention.gate_network is not None:
            attention.gate_network[2].weight.normal_()
            attention.gate_network[2].bias.normal_()
        for shares in attention.shares:
            shares.share.normal_()
            shares.shift.normal_()


def same_importance(attention: BayesianAttention) -> None:
    """A decoder that finds all training examples, and all prototypes, equally likely."""
    with torch.no_grad():
        attention.expert[2].weight[: attention.latent].zero_()
        if attention.prototype is not None:
            attention.prototype.copy_(attention.prototype[:1].expand_as(attention.prototype))


def everything(targets: Tensor) -> Tensor:
    return torch.ones(len(targets), dtype=torch.bool)


def laws_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(p.law().mean.detach(), p.law().log_std.detach()) for p in posteriors(model).values()]


# --- equation 12 ---


def test_importance_has_mean_one_and_is_proportional_to_the_density():
    log_density = 3 * torch.randn(50, dtype=torch.float64)
    rho = importance(log_density)
    density = [math.exp(v) for v in log_density.tolist()]
    assert rho.tolist() == pytest.approx([50 * d / sum(density) for d in density], rel=1e-6)
    assert float(rho.mean()) == pytest.approx(1.0, abs=1e-6)
    assert importance(log_density + 1e4).tolist() == pytest.approx(rho.tolist(), rel=1e-6)  # no overflow


def test_the_importance_of_inputs_and_of_prototypes_is_that_of_their_statistics():
    x = torch.randn(30, 2)
    _, attention = attached(Mlp(), x, prototypes=4)
    z = torch.randn(3)
    with torch.no_grad():
        direction = z + attention.decoder(z)
        for found, statistics in (
            (attention.importance(x, z), attention.expert(attention.features(x))[:, :3]),
            (attention.attention(z), attention.prototype),
        ):
            density = [math.exp(float(s.double() @ direction.double())) for s in statistics]
            assert found.tolist() == pytest.approx([len(found) * d / sum(density) for d in density], rel=1e-4)
            assert float(found.mean()) == pytest.approx(1.0, abs=1e-6)
            assert float(found.std()) > 0.01


# --- equations 18 and 20 ---


def axis_regression(dimensions: int, each: int) -> tuple[Tensor, Tensor]:
    """Inputs along the axes, `each` for every dimension: X^T X is diagonal however the rows are weighted. And their targets."""
    x = torch.cat([torch.diag(v) for v in torch.randn(each, dimensions, dtype=torch.float64)])
    return x, x @ torch.randn(dimensions, dtype=torch.float64) + NOISE * torch.randn(len(x), dtype=torch.float64)


def exact_posterior(x: Tensor, y: Tensor, rho: Tensor, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and precision matrix of Bayesian linear regression where example i counts rho_i times."""
    precision = torch.diag(prior_precision) + (x.T * rho) @ x / NOISE**2
    return torch.linalg.solve(precision, (x.T * rho) @ y / NOISE**2), precision


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    return bool(((a - b).abs() <= relative * b.abs().clamp_min(1e-3 * b.abs().max())).all())


def test_summed_natural_parameters_are_the_reweighted_posterior():
    x, y = axis_regression(5, 12)
    prior = torch.rand(5, dtype=torch.float64) + 0.5
    rho = importance(torch.randn(len(x), dtype=torch.float64))
    mean, precision = add_evidence(prior, torch.ones(5), (rho @ x**2) / NOISE**2, (rho * y) @ x / NOISE**2)
    exact_mean, exact_precision = exact_posterior(x, y, rho, prior)
    assert close(mean, exact_mean, 1e-5)
    assert close(torch.diag(precision), exact_precision, 1e-5)
    for power in (0.0, 0.3, 1.0, 2.5):  # the same importance for all examples is a power of their evidence
        mean, precision = add_evidence(prior, torch.tensor(power), x.square().sum(0) / NOISE**2, y @ x / NOISE**2)
        exact_mean, exact_precision = exact_posterior(x, y, torch.full((len(x),), power, dtype=torch.float64), prior)
        assert close(mean, exact_mean, 1e-5)
        assert close(torch.diag(precision), exact_precision, 1e-5)


def test_evidence_that_widens_the_prior_counts_at_most_once():
    prior, precision, eta = torch.tensor([2.0, 2.0]), torch.tensor([-1.5, 1.0]), torch.tensor([0.3, 0.3])
    mean, total = add_evidence(prior, torch.tensor(3.0), precision, eta)
    assert total.tolist() == pytest.approx([0.5, 5.0])
    assert mean.tolist() == pytest.approx([0.6, 0.18])


def test_attention_over_groups_of_examples_is_their_common_importance():
    d, groups = 5, 3
    bnn = noisy(nn.Linear(d, 1, bias=False).double())
    p = posteriors(bnn)["weight"]
    with torch.no_grad():
        p.log_std.uniform_(-4.0, -1.0)
    prior = 1.0 / p.group_second_moment().detach().reshape(1).expand(d)
    precision = (-2 * p.log_std).exp().detach()[0]
    x, y = axis_regression(d, 4 * groups)  # scaled and shifted so that the posterior with importance one is the model's own
    x = x * ((precision - prior) * NOISE**2 / x.square().sum(0)).sqrt()
    excess = (precision * p.mean.detach()[0] - y @ x / NOISE**2) / ((precision - prior) / NOISE)
    y = y + x @ excess / NOISE
    group = torch.arange(len(x)) // d % groups
    own_mean, own_precision = exact_posterior(x, y, torch.ones(len(x), dtype=torch.float64), prior)
    assert close(p.mean.detach()[0], own_mean, 1e-9)
    assert close(torch.diag(precision), own_precision, 1e-9)

    attention = BayesianAttention(nn.Flatten(), latent=2, prototypes=groups, gated=False)
    attention.attach(bnn, x)
    attention.double()
    with torch.no_grad():
        attention.prototype.normal_()
        for m in range(groups):  # each prototype holds the evidence of a group
            mine = group == m
            share = x[mine].square().sum(0) / x.square().sum(0)
            attention.shares[0].share[m, 0] = share.log()
            attention.shares[0].shift[m, 0] = (y[mine] @ x[mine] / NOISE**2 / share - precision * p.mean[0]) / (precision - prior)
        for z in torch.randn(5, 2, dtype=torch.float64):
            alpha = attention.attention(z)
            assert float(alpha.std()) > 0.05
            law = attention.laws(bnn, z)["weight"]
            mean, matrix = exact_posterior(x, y, alpha[group], prior)
            assert close(law.mean[0], mean, 1e-5)
            assert close(torch.diag((-2 * law.log_std[0]).exp()), matrix, 1e-5)


# --- equations 16 and 17 ---


def quadrature(mean: Tensor, std: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Points `[k, d]` and weights `[k]` of Gauss-Hermite quadrature under a Gaussian: exact for polynomials below degree 2 nodes."""
    at, weight = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
    weight = weight / weight.sum()
    grid = torch.cartesian_prod(*[at] * len(mean)).reshape(-1, len(mean))
    return mean + std * grid, torch.cartesian_prod(*[weight] * len(mean)).reshape(-1, len(mean)).prod(1)


def covariances(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Covariance of each row of `a` with `b`, values at the points of a quadrature."""
    return ((a - (a @ weight)[:, None]) * (b - b @ weight)) @ weight


def squared_error(out: Tensor, y: Tensor) -> Tensor:
    return 0.5 * ((out - y) / NOISE).square().mean()


def test_the_predictions_log_probability_varies_with_importance_as_the_losses_correlate():
    """Left and middle of equation 17; the derivative in t at t = 0 is taken by autograd, so nothing is approximated."""
    d = 3
    x, y = axis_regression(d, 4)
    prior = torch.rand(d, dtype=torch.float64) + 0.5
    ahead, target = torch.randn(d, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)

    def posterior(rho: Tensor) -> tuple[Tensor, Tensor]:
        return add_evidence(prior, torch.ones(d), (rho @ x**2) / NOISE**2, (rho * y) @ x / NOISE**2)

    def log_probability(t: Tensor, rho: Tensor) -> Tensor:
        """Log of <exp(-t l_a)>: the residual is Gaussian under the posterior, so the integral is known."""
        mean, precision = posterior(rho)
        variance = (ahead.square() / precision).sum() / NOISE**2
        return -0.5 * (1 + t * variance).log() - 0.5 * t * ((target - ahead @ mean) / NOISE).square() / (1 + t * variance)

    rho = importance(torch.randn(len(x), dtype=torch.float64)).requires_grad_()
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(log_probability(t, rho), t, create_graph=True)[0]
    varied = torch.autograd.grad(slope, rho)[0]
    mean, precision = (v.detach() for v in posterior(rho))
    w, weight = quadrature(mean, precision.rsqrt(), 6)
    own = 0.5 * ((y[:, None] - x @ w.T) / NOISE).square()
    expected = covariances(own, 0.5 * ((target - w @ ahead) / NOISE).square(), weight)
    assert float(expected.abs().max()) > 0.01
    assert close(varied, expected, 1e-5)


def brute_correlations(net: nn.Module, model: nn.Module, loss: Callable, training: tuple, prediction: tuple) -> list[float]:
    """Right of equation 17: one example, one backward pass, one sum at a time, through the plain network."""
    law = {name: p.law() for name, p in posteriors(model).items()}

    def gradients(x: Tensor, y: Tensor) -> list[Tensor]:
        mean = {name: v.mean.detach().clone().requires_grad_() for name, v in law.items()}
        scaled = {name: m if law[name].scale is None else m * law[name].scale.detach() for name, m in mean.items()}
        return list(torch.autograd.grad(loss(torch.func.functional_call(net, scaled, x), y), list(mean.values())))

    variance = [(2 * v.log_std.detach()).exp() for v in law.values()]
    ahead = [gradients(x[None], y[None]) for x, y in zip(*prediction, strict=True)]
    found = []
    for x, y in zip(*training, strict=True):
        own = gradients(x[None], y[None])
        each = [sum(float((s * a * b).sum()) for s, a, b in zip(variance, own, other, strict=True)) for other in ahead]
        found.append(sum(each) / len(each))
    return found


@pytest.mark.parametrize("conditioned", [False, True])
def test_correlations_are_those_of_a_loop_over_examples(conditioned):
    net = Mlp(6).double()
    bnn = noisy(net)
    for p in posteriors(bnn).values() if conditioned else ():
        p.conditional = Law(torch.randn_like(p.mean), torch.rand_like(p.mean) - 2, 2 * torch.rand_like(p.mean), None)
    held = [p.conditional for p in posteriors(bnn).values()]
    training = torch.randn(9, 2, dtype=torch.float64), torch.randint(0, 4, (9,))
    prediction = torch.randn(5, 2, dtype=torch.float64), torch.randint(0, 4, (5,))
    found = correlations(bnn, F.cross_entropy, training, prediction)
    expected = brute_correlations(net, bnn, F.cross_entropy, training, prediction)
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert max(map(abs, expected)) > 1e-3
    assert all(p.conditional is law and p.mode == "draw" for p, law in zip(posteriors(bnn).values(), held, strict=True))


def test_of_losses_linear_in_the_weights_correlations_are_the_exact_covariances():
    bnn = noisy(nn.Linear(3, 2).double())
    variance = {name: (2 * p.log_std.detach()).exp() for name, p in posteriors(bnn).items()}
    (x, t), (ahead, target) = ((torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)) for n in (7, 4))
    found = correlations(bnn, lambda out, y: (out * y).sum(1).mean(), (x, t), (ahead, target))
    weight, bias = target.T @ ahead / 4, target.mean(0)  # of the mean loss ahead; the loss is the sum of coefficients times weights
    expected = torch.einsum("ni,nj,ij,ij->n", t, x, weight, variance["weight"]) + t @ (bias * variance["bias"])
    assert close(found, expected, 1e-5)


def test_of_quadratic_losses_correlations_are_the_covariances_to_first_order():
    """The exact covariance of squared errors is J_i S J_a + (x_i S x_a)^2 / 2: correlations leave out the second term only."""
    bnn = noisy(nn.Linear(3, 1).double())
    p, b = posteriors(bnn).values()
    mean, std = (torch.cat([u.detach()[0], v.detach()]) for u, v in ((p.mean, b.mean), (p.log_std.exp(), b.log_std.exp())))
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    found = correlations(bnn, squared_error, (x, y), (x[:1], y[:1]))
    w, weight = quadrature(mean, std, 6)
    rows = F.pad(x, (0, 1), value=1.0)
    losses = 0.5 * ((rows @ w.T - y) / NOISE).square()
    second = 0.5 * ((rows * std.square()) @ rows[0] / NOISE**2).square()
    assert close(found + second, covariances(losses, losses[0], weight), 1e-5)


@pytest.mark.parametrize("rho", [0.0, 1.0, 2.5])
def test_the_sharpened_jensen_inequality_is_an_equality_for_gaussian_losses(rho):
    """Equations 16 and 31 for x = -(l_a + rho l_i), with the covariances that `correlations` gives; by quadrature."""
    bnn = noisy(nn.Linear(3, 1, bias=False).double())
    p = posteriors(bnn)["weight"]
    with torch.no_grad():
        p.log_std.uniform_(-2.0, -1.0)
    x, t = torch.randn(2, 3, dtype=torch.float64), torch.tensor([[0.8], [-0.6]], dtype=torch.float64)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (out * y).mean()

    (aa, ai), (_, ii) = (correlations(bnn, loss, (x, t), (x[k : k + 1], t[k : k + 1])).tolist() for k in (0, 1))
    w, weight = quadrature(p.mean.detach()[0], p.log_std.detach().exp()[0], 30)
    values = -(torch.tensor([1.0, rho], dtype=torch.float64) * t[:, 0]) @ x @ w.T
    bound = float(values @ weight) + 0.5 * (aa + 2 * rho * ai + rho**2 * ii)
    assert math.log(float(values.exp() @ weight)) == pytest.approx(bound, rel=1e-8)
    assert bound - float(values @ weight) > 1e-3


# --- equation 15 ---


def test_the_product_of_experts_is_the_normalised_product_of_the_densities():
    mean, precision = torch.randn(6, 2, dtype=torch.float64), 2 * torch.rand(6, 2, dtype=torch.float64) + 0.1
    found_mean, found_std = product_of_experts(mean, precision)
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    for axis in range(2):
        log_density = -0.5 * z.square() - 0.5 * (precision[:, axis, None] * (z - mean[:, axis, None]).square()).sum(0)
        density = log_density.softmax(0)
        expected = float(density @ z)
        assert float(found_mean[axis]) == pytest.approx(expected, abs=1e-6)
        assert float(found_std[axis]) == pytest.approx(math.sqrt(float(density @ (z - expected).square())), abs=1e-6)


def test_without_experts_the_latent_has_its_prior():
    mean, std = product_of_experts(torch.ones(0, 3), torch.ones(0, 3))
    assert mean.tolist() == [0.0] * 3
    assert std.tolist() == [1.0] * 3


def test_a_context_has_one_latent_however_it_is_given():
    x, y = points(150, seed=0)
    _, attention = attached(Mlp(), x)
    whole = attention.latent_of(x)
    assert torch.allclose(whole, attention.encode(x)[0], atol=1e-5)
    assert torch.allclose(whole, attention.latent_of([(x[:100], y[:100]), (x[100:], y[100:])]), atol=1e-5)
    assert torch.allclose(whole, attention.latent_of(x[torch.randperm(150)]), atol=1e-5)
    assert not torch.allclose(whole, attention.latent_of(x[y == 0]), atol=1e-2)


def drawn_latents(attention: BayesianAttention, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects every z that the model is conditioned on."""
    seen, condition = [], attention.condition
    monkeypatch.setattr(attention, "condition", lambda model, z, **how: (seen.append(z.detach()), condition(model, z, **how)))
    return seen


def test_with_a_constant_decoder_the_terms_of_z_are_its_kl_over_the_examples():
    x, y = torch.randn(1, 2).expand(20, 2), torch.zeros(20, dtype=torch.long)  # one input over and over: any half is the same context
    bnn, attention = attached(Mlp(), x, contexts=everything, examples_correlated=0)
    same_importance(attention)
    _, extra = attention.losses(bnn, (x, y), F.cross_entropy, 1000)
    mean, std = attention.encode(x[:10])
    kl_z = distributions.kl_divergence(distributions.Normal(mean, std), distributions.Normal(torch.zeros(3), torch.ones(3))).sum()
    assert float(kl_z.detach()) > 0.1
    assert float(extra.detach()) == pytest.approx(float(kl_z.detach()) / 1000, rel=1e-5)
    assert attention.is_general


@pytest.mark.parametrize("correlated", [False, True])
def test_losses_are_those_of_the_equations(monkeypatch, correlated):
    """Half of the batch is the context: one input over and over, so that it does not matter how the context is cut in two."""
    x, y = torch.cat([torch.randn(1, 2).expand(10, 2), torch.randn(10, 2)]), torch.cat([torch.zeros(10), torch.arange(10) % 4]).long()
    options = {"examples_correlated": 20 if correlated else 0, "every": 1}
    bnn, attention = attached(Mlp(), x, contexts=lambda targets: torch.arange(20) < 10, **options)
    latents = drawn_latents(attention, monkeypatch)
    with use_mode(bnn, "mean"):
        value, extra = attention.losses(bnn, (x, y), F.cross_entropy, 1000)
        each = F.cross_entropy(bnn(x), y, reduction="none")  # it is left conditioned
    assert len(latents) == 1
    assert not attention.is_general
    rho = attention.importance(x, latents[0]).detach()
    left_out = 0.02 * float(each.mean().detach())  # at most: examples of importance up to 0.02
    assert float(value.detach()) == pytest.approx(float((rho * each).mean().detach()), abs=left_out)
    mean, std = attention.encode(x[:5])
    kl_z = distributions.kl_divergence(distributions.Normal(mean, std), distributions.Normal(torch.zeros(3), torch.ones(3))).sum()
    expected = kl_z / (0.5 * 1000) - rho[0].log()
    if correlated:
        found = correlations(bnn, F.cross_entropy, (x, y), (x[:1], y[:1]))
        assert float((found * rho).mean().abs()) > 1e-3
        expected = expected - (found * rho).mean()
    assert float(extra.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    held = [p.mean for p in posteriors(bnn).values()]
    assert all(g is None for g in torch.autograd.grad(extra, held, retain_graph=True, allow_unused=True))  # z is learned, not w
    for network in (attention.expert, attention.decoder):
        assert all(float(g.abs().max()) > 0 for g in torch.autograd.grad(extra, list(network.parameters()), retain_graph=True))


# --- what it reduces to ---


def test_with_one_prototype_and_no_gates_the_laws_are_the_posteriors():
    x = torch.randn(8, 2)
    bnn, attention = attached(Mlp(), x, gated=False)
    for p, law in zip(posteriors(bnn).values(), attention.laws(bnn, torch.randn(3)).values(), strict=True):
        assert law.mean.equal(p.mean)
        assert law.log_std.equal(p.log_std)
        assert law.scale is None
    assert attention.attention(torch.randn(3)).tolist() == [1.0]
    assert attention.gates(torch.randn(3)) == {}


@pytest.mark.parametrize("prototypes", [1, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_with_uniform_attention_and_open_gates_the_laws_are_the_posteriors(prototypes, gated):
    x = torch.randn(8, 1, 8, 8)
    bnn, attention = attached(helpers.TinyNet(), x, gated=gated, prototypes=prototypes)
    set_free(attention)
    same_importance(attention)
    if gated:
        set_gates(attention, dict.fromkeys(attention.units, OPEN))
    for p, law in zip(posteriors(bnn).values(), attention.laws(bnn, torch.randn(3)).values(), strict=True):
        assert torch.allclose(law.mean, p.mean, rtol=1e-5, atol=1e-5)
        assert torch.allclose(law.log_std, p.log_std, rtol=1e-5, atol=1e-5)
        for factor in (law.scale, law.share):
            assert factor is None or torch.allclose(factor, torch.ones_like(factor))


@pytest.mark.parametrize(("gated", "prototypes"), [(False, 1), (True, 1), (False, 3), (True, 3)])
def test_with_importance_one_a_step_is_one_on_the_plain_beta_elbo(gated, prototypes, monkeypatch):
    monkeypatch.setattr(ban, "_BOUNDS", (0.0, 1.0))  # an open gate is always open
    images, labels = helpers.blobs(24, seed=0)
    bnn, attention = attached(helpers.TinyNet(), images, gated=gated, prototypes=prototypes, contexts=everything, examples_correlated=0)
    set_free(attention)
    same_importance(attention)
    if gated:
        set_gates(attention, dict.fromkeys(attention.units, OPEN))
    plain, states = ban.detached_copy(bnn), []
    bnn.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    results = []
    for model, used in ((bnn, attention), (plain, None)):
        if used is None:
            torch.set_rng_state(states[0])  # the same draws
        optimizer = torch.optim.SGD([q for p in posteriors(model).values() for q in (p.mean, p.log_std)], 1e-3)
        how = {"beta": 0.3, "num_examples": 500, "attention": used}
        results.append(train_step(model, (images, labels), F.cross_entropy, optimizer, **how))
    assert len(states) == 1
    (value, nats), (plain_value, plain_nats) = results
    assert value == pytest.approx(plain_value, rel=1e-5)
    assert nats == pytest.approx(plain_nats, rel=1e-5)
    for p, q in zip(posteriors(bnn).values(), posteriors(plain).values(), strict=True):
        for a, b in ((p.mean.grad, q.mean.grad), (p.log_std.grad, q.log_std.grad)):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


# --- gates ---

LINKS = {"after a convolution": ("conv", "fc1", 8, 9), "after a linear layer": ("fc1", "fc2", 16, 1)}


def kl_by_tensor(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.kl_per_weight().detach() for name, p in posteriors(model).items()}


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("link", LINKS)
def test_a_hidden_unit_behind_a_shut_gate_costs_nothing_and_is_silent(link, relaxed, monkeypatch):
    monkeypatch.setattr(ban, "_BOUNDS", (0.0, 1.0))
    producer, consumer, units, multiplicity = LINKS[link]
    bnn, attention = attached(helpers.TinyNet(), torch.randn(4, 1, 8, 8))
    unit = 3
    chances = torch.full((units,), OPEN)
    chances[unit] = SHUT
    set_gates(attention, {**dict.fromkeys(attention.units, OPEN), producer: chances})
    own = kl_by_tensor(bnn)
    attention.condition(bnn, torch.randn(3), relaxed=relaxed)
    given = kl_by_tensor(bnn)
    inputs = slice(unit * multiplicity, (unit + 1) * multiplicity)
    for name, place in {f"{producer}.weight": unit, f"{producer}.bias": unit, f"{consumer}.weight": (slice(None), inputs)}.items():
        assert float(own[name][place].abs().max()) > 1e-3
        assert float(given[name][place].abs().max()) < 1e-5
        own[name][place] = given[name][place] = 0.0
    for name in own:  # all others are as they were
        assert torch.allclose(given[name], own[name], rtol=1e-4, atol=1e-4)
    layer, x = getattr(bnn, consumer), torch.randn(5, units * multiplicity)
    loud = x.clone()
    loud[:, inputs] += 1000
    torch.manual_seed(1)
    quiet = layer(x)
    torch.manual_seed(1)
    assert torch.allclose(layer(loud), quiet, atol=1e-5)  # nor does its noise come through
    images, without = torch.randn(5, 1, 8, 8), ban.detached_copy(bnn)
    drop_units(
        without, next(k for k in conversion(bnn).links if k.producer == producer), torch.tensor([u for u in range(units) if u != unit])
    )
    assert torch.allclose(mean_network(bnn)(images), mean_network(without)(images), atol=1e-4)


def test_an_output_behind_a_shut_gate_has_the_priors_law():
    bnn, attention = attached(Mlp(), torch.randn(8, 2))
    chances = torch.tensor([OPEN, SHUT, OPEN, OPEN])
    set_gates(attention, {"fc1": OPEN, "fc2": chances})
    attention.condition(bnn, torch.randn(3))
    for name in ("fc2.weight", "fc2.bias"):
        p = posteriors(bnn)[name]
        mean, log_std = (v.detach() for v in p.law()[:2])
        assert float(mean[1].abs().max()) < 1e-5
        assert torch.allclose(log_std[1].exp(), p.group_second_moment().detach().sqrt().flatten(), rtol=1e-5)
        assert float(kl_by_tensor(bnn)[name][1].abs().max()) < 1e-5
        assert torch.allclose(mean[2:], p.mean.detach()[2:], atol=1e-5)


CHANCES = (OPEN, 0.95, 0.9, 0.7, 0.5, 0.4, 0.2, 0.05, SHUT)


@pytest.mark.parametrize(("module", "relaxed"), [("fc1", True), ("fc1", False), ("fc2", True), ("fc2", False)])
def test_kl_falls_as_a_gate_closes(module, relaxed):
    bnn, attention = attached(Mlp(), torch.randn(8, 2))
    total, each = [], []
    for chance in CHANCES:
        chances = torch.full((attention.units[module],), OPEN)
        chances[2] = chance
        set_gates(attention, {"fc1": OPEN, "fc2": OPEN, module: chances})
        attention.condition(bnn, torch.randn(3), relaxed=relaxed)
        own = kl_by_tensor(bnn)
        rows = [own[f"{module}.weight"][2], own[f"{module}.bias"][2:3], own["fc2.weight"][:, 2] if module == "fc1" else torch.zeros(0)]
        each.append(torch.cat(rows))
        total.append(float(kl(bnn).detach()))
    for before, after in itertools.pairwise(each):
        assert bool((after <= before + 1e-6).all())
    assert float(each[-1].abs().max()) < 1e-5
    assert float(each[0].sum()) == pytest.approx(total[0] - total[-1], rel=1e-3)
    assert total == sorted(total, reverse=True)
    if relaxed or module == "fc2":
        assert len(set(total)) == len(total)  # it falls with every step: there is a gradient


def test_relaxed_gates_are_open_as_often_as_their_kl_counts():
    bnn, attention = attached(Mlp(), torch.randn(8, 2))
    set_gates(attention, {"fc1": torch.linspace(0.05, 0.95, 16), "fc2": OPEN})
    n, z = 2000, torch.randn(3)
    with torch.no_grad():
        laws = [attention.laws(bnn, z, relaxed=True) for _ in range(n)]
    scale = torch.stack([law["fc2.weight"].scale.flatten() for law in laws])
    assert float(scale.min()) == 0.0
    assert float(scale.max()) == 1.0
    share = laws[0]["fc1.bias"].share.flatten()
    assert torch.allclose(laws[0]["fc2.weight"].share.flatten(), share)
    often, chance = (scale > 0).sum(0), share.double()
    for unit in range(16):  # false alarm 1e-6 for each unit and for all of them together, by Bonferroni
        assert stats.binomtest(int(often[unit]), n, float(chance[unit])).pvalue > helpers.FALSE_ALARM / 17
    z_score = (float(often.sum()) - n * float(chance.sum())) / math.sqrt(n * float((chance * (1 - chance)).sum()))
    assert 2 * stats.norm.sf(abs(z_score)) > helpers.FALSE_ALARM / 17


@pytest.mark.parametrize("prior", [None, 0.8])
def test_a_layer_computes_with_scale_times_a_draw_and_counts_the_kl_share_times(prior):
    bnn = noisy(nn.Linear(3, 2))
    p = posteriors(bnn)["weight"]
    if prior is not None:
        p.freeze_prior(torch.tensor([[prior]]))
    mean, log_std, scale, share = torch.randn(2, 3), torch.randn(2, 3), torch.rand(1, 3), torch.rand(2, 1)
    p.conditional = Law(mean, log_std, scale, share)
    found_mean, variance = p.moments()
    assert torch.allclose(found_mean, scale * mean)
    assert torch.allclose(variance, (scale * log_std.exp()).square())
    own_prior = distributions.Normal(torch.zeros(2, 3), p.group_second_moment().sqrt() if prior is None else prior)
    kl_each = share * distributions.kl_divergence(distributions.Normal(mean, log_std.exp()), own_prior)
    assert torch.allclose(p.kl_per_weight(), kl_each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prototypes", [1, 3])
def test_the_prior_never_depends_on_the_context(prototypes):
    bnn, attention = attached(Mlp(), torch.randn(8, 2), prototypes=prototypes)
    set_free(attention)
    priors, sizes = [], []
    for z in (None, *torch.randn(2, 3)):
        if z is not None:
            attention.condition(bnn, z)
        priors.append(torch.cat([p.group_second_moment().flatten() for p in posteriors(bnn).values()]))
        sizes.append(float(kl(bnn).detach()))
    assert priors[0].equal(priors[1])
    assert priors[0].equal(priors[2])
    assert abs(sizes[1] - sizes[2]) > 1.0  # the posteriors do


# --- packages for contexts ---


@pytest.fixture(scope="module")
def blobs() -> list[tuple[Tensor, Tensor]]:
    """Training batches; five, so that nothing that happens every few steps keeps step with the epochs."""
    x, y = points(200, seed=0)
    return list(zip(x.split(40), y.split(40), strict=True))


@pytest.fixture(scope="module")
def net(blobs) -> Mlp:
    """A trained network; copy it before changing it."""
    torch.manual_seed(0)
    net = Mlp()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for x, y in blobs * 20:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


OPTIONS = {"latent": 4, "prototypes": 2, "hidden": 16, "every": 3}


@pytest.fixture(scope="module")
def attentive(net, blobs) -> nn.Module:
    """A network trained with attention; copy it before changing it."""
    torch.manual_seed(0)
    bnn = convert(net)
    fit(bnn, blobs, F.cross_entropy, epochs=8, attention=BayesianAttention(net, **OPTIONS), **QUIET)
    return bnn


def context_of(classes: tuple[int, ...]) -> Tensor:
    x, y = points(120, seed=1)
    return x[torch.isin(y, torch.tensor(classes))]


def test_a_network_trained_with_attention_knows_its_task(attentive):
    x, y = points(500, seed=2)
    attention = attentive.bayesian_attention
    wrong = (mean_network(attentive)(x).argmax(1) != y).float().mean()
    assert float(wrong) < 0.1
    assert float(attention.general.abs().max()) > 0.0
    for p, law in zip(posteriors(attentive).values(), attention.laws(attentive, attention.general).values(), strict=True):
        assert torch.equal(p.law().mean, law.mean)  # it is left in the context of everything
        assert not p.law().mean.requires_grad


def test_predictions_are_those_of_the_batchs_own_context(attentive):
    x = context_of((0, 3))
    attention = attentive.bayesian_attention
    before = laws_of(attentive)
    found = attention.predict(attentive, x)
    expected = mean_network(attention.specialise(attentive, x, drop=False))(x)
    assert torch.allclose(found, expected, atol=1e-5)
    for (a, b), (c, d) in zip(laws_of(attentive), before, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("classes", [None, (0,), (1, 2)])
def test_specialising_leaves_the_model_alone_and_gives_an_ordinary_one(attentive, classes, drop):
    laws = [p.conditional for p in posteriors(attentive).values()]
    attention, context = attentive.bayesian_attention, None if classes is None else context_of(classes)
    states = [helpers.digest(m.state_dict()) for m in (attentive, attention)]
    own = attention.specialise(attentive, context, drop=drop)
    assert [helpers.digest(m.state_dict()) for m in (attentive, attention)] == states
    assert all(p.conditional is law for p, law in zip(posteriors(attentive).values(), laws, strict=True))
    assert attentive.bayesian_attention is attention
    assert not hasattr(own, "bayesian_attention")
    assert not any(isinstance(m, BayesianAttention) for m in own.modules())
    assert all(p.conditional is None for p in posteriors(own).values())
    assert not any("bayesian_attention" in name for name in own.state_dict())
    assert set(own.state_dict()) == set(convert(Mlp()).state_dict())


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("prototypes", [1, 3])
def test_the_mean_network_of_a_specialised_model_is_that_of_the_conditioned_one(prototypes, drop):
    bnn, attention = attached(helpers.TinyNet(), torch.randn(8, 1, 8, 8), prototypes=prototypes)
    set_free(attention)
    set_gates(attention, {"conv": torch.linspace(0, 1, 8), "fc1": torch.linspace(1, 0, 16), "fc2": 0.7})
    images, context = torch.randn(20, 1, 8, 8), torch.randn(20, 1, 8, 8)
    z = attention.latent_of(context)
    attention.condition(bnn, z)
    own = attention.specialise(bnn, context, drop=drop)
    found, expected = mean_network(own)(images), mean_network(bnn)(images)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    kept = {name: int((attention.gates(z)[name] >= 0.5).sum()) if drop else n for name, n in (("conv", 8), ("fc1", 16))}
    assert posteriors(own)["conv.weight"].kept == (kept["conv"], 1, 3, 3)
    assert posteriors(own)["fc1.weight"].kept == (kept["fc1"], 9 * kept["conv"])
    assert posteriors(own)["fc2.weight"].kept == (3, kept["fc1"])
    if drop:
        assert 0 < kept["conv"] < 8
        assert 0 < kept["fc1"] < 16
        assert float(kl(own).detach()) > 0


def test_units_under_half_open_gates_are_dropped_but_one():
    bnn, attention = attached(Mlp(), torch.randn(8, 2))
    x = torch.randn(50, 2)
    set_gates(attention, {"fc1": torch.where(torch.arange(16) < 7, 0.4, 0.6), "fc2": OPEN})
    assert posteriors(attention.specialise(bnn, x))["fc1.bias"].kept == (9,)
    set_gates(attention, {"fc1": torch.where(torch.arange(16) == 7, 0.3, 0.2), "fc2": OPEN})
    held = posteriors(attention.specialise(bnn, x))
    assert held["fc1.weight"].kept == (1, 2)  # the most open stays
    assert torch.equal(held["fc1.weight"].mean[0], posteriors(bnn)["fc1.weight"].mean[7])


def test_one_training_gives_packages_for_any_context(attentive, tmp_path):
    model = copy.deepcopy(attentive)
    attention = model.bayesian_attention
    set_free(attention)  # each context has units of its own
    states, packages = [helpers.digest(m.state_dict()) for m in (model, attention)], {}
    for classes in ((0, 1), (2, 3), None):
        context = None if classes is None else context_of(classes)
        archive = encode(model, context=context, coder="trellis", rounds=2, refine_steps=2, **QUIET)
        path = tmp_path / f"{classes}.mban"
        assert save(archive, path) == archive.size_bytes
        net = load(path, Mlp())
        assert type(net) is Mlp
        assert list(net.state_dict()) == list(Mlp().state_dict())
        assert [type(m) for m in net.modules()] == [Mlp, nn.Linear, nn.Linear]
        assert not hasattr(net, "bayesian_attention")
        z = attention.general if context is None else attention.latent_of(context)
        used = int((attention.gates(z)["fc1"] >= 0.5).sum())
        assert 0 < used < 16
        assert bool((net.fc1.weight[used:] == 0).all() & (net.fc2.weight[:, used:] == 0).all())
        assert bool((net.fc1.weight[:used] != 0).any())
        packages[classes] = helpers.digest(net.state_dict())
    assert len(set(packages.values())) == 3
    assert [helpers.digest(m.state_dict()) for m in (model, attention)] == states
    assert not any(bool(p.fixed.any()) for p in posteriors(model).values())


def test_a_package_is_within_its_budget_and_knows_its_context(attentive):
    x, y = points(500, seed=2)
    for classes in ((0, 1), (1, 3)):
        archive = encode(attentive, context=context_of(classes), coder="trellis", budget=60, rounds=4, refine_steps=40, **QUIET)
        assert archive.size_bytes <= 60
        net = Mlp()
        net.load_state_dict(decode(archive, net))
        mine = torch.isin(y, torch.tensor(classes))
        assert float((net(x[mine]).argmax(1) != y[mine]).float().mean()) < 0.1


def test_a_context_needs_a_model_that_was_trained_with_attention(net):
    with pytest.raises(MiracleError, match="attention"):
        encode(convert(net), context=torch.randn(8, 2), coder="trellis", **QUIET)


# --- training ---


class WorkError(Exception):
    pass


def failing_after(calls: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that raises after so many calls."""
    count = itertools.count()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        if next(count) >= calls:
            raise WorkError
        return F.cross_entropy(out, y)

    return loss


@pytest.mark.parametrize("calls", [15, 30])
@pytest.mark.parametrize("budget", [None, 80])
def test_an_interrupted_fit_goes_on_as_if_nothing_had_happened(net, blobs, tmp_path, calls, budget):
    path = tmp_path / "state"
    whole, first, second = convert(net), convert(net), convert(net)

    def attention(seed: int) -> BayesianAttention:
        torch.manual_seed(seed)
        return BayesianAttention(net, **OPTIONS)

    expected = fit(whole, blobs, F.cross_entropy, budget=budget, epochs=6, attention=attention(0), **QUIET)
    options = {"budget": budget, "epochs": 6, "checkpoint": path, **QUIET}
    with pytest.raises(WorkError):
        fit(first, blobs, failing_after(calls), attention=attention(0), **options)
    assert path.exists()
    report = fit(second, blobs, F.cross_entropy, attention=attention(1), **options)
    for (name, p), q in zip(posteriors(whole).items(), posteriors(second).values(), strict=True):
        assert torch.equal(p.mean, q.mean), name
        assert torch.equal(p.log_std, q.log_std), name
    assert helpers.same_state(whole.bayesian_attention.state_dict(), second.bayesian_attention.state_dict())
    assert report.history == expected.history
    assert report.predicted_bytes == expected.predicted_bytes


def test_checkpoints_with_and_without_attention_are_told_apart(net, blobs, tmp_path):
    path = tmp_path / "state"
    fit(convert(net), blobs, F.cross_entropy, epochs=1, checkpoint=path, **QUIET)
    with pytest.raises(MiracleError, match="state"):
        fit(convert(net), blobs, F.cross_entropy, epochs=1, checkpoint=path, attention=BayesianAttention(net, **OPTIONS), **QUIET)


def test_attention_belongs_to_one_model(net, blobs):
    attention = BayesianAttention(net, **OPTIONS)
    fit(convert(net), blobs, F.cross_entropy, epochs=1, attention=attention, **QUIET)
    with pytest.raises(MismatchError, match="new one"):
        fit(convert(net), blobs, F.cross_entropy, epochs=1, attention=attention, **QUIET)


@pytest.mark.parametrize("wrong", [{"latent": 0}, {"prototypes": 0}])
def test_sizes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(MiracleError, match="positive"):
        BayesianAttention(nn.Flatten(), **wrong)


def test_the_features_are_a_copy_and_are_not_trained(net, blobs):
    before, attention = helpers.digest(net.state_dict()), BayesianAttention(net, **OPTIONS)
    fit(convert(net), blobs, F.cross_entropy, epochs=1, attention=attention, **QUIET)
    assert helpers.digest(net.state_dict()) == before == helpers.digest(attention.backbone.state_dict())
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("bad", ["inputs", "loss", "contexts"])
def test_training_that_yields_nan_is_an_error(net, blobs, bad):
    batches = [(x * math.nan, y) for x, y in blobs] if bad == "inputs" else blobs
    contexts = (lambda targets: torch.zeros(len(targets), dtype=torch.bool)) if bad == "contexts" else None  # of nothing

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) * (math.nan if bad == "loss" else 1.0)

    with pytest.raises(MiracleError):
        fit(convert(net), batches, loss, epochs=2, attention=BayesianAttention(net, contexts=contexts, **OPTIONS), **QUIET)


class Recurrent(nn.Module):
    def __init__(self, projected: int):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True, proj_size=projected)
        self.out = nn.Linear(projected or 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


NETWORKS = {
    "a sequence of modules": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), (4,)),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 4)), (4,)),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)), (1, 3, 3)),
    "transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)), (1, 3, 3)),
    "recurrent": (lambda: Recurrent(0), (3, 4)),
    "recurrent with projections": (lambda: Recurrent(3), (3, 4)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:LSTM with projections")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_kind_can_be_trained_with_attention(name):
    make, shape = NETWORKS[name]
    net, x, y = make(), torch.randn(24, *shape), torch.arange(24) % 4
    bnn = convert(net)
    examples = 0 if "projections" in name else 16  # torch.func.vmap does not know an LSTM with projections
    attention = BayesianAttention(nn.Flatten(), latent=2, hidden=4, every=1, examples_correlated=examples)
    fit(bnn, [(x, y)], F.cross_entropy, epochs=2, attention=attention, **QUIET)
    assert attention.predict(bnn, x).shape == (24, 4)
    assert list(attention.specialise(bnn, x, drop=False).state_dict()) == list(convert(net).state_dict())


# --- contexts and teachers ---


def drawn_sets(contexts: Subsets, groups: Tensor, count: int) -> list[frozenset[int]]:
    found = []
    for _ in range(count):
        member = contexts(groups)
        assert member.dtype == torch.bool
        assert member.shape == groups.shape
        chosen = frozenset(groups[member].tolist())
        assert torch.equal(member, torch.isin(groups, torch.tensor(sorted(chosen))))  # whole groups
        found.append(chosen)
    return found


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_everything_is_drawn_at_the_stated_rate(share):
    n, groups = 3000, torch.arange(20) % 4
    sets = drawn_sets(Subsets(everything=share), groups, n)
    number = sum(len(s) == 4 for s in sets)
    assert stats.binomtest(number, n, share).pvalue > helpers.FALSE_ALARM  # false alarm 1e-6
    if share < 1:
        assert len(set(sets) - {frozenset(range(4))}) == 14  # and every other set


@pytest.mark.parametrize("excluded", [[(0, 1), (2,)], [(0, 1, 2, 3)], [(0, 1, 2), (3, 0)]])
def test_excluded_sets_are_never_drawn(excluded):
    sets = drawn_sets(Subsets(everything=0.3, excluded=excluded), torch.arange(20) % 4, 1500)
    assert not set(sets) & {frozenset(e) for e in excluded}
    assert len(set(sets)) == 15 - len(excluded)


def test_a_batch_that_lacks_classes_does_not_smuggle_in_an_excluded_set():
    sets = drawn_sets(Subsets(everything=0.5, excluded=[(0, 1)]), torch.arange(20) % 2, 200)
    assert set(sets) == {frozenset({0}), frozenset({1})}


def test_contexts_of_nothing_are_refused():
    with pytest.raises(MiracleError, match="excluded"):
        Subsets(everything=0.0, excluded=[(0,), (1,), (0, 1)])(torch.arange(20) % 2)


@pytest.mark.parametrize("targets", [torch.randn(5), torch.zeros(5, 2, dtype=torch.long), [0, 1], None])
def test_targets_that_are_not_classes_are_refused(targets):
    with pytest.raises(MiracleError, match="groups"):
        Subsets()(targets)


def test_groups_may_be_made_from_any_targets():
    targets = torch.linspace(-1, 1, 40)[:, None]
    contexts = Subsets(lambda y: (y[:, 0] > 0).long(), everything=0.0)
    member = contexts(targets)
    assert torch.equal(member, targets[:, 0] > 0) or torch.equal(member, targets[:, 0] <= 0) or bool(member.all())


@pytest.mark.parametrize("kind", ["tensor", "batches", "pairs"])
def test_a_teacher_gives_its_outputs_as_targets_again_and_again(kind):
    teacher, x = nn.Linear(2, 4), torch.randn(50, 2)
    inputs = {"tensor": x, "batches": list(x.split(20)), "pairs": [(part, torch.zeros(len(part))) for part in x.split(20)]}[kind]
    taught = Taught(inputs, teacher, batch_size=20)
    assert taught.num_examples == 50
    assert len(taught) == 3
    for _ in range(2):
        seen = list(taught)
        assert [len(a) for a, _ in seen] == [20, 20, 10]
        assert torch.equal(torch.cat([a for a, _ in seen]).sort(0).values, x.sort(0).values)
        for a, b in taught:
            assert torch.is_grad_enabled()  # what is done with a batch is none of the teacher's business
            assert torch.allclose(b, teacher(a), atol=1e-6)
            assert not b.requires_grad


@pytest.mark.parametrize("shape", [(6, 4), (6, 1), (6, 2, 3)], ids=["classes", "one number", "others"])
def test_imitation_is_least_at_the_teachers_outputs(shape):
    taught = torch.randn(shape, dtype=torch.float64)
    own = taught.clone().requires_grad_()
    least = imitation(own, taught)
    assert float(torch.autograd.grad(least, own)[0].abs().max()) < 1e-12
    for _ in range(50):
        assert float(imitation(taught + 0.1 * torch.randn(shape, dtype=torch.float64), taught)) > float(least.detach()) + 1e-6


def test_posteriors_of_the_features_are_not_taken_for_the_models(net):
    bnn = convert(net)
    before = posteriors(bnn)
    BayesianAttention(convert(net), latent=2).attach(bnn, torch.randn(4, 2))
    assert all(p is before[name] for name, p in posteriors(bnn).items())
