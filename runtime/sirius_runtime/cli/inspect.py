"""`sirius inspect`: shows the contents of an artifact."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sirius_runtime.cli.command import Command
from sirius_runtime.command_line import new_file_argument, path_argument, say, whole_number
from sirius_runtime.errors import ArtifactError, ConfigError, shown
from sirius_runtime.terminal import plain

if TYPE_CHECKING:
    from sirius_runtime.artifact import Artifact
    from sirius_runtime.graph_view import Graph
    from sirius_runtime.spec import Manifest, SiteSpec

_INDENT = 11  # columns: where the text after a line's label starts
_COLUMNS = 100


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print the whole manifest")
    what.add_argument("--graph", metavar="ENTRY", help="print an entry's graph, one call per line")
    what.add_argument(
        "--diff",
        nargs=2,
        metavar="ENTRY",
        help="print how the second entry's graph differs from the first's",
    )
    what.add_argument(
        "--html",
        type=new_file_argument,
        metavar="FILE",
        help="write the manifest and all graphs to this file, as one self-contained HTML page",
    )
    what.add_argument(
        "--placement",
        action="store_true",
        help="with --memory-budget: print which weights would stay in memory, and which are read "
        "from the file at every step",
    )
    parser.add_argument("--memory-budget", metavar="SIZE", help="as in sirius run")
    parser.add_argument(
        "--context", type=whole_number, metavar="N", help="with --placement: as in sirius run"
    )


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.artifact import Artifact
    from sirius_runtime.spec import to_json

    if args.placement != (args.memory_budget is not None):
        raise ConfigError("--placement and --memory-budget SIZE go together: give both, or neither")
    with Artifact.open(args.artifact, verify=not args.placement) as artifact:
        if args.placement:
            _say_placement(artifact, args.memory_budget, args.context)
        elif args.json:
            say(json.dumps(to_json(artifact.manifest)))
        elif args.graph is not None:
            _say_graph(artifact, args.graph)
        elif args.diff is not None:
            _say_difference(artifact, *args.diff)
        elif args.html is not None:
            _write_page(artifact, args.html)
        else:
            for line in describe(artifact.manifest):
                say(plain(line))  # names and versions come from the file: they are not trusted


def _say_graph(artifact: Artifact, entry: str) -> None:
    from sirius_runtime.graph_view import lines_of

    for line in lines_of(entry, read_entry(artifact, entry)):
        say(plain(line))


def _say_difference(artifact: Artifact, first: str, second: str) -> None:
    from sirius_runtime.graph_view import difference

    sides = [(name, read_entry(artifact, name)) for name in (first, second)]
    for line in difference(*sides):
        say(plain(line))


def _write_page(artifact: Artifact, path: Any) -> None:
    from sirius_runtime.cli.inspect_page import page
    from sirius_runtime.new_file import write_file

    graphs = {name: read_entry(artifact, name) for name in _entries(artifact)}
    manifest = artifact.manifest
    write_file(path, page(manifest, describe(manifest), graphs).encode())


def _say_placement(artifact: Artifact, budget: str, context: int | None) -> None:
    from sirius_runtime.backends.tiered import analyse
    from sirius_runtime.loading import check_budgeted, find_device
    from sirius_runtime.tiers.budget import read_size
    from sirius_runtime.tiers.table import lines

    size = read_size(budget, "--memory-budget")
    check_budgeted(artifact, find_device("cpu"), None, context)
    backend = analyse(artifact, find_device("cpu"))
    placement, beside = backend.placed(size, context)
    for line in lines(backend.needs, placement, size, beside):
        say(plain(line))


def read_entry(artifact: Artifact, entry: str) -> Graph:
    """The graph of an entry. Raises ConfigError for an entry without a graph, and ArtifactError
    for a damaged one.
    """
    from sirius_runtime.graph_view import read_graph

    if entry not in (known := _entries(artifact)):
        has = ", ".join(known) or "none, because it was compiled for ONNX Runtime only"
        raise ConfigError(f"{artifact.path} has no graph {shown(entry)}; graphs: {has}")
    try:
        return read_graph(artifact.read_json(f"graphs/{entry}.json"))
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.path}: graphs/{entry}.json: {error}") from error


def _entries(artifact: Artifact) -> list[str]:
    """The entries that have a graph, in the manifest's order."""
    files = set(artifact.names("graphs/"))
    names = [entry.name for entry in artifact.program.entries]
    return [name for name in names if f"graphs/{name}.json" in files]


def describe(manifest: Manifest) -> list[str]:
    """A manifest as lines for a reader; their number does not grow with that of the layers."""
    from sirius_runtime.onnx_files import gathered_bytes
    from sirius_runtime.rules import values
    from sirius_runtime.safetensors_file import share_of_bfloat16
    from sirius_runtime.search_table import search_table

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
        f"sparsity   {sparsity.method}, kept share {sparsity.keep}, density {sparsity.density:.3f} "
        "of the full path's bytes",
        *_sites(sparsity.sites),
    ]
    if sparsity.dense_layers:
        lines.append(f"dense      layers {', '.join(map(str, sparsity.dense_layers))}")
    if program.search is not None:
        for index, line in enumerate(search_table(program.search)):
            lines.append(f"{'' if index else 'search':{_INDENT}}{line}")
    if (acceptance := program.acceptance) is not None:
        best = acceptance.best
        lines.append(
            f"drafts     {acceptance.agreement:.1%} of tokens agree with the full path on "
            f"held-out text; best: period {best.period}, AAL {best.aal:.2f}, effective density "
            f"{best.effective_density:.3f}"
        )
    lines += [
        f"mode       {program.period.mode}",
        f"period     {program.period.period} tokens, tree width {program.period.tree_width}, "
        f"{numbers}, confidence {program.period.confidence}, refresh "
        f"{program.period.refresh or 'never'}",
        f"decoding   {_decoding(program.generation)}",
        "entries    " + ", ".join(entry.name for entry in program.entries),
        "passes     " + ", ".join(f"{one.name} {one.rewrites}" for one in program.passes),
        f"files      {len(manifest.files)}, {size:,} bytes, {weights:,} of them "
        f"{len(program.weights)} weights",
    ]
    if program.nested:
        nested = sum(1 for weight in program.weights if weight.nested)
        full = share_of_bfloat16(program)
        lines.append(
            f"weights    {nested} matrices of 8 bits in two planes; drafts read the high "
            f"{sparsity.draft_bits} bits; a full step reads {full:.3f} of bfloat16's bytes, a "
            f"sparse step {sparsity.density * full:.3f}"
        )
    if graphs := [name for name in manifest.files if name.endswith(".onnx")]:
        extra = gathered_bytes(program)
        copies = (
            f"; each row's copy of the kept neurons takes {extra:,} bytes more" if extra else ""
        )
        lines.append(f"onnx       {len(graphs)} graphs{copies}")
    test = manifest.self_test
    lines += [
        "self-test  "
        + ("none" if test is None else f"{len(test.prompt)} and {len(test.block)} tokens")
        + ", for sirius verify" * (test is not None),
        f"compiled   sirius-compile {program.tools.sirius}, torch {program.tools.torch}, "
        f"transformers {program.tools.transformers}; "
        f"format {'.'.join(map(str, manifest.format_version))}",
    ]
    return [part for line in lines for part in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    """A line wrapped at `_COLUMNS`; a longer word stays whole."""
    return textwrap.wrap(
        line,
        _COLUMNS,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
        expand_tabs=False,
    ) or [line]


def _sites(sites: Sequence[SiteSpec]) -> Iterator[str]:
    """How much a sparse step keeps: one line for all layers' sites of the same name and size."""
    groups: dict[tuple[str, int], list[SiteSpec]] = {}
    for site in sites:
        name = re.sub(rf"\.{site.layer}\.", ".*.", site.weight, count=1)
        groups.setdefault((name, site.units), []).append(site)
    for (name, units), alike in groups.items():
        kept = _range([site.kept for site in alike], "g")
        layers = len({site.layer for site in alike})
        thresholds = [site.threshold for site in alike if site.threshold is not None]
        above = f", above {_range(thresholds, '.3g')}" if thresholds else ""
        one = f"layer {alike[0].layer}" if layers == 1 else f"{layers} layers"
        yield f"keeps      {kept} of {units} of {name} in {one}{above}"


def _range(values: Sequence[float], form: str) -> str:
    least, most = (f"{value:{form}}" for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def _decoding(generation: Any) -> str:
    """The artifact's settings for processing logits and sampling."""
    given = generation.logits.non_defaults() | generation.sampling.non_defaults()
    names = [f"{name} {_short(value)}" for name, value in given.items()]
    return ", ".join(names) or "the likeliest token, without penalties"


def _short(value: Any) -> str:
    return f"({len(value)})" if isinstance(value, tuple) and len(value) > 4 else str(value)


COMMAND = Command("show the contents of an artifact", _add_arguments, _run)
