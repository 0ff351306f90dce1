"""Writes an artifact of a real model's shapes with random weights, a tensor at a time.

python -m benchmarks.random_artifact 8b 8b.sirius
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.random_programs import SHAPES, RandomPrograms, _spec
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.command_line import finish
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.graph import to_document
from sirius_runtime.nested import GROUP, matrix_shape
from sirius_runtime.spec import Layout, Method, WeightSpec

CPU = torch.device("cpu")


def write(shape: str, path: Path, layers: int | None = None) -> None:
    """Writes an artifact of nested weights, of which drafts read 4 bits. One layer's values are
    every layer's: what is read is timed.
    """
    own = SHAPES[shape].with_layers(layers or SHAPES[shape].layers)
    programs = RandomPrograms(own, CPU, draft_bits=4)
    program = programs._program(Method.NONE)
    spec = _spec(program, own.vocabulary)
    tile = torch.empty(64 * 2**20, dtype=torch.uint8).random_(generator=torch.Generator())

    def values(weight: WeightSpec) -> Tensor:
        constant = programs._captured.constants.get(weight.name)
        if constant is not None:
            return constant.to(dtype_of(weight.dtype))
        if weight.nested is None:
            return torch.ones(weight.shape, dtype=dtype_of(weight.dtype))
        count = math.prod(weight.shape)
        planes = tile.repeat(-(-count // len(tile)))[:count].view(weight.shape)
        inputs = matrix_shape(weight.shape)[1]
        by_outputs = weight.nested is Layout.BY_OUTPUTS
        scales = planes[..., inputs // 2 :] if by_outputs else planes[:, :, GROUP:]
        scales[0].random_(0x1A, 0x1D)
        return planes

    with ArtifactWriter(path, force=True) as writer:
        for name in program.graphs:
            writer.add_json(f"graphs/{name}.json", to_document(program.graphs[name]))
        writer.add_weights(spec.weights, values)
        writer.finish(spec)
    print(f"{path}: {path.stat().st_size:,} bytes, {spec.model.parameters:,} parameters")


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--layers", type=int, help="of so many layers, not all")
    args = parser.parse_args()
    write(args.shape, args.artifact, args.layers)
    return None


if __name__ == "__main__":
    raise SystemExit(finish("benchmarks.random_artifact", main))
