"""What importing and running the packages may load, and that nothing asks for a network."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import pytest

from sirius_compile import CompileConfig, compile_model
from tests.support.cli import Cli
from tests.support.models import TinyModels


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


def test_the_runtime_on_a_cpu_needs_no_transformers_no_typer_and_no_triton(
    tiny: TinyModels, tmp_path: Path
) -> None:
    path = tiny("llama", "topk").compiled.save(tmp_path / "m.sirius")
    code = (
        "import sys, torch\n"
        "triton = 'triton' in sys.modules\n"
        "import sirius_runtime\n"
        f"model = sirius_runtime.load({str(path)!r})\n"
        "assert model.generate('w7 w8', max_new_tokens=3).tokens\n"
        "import sirius_runtime.cli\n"
        "bad = {'transformers', 'typer', 'rich', 'huggingface_hub', 'onnxruntime', "
        "'jsonschema'}\n"
        "assert not bad & set(sys.modules), bad & set(sys.modules)\n"
        "assert ('triton' in sys.modules) == triton\n"
        "assert not any(m.startswith('sirius_runtime.kernels.cuda.device') for m in sys.modules)\n"
    )
    assert python(code).stderr == ""


def test_importing_the_runtime_loads_no_torch() -> None:
    done = python("import sys, sirius_runtime; assert 'torch' not in sys.modules")
    assert done.stderr == ""


def test_compiling_a_directory_opens_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hub's library online: `tests/conftest.py` tells it to stay offline otherwise."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(AssertionError, match="a connection was opened"):
        huggingface_hub.HfApi().model_info("any/model")
    options = CompileConfig(sparsity="topk", graphs="entries")
    assert compile_model("tally-3m", options).save(tmp_path / "m.sirius").exists()


def test_a_hub_model_without_a_network_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--cache-dir", tmp_path, "--out", tmp_path / "never.sirius")
    done = Cli(capsys, monkeypatch).compile("llama-3-8b", *flags)
    assert done.code == 2
    assert "meta-llama/Meta-Llama-3-8B" in done.err
    assert "download it" in done.err
