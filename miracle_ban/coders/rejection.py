"""Rejection sampling as a code: send the number of the first candidate with u_k <= r(Z_k) / r_max.

Exact, and the index is geometric with mean r_max = 2^(D_inf bits): only for blocks whose D_inf is small, which for many weak
weights it is not (D_inf is the KL plus half a nat for each weight).
"""

from __future__ import annotations

import numpy as np
import torch

from ..bits import NATS_PER_BIT
from ..errors import CodingError
from ..gaussian import Blocks
from .base import Codewords, Looked, Scorer
from .octave import OctaveCoder, Search

_SURE = 64.0  # the search may go on for this many times the mean index: it fails with probability exp(-64)


class Rejection(OctaveCoder):
    """Rejection sampling, the baseline that GPRS improves on.

    Args:
        max_log2_candidates: blocks whose D_inf is more bits than this less 6 are refused.
        private_seed: of the acceptance variables.
    """

    name = "rejection"

    def __init__(self, *, max_log2_candidates: int = 26, private_seed: int = 0):
        super().__init__(extra_bits=0.0, max_log2_candidates=max_log2_candidates, private_seed=private_seed)

    def _search_limits(self, blocks: Blocks) -> np.ndarray:
        peak = blocks.max_log_ratio().numpy()
        most = (self.max_log2_candidates - np.log2(_SURE)) * NATS_PER_BIT
        if (peak > most).any():
            worst = float(peak.max()) / NATS_PER_BIT
            raise CodingError(
                f"rejection sampling would take 2^{worst:.0f} candidates for a block (D_inf; 2^{most / NATS_PER_BIT:.0f} is the most): "
                "use smaller blocks, posteriors narrower than the prior, or the coder 'gprs'"
            )
        return np.maximum(np.ceil(_SURE * np.exp(peak)), 16.0).astype(np.int64)

    def _encode(self, scorer: Scorer) -> Codewords:
        peak = scorer.blocks.max_log_ratio().numpy()
        search = Search(scorer, self._search_limits(scorer.blocks))
        rng = self._generator(scorer.codebook.seed, scorer.tensor, int(scorer.numbers[0]))
        for part in search.parts():
            log_u = torch.from_numpy(-rng.standard_exponential(tuple(part.score.shape), dtype=np.float32))
            if self.trail is not None:
                number, row = np.indices(log_u.shape).reshape(2, -1)
                height = np.exp(log_u.numpy() + peak[part.rows][None, :])
                self._look(Looked(part.rows[row], part.start + number + 1, height.ravel(), part.score.numpy().ravel().copy()))
            part.score -= log_u
            part.top = part.score.amax(0).double().numpy()
            search.accept_first(part, peak[part.rows])
            taken = search.found[part.rows]
            search.value[part.rows[taken]] += log_u[
                search.index[part.rows[taken]] - 1 - part.start, torch.from_numpy(np.flatnonzero(taken))
            ].numpy()
        return search.codewords()

    def _limits_for_prediction(self, blocks: Blocks) -> np.ndarray:
        return self._search_limits(blocks)

    def _survival(self, blocks: Blocks, log_candidates: np.ndarray) -> np.ndarray:
        """K is geometric with success probability exp(-D_inf)."""
        miss = np.log1p(-np.minimum(np.exp(-blocks.max_log_ratio().numpy()), 1.0 - 1e-12))
        return np.exp((np.exp(log_candidates)[None, :] - 1.0) * miss[:, None])
