"""What `sirius ablate` takes out of the algorithm, against a naive statement of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from sirius_compile.product import Compiled
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation.modes import Setting, setting_of
from tests.support.models import TinyModels
from tests.support.naive_decoder import Written, naive_sirius
from tests.test_naive_decoder import NEW_TOKENS, Both, assert_same

PROMPTS = [p.prompt for p in itertools.islice(problems(Task.REASONING, "test", seed=5), 2)]
PERIOD, THRESHOLD, TEMPERATURE = 6, 0.1, 0.6
OPTIONS = {"period": PERIOD, "threshold": THRESHOLD, "verify_temperature": TEMPERATURE}


@pytest.fixture(scope="module")
def both() -> Both:
    return Both("griffin", 0.4)


def setting(**options: Any) -> Setting:
    return setting_of("sirius", OPTIONS | options)


NAIVE = [
    ({"kv_rewriting": "off"}, {"rewrite": False}),
    ({"rollback": "period"}, {"whole": True}),
    ({"rollback": "token"}, {"period": 2}),
    ({"kv_rewriting": "off", "rollback": "period"}, {"rewrite": False, "whole": True}),
    ({"kv_rewriting": "on", "rollback": "minimal"}, {}),
]


Naive = Callable[[str, dict[str, Any]], Written]


@pytest.fixture(scope="module")
def naive(both: Both) -> Naive:
    found: dict[str, Written] = {}

    def write(prompt: str, stated: dict[str, Any]) -> Written:
        if (key := f"{prompt} {stated}") not in found:
            options = {
                "period": PERIOD,
                "threshold": THRESHOLD,
                "temperature": TEMPERATURE,
                **stated,
            }
            found[key] = both.naive(naive_sirius, both.ids(prompt), **options)
        return found[key]

    return write


@pytest.mark.parametrize(("options", "stated"), NAIVE, ids=[str(n[1]) for n in NAIVE])
def test_same_tokens_as_the_naive_statement(
    both: Both, naive: Naive, options: dict[str, str], stated: dict[str, Any]
) -> None:
    chosen = setting(**options)
    model = chosen.on(both.model)
    for prompt in PROMPTS:
        output = model.generate(both.ids(prompt), max_new_tokens=NEW_TOKENS, **chosen.arguments)
        assert_same(output, naive(prompt, stated))


def test_each_thing_taken_out_changes_something(naive: Naive) -> None:
    """Else the test above compares equal things."""
    plain, off, whole, single = (
        [naive(prompt, stated).advances for prompt in PROMPTS]
        for stated in ({}, {"rewrite": False}, {"whole": True}, {"period": 2})
    )
    assert {advance for row in whole for advance in row[:-1]} == {1, PERIOD}
    assert {advance for row in single for advance in row[:-1]} == {1, 2}
    assert plain != off
    assert plain != whole


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("options", [n[0] for n in NAIVE[:2]], ids=str)
def test_rows_of_a_batch_do_not_change_each_other(
    tiny: TinyModels, options: dict[str, str], width: int
) -> None:
    """Also where drafts have different lengths, by confidence and by what is left to say."""
    model = tiny("llama", "topk").model
    chosen = setting_of("sirius", {"period": 5, "tree_width": width, "confidence": 0.3} | options)
    prompts = [[7, 8, 9], [40, 41], [9, 20, 31, 42, 53]]
    runs = chosen.on(model)
    together = runs.generate(prompts, max_new_tokens=17, **chosen.arguments)
    for prompt, tokens, steps in zip(prompts, together.tokens, together.steps, strict=True):
        alone = runs.generate(prompt, max_new_tokens=17, **chosen.arguments)
        assert alone.tokens[0] == tokens
        assert alone.steps[0] == steps


def test_the_model_itself_stays_as_it_is(tiny: TinyModels) -> None:
    model = tiny("llama", "topk").model
    before = model.generate([7, 8], max_new_tokens=20, period=4)
    chosen = setting_of("sirius", {"period": 4, "rollback": "period"})
    other = chosen.on(model).generate([7, 8], max_new_tokens=20, **chosen.arguments)
    assert {period.advance for period in other.steps[0].periods[:-1]} == {1, 4}
    after = model.generate([7, 8], max_new_tokens=20, period=4)
    assert (after.tokens, after.stats.advances) == (before.tokens, before.stats.advances)
    assert setting_of("sirius", {"rollback": "minimal", "kv_rewriting": "on"}).on(model) is model


def test_exact_without_rewriting_departs_from_the_dense_model(both: Both) -> None:
    """The full path then reads the sparse path's K/V, so its argmax is no longer the dense one."""
    chosen = setting_of("exact", {"period": 16, "kv_rewriting": "off"})
    answers = [
        (
            chosen.on(both.model).generate(prompt, max_new_tokens=60, **chosen.arguments).tokens,
            both.model.generate(prompt, max_new_tokens=60, mode="full").tokens,
        )
        for prompt in PROMPTS
    ]
    assert any(own != dense for own, dense in answers)


def test_what_can_not_be_taken_out_is_refused(whole: Compiled, tiny: TinyModels) -> None:
    model = whole.to_runtime(backend="period")
    chosen = setting_of("sirius", {"rollback": "period"})
    with pytest.raises(ConfigError, match=r"rollback=period: only back ends .* use backend eager"):
        chosen.on(model).generate([7, 8], max_new_tokens=2, **chosen.arguments)
    chosen = setting_of("sirius", {"kv_rewriting": "off", "lookup": 2})
    looked = tiny("llama", "topk").model
    with pytest.raises(ConfigError, match="kv_rewriting=off: a looked-up draft"):
        chosen.on(looked).generate([7, 8, 7, 8, 7], max_new_tokens=2, **chosen.arguments)
