"""Writes a transformers Llama as GGUF and decodes it greedily with llama.cpp, as a baseline.

Needs the packages `gguf` and `llama-cpp-python` (`pip install --group bench`); `available` returns
whether they are installed. The file holds the same weights in the same dtype and no tokenizer:
inputs and outputs are token ids.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a process that only decodes does without these
    from torch import Tensor
    from transformers import LlamaForCausalLM

BATCH = 512
"""Tokens of a prompt that llama.cpp takes at once, as its own default."""
DRAFT_MOST, DRAFT_LEAST = 16, 0.75
"""llama.cpp's defaults of a draft: its tokens at most, and the least probability of each."""


def available() -> bool:
    """Whether both packages are installed."""
    return all(importlib.util.find_spec(name) for name in ("gguf", "llama_cpp"))


def write_gguf(model: LlamaForCausalLM, path: Path, quantised: str | None = None) -> None:
    """Writes a Llama; matrices in the model's dtype, or `quantised` by gguf's own rules (``Q8_0``,
    ``Q4_0``); vectors in float32 (llama.cpp's own layout).

    llama.cpp's rotary embedding rotates pairs of neighbouring channels, transformers' rotates
    halves. So the rows of q and k are reordered, which changes no product.
    """
    import gguf
    import torch

    config = model.config
    dtype = next(model.parameters()).dtype
    kinds = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    }
    kind, file_type = kinds[dtype]
    if quantised is not None:
        kind = gguf.GGMLQuantizationType[quantised]
        file_type = gguf.LlamaFileType[f"MOSTLY_{quantised}"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(model):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
        elif quantised is not None:
            raw = gguf.quants.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
        elif dtype is torch.bfloat16:  # numpy has no such type
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Each weight by llama.cpp's name; a tied head is stored once, as the embedding."""
    config = model.config
    yield "token_embd.weight", model.model.embed_tokens.weight.detach()
    yield "output_norm.weight", model.model.norm.weight.detach()
    if not config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight.detach()
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        named = {
            "attn_norm": layer.input_layernorm,
            "attn_v": attention.v_proj,
            "attn_output": attention.o_proj,
            "ffn_norm": layer.post_attention_layernorm,
            "ffn_gate": mlp.gate_proj,
            "ffn_up": mlp.up_proj,
            "ffn_down": mlp.down_proj,
        }
        for name, module in named.items():
            yield f"blk.{index}.{name}.weight", module.weight.detach()
        for name, module, heads in (
            ("attn_q", attention.q_proj, config.num_attention_heads),
            ("attn_k", attention.k_proj, config.num_key_value_heads),
        ):
            yield f"blk.{index}.{name}.weight", _neighbours(module.weight.detach(), heads)


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head's two halves, interleaved."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


class LlamaCpp:
    """A GGUF model in llama.cpp, one sequence at a time, greedily."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        import llama_cpp

        self._api = api = llama_cpp
        _quiet(api)
        api.llama_backend_init()
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(str(path).encode(), options)
        settings = api.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp can't load {path}")
        self._size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self.length = 0
        """Tokens in the KV cache."""

    def step(self, tokens: Sequence[int]) -> int:
        """Appends tokens; returns the likeliest next one."""
        return int(self.logits(tokens)[-1].argmax())

    def logits(self, tokens: Sequence[int], *, of_each: bool = False) -> np.ndarray:
        """Appends tokens; returns the logits [1, V] after the last, or [tokens, V] `of_each`."""
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            array = (self._api.llama_token * len(part))(*part)
            batch = self._api.llama_batch_get_one(array, len(part))
            if of_each:
                batch.logits = (ctypes.c_int8 * len(part))(*[1] * len(part))
            if self._api.llama_decode(self._context, batch):
                raise RuntimeError("llama.cpp could not decode")
            self.length += len(part)
        rows = range(len(tokens)) if of_each else (-1,)
        return np.stack(
            [
                np.ctypeslib.as_array(
                    self._api.llama_get_logits_ith(self._context, row), (self._size,)
                )
                for row in rows
            ]
        )

    def keep(self, length: int) -> None:
        """Keeps the first `length` tokens of the KV cache."""
        memory = self._api.llama_get_memory(self._context)
        self._api.llama_memory_seq_rm(memory, 0, length, -1)
        self.length = length

    def close(self) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


def greedy(
    target: LlamaCpp, prompt: Sequence[int], new_tokens: int, eos: Collection[int]
) -> tuple[list[int], float]:
    """Greedy tokens after a prompt, and the seconds that all but the first one took."""
    target.keep(0)
    tokens = [target.step(prompt)]
    begin = time.perf_counter()
    while len(tokens) < new_tokens and tokens[-1] not in eos:
        tokens.append(target.step(tokens[-1:]))
    return tokens, time.perf_counter() - begin


def speculative(
    target: LlamaCpp,
    draft: LlamaCpp,
    prompt: Sequence[int],
    new_tokens: int,
    eos: Collection[int],
) -> tuple[list[int], float]:
    """As `greedy`, by llama.cpp's speculative decoding: the model `draft` proposes up to
    `DRAFT_MOST` tokens and stops before one below `DRAFT_LEAST`; `target` scores them in one batch.
    """
    for model in (target, draft):
        model.keep(0)
    text = [*prompt, target.step(prompt)]
    draft.step(prompt)
    begin, end = time.perf_counter(), len(prompt) + new_tokens
    while len(text) < end and text[-1] not in eos:
        guesses, pending = list[int](), text[draft.length :]
        while len(guesses) < min(DRAFT_MOST, end - len(text) - 1):
            token, chance = _likeliest(draft.logits(pending)[-1])
            if chance < DRAFT_LEAST:
                break
            guesses.append(token)
            pending = [token]
        choices = target.logits([text[-1], *guesses], of_each=True).argmax(-1).tolist()
        accepted = 0
        while accepted < len(guesses) and choices[accepted] == guesses[accepted]:
            accepted += 1
        known = len(text) + accepted
        for model in (target, draft):
            model.keep(min(model.length, known))
        for token in choices[: accepted + 1]:
            text.append(token)
            if token in eos:
                break
    return text[len(prompt) :], time.perf_counter() - begin


def _likeliest(logits: np.ndarray) -> tuple[int, float]:
    """The likeliest token, and its probability among the ten likeliest, as llama.cpp drafts."""
    first = np.partition(logits, -10)[-10:]
    return int(logits.argmax()), float(1 / np.exp(first - first.max()).sum())


def _quiet(api: object) -> None:
    """Discards llama.cpp's log; the callback must live as long as the library."""

    @api.llama_log_callback  # type: ignore[attr-defined]
    def ignore(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        pass

    _KEPT.append(ignore)
    api.llama_log_set(ignore, ctypes.c_void_p())  # type: ignore[attr-defined]


_KEPT: list[object] = []
