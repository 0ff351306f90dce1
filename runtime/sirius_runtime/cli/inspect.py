"""`sirius inspect`: what an artifact holds."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sirius_runtime.cli.command import Command
from sirius_runtime.command_line import path_argument, say
from sirius_runtime.terminal import plain


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    parser.add_argument("--json", action="store_true", help="print the whole manifest")


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.artifact import Artifact
    from sirius_runtime.spec import to_json

    with Artifact.open(args.artifact) as artifact:
        manifest = artifact.manifest
    if args.json:
        say(json.dumps(to_json(manifest)))
        return
    for line in describe(manifest):
        say(plain(line))  # names and versions are whatever the file says


def describe(manifest: Any) -> list[str]:
    """A manifest as lines for a reader."""
    from sirius_runtime.onnx_files import gathered_bytes
    from sirius_runtime.rules import values

    program = manifest.program
    model, sparsity, state = program.model, program.sparsity, program.state
    size = sum(record.size for record in manifest.files.values())
    weights = sum(r.size for name, r in manifest.files.items() if name.startswith("weights/"))
    revision = f" at {model.revision}" if model.revision else ""
    numbers = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in values(program.period).items())
    lines = [
        f"model      {model.source}{revision} ({model.model_type}), "
        f"{model.parameters:,} parameters in {model.dtype}",
        f"sequence   up to {model.max_seq_len} tokens, vocabulary {model.vocab_size}, "
        f"EOS {', '.join(map(str, program.eos_token_ids)) or 'none'}",
        f"cache      {state.layers} layers x {state.kv_heads} heads x {state.key_dim}",
        f"sparsity   {sparsity.method}, kept share {sparsity.keep}, density {sparsity.density:.3f}",
        f"period     {program.period.period} tokens, tree width {program.period.tree_width}, "
        f"{numbers}, confidence {program.period.confidence}, refresh "
        f"{program.period.refresh or 'never'}",
        f"choosing   {_said(program.generation)}",
        f"files      {len(manifest.files)}, {size:,} bytes, {weights:,} of them weights",
        f"compiled   sirius-compile {program.tools.sirius}, torch {program.tools.torch}, "
        f"transformers {program.tools.transformers}; "
        f"format {'.'.join(map(str, manifest.format_version))}",
    ]
    if graphs := [name for name in manifest.files if name.endswith(".onnx")]:
        extra = gathered_bytes(program)
        copies = f"; a row's kept neurons, gathered: {extra:,} bytes more" if extra else ""
        lines.append(f"onnx       {len(graphs)} graphs{copies}")
    if sparsity.dense_layers:
        lines.append(f"dense      layers {', '.join(map(str, sparsity.dense_layers))}")
    for site in sparsity.sites:
        above = "" if site.threshold is None else f", above {site.threshold:.4g}"
        lines.append(
            f"layer {site.layer:<4} keeps {site.kept:g} of {site.units} of {site.weight}{above}"
        )
    for entry in program.entries:
        inputs = ", ".join(f"{t.name}{_shape(t)}" for t in entry.inputs)
        outputs = ", ".join(f"{t.name}{_shape(t)}" for t in entry.outputs)
        lines.append(f"entry      {entry.name}({inputs}) -> {outputs}")
    lines += [f"pass       {record.name}: {record.rewrites} rewrites" for record in program.passes]
    return lines


def _said(generation: Any) -> str:
    """What an artifact says of choosing tokens."""
    given = generation.logits.said() | generation.sampling.said()
    names = [f"{name} {_short(value)}" for name, value in given.items()]
    return ", ".join(names) or "the likeliest token, as it is"


def _short(value: Any) -> str:
    return f"({len(value)})" if isinstance(value, tuple) and len(value) > 4 else str(value)


def _shape(tensor: Any) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


COMMAND = Command("show what an artifact holds", _add_arguments, _run)
