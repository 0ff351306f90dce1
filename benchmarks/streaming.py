"""Measures the peak memory of a compilation, with random weights of any size.

    python -m benchmarks.streaming --gigabytes 8 -- --sparsity topk --no-measure --weights int8

Makes a checkpoint of random bfloat16 weights, one shard per layer, in a folder that is removed at
the end, and compiles it by `sirius-compile`, with the options after ``--``, in its own process. Its
memory is sampled every 20 ms. *Resident* is all resident memory; *anonymous* is the part that the
system can't reclaim, as the rest are pages of mapped files. The limit is a quarter of the weights
plus 1.5 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.compile_scale import tokenizer_of
from sirius_runtime.command_line import finish, positive_number
from sirius_runtime.errors import ConfigError

GB = 1e9
SHARE, FIXED = 0.25, 1.5 * GB
_SECONDS = 0.02


@dataclass(frozen=True)
class Peak:
    """Peak bytes by kind, and the seconds that the compilation took."""

    resident: int
    anonymous: int
    seconds: float


def config_of(gigabytes: float) -> LlamaConfig:
    """A Llama of layers as of 8 B parameters, as many as give this size."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32_000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=None,
        dtype="bfloat16",
    )
    left = gigabytes * GB - _bytes(_ends(config))
    config.num_hidden_layers = max(2, -int(-left // _bytes(_layer(config, 0))))
    return config


def _bytes(shapes: dict[str, Tensor]) -> int:
    return sum(2 * shape.numel() for shape in shapes.values())


def _ends(config: LlamaConfig) -> dict[str, Tensor]:
    size = (config.vocab_size, config.hidden_size)
    return {
        "model.embed_tokens.weight": torch.empty(size, device="meta"),
        "model.norm.weight": torch.empty(config.hidden_size, device="meta"),
        "lm_head.weight": torch.empty(size, device="meta"),
    }


def _layer(config: LlamaConfig, index: int) -> dict[str, Tensor]:
    C, I = config.hidden_size, config.intermediate_size  # noqa: E741
    keys = C // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (C, C),
        "self_attn.k_proj": (keys, C),
        "self_attn.v_proj": (keys, C),
        "self_attn.o_proj": (C, C),
        "mlp.gate_proj": (I, C),
        "mlp.up_proj": (I, C),
        "mlp.down_proj": (C, I),
        "input_layernorm": (C,),
        "post_attention_layernorm": (C,),
    }
    return {
        f"model.layers.{index}.{name}.weight": torch.empty(shape, device="meta")
        for name, shape in shapes.items()
    }


def make(folder: Path, config: LlamaConfig) -> int:
    """Writes the checkpoint, a shard at a time; returns the bytes of its weights."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1 << 26, generator=generator).mul_(0.02).bfloat16()
    shards = [_ends(config), *(_layer(config, i) for i in range(config.num_hidden_layers))]
    homes, total = {}, 0
    for number, shapes in enumerate(shards, start=1):
        tensors = {name: _random(shape, drawn, generator) for name, shape in shapes.items()}
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        homes |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return total


def _random(shape: Tensor, drawn: Tensor, generator: torch.Generator) -> Tensor:
    """Of this shape: numbers that were drawn once, from a random place on; ones for norms."""
    if shape.ndim == 1:
        return torch.ones(shape.shape, dtype=torch.bfloat16)
    start = int(torch.randint(len(drawn), (1,), generator=generator))
    own = drawn.roll(start).repeat(-(-shape.numel() // len(drawn)))
    return own[: shape.numel()].view(shape.shape).clone()


def compiled(folder: Path, out: Path, options: Sequence[str]) -> Peak:
    """Compiles it in its own process, and samples that process's memory."""
    begin = time.perf_counter()
    code = "from sirius_compile.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, folder, "--out", out, *options])
    resident = anonymous = 0
    while process.poll() is None:
        held = _held(process.pid)
        resident = max(resident, held.get("VmHWM", 0))
        anonymous = max(anonymous, held.get("RssAnon", 0))
        time.sleep(_SECONDS)
    if process.returncode:
        raise ConfigError(f"sirius-compile ended with {process.returncode}; see above")
    return Peak(resident, anonymous, time.perf_counter() - begin)


def _held(process: int) -> dict[str, int]:
    """A process's memory in bytes, by the names in /proc."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith("kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--gigabytes", type=positive_number, default=8)
    parser.add_argument("--folder", type=Path, help="where files go; by default a temporary one")
    parser.add_argument("options", nargs="*", help="of sirius-compile, after --")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise ConfigError("this benchmark reads /proc, which only Linux has")
    with TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        (model := folder / "model").mkdir()
        weights = make(model, config_of(args.gigabytes))
        out = folder / "m.sirius"
        peak = compiled(model, out, args.options)
        size = out.stat().st_size
    limit = SHARE * weights + FIXED
    print("| weights | artifact | limit | resident, at most | anonymous, at most | seconds |")
    print("|---|---|---|---|---|---|")
    sizes = (weights, size, limit, peak.resident, peak.anonymous)
    print(f"| {' | '.join(f'{value / GB:.2f} GB' for value in sizes)} | {peak.seconds:.0f} |")
    if peak.resident > limit:
        raise ConfigError(
            f"it held {peak.resident / GB:.2f} GB, and {limit / GB:.2f} GB is allowed"
        )
    return None


if __name__ == "__main__":
    raise SystemExit(finish("benchmarks.streaming", main))
