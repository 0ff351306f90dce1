"""Tasks: problems with their prompts and graders, read from the user's files.

A file has one JSON object per line. A faulty line raises an error that names the file and the line,
before the model answers anything.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sirius_runtime.command_line import read_text_file
from sirius_runtime.errors import ConfigError, shown
from sirius_runtime.evaluation.answers import ChatGrader, FewShotGrader, Grade, Scoring, TextGrader
from sirius_runtime.evaluation.execution import Limits
from sirius_runtime.evaluation.python_answers import STOPS, CodeGrader

Messages = tuple[Mapping[str, str], ...]
Settings = Mapping[str, str | int | bool | None]

_GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>")
_GSM8K_CHAT = (
    "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
)
_HUMANEVAL_CHAT = (
    "Write a solution to the following problem and make sure that it passes the tests:\n"
    "```python\n{prompt}\n```\n"
)
_FIELDS = ("id", "prompt", "messages", "answer", "regex", "scoring", "stop")
_ROLES = ("system", "user", "assistant")


class Grader(Protocol):
    """Judges an answer's text."""

    def grade(self, text: str) -> Grade: ...


@dataclass(frozen=True)
class Problem:
    """`prompt`: text, or the messages of a chat. `stop`: strings that end an answer."""

    id: str
    prompt: str | Messages
    grader: Grader
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """settings: everything that the problems depend on (names, numbers, SHA-256 of files), for the
    header of the results. new_tokens: the default length limit of an answer. executes: whether
    grading executes the answers' code.
    """

    name: str
    problems: tuple[Problem, ...]
    settings: Settings
    new_tokens: int
    executes: bool = False

    def chosen(self, limit: int | None, seed: int | None) -> tuple[Problem, ...]:
        """The first `limit` problems, shuffled by `seed` if one is given."""
        problems = list(self.problems)
        if seed is not None:
            random.Random(seed).shuffle(problems)
        return tuple(problems[:limit])


@dataclass(frozen=True)
class Line:
    """One JSON object of a file."""

    file: Path
    number: int
    fields: Mapping[str, Any]

    def fault(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.file}, line {self.number}: {reason}")

    def text(self, name: str) -> str:
        """The text of a required field. Raises ConfigError if it is missing, empty or no text."""
        if name not in self.fields:
            raise self.fault(
                f"the field {name!r} is missing (there are: {', '.join(self.fields) or 'none'}); "
                "add it"
            )
        value = self.fields[name]
        if not isinstance(value, str) or not value.strip():
            raise self.fault(f"{name} must be a non-empty text, got {shown(str(value))}")
        return value


def read_lines(file: Path) -> tuple[list[Line], str]:
    """The objects of a JSONL file, without blank lines, and the SHA-256 of its text.

    Raises ConfigError for a file that can't be read, a line that is no JSON object, or no lines.
    """
    text = read_text_file(file, str(file))
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{file}, line {number}: not valid JSON ({error}); each line must be one JSON "
                "object"
            ) from error
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{file}, line {number}: a JSON {type(fields).__name__} instead of an object "
                "({…}); each line must be one JSON object"
            )
        lines.append(Line(file, number, fields))
    if not lines:
        raise ConfigError(f"{file} is empty; write one problem per line, as a JSON object")
    return lines, hashlib.sha256(text.encode()).hexdigest()


def own_task(file: Path, *, chat: bool = False, system: str | None = None) -> Task:
    """The task of a user's own file, in the format of docs/eval.md."""
    lines, digest = read_lines(file)
    return Task(
        str(file),
        _distinct([_own(line, chat, system) for line in lines], lines),
        {"task": "file", "data": digest, "chat": chat, "system": system},
        new_tokens=512,
    )


def gsm8k(
    data: Path,
    *,
    shots: Path | None = None,
    num_shots: int = 8,
    chat: bool = False,
    system: str | None = None,
) -> Task:
    """GSM8K, from a file with the fields question and answer. Each question follows the first
    `num_shots` worked examples of the file `shots`; a chat has no examples.
    """
    lines, digest = read_lines(data)
    settings: Settings = {"task": "gsm8k", "data": digest, "chat": chat, "system": system}
    if chat:
        problems = [
            Problem(
                _id(line),
                _chat(_GSM8K_CHAT.format(question=line.text("question")), system),
                ChatGrader(_gsm8k_answer(line)),
            )
            for line in lines
        ]
        return Task("gsm8k", _distinct(problems, lines), settings, new_tokens=512)
    examples, settings = "", {**settings, "num_shots": num_shots}
    if num_shots:
        if shots is None:
            raise ConfigError(
                f"--task gsm8k with {num_shots} worked examples needs a file of them: give --shots "
                "FILE.jsonl (fields question and answer, for instance of the training set), "
                "--num-shots 0, or --chat"
            )
        worked, digest = read_lines(shots)
        if len(worked) < num_shots:
            raise ConfigError(
                f"{shots} has {len(worked)} examples, fewer than --num-shots {num_shots}; add "
                "examples, or lower --num-shots"
            )
        settings = {**settings, "shots": digest}
        examples = "".join(
            f"Question: {line.text('question')}\nAnswer: {_gsm8k_answer(line)}\n\n"
            for line in worked[:num_shots]
        )
    problems = [
        Problem(
            _id(line),
            f"{examples}Question: {line.text('question')}\nAnswer:",
            FewShotGrader(_gsm8k_answer(line)),
            _GSM8K_STOPS,
        )
        for line in lines
    ]
    return Task("gsm8k", _distinct(problems, lines), settings, new_tokens=256)


def humaneval(
    data: Path,
    *,
    chat: bool = False,
    system: str | None = None,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
) -> Task:
    """HumanEval, from a file with the fields task_id, prompt, test and entry_point. An answer
    continues the prompt or, in a chat, has the function in a fenced block.
    """
    lines, digest = read_lines(data)
    problems = []
    for line in lines:
        prompt, entry_point = line.text("prompt"), line.text("entry_point")
        if not re.search(rf"def\s+{re.escape(entry_point)}\b", prompt):
            raise line.fault(f"the prompt defines no function {shown(entry_point)} (entry_point)")
        grader = CodeGrader(prompt, line.text("test"), entry_point, chat, limits)
        asked: str | Messages = prompt
        if chat:
            asked = _chat(_HUMANEVAL_CHAT.format(prompt=prompt), system)
        problems.append(Problem(_id(line), asked, grader, () if chat else STOPS))
    return Task(
        "humaneval",
        _distinct(problems, lines),
        {
            "task": "humaneval",
            "data": digest,
            "chat": chat,
            "system": system,
            "code_seconds": round(limits.seconds),
            "code_memory": limits.memory,
        },
        new_tokens=512,
        executes=True,
    )


def _own(line: Line, chat: bool, system: str | None) -> Problem:
    unknown = [name for name in line.fields if name not in _FIELDS]
    if unknown:
        raise line.fault(
            f"unknown field {', '.join(map(shown, unknown))}; a line may have {', '.join(_FIELDS)}"
        )
    if ("prompt" in line.fields) == ("messages" in line.fields):
        raise line.fault("it needs either a prompt or messages")
    prompt: str | Messages
    if "messages" in line.fields:
        prompt = _messages(line)
        if system is not None and prompt[0]["role"] != "system":
            prompt = ({"role": "system", "content": system}, *prompt)
    else:
        prompt = line.text("prompt")
        if chat:
            prompt = _chat(prompt, system)
    stop = line.fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise line.fault("stop must be a non-empty text, or a list of non-empty texts")
    return Problem(_id(line), prompt, _grader(line), tuple(stops))


def _grader(line: Line) -> TextGrader:
    if "answer" not in line.fields:
        raise line.fault(
            "the field 'answer' is missing: the right answer, or a list of them; add it"
        )
    given = line.fields["answer"]
    items = given if isinstance(given, list) else [given]
    if not items or not all(_is_answer(item) for item in items):
        raise line.fault(
            f"answer must be a text, a number, or a list of them, got {shown(json.dumps(given))}"
        )
    answers = tuple(map(str, items))
    scoring = line.fields.get("scoring", str(Scoring.EXACT))
    if scoring not in list(Scoring):
        raise line.fault(f"scoring must be {', '.join(Scoring)}, got {shown(str(scoring))}")
    grader = TextGrader(answers, Scoring(scoring), _pattern(line))
    if grader.scoring is Scoring.NUMBER and not all(
        TextGrader((answer,), Scoring.NUMBER).grade(answer).correct for answer in answers
    ):
        raise line.fault(
            f"scoring is number, but the answer {shown(json.dumps(given))} contains no number"
        )
    return grader


def _is_answer(item: Any) -> bool:
    return not isinstance(item, bool) and (
        isinstance(item, int | float) or (isinstance(item, str) and bool(item.strip()))
    )


def _pattern(line: Line) -> re.Pattern[str] | None:
    if "regex" not in line.fields:
        return None
    text = line.text("regex")
    try:
        return re.compile(text)
    except re.error as error:
        raise line.fault(f"regex {shown(text)} is not valid ({error}); correct it") from error


def _messages(line: Line) -> Messages:
    given = line.fields["messages"]
    if not isinstance(given, list) or not given:
        raise line.fault("messages must be a non-empty list of {role, content}")
    for message in given:
        if (
            not isinstance(message, dict)
            or message.keys() != {"role", "content"}
            or not all(isinstance(value, str) for value in message.values())
        ):
            raise line.fault(
                "a message must be {role, content}, both of them texts, got "
                f"{shown(json.dumps(message))}"
            )
        if message["role"] not in _ROLES:
            raise line.fault(
                f"a message's role must be {', '.join(_ROLES)}, got {shown(message['role'])}"
            )
    if given[-1]["role"] != "user":
        raise line.fault("the last message must have the role user: the model answers it")
    return tuple(given)


def _chat(text: str, system: str | None) -> Messages:
    start = () if system is None else ({"role": "system", "content": system},)
    return (*start, {"role": "user", "content": text})


def _id(line: Line) -> str:
    """The problem's id: its field `id` or `task_id`, else its line number."""
    given = line.fields.get("id", line.fields.get("task_id"))
    return str(line.number if given is None else given)


def _gsm8k_answer(line: Line) -> str:
    answer = line.text("answer")
    if not re.search(r"#### -?[0-9.,]+\s*$", answer):
        raise line.fault(
            f"the answer must end with '#### N', as GSM8K's do, got {shown(answer[-40:])}"
        )
    return answer


def _distinct(problems: Sequence[Problem], lines: Sequence[Line]) -> tuple[Problem, ...]:
    """The problems. Raises ConfigError if two have the same id, which identifies results."""
    first: dict[str, int] = {}
    for problem, line in zip(problems, lines, strict=True):
        if problem.id in first:
            raise line.fault(
                f"id {shown(problem.id)} is also the id of line {first[problem.id]}; give each "
                "line its own"
            )
        first[problem.id] = line.number
    return tuple(problems)
