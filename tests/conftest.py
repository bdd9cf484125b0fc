"""Fixtures that several test files ask for by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sqlalchemy import Engine
from torch import Tensor, nn

from robustkit import cli, data
from robustkit.device import seeded
from tests import postgres

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Iterator[None]:
    """Embedded digits and an empty folder to work in, whatever the shell says."""
    monkeypatch.delenv("ROBUSTKIT_DATA", raising=False)
    monkeypatch.delenv("ROBUSTKIT_TIER", raising=False)
    monkeypatch.setenv("ROBUSTKIT_OFFLINE", "1")
    monkeypatch.setenv("ROBUSTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    data._read_split.cache_clear()
    yield
    data._read_split.cache_clear()


@pytest.fixture
def run(capsys) -> Run:
    """One command in this process: its status and both streams."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return status, streams.out, streams.err

    return command


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """One PostgreSQL server for all tests of this process."""
    if postgres.PROGRAMS is None:
        pytest.skip(postgres.MISSING)
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request, tmp_path) -> Iterator[Engine]:
    """The service's empty store, once on each database."""
    from robustkit.serve.store import metadata, open_store

    sqlite = request.param == "sqlite"
    store = open_store(
        f"sqlite:///{tmp_path}/store.db" if sqlite else request.getfixturevalue("postgres_url")
    )
    metadata.drop_all(store)
    metadata.create_all(store)
    yield store
    store.dispose()


@pytest.fixture(scope="session")
def curved() -> tuple[nn.Module, Tensor, Tensor]:
    """A smooth network: without kinks, rounding cannot turn into another sign of a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
        for parameter in model.parameters():
            parameter.data.mul_(3)
    x = 0.3 + 0.4 * torch.rand(16, 3, 4, 4, generator=seeded(0))
    y = torch.randint(5, (16,), generator=seeded(1))
    return model, x, y
