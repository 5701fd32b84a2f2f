"""`p2pinfer serve`: the HTTP API, for clients that speak OpenAI's, Anthropic's or Ollama's, and the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import click

from p2pinfer.cli.invocation import (
    ALLOW,
    BOOTSTRAP,
    DATA_DIR,
    DENY,
    IDENTITY,
    SWARM_KEY,
    Invocation,
    command,
    setting,
)
from p2pinfer.cli.output.terminal import note, write_out
from p2pinfer.cli.output.waiting import WaitingLine

from .generate import POLICY


@command(
    "serve",
    examples=[
        "p2pinfer serve",
        "p2pinfer serve --model Qwen/Qwen3-8B --bootstrap /ip4/192.0.2.7/tcp/41234/p2p/12D3KooW...",
        "p2pinfer serve --model Qwen/Qwen3-8B --model ./my-model",
        "p2pinfer serve --host 0.0.0.0 --api-key-file keys.txt",
    ],
)
@setting(
    "api.models",
    "--model ID_OR_DIR",
    "Hugging Face id (owner/name or owner/name@revision), folder, or GGUF file. May be repeated: a request "
    "names the model that answers. [default: tiny-stories]",
    multiple=True,
)
@setting("api.host", "--host ADDRESS", "Listen on this address. [default: 127.0.0.1]")
@setting("api.port", "--port PORT", "Listen on this TCP port; 0: any. [default: 8000]")
@setting(
    "api.key_file",
    "--api-key-file FILE",
    "Ask clients for one of these API keys, one per line. [default: no key, on this computer only]",
)
@BOOTSTRAP
@SWARM_KEY
@ALLOW
@DENY
@IDENTITY
@POLICY
@DATA_DIR
def serve(call: Invocation) -> None:
    """Serve models to programs on this computer, over HTTP, and a page to chat in and look at the swarm.

    The page is at http://127.0.0.1:8000, OpenAI's API at http://127.0.0.1:8000/v1. Stop with Ctrl-C.

    If no swarm in reach serves a model, three temporary nodes on this computer run it. This works for the
    bundled model and for a model in a folder.
    """
    from p2pinfer.api.access import load_keys
    from p2pinfer.api.config import ApiConfig, check_identity
    from p2pinfer.client_config import AuditConfig, ClientConfig, SessionConfig
    from p2pinfer.config import SharedConfig
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.routing.config import RoutingConfig
    from p2pinfer.routing.policy import check_policy_name

    settings = call.settings(ApiConfig, ClientConfig, SessionConfig, RoutingConfig, AuditConfig, HostConfig)
    shared, config = settings.build(SharedConfig), settings.build(ClientConfig)
    api_config, host_config = settings.build(ApiConfig), settings.build(HostConfig)
    session_config, audit_config = settings.build(SessionConfig), settings.build(AuditConfig)
    routing_config = settings.build(RoutingConfig)
    check_policy_name(config.policy)
    keys = load_keys(api_config)
    models = tuple(dict.fromkeys(api_config.models or (shared.model,)))
    check_identity(models, config.identity_file)

    waiting = click.get_current_context().with_resource(WaitingLine(quiet=not call.is_for_people))
    waiting.say("loading torch and libp2p", at_once="torch" not in sys.modules)
    from p2pinfer.cli.output.progress import Bars, NodesStarting
    from p2pinfer.cli.running import run
    from p2pinfer.client import Client
    from p2pinfer.embedded import client_host_config, may_embed, swarm_in_reach
    from p2pinfer.node.concurrency.nurseries import outlasting
    from p2pinfer.planning.ledger_sync import kept_ledger
    from p2pinfer.web.feed import Feed
    from p2pinfer.web.site import Site

    from .http_door import serve_door, serving_line

    def tell(names: Sequence[str], urls: list[str]) -> None:
        waiting.pause()
        if call.json:
            write_out(serving_line("ready", names, urls))
        elif not call.quiet:
            note(f"serving {', '.join(names)} at {' and '.join(f'{url}/v1' for url in urls)}")
            note(f"in a browser: {urls[0]}")

    feed, progress = Feed(), Bars(quiet=call.quiet, waiting=waiting)
    embedding = {model: may_embed(model, shared.bootstrap, host_config) for model in models}

    def client_of(model: str) -> Client:
        shared_settings: dict[str, Any] = {**settings.shared(), "model": model}
        return Client(
            **shared_settings,
            config=config,
            host_config=client_host_config(host_config, embedding=embedding[model]),
            session_config=session_config,
            routing_config=routing_config,
            audit=audit_config,
            progress=progress,
            on_event=feed.report,
        )

    clients = [client_of(model) for model in models]

    async def main() -> None:
        with NodesStarting(quiet=call.quiet, waiting=waiting) as starting:
            async with AsyncExitStack() as stack:
                has_own_nodes = False
                for client in clients:
                    waiting.say(f"opening {client.model}")
                    await stack.enter_async_context(outlasting(client))
                    waiting.say("looking for peers")
                    swarm = swarm_in_reach(client, embedding=embedding[client.model], on_embedding=starting)
                    has_own_nodes |= await stack.enter_async_context(swarm)
                # Clients of our own nodes know nobody else, and a page shows whom this computer has banned.
                kept = (
                    await stack.enter_async_context(kept_ledger(shared.data_dir)) if has_own_nodes else None
                )
                site = Site(clients, feed, shared.data_dir, kept)
                await serve_door(clients, site, api_config, keys, tell)

    run(main)
