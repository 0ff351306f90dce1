"""Writes a transformers Llama as GGUF and decodes it greedily with llama.cpp, as a baseline.

Needs the packages `gguf` and `llama-cpp-python` (`pip install --group bench`); `available` returns
whether they are installed. The file holds the same weights in the same dtype and no tokenizer:
inputs and outputs are token ids.
"""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Collection, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from sirius_runtime.errors import ConfigError

BATCH = 512
"""Tokens of a prompt that llama.cpp takes at once, as its own default."""


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

    def generate(self, prompt: Sequence[int], new_tokens: int, eos: int | None) -> list[int]:
        """Greedy tokens after a prompt, up to `eos`."""
        self.clear()
        tokens = [self.step(prompt)]
        while len(tokens) < new_tokens and tokens[-1] != eos:
            tokens.append(self.step(tokens[-1:]))
        return tokens

    def step(self, tokens: Sequence[int]) -> int:
        """Appends tokens; returns the likeliest next one."""
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            array = (self._api.llama_token * len(part))(*part)
            if self._api.llama_decode(
                self._context, self._api.llama_batch_get_one(array, len(part))
            ):
                raise RuntimeError("llama.cpp could not decode")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._size,)).argmax())

    def clear(self) -> None:
        """Clears the cache."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def forget(self, count: int, length: int) -> None:
        """Drops the last `count` of `length` tokens from the cache."""
        memory = self._api.llama_get_memory(self._context)
        self._api.llama_memory_seq_rm(memory, 0, length - count, length)

    def close(self) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


class OwnProcess:
    """A GGUF model in llama.cpp, in a process of its own, with its threads as it likes them: asleep
    between operators (OMP_WAIT_POLICY=passive, which is right for ours) they cost it up to 17%.
    """

    def __init__(self, path: Path, context: int, threads: int) -> None:
        """Raises ConfigError without the package, or the file."""
        if not available():
            raise ConfigError("llama.cpp is not installed: pip install --group bench")
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file; give the path of a GGUF model")
        policy = os.environ.pop("OMP_WAIT_POLICY", None)
        methods = multiprocessing.get_context("spawn")
        self._ours, theirs = methods.Pipe()
        try:
            methods.Process(
                target=_serve, args=(theirs, path, context, threads), daemon=True
            ).start()
        finally:
            if policy is not None:
                os.environ["OMP_WAIT_POLICY"] = policy

    def generate(
        self, prompt: Sequence[int], new_tokens: int, eos: Collection[int]
    ) -> tuple[list[int], float]:
        """Greedy tokens after a prompt, and the seconds that all but the first one took."""
        self._ours.send((list(prompt), new_tokens, set(eos)))
        tokens, seconds = self._ours.recv()
        return tokens, seconds


def _serve(pipe: Connection, path: Path, context: int, threads: int) -> None:
    peer = LlamaCpp(path, context, threads)
    while True:
        try:
            prompt, new_tokens, eos = pipe.recv()
        except EOFError:
            return
        peer.clear()
        tokens = [peer.step(prompt)]
        begin = time.perf_counter()
        while len(tokens) < new_tokens and tokens[-1] not in eos:
            tokens.append(peer.step(tokens[-1:]))
        pipe.send((tokens, time.perf_counter() - begin))


def _quiet(api: object) -> None:
    """Discards llama.cpp's log; the callback must live as long as the library."""

    @api.llama_log_callback  # type: ignore[attr-defined]
    def ignore(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        pass

    _KEPT.append(ignore)
    api.llama_log_set(ignore, ctypes.c_void_p())  # type: ignore[attr-defined]


_KEPT: list[object] = []
