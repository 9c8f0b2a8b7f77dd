from __future__ import annotations

import itertools
import math

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from miracle_ban import coders
from miracle_ban.blocks import candidate_values
from miracle_ban.coders.base import Codebook
from miracle_ban.errors import CodingError, MiracleError, MismatchError
from miracle_ban.gaussian import Blocks, stretch

NATS_PER_BIT = math.log(2.0)
SINGLE = {"branch-and-bound-gprs", "branch-and-bound-a-star"}  # they code single weights
every_coder = pytest.mark.parametrize("name", sorted(coders.IDS.keys() - SINGLE))
every_block_coder = pytest.mark.parametrize("name", sorted(coders.IDS.keys() - SINGLE - {"trellis"}))
single_weight_coder = pytest.mark.parametrize("name", sorted(SINGLE))
seeds = st.integers(0, (1 << 64) - 1)


def posteriors(count: int, d: int, kl_bits: float, seed: int = 0, *, widest: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Means and stds under prior N(0, 1), of about `kl_bits` of KL a block, half of it in the stds; some over 1 if `widest` is."""
    rng = np.random.default_rng(seed)
    narrowest = -min(math.sqrt(1.5 * kl_bits * NATS_PER_BIT / d), 1.0)
    std = np.exp(rng.uniform(narrowest, math.log(widest) / math.sqrt(d), (count, d)))
    direction = rng.standard_normal((count, d))
    rest = 2 * kl_bits * NATS_PER_BIT - (std**2 - 1 - 2 * np.log(std)).sum(1)
    size = np.sqrt(np.maximum(rest, 0.01) / (direction**2).sum(1))
    return direction * size[:, None], std


def blocks_for(name: str, count: int, d: int, kl_bits: float, seed: int = 0, *, widest: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """As `posteriors`; for plain rejection sampling only blocks with a small largest ratio."""
    if name != "rejection":
        return posteriors(count, d, kl_bits, seed, widest=widest)
    direction = np.random.default_rng(seed).standard_normal((count, d))
    return 0.5 * direction / np.linalg.norm(direction, axis=1, keepdims=True), np.full((count, d), 0.95)


def matched(count: int, d: int, kl_bits: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blocks all of exactly `kl_bits`, std^2 + mean^2 = 1 for every weight: those of the tables in research/gprs.md."""
    v = math.exp(-2 * kl_bits * NATS_PER_BIT / d)
    sign = np.random.default_rng(seed).choice([-1.0, 1.0], (count, d))
    return sign * math.sqrt(1 - v), np.full((count, d), math.sqrt(v))


def kl_bits_of(mean, std, prior_std=1.0) -> np.ndarray:
    q = torch.distributions.Normal(torch.as_tensor(mean).double(), torch.as_tensor(std).double())
    p = torch.distributions.Normal(torch.zeros(q.mean.shape).double(), torch.as_tensor(prior_std).double().expand(q.mean.shape))
    return (torch.distributions.kl_divergence(q, p).sum(1) / NATS_PER_BIT).numpy()


def log_ratio(values: np.ndarray, mean, std, prior_std=1.0) -> np.ndarray:
    z = values.astype(np.float64)
    return (stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z, 0, prior_std)).sum(1)


def rounding(values: np.ndarray, mean, std, prior_std=1.0) -> np.ndarray:
    """What float32 may lose in a log ratio whose terms have these sizes."""
    x, delta, v = values.astype(np.float64) / prior_std, mean / prior_std, (std / prior_std) ** 2
    terms = np.abs(x * delta / v) + x**2 * np.abs(0.5 - 0.5 / v) + delta**2 / v + np.abs(np.log(v))
    return 1e-6 * terms.sum(1) + 1e-5


# --- the protocol that every coder follows ---


@every_block_coder
@pytest.mark.parametrize("d", [1, 3, 8, 9, 64])
@pytest.mark.parametrize("widest", [1.0, 1.6])
def test_decoding_gives_a_draw_of_the_reported_log_ratio(name, d, widest):
    mean, std = blocks_for(name, 12, d, 5.0, seed=d, widest=widest)
    prior_std = np.float32(0.375)
    mean, std = mean * prior_std, std * prior_std
    coder = coders.get(name)
    words = coder.encode(mean, std, prior_std, seed=11, tensor=2)
    values = coder.decode(words, prior_std, seed=11, tensor=2)
    assert values.dtype == np.float32
    assert values.shape == (12, d)
    assert words.dimension == d
    assert words.index.dtype == np.int64
    assert (words.index >= 1).all()
    assert (words.bits > 0).all()
    assert (np.abs(log_ratio(values, mean, std, prior_std) - words.log_ratio_nats) < rounding(values, mean, std, prior_std)).all()


@every_block_coder
@settings(max_examples=25)
@given(seed=seeds, d=st.integers(1, 20), count=st.integers(1, 6), kl=st.floats(0.0, 8.0), scale=st.floats(-6, 3), tensor=st.integers(0, 9))
def test_any_block_and_seed_comes_back(name, seed, d, count, kl, scale, tensor):
    mean, std = blocks_for(name, count, d, kl, seed=d, widest=1.2)
    prior_std = np.full((count, 1), np.float32(math.exp(scale)))
    coder = coders.get(name)
    numbers = np.arange(count) * 3 + 1
    words = coder.encode(mean * prior_std, std * prior_std, prior_std, seed=seed, tensor=tensor, blocks=numbers)
    values = coder.decode(words, prior_std, seed=seed, tensor=tensor, blocks=numbers)
    units = candidate_values(seed, tensor, numbers, words.index, d)
    assert (values == units * prior_std).all()
    assert (np.abs(log_ratio(units, mean, std) - words.log_ratio_nats) < rounding(units, mean, std)).all()


@every_coder
def test_numpy_and_torch_inputs_agree_and_the_same_call_gives_the_same_words(name):
    mean, std = (v.astype(np.float32) for v in blocks_for(name, 20, 12, 6.0))
    prior_std = np.full((20, 12), 1.5, np.float32)
    coder = coders.get(name)
    a = coder.encode(mean, std, prior_std, seed=1)
    b = coder.encode(torch.from_numpy(mean).requires_grad_(), torch.from_numpy(std), torch.from_numpy(prior_std), seed=1)
    assert (a.index == b.index).all()
    assert (a.log_ratio_nats == b.log_ratio_nats).all()
    assert (coder.decode(a, 1.5, seed=1) == coder.decode(b, prior_std, seed=1)).all()


@every_block_coder
def test_a_codebook_can_be_reused(name):
    mean, std = blocks_for(name, 20, 30, 6.0)
    coder, codebook = coders.get(name), Codebook(4)
    first = coder.encode(mean, std, 1.0, seed=4, codebook=codebook)
    again = coder.encode(mean, std, 1.0, seed=4, codebook=codebook)
    alone = coder.encode(mean, std, 1.0, seed=4)
    wrong = coder.encode(mean, std, 1.0, seed=4, codebook=Codebook(5))  # another seed's is not used
    for other in (again, alone, wrong):
        assert (first.index == other.index).all()


@every_block_coder
def test_a_block_keeps_its_shared_randomness_whatever_is_coded_with_it(name):
    mean, std = blocks_for(name, 12, 10, 5.0)
    coder = coders.get(name)
    numbers = np.array([7, 2, 11])
    words = coder.encode(mean[numbers], std[numbers], 1.0, seed=3, tensor=1, blocks=numbers)
    all_index = np.ones(12, np.int64)
    all_index[numbers] = words.index
    units = candidate_values(3, 1, np.arange(12), all_index, 10)
    assert (coder.decode(words, 1.0, seed=3, tensor=1, blocks=numbers) == units[numbers]).all()


def test_the_best_candidate_of_a_block_does_not_depend_on_the_others():
    mean, std = posteriors(12, 10, 5.0)
    coder = coders.get("minimal-random", bits=8, choice="best")
    whole = coder.encode(mean, std, 1.0, seed=3)
    numbers = np.array([7, 2, 11])
    part = coder.encode(mean[numbers], std[numbers], 1.0, seed=3, blocks=numbers)
    assert (part.index == whole.index[numbers]).all()


@every_coder
def test_no_blocks_and_empty_blocks_are_coded_as_nothing(name):
    coder = coders.get(name)
    for shape in ((0, 5), (4, 0), (0, 0)):
        words = coder.encode(np.zeros(shape), np.ones(shape), 1.0, seed=0)
        assert len(words.index) == shape[0]
        assert coder.decode(words, 1.0, seed=0).shape == shape
        assert words.bits.sum() == 0


@every_coder
def test_a_posterior_that_is_the_prior_costs_next_to_nothing(name):
    words = coders.get(name).encode(np.zeros((200, 6)), np.ones((200, 6)), 1.0, seed=0)
    assert words.bits.mean() < (4.5 if name == "parallel-gprs" else 2.5)  # there the number of the worker is sent, too
    assert np.abs(words.log_ratio_nats).max() < 1e-5


@every_coder
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(3))
def test_values_that_are_not_finite_are_refused(name, bad, which):
    arguments = [np.zeros((3, 4)), np.ones((3, 4)), np.ones((3, 4))]
    arguments[which][1, 2] = bad
    with pytest.raises(CodingError, match="1 value"):
        coders.get(name).encode(*arguments, seed=0)


@every_coder
@pytest.mark.parametrize("std", [0.0, -1.0])
@pytest.mark.parametrize("which", [1, 2])
def test_standard_deviations_must_be_positive(name, std, which):
    arguments = [np.zeros((3, 4)), np.ones((3, 4)), np.ones((3, 4))]
    arguments[which][0, 0] = std
    with pytest.raises(CodingError, match="positive"):
        coders.get(name).encode(*arguments, seed=0)


@every_coder
@pytest.mark.parametrize(
    ("mean", "std", "prior"),
    [((3,), (3,), ()), ((3, 4), (4, 3), ()), ((3, 4), (3, 1), ()), ((3, 4), (3, 4), (3,)), ((2, 3, 4), (2, 3, 4), ())],
)
def test_wrong_shapes_are_refused(name, mean, std, prior):
    with pytest.raises(MiracleError):
        coders.get(name).encode(np.zeros(mean), np.ones(std), np.ones(prior), seed=0)


def test_rejection_sampling_refuses_blocks_that_would_take_for_ever():
    for mean, std in (matched(3, 64, 8.0), (np.full((3, 2), 0.1), np.full((3, 2), 1.2)), (np.full((3, 1), 0.1), np.ones((3, 1)))):
        with pytest.raises(CodingError, match="gprs"):
            coders.get("rejection").encode(mean, std, 1.0, seed=0)


def test_unknown_coders_and_options_are_refused():
    with pytest.raises(MismatchError, match="gprs"):
        coders.get("nonsense")
    with pytest.raises(MismatchError, match="colour"):
        coders.get("gprs", colour="red")
    with pytest.raises(CodingError, match="target"):
        coders.get("gprs", target="bullseye")
    with pytest.raises(CodingError, match="choice"):
        coders.get("minimal-random", choice="worst")
    for bits in (0, 25):
        with pytest.raises(CodingError, match="bits"):
            coders.get("minimal-random", bits=bits)


@every_coder
def test_predicted_bits_grow_with_the_kl(name):
    coder = coders.get(name)
    sizes = [coder.predict_bits(kl) for kl in np.linspace(0, 30, 61)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(sizes))
    assert all(0 <= s <= kl + 6 for s, kl in zip(sizes, np.linspace(0, 30, 61), strict=True))


# --- greedy Poisson rejection sampling ---


def drawn(mean, std, *, extra_bits: float, seed: int = 0, name: str = "gprs"):
    coder = coders.get(name) if name == "rejection" else coders.get(name, extra_bits=extra_bits)
    words = coder.encode(mean, std, 1.0, seed=seed)
    return words, coder.decode(words, 1.0, seed=seed).astype(np.float64)


def p_value(sample: np.ndarray, mean: float, std: float) -> float:
    return float(stats.kstest(sample, stats.norm(mean, std).cdf).pvalue)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("gprs", 1.0, 0.25), ("gprs", 2.0, 0.05), ("gprs", 0.5, 0.8), ("gprs", 0.3, 1.0), ("gprs", 0.2, 1.3),
        ("a-star", 1.0, 0.25), ("a-star", 0.5, 0.8), ("rejection", 1.0, 0.25), ("rejection", 0.5, 0.8), ("ordered-random", 0.5, 0.8),
    ],
)  # fmt: skip
def test_draws_of_one_weight_follow_the_posterior(name, mean, std):
    n = 2000
    words, z = drawn(np.full((n, 1), mean), np.full((n, 1), std), extra_bits=10, name=name)
    if name == "gprs":
        assert words.truncated.mean() < 0.01  # a posterior wider than its prior has a long tail of indices
    assert p_value(z[:, 0], mean, std) > helpers.FALSE_ALARM


@pytest.mark.parametrize(("name", "widest"), [("gprs", 1.0), ("gprs", 1.25), ("a-star", 1.0), ("rejection", 1.0)])
def test_draws_of_eight_weights_follow_the_posterior(name, widest):
    n, d = 2000, 8
    rng = np.random.default_rng(1)
    std = np.linspace(0.6, 0.95, d) * widest
    mean = rng.normal(0, 0.4, d)
    if name == "rejection":
        std, mean = np.linspace(0.7, 0.9, d), mean / 2
    words, z = drawn(np.tile(mean, (n, 1)), np.tile(std, (n, 1)), extra_bits=12, name=name)
    if name != "a-star":  # whose search has no early end that is sure in eight dimensions
        assert words.truncated.mean() < 0.003
    direction = rng.standard_normal(d)
    tests = [p_value(z[:, j], mean[j], std[j]) for j in range(d)]
    tests.append(p_value(z @ direction, float(direction @ mean), math.sqrt(float(direction**2 @ std**2))))
    tests.append(p_value(((z - mean) / std).sum(1), 0.0, math.sqrt(d)))
    assert min(tests) > helpers.FALSE_ALARM / len(tests)


def test_the_index_of_rejection_sampling_is_geometric():
    n, mean, std = 2000, 0.5, 0.8
    words, _ = drawn(np.full((n, 1), mean), np.full((n, 1), std), extra_bits=0, name="rejection")
    largest = math.exp(float(Blocks.of(torch.tensor([[mean]]), torch.tensor([[std]]), torch.tensor(1.0)).max_log_ratio()))
    law = stats.geom(1 / largest)
    edges = np.arange(1, 9)
    counts = np.append([(words.index == k).sum() for k in edges], (words.index > 8).sum())
    assert stats.chisquare(counts, n * np.append(law.pmf(edges), law.sf(8))).pvalue > helpers.FALSE_ALARM


def test_draws_of_the_super_level_target_are_as_good_as_the_posteriors_own():
    mean, std = (np.tile(v[:1], (1000, 1)) for v in matched(1, 8, 6.0))
    coder = coders.get("gprs", target="super-level", extra_bits=8)
    words = coder.encode(mean, std, 1.0, seed=0)
    assert words.truncated.sum() == 0
    spread = words.log_ratio_nats.std() / math.sqrt(1000)
    z = stats.norm.isf(helpers.FALSE_ALARM / 2)  # false alarm 1e-6; the 0.05 are for the tabulated level
    assert abs(words.log_ratio_nats.mean() - 6.0 * NATS_PER_BIT) < z * spread + 0.05
    hit = 1 / words.index.mean()  # the index is geometric
    for k in (int(0.3 / hit), int(1 / hit), int(2.5 / hit)):
        expected = (1 - hit) ** k
        assert abs((words.index > k).mean() - expected) < z * math.sqrt(expected * (1 - expected) / 1000) + 0.02
    exact = coders.get("gprs", extra_bits=8).encode(mean, std, 1.0, seed=0)
    assert words.bits.mean() < exact.bits.mean() - 0.25


def test_mean_index_of_one_weight_is_the_largest_ratio():
    n, mean, std = 2000, 1.0, 0.25
    words, _ = drawn(np.full((n, 1), mean), np.full((n, 1), std), extra_bits=10)
    largest = math.exp(float(Blocks.of(torch.tensor([[mean]]), torch.tensor([[std]]), torch.tensor(1.0)).max_log_ratio()))
    k = np.minimum(words.index, 200)  # P(K > k) falls as k^-3: what lies beyond adds less than 0.2 % of the mean
    z = stats.norm.isf(helpers.FALSE_ALARM / 2)  # false alarm 1e-6; the 2 % are for the tabulated sigma
    assert abs(k.mean() - largest) < z * k.std() / math.sqrt(n) + 0.02 * largest


def shortcut(mean: np.ndarray, std: np.ndarray, count: int) -> np.ndarray:
    """Indices without a search: Z ~ Q, h = U r(Z), T = sigma(h), K = 1 + Poisson(T + ln S(h))."""
    rng = np.random.default_rng(5)
    law = stretch(Blocks(torch.from_numpy(mean[None]).double(), torch.from_numpy(std[None] ** 2).double()))
    z = mean + std * rng.standard_normal((count, len(mean)))
    level = log_ratio(z, mean, std) + np.log(rng.random(count))
    time = np.interp(level, law.level[0], np.exp(law.log_sigma[0]))
    time = np.where(level < law.level[0, 0], np.exp(level), time)
    log_survival = np.where(level < law.level[0, 0], 0.0, np.interp(level, law.level[0], law.log_survival[0]))
    return 1 + rng.poisson(np.maximum(time + log_survival, 0.0))


@pytest.mark.parametrize(("d", "kl_bits"), [(1, 4.0), (8, 4.0)])
def test_indices_follow_the_shortcut_without_a_search(d, kl_bits):
    mean, std = matched(1, d, kl_bits)
    n = 1500
    words, _ = drawn(np.tile(mean, (n, 1)), np.tile(std, (n, 1)), extra_bits=6)
    other = shortcut(mean[0], std[0], n)
    cap = int(2 ** (kl_bits + 6))
    a, b = np.where(words.truncated, cap, words.index), np.minimum(other, cap)
    assert stats.ks_2samp(a, b).pvalue > helpers.FALSE_ALARM


@pytest.mark.parametrize(("d", "kl_bits", "widest"), [(1, 3.0, 1.0), (8, 5.0, 1.0), (8, 5.0, 1.3)])
def test_tails_of_the_index_follow_the_survival_function(d, kl_bits, widest):
    mean, std = (v[0] for v in posteriors(1, d, kl_bits, seed=3, widest=widest))
    n = 1500
    words, _ = drawn(np.tile(mean, (n, 1)), np.tile(std, (n, 1)), extra_bits=6)
    law = stretch(Blocks(torch.from_numpy(mean[None]).double(), torch.from_numpy(std[None] ** 2).double()))
    for log2 in range(2, int(kl_bits) + 5):
        expected = float(law.survival(np.array([log2 * NATS_PER_BIT]))[0, 0])
        measured = float(((words.index > 1 << log2) | words.truncated).mean())
        noise = stats.norm.isf(helpers.FALSE_ALARM / 2) * math.sqrt(expected * (1 - expected) / n)  # false alarm 1e-6 a point
        assert abs(measured - expected) < noise + 0.01 + 0.1 * expected * 2.0**-log2  # K is Poisson around T


@pytest.mark.parametrize(("d", "kl_bits"), [(8, 4.0), (8, 8.0), (64, 8.0)])
def test_mean_codeword_is_within_the_theorem(d, kl_bits):
    mean, std = matched(400, d, kl_bits)
    words, _ = drawn(mean, std, extra_bits=8)
    assert words.bits.mean() <= kl_bits + math.log2(kl_bits + 1) + 2.0
    assert words.bits.mean() >= kl_bits - 1.0


def test_blocks_of_64_weights_and_8_bits_cost_what_was_measured_before():
    """Research/gprs.md section 2: J = 3.06 with 4 extra bits, TV 0.22; the shared codebook makes blocks of one seed dependent."""
    mean, std = matched(500, 64, 8.0)
    assert np.allclose(kl_bits_of(mean, std), 8.0)
    coder = coders.get("gprs")
    runs = [coder.encode(mean, std, 1.0, seed=s) for s in range(3)]
    bits = np.mean([w.bits.mean() for w in runs])
    j = bits - np.mean([w.log_ratio_nats.mean() for w in runs]) / NATS_PER_BIT
    assert j == pytest.approx(3.1, abs=0.3)
    assert coder.expected_bits(mean, std, 1.0) == pytest.approx(np.full(500, bits), abs=0.6)
    assert np.mean([w.truncated.mean() for w in runs]) == pytest.approx(0.22, abs=0.06)
    assert np.mean([coder.index_bits(w.index).mean() for w in runs]) == pytest.approx(bits, abs=0.2)  # the table's share is in `bits`


@every_coder
@pytest.mark.parametrize("kl_bits", [3.0, 6.0])
def test_expected_bits_are_those_of_a_search(name, kl_bits):
    mean, std = matched(500, 4, kl_bits)
    coder = coders.get(name)
    words = coder.encode(mean, std, 1.0, seed=0)
    assert coder.expected_bits(mean, std, 1.0).mean() == pytest.approx(words.bits.mean(), abs=0.5)
    assert coder.predict_bits(kl_bits) == pytest.approx(words.bits.mean(), abs=4.0)  # predicted for one table over blocks of unequal KL


def test_what_is_not_accepted_is_the_best_of_the_budget():
    mean, std = posteriors(40, 12, 6.0)
    coder = coders.get("gprs", extra_bits=0.0)
    words = coder.encode(mean, std, 1.0, seed=9)
    limits = np.floor(2.0 ** np.maximum(kl_bits_of(mean, std), 4.0)).astype(int)
    assert 5 < words.truncated.sum() < 35
    assert (words.index <= limits).all()
    for b in range(40):
        k = np.arange(1, limits[b] + 1)
        candidates = candidate_values(9, 0, np.full(len(k), b), k, 12)
        ratios = log_ratio(candidates, mean[b], std[b])
        if words.truncated[b]:
            assert words.log_ratio_nats[b] == pytest.approx(ratios.max(), abs=1e-4)
            assert words.index[b] == 1 + int(ratios.argmax())
        else:
            assert words.log_ratio_nats[b] == pytest.approx(ratios[words.index[b] - 1], abs=1e-4)


def test_more_extra_bits_give_better_draws_and_longer_codewords():
    mean, std = matched(300, 16, 6.0)
    runs = [drawn(mean, std, extra_bits=t)[0] for t in (0.0, 4.0, 8.0)]
    assert runs[0].truncated.mean() > runs[1].truncated.mean() > runs[2].truncated.mean()
    assert runs[0].log_ratio_nats.mean() < runs[1].log_ratio_nats.mean() < runs[2].log_ratio_nats.mean()
    assert runs[0].bits.mean() < runs[1].bits.mean() < runs[2].bits.mean()


def test_the_search_never_passes_its_largest_number_of_candidates():
    mean, std = matched(5, 20, 40.0)
    words = coders.get("gprs", max_log2_candidates=10).encode(mean, std, 1.0, seed=0)
    assert (words.index <= 1 << 10).all()
    assert words.truncated.all()


# --- minimal random coding ---


def test_minimal_random_indices_have_one_length():
    mean, std = matched(50, 12, 5.5)
    words = coders.get("minimal-random").encode(mean, std, 1.0, seed=0)
    assert set(words.bits) == {6.0}
    assert (words.index <= 1 << 6).all()
    words = coders.get("minimal-random", bits=9).encode(mean, std, 1.0, seed=0)
    assert set(words.bits) == {9.0}
    assert (words.index <= 1 << 9).all()
    assert words.index.max() > 1 << 8


def test_the_best_candidate_has_the_largest_log_ratio():
    mean, std = matched(60, 12, 6.0)
    best = coders.get("minimal-random", bits=6, choice="best").encode(mean, std, 1.0, seed=0)
    sample = coders.get("minimal-random", bits=6, choice="sample").encode(mean, std, 1.0, seed=0)
    assert (best.log_ratio_nats >= sample.log_ratio_nats - 1e-5).all()
    assert best.log_ratio_nats.mean() > sample.log_ratio_nats.mean() + 0.5
    for b in range(10):
        ratios = log_ratio(candidate_values(0, 0, np.full(64, b), np.arange(1, 65), 12), mean[b], std[b])
        assert best.index[b] == 1 + int(ratios.argmax())


def test_a_sample_is_drawn_in_proportion_to_its_ratio():
    mean, std = np.full((1, 4), 0.4), np.full((1, 4), 0.8)
    ratios = np.exp(log_ratio(candidate_values(0, 0, np.zeros(8, np.int64), np.arange(1, 9), 4), mean[0], std[0]))
    counts = np.zeros(8)
    n = 2000
    for choice_seed in range(n):
        words = coders.get("minimal-random", bits=3, choice_seed=choice_seed).encode(mean, std, 1.0, seed=0)
        counts[words.index[0] - 1] += 1
    assert stats.chisquare(counts, n * ratios / ratios.sum()).pvalue > helpers.FALSE_ALARM


def test_a_target_given_by_its_ratio_along_a_direction_is_drawn_in_proportion():
    """Chi-square of 500 draws among 16 candidates of a block, at a false-alarm rate of 1e-6; few weights and many."""
    for d in (3, 20):
        direction = np.random.default_rng(d).standard_normal((2, d))
        shared = candidates_of(coders.get("minimal-random", bits=4), d, 16, block=5)
        ratios = np.exp(np.abs(shared @ direction[1]))
        counts = np.zeros(16)
        for choice_seed in range(500):
            coder = coders.get("minimal-random", bits=4, choice_seed=choice_seed)
            words = coder.encode_along(direction, torch.abs, seed=3, tensor=1, blocks=[9, 5])
            counts[words.index[1] - 1] += 1
        assert np.isclose(np.log(ratios[words.index[1] - 1]), words.log_ratio_nats[1], atol=1e-4)
        assert stats.chisquare(counts, 500 * ratios / ratios.sum()).pvalue > helpers.FALSE_ALARM
        words = coders.get("minimal-random", bits=4, choice="best").encode_along(direction, torch.abs, seed=3, tensor=1, blocks=[9, 5])
        assert words.index[1] - 1 == ratios.argmax()
        assert (words.bits == 4.0).all()


def candidates_of(coder, d: int, count: int, *, block: int, seed: int = 3, tensor: int = 1) -> np.ndarray:
    nothing = np.zeros(count)
    every = coders.Codewords(np.arange(1, count + 1), nothing, nothing, nothing.astype(bool), d)
    return coder.decode(every, 1.0, seed=seed, tensor=tensor, blocks=np.full(count, block))


def test_a_target_along_a_direction_sees_all_candidates_of_a_block_at_once():
    """More candidates than one matrix product holds; the ratio goes by rank, and only the third of all may be sent."""
    direction = np.random.default_rng(0).standard_normal((3, 12))
    coder = coders.get("minimal-random", bits=13)

    def third(along: torch.Tensor) -> torch.Tensor:
        return torch.full_like(along, -torch.inf).scatter_(0, along.topk(3, 0).indices[2:], 0.0)

    words = coder.encode_along(direction, third, seed=3, tensor=1, blocks=[4, 5, 6])
    for b, block in enumerate((4, 5, 6)):
        along = candidates_of(coder, 12, 1 << 13, block=block) @ direction[b]
        assert words.index[b] - 1 == np.argsort(-along)[2]


def test_targets_along_a_direction_are_checked():
    coder = coders.get("minimal-random", bits=4)
    for bad in (np.zeros(3), np.full((1, 3), math.nan)):
        with pytest.raises(CodingError, match="direction"):
            coder.encode_along(bad, torch.abs, seed=0)
    with pytest.raises(CodingError, match="bits"):
        coders.get("minimal-random").encode_along(np.zeros((1, 3)), torch.abs, seed=0)
    assert len(coder.encode_along(np.zeros((0, 3)), torch.abs, seed=0).index) == 0


# --- the trail of a search ---


@pytest.mark.parametrize("name", ["rejection", "gprs", "parallel-gprs", "branch-and-bound-gprs", "branch-and-bound-a-star"])
def test_a_trail_holds_what_the_search_looked_at_and_changes_nothing(name):
    count = 40
    mean, std = np.full((count, 1), 1.0), np.full((count, 1), 0.25)
    plain = coders.get(name).encode(mean, std, 1.0, seed=5)
    coder = coders.get(name)
    coder.trail = []
    words = coder.encode(mean, std, 1.0, seed=5)
    assert (words.index == plain.index).all()
    row, number, time, ratio = (
        np.concatenate([getattr(t, k) for t in coder.trail]) for k in ("rows", "candidate", "time", "log_ratio_nats")
    )
    nothing = np.zeros(len(number))
    values = coder.decode(coders.Codewords(number, nothing, nothing, nothing.astype(bool), 1), 1.0, seed=5, blocks=row)
    assert np.allclose(log_ratio(values, 1.0, 0.25), ratio, atol=1e-3)
    assert all(((row == b) & (number == words.index[b])).any() for b in range(count))
    law = stretch(Blocks.of(*(torch.as_tensor(v) for v in (mean, std)), torch.ones(())))
    for b in range(count):
        mine = row == b
        height = np.log(time[mine]) if name == "rejection" else law.thresholds(np.full(mine.sum(), b), np.log(time[mine]))
        accepted = number[mine][ratio[mine] >= height]
        if name == "parallel-gprs":  # the earliest of all jobs
            accepted = accepted[[np.argmin(time[mine][ratio[mine] >= height])]]
        if name != "branch-and-bound-a-star":
            assert accepted[0] == words.index[b]
    if name.startswith("branch"):
        low, high = (np.concatenate([getattr(t, k) for t in coder.trail]) for k in ("low", "high"))
        assert (low < high).all()
        assert (np.abs(stats.norm.cdf(values[:, 0]) - (low + high) / 2) <= (high - low) / 2 + 1e-7).all()


# --- single weights: branch and bound ---

NARROW = [(1.0, 0.25), (-2.0, 0.05), (3.0, 0.02), (0.0, 0.9), (3.0, 1e-3)]


@single_weight_coder
@pytest.mark.parametrize(("mean", "std"), NARROW)
def test_branch_and_bound_draws_follow_the_posterior(name, mean, std):
    """Kolmogorov-Smirnov at a false-alarm rate of 1e-6."""
    count = 4000
    coder = coders.get(name)
    words = coder.encode(np.full((count, 1), mean), np.full((count, 1), std), 1.0, seed=21)
    values = coder.decode(words, 1.0, seed=21)
    assert words.truncated.mean() < 0.01
    assert p_value(values[:, 0], mean, std) > 1e-6
    assert np.allclose(log_ratio(values, mean, std), words.log_ratio_nats, atol=1e-3 + 1e-6 / std)


@single_weight_coder
def test_branch_and_bound_takes_about_as_many_steps_as_the_kl_has_bits(name):
    """The search through all candidates takes about 4,500 here (research: Flamich 2023, and measured)."""
    words = coders.get(name).encode(np.full((2000, 1), 3.0), np.full((2000, 1), 0.02), 1.0, seed=2)
    depth = np.floor(np.log2(words.index)) + 1
    assert depth.mean() < 12.0


@single_weight_coder
@settings(max_examples=40)
@given(seed=seeds, tensor=st.integers(0, 9), mean=st.floats(-4, 4), std=st.floats(1e-3, 0.999), scale=st.floats(-6, 3))
def test_any_single_weight_comes_back(name, seed, tensor, mean, std, scale):
    prior_std = np.float32(math.exp(scale))
    coder, numbers = coders.get(name), np.array([5, 1, 8])
    means, stds = np.full((3, 1), mean * prior_std), np.full((3, 1), std * prior_std)
    words = coder.encode(means, stds, prior_std, seed=seed, tensor=tensor, blocks=numbers)
    values = coder.decode(words, prior_std, seed=seed, tensor=tensor, blocks=numbers)
    assert values.dtype == np.float32
    assert np.allclose(log_ratio(values / prior_std, mean, std), words.log_ratio_nats, atol=1e-2 + 1e-6 / std**2)
    for i, number in enumerate(numbers):  # each alone
        part = coders.Codewords(words.index[i : i + 1], words.bits[i : i + 1], words.log_ratio_nats[i : i + 1], words.truncated[:1], 1)
        assert coder.decode(part, prior_std, seed=seed, tensor=tensor, blocks=[number]) == values[i]


@single_weight_coder
def test_branch_and_bound_predicts_its_bits(name):
    mean, std = np.full((500, 1), 2.0), np.full((500, 1), 0.05)
    coder = coders.get(name)
    assert coder.expected_bits(mean, std, 1.0).mean() == pytest.approx(coder.encode(mean, std, 1.0, seed=0).bits.mean(), abs=0.3)


@single_weight_coder
def test_branch_and_bound_refuses_what_it_cannot_code(name):
    coder = coders.get(name)
    with pytest.raises(CodingError, match="single weights"):
        coder.encode(np.zeros((3, 2)), np.full((3, 2), 0.5), 1.0, seed=0)
    with pytest.raises(CodingError, match="narrower"):
        coder.encode(np.zeros((3, 1)), np.full((3, 1), 1.5), 1.0, seed=0)
    with pytest.raises(CodingError, match="1 value"):
        coder.encode(np.array([[math.nan]]), np.ones((1, 1)), 1.0, seed=0)


# --- parallel GPRS ---


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_parallel_draws_follow_the_posterior(workers):
    """Kolmogorov-Smirnov at a false-alarm rate of 1e-6."""
    coder = coders.get("parallel-gprs", workers=workers, extra_bits=12)
    for mean, std in ((1.0, 0.25), (2.0, 0.2)):
        words = coder.encode(np.full((3000, 1), mean), np.full((3000, 1), std), 1.0, seed=8)
        assert p_value(coder.decode(words, 1.0, seed=8)[:, 0], mean, std) > 1e-6


def test_the_number_of_workers_is_checked():
    for workers in (0, 257):
        with pytest.raises(CodingError, match="workers"):
            coders.get("parallel-gprs", workers=workers)
