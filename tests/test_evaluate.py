"""`sirius eval`: answers in several modes, on the shipped model and on tiny ones."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Task as TallyTask
from sirius_compile.shipped.problems import problems
from sirius_runtime import load
from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.evaluation.evaluate import EvaluationOptions, EvaluationWarning, evaluate
from sirius_runtime.evaluation.modes import read_modes
from sirius_runtime.evaluation.problems import humaneval, own_task
from sirius_runtime.evaluation.results import Result, Results
from sirius_runtime.evaluation.summary import Summary, bootstrap, summarise
from sirius_runtime.model import SiriusModel
from sirius_runtime.stats import PeriodSteps
from tests.support.cli import Cli
from tests.support.models import TinyModels, random_decoder, word_tokenizer
from tests.support.tiered import streamed, tiered

COUNT = 4


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped model and problems that it was not trained on."""
    folder = tmp_path_factory.mktemp("eval")
    options = CompileConfig(sparsity="griffin", keep=0.4, graphs="entries")
    compile_model("tally-3m", options).save(folder / "tally.sirius")
    lines = [
        {
            "prompt": problem.prompt,
            "answer": problem.answer.rpartition("#### ")[2],
            "regex": r"#### (\d+)",
            "scoring": "number",
        }
        for problem in itertools.islice(problems(TallyTask.REASONING, "test", seed=7), COUNT)
    ]
    write_lines(folder / "task.jsonl", lines)
    return folder


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def run(cli: Cli, folder: Path, *flags: object) -> dict[str, dict[str, object]]:
    done = cli.run(
        "eval",
        folder / "tally.sirius",
        *("--task", folder / "task.jsonl", "--max-new-tokens", 110, "--dtype", "float32"),
        *("--backend", "eager", "--batch-size", 4, "--json"),
        *flags,
    )
    assert done.code == 0, done.err
    return {summary["mode"]: summary for summary in json.loads(done.out)}


def test_sirius_mends_what_the_sparse_path_breaks(cli: Cli, folder: Path) -> None:
    by_mode = run(cli, folder, "--modes", "full,sparse,sirius:.1,exact")
    accuracy = {mode: s["accuracy"]["mean"] for mode, s in by_mode.items()}  # type: ignore[index]
    assert accuracy["full"] == accuracy["sirius:0.1"] == accuracy["exact"] == 1.0
    assert accuracy["sparse"] < 0.5
    assert by_mode["sparse"]["difference"]["mean"] == accuracy["sparse"] - 1  # type: ignore[index]
    assert by_mode["full"]["effective_density"] == by_mode["full"]["density"] == 1.0
    assert by_mode["sparse"]["effective_density"] == by_mode["sparse"]["density"]
    assert by_mode["exact"]["tokens"] == by_mode["full"]["tokens"]
    assert by_mode["full"]["aal"] is None
    assert by_mode["full"]["speed"] == 1.0
    assert by_mode["exact"]["aal"] > 2  # type: ignore[operator]


def test_the_numbers_are_those_of_generate(cli: Cli, folder: Path) -> None:
    import sirius_runtime

    summary = run(cli, folder, "--modes", "sirius", "--max-new-tokens", 40)["sirius"]
    model = sirius_runtime.load(folder / "tally.sirius", dtype="float32")
    prompts = [str(p.prompt) for p in own_task(folder / "task.jsonl").problems]
    stats = model.generate(prompts, max_new_tokens=40, fallback=False).stats
    assert summary["tokens"] == stats.tokens
    assert summary["aal"] == pytest.approx(stats.aal)
    assert summary["effective_density"] == pytest.approx(stats.effective_density)


@pytest.mark.gate
def test_answers_are_the_same_where_weights_stream(folder: Path, tmp_path: Path) -> None:
    """As with a memory budget: accuracy is that of the model in memory, answer by answer."""
    options = CompileConfig(sparsity="none", weights="int8", graphs="entries", period=8)
    path = compile_model("tally-3m", options).save(tmp_path / "tally.sirius")
    task = own_task(folder / "task.jsonl")
    asked = EvaluationOptions(read_modes("full,sirius:.1,exact"), COUNT, max_new_tokens=110)
    model, _ = tiered(path, 0.3)
    assert streamed(model) > 0
    answered = []
    for number, one in enumerate((load(path), model)):
        evaluate(one, task, asked, out=(out := tmp_path / f"{number}.jsonl"))
        lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
        answered.append([{**line, "seconds": None} for line in lines])
    assert answered[0] == answered[1]
    assert [line["correct"] for line in answered[0]] == [True] * 3 * COUNT


@pytest.mark.gate
def test_a_budget_has_room_for_a_batch(cli: Cli, folder: Path) -> None:
    flags = ("--modes", "full", "--dtype", "bfloat16")
    assert run(cli, folder, *flags, "--memory-budget", "4GiB", "--context", 200)["full"]


def test_prints_one_table(cli: Cli, folder: Path) -> None:
    done = cli.run(
        "eval",
        folder / "tally.sirius",
        *("--task", folder / "task.jsonl", "--max-new-tokens", 110, "--limit", 2),
        *("--modes", "full,sirius", "--backend", "eager"),
    )
    assert done.code == 0, done.err
    title, header, full, sirius, notes = done.out.splitlines()
    assert title.split()[1:] == ["2", "problems"]
    assert header.split() == [
        *("mode accuracy (95%) less full (95%) none cut".split()),
        *("AAL corr. density eff. tokens/s x full".split()),
    ]
    assert full.split()[:4] == ["full", "100.0%", "[100.0,", "100.0]"]
    assert sirius.split()[0] == "sirius"
    assert notes.startswith("none:")
    assert "4/4" in done.err


@pytest.mark.gate
def test_a_run_goes_on_where_it_ended(cli: Cli, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    flags = ("--modes", "full,sirius", "--out", out)
    whole = run(cli, folder, *flags)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * COUNT
    out.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # killed as it wrote
    again = run(cli, folder, *flags)
    for name in ("tokens", "aal", "accuracy", "effective_density"):
        assert {m: s[name] for m, s in again.items()} == {m: s[name] for m, s in whole.items()}
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert found[:4] == [json.loads(line) for line in lines[:4]]
    assert len(found) == 1 + 2 * COUNT
    before = out.read_bytes()
    assert run(cli, folder, *flags) == again  # seconds too: nothing is computed anew
    assert out.read_bytes() == before
    more = run(cli, folder, "--modes", "full,sirius,exact", "--out", out)
    assert out.read_bytes().startswith(before)
    assert more["exact"]["tokens"] == more["full"]["tokens"]


def test_results_of_other_settings_are_refused_by_name(
    cli: Cli, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    base = ("eval", folder / "tally.sirius", "--task", folder / "task.jsonl", "--limit", 1)
    flags = ("--modes", "full", "--backend", "eager", "--out", out)
    assert cli.run(*base, *flags, "--max-new-tokens", 110).code == 0
    done = cli.run(*base, *flags, "--max-new-tokens", 111)
    assert done.code == 2
    assert "other settings: max_new_tokens was 110 and is 111 now" in done.err
    done = cli.run(*base, *flags, "--max-new-tokens", 110, "--period", 4)
    assert "options was {} and is {'period': 4} now" in done.err
    out.write_text("{}\n")
    assert "line 1: not a result" in cli.run(*base, *flags, "--max-new-tokens", 110).err
    out.write_text("precious text\n")
    assert cli.run(*base, *flags, "--max-new-tokens", 110).code == 2
    assert out.read_text() == "precious text\n"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--task", "gsm8k"), "give --data"),
        (("--task", "humaneval"), "give --data"),
        (("--task", "missing.jsonl"), "no such task or file; give"),
        (("--task", "missing.jsonl", "--shots", "x"), "--shots would have no effect here"),
        (("--task", "missing.jsonl", "--data", "x"), "--data would have no effect here"),
        (("--task", "missing.jsonl", "--system", "x"), "--system would have no effect here"),
        (("--task", "missing.jsonl", "--modes", "quick"), "--modes takes"),
        (("--task", "missing.jsonl", "--batch-size", "0"), "1 or more"),
    ],
)
def test_wrong_command_lines(cli: Cli, folder: Path, flags: tuple[str, ...], reason: str) -> None:
    done = cli.run("eval", folder / "tally.sirius", *flags)
    assert done.code == 2
    assert reason in done.err


@pytest.fixture
def task_of(tmp_path: Path) -> Callable[..., Path]:
    def write(**line: object) -> Path:
        return write_lines(tmp_path / "tiny.jsonl", [{"prompt": "w9 w10", "answer": "w7", **line}])

    return write


OPTIONS = EvaluationOptions(read_modes("full,exact"), max_new_tokens=8)


def test_a_regex_that_finds_nothing_is_told(tiny: TinyModels, task_of: Callable[..., Path]) -> None:
    with pytest.warns(EvaluationWarning, match=r"the task's regex 'v\(\\\\d\+\)' matches none"):
        (full, exact) = evaluate(tiny().model, own_task(task_of(regex=r"v(\d+)")), OPTIONS)
    assert full.unanswered == exact.unanswered == 1
    assert full.tokens == exact.tokens


def test_what_a_model_cannot_serve_is_said_before_the_first_answer(
    tiny: TinyModels, task_of: Callable[..., Path]
) -> None:
    model = tiny().model
    with pytest.raises(GenerationError, match="problem '1' has a prompt of 2 tokens: with 127"):
        evaluate(model, own_task(task_of()), replace(OPTIONS, max_new_tokens=127))
    with pytest.raises(GenerationError, match="has no tokenizer"):
        evaluate(SiriusModel(model.backend, None), own_task(task_of()), OPTIONS)


def test_code_is_executed_on_leave_alone(tiny: TinyModels, tmp_path: Path) -> None:
    line: dict[str, object] = {
        "task_id": "0",
        "prompt": "def f(x): w9 w10",
        "test": "def check(f): pass",
        "entry_point": "f",
    }
    task = humaneval(write_lines(tmp_path / "h.jsonl", [line]))
    with pytest.raises(ConfigError, match="give --allow-code-execution"):
        evaluate(tiny().model, task, OPTIONS)
    allowed = replace(OPTIONS, allow_code_execution=True)
    summaries = evaluate(tiny().model, task, allowed, out=tmp_path / "out.jsonl")
    assert [s.accuracy.mean for s in summaries] == [0.0, 0.0]  # random words are no Python
    assert "SyntaxError" in (tmp_path / "out.jsonl").read_text()


def test_chats_are_rendered_by_the_models_template(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} w9 {% endfor %}w8"
    options = CompileConfig(sparsity="topk", graphs="entries")
    compiled = compile_model(random_decoder("llama"), options, tokenizer=tokenizer)
    task = own_task(
        write_lines(tmp_path / "t.jsonl", [{"prompt": "w20 w21", "answer": "w7"}]), chat=True
    )
    model = compiled.to_runtime()
    out = tmp_path / "out.jsonl"
    evaluate(model, task, OPTIONS, out=out)
    expected = model.generate([20, 21, 9, 8], mode="full", max_new_tokens=8)
    assert expected.texts is not None
    assert json.loads(out.read_text().splitlines()[1])["text"] == expected.texts[0]


def test_a_chat_without_a_template_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    task = own_task(
        write_lines(tmp_path / "t.jsonl", [{"prompt": "w9", "answer": "w7"}]), chat=True
    )
    with pytest.raises(GenerationError, match="no chat template"):
        evaluate(tiny().model, task, OPTIONS)


def result(problem: int, mode: str, correct: bool, **more: object) -> Result:
    values: dict[str, object] = {"strict": None, "answer": "x", "text": "x", "finish": "eos"}
    values |= {"tokens": 11, "periods": (), "dense": 0, "density": 0.5, "seconds": 1.0, **more}
    values["periods"] = tuple(PeriodSteps(*p) for p in values["periods"])  # type: ignore[attr-defined]
    return Result(problem=str(problem), mode=mode, correct=correct, **values)  # type: ignore[arg-type]


def test_differences_are_paired() -> None:
    """Modes that are right on the same problems differ by nothing, whatever is resampled."""
    right = np.random.default_rng(0).random(50) < 0.5
    both = {m: [result(i, m, bool(r)) for i, r in enumerate(right)] for m in ("full", "sirius")}
    full, sirius = summarise(both)
    assert full.accuracy == sirius.accuracy
    assert full.accuracy.low < full.accuracy.mean < full.accuracy.high
    assert sirius.difference is not None
    assert (sirius.difference.low, sirius.difference.high) == (0.0, 0.0)


def test_intervals_are_as_wide_as_those_of_the_binomial() -> None:
    """Of 400 problems, 300 right: the normal approximation is good to a few thousandths."""
    interval = bootstrap([1.0] * 300 + [0.0] * 100)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert interval.mean == 0.75
    assert interval.low == pytest.approx(0.75 - half, abs=0.006)
    assert interval.high == pytest.approx(0.75 + half, abs=0.006)


def test_a_sequences_last_period_counts_where_it_has_no_other() -> None:
    def of(*periods: tuple[tuple[int, ...], ...]) -> Summary:
        rows = [result(i, "sirius", True, periods=p) for i, p in enumerate(periods)]
        return summarise({"sirius": rows})[0]

    summary = of(((16, 16), (16, 8), (4, 1)), ((16, 6),))
    assert summary.aal == 12
    assert summary.effective_density == (2 * (15 * 0.5 + 1)) / 24
    assert of(((16, 4),)).aal == 4
    assert of(((16, 4), (5, 4, True), (9, 1))).effective_density == (8.5 + 1) / 8  # one looked up
    assert summary.tokens_per_second == 20 / 2


def test_a_file_of_results_is_held_by_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Results({"a": 1}, path) as results:
        results.add([result(0, "full", True, periods=((4, 2), (5, 5, True)))])
    with Results({"a": 1}, path) as results:
        known = result(0, "full", True, periods=((4, 2), (5, 5, True)))
        assert results.done == {("0", "full"): known}
    with pytest.raises(ConfigError, match="a was 1 and is 2 now; b was None and is 'x' now"):
        Results({"a": 2, "b": "x"}, path)
    path.write_text(path.read_text() + '{"problem": 1}\n')
    with pytest.raises(ConfigError, match="line 3: not a result"):
        Results({"a": 1}, path)
