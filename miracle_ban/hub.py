"""Files from elsewhere: fetched once into the folder of `torch.hub`, checked, then opened like any other.

A folder of networks, here or behind a URL, holds `.mban` files and a `manifest.json`: a list of objects with at least `file` and
`sha256`. Leans on `decode`, `files` and torch.hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import torch
from torch import nn

from .errors import MiracleError, MismatchError
from .files import write_whole
from .load import load

Module = TypeVar("Module", bound=nn.Module)
_REMOTE = re.compile(r"https?://|file://")  # what else `urllib` opens is no place for networks
_MANIFEST = "manifest.json"
_PATIENCE = 30.0  # seconds without a byte
_LARGEST_MIB = 4096


def fetch(source: str | os.PathLike[str], *, sha256: str | None = None, refresh: bool = False) -> Path:
    """The local path of a file that is given by path or URL; what is behind a URL is downloaded once.

    A download lands in `torch.hub.get_dir()/miracle_ban`, under a name that follows from the whole URL, written whole or not at
    all. Of a file in the cache the checksum is tested as well, and it is downloaded anew if that is wrong.

    Args:
        source: a path, or a URL of http, https or file.
        sha256: what the file's SHA-256 must be, 64 hexadecimal digits (either case); None trusts what comes.
        refresh: download even what is in the cache.

    Returns:
        Where the file is.

    Raises:
        MismatchError: the file has another SHA-256 than `sha256`.
        MiracleError: there is no such file, it cannot be downloaded or stored, or `sha256` is none.

    Example:
        >>> fetch("https://example.org/net.mban", sha256="9f86d0...")  # doctest: +SKIP
    """
    wanted = None if sha256 is None else str(sha256).lower()
    if wanted is not None and not re.fullmatch("[0-9a-f]{64}", wanted):
        raise MiracleError(f"sha256 must be 64 hexadecimal digits, not {sha256!r}: sha256sum prints them")
    if not _REMOTE.match(str(source)):
        path = Path(source)
        if not path.is_file():
            raise MiracleError(f"there is no file {path}")
        if wanted is not None and wanted != (found := _sha256(path)):
            raise MismatchError(f"{path} has the SHA-256 {found}, not {wanted}: it is another file, or damaged")
        return path
    url = str(source)
    folder = Path(torch.hub.get_dir()) / "miracle_ban"
    name = re.sub(r"[^\w.-]", "_", re.split("[?#]", url)[0].rpartition("/")[2]) or "file"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if not refresh and path.is_file() and wanted in (None, _sha256(path)):
        return path
    data = _download(url)
    found = hashlib.sha256(data).hexdigest()
    if wanted not in (None, found):
        raise MismatchError(f"{url} has the SHA-256 {found}, not {wanted}: it was changed, or damaged on the way")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MiracleError(f"cannot make the folder {folder}: {error.strerror or error}; torch.hub.set_dir chooses another") from None
    write_whole(path, data)
    return path


def load_pretrained(folder: str | os.PathLike[str], name: str, model: Module) -> Module:
    """Load the network called `name` of a folder into `model`, in place, and return it.

    Args:
        folder: a path or URL of a folder with a `manifest.json`.
        name: of the file, with or without ".mban".
        model: an instance of its architecture.

    Raises:
        MismatchError: the folder lists no such network, or the file is not the one that it lists.
        MiracleError: see `fetch` and `load`.

    Example:
        >>> net = load_pretrained("pretrained", "lenet5-mnist-1140", LeNet5())  # doctest: +SKIP
    """
    cards = manifest(folder)
    file = name if name in cards else f"{name}.mban"
    if file not in cards:
        raise MismatchError(f"{folder} lists no network {name!r}; it lists {', '.join(n.removesuffix('.mban') for n in cards)}")
    return load(fetch(_inside(folder, file), sha256=cards[file]["sha256"]), model)


def manifest(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """What a folder's `manifest.json` says of each of its files, by file name; of a URL it is downloaded every time.

    Raises:
        MiracleError: it cannot be read, or is no list of objects with `file` and `sha256`.
    """
    path = fetch(_inside(folder, _MANIFEST), refresh=True)
    try:
        listed = json.loads(path.read_bytes())
        cards = {card["file"]: card for card in listed}
        good = isinstance(listed, list) and all(
            isinstance(c["sha256"], str) and n == Path(n).name and n not in ("", "..") for n, c in cards.items()
        )
    except (ValueError, KeyError, TypeError) as error:
        raise MiracleError(f"the manifest of {folder} cannot be read ({type(error).__name__}: {error})") from error
    if not good:
        raise MiracleError(f"the manifest of {folder} is no list of files in it with the SHA-256 of each")
    return cards


def _inside(folder: str | os.PathLike[str], name: str) -> str:
    return f"{str(folder).rstrip('/')}/{quote(name)}" if _REMOTE.match(str(folder)) else str(Path(folder) / name)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(url: str) -> bytes:
    parts: list[bytes] = []
    try:
        with urlopen(Request(url, headers={"User-Agent": "miracle_ban"}), timeout=_PATIENCE) as answer:
            declared = answer.headers.get("Content-Length")
            while part := answer.read(1 << 20):
                parts.append(part)
                if len(parts) > _LARGEST_MIB:
                    raise MiracleError(f"{url} holds more than {_LARGEST_MIB} MiB: it is no .mban file")
    except HTTPError as error:
        raise MiracleError(f"cannot download {url}: {error.code} {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise MiracleError(f"cannot download {url}: {reason}; check the address and the connection") from error
    data = b"".join(parts)
    if declared is not None and len(data) != int(declared):
        raise MiracleError(f"the download of {url} ended after {len(data)} of {declared} bytes: call again")
    return data
