"""What each defence of `robustkit.serve` costs a client, whether the cost grows with what is stored, and what happens
when more is asked than it can do.

One service for each row of the table, all in this process, on sockets of their own. Every round sends one picture
to each of them in turn, so that a busy machine slows all of them; a ratio compares two services over the same
rounds. Pictures are all different: the cache and the detectors do their full work and nothing is rejected.

Throughput is that of two services in processes of their own, without defences and with all, which take turns; then
the one with all is asked ten times as much as it could do.

Writes docs/bench/serve.json and docs/bench/serve.md.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benching.load import Customer, Reply, closed, opened
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy import Engine, insert

from robustkit import data
from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.results import Interval
from robustkit.serve import auth
from robustkit.serve.detectors import Detector
from robustkit.serve.server import Running, running
from robustkit.serve.settings import DETECTORS, Settings
from robustkit.serve.store import metadata

OUT = Path(__file__).resolve().parents[1] / "docs" / "bench"
MODEL = "cifar10-l2-w16"
TARGETS = {"p50": 1.3, "p99": 1.5}
BENIGN = 0.005  # share of customers' pictures that may be rejected
CONNECTIONS = 16  # of the closed loop
ROUNDS, SECONDS = 12, 1.0  # of it, for each service
FLOOD, TIMES, MOST = 4.0, 10, 8_000  # seconds, offered as a multiple of what it can do, and requests at most
STORED = (0, 10_000, 100_000)  # sightings of other accounts, for each detector

# Which defences are on; the first row is what the others are compared with.
ROWS: dict[str, dict[str, Any]] = {
    "none": {"mode": "off", "cache": False, "detectors": ()},
    "duplicates": {"mode": "off", "cache": True, "detectors": ()},
    "fingerprints": {"mode": "reject", "cache": False, "detectors": ("fingerprints",)},
    "low-frequency": {"mode": "reject", "cache": False, "detectors": ("low-frequency",)},
    "all": {"mode": "reject", "cache": True, "detectors": DETECTORS},
}


def pictures(n: int, seed: int) -> tuple[list[bytes], str]:
    """Different real pictures as PNG, and where they are from; noise where there are none."""
    try:
        found = data.load("cifar10-jpeg", "test", limit=n, seed=seed, dtype=torch.uint8)
        pixels, source = found.x.permute(0, 2, 3, 1).numpy(), str(found.provenance)
    except RobustkitError:
        pixels = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        source = f"uniform noise, seed {seed}: no CIFAR-10 here"
    return [_png(one) for one in pixels], source


def _png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


class Client:
    """One connection to one service, as one account."""

    def __init__(self, service: Running) -> None:
        host, port = service.url.removeprefix("http://").split(":")
        self._connection = http.client.HTTPConnection(host, int(port))
        self._headers = {"Authorization": f"Bearer {service.api_key}"}

    def ask(self, body: bytes) -> tuple[int, float]:
        """Status and milliseconds of one request."""
        started = time.perf_counter()
        self._connection.request("POST", "/v1/classify", body, self._headers)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status, 1000 * (time.perf_counter() - started)


@contextmanager
def services(rows: dict[str, dict[str, Any]]) -> Iterator[dict[str, Running]]:
    """A running service for each row, on a store of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield {
            name: stack.enter_context(running(_settings(folder / str(i), row)))
            for i, (name, row) in enumerate(rows.items())
        }


def _settings(folder: Path, row: dict[str, Any]) -> Settings:
    rate = "9999999/minute"
    return Settings(folder, model=MODEL, port=0, admin_port=0, account_rate=rate, address_rate=rate, **row)


def race(
    named: dict[str, Running], bodies: Sequence[bytes], warm: int, rng: random.Random
) -> dict[str, list[float]]:
    """Milliseconds of each service for each picture, in turn and in a new order each round.

    Raises: RobustkitError for any answer but 200.
    """
    clients = {name: Client(service) for name, service in named.items()}
    times: dict[str, list[float]] = {name: [] for name in named}
    for i, body in enumerate(bodies):
        for name in rng.sample(list(clients), len(clients)):
            status, spent = clients[name].ask(body)
            if status != 200:
                raise RobustkitError(f"{name} answered {status} to picture {i}; look at its log.")
            if i >= warm:
                times[name].append(spent)
    return times


def table(times: dict[str, list[float]], rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """p50 and p99 of each row, and their ratios to the first with 95 % bootstrap intervals over rounds."""
    rows = list(times)
    spent = np.array([times[name] for name in rows])
    drawn = rng.integers(0, spent.shape[1], (1000, spent.shape[1]))
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(rows):
        found[name] = {"n": spent.shape[1]}
        for label, q in (("p50", 50), ("p99", 99)):
            own, base = np.percentile(spent[i], q), np.percentile(spent[0], q)
            ratios = np.percentile(spent[i][drawn], q, axis=1) / np.percentile(spent[0][drawn], q, axis=1)
            found[name][label] = {
                "ms": round(float(own), 2),
                "ratio": round(float(own / base), 3),
                "interval": [round(float(end), 3) for end in np.percentile(ratios, [2.5, 97.5])],
            }
    return found


def fill(engine: Engine, detectors: Sequence[Detector], n: int, rng: np.random.Generator) -> None:
    """Sightings of other accounts, a thousand each, as the detectors would have written them."""
    sightings = metadata.tables["sightings"]
    for detector in detectors:
        images = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
        features = [detector.feature(image).tobytes() for image in images]
        for start in range(0, n, 1000):
            account = auth.pseudonym(b"bench", str(start))
            with engine.begin() as connection:
                connection.execute(
                    insert(sightings),
                    [
                        {
                            "detector": detector.name,
                            "account": account,
                            "ordinal": i + 1,
                            "at": time.time(),
                            "feature": features[i % len(features)],
                        }
                        for i in range(1000)
                    ],
                )


def growth(
    bodies: Sequence[bytes], rng: np.random.Generator, order: random.Random
) -> dict[str, dict[str, Any]]:
    """The same service with all defences, with ever more stored: ratios to the empty one."""
    rows = {f"{n:,} stored": ROWS["all"] for n in STORED}
    with services(rows) as named:
        for n, service in zip(STORED, named.values(), strict=True):
            fill(service.replica.engine, service.replica.plane.pipeline.detectors, n, rng)
        return table(race(named, bodies, len(bodies) // 10, order), rng)


def benign(bodies: Sequence[bytes], rng: random.Random) -> dict[str, Any]:
    """Flags on customers' traffic: every picture once, then again with each sent one to four times."""
    found: dict[str, Any] = {}
    for name, traffic in {
        "unique": list(bodies),
        "repeating": [body for body in bodies for _ in range(rng.randint(1, 4))],
    }.items():
        with services({"all": ROWS["all"]}) as named:
            client = Client(named["all"])
            rejected = sum(client.ask(body)[0] == 403 for body in traffic)
        share = Interval(rejected, len(traffic))
        found[name] = {
            "rejected": rejected,
            "n": len(traffic),
            "interval": [round(share.low, 5), round(share.high, 5)],
        }
    return found


# --- more than one request at a time --------------------------------------------------------------------


class Place(NamedTuple):
    """Where a service listens, and the keys of a customer and of the metrics."""

    url: str
    api_key: str
    metrics: str


def _serve(row: dict[str, Any], parent: Connection) -> None:
    """A service in a process of its own, until the parent hangs up."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, running(_settings(Path(folder) / "service", row)) as here:
        parent.send(Place(here.url, here.api_key, here.replica.credentials.metrics))
        parent.poll(None)


@contextmanager
def process(row: dict[str, Any]) -> Iterator[Place]:
    """The service of a row, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    child = spawn.Process(target=_serve, args=(row, there))
    child.start()
    there.close()
    try:
        yield here.recv()
    finally:
        here.close()
        child.join(60)


def throughput(bodies: Sequence[bytes], rng: np.random.Generator, order: random.Random) -> dict[str, Any]:
    """Answers a second without and with all defences, in turns; then the flood."""
    with process(ROWS["none"]) as none, process(ROWS["all"]) as defended:
        return asyncio.run(_throughput(none, defended, bodies, rng, order))


async def _throughput(
    none: Place, defended: Place, bodies: Sequence[bytes], rng: np.random.Generator, order: random.Random
) -> dict[str, Any]:
    async with Customer(none.url, none.api_key) as plain, Customer(defended.url, defended.api_key) as guarded:
        pictures = {plain: iter(bodies), guarded: iter(bodies)}
        rates: dict[Customer, list[float]] = {plain: [], guarded: []}
        for i in range(1 + ROUNDS):
            for customer in order.sample(list(rates), len(rates)):
                start = time.monotonic()
                replies = await closed(customer, pictures[customer], CONNECTIONS, SECONDS)
                rate = len(replies) / (time.monotonic() - start)
                if wrong := {reply.status for reply in replies} - {200, 403}:
                    raise RobustkitError(
                        f"{CONNECTIONS} connections were answered {sorted(wrong)} too; give the machine its processors."
                    )
                if i:  # the first round warms up
                    rates[customer].append(rate)
        rest = list(pictures[guarded]) or list(bodies)
        capacity = float(np.mean(rates[guarded]))
        n = min(round(TIMES * capacity * FLOOD), MOST)
        before = _worked_on(defended)
        replies, reached = await opened(guarded, [rest[i % len(rest)] for i in range(n)], TIMES * capacity)
        heard = sum(reply.status in (200, 403) for reply in replies)
        lost = _worked_on(defended) - before - heard
    both = np.array([rates[plain], rates[guarded]])
    drawn = rng.integers(0, ROUNDS, (1000, ROUNDS))
    ratios = np.divide(*both[::-1, drawn].mean(2))
    return {
        "closed": {
            "connections": CONNECTIONS,
            "rounds": ROUNDS,
            "none": round(float(both[0].mean()), 1),
            "all": round(capacity, 1),
            "ratio": round(capacity / float(both[0].mean()), 3),
            "interval": [round(float(end), 3) for end in np.percentile(ratios, [2.5, 97.5])],
        },
        "flood": {
            "offered": round(TIMES * capacity),
            "reached": round(reached),
            "n": n,
            **_counts(replies),
            "lost": lost,
        },
    }


def _counts(replies: Sequence[Reply]) -> dict[str, Any]:
    """What came back, by status; and how many refusals did not say when to come again."""
    statuses = Counter(reply.status for reply in replies)
    silent = sum(reply.status in (429, 503) and not reply.retry_after for reply in replies)
    other = sum(n for status, n in statuses.items() if status >= 500 and status != 503)
    return {
        "statuses": {str(status): n for status, n in sorted(statuses.items()) if status},
        "without Retry-After": silent,
        "other 5xx": other,
        "no answer": statuses[0],
    }


def _worked_on(place: Place) -> int:
    """Images that a service has classified, rejected, or known again, by its own metrics."""
    request = urllib.request.Request(
        f"{place.url}/metrics", headers={"Authorization": f"Bearer {place.metrics}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    names = tuple(f"robustkit_{name}_total" for name in ("answers", "rejected", "duplicates"))
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names)))


def page(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    here = figures["machine"]
    lines = [
        "# What the service's defences cost",
        "",
        "Written by `python scripts/bench_serve.py`. One client, one connection, closed loop over a socket; the "
        "services take turns picture by picture. Ratios to the first row, with 95 % bootstrap intervals over rounds.",
        "",
        f"Model {MODEL}; {here['cpu']}, {here['cpus']} processors, load {here['load']}, torch {here['torch']}, "
        f"one torch thread; seed {figures['seed']}; SQLite. Data: {figures['data']}.",
        "",
    ]
    for title, key in (("Each defence", "defences"), ("All defences, as more is stored", "growth")):
        lines += [
            f"## {title}",
            "",
            "| | n | p50 ms | p50 ratio | p99 ms | p99 ratio |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, row in figures[key].items():
            cells = [
                f"{row[q]['ms']:.2f} | {row[q]['ratio']:.2f} [{row[q]['interval'][0]:.2f}, {row[q]['interval'][1]:.2f}]"
                for q in ("p50", "p99")
            ]
            lines.append(f"| {name} | {row['n']} | {cells[0]} | {cells[1]} |")
        lines.append("")
    whole = figures["defences"]["all"]
    verdicts = [
        f"{q} {whole[q]['ratio']:.2f} against a target of {target}: {_verdict(whole[q]['ratio'], target)}"
        for q, target in TARGETS.items()
    ]
    one, flood = figures["throughput"]["closed"], figures["throughput"]["flood"]
    said = ", ".join(f"{n} times {status}" for status, n in flood["statuses"].items())
    lines += [
        f"All defences: {'; '.join(verdicts)}.",
        "",
        "## Many at a time",
        "",
        f"- {one['connections']} connections in a closed loop, {one['rounds']} rounds of {SECONDS:g} s each in turns: "
        f"{one['none']:.0f} answers a second without defences, {one['all']:.0f} with all, "
        f"{one['ratio']:.2f} [{one['interval'][0]:.2f}, {one['interval'][1]:.2f}] of it.",
        f"- {flood['n']} requests in an open loop, {flood['offered']} a second, {TIMES} times what it can do with all "
        f"defences ({flood['reached']} were reached): {said}. Refusals without Retry-After: "
        f"{flood['without Retry-After']}; 5xx other than 503: {flood['other 5xx']}; requests without an answer: "
        f"{flood['no answer']}; images that it worked on and whose answer nobody got: {flood['lost']}.",
        "",
        "## Customers taken for attackers",
        "",
    ]
    for name, row in figures["benign"].items():
        low, high = row["interval"]
        lines.append(
            f"- {name} pictures: {row['rejected']} of {row['n']} rejected, {row['rejected'] / row['n']:.2%} "
            f"[{low:.2%}, {high:.2%}]; target at most {BENIGN:.1%}: {_verdict(row['rejected'] / row['n'], BENIGN)}"
        )
    return "\n".join([*lines, ""])


def _verdict(found: float, most: float) -> str:
    return "met" if found <= most else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000, help="pictures for each service (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default docs/bench)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * MOST)), hard)
    )  # a connection a request
    many, source = pictures(max(options.rounds, 10_000), options.seed)
    bodies = many[: options.rounds]
    order, rng = random.Random(options.seed), np.random.default_rng(options.seed)
    with services(ROWS) as named:
        defences = table(race(named, bodies, options.rounds // 10, order), rng)
    figures = {
        "defences": defences,
        "growth": growth(bodies, rng, order),
        "throughput": throughput(many, rng, order),
        "benign": benign(bodies, order),
        "targets": TARGETS,
        "data": source,
        "seed": options.seed,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / "serve.json", f"{json.dumps(figures, indent=2)}\n".encode())
    write_atomically(options.out / "serve.md", page(figures).encode())
    print(page(figures), file=sys.stderr)


if __name__ == "__main__":
    main()
