"""Rescaling: nothing but the sizes of units changes, and the network comes nearer to the one that it was made from."""

from __future__ import annotations

import copy

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miracle_ban import MiracleError, compress, convert, decode, encode, load, rescale, save
from miracle_ban.coders import Trellis
from miracle_ban.container import parse, prior_std
from miracle_ban.errors import CodingError, MismatchError
from miracle_ban.load import bind, restore
from miracle_ban.rescale import _Scales

BUDGET = helpers.PACKAGED
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def rescaled(packaged, trained_net, batches):
    return rescale(packaged, trained_net, batches, budget=BUDGET, epochs=40, **QUIET)


def decoded(archive) -> nn.Module:
    net = helpers.TinyNet().eval()
    restore(net, decode(archive, net))
    return net


@torch.no_grad()
def divergence(archive, teacher: nn.Module, batches) -> float:
    """Cross-entropy of the predicted classes to the teacher's, nats."""
    net = decoded(archive)
    return sum(float(F.cross_entropy(net(x), teacher(x).softmax(1))) for x, _ in batches) / len(batches)


def test_the_file_imitates_its_network_better_and_keeps_to_the_budget(packaged, rescaled, trained_net, batches):
    assert divergence(rescaled, trained_net, batches) < divergence(packaged, trained_net, batches) - 0.01
    assert rescaled.size_bytes <= BUDGET
    info = rescaled.info["rescale"]
    assert info["steps"] == info["history"][-1]["step"] == 40 * len(batches)
    assert info["history"][-1]["loss"] < info["history"][0]["loss"]
    assert 0 < info["changed"] <= 1
    for archive, key in ((packaged, "before"), (rescaled, "after")):
        assert info[key] == pytest.approx(divergence(archive, trained_net, batches), rel=1e-4)


def test_where_it_does_no_good_the_file_stays_as_it_was(packaged, trained_net, batches):
    """At such a rate all sizes end far away."""
    found = rescale(packaged, trained_net, batches, budget="1 kB", epochs=2, learning_rate=30.0, **QUIET)
    assert found.info["rescale"]["after"] > found.info["rescale"]["before"]
    assert found.info["rescale"]["changed"] == 0
    assert found.to_bytes() == packaged.to_bytes()


def test_nothing_but_the_sizes_of_units_changes(packaged, rescaled, trained_net, tmp_path):
    before, after = packaged.to_bytes(), rescaled.to_bytes()
    assert packaged.to_bytes() == before != after
    assert np.array_equal(packaged.path.bits[: len(rescaled.path.bits)], rescaled.path.bits[: len(packaged.path.bits)])
    old, new = (decode(a, trained_net) for a in (packaged, rescaled))
    moved = 0
    for one, other in zip(packaged.records, rescaled.records, strict=True):
        assert ((one.prior_codes > 0) == (other.prior_codes > 0)).all()
        if one.kind == "coded":
            gain = prior_std(other.prior_codes) / np.maximum(prior_std(one.prior_codes), 1e-30)
            units = np.ones(len(old[one.name])) if len(gain) == 1 else gain
            wanted = old[one.name].flatten(1) * torch.from_numpy(units)[:, None] if len(gain) > 1 else old[one.name] * float(gain[0])
            assert torch.allclose(new[one.name].flatten(1) if len(gain) > 1 else new[one.name], wanted.float(), rtol=1e-5)
            moved += int((one.prior_codes != other.prior_codes).sum())
    assert moved > 0
    save(rescaled, tmp_path / "net.mban")
    assert helpers.same_state(load(tmp_path / "net.mban", helpers.TinyNet()).state_dict(), decode(parse(after), helpers.TinyNet()))


def test_without_a_budget_the_file_does_not_grow(packaged, trained_net, batches):
    found = rescale(packaged, trained_net, batches, epochs=40, learning_rate=0.01, **QUIET)
    assert found.size_bytes <= packaged.size_bytes
    assert found.to_bytes() != packaged.to_bytes()


def test_codes_that_change_least_stay_where_there_is_no_room(packaged):
    scales = _Scales(copy.deepcopy(packaged), decoded(packaged))
    with torch.no_grad():
        for log in scales.logs.values():
            log.copy_(torch.linspace(-1.3, 1.3, len(log)))
    wanted = {name: scales.new_codes(name) for name in scales.logs}
    whole = scales.settle(10**6)
    most = scales.archive.size_bytes
    assert all(np.array_equal(r.prior_codes, wanted[r.name]) for r in scales.archive.records if r.name in wanted)
    some = scales.settle(most - 1)
    assert scales.archive.size_bytes <= most - 1
    assert 0 < some < whole
    kept = np.concatenate([r.prior_codes != wanted[r.name] for r in scales.archive.records if r.name in wanted])
    size = np.concatenate([log.detach().abs().numpy() for log in scales.logs.values()])
    assert size[kept].max() <= size[~kept].max()
    assert scales.settle(0) == 0
    assert scales.archive.to_bytes() == packaged.to_bytes()


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.3, 0.6, 0.9, 1.2])
def test_what_was_read_from_a_file_can_be_read_again(packaged, shift):
    """The codes take other numbers of bits, so the bits of the path end elsewhere in a byte."""
    found = []
    for archive in (copy.deepcopy(packaged), bind(parse(packaged.to_bytes()), helpers.TinyNet())):
        scales = _Scales(archive, decoded(packaged))
        with torch.no_grad():
            for log in scales.logs.values():
                log.copy_(torch.linspace(-shift, shift, len(log)))
        scales.settle(10**6)
        found.append(parse(archive.to_bytes()).to_bytes())
    assert found[0] == found[1]


def test_gradients_are_those_of_the_sizes_at_the_nearest_codes(packaged, trained_net, batches):
    scales = _Scales(copy.deepcopy(packaged), decoded(packaged))
    x, y = batches[0]
    F.cross_entropy(torch.func.functional_call(decoded(packaged), scales.now(), (x,)), y).backward()
    same = decoded(packaged)
    F.cross_entropy(same(x), y).backward()
    for name, p in same.named_parameters():
        if name in scales.logs:
            by_weight = p.grad * p.detach()
            own = by_weight.flatten(1).sum(1) if len(scales.logs[name]) > 1 else by_weight.sum().reshape(1)
            assert torch.allclose(scales.logs[name].grad, own[: len(scales.logs[name])], atol=1e-6)


def test_a_loss_of_ones_own_and_blocks_instead_of_a_trellis(trained_net, batches):
    archive = encode(convert(trained_net, per_unit=True), coder="gprs", **QUIET)

    def error(outputs, targets):
        return (outputs - 3.0 * F.one_hot(targets, 3)).square().mean()

    found = rescale(archive, trained_net, batches, error, budget="1 kB", epochs=20, **QUIET)
    with torch.no_grad():
        before, after = (sum(float(error(decoded(a)(x), y)) for x, y in batches) for a in (archive, found))
    assert after < before


class Stop(Exception):  # noqa: N818, no error
    pass


def test_interrupted_it_goes_on_to_the_same_file(packaged, trained_net, batches, tmp_path):
    options = {"budget": BUDGET, "epochs": 6, **QUIET}
    whole = rescale(packaged, trained_net, batches, F.cross_entropy, **options)
    left = iter(range(2 * len(batches) + 1))

    def failing(outputs, targets):
        if next(left, None) is None:
            raise Stop
        return F.cross_entropy(outputs, targets)

    with pytest.raises(Stop):
        rescale(packaged, trained_net, batches, failing, checkpoint=tmp_path / "state", **options)
    again = rescale(packaged, trained_net, batches, F.cross_entropy, checkpoint=tmp_path / "state", **options)
    assert again.to_bytes() == whole.to_bytes()
    with pytest.raises(CodingError, match="steps"):
        rescale(packaged, trained_net, batches, F.cross_entropy, checkpoint=tmp_path / "state", budget=BUDGET, epochs=7, **QUIET)


class Wide(nn.Sequential):
    """Of 26,000 weights: 200 bytes are a sixteenth of a bit for each."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3))


class InADictionary(Wide):
    def forward(self, x):
        return {"scores": super().forward(x)}


def test_compress_rescales_what_it_hardened_where_bits_are_few(batches):
    options = {"epochs": 50, "hardened": True, "coder": Trellis(memory=8), **QUIET}
    archive = compress(Wide(), batches, F.cross_entropy, budget=200, **options)
    assert archive.info["rescale"]["steps"] == len(batches)
    assert archive.size_bytes <= 200
    archive = compress(InADictionary(), batches, lambda out, y: F.cross_entropy(out["scores"], y), budget=200, **options)
    assert archive.info["rescale"]["steps"] == len(batches)
    assert "rescale" not in compress(helpers.TinyNet(), batches, F.cross_entropy, budget=200, **options).info


class Speaking(helpers.TinyNet):
    def forward(self, x):
        return str(super().forward(x))


def test_errors_say_what_is_wrong(packaged, trained_net, batches):
    with pytest.raises(MiracleError, match="epochs must be positive, not 0"):
        rescale(packaged, trained_net, batches, epochs=0, **QUIET)
    with pytest.raises(MiracleError, match="learning_rate must be positive, not nan"):
        rescale(packaged, trained_net, batches, learning_rate=float("nan"), **QUIET)
    silent = nn.Linear(64, 3, bias=False)
    nn.init.zeros_(silent.weight)
    dropped = encode(convert(silent, per_unit=True), coder=Trellis(memory=8), budget=100, **QUIET)
    with pytest.raises(CodingError, match="there is nothing to rescale"):
        rescale(dropped, silent, batches, **QUIET)
    with pytest.raises(MismatchError):
        rescale(packaged, nn.Linear(2, 2), batches, **QUIET)
    with pytest.raises(MiracleError, match="str hold no tensor that can be imitated: give a loss"):
        rescale(packaged, Speaking(), batches, **QUIET)
    with pytest.raises(MiracleError, match="became nan in rescaling"):
        rescale(packaged, trained_net, batches, lambda out, y: out.sum() * float("nan"), epochs=1, **QUIET)
