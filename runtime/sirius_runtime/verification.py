"""`verify`: checks that an artifact is sound, and compares this machine's logits with those of the
compiling machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sirius_runtime.artifact import MANIFEST, Artifact
from sirius_runtime.errors import ArtifactError
from sirius_runtime.loading import BackendName, load
from sirius_runtime.manifest_schema import validate
from sirius_runtime.onnx_files import PROGRAM, read_program
from sirius_runtime.self_test import Compared, Outcome, repeat
from sirius_runtime.spec import SelfTestSpec

if TYPE_CHECKING:
    import torch

_GRAPHS = "graphs/"
_SEVERITY = (Outcome.EQUAL, Outcome.ROUNDED, Outcome.DIFFERENT)


@dataclass(frozen=True)
class Verification:
    """The result for a sound artifact. `files`: number of its files without the manifest; `size`:
    their bytes; `graphs`: names of its graphs; `weights`: their number. `compared`: the self-test's
    result on `backend` for each entry; empty if the artifact has no self-test.
    """

    path: Path
    format_version: tuple[int, int]
    files: int
    size: int
    graphs: tuple[str, ...]
    weights: int
    backend: BackendName
    compared: tuple[Compared, ...]

    @property
    def outcome(self) -> Outcome | None:
        """The worst outcome of all entries; None without a self-test."""
        found = [one.outcome for one in self.compared]
        return max(found, key=_SEVERITY.index, default=None)


def verify(path: str | Path, *, device: str | torch.device | None = "cpu") -> Verification:
    """Checks the hash of every file, the manifest against its schema, every graph against the
    weights and inputs that it is bound to, the tokenizer and the chat templates. Then runs the
    self-test in the stored dtype.

    device: as for `load`. The back end is `eager`; it is `onnxruntime` where the artifact has no
    PyTorch graphs or PyTorch is not installed. Raises ArtifactError, naming the fault, for an
    artifact that is not sound, and the errors of `load`. A self-test that fails does not raise: it
    is part of the result.
    """
    with Artifact.open(path) as artifact:
        manifest, names = artifact.manifest, artifact.names(_GRAPHS)
        try:
            validate(artifact.read_json(MANIFEST))
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}; compile it again") from error
        if names and find_spec("torch") is not None:
            _check_bindings(artifact)
        if artifact.names(PROGRAM):
            read_program(artifact)
    by_torch = names and find_spec("torch") is not None
    backend = BackendName.EAGER if by_torch else BackendName.ONNXRUNTIME
    model = load(
        path,
        device=device if by_torch else None,
        backend=backend,
        verify=False,  # the hashes were checked above
        progress=lambda _: None,
    )
    compared: tuple[Compared, ...] = ()
    test: SelfTestSpec | None = manifest.self_test
    if test is not None:
        state = model.state(len(test.prompt) + len(test.block))
        program = manifest.program
        compared = repeat(state, test, program.model.dtype, nested=program.nested)
    return Verification(
        path=Path(path),
        format_version=manifest.format_version,
        files=len(manifest.files),
        size=sum(record.size for record in manifest.files.values()),
        graphs=tuple(name.removeprefix(_GRAPHS).removesuffix(".json") for name in names),
        weights=len(manifest.program.weights),
        backend=backend,
        compared=compared,
    )


def _check_bindings(artifact: Artifact) -> None:
    """Checks that the artifact has exactly the manifest's graphs, and that each matches it."""
    import torch

    from sirius_runtime.dtypes import dtype_of
    from sirius_runtime.graph import from_document
    from sirius_runtime.graph_check import check_entries, check_graph

    program = artifact.program
    try:
        check_entries(program)
        files = {f"{_GRAPHS}{entry.name}.json" for entry in program.entries}
        for name in sorted(files ^ set(artifact.names(_GRAPHS))):
            raise ArtifactError(f"{name} is not an entry of the manifest, or is missing")
        for entry in program.entries:
            document = artifact.read_json(f"{_GRAPHS}{entry.name}.json")
            dtype = dtype_of(program.model.dtype)
            module = from_document(document, dtype, torch.device("cpu"))
            check_graph(program, entry, module, dtype)
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.path}: {error}") from error
