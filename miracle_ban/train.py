"""Training of the posteriors by the beta-ELBO, towards a budget.

`fit` first narrows the network to the hidden units that the budget can pay for, then trains all posteriors while beta is
steered so that the predicted size of the file comes down to the budget. Under `torchrun` it is one training by all processes.
Leans on `convert`, `plan`, `objective`, `distributed`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
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
from .errors import BudgetError, MiracleError
from .layers import posteriors, use_mode
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


class Feed:
    """Endless batches from a loader that can be iterated again and again: (inputs, targets), moved to the model's device.

    Of several processes, those whose loader is the same take turns: rank r of R gets batches r, r + R, ... of each pass, whose order
    and other random numbers all of them draw alike; what is left of a pass that R does not divide is not used.

    Args:
        batches: an iterable of pairs, with a length.
        num_examples: number of training examples; default `batches.num_examples`, `len(batches.dataset)`, or counted.
        sharded: whether each process has a loader of its own share; default if a sampler says that it is for several.
        seed: of the random numbers that processes with the same loader draw it with.
    """

    def __init__(
        self, batches: Iterable, device: torch.device, num_examples: int | None = None, *, sharded: bool | None = None, seed: int = 0
    ):
        if not isinstance(batches, Iterable):
            raise MiracleError(f"batches must be an iterable of (inputs, targets), such as a DataLoader, not {type(batches).__name__}")
        if isinstance(batches, Iterator):
            raise MiracleError("batches must be iterable more than once: pass a DataLoader or a list, not an iterator")
        self.batches, self.device = batches, device
        self.sharded = is_sharded(batches) if sharded is None else sharded
        self._turns, self._turn = (1, 0) if self.sharded else (distributed.world_size(), distributed.rank())
        self._draws = torch.Generator().manual_seed(seed).get_state() if self._turns > 1 else None
        if num_examples is not None and num_examples < 1:
            raise MiracleError(f"num_examples must be at least 1, not {num_examples}")
        self.num_examples = num_examples or self._count()
        self._source: Iterator | None = None
        self._passes = 0  # begun so far
        self.position = 0  # batches of this pass that were given

    def _count(self) -> int:
        given = getattr(self.batches, "num_examples", None)
        if given is None and hasattr(self.batches, "dataset"):
            given = len(self.batches.dataset)
        if given is None:
            given = sum(_batch_size(b) for b in self.batches)
            given = sum(distributed.gather(given)) if self.sharded else given
        if not given:
            raise MiracleError("batches holds no training examples")
        return int(given)

    @functools.cached_property
    def batches_per_pass(self) -> int:
        """Batches of one pass that this process gets: as many as every other."""
        whole = len(self.batches) if isinstance(self.batches, Sized) else sum(1 for _ in self.batches)
        if whole < self._turns:
            raise MiracleError(f"batches holds {whole} batch(es) for {self._turns} processes: make smaller batches, or use fewer processes")
        return min(distributed.gather(whole)) if self.sharded else whole // self._turns

    def restart(self) -> None:
        """Begin a new pass with the next batch."""
        self._source, self.position = None, 0

    def end_pass(self) -> None:
        """Begin a new pass with the next batch; a loader that has given all its batches sees its end, as in a loop over it."""
        if self._source is not None and self.position == self.batches_per_pass:
            with self._drawing():
                list(itertools.islice(self._source, self._turns))
        self.restart()

    def next(self) -> tuple[Any, Any]:
        """The next batch."""
        for _ in range(2):
            with self._drawing():
                if self._source is None:
                    self._begin_pass()
                found = list(itertools.islice(self._source, self._turns))  # type: ignore[arg-type]
            if len(found) == self._turns:
                batch = found[self._turn]
                if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                    raise MiracleError("each batch must be a pair (inputs, targets)")
                self.position += 1
                return _to(batch[0], self.device), _to(batch[1], self.device)
            self.restart()
        raise MiracleError("batches is empty: it gave no batch at all")

    def _begin_pass(self) -> None:
        for own in _parts(self.batches):
            if callable(getattr(own, "set_epoch", None)):
                own.set_epoch(self._passes)
        self._source, self.position = iter(self.batches), 0
        self._passes += 1

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Processes with the same loader draw its random numbers alike, whatever noise of their own they draw in between."""
        if self._draws is None:
            yield
            return
        own = torch.get_rng_state()
        torch.set_rng_state(self._draws)
        try:
            yield
        finally:
            self._draws = torch.get_rng_state()
            torch.set_rng_state(own)

    def state(self) -> dict[str, Any]:
        """What the order of later passes depends on, besides torch's own generator."""
        return {"passes": self._passes, "draws": self._draws, "generators": [g.get_state() for g in _generators(self.batches)]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, with a new pass."""
        self.restart()
        self._passes, self._draws = state["passes"], state["draws"]
        for generator, value in zip(_generators(self.batches), state["generators"], strict=False):
            generator.set_state(value)


def _parts(batches: Any) -> list[Any]:
    """A loader and its samplers."""
    sampler, batch_sampler = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    found = [batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    return [p for i, p in enumerate(found) if p is not None and not any(p is q for q in found[:i])]


def _generators(batches: Any) -> list[torch.Generator]:
    """Generators of their own that a loader and its samplers draw from."""
    found = [getattr(p, "generator", None) for p in _parts(batches)]
    return [g for i, g in enumerate(found) if isinstance(g, torch.Generator) and not any(g is h for h in found[:i])]


def is_sharded(batches: Any) -> bool:
    """Whether a loader says that it gives one process its share: torch's DistributedSampler, or what Accelerate puts in its place."""
    owners = [*_parts(batches), getattr(batches, "dataset", None), getattr(batches, "state", None)]
    return any(_processes(own, key) > 1 for own in owners for key in ("num_replicas", "num_processes"))


def _processes(owner: Any, key: str) -> int:
    value = getattr(owner, key, 1)
    return value if isinstance(value, int) else 1


def _batch_size(batch: Any) -> int:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Sized):
        raise MiracleError(f"cannot count the examples of a batch whose inputs are {type(first).__name__}: pass num_examples")
    return len(first)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to(v, device) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_to(v, device) for v in value)
    if type(value) is dict:
        return {key: _to(v, device) for key, v in value.items()}
    if isinstance(value, Mapping) and hasattr(value, "to"):  # as tokenizers give
        return value.to(device)
    return value


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
        value, extra = loss(model(batch[0]), batch[1]), None
        if not (isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad):
            raise MiracleError("loss(outputs, targets) must return a scalar tensor that depends on the outputs: do not detach them")
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
    optimizer.step()
    if not math.isfinite(measured):
        raise MiracleError(f"the loss became {measured}: lower the learning rate, or check the data for NaN")
    return measured, dict(zip(held, kl_nats.detach().tolist(), strict=True))


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
    links = conversion(model).links
    device = next(model.parameters()).device
    progress = progress and distributed.rank() == 0
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
            checkpoints.restore_model(model, saved["model"])
        elif budget_bytes is not None and narrow and links:
            target = weights_per_bit * 8 * budget_bytes
            _narrow(model, feed, loss, target, max(1, round(narrow_epochs * per_epoch)), learning_rate / 4, progress)
        with_names = carries_names(names, model, None if budget_bytes is None else 8.0 * budget_bytes)
        side = side_bits(skeleton(model, coder=coder, seed=0, names=with_names)) if saved is None else saved["side"]
        goal = None if budget_bytes is None else index_budget_bits(budget_bytes, side)
        if attention is not None:
            attention.attach(model, feed.next()[0])
            feed.restart()
            distributed.synchronise(attention.parameters())
        report = FitReport(budget_bytes, feed.num_examples, steps=max(1, round(epochs * per_epoch)))
        gain = max(SLOW_GAIN, 30.0 / report.steps)  # a short run must be able to cross four decades of beta, too
        response = 0.0 if gain == SLOW_GAIN else SHORT_RUN_RESPONSE  # and so coarse an integral needs damping
        if attention is not None:
            gain = max(gain, RARE_GAIN)
        steering = Steering(beta if goal is None else FIRST_BETA, gain=gain, response=response)
        course = _Course(model, feed, loss, coder, block_bits, steering, learning_rate, goal, report.steps,
                         drop=narrow and attention is None, attention=attention)  # fmt: skip
        if saved is not None:
            course.restore(saved["course"])
            checkpoints.restore_generators(saved["generators"][distributed.rank()], device)
            report.history, started = saved["history"], started - saved["seconds"]
        bar = tqdm(total=report.steps, initial=course.step, disable=not progress, file=sys.stderr, desc="fit", unit="step")
        while course.step < report.steps:
            row = course.advance()
            bar.update()
            if row["step"] % LOG_EVERY == 0 or row["step"] == report.steps - 1:
                row["predicted_bytes"] = (side + row.pop("predicted_bits")) / 8
                report.history.append(row)
                bar.set_postfix_str(f"loss {row['loss']:.4f}, beta {row['beta']:.3g}, {row['predicted_bytes']:,.0f} bytes")
                if callback is not None:
                    callback(row)
            if checkpoint is not None and (feed.position == per_epoch or course.step == report.steps):
                feed.end_pass()
                content = {
                    "stage": "fit", "settings": settings, "side": side, "model": checkpoints.model_state(model),
                    "course": course.state(), "generators": distributed.gather(checkpoints.generator_state(device)),
                    "history": report.history, "seconds": time.monotonic() - started,
                }  # fmt: skip
                checkpoints.write(Path(checkpoint), content)
        bar.close()
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


class _Course:
    """The loop of `fit`, one step at a time: schedule of the learning rate, descent of the size, steering of beta."""

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
        drop: bool,
        attention: BayesianAttention | None = None,
    ):
        self.attention = attention
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

    def advance(self) -> dict[str, float]:
        """One step; returns its row of the history, `predicted_bits` being those of the codewords."""
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
        return {
            "step": step, "loss": self.running, "beta": self.steering.beta, "kl_bits": self.kl_nats / NATS_PER_BIT,
            "predicted_bits": predicted, "learning_rate": self.optimizer.param_groups[0]["lr"],
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Everything but the posteriors and torch's generators; between two passes."""
        return {
            "step": self.step, "running": self.running, "bits_per_nat": self.bits_per_nat, "first": self.first,
            "beta": self.steering.beta, "next_beta": self.beta, "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "feed": self.feed.state(), "kl_nats": self.kl_nats,
            "attention": None if self.attention is None else self.attention.state_dict(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.step, self.running, self.bits_per_nat = state["step"], state["running"], state["bits_per_nat"]
        self.first, self.steering.beta, self.beta = state["first"], state["beta"], state["next_beta"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.kl_nats = state["kl_nats"]
        if self.attention is not None:
            self.attention.load_state_dict(state["attention"])
        self.feed.restore(state["feed"])


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from torch's generator as if seeded, and leave it afterwards as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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
                value = loss(model(x), y)
                value.backward()
                distributed.mean_gradients(optimizer)
                for link in links:
                    relevance[link] = relevance.get(link, 0.0) + _unit_gradient(model, link).square()  # type: ignore[operator]
                optimizer.step()
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
