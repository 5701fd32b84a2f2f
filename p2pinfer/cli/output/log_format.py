"""Log records as text for people, and as logfmt or JSON for programs: one record, one line."""

from __future__ import annotations

import json
import logging
import time
from typing import Final

from .plain import printable

FORMATS: Final = ("text", "logfmt", "json")
LEVELS: Final = ("debug", "info", "warning", "error")


def formatter(form: str, *, with_time: bool) -> logging.Formatter:
    """The one for `form`, of `FORMATS`; `with_time` concerns text, the others always say when."""
    if form == "text":
        when = "%(asctime)s " if with_time else ""
        return _Text(f"{when}%(levelname).1s %(name)s: %(message)s")
    return _Json() if form == "json" else _Logfmt()


class _Text(logging.Formatter):
    """Log lines quote what peers said, and so do tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields(self, record), ensure_ascii=True)


class _Logfmt(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{key}={_quoted(value)}" for key, value in _fields(self, record).items())


def _fields(form: logging.Formatter, record: logging.LogRecord) -> dict[str, str]:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields = {
        "time": f"{seconds}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    if record.exc_info:
        fields["traceback"] = form.formatException(record.exc_info)
    return fields


def _quoted(value: str) -> str:
    """As it is if nothing in it could be mistaken, else in quotes, with what they need escaped."""
    plain = value and all(each.isprintable() and each not in ' "=\\' for each in value)
    return value if plain else json.dumps(value, ensure_ascii=True)
