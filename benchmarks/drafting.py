"""The gain of trees, adaptive drafting, refreshed neurons and the controller on the shipped model.

    python -m benchmarks.drafting --sparsity griffin+teal --problems 60 --timed 4 --keep 0.4

Each row is one setting of `generate` on fresh test problems of one task: exact match, AAL and
effective density over one batch; tokens per second over the first `--timed` problems answered one
at a time, the median, as a ratio to the dense model's and to the fixed chain's (period 16) on the
same problems, interleaved with them in the same run. `auto` depends on timing, so all its problems
are answered one at a time. Each setting first answers with every operator compared with its
reference (`benchmarks.checked`).
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import sys
from dataclasses import dataclass, field

import torch

from benchmarks import checked
from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Problem, Task, final_answer, problems
from sirius_runtime import SiriusModel
from sirius_runtime.command_line import finish, positive_number

MODEL, MAX_NEW_TOKENS = "tally-3m", 110
DENSE = {"mode": "full"}
CHAIN = {"period": 16}
SETTINGS: dict[str, dict[str, object]] = {
    "dense": DENSE,
    "chain, k 16": CHAIN,
    "chain, k 8": {"period": 8},
    "chain, k 4": {"period": 4},
    "tree, w 4": {"tree_width": 4},
    "confidence 0.5": {"confidence": 0.5},
    "confidence 0.9": {"confidence": 0.9},
    "confidence 0.97": {"confidence": 0.97},
    "refresh 1": {"refresh": 1},
    "refresh 4": {"refresh": 4},
    "w 4, confidence 0.5": {"tree_width": 4, "confidence": 0.5},
    "refresh 1, confidence 0.9": {"refresh": 1, "confidence": 0.9},
    "w 4, refresh 1, confidence 0.5": {"tree_width": 4, "refresh": 1, "confidence": 0.5},
    "auto": {"period": "auto"},
    "auto, refresh 1": {"period": "auto", "refresh": 1},
}


@dataclass
class Result:
    """Of one setting: answers, periods, and tokens per second of each timed problem."""

    right: int = 0
    answered: int = 0
    advances: list[tuple[int, float]] = field(default_factory=list)
    aal: float | None = None
    effective: float = 1.0
    speeds: list[float] = field(default_factory=list)

    def answer(self, model: SiriusModel, batch: list[Problem], options: dict[str, object]) -> None:
        """Answers `batch` in one call."""
        output = model.generate(
            [p.prompt for p in batch], max_new_tokens=MAX_NEW_TOKENS, fallback=False, **options
        )
        assert output.texts is not None
        self.answered += len(batch)
        self.right += sum(
            final_answer(text) == final_answer(problem.answer)
            for text, problem in zip(output.texts, batch, strict=True)
        )
        stats = output.stats
        self.advances.append((stats.tokens, stats.effective_density))
        tokens = sum(count for count, _ in self.advances)
        self.effective = sum(count * value for count, value in self.advances) / tokens
        self.aal = stats.aal

    def time(self, model: SiriusModel, problem: Problem, options: dict[str, object]) -> None:
        """Times one problem; its answer is not counted."""
        stats = model.generate(
            problem.prompt, max_new_tokens=MAX_NEW_TOKENS, fallback=False, **options
        ).stats
        self.speeds.append(stats.tokens_per_second)


def measure(model: SiriusModel, batch: list[Problem], timed: int) -> dict[str, Result]:
    """Every setting on one task's problems."""
    for name, options in SETTINGS.items():
        checked.generation(name, model, batch[0].prompt, **options)
    results = {name: Result() for name in SETTINGS}
    for name, options in SETTINGS.items():
        alone = options.get("period") == "auto"
        for part in [[p] for p in batch[:timed]] if alone else [batch]:
            results[name].answer(model, part, options)
    for problem in batch[:timed]:  # interleaved: what slows the machine slows all settings
        for name, options in SETTINGS.items():
            results[name].time(model, problem, options)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=positive_number, default=200)
    parser.add_argument("--timed", type=positive_number, default=16)
    parser.add_argument("--sparsity", default="griffin", choices=["griffin", "griffin+teal"])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.3])
    args = parser.parse_args()
    print(
        f"{MODEL}, {args.sparsity}, float32; {args.problems} problems a task (auto: {args.timed}), "
        f"{args.timed} timed; torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}\n"
    )
    header = ("task", "kept", "setting", "exact match", "AAL", "effective", "x dense", "x chain")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for keep in args.keep:
        compiled = compile_model(MODEL, CompileConfig(sparsity=args.sparsity, keep=keep))
        model = compiled.to_runtime(dtype="float32")
        for task in Task:
            batch = list(itertools.islice(problems(task, "test", seed=10_000), args.problems))
            results = measure(model, batch, args.timed)
            for name, result in results.items():
                paired = [
                    statistics.median(
                        a / b for a, b in zip(result.speeds, results[base].speeds, strict=True)
                    )
                    for base in ("dense", "chain, k 16")
                ]
                alone = result.answered != len(batch) or len(result.advances) > 1
                aal = "-" if result.aal is None or alone else f"{result.aal:.2f}"
                cells = (
                    str(task),
                    f"{keep:g}",
                    name,
                    f"{result.right / result.answered:.1%}",
                    aal,
                    f"{result.effective:.3f}",
                    *(f"{ratio:.2f}" for ratio in paired),
                )
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(finish("benchmarks.drafting", main))
