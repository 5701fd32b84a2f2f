"""Client without async, whose trio loop runs in a thread of its own."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Unpack

import trio
from torch import Tensor

from p2pinfer.client import Client, PeerView
from p2pinfer.client_config import TuneConfig
from p2pinfer.embedded import client_host_config, may_embed, swarm_in_reach
from p2pinfer.generation.generation import Generation, GenerationConfig, GenerationResult, Token
from p2pinfer.learning.examples import Example
from p2pinfer.learning.swarm_trainer import Batch, SwarmTrainer, Trace, open_trainer
from p2pinfer.learning.trained_adapter import AdapterGradient, ModelAdapter
from p2pinfer.learning.tuner import PassResult, StepResult
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.learning.ends import Loss, cross_entropy
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.chat_template import ChatPrompt, ChatTemplate
from p2pinfer.node.host_config import HostConfig
from p2pinfer.options import ClientOptions, GenerationOptions, addresses_of, suggesting
from p2pinfer.routing.policy import RoutingPolicy
from p2pinfer.routing.route import Route
from p2pinfer.session.terms import SessionAdapter

from .trio_thread import Held, Pump, TrioThread


@suggesting
def connect(
    *,
    model: str | Path = BUNDLED_MODEL,
    bootstrap: str | Sequence[str] = (),
    policy: str | RoutingPolicy | None = None,
    host_config: HostConfig | None = None,
    **options: Unpack[ClientOptions],
) -> BlockingClient:
    """Join the swarm and return when it can be asked; use as `with p2pinfer.connect() as swarm`.

    With the bundled model, no `bootstrap` and no swarm in reach, three nodes are started on this machine
    and end with the client.

    Args:
        options: Anything else that `Client` takes.

    Raises:
        As entering a `Client` does.
    """

    addresses = addresses_of(bootstrap)
    given = host_config or HostConfig()

    @asynccontextmanager
    async def open_client() -> AsyncGenerator[Client]:
        embedding = may_embed(str(model), addresses, given)
        own = client_host_config(given, embedding=embedding)
        client = Client(model=model, bootstrap=addresses, policy=policy, host_config=own, **options)
        async with client, swarm_in_reach(client, embedding=embedding):
            yield client

    return BlockingClient(open_client)


class BlockingClient:
    """A `Client` for ordinary code. Any thread may use it."""

    def __init__(self, open_client: Callable[[], AbstractAsyncContextManager[Client]]) -> None:
        self._loop = TrioThread(open_client)
        self._close = weakref.finalize(self, self._loop.close)  # also when the interpreter exits

    @property
    def thread(self) -> TrioThread:
        """The loop that it runs in, for those who come from another one."""
        return self._loop

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def chat_template(self) -> ChatTemplate | None:
        """Chat template of the model; see `Client.chat_template`."""
        return self._loop.call(lambda client: client.chat_template)

    def generate(
        self,
        prompt: str | ChatPrompt,
        config: GenerationConfig | None = None,
        *,
        adapter: SessionAdapter | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> BlockingGeneration:
        """Continue `prompt`; see `Client.generate`."""
        return self._run(lambda client: client.generate(prompt, config, adapter=adapter, **overrides))

    def resume(
        self, token: str, max_new_tokens: int | None = None, adapter: SessionAdapter | None = None
    ) -> BlockingGeneration:
        """Go on with a generation that stopped; see `Client.resume`."""
        return self._run(lambda client: client.resume(token, max_new_tokens, adapter))

    def load_adapter(self, folder: str | Path) -> SessionAdapter:
        """LoRA for `generate`, from a folder or a node; see `Client.load_adapter`."""
        return self._loop.wait(lambda: self._loop.client.load_adapter(folder))

    def _run(self, begin: Callable[[Client], Generation]) -> BlockingGeneration:
        return BlockingGeneration(self._loop, self._loop.call(begin))

    def peers(self) -> list[PeerView]:
        """Peers known to serve the model."""
        return self._loop.call(lambda client: client.peers())

    def trainer(self) -> BlockingTrainer:
        """Training passes over the swarm, until it is closed, forgotten, or this client is closed."""
        return BlockingTrainer(self._loop)

    def rows(self, adapter: ModelAdapter | None = None) -> BlockingRows:
        """Sessions for rows that grow token by token, for as long as this client is open."""
        return BlockingRows(self._loop, adapter)

    def tuner(self, config: TuneConfig | None = None) -> BlockingTuner:
        """The four verbs of tuning, until it is closed or forgotten; see `Client.tuner`."""
        return BlockingTuner(self._loop, config)

    def close(self) -> None:
        """Leave the swarm, ending what is still being generated. Harmless twice."""
        self._close()


class BlockingGeneration:
    """An iterator of `Token`s; `result` tells what came of it, also before the end."""

    def __init__(self, loop: TrioThread, generation: Generation) -> None:
        self._loop = loop
        self._generation = generation
        self._pump = Pump(generation)
        self._close = weakref.finalize(self, loop.soon, self._pump.scope.cancel)
        loop.spawn(self._pump.run)

    def __enter__(self) -> BlockingGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        """The next token; raises as `Generation.__anext__` does."""
        try:
            return self._loop.wait(self._pump.tokens.receive)
        except trio.EndOfChannel:
            if self._pump.failure is not None:
                raise self._pump.failure from None
            raise StopIteration from None

    @property
    def result(self) -> GenerationResult:
        """Result so far; whole once the iteration has ended."""
        return self._generation.result

    @property
    def resume_token(self) -> str | None:
        """Token for `resume` to go on from here; None if there is nothing left to do."""
        return self._generation.resume_token

    def text(self) -> str:
        """Wait for the end and return all of the text."""
        for _ in self:
            pass
        return self.result.text

    def close(self) -> None:
        """End it early, so that the hops free what they hold for it. Harmless twice."""
        self._close()


class BlockingTrainer:
    """A `SwarmTrainer` for ordinary code. Any thread may use it."""

    def __init__(self, loop: TrioThread) -> None:
        self._loop = loop
        self._held = Held(lambda: _open_trainer(loop.client))
        self._close = weakref.finalize(self, loop.soon, self._held.close)
        self._held.open(loop)

    @property
    def route(self) -> Route:
        """Peers that compute at the moment."""
        return self._held.opened.route

    def forward(
        self,
        batch: Batch,
        adapter: ModelAdapter | None = None,
        *,
        span: BlockSpan | None = None,
        keeps: bool = True,
        seed: int = 0,
    ) -> Trace:
        """Run blocks over a batch; see `SwarmTrainer.forward`."""
        return self._loop.wait(
            lambda: self._held.opened.forward(batch, adapter, span=span, keeps=keeps, seed=seed)
        )

    def backward(
        self, trace: Trace, gradient: Tensor, *, wants_hidden: bool = True
    ) -> tuple[Tensor | None, AdapterGradient | None]:
        """Gradients of a batch and of its adapter; see `SwarmTrainer.backward`."""
        return self._loop.wait(lambda: self._held.opened.backward(trace, gradient, wants_hidden=wants_hidden))

    def close(self) -> None:
        """End the sessions on the hops, some time soon. Harmless twice."""
        self._close()


class BlockingRows:
    """`RowSessions` for ordinary code. One thread at a time uses it."""

    def __init__(self, loop: TrioThread, adapter: ModelAdapter | None) -> None:
        from p2pinfer.generation.row_sessions import RowSessions

        client = loop.client
        brought = None if adapter is None else client.adapters.take(adapter, client.ends, client.member.host)
        self._loop = loop
        self._rows = RowSessions(client, client.spec.max_positions, brought)

    def run(self, inputs: Sequence[Tensor], new: Sequence[int]) -> list[Tensor]:
        """Hidden states after all blocks; see `RowSessions.run`."""
        return self._loop.wait(lambda: self._rows.run(inputs, new))

    def close(self) -> None:
        """End the sessions, some time soon."""
        self._loop.spawn(self._rows.aclose)


class BlockingTuner:
    """A `Tuner` for ordinary code. One thread at a time uses it."""

    def __init__(self, loop: TrioThread, config: TuneConfig | None) -> None:
        self._loop = loop
        self._held = Held(lambda: loop.client.tuner(config))
        self._close = weakref.finalize(self, loop.soon, self._held.close)
        self._held.open(loop)

    def example(self, prompt: str, completion: str) -> Example:
        """An example whose completion is learnt; see `Tuner.example`."""
        return self._held.opened.example(prompt, completion)

    def forward_backward(
        self, examples: Sequence[Example], loss: Loss = cross_entropy
    ) -> Callable[[], PassResult]:
        """Begin to run a batch there and back; what is returned waits for its result when it is called."""
        pending = self._loop.call(lambda _: self._held.opened.forward_backward(examples, loss))

        async def wait() -> PassResult:
            return await pending

        return lambda: self._loop.wait(wait)

    def optim_step(self, learning_rate: float | None = None) -> StepResult:
        """Change the adapter by the gradients of the batches that were begun; see `Tuner.optim_step`."""
        return self._loop.wait(lambda: self._held.opened.optim_step(learning_rate))

    def sample(
        self, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int | None = None
    ) -> str:
        """Text that the model continues `prompt` with; see `Tuner.sample`."""
        return self._loop.wait(lambda: self._held.opened.sample(prompt, max_new_tokens, temperature, seed))

    def save(self, folder: str | Path) -> None:
        """Write the adapter in peft's files."""
        self._loop.wait(lambda: self._held.opened.save(folder))

    def close(self) -> None:
        """End the sessions on the hops, some time soon; nothing is saved. Harmless twice."""
        self._close()


def _open_trainer(client: Client) -> AbstractAsyncContextManager[SwarmTrainer]:
    return open_trainer(
        client.member.host,
        client.spec,
        client.routes,
        lambda: client.table_changed,
        watch=client.training_watch,
    )
