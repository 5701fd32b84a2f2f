"""A flood of notices, proofs and self-accusations against a node that serves and audits, and a client.

    python benchmarks/flood.py                              # a tenth of ten minutes at the full rate
    python benchmarks/flood.py --seconds 600 --rate 167     # 100,000 of them
    python benchmarks/flood.py --seconds 420 --rate 240 --quiet-s 60 --attackers 4 --out flood    # faster

Two `p2pinfer node` processes serve the bundled model on loopback, the first with `--verify`. A client makes
short texts over both and audits every hop. First nobody attacks, then processes with eight connections to the
verifying node publish: two of three messages are notices of proofs that nobody has; the
third has a proof behind it, true and as heavy as a session of 2,048 tokens, about a key that was made for it.
Each is by an author of its own.

Node and client begin with ledgers that know thirty honest peers and one liar, which was banned on a proof and
never met. All of that has to be there at the end. The shares of processor are of the node and of the client,
during the flood and before it; the difference is what the flood costs. An audit is on time if it is done
within ten seconds of its session.
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import trio
from contest import report
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

import p2pinfer.models
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.protocol.tensors import encode_hidden
from p2pinfer.node.swarm.gossipsub import topic_of
from p2pinfer.node.swarm.membership import SwarmMember, open_swarm
from p2pinfer.node.swarm.proof_gossip import Notice, encode_notice
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.proof import Proof, encode_proof
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Receipt, digest_of, sign_receipt
from p2pinfer.reputation.store import FILE_NAME
from p2pinfer.reputation.verdict import Verdict

CONNECTIONS = 8
STEPS, STEP_TOKENS = 64, 32  # of a self-accusation
HONEST, LIAR = tuple(f"honest{n}" for n in range(30)), "liar"
ON_TIME_S = 10.0
TEXTS_EVERY_S = 2.0


# ---------------------------------------------------------------------- the attacker


@dataclass(frozen=True)
class Tensors:
    """One input that is given back unchanged, for all steps of all proofs."""

    revision: str
    blocks: int
    encoded: bytes

    @property
    def digest(self) -> bytes:
        return digest_of(self.encoded)


def bundled() -> Tensors:
    checkpoint = open_checkpoint(Path(p2pinfer.models.__path__[0], BUNDLED_MODEL), BUNDLED_MODEL)
    hidden = torch.randn(STEP_TOKENS, checkpoint.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    encoded = bytes(encode_hidden(hidden.to(torch.bfloat16), "bfloat16"))
    return Tensors(checkpoint.spec.revision, checkpoint.spec.num_blocks, encoded)


def accuse_oneself(key: Identity, tensors: Tensors) -> bytes:
    """A true proof against a key of one's own: every step gave its input back."""
    session, nonce, previous = secrets.token_bytes(16), secrets.token_bytes(16), NO_RECEIPT
    signed: list[bytes] = []
    for number in range(STEPS):
        receipt = Receipt(
            RECEIPT_VERSION,
            session,
            number,
            previous,
            tensors.revision,
            0,
            tensors.blocks,
            number * STEP_TOKENS,
            STEP_TOKENS,
            STEP_TOKENS,
            0,
            "bfloat16",
            "bfloat16",
            tensors.digest,
            tensors.digest,
            nonce,
        )
        signed.append(sign_receipt(receipt, key.sign))
        previous = digest_of(signed[-1])
    return encode_proof(Proof(1, key.peer_id, "output", tuple(signed)))


async def publish(member: SwarmMember, key: Identity, notice: Notice) -> None:
    """Tell it in the name of `key`, whatever the rates of this process."""
    pubsub: Any = member._gossip.pubsub  # pyright: ignore[reportPrivateUsage]
    message = rpc_pb2.Message(
        data=seal(key, encode_notice(notice)),
        topicIDs=[topic_of(notice.revision)],
        from_id=ID.from_base58(key.peer_id).to_bytes(),
        seqno=secrets.token_bytes(8),
    )
    private: Any = key.key_pair.private_key
    message.signature = private.sign(b"libp2p-pubsub:" + message.SerializeToString())
    await pubsub.push_msg(pubsub.my_id, message)


async def attack(address: str, seconds: float, rate: float, connections: int = CONNECTIONS) -> None:
    """Publish over so many connections, each its part of the rate; prints how much."""
    tensors, told = bundled(), [0, 0]

    async def flood_one() -> None:
        with tempfile.TemporaryDirectory() as folder:
            config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
            async with open_swarm(new_identity(), config, [address], Path(folder)) as member:
                await member.join(tensors.revision)
                await trio.sleep(3.0)
                began_at, count = trio.current_time(), 0
                while (passed_s := trio.current_time() - began_at) < seconds:
                    if count > passed_s * rate / connections:
                        await trio.sleep(0.01)
                        continue
                    count += 1
                    await tell(member, heavy=count % 3 == 0)

    async def tell(member: SwarmMember, *, heavy: bool) -> None:
        key = new_identity()
        proof, size = secrets.token_bytes(32), 100_000
        if heavy:
            encoded = accuse_oneself(key, tensors)
            proof, size = digest_of(encoded), len(encoded) + len(tensors.encoded)
            contents = [(proof, encoded), (tensors.digest, tensors.encoded)]
            member.proofs.store.add(proof, contents, trio.current_time())
        told[heavy] += 1
        addrs = member.host.addrs[:4]
        extent = STEPS * STEP_TOKENS, tensors.blocks
        await publish(
            member, key, Notice("proof", tensors.revision, proof, key.peer_id, addrs, size, *extent)
        )

    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(flood_one)
    print(json.dumps({"notices of nothing": told[0], "self-accusations": told[1]}))


@asynccontextmanager
async def flooded(address: str, rate: float) -> AsyncGenerator[None]:
    """Somebody attacks the host at `address` until the block ends; nobody if the rate is 0."""
    if not rate:
        yield
        return
    command = [sys.executable, __file__, "--attack", address, "86400", str(rate), str(CONNECTIONS)]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


# ---------------------------------------------------------------------- the attacked


def seed_ledger(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ledger, now = Ledger.open(folder / FILE_NAME), time.time()
    for peer_id in HONEST:
        for _ in range(10):
            ledger.record_audit(peer_id, Verdict.PASS, now)
    ledger.add_proof("0" * 64, LIAR, now, verified=True, sender="somebody")
    ledger.close()


def lost_of(folder: Path) -> dict[str, Any]:
    """What of the seeded ledger is missing."""
    ledger = Ledger.open(folder / FILE_NAME)
    try:
        return {
            "honest records": sum(ledger.account(peer_id).passed == 10 for peer_id in HONEST),
            "liar banned": ledger.is_banned(LIAR),
            "banned": sum(map(ledger.is_banned, ledger.peers())),
        }
    finally:
        ledger.close()


@asynccontextmanager
async def open_node(
    home: Path, name: str, blocks: str, *words: str
) -> AsyncGenerator[tuple[trio.Process, str]]:
    """A node process and its address."""
    folder = home / name
    seed_ledger(folder)
    (folder / "config.toml").write_text("[compute]\nthreads = 1\n")
    command = [sys.executable, "-m", "p2pinfer", "node", "--json", "--until-stdin-closes", "--blocks", blocks]
    command += ["--data-dir", str(folder), "--listen", "/ip4/127.0.0.1/tcp/0", *words]
    with (folder / "stderr").open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=folder
        )
    ready, addresses = trio.open_memory_channel[str](1)

    async def listen() -> None:
        assert process.stdout is not None
        rest = b""
        async for received in process.stdout:
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["event"] == "ready":
                    await ready.send(event["addrs"][0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        try:
            with trio.fail_after(180):
                address = await addresses.receive()
            yield process, address
        finally:
            process.terminate()
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()


@dataclass
class Stretch:
    """What a stretch of time came to."""

    node_share: float
    client_share: float
    texts: int
    audits: int
    late: int
    slowest_audit_s: float


async def stretch(client: Client, node: psutil.Process, seconds: float) -> Stretch:
    """Make texts for so long, wait for their audits, and look at the processor."""

    def node_s() -> float:
        times = node.cpu_times()
        return times.user + times.system

    began_at, node_before, client_before = time.perf_counter(), node_s(), time.process_time()
    done, texts, late, slowest_s = client.audits.done, 0, 0, 0.0
    while time.perf_counter() - began_at < seconds:
        generation = client.generate(f"Once upon a time there was a cat number {texts}", max_new_tokens=24)
        async for _ in generation:
            pass
        texts += 1
        closed_at = time.perf_counter()
        await client.audits_settled()
        audit_s = time.perf_counter() - closed_at
        late, slowest_s = late + (audit_s > ON_TIME_S), max(slowest_s, audit_s)
        await trio.sleep(max(0.0, TEXTS_EVERY_S - audit_s))
    passed_s = time.perf_counter() - began_at
    return Stretch(
        (node_s() - node_before) / passed_s,
        (time.process_time() - client_before) / passed_s,
        texts,
        client.audits.done - done,
        late,
        slowest_s,
    )


def row(name: str, found: Stretch) -> dict[str, Any]:
    return {
        "": name,
        "node's share": f"{found.node_share:.1%}",
        "client's share": f"{found.client_share:.1%}",
        "texts": found.texts,
        "audits": found.audits,
        "late": found.late,
        "slowest audit s": round(found.slowest_audit_s, 2),
    }


@asynccontextmanager
async def attacked(
    address: str, seconds: float, rate: float, attackers: int
) -> AsyncGenerator[list[dict[str, int]]]:
    """Processes that share the connections and the rate; what each has told, once the block has ended."""
    told: list[dict[str, int]] = []
    words = (str(seconds), str(rate / attackers), str(max(1, CONNECTIONS // attackers)))
    command = [sys.executable, __file__, "--attack", address, *words]
    processes = [await trio.lowlevel.open_process(command, stdout=subprocess.PIPE) for _ in range(attackers)]
    try:
        yield told
        for process in processes:
            assert process.stdout is not None
            told.append(json.loads(b"".join([part async for part in process.stdout])))
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


def write(out: Path | None, name: str, found: object) -> None:
    """Keep a result at once, where the rest may not come."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


async def contest(options: argparse.Namespace) -> None:
    seconds, out = options.seconds, options.out
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        patrol = ("--verify", "--set", "verify.idle_s=2", "--set", "verify.pause_s=20")
        async with (
            open_node(home, "node", "0:5", *patrol) as (process, address),
            open_node(home, "other", "5:8", "--bootstrap", address),
        ):
            seed_ledger(home / "client")
            client = Client(
                bootstrap=[address],
                data_dir=home / "client",
                cache_dir=home / "cache",
                audit=AuditConfig(rate=1.0),
            )
            async with client:
                with trio.fail_after(60):
                    while len(client.peers()) < 2:
                        await trio.sleep(0.1)
                node = psutil.Process(process.pid)
                await stretch(client, node, 2 * TEXTS_EVERY_S)  # weights are loaded, connections made
                quiet = await stretch(client, node, min(seconds, options.quiet_s))
                write(out, "quiet", row("quiet", quiet))
                async with attacked(address, seconds, options.rate, options.attackers) as told:
                    await trio.sleep(4.0)
                    flooded = await stretch(client, node, seconds)
                    write(out, "flood", row("flood", flooded))
        ledgers = {each: lost_of(home / each) for each in ("node", "client")}
    published = {kind: sum(each[kind] for each in told) for kind in told[0]} | {"seconds": seconds}
    kept = [{"of": each, **found} for each, found in ledgers.items()]
    extra = flooded.node_share - quiet.node_share
    write(out, "end", {"published": published, "ledgers": kept, "of a processor for the flood": extra})
    report("before the flood and in it", [row("quiet", quiet), row("flood", flooded)])
    report("published", [published])
    report(f"ledgers, of {len(HONEST)} honest records", kept)
    print(f"the flood takes {extra:.1%} of a processor at the node", file=sys.stderr)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of the flood")
    parser.add_argument("--rate", type=float, default=167.0, help="messages a second, all together")
    parser.add_argument("--quiet-s", type=float, default=60.0, help="before it, at most")
    parser.add_argument("--attackers", type=int, default=1, help="processes that share rate and connections")
    parser.add_argument("--out", type=Path, help="folder for what comes, as it comes")
    parser.add_argument("--attack", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.attack:
        address, seconds, rate, connections = options.attack
        trio.run(attack, address, float(seconds), float(rate), int(connections))
    else:
        trio.run(contest, options)


if __name__ == "__main__":
    main()
