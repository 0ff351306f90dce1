"""Problem generator for the shipped model: synthetic reasoning and prompt-understanding tasks.

`reasoning` is in the style of GSM8K: shuffled sentences relate the quantities of several people,
and a question asks for one of them. The answer has one line a step and ends with ``#### N``::

    Q: Hal has 2 fewer than Ann. Ann has 32 hats. How many hats does Hal have?
    A:
     Ann=32
     Hal=32-2=30
    #### 30

The relations form one path that starts at the only absolute quantity. The answer follows that path
to the person asked for, so the text determines every token of the answer. People after the one
asked for are distractors.

`understanding` asks to find, copy or count facts of the text (no arithmetic, one step).

Training and test problems are disjoint: a hash of the problem's text decides its split, whatever
the seed (see `Problem.split`).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

NAMES = (
    "Ann Bob Cal Dan Eve Fay Gus Hal Ida Jon Kim Leo "
    "Mia Ned Ola Pam Quin Roy Sue Tom Una Val Wes Zoe"
).split()
THINGS = "hats pens cups keys eggs nuts pins bags".split()
COLOURS = "red blue green black white".split()
MAX_VALUE = 99
MAX_STEPS = 5
TEST_SHARE = 50  # one problem in TEST_SHARE belongs to the test split


class Task(StrEnum):
    """The two kinds of problem."""

    REASONING = "reasoning"
    UNDERSTANDING = "understanding"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `prompt` ends with ``A:``; `answer` is a newline, lines, and ``#### N``."""

    prompt: str
    answer: str
    steps: int

    @property
    def split(self) -> str:
        """``"test"`` for one problem in `TEST_SHARE`, else ``"train"``; depends on the prompt
        alone.
        """
        digest = hashlib.sha256(self.prompt.encode()).digest()
        return "test" if int.from_bytes(digest[:4], "big") % TEST_SHARE == 0 else "train"


def final_answer(text: str) -> str | None:
    """The number after the last ``####`` of `text`, or None; exact match compares it."""
    found = re.findall(r"#### (\d+)", text)
    return found[-1] if found else None


def _relation(rng: random.Random, value: int) -> tuple[str, str, int]:
    """A relation to a person who has `value`: sentence with {0} and {1}, arithmetic, new value."""
    choices = []
    if value < MAX_VALUE:
        choices.append("more")
    if value > 2:
        choices.append("fewer")
    if value * 2 <= MAX_VALUE:
        choices.append("times")
    match rng.choice(choices):
        case "more":
            n = rng.randint(1, min(30, MAX_VALUE - value))
            return f"{{0}} has {n} more than {{1}}.", f"{value}+{n}", value + n
        case "fewer":
            n = rng.randint(1, min(30, value - 1))
            return f"{{0}} has {n} fewer than {{1}}.", f"{value}-{n}", value - n
        case _:
            n = rng.randint(2, min(5, MAX_VALUE // value))
            return f"{{0}} has {n} times as many as {{1}}.", f"{value}*{n}", value * n


def reasoning_problem(rng: random.Random, steps: int, distractors: int) -> Problem:
    """A problem with `steps` arithmetic steps and `distractors` people who don't matter."""
    people = rng.sample(NAMES, steps + 1 + distractors)
    thing = rng.choice(THINGS)
    value = rng.randint(2, 50)
    facts = [f"{people[0]} has {value} {thing}."]
    lines = [f" {people[0]}={value}"]
    result = value
    for index, (before, person) in enumerate(pairwise(people), start=1):
        sentence, arithmetic, value = _relation(rng, value)
        facts.append(sentence.format(person, before))
        if index <= steps:
            lines.append(f" {person}={arithmetic}={value}")
            result = value
    rng.shuffle(facts)
    prompt = f"Q: {' '.join(facts)} How many {thing} does {people[steps]} have?\nA:"
    return Problem(prompt, "\n" + "\n".join(lines) + f"\n#### {result}", steps)


def understanding_problem(rng: random.Random, facts_count: int) -> Problem:
    """A find, copy or count problem over unrelated facts; the answer quotes the text."""
    people = rng.sample(NAMES, facts_count)
    counts = [rng.randint(2, MAX_VALUE) for _ in people]
    colours = [rng.choice(COLOURS) for _ in people]
    things = [rng.choice(THINGS) for _ in people]
    facts = [
        f"{p} has {n} {c} {t}." for p, n, c, t in zip(people, counts, colours, things, strict=True)
    ]
    chosen = rng.randrange(len(people))
    match rng.choice(["find", "copy", "count"]):
        case "find":
            question = f"How many {things[chosen]} does {people[chosen]} have?"
            lines, result = [f" {people[chosen]}={counts[chosen]}"], counts[chosen]
        case "copy":
            question = f"Copy all facts up to {people[chosen]}."
            lines, result = [f" {fact}" for fact in facts[: chosen + 1]], counts[chosen]
        case _:
            colour = colours[chosen]
            question = f"Count all {colour} facts."
            kept = [fact for fact, c in zip(facts, colours, strict=True) if c == colour]
            lines, result = [f" {fact}" for fact in kept], len(kept)
    prompt = f"Q: {' '.join(facts)} {question}\nA:"
    return Problem(prompt, "\n" + "\n".join(lines) + f"\n#### {result}", 0)


def problems(
    task: Task, split: str, seed: int, max_steps: Callable[[], int] = lambda: MAX_STEPS
) -> Iterator[Problem]:
    """An endless stream of `split` problems of `task`, reproducible from `seed`.

    Steps are uniform in 1..`max_steps()`, with 0-2 distractors (fewer while max_steps is below 3);
    understanding problems hold up to `max_steps() + 2` facts. A curriculum raises `max_steps`.
    """
    rng = random.Random(f"{task}/{seed}")
    while True:
        steps = max_steps()
        if task is Task.REASONING:
            distractors = rng.randint(0, min(2, steps - 1))
            problem = reasoning_problem(rng, rng.randint(1, steps), distractors)
        else:
            problem = understanding_problem(rng, rng.randint(2 + steps // 3, steps + 2))
        if problem.split == split:
            yield problem


def vocabulary() -> list[str]:
    """Every piece of text that `problems` can produce, in a fixed order (see `PIECE_PATTERN`)."""
    pieces = [*"0123456789", *" \n=+-*.?:", "####", "Q", "A"]
    words = (
        "has more fewer than times as many How does have Copy all facts up to Count".split()
        + THINGS
        + COLOURS
        + NAMES
    )
    return pieces + [f" {word}" for word in words]


# A word includes the space before it, so that decoding is concatenation; each digit is a piece.
PIECE_PATTERN = r"\n| ?[A-Za-z]+|\d|#+|[^A-Za-z\d#\n ]| "
