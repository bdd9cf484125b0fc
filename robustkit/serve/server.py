"""One replica: both planes on one event loop, assembled from settings, left gracefully."""

from __future__ import annotations

import asyncio
import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine, insert
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from robustkit.errors import RobustkitError
from robustkit.models import zoo
from robustkit.serve import auth, incident, signing
from robustkit.serve.admin import create_admin
from robustkit.serve.app import Plane, create_app
from robustkit.serve.cache import Answers
from robustkit.serve.detectors import Detector, Fingerprints, LowFrequency
from robustkit.serve.logs import log
from robustkit.serve.metrics import Metrics
from robustkit.serve.migrations import migrate
from robustkit.serve.pipeline import Pipeline
from robustkit.serve.pool import Pool
from robustkit.serve.quarantine import Quarantine
from robustkit.serve.registry import Registry, bundle
from robustkit.serve.routing import Router, read_probe
from robustkit.serve.settings import Credentials, Settings, credentials, read_credentials
from robustkit.serve.store import open_store
from robustkit.serve.throttle import Throttle


@dataclass(frozen=True)
class Replica:
    """What one process serves with."""

    settings: Settings
    credentials: Credentials
    engine: Engine
    registry: Registry
    plane: Plane
    data: FastAPI
    admin: FastAPI

    def close(self) -> None:
        """Let what runs finish, and leave the store."""
        self.plane.pool.close()
        self.engine.dispose()


def assemble(settings: Settings) -> Replica:
    """A replica from its settings; the first start makes credentials, keys, tables, and a champion from the kit.

    Raises: RobustkitError for a model that the kit does not have or whose signature does not fit, for a store out of
    reach, or when no model of the registry can be loaded.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    made_elsewhere = settings.credentials_file is not None
    secrets = (read_credentials if made_elsewhere else credentials)(settings.credentials_path)
    engine = _open(settings.store_url)
    now = time.time()
    pseudonyms = bytes.fromhex(secrets.pseudonyms)
    _list_first_key(engine, pseudonyms, secrets.api_key, now)
    registry = _registry(settings, engine, now)
    accounts = auth.Accounts(engine, pseudonyms, settings.issuer, believed=settings.refresh_seconds)
    quarantine = Quarantine(engine, settings.folder / "quarantine", bytes.fromhex(secrets.quarantine))
    metrics = Metrics()
    probe = settings.folder / "probe.npz"
    router = Router(
        registry,
        metrics,
        read_probe(probe) if probe.exists() else None,
        settings.bounds,
        believed=settings.refresh_seconds,
    )
    pipeline = Pipeline(
        settings,
        engine,
        accounts,
        router,
        metrics,
        incident.watched(engine, seconds=settings.refresh_seconds),
        detectors=[_detector(name, engine, pseudonyms) for name in sorted({*settings.detectors})],
        answers=Answers(engine) if settings.cache else None,
        quarantine=quarantine,
    )
    throttle = Throttle(settings.account_rate, settings.address_rate, settings.replicas)
    pool = Pool(settings.workers, settings.queue)
    plane = Plane(pipeline, accounts, throttle, pool, secrets.metrics)
    incoming = settings.folder / "incoming"
    admin = create_admin(engine, registry, quarantine, incoming, secrets.admin, pseudonyms)
    return Replica(settings, secrets, engine, registry, plane, create_app(plane), admin)


def _open(url: str) -> Engine:
    """The store with its tables up to date. Its URL holds a password, so no message repeats it."""
    try:
        engine = open_store(url)
        migrate(engine)
    except SQLAlchemyError as error:
        raise RobustkitError(
            f"the store cannot be used ({type(error).__name__}); start it, or correct its URL, which is "
            "ROBUSTKIT_STORE or what the --store-file holds."
        ) from error
    return engine


def _detector(name: str, engine: Engine, key: bytes) -> Detector:
    return (Fingerprints if name == Fingerprints.name else LowFrequency)(engine, key)


def _list_first_key(engine: Engine, secret: bytes, key: str, now: float) -> None:
    """A store that is new, or another one than before, must know the key that the operator was given."""
    account = auth.pseudonym(secret, f"key:{key}")
    with suppress(IntegrityError), engine.begin() as connection:
        connection.execute(insert(auth.accounts).values(account=account, created=now))


def _registry(settings: Settings, engine: Engine, now: float) -> Registry:
    """The registry; an empty one gets the settings' model as champion.

    A signed folder is taken over at each start: a replica whose own folder is new has the champion's files then.
    A model of the kit is signed here, once, by a key of this folder.
    """
    signed = Path(settings.model) if "/" in settings.model else None
    if settings.verify_key and not signed:
        raise RobustkitError(
            f"nothing here can sign {settings.model!r} for {settings.verify_key}; name a signed folder, made by "
            "`robustkit provision`."
        )
    public = settings.verify_key or signing.make_keys(settings.folder)[1]
    registry = Registry(engine, settings.folder / "registry", public)
    is_new = "champion" not in registry.aliases()
    if is_new and not signed:
        private = public.with_name(signing.PRIVATE)
        signed = bundle(settings.model, zoo.WEIGHTS, settings.folder / "incoming", private)
    if signed:
        digest = registry.register(signed, actor="service", now=now)
        if is_new:
            registry.assign("champion", digest, reason="first start", actor="service", now=now)
    return registry


# --- the two servers ----------------------------------------------------------------------------------


Listening = tuple[socket.socket, socket.socket]  # of the data plane, of the control plane


class _Server(uvicorn.Server):
    """uvicorn's, without its signal handlers: two of them share one process, which has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


Stop = Callable[[], None]  # from any thread, or a signal's handler


async def _serve(replica: Replica, listening: Listening, started: Callable[[Stop], None]) -> None:
    """Serve until the function that `started` is given is called; then drain.

    First the replica says that it is not ready and waits for balancers to notice; then the ports close; requests
    that are inside get their answers.
    """
    settings, loop, leave = replica.settings, asyncio.get_running_loop(), asyncio.Event()
    servers = [_Server(_config(settings, app)) for app in (replica.data, replica.admin)]
    running = [
        asyncio.create_task(server.serve([port])) for server, port in zip(servers, listening, strict=True)
    ]
    while not all(server.started for server in servers):
        await asyncio.sleep(0.01)

    def stop() -> None:
        loop.call_soon_threadsafe(leave.set)

    started(stop)
    tidying = asyncio.create_task(_tidy(replica))
    await leave.wait()
    tidying.cancel()
    replica.plane.draining = True
    replica.plane.metrics.draining.set(1)
    log("draining", {"inside": replica.plane.pool.inside})
    await asyncio.sleep(settings.settle_seconds)
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*running)
    replica.close()
    log("stopped", {})


async def _tidy(replica: Replica) -> None:
    """Now and then, remove what is past its time and log the chain's head; not while the store is out of reach."""
    while True:
        try:
            await asyncio.to_thread(replica.plane.pipeline.expire, time.time())
            seq, head = await asyncio.to_thread(replica.plane.pipeline.publish)
            log("chain", {"events": seq, "digest": head})  # an anchor where logs are kept
        except (OSError, SQLAlchemyError) as error:
            log("nothing was tidied", {"reason": type(error).__name__}, logging.WARNING)
        await asyncio.sleep(replica.settings.tidy_seconds)


def _config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(settings.drain_seconds),
    )


def _listen(host: str, port: int) -> socket.socket:
    """Raises: RobustkitError for a place where nobody can listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: asyncio sets TCP_NODELAY on no other socket, and without it each answer waits 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise RobustkitError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another with --host and --port."
        ) from error
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True)
class Running:
    """A service that listens: where, and how to be let in."""

    url: str
    admin_url: str
    api_key: str = field(repr=False)
    admin: str = field(repr=False)
    replica: Replica = field(repr=False)


def _listening(settings: Settings) -> tuple[Replica, Listening, Running]:
    """A replica and its two open ports. Raises: RobustkitError, before anything is left open."""
    replica = assemble(settings)
    try:
        data = _listen(settings.host, settings.port)
        try:
            admin = _listen(settings.admin_host, settings.admin_port)
        except RobustkitError:
            data.close()
            raise
    except RobustkitError:
        replica.close()
        raise
    made = replica.credentials
    return replica, (data, admin), Running(_url(data), _url(admin), made.api_key, made.admin, replica)


@contextmanager
def running(settings: Settings) -> Iterator[Running]:
    """The real service over sockets, in a thread of this process, drained at the end: for tests and notebooks."""
    replica, listening, here = _listening(settings)
    ready: queue.SimpleQueue[Stop] = queue.SimpleQueue()
    thread = threading.Thread(
        target=lambda: asyncio.run(_serve(replica, listening, ready.put)), name="robustkit-serve", daemon=True
    )
    thread.start()
    stop = ready.get(timeout=60)
    try:
        yield here
    finally:
        stop()
        thread.join()


def serve(settings: Settings, announce: Callable[[Running], None]) -> None:
    """Serve in this process until SIGTERM or SIGINT; `announce` is called when the ports are open."""
    replica, listening, here = _listening(settings)

    def started(stop: Stop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop())
        announce(here)

    asyncio.run(_serve(replica, listening, started))
