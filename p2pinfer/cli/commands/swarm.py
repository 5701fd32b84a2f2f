"""`p2pinfer swarm`: the peers that serve a model, and their spans."""

from __future__ import annotations

from functools import partial

import click

from p2pinfer.cli.invocation import (
    ALLOW,
    BOOTSTRAP,
    DATA_DIR,
    DENY,
    IDENTITY,
    MODEL,
    SWARM_KEY,
    Invocation,
    command,
)

SETTLE_S = 10.0  # how long the first peers have to answer, and to tell what they know


@command(
    "swarm",
    examples=[
        "p2pinfer swarm",
        "p2pinfer swarm --model Qwen/Qwen3-8B --watch",
        "p2pinfer swarm --json | jq '.models[] | {model, missing}'",
    ],
)
@MODEL
@BOOTSTRAP
@SWARM_KEY
@ALLOW
@DENY
@IDENTITY
@DATA_DIR
@click.option("--watch", is_flag=True, help="Refresh until Ctrl-C.")
def swarm(call: Invocation, watch: bool) -> None:
    """List the peers of the swarm and the blocks they serve.

    The list shows speed, latency and free cache. It covers all models, or the one that --model names.
    """
    # What follows takes a second to import: libp2p. Looking needs no torch, so there is no Client here.
    import trio

    from p2pinfer.cli.output.progress import Bars
    from p2pinfer.cli.output.swarm_table import print_view, watch_swarm
    from p2pinfer.cli.running import run
    from p2pinfer.client_config import ClientConfig
    from p2pinfer.config import SharedConfig
    from p2pinfer.models.checkpoint.source import resolve_model
    from p2pinfer.node.host_config import HostConfig, dialling_only
    from p2pinfer.node.swarm.membership import open_swarm
    from p2pinfer.node.transport.identity import client_identity
    from p2pinfer.swarm_view import look_at, look_at_all

    settings = call.settings(HostConfig, ClientConfig)
    shared = settings.build(SharedConfig)
    is_asked = settings["model"].origin != "default"
    progress = Bars(quiet=call.json or call.quiet)

    async def main() -> None:
        # A silent hub or a folder to hash can take minutes; Ctrl-C must not wait for that.
        source = await trio.to_thread.run_sync(
            lambda: resolve_model(shared.model, cache_dir=shared.cache_dir, progress=progress),
            abandon_on_cancel=True,
        )
        spec = source.spec
        host_config = dialling_only(settings.build(HostConfig))
        identity = client_identity(settings.build(ClientConfig).identity_file)
        async with open_swarm(identity, host_config, shared.bootstrap, shared.data_dir) as member:
            if is_asked:
                await member.join(spec.revision)
            await member.reach_somebody(SETTLE_S)
            look = partial(look_at if is_asked else look_at_all, member, spec)
            if watch:
                await watch_swarm(look, as_json=call.json)
            else:
                print_view(await look(), as_json=call.json)

    run(main)
