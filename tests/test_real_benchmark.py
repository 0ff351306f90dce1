"""The benchmark of real models' answers: its peers in processes of their own, and their memory."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks import own_process, real
from benchmarks.own_process import Model, Resident
from sirius_compile import CompileConfig, compile_model
from sirius_runtime.errors import ConfigError
from tests.support.models import random_decoder, word_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16, as transformers saves it, that would sample if it was left to."""
    path = tmp_path_factory.mktemp("llama")
    model = random_decoder("llama").bfloat16()
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    model.save_pretrained(path)
    return path


def test_transformers_answers_greedily(folder: Path) -> None:
    generate = own_process.KINDS["transformers"](Model("transformers", str(folder), threads=1))
    prompt = [9, 8, 7]
    tokens, seconds = generate(prompt, 12, set())
    assert seconds > 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    cache, given, wanted = DynamicCache(config=model.config), prompt, list[int]()
    with torch.inference_mode():
        for _ in range(12):
            logits = model(torch.tensor([given]), past_key_values=cache).logits
            given = [int(logits[0, -1].argmax())]
            wanted += given
    assert tokens == wanted
    ended, _ = generate(prompt, 12, {wanted[3]})
    assert ended == wanted[: wanted.index(wanted[3]) + 1]


def test_requests_and_answers_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(model: Model) -> own_process.Generate:
        sys.stdout.write(f"a library's chatter about {model.path}")
        return lambda prompt, most, eos: (prompt[:most] + sorted(eos), 0.5)

    monkeypatch.setitem(own_process.KINDS, "fake", load)
    said = json.dumps({"kind": "fake", "path": "m", "threads": 1})
    monkeypatch.setattr(sys, "argv", ["own_process", said])
    monkeypatch.setattr(sys, "stdin", io.StringIO("[[4, 5, 6], 2, [9, 1]]\n[[7], 3, []]\n"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back
    assert own_process.main() == 0
    printed = capsys.readouterr()
    assert printed.out == "[[4, 5, 1, 9], 0.5]\n[[7], 0.5]\n"
    assert "chatter about m" in printed.err


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.gguf: there is no such file.*llama\.cpp"):
        own_process.OwnProcess(Model("llama.cpp", str(tmp_path / "none.gguf"), 1))


@pytest.mark.slow
def test_a_process_that_ends_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (bad := tmp_path / "bad.sirius").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"the process of sirius with .*bad\.sirius ended"):
        own_process.peak(Model("sirius", str(bad), 1), [7], 4, ())
    assert "not a ZIP file" in capfd.readouterr().err


def test_the_share_is_of_the_baseline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = artifact(tmp_path)
    asked: list[Model] = []

    def peak(model: Model, *_: object) -> Resident:
        asked.append(model)
        return Resident(100 << 20, (300 if len(asked) == 1 else 100) << 20)

    monkeypatch.setattr(own_process, "peak", peak)
    monkeypatch.setattr(real, "PROMPTS", {"maths": ("w7 w8",)})
    real.main([str(path), "--baseline", str(path), "--memory", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "| baseline, dense | 100 MiB | 300 MiB | 400 MiB | 1.000 |" in printed
    assert "| sirius | 100 MiB | 100 MiB | 200 MiB | 0.500 |" in printed
    assert [model.mode for model in asked] == ["full", "full", "sirius"]


def artifact(folder: Path) -> Path:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    options = CompileConfig(sparsity="griffin", period=4, graphs="entries")
    return compile_model(random_decoder("llama"), options, tokenizer=tokenizer).save(
        folder / "m.sirius"
    )


@pytest.mark.slow
def test_the_command(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = artifact(tmp_path)
    monkeypatch.setattr(real, "PROMPTS", {"maths": ("w7 w8 w9",), "code": ("w11 w12",)})
    flags = [str(path), "--baseline", str(path), "--transformers", str(folder)]
    flags += ["--prompts", "1", "--max-new-tokens", "8", "--threads", "1"]
    real.main(flags)
    printed = capsys.readouterr().out
    for way in ("dense", "sirius", "exact", "baseline, dense", "transformers, bfloat16"):
        (rate,) = re.findall(rf"^\| all \| {way} \| ([\d.]+) \|", printed, re.MULTILINE)
        assert float(rate) > 0
    real.main([*flags, "--memory"])
    rows = re.findall(
        r"^\| (.+) \| (\d+) MiB \| (\d+) MiB \| (\d+) MiB \| ([\d.]+) \|$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    ways = [way for way, *_ in rows]
    assert ways == ["baseline, dense", "dense", "sirius", "transformers, bfloat16"]
    sizes = {way: [int(size) for size in own] for way, *own, _ in rows}
    # Each has torch in memory, and transformers what it imports besides.
    assert all(anonymous > 50 < mapped for anonymous, mapped, _ in sizes.values())
    assert all(abs(both - sum(parts)) <= 1 for *parts, both in sizes.values())
    assert sizes["transformers, bfloat16"][2] > sizes["dense"][2]


def test_options_that_mean_nothing_are_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--threshold must be >= 0, got -1"):
        real.main(["no.sirius", "--threshold=-1"])
    with pytest.raises(SystemExit):
        real.main(["no.sirius", "--memory", "--threshold", ".3"])
    assert "leave --lookup and --threshold out" in capsys.readouterr().err
