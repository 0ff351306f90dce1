"""`sirius verify`: checks an artifact, and whether this machine reproduces its self-test."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from sirius_runtime.cli.command import Command
from sirius_runtime.command_line import path_argument, say
from sirius_runtime.errors import ReproductionError
from sirius_runtime.terminal import plain

if TYPE_CHECKING:
    from sirius_runtime.verification import Verification


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    parser.add_argument("--device", default="cpu", help="where the self-test runs (cpu)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.self_test import Outcome
    from sirius_runtime.verification import verify

    found = verify(args.artifact, device=args.device)
    say(json.dumps(to_json(found)) if args.json else plain(to_text(found)))
    if found.outcome is Outcome.DIFFERENT:
        raise ReproductionError(
            "this machine's results differ from the compiling machine's. If sirius verify succeeds "
            "with SIRIUS_KERNELS=0, a kernel is wrong here: report it, with the CPU's model"
        )


def to_json(found: Verification) -> dict[str, object]:
    """The findings as `--json` prints them; `self_test` is null where the artifact has none."""
    outcome = found.outcome
    entries = {
        one.entry: {"outcome": str(one.outcome), "largest": one.largest} for one in found.compared
    }
    return {
        "path": str(found.path),
        "sound": True,
        "format_version": list(found.format_version),
        "files": found.files,
        "bytes": found.size,
        "graphs": list(found.graphs),
        "weights": found.weights,
        "backend": str(found.backend),
        "self_test": None if outcome is None else {"outcome": str(outcome), "entries": entries},
    }


def to_text(found: Verification) -> str:
    """The findings on one line."""
    sound = f"{found.path}: sound ({found.files} files, {found.size:,} bytes)"
    outcome = found.outcome
    if outcome is None:
        return f"{sound}; it has no self-test, so reproduction on this machine is not checked"
    if len({one.outcome for one in found.compared}) == 1:
        logits = f"the logits of {_listed([one.entry for one in found.compared])} are {outcome}"
    else:
        logits = "the logits are " + _listed([f"{o.outcome} in {o.entry}" for o in found.compared])
    largest = max(one.largest for one in found.compared)
    apart = f" (largest difference {largest:.2g} of the logits' RMS)" if largest else ""
    verb = "does not reproduce" if outcome == "different" else "reproduces"
    return f"{sound}; this machine {verb} the compiling machine's results: {logits}{apart}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


COMMAND = Command(
    "check an artifact, and that this machine computes what the compiling machine did",
    _add_arguments,
    _run,
    epilog="Exit code: 0 if the artifact is sound and its self-test is reproduced or absent; 1 if "
    "this machine's results differ; 2 if the artifact is not sound.",
)
