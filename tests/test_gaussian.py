from __future__ import annotations

import itertools
import math

import helpers
import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import distributions

from miracle_ban import gaussian
from miracle_ban.gaussian import Blocks, log_ratio_quantiles, stretch, super_level


def one(delta: float, v: float) -> Blocks:
    return Blocks(torch.tensor([[delta]], dtype=torch.float64), torch.tensor([[v]], dtype=torch.float64))


def some(blocks: int, d: int, *, shared: bool = False, smallest: float = 0.05, largest: float = 1.4, scale: float = 0.5) -> Blocks:
    """Blocks of unequal (or shared) variance ratios."""
    g = torch.Generator().manual_seed(d)
    v = smallest + (largest - smallest) * torch.rand(blocks, 1 if shared else d, generator=g, dtype=torch.float64)
    return Blocks(scale * torch.randn(blocks, d, generator=g, dtype=torch.float64), v.expand(blocks, d).contiguous())


def draws(blocks: Blocks, count: int) -> torch.Tensor:
    """Points of every block's posterior, `[count, blocks, d]`, in units of the prior."""
    g = torch.Generator().manual_seed(7)
    return blocks.delta + blocks.v.sqrt() * torch.randn(count, *blocks.delta.shape, generator=g, dtype=torch.float64)


def log_ratios(blocks: Blocks, count: int) -> np.ndarray:
    const, linear, quadratic = blocks.coefficients()
    x = draws(blocks, count)
    return (const + (x * linear).sum(2) + (x.square() * quadratic).sum(2)).numpy()


def test_kl_is_that_of_torch_distributions():
    mean, std, prior_std = torch.randn(5, 7), torch.rand(5, 7) + 0.01, torch.rand(5, 1) + 0.1
    q = distributions.Normal(mean.double(), std.double())
    p = distributions.Normal(torch.zeros(5, 7).double(), prior_std.double())
    expected = distributions.kl_divergence(q, p).sum(1)
    assert torch.allclose(Blocks.of(mean, std, prior_std).kl_nats(), expected, rtol=1e-12)


@pytest.mark.parametrize(("delta", "v"), [(0.0, 1.0), (1.0, 0.25), (3.0, 1e-4), (-2.0, 1.0), (0.5, 2.0), (0.0, 0.01)])
def test_kl_and_spread_agree_with_quadrature(delta, v):
    q, p = stats.norm(delta, math.sqrt(v)), stats.norm()

    def expect(f):
        return integrate.quad(lambda x: q.pdf(x) * f(q.logpdf(x) - p.logpdf(x)), *q.ppf([1e-15, 1 - 1e-15]), limit=200)[0]

    mean = expect(lambda l: l)
    spread = math.sqrt(max(expect(lambda l: (l - mean) ** 2), 0.0))
    assert float(one(delta, v).kl_nats()) == pytest.approx(mean, abs=1e-8)
    assert float(one(delta, v).std_log_ratio()) == pytest.approx(spread, abs=1e-6)


def test_log_ratio_is_that_of_the_two_densities():
    mean, std, prior_std = torch.randn(4, 6).double(), torch.rand(4, 6).double() + 0.1, torch.rand(4, 6).double() + 0.2
    z = torch.randn(4, 6).double()
    q, p = distributions.Normal(mean, std), distributions.Normal(torch.zeros_like(mean), prior_std)
    expected = (q.log_prob(z) - p.log_prob(z)).sum(1)
    assert torch.allclose(Blocks.of(mean, std, prior_std).log_ratio(z / prior_std), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("d", [1, 5])
def test_max_log_ratio_is_the_largest_on_a_search(d):
    blocks = some(6, d, largest=0.9)
    x = (blocks.delta / (1 - blocks.v)).clone().requires_grad_()  # where the gradient of l vanishes
    top = blocks.log_ratio(x)
    (gradient,) = torch.autograd.grad(top.sum(), x)
    assert float(gradient.abs().max()) < 1e-9
    assert torch.allclose(blocks.max_log_ratio(), top.detach(), rtol=1e-12)
    around = torch.stack([blocks.log_ratio(x.detach() + 0.3 * torch.randn_like(x)) for _ in range(200)])
    assert bool((around <= blocks.max_log_ratio() + 1e-12).all())


def test_max_log_ratio_of_wide_posteriors():
    assert float(one(0.5, 1.0).max_log_ratio()) == math.inf
    assert float(one(0.5, 1.5).max_log_ratio()) == math.inf
    assert float(one(0.0, 1.0).max_log_ratio()) == 0.0
    assert float(one(0.0, 2.0).max_log_ratio()) == math.inf


def test_the_prior_itself_has_no_divergence():
    blocks = Blocks.of(torch.zeros(2, 3), torch.full((2, 3), 0.3), torch.tensor(0.3))
    assert torch.allclose(blocks.kl_nats(), torch.zeros(2).double(), atol=1e-12)
    assert torch.allclose(blocks.log_ratio(torch.randn(2, 3)), torch.zeros(2).double(), atol=1e-12)


def test_moments_of_the_log_ratio_under_the_posterior():
    blocks = some(3, 8)
    n = 100_000
    l = log_ratios(blocks, n)
    z = stats.norm.isf(helpers.FALSE_ALARM / 2)  # false alarm 1e-6 for each block's mean
    spread = blocks.std_log_ratio().numpy()
    assert (np.abs(l.mean(0) - blocks.kl_nats().numpy()) < z * spread / math.sqrt(n)).all()
    assert np.allclose(l.std(0), spread, rtol=0.05)


@pytest.mark.parametrize(("d", "shared"), [(1, True), (4, True), (16, True), (64, True), (4, False), (16, False), (64, False)])
def test_the_tail_of_the_log_ratio_agrees_with_draws(d, shared):
    """Noncentral chi-square where the variance ratios agree, Lugannani-Rice where not."""
    blocks = some(4, d, shared=shared, largest=0.95 if shared else 1.4)
    n = 50_000
    l = log_ratios(blocks, n)
    level = torch.from_numpy(np.quantile(l, [0.001, 0.05, 0.3, 0.6, 0.9, 0.99, 0.999], axis=0).T.copy())
    tail = gaussian._log_tail(blocks, level).exp().numpy()
    measured = (l[:, :, None] >= level.numpy()).mean(0)
    # false alarm 1e-6 for each level, by the normal bound; the saddlepoint formula may be off by 2 % or 0.005 besides
    noise = stats.norm.isf(helpers.FALSE_ALARM / 2) * np.sqrt(measured * (1 - measured) / n) + 10 / n
    slack = 0.0 if shared else np.maximum(0.02 * measured, 0.005)
    assert (np.abs(tail - measured) < noise + slack).all()


def test_the_two_formulas_of_the_tail_agree():
    blocks = some(5, 24, shared=True, largest=0.9)
    kl, sd = blocks.kl_nats(), blocks.std_log_ratio()
    level = torch.minimum(kl[:, None] + sd[:, None] * torch.linspace(-4, 3, 30).double(), blocks.max_log_ratio()[:, None] - 1e-3)
    exact, approximate = gaussian._log_tail_shared(blocks, level), gaussian._log_tail_lugannani_rice(blocks, level)
    assert float((exact.exp() - approximate.exp()).abs().max()) < 0.003
    likely = exact > math.log(1e-4)
    assert float((exact - approximate)[likely].abs().max()) < 0.03


def by_integration(delta: float, v: float, level: np.ndarray) -> np.ndarray:
    """S(h) = E_Q[(1 - h/r)^+] at h = exp(level), by the rectangle rule in 1-D."""
    x = delta + math.sqrt(v) * np.linspace(-12, 12, 200_001)
    density = stats.norm.pdf(x, delta, math.sqrt(v)) * (x[1] - x[0])
    l = stats.norm.logpdf(x, delta, math.sqrt(v)) - stats.norm.logpdf(x)
    return np.array([(density * np.maximum(-np.expm1(np.minimum(h - l, 0.0)), 0.0)).sum() for h in level])


@pytest.mark.parametrize(
    ("delta", "v", "tolerance"),
    [(1, 0.0625, 0.002), (2, 0.0025, 0.002), (0.5, 0.64, 0.002), (0, 0.01, 0.002), (1, 1.0, 0.002), (0.5, 1.44, 0.008), (0, 4.0, 0.012)],
)
def test_survival_and_stretch_agree_with_integration(delta, v, tolerance):
    law = stretch(one(delta, v))
    level = law.level[0]
    survival = by_integration(delta, v, level)
    assert np.abs(np.exp(law.log_survival[0]) - survival).max() < tolerance
    assert (np.diff(level) > 0).all()
    assert (np.diff(law.log_sigma[0]) > 0).all()
    # sigma(h) = integral of d eta / S(eta), by the trapezoid rule in eta
    known = survival > 0.01
    h = np.exp(level[known])
    sigma = h[0] + integrate.cumulative_trapezoid(1.0 / survival[known], h, initial=0.0)
    assert np.abs(np.log(sigma) - law.log_sigma[0][known]).max() < 0.03


@pytest.mark.parametrize("d", [3, 40])
def test_survival_of_long_blocks_agrees_with_draws(d):
    blocks = some(3, d)
    law = stretch(blocks)
    n = 20_000
    l = log_ratios(blocks, n)
    for b in range(3):
        for j in (150, 300, 400, 450):
            terms = np.maximum(-np.expm1(np.minimum(law.level[b, j] - l[:, b], 0.0)), 0.0)
            noise = stats.norm.isf(helpers.FALSE_ALARM / 2) * terms.std() / math.sqrt(n)  # false alarm 1e-6 a point
            assert abs(np.exp(law.log_survival[b, j]) - terms.mean()) < noise + 0.006


@pytest.mark.parametrize(("delta", "v"), [(1.0, 0.0625), (0.5, 0.64)])
def test_the_mean_index_that_the_thresholds_imply_is_the_largest_ratio(delta, v):
    """E[K] = r_max in 1-D: the integral of the survival that accepting at sigma^-1(t) leads to, up to 1,000 r_max."""
    blocks = one(delta, v)
    law, largest = stretch(blocks), float(blocks.max_log_ratio())
    log_time = np.linspace(-8.0, largest + math.log(1000.0), 4000)
    level = np.array([law.threshold(0, t) for t in log_time])
    half = np.sqrt(np.maximum(2 * v / (1 - v) * (largest - level), 0.0))  # {l >= level} is this far around its peak
    peak = delta / (1 - v)
    hazard = stats.norm.cdf(peak + half) - stats.norm.cdf(peak - half)
    time = np.exp(log_time)
    survival = np.exp(-integrate.cumulative_trapezoid(hazard, time, initial=0.0))
    assert time[0] + integrate.trapezoid(survival, time) == pytest.approx(math.exp(largest), rel=0.05)


@pytest.mark.parametrize("d", [1, 16])
def test_quantiles_of_the_log_ratio_agree_with_draws(d):
    blocks = some(3, d, largest=0.9)
    probability = np.array([0.05, 0.3, 0.5, 0.9, 0.99])
    n = 50_000
    l = log_ratios(blocks, n)
    below = (l[:, :, None] <= log_ratio_quantiles(blocks, probability)).mean(0)
    noise = stats.norm.isf(helpers.FALSE_ALARM / 2) * np.sqrt(probability * (1 - probability) / n)  # false alarm 1e-6 each
    assert (np.abs(below - probability) < noise + (0.03 if d == 1 else 0.006)).all()  # even grid: its last cell is coarse in 1-D


@pytest.mark.parametrize("d", [1, 6])
def test_the_mean_log_ratio_above_the_super_level_is_the_kl(d):
    blocks = some(3, d, largest=0.9, scale=1.0 if d == 1 else 0.4)
    level, log_mass = super_level(blocks)
    g = torch.Generator().manual_seed(3)
    n = 400_000
    const, linear, quadratic = blocks.coefficients()
    for b in range(3):
        x = torch.randn(n, d, generator=g, dtype=torch.float64)
        l = (const[b] + x @ linear[b] + x.square() @ quadratic[b]).numpy()
        above = l[l >= level[b]]
        z = stats.norm.isf(helpers.FALSE_ALARM / 2)  # false alarm 1e-6 each
        assert abs(len(above) / n - math.exp(log_mass[b])) < z * math.sqrt(len(above)) / n + 0.03 * math.exp(log_mass[b])
        assert abs(above.mean() - float(blocks.kl_nats()[b])) < z * above.std() / math.sqrt(len(above)) + 0.02


def test_threshold_is_the_inverse_of_the_stretch_function():
    law = stretch(some(2, 10))
    for b in range(2):
        for j in (0, 10, 300, 500):
            assert law.threshold(b, float(law.log_sigma[b, j])) == pytest.approx(float(law.level[b, j]), abs=1e-9)
        early = float(law.log_sigma[b, 0]) - 5.0
        assert law.threshold(b, early) == pytest.approx(early, abs=1e-3)  # sigma(h) = h where nothing is accepted yet
        times = np.linspace(-20, 30, 200)
        bars = [law.threshold(b, t) for t in times]
        assert all(x <= y for x, y in itertools.pairwise(bars))
        assert np.allclose(law.thresholds(np.full(200, b), times)[times < 23], np.array(bars)[times < 23], atol=3e-3)


def test_survival_falls_from_one():
    law = stretch(some(3, 10))
    s = law.survival(np.linspace(-30, 30, 100))
    assert s.shape == (3, 100)
    assert np.allclose(s[:, 0], 1.0, atol=1e-3)
    assert (np.diff(s, axis=1) <= 1e-12).all()
    assert ((s >= 0) & (s <= 1)).all()


def test_blocks_in_extreme_corners_have_finite_laws():
    corners = Blocks(
        torch.tensor([[0.0, 0.0], [1e-9, 0.0], [30.0, -30.0], [0.0, 3.0], [1e-3, 1e-3], [0.0, 0.0]], dtype=torch.float64),
        torch.tensor([[1.0, 1.0], [1.0, 1 - 1e-12], [1e-12, 1e-3], [50.0, 1e-6], [1.0, 1.0], [1e-20, 1e-20]], dtype=torch.float64),
    )
    law = stretch(corners)
    for table in (law.level, law.log_survival, law.log_sigma):
        assert np.isfinite(table).all()
    assert (np.diff(law.log_sigma, axis=1) >= 0).all()
