"""A server of its own process under load, and its signals."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sirius_compile.product import Compiled
from tests.support.http import ask
from tests.support.models import TinyModels
from tests.support.serving import wait_until

pytestmark = pytest.mark.slow

REQUESTS, CLIENTS, LEAVE = 2400, 24, 0.2
SIZES = ("--max-rows", "8", "--max-queue", "64", "--context", "96", "--prefill-chunk", "8")


@dataclass(frozen=True)
class Running:
    """A server's process, and where it is."""

    process: subprocess.Popen[str]
    url: str

    @property
    def resident(self) -> int:
        """Bytes of its memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(compiled: Compiled, folder: Path, *options: str) -> Iterator[Running]:
    compiled.save(path := folder / "tiny.sirius")
    command = [sys.executable, "-m", "sirius_runtime.cli", "serve", path, "--port", "0"]
    command += ["--device", "cpu", "--prefix-cache", "0.5", *SIZES, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            told = ""
            while not (found := re.search(r"serving tiny at (http\S+)", told)):
                told += (line := process.stderr.readline())
                assert line, told
            yield Running(process, found[1])
        finally:
            process.kill()


def leave_early(url: str, body: dict[str, object], patience: float) -> None:
    """Asks, and goes away after so many seconds, whatever was said by then."""
    content = json.dumps(body).encode()
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address.hostname}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content)
        time.sleep(patience)


def one_request(url: str, seed: int) -> str:
    """A random request; what became of it."""
    chance = random.Random(seed)
    common = list(range(10, 42))
    prompt = common[: chance.randrange(33)] + [chance.randrange(6, 101) for _ in range(5)]
    tokens = chance.randrange(1, 25)
    body: dict[str, object] = {"model": "tiny", "prompt": prompt, "max_tokens": tokens}
    body |= chance.choice(
        [
            {"mode": "exact"},
            {"mode": "sirius"},
            {"temperature": 0.7, "seed": seed},
            {"mode": "full"},
        ]
    )
    body["stream"] = chance.random() < 0.5
    if chance.random() < LEAVE:
        leave_early(url, body, chance.random() * 0.05)
        return "left"
    told = ask(f"{url}/v1/completions", body)
    if told.status != 200:
        return str(told.status)
    if body["stream"]:
        assert told.text.endswith("data: [DONE]\n\n")
        events = [json.loads(e[6:]) for e in told.text.split("\n\n")[:-2]]
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        usage, reason = told.json["usage"], told.json["choices"][0]["finish_reason"]
        assert usage["completion_tokens"] == tokens or reason == "stop"
    return str(reason)


def test_nothing_is_lost_under_load(tiny: TinyModels, tmp_path: Path) -> None:
    compiled = tiny("llama", "griffin").compiled
    with serving(compiled, tmp_path) as server, ThreadPoolExecutor(CLIENTS) as clients:

        def run(seeds: range) -> Counter[str]:
            return Counter(clients.map(lambda seed: one_request(server.url, seed), seeds))

        run(range(10_000, 10_000 + REQUESTS // 3))  # allocators and caches fill up
        before = server.resident
        became = run(range(REQUESTS))
        assert became["left"] + became["stop"] + became["length"] == REQUESTS, became
        assert became["left"] > REQUESTS * LEAVE / 2

        def samples() -> dict[str, float]:
            text = ask(f"{server.url}/metrics").text
            return {
                name: float(value)
                for name, value in re.findall(r'^(\S+)\{model_name="tiny"\} (\S+)$', text, re.M)
            }

        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        wait_until(lambda: sum(samples()[name] for name in names) == 0)
        after = server.resident
        assert samples()["sirius:request_failures_total"] == 0
        assert samples()["vllm:kv_cache_usage_perc"] == 0
        assert abs(after - before) <= 0.02 * before, (before, after)


def test_signals_of_the_process(tiny: TinyModels, tmp_path: Path) -> None:
    compiled = tiny("llama", "griffin").compiled
    body = {"model": "tiny", "prompt": [7, 8, 9], "max_tokens": 80, "mode": "full"}
    with (
        serving(compiled, tmp_path, "--max-rows", "1") as server,
        ThreadPoolExecutor(8) as clients,
    ):
        asked = [clients.submit(ask, f"{server.url}/v1/completions", body) for _ in range(8)]
        metrics = f"{server.url}/metrics"
        wait_until(lambda: 'waiting{model_name="tiny"} 0.0' not in ask(metrics).text)
        server.process.send_signal(signal.SIGTERM)
        statuses = Counter(future.result().status for future in asked)
        assert statuses == {200: 8}
        assert server.process.wait(30) == 0
        assert server.process.stderr is not None
        told = server.process.stderr.read()
        assert "draining" in told
        assert told.endswith("sirius: stopped\n")
