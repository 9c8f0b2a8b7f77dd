"""Networks as users give them: wrapped, with extra state, with what a hook computed, with inputs and outputs that have names."""

from __future__ import annotations

import contextlib
import threading
from collections import UserDict

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miracle_ban import compress, convert, decode, harden, load, rescale, save, unfold
from miracle_ban.errors import MiracleError, MiracleWarning, MismatchError, UnsupportedModelError
from miracle_ban.network import arguments, copied, examples_in, main_output, split, tensors, unwrapped
from miracle_ban.teaching import imitation

QUIET = {"progress": False}
WRAPPERS = [nn.DataParallel, lambda net: torch.compile(net, backend="eager"), lambda net: nn.DataParallel(torch.compile(net))]


class WithExtraState(nn.Module):
    """A network that keeps something that is no tensor."""

    def __init__(self, calls: int):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.calls = calls

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_what_is_wrapped_is_unwrapped(wrap):
    net = helpers.TinyNet()
    assert unwrapped(wrap(net)) is net is unwrapped(net)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_file_loads_into_a_network_in_its_wrapper(packaged, wrap, tmp_path):
    save(packaged, tmp_path / "net.mban")
    plain = load(tmp_path / "net.mban", helpers.TinyNet())
    inner = helpers.TinyNet()
    wrapped = wrap(inner)
    assert load(tmp_path / "net.mban", wrapped) is wrapped
    assert helpers.same_state(inner.state_dict(), plain.state_dict())
    assert helpers.same_state(decode(packaged, wrapped), plain.state_dict())
    with pytest.raises(MismatchError, match="Linear"):
        load(tmp_path / "net.mban", nn.DataParallel(nn.Linear(3, 2)))


@pytest.mark.parametrize("wrap", WRAPPERS[:2])
def test_every_way_takes_a_network_in_its_wrapper(packaged, trained_net, batches, wrap):
    """And does with it what it does with the network inside."""
    for net in (trained_net, wrap(trained_net)):
        files = [
            rescale(packaged, net, batches, epochs=1, **QUIET),
            compress(net, inputs=batches, budget=helpers.PACKAGED, coder="gprs", **QUIET),
        ]
        hardened, _ = harden(net, batches, F.cross_entropy, bits=300.0, epochs=1, **QUIET)
        found = [*(file.to_bytes() for file in files), helpers.digest(hardened.state_dict())]
        if net is trained_net:
            wanted = found
    assert found == wanted
    assert isinstance(hardened, helpers.TinyNet)


def test_extra_state_that_is_no_tensor_stays_with_each_network(tmp_path):
    torch.manual_seed(0)
    net = WithExtraState(1)
    assert list(tensors(net)) == ["layer.weight", "layer.bias"]
    with pytest.warns(MiracleWarning, match="_extra_state is no tensor and is not stored"):
        archive = compress(net, budget=200, **QUIET)
    save(archive, tmp_path / "net.mban")
    fresh = load(tmp_path / "net.mban", WithExtraState(2))
    assert (net.calls, fresh.calls) == (1, 2)
    assert (fresh.layer.weight - net.layer.weight).abs().max() < 0.02


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_copy_has_no_graph_and_computes_hooked_weights_itself():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    net[0].register_buffer("sum", net[0].weight_v.sum())
    x = torch.randn(5, 4)
    wanted = net(x)
    copy = copied(net)
    assert [w.is_leaf for w in (net[0].weight, net[0].sum, copy[0].weight, copy[0].sum)] == [False, False, True, True]
    assert copy(x).equal(wanted)
    with torch.no_grad():
        copy[0].weight_g.mul_(2.0)
        copy[1].bias.add_(1.0)
    assert net(x).equal(wanted)
    assert not copy(x).equal(wanted)


def test_what_cannot_be_copied_is_said():
    net = nn.Linear(3, 2)
    net.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match=r"cannot be copied.*locks"):
        copied(net)


class WithoutStatistics(nn.Module):
    """A BatchNorm that needs a batch in evaluation, too, beside one that does not."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.layer = nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(self.first(self.norm(x)))


@pytest.mark.parametrize("make", [WithoutStatistics, lambda: nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 3))], ids=["norm", "no units"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_odd_networks_need_no_inputs(make):
    torch.manual_seed(0)
    net = make().eval()
    x = torch.randn(16, 8)
    archive = compress(net, budget=200, **QUIET)
    fresh = make().eval()
    fresh.load_state_dict(decode(archive, fresh))
    with torch.no_grad():
        assert (fresh(x) - net(x)).abs().max() < 0.05
    assert convert(fresh) is not fresh


@pytest.mark.filterwarnings("ignore:no random input fits")
def test_a_network_without_parameters_is_refused_by_compress_too():
    with pytest.raises(UnsupportedModelError, match="no floating-point parameter"):
        compress(nn.ReLU(), budget=200, **QUIET)


class Named(nn.Module):
    """A network of named inputs and outputs that can compute its loss, as is usual for language models."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, *, images, labels=None):
        scores = self.net(images)
        return ({} if labels is None else {"loss": F.cross_entropy(scores, labels)}) | {"logits": scores}


def own_loss(outputs, batch):
    assert set(batch) == {"images", "labels"}
    return outputs["loss"]


def test_a_mapping_goes_in_by_keywords_where_its_keys_are_names_of_arguments():
    net, x = Named(helpers.TinyNet()), torch.ones(2, 8)
    for wrapped in (net, torch.compile(net, backend="eager")):
        assert arguments(wrapped, {"images": x}) == ((), {"images": x})
    for other in ({"pictures": x}, {0: x}, x, [x]):
        assert arguments(net, other) == ((other,), {})
    assert arguments(helpers.TinyNet(), UserDict({"input": x}))[0] != ()  # its argument has another name


@pytest.mark.parametrize("level", ["inputs", "batches of inputs", "posteriors", "hardened"])
def test_named_inputs_and_outputs_do_what_plain_ones_do(trained_net, batches, level):
    """At every level of help the weights are the same to the bit."""
    found = []
    for net in (trained_net, Named(trained_net)):
        plain = net is trained_net
        named = batches if plain else [UserDict(images=x, labels=y) for x, y in batches]
        whole = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        loss = F.cross_entropy if plain else own_loss
        if level == "inputs":
            archive = compress(net, inputs=whole[0] if plain else dict(zip(("images", "labels"), whole, strict=True)), budget=150, **QUIET)
        elif level == "batches of inputs":
            archive = compress(net, inputs=named, budget=150, **QUIET)
        elif level == "posteriors":
            archive = compress(net, named, loss, budget=600, epochs=3, encode_options={"refine_steps": 3}, **QUIET)
        else:
            hardened, _ = harden(net, named, loss, bits=800.0, epochs=1, **QUIET)
            archive = rescale(compress(hardened, inputs=named, budget=150, **QUIET), hardened, named, **QUIET)
        found.append({name.removeprefix("net."): t for name, t in decode(archive, net).items()})
    assert helpers.same_state(*found)


def test_a_module_inside_may_be_called_by_keywords():
    class ByKeywords(nn.Sequential):
        def forward(self, x):
            return self[1](input=F.relu(self[0](input=x)))

    torch.manual_seed(0)
    net = ByKeywords(nn.Linear(8, 12), nn.Linear(12, 3))
    plain = nn.Sequential(net[0], nn.ReLU(), net[1])
    x = torch.randn(64, 8)
    archives = [compress(own, inputs=x, budget=150, **QUIET) for own in (net, plain)]
    states = [list(decode(archive, own).values()) for archive, own in zip(archives, (net, plain), strict=True)]
    assert all(a.equal(b) for a, b in zip(*states, strict=True))


def test_inputs_that_do_not_go_in_are_named(trained_net):
    says = r"the inputs, pictures, do not go through \w*Named.*by keywords only what is named as the arguments of `forward`"
    with pytest.raises(MiracleError, match=says):
        compress(Named(trained_net), inputs={"pictures": torch.ones(4, 8)}, budget=150, **QUIET)


@pytest.mark.parametrize("given", [None, torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(4, 5)])
def test_each_part_of_the_network_stays_in_its_mode(given):
    """Such as BatchNorms that are held as they are while the rest is trained; also after an error."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)).train()
    net[1].running_mean.fill_(0.5)
    net[1].eval()
    with contextlib.suppress(MiracleError):
        compress(net, inputs=given, budget=500, **QUIET)
        unfold(net, torch.ones(4, 3, 8, 8) if given is None else given)
    assert [m.training for m in net] == [True, False, True, True, True]
    assert net.training


def test_what_matters_in_outputs():
    scores, hidden = torch.ones(4, 3), torch.ones(4, 7)
    assert main_output({"hidden": hidden, "logits": scores}) is scores
    assert main_output((torch.ones(()), [hidden, scores])) is hidden
    assert main_output({"ids": torch.ones(4, dtype=torch.long)}) is None
    assert imitation({"logits": scores}, scores).equal(imitation(scores, scores))
    with pytest.raises(MiracleError, match="str hold no tensor"):
        imitation("outputs", "taught")


def test_parts_of_a_batch():
    x, y = torch.arange(5), torch.ones(5, 2)
    assert [len(part) for part in split(x, 2)] == [2, 2, 1]
    assert [(part["x"].tolist(), part["y"].shape[0]) for part in split({"x": x, "y": y}, 3)] == [([0, 1, 2], 3), ([3, 4], 2)]
    for whole in ({"x": x, "y": torch.ones(4)}, {"x": x, "y": 3}, {}, [x, x], torch.ones(())):
        assert split(whole, 2) == [whole]
    assert [examples_in(v) for v in (x, {"a": "b", "x": y}, [[y]], "text", 3, torch.ones(()))] == [5, 5, 5, 4, 1, 1]
