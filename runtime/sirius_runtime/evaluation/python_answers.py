"""HumanEval: the function in a model's answer, and the program that tests it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sirius_runtime.evaluation.answers import Grade
from sirius_runtime.evaluation.execution import Limits, run_limited

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends: those of lm-evaluation-harness and of the paper that made HumanEval."""

_FENCE = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.S)


@dataclass(frozen=True)
class CodeGrader:
    """Runs an answer and its tests in a limited child: see `execution`.

    chat: the answer is a text with the code in a fenced block; else it continues `prompt`.
    """

    prompt: str
    test: str
    entry_point: str
    chat: bool
    limits: Limits = Limits()  # noqa: RUF009  (frozen)

    def grade(self, text: str) -> Grade:
        code = self.code(text)
        outcome = run_limited(f"{code}\n{self.test}\ncheck({self.entry_point})\n", self.limits)
        return Grade(outcome.passed, outcome.reason)

    def code(self, text: str) -> str:
        """The program that an answer makes."""
        if not self.chat:
            return self.prompt + text
        code = fenced(text, self.entry_point)
        function = re.search(rf"^[ \t]*def\s+{re.escape(self.entry_point)}\b", code, re.M)
        if function is None:  # the function's body alone
            return self.prompt + code
        # Imports and helpers of the prompt: answers repeat the function and leave them out.
        return self.prompt[: self.prompt.rfind(f"def {self.entry_point}")] + "\n" + code


def fenced(text: str, entry_point: str) -> str:
    """The fenced block that defines `entry_point`, else the first one, else the text."""
    blocks = _FENCE.findall(text)
    defining = [block for block in blocks if re.search(rf"\bdef\s+{entry_point}\b", block)]
    return str((defining or blocks or [text])[0])
