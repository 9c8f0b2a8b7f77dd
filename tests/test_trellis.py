from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_ban import coders, trellis
from miracle_ban.coders.trellis import (
    OVERLAP,
    SEGMENT,
    Features,
    StepLaw,
    best_path,
    emitted_bits,
    path_bits,
    step_bits,
    viterbi,
)
from miracle_ban.errors import CodingError
from miracle_ban.gaussian import Blocks
from miracle_ban.trellis import LARGEST_STEP_BITS, LARGEST_WIDTH, RATE_UNIT, Rate

seeds = st.integers(0, (1 << 64) - 1)
rates = st.builds(Rate.of, st.integers(1, 3000), st.floats(0.5, 5000))


def matched(count: int, kl_bits: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of `count` weights, std^2 + mean^2 = 1 on average, of `kl_bits` of KL together."""
    v = 2.0 ** (-2.0 * kl_bits / count)
    mean = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * math.sqrt(1 - v)
    return mean, torch.full((count,), math.sqrt(v), dtype=torch.float64)


def law_of(rate: Rate, memory: int, kl_bits: float, seed: int = 0) -> StepLaw:
    mean, std = matched(rate.count, kl_bits, seed)
    return StepLaw(Features(5, memory), 3, rate, mean, std, torch.ones(rate.count, dtype=torch.float64))


def read_states(rate: Rate, memory: int, bits: np.ndarray) -> np.ndarray:
    """The states of all steps as a decoder reads them from the tensor's own bits."""
    return trellis.states(trellis.words(bits), rate, np.zeros(1, np.int64), 0, memory, np.arange(rate.steps))


# --- the frozen part ---


@given(st.integers(1, 10**7), st.floats(0.1, 1e8))
def test_a_rate_takes_the_bits_that_were_asked_for(count, bits):
    rate = Rate.of(count, bits)
    assert 1 <= rate.width <= LARGEST_WIDTH
    assert RATE_UNIT <= rate.rate <= RATE_UNIT * LARGEST_STEP_BITS
    assert (rate.steps - 1) * rate.width < count <= rate.steps * rate.width
    least, most = -(-count // LARGEST_WIDTH), LARGEST_STEP_BITS * count
    wanted = min(max(bits, least), most)
    assert abs(rate.bits - wanted) <= 1 + rate.steps / RATE_UNIT


@settings(max_examples=60)
@given(rates, seeds, st.integers(0, 50))
def test_every_weight_is_in_one_step(rate, seed, tensor):
    place = trellis.place(seed, tensor, rate, np.arange(rate.steps))
    assert place.shape == (rate.steps, rate.width)
    assert sorted(place[place >= 0].tolist()) == list(range(rate.count))
    some = np.arange(rate.steps)[:: max(1, rate.steps // 3)]
    assert (trellis.place(seed, tensor, rate, some) == place[some]).all()


@settings(max_examples=40)
@given(st.lists(rates, min_size=1, max_size=4), st.integers(0, 6), st.integers(4, 20), st.randoms(use_true_random=False))
def test_the_stream_is_the_frames_one_after_the_other(all_rates, log2_frames, memory, random):
    """The states of all steps, against reading the stream step by step."""
    bits = np.array([random.getrandbits(1) for _ in range(sum(r.bits for r in all_rates))], np.uint8)
    starts, words = np.stack(list(trellis.first_bits(all_rates, log2_frames)), 1), trellis.words(bits)
    frames = np.arange(1 << log2_frames)
    offset = [starts[:, i] - r.bits_before(r.first_step(frames, log2_frames)) for i, r in enumerate(all_rates)]
    states = [trellis.states(words, r, o, log2_frames, memory, np.arange(r.steps)) for r, o in zip(all_rates, offset, strict=True)]
    at = state = 0
    seen = [0] * len(all_rates)
    for frame in range(1 << log2_frames):
        for i, r in enumerate(all_rates):
            for t in range(r.first_step(frame, log2_frames), r.first_step(frame + 1, log2_frames)):
                assert t == seen[i]
                for _ in range(step_bits(r, t, t + 1)[0]):
                    state, at = (state << 1 | int(bits[at])) % (1 << memory), at + 1
                assert states[i][t] == state
                seen[i] += 1
    assert seen == [r.steps for r in all_rates]
    assert at == len(bits)


@settings(max_examples=40)
@given(rates, seeds, st.integers(0, 5), st.integers(4, 11), st.randoms(use_true_random=False))
def test_a_tensor_is_its_steps_put_in_place(rate, seed, tensor, memory, random):
    words = trellis.words(np.array([random.getrandbits(1) for _ in range(rate.bits)], np.uint8))
    whole = trellis.decode_steps(seed, tensor, rate, memory, words, np.zeros(1, np.int64), 0)
    steps = np.arange(rate.steps)
    states = trellis.states(words, rate, np.zeros(1, np.int64), 0, memory, steps)
    values = trellis.step_values(seed, tensor, rate, steps, states)
    place = trellis.place(seed, tensor, rate, steps)
    assert whole.dtype == np.float32
    assert (whole[place[place >= 0]] == values[place >= 0]).all()
    assert (trellis.signs(seed, tensor, 0, rate.steps)[rate.steps // 2 :] == trellis.signs(seed, tensor, rate.steps // 2, rate.steps)).all()


def test_codebook_rows_are_normal_and_signs_are_fair():
    """Moments at five standard errors: false alarms at 6e-7 each."""
    rows = trellis.codebook(1, np.arange(1 << 12), 16).astype(np.float64)
    size = rows.size
    assert abs(rows.mean()) < 5 / math.sqrt(size)
    assert abs(rows.var() - 1) < 5 * math.sqrt(2 / size)
    assert abs(trellis.signs(1, 2, 0, 10_000).mean() - 0.5) < 5 * 0.5 / 100


# --- the encoder ---


@pytest.mark.parametrize("new_bits", [[1] * 9, [1, 2, 1, 2, 1, 2], [3, 3, 3], [0, 2, 0, 2, 2, 1], [4, 4], [1, 0, 5, 1]])
@pytest.mark.parametrize("fixed_end", [False, True])
def test_viterbi_finds_the_best_of_all_paths(new_bits, fixed_end):
    memory, sequences = 5, 3
    table = torch.randn(len(new_bits), sequences, 1 << memory, generator=torch.Generator().manual_seed(1))
    start = torch.tensor([0, 3, 31])
    paths = []
    for bits in itertools.product(*(range(1 << k) for k in new_bits)):
        state, path = start.clone(), []
        for k, u in zip(new_bits, bits, strict=True):
            state = (state << k | u) % (1 << memory)
            path.append(state)
        paths.append(torch.stack(path))
    every = torch.stack(paths)  # [paths, steps, sequences]
    value = torch.stack([table[t].gather(1, every[:, t].T).T for t in range(len(new_bits))]).sum(0)
    end = every[7, -1] if fixed_end else None
    if end is not None:
        value = value.masked_fill(every[:, -1] != end, -torch.inf)
    states, found = viterbi(lambda i, j: table[i:j].clone(), new_bits, sequences, memory, start, end)
    assert torch.allclose(found, value.max(0).values, atol=1e-5)
    for s in range(sequences):
        assert torch.equal(states[:, s], every[value[:, s].argmax(), :, s])


@pytest.mark.parametrize("steps", [1, 5, SEGMENT, 2 * SEGMENT, 4 * SEGMENT + 77])
def test_a_path_is_a_path_however_it_was_searched(steps):
    rate, memory = Rate(2 * steps, 2, 70), 6
    law = law_of(rate, memory, 0.8 * rate.bits)
    states, value = best_path(law)
    assert (read_states(rate, memory, path_bits(law, states)) == states).all()
    const, factors = law.coefficients(0, steps)
    scores = torch.cat([law.scores(const[i : i + 64], factors[i : i + 64]) for i in range(0, steps, 64)])
    assert float(scores.gather(1, torch.from_numpy(states)[:, None]).double().sum()) == pytest.approx(value, rel=1e-4)


def test_cutting_a_sequence_into_segments_costs_next_to_nothing():
    rate, memory = Rate(4 * (3 * SEGMENT + 40), 4, 64), 8
    law = law_of(rate, memory, 0.85 * rate.bits)
    cut = best_path(law)[1]
    const, factors = law.coefficients(0, rate.steps)
    whole = viterbi(
        lambda i, j: law.scores(const[i:j], factors[i:j])[:, None, :], step_bits(rate, 0, rate.steps), 1, memory, torch.tensor([0]), None
    )[1]
    assert cut <= float(whole[0]) + 0.05
    assert cut > float(whole[0]) * (1 - 1e-3)


def test_a_stretch_in_the_middle_goes_on_from_the_state_before_it():
    rate, memory = Rate(3000, 1, 90), 6
    law = law_of(rate, memory, 0.8 * rate.bits)
    head, _ = best_path(law, 0, 0, 1000)
    tail, _ = best_path(law, int(head[-1]), 1000, 3000)
    bits = np.concatenate([path_bits(law, head), path_bits(law, tail, 1000)])
    assert (read_states(rate, memory, bits) == np.concatenate([head, tail])).all()


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 8)), min_size=1, max_size=20))
def test_emitted_bits_are_the_lowest_of_each_state(steps):
    states, new = (np.array(v, np.int64) for v in zip(*steps, strict=True))
    text = "".join(format(s % (1 << k), f"0{k}b") if k else "" for s, k in steps)
    assert "".join(map(str, emitted_bits(states, new).tolist())) == text


@settings(max_examples=25)
@given(seeds, st.integers(1, 300), st.integers(1, 3), st.floats(0.0, 9.0), st.integers(8, 10), st.floats(-5, 3))
def test_whatever_is_encoded_is_decoded(seed, d, rows, bits_a_weight, memory, scale):
    mean, std = (torch.stack(v) for v in zip(*(matched(d, bits_a_weight * d, i) for i in range(rows)), strict=True))
    prior_std = np.float32(math.exp(scale))
    coder, numbers = coders.get("trellis", memory=memory), np.arange(rows) * 2 + 1
    words = coder.encode(mean * prior_std, std * prior_std, prior_std, seed=seed, tensor=2, blocks=numbers)
    values = coder.decode(words, prior_std, seed=seed, tensor=2, blocks=numbers)
    assert values.shape == (rows, d)
    assert values.dtype == np.float32
    assert words.index.shape == (rows, int(words.bits[0]))
    assert set(words.index.ravel().tolist()) <= {0, 1}
    assert (words.bits == coder.expected_bits(mean * prior_std, std * prior_std, prior_std)).all()
    ratio = Blocks.of(mean, std, torch.ones(1)).log_ratio(torch.from_numpy(values.astype(np.float64) / float(prior_std)))
    rounding = 1e-6 * ((1 + values.astype(np.float64) ** 2 / float(prior_std) ** 2) / std.numpy() ** 2).sum(1) + 1e-3  # of float32
    assert (np.abs(ratio.numpy() - words.log_ratio_nats) < rounding).all()
    alone = coders.Codewords(words.index[-1:], words.bits[-1:], words.log_ratio_nats[-1:], words.truncated[-1:], d, words.info)
    assert (coder.decode(alone, prior_std, seed=seed, tensor=2, blocks=numbers[-1:]) == values[-1:]).all()


@pytest.mark.parametrize(
    ("memory", "bits_a_weight", "largest"), [(12, 0.25, 1.5), (12, 0.7, 1.5), (12, 1.0, 1.5), (12, 2.3, 1.5), (16, 0.25, 1.1)]
)
def test_bits_spent_over_log_ratio_are_those_measured_before(memory, bits_a_weight, largest):
    """J = bits - log2 r, for every 16 bits: at most 1.5 with 2^12 states, 1.1 with 2^16 (research/gprs.md 3.2)."""
    count = round(4000 / bits_a_weight)
    mean, std = matched(count, count * bits_a_weight)
    words = coders.get("trellis", memory=memory).encode(mean[None], std[None], 1.0, seed=1)
    gap = words.bits[0] - words.log_ratio_nats[0] / math.log(2)
    assert 16 * gap / words.bits[0] < largest


def test_the_rate_can_be_given():
    mean, std = matched(640, 200)
    for rate in (0.25, 1.0, 3.5):
        words = coders.get("trellis", memory=8, bits_per_weight=rate).encode(mean[None], std[None], 1.0, seed=1)
        assert words.bits[0] == pytest.approx(640 * rate, abs=640 / 64)


def test_the_memory_follows_the_size_unless_it_is_given():
    coder = coders.get("trellis")
    assert [coder.settled(14.0, bits).memory for bits in (100, 1 << 20, (1 << 20) + 1, 1 << 24, 1 << 30)] == [16, 16, 15, 12, 12]
    assert coders.get("trellis", memory=9).settled(14.0, 1e9).memory == 9
    assert coders.get("trellis", memory=16).efficiency > coder.efficiency


def test_options_out_of_range_are_refused():
    for memory in (7, 21):
        with pytest.raises(CodingError, match="memory"):
            coders.get("trellis", memory=memory)
    for rate in (0.0, 8.5):
        with pytest.raises(CodingError, match="bits_per_weight"):
            coders.get("trellis", bits_per_weight=rate)


def test_segments_look_alike():
    assert SEGMENT % RATE_UNIT == OVERLAP % RATE_UNIT == 0
