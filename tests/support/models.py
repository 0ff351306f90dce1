"""Tiny random decoders, compiled in memory, beside the transformers model that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from sirius_runtime.model import SiriusModel
from sirius_runtime.spec import Method
from tests.support.batch import Batch
from tests.support.fast import slow_but
from tests.support.naive import tree_mask

VOCABULARY = 101
MAX_SEQ_LEN = 128
EOS = (2, 5)
METHODS = ("griffin", "topk", "cats", "teal", "griffin+teal", "none")
EVERY_METHOD = slow_but(METHODS, {"topk", "griffin+teal"})
"""As a test's cases. The fast suite takes one that ranks, and one that has all else: a choice for
the prompt, and thresholds of neurons and of channels.
"""
SMALL: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MAX_SEQ_LEN,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": list(EOS),
}

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Tiny:
    """A transformers model, the same compiled, and that ready to generate."""

    reference: PreTrainedModel
    compiled: Compiled
    model: SiriusModel

    def __repr__(self) -> str:
        """Short: hypothesis prints what a failing example was given."""
        model, sparsity = self.compiled.spec.model, self.compiled.spec.sparsity
        return f"<tiny {model.model_type}, {sparsity.method} {sparsity.keep}>"

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """The new tokens of transformers' own greedy `generate`, up to an EOS token."""
        with torch.no_grad():
            output = self.reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                do_sample=False,
                max_new_tokens=new_tokens,
            )
        return tuple(output[0, len(prompt) :].tolist())


class TinyModels:
    """Makes a `Tiny`, once for each set of arguments.

    Without the graph of a whole period, which takes most of a tiny model's compilation; tests of
    that graph compile models of their own.
    """

    def __init__(self, calibration: Path) -> None:
        """`calibration`: text for `cats`, in the words of `word_tokenizer`."""
        self._calibration = calibration
        self._made: dict[object, Tiny] = {}

    def __call__(
        self,
        model_type: str = "llama",
        method: Method | str = "topk",
        keep: float = 0.5,
        **config: object,
    ) -> Tiny:
        keep = 1.0 if method == Method.NONE else keep
        key = (model_type, str(method), keep, repr(sorted(config.items())))
        if key not in self._made:
            options = CompileConfig(
                sparsity=method, keep=keep, calibration=self._calibration, graphs="entries"
            )
            model = random_decoder(model_type, **config)
            compiled = compile_model(model, options, tokenizer=word_tokenizer())
            # A model of its own: the reference is transformers' alone.
            reference = random_decoder(model_type, **config)
            self._made[key] = Tiny(reference, compiled, compiled.to_runtime())
        return self._made[key]


def random_decoder(model_type: str, **config: object) -> PreTrainedModel:
    """A decoder of random weights, the same on each call, in float32.

    They are large enough that its text varies, that the head is often sure of a token, and that
    what the sparse path leaves out changes many tokens.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**SMALL, **config}), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(6)
        model.get_output_embeddings().weight.mul_(4)
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token id: ``w7`` is 7; pad, bos and the EOS ids are special tokens."""
    special = {0: "<pad>", 1: "<s>", **{token: f"</s{token}>" for token in EOS}}
    words = {special.get(token, f"w{token}"): token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def write_calibration(path: Path, words: int = 512) -> Path:
    """Writes a text of random words for `word_tokenizer`; returns `path`."""
    tokens = torch.randint(6, VOCABULARY, (words,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"w{token}" for token in tokens.tolist()))
    return path


def open_session(
    model: SiriusModel, rows: int, capacity: int = 2 * MAX_SEQ_LEN, *, refresh: int = 0
) -> Batch:
    """A fresh batch over the model's back end; by default with room for large trees."""
    return Batch(model.backend, rows, capacity, refresh=refresh)


def state_of(batch: Batch) -> dict[str, Tensor]:
    """The caches, and `neurons` where there are some; by name of the entries' inputs."""
    names = ("k_cache", "v_cache", "neurons")
    return {name: value for name, value in batch.tensors.items() if name in names}


@st.composite
def trees(draw: st.DrawFn, most: int = 8) -> list[int]:
    """The parent of each node, one of the three before it: deep trees; -1 for the root."""
    size = draw(st.integers(1, most))
    return [-1] + [draw(st.integers(max(0, node - 3), node - 1)) for node in range(1, size)]


def chain_mask(size: int) -> Tensor:
    """[T, T], as `naive.tree_mask`, of a tree without branches."""
    return tree_mask(range(-1, size - 1))


class TreeRun:
    """Prompts in the cache, and blocks of tokens after them that leave the batch as it was."""

    def __init__(self, model: SiriusModel, batch: Rows) -> None:
        self._backend = model.backend
        self.session = open_session(model, len(batch))
        self.session.prefill(batch)
        self._length = self.session.state.length
        self._state = {name: tensor.clone() for name, tensor in state_of(self.session).items()}

    def copy(self) -> dict[str, Tensor]:
        """The state after the prompts, for `run` to write to."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def run(
        self,
        entry: str,
        ids_BT: Tensor,
        nodes: Sequence[int],
        mask_NN: Tensor,
        state: dict[str, Tensor],
    ) -> Tensor:
        """Logits [B, T, V] of some `nodes` of a tree; writes their K/V to `state`."""
        slots = self._length[:, None] + torch.tensor(nodes)
        depth = (mask_NN >= 0).sum(1) - 1
        known = {
            "input_ids": ids_BT,
            "slots": slots,
            "positions": self._length[:, None] + depth[list(nodes)],
            "length": self._length,
            "tree_mask": mask_NN[list(nodes)][None],
            **state,
        }
        uses = self._backend.program.entry(entry).inputs
        return self._backend.run(entry, {i.name: known[i.name] for i in uses})["logits"]


def bound_weights(model: SiriusModel, entry: str) -> dict[str, Tensor]:
    """The very tensors that an entry of the eager back end reads as weights, by name; views of them
    by their own.
    """
    bound = model.backend._entries[entry]  # type: ignore[attr-defined]
    nodes = [node for node in bound.module.graph.nodes if node.op == "placeholder"]
    pairs = zip(nodes, bound.bound, strict=True)
    return {
        node.meta.get("weight", node.name): tensor for node, tensor in pairs if tensor is not None
    }
