"""A process that is forked without its parent's threads is told so, and does not hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import TinyModels

FORKED = """
import os, signal, sys
import torch, sirius_runtime
from sirius_runtime.errors import GenerationError

PROMPT = list(range(7, 47))

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs is ended
        try:
            work()
        except GenerationError as error:
            print(error, flush=True)
            os._exit(2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

def generate():
    model.generate(PROMPT, max_new_tokens=4)

def on_one_thread():
    torch.set_num_threads(1)
    generate()

def once_more_loaded():
    sirius_runtime.load(sys.argv[1], device="cpu").generate(PROMPT, max_new_tokens=4)

torch.set_num_threads(2)
model = sirius_runtime.load(sys.argv[1], device="cpu")
in_child(generate)  # nothing was generated yet
torch.set_num_threads(1)
generate()
torch.set_num_threads(2)
in_child(generate)  # on one thread only
generate()
in_child(generate)
in_child(once_more_loaded)
in_child(on_one_thread)
in_child(lambda: in_child(generate))  # a child's child lacks them too
generate()  # the parent goes on
"""


@pytest.mark.gate
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_generating_after_a_fork(
    tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("artifact")
    path: Path = tiny("llama", "topk").compiled.save(folder / "model.sirius")
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    told = [line for line in lines if "forked from" in line]
    assert [line for line in lines if line not in told] == ["0", "0", "2", "2", "0", "2", "0"]
    assert len(told) == 3
    assert "multiprocessing.get_context('spawn')" in told[0]
    assert "torch.set_num_threads(1)" in told[0]
