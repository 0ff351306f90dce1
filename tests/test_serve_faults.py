"""What goes wrong with one request stays with it."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from torch import Tensor

from sirius_runtime.model import SiriusModel
from sirius_runtime.serve.server import Server
from tests.support.http import Told, ask
from tests.support.models import TinyModels
from tests.support.serving import CAPACITY, chatty, metrics, served, wait_until

LONG = {"model": "tiny", "prompt": "w10 w11 w12", "max_tokens": 80, "mode": "exact"}


class Faulty:
    """A back end that does what a test says before it runs."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Any = lambda entry, inputs: None
        self.runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.gate.wait(60)
        self.runs += 1
        self.fault(entry, inputs)
        return self._backend.run(entry, inputs)


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> SiriusModel:
    return chatty(tiny("llama", "topk"))


@pytest.fixture
def faulty(model: SiriusModel) -> Faulty:
    return Faulty(model.backend)


@pytest.fixture
def server(model: SiriusModel, faulty: Faulty) -> Iterator[Server]:
    own: Any = faulty
    with served(SiriusModel(own, model.tokenizer, chat=model.chat)) as running:
        try:
            yield running
        finally:
            faulty.gate.set()


def complete(server: Server, **more: Any) -> Told:
    return ask(f"{server.url}/v1/completions", LONG | more)


def connect(server: Server, **more: Any) -> socket.socket:
    """A request on a socket that the test may close."""
    body = json.dumps(LONG | more).encode()
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname or "", address.port or 0))
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: tiny\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(server: Server, faulty: Faulty, stream: bool) -> None:
    engine = server.served.engine
    slow = threading.Event()
    faulty.fault = lambda entry, inputs: slow.wait(0.002)
    connection = connect(server, stream=stream)
    wait_until(lambda: faulty.runs > 5)
    before = metrics(server)
    connection.close()
    wait_until(lambda: engine.running == 0)
    after = metrics(server)
    assert after["sirius:request_cancellations_total"] == 1
    assert after["vllm:generation_tokens_total"] < 80
    # The one in progress as it went, and one while that was being noticed.
    periods = after["sirius:batch_rows_count"] - before["sirius:batch_rows_count"]
    assert periods <= 3


def test_a_client_that_goes_leaves_the_queue(server: Server, faulty: Faulty) -> None:
    engine = server.served.engine
    faulty.gate.clear()
    held = [connect(server) for _ in range(CAPACITY.rows)]
    wait_until(lambda: engine.running + engine.waiting == CAPACITY.rows)
    waits = connect(server, stream=True)
    wait_until(lambda: engine.running + engine.waiting == CAPACITY.rows + 1)
    waits.close()
    time.sleep(0.1)
    faulty.gate.set()
    wait_until(lambda: engine.running + engine.waiting == 0)
    told = metrics(server)
    assert told["sirius:request_cancellations_total"] == 1
    assert told['vllm:request_success_total{finished_reason="length",model_name="tiny"}'] >= 1
    for connection in held:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.close()


def test_over_the_bound_requests_wait_or_are_refused(server: Server, faulty: Faulty) -> None:
    engine, most = server.served.engine, CAPACITY.rows + CAPACITY.queue
    faulty.gate.clear()
    with ThreadPoolExecutor(most) as pool:
        asked = [pool.submit(complete, server, max_tokens=4) for _ in range(most)]
        wait_until(lambda: engine.running + engine.waiting == most)
        told = complete(server)
        assert told.status == 429
        assert told.json["error"]["type"] == "rate_limit_error"
        assert 1 <= int(told.headers["retry-after"]) <= 60
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
            pytest.raises(openai.RateLimitError),
        ):
            client.completions.create(model="tiny", prompt="w7")
        assert metrics(server)["sirius:request_refusals_total"] == 2
        faulty.gate.set()
        assert {future.result().status for future in asked} == {200}
    assert complete(server, max_tokens=4).status == 200


def test_deadlines(server: Server, faulty: Faulty) -> None:
    faulty.fault = lambda entry, inputs: time.sleep(0.02)
    told = complete(server, timeout=0.2)
    assert told.status == 504
    assert told.json["error"]["code"] == "deadline_exceeded"
    told = complete(server, timeout=0.2, stream=True)
    assert told.status == 200
    *_, last, done, _ = told.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert done == "data: [DONE]"
    assert server.served.engine.running == 0


def test_an_error_is_its_own_row_s(server: Server, faulty: Faulty, model: SiriusModel) -> None:
    """A batch of four, in which one fails whenever its history has 13 tokens."""

    def fault(entry: str, inputs: Mapping[str, Tensor]) -> None:
        time.sleep(0.001)
        if entry == "full" and 13 in inputs["length"].tolist():
            raise RuntimeError("a fault")

    faulty.fault = fault
    prompts = [[20 + index] * (30 + index) for index in range(3)]
    alone = model.generate(
        input_ids=prompts, mode="exact", max_new_tokens=40, eos_token_id=[0], fallback=False
    )
    with ThreadPoolExecutor(4) as pool:
        good = [
            pool.submit(complete, server, prompt=prompt, max_tokens=40, mode="exact")
            for prompt in prompts
        ]
        bad = pool.submit(complete, server, prompt=[7] * 13)
    assert bad.result().status == 500
    assert bad.result().json["error"]["type"] == "server_error"
    assert "a fault" in bad.result().json["error"]["message"]
    assert alone.texts is not None
    for future, text in zip(good, alone.texts, strict=True):
        told = future.result()
        assert told.status == 200
        assert text.startswith(told.json["choices"][0]["text"])
        assert told.json["choices"][0]["text"]
    failed = metrics(server)["sirius:request_failures_total"]
    assert failed == 1


def test_a_row_without_a_token_fails_alone(
    server: Server, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are NaN once its history has 13 tokens."""
    run = faulty.run

    def broken(entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = run(entry, inputs)
        if entry == "full":
            result["logits"][inputs["length"] == 13] = float("nan")
        return result

    monkeypatch.setattr(faulty, "run", broken)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(complete, server, prompt=[20] * 30, max_tokens=40)
        bad = pool.submit(complete, server, prompt=[7] * 13)
    assert good.result().status == 200
    assert bad.result().status == 500
    assert "NaN" in bad.result().json["error"]["message"]


def test_the_first_signal_drains(server: Server, faulty: Faulty) -> None:
    faulty.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(complete, server, max_tokens=30)
        wait_until(lambda: server.served.engine.running == 1)
        keeps = socket.create_connection(server.servers[0].sockets[0].getsockname())
        server.handle_exit(signal.SIGTERM, None)
        assert server.served.draining
        faulty.gate.set()
        told = running.result()
    assert told.status == 200
    assert told.json["usage"]["completion_tokens"] >= 1
    keeps.close()
    wait_until(lambda: not server.served.engine.alive)


def test_the_second_signal_stops(server: Server, faulty: Faulty) -> None:
    faulty.fault = lambda entry, inputs: time.sleep(0.05)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete, server)
        wait_until(lambda: server.served.engine.running == 1)
        for _ in range(2):
            server.handle_exit(signal.SIGTERM, None)
        told = running.result()
    assert told.status == 503
    assert told.json["error"]["code"] == "stopping"
    wait_until(lambda: not server.served.engine.alive)


def test_a_stopped_engine_says_so(server: Server) -> None:
    server.served.engine.stop()
    for path in ("/health", "/ready"):
        assert ask(f"{server.url}{path}").status == 503
    assert complete(server).status == 503


def test_a_draining_server_refuses(server: Server) -> None:
    server.served.draining = True
    assert ask(f"{server.url}/health").status == 200
    assert ask(f"{server.url}/ready").status == 503
    assert complete(server).json["error"]["code"] == "stopping"
