"""Scorecard -> the learner's page: static, accessible, and without anything from the hidden cases."""

from __future__ import annotations

from pathlib import Path

import jinja2

from grading.records import PASSED
from grading.score import ExerciseScore, Scorecard
from robustkit.contracts import CONTRACTS
from robustkit.contracts.base import NOT_COUNTED
from robustkit.files import write_atomically
from robustkit.lessons import LESSONS

# What each criterion of each contract asks for, in the learner's words.
ASKED: dict[str, dict[str, str]] = {
    "distance": {
        "Linf": "the largest change of any one pixel, image by image",
        "L2": "the Euclidean length of the change, image by image",
    },
    "projection": {
        "ball": "a far point goes to the nearest point within eps of the original",
        "box": "the result is still an image, with pixels in [0, 1]",
        "inside": "a point that is already allowed stays where it is, and the argument is not changed",
    },
    "robust_accuracy": {
        "worst_case": "an image counts only when it survives every attack",
        "clean_errors": "an image that is misclassified untouched never counts as robust",
    },
    "prediction": {"plausible": "three accuracies that a stronger attacker cannot raise"},
    "interval": {
        "value": "the 95 % Wilson interval of a share",
        "edges": "the interval at 0 of n and at n of n",
    },
    "fgsm": {
        "ball": "no pixel moves by more than eps",
        "box": "candidates stay in [0, 1]",
        "closed_form": "on a linear model, every pixel takes the steepest step",
        "hygiene": "model, images, gradients, modes and randomness are as they were before the call",
    },
    "fgsm_report": {
        "counts": "the counts agree with what the judge measures on your weights",
        "clean": "the clean model reaches the pass mark on untouched images",
    },
    "adversarial_loss": {
        "loss": "the mean cross-entropy at the FGSM candidates",
        "gradient": "backward() leaves the gradient of that loss on the weights, and nothing else",
        "modes": "candidates are made in eval mode, the loss is computed in train mode",
    },
    "pgd": {
        "ball": "no pixel ends more than eps from its original",
        "box": "candidates stay in [0, 1]",
        "closed_form": "with enough steps, the optimum on a linear model",
        "start": "a random start, uniform over the ball",
        "steps": "as many steps as asked for, of the size asked for",
        "hygiene": "nothing is left behind, and the same generator seed gives the same result",
    },
    "alarms": {
        "leaking": "label leaking is noticed",
        "masked": "masked gradients are noticed",
        "quiet": "no alarm for an honest defence or for an undefended model",
    },
    "rs_fgsm": {
        "ball": "no pixel ends more than eps from its original",
        "box": "candidates stay in [0, 1]",
        "start": "a random start, uniform over the ball",
        "step": "one step of 1.25 eps along the gradient's sign",
        "hygiene": "nothing is left behind, and the same generator seed gives the same result",
    },
    "robust_model": {
        "clean": "clean accuracy, at the lower bound of its interval, reaches the pass mark",
        "pgd_half": "accuracy under PGD at eps 0.3 reaches the first mark",
        "pgd_full": "accuracy under PGD at eps 0.3 reaches the full mark",
    },
    "curve": {
        "counts": "one count of surviving images for each eps",
        "clean": "misclassified images are not counted as robust, at eps 0 either",
    },
    "covers": {
        "same_norm": "a larger ball of the same norm covers a smaller one, and never the other way round",
        "across_norms": "the farthest point of one ball lies in the other, in the dimension given",
    },
    "sandwich": {
        "empirical": "images that are right untouched, and right untouched and under attack",
        "certified": "images that are proved for the right class, as far as eps",
        "contradictions": "every image whose certificate is refuted inside its radius, and no other",
    },
    "paired": {
        "difference": "the share on which one defence alone is right, less that of the other",
        "interval": "an interval that comes from the discordant images alone",
        "p_value": "the exact two-sided probability for the discordant images",
    },
    "cost": {
        "amortised": "training shared over all decisions, and the price of each",
        "crossing": "the number of decisions at which two defences cost the same",
        "edges": "always cheaper, never cheaper, and the same all along",
    },
    "route": {
        "certified": "what is certified as far as asked gets its certified class",
        "unproved": "what is not proved counts where the models agree, and goes to a person where they do not",
        "guarantee": "the share that no attacker can move out of the certified lane",
    },
    "admissible": {
        "floors": "floors are met by the lower bound of the interval, in a ball that covers the one needed",
        "guarantee": "only certified claims count where a guarantee is required",
        "latency": "what takes too long for an answer is out",
    },
    "achieved": {
        "attacked": "only images that are answered rightly untouched are attacked",
        "verified": "a success is answered wrongly when it is sent once more; a rejection is none",
        "threat_model": "a success keeps to the threat model's eps",
        "budget": "a success keeps to the budget of queries",
        "median": "the median of the queries of the successes, None where there are none",
    },
    "query_detector": {
        "near": "small changes of one picture are flagged, and the other pictures in between are not",
        "quiet": "pictures that resemble no other are not flagged, however many come",
        "accounts": "an account is compared with itself alone",
        "repeats": "exact repeats are no attack",
        "bounded": "an account's memory keeps to its capacity, and the newest stay in it",
    },
    "benign": {
        "counts": "flagged and seen, without the repeats that no detector sees",
        "upper": "the exact, one-sided 95 % bound on the rate",
        "edges": "nothing flagged, everything flagged, nothing seen",
        "claim": "the claim holds where the bound keeps to the rate",
    },
    "evasion": {
        "close": "the size found is next to the detector's limit",
        "passed": "the size found was seen to pass",
        "budget": "no more queries than allowed",
        "hopeless": "None where every size is rejected",
    },
    "pod": {
        "identity": "no root, no new privileges, no capabilities",
        "isolation": "system calls filtered, no name space of the host, no token",
        "filesystem": "a root and a model that cannot be written",
        "limits": "limits for cpu, memory and ephemeral storage",
        "supply": "the image by its digest",
        "works": "the pod still runs, listens and mounts what it did, and the argument is left alone",
    },
    "canary": {
        "rollback": "harm beyond doubt is rolled back, in whichever metric, and nothing healthy is",
        "wait": "doubt is no reason to act, and neither is nothing measured",
        "promote": "a canary that keeps every bound beyond doubt is promoted",
    },
    "grader_prediction": {"complete": "a yes or no for each of the things a check cell may leave behind"},
    "grader_forgery": {
        "verdict": "evidence that says it succeeded, and is believed",
        "nan": "candidates that no comparison finds too far",
        "few": "evidence that leaves out what went wrong",
        "crash": "evidence at which the grader stumbles, and pays",
    },
    "grader_number": {
        "honest": "a number from 0 to the maximum is worth itself",
        "range": "what is below, above or not finite is worth nothing",
        "types": "what only looks like a number is worth nothing",
    },
    "grader_seeds": {
        "repeatable": "the same student gets the same case again",
        "keyed": "the seed depends on the secret, and there are too many to try",
        "separate": "no two pairs of student and exercise share a seed",
    },
    "grader": {
        "honest": "an honest attack gets the points it has earned",
        "recomputed": "points go by what the model does, not by what the submission says",
        "finite": "candidates that are not finite are worth nothing",
        "whole": "evidence of another shape than the images is worth nothing",
        "closed": "evidence that cannot be read is worth nothing, and stops nobody",
    },
    "statement": {
        "complete": "every field of the threat model is filled in",
        "consistent": "the fields agree with the lesson's attack and with each other",
    },
    "ball_projection": {
        "linf": "in L-inf, a far point goes to the nearest point of the ball",
        "l2": "in L2, a far point goes to the nearest point of the ball, each image by its own length",
        "box": "the result is still an image, with pixels in [0, 1]",
        "inside": "a point that is already allowed stays where it is, the image itself too; arguments are not changed",
    },
    "random_start": {
        "linf": "starts fill the L-inf ball evenly",
        "l2": "starts fill the volume of the L2 ball evenly",
        "box": "starts are images, with pixels in [0, 1]",
        "hygiene": "nothing is left behind, and the same generator seed gives the same starts",
    },
    "margin": {
        "value": "the best wrong logit minus the true one, example by example",
        "gradient": "its gradient, which does not vanish when the model is sure",
    },
    "pgd_lp": {
        "ball": "no candidate leaves the ball, in either norm",
        "box": "candidates stay in [0, 1]",
        "closed_form": "in L-inf, with enough steps, the optimum on a linear model",
        "l2": "in L2, with enough steps, the optimum on a linear model",
        "start": "a random start, in both norms",
        "steps": "as many steps as asked for, of the size asked for",
        "restarts": "of several runs each image keeps its worst",
        "loss": "the loss that is given is the one that rises",
        "hygiene": "nothing is left behind, and the same generator seed gives the same result",
    },
    "worst_case": {
        "worst_case": "an image counts only when it survives every attack",
        "clean_errors": "an image that is misclassified untouched never counts as robust",
        "valid": "candidates outside ball or box count for nothing, those on its surface do",
    },
    "diagnosis": {
        "honest": "no alarm for a model without a mask",
        "saturated": "a cross-entropy without gradient is told from a model without one",
        "shattered": "a model through which no gradient comes back is noticed",
        "random": "a model that answers differently each time is noticed",
    },
    "eot": {
        "mean": "the mean of the logits",
        "fresh": "over as many fresh draws as asked for",
        "gradient": "and its gradient, which is the mean of theirs",
    },
    "bpda": {
        "value": "going forward, the model behind its part, as deployed",
        "gradient": "going back, the model's gradient, as if the part were not there",
    },
    "suspects": {
        "A": "candidates in the ball that break suspect A",
        "B": "candidates in the ball that break most answers of suspect B",
        "C": "candidates in the ball that break suspect C",
    },
    "standing": {
        "comparable": "only entries trained on the same kind of data are counted",
        "rank": "the rank of the share",
        "interval": "the best and the worst rank that its interval allows",
    },
    "training_step": {
        "attack": "candidates come from the attack, with every layer in eval mode",
        "modes": "the loss is taken in the modes that were found, and they stay",
        "update": "one step of the optimizer, along the gradient at the candidates and nothing else",
        "loss": "the mean loss at the candidates, as a number",
    },
    "trades": {
        "natural": "the mean cross-entropy on the images as they are",
        "divergence": "beta times the mean divergence of the prediction on candidates from that on images",
        "gradient": "the gradient flows through both predictions",
    },
    "recipe_faults": {
        "train_mode": "an attack that looks at the model in train mode",
        "units": "an attack that leaves the stated ball",
        "outside": "candidates that are no images in [0, 1]",
        "start": "an attack that always starts at the same point",
        "leak": "an augmentation that tells the label",
        "splits": "images that train, select or report, and do another of these as well",
        "statistics": "an average of weights with batch statistics that are not its own",
        "quiet": "no recipe without a fault is accused",
    },
    "selection": {
        "epoch": "the epoch that is the most robust on held-out images, of equals the later",
        "reported": "the test result of that epoch, and of no other",
        "overfitted": "overfitting is told from chance by intervals",
    },
    "verdict": {
        "yes": "what a figure proves of a claim, or of more than it",
        "no": "what a figure refutes",
        "open": "what a figure leaves open",
        "other": "figures of another norm, or from more data, are not compared",
    },
    "cifar_weights": {
        "clean": "clean accuracy, at the lower bound of its interval, reaches the pass mark",
        "robust_half": "accuracy under the judge's attacks in the L2 ball of 0.5 reaches the first mark",
        "robust_full": "accuracy under the judge's attacks in the L2 ball of 0.5 reaches the full mark",
    },
    "votes": {
        "total": "as many votes as asked for, one count for each class",
        "noise": "each vote on its own Gaussian noise of the scale asked for, which nothing clamps",
        "hygiene": "nothing is left behind, and the same generator seed gives the same votes",
    },
    "lower_bound": {
        "value": "the exact one-sided lower bound of a share",
        "edges": "the bound at 0 of n and at n of n",
    },
    "certified_radius": {
        "value": "the radius that a share above one half certifies",
        "abstain": "a share that is not above one half certifies nothing",
    },
    "certify": {
        "selection": "the first sample alone chooses the class",
        "estimation": "the second sample alone bounds its share, at the level asked for",
        "abstain": "votes that show no majority get no certificate",
    },
    "certified_accuracy": {
        "correct": "only certificates for the right class count",
        "abstentions": "an image without a certificate still counts among all images",
        "ties": "a certificate of just the radius asked for counts",
    },
    "interval_linear": {
        "sound": "no point of the box leaves the bounds",
        "tight": "the bounds are attained",
    },
    "ibp": {
        "sound": "no image in the ball leaves the bounds, and the network is as it was",
        "tight": "the bounds are those of interval arithmetic, on images alone",
    },
    "certification_log": {
        "bound": "radii that no votes at all could certify",
        "votes": "radii that no whole number of votes gives",
        "abstained": "abstentions that claim something",
        "verdict": "verdicts that contradict label and prediction",
        "repeated": "images that are counted twice",
        "quiet": "no honest row is accused",
    },
    "residual": {
        "nearest": "the benign picture nearest to each query",
        "changed": "the share of pixels that differ in any channel",
        "sizes": "L2 and L-inf of the residual, in units of [0, 1]",
    },
    "register": {
        "turned": "the lattice's transform that turns the reference into the query",
        "untouched": "a query that is its reference was not moved",
    },
    "family": {
        "lp": "noise of bounded size, wherever it lies",
        "patch": "one square, however different",
        "spatial": "what turning and shifting explains, after one query or hundreds",
        "sequence": "many different queries about one picture",
        "restraint": "no family for what nothing explains, nor for a picture sent again",
    },
    "cause": {
        "novel": "an attack outside the trained threat model, where the interval says so",
        "overfitted": "an attack inside the trained threat model that works all the same",
        "undecided": "no cause where the evidence does not carry one",
    },
    "mixed": {
        "shares": "every image meets one attack or none, in equal shares",
        "loss": "the mean cross-entropy over the whole batch, and its gradient",
    },
    "incident_gate": {
        "clean": "the floor is met by the lower end of the interval",
        "worst": "images that survive every trained family",
        "held_out": "a family that was not trained, and what is not measured has not passed",
        "adaptive": "images that survive the trained families and the attacker who adapts",
    },
    "response": {
        "isolate": "contained when answers went wrong: soon after, and not before",
        "evidence": "a snapshot with the attack in it, at the containment",
        "proportion": "the attackers throttled, and nobody else",
        "cause": "family and cause as the quarantine shows them, once it does",
        "bridge": "an ensemble soon after the containment, until a canary takes over",
        "mix": "what went into service withstands the old family, the new one, and is more diverse",
        "gate": "nobody met a candidate that had not passed every bar",
        "order": "diagnosis before training, canary before promotion, review at the end",
    },
}

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("grading", "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(name: str) -> jinja2.Template:
    """One of the templates; what is put into it is escaped."""
    return _templates.get_template(name)


def render(card: Scorecard) -> str:
    """The page of one scorecard. Same scorecard, same page."""
    exercises = {exercise.id: exercise for exercise in LESSONS[card.lesson].exercises}
    asked = {exercise.id: _asked(exercises[exercise.id].contract) for exercise in card.exercises}
    return page("feedback.html.j2").render(card=card, asked=asked, advice=advice(card), number=number)


def _asked(contract: str) -> dict[str, str]:
    """What each criterion asks for, and beside which others it counts."""
    essential = CONTRACTS[contract].essential
    beside = f"; counts only beside {' or '.join(essential)}" if essential else ""
    return {
        criterion: f"{criterion}: {text}{'' if criterion in essential else beside}"
        for criterion, text in ASKED[contract].items()
    }


def write_page(card: Scorecard, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(card).encode())


def advice(card: Scorecard) -> tuple[tuple[ExerciseScore, str, str], ...]:
    """What to look at next: at most three exercises, the most points lost first, each with the first code of its own.

    That another criterion must be met first is no such code.
    """
    lost = [exercise for exercise in card.exercises if exercise.points < exercise.maximum]
    lost.sort(key=lambda exercise: exercise.points - exercise.maximum)
    chosen = []
    for exercise in lost[:3]:
        notes = [note for mark in exercise.marks if mark.outcome != PASSED for note in mark.notes]
        notes.sort(key=lambda note: note.code == NOT_COUNTED)
        if notes:
            chosen.append((exercise, notes[0].code, notes[0].hint))
    return tuple(chosen)


def number(value: float) -> str:
    """Points without a needless decimal: 3, 2.5."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
