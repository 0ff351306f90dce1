"""Log-probabilities of given tokens, beside those of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sirius_runtime import scores
from sirius_runtime.errors import GenerationError
from tests.support.fast import slow_but
from tests.support.models import MAX_SEQ_LEN, VOCABULARY, Tiny, TinyModels


def rows_of(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, VOCABULARY, length).tolist() for length in lengths]


def expected(tiny: Tiny, row: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token but the first: its log-probability, and whether it is the likeliest."""
    with torch.no_grad():
        logits = tiny.reference(torch.tensor([row])).logits[0, :-1].double()
    after = torch.tensor(row[1:])
    own = logits.log_softmax(-1).gather(1, after[:, None])[:, 0]
    return own, logits.argmax(-1) == after


@pytest.mark.parametrize(
    "model_type", slow_but(("llama", "gemma3_text", "gpt_neox"), {"llama"}, {"gemma3_text"})
)
def test_scores_are_those_of_the_dense_model(
    tiny: TinyModels, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(model_type, "griffin")
    rows = rows_of(30, 2, 17)
    for logits in (2**25, 7 * 3 * VOCABULARY):  # at once, and in chunks
        monkeypatch.setattr(scores, "_LOGITS", logits)
        for row, found in zip(rows, model.model.score(rows), strict=True):
            logprobs, greedy = expected(model, row)
            torch.testing.assert_close(
                torch.tensor(found.logprobs, dtype=torch.float64), logprobs, rtol=1e-3, atol=1e-3
            )
            assert list(found.greedy) == greedy.tolist()


def test_what_stands_before_the_start_is_not_scored(tiny: TinyModels) -> None:
    model, rows = tiny().model, rows_of(30, 12)
    whole = model.score(rows)
    part = model.score(rows, start=[20, 12])
    assert part[0].logprobs == pytest.approx(whole[0].logprobs[19:], abs=1e-4)
    assert part[1].logprobs == ()
    assert len(model.score(rows, start=5)[1].logprobs) == 7


def test_greedy_tokens_are_those_that_generate_makes(tiny: TinyModels) -> None:
    model, (row,) = tiny().model, rows_of(9)
    output = model.generate(row, mode="full", max_new_tokens=12)
    (found,) = model.score([row + list(output.tokens[0])], start=9)
    assert all(found.greedy)


def test_a_row_may_be_as_long_as_the_model_and_no_longer(tiny: TinyModels) -> None:
    model = tiny().model
    rows = rows_of(MAX_SEQ_LEN)
    assert len(model.score(rows)[0].logprobs) == MAX_SEQ_LEN - 1
    with pytest.raises(GenerationError, match=f"serves sequences of {MAX_SEQ_LEN}"):
        model.score(rows_of(MAX_SEQ_LEN + 1))


def test_wrong_starts(tiny: TinyModels) -> None:
    model = tiny().model
    with pytest.raises(GenerationError, match=r"start must be in 1..2 for row 0.*got 0"):
        model.score([[7, 8]], start=0)
    with pytest.raises(GenerationError, match=r"got 3"):
        model.score([[7, 8]], start=3)
    with pytest.raises(GenerationError, match="start has 2 numbers for 1 rows"):
        model.score([[7, 8]], start=[1, 1])
    assert model.score([7])[0].logprobs == ()
