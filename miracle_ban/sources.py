"""What a user names on the command line: a network, its trained weights, the data.

Every fault that a user can make here ends in a `MiracleError` that says what was found and what is wanted.
Leans on `feed`, `load` and `network`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MiracleError
from .feed import pair
from .load import restore
from .network import call, evaluating, main_output

Loss = Callable[[Any, Any], Tensor]
_WRAPPED_KEYS = ("state_dict", "model_state_dict", "model")
_COMPARED_BATCHES = 20


def load_model(spec: str) -> nn.Module:
    """The network that `spec` names: `package.module:factory`, `path/to/file.py:factory` or `torchvision:NAME`.

    Raises:
        MiracleError: it cannot be imported, or gives something else than an `nn.Module`.
    """
    source, _, name = spec.rpartition(":")
    if source == "torchvision":
        return _torchvision_model(name)
    model = _call(spec)
    if not isinstance(model, nn.Module):
        raise MiracleError(f"{spec} gave {_kind(model)}, not an nn.Module")
    return model


def _torchvision_model(name: str) -> nn.Module:
    from torchvision.models import get_model, get_model_builder, list_models

    if name not in list_models():
        raise MiracleError(f"torchvision has no model {name!r}; it has {', '.join(list_models()[:8])} ...")
    unweighted = [p for p in ("weights", "weights_backbone") if p in inspect.signature(get_model_builder(name)).parameters]
    return get_model(name, **dict.fromkeys(unweighted))


def load_data(spec: str) -> tuple[Iterable, Loss]:
    """The batches and the loss that `spec` names: `package.module:loader` or `path/to/file.py:loader`.

    Raises:
        MiracleError: it cannot be imported, or gives something that cannot be iterated.
    """
    data = _call(spec)
    if isinstance(data, (tuple, list)) and len(data) == 2 and callable(data[1]) and not isinstance(data[1], Tensor):
        batches, loss = data
    else:
        batches, loss = data, F.cross_entropy
    if not isinstance(batches, Iterable):
        raise MiracleError(f"{spec} gave {_kind(batches)}: batches of (inputs, targets) are needed, or a pair (batches, loss)")
    return batches, loss


def load_inputs(spec: str) -> Any:
    """The inputs that `spec` names: what it gives is a tensor of examples, or batches; a network is tried on them later.

    Raises:
        MiracleError: it cannot be imported, or gives neither.
    """
    given = _call(spec)
    if not isinstance(given, Iterable):
        raise MiracleError(f"{spec} gave {_kind(given)}: a tensor of examples or an iterable of batches is needed")
    return given


@torch.no_grad()
def compare(net: nn.Module, other: nn.Module, batches: Iterable, loss: Loss | None) -> dict[str, float]:
    """How far `other` is from `net` on the first batches: relative error of the outputs; agreement and errors of class scores,
    percent; the loss of both, if there is one.
    """
    found: dict[str, list[float]] = {}
    for module in (net, other):
        module.eval()
    for batch in itertools.islice(batches, _COMPARED_BATCHES):
        x, y = pair(batch) if loss is not None else (batch, None)
        values = [call(module, x) for module in (net, other)]
        if loss is not None:
            for name, value in zip(("loss_before", "loss_after"), values, strict=True):
                found.setdefault(name, []).append(float(loss(value, y)))
        a, b = map(main_output, values)
        if a is not None and b is not None:
            found.setdefault("relative_error", []).append(float((a - b).square().sum() / a.square().sum().clamp_min(1e-30)) ** 0.5)
            if a.dim() == 2 and a.shape[1] > 1:
                tops = [v.argmax(1) for v in (a, b)]
                found.setdefault("agreement", []).append(100.0 * float((tops[0] == tops[1]).float().mean()))
                if isinstance(y, Tensor) and y.shape == tops[0].shape and not y.is_floating_point():
                    for name, top in zip(("error_before", "error_after"), tops, strict=True):
                        found.setdefault(name, []).append(100.0 * float((top != y).float().mean()))
    return {name: sum(v) / len(v) for name, v in found.items()}


@torch.no_grad()
def try_batch(net: nn.Module, batches: Iterable, loss: Loss, spec: str) -> None:
    """Put one batch through the network and the loss, so that what does not fit is said before any work.

    Raises:
        MiracleError: there is no batch, or it does not fit.
    """
    if isinstance(batches, Iterator):
        raise MiracleError(f"{spec} gave an iterator, which can be passed over only once: give a DataLoader or a list")
    try:
        batch = next(iter(batches), None)
    except Exception as error:
        raise MiracleError(f"{spec} failed at the first batch: {type(error).__name__}: {error}") from error
    try:
        inputs, targets = pair(batch)
    except MiracleError as error:
        raise MiracleError(f"the first batch of {spec} is {_kind(batch)}; {error}") from error
    try:
        with evaluating(net):
            value = loss(call(net, inputs), targets)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise MiracleError(f"the first batch of {spec} does not go through {type(net).__name__} and the loss: {told}") from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value)):
        raise MiracleError(f"the loss of the first batch of {spec} must be one finite number, not {str(value)[:80]}")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _call(spec: str) -> Any:
    """What the thing named by `module:attribute` gives when it is called; a network named so is taken as it is."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise MiracleError(f"cannot read {spec!r}: write package.module:name or path/to/file.py:name")
    found = _import(source)
    for part in name.split("."):
        if not hasattr(found, part):
            own = [n for n, v in getattr(found, "__dict__", {}).items() if getattr(v, "__module__", 0) == getattr(found, "__name__", 1)]
            raise MiracleError(f"{source} has no {name!r}; it defines {', '.join(own[:12]) or 'nothing that can be called'}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise MiracleError(f"{spec} is {_kind(found)}, which cannot be called")
    try:
        return found()
    except Exception as error:
        raise MiracleError(f"calling {spec} without arguments failed: {type(error).__name__}: {error}") from error


def _import(source: str) -> Any:
    try:
        if source.endswith(".py"):
            return _import_file(Path(source))
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(source)
    except MiracleError:
        raise
    except (Exception, SystemExit) as error:
        raise MiracleError(f"cannot import {source}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise MiracleError(f"there is no file {path}")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = f"_miracle_ban_user_{abs(hash(path)):x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a torch file that holds one (alone or under "state_dict" or "model").

    Raises:
        MiracleError: the file holds something else.
        OSError: the file cannot be read.
    """
    with path.open("rb"):  # for the same message whatever the format
        pass
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split(". ")[0].split())[:200]
        raise MiracleError(f"{path} cannot be read as weights: {reason}; save them with torch.save(model.state_dict(), path)") from error
    for key in _WRAPPED_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        inside = f"a dictionary of {', '.join(map(str, list(content)[:6]))}" if isinstance(content, dict) else _kind(content)
        raise MiracleError(f"{path} holds no state dict but {inside}")
    return content


def load_into(model: nn.Module, weights: dict[str, Tensor], where: str) -> nn.Module:
    """Put a checkpoint's weights into `model`; each must be there in its shape, once for tied weights.

    Raises:
        MiracleError: names or shapes differ.
    """
    own = model.state_dict(keep_vars=True)
    given = {id(own[name]) for name in weights if name in own}
    problems = {
        "missing": [n for n in own if n not in weights and id(own[n]) not in given],
        "unexpected": [n for n in weights if n not in own],
        "of another shape": [
            f"{n} {list(t.shape)}, the model has {list(own[n].shape)}" for n, t in weights.items() if n in own and own[n].shape != t.shape
        ],
    }
    said = [f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" for what, names in problems.items() if names]
    if said:
        raise MiracleError(f"{where} does not fit {type(model).__name__}: {'; '.join(said)}")
    restore(model, weights, strict=False)
    return model
