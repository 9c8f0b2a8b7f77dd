"""Training the posteriors in a loop of one's own; the examples of the README run as they stand there."""

from __future__ import annotations

import re
import types
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import miracle_ban
from miracle_ban import convert, encode, kl
from miracle_ban.errors import BudgetError, MiracleError, MismatchError
from miracle_ban.layers import use_mode
from miracle_ban.penalty import Penalty
from miracle_ban.train import make_optimizer

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README.partition("### In a training loop of your own")[2].partition("\n### ")[0], re.DOTALL)


def train(bnn: nn.Module, penalty: Penalty, batches: list, epochs: int) -> None:
    optimizer = make_optimizer(bnn, 4e-3)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            (F.cross_entropy(bnn(x), y) + penalty()).backward()
            optimizer.step()


def test_a_loop_of_ones_own_meets_its_budget(trained_net, batches):
    bnn = convert(trained_net)
    penalty = Penalty(bnn, budget=300, num_examples=512, steps=60 * len(batches))
    before = penalty.predicted_bytes
    train(bnn, penalty, batches, 60)
    assert before > 1.5 * 300
    assert penalty.predicted_bytes == pytest.approx(300, rel=0.1)
    archive = encode(bnn, coder="trellis", progress=False)
    assert archive.size_bytes <= 300
    net = helpers.TinyNet()
    net.load_state_dict(miracle_ban.decode(archive, net))
    assert helpers.error_rate(net) < helpers.error_rate(trained_net) + 0.05


def test_without_a_budget_beta_stays(trained_net, batches):
    bnn = convert(trained_net)
    penalty = Penalty(bnn, num_examples=512, beta=0.25)
    for _ in range(3):
        assert torch.allclose(penalty(), 0.25 * kl(bnn) / 512)
    assert (penalty.beta, penalty.budget_bytes) == (0.25, None)
    penalty().backward()
    assert all(p.grad is not None for p in bnn.parameters())


def test_an_interrupted_loop_goes_on_with_the_same_beta(trained_net):
    bnn = convert(trained_net)
    one, other = (Penalty(bnn, budget=300, num_examples=512, steps=100) for _ in range(2))
    for _ in range(30):
        one()
    other.load_state_dict(one.state_dict())
    assert [float(one().detach()) for _ in range(30)] == [float(other().detach()) for _ in range(30)]
    assert one.beta == other.beta


def test_what_makes_no_sense_is_refused(trained_net):
    bnn = convert(trained_net)
    with pytest.raises(MismatchError, match="convert"):
        Penalty(trained_net, num_examples=10)
    for options in ({"num_examples": 0}, {"num_examples": 10, "budget": 300}, {"num_examples": 10, "budget": 300, "steps": 0}):
        with pytest.raises(MiracleError, match="must be positive"):
            Penalty(bnn, **options)
    with pytest.raises(BudgetError, match="cannot be met"):
        Penalty(bnn, num_examples=10, budget=12, steps=10)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*helpers.blobs(512, seed=0)), 64)


def test_the_loop_of_the_readme_runs(trained_net):
    scope = {"miracle_ban": miracle_ban, "F": F, "net": trained_net, "loader": loader()}
    exec(EXAMPLES[0], scope)
    assert scope["archive"].size_bytes <= 1500
    assert scope["penalty"].step == scope["penalty"].steps == 240


def test_the_callback_of_the_readme_runs(trained_net, tmp_path):
    """Driven as Lightning's trainer drives it: hooks in its order, the callback's gradient between backward and step."""
    scope = {"miracle_ban": miracle_ban, "Penalty": Penalty, "lightning": types.SimpleNamespace(Callback=object)}
    exec(EXAMPLES[1], scope)
    callback = scope["CompressTo"]("300", tmp_path / "net.mban")
    module = nn.Module()
    module.net = convert(trained_net)
    trainer = types.SimpleNamespace(train_dataloader=loader(), estimated_stepping_batches=240.0)
    optimizer = make_optimizer(module.net, 4e-3)
    callback.on_train_start(trainer, module)
    for _ in range(30):
        for x, y in trainer.train_dataloader:
            optimizer.zero_grad()
            F.cross_entropy(module.net(x), y).backward()
            callback.on_before_optimizer_step(trainer, module, optimizer)
            optimizer.step()
    callback.on_train_end(trainer, module)
    assert (tmp_path / "net.mban").stat().st_size <= 300
    with use_mode(module.net.eval(), "mean"), torch.no_grad():
        images, labels = helpers.blobs(200, seed=5)
        assert float((module.net(images).argmax(1) == labels).float().mean()) > 0.9
    loaded = miracle_ban.load(tmp_path / "net.mban", helpers.TinyNet())
    assert helpers.error_rate(loaded) < 0.1
