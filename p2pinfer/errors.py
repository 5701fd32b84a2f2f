"""Errors, as a tree by who has to act: this side, a peer, or the network.

`LocalError` is ours: a wrong flag, a missing file, no room left. `PeerError` is theirs: a peer broke
the protocol, refused, vanished or computed nonsense; it feeds routing and reputation. `NoRoute` is
nobody's: the swarm, as far as it is known, cannot serve the request.

Every message says what happened, to whom, and what to do next; the command line prints it as is.
"""

from collections.abc import Sequence


class P2PInferError(Exception):
    """Base of every error that p2pinfer raises on purpose."""


class LocalError(P2PInferError):
    """This process was misused or lacks something."""


class ConfigError(LocalError):
    """A flag, environment variable or configuration file says something that cannot be used."""


class DataDirInUse(LocalError):
    """Another node uses the data directory."""


class ModelNotFound(LocalError):
    """A model id or folder names nothing that can be opened."""


class CheckpointError(LocalError):
    """A checkpoint is there but cannot be used: unreadable, truncated, or of an unknown family."""


class ChatTemplateError(LocalError):
    """A model's chat template refuses a conversation, is broken, or takes more time or memory than it may."""


class ModelChanged(CheckpointError):
    """A model's files are not what they were when they were hashed, so nothing is computed with them."""


class SpanOutOfRange(LocalError):
    """A span of blocks lies outside the model."""


class PromptTooLong(LocalError):
    """The prompt and the tokens asked for do not fit the model's context."""


class AddressUnusable(LocalError):
    """An address to listen on is malformed, taken, or not of this machine."""


class IdentityTaken(LocalError):
    """Another process runs under this node's identity, and has done so for longer."""


class CacheFull(LocalError):
    """The KV cache has no room for another reservation; what is there is unchanged."""


class OutOfMemory(LocalError):
    """This process was refused memory, by the machine, by a limit on it, or by a card."""


class PolicyError(LocalError):
    """A routing policy cannot be loaded, raised, or returned something that is no route."""


class PeerError(P2PInferError):
    """A peer failed us. `peer_id` says which one, or is empty where it is not known.

    `told_by` is its neighbour in a route where there is nothing but the neighbour's word for it; else empty.
    """

    def __init__(self, message: str, peer_id: str = "", *, told_by: str = "") -> None:
        super().__init__(message)
        self.peer_id = peer_id
        self.told_by = told_by

    @property
    def is_lasting(self) -> bool:
        """True if the peer will say the same again until somebody changes a setting."""
        return False


class PeerUnreachable(PeerError):
    """No address of the peer answered."""


class NotDialled(PeerUnreachable):
    """The peer was not dialled: its addresses are a stranger's word.

    `is_passing` says that there were too many such dials at the moment.
    """

    def __init__(self, message: str, peer_id: str = "", *, is_passing: bool = False) -> None:
        super().__init__(message, peer_id)
        self.is_passing = is_passing


class NotAdmitted(PeerUnreachable):
    """The peer is of another swarm than we are, or one of us is not on the other's list."""

    @property
    def is_lasting(self) -> bool:
        """See `PeerError.is_lasting`."""
        return True


class PeerVanished(PeerError):
    """The connection to the peer ended in the middle of something."""


class PeerRefused(PeerError):
    """The peer answered, and said no. `code` is one of `p2pinfer.node.protocol.messages.RefusalCode`.

    Or it is `not_admitted`, where the peer does not serve this client whatever it asks for, or `not_spoken`,
    where it does not know the protocol.
    `fits` is how many tokens of a session it would have room for; 0 if none, or if it does not say.
    """

    _PASSING = frozenset(("busy", "cache_full", "over_share"))
    _LASTING = frozenset(("wrong_model", "not_admitted", "not_spoken"))

    def __init__(
        self, message: str, peer_id: str = "", code: str = "", *, fits: int = 0, told_by: str = ""
    ) -> None:
        super().__init__(message, peer_id, told_by=told_by)
        self.code = code
        self.fits = fits

    @property
    def is_passing(self) -> bool:
        """True if the peer only lacks room at the moment: no fault of its, and worth asking again later."""
        return self.code in self._PASSING

    @property
    def is_lasting(self) -> bool:
        """See `PeerError.is_lasting`."""
        return self.code in self._LASTING


class ProtocolViolation(PeerError):
    """The peer sent bytes that its protocol does not allow."""


class Equivocation(ProtocolViolation):
    """The peer signed two different receipts for one step; `receipts` are both, and prove it to anybody."""

    def __init__(self, message: str, peer_id: str = "", receipts: tuple[bytes, ...] = ()) -> None:
        super().__init__(message, peer_id)
        self.receipts = receipts


class WrongOutput(PeerError):
    """The peer's output has the wrong shape or holds values that are not finite."""


class NoRoute(P2PInferError):
    """The swarm cannot serve the request.

    Attributes:
        missing: The spans that nobody serves, `(start, stop)`.
        is_full: Somebody serves every block, without room for so many tokens.
        reason: The message without what differs from one attempt to the next.
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[tuple[int, int]] = (),
        *,
        is_full: bool = False,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason
        self.missing = tuple(missing)
        self.is_full = is_full


class Unfinished(NoRoute):
    """A generation that has begun could not go on, also after waiting. What there is of it is in here.

    Attributes:
        text: All of the text so far.
        resume_token: What `Client.resume` and `p2pinfer generate --resume` take to go on from there.
    """

    def __init__(
        self, message: str, missing: Sequence[tuple[int, int]], text: str, resume_token: str
    ) -> None:
        super().__init__(message, missing)
        self.text = text
        self.resume_token = resume_token
