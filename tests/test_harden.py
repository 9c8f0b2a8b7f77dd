"""Hardening: training under noise that is as large as was asked for, after which noise does less harm."""

from __future__ import annotations

import copy
import importlib
import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from miracle_ban import MiracleError, compress, harden
from miracle_ban.coders import Trellis
from miracle_ban.errors import CodingError
from miracle_ban.harden import _descent
from miracle_ban.noise import Noise

QUIET = {"progress": False}
NOISE = 0.6
BITS = 600  # of the 332 weights of `trained_net` and the 936 of `normed`, about a bit each at first and less than that


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
    bits = 0.5 * math.log2(1 + 1 / NOISE) * sum(p.numel() for p in trained_net.parameters() if p.dim() > 1)
    hardened, course = harden(trained_net, batches, F.cross_entropy, bits=bits, epochs=40, optimizer=faster, **QUIET)
    assert helpers.same_state(trained_net.state_dict(), before)
    assert type(hardened) is type(trained_net)
    assert loss_under_noise(hardened, batches) < 0.7 * loss_under_noise(trained_net, batches)
    assert course["steps"] == course["history"][-1]["step"] == 40 * len(batches)


def bits_of(noise: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> float:
    """What the noise stands for, in bits."""
    return sum(float(torch.log2(1 + 1 / v).sum()) / 2 * weights[name].numel() / v.numel() for name, v in noise.items())


def weights_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in net.named_parameters() if p.dim() > 1}


def test_the_noise_is_as_large_as_its_factors_say():
    """Chi-squared on the draws of each block, two-sided, at helpers.FALSE_ALARM over all of them."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6), nn.Linear(6, 2))
    weights = {**weights_of(net), "1.bias": net[1].bias}
    noise = Noise(weights, 150.0)
    for factor in noise.factors:
        factor += 0.5 * torch.randn(factor.shape)
    drawn = [noise.draw() for _ in range(400)]
    blocks = sum(v.numel() for v in noise.variances().values())
    assert set(drawn[0]) == set(weights)
    for name, variance in noise.variances().items():
        weight = weights[name].detach()
        units = weight.reshape(variance.shape[0], -1)
        errors = torch.stack([d[name].detach() - weight for d in drawn]).reshape(400, *variance.shape, -1).double()
        scale = variance * units.square().mean(1, keepdim=True)
        chance = stats.chi2.cdf((errors.square().sum((0, 3)) / scale).numpy(), 400 * errors.shape[3])
        assert ((helpers.FALSE_ALARM / (2 * blocks) < chance) & (chance < 1 - helpers.FALSE_ALARM / (2 * blocks))).all()


def test_bits_go_where_noise_does_most_harm_and_their_sum_stays():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6))
    worth = torch.tensor([[100.0], [1.0], [1.0], [0.0]]) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])  # of a unit, of an input
    noise = Noise({"w": weight}, 48.0)
    assert float(noise.variances()["w"].std()) == 0
    for _ in range(4000):
        weight.grad = None
        (worth * (noise.draw()["w"] - weight.detach()).square()).sum().backward()
        noise.share(0.01, 48.0)
    variance = noise.variances()["w"]
    assert bits_of({"w": variance}, {"w": weight}) == pytest.approx(48.0, rel=1e-3)
    rate = torch.log2(1 + 1 / variance) / 2
    assert rate[0, :5].mean() > rate[1:3, :5].mean() + 1.0 > rate[3].mean() + 1.0
    assert rate[0, 5] < rate[0, :5].mean()


def test_fewer_bits_from_step_to_step(trained_net, batches):
    weights = weights_of(trained_net)
    _, few = harden(trained_net, batches, F.cross_entropy, bits=200, epochs=4, **QUIET)
    _, many = harden(trained_net, batches, F.cross_entropy, bits=9000, names=["fc1.weight"], epochs=4, **QUIET)
    assert bits_of(few["noise"], weights) == pytest.approx(200, rel=0.01)
    assert set(few["noise"]) == set(weights)
    assert set(many["noise"]) == {"fc1.weight"}


def test_statistics_of_norms_are_those_without_noise(batches):
    hardened, _ = harden(normed(), batches, F.cross_entropy, bits=BITS, epochs=3, **QUIET)
    with torch.no_grad():
        seen = torch.cat([hardened[0](x) for x, _ in batches])
    assert torch.allclose(hardened[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(hardened[1].running_var, seen.var((0, 2, 3)), rtol=1e-2)


def test_the_mode_of_the_network_is_kept_and_its_norms_learn(batches):
    net = normed().eval()
    hardened, _ = harden(net, batches, F.cross_entropy, bits=BITS, epochs=2, **QUIET)
    assert not hardened.training
    assert harden(net.train(), batches, F.cross_entropy, bits=BITS, epochs=1, **QUIET)[0].training
    assert not torch.equal(hardened[1].weight, net[1].weight)


def test_sgd_where_there_are_norms_and_the_callers_own_wherever_it_is_given(trained_net, batches):
    assert isinstance(_descent(normed()), torch.optim.SGD)
    assert isinstance(_descent(trained_net), torch.optim.AdamW)
    made = []

    def still(model):
        made.append(model)
        return torch.optim.SGD(model.parameters(), 1e-12)

    same, _ = harden(trained_net, batches, F.cross_entropy, bits=BITS, epochs=1, optimizer=still, **QUIET)
    assert made
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(same.parameters(), trained_net.parameters(), strict=True))


def test_what_the_caller_froze_stays(trained_net, batches):
    net = copy.deepcopy(trained_net)
    net.conv.requires_grad_(False)
    hardened, course = harden(net, batches, F.cross_entropy, bits=BITS, epochs=20, **QUIET)
    rates = {name: float(torch.log2(1 + 1 / v).mean()) / 2 for name, v in course["noise"].items()}
    assert rates["conv.weight"] > 0.3 * max(rates.values())  # bits for it all the same
    assert torch.equal(hardened.conv.weight, trained_net.conv.weight)
    assert not torch.equal(hardened.fc1.weight, trained_net.fc1.weight)


def test_steps_within_an_autocast_see_each_other(trained_net, batches):
    with torch.autocast("cpu", torch.bfloat16):
        hardened, course = harden(normed(), [batches[0]], F.cross_entropy, bits=8000, epochs=60, **QUIET)
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
    options = {"bits": BITS, "epochs": 6, "checkpoint": tmp_path / "state", **QUIET}
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
    assert "fit" not in archive.info
    assert len(archive.to_bytes()) <= 230
    assert not list(tmp_path.iterdir())
    untrained = compress(trained_net, inputs=batches, budget=230, coder=Trellis(memory=8), **QUIET)
    assert archive.to_bytes() != untrained.to_bytes()


def test_hardening_and_packaging_in_two_steps_give_the_same_file(trained_net, batches):
    options = {"budget": 230, "coder": Trellis(memory=8), **QUIET}
    inputs = torch.cat([x for x, _ in batches])
    at_once = compress(trained_net, batches, F.cross_entropy, inputs=inputs, hardened=True, epochs=3, **options)
    asked = {}

    def spy(net, *args, **given):
        asked.update(given)
        return harden(net, *args, **given)

    module = importlib.import_module("miracle_ban.compress")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "harden", spy)
        compress(trained_net, batches, F.cross_entropy, inputs=inputs, hardened=True, epochs=3, **options)
    hardened, course = harden(trained_net, batches, F.cross_entropy, bits=asked["bits"], epochs=3, **QUIET)
    assert compress(hardened, inputs=inputs, noise=course["noise"], **options).to_bytes() == at_once.to_bytes()
    assert compress(hardened, inputs=inputs, **options).to_bytes() != at_once.to_bytes()
    with pytest.raises(CodingError, match="noise is of a network that is hardened already"):
        compress(trained_net, batches, F.cross_entropy, noise=course["noise"], **options)


def test_the_bits_follow_from_the_budget(trained_net, batches, monkeypatch):
    given = {}

    def spy(net, *args, bits, names, **options):
        given[budget] = bits, set(names)
        return copy.deepcopy(net), {"noise": {}}

    module = importlib.import_module("miracle_ban.compress")
    monkeypatch.setattr(module, "harden", spy)
    for budget in (230, 400):
        compress(trained_net, batches, F.cross_entropy, budget=budget, hardened=True, coder=Trellis(memory=8), **QUIET)
    assert given[400][1] == {"conv.weight", "fc1.weight", "fc2.weight"}
    assert 0 < given[230][0] < 8 * 230 < given[400][0] < 8 * 400


def test_large_networks_with_norms_are_hardened_where_there_are_passes_enough(trained_net, batches, monkeypatch):
    module = importlib.import_module("miracle_ban.compress")
    monkeypatch.setattr(module, "_harden_and_package", lambda *_: "hardened")
    monkeypatch.setattr(module, "fit", lambda *_, **__: 1 / 0)

    def hardens(net, **options) -> bool:
        try:
            return compress(net, batches, F.cross_entropy, **{"epochs": 5, "budget": 4000, **options}, **QUIET) == "hardened"
        except ZeroDivisionError:
            return False

    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 27_000), nn.BatchNorm1d(27_000))  # 1.8 million weights
    assert hardens(normed())
    assert not any(hardens(normed(), **o) for o in ({"epochs": 4}, {"budget": 3999}, {"hardened": False}, {"coder": "gprs"}))
    assert [hardens(wide, budget=b) for b in (4440, 4540)] == [False, True]
    assert [hardens(trained_net, hardened=h) for h in (None, True)] == [False, True]


class Summing(nn.Module):
    """Takes a list of inputs, as networks of several inputs do."""

    def __init__(self):
        super().__init__()
        self.inner = normed()

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return self.inner(inputs[0] + inputs[1])


def test_batches_of_several_inputs_go_through_all_stages(batches, monkeypatch):
    monkeypatch.setattr(importlib.import_module("miracle_ban.compress"), "_BITS_NOT_TO_RESCALE", 9.0)
    pairs = [([0.5 * x, 0.5 * x], y) for x, y in batches]
    options = {"budget": 230, "epochs": 6, "hardened": True, "coder": Trellis(memory=8), **QUIET}
    archive = compress(Summing(), pairs, F.cross_entropy, **options)
    assert archive.size_bytes <= 230
    assert {"harden", "rescale"} <= set(archive.info)


def test_errors_say_what_is_wrong(trained_net, batches):
    with pytest.raises(MiracleError, match="noise is wanted for 'fc9', which is no parameter of TinyNet"):
        harden(trained_net, batches, F.cross_entropy, bits=BITS, names=["fc9"], **QUIET)
    with pytest.raises(MiracleError, match="bits must be positive, not 0"):
        harden(trained_net, batches, F.cross_entropy, bits=0, **QUIET)
    with pytest.raises(MiracleError, match="epochs must be positive, not 0"):
        harden(trained_net, batches, F.cross_entropy, bits=BITS, epochs=0, **QUIET)
    with pytest.raises(MiracleError, match="no parameter of TinyNet wants a gradient"):
        harden(copy.deepcopy(trained_net).requires_grad_(False), batches, F.cross_entropy, bits=BITS, **QUIET)
    with pytest.raises(MiracleError, match="the loss became nan in hardening, by step 20"):
        harden(trained_net, batches, lambda out, y: F.cross_entropy(out, y) * float("nan"), bits=BITS, **QUIET)
    with pytest.raises(MiracleError, match="must return a scalar tensor"):
        harden(trained_net, batches, lambda out, y: F.cross_entropy(out, y).detach(), bits=BITS, **QUIET)
    with pytest.raises(CodingError, match="hardening needs a training set"):
        compress(trained_net, budget=230, hardened=True, **QUIET)
    with pytest.raises(CodingError, match="hardening needs the trellis coder, not 'gprs'"):
        compress(trained_net, batches, F.cross_entropy, budget=230, hardened=True, coder="gprs", **QUIET)
    with pytest.raises(CodingError, match="hardened=True does not go with context and fit_options"):
        compress(trained_net, batches, F.cross_entropy, budget=230, hardened=True, context=1, fit_options={"seed": 1}, **QUIET)
