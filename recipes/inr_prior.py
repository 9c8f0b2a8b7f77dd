"""The codec of `inr_image`, learned: CIFAR-10's training images, and Kodak images that are not tested on.

    python recipes/inr_prior.py --data ../data

An hour on one core; interrupted, it goes on from WORK. Writes `pretrained/inr-codec.npz` and appends a result line with what the
posteriors of held-out images reach, not coded; `--without` leaves parts out, to see what they are worth. Each step draws images from
their posteriors by the codec's linear parts alone (`Codec.infer`), a Wiener filter under white noise, and lowers the beta-ELBO at
four rates by Adam; the leading directions' mean and std move towards their closed form (coordinate descent, as in COMBINER).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from miracle_ban.bits import NATS_PER_BIT

sys.path.insert(0, str(Path(__file__).parent))
from common import append_result, cifar10, command_line, data_root, kodak
from inr_codec import CELLS, CODEC, GROUPS, LEAD, PARTS, RATES, TILE, WEIGHTS, Codec, cosines, save_codec
from inr_fit import batch, fit_posteriors, kl_bits, kl_each, psnr, rate_code, water_level

SHARES = (0.15, 0.35, 0.15, 0.35)  # how often each of the codec's rates is learned on


@torch.no_grad()
def start(codec: Codec, x: Tensor) -> None:
    """Statistics of the feature weights, and principal directions of the coarsest, of training images."""
    z = codec.analyse(x)
    codec.mean.copy_(z.mean((0, 2, 3)))
    codec.std.copy_(z.std((0, 2, 3)))
    first = codec.vectors(codec.analyse(x)[:, : GROUPS[0]])
    scale = codec.std[: GROUPS[0]].repeat_interleave(CELLS**2)
    covariance = torch.cov((first * scale).T)
    if "matrix" in codec.without:
        waves = torch.block_diag(*[torch.kron(cosines(CELLS), cosines(CELLS))] * GROUPS[0])
        power, order = (waves @ covariance @ waves.T).diagonal().sort()
        directions = waves.T[:, order]
    else:
        power, directions = torch.linalg.eigh(covariance)
    codec.lead_mean.copy_(first.mean(0))
    codec.reparametrisation.copy_((power.clamp_min(1e-9).sqrt() * directions / scale[:, None]).flip(1).T)


@torch.no_grad()
def update_prior(codec: Codec, v_mean: Tensor, v_std: Tensor, rate: float) -> None:
    """Closed form for the leading directions, moved a part of the way: mean of the means, mean of all second moments."""
    places = codec.order.long() < LEAD
    order = codec.order.long()[places].argsort()
    mean, std = (t[:, places][:, order].transpose(0, 1).flatten(1) for t in (v_mean, v_std))
    shift = mean.mean(1)
    scale = (std.square() + (mean - shift[:, None]).square()).mean(1).sqrt()
    codec.lead_mean += rate * shift @ codec.reparametrisation[:LEAD]
    codec.reparametrisation[:LEAD] *= (scale[:, None].log() * rate).exp()


def crops(photos: list[Tensor], side: int, number: int) -> Tensor:
    """Squares at random places of uint8 images `[h, w, 3]`: `[number, 3, side, side]`."""
    found = []
    for k in torch.randint(len(photos), (number,)).tolist():
        top, left = (int(torch.randint(s - side + 1, ())) for s in photos[k].shape[:2])
        found.append(photos[k][top : top + side, left : left + side])
    return batch(torch.stack(found))


def learn(args: argparse.Namespace) -> Codec:
    """Learn the codec, going on from WORK/inr-codec.checkpoint; 500 held-out images of CIFAR-10 are looked at.

    Four steps of five see CIFAR-10's training images, the fifth crops of the Kodak images that are not tested on, of one tile or 2x2.
    """
    torch.manual_seed(args.seed)
    data = cifar10(data_root(args.data))
    images, held_out = data["train"][0], batch(data["validation"][0], torch.arange(min(500, len(data["validation"][0]))))
    photos = [torch.from_numpy(image) for image in kodak(data_root(args.data))["train"]]
    codec = Codec(args.without)
    start(codec, batch(images, torch.arange(min(4000, len(images)))))
    optimizer = torch.optim.Adam(codec.parameters(), args.learning_rate, betas=(0.9, 0.98))
    rates, shares = torch.tensor(RATES), torch.tensor(SHARES)
    state = {"step": 0, "factor": torch.ones(2, len(RATES)), "mean_kl": torch.zeros(WEIGHTS)}
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "inr-codec.checkpoint"
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        codec.load_state_dict(state["codec"])
        optimizer.load_state_dict(state["optimizer"])
        torch.manual_seed(args.seed + state["step"])
    bar = tqdm(total=args.steps, initial=state["step"], desc="prior", unit="step", mininterval=10)
    while state["step"] < args.steps:
        step = state["step"]
        for group in optimizer.param_groups:
            warm, cosine = min(1.0, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
            group["lr"] = args.learning_rate * warm * (0.01 + 0.99 * cosine)
        source, side = (1, 1 + step // 5 % 2) if step % 5 == 4 and photos else (0, 1)
        number = args.batch // side**2
        x = crops(photos, side * TILE, number) if source else batch(images, torch.randint(len(images), (number,)))
        x = x.flip(3) if step % 2 else x
        level = torch.multinomial(shares, number, replacement=True)
        factor = state["factor"][source]
        water = water_level(codec, x, rates[level] * factor[level])
        image, v_mean, v_std = codec.infer(x, rate_code(rates[level]), water)
        bits = kl_bits(v_mean, v_std) / side**2
        loss = (bits * NATS_PER_BIT + (image - x).square().sum((1, 2, 3)) / (2 * water * side**2)).mean() / 1000
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        v_mean, v_std, bits = v_mean.detach(), v_std.detach(), bits.detach()
        update_prior(codec, v_mean, v_std, 0.01)
        for k in level.unique():  # so that each rate's images have its KL, on average
            factor[k] *= (rates[k] / bits[level == k].mean()) ** 0.05
        state["mean_kl"] += 0.02 * (kl_each(v_mean, v_std).mean((0, 2, 3)) - state["mean_kl"])
        state["step"] += 1
        bar.update()
        if state["step"] % 250 == 0 or state["step"] == args.steps:
            for k in (1, 3):
                full = rates[k].expand(len(held_out))
                with torch.no_grad():
                    water = water_level(codec, held_out, full * state["factor"][0, k])
                    image, v_mean, v_std = codec.infer(held_out, rate_code(full), water)
                seen = f"{float(kl_bits(v_mean, v_std).mean()):.0f} bits {float(psnr(image, held_out).mean()):.2f} dB"
                bar.write(f"step {state['step']}: held-out images {seen}", file=sys.stderr)
            state.update(codec=codec.state_dict(), optimizer=optimizer.state_dict())
            torch.save(state, kept)
    bar.close()
    codec.order.copy_(state["mean_kl"].argsort(descending=True).to(torch.int16))
    return codec.requires_grad_(False)


def patches(codec: Codec, x: Tensor, steps: int) -> dict[str, float]:
    """PSNR of images `[n, 3, h, w]` whose tiles see each other and share their bits, and of the same tiles, each by itself."""
    apart = x.unfold(2, TILE, TILE).unfold(3, TILE, TILE).permute(0, 2, 3, 1, 4, 5)
    found = {}
    for bits in RATES[:2]:
        for name, images in (("together", x), ("apart", apart.reshape(-1, 3, TILE, TILE))):
            rate = rate_code(bits).expand(len(images))
            mean, std, _ = fit_posteriors(codec, images, rate, bits, steps)
            error = (codec.decode(mean + std * torch.randn_like(mean), rate).clamp(0, 1) - images).square()
            found[f"{name}_{bits:.0f}"] = float(-10 * error.view(len(x), -1).mean(1).log10().mean())
    return found


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", type=Path, default=CODEC, help="where to write it")
    parser.add_argument("--data", help="folder that holds cifar10/ and kodak/; default $MIRACLE_BAN_DATA, else ./data")
    parser.add_argument("--work", type=Path, default=Path("work"), help="checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=11500)
    parser.add_argument("--batch", type=int, default=64, help="tiles in a step")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--without", nargs="*", default=(), choices=PARTS, help="leave parts of the codec out, to see what they are worth")
    parser.add_argument("--images", type=int, default=32, help="held-out images that are looked at in the end")
    parser.add_argument("--fit-steps", type=int, default=150)
    parser.add_argument("--smoke", action="store_true", help="little work and no result line, for the tests")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.batch, args.images, args.fit_steps = 40, 16, 2, 20
    started = time.monotonic()
    codec = learn(args)
    line = {"task": "prior", "without": sorted(args.without), "steps": args.steps, "batch": args.batch, "seed": args.seed}
    line["weights"] = sum(p.numel() for p in codec.state_dict().values())
    if not args.without:
        line["codec_bytes"] = save_codec(codec, args.codec)
    x = batch(cifar10(data_root(args.data))["validation"][0], torch.arange(args.images))
    for bits in (RATES[1], RATES[3]):
        rate = rate_code(bits).expand(len(x))
        mean, std, _ = fit_posteriors(codec, x, rate, bits, args.fit_steps)
        draw = codec.decode(mean + std * torch.randn_like(mean), rate).clamp(0, 1)
        line[f"psnr_{bits:.0f}"], line[f"kl_{bits:.0f}"] = float(psnr(draw, x).mean()), float(kl_bits(mean, std).mean())
    photos = kodak(data_root(args.data))["test"]
    if photos and not args.without:
        line["patches"] = patches(codec, batch(torch.from_numpy(np.stack(photos))), args.fit_steps)
    line["seconds"] = round(time.monotonic() - started, 1)
    line["command"] = command_line()
    if not args.smoke:
        append_result("inr_image", line)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
