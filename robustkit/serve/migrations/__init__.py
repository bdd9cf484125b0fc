"""The store's schema, revision by revision (Alembic): an old store is brought up to date when a replica starts."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, text

_LOCK = 0x726B7365727665  # "rkserve": of PostgreSQL's advisory locks


def migrate(engine: Engine) -> None:
    """Bring the tables up to date, in one transaction; of several replicas that start at once one does it."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
