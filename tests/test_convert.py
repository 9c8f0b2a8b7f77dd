from __future__ import annotations

import copy
import threading

import helpers
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import miracle_ban
from miracle_ban import compress, convert, kl, load, save
from miracle_ban.convert import as_module, conversion
from miracle_ban.errors import CodingError, MiracleError, MismatchError, UnsupportedModelError
from miracle_ban.layers import posteriors, use_mode


class Scalars(nn.Module):
    """A scalar, an empty parameter, a parameter of the root, a list and a dictionary of parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.rows = nn.ParameterList([nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))])
        self.named = nn.ParameterDict({"k": nn.Parameter(torch.randn(3))})
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale + self.rows[0] * self.named["k"]) + self.rows[1] + self.empty.sum()


class Tied(nn.Module):
    """A language model whose output weights are its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x)))


TOKENS = torch.tensor([[1, 2, 3], [0, 4, 6]])
R = torch.randn
NETWORKS = {
    "tiny": (helpers.TinyNet, lambda: (R(2, 1, 8, 8),)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1, padding_mode="circular"), nn.ReLU()), lambda: (R(2, 2, 9),)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2, padding="same", bias=False), lambda: (R(2, 4, 9, 9),)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="reflect"), lambda: (R(2, 2, 4, 4, 4),)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)),
        lambda: (R(2, 3, 5, 5),),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3), lambda: (R(2, 3, 5),)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(3, 4, 2), lambda: (R(2, 3, 3, 3, 3),)),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), lambda: (TOKENS,)),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 4), lambda: (TOKENS,)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), lambda: (R(2, 3), R(2, 4))),
    "norms": (
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(5), nn.InstanceNorm1d(4, affine=True), nn.PReLU(4)),
        lambda: (R(2, 4, 5),),
    ),
    "attention": (lambda: nn.MultiheadAttention(8, 2), lambda: (R(5, 2, 8),) * 3),
    "attention of other sizes": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True),
        lambda: (R(5, 2, 8), R(5, 2, 4), R(5, 2, 6)),
    ),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True), lambda: (R(2, 5, 8), R(2, 4, 8))),
    "lstm": (lambda: nn.LSTM(4, 6, 2, bidirectional=True), lambda: (R(5, 2, 4),)),
    "lstm with projection": (lambda: nn.LSTM(4, 6, proj_size=3), lambda: (R(5, 2, 4),)),
    "gru": (lambda: nn.GRU(4, 6, batch_first=True), lambda: (R(2, 5, 4),)),
    "rnn": (lambda: nn.RNN(4, 6), lambda: (R(5, 2, 4),)),
    "cells": (lambda: nn.GRUCell(4, 6), lambda: (R(2, 4), R(2, 6))),
    "tied": (Tied, lambda: (TOKENS,)),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2)), lambda: (R(2, 4),)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), lambda: (R(2, 4),)),
    "scalars": (Scalars, lambda: (R(2, 3),)),
    "double": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double(), lambda: (R(2, 4).double(),)),
}


def mean_outputs(model: nn.Module, arguments: tuple) -> Tensor:
    with use_mode(model, "mean"), torch.no_grad():
        return helpers.outputs_of(model(*arguments))


@pytest.mark.parametrize("name", NETWORKS)
def test_in_mean_mode_the_copy_is_the_original_network(name):
    make, make_arguments = NETWORKS[name]
    net, arguments = make().eval(), make_arguments()
    before = helpers.weight_state(net)
    bnn = convert(net).eval()
    with torch.no_grad():
        assert helpers.outputs_of(net(*arguments)).equal(mean_outputs(bnn, arguments))
    assert helpers.same_state(net.state_dict(), before)
    assert not posteriors(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_16_bits_are_trained_in_32_and_keep_their_dtype(dtype):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3)).to(dtype).eval()
    before = helpers.weight_state(net)
    bnn = convert(net).eval()
    x = torch.randn(4, 1, 3, 3)
    with torch.no_grad():
        expected = copy.deepcopy(net).float()(x)
    assert torch.allclose(expected.double().flatten(), mean_outputs(bnn, (x,)), rtol=1e-3, atol=1e-3)
    assert mean_outputs(bnn, (x.to(dtype),)).equal(mean_outputs(bnn, (x.to(dtype).float(),)))  # its own kind of input is taken, too
    assert all(p.mean.dtype == torch.float32 for p in posteriors(bnn).values())
    assert {e.dtype for e in conversion(bnn).entries if e.name != "1.num_batches_tracked"} == {dtype}
    assert helpers.same_state(net.state_dict(), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_coded_and_every_entry_accounted_for(name):
    make, make_arguments = NETWORKS[name]
    net, arguments = make(), make_arguments()
    bnn = convert(net)
    account = conversion(bnn)
    assert [(e.name, e.shape, e.dtype) for e in account.entries] == [(n, tuple(t.shape), t.dtype) for n, t in net.state_dict().items()]
    parameters = {n for n, p in net.named_parameters() if p.numel()}
    assert {e.name for e in account.of_kind("coded")} == parameters == set(posteriors(bnn))
    held = {f"{path}.{own}" for path, m in bnn.named_modules() if type(m).__name__ == "Posterior" for own in ("mean", "log_std")}
    assert {n for n, p in bnn.named_parameters() if p.numel()} == held  # nothing trainable stays raw
    result = helpers.outputs_of(bnn(*arguments))  # draws
    assert bool(torch.isfinite(result).all())
    (sum(t.double().sum() for t in torch.utils._pytree.tree_leaves(bnn(*arguments)) if t.is_floating_point()) + kl(bnn)).backward()
    for own, p in posteriors(bnn).items():
        assert p.log_std.grad is not None, own
        assert bool(torch.isfinite(p.log_std.grad).all()), own
        assert bool(torch.isfinite(p.mean.grad).all()), own


@pytest.mark.parametrize("name", ["tiny", "lstm", "attention", "tied", "weight norm", "scalars"])
def test_a_copy_of_a_converted_network_is_on_its_own(name):
    make, make_arguments = NETWORKS[name]
    bnn, arguments = convert(make().eval()), make_arguments()
    before = mean_outputs(bnn, arguments)
    other = copy.deepcopy(bnn)
    assert before.equal(mean_outputs(other, arguments))
    with torch.no_grad():
        for p in posteriors(other).values():
            p.mean.add_(1.0)
    assert before.equal(mean_outputs(bnn, arguments))
    assert not before.equal(mean_outputs(other, arguments))


def test_means_start_at_the_trained_weights_with_a_little_noise():
    net = helpers.TinyNet()
    held = posteriors(convert(net))
    for name, weight in net.named_parameters():
        assert torch.equal(held[name].mean, weight)
        assert float(held[name].log_std.detach().exp().max()) <= 0.2 * float(weight.detach().square().mean().sqrt())


def test_tied_weights_are_one_posterior_and_one_alias():
    bnn = convert(Tied())
    assert [(e.name, e.kind, e.alias_of) for e in conversion(bnn).entries] == [
        ("embed.weight", "coded", None),
        ("out.weight", "alias", "embed.weight"),
        ("out.bias", "coded", None),
    ]
    assert len(posteriors(bnn)) == 2


def test_the_account_reads_well():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    text = str(convert(net).conversion)
    assert "30 weights in 2 tensors" in text
    assert "constant" in text
    assert "2.running_mean" in text
    assert "stay raw" in text


# --- BatchNorm ---


def normed(seed: int = 0) -> nn.Module:
    """Convolutions and linear layers with BatchNorms that have seen data."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, eps=0.1), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.Linear(5, 2),
    )  # fmt: skip
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    for _ in range(3):
        net(2 * torch.randn(16, 1, 8, 8) + 1)
    return net


def test_folding_batchnorm_is_exact_and_keeps_names():
    net = normed().eval()
    x = torch.randn(6, 1, 8, 8)
    bnn = convert(net).eval()
    constant = {e.name for e in conversion(bnn).of_kind("constant")}
    assert constant == {
        *(f"{n}.{own}" for n in (1, 4, 8) for own in ("weight", "running_mean", "running_var", "num_batches_tracked")), "3.bias", "7.bias",
    }  # fmt: skip
    assert not conversion(bnn).of_kind("raw")
    assert torch.allclose(helpers.outputs_of(net(x)), mean_outputs(bnn, (x,)), rtol=1e-5, atol=1e-5)
    assert [e.name for e in conversion(bnn).entries] == list(net.state_dict())


class Skipping(nn.BatchNorm2d):
    """A norm whose outputs depend on more than what it normalised."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def test_norms_that_go_on_with_an_activation_are_folded_and_others_are_not():
    """However their forward is written, as if it were two modules."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3)]
    net = nn.Sequential(convolutions[0], helpers.NormedAndActive(4), convolutions[1], Skipping(6), convolutions[2], nn.Flatten())
    for _ in range(30):
        net(2 * torch.randn(16, 1, 9, 9) + 1)
    net.eval()
    bnn = convert(net).eval()
    constant = {e.name for e in conversion(bnn).of_kind("constant")}
    assert constant == {"0.bias", *(f"1.{own}" for own in ("weight", "running_mean", "running_var", "num_batches_tracked"))}
    assert {e.name for e in conversion(bnn).of_kind("raw")} == {
        f"3.{own}" for own in ("running_mean", "running_var", "num_batches_tracked")
    }
    x = torch.randn(6, 1, 9, 9)
    assert torch.allclose(helpers.outputs_of(net(x)), mean_outputs(bnn, (x,)), rtol=1e-5, atol=1e-5)


def test_training_does_not_change_a_folded_norm():
    bnn = convert(normed().eval())
    x = torch.randn(6, 1, 8, 8)
    bnn.eval()
    before = mean_outputs(bnn, (x,))
    state = {k: v.clone() for k, v in bnn.state_dict().items()}
    bnn.train()
    assert before.equal(mean_outputs(bnn, (x,)))
    assert all(torch.equal(v, bnn.state_dict()[k]) for k, v in state.items())


def test_folding_can_be_left_out():
    net = normed().eval()
    x = torch.randn(6, 1, 8, 8)
    bnn = convert(net, fold=False).eval()
    raw = {e.name for e in conversion(bnn).of_kind("raw")}
    assert raw == {f"{n}.{own}" for n in (1, 4, 8) for own in ("running_mean", "running_var", "num_batches_tracked")}
    assert helpers.outputs_of(net(x)).equal(mean_outputs(bnn, (x,)))


def test_folding_leaves_the_argument_alone():
    net = normed()
    before = helpers.weight_state(net)
    convert(net)
    assert helpers.same_state(net.state_dict(), before)
    assert net.training


@pytest.mark.parametrize("tokens", [3, 8])
def test_a_norm_over_another_axis_is_not_folded(tokens):
    """BatchNorm1d after a linear layer on three axes normalises axis 1, not the layer's units."""
    net = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(tokens))
    net(3 * torch.randn(64, tokens, 10) * torch.arange(1.0, tokens + 1)[:, None] + 1)
    net.eval()
    x = torch.randn(5, tokens, 10)
    assert torch.allclose(helpers.outputs_of(net(x)), mean_outputs(convert(net).eval(), (x,)), rtol=1e-4, atol=1e-5)


# --- where ---


def test_where_chooses_the_modules_whose_parameters_are_coded():
    net = helpers.TinyNet()
    seen = []

    def where(name: str, module: nn.Module) -> bool:
        seen.append(name)
        return isinstance(module, nn.Linear)

    bnn = convert(net, where=where)
    assert set(posteriors(bnn)) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert [e.name for e in conversion(bnn).of_kind("raw")] == ["conv.weight", "conv.bias"]
    assert conversion(bnn).raw_bytes == 4 * (72 + 8)
    assert {"conv", "fc1", "fc2"} <= set(seen)
    assert conversion(bnn).links == (miracle_ban.structure.Link("fc1", "fc2", 1),)
    x = torch.randn(2, 1, 8, 8)
    assert helpers.outputs_of(net(x)).equal(mean_outputs(bnn, (x,)))


def test_where_with_folded_norms_computes_the_same():
    net = normed().eval()
    x = torch.randn(6, 1, 8, 8)
    bnn = convert(net, where=lambda name, module: isinstance(module, nn.Linear)).eval()
    assert torch.allclose(helpers.outputs_of(net(x)), mean_outputs(bnn, (x,)), rtol=1e-5, atol=1e-5)


def test_prior_scales_per_unit():
    bnn = convert(Scalars(), per_unit=True)
    assert bool(torch.isfinite(kl(bnn)))
    held = posteriors(bnn)
    assert held["inner.weight"].group_second_moment().shape == (3, 1)
    assert held["inner.bias"].group_second_moment().shape == (1,)


# --- what cannot be converted ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ReLU(),
        lambda: nn.Sequential(),
        lambda: "network",
        lambda: None,
        lambda: {"weight": torch.ones(3)},
        lambda: convert(nn.Linear(2, 2)),
        lambda: nn.Sequential(convert(nn.Linear(2, 2)), nn.Linear(2, 2)),
        lambda: nn.LazyLinear(3),
        lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.ReLU())),
    ],
    ids=["no parameters", "empty", "text", "None", "state dict", "converted", "partly converted", "lazy", "scripted"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_converted_is_refused(make):
    with pytest.raises(MiracleError):
        convert(make())


class Holding(nn.Linear):
    """A layer with one more thing on it: a buffer if that is a tensor."""

    def __init__(self, thing: object):
        super().__init__(3, 2)
        if isinstance(thing, Tensor):
            self.register_buffer("thing", thing)
        else:
            self.thing = thing


def pruned() -> nn.Module:
    return nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Linear, "class Linear: give an instance"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (lambda: Holding(torch.eye(3).to_sparse()), r"thing is a tensor of torch.sparse_coo: make it dense"),
        (lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn), r"weight is of torch.float8_e4m3fn.*torch.float16"),
        (lambda: Holding(threading.Lock()), "cannot be copied"),
        (pruned, "prune.remove"),
        (lambda: nn.ReLU(), "no floating-point parameter to code among the modules ReLU$"),
    ],
)
def test_what_cannot_be_converted_is_said_with_its_remedy(make, says):
    with pytest.raises(UnsupportedModelError, match=says):
        convert(make())


def test_a_where_that_is_no_function_is_refused():
    with pytest.raises(UnsupportedModelError, match="type str"):
        convert(helpers.TinyNet(), where="conv")
    with pytest.raises(MismatchError, match="type str"):
        kl("network")


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager"), lambda net: nn.DataParallel(torch.compile(net))]
)
def test_a_network_is_taken_out_of_its_wrapper(wrap):
    net = helpers.TinyNet()
    bnn = convert(wrap(net))
    assert helpers.same_state(bnn.state_dict(), convert(net).state_dict())
    assert [e.name for e in conversion(bnn).entries] == list(net.state_dict())


def test_layers_with_hooks_are_neither_folded_nor_narrowed():
    """Nobody knows what a hook does with the outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    nn.init.normal_(net[1].running_mean)
    plain = conversion(convert(net))
    assert plain.folded == (("0", "1"),)
    assert [k.producer for k in plain.links] == ["3"]
    net[0].register_forward_hook(lambda module, args, out: out.square())
    net[3].register_forward_hook(lambda module, args, out: out * torch.arange(4.0)[:, None, None])
    bnn = convert(net).eval()
    assert (bnn.conversion.folded, bnn.conversion.links) == ((), ())
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(mean_outputs(bnn, (x,)).float(), net(x).flatten(), atol=1e-4)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_a_hook_computes_from_others_are_coded_through_them(graph):
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 4)
    with torch.set_grad_enabled(graph):  # of the weight that the hook leaves behind
        wanted = net(x).detach()
    bnn = convert(net).eval()
    assert set(posteriors(bnn)) == {"0.weight_g", "0.weight_v", "0.bias", "2.weight", "2.bias"}
    assert mean_outputs(bnn, (x,)).equal(wanted.double().flatten())
    assert net[0].weight.requires_grad == graph


def test_a_pruned_network_is_refused_whether_or_not_it_can_be_copied():
    net = pruned()
    with torch.no_grad():
        net(torch.randn(5, 4))
    with pytest.raises(UnsupportedModelError, match=r"prune\.remove"):
        convert(net)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    net = helpers.TinyNet()
    with torch.no_grad():
        net.fc1.bias[3] = bad
    with pytest.raises(UnsupportedModelError, match=r"fc1\.bias holds 1 "):
        convert(net)


def test_a_where_that_chooses_nothing_is_refused():
    with pytest.raises(UnsupportedModelError, match="where"):
        convert(helpers.TinyNet(), where=lambda name, module: False)


def test_only_converted_models_have_a_conversion():
    with pytest.raises(MismatchError, match="convert"):
        conversion(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="convert"):
        kl(nn.Linear(2, 2))


def test_forward_in_draw_mode_differs_from_call_to_call_and_mean_mode_does_not():
    bnn, x = convert(helpers.TinyNet()), torch.randn(2, 1, 8, 8)
    assert not bnn(x).equal(bnn(x))
    assert mean_outputs(bnn, (x,)).equal(mean_outputs(bnn, (x,)))
    assert F.cross_entropy(bnn(x), torch.tensor([0, 1])).requires_grad


# --- norms that cannot be folded into a layer, and networks that cannot be traced as a whole ---


class PreActivation(nn.Module):
    """A norm before its layer, as in DenseNet, behind control flow that hides it from the tracer."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)
        self.block = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), ConvNorm()])

    def forward(self, x):
        if x.sum() > -1e9:
            x = self.conv(torch.relu(self.norm(x)))
        for part in self.block:
            x = part(x)
        return x


class ConvNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


def test_statistics_of_every_norm_are_folded_and_parts_are_traced():
    torch.manual_seed(0)
    net = PreActivation()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 3.0)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    net.eval()
    x = torch.randn(4, 2, 8, 8)
    bnn = convert(net)
    assert torch.allclose(helpers.outputs_of(net(x)), mean_outputs(bnn.eval(), (x,)), atol=1e-4)
    assert not conversion(bnn).of_kind("raw")
    assert conversion(bnn).folded == (("block.1.conv", "block.1.norm"),)  # a plain Sequential may be called piece by piece
    coded = {e.name for e in conversion(bnn).of_kind("coded")}
    assert {"norm.weight", "norm.bias", "block.0.1.weight"} <= coded
    assert "block.1.norm.weight" not in coded
    before = mean_outputs(bnn, (x,))
    bnn.train()
    assert before.equal(mean_outputs(bnn, (x,)))


def test_a_state_dict_alone_becomes_a_file_that_gives_it_back(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
    archive = compress(net.state_dict(), budget="1.2 kB", progress=False)
    save(archive, tmp_path / "net.mban")
    found = load(tmp_path / "net.mban")
    assert list(found) == list(net.state_dict())
    net.load_state_dict(found)
    for name, t in net.state_dict().items():
        assert found[name].dtype == t.dtype
        assert found[name].shape == t.shape
    with pytest.raises(UnsupportedModelError, match="bad"):
        as_module({"good": torch.ones(2), "bad": 3})
    with pytest.raises(UnsupportedModelError, match="empty"):
        as_module({})
    with pytest.raises(UnsupportedModelError, match=r"not 'net\.pt': load it first"):
        compress("net.pt", budget=200)
    with pytest.raises(CodingError, match="seed must be an integer"):
        compress({"good": torch.ones(2)}, budget=200, seed=-1)
    with pytest.raises(MiracleError, match="network itself"):
        compress(net.state_dict(), inputs=torch.randn(2, 3, 4, 4), budget=900)


def test_tied_tensors_of_a_state_dict_are_stored_once():
    tied = torch.randn(30, 20)
    kinds = {e.name: e.kind for e in conversion(convert(as_module({"a.weight": tied, "b.weight": tied}))).entries}
    assert kinds == {"a.weight": "coded", "b.weight": "alias"}


def test_frozen_norms_of_detection_networks_are_folded_and_coded():
    torch.manual_seed(0)
    norm = torchvision.ops.FrozenBatchNorm2d
    net = nn.Sequential(
        norm(2), nn.Conv2d(2, 4, 3, bias=False), norm(4), nn.ReLU(), nn.Conv2d(4, 3, 3), norm(3, eps=0.1), nn.Flatten(), nn.Linear(48, 2)
    )
    for m in net.modules():
        if isinstance(m, norm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 3.0)
            m.weight.normal_()
            m.bias.normal_()
    x = torch.randn(5, 2, 8, 8)
    bnn = convert(net)
    assert not conversion(bnn).of_kind("raw")
    assert conversion(bnn).folded == (("1", "2"), ("4", "5"))
    assert torch.allclose(helpers.outputs_of(net(x)), mean_outputs(bnn, (x,)), atol=1e-4)
    state = miracle_ban.decode(miracle_ban.encode(bnn, progress=False), net)
    fresh = copy.deepcopy(net)
    fresh.load_state_dict(state)
    assert fresh[2].running_var.eq(1).all()
    assert torch.allclose(helpers.outputs_of(fresh(x)), mean_outputs(bnn, (x,)), atol=1e-4)
