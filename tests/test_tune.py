"""`sirius ablate` and `sirius tune` on a tiny model; artifacts written with other defaults."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from sirius_runtime import load
from sirius_runtime.artifact import MANIFEST, Artifact
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.errors import ArtifactError, ConfigError
from sirius_runtime.evaluation import pareto
from sirius_runtime.new_defaults import write_defaults
from sirius_runtime.onnx_files import PROGRAM, read_program
from sirius_runtime.spec import PeriodSpec, to_json
from tests.support.artifacts import program_of, sample, write
from tests.support.cli import Cli
from tests.support.models import TinyModels, random_decoder, word_tokenizer

PROMPTS = ("w9 w10", "w20 w21 w22", "w40")
RUN = ("--max-new-tokens", 12, "--batch-size", 3, "--backend", "eager")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture(scope="module")
def folder(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact, and a task whose right answers are those of its full path."""
    folder = tmp_path_factory.mktemp("tune")
    made = tiny("llama", "topk", keep=0.2)
    made.compiled.save(folder / "model.sirius")
    full = made.model.generate(list(PROMPTS), mode="full", max_new_tokens=12)
    assert full.texts is not None
    lines = [{"prompt": p, "answer": t} for p, t in zip(PROMPTS, full.texts, strict=True)]
    (folder / "task.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def task(folder: Path) -> tuple[object, ...]:
    return folder / "model.sirius", "--task", folder / "task.jsonl", *RUN


# ablate

VARY = (
    "--vary",
    "threshold=0,.1",
    "--vary",
    "rollback=minimal,token",
    "--vary",
    "kv_rewriting=off",
)


def test_an_ablation_is_a_table_of_settings(cli: Cli, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    done = cli.run("ablate", *task(folder), *VARY, "--out", out, "--json")
    assert done.code == 0, done.err
    found = {(row["option"], row["value"]): row for row in json.loads(done.out)}
    assert list(found) == [
        *(("", "full"), ("", "exact"), ("", "sirius")),
        *(("threshold", "0"), ("threshold", "0.1")),
        *(("rollback", "minimal"), ("rollback", "token"), ("kv_rewriting", "off")),
    ]
    base = found["", "sirius"]
    for key in (("threshold", "0.1"), ("rollback", "minimal")):
        assert found[key] == base | {"option": key[0], "value": key[1]}
    assert found["", "full"]["accuracy"]["mean"] == found["", "exact"]["accuracy"]["mean"] == 1.0
    assert found["threshold", "0"]["corrections"] == 0.0 < base["corrections"]
    assert found["threshold", "0"]["accuracy"]["mean"] < 1.0
    assert found["rollback", "token"]["aal"] <= 2.0 < found["threshold", "0"]["aal"]
    names = {json.loads(line)["mode"] for line in out.read_text().splitlines()[1:]}
    assert {"full", "sirius", "sirius:rollback=token", "sirius:kv_rewriting=off"} <= names
    # The file is one of `sirius eval`, which goes on with it.
    done = cli.run("eval", *task(folder), "--modes", "full,sirius:0", "--out", out, "--json")
    assert done.code == 0, done.err
    again = {row["mode"]: row for row in json.loads(done.out)}
    assert again["full"]["seconds"] == found["", "full"]["seconds"]


def test_an_ablation_is_printed_and_drawn(cli: Cli, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    done = cli.run("ablate", *task(folder), "--vary", "period=4,16", "--plot", plot)
    assert done.code == 0, done.err
    title, header, *lines = done.out.splitlines()
    assert title.rstrip().endswith("task.jsonl: 3 problems")
    assert header.split()[:4] == ["option", "value", "accuracy", "(95%)"]
    assert [line.split()[:2] for line in lines[3:5]] == [["period", "4"], ["period", "16*"]]
    assert lines[-1].startswith("*: the artifact's default")
    drawn = plot.read_text()
    assert drawn.startswith("<?xml")
    for text in ("tokens/s", "effective density", "period", "accuracy"):
        assert f"<!-- {text}" in drawn


def test_a_plot_without_matplotlib_is_refused_at_once(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pareto, "find_spec", lambda name: None)
    done = cli.run("ablate", *task(folder), "--plot", folder / "plot.png")
    assert done.code == 2
    assert "--plot needs matplotlib: pip install" in done.err


@pytest.mark.parametrize(
    ("command", "flags", "reason"),
    [
        ("ablate", ("--vary", "colour=1"), "--vary takes NAME=VALUE"),
        ("ablate", ("--vary", "refresh=4"), "refresh applies to griffin, but the artifact's"),
        ("ablate", ("--vary", "tree_width=102,1", "--vary", "period=2"), "tree_width must be in"),
        ("ablate", ("--mode", "sample"), "--mode must be one of sirius, exact"),
        ("ablate", ("--mode", "exact", "--vary", "threshold=.1"), "mode exact has no threshold"),
        ("ablate", ("--plot", "{folder}/plot.pdf"), "give a file that ends in .png or .svg"),
        ("tune", ("--max-loss", "-1"), "--max-loss must be in 0..100 percentage points"),
        ("tune", ("--max-loss", "nan"), "--max-loss must be in 0..100"),
        ("tune", (), "required: --max-loss"),
        ("tune", ("--max-loss", "1", "--vary", "rollback=period"), "--vary takes NAME=VALUE"),
        ("tune", ("--max-loss", "1", "--vary", "lookup=2"), "no default of it"),
        ("tune", ("--max-loss", "1", "--out", "{folder}/task.jsonl"), "exists; choose another"),
        ("tune", ("--max-loss", "1", "--vary", "refresh=2"), "refresh applies to griffin"),
    ],
)
def test_wrong_command_lines(
    cli: Cli, folder: Path, command: str, flags: tuple[str, ...], reason: str
) -> None:
    before = (folder / "model.sirius").read_bytes()
    done = cli.run(command, *task(folder), *(f.replace("{folder}", str(folder)) for f in flags))
    assert done.code == 2
    assert reason in done.err
    assert (folder / "model.sirius").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["model.sirius", "task.jsonl"]


def test_only_eval_runs_the_harness(cli: Cli, folder: Path) -> None:
    done = cli.run("ablate", folder / "model.sirius", "--task", "lm-eval:gsm8k")
    assert done.code == 2
    assert "only sirius eval runs lm-evaluation-harness" in done.err


# tune


def test_tune_writes_its_choice(cli: Cli, folder: Path, tmp_path: Path) -> None:
    out, results = tmp_path / "tuned.sirius", tmp_path / "results.jsonl"
    vary = ("--vary", "threshold=0,.9", "--vary", "period=4", "--vary", "confidence=0")
    flags = ("--max-loss", 0, *vary, "--out", out, "--results", results)
    done = cli.run("tune", *task(folder), *flags, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    by_name = {row["mode"]: row for row in found["settings"]}
    assert list(by_name) == [
        *("full", "exact:period=4:confidence=0"),
        *("sirius:0:period=4:confidence=0", "sirius:0.9:period=4:confidence=0"),
    ]
    assert by_name["sirius:0:period=4:confidence=0"]["difference"]["mean"] < 0
    assert found["chosen"] != "sirius:0:period=4:confidence=0"
    assert by_name[found["chosen"]]["difference"]["mean"] == 0
    assert found["pays"] == (by_name[found["chosen"]]["speed"] > 1)
    own = load(out).program.period
    assert (own.mode, own.period, own.confidence) == (found["chosen"].split(":")[0], 4, 0.0)
    # In words, from the same results.
    done = cli.run("tune", *task(folder), *flags, "--force", "--confident")
    assert done.code == 0, done.err
    assert "2 of 3 settings lose at most 0 points to full (by the 95% interval" in done.out
    assert f"written to {out}: mode {own.mode}" in done.out
    name = "Drafting does not pay" if not found["pays"] else found["chosen"]
    assert name in done.out


def test_tune_replaces_the_artifact_itself(cli: Cli, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.sirius"
    path.write_bytes((folder / "model.sirius").read_bytes())
    flags = ("--task", folder / "task.jsonl", *RUN, "--limit", 1, "--max-loss", 0)
    vary = ("--vary", "threshold=.9", "--vary", "period=2", "--vary", "confidence=0")
    done = cli.run("tune", path, *flags, *vary)
    assert done.code == 0, done.err
    with Artifact.open(path) as artifact:
        assert artifact.program.period.period == 2


# an artifact with other defaults


def members(path: Path) -> dict[str, bytes]:
    with Artifact.open(path) as artifact:
        return {name: bytes(data) for name, data in artifact.entries()}


def test_all_else_stays(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.sirius"
    with Artifact.open(path) as artifact:
        own, self_test = artifact.program.period, artifact.manifest.self_test
    changed = replace(own, mode="exact", period=5, threshold=0.3, confidence=0.25)
    out = write_defaults(path, tmp_path / "out.sirius", changed)
    with Artifact.open(out) as artifact:
        assert artifact.program.period == changed
        assert artifact.manifest.self_test == self_test
    assert members(out) == members(path)
    assert list(members(out)) == list(members(path))
    before, after = load(path), load(out)
    expected = before.generate("w7 w8", mode="exact", period=5, confidence=0.25, max_new_tokens=20)
    assert after.generate("w7 w8", fallback=False, max_new_tokens=20).tokens == expected.tokens
    write_defaults(out, out, own, force=True)
    with Artifact.open(out) as back, Artifact.open(path) as first:
        assert back.manifest == first.manifest
    assert members(out) == members(path)


def test_a_graph_of_a_whole_period_keeps_its_sizes(whole: Compiled, tmp_path: Path) -> None:
    path = whole.save(tmp_path / "model.sirius")
    own, before = whole.spec.period, path.read_bytes()
    for other in (replace(own, period=3), replace(own, tree_width=2)):
        with pytest.raises(ConfigError, match="has the graph of a whole period"):
            write_defaults(path, path, other, force=True)
    assert path.read_bytes() == before
    write_defaults(path, path, replace(own, mode="exact", confidence=0.5), force=True)
    with Artifact.open(path) as artifact:
        assert artifact.program.period.mode == "exact"


def test_the_program_of_onnx_graphs_changes_with_it(tmp_path: Path) -> None:
    path, program = tmp_path / "model.sirius", program_of({})
    document = {"opset": 18, "period": to_json(program.period), "kept": []}
    with ArtifactWriter(path) as writer:
        writer.add_json(PROGRAM, document)
        writer.finish(program)
    other = replace(program.period, mode="exact")
    write_defaults(path, path, other, force=True)
    assert json.loads(members(path)[PROGRAM]) == document | {"period": to_json(other)}


@pytest.mark.gate
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs ONNX Runtime")
def test_onnx_graphs_run_with_other_defaults(tmp_path: Path) -> None:
    options = CompileConfig(sparsity="topk", period=4, dtype="float32", graphs="both")
    compiled = compile_model(random_decoder("llama"), options, tokenizer=word_tokenizer())
    path = compiled.save(tmp_path / "model.sirius")
    write_defaults(path, path, replace(compiled.spec.period, mode="exact"), force=True)
    with Artifact.open(path) as artifact:
        assert read_program(artifact).period.mode == "exact"
    tokens = [
        load(path, backend=backend).generate("w7 w8", max_new_tokens=12).tokens
        for backend in ("onnxruntime", "eager")
    ]
    assert tokens[0] == tokens[1]


SPOILED: list[tuple[Callable[[PeriodSpec], PeriodSpec], type[Exception], str]] = [
    (lambda own: replace(own, mode="sample"), ArtifactError, "mode must be one of"),
    (lambda own: replace(own, confidence=2.0), ArtifactError, "confidence must be in"),
    (lambda own: replace(own, refresh=3), ArtifactError, "refresh is 3"),
]


@pytest.mark.parametrize(("change", "kind", "reason"), SPOILED)
def test_wrong_defaults_are_not_written(
    tmp_path: Path,
    change: Callable[[PeriodSpec], PeriodSpec],
    kind: type[Exception],
    reason: str,
) -> None:
    write(path := tmp_path / "model.sirius", sample())
    before = path.read_bytes()
    with pytest.raises(kind, match=reason):
        write_defaults(path, path, change(PeriodSpec()), force=True)
    assert path.read_bytes() == before


def test_damage_is_not_copied(tmp_path: Path) -> None:
    write(path := tmp_path / "model.sirius", sample())
    with Artifact.open(path) as artifact:
        place = max(slot.end for slot in artifact.weight_slots()[1].values()) - 1
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"wrong sha256 of 'weights/.*download it again"):
        write_defaults(path, tmp_path / "out.sirius", PeriodSpec(mode="exact"))
    assert [p.name for p in tmp_path.iterdir()] == ["model.sirius"]


@pytest.mark.parametrize("where", ["add_copies", "finish"])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    write(path := tmp_path / "model.sirius", sample())
    before, original = path.read_bytes(), getattr(ArtifactWriter, where)

    def interrupted(self: ArtifactWriter, *given: Any) -> None:
        if where == "add_copies":
            original(self, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(ArtifactWriter, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_defaults(path, path, PeriodSpec(mode="exact"), force=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.sirius"]
    monkeypatch.undo()
    write_defaults(path, path, PeriodSpec(mode="exact"), force=True)
    assert MANIFEST not in members(path)
    assert path.read_bytes() != before
