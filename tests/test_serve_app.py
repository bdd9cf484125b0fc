"""The data plane over real sockets: what it answers, whom it refuses, what it tells nobody."""

import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import httpx
import jwt
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from sqlalchemy import event

from robustkit import models
from robustkit.errors import RobustkitError
from robustkit.serve import auth, events
from robustkit.serve.auth import Issuer
from robustkit.serve.pipeline import spoken
from robustkit.serve.refusal import Refused
from robustkit.serve.server import running
from robustkit.serve.throttle import Throttle
from tests import postgres
from tests.serving import client, metric, operator, picture, png, settings


def pem_pair():
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return private, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


PRIVATE, PUBLIC = pem_pair()
ISSUER = Issuer(PUBLIC, "https://login.example", "robustkit")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with running(settings(tmp_path_factory.mktemp("service"), mode="off", issuer=ISSUER)) as here:
        yield here


def ask(service, body=None, **headers):
    body = picture(0) if body is None else body
    usual = {"Authorization": f"Bearer {service.api_key}"}
    return httpx.post(f"{service.url}/v1/classify", content=body, headers=usual | headers, timeout=30)


def refused(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["detail"].endswith(".")
    return problem["detail"]


# --- answers --------------------------------------------------------------------------------------------


def test_the_label_is_the_models(service):
    model = models.pretrained("mnist-clean")
    for seed in range(20):
        pixels = np.random.default_rng(seed).integers(0, 256, (28, 28), dtype=np.uint8)
        expected = int(model(torch.from_numpy(pixels)[None, None] / 255).argmax())
        answer = ask(service, png(pixels)).json()
        assert answer == {"label": str(expected), "index": expected, "request_id": answer["request_id"]}
        assert re.fullmatch(r"[0-9a-f]{16}", answer["request_id"])


def test_output_policies():
    scores, labels = np.array([0.149, 0.651, 0.2]), ("cat", "dog", "ship")
    assert spoken(scores, labels, "label") == {"label": "dog", "index": 1}
    assert spoken(scores, labels, "rounded") == {"label": "dog", "index": 1, "scores": {"dog": 0.7}}
    full = spoken(scores, labels, "full")["scores"]
    assert full == {"cat": 0.149, "dog": 0.651, "ship": 0.2}


def test_full_scores_on_the_wire(tmp_path):
    with running(settings(tmp_path, output="full")) as here:
        scores = ask(here).json()["scores"]
    assert list(scores) == [str(digit) for digit in range(10)]
    assert sum(scores.values()) == pytest.approx(1)


def test_duplicates_are_answered_from_the_cache_and_counted(service):
    before, body = metric(service, "robustkit_duplicates_total"), picture(4242)
    first, second = ask(service, body).json(), ask(service, body).json()
    assert first["label"] == second["label"]
    assert first["request_id"] != second["request_id"]
    assert metric(service, "robustkit_duplicates_total") == before + 1


# --- what operators see ---------------------------------------------------------------------------------


def test_telemetry_counts_every_answer_and_changes_none(tmp_path):
    """Roughness of a checkerboard is 1, of a grey picture 0; a repeat is measured once."""
    board = (255 * (np.indices((28, 28)).sum(0) % 2)).astype(np.uint8)
    with running(settings(tmp_path, mode="off", squeeze_every=1)) as here:
        for body in (png(board), png(np.full((28, 28), 99, np.uint8)), png(board)):
            assert ask(here, body).status_code == 200
        for name in ("roughness", "confidence", "squeezing"):
            assert metric(here, f"robustkit_{name}_count") == 2
        assert metric(here, "robustkit_roughness_sum") == pytest.approx(1.0)
        assert 0.2 <= metric(here, "robustkit_confidence_sum") <= 2.0


def test_telemetry_of_a_model_that_fails_costs_no_answer(tmp_path):
    with running(settings(tmp_path, mode="off", squeeze_every=1)) as here:
        pipeline = here.replica.plane.pipeline
        model = pipeline.router.champion
        with torch.no_grad():
            answered = pipeline.router.scores([("champion", model)], np.zeros((28, 28, 1), np.uint8))[1]
            next(model.model.parameters()).fill_(float("nan"))
        pipeline._measure(np.zeros((28, 28, 1), np.uint8), "0" * 64, answered, model)
        assert metric(here, "robustkit_confidence_count") == 1
        assert metric(here, "robustkit_squeezing_count") == 0


def test_the_head_of_the_chain_is_published(tmp_path):
    with running(settings(tmp_path)) as here:
        seq, digest = events.newest(here.replica.engine)
        assert metric(here, "robustkit_events") == seq > 0
        key = {"Authorization": f"Bearer {here.replica.credentials.metrics}"}
        text = httpx.get(f"{here.url}/metrics", headers=key).text
        assert f'robustkit_chain_info{{digest="{digest}"}} 1.0' in text
        events.append(here.replica.engine, "drill.begun", {}, actor="a test", now=1.0)
        assert metric(here, "robustkit_events") == seq + 1


# --- who may ask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic abc", "Bearer rk_wrong", "rk_x"])
def test_without_a_credential_nothing_is_answered(service, header):
    headers = {} if header is None else {"Authorization": header}
    answer = httpx.post(f"{service.url}/v1/classify", content=picture(0), headers=headers)
    refused(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_credentials_of_other_planes_open_nothing(service):
    made = service.replica.credentials
    for key in (made.admin, made.metrics, made.pseudonyms):
        refused(ask(service, Authorization=f"Bearer {key}"), 401)
    for key in (made.api_key, made.metrics):
        answer = httpx.get(f"{service.admin_url}/admin/models", headers={"Authorization": f"Bearer {key}"})
        refused(answer, 401)
    for key in (made.api_key, made.admin):
        refused(httpx.get(f"{service.url}/metrics", headers={"Authorization": f"Bearer {key}"}), 401)
    assert httpx.get(f"{service.url}/admin/models").status_code == 404


def token(key=PRIVATE, algorithm="ES256", **changes):
    claims = {"sub": "ann", "iss": ISSUER.issuer, "aud": ISSUER.audience, "exp": time.time() + 60} | changes
    return jwt.encode({k: v for k, v in claims.items() if v is not None}, key, algorithm)


def forged_hs256():
    """The public key as the secret of an HMAC: what a verifier takes that believes the token's own algorithm."""
    import base64
    import hashlib
    import hmac

    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    claims = {"sub": "ann", "iss": ISSUER.issuer, "aud": ISSUER.audience, "exp": time.time() + 60}
    signed = part({"alg": "HS256", "typ": "JWT"}) + b"." + part(claims)
    mac = hmac.new(PUBLIC.encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


def test_jwts(service):
    assert ask(service, Authorization=f"Bearer {token()}").status_code == 200
    wrong = {
        "another key": token(pem_pair()[0]),
        "no algorithm": jwt.encode(
            {"sub": "ann", "iss": ISSUER.issuer, "aud": ISSUER.audience, "exp": time.time() + 60},
            None,
            "none",
        ),
        "the public key as a secret": forged_hs256(),
        "expired": token(exp=time.time() - 60),
        "for ever": token(exp=None),
        "nobody": token(sub=None),
        "another issuer": token(iss="https://evil.example"),
        "another audience": token(aud="elsewhere"),
        "cut": token()[:-10],
    }
    for name, bad in wrong.items():
        assert ask(service, Authorization=f"Bearer {bad}").status_code == 401, name


def test_a_key_cannot_pass_for_a_jwts_subject(service):
    secret = bytes.fromhex(service.replica.credentials.pseudonyms)
    accounts = auth.Accounts(service.replica.engine, secret, ISSUER)
    by_key = accounts.identify(f"Bearer {service.api_key}").account
    by_token = accounts.identify(f"Bearer {token(sub=service.api_key)}").account
    assert by_key != by_token


def test_revoked_and_banned_accounts(tmp_path):
    with running(settings(tmp_path)) as here, operator(here) as admin:
        made = admin.post("/admin/keys").json()
        with client(here, made["api_key"]) as customer:
            assert customer.post("/v1/classify", content=picture(1)).status_code == 200
            engine, now = here.replica.engine, time.time()
            auth.ban(engine, made["account"], now + 0.8, now)
            time.sleep(0.15)  # a replica believes for a while what it read
            refused(customer.post("/v1/classify", content=picture(2)), 403)
            time.sleep(0.8)
            assert customer.post("/v1/classify", content=picture(3)).status_code == 200
            auth.revoke(engine, made["account"], time.time())
            time.sleep(0.15)
            refused(customer.post("/v1/classify", content=picture(4)), 401)


def test_the_store_knows_no_key(service):
    key = service.api_key
    with service.replica.engine.connect() as connection:
        dump = "\n".join(connection.connection.driver_connection.iterdump())
    assert "accounts" in dump
    assert key not in dump


# --- rates ----------------------------------------------------------------------------------------------


def test_rates_of_an_account_and_of_an_address(tmp_path):
    with running(settings(tmp_path, account_rate="3/hour", address_rate="8/hour", mode="off")) as here:
        with operator(here) as admin:
            other = admin.post("/admin/keys").json()["api_key"]
        codes = [ask(here, picture(i)).status_code for i in range(4)]
        assert codes == [200, 200, 200, 429]
        answer = ask(here)
        assert "asks more often than" in refused(answer, 429)
        assert 1 <= int(answer.headers["retry-after"]) <= 3600
        assert ask(here, Authorization=f"Bearer {other}").status_code == 200
        for _ in range(2):  # one address, whatever keys it tries
            assert ask(here, Authorization="Bearer rk_guess").status_code == 401
        assert "address" in refused(ask(here, Authorization=f"Bearer {other}"), 429)


def test_rates_are_divided_among_replicas_and_networks_are_one():
    throttle = Throttle("6/hour", "6/hour", replicas=3)
    for _ in range(2):
        throttle.account("a")
        throttle.address("2001:db8::1")
    for again in (lambda: throttle.account("a"), lambda: throttle.address("2001:db8::2")):
        with pytest.raises(Refused) as caught:
            again()
        assert caught.value.status == 429
    throttle.account("b")
    throttle.address("2001:db8:0:1::1")
    with pytest.raises(RobustkitError, match="write it like"):
        Throttle("many", "6/hour")
    with pytest.raises(RobustkitError, match="less than one"):
        Throttle("2/hour", "6/hour", replicas=3)


# --- bodies ---------------------------------------------------------------------------------------------


def raw(service, head, *parts, wait=0.0):
    """Bytes as they are, for what a client library would not send; what came back."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=15) as connection:
        start = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.api_key}\r\n"
        connection.sendall((start + head + "\r\n").encode())
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(wait)
        except OSError:
            pass  # it has said no already
        received = b""
        while b"\r\n\r\n" not in received or b"}" not in received:
            more = connection.recv(65536)
            if not more:
                break
            received += more
    return received


def test_too_large_is_refused_by_the_declaration_and_without_one(tmp_path):
    with running(settings(tmp_path, most_bytes=10_000)) as here:
        assert b" 413 " in raw(here, "Content-Length: 10001\r\n")  # before a byte of the body came
        piece = b"2000\r\n" + bytes(0x2000) + b"\r\n"
        assert b" 413 " in raw(here, "Transfer-Encoding: chunked\r\n", piece, piece, piece)
        refused(ask(here, bytes(10_001)), 413)
        refused(ask(here, bytes(10_000)), 415)
        assert ask(here).status_code == 200


def test_a_body_that_dribbles_in(tmp_path):
    with running(settings(tmp_path, body_seconds=0.5, readers=1)) as here:
        answers = []
        slow = threading.Thread(
            target=lambda: answers.append(raw(here, "Content-Length: 100\r\n", *[b"x"] * 4, wait=0.3))
        )
        slow.start()
        time.sleep(0.2)
        busy = ask(here)  # the one reader is taken
        refused(busy, 503)
        assert busy.headers["retry-after"] == "1"
        slow.join()
        assert b" 408 " in answers[0]
        assert ask(here).status_code == 200


def test_other_paths_and_methods(service):
    refused(httpx.get(f"{service.url}/v1/classify"), 405)
    refused(httpx.get(f"{service.url}/nothing"), 404)
    assert httpx.get(f"{service.url}/healthz").json() == {"status": "alive"}
    assert httpx.get(f"{service.url}/readyz").json()["status"] == "ready"
    assert httpx.get(f"{service.url}/docs").status_code == 404


# --- detectors ------------------------------------------------------------------------------------------


def near(seed):
    pixels = np.random.default_rng(7).integers(0, 256, (28, 28), dtype=np.uint8)
    pixels[0, seed] ^= 255
    return png(pixels)


def test_a_query_is_two_transactions_and_a_duplicate_one(tmp_path):
    """What is asked before the model is one, what it answered the other: each costs a customer time."""
    with running(settings(tmp_path, refresh_seconds=60)) as here, client(here) as customer:
        customer.post("/v1/classify", content=picture(0))
        commits = []
        event.listen(here.replica.engine, "commit", commits.append)
        customer.post("/v1/classify", content=picture(1))
        assert len(commits) == 2
        assert customer.post("/v1/classify", content=picture(1)).status_code == 200
        assert len(commits) == 3


@pytest.mark.parametrize("named", [("low-frequency", "fingerprints"), ("fingerprints", "low-frequency") * 2])
def test_detectors_are_asked_once_in_an_order_that_all_replicas_share(tmp_path, named):
    """In two orders, two replicas would wait for each other's rows; twice, for their own."""
    with running(settings(tmp_path, detectors=named)) as here:
        assert [one.name for one in here.replica.plane.pipeline.detectors] == [
            "fingerprints",
            "low-frequency",
        ]


def test_a_near_duplicate_is_rejected_kept_and_counted(tmp_path):
    with running(settings(tmp_path, mode="reject")) as here:
        assert ask(here, near(0)).status_code == 200
        answer = ask(here, near(1))
        assert answer.status_code == 403
        assert answer.json()["detail"] == "rejected"
        kept = here.replica.plane.pipeline.quarantine.items()
        assert len(kept) == 1
        assert metric(here, "robustkit_rejected_total") == 1
        assert ask(here, picture(5)).status_code == 200


def test_shadow_answers_and_remembers(tmp_path):
    with running(settings(tmp_path, mode="shadow")) as here:
        assert [ask(here, near(i)).status_code for i in range(3)] == [200, 200, 200]
        assert len(here.replica.plane.pipeline.quarantine.items()) == 2
        assert metric(here, "robustkit_rejected_total") == 0


def test_ban_after_so_many_flags(tmp_path):
    with running(settings(tmp_path, mode="ban", ban_after=2)) as here:
        assert ask(here, near(0)).status_code == 200
        assert [ask(here, near(i)).json()["detail"] for i in (1, 2)] == ["rejected", "rejected"]
        assert "banned" in refused(ask(here, picture(9)), 403)
        with operator(here) as admin:
            other = admin.post("/admin/keys").json()["api_key"]
        assert ask(here, near(3), Authorization=f"Bearer {other}").status_code == 200  # accounts stand alone


# --- what nobody is told --------------------------------------------------------------------------------


def test_logs_and_responses_hold_no_key_no_address_and_no_image(service, caplog):
    body = picture(77)
    with caplog.at_level(logging.INFO, "robustkit.serve"):
        ask(service, body)
        ask(service, b"secret-image-bytes")
        ask(service, Authorization="Bearer rk_stolen-key")
    told = "\n".join(json.dumps(record.fields, default=str) for record in caplog.records)
    assert told.count("status") == 3
    for hidden in (service.api_key, "127.0.0.1", "secret-image-bytes", "rk_stolen-key", str(body[:20])):
        assert hidden not in told
    assert set(json.loads(told.splitlines()[0])) == {"status", "ms", "request", "account", "label"}


def test_the_credentials_file_is_its_owners_alone_and_kept(tmp_path):
    with running(settings(tmp_path)) as first:
        key = first.api_key
    path = tmp_path / "credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "signing.key").stat().st_mode) == 0o600
    with running(settings(tmp_path)) as again:
        assert again.api_key == key
        assert ask(again).status_code == 200
    path.write_text("{}")
    with pytest.raises(RobustkitError, match="credentials"), running(settings(tmp_path)):
        pass
    assert path.read_text() == "{}"


# --- start and end --------------------------------------------------------------------------------------


def test_settings_that_no_service_can_have(tmp_path):
    usual = settings(tmp_path)
    for change in ({"output": "all"}, {"mode": "loud"}, {"workers": 0}, {"detectors": ("magic",)}):
        with pytest.raises(RobustkitError):
            replace(usual, **change)


def test_a_port_that_is_taken_is_said_in_a_sentence(service, tmp_path):
    port = int(service.url.rsplit(":", 1)[1])
    with pytest.raises(RobustkitError, match="cannot be listened on"), running(settings(tmp_path, port=port)):
        pass


NEEDS_POSTGRES = pytest.mark.skipif(postgres.PROGRAMS is None, reason=postgres.MISSING)


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=NEEDS_POSTGRES)])
def test_leaving_answers_what_was_accepted(tmp_path, kind):
    """Requests that are inside when the replica is told to leave get their answers; then the port is closed."""
    answers = []
    with (
        postgres.server() if kind == "postgresql" else nullcontext("") as store,
        running(settings(tmp_path, store=store, workers=1, mode="off", settle_seconds=1.5)) as here,
    ):
        slow = threading.Event()
        original = here.replica.plane.pipeline.router.champion.model.forward
        here.replica.plane.pipeline.router.champion.model.forward = lambda x: (slow.wait(20), original(x))[1]
        threads = [
            threading.Thread(target=lambda i=i: answers.append(ask(here, picture(i)))) for i in range(6)
        ]
        for thread in threads:
            thread.start()
        while here.replica.plane.pool.inside < 6:
            time.sleep(0.01)
        threading.Timer(2.0, slow.set).start()
        late = threading.Timer(0.1, lambda: answers.append(httpx.get(f"{here.url}/readyz")))
        late.start()
    for thread in [*threads, late]:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] * 6 + [503]
    with pytest.raises(httpx.ConnectError):
        ask(here)


@pytest.mark.slow
def test_the_command_serves_says_where_and_leaves_on_sigterm(tmp_path):
    command = [sys.executable, "-m", "robustkit", "serve", "mnist-clean", "--json"]
    command += ["--folder", str(tmp_path / "service"), "--port", "0", "--admin-port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
        said = json.loads("".join(lines))
        made = json.loads((tmp_path / "service" / "credentials.json").read_text())
        bearer = {"Authorization": f"Bearer {made['api_key']}"}
        answer = httpx.post(f"{said['url']}/v1/classify", content=picture(0), headers=bearer, timeout=30)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        _, logs = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    events = [json.loads(line)["event"] for line in logs.splitlines()]
    # The chain's head is logged beside the requests, by a thread that tidies.
    assert [event for event in events if event != "chain"] == ["classify", "draining", "stopped"]
    assert events.count("chain") == 1
    for secret in made.values():
        assert secret not in logs + "".join(lines)


def test_the_command_refuses_a_model_that_the_kit_does_not_have(run, tmp_path):
    status, _, err = run("serve", "mnist-magic", "--folder", tmp_path / "service", "--port", "0")
    assert status == 2
    assert "mnist-magic" in err
