"""`examples/ray_serve.py` on a local Ray cluster, where Ray is installed."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from sirius_runtime.model import SiriusModel
from tests.support.http import ask
from tests.support.models import TinyModels
from tests.support.serving import wait_until

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")
PORT = 18_123


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


def replicas() -> list[int]:
    """The process ids of this cluster's replicas."""
    psutil = pytest.importorskip("psutil")
    children = psutil.Process().children(recursive=True)
    return [p.pid for p in children if "ServeReplica" in " ".join(p.cmdline())]


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
