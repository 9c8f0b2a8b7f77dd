"""Neural networks made tiny on disk: Bayesian layers, beta-ELBO training, relative entropy coding.

The pipeline, and where each step lives:

    model --convert--> Bayesian model --fit (beta-ELBO, budget)--> posteriors
    --encode (blocks, greedy Poisson rejection sampling)--> Archive --save--> file.mban
    --load--> the same nn.Module with ordinary weights

Each module is imported when a name of it is first asked for: importing the package takes no time, and reading files takes
no PyTorch.
"""

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ban import BayesianAttention
    from .compress import compress
    from .convert import convert
    from .decode import decode_array, decode_arrays, open, save
    from .encode import encode
    from .errors import MiracleError
    from .harden import harden
    from .hub import fetch, load_pretrained
    from .layers import kl
    from .load import decode, load
    from .penalty import Penalty
    from .rescale import rescale
    from .train import FitReport, fit
    from .unfold import unfold

__version__ = "0.1.0"
__all__ = [
    "BayesianAttention", "FitReport", "MiracleError", "Penalty", "__version__", "compress", "convert", "decode", "decode_array",
    "decode_arrays", "encode", "fetch", "fit", "harden", "kl", "load", "load_pretrained", "open", "rescale", "save", "unfold",
]  # fmt: skip

_NAMES = {
    "ban": ["BayesianAttention"],
    "compress": ["compress"],
    "convert": ["convert"],
    "decode": ["decode_array", "decode_arrays", "open", "save"],
    "encode": ["encode"],
    "errors": ["MiracleError"],
    "harden": ["harden"],
    "hub": ["fetch", "load_pretrained"],
    "layers": ["kl"],
    "load": ["decode", "load"],
    "penalty": ["Penalty"],
    "rescale": ["rescale"],
    "train": ["FitReport", "fit"],
    "unfold": ["unfold"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


class _Package(types.ModuleType):
    """A public function keeps its name: a module of the same name, once imported, would take its place here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # else every name would seem to be there

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
