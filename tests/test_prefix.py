"""Prompts that begin with what was run once: the same tokens, the same state but for rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sirius_runtime.errors import GenerationError
from sirius_runtime.prefix import shared_prefix
from sirius_runtime.sizes import PREFILL_CHUNK
from tests.support.fast import slow_but
from tests.support.models import VOCABULARY, TinyModels

MODES = ("full", "sparse", "sirius", "exact")


def rows_of(shared: int, *lengths: int) -> list[list[int]]:
    """Rows that share their first tokens."""
    generator = np.random.default_rng(0)
    prefix = generator.integers(6, VOCABULARY, shared).tolist()
    return [prefix + generator.integers(6, VOCABULARY, length).tolist() for length in lengths]


@pytest.mark.parametrize("method", slow_but(("griffin", "topk", "griffin+teal"), (), {"griffin"}))
def test_tokens_are_those_of_prompts_that_run_whole(tiny: TinyModels, method: str) -> None:
    model, rows = tiny("llama", method).model, rows_of(40, 1, 9, 23)
    prefix = model.prefix(rows[0][:40])
    for mode in MODES:
        options = {"mode": mode, "max_new_tokens": 24, "fallback": False}
        whole = model.generate(rows, **options)  # type: ignore[arg-type]
        for _ in range(2):  # it is not used up
            again = model.generate(rows, prefix=prefix, **options)  # type: ignore[arg-type]
            assert again.tokens == whole.tokens, mode
            assert again.steps == whole.steps
        alone = model.generate(rows[1], prefix=prefix, **options)  # type: ignore[arg-type]
        assert alone.tokens[0] == whole.tokens[1]


def test_refreshed_neurons_count_the_prefix_too(tiny: TinyModels) -> None:
    model, rows = tiny("llama", "griffin").model, rows_of(40, 3, 8)
    options = {"mode": "sirius", "max_new_tokens": 30, "refresh": 1, "period": 4}
    whole = model.generate(rows, **options)  # type: ignore[arg-type]
    again = model.generate(rows, prefix=model.prefix(rows[0][:40]), **options)  # type: ignore[arg-type]
    assert again.tokens == whole.tokens


def test_state_is_that_of_prompts_that_run_whole(tiny: TinyModels) -> None:
    model, rows = tiny("llama", "griffin").model, rows_of(40, 5, 12)
    prefix = model.prefix(rows[0][:40])
    whole, again = (model._open(2, 60).state for _ in range(2))
    with whole.computing():
        logits, _ = whole.prefill(rows)
        logits_again, _ = again.prefill(rows, prefix)
    torch.testing.assert_close(logits_again, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.statistic, whole.statistic, rtol=1e-4, atol=1e-4)
    for row, ids in enumerate(rows):
        for name in ("k_cache", "v_cache"):
            found, expected = (getattr(s, name)[:, row, :, : len(ids)] for s in (again, whole))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_whole_chunks_are_the_same_to_the_bit(tiny: TinyModels) -> None:
    """Where a prefix ends with a chunk, prompts run in the same chunks with it as without."""
    model = tiny("llama", "griffin", max_position_embeddings=2 * PREFILL_CHUNK).model
    (row,) = rows_of(PREFILL_CHUNK, 7)
    prefix = model.prefix(row[:PREFILL_CHUNK])
    assert prefix.passes == 1
    whole, again = (model._open(1, len(row)).state for _ in range(2))
    with whole.computing():
        logits, passes = whole.prefill([row])
        logits_again, passes_again = again.prefill([row], prefix)
    assert (passes, passes_again) == (2, 1)
    assert torch.equal(logits, logits_again)
    assert torch.equal(whole.statistic, again.statistic)
    for name in ("k_cache", "v_cache"):
        found, expected = (getattr(s, name)[..., : len(row), :] for s in (again, whole))
        assert torch.equal(found, expected)


def test_a_prompt_must_begin_with_the_prefix_and_go_on(tiny: TinyModels) -> None:
    model = tiny().model
    prefix = model.prefix([7, 8, 9])
    with pytest.raises(GenerationError, match="prompt 1 does not begin with the 3 tokens"):
        model.generate([[7, 8, 9, 10], [7, 8, 10, 9]], prefix=prefix)
    with pytest.raises(GenerationError, match="prompt 0 is equal to the prefix"):
        model.generate([7, 8, 9], prefix=prefix)
    with pytest.raises(GenerationError, match="a prefix is one prompt, got 2"):
        model.prefix([[7], [8]])


def test_shared_prefixes() -> None:
    assert shared_prefix([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]) == (1, 2)
    assert shared_prefix([[1, 2], [1, 2, 4]]) == (1,)  # a token is left of each
    assert shared_prefix([[1, 2, 3]]) == (1, 2)
    assert shared_prefix([[1], [2]]) == ()
