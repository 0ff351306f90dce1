"""The result of a compilation, which can generate directly or be saved to an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sirius_compile.calibration import Calibration
from sirius_compile.chat import CHAT_FILE
from sirius_compile.config import Graphs
from sirius_compile.onnx.package import onnx_files
from sirius_compile.pipeline import Thresholds, sparsify
from sirius_compile.ranking import LayerAgreement
from sirius_compile.watch import Watch, unwatched
from sirius_passes.manager import Pass
from sirius_passes.program import Program
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.chat import Chat
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.graph import to_document
from sirius_runtime.loading import BackendName, find_device, load, make_backend
from sirius_runtime.model import SiriusModel
from sirius_runtime.safetensors_file import size_of
from sirius_runtime.self_test import choose_tokens, record
from sirius_runtime.spec import (
    JSON,
    AcceptanceSpec,
    DType,
    Method,
    ProgramSpec,
    SelfTestSpec,
    WeightSpec,
)
from sirius_runtime.text import read_tokenizer


@dataclass(frozen=True)
class SparsePath:
    """The choices for the sparse path.

    `keep`: the kept share of neurons, channels or experts. `dense_layers`: the layers left dense.
    `calibration`: the thresholds, None if the method has none. `ranking`: the layers by the
    agreement that their sparsity costs, for `--dense-layers auto:N`. `acceptance`: the measured
    acceptance of drafts, None if not measured.
    """

    keep: float
    dense_layers: tuple[int, ...]
    calibration: Calibration | None
    ranking: tuple[LayerAgreement, ...]
    acceptance: AcceptanceSpec | None = None

    @property
    def thresholds(self) -> Thresholds:
        return self.calibration.thresholds if self.calibration else Thresholds()

    def passes(self, method: Method) -> list[Pass]:
        """The passes that apply these choices."""
        return sparsify(method, self.keep, self.thresholds, self.dense_layers)


@dataclass(frozen=True)
class Compiled:
    """A compiled program in memory: its spec, its graphs, and a function that gives its weights.

    `weights`: gives the stored form of a weight. `sparse`: the choices for the sparse path; None
    while the program is dense. `warnings`: messages for the user.
    """

    spec: ProgramSpec
    program: Program
    sparse: SparsePath | None
    generation_config: Mapping[str, JSON]
    tokenizer_files: Mapping[str, bytes]
    weights: Callable[[WeightSpec], Tensor]
    graphs: Graphs = Graphs.TORCH
    warnings: tuple[str, ...] = ()

    def save(self, path: str | Path, *, force: bool = False, watch: Watch = unwatched) -> Path:
        """Writes the artifact to a temporary name, one weight at a time, and renames it to `path`.

        `force`: replace an existing file. `watch`: shows the progress.
        """
        path = Path(path)
        with ArtifactWriter(path, force=force) as writer:
            documents = {name: self.document(name) for name in self.program.graphs}
            if self.graphs.for_torch:
                for name, document in documents.items():
                    writer.add_json(f"graphs/{name}.json", document)
            if self.graphs.for_onnx:
                for name, content in onnx_files(self.spec, documents.__getitem__).items():
                    writer.add_bytes(name, content)
            writer.add_json("generation_config.json", dict(self.generation_config))
            for name, content in self.tokenizer_files.items():
                writer.add_bytes(f"tokenizer/{name}", content)
            total = sum(map(size_of, self.spec.weights))
            with watch.measure("write artifact", total) as done:

                def fetch(spec: WeightSpec) -> Tensor:
                    done(size_of(spec))
                    return self.weights(spec)

                writer.add_weights(self.spec.weights, fetch)
            writer.finish(self.spec, self._read_back)
        return path

    def _read_back(self, path: Path) -> SelfTestSpec | None:
        """Loads the written file as a user would, and records the self-test's expected results.

        An artifact without PyTorch graphs has no self-test; only its tokenizer is read.
        """
        if self.graphs is Graphs.ONNX:
            self.tokenizer()
            return None
        model = load(path, device="cpu", backend=BackendName.EAGER, verify=False)
        prompt, block = choose_tokens(self.spec.model)
        return record(model.state(len(prompt) + len(block)), prompt, block)

    def to_runtime(
        self,
        *,
        device: str | torch.device | None = None,
        dtype: DType | str | None = None,
        backend: BackendName | str = BackendName.EAGER,
        rows: int = 1,
        context: int | None = None,
    ) -> SiriusModel:
        """The program ready to generate, without a file; arguments as for `sirius_runtime.load`."""
        runner = make_backend(
            backend,
            self.spec,
            self.document,
            {spec.name: self.weights(spec) for spec in self.spec.weights},
            dtype=dtype_of(dtype or self.spec.model.dtype),
            device=find_device(device),
            rows=rows,
            context=context,
        )
        return SiriusModel(runner, self.tokenizer(), chat=self.chat())

    def spec_of(self, program: Program) -> ProgramSpec:
        """The spec of another program of the same model, such as a trial copy."""
        return replace(
            self.spec,
            entries=program.entries(),
            weights=tuple(program.weights.values()),
            sparsity=program.sparsity,
        )

    def document(self, entry: str) -> JSON:
        """The graph document of an entry."""
        return to_document(self.program.graphs[entry])

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if there is one."""
        content = self.tokenizer_files.get("tokenizer.json")
        return None if content is None else read_tokenizer(content)

    def chat(self) -> Chat | None:
        """The chat templates, if there are any."""
        content = self.tokenizer_files.get(CHAT_FILE)
        return None if content is None else Chat.read(json.loads(content))
