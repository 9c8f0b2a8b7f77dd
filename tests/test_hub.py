"""Fetching files from a folder and from a server of our own."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from pathlib import Path

import helpers
import pytest
import torch

import miracle_ban
from miracle_ban import load, save
from miracle_ban.errors import MiracleError, MismatchError
from miracle_ban.hub import fetch, load_pretrained, manifest


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, counts what it is asked for, and hangs up in the middle of what is called "cut"."""

    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        if "cut" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"MBN1" + bytes(96))
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A network's file and the manifest of its folder."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(3)
    save(miracle_ban.encode(miracle_ban.convert(helpers.TinyNet()), block_bits=8.0, progress=False), folder / "tiny net.mban")
    data = (folder / "tiny net.mban").read_bytes()
    (folder / "manifest.json").write_text(
        json.dumps([{"file": "tiny net.mban", "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}])
    )
    return folder


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """Its address and what it was asked for; the cache is empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    handler = type("Own", (Server,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder))) as own:
        thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{own.server_address[1]}", handler.asked
        own.shutdown()
        thread.join()


def held() -> list[str]:
    """What lies in the cache."""
    folder = Path(torch.hub.get_dir()) / "miracle_ban"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_a_file_is_downloaded_once_and_checked(server, folder):
    url, asked = server
    data = (folder / "tiny net.mban").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    path = fetch(f"{url}/tiny%20net.mban", sha256=sha256.upper())
    assert path.read_bytes() == data
    assert path.name.endswith("-tiny_20net.mban")
    assert fetch(f"{url}/tiny%20net.mban", sha256=sha256) == fetch(f"{url}/tiny%20net.mban") == path
    assert len(asked) == 1
    assert helpers.same_state(load(path, helpers.TinyNet()).state_dict(), load(folder / "tiny net.mban", helpers.TinyNet()).state_dict())
    fetch(f"{url}/tiny%20net.mban", refresh=True)
    assert len(asked) == 2
    path.write_bytes(b"damaged")
    assert fetch(f"{url}/tiny%20net.mban", sha256=sha256).read_bytes() == data
    assert held() == [path.name]


def test_addresses_that_end_alike_do_not_meet_in_the_cache(server):
    url, _ = server
    assert fetch(f"{url}/manifest.json") != fetch(f"{url}/manifest.json?version=2")
    assert len(held()) == 2


@pytest.mark.parametrize(
    ("path", "options", "error", "says"),
    [
        ("/absent.mban", {}, MiracleError, "404"),
        ("/tiny%20net.mban", {"sha256": "0" * 64}, MismatchError, "not 0000"),
        ("/tiny%20net.mban", {"sha256": "abc"}, MiracleError, "64 hexadecimal digits"),
        ("/cut.mban", {}, MiracleError, "after 100 of 1000 bytes: call again"),
        ("/cut.mban", {"sha256": "0" * 64}, MiracleError, "after 100 of 1000"),
    ],
)
def test_what_cannot_be_had_is_said_and_leaves_nothing_behind(server, path, options, error, says):
    with pytest.raises(error, match=says):
        fetch(server[0] + path, **options)
    assert held() == []


def test_a_download_that_fails_leaves_the_old_file(server):
    url, _ = server
    path = fetch(f"{url}/manifest.json")
    before = path.read_bytes()
    with pytest.raises(MismatchError, match="changed"):
        fetch(f"{url}/manifest.json", sha256="0" * 64)
    assert path.read_bytes() == before


@pytest.mark.parametrize("source", ["http://127.0.0.1:9/net.mban", "https://nowhere.invalid/net.mban", "http://[bad/net.mban"])
def test_nobody_there_is_an_error(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(MiracleError, match="cannot download"):
        fetch(source)


def test_a_cache_that_cannot_be_written_is_an_error(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "file"))
    with pytest.raises(MiracleError, match="set_dir"):
        fetch(f"{server[0]}/manifest.json")


def test_paths_are_taken_as_they_are(folder, tmp_path):
    path = folder / "tiny net.mban"
    assert fetch(path) == fetch(str(path)) == path
    with pytest.raises(MismatchError, match="another file, or damaged"):
        fetch(path, sha256="f" * 64)
    with pytest.raises(MiracleError, match="no file"):
        fetch(tmp_path / "absent.mban")
    with pytest.raises(MiracleError, match="no file"):
        fetch("ftp://127.0.0.1/net.mban")


def test_a_network_of_a_folder_by_its_name(server, folder):
    expected = load(folder / "tiny net.mban", helpers.TinyNet()).state_dict()
    for place in (folder, str(folder), server[0], f"{server[0]}/"):
        for name in ("tiny net", "tiny net.mban"):
            assert helpers.same_state(load_pretrained(place, name, helpers.TinyNet()).state_dict(), expected)
    assert [p for p in server[1] if p.endswith(".mban")] == ["/tiny%20net.mban"]
    with pytest.raises(MismatchError, match=r"lists no network 'other'; it lists tiny net$"):
        load_pretrained(folder, "other", helpers.TinyNet())
    with pytest.raises(MismatchError, match="another architecture"):
        load_pretrained(folder, "tiny net", torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "text", ["{", "{}", "[3]", '[{"file": "x"}]', '[{"file": "../x", "sha256": "0"}]', '[{"file": "x", "sha256": 3}]', '"text"']
)
def test_a_manifest_that_is_none_is_an_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(MiracleError, match="manifest of"):
        manifest(tmp_path)


def test_the_pretrained_folder_is_one():
    folder = Path(__file__).parent.parent / "pretrained"
    cards = manifest(folder)
    assert {p.name for p in folder.glob("*.mban")} == set(cards)
    assert all(fetch(folder / name, sha256=card["sha256"]).stat().st_size == card["bytes"] for name, card in cards.items())
