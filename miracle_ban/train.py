"""Training of the posteriors by the beta-ELBO, towards a budget.

`fit` first narrows the network to the hidden units that the budget can pay for, then trains all posteriors while beta is
steered so that the predicted size of the file comes down to the budget. Under `torchrun` it is one training by all processes.
Leans on `convert`, `course`, `plan`, `objective`, `distributed`.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint as checkpoints
from . import coders, distributed
from .ban import BayesianAttention
from .bits import NATS_PER_BIT, parse_bytes
from .convert import conversion, drop_units
from .course import Row, check_loss, run
from .errors import BudgetError, MiracleError
from .feed import Feed
from .layers import posteriors, use_mode
from .network import call
from .objective import Steering, beta_elbo, descent
from .plan import carries_names, kl_bits_by_tensor, predicted_index_bits, side_bits, skeleton
from .structure import Link

Loss = Callable[[Any, Any], Tensor]
ATTENTION_RATE = 4e-3  # largest learning rate of the attention's own networks
LOG_STD_RATE = 5.0  # learning rate of log_std over that of the means
BLOCK_BITS = 14.0  # KL of one block
FIRST_BETA = 0.02  # low: the KL is to come down slowly, from above
LARGEST_START = 8.0  # the descent begins at most at this many times the budget
SHORT_RUN_RESPONSE = 4.0  # see Steering
SLOW_GAIN = 0.02  # largest relative change of beta a step
RARE_GAIN = 0.1  # the same where only one step in five, that on the context of everything, can steer
LOG_EVERY = 20  # steps
CHECK_EVERY = 200  # steps between comparisons of the processes' posteriors
SILENT_BITS = 3.0  # KL of all weights into, or out of, a hidden unit, under which it is dropped


@dataclass
class FitReport:
    """What happened in `fit`; `history` has one row per logged step.

    Columns of a row: step, loss (nats per example), beta, kl_bits, predicted_bytes, learning_rate.
    """

    budget_bytes: int | None
    num_examples: int
    steps: int = 0
    seconds: float = 0.0
    beta: float = 0.0
    kl_bits: float = 0.0
    predicted_bytes: float = 0.0
    kl_bits_by_tensor: dict[str, float] = field(default_factory=dict)
    live_weights: int = 0
    widths: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    def plot(self, path: str | Path) -> None:
        """Draw loss, beta and predicted bytes against the step; needs matplotlib."""
        from .plots import plot_fit

        plot_fit(self, path)


@dataclass
class Session:
    """What `fit` leaves for `encode`: the beta that training ended with and what it was aimed at."""

    beta: float
    num_examples: int
    budget_bytes: int | None
    block_bits: float


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without decay (the prior is the decay); log_std learns five times faster than the means."""
    held = posteriors(model).values()
    return torch.optim.AdamW(
        [
            {"params": [p.mean for p in held], "lr": learning_rate},
            {"params": [p.log_std for p in held], "lr": learning_rate * LOG_STD_RATE},
        ],
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )


def train_step(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    beta: float | dict[str, float],
    num_examples: int,
    attention: BayesianAttention | None = None,
) -> tuple[float, dict[str, float]]:
    """One gradient step on the beta-ELBO; returns the loss, nats per example, and the KL of each tensor, nats.

    `beta` may be given for each tensor. With `attention` the step is on a context that it draws. Of several processes gradients and
    loss are the mean.

    Raises:
        MiracleError: the loss is NaN or infinite.
    """
    if attention is None:
        value, extra = loss(call(model, batch[0]), batch[1]), None
        check_loss(value)
    else:
        value, extra = attention.losses(model, batch, loss, num_examples)
    held = posteriors(model)
    kl_nats = torch.stack([p.kl() for p in held.values()])
    optimizer.zero_grad(set_to_none=True)
    if isinstance(beta, dict):
        weighted = (kl_nats * kl_nats.new_tensor([beta[name] for name in held])).sum()
        objective = beta_elbo(value, weighted, beta=1.0, num_examples=num_examples)
    else:
        weight = 1.0 if attention is None else attention.kl_weight
        objective = beta_elbo(value, kl_nats.sum(), beta=weight * beta, num_examples=num_examples)
    (objective if extra is None else objective + extra.to(objective)).backward()
    (measured,) = distributed.mean_gradients(optimizer, [float(value.detach())])
    _take_step(optimizer)
    if not math.isfinite(measured):
        raise MiracleError(f"the loss became {measured}: lower the learning rate, or check the data for NaN")
    return measured, dict(zip(held, kl_nats.detach().tolist(), strict=True))


def _take_step(optimizer: torch.optim.Optimizer) -> None:
    """A step, after which an autocast around all of the training must not go on with the weights as they were cast before."""
    optimizer.step()
    torch.clear_autocast_cache()


@torch.enable_grad()
def fit(
    model: nn.Module,
    batches: Iterable,
    loss: Loss,
    *,
    budget: str | int | None = None,
    epochs: float = 30.0,
    learning_rate: float = 4e-3,
    beta: float = 1.0,
    coder: str | coders.Coder = "gprs",
    block_bits: float = BLOCK_BITS,
    narrow: bool = True,
    narrow_epochs: float = 2.0,
    weights_per_bit: float = 1.5,
    names: bool | None = None,
    num_examples: int | None = None,
    sharded: bool | None = None,
    attention: BayesianAttention | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    callback: Callable[[dict[str, float]], None] | None = None,
) -> FitReport:
    """Train the posteriors of a converted model on loss + beta KL / N.

    In a torch.distributed process group every process makes this call, with the same network and arguments: each step is then on a
    batch of every process, and afterwards all of them have the same posteriors.

    Args:
        model: from `convert`; trained in place.
        batches: iterable of (inputs, targets), iterated again for every epoch.
        loss: `loss(outputs, targets)` -> mean negative log-likelihood of the batch, nats, shape ().
        budget: size of the whole file to aim at, bytes or text such as "1.5 kB"; None trains at a constant `beta`.
        epochs: passes over `batches`, narrowing not counted.
        learning_rate: peak of the one-cycle schedule for the means.
        beta: weight of the KL if there is no budget.
        coder: the coder that `encode` will be called with: it decides how many bits a nat costs.
        block_bits: KL that one block will carry.
        narrow: first drop hidden units until the live weights are about `weights_per_bit` for each bit of the budget.
        narrow_epochs: passes spent on that.
        names: whether the file will carry names and shapes; default if larger than 10 kB.
        num_examples: N; default the length of the data set.
        sharded: of several processes: whether each gives `batches` of its own share of the data, or all give the same, of which they
            take turns; default the former if the loader's sampler is distributed. A pass is as many steps as one process has batches.
        attention: conditions the posteriors on contexts that it draws from the batches; `budget` is then what the package of
            the context of everything aims at. Afterwards it is `model.bayesian_attention`, and `encode(model, context=...)` uses it.
        seed: for torch's generator; draws and shuffling follow from it.
        checkpoint: file that keeps the state after every pass; if it exists, training resumes from it, or is over. The end is the
            same, bit by bit, as if there had been no interruption, where the loader draws from torch's generator or its own.
        progress: show a progress bar on stderr; of several processes on the first.
        callback: called with each row of the history.

    Returns:
        A `FitReport`.

    Raises:
        BudgetError: the budget is smaller than what is stored besides the indices.
        MiracleError: the loss diverged, batches are not (inputs, targets), or another process has died.
    """
    started = time.monotonic()
    if not (math.isfinite(epochs) and epochs > 0 and math.isfinite(learning_rate) and learning_rate > 0):
        raise MiracleError(f"epochs and learning_rate must be positive, not {epochs} and {learning_rate}")
    if not (math.isfinite(beta) and beta >= 0):
        raise MiracleError(f"beta must be zero or positive, not {beta}")
    links = conversion(model).links
    device = next(model.parameters()).device
    with seeded(seed, device):  # an iterable without a length is counted, and may draw
        feed = Feed(batches, device, num_examples, sharded=sharded, seed=seed)
        per_epoch = feed.batches_per_pass
    budget_bytes = None if budget is None else parse_bytes(budget)
    coder = coders.get(coder) if isinstance(coder, str) else coder
    coder = coder.settled(block_bits, 8.0 * budget_bytes if budget_bytes else sum(kl_bits_by_tensor(model).values()))
    settings = {
        "seed": seed, "budget_bytes": budget_bytes, "epochs": epochs, "learning_rate": learning_rate, "coder": coder.name,
        "block_bits": block_bits, "weights_per_bit": weights_per_bit, "narrow": narrow, "beta": beta,
        "num_examples": feed.num_examples, "tensors": list(posteriors(model)), "attention": attention is not None,
        "processes": distributed.world_size(),
    }  # fmt: skip
    saved = checkpoints.read(Path(checkpoint), stage="fit", expected=settings) if checkpoint is not None else None
    distributed.synchronise([*model.parameters(), *model.buffers()])
    model.train()
    with seeded(distributed.own_seed(seed), device):
        if saved is not None:
            checkpoints.restore_model(model, saved["course"]["model"])
        elif budget_bytes is not None and narrow and links:
            target = weights_per_bit * 8 * budget_bytes
            _narrow(model, feed, loss, target, max(1, round(narrow_epochs * per_epoch)), learning_rate / 4, progress)
        with_names = carries_names(names, model, None if budget_bytes is None else 8.0 * budget_bytes)
        side = side_bits(skeleton(model, coder=coder, seed=0, names=with_names)) if saved is None else saved["course"]["side"]
        goal = None if budget_bytes is None else index_budget_bits(budget_bytes, side)
        if attention is not None:
            attention.attach(model, feed.next()[0])
            feed.restart()
            distributed.synchronise(attention.parameters())
        report = FitReport(budget_bytes, feed.num_examples, steps=max(1, round(epochs * per_epoch)))
        steering = start_steering(beta if goal is None else FIRST_BETA, report.steps)
        if attention is not None:
            steering.gain = max(steering.gain, RARE_GAIN)
        course = _Fitting(model, feed, loss, coder, block_bits, steering, learning_rate, goal, report.steps,
                          side=side, drop=narrow and attention is None, attention=attention)  # fmt: skip
        report.history, started = run(
            course, report.steps, stage="fit", settings=settings, saved=saved, checkpoint=checkpoint, device=device, started=started,
            progress=progress, callback=callback,
        )  # fmt: skip
        if attention is not None:
            attention.settle(model, batches)
    distributed.synchronise(checkpoints.buffers(model).values())
    held = posteriors(model)
    report.kl_bits_by_tensor = kl_bits_by_tensor(model)
    report.kl_bits = sum(report.kl_bits_by_tensor.values())
    report.predicted_bytes = (side + course.forecast()) / 8
    report.beta, report.seconds = steering.beta, time.monotonic() - started
    report.live_weights = sum(p.mean.numel() for p in held.values())
    report.widths = {k.producer: held[f"{k.producer}.weight"].kept[0] for k in links}
    model.session = Session(steering.beta, feed.num_examples, budget_bytes, block_bits)  # type: ignore[assignment]
    return report


class _Fitting:
    """The course of `fit`: schedule of the learning rate, descent of the size, steering of beta."""

    def __init__(
        self,
        model: nn.Module,
        feed: Feed,
        loss: Loss,
        coder: coders.Coder,
        block_bits: float,
        steering: Steering,
        learning_rate: float,
        goal: float | None,
        steps: int,
        *,
        side: float,
        drop: bool,
        attention: BayesianAttention | None = None,
    ):
        self.side, self.attention = side, attention
        self.model, self.feed, self.loss, self.coder, self.block_bits = model, feed, loss, coder, block_bits
        self.steering, self.goal, self.steps, self.drop = steering, goal, steps, drop
        self.optimizer = make_optimizer(model, learning_rate)
        if attention is not None:
            own = [p for p in attention.parameters() if p.requires_grad]
            self.optimizer.add_param_group({"params": own, "lr": min(learning_rate, ATTENTION_RATE)})
        rates = [g["lr"] for g in self.optimizer.param_groups]
        warm_up = min(0.1, 200 / steps + 0.02)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rates, total_steps=steps + 1, pct_start=warm_up)
        self.step = 0
        self.beta = steering.beta  # of the next step
        self.running = 0.0  # mean loss of the latest steps
        self.kl_nats = sum(kl_bits_by_tensor(model).values()) * NATS_PER_BIT  # at the latest step on everything
        self.bits_per_nat = 1.0 / NATS_PER_BIT
        self.first = self.forecast()

    def forecast(self) -> float:
        """Predicted bits of all codewords; in between, the prediction follows the KL in proportion."""
        counts = {name: p.mean.numel() for name, p in posteriors(self.model).items()}
        kl_bits = kl_bits_by_tensor(self.model)
        predicted = predicted_index_bits(kl_bits, counts, self.coder, self.block_bits)
        self.bits_per_nat = predicted / max(sum(kl_bits.values()) * NATS_PER_BIT, 1e-9)
        return predicted

    def advance(self) -> Row | None:
        step, beta = self.step, self.beta
        value, by_tensor = train_step(
            self.model, self.feed.next(), self.loss, self.optimizer, beta=beta, num_examples=self.feed.num_examples,
            attention=self.attention,
        )  # fmt: skip
        general, kl_nats = True, sum(by_tensor.values())
        if self.attention is not None:  # the budget is that of the context of everything, which not every process may have drawn
            drawn = self.attention.is_general
            share, total = (
                sum(v) for v in zip(*distributed.gather((drawn, self.attention.kl_nats(self.model) if drawn else 0.0)), strict=True)
            )
            general, kl_nats = share > 0, total / max(share, 1)
        self.schedule.step()
        self.running = value if step == 0 else 0.98 * self.running + 0.02 * value
        if step % LOG_EVERY == 0:
            self.forecast()
        if general:
            self.kl_nats = kl_nats
        predicted = self.bits_per_nat * self.kl_nats
        if self.goal is not None:
            target = descent(step / self.steps, min(self.first, LARGEST_START * self.goal), self.goal)
            if general:
                self.beta = self.steering.update(predicted, target)
            if self.drop and (step + 1) % max(1, self.steps // 10) == 0 and step >= 0.3 * self.steps:
                _drop_silent_units(self.model, self.optimizer)
        self.step += 1
        if self.step % CHECK_EVERY == 0 or self.step == self.steps:
            distributed.check_equal((p.mean for p in posteriors(self.model).values()), f"posteriors after step {self.step}")
        if step % LOG_EVERY and self.step < self.steps:
            return None
        return {
            "step": step, "loss": self.running, "beta": self.steering.beta, "kl_bits": self.kl_nats / NATS_PER_BIT,
            "learning_rate": self.optimizer.param_groups[0]["lr"], "predicted_bytes": (self.side + predicted) / 8,
        }  # fmt: skip

    def words(self, row: Row) -> str:
        return f"loss {row['loss']:.4f}, beta {row['beta']:.3g}, {row['predicted_bytes']:,.0f} bytes"

    def state(self) -> dict[str, Any]:
        return {
            "model": checkpoints.model_state(self.model), "side": self.side,
            "step": self.step, "running": self.running, "bits_per_nat": self.bits_per_nat, "first": self.first,
            "beta": self.steering.beta, "next_beta": self.beta, "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "kl_nats": self.kl_nats,
            "attention": None if self.attention is None else self.attention.state_dict(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """See `Course.restore`; the posteriors, which the optimizer is made of, are restored before it is made."""
        self.step, self.running, self.bits_per_nat = state["step"], state["running"], state["bits_per_nat"]
        self.first, self.steering.beta, self.beta = state["first"], state["beta"], state["next_beta"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.kl_nats = state["kl_nats"]
        if self.attention is not None:
            self.attention.load_state_dict(state["attention"])


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from torch's generator as if seeded, and leave it afterwards as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def start_steering(beta: float, steps: int) -> Steering:
    """Steering for a run of `steps` steps, from `beta` on.

    A short run must be able to cross four decades of beta, too, and so coarse an integral needs damping.
    """
    gain = max(SLOW_GAIN, 30.0 / max(steps, 1))
    return Steering(beta, gain=gain, response=0.0 if gain == SLOW_GAIN else SHORT_RUN_RESPONSE)


def index_budget_bits(budget_bytes: int, side: float) -> float:
    """Bits of the budget that are left for indices.

    Raises:
        BudgetError: less than a tenth of it.
    """
    left = 8.0 * budget_bytes - side
    if left < 0.1 * 8 * budget_bytes:
        need = math.ceil(side / 8)
        raise BudgetError(
            f"a budget of {budget_bytes} bytes cannot be met: header, prior scales and raw tensors alone take {need} bytes; "
            f"raise it above {math.ceil(need / 0.9)} bytes, or code more of the model (see print(model.conversion))"
        )
    return left


def _narrow(model: nn.Module, feed: Feed, loss: Loss, target: float, steps: int, learning_rate: float, progress: bool) -> None:
    """Drop hidden units, those that the loss misses least for the weights they cost, until `target` weights are left.

    A unit's relevance is the mean square of d loss / d scale, the scale being a common factor on the unit's incoming
    weights: sum_i w_i dL/dw_i (Molchanov et al. 2019, arXiv 1906.10771, equation 8). Means only, no noise, no KL.
    """
    held, links = posteriors(model), conversion(model).links
    live = sum(p.mean.numel() for p in held.values())
    if live <= target:
        return
    rounds = min(25, steps)
    bar = tqdm(total=steps, disable=not progress, file=sys.stderr, desc="narrow", unit="step")
    first = live
    with use_mode(model, "mean"):
        for r in range(rounds):
            optimizer = torch.optim.Adam([p.mean for p in held.values()], learning_rate, betas=(0.9, 0.99))
            relevance: dict[Link, Tensor] = {}
            for _ in range(steps // rounds):
                x, y = feed.next()
                optimizer.zero_grad(set_to_none=True)
                value = loss(call(model, x), y)
                value.backward()
                distributed.mean_gradients(optimizer)
                for link in links:
                    relevance[link] = relevance.get(link, 0.0) + _unit_gradient(model, link).square()  # type: ignore[operator]
                _take_step(optimizer)
                bar.update()
            goal = first * (target / first) ** ((r + 1) / rounds)
            live = _drop_until(model, relevance, goal)
            bar.set_postfix_str(f"{live:,} weights left of {first:,}, loss {float(value.detach()):.4f}")
    bar.close()


@torch.no_grad()
def _drop_silent_units(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Drop the hidden units whose incoming or outgoing weights have all fallen back to their prior.

    Such a unit says nothing any more: it only adds the prior's noise.
    """
    held = posteriors(model)
    for link in conversion(model).links:
        weight, bias, out = held[f"{link.producer}.weight"], held.get(f"{link.producer}.bias"), held[f"{link.consumer}.weight"]
        incoming = weight.kl_per_weight().flatten(1).sum(1)
        if bias is not None:
            incoming = incoming + bias.kl_per_weight()
        outgoing = out.kl_per_weight().transpose(0, 1).flatten(1).sum(1).reshape(-1, link.multiplicity).sum(1)
        keep = torch.nonzero(torch.minimum(incoming, outgoing) >= SILENT_BITS * NATS_PER_BIT).squeeze(1)
        if 0 < len(keep) < len(incoming):
            drop_units(model, link, keep, optimizer)


@torch.no_grad()
def _unit_gradient(model: nn.Module, link: Link) -> Tensor:
    """Gradient d loss / d scale of every unit of a link, shape [units]."""
    held = posteriors(model)
    weight, bias = held[f"{link.producer}.weight"], held.get(f"{link.producer}.bias")
    total = (weight.mean * weight.mean.grad).flatten(1).sum(1)  # type: ignore[operator]
    return total if bias is None else total + bias.mean * bias.mean.grad  # type: ignore[operator]


def _drop_until(model: nn.Module, relevance: dict[Link, Tensor], goal: float) -> int:
    """Drop the least relevant unit per weight, over all links, until at most `goal` weights are live."""
    held = posteriors(model)
    keep = {link: torch.arange(len(r), device=r.device) for link, r in relevance.items()}

    def cost(link: Link) -> int:
        weight, consumer = held[f"{link.producer}.weight"], held[f"{link.consumer}.weight"]
        into = sum(len(keep[k]) * k.multiplicity for k in keep if k.consumer == link.producer)
        inputs = into or weight.mean.shape[1]
        outputs = next((len(keep[k]) for k in keep if k.producer == link.consumer), consumer.mean.shape[0])
        kernel_in, kernel_out = weight.mean[0, 0].numel(), consumer.mean[0, 0].numel()
        return inputs * kernel_in + 1 + outputs * link.multiplicity * kernel_out

    live = sum(p.mean.numel() for p in held.values())
    while live > goal:
        choices = [(float(relevance[k][keep[k]].min()) / cost(k), i, k) for i, k in enumerate(keep) if len(keep[k]) > 1]
        if not choices:
            break
        link = min(choices)[2]
        live -= cost(link)
        worst = relevance[link][keep[link]].argmin()
        keep[link] = keep[link][torch.arange(len(keep[link]), device=worst.device) != worst]
    for link, units in keep.items():
        if len(units) < len(relevance[link]):
            drop_units(model, link, units)
    return sum(p.mean.numel() for p in held.values())
