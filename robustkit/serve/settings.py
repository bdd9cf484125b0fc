"""What an operator decides, and the credentials that a first start makes."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from robustkit.errors import RobustkitError
from robustkit.serve.auth import Issuer
from robustkit.serve.routing import Bounds

DETECTORS = ("fingerprints", "low-frequency")
OUTPUTS = ("label", "rounded", "full")
MODES = ("off", "shadow", "reject", "ban")


@dataclass(frozen=True)
class Settings:
    """How one replica serves. Times in seconds, sizes in bytes or pixels; port 0 is any that is free.

    Raises: RobustkitError for a value that no service can have.
    """

    folder: (
        Path  # registry, quarantine and what the next three do not name: keys, credentials, the SQLite file
    )
    model: str = (
        "cifar10-l2-w16"  # first champion: its name in the kit, or with a / the path of a signed folder
    )
    store: str = ""  # URL of PostgreSQL, when several replicas share their state
    credentials_file: Path | None = None  # made elsewhere, as `provision` does, and only read here
    verify_key: Path | None = None  # public half of the key that models are signed with, which is not here
    host: str = "127.0.0.1"
    port: int = 8000
    admin_host: str = "127.0.0.1"
    admin_port: int = 8001
    workers: int = os.cpu_count() or 1
    queue: int = 64  # calls that wait for a worker; more are shed
    refresh_seconds: float = 1  # for which accounts, aliases and the posture are believed once read
    readers: int = 256  # bodies that are read at one time
    output: str = "label"
    mode: str = "reject"  # what a flagged query meets
    detectors: tuple[str, ...] = DETECTORS
    cache: bool = True  # exact duplicates are answered from what was answered before
    squeeze_every: int = 200  # images of which one is squeezed for telemetry; 0: none
    ban_after: int = 5  # flags, in mode ban
    ban_seconds: float = 3_600
    account_rate: str = "600/minute"
    address_rate: str = "1200/minute"
    replicas: int = 1
    most_bytes: int = 8 * 2**20
    most_pixels: int = 16_000_000
    body_seconds: float = 10
    settle_seconds: float = 0  # between "not ready" and closing the port, for a balancer to notice
    drain_seconds: float = 20
    tidy_seconds: float = 600  # between two removals of what is past its time
    trusted_proxies: str = ""  # whose X-Forwarded-For is believed
    issuer: Issuer | None = None
    bounds: Bounds = field(default_factory=Bounds)

    def __post_init__(self) -> None:
        for name, known in (("output", OUTPUTS), ("mode", MODES)):
            if getattr(self, name) not in known:
                raise RobustkitError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}."
                )
        if unknown := set(self.detectors) - set(DETECTORS):
            raise RobustkitError(
                f"detectors {sorted(unknown)} are unknown; choose of {', '.join(DETECTORS)}."
            )
        least = {
            "workers": 1,
            "squeeze_every": 0,
            "queue": 0,
            "readers": 1,
            "replicas": 1,
            "ban_after": 1,
            "most_bytes": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise RobustkitError(f"{name} must be at least {bound}; got {getattr(self, name)}.")

    @property
    def store_url(self) -> str:
        """Where the state lives."""
        return self.store or f"sqlite:///{self.folder / 'state.db'}"

    @property
    def credentials_path(self) -> Path:
        """Where the credentials lie."""
        return self.credentials_file or self.folder / "credentials.json"


@dataclass(frozen=True)
class Credentials:
    """The secrets of a service, shared by its replicas. None of them is ever logged."""

    api_key: str = field(repr=False)  # of a first customer
    admin: str = field(repr=False)  # of the control plane
    metrics: str = field(repr=False)  # of /metrics, which would tell an attacker what was flagged
    pseudonyms: str = field(repr=False)  # makes accounts of keys
    quarantine: str = field(repr=False)  # encrypts kept images, 32 bytes as hexadecimal


def credentials(path: Path) -> Credentials:
    """The credentials in `path`, made at the first start in a file that its owner alone can read.

    Randomness: the operating system's. Raises: RobustkitError for a file that does not hold them.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_credentials(path)
    made = Credentials(
        api_key="rk_" + secrets.token_urlsafe(32),
        admin=secrets.token_urlsafe(32),
        metrics=secrets.token_urlsafe(32),
        pseudonyms=secrets.token_hex(32),
        quarantine=secrets.token_hex(32),
    )
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(asdict(made), file, indent=2)
    return made


def read_credentials(path: Path) -> Credentials:
    """The credentials in a file that is there. Raises: RobustkitError for one that does not hold them."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Credentials(**{field.name: str(found[field.name]) for field in fields(Credentials)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RobustkitError(
            f"{path} does not hold the service's credentials ({type(error).__name__}); "
            "restore it, or remove it to make new ones, with which old API keys no longer count."
        ) from error
