"""Queries on the wire: keys and their rotation, waiting when told to, counts of all that was refused."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustkit.errors import RobustkitError

Pixels = NDArray[np.uint8]

_TRIES = 3  # of a request that the network lost


@dataclass(frozen=True)
class Answer:
    """What the service said about an image: the class, and by its output policy a score for each class."""

    index: int
    scores: tuple[float, ...] | None = None


@dataclass
class Counts:
    """What became of the attacker's queries. `asked` are those that the service looked at, `rejected` some of them."""

    asked: int = 0
    rejected: int = 0
    throttled: int = 0
    shed: int = 0
    burnt: int = 0


class NoKeys(RobustkitError):
    """Every key of the attacker is burnt."""


def png(pixels: Pixels) -> bytes:
    """A lossless file of an image. Shapes: (h, w, c) uint8, c = 1 or 3."""
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(out, "PNG")
    return out.getvalue()


def decoded(body: bytes) -> Pixels:
    """The pixels in a file that `png` wrote. Shapes: (h, w, c) uint8."""
    with Image.open(io.BytesIO(body), formats=["PNG"]) as image:
        pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


class Client:
    """One attacker: `keys` in turn, `pace` seconds between queries, patient when told to wait.

    A key takes its turn for `turn` queries; without, until it is burnt: banned, or revoked after it worked once.
    429 and 503 are waited out for as long as Retry-After says, `patience` seconds a query in all. They are no
    queries: nobody looked at the image.
    Units: seconds. Raises: RobustkitError for a URL or a pace that cannot be.
    """

    def __init__(
        self,
        url: str,
        keys: Sequence[str],
        *,
        turn: int | None = None,
        pace: float = 0.0,
        patience: float = 180.0,
    ) -> None:
        if not pace >= 0:
            raise RobustkitError(f"the pace must be at least 0 seconds; got {pace}.")
        self.url, self.counts = url, Counts()
        self._keys, self._turn, self._pace, self._patience = list(keys), turn, pace, patience
        self._worked: set[str] = set()
        self._taken, self._last = 0, -float("inf")
        self._http = _session(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self, body: bytes) -> Answer | None:
        """The attacker's next query; None when a detector rejected it.

        Raises: NoKeys when the last key is burnt; RobustkitError for a service that cannot be reached, does not
        know a key, or answers what no query can be answered with.
        """
        time.sleep(max(0.0, self._last + self._pace - time.monotonic()))
        while self._keys:
            if self._turn is not None and self._taken >= self._turn:
                self._keys.append(self._keys.pop(0))
                self._taken = 0
            key = self._keys[0]
            response = self._post(body, key)
            self._last = time.monotonic()
            if _burns(response):
                if response.status_code == 401 and key not in self._worked:
                    raise RobustkitError(f"{self.url} does not know this API key; give one that it issued.")
                self._keys.pop(0)
                self._taken = 0
                self.counts.burnt += 1
                continue
            self._worked.add(key)
            self._taken += 1
            answer = self._read(response)
            self.counts.asked += 1
            self.counts.rejected += answer is None
            return answer
        raise NoKeys("every key is burnt; the attacker needs other accounts.")

    def target(self) -> str:
        """What the service says that it serves. Raises: RobustkitError when it cannot be reached or is not ready."""
        response = self._send("GET", "/readyz")
        try:
            return str(response.json()["model"])
        except (ValueError, KeyError, TypeError):
            said = f"GET /readyz gave {response.status_code}"
            raise RobustkitError(
                f"{self.url} is no robustkit service that is ready ({said}); start one by `robustkit serve`."
            ) from None

    # --- one request ---------------------------------------------------------------------------------

    def _post(self, body: bytes, key: str) -> httpx.Response:
        """The response to one image, after whatever waiting the service asks for."""
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "image/png"}
        waited = 0.0
        while True:
            response = self._send("POST", "/v1/classify", content=body, headers=headers)
            if response.status_code not in (429, 503):
                return response
            self.counts.throttled += response.status_code == 429
            self.counts.shed += response.status_code == 503
            after = response.headers.get("retry-after", "")
            wait = float(after) if after.isascii() and after.isdigit() else 1.0
            waited += wait
            if waited > self._patience:
                raise RobustkitError(
                    f"{self.url} answered {response.status_code} for {self._patience:g} seconds; "
                    "ask more slowly, or with more keys."
                )
            time.sleep(wait)

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        for left in reversed(range(_TRIES)):
            try:
                return self._http.request(method, path, **content)
            except httpx.TransportError as error:
                if not left:
                    raise _unreachable(self.url, error) from error
                time.sleep(0.1)
        raise AssertionError("the last try returned or raised")

    def _read(self, response: httpx.Response) -> Answer | None:
        """Raises: RobustkitError for a status or a body that answers no query."""
        if response.status_code == 403:
            return None
        try:
            told = response.json()
            if response.status_code == 200:
                scores = told.get("scores")
                # Under the policy "rounded" there is one score alone, which orders nothing.
                whole = (
                    None if scores is None or len(scores) < 2 else tuple(float(s) for s in scores.values())
                )
                return Answer(int(told["index"]), whole)
            said = str(told["detail"])
        except (ValueError, KeyError, TypeError, AttributeError):
            said = "and no reason"
        raise RobustkitError(
            f"{self.url}/v1/classify answered {response.status_code} ({said}); is it a robustkit service?"
        )


def _burns(response: httpx.Response) -> bool:
    """Whether the account, not the image, was refused: a rejection is a 403 whose detail is that one word."""
    if response.status_code == 401:
        return True
    if response.status_code != 403:
        return False
    try:
        return bool(response.json()["detail"] != "rejected")
    except (ValueError, KeyError, TypeError):
        return True


@dataclass(frozen=True)
class Access:
    """How an attacker gets in: the URL; keys to attack with, for each attack; a key that nothing was asked with yet.

    `note` says what of it a reader of the results has to know.
    """

    url: str
    keys: Callable[[], Sequence[str]]
    fresh: Callable[[], str]
    note: str = ""


def listed(url: str, keys: Sequence[str], attacks: int = 1) -> Access:
    """With keys that there are. Of several, the last is kept for untouched images and for results.

    The others are dealt out to so many attacks, the same number to each; too few for that are shared, and the note says
    so. Raises: RobustkitError without a key.
    """
    if not keys:
        raise RobustkitError("an attacker needs at least one API key; got none.")
    mine, each = keys[:-1] or keys, (len(keys) - 1) // attacks
    if each == 0:
        note = (
            f"The {attacks} attacks share {len(mine)} {'key' if len(mine) == 1 else 'keys'}: what one burns, and what "
            f"detectors remember of it, count against the next; {attacks + 1} keys would keep them apart"
        )
        return Access(url, lambda: mine, lambda: keys[-1], note if attacks > 1 else "")
    hands = itertools.cycle(mine[i * each : (i + 1) * each] for i in range(attacks))
    return Access(url, lambda: next(hands), lambda: keys[-1])


def granted(url: str, admin_url: str, credential: str, accounts: int) -> Access:
    """With new accounts from the control plane, so many for each attack. Raises: RobustkitError for less than one."""
    if accounts < 1:
        raise RobustkitError(f"an attacker needs at least one account; got {accounts}.")

    def key() -> str:
        return make_key(admin_url, credential)

    return Access(url, lambda: [key() for _ in range(accounts)], key)


def read_access(url: str, path: Path, admin_url: str = "", accounts: int = 1, attacks: int = 1) -> Access:
    """Access by the keys in a file, for so many attacks: one a line, or the credentials.json of a service.

    With `admin_url` the control plane makes `accounts` new ones for each attack. Raises: RobustkitError for a file that
    holds no key, or not the operator's credential where one is needed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RobustkitError(
            f"{path} cannot be read ({type(error).__name__}); give a file of API keys."
        ) from error
    try:
        made = json.loads(text)
        keys, admin = [str(made["api_key"])], str(made["admin"])
    except (ValueError, KeyError, TypeError):
        keys, admin = text.split(), ""
    if any(not key.isascii() for key in keys):
        raise RobustkitError(f"{path} holds no API keys; write one a line.")
    if admin_url:
        if not admin:
            raise RobustkitError(
                f"{path} does not hold the operator's credential; give the service's credentials.json."
            )
        return granted(url, admin_url, admin, accounts)
    if accounts != 1:
        raise RobustkitError(
            f"{accounts} accounts need --admin, which makes them; or list the keys in a file."
        )
    return listed(url, keys, attacks)


def make_key(admin_url: str, credential: str) -> str:
    """A key for a new account, from the control plane. Raises: RobustkitError when there is none to be had."""
    with _session(admin_url) as http:
        try:
            response = http.post("/admin/keys", headers={"Authorization": f"Bearer {credential}"})
        except httpx.TransportError as error:
            raise _unreachable(admin_url, error) from error
    try:
        return str(response.json()["api_key"])
    except (ValueError, KeyError, TypeError):
        raise RobustkitError(
            f"{admin_url} made no key ({response.status_code}); give the control plane's URL and its credential."
        ) from None


def _session(url: str) -> httpx.Client:
    try:
        if httpx.URL(url).scheme in ("http", "https") and httpx.URL(url).host:
            return httpx.Client(base_url=url, timeout=60)
    except (httpx.InvalidURL, TypeError):
        pass
    raise RobustkitError(f"{url!r} is no URL of a service; write it like http://127.0.0.1:8000.")


def _unreachable(url: str, error: httpx.TransportError) -> RobustkitError:
    return RobustkitError(f"{url} cannot be reached ({type(error).__name__}); is the service running there?")
