"""A swarm of peers, some of them malicious, and the clients that find out; for reputation_sim.py.

What decides here is what decides in production: `Ledger` keeps what clients see, `RiskAdjusted` and the
planner choose their routes, `AuditDraw` the hops that are checked and how closely, `choose_auditors` and
`compare_elsewhere` what peers say where the blocks do not fit, `weigh_proof` whose proofs are looked at,
`attest` whose opinions count. Simulated are the peers, their network, and the outcome of re-executing a span,
whose error rates are those of detect_cheats.py and calibrate_audit.py.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from p2pinfer.audit.draw import AuditDraw
from p2pinfer.audit.examiner import TRIAL_EVERY_S
from p2pinfer.audit.opinions import MOST_OPINIONS, compare_elsewhere
from p2pinfer.audit.second_opinion import choose_auditors
from p2pinfer.client_config import AuditConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.protocol.tensors import encode_hidden
from p2pinfer.reputation.attestation import Attestation, Opinion, seal_attestation
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.proofs import ProofDecision
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Receipt, digest_of
from p2pinfer.reputation.verdict import Verdict
from p2pinfer.routing.address_ranges import ranges_of
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.coordinates import Coordinate, distance_ms
from p2pinfer.routing.cost import route_cost
from p2pinfer.routing.policy import Fastest, RiskAdjusted, RoutingPolicy, ask_policy
from p2pinfer.routing.route import Candidate, Route, RouteRequest

REVISION = "0" * 32
NUM_BLOCKS = 4
STAGES = tuple(BlockSpan(block, block + 1) for block in range(NUM_BLOCKS))
ROUND_S = 300.0  # every client has one session in each
ATTEST_EVERY = 12  # rounds
SESSIONS_AT_ONCE = 2  # that a peer has cache for
TOKENS = 200  # of a session
AUDIT_COST = 0.08  # of having served what is run again: three prefills instead of decoding
GLANCE = 1 / 6  # of that: one of them, of half of the session on the mean
HIDDEN_SIZE = 64
WRONG, WRONG_TOGETHER, RIGHT = "wrong", "wrong together", "right"


@dataclass(frozen=True, slots=True)
class Attack:
    """What the malicious peers do.

    Attributes:
        wrong: Share of the sessions in which a peer's output is wrong.
        honest_first: Sessions that it serves well before.
        colludes: They recognise each other's work when asked as auditors, and give the same wrong output.
        withholds: They hand out no evidence of wrong output; their neighbours still may.
        rejoins: Banned by half of the clients, a peer comes back under a new name: in its old address range,
            or in a new one.
        lies: They publish false opinions, and proofs that prove nothing, under a new name each.
        remote: Share of the clients whose memory does not hold a span: they have it run by two other peers.
    """

    wrong: float = 1.0
    honest_first: int = 0
    colludes: bool = False
    withholds: bool = False
    rejoins: str = ""
    lies: bool = False
    remote: float = 0.0


@dataclass(frozen=True, slots=True)
class Defence:
    """What the clients do about it.

    Attributes:
        weighs: Routes are chosen by what is known of peers; otherwise everybody is believed.
    """

    weighs: bool = True
    audits: bool = True
    shares: bool = True  # proofs and opinions


@dataclass(frozen=True, slots=True)
class Odds:
    """How often re-executing a span is mistaken."""

    detects: float = 0.99
    false_alarm: float = 1e-4


@dataclass(slots=True)
class Peer:
    """One identity."""

    candidate: Candidate
    malicious: bool
    served: int = 0
    wrong: int = 0  # sessions it spoilt
    gone_at: int | None = None  # the round in which half of the clients had banned it

    @property
    def peer_id(self) -> str:
        return self.candidate.peer_id


@dataclass(slots=True)
class Client:
    """One user, with a ledger and a policy of its own."""

    name: str
    place: Coordinate
    ledger: Ledger
    policy: RoutingPolicy
    holds_spans: bool
    draw: AuditDraw
    tried: dict[str, float] = field(default_factory=dict)  # peers that others voted on for a proof, and when


@dataclass(slots=True)
class Tally:
    """One round, over all clients."""

    sessions: int = 0
    corrupted: int = 0
    thin_sessions: int = 0  # of clients that cannot hold a span
    thin_corrupted: int = 0
    hops: int = 0
    audits: float = 0.0  # spans that were run again, here or elsewhere
    proofs: int = 0  # of others, run again
    seconds: float = 0.0  # for a token, summed up over the sessions


@dataclass
class World:
    """The swarm and its clients; `step` is one session of each client."""

    attack: Attack
    defence: Defence
    rng: random.Random
    peers_count: int = 100
    malicious_share: float = 0.2
    absent: bool = False  # the malicious peers stay away: the best there can be
    clients_count: int = 16
    odds: Odds = field(default_factory=Odds)
    routing: RoutingConfig = field(default_factory=RoutingConfig)

    def __post_init__(self) -> None:
        self.round = 0
        self.born = 0
        self.peers: dict[str, Peer] = {}
        self.former: list[Peer] = []
        self._waiting: list[tuple[int, Peer]] = []
        self._proofs: list[tuple[str, str, str, bool]] = []  # address, accused, sender, whether it is true
        # Spread over the stages, so that honest peers hold every block.
        malicious = round(self.peers_count * self.malicious_share)
        for number in range(self.peers_count):
            peer = self.add_peer(STAGES[number % len(STAGES)], malicious=number < malicious)
            if peer.malicious and self.absent:
                del self.peers[peer.peer_id]
        self.clients = [self._new_client(number) for number in range(self.clients_count)]

    # ------------------------------------------------------------------ who is there

    def add_peer(
        self, span: BlockSpan, *, malicious: bool, tokens_per_s: float | None = None, address: str = ""
    ) -> Peer:
        """A peer more, somewhere; a malicious one is a fifth faster, since it does less."""
        self.born += 1
        speed = tokens_per_s or self.rng.lognormvariate(4.0, 0.4) * (1.2 if malicious else 1.0)
        address = address or f"/ip4/20.{self.born // 250}.{self.born % 250}.7/tcp/4001"
        announcement = Announcement(
            f"peer{self.born:04}",
            "model",
            REVISION,
            span,
            "bfloat16",
            speed,
            1 << 20,
            1,
            "public",
            (address,),
            self._somewhere(),
        )
        peer = Peer(Candidate(announcement), malicious)
        self.peers[peer.peer_id] = peer
        return peer

    def _new_client(self, number: int) -> Client:
        rng = random.Random(self.rng.random())
        adjusted = RiskAdjusted(self.routing, rng=rng, alternatives=1)  # only the first is walked here
        ledger = Ledger()
        return Client(
            f"client{number}",
            self._somewhere(),
            ledger,
            adjusted if self.defence.weighs else Fastest(self.routing),
            self.rng.random() >= self.attack.remote,
            AuditDraw(ledger, AuditConfig(), lambda: self.round * ROUND_S, self.rng),
        )

    def _somewhere(self) -> Coordinate:
        """One of three continents, 40 to 110 ms apart, and a home's access link."""
        x, y = self.rng.choice(((0.0, 0.0), (40.0, 10.0), (-30.0, 90.0)))
        gauss = self.rng.gauss
        return Coordinate(x + gauss(0, 8), y + gauss(0, 8), 0.0, self.rng.uniform(1, 10), 0.1)

    # ------------------------------------------------------------------ one round

    def step(self) -> Tally:
        """One session of every client, and what they tell each other after it."""
        tally = Tally()
        now = self.round * ROUND_S
        self._bring_back()
        if self.defence.shares:
            self._spread_proofs(now, tally)
            if self.round % ATTEST_EVERY == ATTEST_EVERY - 1:
                self._spread_opinions(now)
        self._free = dict.fromkeys(self.peers, SESSIONS_AT_ONCE)
        for client in self.rng.sample(self.clients, len(self.clients)):
            self._session(client, now, tally)
        self._send_away()
        self.round += 1
        return tally

    def route_of(self, client: Client, now: float) -> Route:
        """What the client's policy chooses."""
        client.ledger.advance(now)
        candidates = [
            self._seen_by(client, peer.candidate)
            for peer_id, peer in self.peers.items()
            if self._free[peer_id] > 0
        ]
        for candidate in candidates:
            if candidate.found_in and client.ledger.is_banned(candidate.peer_id):
                client.ledger.note_ranges(candidate.peer_id, candidate.found_in, now)
        return ask_policy(client.policy, candidates, self._request(client), client.ledger)[0]

    def _session(self, client: Client, now: float, tally: Tally) -> None:
        route = self.route_of(client, now)
        chosen = self._toss(client, route)
        outputs = [self._serve(self.peers[peer_id]) for peer_id in route.peer_ids]
        tally.sessions += 1
        tally.hops += len(outputs)
        tally.corrupted += any(output != RIGHT for output in outputs)
        if not client.holds_spans:
            tally.thin_sessions += 1
            tally.thin_corrupted += any(output != RIGHT for output in outputs)
        tally.seconds += self._cost(client, route)
        for peer_id in route.peer_ids:
            self._free[peer_id] -= 1
            client.draw.budget.earn(1.0)
            client.ledger.record_success(peer_id, now)
        for index, peer_id in enumerate(route.peer_ids):
            if peer_id in chosen and not client.ledger.is_banned(peer_id):
                self._audit(client, route, outputs, index, now, tally)

    def _toss(self, client: Client, route: Route) -> set[str]:
        return {*client.draw.toss(route)} if self.defence.audits else set()

    def _serve(self, peer: Peer) -> str:
        peer.served += 1
        attack = self.attack
        if not peer.malicious or peer.served <= attack.honest_first or self.rng.random() >= attack.wrong:
            return RIGHT
        peer.wrong += 1
        return WRONG_TOGETHER if attack.colludes else WRONG

    # ------------------------------------------------------------------ audits

    def _audit(
        self, client: Client, route: Route, outputs: Sequence[str], index: int, now: float, tally: Tally
    ) -> None:
        peer_id = route.peer_ids[index]
        if self._is_withheld(route, outputs, index):
            client.ledger.record_audit(peer_id, Verdict.INCONCLUSIVE, now, withheld=True)
            return
        before = tally.audits
        verdict = self._verdict(client, route, outputs[index], index, now, tally)
        client.draw.pay(peer_id, AUDIT_COST * (tally.audits - before))
        client.draw.budget.count_audit()
        contradicted = verdict is Verdict.SUSPECT and not client.holds_spans
        client.ledger.record_audit(peer_id, verdict, now, contradicted=contradicted)
        if verdict is Verdict.FAIL:
            address = hashlib.blake2b(f"{client.name}{peer_id}{now}".encode(), digest_size=16).hexdigest()
            client.ledger.add_proof(address, peer_id, now, verified=True)
            # Whoever runs a span again runs the same reference, so all share what one gets wrong.
            self._proofs.append(
                (address, peer_id, client.name, client.holds_spans or outputs[index] != RIGHT)
            )

    def _is_withheld(self, route: Route, outputs: Sequence[str], index: int) -> bool:
        """Whether what lies between two hops is in nobody's hands who gives it: the client has both ends."""
        if not self.attack.withholds or outputs[index] == RIGHT:
            return False
        beside = [each for each in (index - 1, index + 1) if 0 <= each < len(route.hops)]
        return any(outputs[each] != RIGHT for each in beside)

    def _verdict(
        self, client: Client, route: Route, output: str, index: int, now: float, tally: Tally
    ) -> Verdict:
        """As `Judge.judge` (p2pinfer/audit/judge.py) comes to it."""
        if client.holds_spans:
            wrong = output != RIGHT
            tally.audits += GLANCE if client.draw.is_glance(route.peer_ids[index]) and not wrong else 1
            if self.rng.random() >= (self.odds.detects if wrong else self.odds.false_alarm):
                return Verdict.PASS
            tally.audits += 2
            return (
                Verdict.FAIL if self._opinions(client, route, index)[:1] in ([], [RIGHT]) else Verdict.SUSPECT
            )
        hop = route.hops[index]
        lead = 1 if client.draw.is_glance(hop.peer_id) else 2
        return self._vote(client, self.peers[hop.peer_id], output, route.peer_ids, lead, now, tally)

    def _vote(
        self,
        client: Client,
        accused: Peer,
        output: str,
        avoided: Sequence[str],
        lead: int,
        now: float,
        tally: Tally,
    ) -> Verdict:
        """As `Judge.judge_elsewhere` comes to it, with what it costs those who were outvoted."""
        verdict, asked = Verdict.INCONCLUSIVE, self._auditors(client, accused, avoided)[:MOST_OPINIONS]
        opinions: list[str] = []
        for auditor in asked:
            opinions.append(self._opinion(auditor, accused))
            tally.audits += 1
            verdict, outvoted = _elsewhere(output, *opinions, lead=lead)
            if verdict is not Verdict.INCONCLUSIVE:
                for each in outvoted:
                    client.ledger.record_audit(asked[each].peer_id, Verdict.SUSPECT, now, contradicted=True)
                break
        return verdict

    def _opinions(self, client: Client, route: Route, index: int, most: int = 2) -> list[str]:
        """What the peers give that are asked to run a span again."""
        accused = self.peers[route.peer_ids[index]]
        able = self._auditors(client, accused, route.peer_ids)
        return [self._opinion(auditor, accused) for auditor in able[:most]]

    def _auditors(self, client: Client, accused: Peer, avoided: Sequence[str]) -> list[Peer]:
        record = _record(RIGHT, accused.peer_id, accused.candidate.announcement.span)
        known = [peer.candidate.announcement for peer in self.peers.values()]
        able = choose_auditors(known, record, client.ledger, avoided, self.rng)
        return [self.peers[each.peer_id] for each in able]

    def _opinion(self, auditor: Peer, accused: Peer) -> str:
        """An auditor does not know that it is one, unless it is told what the accused was given."""
        if not auditor.malicious:
            return RIGHT
        if self.attack.lies:
            return RIGHT if accused.malicious and not self.attack.colludes else WRONG_TOGETHER
        if self.attack.colludes:
            return WRONG_TOGETHER if accused.malicious else RIGHT
        return self._serve(auditor)

    # ------------------------------------------------------------------ what goes round

    def _spread_proofs(self, now: float, tally: Tally) -> None:
        proofs, self._proofs = self._proofs, []
        if self.attack.lies:
            proofs += self._lies()
        self.rng.shuffle(proofs)
        for client in self.clients:
            for address, accused, sender, is_true in proofs:
                if sender == client.name:
                    continue
                decision = client.ledger.weigh_proof(address, accused, sender, now)
                if decision is not ProofDecision.FETCH:
                    continue
                if client.holds_spans:
                    tally.proofs += 1
                    client.ledger.add_proof(address, accused, now, verified=is_true, sender=sender)
                elif accused in self.peers:
                    self._try_by_vote(client, address, accused, sender, is_true, now, tally)

    def _try_by_vote(
        self,
        client: Client,
        address: str,
        accused: str,
        sender: str,
        is_true: bool,
        now: float,
        tally: Tally,
    ) -> None:
        """As `Examiner` has others look at a proof (p2pinfer/audit/examiner.py)."""
        if now - client.tried.get(accused, -1e9) < TRIAL_EVERY_S:
            return
        if not client.ledger.account(accused).is_met or not client.draw.budget.has_for_votes:
            return
        client.tried[accused], before = now, tally.audits
        lie = WRONG_TOGETHER if self.attack.colludes else WRONG
        verdict = self._vote(client, self.peers[accused], lie if is_true else RIGHT, (), 2, now, tally)
        client.draw.budget.pay_vote(AUDIT_COST * (tally.audits - before))
        if verdict is Verdict.SUSPECT:
            client.ledger.record_audit(accused, verdict, now, contradicted=True, accused=True)
        elif verdict is Verdict.PASS:
            client.ledger.add_proof(address, accused, now, verified=False, sender=sender)

    def _lies(self) -> list[tuple[str, str, str, bool]]:
        """One from every malicious peer and round, against somebody honest, under a name of its own."""
        honest = [peer.peer_id for peer in self.peers.values() if not peer.malicious]
        liars = [peer for peer in self.peers.values() if peer.malicious]
        return [
            (f"lie{self.round}.{number}", self.rng.choice(honest), f"liar{self.round}.{number}", False)
            for number in range(len(liars))
        ]

    def _spread_opinions(self, now: float) -> None:
        told = [
            seal_attestation(client.ledger.own_opinions(client.name, now), _sign(client.name))
            for client in self.clients
        ]
        if self.attack.lies or self.attack.colludes:
            told += [self._false_opinions(peer, now) for peer in self.peers.values() if peer.malicious]
        for client in self.clients:
            for record in told:
                client.ledger.attest(record, _is_signed, now)

    def _false_opinions(self, liar: Peer, now: float) -> bytes:
        """Praise of each other; of the honest, slander, or the truth from who wants to be heard."""
        of_honest = 0.0 if self.attack.lies else 0.95
        opinions = tuple(
            Opinion(peer.peer_id, 1.0 if peer.malicious else of_honest, 1e6) for peer in self.peers.values()
        )
        said = Attestation(1, liar.peer_id, now, opinions)
        return seal_attestation(said, _sign(liar.peer_id))

    def banned_by(self, peer_id: str) -> int:
        """How many clients do not use the peer."""
        return sum(client.ledger.is_banned(peer_id) for client in self.clients)

    def _send_away(self) -> None:
        """Who is banned by half of the clients has lost what it came for."""
        for peer in [each for each in self.peers.values() if each.malicious and each.gone_at is None]:
            if 2 * self.banned_by(peer.peer_id) > len(self.clients):
                peer.gone_at = self.round
                if self.attack.rejoins:
                    self._waiting.append((self.round + 20, peer))

    def _bring_back(self) -> None:
        due = [peer for at, peer in self._waiting if at <= self.round]
        self._waiting = [(at, peer) for at, peer in self._waiting if at > self.round]
        for peer in due:
            self.former.append(self.peers.pop(peer.peer_id))
            said = peer.candidate.announcement
            address = said.addrs[0] if self.attack.rejoins == "same range" else ""
            self.add_peer(said.span, malicious=True, tokens_per_s=said.tokens_per_s, address=address)

    # ------------------------------------------------------------------ how far, how fast

    def _seen_by(self, client: Client, candidate: Candidate) -> Candidate:
        place = candidate.announcement.coordinate
        assert place is not None
        found_in = ranges_of(candidate.announcement.addrs)  # nobody announces what is not its own
        return Candidate(candidate.announcement, distance_ms(client.place, place), found_in=found_in)

    def _request(self, client: Client) -> RouteRequest:
        spoilt = client.ledger.spoilt_ranges(self.round * ROUND_S)
        return RouteRequest(
            REVISION, NUM_BLOCKS, 2 * 1024, TOKENS, coordinate=client.place, spoilt_ranges=spoilt
        )

    def _cost(self, client: Client, route: Route) -> float:
        used = [self._seen_by(client, self.peers[peer_id].candidate) for peer_id in route.peer_ids]
        return route_cost(route, used, self._request(client), None, self.routing)


def _sign(author: str):
    return lambda payload: hashlib.blake2b(payload, key=author.encode(), digest_size=64).digest()


def _is_signed(author: str, payload: bytes, signature: bytes) -> bool:
    return _sign(author)(payload) == signature


@cache
def _elsewhere(output: str, *opinions: str, lead: int) -> tuple[Verdict, tuple[int, ...]]:
    """What `compare_elsewhere` says of such outputs, over 32 tokens of noise, and who was outvoted."""
    span = STAGES[0]
    record, *others = (_record(each, str(number), span) for number, each in enumerate((output, *opinions)))
    vote = compare_elsewhere(record, others, HIDDEN_SIZE, lead)
    return vote.finding.verdict, vote.outvoted


@cache
def _record(output: str, peer_id: str, span: BlockSpan) -> HopRecord:
    source = torch.Generator().manual_seed(7)
    given = torch.randn(32, HIDDEN_SIZE, generator=source)
    returned = torch.tanh(given) * 3
    if output != RIGHT:
        source.manual_seed(8 if output == WRONG_TOGETHER else zlib.crc32(peer_id.encode()))
        returned = returned + 0.1 * torch.randn(32, HIDDEN_SIZE, generator=source)
    payloads = encode_hidden(given, "bfloat16"), encode_hidden(returned, "bfloat16")
    into, out = map(digest_of, payloads)
    receipt = Receipt(
        RECEIPT_VERSION,
        bytes(16),
        0,
        NO_RECEIPT,
        REVISION,
        span.start,
        span.stop,
        0,
        32,
        32,
        0,
        "bfloat16",
        "bfloat16",
        into,
        out,
        bytes(16),
    )
    return HopRecord(peer_id, (b"",), (receipt,), {into: payloads[0], out: payloads[1]})
