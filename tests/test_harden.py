"""Hardening: training under noise that is as large as was asked for, after which noise does less harm."""

from __future__ import annotations

import copy
import importlib
import math
from types import SimpleNamespace

import helpers
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from miracle_ban import MiracleError, compress, harden
from miracle_ban.coders import Trellis
from miracle_ban.errors import CodingError
from miracle_ban.harden import _descent, _noisy, _stds

QUIET = {"progress": False}
NOISE = 0.6


def normed() -> nn.Module:
    """A network with a BatchNorm, not trained."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


@torch.no_grad()
def loss_under_noise(net: nn.Module, batches, draws: int = 40) -> float:
    """Mean over draws of the noise, drawn here, over the linear layers and kernels."""
    torch.manual_seed(5)
    total = 0.0
    for _ in range(draws):
        other = copy.deepcopy(net).eval()
        for p in other.parameters():
            if p.dim() > 1:
                p += math.sqrt(NOISE) * p.square().mean(tuple(range(1, p.dim())), keepdim=True).sqrt() * torch.randn_like(p)
        total += sum(float(F.cross_entropy(other(x), y)) for x, y in batches) / len(batches)
    return total / draws


def faster(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 3e-3)


def test_noise_does_less_harm_to_a_hardened_network(trained_net, batches):
    before = helpers.weight_state(trained_net)
    hardened, course = harden(trained_net, batches, F.cross_entropy, noise=NOISE, epochs=40, optimizer=faster, **QUIET)
    assert helpers.same_state(trained_net.state_dict(), before)
    assert type(hardened) is type(trained_net)
    assert loss_under_noise(hardened, batches) < 0.7 * loss_under_noise(trained_net, batches)
    assert course["steps"] == course["history"][-1]["step"] == 40 * len(batches)


def test_the_noise_is_as_large_as_was_asked_for():
    """Chi-squared on the draws of each unit, two-sided, at helpers.FALSE_ALARM over all of them."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(50, 5), nn.Linear(6, 2))
    noise = {"0.weight": 0.3, "1.weight": 0.05, "1.bias": 2.0}
    drawn = [_noisy(net, _stds(net, noise)) for _ in range(400)]
    assert set(drawn[0]) == set(noise)
    checked = 0
    for name, variance in noise.items():
        weight = net.get_parameter(name).detach()
        units = [slice(None)] if weight.dim() == 1 else range(len(weight))
        for unit in units:
            scale = variance * float(weight[unit].square().mean())
            errors = torch.stack([d[name].detach()[unit] - weight[unit] for d in drawn]).double()
            chance = stats.chi2.cdf(float(errors.square().sum() / scale), errors.numel())
            assert helpers.FALSE_ALARM / 20 < chance < 1 - helpers.FALSE_ALARM / 20
            checked += 1
    assert checked == 4 + 5 + 1


def test_one_number_is_for_matrices_and_kernels_alone():
    assert set(_stds(normed(), 0.1)) == {"0.weight", "4.weight"}
    assert _stds(normed(), 0.0) == {}


def test_statistics_of_norms_are_those_without_noise(batches):
    hardened, _ = harden(normed(), batches, F.cross_entropy, noise=NOISE, epochs=3, **QUIET)
    with torch.no_grad():
        seen = torch.cat([hardened[0](x) for x, _ in batches])
    assert torch.allclose(hardened[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(hardened[1].running_var, seen.var((0, 2, 3)), rtol=1e-2)


def test_the_mode_of_the_network_is_kept_and_its_norms_learn(batches):
    net = normed().eval()
    hardened, _ = harden(net, batches, F.cross_entropy, noise=0.1, epochs=2, **QUIET)
    assert not hardened.training
    assert harden(net.train(), batches, F.cross_entropy, noise=0.1, epochs=1, **QUIET)[0].training
    assert not torch.equal(hardened[1].weight, net[1].weight)


def test_sgd_where_there_are_norms_and_the_callers_own_wherever_it_is_given(trained_net, batches):
    assert isinstance(_descent(normed()), torch.optim.SGD)
    assert isinstance(_descent(trained_net), torch.optim.AdamW)
    made = []

    def still(model):
        made.append(model)
        return torch.optim.SGD(model.parameters(), 1e-12)

    same, _ = harden(trained_net, batches, F.cross_entropy, noise=0.1, epochs=1, optimizer=still, **QUIET)
    assert made
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(same.parameters(), trained_net.parameters(), strict=True))


def test_what_the_caller_froze_stays(trained_net, batches):
    net = copy.deepcopy(trained_net)
    net.conv.requires_grad_(False)
    hardened, _ = harden(net, batches, F.cross_entropy, noise=0.1, epochs=1, **QUIET)
    assert torch.equal(hardened.conv.weight, trained_net.conv.weight)
    assert not torch.equal(hardened.fc1.weight, trained_net.fc1.weight)


def test_steps_within_an_autocast_see_each_other(trained_net, batches):
    with torch.autocast("cpu", torch.bfloat16):
        hardened, course = harden(normed(), [batches[0]], F.cross_entropy, noise=1e-6, epochs=60, **QUIET)
    with torch.no_grad():
        now = float(F.cross_entropy(hardened.train()(batches[0][0]), batches[0][1]))
    assert now == pytest.approx(course["history"][-1]["loss"], rel=0.3, abs=0.02)
    assert now < 0.5 * course["history"][0]["loss"]


def test_interrupted_hardening_goes_on_to_the_same_weights(batches, tmp_path):
    def interrupted(out, y):
        calls.append(1)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return F.cross_entropy(out, y)

    calls: list[int] = []
    options = {"noise": 0.2, "epochs": 6, "checkpoint": tmp_path / "state", **QUIET}
    with pytest.raises(KeyboardInterrupt):
        harden(normed(), batches, interrupted, **options)
    resumed, course = harden(normed(), batches, F.cross_entropy, **options)
    whole, _ = harden(normed(), batches, F.cross_entropy, **(options | {"checkpoint": None}))
    assert helpers.same_state(resumed.state_dict(), whole.state_dict())
    again, over = harden(normed(), batches, interrupted, **options)  # over: no step is taken
    assert helpers.same_state(again.state_dict(), whole.state_dict())
    assert over["history"] == course["history"]
    with pytest.raises(CodingError, match="seed was 0, now 1"):
        harden(normed(), batches, F.cross_entropy, seed=1, **options)


def test_compress_hardens_and_then_packages(trained_net, batches, tmp_path):
    options = {"budget": 230, "epochs": 5, "coder": Trellis(memory=8), **QUIET}
    archive = compress(trained_net, batches, F.cross_entropy, hardened=True, checkpoint=tmp_path / "state", **options)
    assert archive.info["harden"]["steps"] == 5 * len(batches)
    assert "tune" not in archive.info
    assert len(archive.to_bytes()) <= 230
    assert not list(tmp_path.iterdir())
    untrained = compress(trained_net, inputs=batches, budget=230, coder=Trellis(memory=8), **QUIET)
    assert archive.to_bytes() != untrained.to_bytes()


def test_the_noise_follows_from_the_rates_of_the_plan(trained_net, batches, monkeypatch):
    given = {}

    def spy(net, *args, noise, **options):
        given[budget] = noise
        return copy.deepcopy(net), {}

    module = importlib.import_module("miracle_ban.compress")
    monkeypatch.setattr(module, "harden", spy)
    for budget in (230, 400):
        compress(trained_net, batches, F.cross_entropy, budget=budget, hardened=True, coder=Trellis(memory=8), **QUIET)
    assert set(given[400]) == {"conv.weight", "fc1.weight", "fc2.weight"}
    assert all(0 < given[400][name] < given[230][name] for name in given[230])
    nothing_left = SimpleNamespace(kl_bits={"fc1.weight": 0.0, "fc1.bias": 9.0})
    assert module._noise(nothing_left, trained_net) == {"fc1.weight": pytest.approx(1 / (2**0.6 - 1))}  # noise all the same


def test_networks_with_norms_are_hardened_where_there_are_passes_enough(trained_net, batches):
    options = {"budget": 700, "coder": Trellis(memory=8), **QUIET}
    assert compress(normed(), batches, F.cross_entropy, epochs=20, **options).info["harden"]["steps"] == 20 * len(batches)
    for net, epochs, hardened in ((normed(), 20, False), (normed(), 19, None), (trained_net, 20, None)):
        assert "tune" in compress(net, batches, F.cross_entropy, epochs=epochs, hardened=hardened, **options).info


def test_errors_say_what_is_wrong(trained_net, batches):
    with pytest.raises(MiracleError, match="noise is given for 'fc9', which is no parameter of TinyNet"):
        harden(trained_net, batches, F.cross_entropy, noise={"fc9": 0.1}, **QUIET)
    with pytest.raises(MiracleError, match=r"noise of fc1\.weight must be zero or positive, not -1"):
        harden(trained_net, batches, F.cross_entropy, noise={"fc1.weight": -1.0}, **QUIET)
    with pytest.raises(MiracleError, match="epochs must be positive, not 0"):
        harden(trained_net, batches, F.cross_entropy, noise=0.1, epochs=0, **QUIET)
    with pytest.raises(MiracleError, match="no parameter of TinyNet wants a gradient"):
        harden(copy.deepcopy(trained_net).requires_grad_(False), batches, F.cross_entropy, noise=0.1, **QUIET)
    with pytest.raises(MiracleError, match="the loss became nan in hardening, step 0"):
        harden(trained_net, batches, lambda out, y: F.cross_entropy(out, y) * float("nan"), noise=0.1, **QUIET)
    with pytest.raises(MiracleError, match="must return a scalar tensor"):
        harden(trained_net, batches, lambda out, y: F.cross_entropy(out, y).detach(), noise=0.1, **QUIET)
    with pytest.raises(CodingError, match="hardening needs a training set"):
        compress(trained_net, budget=230, hardened=True, **QUIET)
    with pytest.raises(CodingError, match="only a network that is packaged first can be hardened"):
        compress(trained_net, batches, F.cross_entropy, budget=70, hardened=True, **QUIET)
