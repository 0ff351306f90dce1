"""`sirius eval --task lm-eval:NAME`: runs a task of lm-evaluation-harness in several modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation.answers import Grade
from sirius_runtime.evaluation.evaluate import EvaluationOptions, results_of
from sirius_runtime.evaluation.summary import Summary, summarise

if TYPE_CHECKING:
    from sirius_runtime.model import GenerationOutput, SiriusModel

_UNGRADED = ("", Grade(False, None))  # the harness grades


@dataclass(frozen=True)
class HarnessScore:
    """A metric of a task in one mode, with the harness's standard error, and the speed of the
    mode's answers. The last three are None for tasks that generate nothing.
    """

    mode: str
    task: str
    metric: str
    value: float
    stderr: float | None
    aal: float | None
    effective_density: float | None
    tokens_per_second: float | None


def evaluate_by_harness(
    model: SiriusModel,
    task: str,
    options: EvaluationOptions,
    *,
    num_shots: int | None = None,
    chat: bool = False,
    system: str | None = None,
    include: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[HarnessScore]:
    """Runs the harness once per mode. include: a folder with the user's own tasks.

    Raises ConfigError if the harness is not installed or has no such task.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--task lm-eval:… needs lm-evaluation-harness: pip install lm-eval, or give a file"
        )
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from sirius_runtime.lm_eval import SiriusLM

    manager = TaskManager(include_path=include)
    if task not in manager.all_tasks:
        raise ConfigError(
            f"lm-evaluation-harness has no task {task!r}; `lm_eval ls tasks` lists them"
        )
    scores = []
    for number, mode in enumerate(options.modes):
        progress(number, len(options.modes))
        lm = SiriusLM(
            model, batch_size=options.batch_size, **{**options.generation, **mode.arguments}
        )
        if options.max_new_tokens is not None:
            lm.max_gen_toks = options.max_new_tokens
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            num_fewshot=num_shots,
            limit=options.limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=system,
            task_manager=manager,
            confirm_run_unsafe_code=False,
            log_samples=False,
        )
        scores += _scores(mode.name, found["results"], lm.outputs)
    progress(len(options.modes), len(options.modes))
    return scores


def _scores(
    mode: str, by_task: dict[str, dict[str, Any]], outputs: Sequence[GenerationOutput]
) -> list[HarnessScore]:
    """The harness's metrics, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    cost = _cost(mode, outputs)
    return [
        HarnessScore(
            mode=mode,
            task=task,
            metric=name,
            value=float(value),
            stderr=_number(metrics.get(_stderr_of(name))),
            aal=None if cost is None else cost.aal,
            effective_density=None if cost is None else cost.effective_density,
            tokens_per_second=None if cost is None else cost.tokens_per_second,
        )
        for task, metrics in by_task.items()
        for name, value in metrics.items()
        if "," in name and "_stderr," not in name and _number(value) is not None
    ]


def _cost(mode: str, outputs: Sequence[GenerationOutput]) -> Summary | None:
    results = [
        result
        for output in outputs
        for result in results_of(mode, output, [_UNGRADED] * len(output.tokens))
    ]
    return summarise({mode: results})[0] if results else None


def _stderr_of(name: str) -> str:
    metric, _, after = name.partition(",")
    return f"{metric}_stderr,{after}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
