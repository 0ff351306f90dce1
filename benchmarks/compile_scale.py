"""Measures how compile time grows with a model's layers, by phase.

    python -m benchmarks.compile_scale --layers 8,32,80

Each model is made from a config alone, with tiny hidden sizes, so that only the work per layer that
does not depend on its size is timed. Seconds are the process's CPU time, which other processes
change little. The smallest model is the baseline: *ratio* is a phase's seconds per layer, relative
to the smallest model's in the same run. It is 1 if time is linear in layers, and less if a part of
it is constant.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sirius_compile import CompileConfig, compile_model
from sirius_runtime.command_line import finish
from sirius_runtime.errors import ConfigError
from sirius_runtime.loading import load

VOCABULARY = 128


@dataclass(frozen=True)
class Timed:
    """Seconds of a compilation, by phase, of a model of so many layers."""

    layers: int
    phases: dict[str, float]


def model_of(layers: int) -> LlamaForCausalLM:
    """A random Llama of tiny sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer_of() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def timed(layers: int, options: CompileConfig, folder: Path) -> Timed:
    """Compiles, saves and loads one model."""
    phases: dict[str, float] = {}
    model, tokenizer = model_of(layers), tokenizer_of()
    begin = last = time.process_time()

    def ended(phase: str, seconds: float = 0.0) -> None:
        nonlocal last
        now = time.process_time()
        phases[phase], last = now - last, now

    compiled = compile_model(model, options, tokenizer=tokenizer, progress=ended)
    path = compiled.save(folder / f"{layers}.sirius", force=True)
    ended("save")
    load(path, device="cpu", backend="eager")
    ended("load")
    return Timed(layers, phases | {"all": last - begin})


def table(title: str, rows: Sequence[Timed]) -> str:
    """Seconds by phase, and the last model's per layer beside the first one's."""
    head = [f"{row.layers} layers" for row in rows]
    lines = [
        f"| {title} | {' | '.join(f'{name}, s' for name in head)} | ratio |",
        f"|---|{'---|' * (len(rows) + 1)}",
    ]
    for phase in rows[0].phases:
        values = [row.phases[phase] for row in rows]
        ratio = (values[-1] / rows[-1].layers) / max(values[0] / rows[0].layers, 1e-9)
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {phase} | {cells} | {ratio:.2f} |")
    return "\n".join(lines)


def settings(text: Path) -> dict[str, CompileConfig]:
    return {
        "griffin": CompileConfig(sparsity="griffin"),
        "teal": CompileConfig(sparsity="teal", calibration=text, graphs="entries"),
        "griffin, auto:2": CompileConfig(
            sparsity="griffin", dense_layers="auto:2", calibration=text, graphs="entries"
        ),
    }


def layers_argument(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if len(counts) < 2 or min(counts) < 3:
        raise argparse.ArgumentTypeError(f"two or more numbers of 3 or more, got {text!r}")
    return counts


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=layers_argument, default=[8, 32, 80], metavar="N,M")
    parser.add_argument("--only", metavar="SETTING", help="griffin, teal or 'griffin, auto:2'")
    args = parser.parse_args()
    begin = time.perf_counter()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads\n"
    )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "words.jsonl"
        lines = [" ".join(f"w{(i * n) % VOCABULARY}" for i in range(64)) for n in (1, 3, 5, 7)]
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        chosen = settings(text)
        if args.only is not None and args.only not in chosen:
            raise ConfigError(f"no setting {args.only}; there are {', '.join(chosen)}")
        timed(3, settings(text)["griffin"], folder)  # what is paid once: imports, kernels
        for title, options in chosen.items():
            if args.only in (None, title):
                print(table(title, [timed(n, options, folder) for n in args.layers]), flush=True)
                print()
    print(f"{time.perf_counter() - begin:.0f} s")
    return None


if __name__ == "__main__":
    raise SystemExit(finish("benchmarks.compile_scale", main))
