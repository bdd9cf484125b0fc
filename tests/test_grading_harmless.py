"""What learners wrote and printed cannot act where it is shown: rules here, a real browser in test_browser."""

import base64
import struct
import zlib

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from grading import gradebook, harmless
from tests.fixtures import small_course as small
from tests.fixtures.hostile import HOSTILE_MARKDOWN

ACTIVE = {
    "script",
    "iframe",
    "object",
    "embed",
    "svg",
    "math",
    "img",
    "form",
    "input",
    "style",
    "link",
    "base",
}


def shown(source):
    """The HTML of one markdown cell, as formgrader's exporter makes it, and its elements."""
    html = harmless.markdown(None, source)
    return html, BeautifulSoup(html, "html.parser").find_all(True)


@pytest.mark.parametrize("source", HOSTILE_MARKDOWN.values(), ids=HOSTILE_MARKDOWN.keys())
def test_markdown_keeps_nothing_that_acts(source):
    _, elements = shown(source)
    tags = {element.name for element in elements}
    assert not tags & ACTIVE
    assert tags <= harmless.TAGS
    for element in elements:
        for name, value in element.attrs.items():
            assert name in ("href", "title", "start")
            if name == "href":
                assert value.startswith(("http:", "https:", "mailto:"))


def test_markdown_of_an_honest_answer_reads_as_it_was_meant():
    source = (
        "# Judgement\n\nIt is **not** enough: `eps < 0.3` & $a<b$.\n\n1. no norm\n2. no *interval*\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nx = '<script>'\n```\n\n[paper](https://arxiv.org/abs/1706.06083)"
    )
    html, elements = shown(source)
    tags = [element.name for element in elements]
    assert {"h1", "strong", "code", "ol", "li", "em", "table", "td", "pre", "a"} <= set(tags)
    assert "eps &lt; 0.3" in html
    assert "&lt;script&gt;" in html
    assert "$a&lt;b$" in html  # left for MathJax
    assert 'href="https://arxiv.org/abs/1706.06083"' in html


def test_what_is_taken_out_of_markdown_is_shown_as_text():
    assert "&lt;script&gt;canary()&lt;/script&gt;" in harmless.markdown(None, "<script>canary()</script>")


def test_endless_markdown_is_cut_and_says_so():
    html, _ = shown("word " * 40_000)
    assert len(html) < 2 * harmless.MOST_MARKDOWN
    assert "100000 more characters are not shown" in html


def test_text_loses_what_a_terminal_would_obey():
    link = "\x1b]8;;javascript:canary()\x07link\x1b]8;;\x1b\\"
    tricky = f"a\x1b[31mred\x1b[0m {link} \x1b[2J\rb\x08\x00 \u202etxt.exe\n\tok"
    assert harmless.plain(tricky) == "ared link b txt.exe\n\tok"


# --- outputs ---------------------------------------------------------------------------------------------


def png(width=2, height=2):
    """A PNG of this size, in base64."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\x00\x00" * 4)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def cleaned(*outputs, count=1, budget=harmless.MOST_OUTPUT):
    notebook = new_notebook(cells=[new_code_cell("x"), new_markdown_cell("x")])
    notebook.cells[0].outputs = [nbformat.from_dict(output) for output in outputs]
    notebook.cells[0].execution_count = count
    harmless.clean_outputs(notebook, budget)
    nbformat.validate(notebook)
    return notebook.cells[0]


@pytest.mark.parametrize(
    "mime",
    [
        *("text/html", "image/svg+xml", "application/javascript", "text/latex", "text/markdown"),
        *("application/vnd.jupyter.widget-view+json", "application/pdf", "image/gif", "<script>"),
    ],
)
def test_other_types_of_output_are_named_and_not_shown(mime):
    cell = cleaned(new_output("display_data", data={mime: "<script>canary()</script>"}))
    (output,) = cell.outputs
    assert output.output_type == "stream"
    assert output.text == f"[an output of type {mime} is not shown]\n"


def test_plain_text_stands_in_for_what_is_not_shown():
    both = {"text/html": "<b onclick=canary()>", "text/plain": "a table\x1b[31m"}
    (output,) = cleaned(new_output("execute_result", data=both, execution_count=1)).outputs
    assert output.data == {"text/plain": "a table"}


def test_a_picture_stays_a_picture():
    fine = png()
    (output,) = cleaned(
        new_output("display_data", data={"image/png": fine + "\n", "text/plain": "x"})
    ).outputs
    assert output.data == {"image/png": fine}


@pytest.mark.parametrize(
    "value",
    [
        'x" onerror="canary()',
        base64.b64encode(b"<svg onload=canary()>").decode(),
        png(60_000, 60_000),
        png(0, 1),
        base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(),
        ["not", "text"],
    ],
)
def test_what_is_no_picture_is_not_shown_as_one(value):
    (output,) = cleaned({"output_type": "display_data", "data": {"image/png": value}, "metadata": {}}).outputs
    assert output.output_type == "stream"


def test_counts_names_and_metadata_of_outputs_are_not_the_learners():
    cell = cleaned(
        {"output_type": "stream", "name": "<script>", "text": "x"},
        new_output("error", ename="<b>", evalue="\x1b[31mx", traceback=["\x1b]8;;javascript:x\x07y"]),
        new_output("display_data", data={"text/plain": "z"}, metadata={"image/png": {"width": "1 onload=x"}}),
        {"output_type": "script", "data": {}},
        count="<script>canary()</script>",
    )
    assert cell.execution_count is None
    assert cell.outputs[0].name == "stdout"
    assert (cell.outputs[1].evalue, cell.outputs[1].traceback) == ("x", ["y"])
    assert cell.outputs[2].metadata == {}
    assert cell.outputs[3].text == "[an output of type script is not shown]\n"


def test_outputs_share_one_budget():
    loud = [new_output("stream", text="x" * 600) for _ in range(50)]
    cell = cleaned(*loud, budget=10_000)
    assert len(str(cell.outputs)) < 11_000
    assert "printed too much" in cell.outputs[-1].text


def test_formgraders_exporter_uses_the_rules(tmp_path):
    """The same class and configuration as in formgrader, but for its template."""
    exporter = HTMLExporter(config=gradebook.settings(small.workspace_in(tmp_path)))
    notebook = new_notebook(cells=[new_markdown_cell(source) for source in HOSTILE_MARKDOWN.values()])
    html, _ = exporter.from_notebook_node(notebook)
    elements = BeautifulSoup(html, "html.parser").body.find_all(True)
    assert len(elements) > len(HOSTILE_MARKDOWN)
    assert not {element.name for element in elements} & ACTIVE
    assert not [name for element in elements for name in element.attrs if name.startswith("on")]
    assert not [e for e in elements if e.get("href", "#")[:4] not in ("#", "http", "mail")]
    assert ",Safe" in HTMLExporter().from_notebook_node(new_notebook())[0]  # MathJax refuses what acts
