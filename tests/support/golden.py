"""Golden tokens: what every method, mode and back end answers, kept in a file.

`python -m tests.support.golden` writes the file anew, from the code as it is. Do so only where
tokens are meant to change, and say why in the commit.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from tests.support.families import CONFIGS
from tests.support.models import METHODS, random_decoder, word_tokenizer, write_calibration

FILE = Path(__file__).with_name("golden.json")
SHIPPED = "tally-3m"
FAMILIES = ("llama", "gemma3_text", "gpt2", "phi3", "mixtral")
PROMPTS = {
    SHIPPED: [
        "Q: Val has 8 more than Bob. Bob has 20 fewer than Zoe. Zoe has 25 nuts. "
        "How many nuts does Val have?\nA:",
        "Q: Ann has 2 times as many as Wes. Wes has 13 eggs. How many eggs does Ann have?\nA:",
    ],
    **{family: [[7, 8, 9], [50, 30, 11, 22, 60]] for family in FAMILIES},
}
RUNS: dict[str, dict[str, object]] = {
    "full": {"mode": "full"},
    "sparse": {"mode": "sparse"},
    **{
        f"{mode} w{width}": {"mode": mode, "tree_width": width, "period": 6}
        for mode in ("sirius", "exact")
        for width in (1, 4)
    },
    "sample w1": {"mode": "sample", "period": 6, "seed": 5},
    "sample w4": {"mode": "sample", "tree_width": 4, "period": 6, "seed": 5},
    "sirius confidence": {"mode": "sirius", "confidence": 0.5, "period": 6},
}
REFRESHED: dict[str, object] = {"mode": "sirius", "refresh": 1, "period": 6}
BACKENDS = ("eager", "period")

Tokens = list[list[int]]


@dataclass(frozen=True)
class Case:
    """A model compiled with a method: the key of its tokens is ``model/method``."""

    model: str
    method: str

    @property
    def key(self) -> str:
        return f"{self.model}/{self.method}"


def cases() -> list[Case]:
    every = [Case(model, method) for model in (SHIPPED, *FAMILIES) for method in METHODS]
    mixtures = {"mixtral"}
    able = [c for c in every if c.model not in mixtures or c.method in ("topk", "none")]
    return [*able, Case("mixtral", "experts")]


def generated(case: Case, text: Path) -> dict[str, Tokens]:
    """The tokens of a case by run, ``back end: run``; `text`: what tiny models calibrate on."""
    return dict(_runs(_compiled(case, text), case))


def _runs(compiled: Compiled, case: Case) -> Iterator[tuple[str, Tokens]]:
    runs = {**RUNS, "sirius refresh": REFRESHED} if "griffin" in case.method else RUNS
    for backend in BACKENDS:
        model = compiled.to_runtime(dtype="float32", backend=backend)
        for name, options in runs.items():
            if backend != "eager":
                if options["mode"] in ("full", "sparse") or name.endswith("w4"):
                    continue  # the same entries; and the graph has its own period and width
                options = {n: v for n, v in options.items() if n not in ("period", "tree_width")}
            options = {"fallback": False, **options}  # which follows the clock
            output = model.generate(PROMPTS[case.model], max_new_tokens=24, **options)  # type: ignore[arg-type]
            yield f"{backend}: {name}", [list(row) for row in output.tokens]


def _compiled(case: Case, text: Path) -> Compiled:
    keep = 1.0 if case.method == "none" else 0.5
    if case.model == SHIPPED:
        keep = 1.0 if case.method == "none" else 0.4
        options = CompileConfig(sparsity=case.method, keep=keep, period=6, tree_width=4)
        return compile_model(SHIPPED, options)
    options = CompileConfig(sparsity=case.method, keep=keep, calibration=text)
    model = random_decoder(case.model, **CONFIGS.get(case.model, {}))
    return compile_model(model, options, tokenizer=word_tokenizer())


def write(tokens: dict[str, dict[str, Tokens]]) -> None:
    """Writes the file, a run a line."""
    lines = ",\n".join(
        f"{json.dumps(key)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in runs.items())
        + "\n}"
        for key, runs in tokens.items()
    )
    FILE.write_text(f"{{\n{lines}\n}}\n")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text = write_calibration(Path(folder) / "words.txt")
        write({case.key: generated(case, text) for case in cases()})


if __name__ == "__main__":
    main()
