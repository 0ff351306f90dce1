"""GGUF files: compiling one gives the model that it was written from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sirius_compile import CompileConfig, compile_model, gguf_file
from sirius_compile.compile import Compiled
from sirius_compile.workspace import Workspace
from sirius_runtime.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from sirius_runtime.nested import unnest
from tests.support.fast import slow_but
from tests.support.models import MAX_SEQ_LEN, SMALL, VOCABULARY, random_decoder

gguf = pytest.importorskip("gguf", reason="writes GGUF files with the package gguf")
pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")

END, TURN = 2, 5
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TYPES = {"F32": torch.float32, "F16": torch.float16, "Q8_0": torch.bfloat16, "Q4_0": torch.bfloat16}
ALONE = CompileConfig(sparsity="none", graphs="entries")


def named(name: str) -> str:
    """A weight's name in a GGUF file."""
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    architecture: str = "qwen2",
    change: Callable[[np.ndarray], None] = lambda data: None,
) -> dict[str, torch.Tensor]:
    """Writes a model as llama.cpp's converter does; returns the weights as they then are. `change`
    is given the data of each matrix first.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(MAX_SEQ_LEN)
    writer.add_embedding_length(SMALL["hidden_size"])
    writer.add_block_count(SMALL["num_hidden_layers"])
    writer.add_feed_forward_length(SMALL["intermediate_size"])
    writer.add_head_count(SMALL["num_attention_heads"])
    writer.add_head_count_kv(SMALL["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    special = ["<pad>", "<s>", "</s>", "<3>", "<4>", "<turn>"]
    words = [*special, "ab", *(chr(0x21 + i) for i in range(VOCABULARY - 7))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control] * len(special) + [normal] * (len(words) - len(special)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(END)
    writer.add_eot_token_id(TURN)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    wanted = gguf.GGMLQuantizationType[kind]
    stored = {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        type_of = wanted if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, type_of)
        if values.ndim == 2:
            change(data)
        stored[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, type_of)))
        writer.add_tensor(named(name), data, raw_dtype=type_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def weights_of(compiled: Compiled) -> dict[str, torch.Tensor]:
    """Its parameters under the names and in the layout of transformers."""
    return {
        spec.name: compiled.weights(spec).mT if spec.transposed else compiled.weights(spec)
        for spec in compiled.spec.weights
        if spec.parameter
    }


@pytest.mark.parametrize("kind", slow_but(TYPES, {"Q8_0"}, {"F16"}))
def test_what_is_compiled_is_what_the_file_holds(tmp_path: Path, kind: str) -> None:
    model = random_decoder("qwen2", tie_word_embeddings=False)
    stored = write_gguf(tmp_path / "tiny.gguf", model, kind)
    compiled = compile_model(tmp_path / "tiny.gguf", ALONE)
    assert compiled.spec.model.dtype == str(TYPES[kind]).removeprefix("torch.")
    assert compiled.spec.model.source == "tiny.gguf"
    found = weights_of(compiled)
    assert set(found) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor.to(TYPES[kind])), name


def test_tensors_are_read_one_at_a_time_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads blocks of rows, the last one shorter, and keeps the result in a workspace."""
    stored = write_gguf(tmp_path / "m.gguf", random_decoder("qwen2"), "Q8_0")
    monkeypatch.setattr(gguf_file, "_BLOCK", 7 * SMALL["hidden_size"])
    read: list[str] = []
    get = gguf_file.GgufWeights.get

    def counted(self: gguf_file.GgufWeights, name: str) -> torch.Tensor:
        read.append(name)
        return get(self, name)

    monkeypatch.setattr(gguf_file.GgufWeights, "get", counted)
    with Workspace(tmp_path / "m.sirius") as workspace:
        compiled = compile_model(tmp_path / "m.gguf", ALONE, workspace=workspace)
        compiled.save(tmp_path / "m.sirius")
        for name, tensor in weights_of(compiled).items():
            assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
    assert len(read) == len(set(read)) == len(stored)
    again = compile_model(tmp_path / "m.gguf", ALONE).save(tmp_path / "again.sirius")
    assert again.read_bytes() == (tmp_path / "m.sirius").read_bytes()


@pytest.mark.gate
def test_it_answers_as_the_model_does(tmp_path: Path) -> None:
    model = random_decoder("qwen2", tie_word_embeddings=False)
    write_gguf(tmp_path / "tiny.gguf", model)
    compiled = compile_model(
        str(tmp_path / "tiny.gguf"), CompileConfig(sparsity="griffin", graphs="entries")
    )
    runtime = compiled.to_runtime()
    ids = [7, 8, 9]
    theirs = model.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=[END, TURN]
    )
    ours = runtime.generate(ids, mode="exact", max_new_tokens=20)
    assert list(ours.tokens[0]) == theirs[0, len(ids) :].tolist()


def test_tokenizer_template_and_ends_come_from_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_decoder("qwen2", tie_word_embeddings=False), "F16")
    options = CompileConfig(sparsity="none", graphs="entries", dtype="float32")
    compiled = compile_model(tmp_path / "tiny.gguf", options)
    assert compiled.spec.model.dtype == "float32"
    assert compiled.spec.eos_token_ids == (END, TURN)
    assert compiled.spec.model.max_seq_len == MAX_SEQ_LEN
    model = compiled.to_runtime()
    chat = model.generate(messages=[{"role": "user", "content": "ab!"}], max_new_tokens=1)
    assert chat.prompts == ((1, 6, 7),)


def test_files_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    model = random_decoder("qwen2", tie_word_embeddings=False)
    write_gguf(tmp_path / "odd.gguf", model, architecture="abacus")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "text.gguf").write_text("no such thing")
    for name, words in (
        ("odd.gguf", "can't read this GGUF file.*abacus"),
        ("damaged.gguf", "can't read this GGUF file"),
        ("text.gguf", "can't read this GGUF file.*directory of safetensors"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            compile_model(tmp_path / name, ALONE)
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf does not exist"):
        compile_model(tmp_path / "absent.gguf", ALONE)


def test_a_part_of_several_is_refused(tmp_path: Path) -> None:
    model = random_decoder("qwen2", tie_word_embeddings=False)

    class Writer(gguf.GGUFWriter):  # type: ignore[misc]
        def add_vocab_size(self, size: int) -> None:
            super().add_vocab_size(size)
            self.add_uint16("split.count", 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        write_gguf(tmp_path / "part.gguf", model)
    with pytest.raises(
        UnsupportedModelError, match="one of 2 parts; join them with llama-gguf-spl"
    ):
        compile_model(tmp_path / "part.gguf", ALONE)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None if name == "gguf" else sys)
    with pytest.raises(UnsupportedModelError, match="reading GGUF needs gguf: pip install gguf;"):
        compile_model(tmp_path / "tiny.gguf", ALONE)


def test_flags_that_do_not_go_with_it(tmp_path: Path) -> None:
    for options in ({"adapter": tmp_path}, {"base": "x"}, {"revision": "main"}):
        config = CompileConfig(sparsity="none", **options)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="does not apply to a GGUF file"):
            compile_model("x.gguf", config)
    with pytest.raises(ConfigError, match="tokenizer= applies to a model in memory"):
        compile_model("x.gguf", ALONE, tokenizer=object())


@pytest.mark.parametrize("architecture", slow_but(("qwen2", "llama"), (), {"llama"}))
def test_q8_0_is_nested_without_a_change(tmp_path: Path, architecture: str) -> None:
    """Every number, in either layout, and of rows that transformers permutes. Not all groups have a
    127 among their integers.
    """

    def halve_some(data: np.ndarray) -> None:
        blocks = data.reshape(-1, 34)[::3, 2:].view(np.int8)
        blocks[:] = blocks // 2

    model = random_decoder(architecture, tie_word_embeddings=False)
    write_gguf(tmp_path / "tiny.gguf", model, "Q8_0", architecture, halve_some)
    plain = weights_of(compile_model(tmp_path / "tiny.gguf", replace(ALONE, dtype="float32")))
    config = replace(ALONE, weights="int8", sparsity="topk", measure=False)
    compiled = compile_model(tmp_path / "tiny.gguf", config)
    assert compiled.spec.model.dtype == "bfloat16"
    nested = [spec for spec in compiled.spec.weights if spec.nested]
    assert len(nested) == 2 * 7 + 2
    for spec in nested:
        assert torch.equal(unnest(compiled.weights(spec)), plain[spec.name]), spec.name
