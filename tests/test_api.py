from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import miracle_ban
from miracle_ban.hub import fetch, load_pretrained
from miracle_ban.penalty import Penalty

PACKAGE = Path(miracle_ban.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# the house of the design, top to bottom: a module imports only from those above it
ORDER = [
    "errors", "bits", "files", "randomness", "blocks", "tree", "trellis", "container", "decode", "network", "load", "distributed",
    "gaussian", "coders", "layers", "structure", "convert", "inputs", "teaching", "measure", "unfold", "priors", "exposed", "passes",
    "sensitivity", "reconstruct", "ban", "recursion", "checkpoint", "feed", "course", "plan", "objective", "train", "penalty", "noise",
    "graphs", "harden", "packing", "block_packing", "trellis_packing", "rescale", "encode", "compress", "hub", "sources", "plots",
    "demo", "listing", "cli",
]  # fmt: skip
FROZEN = {"errors", "bits", "files", "randomness", "blocks", "tree", "trellis", "container", "decode"}

SIGNATURES = {
    "convert": ["model", "*", "where"],
    "kl": ["model"],
    "fit": ["model", "batches", "loss", "*", "budget", "epochs"],
    "encode": ["model", "batches", "loss", "*", "coder", "seed"],
    "compress": ["net", "batches", "loss", "*", "budget"],
    "harden": ["net", "batches", "loss", "*", "bits", "epochs"],
    "rescale": ["archive", "net", "batches", "loss", "*", "budget", "epochs"],
    "save": ["archive", "path"],
    "open": ["path"],
    "decode": ["archive"],
    "load": ["path", "model", "*", "device"],
    "unfold": ["net", "inputs"],
}
DEFAULTS = {
    ("convert", "where"): None,
    ("fit", "budget"): None,
    ("encode", "batches"): None,
    ("encode", "loss"): None,
    ("encode", "coder"): "gprs",
    ("encode", "seed"): 0,
    ("compress", "batches"): None,
    ("compress", "loss"): None,
    ("load", "device"): None,
}


def module_of(path: Path) -> str:
    """Its name in ORDER: a package counts as one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(path: Path, *, everywhere: bool = False) -> set[str]:
    """Modules of the package that a file imports when it is imported itself (or anywhere in it)."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("miracle_ban")):
            inside = len(path.relative_to(PACKAGE).parts) - 1  # a sub-package's own modules are one dot away
            if node.level == 1 and inside:
                continue
            module = (node.module or "").removeprefix("miracle_ban").strip(".")
            names |= {module.split(".")[0]} if module else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("miracle_ban.")}
    return {n for n in names if not n.startswith("__")}


def all_names(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a file calls."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            found.append((node.lineno, ast.unparse(node.func)))
    return found


# --- the public names ---


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_functions_have_their_signatures(name):
    function = getattr(miracle_ban, name)
    parameters = list(inspect.signature(function).parameters.values())
    written: list[str] = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in written:
            written.append("*")
        written.append(p.name)
    wanted = SIGNATURES[name]
    if "*" in wanted:
        star = wanted.index("*")
        assert written[: star + 1] == wanted[: star + 1]
        assert set(wanted[star:]) <= set(written)
    else:
        assert written[: len(wanted)] == wanted
        required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        assert required == wanted
    for (function_name, parameter), default in DEFAULTS.items():
        if function_name == name:
            assert inspect.signature(function).parameters[parameter].default == default


def test_public_names_are_listed():
    assert {*SIGNATURES, "MiracleError", "FitReport"} <= set(miracle_ban.__all__)
    assert sorted(miracle_ban.__all__) == list(miracle_ban.__all__)
    assert all(hasattr(miracle_ban, n) for n in miracle_ban.__all__)
    assert issubclass(miracle_ban.MiracleError, Exception)


def test_every_coder_of_the_package_is_found_by_its_name():
    for name in ("gprs", "minimal-random"):
        assert miracle_ban.coders.get(name).name == name
    assert set(miracle_ban.coders.IDS) <= set(miracle_ban.container.CODERS)
    assert all(miracle_ban.container.CODERS[i] == name for name, i in miracle_ban.coders.IDS.items())


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_functions_say_what_they_take_give_and_raise(name):
    text = inspect.getdoc(getattr(miracle_ban, name)) or ""
    assert len(text.splitlines()[0]) > 15
    assert "Raises:" in text
    if name in {"convert", "kl", "fit", "encode", "compress", "decode"}:
        assert "Args:" in text
        assert "Returns:" in text
    if "Args:" in text:
        explained = text.split("Args:")[1]
        for parameter in inspect.signature(getattr(miracle_ban, name)).parameters:
            assert parameter in explained, f"{name}: {parameter} is not explained"


def test_every_public_class_and_function_has_a_docstring():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if path.stat().st_size:
            assert ast.get_docstring(tree), f"{path.name} has no docstring"
        for node in tree.body:
            overload = isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "overload" for d in node.decorator_list)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not overload:
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_examples_in_docstrings_are_true(path):
    if path.name != "__main__.py":
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        assert doctest.testmod(importlib.import_module(name), raise_on_error=False).failed == 0


def test_the_main_names_have_examples():
    things = [getattr(miracle_ban, n) for n in ("convert", "kl", "compress", "decode")] + [
        miracle_ban.coders.get,
        fetch,
        load_pretrained,
        Penalty,
    ]
    assert all("Example:" in (inspect.getdoc(thing) or "") for thing in things)


def test_every_error_is_a_miracle_error():
    from miracle_ban import errors

    for name, thing in vars(errors).items():
        if inspect.isclass(thing) and issubclass(thing, Exception) and not issubclass(thing, Warning):
            assert issubclass(thing, miracle_ban.MiracleError), name


# --- the house ---


def test_every_module_has_its_place():
    assert {module_of(p) for p in SOURCES} - {"__init__", "__main__"} <= set(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_from_those_above_them(path):
    module = module_of(path)
    if module in {"__init__", "__main__"}:
        return
    below = {n for n in own_imports(path) if ORDER.index(n) >= ORDER.index(module) and n != module}
    assert not below, f"{path.name} imports {below}"


def reach(module: str) -> set[str]:
    """Everything that a module imports, directly or not, anywhere in it."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for path in SOURCES:
            if module_of(path) == name:
                todo += own_imports(path, everywhere=True)
    return seen


def test_decoding_imports_nothing_of_training():
    assert reach("decode") <= FROZEN | {"network", "load"}  # `Archive.__getitem__`, which gives a torch tensor, calls on `load`
    assert reach("load") <= FROZEN | {"network", "load"}
    inside = {(module_of(p), n) for p in SOURCES if module_of(p) in FROZEN for n in own_imports(p, everywhere=True) - own_imports(p)}
    assert inside == {("container", "load")}


@pytest.mark.parametrize("module", sorted(FROZEN))
def test_the_frozen_core_leans_on_numpy_and_the_standard_library_alone(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in tree.body:  # what stands under TYPE_CHECKING is for readers
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        for name in names:
            assert name.split(".")[0] in {*sys.stdlib_module_names, "numpy"}, name


def test_nothing_prints_but_the_command_line():
    for path in SOURCES:
        if module_of(path) not in {"cli", "demo", "__main__"}:
            assert not [line for line, name in all_names(path) if name == "print"], path.name


def test_only_training_seeds_torch():
    for path in SOURCES:
        if module_of(path) not in {"train", "demo", "cli"}:
            called = [
                name
                for _, name in all_names(path)
                if name in {"torch.manual_seed", "torch.cuda.manual_seed", "numpy.random.seed", "np.random.seed"}
            ]
            assert not called, path.name


def test_decoding_draws_nothing_from_numpy_or_torch():
    for path in SOURCES:
        if module_of(path) in FROZEN:
            for line, name in all_names(path):
                assert "random." not in name or name.startswith("randomness."), f"{path.name}:{line} {name}"
                assert not name.startswith(("torch.rand", "torch.normal", "special.", "math.exp")), f"{path.name}:{line} {name}"


def in_a_fresh_process(code: str, *arguments: str) -> str:
    """What a Python that is as strict as can be prints; warnings are errors."""
    environment = {**os.environ, "PYTHONWARNINGS": "error:::miracle_ban"}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_importing_the_package_imports_nothing_that_is_not_asked_for():
    code = "import sys, miracle_ban; dir(miracle_ban); print(*sorted({m.split('.')[0] for m in sys.modules} & {'numpy', 'scipy', 'torch'}))"
    assert in_a_fresh_process(code).strip() == ""
    code = "import sys; from miracle_ban import MiracleError, open, save, decode_arrays; print('torch' in sys.modules)"
    assert in_a_fresh_process(code).strip() == "False"


def test_every_public_name_is_there_whichever_module_came_first():
    """A function and the module of the same name: the function is what `miracle_ban.encode` means."""
    code = (
        "import importlib, sys, types\n"
        "for module in ('decode', 'encode', 'convert', 'load', 'train', 'coders'): importlib.import_module('miracle_ban.' + module)\n"
        "import miracle_ban\n"
        "from miracle_ban import *\n"
        "assert set(miracle_ban.__all__) <= set(dir(miracle_ban))\n"
        "for name in set(miracle_ban.__all__) - {'__version__'}:\n"
        "    assert callable(getattr(miracle_ban, name)) and callable(globals()[name]), name\n"
        "assert miracle_ban.coders.get('gprs').name == 'gprs'\n"
        "assert isinstance(sys.modules['miracle_ban.decode'], types.ModuleType)\n"
        "assert not hasattr(miracle_ban, 'nonsense') and not hasattr(miracle_ban, '_nonsense')\n"
    )
    assert in_a_fresh_process(code) == ""


def test_type_checkers_see_the_names_that_there_are():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    checked = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    homes = {a.name: str(n.module) for n in checked.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert homes == miracle_ban._HOMES
    assert {*homes, "__version__"} == set(miracle_ban.__all__)


WITHOUT_TORCH = """
import hashlib, importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "scipy", "safetensors", "tqdm", "matplotlib"}:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Blocker())
import numpy as np
from miracle_ban import MiracleError, decode_array, decode_arrays, open, save
from pathlib import Path

folder, digests = Path(sys.argv[1]), {}
for name, said in json.loads((folder / "manifest.json").read_text()).items():
    archive = open(folder / name)
    assert save(archive, sys.argv[2]) == len((folder / name).read_bytes())
    arrays = decode_arrays(archive, None if archive.names else [(n, tuple(s), d) for n, s, d in said["entries"]])
    sha = hashlib.sha256()
    for key, a in arrays.items():
        assert key in archive.keys() and np.array_equal(decode_array(archive, key), a)
        dtype = archive.records[archive.keys().index(key)].dtype
        sha.update(f"{key} {list(a.shape)} torch.{dtype}\\n".encode())
        a = (a.view(np.uint32) >> 16).astype("<u2") if dtype == "bfloat16" else a
        sha.update(a.astype(a.dtype.newbyteorder("<")).tobytes())
    digests[name] = sha.hexdigest()
    for call in (lambda: decode_array(archive, "no such tensor"), lambda: decode_arrays(archive, [("a", (1,), "float32")])):
        try:
            call()
        except MiracleError:
            continue
        raise AssertionError(name)
own = sorted(m.removeprefix("miracle_ban.") for m in sys.modules if m.startswith("miracle_ban."))
foreign = sorted({m.split(".")[0] for m in sys.modules} - set(sys.stdlib_module_names) - {"miracle_ban", "__main__", "sitecustomize"})
print(json.dumps({"digests": digests, "own": own, "foreign": [m for m in foreign if not m.startswith(("_", "a1_"))]}))
"""


def test_everything_decodes_where_only_numpy_is_installed(tmp_path):
    golden = Path(__file__).parent / "golden"
    said = json.loads(in_a_fresh_process(WITHOUT_TORCH, str(golden), str(tmp_path / "copy.mban")))
    assert said["foreign"] == ["numpy"]
    assert said["own"] == sorted(FROZEN)
    assert said["digests"] == {name: s["weights_sha256"] for name, s in json.loads((golden / "manifest.json").read_text()).items()}


def test_importing_the_package_starts_no_plotting_and_no_cuda_and_is_quiet():
    code = (
        "import sys, miracle_ban, torch\n"
        "[getattr(miracle_ban, name) for name in miracle_ban.__all__]\n"
        "loaded = [m for m in ('matplotlib', 'torchvision', 'miracle_ban.cli', 'miracle_ban.demo') if m in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert torch.get_default_dtype() == torch.float32\n"
    )
    assert in_a_fresh_process(code) == ""


def test_the_version_is_that_of_the_project():
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'version = "{miracle_ban.__version__}"' in text or "dynamic" in text
