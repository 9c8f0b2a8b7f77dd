"""The codec of `inr_image`: what all images share. In goes v, out come images. See `inr_image` for what is random and what is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

TILE, CELLS, BANDS = 32, 8, 4  # pixels of a tile, places of a band in it, bands, on each axis
GROUPS = (3, 2, 7, 5, 7)  # bands and colours that are reparametrised together, coarsest first
LEAD = 48  # principal directions of the first group that the others of it, and the sine network, depend on
HIDDEN, ENCODING, SINES = 96, 16, 32
RATES = (400.0, 790.0, 1250.0, 1740.0)  # KL of a tile, bits, that the codec is learned for
WEIGHTS = sum(GROUPS) * CELLS**2  # coded for each tile
CODEC = Path(__file__).parent.parent / "pretrained" / "inr-codec.npz"
PARTS = ("matrix", "context", "encodings", "sine")  # that the codec can do without


def cosines(n: int) -> Tensor:
    """The orthonormal cosine features of n pixels, `[n, n]`, one a row."""
    k = torch.arange(n)[:, None]
    rows = torch.cos(math.pi * (torch.arange(n) + 0.5) * k / n) * math.sqrt(2 / n)
    return torch.where(k == 0, rows / math.sqrt(2), rows)


def bands() -> Tensor:
    """Features in bands of `CELLS` frequencies, each band turned so that it has places again: `[BANDS, CELLS, TILE]`, orthonormal."""
    rows = cosines(TILE).view(BANDS, CELLS, TILE)
    rows = torch.stack([r.flip(0) if a % 2 else r for a, r in enumerate(rows)])
    return torch.einsum("fp,afx->apx", cosines(CELLS), rows)


def channels() -> list[tuple[int, int, int]]:
    """(band down, band across, colour) of every channel, in the order of `GROUPS`; colour 0 is brightness. The rest is not coded."""
    fine = [(a, b) for a in range(BANDS) for b in range(BANDS)]
    first = [(0, 0, c) for c in range(3)]
    second = [(0, 1, 0), (1, 0, 0)]
    third = [(1, 1, 0), *((a, b, c) for a, b in ((0, 1), (1, 0), (1, 1)) for c in (1, 2))]
    return first + second + third + [(a, b, 0) for top in (2, 3) for a, b in fine if max(a, b) == top]


Draw = Callable[[int, Tensor, Tensor], Tensor]


class Codec(nn.Module):
    """Everything that all images share.

    Args:
        without: parts of `PARTS` to do without: the coarsest weights are independent ("matrix"), mean and std do not depend on coarser
            weights ("context"), the sine network sees coordinates and the Fourier features' image alone ("encodings"), there is no sine
            network beside the Fourier features ("sine").
    """

    bands: Tensor
    colours: Tensor
    mean: Tensor
    std: Tensor
    lead_mean: Tensor
    reparametrisation: Tensor
    order: Tensor

    def __init__(self, without: Collection[str] = ()) -> None:
        super().__init__()
        self.without = frozenset(without)
        colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
        self.register_buffer("bands", bands(), persistent=False)
        self.register_buffer("colours", colours / colours.norm(dim=1, keepdim=True), persistent=False)
        number, places, first = sum(GROUPS), CELLS**2, GROUPS[0] * CELLS**2
        self.register_buffer("mean", torch.zeros(number))
        self.register_buffer("std", torch.ones(number))
        self.register_buffer("lead_mean", torch.zeros(first))
        self.register_buffer("reparametrisation", torch.eye(first))  # rows: what each v of the first group moves
        self.register_buffer("order", torch.arange(number * places, dtype=torch.int16))  # of v in the file: largest KL first
        self.coarse = nn.Sequential(nn.Linear(LEAD + 1, 256), nn.ReLU(), nn.Linear(256, 2 * (first - LEAD)))
        done = np.cumsum(GROUPS)
        self.context = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(seen + 2, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1), nn.ReLU(),
                nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, 2 * new, 1),
            )
            for seen, new in zip(done, GROUPS[1:], strict=False)
        )  # fmt: skip
        cell = (TILE // CELLS) ** 2
        self.encoding = nn.Sequential(
            nn.Conv2d(number + 2, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1), nn.ReLU(),
            nn.Conv2d(HIDDEN, ENCODING * cell, 1), nn.PixelShuffle(TILE // CELLS), nn.ReLU(),
            nn.Conv2d(ENCODING, ENCODING, 3, padding=1),
        )  # fmt: skip
        inputs = ENCODING + 3 + 12 + 1
        self.sine = nn.Parameter(torch.randn(inputs, SINES) / math.sqrt(inputs))
        self.rgb = nn.Parameter(torch.zeros(SINES + 1, 3))
        self.modulation = nn.Parameter(0.01 * torch.randn(LEAD // 3, inputs * SINES + (SINES + 1) * 3))
        for net in (self.coarse, *self.context):
            nn.init.zeros_(net[-1].weight)
            nn.init.zeros_(net[-1].bias)

    # --- linear parts ---

    def analyse(self, x: Tensor) -> Tensor:
        """Normalised feature weights of images `[n, 3, h, w]`: `[n, channels, h / 4, w / 4]`."""
        n, _, h, w = x.shape
        rows, columns, m = h // TILE, w // TILE, self.bands.flatten(0, 1)
        z = (self.colours @ x.reshape(n, 3, -1)).view(n, 3, rows, TILE, columns, TILE).transpose(3, 4)
        z = (m @ z @ m.T).view(n, 3, rows, columns, BANDS, CELLS, BANDS, CELLS)
        z = torch.stack([z[:, k, :, :, a, :, b] for a, b, k in channels()], 1)
        z = z.transpose(3, 4).reshape(n, -1, rows * CELLS, columns * CELLS)
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def synthesise(self, z: Tensor) -> Tensor:
        """The layer of Fourier features: images of the weights z."""
        n, _, h, w = z.shape
        rows, columns, m = h // CELLS, w // CELLS, self.bands.flatten(0, 1)
        z = (z * self.std[:, None, None] + self.mean[:, None, None]).view(n, -1, rows, CELLS, columns, CELLS).transpose(3, 4)
        full = z.new_zeros(n, BANDS, BANDS, 3, rows, columns, CELLS, CELLS)
        a, b, k = zip(*channels(), strict=True)
        full[:, list(a), list(b), list(k)] = z
        full = full.permute(0, 3, 4, 5, 1, 6, 2, 7).reshape(n, 3, rows, columns, TILE, TILE)
        y = (m.T @ full @ m).transpose(3, 4).reshape(n, 3, -1)
        return (self.colours.T @ y).view(n, 3, rows * TILE, columns * TILE)

    def vectors(self, z: Tensor) -> Tensor:
        """Groups of places as vectors, one a tile: `[n, c, 8 i, 8 j]` -> `[n i j, 64 c]`."""
        n, c, h, w = z.shape
        return z.view(n, c, h // CELLS, CELLS, w // CELLS, CELLS).permute(0, 2, 4, 1, 3, 5).reshape(-1, c * CELLS**2)

    def _spread(self, g: Tensor, n: int, rows: int) -> Tensor:
        """The inverse of `vectors`; `rows` is the number of rows of tiles."""
        g = g.view(n, rows, -1, g.shape[1] // CELLS**2, CELLS, CELLS).permute(0, 3, 1, 4, 2, 5)
        return g.reshape(n, g.shape[1], rows * CELLS, -1)

    # --- from v to the image ---

    def coarse_law(self, lead: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std, in units of their own, of the first group's other directions."""
        mean, log_std = self.coarse(torch.cat([lead, rate[:, None]], 1)).chunk(2, 1)
        if "context" in self.without:
            return 0 * mean, 1 + 0 * mean
        return mean, log_std.clamp(-5, 2.5).exp()

    def context_law(self, group: int, z: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of a group's weights given those of the coarser ones."""
        if "context" in self.without:
            return (zero := z.new_zeros(len(z), GROUPS[group], *z.shape[2:])), zero + 1
        mean, log_std = self.context[group - 1](self._with_rate(z, rate)).chunk(2, 1)
        return mean, log_std.clamp(-5, 2.5).exp()

    def _with_rate(self, z: Tensor, rate: Tensor) -> Tensor:
        return torch.cat([z, rate[:, None, None, None].expand(-1, 1, *z.shape[2:]), torch.ones_like(z[:, :1])], 1)

    def render(self, z: Tensor, lead: Tensor, rate: Tensor) -> Tensor:
        """Images of all weights: Fourier features, and the sine network on coordinates and positional encodings."""
        y = self.synthesise(z)
        if "sine" in self.without:
            return y
        n, _, h, w = y.shape
        encoding = self.encoding(self._with_rate(z, rate))
        if "encodings" in self.without:
            encoding = 0 * encoding
        at = math.pi * (torch.arange(TILE) + 0.5) / TILE
        waves = torch.stack([f(k * at) for k in (1, 2, 4) for f in (torch.sin, torch.cos)])  # [6, TILE]
        grid = torch.cat([waves[:, :, None].expand(-1, -1, TILE), waves[:, None].expand(-1, TILE, -1)])
        grid = grid.repeat(1, h // TILE, w // TILE).expand(n, -1, -1, -1)
        seen = torch.cat([encoding, 2 * y - 1, grid, torch.ones_like(y[:, :1])], 1)
        tiles = seen.view(n, -1, h // TILE, TILE, w // TILE, TILE).permute(0, 2, 4, 3, 5, 1).reshape(len(lead), TILE**2, -1)
        moved = lead[:, : LEAD // 3] @ self.modulation
        sine = self.sine + moved[:, : self.sine.numel()].view(-1, *self.sine.shape)
        rgb = self.rgb + moved[:, self.sine.numel() :].view(-1, *self.rgb.shape)
        out = torch.baddbmm(rgb[:, -1:], torch.sin(tiles @ sine), rgb[:, :-1])
        out = out.view(n, h // TILE, w // TILE, TILE, TILE, 3).permute(0, 5, 1, 3, 2, 4).reshape(n, 3, h, w)
        return y + out

    def unfold(self, rate: Tensor, tiles: tuple[int, int, int], draw: Draw) -> Tensor:
        """Images, `draw(part, mean, std)` giving the v of each part: leading directions, the others, then group by group.

        Args:
            rate: of each image, from `rate_code`.
            tiles: images, rows of tiles, columns of tiles.
            draw: called with the law of w, `[all tiles, k]` for the first two parts, `[images, channels, y, x]` after them.
        """
        n, rows, columns = tiles
        per_tile = rate.repeat_interleave(rows * columns)
        zero = rate.new_zeros(n * rows * columns, LEAD)
        lead = draw(0, zero, zero + 1)
        mean, std = self.coarse_law(lead, per_tile)
        first = self.lead_mean + torch.cat([lead, mean + std * draw(1, mean, std)], 1) @ self.reparametrisation
        z = self._spread(first, n, rows)
        for group in range(1, len(GROUPS)):
            mean, std = self.context_law(group, z, rate)
            z = torch.cat([z, mean + std * draw(group + 1, mean, std)], 1)
        return self.render(z, lead, rate)

    def decode(self, v: Tensor, rate: Tensor) -> Tensor:
        """Images `[n, 3, 32 i, 32 j]` of v `[n, weights of a tile, i, j]`."""
        n, _size, rows, columns = v.shape
        flat = torch.zeros_like(v).index_copy(1, self.order.long(), v)
        parts = flat.split([LEAD, GROUPS[0] * CELLS**2 - LEAD, *(c * CELLS**2 for c in GROUPS[1:])], 1)

        def draw(part: int, mean: Tensor, std: Tensor) -> Tensor:
            own = parts[part].permute(0, 2, 3, 1).reshape(n * rows * columns, -1)
            return own if part < 2 else self._spread(own, n, rows)

        return self.unfold(rate, (n, rows, columns), draw)

    def infer(self, x: Tensor, rate: Tensor, water: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Posteriors of images by the linear parts alone, as if the noise on every pixel had the variance `water` `[n]`.

        Returns:
            Images of a draw, and mean and standard deviation of v, `[n, weights of a tile, i, j]` each.
        """
        n, _, h, w = x.shape
        rows, columns = h // TILE, w // TILE
        z, means, stds = self.analyse(x), [], []
        size = (self.reparametrisation * self.std[: GROUPS[0]].repeat_interleave(CELLS**2)).square().sum(1)
        lead = torch.linalg.solve(self.reparametrisation, self.vectors(z[:, : GROUPS[0]]) - self.lead_mean, left=False)
        by_tile = water.repeat_interleave(rows * columns)[:, None]
        done = [0, LEAD, lead.shape[1]]
        edges = np.cumsum([0, *GROUPS]).tolist()

        def draw(part: int, mean: Tensor, std: Tensor) -> Tensor:
            if part < 2:
                own = slice(done[part], done[part + 1])
                target, precision = lead[:, own], size[own] / by_tile
            else:
                own = slice(edges[part - 1], edges[part])
                target, precision = z[:, own], (self.std[own] ** 2 / water[:, None])[:, :, None, None]
            gain = precision * std.square()
            v_mean, v_std = (target - mean) / std * gain / (1 + gain), (1 + gain).rsqrt().expand_as(target)
            for found, v in ((means, v_mean), (stds, v_std)):
                found.append((v if part < 2 else self.vectors(v)).view(n, rows, columns, -1))
            return v_mean + v_std * torch.randn_like(v_mean)

        image = self.unfold(rate, (n, rows, columns), draw)
        v_mean, v_std = (torch.cat(found, 3).permute(0, 3, 1, 2).index_select(1, self.order.long()) for found in (means, stds))
        return image, v_mean, v_std


def save_codec(codec: Codec, path: Path) -> int:
    """Write the codec, matrices in 7 bits with a scale for each row, and return its size in bytes."""
    arrays = {}
    for name, t in codec.state_dict().items():
        if t.dim() < 2 or t.dtype != torch.float32:
            arrays[name] = t.numpy()
            continue
        scale = t.flatten(1).abs().amax(1).clamp_min(1e-12) / 63
        arrays[name] = (t / scale.view(-1, *[1] * (t.dim() - 1))).round().to(torch.int8).numpy()
        arrays[f"{name} scale"] = scale.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path.stat().st_size


def load_codec(path: Path) -> Codec:
    """The codec of a file of `save_codec`."""
    with np.load(path) as stored:
        found = {name: torch.from_numpy(stored[name]) for name in stored.files}
    scales = {name.removesuffix(" scale"): found.pop(name) for name in list(found) if name.endswith(" scale")}
    for name, scale in scales.items():
        found[name] = found[name].float() * scale.view(-1, *[1] * (found[name].dim() - 1))
    codec = Codec()
    codec.load_state_dict(found)
    return codec.requires_grad_(False)
