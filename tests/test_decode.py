from __future__ import annotations

import copy
import errno
import os
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_decoder import File
from torch import nn

import miracle_ban
from miracle_ban import MiracleError, decode, encode, load, save
from miracle_ban import open as open_archive
from miracle_ban.container import Archive, Record, fingerprint, parse, prior_std
from miracle_ban.errors import FileFormatError, MismatchError, NotAnArchiveError

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def archives(fitted) -> dict[bool, Archive]:
    """The fitted network's archive without and with names."""
    return {names: encode(copy.deepcopy(fitted[0]), names=names, budget="1 MB", **QUIET) for names in (False, True)}


@pytest.fixture
def files(archives, tmp_path) -> dict[bool, Path]:
    paths = {}
    for names, archive in archives.items():
        paths[names] = tmp_path / f"net-{names}.mban"
        save(archive, paths[names])
    return paths


@pytest.fixture(scope="module")
def expected(archives) -> dict[str, torch.Tensor]:
    return decode(parse(archives[True].to_bytes()))


# --- round trip ---


def test_a_file_loads_into_a_fresh_instance(files, expected):
    for path in files.values():
        net = helpers.TinyNet()
        assert load(path, net) is net
        assert helpers.same_state(net.state_dict(), expected)
        assert load(path, helpers.TinyNet(), device="cpu").conv.weight.device.type == "cpu"
    assert type(net) is helpers.TinyNet
    assert type(net.conv) is nn.Conv2d
    assert not any("miracle" in type(m).__module__ for m in net.modules())


def test_opening_decodes_nothing_and_saving_again_changes_nothing(files, archives, tmp_path):
    for names, path in files.items():
        archive = open_archive(path)
        assert archive.to_bytes() == path.read_bytes() == archives[names].to_bytes()
        assert save(archive, tmp_path / "copy.mban") == path.stat().st_size


def test_tensors_decode_alone_and_in_any_order(files, expected):
    archive = open_archive(files[True])
    names = archive.keys()
    assert names == list(expected)
    for seed in range(3):
        random.Random(seed).shuffle(names)
        alone = {n: archive[n] for n in names}
        assert helpers.same_state({n: alone[n] for n in expected}, expected)


def test_decoding_does_not_touch_the_model_it_is_given(files, expected):
    net = helpers.TinyNet()
    before = helpers.weight_state(net)
    assert helpers.same_state(decode(open_archive(files[False]), net), expected)
    assert helpers.same_state(net.state_dict(), before)


def test_decoded_tensors_are_on_their_own(files):
    archive = open_archive(files[True])
    first = decode(archive)
    for t in first.values():
        t.add_(1.0)
    assert not torch.equal(first["conv.weight"], decode(archive)["conv.weight"])


def test_a_default_dtype_of_64_bits_changes_nothing(files, expected):
    torch.set_default_dtype(torch.float64)
    assert helpers.same_state(decode(open_archive(files[True])), expected)


SCRIPT = """
import sys, torch, helpers, miracle_ban
torch.set_num_threads(int(sys.argv[2]))
torch.set_default_dtype(getattr(torch, sys.argv[3]))
net = helpers.TinyNet().to(torch.float32)
print(helpers.digest(miracle_ban.load(sys.argv[1], net).state_dict()))
"""


@pytest.mark.parametrize(("threads", "dtype"), [(1, "float32"), (2, "float64")])
def test_a_fresh_process_gets_the_same_bits(files, expected, threads, dtype):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", SCRIPT, str(files[False]), str(threads), dtype]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert result.stdout.strip() == helpers.digest(expected)


def test_decoding_agrees_with_the_reference_decoder(archives):
    data = archives[True].to_bytes()
    archive, file = parse(data), File(data)
    for i, r in enumerate(archive.records):
        assert file.tensor(i) == helpers.tensor_bytes(archive[str(r.name)])


@pytest.mark.parametrize(
    ("shape", "kept", "codes", "blocks"),
    [
        ((6, 5), (None, None), [0, 200, 190, 0, 213, 7], 3),
        ((6, 5), (4, 3), [201], 2),
        ((40,), (37, None), [180], 1),
        ((), (None, None), [200], 1),
        ((3, 2, 2), (2, None), [0, 255], 4),
        ((50,), (None, None), [200], 7),
    ],
)
def test_tensors_of_all_kinds_agree_with_the_reference_decoder(shape, kept, codes, blocks):
    index = np.array([1, 5, 300, 70_000, 2, 9, 1 << 30])[:blocks]
    record = Record("coded", kept, np.array(codes, np.uint8), index, name="w", shape=shape, dtype="float32")
    other = Record("coded", prior_codes=np.array([199], np.uint8), index=np.array([4]), name="v", shape=(2,), dtype="float32")
    data = Archive([other, record], seed=(1 << 63) + 5).to_bytes()
    assert File(data).tensor(1) == helpers.tensor_bytes(parse(data)["w"])


def test_weights_are_exact_products():
    record = Record("coded", prior_codes=np.array([203], np.uint8), index=np.arange(1, 11), name="w", shape=(640,), dtype="float32")
    weights = parse(Archive([record]).to_bytes())["w"].numpy().astype(np.float64)
    std = float(prior_std(np.array([203]))[0])
    units = weights / std * 2**20
    assert np.abs(units - np.round(units)).max() < 0.5  # float32(std) * float32(z): one rounding of a 4-bit by a 22-bit number
    exact = np.round(units) * std / 2**20
    assert (exact.astype(np.float32) == weights.astype(np.float32)).all()


# --- the wrong model ---


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.last = nn.Conv2d(1, 8, 3), nn.Linear(72, 16), nn.Linear(16, 3)


@pytest.mark.parametrize(
    "model",
    [
        lambda: helpers.TinyNet(units=17),
        Renamed,
        lambda: nn.Linear(3, 2),
        lambda: nn.Sequential(),
        lambda: nn.Sequential(helpers.TinyNet()),
        lambda: nn.ModuleList([helpers.TinyNet(), nn.Linear(2, 2)]),
    ],
)
def test_the_wrong_model_is_a_mismatch_and_stays_as_it_was(files, model):
    for names, path in files.items():
        net = model()
        before = helpers.weight_state(net)
        with pytest.raises(MismatchError, match="another architecture") as error:
            load(path, net)
        assert helpers.same_state(net.state_dict(), before)
        assert ("only in the model" in str(error.value)) == names


def test_the_message_names_what_differs(files):
    with pytest.raises(MismatchError, match=r"fc1\.weight \(17, 72\)"):
        load(files[True], helpers.TinyNet(units=17))


# --- files that cannot be read or written ---


def test_files_that_cannot_be_read_are_errors_that_name_them(tmp_path):
    for path in (tmp_path / "missing.mban", tmp_path, tmp_path / "missing" / "net.mban"):
        with pytest.raises(MiracleError, match=path.name):
            open_archive(path)
    (tmp_path / "empty.mban").write_bytes(b"")
    with pytest.raises(NotAnArchiveError, match=r"empty\.mban"):
        open_archive(tmp_path / "empty.mban")


def test_damaged_files_are_errors_that_name_them(files):
    data = files[True].read_bytes()
    for damaged in (data[:-1], data[:20], data + b"\0", data[:30] + bytes([data[30] ^ 4]) + data[31:]):
        files[True].write_bytes(damaged)
        for read in (open_archive, lambda p: load(p, helpers.TinyNet())):
            with pytest.raises(FileFormatError, match="net-True"):
                read(files[True])


def test_text_paths_work(archives, tmp_path):
    path = str(tmp_path / "net.mban")
    assert save(archives[True], path) == os.path.getsize(path)
    assert open_archive(path).keys()


def test_a_missing_folder_is_an_error(archives, tmp_path):
    with pytest.raises(MiracleError, match="cannot write"):
        save(archives[True], tmp_path / "missing" / "net.mban")
    (tmp_path / "file").write_text("x")
    with pytest.raises(MiracleError, match="cannot write"):
        save(archives[True], tmp_path / "file" / "net.mban")
    with pytest.raises(MiracleError, match="cannot write"):
        save(archives[True], tmp_path)  # a folder itself


def test_what_is_no_archive_is_not_saved(tmp_path):
    with pytest.raises(MiracleError, match="not a value of type TinyNet"):
        save(helpers.TinyNet(), tmp_path / "net.mban")


@pytest.mark.parametrize(("where", "code"), [("fsync", errno.ENOSPC), ("replace", errno.EACCES), ("open", errno.EROFS)])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(archives, files, monkeypatch, where, code):
    path = files[True]
    before, around = path.read_bytes(), sorted(path.parent.iterdir())

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*(("miracle_ban.files.open", fail) if where == "open" else (os, where, fail)), raising=where != "open")
    with pytest.raises(MiracleError, match=os.strerror(code)):
        save(archives[False], path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == around


def test_the_mode_of_a_new_file_is_the_usual_one(archives, tmp_path):
    save(archives[True], tmp_path / "net.mban")
    (tmp_path / "other").write_text("x")
    assert stat.S_IMODE((tmp_path / "net.mban").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_two_writers_of_one_path_leave_one_whole_file(archives, tmp_path):
    path = tmp_path / "net.mban"
    failures = []

    def write(archive: Archive) -> None:
        try:
            for _ in range(20):
                save(archive, path)
                open_archive(path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(a,)) for a in archives.values()]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert path.read_bytes() in [a.to_bytes() for a in archives.values()]
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_of_one_network_decodes_in_an_equal_class_under_another_name(files, expected):
    class Other(helpers.TinyNet):
        pass

    assert helpers.same_state(load(files[False], Other()).state_dict(), expected)


def test_fingerprints_of_names_and_shapes_are_those_of_the_state_dict(archives):
    entries = [(n, tuple(t.shape)) for n, t in helpers.TinyNet().state_dict().items()]
    assert parse(archives[False].to_bytes()).fingerprint == fingerprint(entries)


def test_the_decoded_network_works(files, trained_net):
    net = load(files[False], helpers.TinyNet())
    assert helpers.error_rate(net) < 0.2
    images, labels = helpers.blobs(64, seed=3)
    F.cross_entropy(net(images), labels).backward()  # ordinary weights: they can be trained on
    assert net.conv.weight.grad is not None
    assert miracle_ban.convert(net).conversion.links == miracle_ban.convert(trained_net).conversion.links


def test_a_network_that_asks_for_its_version_is_told_it(files, expected):
    """As torchvision's MNASNet does when a state dict is loaded."""

    class Versioned(helpers.TinyNet):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            assert local_metadata["version"] == 2
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    assert helpers.same_state(load(files[False], Versioned()).state_dict(), expected)


@pytest.mark.filterwarnings("ignore")
def test_the_decoded_network_is_an_ordinary_one_to_every_tool(files):
    net = load(files[False], helpers.TinyNet()).eval()
    assert not any(type(m).__module__.startswith("miracle_ban") for m in net.modules())
    images, _ = helpers.blobs(8, seed=3)
    with torch.no_grad():
        wanted = net(images)
        assert torch.equal(copy.deepcopy(net)(images), wanted)
        assert torch.allclose(torch.jit.trace(net, images)(images), wanted, atol=1e-5)
        assert torch.allclose(torch.export.export(net, (images,)).module()(images), wanted, atol=1e-5)
        assert torch.allclose(torch.compile(net, backend="eager")(images), wanted, atol=1e-5)
        fresh = helpers.TinyNet()
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(fresh.eval()(images), wanted)
        assert torch.allclose(net.half()(images.half()).float(), wanted, rtol=0.05, atol=0.05)


def test_a_model_without_memory_is_refused(tmp_path):
    archive = miracle_ban.encode(miracle_ban.convert(nn.Linear(3, 2)), progress=False)
    save(archive, tmp_path / "net.mban")
    with pytest.raises(MismatchError, match="meta device"):
        load(tmp_path / "net.mban", nn.Linear(3, 2, device="meta"))
