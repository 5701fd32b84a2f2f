"""Settings of routing; the only place where these defaults live."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """Prices of the planner, all of them seconds per token or what turns into them."""

    redo_s: float = 0.25  # s, cost of a hop failure: stall, spread over a session's tokens
    integrity_weight_s: float = 0.03  # s, cost of a hop whose output is surely wrong; about a hop's latency
    shunned_s: float = 1.0  # s, cost of a hop that got around audits too often: as good as no other choice
    trusted_integrity: float = 0.6  # 0..1, minimum for trusted-only; five audits passed, none failed
    explore_share: float = 0.1  # 0..1, share of sessions routed by optimistic estimates of all peers
    probation_share: float = 0.9  # 0..1, the same for newcomers with an audit passed and none failed
    min_reliability: float = 0.05  # 0..1, lower bound of reliability, so that costs stay finite
    hop_overhead_s: float = 0.002  # s, to serialise, encrypt and queue at each hop
    default_rtt_ms: float = 100.0  # ms, between two peers without measurements
    max_coordinate_error: float = 0.7  # 0..1, less certain coordinates count as unknown
    bandwidth_bytes_per_s: float = 2.5e6  # bytes/s, a home uplink of 20 Mbit/s
    relay_bandwidth_bytes_per_s: float = 0.5e6  # bytes/s, bandwidth of a volunteer's relay
    relay_detour_s: float = 0.04  # s, one-way delay that a relay adds, if not measured
    punch_failure: float = 0.3  # 0..1, share of private pairs for which hole punching fails


@dataclass(frozen=True, slots=True)
class TableConfig:
    """Bounds of what is remembered about the swarm."""

    max_entries: int = 4096  # announcements, all models together
    max_entries_per_revision: int = 1024  # announcements of one model
    max_revisions_per_peer: int = 4  # models that one peer may announce
    max_foreign_revisions: int = 64  # models that we neither serve nor ask for, of which a few peers are kept
    max_foreign_entries: int = 8  # announcements of one such model
    max_record_bytes: int = 16384  # bytes, one signed record
    max_met: int = 2048  # peers met whose entries no stranger's can push out
    max_met_per_range: int = 64  # of those, peers met in one address range, a /24 of IPv4 or a /48 of IPv6
    remember_s: float = 600.0  # s after expiry in which an old record cannot bring a ghost back


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Settings of when a node gives up its blocks for others."""

    min_gain: float = 0.25  # share by which the swarm's slowest block must speed up
    min_dwell_s: float = 600.0  # s for which a node stays whatever it could gain
