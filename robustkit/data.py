"""Data sets as tensors in [0, 1], with a provenance that names what they really are.

`_find` holds the source order. Every file is checked against a digest written below before a byte of
it is decoded, so a truncated, altered or half-downloaded file is refused, and the one format here
that can run code (the pickles of CIFAR-10) is never opened unchecked.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import io
import os
import queue
import secrets
import sys
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from robustkit._torchvision import import_torchvision
from robustkit.errors import RobustkitError
from robustkit.results import Provenance

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGIT_CLASSES = tuple("0123456789")

# How many JPEGs of each class, counted from 0000, have their original in cifar10-lossless-4k.
_HELD_OUT = dict(zip(CIFAR10_CLASSES, (396, 366, 420, 384, 422, 393, 414, 385, 407, 413), strict=True))

_FITTED = 48_000  # images of CIFAR-10's train that are "fit"; the others, "select", choose checkpoints

_ANSWER_SECONDS = 4  # a server that has not answered by then counts as out of reach
_STALL_SECONDS = 20  # between two pieces of a download that has begun
_MOST_BYTES = 256 * 2**20  # more than any file of the kit: reading stops there, and the digest then fails

_progress = partial(tqdm, delay=1, mininterval=1, leave=False)  # on stderr, and only when it takes long

Bytes = NDArray[np.uint8]


def load(
    name: str,
    split: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """One split of a data set, or `limit` of its examples, from the first source that has it.

    Names: mnist, cifar10, cifar10-jpeg, cifar10-lossless-4k and digits. Splits: train and test; of cifar10
    also "fit" and "select", the two parts of train; cifar10-lossless-4k is all "train", and has the halves
    "select", to choose checkpoints by, and "report", to measure the chosen one on.
    Sources: a folder in ROBUSTKIT_DATA; the cache (ROBUSTKIT_CACHE, else ~/.cache/robustkit); an
    internal mirror whose URL is in ROBUSTKIT_DATA; the public download, unless ROBUSTKIT_OFFLINE=1.
    Without any of them "mnist" becomes the digits that scikit-learn carries: one line on stderr
    and the provenance say so.
    Shapes: x (n, c, h, w), y (n,). Units: float32 in [0, 1], the stored uint8 divided by 255; with `dtype`
    torch.uint8 the stored bytes themselves, a quarter of the memory, for training on `Dataset.batch`.
    Randomness: `seed` alone draws the `limit` examples, uniformly and without replacement; the draw for
    a smaller limit is the beginning of the draw for a larger one. A limit above the split's size
    takes all of it. Without a limit the order is that of the file.
    Raises: RobustkitError for an unknown name or split, a limit below 1, a ROBUSTKIT_DATA that
    cannot be reached, a corrupt file, or a data set that no source has.
    """
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, n=1)
        hint = f"{near[0]!r} is the nearest of" if near else "choose one of"
        raise RobustkitError(f"data set {name!r} is unknown; {hint} {', '.join(_RECIPES)}.")
    recipe = _RECIPES[name]
    if split not in recipe.files:
        raise RobustkitError(f"{name} has no split {split!r}; choose one of {', '.join(recipe.files)}.")
    if limit is not None and limit < 1:
        raise RobustkitError(f"limit must be at least 1, or None for the whole split; got {limit}.")
    images, labels, provenance = _read_split(name, split, _places())
    total = len(labels)
    positions = list(range(total)) if limit is None else _draw(total, min(limit, total), seed)
    # Selecting before the division keeps a small subset of a large split cheap.
    x = torch.from_numpy(images[positions]).to(device)
    x = x if dtype == torch.uint8 else _in_unit_box(x)
    y = torch.from_numpy(labels[positions]).to(device).long()
    return Dataset(x, y, tuple(positions), provenance, recipe.classes)


def _in_unit_box(stored: Tensor) -> Tensor:
    return stored.float().div_(255)


def held_out_jpegs() -> tuple[str, ...]:
    """The 4,000 members of cifar10-jpeg.tar.xz whose originals are cifar10-lossless-4k.

    `load("cifar10-jpeg", "train")` leaves them out, so that the lossless images stay a held-out set.
    """
    return tuple(f"train/{label}/{i:04d}.jpg" for label, count in _HELD_OUT.items() for i in range(count))


def content_hash(images: Bytes, labels: Bytes) -> str:
    """The sha256 of a split: its images' bytes in (n, c, h, w) order, then its labels' bytes."""
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()


# --- sources ---------------------------------------------------------------------------------------


def _places() -> _Places:
    """What the environment says, read anew at each load."""
    data = os.environ.get("ROBUSTKIT_DATA", "")
    is_url = data.startswith(("http://", "https://"))
    folder = Path(data).expanduser() if data and not is_url else None
    if folder and not folder.is_dir():
        raise RobustkitError(f"ROBUSTKIT_DATA={data} is no folder and no http(s) URL; correct or unset it.")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = Path(os.environ.get("ROBUSTKIT_CACHE") or f"{caches}/robustkit").expanduser()
    offline = os.environ.get("ROBUSTKIT_OFFLINE", "") not in ("", "0")
    return _Places(folder, cache, data.rstrip("/") if is_url else "", offline)


def _find(files: Sequence[_File], places: _Places) -> tuple[list[bytes], str] | None:
    """The checked contents of `files` and the first source that has them all: the source order.

    The user's folder comes first. Her mirror comes after the cache, because what it gave is kept there
    and has the same digest. The public download comes last.
    """
    sources: list[tuple[str, Callable[[_File], bytes]]] = []
    if places.folder:
        sources.append(("ROBUSTKIT_DATA", partial(_from_folder, places.folder)))
    sources.append(("cache", partial(_from_folder, places.cache)))
    if places.mirror:
        sources.append(("ROBUSTKIT_DATA", partial(_from_mirror, places)))
    if not places.offline:
        sources.append(("download", partial(_from_public, places)))
    for source, get in sources:
        with suppress(FileNotFoundError, NotADirectoryError):
            return [get(file) for file in files], source
    return None


def _from_folder(folder: Path, file: _File) -> bytes:
    path = folder / file.path
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise RobustkitError(f"{path} cannot be read ({error.strerror}); mend or remove it.") from error
    return _checked(file, raw, f"{path}", "delete or replace it, then load again")


def _from_mirror(places: _Places, file: _File) -> bytes:
    """From an internal mirror, laid out like the folder, or flat as torchvision's own mirrors are."""
    for path in (file.path, Path(file.path).name):
        url = f"{places.mirror}/{path}"
        try:
            return _keep(places, file, url)
        except OSError as error:
            if not (isinstance(error, urllib.error.HTTPError) and error.code in (404, 410)):
                raise RobustkitError(
                    f"{url} cannot be had ({getattr(error, 'reason', error)}); "
                    "repair that mirror, or correct or unset ROBUSTKIT_DATA."
                ) from error
    raise FileNotFoundError(file.path)


def _from_public(places: _Places, file: _File) -> bytes:
    """From the addresses that torchvision's classes name. Raises: FileNotFoundError when none answers.

    torchvision's own download has no time-out, writes under the final name and unpacks to disk, so a
    hung network would stall a lesson and an interrupted one leave half a file behind.
    """
    if not file.public:
        raise FileNotFoundError(file.path)
    published = getattr(import_torchvision().datasets, file.public)
    mirrors = [mirror + Path(file.path).name for mirror in getattr(published, "mirrors", [])]
    for url in mirrors or [published.url]:
        try:
            return _keep(places, file, url)
        except TimeoutError:
            break  # a network that swallows packets would swallow the next attempt too
        except OSError:
            continue
    raise FileNotFoundError(file.path)


def _fetch(url: str) -> bytes:
    """The body at `url`. Raises: OSError when nothing answers, RobustkitError when it breaks off."""
    body = bytearray()
    with _open(url) as response:
        expected = response.length
        try:
            with _progress(desc=url, total=expected, unit="B", unit_scale=True) as progress:
                while len(body) < _MOST_BYTES and (piece := response.read(2**18)):
                    body += piece
                    progress.update(len(piece))
            why = ""
        except (OSError, http.client.HTTPException) as error:
            why = f" ({error})"
    if why or len(body) != (expected or len(body)):
        raise RobustkitError(
            f"{url} broke off after {len(body)} of {expected or 'unknown'} bytes{why}; "
            "nothing was kept, so load again."
        )
    return bytes(body)


def _open(url: str) -> http.client.HTTPResponse:
    """The response to a request. Raises: OSError, after `_ANSWER_SECONDS` at the latest.

    The wait is on a thread because no socket time-out covers name resolution, or bounds the sum over
    the several addresses of a host.
    """
    answer: queue.SimpleQueue[http.client.HTTPResponse | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "robustkit"})
            answer.put(urllib.request.urlopen(request, timeout=_STALL_SECONDS))
        except OSError as error:
            answer.put(error)
        except (http.client.HTTPException, ValueError) as error:  # not HTTP, or not an address
            answer.put(OSError(f"{error}"))

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answer.get(timeout=_ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {_ANSWER_SECONDS} s") from None
    if isinstance(response, OSError):
        if isinstance(response, urllib.error.HTTPError):
            response.close()
        raise response
    return response


def _checked(file: _File, raw: bytes, where: str, remedy: str) -> bytes:
    """The content of `raw`, once it has the digest that `file` must have."""
    content = raw
    if file.unzip:
        with suppress(zlib.error):  # what cannot be unzipped fails the digest
            content = zlib.decompressobj(wbits=31).decompress(raw, _MOST_BYTES)
    found = hashlib.new(file.algorithm, content, usedforsecurity=False).hexdigest()
    if found != file.digest:
        raise RobustkitError(
            f"{where} is cut, corrupt or another file (the {file.algorithm} of its "
            f"{'unzipped ' if file.unzip else ''}bytes is {found} and must be {file.digest}); {remedy}."
        )
    return content


# --- the cache -------------------------------------------------------------------------------------


def _keep(places: _Places, file: _File, url: str) -> bytes:
    """Download a file and, once it has proved good, cache it."""
    raw = _fetch(url)
    content = _checked(file, raw, url, "nothing was kept, so load again or leave that server out")
    _store(places.cache / file.path, lambda stream: stream.write(raw))
    return content


def _store(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write all of `path` or nothing, whoever else writes it at the same moment.

    The temporary name is in the same folder, because only there is the replacement atomic. A cache
    that cannot be written costs time, not the lesson: one line on stderr says so.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as stream:
                write(stream)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        print(f"robustkit: {path} cannot be cached ({error.strerror}); going on without.", file=sys.stderr)


def _decoded(path: Path, decode: Callable[[], tuple[Bytes, Bytes]]) -> tuple[Bytes, Bytes, str]:
    """Images, labels and their hash from the arrays cached at `path`, or decoded and cached anew."""
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # The file is opened here because np.load leaves one open that it finds to be cut.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            images, labels, digest = stored["images"], stored["labels"], str(stored["sha256"])
        if content_hash(images, labels) == digest:
            return images, labels, digest
    images, labels = decode()
    digest = content_hash(images, labels)
    _store(path, lambda stream: np.savez(stream, images=images, labels=labels, sha256=np.array(digest)))
    return images, labels, digest


@lru_cache(maxsize=4)  # train and test of two data sets: lessons load them again and again
def _read_split(name: str, split: str, places: _Places) -> tuple[Bytes, Bytes, Provenance]:
    """The whole split as uint8 and its provenance, read and hashed once per process and place."""
    recipe = _RECIPES[name]
    files = recipe.files[split]
    found = _find(files, places) if files else ([], "embedded")
    if found is None and name == "mnist":
        print(
            "robustkit: MNIST is in no source; using scikit-learn's embedded digits, upscaled: NOT MNIST "
            "(set ROBUSTKIT_DATA or connect to a network for MNIST).",
            file=sys.stderr,
        )
        return _read_split("digits", split, places)
    if found is None:
        public = "switched off" if places.offline else "out of reach or not published"
        raise RobustkitError(
            f"{recipe.title} is not in ROBUSTKIT_DATA ({places.folder or places.mirror or 'unset'}) nor in the "
            f"cache ({places.cache}) and its public download is {public}; put {files[0].path} into one of them."
        )
    contents, source = found
    decode = partial(recipe.decode, contents, split)
    if recipe.slow:
        path = places.cache / "decoded" / f"{name}-{split}-{files[0].digest[:16]}.npz"
        images, labels, digest = _decoded(path, decode)
    else:
        images, labels = decode()
        digest = content_hash(images, labels)
    return images, labels, Provenance(recipe.title, split, source, digest, recipe.exact, recipe.note)


# --- decoding --------------------------------------------------------------------------------------


def _decode_mnist(contents: Sequence[bytes], split: str) -> tuple[Bytes, Bytes]:
    """IDX: a header of 16 bytes before the images and of 8 before the labels, then uint8.

    The digests have fixed every byte, sizes included, so nothing is left to parse.
    """
    images, labels = contents
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return pixels, np.frombuffer(labels, np.uint8, offset=8)


def _decode_cifar10(contents: Sequence[bytes], split: str) -> tuple[Bytes, Bytes]:
    """The official batches, unpickled by torchvision, which checks the md5 of each of them too."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        batches = Path(folder, "cifar-10-batches-py")
        batches.mkdir()
        with tarfile.open(fileobj=io.BytesIO(contents[0])) as archive:
            for member in archive:  # by its last name alone: nothing in the archive can lead outside
                if member.isreg():
                    content = archive.extractfile(member).read()  # type: ignore[union-attr]
                    batches.joinpath(Path(member.name).name).write_bytes(content)
        # The batches are from 2009: NumPy 2.4 warns about the way their dtype was pickled.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        published = import_torchvision().datasets.CIFAR10(folder, train=split != "test")
    part = {"fit": slice(_FITTED), "select": slice(_FITTED, None)}.get(split, slice(None))
    images, labels = published.data[part], np.array(published.targets, np.uint8)[part]
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


def _decode_cifar10_jpeg(contents: Sequence[bytes], split: str) -> tuple[Bytes, Bytes]:
    """The JPEGs in order of class, then number, without those held out of training."""
    held_out = frozenset(held_out_jpegs())
    jpegs: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(contents[0]), mode="r|xz") as archive:
        for member in archive:  # read in memory: no path of the archive reaches the disk
            if member.isreg() and member.name.startswith(f"{split}/") and member.name not in held_out:
                jpegs[member.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    names = sorted(jpegs)
    images = np.empty((len(names), 32, 32, 3), np.uint8)
    for i, name in enumerate(_progress(names, desc=f"decoding {split} JPEGs")):
        with Image.open(io.BytesIO(jpegs[name]), formats=["JPEG"]) as picture:
            images[i] = np.asarray(picture.convert("RGB"))
    labels = np.array([CIFAR10_CLASSES.index(name.split("/")[1]) for name in names], np.uint8)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


def _decode_lossless(contents: Sequence[bytes], split: str) -> tuple[Bytes, Bytes]:
    half = {"select": slice(0, None, 2), "report": slice(1, None, 2)}.get(split, slice(None))
    with np.load(io.BytesIO(contents[0]), allow_pickle=False) as stored:
        return np.ascontiguousarray(stored["images"][half].transpose(0, 3, 1, 2)), stored["labels"][half]


def _decode_digits(contents: Sequence[bytes], split: str) -> tuple[Bytes, Bytes]:
    """scikit-learn's 1,797 digits of 8x8, brought to 20x20 in the middle of 28x28 as MNIST's are.

    Of 16, 20, 22, 24 and 28 pixels, 20 is nearest to MNIST: a small CNN trained on 12,000 images of
    MNIST classifies 64 % of these digits (next best 58 %), and all sizes train to 95 or 96 %.
    Contrast is then stretched fourfold about mid-grey, as MNIST's strokes are nearly black and white:
    in mid-grey strokes, eps 0.3 erases a digit and leaves nothing to defend (PGD-40 accuracy of the
    smoke-tier PGD-AT recipe: 13 % without, 59 % with; n=300, seed 0).
    """
    from sklearn.datasets import load_digits  # a second to import, and the other data sets need none of it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # Bilinear interpolation in whole tenths of a pixel: no rounding differs between machines.
    centres = np.clip(4 * np.arange(20) - 3, 0, 70)
    weights = np.clip(10 - abs(centres[:, None] - 10 * np.arange(8)), 0, None)
    hundredths = weights @ digits.images.astype(np.int64) @ weights.T  # 0 to 1600, for grey levels 0 to 16
    stretched = np.clip(4 * (hundredths - 800) + 800, 0, 1600)
    images = np.zeros((len(hundredths), 1, 28, 28), np.uint8)
    images[:, 0, 4:24, 4:24] = (stretched * 255 + 800) // 1600
    train, test = train_test_split(
        np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0
    )
    chosen = train if split == "train" else test
    return images[chosen], digits.target[chosen].astype(np.uint8)


# --- the data sets ---------------------------------------------------------------------------------


def _draw(total: int, n: int, seed: int) -> list[int]:
    positions: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n].tolist()
    return positions


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples with labels, where each stands in its split, and what the split is.

    Shapes: x (n, c, h, w) float32 in [0, 1], or the stored uint8 where `load` was asked for it; y (n,) int64;
    `indices` n positions in the full split.
    `provenance.sha256` is the hash of that full split, whatever was taken from it.
    """

    x: Tensor
    y: Tensor
    indices: tuple[int, ...]
    provenance: Provenance
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1], whatever is stored, and labels of these rows. Shapes: (m,) -> (m, c, h, w), (m,)."""
        x = self.x[rows]
        return _in_unit_box(x) if x.dtype == torch.uint8 else x, self.y[rows]

    def take(self, positions: Iterable[int]) -> Dataset:
        """The examples at these positions of this data set, in this order.

        Raises: RobustkitError when there are none, or one is out of range.
        """
        chosen = list(positions)
        if not chosen or min(chosen) < 0 or max(chosen) >= len(self):
            raise RobustkitError(
                f"positions must be some of 0 to {len(self) - 1}; "
                f"got {f'{min(chosen)} to {max(chosen)}' if chosen else 'none'}."
            )
        at = torch.tensor(chosen, device=self.x.device)
        return Dataset(
            self.x[at], self.y[at], tuple(self.indices[i] for i in chosen), self.provenance, self.classes
        )

    def subset(self, n: int, seed: int = 0) -> Dataset:
        """`n` examples drawn uniformly without replacement. Randomness: `seed` alone.

        Raises: RobustkitError unless 1 <= n <= len(self).
        """
        if not 1 <= n <= len(self):
            raise RobustkitError(f"a subset of {len(self)} examples needs 1 <= n <= {len(self)}; got n={n}.")
        return self.take(_draw(len(self), n, seed))


class _Places(NamedTuple):
    """Where to look; `folder` and `mirror` are the two things that ROBUSTKIT_DATA can name."""

    folder: Path | None
    cache: Path
    mirror: str
    offline: bool


class _File(NamedTuple):
    """A file by its path in a data folder, with the digest that its bytes (unzipped if `unzip`) must have."""

    path: str
    algorithm: str
    digest: str
    public: str = ""  # the class of torchvision.datasets that names its addresses, if it is published
    unzip: bool = False


class _Recipe(NamedTuple):
    """A data set: its title, its files for each split, and how their contents become uint8 arrays."""

    title: str
    classes: tuple[str, ...]
    files: Mapping[str, tuple[_File, ...]]
    decode: Callable[[Sequence[bytes], str], tuple[Bytes, Bytes]]
    note: str = ""
    exact: bool = True
    slow: bool = False  # decoded once and cached


def _idx(name: str, digest: str) -> _File:
    return _File(f"MNIST/raw/{name}.gz", "md5", digest, public="MNIST", unzip=True)


_MNIST = {
    "train": (
        _idx("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
        _idx("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
    ),
    "test": (
        _idx("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
        _idx("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
    ),
}
_CIFAR10 = _File("cifar-10-python.tar.gz", "md5", "c58f30108f718f92721af3b95e74349a", public="CIFAR10")
_JPEG_SHA256 = "c90ccf248351c76c09ea8c184eeb5163915e83205dec0afaf2bbe67f3a59f991"
_JPEG = _File("cifar10-jpeg.tar.xz", "sha256", _JPEG_SHA256)
_LOSSLESS_SHA256 = "82eec4a86625dad6cf7847a1c67d4adb427fe20b00be02d64f2343ebde3c132c"
_LOSSLESS = _File("cifar10-lossless-4k.npz", "sha256", _LOSSLESS_SHA256)

_RECIPES = {
    "mnist": _Recipe("MNIST", DIGIT_CLASSES, _MNIST, _decode_mnist),
    "cifar10": _Recipe(
        "CIFAR-10",
        CIFAR10_CLASSES,
        dict.fromkeys(("train", "test", "fit", "select"), (_CIFAR10,)),
        _decode_cifar10,
        slow=True,
    ),
    "cifar10-jpeg": _Recipe(
        "CIFAR-10 (JPEG mirror)",
        CIFAR10_CLASSES,
        {"train": (_JPEG,), "test": (_JPEG,)},
        _decode_cifar10_jpeg,
        "JPEG quality 75, 4:2:0; train is without the 4,000 images whose originals are cifar10-lossless-4k",
        exact=False,
        slow=True,
    ),
    "cifar10-lossless-4k": _Recipe(
        "CIFAR-10 lossless 4k",
        CIFAR10_CLASSES,
        dict.fromkeys(("train", "select", "report"), (_LOSSLESS,)),
        _decode_lossless,
        "4,000 original images of CIFAR-10's training split; cifar10-jpeg train leaves their JPEGs out",
    ),
    "digits": _Recipe(
        "scikit-learn digits (embedded)",
        DIGIT_CLASSES,
        {"train": (), "test": ()},
        _decode_digits,
        "scikit-learn digits, upscaled, contrast stretched: NOT MNIST",
        exact=False,
    ),
}
