"""`compile_model`: from a transformers model, a directory or a name to a compiled program."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from sirius_compile.capture import Capture, capture
from sirius_compile.checkpoint import WeightSource, checkpoint_dtype, open_weights
from sirius_compile.config import BUILTIN, CompileConfig, Graphs
from sirius_compile.config_check import (
    check_config,
    check_token_ids,
    check_weights,
    read_generation_config,
)
from sirius_compile.generation import read_generation
from sirius_compile.live import check_model, compare, main_dtype
from sirius_compile.models import load_config, resolve_model
from sirius_compile.onnx.package import onnx_dtype, onnx_files
from sirius_compile.pipeline import back, front
from sirius_compile.rope import longest_sequence, rope_warnings
from sirius_compile.self_check import check_kernels
from sirius_compile.sparse_path import Chooser, SparsePath
from sirius_compile.texts import (
    BUILTIN_PROMPTS,
    Sample,
    on_policy,
    read_prompts,
    read_texts,
    windows,
)
from sirius_compile.tokenizer import tokenizer_files
from sirius_passes.manager import run_passes
from sirius_passes.mixtures import check_method
from sirius_passes.program import Program
from sirius_passes.sparsify import parameters
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.dtypes import dtype_name, dtype_of
from sirius_runtime.errors import CalibrationError, ConfigError, UnsupportedModelError
from sirius_runtime.graph import to_document
from sirius_runtime.kernels.native import kernels
from sirius_runtime.loading import BackendName, find_device, load, make_backend
from sirius_runtime.logits_options import GenerationSpec
from sirius_runtime.model import SiriusModel
from sirius_runtime.request import check_tree
from sirius_runtime.spec import (
    JSON,
    DType,
    Method,
    ModelSpec,
    PassRecord,
    PeriodSpec,
    ProgramSpec,
    ToolVersions,
    WeightSpec,
)
from sirius_runtime.text import read_tokenizer

Progress = Callable[[str, float], None]
"""Called after each stage with its name and its seconds."""


@dataclass(frozen=True)
class Compiled:
    """A compiled program in memory: its spec and graphs, and where its weights come from.

    `sparse`: what its sparse path was found to keep; None while it is dense. `warnings`: what of
    the model the artifact does not do.
    """

    spec: ProgramSpec
    program: Program
    sparse: SparsePath | None
    generation_config: Mapping[str, JSON]
    tokenizer_files: Mapping[str, bytes]
    _weights: Callable[[WeightSpec], Tensor]
    graphs: Graphs = Graphs.TORCH
    warnings: tuple[str, ...] = ()

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes the artifact to `path` (a temporary name, then renamed). `force` replaces a
        file.
        """
        path = Path(path)
        with ArtifactWriter(path, force=force) as writer:
            documents = self._documents()
            if self.graphs.for_torch:
                for name, document in documents.items():
                    writer.add_json(f"graphs/{name}.json", document)
            if self.graphs.for_onnx:
                for name, content in onnx_files(self.spec, documents.__getitem__).items():
                    writer.add_bytes(name, content)
            writer.add_json("generation_config.json", dict(self.generation_config))
            for name, content in self.tokenizer_files.items():
                writer.add_bytes(f"tokenizer/{name}", content)
            writer.add_weights(self.spec.weights, self._weights)
            writer.finish(self.spec, self._read_back)
        return path

    def _read_back(self, path: Path) -> None:
        """Loads what was written, as its user will; an artifact without PyTorch's graphs is opened
        only, and its tokenizer read.
        """
        if self.graphs is Graphs.ONNX:
            self._tokenizer()
        else:
            load(path, device="cpu", backend=BackendName.EAGER, verify=False)

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
            lambda name: to_document(self.program.graphs[name]),
            {spec.name: self._weights(spec) for spec in self.spec.weights},
            dtype=dtype_of(dtype or self.spec.model.dtype),
            device=find_device(device),
            rows=rows,
            context=context,
        )
        return SiriusModel(runner, self._tokenizer())

    def _documents(self) -> dict[str, JSON]:
        return {name: to_document(module) for name, module in self.program.graphs.items()}

    def _tokenizer(self) -> Tokenizer | None:
        content = self.tokenizer_files.get("tokenizer.json")
        return None if content is None else read_tokenizer(content)


def compile_model(
    model: str | Path | PreTrainedModel,
    config: CompileConfig = CompileConfig(),  # noqa: B008  (frozen)
    *,
    tokenizer: Any = None,
    dump_graphs: Path | None = None,
    progress: Progress = lambda stage, seconds: None,
) -> Compiled:
    """Compiles a shipped model's name, a directory, a hub id or short name, or a model in memory.

    `tokenizer`: a transformers tokenizer for a model in memory (others bring their own).
    `dump_graphs`: a folder for the graphs before and after each pass. Raises UserError classes,
    each naming the thing, the reason and the remedy, for what can't be compiled.
    """
    if dump_graphs is not None:
        _make_folder(dump_graphs)
    warnings: list[str] = []
    source = _open(model, config, tokenizer, warnings.append)
    return _Compilation(config, dump_graphs, progress, warnings).run(source)


@dataclass(frozen=True)
class _Source:
    """A model to compile: its config, its tokenizer, and how its weights are opened. `live`: the
    model itself, of one in memory.
    """

    name: str
    revision: str | None
    config: PretrainedConfig
    generation: GenerationConfig
    tokenizer_files: Mapping[str, bytes]
    prompts: Path
    dtype: torch.dtype
    trust_remote_code: bool
    open_weights: Callable[[Capture], WeightSource]
    live: PreTrainedModel | None = None


@dataclass(frozen=True)
class _StateDict:
    """The weights of a model in memory."""

    tensors: Mapping[str, Tensor]

    def get(self, name: str) -> Tensor:
        tensor = self.tensors[name].detach()
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device and has no values; load the model's weights first"
            )
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype


def _open(
    model: str | Path | PreTrainedModel,
    config: CompileConfig,
    tokenizer: Any,
    warn: Callable[[str], None],
) -> _Source:
    if not isinstance(model, str | Path):
        model = check_model(model)
        name = model.config.name_or_path or type(model).__name__
        check_config(model.config, name)
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        return _Source(
            name=name,
            revision=None,
            config=model.config,
            generation=model.generation_config or GenerationConfig.from_model_config(model.config),
            tokenizer_files=tokenizer_files(tokenizer),
            prompts=BUILTIN_PROMPTS,
            dtype=main_dtype(model),
            trust_remote_code=True,  # its code has run already
            open_weights=lambda capture: _StateDict(tensors),
            live=model,
        )
    if tokenizer is not None:
        raise ConfigError("tokenizer= goes with a model in memory; a directory brings its own")
    source = resolve_model(
        model,
        revision=config.revision,
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
    )
    hf_config = load_config(source)
    own_prompts = source.directory / "calibration_prompts.jsonl"
    return _Source(
        name=source.name,
        revision=source.revision,
        config=hf_config,
        generation=read_generation_config(source.directory, hf_config, source.name),
        tokenizer_files=tokenizer_files(source),
        prompts=own_prompts if own_prompts.exists() else BUILTIN_PROMPTS,
        dtype=checkpoint_dtype(source, hf_config),
        trust_remote_code=source.trust_remote_code,
        open_weights=lambda capture: open_weights(source, hf_config, capture.wanted, warn),
    )


class _Compilation:
    """One run of the compiler."""

    def __init__(
        self, config: CompileConfig, dump: Path | None, progress: Progress, warnings: list[str]
    ) -> None:
        self._config, self._dump, self._progress = config, dump, progress
        self._warnings = warnings
        self._method = Method(config.sparsity)
        self._records: tuple[PassRecord, ...] = ()

    def run(self, source: _Source) -> Compiled:
        config = self._config
        check_token_ids(source.generation, source.config, source.name)
        self._warnings += rope_warnings(source.config)
        max_seq_len = _max_seq_len(source.config, config.max_seq_len)
        check_tree(config.period, config.tree_width, source.config.vocab_size, flag="--")
        dtype = DType(config.dtype or dtype_name(source.dtype))
        if Graphs(config.graphs).for_onnx:
            dtype = onnx_dtype(config.dtype, dtype)
        with self._stage("capture"):
            captured = capture(
                source.config,
                trust_remote_code=source.trust_remote_code,
                dtype=dtype_of(dtype),
                live=source.live,
            )
        check_method(captured.program, self._method)
        with self._stage("open weights"):
            weights = source.open_weights(captured)
        program = captured.program
        self._check_weights(source, captured, weights, dtype_of(dtype))
        for name, spec in program.weights.items():
            if spec.retype:
                program.update_weight(name, dtype=str(dtype))

        generation, left_out = read_generation(source.generation, source.config.vocab_size)
        if left_out:
            self._warnings.append(f"not applied of generation_config: {', '.join(left_out)}")

        def spec_of(program: Program) -> ProgramSpec:
            return self._spec(source, program, dtype, max_seq_len, generation)

        def stored_form(spec: WeightSpec) -> Tensor:
            return _materialise(spec, captured, weights)

        def compiled(sparse: SparsePath | None) -> Compiled:
            return Compiled(
                spec=spec_of(program),
                program=program,
                sparse=sparse,
                generation_config=source.generation.to_diff_dict(),
                tokenizer_files=source.tokenizer_files,
                _weights=stored_form,
                graphs=Graphs(config.graphs),
                warnings=tuple(self._warnings),
            )

        self._passes(program, front(self._method))
        chooser = Chooser(
            config,
            program,
            spec_of=spec_of,
            weights=stored_form,
            samples=lambda: self._samples(compiled(None), source),
            dtype=dtype_of(dtype),
            device=find_device(config.device),
        )
        with self._stage("calibrate" if self._method.has_thresholds else "choose what to keep"):
            sparse = chooser.choose()
        self._passes(program, sparse.passes(self._method))
        self._passes(
            program,
            back(
                period=config.period,
                tree_width=config.tree_width,
                max_seq_len=max_seq_len,
                whole_periods=Graphs(config.graphs).whole_periods,
            ),
        )
        del chooser  # and the weights that it holds
        if Graphs(config.graphs) is not Graphs.ONNX and kernels() is not None:
            with self._stage("check kernels"):
                check_kernels(
                    spec_of(program),
                    lambda name: to_document(program.graphs[name]),
                    stored_form,
                    dtype_of(dtype),
                )
        return compiled(sparse)

    def _check_weights(
        self, source: _Source, captured: Capture, weights: WeightSource, dtype: torch.dtype
    ) -> None:
        """Looks at every weight, and runs a model in memory beside what was captured of it."""
        program, constants = captured.program, captured.constants
        with self._stage("check weights"):
            check_weights(
                (
                    (name, dtype if spec.retype else dtype_of(spec.dtype))
                    for name, spec in program.weights.items()
                    if name not in constants
                ),
                weights.get,
                source.name,
            )
            if source.live is not None:
                compare(
                    source.live,
                    program,
                    dtype,
                    lambda name: constants[name] if name in constants else weights.get(name),
                )

    def _passes(self, program: Program, passes: list[Any]) -> None:
        self._records += run_passes(
            program,
            passes,
            dump=self._dump,
            first=len(self._records),
            progress=lambda record: self._progress(f"pass {record.name}", record.seconds),
        )

    def _samples(self, compiled: Compiled, source: _Source) -> list[Sample]:
        """The text to calibrate on; `compiled` is dense yet."""
        tokenizer = compiled._tokenizer()
        if tokenizer is None:
            raise CalibrationError(
                f"{source.name} has no tokenizer to read calibration text with; add tokenizer.json "
                "to the model's directory, or use --sparsity topk or griffin"
            )
        if self._config.calibration == BUILTIN:
            plain = compiled.to_runtime(device=self._config.device)
            return on_policy(read_prompts(source.prompts), plain)
        longest = compiled.spec.model.max_seq_len
        return windows(read_texts(Path(self._config.calibration)), tokenizer, longest)

    def _spec(
        self,
        source: _Source,
        program: Program,
        dtype: DType,
        max_seq_len: int,
        generation: GenerationSpec,
    ) -> ProgramSpec:
        config = self._config
        eos = source.generation.eos_token_id
        if eos is None:
            eos = source.config.eos_token_id
        return ProgramSpec(
            model=ModelSpec(
                source=source.name,
                revision=source.revision,
                model_type=source.config.model_type,
                dtype=dtype,
                vocab_size=source.config.vocab_size,
                max_seq_len=max_seq_len,
                parameters=parameters(program),
            ),
            entries=program.entries(),
            weights=tuple(program.weights.values()),
            state=program.state,
            sparsity=program.sparsity,
            period=PeriodSpec(
                period=config.period,
                tree_width=config.tree_width,
                threshold=config.threshold,
                verify_temperature=config.verify_temperature,
                confidence=config.confidence,
                refresh=config.refresh,
            ),
            eos_token_ids=tuple([] if eos is None else [eos] if isinstance(eos, int) else eos),
            pad_token_id=source.generation.pad_token_id,
            passes=self._records,
            tools=ToolVersions(
                version("sirius-compile"), torch.__version__, transformers.__version__
            ),
            generation=generation,
        )

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._progress(name, time.perf_counter() - start)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # something else of that name, or a zero byte in it
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--dump-graphs {path}: no folder can be made there ({reason}); name another"
        ) from error


def _max_seq_len(config: PretrainedConfig, wanted: int | None) -> int:
    longest = longest_sequence(config)
    limit = longest.tokens or wanted or 2048
    if wanted is not None and wanted > limit:
        raise ConfigError(f"--max-seq-len must be in 2..{limit} ({longest.why}), got {wanted}")
    return int(wanted or limit)


def _materialise(spec: WeightSpec, captured: Capture, weights: WeightSource) -> Tensor:
    """The stored form of a weight: in the program's dtype and layout."""
    constant = captured.constants.get(spec.name)
    tensor = weights.get(spec.name) if constant is None else constant
    tensor = tensor.to(dtype_of(spec.dtype))
    return (tensor.mT if spec.transposed else tensor).contiguous()
