"""Graders: they extract the final answer from a model's text and compare it with the right one.

GSM8K's few-shot rules and regular expressions are those of lm-evaluation-harness: `strict` takes
the number after the first ``####``, `flexible` the last number-like string of the text. Both are
compared as text, without commas, dollar signs and a final full stop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = [re.compile(p) for p in (",", r"\$", r"(?s).*#### ", r"\.$")]  # in this order

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_BOXED = "\\boxed{"
_LATEX = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{[^{}]*\}|\\[!,;: ]|[${}%]|\\")


@dataclass(frozen=True)
class Grade:
    """`answer`: the answer extracted from the text, None if there is none. `strict`: whether the
    text is right by the task's strict rule; None if the task has only one rule.
    """

    correct: bool
    answer: str | None
    strict: bool | None = None


class Scoring(StrEnum):
    """How the extracted text is compared with the right answers."""

    EXACT = "exact"
    """It equals one of the answers, without the white space around it."""
    NUMBER = "number"
    """Its last number equals an answer's; commas and currency signs are ignored."""
    CONTAINS = "contains"
    """It contains one of the answers."""


@dataclass(frozen=True)
class TextGrader:
    """The grader of a user's own task: compares the last match of `pattern`, or the whole text,
    with `answers`; one of them is enough.
    """

    answers: tuple[str, ...]
    scoring: Scoring = Scoring.EXACT
    pattern: re.Pattern[str] | None = None

    def grade(self, text: str) -> Grade:
        found: str | None = text
        if self.pattern is not None:
            found = last_match(self.pattern, text)
        if found is None:
            return Grade(False, None)
        found = found.strip()
        if self.scoring is Scoring.NUMBER:
            value = last_number(found)
            right = value is not None and value in map(last_number, self.answers)
            return Grade(right, None if value is None else str(value))
        if self.scoring is Scoring.CONTAINS:
            return Grade(any(answer in found for answer in self.answers), found)
        return Grade(found in {answer.strip() for answer in self.answers}, found)


@dataclass(frozen=True)
class FewShotGrader:
    """GSM8K after worked examples: `correct` by the flexible rule, `strict` by the strict one."""

    target: str  # the problem's answer, which ends with ``#### N``

    def grade(self, text: str) -> Grade:
        target = _comparable(self.target)
        strict, flexible = _STRICT.search(text), last_match(_FLEXIBLE, text)
        return Grade(
            correct=flexible is not None and _comparable(flexible) == target,
            answer=flexible,
            strict=strict is not None and _comparable(strict[1]) == target,
        )


@dataclass(frozen=True)
class ChatGrader:
    """GSM8K in a chat: the number in the last ``\\boxed{}``, else after the last ``####``, else the
    last number of the text. `strict` accepts only the box. Compared as numbers.
    """

    target: str

    def grade(self, text: str) -> Grade:
        target = last_number(_comparable(self.target))
        box = boxed(text)
        strict = None if box is None else last_number(box)
        found = strict
        if found is None:
            found = last_number(text.rpartition("####")[2])
        return Grade(
            correct=found is not None and found == target,
            answer=None if found is None else str(found),
            strict=strict is not None and strict == target,
        )


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match's first non-empty group, or the whole match if the pattern has no groups; None
    if there is neither.
    """
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    return next((group for group in last.groups() if group), None) if pattern.groups else last[0]


def last_number(text: str) -> Decimal | None:
    """The last number of a text, in plain or LaTeX notation; None if there is none."""
    numbers = _NUMBER.findall(_LATEX.sub("", text))
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", "")).normalize() + 0
    except InvalidOperation:  # more digits than Decimal represents exactly
        return None


def boxed(text: str) -> str | None:
    """The content of a text's last ``\\boxed{…}``, up to the matching brace; None if there is none
    or it is not closed.
    """
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    begin = start + len(_BOXED)
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[begin:index]
    return None  # the text ends inside the box


def _comparable(answer: str) -> str:
    for ignored in _IGNORED:
        answer = ignored.sub("", answer)
    return answer.strip().lower()
