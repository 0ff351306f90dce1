"""`load`: which back end `auto` takes, and threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sirius_compile import CompileConfig, compile_model
from sirius_runtime import load
from sirius_runtime import loading as module
from sirius_runtime.errors import ConfigError
from sirius_runtime.kernels.native import references
from sirius_runtime.loading import BackendName, choose_backend, find_device, let_threads_sleep
from sirius_runtime.threads import MOST_KERNEL_THREADS, most_threads
from tests.support.cli import Cli
from tests.support.models import TinyModels

PROMPT = [7, 8, 9]


@pytest.fixture(scope="module")
def artifact(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    return tiny("llama", "topk").compiled.save(folder / "model.sirius")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on(monkeypatch: pytest.MonkeyPatch, device: str, missing: tuple[str, ...] = ()) -> None:
    """Pretends that there is a device, and that packages are not installed."""
    monkeypatch.setattr(module, "find_device", lambda _: SimpleNamespace(type=device))
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in missing else name)


@pytest.mark.parametrize(
    ("device", "missing", "graphs", "onnx", "backend", "reason"),
    [
        ("cuda", (), True, True, "cudagraph", "a CUDA GPU, and Triton"),
        ("cuda", ("triton",), True, True, "eager", "no Triton"),
        ("cpu", (), True, True, "eager", "the CPU"),
        ("mps", (), True, False, "eager", "device"),
        ("cuda", (), False, True, "onnxruntime", "ONNX graphs only"),
        ("cpu", ("torch",), True, True, "onnxruntime", "PyTorch is not installed"),
        ("cpu", ("torch",), True, False, "eager", "no ONNX graphs"),
    ],
)
def test_what_auto_stands_for(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    missing: tuple[str, ...],
    graphs: bool,
    onnx: bool,
    backend: str,
    reason: str,
) -> None:
    on(monkeypatch, device, missing)
    choice = choose_backend(graphs, onnx)
    assert choice == choose_backend(graphs, onnx)  # nothing is timed
    assert choice.backend == backend
    assert reason in choice.reason


def test_auto_says_whether_there_are_kernels() -> None:
    with references():
        assert choose_backend(True, False, "cpu").reason == "the CPU, without kernels"


def test_auto_loads_and_says_so_in_a_line(artifact: Path) -> None:
    told: list[str] = []
    model = load(artifact, device="cpu", backend="auto", progress=told.append)
    (line,) = told
    assert line.startswith("backend eager: the CPU, with")
    assert model.generate(PROMPT).tokens == load(artifact, device="cpu").generate(PROMPT).tokens


def test_the_command_line_takes_auto(cli: Cli, artifact: Path) -> None:
    command = ("run", artifact, "--prompt", "w7 w8", "--device", "cpu", "--max-new-tokens", "3")
    done = cli.run(*command)
    assert done.code == 0
    assert done.err.count("sirius: backend eager: ") == 1
    assert "backend" not in cli.run(*command, "--backend", "eager").err


@pytest.mark.usefixtures("threads")
def test_threads_are_the_process_s(artifact: Path, cli: Cli) -> None:
    load(artifact, device="cpu", threads=3)
    assert torch.get_num_threads() == 3
    load(artifact, device="cpu")
    assert torch.get_num_threads() == 3
    command = ("run", artifact, "--prompt", "w7", "--device", "cpu", "--max-new-tokens", "2")
    assert cli.run(*command, "--threads", "2").code == 0
    assert torch.get_num_threads() == 2
    refused = cli.run(*command, "--threads", "0")
    assert (refused.code, refused.out) == (2, "")
    assert "threads must be >= 1, got 0" in refused.err


def test_options_out_of_range(artifact: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"threads": -2, "backend": "auto"}, "threads must be >= 1, got -2"),
        ({"threads": 100_000}, f"threads must be at most {most_threads()} here"),
        ({"threads": 10**30, "backend": "onnxruntime"}, "threads must be at most .*, got '10000"),
        ({"rows": 0}, "rows must be >= 1, got 0"),
        ({"backend": "fast"}, "one of auto, eager, inductor, cudagraph, period, aoti, onnxruntime"),
    ]
    before = torch.get_num_threads()
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            load(artifact, **options)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("cores", "most"), [(1, 16), (2, 32), (16, 256), (64, 256), (384, 384)])
def test_the_most_threads_follow_from_cores_and_kernels(
    monkeypatch: pytest.MonkeyPatch, cores: int, most: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert most_threads() == most


def test_the_kernels_take_so_many_threads() -> None:
    source = Path(module.__file__).parent / "kernels" / "csrc" / "threads.h"
    assert f"constexpr int MOST_THREADS = {MOST_KERNEL_THREADS};" in source.read_text()


def test_devices_that_hold_no_values_are_refused() -> None:
    for name in ("", "abacus", "meta", "hpu", "privateuseone", "mkldnn", "xla", "cuda:-1", "²"):
        with pytest.raises(ConfigError) as refused:
            find_device(name)
        assert f"device {name!r} can't be used here (" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        find_device("x" * 5000)
    assert len(str(refused.value)) < 400


@pytest.mark.slow
def test_an_artifact_of_onnx_graphs_alone(tmp_path: Path) -> None:
    options = CompileConfig(sparsity="topk", period=4, dtype="float32", graphs="onnx")
    path = compile_model("tally-3m", options).save(tmp_path / "model.sirius")
    told: list[str] = []
    model = load(path, backend="auto", progress=told.append)
    assert told[0] == f"backend {BackendName.ONNXRUNTIME}: the artifact holds ONNX graphs only"
    assert model.generate("Q:", max_new_tokens=4).stats.tokens == 4


def test_the_tokenizer_is_read_before_the_back_end_is_made(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reading it takes for a moment is then not on top of all the rest."""
    order: list[str] = []

    def noting(name: str) -> None:
        own = getattr(module, name)

        def noted(*args: Any, **options: Any) -> Any:
            order.append(name)
            return own(*args, **options)

        monkeypatch.setattr(module, name, noted)

    for name in ("_tokenizer", "_trim", "make_backend"):
        noting(name)
    load(artifact)
    assert order == ["_tokenizer", "_trim", "make_backend"]


@pytest.mark.gate
def test_torch_s_idle_threads_sleep(artifact: Path) -> None:
    code = f"import os, sirius_runtime; sirius_runtime.load({str(artifact)!r}, device='cpu'); "
    code += "print(os.environ['OMP_WAIT_POLICY'])"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "passive"


def test_torch_s_idle_threads_do_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
