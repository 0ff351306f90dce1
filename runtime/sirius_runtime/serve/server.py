"""The HTTP server: its socket, signals and progress messages."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from sirius_runtime.chat import NO_TEMPLATE
from sirius_runtime.command_line import tell
from sirius_runtime.errors import ConfigError
from sirius_runtime.model import SiriusModel
from sirius_runtime.request import Mode, Options, modes
from sirius_runtime.serve.app import Served, make_app
from sirius_runtime.serve.calls import Defaults
from sirius_runtime.serve.engine import Capacity, Engine
from sirius_runtime.serve.metrics import Metrics


class Server(uvicorn.Server):
    """Serves a model. The first SIGTERM or SIGINT drains: new requests are refused, and running and
    queued answers are completed. A second one ends them after the current period. A third one ends
    the server at once.
    """

    def __init__(
        self, served: Served, host: str, port: int, progress: Callable[[str], None]
    ) -> None:
        config = uvicorn.Config(
            make_app(served), host=host, port=port, log_config=None, access_log=False
        )
        super().__init__(config)
        self.served, self._progress = served, progress
        self._halted = False

    @property
    def url(self) -> str:
        """The server's URL, once it has started."""
        address = self.servers[0].sockets[0].getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"http://{host}:{address[1]}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._progress(f"sirius: serving {self.served.name} at {self.url}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        engine = self.served.engine
        if self._halted:
            self.force_exit = True
            return
        if self.should_exit:
            self._progress("sirius: stopping")
            self._halted = True
            engine.halt()
            return
        self.served.draining = self.should_exit = True
        self._progress(
            f"sirius: draining, {engine.running + engine.waiting} answers to complete; a second "
            "signal ends them"
        )


def make_served(
    model: SiriusModel,
    name: str,
    capacity: Capacity,
    *,
    mode: str | None = None,
    timeout: float = 600.0,
    api_key: str | None = None,
    lookup: int | None = None,
) -> Served:
    """A model that is ready to be served. name: the model's name in requests. mode, lookup: the
    defaults of greedy requests (by default the artifact's) and of all requests. timeout: time limit
    of a request in seconds. Raises ConfigError for a model or options that can't be served.
    """
    longest = model.program.model.max_seq_len
    if model.tokenizer is None:
        raise ConfigError(
            "the artifact has no tokenizer, which requests need: compile the model from a folder "
            "with its tokenizer"
        )
    if mode is None:
        mode = model.program.period.mode
    if mode not in modes() or mode == "sample":
        greedy = ", ".join(name for name in modes() if name != "sample")
        raise ConfigError(f"mode must be one of {greedy}, got {mode!r}")
    if not 2 <= capacity.context <= longest:
        raise ConfigError(
            f"context must be in 2..{longest} (max_seq_len), got {capacity.context}; compile with "
            "a larger --max-seq-len where the model's positions allow it"
        )
    if capacity.period < model.program.period.period:
        raise ConfigError(
            f"max_period must be at least {model.program.period.period}, the artifact's period, "
            f"got {capacity.period}"
        )
    for option in ("rows", "block"):
        if getattr(capacity, option) < 1:
            raise ConfigError(f"{option} must be >= 1, got {getattr(capacity, option)}")
    model.request(Options(mode=Mode.EXACT, lookup=lookup), [1], 1)  # raises for a bad `lookup`
    metrics = Metrics(name)
    try:
        engine = Engine(model, capacity, metrics)
    except (MemoryError, RuntimeError) as error:
        raise ConfigError(
            f"not enough memory for the K/V of {capacity.rows} rows of {capacity.context} tokens "
            f"({error!s:.200}): lower --max-rows or --context"
        ) from error
    return Served(model, name, engine, metrics, Defaults(mode, timeout, lookup), api_key)


def serve(
    served: Served,
    host: str = "127.0.0.1",
    port: int = 8000,
    progress: Callable[[str], None] = tell,
) -> None:
    """Serves until a signal ends it. Raises ConfigError if it can't listen on the address."""
    # Build the kernels and read the weights before the first request.
    served.model.generate(input_ids=[0], max_new_tokens=2, fallback=False)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="sirius: %(message)s")
    engine = served.engine
    capacity = engine.capacity
    if served.model.chat is None:
        progress(f"sirius: /v1/chat/completions is refused: {NO_TEMPLATE}")
    progress(
        f"sirius: the K/V cache of {capacity.rows} rows of {capacity.context} tokens takes "
        f"{engine.kv_bytes / 1e6:,.0f} MB, the prefix cache at most "
        f"{capacity.prefix_bytes / 1e6:,.0f} MB"
    )
    server = Server(served, host, port, progress)
    try:
        server.run()
    except SystemExit as stop:  # uvicorn exits if it can't start
        raise ConfigError(
            f"can't listen on {host}:{port} (see above); choose another --host or --port"
        ) from stop
    finally:
        engine.stop()
    progress("sirius: stopped")
