"""`p2pinfer man`: manual pages, of what `--help` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from p2pinfer.cli.invocation import Invocation, SettingOption, command
from p2pinfer.cli.output.terminal import note, write_out
from p2pinfer.errors import ConfigError, LocalError


@command(
    "man",
    examples=[
        "p2pinfer man node | man -l -",
        "p2pinfer man --out ~/.local/share/man/man1",
    ],
)
@click.argument("words", nargs=-1, metavar="[COMMAND]...")
@click.option(
    "--out", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Write all pages to this folder."
)
def man(call: Invocation, words: tuple[str, ...], folder: Path | None) -> None:
    """Print the manual page of a command, or write those of all commands.

    Without COMMAND it is the page of p2pinfer itself.
    """
    call.settings()
    root = click.get_current_context().find_root()
    if folder is None:
        write_out(_page_of(root, words))
        return
    pages = dict(all_pages(root.command, root.info_name or "p2pinfer"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, page in pages.items():
            (folder / f"{name}.1").write_text(page, encoding="utf-8")
    except OSError as exc:
        raise LocalError(f"{folder} cannot be written: {exc.strerror or exc}") from exc
    if call.is_for_people:
        note(f"wrote {len(pages)} pages to {folder}")


def all_pages(found: click.Command, path: str) -> Iterator[tuple[str, str]]:
    """Name and text of the page of a command, and of those below it.

    Args:
        path: The command as it is called: `p2pinfer reputation`.
    """
    context = click.Context(found, info_name=path)
    yield path.replace(" ", "-"), man_page(found, context)
    if isinstance(found, click.Group):
        for name in found.list_commands(context):
            yield from all_pages(found.commands[name], f"{path} {name}")


def man_page(found: click.Command, context: click.Context) -> str:
    """A page in the macros of man(7)."""
    from importlib.metadata import version

    path = context.command_path
    first, *paragraphs = (found.help or "").split("\n\n")
    release = f"p2pinfer {version('p2pinfer')}"
    lines = [
        f'.TH "{_escaped(path.replace(" ", "-").upper())}" 1 "" "{release}" "p2pinfer"',
        ".SH NAME",
        f"{_escaped(path.replace(' ', '-'))} \\- {_escaped(' '.join(first.split()).rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_escaped(path)}",
        _escaped(" ".join(found.collect_usage_pieces(context))),
    ]
    if paragraphs:
        lines.append(".SH DESCRIPTION")
    for paragraph in paragraphs:
        lines += [".PP", *_paragraph(paragraph)]
    for heading, records in _options(found, context).items():
        lines.append(f".SH {_escaped(heading.upper())}")
        for names, said in records:
            lines += [".TP", f"\\fB{_escaped(names)}\\fR", _escaped(said)]
    if isinstance(found, click.Group):
        lines.append(".SH COMMANDS")
        for name in found.list_commands(context):
            below = found.commands[name]
            lines += [
                ".TP",
                f"\\fB{_escaped(path)} {_escaped(name)}\\fR",
                _escaped(below.get_short_help_str(200)),
            ]
    examples: list[str] = list(getattr(found, "examples", ()))
    if examples:
        lines += [".SH EXAMPLES", ".nf", *map(_escaped, examples), ".fi"]
    return "\n".join(line for line in lines if line) + "\n"


def _page_of(root: click.Context, words: tuple[str, ...]) -> str:
    found, path = root.command, root.info_name or "p2pinfer"
    for word in words:
        below = found.commands.get(word) if isinstance(found, click.Group) else None
        if below is None:
            raise ConfigError(f"there is no command {path} {word}; `{path} --help` lists those there are")
        found, path = below, f"{path} {word}"
    return man_page(found, click.Context(found, info_name=path))


def _options(found: click.Command, context: click.Context) -> dict[str, list[tuple[str, str]]]:
    """Options by heading, in the order of `--help`."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in found.get_params(context):
        record = param.get_help_record(context)
        if record is not None and isinstance(param, click.Option):
            heading = param.heading if isinstance(param, SettingOption) else "Options"
            groups.setdefault(heading, []).append(record)
    last = groups.pop("Options", [])
    return {**groups, **({"Options": last} if last else {})}


def _paragraph(text: str) -> list[str]:
    """Lines of a paragraph; one that click is told to leave alone keeps its lines."""
    if text.startswith("\b\n"):
        return [".nf", *map(_escaped, text.splitlines()[1:]), ".fi"]
    return [_escaped(" ".join(text.split()))]


def _escaped(text: str) -> str:
    """Text that roff prints as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{text}" if text.startswith(".") else text
