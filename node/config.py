"""Settings of a node: what it serves, what it spends on others, how long it waits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

from p2pinfer.errors import ConfigError
from p2pinfer.folders import cache_folder, data_folder
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.announcement import MAX_PUBLIC_NAME, MAX_TTL_S, MIN_TTL_S

# Fields of which 0 refuses all, is a no, or leaves it to the node.
_MAY_BE_ZERO: Final = ("session_adapter_bytes", "ends", "train_bytes")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Limits of a serving node. Each is reached by a test."""

    max_sessions: int = 512  # sessions open at once
    max_sessions_per_client: int = 256  # sessions open at once of one client
    client_share: float = 0.75  # one client's limit, as a share of cache and replay log not held by others
    max_steps_in_flight: int = 48  # steps of one session that are received but not yet sent on
    max_bytes_in_flight: int = 64 << 20  # hidden states of those steps, bytes
    max_chunk_tokens: int = 1024  # tokens in one step
    max_batch_tokens: int = 512  # prefill tokens computed in one batch; decode steps ride along
    client_batch_steps: int = 32  # decode steps of one client in one batch, while another one waits
    replay_bytes: int = 1 << 30  # host memory for the replay logs of all sessions, bytes
    replay_bytes_per_session: int = 512 << 20  # of one session, bytes; a longer one is replayed upstream
    max_relinks: int = 64  # how often a client may replace this hop's successor in one session
    evidence_bytes: int = 256 << 20  # host memory for evidence, kept for auditors, bytes
    evidence_keep_s: float = 900.0  # how long evidence is kept after a session's last step, seconds
    # how long the cache and evidence of a session may be the beginning of its client's next one, seconds
    prefix_keep_s: float = 900.0
    proof_bytes: int = 128 << 20  # host memory for fraud proofs, our own and those of other peers, bytes
    proof_keep_s: float = 86400.0  # how long a proof is kept for peers that have not seen it, seconds
    max_train_sessions: int = 16  # clients that train at once
    max_train_sessions_per_client: int = 4  # training sessions open at once of one client
    train_tokens: int = 2048  # tokens in one microbatch
    train_in_flight: int = 4  # requests of one training session without an answer
    train_slice_s: float = 0.02  # of training after which others have their turn, seconds; one block at least
    # memory for what is kept for backward passes, bytes; 0: 1 GiB, on a GPU a quarter of what is free
    train_bytes: int = 0
    # memory for transposed weights while somebody trains, bytes; a quarter of what is free at most
    train_weight_bytes: int = 1 << 30
    client_adapter_bytes: int = 128 << 20  # one adapter of a client, for this node's blocks, bytes
    # of adapters that sessions and trainings hold at once, bytes; 0: no session may use one
    session_adapter_bytes: int = 1 << 30
    max_adapter_rank: int = 256  # of one low-rank update
    ends: bool = True  # hold embedding and head beside the first or last block, for clients without weights
    lease_s: float = 300.0  # a session idle this long is closed, seconds
    handshake_timeout_s: float = 10.0  # for a peer's first message or attachment, seconds
    dial_timeout_s: float = 10.0  # for connecting to a session's successor, seconds
    frame_timeout_s: float = 10.0  # for one frame, seconds; plus its size / min_bytes_per_s
    min_bytes_per_s: int = 16384  # bytes/s; a peer that sends or reads a frame more slowly is disconnected
    announce_interval_s: float = 60.0  # between announcements when nothing changes, seconds
    announce_ttl_s: float = 120.0  # how long an announcement is valid, seconds
    announce_min_gap_s: float = 5.0  # between announcements at least, seconds
    settle_s: float = 2.0  # how long a starting node waits for announcements before it picks a span, seconds
    leave_timeout_s: float = 3.0  # for telling the swarm that this node leaves, seconds
    drain_s: float = 8.0  # after that, for handing over running sessions, seconds
    public_name: str = ""  # what others see this node called, at most 32 characters; empty: its peer id alone

    def __post_init__(self) -> None:
        if len(self.public_name) > MAX_PUBLIC_NAME or not self.public_name.isprintable():
            raise ValueError(
                f"public_name is {self.public_name[:80]!r}; it has at most {MAX_PUBLIC_NAME} characters, all "
                "of which can be printed"
            )
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, str) or (each.name in _MAY_BE_ZERO and value == 0):
                continue
            if value <= 0:
                raise ValueError(f"{each.name} is {value:g}; it must be above 0")
        if self.client_share > 1:
            raise ValueError(
                f"client_share is {self.client_share:g}; it must be at most 1, which is everything"
            )
        if not MIN_TTL_S <= self.announce_ttl_s <= MAX_TTL_S:
            raise ValueError(
                f"announce_ttl_s is {self.announce_ttl_s:g}; peers accept {MIN_TTL_S:g} to {MAX_TTL_S:g}"
            )
        if self.announce_interval_s < self.announce_min_gap_s:
            raise ValueError(
                f"announce_interval_s is {self.announce_interval_s:g}, "
                f"which is less than announce_min_gap_s, {self.announce_min_gap_s:g}"
            )


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Settings of a node: what it serves, and where it keeps its files."""

    model: str = BUNDLED_MODEL  # hub id, folder, GGUF file, or the bundled model's name
    blocks: str | None = None  # serve exactly these, A:B; not set: the blocks that the swarm needs most
    num_blocks: int | None = None  # serve at most this many; not set: as many as fit
    adapters: tuple[str, ...] = ()  # folders of adapters, LoRA in peft's files, that are offered; 4 at most
    no_blocks: bool = False  # serve no blocks: only introduce peers to each other
    data_dir: Path = field(default_factory=data_folder)  # identity
    cache_dir: Path = field(default_factory=cache_folder)  # weights
    weights_bytes: int = 0  # disk that downloaded models may take there, bytes; 0: whatever is free
    bootstrap: tuple[
        str, ...
    ] = ()  # multiaddrs of peers to join the swarm through; empty: bootstrap_peers.txt
    metrics_port: int | None = None  # TCP port for Prometheus; 0: any that is free; not set: no metrics
    metrics_address: str = "127.0.0.1"  # address of that port; there is no password, so keep it local

    def __post_init__(self) -> None:
        if self.no_blocks + (self.blocks is not None) + (self.num_blocks is not None) > 1:
            raise ConfigError("--blocks, --num-blocks and --no-blocks exclude each other; give one of them")
        if self.no_blocks and self.adapters:
            raise ConfigError("--adapter and --no-blocks exclude each other: adapters are applied to blocks")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(f"--num-blocks is {self.num_blocks}; use --no-blocks to serve no blocks")
        if self.weights_bytes < 0:
            raise ConfigError(f"weights_bytes is {self.weights_bytes}; it must be 0 or more")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ConfigError(f"--metrics-port is {self.metrics_port}; ports are 0 to 65535")
        if self.blocks is not None:
            BlockSpan.parse(self.blocks)
