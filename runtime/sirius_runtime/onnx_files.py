"""The ONNX graphs that an artifact holds, and their export to a folder.

    onnx/program.json    an `OnnxProgram`: the data needed to run the graphs
    onnx/<graph>.onnx    prefill, sparse, full, period, …

Exported graphs lie beside `weights.safetensors` and refer to offsets in it as ONNX external data.
ONNX Runtime maps the weights from there, in any language.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sirius_runtime.artifact import Artifact, Slot
from sirius_runtime.errors import ArtifactError, BackendError, ConfigError
from sirius_runtime.new_file import NewFile, write_file
from sirius_runtime.onnx_nested import part_of, parts
from sirius_runtime.safetensors_file import header_of, in_order, size_of
from sirius_runtime.spec import (
    DType,
    Method,
    ModelSpec,
    PeriodSpec,
    ProgramSpec,
    StateSpec,
    WeightSpec,
    from_json,
)

FOLDER = "onnx/"
PROGRAM = f"{FOLDER}program.json"
WEIGHTS_FILE = "weights.safetensors"
SELECT = "select"
"""The graph that chooses a prompt's neurons and gathers their weights."""
_GRAPHS = ("prefill", "sparse", "full", "period", "pick", "write")
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class GraphSpec:
    """The initializers that a graph keeps as external data.

    `weights` are read in place each time that the graph runs. `constants` (norms, biases) may be
    folded by a runtime's optimiser.
    """

    weights: tuple[str, ...]
    constants: tuple[str, ...]


@dataclass(frozen=True)
class OnnxProgram:
    """The data needed to run the graphs. `kept`: the outputs of `select` that `sparse` and `period`
    read.
    """

    opset: int
    ir_version: int
    onnx: str
    graphs: dict[str, GraphSpec]
    model: ModelSpec
    state: StateSpec
    method: Method
    kept: tuple[str, ...]
    period: PeriodSpec
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a weight, or one expert's part of it, lies in `WEIGHTS_FILE`."""

    offset: int
    length: int

    def entries(self) -> tuple[tuple[str, str], ...]:
        """The key-value pairs of ONNX external data."""
        return (
            ("location", WEIGHTS_FILE),
            ("offset", str(self.offset)),
            ("length", str(self.length)),
        )


def graph_file(name: str) -> str:
    """The entry of the artifact that holds the graph `name`."""
    return f"{FOLDER}{name}.onnx"


def expert_name(weight: str, index: int) -> str:
    """The name of the initializer for one expert's matrix of a weight of all experts [E, …, …]."""
    return f"{weight}[{index}]"


@dataclass(frozen=True)
class Stored:
    """A tensor of `WEIGHTS_FILE`: a weight, or a part of a nested one (see `onnx_nested`)."""

    spec: WeightSpec
    weight: WeightSpec
    part: str | None

    def names(self) -> Iterator[str]:
        """The names of its initializers: the whole tensor, and each expert's part."""
        yield self.spec.name
        if self.weight.of_experts:
            for index in range(self.spec.shape[0]):
                yield expert_name(self.spec.name, index)


def stored(program: ProgramSpec) -> list[Stored]:
    """The tensors of `WEIGHTS_FILE`, in its order."""
    found = {}
    for weight in program.weights:
        if weight.nested is None:
            found[weight.name] = Stored(weight, weight, None)
            continue
        for part, spec in parts(program, weight):
            found[spec.name] = Stored(spec, weight, part)
    return [found[spec.name] for spec in in_order([own.spec for own in found.values()])]


def places(program: ProgramSpec) -> dict[str, Place]:
    """The place of each weight, and of each expert's matrix, in `WEIGHTS_FILE`. It depends only on
    the program.
    """
    ordered = stored(program)
    found, offset = {}, len(header_of([own.spec for own in ordered]))
    for own in ordered:
        size = size_of(own.spec)
        whole, *experts = own.names()
        found[whole] = Place(offset, size)
        for index, name in enumerate(experts):
            part = size // len(experts)
            found[name] = Place(offset + index * part, part)
        offset += size
    return found


def gathered_bytes(program: ProgramSpec) -> int:
    """Bytes of the weights of a prompt's kept neurons, gathered for one row of a batch, without
    biases.
    """
    if not program.sparsity.method.per_prompt:
        return 0
    fixed = [site for site in program.sparsity.sites if not site.counted]
    return sum(int(site.kept) * site.params for site in fixed)


def read_program(artifact: Artifact) -> OnnxProgram:
    """The artifact's `OnnxProgram`. Raises BackendError, with the command that adds them, where the
    artifact has no ONNX graphs; and ArtifactError where they contradict the manifest.
    """
    if not artifact.names(PROGRAM):
        # ONNX Runtime has no bfloat16 on CPUs: graphs are added in another dtype.
        other = artifact.program.model.dtype is DType.BFLOAT16
        raise BackendError(
            f"{artifact.path} holds no ONNX graphs: compile it with sirius-compile --graphs both, "
            f"or add them with: sirius-compile onnx {artifact.path} --out with-onnx.sirius"
            f"{' --dtype float32' * other}"
        )
    try:
        found = from_json(OnnxProgram, artifact.read_json(PROGRAM), PROGRAM)
        _check_program(found, artifact)
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.path}: {error}; compile it again") from error
    return found


def _check_program(found: OnnxProgram, artifact: Artifact) -> None:
    """Checks that it agrees with the manifest, has all graphs, and names only stored weights."""
    program = artifact.program
    fields = {
        "model": (found.model, program.model),
        "state": (found.state, program.state),
        "method": (found.method, program.sparsity.method),
        "period": (found.period, program.period),
        "eos_token_ids": (found.eos_token_ids, program.eos_token_ids),
    }
    for name, (own, expected) in fields.items():
        if own != expected:
            raise ArtifactError(f"{PROGRAM}: {name} contradicts the manifest")
    needed = {*_GRAPHS, *(SELECT,) * bool(found.kept)}
    if missing := sorted(needed - found.graphs.keys()):
        raise ArtifactError(f"{PROGRAM}: there is no graph {', '.join(missing)}")
    names = set(artifact.names(FOLDER))
    weights = places(program).keys()
    for name, graph in found.graphs.items():
        if graph_file(name) not in names:
            raise ArtifactError(f"{PROGRAM}: there is no entry {graph_file(name)!r}")
        for weight in (*graph.weights, *graph.constants):
            if weight not in weights:
                raise ArtifactError(f"{PROGRAM}: weight {weight!r} of {name} is not stored")


def export_onnx(path: str | Path, folder: str | Path, *, force: bool = False) -> list[Path]:
    """Writes an artifact's ONNX graphs, its weights (once) and its tokenizer to `folder`.

    Returns the files. Needs neither PyTorch nor the onnx package. Raises BackendError for an
    artifact without ONNX graphs, and ConfigError for a folder that has files in it, unless `force`.
    """
    folder = Path(folder)
    with _disk_faults(folder):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; give the path of one")
        if folder.is_dir() and any(folder.iterdir()) and not force:
            raise ConfigError(f"{folder} is not empty; choose another folder or pass --force")
    with Artifact.open(path) as artifact, _disk_faults(folder):
        read_program(artifact)
        folder.mkdir(parents=True, exist_ok=True)
        names = artifact.names(FOLDER) + artifact.names("tokenizer/tokenizer.json")
        written = []
        for name in names:
            target = folder / Path(name).name
            write_file(target, artifact.read_bytes(name))
            written.append(target)
        _write_weights(artifact, folder / WEIGHTS_FILE)
        artifact.check_unchanged()
        return [*written, folder / WEIGHTS_FILE]


def _write_weights(artifact: Artifact, path: Path) -> None:
    """The artifact's weights as one safetensors file, in the order of `places`."""
    buffer, slots = artifact.weight_slots()
    ordered = stored(artifact.program)
    with NewFile(path) as new:
        new.file.write(header_of([own.spec for own in ordered]))
        view = memoryview(buffer)
        for own in ordered:
            slot = slots[own.weight.name]
            if own.part is not None:
                planes = array_of(buffer, slot).view(np.uint8)
                new.file.write(part_of(own.weight, planes, own.part).tobytes())
                continue
            for start in range(slot.start, slot.end, _CHUNK_BYTES):
                new.file.write(view[start : min(start + _CHUNK_BYTES, slot.end)])
        new.finish()


def array_of(buffer: mmap.mmap, slot: Slot) -> NDArray[np.generic]:
    """A weight as a view of the mapped file; bfloat16, which NumPy lacks, as int16 bits."""
    kind = slot.dtype.name
    dtype = np.int16 if kind == "bfloat16" else np.dtype(kind)
    return np.frombuffer(buffer, dtype, math.prod(slot.shape), slot.start).reshape(slot.shape)


@contextlib.contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "free some space, or write to a folder where you may"
        raise ArtifactError(f"{folder} can't be written ({reason}); {remedy}") from error
