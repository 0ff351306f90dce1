"""`compile_model`: from a transformers model, a directory or a name to a compiled program."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from sirius_compile.acceptance import PAYS
from sirius_compile.capture import Capture, capture
from sirius_compile.checkpoint import Kept, WeightSource
from sirius_compile.config import AUTO, BUILTIN, CompileConfig, Graphs
from sirius_compile.config_check import check_token_ids, check_weights
from sirius_compile.generation import read_generation
from sirius_compile.live import compare
from sirius_compile.onnx.package import onnx_dtype
from sirius_compile.opening import open_source
from sirius_compile.pipeline import back, front
from sirius_compile.product import Compiled, SparsePath
from sirius_compile.rope import max_seq_len, rope_warnings
from sirius_compile.search import Search, shares_of, with_setting
from sirius_compile.self_check import check_kernels
from sirius_compile.source import Source
from sirius_compile.sparse_path import Chooser
from sirius_compile.texts import hold_out, read_prompts, read_windows
from sirius_compile.tokenwise import Tokenwise
from sirius_compile.watch import Watch, unwatched
from sirius_compile.workspace import Workspace, fingerprint
from sirius_compile.writing import CONTINUATION, Text, write
from sirius_passes.manager import Pass, run_passes
from sirius_passes.mixtures import check_method
from sirius_passes.nest_weights import NestWeights, reasons_text
from sirius_passes.program import Program, copy_program
from sirius_passes.sparsify import parameters
from sirius_passes.stored_form import is_stored_form, stored_form
from sirius_passes.tracing import one_at_a_time
from sirius_runtime.dtypes import dtype_name, dtype_of
from sirius_runtime.errors import CalibrationError, ConfigError
from sirius_runtime.kernels.native import kernels
from sirius_runtime.loading import find_device
from sirius_runtime.request import check_tree
from sirius_runtime.rules import RULES, values
from sirius_runtime.spec import (
    FORMAT_VERSION,
    JSON,
    NESTED_FORMAT_VERSION,
    AcceptanceSpec,
    DType,
    Method,
    ModelSpec,
    PassRecord,
    PeriodSpec,
    ProgramSpec,
    SearchSpec,
    SettingSpec,
    ToolVersions,
    WeightSpec,
    from_json,
    to_json,
)

__all__ = ["Compiled", "compile_model"]

Progress = Callable[[str, float], None]
"""Called after each stage with its name and its seconds."""
Stored = Callable[[WeightSpec], Tensor]
"""Gives the stored form of a weight."""
# In a workspace: the chosen SparsePath, and the settings that a search has measured.
_CHOICES, _SETTINGS = "choices.json", "settings.json"
SEARCH_HOLDS_OUT = 2
"""A search holds out every second text. It needs more to measure, and its thresholds are not kept.
"""


@one_at_a_time
def compile_model(
    model: str | Path | PreTrainedModel,
    config: CompileConfig = CompileConfig(),  # noqa: B008  (frozen)
    *,
    tokenizer: Any = None,
    dump_graphs: Path | None = None,
    progress: Progress = lambda stage, seconds: None,
    watch: Watch = unwatched,
    workspace: Workspace | None = None,
) -> Compiled:
    """Compiles a shipped model's name, a directory, a hub id or short name, or a model in memory.

    `tokenizer`: a transformers tokenizer for a model in memory (others have their own).
    `dump_graphs`: a folder for the graphs before and after each pass. `progress`: called after each
    stage. `watch`: shows the progress of calibration. `workspace`: keeps weights that are cast,
    transposed or nested on disk instead of in memory; the result maps them from there, so use it
    before leaving the workspace. Calls from several threads run one after the other.

    Raises a subclass of UserError if the model can't be compiled or an option is invalid. Its
    message has the reason and the remedy.
    """
    if dump_graphs is not None:
        _make_folder(dump_graphs)
    warnings: list[str] = []
    source = open_source(model, config, tokenizer, warnings.append)
    return _Compilation(source, config, dump_graphs, progress, watch, warnings, workspace).run()


class _Compilation:
    """One run of the compiler, from a source to a product."""

    def __init__(
        self,
        source: Source,
        config: CompileConfig,
        dump: Path | None,
        progress: Progress,
        watch: Watch,
        warnings: list[str],
        workspace: Workspace | None,
    ) -> None:
        self._workspace, self._choosing = workspace, False
        self._source, self._config = source, config
        self._dump, self._progress, self._watch, self._warnings = dump, progress, watch, warnings
        self._graphs = Graphs(config.graphs)
        self._records: tuple[PassRecord, ...] = ()
        self._period, self._confidence = config.given_period, config.confidence or 0.0
        self._acceptance: AcceptanceSpec | None = None
        self._searched: SearchSpec | None = None
        check_token_ids(source.generation, source.config, source.name)
        self._warnings += rope_warnings(source.config)
        self._max_seq_len = max_seq_len(source.config, config.max_seq_len)
        check_tree(config.given_period, config.tree_width, source.config.vocab_size, flag="--")
        self._dtype = DType(config.dtype or dtype_name(source.dtype))
        if self._graphs.for_onnx:
            self._dtype = onnx_dtype(config.dtype, self._dtype)

    def run(self) -> Compiled:
        """Captures, pairs the paths, chooses what the sparse path keeps, and lays out weights."""
        if self._workspace is not None:
            self._workspace.begin(self._identity())
        captured = self._capture()
        program, stored = captured.program, self._open_weights(captured)
        self._generation, left_out = read_generation(
            self._source.generation, self._source.config.vocab_size
        )
        if left_out:
            self._warnings.append(f"generation_config: not applied: {', '.join(left_out)}")
        if self._config.searches:
            self._search(program, stored)
        config = self._config

        self._passes(program, front(self._method))
        dense = self._product(program, stored)
        sparse = self._choose(dense)
        self._set_drafting(sparse.acceptance)
        self._passes(program, sparse.passes(self._method))
        bits = config.nested_bits
        nest = None if bits is None else NestWeights(bits)
        self._passes(
            program,
            back(
                period=self._period,
                tree_width=config.tree_width,
                max_seq_len=self._max_seq_len,
                whole_periods=self._graphs.whole_periods,
                nest=nest,
            ),
        )
        if nest is not None and nest.not_nested:
            self._warnings.append(
                f"--weights int8 leaves {len(nest.not_nested)} of {nest.matrices} matrices as they "
                f"are: {reasons_text(nest.not_nested)}"
            )
        compiled = self._product(program, stored, sparse)
        self._check_kernels(compiled)
        return compiled

    def _capture(self) -> Capture:
        source = self._source
        with self._stage("capture"):
            captured = capture(
                source.config,
                trust_remote_code=source.trust_remote_code,
                dtype=dtype_of(self._dtype),
                live=source.live,
            )
        if self._config.sparsity != AUTO:
            check_method(captured.program, self._method)
        return captured

    def _open_weights(self, captured: Capture) -> Stored:
        """Opens the weights, checks each, and sets the program's dtype."""
        program = captured.program
        with self._stage("open weights"):
            weights = self._source.open_weights(captured.wanted)
            if self._source.slow:
                weights = Kept(weights, captured.wanted, self._workspace)
        if self._workspace is not None:
            held = [p for path in self._source.files for p in path.glob("*.safetensors")]
            self._workspace.bound(_bytes(program, dtype_of(self._dtype)), held)
        with self._stage("check weights"):
            self._check_weights(captured, weights)
        for name, spec in program.weights.items():
            if spec.retype:
                program.update_weight(name, dtype=str(self._dtype))
        return lambda spec: self._stored(spec, captured, weights)

    def _stored(self, spec: WeightSpec, captured: Capture, weights: WeightSource) -> Tensor:
        """The stored form of a weight: in the program's dtype and layout."""
        constant = captured.constants.get(spec.name)
        tensor = weights.get(spec.name) if constant is None else constant
        if self._workspace is None or constant is not None or is_stored_form(spec, tensor):
            return stored_form(spec, tensor)
        # Calibration holds weights for a long time, and nesting is slow: both are kept on disk.
        # Transposing for the artifact is cheap, so it is repeated instead.
        keep = self._choosing or spec.nested is not None
        return self._workspace.weight(spec, lambda: stored_form(spec, tensor), keep=keep)

    def _check_weights(self, captured: Capture, weights: WeightSource) -> None:
        """Checks every weight, and compares a model in memory with its captured graph."""
        program, constants = captured.program, captured.constants
        source, dtype = self._source, dtype_of(self._dtype)
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

    @property
    def _method(self) -> Method:
        return Method(self._config.sparsity)

    def _search(self, program: Program, stored: Stored) -> None:
        """Searches for the setting of the sparse path, and sets the options to it. `program`: as
        captured; it is not changed.
        """
        config, device = self._config, find_device(self._config.device)
        shares = shares_of(config, program)

        def chooser(method: Method) -> Chooser:
            copy = copy_program(program)
            run_passes(copy, front(method))
            dense = self._product(copy, stored)
            options = with_setting(config, method, shares[method][0])
            return Chooser(
                options,
                dense,
                lambda path, held_only: self._text(path, dense, held_only, SEARCH_HOLDS_OUT),
                device,
                self._watch,
            )

        kept = None if self._workspace is None else self._workspace.recall(_SETTINGS)
        known = [from_json(SettingSpec, one, _SETTINGS) for one in json.loads(kept or "[]")]

        def keep(settings: Sequence[SettingSpec]) -> None:
            if self._workspace is not None and len(settings) > len(known):
                self._workspace.keep(_SETTINGS, json.dumps(to_json(settings)))

        self._choosing = True
        search = Search(
            config,
            shares,
            chooser,
            self._stage,
            known=known,
            keep=keep,
            warn=self._warnings.append,
        )
        self._searched = search.run()
        self._choosing = False
        chosen = self._searched.settings[self._searched.chosen]
        self._config = with_setting(config, chosen.method, chosen.keep)

    def _choose(self, dense: Compiled) -> SparsePath:
        """Chooses what the sparse path keeps. If this needs text, the text comes from a file or is
        written by `dense`; trial programs of the same model are run on it.
        """
        config, device = self._config, find_device(self._config.device)
        if config.measure and dense.tokenizer() is None:
            config = replace(config, measure=False)
            self._warnings.append(
                "drafts were not measured: the model has no tokenizer to read text with"
            )
        with self._stage("calibrate" if self._method.has_thresholds else "choose what to keep"):
            kept = None if self._workspace is None else self._workspace.recall(_CHOICES)
            if kept is not None:
                return from_json(SparsePath, json.loads(kept), _CHOICES)
            self._choosing = True
            chosen = Chooser(
                config,
                dense,
                lambda path, held_only: self._text(path, dense, held_only),
                device,
                self._watch,
            ).choose()
            self._choosing = False
            if self._workspace is not None:
                self._workspace.keep(_CHOICES, json.dumps(to_json(chosen)))
            return chosen

    def _identity(self) -> JSON:
        """Everything that the choices and the stored weights depend on, to compare for --resume."""
        config, source = self._config, self._source
        calibration = config.calibration
        return {
            "options": {field.name: str(getattr(config, field.name)) for field in fields(config)},
            "model": [[str(path), fingerprint(path)] for path in source.files],
            "calibration": None if calibration == BUILTIN else fingerprint(Path(calibration)),
            "versions": to_json(self._tools()),
            "formats": [list(FORMAT_VERSION), list(NESTED_FORMAT_VERSION)],
        }

    def _set_drafting(self, acceptance: AcceptanceSpec | None) -> None:
        """Sets the period and the confidence to the best measured ones, unless they are given.
        Warns if drafting does not pay.
        """
        config, self._acceptance = self._config, acceptance
        if acceptance is None:
            return
        best = acceptance.best
        if config.tree_width == 1:  # only chains are measured; a tree accepts more
            self._period = config.period or best.period
            self._confidence = best.confidence
        searched = self._searched
        if best.effective_density > PAYS:
            remedy = "Keep more with --keep, or try another --sparsity"
            if searched is not None:
                remedy = f"None of the {len(searched.settings)} settings measured reads less"
            self._warnings.append(
                f"drafting does not pay: on held-out text, a period of {best.period} tokens "
                f"advances by {best.aal:.1f} (--sparsity {self._method}, density "
                f"{acceptance.density:.2f}), so the weight bytes read per committed token are "
                f"{best.effective_density:.2f} of the dense model's. {remedy}"
            )
        if searched is not None and acceptance.agreement < (searched.agreement or 0.0):
            self._warnings.append(
                f"--agreement {searched.agreement:g}: the chosen setting agreed on "
                f"{searched.settings[searched.chosen].agreement:.1%} of tokens in the search, but "
                f"on {acceptance.agreement:.1%} as compiled, with other texts held out. Give a "
                "higher --agreement for more"
            )

    def _text(
        self, path: Tokenwise, dense: Compiled, held_only: bool, every: int | None = None
    ) -> tuple[Text, Text]:
        """The text to calibrate on and the held-out text, from a file or written by `path`. If it
        is written for a search, `every` second (or third, …) text is held out.
        """
        tokenizer = dense.tokenizer()
        if tokenizer is None:
            raise CalibrationError(
                f"{self._source.name} has no tokenizer to read calibration text with; add "
                "tokenizer.json to the model's directory, or use --sparsity topk or griffin"
            )
        if self._config.calibration == BUILTIN:
            prompts = [tokenizer.encode(p).ids for p in read_prompts(self._source.prompts)]
            return write(
                path,
                [prompt for prompt in prompts if prompt],
                self._watch,
                held_only=held_only,
                every=every,
                new_tokens=None if every is None else CONTINUATION,
            )
        longest = dense.spec.model.max_seq_len
        samples = read_windows(Path(self._config.calibration), tokenizer, longest)
        used, held = hold_out(samples)
        return Text(tuple(used)), Text(tuple(held))

    def _passes(self, program: Program, passes: list[Pass]) -> None:
        self._records += run_passes(
            program,
            passes,
            dump=self._dump,
            first=len(self._records),
            progress=lambda record: self._progress(f"pass {record.name}", record.seconds),
        )

    def _check_kernels(self, compiled: Compiled) -> None:
        if self._graphs is not Graphs.ONNX and kernels() is not None:
            with self._stage("check kernels"):
                check_kernels(
                    compiled.spec, compiled.document, compiled.weights, dtype_of(self._dtype)
                )

    def _product(
        self, program: Program, stored: Stored, sparse: SparsePath | None = None
    ) -> Compiled:
        return Compiled(
            spec=self._spec(program),
            program=program,
            sparse=sparse,
            generation_config=self._source.generation.to_diff_dict(),
            tokenizer_files=self._source.tokenizer_files,
            weights=stored,
            graphs=self._graphs,
            warnings=tuple(self._warnings),
        )

    def _spec(self, program: Program) -> ProgramSpec:
        config, source = self._config, self._source
        eos = source.generation.eos_token_id
        if eos is None:
            eos = source.config.eos_token_id
        return ProgramSpec(
            model=ModelSpec(
                source=source.name,
                revision=source.revision,
                model_type=source.config.model_type,
                dtype=self._dtype,
                vocab_size=source.config.vocab_size,
                max_seq_len=self._max_seq_len,
                parameters=parameters(program),
            ),
            entries=program.entries(),
            weights=tuple(program.weights.values()),
            state=program.state,
            sparsity=program.sparsity,
            period=PeriodSpec(
                period=self._period,
                tree_width=config.tree_width,
                rules=tuple(RULES),
                **values(config),
                confidence=self._confidence,
                refresh=config.refresh,
                mode=config.mode,
            ),
            eos_token_ids=tuple([] if eos is None else [eos] if isinstance(eos, int) else eos),
            pad_token_id=source.generation.pad_token_id,
            passes=self._records,
            tools=self._tools(),
            generation=self._generation,
            acceptance=self._acceptance,
            search=self._searched,
        )

    def _tools(self) -> ToolVersions:
        return ToolVersions(version("sirius-compile"), torch.__version__, transformers.__version__)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._progress(name, time.perf_counter() - start)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a file of that name, or a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--dump-graphs {path}: the folder can't be created ({reason}); give another"
        ) from error


def _bytes(program: Program, dtype: torch.dtype) -> int:
    """The bytes of all weights, in the program's dtype."""
    return sum(
        (dtype if spec.retype else dtype_of(spec.dtype)).itemsize * spec.numbers
        for spec in program.weights.values()
    )
