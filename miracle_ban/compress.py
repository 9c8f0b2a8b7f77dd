"""The whole of it in one call: a trained network becomes an archive, by what its user can give.

Leans on `encode`, `rescale`, `harden`, `train` and `reconstruct`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint as checkpoints
from . import coders
from .ban import BayesianAttention
from .bits import parse_bytes
from .container import Archive, parse
from .convert import as_module, convert
from .encode import encode
from .errors import CodingError, MiracleWarning
from .harden import harden, has_norms
from .inputs import batches_of, made_for
from .layers import posteriors
from .load import bind
from .network import copied, tensors, unwrapped
from .plan import carries_names, check_seed, side_bits, skeleton
from .reconstruct import Reconstruction
from .rescale import rescale
from .train import BLOCK_BITS, Loss, fit, index_budget_bits, seeded

STAGES = ("fit", "harden", "encode", "packaged", "rescale")  # endings of their checkpoints' names
_BITS_TO_HARDEN = 0.02  # a weight; a VGG-16 in 45,000 bytes has 0.024
_BYTES_TO_HARDEN = 4_000  # by hand, between 784, where posteriors were better, and the smallest file of a ResNet-20, 25,000
_EPOCHS_TO_HARDEN = 5.0  # by hand: of 100 steps; 4 brought a small network most of the way that 24 did, 2 did not
# by hand: a VGG-16 at 0.02 bits a weight gained half a point by it and a ResNet-20 at 0.73 a third, ResNet-20s at one nothing
_BITS_NOT_TO_RESCALE = 0.75  # a weight
_RESCALING = 0.01  # epochs of it, for each of hardening; one at least


@torch.enable_grad()
def compress(
    net: nn.Module | Mapping[str, torch.Tensor],
    batches: Iterable | None = None,
    loss: Loss | None = None,
    *,
    budget: str | int,
    epochs: float = 30.0,
    coder: str | coders.Coder = "trellis",
    seed: int = 0,
    inputs: Any = None,
    context: Any = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    per_unit: bool = False,
    hardened: bool | None = None,
    noise: Mapping[str, torch.Tensor] | None = None,
    checkpoint: str | Path | None = None,
    fit_options: dict[str, Any] | None = None,
    encode_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Archive:
    """Convert + fit + encode: a trained network becomes an archive of at most `budget`.

    Without `batches` nothing is trained: the noise that the budget asks for is shared out over the weights as they are, and each
    layer is made to repair what the coding of those before it did (`reconstruct`). With `batches`, networks with BatchNorms are trained
    under the noise of the code (`harden`) and packaged so, and below three quarters of a bit a weight the sizes of their units are trained
    last of all (`rescale`); of others posteriors are trained and then packaged (`fit`, `encode`).

    Args:
        net: a trained network, or its state dict alone (then nothing can be measured, and errors are far larger); left alone.
        batches: iterable of (inputs, targets): the training set; None if there is none. Inputs that are a mapping of names of arguments
            go in by keywords; a batch that is a mapping is inputs and targets at once.
        loss: `loss(outputs, targets)` -> mean negative log-likelihood of the batch, nats.
        budget: size of the whole file, bytes or text such as "20 kB".
        epochs: passes over `batches`, in `fit` or `harden`.
        coder: as in `encode`; the default is the one that makes the best network for its bytes (see the README).
        seed: as in `encode`.
        inputs: what layers are measured on, unless posteriors are trained: a tensor of examples, a mapping of such tensors, or an iterable
            of batches (labels are ignored), 1,024 examples at most are used; default `batches`, or made up to fit the network's
            BatchNorms (`inputs`).
        context: with `batches`: inputs of the context that the file is for, as in `encode`; trains with attention, on random sets
            of the classes unless `fit_options` gives an `attention`. For several packages of one training, call `fit` and `encode`.
        where, per_unit: as in `convert`.
        hardened: with `batches`: train the network under the noise that its code is going to bring (`harden`) and package what comes of
            it, instead of training posteriors and packaging them. It is trained anew at a large rate; default if it has BatchNorms,
            there are five epochs or more, 4,000 bytes and a fiftieth of a bit for each weight, the coder is the trellis and neither
            `context` nor `fit_options` are given.
        noise: without `batches`, of a network that `harden` trained: what it says under "noise".
        checkpoint: where the state is kept; interrupted work resumes from "<checkpoint>.fit", ".harden", ".encode",
            ".packaged" and ".rescale".
        fit_options, encode_options: further keyword arguments of `fit` and `encode`.
        progress: show progress bars on stderr.

    Returns:
        The archive; `archive.info["fit"]` is the `FitReport` as a dictionary, `archive.info["harden"]` and `archive.info["rescale"]`
        what those say.

    Raises:
        MiracleError: see `convert`, `fit` and `encode`.

    Example:
        >>> archive = compress(net, loader, F.cross_entropy, budget="1.5 kB")  # doctest: +SKIP
    """
    check_seed(seed)
    if not isinstance(net, nn.Module):
        if batches is not None or inputs is not None:
            raise CodingError("a state dict cannot be run on data: give the network itself")
        net = as_module(net)
        named = (encode_options or {}).get("names")
        encode_options = {**(encode_options or {}), "names": True if named is None else named}
    net = unwrapped(net)
    if batches is None or loss is None:
        if batches is not None or loss is not None:
            raise CodingError("batches and loss come together: compress(net, loader, F.cross_entropy, budget=...), or neither")
        if context is not None:
            raise CodingError("context needs a training set: compress(net, loader, loss, context=inputs, budget=...)")
        if hardened:
            raise CodingError("hardening needs a training set: compress(net, loader, loss, hardened=True, budget=...)")
        measured = _measured_on(net, inputs, seed, progress)
        packaging = _Packaging(budget, coder, seed, measured, where, progress, encode_options or {})
        return packaging.package(net, _stages(checkpoint)["encode"], noise)
    if noise is not None:
        raise CodingError(
            "noise is of a network that is hardened already: compress(net, inputs=..., noise=..., budget=...), without batches"
        )
    if _hardens(net, budget, epochs, coder, context, fit_options, hardened):
        measured = _measured_on(net, batches if inputs is None else inputs, seed, progress)
        packaging = _Packaging(budget, coder, seed, measured, where, progress, encode_options or {})
        return _harden_and_package(packaging, net, batches, loss, epochs, _stages(checkpoint))
    model = convert(net, where=where, per_unit=per_unit)
    stage = _stages(checkpoint)
    common: dict[str, Any] = {"coder": coder, "seed": seed, "progress": progress}
    fit_options, encode_options = dict(fit_options or {}), dict(encode_options or {})
    fit_options.setdefault("names", encode_options.get("names"))
    if context is not None:
        with seeded(seed, next(net.parameters()).device):
            fit_options.setdefault("attention", BayesianAttention(net))
        encode_options |= {"context": context, "budget": budget}
    report = fit(model, batches, loss, budget=budget, epochs=epochs, checkpoint=stage["fit"], **common, **fit_options)
    own = batches if context is None else None  # for a context the weights are refined on its inputs
    archive = encode(model, own, loss if context is None else None, checkpoint=stage["encode"], **common, **encode_options)
    archive.info["fit"] = report.as_dict()
    _forget(stage, "fit")
    return archive


def _stages(checkpoint: str | Path | None) -> dict[str, Path | None]:
    """The file that each stage keeps its state in."""
    return {stage: None if checkpoint is None else Path(f"{checkpoint}.{stage}") for stage in STAGES}


def _measured_on(net: nn.Module, inputs: Any, seed: int, progress: bool) -> list[Any]:
    """Batches that layers are measured on; made up where the user gives none."""
    with _full_precision(net), seeded(seed, torch.device("cpu")):  # a loader may shuffle
        found = made_for(net, seed=seed, progress=progress) if inputs is None else batches_of(inputs)
    if not found and type(net) is not nn.Module:
        text = "no random input fits this network: give `inputs`, a batch, so that layers can be measured and corrected"
        warnings.warn(text, MiracleWarning, stacklevel=4)
    return found


@dataclass(frozen=True)
class _Packaging:
    """How a network is packaged without training; the fields but `batches` are arguments of `compress`."""

    budget: str | int
    coder: str | coders.Coder
    seed: int
    batches: list[Any]  # what layers are measured on
    where: Callable[[str, nn.Module], bool] | None
    progress: bool
    options: dict[str, Any]  # of `encode`

    def package(self, net: nn.Module, checkpoint: Path | None, noise: Mapping[str, torch.Tensor] | None = None) -> Archive:
        """The archive of a network as it is; `noise` that it was hardened with."""
        with _full_precision(net):
            model, coder, reconstruction = self.plan(net, noise)
            options = {"checkpoint": checkpoint, "progress": self.progress, **self.options}
            if isinstance(coder, coders.Trellis):
                options["reconstruction"] = reconstruction
            return encode(model, coder=coder, seed=self.seed, budget=self.budget, **options)

    def plan(
        self, net: nn.Module, noise: Mapping[str, torch.Tensor] | None = None, *, rehearsed: bool = True
    ) -> tuple[nn.Module, coders.Coder, Reconstruction]:
        """The converted network with posteriors for the budget, the coder and what the posteriors come from."""
        model = convert(net, where=self.where, per_unit=True)
        budget_bits = 8.0 * parse_bytes(self.budget)
        coder = coders.get(self.coder) if isinstance(self.coder, str) else self.coder
        coder = coder.settled(BLOCK_BITS, budget_bits)
        names = carries_names(self.options.get("names"), model, budget_bits)
        side = side_bits(skeleton(model, coder=coder, seed=self.seed, names=names))
        goal = index_budget_bits(parse_bytes(self.budget), side)
        reconstruction = Reconstruction(model, self.batches, noise)
        kl_bits, memory = goal * BLOCK_BITS / coder.predict_bits(BLOCK_BITS), BLOCK_BITS
        if isinstance(coder, coders.Trellis):
            memory = float(coder.memory or BLOCK_BITS)
        else:
            rehearsed = False  # it codes the posteriors as they are now
        reconstruction.plan(kl_bits, memory=memory, seed=self.seed, rehearsed=rehearsed)
        return model, coder, reconstruction


@contextlib.contextmanager
def _full_precision(net: nn.Module) -> Iterator[None]:
    """Within, no autocast: least squares want float32, whatever precision the caller trains in."""
    kinds = {t.device.type for t in tensors(net).values()} | {"cpu"}
    with contextlib.ExitStack() as stack:
        for kind in sorted(kinds - {"meta"}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _hardens(
    net: nn.Module,
    budget: str | int,
    epochs: float,
    coder: str | coders.Coder,
    context: Any,
    fit_options: dict[str, Any] | None,
    wanted: bool | None,
) -> bool:
    """`hardened`, or whether that suits the network, there is enough of everything, and nothing is asked for that only `fit` can do."""
    name = coder if isinstance(coder, str) else coder.name
    others = [k for k, given in (("context", context is not None), ("fit_options", bool(fit_options))) if given]
    if wanted and name != "trellis":
        raise CodingError(f"hardening needs the trellis coder, not {name!r}")
    if wanted and others:
        raise CodingError(f"hardened=True does not go with {' and '.join(others)}")
    if wanted is not None:
        return wanted
    enough = parse_bytes(budget) >= _BYTES_TO_HARDEN and _bits_a_weight(budget, net) >= _BITS_TO_HARDEN
    return has_norms(net) and epochs >= _EPOCHS_TO_HARDEN and enough and name == "trellis" and not others


def _bits_a_weight(budget: str | int, net: nn.Module) -> float:
    return 8.0 * parse_bytes(budget) / max(sum(p.numel() for p in net.parameters()), 1)


def _harden_and_package(
    packaging: _Packaging, net: nn.Module, batches: Iterable, loss: Loss, epochs: float, stages: dict[str, Path | None]
) -> Archive:
    """`compress` by packaging what was trained for it."""
    with _full_precision(net):
        model, _, plan = packaging.plan(net, rehearsed=False)
    bits = {name: v for name, v in plan.kl_bits.items() if posteriors(model)[name].mean.dim() > 1}
    net, course = harden(
        net,
        batches,
        loss,
        bits=sum(bits.values()),
        names=bits,
        epochs=epochs,
        seed=packaging.seed,
        checkpoint=stages["harden"],
        progress=packaging.progress,
    )
    packaged = _packaged(packaging, net, stages, course.pop("noise"))
    archive = packaged
    if _bits_a_weight(packaging.budget, net) < _BITS_NOT_TO_RESCALE:
        archive = rescale(
            packaged,
            net,
            batches,
            None if _gives_a_tensor(net, packaging.batches) else loss,
            budget=packaging.budget,
            epochs=max(1.0, _RESCALING * epochs),
            seed=packaging.seed,
            checkpoint=stages["rescale"],
            progress=packaging.progress,
        )
    archive.info = {**packaged.info, **archive.info, "harden": course}
    _forget(stages, "harden", "encode", "packaged", "rescale")
    return archive


def _packaged(packaging: _Packaging, net: nn.Module, stages: dict[str, Path | None], noise: Mapping[str, torch.Tensor]) -> Archive:
    """`_Packaging.package`, kept in a file of its own for what comes after."""
    file = stages["packaged"]
    if file is None:
        return packaging.package(net, None, noise)
    settings = {"budget_bytes": parse_bytes(packaging.budget), "seed": packaging.seed, "names": packaging.options.get("names")}
    saved = checkpoints.read(file, stage="packaged", expected=settings)
    if saved is None:
        packaged = packaging.package(net, stages["encode"], noise)
        whole = torch.frombuffer(bytearray(packaged.to_bytes()), dtype=torch.uint8)
        checkpoints.write(file, {"stage": "packaged", "settings": settings, "archive": whole, "info": packaged.info})
        return packaged
    packaged = bind(parse(saved["archive"].numpy().tobytes()), net)
    packaged.info = saved["info"]
    return packaged


@torch.no_grad()
def _gives_a_tensor(net: nn.Module, inputs: list[Any]) -> bool:
    """Whether the outputs are one tensor, which another network can imitate."""
    return bool(inputs) and isinstance(copied(net).eval()(inputs[0]), torch.Tensor)


def _forget(stages: dict[str, Path | None], *done: str) -> None:
    """Remove the checkpoints of stages that are over."""
    for path in filter(None, (stages[k] for k in done)):
        checkpoints.remove(path)
