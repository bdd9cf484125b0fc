"""What containers are given from outside: credentials, a signed model with its public key, the store's password."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from robustkit.models import zoo
from robustkit.serve import signing
from robustkit.serve.registry import bundle
from robustkit.serve.settings import credentials


@dataclass(frozen=True)
class Provision:
    """Files that were made. `signing_key` stays with whoever signs models: no container is given it."""

    credentials: Path
    signing_key: Path
    verify_key: Path
    model: Path  # a folder; its signature lies beside it
    store: Path  # URL of the store, the password in it
    database_password: Path


def provision(model: str, folder: Path, database: str) -> Provision:
    """Make what is not there yet, and sign the model anew; secrets are their owner's alone.

    `database` is the store's host, and its port after a colon. Randomness: the operating system's.
    Raises: RobustkitError for a model that the kit does not have.
    """
    zoo.card(model)
    folder.mkdir(parents=True, exist_ok=True)
    made = Provision(
        credentials=folder / "credentials.json",
        signing_key=folder / signing.PRIVATE,
        verify_key=folder / signing.PUBLIC,
        model=folder / "models" / "champion",
        store=folder / "store",
        database_password=folder / "database-password",
    )
    credentials(made.credentials)
    signing.make_keys(folder)
    _sign(model, made)
    if not made.store.exists():
        password = secrets.token_urlsafe(32)
        _write_secret(made.database_password, password)
        _write_secret(made.store, f"postgresql+psycopg2://robustkit:{password}@{database}/robustkit")
    return made


def _sign(model: str, made: Provision) -> None:
    """The kit's model as the folder `champion`, in the place of one that was there."""
    made.model.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.model.parent) as aside:
        signed = bundle(model, zoo.WEIGHTS, Path(aside), made.signing_key)
        shutil.rmtree(made.model, ignore_errors=True)
        signed.replace(made.model)
        signed.with_name(f"{model}.sig").replace(made.model.with_name(f"{made.model.name}.sig"))


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
