"""The control plane over real sockets, on SQLite and on PostgreSQL; the schema that both start from."""

import io
import threading
import time

import httpx
import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from PIL import Image
from sqlalchemy import inspect, text

from robustkit.models import zoo
from robustkit.serve import server as _every_table  # noqa: F401  (imports every module that declares one)
from robustkit.serve.migrations import migrate
from robustkit.serve.registry import bundle
from robustkit.serve.server import running
from robustkit.serve.store import metadata, open_store
from tests import postgres
from tests.serving import client, operator, picture, png, settings

POSTGRES = pytest.param(
    "postgresql", marks=pytest.mark.skipif(postgres.PROGRAMS is None, reason=postgres.MISSING)
)


@pytest.fixture(scope="module", params=["sqlite", POSTGRES])
def url(request, tmp_path_factory):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('store') / 'state.db'}"
    else:
        with postgres.server() as here:
            yield here


@pytest.fixture(scope="module")
def service(url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    with running(settings(folder, store=url, mode="shadow")) as here:
        for name in ("mnist-pgd", "mnist-fgsm"):
            bundle(name, zoo.WEIGHTS, folder / "incoming", folder / "signing.key")
        yield here


def done(answer, status=200):
    assert answer.status_code == status, answer.text
    return answer.json()


BECAUSE = {"reason": "a test"}


def test_a_model_from_the_incoming_folder_to_champion_and_back(service):
    with operator(service) as admin, client(service) as customer:
        before = done(admin.get("/admin/models"))["aliases"]["champion"]["digest"]
        new = done(admin.post("/admin/models", json={"name": "mnist-pgd"}), 201)["model"]
        done(admin.put("/admin/models/aliases/canary", json={"model": new, "percent": 100, **BECAUSE}))
        time.sleep(0.15)
        done(customer.post("/v1/classify", content=picture(1)))
        assert customer.get("/readyz").json()["model"] == before[:12]
        aliases = done(admin.post("/admin/models/promote", json=BECAUSE, headers={"X-Operator": "ann"}))[
            "aliases"
        ]
        assert (aliases["champion"]["digest"], aliases["last-good"]["digest"]) == (new, before)
        time.sleep(0.15)
        done(customer.post("/v1/classify", content=picture(2)))
        assert customer.get("/readyz").json()["model"] == new[:12]
        assert done(admin.post("/admin/models/rollback", json=BECAUSE))["taken_back"] == new
        time.sleep(0.15)
        done(customer.post("/v1/classify", content=picture(3)))
        assert customer.get("/readyz").json()["model"] == before[:12]
        told = done(admin.get("/admin/events"))["events"]
        promoted = next(event for event in told if event["kind"] == "model.promoted")
        assert (promoted["actor"], promoted["body"]["reason"]) == ("ann", "a test")
        assert done(admin.get("/admin/events/verify"))["events"] == len(told)
        assert "incoming" not in admin.post("/admin/models", json={"name": "absent"}).text


def test_a_candidate_that_failed_its_gate_cannot_become_canary(service):
    with operator(service) as admin:
        wanted = {"families": ["Linf", "rotation-translation"], **BECAUSE}
        done(admin.post("/admin/retrain", json=wanted), 202)
        new = done(admin.post("/admin/models", json={"name": "mnist-fgsm"}), 201)["model"]
        assignment = {"model": new, "percent": 5, **BECAUSE}
        for passed, status in ((False, 422), (True, 200)):
            found = {"model": new, "passed": passed, **BECAUSE}
            done(admin.post("/admin/retrain/judgements", json=found), 201)
            done(admin.put("/admin/models/aliases/canary", json=assignment), status)
        kinds = [event["kind"] for event in done(admin.get("/admin/retrain"))["events"]]
        assert kinds == ["retrain.requested", "retrain.judged", "retrain.judged"]
        done(admin.post("/admin/models/rollback", json=BECAUSE))


def test_an_incident_from_suspicion_to_review_changes_what_clients_get(service):
    near = np.random.default_rng(5).integers(0, 256, (28, 28), dtype=np.uint8)

    def moved(admin, to):
        answer = done(admin.post("/admin/incidents", json={"to": to, **BECAUSE}))["posture"]
        time.sleep(0.15)  # the data plane looks ten times a second
        return answer

    with operator(service) as admin, client(service) as customer:
        new = done(admin.post("/admin/models", json={"name": "mnist-pgd"}), 201)["model"]
        done(admin.put("/admin/models/aliases/fallback", json={"model": new, **BECAUSE}))
        done(customer.post("/v1/classify", content=png(near)))
        assert moved(admin, "suspect")["output"] == "rounded"
        assert list(done(customer.post("/v1/classify", content=picture(11)))) == [
            "label",
            "index",
            "scores",
            "request_id",
        ]
        assert admin.post("/admin/incidents", json={"to": "review", **BECAUSE}).status_code == 422
        assert moved(admin, "contain")["serving"] == "fallback"
        assert "scores" not in done(customer.post("/v1/classify", content=picture(12)))
        near[0, 0] ^= 255
        done(customer.post("/v1/classify", content=png(near)), 403)
        assert done(admin.post("/admin/incidents/bridge", json={"seconds": 60, **BECAUSE}))["posture"][
            "serving"
        ] == ("ensemble")
        done(admin.post("/admin/incidents/notes", json={"reason": "looks like a query attack"}), 201)
        for to in ("recover", "review", "normal"):
            moved(admin, to)
        timeline = done(admin.get("/admin/incidents"))["timeline"]
        assert [event["kind"].partition(".")[2] for event in timeline] == [
            *("suspect", "contain", "bridge", "note", "recover", "review", "normal")
        ]


def test_kept_images_come_out_as_they_came_in_and_looking_is_an_event(service):
    near = np.random.default_rng(6).integers(0, 256, (28, 28), dtype=np.uint8)
    with operator(service) as admin, client(service) as customer:
        done(customer.post("/v1/classify", content=png(near)))
        near[3, 3] ^= 255
        done(customer.post("/v1/classify", content=png(near)))
        kept = done(admin.get("/admin/quarantine"))
        item = kept["items"][-1]
        assert kept["bytes"] > 0
        assert done(admin.get(f"/admin/quarantine?account={item['account']}"))["items"][-1] == item
        picture_back = admin.get(f"/admin/quarantine/{item['digest']}", headers={"X-Operator": "ann"})
        assert (np.array(Image.open(io.BytesIO(picture_back.content))) == near).all()
        last = done(admin.get("/admin/events"))["events"][-1]
        assert (last["kind"], last["actor"], last["body"]) == (
            "quarantine.read",
            "ann",
            {"digest": item["digest"]},
        )
        assert done(admin.post("/admin/quarantine/expire"))["removed"] == 0
        assert admin.get(f"/admin/quarantine/{'0' * 64}").status_code == 422


def test_accounts_are_made_banned_and_ended(service):
    with operator(service) as admin:
        made = done(admin.post("/admin/keys"), 201)
        with client(service, made["api_key"]) as customer:
            done(customer.post("/v1/classify", content=picture(20)))
            done(admin.post(f"/admin/accounts/{made['account']}/ban", json={"seconds": 0.8, **BECAUSE}))
            time.sleep(0.15)
            done(customer.post("/v1/classify", content=picture(21)), 403)
            time.sleep(0.8)
            done(customer.post("/v1/classify", content=picture(22)))
            done(admin.post(f"/admin/accounts/{made['account']}/revoke", json=BECAUSE))
            time.sleep(0.15)
            done(customer.post("/v1/classify", content=picture(23)), 401)


def test_no_path_of_the_control_plane_opens_without_its_credential(service):
    schema = service.replica.admin.openapi()
    tried = 0
    for path, methods in schema["paths"].items():
        for method in methods:
            place = path.format(alias="canary", digest="0" * 64, account="0" * 32)
            answer = httpx.request(method, f"{service.admin_url}{place}", json={})
            assert answer.status_code == 401, (method, path)
            tried += 1
    assert tried >= 18


def test_two_replicas_on_one_store_are_one_service(url, service, tmp_path):
    """An attacker gains nothing by asking another replica, and an operator need not tell each of them."""
    near = np.random.default_rng(8).integers(0, 256, (28, 28), dtype=np.uint8)
    other = settings(service.replica.settings.folder, store=url, mode="reject")
    with running(other) as twin, operator(service) as admin:
        made = done(admin.post("/admin/keys"), 201)
        with client(service, made["api_key"]) as one, client(twin, made["api_key"]) as two:
            done(one.post("/v1/classify", content=png(near)))
            near[2, 2] ^= 255
            assert done(two.post("/v1/classify", content=png(near)), 403)["detail"] == "rejected"
            done(admin.post(f"/admin/accounts/{made['account']}/ban", json={"seconds": 60, **BECAUSE}))
            time.sleep(0.15)
            for customer in (one, two):
                done(customer.post("/v1/classify", content=picture(30)), 403)


# --- the schema -----------------------------------------------------------------------------------------


def test_the_migrations_make_the_tables_that_the_code_declares(url):
    engine = open_store(url)
    migrate(engine)
    migrate(engine)  # nothing left to do
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "0001"
    engine.dispose()


def test_replicas_that_start_at_once_make_the_tables_once(tmp_path):
    engines = [open_store(f"sqlite:///{tmp_path / 'state.db'}") for _ in range(4)]
    failed = []

    def start(engine):
        try:
            migrate(engine)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=start, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert set(metadata.tables) < set(inspect(engines[0]).get_table_names())
    for engine in engines:
        engine.dispose()
