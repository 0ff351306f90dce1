"""The options that several commands share, for the prompt, token selection and loading, and their
values as arguments of `SiriusModel.generate` and `load`.
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
    """Options for the prompt: a flag, a file or stdin."""
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
        help="do not add the tokenizer's special tokens, such as BOS, to the prompt: for a prompt "
        "that contains them already, such as a rendered chat template",
    )


def add_template(parser: argparse.ArgumentParser) -> None:
    """Options for the chat template."""
    parser.add_argument("--system", metavar="TEXT", help="the system message of the chat")
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="which chat template to use, where the model has several",
    )


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Options that say whether the prompt is plain text or a chat message."""
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user message; render it with the model's chat template",
    )
    kind.add_argument(
        "--raw",
        action="store_true",
        help="the prompt is text to continue, also for a chat model (default)",
    )
    add_template(parser)


def is_chat(args: argparse.Namespace) -> bool:
    """Whether the options of `add_chat` make the prompt a chat message."""
    chat = args.chat or args.system is not None or args.chat_template is not None
    if chat and args.raw:
        raise ConfigError(
            "--system and --chat-template are options of a chat, which --raw rules out: leave out "
            "--raw, or leave them out"
        )
    return chat


def rendered(model: SiriusModel, prompt: str, args: argparse.Namespace) -> str:
    """The prompt as a user message, rendered with the model's chat template."""
    if model.chat is None:
        raise GenerationError(f"--chat: {NO_TEMPLATE}")
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": unescaped(args.system, "--system")})
    return model.chat.render(messages, template=args.chat_template)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text, from the options of `add_prompt`."""
    if args.prompt is not None:
        return unescaped(args.prompt, "--prompt")
    if args.prompt_file is not None:
        return read_text_file(args.prompt_file, f"--prompt-file {args.prompt_file}")
    return read_stdin("the prompt")


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Options for drafting, acceptance and token selection."""
    *others, last = modes()
    parser.add_argument(
        "--mode", help=f"{', '.join(others)} or {last} (default: the artifact's, sirius or exact)"
    )
    parser.add_argument(
        "--max-new-tokens", type=whole_number, metavar="N", help="tokens to generate at most"
    )
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
        help="stop drafting at a token whose probability in the sparse path is below C",
    )
    parser.add_argument(
        "--refresh",
        type=whole_number,
        metavar="N",
        help="griffin: select the neurons again every N periods (0: never)",
    )
    parser.add_argument(
        "--fallback",
        action=argparse.BooleanOptionalAction,
        help="decode densely while drafts do not pay (default: unless --period or --tree-width is "
        "given)",
    )
    add_lookup(parser)
    parser.add_argument(
        "--temperature", type=real_number, metavar="T", help="sampling temperature (mode sample)"
    )
    parser.add_argument(
        "--top-k", type=whole_number, metavar="K", help="sample from the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p",
        type=real_number,
        metavar="P",
        help="sample from the likeliest tokens that together have probability P",
    )
    parser.add_argument(
        "--seed", type=whole_number, help="sampling seed: the same seed gives the same tokens"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated"
    )
    parser.add_argument(
        "--repetition-penalty", type=real_number, metavar="P", help="as in transformers; 1.0: none"
    )
    parser.add_argument(
        "--min-new-tokens",
        type=whole_number,
        metavar="N",
        help="do not end the answer before it has N tokens",
    )


def add_lookup(parser: argparse.ArgumentParser) -> None:
    """The option for prompt lookup."""
    parser.add_argument(
        "--lookup",
        type=whole_number,
        metavar="N",
        help="prompt lookup: where the last N tokens occurred before, draft the tokens that "
        "followed them there (0: never)",
    )


_DRAFTING = ("period", "tree_width", *OPTIONS, "confidence", "refresh", "fallback", "lookup")
"""Options that modes `full` and `sparse`, which run one path, do not take."""


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `SiriusModel.generate`, except the mode and the sampling options.

    Raises ConfigError for options of drafting in a mode that drafts nothing.
    """
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
    """Arguments of `SiriusModel.generate` that only mode sample takes."""
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}


def add_model(parser: argparse.ArgumentParser) -> None:
    """The artifact, and options for where it runs."""
    parser.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: as stored)")
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="CPU threads of one operator"
    )
    parser.add_argument(
        "--copy", action="store_true", help="read the file into memory instead of mapping it"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not hash the weights at load")
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="memory that the process may take, such as 6GiB: weights that do not fit are read "
        "from the file when they are needed",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The artifact, and options for where it runs and on which back end."""
    add_model(parser)
    parser.add_argument(
        "--backend",
        default="auto",
        help="auto (default: the fastest that works here), eager, inductor (compiled by "
        "torch.compile), cudagraph (compiled, and recorded as CUDA graphs), period (a period as "
        "one graph), aoti (that graph compiled ahead of time, for programs without Python) or "
        "onnxruntime",
    )
    parser.add_argument(
        "--context",
        type=whole_number,
        metavar="N",
        help="tokens of prompt and answer together that aoti compiles for, or that --memory-budget "
        "leaves room for",
    )
    parser.add_argument(
        "--providers", metavar="P,Q", help="onnxruntime: execution providers, preferred first"
    )


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load`, except those of the back end."""
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
    """Arguments of `load`. Raises ConfigError for options that exclude each other."""
    from sirius_runtime.loading import BackendName

    sized = args.backend == BackendName.AOTI or args.memory_budget is not None
    if args.context is not None and not sized:
        raise ConfigError(
            "--context needs --memory-budget or backend aoti, which compiles for it; "
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
