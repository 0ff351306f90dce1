"""The options that several commands take: of the prompt, of choosing tokens and of loading; and
what they say as arguments of `SiriusModel.generate` and of `load`.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sirius_runtime.chat import NO_TEMPLATE
from sirius_runtime.command_line import (
    path_argument,
    read_stdin,
    read_text_file,
    real_number,
    unescaped,
    whole_number,
)
from sirius_runtime.errors import ConfigError, GenerationError, shown
from sirius_runtime.request import Mode, modes
from sirius_runtime.rules import OPTIONS, RuleOptions

if TYPE_CHECKING:
    from sirius_runtime.model import SiriusModel


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """The prompt: a flag, a file or stdin."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; see below")
    source.add_argument(
        "--prompt-file",
        type=path_argument,
        metavar="FILE",
        help="a file with the prompt in UTF-8 (default: stdin)",
    )
    parser.add_argument(
        "--no-add-special-tokens",
        dest="add_special_tokens",
        action="store_false",
        help="take the prompt as it is, without the BOS that the tokenizer puts before it: for one "
        "that brings its special tokens, as a chat template's does",
    )


def add_template(parser: argparse.ArgumentParser) -> None:
    """What a chat template is given."""
    parser.add_argument("--system", metavar="TEXT", help="the system's message of a chat")
    parser.add_argument(
        "--chat-template", metavar="NAME", help="one of several chat templates of the model"
    )


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Whether the prompt is a message of a chat."""
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message, for the model's chat template",
    )
    kind.add_argument(
        "--raw",
        action="store_true",
        help="the prompt is text to go on with, whatever the model is for (default)",
    )
    add_template(parser)


def is_chat(args: argparse.Namespace) -> bool:
    """Whether the prompt is a message, by what `add_chat` was given."""
    chat = args.chat or args.system is not None or args.chat_template is not None
    if chat and args.raw:
        raise ConfigError("--system and --chat-template are of a chat: leave out --raw, or them")
    return chat


def rendered(model: SiriusModel, prompt: str, args: argparse.Namespace) -> str:
    """The text that the model's chat template makes of the prompt."""
    if model.chat is None:
        raise GenerationError(f"--chat: {NO_TEMPLATE}")
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": unescaped(args.system, "--system")})
    return model.chat.render(messages, template=args.chat_template)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt that `add_prompt` was given."""
    if args.prompt is not None:
        return unescaped(args.prompt, "--prompt")
    if args.prompt_file is not None:
        return read_text_file(args.prompt_file, f"--prompt-file {args.prompt_file}")
    return read_stdin("the prompt")


def add_generation(parser: argparse.ArgumentParser) -> None:
    """How tokens are drafted, accepted and chosen."""
    first, *others, last = modes()
    parser.add_argument("--mode", help=f"{first} (default), {', '.join(others)} or {last}")
    parser.add_argument("--max-new-tokens", type=whole_number, metavar="N")
    parser.add_argument("--period", metavar="K", help="tokens per verification, or auto")
    parser.add_argument(
        "--tree-width", type=whole_number, metavar="W", help="paths drafted side by side"
    )
    for option in fields(RuleOptions):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=real_number,
            metavar=option.metadata["metavar"],
            help=option.metadata["about"],
        )
    parser.add_argument(
        "--confidence",
        type=real_number,
        metavar="C",
        help="probability that a draft needs to go on",
    )
    parser.add_argument(
        "--refresh",
        type=whole_number,
        metavar="N",
        help="periods between griffin's selections of neurons",
    )
    parser.add_argument(
        "--fallback",
        action=argparse.BooleanOptionalAction,
        help="decode densely while drafts do not pay (default: unless --period or --tree-width is "
        "given)",
    )
    add_lookup(parser)
    parser.add_argument(
        "--temperature", type=real_number, metavar="T", help="of sampling (mode sample)"
    )
    parser.add_argument(
        "--top-k", type=whole_number, metavar="K", help="sample from the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p", type=real_number, metavar="P", help="sample from this much probability"
    )
    parser.add_argument("--seed", type=whole_number, help="of sampling, for the same tokens again")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated"
    )
    parser.add_argument(
        "--repetition-penalty", type=real_number, metavar="P", help="as transformers'; 1.0: none"
    )
    parser.add_argument(
        "--min-new-tokens",
        type=whole_number,
        metavar="N",
        help="tokens before which none ends the answer",
    )


def add_lookup(parser: argparse.ArgumentParser) -> None:
    """Whether drafts are looked up."""
    parser.add_argument(
        "--lookup",
        type=whole_number,
        metavar="N",
        help="draft what followed the last N tokens where they stood before (0: never)",
    )


_DRAFTING = ("period", "tree_width", *OPTIONS, "confidence", "refresh", "fallback", "lookup")
"""Options that a mode of one path has no use for."""


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `SiriusModel.generate`, but for the mode and the options of sampling."""
    given = [f"--{n.replace('_', '-')}" for n in _DRAFTING if getattr(args, n) is not None]
    if args.mode in (Mode.FULL, Mode.SPARSE) and given:
        raise ConfigError(f"--mode {args.mode} drafts nothing: leave out {', '.join(given)}")
    return {
        "max_new_tokens": args.max_new_tokens,
        **{name: getattr(args, name) for name in _DRAFTING},
        "period": _number_or_auto(args.period),
        "stop": tuple(unescaped(text, "--stop") for text in args.stop),
        "repetition_penalty": args.repetition_penalty,
        "min_new_tokens": args.min_new_tokens,
    }


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `SiriusModel.generate` that mode sample alone takes."""
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}


def add_model(parser: argparse.ArgumentParser) -> None:
    """The artifact, and where it runs."""
    parser.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: as stored)")
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="of one operator on the CPU"
    )
    parser.add_argument(
        "--copy", action="store_true", help="read the file into memory, do not map it"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not hash the weights at load")
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="memory that the process may take (6GiB): weights beyond it are read from the file "
        "as they are needed",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The artifact, where it runs, and by which back end."""
    add_model(parser)
    parser.add_argument(
        "--backend",
        default="auto",
        help="auto (default: the fastest that works here), eager, inductor (compiled by "
        "torch.compile), cudagraph (and recorded, on a CUDA GPU), period (a period as one graph), "
        "aoti (that graph compiled once, for embedding without Python) or onnxruntime",
    )
    parser.add_argument(
        "--context",
        type=whole_number,
        metavar="N",
        help="tokens of prompt and answer that aoti compiles for, or that --memory-budget leaves "
        "room for",
    )
    parser.add_argument(
        "--providers", metavar="P,Q", help="onnxruntime: execution providers, the preferred first"
    )


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load`, but for the back end's."""
    return {
        "path": args.artifact,
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
        "verify": not args.no_verify,
        "copy": args.copy,
        "memory_budget": args.memory_budget,
    }


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load`. Raises ConfigError for some that don't go together."""
    from sirius_runtime.loading import BackendName

    sized = args.backend == BackendName.AOTI or args.memory_budget is not None
    if args.context is not None and not sized:
        raise ConfigError(
            "--context goes with --memory-budget, and with backend aoti, which compiles for it; "
            f"this is backend {args.backend}: leave it out"
        )
    providers = None if args.providers is None else args.providers.split(",")
    if providers is not None and "" in providers:
        raise ConfigError(
            f"--providers takes names of execution providers (P,Q), got {shown(args.providers)}"
        )
    return {
        **model_options(args),
        "backend": args.backend,
        "context": args.context,
        "providers": providers,
    }


def _number_or_auto(text: str | None) -> int | str | None:
    try:
        return text if text is None else int(text)
    except ValueError:
        return text
