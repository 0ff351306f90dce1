"""`sirius-compile`: parses, calls `compile_model` and `save`, prints.

Progress goes to stderr, the summary to stdout (as JSON with `--json`).
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sirius_compile.config import Backend
from sirius_runtime.errors import ConfigError, SiriusError, UserError
from sirius_runtime.spec import DType, Method, Score
from sirius_runtime.terminal import LINES, plain

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False)


@app.command()
def sirius_compile(
    model: Annotated[
        str | None,
        typer.Argument(help="Shipped name, directory, hub id, or short name (llama-3-8b)."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The artifact to write.")] = None,
    sparsity: Annotated[Method, typer.Option(help="The sparse path.")] = Method.CATS,
    keep: Annotated[
        float | None, typer.Option(help="Share of neurons or channels kept, in (0, 1]; 0.5.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the weights a sparse step reads, for --keep.")
    ] = None,
    dense_layers: Annotated[
        str, typer.Option(help="Layers that skip nothing: 0,31, or auto:N for the N costliest.")
    ] = "",
    score: Annotated[Score, typer.Option(help="teal: what thresholds compare.")] = Score.MAGNITUDE,
    period: Annotated[int, typer.Option(help="Tokens per verification.")] = 16,
    tree_width: Annotated[int, typer.Option(help="Paths drafted side by side.")] = 1,
    threshold: Annotated[float, typer.Option(help="Probability a drafted token needs.")] = 0.1,
    verify_temperature: Annotated[float, typer.Option(help="Softmax temperature for it.")] = 0.6,
    confidence: Annotated[
        float, typer.Option(help="Probability a draft needs to go on, 0: none.")
    ] = 0.0,
    refresh: Annotated[
        int, typer.Option(help="griffin: periods until neurons are chosen anew, 0: never.")
    ] = 0,
    max_seq_len: Annotated[int | None, typer.Option(help="Default: the model's own.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: the checkpoint's.")] = None,
    device: Annotated[str, typer.Option(help="Where calibration runs.")] = "cpu",
    calibration: Annotated[str, typer.Option(help="Text or JSONL file, or builtin.")] = "builtin",
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Hub cache.")] = None,
    backend: Annotated[
        Backend, typer.Option(help="Graphs for PyTorch (torch), ONNX Runtime (onnx), or both.")
    ] = Backend.TORCH,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's repository.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Summary as JSON on stdout.")] = False,
    dump_graphs: Annotated[
        Path | None, typer.Option(help="Folder for the graphs before and after each pass.")
    ] = None,
    expect_graphs: Annotated[
        Path | None, typer.Option(help="Fail unless the graphs are those dumped there.")
    ] = None,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="Print the supported model types and end.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show libraries' logs.")] = False,
) -> None:
    """Compile a decoder into one artifact with paired sparse and full paths."""
    if list_models:
        _list_models(as_json)
        return
    if model is None or out is None:
        raise ConfigError("a model and a target are needed: sirius-compile MODEL --out FILE")
    from sirius_compile.compile import compile_model
    from sirius_compile.config import CompileConfig
    from sirius_compile.guard import expect_graphs as guard
    from sirius_compile.report import summarise
    from sirius_runtime.artifact_writer import ArtifactWriter

    _quieten(verbose)
    config = CompileConfig(
        sparsity=sparsity,
        keep=keep,
        density=density,
        dense_layers=dense_layers,
        score=score,
        period=period,
        tree_width=tree_width,
        threshold=threshold,
        verify_temperature=verify_temperature,
        confidence=confidence,
        refresh=refresh,
        max_seq_len=max_seq_len,
        dtype=dtype,
        device=device,
        calibration=calibration if calibration == "builtin" else Path(calibration),
        revision=revision,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        backend=backend,
    )
    ArtifactWriter(out, force=force)  # refuses a bad target before minutes of work, not after
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        dump = dump_graphs or (Path(scratch) if expect_graphs else None)
        compiled = compile_model(model, config, dump_graphs=dump, progress=_progress)
        if expect_graphs is not None:
            assert dump is not None
            count = guard(expect_graphs, dump)
            _err.print(f"{'graphs as expected':28} {count} compared")
    begin = time.perf_counter()
    compiled.save(out, force=force)
    _progress("write artifact", time.perf_counter() - begin)
    summary = summarise(compiled, out, time.perf_counter() - start)
    if as_json:
        print(json.dumps(summary.to_json()))
    else:
        Console(soft_wrap=True, highlight=False).print(summary.table())


def _list_models(as_json: bool) -> None:
    from sirius_compile.families import families_json, families_tables

    if as_json:
        print(json.dumps(families_json()))
    else:
        for table in families_tables():
            Console(soft_wrap=True, highlight=False).print(table)


def _progress(stage: str, seconds: float) -> None:
    _err.print(f"{stage:28} {seconds:7.2f} s")


def _quieten(verbose: bool) -> None:
    """Libraries' warnings and progress bars are for their own users, unless asked for."""
    import transformers

    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr)
    if not verbose:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """The console script; exits with 2 for the user's to mend, 70 for a bug."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        _err.print(f"sirius-compile: error: {plain(str(error), keep=LINES)}", markup=False)
        sys.exit(error.exit_code)
    except SiriusError as error:
        _err.print(f"sirius-compile: internal error: {plain(str(error), LINES)}", markup=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
