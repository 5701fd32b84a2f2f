"""`p2pinfer node`: lend this computer to the swarm."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from p2pinfer.cli.failures import Interrupted
from p2pinfer.cli.invocation import (
    ALLOW,
    ANNOUNCE,
    BOOTSTRAP,
    DATA_DIR,
    DENY,
    DEVICES,
    DTYPES,
    MODEL,
    SWARM_KEY,
    WEIGHTS,
    Invocation,
    group,
    setting,
)
from p2pinfer.cli.output.plain import ascii_json
from p2pinfer.cli.output.terminal import note, write_out
from p2pinfer.errors import LocalError

from .node_status import status, written_status

if TYPE_CHECKING:
    from p2pinfer.node.events import Event

logger = logging.getLogger(__name__)


@group(
    "node",
    examples=[
        "p2pinfer node",
        "p2pinfer node --model Qwen/Qwen3-8B --num-blocks 12",
        "p2pinfer node --blocks 0:4 --bootstrap /ip4/192.0.2.7/tcp/4001/p2p/12D3KooW...",
        "p2pinfer node --no-blocks --listen /ip4/0.0.0.0/tcp/4001",
        "p2pinfer node --listen /ip4/0.0.0.0/tcp/4001 --announce /ip4/203.0.113.7/tcp/14001",
        "p2pinfer node --adapter my-adapter",
        "p2pinfer node --serve",
        "p2pinfer node --model swarm:0f343b0931126a20f133d67c2b018a3b",
        "p2pinfer node --verify",
        "p2pinfer node --num-blocks 12 --install-service --user",
        "p2pinfer node status",
    ],
)
@MODEL
@setting("node.blocks", "--blocks A:B", "Serve blocks A to B-1. [default: those the swarm needs most]")
@setting("node.num_blocks", "--num-blocks N", "Serve at most N blocks. [default: as many as fit]")
@setting("node.no_blocks", "--no-blocks", "Serve no blocks: only introduce peers to each other.")
@setting(
    "node.adapters",
    "--adapter FOLDER",
    "Offer this adapter, LoRA in peft's files, to everybody. May be repeated.",
    multiple=True,
)
@setting(
    "compute.dtype",
    "--dtype DTYPE",
    f"Compute dtype: {', '.join(DTYPES)}. [default: auto]",
    choices=DTYPES,
)
@setting(
    "compute.weights",
    "--weights FORMAT",
    f"Quantise weights while they are loaded: {', '.join(WEIGHTS)}. [default: auto, as they are]",
    choices=WEIGHTS,
)
@setting(
    "compute.device",
    "--device DEVICE",
    f"Compute device: {', '.join(DEVICES)}, cuda:N, or several: cuda:0,cuda:1. [default: auto]",
    choices=DEVICES,
)
@setting(
    "host.listen",
    "--listen MULTIADDR",
    "Listen on this address. May be repeated. [default: a free TCP port, kept across restarts]",
    multiple=True,
)
@ANNOUNCE
@BOOTSTRAP
@SWARM_KEY
@ALLOW
@DENY
@setting(
    "relay.bytes_per_s",
    "--relay-rate BYTES_PER_S",
    "Bandwidth limit for relaying other peers' connections; 0: do not relay. [default: 1000000.0]",
)
@setting("serve.public_name", "--name NAME", "Name that others see beside this node's peer id.")
@setting(
    "weights.share",
    "--share-weights WHICH",
    "Give peers the weights of: open models, all, or none. [default: open]",
    choices=("open", "all", "none"),
)
@setting("verify.enabled", "--verify", "Audit other peers while idle.")
@setting(
    "api.enabled",
    "--serve",
    "Serve the HTTP API and the page too, as `p2pinfer serve` does: http://127.0.0.1:8000.",
)
@setting("api.enabled", "--web", "The same as --serve.")
@setting("node.metrics_port", "--metrics-port PORT", "Serve Prometheus metrics on this port. [default: none]")
@DATA_DIR
@click.option(
    "--install-service",
    is_flag=True,
    help="Show, then install a service of systemd or launchd that runs this node.",
)
@click.option("--user", is_flag=True, help="With --install-service: as a service of this user alone.")
@click.option("--yes", is_flag=True, help="With --install-service: do not ask.")
@click.option("--until-stdin-closes", is_flag=True, hidden=True)
def node(call: Invocation, install_service: bool, user: bool, yes: bool, until_stdin_closes: bool) -> None:
    """Serve blocks of a model to the swarm until Ctrl-C.

    With --install-service, the computer does so from now on, and after each start. What that would write and
    run is shown first.
    """
    from p2pinfer.api.access import load_keys
    from p2pinfer.api.config import ApiConfig
    from p2pinfer.client_config import AuditConfig, ClientConfig, VerifyConfig
    from p2pinfer.config import SharedConfig
    from p2pinfer.models.config import ComputeConfig
    from p2pinfer.node.config import NodeConfig, ServeConfig
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.node.reach.relay_config import RelayConfig
    from p2pinfer.node.weights.config import WeightsConfig

    settings = call.settings(
        NodeConfig,
        HostConfig,
        ComputeConfig,
        ServeConfig,
        RelayConfig,
        VerifyConfig,
        AuditConfig,
        ApiConfig,
        ClientConfig,
        WeightsConfig,
        VerifyConfig,
        AuditConfig,
    )
    shared, host_config = settings.build(SharedConfig), settings.build(HostConfig)
    node_config, compute_config = settings.build(NodeConfig), settings.build(ComputeConfig)
    serve_config, relay_config = settings.build(ServeConfig), settings.build(RelayConfig)
    weights_config = settings.build(WeightsConfig)
    verify, audit_config = settings.build(VerifyConfig), settings.build(AuditConfig)
    api_config, client_config = settings.build(ApiConfig), settings.build(ClientConfig)
    keys = load_keys(api_config) if api_config.enabled else ()

    if install_service:
        return _install(call, for_user=user, is_agreed=yes)
    if user or yes:
        raise click.UsageError("--user and --yes belong to --install-service")

    from p2pinfer.cli.output.progress import Bars
    from p2pinfer.cli.running import run
    from p2pinfer.idle_audits import open_idle_audits
    from p2pinfer.node.concurrency.nurseries import open_nursery
    from p2pinfer.node.node import run_node  # what follows takes seconds to import: torch, libp2p

    def tell_of_door(models: Sequence[str], urls: list[str]) -> None:
        if call.json:
            from .http_door import serving_line

            _write_or_go_on(serving_line("serving", models, urls))
        elif not call.quiet:
            verb = "is" if len(models) == 1 else "are"
            said = f"{', '.join(models)} {verb} served over HTTP at {' and '.join(urls)}"
            _write_or_go_on(f"{time.strftime('%H:%M:%S')}  {said}\n")

    async def main() -> None:
        tell = _reporter(call)
        door = None
        if api_config.enabled:
            from .http_door import node_door

            parts = api_config, keys, shared, host_config, client_config, audit_config
            door = node_door(*parts, tell_of_door)
        idle_audits = open_idle_audits(verify, audit_config, shared, host_config, tell)

        def report(event: Event) -> None:
            tell(event)
            note_status(event)
            idle_audits.note(event)
            if door is not None:
                door.note(event)

        async with (
            written_status(shared.data_dir, serve_config.public_name) as note_status,
            open_nursery() as nursery,
        ):
            if verify.enabled:
                nursery.start_soon(idle_audits.serve)
            if door is not None:
                nursery.start_soon(door.serve)
            await run_node(
                node_config,
                host_config=host_config,
                compute_config=compute_config,
                serve_config=serve_config,
                relay_config=relay_config,
                weights_config=weights_config,
                report=report,
                progress=Bars(quiet=call.json or call.quiet),
            )

    try:
        run(main, until_stdin_closes=until_stdin_closes)
    except Interrupted as interrupted:
        # To a service manager an answered SIGTERM is a success. Ctrl-C keeps its customary 130.
        if interrupted.signum == signal.SIGINT:
            raise


node.add_command(status)


def _install(call: Invocation, *, for_user: bool, is_agreed: bool) -> None:
    """Show what a service needs, ask, and do it.

    Raises:
        LocalError: Nobody agreed, or it cannot be done.
    """
    from .service import install, node_service, options_of

    service = node_service(options_of(call), for_user=for_user)
    if call.json:
        told = {"path": str(service.path), "content": service.content, "commands": service.commands}
        write_out(json.dumps(told) + "\n")
    else:
        write_out(service.describe())
    if not is_agreed:
        if call.json or not sys.stdin.isatty():
            raise LocalError("nothing was installed; --yes does it")
        if not click.confirm("Install it?", err=True):
            raise LocalError("nothing was installed")
    install(service)
    if call.is_for_people:
        note(f"{service.path} is installed and started")


def _reporter(call: Invocation) -> Callable[[Event], None]:
    from p2pinfer.cli.output.render import describe_event
    from p2pinfer.node.events import to_json

    def print_json(event: Event) -> None:
        _write_or_go_on(ascii_json(to_json(event)) + "\n")

    def print_line(event: Event) -> None:
        _write_or_go_on(f"{time.strftime('%H:%M:%S')}  {describe_event(event)}\n")

    if call.json:
        return print_json
    return (lambda _: None) if call.quiet else print_line


def _write_or_go_on(line: str) -> None:
    """A full disk costs lines and not the sessions being served; a reader that left ends the node."""
    try:
        write_out(line)
    except LocalError as exc:
        logger.warning("%s; serving on", exc)
