from __future__ import annotations

import warnings

import helpers
import numpy as np
import pytest
import torch
from torch import nn

from miracle_ban import compress, convert, decode, kl
from miracle_ban.allocate import allocate, sensitivity
from miracle_ban.bits import NATS_PER_BIT
from miracle_ban.container import parse
from miracle_ban.errors import MiracleError, MiracleWarning
from miracle_ban.layers import posteriors


@pytest.mark.parametrize("bits", [300.0, 3000.0, 9000.0])
def test_the_kl_is_the_one_that_was_asked_for(trained_net, bits):
    bnn = convert(trained_net, per_unit=True)
    allocate(bnn, bits)
    assert float(kl(bnn)) / NATS_PER_BIT == pytest.approx(bits, rel=0.02)


def test_noise_is_that_of_the_ideal_channel():
    """Posterior and prior of a unit with noise D: N((1 - r) w, D (1 - r)) and N(0, s^2 - D), r = D / s^2, one D for a tensor."""
    torch.manual_seed(0)
    layer = nn.Linear(400, 8)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.5, 2, 8)[:, None])
    bnn = convert(layer, per_unit=True)
    allocate(bnn, 8000.0)
    p = posteriors(bnn)["weight"]
    w, mean, std, prior = layer.weight.detach(), p.mean.detach(), p.log_std.detach().exp(), p.prior_std
    keep = (mean / w).mean(1, keepdim=True)  # 1 - D / s^2
    variance = prior**2 / keep
    noise = variance * (1 - keep)
    assert torch.allclose(mean, keep * w, atol=1e-6)
    assert torch.allclose(std**2, (noise * keep).expand_as(std), rtol=1e-3)
    assert torch.allclose(noise, noise[:1].expand_as(noise), rtol=1e-3)
    assert (variance >= w.square().mean(1, keepdim=True) * 0.999).all()


def test_sensitive_tensors_get_less_noise():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    found = sensitivity(convert(net))
    with torch.no_grad():
        net[2].weight.mul_(10)  # now the first layer's noise is blown up tenfold on its way
    louder = sensitivity(convert(net))
    assert louder["0.weight"] / louder["2.weight"] > 3 * found["0.weight"] / found["2.weight"]


@pytest.mark.parametrize("seed", [0, 1])
def test_sensitivity_follows_its_seed(trained_net, seed):
    bnn = convert(trained_net)
    assert sensitivity(bnn, seed=seed) == sensitivity(bnn, seed=seed)
    assert sensitivity(bnn, seed=seed) != sensitivity(bnn, seed=seed + 1)


def test_sensitivity_is_the_fisher_diagonal_of_a_linear_map():
    """Outputs that are no class scores are means of unit Gaussians: the Fisher information of weight (o, i) is the sum of x_i^2."""

    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            return (x @ self.weight.T)[:, None, :]

    inputs = torch.randn(64, 6)
    found = [sensitivity(convert(Map()), inputs=inputs, seed=s)["weight"] for s in range(20)]
    expected = float(inputs.square().sum(0).mean())
    assert np.mean(found) == pytest.approx(expected, rel=5 * np.std(found) / expected / len(found) ** 0.5 + 1e-3)


def test_a_network_whose_inputs_cannot_be_guessed_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x["in"])

    with pytest.warns(MiracleWarning, match="inputs"):
        sensitivity(convert(Odd()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MiracleWarning)
        assert sensitivity(convert(Odd()), inputs={"in": torch.randn(8, 4)})["layer.weight"] > 0


@pytest.mark.parametrize("coder", ["trellis", "gprs"])
def test_compress_without_data(trained_net, coder):
    before = helpers.weight_state(trained_net)
    archive = compress(trained_net, budget=900, coder=coder, progress=False)
    assert helpers.same_state(trained_net.state_dict(), before)
    assert 800 < archive.size_bytes <= 900
    net = helpers.TinyNet()
    net.load_state_dict(decode(parse(archive.to_bytes()), net))
    assert helpers.error_rate(net) < helpers.error_rate(trained_net) + 0.1


def test_more_bytes_are_a_better_copy(trained_net):
    errors = []
    for budget in (500, 900, 1500):
        state = decode(compress(trained_net, budget=budget, progress=False), helpers.TinyNet())
        errors.append(sum(float((state[n] - t).square().sum()) for n, t in trained_net.state_dict().items()))
    assert errors[0] > errors[1] > errors[2]


def test_batches_and_loss_come_together(trained_net, batches):
    for arguments in ((batches,), (None, nn.functional.cross_entropy)):
        with pytest.raises(MiracleError, match="together"):
            compress(trained_net, *arguments, budget=900)
