"""The model of lm-evaluation-harness, run by the real package."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cli import Cli
from tests.support.models import EOS, MAX_SEQ_LEN, Tiny, TinyModels

pytest.importorskip("lm_eval", reason="lm-eval is not installed (group harness)")

from lm_eval import tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.evaluation.answers import FewShotGrader
from sirius_runtime.evaluation.evaluate import EvaluationOptions
from sirius_runtime.evaluation.harness import evaluate_by_harness
from sirius_runtime.evaluation.modes import read_modes
from sirius_runtime.lm_eval import SiriusLM


@pytest.fixture
def llama(tiny: TinyModels) -> Tiny:
    return tiny("llama", "topk")


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]  # type: ignore[arg-type]


def tokens(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def logprob(model: Tiny, row: Sequence[int], count: int) -> float:
    """Of the last `count` tokens, by transformers."""
    with torch.no_grad():
        logits = model.reference(torch.tensor([row])).logits[0].double().log_softmax(-1)
    places = range(len(row) - count, len(row))
    return float(sum(logits[place - 1, row[place]] for place in places))


def test_the_harness_finds_the_model_once_the_module_is_imported() -> None:
    assert get_model("sirius") is SiriusLM


def test_log_likelihoods_are_those_of_the_dense_model(llama: Tiny) -> None:
    pairs = [("w7 w8 w9", " w10 w11"), ("w20", " w30"), ("w7 w8", " w9 w9 w9"), ("", "w12 w13")]
    lm = SiriusLM(llama.model, mode="sparse", batch_size=3)
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        before = tokens(context) or [EOS[0]]  # the tokenizer has no BOS
        row, count = before + tokens(continuation), len(tokens(continuation))
        assert value == pytest.approx(logprob(llama, row, count), abs=1e-3)


def test_a_greedy_continuation_is_told(llama: Tiny) -> None:
    lm = SiriusLM(llama.model)
    first, second = llama.greedy([7, 8, 9], 2)
    pairs = [("w7 w8 w9", f" w{first} w{second}"), ("w7 w8 w9", f" w{first} w{second - 1}")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_whole_texts_are_scored_in_windows(llama: Tiny) -> None:
    words = [7 + n * n % 90 for n in range(MAX_SEQ_LEN + 40)]
    lm = SiriusLM(llama.model)
    (found,) = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", (" ".join(f"w{w}" for w in words),))
    )
    most = lm.max_length
    first, rest = words[:most], words[most:]
    second = words[len(words) - 1 - most :]  # a full window, of which the rest is scored
    expected = logprob(llama, [EOS[0], *first], most) + logprob(llama, second, len(rest))
    assert found == pytest.approx(expected, abs=0.05)


def test_answers_end_before_their_stop_strings(llama: Tiny) -> None:
    greedy = [f"w{token}" for token in llama.greedy([7, 8, 9], 6)]
    plain = {"until": [], "max_gen_toks": 6, "do_sample": False}
    asked = [("w7 w8 w9", plain), ("w7 w8 w9", plain | {"until": [greedy[3]]})]
    for mode in ("full", "exact"):
        lm = SiriusLM(llama.model, mode=mode, batch_size=2)
        whole, cut = lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
        assert whole.split() == greedy
        assert cut.split() == greedy[: greedy.index(greedy[3])]
        assert len(lm.outputs) == 2  # batches of requests that end alike


def test_a_long_context_keeps_its_end(llama: Tiny) -> None:
    lm = SiriusLM(llama.model, mode="full")
    context = " ".join(f"w{7 + n % 50}" for n in range(2 * MAX_SEQ_LEN))
    (text,) = lm.generate_until(
        requests("generate_until", (context, {"until": ["zz"], "max_gen_toks": 8}))
    )
    kept = tokens(context)[-(MAX_SEQ_LEN - 8) :]
    assert tokens(text) == [t for t in llama.greedy(kept, 8) if t not in EOS]


def test_what_is_wrong_is_said(llama: Tiny) -> None:
    with pytest.raises(ConfigError, match="speed: not understood"):
        SiriusLM(llama.model, speed=3)
    with pytest.raises(ConfigError, match="batch_size must be"):
        SiriusLM(llama.model, batch_size="auto")
    with pytest.raises(ConfigError, match="num_beams: unknown generation options"):
        SiriusLM(llama.model).generate_until(
            requests("generate_until", ("w7", {"until": [], "num_beams": 4}))
        )
    with pytest.raises(GenerationError, match="no chat template"):
        SiriusLM(llama.model).apply_chat_template([{"role": "user", "content": "w7"}])


TASK = """\
task: words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
GENERATES = """\
generation_kwargs: {until: [w0], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: words, filter: [{function: remove_whitespace}, {function: take_first}]}
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Tiny) -> Path:
    """A folder with data: prompts, and what the dense model answers them, but for the last."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # Without the harness's own tasks, whose thousands of files it reads each time.
    few = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", few)
    prompts = [[7 + n, 20, 9] for n in range(4)]
    answers = [" ".join(f"w{t}" for t in llama.greedy(p, 4) if t not in EOS) for p in prompts]
    answers[-1] = "w0"
    lines = [
        {"prompt": " ".join(f"w{t}" for t in prompt), "answer": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "words.yaml").write_text(
        TASK.format(data=data, kind="generate_until", more=GENERATES)
    )
    return tmp_path


def test_a_task_of_the_harness_in_several_modes(llama: Tiny, task: Path) -> None:
    options = EvaluationOptions(read_modes("full,exact"), batch_size=2)
    full, exact = evaluate_by_harness(llama.model, "words", options, include=str(task))
    assert (full.metric, full.value, exact.value) == ("exact_match,words", 0.75, 0.75)
    assert full.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert full.aal is None
    assert exact.aal is not None
    with pytest.raises(ConfigError, match="has no task 'wordz'"):
        evaluate_by_harness(llama.model, "wordz", options, include=str(task))


@pytest.mark.gate
def test_the_command_line_prints_the_harness_s_numbers(
    llama: Tiny, task: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama.compiled.save(task / "llama.sirius")
    cli = Cli(capsys, monkeypatch)
    flags = ("--task", "lm-eval:words", "--include", task, "--backend", "eager", "--modes", "full")
    done = cli.run("eval", path, *flags)
    assert done.code == 0, done.err
    last = done.out.splitlines()[-1]
    assert last.split()[:5] == ["full", "words", "exact_match,words", "0.7500", "0.2500"]
    done = cli.run("eval", path, *flags, "--data", "x")
    assert done.code == 2
    assert "lm-eval:… tasks do not take --data" in done.err


@pytest.mark.parametrize(
    "text",
    [
        "It is $70,000.\n#### 70000",
        "#### $70,000.00",
        "The profit is 70,000. ...",
        "seventy",
        "#### 70,000.",
        "-70000 #### -5 then 70000",
    ],
)
def test_our_gsm8k_reads_answers_as_the_harness_s_own(text: str) -> None:
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    target = "He has 70,000.\n#### 70000"
    ignored = [",", r"\$", "(?s).*#### ", r"\.$"]
    filters = (
        RegexFilter(r"#### (\-?[0-9\.\,]+)"),
        RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    )
    theirs = []
    for extract in filters:
        ((found,),) = extract.apply([[text]], [{}])
        score = exact_match_hf_evaluate(
            [found], [target], regexes_to_ignore=ignored, ignore_case=True
        )
        theirs.append(bool(score["exact_match"]))
    grade = FewShotGrader(target).grade(text)
    assert [grade.strict, grade.correct] == theirs
