"""The red-team client: its verdicts against a service whose truth is known and that logs all it is asked, over HTTP.

`Arena` is that service, on a socket: a linear model with closed-form answers, a detector and bans on a fixed schedule,
lies for customers who ask too much. What a campaign claims is recomputed from its log, with NumPy and Pillow
alone; wrong programs must fail there. The real service comes after.
"""

import io
import json
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from art.attacks.evasion import HopSkipJump
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from robustkit import data, models
from robustkit.data import Dataset
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.losses import margin
from robustkit.results import Provenance
from robustkit.serve.redteam import attacks, page
from robustkit.serve.redteam import campaign as campaigns
from robustkit.serve.redteam import client as clients
from robustkit.serve.redteam import oracle as oracles
from robustkit.serve.redteam.attacks import KNOWLEDGE, Dial
from robustkit.serve.redteam.campaign import campaign
from robustkit.serve.redteam.client import Answer, Client, NoKeys, granted, listed, make_key, png
from robustkit.serve.redteam.oracle import Oracle, within
from robustkit.serve.redteam.records import Attempt, Campaign, read_campaign
from robustkit.serve.server import running
from robustkit.threat import Ball, RotationTranslation
from tests.serving import settings

SIDE, EPS, BUDGET = 8, 0.1, 60  # 0.1 is 25.5 grey levels: a point of the ball's surface is in no file
BALL = Ball("Linf", EPS)


def quadrants(picture):
    """Means of the four quarters, in [0, 1]: the model's logits."""
    h = SIDE // 2
    parts = [picture[i : i + h, j : j + h] for i in (0, h) for j in (0, h)]
    return np.array([part.mean() for part in parts]) / 255


def pictures(n=12, even=0.25):
    """Quarters of one grey each: even ones lead by `even` eps, odd ones by 4. L-inf eps turns a lead below 2 eps."""
    draw, x, y = np.random.default_rng(0), [], []
    for i in range(n):
        lead = EPS * (even if i % 2 == 0 else 4)
        levels = np.full(4, 0.35) - 0.2 * draw.random(4)
        label = int(draw.integers(4))
        levels[label] = np.delete(levels, label).max() + lead
        x.append(np.rint(255 * np.kron(levels.reshape(2, 2), np.ones((SIDE // 2, SIDE // 2)))) / 255)
        y.append(label)
    y[-1] = (y[-1] + 1) % 4  # one that the service gets wrong before anybody touches it
    where = Provenance("quarters", "test", "embedded", "0" * 64, True)
    tensor = torch.tensor(np.array(x), dtype=torch.float32)[:, None]
    return Dataset(tensor, torch.tensor(y), tuple(range(100, 100 + n)), where, tuple("abcd"))


@dataclass
class Arena:
    """The log and the rules. Keys are key-0, key-1, ... as they were made; key-0, the scout, is left alone."""

    rejects_every: int = 0  # of a key's queries
    bans_after: int = 0  # rejections
    lies_after: int = 0  # queries of a key: then its answers are another class
    output: str = "full"
    script: list = field(default_factory=list)  # (status, headers, body) to give first
    log: list = field(default_factory=list)  # (key, body, status, index)
    keys: int = 0

    def answer(self, key, body):
        if self.script:
            return self.script.pop(0)
        if not key.startswith("key-") or int(key[4:]) >= self.keys:
            return 401, {}, {"detail": "no valid credential"}
        told = [status for k, _, status, _ in self.log if k == key != "key-0"]
        before = Counter(status for status in told if status in (200, 403))
        if self.bans_after and before[403] >= self.bans_after:
            return 403, {}, {"detail": "this account is banned; ask the operator."}
        count = before.total() + 1
        if self.rejects_every and count % self.rejects_every == 0:
            return 403, {}, {"detail": "rejected"}
        logits = 20 * quadrants(np.asarray(Image.open(io.BytesIO(body))))
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        index = int(scores.argmax())
        if self.lies_after and count > self.lies_after:
            scores = np.roll(scores, 1)
            index = int(scores.argmax())
        told = {"label": "abcd"[index], "index": index, "request_id": "0"}
        if self.output == "full":
            told["scores"] = dict(zip("abcd", scores.tolist(), strict=True))
        return 200, {}, told


@contextmanager
def serving(arena):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet an answer: Nagle and delayed acknowledgements cost 40 ms

        def log_message(self, *_):
            pass

        def reply(self, status, headers, body):
            told = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(told), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(told)

        def do_GET(self):
            self.reply(200, {}, {"status": "ready", "model": "quarters"})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/admin/keys":
                arena.keys += 1
                self.reply(201, {}, {"api_key": f"key-{arena.keys - 1}"})
                return
            key = self.headers["Authorization"].removeprefix("Bearer ")
            status, headers, told = arena.answer(key, body)
            index = told.get("index") if isinstance(told, dict) else None
            banned = status == 403 and told["detail"] != "rejected"
            arena.log.append((key, body, -403 if banned else status, index))
            self.reply(status, headers, told)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def attacked(arena, names=("square",), accounts=1, images=None, queries=BUDGET, **options):
    with serving(arena) as url:
        found = campaign(
            granted(url, url, "admin", accounts),
            images or pictures(),
            names,
            BALL,
            queries=queries,
            name="arena",
            tier="smoke",
            progress=False,
            **options,
        )
    assert found.stopped == ""
    return found


# --- what a campaign claims, recomputed from the log ------------------------------------------------------


def recomputed(arena, images, accounts):
    """Image -> (succeeded, queries, rejected, size or None), from what was on the wire; one attack."""
    originals = {
        int(at): np.rint(255 * x[0].numpy()).astype(int)
        for at, x in zip(images.indices, images.x, strict=True)
    }
    mine = {f"key-{i}" for i in range(1, 1 + accounts)}  # key-0 scouts, the others come after the attack's

    def nearest(body):
        apart = {at: np.abs(seen(body) - original).max() for at, original in originals.items()}
        return min(apart, key=apart.get)

    def seen(body):
        image = Image.open(io.BytesIO(body))
        assert (image.format, image.mode, image.size) == ("PNG", "L", (SIDE, SIDE))
        return np.asarray(image).astype(int)

    told = {
        at: {"before": None, "queries": 0, "rejected": 0, "after": None, "size": None} for at in originals
    }
    for key, body, status, index in arena.log:
        one = told[nearest(body)]
        if key == "key-0":
            assert (seen(body) == originals[nearest(body)]).all()  # the scout sends untouched images alone
            one["before"] = index
        elif key in mine:
            one["queries"] += status in (200, 403)
            one["rejected"] += status == 403
        else:
            assert one["after"] is None, "a result is asked about once"
            one["after"], one["size"] = index, np.abs(seen(body) - originals[nearest(body)]).max() / 255
    labels = dict(zip(images.indices, images.y.tolist(), strict=True))
    return {
        at: (
            one["before"] == labels[at]
            and one["after"] not in (None, labels[at])
            and one["size"] <= EPS + 1e-9
            and one["queries"] <= BUDGET,
            one["queries"],
            one["rejected"],
            one["size"],
        )
        for at, one in told.items()
    }


def judged(arena, name="square", least=6, accounts=1):
    """Attack, and compare every claim with the log. Raises: AssertionError, also for fewer successes than `least`."""
    images = pictures()
    found = attacked(arena, (name,), images=images, accounts=accounts)
    (run,) = found.runs
    truth = recomputed(arena, images, accounts)
    for one in run.attempts:
        won, queries, rejected, size = truth[one.image]
        assert (run.succeeded(one), one.queries, one.rejected) == (won, queries, rejected), one
        assert one.queries <= BUDGET
        assert size is None or one.size == pytest.approx(size, abs=1e-9)
    won = {one.image for one in run.attempts if run.succeeded(one)}
    assert run.success().n == 11  # one was wrong before
    assert run.success().k == len(won)
    assert not any((at - 100) % 2 for at in won), "an image fell that no point of the ball can turn"
    assert len(won) >= least
    return run


def test_successes_are_those_on_the_wire_and_no_others():
    run = judged(Arena())
    assert run.success().k == 6
    assert run.rejected.k == 0


def test_an_attack_may_spend_its_budget_and_no_more():
    run = judged(Arena(), "nes", least=3)
    assert max(one.queries for one in run.attempts) == BUDGET


def test_rejections_are_counted_and_gain_nothing():
    assert judged(Arena(rejects_every=3), least=3).rejected.k > 50


def test_a_service_that_lies_to_whoever_asks_much_is_not_believed():
    """After 60 queries an account is told another class than the true one: a fresh account hears the truth."""
    run = judged(Arena(lies_after=60), least=3)
    assert sum(one.after == one.label for one in run.attempts) >= 3


def test_banned_keys_are_burnt_and_the_next_one_goes_on():
    arena = Arena(rejects_every=2, bans_after=4)
    run = judged(arena, least=3, accounts=40)
    assert run.burnt == sum(status == -403 for *_, status, _ in arena.log) > 5
    alone = attacked(Arena(rejects_every=2, bans_after=4)).runs[0]
    assert alone.burnt == 1
    assert [one.queries for one in alone.attempts].count(0) >= 8  # no key, no query
    assert len(alone.attempts) == 12  # and no success


def broken_budget(*arguments, budget, **options):
    return Oracle(*arguments, budget=budget + 1, **options)


def unrejected(self, response):
    if response.status_code == 403:
        return Answer(3, (0.25,) * 4)  # uniform scores, as a careless client has it
    return read(self, response)


def leaves_the_ball(self, point):
    return oracles.pixels(point)


def half_a_level(sent):
    return oracles.image(sent) * 0.98  # what the attack had meant, not what was sent


read = Client._read

MUTANTS = {
    "success without a fresh query": (campaigns, "_told", lambda access, body: 9),
    "eps is not checked": (oracles, "within", lambda threat, original, sent: True),
    "budget off by one": (campaigns, "Oracle", broken_budget),
    "a rejection is an answer": (Client, "_read", unrejected),
    "rounding may leave the ball": (Oracle, "sent", leaves_the_ball),
    "size of what was meant": (campaigns, "image", half_a_level),
    "wrong before counts": (Attempt, "attacked", property(lambda self: True)),
    "rejections are not counted": (Oracle, "rejected", property(lambda self: 0, lambda self, value: None)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_clients_are_found_out(name, monkeypatch):
    place, attribute, wrong = MUTANTS[name]
    monkeypatch.setattr(place, attribute, wrong, raising=False)  # some are attributes of instances
    with pytest.raises(AssertionError):  # noqa: PT012  either way of being wrong will do
        judged(Arena())
        judged(Arena(rejects_every=3), least=3)
        judged(Arena(), "nes", least=3)  # never asks the same twice, and so spends all it may


# --- attacks find what there is to find -----------------------------------------------------------------

# A lead of 1.5 eps takes 3/4 of what the ball allows, in the right direction: noise, and a search that goes nowhere, do
# not get there. Labels alone: to within 0.1 of the image, from another one at 0.2 and more.
SEARCHES = {
    "square": {"least": 4, "even": 1.5, "queries": 200},
    "simba": {"least": 6, "even": 1.5},
    "nes": {"least": 6, "even": 1.5, "queries": 200},
    "linear-bandit": {"least": 6, "even": 1.5},
    "hop-skip-jump": {"least": 6, "even": 0.5, "queries": 200},
}


def searched(name, least, even, queries=BUDGET, rejects_every=0):
    """Attack six images that the ball can turn. Raises: AssertionError where fewer than `least` fall."""
    every = pictures(even=even)
    images = replace(every, x=every.x[::2], y=every.y[::2], indices=every.indices[::2])
    arena = Arena(rejects_every, output="label" if KNOWLEDGE[name] == "label-only" else "full")
    (run,) = attacked(arena, (name,), images=images, queries=queries).runs
    assert run.success().k >= least, f"{run.success().k} of {run.success().n} fell"


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_what_there_is(name):
    searched(name, **SEARCHES[name])


def test_a_model_of_the_answers_is_not_misled_by_rejections():
    searched("linear-bandit", **SEARCHES["linear-bandit"], rejects_every=4)


def against_its_estimate(logits, y):
    return -margin(logits, y)


def never_halves(self, current_sample, original_sample, *_, **__):
    return current_sample


def backwards(self, *told, **more):
    return -estimate(self, *told, **more)


estimate = HopSkipJump._compute_update

ASTRAY = {
    "nes steps against its estimate": ("nes", attacks, "margin", against_its_estimate),
    "simba keeps what lowers the margin": ("simba", attacks, "margin", against_its_estimate),
    "the bandit learns nothing": ("linear-bandit", attacks, "_NOISE", 1e6),
    "hop-skip-jump never halves": ("hop-skip-jump", HopSkipJump, "_binary_search", never_halves),
    "hop-skip-jump steps against its estimate": ("hop-skip-jump", HopSkipJump, "_compute_update", backwards),
}


@pytest.mark.parametrize("name", ASTRAY)
def test_searches_that_go_astray_are_found_out(name, monkeypatch):
    search, place, attribute, wrong = ASTRAY[name]
    monkeypatch.setattr(place, attribute, wrong)
    with pytest.raises(AssertionError, match="of 6 fell"):
        searched(search, **SEARCHES[search])


def test_rejections_taken_for_answers_mislead(monkeypatch):
    always = property(lambda self: torch.ones(1, dtype=torch.bool), lambda self, value: None)
    monkeypatch.setattr(Oracle, "answered", always, raising=False)  # it is one of instances
    with pytest.raises(AssertionError, match="of 6 fell"):
        searched("linear-bandit", **SEARCHES["linear-bandit"], rejects_every=4)


# --- what is sent --------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from(["Linf", "L2", "L1"]), st.floats(0.002, 0.5))
@examples(deadline=None, max_examples=60)
def test_what_is_sent_of_a_point_of_the_ball_lies_in_it(seed, norm, eps):
    """In whole grey levels, and no coordinate farther than one level from what the attack meant."""
    generator = seeded(seed)
    original = torch.randint(256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    clean = oracles.image(original)
    ball = Ball(norm, eps * {"Linf": 1, "L2": 5, "L1": 20}[norm])
    point = ball.candidates(clean[None], 3 * ball.random(clean[None], generator))[0]
    with Client("http://127.0.0.1:9", ["unused"]) as nobody:
        sent = Oracle(nobody, original, 0, ball, classes=10, budget=1).sent(point)
    assert sent.dtype == np.uint8
    delta = (sent.astype(float) - original) / 255
    size = {"Linf": np.abs(delta).max(), "L2": np.sqrt((delta**2).sum()), "L1": np.abs(delta).sum()}[norm]
    assert size <= ball.eps + 1e-6
    assert np.abs(sent / 255 - point.permute(1, 2, 0).numpy()).max() < 1 / 255 + 1e-6


def test_membership_is_that_of_the_file():
    draw = np.random.default_rng(1)
    original = draw.integers(60, 190, (28, 28, 1)).astype(np.uint8)
    near, far = original.copy(), original.copy()
    near[3, 3] += 25
    far[3, 3] += 26
    assert within(BALL, original, near)
    assert not within(BALL, original, far)
    lattice = RotationTranslation(30, 3)
    clean = oracles.image(original)[None].float()
    turned = lattice.transformed(clean, torch.tensor([[-14.0, 1.5, -3.0]]))[0]
    assert within(lattice, original, oracles.pixels(turned))
    off = oracles.pixels(turned)
    off[14, 14] ^= 8
    assert not within(lattice, original, off)


def test_a_file_gives_back_its_pixels():
    for shape in ((5, 7, 1), (5, 7, 3)):
        pixels = np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
        assert (clients.decoded(png(pixels)) == pixels).all()


def test_what_was_asked_is_not_asked_again():
    arena, images = Arena(), pictures()
    original = oracles.pixels(images.x[0])
    with serving(arena) as url:
        key = make_key(url, "admin")
        with Client(url, [key]) as client:
            oracle = Oracle(client, original, int(images.y[0]), BALL, classes=4, budget=5)
            for _ in range(3):
                oracle(images.x[:1])
    assert (oracle.queries, len(arena.log)) == (1, 1)


@pytest.mark.parametrize("name", ["simba", "nes"])
def test_a_ball_smaller_than_a_grey_level_holds_nothing_to_ask(name):
    """All of its points are one file: an attack that waits for another answer would never end."""
    with serving(Arena()) as url:
        (run,) = campaign(
            granted(url, url, "admin", 1),
            pictures(),
            (name,),
            Ball("Linf", 0.4 / 255),
            queries=5,
            name="arena",
            tier="smoke",
            progress=False,
        ).runs
    assert {one.queries for one in run.attempts} == {0}


# --- one query on the wire ------------------------------------------------------------------------------


def test_throttled_and_shed_queries_are_waited_out_and_are_no_queries():
    arena = Arena(
        script=[(429, {"Retry-After": 0}, {"detail": "wait"}), (503, {"Retry-After": 0}, {"detail": "busy"})]
    )
    with serving(arena) as url, Client(url, [make_key(url, "admin")]) as client:
        assert client.ask(png(oracles.pixels(pictures().x[0]))).index in range(4)
    assert (client.counts.throttled, client.counts.shed, client.counts.asked) == (1, 1, 1)


def test_a_service_that_never_has_time_ends_in_a_sentence():
    arena = Arena(script=[(429, {"Retry-After": 1}, {"detail": "wait"})] * 5)
    with (
        serving(arena) as url,
        Client(url, ["key-0"], patience=0.5) as client,
        pytest.raises(RobustkitError, match="answered 429"),
    ):
        client.ask(b"x")


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b"<html>", "500"),
        (200, b"<html>", "is it a robustkit service"),
        (200, b'{"scores": 3}', "is it a robustkit service"),
        (415, b'{"detail": "neither a PNG"}', "neither a PNG"),
    ],
)
def test_other_answers_end_in_a_sentence(status, body, said):
    with (
        serving(Arena(script=[(status, {}, body)])) as url,
        Client(url, ["key-0"]) as client,
        pytest.raises(RobustkitError, match=said),
    ):
        client.ask(b"x")


def test_keys_take_turns_and_the_drip_is_slow():
    arena = Arena()
    body = png(oracles.pixels(pictures().x[0]))
    with serving(arena) as url:
        keys = [make_key(url, "admin") for _ in range(3)]
        with Client(url, keys, turn=2) as client:
            for _ in range(7):
                client.ask(body)
    assert [key for key, *_ in arena.log] == ["key-0"] * 2 + ["key-1"] * 2 + ["key-2"] * 2 + ["key-0"]


def test_a_key_that_never_worked_is_a_mistake_and_one_that_did_is_burnt():
    arena = Arena()
    body = png(oracles.pixels(pictures().x[0]))
    with serving(arena) as url:
        with (
            Client(url, ["wrong"]) as client,
            pytest.raises(RobustkitError, match="does not know this API key"),
        ):
            client.ask(body)
        with Client(url, [make_key(url, "admin")]) as client:
            client.ask(body)
            arena.keys = 0  # revoked
            with pytest.raises(NoKeys):
                client.ask(body)
    assert client.counts.burnt == 1


def test_a_dial_settles_where_one_in_ten_is_rejected():
    """A detector that rejects steps below 0.4 with certainty: the dial stays just above, and pays about 10 %."""
    dial, rejected = Dial(0.05), 0
    for i in range(2000):
        no = dial.value < 0.4
        rejected += no and i >= 200
        dial.told(not no)
    assert 0.05 < rejected / 1800 < 0.15
    assert 0.35 < dial.value < 0.6


# --- the real service ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "test", limit=6, seed=0)


SMALL = Ball("Linf", 0.15)


def against(here, images, names, *, accounts=1, queries=60, **options):
    return campaign(
        granted(here.url, here.admin_url, here.admin, accounts),
        images,
        names,
        SMALL,
        queries=queries,
        name="test",
        tier="smoke",
        progress=False,
        **options,
    )


def test_every_attack_runs_against_the_real_service(tmp_path, digits):
    """All but one break an ordinary network here; the report of two states of the defence shows them side by side."""
    everything = tuple(KNOWLEDGE)
    surrogate = models.pretrained("mnist-fgsm")
    with running(settings(tmp_path / "off", output="full", mode="off")) as here:
        off = against(here, digits, everything, surrogate=surrogate)
        served = models.pretrained("mnist-clean")
        with torch.no_grad():
            right = int((served(digits.x).argmax(1) == digits.y).sum())
    assert off.stopped == ""
    runs = {run.attack: run for run in off.runs}
    for run in off.runs:
        assert run.success().n == right
        assert all(one.queries <= 60 for one in run.attempts)
        assert all(one.size is None or one.size <= SMALL.eps + 1e-6 for one in run.attempts)
    # The last but one a peer, through the same oracle.
    for name in ("square", "simba", "nes", "linear-bandit", "art-square", "rotation-translation"):
        assert runs[name].success().k >= 1, name
    assert runs["transfer-pgd"].rejected.n == right  # one query an image
    with running(settings(tmp_path / "on", output="full", mode="reject")) as here:
        on = against(here, digits, ("square", "rotation-translation"))
        bold = against(here, digits, ("square", "nes", "simba"), adaptive=True, accounts=2)
    assert on.runs[0].rejected.share > 0.8
    assert bold.runs[0].rejected.share < on.runs[0].rejected.share / 2
    rows = page.matrix([off, on, bold])
    assert len(rows) == len(everything)
    assert all(len(row) == 4 for row in rows)
    html = "".join(page.sections([off, on, bold]))
    assert "Attacks by defence" in html
    assert html.count("<img ") == 2 + 2 + 1  # one figure for each campaign and norm
    assert Campaign.from_json(off.to_json()) == off


def test_labels_alone_end_what_needs_scores_and_the_rest_goes_on(tmp_path, digits, capsys):
    with running(settings(tmp_path, output="label", mode="off")) as here:
        found = against(here, digits, ("square", "hop-skip-jump", "rotation-translation"))
    square, jump, turned = found.runs
    assert square.attempts == ()
    assert square.skipped.startswith("square needs a score")
    assert square.skipped in capsys.readouterr().err
    assert found.output == "labels"
    assert jump.success().n == turned.success().n > 0


def test_a_library_without_a_budget_is_ended_by_ours(tmp_path, digits):
    """ART's HopSkipJump does not end against a service that rejects all it is sent; the oracle's budget ends it."""
    with running(settings(tmp_path, output="label", mode="reject")) as here:
        (run,) = against(here, digits, ("hop-skip-jump",), queries=30).runs
    assert {one.queries for one in run.attacked} <= set(range(31))
    assert run.rejected.share > 0.3


def test_ctrl_c_keeps_what_was_measured(digits, monkeypatch, tmp_path):
    asked = Counter()
    original = Client.ask

    def until(self, body):
        asked["times"] += 1
        if asked["times"] == 6 + 20:  # in the attack on some image, after the scout
            raise KeyboardInterrupt
        return original(self, body)

    monkeypatch.setattr(Client, "ask", until)
    with running(settings(tmp_path, output="full", mode="reject")) as here:
        found = against(here, digits, ("square", "rotation-translation"), queries=15)
    assert found.stopped == "interrupted"
    assert 0 < len(found.runs[0].attempts) < 6, found.runs[0]
    assert found.runs[1].skipped == "not reached"
    assert Campaign.from_json(found.to_json()) == found


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_attacks_writes_and_reports(run, tmp_path):
    with running(settings(tmp_path / "s", output="full", mode="reject")) as here:
        common = [
            "redteam",
            here.url,
            "--keys",
            tmp_path / "s" / "credentials.json",
            "--admin",
            here.admin_url,
        ]
        common += ["--data", "digits", "--n", "3", "--queries", "12"]
        first = tmp_path / "plain.json"
        status, out, _ = run(*common, "--attacks", "square", "--out", first, "--name", "on")
        assert status == 0
        assert "square" in out
        assert "Linf eps=0.3" in out
        second = tmp_path / "adaptive.json"
        status, out, _ = run(
            *(*common, "--attacks", "square", "--adaptive", "--accounts", "2", "--json"),
            *("--out", second, "--report", tmp_path / "page.html", "--name", "on, adaptive"),
        )
        assert status == 0
        assert json.loads(out)["summary"][0]["attack"] == "square"
    assert read_campaign(second).keys == 2
    status, out, _ = run("report", first, second, "-o", tmp_path / "both.html", "--json")
    assert status == 0
    assert [one["name"] for one in json.loads(out)["campaigns"]] == ["on", "on, adaptive"]
    assert '<th scope="col">on, adaptive</th>' in (tmp_path / "both.html").read_text()


def test_mistakes_are_said_in_a_sentence(run, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("rk_a\nrk_b\n")
    out = tmp_path / "out.json"

    def said(url, *more):
        status, _, err = run(
            "redteam", url, "--keys", keys, "--data", "digits", "--n", "2", "--out", out, *more
        )
        assert status == 2
        assert not out.exists()
        (line,) = [line for line in err.splitlines() if line.startswith("robustkit: ")]
        return line

    assert "cannot be reached" in said("http://127.0.0.1:9")
    assert "is no URL" in said("127.0.0.1:8000")
    assert "need --admin" in said("http://127.0.0.1:9", "--accounts", "3")
    assert "operator's credential" in said("http://127.0.0.1:9", "--admin", "http://127.0.0.1:9")
    assert "queries must be at least 1" in said("http://127.0.0.1:9", "--queries", "0")
    with running(settings(tmp_path / "s")) as here:
        assert "does not know this API key" in said(here.url)
        assert "is unknown; choose of square" in said(here.url, "--attacks", "sqare")
        assert "no robustkit service" in said(here.admin_url)
    keys.write_text("")
    assert "at least one API key" in said("http://127.0.0.1:9")
    keys.unlink()
    assert "cannot be read" in said("http://127.0.0.1:9")


def test_listed_keys_keep_the_last_for_checking_and_are_dealt_out():
    access = listed("http://x", ["a", "b", "c"])
    assert (list(access.keys()), access.fresh(), access.note) == (["a", "b"], "c", "")
    assert list(listed("http://x", ["a"]).keys()) == ["a"]
    many = listed("http://x", list("abcdef"), attacks=2)
    assert ([list(many.keys()), list(many.keys())], many.fresh(), many.note) == (
        [["a", "b"], ["c", "d"]],
        "f",
        "",
    )
    few = listed("http://x", list("abc"), attacks=3)
    assert [list(few.keys()) for _ in range(3)] == [["a", "b"]] * 3
    assert few.note.startswith("The 3 attacks share 2 keys")


def test_one_attack_burns_no_key_of_the_next(tmp_path):
    """With keys alone, of a service that bans after four rejections: the second attack begins with keys of its own."""
    arena, names = Arena(rejects_every=2, bans_after=4), ("square", "simba")
    with serving(arena) as url:
        keys = [make_key(url, "admin") for _ in range(5)]
        found = campaign(
            listed(url, [*keys[1:], keys[0]], len(names)),
            pictures(),
            names,
            BALL,
            queries=BUDGET,
            name="arena",
            tier="smoke",
            progress=False,
        )
    assert [run.burnt for run in found.runs] == [2, 2]
    asked = [key for key, _, status, _ in arena.log if status == 403 and key != "key-0"]
    assert Counter(asked) == dict.fromkeys(["key-1", "key-2", "key-3", "key-4"], 4)
    with pytest.raises(RobustkitError, match="at least one account"):
        granted("http://x", "http://y", "z", 0)
    with pytest.raises(RobustkitError, match="made no key"), serving(Arena()) as url:
        make_key(f"{url}/nowhere", "z")
