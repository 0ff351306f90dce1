"""ONNX Runtime compared with PyTorch on the CPU, in interleaved runs: four tables.

    python -m benchmarks.onnx_speed                    # under five minutes
    python -m benchmarks.onnx_speed --genai            # and onnxruntime-genai on the same weights

`generation`: tokens per second after prefill, medians over prompts that all rows answer in turn, of
the shipped model and of `--layers` layers of Llama-3.2-1B's shapes. The latter has the same share
of the vocabulary, so that the ratio of head to layers is that of the whole model. Its weights are
random and would accept no drafts, so all drafts are accepted, and its Sirius rows are upper bounds.
`period`: one call of the graph `period` against separate calls of `sparse` and `full`.
`memory`: a process's private memory, without the file that it maps, after all modes have run.
`formulations`: see `benchmarks.onnx_formulations`.

Before it is timed, PyTorch's side answers with every operator compared with its reference, and in
each run ONNX Runtime must give its tokens (`benchmarks.checked`); genai's models are not compared.

`--genai` needs onnxruntime-genai and onnx_ir, installed or on PYTHONPATH: its model builder writes
the models that it runs.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sirius_compile
from benchmarks import checked
from benchmarks.kernels import cpu_name
from benchmarks.onnx_formulations import formulations
from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime import load
from sirius_runtime.artifact import Artifact
from sirius_runtime.command_line import finish, positive_number, threads_argument
from sirius_runtime.decoder import Way
from sirius_runtime.model import SiriusModel
from sirius_runtime.onnx_files import gathered_bytes
from sirius_runtime.plan import Plan
from sirius_runtime.request import Options, read_options
from sirius_runtime.stats import PhaseClock

METHODS = ("griffin", "topk")
SHIPPED = Path(sirius_compile.__file__).parent / "shipped" / "tally-3m"
LAYERS, VOCABULARY = 16, 128_256  # of Llama-3.2-1B

Run = Callable[[list[int]], tuple[float, Sequence[int]]]
"""Tokens per second on a prompt, and the tokens; none where they are not compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=positive_number, default=7, help="of the shipped model")
    parser.add_argument("--layers", type=positive_number, default=2, help="of the large one")
    parser.add_argument("--threads", type=threads_argument, default=1)
    parser.add_argument("--genai", action="store_true")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{cpu_name()}, {args.threads} threads, onnxruntime {onnxruntime.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, float32"
    )
    with tempfile.TemporaryDirectory() as folder:
        subjects = [shipped(Path(folder), args.prompts), large(Path(folder), args.layers)]
        for name in args.tables:
            print(f"\n{name}\n")
            TABLES[name](subjects, args)


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


@dataclass
class Subject:
    """A model to compare: compiled for each method, and as transformers stores it."""

    title: str
    folder: Path
    make: Callable[[], LlamaForCausalLM | str]
    source: Callable[[], Path]
    prompts: list[list[int]]
    new_tokens: int
    threshold: float
    made: dict[str, Path] = field(default_factory=dict)

    def compiled(self, method: str) -> Path:
        if method not in self.made:
            config = CompileConfig(sparsity=method, dtype="float32", graphs="both", period=16)
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"{method}.sirius"
            self.made[method] = compile_model(self.make(), config).save(path)
        return self.made[method]


def shipped(folder: Path, prompts: int) -> Subject:
    tokenizer = compile_model("tally-3m", CompileConfig(sparsity="none"))._tokenizer()
    assert tokenizer is not None
    texts = (p.prompt for p in islice(problems(Task.REASONING, "test", seed=11), prompts))
    ids = [tokenizer.encode(text).ids for text in texts]
    own = folder / "tally"
    return Subject("tally-3m", own, lambda: "tally-3m", lambda: SHIPPED, ids, 96, 0.1)


def large(folder: Path, layers: int) -> Subject:
    vocabulary, generator = VOCABULARY * layers // LAYERS, np.random.default_rng(0)
    own = folder / "large"

    def make() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=vocabulary,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval()

    def source() -> Path:
        """Also writes a tokenizer, which the builder copies but nothing reads."""
        make().save_pretrained(own / "source")
        for file in SHIPPED.glob("tokenizer*"):
            shutil.copy(file, own / "source")
        return own / "source"

    prompts = [generator.integers(0, vocabulary, 64).tolist() for _ in range(3)]
    title = f"{layers} layers of Llama-3.2-1B's shapes, all drafts taken"
    return Subject(title, own, make, source, prompts, 32, 0.0)


# generation


def generation(subjects: Sequence[Subject], args: argparse.Namespace) -> None:
    for subject in subjects:
        runs: dict[str, Run] = {}
        for method in METHODS:
            path = subject.compiled(method)
            for backend in ("torch", "onnx"):
                model, tokens = opened(path, backend, args.threads), subject.new_tokens
                if backend == "torch":
                    checked.generation(
                        f"{method}, {subject.title}",
                        model,
                        subject.prompts[0],
                        eos_token_id=[],
                        threshold=subject.threshold,
                    )
                if method == METHODS[0]:
                    runs[f"{backend}, dense"] = by(model, tokens, mode="full")
                sirius = by(model, tokens, threshold=subject.threshold)
                runs[f"{backend}, Sirius, {method}"] = sirius
        if args.genai:
            folder = builder(subject)
            runs["onnxruntime-genai, dense"] = genai(folder, subject.new_tokens, args.threads)
        show(
            (subject.title, "tokens/s", "of torch, dense", "of onnx, dense"),
            list(compared(runs, subject.prompts)),
        )
        print()


def opened(path: Path, backend: str, threads: int) -> SiriusModel:
    if backend == "torch":
        return load(path, device="cpu")
    return load(
        path,
        backend="onnxruntime",
        providers=["CPUExecutionProvider"],
        threads=threads,
        progress=lambda told: None,
    )


def by(model: SiriusModel, tokens: int, **options: Any) -> Run:
    def run(prompt: list[int]) -> tuple[float, Sequence[int]]:
        output = model.generate(
            prompt, max_new_tokens=tokens, eos_token_id=[], fallback=False, **options
        )
        return output.stats.tokens_per_second, output.tokens[0]

    return run


def builder(subject: Subject) -> Path:
    """The folder that onnxruntime-genai's own builder writes of a model."""
    folder = subject.folder / "genai"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    subprocess.run(
        [*command, "-m", str(subject.source()), "-o", str(folder)], check=True, capture_output=True
    )
    return folder


def genai(folder: Path, tokens: int, threads: int) -> Run:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = f'{{"intra_op_num_threads": {threads}}}'
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {options}}}}}}}')
    model = og.Model(config)

    def run(prompt: list[int]) -> tuple[float, Sequence[int]]:
        parameters, length = og.GeneratorParams(model), len(prompt) + tokens
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt)
        generator.generate_next_token()
        begin, made = time.perf_counter(), 0
        while not generator.is_done():
            generator.generate_next_token()
            made += 1
        return made / (time.perf_counter() - begin), ()

    return run


def compared(runs: dict[str, Run], prompts: Sequence[list[int]]) -> Iterator[tuple[str, ...]]:
    """One line a run: its speed, and its ratios to the dense runs on the same prompt."""
    for run in runs.values():  # the first call allocates
        run(prompts[0])
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for prompt in prompts:
        answers: dict[str, Sequence[int]] = {}
        for name, run in runs.items():
            speed, answers[name] = run(prompt)
            speeds[name].append(speed)
        for name, tokens in answers.items():
            if name.startswith("onnx,"):
                checked.equal(name, tokens, answers[name.replace("onnx,", "torch,", 1)])
    for name, own in speeds.items():
        ratios = (
            statistics.median(a / b for a, b in zip(own, speeds[base], strict=True))
            for base in ("torch, dense", "onnx, dense")
        )
        yield name, f"{statistics.median(own):.1f}", *(f"{ratio:.2f}" for ratio in ratios)


# one call a period


def period(subjects: Sequence[Subject], args: argparse.Namespace) -> None:
    rows = []
    for subject in subjects:
        path, answers = subject.compiled("griffin"), []
        for backend in ("torch", "onnx"):
            model = opened(path, backend, args.threads)
            answers.append(by(model, 17, threshold=0.0)(list(range(1, 64)))[1])
        checked.equal(f"a period, {subject.title}", answers[1], answers[0])
        rows.append((subject.title, *one_call(model, args.prompts)))
    show(("griffin, k 16, w 1", "one call, ms", "entries, ms", "entries / one call"), rows)


def one_call(model: SiriusModel, repeats: int) -> tuple[str, ...]:
    """A period by `period`, and as 15 calls of `sparse` and one of `full` over 16 tokens."""
    backend: Any = model.backend
    prompt = list(range(1, 64))
    request = read_options(
        Options(rule={"threshold": 0.0}),
        model.program,
        backend.limits,
        prompt_lengths=[len(prompt)],
        max_new_tokens=400,
        eos=frozenset(),
        stop=(),
    )
    decoder = backend.open(request, 1, 480, PhaseClock(backend.device))
    decoder.prefill([prompt], None)
    state, plan = decoder.state, Plan(16, 1, threshold=0.0)
    start = state.length, state.root
    taken: dict[str, list[float]] = {"period": [], "entries": []}

    def entries() -> None:
        for _ in range(15):
            decoder.period(Way.SPARSE, plan, [1], None)
        state.length = start[0]
        state.chain("full", np.arange(1, 17)[None])

    def whole() -> None:
        decoder.period(Way.DRAFT, plan, [16], None)

    for repeat in range(repeats + 2):
        for name, call in (("period", whole), ("entries", entries)):
            state.length, state.root = start
            begin = time.perf_counter()
            call()
            if repeat >= 2:
                taken[name].append(time.perf_counter() - begin)
    ratio = statistics.median(b / a for a, b in zip(taken["period"], taken["entries"], strict=True))
    return *(f"{statistics.median(v) * 1e3:.1f}" for v in taken.values()), f"{ratio:.2f}"


# memory

GROWN = """
import sys
import sirius_runtime
class Watch:
    most = 0
    def put(self, tokens):
        lines = open("/proc/self/smaps_rollup").read().splitlines()
        own = sum(int(n.split()[1]) for n in lines if n.startswith("Private_Dirty")) / 1024
        self.most = max(self.most, own)
    end = lambda self: None
def run(path):
    cpu, watch = ["CPUExecutionProvider"], Watch()
    model = sirius_runtime.load(path, backend="onnxruntime", providers=cpu, threads=1)
    options = {"max_new_tokens": 32, "eos_token_id": [], "streamer": watch}
    for mode in ("sirius", "full", "sparse"):
        model.generate(list(range(64)), mode=mode, **options)
    return model, watch.most
small, before = run(sys.argv[1])
large, after = run(sys.argv[2])
print(after - before)
"""
"""Prints by how many MiB a process grows as a large model generates, after a small one has run."""


def memory(subjects: Sequence[Subject], args: argparse.Namespace) -> None:
    if sys.platform != "linux":
        print("(reads /proc, which Linux has)")
        return
    rows = []
    for method in METHODS:
        small, path = (subject.compiled(method) for subject in subjects)
        done = subprocess.run(
            [sys.executable, "-c", GROWN, str(small), str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
        with Artifact.open(path) as artifact:
            gathered = gathered_bytes(artifact.program) / 2**20
        stored, grown = path.stat().st_size / 2**20, float(done.stdout.split()[-1])
        rows.append((method, f"{stored:.0f}", f"{gathered:.0f}", f"{grown:.0f}"))
    show((subjects[-1].title, "file, MiB", "kept neurons, gathered", "grown beside it"), rows)


def ways(subjects: Sequence[Subject], args: argparse.Namespace) -> None:
    formulations(args.threads)


TABLES: dict[str, Callable[[Sequence[Subject], argparse.Namespace], None]] = {
    "generation": generation,
    "period": period,
    "memory": memory,
    "formulations": ways,
}


if __name__ == "__main__":
    sys.exit(finish("benchmarks.onnx_speed", main))
