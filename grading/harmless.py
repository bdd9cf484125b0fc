"""What learners wrote and printed, made safe to look at: a list of what may be shown, and nothing else.

A marker's browser is logged in to formgrader. Markdown is rendered there, and outputs are shown: neither may act.
"""

# nbconvert is not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import base64
import binascii
import re
import struct
from typing import Any

import bleach  # type: ignore[import-untyped]
from jinja2 import pass_context
from nbconvert.filters import markdown2html
from nbformat import NotebookNode
from nbformat.v4 import new_output

MOST_OUTPUT = 2 * 2**20  # bytes of one notebook's outputs
MOST_MARKDOWN = 100_000  # characters of one cell
MOST_PIXELS = 25_000_000  # a small PNG can claim to be as large as the browser's memory

_TAGS = """a abbr b blockquote br code dd del div dl dt em h1 h2 h3 h4 h5 h6 hr i kbd li ol p pre s span strong
sub sup table tbody td th thead tr ul"""
TAGS = frozenset(_TAGS.split())  # no image: fetching one tells its server who marks, and when
# No id and no class: formgrader finds its own boxes and buttons by them.
ATTRIBUTES = {"a": ["href", "title"], "ol": ["start"]}
PROTOCOLS = frozenset({"http", "https", "mailto"})

# Terminal sequences, then control characters, then those that show text in another order than it has.
_HIDDEN = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b."
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
_PNG = b"\x89PNG\r\n\x1a\n"


def plain(text: object) -> str:
    """Text as it reads: no terminal sequences, control characters, or marks that turn its direction."""
    return _HIDDEN.sub("", str(text).replace("\r\n", "\n"))


@pass_context
def markdown(_: object, source: str) -> str:
    """Markdown as HTML of which only TAGS, ATTRIBUTES and PROTOCOLS are left; the rest is shown as text.

    In place of nbconvert's filter of the same name: `gradebook.settings` puts it there. TeX stays text for MathJax,
    which nbconvert loads with its Safe extension.
    """
    shown = plain(source)
    if len(shown) > MOST_MARKDOWN:
        shown = f"{shown[:MOST_MARKDOWN]}\n\n[{len(shown) - MOST_MARKDOWN} more characters are not shown.]"
    cleaned: str = bleach.clean(
        str(markdown2html(shown)), tags=TAGS, attributes=ATTRIBUTES, protocols=PROTOCOLS, strip=False
    )
    return cleaned


def clean_outputs(notebook: NotebookNode, budget: int = MOST_OUTPUT) -> None:
    """Leave of the outputs what can be looked at: plain text and PNG images, `budget` bytes in all."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        count = cell.get("execution_count")
        cell.execution_count = count if type(count) is int else None
        kept = []
        for output in cell.outputs:
            cleaned = _clean(output)
            budget -= len(str(cleaned))
            if budget < 0:
                kept.append(_note("the rest of the output is not shown: the notebook printed too much"))
                break
            kept.append(cleaned)
        cell.outputs = kept


def _clean(output: NotebookNode) -> Any:
    kind = output.get("output_type")
    if kind == "stream":
        return new_output(
            "stream", name="stderr" if output.get("name") == "stderr" else "stdout", text=plain(output.text)
        )
    if kind == "error":
        lines = [plain(line) for line in output.get("traceback", ())]
        return new_output(
            "error", ename=plain(output.ename), evalue=plain(output.evalue), traceback=lines or [""]
        )
    data = output.get("data", {})
    if _is_picture(data.get("image/png")):
        return new_output("display_data", data={"image/png": "".join(data["image/png"].split())})
    if "text/plain" in data:
        return new_output("display_data", data={"text/plain": plain(data["text/plain"])})
    return _note(f"an output of type {', '.join(sorted(map(str, data))) or kind} is not shown")


def _note(text: str) -> Any:
    return new_output("stream", name="stdout", text=f"[{plain(text)[:200]}]\n")


def _is_picture(value: object) -> bool:
    """Whether `value` is a PNG in base64 of no more than MOST_PIXELS."""
    try:
        data = base64.b64decode("".join(str(value).split()), validate=True)
        width, height = struct.unpack(">II", data[16:24])
    except (binascii.Error, ValueError, struct.error):
        return False
    return data.startswith(_PNG) and data[12:16] == b"IHDR" and 0 < width * height <= MOST_PIXELS
