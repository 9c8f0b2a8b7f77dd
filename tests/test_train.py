from __future__ import annotations

import copy
import itertools
import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from miracle_ban import convert, encode, fit, kl
from miracle_ban.errors import BudgetError, CodingError, MiracleError, MismatchError
from miracle_ban.feed import Feed
from miracle_ban.layers import posteriors, use_mode
from miracle_ban.objective import Steering, beta_elbo
from miracle_ban.train import FitReport, make_optimizer, train_step

QUIET = {"progress": False}


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3))


def state_of(model: nn.Module) -> str:
    return helpers.digest(model.state_dict())


def test_fit_meets_its_budget_and_keeps_the_error(fitted, trained_net):
    bnn, report = fitted
    assert isinstance(report, FitReport)
    assert report.budget_bytes == helpers.BUDGET
    assert abs(report.predicted_bytes - helpers.BUDGET) < 0.1 * helpers.BUDGET
    with use_mode(bnn, "mean"):
        assert helpers.error_rate(bnn) < helpers.error_rate(trained_net) + 0.03


def test_the_report_tells_what_happened(fitted):
    bnn, report = fitted
    assert report.num_examples == 512
    assert report.steps == 60 * 8
    assert report.history[0]["step"] == 0
    assert report.history[-1]["step"] == report.steps - 1
    assert {"step", "loss", "beta", "kl_bits", "predicted_bytes", "learning_rate"} <= set(report.history[0])
    assert all(math.isfinite(v) for row in report.history for v in row.values())
    assert report.kl_bits == pytest.approx(float(kl(bnn).detach()) / math.log(2), rel=1e-5)
    assert set(report.kl_bits_by_tensor) == set(posteriors(bnn))
    assert sum(report.kl_bits_by_tensor.values()) == pytest.approx(report.kl_bits)
    assert report.live_weights == sum(p.mean.numel() for p in posteriors(bnn).values())
    assert report.widths == {"conv": posteriors(bnn)["conv.weight"].kept[0], "fc1": posteriors(bnn)["fc1.weight"].kept[0]}
    assert report.seconds > 0
    assert report.as_dict()["predicted_bytes"] == report.predicted_bytes


def test_predicted_bytes_are_near_those_of_the_file(bnn, fitted):
    archive = encode(bnn, names=False, budget="1 MB", **QUIET)
    assert archive.size_bytes == pytest.approx(fitted[1].predicted_bytes, rel=0.15)


def test_half_the_budget_halves_the_prediction(trained_net, batches, fitted):
    bnn = convert(trained_net)
    report = fit(bnn, batches, F.cross_entropy, budget=helpers.BUDGET // 2, epochs=60, **QUIET)
    assert abs(report.predicted_bytes - helpers.BUDGET / 2) < 0.1 * helpers.BUDGET / 2
    assert report.beta > fitted[1].beta


def test_narrowing_drops_units_to_what_the_budget_can_pay_for(trained_net, batches):
    bnn = convert(trained_net)
    report = fit(bnn, batches, F.cross_entropy, budget=80, epochs=1, weights_per_bit=0.5, **QUIET)
    assert report.live_weights <= 0.5 * 8 * 80
    assert report.widths["conv"] < 8
    with use_mode(bnn, "mean"):
        assert helpers.error_rate(bnn) < 0.1
    bnn = convert(trained_net)
    report = fit(bnn, batches, F.cross_entropy, budget=80, epochs=1, narrow=False, **QUIET)
    assert report.widths == {"conv": 8, "fc1": 16}


def test_without_a_budget_beta_stays_and_less_beta_keeps_more_bits(batches):
    sizes = {}
    for beta in (0.01, 1.0):
        bnn = convert(small_net())
        report = fit(bnn, batches, F.cross_entropy, beta=beta, epochs=10, **QUIET)
        assert report.budget_bytes is None
        assert report.beta == beta
        assert {row["beta"] for row in report.history} == {beta}
        sizes[beta] = report.kl_bits
    assert sizes[0.01] > 2 * sizes[1.0]


def test_the_same_seed_gives_the_same_posteriors_and_leaves_torchs_generator_alone(batches):
    states = []
    for seed, noise in ((0, 5), (0, 6), (1, 5)):
        bnn = convert(small_net())
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        fit(bnn, batches, F.cross_entropy, budget=150, epochs=2, seed=seed, **QUIET)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(state_of(bnn))
    assert states[0] == states[1] != states[2]


def test_a_loader_a_list_and_any_iterable_are_the_same_data(batches):
    images, labels = (torch.cat(t) for t in zip(*batches, strict=True))

    class Pairs:
        def __iter__(self):
            return iter(batches)

    states = []
    for feed in (batches, tuple(batches), Pairs(), DataLoader(TensorDataset(images, labels), batch_size=64)):
        bnn = convert(small_net())
        report = fit(bnn, feed, F.cross_entropy, epochs=1, **QUIET)
        assert report.num_examples == 512
        assert report.steps == 8
        states.append(state_of(bnn))
    assert len(set(states[:3])) == 1  # a DataLoader draws from torch's generator itself


def test_the_number_of_examples_can_be_given(batches):
    assert fit(convert(small_net()), batches, F.cross_entropy, epochs=1, num_examples=9999, **QUIET).num_examples == 9999
    assert Feed(batches, torch.device("cpu")).num_examples == 512


def test_rows_of_the_history_go_to_the_callback_and_nothing_to_the_screen(batches, capfd):
    rows = []
    report = fit(convert(small_net()), batches, F.cross_entropy, epochs=5, callback=rows.append, **QUIET)
    assert rows == report.history
    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_is_on_stderr(batches, capfd):
    fit(convert(small_net()), batches, F.cross_entropy, epochs=1)
    out, err = capfd.readouterr()
    assert out == ""
    assert "fit" in err


@pytest.mark.parametrize("make", [iter, lambda b: (pair for pair in b), lambda b: zip(b, b, strict=True)], ids=["iter", "generator", "zip"])
def test_one_shot_iterators_are_refused(batches, make):
    with pytest.raises(MiracleError, match="more than once"):
        fit(convert(small_net()), make(batches), F.cross_entropy, epochs=1, **QUIET)


@pytest.mark.parametrize("wrong", [[], [torch.ones(4, 1, 8, 8)], [(torch.ones(4, 1, 8, 8),)], [(1, 2, 3)], None, 5, "batches"])
def test_batches_that_are_no_pairs_are_refused(wrong):
    with pytest.raises(MiracleError):
        fit(convert(small_net()), wrong, F.cross_entropy, epochs=1, **QUIET)


def test_an_empty_loader_is_refused():
    empty = DataLoader(TensorDataset(torch.ones(0, 1, 8, 8), torch.ones(0)), batch_size=4)
    with pytest.raises(MiracleError, match=r"no training examples|no batch"):
        fit(convert(small_net()), empty, F.cross_entropy, epochs=1, **QUIET)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(batches, bad):
    with pytest.raises(MiracleError, match="loss"):
        fit(convert(small_net()), batches, lambda out, y: F.cross_entropy(out, y) * bad, epochs=1, **QUIET)


def test_only_converted_models_can_be_fitted(batches):
    with pytest.raises(MismatchError, match="convert"):
        fit(small_net(), batches, F.cross_entropy, **QUIET)


@pytest.mark.parametrize("budget", [1, 10, "20 B"])
def test_a_budget_too_small_is_an_error_that_says_what_would_do(batches, budget):
    bnn = convert(small_net())
    with pytest.raises(BudgetError, match="raise it above") as error:
        fit(bnn, batches, F.cross_entropy, budget=budget, epochs=1, **QUIET)
    enough = int(str(error.value).split("raise it above ")[1].split()[0]) + 1
    fit(convert(small_net()), batches, F.cross_entropy, budget=enough, epochs=1, **QUIET)


@pytest.mark.parametrize("budget", ["", "abc", 0, -5, math.nan])
def test_a_budget_that_is_no_size_is_an_error(batches, budget):
    with pytest.raises(BudgetError):
        fit(convert(small_net()), batches, F.cross_entropy, budget=budget, epochs=1, **QUIET)


def test_unknown_coders_are_refused(batches):
    with pytest.raises(MismatchError, match="no coder"):
        fit(convert(small_net()), batches, F.cross_entropy, coder="nonsense", **QUIET)


class WorkError(Exception):
    pass


def failing_after(calls: int):
    """A loss that raises after so many calls."""
    count = itertools.count()

    def loss(out, y):
        if next(count) >= calls:
            raise WorkError
        return F.cross_entropy(out, y)

    return loss


@pytest.mark.parametrize("calls", [3, 20, 55, 63])
def test_an_interrupted_fit_goes_on_as_if_nothing_had_happened(batches, tmp_path, calls):
    net, path = helpers.TinyNet(), tmp_path / "state"
    whole, first, second = convert(net), convert(net), convert(net)
    expected = fit(whole, batches, F.cross_entropy, budget=150, epochs=8, **QUIET)
    options = {"budget": 150, "epochs": 8, "checkpoint": path, **QUIET}
    with pytest.raises(WorkError):
        fit(first, batches, failing_after(calls), **options)
    report = fit(second, batches, F.cross_entropy, **options)
    assert state_of(second) == state_of(whole)
    assert report.history == expected.history
    assert report.predicted_bytes == expected.predicted_bytes


def test_a_finished_fit_is_not_repeated(batches, tmp_path):
    path = tmp_path / "state"
    bnn = convert(small_net())
    fit(bnn, batches, F.cross_entropy, epochs=2, checkpoint=path, **QUIET)
    again = convert(small_net())
    fit(again, batches, failing_after(0), epochs=2, checkpoint=path, **QUIET)
    assert state_of(again) == state_of(bnn)


def test_checkpoints_of_other_work_and_damaged_ones_are_refused(batches, tmp_path):
    path = tmp_path / "state"
    bnn = convert(small_net())
    fit(bnn, batches, F.cross_entropy, epochs=1, checkpoint=path, **QUIET)
    for other in ({"seed": 1}, {"epochs": 2}, {"budget": 200}, {"learning_rate": 1e-3}):
        with pytest.raises(CodingError, match="state"):
            fit(convert(small_net()), batches, F.cross_entropy, **{"epochs": 1, "checkpoint": path, **QUIET, **other})
    with pytest.raises(CodingError):
        fit(convert(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))), batches, F.cross_entropy, epochs=1, checkpoint=path, **QUIET)
    with pytest.raises(CodingError):
        encode(copy.deepcopy(bnn), checkpoint=path, **QUIET)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"nonsense", data[:100] + b"\0" * 50 + data[150:]):
        path.write_bytes(damaged)
        with pytest.raises(CodingError, match="state"):
            fit(convert(small_net()), batches, F.cross_entropy, epochs=1, checkpoint=path, **QUIET)
    with pytest.raises(MiracleError):
        fit(convert(small_net()), batches, F.cross_entropy, epochs=1, checkpoint=tmp_path / "missing" / "state", **QUIET)


# --- the objective ---


def test_the_objective_is_the_loss_and_the_share_of_the_kl():
    assert float(beta_elbo(torch.tensor(2.0), torch.tensor(30.0), beta=0.5, num_examples=10)) == 2.0 + 0.5 * 30 / 10


def test_steering_moves_beta_towards_the_target_and_no_further_than_its_bounds():
    steering = Steering(1.0, gain=0.1, dead_band=0.01, bounds=(0.5, 2.0))
    assert steering.update(200, 100) > 1.0
    before = steering.beta
    assert steering.update(100.5, 100) == before  # within the dead band
    assert steering.update(50, 100) < before
    for _ in range(100):
        steering.update(1e9, 1)
    assert steering.beta == 2.0
    for _ in range(200):
        steering.update(0, 1)
    assert steering.beta == 0.5


def test_a_step_of_steering_is_at_most_its_gain():
    steering = Steering(1.0, gain=0.05)
    assert steering.update(1e12, 1.0) == pytest.approx(math.exp(0.05))
    assert 1.0 < Steering(1.0, gain=0.05).update(1.02, 1.0) < 1.01


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0}, {"epochs": -1}, {"epochs": float("nan")}, {"learning_rate": 0}, {"num_examples": 0}, {"num_examples": -5},
     {"beta": -1.0}, {"beta": float("nan")}],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(options):
    bnn = convert(nn.Linear(3, 2))
    with pytest.raises(MiracleError, match="must be"):
        fit(bnn, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))], F.cross_entropy, progress=False, **options)


@pytest.mark.parametrize(
    "loss", [lambda o, t: F.cross_entropy(o.detach(), t), lambda o, t: F.cross_entropy(o, t, reduction="none"), lambda o, t: 1.0]
)
def test_a_loss_that_nothing_can_be_learned_from_is_refused(loss):
    bnn = convert(nn.Linear(3, 2))
    with pytest.raises(MiracleError, match="scalar tensor that depends on the outputs"):
        fit(bnn, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))], loss, progress=False)


@pytest.mark.parametrize("local", [True, False])
def test_training_within_an_autocast_sees_its_own_steps(local, batches):
    """Autocast keeps the weights that it has cast until its block ends, and this block is around all of the training."""
    bnn = convert(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), local=local)
    with torch.no_grad():
        for p in posteriors(bnn).values():
            p.mean.zero_()
            p.log_std.fill_(-10.0)
    optimizer = make_optimizer(bnn, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = train_step(bnn, batches[0], F.cross_entropy, optimizer, beta=1e-9, num_examples=512)
        with use_mode(bnn, "mean"), torch.autocast("cpu", enabled=False):
            expected = float(F.cross_entropy(bnn(batches[0][0]), batches[0][1]))
        second, _ = train_step(bnn, batches[0], F.cross_entropy, optimizer, beta=1e-9, num_examples=512)
    assert first == pytest.approx(math.log(3), rel=1e-2)
    assert abs(expected - first) > 0.1
    assert second == pytest.approx(expected, rel=2e-2)
