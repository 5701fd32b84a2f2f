"""Six node processes, of which some lie: what reaches the user, who is banned, and what finding out costs.

    python benchmarks/liars.py                                     # int8 weights, and a skipped block
    python benchmarks/liars.py --cheat tamper noise:0.2 --generations 200
    python benchmarks/liars.py --cheat - - next                    # the last hop's; - is an honest node
    python benchmarks/liars.py --cheat - - next - - slow           # its honest twin is a slower computer
    python benchmarks/liars.py --cheat - half-int8 kv-int8         # small lies, see small_lies.py
    python benchmarks/liars.py --cheat skip --new-tokens 4         # short answers only
    python benchmarks/liars.py --flood 20                          # and proofs against throw-away keys
    python benchmarks/liars.py --flood 20 --cheat                  # the same, and nobody lies
    python benchmarks/liars.py --cheat skip+gap int8+late          # that get around audits: evasions.py
    python benchmarks/liars.py --cheat --device cuda:0 cuda:1 cuda:0,cuda:1  # nodes on cards, one on both
    python benchmarks/liars_table.py                               # all of them, side by side

The nodes are `p2pinfer node` on loopback, two for each part of the bundled model; `lying_node.py` says what
the cheats are and how often they happen. One client makes short generations, one after the other, with the
default settings. Two other processes generate nothing and can know of the cheats by proofs alone: one is
there from the beginning, one joins through an honest node when all is over.

A token is corrupted, "by liars", if a hop computed for it that lied in that session. It shows as wrong if the
published model in float32 gives another one a lead of more than 0.1. "Chosen" counts the texts that went over
a liar, whether it lied or not: a row in which none did says nothing about audits.

Extra compute is the processor time of everything that would not be done without audits: running spans again
here and at the bystander's, and at nodes that are asked for a second opinion. It is held against the
processor time of the nodes. What an opinion costs a node, a session of one step, is measured by asking for
some such sessions at the end. That of the last half of the texts is told apart: it shows what audits take
once everybody is known, for which the bystanders' checks count if a liar was found as late.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import trio
from contest import report
from flood import flooded

import p2pinfer.models
from p2pinfer.audit.local_verifier import LocalVerifier
from p2pinfer.audit.tally import AuditTally
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig
from p2pinfer.generation.generation import GenerationResult
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, ModelSource, resolve_model
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import load_tokenizer
from p2pinfer.models.verify.sessions import run_session
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.host_config import HostConfig
from p2pinfer.reputation.verdict import Finding

SPANS = ("0:3", "3:5", "5:8")
LEAD = 0.1
ASKED_FOR_PRICE = 10
PROOFS_COME_S = 20.0  # what small lies come to is no proof, and then nothing comes
OPENINGS = (
    "Once upon a time, there was a {} who",
    "One day, a {} found a",
    'The {} was sad. "Why are you sad?" asked',
    "In the forest lived a {}. Every morning it",
    "It was raining, and the {} wanted to",
    "Tom had a {} that he loved. But",
    "The {} and the bird were best friends. They",
    "Mom gave Lily a {}. Lily said",
    "Far away, on a hill, a {} looked at the",
    "Ben saw a {} in the garden. He",
)
HEROES = ("fox", "frog", "dog", "cat", "bear", "duck", "mouse", "rabbit", "horse", "robot")
HEROES += ("train", "boat", "doll", "kite", "ball", "turtle", "owl", "pig", "dragon", "girl")


@dataclass
class NodeProcess:
    """One node, and what it has told."""

    span: str
    cheat: str
    process: trio.Process
    peer_id: str = ""
    addrs: tuple[str, ...] = ()
    ready: trio.Event = field(default_factory=trio.Event)
    tokens: dict[str, int] = field(default_factory=dict)  # computed, by client
    sessions: dict[str, int] = field(default_factory=dict)  # the same
    begun_lies: int = 0  # sessions, where it does not lie in all of them

    @property
    def lies(self) -> bool:
        return self.cheat not in ("", "slow")

    @property
    def chooses(self) -> bool:
        """True if it lies in some of its sessions only, and tells of each."""
        return ":" in self.cheat

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    async def listen(self) -> None:
        """Take in its events until it ends."""
        assert self.process.stdout is not None
        rest = b""
        async for received in self.process.stdout:
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["event"] == "ready":
                    self.peer_id, self.addrs = event["peer_id"], tuple(event["addrs"])
                    self.ready.set()
                elif event["event"] == "lies":
                    self.begun_lies += 1
                elif event["event"] == "session_closed":
                    client = event["peer_id"]
                    self.tokens[client] = self.tokens.get(client, 0) + event["tokens"]
                    self.sessions[client] = self.sessions.get(client, 0) + 1
        if not self.ready.is_set():
            raise RuntimeError(f"the node for blocks {self.span} ended before it served")


@asynccontextmanager
async def open_nodes(
    home: Path, bootstrap: Sequence[str], cheats: Sequence[str], devices: Sequence[str] = ("auto",)
) -> AsyncGenerator[list[NodeProcess]]:
    """Two nodes for every span; the first ones of different spans cheat. Devices take turns."""
    nodes: list[NodeProcess] = []
    async with trio.open_nursery() as nursery:
        for index in range(2 * len(SPANS)):
            span = SPANS[index % len(SPANS)]
            cheat = cheats[index].strip("-") if index < len(cheats) else ""
            start = [str(Path(__file__).with_name("lying_node.py")), cheat] if cheat else ["-m", "p2pinfer"]
            folder = home / str(index)
            folder.mkdir()
            (folder / "config.toml").write_text(
                f'[compute]\nthreads = 1\ndevice = "{devices[index % len(devices)]}"\n'
                "cache_bytes = 268435456\n"  # several share a card, each of which would take most of it
            )
            command = [sys.executable, *start, "node", "--json", "--until-stdin-closes", "--blocks", span]
            command += ["--data-dir", str(folder), "--listen", "/ip4/127.0.0.1/tcp/0"]
            command += [word for address in bootstrap for word in ("--bootstrap", address)]
            with (folder / "stderr").open("wb") as stderr:
                process = await trio.lowlevel.open_process(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=folder
                )
            nodes.append(NodeProcess(span, cheat, process))
            nursery.start_soon(nodes[-1].listen)
        try:
            with trio.fail_after(180):
                for node in nodes:
                    await node.ready.wait()
            yield nodes
        finally:
            with trio.CancelScope(shield=True):
                for node in nodes:
                    node.process.terminate()
                for node in nodes:
                    await node.process.wait()


class Bystander:
    """A client in a process of its own that generates nothing, and waits for proofs at the end."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process

    async def ask(self) -> dict[str, Any]:
        """Let it leave, and hear what it came to believe."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        await self._process.stdin.aclose()
        told = b"".join([received async for received in self._process.stdout])
        return json.loads(told)  # type: ignore[no-any-return]


@asynccontextmanager
async def open_bystander(
    home: Path, liars: Sequence[str], bootstrap: Sequence[str]
) -> AsyncGenerator[Bystander]:
    command = [sys.executable, __file__, "--stand-by", str(home), ",".join(liars), *bootstrap]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Bystander(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def stand_by(home: Path, liars: Sequence[str], bootstrap: Sequence[str]) -> None:
    """Be the bystander until standard input closes, then until the liars are banned or `PROOFS_COME_S`."""
    torch.set_num_threads(1)
    verifier = await trio.to_thread.run_sync(new_verifier, home)
    async with Client(bootstrap=bootstrap, data_dir=home, cache_dir=home, verifier=verifier) as client:
        await trio.to_thread.run_sync(sys.stdin.read)
        with trio.move_on_after(PROOFS_COME_S):
            while not all(map(client.ledger.is_banned, liars)):
                await trio.sleep(0.1)
        proofs = client.ledger.proofs()
        told = {
            "banned": [each for each in client.ledger.peers() if client.ledger.is_banned(each)],
            "proofs": [[note.accused, note.state] for note in proofs.values()],
            "audits": client.audits.done,
            "spent_s": verifier.spent_s,
        }
        print(json.dumps(told))


class ItemizingVerifier(LocalVerifier):
    """The default one, which also tells what its time was spent on.

    Attributes:
        items: Number and seconds of each kind of work; the first one loads the weights.
    """

    def __init__(self, source: ModelSource, config: AuditConfig) -> None:
        super().__init__(source, config)
        self.items: dict[str, tuple[int, float]] = {}

    async def verify(self, record: HopRecord) -> Finding:
        """See `Verifier`."""
        return self._noted("first" if not self.items else "whole", await super().verify(record))

    async def glance(self, record: HopRecord) -> Finding:
        """See `Verifier`."""
        return self._noted("glances", await super().glance(record))

    async def confirm(self, record: HopRecord) -> Finding:
        """See `Verifier`."""
        return self._noted("confirmations", await super().confirm(record))

    def _noted(self, kind: str, finding: Finding) -> Finding:
        count, seconds = self.items.get(kind, (0, 0.0))
        self.items[kind] = (count + 1, seconds + finding.spent_s)
        return finding

    def itemized(self) -> str:
        """The items in a line."""
        return ", ".join(f"{kind} {count}: {seconds:.2f} s" for kind, (count, seconds) in self.items.items())


def new_verifier(cache_dir: Path) -> ItemizingVerifier:
    """The default one, whose time can be read."""
    return ItemizingVerifier(resolve_model(BUNDLED_MODEL, cache_dir=cache_dir), AuditConfig())


@dataclass(frozen=True, slots=True)
class Terms:
    """What the client does, and for how long at most."""

    generations: int = 200
    new_tokens: int = 32
    audit_rate: float | None = None
    flood: float = 0.0  # messages a second
    seconds: float = math.inf
    devices: tuple[str, ...] = ("auto",)  # of the nodes, in turns
    thin: bool = False  # hops embed and draw


@dataclass(frozen=True, slots=True)
class Spent:
    """Processor seconds of everything so far, and how often nodes were asked for an opinion."""

    nodes_s: float
    audits_s: float
    opinions: int
    found: int  # liars

    def since(self, before: Spent) -> Spent:
        """What came after `before`."""
        return Spent(
            self.nodes_s - before.nodes_s,
            self.audits_s - before.audits_s,
            self.opinions - before.opinions,
            self.found - before.found,
        )


@dataclass
class Told:
    """One generation and what the ledger thought then."""

    result: GenerationResult
    prompt: str
    over_liar: bool  # one was on its route
    lied_to: bool  # and lied
    until: Spent  # from the beginning of all texts to the end of this one


async def generate_all(
    client: Client,
    nodes: Sequence[NodeProcess],
    terms: Terms,
    found_after: dict[str, int],
    verifier: ItemizingVerifier,
) -> list[Told]:
    """Texts one after the other; `found_after` gets the sessions that each banned node had by then."""
    cheats = {node.peer_id: node.cheat for node in nodes if node.lies}
    told: list[Told] = []
    used_by: Counter[str] = Counter()
    count, new_tokens, started = terms.generations, terms.new_tokens, trio.current_time()
    for number in range(count):
        if trio.current_time() - started > terms.seconds:
            print(f"out of time after {number} generations", file=sys.stderr)
            break
        if number % 20 == 0:
            so_far = ", ".join(f"{cheats.get(who, 'HONEST')} {n}" for who, n in found_after.items())
            print(f"{number} of {count}: {client.audits}; found: {so_far or 'nobody'}", file=sys.stderr)
        opening = OPENINGS[number % len(OPENINGS)]
        prompt = opening.format(HEROES[number // len(OPENINGS) % len(HEROES)])
        generation = client.generate(prompt, max_new_tokens=new_tokens)
        used: set[str] = set()
        before = [node.begun_lies for node in nodes]
        async for _ in generation:
            used |= {hop.peer_id for hop in generation.result.route}
        used_by.update(used)
        lied = [
            node.peer_id in used and (not node.chooses or node.begun_lies > was)
            for node, was in zip(nodes, before, strict=True)
            if node.lies
        ]
        note_found(client, used_by, found_after, number + 1)
        spent = spent_by(client, nodes, verifier, len(found_after))
        told.append(Told(generation.result, prompt, bool(used & {*cheats}), any(lied), spent))
    await client.audits_settled()
    note_found(client, used_by, found_after, len(told))
    told[-1].until = spent_by(client, nodes, verifier, len(found_after))
    return told


def spent_by(client: Client, nodes: Sequence[NodeProcess], verifier: ItemizingVerifier, found: int) -> Spent:
    opinions = sum(sum(node.sessions.values()) for node in nodes)
    opinions -= sum(node.sessions.get(client.member.peer_id, 0) for node in nodes)
    return Spent(sum(node.cpu_s() for node in nodes), verifier.spent_s, opinions, found)


def note_found(client: Client, used_by: Counter[str], found_after: dict[str, int], number: int) -> None:
    for each in {who for who in used_by if client.ledger.is_banned(who)} - {*found_after}:
        found_after[each] = used_by[each]
        why = client.ledger.account(each).ban
        print(f"after {number}, {used_by[each]} of its sessions: {each} banned: {why}", file=sys.stderr)


async def price_of_opinion(client: Client, nodes: Sequence[NodeProcess]) -> float:
    """Processor seconds of a node for a session of one step, about as long as the generations were."""
    before, hops = sum(node.cpu_s() for node in nodes), 0
    for _ in range(ASKED_FOR_PRICE):
        generation = client.generate(" ".join(OPENINGS[:4]).format(*HEROES), max_new_tokens=1)
        async for _ in generation:
            hops += len(generation.result.route)
    return (sum(node.cpu_s() for node in nodes) - before) / hops


def count_wrong(told: Sequence[Told]) -> list[int]:
    """Tokens of each generation that the published model would not have chosen, by a clear lead."""
    checkpoint = open_checkpoint(Path(p2pinfer.models.__path__[0], BUNDLED_MODEL), BUNDLED_MODEL)
    config = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 28)
    runner = open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), config)
    ends, tokenizer = load_embedding_and_head(checkpoint, config), load_tokenizer(checkpoint.folder)
    wrong: list[int] = []
    for each in told:
        ids = [*tokenizer.encode(each.prompt), *each.result.token_ids]
        chances = ends.logits(run_session(runner, ends.embed(ids[:-1]))).softmax(-1)
        chances = chances[each.result.prompt_tokens - 1 :]
        chosen = chances.gather(1, torch.tensor(each.result.token_ids)[:, None])[:, 0]
        wrong.append(int((chances.amax(-1) - chosen > LEAD).sum()))
    return wrong


async def contest(cheats: Sequence[str], terms: Terms) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        verifier = new_verifier(home / "cache")
        client = Client(
            host_config=HostConfig(listen=("/ip4/127.0.0.1/tcp/0",)),
            data_dir=home / "client",
            cache_dir=home / "cache",
            audit=AuditConfig(rate=terms.audit_rate),
            config=ClientConfig(thin="on" if terms.thin else "off"),
            verifier=verifier,
        )
        async with (
            client,
            open_nodes(home, client.member.addrs, cheats, terms.devices) as nodes,
            flooded(client.member.addrs[0], terms.flood),
        ):
            with trio.fail_after(60):
                while len(client.peers()) < len(nodes):
                    await trio.sleep(0.1)
            liars = [node.peer_id for node in nodes if node.lies]
            async with open_bystander(home / "early", liars, client.member.addrs) as early:
                before = [node.cpu_s() for node in nodes]
                client_before, started = time.process_time(), time.perf_counter()
                found_after: dict[str, int] = {}
                told = await generate_all(client, nodes, terms, found_after, verifier)
                seconds, client_s = time.perf_counter() - started, time.process_time() - client_before
                spent = [node.cpu_s() - was for node, was in zip(nodes, before, strict=True)]
                verifier_s, audits, items = verifier.spent_s, client.audits, verifier.itemized()
                others = [await early.ask()]
            opinion_s = await price_of_opinion(client, nodes)
            addrs = nodes[-1].addrs
            async with open_bystander(home / "late", liars, addrs) as late:
                others.append(await late.ask())
        found = summary(
            client, nodes, told, audits, verifier_s, spent, opinion_s, client_s, seconds, others, found_after
        )
        return found | {"audits' items": items}


def summary(
    client: Client,
    nodes: Sequence[NodeProcess],
    told: Sequence[Told],
    audits: AuditTally,
    verifier_s: float,
    spent: Sequence[float],
    opinion_s: float,
    client_s: float,
    seconds: float,
    others: Sequence[dict[str, Any]],
    found_after: dict[str, int],
) -> dict[str, Any]:
    liars = {node.peer_id for node in nodes if node.lies}
    honest = {node.peer_id for node in nodes} - liars
    banned = {node.peer_id for node in nodes if client.ledger.is_banned(node.peer_id)}
    lengths = [len(each.result.token_ids) for each in told]
    wrong = count_wrong(told)
    lied_to = [length if each.lied_to else 0 for each, length in zip(told, lengths, strict=True)]
    own = sum(node.tokens.get(client.member.peer_id, 0) for node in nodes)
    bystanders_s = sum(other["spent_s"] for other in others)
    half = len(told) // 2
    late = told[-1].until.since(told[half].until)
    late_bystanders_s = bystanders_s if late.found else 0.0
    opinions_s = told[-1].until.opinions * opinion_s
    extra_s = verifier_s + bystanders_s + opinions_s
    serving_s = sum(spent) - opinions_s
    late_extra_s = late.audits_s + late_bystanders_s + late.opinions * opinion_s
    late_serving_s = late.nodes_s - late.opinions * opinion_s
    return {
        "cheats": " ".join(node.cheat for node in nodes if node.lies),
        "generations": len(told),
        "tokens": sum(lengths),
        "chosen": sum(each.over_liar for each in told),
        "by liars": sum(lied_to),
        "wrong": sum(wrong),
        "by liars, last half": sum(lied_to[half:]),
        "wrong, last half": sum(wrong[half:]),
        "found after": " ".join(str(found_after.get(node.peer_id, "never")) for node in nodes if node.lies),
        "banned": f"{len(banned & liars)} of {len(liars)}",
        "by bystanders": ", ".join(f"{len({*other['banned']} & liars)} of {len(liars)}" for other in others),
        "honest banned": sum(
            len(each & honest) for each in (banned, *({*other["banned"]} for other in others))
        ),
        "others banned": sum(map(client.ledger.is_banned, client.ledger.peers())) - len(banned),
        "audits": audits.done,
        "suspect": audits.suspect,
        "no result": audits.inconclusive,
        "serving s": round(serving_s, 1),
        "audits s": round(verifier_s, 2),
        "earned s": round(client._auditor.budget.earned_s, 2) if client._auditor else 0.0,  # pyright: ignore[reportPrivateUsage]
        "bystanders s": round(bystanders_s, 2),
        "opinions s": round(opinions_s, 2),
        "extra": f"{extra_s / serving_s:.2%}",
        "extra, last half": f"{late_extra_s / late_serving_s:.2%}",
        "client s": round(client_s, 1),
        "seconds": round(seconds),
        "shares": " ".join(f"{node.tokens.get(client.member.peer_id, 0) / own:.2f}" for node in nodes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cheat", nargs="*", default=["int8", "skip"], help="of as many nodes, at most six")
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--audit-rate", type=float, help="the adaptive one by default")
    parser.add_argument("--flood", type=float, default=0.0, help="messages a second; see flood.py")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after which no further text is begun"
    )
    parser.add_argument("--device", nargs="+", default=["auto"], help="of the nodes, in turns")
    parser.add_argument("--thin", action="store_true", help="hops at the ends embed and draw")
    parser.add_argument("--stand-by", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    gc.freeze()  # as the command line does; there is more of it here, since transformers is imported
    if options.stand_by:
        home, liars, *addrs = options.stand_by
        trio.run(stand_by, Path(home), liars.split(",") if liars else [], addrs)
        return
    torch.set_num_threads(1)
    terms = Terms(
        options.generations,
        options.new_tokens,
        options.audit_rate,
        options.flood,
        options.seconds,
        tuple(options.device),
        options.thin,
    )
    row = trio.run(contest, options.cheat, terms)
    if row["cheats"] and not row["chosen"]:
        print("no liar was ever chosen: the row says nothing about audits", file=sys.stderr)
    liars = sum(each.strip("-") not in ("", "slow") for each in options.cheat)
    report(f"{liars} of six nodes lie", [row])


if __name__ == "__main__":
    main()
