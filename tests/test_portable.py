"""Decoding takes integers, moves and single IEEE operations only, so that it gives the same bits on every machine.

Two checks, each of which would let through what the other one finds. The text of the decoder's modules may use no other functions,
methods, operators and dtypes than those listed here. And while the golden files are decoded, every array operation is looked at:
floats may only meet floats of the same width, one operation at a time; what is rounded is listed. Mutants show that slips are found.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import miracle_ban

PACKAGE = Path(miracle_ban.__file__).parent
GOLDEN = Path(__file__).parent / "golden"
MODULES = ("bits", "randomness", "blocks", "tree", "trellis", "container", "decode")

# --- what the text may say ---

WRITING = {  # of encoders alone; nothing else may call them
    "NATS_PER_BIT", "parse_bytes", "BitWriter", "fit", "_huffman_lengths", "prior_code", "_write", "_write_record", "_write_unit_codes",
    "to_bytes", "size_bytes", "save", "write", "encode", "of", "write_many",
}  # fmt: skip
NUMPY = {
    "int8", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64", "ndarray", "dtype",  # dtypes
    "arange", "array", "asarray", "empty", "frombuffer", "full", "full_like", "zeros", "zeros_like",  # new arrays
    "abs", "cumsum", "diff", "maximum", "minimum", "isnan", "sqrt", "frexp", "ldexp",  # exact, but for the root, which is rounded once
    "argsort", "atleast_1d", "broadcast", "broadcast_arrays", "concatenate", "flatnonzero", "packbits", "stack", "take", "take_along_axis",
    "unpackbits", "where",  # moves
    "errstate",
}  # fmt: skip
WITH_DTYPE = {"arange": 2, "array": 2, "asarray": 2, "empty": 2, "frombuffer": 2, "full": 3, "zeros": 2}  # arguments, the dtype the last
METHODS = {
    "any", "all", "max", "min", "astype", "copy", "newbyteorder", "ravel", "reshape", "sum", "tolist", "view",  # of arrays
    "encode", "append", "bit_length", "count", "decode", "decompress", "decompressobj", "endswith", "from_bytes", "get", "isascii",
    "isdigit", "items", "join", "keys", "partition", "pop", "read_bytes", "split", "startswith", "values", "index", "add",  # of others
}  # fmt: skip
MATH = {"prod", "gcd"}
IMPORTS = {
    "__future__",
    "collections.abc",
    "dataclasses",
    "functools",
    "itertools",
    "math",
    "numpy",
    "os",
    "pathlib",
    "re",
    "typing",
    "zlib",
}
DIVIDING = {"_ratio", "_log"}  # of floats
FLOATS_FROM = {
    "node_values", "_log", "quantile", "prior_std", "octaves", "candidate_values", "codebook", "step_values", "_own", "_bfloat16",
    "_stored", "_block_values", "decode_steps", "stored_arrays",
}  # fmt: skip


def checked_nodes(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """(name of the function around it, node) of everything outside the writing parts."""
    found: list[tuple[str, ast.AST]] = []

    def walk(node: ast.AST, inside: str) -> None:
        name = getattr(node, "name", None) or (ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else None)
        if name in WRITING or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            return
        inside = node.name if isinstance(node, ast.FunctionDef) else inside
        found.append((inside, node))
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(tree, "")
    return found


def complaints(module: str, text: str) -> list[str]:
    """What a module says that a decoder must not."""
    said = []
    tree = ast.parse(text)
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for inside, node in checked_nodes(tree):
        where = f"{module}.{inside}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)[:60]}" if hasattr(node, "lineno") else module
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [] if node.level else [str(node.module)]
            said += [f"{where}: import of {n}" for n in names if n not in IMPORTS]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("np", "math"):
            if node.attr not in (NUMPY if node.value.id == "np" else MATH):
                said.append(f"{where}: not on the list")
            if node.attr in ("float32", "float64") and inside not in FLOATS_FROM:
                said.append(f"{where}: floats where there are none")
        elif isinstance(node, ast.Name) and node.id in WRITING:
            said.append(f"{where}: of the encoder")
        elif isinstance(node, (ast.BinOp, ast.AugAssign)):
            constant = isinstance(node, ast.BinOp) and all(isinstance(v, (ast.Constant, ast.UnaryOp)) for v in (node.left, node.right))
            if isinstance(node.op, ast.MatMult) or (isinstance(node.op, ast.Pow) and not constant):
                said.append(f"{where}: operator")
            if isinstance(node.op, ast.Div) and inside not in DIVIDING and "Path(" not in ast.unparse(node):
                said.append(f"{where}: division")
        elif isinstance(node, ast.Constant) and isinstance(node.value, float) and inside not in FLOATS_FROM | DIVIDING | {""}:
            said.append(f"{where}: a float where there are none")
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and not (isinstance(called.value, ast.Name) and called.value.id in ("np", "math")):
                foreign = isinstance(called.value, ast.Name) and called.value.id in (
                    "randomness",
                    "functools",
                    "itertools",
                    "os",
                    "re",
                    "zlib",
                )
                if called.attr not in METHODS | own and not foreign and called.attr not in known_elsewhere():
                    said.append(f"{where}: method not on the list")
            elif isinstance(called, ast.Name) and called.id in (
                "float",
                "round",
                "complex",
                "eval",
                "exec",
                "__import__",
                "compile",
                "getattr",
            ):
                said.append(f"{where}: call")
            elif isinstance(called, ast.Name) and called.id == "pow" and len(node.args) != 3:
                said.append(f"{where}: power")
            elif isinstance(called, ast.Attribute) and called.attr in WITH_DTYPE:
                if len(node.args) < WITH_DTYPE[called.attr] and not any(k.arg == "dtype" for k in node.keywords):
                    said.append(f"{where}: the platform's own dtype")
                if any(isinstance(a, ast.Name) and a.id in ("int", "float") for a in [*node.args, *(k.value for k in node.keywords)]):
                    said.append(f"{where}: the platform's own dtype")
    return said


@functools.cache
def known_elsewhere() -> set[str]:
    """Functions and methods of the decoder's own modules."""
    return {
        n.name for m in MODULES for n in ast.walk(ast.parse((PACKAGE / f"{m}.py").read_text())) if isinstance(n, ast.FunctionDef)
    } - WRITING


def test_the_decoder_says_nothing_that_machines_may_differ_in():
    assert not [c for m in MODULES for c in complaints(m, (PACKAGE / f"{m}.py").read_text())]


# --- what a run may do ---

ROUNDED = {"add", "subtract", "multiply", "divide", "sqrt"}  # once, to the nearest, by IEEE 754
EXACT = {"negative", "absolute", "minimum", "maximum", "isnan", "frexp", "ldexp", "greater", "greater_equal", "less", "less_equal", "equal",
         "not_equal", "conjugate"}  # fmt: skip


class Seen(np.ndarray):
    """An array that reports what is done with it and its like."""

    slips: set[str] = set()  # noqa: RUF012

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(v) if isinstance(v, Seen) else v for v in inputs]
        options["out"] = tuple(np.asarray(v) if isinstance(v, Seen) else v for v in options.get("out") or ()) or None
        result = getattr(ufunc, method)(*plain, **{k: v for k, v in options.items() if v is not None})
        arrays = [v.dtype for v in plain if isinstance(v, (np.ndarray, np.generic))]
        results = result if isinstance(result, tuple) else (result,)
        if any(d.kind in "fc" for d in [*arrays, *(np.asarray(v).dtype for v in results)]):
            floats = {d for d in arrays if d.kind == "f"}
            same = len(floats) == 1 and (len(arrays) == sum(d.kind == "f" for d in arrays) or ufunc.__name__ == "ldexp")
            if method != "__call__" or ufunc.__name__ not in ROUNDED | EXACT or not same:
                Seen.slips.add(f"{ufunc.__name__} {method} {[str(d) for d in arrays]}")
        return tuple(v.view(Seen) if isinstance(v, np.ndarray) else v for v in results) if isinstance(result, tuple) else look(result)

    def astype(self, dtype, *rest, **options):
        plain = np.asarray(self)
        result = plain.astype(dtype, *rest, **options)
        caller = sys._getframe(1).f_code.co_name
        if "f" in (plain.dtype.kind, result.dtype.kind) and caller != "_own":  # there the weights become what the tensor's dtype says
            exact = np.array_equal(plain, result.astype(plain.dtype))
            if not exact and (caller, result.dtype) != ("node_values", np.float32):  # rounded once
                Seen.slips.add(f"{plain.dtype} to {result.dtype} in {caller}")
        return result.view(Seen)

    def __setitem__(self, key, value):
        given = np.asarray(value)
        if "f" in (self.dtype.kind, given.dtype.kind) and given.dtype != self.dtype:
            Seen.slips.add(f"{given.dtype} put into {self.dtype}")
        super().__setitem__(key, value)

    def dot(self, *_):
        Seen.slips.add("dot")
        return super().dot(*_)


def look(result):
    """The same, looked at."""
    return result.view(Seen) if isinstance(result, np.ndarray) else result


class Spy:
    """Numpy, whose functions give arrays that report."""

    def __getattr__(self, name: str):
        thing = getattr(np, name)
        if isinstance(thing, (np.ufunc, type)) or not callable(thing):
            return thing if not isinstance(thing, np.ufunc) else lambda *a, **k: look(thing(*map(look, a), **k))

        def call(*arguments, **options):
            floats = {v.dtype for v in arguments if isinstance(v, np.ndarray) and v.dtype.kind in "fc"}
            result = thing(*arguments, **options)
            if len(floats) > 1 or (floats and name not in NUMPY - {"cumsum", "diff"}):
                Seen.slips.add(f"{name} of {sorted(map(str, floats))}")
            return [look(v) for v in result] if isinstance(result, list) else look(result)

        return call


def slips(package: str) -> tuple[set[str], dict[str, str]]:
    """Decode all golden files with a package; returns what it did that machines may differ in, and the weights."""
    loaded = {m: importlib.import_module(f"{package}.{m}") for m in MODULES}
    for module in loaded.values():
        module.np = Spy()
    loaded["randomness"].quantiles.cache_clear()
    loaded["randomness"]._keys.cache_clear()
    for name in ("_MULTIPLIERS",):
        setattr(loaded["randomness"], name, look(getattr(loaded["randomness"], name)))
    Seen.slips = set()
    weights = {}
    try:
        for name, said in json.loads((GOLDEN / "manifest.json").read_text()).items():
            archive = loaded["decode"].open(GOLDEN / name)
            entries = None if archive.names else [(n, tuple(s), d) for n, s, d in said["entries"]]
            arrays = loaded["decode"].decode_arrays(archive, entries)
            weights[name] = {key: np.asarray(a).tobytes() for key, a in arrays.items()}
    finally:
        for module in loaded.values():
            module.np = np
        loaded["randomness"].quantiles.cache_clear()
        loaded["randomness"]._keys.cache_clear()
        loaded["randomness"]._MULTIPLIERS = np.asarray(loaded["randomness"]._MULTIPLIERS)
    return Seen.slips, weights


def copy_of(folder: Path, number: int) -> Path:
    """The decoder's modules as a package of their own; it is on the path of imports."""
    package = folder / f"mutant_{number}"
    package.mkdir()
    for name in (*MODULES, "errors", "files"):
        shutil.copy(PACKAGE / f"{name}.py", package)
    shutil.copy(PACKAGE / "quantiles.bin", package)
    (package / "__init__.py").write_text("")
    return package


@pytest.fixture
def mutants(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [m for m in sys.modules if m.startswith("mutant_")]:
        del sys.modules[name]


NUMBERS = itertools.count()


def test_a_run_does_nothing_that_machines_may_differ_in(mutants):
    package = copy_of(mutants, next(NUMBERS))
    found, weights = slips(package.name)
    assert not found
    plain = importlib.import_module(f"{package.name}.decode")
    for name, said in json.loads((GOLDEN / "manifest.json").read_text()).items():
        archive = plain.open(GOLDEN / name)
        arrays = plain.decode_arrays(archive, None if archive.names else [(n, tuple(s), d) for n, s, d in said["entries"]])
        assert weights[name] == {key: a.tobytes() for key, a in arrays.items()}


MUTATIONS = [  # module, text, replacement: what somebody might write one day
    ("decode", "coded * std[0]", "coded * float(std[0])"),
    ("decode", "coded * std[0]", "coded.astype(np.float64) * std[0]"),
    ("decode", "coded * std[0]", "np.multiply.outer(coded, std)[:, 0]"),
    ("decode", "coded * std[0]", "np.dot(coded[:, None], std[:1])"),
    ("decode", "coded * std[0]", "coded[:, None] @ std[:1]"),
    ("decode", "coded * std[0]", "coded * std.mean()"),
    ("decode", "coded * std[0]", "(coded - coded.sum() * 0.0) * std[0]"),
    ("decode", "np.arange(len(record.index), dtype=np.int64)", "np.arange(len(record.index))"),
    ("blocks", "signed.astype(np.float32) * np.float32(randomness.NORMAL_UNIT)", "signed * randomness.NORMAL_UNIT"),
    ("blocks", "signed.astype(np.float32) * np.float32(randomness.NORMAL_UNIT)", "signed * np.float32(randomness.NORMAL_UNIT)"),
    ("blocks", "signed.astype(np.float32) * np.float32(randomness.NORMAL_UNIT)", "np.float32(2) ** -20 * signed.astype(np.float32)"),
    ("randomness", "return quantiles()[halves[:, :count]]", "return np.random.default_rng(seed).normal(size=halves.shape)[:, :count]"),
    ("tree", "np.sqrt(-_log(np.minimum(p, 1.0 - p)))", "np.sqrt(-np.log(np.minimum(p, 1.0 - p)))"),
    ("tree", "value = value * x + c", "value = np.polyval([1.0, 0.0], value) * x + c"),
    ("tree", "np.asarray(point, np.float64) + 0.5", "np.asarray(point, np.float32) + 0.5"),
    ("tree", "exponent.astype(np.float64) * _LN2", "exponent * _LN2"),
    ("container", "np.ldexp((8 + codes % 8).astype(np.float64), codes // 8 - 28)", "(8.0 + codes % 8) * 2.0 ** (codes // 8 - 28)"),
    ("container", "np.ldexp((8 + codes % 8).astype(np.float64), codes // 8 - 28)", "np.exp2(codes / 8 - 25)"),
    ("container", "return np.frexp(np.asarray(index, np.float64))[1].astype(np.int64) - 1", "return np.log2(index).astype(np.int64)"),
    ("trellis", "rows.astype(np.float32) * np.float32(randomness.NORMAL_UNIT)", "rows * np.float32(randomness.NORMAL_UNIT)"),
    ("trellis", "out = np.empty(rate.width * total, np.float32)", "out = np.empty(rate.width * total, np.float16)"),
    ("trellis", "first = np.zeros(1 << log2_frames, np.int64)", "first = np.zeros(1 << log2_frames, int)"),
    ("trellis", "return step * self.rate // RATE_UNIT", "return (step * (self.rate / RATE_UNIT)).astype(np.int64)"),
    ("bits", "sum(_WINDOWS >> n for n in lengths) > _WINDOWS", "sum(2.0**-n for n in lengths) > 1.0"),
    ("bits", "return np.array(symbols, np.int64) + self.first", "return np.array(symbols) + self.first"),
]


@pytest.mark.parametrize(("module", "text", "replacement"), MUTATIONS, ids=lambda v: v[:40])
def test_mutants_are_found(mutants, module, text, replacement):
    package = copy_of(mutants, next(NUMBERS))
    path = package / f"{module}.py"
    assert path.read_text().count(text) >= 1
    path.write_text(path.read_text().replace(text, replacement))
    assert complaints(module, path.read_text()) or slips(package.name)[0]


def test_each_check_finds_what_the_other_cannot(mutants):
    """A sum of floats reads like one of integers; a default dtype is right on this machine."""
    summed = [("decode", "coded * std[0]", "(coded - coded.sum()) * std[0]"), ("tree", "np.zeros_like(s)", "np.zeros_like(s) + s.sum()")]
    for module, text, replacement in summed:
        package = copy_of(mutants, next(NUMBERS))
        path = package / f"{module}.py"
        path.write_text(path.read_text().replace(text, replacement))
        assert not complaints(module, path.read_text())
        assert any(s.startswith("add reduce") for s in slips(package.name)[0])
    package = copy_of(mutants, next(NUMBERS))
    path = package / "trellis.py"
    path.write_text(path.read_text().replace("np.zeros(1 << log2_frames, np.int64)", "np.zeros(1 << log2_frames, int)"))
    assert complaints("trellis", path.read_text())
    assert not slips(package.name)[0]
