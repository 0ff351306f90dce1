"""HumanEval: extracts the function from a model's answer and runs its tests."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sirius_runtime.evaluation.answers import Grade
from sirius_runtime.evaluation.execution import Limits, run_limited

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Stop strings of a completion, as in the HumanEval paper (Chen et al., 2021)."""

_FENCE = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.S)


@dataclass(frozen=True)
class CodeGrader:
    """Runs an answer and its tests in a limited child process: see `execution`.

    chat: the answer is a text with the code in a fenced block; otherwise it continues `prompt`.
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
        """The program that an answer and the prompt make."""
        if not self.chat:
            return self.prompt + text
        code = fenced(text, self.entry_point)
        function = re.search(rf"^[ \t]*def\s+{re.escape(self.entry_point)}\b", code, re.M)
        if function is None:  # the block has only the function's body
            return self.prompt + code
        # The answer repeats the function but not the imports and helpers before it in the prompt.
        return self.prompt[: self.prompt.rfind(f"def {self.entry_point}")] + "\n" + code


def fenced(text: str, entry_point: str) -> str:
    """The fenced block that defines `entry_point`, else the first one, else the text."""
    blocks = _FENCE.findall(text)
    defining = [block for block in blocks if re.search(rf"\bdef\s+{entry_point}\b", block)]
    return str((defining or blocks or [text])[0])
