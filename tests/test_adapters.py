"""Adapters: the compiled model has the adapter merged into its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sirius_compile import CompileConfig, adapters, compile_model
from sirius_runtime.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from tests.support.fast import slow_but
from tests.support.models import random_decoder, word_tokenizer

peft = pytest.importorskip("peft", reason="merges adapters with peft")

PROMPT = [7, 8, 9, 10]
LINEARS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_decoder("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def config(**options: Any) -> CompileConfig:
    return CompileConfig(sparsity="griffin", graphs="entries", **options)


def write_adapter(folder: Path, base: Path, settings: Any) -> Any:
    """An adapter with random weights for the base, and both as peft runs them."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


def lora(**options: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, **options)


KINDS = {
    "LoRA": lambda: lora(r=4, lora_alpha=16),
    "rsLoRA": lambda: lora(r=4, lora_alpha=16, use_rslora=True),
    "DoRA": lambda: lora(r=4, use_dora=True),
    "whole modules": lambda: lora(r=4, modules_to_save=["lm_head"]),
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=LINEARS, feedforward_modules=["down_proj"]
    ),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=LINEARS, r=4),
}


def greedy(model: Any, count: int = 16) -> list[int]:
    tokens: list[int] = model.generate(
        input_ids=torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False
    )[0, len(PROMPT) :].tolist()
    return tokens


@pytest.mark.parametrize("kind", slow_but(KINDS, {"LoRA", "whole modules"}))
def test_it_answers_as_peft_does(tmp_path: Path, base: Path, kind: str) -> None:
    adapted = write_adapter(tmp_path / "tuned", base, KINDS[kind]())
    expected = greedy(adapted)
    assert expected != greedy(AutoModelForCausalLM.from_pretrained(base).eval())
    compiled = compile_model(base, config(adapter=tmp_path / "tuned"))
    assert compiled.spec.model.source == f"{base} + tuned"
    ours = compiled.to_runtime().generate(PROMPT, mode="exact", max_new_tokens=16)
    assert list(ours.tokens[0]) == expected


def test_an_adapter_alone_finds_its_base(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "tuned"
    expected = greedy(write_adapter(folder, base, lora(r=4)))
    moved = json.loads((folder / "adapter_config.json").read_text())
    assert moved["base_model_name_or_path"] == str(base)
    model = compile_model(folder, config()).to_runtime()
    assert list(model.generate(PROMPT, mode="exact", max_new_tokens=16).tokens[0]) == expected
    assert model.generate("w7", max_new_tokens=1).prompts == ((7,),)  # the base's tokenizer
    moved["base_model_name_or_path"] = "/nowhere"
    (folder / "adapter_config.json").write_text(json.dumps(moved))
    with pytest.raises(ModelNotFoundError, match=r"the base model of .*/nowhere.*with --base"):
        compile_model(folder, config())
    there = compile_model(folder, config(base=str(base))).to_runtime()
    assert list(there.generate(PROMPT, mode="exact", max_new_tokens=16).tokens[0]) == expected
    del moved["base_model_name_or_path"]
    (folder / "adapter_config.json").write_text(json.dumps(moved))
    with pytest.raises(ConfigError, match="names no base model: pass --base"):
        compile_model(folder, config())


def test_a_tokenizer_beside_the_adapter_counts(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "tuned", base, lora(r=4))
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "w11"
    tokenizer.save_pretrained(tmp_path / "tuned")
    model = compile_model(tmp_path / "tuned", config()).to_runtime()
    messages = [{"role": "user", "content": "a"}]
    assert model.generate(messages=messages, max_new_tokens=1).prompts == ((11,),)


def test_what_can_not_be_merged_is_refused_by_name(tmp_path: Path, base: Path) -> None:
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    write_adapter(tmp_path / "prompt", base, settings)
    with pytest.raises(UnsupportedModelError, match=r"of type PROMPT_TUNING.*can't merge"):
        compile_model(tmp_path / "prompt", config())
    write_adapter(tmp_path / "other", base, lora(r=4))
    small = tmp_path / "small"
    random_decoder("llama", hidden_size=32, head_dim=8).save_pretrained(small)
    with pytest.raises(UnsupportedModelError, match=r"other \(LORA\) can't be merged into .*small"):
        compile_model(small, config(adapter=tmp_path / "other"))


def test_folders_that_are_no_adapter(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "tuned", base, lora(r=4))
    said = json.loads((tmp_path / "tuned/adapter_config.json").read_text())

    def refused(kind: type[Exception], words: str, **changes: Any) -> None:
        (tmp_path / "tuned/adapter_config.json").write_text(json.dumps(said | changes))
        with pytest.raises(kind, match=words):
            compile_model(base, config(adapter=tmp_path / "tuned"))

    refused(UnsupportedModelError, "an adapter for SEQ_CLS", task_type="SEQ_CLS")
    refused(ModelNotFoundError, "has no peft_type", peft_type=None)
    refused(UnsupportedModelError, "of type NOPE", peft_type="NOPE")
    weights = tmp_path / "tuned/adapter_model.safetensors"
    weights.rename(tmp_path / "tuned/adapter_model.bin")
    refused(
        ModelNotFoundError, r"has no adapter_model\.safetensors, and pickled weights are not loaded"
    )
    with pytest.raises(ModelNotFoundError, match=r"holds no adapter_config\.json"):
        compile_model(base, config(adapter=tmp_path))


def test_flags_that_do_not_go_together(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"--base applies to adapters, but .* is a model"):
        compile_model(base, config(base="x"))
    with pytest.raises(ConfigError, match="--adapter and --base apply to models in files"):
        compile_model(random_decoder("llama"), config(adapter=tmp_path))


def test_peft_missing_is_said(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path / "tuned", base, lora(r=4))
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match="needs peft: pip install peft"):
        compile_model(tmp_path / "tuned", config())
