"""What counts as an answer, and as a right one."""

from __future__ import annotations

import re

import pytest

from sirius_runtime.evaluation.answers import (
    ChatGrader,
    FewShotGrader,
    Grade,
    Scoring,
    TextGrader,
    boxed,
    last_number,
)
from sirius_runtime.evaluation.python_answers import CodeGrader, fenced

TARGET = "So 200,000-130,000=$<<200000-130000=70000>>70,000\n#### 70000"


@pytest.mark.parametrize(
    ("text", "correct", "strict", "answer"),
    [
        ("It is $70,000.\n#### 70000", True, True, "70000"),
        ("#### 70,000", True, True, "70,000"),
        ("#### $70000", True, False, "$70000"),
        ("The profit is $70,000.", True, False, "$70,000."),
        ("#### 70000\n\nQuestion 2", False, True, "2"),
        ("He has 70000 left", True, False, "70000"),
        ("#### -70000", False, False, "-70000"),
        ("seventy thousand", False, False, None),
        ("it is 70000, I think ...", False, False, "..."),  # the harness reads it so, too
    ],
)
def test_few_shot_answers_are_read_as_the_harness_does(
    text: str, correct: bool, strict: bool, answer: str | None
) -> None:
    assert FewShotGrader(TARGET).grade(text) == Grade(correct, answer, strict)


@pytest.mark.parametrize(
    ("text", "correct", "strict"),
    [
        (r"So \boxed{70000}.", True, True),
        (r"First \boxed{3}, then \[ \boxed{\$70{,}000} \]", True, True),
        (r"\boxed{70\,000 \text{ dollars}}", True, True),
        (r"\boxed{70000.00 \text{ for } 2}", False, False),
        (r"\boxed{70000.0\text{ dollars (of 2)}}", True, True),
        ("The answer is 70,000.", True, False),
        ("#### 70000", True, False),
        (r"70000 it is, as \boxed{", True, False),
        (r"\boxed{x} and 7", False, False),
        ("no idea", False, False),
    ],
)
def test_chat_answers_are_compared_as_numbers(text: str, correct: bool, strict: bool) -> None:
    grade = ChatGrader(TARGET).grade(text)
    assert (grade.correct, grade.strict) == (correct, strict)


def test_boxes_pair_their_braces() -> None:
    assert boxed(r"\boxed{1} \boxed{\frac{1}{2}} x}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None
    assert boxed("1") is None


@pytest.mark.parametrize(
    ("text", "number"), [("1,234.50 kg", "1234.5"), ("-3", "-3"), ("40", "40"), ("$.5", "0.5")]
)
def test_numbers(text: str, number: str) -> None:
    assert str(last_number(text)) == number


def test_scorings_of_a_line() -> None:
    assert TextGrader(("Paris", "paris")).grade(" Paris\n").correct
    assert not TextGrader(("Paris",)).grade("It is Paris").correct
    assert TextGrader(("Paris",), Scoring.CONTAINS).grade("It is Paris.").correct
    assert TextGrader(("7.0",), Scoring.NUMBER).grade("3 and then $7").correct
    assert TextGrader(("7",), Scoring.NUMBER).grade("none") == Grade(False, None)


def test_a_regex_takes_its_last_match_and_that_ones_first_group() -> None:
    grader = TextGrader(("8",), pattern=re.compile(r"= ?(\d+)|is (\d+)"))
    assert grader.grade("= 7, so it is 8").correct
    assert grader.grade("nothing") == Grade(False, None)
    assert TextGrader(("ab",), pattern=re.compile("[ab]+")).grade("b ab c").correct


PROMPT = 'import math\n\n\ndef area(r):\n    """Of a circle."""\n'


def test_code_of_a_completion_continues_the_prompt() -> None:
    grader = CodeGrader(PROMPT, "", "area", chat=False)
    assert grader.code("    return r\n") == PROMPT + "    return r\n"


@pytest.mark.parametrize(
    "text",
    [
        "Sure:\n```python\ndef area(r):\n    return math.pi\n```\nDone.",
        "```\nprint(1)\n```\n```py\ndef area(r):\n    return math.pi\n```",
        "def area(r):\n    return math.pi",
        "```python\ndef area(r):\n    return math.pi",  # cut short
    ],
)
def test_code_of_a_chat_is_the_fenced_function_with_the_prompts_imports(text: str) -> None:
    code = CodeGrader(PROMPT, "", "area", chat=True).code(text)
    assert code == "import math\n\n\n\ndef area(r):\n    return math.pi"


def test_a_fenced_body_continues_the_prompt() -> None:
    grader = CodeGrader(PROMPT, "", "area", chat=True)
    assert grader.code("```python\n    return r\n```") == PROMPT + "    return r"


def test_the_first_block_serves_where_none_defines_the_function() -> None:
    assert fenced("```\na\n```\n```\nb\n```", "f") == "a"
