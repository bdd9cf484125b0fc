"""Does this account send the same picture over and over, a little changed? Detectors of query attacks.

A black-box attack needs many queries that differ little from each other; customers send pictures that differ a lot.
`Fingerprints` compares pixels, `LowFrequency` what is left of a picture when it is blurred. Both look at one
account at a time: state that all accounts share would let an attacker poison popular pictures.

What they cannot see: an attack of few queries (transfer, rotation), one spread over many accounts, one whose queries
are tuned until they pass. They raise an attacker's cost and leave evidence; they do not make a model robust.

State lies in the store, so that replicas do not multiply an attacker's budget. Each keeps what it has read in
memory and reads, before a verdict, only what others have added. Whatever is sent, `capacity` bounds the work, the
memory and the rows of an account, and `accounts` how many are in memory.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    LargeBinary,
    String,
    Table,
    bindparam,
    delete,
    func,
    select,
)

from robustkit.serve.cache import Image
from robustkit.serve.store import Prepared, insert, metadata

Feature = NDArray[Any]  # of one dtype for each detector

_FORGOTTEN = -(2**62)  # an ordinal that is too old to count
_SWEEP = 64  # rows beyond the capacity are deleted that many at a time

_sightings = Table(
    "sightings",
    metadata,
    Column("detector", String(32), primary_key=True),
    Column("account", String(128), primary_key=True),
    Column("ordinal", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Float(53), nullable=False, index=True),
    Column("feature", LargeBinary, nullable=False),
)


@dataclass(frozen=True)
class Verdict:
    """How much an image resembles what its account sent before: `score` in [0, 1], flagged from 0.5 on."""

    score: float
    flagged: bool
    evidence: Mapping[str, float | str]


def _generator(key: bytes, use: str) -> np.random.Generator:
    """Randomness that every replica shares and no attacker knows."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(use.encode() + key).digest()))


class _Memory(ABC):
    """The newest `capacity` features of one account."""

    def __init__(self, capacity: int) -> None:
        self.lock = threading.Lock()
        self.newest = 0
        self._capacity = capacity
        self._at = np.full(capacity, -np.inf)

    def add(self, ordinal: int, at: float, feature: Feature) -> None:
        self.newest = ordinal
        self._at[ordinal % self._capacity] = at
        self._keep(ordinal, feature)

    @abstractmethod
    def _keep(self, ordinal: int, feature: Feature) -> None: ...

    @abstractmethod
    def compare(self, feature: Feature, since: float) -> tuple[float, dict[str, float | str]]:
        """The score against what came after `since`, and what speaks for it."""


class Detector(ABC):
    """Features of what an account sent before, in the store; what a flag leads to is the pipeline's."""

    name: str
    _dtype: type[np.generic]

    def __init__(self, engine: Engine, *, capacity: int, lasting: float, accounts: int) -> None:
        self._engine, self._capacity, self._lasting, self._accounts = engine, capacity, lasting, accounts
        mine = (_sightings.c.detector == self.name) & (_sightings.c.account == bindparam("of"))
        columns = (_sightings.c.ordinal, _sightings.c.at, _sightings.c.feature)
        news = select(*columns).where(mine, _sightings.c.ordinal > bindparam("newest"))
        # The newest first, so that a long absence costs no more than a full memory.
        self._news = Prepared(engine, news.order_by(_sightings.c.ordinal.desc()).limit(capacity))
        self._append = Prepared(engine, insert(engine, _sightings).on_conflict_do_nothing())
        old = _sightings.c.ordinal <= bindparam("last")
        self._sweep = Prepared(engine, delete(_sightings).where(mine, old))
        self._memories: OrderedDict[str, _Memory] = OrderedDict()
        self._lock = threading.Lock()

    @abstractmethod
    def _memory(self) -> _Memory: ...

    @abstractmethod
    def feature(self, image: Image) -> Feature:
        """What is compared of an image. Shapes: (h, w, c) uint8 -> (n,)."""

    def remembered(self, account: str) -> _Memory:
        """This account's memory; the one that was longest without a query makes room for it."""
        with self._lock:
            memory = self._memories.get(account) or self._memory()
            self._memories[account] = memory
            self._memories.move_to_end(account)
            if len(self._memories) > self._accounts:
                self._memories.popitem(last=False)
        return memory

    def observe(self, account: str, image: Image, now: float) -> Verdict:
        """Compare with what the account sent before, then remember. Units: `now` in seconds since the epoch."""
        with self._engine.connect() as connection:
            return observe(connection, [self], account, image, now)[self.name]

    def attempt(
        self, connection: Connection, memory: _Memory, account: str, feature: Feature, now: float
    ) -> Verdict | None:
        """Catch up with other replicas, compare, append; None where another replica has taken the number."""
        news, _ = self._news(connection, of=account, newest=memory.newest)
        for ordinal, at, stored in reversed(news):
            memory.add(ordinal, at, np.frombuffer(stored, self._dtype))
        score, evidence = memory.compare(feature, now - self._lasting)
        ordinal = memory.newest + 1
        row = {"account": account, "ordinal": ordinal, "at": now, "feature": feature.tobytes()}
        _, taken = self._append(connection, detector=self.name, **row)
        if ordinal % _SWEEP == 0:
            self._sweep(connection, of=account, last=ordinal - self._capacity)
        return Verdict(score, score >= 0.5, evidence) if taken else None

    def expire(self, now: float) -> int:
        """Remove what is too old to compare with; how many rows. An account's newest stays, to go on counting from."""
        later = _sightings.alias()
        newest = (
            select(func.max(later.c.ordinal))
            .where(later.c.detector == self.name, later.c.account == _sightings.c.account)
            .scalar_subquery()
        )
        old = (_sightings.c.detector == self.name) & (_sightings.c.at <= now - self._lasting)
        with self._engine.begin() as connection:
            return connection.execute(delete(_sightings).where(old, _sightings.c.ordinal < newest)).rowcount


def observe(
    connection: Connection, detectors: Sequence[Detector], account: str, image: Image, now: float
) -> dict[str, Verdict]:
    """What each detector says of an image, by name; all of them remember it, in one transaction, or none does.

    The order must be every replica's, or two transactions may wait for each other. Units: `now` in seconds since the
    epoch.
    """
    features = [detector.feature(image) for detector in detectors]
    memories = [detector.remembered(account) for detector in detectors]
    with ExitStack() as held:
        for memory in memories:
            held.enter_context(memory.lock)
        while not all(
            verdicts := [
                detector.attempt(connection, memory, account, feature, now)
                for detector, memory, feature in zip(detectors, memories, features, strict=True)
            ]
        ):
            connection.rollback()  # another replica was first: what it added counts too
        connection.commit()
        for memory, feature in zip(memories, features, strict=True):
            memory.add(memory.newest + 1, now, feature)
    return {detector.name: verdict for detector, verdict in zip(detectors, verdicts, strict=True) if verdict}


class _Postings(_Memory):
    """Which sightings had a hash: a table of buckets of `_SLOTS` cells, the newest of a bucket's share last.

    A flood of near-duplicates fills the same buckets and overwrites itself: a lookup is always of as many cells.
    """

    _SLOTS = 8

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._buckets = np.uint64(8 * capacity)  # room for 64 hashes of each sighting
        self._ordinals = np.full((8 * capacity, self._SLOTS), _FORGOTTEN)
        self._tags = np.zeros((8 * capacity, self._SLOTS), np.uint32)

    def _keep(self, ordinal: int, feature: Feature) -> None:
        bucket, slot = feature % self._buckets, ordinal % self._SLOTS
        self._ordinals[bucket, slot] = ordinal
        self._tags[bucket, slot] = feature >> np.uint64(32)

    def compare(self, feature: Feature, since: float) -> tuple[float, dict[str, float | str]]:
        bucket, tag = feature % self._buckets, (feature >> np.uint64(32)).astype(np.uint32)
        ordinals = self._ordinals[bucket]
        alive = (self._tags[bucket] == tag[:, None]) & (ordinals > self.newest - self._capacity)
        alive &= self._at[ordinals % self._capacity] > since
        shared = np.bincount(self.newest - ordinals[alive])  # by age
        if not len(shared):
            return 0.0, {"shared": 0.0, "of": float(len(feature))}
        age = int(shared.argmax())
        evidence = {
            "shared": float(shared[age]),
            "of": float(len(feature)),
            "match": float(self.newest - age),
        }
        return float(shared[age]) / len(feature), {**evidence}


class Fingerprints(Detector):
    """Flags an image that shares half of its fingerprint with one that its account sent before.

    Source: Li et al., Blacklight: scalable defense for neural networks against query-based black-box attacks
    (USENIX Security 2022): quantise by 50 grey levels, hash all windows of 20 values, keep the 50 smallest hashes.
    Differs from it: accounts are compared with themselves alone; hashes are keyed multiply-shift ones, not SHA;
    windows of one grey level are left out, as blank paper says nothing; memory is bounded.
    Raises: nothing of its own; what the store raises when it is down is the pipeline's to answer.
    """

    name = "fingerprints"
    _dtype = np.uint64
    _STEP, _WINDOW, _KEPT = 50, 20, 50

    def __init__(
        self, engine: Engine, key: bytes, *, capacity: int = 1024, lasting: float = 86400, accounts: int = 128
    ) -> None:
        super().__init__(engine, capacity=capacity, lasting=lasting, accounts=accounts)
        draw = _generator(key, self.name)
        self._factors = draw.integers(2**64, size=self._WINDOW, dtype=np.uint64) | np.uint64(1)
        self._mixer = draw.integers(2**64, dtype=np.uint64) | np.uint64(1)
        levels = np.arange(256 // self._STEP + 1, dtype=np.uint64)
        self._flat = np.concatenate([self._hashed(np.repeat(level, self._WINDOW)) for level in levels])

    def _memory(self) -> _Memory:
        return _Postings(self._capacity)

    def _hashed(self, levels: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One hash for each window."""
        hashes: NDArray[np.uint64] = np.correlate(levels, self._factors, "valid")
        hashes ^= hashes >> np.uint64(31)
        hashes *= self._mixer
        hashes ^= hashes >> np.uint64(29)
        return hashes

    def feature(self, image: Image) -> NDArray[np.uint64]:
        hashes = np.sort(self._hashed((image // self._STEP).ravel().astype(np.uint64)))
        smallest = hashes[np.append(True, hashes[1:] != hashes[:-1])][: self._KEPT + len(self._flat)]
        telling: NDArray[np.uint64] = smallest[(smallest[:, None] != self._flat).all(1)]
        return telling[: self._KEPT]


class _Points(_Memory):
    """Features as rows of a matrix: a scan of all of them costs less than one query of the store."""

    def __init__(self, capacity: int, dimensions: int, neighbours: int, near: float) -> None:
        super().__init__(capacity)
        self._points = np.zeros((capacity, dimensions), np.float32)
        self._sizes = np.zeros(capacity, np.float32)
        self._neighbours, self._near = neighbours, near

    def _keep(self, ordinal: int, feature: Feature) -> None:
        self._points[ordinal % self._capacity] = feature
        self._sizes[ordinal % self._capacity] = feature @ feature

    def compare(self, feature: Feature, since: float) -> tuple[float, dict[str, float | str]]:
        # The square multiplied out: the matrix is read once, and nothing of its size is made.
        apart = self._sizes - 2 * (self._points @ feature) + feature @ feature
        apart[self._at <= since] = np.inf
        nearest = np.partition(apart, self._neighbours - 1)[: self._neighbours]
        distance = float(np.sqrt(nearest.clip(0)).mean())
        score = 1 / (1 + distance / self._near)
        return score, {"distance": distance} if np.isfinite(distance) else {}


def _cosines(length: int, kept: int) -> NDArray[np.float64]:
    """The lowest rows of the DCT, scaled so that the squared coefficients sum to the mean square of what they keep."""
    waves = np.cos(np.pi * (np.arange(length) + 0.5) * np.arange(kept)[:, None] / length) / length
    waves[1:] *= np.sqrt(2)
    return waves


class LowFrequency(Detector):
    """Flags an image whose blurred version lies nearer than `near` to those of the account's nearest queries.

    Source: Chen, Carlini and Wagner, Stateful detection of black-box adversarial attacks (2019): the mean distance
    to the k nearest queries; they learn an encoder, this takes the 8x8 lowest DCT coefficients of each channel,
    which noise in single pixels hardly changes, projected at random to 32 dimensions (Johnson and Lindenstrauss),
    so that nobody can look for the directions that are not watched.
    Units: `near` is the root mean square difference of the blurred images, of grey levels in [0, 1].
    """

    name = "low-frequency"
    _dtype = np.float32
    _SIDE, _DIMENSIONS = 8, 32

    def __init__(
        self,
        engine: Engine,
        key: bytes,
        *,
        near: float = 0.02,
        neighbours: int = 1,
        capacity: int = 1024,
        lasting: float = 86400,
        accounts: int = 128,
    ) -> None:
        super().__init__(engine, capacity=capacity, lasting=lasting, accounts=accounts)
        self._near, self._neighbours, self._key = near, neighbours, key
        self._lenses = lru_cache(maxsize=4)(self._drawn)  # models see pictures of one shape

    def _memory(self) -> _Memory:
        return _Points(self._capacity, self._DIMENSIONS, self._neighbours, self._near)

    def feature(self, image: Image) -> NDArray[np.float32]:
        down, across, drawn = self._lenses(image.shape)
        height, width, channels = image.shape
        rows = down @ image.reshape(height, width * channels).astype(np.float32)
        low = across @ rows.reshape(self._SIDE, width, channels)
        return (low.ravel() @ drawn).astype(np.float32, copy=False)

    def _drawn(self, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], ...]:
        """What a picture of this shape is looked at through: cosines of its two sides, and the random directions."""
        down, across = _cosines(shape[0], self._SIDE), _cosines(shape[1], self._SIDE)
        size = len(down) * len(across) * shape[2]
        drawn = _generator(self._key, self.name).normal(size=(size, self._DIMENSIONS))
        # Drawn for channels before columns, which is what stored features were made with; used the other way round.
        drawn = drawn.reshape(len(down), shape[2], len(across), -1).swapaxes(1, 2).reshape(size, -1)
        drawn /= np.sqrt(self._DIMENSIONS * shape[2])
        return tuple(lens.astype(np.float32) for lens in (down / 255, across, drawn))
