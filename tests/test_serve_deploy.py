"""The service as deploy/ starts it: the same arguments, files and probes; what it is given; its bill of materials."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from robustkit.errors import RobustkitError
from robustkit.models import zoo
from robustkit.serve import manifests, signing
from robustkit.serve.provision import provision
from robustkit.serve.server import running
from robustkit.serve.settings import Settings
from tests import postgres
from tests.serving import client, picture, settings

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
CLUSTER = {
    f"{item['kind']}/{item['metadata']['name']}": item["spec"]
    for item in manifests.read(ROOT / "deploy" / "kubernetes.yaml")
    if "spec" in item
}
DEPLOYMENT = CLUSTER["Deployment/classifier"]
POD = DEPLOYMENT["template"]["spec"]
CONTAINER = POD["containers"][0]
(COMPOSE,) = manifests.read(ROOT / "deploy" / "compose.yaml")
SERVICE = COMPOSE["services"]["classifier"]
needs_postgres = pytest.mark.skipif(postgres.PROGRAMS is None, reason=postgres.MISSING)


def free():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def option(arguments, name):
    (found,) = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"--{name}=")]
    return found


# --- they say the same ------------------------------------------------------------------------------------


def test_the_manifests_agree_with_each_other_and_with_the_service():
    arguments, ports = CONTAINER["args"], {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert option(arguments, "replicas") == str(DEPLOYMENT["replicas"])
    assert option(arguments, "workers") == CONTAINER["resources"]["limits"]["cpu"]
    assert {option(arguments, "port"), option(arguments, "admin-port")} == set(map(str, ports.values()))
    leaving = float(option(arguments, "settle")) + Settings.drain_seconds
    assert leaving < POD["terminationGracePeriodSeconds"]
    assert DEPLOYMENT["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert CLUSTER["PodDisruptionBudget/classifier"]["minAvailable"] < DEPLOYMENT["replicas"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert CONTAINER[probe]["httpGet"]["port"] in ports
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    assert DEPLOYMENT["selector"]["matchLabels"] == labels
    for name, port in (("classifier", "data"), ("classifier-control", "control")):
        service = CLUSTER[f"Service/{name}"]
        assert service["selector"] == labels
        assert [one["targetPort"] for one in service["ports"]] == [port]

    arguments = SERVICE["command"]
    assert option(arguments, "replicas") == str(SERVICE["deploy"]["replicas"])
    assert option(arguments, "workers") == SERVICE["deploy"]["resources"]["limits"]["cpus"]
    assert SERVICE["ports"][0].endswith(f":{option(arguments, 'port')}")
    assert Settings.drain_seconds < float(SERVICE["stop_grace_period"].rstrip("s"))

    user = f"{POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}"
    assert SERVICE["user"] == user
    assert f"\nUSER {user}\n" in DOCKERFILE
    assert f"\nEXPOSE {ports['data']}\n" in DOCKERFILE
    assert f":{ports['data']}{CONTAINER['livenessProbe']['httpGet']['path']}'" in DOCKERFILE  # HEALTHCHECK


def test_what_is_mounted_is_what_provision_makes(tmp_path):
    made = {
        path.name for path in [*provision("mnist-clean", tmp_path, "database").credentials.parent.iterdir()]
    }
    asked = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()} | {"models"}
    assert asked == made - {"signing.key"}  # which no container is given
    readme = (ROOT / "deploy" / "README.md").read_text()
    in_secret = set(re.findall(r"--from-file=deploy/run/(\S+)", readme))
    folder = next(mount["mountPath"] for mount in CONTAINER["volumeMounts"] if mount["name"] == "secrets")
    named = {Path(word.partition("=")[2]) for word in CONTAINER["args"] if f"={folder}/" in word}
    assert {path.name for path in named} == in_secret
    assert {path.parent for path in named} == {Path(folder)}


# --- it starts so -------------------------------------------------------------------------------------------


@contextmanager
def started(arguments, places, ports, folder):
    """The image's command with a manifest's arguments; only where things lie, and the ports, are this machine's."""

    def here(argument):
        name, equal, value = argument.rpartition("=")
        for inside, outside in places.items():
            if value == inside or value.startswith(f"{inside}/"):
                return f"{name}{equal}{outside}{value.removeprefix(inside)}"
        return f"{name}{equal}{ports.get(value, value)}"

    set_there = dict(
        re.findall(r"^(?:ENV)? +(HOME|PYTHONDONTWRITEBYTECODE|OMP_NUM_THREADS)=(\S+)", DOCKERFILE, re.M)
    )
    assert len(set_there) == 3
    environment = {"PATH": os.environ["PATH"], **set_there}
    command = [str(Path(sys.executable).with_name("robustkit")), *map(here, arguments)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(url, wanted, seconds=60):
    """Ask as the kubelet does, until the answer is the one that is waited for."""
    deadline, seen = time.monotonic() + seconds, None
    while seen != wanted:
        assert time.monotonic() < deadline, (url, seen)
        time.sleep(0.1)
        try:
            seen = httpx.get(url, timeout=2).status_code
        except httpx.TransportError as error:
            seen = type(error).__name__


def given(tmp_path, store):
    """What `provision` makes, and a store that is here."""
    made = provision("mnist-clean", tmp_path / "run", "database")
    assert "database/robustkit" in made.store.read_text()
    made.store.write_text(f"{store}\n")
    return made


@needs_postgres
@pytest.mark.slow
def test_the_deployment_starts_answers_its_probes_and_says_that_it_leaves(tmp_path):
    with postgres.server() as store:
        made = given(tmp_path, store)
        places = {
            "/models": made.model.parent,
            "/run/secrets/robustkit": made.store.parent,
            "/state": tmp_path / "state",
        }
        names = {port["name"]: str(port["containerPort"]) for port in CONTAINER["ports"]}
        ports = {number: str(free()) for number in names.values()}

        def asked(probe):
            wanted = CONTAINER[probe]["httpGet"]
            return f"http://127.0.0.1:{ports[names[wanted['port']]]}{wanted['path']}"

        assert not CONTAINER.get("env")
        with started(CONTAINER["args"], places, ports, tmp_path) as process:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                until(asked(probe), 200)
            secrets = json.loads(made.credentials.read_text())
            key = {"Authorization": f"Bearer {secrets['api_key']}"}
            url = f"http://127.0.0.1:{ports[names['data']]}/v1/classify"
            assert httpx.post(url, content=picture(0), headers=key, timeout=30).status_code == 200
            control = f"http://127.0.0.1:{ports[names['control']]}/admin/models"
            assert httpx.get(control, headers=key).status_code == 401
            models = httpx.get(control, headers={"Authorization": f"Bearer {secrets['admin']}"}).json()
            assert [model["name"] for model in models["models"]] == ["mnist-clean"]
            process.send_signal(signal.SIGTERM)
            until(asked("readinessProbe"), 503, seconds=5)
            assert httpx.get(asked("livenessProbe")).status_code == 200
            assert (
                httpx.post(url, content=picture(1), headers=key).status_code == 200
            )  # while balancers notice
        kept = {path.name for path in (tmp_path / "state").rglob("*")}
        assert not kept & {"credentials.json", "signing.key", "state.db"}


@needs_postgres
@pytest.mark.slow
def test_the_compose_files_service_starts(tmp_path):
    with postgres.server() as store:
        made = given(tmp_path, store)
        secrets = {
            f"/run/secrets/{name}": tmp_path / file["file"] for name, file in COMPOSE["secrets"].items()
        }
        places = {"/models": made.model.parent, "/state": tmp_path / "state", **secrets}
        ports = {number: str(free()) for number in ("8000", "8001")}
        with started(SERVICE["command"], places, ports, tmp_path):
            until(f"http://127.0.0.1:{ports['8000']}/readyz", 200)
            until(f"http://127.0.0.1:{ports['8001']}/admin/models", 401)


# --- what it is given -----------------------------------------------------------------------------------------


def test_provision_makes_once_and_signs_anew(tmp_path):
    first = provision("mnist-clean", tmp_path, "db.example:5433")
    secret = (first.credentials, first.signing_key, first.store, first.database_password)
    assert [path.stat().st_mode & 0o777 for path in secret] == [0o600] * 4
    password = first.database_password.read_text()
    assert first.store.read_text() == f"postgresql+psycopg2://robustkit:{password}@db.example:5433/robustkit"
    kept = {path: path.read_bytes() for path in (*secret, first.verify_key)}
    again = provision("mnist-pgd", tmp_path, "elsewhere")
    assert again == first
    assert {path: path.read_bytes() for path in kept} == kept
    assert [path.name for path in first.model.glob("*.json")] == ["mnist-pgd.json"]
    signing.verify(first.model, first.model.with_name("champion.sig"), first.verify_key)
    with pytest.raises(RobustkitError, match="mnist-magic"):
        provision("mnist-magic", tmp_path / "none", "database")
    assert not (tmp_path / "none").exists()


def outside(tmp_path, **changes):
    """Settings of a replica that is given everything from outside."""
    made = provision("mnist-clean", tmp_path / "run", "database")
    usual = {"model": str(made.model), "credentials_file": made.credentials, "verify_key": made.verify_key}
    return made, settings(tmp_path / "state", **(usual | changes))


def test_a_replica_whose_folder_is_new_takes_the_signed_model_over(tmp_path):
    """The store knows a champion already, and its files are not in this replica's folder."""
    store = f"sqlite:///{tmp_path / 'store.db'}"
    made, first = outside(tmp_path, store=store)
    with running(first) as here, client(here) as customer:
        assert here.api_key == json.loads(made.credentials.read_text())["api_key"]
        answer = customer.post("/v1/classify", content=picture(0))
        assert answer.status_code == 200
    second = settings(tmp_path / "other", **{name: getattr(first, name) for name in (
        "model", "credentials_file", "verify_key", "store")})  # fmt: skip
    with running(second) as here, client(here) as customer:
        told = customer.post("/v1/classify", content=picture(0)).json()
        assert told["label"] == answer.json()["label"]
        assert here.replica.registry.aliases()["champion"].digest == zoo.card("mnist-clean")["sha256"]


def damage(made, how):
    weights = next(made.model.glob("*.safetensors"))
    if how == "changed weights":
        body = bytearray(weights.read_bytes())
        body[-1] ^= 1
        weights.write_bytes(body)
    elif how == "a file more":
        (made.model / "x.py").write_text("print()")
    elif how == "no signature":
        made.model.with_name("champion.sig").unlink()
    else:
        made.verify_key.unlink()
        if how == "another's key":
            made.signing_key.unlink()
            signing.make_keys(made.verify_key.parent)


@pytest.mark.parametrize("how", ["changed weights", "a file more", "no signature", "another's key", "no key"])
def test_a_model_that_is_not_as_it_was_signed_does_not_start(tmp_path, how):
    """Whether the store is new or knows the champion already."""
    made, wanted = outside(tmp_path)
    damage(made, how)
    with pytest.raises(RobustkitError, match="signature"), running(wanted):
        pass
    made, wanted = outside(tmp_path / "second")
    with running(wanted):
        pass
    damage(made, how)
    with pytest.raises(RobustkitError, match="signature"), running(wanted):
        pass


def test_what_is_given_wrong_is_a_sentence(tmp_path, run, monkeypatch):
    made, _ = outside(tmp_path)
    monkeypatch.delenv("ROBUSTKIT_STORE", raising=False)
    serve = ["serve", "--folder", tmp_path / "state", "--port", "0", "--admin-port", "0"]

    def said(*arguments):
        status, _, err = run(*serve, *arguments)
        assert (status, err.count("\n"), "Traceback" in err) == (2, 1, False), err
        return err

    assert "nothing here can sign 'mnist-clean'" in said("mnist-clean", "--verify-key", made.verify_key)
    absent = tmp_path / "absent.json"
    assert "absent.json" in said("mnist-clean", "--credentials", absent)
    assert not absent.exists()  # made elsewhere, so not made here
    assert "absent.json" in said("mnist-clean", "--store-file", absent)
    absent.write_text("postgresql+psycopg2://robustkit:hunter2@127.0.0.1:1/x")
    told = said("mnist-clean", "--store-file", absent)
    assert "the store cannot be used (OperationalError)" in told
    assert "hunter2" not in told


def test_the_smoke_run_says_what_it_needs(tmp_path):
    """`make container` runs the image for real where the tools are; it installs none."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "container.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    said = "container: apt install podman buildah runc debootstrap util-linux, then run this again.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


# --- the bill of materials --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bill_of_materials_names_what_the_service_brings_exactly(tmp_path):
    out = tmp_path / "sbom.json"
    done = subprocess.run([sys.executable, ROOT / "scripts" / "sbom.py", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bill = json.loads(out.read_text())
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(out.read_text()) is None
    named = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    pins = {
        canonicalize_name(name): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    }
    for name in ("torch", "fastapi", "uvicorn", "safetensors", "pillow", "model-signing", "psycopg2-binary"):
        assert named[name].partition("+")[0] == pins[name]
    assert {
        name: version.partition("+")[0] for name, version in named.items() if name != "robustkit"
    }.items() <= (pins.items())
    assert not named.keys() & {"pytest", "jupyterlab", "nbgrader", "foolbox", "cyclonedx-bom"}
    refs = {part["bom-ref"] for part in bill["components"]}
    assert {ref for edge in bill["dependencies"] for ref in [edge["ref"], *edge["dependsOn"]]} <= refs
    assert all(
        part["purl"].startswith("pkg:pypi/") for part in bill["components"] if part["name"] != "robustkit"
    )
