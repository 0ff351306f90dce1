"""`sirius verify`: sound artifacts and others, and the self-test where machines differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sirius_runtime import load
from sirius_runtime.artifact import Artifact
from sirius_runtime.errors import ArtifactError
from sirius_runtime.kernels.native import references
from sirius_runtime.self_test import Outcome, choose_tokens, record, repeat
from sirius_runtime.spec import DType, SelfTestSpec, from_json, to_json
from sirius_runtime.verification import verify
from tests.support.artifacts import rebuild, refused
from tests.support.cli import Cli
from tests.support.models import TinyModels


@pytest.fixture(scope="module")
def sound(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    return tiny("llama", "griffin").compiled.save(folder / "sound.sirius")


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model.sirius"
    copy.write_bytes(sound.read_bytes())
    return copy


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def self_test(path: Path) -> SelfTestSpec:
    with Artifact.open(path) as artifact:
        assert artifact.manifest.self_test is not None
        return artifact.manifest.self_test


def test_a_compiled_artifact_is_reproduced_bit_by_bit(cli: Cli, sound: Path) -> None:
    done = cli.run("verify", sound)
    assert (done.code, done.err) == (0, "")
    with Artifact.open(sound) as artifact:
        files = artifact.manifest.files
    size = sum(record.size for record in files.values())
    assert done.out == (
        f"{sound}: sound ({len(files)} files, {size:,} bytes); this machine reproduces the "
        "compiling machine's results: the logits of prefill, sparse and full are bit-equal\n"
    )
    found = json.loads(cli.run("verify", sound, "--json").out)
    assert found["self_test"]["outcome"] == "bit-equal"
    assert found["graphs"] == ["full", "observe", "prefill", "sparse"]
    assert found["backend"] == "eager"


def test_the_self_test_is_of_the_entries_as_decoding_runs_them(sound: Path) -> None:
    test = self_test(sound)
    model = load(sound, device="cpu")
    assert [run.entry for run in test.runs] == ["prefill", "sparse", "full"]
    first = model.generate(input_ids=[test.prompt], max_new_tokens=1, mode="full").tokens[0][0]
    assert test.runs[0].tokens[0][0] == first
    text = [*test.prompt, *test.block]
    scores = model.score([text], start=len(test.prompt) + 1)[0]
    best = [row[0] for row in test.runs[2].tokens]
    known = zip(best[:-1], text[len(test.prompt) + 1 :], scores.greedy, strict=True)
    assert all((likeliest == token) is greedy for likeliest, token, greedy in known)
    assert test.runs[1].logits != test.runs[2].logits  # the sparse path is another


def test_references_round_and_do_not_differ(sound: Path) -> None:
    test, model = self_test(sound), load(sound, device="cpu")
    with references():
        found = repeat(model.state(40), test, DType.FLOAT32)
    assert all(one.outcome is not Outcome.DIFFERENT for one in found)
    assert all(one.largest < 1e-4 for one in found)


def test_rounding_is_told_apart_from_another_result(cli: Cli, path: Path) -> None:
    def change(size: float, entry: int) -> None:
        def spoil(manifest: dict[str, Any]) -> None:
            run = manifest["self_test"]["runs"][entry]
            run["sha256"] = "0" * 64
            run["logits"][-1][1] += size * run["rms"][-1]

        rebuild(path, manifest=spoil)

    change(0.001, 1)
    done = cli.run("verify", path)
    assert done.code == 0
    assert done.out.endswith(
        "this machine reproduces the compiling machine's results: the logits are bit-equal in "
        "prefill, equal within rounding in sparse and bit-equal in full (largest difference 0.001 "
        "of the logits' RMS)\n"
    )
    change(0.1, 2)
    done = cli.run("verify", path)
    assert done.code == 1
    assert "does not reproduce the compiling machine's results" in done.out
    assert "different in full" in done.out
    assert "SIRIUS_KERNELS=0" in done.err
    done = cli.run("verify", path, "--json")
    assert done.code == 1
    found = json.loads(done.out)["self_test"]
    assert found["outcome"] == "different"
    assert found["entries"]["full"]["largest"] == pytest.approx(0.1, rel=0.02)


def test_a_token_that_overtakes_the_likeliest_is_another_result(sound: Path) -> None:
    """The kept logits agree, but a token that was not kept is far above them."""
    test, model = self_test(sound), load(sound, device="cpu")
    run = test.runs[2]
    hidden = replace(
        run,
        sha256="0" * 64,
        tokens=tuple(row[1:] for row in run.tokens),
        logits=tuple(row[1:] for row in run.logits),
    )
    (found,) = repeat(model.state(40), replace(test, runs=(hidden,)), DType.FLOAT32)
    assert found.outcome is Outcome.DIFFERENT


def test_an_artifact_without_a_self_test_says_so(cli: Cli, path: Path) -> None:
    rebuild(path, manifest=lambda m: m.pop("self_test"))
    done = cli.run("verify", path)
    assert done.code == 0
    assert done.out.endswith(
        "it has no self-test, so reproduction on this machine is not checked\n"
    )
    assert json.loads(cli.run("verify", path, "--json").out)["self_test"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(prompt=[]), "the length of prompt must be in 1..64"),
        (lambda t: t.update(prompt=[1] * 65), "the length of prompt must be in 1..64"),
        (lambda t: t.update(block=[1] * 17), "the length of block must be in 1..16"),
        (lambda t: t["block"].append(101), "a token must be in 0..100, found 101"),
        (lambda t: t["runs"][0]["tokens"][0].append(5), "lists that differ in length"),
        (lambda t: t["runs"][1]["rms"].pop(), "lists that differ in length"),
        (lambda t: t["runs"][1]["rms"].insert(0, -1.0), "rms must be >= 0"),
    ],
)
def test_a_self_test_out_of_range_is_refused(path: Path, change: Any, says: str) -> None:
    rebuild(path, manifest=lambda m: change(m["self_test"]))
    refused(path, says)


def test_a_self_test_of_other_entries_or_tokens_is_harmless(path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        first, second, third = manifest["self_test"]["runs"]
        first["entry"] = "else"
        for name in ("rms", "tokens", "logits"):
            second[name] = second[name][:1]
        second["sha256"] = third["sha256"] = ""

    rebuild(path, manifest=change)
    found = verify(path)
    assert [one.entry for one in found.compared] == ["sparse", "full"]
    assert found.outcome is Outcome.DIFFERENT


def drop(name: str) -> Any:
    def change(entries: dict[str, bytes]) -> None:
        del entries[name]

    return change


def add(name: str, content: bytes) -> Any:
    return lambda entries: entries.update({name: content})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("graphs/observe.json"), "graphs/observe.json is not an entry"),
        (add("graphs/more.json", b"{}"), "graphs/more.json is not an entry"),
        (add("graphs/full.json", b"{}"), "not a graph document"),
        (add("tokenizer/tokenizer.json", b"{}"), "tokenizer"),
    ],
)
def test_what_is_not_sound_is_named(cli: Cli, path: Path, change: Any, says: str) -> None:
    rebuild(path, change)
    done = cli.run("verify", path)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


def test_a_period_is_checked_too(whole: Any, tmp_path: Path) -> None:
    """`load` by backend eager has no use for it."""
    path = whole.save(tmp_path / "model.sirius")
    assert verify(path).graphs == ("full", "observe", "period", "prefill", "sparse")
    rebuild(path, add("graphs/period.json", b'{"nodes": []}'))
    load(path, device="cpu")
    with pytest.raises(ArtifactError, match="graph"):
        verify(path)


def test_without_finite_logits_there_is_no_self_test(tiny: TinyModels) -> None:
    model = tiny("llama", "topk").compiled.to_runtime(device="cpu")
    weights = model.backend.weights  # type: ignore[attr-defined]
    prompt, block = choose_tokens(model.program.model)
    assert record(model.state(28), prompt, block) is not None
    norm = weights["model.norm.weight"]  # the very tensor that other tests' models read
    numbers = norm.clone()
    try:
        norm.fill_(torch.nan)
        assert record(model.state(28), prompt, block) is None
    finally:
        norm.copy_(numbers)


def test_tokens_fit_any_model(tiny: TinyModels) -> None:
    spec = tiny("llama", "topk").compiled.spec.model
    assert len(choose_tokens(spec)[0]) == 24
    for longest in (2, 3, 5, 27):
        prompt, block = choose_tokens(replace(spec, max_seq_len=longest, vocab_size=3))
        assert len(prompt) >= 1
        assert len(prompt) + len(block) == longest
        assert max(prompt + block) < 3
    assert choose_tokens(spec) == choose_tokens(spec)


def test_it_is_plain_data(sound: Path) -> None:
    test = self_test(sound)
    assert from_json(SelfTestSpec, json.loads(json.dumps(to_json(test)))) == test
