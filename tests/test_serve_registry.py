"""Which models may serve: signatures, aliases, routing, and new models that are taken back."""

import json
import shutil
import time

import numpy as np
import pytest

from robustkit import models
from robustkit.errors import RobustkitError
from robustkit.models import zoo
from robustkit.serve import events, signing
from robustkit.serve.metrics import Metrics
from robustkit.serve.refusal import Refused
from robustkit.serve.registry import Registry, Served, bundle
from robustkit.serve.routing import Bounds, Probe, Router, Window, complaint, read_probe, share
from robustkit.serve.store import metadata, open_store

WHO = {"reason": "a test", "actor": "test", "now": 1000.0}
IMAGE = np.zeros((28, 28, 1), np.uint8)


@pytest.fixture
def place(tmp_path):
    """A registry with three signed models; the digest of each by name."""
    engine = open_store(f"sqlite:///{tmp_path / 'state.db'}")
    metadata.create_all(engine)
    private, public = signing.make_keys(tmp_path)
    registry = Registry(engine, tmp_path / "registry", public)
    digests = {}
    for name in ("mnist-clean", "mnist-pgd", "mnist-fgsm"):
        signed = bundle(name, zoo.WEIGHTS, tmp_path / "incoming", private)
        digests[name] = registry.register(signed, actor="test", now=1.0)
    yield registry, digests, engine, tmp_path
    engine.dispose()


# --- the registry ---------------------------------------------------------------------------------------


def test_what_is_registered_is_what_the_kit_has(place):
    registry, digests, _, _ = place
    registry.assign("champion", digests["mnist-pgd"], **WHO)
    served = registry.load("champion")
    kit = models.pretrained("mnist-pgd")
    assert (served.name, served.shape, served.labels[3]) == ("mnist-pgd", (28, 28, 1), "3")
    assert all((a == b).all() for a, b in zip(served.model.parameters(), kit.parameters(), strict=True))
    assert served.probabilities(IMAGE).sum() == pytest.approx(1)


def resigned_by_another(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    private, _ = signing.make_keys(other)
    signing.sign(folder, folder.with_name(f"{folder.name}.sig"), private)


DAMAGES = {
    "a bit of the weights": lambda folder, _: flip(folder / "mnist-ibp.safetensors", 9000),
    "a bit of the card": lambda folder, _: flip(folder / "mnist-ibp.json", 20),
    "one file more": lambda folder, _: (folder / "run.py").write_text("import os"),
    "one file less": lambda folder, _: (folder / "mnist-ibp.json").unlink(),
    "no signature": lambda folder, _: folder.with_name("mnist-ibp.sig").unlink(),
    "an empty signature": lambda folder, _: folder.with_name("mnist-ibp.sig").write_text(""),
    "half a signature": lambda folder, _: halve(folder.with_name("mnist-ibp.sig")),
    "another's signature": resigned_by_another,
    "a link out of the folder": lambda folder, _: (folder / "passwd").symlink_to("/etc/passwd"),
    "weights of another model, signed": None,
}


def flip(path, at):
    body = bytearray(path.read_bytes())
    body[at] ^= 1
    path.write_bytes(body)


def halve(path):
    path.write_text(path.read_text()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_signed_is_never_registered(place, damage):
    registry, _, engine, tmp_path = place
    folder = bundle("mnist-ibp", zoo.WEIGHTS, tmp_path / "bad", tmp_path / "signing.key")
    if DAMAGES[damage] is None:
        shutil.copy(zoo.WEIGHTS / "mnist-clean.safetensors", folder / "mnist-ibp.safetensors")
        signing.sign(folder, folder.with_name("mnist-ibp.sig"), tmp_path / "signing.key")
    else:
        DAMAGES[damage](folder, tmp_path)
    before = sorted(path.name for path in (tmp_path / "registry").iterdir())
    with pytest.raises(RobustkitError):
        registry.register(folder, actor="test", now=2.0)
    assert sorted(path.name for path in (tmp_path / "registry").iterdir()) == before
    assert len(registry.models()) == 3
    assert events.verify(engine) == 3


def test_registered_twice_is_registered_once(place):
    registry, digests, engine, tmp_path = place
    assert (
        registry.register(tmp_path / "incoming" / "mnist-pgd", actor="test", now=9.0) == digests["mnist-pgd"]
    )
    assert len(registry.models()) == 3
    registry.load_digest(digests["mnist-pgd"])
    assert events.verify(engine) == 3


def test_the_signature_is_checked_at_every_load(place):
    registry, digests, _, tmp_path = place
    registry.assign("champion", digests["mnist-clean"], **WHO)
    flip(tmp_path / "registry" / digests["mnist-clean"] / "mnist-clean.safetensors", 9000)
    with pytest.raises(RobustkitError, match="signature"):
        registry.load("champion")


def test_aliases_move_as_they_should_and_leave_a_trail(place):
    registry, digests, engine, _ = place
    clean, pgd, fgsm = (digests[f"mnist-{name}"] for name in ("clean", "pgd", "fgsm"))

    def named():
        return {alias: one.digest for alias, one in registry.aliases().items()}

    registry.assign("champion", clean, **WHO)
    with pytest.raises(RobustkitError, match="no canary to promote"):
        registry.promote(**WHO)
    with pytest.raises(RobustkitError, match="no canary and no other"):
        registry.rollback(**WHO)
    registry.assign("canary", pgd, **WHO, percent=10)
    assert registry.aliases()["canary"].percent == 10
    registry.promote(**WHO)
    assert named() == {"champion": pgd, "last-good": clean}
    registry.assign("canary", fgsm, **WHO, percent=50)
    assert registry.rollback(**WHO) == fgsm
    assert named() == {"champion": pgd, "last-good": clean}
    assert registry.rollback(**WHO) == pgd
    assert named() == {"champion": clean, "last-good": clean}
    with pytest.raises(RobustkitError, match="no other model"):
        registry.rollback(**WHO)
    kinds = [event.kind for event in events.timeline(engine, kinds=("model",))][3:]
    assert kinds == [
        "model.assigned",
        "model.assigned",
        "model.promoted",
        "model.assigned",
        "model.rolled-back",
        "model.rolled-back",
    ]
    for wrong in (("best", clean, 1), ("canary", "0" * 64, 1), ("canary", clean, 0), ("canary", clean, 101)):
        with pytest.raises(RobustkitError):
            registry.assign(*wrong[:2], **WHO, percent=wrong[2])


# --- routing --------------------------------------------------------------------------------------------


def test_a_share_of_accounts_meets_the_canary_and_stays_there(place):
    registry, digests, _, _ = place
    registry.assign("champion", digests["mnist-clean"], **WHO)
    registry.assign("canary", digests["mnist-pgd"], **WHO, percent=20)
    router = Router(registry, Metrics(), believed=0.05)
    accounts = [f"{i:032x}" for i in range(2000)]
    first = [router.choose(account, "canary", 0.0)[0][0] for account in accounts]
    assert 320 < first.count("canary") < 480  # 400 expected, 4.5 standard deviations
    assert [router.choose(account, "canary", 1.0)[0][0] for account in accounts] == first
    assert {router.choose(account, "champion", 1.0)[0][0] for account in accounts} == {"champion"}
    both = router.choose(accounts[0], "ensemble", 1.0)
    assert {model.digest for _, model in both} == {digests["mnist-clean"], digests["mnist-pgd"]}
    other = [share("another canary", account) < 20 for account in accounts]
    assert other != [alias == "canary" for alias in first]  # not always the same customers


def test_the_fallback_and_the_ensemble_answer_when_they_should(place):
    registry, digests, _, _ = place
    for alias, name in (("champion", "mnist-clean"), ("fallback", "mnist-pgd")):
        registry.assign(alias, digests[name], **WHO)
    router = Router(registry, Metrics(), believed=0.05)
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    clean, pgd = (registry.load_digest(digests[f"mnist-{name}"]) for name in ("clean", "pgd"))
    told, scores = router.scores(router.choose("a", "fallback", 0.0), image)
    assert told == pgd.digest
    assert (scores == pgd.probabilities(image)).all()
    told, scores = router.scores(router.choose("a", "ensemble", 0.0), image)
    assert told == "ensemble"
    assert scores == pytest.approx((clean.probabilities(image) + pgd.probabilities(image)) / 2)


def test_a_model_that_fails_is_passed_over(place):
    registry, digests, _, _ = place
    registry.assign("champion", digests["mnist-clean"], **WHO)
    registry.assign("canary", digests["mnist-pgd"], **WHO, percent=100)
    router = Router(registry, Metrics(), believed=0.05)
    chosen = router.choose("a", "canary", 0.0)
    chosen[0][1].model[0].weight.data.fill_(float("nan"))
    assert router.scores(chosen, IMAGE)[0] == digests["mnist-clean"]
    router.champion.model[0].weight.data.fill_(float("nan"))
    with pytest.raises(Refused) as caught:
        router.scores(chosen, IMAGE)
    assert caught.value.status == 503


def test_a_champion_that_cannot_be_loaded_leaves_the_last_good_one(place):
    registry, digests, _, tmp_path = place
    registry.assign("champion", digests["mnist-pgd"], **WHO)
    registry.assign("last-good", digests["mnist-clean"], **WHO)
    running = Router(registry, Metrics(), believed=0.05)
    registry.assign("champion", digests["mnist-fgsm"], **WHO)
    flip(tmp_path / "registry" / digests["mnist-fgsm"] / "mnist-fgsm.safetensors", 9000)
    time.sleep(0.06)
    assert running.choose("a", "champion", 0.0)[0][1].name == "mnist-pgd"  # who ran goes on
    started = Router(registry, Metrics(), believed=0.05)
    assert started.choose("a", "champion", 0.0)[0][1].name == "mnist-clean"
    flip(tmp_path / "registry" / digests["mnist-clean"] / "mnist-clean.safetensors", 9000)
    with pytest.raises(RobustkitError, match="no model of the registry"):
        Router(registry, Metrics(), believed=0.05)


# --- taken back -----------------------------------------------------------------------------------------


def window(n, *, failed=0, flagged=0, seconds=0.01):
    one = Window()
    one.failed.extend([True] * failed + [False] * (n - failed))
    one.flagged.extend([True] * flagged + [False] * (n - flagged))
    one.seconds.extend([seconds] * (n - failed))
    return one


def test_what_speaks_against_a_new_model():
    bounds, old = Bounds(least=50), window(500, flagged=10)
    assert complaint(window(500, flagged=10), old, bounds) is None
    assert complaint(window(49, failed=49, flagged=49, seconds=9), old, bounds) is None  # too few to say
    assert complaint(window(200, failed=1), old, bounds) is None  # one in 200 may be chance
    assert complaint(window(200, failed=10), old, bounds).startswith("errors")
    assert complaint(window(200, flagged=6), old, bounds) is None
    assert complaint(window(200, flagged=60), old, bounds).startswith("flagged")
    assert complaint(window(200, seconds=0.015), old, bounds) is None
    assert complaint(window(200, seconds=0.025), old, bounds).startswith("latency 2.5")
    assert (
        complaint(window(200, flagged=60, seconds=1), window(10), bounds) is None
    )  # nothing to compare with


def served_for_a_while(router, serving="canary", answers=60):
    for account in range(answers):
        chosen = router.choose(f"{account:032x}", serving, 5.0)
        router.flagged(chosen, False)
        router.scores(chosen, IMAGE)


def test_a_canary_that_fails_is_taken_back_by_itself(place):
    registry, digests, engine, _ = place
    registry.assign("champion", digests["mnist-clean"], **WHO)
    registry.assign("canary", digests["mnist-pgd"], **WHO, percent=50)
    metrics = Metrics()
    router = Router(registry, metrics, bounds=Bounds(least=10), believed=0.05)
    served_for_a_while(router)
    router._serving["canary"].model[0].weight.data.fill_(float("nan"))
    served_for_a_while(router)
    time.sleep(0.06)
    router.choose("a", "canary", 6.0)
    assert "canary" not in registry.aliases()
    last = events.timeline(engine, kinds=("model.rolled-back",))[-1]
    assert last.actor == "service"
    assert last.body["model"] == digests["mnist-pgd"]
    assert last.body["reason"].startswith("errors")
    assert {router.choose(f"{i:032x}", "canary", 7.0)[0][0] for i in range(50)} == {"champion"}
    assert b'robustkit_rollbacks_total{reason="errors"} 1.0' in metrics.text()


def test_a_promoted_model_that_loses_on_the_probe_set_is_taken_back(place):
    registry, digests, _, tmp_path = place
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 28, 28, 1), dtype=np.uint8)
    clean = registry.load_digest(digests["mnist-clean"])
    labels = np.array([clean.probabilities(image).argmax() for image in images])
    np.savez(tmp_path / "probe.npz", images=images, labels=labels)
    probe = read_probe(tmp_path / "probe.npz")
    pgd = registry.load_digest(digests["mnist-pgd"])
    assert probe.accuracy(clean) == 1
    assert probe.accuracy(pgd) < 0.9
    registry.assign("champion", digests["mnist-clean"], **WHO)
    registry.assign("canary", digests["mnist-pgd"], **WHO)
    registry.promote(**WHO)
    router = Router(registry, Metrics(), probe, believed=0.05)
    time.sleep(0.06)
    router.choose("a", "champion", 6.0)
    assert registry.aliases()["champion"].digest == digests["mnist-clean"]
    assert router.choose("a", "champion", 6.0)[0][1].name == "mnist-clean"
    time.sleep(0.06)
    router.choose("a", "champion", 8.0)  # the last good one is not taken back in its turn
    assert registry.aliases()["champion"].digest == digests["mnist-clean"]


def test_probe_sets_that_are_none(tmp_path):
    wrong = {
        "text": {"images": np.array(["a"]), "labels": np.array([1])},
        "no labels": {"images": np.zeros((2, 28, 28, 1), np.uint8)},
        "empty": {"images": np.zeros((0, 28, 28, 1), np.uint8), "labels": np.zeros(0, int)},
        "a pickle": {"images": np.array([object()]), "labels": np.array([1])},
    }
    for name, arrays in wrong.items():
        np.savez(tmp_path / "probe.npz", **arrays)
        with pytest.raises(RobustkitError):
            read_probe(tmp_path / "probe.npz")
        assert name


def test_a_probe_set_holds_models_that_fail_for_wrong(place):
    registry, digests, _, _ = place
    model = registry.load_digest(digests["mnist-clean"])
    model.model[0].weight.data.fill_(float("nan"))
    assert Probe(IMAGE[None], np.zeros(1, int)).accuracy(model) == 0


def test_of_two_replicas_that_see_the_same_one_takes_it_back(place):
    registry, digests, engine, tmp_path = place
    registry.assign("champion", digests["mnist-clean"], **WHO)
    registry.assign("canary", digests["mnist-pgd"], **WHO)
    twin = Registry(engine, tmp_path / "registry", tmp_path / "signing.pub")
    assert [one.take_back("canary", digests["mnist-pgd"], **WHO) for one in (registry, twin)] == [True, False]
    assert len(events.timeline(engine, kinds=("model.rolled-back",))) == 1
    events.verify(engine)


def test_a_card_names_what_is_served(place):
    registry, digests, _, tmp_path = place
    card = json.loads((tmp_path / "registry" / digests["mnist-pgd"] / "mnist-pgd.json").read_text())
    served = registry.load_digest(digests["mnist-pgd"])
    assert isinstance(served, Served)
    assert card["sha256"] == served.digest == digests["mnist-pgd"]
