"""Shows what sparsity breaks and Sirius repairs, on the shipped model.

    python examples/tally/demo.py                                      # what `make demo` runs
    python examples/tally/demo.py --problems 500 --sparsity griffin --keep 0.5 0.4 0.3 --markdown

For each sparse path and kept share, fresh test problems (never trained on) of both tasks are
answered by the dense model, by the sparse path alone, and by Sirius; exact match compares the final
number. Prints one row each; `--markdown` prints the table as the README has it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Problem, Task, final_answer, problems
from sirius_runtime import GenerationStats, Mode, SiriusModel
from sirius_runtime.command_line import finish, positive_number
from sirius_runtime.spec import Method

MODEL = "tally-3m"
MAX_NEW_TOKENS = 110


@dataclass(frozen=True)
class Score:
    """Exact match over problems, and what answering them took."""

    exact_match: float
    stats: GenerationStats


def score(model: SiriusModel, batch: list[Problem], mode: Mode, period: int | None) -> Score:
    """Answers `batch`, as one batch of rows, in `mode` and scores it."""
    output = model.generate(
        [p.prompt for p in batch],
        mode=mode,
        period=period,
        fallback=False,  # always draft: the table measures drafts
        max_new_tokens=MAX_NEW_TOKENS,
    )
    assert output.texts is not None
    right = sum(
        final_answer(text) == final_answer(p.answer)
        for text, p in zip(output.texts, batch, strict=True)
    )
    return Score(right / len(batch), output.stats)


HEADER = (
    "task",
    "path",
    "kept",
    "dense",
    "sparse",
    "Sirius",
    "AAL",
    "density",
    "effective",
)


def rows(
    methods: list[Method], keeps: list[float], count: int, period: int | None
) -> Iterator[tuple[str, ...]]:
    """Yields one table row for each task, method and kept share."""
    batches = {t: list(itertools.islice(problems(t, "test", seed=10_000), count)) for t in Task}
    dense: dict[Task, float] = {}
    for method, keep in itertools.product(methods, keeps):
        model = compile_model(MODEL, CompileConfig(sparsity=method, keep=keep)).to_runtime(
            dtype="float32"
        )
        for task, batch in batches.items():
            if task not in dense:
                dense[task] = score(model, batch, Mode.FULL, None).exact_match
            alone = score(model, batch, Mode.SPARSE, None)
            sirius = score(model, batch, Mode.SIRIUS, period)
            yield (
                str(task),
                str(method),
                f"{keep:g}",
                f"{dense[task]:.1%}",
                f"{alone.exact_match:.1%}",
                f"{sirius.exact_match:.1%}",
                "-" if sirius.stats.aal is None else f"{sirius.stats.aal:.2f}",
                f"{sirius.stats.density:.3f}",
                f"{sirius.stats.effective_density:.3f}",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=positive_number, default=50)
    parser.add_argument("--sparsity", nargs="+", type=Method, default=[Method.GRIFFIN, Method.CATS])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--period", type=positive_number, help="default: 16, the artifact's own")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    start = time.perf_counter()
    lines = rows(args.sparsity, args.keep, args.problems, args.period)
    if args.markdown:
        print("| " + " | ".join(HEADER) + " |")
        print("|" + "---|" * len(HEADER))
        for row in lines:
            print("| " + " | ".join(row) + " |", flush=True)
    else:
        title = f"{MODEL}: exact match on {args.problems} fresh problems a task"
        table = Table(*HEADER, title=title, box=None)
        for row in lines:
            table.add_row(*row)
        Console(width=100).print(table)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(finish("demo.py", main))
