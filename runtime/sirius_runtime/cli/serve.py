"""`sirius serve`: serves an artifact with the OpenAI API over HTTP."""

from __future__ import annotations

import argparse
import os

from sirius_runtime.cli.command import Command
from sirius_runtime.cli.options import add_lookup, add_model, model_options
from sirius_runtime.command_line import positive_number, real_number, whole_number
from sirius_runtime.errors import BackendError, ConfigError

_KEY = "SIRIUS_API_KEY"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--port", type=whole_number, default=8000, help="port; 0: any free one (%(default)s)"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"the key that clients must send (default: ${_KEY}; none is needed if both are unset)",
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="the model's name (default: the file's)"
    )
    parser.add_argument(
        "--max-rows",
        type=positive_number,
        default=8,
        metavar="N",
        help="answers generated at the same time (8)",
    )
    parser.add_argument(
        "--max-queue",
        type=whole_number,
        default=64,
        metavar="N",
        help="answers that may wait for a free row (64)",
    )
    parser.add_argument(
        "--context",
        type=positive_number,
        metavar="N",
        help="tokens of prompt and answer together (default: the artifact's, at most 4096)",
    )
    parser.add_argument(
        "--max-period",
        type=positive_number,
        default=32,
        metavar="K",
        help="longest period that a request may ask for (32)",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=positive_number,
        default=64,
        metavar="N",
        help="prompt tokens that are prefilled between two periods (64)",
    )
    parser.add_argument(
        "--prefix-cache",
        type=real_number,
        default=256.0,
        metavar="MB",
        help="memory for the K/V of prompt prefixes (256; 0: keep none)",
    )
    parser.add_argument(
        "--mode", help="mode of greedy requests that name none (default: the artifact's)"
    )
    add_lookup(parser)
    parser.add_argument(
        "--timeout",
        type=real_number,
        default=600.0,
        metavar="S",
        help="seconds a request may take (600)",
    )
    add_model(parser)


def _run(args: argparse.Namespace) -> None:
    try:
        from sirius_runtime.serve.engine import Capacity
        from sirius_runtime.serve.server import make_served, serve
    except ModuleNotFoundError as error:
        raise BackendError(
            f"sirius serve needs {error.name}, which is not installed: pip install "
            "'sirius-compile[serve]'"
        ) from error
    from sirius_runtime.loading import BackendName, load
    from sirius_runtime.tiers.budget import DEFAULT_CONTEXT, read_size

    for name, value in (("--prefix-cache", args.prefix_cache), ("--timeout", args.timeout)):
        if not 0 <= value < 1e9:
            raise ConfigError(f"{name} must be in 0..1e9, got {value}")
    if args.timeout == 0:
        raise ConfigError("--timeout must be above 0")
    if args.port > 65535:
        raise ConfigError(f"--port must be in 0..65535, got {args.port}")
    options, prefix_bytes, longest = model_options(args), int(args.prefix_cache * 1e6), 4096
    if args.memory_budget is not None:
        longest = args.context or DEFAULT_CONTEXT
        budget = read_size(args.memory_budget, "--memory-budget") - prefix_bytes
        options |= {"memory_budget": max(1, budget), "rows": args.max_rows, "context": longest}
    model = load(backend=BackendName.EAGER, **options)
    capacity = Capacity(
        rows=args.max_rows,
        queue=args.max_queue,
        context=args.context or min(longest, model.program.model.max_seq_len),
        period=args.max_period,
        block=args.prefill_chunk,
        prefix_bytes=prefix_bytes,
    )
    served = make_served(
        model,
        args.served_model_name or args.artifact.stem,
        capacity,
        mode=args.mode,
        timeout=args.timeout,
        lookup=args.lookup,
        api_key=args.api_key or os.environ.get(_KEY) or None,
    )
    serve(served, args.host, args.port)


COMMAND = Command(
    help="serve an artifact with the OpenAI API",
    add_arguments=_add_arguments,
    run=_run,
    epilog="Always runs on back end eager. SIGTERM or Ctrl-C completes the answers in progress and "
    "then stops; a second one stops after the current period.",
)
