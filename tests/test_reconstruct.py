"""Compression without training: made-up inputs, and layers that make up for what is coded before them."""

from __future__ import annotations

import copy
import sys
import warnings

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from miracle_ban import compress, convert, decode, kl, measure
from miracle_ban.bits import NATS_PER_BIT
from miracle_ban.coders import Trellis
from miracle_ban.container import parse
from miracle_ban.errors import MiracleError, MiracleWarning
from miracle_ban.inputs import batches_of, made_for
from miracle_ban.layers import posteriors, use_mode
from miracle_ban.measure import joined, parts, rows
from miracle_ban.plan import freeze_priors
from miracle_ban.priors import SAMPLE, widening
from miracle_ban.reconstruct import Reconstruction, _conjugate_gradients, _inverse_diagonal
from miracle_ban.sensitivity import diagonals


class Normed(nn.Module):
    """Convolutions of every kind with BatchNorms; its statistics are those of correlated inputs that are not centred."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, groups=4, stride=2, padding=2, dilation=2, bias=False), nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 6, 1, padding_mode="reflect")
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        return self.out(F.relu(self.c(x)).mean((2, 3)))


def images(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(n, 3, 4, 4, generator=generator) + torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    return F.interpolate(rough, scale_factor=4, mode="bilinear")


@pytest.fixture(scope="module")
def normed() -> Normed:
    torch.manual_seed(0)
    net = Normed()
    for _ in range(60):
        net(images(32, seed=torch.randint(10**6, ()).item()))
    return net.eval()


def test_made_up_inputs_have_the_moments_that_the_norms_remember(normed):
    before = helpers.weight_state(normed)
    batches = made_for(normed, progress=False)
    assert helpers.same_state(normed.state_dict(), before)
    assert not any(m.training for m in normed.modules())
    x = torch.cat(batches)
    with torch.no_grad():
        noise = torch.randn(x.shape)
        for layer, norm, into in (("a", "na", lambda v: v), ("b", "nb", lambda v: F.relu(normed.na(normed.a(v))))):
            found, plain = (getattr(normed, layer)(into(v)).transpose(0, 1).flatten(1).mean(1) for v in (x, noise))
            kept = getattr(normed, norm)
            distance = ((found - kept.running_mean).square() / kept.running_var).mean()
            assert distance < 0.02
            assert distance < 0.2 * ((plain - kept.running_mean).square() / kept.running_var).mean()


def test_made_up_inputs_follow_their_seed(normed):
    a, b, c = (torch.cat(made_for(normed, seed=s, progress=False)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("net", "shape"),
    [(nn.LSTM(5, 3), (16, 16, 5)), (nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)), (16, 16)), (nn.Conv1d(2, 3, 5), (64, 2, 128)),
     (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (64, 12))],
)  # fmt: skip
def test_inputs_of_the_shape_that_the_network_takes(net, shape):
    assert made_for(net, progress=False)[0].shape == shape


def test_inputs_given_by_the_user_are_cut_into_batches():
    x = torch.arange(300.0)[:, None]
    assert torch.equal(torch.cat(batches_of(x)), x)
    assert len(torch.cat(batches_of(x, 100))) == 100
    pairs = [(x[:40], torch.zeros(40)), (x[40:80], torch.zeros(40))]
    assert torch.equal(torch.cat(batches_of(pairs)), x[:80])
    assert torch.equal(torch.cat([batch["in"] for batch in batches_of({"in": x})]), x)
    assert sum(len(batch["in"]) for batch in batches_of([{"in": x[:40], "mask": x[:40]}] * 5, 100)) == 120
    for nothing in ([], 3):
        with pytest.raises(MiracleError, match="inputs"):
            batches_of(nothing)


class Odd(nn.Module):
    """Takes a dictionary."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(40, 30)

    def forward(self, x):
        return self.layer(x["in"])


def test_a_network_whose_inputs_cannot_be_guessed_says_so():
    with pytest.warns(MiracleWarning, match="inputs"):
        compress(Odd(), budget=900, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MiracleWarning)
        compress(Odd(), inputs={"in": torch.randn(8, 40)}, budget=900, progress=False)


@pytest.mark.parametrize("bits", [500.0, 1500.0, 4000.0])
def test_the_kl_is_the_one_that_was_asked_for(normed, bits):
    bnn = convert(normed, per_unit=True)
    found = Reconstruction(bnn, [images(64)])
    found.allocate(bits)
    assert float(kl(bnn)) / NATS_PER_BIT == pytest.approx(bits, rel=0.01)
    found.plan(bits)
    assert sum(found.kl_bits.values()) == pytest.approx(bits, rel=0.1)


def test_units_get_the_shares_that_they_were_hardened_with(normed):
    bnn = convert(normed, per_unit=True)
    bare = {name: p for name, p in normed.named_parameters() if p.dim() > 1}
    noise = {name: torch.full(p.shape[:2], 0.4) for name, p in bare.items()}
    noise["a.weight"][:4] = torch.tensor([0.02, 0.1, 20.0, 1600.0])[:, None]  # of units with 2.8, 1.7, 0.04 and next to no bits
    found = Reconstruction(bnn, [images(64)], noise)
    wanted = sum(float(torch.log2(1 + 1 / v).sum()) / 2 * bare[name].numel() / v.numel() for name, v in noise.items())
    found.plan(wanted + 8 * sum(p.numel() for p in bnn.parameters() if p.dim() == 1))
    bits = posteriors(bnn)["a.weight"].kl_per_weight().flatten(1).mean(1) / NATS_PER_BIT
    assert bits[0] > bits[1] + 0.5 > bits[4] + 0.5 > bits[2] + 0.5 > bits[3] + 0.5
    assert bits[3] < 0.02
    assert found.scaled
    before = float(posteriors(bnn)["a.weight"].kl()) / NATS_PER_BIT
    found.begin("a.weight", before)
    assert float(posteriors(bnn)["a.weight"].kl()) / NATS_PER_BIT == pytest.approx(before, rel=0.02)


def test_units_of_hardened_layers_count_alone_as_their_noise_says_and_together_as_measured(normed, monkeypatch):
    x, worth, measured = images(128), measure.worth, []
    noise = {name: torch.full(p.shape[:2], 0.1) for name, p in normed.named_parameters() if p.dim() > 1}
    monkeypatch.setattr(measure, "worth", lambda *given: measured.append(worth(*given)) or measured[-1])
    found = Reconstruction(convert(normed, per_unit=True), [x], noise).sensitivity.curvature
    monkeypatch.setattr(measure, "worth", lambda *_: measure.Worth({}, {}))
    alone = Reconstruction(convert(normed, per_unit=True), [x], noise).sensitivity.curvature
    for name in ("a", "b", "c", "out"):
        assert torch.allclose(diagonals(found[name]), alone[name][:, :, 0], rtol=1e-4)
        assert torch.linalg.eigvalsh(found[name]).min() > 0.05 * diagonals(found[name]).min()
        wanted, own = (g / (diagonals(g)[:, :, None] * diagonals(g)[:, None, :]).sqrt() for g in (measured[0].outputs[name], found[name]))
        apart = ~torch.eye(own.shape[1], dtype=torch.bool).expand_as(own)
        assert torch.allclose(own[apart], 0.9 * wanted[apart], atol=0.03)
        assert name == "out" or own[apart].abs().max() > 0.2


def test_layers_most_of_whose_units_are_dropped_spend_their_bits(normed):
    """What a weight is worth is not taken from the priors of dropped units, which are next to nothing."""
    noise = {name: torch.full(p.shape[:2], 0.1) for name, p in normed.named_parameters() if p.dim() > 1}
    noise["a.weight"][:6] = 1600.0
    bnn = convert(normed, per_unit=True)
    found = Reconstruction(bnn, [images(64)], noise)
    wanted = sum(float(torch.log2(1 + 1 / v).mean()) / 2 * normed.get_parameter(name).numel() for name, v in noise.items())
    found.plan(wanted + 8 * sum(p.numel() for p in bnn.parameters() if p.dim() == 1))
    freeze_priors(bnn)
    p = posteriors(bnn)["a.weight"]
    assert int(p.fixed.flatten(1).all(1).sum()) == 6
    found.begin("a.weight", 100.0)
    assert float(p.kl()) / NATS_PER_BIT == pytest.approx(100.0, rel=0.02)
    assert float((p.log_std.exp() / p.prior_std)[6:].max()) < 0.9


def test_biases_that_make_up_for_much_get_a_prior_to_match(normed):
    bnn = convert(normed, per_unit=True)
    found = Reconstruction(bnn, [images(64)])
    found.plan(3000.0)
    freeze_priors(bnn)
    p = posteriors(bnn)["na.bias"]
    before = float(p.prior_std)
    posteriors(bnn)["a.weight"].mean.data.mul_(20.0)  # so that the outputs move far
    found.begin("na.bias", 60.0)
    assert float(p.mean.abs().max()) > 5.0 * before
    assert 0.9 < float(p.prior_std / p.mean.square().mean().sqrt()) < 2.5
    assert float(p.kl()) / NATS_PER_BIT == pytest.approx(60.0, rel=0.02)


@pytest.mark.parametrize(("together", "least", "most"), [(1.0, 2.6, 3.5), (4.0, 1.2, 1.7), (100.0, 0.9, 1.1)])
def test_candidates_are_as_wide_as_the_code_is_short(together, least, most):
    """Three times the variance for one Gaussian weight alone (Panter and Dite 1951), no more than it for many together."""
    size = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0)).square()
    assert least < float(widening(size, torch.ones_like(size), together)) < most
    tailed = torch.cat([0.6 * size[:, :1000], torch.full((1, 10), 25.0)], 1)
    assert float(widening(tailed, torch.ones_like(tailed), together)) >= float(widening(size, torch.ones_like(size), together))


def test_layers_and_units_that_are_zero_get_no_bits(normed):
    net = copy.deepcopy(normed)
    net.b.weight.data.zero_()
    net.a.weight.data[2] = 0.0
    bnn = convert(net, per_unit=True)
    found = Reconstruction(bnn, [images(64)])
    found.plan(2000.0)
    spent = {name: float(p.kl_per_weight().flatten(1).sum(1).max()) for name, p in posteriors(bnn).items() if p.mean.dim() > 1}
    assert spent["b.weight"] < 0.01
    assert float(posteriors(bnn)["a.weight"].kl_per_weight()[2].sum()) < 0.01
    assert found.kl_bits["b.weight"] < 0.1
    assert sum(found.kl_bits.values()) == pytest.approx(2000.0, rel=0.1)
    assert found.kl_bits["nb.bias"] < 2 * found.kl_bits["na.bias"]  # its outputs never vary: held against their size


def test_norms_over_several_axes_are_packaged():
    """Their biases have no axis of channels."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm((8, 16, 16)), nn.Conv2d(8, 8, 3, groups=4), nn.GroupNorm(2, 8), nn.LayerNorm(14)
    )
    with torch.no_grad():
        net[1].bias.normal_()
    x = torch.randn(8, 3, 16, 16)
    archive = compress(net, budget=6000, inputs=x, coder="trellis", progress=False)
    loaded = copy.deepcopy(net)
    loaded.load_state_dict(decode(archive, loaded))
    with torch.no_grad():
        assert float((loaded(x) - net(x)).square().mean()) < 0.1 * float(net(x).var())


def test_the_kl_of_large_tensors_is_found_from_a_sample():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 1200), nn.ReLU(), nn.Linear(1200, 5))
    with torch.no_grad():
        net[0].weight.mul_(torch.linspace(0.1, 10, 64)).mul_(torch.rand(1200, 1) + 0.1)  # columns and rows of many sizes
    assert net[0].weight.numel() > SAMPLE
    bnn = convert(net, per_unit=True)
    Reconstruction(bnn, [torch.randn(64, 64) * torch.linspace(3, 0.2, 64)]).allocate(50_000.0)
    assert float(kl(bnn)) / NATS_PER_BIT == pytest.approx(50_000.0, rel=0.02)


@pytest.mark.parametrize("name", ["a", "b", "c", "out"])
def test_rows_times_weights_are_the_layer(normed, name):
    """What H is measured on: the patches of an input, times the weights in parts, give the layer's outputs."""
    layer = normed.get_submodule(name)
    x = torch.randn(2, 6) if name == "out" else torch.randn(2, layer.in_channels, 9, 7)
    inputs = rows(layer, [x], 1, torch.Generator())[0]
    weight = parts(layer, layer.weight.detach())
    assert torch.equal(joined(layer, weight, layer.weight.shape), layer.weight)
    found = (inputs @ weight.mT).transpose(0, 1).flatten(1)  # [places, outputs]
    with torch.no_grad():
        wanted = layer(x) - (0.0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (x.dim() - 2)))
    assert torch.allclose(found, wanted.movedim(1, -1).flatten(0, -2), atol=1e-5)


def test_wide_layers_are_solved_for_in_parts(monkeypatch):
    monkeypatch.setattr("miracle_ban.measure._LARGEST_PART", 10)
    layer = nn.Linear(24, 5)
    assert parts(layer, layer.weight).shape == (3, 5, 8)
    assert torch.equal(joined(layer, parts(layer, layer.weight), layer.weight.shape), layer.weight)


def test_conjugate_gradients_solve_the_system():
    torch.manual_seed(0)
    root = torch.randn(2, 30, 30, dtype=torch.float64)
    matrix, goal = root @ root.mT + torch.eye(30), torch.randn(2, 4, 30, dtype=torch.float64)
    diagonal = matrix.diagonal(dim1=1, dim2=2)[:, None, :]
    found = _conjugate_gradients(lambda m: m @ matrix, goal, torch.zeros_like(goal), diagonal, 60, axes=(2,))
    assert torch.allclose(found @ matrix, goal, atol=1e-6)
    root = torch.randn(2, 4, 4, dtype=torch.float64)
    left = root @ root.mT + torch.eye(4)  # rows that depend on each other
    diagonal = left.diagonal(dim1=1, dim2=2)[:, :, None] * diagonal
    found = _conjugate_gradients(lambda m: left @ m @ matrix, goal, torch.zeros_like(goal), diagonal, 400, axes=(1, 2))
    assert torch.allclose(left @ found @ matrix, goal, atol=1e-6)


def test_the_means_are_the_minimum_of_error_and_prior(normed):
    """With half of a layer fixed at wrong values, no change of the other half lowers error + KL."""
    x = images(200)
    bnn = convert(normed, per_unit=True)
    found = Reconstruction(bnn, [x])
    found.allocate(6000.0)
    p = posteriors(bnn)["a.weight"]
    at = torch.randperm(p.mean.numel())[:100]
    p.fix(at, p.mean.flatten()[at] + 0.1)
    found.begin("a.weight", None)
    found.update("a.weight", 1e3)
    r = found._regressions["a.weight"]
    weight = torch.where(p.fixed, p.value, p.mean).detach().requires_grad_(True)
    w = parts(normed.a, weight)
    error = (r.curvature @ (w @ r.h - 2 * r.goal) * w).sum()
    objective = 0.5 * error + (0.5 * weight.square() / p.prior_std.square()).sum()
    (gradient,) = torch.autograd.grad(objective, weight)
    start = torch.where(p.fixed, p.value, posteriors(found.float)["a.weight"].mean).detach()
    scale = (r.curvature @ (parts(normed.a, start) @ r.h - r.goal)).abs().mean()
    assert gradient[~p.fixed].abs().max() < 1e-2 * scale


def test_the_worth_of_a_weight_is_the_error_that_the_others_cannot_repair(normed):
    bnn = convert(normed, per_unit=True)
    found = Reconstruction(bnn, [images(200)])
    found.allocate(6000.0)
    found.begin("b.weight", None)
    r, p = found._regressions["b.weight"], posteriors(bnn)["b.weight"]
    assert r.curvature.shape[1:] == (r.worth.shape[1],) * 2
    ridge = float(found._prior_ridge(p, normed.b).median())
    sizes = [float(v.diagonal(dim1=1, dim2=2).mean()) for v in (r.curvature, r.h)]

    def alone(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
        """Curvature of each error once the others have answered."""
        matrix = matrix.double() + ridge * torch.eye(len(matrix))
        found = []
        for i in range(len(matrix)):
            others = torch.arange(len(matrix)) != i
            repaired = matrix[i, others] @ torch.linalg.solve(matrix[others][:, others], matrix[others, i])
            found.append(matrix[i, i] - repaired - ridge)
        return torch.stack(found)

    for h, g, worth in zip(r.h, r.curvature, r.worth, strict=True):
        expected = torch.outer(alone(g, ridge / sizes[1]), alone(h, ridge / sizes[0]))
        assert torch.allclose(worth.double(), expected, rtol=1e-2)
        assert (worth < torch.outer(g.diagonal(), h.diagonal())).all()


@pytest.mark.parametrize("least", [1e-3, -1e-3])
def test_diagonals_of_inverses_also_where_rounding_left_a_matrix_not_positive(least):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 20, 20, dtype=torch.float64))[0]
    matrices = basis @ torch.diag(torch.cat([torch.linspace(1.0, 2.0, 19), torch.tensor([least])]).double()) @ basis.mT
    assert torch.allclose(_inverse_diagonal(matrices), torch.linalg.inv(matrices).diagonal(dim1=1, dim2=2), rtol=1e-9)


def test_the_unit_that_an_input_is_measured_in_hardly_matters():
    """An input that is a fifth as large, with weights five times as large, makes up for the others' errors almost alike."""
    torch.manual_seed(0)
    mixed = torch.randn(256, 6) @ torch.randn(6, 6)
    made_up = []
    for unit in (torch.ones(6), torch.tensor([0.2, 1.0, 1.0, 1.0, 1.0, 1.0])):
        net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 4))
        weight = torch.linspace(-1, 1, 24).reshape(4, 6)
        with torch.no_grad():
            net[0].weight.copy_(weight / unit)
        bnn = convert(net)
        found = Reconstruction(bnn, [mixed * unit])
        found.allocate(1000.0)
        found.begin("0.weight", None)
        p = posteriors(bnn)["0.weight"]
        others = torch.arange(24).reshape(4, 6)[:, 1:].flatten()
        p.fix(others, (weight / unit).flatten()[others] + 0.1)
        found.update("0.weight", 100.0)
        made_up.append((p.mean.detach() * unit - weight)[:, 0])
    assert made_up[0].abs().min() > 0.01
    assert torch.allclose(*made_up, rtol=0.25)


def test_noise_is_held_against_channel_and_layer(normed, monkeypatch):
    """Where nothing is known of what noise does to the outputs."""
    monkeypatch.setattr(measure, "worth", lambda *_: measure.Worth({}, {}))
    x, normed = images(200), copy.deepcopy(normed)
    with torch.no_grad():
        normed.out.weight[0] *= 10
        normed.out.weight[1] *= 0  # a dead output is taken for a small one
    found = Reconstruction(convert(normed, per_unit=True), [x])
    with torch.no_grad():
        variance = normed(x).var(0, unbiased=False)
    layer = variance.mean()
    expected = (layer * variance.clamp_min(0.01 * layer)).sqrt()
    assert torch.allclose(found.sensitivity.curvature["out"].flatten(), 1.0 / expected, rtol=1e-4)


def test_worth_is_what_noise_adds_to_the_outputs(normed):
    """The first-order estimate, against noise itself, summed over each tensor."""
    x = images(128)
    bnn = convert(normed, per_unit=True).eval()
    held = {name: p.mean for name, p in posteriors(bnn).items()}
    worth = measure.worth(bnn, list(x.split(64)), held).weights
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), use_mode(bnn, "mean"):
        wanted = bnn(x)
        for name, mean in held.items():
            before, errors = mean.clone(), []
            for _ in range(200):
                mean.copy_(before + 1e-3 * torch.randn(mean.shape, generator=generator))
                errors.append(float((bnn(x) - wanted).square().mean() / wanted.var(correction=0)))
            mean.copy_(before)
            rows, columns = worth[name]
            assert float(rows.mean()) == pytest.approx(float(columns.mean()), rel=1e-4)
            assert sum(errors) / 200 / 1e-6 == pytest.approx(float(rows.mean()) * mean.numel(), rel=0.5)


@pytest.mark.parametrize("name", ["a", "b", "out"])
def test_curvature_is_what_noise_in_the_outputs_of_a_layer_does(normed, name, monkeypatch):
    """Noise that units share, of another sign or size in each, at all places on its own, against the first-order estimate."""
    monkeypatch.setattr(measure, "_CHUNKS", 128)
    x = images(128)
    bnn = convert(normed, per_unit=True).eval()
    held = {name: p.mean for name, p in posteriors(bnn).items()}
    g = torch.block_diag(*measure.worth(bnn, list(x.split(8)), held, [name]).outputs[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), use_mode(bnn, "mean"):
        wanted = bnn(x)
        for _ in range(3):
            shape, errors = torch.randn(len(g), generator=generator), []
            shape[len(g) // getattr(normed.get_submodule(name), "groups", 1) :] = 0.0  # what groups do together is not known

            def add(module, args, output, shape=shape):
                places = torch.randn(len(output), 1, *output.shape[2:], generator=generator)
                return output + 1e-3 * shape.reshape(1, -1, *[1] * (output.dim() - 2)) * places

            hook = bnn.get_submodule(name).register_forward_hook(add)
            for _ in range(60):
                errors.append(float((bnn(x) - wanted).square().mean() / wanted.var(correction=0)))
            hook.remove()
            assert sum(errors) / 60 / 1e-6 == pytest.approx(float(shape @ g @ shape), rel=0.5)


def test_a_recurrent_network_is_measured():
    """Its weights are of no layer whose outputs are known, only what they do to the network's."""
    torch.manual_seed(0)
    net = nn.GRU(8, 16, batch_first=True)
    x = torch.randn(256, 12, 8)
    copied = nn.GRU(8, 16, batch_first=True)
    copied.load_state_dict(decode(compress(net, budget=600, inputs=x, progress=False), copied))
    with torch.no_grad():
        assert float((copied(x)[0] - net(x)[0]).square().mean()) < 0.1 * float(net(x)[0].var())


def test_inputs_that_matter_are_coded_where_most_do_not():
    """A unit keeps its prior, and few weights take the bits, if noise in most of its weights does nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(400, 16), nn.ReLU(), nn.Linear(16, 10))
    x = torch.randn(500, 400) * torch.where(torch.arange(400) % 4 == 0, 1.0, 1e-3)
    copied = copy.deepcopy(net)
    copied.load_state_dict(decode(compress(net, budget=800, inputs=x, progress=False), copied))
    with torch.no_grad():
        assert float((copied(x) - net(x)).square().mean()) < 0.05 * float(net(x).var(0).mean())


def test_later_parts_make_up_for_earlier_ones(normed):
    """Noise put into half of a layer's weights does less to its outputs once the other half has answered."""
    x = images(200)
    bnn = convert(normed, per_unit=True)
    found = Reconstruction(bnn, [x])
    found.allocate(20_000.0)
    found.unshrink()
    with torch.no_grad(), use_mode(bnn, "mean"):
        wanted = bnn(x)
        p = posteriors(bnn)["a.weight"]
        at = torch.randperm(p.mean.numel())[:108]
        p.fix(at, p.mean.flatten()[at] + 0.1 * torch.randn(108))
        hurt = float((bnn(x) - wanted).square().mean())
        found.begin("a.weight", None)
        for name in ("na.bias", "b.weight", "nb.bias"):
            found.begin(name, None)
        repaired = float((bnn(x) - wanted).square().mean())
    assert repaired < 0.5 * hurt


def test_units_keep_their_size_through_many_layers(monkeypatch):
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(12 if i else 3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()) for i in range(10)]
    net = nn.Sequential(*(m for block in blocks for m in block), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    for k in range(30):
        net(images(32, seed=k))
    net.eval()
    inputs, budget = images(256, seed=99), 1300

    def spreads(model):
        with torch.no_grad():
            return torch.stack([model[: 3 * i + 2](inputs).std((0, 2, 3)) for i in range(len(blocks))])

    def off():
        """How far from the float network's the spreads of the last layers are."""
        archive = compress(net, inputs=inputs, budget=budget, coder=Trellis(memory=8), progress=False)
        assert len(archive.to_bytes()) <= budget
        decoded = copy.deepcopy(net)
        decoded.load_state_dict(decode(parse(archive.to_bytes()), decoded))
        return (spreads(decoded) / spreads(net)).log().abs()[-5:]

    now = off()
    monkeypatch.setattr(Reconstruction, "gains", lambda *_: None)
    before = off()
    assert now.mean() < 0.1  # prior scales have eight steps an octave
    assert now.mean() < 0.5 * before.mean()


@pytest.mark.parametrize("coder", ["trellis", "gprs"])
def test_compress_without_data(trained_net, coder):
    before = helpers.weight_state(trained_net)
    archive = compress(trained_net, budget=900, coder=coder, progress=False)
    assert helpers.same_state(trained_net.state_dict(), before)
    assert 800 < archive.size_bytes <= 900
    net = helpers.TinyNet()
    net.load_state_dict(decode(parse(archive.to_bytes()), net))
    assert helpers.error_rate(net) < helpers.error_rate(trained_net) + 0.1


def test_inputs_help(normed, monkeypatch):
    """Real inputs keep the outputs nearer than made-up ones, and those nearer than none, at the same size."""
    x = images(500, seed=5)

    def error(inputs: torch.Tensor | None) -> float:
        """Of two codes: one is good or bad luck by a factor of two."""
        errors = []
        for seed in (0, 1):
            net = Normed()
            net.load_state_dict(decode(compress(normed, budget=250, inputs=inputs, seed=seed, progress=False), net))
            with torch.no_grad():
                errors.append(float((net.eval()(x) - normed(x)).square().mean()))
        return sum(errors)

    real, made = error(images(300, seed=1)), error(None)
    monkeypatch.setattr(sys.modules["miracle_ban.compress"], "made_for", lambda *_, **__: [])
    with pytest.warns(MiracleWarning, match="inputs"):
        none = error(None)
    assert real < 0.9 * made  # the network's own inputs are as smooth as those that are made up
    assert made < 0.7 * none


def test_a_norm_with_an_activation_inside_is_as_good_as_two_modules():
    """Its bias makes up for shifts before the activation."""
    torch.manual_seed(0)
    first, second, out = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)
    whole, parts = (
        nn.Sequential(first, make(), second, make(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), out)
        for make in (lambda: helpers.NormedAndActive(16), lambda: nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()))
    )
    for _ in range(30):
        whole(images(64, seed=torch.randint(10**6, ()).item()))
    for own, part in ((whole[1], parts[1][0]), (whole[3], parts[3][0])):
        part.load_state_dict(own.state_dict())
    x, errors = images(500, seed=5), []
    for net in (whole.eval(), parts.eval()):
        total = 0.0
        for seed in range(3):
            other = copy.deepcopy(net)
            other.load_state_dict(decode(compress(net, budget=600, inputs=images(300, seed=1), seed=seed, progress=False), other))
            with torch.no_grad():
                total += float((other(x) - net(x)).square().mean())
        errors.append(total)
    assert errors[0] < 1.3 * errors[1]


class Turned(nn.Linear):
    """A layer of the user's own, whose outputs are not where a linear layer's are."""

    def forward(self, x):
        return super().forward(x).transpose(1, 2)


def test_layers_with_channels_elsewhere():
    """LayerNorms of images and classes of the user's own are measured as what they are, or not at all."""
    torch.manual_seed(0)
    blocks = [CNBlockConfig(12, 20, 1), CNBlockConfig(20, None, 1)]
    for net, x in (
        (ConvNeXt(blocks, num_classes=4), F.interpolate(torch.randn(64, 3, 8, 8), scale_factor=4)),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), Turned(8, 5), nn.Flatten(), nn.Linear(35, 3)), torch.randn(64, 7, 6)),
    ):
        sensitivity = Reconstruction(convert(net.eval(), per_unit=True), [x]).sensitivity
        of_channels = [m for m in net.modules() if isinstance(m, nn.LayerNorm)]
        owned = [net.get_submodule(name) for name in sensitivity.owner.values()]
        assert all(any(m is own for own in owned) for m in of_channels)
        assert not any(isinstance(own, Turned) for own in owned)
        other = copy.deepcopy(net)
        other.load_state_dict(decode(compress(net, budget="4 kB", inputs=x, progress=False), other))
        with torch.no_grad():
            assert float((other(x) - net(x)).square().mean()) < 0.1 * float(net(x).var())


def test_more_bytes_are_a_better_copy(trained_net):
    errors = []
    for budget in (500, 900, 1500):
        state = decode(compress(trained_net, budget=budget, progress=False), helpers.TinyNet())
        errors.append(sum(float((state[n] - t).square().sum()) for n, t in trained_net.state_dict().items()))
    assert errors[0] > errors[1] > errors[2]


def test_an_interrupted_packaging_without_data_resumes_to_the_same_file(trained_net, tmp_path, monkeypatch):
    whole = compress(trained_net, budget=900, progress=False).to_bytes()
    from miracle_ban.trellis_packing import TrellisPacking

    turns = []
    original = TrellisPacking.code_round

    def interrupted(self, left):
        if len(turns) == 2:
            raise KeyboardInterrupt
        turns.append(left)
        original(self, left)

    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(TrellisPacking, "code_round", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(trained_net, budget=900, checkpoint=state, progress=False)
    assert compress(trained_net, budget=900, checkpoint=state, progress=False).to_bytes() == whole


def test_batches_and_loss_come_together(trained_net, batches):
    for arguments in ((batches,), (None, nn.functional.cross_entropy)):
        with pytest.raises(MiracleError, match="together"):
            compress(trained_net, *arguments, budget=900)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (torch.randn(5, 7), r"inputs of shape \(5, 7\) do not go through Sequential.*7"),
        (torch.randn(0, 6), "no example"),
        (torch.tensor(1.0), "no example"),
        (torch.full((5, 6), float("nan")), "NaN or infinite: check the inputs"),
        ("images", "not str"),
    ],
)
def test_inputs_that_do_not_fit_are_said_to_be_so(inputs, says):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(MiracleError, match=says):
        compress(net, inputs=inputs, budget=300, progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [False, True])
def test_networks_of_16_and_64_bits_and_scalars_among_their_parameters(dtype, given):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(dtype).eval()
    net.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
    options = {"inputs": torch.randn(40, 6, dtype=dtype)} if given else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", MiracleWarning)  # made-up inputs fit, too
        archive = compress(net, budget=300, progress=False, **options)
    state = decode(parse(archive.to_bytes()), net)
    assert {t.dtype for name, t in state.items() if "tracked" not in name} == {dtype}
    assert abs(float(state["scale"]) - 2.0) < 0.5


def test_a_bias_of_no_size_gets_the_bits_that_shifts_ask_for():
    """Coded weights shift the outputs of their layer, the more the larger the means of its inputs are."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    for layer in (net[0], net[2]):
        nn.init.zeros_(layer.bias)
    x = torch.randn(256, 16)
    own = Reconstruction(convert(net, per_unit=True), [x])
    assert own._left_of_shifts("2") > 0.99
    own.plan(1.2 * 640)
    assert own.kl_bits["2.bias"] > 8.0
    assert own._left_of_shifts("2") < 0.1
    assert sum(own.kl_bits.values()) == pytest.approx(1.2 * 640, rel=0.05)
    with torch.no_grad():
        wanted = net(x)
        loaded = copy.deepcopy(net)
        loaded.load_state_dict(decode(compress(net, inputs=x, budget=140, progress=False), loaded))
        shift = (loaded(x).mean(0) - wanted.mean(0)).square().mean()
    assert shift < 0.03 * wanted.var(0).mean()
