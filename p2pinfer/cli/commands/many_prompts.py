"""Many prompts of one file: some texts are generated side by side, and printed in the file's order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from p2pinfer.cli.output.terminal import note, write_out
from p2pinfer.cli.output.waiting import WaitingLine
from p2pinfer.errors import ConfigError, LocalError, P2PInferError
from p2pinfer.text_files import decode_text

from .interrupted_text import result_line

if TYPE_CHECKING:
    from p2pinfer.client import Client
    from p2pinfer.generation.generation import Generation
    from p2pinfer.models.text.chat_template import ChatPrompt

AT_ONCE: Final = 4  # each hop computes them in one batch
MAX_BYTES: Final = 64 << 20


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, one a line; of JSON Lines (*.jsonl) the field `prompt`, or the line if it is a text.

    Raises:
        ConfigError: It cannot be read, holds none, or a line has no prompt.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is longer than {MAX_BYTES >> 20} MiB; split it")
        lines = decode_text(path.read_bytes()).splitlines()
    except (OSError, UnicodeError) as exc:
        raise ConfigError(f"the prompts cannot be read from {path}: {exc}") from exc
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_prompt_of(line, f"{path}, line {number}") for number, line in kept]
    else:
        prompts = [line for _, line in kept]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt; write one a line")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        said: Any = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{where} is no JSON: {exc}") from exc
    prompt: object = cast("dict[str, Any]", said).get("prompt") if isinstance(said, dict) else said
    if not isinstance(prompt, str):
        raise ConfigError(f'{where} has no prompt; write {{"prompt": "..."}}')
    return prompt


async def generate_all(
    client: Client,
    prompts: Sequence[str | ChatPrompt],
    begin: Callable[[str | ChatPrompt], Generation],
    at_once: int,
    waiting: WaitingLine,
    *,
    as_json: bool,
) -> None:
    """Generate a text for each prompt and print them in order, each as soon as it and those before are whole.

    Args:
        begin: Begins a text.
        at_once: How many are generated side by side.

    Raises:
        LocalError: Some could not be generated. The others are printed; in their place is an empty line, or a
            JSON object with `error`.
    """
    import trio

    texts: dict[int, str] = {}
    failed: list[P2PInferError] = []
    printed = 0
    limit = trio.CapacityLimiter(at_once)

    def print_those_whole() -> None:
        nonlocal printed
        while (text := texts.pop(printed, None)) is not None:
            waiting.pause()
            write_out(text)
            printed += 1
        waiting.say(f"{printed} of {len(prompts)} texts are done")

    async def generate_one(index: int) -> None:
        async with limit:
            try:
                generation = begin(prompts[index])
                async for _ in generation:
                    pass
                text = generation.result.text
                texts[index] = result_line(generation, client) if as_json else text + "\n"
            except P2PInferError as exc:
                failed.append(exc)
                told = {"event": "error", "error": str(exc), "kind": type(exc).__name__}
                texts[index] = (json.dumps(told) if as_json else "") + "\n"
                if not as_json:
                    note(f"prompt {index + 1}: {exc}")
        print_those_whole()

    print_those_whole()
    async with trio.open_nursery() as nursery:
        for index in range(len(prompts)):
            nursery.start_soon(generate_one, index)
    waiting.pause()
    if failed:
        raise LocalError(f"{len(failed)} of {len(prompts)} texts could not be generated; {failed[0]}")
