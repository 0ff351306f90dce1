"""`evaluate`: answers a task's problems in several modes, and grades the answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.evaluation.answers import Grade, TextGrader
from sirius_runtime.evaluation.execution import check_can_limit
from sirius_runtime.evaluation.modes import Setting
from sirius_runtime.evaluation.problems import Problem, Task
from sirius_runtime.evaluation.python_answers import CodeGrader
from sirius_runtime.evaluation.results import Result, Results
from sirius_runtime.evaluation.summary import Summary, summarise
from sirius_runtime.prefix import Prefix, shared_prefix

if TYPE_CHECKING:
    from sirius_runtime.model import GenerationOutput, SiriusModel

_WARM_UP = 8  # prompt tokens and new tokens of the run before the timed ones
_PREFIX = 32  # tokens: a shorter common prefix is not prefilled separately


class EvaluationWarning(UserWarning):
    """The evaluation goes on, but its settings are probably wrong."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `evaluate`. modes: the settings to compare. limit: how many problems to answer.
    seed: shuffles the problems before `limit` is applied, and seeds the bootstrap. generation:
    further arguments of `generate` in all modes; a setting's own options win. share_prefix:
    prefill the prompts' common prefix only once. allow_code_execution: run the code of answers, in
    a limited child process.
    """

    modes: tuple[Setting, ...]
    batch_size: int = 8
    max_new_tokens: int | None = None
    limit: int | None = None
    seed: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    share_prefix: bool = True
    allow_code_execution: bool = False


@dataclass(frozen=True)
class _Asked:
    """A problem, and the token ids of its prompt."""

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
    """Answers `task` in each mode, batch by batch; returns one summary per mode.

    out: a file to which results are appended line by line; results that it already has are not
    computed again. identity: further settings that results depend on, by name (such as the
    artifact's hash); the file must have been written with the same. progress: called with the
    number of answers so far and in all.

    Before the first answer, raises ConfigError for a task that executes code if that is not
    allowed and for a setting that the model can't run, and GenerationError for prompts that are too
    long, or for a model without the tokenizer or chat template that the prompts need.
    """
    if task.executes:
        _check_execution(task, options)
    problems = task.chosen(options.limit, options.seed)
    new_tokens = task.new_tokens if options.max_new_tokens is None else options.max_new_tokens
    for mode in options.modes:
        mode.check(model)
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
            models = {mode: mode.on(model) for mode in options.modes}
            _warm_up(models, options, asked[0])
        prefix = _prefix(model, asked) if batches and options.share_prefix else None
        for number, (mode, pending) in enumerate(batches):
            output = models[mode].generate(
                input_ids=[a.ids for a in pending],
                max_new_tokens=new_tokens,
                stop=pending[0].problem.stop,
                prefix=prefix,
                # The method itself is measured, so it always drafts by default.
                **{"fallback": False, **options.generation, **mode.arguments},
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
            "limits; give --allow-code-execution if you want that"
        )
    for problem in task.problems[:1]:
        assert isinstance(problem.grader, CodeGrader)
        check_can_limit(problem.grader.limits)


def _encode(model: SiriusModel, problems: Sequence[Problem], new_tokens: int) -> list[_Asked]:
    if model.tokenizer is None:
        raise GenerationError(
            "the artifact has no tokenizer, which an evaluation needs; compile the model with its "
            "tokenizer"
        )
    asked = [_Asked(problem, _ids(model, problem)) for problem in problems]
    room = model.program.model.max_seq_len
    for one in asked:
        if len(one.ids) + new_tokens > room:
            raise GenerationError(
                f"problem {one.problem.id!r} has a prompt of {len(one.ids)} tokens: with "
                f"{new_tokens} new tokens it exceeds the artifact's max_seq_len of {room}; lower "
                "--max-new-tokens or --num-shots"
            )
    return asked


def _ids(model: SiriusModel, problem: Problem) -> tuple[int, ...]:
    if isinstance(problem.prompt, str):
        return model.encode(problem.prompt)[0]
    return model.encode(messages=problem.prompt)[0]


def _batches(asked: Sequence[_Asked], size: int) -> Iterator[list[_Asked]]:
    """Batches of at most `size` problems with the same stop strings."""
    by_stop: dict[tuple[str, ...], list[_Asked]] = {}
    for one in asked:
        by_stop.setdefault(one.problem.stop, []).append(one)
    for group in by_stop.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _prefix(model: SiriusModel, asked: Sequence[_Asked]) -> Prefix | None:
    """The K/V of the prompts' common prefix; None if it is too short to be worth it."""
    shared = shared_prefix([one.ids for one in asked])
    return model.prefix(shared) if len(asked) > 1 and len(shared) >= _PREFIX else None


def _warm_up(
    models: Mapping[Setting, SiriusModel], options: EvaluationOptions, asked: _Asked
) -> None:
    """Runs each setting once, so that building kernels and compiling graphs is not timed."""
    ids = asked.ids[:_WARM_UP]
    for mode, model in models.items():
        given = {"fallback": False, **options.generation, **mode.arguments}
        model.generate(input_ids=[ids], max_new_tokens=_WARM_UP, **given)


def results_of(
    mode: str, output: GenerationOutput, grades: Sequence[tuple[str, Grade]]
) -> Iterator[Result]:
    """The results of a batch's rows; `grades` has each row's problem id and grade."""
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
    """Warns if a task's own patterns match none of the first answers: they may be wrong."""
    patterns = [
        one.problem.grader.pattern
        for one in asked
        if isinstance(one.problem.grader, TextGrader) and one.problem.grader.pattern is not None
    ]
    if len(patterns) == len(results) and all(result.answer is None for result in results):
        warnings.warn(
            f"the task's regex {patterns[0].pattern!r} matches none of the first {len(results)} "
            f"answers; check it. The first answer begins {results[0].text[:80]!r}",
            EvaluationWarning,
            stacklevel=3,
        )
