"""Structured logs: a line of JSON for each event, with no image, no key and no address in it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any, TextIO

NAME = "robustkit.serve"
logger = logging.getLogger(NAME)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0]:
            # The type alone: an exception's text may quote what a client sent.
            line["error"] = record.exc_info[0].__name__
            line["at"] = _place(record.exc_info[2])
        return json.dumps(line, default=str)


def _place(trace: Any) -> str:
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}"


def log(event: str, fields: Mapping[str, Any], level: int = logging.INFO) -> None:
    """One line about `event`."""
    logger.log(level, event, extra={"fields": fields})


def to_stream(stream: TextIO = sys.stderr) -> None:
    """Send the service's lines, and the server's, there."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json())
    for name, level in ((NAME, logging.INFO), ("uvicorn.error", logging.WARNING)):
        chosen = logging.getLogger(name)
        chosen.handlers, chosen.propagate = [handler], False
        chosen.setLevel(level)
