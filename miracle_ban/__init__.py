"""Neural networks made tiny on disk: Bayesian layers, beta-ELBO training, relative entropy coding.

The pipeline, and where each step lives:

    model --convert--> Bayesian model --fit (beta-ELBO, budget)--> posteriors
    --encode (blocks, greedy Poisson rejection sampling)--> Archive --save--> file.mban
    --load--> the same nn.Module with ordinary weights
"""

from .ban import BayesianAttention
from .convert import convert
from .decode import decode, load, open, save
from .encode import compress, encode
from .errors import MiracleError
from .layers import kl
from .train import FitReport, fit

__version__ = "0.1.0"
__all__ = [
    "BayesianAttention", "FitReport", "MiracleError", "__version__", "compress", "convert", "decode", "encode", "fit", "kl", "load", "open",
    "save",
]  # fmt: skip
