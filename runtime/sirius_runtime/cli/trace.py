"""`sirius trace`: each period's draft, the full path's verdict on it, and the reason."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from sirius_runtime.cli.command import Command
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
from sirius_runtime.cli.results import summary
from sirius_runtime.command_line import new_file_argument, say, tell
from sirius_runtime.errors import ConfigError, SiriusError
from sirius_runtime.new_file import write_file
from sirius_runtime.terminal import takes_colour

if TYPE_CHECKING:
    from sirius_runtime.trace import Trace

_BACKENDS = ("auto", "eager")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt(parser)
    add_chat(parser)
    add_generation(parser)
    parser.add_argument(
        "--out",
        type=new_file_argument,
        metavar="FILE",
        help="write the trace to this file, one JSON object per line (docs/trace.md)",
    )
    parser.add_argument(
        "--html",
        type=new_file_argument,
        metavar="FILE",
        help="write the trace to this file, as one self-contained HTML page",
    )
    parser.add_argument(
        "--check-kv",
        action="store_true",
        help="at the end, run all tokens densely and compare that run's K/V caches with these",
    )
    add_loading(parser)


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.cli.trace_page import page
    from sirius_runtime.cli.trace_view import View
    from sirius_runtime.loading import load
    from sirius_runtime.trace import Tracing

    if args.out is not None and args.out == args.html:
        raise ConfigError(f"--out and --html name the same file, {args.out}: give two")
    if args.backend not in _BACKENDS:
        raise ConfigError(
            f"--backend {args.backend}: only backend eager can be traced, because it runs a period "
            "step by step; leave --backend out"
        )
    options = generation_options(args) | sampling_options(args)
    chat, loading = is_chat(args), loading_options(args)
    prompt = read_prompt(args)
    model = load(**loading | {"backend": "eager"})
    if chat:
        prompt = rendered(model, prompt, args)
    view = View(colour=takes_colour(sys.stdout))
    output = model.generate(
        prompt,
        mode=args.mode,
        add_special_tokens=args.add_special_tokens and not chat,
        trace=Tracing(lambda step: say(view.step(step)), args.check_kv),
        **options,
    )
    trace = output.trace
    assert trace is not None
    say(view.end(trace))
    if args.out is not None:
        lines = (json.dumps(record) + "\n" for record in trace.records())
        write_file(args.out, "".join(lines).encode())
    if args.html is not None:
        write_file(args.html, page(output, model.tokenizer).encode(errors="backslashreplace"))
    tell(f"sirius: {summary(output)}")
    _check(trace)


def _check(trace: Trace) -> None:
    cache = trace.cache
    if cache is not None and cache.inconsistent:
        worst = cache.largest
        raise SiriusError(
            f"the K/V cache differs from that of a dense run over the same tokens in "
            f"{cache.inconsistent} of {2 * cache.layers * cache.slots} slots of all layers, most "
            f"in {worst.tensor} of layer {worst.layer}, slot {worst.slot}: please report it, with "
            "the trace"
        )


COMMAND = Command(
    "show each period's draft, the full path's verdict on it, and the reason",
    _add_arguments,
    _run,
    epilog="Modes sirius, exact and sample; always on backend eager. Where drafts do not pay, "
    "dense steps are taken and shown with the reason; --no-fallback keeps drafting.",
)
