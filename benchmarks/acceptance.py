"""Measures how many drafted tokens of sparse paths are accepted on a checkpoint, by teacher
forcing, without kernels.

    python -m benchmarks.acceptance qwen/ --sparsity griffin topk cats teal --keep 0.5 0.4 \
        --tasks gsm8k.jsonl --template 'Question: {question}\nAnswer:' --problems 40

Measures what `sirius-compile` reports at its end (see `sirius_compile.acceptance`), on more text
and with 95% intervals, by bootstrap over texts. The text is the full path's greedy continuation of
each task's prompt; `--template` makes a prompt from the fields of a line. Operators run as their
references; weight reads are counted, and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sirius_compile import CompileConfig, compile_model
from sirius_compile.acceptance import Drafts, best_drafting, interval, joined, measure_drafts
from sirius_compile.product import Compiled
from sirius_compile.texts import BUILTIN_PROMPTS, Sample, read_prompts
from sirius_compile.tokenwise import Tokenwise
from sirius_compile.writing import Text, write
from sirius_passes.program import FULL, PREFILL, SPARSE
from sirius_runtime.command_line import finish, path_argument, positive_number, unescaped
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import ConfigError
from sirius_runtime.spec import Method

SHOWN = (4, 8, 16)
"""Periods that a column shows."""
TOGETHER = 8  # texts whose logits are in memory at once


def prompts(path: Path, template: str, count: int) -> list[str]:
    """The prompts of the first lines of a task file; raises ConfigError, naming the line."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:count]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tasks {path} can't be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        try:
            found.append(template.format_map(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}, line {number}: no prompt by --template {template!r} "
                f"({type(error).__name__}: {error}); name a field that the line has"
            ) from error
    return found


def tokenwise(compiled: Compiled) -> Tokenwise:
    """The paths of a compiled program, for whole texts."""
    return Tokenwise(
        compiled.spec,
        {name: compiled.document(name) for name in (PREFILL, SPARSE, FULL)},
        {spec.name: compiled.weights(spec) for spec in compiled.spec.weights},
        dtype=dtype_of(compiled.spec.model.dtype),
        device=torch.device("cpu"),
    )


def written(path: Tokenwise, ids: Sequence[Sequence[int]], new_tokens: int) -> Iterator[Sample]:
    """The full path's continuations."""
    for start in range(0, len(ids), TOGETHER):
        part = ids[start : start + TOGETHER]
        yield from write(path, part, held_only=True, new_tokens=new_tokens)[1].samples


def measured(path: Tokenwise, samples: Sequence[Sample], args: argparse.Namespace) -> Drafts:
    parts = [
        measure_drafts(
            path,
            Text(tuple(samples[start : start + TOGETHER])),
            threshold=args.threshold,
            temperature=args.temperature,
        )
        for start in range(0, len(samples), TOGETHER)
    ]
    found = [part for part in parts if part is not None]
    if not found:
        raise ConfigError("the model ends every answer at once: give other tasks or a --template")
    return joined(found)


def row(method: Method, keep: float, drafts: Drafts) -> str:
    best = best_drafting(drafts)
    low, high = interval(drafts, lambda some: some.period(best.period, best.confidence).effective)
    cells = [str(method), f"{keep:g}", f"{drafts.density:.3f}"]
    cells += [f"{share.double().mean():.1%}" for share in (drafts.exact, drafts.accepted)]
    for size in SHOWN:
        if size > drafts.longest:
            cells.append("-")
            continue
        ends = interval(drafts, lambda some, size=size: some.period(size).aal)  # type: ignore[misc]
        cells.append(f"{drafts.period(size).aal:.2f} ({ends[0]:.2f}-{ends[1]:.2f})")
    cells.append(f"k {best.period}, c {best.confidence:g}")
    cells.append(f"{best.effective:.3f} ({low:.3f}-{high:.3f})")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="as sirius-compile takes it")
    methods = [method for method in Method if method is not Method.NONE]
    parser.add_argument("--sparsity", nargs="+", type=Method, default=methods[:4])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5])
    parser.add_argument("--tasks", type=path_argument, help="JSONL; by default built-in prompts")
    parser.add_argument(
        "--template", type=lambda text: unescaped(text, "--template"), default="{prompt}"
    )
    parser.add_argument("--problems", type=positive_number, default=40)
    parser.add_argument("--new-tokens", type=positive_number, default=128)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--temperature", type=float, default=0.6)
    args = parser.parse_args()
    start = time.perf_counter()
    texts = (
        prompts(args.tasks, args.template, args.problems)
        if args.tasks
        else read_prompts(BUILTIN_PROMPTS)
    )
    samples: list[Sample] = []
    header = (
        *("method", "kept", "density", "the full path's", "accepted"),
        *(f"AAL, k {size}" for size in SHOWN),
        *("best", "effective density"),
    )
    for method in args.sparsity:
        for keep in args.keep:
            config = CompileConfig(sparsity=method, keep=keep, graphs="entries")
            compiled = compile_model(args.model, config)
            path = tokenwise(compiled)
            if not samples:
                tokenizer = compiled.tokenizer()
                if tokenizer is None:
                    raise ConfigError(f"{args.model} has no tokenizer to read prompts with")
                ids = [tokenizer.encode(text).ids for text in texts]
                samples = list(written(path, ids, args.new_tokens))
                tokens = sum(len(sample) - sample.prompt for sample in samples)
                print(
                    f"{args.model}, {compiled.spec.model.dtype}: {len(samples)} texts, {tokens:,} "
                    f"tokens; r {args.threshold:g}, T_v {args.temperature:g}; "
                    f"torch {torch.__version__}\n"
                )
                print("| " + " | ".join(header) + " |")
                print("|" + "---|" * len(header))
            print(row(method, keep, measured(path, samples, args)), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(finish("benchmarks.acceptance", main))
