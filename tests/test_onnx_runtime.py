"""The ONNX back end: what it needs, what it shares, what it exports, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch

from sirius_compile import CompileConfig, compile_model
from sirius_compile.cli import main as sirius_compile
from sirius_compile.onnx.add import add_onnx
from sirius_compile.onnx.package import every_node, onnx_summary
from sirius_runtime import TextStream, load
from sirius_runtime.artifact import Artifact
from sirius_runtime.backends import onnx_graphs as backend_module
from sirius_runtime.backends.onnx import OnnxBackend
from sirius_runtime.backends.onnx_graphs import Graph
from sirius_runtime.backends.onnx_state import DeviceCaches, HostCaches, OnnxState
from sirius_runtime.cli import main as sirius
from sirius_runtime.errors import BackendError, ConfigError
from sirius_runtime.onnx_files import WEIGHTS_FILE, export_onnx, gathered_bytes
from sirius_runtime.spec import WeightSpec
from tests.support.artifacts import rebuild
from tests.support.fast import slow_but
from tests.support.models import TinyModels, random_decoder, word_tokenizer
from tests.support.onnx import CPU, Pairs, load_onnx

PROMPT = "w7 w8 w9"  # its greedy answer ends after 27 tokens
ROOT = Path(__file__).parent.parent
STANDARD = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}


@pytest.fixture(scope="module")
def small(pairs: Pairs) -> Path:
    return pairs("griffin").path


@pytest.fixture(scope="module")
def exported(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "new"
    assert sirius(["export-onnx", str(small), str(folder)]) == 0
    return folder


def without(*packages: str) -> str:
    """Code that makes imports of these packages fail, as where they are not installed."""
    return (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {packages}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )


def python(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "passes", ROOT / "runtime")))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": path, "PATH": os.environ["PATH"]},
    )


# without PyTorch


def test_an_artifact_generates_where_torch_is_not_installed(small: Path, tmp_path: Path) -> None:
    wanted = load(small, device="cpu").generate(PROMPT, mode="exact").texts
    code = without("torch", "transformers", "onnx", "typer", "safetensors") + (
        "import sirius_runtime, sirius_runtime.cli\n"
        f"model = sirius_runtime.load({str(small)!r}, backend='onnxruntime', providers={CPU})\n"
        f"prompts = [{PROMPT!r}] * 2\n"
        "for mode in ('exact', 'sirius', 'full', 'sparse', 'sample'):\n"
        "    options = {'stop': '####', 'refresh': 1, 'max_new_tokens': 12}\n"
        "    output = model.generate(prompts, mode=mode, **options)\n"
        "    assert output.stats.tokens\n"
        f"output = model.generate({PROMPT!r}, mode='exact')\n"
        "print(output.texts)\n"
        f"run = ['run', {str(small)!r}, '-p', 'w7', '--backend', 'onnxruntime', '--threads', '1']\n"
        "for options in ([], ['--json'], ['--compare', '--max-new-tokens', '8']):\n"
        "    assert not sirius_runtime.cli.main(run + options)\n"
        f"assert not sirius_runtime.cli.main(['inspect', {str(small)!r}])\n"
        f"target = {str(tmp_path / 'out')!r}\n"
        f"assert not sirius_runtime.cli.main(['export-onnx', {str(small)!r}, target])\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(wanted)


def test_other_back_ends_say_that_they_need_torch(small: Path) -> None:
    command = ["run", str(small), "-p", "w7", "--backend", "eager"]
    done = python(without("torch") + f"import sirius_runtime.cli as c; sys.exit(c.main({command}))")
    assert done.returncode == 2
    assert "needs PyTorch" in done.stderr
    assert "or use backend onnxruntime" in done.stderr


def test_without_onnxruntime_it_is_named(small: Path) -> None:
    command = ["run", str(small), "-p", "w7", "--backend", "onnxruntime"]
    code = without("onnxruntime") + f"import sirius_runtime.cli as c; sys.exit(c.main({command}))"
    done = python(code)
    assert done.returncode == 2
    assert "pip install onnxruntime" in done.stderr


# what is shared


def test_every_weight_is_the_artifact_s_own_bytes(small: Path) -> None:
    with Artifact.open(small) as artifact:
        backend = OnnxBackend(artifact, providers=CPU, threads=1, progress=print)
        buffer, slots = artifact.weight_slots()
        start = np.frombuffer(buffer, np.uint8).ctypes.data
        for name, value in backend._weights.items():
            assert value.data_ptr() == start + slots[name].start


@pytest.mark.parametrize(
    "method", slow_but(("griffin", "griffin+teal", "topk", "teal"), {"griffin"})
)
def test_what_griffin_gathers_is_stated(
    pairs: Pairs, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pairs(method).onnx
    backend = model.backend
    assert isinstance(backend, OnnxBackend)
    held: list[int] = []
    choose = OnnxState.choose_neurons

    def chosen(state: OnnxState) -> None:
        choose(state)
        held.append(sum(v.numpy().nbytes for v in state.neurons.values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxState, "choose_neurons", chosen)
        model.generate([[7, 8, 9], [9, 8, 7]], max_new_tokens=2)
    extra = gathered_bytes(model.program)
    assert held == [2 * extra]
    assert bool(extra) == method.startswith("griffin")
    assert (f"{extra:,} bytes a row" in onnx_summary(model.program)) == bool(extra)
    assert sirius(["inspect", str(pairs(method).path)]) == 0
    (line,) = [n for n in capsys.readouterr().out.splitlines() if n.startswith("onnx ")]
    assert ("copy of the kept neurons" in line) == bool(extra)
    assert f"{extra:,} bytes more" in line or not extra


MEMORY = """
import sirius_runtime
class Watch:
    most = 0
    def put(self, tokens):
        lines = open("/proc/self/smaps_rollup").read().splitlines()
        (dirty,) = [line.split()[1] for line in lines if line.startswith("Private_Dirty")]
        self.most = max(self.most, int(dirty) / 1024)
    def end(self):
        pass
def run(path):
    watch = Watch()
    cpu = ["CPUExecutionProvider"]
    model = sirius_runtime.load(path, backend="onnxruntime", providers=cpu, threads=1)
    for mode in ("sirius", "full", "sparse"):
        model.generate([7, 8, 9], max_new_tokens=9, mode=mode, eos_token_id=[], streamer=watch)
    return model, watch.most
small, before = run({small!r})
large, after = run({large!r})
print(after - before)
"""
"""Prints by how many MiB what the process has for itself grows at the most as it generates."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["topk", "griffin"])
def test_weights_are_not_copied_into_memory(method: str, tmp_path: Path) -> None:
    """Four graphs over 400 MB of weights: what the process has for itself grows by far less, and
    by what griffin gathers."""
    paths, gathered = {}, 0.0
    for name, sizes in (
        ("small", {}),
        ("large", {"hidden_size": 1024, "intermediate_size": 16384, "vocab_size": 8192}),
    ):
        options = CompileConfig(sparsity=method, period=4, dtype="float32", graphs="onnx")
        made = compile_model(random_decoder("llama", **sizes), options)
        paths[name] = str(made.save(tmp_path / f"{name}.sirius"))
        gathered = gathered_bytes(made.spec) / 2**20
    weights = Path(paths["large"]).stat().st_size / 2**20
    assert weights > 400
    done = python(MEMORY.format(**paths))
    assert done.returncode == 0, done.stderr
    grown = float(done.stdout.splitlines()[-1])
    assert gathered <= grown < gathered + 0.15 * weights


@pytest.mark.slow
def test_weights_beyond_two_gigabytes(pairs: Pairs, tmp_path: Path) -> None:
    """An artifact and its export whose weights lie after 2.2 GB of others."""
    tally = pairs("griffin", 2, 8, "tally-3m").path
    prompt = "Q: Zoe has 25 nuts. Bob has 20 fewer than Zoe. How many nuts does Bob have?\nA:"
    made = compile_model(
        "tally-3m", CompileConfig(sparsity="topk", period=4, dtype="float32", graphs="onnx")
    )
    filler = WeightSpec("filler", "float64", (275_000_000,), retype=False)
    spec = replace(made.spec, weights=(filler, *made.spec.weights))
    zeros = torch.zeros(filler.shape, dtype=torch.float64)
    large = replace(made, spec=spec, weights=lambda w: zeros if w is filler else made.weights(w))
    path = large.save(tmp_path / "large.sirius")
    wanted = load(tally, device="cpu").generate(prompt, mode="full", max_new_tokens=8).tokens
    assert load_onnx(path).generate(prompt, mode="full", max_new_tokens=8).tokens == wanted
    folder = tmp_path / "folder"
    export_onnx(path, folder)
    path.unlink()
    assert (folder / WEIGHTS_FILE).stat().st_size > 2**31
    example = ROOT / "examples" / "onnx_minimal.py"
    done = python(
        f"import sys, runpy; sys.argv = ['', {str(folder)!r}, {prompt!r}]\n"
        f"runpy.run_path({str(example)!r})\n"
    )
    assert done.stdout.strip().endswith("#### 5"), done.stderr


@pytest.mark.parametrize(
    "given",
    [
        (),
        *(
            pytest.param(given, marks=pytest.mark.gate)
            for given in ((".",), (".", "Q:"), ("nowhere", "Q:"), ("a", "b", "c"))
        ),
    ],
)
def test_the_example_names_what_it_needs(given: tuple[str, ...], tmp_path: Path) -> None:
    example = ROOT / "examples" / "onnx_minimal.py"
    done = subprocess.run(
        [sys.executable, str(example), *given], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "usage: onnx_minimal.py FOLDER PROMPT, of a folder that `sirius export-onnx` wrote\n"
    )


def test_the_exported_weights_are_one_safetensors_file(small: Path, exported: Path) -> None:
    found = safetensors.torch.load_file(exported / WEIGHTS_FILE)
    with Artifact.open(small) as artifact:
        stored = artifact.weights()
        assert found.keys() == stored.keys()
        for name, tensor in stored.items():
            assert found[name].equal(tensor)
    for path in exported.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.name in stored:
                assert tensor.data_location == onnx.TensorProto.EXTERNAL
            else:
                assert len(tensor.SerializeToString()) < 2048


# what is exported


def test_the_exported_graphs_are_sound_and_standard(exported: Path) -> None:
    names = {path.stem for path in exported.glob("*.onnx")}
    assert names == set("prefill sparse full observe period select pick write".split())
    program = json.loads((exported / "program.json").read_text())
    for path in exported.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", program["opset"])]
        assert model.ir_version == program["ir_version"]
        assert {node.op_type for node in every_node(model.graph)} <= STANDARD
        own = [node.name for node in every_node(model.graph)]
        assert len(set(own) - {""}) == len(own)  # which old runtimes rely on
        assert not {node.domain for node in every_node(model.graph)} - {""}
    kinds = {node.op_type for node in onnx.load(exported / "period.onnx").graph.node}
    assert {"Loop", "If"} <= {
        n.op_type for n in every_node(onnx.load(exported / "period.onnx").graph)
    }
    assert "Loop" in kinds


def test_shapes_are_named(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported / "prefill.onnx", providers=list(CPU))
    shapes = {i.name: i.shape for i in session.get_inputs()}
    assert shapes["input_ids"] == ["B", "T"]
    assert shapes["tree_mask"] == ["R", "T", "T"]
    assert shapes["k_cache"] == [2, "B", 2, "S", 16]
    outputs = {o.name: o.shape for o in session.get_outputs()}
    assert outputs["k_new"] == [2, "B", 2, "T", 16]
    assert outputs["logits"][::2] == ["B", outputs["logits"][2]]


def test_the_example_drives_the_folder(exported: Path, small: Path) -> None:
    example = ROOT / "examples" / "onnx_minimal.py"
    assert len(example.read_text().splitlines()) < 60
    code = without("torch", "onnx", "sirius_runtime") + (
        "import runpy\n"
        f"sys.argv = ['onnx_minimal.py', {str(exported)!r}, {PROMPT!r}]\n"
        f"runpy.run_path({str(example)!r})\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    (text,) = load_onnx(small).generate(PROMPT, mode="exact", max_new_tokens=100).texts or ()
    assert done.stdout == text + "\n"


def test_a_folder_with_files_is_not_written_to(exported: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not empty; .*--force"):
        export_onnx(small, exported)
    before = {path.name for path in exported.iterdir()}
    assert {path.name for path in export_onnx(small, exported, force=True)} == before
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        export_onnx(small, file)


# adding graphs to an artifact


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = CompileConfig(sparsity="griffin", period=4, dtype="bfloat16")
    path = tmp_path_factory.mktemp("plain") / "plain.sirius"
    model = random_decoder("llama", num_hidden_layers=1)
    return compile_model(model, options, tokenizer=word_tokenizer()).save(path)


def what_adds_graphs(path: Path, out: Path) -> str:
    """The arguments of `sirius-compile` that an artifact without ONNX graphs names."""
    for ask in (lambda: load_onnx(path), lambda: export_onnx(path, out)):
        with pytest.raises(BackendError) as caught:
            ask()
        told, _, command = str(caught.value).rpartition("sirius-compile ")
        assert "--graphs both" in told
    return command


def test_an_artifact_without_graphs_names_what_adds_them(tiny: TinyModels, tmp_path: Path) -> None:
    path = tiny(method="griffin").compiled.save(tmp_path / "plain.sirius")
    assert what_adds_graphs(path, tmp_path / "out").startswith(f"onnx {path}")


@pytest.mark.gate
def test_what_it_names_adds_them(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = what_adds_graphs(plain, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert sirius_compile(command.split()) == 0  # as it is told
    assert load_onnx(tmp_path / "with-onnx.sirius").generate("w7", max_new_tokens=2).tokens


@pytest.mark.gate
def test_graphs_are_added(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "with.sirius"
    with pytest.raises(ConfigError, match=r"float32 or float16.*got bfloat16; pass --dtype"):
        add_onnx(plain, out)
    assert not out.exists()
    assert sirius_compile(["onnx", str(plain), "--out", str(out), "--dtype", "float32"]) == 0
    assert (
        sirius_compile(["onnx", str(plain), "--out", str(out), "--dtype", "float32"]) == 2
    )  # it exists
    wanted = load(plain, device="cpu", dtype="float32").generate("w7 w8", mode="exact")
    assert load_onnx(out).generate("w7 w8", mode="exact").tokens == wanted.tokens
    assert load(out, device="cpu").generate("w7 w8", mode="exact").tokens == wanted.tokens


@pytest.mark.gate
def test_the_dtype_of_an_artifact_with_graphs(tmp_path: Path) -> None:
    model = random_decoder("llama", num_hidden_layers=1).to(torch.bfloat16)
    options: dict[str, Any] = {"sparsity": "griffin", "period": 4}
    made = compile_model(model, CompileConfig(**options, graphs="onnx"))
    assert made.spec.model.dtype == "float32"
    with pytest.raises(ConfigError, match=r"--graphs onnx needs .*got bfloat16"):
        compile_model(model, CompileConfig(**options, graphs="both", dtype="bfloat16"))
    path = made.save(tmp_path / "onnx.sirius")
    with Artifact.open(path) as artifact:
        assert not artifact.names("graphs/")
    with pytest.raises(BackendError, match=r"holds ONNX graphs only: .*--graphs both"):
        load(path, device="cpu")
    assert load_onnx(path).generate([7, 8, 9], max_new_tokens=4).stats.tokens == 4


# what is refused


def test_options_of_other_back_ends_are_refused(small: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"backend": "onnxruntime", "device": "cpu"}, "takes providers, not a device"),
        ({"backend": "onnxruntime", "dtype": "float16"}, "in the dtype of its graphs, fl"),
        ({"backend": "onnxruntime", "providers": CPU, "threads": 0}, "threads must be >= 1, got 0"),
        ({"providers": CPU}, "an option of backend onnxruntime only"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            load(small, progress=print, **options)


def test_a_provider_that_is_not_there_is_named(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        BackendError, match=r"has no RocmExecutionProvider here \(it has: .*install"
    ):
        load_onnx(small, ["RocmExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(CPU))
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider .*install onnxruntime-gpu"):
        load_onnx(small, ["CUDAExecutionProvider"])


class Started:
    """A session that says which providers it started with."""

    def __init__(self, *providers: str) -> None:
        self.get_providers = lambda: list(providers)


@pytest.mark.parametrize(
    ("starts", "wanted", "told"),
    [
        (True, None, "on CUDAExecutionProvider"),
        (False, None, "on CPUExecutionProvider"),
        (True, ["CUDAExecutionProvider"], "on CUDAExecutionProvider"),
    ],
)
def test_cuda_is_taken_where_it_starts_and_said_aloud(
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts: bool,
    wanted: list[str] | None,
    told: str,
) -> None:
    both = ["CUDAExecutionProvider", *CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(backend_module, "_has_driver", lambda: True)
    session = Started(*(both if starts else CPU))
    monkeypatch.setattr(OnnxBackend, "_session", lambda *args, **kwargs: session)
    said: list[str] = []
    model = load(small, backend="onnxruntime", providers=wanted, progress=said.append)
    assert [line.endswith(told) for line in said] == [True]
    assert isinstance(model.backend, OnnxBackend)
    assert model.backend.on_device == starts


def test_cuda_that_does_not_start_is_refused_where_asked_for(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = ["CUDAExecutionProvider", *CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(OnnxBackend, "_session", lambda *args, **kwargs: Started(*CPU))
    with pytest.raises(BackendError, match=r"can't be started here .*CUDA and cuDNN.*leave prov"):
        load_onnx(small, ["CUDAExecutionProvider"])


def test_every_provider_that_is_asked_for_must_start(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*wanted, *CPU])

    def started(backend: OnnxBackend, graph: str, providers: list[str], **_: object) -> Started:
        return Started(*(p for p in providers if p not in down))

    monkeypatch.setattr(OnnxBackend, "_session", started)
    for down in ([], ["TensorrtExecutionProvider"], ["CUDAExecutionProvider"]):
        if down:
            with pytest.raises(BackendError, match=f"{down[0]} can't be started here"):
                load_onnx(small, wanted)
        else:
            backend = load_onnx(small, wanted).backend
            assert isinstance(backend, OnnxBackend)
            assert backend.providers == [*wanted, *CPU]
    backend = load_onnx(small, CPU).backend
    assert isinstance(backend, OnnxBackend)
    assert backend.providers == list(CPU)


class Bound:
    """An IO binding that takes the CPU for the device, and remembers what is bound where."""

    def __init__(self, real: Any, places: dict[str, str]) -> None:
        self.real, self.places = real, places
        self.get_outputs = real.get_outputs

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        self.places[name] = "from host"
        self.real.bind_cpu_input(name, array)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.places[name] = "on device"
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str) -> None:
        self.places[name] = {"cuda": "on device", "cpu": "to host"}[device]
        self.real.bind_output(name, "cpu")

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.places[name] = "on device"
        self.real.bind_ortvalue_output(name, value)


class Watched:
    """A session whose bindings are `Bound`."""

    def __init__(self, real: Any, places: dict[str, str]) -> None:
        self.real, self.places = real, places

    def io_binding(self) -> Bound:
        return Bound(self.real.io_binding(), self.places)

    def run_with_iobinding(self, binding: Bound) -> None:
        self.real.run_with_iobinding(binding.real)


def test_state_and_kept_weights_stay_on_the_device(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of every graph, as on a GPU, by bindings that are recorded."""
    model, prompts = pairs("griffin").onnx, [[7, 8, 9], [50, 30, 11, 22, 60]]
    runs: list[dict[str, Any]] = [
        {"mode": "sirius", "refresh": 1},
        {"mode": "sample", "seed": 1},
        {"mode": "full"},
        {"mode": "sparse"},
    ]
    wanted = [model.generate(prompts, max_new_tokens=20, **options).tokens for options in runs]
    places: dict[str, dict[str, str]] = {}
    graph = OnnxBackend.graph

    def watched(backend: OnnxBackend, name: str) -> Graph:
        found = graph(backend, name)
        return found._replace(session=Watched(found.session, places.setdefault(name, {})))

    monkeypatch.setattr(OnnxBackend, "graph", watched)
    monkeypatch.setattr(OnnxBackend, "on_device", True)
    copied = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(OnnxBackend, "value", lambda backend, array: copied(array.copy()))
    found = [model.generate(prompts, max_new_tokens=20, **options).tokens for options in runs]
    assert found == wanted
    assert places.keys() == {"prefill", "select", "period", "pick", "full", "sparse", "write"}
    state = re.compile(r"[kv]_(cache|new|kept|written)$|(gate|up|down)_kept\.")
    seen = {name: where for own in places.values() for name, where in own.items()}
    held = {name for name in seen if state.match(name)}
    assert {"k_cache", "v_new", "v_kept", "k_written", "gate_kept.0", "down_kept.1"} <= held
    for own in places.values():
        assert {own[name] for name in held & own.keys()} <= {"on device"}
    assert places["period"]["tokens"] == "to host"
    assert places["period"]["root"] == "from host"


def test_graphs_that_the_runtime_is_too_old_for(pairs: Pairs, tmp_path: Path) -> None:
    path = tmp_path / "new.sirius"
    path.write_bytes(pairs("griffin").path.read_bytes())

    def from_the_future(entries: dict[str, bytes]) -> None:
        for name in entries:
            if name.endswith(".onnx"):
                model = onnx.load_from_string(entries[name])
                model.opset_import[0].version = 999
                entries[name] = model.SerializeToString()

    rebuild(path, from_the_future)
    with pytest.raises(
        BackendError, match=r"refuses the graph 'prefill' \(ONNX opset 18"
    ) as caught:
        load_onnx(path).generate([[7, 8, 9]], max_new_tokens=4)
    assert "pip install --upgrade onnxruntime" in str(caught.value)


def test_limits_of_the_period(pairs: Pairs) -> None:
    model = pairs("griffin").onnx
    for options, message in (
        ({"period": 5}, r"period must be in 1..4 here"),
        ({"tree_width": 2}, "tree_width must be 1 here"),
        ({"period": "auto"}, "use backend eager"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.generate([[7, 8, 9]], **options)


# what it is made of


@pytest.mark.parametrize("kind", ["host", "device"])
def test_caches_are_written_in_place(pairs: Pairs, kind: str) -> None:
    """The graph that writes a device's caches, on the CPU, does what NumPy does."""
    backend = pairs("griffin").onnx.backend
    assert isinstance(backend, OnnxBackend)
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    arrays = {"k_cache": random(2, 3, 2, 9, 16), "v_cache": random(2, 3, 2, 9, 16)}
    wanted = {name: array.copy() for name, array in arrays.items()}
    caches = (
        HostCaches(arrays, backend.value)
        if kind == "host"
        else DeviceCaches(arrays, backend.value, backend.graph("write").session)
    )
    places = {name: value.data_ptr() for name, value in caches.values.items()}
    length, new = np.array([0, 6, 2]), {name: random(2, 3, 2, 3, 16) for name in arrays}
    caches.write(length, *(backend.value(array) for array in new.values()))
    for name, array in wanted.items():
        for row, start in enumerate(length):
            array[:, row, :, start : start + 3] = new[name][:, row]
        np.testing.assert_array_equal(caches.values[name].numpy(), array)
        assert caches.values[name].data_ptr() == places[name]
    caches.select([2, 0])
    for name, array in wanted.items():
        np.testing.assert_array_equal(caches.values[name].numpy(), array[:, [2, 0]])


def test_tokens_are_the_same_with_caches_of_a_device(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sirius_runtime.backends import onnx_state

    model, prompts = pairs("griffin").onnx, [[7, 8, 9], [50, 30, 11, 22, 60]]
    wanted = model.generate(prompts, max_new_tokens=20).tokens
    session = model.backend.graph("write").session  # type: ignore[attr-defined]
    made: Callable[..., DeviceCaches] = lambda arrays, value: DeviceCaches(arrays, value, session)  # noqa: E731
    monkeypatch.setattr(onnx_state, "HostCaches", made)
    assert model.generate(prompts, max_new_tokens=20).tokens == wanted


def test_streams_and_arrays(pairs: Pairs) -> None:
    pair, shown = pairs("griffin"), []
    tokenizer = pair.onnx.tokenizer
    assert tokenizer is not None
    stream = TextStream(tokenizer, shown.append)
    output = pair.onnx.generate([7, 8, 9], max_new_tokens=9, streamer=stream)
    assert "".join(shown) == (output.texts or ())[0]
    ids, mask = np.array([[0, 7, 8], [7, 8, 9]]), np.array([[0, 1, 1], [1, 1, 1]])
    rows = pair.onnx.generate(ids, attention_mask=mask, max_new_tokens=5)
    assert rows.prompts == ((7, 8), (7, 8, 9))
    tensors = pair.torch.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=5
    )
    assert tensors.tokens == rows.tokens


def test_the_command_line(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(small), "-p", PROMPT, "--backend", "onnxruntime"]
    options = ["--providers", "CPUExecutionProvider", "--threads", "1", "--mode", "exact", "--json"]
    assert sirius(command + options) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (
        found["text"] == (load(small, device="cpu").generate(PROMPT, mode="exact").texts or ())[0]
    )
    assert "on CPUExecutionProvider" in captured.err
