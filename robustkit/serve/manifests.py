"""Do manifests and compose files run a service as they should? Pod Security "restricted", and our rules.

Source: Kubernetes' Pod Security Standards, profiles baseline and restricted, for Linux. `RULES` is the list; the
second half is this project's. What is malformed counts as missing, so it is found. Pods that hide in kinds of other
people's (custom resources) are not seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from robustkit.errors import RobustkitError

Document = Mapping[str, Any]

RULES = {
    # Pod Security Standards
    "host-namespaces": "no name space is the host's",
    "host-ports": "no port of the node is taken",
    "host-probes": "probes and hooks ask the pod itself, no other host",
    "host-process": "no Windows process of the host",
    "privileged": "no container is privileged",
    "privilege-escalation": "no process gains privileges",
    "capabilities": "all capabilities are dropped, and at most NET_BIND_SERVICE comes back",
    "run-as-non-root": "nothing runs as root, and the manifest says so",
    "run-as-user": "no user is 0",
    "seccomp": "system calls are filtered",
    "apparmor": "AppArmor stays on",
    "selinux": "SELinux's type is a container's",
    "proc-mount": "/proc is masked",
    "sysctls": "only sysctls that are the pod's own",
    "volume-types": "no volume reaches into the node",
    # robustkit
    "image-digest": "the image is named by its digest",
    "read-only-root": "the root file system is read-only",
    "limits": "cpu, memory and ephemeral-storage (compose: processes) are limited",
    "no-token": "no token of the cluster is mounted",
    "model-read-only": "what is mounted at /models is read-only",
    "scratch-size": "a volume in memory or on the node's disk has a size",
    "secrets-as-files": "secrets come as files, not in the environment or on the command line",
    "probes": "something asks whether it lives and takes requests",
    "disruption-budget": "maintenance takes one replica at a time",
    "namespace-enforces": "the namespace enforces Pod Security restricted",
    "network-policy": "what may come in and go out is named, peer by peer and port by port",
    "control-apart": "the control plane has its own Service, and its own rule of who may come",
    "service-inside": "a Service is for the cluster's inside alone",
}


@dataclass(frozen=True)
class Finding:
    """A rule of `RULES` that something breaks: where, what is there, what to write."""

    rule: str
    where: str
    what: str
    remedy: str

    @property
    def sentence(self) -> str:
        """The finding as people read it."""
        return f"{self.where}: {self.what}; {self.remedy}."


def read(path: Path) -> list[Document]:
    """The documents of a YAML file. Raises: RobustkitError for a file that is none, or holds anything else."""
    try:
        found = [document for document in yaml.load_all(path.read_bytes(), _Loader) if document is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RobustkitError(f"{path}{line}: {problem}; write it as YAML.") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RobustkitError(f"{path} is no manifest ({type(error).__name__}); write it as YAML.") from error
    if not found or not all(
        isinstance(item, dict) and ("kind" in item or "services" in item) for item in found
    ):
        raise RobustkitError(
            f"{path} holds something that is neither a Kubernetes object nor a compose file; each document needs "
            "a kind, or services."
        )
    return found


class _Loader(yaml.SafeLoader):
    """Of two equal keys PyYAML takes the last and says nothing: a hardening could be undone unseen."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[no-untyped-call]
        return made


def check(documents: Sequence[Document]) -> list[Finding]:
    """What is wrong with objects that are applied together; an empty list where nothing is."""
    objects = [item for document in documents for item in _flat(document)]
    found = [finding for item in objects if "services" in item for finding in _compose(item)]
    workloads = [workload for item in objects if (workload := _workload(item))]
    for workload in workloads:
        found += workload.named(_pod(workload.spec, workload.annotations))
        found += workload.named(_beside(workload, objects))
    for item in objects:
        if item.get("kind") == "Service" and (
            _map(item, "spec").get("type", "ClusterIP") != "ClusterIP"
            or _map(item, "spec").get("externalIPs")
        ):
            what = f"type {_map(item, 'spec').get('type', 'ClusterIP')} leads in from outside"
            remedy = "use ClusterIP and let the gateway lead in"
            found.append(Finding("service-inside", f"Service {_name(item)}", what, remedy))
    return found


# --- reading what may be malformed ---------------------------------------------------------------------


def _map(of: Document, *keys: str) -> Document:
    """The mapping there, or an empty one."""
    for key in keys:
        inner = of.get(key)
        of = inner if isinstance(inner, Mapping) else {}
    return of


def _maps(of: Document, key: str) -> list[Document]:
    """The mappings in the list there."""
    inner = of.get(key)
    return [item for item in inner if isinstance(item, Mapping)] if isinstance(inner, list) else []


def _list(of: Document, key: str) -> list[Any]:
    inner = of.get(key)
    return inner if isinstance(inner, list) else []


def _texts(of: Document, key: str) -> list[str]:
    """What compose takes as one text, as a list or as a mapping: a list, of a mapping's keys with their values."""
    inner = of.get(key)
    if isinstance(inner, Mapping):
        return [f"{name}={value}" for name, value in inner.items()]
    return (
        [inner]
        if isinstance(inner, str)
        else [str(item) for item in inner]
        if isinstance(inner, list)
        else []
    )


def _name(item: Document) -> str:
    return str(_map(item, "metadata").get("name", "without a name"))


def _flat(document: Document) -> list[Document]:
    return _maps(document, "items") if str(document.get("kind", "")).endswith("List") else [document]


# --- a pod -------------------------------------------------------------------------------------------

_Broken = Iterator[tuple[str, str, str]]  # rule, what is there, what to write

_CONTROLLERS = ("Deployment", "StatefulSet", "DaemonSet")
_WAY = {"Pod": (), "CronJob": ("spec", "jobTemplate", "spec", "template")} | dict.fromkeys(
    (*_CONTROLLERS, "ReplicaSet", "ReplicationController", "Job"), ("spec", "template")
)


@dataclass(frozen=True)
class _Workload:
    """An object that makes pods."""

    kind: str
    name: str
    namespace: str
    replicas: Any
    labels: Document
    annotations: Document
    spec: Document

    def named(self, broken: _Broken) -> list[Finding]:
        where = f"{self.kind} {self.name}"
        return [Finding(rule, where, what, remedy) for rule, what, remedy in broken]


def _workload(item: Document) -> _Workload | None:
    kind = str(item.get("kind", ""))
    if kind not in _WAY:
        return None
    pod, metadata = _map(item, *_WAY[kind]), _map(item, "metadata")
    own = _map(pod, "metadata")
    namespace = str(metadata.get("namespace", "default"))
    replicas = _map(item, "spec").get("replicas", 1)
    labels, annotations = _map(own, "labels"), _map(own, "annotations")
    return _Workload(kind, _name(item), namespace, replicas, labels, annotations, _map(pod, "spec"))


_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    *(f"net.ipv4.{name}" for name in ("ip_local_port_range", "ip_local_reserved_ports")),
    *(f"net.ipv4.{name}" for name in ("ip_unprivileged_port_start", "ping_group_range", "tcp_syncookies")),
    *(
        f"net.ipv4.tcp_{name}"
        for name in ("keepalive_time", "fin_timeout", "keepalive_intvl", "keepalive_probes")
    ),
}
_SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_PINNED = re.compile(r"\S+@sha256:[0-9a-f]{64}")
_SECRET = re.compile(r"(PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIALS?|_KEY)$")
_URL_WITH_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")


def _pod(spec: Document, annotations: Document) -> _Broken:
    secure = _map(spec, "securityContext")
    for host in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(host) not in (None, False):
            yield "host-namespaces", f"{host} is {spec[host]}", f"remove {host}"
    if spec.get("automountServiceAccountToken") is not False:
        yield "no-token", "a token of the cluster is mounted", "set automountServiceAccountToken to false"
    if secure.get("runAsUser") == 0:
        yield "run-as-user", "runAsUser is 0", "name another user"
    for sysctl in _maps(secure, "sysctls"):
        if str(sysctl.get("name")) not in _SYSCTLS:
            yield "sysctls", f"{sysctl.get('name')} is the node's too", "leave it to the node"
    for name, value in annotations.items():
        of_apparmor = str(name).startswith("container.apparmor.security.beta.kubernetes.io/")
        if of_apparmor and value != "runtime/default" and not str(value).startswith("localhost/"):
            yield "apparmor", f"an annotation says {value}", "remove it"
    yield from _contexts("the pod", secure)
    for volume in _maps(spec, "volumes"):
        yield from _volume(volume)
    containers = [
        item for kind in ("containers", "initContainers", "ephemeralContainers") for item in _maps(spec, kind)
    ]
    if not _maps(spec, "containers"):
        yield "image-digest", "it has no containers that could be read", "list them under containers"
    for container in containers:
        yield from _container(container, secure)


def _volume(volume: Document) -> _Broken:
    name, kinds = volume.get("name"), {key for key in volume if key != "name"}
    if kinds - _VOLUMES:
        what = f"volume {name} is a {', '.join(sorted(map(str, kinds - _VOLUMES)))}"
        yield "volume-types", what, f"use one of {', '.join(sorted(_VOLUMES))}"
    if "emptyDir" in volume and not _map(volume, "emptyDir").get("sizeLimit"):
        yield "scratch-size", f"volume {name} may grow without end", "give its emptyDir a sizeLimit"
    if any("serviceAccountToken" in source for source in _maps(_map(volume, "projected"), "sources")):
        yield "no-token", f"volume {name} holds a token of the cluster", "remove that source"


def _contexts(who: str, secure: Document) -> _Broken:
    """What a pod's and a container's security context have in common."""
    if _map(secure, "windowsOptions").get("hostProcess") not in (None, False):
        yield "host-process", f"{who} is a process of the host", "remove hostProcess"
    profile = _map(secure, "appArmorProfile").get("type", "RuntimeDefault")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield "apparmor", f"{who} has AppArmor's profile {profile}", "use RuntimeDefault"
    selinux = _map(secure, "seLinuxOptions")
    if str(selinux.get("type", "")) not in _SELINUX or selinux.get("user") or selinux.get("role"):
        yield "selinux", f"{who} chooses SELinux's user, role or type", "leave them to the node"
    if (kind := _map(secure, "seccompProfile").get("type", "RuntimeDefault")) not in (
        "RuntimeDefault",
        "Localhost",
    ):
        yield "seccomp", f"{who} has the seccomp profile {kind}", "use RuntimeDefault"


def _container(container: Document, pod: Document) -> _Broken:
    who, secure = f"container {container.get('name')}", _map(container, "securityContext")
    capabilities = _map(secure, "capabilities")
    yield from _contexts(who, secure)
    if secure.get("privileged") not in (None, False):
        yield "privileged", f"{who} is privileged", "remove privileged"
    if secure.get("allowPrivilegeEscalation") is not False:
        yield "privilege-escalation", f"{who} may gain privileges", "set allowPrivilegeEscalation to false"
    if "ALL" not in _list(capabilities, "drop"):
        yield "capabilities", f"{who} keeps capabilities", "drop ALL"
    added = capabilities.get("add") or []
    if not isinstance(added, list) or set(map(str, added)) - {"NET_BIND_SERVICE"}:
        yield "capabilities", f"{who} adds {added}", "add none"
    if secure.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "run-as-non-root", f"{who} may run as root", "set runAsNonRoot to true"
    if secure.get("runAsUser") == 0:
        yield "run-as-user", f"{who} runs as user 0", "name another user"
    if not (_map(secure, "seccompProfile") or _map(pod, "seccompProfile")):
        yield "seccomp", f"{who} may call whatever the kernel has", "set seccompProfile to RuntimeDefault"
    if secure.get("procMount", "Default") != "Default":
        yield "proc-mount", f"{who} sees all of /proc", "leave procMount alone"
    if secure.get("readOnlyRootFilesystem") is not True:
        yield "read-only-root", f"{who} can write to its root", "set readOnlyRootFilesystem to true"
    for port in _maps(container, "ports"):
        if port.get("hostPort"):
            yield "host-ports", f"{who} takes port {port['hostPort']} of its node", "remove hostPort"
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        yield from _asks(who, name, _map(container, name))
    for name in ("postStart", "preStop"):
        yield from _asks(who, name, _map(container, "lifecycle", name))
    limits = _map(container, "resources", "limits")
    if lacking := [name for name in ("cpu", "memory", "ephemeral-storage") if not limits.get(name)]:
        yield "limits", f"{who} may take all {', '.join(lacking)} of its node", "limit it"
    if not _PINNED.fullmatch(str(container.get("image", ""))):
        what = f"another image can come under the name {container.get('image')}"
        yield "image-digest", what, "name it by @sha256: and its digest"
    for mount in _maps(container, "volumeMounts"):
        if _of_models(str(mount.get("mountPath"))) and mount.get("readOnly") is not True:
            yield "model-read-only", f"{who} can overwrite its model", "mount /models with readOnly true"
    yield from _secrets(who, container)


def _of_models(path: str) -> bool:
    return (path.rstrip("/") + "/").startswith("/models/")


def _asks(who: str, name: str, probe: Document) -> _Broken:
    for kind in ("httpGet", "tcpSocket"):
        if host := _map(probe, kind).get("host"):
            yield "host-probes", f"{name} of {who} asks {host}", "remove host"


def _secrets(who: str, container: Document) -> _Broken:
    remedy = "mount a file and name it"
    for variable in _maps(container, "env"):
        name, value = str(variable.get("name", "")), variable.get("value")
        if "secretKeyRef" in _map(variable, "valueFrom"):
            yield "secrets-as-files", f"{who} has a secret in {name}", remedy
        elif value and (_SECRET.search(name) or _URL_WITH_PASSWORD.search(str(value))):
            yield (
                "secrets-as-files",
                f"{who} has a secret in {name}, for everybody who reads this file",
                remedy,
            )
    if any("secretRef" in source for source in _maps(container, "envFrom")):
        yield "secrets-as-files", f"{who} takes its environment from a secret", remedy
    if any(
        _URL_WITH_PASSWORD.search(str(word)) for key in ("command", "args") for word in _list(container, key)
    ):
        yield "secrets-as-files", f"{who} has a password on its command line", remedy


# --- what stands beside a pod ----------------------------------------------------------------------------


def _beside(workload: _Workload, objects: Sequence[Document]) -> _Broken:
    if workload.kind in _CONTROLLERS:
        yield from _kept_up(workload, objects)
    policies = [
        _map(item, "spec")
        for item in _of_kind("NetworkPolicy", workload, objects)
        if _selects(_map(item, "spec").get("podSelector"), workload.labels)
    ]
    for way, peers in (("Ingress", "from"), ("Egress", "to")):
        governing = [policy for policy in policies if way in _types(policy)]
        if not governing:
            what = f"no NetworkPolicy governs its {way.lower()}"
            yield "network-policy", what, f"name who may {'come' if way == 'Ingress' else 'be called'}"
        for rule in (rule for policy in governing for rule in _rules(policy, way.lower())):
            listed = _maps(rule, peers)
            if not listed or any(_is_anybody(peer) for peer in listed):
                yield "network-policy", f"{way.lower()} is open to everybody", f"name each peer under {peers}"
            if not _maps(rule, "ports"):
                yield "network-policy", f"{way.lower()} is open on every port", "name the ports"
    yield from _control(workload, policies, objects)


def _kept_up(workload: _Workload, objects: Sequence[Document]) -> _Broken:
    """What a controller needs, and a lone pod does not."""
    for container in _maps(workload.spec, "containers"):
        for probe in ("livenessProbe", "readinessProbe"):
            if not _map(container, probe):
                yield (
                    "probes",
                    f"container {container.get('name')} has no {probe}",
                    "ask /healthz and /readyz",
                )
    budgets = (_map(item, "spec") for item in _of_kind("PodDisruptionBudget", workload, objects))
    guarded = any(
        _selects(budget.get("selector"), workload.labels)
        and (budget.get("minAvailable") or budget.get("maxUnavailable"))
        for budget in budgets
    )
    if workload.kind != "DaemonSet" and workload.replicas != 1 and not guarded:
        yield "disruption-budget", "maintenance may end all replicas at once", "add a PodDisruptionBudget"
    enforced = [
        _map(item, "metadata", "labels").get("pod-security.kubernetes.io/enforce")
        for item in objects
        if item.get("kind") == "Namespace" and _name(item) == workload.namespace
    ]
    if enforced != ["restricted"]:
        what = f"namespace {workload.namespace} lets in what is less than restricted"
        yield "namespace-enforces", what, "label it pod-security.kubernetes.io/enforce: restricted"


def _of_kind(kind: str, workload: _Workload, objects: Sequence[Document]) -> list[Document]:
    """The objects of a kind in the workload's namespace."""
    return [
        item
        for item in objects
        if item.get("kind") == kind
        and _map(item, "metadata").get("namespace", "default") == workload.namespace
    ]


def _selects(selector: Any, labels: Document) -> bool:
    """Whether a label selector, none of which is malformed, selects these labels; an empty one selects all."""
    if not isinstance(selector, Mapping):
        return False
    if any(labels.get(key) != value for key, value in _map(selector, "matchLabels").items()):
        return False
    for term in _maps(selector, "matchExpressions"):
        key, operator, values = str(term.get("key")), term.get("operator"), _list(term, "values")
        is_there, is_in = key in labels, labels.get(key) in values
        if not {"In": is_in, "NotIn": not is_in, "Exists": is_there, "DoesNotExist": not is_there}.get(
            str(operator), False
        ):
            return False
    return True


def _types(policy: Document) -> list[Any]:
    return _list(policy, "policyTypes") or ["Ingress", *(["Egress"] if policy.get("egress") else [])]


def _rules(policy: Document, way: str) -> list[Document]:
    """The rules of a policy; one that cannot be read is open."""
    return [rule if isinstance(rule, Mapping) else {} for rule in _list(policy, way)]


def _is_anybody(peer: Document) -> bool:
    """Whether a peer of a policy is everybody, or everybody in the namespace."""
    if "ipBlock" in peer:
        return str(_map(peer, "ipBlock").get("cidr", "/0")).endswith("/0")
    return not any(
        _map(peer, kind).get(terms)
        for kind in ("podSelector", "namespaceSelector")
        for terms in ("matchLabels", "matchExpressions")
    )


def _control(workload: _Workload, policies: Sequence[Document], objects: Sequence[Document]) -> _Broken:
    """The port called control is nobody's who is a customer."""
    ports = [port for container in _maps(workload.spec, "containers") for port in _maps(container, "ports")]
    control = {
        "control",
        *(str(port.get("containerPort")) for port in ports if port.get("name") == "control"),
    }
    if len(control) == 1:
        return

    def is_mixed(rule: Document, key: str) -> bool:
        named = {str(port.get(key, port.get("port"))) for port in _maps(rule, "ports")}
        return bool(named & control and named - control)

    if any(is_mixed(rule, "port") for policy in policies for rule in _rules(policy, "ingress")):
        yield (
            "control-apart",
            "who may ask the data plane may ask the control plane",
            "give it a rule of its own",
        )
    leading = set()
    for item in _of_kind("Service", workload, objects):
        spec = _map(item, "spec")
        if _selects({"matchLabels": _map(spec, "selector")}, workload.labels):
            if is_mixed(spec, "targetPort"):
                what = f"Service {_name(item)} leads to both planes"
                yield "control-apart", what, "give the control plane a Service of its own"
            if {str(port.get("targetPort", port.get("port"))) for port in _maps(spec, "ports")} & control:
                leading.add(_name(item))
    for item in _of_kind("Ingress", workload, objects):
        if any(f"'name': '{name}'" in str(item.get("spec")) for name in leading):
            what = f"Ingress {_name(item)} leads to the control plane"
            yield "control-apart", what, "leave it to operators inside the cluster"


# --- compose ---------------------------------------------------------------------------------------------

_PINNED_LATER = re.compile(
    r"\S+@sha256:([0-9a-f]{64}|\$\{\w+:\?[^}]+\})"
)  # compose asks for a digest that lacks
_LOOPBACK = ("127.0.0.1:", "[::1]:", "localhost:")


def _compose(file: Document) -> list[Finding]:
    """The services of a compose file, by the rules that have a meaning there."""
    found = []
    for name, service in _map(file, "services").items():
        broken = _service(service, _map(file, "networks")) if isinstance(service, Mapping) else iter(())
        found += [Finding(rule, f"service {name}", what, remedy) for rule, what, remedy in broken]
    return found


def _service(service: Document, networks: Document) -> _Broken:
    build = _map(service, "build")
    image = str(_map(build, "args").get("BASE") if build else service.get("image"))
    if not _PINNED_LATER.fullmatch(image):
        yield (
            "image-digest",
            f"another image can come under the name {image}",
            "name it by @sha256: and its digest",
        )
    options = [option.replace("=", ":") for option in _texts(service, "security_opt")]
    if "no-new-privileges:true" not in options and "no-new-privileges" not in options:
        yield "privilege-escalation", "it may gain privileges", "add no-new-privileges:true to security_opt"
    if any(option.startswith("seccomp:unconfined") for option in options):
        yield "seccomp", "it may call whatever the kernel has", "remove seccomp from security_opt"
    if any(option.startswith(("apparmor:unconfined", "label:disable")) for option in options):
        yield "apparmor", "AppArmor or SELinux is off", "remove that from security_opt"
    if "ALL" not in _list(service, "cap_drop"):
        yield "capabilities", "it keeps capabilities", "add ALL to cap_drop"
    if service.get("cap_add"):
        yield "capabilities", f"it adds {service['cap_add']}", "remove cap_add"
    if service.get("privileged") not in (None, False) or service.get("devices"):
        yield "privileged", "it is privileged, or has devices", "remove privileged and devices"
    for key in ("network_mode", "pid", "ipc", "uts", "userns_mode", "cgroup"):
        if service.get(key) == "host":
            yield "host-namespaces", f"{key} is the host's", f"remove {key}"
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(service.get("user"))):
        yield (
            "run-as-non-root",
            f"its user is {service.get('user')}",
            "name user and group by numbers, none of them 0",
        )
    if service.get("read_only") is not True:
        yield "read-only-root", "it can write to its root", "set read_only to true"
    limits = _map(service, "deploy", "resources", "limits")
    either = {"cpus": "cpus", "memory": "mem_limit", "pids": "pids_limit"}
    if lacking := [name for name, old in either.items() if not (limits.get(name) or service.get(old))]:
        yield (
            "limits",
            f"it may take all {', '.join(lacking)} of its machine",
            "limit it under deploy.resources",
        )
    for place in _texts(service, "tmpfs"):
        if "size=" not in place:
            yield "scratch-size", f"{place} may grow without end", "give it a size"
    if not build and not service.get("healthcheck"):
        yield "probes", "nothing asks whether it lives", "give it a healthcheck"
    yield from _mounts(service)
    yield from _variables(service)
    yield from _reach(service, networks)


def _mounts(service: Document) -> _Broken:
    for volume in _list(service, "volumes"):
        if isinstance(volume, Mapping):
            source, target, is_ro = (
                volume.get("source"),
                volume.get("target"),
                volume.get("read_only") is True,
            )
        else:
            source, _, rest = str(volume).partition(":")
            target, _, mode = rest.partition(":")
            is_ro = "ro" in mode.split(",")
        if str(source).startswith(("/", "~", ".", "$")) and (not is_ro or str(source).startswith(("/", "~"))):
            what = f"{source} of the machine is within its reach"
            yield "volume-types", what, "use a named volume, or a folder beside this file, read-only"
        if _of_models(str(target)) and not is_ro:
            yield "model-read-only", "it can overwrite its model", "mount /models with :ro"


def _variables(service: Document) -> _Broken:
    for variable in _texts(service, "environment"):
        name, _, value = variable.partition("=")
        if _SECRET.search(name) or _URL_WITH_PASSWORD.search(value):
            yield "secrets-as-files", f"there is a secret in {name}", "use secrets, and name the file"
    if _URL_WITH_PASSWORD.search(" ".join(_texts(service, "command"))):
        yield "secrets-as-files", "there is a password on its command line", "use secrets, and name the file"


def _reach(service: Document, networks: Document) -> _Broken:
    """Who reaches a service, and whom it reaches."""
    command = " ".join(_texts(service, "command"))
    admin = re.search(r"--admin-port[= ](\d+)", command)
    host = re.search(r"--admin-host[= ](\S+)", command)
    if host and host[1] not in ("127.0.0.1", "::1", "localhost"):
        yield (
            "control-apart",
            "the control plane listens beyond its container",
            "let --admin-host be 127.0.0.1",
        )
    for port in _list(service, "ports"):
        if isinstance(port, Mapping):
            is_local, inside = port.get("host_ip") in ("127.0.0.1", "::1"), str(port.get("target"))
        else:
            is_local = str(port).startswith(_LOOPBACK)
            inside = str(port).rpartition(":")[2].partition("/")[0]
        if not is_local:
            yield "network-policy", f"port {port} is open to other machines", "publish it on 127.0.0.1"
        if admin and inside == admin[1]:
            yield "control-apart", "the control plane's port is published", "publish the data plane alone"
    for name in [text.partition("=")[0] for text in _texts(service, "networks")] or ["default"]:
        network = _map(networks, name)
        masked = _map(network, "driver_opts").get("com.docker.network.bridge.enable_ip_masquerade")
        if network.get("internal") is not True and str(masked).lower() != "false":
            yield "network-policy", f"it reaches the world by network {name}", "make the network internal"
