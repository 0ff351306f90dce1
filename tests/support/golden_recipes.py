"""Makes golden artifacts (see `tests.support.golden_artifacts`).

`python -m tests.support.golden_recipes` makes those of the current format version that are not
there yet. It replaces none: what a version once wrote is what its readers must read.
"""

from __future__ import annotations

import json
import lzma
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from tests.support.golden_artifacts import (
    FOLDER,
    NESTED_VERSION,
    VERSION,
    answers,
    opened,
    tokens_of,
)
from tests.support.models import random_decoder, word_tokenizer, write_calibration

_TINY: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
_UNTIED = {"tie_word_embeddings": False}  # else such a small model repeats its last token
_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@dataclass(frozen=True)
class Recipe:
    """A tiny model of a family, and how it is compiled."""

    family: str
    method: str
    dtype: str = "float32"
    graphs: str = "entries"
    chat: bool = False
    weights: str = "dtype"
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The format version that it is written in."""
        return NESTED_VERSION if self.weights == "int8" else VERSION

    def compile(self, calibration: Path) -> Compiled:
        tokenizer = word_tokenizer()
        if self.chat:
            tokenizer.chat_template = _TEMPLATE
        options = CompileConfig(
            sparsity=self.method,
            keep=1.0 if self.method == "none" else 0.5,
            dtype=self.dtype,
            graphs=self.graphs,
            weights=self.weights,
            period=4,
            measure=False,
            calibration=calibration if self.method in ("cats", "teal") else "builtin",
        )
        model = random_decoder(self.family, **{**_TINY, **self.model})
        return compile_model(model, options, tokenizer=tokenizer)


RECIPES = {
    "llama-griffin-period": Recipe("llama", "griffin", graphs="torch", chat=True),
    "llama-teal-bfloat16": Recipe("llama", "teal", dtype="bfloat16"),
    "llama-griffin-nested": Recipe(
        "llama", "griffin", weights="int8", model={"hidden_size": 32, "intermediate_size": 32}
    ),
    "llama-none-onnx": Recipe("llama", "none", graphs="onnx"),
    "gemma3-cats": Recipe("gemma3_text", "cats", model={"sliding_window": 6, **_UNTIED}),
    "gpt2-topk": Recipe("gpt2", "topk", model={"n_inner": 12, **_UNTIED}),
    "mixtral-experts": Recipe(
        "mixtral", "experts", model={"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        calibration = write_calibration(Path(scratch) / "words.txt")
        for version in (VERSION, NESTED_VERSION):
            own = {name: recipe for name, recipe in RECIPES.items() if recipe.version == version}
            _make(FOLDER / version, own, calibration, Path(scratch))


def _make(folder: Path, recipes: dict[str, Recipe], calibration: Path, scratch: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tokens_of(folder.name)
    for name, recipe in recipes.items():
        target = folder / f"{name}.sirius.xz"
        if target.exists():
            continue
        path = recipe.compile(calibration).save(scratch / f"{name}.sirius")
        target.write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
        tokens[name] = answers(opened(path, name))
    lines = (
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(run)}: {ids}" for run, ids in said.items())
        + "\n}"
        for name, said in tokens.items()
    )
    (folder / "tokens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
