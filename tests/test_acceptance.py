"""Measured acceptance: periods of hand-made drafts, and drafts compared with single steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sirius_compile.acceptance import (
    Drafts,
    acceptance_spec,
    best_drafting,
    interval,
    measure_drafts,
)
from sirius_compile.pipeline import Thresholds
from sirius_compile.texts import Sample
from sirius_compile.tokenwise import Tokenwise
from sirius_compile.writing import Text, run, write
from sirius_passes.sparsify import Threshold
from sirius_runtime.spec import Method
from sirius_runtime.tensor_state import TensorState
from tests.support.fast import slow_but
from tests.support.paths import tokenwise

R, T_V = 0.1, 0.6
THRESHOLDS = {
    Method.TOPK: None,
    Method.GRIFFIN: None,
    Method.CATS: Thresholds((Threshold(0.3, 0.5),) * 2),
    Method.TEAL: Thresholds((), (Threshold(0.4, 0.5),) * 14),
}


def drafts(accepted: list[list[int]], confidence: list[list[float]], density: float) -> Drafts:
    passed = torch.tensor(accepted, dtype=torch.bool)
    texts = torch.arange(len(accepted))
    return Drafts(passed, passed, torch.tensor(confidence), texts, density)


# periods


def test_a_period_advances_by_its_leading_accepted_tokens_and_one_more() -> None:
    found = drafts([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]], [[1.0] * 4] * 3, 0.5)
    period = found.period(5)
    assert period.advances.tolist() == [3, 5, 1]
    assert period.steps.tolist() == [4, 4, 4]
    assert period.aal == pytest.approx(3)
    # ((k - 1) d + 1) / AAL
    assert period.effective == pytest.approx((4 * 0.5 + 1) / 3)
    assert found.period(2).advances.tolist() == [2, 2, 1]


def test_a_draft_stops_after_the_level_that_falls_below() -> None:
    found = drafts([[1, 1, 1, 1]] * 2, [[0.9, 0.6, 0.4, 0.1], [0.3, 0.2, 0.1, 0.0]], 0.5)
    period = found.period(5, confidence=0.5)
    assert period.steps.tolist() == [3, 1]
    assert period.advances.tolist() == [4, 2]
    assert period.effective == pytest.approx((4 * 0.5 + 2) / 6)
    assert found.period(3, confidence=0.5).steps.tolist() == [2, 1]


def test_the_best_has_the_fewest_reads_a_token() -> None:
    """The first two tokens always pass and the third never; the sparse path knows."""
    found = drafts([[1, 1, 0, 0]] * 4, [[0.9, 0.8, 0.01, 0.0]] * 4, 0.4)
    assert best_drafting(found).period == 3
    assert best_drafting(found).effective == pytest.approx(1.8 / 3)
    assert best_drafting(found, periods=[16]).period == 5  # no longer than what was drafted
    assert best_drafting(found, periods=[5], confidences=[0.0]).effective == pytest.approx(2.6 / 3)
    spec = acceptance_spec(found, threshold=R, temperature=T_V)
    assert spec.accepted == (1.0, 1.0, 0.0, 0.0)
    assert [one.period for one in spec.periods] == [2, 3, 4, 5]
    assert spec.best.effective_density == min(one.effective_density for one in spec.periods)


def test_an_interval_holds_the_figure_and_is_a_point_where_texts_are_alike() -> None:
    mixed = drafts([[1, 1, 1]] * 20 + [[0, 1, 1]] * 20, [[1.0] * 3] * 40, 0.5)
    low, high = interval(mixed, lambda d: d.period(4).aal)
    assert low < mixed.period(4).aal < high
    assert 1.5 < low < high < 3.5
    alike = drafts([[1, 0, 1]] * 5, [[1.0] * 3] * 5, 0.5)
    assert interval(alike, lambda d: d.period(4).aal) == (2.0, 2.0)


# drafts


@torch.inference_mode()
def states_draft(path: Tokenwise, sample: Sample, root: int, size: int) -> tuple[Tensor, Tensor]:
    """Sparse logits [size, V] token by token after the full path's history, and the full path's."""
    state = TensorState(path.backend, 1, len(sample) + size)
    state.prefill([sample.tokens[: sample.prompt]])
    state.choose_neurons()
    state.prefill([sample.tokens[:root]])
    logits: dict[str, list[Tensor]] = {"sparse": [], "full": []}
    for entry, found in logits.items():
        state.length = torch.tensor([root])
        for token in sample.tokens[root : root + size]:
            state.root = torch.tensor([token])
            found.append(state.step(entry)["logits"][0, 0])
            state.commit(1, state.root)
    return torch.stack(logits["sparse"]), torch.stack(logits["full"])


@pytest.mark.parametrize("method", slow_but(THRESHOLDS, {Method.GRIFFIN, Method.TEAL}))
def test_drafts_are_those_of_steps_that_are_fed_the_text(method: Method) -> None:
    path = tokenwise(method, thresholds=THRESHOLDS[method])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 100, (3, 34), generator=generator).tolist()
    samples = tuple(Sample(tuple(row), 10) for row in ids)
    found = measure_drafts(path, Text(samples), threshold=R, temperature=T_V)
    assert found is not None
    assert found.accepted.shape == (6, 15)  # roots at 9 and 17 of each
    place = 0
    for sample in samples:
        for root in (9, 17):
            sparse, full = states_draft(path, sample, root, 15)
            proposed = sparse.argmax(-1)
            p = (full / T_V).softmax(-1).gather(-1, proposed[:, None])[:, 0]
            assert found.accepted[place].tolist() == (p >= R).tolist()
            assert found.exact[place].tolist() == (proposed == full.argmax(-1)).tolist()
            sure = (sparse / T_V).softmax(-1).amax(-1).cumprod(0)
            torch.testing.assert_close(found.confidence[place], sure, rtol=1e-3, atol=1e-4)
            place += 1
    assert bool(found.accepted.any())
    assert not bool(found.accepted.all())
    if method.has_thresholds:
        assert 0.0 < found.density < 1.0


def test_a_path_that_skips_nothing_is_accepted_whole() -> None:
    path = tokenwise(Method.TOPK, keep=1.0)
    text = Text(tuple(Sample(tuple(range(6 + row, 46 + row)), 8) for row in range(4)))
    found = measure_drafts(path, text, threshold=R, temperature=T_V)
    assert found is not None
    assert bool(found.exact.all())


def test_too_short_text_is_not_measured() -> None:
    path = tokenwise(Method.TOPK)
    text = Text((Sample(tuple(range(6, 20)), 13),))
    assert measure_drafts(path, text, threshold=R, temperature=T_V) is None


# text that the model writes


def test_what_is_written_is_the_full_path_s_greedy_continuation() -> None:
    path = tokenwise(Method.TEAL)
    prompts = [[7 + row, 8, 9, 10 + row] for row in range(8)]
    used, held = write(path, prompts)
    assert [len(text.samples) for text in (used, held)] == [6, 2]
    samples = {sample.tokens[: sample.prompt]: sample for t in (used, held) for sample in t.samples}
    for prompt in prompts:
        sample = samples[tuple(prompt)]
        logits = path.full(torch.tensor([sample.tokens]))[0, sample.prompt - 1 : -1]
        assert logits.argmax(-1).tolist() == list(sample.tokens[sample.prompt :])


def test_every_second_text_is_held_out_and_serves_any_share_of_neurons() -> None:
    """A search writes once, and a path that keeps fewer neurons selects them of the same text."""
    path, fewer = tokenwise(Method.GRIFFIN), tokenwise(Method.GRIFFIN, keep=0.25)
    prompts = [[7 + row, 8, 9, 10 + row] for row in range(6)]
    used, held = write(path, prompts, every=2, new_tokens=40)
    for text, expected in ((used, prompts[::2]), (held, prompts[1::2])):
        assert [list(prompt) for prompt in text.prompts(range(3))] == expected
        found, selected = text.neurons_for(fewer, [2, 0]), fewer.neurons([expected[2], expected[0]])
        assert found is not None
        assert selected is not None
        assert torch.equal(found, selected)


def test_what_was_written_is_not_computed_again_and_is_the_same() -> None:
    """K/V and logits of decoding equal those of one run over the whole text."""
    path = tokenwise(Method.CATS)
    _, held = write(path, [[7 + row, 8, 9, 10 + row] for row in range(8)])
    assert held.caches is not None
    assert held.logits is not None
    again = list(run(path, Text(held.samples)))
    for row, sample in enumerate(held.samples):
        (part, place) = next((p, p.samples.index(sample)) for p in again if sample in p.samples)
        assert part.caches is not None
        assert part.logits is not None
        new = len(sample) - sample.prompt
        torch.testing.assert_close(
            held.logits[row, :new], part.logits[place, :new], rtol=1e-3, atol=1e-3
        )
        for one, other in zip(held.caches, part.caches, strict=True):
            last = len(sample) - 1  # the last token's is not there: it was never run
            torch.testing.assert_close(
                one[:, row, :, :last], other[:, place, :, :last], rtol=1e-3, atol=1e-3
            )
