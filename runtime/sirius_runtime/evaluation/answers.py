"""The final answer in a model's text: how it is found, and when it is right.

GSM8K's few-shot rules are those of lm-evaluation-harness, regular expressions included: `strict`
takes the number after the first ``####``, `flexible` the last thing in the text that looks like a
number. Both are compared as text, without commas, dollar signs and a full stop at the end.
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
    """`answer`: what was found in the text, None where nothing was. `strict`: whether it is right
    by the task's strict rule; None where it has one rule alone.
    """

    correct: bool
    answer: str | None
    strict: bool | None = None


class Scoring(StrEnum):
    """When what was found is right."""

    EXACT = "exact"
    """It is one of the answers, but for white space around it."""
    NUMBER = "number"
    """Its last number is that of the answer: commas and currency signs do not count."""
    CONTAINS = "contains"
    """One of the answers stands in it."""


@dataclass(frozen=True)
class TextGrader:
    """Of a line of a task's own file: any of `answers`, in what `pattern` finds last."""

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
    """GSM8K after worked examples: `flexible` counts, `strict` is told beside it."""

    target: str  # the data's answer, which ends with ``#### N``

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
    last one in the text; `strict` is the box alone. Compared as numbers.
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
    """The last match's first group that is not empty, or all of it where it has no groups."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    return next((group for group in last.groups() if group), None) if pattern.groups else last[0]


def last_number(text: str) -> Decimal | None:
    """The last number in a text, in plain or LaTeX notation; None where there is none."""
    numbers = _NUMBER.findall(_LATEX.sub("", text))
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", "")).normalize() + 0
    except InvalidOperation:  # more digits than Decimal counts exactly
        return None


def boxed(text: str) -> str | None:
    """What the last ``\\boxed{…}`` of a text holds, braces within it paired."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    begin = start + len(_BOXED)
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[begin:index]
    return None  # the answer was cut short within it


def _comparable(answer: str) -> str:
    for ignored in _IGNORED:
        answer = ignored.sub("", answer)
    return answer.strip().lower()
