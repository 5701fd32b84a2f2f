"""Text that was cut off: what it takes to go on with it is kept, and the command for that is told."""

from __future__ import annotations

import shlex
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from p2pinfer.cli.invocation import Invocation
from p2pinfer.cli.output.terminal import OutputClosed, note, write_out
from p2pinfer.errors import LocalError, P2PInferError

if TYPE_CHECKING:
    from p2pinfer.client import Client
    from p2pinfer.generation.generation import Generation


@contextmanager
def kept(
    generation: Generation,
    client: Client,
    call: Invocation,
    data_dir: Path,
    resumed: str | None,
    adapter: Path | None,
) -> Generator[None]:
    """Keep what it takes to go on if the text is cut off, and say how; else forget what was kept."""
    from p2pinfer.generation.saved_state import drop_token, keep_token

    before = len(generation.result.token_ids)
    try:
        yield
    except OutputClosed:  # whoever read it had enough
        raise
    except BaseException as exc:
        token = generation.resume_token
        if token is not None and len(generation.result.token_ids) > before:
            if call.json and not isinstance(exc, P2PInferError):  # an error's own JSON has the token
                write_out(result_line(generation, client))
            try:
                name = keep_token(token, data_dir)
            except LocalError as error:
                note(f"{error}; to continue, pass this token to --resume: {token}")
            else:
                if resumed is not None and resumed != name:
                    drop_token(resumed, data_dir)
                if not call.quiet:
                    note(f"interrupted; to continue: {_command_to_resume(name, call, adapter)}")
        raise
    if generation.is_cut and call.is_for_people and not call.json:
        _tell_of_the_cut(generation, call, data_dir, adapter)
    if resumed is not None:
        drop_token(resumed, data_dir)


def _tell_of_the_cut(generation: Generation, call: Invocation, data_dir: Path, adapter: Path | None) -> None:
    """A text that has come to its last token may be one that was to go on; keep what that takes."""
    from p2pinfer.generation.saved_state import keep_token

    token, tokens = generation.resume_token, len(generation.result.token_ids)
    if token is None:
        positions = tokens + generation.result.prompt_tokens
        note(f"stopped: the model's context is full, {positions:,} tokens with the prompt")
        return
    try:
        name = keep_token(token, data_dir)
    except LocalError as error:
        note(f"stopped after {tokens:,} tokens (--max-new-tokens); {error}")
    else:
        how = _command_to_resume(name, call, adapter)
        note(f"stopped after {tokens:,} tokens (--max-new-tokens); to continue: {how}")


def _command_to_resume(name: str, call: Invocation, adapter: Path | None) -> str:
    """With what was said of adapter, model, swarm and folder, which a token does not hold."""
    words = ["p2pinfer", "generate", "--resume", name]
    words += [] if adapter is None else ["--adapter", str(adapter)]
    for key in ("model", "bootstrap", "host.swarm_key", "client.identity_file", "data_dir"):
        if key in call.flags:
            flag = call.flags[key]
            many = isinstance(flag.value, tuple)
            values = cast("tuple[object, ...]", flag.value) if many else (flag.value,)
            said = f"{key}=" if flag.name == "--set" else ""
            words += [word for value in values for word in (flag.name, f"{said}{value}")]
    return shlex.join(words)


def result_line(generation: Generation, client: Client) -> str:
    """Result of a text as --json prints it, on one line."""
    from p2pinfer.json_documents import result_document, to_json

    told = result_document(generation.result, client.ledger, client.audits, generation.resume_token)
    return to_json(told) + "\n"
