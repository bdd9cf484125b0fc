"""The class report: its figures against closed forms, and the page against what a reader needs."""

import itertools
import shutil
import statistics
from dataclasses import replace

import pytest
import torch
from bs4 import BeautifulSoup

from grading import class_report, judge, records
from grading.records import Note
from grading.score import read_scorecard, score, write_scorecard
from grading.workspace import ROOT, case_seed
from robustkit.contracts import CONTRACTS
from robustkit.lessons import LESSONS, save_arrays
from robustkit.models import pretrained
from robustkit.results import Interval

LESSON = LESSONS["01-mnist-fgsm"]
MODEL = "s1_robust_model_check"


def card(student, earned, omitted=(), robust=None, code=""):
    """A scorecard: `earned` exercises in full, `omitted` ones untouched, the others failed."""
    marks = []
    for exercise in LESSON.exercises:
        for criterion, maximum in exercise.points.items():
            full = exercise.id in earned
            outcome = "passed" if full else "not_implemented" if exercise.id in omitted else "failed"
            notes = () if full else (Note("NOT_IMPLEMENTED" if exercise.id in omitted else "NOT_IT", "look"),)
            measured = None
            if exercise.id == MODEL and robust and criterion in ("clean", "pgd_full"):
                measured = (95, 100) if criterion == "clean" else robust
                notes = (Note(code, "look"),) if code and criterion == "pgd_full" else notes
            points = float(maximum) if full else 0.0
            marks.append(
                records.Mark(exercise.id, criterion, points, float(maximum), outcome, notes, "", measured)
            )
    found = records.Records(student, LESSON.id, "smoke", "", "0", "", (), tuple(marks))
    return score(found, {})


IDS = [exercise.id for exercise in LESSON.exercises]


@pytest.fixture(scope="module")
def cards():
    """Twelve learners: the k-th earned the first k exercises, but for the last one, which the weak ones earned."""
    found = [
        card(
            f"student-{k:02}",
            {*IDS[: min(k, 10)], *([IDS[10]] if k < 4 else [])},
            omitted=IDS[5:9] if k < 5 else (),
            robust=(60 + k, 100) if k > 8 else (90, 100) if k == 3 else None,
            code="AUDIT_FLAGGED" if k == 3 else "NOT_ROBUST" if k == 9 else "",
        )
        for k in range(12)
    ]
    refused = score(judge.refused("zoe", LESSON, "smoke", "no <b>notebook</b>"), {})
    return [*found, refused]


def test_item_analysis_is_what_its_definitions_say(cards):
    (lesson,) = class_report.summarise(cards)
    items = dict(zip(IDS, lesson.items, strict=True))
    fifth = items[IDS[5]]
    assert (fifth.n, fifth.omitted) == (12, 5)
    assert fifth.difficulty == pytest.approx(6 / 12)  # earned by k = 6 to 11
    assert fifth.code == "NOT_IMPLEMENTED (5)"
    totals = [c.autograded - c.exercises[5].points for c in cards[:12]]
    right = [float(k > 5) for k in range(12)]  # a correlation does not care for the scale of the points
    mean = statistics.mean(totals)
    covariance = sum((r - 0.5) * (t - mean) for r, t in zip(right, totals, strict=True))
    norm = (sum((r - 0.5) ** 2 for r in right) * sum((t - mean) ** 2 for t in totals)) ** 0.5
    assert fifth.discrimination == pytest.approx(covariance / norm)
    assert fifth.remark == ""

    last = items[IDS[10]]
    assert last.discrimination < 0
    assert "did not do well here" in last.remark


def test_what_everybody_did_the_same_has_no_discrimination():
    (lesson,) = class_report.summarise([card("a", IDS), card("b", IDS)])
    assert [item.discrimination for item in lesson.items] == [None] * len(IDS)
    assert {item.difficulty for item in lesson.items} == {1.0}


def test_models_are_ranked_by_what_survives_and_doubted_ones_are_not(cards):
    found = class_report.standings(cards)
    assert [(one.student, one.doubt) for one in found] == [
        ("student-11", ""),
        ("student-10", ""),
        ("student-09", ""),  # weak, and honest
        ("student-03", "AUDIT_FLAGGED"),  # the largest figure, and not believed
    ]
    assert found[0].robust == Interval(71, 100)
    assert found[0].clean == Interval(95, 100)


def test_measured_shares_survive_json(cards, tmp_path):
    write_scorecard(tmp_path / "card.json", cards[11])
    assert read_scorecard(tmp_path / "card.json") == cards[11]
    old = (tmp_path / "card.json").read_text().replace('"measured"', '"elsewhere"')
    assert '"elsewhere"' in old  # and records from before there was such a field are read
    for mark in (mark for exercise in cards[0].exercises for mark in exercise.marks):
        fields = {name: getattr(mark, name) for name in mark.__dataclass_fields__ if name != "measured"}
        assert records.read_mark({**fields, "notes": []}) == replace(mark, notes=(), measured=None)


@pytest.mark.parametrize(("name", "listed"), [("mnist-pgd", False), ("mnist-clean", True)])
def test_judge_records_what_it_measured(name, listed, tmp_path, monkeypatch):
    """Weights that the judge attacked have a figure of the judge's; shipped ones are refused without one."""
    monkeypatch.setenv("ROBUSTKIT_TIER", "smoke")
    monkeypatch.setenv("ROBUSTKIT_OFFLINE", "1")
    monkeypatch.setenv("ROBUSTKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("ROBUSTKIT_DATA", raising=False)
    exercise = LESSON.exercise(MODEL)
    model = pretrained(name)
    if listed:  # no longer the shipped one
        with torch.no_grad():
            model[-1].weight.mul_(0.0)
    contract = CONTRACTS[exercise.contract]
    secret = b"a secret of the tests' own, of 32"
    case = contract.draw(case_seed(secret, "ada", LESSON.id, MODEL))
    save_arrays(tmp_path / f"{MODEL}.npz", contract.observe(model, case))
    digest = records.sha256((tmp_path / f"{MODEL}.npz").read_bytes())
    entry = records.Collected(MODEL, records.COLLECTED, digest, "")
    run = records.Run("ada", LESSON.id, "smoke", "", "0", (), 0, 1.0, (entry,))
    records.write(tmp_path / "run.json", run)
    found = {mark.criterion: mark for mark in judge.judge(tmp_path, secret).marks if mark.exercise == MODEL}
    assert (found["pgd_full"].measured is not None) == listed
    if listed:  # one class for all images: what is right stays right, whatever is done to the image
        k, n = found["clean"].measured
        assert n == 200
        assert 0 < k < 100
        assert found["pgd_full"].measured == (k, n)
    assert found["pgd_half"].measured is None


def test_page_is_static_whole_and_readable_without_eyes_or_network(cards):
    html = class_report.render(cards)
    page = BeautifulSoup(html, "html.parser")
    levels = [int(heading.name[1]) for heading in page.find_all(["h1", "h2", "h3", "h4"])]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(table.caption and table.caption.get_text(strip=True) for table in page.find_all("table"))
    assert all(len(cell["scope"]) for cell in page.find_all("th"))
    assert all(len(image["alt"]) > 30 for image in page.find_all("img"))
    assert len(page.find_all("img")) == 4
    assert page.html["lang"] == "en"
    assert not page.find_all(["script", "link", "iframe"])
    assert not [tag for tag in page.find_all(src=True) if not tag["src"].startswith("data:image/png")]
    text = page.get_text(" ", strip=True)
    assert "71.0 % [61.5, 79.0] (n=100)" in text
    assert "not ranked: AUDIT_FLAGGED" in text
    assert "1 refused: nothing could be run: zoe" in text
    assert "standard deviation" in text
    assert class_report.render(cards) == html


def test_class_without_models_or_answers_still_has_its_page():
    for few in ([card("only", ())], [score(judge.refused("zoe", LESSON, "smoke", "no"), {})]):
        html = class_report.render(few)
        assert "Submitted models" not in html
        assert "Distribution" in html


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium on the PATH")
@pytest.mark.parametrize("width", [1280, 420])
def test_page_in_a_browser(cards, tmp_path, width):
    """Rendered offline: nothing is fetched, nothing overflows, contrast is enough."""
    from playwright.sync_api import sync_playwright

    class_report.write_page(cards, tmp_path / "class.html")
    shots = ROOT / "screenshots"
    shots.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": width, "height": 900})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "class.html").as_uri())
        page.screenshot(path=shots / f"class-{width}.png", full_page=True)
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert min(page.evaluate(CONTRAST)) >= 4.5
        browser.close()


# The contrast of every text with the nearest background, by the formula of WCAG 2.
CONTRAST = """() => {
    const light = c => {
        const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = e => {
        for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$/.test(c)) return c;
        }
        return "rgb(255, 255, 255)";
    };
    return [...document.querySelectorAll("body *")].filter(e => e.innerText && e.innerText.trim()).map(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    });
}"""
