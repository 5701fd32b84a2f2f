"""A pass that is run again by another peer, which does not know what for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.learning.rows import Rows
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.evidence.pass_record import PassRecord
from p2pinfer.node.host.host import HostConfig, open_host
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.span_adapter import SpanAdapter
from p2pinfer.node.protocol.train_tensors import decode_adapter_content, decode_call_content, decode_inputs
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.reputation.train_receipt import NOTHING
from p2pinfer.routing.route import Hop

from .link_opening import open_link
from .pass_receipts import Call


async def run_pass_elsewhere(
    hop: Hop, record: PassRecord, spec: ModelSpec, host_config: HostConfig, timeout_s: float
) -> PassRecord:
    """The pass of `record` as `hop` does it, asked for under an identity that is thrown away.

    Raises:
        PeerError: It cannot be reached, refuses, fails, or takes longer than `timeout_s`.
    """
    try:
        with trio.fail_after(timeout_s):
            call = await trio.to_thread.run_sync(_call_of, record, spec.hidden_size)
            async with open_host(new_identity(), host_config) as host:
                return await _run(host, hop, record, call, spec)
    except trio.TooSlowError as exc:
        raise PeerError(f"no second opinion in {timeout_s:g} s", hop.peer_id) from exc


@dataclass(slots=True)
class _Taken:
    """`PassWatch` that keeps what it is shown."""

    records: list[PassRecord] = field(default_factory=list[PassRecord])

    def passed(self, record: PassRecord, figures: Mapping[str, float]) -> None:
        self.records.append(record)

    def is_banned(self, peer_id: str) -> bool:
        return False


async def _run(host: Network, hop: Hop, record: PassRecord, call: Call, spec: ModelSpec) -> PassRecord:
    receipt, taken = record.receipt, _Taken()
    async with open_nursery() as nursery:
        link = await open_link(host, hop, spec, receipt.codec, taken)
        nursery.start_soon(link.read)
        try:
            if receipt.kind == "forward":
                await link.forward(call, keeps=False)
            else:
                # As a client does whose inputs are gone: a forward pass first would only take longer.
                wants = decode_call_content(record.contents[receipt.call]).wants_hidden
                gradient = bytes(record.contents[receipt.gradient])
                await link.backward(call, None, gradient, wants_hidden=wants)
        finally:
            with trio.CancelScope(shield=True):
                await link.close()
            nursery.cancel_scope.cancel()
    if not taken.records:
        raise ProtocolViolation("a second opinion without its receipt", hop.peer_id)
    return taken.records[0]


def _call_of(record: PassRecord, hidden_size: int) -> Call:
    receipt, contents = record.receipt, record.contents
    head = decode_call_content(contents[receipt.call])
    inputs = bytes(contents[receipt.input])
    rows: Rows
    rows, _ = decode_inputs(bytearray(inputs), head.lengths, hidden_size, receipt.codec)
    adapter: SpanAdapter | None = None
    if receipt.adapter != NOTHING:
        layout, values = decode_adapter_content(contents[receipt.adapter])
        adapter = SpanAdapter(
            tuple(layout.updates), layout.prompt_tokens, bytes(contents[values]), values, receipt.adapter
        )
    return Call(record.span, rows, inputs, adapter, head.seed)
