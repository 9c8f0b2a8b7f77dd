"""Rewrite the results tables of `README.md` and `recipes/README.md`, and the cards in `pretrained/`, from the result lines.

    python recipes/tables.py [--keep FOLDER]

`--keep FOLDER` copies the best file of each budget from FOLDER to `pretrained/` and writes `pretrained/manifest.json`. "Best"
is the smallest error on the validation images, and where those were trained on, too, the first seed; the test error is only reported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from figures import federated_plot, inr_plot, lenet_plot, resnet_plot
from lines import (
    INR_PARTS,
    INR_SETS,
    LENETS,
    LEVEL_NAMES,
    NNCODEC,
    RECOMBINER,
    RESNETS,
    TOP,
    VGG_BYTES,
    VGG_PUBLISHED,
    inr_runs,
    lenet_groups,
    read_results,
    resnet_groups,
    small_rival,
    small_runs,
    vgg_runs,
)
from small_networks import NETWORKS


def overview() -> str:
    """One row a recipe: command, minutes, what the newest lines say, and what others published or proved."""
    lenet = [v for group in lenet_groups().values() for v in group]
    smallest = min(lenet, key=lambda v: v["budget"])["budget"]
    own = next(group for (budget, *_), group in sorted(lenet_groups().items()) if budget == smallest)
    resnets = (
        lines[0] | {"top1": median(v["top1"] for v in lines), "bytes": max(v["bytes"] for v in lines)}
        for lines in resnet_groups(20).values()
    )
    resnet = min((v for v in resnets if v["float_top1"] - v["top1"] <= 1.0), key=lambda v: v["bytes"])
    vgg = vgg_runs()[0]
    contexts = {(v["task"], v["context"], v["kind"]): v for v in read_results("ban_contexts")}
    special = [v["share"] for (task, _, kind), v in contexts.items() if task == "digits" and kind == "specialised"]
    digits_seconds = max(
        (v.get("seconds_so_far", 0.0) for (task, _, kind), v in contexts.items() if task == "digits" and kind == "specialised"),
        default=None,
    )
    text = {(v["coded"], v["attention"]): v for v in read_results("ban_text")}.values()
    text_seconds = next((v["train_seconds"] for v in text if v["attention"] == "on" and "train_seconds" in v), None)
    length = sum(v["bytes"] for v in text if v["attention"] == "on")

    def bits_per_byte(key: str, attention: str = "on") -> float:
        return 8 * sum(v[key] for v in text if v["attention"] == attention) / length

    image = min((v for v in inr_runs("cifar10") if v["together"] == 1), key=lambda v: abs(v["bpp"] - RECOMBINER[2][0]))
    circle = {v["code"]: v for v in read_results("realism") if v["source"] == "circle" and v["bits"] == 1}
    federated = {v["how"]: v for v in read_results("federated") if v["epsilon"] == 8}
    search = next(v for v in read_results("gprs_figures") if v["coder"] == "gprs")
    models = read_results("coverage")
    encoders = list(small_runs()["transformer", "inputs", 2.0].values())
    rows = [
        ("lenet5_mnist", f"--budget {smallest}", median(sum(v["seconds"].values()) for v in own),
         f"{max(v['bytes'] for v in own):,} B, {median(v['error'] for v in own):.2f} % (median of {len(own)})",
         "MIRACLE: 1,552 B of indices, 0.96 %"),
        ("resnet_cifar10", resnet["command"].partition(".py ")[2], resnet["seconds"],
         f"ResNet-20 in {resnet['bytes']:,} B, top-1 {resnet['top1'] - resnet['float_top1']:+.2f}", "NNCodec: 123,911 B, top-1 -0.16"),
        ("vgg_cifar10", f"{vgg['command'].partition('.py ')[2]} --device cuda", None,
         f"VGG-16 in {vgg['bytes']:,} B, test error {100 - vgg['top1']:.2f} %", "LilNetX: 76 kB, 10.0 %"),
        ("small_networks", "--network transformer --level inputs --bits 2", sum(v["seconds"] for v in encoders),
         f"Transformer in {max(v['bytes'] for v in encoders):,} B without training, error {median(v['error'] for v in encoders):.2f} %, "
         f"float {encoders[0]['float_error']:.2f} %",
         f"NNCodec as near to its float network: {small_rival('transformer', encoders):,.0f} B"),
        ("ban_contexts", next(v["command"].partition(".py ")[2] for v in contexts.values() if v["task"] == "digits"), digits_seconds,
         f"{100 * sum(special) / len(special):.0f} % of the general package's bytes on average of {len(special)} sets of digits", ""),
        ("ban_text", "train --attention on", text_seconds, f"{bits_per_byte('coded_bytes'):.3f} bits a byte, "
         f"{bits_per_byte('coded_bytes', 'off'):.3f} without attention", f"xz -9e: {bits_per_byte('xz_bytes'):.3f}"),
        ("inr_evaluate", "", image["seconds"], f"{image['psnr']:.2f} dB at {image['bpp']:.3f} bits a pixel, all bytes counted",
         f"RECOMBINER: {RECOMBINER[2][1]:.2f} dB, indices alone"),
        ("realism", "", circle["dithered"]["seconds"], f"squared error at one bit on the circle {circle['dithered']['distortion']:.3f}",
         f"without shared randomness at least {circle['private noise']['theorem']:.3f}"),
        ("federated", "", sum(v["seconds"] for v in read_results("federated")),
         f"{federated['float32']['bits_per_update'] / federated['index']['bits_per_update']:,.0f} times fewer bits, accuracy "
         f"{federated['index']['gap']:+.2f} ± {federated['index']['gap_error']:.2f} points",
         "Shah et al. 2022: as accurate in about epsilon bits"),
        ("gprs_figures", "", sum(v["seconds"] for v in read_results("gprs_figures")),
         f"{search['steps']:.2f} ± {search['steps_error']:.2f} steps of GPRS", f"theorem: {search['steps_theorem']:.2f}"),
        ("coverage", "", sum(v["convert_s"] + v["encode_s"] + v["load_s"] for v in models),
         f"{sum(not v['problems'] for v in models)} of {len(models)} models tried come back the same", ""),
    ]  # fmt: skip
    lines = ["| recipe | minutes | result | published or proved |", "|" + "---|" * 4]
    for recipe, options, seconds, result, published in rows:
        command = f"`python recipes/{recipe}.py {options}".rstrip() + "`"
        lines.append(f"| {command} | {'' if seconds is None else f'{seconds / 60:.0f}'} | {result} | {published} |")
    return "\n".join(lines)


def lenet_table(network: str, float_bytes: int, published: tuple[tuple[int, float, str], ...]) -> str:
    """A LeNet on MNIST: our files, every seed, beside what is published."""
    rows = [f"| {network} on MNIST, {float_bytes:,} bytes as float32 | file, bytes | ratio | test error, % |", "|---|---|---|---|"]
    for (budget, coder, epochs), lines in sorted(lenet_groups(network).items()):
        errors = [v["error"] for v in lines]
        sizes = [v["bytes"] for v in lines]
        many = len(lines) > 1
        seeds = f"seed{'s' * many} {', '.join(str(v['seed']) for v in lines)}"
        whole = "" if "validation_error" in lines[0] else " of all training images"
        name = f"**miracle_ban**, `{coder}`, budget {budget:,}, {epochs:g} epochs{whole}, {seeds}"
        each = f" (median of {', '.join(f'{e:.2f}' for e in errors)})" * many
        size = f"**{max(sizes):,}**" + " (largest)" * many
        rows.append(f"| {name} | {size} | {float_bytes / max(sizes):,.0f} | **{median(errors):.2f}**{each} |")
    rows += [f"| {what} | {size:,} | {float_bytes / size:,.0f} | {error:.2f} |" for size, error, what in published]
    return "\n".join(rows)


def lenet_seeds() -> str:
    """Every run of the LeNets with its parts."""
    columns = "network, budget, coder, epochs, seed, bytes, test error %, float error %, widths"
    columns += ", blocks, KL bits, codeword bits, log2 r, J, fit s, encode s"
    rows = ["| " + columns.replace(", ", " | ") + " |", "|" + "---|" * (columns.count(", ") + 1)]
    runs = [(name, *key, v) for name, *_ in LENETS.values() for key, lines in sorted(lenet_groups(name).items()) for v in lines]
    for name, budget, coder, epochs, v in runs:
        widths = "-".join(str(w) for w in v["widths"].values())
        rows.append(
            f"| {name} | {budget:,} | {coder} | {epochs:g} | {v['seed']} | {v['bytes']:,} | {v['error']:.2f} "
            f"| {v['float_error']:.2f} | {widths} "
            f"| {v['blocks']} | {v['kl_bits_per_block']:.2f} | {v['codeword_bits_per_block']:.2f} | {v['log2_ratio_per_block']:.2f} "
            f"| {v['j_bits_per_block']:.2f} | {v['seconds']['fit']:.0f} | {v['seconds']['encode']:.0f} |"
        )
    return "\n".join(rows)


def ablation_table() -> str:
    """LeNets at the same bytes with other settings; of runs repeated with the same seed the latest counts."""
    rows = ["| network | other settings | file, bytes | test error, % | validation error, % | hidden units |", "|" + "---|" * 6]
    for network, whole in (("LeNet-5", (750, "trellis", 40)), ("LeNet-300-100", (2500, "trellis", 100))):
        settings: dict[str, dict[int, dict]] = {"none": {v["seed"]: v for v in lenet_groups(network)[whole]}}
        for v in read_results("lenet5_ablation"):
            if v["task"] == f"{network} on MNIST":
                settings.setdefault(v["without"], {})[v["seed"]] = v
        for without, by_seed in settings.items():
            lines = [by_seed[seed] for seed in sorted(by_seed)]
            errors = [", ".join(f"{v[key]:.2f}" for v in lines) for key in ("error", "validation_error")]
            widths = ", ".join("-".join(str(w) for w in v["widths"].values()) for v in lines)
            rows.append(f"| {network} | {without} | {max(v['bytes'] for v in lines):,} | {errors[0]} | {errors[1]} | {widths} |")
    return "\n".join(rows)


def _median_and_all(values: list[float], digits: int) -> str:
    each = f" ({', '.join(f'{v:.{digits}f}' for v in values)})" if len(values) > 1 else ""
    return f"**{median(values):.{digits}f}**{each}"


def resnet_table() -> str:
    """Both ResNets: our files at every level of help, beside NNCodec."""
    head = "| {0} on CIFAR-10, {1:,} bytes as float32, top-1 {2:.2f} % | file, bytes | top-1, % | agreement, % |"
    parts = []
    for depth, size in RESNETS.items():
        groups = resnet_groups(depth)
        rows = [head.format(f"ResNet-{depth}", size, next(iter(groups.values()))[0]["float_top1"]), "|---|---|---|---|"]
        for (level, _), lines in groups.items():
            top1, agreement = (_median_and_all([v[key] for v in lines], digits) for key, digits in (("top1", 2), ("agreement", 1)))
            taught = ", taught by ResNet-56" if all("--teacher 56" in v["command"] for v in lines) else ""
            name = f"**miracle_ban**, from {LEVEL_NAMES[level]}{taught}"
            rows.append(f"| {name} | **{max(v['bytes'] for v in lines):,}** | {top1} | {agreement} |")
        rows += [f"| NNCodec 2.1.3 (the MPEG standard), without data | {b:,} | {top1:.2f} | {a:.1f} |" for b, top1, a in NNCODEC[depth]]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def vgg_table() -> str:
    """VGG-16: our files beside what is published."""
    rows = [f"| VGG-16 on CIFAR-10, {VGG_BYTES:,} bytes as float32 | file, bytes | ratio | test error, % |", "|---|---|---|---|"]
    found = [(v["bytes"], 100 - v["top1"], "**miracle_ban**") for v in vgg_runs()]
    for size, error, what in [*found, *VGG_PUBLISHED]:
        bold = "**" if what.startswith("**") else ""
        rows.append(f"| {what} | {bold}{size:,}{bold} | {VGG_BYTES / size:,.0f} | {bold}{error:.{2 if bold else 1}f}{bold} |")
    return "\n".join(rows)


def coverage_table() -> str:
    """Every network that was tried, smallest first; of runs repeated the latest counts."""
    latest = {v["model"]: v for v in read_results("coverage")}
    rows = ["| model | weights | float32 MB | file MB | of it raw, kB | convert s | encode s | load s | peak MiB | |", "|" + "---|" * 10]
    for v in sorted(latest.values(), key=lambda v: v.get("weights", 1 << 60)):
        if "failed" in v:
            rows.append(f"| {v['model']} | | | | | | | | | {v['failed'][:80]} |")
            continue
        good = v["same_outputs"] and v["finite"] and not v["problems"]
        rows.append(
            f"| {v['model']} | {v['weights']:,} | {v['float_bytes'] / 1e6:.1f} | {v['bytes'] / 1e6:.2f} | {v['raw_bytes'] / 1e3:.0f} "
            f"| {v['convert_s']:.1f} | {v['encode_s']:.0f} | {v['load_s']:.2f} | {v['peak_mib']:,} | {'' if good else 'FAILED'} |"
        )
    return "\n".join(rows)


def coder_results() -> dict[str, list[dict[str, Any]]]:
    """What `tests/benchmarks/coders.py --json recipes/results/coders.json` found."""
    return json.loads((TOP / "recipes" / "results" / "coders.json").read_text())


def coder_table() -> str:
    """Every coder: waste on matched blocks of 64 weights and 12 bits, and LeNet-5 packaged by it at one budget."""
    found = coder_results()
    blocks = {v["coder"]: v for v in found["blocks"] if (v["kl_bits"], v["d"]) == (12, 64)}
    rows = ["| coder | J for 16 bits spent | LeNet-5, bytes | test error, % |", "|---|---|---|---|"]
    packaged = {v["coder"]: v for v in found["lenet5"]}
    for name in sorted(blocks.keys() | packaged.keys(), key=lambda n: -_waste(blocks[n]) if n in blocks else 0.0):
        waste = f"{_waste(blocks[name]):.2f}" if name in blocks else ""
        file = packaged.get(name)
        rows.append(f"| {name} | {waste} | " + (f"{file['bytes']:,} | {file['test_error']:.2f} |" if file else "| |"))
    return "\n".join(rows)


def _waste(row: dict[str, Any]) -> float:
    return 16.0 * row["j"] / row["bits"]


def block_table() -> str:
    """J = bits - E[log2 r] of every coder, KL and block size, with its standard error; for the trellis in proportion to the KL."""
    found = coder_results()["blocks"]
    cells = {(v["coder"], v["kl_bits"], v["d"]): v for v in found}
    sizes, kls = (sorted({v[k] for v in found}) for k in ("d", "kl_bits"))
    columns = [(kl, d) for d in sizes for kl in kls if any((c, kl, d) in cells for c in {v["coder"] for v in found})]
    rows = ["| coder | " + " | ".join(f"d {d}, KL {kl}" for kl, d in columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for name in dict.fromkeys(v["coder"] for v in found):
        own = [cells.get((name, kl, d)) for kl, d in columns]
        rows.append(f"| {name} | " + " | ".join(_j(v) if v else "" for v in own) + " |")
    return "\n".join(rows)


def _j(row: dict[str, Any]) -> str:
    return f"{row['j']:.2f}" + (f" ± {row['j_error']:.2f}" if row["j_error"] else "")


def speed_table() -> str:
    """Rates of encoding and decoding."""
    rows = ["| what | seconds | rate | of the matrix product |", "|---|---|---|---|"]
    for v in coder_results()["speed"]:
        seconds = f"{v['seconds']:.3g}" if v["seconds"] else ""
        rows.append(
            f"| {v['what']} | {seconds} | {v['rate']:.3g} {v['unit']} | {'' if v['of_gemm'] is None else format(v['of_gemm'], '.2f')} |"
        )
    for v in coder_results()["model"]:
        rows.append(
            f"| {v['what']}, {v['weights']:,} weights at 0.25 bit, {v['bytes']:,} bytes: trellis, peak memory {v['peak_mib']:,.0f} MiB "
            f"({v['peak_mib_before']:,.0f} before) | {v['encode_seconds']:.0f} | load in {v['load_seconds']:.2f} s | |"
        )
    return "\n".join(rows)


def small_table() -> str:
    """Small networks by level and bits, medians over seeds, and what NNCodec takes for the same error of the class scores."""
    rows = ["| network | level | bits a weight | seeds | bytes | error, % | score error | NNCodec, bytes |", "|" + "---|" * 8]
    found = small_runs()
    for name, (title, _) in NETWORKS.items():
        own = {(level, bits): list(runs.values()) for (network, level, bits), runs in found.items() if network == name}
        for (level, bits), runs in sorted(own.items(), key=lambda item: (item[0][0] == "inputs", item[0][1])):
            size, error, score = (median(v[key] for v in runs) for key in ("bytes", "error", "score_error"))
            rival = small_rival(name, runs)
            said = f"{title}, float {runs[0]['float_error']:.2f} %" if title else ""
            others = f"{rival:,.0f}" if rival else ""
            rows.append(f"| {said} | {level} | {bits:g} | {len(runs)} | {size:,.0f} | {error:.2f} | {score:.4f} | {others} |")
            title = ""
    return "\n".join(rows)


def contexts_table() -> str:
    """Packages of one training for several contexts, beside the general one and rivals; of runs repeated the latest counts."""
    latest = {(v["task"], v["context"], v["kind"], v["seed"]): v for v in read_results("ban_contexts")}
    rows = [
        "| context | package | bytes | of the general package | error there, % | error of the general package there, % |",
        "|" + "---|" * 6,
    ]
    for v in latest.values():
        context = f"{v['context']} (not trained on)" if v["unseen"] else v["context"]
        of_rival = latest.get((v["task"], v["context"], "rival", v["seed"])) if v["kind"].startswith("specialised") else None
        note = f", {v['bytes'] / of_rival['bytes']:.2f} of the rival's" if of_rival else ""
        note += "" if v.get("reached", True) else ", the general one: no smaller one errs as little"
        numbers = f"{v['share']:.2f} | {v['error']:.2f} | {v['general_error']:.2f}"
        rows.append(f"| {v['task']}: {context} | {v['kind']} | {v['bytes']:,}{note} | {numbers} |")
    return "\n".join(rows)


def text_table() -> str:
    """Bits per byte of every file with and without attention; the model's file is counted in the totals."""
    latest = {(v["coded"], v["attention"]): v for v in read_results("ban_text")}
    rows = ["| file | bytes | attention on | off | saved | xz -9e | zstd -19 | bzip2 -9 |", "|" + "---|" * 8]
    names = list(dict.fromkeys(name for name, _ in latest))
    others = ("xz_bytes", "zstd_bytes", "bzip2_bytes")

    def cells(on: float, off: float, size: int, other: list[float]) -> str:
        each = " | ".join(f"{8 * b / size:.3f}" for b in other)
        return f"{8 * on / size:.3f} | {8 * off / size:.3f} | {100 * (1 - on / off):.1f} % | {each} |"

    total = dict.fromkeys(("bytes", "on", "off", *others), 0)
    for name in names:
        on, off = latest[name, "on"], latest[name, "off"]
        rows.append(f"| {name} | {on['bytes']:,} | " + cells(on["coded_bytes"], off["coded_bytes"], on["bytes"], [on[k] for k in others]))
        total["bytes"] += on["bytes"]
        total["on"] += on["coded_bytes"]
        total["off"] += off["coded_bytes"]
        for k in others:
            total[k] += on[k]
    if names:
        rows.append(f"| all | {total['bytes']:,} | " + cells(total["on"], total["off"], total["bytes"], [total[k] for k in others]))
        models = {a: latest[names[0], a]["model_bytes"] for a in ("on", "off")}
        with_models = cells(total["on"] + models["on"], total["off"] + models["off"], total["bytes"], [total[k] for k in others])
        rows.append(f"| all, and the models' files ({models['on']:,} and {models['off']:,} bytes) | {total['bytes']:,} | {with_models}")
    return "\n".join(rows)


def gprs_table() -> str:
    """Steps and index of every search beside the theorems; of runs repeated the latest counts."""
    latest = {(v["mean"], v["std"], v["coder"]): v for v in read_results("gprs_figures")}
    columns = "Q, KL, D_inf, coder, steps, theorem, E[log2 K], H[K], KL + log2(KL + 1), in a file, p-value"
    rows = ["| " + columns.replace(", ", " | ") + " |", "|" + "---|" * (columns.count(", ") + 1)]
    for v in latest.values():
        theorem = "O(KL)" if v["steps_theorem"] is None else f"{v['steps_theorem']:,.2f}"
        entropy = "" if v["entropy_bits"] is None else f"{v['entropy_bits']:.2f}"
        cut = f", {100 * v['truncated']:.0f} % cut short" if v["truncated"] > 0.005 else ""
        cells = [f"N({v['mean']:g}, {v['std']:g}²)", f"{v['kl_bits']:.2f}", f"{v['d_inf_bits']:.2f}", v["coder"]]
        cells += [f"{v['steps']:,.2f} ± {v['steps_error']:.2f}{cut}", theorem, f"{v['log2_index']:.2f}", entropy]
        cells += [f"{v['bound_bits']:.2f}", f"{v['codeword_bits']:.2f}", f"{v['p_value']:.2f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def realism_table() -> str:
    """Rate, distortion and realism of every code; of runs repeated the latest counts."""
    latest = {(v["source"], v.get("kl_bits") and round(v["kl_bits"], 1), v["code"], v["source"] == "circle" and v["bits"]): v
              for v in read_results("realism")}  # fmt: skip
    rows = ["| source | code | bits | squared error | theory | off the law |", "|" + "---|" * 6]
    for v in latest.values():
        if v["code"] == "original":
            rows.append(f"| {v['source']} | the images themselves | | 0 | | {v['realism']:.2f} |")
            continue
        theory = "" if "theorem" not in v else f"{v['theorem']:.3f}"
        digits = 2 if v["source"] == "MNIST" else 3
        rows.append(
            f"| {v['source']} | {v['code']} | {v['bits']:.2f} | {v['distortion']:.4f} ± {v['distortion_error']:.4f} | {theory} "
            f"| {v['realism']:.{digits}f} |"
        )
    return "\n".join(rows)


def federated_table() -> str:
    """Bits of an update, privacy and accuracy of every way to send it; of runs repeated the latest counts."""
    latest = {(v["epsilon"], v["messages"], v["how"]): v for v in read_results("federated")}
    columns = (
        "message, epsilon of a message, messages of a client, epsilon of a client, bits of an update, fewer, accuracy %, less float32's"
    )
    rows = ["| " + columns.replace(", ", " | ") + " |", "|" + "---|" * (columns.count(", ") + 1)]
    for (epsilon, messages, how), v in latest.items():
        plain = latest[epsilon, messages, "float32"]["bits_per_update"]
        of = ("", "") if how == "no privacy" else (f"{epsilon:g}", f"{v['epsilon_composed']:g}")
        gap = "" if how in ("float32", "no privacy") else f"{v['gap']:+.2f} ± {v['gap_error']:.2f}"
        rows.append(
            f"| {how} | {of[0]} | {messages} | {of[1]} | {v['bits_per_update']:,.1f} | {plain / v['bits_per_update']:,.0f} "
            f"| {v['accuracy']:.2f} ± {v['accuracy_error']:.2f} ({len(v['seeds'])} seeds) | {gap} |"
        )
    return "\n".join(rows)


def audit_table() -> str:
    """What the law of the index keeps, given the shared randomness, for three codes of the same mechanism."""
    found = {v["epsilon"]: v["audit"] for v in read_results("federated") if v["audit"]}
    rows = ["| epsilon of the mechanism | by rank (sent here) | minimal random coding | rejection sampling |", "|" + "---|" * 4]
    for epsilon, v in found.items():
        each = ["unbounded" if e is None else f"{e:.2f}" for e in v.values()]
        rows.append(f"| {epsilon:g} | " + " | ".join(each) + " |")
    return "\n".join(rows)


def inr_table() -> str:
    """Images coded each in a file of its own, and together, beside what WebP and JPEG need for the same quality."""
    rows = [
        "| images | in a file | bytes an image | bits a pixel | PSNR, dB | of the bytes not v | KL, bits "
        "| WebP of that PSNR, bytes | JPEG, bytes |",
        "|" + "---|" * 9,
    ]
    for task, name in INR_SETS.items():
        for v in inr_runs(task):
            rows.append(
                f"| {v['images']} of {name} | {v['together']} | {v['bytes']:.1f} | {v['bpp']:.3f} "
                f"| **{v['psnr']:.2f}** ± {v['psnr_error']:.2f} "
                f"| {v['bytes'] - v['index_bits'] / 8:.1f} | {v['kl_bits']:.0f} | {v['webp_bytes']:.0f} | {v['jpeg_bytes']:.0f} |"
            )
    return "\n".join(rows)


def inr_patches() -> str:
    """What it is worth that the tiles of an image see each other and share their bits."""
    found = next(v["patches"] for v in reversed(read_results("inr_image")) if "patches" in v)
    rates = [name.removeprefix("apart_") for name in found if name.startswith("apart_")]
    head = " | ".join(f"PSNR at {rate} bits of KL a tile, dB" for rate in rates)
    rows = [f"| tiles of an image | {head} |", "|---" * (1 + len(rates)) + "|"]
    for how, title in (("together", "see each other and share their bits"), ("apart", "each by itself, with the same bits")):
        rows.append(f"| {title} | " + " | ".join(f"{found[f'{how}_{rate}']:.2f}" for rate in rates) + " |")
    return "\n".join(rows)


def inr_parts() -> str:
    """What the parts of the codec are worth: held-out training images, posteriors fitted but not coded."""
    latest = {(v["steps"], v["batch"], *v["without"]): v for v in read_results("inr_image") if v["task"] == "prior"}
    rows = ["| codec | learned for | PSNR at 790 bits of KL, dB | at 1,740 bits |", "|---|---|---|---|"]
    for v in sorted(latest.values(), key=lambda v: (-v["steps"] * v["batch"], len(v["without"]))):
        without = " and ".join(INR_PARTS[k] for k in v["without"])
        name = f"without {without}" if without else "whole"
        learned = f"{v['steps']:,} steps of {v['batch']} images"
        rows.append(f"| {name} | {learned} | {v['psnr_790']:.2f} | {v['psnr_1740']:.2f} |")
    return "\n".join(rows)


def keep(folder: Path) -> None:
    """Copy the best file of each budget to `pretrained/` and write the manifest, replacing the cards of the files that FOLDER has."""
    target = TOP / "pretrained" / "manifest.json"
    cards = {card["file"]: card for card in json.loads(target.read_text())} if target.exists() else {}
    lenets: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for stem, (title, *_) in LENETS.items():
        for (budget, coder, _), lines in lenet_groups(title).items():
            lenets.setdefault((stem, budget, coder), []).extend(lines)
    for (stem, budget, coder), lines in lenets.items():
        whole = [v for v in lines if "validation_error" not in v]
        best = whole[0] if whole else min(lines, key=lambda v: v["validation_error"])
        name = f"{stem}-mnist-{budget}{'' if coder == 'trellis' else '-' + coder}.mban"
        _keep(folder, best, name, cards, "test error, percent", best["error"], ("input_mean", "input_std"))
    for depth in RESNETS:
        for (level, budget), lines in resnet_groups(depth).items():
            best = max(lines, key=lambda v: v.get("validation_top1", 0.0))  # the first seed, where those images were trained on
            name = f"resnet{depth}-cifar10-{level}-{budget}.mban"
            _keep(folder, best, name, cards, "top-1 on the first 5,000 test images, percent", best["top1"], ("agreement", "float_top1"))
    for v in vgg_runs():
        name = f"vgg16-cifar10-{v['budget']}.mban"
        _keep(folder, v, name, cards, "top-1 on the first 5,000 test images, percent", v["top1"], ())
    for v in read_results("ban_contexts"):
        if v["kind"] != "rival" and v.get("reached", True):
            name = f"lenet5-{v['task']}-{v['kind'].replace(', ', '-')}-{v['context'].replace(' ', '')}.mban"
            _keep(folder, v, name, cards, "test error in the context, percent", v["error"], ("context",))
    texts = {(v["attention"], v["coded"]): v for v in read_results("ban_text")}
    for attention in dict.fromkeys(a for a, _ in texts):
        own = [v for (a, _), v in texts.items() if a == attention]
        bits = round(8 * sum(v["coded_bytes"] for v in own) / sum(v["bytes"] for v in own), 4)
        model = {**own[-1], "bytes": own[-1]["model_bytes"]}
        _keep(folder, model, model["file"], cards, "bits per byte of all files coded, without this one", bits, ())
    target.write_text(json.dumps([cards[name] for name in sorted(cards)], indent=2) + "\n")


def cards_table() -> str:
    """Every file of the manifest."""
    rows = ["| file | bytes | task | seed | | |", "|" + "---|" * 6]
    for v in json.loads((TOP / "pretrained" / "manifest.json").read_text()):
        task = f"{v['task']}: {v['context']}" if "context" in v else v["task"]
        digits = 3 if "bits" in v["metric"] else 2
        rows.append(f"| `{v['file']}` | {v['bytes']:,} | {task} | {v['seed']} | {v['metric']} | {v['value']:.{digits}f} |")
    return "\n".join(rows)


def _keep(folder: Path, line: dict[str, Any], name: str, cards: dict, metric: str, value: float, more: tuple[str, ...]) -> None:
    source = folder / line["file"]
    if not source.exists():
        return
    if hashlib.sha256(source.read_bytes()).hexdigest() != line["sha256"]:
        raise SystemExit(f"{source} is not the file of the result line: run its command again")
    shutil.copyfile(source, TOP / "pretrained" / name)
    same = ("bytes", "sha256", "task", "seed", "command", "sha256_weights", *more)
    cards[name] = {"file": name, "metric": metric, "value": value, **{k: line[k] for k in same}}


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the two marks `<!-- name -->` and `<!-- /name -->` of a file."""
    before, mark, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not mark or not end:
        raise SystemExit(f"{path} has no section {name}")
    path.write_text(f"{before}{mark}{text}\n{end}{after}")


def main() -> None:
    """Rewrite everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.keep:
        keep(args.keep)
    tables = [lenet_table(*known) for known in LENETS.values()]
    replace_section(TOP / "README.md", "results", "\n\n".join(tables))
    replace_section(TOP / "pretrained" / "README.md", "cards", cards_table())
    lenet_plot(TOP / "recipes" / "results" / "lenet5_mnist.png")
    replace_section(TOP / "README.md", "resnets", resnet_table())
    replace_section(TOP / "README.md", "vgg", vgg_table())
    replace_section(TOP / "README.md", "coders", coder_table())
    replace_section(TOP / "recipes" / "README.md", "recipes", overview())
    replace_section(TOP / "recipes" / "README.md", "coverage", coverage_table())
    for page in (TOP, TOP / "recipes"):
        replace_section(page / "README.md", "contexts", contexts_table())
    replace_section(TOP / "recipes" / "README.md", "small", small_table())
    replace_section(TOP / "recipes" / "README.md", "text", text_table())
    replace_section(TOP / "recipes" / "README.md", "gprs", gprs_table())
    replace_section(TOP / "recipes" / "README.md", "realism", realism_table())
    replace_section(TOP / "recipes" / "README.md", "federated", federated_table())
    replace_section(TOP / "recipes" / "README.md", "audit", audit_table())
    federated_plot(TOP / "recipes" / "results" / "federated.png")
    resnet_plot(TOP / "recipes" / "results" / "resnet_cifar10.png")
    replace_section(TOP / "recipes" / "README.md", "images", inr_table())
    replace_section(TOP / "recipes" / "README.md", "image parts", inr_parts())
    replace_section(TOP / "recipes" / "README.md", "image patches", inr_patches())
    inr_plot(TOP / "recipes" / "results" / "inr_image.png")
    replace_section(TOP / "recipes" / "README.md", "lenet5", lenet_seeds())
    replace_section(TOP / "recipes" / "README.md", "ablation", ablation_table())
    replace_section(TOP / "recipes" / "README.md", "blocks", block_table())
    replace_section(TOP / "recipes" / "README.md", "speed", speed_table())


if __name__ == "__main__":
    main()
