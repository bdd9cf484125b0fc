"""Things that go wrong while the service runs: nothing is lost, and nobody sees a 5xx other than 503."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext

import httpx
import numpy as np
import pytest
import schemathesis
import schemathesis.openapi
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sqlalchemy import event

from robustkit.errors import RobustkitError
from robustkit.models import zoo
from robustkit.serve import auth, events, incident
from robustkit.serve.registry import bundle
from robustkit.serve.server import running
from scripts.benching.load import Customer, opened
from tests import postgres
from tests.serving import client, metric, operator, picture, png, settings

needs_postgres = pytest.mark.skipif(postgres.PROGRAMS is None, reason=postgres.MISSING)


def near(seed):
    pixels = np.random.default_rng(7).integers(0, 256, (28, 28), dtype=np.uint8)
    pixels[0, seed] ^= 255
    return png(pixels)


class Traffic:
    """A client that sends a new picture again and again, in a thread: what came back, in order."""

    def __init__(self, *urls, key):
        self.urls, self.key = urls, key
        self.seen = []  # status, or the name of a broken connection
        self.late = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        rng, headers = random.Random(0), {"Authorization": f"Bearer {self.key}"}
        with httpx.Client(headers=headers, timeout=30) as session:
            while not self._stop.is_set():
                body = picture(rng.getrandbits(40))
                try:
                    answer = session.post(f"{rng.choice(self.urls)}/v1/classify", content=body)
                    self.seen.append(answer.status_code)
                    if answer.status_code == 503 and "retry-after" not in answer.headers:
                        self.late.append(answer.text)
                except httpx.TransportError as error:
                    self.seen.append(type(error).__name__)

    def wait(self, wanted, least=5):
        """Until `wanted` came `least` times from now on."""
        start, deadline = len(self.seen), time.monotonic() + 30
        while self.seen[start:].count(wanted) < least:
            assert time.monotonic() < deadline, Counter(self.seen[start:])
            time.sleep(0.02)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        assert self.late == []  # a 503 always says when to come again


# --- the store ------------------------------------------------------------------------------------------


@needs_postgres
def test_the_database_goes_down_and_comes_back(tmp_path):
    with postgres.cluster() as database, running(settings(tmp_path, store=database.url)) as here:
        posture = incident.State.SUSPECT
        incident.move(here.replica.engine, posture, reason="a test", actor="test", model="m", now=1.0)
        with Traffic(here.url, key=here.api_key) as traffic:
            traffic.wait(200)
            before = events.verify(here.replica.engine)
            database.stop()
            traffic.wait(503)
            assert httpx.get(f"{here.url}/healthz").status_code == 200
            with operator(here) as admin:
                assert admin.get("/admin/incidents").status_code == 503
            database.start()
            traffic.wait(200)
        assert set(traffic.seen) == {200, 503}
        assert events.verify(here.replica.engine) == before
        assert incident.posture(here.replica.engine, 2.0).state == posture


def test_the_disk_under_the_store_is_full(tmp_path):
    """SQLite's own limit of pages, so that it says what it says on a full disk."""
    with running(settings(tmp_path)) as here:
        engine = here.replica.engine
        with Traffic(here.url, key=here.api_key) as traffic:
            traffic.wait(200)

            @event.listens_for(engine, "checkout")
            def full(connection, record, proxy):
                connection.execute("PRAGMA max_page_count = 1")  # no more than there are

            traffic.wait(503)
            event.remove(engine, "checkout", full)

            @event.listens_for(engine, "checkout")
            def free(connection, record, proxy):
                connection.execute("PRAGMA max_page_count = 1000000000")

            traffic.wait(200)
        assert set(traffic.seen) == {200, 503}
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_the_disk_under_the_quarantine_is_full(tmp_path):
    with running(settings(tmp_path)) as here, client(here) as customer:
        customer.post("/v1/classify", content=near(0))
        folder = tmp_path / "quarantine"
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
        folder.write_text("no folder, so nothing can be written in it")
        answer = customer.post("/v1/classify", content=near(1))
        assert (answer.status_code, answer.json()["detail"]) == (403, "rejected")
        assert metric(here, "robustkit_side_effects_lost_total") == 1
        assert customer.post("/v1/classify", content=picture(3)).status_code == 200


# --- models ---------------------------------------------------------------------------------------------


def flip(path):
    body = bytearray(path.read_bytes())
    body[9000] ^= 1
    path.write_bytes(body)


def test_corrupt_weights_cost_nobody_an_answer(tmp_path):
    """A replica that runs goes on; one that starts takes the last good model; without one it says why and ends."""
    with running(settings(tmp_path)) as here, operator(here) as admin, client(here) as customer:
        bundle("mnist-pgd", zoo.WEIGHTS, tmp_path / "incoming", tmp_path / "signing.key")
        new = admin.post("/admin/models", json={"name": "mnist-pgd"}).json()["model"]
        admin.put("/admin/models/aliases/canary", json={"model": new, "percent": 100, "reason": "a test"})
        admin.post("/admin/models/promote", json={"reason": "a test"})
        customer.post("/v1/classify", content=picture(0))
        flip(tmp_path / "registry" / new / "mnist-pgd.safetensors")
        time.sleep(0.3)
        assert customer.post("/v1/classify", content=picture(1)).status_code == 200
        old = here.replica.registry.aliases()["last-good"].digest
        for path in ("/admin/models/aliases/canary", "/admin/models/aliases/fallback"):
            answer = admin.put(path, json={"model": new, "reason": "a test"})
            assert answer.status_code == 422
            assert "signature" in answer.json()["detail"]
    with running(settings(tmp_path)) as again, client(again) as customer:
        assert customer.post("/v1/classify", content=picture(2)).status_code == 200
        assert customer.get("/readyz").json()["model"] == old[:12]
    flip(tmp_path / "registry" / old / "mnist-clean.safetensors")
    with pytest.raises(RobustkitError, match="no model of the registry"), running(settings(tmp_path)):
        pass


# --- replicas -------------------------------------------------------------------------------------------


@contextmanager
def replica(folder, store):
    """A replica in a process of its own, as the command starts it; its process and its URL."""
    command = [sys.executable, "-m", "robustkit", "serve", "mnist-clean", "--json", "--folder", str(folder)]
    command += ["--port", "0", "--admin-port", "0", "--account-rate", "1000000/minute"]
    command += ["--address-rate", "1000000/minute", "--workers", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "ROBUSTKIT_STORE": store},
    )
    try:
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], "the replica did not start"
        yield process, json.loads("".join(lines))["url"]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def test_a_replica_is_killed_while_it_works(tmp_path, kind):
    """The other goes on, and what the dead one knew of accounts is not lost."""
    with (
        postgres.server() if kind == "postgresql" else nullcontext("") as store,
        replica(tmp_path, store) as (one, first),
        replica(tmp_path, store) as (_, second),
    ):
        key = json.loads((tmp_path / "credentials.json").read_text())["api_key"]
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.post(f"{first}/v1/classify", content=near(0), headers=headers).status_code == 200
        with Traffic(first, second, key=key) as traffic:
            traffic.wait(200, least=10)
            one.send_signal(signal.SIGKILL)
            traffic.wait("ConnectError", least=2)
            traffic.wait(200, least=10)
        assert {status for status in traffic.seen if isinstance(status, int)} == {200}
        answer = httpx.post(f"{second}/v1/classify", content=near(1), headers=headers)
        assert answer.json()["detail"] == "rejected"  # what the dead one had seen


def test_a_restart_forgets_nothing(tmp_path):
    with running(settings(tmp_path, mode="ban", ban_after=2)) as here, client(here) as customer:
        for seed in range(3):
            customer.post("/v1/classify", content=near(seed))
        kept = here.replica.plane.pipeline.quarantine.items()
        incident.move(
            here.replica.engine, incident.State.SUSPECT, reason="a test", actor="test", model="m", now=1.0
        )
        count = events.verify(here.replica.engine)
    with running(settings(tmp_path, mode="ban", ban_after=2)) as here, client(here) as customer:
        assert "banned" in customer.post("/v1/classify", content=picture(1)).json()["detail"]
        assert here.replica.plane.pipeline.quarantine.items() == kept
        assert len(kept) == 2
        assert incident.posture(here.replica.engine, 2.0).state == incident.State.SUSPECT
        assert events.verify(here.replica.engine) == count


# --- clocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0], ids=["back a day", "on a day"])
def test_the_clock_jumps(tmp_path, monkeypatch, jump):
    real = time.time
    changed = {"account_rate": "20/minute", "body_seconds": 2.0}
    with running(settings(tmp_path, **changed)) as here, client(here) as customer:
        before = [customer.post("/v1/classify", content=picture(i)).status_code for i in range(25)]
        assert before == [200] * 20 + [429] * 5
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        after = [customer.post("/v1/classify", content=picture(100 + i)).status_code for i in range(10)]
        assert set(after) == {200}  # locked out for no day
        auth.ban(here.replica.engine, "0" * 32, time.time() + 60, time.time())
        events.append(here.replica.engine, "note", {}, actor="test", now=time.time())
        events.verify(here.replica.engine)


# --- more than it can do --------------------------------------------------------------------------------


def test_at_ten_times_its_capacity_it_sheds_and_loses_nothing(tmp_path):
    """One worker of 0.2 s a request; 50 requests a second for three seconds, none of which waits for another."""
    most, service_time, seconds = 5, 0.2, 3.0
    with running(settings(tmp_path, workers=1, queue=most - 1, mode="off", cache=False)) as here:
        model = here.replica.plane.pipeline.router.champion.model
        original = model.forward
        model.forward = lambda x: (time.sleep(service_time), original(x))[1]

        bodies = [picture(i) for i in range(int(10 / service_time * seconds))]

        async def flood():
            async with Customer(here.url, here.api_key) as customer:
                return await opened(customer, bodies, 10 / service_time)

        replies, reached = asyncio.run(flood())
        counts = Counter(reply.status for reply in replies)
        assert set(counts) == {200, 503}, counts
        # One after the other, and never more waiting than may: however slowly this machine has sent them.
        assert most < counts[200] <= most + len(bodies) / reached / service_time + 1
        assert all(reply.retry_after for reply in replies if reply.status == 503)
        # What was accepted was answered: the service classified exactly as many as clients heard of.
        assert metric(here, "robustkit_answers_total") == counts[200]
        assert metric(here, "robustkit_requests_total") == len(bodies)
        assert here.replica.plane.pool.inside == 0


# --- any request that the schema allows, and some that it does not ----------------------------------------


for _kind in ("image/png", "image/jpeg"):
    schemathesis.openapi.media_type(_kind, st.binary(max_size=60) | st.integers(0, 50).map(picture))


@pytest.mark.parametrize("plane", ["data", "control"])
def test_no_request_makes_a_server_error(tmp_path, plane):
    with running(settings(tmp_path)) as here:
        url, token = (here.url, here.api_key) if plane == "data" else (here.admin_url, here.admin)
        headers = {"Authorization": f"Bearer {token}"}
        document = httpx.get(f"{url}/openapi.json", headers=headers).json()
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=url)
        seen = Counter()
        for found in schema.get_all_operations():
            operation = found.ok()

            @given(case=operation.as_strategy())
            @examples(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            def any_request(case):
                response = case.call(headers=headers)
                seen[response.status_code] += 1
                assert response.status_code < 500, (case, response.text)

            any_request()
        assert sum(seen.values()) >= 15
        assert {200, 415 if plane == "data" else 422} <= seen.keys()
