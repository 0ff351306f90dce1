"""The graph `period`, run operator by operator, does what periods by the entries do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sirius_compile import CompileConfig, compile_model
from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.model import FinishReason, GenerationOutput, SiriusModel
from sirius_runtime.one_graph import OneGraph
from sirius_runtime.plan import Plan
from sirius_runtime.sizes import cache_slots
from tests.support.batch import Batch
from tests.support.counts import counted_alike
from tests.support.fast import gate_but, slow_but
from tests.support.models import (
    MAX_SEQ_LEN,
    Rows,
    random_decoder,
    state_of,
    word_tokenizer,
    write_calibration,
)

RAGGED = [[7, 8, 9], [50, 30, 11, 22, 60], [4 * i + 7 for i in range(15)]]
NEW = 24

METHODS = ("griffin", "topk", "cats", "teal", "griffin+teal")
WIDTHS, SIZES = (1, 2, 4, 8), (2, 4, 8, 16)
FAST, GATE = [("griffin", 1, 4), ("griffin", 2, 4)], [("cats", 1, 8)]
"""Chain and tree; neurons of the prompt, and neurons that are counted. Each is a compilation."""


def fast(*cases: tuple[Any, ...]) -> list[Any]:
    """Cases that begin with a method, a width and a size."""
    chosen = ([case for case in cases if case[:3] in tier] for tier in (FAST, GATE))
    return slow_but(cases, *chosen)


SAMPLINGS: list[dict[str, Any]] = [
    *({}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}),
    {"top_k": 9, "top_p": 0.9},
]


@dataclass(frozen=True)
class Pair:
    """One compiled model behind both back ends, and what it was compiled from."""

    reference: PreTrainedModel
    eager: SiriusModel
    period: SiriusModel
    _greedy: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    def agree(self, prompts: Rows, **options: Any) -> GenerationOutput:
        """What both generate, which is the same."""
        options = {"max_new_tokens": NEW, "eos_token_id": []} | options
        wanted = self.eager.generate(prompts, **options)
        found = self.period.generate(prompts, **options)
        assert found.tokens == wanted.tokens
        assert found.finish_reasons == wanted.finish_reasons
        names = "tokens periods advances aal corrections density effective_density acceptance_rate"
        for name in counted_alike(names, options["eos_token_id"]):
            assert getattr(found.stats, name) == getattr(wanted.stats, name), name
        return found

    def greedy(self, prompt: list[int]) -> tuple[int, ...]:
        """The tokens of transformers' own greedy `generate`, with no EOS; computed once."""
        if (key := tuple(prompt)) not in self._greedy:
            with torch.no_grad():
                output = self.reference.generate(
                    torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=-1
                )
            self._greedy[key] = tuple(output[0, len(prompt) :].tolist())
        return self._greedy[key]


Pairs = Callable[..., Pair]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Compiles each (method, width, size) of a model once."""
    text = write_calibration(tmp_path_factory.mktemp("calibration") / "words.txt")
    made: dict[object, Pair] = {}

    def make(
        method: str, width: int, size: int, model_type: str = "llama", **config: object
    ) -> Pair:
        key = (method, width, size, model_type, *config.items())
        if key not in made:
            reference = random_decoder(model_type, **config)
            options = CompileConfig(
                sparsity=method, period=size, tree_width=width, calibration=text
            )
            compiled = compile_model(reference, options, tokenizer=word_tokenizer())
            eager, period = compiled.to_runtime(), compiled.to_runtime(backend="period")
            made[key] = Pair(reference, eager, period)
        return made[key]

    return make


@pytest.mark.parametrize(("method", "width", "size"), fast(*product(METHODS, WIDTHS, SIZES)))
def test_tokens_advances_and_densities(pairs: Pairs, method: str, width: int, size: int) -> None:
    pair = pairs(method, width, size)
    for prompts in (RAGGED[:1], RAGGED):
        pair.agree(prompts)
        exact = pair.agree(prompts, mode="exact")
        assert exact.tokens == tuple(map(pair.greedy, prompts))
        assert exact.stats.periods < NEW * len(prompts)  # some draft was accepted


@pytest.mark.parametrize(
    ("method", "width", "size"), fast(("cats", 1, 8), ("griffin", 2, 4), ("topk", 4, 8))
)
@pytest.mark.parametrize(
    "sampling",
    slow_but(SAMPLINGS, [SAMPLINGS[-1]], [SAMPLINGS[0]]),
    ids=str,
)
def test_sampling(
    pairs: Pairs, method: str, width: int, size: int, sampling: dict[str, Any]
) -> None:
    pair = pairs(method, width, size)
    drawn = pair.agree(RAGGED, mode="sample", seed=3, **sampling).tokens
    assert pair.agree(RAGGED, mode="sample", seed=40, **sampling).tokens != drawn
    alone = pair.agree(RAGGED[1:2], mode="sample", seed=4, **sampling)
    assert alone.tokens[0] == drawn[1]


@pytest.mark.parametrize(
    ("method", "width", "size"), fast(("griffin", 1, 4), ("cats", 1, 8), ("cats", 2, 4))
)
@pytest.mark.parametrize("mode", gate_but(("sirius", "exact", "sample"), {"exact"}))
def test_drafts_that_stop_early(
    pairs: Pairs, method: str, width: int, size: int, mode: str
) -> None:
    pair = pairs(method, width, size)
    options = {"mode": mode} | ({"seed": 3} if mode == "sample" else {})
    whole = pair.agree(RAGGED, **options).stats
    for confidence in (0.3, 0.9):
        early = pair.agree(RAGGED, confidence=confidence, **options).stats
        assert early.effective_density != whole.effective_density  # it counts what was drafted
    assert pair.agree(RAGGED, confidence=1.0, **options).stats.periods > whole.periods


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("mode", gate_but(("sirius", "exact"), {"sirius"}))
def test_neurons_chosen_anew(pairs: Pairs, width: int, mode: str) -> None:
    pair = pairs("griffin", width, 4)
    never, often = (pair.agree(RAGGED, mode=mode, refresh=every).stats for every in (0, 1))
    pair.agree(RAGGED, mode=mode, refresh=3)
    assert never.advances != often.advances


@pytest.mark.parametrize(
    ("method", "width", "size"), fast(("griffin", 1, 4), ("griffin", 2, 4), ("topk", 2, 16))
)
@pytest.mark.parametrize("period", slow_but((1, 2, 3), {3}, {1}))
def test_periods_shorter_than_compiled(
    pairs: Pairs, method: str, width: int, size: int, period: int
) -> None:
    pair = pairs(method, width, size)
    for mode, options in (("sirius", {}), ("exact", {}), ("sample", {"seed": 1})):
        output = pair.agree(RAGGED, mode=mode, period=period, **options)
        assert max(output.stats.advances) == period


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("mode", slow_but(("sirius", "exact"), {"exact"}))
def test_rows_that_end_at_different_times(pairs: Pairs, width: int, mode: str) -> None:
    pair = pairs("griffin", width, 4)
    endless = pair.agree(RAGGED, mode=mode).tokens
    ends = {endless[0][2], endless[1][11]}
    output = pair.agree(RAGGED, mode=mode, eos_token_id=list(ends))
    assert len({len(tokens) for tokens in output.tokens}) == 3
    assert FinishReason.EOS in output.finish_reasons
    for tokens, reason, whole in zip(output.tokens, output.finish_reasons, endless, strict=True):
        assert tokens == whole[: len(tokens)]
        assert (tokens[-1] in ends) == (reason is FinishReason.EOS)


@pytest.mark.slow  # in the fast suite, `test_laws_weights` keeps all by the entries
def test_a_dense_sparse_path(pairs: Pairs) -> None:
    pair = pairs("none", 1, 4)
    assert pair.agree(RAGGED, mode="exact", max_new_tokens=25).stats.aal == 4
    pair.agree(RAGGED, mode="sample", seed=2)
    assert pair.agree(RAGGED, threshold=0.0).stats.aal == 4


@pytest.mark.parametrize("width", slow_but((1, 2), (), {1}))
def test_a_period_of_one_token_drafts_nothing(pairs: Pairs, width: int) -> None:
    pair = pairs("griffin", width, 1)
    for mode in ("sirius", "exact"):
        output = pair.agree(RAGGED, mode=mode, refresh=2)
        assert output.tokens == tuple(map(pair.greedy, RAGGED))
        assert output.stats.advances == {1: len(RAGGED) * (NEW - 1)}
    pair.agree(RAGGED, mode="sample", seed=2)


@pytest.mark.slow  # in the gate, ONNX Runtime runs a period with windows
@pytest.mark.parametrize(("method", "width"), [("griffin", 1), ("topk", 2)])
def test_windows_and_soft_caps(pairs: Pairs, method: str, width: int) -> None:
    pair = pairs(method, width, 4, "gemma2", sliding_window=3)
    assert pair.agree(RAGGED, mode="exact").tokens == tuple(map(pair.greedy, RAGGED))
    pair.agree(RAGGED)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_modes_without_periods(pairs: Pairs, mode: str) -> None:
    pair = pairs("griffin", 1, 4)
    pair.agree(RAGGED, mode=mode)
    pair.agree(RAGGED, mode=mode, seed=3)


@pytest.mark.gate
def test_a_prompt_of_all_but_one_token_of_the_length(pairs: Pairs) -> None:
    prompt = [7 + i % 90 for i in range(MAX_SEQ_LEN - 2)]
    pair = pairs("cats", 1, 8)
    output = pair.agree([prompt, prompt[:9]], mode="exact", max_new_tokens=2)
    assert [len(tokens) for tokens in output.tokens] == [2, 2]


# period by period


def opened(model: SiriusModel, refresh: int) -> Batch:
    period, limits = model.program.period, model.backend.limits
    slots = cache_slots(64, period.period, period.tree_width)
    strategy = OneGraph(limits) if limits else None
    return Batch(model.backend, len(RAGGED), slots, refresh=refresh, strategy=strategy)


@pytest.mark.parametrize(
    ("method", "width", "size", "refresh"),
    fast(("griffin", 1, 4, 2), ("griffin", 2, 4, 0), ("cats", 1, 8, 0), ("topk", 4, 8, 0)),
)
@pytest.mark.parametrize("rule", ["sirius", "exact"])
def test_caches_agree_below_the_length_after_each_period(
    pairs: Pairs, method: str, width: int, size: int, refresh: int, rule: str
) -> None:
    pair = pairs(method, width, size)
    eager = opened(pair.eager, refresh)
    whole = opened(pair.period, refresh)
    assert eager.prefill(RAGGED).equal(whole.prefill(RAGGED))
    for index in range(4):
        plan = Plan(period=size, width=width, rule=rule, threshold=0.1, verify_temperature=0.6)
        most = torch.tensor([size, max(size - 1, 1), size])
        if index == 2:
            for session in (eager, whole):
                session.set_active([True, True, False])
            most[2] = 1
        with torch.inference_mode():
            wanted, found = eager.period(plan, most), whole.period(plan, most)
        assert found[1].equal(wanted[1])
        assert found[2].equal(wanted[2])
        assert whole.state.length.equal(eager.state.length)
        assert whole.state.root.equal(eager.state.root)
        for row, advance in enumerate(wanted[1].tolist()):
            assert found[0][row, :advance].equal(wanted[0][row, :advance])
        for name, value in state_of(eager).items():
            assert_same_below(state_of(whole)[name], value, eager.state.length, name)


def assert_same_below(found: Tensor, wanted: Tensor, length: Tensor, name: str) -> None:
    """`neurons` are the same; of the caches, the slots below each row's length."""
    for row, slots in enumerate(length.tolist()):
        if name == "neurons":
            assert found[:, row].equal(wanted[:, row])
            continue
        held = wanted[:, row, :, :slots]
        assert held.count_nonzero() == held.numel()
        torch.testing.assert_close(found[:, row, :, :slots], held)


# requests that the graph can't serve

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"period": 5}, ConfigError, r"period must be in 1..4 here, got 5: .*larger --period"),
    ({"period": 512}, ConfigError, r"period must be in 1..4 here, got 512"),
    ({"period": 0}, ConfigError, r"period must be in 1..512, got 0"),
    ({"tree_width": 2}, ConfigError, r"tree_width must be 1 here, got 2: .*--tree-width"),
    ({"tree_width": 0}, ConfigError, r"tree_width must be in 1..101 \(the vocabulary\), got 0"),
    ({"period": "auto"}, ConfigError, r"period 'auto' .*use backend eager"),
    ({"mode": "exact", "period": "auto"}, ConfigError, r"period 'auto' .*use backend eager"),
    (
        {"max_new_tokens": MAX_SEQ_LEN - 14},
        GenerationError,
        r"max_new_tokens must be in 1..113 here \(max_seq_len is 128 tokens, the prompt has 15",
    ),
    ({"max_new_tokens": 0}, GenerationError, r"max_new_tokens must be in 1..113 here"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda v: str(v)[:24])
def test_a_refused_request_names_the_limit_and_leaves_the_model_as_it_was(
    pairs: Pairs, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    pair = pairs("griffin", 1, 4)
    with pytest.raises(error, match=message):
        pair.period.generate(RAGGED, **options)
    assert pair.agree(RAGGED, mode="exact").tokens == tuple(map(pair.greedy, RAGGED))


def test_a_prompt_that_is_too_long_is_refused(pairs: Pairs) -> None:
    pair = pairs("griffin", 1, 4)
    with pytest.raises(GenerationError, match=r"has 128 tokens, .*sequences of 128 .*max_seq_len"):
        pair.period.generate([[7] * MAX_SEQ_LEN])
    pair.agree(RAGGED)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_modes_without_periods_know_no_limits_of_the_period(pairs: Pairs, mode: str) -> None:
    pairs("griffin", 1, 4).agree(RAGGED, mode=mode, period=7)
