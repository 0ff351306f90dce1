"""`sirius`: run and inspect artifacts. Parses, calls one public function, prints.

Tokens and JSON go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from sirius_runtime.command_line import (
    ESCAPES,
    finish,
    path_argument,
    read_stdin,
    read_text_file,
    real_number,
    say,
    tell,
    unescaped,
    whole_number,
)
from sirius_runtime.errors import ConfigError, shown
from sirius_runtime.request import Mode
from sirius_runtime.terminal import plain, without_controls


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""

    def command() -> None:
        parsed = _parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _tell_warning
            parsed.command(parsed)

    return finish("sirius", command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sirius", description="Run and inspect Sirius artifacts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="generate from a prompt, streaming committed tokens",
        epilog=f"In the TEXT of a flag {ESCAPES}; any other backslash is itself. A file or stdin "
        "is taken as it is, less one line break at its end.",
    )
    run.set_defaults(command=_run)
    run.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    source = run.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; see below")
    source.add_argument(
        "--prompt-file",
        type=path_argument,
        metavar="FILE",
        help="a file with the prompt in UTF-8 (default: stdin)",
    )
    run.add_argument(
        "--no-add-special-tokens",
        dest="add_special_tokens",
        action="store_false",
        help="take the prompt as it is, without the BOS that the tokenizer puts before it: for one "
        "that brings its special tokens, as a chat template's does",
    )
    run.add_argument("--mode", help="sirius (default), exact, sample, full or sparse")
    run.add_argument("--compare", action="store_true", help="full, sparse and Sirius side by side")
    run.add_argument("--max-new-tokens", type=whole_number, metavar="N")
    run.add_argument("--period", metavar="K", help="tokens per verification, or auto")
    run.add_argument(
        "--tree-width", type=whole_number, metavar="W", help="paths drafted side by side"
    )
    run.add_argument(
        "--threshold", type=real_number, metavar="R", help="probability that a token needs"
    )
    run.add_argument("--verify-temperature", type=real_number, metavar="T")
    run.add_argument(
        "--confidence",
        type=real_number,
        metavar="C",
        help="probability that a draft needs to go on",
    )
    run.add_argument(
        "--refresh",
        type=whole_number,
        metavar="N",
        help="periods until griffin chooses neurons anew",
    )
    run.add_argument(
        "--temperature", type=real_number, metavar="T", help="of sampling (mode sample)"
    )
    run.add_argument(
        "--top-k", type=whole_number, metavar="K", help="sample from the K likeliest tokens"
    )
    run.add_argument(
        "--top-p", type=real_number, metavar="P", help="sample from this much probability"
    )
    run.add_argument("--seed", type=whole_number, help="of sampling, for the same tokens again")
    run.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated"
    )
    run.add_argument(
        "--repetition-penalty", type=real_number, metavar="P", help="as transformers'; 1.0: none"
    )
    run.add_argument(
        "--min-new-tokens",
        type=whole_number,
        metavar="N",
        help="tokens before which none ends the answer",
    )
    run.add_argument(
        "--logprobs",
        type=whole_number,
        metavar="N",
        help="with --json: each token's log-probability, and the N likeliest tokens'",
    )
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
        "--context",
        type=whole_number,
        metavar="N",
        help="aoti: tokens of prompt and answer to compile for",
    )
    run.add_argument(
        "--providers", metavar="P,Q", help="onnxruntime: execution providers, the preferred first"
    )
    run.add_argument("--threads", type=whole_number, metavar="N", help="of one operator on the CPU")
    run.add_argument("--copy", action="store_true", help="read the file into memory, do not map it")
    run.add_argument("--no-verify", action="store_true", help="do not hash the weights at load")
    run.add_argument("--json", action="store_true", help="print one JSON object, no stream")

    inspect = commands.add_parser("inspect", help="show what an artifact holds")
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    inspect.add_argument("--json", action="store_true", help="print the whole manifest")

    export = commands.add_parser("export-onnx", help="write an artifact's ONNX graphs to a folder")
    export.set_defaults(command=_export_onnx)
    export.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    export.add_argument("folder", type=path_argument, metavar="DIR")
    export.add_argument("--force", action="store_true", help="write into a folder with files")
    return parser


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.loading import BackendName, load
    from sirius_runtime.prompts import PromptWarning

    warnings.simplefilter("always", PromptWarning)
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    if args.compare and (args.mode is not None or any(v is not None for v in sampling.values())):
        raise ConfigError(
            "--compare runs modes full, sparse and sirius, greedily: leave out --mode, "
            "--temperature, --top-k, --top-p and --seed"
        )
    options: dict[str, Any] = {
        "add_special_tokens": args.add_special_tokens,
        "max_new_tokens": args.max_new_tokens,
        "threshold": args.threshold,
        "period": _number_or_auto(args.period),
        "tree_width": args.tree_width,
        "verify_temperature": args.verify_temperature,
        "confidence": args.confidence,
        "refresh": args.refresh,
        "stop": tuple(unescaped(text, "--stop") for text in args.stop),
        "repetition_penalty": args.repetition_penalty,
        "min_new_tokens": args.min_new_tokens,
    }
    if args.logprobs is not None and (args.compare or not args.json):
        raise ConfigError("--logprobs goes with --json, and not with --compare")
    mode = Mode.SIRIUS if args.mode is None else args.mode
    if args.context is not None and args.backend != BackendName.AOTI:
        raise ConfigError(
            f"--context is of backend aoti alone, which compiles for it, and this is backend "
            f"{args.backend}: leave it out"
        )
    providers = None if args.providers is None else args.providers.split(",")
    if providers is not None and "" in providers:
        raise ConfigError(
            f"--providers takes names of execution providers (P,Q), got {shown(args.providers)}"
        )
    prompt = _prompt(args)
    model = load(
        args.artifact,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        context=args.context,
        providers=providers,
        threads=args.threads,
        verify=not args.no_verify,
        copy=args.copy,
    )
    _warn_of_unknown_tokens(model, prompt)
    if args.compare:
        _print_comparison(model, prompt, options, args.json)
    elif args.json:
        output = model.generate(prompt, mode=mode, logprobs=args.logprobs, **options, **sampling)
        say(json.dumps(_output_json(output) | _logprobs_json(output)))
    else:
        _stream(model, prompt, mode, options | sampling)


def _number_or_auto(text: str | None) -> int | str | None:
    try:
        return text if text is None else int(text)
    except ValueError:
        return text


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return unescaped(args.prompt, "--prompt")
    if args.prompt_file is not None:
        return read_text_file(args.prompt_file, f"--prompt-file {args.prompt_file}")
    return read_stdin("the prompt")


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
        tell(
            f"sirius: warning: {len(unknown)} pieces of the prompt are not in this model's "
            f"vocabulary ({words})"
        )


def _tokens_and_offsets(tokenizer: Any, prompt: str) -> tuple[list[str], list[tuple[int, int]]]:
    from sirius_runtime.tokenizer_guard import guarded

    with guarded():
        encoding = tokenizer.encode(prompt)
    return encoding.tokens, encoding.offsets


def _stream(model: Any, prompt: str, mode: str, options: dict[str, Any]) -> None:
    from sirius_runtime.text import TextStream

    streamer = None
    if model.tokenizer is not None:
        streamer = TextStream(model.tokenizer, _write, options["stop"])
    output = model.generate(prompt, mode=mode, streamer=streamer, **options)
    say("")
    stats = output.stats
    parts = [
        f"{stats.tokens} tokens ({output.finish_reasons[0]})",
        f"{_figure(stats.tokens_per_second, 1)} tokens/s",
    ]
    if stats.periods:
        parts += [
            f"{stats.periods} periods",
            f"AAL {_figure(stats.aal, 2)}",
            f"{stats.corrections} corrections",
        ]
    if output.seeds:
        parts.append(f"seed {output.seeds[0]}")
    parts.append(f"density {stats.density:.3f}")
    parts.append(f"effective {_figure(stats.effective_density, 3)}")
    tell(f"sirius: {', '.join(parts)}")


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as a line on stderr, without the place in the code that Python adds."""
    tell(f"sirius: warning: {plain(str(message))}")


def _write(text: str) -> None:
    say(_on_terminal(text), end="")


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


def _logprobs_json(output: Any) -> dict[str, Any]:
    """The log-probabilities of the first row's tokens, where there are some; null for minus
    infinity, which JSON has no number for.
    """
    if output.logprobs is None:
        return {}

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    tokens = [
        {
            "token": entry.token,
            "logprob": number(entry.logprob),
            "top": [{"token": token, "logprob": number(value)} for token, value in entry.top],
        }
        for entry in output.logprobs[0]
    ]
    return {"logprobs": tokens}


def _print_comparison(model: Any, prompt: str, options: dict[str, Any], as_json: bool) -> None:
    from sirius_runtime.compare import compare

    runs = compare(model, prompt, **options)
    if as_json:
        document = {
            str(run.mode): _output_json(run.output)
            | {"same_tokens": run.same_tokens, "speed": run.speed}
            for run in runs
        }
        say(json.dumps(document))
        return
    width = shutil.get_terminal_size().columns
    for line in _side_by_side([f"--- {r.mode} ---\n{_shown(r.output)}" for r in runs], width):
        say(line)
    say("")
    header = ("mode", "tokens", "as full", "AAL", "density", "eff.", "tokens/s", "x full")
    rows = [header] + [_comparison_row(run) for run in runs]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        say("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))


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
        _figure(stats.aal, 2),
        "1.000" if run.mode == "full" else f"{stats.density:.3f}",
        _figure(stats.effective_density, 3),
        _figure(stats.tokens_per_second, 1),
        _figure(run.speed, 2),
    )


def _figure(value: float | None, places: int) -> str:
    """A number for a reader; a dash for one that was not measured."""
    return "-" if value is None else f"{value:.{places}f}"


def _export_onnx(args: argparse.Namespace) -> None:
    from sirius_runtime.onnx_files import export_onnx

    for path in export_onnx(args.artifact, args.folder, force=args.force):
        say(f"{path}  {path.stat().st_size:,} bytes")


def _inspect(args: argparse.Namespace) -> None:
    from sirius_runtime.artifact import Artifact
    from sirius_runtime.spec import to_json

    with Artifact.open(args.artifact) as artifact:
        manifest = artifact.manifest
    if args.json:
        say(json.dumps(to_json(manifest)))
        return
    for line in describe(manifest):
        say(plain(line))  # names and versions are whatever the file says


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
        f"choosing   {_said(program.generation)}",
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


def _said(generation: Any) -> str:
    """What an artifact says of choosing tokens."""
    given = generation.logits.said() | generation.sampling.said()
    names = [f"{name} {_short(value)}" for name, value in given.items()]
    return ", ".join(names) or "the likeliest token, as it is"


def _short(value: Any) -> str:
    return f"({len(value)})" if isinstance(value, tuple) and len(value) > 4 else str(value)


def _shape(tensor: Any) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


if __name__ == "__main__":
    sys.exit(main())
