"""Numbers in a manifest, each held to its range when the artifact is opened."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from sirius_runtime.cli import main
from sirius_runtime.errors import ArtifactError
from sirius_runtime.manifest_check import check_program
from sirius_runtime.spec import JSON, ProgramSpec, from_json, to_json
from tests.support.artifacts import rebuild, refused, sample, write
from tests.test_spec import PROGRAM, holder


def test_a_sound_program_is_accepted() -> None:
    check_program(PROGRAM_IN_RANGE)


def in_range() -> JSON:
    """`PROGRAM` of the specs' tests, but what it says of itself agrees."""
    written = json.loads(json.dumps(to_json(PROGRAM)))
    written["period"]["refresh"], written["sparsity"]["sites"][1]["layer"] = 0, 1
    return written


PROGRAM_IN_RANGE = from_json(ProgramSpec, in_range())

FAULTS: list[tuple[str, JSON, str]] = [
    ("model.max_seq_len", 10**30, "model.max_seq_len: an integer of 64 bits is expected"),
    ("model.max_seq_len", 2**40, "model.max_seq_len must be in 1..2147483647"),
    ("model.max_seq_len", 0, "model.max_seq_len must be in"),
    ("model.max_seq_len", -5, "model.max_seq_len must be in"),
    ("model.max_seq_len", True, "model.max_seq_len: int is expected, found True"),
    ("model.vocab_size", 0, "model.vocab_size must be in"),
    ("model.vocab_size", -1, "model.vocab_size must be in"),
    ("model.parameters", -1, "model.parameters must be in"),
    ("state.layers", 0, "state.layers must be in"),
    ("state.layers", 10**9, "state.layers must be in"),
    ("state.kv_heads", 0, "state.kv_heads must be in"),
    ("state.key_dim", 0, "state.key_dim must be in"),
    ("state.value_dim", -7, "state.value_dim must be in"),
    ("state.value_dim", 2**62, "state.value_dim must be in"),
    ("sparsity.keep", 1.5, "sparsity.keep must be in 0.0..1.0, found 1.5"),
    ("sparsity.keep", math.nan, "sparsity.keep: a finite number is expected, found nan"),
    ("sparsity.density", math.inf, "sparsity.density: a finite number is expected"),
    ("sparsity.density", -0.1, "sparsity.density must be in"),
    ("sparsity.step", 0, "sparsity.step must be in 1.."),
    ("sparsity.dense_layers", [2], "sparsity.dense_layers must be in 0..1, found 2"),
    ("sparsity.sites.0.layer", 2, "sparsity.sites[0].layer must be in 0..1"),
    ("sparsity.sites.0.units", 0, "sparsity.sites[0].units must be in"),
    ("sparsity.sites.1.kept", 12.5, "sparsity.sites[1].kept must be in 0..12, found 12.5"),
    ("sparsity.sites.1.kept", -1, "sparsity.sites[1].kept must be in"),
    ("sparsity.sites.0.params", -1, "sparsity.sites[0].params must be in"),
    ("sparsity.sites.0.threshold", math.nan, "sites[0].threshold"),
    ("period.period", 0, "period: period must be in 1..512, got 0"),
    ("period.period", 600, "period: period must be in 1..512, got 600"),
    ("period.tree_width", 0, "period: tree_width must be in 1..32"),
    ("period.threshold", -0.1, "period: threshold must be >= 0"),
    ("period.verify_temperature", 0, "period: verify_temperature must be > 0"),
    ("period.verify_temperature", math.inf, "period.verify_temperature: a finite number"),
    ("period.confidence", 2, "period: confidence must be in [0, 1]"),
    ("period.refresh", -1, "period.refresh must be in 0..2147483647"),
    ("period.mode", "sample", "period: mode must be one of sirius, exact"),
    ("period.mode", "full", "period: mode must be one of sirius, exact"),
    ("period.refresh", 4, "period.refresh is 4, but the sparse path cats chooses"),
    ("eos_token_ids", [2, 10**12], "eos_token_ids must be in"),
    ("pad_token_id", 2**40, "pad_token_id must be in"),
    ("passes.0.seconds", -1.0, "passes[0].seconds must be >= 0"),
    ("passes.0.rewrites", -1, "passes[0].rewrites must be >= 0"),
]


@pytest.mark.parametrize(("path", "value", "message"), FAULTS)
def test_a_number_out_of_its_range_is_refused_by_its_field(
    path: str, value: JSON, message: str
) -> None:
    written = in_range()
    container, key = holder(written, path)
    container[key] = value
    with pytest.raises(ArtifactError, match=re.escape(message)):
        check_program(from_json(ProgramSpec, written))


def test_refresh_and_kept_neurons_of_griffin() -> None:
    written = in_range()
    written["sparsity"]["method"] = "griffin"
    written["period"]["refresh"] = 4
    check_program(from_json(ProgramSpec, written))
    written["sparsity"]["sites"][1]["kept"] = 0.5
    with pytest.raises(ArtifactError, match="a prompt must keep a neuron of each MLP"):
        check_program(from_json(ProgramSpec, written))


def test_two_entries_of_one_name() -> None:
    written = in_range()
    written["entries"][1]["name"] = "full"
    with pytest.raises(ArtifactError, match="entries: 'full' is listed twice"):
        check_program(from_json(ProgramSpec, written))


def test_a_wrong_value_is_shown_short() -> None:
    written = in_range()
    written["model"]["source"] = list(range(10_000))
    with pytest.raises(ArtifactError) as caught:
        from_json(ProgramSpec, written)
    assert len(str(caught.value)) < 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.sirius"
    write(path, sample())
    return path


def test_the_file_s_reader_asks(path: Path) -> None:
    rebuild(path, manifest=lambda m: m["program"]["model"].update(max_seq_len=2**40))
    refused(path, r"manifest\.json is malformed \(model\.max_seq_len must be in 1\.\.2147483647")


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\r\nmodel      Llama-3\x9b1m"


def test_what_is_shown_of_an_artifact_can_t_control_a_terminal(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        program = manifest["program"]
        program["model"] |= {"source": HOSTILE, "revision": HOSTILE, "model_type": HOSTILE}
        program["tools"] = dict.fromkeys(program["tools"], HOSTILE)
        program["sparsity"]["sites"][0]["weight"] = HOSTILE
        entry = program["entries"][0]
        entry["name"] = HOSTILE
        entry["inputs"][0] |= {"name": HOSTILE, "shape": [HOSTILE]}
        program["passes"] = [
            {"name": HOSTILE, "rewrites": 1, "seconds": 0.1, "nodes_before": 1, "nodes_after": 1}
        ]

    rebuild(path, manifest=rename)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\\x1b]0;owned\\x07\\x1b[2J\\u202egnp.exe\\r\\nmodel") == 9
    assert shown.replace("\n", "").isprintable()
    assert main(["inspect", "--json", str(path)]) == 0
    assert capsys.readouterr().out.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["program"]["weights"][0].update(name=HOSTILE),
        lambda m: m["program"]["model"].update(dtype=HOSTILE),
        lambda m: m["files"].update({HOSTILE: {"size": 1, "sha256": ""}}),
        lambda m: m.update({"files": {HOSTILE: 1}}),
    ],
)
def test_errors_can_t_either(path: Path, spoil: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rebuild(path, manifest=spoil)
    assert main(["inspect", str(path)]) == 2
    said = capsys.readouterr().err
    assert "owned" in said
    assert said.replace("\n", "").isprintable()


def test_a_path_with_escapes_can_t_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "\x1b[31m.sirius")]) == 2
    assert "\\x1b[31m.sirius: there is no such file" in capsys.readouterr().err


def test_a_model_s_text_can_t_control_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sirius_runtime.cli import results

    text = "a\tb\n\u3000\u200d\x1b[2J\x9b1m\r\x7f"
    results.write_text(text)
    assert capsys.readouterr().out == text  # to a file or a pipe, as it is
    monkeypatch.setattr(results.sys.stdout, "isatty", lambda: True)
    results.write_text(text)
    assert capsys.readouterr().out == "a\tb\n\u3000\u200d\\x1b[2J\\x9b1m\\r\\x7f"
