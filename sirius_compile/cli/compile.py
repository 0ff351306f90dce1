"""`sirius-compile MODEL --out FILE`: parses, calls `compile_model` and `save`, prints.

Progress goes to stderr, the summary to stdout (as JSON with `--json`).
"""

from __future__ import annotations

import io
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sirius_compile.cli.arguments import path
from sirius_compile.cli.progress import bar
from sirius_compile.config import AUTO, BUILTIN, CompileConfig, DenseLayers, Graphs, Weights
from sirius_runtime.command_line import say, tell
from sirius_runtime.errors import ConfigError
from sirius_runtime.spec import DType, Method
from sirius_runtime.terminal import plain

if TYPE_CHECKING:
    from sirius_compile.product import Compiled
    from sirius_compile.watch import Watch
    from sirius_compile.workspace import Workspace


def _file_or_builtin(text: str) -> str:
    return text if text == BUILTIN else str(path(text))


_METHODS = [*Method, AUTO]


def _method_or_auto(text: str) -> str:
    if text not in _METHODS:
        choices = ", ".join(f"'{method}'" for method in _METHODS)
        raise typer.BadParameter(f"{text!r} is not one of {choices}.")
    return text


def _share_or_auto(text: str) -> float | str:
    if text == AUTO:
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto") from None


def compile_artifact(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Shipped name, directory, GGUF file, hub id, or short name (llama-3-8b)."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", parser=path, help="The artifact to write.")
    ] = None,
    sparsity: Annotated[
        str,
        typer.Option(
            parser=_method_or_auto,
            metavar=f"[{'|'.join(_METHODS)}]",
            help="The sparse path; auto: the one with the fewest reads per token, by a search.",
        ),
    ] = Method.CATS,
    keep: Annotated[
        str | None,
        typer.Option(
            parser=_share_or_auto,
            metavar="SHARE",
            help="Share of neurons or channels kept, in (0, 1], or auto. Default: 0.5.",
        ),
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(
            help="With auto: least share of drafted tokens that agree with the full path."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of weights a sparse step reads; replaces --keep.")
    ] = None,
    dense_layers: Annotated[
        str,
        typer.Option(
            help="Layers to keep dense: 0,31, or auto:N for the N whose sparsity costs most."
        ),
    ] = "",
    measure: Annotated[
        bool,
        typer.Option(help="Measure draft acceptance on held-out text, and set the best period."),
    ] = True,
    mode: Annotated[
        str, typer.Option(help="The mode of runs that name none: sirius or exact.")
    ] = "sirius",
    period: Annotated[
        int | None, typer.Option(help="Tokens per verification. Default: as measured, or 16.")
    ] = None,
    tree_width: Annotated[
        int, typer.Option(help="Nodes at each level of the draft tree; 1: a chain.")
    ] = 1,
    threshold: Annotated[
        float, typer.Option(help="Least probability of an accepted drafted token.")
    ] = 0.1,
    verify_temperature: Annotated[
        float, typer.Option(help="Softmax temperature of that probability.")
    ] = 0.6,
    confidence: Annotated[
        float | None,
        typer.Option(help="Stop drafting below this probability. Default: as measured, or 0."),
    ] = None,
    refresh: Annotated[
        int, typer.Option(help="griffin: periods between selections of neurons; 0: select once.")
    ] = 0,
    max_seq_len: Annotated[int | None, typer.Option(help="Default: the model's own.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: the checkpoint's.")] = None,
    weights: Annotated[
        Weights,
        typer.Option(help="int8: 8 bits a weight, and drafts read 4 or 8; dtype: as --dtype."),
    ] = Weights.DTYPE,
    draft_bits: Annotated[
        int | None,
        typer.Option(help="Bits of an int8 weight that a draft reads: 4 (default) or 8."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where calibration runs.")] = "cpu",
    calibration: Annotated[
        str, typer.Option(parser=_file_or_builtin, help="Text or JSONL file, or builtin.")
    ] = "builtin",
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(parser=path, help="Hub cache.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(parser=path, help="Folder of an adapter (LoRA) to merge.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="If MODEL is an adapter: the model to merge it into.")
    ] = None,
    graphs: Annotated[
        Graphs,
        typer.Option(
            help="Graphs for PyTorch (torch), the same without the graph of a whole period "
            "(entries: compiles in half the time), for ONNX Runtime (onnx), or both."
        ),
    ] = Graphs.TORCH,
    backend: Annotated[
        Graphs | None, typer.Option(hidden=True, help="The former name of --graphs.")
    ] = None,
    score: Annotated[str | None, typer.Option(hidden=True, help="Removed.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's repository.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a killed compilation of this artifact.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Summary as JSON on stdout.")] = False,
    dump_graphs: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder for the graphs before and after each pass."),
    ] = None,
    expect_graphs: Annotated[
        Path | None,
        typer.Option(parser=path, help="Fail unless the graphs equal those dumped in this folder."),
    ] = None,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="Print the supported model types and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show libraries' logs.")] = False,
) -> None:
    """Compile a decoder into one artifact with paired sparse and full paths."""
    if list_models:
        _list_models(as_json)
        return
    if model is None or out is None:
        raise ConfigError("a model and --out are needed: sirius-compile MODEL --out FILE")
    from sirius_compile.report import summarise
    from sirius_compile.workspace import Workspace
    from sirius_runtime.artifact_writer import ArtifactWriter
    from sirius_runtime.loading import find_device
    from sirius_runtime.search_table import search_table

    _quieten(verbose)
    if backend is not None:
        tell(f"sirius-compile: --backend is now called --graphs; using --graphs {backend}")
        graphs = backend
    if score is not None:
        raise ConfigError(
            f"--score {score} is no longer an option: teal ranks channels by |x| alone, which "
            "agrees with the full path more often than weight-norm did. Leave --score out"
        )
    config = CompileConfig(
        sparsity=sparsity,
        keep=keep,  # type: ignore[arg-type]  # parsed
        density=density,
        agreement=agreement,
        dense_layers=dense_layers,
        measure=measure,
        mode=mode,
        period=period,
        tree_width=tree_width,
        threshold=threshold,
        verify_temperature=verify_temperature,
        confidence=confidence,
        refresh=refresh,
        max_seq_len=max_seq_len,
        dtype=dtype,
        weights=weights,
        draft_bits=draft_bits,
        device=device,
        calibration=calibration,
        revision=revision,
        cache_dir=cache_dir,
        adapter=adapter,
        base=base,
        trust_remote_code=trust_remote_code,
        graphs=graphs,
    )
    _check_use(config)
    # Refuse what can be refused now, before minutes of work.
    ArtifactWriter(out, force=force)
    find_device(device)
    start = time.perf_counter()
    watch = bar()
    with Workspace(out, resume=resume, tell=_note) as workspace:
        compiled = _compiled(model, config, dump_graphs, expect_graphs, watch, workspace)
        begin = time.perf_counter()
        compiled.save(out, force=force, watch=watch)
        _progress("write artifact", time.perf_counter() - begin)
    for warning in compiled.warnings:
        tell(f"sirius-compile: warning: {plain(warning)}")
    summary = summarise(compiled, out, time.perf_counter() - start)
    if as_json:
        say(json.dumps(summary.to_json()))
    else:
        if compiled.spec.search is not None:
            for line in search_table(compiled.spec.search):
                say(line)
        _say_table(summary.table())


def _compiled(
    model: str,
    config: CompileConfig,
    dump: Path | None,
    expect: Path | None,
    watch: Watch,
    workspace: Workspace,
) -> Compiled:
    """Compiles. `dump`: the folder to write graphs to; `expect`: a folder of expected graphs."""
    from sirius_compile.compile import compile_model
    from sirius_compile.guard import compare_graphs, read_graphs

    def run(dump: Path | None) -> Compiled:
        return compile_model(
            model,
            config,
            dump_graphs=dump,
            progress=_progress,
            watch=watch,
            workspace=workspace,
        )

    if expect is None:
        return run(dump)
    expected = read_graphs(expect)
    if dump is not None and dump.resolve() == expect.resolve():
        raise ConfigError(
            f"--dump-graphs {dump} would replace the graphs that --expect-graphs compares with. "
            "Give another folder"
        )
    with tempfile.TemporaryDirectory() as scratch:
        found = dump or Path(scratch)
        compiled = run(found)
        compare_graphs(expect, expected, found)
    tell(f"{'graphs as expected':28} {len(expected)} compared")
    return compiled


def _check_use(config: CompileConfig) -> None:
    """Raises ConfigError for options that have no effect on this sparse path."""
    if config.searches:
        return
    method, dense = Method(config.sparsity), DenseLayers.read(config.dense_layers)
    measured = config.measure and config.drafts
    if config.calibration != BUILTIN and not (method.has_thresholds or dense.auto or measured):
        raise ConfigError(
            f"--calibration sets thresholds, and --sparsity {method} has none. Leave --calibration "
            "out"
        )
    given = [
        flag
        for flag, value in (
            ("--keep", config.keep),
            ("--density", config.density),
            ("--dense-layers", dense.fixed or dense.auto or None),
        )
        if value is not None
    ]
    if method is Method.NONE and given:
        raise ConfigError(
            f"{given[0]} applies to a sparse path, and --sparsity none has none. Leave {given[0]} "
            "out"
        )


def _list_models(as_json: bool) -> None:
    from sirius_compile.families import families_json, families_tables

    if as_json:
        say(json.dumps(families_json()))
    else:
        for table in families_tables():
            _say_table(table)


def _say_table(table: Table) -> None:
    screen, text = Console(), io.StringIO()
    console = Console(
        file=text,
        width=screen.width,
        force_terminal=screen.is_terminal,
        soft_wrap=True,
        highlight=False,
    )
    console.print(table)
    say(text.getvalue(), end="")


def _note(message: str) -> None:
    tell(f"sirius-compile: {plain(message)}")


def _progress(stage: str, seconds: float) -> None:
    tell(f"{stage:28} {seconds:7.2f} s")


def _quieten(verbose: bool) -> None:
    """Hides the libraries' warnings and progress bars, unless `verbose`."""
    import transformers

    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr)
    if not verbose:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
