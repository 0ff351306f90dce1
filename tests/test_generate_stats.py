"""What `generate` says of a run: counts against a replay of its periods; host reads, counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.by_entries import ByEntries, TreeState
from sirius_runtime.decoder import Decoder, Way
from sirius_runtime.model import Mode, SiriusModel
from sirius_runtime.ops.attention import cached_attention
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Draft, Verdict
from sirius_runtime.rules import RULES
from sirius_runtime.stats import GenerationStats, Phase, PhaseClock
from tests.support.fast import slow_but
from tests.support.models import EVERY_METHOD, METHODS, VOCABULARY, Rows, TinyModels, open_session

PROMPT = [7, 8, 9]

token_ids = st.integers(6, VOCABULARY - 1)
batches = st.lists(st.lists(token_ids, min_size=1, max_size=9), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> SiriusModel:
    return tiny(method="griffin").model


Period = tuple[int, int]
"""Levels drafted, and tokens committed."""


def replay(
    model: SiriusModel, batch: Rows, **options: Any
) -> tuple[GenerationStats, list[list[Period]]]:
    """A run that no EOS ends: its stats, and each row's periods."""
    rows: list[list[Period]] = [[] for _ in batch]
    held = rows  # those of the rows that the decoder still holds
    commit, select = ByEntries.commit, Decoder.select

    def spy_commit(
        self: ByEntries, state: TreeState, draft: Draft, *args: Any
    ) -> tuple[Tensor, Verdict]:
        active = state.active.tolist()
        logits, verdict = commit(self, state, draft, *args)
        periods = zip(draft.depth.tolist(), verdict.advance.tolist(), strict=True)
        for row, going, period in zip(held, active, periods, strict=True):
            if going:
                row.append(period)
        return logits, verdict

    def spy_select(decoder: Decoder, kept: Sequence[int]) -> None:
        nonlocal held
        select(decoder, kept)
        held = [held[index] for index in kept]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ByEntries, "commit", spy_commit)
        patch.setattr(Decoder, "select", spy_select)
        stats = model.generate(batch, eos_token_id=[], **options).stats
    return stats, rows


@given(
    batches,
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 25),
    st.sampled_from([0.0, 0.1, 0.3, 2.0]),
    st.sampled_from([0.0, 0.4]),
)
def test_counts_are_those_of_the_periods(
    model: SiriusModel,
    batch: Rows,
    period: int,
    width: int,
    new_tokens: int,
    threshold: float,
    confidence: float,
) -> None:
    stats, rows = replay(
        model,
        batch,
        period=period,
        tree_width=width,
        max_new_tokens=new_tokens,
        threshold=threshold,
        confidence=confidence,
    )
    every = [entry for row in rows for entry in row]
    counted = [entry for row in rows for entry in row[:-1]]
    assert stats.rows == len(batch)
    assert stats.prompt_tokens == sum(map(len, batch))
    assert stats.tokens == len(batch) * new_tokens
    assert stats.periods == len(every) == sum(stats.advances.values())
    assert stats.advances == Counter(advance for _, advance in every)
    assert stats.tokens == len(batch) + sum(a * n for a, n in stats.advances.items())
    assert stats.corrections == sum(advance < levels + 1 for levels, advance in every)
    drafted = sum(levels for levels, _ in every)
    if drafted:
        assert stats.acceptance_rate == sum(advance - 1 for _, advance in every) / drafted
    else:
        assert stats.acceptance_rate is None
    if counted:
        committed = sum(advance for _, advance in counted)
        assert stats.aal == committed / len(counted)
        reads = sum(levels * stats.density + 1 for levels, _ in counted)
        assert stats.effective_density == pytest.approx(reads / committed, rel=1e-12)
    else:
        assert stats.aal is None


def test_a_draft_that_stops_early_counts_as_long_as_it_is(model: SiriusModel) -> None:
    """A level that confidence left out was neither drafted nor refused, and cost nothing."""
    options: dict[str, Any] = {"period": 9, "max_new_tokens": 40}
    stats, (periods,) = replay(model, [PROMPT], confidence=0.9, **options)
    whole, (whole_periods,) = replay(model, [PROMPT], **options)
    left = 39
    for levels, advance in whole_periods:
        assert levels == min(9, left) - 1
        left -= advance
    assert len({levels for levels, _ in periods}) > 2
    assert stats.acceptance_rate is not None
    assert whole.acceptance_rate is not None
    assert stats.acceptance_rate > whole.acceptance_rate
    drafts, whole_drafts = (s.bytes_read[Phase.DRAFT] / s.periods for s in (stats, whole))
    assert drafts < whole_drafts


@given(batches, st.integers(1, 9), st.integers(1, 4), st.integers(1, 25), st.integers(0, 2))
def test_weight_bytes_are_those_of_the_forwards(
    model: SiriusModel, batch: Rows, period: int, width: int, new_tokens: int, refresh: int
) -> None:
    """A forward reads the weights once for all rows."""
    calls: Counter[str] = Counter()
    run = EagerBackend.run

    def spy(backend: EagerBackend, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        calls[entry] += 1
        return run(backend, entry, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "run", spy)
        stats = model.generate(
            batch, period=period, tree_width=width, max_new_tokens=new_tokens, refresh=refresh
        ).stats
    dense = model.program.model.parameters * 4  # float32
    assert stats.weight_bytes == dense
    assert stats.bytes_read == {
        Phase.DRAFT: pytest.approx(calls["sparse"] * stats.density * dense),
        Phase.VERIFY: calls["observe" if refresh else "full"] * dense,
        Phase.PERIOD: 0,
        Phase.REST: calls["prefill"] * dense,
    }
    for phase, read in stats.bytes_read.items():
        assert stats.bytes_per_token[phase] == read / stats.tokens


@pytest.mark.parametrize(("method", "matrices"), [("griffin", 3), ("topk", 2), ("none", 0)])
def test_density_counts_the_rows_not_read(tiny: TinyModels, method: str, matrices: int) -> None:
    made = tiny(method=method)
    total = sum(parameter.numel() for parameter in made.reference.parameters())
    skipped = 2 * 48 * matrices * 64  # layers, neurons not kept, matrices of hidden size
    stats = made.model.generate(PROMPT, max_new_tokens=5).stats
    assert stats.density == pytest.approx(1 - skipped / total)


@pytest.mark.parametrize("width", [1, 3])
def test_density_of_cats_is_measured(tiny: TinyModels, width: int) -> None:
    made = tiny(method="cats")
    kept: list[Tensor] = []
    run = EagerBackend.run

    def spy(backend: EagerBackend, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = run(backend, entry, inputs)
        if entry == "sparse":
            kept.append(outputs["kept"][:, 0])
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "run", spy)
        stats = made.model.generate(
            PROMPT, tree_width=width, max_new_tokens=30, eos_token_id=[]
        ).stats
    mean_L = torch.stack(kept).double().mean(0)
    total = sum(parameter.numel() for parameter in made.reference.parameters())
    skipped = float((96 - mean_L).sum()) * 2 * 64  # up and down; gate is read to choose
    assert stats.density == pytest.approx(1 - skipped / total)
    assert stats.density != made.model.program.sparsity.density


def test_finished_rows_do_not_count_for_density(tiny: TinyModels) -> None:
    model = tiny(method="cats").model
    alone = model.generate(PROMPT, max_new_tokens=20, eos_token_id=[])
    first = model.generate([50, 30], max_new_tokens=1).tokens[0][0]
    assert first not in alone.tokens[0]
    both = model.generate([PROMPT, [50, 30]], max_new_tokens=20, eos_token_id=first)
    assert both.tokens == (alone.tokens[0], (first,))
    assert both.stats.density == pytest.approx(alone.stats.density, rel=1e-12)


def test_modes_without_periods(model: SiriusModel) -> None:
    def run(mode: Mode) -> GenerationStats:
        return model.generate(PROMPT, mode=mode, max_new_tokens=11, eos_token_id=[]).stats

    full, sparse = run(Mode.FULL), run(Mode.SPARSE)
    for stats in (full, sparse):
        assert (stats.tokens, stats.periods, stats.advances, stats.aal) == (11, 0, {}, None)
        assert (stats.corrections, stats.acceptance_rate) == (0, None)
    assert full.effective_density == 1.0
    assert full.bytes_read[Phase.DRAFT] == 0
    assert full.bytes_read[Phase.VERIFY] == 10 * full.weight_bytes
    assert sparse.effective_density == pytest.approx(sparse.density)
    assert sparse.density < 1
    assert sparse.bytes_read[Phase.VERIFY] == 0
    assert sparse.bytes_read[Phase.DRAFT] == pytest.approx(
        10 * sparse.density * sparse.weight_bytes
    )


def test_seconds_add_up(model: SiriusModel) -> None:
    start = time.perf_counter()
    stats = model.generate(PROMPT, max_new_tokens=20, eos_token_id=[]).stats
    wall = time.perf_counter() - start
    assert set(stats.seconds) == set(Phase)
    assert stats.seconds[Phase.PERIOD] == 0  # of back ends whose period is one graph
    assert min(s for phase, s in stats.seconds.items() if phase is not Phase.PERIOD) > 0
    assert stats.total_seconds == sum(stats.seconds.values())
    assert 0.5 * wall < stats.total_seconds <= wall
    assert 0 < stats.prefill_seconds < stats.seconds[Phase.REST]
    assert stats.tokens_per_second == 19 / (stats.total_seconds - stats.prefill_seconds)
    assert sum(stats.seconds_per_token.values()) == pytest.approx(stats.total_seconds / 20)


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.SPARSE, Mode.SIRIUS])
def test_a_token_that_prefill_made_is_no_speed_of_decoding(model: SiriusModel, mode: Mode) -> None:
    stats = model.generate([PROMPT, PROMPT[:3]], mode=mode, max_new_tokens=1).stats
    assert stats.tokens == 2
    assert stats.decoded_tokens == 0
    assert stats.tokens_per_second is None
    assert stats.effective_density is None


def test_the_clock_is_asked_in_periods_only_by_the_controller(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it waits for the device."""
    asked = []
    seconds = PhaseClock.seconds
    monkeypatch.setattr(PhaseClock, "seconds", lambda self: asked.append(1) or seconds(self))
    assert model.generate(PROMPT, period=4, max_new_tokens=20, eos_token_id=[]).stats.periods > 1
    assert len(asked) == 1, "when the generation ends"
    asked.clear()
    stats = model.generate(PROMPT, period="auto", max_new_tokens=20, eos_token_id=[]).stats
    assert len(asked) == 1 + 2 * stats.periods


# host reads

READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"}


class HostReads(TorchFunctionMode):
    """Counts what brings a tensor's value to the host, but for what a back end does inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._in_backend = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.__name__ in READS and not self._in_backend:
            self.count += 1
        return func(*args, **(kwargs or {}))

    def measure(self, model: SiriusModel, **options: Any) -> int:
        run = EagerBackend.run

        def inside(backend: EagerBackend, *args: Any) -> dict[str, Tensor]:
            self._in_backend = True
            try:
                return run(backend, *args)
            finally:
                self._in_backend = False

        self.count = 0
        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(EagerBackend, "run", inside)
            model.generate([PROMPT, [50, 30]], eos_token_id=[], **options)
        return self.count


@pytest.mark.parametrize("read", ["tolist", "item", "__bool__", "__int__", "__float__"])
def test_reads_are_seen(read: str) -> None:
    with HostReads() as reads:
        getattr(torch.ones(1), read)()
    assert reads.count == 1


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_one_read_a_period(tiny: TinyModels, method: str, width: int) -> None:
    def reads(periods: int) -> int:
        return HostReads().measure(
            tiny(method=method).model,
            threshold=0.0,
            period=8,
            tree_width=width,
            max_new_tokens=1 + 8 * periods,
        )

    assert reads(5) - reads(1) == 4


def test_confidence_reads_once_a_level(model: SiriusModel) -> None:
    """Whether any row drafts on; so little confidence stops none. A threshold of 0 keeps all."""

    def reads(periods: int) -> int:
        return HostReads().measure(
            model,
            threshold=0.0,
            period=8,
            confidence=1e-30,
            max_new_tokens=1 + 8 * periods,
        )

    assert reads(5) - reads(1) == 4 * (1 + 7)


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.SPARSE])
def test_one_read_a_step(model: SiriusModel, mode: Mode) -> None:
    many, few = (HostReads().measure(model, mode=mode, max_new_tokens=n) for n in (12, 4))
    assert many - few == 8


@pytest.mark.parametrize("method", slow_but(METHODS, {"griffin+teal"}, {"topk"}))
def test_a_period_needs_no_values(
    tiny: TinyModels, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device tensors have none: to read one is an error."""
    compiled = tiny(method=method).compiled
    monkeypatch.setattr("sirius_compile.product.find_device", torch.device)  # which refuses it
    model = compiled.to_runtime(device="meta")
    session = open_session(model, 2, refresh=1 if method == "griffin" else 0)
    session.prefill([PROMPT, [50, 30]])
    most = torch.tensor([5, 3], device="meta")
    noise = torch.empty(2, 2, 5, dtype=torch.float64, device="meta")
    for rule in RULES:
        for width in (1, 3):
            tokens, *_ = session.period(Plan(5, width, rule=rule, noise=noise), most)
            assert tokens.shape == (2, 5)
    session.step(Way.DENSE)
    session.step(Way.SPARSE)
    with pytest.raises((RuntimeError, NotImplementedError)):
        session.state.length.tolist()


def test_attention_needs_no_values_off_the_cpu() -> None:
    """Its fake stands in on the meta device, so the reference is called by itself."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    output = cached_attention(
        *(meta(2, heads, 3, 8) for heads in (4, 2, 2)),
        *(meta(1, 2, 2, 64, 8) for _ in range(2)),
        positions=meta(2, 3, dtype=torch.int64),
        slots=meta(2, 3, dtype=torch.int64),
        length=meta(2, dtype=torch.int64),
        tree_mask=meta(1, 3, 3, dtype=torch.int64),
        layer=0,
        scale=1.0,
        window=5,
        softcap=None,
    )
    assert output.shape == (2, 4, 3, 8)
