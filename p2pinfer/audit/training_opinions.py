"""Second opinions on training: other peers that are asked for the same pass."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncGenerator, Sequence
from typing import Final, Protocol

from p2pinfer.client_config import AuditConfig
from p2pinfer.errors import PeerError
from p2pinfer.node.evidence.pass_record import PassRecord
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.route import Hop

from .second_opinion import choose_auditors
from .training_audits import AskOthers

logger = logging.getLogger(__name__)

ASKED: Final = 3


class RunPass(Protocol):
    """Has `hop` run a pass of training again."""

    async def __call__(
        self, hop: Hop, record: PassRecord, *, host_config: HostConfig, timeout_s: float
    ) -> PassRecord:
        """Result of the hop, asked from a host of this config; PeerError if there is none."""
        ...


def opinions_by(
    run: RunPass | None,
    member: SwarmMember,
    ledger: Ledger,
    config: AuditConfig,
    host_config: HostConfig,
    rng: random.Random,
) -> AskOthers:
    """Asks peers that serve the blocks and had nothing to do with the training, `ASKED` of them at most."""

    async def ask(record: PassRecord, others: Sequence[str]) -> AsyncGenerator[PassRecord]:
        if run is None:
            return
        known = member.announcements(record.receipt.revision)
        avoided = (*others, *config.own_peers)
        for hop in choose_auditors(known, record, ledger, avoided, rng)[:ASKED]:
            try:
                opinion = await run(hop, record, host_config=host_config, timeout_s=config.timeout_s / 4)
            except PeerError as exc:
                logger.debug("training.no_opinion peer=%s why=%s", hop.peer_id, exc)
            else:
                yield opinion

    return ask
