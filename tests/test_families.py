"""Every family: logits equal to transformers' eager model, by prefill, chunks and single tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sirius_compile import CompileConfig, compile_model
from sirius_runtime import Mode, SiriusModel
from sirius_runtime.session import Backend
from tests.support.models import chain_mask

TOLERANCE = 1e-4
LENGTHS = (5, 19, 11)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Windows shorter than the sequences, and multipliers that are not one: what is special must show.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "num_hidden_layers": 7},
    "phi3": {},
    "smollm3": {"num_hidden_layers": 4},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
}


@dataclass
class Family:
    """A tiny random model of one family, and its compiled program."""

    model: PreTrainedModel
    compiled: SiriusModel

    @property
    def backend(self) -> Backend:
        return self.compiled.backend

    def reference(self, ids: list[int]) -> Tensor:
        """Logits [T, V] of transformers' eager attention, without a cache."""
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def random_model(model_type: str) -> PreTrainedModel:
    """The same on each call: what is compiled and the reference share nothing."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **FAMILIES[model_type]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    compiled = compile_model(random_model(request.param), CompileConfig(sparsity="topk"))
    return Family(random_model(request.param), compiled.to_runtime())


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(3, 101, (n,)).tolist() for n in LENGTHS]


class Caches:
    """A cache for three ragged rows, driven through the `full` and `prefill` entries."""

    def __init__(self, backend: Backend) -> None:
        state = backend.program.state
        shape = (state.layers, len(LENGTHS), state.kv_heads, 64)
        self.backend = backend
        self.k, self.v = torch.randn(*shape, state.key_dim), torch.randn(*shape, state.value_dim)
        self.length = torch.zeros(len(LENGTHS), dtype=torch.int64)

    def feed(self, ids_BT: Tensor, counts: Tensor, entry: str = "full") -> Tensor:
        """Runs one call; row b commits its first counts[b] tokens. Returns the logits."""
        slots = self.length[:, None] + torch.arange(ids_BT.shape[1])
        inputs = {
            "input_ids": ids_BT,
            "positions": slots,
            "slots": slots,
            "length": self.length,
            "tree_mask": chain_mask(ids_BT.shape[1])[None],
            "k_cache": self.k,
            "v_cache": self.v,
        }
        if entry == "prefill":
            inputs["last"] = counts - 1
        logits = self.backend.run(entry, inputs)["logits"]
        self.length = self.length + counts
        return logits


def padded(rows: list[list[int]]) -> Tensor:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_prefill_gives_the_last_logits_of_each_row(family: Family, rows: list[list[int]]) -> None:
    logits = Caches(family.backend).feed(padded(rows), torch.tensor(LENGTHS), "prefill")
    for row, tokens in enumerate(rows):
        assert_close(logits[row, 0], family.reference(tokens)[-1])


def test_one_token_steps_over_ragged_rows(family: Family, rows: list[list[int]]) -> None:
    caches = Caches(family.backend)
    caches.feed(padded([tokens[:-3] for tokens in rows]), torch.tensor(LENGTHS) - 3, "prefill")
    expected = [family.reference(tokens)[-3:] for tokens in rows]
    for step in range(3):
        ids = torch.tensor([[tokens[step - 3]] for tokens in rows])
        logits = caches.feed(ids, torch.ones(3, dtype=torch.int64))
        for row in range(len(rows)):
            assert_close(logits[row, 0], expected[row][step])


def test_chunks_over_ragged_rows(family: Family, rows: list[list[int]]) -> None:
    caches = Caches(family.backend)
    counts = torch.tensor([2, 12, 7])
    caches.feed(padded([t[:n] for t, n in zip(rows, counts, strict=True)]), counts, "prefill")
    rest = [t[n:] for t, n in zip(rows, counts, strict=True)]
    logits = caches.feed(padded(rest), torch.tensor(LENGTHS) - counts)
    for row, tokens in enumerate(rows):
        expected = family.reference(tokens)[counts[row] :]
        assert_close(logits[row, : len(rest[row])], expected)


@pytest.mark.parametrize("width", [1, 3])
def test_exact_mode_gives_transformers_greedy_tokens(
    family: Family, rows: list[list[int]], width: int
) -> None:
    output = family.compiled.generate(
        rows, mode=Mode.EXACT, period=5, tree_width=width, max_new_tokens=24, eos_token_id=[]
    )
    for tokens, row in zip(output.tokens, rows, strict=True):
        greedy = family.model.generate(
            torch.tensor([row]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(tokens) == greedy[0, len(row) :].tolist()
