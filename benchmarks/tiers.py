"""Measures models that are bigger than memory: seconds per token, and memory.

    python -m benchmarks.random_artifact 8b 8b.sirius
    python -m benchmarks.tiers measure 8b.sirius --limit 5GiB --aal 9.5

Runs four ways of decoding from a file, each in its own process under a hard memory limit
(`benchmarks.limited`), after dropping the file's pages from the page cache:

    mapped      the dense model; the file is mapped, and the system reads and drops pages
    streamed    the dense model; every weight is read ahead by direct I/O at every step
    held        the dense model; as many weights stay in memory as the limit allows
    sirius      drafts and verification under the same budget

With random weights, acceptance would be by chance. So every draft is accepted, and the time of a
period of `--period` tokens is divided by `--aal`, the average advance of a real model. A model with
a tokenizer answers prompts about code, with its own acceptance.

Printed are the median step or period and the fastest one, in seconds per token and as the speed-up
over `streamed`; all seconds over all tokens; the CPU seconds of all threads, which other processes
hardly change; the bytes read from the disk; the process's peak resident memory, and the peak
charged to its control group.

A way `sirius:PERIOD` overrides `--period`, so that one command compares the default with fixed
periods: `--ways sirius:default,sirius:4,sirius:8,sirius:16,sirius:32`.

`--log FILE` appends a JSON line for each step or period as it ends, with the time of day and the
machine's load: large models take long, and a run can be cut short or be disturbed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import limited
from sirius_runtime.artifact import Artifact
from sirius_runtime.artifact_zip import want_large_pages
from sirius_runtime.backends.tiered import TieredBackend, analyse
from sirius_runtime.command_line import finish
from sirius_runtime.errors import ConfigError
from sirius_runtime.loading import load
from sirius_runtime.model import SiriusModel
from sirius_runtime.text import read_tokenizer
from sirius_runtime.tiers.budget import in_units, read_size
from sirius_runtime.tiers.direct_file import DirectFile
from sirius_runtime.tiers.placement import PAGE, Placement, least_room, room_of
from sirius_runtime.tiers.stream import Load

WAYS = ("mapped", "streamed", "held", "sirius")
PROMPTS = (
    'def merge(first, second):\n    """Merges two sorted lists."""\n',
    'def count_words(text):\n    """How often each word is in a text."""\n',
    'class Stack:\n    """A stack with push, pop and peek."""\n',
)
CPU = torch.device("cpu")
DEFAULT = "default"  # as `generate` without a period


def drop_pages(path: Path) -> None:
    """Drops the file's pages from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def streamed(path: Path) -> SiriusModel:
    """The model with only the weights in memory that must be, and room to read a step ahead."""
    with Artifact.open(path, verify=False) as artifact:
        backend = analyse(artifact, CPU)
        needs = backend.needs
        held = room_of(needs.pinned)
        ring = 2 * (least_room(needs) - held)  # of the largest step, and as much ahead
        placement = Placement(needs.pinned, needs.steps, ring, 0.0)
        memory = mmap(-1, placement.memory)
        want_large_pages(memory)
        assert artifact.file is not None
        file = DirectFile(artifact.file, memory)
        backend.settle(placement, torch.frombuffer(memory, dtype=torch.uint8), file)
        return SiriusModel(backend, None, artifact.file)


def opened(way: str, path: Path, limit: int, context: int) -> SiriusModel:
    if way == "mapped":
        return load(path, device="cpu", verify=False)
    if way == "streamed":
        return streamed(path)
    return load(path, device="cpu", memory_budget=limit, context=context, verify=False)


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Runs one way in its own process."""
    torch.set_num_threads(args.threads)
    prompts = json.loads(args.prompts)
    begin = time.perf_counter()
    model = opened(args.way, args.artifact, args.limit, args.context)
    loading = time.perf_counter() - begin
    drafts = args.way == "sirius"
    real = args.aal is None
    options: dict[str, Any] = {"mode": "full", "max_new_tokens": args.tokens + 1}
    if drafts:
        period = None if args.period == DEFAULT else args.period
        options = {"mode": args.mode, "period": period, "max_new_tokens": args.answer}
        if not real:
            options |= {"threshold": 0.0, "max_new_tokens": 1 + args.period * args.periods}
    warm = {**options, "max_new_tokens": 2}
    model.generate(input_ids=[prompts[0]], eos_token_id=[], **warm)
    runs = []
    for prompt in prompts if drafts and real else prompts[:1]:
        before, steps = read_bytes(), Steps(args.way, args.log)
        ends = {} if drafts and real else {"eos_token_id": []}
        done = model.generate(input_ids=[prompt], streamer=steps, **ends, **options)
        stats = done.stats
        runs.append(
            {
                "prompt": len(prompt),
                "tokens": done.tokens[0],
                "decoded": stats.decoded_tokens,
                "steps": steps.taken(),
                "prefill": stats.prefill_seconds,
                "draft": stats.seconds["draft"],
                "verify": stats.seconds["verify"],
                "periods": stats.periods,
                "aal": stats.aal,
                "read": read_bytes() - before,
            }
        )
    held = None
    if isinstance(model.backend, TieredBackend):
        own = model.backend.placement
        held = {"ring": own.ring, **{name: own.bytes_of(name) for name in own.steps}}
    return {
        "way": args.way,
        "period": args.period,
        "load": loading,
        "resident": most_resident(),
        "streams": held,
        "runs": runs,
    }


class Steps:
    """A streamer that records the times of tokens, and appends a line for each to a file `log`."""

    def __init__(self, way: str, log: Path | None) -> None:
        self._came: list[tuple[int, float, float]] = []
        self._way, self._log = way, log

    def put(self, value: Tensor) -> None:
        self._came.append((value.numel(), time.perf_counter(), time.process_time()))
        if self._log is not None and len(self._came) > 1:
            (_, begin, _), (tokens, end, _) = self._came[-2:]
            line = {"way": self._way, "at": time.strftime("%H:%M:%S"), "tokens": tokens}
            line |= {"seconds": round(end - begin, 3), "load": os.getloadavg()[0]}
            with self._log.open("a") as log:
                log.write(f"{json.dumps(line)}\n")

    def end(self) -> None:
        pass

    def taken(self) -> list[tuple[int, float, float]]:
        """The tokens, the seconds and the CPU's seconds of each step or period after the prompt's;
        the last period, which the end may cut short, only where there is no other.
        """
        own = [
            (count, at - before, cpu - cpu_before)
            for (_, before, cpu_before), (count, at, cpu) in pairwise(self._came[1:])
        ]
        return own[:-1] or own


def read_bytes() -> int:
    """Bytes that this process has read from disks."""
    return _field("/proc/self/io", "read_bytes:")


def most_resident() -> int:
    return _field("/proc/self/status", "VmHWM:") * 1024


def _field(path: str, name: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def disk_speed(path: Path) -> float:
    """Bytes a second of direct reads of the file's first GiB."""
    with Artifact.open(path, verify=False) as artifact:
        assert artifact.file is not None
        size = min(2**30, path.stat().st_size // PAGE * PAGE)
        memory = mmap(-1, size)
        file = DirectFile(artifact.file, memory)
        begin = time.perf_counter()
        file.fetch(Load(0, size, size, 0)).wait()
        return size / (time.perf_counter() - begin)


def prompts_of(path: Path, length: int) -> list[list[int]]:
    """Prompts as token ids: about code, or random ones of a model without a tokenizer."""
    with Artifact.open(path, verify=False) as artifact:
        if artifact.names("tokenizer/tokenizer.json"):
            tokenizer = read_tokenizer(artifact.read_bytes("tokenizer/tokenizer.json"))
            return [tokenizer.encode(prompt).ids for prompt in PROMPTS]
        generator = torch.Generator().manual_seed(0)
        vocabulary = artifact.program.model.vocab_size
        return [torch.randint(vocabulary, (length,), generator=generator).tolist()]


def measure(args: argparse.Namespace) -> None:
    path, prompts = args.artifact, prompts_of(args.artifact, args.prompt_tokens)
    args.aal = args.aal if len(prompts) == 1 else None
    if args.aal is not None and not isinstance(args.period, int):
        raise ConfigError("--aal is the average advance of one period: give --period a number")
    drop_pages(path)
    speed = disk_speed(path)
    print(f"{path.stat().st_size:,} bytes, a limit of {args.limit:,}; ", end="")
    print(f"direct reads {speed / 1e9:.2f} GB/s, {args.threads} threads\n")
    names = "way|s a token|x|fastest|x|mean|CPU s|read a token|prompt, s|resident|group"
    print(f"| {names.replace('|', ' | ')} |\n|{'---|' * 11}", flush=True)
    first, found = (math.nan, math.nan), []
    for way in args.ways.split(","):
        drop_pages(path)
        name, _, period = way.partition(":")
        own = argparse.Namespace(**{**vars(args), "way": name})
        own.period = whole_or_name(period) if period else args.period
        said, most = limited.run(command(own, prompts), args.limit)
        result = json.loads(said.splitlines()[-1]) | {"group": most}
        found.append(result)
        seconds, least, mean, cpu, read = per_token(result, own)
        first = (seconds, least) if way == "streamed" else first
        prefill = statistics.mean(run["prefill"] for run in result["runs"])
        print(
            f"| {way} | {seconds:.3f} | {first[0] / seconds:.1f} | {least:.3f} | "
            f"{first[1] / least:.1f} | {mean:.3f} | {cpu:.3f} | {in_units(read)} | {prefill:.2f} | "
            f"{in_units(result['resident'])} | {in_units(most)} |",
            flush=True,
        )
    for result in found:
        runs = [{k: v for k, v in run.items() if k != "tokens"} for run in result["runs"]]
        print(json.dumps(result | {"runs": runs}))
    # With random weights every draft was accepted, so the tokens are not the full path's.
    judged = [r for r in found if r["way"] != "sirius" or args.aal is None]
    alike = {tuple(r["runs"][0]["tokens"][: args.tokens]) for r in judged}
    print(f"first {args.tokens} tokens of {', '.join(r['way'] for r in judged)} alike: ", end="")
    print(len(alike) == 1)


def per_token(
    result: dict[str, Any], args: argparse.Namespace
) -> tuple[float, float, float, float, float]:
    """Seconds a token, of the median and the fastest step or period, and of all; the CPU's seconds,
    of the median; bytes of the disk a token.
    """
    runs = result["runs"]
    counted = result["way"] != "sirius" or args.aal is None
    steps = [step for run in runs for step in run["steps"]]
    each = [seconds / (count if counted else args.aal) for count, seconds, _ in steps]
    cpu = [seconds / (count if counted else args.aal) for count, _, seconds in steps]
    tokens = sum(run["decoded"] if counted else run["periods"] * args.aal for run in runs)
    read = sum(run["read"] for run in runs) / tokens
    counts = [count if counted else args.aal for count, *_ in steps]
    mean = sum(seconds for _, seconds, _ in steps) / sum(counts)
    return statistics.median(each), min(each), mean, statistics.median(cpu), read


def command(args: argparse.Namespace, prompts: list[list[int]]) -> list[str]:
    own = [sys.executable, "-m", "benchmarks.tiers", "child", str(args.artifact)]
    for name in ("way", "limit", "tokens", "answer", "period", "periods", "mode", "threads"):
        own += [f"--{name}", str(getattr(args, name))]
    own += ["--context", str(args.context), "--prompts", json.dumps(prompts)]
    own += [] if args.log is None else ["--log", str(args.log)]
    return own + ([] if args.aal is None else ["--aal", str(args.aal)])


def whole_or_name(text: str) -> int | str:
    return text if text in ("auto", DEFAULT) else int(text)


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("measure", "child"):
        own = commands.add_parser(name)
        own.add_argument("artifact", type=Path)
        own.add_argument("--limit", type=lambda text: read_size(text, "--limit"), required=True)
        own.add_argument("--ways", default=",".join(WAYS))
        own.add_argument("--tokens", type=int, default=3, help="of the dense model")
        own.add_argument("--answer", type=int, default=128, help="of a real model's answers")
        own.add_argument("--period", type=whole_or_name, default=16, help="K, auto or default")
        own.add_argument("--periods", type=int, default=3)
        own.add_argument("--mode", default="sirius")
        own.add_argument("--aal", type=float, help="average advance, where weights are random")
        own.add_argument("--prompt-tokens", type=int, default=64)
        own.add_argument("--context", type=int, default=1024)
        own.add_argument("--threads", type=int, default=2)
        own.add_argument("--log", type=Path, help="a file of a line for each step or period")
        own.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
        own.add_argument("--prompts", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command == "child":
        print(json.dumps(child(args)))
    else:
        measure(args)
    return None


if __name__ == "__main__":
    raise SystemExit(finish("benchmarks.tiers", main))
