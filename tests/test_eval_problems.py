"""Files of tasks: their prompts, and lines that are refused by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation.answers import Scoring, TextGrader
from sirius_runtime.evaluation.modes import Setting, read_modes
from sirius_runtime.evaluation.problems import gsm8k, humaneval, own_task
from sirius_runtime.request import Mode

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def lines(*objects: object, name: str = "task.jsonl") -> Path:
        path = tmp_path / name
        path.write_text(
            "\n".join(o if isinstance(o, str) else json.dumps(o) for o in objects) + "\n"
        )
        return path

    return lines


def test_a_file_of_ones_own(write: Write) -> None:
    task = own_task(
        write(
            {"prompt": "2+2=", "answer": 4, "scoring": "number", "regex": r"(\d+)", "stop": "\n"},
            "",
            {"id": "b", "messages": [{"role": "user", "content": "hi"}], "answer": ["a", "b"]},
        )
    )
    first, second = task.problems
    assert (first.id, first.prompt, first.stop) == ("1", "2+2=", ("\n",))
    assert isinstance(first.grader, TextGrader)
    assert first.grader.scoring is Scoring.NUMBER
    assert (second.id, second.prompt) == ("b", ({"role": "user", "content": "hi"},))
    assert not task.executes


def test_prompts_become_chats_with_a_system_message(write: Write) -> None:
    task = own_task(write({"prompt": "hi", "answer": "x"}), chat=True, system="Be brief.")
    assert task.problems[0].prompt == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON list"),
        ({"prompt": "x"}, "the field 'answer' is missing"),
        ({"answer": "x"}, "a prompt or messages"),
        ({"prompt": "", "answer": "x"}, "prompt must be a non-empty text"),
        ({"prompt": 3, "answer": "x"}, "prompt must be a non-empty text"),
        ({"prompt": "x", "answer": ""}, "answer must be"),
        ({"prompt": "x", "answer": []}, "answer must be"),
        ({"prompt": "x", "answer": None}, "answer must be"),
        ({"prompt": "x", "answer": True}, "answer must be"),
        ({"prompt": "x", "answer": "y", "scoring": "best"}, "scoring must be exact, number"),
        ({"prompt": "x", "answer": "y", "scoring": "number"}, "contains no number"),
        ({"prompt": "x", "answer": "y", "regex": "("}, "regex '\\(' is not valid"),
        ({"prompt": "x", "answer": "y", "regex": ""}, "regex must be a non-empty text"),
        ({"prompt": "x", "answer": "y", "stop": [""]}, "stop must be"),
        ({"prompt": "x", "answer": "y", "anser": "y"}, "unknown field 'anser'; a line may have"),
        ({"prompt": "x", "messages": [], "answer": "y"}, "either a prompt or messages"),
        ({"messages": [], "answer": "y"}, "messages must be a non-empty list"),
        ({"messages": [{"role": "user"}], "answer": "y"}, "both of them texts"),
        ({"messages": [{"role": "boss", "content": "x"}], "answer": "y"}, "role must be"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "answer": "y"},
            "the last message must have the role user",
        ),
        ({"id": "1", "prompt": "x", "answer": "y"}, "id '1' is also the id of line 1"),
    ],
)
def test_wrong_lines_are_refused_by_file_and_line(write: Write, line: object, reason: str) -> None:
    path = write({"prompt": "x", "answer": "y"}, line)
    with pytest.raises(ConfigError, match=reason) as caught:
        own_task(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_files_that_are_none(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty; write one problem per line"):
        own_task(write(""))
    with pytest.raises(ConfigError, match="can't be read"):
        own_task(tmp_path / "missing.jsonl")


GSM = [{"question": f"How many is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(3)]


def test_gsm8k_after_examples(write: Write) -> None:
    task = gsm8k(write(*GSM[2:]), shots=write(*GSM[:2], name="shots.jsonl"), num_shots=2)
    assert task.problems[0].prompt == (
        "Question: How many is 0?\nAnswer: It is 0.\n#### 0\n\n"
        "Question: How many is 1?\nAnswer: It is 1.\n#### 1\n\n"
        "Question: How many is 2?\nAnswer:"
    )
    assert task.problems[0].stop == ("Question:", "</s>", "<|im_end|>")
    assert task.problems[0].grader.grade(" It is 2.\n#### 2").correct


def test_gsm8k_in_a_chat(write: Write) -> None:
    (problem,) = gsm8k(write(GSM[2]), chat=True).problems
    assert problem.prompt[0]["content"].endswith("your final answer within \\boxed{}.")  # type: ignore[index]
    assert problem.grader.grade(r"\boxed{2}").correct


def test_gsm8k_says_what_it_lacks(write: Write) -> None:
    with pytest.raises(ConfigError, match="--shots"):
        gsm8k(write(*GSM))
    with pytest.raises(ConfigError, match="fewer than --num-shots 8"):
        gsm8k(write(*GSM), shots=write(*GSM, name="shots.jsonl"))
    with pytest.raises(ConfigError, match=r"line 1: the answer must end with '#### N'"):
        gsm8k(write({"question": "x", "answer": "4"}), num_shots=0)
    with pytest.raises(ConfigError, match=r"line 1: the field 'question' is missing"):
        gsm8k(write({"prompt": "x", "answer": "#### 4"}), num_shots=0)


HUMAN = {
    "task_id": "H/0",
    "prompt": "def f(x):\n",
    "test": "def check(c): pass",
    "entry_point": "f",
}


def test_humaneval(write: Write) -> None:
    task = humaneval(write(HUMAN))
    assert task.executes
    assert task.problems[0].prompt == "def f(x):\n"
    assert "\ndef" in task.problems[0].stop
    chat = humaneval(write(HUMAN), chat=True).problems[0]
    assert "```python\ndef f(x):\n\n```" in chat.prompt[0]["content"]  # type: ignore[index]
    assert chat.stop == ()
    with pytest.raises(ConfigError, match="line 1: the prompt defines no function 'g'"):
        humaneval(write(HUMAN | {"entry_point": "g"}))


def test_a_seed_orders_and_a_limit_takes_the_first(write: Write) -> None:
    task = own_task(write(*({"prompt": f"p{n}", "answer": "y"} for n in range(20))))
    assert [p.id for p in task.chosen(3, None)] == ["1", "2", "3"]
    drawn = [p.id for p in task.chosen(None, 5)]
    assert drawn != [p.id for p in task.problems]
    assert sorted(drawn) == sorted(p.id for p in task.problems)
    assert [p.id for p in task.chosen(3, 5)] == drawn[:3]


def test_modes() -> None:
    assert read_modes("full, sirius:.05,sirius,exact") == (
        Setting(Mode.FULL),
        Setting(Mode.SIRIUS, (("threshold", 0.05),)),
        Setting(Mode.SIRIUS),
        Setting(Mode.EXACT),
    )
    assert read_modes("sirius:.05")[0].name == "sirius:0.05"


def test_a_setting_has_one_name_whatever_the_order_of_its_options() -> None:
    (first,), (second,) = map(
        read_modes,
        ("sirius:confidence=.50:.05:period=8", "sirius:threshold=.05:period=8:confidence=.5"),
    )
    assert first == second
    assert first.name == "sirius:0.05:period=8:confidence=0.5"
    assert read_modes(first.name) == (first,)
    expected = {"mode": "sirius", "threshold": 0.05, "period": 8, "confidence": 0.5}
    assert first.arguments == expected
    close = read_modes("sirius:.1000001")[0]
    assert read_modes(close.name) == (close,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fast", "--modes takes"),
        ("", "--modes takes"),
        ("sample", "--modes takes"),
        ("full:.1", "mode full drafts nothing, so threshold has no effect"),
        ("exact:.1", "mode exact has no threshold"),
        ("sirius:x", "threshold takes a number, got 'x'"),
        ("sirius:nan", "threshold must be >= 0"),
        ("sirius:-1", "threshold must be >= 0"),
        ("exact:period=x", "period takes a whole number, got 'x'"),
        ("exact:period=0", "period must be in 1..512, got 0"),
        ("exact:confidence=2", "confidence must be in"),
        ("exact:colour=2", "a setting has threshold, verify_temperature, period"),
        ("sirius:rollback=token", "a setting has threshold"),
        ("sirius:.1:threshold=.2", "gives an option twice"),
        ("full,full", "full twice"),
        ("sirius:.1,sirius:0.1", "sirius:0.1 twice"),
    ],
)
def test_wrong_modes(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_modes(text)
