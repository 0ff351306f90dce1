"""Measures continuous batching: throughput and latency by the number of clients.

    python -m benchmarks.serving --model model.sirius --clients 1 2 4 8 16
    python -m benchmarks.serving --model model.sirius --gguf model.gguf   # and llama-server
    python -m benchmarks.serving --model model.sirius --llama-server http://127.0.0.1:8080

`sirius serve` runs as its own process on loopback. Each client asks for one streamed answer after
another. Every number of clients asks for the same answers, greedily, after a round that is not
counted. Printed are tokens per second of all clients together, the ratio
to the baseline, and the median and 99th percentile of the time to the first token, of the time
between tokens, and of whole answers. The baseline is one client of mode `full`: the dense model,
one request at a time, by the same server.

`--replicas R` starts R servers, which the clients ask in turn; `--threads` is for each of them.

With `--gguf`, the same clients ask llama.cpp's `llama-server` for answers to the same prompts, of
the same length at most: as many slots as our server has rows, as many threads, as much context of
each, and no prefix of a prompt kept, as of ours. `--llama-server` names the program where it is not
on PATH, or the address of one that runs already, with options of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.kernels import cpu_name
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime.command_line import finish, path_argument, positive_number
from sirius_runtime.errors import ConfigError

_START_SECONDS = 300


@dataclass(frozen=True)
class Answer:
    """One answer: seconds from its request to the first token, and to the end; its tokens."""

    first: float
    whole: float
    tokens: int
    accepted: int
    drafted: int


@dataclass(frozen=True)
class Round:
    """The answers of a round with so many clients."""

    name: str
    clients: int
    seconds: float
    answers: list[Answer]

    @property
    def speed(self) -> float:
        """Tokens per second of all clients."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


@contextmanager
def server(command: Sequence[str | Path], port: int) -> Iterator[None]:
    """A context with a running server, entered when it is ready."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + _START_SECONDS
            while not _is_there(f"{_url(port)}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    told = shlex.join(str(part) for part in command)
                    raise ConfigError(f"{command[0]} did not start; see what it says: {told}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait(60)


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _is_there(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


def free_port() -> int:
    """A port on which no process listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def llama_server(
    program: str, gguf: Path, slots: int, context: int, threads: int
) -> list[str | Path]:
    """llama-server's command, but for the port; `context`: tokens of a slot.

    Raises ConfigError where it is not installed.
    """
    found = shutil.which(program)
    if found is None:
        raise ConfigError(
            f"there is no program {program}; install llama.cpp's llama-server, and name it by "
            "--llama-server"
        )
    sizes = ["-np", str(slots), "-c", str(slots * context), "-t", str(threads)]
    return [found, "-m", gguf, *sizes, "--no-cache-prompt", "--cache-ram", "0", "--offline"]


def ask(url: str, body: dict[str, object]) -> Answer:
    """One streamed completion."""
    content = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}})
    request = urllib.request.Request(
        f"{url}/v1/completions", content.encode(), {"Content-Type": "application/json"}
    )
    begin, first, usage = time.perf_counter(), None, {}
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            said = json.loads(line[6:])
            if "error" in said:
                raise RuntimeError(said["error"]["message"])
            usage = said.get("usage") or usage
            if first is None and said["choices"] and said["choices"][0]["text"]:
                first = time.perf_counter() - begin
    whole = time.perf_counter() - begin
    return Answer(
        first if first is not None else whole,
        whole,
        usage["completion_tokens"],
        usage.get("accepted_tokens", 0),
        usage.get("drafted_tokens", 0),
    )


def run_round(
    name: str, urls: Sequence[str], clients: int, prompts: Sequence[str], options: dict[str, object]
) -> Round:
    """Asks for the answers to all prompts, so many at a time, each server in its turn."""
    bodies = [options | {"prompt": prompt} for prompt in prompts]
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, itertools.cycle(urls), bodies))
    return Round(name, clients, time.perf_counter() - begin, answers)


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the 99th percentile by the nearest rank."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def table(rounds: Sequence[Round], baseline: Round) -> list[str]:
    """As Markdown; times in milliseconds."""
    lines = [
        "| server | clients | tokens/s | ratio | first token p50 / p99 ms | between tokens p50 / "
        "p99 ms | answer p50 / p99 s | accepted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in rounds:
        first = percentiles([1e3 * a.first for a in one.answers])
        between = percentiles(
            [1e3 * (a.whole - a.first) / max(a.tokens - 1, 1) for a in one.answers]
        )
        whole = percentiles([a.whole for a in one.answers])
        drafted = sum(a.drafted for a in one.answers)
        accepted = f"{sum(a.accepted for a in one.answers) / drafted:.2f}" if drafted else "-"
        lines.append(
            f"| {one.name} | {one.clients} | {one.speed:.1f} | {one.speed / baseline.speed:.2f} | "
            f"{first[0]:.0f} / {first[1]:.0f} | {between[0]:.1f} / {between[1]:.1f} | "
            f"{whole[0]:.2f} / {whole[1]:.2f} | {accepted} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Continuous batching, by the number of clients.")
    parser.add_argument("--model", type=path_argument, required=True, metavar="MODEL.sirius")
    parser.add_argument("--gguf", type=path_argument, metavar="FILE", help="for llama-server")
    parser.add_argument(
        "--llama-server", metavar="PROGRAM|URL", help="default: llama-server on PATH, with --gguf"
    )
    parser.add_argument("--clients", type=positive_number, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--answers", type=positive_number, default=32, help="of each round")
    parser.add_argument("--tokens", type=positive_number, default=64, help="of an answer, at most")
    parser.add_argument("--modes", nargs="+", default=["full", "exact", "sirius"])
    parser.add_argument("--period", type=positive_number, help="default: the artifact's")
    parser.add_argument(
        "--context", type=positive_number, default=512, help="tokens of a prompt and its answer"
    )
    parser.add_argument("--replicas", type=positive_number, default=1, help="servers")
    parser.add_argument("--threads", type=positive_number, help="of each server")
    parsed = parser.parse_args(arguments)

    def command() -> None:
        asked = itertools.islice(problems(Task.REASONING, "test", seed=1), parsed.answers)
        prompts = [problem.prompt for problem in asked]
        most, ports = max(parsed.clients), [free_port() for _ in range(parsed.replicas)]
        there = (parsed.llama_server or "").startswith(("http://", "https://"))
        if parsed.llama_server is not None and not there and parsed.gguf is None:
            raise ConfigError("--llama-server names a program; give it a model by --gguf")
        theirs: list[str | Path] = []
        if parsed.gguf is not None and not there:
            threads = parsed.threads or torch.get_num_threads()
            program = parsed.llama_server or "llama-server"
            theirs = llama_server(program, parsed.gguf, most, parsed.context, threads)
        rounds: list[Round] = []

        def measure(name: str, urls: Sequence[str], **options: object) -> None:
            given = {"max_tokens": parsed.tokens, "temperature": 0, **options}
            run_round(name, urls, most, prompts, given)  # not counted
            for count in parsed.clients:
                rounds.append(run_round(name, urls, count, prompts, given))
                print(table(rounds[-1:], rounds[0])[-1], file=sys.stderr, flush=True)

        ours = [sys.executable, "-m", "sirius_runtime.cli", "serve", parsed.model]
        # Without prefixes: every round runs all of its prompts.
        ours += ["--served-model-name", "model", "--max-rows", str(most), "--prefix-cache", "0"]
        ours += ["--context", str(parsed.context)]
        ours += [] if parsed.threads is None else ["--threads", str(parsed.threads)]
        with ExitStack() as servers:
            for port in ports:
                servers.enter_context(server([*ours, "--port", str(port)], port))
            for mode in parsed.modes:
                period = (
                    {} if parsed.period is None or mode == "full" else {"period": parsed.period}
                )
                urls = [_url(port) for port in ports]
                measure(f"sirius, {mode}", urls, model="model", mode=mode, **period)
        if there:
            measure("llama-server", [parsed.llama_server.rstrip("/")], cache_prompt=False)
        elif theirs:
            with server([*theirs, "--port", str(ports[0])], ports[0]):
                measure(f"llama-server, {parsed.gguf.name}", [_url(ports[0])], cache_prompt=False)
        print(
            f"{cpu_name()}; {parsed.replicas} x {parsed.threads or 'all'} threads; "
            f"{parsed.answers} answers of at most {parsed.tokens} tokens\n"
        )
        print("\n".join(table(rounds, rounds[0])))

    return finish("serving", command)


if __name__ == "__main__":
    sys.exit(main())
