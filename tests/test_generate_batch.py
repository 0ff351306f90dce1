"""A row's tokens are those of a run of its own, whatever its neighbours are and do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime import state as state_module
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.decoder import Decoder
from sirius_runtime.generation import Generation
from sirius_runtime.model import FinishReason, GenerationOutput, Mode, SiriusModel
from tests.support.fast import slow_but
from tests.support.models import EVERY_METHOD, MAX_SEQ_LEN, VOCABULARY, Rows, Tiny, TinyModels

BATCH = [[7, 8, 9], [50, 30, 11, 22, 60, 71, 13, 98, 44], [33], [12, 80, 64, 25, 41]]
SEEDS = [11, 3, 200, 7]
RUNS: dict[str, dict[str, Any]] = {
    "sirius": {"mode": Mode.SIRIUS},
    "exact": {"mode": Mode.EXACT},
    "sample": {"mode": Mode.SAMPLE},
    "full": {"mode": Mode.FULL},
    "sparse": {"mode": Mode.SPARSE},
    "full drawn": {"mode": Mode.FULL, "temperature": 1.5},
    "sparse drawn": {"mode": Mode.SPARSE, "top_k": 9},
}
DRAWN = {"sample", "full drawn", "sparse drawn"}
DRAFTING = ("sirius", "exact", "sample")
FAST = {("sirius", 3), ("exact", 1), ("sample", 3)}
GATE = {("full", 1), ("sparse drawn", 1)}
runs = pytest.mark.parametrize(("run", "width"), slow_but(product(RUNS, (1, 3)), FAST, GATE))
drafting = pytest.mark.parametrize(
    ("run", "width"), slow_but(product(DRAFTING, (1, 3)), {("sirius", 3), ("sample", 1)})
)

token_ids = st.integers(6, VOCABULARY - 1)
prompts = st.lists(token_ids, min_size=1, max_size=20)


@pytest.fixture(scope="module", params=EVERY_METHOD)
def subject(request: pytest.FixtureRequest, tiny: TinyModels) -> Tiny:
    return tiny(method=request.param)


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> SiriusModel:
    return tiny(method="griffin").model


def assert_own_runs(
    model: SiriusModel, batch: Rows, seeds: Sequence[int] | None, **options: Any
) -> GenerationOutput:
    """The batch gives what each of its rows gives by itself; returns it."""
    seeded = [{} if seeds is None else {"seed": seed} for seed in seeds or batch]
    alone = [
        model.generate(prompt, **options, **own) for prompt, own in zip(batch, seeded, strict=True)
    ]
    output = model.generate(batch, **options, seed=seeds)
    assert output.tokens == tuple(run.tokens[0] for run in alone)
    assert output.finish_reasons == tuple(run.finish_reasons[0] for run in alone)
    assert output.texts == tuple(run.texts[0] for run in alone if run.texts is not None)
    stats = output.stats
    assert stats.tokens == sum(run.stats.tokens for run in alone)
    assert stats.periods == sum(run.stats.periods for run in alone)
    assert stats.corrections == sum(run.stats.corrections for run in alone)
    assert stats.advances == sum((Counter(run.stats.advances) for run in alone), Counter())
    return output


def ragged_ends(model: SiriusModel, **options: Any) -> list[int]:
    """EOS ids that end the first row of `BATCH` early, one of the next two later, the last not."""
    tokens = model.generate(BATCH, eos_token_id=[], **options).tokens
    last = set(tokens[3])
    early = next(token for token in tokens[0][2:] if token not in last)
    late = next(token for token in tokens[2][8:] + tokens[1][8:] if token not in last)
    return [early, late]


def assert_ragged_runs(model: SiriusModel, run: str, **options: Any) -> None:
    seeds = SEEDS if run in DRAWN else None
    options |= {"max_new_tokens": 18, **RUNS[run]}
    eos = ragged_ends(model, seed=seeds, **options)
    output = assert_own_runs(model, BATCH, seeds, eos_token_id=eos, **options)
    assert output.finish_reasons[0] is FinishReason.EOS
    assert output.finish_reasons[3] is FinishReason.LENGTH
    assert len(set(map(len, output.tokens))) > 1


@runs
def test_rows_that_end_one_by_one_are_their_own_runs(subject: Tiny, run: str, width: int) -> None:
    assert_ragged_runs(subject.model, run, period=5, tree_width=width)


@drafting
def test_rows_that_stop_drafting_are_their_own_runs(subject: Tiny, run: str, width: int) -> None:
    """Where a row is no longer confident the others draft on, and some of it is for nothing."""
    assert_ragged_runs(subject.model, run, period=7, tree_width=width, confidence=0.6)


@drafting
def test_rows_that_choose_neurons_anew_are_their_own_runs(
    model: SiriusModel, run: str, width: int
) -> None:
    assert_ragged_runs(model, run, period=5, tree_width=width, refresh=2)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A batch, its seeds where they are used, and the options of its run."""
    batch = draw(st.lists(prompts, min_size=2, max_size=5))
    run = draw(st.sampled_from(list(RUNS)))
    seed = st.lists(st.integers(0, 2**40), min_size=len(batch), max_size=len(batch))
    return {
        "batch": batch,
        "seeds": draw(seed) if run in DRAWN else None,
        "period": draw(st.integers(1, 9)),
        "tree_width": draw(st.integers(1, 5)),
        "threshold": draw(st.sampled_from([0.0, 0.1, 0.3])),
        "confidence": draw(st.sampled_from([0.0, 0.3, 0.9])),
        "max_new_tokens": draw(st.integers(1, 20)),
        # Many EOS ids: rows end all the time.
        "eos_token_id": draw(st.lists(token_ids, max_size=12)),
        **RUNS[run],
    }


@given(requests())
def test_rows_of_a_batch_are_their_own_runs(subject: Tiny, request_: dict[str, Any]) -> None:
    assert_own_runs(subject.model, **request_)


@given(requests(), st.integers(1, 4))
def test_rows_of_a_batch_are_their_own_runs_with_neurons_chosen_anew(
    model: SiriusModel, request_: dict[str, Any], refresh: int
) -> None:
    assert_own_runs(model, **request_, refresh=refresh)


@runs
def test_rows_near_the_length_limit_are_their_own_runs(
    model: SiriusModel, run: str, width: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    batch = [
        torch.randint(6, VOCABULARY, (size,), generator=generator).tolist()
        for size in (MAX_SEQ_LEN - 20, MAX_SEQ_LEN - 33, 2)
    ]
    options = {"period": 8, "tree_width": width, "max_new_tokens": 20, **RUNS[run]}
    seeds = SEEDS[:3] if run in DRAWN else None
    output = assert_own_runs(model, batch, seeds, eos_token_id=[], **options)
    assert set(map(len, output.tokens)) == {20}


@pytest.mark.parametrize("run", slow_but(RUNS, {"exact", "sample", "sparse"}))
def test_a_longer_neighbour_changes_nothing(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    """Its prompt takes chunks that the others have no part in."""
    monkeypatch.setattr(state_module, "PREFILL_CHUNK", 2)
    seeds = SEEDS if run in DRAWN else None
    assert_own_runs(model, BATCH, seeds, period=4, max_new_tokens=8, eos_token_id=[], **RUNS[run])


def test_order_of_rows_changes_nothing(model: SiriusModel) -> None:
    options: dict[str, Any] = {"mode": "sample", "tree_width": 2, "max_new_tokens": 12}
    forth = model.generate(BATCH, seed=SEEDS, **options)
    back = model.generate(BATCH[::-1], seed=SEEDS[::-1], **options)
    assert back.tokens == forth.tokens[::-1]


def test_a_prompt_twice_is_two_rows(model: SiriusModel) -> None:
    greedy = model.generate([BATCH[0]] * 3, max_new_tokens=12, tree_width=2)
    assert len(set(greedy.tokens)) == 1
    drawn = model.generate([BATCH[0]] * 3, mode="sample", seed=0, max_new_tokens=12)
    assert len(set(drawn.tokens)) == 3


# padding


def padded(rows: Rows, side: str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, padded by token 0."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where] = torch.tensor(row)
        mask[index, where] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("run", "width"), slow_but(product(RUNS, (1, 3)), {("exact", 3), ("full drawn", 1)})
)
def test_padded_tensors(model: SiriusModel, run: str, width: int, side: str) -> None:
    ids, mask = padded(BATCH, side)
    options = {"tree_width": width, "max_new_tokens": 10, **RUNS[run]}
    if run in DRAWN:
        options["seed"] = SEEDS
    output = model.generate(ids, attention_mask=mask, **options)
    assert output.prompts == tuple(map(tuple, BATCH))
    assert output.tokens == model.generate(BATCH, **options).tokens


# rows that leave


class Watch:
    """Counts the rows of each call of the back end, and those of them that are still live."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.live = 0
        run, set_active, select = EagerBackend.run, Decoder.set_active, Decoder.select

        def spy_run(
            backend: EagerBackend, entry: str, inputs: Mapping[str, Tensor]
        ) -> dict[str, Tensor]:
            rows = inputs["input_ids"].shape[0]
            # Nothing that a call is given is larger than its rows: memory is given back too.
            assert inputs["k_cache"].shape[1] == inputs["v_cache"].shape[1] == rows
            assert inputs["length"].shape == (rows,)
            if "neurons" in inputs:
                assert inputs["neurons"].shape[1] == rows
            self.calls.append((entry, rows, self.live if entry != "prefill" else rows))
            return run(backend, entry, inputs)

        def spy_active(decoder: Decoder, active: Sequence[bool]) -> None:
            set_active(decoder, active)
            self.live = sum(active)

        def spy_select(decoder: Decoder, rows: Sequence[int]) -> None:
            select(decoder, rows)
            assert decoder.state.active.all()

        monkeypatch.setattr(EagerBackend, "run", spy_run)
        monkeypatch.setattr(Decoder, "set_active", spy_active)
        monkeypatch.setattr(Decoder, "select", spy_select)


@runs
def test_finished_rows_leave_the_session(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch, run: str, width: int
) -> None:
    generator = torch.Generator().manual_seed(4)
    batch = torch.randint(6, VOCABULARY, (12, 5), generator=generator).tolist()
    options: dict[str, Any] = {"period": 3, "tree_width": width, "max_new_tokens": 40, **RUNS[run]}
    if run in DRAWN:
        options["seed"] = 9
    ends = torch.randperm(VOCABULARY, generator=generator)[:8].tolist()
    watch = Watch(monkeypatch)
    watch.live = len(batch)
    output = model.generate(batch, eos_token_id=ends, **options)
    assert len({len(tokens) for tokens in output.tokens}) > 3
    assert all(live <= rows <= 2 * live for _, rows, live in watch.calls)
    assert len({rows for _, rows, _ in watch.calls}) > 2  # more than once some left
    # Copies have a cost: none leave before half of them may.
    held = [rows for _, rows, _ in watch.calls]
    assert all(after == before or 2 * after <= before for before, after in pairwise(held))


def test_rows_that_left_change_nothing(subject: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same batch of which no row may leave."""
    generator = torch.Generator().manual_seed(5)
    batch = torch.randint(6, VOCABULARY, (9, 4), generator=generator).tolist()
    ends = torch.randperm(VOCABULARY, generator=generator)[:8].tolist()
    options: dict[str, Any] = {"period": 4, "max_new_tokens": 40, "eos_token_id": ends}
    for run in (RUNS["sirius"], RUNS["sample"] | {"seed": 1}, RUNS["sparse"]):
        left = subject.model.generate(batch, **run, **options)
        with monkeypatch.context() as patch:
            patch.setattr(Generation, "_leave_out_finished", lambda _: None)
            stayed = subject.model.generate(batch, **run, **options)
        assert left.tokens == stayed.tokens
        assert left.finish_reasons == stayed.finish_reasons
        assert left.stats.advances == stayed.stats.advances
        assert left.stats.aal == stayed.stats.aal
        assert left.stats.density == pytest.approx(stayed.stats.density, rel=1e-12)
