"""Run large open models on a swarm of strangers' computers.

    async with p2pinfer.Client() as client:
        async for token in client.generate("Once upon a time"):
            print(token.text, end="", flush=True)

or, without trio:

    with p2pinfer.connect() as swarm:
        print(swarm.generate("Once upon a time").text())

or in asyncio's loop, such as a notebook's:

    async with p2pinfer.connect_asyncio() as swarm:
        print(await swarm.generate("Once upon a time").text())

Importing this package is cheap. torch and libp2p are imported with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from .bundled import use_bundled_libp2p

if TYPE_CHECKING:
    __version__: str

if TYPE_CHECKING:  # the same names for type checkers and editors; a test keeps both lists equal
    from .audit.auditor import AuditTally as AuditTally
    from .audit.verifier import Verifier as Verifier
    from .client import Client as Client
    from .client_config import AuditConfig as AuditConfig
    from .client_config import ClientConfig as ClientConfig
    from .client_config import GenerationConfig as GenerationConfig
    from .client_config import SessionConfig as SessionConfig
    from .client_config import TuneConfig as TuneConfig
    from .errors import AddressUnusable as AddressUnusable
    from .errors import CacheFull as CacheFull
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import LocalError as LocalError
    from .errors import ModelNotFound as ModelNotFound
    from .errors import NoRoute as NoRoute
    from .errors import P2PInferError as P2PInferError
    from .errors import PeerError as PeerError
    from .errors import PeerRefused as PeerRefused
    from .errors import PeerUnreachable as PeerUnreachable
    from .errors import PeerVanished as PeerVanished
    from .errors import PolicyError as PolicyError
    from .errors import PromptTooLong as PromptTooLong
    from .errors import ProtocolViolation as ProtocolViolation
    from .errors import SpanOutOfRange as SpanOutOfRange
    from .errors import Unfinished as Unfinished
    from .errors import WrongOutput as WrongOutput
    from .generation.generation import Generation as Generation
    from .generation.generation import GenerationResult as GenerationResult
    from .generation.generation import Timings as Timings
    from .generation.generation import Token as Token
    from .generation.outage import Waiting as Waiting
    from .generation.remote_blocks import HopUsed as HopUsed
    from .loops.asyncio_client import AsyncioClient as AsyncioClient
    from .loops.asyncio_client import AsyncioGeneration as AsyncioGeneration
    from .loops.asyncio_client import connect_asyncio as connect_asyncio
    from .loops.blocking import BlockingClient as BlockingClient
    from .loops.blocking import BlockingGeneration as BlockingGeneration
    from .loops.blocking import connect as connect
    from .models.config import ComputeConfig as ComputeConfig
    from .models.span import BlockSpan as BlockSpan
    from .node.config import NodeConfig as NodeConfig
    from .node.config import ServeConfig as ServeConfig
    from .node.evidence.hop_record import HopRecord as HopRecord
    from .node.evidence.hop_record import history_of as history_of
    from .node.host.host import HostConfig as HostConfig
    from .node.node import run_node as run_node
    from .reputation.ledger import Ledger as Ledger
    from .reputation.verdict import Finding as Finding
    from .reputation.verdict import Verdict as Verdict
    from .reputation.view import ReputationView as ReputationView
    from .routing.config import RoutingConfig as RoutingConfig
    from .routing.cost import route_cost as route_cost
    from .routing.planner import cheapest_routes as cheapest_routes
    from .routing.policy import RoutingPolicy as RoutingPolicy
    from .routing.route import Candidate as Candidate
    from .routing.route import Hop as Hop
    from .routing.route import Route as Route
    from .routing.route import RouteOutcome as RouteOutcome
    from .routing.route import RouteRequest as RouteRequest
    from .swarm_view import PeerView as PeerView

_HOMES = {
    "audit.auditor": ("AuditTally",),
    "audit.verifier": ("Verifier",),
    "node.evidence.hop_record": ("HopRecord", "history_of"),
    "reputation.verdict": ("Finding", "Verdict"),
    "loops.asyncio_client": ("AsyncioClient", "AsyncioGeneration", "connect_asyncio"),
    "loops.blocking": ("BlockingClient", "BlockingGeneration", "connect"),
    "client": ("Client",),
    "client_config": ("AuditConfig", "ClientConfig", "GenerationConfig", "SessionConfig", "TuneConfig"),
    "errors": (
        "AddressUnusable",
        "CacheFull",
        "CheckpointError",
        "ConfigError",
        "LocalError",
        "ModelNotFound",
        "NoRoute",
        "P2PInferError",
        "PeerError",
        "PeerRefused",
        "PeerUnreachable",
        "PeerVanished",
        "PolicyError",
        "PromptTooLong",
        "ProtocolViolation",
        "SpanOutOfRange",
        "Unfinished",
        "WrongOutput",
    ),
    "generation.generation": ("Generation", "GenerationResult", "Timings", "Token"),
    "models.config": ("ComputeConfig",),
    "models.span": ("BlockSpan",),
    "node.config": ("NodeConfig", "ServeConfig"),
    "node.host.host": ("HostConfig",),
    "node.node": ("run_node",),
    "generation.outage": ("Waiting",),
    "reputation.ledger": ("Ledger",),
    "reputation.view": ("ReputationView",),
    "routing.config": ("RoutingConfig",),
    "routing.cost": ("route_cost",),
    "routing.planner": ("cheapest_routes",),
    "routing.policy": ("RoutingPolicy",),
    "routing.route": ("Candidate", "Hop", "Route", "RouteOutcome", "RouteRequest"),
    "generation.remote_blocks": ("HopUsed",),
    "swarm_view": ("PeerView",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

use_bundled_libp2p()


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("p2pinfer")
    if name not in _HOME:
        raise AttributeError(f"module 'p2pinfer' has no attribute {name!r}")
    value = getattr(import_module(f"p2pinfer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOME)
