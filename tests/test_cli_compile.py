"""`sirius-compile`: its files, its messages and its refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sirius_runtime
from sirius_compile.families import FAMILIES, REFUSED
from sirius_compile.models import shipped_models
from sirius_runtime.artifact import Artifact
from tests.support.cli import Cli
from tests.support.fast import slow_but

# No calibration, nothing measured, and no graph of a period.
FAST = ("--sparsity", "topk", "--no-measure", "--graphs", "entries")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_compiles_runs_and_reports(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "tally.sirius"
    done = cli.compile("tally-3m", *FAST, "--measure", "--sparsity", "cats", "--out", out, "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["sparsity"]["method"] == "cats"
    assert [site["layer"] for site in summary["sparsity"]["sites"]] == list(range(5))
    assert summary["artifact_bytes"] == out.stat().st_size
    assert summary["artifact_bytes"] <= 1.02 * summary["dense_bytes"] + 1e6
    assert abs(summary["sparsity"]["density"] - 0.75) < 0.05
    for stage in ("capture", "calibrate", "pass sparsify_cats", "write artifact"):
        assert stage in done.err
    model = sirius_runtime.load(out)
    assert model.generate("Q: Zoe has 25 nuts.", max_new_tokens=4).texts
    acceptance = model.program.acceptance
    assert acceptance is not None
    assert summary["acceptance"]["best"]["period"] == acceptance.best.period
    assert model.program.period.period == acceptance.best.period
    assert model.program.period.confidence == acceptance.best.confidence


GIVEN = [
    (("--period", "5"), 5, None),
    (("--confidence", "0.3"), None, 0.3),
    (("--no-measure",), 16, 0),
]


@pytest.mark.parametrize(
    ("flags", "period", "confidence"),
    slow_but(GIVEN, [GIVEN[-1]], [GIVEN[0]]),
)
def test_what_is_given_is_not_measured(
    cli: Cli, tmp_path: Path, flags: tuple[str, ...], period: int | None, confidence: float | None
) -> None:
    out = tmp_path / "m.sirius"
    done = cli.compile(
        "tally-3m", "--sparsity", "griffin", "--graphs", "entries", "--out", out, *flags
    )
    assert done.code == 0, done.err
    with Artifact.open(out) as artifact:
        program = artifact.manifest.program
    assert period is None or program.period.period == period
    assert confidence is None or program.period.confidence == confidence
    assert (program.acceptance is None) == ("--no-measure" in flags)
    assert ("AAL" in done.out) == (program.acceptance is not None)


@pytest.mark.slow
def test_drafts_that_do_not_pay_are_warned_of(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped model's drafts always pay, so the test demands ten times as much of them."""
    monkeypatch.setattr("sirius_compile.compile.PAYS", 0.1)
    done = cli.compile("tally-3m", *FAST, "--measure", "--out", tmp_path / "m.sirius")
    assert done.code == 0, done.err
    assert "warning: drafting does not pay" in done.err
    assert "--keep" in done.err


def test_summary_for_a_reader(cli: Cli, tmp_path: Path) -> None:
    done = cli.compile("tally-3m", *FAST, "--out", tmp_path / "m.sirius")
    assert done.code == 0, done.err
    for word in (
        "parameters",
        "sparse layers  5 of 5",
        "density",
        "x the dense weights",
        "sparsify_topk",
    ):
        assert word in done.out


@pytest.mark.gate
def test_a_directory_compiles_like_the_shipped_name(cli: Cli, tmp_path: Path) -> None:
    directory = shipped_models()["tally-3m"]
    assert cli.compile(directory, *FAST, "--out", tmp_path / "a.sirius").code == 0
    assert cli.compile("tally-3m", *FAST, "--out", tmp_path / "b.sirius").code == 0
    with Artifact.open(tmp_path / "a.sirius") as a, Artifact.open(tmp_path / "b.sirius") as b:
        files = [dict(x.manifest.files) for x in (a, b)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--keep", "0"), "--keep must be in (0, 1], got 0.0"),
        (("--keep", "1.5"), "--keep must be in (0, 1], got 1.5"),
        (("--density", "0"), "--density must be in (0, 1], got 0.0"),
        (("--density", "0.6", "--keep", "0.5"), "--keep and --density set the same thing"),
        (("--keep", "auto"), "--keep auto compares measured drafts: leave --no-measure out"),
        (("--keep", "some"), "'some' is neither a number nor auto"),
        (("--keep", "auto", "--density", "0.5"), "--keep and --density set the same thing"),
        (("--sparsity", "auto", "--density", "0.5"), "--sparsity auto and --density both choose"),
        (("--sparsity", "none", "--keep", "auto"), "--keep auto searches for the share that a"),
        (("--agreement", "0.9"), "--agreement 0.9 applies to a search: add --keep auto or"),
        (("--keep", "auto", "--agreement", "95"), "--agreement must be in (0, 1], got 95.0"),
        (
            ("--keep", "auto", "--measure", "--dense-layers", "auto:1"),
            "--keep auto can't be combined with --dense-layers auto:N",
        ),
        (("--density", "0.1"), "--density 0.1 can't be reached by --sparsity topk: with 1% kept"),
        (("--dense-layers", "0,5"), "--dense-layers: the model has layers 0..4, got 5"),
        (("--dense-layers", "first"), "takes layer numbers (0,31) or auto:N, got 'first'"),
        (("--dense-layers", "auto:"), "takes layer numbers (0,31) or auto:N, got 'auto:'"),
        (("--dense-layers", "auto:5"), "--dense-layers must leave some of the 5 layers sparse"),
        (("--dense-layers", "0,1,2,3,4"), "must leave some of the 5 layers sparse; use --sparsity"),
        (("--score", "weight-norm"), "--score weight-norm is no longer an option"),
        (("--period", "0"), "--period must be in 1..512, got 0"),
        (("--tree-width", "0"), "--tree-width must be"),
        (("--tree-width", "999", "--period", "2"), "(the vocabulary), got 999"),
        (
            ("--tree-width", "8", "--period", "200"),
            "has 1593 nodes, more than 1024",
        ),
        (("--confidence", "-0.1"), "--confidence must be in [0, 1], got -0.1"),
        (("--refresh", "-1"), "--refresh must be >= 0 (0: never), got -1"),
        (("--refresh", "4"), "--refresh applies to griffin; --sparsity topk"),
        (("--threshold", "2"), "--threshold must be in [0, 1], got 2.0"),
        (("--verify-temperature", "0"), "--verify-temperature must be > 0, got 0.0"),
        (("--max-seq-len", "1"), "--max-seq-len must be at least 2, got 1"),
        (("--max-seq-len", "9999"), "--max-seq-len must be in 2..512"),
        (("--calibration", "nowhere.txt", "--sparsity", "cats"), "nowhere.txt can't be read"),
        (("--expect-graphs", "nowhere"), "nowhere holds no graphs"),
        (("--device", "abacus", "--sparsity", "cats"), "abacus"),
    ],
)
def test_values_out_of_range(
    cli: Cli, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "m.sirius"
    done = cli.compile("tally-3m", *FAST, "--out", out, *flags)
    assert done.code == 2
    assert message in done.err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_density_is_reached_and_dense_layers_are_told(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "m.sirius"
    flags = ("--sparsity", "teal", "--density", "0.6")
    done = cli.compile("tally-3m", *flags, "--dense-layers", "auto:1", "--out", out, "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    sparsity, ranking = summary["sparsity"], summary["ranking"]
    assert abs(sparsity["density"] - 0.6) < 1e-3
    assert [entry["layer"] for entry in ranking[:1]] == sparsity["dense_layers"]
    assert len(sparsity["sites"]) == 4 * 7
    for site in summary["calibration"]["sites"]:
        assert abs(site["reached"] - site["target"]) < 0.05
    shown = cli.run("inspect", out)
    assert f"dense      layers {sparsity['dense_layers'][0]}" in shown.out
    assert "self_attn.q_proj.weight" in shown.out
    model = sirius_runtime.load(out)
    output = model.generate("Q: Zoe has 25 nuts. How many nuts does Zoe have?\nA:")
    assert output.texts[0].strip().startswith("Zoe=25")
    assert abs(output.stats.density - 0.6) < 0.05  # measured


def test_unknown_sparsity_is_refused_with_the_choices(cli: Cli, tmp_path: Path) -> None:
    done = cli.compile("tally-3m", "--sparsity", "magic", "--out", tmp_path / "m.sirius")
    assert done.code == 2
    assert "'griffin', 'topk', 'cats'" in done.err


def test_an_existing_artifact_stays_unless_forced(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "m.sirius"
    out.write_bytes(b"precious")
    refused = cli.compile("tally-3m", *FAST, "--out", out)
    assert refused.code == 2
    assert "exists" in refused.err
    assert "--force" in refused.err
    assert out.read_bytes() == b"precious"
    assert cli.compile("tally-3m", *FAST, "--out", out, "--force").code == 0
    assert out.stat().st_size > 1_000_000


@pytest.mark.slow  # in the fast suite a writer is killed: `test_artifact`
def test_a_killed_compile_leaves_the_old_artifact(tmp_path: Path) -> None:
    out = tmp_path / "m.sirius"
    out.write_bytes(b"precious")
    code = (
        f"import sys; sys.argv = ['sirius-compile', 'tally-3m', '--force', '--out', {str(out)!r}]"
    )
    script = f"{code}\nimport sirius_compile.cli; sirius_compile.cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:  # killed while it calibrates, well before it is done
        if "pass pair_paths" in line:
            break
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert out.read_bytes() == b"precious"


def test_graphs_are_dumped_and_guarded(cli: Cli, tmp_path: Path) -> None:
    graphs = tmp_path / "graphs"
    dump = ("tally-3m", *FAST, "--out", tmp_path / "a.sirius", "--dump-graphs", graphs)
    assert cli.compile(*dump).code == 0
    names = sorted(p.name for p in graphs.iterdir())
    assert names[0] == "00_capture.dense.txt"
    assert "06_lay_out_weights.sparse.txt" in names
    again = ("tally-3m", *FAST, "--out", tmp_path / "b.sirius", "--expect-graphs", graphs)
    same = cli.compile(*again)
    assert same.code == 0, same.err
    assert f"{len(names)} compared" in same.err
    other = cli.compile(
        "tally-3m",
        *FAST,
        "--keep",
        "0.25",
        "--out",
        tmp_path / "c.sirius",
        "--expect-graphs",
        graphs,
    )
    assert other.code == 1
    assert "05_sparsify_topk.sparse.txt" in other.err
    assert "-%" in other.err
    assert "+%" in other.err
    assert "'silu', 0, 384)" in other.err
    assert "'silu', 0, 192)" in other.err
    assert not (tmp_path / "c.sirius").exists()


def test_the_models_are_listed_without_one(cli: Cli) -> None:
    done = cli.compile("--list-models")
    assert (done.code, done.err) == (0, "")
    for row in (*FAMILIES, *REFUSED):
        assert row.model_type in done.out


def test_the_models_are_listed_as_json(cli: Cli) -> None:
    done = cli.compile("--list-models", "--json")
    listed = json.loads(done.out)
    assert [row["model_type"] for row in listed["supported"]] == [f.model_type for f in FAMILIES]
    assert listed["supported"][0]["methods"][:3] == ["griffin", "topk", "cats"]
    assert [row["reason"] for row in listed["refused"]] == [row.reason for row in REFUSED]


@pytest.mark.parametrize("given", [(), ("tally-3m",), ("--out", "m.sirius")])
def test_a_model_and_a_target_are_needed(cli: Cli, given: tuple[str, ...]) -> None:
    done = cli.compile(*given)
    assert done.code == 2
    assert "a model and --out are needed: sirius-compile MODEL --out FILE" in done.err


def test_the_former_name_of_graphs_still_works_and_says_so(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "m.sirius"
    flags = ("--sparsity", "topk", "--no-measure", "--backend", "entries")
    done = cli.compile("tally-3m", *flags, "--out", out)
    assert done.code == 0, done.err
    assert "--backend is now called --graphs; using --graphs entries" in done.err
    with Artifact.open(out) as artifact:
        assert "period" not in [entry.name for entry in artifact.program.entries]


def test_without_whole_periods_a_back_end_of_theirs_is_refused(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "m.sirius"
    assert cli.compile("tally-3m", *FAST, "--out", out).code == 0
    done = cli.run("run", out, "-p", "Q", "--backend", "period")
    assert done.code == 2
    assert "the artifact holds none: use backend eager or inductor" in done.err


def test_a_command_is_a_line_in_the_table(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sirius_compile.cli import commands

    said: list[str] = []

    def greet(name: str, loud: bool = False) -> None:
        """Greet someone."""
        said.append(name.upper() if loud else name)

    monkeypatch.setattr(commands, "COMMANDS", {**commands.COMMANDS, "greet": greet})
    assert cli.compile("greet", "you", "--loud").code == 0
    assert said == ["YOU"]
    assert "sirius-compile greet --help" in " ".join(cli.compile("--help").out.split())
    assert "Greet someone" in cli.compile("greet", "--help").out
    assert "sirius-compile greet [OPTIONS]" in cli.compile("greet").err
    # What is no command is a model, wherever it stands.
    named = cli.compile("--out", tmp_path / "m.sirius", "greet")
    assert "greet" in named.err
    assert said == ["YOU"]
