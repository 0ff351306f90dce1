"""A server of a tiny model on loopback, and waiting for what it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sirius_runtime.chat import Chat, ChatSpec
from sirius_runtime.model import SiriusModel
from sirius_runtime.serve.engine import Capacity
from sirius_runtime.serve.server import Server, make_served
from tests.support.http import ask
from tests.support.models import Tiny

CAPACITY = Capacity(rows=4, queue=4, context=96, period=16, block=8, prefix_bytes=2**20)
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}w9"


def chatty(tiny: Tiny) -> SiriusModel:
    """A tiny model with a chat template."""
    made = tiny.model
    return SiriusModel(made.backend, made.tokenizer, chat=Chat(ChatSpec({"default": TEMPLATE})))


@contextmanager
def served(model: SiriusModel, capacity: Capacity = CAPACITY, **options: Any) -> Iterator[Server]:
    """The model under the name ``tiny``, on a free port; drained at the end."""
    server = Server(
        make_served(model, "tiny", capacity, **options), "127.0.0.1", 0, lambda message: None
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(60)
        server.served.engine.stop()
        assert not thread.is_alive()


def wait_until(true: Callable[[], object], seconds: float = 30) -> None:
    """Waits for it to come true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def metrics(server: Server) -> dict[str, float]:
    """The samples by name, and by labels other than the model's."""
    lines = ask(f"{server.url}/metrics").text.splitlines()
    told = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.replace('{model_name="tiny"}', ""): float(value) for name, value in told}
