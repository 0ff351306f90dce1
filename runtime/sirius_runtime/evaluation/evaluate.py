"""`evaluate`: a task's problems, answered in several modes and graded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.evaluation.answers import Grade, TextGrader
from sirius_runtime.evaluation.execution import check_can_limit
from sirius_runtime.evaluation.modes import ModeChoice
from sirius_runtime.evaluation.problems import Problem, Task
from sirius_runtime.evaluation.python_answers import CodeGrader
from sirius_runtime.evaluation.results import Result, Results
from sirius_runtime.evaluation.summary import Summary, summarise
from sirius_runtime.prefix import Prefix, shared_prefix

if TYPE_CHECKING:
    from sirius_runtime.model import GenerationOutput, SiriusModel

_WARM_UP = 8  # tokens, before anything is timed
_PREFIX = 32  # tokens, the fewest that are worth it


class EvaluationWarning(UserWarning):
    """An evaluation that goes on, though hardly as it was meant."""


@dataclass(frozen=True)
class EvaluationOptions:
    """`seed`: orders the problems, of which `limit` are taken, and resamples them. `generation`:
    more arguments of `generate`. share_prefix: run what all prompts begin with once.
    allow_code_execution: run the code of answers, in a limited child.
    """

    modes: tuple[ModeChoice, ...]
    batch_size: int = 8
    max_new_tokens: int | None = None
    limit: int | None = None
    seed: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    share_prefix: bool = True
    allow_code_execution: bool = False


@dataclass(frozen=True)
class _Asked:
    """A problem, and its prompt in tokens."""

    problem: Problem
    ids: tuple[int, ...]


def evaluate(
    model: SiriusModel,
    task: Task,
    options: EvaluationOptions,
    *,
    out: Path | None = None,
    identity: Mapping[str, str | None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Summary]:
    """Answers `task` in each mode, batch by batch; returns what each mode came to.

    out: a file of results, to which they are added line by line; those that it has already are not
    computed again. identity: what else results depend on, by name (the artifact's hash); the file
    must have the same. progress: is told how many answers there are, and how many there will be.

    Raises ConfigError and GenerationError before the first answer: for a task that executes code
    without leave, prompts that are too long, a model without a tokenizer, or without a chat
    template where the prompts are chats.
    """
    if task.executes:
        _check_execution(task, options)
    problems = task.chosen(options.limit, options.seed)
    new_tokens = task.new_tokens if options.max_new_tokens is None else options.max_new_tokens
    asked = _encode(model, problems, new_tokens)
    settings = {
        **task.settings,
        **(identity or {}),
        "max_new_tokens": new_tokens,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "share_prefix": options.share_prefix,
        "options": dict(options.generation),
    }
    with Results(settings, out) as results:
        total = len(asked) * len(options.modes)
        batches = [
            (mode, pending)
            for batch in _batches(asked, options.batch_size)
            for mode in options.modes
            if (pending := [a for a in batch if (a.problem.id, mode.name) not in results.done])
        ]
        missing = sum(len(pending) for _, pending in batches)
        progress(total - missing, total)
        if batches:
            _warm_up(model, options, asked[0])
        prefix = _prefix(model, asked) if batches and options.share_prefix else None
        for number, (mode, pending) in enumerate(batches):
            output = model.generate(
                input_ids=[a.ids for a in pending],
                max_new_tokens=new_tokens,
                stop=pending[0].problem.stop,
                prefix=prefix,
                **mode.options,
                # What is measured is the path, whatever it costs here.
                **{"fallback": False, **options.generation},
            )
            assert output.texts is not None
            grades = [
                (a.problem.id, a.problem.grader.grade(text))
                for a, text in zip(pending, output.texts, strict=True)
            ]
            graded = list(results_of(mode.name, output, grades))
            if number == 0:
                _warn_of_patterns(pending, graded)
            results.add(graded)
            missing -= len(pending)
            progress(total - missing, total)
        by_mode = {
            mode.name: [results.done[a.problem.id, mode.name] for a in asked]
            for mode in options.modes
        }
    return summarise(by_mode, options.seed or 0)


def _check_execution(task: Task, options: EvaluationOptions) -> None:
    if not options.allow_code_execution:
        raise ConfigError(
            f"task {task.name} executes the code that the model writes, in a child process with "
            "limits; give --allow-code-execution where you want that"
        )
    for problem in task.problems[:1]:
        assert isinstance(problem.grader, CodeGrader)
        check_can_limit(problem.grader.limits)


def _encode(model: SiriusModel, problems: Sequence[Problem], new_tokens: int) -> list[_Asked]:
    if model.tokenizer is None:
        raise GenerationError(
            "the artifact holds no tokenizer, and an evaluation needs its text; compile the model "
            "with its tokenizer"
        )
    asked = [_Asked(problem, _ids(model, problem)) for problem in problems]
    room = model.program.model.max_seq_len
    for one in asked:
        if len(one.ids) + new_tokens > room:
            raise GenerationError(
                f"problem {one.problem.id!r} has a prompt of {len(one.ids)} tokens: with "
                f"{new_tokens} new ones it is longer than the {room} that the artifact serves "
                "(max_seq_len); lower --max-new-tokens, or --num-shots"
            )
    return asked


def _ids(model: SiriusModel, problem: Problem) -> tuple[int, ...]:
    if isinstance(problem.prompt, str):
        return model.encode(problem.prompt)[0]
    return model.encode(messages=problem.prompt)[0]


def _batches(asked: Sequence[_Asked], size: int) -> Iterator[list[_Asked]]:
    """Batches of problems whose answers end alike."""
    by_stop: dict[tuple[str, ...], list[_Asked]] = {}
    for one in asked:
        by_stop.setdefault(one.problem.stop, []).append(one)
    for group in by_stop.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _prefix(model: SiriusModel, asked: Sequence[_Asked]) -> Prefix | None:
    """What all prompts begin with, where that is worth a run of its own."""
    shared = shared_prefix([one.ids for one in asked])
    return model.prefix(shared) if len(asked) > 1 and len(shared) >= _PREFIX else None


def _warm_up(model: SiriusModel, options: EvaluationOptions, asked: _Asked) -> None:
    """Kernels are built and graphs compiled on first use: not while the clock runs."""
    ids = asked.ids[:_WARM_UP]
    for mode in options.modes:
        model.generate(
            input_ids=[ids],
            max_new_tokens=_WARM_UP,
            fallback=False,
            **mode.options,
            **options.generation,
        )


def results_of(
    mode: str, output: GenerationOutput, grades: Sequence[tuple[str, Grade]]
) -> Iterator[Result]:
    """Each row of a batch, with its problem's name and its grade."""
    stats = output.stats
    seconds = stats.total_seconds - stats.prefill_seconds
    assert output.texts is not None
    for row, (problem, grade) in enumerate(grades):
        tokens = len(output.tokens[row])
        yield Result(
            problem=problem,
            mode=mode,
            correct=grade.correct,
            strict=grade.strict,
            answer=grade.answer,
            text=output.texts[row],
            tokens=tokens,
            finish=str(output.finish_reasons[row]),
            periods=output.steps[row].periods,
            dense=output.steps[row].dense,
            density=stats.density,
            seconds=seconds * (tokens - 1) / max(stats.decoded_tokens, 1),
        )


def _warn_of_patterns(asked: Sequence[_Asked], results: Sequence[Result]) -> None:
    """Says so where a task's own patterns find nothing in the first answers: they may never."""
    patterns = [
        one.problem.grader.pattern
        for one in asked
        if isinstance(one.problem.grader, TextGrader) and one.problem.grader.pattern is not None
    ]
    if len(patterns) == len(results) and all(result.answer is None for result in results):
        warnings.warn(
            f"none of the first {len(results)} answers has what the regex looks for "
            f"({patterns[0].pattern!r}); the first begins {results[0].text[:80]!r}",
            EvaluationWarning,
            stacklevel=3,
        )
