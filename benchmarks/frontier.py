"""The frontier of the sparse paths on the shipped model: exact match against weight reads.

    python -m benchmarks.frontier --problems 100 --out docs/results

Sweeps methods, kept shares, periods and tree widths over fresh test problems of both tasks, all in
one run, and writes `frontier.md` (a row a setting) and `frontier.png`. The dense model's answers
are the baseline; *effective* is weight reads per committed token, dense = 1. A setting is on target
if its exact match is at most one point below the dense model's and it reads at most half. Each path
first answers with every operator compared with its reference (`benchmarks.checked`).
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks import checked
from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Problem, Task, final_answer, problems
from sirius_runtime import Mode, SiriusModel
from sirius_runtime.command_line import finish, folder_argument, positive_number
from sirius_runtime.new_file import NewFile, write_file
from sirius_runtime.spec import Method

MODEL, MAX_NEW_TOKENS = "tally-3m", 110
KEEPS: dict[Method, tuple[float, ...]] = {
    Method.GRIFFIN: (0.6, 0.5, 0.4, 0.3),
    Method.TOPK: (0.5, 0.3, 0.1, 0.05),
    Method.CATS: (0.5, 0.3, 0.1, 0.05),
    Method.TEAL: (0.6, 0.5, 0.4, 0.3, 0.25),
    Method.GRIFFIN_TEAL: (0.7, 0.6, 0.5, 0.4),
}
TREES = ((8, 1), (16, 1), (32, 1), (16, 4))  # period, width
POINT, TARGET = 0.01, 0.5


@dataclass(frozen=True)
class Row:
    """One setting on one task: exact match of the sparse path alone and of Sirius, and reads."""

    task: Task
    method: Method
    keep: float
    period: int
    width: int
    sparse: float
    sirius: float
    aal: float | None  # None where no row has a period but its last
    density: float
    effective: float


def exact_match(texts: tuple[str, ...], batch: list[Problem]) -> float:
    right = sum(
        final_answer(text) == final_answer(problem.answer)
        for text, problem in zip(texts, batch, strict=True)
    )
    return right / len(batch)


def answer(model: SiriusModel, batch: list[Problem], **options: object) -> tuple[float, object]:
    """Exact match over `batch`, and the run's stats."""
    output = model.generate(
        [p.prompt for p in batch], max_new_tokens=MAX_NEW_TOKENS, fallback=False, **options
    )
    assert output.texts is not None
    return exact_match(output.texts, batch), output.stats


def rows(methods: list[Method], batches: dict[Task, list[Problem]]) -> Iterator[Row]:
    for method in methods:
        for keep in KEEPS[method]:
            compiled = compile_model(MODEL, CompileConfig(sparsity=method, keep=keep))
            model = compiled.to_runtime(dtype="float32")
            for mode in (Mode.FULL, Mode.SPARSE, Mode.SIRIUS):
                prompt = next(iter(batches.values()))[0].prompt
                checked.generation(f"{method} at {keep:g}, {mode}", model, prompt, mode=mode)
            for task, batch in batches.items():
                alone, _ = answer(model, batch, mode=Mode.SPARSE)
                for period, width in TREES:
                    sirius, stats = answer(model, batch, period=period, tree_width=width)
                    yield Row(
                        task,
                        method,
                        keep,
                        period,
                        width,
                        alone,
                        sirius,
                        stats.aal,
                        stats.density,
                        stats.effective_density,
                    )


def table(dense: dict[Task, float], found: list[Row]) -> str:
    header = ("task", "path", "kept", "k", "w", "dense", "sparse", "Sirius", "AAL", "density",
              "effective", "on target")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in found:
        cells = (
            row.task,
            row.method,
            f"{row.keep:g}",
            row.period,
            row.width,
            f"{dense[row.task]:.1%}",
            f"{row.sparse:.1%}",
            f"{row.sirius:.1%}",
            "-" if row.aal is None else f"{row.aal:.2f}",
            f"{row.density:.3f}",
            f"{row.effective:.3f}",
            "yes" if on_target(dense, row) else "",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def on_target(dense: dict[Task, float], row: Row) -> bool:
    return row.sirius >= dense[row.task] - POINT - 1e-9 and row.effective <= TARGET


def plot(dense: dict[Task, float], found: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(KEEPS, plt.get_cmap("tab10").colors, strict=False))
    markers = dict(zip(TREES, "osD^", strict=True))
    figure, axes = plt.subplots(1, len(dense), figsize=(6.4 * len(dense), 5), sharey=True)
    for axis, (task, level) in zip(axes, dense.items(), strict=True):
        axis.axhspan(level - POINT, 1.02, color="0.93")
        axis.axhline(level, color="0.4", linewidth=1)
        axis.axvline(1.0, color="0.4", linewidth=1, linestyle=":")
        axis.axvline(TARGET, color="0.4", linewidth=1, linestyle="--")
        for row in (r for r in found if r.task is task):
            colour = colours[row.method]
            axis.scatter(row.density, row.sparse, s=22, facecolors="none", edgecolors=[colour])
            axis.scatter(row.effective, row.sirius, s=30, color=[colour],
                         marker=markers[row.period, row.width])  # fmt: skip
        axis.set(title=str(task), xlabel="weight reads a token (dense = 1)", xlim=(0.2, 1.3))
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("exact match")
    for method, colour in colours.items():
        axes[0].scatter([], [], color=[colour], label=str(method))
    for (period, width), marker in markers.items():
        axes[0].scatter([], [], color="0.4", marker=marker, label=f"Sirius, k {period}, w {width}")
    axes[0].scatter([], [], facecolors="none", edgecolors="0.4", label="sparse alone")
    axes[0].legend(loc="lower right", fontsize=8, framealpha=0.95)
    figure.tight_layout()
    with NewFile(path) as new:
        figure.savefig(new.file, format="png", dpi=110)
        new.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=positive_number, default=200)
    parser.add_argument("--sparsity", nargs="+", type=Method, default=list(KEEPS))
    parser.add_argument("--out", type=folder_argument, default=Path("docs/results"))
    args = parser.parse_args()
    start = time.perf_counter()
    batches = {
        task: list(itertools.islice(problems(task, "test", seed=10_000), args.problems))
        for task in Task
    }
    plain = compile_model(MODEL, CompileConfig(sparsity=Method.NONE)).to_runtime(dtype="float32")
    dense = {task: answer(plain, batch, mode=Mode.FULL)[0] for task, batch in batches.items()}
    found = []
    for row in rows(args.sparsity, batches):
        found.append(row)
        print(table(dense, [row]).splitlines()[-1], flush=True)
    best = {
        task: min((r for r in found if r.task is task and r.sirius >= dense[task] - POINT - 1e-9),
                  key=lambda r: r.effective, default=None)
        for task in Task
    }  # fmt: skip
    lines = [
        f"# {MODEL}: what each sparse path answers and reads",
        "",
        f"`python -m benchmarks.frontier --problems {args.problems}`: {args.problems} fresh "
        f"problems a task, float32, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.machine()}, "
        f"{time.perf_counter() - start:.0f} s. *on target*: at most a point "
        f"below the dense model at an effective density of at most {TARGET}.",
        "",
    ]
    for task, row in best.items():
        if row is not None:
            lines.append(
                f"- Least reads on {task} within a point of the dense model's {dense[task]:.1%}: "
                f"{row.method} at {row.keep:g}, k {row.period}, w {row.width}: {row.sirius:.1%} at "
                f"{row.effective:.3f}."
            )
    lines += ["", "![frontier](frontier.png)", "", table(dense, found), ""]
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / "frontier.md", "\n".join(lines).encode())
    plot(dense, found, args.out / "frontier.png")
    print("\n".join(lines[4:7]), f"\nwritten to {args.out}/frontier.md and frontier.png")


if __name__ == "__main__":
    sys.exit(finish("benchmarks.frontier", main))
