"""Times whole answers of real instruct models: is a run ever slower than dense decoding?

    python -m benchmarks.real qwen-int8-teal.sirius --baseline qwen-bf16.sirius --out runs.jsonl

Twenty prompts of five kinds (maths, code, chat, the summary of a long text, another language) are
answered one at a time through the model's chat template, greedily, in four ways: densely, by a
default run, in mode `exact`, and by the dense path of `--baseline`. The ways take turns on each
prompt, after one answer that is not counted. Printed are, for each kind and for all, the medians of
tokens per second (without prefill) and of the ratios to the dense path on the same prompt, the
worst ratio, AAL, effective density and fallbacks. If an `exact` answer is not the dense one, the
benchmark stops.

With `--llama-cpp FILE.gguf` (once for each file) llama.cpp continues the same token ids, greedily,
on as many threads, in its own process. With `--llama-cpp-draft FILE.gguf` it also uses speculative
decoding, with that file as the draft model. With `--transformers FOLDER` transformers itself
answers them, in bfloat16 with its own cache, on as many threads and in its own process too.

With `--memory` no time is taken. Each way is a process of its own that loads its model and answers
the first prompt; printed is its resident memory when that was largest, and its share of the
baseline's.

With `--lookup N` (once for each N) the default and the `exact` run look up N-grams; 0: none. With
`--threshold P` (once for each P) the default run is repeated with that threshold.

With `--out` each answer is a line of a file, and answers that it has already are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import own_process
from benchmarks.kernels import cpu_name
from sirius_runtime import SiriusModel, load
from sirius_runtime.command_line import (
    finish,
    folder_argument,
    positive_number,
    real_number,
    threads_argument,
    whole_number,
)
from sirius_runtime.rules import RuleOptions, check_options

STORY = (
    "The lighthouse at Carrow Point was built in 1871 after three ships were lost in one "
    "winter. Its first keeper, Ada Quill, kept a diary of the weather, of the birds that struck "
    "the glass, and of the ships that passed. In 1889 the lamp was changed from oil to gas, and "
    "the keeper's house was made larger, because the work then needed two people. The second "
    "keeper, Tom Rushen, disliked the gas and wrote so to the board each year, until in 1903 a "
    "leak set fire to the store and the board agreed to electric light. The cable to the "
    "mainland broke in nearly every storm, so that the old oil lamp was kept ready for another "
    "thirty years. During the second war the light was put out, and the tower was used to watch "
    "for aeroplanes. Afterwards the light was made automatic and the house was sold to a "
    "school, whose pupils measure the tides there every summer. The diaries were found in 1978 "
    "behind a wall, and showed that the birds now arrive two weeks earlier than they did in Ada "
    "Quill's time. They are kept in the county library, where anyone can read them, and a copy "
    "stands in the room below the lamp."
)
PROMPTS = {
    "maths": (
        "A shop sells pens at 3 for 2 euros. How much do 21 pens cost? Reason step by step.",
        "Nora has 48 stickers. Ben gets a third, Ida a quarter of the rest. How many are left?",
        "A train runs from 9:40 to 13:05 and stops twice for 10 minutes. How long does it move?",
        "What is the sum of the odd numbers from 1 to 49? Explain.",
    ),
    "code": (
        "Write a Python function that returns the longest common prefix of a list of strings.",
        "Write a SQL query that lists the three customers with the largest total of orders.",
        "Implement binary search in C for an array of ints, with a comment for each step.",
        "Explain what this does: `sorted(d, key=d.get, reverse=True)[:5]`",
    ),
    "chat": (
        "I have a free Sunday and it will rain. What could I do at home?",
        "How do I tell a friend that I can't come to her wedding?",
        "What are good habits for sleeping better?",
        "Why is the sky blue? Answer as to a child.",
    ),
    "summary": (
        f"Summarise this text in three sentences.\n\n{STORY}",
        f"List the years of this text and what happened in each.\n\n{STORY}",
        f"Who are the people in this text and what did they do?\n\n{STORY}",
        f"Write a headline and a short notice for a newspaper about this.\n\n{STORY}",
    ),
    "language": (
        "Übersetze ins Englische und erkläre die Grammatik: Der Hund, den ich sah, schläft.",
        "Écris une courte lettre pour réserver une chambre d'hôtel pour deux nuits.",
        "Explica en español qué es la fotosíntesis.",
        "Spiega in italiano come si fa il pane.",
    ),
}
DENSE, BASELINE, TRANSFORMERS = "dense", "baseline, dense", "transformers, bfloat16"


@dataclass(frozen=True)
class Answer:
    """A way's answer to a prompt."""

    prompt: str
    way: str
    tokens: tuple[int, ...]
    rate: float
    """Tokens a second, the prompt not counted."""
    aal: float | None
    effective: float | None
    note: str | None
    """Why the run decoded densely, where it did."""


def answer(
    model: SiriusModel, mode: str, options: dict[str, Any], prompt: str, way: str, most: int
) -> Answer:
    done = model.generate(messages=_chat(prompt), mode=mode, max_new_tokens=most, **options)
    stats = done.stats
    return Answer(
        prompt,
        way,
        done.tokens[0],
        stats.tokens_per_second or 0.0,
        stats.aal,
        stats.effective_density,
        None if stats.fallback is None else str(stats.fallback),
    )


def peer_answer(
    peer: own_process.OwnProcess, model: SiriusModel, prompt: str, way: str, most: int
) -> Answer:
    """A peer's, to the tokens of the model's chat template."""
    (ids,) = model.encode(messages=_chat(prompt))
    tokens, seconds = peer.generate(ids, most, model.program.eos_token_ids)
    rate = (len(tokens) - 1) / seconds if seconds > 0 else 0.0
    return Answer(prompt, way, tuple(tokens), rate, None, None, None)


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def answers(args: argparse.Namespace) -> Iterator[Answer]:
    """All of them; what the file has first."""
    known: dict[tuple[str, str], Answer] = {}
    if args.out is not None and args.out.exists():
        for line in args.out.read_text().splitlines():
            record = Answer(**json.loads(line))
            known[record.prompt, record.way] = record
    model = load(args.artifact, threads=args.threads)
    ways: dict[str, Callable[[str, str, int], Answer]] = {DENSE: partial(answer, model, "full", {})}
    for mode in ("sirius", "exact"):
        if not args.lookup:
            ways[mode] = partial(answer, model, mode, {})
        for lookup in args.lookup:
            ways[f"{mode}, lookup {lookup}"] = partial(answer, model, mode, {"lookup": lookup})
    for threshold in args.threshold:
        name = f"sirius, threshold {threshold:g}"
        ways[name] = partial(answer, model, "sirius", {"threshold": threshold})
    if args.baseline is not None:
        ways[BASELINE] = partial(answer, load(args.baseline, threads=args.threads), "full", {})
    for name, peer in peers(args, model.backend.threads).items():
        ways[name] = partial(peer_answer, own_process.OwnProcess(peer), model)
    warm = False
    for prompts in PROMPTS.values():
        for prompt in prompts[: args.prompts]:
            for way, own in ways.items():
                if (prompt, way) not in known:
                    if not warm:
                        for each in ways.values():
                            each(prompt, "", 16)
                    warm = True
                    done = known[prompt, way] = own(prompt, way, args.max_new_tokens)
                    if args.out is not None:
                        with args.out.open("a") as file:
                            file.write(json.dumps(asdict(done)) + "\n")
                yield known[prompt, way]
            dense = known[prompt, DENSE]
            for way in ways:
                exact = way.startswith("exact")
                if exact and tuple(dense.tokens) != tuple(known[prompt, way].tokens):
                    raise SystemExit(f"{way}: not the dense tokens of {prompt!r}")


def peers(args: argparse.Namespace, threads: int) -> dict[str, own_process.Model]:
    """The others' models, by the name of their way."""
    found = {}
    for path in args.llama_cpp:
        one = own_process.Model(own_process.LLAMA_CPP, str(path.absolute()), threads)
        found[f"llama.cpp, {path.stem}"] = one
        if (draft := args.llama_cpp_draft) is not None:
            name = f"llama.cpp, {path.stem} drafted by {draft.stem}"
            found[name] = replace(one, draft=str(draft.absolute()))
    if args.transformers is not None:
        path = str(args.transformers.absolute())
        found[TRANSFORMERS] = own_process.Model(own_process.TRANSFORMERS, path, threads)
    return found


def memory(args: argparse.Namespace) -> Iterator[str]:
    """The table of resident memory, a line each."""
    model = load(args.artifact, threads=args.threads)
    threads, eos = model.backend.threads, model.program.eos_token_ids
    (ids,) = model.encode(messages=_chat(next(iter(PROMPTS.values()))[0]))
    del model
    own = own_process.Model(own_process.SIRIUS, str(args.artifact.absolute()), threads)
    ways = {}
    if args.baseline is not None:
        ways[BASELINE] = replace(own, path=str(args.baseline.absolute()))
    ways |= {DENSE: own, "sirius": replace(own, mode="sirius"), **peers(args, threads)}
    yield "| way | anonymous | of mapped files | both | of the baseline |"
    yield "|---|---|---|---|---|"
    baseline = None
    for way, one in ways.items():
        held = own_process.peak(one, ids, args.max_new_tokens, eos)
        if way == BASELINE:
            baseline = held.both
        sizes = " | ".join(
            f"{size / 2**20:.0f} MiB" for size in (held.anonymous, held.mapped, held.both)
        )
        yield f"| {way} | {sizes} | {f'{held.both / baseline:.3f}' if baseline else ''} |"


def table(all_answers: Sequence[Answer]) -> Iterator[str]:
    found = {(a.prompt, a.way): a for a in all_answers}
    ways = list(dict.fromkeys(a.way for a in all_answers))
    yield "| prompts | way | tokens/s | of dense | worst | AAL | effective density | fell back |"
    yield "|---|---|---|---|---|---|---|---|"
    kinds = [*PROMPTS.items(), ("all", tuple(p for own in PROMPTS.values() for p in own))]
    for kind, prompts in kinds:
        for way in ways:
            own = [found[p, way] for p in prompts if (p, way) in found]
            if not own:
                continue
            ratios = [a.rate / found[a.prompt, DENSE].rate for a in own]
            aal = [a.aal for a in own if a.aal is not None]
            effective = [a.effective for a in own if a.effective is not None]
            yield (
                f"| {kind} | {way} | {statistics.median(a.rate for a in own):.2f} | "
                f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | "
                f"{_median(aal, way)} | {_median(effective, way)} | "
                f"{sum(a.note is not None for a in own)} of {len(own)} |"
            )


def _median(values: Sequence[float], way: str) -> str:
    return f"{statistics.median(values):.2f}" if values and way not in (DENSE, BASELINE) else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--baseline", type=Path, help="another artifact, decoded densely beside it")
    parser.add_argument("--llama-cpp", type=Path, action="append", default=[], metavar="FILE.gguf")
    parser.add_argument("--llama-cpp-draft", type=Path, metavar="FILE.gguf")
    parser.add_argument("--transformers", type=folder_argument, metavar="FOLDER")
    parser.add_argument("--memory", action="store_true", help="each way's resident memory instead")
    parser.add_argument("--lookup", type=whole_number, action="append", default=[], metavar="N")
    parser.add_argument("--threshold", type=real_number, action="append", default=[], metavar="P")
    parser.add_argument("--prompts", type=positive_number, default=4, help="of each kind")
    parser.add_argument("--max-new-tokens", type=positive_number, default=128)
    parser.add_argument("--out", type=Path, help="answers, a line each; those there are kept")
    parser.add_argument("--threads", type=threads_argument)
    args = parser.parse_args(arguments)
    if args.llama_cpp_draft is not None and not args.llama_cpp:
        parser.error("--llama-cpp-draft drafts for the model of --llama-cpp; give that too")
    if args.memory and (args.lookup or args.threshold):
        parser.error("--memory runs the default options; leave --lookup and --threshold out")
    for threshold in args.threshold:
        check_options(RuleOptions(threshold=threshold), flags=True)
    head = f"{args.artifact.name}; {args.max_new_tokens} tokens an answer; {cpu_name()}\n"
    if args.memory:
        for line in itertools.chain([head], memory(args)):
            print(line, flush=True)
        return
    done = []
    for one in answers(args):
        done.append(one)
        print(f"{one.way}: {one.rate:.2f} tokens/s", file=sys.stderr)
    print(head, *table(done), sep="\n")


if __name__ == "__main__":
    sys.exit(finish("benchmarks.real", main))
