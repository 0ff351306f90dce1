"""`examples/ray_serve.py` on a local Ray cluster, where Ray is installed."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime.model import SiriusModel
from tests.support.http import ask
from tests.support.models import TinyModels
from tests.support.serving import wait_until

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")
psutil = pytest.importorskip("psutil")
PORT, CLIENTS = 18_123, 8
COMMAND_PORT = 8000
"""`serve run` has no option for it."""
ROOT = Path(__file__).parent.parent


@pytest.fixture
def address(tiny: TinyModels, tmp_path: Path) -> Iterator[str]:
    """Two replicas of a tiny model."""
    from ray import serve

    from examples.ray_serve import build

    tiny("llama", "griffin").compiled.save(path := tmp_path / "tiny.sirius")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        arguments = {"model": str(path), "replicas": "2", "rows": "4", "context": "96"}
        serve.run(build(arguments), blocking=False)
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas(process: int | None = None) -> list[int]:
    """The process ids of the replicas of a process' cluster; by default this one's."""
    children = psutil.Process(process).children(recursive=True)
    return [p.pid for p in children if "ServeReplica" in " ".join(p.cmdline())]


@contextmanager
def serve_run(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command line, in a process group of its own, as a shell starts it."""
    command = [str(Path(sys.executable).with_name("serve")), "run", "examples.ray_serve:build"]
    with subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        children = []
        try:
            yield process
        finally:
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
                process.kill()
            for child in children:
                child.kill()


def ready(address: str) -> bool:
    """Whether requests are taken there."""
    try:
        return ask(f"{address}/ready").status == 200
    except OSError:
        return False


def completed(address: str) -> int:
    """Requests that the replica which happens to be asked has answered."""
    told = ask(f"{address}/metrics").text
    return sum(
        int(float(n)) for n in re.findall(r"^vllm:request_success_total\S* (\S+)$", told, re.M)
    )


def test_no_request_is_lost_when_a_replica_dies(address: str, tiny: TinyModels) -> None:
    model: SiriusModel = tiny("llama", "griffin").model
    prompt, tokens = [10, 11, 12], 30
    alone = model.generate(input_ids=prompt, mode="exact", max_new_tokens=tokens, fallback=False)
    assert alone.texts is not None
    before = replicas()
    assert len(before) == 2
    with openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=8) as client:

        def complete(index: int) -> str:
            told = client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=tokens,
                temperature=0,
                extra_body={"mode": "exact"},
            )
            return told.choices[0].text

        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(complete, index) for index in range(300)]
            wait_until(lambda: sum(future.done() for future in asked) > 60, 120)
            os.kill(before[0], signal.SIGKILL)
            texts = Counter(future.result() for future in asked)
    assert texts == {alone.texts[0]: 300}
    wait_until(lambda: len(replicas()) == 2 and before[0] not in replicas(), 120)
    # The new one serves too.
    time.sleep(1)
    assert ask(f"{address}/ready").status == 200


def test_the_command_line_starts_another_replica_under_load(tmp_path: Path) -> None:
    """`serve run` with the shipped model; the second replica is Ray's decision, by the queue."""
    address = f"http://127.0.0.1:{COMMAND_PORT}"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", COMMAND_PORT)) == 0:
            pytest.skip(f"port {COMMAND_PORT} is taken, which `serve run` listens on")
    config = CompileConfig(sparsity="topk", graphs="entries", dtype="float32")
    compiled = compile_model("tally-3m", config)
    compiled.save(path := tmp_path / "tally.sirius")
    model, tokens = compiled.to_runtime(), 60
    prompts = [p.prompt for p in itertools.islice(problems(Task.REASONING, "test", seed=3), 6)]
    told = model.generate(prompts, mode="exact", max_new_tokens=tokens)
    assert (alone := told.texts) is not None
    with serve_run(f"model={path}", "replicas=1", "most=2", "rows=2", "context=256") as process:
        wait_until(lambda: ready(address), 120)
        assert len(replicas(process.pid)) == 1
        over = threading.Event()
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="-") as client,
            ThreadPoolExecutor(CLIENTS) as clients,
        ):

            def load(first: int) -> int:
                """Asks and compares until the load is over; how many answers there were."""
                for count in itertools.count():
                    if over.is_set():
                        return count
                    index = (first + count) % len(prompts)
                    told = client.completions.create(
                        model="tally",
                        prompt=prompts[index],
                        max_tokens=tokens,
                        temperature=0,
                        extra_body={"mode": "exact"},
                    )
                    assert told.choices[0].text == alone[index]
                raise AssertionError

            asked = [clients.submit(load, number) for number in range(CLIENTS)]
            try:
                wait_until(lambda: len(replicas(process.pid)) == 2, 180)
                only = completed(address)
                # Counts grow, so that a smaller one is the other replica's.
                wait_until(lambda: 0 < completed(address) < only, 120)
            finally:
                over.set()
            assert all(future.result() for future in asked)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 0
        wait_until(lambda: not any(child.is_running() for child in children), 30)
        assert not ready(address)
