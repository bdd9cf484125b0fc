"""State that outlives a process and is shared by replicas: one `MetaData`, SQLite by default, PostgreSQL by URL.

Each module declares its own tables on `metadata`, beside the code that reads and writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ClauseElement,
    Connection,
    Engine,
    MetaData,
    Row,
    Table,
    create_engine,
    event,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

metadata = MetaData()


def open_store(url: str) -> Engine:
    """An engine on which writers of several processes wait for each other instead of failing.

    SQLite gets a write-ahead log, so that readers never wait, and five seconds of patience; the log may grow to
    32 MB, so that fewer than one commit in a hundred waits for it to be written back. PostgreSQL is asked whether
    a pooled connection still lives before it is used.
    """
    engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, record: Any) -> None:
            for pragma in (
                "journal_mode=WAL",
                "synchronous=NORMAL",
                "busy_timeout=5000",
                "foreign_keys=ON",
                "wal_autocheckpoint=8000",
            ):
                connection.execute(f"PRAGMA {pragma}")

    return engine


def insert(connection: Connection | Engine, table: Table) -> Any:
    """An INSERT that can say what happens on a conflict: the same clause in both dialects."""
    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


class Prepared:
    """A statement that is put together once and given to the driver: for those that every query needs.

    SQLAlchemy's own way from a statement to its rows costs several times what SQLite's work on it does.
    """

    def __init__(self, engine: Engine, statement: ClauseElement) -> None:
        compiled: Any = statement.compile(engine)
        self._text, self._order, self._fixed = str(compiled), compiled.positiontup, compiled.params
        self._errors = engine.dialect.loaded_dbapi.Error

    def __call__(self, connection: Connection, **values: Any) -> tuple[Sequence[Any], int]:
        """The rows that it returns and how many it changed, with these values, in the connection's transaction.

        Raises: DBAPIError for what the driver raises; the connection is given up then.
        """
        if not connection.in_transaction():
            connection.begin()
        given = self._fixed | values
        try:
            cursor = connection.connection.cursor()
            cursor.execute(
                self._text, given if self._order is None else [given[name] for name in self._order]
            )
            return (cursor.fetchall() if cursor.description else []), cursor.rowcount
        except self._errors as error:
            connection.invalidate(error)
            raise DBAPIError(self._text, None, error) from error


def only_row(connection: Connection, table: Table, **first: Any) -> Row[Any]:
    """The one row of `table`, made of `first` if there is none, and this transaction's alone until its end.

    The INSERT comes before the SELECT because it is what takes SQLite's write lock.
    """
    connection.execute(insert(connection, table).values(**first).on_conflict_do_nothing())
    return connection.execute(select(table).with_for_update()).one()
