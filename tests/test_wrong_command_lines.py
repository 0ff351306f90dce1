"""Wrong command lines, over all commands: each ends with 2, a message that names the flag or the
value, nothing on stdout, no traceback and no file.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from sirius_runtime.command_line import finish
from tests.support.cli import Cli, Finished
from tests.support.fast import slow_but
from tests.support.models import TinyModels

ROOT = Path(__file__).parents[1]
ARTIFACT, FOLDER = "{artifact}", "{folder}"
"""Placeholders for the path of a valid artifact, and of a folder that must stay empty."""

NO_NUMBER = ("", "x", "²", "--5", "0x10", "9" * 5000)
NO_INTEGER = (*NO_NUMBER, "1.5", "1e3", "nan")
NO_FLOAT = (*NO_NUMBER, "0,5")
BEYOND = "1" + "0" * 30
NOT_FINITE = ("nan", "inf", "-inf", "1e400")
NO_PATH = ("", "a\0b", "~nosuchuser/x", "n" * 256, "a/" + "é" * 128)
NO_DEVICE = ("", "abacus", "meta", "cuda:-1", "hpu", "privateuseone", "0", "CPU", "x" * 300)
NOT_HERE = (f"{FOLDER}/nothing", f"{FOLDER}", "/dev/null", f"{ARTIFACT}/below")


@dataclass(frozen=True)
class Line:
    """A wrong command line. `says`: text that its message must contain."""

    command: str
    arguments: tuple[str, ...]
    says: str

    def __str__(self) -> str:
        return f"{self.command} {' '.join(self.arguments)}"[-70:].replace("\0", "NUL")


def flags(command: str, before: Sequence[str], flag: str, values: Sequence[str]) -> Iterator[Line]:
    """`command before --flag=value`, for each of the values."""
    for value in values:
        yield Line(command, (*before, f"{flag}={value}"), flag)


def run_lines() -> Iterator[Line]:
    run = ("run", ARTIFACT, "-p", "w7 w8", "--max-new-tokens", "2")
    sample = (*run, "--mode", "sample")
    for flag in ("--max-new-tokens", "--tree-width", "--context", "--threads"):
        yield from flags("sirius", run, flag, (*NO_INTEGER, "0", "-1", BEYOND))
    yield from flags("sirius", run, "--refresh", (*NO_INTEGER, "-1", "3"))
    yield from flags("sirius", run, "--period", (*NO_INTEGER, "0", "-1", "513", BEYOND, "auto "))
    yield from flags("sirius", sample, "--top-k", (*NO_INTEGER, "-1", BEYOND))
    yield from flags("sirius", sample, "--seed", (*NO_INTEGER, "-1"))
    yield from flags("sirius", run, "--min-new-tokens", (*NO_INTEGER, "-1", BEYOND, "3"))
    yield from flags("sirius", (*run, "--json"), "--logprobs", (*NO_INTEGER, "-1", BEYOND))
    yield from flags("sirius", run, "--repetition-penalty", (*NO_FLOAT, *NOT_FINITE, "0", "-1"))
    yield from flags("sirius", run, "--threshold", (*NO_FLOAT, *NOT_FINITE, "-1"))
    yield from flags("sirius", run, "--verify-temperature", (*NO_FLOAT, *NOT_FINITE, "0", "1e-9"))
    yield from flags("sirius", run, "--confidence", (*NO_FLOAT, *NOT_FINITE, "1.1", "-0.1"))
    yield from flags("sirius", sample, "--temperature", (*NO_FLOAT, *NOT_FINITE, "0", "1e-9"))
    yield from flags("sirius", sample, "--top-p", (*NO_FLOAT, *NOT_FINITE, "0", "1.1"))
    yield from flags("sirius", run, "--device", NO_DEVICE)
    yield from flags("sirius", run, "--mode", ("", "foo", "SIRIUS"))
    yield from flags("sirius", run, "--backend", ("", "foo", "Eager"))
    yield from flags("sirius", run, "--dtype", ("", "int8", "FLOAT32"))
    yield from flags("sirius", run, "--memory-budget", ("", "-1", "0", "six", "1 pound", "1e3"))
    yield from flags("sirius", run, "--prompt-file", (*NO_PATH, *NOT_HERE[:2]))
    yield from flags("sirius", run, "--providers", ("", ",", "A,,B", "CPUExecutionProvider"))
    for given, says in (
        (("--stop", ""), "a stop string is empty"),
        (("--stop", "\udcff"), "--stop holds bytes that are not UTF-8"),
        (("--context", "64"), "--context needs --memory-budget"),
        (("--context", "64", "--backend", "eager"), "--context needs --memory-budget"),
        (("--backend", "aoti", "--context", "64"), "the artifact holds none"),
        (("--compare", "--mode", "foo"), "--compare runs modes full, sparse and sirius"),
        (("--compare", "--mode", "exact"), "leave out --mode"),
        (("--compare", "--top-k", "5"), "leave out --mode, --temperature, --top-k"),
        (("--compare", "--threshold", "inf"), "threshold must be finite"),
        (("--backend", "period"), "the artifact holds none"),
        (("--logprobs", "1"), "--logprobs goes with --json"),
        (("--logprobs", "1", "--json", "--compare"), "--logprobs goes with --json"),
        (("--backend", "onnxruntime"), "holds no ONNX graphs"),
        (("--backend", "onnxruntime", "--device", "cpu"), "takes providers, not a device"),
        (("--backend", "onnxruntime", "--providers", ""), "--providers takes names"),
        (("--temperature", "0.5"), "temperature: mode sirius is greedy"),
        (("--seed", "1"), "seed: mode sirius is greedy"),
        (("--mode", "exact", "--top-p", "0.5"), "top_p: mode exact is greedy"),
        (("--mode", "full", "--period", "8"), "--mode full drafts nothing: leave out --period"),
        (("--mode", "sparse", "--threshold", "0.2", "--no-fallback"), "--threshold, --fallback"),
        (("--copy=yes",), "--copy"),
        (("--copy", "--memory-budget", "4GiB"), "copy reads the whole file into memory"),
        (("--memory-budget", "1MiB"), "is too small"),
        (("--nope",), "--nope"),
        (("more",), "more"),
        (("--json", "--mode", "foo"), "mode must be one of"),
        (("--prompt-file", "f"), "not allowed with argument"),
        (("--chat",), "has no chat template"),
        (("--system", "x"), "has no chat template"),
        (("--chat", "--raw"), "not allowed with argument"),
        (("--raw", "--system", "x"), "--system and --chat-template are options of a chat"),
    ):
        yield Line("sirius", (*run, *given), says)
    yield Line("sirius", ("run", ARTIFACT, "-p", "\udcff"), "--prompt holds bytes that are not")
    yield Line("sirius", ("run", ARTIFACT, "-p", ""), "prompt 0 is empty")
    yield Line("sirius", ("run", ARTIFACT, "-p"), "expected one argument")
    yield Line("sirius", ("run", ARTIFACT, "-p", "w7 " * 500), "has 500 tokens")


def trace_lines() -> Iterator[Line]:
    trace = ("trace", ARTIFACT, "-p", "w7 w8", "--max-new-tokens", "2")
    for flag in ("--out", "--html"):
        places = (FOLDER, ARTIFACT + "/below", f"{FOLDER}/no/where", "/dev/null")
        yield from flags("sirius", trace, flag, (*NO_PATH, *places))
    for given, says in (
        (("--out", f"{FOLDER}/t", "--html", f"{FOLDER}/t"), "--out and --html name the same file"),
        (("--mode", "full"), "mode full makes none"),
        (("--mode", "sparse"), "mode sparse makes none"),
        (("--mode", "foo"), "mode must be one of"),
        (("--backend", "cudagraph"), "--backend cudagraph: only backend eager can be traced"),
        (("--backend", "period"), "--backend period: only backend eager can be traced"),
        (("--backend", "onnxruntime"), "--backend onnxruntime: only backend eager can be traced"),
        (("--backend", ""), "only backend eager can be traced"),
        (("--check-kv=yes",), "--check-kv"),
        (("--chat",), "has no chat template"),
        (("--raw", "--system", "x"), "--system and --chat-template are options of a chat"),
        (("--compare",), "--compare"),
        (("--top-p", "0.5"), "top_p: mode sirius is greedy"),
        (("--period", "0"), "--period"),
    ):
        yield Line("sirius", (*trace, *given), says)
    yield Line("sirius", ("trace", ARTIFACT, "-p", ""), "prompt 0 is empty")


def other_lines() -> Iterator[Line]:
    yield Line("sirius", (), "required: COMMAND")
    yield Line("sirius", ("rum",), "invalid choice: 'rum'")
    for command in ("run", "chat", "inspect", "verify", "trace", "export-onnx"):
        yield Line("sirius", (command,), "required: MODEL.sirius")
    for command in ("ablate", "tune"):
        yield Line("sirius", (command,), "required: --task")
    yield Line("sirius", ("chat", ARTIFACT), "has no chat template")
    yield Line("sirius", ("chat", ARTIFACT, "--prompt", "x"), "--prompt")
    yield Line("sirius", ("inspect", "a", "b"), "unrecognized arguments: b")
    yield Line("sirius", ("export-onnx", ARTIFACT), "DIR")
    yield Line("sirius", ("export-onnx", ARTIFACT, f"{FOLDER}/new"), "holds no ONNX graphs")
    yield Line("sirius", ("export-onnx", ARTIFACT, ARTIFACT), "is not a folder")
    yield Line("sirius", ("inspect", ARTIFACT, "--jso=1"), "ignored explicit argument")
    places = (FOLDER, ARTIFACT + "/below", f"{FOLDER}/no/where", "/dev/null")
    yield from flags("sirius", ("inspect", ARTIFACT), "--html", (*NO_PATH, *places))
    yield Line("sirius", ("inspect", ARTIFACT, "--graph", "nope"), "has no graph 'nope'; graphs:")
    yield Line("sirius", ("inspect", ARTIFACT, "--diff", "full", "../x"), "has no graph '../x'")
    yield Line("sirius", ("inspect", ARTIFACT, "--diff", "full"), "--diff: expected 2 arguments")
    yield Line("sirius", ("inspect", ARTIFACT, "--json", "--graph", "full"), "not allowed with")
    yield from flags("sirius", ("verify", ARTIFACT), "--device", NO_DEVICE)
    yield Line("sirius", ("verify", ARTIFACT, "--nope"), "--nope")
    for command, before, after in (
        ("sirius", ("run",), ("-p", "x")),
        ("sirius", ("inspect",), ()),
        ("sirius", ("verify",), ()),
        ("sirius", ("trace",), ("-p", "x")),
        ("sirius", ("export-onnx",), (f"{FOLDER}/new",)),
        ("onnx", (), ("--out", f"{FOLDER}/new.sirius")),
    ):
        for path in NO_PATH:
            said = "'MODEL.sirius': " if command == "onnx" else "argument MODEL.sirius: "
            yield Line(command, (*before, path, *after), said)
        for path in (*NOT_HERE, str(ROOT / "pyproject.toml"), "/"):
            yield Line(command, (*before, path, *after), path)
    for path in NO_PATH:
        yield Line("sirius", ("export-onnx", ARTIFACT, path), "argument DIR: ")
        yield Line("onnx", (ARTIFACT, "--out", path), "'--out': ")
    for path in (FOLDER, ARTIFACT, f"{ARTIFACT}/below", f"{FOLDER}/no/where.sirius", "/dev/null"):
        yield Line("onnx", (ARTIFACT, "--out", path), path)
    yield Line("onnx", (), "MODEL.sirius")
    yield Line("onnx", (ARTIFACT,), "--out")
    yield Line("onnx", (ARTIFACT, "--out", f"{FOLDER}/m", "--dtype", "int8"), "--dtype must be")
    yield Line("onnx", (ARTIFACT, "--out", f"{FOLDER}/m", "--dtype", ""), "--dtype must be")
    yield Line("onnx", (ARTIFACT, "--out", f"{FOLDER}/m", "--nope"), "--nope")


def compile_lines() -> Iterator[Line]:
    cats = ("tally-3m", "--out", f"{FOLDER}/m.sirius")
    topk = (*cats, "--sparsity", "topk")
    for flag, wrong in (("--period", "513"), ("--tree-width", "0"), ("--max-seq-len", "1")):
        yield from flags("compile", topk, flag, (*NO_INTEGER, "-1", wrong, BEYOND))
    yield from flags("compile", topk, "--refresh", (*NO_INTEGER, "-1", "3"))
    for flag in ("--keep", "--density", "--agreement"):
        yield from flags("compile", topk, flag, (*NO_FLOAT, *NOT_FINITE, "0", "1.1"))
    for flag in ("--threshold", "--confidence"):
        yield from flags("compile", topk, flag, (*NO_FLOAT[:3], *NOT_FINITE, "-0.1", "1.1"))
    yield from flags("compile", topk, "--verify-temperature", (*NO_FLOAT, *NOT_FINITE, "0", "1e-9"))
    yield from flags("compile", topk, "--dense-layers", ("x", "²", "9" * 5000, "auto:", "auto:x:y"))
    yield from flags(
        "compile", (*topk, "--weights", "int8"), "--draft-bits", (*NO_INTEGER, "0", "5")
    )
    for flag in ("--sparsity", "--dtype", "--graphs", "--weights"):
        yield from flags("compile", cats, flag, ("", "foo", "TOPK"))
    yield from flags("compile", topk, "--device", NO_DEVICE)
    for flag in (
        "--adapter",
        "--cache-dir",
        "--dump-graphs",
        "--expect-graphs",
        "--calibration",
        "--out",
    ):
        yield from flags("compile", topk, flag, NO_PATH)
    yield from flags("compile", topk, "--expect-graphs", (*NOT_HERE, str(ROOT / "pyproject.toml")))
    yield from flags("compile", topk, "--calibration", ("none", f"{FOLDER}/no.txt"))
    for path in (FOLDER, ARTIFACT, f"{ARTIFACT}/below", f"{FOLDER}/no/where.sirius", "/dev/null"):
        yield Line("compile", ("tally-3m", "--sparsity", "topk", "--out", path), path)
    for model in (*NOT_HERE, "~nosuchuser/x", "n" * 300, "a\0b", "", "tally-3", "a b/c", "/"):
        shown = repr(model[:50])[1:-1]
        yield Line("compile", (model, "--out", f"{FOLDER}/m.sirius"), shown)
    for given, says in (
        (("--keep", "0.5", "--density", "0.6"), "--keep and --density set the same"),
        (("--score", "weight-norm"), "--score weight-norm is no longer an option"),
        (("--tree-width", "8", "--period", "200"), "has 1593 nodes"),
        (("--revision", "main"), "--revision main applies to models from the hub"),
        (("--adapter", FOLDER), "holds no adapter_config.json"),
        (("--adapter", f"{FOLDER}/nowhere"), "holds no adapter_config.json"),
        (("--base", "llama-3-8b"), "--base applies to adapters, but tally-3m is a model"),
        (("--sparsity", "none", "--keep", "0.5"), "--keep applies to a sparse path"),
        (("--sparsity", "none", "--density", "0.5"), "--density applies to a sparse path"),
        (("--sparsity", "none", "--dense-layers", "0"), "--dense-layers applies to a sparse path"),
        (("--sparsity", "none", "--calibration", "x.txt"), "--calibration sets thresholds"),
        (("--draft-bits", "4"), "--draft-bits 4 applies to nested weights only: add --weights"),
        (
            ("--weights", "int8", "--graphs", "onnx", "--sparsity", "griffin"),
            "the operators of --weights int8 with --sparsity griffin have no ONNX translation",
        ),
        (("--nope",), "--nope"),
        (("more",), "more"),
        (("--force=yes",), "--force"),
    ):
        yield Line("compile", (*topk, *given), says)
    for name in (f"{FOLDER}/no.gguf", "no.GGUF", "n" * 300 + ".gguf", "~nosuchuser/x.gguf"):
        yield Line("compile", (name, "--out", f"{FOLDER}/m.sirius"), name[:50])
    gguf = (f"{FOLDER}/no.gguf", "--out", f"{FOLDER}/m.sirius")
    yield Line("compile", (*gguf, "--adapter", FOLDER), "--adapter does not apply to a GGUF file")
    for arguments in ((), ("tally-3m",), ("--out", f"{FOLDER}/m.sirius"), ("--json",)):
        yield Line("compile", arguments, "a model and --out are needed")


SCRIPTS: dict[str, tuple[str, ...]] = {
    "benchmarks.compile_scale": ("--layers",),
    "benchmarks.context": ("--context", "--period", "--width", "--layers", "--repeats"),
    "benchmarks.costs": ("--layers", "--prompt", "--repeats", "--threads"),
    "benchmarks.drafting": ("--problems", "--timed"),
    "benchmarks.end_to_end": ("--problems", "--period", "--threads"),
    "benchmarks.frontier": ("--problems",),
    "benchmarks.kernels": ("--tokens", "--context", "--rounds", "--threads"),
    "benchmarks.nested": ("--layers", "--context", "--rounds", "--threads"),
    "benchmarks.onnx_attention": ("--threads", "--repeats"),
    "benchmarks.onnx_formulations": ("--threads",),
    "benchmarks.onnx_speed": ("--prompts", "--layers", "--threads"),
    "benchmarks.periods": ("--layers", "--context", "--period", "--width", "--rounds"),
    "benchmarks.steps": ("--layers", "--context", "--verify", "--rounds", "--threads"),
    "examples/tally/demo.py": ("--problems", "--period"),
}
"""The integer options of scripts that run for minutes."""


def script_lines() -> Iterator[Line]:
    for script, numbers in SCRIPTS.items():
        yield Line(script, ("--nope",), "--nope")
        for flag in numbers:
            yield from flags(script, (), flag, ("²", "0"))
        if "--threads" in numbers:
            yield from flags(script, (), "--threads", ("100000",))
    for script in ("benchmarks.cpu", "benchmarks.gpu", "benchmarks.frontier"):
        yield from flags(script, (), "--out", (*NO_PATH, ARTIFACT, f"{ARTIFACT}/below"))
    yield Line("benchmarks.cpu", ("--only", "nothing"), "no part nothing")
    yield Line("benchmarks.gpu", ("--smoke", "--device", "cpu", "--only", "x"), "no part x")
    for script in ("benchmarks.gpu", "benchmarks.gpu_check", "benchmarks.steps"):
        yield from flags(script, (), "--device", ("abacus",))
    for script in ("benchmarks.gpu_kernels", "benchmarks.kernels", "benchmarks.end_to_end"):
        yield from flags(script, (), "--dtype", ("int8",))
    yield from flags("benchmarks.steps", (), "--plot", (*NO_PATH, FOLDER, f"{FOLDER}/no/where"))
    yield from flags("benchmarks.costs", (), "--sparsity", ("foo",))
    yield from flags("benchmarks.frontier", (), "--sparsity", ("foo",))
    yield from flags("examples/tally/demo.py", (), "--sparsity", ("foo",))
    train = ("--out", f"{FOLDER}/m", "--log", f"{FOLDER}/l")
    yield from flags("examples/tally/train.py", train, "--out", (*NO_PATH, f"{ARTIFACT}/below"))
    yield from flags("examples/tally/train.py", train, "--log", NO_PATH)
    yield from flags("examples/tally/train.py", train, "--steps", ("0", "²"))
    yield Line("examples/tally/train.py", (), "--out")
    prompts = "examples/tally/write_calibration_prompts.py"
    for path in NO_PATH:
        yield Line(prompts, (path,), "argument model: ")
    yield Line(prompts, (f"{FOLDER}/nowhere",), "nowhere")
    yield Line(prompts, (), "model")


LINES = [*run_lines(), *trace_lines(), *other_lines(), *compile_lines(), *script_lines()]
SWEPT = {*NO_INTEGER, *NO_FLOAT, *NOT_FINITE, *NO_PATH, *NO_DEVICE}
"""Values that many flags are given; the fast suite gives a flag some, other ones from flag to flag.
"""


def swept(line: Line) -> bool:
    flag, _, value = (line.arguments or ("",))[-1].partition("=")
    return flag.startswith("--") and value in SWEPT


FAST = {line for index, line in enumerate(LINES) if index % 6 == 0 or not swept(line)}


@pytest.fixture(scope="module")
def artifact(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    return tiny("llama", "topk").compiled.save(folder / "model.sirius")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def module(script: str) -> ModuleType:
    """A script as a module: `benchmarks.x`, or a file."""
    if not script.endswith(".py"):
        return importlib.import_module(script)
    name = script.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def runner(line: Line, cli: Cli) -> Callable[..., Finished]:
    if line.command == "sirius":
        return cli.run
    if line.command == "compile":
        return cli.compile
    if line.command == "onnx":
        return lambda *arguments: cli.compile("onnx", *arguments)
    command: Callable[[], int | None] = module(line.command).main
    return lambda *arguments: cli.script(
        line.command, lambda: finish(line.command, command), arguments
    )


@pytest.mark.parametrize("line", slow_but(LINES, FAST), ids=str)
def test_it_is_refused(line: Line, cli: Cli, artifact: Path, tmp_path: Path) -> None:
    def real(text: str) -> str:
        return text.replace(ARTIFACT, str(artifact)).replace(FOLDER, str(tmp_path))

    done = runner(line, cli)(*map(real, line.arguments))
    assert done.code == 2, done.err
    _, _, told = " ".join(done.err.split()).partition("rror: ")  # behind the usage
    assert any(word in told for word in (real(line.says), option(line.says))), told
    assert "Traceback" not in done.err
    assert done.out.strip() == ""
    assert list(tmp_path.iterdir()) == []


def option(flag: str) -> str:
    """The flag's name in Python, as messages about options of `generate` use it."""
    return flag.removeprefix("--").replace("-", "_")


def test_there_are_enough_of_them() -> None:
    texts = [str((line.command, line.arguments)) for line in LINES]
    assert len(texts) == len(set(texts)) >= 270
    tried = {word for line in LINES for word in re.findall(r"--[a-z-]+", " ".join(line.arguments))}
    assert {"--prompt-file", "--cache-dir", "--expect-graphs", "--plot"} <= tried
