"""Evaluation: verdicts are given here, whatever an attack says or does."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from robustkit.attacks import apgd, apgd_targeted, fab, fab_targeted, fgsm, pgd, rs_fgsm, square
from robustkit.attacks.library import LIBRARY
from robustkit.device import Prepared
from robustkit.errors import RobustkitError
from robustkit.evaluate import (
    ATTACKS,
    DRAWS,
    PROTOCOLS,
    check_candidates,
    evaluate,
    find_attacks,
    find_protocol,
    in_turn,
    predict,
    strongest_knowledge,
)
from robustkit.results import CLEAN, Evaluation
from robustkit.threat import NORMS, Ball, check_units
from tests.oracle import DUAL, PROVENANCE, dataset, interior, linear, linear_data, margins, strongest

BALL = Ball("Linf", 0.05)
measure = partial(evaluate, model_name="linear", tier="smoke", progress=False)


def nothing(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None) -> Tensor:
    return x.clone()


# --- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ["fgsm", "pgd-40"])
def test_accuracies_are_those_of_the_closed_form(norm, attack):
    model, ball = linear(), Ball(norm, {"Linf": 0.05, "L2": 0.15, "L1": 0.25}[norm])
    data = linear_data(model, n=400)
    found = measure(model, data, ball, {attack: ATTACKS[attack]})
    m = margins(model, data.x, data.y)
    reach = ball.eps * np.linalg.norm(model.w.detach().double().numpy(), ord=DUAL[norm])
    assert found.clean.k == (m > 0).sum() == 360
    # PGD ends within 2 % of the L2 optimum; rounding alone blurs the others.
    blur = 0.02 if (norm, attack) == ("L2", "pgd-40") else 1e-4
    close = int((abs(m - reach) < blur * reach).sum())
    assert close < 10
    assert abs(found.robust.k - (m > reach).sum()) <= close
    assert 40 < found.robust.k < 320
    expected = [CLEAN if value <= 0 else attack if value < reach else None for value in m]
    assert sum(a != b for a, b in zip(found.broken_by, expected, strict=True)) <= close


def test_an_evaluation_carries_its_threat_model_data_and_settings():
    model = linear()
    data = linear_data(model).subset(50, seed=3)
    attacks = {"fgsm": fgsm, "short": partial(pgd, steps=3, restarts=2)}
    found = measure(model, data, BALL, attacks, seed=7)
    assert found.threat.ball == BALL
    assert found.threat.knowledge == "white-box"
    assert found.data == PROVENANCE
    assert found.indices == data.indices
    assert (found.seed, found.tier, found.model, found.n) == (7, "smoke", "linear", 50)
    assert [(run.name, run.parameters) for run in found.attacks] == [
        ("fgsm", {}),
        ("short", {"steps": 3, "restarts": 2}),
    ]
    assert Evaluation.from_json(found.to_json()) == found


def test_later_attacks_meet_survivors_only_and_the_worst_case_counts():
    model = linear()
    data = linear_data(model)
    met: dict[str, int] = {}

    def on_half(name: str, side: int):
        """Moves only the images whose first pixel is on one side: each half is broken by one attack."""

        def attack(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None) -> Tensor:
            met[name] = met.get(name, 0) + len(x)
            moved = torch.from_numpy(strongest(linear(), x, y, ball)).float()
            chosen = (x[:, 0, 0, 0] > 0.5) == bool(side)
            return torch.where(chosen[:, None, None, None], moved, x)

        return attack

    found = measure(model, data, BALL, {"left": on_half("left", 0), "right": on_half("right", 1)})
    both = measure(model, data, BALL, {"fgsm": fgsm})
    assert met["left"] == found.clean.k
    assert met["right"] == found.robust_after(1).k < met["left"]
    assert found.robust.k == both.robust.k < found.robust_after(1).k
    assert {CLEAN, "left", "right", None} == set(found.broken_by)


def test_the_batch_size_changes_nothing_for_a_deterministic_attack():
    model = linear()
    data = linear_data(model)
    found = [measure(model, data, BALL, {"fgsm": fgsm}, batch_size=size).broken_by for size in (1000, 7)]
    assert found[0] == found[1]


def test_randomness_follows_from_the_seed_alone():
    model = linear()
    data = linear_data(model, n=400)
    attacks = {"rs-fgsm": partial(rs_fgsm, step_size=0.3)}
    torch.manual_seed(1)
    first = measure(model, data, BALL, attacks, seed=1)
    torch.manual_seed(2)
    assert measure(model, data, BALL, attacks, seed=1).broken_by == first.broken_by
    assert measure(model, data, BALL, attacks, seed=2).broken_by != first.broken_by


def test_when_everything_is_broken_the_remaining_attacks_have_nothing_to_do():
    model = linear()
    data = linear_data(model)
    found = measure(model, data, Ball("Linf", 0.5), {"fgsm": fgsm, "pgd-10": ATTACKS["pgd-10"]})
    assert found.robust.k == 0
    assert "pgd-10" not in found.broken_by


# --- prediction ------------------------------------------------------------------------------------


def test_a_tie_counts_against_the_model():
    x, y = torch.full((3, 4), 0.5), torch.tensor([0, 1, 2])

    def constant(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 3)

    assert predict(constant, x, y).tolist() == [False, False, False]


def test_predictions_are_made_in_eval_mode_and_the_mode_comes_back():
    model = linear()
    data = linear_data(model)
    model.train()
    right = predict(model, data.x, data.y)
    assert model.training
    assert model.drop.training
    assert (right.numpy() == (margins(model, data.x, data.y) > 0)).all()


def test_predictions_are_made_in_full_float32_inside_autocast():
    """Two logits that bfloat16 cannot tell apart."""
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0], [1.001]])
    x, y = torch.full((1, 1), 0.9), torch.tensor([1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).unique().numel() == 1
        assert predict(layer, x, y).all()


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.full((4, 2), torch.nan), "NaN logits"),
        (torch.zeros(4, 1), "label 1 is out of range: the model has 1 classes"),
        (torch.zeros(4), "must return logits"),
        (torch.zeros(3, 2), "must return logits"),
    ],
)
def test_unusable_logits_are_refused(logits, words):
    with pytest.raises(RobustkitError, match=words):
        predict(lambda x: logits, torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1]))


# --- what is refused -------------------------------------------------------------------------------


def returning(change):
    def attack(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None):
        return change(x, ball)

    return attack


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda x, ball: x + 1.01 * ball.eps,
            "left its ball on .* of .* images: Linf distance 0.0505, allowed 0.05",
        ),
        (lambda x, ball: x - 1.01 * ball.eps, "left its ball"),
        (lambda x, ball: torch.cat([x[:-1], x[-1:] + 2 * ball.eps]), "left its ball on 1 of"),
        (lambda x, ball: x.mul_(0).add_(0.5), "left its ball"),  # in place: measured from the kept original
        (lambda x, ball: x * torch.nan, "NaN or infinite"),
        (lambda x, ball: x[:-1], "one candidate per image"),
        (lambda x, ball: x.flatten(1), "one candidate per image"),
        (lambda x, ball: x.double(), "torch.float64 for images of torch.float32"),
        (lambda x, ball: x.numpy(), "returned ndarray"),
        (lambda x, ball: None, "returned NoneType"),
    ],
)
def test_an_attack_that_breaks_the_rules_is_refused_by_name(change, words):
    model = linear()
    with pytest.raises(RobustkitError, match=words) as caught:
        measure(model, linear_data(model), BALL, {"fgsm": fgsm, "rogue": returning(change)})
    assert "attack 'rogue'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_attack_that_leaves_the_box_is_refused_even_inside_its_ball():
    x = torch.tensor([[0.01, 0.5]])
    with pytest.raises(RobustkitError, match=r"left the box \[0, 1\]: pixels in \[-0.02, 0.5\]; clamp them"):
        check_candidates("rogue", x, x - torch.tensor([[0.03, 0.0]]), Ball("Linf", 0.05))


def test_an_attack_that_swaps_images_cannot_pass_them_off_as_perturbed():
    model = linear()
    with pytest.raises(RobustkitError, match="left its ball"):
        measure(model, linear_data(model), BALL, {"rogue": returning(lambda x, ball: x.flip(0))})


def test_an_attack_cannot_talk_its_way_to_success():
    """Labels changed in place by the attack are not the labels that decide."""

    def relabel(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None) -> Tensor:
        y.copy_(1 - y)
        return x

    model = linear()
    found = measure(model, linear_data(model), BALL, {"relabel": relabel})
    assert found.robust == found.clean


def test_a_search_model_cannot_talk_its_way_to_success_either():
    """What fools the quick copy of a prepared model, and not the model, breaks nothing."""
    model = linear()
    prepared = Prepared(lambda x: -model(x), model)
    found = measure(prepared, linear_data(model), BALL, {"nothing": nothing})
    assert (found.clean.k, found.robust.k) == (180, 180)


def test_attacks_are_given_the_prepared_model_and_verdicts_come_from_the_strict_one():
    model, seen = linear(), []

    def looking(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None) -> Tensor:
        seen.append(model)
        return x

    measure(model, linear_data(model), BALL, {"looking": looking})
    assert isinstance(seen[0], Prepared)
    assert seen[0].strict is model


def test_an_attack_that_does_nothing_breaks_nothing():
    model = linear()
    found = measure(model, linear_data(model), BALL, {"nothing": nothing})
    assert found.robust == found.clean
    assert found.clean.k == 180


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (interior() + 1, None, r"must lie in \[0, 1\]"),
        (interior() * torch.nan, None, "NaN"),
        (interior()[:0], None, "non-empty"),
        (interior(), torch.full((200,), 5), "label 5 is out of range"),
        (interior(), torch.full((200,), -1), "negative"),
        (interior(), torch.zeros(200), "int64"),
    ],
)
def test_data_that_cannot_be_evaluated_are_refused(x, y, words):
    with pytest.raises(RobustkitError, match=words):
        measure(
            linear(),
            dataset(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y),
            BALL,
            {"fgsm": fgsm},
        )


class Saying(nn.Module):
    """The linear oracle, its logits changed on the way out."""

    def __init__(self, change) -> None:
        super().__init__()
        self.inner, self.change = linear(), change
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.inner(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z: z.softmax(1), "returns probabilities .*; return logits: leave out the softmax"),
        (lambda z: z.softmax(1).round(), "returns probabilities"),
        (lambda z: z * torch.nan, "NaN logits"),
        (lambda z: torch.cat([z, z], 1), "model has 4 classes and the data have 2"),
        (lambda z: z[:, :1], "label 1 is out of range: the model has 1 classes"),
        (lambda z: z.argmax(1), "must return logits of shape"),
        (lambda z: z.sum(), "must return logits of shape"),
        (lambda z: z[None], "must return logits of shape"),
        (lambda z: z.detach().numpy(), "must return a tensor of logits; got ndarray"),
        (lambda z: (z, z), "must return a tensor of logits; got tuple"),
    ],
)
def test_a_model_that_cannot_be_evaluated_is_refused_before_any_attack(change, words):
    def unreached(model, x, y, ball, *, generator=None):
        raise AssertionError("an attack was run")

    with pytest.raises(RobustkitError, match=words) as caught:
        measure(Saying(change), linear_data(linear()), BALL, {"unreached": unreached})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.log_softmax(1),
        lambda z: z.softmax(1) * 2,
        lambda z: torch.zeros_like(z),
        lambda z: torch.where(z > 0, z, -torch.inf),
    ],
    ids=["log-probabilities", "scaled", "constant", "minus infinity"],
)
def test_logits_of_any_size_are_logits(change):
    found = measure(Saying(change), linear_data(linear(), n=20), BALL, {"nothing": nothing})
    assert found.notes == ()


def test_images_model_and_labels_on_different_devices_are_refused():
    data = linear_data(linear())
    with pytest.raises(
        RobustkitError, match=r"images are on cpu, the model on meta; .* model\.to\(x\.device\)"
    ):
        measure(linear().to("meta"), data, BALL, {"fgsm": fgsm})
    with pytest.raises(RobustkitError, match="x is on cpu and y on meta; move them"):
        measure(linear(), replace(data, y=data.y.to("meta")), BALL, {"fgsm": fgsm})


@pytest.mark.parametrize(
    ("ball", "words"),
    [
        (Ball("Linf", 8), r"eps 8 is larger than any Linf attack on 12 pixels .* \(1\).* write 8/255"),
        (Ball("Linf", 1.01), "write 1.01/255"),
        (Ball("L2", 128), r"any L2 attack on 12 pixels in \[0, 1\] needs \(3.464\)"),
    ],
)
def test_an_eps_in_grey_levels_is_caught_by_its_size(ball, words):
    with pytest.raises(RobustkitError, match=words):
        measure(linear(), linear_data(linear()), ball, {"fgsm": fgsm})


@pytest.mark.parametrize("ball", [Ball("Linf", 0.5), Ball("Linf", 1.0), Ball("L2", 3.0), Ball("Linf", 0.0)])
def test_the_ends_of_a_sweep_over_eps_are_no_mistake(ball):
    found = measure(linear(), linear_data(linear(), n=20), ball, {"fgsm": fgsm})
    assert found.threat.ball == ball


def test_the_usual_sizes_in_grey_levels_are_caught_and_in_input_units_pass():
    mnist, cifar = torch.zeros(1, 1, 28, 28), torch.zeros(1, 3, 32, 32)
    for x, norm, eps in [
        (mnist, "Linf", 0.3), (mnist, "L2", 2.0), (cifar, "Linf", 8 / 255), (cifar, "L2", 0.5), (cifar, "L1", 12.0)
    ]:  # fmt: skip
        if norm not in NORMS:
            continue
        check_units(Ball(norm, eps), x)
        with pytest.raises(RobustkitError, match="grey levels"):
            check_units(Ball(norm, 255 * eps), x)


# --- notes -----------------------------------------------------------------------------------------


def test_a_model_in_train_mode_is_evaluated_in_eval_mode_and_the_notes_say_so():
    model = linear()
    data = linear_data(model)
    expected = measure(model, data, BALL, {"fgsm": fgsm})
    model.drop.train()  # one submodule is enough
    found = measure(model, data, BALL, {"fgsm": fgsm})
    assert found.broken_by == expected.broken_by
    assert found.notes == ("the model came in train mode and was evaluated in eval mode",)
    assert expected.notes == ()
    assert (model.training, model.drop.training) == (False, True)


class Noisy(nn.Module):
    """The linear oracle with noise on its logits that eval mode does not silence."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.inner, self.size = linear(), size
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return logits + self.size * torch.randn_like(logits)


def test_a_model_that_draws_at_random_gets_repeated_draws_and_the_notes_say_so():
    """With noise of size s on both logits, an image of margin m is right ten times with probability P(m > sZ)^10."""
    model, data = Noisy(0.05), linear_data(linear(), n=2000)
    before = torch.get_rng_state()
    found = measure(model, data, BALL, {"nothing": nothing})
    assert torch.equal(torch.get_rng_state(), before)
    assert DRAWS == 10
    assert found.notes[0].startswith("the model's logits change from call to call: an image counts as broken")
    assert "any of 10 predictions is wrong" in found.notes[0]
    gap = 2 * margins(linear(), data.x, data.y)  # between the two logits
    right = stats.norm.cdf(gap / (0.05 * 2**0.5))
    for share, power in ((found.clean, 10), (found.robust, 20)):
        expected, spread = (right**power).sum(), ((right**power) * (1 - right**power)).sum() ** 0.5
        assert abs(share.k - expected) < 4 * spread
        assert abs((right ** (power / 2)).sum() - expected) > 4 * spread  # half the draws would be noticed
    # Reproducible all the same, whatever the global state and the order of the jobs.
    torch.manual_seed(5)
    again = measure(
        model, data, BALL, {"nothing": nothing}, runner=lambda work, jobs: reversed([*in_turn(work, jobs)])
    )
    assert again.broken_by == found.broken_by
    assert measure(model, data, BALL, {"nothing": nothing}, seed=1).broken_by != found.broken_by


def test_rounding_is_no_randomness():
    assert measure(Noisy(1e-7), linear_data(linear()), BALL, {"nothing": nothing}).notes == ()


# --- memory ----------------------------------------------------------------------------------------


def hungry(most: int, met: list[int]):
    """FGSM on a device that holds `most` images."""

    def attack(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None) -> Tensor:
        met.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return fgsm(model, x, y, ball)

    return attack


def test_out_of_memory_halves_the_batches_and_the_notes_say_so():
    model = linear()
    data = linear_data(model)
    met: list[int] = []
    found = measure(model, data, BALL, {"hungry": hungry(30, met), "fgsm": fgsm}, batch_size=100)
    assert found.broken_by == tuple(
        "hungry" if name == "fgsm" else name for name in measure(model, data, BALL, {"fgsm": fgsm}).broken_by
    )
    assert met == [100, 50, 25, 25, 25, 25, 25, 25, 25, 5]  # 180 images are right at the start
    assert found.notes == ("out of memory: batches went down from 100 to 25 images",)


def test_out_of_memory_on_one_image_is_a_sentence():
    met: list[int] = []
    with pytest.raises(
        RobustkitError, match="hungry runs out of memory on a single image; use a device with"
    ):
        measure(linear(), linear_data(linear()), BALL, {"hungry": hungry(0, met)}, batch_size=16)
    assert met == [16, 8, 4, 2, 1]


def test_an_evaluation_out_of_memory_goes_on_from_its_journal_with_the_smaller_batches(tmp_path):
    model, path = linear(), tmp_path / "eval.json.partial"
    data = linear_data(model)

    def killed(jobs_left: int):
        def runner(work, jobs):
            nonlocal jobs_left
            for pair in in_turn(work, jobs):
                if jobs_left == 0:
                    raise KeyboardInterrupt
                jobs_left -= 1
                yield pair

        return runner

    def random_and_hungry(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None) -> Tensor:
        if len(x) > 30:
            raise torch.OutOfMemoryError
        return rs_fgsm(model, x, y, ball, step_size=0.3, generator=generator)

    settings = {"attacks": {"random": random_and_hungry}, "batch_size": 100}
    whole = measure(model, data, BALL, **settings)
    for jobs_left in (0, 1, 2, 3, 5):
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            measure(model, data, BALL, journal=path, runner=killed(jobs_left), **settings)
        resumed = measure(model, data, BALL, journal=path, **settings)
        assert resumed.broken_by == whole.broken_by
        assert resumed.notes == whole.notes == ("out of memory: batches went down from 100 to 25 images",)


# --- protocols and knowledge -----------------------------------------------------------------------


def test_a_protocol_is_known_by_its_attacks(monkeypatch):
    model = linear()
    data = linear_data(model, n=20)
    monkeypatch.setitem(PROTOCOLS, "two", {"fgsm": fgsm, "pgd": pgd})
    for attacks, name in [
        (find_protocol("two"), "two"),
        (dict(PROTOCOLS["two"]), "two"),
        ({"pgd": pgd, "fgsm": fgsm}, None),
        ({"fgsm": fgsm, "pgd": partial(pgd, steps=1)}, None),
        ({"fgsm": fgsm, "pgd": pgd, "more": nothing}, None),
        ({"fgsm": fgsm}, None),
    ]:
        found = measure(model, data, BALL, attacks)
        assert found.protocol == name
        assert Evaluation.from_json(found.to_json()).protocol == name
    old = json.loads(found.to_json())
    del old["protocol"], old["notes"]  # as written before there were any
    assert Evaluation.from_json(json.dumps(old)) == found
    with pytest.raises(
        RobustkitError, match="protocol 'autoattack' is unknown; choose from quick, fast, standard, two"
    ):
        find_protocol("autoattack")


def test_standard_is_what_the_referee_calls_standard():
    """The attacks of pyautoattack's own standard protocol, in its order and with its settings, by our engine."""
    pyautoattack = pytest.importorskip("pyautoattack")
    referee = pyautoattack.AutoAttack(linear(), version="standard", device="cpu")
    parts = [referee.apgd, referee.apgd_targeted, referee.fab, referee.square]
    assert referee.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [part.n_restarts for part in parts] == [1, 1, 1, 1]
    theirs = [
        (apgd, {"steps": referee.apgd.n_iter}),
        (apgd_targeted, {"steps": parts[1].n_iter, "targets": parts[1].n_target_classes}),
        (fab_targeted, {"steps": parts[2].n_iter, "targets": parts[2].n_target_classes}),
        (square, {"queries": referee.square.n_queries}),
    ]
    assert [(attack.func, attack.keywords) for attack in PROTOCOLS["standard"].values()] == theirs
    assert (referee.fab.eta, referee.fab.beta, referee.fab.alpha_max) == (fab.ETA, fab.BETA, fab.ALPHA_MAX)


def test_the_threat_model_says_the_strongest_knowledge_that_was_used():
    square = LIBRARY["autoattack-square"]
    assert strongest_knowledge({"square": square}) == "score-based"
    assert strongest_knowledge({"square": square, "fgsm": fgsm}) == "white-box"
    assert strongest_knowledge(PROTOCOLS["standard"]) == "white-box"
    assert strongest_knowledge({"an attack of hers": nothing}) == "white-box"  # nothing is known about it


def test_an_evaluation_without_an_attack_is_refused():
    model = linear()
    with pytest.raises(RobustkitError, match="at least one attack"):
        measure(model, linear_data(model), BALL, {})


def test_attacks_are_found_by_name_in_the_order_given():
    assert list(find_attacks("pgd-40, fgsm")) == ["pgd-40", "fgsm"]
    with pytest.raises(RobustkitError, match="'apgd' is unknown; choose from fgsm"):
        find_attacks("fgsm,apgd")
    assert find_attacks("") == {}
