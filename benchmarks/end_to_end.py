"""Whole answers of the shipped model by Sirius, by our dense path, and by other libraries.

    python -m benchmarks.end_to_end --problems 12

Each row answers the same fresh problems one at a time, greedily, on the same weights; the rows take
turns on each problem, after one turn that is not counted. Printed are exact match, the median of
tokens per second, its quartiles, and the median over problems of the ratio to our dense path's on
the same problem. Seconds cover the whole call, prompt included. llama.cpp is included if `gguf` and
`llama-cpp-python` are installed.

Before anything is timed, each of our rows answers with every operator compared with its reference
(`benchmarks.checked`). In float32, rows that should answer like our dense path must give its
tokens. llama.cpp rounds differently, so only its exact match is compared.

The model has 3 M parameters and fits in the CPU's cache. So this measures the overhead of calls,
not the gain of reading less. `benchmarks.steps` has real sizes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import LlamaForCausalLM

from benchmarks import checked, llama_cpp
from benchmarks.kernels import cpu_name
from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from sirius_compile.shipped.problems import Problem, Task, final_answer, problems
from sirius_runtime import SiriusModel
from sirius_runtime.command_line import finish, positive_number, threads_argument
from sirius_runtime.loading import BackendName
from sirius_runtime.spec import Method

MODEL, MAX_NEW_TOKENS, CONTEXT = "tally-3m", 110, 512
BASELINE = "dense, ours"
Answer = Callable[[list[int]], Sequence[int]]


@dataclass
class Row:
    """One way to answer; `answer` takes a prompt's ids and returns the new ones."""

    name: str
    answer: Answer
    answers_as: str | None = None
    """The row whose tokens it must give, in float32."""
    tokens: list[int] = field(default_factory=list)
    """Of the last answer."""
    right: int = 0
    speeds: list[float] = field(default_factory=list)

    def run(self, prompt: list[int], wanted: str, decode: Callable[[Sequence[int]], str]) -> None:
        begin = time.perf_counter()
        tokens = self.answer(prompt)
        self.speeds.append(len(tokens) / (time.perf_counter() - begin))
        self.tokens = list(tokens)
        self.right += final_answer(decode(tokens)) == final_answer(wanted)


def ours(model: SiriusModel, **options: object) -> Answer:
    return lambda ids: model.generate(
        ids, max_new_tokens=MAX_NEW_TOKENS, fallback=False, **options
    ).tokens[0]


def hugging_face(model: LlamaForCausalLM, **options: object) -> Answer:
    """transformers' generate."""

    def answer(ids: list[int]) -> list[int]:
        with torch.no_grad():
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                **options,
            )
        return output[0, len(ids) :].tolist()

    return answer


def compiled(folder: Path, dtype: torch.dtype) -> Answer:
    """transformers' generate with a static cache and a compiled forward."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    return hugging_face(model, cache_implementation="static")


def rows(
    args: argparse.Namespace, program: Compiled, model: SiriusModel, scratch: Path
) -> list[Row]:
    """Every path; `model` is `program` ready to generate."""
    dtype = getattr(torch, args.dtype)
    name = f"{args.sparsity} at {args.keep:g}"
    best = {"period": args.period, "confidence": args.confidence}
    found = [
        Row(BASELINE, ours(model, mode="full")),
        Row(f"sparse alone, {name}", ours(model, mode="sparse")),
        Row(f"Sirius, {name}, k 16", ours(model)),
        Row(
            f"Sirius, {name}, k {args.period}, confidence {args.confidence:g}", ours(model, **best)
        ),
        Row(f"exact, {name}, k {args.period}", ours(model, mode="exact", **best), BASELINE),
    ]
    if args.aoti:
        whole = program.to_runtime(dtype=args.dtype, backend=BackendName.AOTI, context=CONTEXT)
        found += [Row(f"Sirius, {name}, k 16, compiled period", ours(whole), found[2].name)]
    folder = Path(__file__).parents[1] / "sirius_compile" / "shipped" / MODEL
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found += [
        Row("transformers, eager", hugging_face(reference), BASELINE),
        Row("transformers, compiled, static cache", compiled(folder, dtype), BASELINE),
        Row(
            "transformers, prompt look-up",
            hugging_face(reference, prompt_lookup_num_tokens=10),
            BASELINE,
        ),
    ]
    if llama_cpp.available():
        path = scratch / "model.gguf"
        llama_cpp.write_gguf(reference, path)
        peer = llama_cpp.LlamaCpp(path, CONTEXT, torch.get_num_threads())
        eos = {reference.config.eos_token_id}
        found += [Row("llama.cpp", lambda ids: llama_cpp.greedy(peer, ids, MAX_NEW_TOKENS, eos)[0])]
    return found


def measure(found: list[Row], batch: list[Problem], model: SiriusModel, exactly: bool) -> None:
    """Runs every row on every problem, in turn; the first turn is warm-up. `exactly`: whether
    tokens are compared, which rounding to 16 bits may change.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None
    by_name = {row.name: row for row in found}
    for problem in [*batch, *batch]:
        ids = tokenizer.encode(problem.prompt).ids
        for row in found:
            row.run(ids, problem.answer, lambda tokens: tokenizer.decode(list(tokens)))
            if row.answers_as is not None and exactly:
                checked.equal(row.name, row.tokens, by_name[row.answers_as].tokens)
    for row in found:
        row.speeds, row.right = row.speeds[len(batch) :], row.right // 2


def table(found: list[Row], count: int) -> str:
    base = next(row for row in found if row.name == BASELINE)
    header = ("path", "exact match", "tokens/s", "quartiles", "x dense, ours")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in found:
        low, _, high = statistics.quantiles(row.speeds, n=4)
        ratio = statistics.median(a / b for a, b in zip(row.speeds, base.speeds, strict=True))
        cells = (
            row.name,
            f"{row.right / count:.0%}",
            f"{statistics.median(row.speeds):.0f}",
            f"{low:.0f}-{high:.0f}",
            f"{ratio:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=positive_number, default=12, help="of each task")
    parser.add_argument("--sparsity", type=Method, default="griffin+teal")
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--period", type=positive_number, default=8)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--aoti", action="store_true", help="compile the period too: a minute")
    parser.add_argument("--threads", type=threads_argument, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    batch = [
        problem
        for task in Task
        for problem in itertools.islice(problems(task, "test", seed=20_000), args.problems)
    ]
    program = compile_model(MODEL, CompileConfig(sparsity=args.sparsity, keep=args.keep))
    model = program.to_runtime(dtype=args.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        found = rows(args, program, model, Path(scratch))
        for mode in ("full", "sparse", "sirius", "exact"):
            checked.generation(f"{mode}, {args.sparsity}", model, batch[0].prompt, mode=mode)
        measure(found, batch, model, args.dtype == "float32")
    print(
        f"{MODEL}, {args.dtype}, {len(batch)} problems; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads, {cpu_name()}\n"
    )
    print(table(found, len(batch)))
    if not llama_cpp.available():
        print("\nllama.cpp is left out: pip install --group bench brings gguf and llama-cpp-python")


if __name__ == "__main__":
    sys.exit(finish("benchmarks.end_to_end", main))
