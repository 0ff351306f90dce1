"""The values that the compiler reads from a generation config, and its notes on the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from sirius_compile.generation import read_generation
from sirius_compile.models import shipped_models
from sirius_runtime.artifact import Artifact
from sirius_runtime.logits_options import GenerationSpec, LogitsSpec, SamplingSpec, SequenceBias
from sirius_runtime.spec import from_json, to_json
from tests.support.cli import Cli

VOCABULARY = 101
QWEN: dict[str, Any] = {
    "bos_token_id": 3,
    "do_sample": True,
    "eos_token_id": [4, 3],
    "pad_token_id": 3,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
}
"""The config of Qwen2.5's instruction models, with other ids."""


def test_defaults_of_an_instruction_model_are_taken() -> None:
    spec, left_out = read_generation(GenerationConfig(**QWEN), VOCABULARY)
    assert spec == GenerationSpec(
        LogitsSpec(repetition_penalty=1.05), SamplingSpec(temperature=0.7, top_k=20, top_p=0.8)
    )
    assert left_out == ("do_sample=True (only mode sample draws tokens)",)


def test_every_option_of_logits_is_taken_as_it_is_and_survives_the_manifest() -> None:
    config = GenerationConfig(
        sequence_bias=[[[3], 2.5], [[1, 4], -1.0]],
        encoder_repetition_penalty=1.1,
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        encoder_no_repeat_ngram_size=4,
        bad_words_ids=[[7], [8, 9]],
        min_length=5,
        min_new_tokens=4,
        forced_bos_token_id=1,
        forced_eos_token_id=2,
        remove_invalid_values=True,
        exponential_decay_length_penalty=[10, 1.5],
        suppress_tokens=[3, 500, -1],  # of which only the first is a token
        begin_suppress_tokens=[6],
        renormalize_logits=True,
        min_p=0.05,
        typical_p=0.9,
    )
    spec, left_out = read_generation(config, VOCABULARY)
    assert spec.logits == LogitsSpec(
        sequence_bias=(SequenceBias((3,), 2.5), SequenceBias((1, 4), -1.0)),
        encoder_repetition_penalty=1.1,
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        encoder_no_repeat_ngram_size=4,
        bad_words_ids=((7,), (8, 9)),
        min_length=5,
        min_new_tokens=4,
        forced_bos_token_id=1,
        forced_eos_token_id=(2,),
        remove_invalid_values=True,
        exponential_decay_length_penalty=(10, 1.5),
        suppress_tokens=(3,),
        begin_suppress_tokens=(6,),
        renormalize_logits=True,
    )
    assert all(value != getattr(LogitsSpec(), name) for name, value in vars(spec.logits).items())
    assert spec.sampling == SamplingSpec(min_p=0.05, typical_p=0.9)
    assert left_out == ()
    assert from_json(GenerationSpec, json.loads(json.dumps(to_json(spec)))) == spec


def test_transformers_own_defaults_are_nothing_to_speak_of() -> None:
    own = GenerationConfig._get_default_generation_params()
    spec, left_out = read_generation(GenerationConfig(**own), VOCABULARY)
    assert spec.logits.changes_nothing
    assert left_out == ()
    assert read_generation(GenerationConfig(), VOCABULARY) == (GenerationSpec(), ())


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("num_beams", 4, "no beam search"),
        ("num_return_sequences", 2, "one answer for each prompt"),
        ("guidance_scale", 1.5, "no classifier-free guidance"),
        ("penalty_alpha", 0.6, "no contrastive search"),
        ("watermarking_config", {"bias": 2.5}, "no watermark"),
        ("epsilon_cutoff", 3e-4, "mode sample has no such cutoff"),
        ("eta_cutoff", 3e-4, "mode sample has no such cutoff"),
        ("top_h", 0.4, "mode sample has no such cutoff"),
        ("stop_strings", ["\n"], "pass them as stop"),
        ("max_length", 4096, "pass max_new_tokens"),
        ("max_new_tokens", 64, "pass max_new_tokens"),
        ("token_healing", True, "the prompt's last token stays"),
        ("repetition_penalty", -1.0, "must be a number > 0"),
        ("bad_words_ids", [[7, 500]], "outside of the vocabulary"),
        ("temperature", 0.0, "temperature must be > 0"),
        ("temperature", "hot", "is not one of float"),
        ("top_k", 2.5, "is not one of int"),
        ("top_p", 1.5, "top_p must be in"),
    ],
)
def test_what_is_not_applied_is_named_with_what_it_means(
    name: str, value: Any, meaning: str
) -> None:
    config = GenerationConfig()
    setattr(config, name, value)  # as a file may have it, which transformers only warns of
    spec, (said,) = read_generation(config, VOCABULARY)
    assert spec == GenerationSpec()
    assert said.startswith(f"{name}=")
    assert meaning in said


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_the_command_lines_say_what_applies_and_what_does_not(cli: Cli, tmp_path: Path) -> None:
    model = shutil.copytree(shipped_models()["tally-3m"], tmp_path / "model")
    path = model / "generation_config.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(written | {"repetition_penalty": 9.0, "num_beams": 3, "top_p": 0.9}))
    out = tmp_path / "m.sirius"
    flags = ("--sparsity", "topk", "--graphs", "entries", "--no-measure")
    done = cli.compile(model, *flags, "--out", out, "--json")
    assert done.code == 0, done.err
    line = "generation_config: not applied: num_beams=3 (no beam search: one sequence is written)"
    assert f"sirius-compile: warning: {line}" in done.err
    assert json.loads(done.out)["warnings"] == [line]
    with Artifact.open(out) as artifact:
        assert artifact.program.generation.logits == LogitsSpec(repetition_penalty=9.0)
    assert "repetition_penalty 9.0, top_p 0.9" in cli.run("inspect", out).out

    def told(*flags: str) -> dict[str, Any]:
        done = cli.run("run", out, "-p", "Q: Zoe", "--json", "--max-new-tokens", "12", *flags)
        assert done.code == 0, done.err
        return json.loads(done.out)  # type: ignore[no-any-return]

    own = told("--mode", "exact", "--logprobs", "2")
    assert [entry["token"] for entry in own["logprobs"]] == own["tokens"]
    assert all(len(entry["top"]) == 2 for entry in own["logprobs"])
    assert all(entry["logprob"] <= 0.0 for entry in own["logprobs"])
    assert "logprobs" not in told("--mode", "exact")
    other = told("--mode", "exact", "--repetition-penalty", "1.0")
    assert other["tokens"] != own["tokens"]
    assert told("--mode", "exact", "--repetition-penalty", "9")["tokens"] == own["tokens"]
    assert len(told("--min-new-tokens", "12")["tokens"]) == 12
    for flags, message in (
        (("--repetition-penalty", "0"), "repetition_penalty must be a number > 0"),
        (("--logprobs", "-1", "--json"), "logprobs must be in 0.."),
        (("--logprobs", "1"), "--logprobs goes with --json"),
    ):
        done = cli.run("run", out, "-p", "Q:", *flags)
        assert done.code == 2
        assert message in done.err
