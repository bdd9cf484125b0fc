"""Reports: self-contained, escaped, reproducible, and honest about what may stand side by side."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from robustkit.errors import RobustkitError
from robustkit.report import PALETTE, render, summary, write
from robustkit.results import Evaluation, Provenance
from robustkit.threat import Ball, RotationTranslation
from tests.oracle import PROVENANCE, evaluation

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would see: the tree's balance, headings, images and tables as lists of rows."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "caption":
            self.captions.append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not self.open:
            return
        if self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += text
        elif self.open[-1] == "caption":
            self.captions[-1] += text
        elif self.open[-1] == "h2":
            self.headings[-1] += text

    @property
    def alts(self) -> list[str]:
        return [attrs["alt"] for tag, attrs in self.tags if tag == "img"]

    @property
    def drawings(self) -> list[str]:
        sources = [attrs["src"] for tag, attrs in self.tags if tag == "img"]
        head = "data:image/svg+xml;base64,"
        assert all(source.startswith(head) for source in sources)
        return [base64.b64decode(source.removeprefix(head)).decode() for source in sources]

    def table(self, caption: str) -> list[list[str]]:
        (found,) = [
            table for name, table in zip(self.captions, self.tables, strict=True) if name.startswith(caption)
        ]
        return found


def at(eps: float, norm: str = "Linf", survivors: int = 2, **changes) -> Evaluation:
    broken_by = ("clean", *["fgsm"] * (7 - survivors), *[None] * survivors)
    return evaluation(broken_by, ball=Ball(norm, eps), **changes)


# --- without torch ---------------------------------------------------------------------------------


def test_the_report_needs_no_torch():
    ask = "import sys, robustkit.report, robustkit.results, robustkit.cli; print('torch' in sys.modules)"
    proof = (
        "import sys, robustkit.train; print('torch' in sys.modules)"  # so the question can be answered yes
    )
    for command, answer in ((ask, "False"), (proof, "True")):
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == answer


# --- what stands in it -----------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_nothing():
    page = Page(render([at(0.1), at(0.3, survivors=1)]))
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "form")]
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert dict(page.tags[0][1])["lang"] == "en"


def test_every_figure_has_its_numbers_in_alt_text_and_in_a_table():
    evaluations = [at(0.1, survivors=5, model="m"), at(0.3, survivors=2, model="m")]
    page = Page(render(evaluations))
    bars, curve = page.alts
    assert "m, eps 0.1: clean 87.5 %, robust 62.5 %; m, eps 0.3: clean 87.5 %, robust 25.0 %" in bars
    assert "m: 87.5 % at 0, 62.5 % at 0.1, 25.0 % at 0.3" in curve
    rows = page.table("Clean and robust accuracy")
    assert rows[1] == [
        "m, eps 0.1",
        str(evaluations[0].threat),
        str(evaluations[0].clean),
        str(evaluations[0].robust),
        "smoke",
        "0",
    ]
    assert [row[2] for row in page.table("Robust accuracy against Linf eps")[1:]] == [
        str(evaluations[0].clean),
        str(evaluations[0].robust),
        str(evaluations[1].robust),
    ]


def turned(degrees: float, pixels: float, survivors: int = 2, **changes) -> Evaluation:
    one = at(0.3, survivors=survivors, **changes)
    return replace(one, threat=replace(one.threat, ball=RotationTranslation(degrees, pixels)))


def test_rotations_are_drawn_over_their_angle_and_never_with_another_shift():
    page = Page(
        render(
            [
                at(0.1, model="m"),
                turned(0, 3, survivors=4, model="m"),
                turned(30, 3, survivors=2, model="m"),
                turned(30, 1, survivors=5, model="m"),
            ]
        )
    )
    assert len(page.alts) == 3  # bars of each norm, one curve
    assert "m, 30 degrees, 1 pixels: clean 87.5 %, robust 62.5 %" in page.alts[1] + page.alts[2]
    (curve,) = [alt for alt in page.alts if alt.startswith("Robust accuracy against rotation-translation")]
    # Without any turn there is still a shift: 0 degrees is no clean image.
    assert "m: 50.0 % at 0, 25.0 % at 30" in curve
    (_, threat, *_) = Page(render([turned(30, 1)])).table("Clean and robust accuracy")[1]
    assert threat.startswith("rotation-translation up to 30 degrees and 1 pixels")


def test_knowledge_and_protocol_are_told_where_they_matter():
    one = at(0.3, model="m")
    weaker = replace(one, threat=replace(one.threat, knowledge="score-based"), protocol="fast")
    page = Page(render([one, weaker]))
    labels = [row[0] for row in page.table("Clean and robust accuracy")[1:]]
    assert labels == ["m, eps 0.3", "m, eps 0.3, score-based"]
    assert [row[1] for row in page.table("Where the figures are from")[1:]] == ["none", "fast"]


def test_the_threat_model_stands_beside_every_figure():
    evaluations = [at(0.1), at(0.3), at(1.0, "L2")]
    page = render(evaluations)
    for one in evaluations:
        assert str(one.threat) in page


def test_attacks_are_listed_with_what_each_broke_and_left():
    one = evaluation(("clean", "fgsm", "fgsm", "pgd-40", None, None, None, None))
    rows = Page(render([one])).table("Attack by attack")[1:]
    assert [(row[1], row[3]) for row in rows] == [("none (clean)", "1"), ("fgsm", "2"), ("pgd-40", "1")]
    assert [row[4] for row in rows] == [str(one.clean), str(one.robust_after(1)), str(one.robust)]


def test_two_norms_are_never_in_one_figure_nor_one_table():
    page = Page(render([at(0.1), at(0.3), at(1.0, "L2"), at(2.0, "L2")]))
    assert page.headings == ["L2 on synthetic, test split", "Linf on synthetic, test split"]
    assert len(page.alts) == 4
    for text in (*page.alts, *(str(table) for table in page.tables)):
        assert not ("L2" in text and "Linf" in text)


@pytest.mark.parametrize(
    "other",
    [
        replace(PROVENANCE, dataset="MNIST"),
        replace(PROVENANCE, split="train"),
        replace(PROVENANCE, sha256="1" * 64),
    ],
)
def test_two_data_sets_are_never_in_one_figure(other):
    page = Page(render([at(0.1), at(0.3, data=other)]))
    assert len(page.headings) == 2
    assert len(page.alts) == 2  # and no curve through both


def test_the_same_data_from_two_sources_are_one_group():
    assert len(Page(render([at(0.1), at(0.3, data=replace(PROVENANCE, source="cache"))])).headings) == 1


@pytest.mark.parametrize(
    "change",
    [{"attacks": ("fgsm",)}, {"model": "another"}],
    ids=["other attacks", "other model"],
)
def test_what_is_not_comparable_is_not_joined_by_a_line(change):
    assert len(Page(render([at(0.1), at(0.3, **change)])).alts) == 1
    assert len(Page(render([at(0.1), at(0.3)])).alts) == 2


def test_curves_of_several_models_differ_without_colour():
    page = Page(render([at(eps, model=f"model {i}") for i in range(5) for eps in (0.1, 0.3)]))
    drawing = page.drawings[1]
    for colour in PALETTE[:5]:
        assert colour.lower() in drawing.lower()
    assert "stroke-dasharray" in drawing
    # The bars carry a hatch.
    assert "pattern" in page.drawings[0]


def test_embedded_digits_are_never_taken_for_the_published_data():
    digits = Provenance(
        "scikit-learn digits (embedded)", "test", "embedded", "2" * 64, False, "upscaled: NOT MNIST"
    )
    page = render([at(0.1, data=digits)])
    assert "Not the published pixels." in page
    assert "upscaled: NOT MNIST." in page
    assert "Not the published pixels." not in render([at(0.1)])


# --- hostile and odd input -------------------------------------------------------------------------

HOSTILE = '<script>alert("1")</script>\'&$\\frac{'


def test_text_from_a_file_is_text():
    odd = Provenance(HOSTILE, HOSTILE, HOSTILE, HOSTILE, False, HOSTILE)
    one = evaluation((None, HOSTILE), model=HOSTILE, data=odd, attacks=(HOSTILE,), notes=(HOSTILE,))
    one = replace(one, tier=HOSTILE, created=HOSTILE)
    page = Page(
        render([one, replace(one, threat=replace(one.threat, ball=Ball("Linf", 0.2)))], title=HOSTILE)
    )
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert HOSTILE in page.headings[0]
    assert HOSTILE in page.alts[0]
    for drawing in page.drawings:
        ET.fromstring(drawing)
        assert "<script" not in drawing


@pytest.mark.parametrize("name", ["_hidden", "模型", "a" * 500, "", "two\nlines", "$\\frac{$", "\x00"])
def test_any_model_name_can_be_drawn(name):
    page = Page(render([at(0.1, model=name), at(0.3, model=name)]))
    assert len(page.drawings) == 2


@pytest.mark.parametrize("broken_by", [("clean",), (None,), ("fgsm",), ("clean",) * 50, (None,) * 50])
def test_nothing_and_everything_can_be_drawn(broken_by):
    page = Page(render([evaluation(broken_by, ball=Ball("Linf", eps)) for eps in (0.0, 0.3)]))
    assert len(page.drawings) == 2


def test_many_evaluations_of_one_name_are_told_apart():
    page = Page(render([at(0.3, seed=seed) for seed in range(3)]))
    names = [row[0] for row in page.table("Clean and robust accuracy")[1:]]
    assert len(set(names)) == 3


def test_no_evaluation_no_report():
    with pytest.raises(RobustkitError, match="at least one evaluation"):
        render([])


def test_the_same_evaluations_give_the_same_bytes_in_any_order():
    evaluations = [at(0.1), at(0.3), at(1.0, "L2")]
    assert render(evaluations) == render(list(reversed(evaluations)))


def test_written_whole_into_a_folder_that_is_not_there_yet(tmp_path):
    path = tmp_path / "deep" / "report.html"
    page = render([at(0.1)])
    write(page, path)
    assert path.read_text() == page
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_the_summary_holds_totals_and_no_images():
    (record,) = summary([at(0.1)])
    assert record["summary"]["robust"]["k"] == 2
    assert "broken_by" not in record
    assert record["threat"]["ball"] == {"norm": "Linf", "eps": 0.1}


def test_no_path_of_a_machine_reaches_the_page():
    assert not re.search(r"/(home|root|tmp)/", render([at(0.1)]))
