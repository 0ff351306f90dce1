"""Time and memory to compile, load and run an artifact of Llama-3.2-1B's shapes.

    python -m benchmarks.costs

Writes a random model of these shapes with `save_pretrained`, compiles it by the command line, and
loads both, each in its own process: seconds of `load` with the file in the page cache, the time to
the first token after `--prompt` tokens, and the process's memory. *resident* is the memory after
generating minus that before loading (after malloc returned free memory), relative to the bytes of
weights and K/V; *peak* is the maximum. transformers is the baseline of the same run. Linux only, as
it reads /proc. First, another process generates with every operator compared with its reference
(`benchmarks.checked`).
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import checked
from benchmarks.kernels import cpu_name
from benchmarks.steps import random_llama
from sirius_runtime.command_line import finish, positive_number, threads_argument
from sirius_runtime.spec import Method

NEW_TOKENS = 8


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of one way to load and run."""

    load: float
    first: float
    resident: int
    peak: int


def status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def ours(path: str, prompt: int, threads: int, verify: bool) -> Cost:
    import sirius_runtime
    import sirius_runtime.backends.eager  # what `load` would import

    def load() -> Callable[[int], object]:
        model = sirius_runtime.load(path, verify=verify)
        ids = list(range(100, 100 + prompt))
        return lambda count: model.generate(ids, max_new_tokens=count, period=4)

    return _cost(load, threads)


def check(path: str, prompt: int, threads: int) -> None:
    """Raises WrongResultError for an operator that is wrong."""
    import sirius_runtime

    torch.set_num_threads(threads)
    model = sirius_runtime.load(path, backend="eager", device="cpu")
    checked.generation("ours", model, list(range(100, 100 + prompt)), period=4)


def transformers(path: str, prompt: int, threads: int, verify: bool) -> Cost:
    from transformers import LlamaForCausalLM

    def load() -> Callable[[int], object]:
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        ids = torch.arange(100, 100 + prompt)[None]

        def generate(count: int) -> None:
            with torch.no_grad():
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)

        return generate

    return _cost(load, threads)


def _cost(load: Callable[[], Callable[[int], object]], threads: int) -> Cost:
    torch.set_num_threads(threads)
    before = status("VmRSS")
    begin = time.perf_counter()
    generate = load()
    loaded = time.perf_counter() - begin
    generate(1)  # builds kernels, faults pages in
    begin = time.perf_counter()
    generate(1)
    first = time.perf_counter() - begin
    generate(NEW_TOKENS)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return Cost(loaded, first, status("VmRSS") - before, status("VmHWM") - before)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a new process, whose memory this process does not affect."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def compile_cost(model: Path, out: Path, sparsity: str) -> tuple[float, int]:
    """Seconds and peak memory of `sirius-compile`."""
    code = "import sys; from sirius_compile.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(model), "--sparsity", sparsity, "--out", str(out)]
    begin = time.perf_counter()
    subprocess.run([*command, "--force"], check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=positive_number, default=16)
    parser.add_argument("--prompt", type=positive_number, default=512)
    parser.add_argument("--repeats", type=positive_number, default=3)
    parser.add_argument("--sparsity", type=Method, default="griffin")
    parser.add_argument("--threads", type=threads_argument, default=torch.get_num_threads())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, artifact = Path(scratch) / "model", Path(scratch) / "model.sirius"
        model = random_llama(args.layers)
        weights = sum(parameter.numel() for parameter in model.parameters()) * 2
        config = model.config
        model.save_pretrained(folder, max_shard_size="64GB")
        del model
        seconds, peak = apart(compile_cost, folder, artifact, args.sparsity)
        heads = 2 * config.num_key_value_heads * config.head_dim
        cache = config.num_hidden_layers * heads * (args.prompt + NEW_TOKENS) * 2
        print(
            f"{args.layers} layers, {weights / 1e9:.2f} GB of bfloat16 weights, "
            f"{cache / 1e6:.0f} MB of K/V for {args.prompt + NEW_TOKENS} tokens; torch "
            f"{torch.__version__}, {args.threads} threads, {cpu_name()}\n"
        )
        print(
            f"sirius-compile --sparsity {args.sparsity}: {seconds:.1f} s, peak memory "
            f"{peak / weights:.2f} x the weights; artifact "
            f"{artifact.stat().st_size / weights:.3f} x\n"
        )
        named = {
            "transformers, from_pretrained": (transformers, str(folder), True),
            "ours": (ours, str(artifact), True),
            "ours, verify=False": (ours, str(artifact), False),
        }
        apart(check, str(artifact), args.prompt, args.threads)
        header = ("load", "s", "x", "first token s", "x", "resident", "peak")
        print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
        base: list[Cost] = []
        for name, (function, path, verify) in named.items():
            costs = [
                apart(function, path, args.prompt, args.threads, verify)
                for _ in range(args.repeats)
            ]
            base = base or costs
            load, first = (
                [statistics.median(getattr(c, field) for c in side) for side in (costs, base)]
                for field in ("load", "first")
            )
            resident, most = (
                statistics.median(getattr(c, field) for c in costs) / (weights + cache)
                for field in ("resident", "peak")
            )
            cells = (
                name,
                f"{load[0]:.2f}",
                f"{load[0] / load[1]:.2f}",
                f"{first[0]:.2f}",
                f"{first[0] / first[1]:.2f}",
                f"{resident:.3f}",
                f"{most:.3f}",
            )
            print("| " + " | ".join(cells) + " |", flush=True)
        print("\nresident and peak: of weights and K/V together")


if __name__ == "__main__":
    sys.exit(finish("benchmarks.costs", main))
