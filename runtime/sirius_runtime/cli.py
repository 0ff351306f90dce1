"""`sirius`: run and inspect artifacts. Parses, calls one public function, prints.

Tokens and JSON go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sirius_runtime.errors import ConfigError, SiriusError, UserError
from sirius_runtime.terminal import LINES, plain, without_controls


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code (2: the user's to mend, 70: a bug)."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.command(parsed)
    except UserError as error:
        print(f"sirius: error: {plain(str(error), keep=LINES)}", file=sys.stderr)
        return error.exit_code
    except SiriusError as error:
        print(f"sirius: internal error: {plain(str(error), keep=LINES)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nsirius: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; say nothing more
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sirius", description="Run and inspect Sirius artifacts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="generate from a prompt, streaming committed tokens")
    run.set_defaults(command=_run)
    run.add_argument("artifact", type=Path, metavar="MODEL.sirius")
    source = run.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", help="the prompt; \\n stands for a line break")
    source.add_argument("--prompt-file", type=Path, help="a file with the prompt (default: stdin)")
    run.add_argument(
        "--mode", default="sirius", help="sirius (default), exact, sample, full or sparse"
    )
    run.add_argument("--compare", action="store_true", help="full, sparse and Sirius side by side")
    run.add_argument("--max-new-tokens", type=int, metavar="N")
    run.add_argument("--period", metavar="K", help="tokens per verification, or auto")
    run.add_argument("--tree-width", type=int, metavar="W", help="paths drafted side by side")
    run.add_argument("--threshold", type=float, metavar="R", help="probability that a token needs")
    run.add_argument("--verify-temperature", type=float, metavar="T")
    run.add_argument(
        "--confidence", type=float, metavar="C", help="probability that a draft needs to go on"
    )
    run.add_argument(
        "--refresh", type=int, metavar="N", help="periods until griffin chooses neurons anew"
    )
    run.add_argument("--temperature", type=float, metavar="T", help="of sampling (mode sample)")
    run.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    run.add_argument("--top-p", type=float, metavar="P", help="sample from this much probability")
    run.add_argument("--seed", type=int, help="of sampling, for the same tokens again")
    run.add_argument("--stop", action="append", default=[], help="stop string; may be repeated")
    run.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    run.add_argument("--dtype", help="float32, bfloat16, float16 (default: as stored)")
    run.add_argument(
        "--backend",
        default="auto",
        help="auto (default: the fastest that works here), eager, inductor (compiled by "
        "torch.compile), cudagraph (and recorded, on a CUDA GPU), period (a period as one graph), "
        "aoti (that graph, compiled once) or onnxruntime",
    )
    run.add_argument(
        "--context", type=int, metavar="N", help="aoti: tokens of prompt and answer to compile for"
    )
    run.add_argument(
        "--providers", metavar="P,Q", help="onnxruntime: execution providers, the preferred first"
    )
    run.add_argument("--threads", type=int, metavar="N", help="of one operator on the CPU")
    run.add_argument("--no-verify", action="store_true", help="do not hash the weights at load")
    run.add_argument("--json", action="store_true", help="print one JSON object, no stream")

    inspect = commands.add_parser("inspect", help="show what an artifact holds")
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("artifact", type=Path, metavar="MODEL.sirius")
    inspect.add_argument("--json", action="store_true", help="print the whole manifest")

    export = commands.add_parser("export-onnx", help="write an artifact's ONNX graphs to a folder")
    export.set_defaults(command=_export_onnx)
    export.add_argument("artifact", type=Path, metavar="MODEL.sirius")
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--force", action="store_true", help="write into a folder with files")
    return parser


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.loading import load

    prompt = _prompt(args)
    model = load(
        args.artifact,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        context=args.context,
        providers=args.providers.split(",") if args.providers else None,
        threads=args.threads,
        verify=not args.no_verify,
    )
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "threshold": args.threshold,
        "period": _number_or_auto(args.period),
        "tree_width": args.tree_width,
        "verify_temperature": args.verify_temperature,
        "confidence": args.confidence,
        "refresh": args.refresh,
        "stop": tuple(args.stop),
    }
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    _warn_of_unknown_tokens(model, prompt)
    if args.compare and any(value is not None for value in sampling.values()):
        raise ConfigError("--compare is greedy: leave out --temperature, --top-k, --top-p, --seed")
    if not args.compare:
        options |= sampling
    if args.compare:
        _print_comparison(model, prompt, options, args.json)
    elif args.json:
        output = model.generate(prompt, mode=args.mode, **options)
        print(json.dumps(_output_json(output)))
    else:
        _stream(model, prompt, args.mode, options)


def _number_or_auto(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt).replace("\\n", "\n")
    if args.prompt_file is not None:
        try:
            return args.prompt_file.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {args.prompt_file} can't be read: {error}") from error
    if sys.stdin.isatty():
        print("sirius: reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    return sys.stdin.read().rstrip("\n")


def _warn_of_unknown_tokens(model: Any, prompt: str) -> None:
    if model.tokenizer is None:
        return
    unknown = [
        prompt[slice(*e)]
        for t, e in zip(*_tokens_and_offsets(model.tokenizer, prompt), strict=True)
        if t == getattr(model.tokenizer.model, "unk_token", None)
    ]
    if unknown:
        words = ", ".join(repr(w) for w in dict.fromkeys(unknown[:5]))
        print(
            f"sirius: warning: {len(unknown)} pieces of the prompt are not in this model's "
            f"vocabulary ({words})",
            file=sys.stderr,
        )


def _tokens_and_offsets(tokenizer: Any, prompt: str) -> tuple[list[str], list[tuple[int, int]]]:
    encoding = tokenizer.encode(prompt)
    return encoding.tokens, encoding.offsets


def _stream(model: Any, prompt: str, mode: str, options: dict[str, Any]) -> None:
    from sirius_runtime.text import TextStream

    streamer = None
    if model.tokenizer is not None:
        streamer = TextStream(model.tokenizer, _write, options["stop"])
    output = model.generate(prompt, mode=mode, streamer=streamer, **options)
    print(flush=True)
    stats = output.stats
    parts = [
        f"{stats.tokens} tokens ({output.finish_reasons[0]})",
        f"{stats.tokens_per_second:.1f} tokens/s",
    ]
    if stats.periods:
        aal = "-" if stats.aal is None else f"{stats.aal:.2f}"
        parts += [f"{stats.periods} periods", f"AAL {aal}", f"{stats.corrections} corrections"]
    if output.seeds:
        parts.append(f"seed {output.seeds[0]}")
    parts += [f"density {stats.density:.3f}", f"effective {stats.effective_density:.3f}"]
    print(f"sirius: {', '.join(parts)}", file=sys.stderr)


def _write(text: str) -> None:
    print(_on_terminal(text), end="", flush=True)


def _on_terminal(text: str) -> str:
    """A model's text as it is for a file or a pipe; a terminal would obey what controls it."""
    return without_controls(text) if sys.stdout.isatty() else text


def _output_json(output: Any) -> dict[str, Any]:
    from sirius_runtime.spec import to_json

    stats = to_json(output.stats)
    stats["tokens_per_second"] = output.stats.tokens_per_second
    stats["seconds_per_token"] = to_json(output.stats.seconds_per_token)
    stats["bytes_per_token"] = to_json(output.stats.bytes_per_token)
    return {
        "text": output.texts[0] if output.texts else None,
        "tokens": list(output.tokens[0]),
        "finish_reason": output.finish_reasons[0],
        "seed": output.seeds[0] if output.seeds else None,
        "stats": stats,
    }


def _print_comparison(model: Any, prompt: str, options: dict[str, Any], as_json: bool) -> None:
    from sirius_runtime.compare import compare

    runs = compare(model, prompt, **options)
    if as_json:
        document = {
            str(run.mode): _output_json(run.output)
            | {"same_tokens": run.same_tokens, "speed": run.speed}
            for run in runs
        }
        print(json.dumps(document))
        return
    width = shutil.get_terminal_size().columns
    for line in _side_by_side([f"--- {r.mode} ---\n{_shown(r.output)}" for r in runs], width):
        print(line)
    print()
    header = ("mode", "tokens", "as full", "AAL", "density", "eff.", "tokens/s", "x full")
    rows = [header] + [_comparison_row(run) for run in runs]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        print("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))


def _shown(output: Any) -> str:
    text = str(output.texts[0] if output.texts else output.tokens[0]).strip("\n")
    return without_controls(text)


def _side_by_side(texts: list[str], width: int) -> list[str]:
    """The texts as columns of equal width, each line wrapped to its column."""
    column = max((width - 2 * (len(texts) - 1)) // len(texts), 16)
    wrapped = [
        [
            part
            for line in text.splitlines()
            for part in textwrap.wrap(line, column, drop_whitespace=False) or [""]
        ]
        for text in texts
    ]
    return [
        "  ".join(cell.ljust(column) for cell in row).rstrip()
        for row in itertools.zip_longest(*wrapped, fillvalue="")
    ]


def _comparison_row(run: Any) -> tuple[str, ...]:
    stats = run.output.stats
    return (
        str(run.mode),
        str(stats.tokens),
        str(run.same_tokens),
        "-" if stats.aal is None else f"{stats.aal:.2f}",
        "1.000" if run.mode == "full" else f"{stats.density:.3f}",
        f"{stats.effective_density:.3f}",
        f"{stats.tokens_per_second:.1f}",
        f"{run.speed:.2f}",
    )


def _export_onnx(args: argparse.Namespace) -> None:
    from sirius_runtime.onnx_files import export_onnx

    for path in export_onnx(args.artifact, args.folder, force=args.force):
        print(f"{path}  {path.stat().st_size:,} bytes")


def _inspect(args: argparse.Namespace) -> None:
    from sirius_runtime.artifact import Artifact
    from sirius_runtime.spec import to_json

    with Artifact.open(args.artifact) as artifact:
        manifest = artifact.manifest
    if args.json:
        print(json.dumps(to_json(manifest)))
        return
    for line in describe(manifest):
        print(plain(line))  # names and versions are whatever the file says


def describe(manifest: Any) -> list[str]:
    """A manifest as lines for a reader."""
    from sirius_runtime.onnx_files import gathered_bytes

    program = manifest.program
    model, sparsity, state = program.model, program.sparsity, program.state
    size = sum(record.size for record in manifest.files.values())
    weights = sum(r.size for name, r in manifest.files.items() if name.startswith("weights/"))
    revision = f" at {model.revision}" if model.revision else ""
    lines = [
        f"model      {model.source}{revision} ({model.model_type}), "
        f"{model.parameters:,} parameters in {model.dtype}",
        f"sequence   up to {model.max_seq_len} tokens, vocabulary {model.vocab_size}, "
        f"EOS {', '.join(map(str, program.eos_token_ids)) or 'none'}",
        f"cache      {state.layers} layers x {state.kv_heads} heads x {state.key_dim}",
        f"sparsity   {sparsity.method}, kept share {sparsity.keep}, density {sparsity.density:.3f}",
        f"period     {program.period.period} tokens, tree width {program.period.tree_width}, "
        f"threshold {program.period.threshold}, verify temperature "
        f"{program.period.verify_temperature}, confidence {program.period.confidence}, refresh "
        f"{program.period.refresh or 'never'}",
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
    lines += [
        f"pass       {record.name}: {record.rewrites} rewrites, {record.seconds * 1e3:.0f} ms"
        for record in program.passes
    ]
    return lines


def _shape(tensor: Any) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


if __name__ == "__main__":
    sys.exit(main())
