"""The command line: demo, compress, inspect, verify, decode, compare, plot.

Results go to stdout (one JSON object with `--json`), progress and warnings to stderr. Exit status 0; 1 for a user's or a
file's fault, with one line that says what is wrong; 2 for usage; 130 when interrupted. Leans on the whole package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from . import __version__, coders, plots
from .bits import parse_bytes
from .compress import STAGES, compress
from .container import FORMAT_VERSION, Archive
from .convert import as_module, convert
from .decode import open as open_archive
from .decode import save
from .demo import check, run, weights_sha256
from .errors import MiracleError, MismatchError
from .files import write_whole
from .inputs import batches_of
from .layers import posteriors
from .listing import bits_table, codeword_bits, label, number_text, shape_text, sizes_text, std_text, table, tensor_rows, totals
from .load import bind, decode, restore
from .network import copied
from .sources import compare, load_checkpoint, load_data, load_inputs, load_into, load_model, try_batch

_MODEL_HELP = "package.module:factory, path/to/file.py:factory, or torchvision:NAME; the factory takes no arguments"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its words; default those of the process.

    Returns:
        The exit status.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        with _one_line_warnings():
            with contextlib.redirect_stdout(sys.stderr):  # what the user's own code prints is not a result
                result = args.run(args)
            print(json.dumps(_finite(result), allow_nan=False) if args.json else args.show(result), flush=True)
        return 0
    except KeyboardInterrupt:
        return _complain("interrupted" + _how_to_resume(args), status=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
            return 1
        return _complain(f"error: {_one_line(error)}", status=1)


def _complain(text: str, status: int) -> int:
    print(f"miracle-ban: {text}", file=sys.stderr)
    return status


def _one_line(error: Exception) -> str:
    if isinstance(error, MiracleError):
        return _squeeze(str(error))
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return f"{type(error).__name__}: {_squeeze(str(error))} (--debug shows the traceback)"


def _squeeze(text: str, most: int = 600) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _how_to_resume(args: argparse.Namespace) -> str:
    state = getattr(args, "checkpoint", None)
    stages = () if state is None else STAGES
    written = [p for p in (Path(f"{state}.{stage}") for stage in stages) if p.exists()]
    return f"; the same command resumes from {written[-1]}" if written else ""


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        kind = "warning" if category.__name__ == "MiracleWarning" else category.__name__
        print(f"miracle-ban: {kind}: {_squeeze(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not have: None in their place."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miracle-ban", description="Trained networks as very small files.")
    parser.add_argument("--version", action="version", version=f"miracle-ban {__version__}, file format {FORMAT_VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_compress, _add_inspect, _add_verify, _add_decode, _add_compare, _add_plot):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _command(commands: Any, name: str, text: str, run: Callable, show: Callable) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text[0].lower() + text[1:].rstrip("."), description=text)
    command.set_defaults(run=run, show=show)
    return command


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    text = "Draw digits, train LeNet-5 on them, compress it, decode it in a fresh process."
    command = _command(commands, "demo", text, _demo, _show_demo)
    command.add_argument("-o", "--output", type=Path, default=Path("miracle-ban-demo"), metavar="FOLDER", help="default %(default)s")
    command.add_argument("--seed", type=_seed, default=0, help="of training and coding; the digits are always the same")
    command.add_argument("--check", type=Path, metavar="FILE", help="only decode a file of the demo and test it")
    return command


def _add_compress(commands: Any) -> argparse.ArgumentParser:
    command = _command(commands, "compress", "Compress a trained network into a .mban file.", _compress, _show_compress)
    command.add_argument("source", type=Path, metavar="CHECKPOINT", help="trained weights: .safetensors, or a torch file with a state dict")
    command.add_argument("--model", metavar="M", help=f"{_MODEL_HELP}; without it layers cannot be measured, and errors are far larger")
    data = "package.module:loader or file.py:loader; called, it gives batches of (inputs, targets), or a pair (batches, loss)"
    data += "; the loss is cross-entropy by default. Without it nothing is trained, and the same error takes far more bytes"
    group = command.add_mutually_exclusive_group()
    group.add_argument("--data", metavar="D", help=data)
    inputs = "as --data, but gives a tensor of examples or batches without labels, a thousand in all: for smaller errors without training"
    group.add_argument("--inputs", metavar="I", help=inputs)
    context = "with --data: inputs of the context that the file is for, as --inputs; trains with Bayesian attention over sets of classes"
    command.add_argument("--context", metavar="C", help=context)
    command.add_argument("--budget", required=True, metavar="SIZE", help='of the whole file: bytes, "20 kB", "3 MB"')
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mban")
    command.add_argument("--epochs", type=_positive, default=30.0, help="passes over the data in training (default 30)")
    hardened = "with --data: train under the noise of the code and then package, instead of training posteriors"
    hardened += " (default: with BatchNorms, from 4,000 bytes and 5 epochs on)"
    command.add_argument("--hardened", action=argparse.BooleanOptionalAction, default=None, help=hardened)
    command.add_argument("--coder", choices=tuple(coders.IDS), default="trellis", help="default %(default)s")
    command.add_argument("--seed", type=_seed, default=0, help="of training and of the file's randomness")
    command.add_argument("--checkpoint", type=Path, metavar="STATE", help="keep the state in STATE.encode and others, to resume from")
    help_names = "store names and shapes, so that the file decodes without the model (default: from 10 kB)"
    command.add_argument("--names", action=argparse.BooleanOptionalAction, default=None, help=help_names)
    command.add_argument("--report", type=Path, metavar="REPORT.json", help="write how training and coding went; `plot` draws it")
    return command


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    return _on_file(_command(commands, "inspect", "Show what a .mban file holds; decodes nothing.", _inspect, _show_inspect))


def _add_verify(commands: Any) -> argparse.ArgumentParser:
    return _on_file(_command(commands, "verify", "Check a .mban file and decode all of it.", _verify, _show_verify))


def _add_decode(commands: Any) -> argparse.ArgumentParser:
    command = _on_file(_command(commands, "decode", "Decode a .mban file into plain weights.", _decode, _show_decode))
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    return command


def _add_compare(commands: Any) -> argparse.ArgumentParser:
    command = _command(commands, "compare", "Compare a .mban file with the weights that it was made from.", _compare, _show_compare)
    _on_file(command)
    command.add_argument("source", type=Path, metavar="CHECKPOINT", help="the original weights")
    return command


def _add_plot(commands: Any) -> argparse.ArgumentParser:
    command = _command(commands, "plot", "Draw .mban files, reports of compress, or result lines.", _plot, _show_plot)
    command.add_argument("what", type=Path, nargs="+", metavar="WHAT", help="a .mban file, a REPORT.json, or a results .jsonl")
    command.add_argument("--model", metavar="M", help=f"gives the tensors their names; {_MODEL_HELP}")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.png")
    return command


def _on_file(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("file", type=Path, metavar="FILE", help="a .mban file")
    command.add_argument("--model", metavar="M", help=f"for a file without names: {_MODEL_HELP}")
    return command


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^64 - 1")
    return int(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


# --- files -------------------------------------------------------------------------------------------------------------


def _open(args: argparse.Namespace, path: Path | None = None) -> Archive:
    archive = open_archive(path or args.file)
    return bind(archive, load_model(args.model)) if args.model else archive


def _decode_all(args: argparse.Namespace, archive: Archive) -> dict[str, Tensor]:
    if any(r.name is None for r in archive.records):
        raise MismatchError(f"{args.file} carries no tensor names or shapes: give the model that it was made for with --model")
    return decode(archive)


def _writable(path: Path | None) -> None:
    """Find out before the work, not after it, that the result cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise MiracleError(f"cannot write {path}: it is a folder")
    if not path.absolute().parent.is_dir():
        raise MiracleError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise MiracleError(f"cannot write {path}: the folder is not writable")


# --- commands: each gives its result as plain data; `_show_*` turns that into text ---------------------------------------


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    return check(args.check) if args.check else run(args.output, seed=args.seed, progress=not args.quiet)


def _show_demo(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"error {result['error']:.2f} %, SHA-256 of the weights {result['sha256_weights']}"
    rows = [
        ("float32 weights", f"{result['float_bytes']:,} bytes"),
        ("file", f"{result['file_bytes']:,} bytes"),
        ("ratio", f"{result['ratio']:,.0f}"),
        ("error before", f"{result['float_error']:.2f} %"),
        ("error after", f"{result['decoded_error']:.2f} %"),
        *((name, f"{seconds:.1f} s") for name, seconds in result["stages"].items()),
        ("total", f"{result['seconds']:.1f} s"),
    ]
    picture = result["picture"] or "left out: matplotlib is missing (pip install 'miracle-ban[plot]')"
    ends = [
        "The fresh process decoded the weights that were coded, bit for bit.",
        f"file     {result['file']}",
        f"picture  {picture}",
    ]
    return "\n".join([table(("LeNet-5 on drawn digits", ""), rows), "", *ends])


def _compress(args: argparse.Namespace) -> dict[str, Any]:
    parse_bytes(args.budget)
    for path in (args.output, args.report, args.checkpoint):
        _writable(path)
    if args.model is None and (args.data or args.inputs):
        raise MiracleError("--data and --inputs need the network: give --model")
    weights = load_checkpoint(args.source)
    net = as_module(weights) if args.model is None else load_into(load_model(args.model), weights, str(args.source))
    batches, loss = (None, None) if args.data is None else load_data(args.data)
    inputs = None if args.inputs is None else batches_of(load_inputs(args.inputs))
    if args.context and not args.data:
        raise MiracleError("--context needs the training set: give --data")
    context = None if args.context is None else load_inputs(args.context)
    if batches is not None and loss is not None:
        try_batch(net, batches, loss, args.data)
    archive = compress(
        net if args.model else weights,
        batches,
        loss,
        inputs=inputs,
        context=context,
        budget=args.budget,
        epochs=args.epochs,
        hardened=args.hardened,
        coder=args.coder,
        seed=args.seed,
        checkpoint=args.checkpoint,
        encode_options={"names": args.names},
        progress=not args.quiet,
    )
    size = save(archive, args.output)
    rows = tensor_rows(archive)
    info = archive.info
    seconds = {stage: info.get(stage, {}).get("seconds") for stage in STAGES} | {"encode": info.get("seconds")}
    seconds = {k: v for k, v in seconds.items() if v is not None}
    result = {"file": str(args.output), "tensors": rows, **totals(rows, size), "stages": seconds, "seconds": sum(seconds.values())}
    measured = batches_of(context) if context is not None else batches if batches is not None else inputs
    if measured is not None:
        other = copied(net)
        restore(other, decode(archive, other))
        result["quality"] = compare(net, other, measured, None if context is not None else loss)
    if args.report is not None:
        report = {**archive.info, "tensors": rows, "codeword_bits": codeword_bits(archive).tolist(), "file": str(args.output)}
        write_whole(args.report, json.dumps(_finite(report), allow_nan=False).encode())
        result["report"] = str(args.report)
    return result


_QUALITY = {
    "loss_before": "loss before", "loss_after": "loss after", "relative_error": "relative error of the outputs",
    "agreement": "same answer as before, %", "error_before": "wrong answers before, %", "error_after": "wrong answers after, %",
}  # fmt: skip


def _show_compress(result: dict[str, Any]) -> str:
    text = bits_table(result["tensors"], result)
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["stages"].items())
    quality = "".join(f"{_QUALITY[name]} {value:.4g}\n" for name, value in result.get("quality", {}).items())
    return f"{text}\n\n{sizes_text(result)}\n{quality}{stages}\n{result['file']}"


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    archive = open_archive(args.file)
    carried = archive.names
    if args.model:
        bind(archive, load_model(args.model))
    size = args.file.stat().st_size
    rows = tensor_rows(archive)
    return {
        "file": str(args.file),
        "format_version": FORMAT_VERSION,
        "coder": archive.coder,
        "seed": archive.seed,
        "names": carried,
        "fingerprint": f"{archive.fingerprint:04x}",
        **totals(rows, size),
        "blocks": sum(row["blocks"] for row in rows),
        "tensors": rows,
    }


def _show_inspect(result: dict[str, Any]) -> str:
    names = "with names" if result["names"] else "without names (--model M shows them)"
    head = (
        f"{result['file']}: format {result['format_version']}, {result['file_bytes']:,} bytes, {names}, coder {result['coder']}, "
        f"seed {result['seed']}, fingerprint {result['fingerprint']}"
    )
    rows = [
        (
            label(t),
            shape_text(t["shape"]),
            "-" if t["kind"] != "coded" else shape_text(t["kept"]),
            t["kind"] if t["kind"] != "alias" else f"= {t['alias_of']}",
            std_text(t["prior_std"]),
            number_text(t["blocks"]),
            f"{t['bits']:,}",
            number_text(t["bits_per_weight"], ".4f"),
        )
        for t in result["tensors"]
    ]
    bits = sum(t["bits"] for t in result["tensors"])
    weights = result["weights"]
    rows.append(("total", "", "", "", "", f"{result['blocks']:,}", f"{bits:,}", number_text(bits / weights if weights else None, ".4f")))
    text = table(("tensor", "shape", "kept", "kind", "prior std", "blocks", "bits", "bits/weight"), rows, left=4)
    return f"{head}\n\n{text}\n\n{sizes_text(result)}"


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    archive = _open(args)
    complete = all(r.name is not None for r in archive.records)
    digest = weights_sha256(decode(archive)) if complete else None
    return {
        "file": str(args.file),
        "ok": True,
        "file_bytes": args.file.stat().st_size,
        "tensors": len(archive.records),
        "decoded": complete,
        "sha256_weights": digest,
    }


def _show_verify(result: dict[str, Any]) -> str:
    if result["decoded"]:
        return f"{result['file']}: ok, SHA-256 of all {result['tensors']} decoded tensors {result['sha256_weights']}"
    return (
        f"{result['file']}: ok as to checksum and structure; its {result['tensors']} tensors carry no names: give --model M to decode them"
    )


def _decode(args: argparse.Namespace) -> dict[str, Any]:
    from safetensors.torch import save as to_safetensors

    _writable(args.output)
    weights = _decode_all(args, _open(args))
    apart = {name: t.detach().clone().contiguous() for name, t in weights.items()}  # safetensors refuses shared storage
    try:
        data = to_safetensors(apart, metadata={"format": "pt"})
    except Exception as error:
        raise MiracleError(f"these weights do not fit in a safetensors file: {error}") from error
    size = write_whole(args.output, data)
    return {
        "file": str(args.file),
        "output": str(args.output),
        "output_bytes": size,
        "tensors": len(weights),
        "sha256_weights": weights_sha256(weights),
    }


def _show_decode(result: dict[str, Any]) -> str:
    return f"{result['output']}: {result['tensors']} tensors, {result['output_bytes']:,} bytes"


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    archive = _open(args)
    decoded = _decode_all(args, archive)
    original = load_checkpoint(args.source)
    if args.model:
        original = _as_coded(load_into(load_model(args.model), original, str(args.source)))
    rows = tensor_rows(archive)
    for row in rows:
        name = row["name"]
        if name not in original or original[name].shape != decoded[name].shape:
            have = "has no such tensor" if name not in original else f"has it as {shape_text(original[name].shape)}"
            raise MiracleError(f"{args.file} holds {name} of shape {shape_text(row['shape'])}, but {args.source} {have}")
        row["relative_rms_error"] = _relative_rms(decoded[name], original[name])
        row["narrowed"] = row["kept"] is not None and row["kept"] != row["shape"]
    size = args.file.stat().st_size
    folded = any(r.kind == "constant" for r in archive.records) and not args.model
    return {"file": str(args.file), "checkpoint": str(args.source), "tensors": rows, "folded": folded, **totals(rows, size)}


def _as_coded(model: nn.Module) -> dict[str, Tensor]:
    """The weights that coding starts from: those of the model after BatchNorm has been folded."""
    bayesian = convert(model)
    return {**model.state_dict(), **bayesian.state_dict(), **{name: p.mean.detach() for name, p in posteriors(bayesian).items()}}


def _relative_rms(decoded: Tensor, original: Tensor) -> float | None:
    """Root mean square of the difference over that of the original; None where the original is zero and the other is not."""
    error = float((decoded.double() - original.double()).square().sum().sqrt())
    scale = float(original.double().square().sum().sqrt())
    return error / scale if scale else 0.0 if not error else None


def _show_compare(result: dict[str, Any]) -> str:
    rows = [
        (
            label(t) + (" *" if t["narrowed"] else ""),
            shape_text(t["shape"]),
            number_text(t["bits_per_weight"], ".4f"),
            number_text(t["relative_rms_error"], ".4f"),
        )
        for t in result["tensors"]
    ]
    notes = []
    if any(t["narrowed"] for t in result["tensors"]):
        notes.append("* hidden units were dropped and the others moved to the front: place by place there is little to compare")
    if result["folded"]:
        notes.append("BatchNorm was folded into the layers before it: with --model the checkpoint is folded alike before comparing")
    text = table(("tensor", "shape", "bits/weight", "relative RMS error"), rows, left=2)
    return "\n".join([text, *notes, "", sizes_text(result)])


def _plot(args: argparse.Namespace) -> dict[str, Any]:
    _writable(args.output)
    if not plots.available():
        raise MiracleError("drawing needs matplotlib: pip install 'miracle-ban[plot]'")
    items = [_plot_item(args, path) for path in args.what]
    drawings = [_drawing(item) for item in items]
    data = plots.plot_page([d for d, _ in drawings], [h for _, h in drawings], suffix=args.output.suffix)
    write_whole(args.output, data)
    return {"output": str(args.output), "drawn": items}


def _plot_item(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    if path.suffix == ".jsonl":
        return {"kind": "results", "file": str(path), "lines": _result_lines(path)}
    if path.suffix == ".json":
        return {"kind": "report", "file": str(path), "info": _report(path)}
    archive = _open(args, path)
    rows = tensor_rows(archive)
    codewords = [round(float(b), 3) for b in codeword_bits(archive)]
    return {"kind": "archive", "file": str(path), "tensors": rows, "codeword_bits": codewords, **totals(rows, path.stat().st_size)}


def _result_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            kept = {"bytes": float(line["bytes"]), "error": float(line["error"]), "coder": line.get("coder"), "seed": line.get("seed")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MiracleError(f"{path}, line {number}: no result with bytes and error ({type(error).__name__}: {error})") from None
        if not (kept["bytes"] > 0 and math.isfinite(kept["error"])):
            raise MiracleError(f"{path}, line {number}: bytes {line['bytes']} and error {line['error']} cannot be drawn")
        lines.append(kept)
    if not lines:
        raise MiracleError(f"{path} holds no result lines")
    return lines


def _report(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise MiracleError(f"{path} is not JSON: {error}") from None
    if not isinstance(info, dict) or not (info.get("fit") or info.get("tensors")):
        raise MiracleError(f"{path} is no report of `miracle-ban compress --report`: it has neither 'fit' nor 'tensors'")
    return info


def _drawing(item: dict[str, Any]) -> tuple[plots.Drawing, float]:
    """What draws an item, and how high that is, inches."""
    title = Path(item["file"]).name
    if item["kind"] == "results":
        return partial(plots.draw_results, title=title, lines=item["lines"]), 5.0
    if item["kind"] == "report":
        tensors = item["info"].get("tensors") or item["info"]["fit"].get("kl_bits_by_tensor") or ()
        return partial(plots.draw_report, title=title, info=item["info"]), 3.2 + plots.archive_height(len(tensors))
    names, bits = [label(t) for t in item["tensors"]], [t["bits"] for t in item["tensors"]]
    heading, words = f"{title}: {sizes_text(item)}", np.array(item["codeword_bits"])
    draw = partial(plots.draw_archive, title=heading, names=names, bits=bits, codeword_bits=words)
    return draw, plots.archive_height(len(names))


def _show_plot(result: dict[str, Any]) -> str:
    parts = [f"{item['file']}\n{_plot_table(item)}" for item in result["drawn"]]
    return "\n\n".join([*parts, result["output"]])


def _plot_table(item: dict[str, Any]) -> str:
    if item["kind"] == "results":
        lines = sorted(item["lines"], key=lambda line: (line["bytes"], line["error"]))
        rows = [(str(v["coder"]), str(v["seed"]), f"{v['bytes']:,.0f}", f"{v['error']:.2f}") for v in lines]
        return table(("coder", "seed", "bytes", "error, %"), rows)
    if item["kind"] == "archive":
        return bits_table(item["tensors"], item)
    info = item["info"]
    fit = info.get("fit") or {}
    kl_bits = fit.get("kl_bits_by_tensor", {})
    coded = {t["name"]: t["bits"] for t in info.get("tensors", ())}
    cells = [(str(name), number_text(kl_bits.get(name), ",.1f"), number_text(coded.get(name))) for name in coded or kl_bits]
    return table(("tensor", "KL after fit, bits", "bits in the file"), cells)
