"""`sirius run` and `sirius inspect`: what they print, and how they refuse."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import processors

from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime.cli.comparison import side_by_side
from tests.support.cli import Cli
from tests.support.models import TinyModels, word_tokenizer

PROMPT = next(problems(Task.REASONING, "test", seed=11)).prompt


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = compile_model(
        "tally-3m", CompileConfig(sparsity="griffin", keep=0.4, graphs="entries")
    )
    return compiled.save(tmp_path_factory.mktemp("artifact") / "tally.sirius")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def generated(cli: Cli, artifact: Path, *flags: str) -> dict[str, object]:
    done = cli.run("run", artifact, "--prompt", PROMPT, "--json", *flags)
    assert done.code == 0, done.err
    document: dict[str, object] = json.loads(done.out)
    return document


def test_streams_the_text_to_stdout_and_stats_to_stderr(cli: Cli, artifact: Path) -> None:
    done = cli.run("run", artifact, "--prompt", PROMPT.replace("\n", "\\n"))
    assert done.code == 0
    assert done.out == f"{generated(cli, artifact)['text']}\n"
    for word in ("tokens/s", "periods", "AAL", "corrections", "density 0.553", "effective"):
        assert word in done.err


def test_prompt_from_file_and_from_stdin(
    cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT + "\n")
    few = ("--max-new-tokens", "24")
    from_file = cli.run("run", artifact, "--prompt-file", path, *few)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode())))
    from_stdin = cli.run("run", artifact, *few)
    assert from_file.code == from_stdin.code == 0
    assert from_file.out == from_stdin.out == f"{generated(cli, artifact, *few)['text']}\n"


def test_exact_mode_equals_full(cli: Cli, artifact: Path) -> None:
    full = generated(cli, artifact, "--mode", "full", "--dtype", "float32")
    for flags in (
        (),
        ("--tree-width", "3", "--refresh", "2"),
        ("--confidence", "0.5"),
        ("--period", "auto"),
    ):
        exact = generated(cli, artifact, "--mode", "exact", "--dtype", "float32", *flags)
        assert exact["tokens"] == full["tokens"]
        assert exact["seed"] is None


@pytest.mark.gate
def test_sampled_tokens_come_again_by_their_seed(cli: Cli, artifact: Path) -> None:
    flags = ("--mode", "sample", "--temperature", "50", "--top-k", "40", "--top-p", "0.99")
    flags += ("--max-new-tokens", "24")
    unseeded = generated(cli, artifact, *flags)
    again = generated(cli, artifact, *flags, "--seed", str(unseeded["seed"]))
    assert (again["tokens"], again["seed"]) == (unseeded["tokens"], unseeded["seed"])
    others = [generated(cli, artifact, *flags, "--seed", seed) for seed in "123"]
    assert len({str(other["tokens"]) for other in others}) > 1
    done = cli.run("run", artifact, "--prompt", PROMPT, *flags, "--seed", "1")
    assert done.out == f"{others[0]['text']}\n"
    assert "seed 1," in done.err


def test_json_has_the_stats(cli: Cli, artifact: Path) -> None:
    stats = generated(cli, artifact, "--period", "8")["stats"]
    assert isinstance(stats, dict)
    assert sum(stats["advances"].values()) == stats["periods"]
    phases = {"draft", "verify", "period", "rest"}
    assert set(stats["bytes_per_token"]) == set(stats["seconds"]) == phases


def test_stop_string_ends_the_text(cli: Cli, artifact: Path) -> None:
    whole = str(generated(cli, artifact)["text"])
    done = cli.run("run", artifact, "--prompt", PROMPT, "--stop", "=")
    assert done.out == whole.split("=")[0] + "\n"


def test_compare_prints_the_three_paths(cli: Cli, artifact: Path) -> None:
    few = ("--max-new-tokens", "40")
    done = cli.run("run", artifact, "--prompt", PROMPT, "--compare", *few)
    assert done.code == 0
    for word in ("--- full ---", "--- sparse ---", "--- sirius ---", "x full", "AAL"):
        assert word in done.out
    document = json.loads(cli.run("run", artifact, "-p", PROMPT, "--compare", "--json", *few).out)
    assert list(document) == ["full", "sparse", "sirius"]
    assert document["full"]["speed"] == 1.0


def test_texts_standside_by_side() -> None:
    lines = side_by_side(["a\n b\nc", "x" * 20], width=34)
    assert lines == ["a" + " " * 17 + "x" * 16, " b" + " " * 16 + "x" * 4, "c"]


def test_unknown_words_are_named(cli: Cli, artifact: Path) -> None:
    done = cli.run("run", artifact, "-p", "Zoe has 25 zebras", "--max-new-tokens", "2")
    assert done.code == 0
    assert "' zebras'" in done.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--mode", "dense"),
            "mode must be one of sirius, exact, sample, full, sparse, got 'dense'",
        ),
        (("--period", "0"), "period must be in 1..512, got 0"),
        (("--period", "-3"), "period must be in 1..512, got -3"),
        (("--period", "often"), "period must be a number or 'auto', got 'often'"),
        (("--tree-width", "0"), "tree_width must be in 1.."),
        (("--confidence", "1.5"), "confidence must be in [0, 1], got 1.5"),
        (("--refresh", "-1"), "refresh must be >= 0 (0: never), got -1"),
        (("--seed", "1"), "seed: mode sirius is greedy; use mode sample"),
        (("--mode", "sample", "--temperature", "0"), "temperature must be > 0, got 0.0"),
        (("--mode", "full", "--top-k", "-1"), "top_k must be >= 0 (0: no limit), got -1"),
        (("--mode", "sparse", "--top-p", "0"), "top_p must be in (0, 1], got 0.0"),
        (("--compare", "--seed", "1"), "--compare runs modes full, sparse and sirius, greedily"),
        (("--threshold", "-1"), "threshold must be >= 0, got -1.0"),
        (("--max-new-tokens", "5000"), "max_new_tokens must be in 1.."),
        (("--dtype", "int4"), "dtype must be one of float32, bfloat16, float16"),
        (("--device", "abacus"), "device 'abacus' can't be used here"),
        (
            ("--backend", "magic"),
            "one of auto, eager, inductor, cudagraph, period, aoti, onnxruntime, got 'magic'",
        ),
        (("--stop", ""), "a stop string is empty"),
    ],
)
def test_bad_options(cli: Cli, artifact: Path, flags: tuple[str, ...], message: str) -> None:
    done = cli.run("run", artifact, "--prompt", PROMPT, *flags)
    assert done.code == 2
    assert message in done.err
    assert done.out.strip() == ""


def test_empty_prompt_and_missing_files(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    assert "is empty" in cli.run("run", artifact, "--prompt", "").err
    missing = cli.run("run", artifact, "--prompt-file", tmp_path / "no.txt")
    assert missing.code == 2
    assert "no.txt can't be read" in missing.err
    nowhere = cli.run("run", tmp_path / "no.sirius", "--prompt", PROMPT)
    assert nowhere.code == 2
    assert "there is no such file" in nowhere.err


@pytest.mark.gate
def test_a_second_bos_is_said_once_on_stderr(cli: Cli, tiny: TinyModels, tmp_path: Path) -> None:
    tokenizer = word_tokenizer().backend_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    compiled = replace(tiny(method="griffin").compiled, tokenizer_files=files)
    path = compiled.save(tmp_path / "bos.sirius")
    run = ("run", path, "--prompt", "<s> w7", "--max-new-tokens", "4")
    for flags in ((), ("--json",), ("--compare",)):
        said = cli.run(*run, *flags).err
        assert said.count("begins with <s> already") == 1
        assert "sirius: warning: prompt 0 begins with <s>" in said
        assert "--no-add-special-tokens" in said
        plain = cli.run(*run, *flags, "--no-add-special-tokens")
        assert plain.code == 0
        assert "warning" not in plain.err
    one = cli.run("run", path, "--prompt", "w7", "--max-new-tokens", "4", "--json")
    assert (
        json.loads(one.out)["tokens"]
        == json.loads(cli.run(*run, "--json", "--no-add-special-tokens").out)["tokens"]
    )


def test_inspect_shows_what_the_file_holds(cli: Cli, artifact: Path) -> None:
    done = cli.run("inspect", artifact)
    assert done.code == 0
    for word in (
        "tally-3m (llama)",
        "griffin",
        " of 768 of model.layers.*.mlp.gate_proj.weight in 5 layers",
        "entries    prefill, sparse, full, observe",
        "sparsify_griffin 15",
    ):
        assert word in done.out
    manifest = json.loads(cli.run("inspect", artifact, "--json").out)
    assert manifest["program"]["sparsity"]["method"] == "griffin"
