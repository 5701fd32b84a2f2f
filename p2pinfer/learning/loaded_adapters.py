"""Adapters of one client's texts, which audits of their sessions need after the texts have ended.

Nothing here imports torch until an adapter is loaded: a client without weights does without it.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import trio

from p2pinfer.folders import expand
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.network import Network
from p2pinfer.routing.route import Hop
from p2pinfer.session.terms import AT_ONCE

if TYPE_CHECKING:
    from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
    from p2pinfer.models.learning.adapter import Adapter
    from p2pinfer.node.swarm.membership import SwarmMember

    from .session_adapter import SessionAdapter
    from .trained_adapter import ModelAdapter

KEPT: Final = 4  # that nobody holds any more


class LoadedAdapters:
    """Adapters that were loaded, for audits of their sessions: the last ones, and all that are in use."""

    def __init__(self) -> None:
        self._last: deque[SessionAdapter] = deque(maxlen=KEPT)
        self._used: WeakSet[SessionAdapter] = WeakSet()
        self._bringing = trio.CapacityLimiter(AT_ONCE)  # since hops take few trainings at once

    async def load(self, asked: str | Path, ends: EmbeddingAndHead, member: SwarmMember) -> SessionAdapter:
        """One more, from a folder of peft's files, or that a peer offers under this id or name.

        Raises as `load_session_adapter` and `fetch_offered` do.
        """
        from .offered import fetch_offered, is_offered_by  # torch
        from .session_adapter import SessionAdapter, load_session_adapter, model_adapter

        folder, host = expand(asked), member.host
        if await trio.Path(folder).exists() or isinstance(asked, Path):
            adapter = await trio.to_thread.run_sync(load_session_adapter, folder, ends, host, self._bringing)
        else:
            offer, lora = await fetch_offered(asked, member, ends)

            def is_there(hop: Hop) -> bool:
                return is_offered_by(hop, offer.digest, member.announcements(ends.spec.revision))

            adapter = SessionAdapter(model_adapter(lora), ends, host, self._bringing, is_there)
        self._last.append(adapter)
        self._used.add(adapter)
        return adapter

    def take(self, adapter: ModelAdapter, ends: EmbeddingAndHead, host: Network) -> SessionAdapter:
        """One more, of values that are here."""
        from .session_adapter import SessionAdapter  # torch

        made = SessionAdapter(adapter, ends, host, self._bringing)
        self._last.append(made)
        self._used.add(made)
        return made

    def find(self, revision: str, span: BlockSpan) -> Adapter | None:
        """The one that `revision` names for `span`; hashes megabytes, so for a thread."""
        from p2pinfer.models.learning.brought import MARK  # torch

        base, _, name = revision.partition(MARK)
        for each in [*self._used] if name else []:
            if each.revision(base, span) == revision:
                return each.applied_to(span)
        return None
