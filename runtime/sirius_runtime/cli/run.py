"""`sirius run`: answers one prompt and streams the tokens as they are committed."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

from sirius_runtime.cli.command import Command
from sirius_runtime.cli.comparison import print_comparison
from sirius_runtime.cli.options import (
    add_chat,
    add_generation,
    add_loading,
    add_prompt,
    generation_options,
    is_chat,
    loading_options,
    read_prompt,
    rendered,
    sampling_options,
)
from sirius_runtime.cli.results import logprobs_json, output_json, summary, write_text
from sirius_runtime.command_line import ESCAPES, say, tell, whole_number
from sirius_runtime.errors import ConfigError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt(parser)
    add_chat(parser)
    add_generation(parser)
    parser.add_argument(
        "--compare", action="store_true", help="run modes full, sparse and sirius side by side"
    )
    parser.add_argument(
        "--logprobs",
        type=whole_number,
        metavar="N",
        help="with --json: the log-probability of each token and of the N likeliest tokens",
    )
    add_loading(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of streaming"
    )


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.loading import load
    from sirius_runtime.prompts import PromptWarning

    warnings.simplefilter("always", PromptWarning)
    sampling = sampling_options(args)
    if args.compare and (args.mode is not None or any(v is not None for v in sampling.values())):
        raise ConfigError(
            "--compare runs modes full, sparse and sirius, greedily: leave out --mode, "
            "--temperature, --top-k, --top-p and --seed"
        )
    if args.logprobs is not None and (args.compare or not args.json):
        raise ConfigError("--logprobs goes with --json, and not with --compare")
    options, loading = generation_options(args), loading_options(args)
    chat = is_chat(args)
    prompt = read_prompt(args)
    model = load(**loading)
    options["add_special_tokens"] = args.add_special_tokens and not chat
    if chat:
        prompt = rendered(model, prompt, args)
    elif model.chat is not None and args.add_special_tokens and not args.raw:
        tell(
            "sirius: this model has a chat template, but the prompt is used as it is; --chat "
            "makes it a user message (--raw turns off this hint)"
        )
    _warn_of_unknown_tokens(model, prompt)
    if args.compare:
        print_comparison(model, prompt, options, args.json)
    elif args.json:
        output = model.generate(
            prompt, mode=args.mode, logprobs=args.logprobs, **options, **sampling
        )
        say(json.dumps(output_json(output) | logprobs_json(output)))
    else:
        _stream(model, prompt, args.mode, options | sampling)


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
            f"sirius: warning: {len(unknown)} of the prompt's tokens not in this model's "
            f"vocabulary ({words})"
        )


def _tokens_and_offsets(tokenizer: Any, prompt: str) -> tuple[list[str], list[tuple[int, int]]]:
    from sirius_runtime.tokenizer_guard import guarded

    with guarded():
        encoding = tokenizer.encode(prompt)
    return encoding.tokens, encoding.offsets


def _stream(model: Any, prompt: str, mode: str | None, options: dict[str, Any]) -> None:
    from sirius_runtime.text import TextStream

    streamer = None
    if model.tokenizer is not None:
        streamer = TextStream(model.tokenizer, write_text, options["stop"])
    output = model.generate(prompt, mode=mode, streamer=streamer, **options)
    say("")
    tell(f"sirius: {summary(output)}")


COMMAND = Command(
    "generate from a prompt, streaming committed tokens",
    _add_arguments,
    _run,
    epilog=f"In the TEXT of a flag {ESCAPES}; any other backslash stands for itself. A file or "
    "stdin is read as it is, except that one line break at its end is removed.",
)
