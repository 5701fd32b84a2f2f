"""Inbox of a session: checks of the steps that come in, roll-backs, and what is in flight.

A step must follow from the ones before: its epoch may not fall, and it may not leave a gap. One of a higher
epoch rolls the session back to its position, so whatever was taken in before and begins there or later is
computed for nobody. What has been taken in and has not left the hop is in flight, and bounded: a peer that
sends more than it may is cut off rather than read slowly, because a reader that pauses for seconds makes
libp2p kill the connection under everybody.
"""

from __future__ import annotations

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.protocol.messages import Step


class Inbox:
    """Order and amount of one session's steps, which leave in the order in which they were taken in.

    Attributes:
        saw_nonfinite: Set when a step's values were not finite. No step is wanted any more.
        in_flight: How many steps were taken in and have not left.
    """

    def __init__(self, max_tokens: int, config: ServeConfig, packed: int = 0) -> None:
        """An inbox for positions below `max_tokens`, of which those below `packed` travel packed."""
        self.saw_nonfinite = False
        self.in_flight = 0
        self._bytes_in_flight = 0
        self._max_tokens = max_tokens
        self._config = config
        self._packed = packed
        self._epoch = 0
        self._expected_position = 0  # where the next step may begin at the latest
        self._roll_backs: list[tuple[int, int]] = []  # (epoch, position) of steps that superseded others

    def take(self, step: Step, payload_bytes: int, peer: str) -> None:
        """Take a step of `peer` in.

        Raises:
            ProtocolViolation: The step does not follow from the ones before, or is more than was agreed.
        """
        self._check(step, payload_bytes, peer)
        if step.epoch > self._epoch:
            # Steps leave in order, so a roll-back whose own step has left concerns nobody any more. The list
            # is replaced and never changed: the worker's thread may be reading it.
            latest = self._roll_backs[1 - self._config.max_steps_in_flight :]
            self._roll_backs = [*latest, (step.epoch, step.position)]
        self._epoch = step.epoch
        self._expected_position = step.position + step.tokens
        self.in_flight += 1
        self._bytes_in_flight += payload_bytes

    def is_superseded(self, step: Step) -> bool:
        """True if a step in flight need not be computed any more; asked in the worker's thread."""
        if self.saw_nonfinite or not self._roll_backs:
            return self.saw_nonfinite
        return any(step.epoch < epoch and step.position >= position for epoch, position in self._roll_backs)

    def let_go(self, payload_bytes: int) -> None:
        """Note that the oldest step in flight has left the hop, computed or not."""
        self.in_flight -= 1
        self._bytes_in_flight -= payload_bytes
        if not self.in_flight:
            self._roll_backs = []

    def _check(self, step: Step, payload_bytes: int, peer: str) -> None:
        config = self._config
        if step.epoch < self._epoch:
            raise ProtocolViolation(f"step {step.number} is of epoch {step.epoch} after {self._epoch}", peer)
        if step.position > self._expected_position:
            raise ProtocolViolation(
                f"step {step.number} begins at {step.position}, not at {self._expected_position}",
                peer,
            )
        if step.position + step.tokens > self._max_tokens:
            raise ProtocolViolation(
                f"step {step.number} ends at {step.position + step.tokens}, "
                f"past the {self._max_tokens} tokens reserved",
                peer,
            )
        if step.position < self._packed < step.position + step.tokens:
            raise ProtocolViolation(f"step {step.number} is packed in part", peer)
        if step.tokens > config.max_chunk_tokens or step.returns > step.tokens:
            raise ProtocolViolation(f"step {step.number} of {step.tokens} tokens is too long", peer)
        if self.in_flight >= config.max_steps_in_flight:
            raise ProtocolViolation(f"more than {config.max_steps_in_flight} steps in flight", peer)
        if self._bytes_in_flight + payload_bytes > config.max_bytes_in_flight:
            raise ProtocolViolation(f"more than {config.max_bytes_in_flight} bytes in flight", peer)
