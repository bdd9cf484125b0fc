"""What ships in deploy/ is as it should be, and each hardening that is taken away is found by some check."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from robustkit.errors import RobustkitError
from robustkit.serve import manifests

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
CLUSTER = manifests.read(DEPLOY / "kubernetes.yaml")
COMPOSE = manifests.read(DEPLOY / "compose.yaml")
GONE = object()


def changed(documents, way, value):
    """A copy in which what lies at "Kind/name:key.key.0" is another thing, or gone."""
    documents = copy.deepcopy(documents)
    which, _, keys = way.partition(":")
    kind, _, name = which.partition("/")
    (place,) = [
        item
        for item in documents
        if kind in ("", item.get("kind")) and name in ("", (item.get("metadata") or {}).get("name"))
    ]
    *path, last = [int(key) if key.isdigit() else key for key in re.split(r"\.(?![a-z-]+/)", keys)]
    for key in path:
        place = place[key]
    if value is GONE:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value
    return documents


def without(documents, kind, name):
    return [item for item in documents if (item["kind"], item["metadata"]["name"]) != (kind, name)]


# --- what ships -----------------------------------------------------------------------------------------


def test_nothing_is_found_in_what_ships():
    assert manifests.check(CLUSTER) == []
    assert manifests.check(COMPOSE) == []


def validated(path):
    command = [Path(sys.executable).with_name("kubernetes-validate"), "--strict", path]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_api_server_knows_every_field():
    done = validated(DEPLOY / "kubernetes.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("passed for resource") == len(CLUSTER)


def test_a_misspelt_hardening_is_found_twice(tmp_path):
    """A field that the API server does not know is one that does nothing."""
    text = (
        (DEPLOY / "kubernetes.yaml").read_text().replace("readOnlyRootFilesystem", "readonlyRootFilesystem")
    )
    path = tmp_path / "misspelt.yaml"
    path.write_text(text)
    assert validated(path).returncode != 0
    assert {finding.rule for finding in manifests.check(manifests.read(path))} == {"read-only-root"}


# --- each hardening removed: where, what stands there then, the rule that finds it --------------------------

POD = "Deployment/classifier:spec.template.spec"
OWN = f"{POD}.containers.0"
POLICY = "NetworkPolicy/classifier:spec"
ANYBODY = {"namespaceSelector": {}}
PORT = [{"port": 8000}]
REMOVED = [
    (f"{POD}.hostNetwork", True, "host-namespaces"),
    (f"{POD}.hostPID", True, "host-namespaces"),
    (f"{POD}.hostIPC", True, "host-namespaces"),
    (f"{POD}.automountServiceAccountToken", GONE, "no-token"),
    (f"{POD}.volumes.4", {"name": "t", "projected": {"sources": [{"serviceAccountToken": {}}]}}, "no-token"),
    (f"{POD}.securityContext.runAsNonRoot", GONE, "run-as-non-root"),
    (f"{OWN}.securityContext.runAsNonRoot", False, "run-as-non-root"),
    (f"{POD}.securityContext.runAsUser", 0, "run-as-user"),
    (f"{OWN}.securityContext.runAsUser", 0, "run-as-user"),
    (f"{POD}.securityContext.seccompProfile", GONE, "seccomp"),
    (f"{POD}.securityContext.seccompProfile.type", "Unconfined", "seccomp"),
    (f"{OWN}.securityContext.seccompProfile", {"type": "Unconfined"}, "seccomp"),
    (f"{OWN}.securityContext.appArmorProfile", {"type": "Unconfined"}, "apparmor"),
    (
        "Deployment/classifier:spec.template.metadata.annotations",
        {"container.apparmor.security.beta.kubernetes.io/classifier": "unconfined"},
        "apparmor",
    ),
    (f"{OWN}.securityContext.seLinuxOptions", {"type": "spc_t"}, "selinux"),
    (f"{OWN}.securityContext.procMount", "Unmasked", "proc-mount"),
    (f"{POD}.securityContext.sysctls", [{"name": "kernel.core_pattern", "value": "x"}], "sysctls"),
    (f"{OWN}.securityContext.windowsOptions", {"hostProcess": True}, "host-process"),
    (f"{OWN}.securityContext.privileged", True, "privileged"),
    (f"{OWN}.securityContext.allowPrivilegeEscalation", GONE, "privilege-escalation"),
    (f"{OWN}.securityContext.allowPrivilegeEscalation", True, "privilege-escalation"),
    (f"{OWN}.securityContext.capabilities", GONE, "capabilities"),
    (f"{OWN}.securityContext.capabilities.drop", ["NET_RAW"], "capabilities"),
    (f"{OWN}.securityContext.capabilities.add", ["SYS_ADMIN"], "capabilities"),
    (f"{OWN}.securityContext.readOnlyRootFilesystem", GONE, "read-only-root"),
    (f"{OWN}.securityContext", GONE, "read-only-root"),
    (f"{OWN}.ports.0.hostPort", 8000, "host-ports"),
    (f"{OWN}.livenessProbe.httpGet.host", "169.254.169.254", "host-probes"),
    (f"{OWN}.lifecycle", {"preStop": {"httpGet": {"host": "x", "port": 1}}}, "host-probes"),
    (f"{POD}.volumes.4", {"name": "node", "hostPath": {"path": "/"}}, "volume-types"),
    (f"{POD}.volumes.3.emptyDir.sizeLimit", GONE, "scratch-size"),
    (f"{OWN}.image", "registry.example/robustkit:1.0", "image-digest"),
    (f"{OWN}.image", GONE, "image-digest"),
    (f"{POD}.containers", "none", "image-digest"),
    (f"{OWN}.resources.limits.cpu", GONE, "limits"),
    (f"{OWN}.resources.limits.memory", GONE, "limits"),
    (f"{OWN}.resources.limits.ephemeral-storage", GONE, "limits"),
    (f"{OWN}.resources", GONE, "limits"),
    (f"{OWN}.volumeMounts.0.readOnly", GONE, "model-read-only"),
    (f"{OWN}.env", [{"name": "ROBUSTKIT_STORE", "value": "postgresql://u:p@h/d"}], "secrets-as-files"),
    (
        f"{OWN}.env",
        [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        "secrets-as-files",
    ),
    (f"{OWN}.env", [{"name": "DB_PASSWORD", "value": "p"}], "secrets-as-files"),
    (f"{OWN}.envFrom", [{"secretRef": {"name": "robustkit"}}], "secrets-as-files"),
    (f"{OWN}.args.5", "--store=postgresql://u:p@h/d", "secrets-as-files"),
    (f"{OWN}.livenessProbe", GONE, "probes"),
    (f"{OWN}.readinessProbe", GONE, "probes"),
    (f"{POD}.initContainers", [{"name": "i", "image": "x@sha256:" + "0" * 64}], "privilege-escalation"),
    ("Namespace/robustkit:metadata.labels", GONE, "namespace-enforces"),
    ("Namespace/robustkit:metadata.name", "other", "namespace-enforces"),
    (
        "Namespace/robustkit:metadata.labels",
        {"pod-security.kubernetes.io/enforce": "baseline"},
        "namespace-enforces",
    ),
    ("PodDisruptionBudget/classifier:spec.minAvailable", GONE, "disruption-budget"),
    ("PodDisruptionBudget/classifier:spec.selector.matchLabels", {"app": "other"}, "disruption-budget"),
    (f"{POLICY}.ingress.0.from", GONE, "network-policy"),
    (f"{POLICY}.ingress.0.from", [ANYBODY], "network-policy"),
    (f"{POLICY}.ingress.0.from", [{"podSelector": {}}], "network-policy"),
    (f"{POLICY}.ingress.0.ports", GONE, "network-policy"),
    (f"{POLICY}.ingress.0", {}, "network-policy"),
    (f"{POLICY}.egress.2", {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": PORT}, "network-policy"),
    (f"{POLICY}.egress.2", {"ports": PORT}, "network-policy"),
    (f"{POLICY}.ingress.0.ports.1", {"port": 8001}, "control-apart"),
    ("Service/classifier:spec.ports.1", {"name": "control", "port": 8001}, "control-apart"),
    ("Service/classifier:spec.type", "LoadBalancer", "service-inside"),
    ("Service/classifier-control:spec.type", "NodePort", "service-inside"),
    ("Service/classifier:spec.externalIPs", ["192.0.2.1"], "service-inside"),
]


@pytest.mark.parametrize(("way", "value", "rule"), REMOVED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_hardening_removed_from_the_manifests_is_found(way, value, rule):
    found = manifests.check(changed(CLUSTER, way, value))
    assert rule in {finding.rule for finding in found}
    for finding in found:
        assert finding.rule in manifests.RULES
        assert re.fullmatch(r"[A-Z].*: .*; .*\.", finding.sentence)


def test_every_rule_is_broken_by_something():
    assert {rule for _, _, rule in REMOVED} == set(manifests.RULES)


def test_no_finding_says_more_than_what_was_removed():
    """A checker that finds everything everywhere would pass the test above."""
    for way, value, rule in REMOVED:
        if (
            "securityContext" in way
            and not way.endswith(":securityContext")
            and way != f"{OWN}.securityContext"
        ):
            assert {finding.rule for finding in manifests.check(changed(CLUSTER, way, value))} == {rule}, way


def test_policies_and_an_ingress_that_are_missing_or_too_much():
    def rules(documents):
        return {finding.rule for finding in manifests.check(documents)}

    bare = without(without(CLUSTER, "NetworkPolicy", "classifier"), "NetworkPolicy", "nothing")
    assert rules(bare) == {"network-policy"}
    other = changed(CLUSTER, "NetworkPolicy/classifier:metadata.namespace", "other")
    assert rules(without(other, "NetworkPolicy", "nothing")) == {"network-policy"}
    assert rules(without(CLUSTER, "PodDisruptionBudget", "classifier")) == {"disruption-budget"}
    assert rules(without(CLUSTER, "Namespace", "robustkit")) == {"namespace-enforces"}
    backend = {"service": {"name": "classifier-control", "port": {"number": 8001}}}
    ingress = {
        "kind": "Ingress",
        "metadata": {"name": "way-in", "namespace": "robustkit"},
        "spec": {"rules": [{"http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}]},
    }
    assert rules([*CLUSTER, ingress]) == {"control-apart"}
    backend["service"]["name"] = "classifier"
    assert rules([*CLUSTER, ingress]) == set()


def test_what_pod_security_restricted_allows_is_not_found():
    allowed = [
        (f"{OWN}.securityContext.capabilities.add", ["NET_BIND_SERVICE"]),
        (f"{OWN}.securityContext.seccompProfile", {"type": "Localhost", "localhostProfile": "p.json"}),
        (f"{OWN}.securityContext.seLinuxOptions", {"type": "container_t", "level": "s0:c1,c2"}),
        (f"{POD}.securityContext.sysctls", [{"name": "net.ipv4.tcp_syncookies", "value": "1"}]),
        (f"{POD}.volumes.4", {"name": "c", "configMap": {"name": "c"}}),
        (f"{OWN}.securityContext.runAsUser", 65532),
    ]
    for way, value in allowed:
        assert manifests.check(changed(CLUSTER, way, value)) == [], way


def test_pods_are_seen_wherever_they_are_made():
    (deployment,) = [item for item in CLUSTER if item["kind"] == "Deployment"]
    template, named = deployment["spec"]["template"], {"metadata": deployment["metadata"]}
    made = {
        "Pod": {**template, **named},
        "Job": {**named, "spec": {"template": template}},
        "CronJob": {**named, "spec": {"jobTemplate": {"spec": {"template": template}}}},
        "DaemonSet": {**named, "spec": {"template": template}},
        "List": {"items": [deployment]},
    }
    for kind, item in made.items():
        documents = [*without(CLUSTER, "Deployment", "classifier"), {"kind": kind, **item}]
        weak = json.loads(json.dumps(documents).replace('"readOnlyRootFilesystem": true', '"x": 1'))
        assert {finding.rule for finding in manifests.check(weak)} >= {"read-only-root"}, kind


# --- compose ------------------------------------------------------------------------------------------------

SERVICE, DATABASE = ":services.classifier", ":services.database"
UNDONE = [
    (f"{SERVICE}.read_only", GONE, "read-only-root"),
    (f"{SERVICE}.cap_drop", GONE, "capabilities"),
    (f"{SERVICE}.cap_add", ["SYS_ADMIN"], "capabilities"),
    (f"{SERVICE}.security_opt", GONE, "privilege-escalation"),
    (f"{SERVICE}.security_opt.1", "seccomp:unconfined", "seccomp"),
    (f"{SERVICE}.security_opt.1", "apparmor=unconfined", "apparmor"),
    (f"{SERVICE}.privileged", True, "privileged"),
    (f"{SERVICE}.network_mode", "host", "host-namespaces"),
    (f"{SERVICE}.pid", "host", "host-namespaces"),
    (f"{SERVICE}.user", GONE, "run-as-non-root"),
    (f"{SERVICE}.user", "0:0", "run-as-non-root"),
    (f"{SERVICE}.user", "root", "run-as-non-root"),
    (f"{SERVICE}.build.args.BASE", "python:3.12-slim", "image-digest"),
    (f"{SERVICE}.deploy.resources.limits.memory", GONE, "limits"),
    (f"{SERVICE}.deploy.resources.limits.cpus", GONE, "limits"),
    (f"{SERVICE}.deploy.resources.limits.pids", GONE, "limits"),
    (f"{SERVICE}.tmpfs.0", "/tmp", "scratch-size"),
    (f"{SERVICE}.volumes.0", "models:/models", "model-read-only"),
    (f"{SERVICE}.volumes.2", "./run:/run/secrets", "volume-types"),
    (f"{SERVICE}.volumes.2", "/var/run/docker.sock:/var/run/docker.sock", "volume-types"),
    (
        f"{SERVICE}.volumes.2",
        {"type": "bind", "source": "/etc", "target": "/x", "read_only": True},
        "volume-types",
    ),
    (f"{SERVICE}.environment", {"ROBUSTKIT_STORE": "postgresql://u:p@database/x"}, "secrets-as-files"),
    (f"{SERVICE}.environment", ["API_TOKEN=x"], "secrets-as-files"),
    (f"{SERVICE}.ports.0", "8000:8000", "network-policy"),
    (f"{SERVICE}.ports.0", {"target": 8000, "published": "8000"}, "network-policy"),
    (f"{SERVICE}.ports.1", "127.0.0.1:8001:8001", "control-apart"),
    (f"{SERVICE}.command.8", "--admin-host=0.0.0.0", "control-apart"),
    (f"{SERVICE}.networks", GONE, "network-policy"),
    (":networks.front.driver_opts", GONE, "network-policy"),
    (":networks.store.internal", GONE, "network-policy"),
    (f"{DATABASE}.image", "postgres:17", "image-digest"),
    (f"{DATABASE}.healthcheck", GONE, "probes"),
    (f"{DATABASE}.environment.POSTGRES_PASSWORD", "p", "secrets-as-files"),
    (f"{DATABASE}.read_only", False, "read-only-root"),
    (f"{DATABASE}.ports", ["5432:5432"], "network-policy"),
]


@pytest.mark.parametrize(("way", "value", "rule"), UNDONE, ids=lambda x: x if isinstance(x, str) else "")
def test_a_hardening_removed_from_the_compose_file_is_found(way, value, rule):
    assert {finding.rule for finding in manifests.check(changed(COMPOSE, way, value))} == {rule}


# --- the Dockerfile --------------------------------------------------------------------------------------

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def problems(text, folder):
    """What hadolint says, and what we ask beyond it."""
    path = folder / "Dockerfile"
    path.write_text(text)
    linted = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), path], capture_output=True, text=True
    )
    found = linted.stdout.splitlines()
    lines = [line for line in text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    asked = {
        "both stages stand on the base that was named": [line for line in lines if line.startswith("FROM")]
        == ["FROM ${BASE} AS build", "FROM ${BASE}"],
        "the base has no default": "ARG BASE" in lines
        and not any(line.startswith("ARG BASE=") for line in lines),
        "a base without digest is refused": any(
            "re.search('@sha256:[0-9a-f]{64}$'" in line for line in lines
        ),
        "packages are pinned": "PIP_CONSTRAINT=/source/constraints.txt" in text,
        "the user is a number": any(re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", line) for line in final),
        "what runs needs no shell": all(
            re.match(r"(CMD|ENTRYPOINT|RUN|HEALTHCHECK .*CMD) \[", line)
            for line in final
            if line.startswith(("CMD", "ENTRYPOINT", "HEALTHCHECK", "RUN"))
        ),
        "it says whether it lives": any(line.startswith("HEALTHCHECK") for line in final),
        "the shells are gone": any("'sh', 'dash', '*bash'" in line for line in final),
        "no pip comes along": "--without-pip /opt/robustkit" in text and "/pip " not in " ".join(final),
        "nothing comes from the build but what is named": [line for line in final if line.startswith("COPY")]
        == [
            "COPY --from=build /opt/robustkit /opt/robustkit",
            "COPY --from=build --chown=10001:10001 /state /state",
        ],
    }
    return found + [what for what, right in asked.items() if not right]


def test_the_dockerfile_is_as_it_should_be(tmp_path):
    assert problems(DOCKERFILE, tmp_path) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("USER 10001:10001\n", ""),
        ("USER 10001:10001\n", "USER root\n"),
        ("ARG BASE\n\nFROM", "ARG BASE=python:3.12-slim\n\nFROM"),
        ("\nFROM ${BASE}\n", "\nFROM python:latest\n"),
        ("re.search(", "re.match('', "),
        ("PIP_CONSTRAINT=/source/constraints.txt", "X=1"),
        ('ENTRYPOINT ["robustkit"]', "ENTRYPOINT robustkit"),
        ("COPY --from=build /opt/robustkit /opt/robustkit", "COPY --from=build / /"),
        ("'sh', 'dash', '*bash', ", ""),
        ("--without-pip ", ""),
        ("HEALTHCHECK --start-period", "# "),
        ("WORKDIR /source\n", "RUN sudo true\nWORKDIR source\n"),
    ],
)
def test_a_hardening_removed_from_the_dockerfile_is_found(old, new, tmp_path):
    assert old in DOCKERFILE
    assert problems(DOCKERFILE.replace(old, new), tmp_path) != []


def test_the_images_context_holds_no_secret():
    """An allow list: whatever is not named stays outside."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert allowed == {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "robustkit",
        "deploy/wheels",
    }
    copied = {
        word.strip("./")
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied == allowed


# --- files that are none ----------------------------------------------------------------------------------

BAD = {
    "no YAML": b"kind: [",
    "a tag": b"kind: !!python/object/apply:os.system [id]",
    "bytes": b"\xff\xfe\x00\x01",
    "a list": b"- kind: Pod",
    "nothing": b"# nothing\n---\n",
    "a text": b"hello",
    "no kind": b"apiVersion: v1\n",
    "a key twice": b"kind: Pod\nspec:\n  hostPID: false\n  hostPID: true\n",
    "too deep": b"kind: " + b"[" * 100_000,
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_file_that_is_no_manifest_is_a_sentence(text, tmp_path, run):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(RobustkitError):
        manifests.read(path)
    status, out, err = run("manifests", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "Traceback" not in err
    assert run("manifests", tmp_path / "absent.yaml")[0] == 2


def test_the_command(tmp_path, run):
    assert run("manifests", DEPLOY / "kubernetes.yaml", DEPLOY / "compose.yaml")[:2] == (0, "nothing found\n")
    path = tmp_path / "weak.yaml"
    path.write_text(yaml.safe_dump_all(changed(CLUSTER, f"{POD}.hostPID", True)))
    status, out, _ = run("manifests", path)
    assert status == 1
    assert out == "host-namespaces: Deployment classifier: hostPID is True; remove hostPID.\n"
    status, out, _ = run("manifests", path, "--json")
    assert (status, json.loads(out)["findings"][0]["rule"]) == (1, "host-namespaces")


def places(node, way=()):
    yield way
    for key, inner in (
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    ):
        yield from places(inner, (*way, key))


JUNK = st.sampled_from([None, 0, -1, True, "x", [], {}, [None], [[]], {"x": None}, {0: 0}, 1.5])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_stands_anywhere_is_no_traceback(data):
    """And junk in the place of a hardening is not taken for one."""
    documents = copy.deepcopy(data.draw(st.sampled_from([CLUSTER, COMPOSE])))
    way = data.draw(st.sampled_from([way for way in places(documents) if len(way) > 1]))
    place = documents
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = data.draw(JUNK)
    for finding in manifests.check(documents):
        assert finding.sentence
    hardened = ("capabilities", "readOnlyRootFilesystem", "limits", "resources", "image", "livenessProbe")
    if "containers" in way and way[-1] in hardened and place[way[-1]] not in (True, {"x": None}):
        assert manifests.check(documents) != [], way
