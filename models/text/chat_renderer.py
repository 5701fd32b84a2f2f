"""Program that renders the chat templates of one model: they came with it, and are not trusted.

It runs by itself, apart from whoever asks (renderer_process.py), and imports nothing of p2pinfer. Before a
template is compiled it gives up new files and sockets, and bounds its memory and the processor time of each
request, where the system can do that. Jinja's sandbox keeps a template from Python's internals, and from
changing what the next request finds.

Reads lines of JSON. The first has the templates, {name: text}. Each of the others is a request, {"template":
name, "variables": {...}}, and is answered by a line: {"text": text}, {"refused": reason} where the template
itself raised an error, or {"broken": reason}, with "last" if this process had better not be used again.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Python and Jinja import these where a template first needs them, when no file can be opened any more.
LATE_IMPORTS = ("encodings.unicode_escape", "html", "jinja2.debug", "pprint", "random", "textwrap")
MEMORY_BYTES = 512 << 20
PROCESSOR_S = 2
MAX_TEXT_CHARS = 16 << 20


class Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - the base class has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `{% endgeneration %}`, as they are."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class RefusedByTemplateError(jinja2.TemplateError):
    """The template called raise_exception."""


def raise_exception(message: Any = "") -> NoReturn:
    """Let a template say that it does not take these messages."""
    raise RefusedByTemplateError(str(message))


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(layout: str) -> str:
    """Today's date, as several templates have it in their system prompt."""
    return datetime.now().strftime(layout)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers' `apply_chat_template` sets it up."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return made


class Templates:
    """Templates of one model, compiled when they are first used."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._sources = sources
        self._environment = environment()
        self._compiled: dict[str, jinja2.Template] = {}

    def render(self, name: str, variables: dict[str, Any]) -> str:
        """The text that a template makes; raises whatever Python's operators do."""
        if name not in self._compiled:
            self._compiled[name] = self._environment.from_string(self._sources[name])
        return self._compiled[name].render(**variables)


def answer(templates: Templates, request: dict[str, Any]) -> dict[str, str]:
    """The answer to a request."""
    try:
        text = templates.render(request["template"], request["variables"])
    except RefusedByTemplateError as exc:
        return {"refused": str(exc)}
    except MemoryError:
        return {"broken": "it needs too much memory", "last": "yes"}
    except RecursionError:
        return {"broken": "it calls itself without end", "last": "yes"}
    except Exception as exc:  # a template can raise whatever Python's operators do
        return {"broken": f"{type(exc).__name__}: {exc}"}
    return {"text": text} if len(text) <= MAX_TEXT_CHARS else {"broken": "its text is too long"}


def give_up_rights() -> None:
    """Leave nothing to reach, and bounds on what there is; Windows has none of it."""
    time.localtime()  # reads the time zone's file
    for name in LATE_IMPORTS:
        import_module(name)
    try:
        import resource
    except ImportError:
        return
    for kind, most in (
        ("RLIMIT_AS", MEMORY_BYTES),
        ("RLIMIT_NOFILE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_FSIZE", 0),
    ):
        number = getattr(resource, kind, None)
        if number is not None:
            with suppress(OSError, ValueError):  # macOS refuses some of them
                resource.setrlimit(number, (most, most))


def grant_time() -> None:
    """Let the next request have its processor time; one that takes more ends this process."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(used.ru_utime + used.ru_stime) + PROCESSOR_S
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))


def main() -> None:
    """Answer request after request, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    requests, answers = sys.stdin.buffer, sys.stdout
    templates = Templates(json.loads(requests.readline()))
    give_up_rights()
    while line := requests.readline():
        grant_time()
        answers.write(json.dumps(answer(templates, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
