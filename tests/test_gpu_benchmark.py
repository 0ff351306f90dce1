"""`make gpu` without a GPU: its parts at tiny shapes, and what becomes of one that fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import cpu, gpu, gpu_check, parts, periods, random_programs, steps
from benchmarks.parts import Part
from benchmarks.random_programs import METHODS, SHAPES, RandomPrograms, Shape
from sirius_runtime.spec import Method
from tests.support.fast import slow_but
from tests.support.kernels import require_compiler

SMALL = ("--shape", "tiny", "--context", "16", "--rounds", "2")


@pytest.mark.slow
def test_operators_and_tokens_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--device", "cpu", "--smoke"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    row = r"^\| (\w+)(, \w+ planes?)? \| \w+ \| \d+ \| \S+ \| \S+ \| ok \|$"
    rows = re.findall(row, printed, re.MULTILINE)
    operators, nested = ({n for n, title in rows if bool(title) is own} for own in (False, True))
    known = {name.split("::")[1].split(".")[0] for name in registered()}
    assert known - operators == {"topk_moe", "embedding"}  # near ties; nested weights only
    assert {name for name in known if name.endswith("_mlp") or "linear" in name} <= nested
    assert "embedding" in nested
    assert len(rows) == 3 * (len(operators) + 2 * len(nested))
    assert "| griffin | recorded | 6 of 6 | ok |" in printed


def registered() -> list[str]:
    every = torch._C._dispatch_get_all_op_names()
    return [name for name in every if name.startswith("sirius::")]


def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(gpu_check.linear_cases(torch.float32, 1, 1, 16))
    device = torch.device("cpu")
    assert case.error(device) < gpu_check.BOUNDS[torch.float32]
    for wrong in (1e-3, float("nan")):
        monkeypatch.setattr(
            gpu_check.sirius, "linear", lambda x, w, b, by=wrong: x @ w.t() + b + by
        )
        assert case.error(device) > gpu_check.BOUNDS[torch.float32]


def test_a_wrong_nested_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold or the rounding of activations may explain a difference, but not a wrong bit."""
    cases = {c.name: c for c in gpu_check.nested_cases(torch.float32, 1, 1, 64, 96)}
    device = torch.device("cpu")
    for name in ("linear, both planes", "topk_mlp, high plane"):
        case = cases[name]
        assert case.difference(device).right
        monkeypatch.setattr(gpu_check, "_on", lambda _, args: [args[0], args[1] ^ 0x10, *args[2:]])
        assert not case.difference(device).right
        monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods", [["topk", "griffin+teal"], pytest.param(METHODS, marks=pytest.mark.slow)]
)
def test_steps(methods: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    require_compiler()
    flags = ["--skipped", "0.5", "--verify", "4", "--threads", str(torch.get_num_threads())]
    steps.main([*SMALL, *flags, "--methods", *methods])
    printed = capsys.readouterr().out
    for name in ("dense", "dense, transformers eager", "verify 4"):
        assert f"| {name} |" in printed
    for method in methods:
        assert f"| {method}, 50% skipped |" in printed
    assert "| 16 tokens |" in printed


@pytest.mark.gate
def test_recorded_periods(capsys: pytest.CaptureFixture[str]) -> None:
    periods.main([*SMALL, "--period", "4", "--width", "1", "2"])
    printed = capsys.readouterr().out
    assert re.search(r"^\| 4 \| 2 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", printed, re.MULTILINE)


@pytest.mark.parametrize(
    "method",
    slow_but(METHODS, (), {Method.GRIFFIN_TEAL}),
)
def test_thresholds_skip_what_they_are_to_skip(method: Method) -> None:
    programs = RandomPrograms(SHAPES["tiny"], torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        backend = programs.backend(method, 0.25)
        state = programs.state(backend, 8, 0.25)
        # the very state that the thresholds were learned in differs: caches are random
        result = state.step("sparse")
    if method in (Method.GRIFFIN, Method.TOPK):
        assert "kept" not in result
        return
    sites = [site for site in backend.program.sparsity.sites if site.counted]
    units = torch.tensor([float(site.units) for site in sites])
    if method is Method.GRIFFIN_TEAL:  # of the neurons that the prompt keeps, which are more here
        units[: SHAPES["tiny"].layers] = SHAPES["tiny"].neurons * 0.75
    share = result["kept"][:, 0] / units
    assert share.mean() == pytest.approx(0.75, abs=0.08)


def test_parameters_that_a_step_reads() -> None:
    shape = SHAPES["8b"]
    assert shape.read() / 1e9 == pytest.approx(7.5, abs=0.05)  # 8.03 less an embedding of 0.53
    for method in METHODS:
        assert shape.read(method, 0.0) == pytest.approx(shape.read())
    # Of the README's table: densities of Llama-3-8B at half count the embedding too.
    embedding = shape.hidden * shape.vocabulary
    density = {m: (shape.read(m, 0.5) + embedding) / (shape.read() + embedding) for m in METHODS}
    assert density[Method.GRIFFIN] == pytest.approx(0.649, abs=0.001)
    assert density[Method.TOPK] == pytest.approx(0.766, abs=0.001)


@pytest.mark.gate
def test_weights_of_two_layouts_are_one_storage() -> None:
    programs = RandomPrograms(Shape("small", 32, 64, 2, 1, 16, 64, 1), torch.device("cpu"))
    with torch.inference_mode():
        dense, teal = (programs.backend(m, 0.5).weights for m in (Method.GRIFFIN, Method.TEAL))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert dense[name].shape == teal[name].shape[::-1]
    assert dense[name].data_ptr() == teal[name].data_ptr()


def part(name: str, module: str, *arguments: str, seconds: int = 60) -> Part:
    return Part(name, name.title(), module, arguments, seconds)


@pytest.mark.gate
def test_parts_that_fail_stop_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "good.py").write_text("print('| a row |')")
    (folder / "bad.py").write_text("print('begun'); raise SystemExit('no memory')")
    (folder / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    chosen = [part("bad", "bad"), part("slow", "slow", seconds=2), part("gone", "gone")]
    chosen.append(part("good", "good"))
    monkeypatch.setattr(gpu, "parts", lambda device, smoke: chosen)
    out = tmp_path / "out"
    assert gpu.main(["--device", "cpu", "--out", str(out)]) == 1
    said = {path.stem: path.read_text() for path in out.iterdir()}
    assert "exit code 1\nno memory" in said["gpu-bad"]
    assert "begun" in said["gpu-bad"]
    assert "stopped after its 2 seconds" in said["gpu-slow"]
    assert "begun" in said["gpu-slow"]
    assert "missing: there is no benchmarks/gone.py" in said["gpu-gone"]
    assert "\n\n| a row |\n" in said["gpu-good"]
    for text in said.values():
        assert f"torch {torch.__version__}" in text
        assert "; commit " in text
    assert "not finished: bad, slow, gone" in capsys.readouterr().out
    assert gpu.main(["--device", "cpu", "--out", str(out), "--only", "good"]) == 0
    assert gpu.main(["--device", "cpu", "--only", "better"]) == 2


def test_the_whole_is_under_eight_minutes() -> None:
    chosen = gpu.parts("cuda", smoke=False)
    assert sum(part.seconds for part in chosen) <= 480
    modules = {part.module for part in chosen}
    assert modules == {"gpu_check", "gpu_kernels", "steps", "periods"}


def test_the_cpu_s_is_under_twenty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = cpu.parts(tmp_path)
    assert sum(part.seconds for part in chosen) <= 1200
    assert all((parts.ROOT / "benchmarks" / f"{part.module}.py").exists() for part in chosen)
    assert cpu.main(["--out", str(tmp_path), "--only", "better"]) == 2
    assert "there are kernels, steps, nested, end-to-end, costs, context" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert "no CUDA GPU here; see --smoke --device cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--smoke", "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("gpu-*.md"))) == 3


def test_names_are_those_of_the_methods() -> None:
    assert set(random_programs.METHODS) == set(Method) - {Method.NONE, Method.EXPERTS}
