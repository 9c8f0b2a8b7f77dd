"""Tuning: the file keeps its size, its network gets better; the path is only ever led nearer to what the gradients wish."""

from __future__ import annotations

import copy
import itertools

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miracle_ban import MiracleError, compress, decode, encode, load, save, tune
from miracle_ban.coders import Trellis
from miracle_ban.container import parse
from miracle_ban.errors import CodingError, MismatchError
from miracle_ban.load import restore
from miracle_ban.tune import _WINDOW, _Code

BUDGET = helpers.PACKAGED
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def framed(fitted, batches):
    """Units dropped, posteriors fitted, eight frames."""
    return encode(copy.deepcopy(fitted[0]), batches, F.cross_entropy, coder=Trellis(memory=8), rounds=8, refine_steps=2, **QUIET)


def loss_of(archive, batches) -> float:
    net = helpers.TinyNet().eval()
    restore(net, decode(archive, net))
    with torch.no_grad():
        return sum(float(F.cross_entropy(net(x), y)) for x, y in batches) / len(batches)


def code_of(archive) -> _Code:
    archive = copy.deepcopy(archive)
    net = helpers.TinyNet()
    restore(net, decode(archive, net))
    return _Code(archive, net)


def distance(code: _Code) -> float:
    """Of the network from the wishes, in units of each tensor's noise, at the precision that the search weighs it with."""
    total = 0.0
    for t in code.tensors.values():
        error = t.parameter.detach().flatten()[t.at].double() / (t.noise * t.prior.double()) - t.wish.detach().double()
        total += float(error.square().sum()) * (1.0 - t.noise**2)
    return total


def test_the_file_keeps_its_size_and_the_network_gets_better(packaged, trained_net, batches, tmp_path):
    before, weights = packaged.to_bytes(), helpers.weight_state(trained_net)
    tuned = tune(packaged, trained_net, batches, F.cross_entropy, epochs=40, learning_rate=0.05, **QUIET)
    assert packaged.to_bytes() == before
    assert helpers.same_state(trained_net.state_dict(), weights)
    assert len(tuned.to_bytes()) == len(before)
    assert [(r.rate, r.prior_codes.tolist()) for r in tuned.records] == [(r.rate, r.prior_codes.tolist()) for r in packaged.records]
    assert loss_of(tuned, batches) < 0.8 * loss_of(packaged, batches)
    save(tuned, tmp_path / "net.mban")
    assert helpers.same_state(load(tmp_path / "net.mban", helpers.TinyNet()).state_dict(), decode(tuned, helpers.TinyNet()))
    history = tuned.info["tune"]["history"]
    assert history[-1]["step"] == tuned.info["tune"]["steps"] == 40 * len(batches)
    assert any(row["changed"] > 0 for row in history)


@pytest.mark.parametrize("name", ["packaged", "framed"])
def test_where_nothing_is_wished_nothing_changes(name, request, batches):
    archive = request.getfixturevalue(name)
    same = tune(archive, helpers.TinyNet(), batches, F.cross_entropy, epochs=20, learning_rate=1e-9, **QUIET)
    assert same.to_bytes() == archive.to_bytes()


@pytest.mark.parametrize("name", ["packaged", "framed"])
@pytest.mark.parametrize("shift", range(4))
def test_the_search_never_leads_away_from_the_wishes(name, shift, request):
    code = code_of(request.getfixturevalue(name))
    generator = torch.Generator().manual_seed(shift)
    with torch.no_grad():
        for t in code.tensors.values():
            t.wish += 1.5 * torch.randn(t.wish.shape, generator=generator)
    far, bits = distance(code), code.bits.copy()
    changed = code.search(shift)
    near = distance(code)
    assert near < far
    assert 0 < changed < 1
    assert len(code.bits) == len(bits)
    for again in range(4):
        code.search(again)
        assert distance(code) <= near * (1 + 1e-6)
        near = distance(code)


def test_a_window_gets_the_nearest_of_all_its_paths(packaged):
    """By trying every sequence of bits between the two states that stay, in a window that is short enough for it."""
    code = code_of(packaged)
    begin = 300
    end = next(e for e in range(begin, begin + 40) if code._at(e, end=True)[1] - code._at(begin)[1] >= code.memory + 9)
    first, last = code._at(begin)[1], code._at(end, end=True)[1]
    free = last - first - code.memory  # the last bits are the state that stays
    code.bits[first : first + free] = np.random.default_rng(0).integers(0, 2, free)
    kept, found = code.bits.copy(), []
    for number in range(1 << free):
        code.bits = kept.copy()
        code.bits[first : first + free] = [number >> i & 1 for i in range(free)]
        code._decode()
        found.append(distance(code))
    code.bits = kept.copy()
    code._decode()
    code._search_mixed({i: code._law(i) for i in code.rates}, begin, end)
    code._decode()
    assert distance(code) == pytest.approx(min(found), rel=1e-9)
    assert min(found) < distance_of(code, kept)
    assert np.array_equal(code.bits[:first], kept[:first])
    assert np.array_equal(code.bits[last - code.memory :], kept[last - code.memory :])


def distance_of(code: _Code, bits: np.ndarray) -> float:
    own, code.bits = code.bits, bits
    code._decode()
    value = distance(code)
    code.bits = own
    code._decode()
    return value


def test_windows_of_one_tensor_are_searched_side_by_side_as_one_by_one():
    """A layer of several windows, its rate no whole number of bits."""
    torch.manual_seed(0)
    net = nn.Linear(64, 40)
    archive = compress(net, inputs=torch.randn(64, 64), budget=460, coder=Trellis(memory=8), **QUIET)
    codes = [_Code(copy.deepcopy(archive), copy.deepcopy(net)) for _ in range(2)]
    for code in codes:
        restore_net(code, archive, net)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for t in code.tensors.values():
                t.wish += 0.5 * torch.randn(t.wish.shape, generator=generator)
    assert codes[0].rates[0].steps > 4 * _WINDOW
    assert codes[0].rates[0].rate % 64
    codes[0].search(1)
    total, laws = int(codes[1].edges[-1]), {i: codes[1]._law(i) for i in codes[1].rates}
    cuts = [0, *range(_WINDOW // 4, total, _WINDOW), total]
    for begin, end in itertools.pairwise(cuts):
        codes[1]._search_mixed(laws, begin, end)
    assert np.array_equal(codes[0].bits, codes[1].bits)


def restore_net(code: _Code, archive, net) -> None:
    with torch.no_grad():
        for name, value in decode(archive, net).items():
            next(t for i, t in code.tensors.items() if code.archive.records[i].name == name).parameter.copy_(value)
        for t in code.tensors.values():
            t.wish.copy_(t.parameter.flatten()[t.at] / (t.noise * t.prior))


def test_bfloat16_of_the_training_does_not_reach_the_search(packaged, trained_net, batches):
    with torch.autocast("cpu", torch.bfloat16):
        same = tune(packaged, trained_net, batches, F.cross_entropy, epochs=20, learning_rate=1e-9, **QUIET)
        again = compress(trained_net, inputs=batches, budget=BUDGET, coder=Trellis(memory=8), **QUIET)
    assert same.to_bytes() == packaged.to_bytes()
    assert again.to_bytes() == packaged.to_bytes()


def test_tuning_within_an_autocast_sees_its_own_steps(packaged, trained_net, batches):
    with torch.autocast("cpu", torch.bfloat16):
        tuned = tune(packaged, trained_net, [batches[0]], F.cross_entropy, epochs=400, learning_rate=0.05, **QUIET)
    assert sum(row["changed"] for row in tuned.info["tune"]["history"]) > 0
    assert tuned.info["tune"]["history"][-1]["loss"] == pytest.approx(loss_of(tuned, [batches[0]]), rel=0.1, abs=0.01)
    assert loss_of(tuned, [batches[0]]) < 0.8 * loss_of(packaged, [batches[0]])


def test_interrupted_tuning_goes_on_to_the_same_file(packaged, trained_net, batches, tmp_path):
    class StopError(Exception):
        pass

    def failing(out, y):
        calls.append(1)
        if len(calls) > 100:
            raise StopError
        return F.cross_entropy(out, y)

    calls: list[int] = []
    options = {"epochs": 20, "learning_rate": 0.1, "checkpoint": tmp_path / "state", **QUIET}
    with pytest.raises(StopError):
        tune(packaged, trained_net, batches, failing, **options)
    resumed = tune(packaged, trained_net, batches, F.cross_entropy, **options)
    whole = tune(packaged, trained_net, batches, F.cross_entropy, **(options | {"checkpoint": None}))
    assert resumed.to_bytes() == whole.to_bytes()
    reopened = tune(parse(packaged.to_bytes()), trained_net, batches, F.cross_entropy, **(options | {"checkpoint": None}))
    assert reopened.to_bytes() == whole.to_bytes()
    with pytest.raises(CodingError, match=r"learning_rate was 0\.1, now 0\.2"):
        tune(packaged, trained_net, batches, F.cross_entropy, **(options | {"learning_rate": 0.2}))


def test_compress_packages_first_where_the_budget_has_bits_for_it(trained_net, batches, tmp_path):
    stem = tmp_path / "state"
    options = {"epochs": 30, "checkpoint": stem, **QUIET}
    rich = compress(trained_net, batches, F.cross_entropy, budget=230, **options)
    assert "tune" in rich.info
    assert "fit" not in rich.info
    assert rich.path.memory == 12
    poor = compress(trained_net, batches, F.cross_entropy, budget=230, package_first=False, encode_options={"rounds": 2}, **options)
    assert "fit" in poor.info
    assert "fit" in compress(trained_net, batches, F.cross_entropy, budget=70, encode_options={"rounds": 2}, **options).info
    assert not list(tmp_path.iterdir())


def test_compress_goes_on_from_the_packaged_file(trained_net, batches, tmp_path):
    def interrupted(out, y):
        raise KeyboardInterrupt

    options = {"budget": 230, "epochs": 2, "checkpoint": tmp_path / "state", "coder": Trellis(memory=8), **QUIET}
    with pytest.raises(KeyboardInterrupt):
        compress(trained_net, batches, interrupted, **options)
    kept = torch.load(tmp_path / "state.packaged", weights_only=True)
    packaged = parse(bytes(kept["archive"].numpy()))
    with pytest.raises(CodingError, match="budget_bytes was 230, now 240"):
        compress(trained_net, batches, F.cross_entropy, **(options | {"budget": 240}))
    resumed = compress(trained_net, batches, F.cross_entropy, **options)
    assert len(resumed.to_bytes()) == len(packaged.to_bytes())
    assert resumed.info.items() >= kept["info"].items()  # the seconds, too: packaging was not done again
    assert resumed.to_bytes() == compress(trained_net, batches, F.cross_entropy, **(options | {"checkpoint": None})).to_bytes()


def test_errors_say_what_is_wrong(packaged, bnn, trained_net, batches):
    other = encode(copy.deepcopy(bnn), coder="gprs", budget=10_000, **QUIET)
    with pytest.raises(CodingError, match="this one is of 'gprs'"):
        tune(other, trained_net, batches, F.cross_entropy, **QUIET)
    with pytest.raises(CodingError, match="learning_rate must be positive, not nan"):
        tune(packaged, trained_net, batches, F.cross_entropy, learning_rate=float("nan"), **QUIET)
    with pytest.raises(CodingError, match="epochs must be positive, not 0"):
        tune(packaged, trained_net, batches, F.cross_entropy, epochs=0, **QUIET)
    with pytest.raises(CodingError, match="package_first does not go with fit_options"):
        compress(trained_net, batches, F.cross_entropy, budget=230, package_first=True, fit_options={"drop": False}, **QUIET)
    with pytest.raises(CodingError, match="package_first needs the trellis coder, not 'gprs'"):
        compress(trained_net, batches, F.cross_entropy, budget=230, package_first=True, coder="gprs", **QUIET)
    with pytest.raises(MismatchError):
        tune(packaged, nn.Linear(3, 2), batches, F.cross_entropy, **QUIET)
    with pytest.raises(MiracleError, match="the loss became nan in tuning, step 0"):
        tune(packaged, trained_net, batches, lambda out, y: F.cross_entropy(out, y) * float("nan"), **QUIET)
    with pytest.raises(MiracleError, match="must return a scalar tensor"):
        tune(packaged, trained_net, batches, lambda out, y: F.cross_entropy(out, y, reduction="none"), **QUIET)
