"""Data sets: the source order, the digests, the names. Every server here is on the loopback interface."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustkit import data
from robustkit._torchvision import import_torchvision
from robustkit.data import Dataset, held_out_jpegs, load
from robustkit.errors import RobustkitError

REAL = Path(os.environ.get("ROBUSTKIT_DATA") or "unset")  # read before the fixture below clears it
needs_mnist = pytest.mark.skipif(
    not (REAL / "MNIST/raw").is_dir(), reason="ROBUSTKIT_DATA names no folder with MNIST"
)
needs_jpegs = pytest.mark.skipif(
    not (REAL / "cifar10-jpeg.tar.xz").is_file(), reason="ROBUSTKIT_DATA names no folder with the JPEG mirror"
)
Files = dict[str, tuple[data._File, ...]]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, no data folder and no public network, whatever the shell says."""
    monkeypatch.delenv("ROBUSTKIT_DATA", raising=False)
    monkeypatch.setenv("ROBUSTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ROBUSTKIT_OFFLINE", "1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    data._read_split.cache_clear()
    yield tmp_path / "cache"
    data._read_split.cache_clear()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A data folder with a tiny "MNIST" of random images, whose digests stand in for the real ones."""
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    files: Files = {}
    for split, n in (("train", 30), ("test", 20)):
        images = b"\0\0\x08\x03" + np.array([n, 28, 28], ">i4").tobytes() + rng.bytes(n * 784)
        labels = b"\0\0\x08\x01" + np.array([n], ">i4").tobytes() + bytes(i % 10 for i in range(n))
        files[split] = tuple(
            file._replace(digest=hashlib.md5(content).hexdigest())
            for file, content in zip(data._MNIST[split], (images, labels), strict=True)
        )
        for file, content in zip(files[split], (images, labels), strict=True):
            put(folder / file.path, gzip.compress(content))
    monkeypatch.setitem(data._RECIPES, "mnist", data._RECIPES["mnist"]._replace(files=files))
    return folder


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `bodies` by path. `cut` halves what follows an honest Content-Length; `status` replaces 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.bodies: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut = False
        self.status = 200
        self.barrier: threading.Barrier | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def serve_folder(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.bodies["/" + path.relative_to(folder).as_posix()] = path.read_bytes()


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        body = self.server.bodies.get(self.path)
        if body is None or self.server.status != 200:
            self.send_error(404 if body is None else self.server.status)
            return
        if self.server.barrier is not None:
            self.server.barrier.wait(30)  # until every process is in the middle of its download
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.server.cut else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def kept(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def message(name: str = "mnist", split: str = "train") -> str:
    """What `load` says when it refuses: one sentence, on one line."""
    with pytest.raises(RobustkitError) as refusal:
        load(name, split)
    text = str(refusal.value)
    assert text.endswith(".")
    assert ". " not in text
    assert "\n" not in text
    return text


# --- what a data set is ----------------------------------------------------------------------------


def test_digits_are_real_upscaled_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    train, test = load("digits", "train"), load("digits", "test")
    assert (train.x.shape, test.x.shape) == ((1437, 1, 28, 28), (360, 1, 28, 28))
    assert (train.x.dtype, train.y.dtype) == (torch.float32, torch.int64)
    assert (train.x.min(), train.x.max()) == (0, 1)
    assert test.y.bincount().min() >= 35  # stratified: a tenth of each class of 174 to 183, within one
    assert train.classes == tuple("0123456789")
    assert not train.provenance.exact
    assert train.provenance.note == "scikit-learn digits, upscaled, contrast stretched: NOT MNIST"
    assert capsys.readouterr().err == ""  # they were asked for by name
    # The split and the pixels are fixed for good: results refer to them by these hashes.
    assert train.provenance.sha256 == "4d805195e3d6fd0fbaade90e84adb5051812e09d44855b5855b1c60a3c747362"
    assert test.provenance.sha256 == "b4c2d041feac259c0d60d92e6290337bbcc4f269b7a59fce383770ae23156e80"


def test_digits_are_scikit_learns_by_bilinear_interpolation_and_contrast() -> None:
    from sklearn.datasets import load_digits

    small = torch.from_numpy(load_digits().images).float()[:, None] / 16
    large = torch.nn.functional.interpolate(small, size=(20, 20), mode="bilinear")
    large = ((large - 0.5) * 4 + 0.5).clamp(0, 1)
    both = torch.cat([load("digits", "train").x, load("digits", "test").x])
    assert both.count_nonzero() == both[:, :, 4:24, 4:24].count_nonzero()
    ours, theirs = both[:, 0, 4:24, 4:24].flatten(1), large.flatten(1)
    nearest = torch.cdist(ours, theirs, p=float("inf")).min(1)
    assert nearest.values.max() <= 0.5 / 255 + 1e-5  # rounding to uint8, and nothing else
    assert len(nearest.indices.unique()) == 1797  # a partition: no digit is in both splits


def test_mnist_without_a_source_is_announced_and_never_called_mnist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    got = load("mnist", "train")
    assert capsys.readouterr().err == (
        "robustkit: MNIST is in no source; using scikit-learn's embedded digits, upscaled: NOT MNIST "
        "(set ROBUSTKIT_DATA or connect to a network for MNIST).\n"
    )
    assert got.provenance == load("digits", "train").provenance
    assert (got.provenance.dataset, got.provenance.source) == ("scikit-learn digits (embedded)", "embedded")
    assert not got.provenance.exact


def test_limit_draws_by_seed_and_smaller_draws_begin_larger_ones(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tiny))
    full = load("mnist", "train")
    few, more = load("mnist", "train", limit=5), load("mnist", "train", limit=9)
    assert full.indices == tuple(range(30))
    assert few.indices == more.indices[:5]
    assert few.indices != load("mnist", "train", limit=5, seed=1).indices
    assert torch.equal(few.x, full.x[list(few.indices)])
    assert torch.equal(few.y, full.y[list(few.indices)])
    assert few.provenance == full.provenance  # the hash is of the whole split, whatever was taken
    assert len(load("mnist", "train", limit=1000)) == 30


def test_take_and_subset_keep_track_of_the_split() -> None:
    full = load("digits", "test")
    part = full.subset(10, seed=3)
    assert part.indices == full.subset(10, seed=3).indices != full.subset(10, seed=4).indices
    twice = part.take([9, 0])
    assert twice.indices == (part.indices[9], part.indices[0])
    assert torch.equal(twice.x, full.x[list(twice.indices)])
    assert (len(twice), len(set(part.indices))) == (2, 10)
    for n in (0, 361):
        with pytest.raises(RobustkitError, match=f"needs 1 <= n <= 360; got n={n}"):
            full.subset(n)
    for positions, got in (([], "none"), ([-1, 3], "-1 to 3"), ([360], "360 to 360")):
        with pytest.raises(RobustkitError, match=rf"0 to 359; got {got}\."):
            full.take(positions)


def test_stored_bytes_are_the_same_images_in_a_quarter_of_the_memory() -> None:
    whole, stored = load("digits", "test", limit=50), load("digits", "test", limit=50, dtype=torch.uint8)
    assert stored.x.dtype == torch.uint8
    assert 4 * stored.x.nbytes == whole.x.nbytes
    rows = torch.tensor([3, 0, 41])
    for full, images in (whole, stored), (whole.take(range(45)), stored.take(range(45))):
        for found, expected in zip(images.batch(rows), full.batch(rows), strict=True):
            assert torch.equal(found, expected)
    assert torch.equal(whole.batch(rows)[0], whole.x[rows])


def test_bad_requests_are_refused_in_one_sentence() -> None:
    assert message("mnits") == (
        "data set 'mnits' is unknown; 'mnist' is the nearest of "
        "mnist, cifar10, cifar10-jpeg, cifar10-lossless-4k, digits."
    )
    assert "choose one of mnist" in message("xyz")
    assert message("mnist", "val") == "mnist has no split 'val'; choose one of train, test."
    assert message("cifar10-lossless-4k", "test").endswith("choose one of train, select, report.")
    with pytest.raises(RobustkitError, match="limit must be at least 1, or None for the whole split; got 0"):
        load("digits", "train", limit=0)


def test_only_mnist_has_an_understudy() -> None:
    for name, title in (("cifar10", "CIFAR-10"), ("cifar10-jpeg", r"CIFAR-10 (JPEG mirror)")):
        text = message(name)
        assert text.startswith(f"{title} is not in ROBUSTKIT_DATA (unset) nor in the cache")
        assert "switched off" in text


# --- a data folder ---------------------------------------------------------------------------------


def unzip_all(source: Path, target: Path) -> None:
    for path in source.glob("MNIST/raw/*.gz"):
        put(target / "MNIST/raw" / path.stem, gzip.decompress(path.read_bytes()))


def assert_parity_with_torchvision(got: Dataset, root: Path, split: str) -> None:
    theirs = import_torchvision().datasets.MNIST(str(root), train=split == "train")
    assert torch.equal(got.x, theirs.data[:, None].float() / 255)
    assert torch.equal(got.y, theirs.targets)


@pytest.mark.parametrize("split", ["train", "test"])
def test_tensors_are_torchvisions(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tiny))
    unzip_all(tiny, tmp_path / "torchvision")
    assert_parity_with_torchvision(load("mnist", split), tmp_path / "torchvision", split)


@needs_mnist
def test_real_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKIT_DATA", str(REAL))
    unzip_all(REAL, tmp_path)
    for split, n in (("train", 60_000), ("test", 10_000)):
        got = load("mnist", split)
        assert_parity_with_torchvision(got, tmp_path, split)
        assert got.x.shape == (n, 1, 28, 28)
        assert got.provenance.exact
        assert (got.provenance.dataset, got.provenance.source) == ("MNIST", "ROBUSTKIT_DATA")
        payload = hashlib.sha256()
        for file, header in zip(data._MNIST[split], (16, 8), strict=True):
            raw = (tmp_path / file.path).with_suffix("").read_bytes()
            assert hashlib.md5(raw).hexdigest() == file.digest
            payload.update(raw[header:])
        assert got.provenance.sha256 == payload.hexdigest()


def test_the_published_digests_are_torchvisions() -> None:
    datasets = import_torchvision().datasets
    assert data._CIFAR10.path == datasets.CIFAR10.filename
    assert data._CIFAR10.digest == datasets.CIFAR10.tgz_md5
    ours = {Path(file.path).name for files in data._MNIST.values() for file in files}
    assert ours == {name for name, _ in datasets.MNIST.resources}


def test_the_data_folder_is_only_read(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tiny))
    folders = [tiny, *(path for path in tiny.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = {path: path.stat().st_mtime_ns for path in (tiny, *tiny.rglob("*"))}
    try:
        assert len(load("mnist", "train")) == 30
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in (tiny, *tiny.rglob("*"))} == before
    assert not cache.exists()


def test_a_missing_folder_is_refused_and_an_empty_one_is_passed_over(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tmp_path / "nowhere"))
    assert (
        message()
        == f"ROBUSTKIT_DATA={tmp_path}/nowhere is no folder and no http(s) URL; correct or unset it."
    )
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tmp_path / "empty"))
    tiny.rename(cache)
    assert load("mnist", "train").provenance.source == "cache"


def test_the_folder_comes_before_the_cache(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache / data._MNIST["train"][0].path, b"never read")
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tiny))
    assert load("mnist", "train").provenance.source == "ROBUSTKIT_DATA"


@pytest.mark.parametrize("place", ["ROBUSTKIT_DATA", "cache"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "not gzip", "another file"])
def test_a_damaged_file_is_refused(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, place: str, harm: str
) -> None:
    path = tiny / data._MNIST["train"][0].path
    good = path.read_bytes()
    flipped = bytearray(gzip.decompress(good))
    flipped[100] ^= 1
    path.write_bytes(
        {
            "cut": good[:-1000],
            "flipped": gzip.compress(bytes(flipped)),
            "empty": b"",
            "not gzip": b"<html>log in to this network</html>",
            "another file": (tiny / data._MNIST["test"][0].path).read_bytes(),
        }[harm]
    )
    if place == "cache":
        tiny.rename(cache)
        path = cache / path.relative_to(tiny)
    else:
        monkeypatch.setenv("ROBUSTKIT_DATA", str(tiny))
    text = message()
    assert text.startswith(f"{path} is cut, corrupt or another file (the md5 of its unzipped bytes is ")
    assert text.endswith("; delete or replace it, then load again.")


def test_a_split_is_read_and_hashed_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tiny))
    first = load("mnist", "train")
    first.x.zero_()  # what a caller does to her tensors stays hers
    (tiny / data._MNIST["train"][0].path).unlink()
    again = load("mnist", "train")
    assert again.provenance == first.provenance
    assert again.x.max() > 0.9


# --- mirrors and downloads -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "flat"])
def test_a_mirror_fills_the_cache_once(
    tiny: Path, cache: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    mirror.serve_folder(tiny if layout == "folder" else tiny / "MNIST/raw")
    monkeypatch.setenv("ROBUSTKIT_DATA", mirror.url + "/")
    first = load("mnist", "train")
    assert first.provenance.source == "ROBUSTKIT_DATA"
    assert kept(cache) == {file.path for file in data._MNIST["train"]}
    asked = len(mirror.asked)
    data._read_split.cache_clear()
    again = load("mnist", "train")
    assert (again.provenance.source, len(mirror.asked)) == ("cache", asked)
    assert again.provenance.sha256 == first.provenance.sha256
    assert torch.equal(again.x, first.x)


def test_a_mirror_without_the_data_set_is_passed_over(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTKIT_DATA", mirror.url)
    assert load("mnist", "test").provenance.source == "embedded"
    assert mirror.asked == ["/MNIST/raw/t10k-images-idx3-ubyte.gz", "/t10k-images-idx3-ubyte.gz"]


@pytest.mark.parametrize("public", [False, True], ids=["mirror", "public download"])
@pytest.mark.parametrize("harm", ["cut", "corrupt"])
def test_a_bad_download_is_refused_and_leaves_nothing(
    tiny: Path, cache: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, harm: str, public: bool
) -> None:
    mirror.serve_folder(tiny)
    url = mirror.url + "/MNIST/raw/train-images-idx3-ubyte.gz"
    if harm == "cut":
        mirror.cut = True
    else:
        mirror.bodies["/MNIST/raw/train-images-idx3-ubyte.gz"] = b"<html>log in to this network</html>"
    if public:
        monkeypatch.delenv("ROBUSTKIT_OFFLINE")
        monkeypatch.setattr(import_torchvision().datasets.MNIST, "mirrors", [mirror.url + "/MNIST/raw/"])
    else:
        monkeypatch.setenv("ROBUSTKIT_DATA", mirror.url)
    text = message()
    assert text.startswith(
        f"{url} {'broke off after' if harm == 'cut' else 'is cut, corrupt or another file'}"
    )
    assert "nothing was kept, so load again" in text
    assert kept(cache) == set()


def test_a_mirror_that_fails_is_named(mirror: Mirror, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.serve_folder(tiny)
    mirror.status = 503
    monkeypatch.setenv("ROBUSTKIT_DATA", mirror.url)
    assert "cannot be had (Service Unavailable); repair that mirror" in message()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setenv("ROBUSTKIT_DATA", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert "refused" in message()
    monkeypatch.setenv("ROBUSTKIT_DATA", "http://[not-an-address")
    assert "cannot be had" in message()


def test_the_public_download_is_torchvisions(
    tiny: Path, cache: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.serve_folder(tiny / "MNIST/raw")
    monkeypatch.delenv("ROBUSTKIT_OFFLINE")
    addresses = [f"{mirror.url}/gone/", f"{mirror.url}/"]  # the second answers
    monkeypatch.setattr(import_torchvision().datasets.MNIST, "mirrors", addresses)
    assert load("mnist", "train").provenance.source == "download"
    assert kept(cache) == {file.path for file in data._MNIST["train"]}


@pytest.mark.parametrize("network", ["refuses", "hangs"])
def test_without_a_network_the_understudy_comes_at_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    monkeypatch.delenv("ROBUSTKIT_OFFLINE")
    monkeypatch.setattr(data, "_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(data, "_STALL_SECONDS", 1)
    mnist = import_torchvision().datasets.MNIST
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if network == "hangs":
            server.listen()  # connects, then never says a word
        monkeypatch.setattr(mnist, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"] * 2)
        load("digits", "train")  # scikit-learn's import is not what is timed
        start = time.monotonic()
        assert load("mnist", "train").provenance.source == "embedded"
        assert time.monotonic() - start < 0.3 + 1
    assert kept(cache) == set()


def test_two_processes_at_once_leave_one_good_file(tiny: Path, cache: Path, mirror: Mirror) -> None:
    mirror.serve_folder(tiny)
    mirror.barrier = threading.Barrier(2)
    code = (
        "from robustkit.data import _File, _RECIPES, load\n"
        f"_RECIPES['mnist'] = _RECIPES['mnist']._replace(files={data._RECIPES['mnist'].files!r})\n"
        "print(load('mnist', 'train').provenance)"
    )
    env = {**os.environ, "ROBUSTKIT_DATA": mirror.url, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    answers = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], answers
    assert answers[0] == answers[1]
    assert "MNIST train (ROBUSTKIT_DATA" in answers[0][0]
    assert len(mirror.asked) == 4  # both were in the middle of it, twice
    assert kept(cache) == {file.path for file in data._MNIST["train"]}
    data._read_split.cache_clear()
    assert load("mnist", "train").provenance.source == "cache"


def test_a_cache_that_cannot_be_written_costs_one_line(
    tiny: Path,
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mirror.serve_folder(tiny)
    put(tmp_path / "file", b"")
    monkeypatch.setenv("ROBUSTKIT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("ROBUSTKIT_DATA", mirror.url)
    assert len(load("mnist", "train")) == 30
    assert "cannot be cached (Not a directory); going on without." in capsys.readouterr().err


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(stream: Any) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    put(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt):
        data._store(tmp_path / "file", interrupted)
    assert kept(tmp_path) == {"file"}
    assert (tmp_path / "file").read_bytes() == b"old"


# --- CIFAR-10 --------------------------------------------------------------------------------------


class OldArray:
    """Pickles as NumPy of 2009 did, on which NumPy 2.4 warns: the dtype's flags are integers."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __reduce__(self) -> Any:
        state = (1, self.array.shape, OldDtype(), False, self.array.tobytes())
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state


class OldDtype:
    def __reduce__(self) -> Any:
        return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)


class Bomb:
    """Its pickle creates the file at `path` when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def tar(members: dict[str, bytes | str], mode: str) -> bytes:
    """An archive of files (bytes) and symbolic links (str)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def set_digest(monkeypatch: pytest.MonkeyPatch, name: str, archive: bytes) -> None:
    recipe = data._RECIPES[name]
    files = {
        split: tuple(file._replace(digest=hashlib.new(file.algorithm, archive).hexdigest()) for file in files)
        for split, files in recipe.files.items()
    }
    monkeypatch.setitem(data._RECIPES, name, recipe._replace(files=files))


def test_cifar10_is_read_by_torchvision_and_unpickled_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    pixels = {
        name: rng.integers(0, 256, (6, 3072), np.uint8)
        for name in ("data_batch_1", "data_batch_2", "test_batch")
    }
    batches = {
        name: pickle.dumps({"data": OldArray(rows), "labels": [3, 1, 4, 1, 5, 9]}, protocol=2)
        for name, rows in pixels.items()
    }
    batches["batches.meta"] = pickle.dumps({"label_names": list(data.CIFAR10_CLASSES)}, protocol=2)
    official = import_torchvision().datasets.CIFAR10
    listed = [[name, hashlib.md5(batch).hexdigest()] for name, batch in batches.items()]
    monkeypatch.setattr(official, "train_list", listed[:2])
    monkeypatch.setattr(official, "test_list", listed[2:3])
    monkeypatch.setattr(official, "meta", {**official.meta, "md5": listed[3][1]})
    archive = tar({f"cifar-10-batches-py/{name}": batch for name, batch in batches.items()}, "w:gz")
    set_digest(monkeypatch, "cifar10", archive)
    put(tmp_path / "data" / "cifar-10-python.tar.gz", archive)
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tmp_path / "data"))

    train, test = load("cifar10", "train"), load("cifar10", "test")
    expected = np.concatenate([pixels["data_batch_1"], pixels["data_batch_2"]]).reshape(-1, 3, 32, 32)
    assert torch.equal(train.x, torch.from_numpy(expected).float() / 255)
    assert torch.equal(test.x, torch.from_numpy(pixels["test_batch"].reshape(-1, 3, 32, 32)).float() / 255)
    assert train.y.tolist() == [3, 1, 4, 1, 5, 9] * 2
    assert train.provenance.dataset == "CIFAR-10"
    assert train.provenance.exact

    # Its two parts, with the border where 12 images have one.
    monkeypatch.setattr(data, "_FITTED", 9)
    parts = [load("cifar10", split) for split in ("fit", "select")]
    assert torch.equal(torch.cat([part.x for part in parts]), train.x)
    assert [len(part) for part in parts] == [9, 3]

    # From now on the arrays are read from the cache, whose hash is verified ...
    recipe = data._RECIPES["cifar10"]
    decoded: list[str] = []

    def decode(contents: Any, split: str) -> Any:
        decoded.append(split)
        return recipe.decode(contents, split)

    monkeypatch.setitem(data._RECIPES, "cifar10", recipe._replace(decode=decode))
    data._read_split.cache_clear()
    again = load("cifar10", "train")
    assert torch.equal(again.x, train.x)
    assert again.provenance == train.provenance
    assert decoded == []
    # ... and made again when it does not hold.
    (stored,) = cache.glob("decoded/cifar10-train-*.npz")
    good = stored.read_bytes()
    for bad in (
        good[: len(good) // 2],
        good.replace(train.provenance.sha256.encode("utf-32-le"), b"0" * 256),
        b"",
    ):
        assert bad != good
        stored.write_bytes(bad)
        data._read_split.cache_clear()
        assert load("cifar10", "train").provenance == train.provenance
        assert stored.read_bytes() == good
    assert decoded == ["train"] * 3
    splits = ("train", "test", "fit", "select")
    assert kept(cache) == {f"decoded/{stored.name.replace('train', split)}" for split in splits}


@pytest.mark.parametrize("place", ["ROBUSTKIT_DATA", "mirror"])
def test_another_cifar10_archive_is_never_unpickled(
    tmp_path: Path, cache: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "went-off"))
    archive = tar({f"cifar-10-batches-py/{name}": bomb for name in ("data_batch_1", "batches.meta")}, "w:gz")
    if place == "mirror":
        mirror.bodies["/cifar-10-python.tar.gz"] = archive
        monkeypatch.setenv("ROBUSTKIT_DATA", mirror.url)
    else:
        put(tmp_path / "data" / "cifar-10-python.tar.gz", archive)
        monkeypatch.setenv("ROBUSTKIT_DATA", str(tmp_path / "data"))
    assert "cifar-10-python.tar.gz is cut, corrupt or another file (the md5 of its bytes is " in message(
        "cifar10"
    )
    assert kept(cache) == set()
    assert not (tmp_path / "went-off").exists()


def test_jpegs_are_read_in_memory_and_without_the_held_out(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jpeg(grey: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), (grey, grey, grey)).save(stream, "JPEG")
        return stream.getvalue()

    names = [
        "train/frog/0414.jpg",
        "train/frog/0413.jpg",
        "train/cat/0384.jpg",
        "train/cat/0000.jpg",
        "test/cat/0000.jpg",
    ]
    members: dict[str, bytes | str] = {name: jpeg(10 * i) for i, name in enumerate(names)}
    archive = tar({**members, "../escaped.jpg": jpeg(0), "train/ship/9999.jpg": "/etc/hostname"}, "w:xz")
    set_digest(monkeypatch, "cifar10-jpeg", archive)
    put(tmp_path / "data" / "cifar10-jpeg.tar.xz", archive)
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tmp_path / "data"))
    before = kept(tmp_path)
    train, test = load("cifar10-jpeg", "train"), load("cifar10-jpeg", "test")
    assert train.y.tolist() == [3, 6]  # cat/0384 and frog/0414: cat/0000 and frog/0413 are held out
    assert (255 * train.x).round().amax((1, 2, 3)).tolist() == [20, 0]
    assert test.y.tolist() == [3]
    assert (train.provenance.dataset, train.provenance.exact) == ("CIFAR-10 (JPEG mirror)", False)
    assert "without the 4,000 images whose originals are cifar10-lossless-4k" in train.provenance.note
    assert all(name.startswith("cache/decoded/") for name in kept(tmp_path) - before)


@pytest.mark.slow
@needs_jpegs
def test_the_real_jpeg_mirror_and_its_lossless_twins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKIT_DATA", str(REAL))
    few = load("cifar10-jpeg", "train", limit=64)
    images, labels, provenance = data._read_split("cifar10-jpeg", "train", data._places())
    assert few.x.shape == (64, 3, 32, 32)
    assert images.shape == (46_000, 3, 32, 32)
    assert provenance.sha256 == data.content_hash(images, labels)
    data._read_split.cache_clear()
    assert load("cifar10-jpeg", "train", limit=64).provenance == provenance  # now from the decoded arrays

    lossless = load("cifar10-lossless-4k", "train")
    assert lossless.x.shape == (4_000, 3, 32, 32)
    assert lossless.provenance.exact
    with np.load(REAL / "cifar10-lossless-4k.npz", allow_pickle=False) as stored:
        names = stored["jpeg_names"].tolist()
    assert set(names) == set(held_out_jpegs())
    halves = [load("cifar10-lossless-4k", split) for split in ("select", "report")]
    assert [len(half) for half in halves] == [2_000, 2_000]
    selected, reported = ({image.numpy().tobytes() for image in half.x} for half in halves)
    assert not selected & reported
    assert selected | reported == {image.numpy().tobytes() for image in lossless.x}
    assert len(held_out_jpegs()) == 4_000
    assert [name.split("/")[1] for name in names] == [lossless.classes[label] for label in lossless.y]
    # The twins are the same pictures through JPEG: about 30 dB, far from any other picture.
    wanted = dict(zip(names[:200], range(200), strict=True))
    twins = torch.zeros(200, 3, 32, 32)
    with tarfile.open(REAL / "cifar10-jpeg.tar.xz") as archive:
        for member in archive:
            if member.name in wanted:
                picture = np.asarray(Image.open(archive.extractfile(member)))  # type: ignore[arg-type]
                twins[wanted[member.name]] = torch.from_numpy(picture.transpose(2, 0, 1) / 255)
    psnr = -10 * (twins - lossless.x[:200]).square().mean((1, 2, 3)).log10()
    assert 28 < psnr.median() < 32
    assert psnr.min() > 20
    # And none of them is left in training: no training image is as near to an original as its twin is.
    for i in range(5):
        same = images[labels == lossless.y[i].item()].astype(np.float32) / 255
        error = np.square(same - lossless.x[i].numpy()).mean((1, 2, 3))
        assert -10 * np.log10(error.min()) < psnr[i]
