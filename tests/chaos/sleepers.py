"""`python -m tests.chaos.sleepers`: nodes and clients that sleep, and readers that take their time.

Sleep is a SIGSTOP and, after `--seconds`, a SIGCONT: all timers stand still, and sockets stay open. All of it
happens at the same time, in swarms of their own. Exit code 1 if a text is wrong or missing, if a text or a
node takes more than `PROMISED_S` after the waking, or if nobody says that it has slept.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from p2pinfer.client import Client, ClientConfig
from p2pinfer.client_config import AuditConfig, SessionConfig
from p2pinfer.errors import P2PInferError
from p2pinfer.generation.generation import GenerationConfig

from .processes import NodeProcess, Process, Zygote
from .requests import Request, expected_ids, tokenizer

PROMPT = "Once upon a time there was a little dog"
TOKENS = 400
BEGUN_BYTES = 60  # of the text, when its client falls asleep
PROMISED_S = 15.0
PATIENCE_S = 120.0
LOOK_S = 0.05
REQUEST = Request(PROMPT, GenerationConfig(max_new_tokens=TOKENS))


@dataclass(frozen=True)
class Outcome:
    """How it went.

    Attributes:
        back_s: Seconds from the waking to the next token, or to a text from the node.
        why: What was wrong.
    """

    name: str
    back_s: float
    why: str = ""

    def report(self) -> str:
        """For people."""
        return f"{self.name:48} {self.back_s:6.1f} s {self.why}"


class Text(Process):
    """A `p2pinfer generate` whose output is watched as it grows."""

    kind = "node"  # what the zygote calls the command

    def run(self, bootstrap: Sequence[str], tokens: int) -> None:
        """Start it."""
        argv = ["generate", "--max-new-tokens", str(tokens), "--temperature", "0", "--audit-rate", "0"]
        argv += ["--set", "client.dtype=float32", "--set", "client.find_timeout_s=3"]
        argv += ["--set", f"cache_dir={self.home.parent}", "--set", f"data_dir={self.home}"]
        for address in bootstrap:
            argv += ["--bootstrap", address]
        self.start(*argv, PROMPT)

    def size(self) -> int:
        """Bytes of the text so far."""
        return (self.home / "stdout").stat().st_size

    def text(self) -> str:
        """The text so far."""
        return (self.home / "stdout").read_text(encoding="utf-8")


class Place:
    """Where nodes and clients are started, and what their texts are to be."""

    def __init__(self, zygote: Zygote, home: Path, sleep_s: float) -> None:
        self.sleep_s = sleep_s
        self.home = home
        self.ids = expected_ids([REQUEST])[0]
        self._zygote = zygote

    async def swarm(
        self, name: str, *spans: tuple[int, int] | None, flags: Sequence[str] = ()
    ) -> list[NodeProcess]:
        """Nodes that have each other as bootstrap peers, once they are ready."""
        nodes = [NodeProcess(self._zygote, self.home / f"{name}-{i}", span) for i, span in enumerate(spans)]
        for node in nodes:
            node.run([each.address for each in nodes if each is not node], *flags)
        for node in nodes:
            await self.until(f"{node.home.name} is ready", partial(_serves, node))
        return nodes

    def text(self, name: str) -> Text:
        """A client that is not started yet."""
        return Text(self._zygote, self.home / name)

    async def until(self, what: str, look: Callable[[], bool]) -> None:
        """Look again and again.

        Raises:
            TimeoutError: It did not come about.
        """
        deadline = time.monotonic() + PATIENCE_S + self.sleep_s
        while not look():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited in vain until {what}")
            self._zygote.listen(0.0)
            await trio.sleep(LOOK_S)

    async def let_sleep(self, *sleepers: Process) -> None:
        """Stop processes for a while."""
        for each in sleepers:
            each.signal(signal.SIGSTOP)
        await trio.sleep(self.sleep_s)
        for each in sleepers:
            each.signal(signal.SIGCONT)

    async def first_text(self, name: str, bootstrap: Sequence[str]) -> float:
        """Seconds until a client that knows nothing has a text; it tries until it has."""
        began_at, tries = time.monotonic(), 0
        while True:
            text = self.text(f"{name}-try-{tries}")
            text.run(bootstrap, 4)
            tries += 1
            await self.until("a client has ended", partial(_has_ended, text))
            if text.exit_code == 0:
                return time.monotonic() - began_at
            if time.monotonic() > began_at + PATIENCE_S:
                raise TimeoutError(text.said().strip().splitlines()[-1])

    async def goes_on(self, text: Text) -> float:
        """Seconds for which a text stands still from now on, before it grows; checks it when it has ended."""
        began_at, size = time.monotonic(), text.size()
        if text.exit_code is not None:
            raise ValueError("the text was over before anybody slept")
        await self.until("the text goes on", lambda: text.size() > size or text.exit_code is not None)
        back_s = time.monotonic() - began_at
        await self.until("the text has ended", lambda: text.exit_code is not None)
        if text.exit_code:
            raise ValueError((text.said().strip().splitlines() or ["it failed"])[-1])
        if text.text().strip() != tokenizer().decode(self.ids).strip():
            raise ValueError(f"wrong text: {text.text()!r}")
        return back_s

    async def begun(self, name: str, nodes: Sequence[NodeProcess]) -> Text:
        """A text that has begun and goes on."""
        text = self.text(name)
        text.run([node.address for node in nodes], TOKENS)
        await self.until("a text begins", lambda: text.size() > BEGUN_BYTES or text.exit_code is not None)
        return text


def _serves(node: NodeProcess) -> bool:
    return node.serves


def _has_ended(process: Process) -> bool:
    return process.exit_code is not None


def slept(process: Process) -> None:
    """Raises ValueError if a process does not say that it has slept."""
    if "this process slept for" not in process.said():
        raise ValueError(f"{process.home.name} does not say that it slept")


async def a_node(place: Place) -> float:
    """The only node of all blocks; somebody else introduces."""
    introducer, sleeper = await place.swarm("node", None, (0, 8))
    await place.first_text("node-before", [introducer.address])
    await place.let_sleep(sleeper)
    back_s = await place.first_text("node-after", [introducer.address])
    slept(sleeper)
    return back_s


async def everybody(place: Place) -> float:
    """As after a power saving night: nobody is left who was awake."""
    nodes = await place.swarm("all", None, (0, 4), (4, 8))
    await place.let_sleep(*nodes)
    back_s = await place.first_text("all-after", [nodes[0].address])
    for node in nodes:
        slept(node)
    return back_s


async def a_client(place: Place) -> float:
    """In the middle of its text."""
    nodes = await place.swarm("client", (0, 4), (4, 8))
    text = await place.begun("client-text", nodes)
    await place.let_sleep(text)
    return await place.goes_on(text)


async def a_client_beyond_its_lease(place: Place) -> float:
    """No hop has kept anything of its session."""
    lease_s = max(1.0, place.sleep_s / 4)
    nodes = await place.swarm("lease", (0, 4), (4, 8), flags=["--set", f"serve.lease_s={lease_s}"])
    text = await place.begun("lease-text", nodes)
    await place.let_sleep(text)
    return await place.goes_on(text)


async def a_client_and_a_hop_in_turn(place: Place) -> float:
    """The hop falls asleep while the client sleeps, and both wake at the same time."""
    nodes = await place.swarm("turn", (0, 4), (4, 8))
    text = await place.begun("turn-text", nodes)
    text.signal(signal.SIGSTOP)
    await trio.sleep(place.sleep_s / 4)
    await place.let_sleep(nodes[1])
    text.signal(signal.SIGCONT)
    return await place.goes_on(text)


async def a_reader_that_pauses_at_each_token(place: Place) -> float:
    """Longer than hops are left without a question."""
    pause_s = place.sleep_s / 20
    return await _read(place, "pauses", [pause_s if at < 20 else 0.0 for at in range(TOKENS)])


async def a_reader_that_pauses_once(place: Place) -> float:
    """Longer than the session's lease at its hops."""
    lease = ["--set", f"serve.lease_s={max(1.0, place.sleep_s / 4)}"]
    return await _read(place, "once", [place.sleep_s if at == 20 else 0.0 for at in range(TOKENS)], lease)


async def _read(place: Place, name: str, pauses_s: Sequence[float], flags: Sequence[str] = ()) -> float:
    """The longest wait for a token that the reader has asked for."""
    nodes = await place.swarm(name, (0, 4), (4, 8), flags=flags)
    longest_s, ids = 0.0, list[int]()
    client = Client(
        bootstrap=[node.address for node in nodes],
        config=ClientConfig(dtype="float32", device="cpu", find_timeout_s=60.0),
        session_config=SessionConfig(slow_step_s=60.0),
        audit=AuditConfig(rate=0.0),
        cache_dir=place.home,
        data_dir=place.home / f"{name}-reader",
    )
    async with client, client.generate(PROMPT, REQUEST.config) as generation:
        asked_at = time.monotonic()
        async for token in generation:
            if ids:
                longest_s = max(longest_s, time.monotonic() - asked_at)
            ids.append(token.id)
            await trio.sleep(pauses_s[len(ids) - 1])
            asked_at = time.monotonic()
    if ids != place.ids:
        raise ValueError(f"wrong ids: {ids}")
    if not flags and generation.result.failovers:
        raise ValueError(f"{generation.result.failovers} failovers")
    return longest_s


CASES: tuple[Callable[[Place], Awaitable[float]], ...] = (
    a_node,
    everybody,
    a_client,
    a_client_beyond_its_lease,
    a_client_and_a_hop_in_turn,
    a_reader_that_pauses_at_each_token,
    a_reader_that_pauses_once,
)


def run_sleepers(
    home: Path, sleep_s: float, chosen: Sequence[str] = (), say: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """All cases, or those that are named, at the same time."""
    outcomes: list[Outcome] = []
    zygote = Zygote()
    place = Place(zygote, home, sleep_s)

    async def run(case: Callable[[Place], Awaitable[float]]) -> None:
        name, back_s, why = case.__name__.replace("_", " "), 0.0, ""
        try:
            back_s = await case(place)
        except (OSError, ValueError, P2PInferError) as exc:
            why = str(exc) or type(exc).__name__
        if back_s > PROMISED_S:
            why = f"more than {PROMISED_S:g} s"
        outcomes.append(Outcome(name, back_s, why))
        say(outcomes[-1])

    async def run_all() -> None:
        async with trio.open_nursery() as nursery:
            for case in CASES:
                if not chosen or case.__name__ in chosen:
                    nursery.start_soon(run, case)

    try:
        trio.run(run_all)
    finally:
        zygote.close()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.sleepers")
    parser.add_argument("--seconds", type=float, default=60.0, help="of sleep")
    parser.add_argument("cases", nargs="*", help=", ".join(case.__name__ for case in CASES))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="p2pinfer-sleepers-") as home:
        outcomes = run_sleepers(
            Path(home), asked.seconds, asked.cases, lambda each: print(each.report(), flush=True)
        )
    return 1 if any(outcome.why for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
