"""Results: intervals against SciPy, totals from the record, and JSON that says what it holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robustkit.errors import RobustkitError
from robustkit.results import CLEAN, Evaluation, Interval, dumps, read_evaluation
from robustkit.threat import KNOWLEDGE, NORMS, Ball, RotationTranslation
from tests.oracle import PROVENANCE, evaluation

RECORD = json.loads(evaluation(notes=("a note",)).to_json())


# --- intervals -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons_as_scipy_has_it(share):
    k, n = share
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    found = Interval(k, n)
    assert found.share == k / n
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= found.low <= found.high <= 1


def test_an_interval_prints_share_bounds_and_sample_size():
    assert str(Interval(9, 10)) == "90.0 % [59.6, 98.2] (n=10)"


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5), (0, -1)])
def test_a_share_of_nothing_is_refused(k, n):
    with pytest.raises(RobustkitError, match=f"got k={k}, n={n}"):
        Interval(k, n)


# --- evaluations -----------------------------------------------------------------------------------


def test_totals_follow_from_the_record_example_by_example():
    one = evaluation((CLEAN, "fgsm", "fgsm", "pgd-40", None, None, None))
    assert (one.clean.k, one.robust.k, one.n) == (6, 3, 7)
    # After none, FGSM, and both: 6, 4, 3 of 7 are still right.
    assert [one.robust_after(count).k for count in (0, 1, 2)] == [6, 4, 3]
    assert {one.robust_after(count).n for count in (0, 1, 2)} == {7}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"broken_by": ()}, "at least one example"),
        ({"broken_by": ("apgd", None)}, "not run: apgd"),
        ({"attacks": ("fgsm", "fgsm")}, "different names"),
        ({"attacks": ("clean",)}, "different names, none of them 'clean'"),
    ],
)
def test_an_evaluation_that_contradicts_itself_is_refused(change, words):
    with pytest.raises(RobustkitError, match=words):
        evaluation(**{"broken_by": (None, None), **change})


def test_one_verdict_for_each_index():
    record = RECORD | {"indices": [0, 1, 2]}
    with pytest.raises(RobustkitError, match="got 4 for 3"):
        Evaluation.from_json(json.dumps(record))


names = st.sampled_from(["fgsm", "pgd-40", CLEAN, None])


sets = st.builds(Ball, st.sampled_from(NORMS), st.floats(0, 100)) | st.builds(
    RotationTranslation, st.floats(0, 180), st.floats(0, 100)
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(names, min_size=1, max_size=20),
    sets,
    st.sampled_from(KNOWLEDGE),
    st.text(max_size=20),
    st.integers(0, 2**40),
    st.sampled_from([None, "fast"]),
)
def test_json_round_trip(broken_by, ball, knowledge, model, seed, protocol):
    one = evaluation(tuple(broken_by), model=model, seed=seed, notes=(model,))
    one = replace(one, threat=replace(one.threat, ball=ball, knowledge=knowledge), protocol=protocol)
    assert Evaluation.from_json(one.to_json()) == one


def test_the_written_totals_are_for_reading_and_never_read_back():
    record = json.loads(evaluation().to_json())
    assert record["summary"]["robust"]["k"] == 2
    record["summary"]["robust"] = {"share": 1.0, "k": 4, "low": 1.0, "high": 1.0}
    assert Evaluation.from_json(json.dumps(record)).robust == Interval(2, 4)


def leaves(record: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every value in a JSON record, containers included."""
    parts = (
        record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    )
    found = [path] if path else []
    for key, part in parts:
        found += leaves(part, (*path, key))
    return found


def changed(path: tuple[str | int, ...], value: object) -> str:
    record = json.loads(json.dumps(RECORD))
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return json.dumps(record)


# Free text, and what stands beside the record for readers: these may hold what they like.
FREE = {"summary", "parameters"}


@pytest.mark.parametrize("value", [None, True, "text", -1.5, [], {}, ["a"], 10**400], ids=repr)
def test_a_value_of_another_type_is_refused_or_is_one_that_the_field_allows(value):
    for path in leaves(RECORD):
        text = changed(path, value)
        try:
            read = Evaluation.from_json(text)
        except RobustkitError as error:
            assert "\n" not in str(error)  # noqa: PT017
            continue
        # What was let through is there, of the right type, and survives another round trip.
        assert Evaluation.from_json(read.to_json()) == read, path
        if not FREE & set(path):
            now, was = json.loads(dumps(read)), RECORD
            for key in path:
                now, was = now[key], was[key]
            assert now == value, path
            kinds = {type(now), type(was)}
            assert len(kinds) == 1 or kinds <= {int, float} or None in (now, was) or now == [], path


def test_a_missing_field_is_named():
    for name in ("threat", "data", "seed", "indices", "broken_by", "hardware", "tier"):
        record = {key: value for key, value in RECORD.items() if key != name}
        with pytest.raises(RobustkitError, match=f"'{name}'"):
            Evaluation.from_json(json.dumps(record))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        (json.dumps(RECORD)[:-20], "was the file cut"),
        ("[1, 2]", "'list', not 'Evaluation'"),
        ('{"type": "Run"}', "'Run', not 'Evaluation'"),
        ("[" * 100_000, "not one that robustkit wrote"),
        ('{"seed": ' + "9" * 5000 + "}", "not one that robustkit wrote"),
        (changed(("attacks", 0, "seconds"), math.nan), "seconds cannot be NaN"),
        (changed(("threat", "ball", "eps"), -0.1), "eps must be"),
    ],
    ids=["empty", "cut", "list", "another type", "deep", "long number", "nan", "negative eps"],
)
def test_json_that_is_no_evaluation_is_refused_in_a_sentence(text, words):
    with pytest.raises(RobustkitError, match=words) as caught:
        Evaluation.from_json(text)
    assert "\n" not in str(caught.value)


def test_reading_a_file_names_it_in_every_complaint(tmp_path):
    path = tmp_path / "eval.json"
    with pytest.raises(RobustkitError, match=r"eval\.json cannot be read .*run `robustkit evaluate` first"):
        read_evaluation(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RobustkitError, match=r"eval\.json is not a text file"):
        read_evaluation(path)
    path.write_text("{")
    with pytest.raises(RobustkitError, match=r"eval\.json: the result is not JSON"):
        read_evaluation(path)
    path.write_text(evaluation().to_json())
    assert read_evaluation(path) == evaluation()


def test_provenance_that_is_not_the_published_pixels_says_so():
    assert "NOT" not in str(PROVENANCE)
    record = RECORD | {"data": RECORD["data"] | {"exact": False}}
    assert "NOT the published pixels" in str(Evaluation.from_json(json.dumps(record)).data)
