"""Options and switches that all commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, TypeAlias, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from p2pinfer.cli.output.log_format import FORMATS, LEVELS
from p2pinfer.cli.output.plain import printable
from p2pinfer.cli.output.terminal import note, set_up_logging, write_out
from p2pinfer.config import Flag, Settings, load_settings
from p2pinfer.errors import ConfigError
from p2pinfer.folders import is_homeless
from p2pinfer.models.config import DEVICES as DEVICES
from p2pinfer.models.config import DTYPES as DTYPES
from p2pinfer.models.config import WEIGHTS as WEIGHTS
from p2pinfer.node.transport.swarm_key import load_swarm_key
from p2pinfer.text_files import is_text

from .completing import complete_settings, complete_value

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Callback: TypeAlias = Callable[[click.Context, click.Parameter, Any], None]
_Hint: TypeAlias = Callable[[Sequence[str], Sequence[str]], str]
_META = "p2pinfer.invocation"
_HEADINGS = {
    "model": "Model",
    "node": "Model",
    "compute": "Model",
    "generation": "Text",
    "tune": "Training",
    "api": "API",
    "api.models": "Model",
    "bootstrap": "Network",
    "host": "Network",
    "client": "Network",
    "audit": "Network",
    "verify": "Network",
    "relay": "Network",
    "serve": "Network",
    "weights": "Network",
    "data_dir": "Network",
}


@dataclass(slots=True)
class Invocation:
    """A command as it was called."""

    json: bool = False
    verbosity: int = 0
    log_level: str | None = None
    log_format: str = "text"
    print_config: bool = False
    config_file: Path | None = None
    flags: dict[str, Flag] = field(default_factory=dict[str, Flag])

    @property
    def is_for_people(self) -> bool:
        """True where standard error may hold lines for a person: no `-q`, no JSON log records."""
        return not self.quiet and self.log_format == "text"

    def settings(self, *configs: type[Any]) -> Settings:
        """The settings of these layers. With `--print-config`, prints them and ends the command.

        Raises:
            ConfigError: A setting cannot be used.
        """
        settings = load_settings(*configs, flags=self.flags, file=self.config_file)
        if self.print_config:
            write_out(settings.to_json() if self.json else settings.to_toml())
            raise click.exceptions.Exit(0)
        for each in settings:
            if each.key == "host.swarm_key" and each.value is not None:
                load_swarm_key(cast(Path, each.value))  # here, since what follows takes seconds
        if settings["data_dir"].origin == "default" and is_homeless() and not self.quiet:
            note(
                f"this user has no home directory: data is kept in {settings['data_dir'].value}; "
                "set HOME or --data-dir to a permanent folder"
            )
        return settings

    @property
    def quiet(self) -> bool:
        """True if only errors are to be told."""
        return self.verbosity < 0


class SettingOption(click.Option):
    """An option that is a setting: its value stays text here and is read by `config`, like a variable's."""

    def __init__(self, *args: Any, setting: str, choices: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, expose_value=False, callback=_take_setting, **attributes)
        self.setting = setting
        self.choices = tuple(choices)

    @property
    def heading(self) -> str:
        """Heading under which `--help` lists it."""
        return _HEADINGS.get(self.setting) or _HEADINGS[self.setting.split(".")[0]]


class _Command(click.Command):
    """A command whose help groups its options and ends with examples."""

    examples: Sequence[str] = ()
    hint: _Hint | None = None

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        return help_option()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        try:
            left = super().parse_args(ctx, args)
            self._check_text(ctx)
            return left
        except click.NoSuchOption as exc:
            options = [
                name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)
            ]
            if self.hint is not None and (said := self.hint(words, options)):
                raise click.UsageError(f"{exc.format_message()} {said}", ctx) from exc
            raise
        except click.MissingParameter:
            if _invocation(ctx).print_config:  # what the command would be about need not be said
                _invocation(ctx).settings()
            raise

    def _check_text(self, ctx: click.Context) -> None:
        """Words of the command line may hold bytes that are no UTF-8; what names a file is a path by now."""
        for param in self.get_params(ctx):
            value: object = ctx.params.get(param.name or "")
            if isinstance(value, str) and not is_text(value):
                name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
                raise ConfigError(f"{name} is not UTF-8 text: {printable(value[:60])}")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            heading = param.heading if isinstance(param, SettingOption) else "Options"
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(heading, []).append(record)
        last = groups.pop("Options", [])
        for heading, records in [*groups.items(), ("Options", last)]:
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


class _CommandGroup(_Command, click.Group):
    """A command with commands below it, listed in the order they were added."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def help_option() -> click.Option:
    """--help, written as results are: click's own ends with a traceback where a disk is full."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            write_out(ctx.get_help() + "\n")
            ctx.exit()

    return click.Option(
        ["-h", "--help"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Show this message and exit.",
    )


def command(
    name: str, *, examples: Sequence[str], hint: _Hint | None = None
) -> Callable[[Callable[Concatenate[Invocation, ...], None]], click.Command]:
    """Make a command of a function, with the switches that all commands have.

    The function takes the `Invocation`, and those of its own options that are not settings.

    Args:
        hint: What to add when an option does not exist, by the command's words and the options that do.
    """

    def decorate(function: Callable[Concatenate[Invocation, ...], None]) -> click.Command:
        made = _Command(name, **_parts_of(function))
        made.examples, made.hint = examples, hint
        return made

    return decorate


def group(
    name: str, *, examples: Sequence[str]
) -> Callable[[Callable[Concatenate[Invocation, ...], None]], click.Group]:
    """Like `command`, for one that has others below it; the function is for when none of them was given."""

    def decorate(function: Callable[Concatenate[Invocation, ...], None]) -> click.Group:
        made = _CommandGroup(name, invoke_without_command=True, **_parts_of(function))
        made.examples = examples
        return made

    return decorate


def _parts_of(function: Callable[Concatenate[Invocation, ...], None]) -> dict[str, Any]:
    """Arguments of click's command."""

    def call(**own: Any) -> None:
        context = click.get_current_context()
        if context.invoked_subcommand is None:
            invocation = _invocation(context)
            set_up_logging(invocation.verbosity, level=invocation.log_level, form=invocation.log_format)
            function(invocation, **own)

    options: list[click.Parameter] = getattr(function, "__click_params__", [])
    return {
        "callback": call,
        "params": [*reversed(options), *_switches()],
        "help": inspect.getdoc(function),
    }


def setting(
    key: str,
    declaration: str,
    help: str,
    *,
    choices: Sequence[str] = (),
    multiple: bool = False,
    flag_value: str | None = None,
) -> Callable[[_Function], _Function]:
    """An option for the setting of that key.

    Args:
        declaration: As people write it: `--listen MULTIADDR`, or `--no-blocks` for a switch.
        flag_value: That of a switch whose setting is not true or false.
        choices: Offered to the shell that completes; `config` and the layers check values.
    """
    flag, _, metavar = declaration.partition(" ")
    kind: dict[str, Any] = (
        {"metavar": metavar, "type": str} if metavar else {"is_flag": True, "default": None}
    )
    if flag_value is not None:
        kind["flag_value"] = flag_value
    if choices:
        kind["shell_complete"] = _completing(choices)
    elif metavar:
        kind["shell_complete"] = partial(complete_value, metavar)
    return click.option(
        flag, cls=SettingOption, setting=key, choices=choices, help=help, multiple=multiple, **kind
    )


MODEL = setting(
    "model",
    "--model ID_OR_DIR",
    "Hugging Face id (owner/name or owner/name@revision), folder, or GGUF file. [default: tiny-stories]",
)
BOOTSTRAP = setting(
    "bootstrap",
    "--bootstrap MULTIADDR",
    "Join the swarm through this peer. May be repeated. [default: those of bootstrap_peers.txt]",
    multiple=True,
)
ANNOUNCE = setting(
    "host.announce",
    "--announce MULTIADDR",
    "Announce this address to other peers, for example that of a forwarded port. May be repeated.",
    multiple=True,
)
SWARM_KEY = setting(
    "host.swarm_key",
    "--swarm-key FILE",
    "Join the private swarm that uses this key. [default: the public swarm]",
)
ALLOW = setting(
    "host.allow",
    "--allow PEER_OR_FILE",
    "Accept only these peers: a peer id, or a file with one per line. May be repeated. "
    "The prefix clients:, nodes: or relaying: limits the rule to that role.",
    multiple=True,
)
DENY = setting(
    "host.deny",
    "--deny PEER_OR_FILE",
    "Reject these peers; same format as --allow. May be repeated.",
    multiple=True,
)
IDENTITY = setting(
    "client.identity_file",
    "--identity FILE",
    "Use the permanent peer id stored in FILE: operators can list it, and nodes can recognise it. "
    "[default: a new one each time]",
)
DATA_DIR = setting("data_dir", "--data-dir DIR", "Folder for the identity, the ledger and config.toml.")


def _completing(
    choices: Sequence[str],
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(choice) for choice in choices if choice.startswith(incomplete)]

    return complete


def _take_setting(ctx: click.Context, param: click.Parameter, value: object) -> None:
    assert isinstance(param, SettingOption)
    if value is not None and value != ():
        _invocation(ctx).flags[param.setting] = Flag(max(param.opts, key=len), value)


def _take_assignments(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> None:
    for assignment in value:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write KEY=VALUE, such as serve.max_sessions=8")
        _invocation(ctx).flags.setdefault(key.strip(), Flag("--set", text))


def _take_switch(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        setattr(_invocation(ctx), str(param.name), value)


def _take_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        _invocation(ctx).verbosity = -1


def _invocation(ctx: click.Context) -> Invocation:
    return cast(Invocation, ctx.meta.setdefault(_META, Invocation()))


def _switches() -> list[click.Option]:
    """Switches that every command understands."""
    return [
        _switch("--json", is_flag=True, help="Print JSON on standard output."),
        _switch(
            *("--config", "config_file"),
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Read this file instead of config.toml.",
        ),
        _switch(
            "--set",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set any setting that --print-config lists. May be repeated.",
            callback=_take_assignments,
            shell_complete=complete_settings,
        ),
        _switch(
            "--print-config", is_flag=True, help="Print all settings and where each comes from, then exit."
        ),
        _switch(
            *("-v", "--verbose", "verbosity"),
            count=True,
            help="Log what happens; -vv: in detail, with tracebacks.",
        ),
        _switch("-q", "--quiet", is_flag=True, help="Print only errors.", callback=_take_quiet),
        _switch(
            "--log-level",
            type=click.Choice(LEVELS),
            metavar="LEVEL",
            help=f"Log level: {', '.join(LEVELS)}. [default: warning]",
        ),
        _switch(
            "--log-format",
            type=click.Choice(FORMATS),
            metavar="FORMAT",
            help=f"Log format: {', '.join(FORMATS)}. [default: text]",
        ),
    ]


def _switch(*declarations: str, callback: _Callback | None = None, **attributes: Any) -> click.Option:
    return click.Option(declarations, callback=callback or _take_switch, expose_value=False, **attributes)
