"""`sirius trace`: what the terminal shows, the file of records, and the page, which a browser opens
where there is one.
"""

from __future__ import annotations

import html
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime import load
from sirius_runtime.cli.trace_page import page
from sirius_runtime.cli.trace_view import View, probability
from sirius_runtime.decoder import Way
from sirius_runtime.model import GenerationOutput, SiriusModel, Tracing
from sirius_runtime.tensor_state import TensorState
from sirius_runtime.trace import Emitted, Finding, Kind, Step
from tests.support.browser import Reader, look
from tests.support.cli import Cli

PROMPT = next(problems(Task.REASONING, "test", seed=11)).prompt
HOSTILE = "</style><script>document.title='owned'</script><img src=//x onerror=y>\x1b[2J\u202e&\"'"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = CompileConfig(sparsity="griffin", keep=0.4, graphs="entries")
    path = tmp_path_factory.mktemp("artifact") / "tally.sirius"
    return compile_model("tally-3m", options).save(path)


@pytest.fixture(scope="module")
def model(artifact: Path) -> SiriusModel:
    return load(artifact, dtype="float32")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def traced(model: SiriusModel, **options: Any) -> GenerationOutput:
    asked = {"period": 8, "max_new_tokens": 60, "trace": Tracing(check_kv=True)} | options
    return model.generate(PROMPT, **asked)


def hostile(output: GenerationOutput) -> GenerationOutput:
    """The output with texts that a browser and a terminal would obey."""
    assert output.trace is not None
    steps = [
        replace(
            step,
            draft=tuple(replace(one, text=HOSTILE) for one in step.draft),
            emitted=replace(step.emitted, text=HOSTILE),
            reason=HOSTILE,
            findings=(
                Finding(Kind.UNDER_CORRECTION, 1, 7, HOSTILE, 0.2, Emitted(8, HOSTILE, 0.7), True),
            ),
        )
        for step in output.trace.steps
    ]
    steps.append(replace(steps[0], way=Way.DENSE, draft=(), number=len(steps) + 1))
    model = output.trace.model | {"source": HOSTILE, "dtype": HOSTILE}
    settings = output.trace.settings | {"processing": HOSTILE, HOSTILE: HOSTILE}
    trace = replace(
        output.trace, steps=tuple(steps), model=model, settings=settings, prompt_text=HOSTILE
    )
    return replace(output, trace=trace)


def test_the_command_writes_what_happened(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    out, page_file = tmp_path / "trace.jsonl", tmp_path / "trace.html"
    flags = ("--period", "8", "--dtype", "float32", "--max-new-tokens", "60", "--check-kv")
    done = cli.run("trace", artifact, "-p", PROMPT, *flags, "--out", out, "--html", page_file)
    assert done.code == 0, done.err
    asked = (artifact, "-p", PROMPT, *flags[:-1], "--json")
    answer = json.loads(cli.run("run", *asked).out)
    header, prefill, *steps, cache, end = map(json.loads, out.read_text().splitlines())
    assert [one["type"] for one in (header, prefill, cache, end)] == [
        *("header", "prefill", "cache", "end")
    ]
    assert {step["type"] for step in steps} == {"period"}
    tokens = [token for record in (prefill, *steps) for token in record["tokens"]]
    assert tokens == answer["tokens"]
    assert end["tokens"] == len(tokens)
    assert end["steps"] == len(steps) == answer["stats"]["periods"]
    assert cache["inconsistent"] == 0
    assert header["model"]["source"] == "tally-3m"
    assert header["settings"]["period"] == 8
    assert header["prompt_text"].endswith(PROMPT)
    assert set(steps[0]) == {
        *("type", "number", "position", "period", "width", "draft", "emitted", "corrects"),
        *("advance", "tokens", "seconds", "reason", "looked_up", "findings"),
    }
    assert set(steps[0]["draft"][0]) == {
        *("node", "parent", "depth", "token", "text", "full", "sparse", "likeliest", "fate")
    }
    # The terminal's view: all of the answer, and each refusal.
    assert "\x1b" not in done.out
    assert done.out.count("\n      refused ") == sum(step["corrects"] for step in steps) > 0
    assert f"K/V cache: {cache['slots']} slots of 5 layers match a dense run" in done.out
    assert "AAL" in done.err
    assert "<title>tally-3m traced</title>" in page_file.read_text()


def test_marks_without_colours_and_colours_without_marks(model: SiriusModel) -> None:
    output = traced(model)
    assert output.trace is not None
    step = next(step for step in output.trace.steps if step.corrects and step.kept)
    kept = "".join(one.text or "" for one in step.kept).replace("\n", "\\n")
    plain, colour = View(colour=False).step(step), View(colour=True).step(step)
    assert f"{kept}[-" in plain
    assert "-]{+" in plain
    assert "\x1b" not in plain
    assert "\x1b[31;9m" in colour
    assert "\x1b[1;33m" in colour
    assert "[-" not in colour


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_when_there_are_colours(
    cli: Cli,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    environment: dict[str, str],
    coloured: bool,
) -> None:
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    done = cli.run("trace", artifact, "-p", PROMPT, "--max-new-tokens", "8", "--period", "4")
    assert done.code == 0, done.err
    assert ("\x1b[" in done.out) is coloured


def test_what_a_terminal_would_obey_is_escaped(model: SiriusModel) -> None:
    output = hostile(traced(model))
    assert output.trace is not None
    for step in output.trace.steps:
        shown = View(colour=False).step(step)
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "\\x1b[2J\\u202e" in shown
        coloured = re.sub(r"\x1b\[[\d;]*m", "", View(colour=True).step(step))
        assert "\x1b" not in coloured


def test_a_broken_cache_ends_the_command_as_a_bug(
    cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TensorState.commit

    def commit(state: TensorState, advance: Any, root_B: Any) -> None:
        real(state, advance, root_B)
        state.v_cache[3, 0, :, 60] = 0.0

    monkeypatch.setattr(TensorState, "commit", commit)
    out, page_file = tmp_path / "trace.jsonl", tmp_path / "trace.html"
    flags = ("--period", "8", "--dtype", "float32", "--check-kv", "--out", out, "--html", page_file)
    done = cli.run("trace", artifact, "-p", PROMPT, *flags)
    assert done.code == 70
    assert "cache inconsistency: v of layer 3, slot 60, differs by " in done.out
    assert "the K/V cache differs from that of a dense run" in done.err
    cache = json.loads(out.read_text().splitlines()[-2])
    assert cache["inconsistent"] >= 1
    found = [(one["tensor"], one["layer"], one["slot"]) for one in cache["differences"]]
    assert ("v", 3, 60) in found
    assert "v of layer 3, slot 60" in page_file.read_text()


def test_probabilities_are_short() -> None:
    values = (None, 1.0, 0.99951, 0.9731, 0.05, 0.0004, 0.0)
    shown = ("-", "1.00", "1.00", ".973", ".050", "4e-04", "0e+00")
    assert tuple(map(probability, values)) == shown


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_the_page_needs_nothing_and_runs_nothing(model: SiriusModel, width: int, bad: bool) -> None:
    output = traced(model, tree_width=width)
    text = page(hostile(output) if bad else output, model.tokenizer)
    Reader.check(text)
    assert "\x1b" not in text
    if not bad:
        shown = re.findall(r'<pre class="answer">(.*?)</pre>', text, re.DOTALL)[-1]
        assert output.texts is not None
        assert html.unescape(re.sub("<[^>]*>", "", shown)) == output.texts[0]


def test_a_page_without_a_tokenizer_has_numbers(model: SiriusModel) -> None:
    alone = SiriusModel(model.backend, None)
    output = alone.generate(input_ids=[[5, 6, 7]], max_new_tokens=12, period=4, trace=True)
    assert f"#{output.tokens[0][3]}" in page(output, None)


@pytest.mark.slow  # it starts a browser
@pytest.mark.parametrize("bad", [False, True])
def test_a_browser_shows_it(model: SiriusModel, tmp_path: Path, bad: bool) -> None:
    output = traced(model)
    file = tmp_path / "trace.html"
    file.write_text(page(hostile(output) if bad else output, model.tokenizer))
    seen = look(file, tmp_path)
    assert "<title>owned</title>" not in seen.document
    assert seen.document.count('class="chip kept"') > 10
    assert "<script" not in seen.document
    assert seen.colours > 50  # the style sheet passes its own policy


def test_an_answer_of_one_token(model: SiriusModel) -> None:
    output = traced(model, max_new_tokens=1)
    assert output.trace is not None
    assert output.trace.steps == ()
    assert output.trace.cache is not None
    assert output.trace.cache.slots == len(output.prompts[0])
    assert "<article" not in page(output, model.tokenizer)


def test_steps_are_told_apart(model: SiriusModel) -> None:
    output = traced(model)
    assert output.trace is not None
    step: Step = replace(
        output.trace.steps[0], way=Way.DENSE, draft=(), reason="drafts did not pay", corrects=False
    )
    assert "dense step" in View(colour=False).step(step)
    assert "drafts did not pay" in View(colour=False).step(step)
    text = page(replace(output, trace=replace(output.trace, steps=(step,))), model.tokenizer)
    assert "dense step: drafts did not pay" in text
