"""Every function of p2pinfer that one decoded token enters, over two hops, by room and by module.

    python benchmarks/token_trace.py             # a table on standard error, JSON on standard output
    python benchmarks/token_trace.py --calls     # and every entry, in order

A client and two nodes run in this process, over libp2p on loopback, so that one trace sees all three. Decode
steps 6 to 53 of a generation are recorded, all threads included, each until its last task has done its work.
Of those that went through the hops, the one with the fewest modules is shown, and of these the one with the
fewest entries. The others hold work that no token brings along, as gossip, pings, looks for a better path by
the clock, and the check of sixteen steps' receipts. A token that was guessed needs no step of its own.

An entry is a function's beginning; a coroutine that goes on after a wait does not count again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

import trio
from rich.console import Console
from rich.table import Table

import p2pinfer
from p2pinfer.node.events import Ready

FIRST_STEP = 6
STEPS = 48
TAIL_S = 0.02  # after a token, in which hops finish their accounts of it


class Recorder:
    """Notes what is entered while it is on. `watch` has to be called before any thread begins."""

    def __init__(self) -> None:
        self.is_on = False
        self.steps: list[list[tuple[str, str]]] = []  # each a list of (module, function)

    @property
    def quietest(self) -> list[tuple[str, str]]:
        """The entries of the step with the fewest modules, of those that went through the hops.

        Where a busy computer stretches steps, each of them meets some of the background. That is another in
        each, so a module that any step does without is not on a token's way.
        """
        sent = [step for step in self.steps if ("session.session", "Session.decode") in step]
        met = Counter(module for step in sent for module in {module for module, _ in step})
        quietest = min(sent, key=lambda step: (len({module for module, _ in step}), len(step)))
        return [entry for entry in quietest if met[entry[0]] == len(sent)]

    def watch(self) -> None:
        """Be told of calls in this thread and in all that begin from now on."""
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def begin_step(self) -> None:
        """Note what is entered from now on as another step's."""
        self.steps.append([])
        self.is_on = True

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if not self.is_on or event != "call":
            return
        module = frame.f_globals.get("__name__", "")
        begins = (
            frame.f_code.co_code[frame.f_lasti + 1] == 0
        )  # the argument of RESUME: 0 at a function's start
        if module.startswith("p2pinfer.") and begins:
            self.steps[-1].append((module.removeprefix("p2pinfer."), frame.f_code.co_qualname))


async def one_token(recorder: Recorder) -> None:
    """Record `STEPS` decode steps of a generation over two nodes."""
    host = p2pinfer.HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False, upnp=False)
    compute = p2pinfer.ComputeConfig(threads=1, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as home:
        async with trio.open_nursery() as nursery:
            bootstrap: tuple[str, ...] = ()
            for name, blocks in (("one", "0:4"), ("two", "4:8")):
                ready = trio.Event()
                addrs: list[str] = []

                def note(event: object, ready: trio.Event = ready, addrs: list[str] = addrs) -> None:
                    if isinstance(event, Ready):
                        addrs.extend(event.addrs)
                        ready.set()

                config = p2pinfer.NodeConfig(
                    blocks=blocks,
                    bootstrap=bootstrap,
                    data_dir=Path(home, name),
                    cache_dir=Path(home, "cache"),
                )
                nursery.start_soon(
                    lambda config=config, note=note: p2pinfer.run_node(
                        config, host_config=host, compute_config=compute, report=note
                    )
                )
                await ready.wait()
                bootstrap = bootstrap or tuple(addrs)
            client = p2pinfer.Client(
                bootstrap=bootstrap,
                host_config=p2pinfer.HostConfig(listen=(), mdns=False, upnp=False),
                audit=p2pinfer.AuditConfig(rate=0.0),
                config=p2pinfer.ClientConfig(
                    draft="off"
                ),  # its guesses are extra, and only some tokens meet it
                data_dir=Path(home, "client"),
                cache_dir=Path(home, "cache"),
            )
            async with client:
                generation = client.generate("Once upon a time", max_new_tokens=FIRST_STEP + STEPS + 4)
                for number in range(FIRST_STEP + STEPS):
                    if number >= FIRST_STEP:
                        recorder.begin_step()
                    await anext(generation)
                    await trio.sleep(TAIL_S)
                recorder.is_on = False
                await generation.aclose()
            nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calls", action="store_true")
    options = parser.parse_args()
    recorder = Recorder()
    recorder.watch()
    trio.run(one_token, recorder)
    entries = recorder.quietest
    modules = Counter(module for module, _ in entries)
    rooms = Counter(module.rpartition(".")[0] or "p2pinfer" for module, _ in entries)
    table = Table(title=f"{len(entries)} entries, {len(modules)} modules, {len(rooms)} rooms")
    for column in ("room", "module", "entries"):
        table.add_column(column, justify="right")
    for module, count in sorted(modules.items()):
        room, _, name = module.rpartition(".")
        table.add_row(room or "p2pinfer", name, str(count))
    Console(stderr=True, width=100).print(table)
    if options.calls:
        for module, function in entries:
            print(module, function, file=sys.stderr)
    print(json.dumps({"entries": len(entries), "modules": modules, "rooms": rooms}))


if __name__ == "__main__":
    main()
