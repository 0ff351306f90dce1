"""ONNX Runtime beside PyTorch: dense and Sirius on both, in one interleaved run.

    python benchmarks/onnx_speed.py                    # the tables, for the README
    python benchmarks/onnx_speed.py --genai DIR        # and onnxruntime-genai on the same weights

`generation`: tokens per second after prefill, medians over prompts that all rows answer in turn.
`period`: one call of the graph `period` against driving `sparse` and `full` from outside.
`formulations`: one MLP of one token, by the ways that standard operators have of leaving neurons
out, against computing all of them. DIR is what onnxruntime-genai's model builder writes:

    python -m onnxruntime_genai.models.builder -m sirius_compile/shipped/tally-3m -o DIR \\
        -p fp32 -e cpu
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sirius_compile import CompileConfig, compile_model
from sirius_compile.onnx import emit as e
from sirius_compile.onnx.lower import make_model
from sirius_compile.onnx.mlp import activation, topk
from sirius_compile.onnx.scope import Scope, Value, value_info
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime import load
from sirius_runtime.model import SiriusModel
from sirius_runtime.plan import Plan
from sirius_runtime.request import Options, read_options
from sirius_runtime.stats import PhaseClock, StatsRecorder

Run = Callable[[Any], float]
"""Tokens per second on a prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--genai", type=Path, help="a folder of onnxruntime-genai's builder")
    parser.add_argument("--tables", nargs="+", default=["generation", "period", "formulations"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, {args.threads} threads,"
        f" {platform.machine()}, float32"
    )
    tables: dict[str, Callable[[argparse.Namespace], None]] = {
        "generation": generation,
        "period": period,
        "formulations": formulations,
    }
    for name in args.tables:
        print(f"\n{name}\n")
        tables[name](args)


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


# generation


def generation(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for title, make, prompts in (
            ("tally-3m", "tally-3m", shipped(args.prompts)),
            ("random Llama, hidden 1024", random_llama(), tokens(args.prompts)),
        ):
            runs: dict[str, Run] = {}
            for method in ("griffin", "topk"):
                config = CompileConfig(sparsity=method, dtype="float32", backend="both", period=16)
                path = compile_model(make, config).save(
                    Path(folder) / f"{method}.sirius", force=True
                )
                for backend in ("torch", "onnx"):
                    model = opened(path, backend, args.threads)
                    if method == "griffin":
                        runs[f"{backend}, dense"] = by(model, mode="full")
                    # A model of random weights accepts nothing of itself: all drafts are taken.
                    threshold = 0.1 if make == "tally-3m" else 0.0
                    runs[f"{backend}, Sirius, {method}"] = by(model, threshold=threshold)
            if args.genai and make == "tally-3m":
                runs["onnxruntime-genai, dense"] = genai(args.genai, args.threads)
            show(
                (title, "tokens/s", "x torch, dense", "x onnx, dense"),
                list(compared(runs, list(prompts))),
            )
            print()


def shipped(count: int) -> Iterator[str]:
    return (p.prompt for p in islice(problems(Task.REASONING, "test", seed=11), count))


def tokens(count: int) -> Iterator[list[int]]:
    generator = np.random.default_rng(0)
    return (generator.integers(0, 8192, 64).tolist() for _ in range(count))


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


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


def by(model: SiriusModel, **options: Any) -> Run:
    def run(prompt: Any) -> float:
        output = model.generate(prompt, max_new_tokens=96, eos_token_id=[], **options)
        return output.stats.tokens_per_second

    return run


def genai(folder: Path, threads: int) -> Run:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = f'{{"intra_op_num_threads": {threads}}}'
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {options}}}}}}}')
    model = og.Model(config)
    # Its own tokenizer can't read every tokenizer.json; ids are the same by the original.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def run(prompt: str) -> float:
        parameters = og.GeneratorParams(model)
        ids = tokenizer.encode(prompt).ids
        parameters.set_search_options(
            max_length=len(ids) + 96, min_length=len(ids) + 96, do_sample=False
        )
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        generator.generate_next_token()
        begin, made = time.perf_counter(), 0
        while not generator.is_done():
            generator.generate_next_token()
            made += 1
        return made / (time.perf_counter() - begin)

    return run


def compared(runs: dict[str, Run], prompts: Sequence[Any]) -> Iterator[tuple[str, ...]]:
    """One line a run: its speed, and its ratios to the dense runs on the same prompt."""
    for run in runs.values():  # the first call pays for allocation
        run(prompts[0])
    speeds = {name: [] for name in runs}
    for prompt in prompts:
        for name, run in runs.items():
            speeds[name].append(run(prompt))
    for name, own in speeds.items():
        ratios = (
            statistics.median(a / b for a, b in zip(own, speeds[base], strict=True))
            for base in ("torch, dense", "onnx, dense")
        )
        yield name, f"{statistics.median(own):.0f}", *(f"{ratio:.2f}" for ratio in ratios)


# one call a period


def period(args: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for title, make in (("tally-3m", "tally-3m"), ("random Llama", random_llama())):
            config = CompileConfig(sparsity="griffin", dtype="float32", backend="onnx", period=16)
            path = compile_model(make, config).save(Path(folder) / "m.sirius", force=True)
            rows.append((title, *one_call(opened(path, "onnx", args.threads), args.prompts)))
    show(("k = 16, w = 1", "one call, ms", "entries, ms", "entries / one call"), rows)


def one_call(model: SiriusModel, repeats: int) -> tuple[str, ...]:
    """A period by `period`, and as 15 calls of `sparse` and one of `full` over 16 tokens."""
    backend: Any = model.backend
    prompt = list(range(1, 64))
    request = read_options(
        Options(threshold=0.0),
        model.program,
        backend.limits,
        prompt_lengths=[len(prompt)],
        max_new_tokens=400,
        eos=frozenset(),
        stop=(),
    )
    decoder = backend.open(
        request, 1, 480, StatsRecorder(1, 0, 0, PhaseClock(backend.device)), None
    )
    decoder.prefill([prompt])
    start = decoder._length, decoder._root
    taken: dict[str, list[float]] = {"period": [], "entries": []}

    def entries() -> None:
        for _ in range(15):
            decoder.sparse_step()
        decoder._length = start[0]
        decoder._tokens("full", np.arange(1, 17)[None])

    def whole() -> None:
        decoder.period(Plan(16, 1, threshold=0.0), [16], None)

    for repeat in range(repeats + 2):
        for name, call in (("period", whole), ("entries", entries)):
            decoder._length, decoder._root = start
            begin = time.perf_counter()
            call()
            if repeat >= 2:
                taken[name].append(time.perf_counter() - begin)
    ratio = statistics.median(b / a for a, b in zip(taken["period"], taken["entries"], strict=True))
    return *(f"{statistics.median(v) * 1e3:.1f}" for v in taken.values()), f"{ratio:.2f}"


# ways of leaving neurons out

C, I = 2048, 5632  # of a model of 1.1 billion parameters  # noqa: E741


def formulations(args: argparse.Namespace) -> None:
    ways: dict[str, Callable[[Scope, Value, int], Value]] = {
        "all neurons": dense,
        "griffin, gathered once a prompt": gathered_once,
        "griffin, gathered by index each step": gathered_by_index,
        "topk, all computed and masked": masked,
        "topk, gathered each step": gathered_each_step,
    }
    rows = []
    for keep in (0.5, 0.3, 0.1):
        seconds = measured({n: built(w, round(keep * I), args.threads) for n, w in ways.items()})
        base = seconds["all neurons"]
        for name, own in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
            rows.append((name, str(keep), f"{statistics.median(own) * 1e3:.2f}", f"{ratio:.2f}"))
    show((f"MLP {C} x {I}, one token", "kept", "ms", "time / all neurons"), rows)


def dense(s: Scope, x: Value, keep: int) -> Value:
    gate, up, down = weights(s, I)
    z = e.elementwise(
        s, "Mul", activation(s, e.linear(s, x, gate, None), "silu"), e.linear(s, x, up, None)
    )
    return e.flat_matmul(s, z, down)


def gathered_once(s: Scope, x: Value, keep: int) -> Value:
    gate, up = (s.input(name, "float32", (C, keep)) for name in ("gate", "up"))
    down = s.input("down", "float32", (keep, C))
    z = e.elementwise(s, "Mul", activation(s, e.matmul(s, x, gate), "silu"), e.matmul(s, x, up))
    return e.matmul(s, z, down)


def gathered_by_index(s: Scope, x: Value, keep: int) -> Value:
    neurons = s.input("neurons", "int64", (keep,))
    gate, up, down = (e.gather(s, w, neurons, 0) for w in weights(s, I))
    g = activation(s, s.op("Gemm", x, gate, shape=(1, keep), transB=1), "silu")
    z = e.elementwise(s, "Mul", g, s.op("Gemm", x, up, shape=(1, keep), transB=1))
    return e.matmul(s, z, down)


def masked(s: Scope, x: Value, keep: int) -> Value:
    gate, up, down = weights(s, I)
    g = activation(s, e.linear(s, x, gate, None), "silu")
    _, index = topk(s, s.op("Abs", g, shape=g.shape), keep)
    ones, none = e.filled(s, [1, keep], 1.0, "float32"), e.filled(s, [1, I], 0.0, "float32")
    kept = s.op("ScatterElements", none, index, ones, shape=(1, I), axis=1)
    z = e.elementwise(s, "Mul", e.elementwise(s, "Mul", g, kept), e.linear(s, x, up, None))
    return e.flat_matmul(s, z, down)


def gathered_each_step(s: Scope, x: Value, keep: int) -> Value:
    gate, up, down = weights(s, I)
    g = activation(s, e.linear(s, x, gate, None), "silu")
    _, index = topk(s, s.op("Abs", g, shape=g.shape), keep)
    flat = e.reshape(s, index, [keep])
    rows = e.gather(s, up, flat, 0)
    z = e.elementwise(
        s, "Mul", e.take(s, g, index, 1), s.op("Gemm", x, rows, shape=(1, keep), transB=1)
    )
    return e.matmul(s, z, e.gather(s, down, flat, 0))


def weights(s: Scope, neurons: int) -> tuple[Value, Value, Value]:
    gate, up, down = (s.weight(name, "float32", (neurons, C)) for name in ("gate", "up", "down"))
    return gate, up, down


def built(way: Callable[[Scope, Value, int], Value], keep: int, threads: int) -> Callable[[], None]:
    """One call of the graph that `way` makes."""
    s, generator = Scope(), np.random.default_rng(0)
    y = s.returned(way(s, s.input("x", "float32", (1, C)), keep), "y")
    model = make_model(s.graph("mlp", [value_info(y)]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_prepacking", "1")
    held = []
    for tensor in model.graph.initializer:
        if tensor.name in ("gate", "up", "down"):
            tensor.CopyFrom(placed(tensor.name, tuple(tensor.dims)))
            array = generator.standard_normal(tuple(tensor.dims), np.float32)
            held.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
            options.add_initializer(tensor.name, held[-1])
    scratch = tempfile.TemporaryDirectory()
    (Path(scratch.name) / "w").touch()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", scratch.name
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {}
    for i in session.get_inputs():
        if i.name == "neurons":
            given[i.name] = np.sort(generator.permutation(I)[:keep])
        else:
            given[i.name] = generator.standard_normal(i.shape, np.float32)
    return lambda held=held: session.run(None, given)  # type: ignore[misc]


def placed(name: str, shape: tuple[int, ...]) -> Any:
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (
        ("location", "w"),
        ("offset", "0"),
        ("length", str(4 * shape[0] * shape[1])),
    ):
        tensor.external_data.add(key=key, value=value)
    return tensor


def measured(calls: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(23):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if repeat >= 3:
                taken[name].append(time.perf_counter() - begin)
    return taken


if __name__ == "__main__":
    main()
