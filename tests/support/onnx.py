"""Compiled models behind PyTorch and behind ONNX Runtime, from one artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime import load
from sirius_runtime.model import GenerationOutput, SiriusModel
from tests.support.counts import counted_alike
from tests.support.models import Rows, random_decoder, word_tokenizer, write_calibration

CPU = ("CPUExecutionProvider",)
COUNTED = "tokens periods advances aal corrections acceptance_rate"
MEASURED = "density effective_density"
"""Of what is counted over thousands of activations one may lie on its threshold's other side: sums
of another order round otherwise."""


@dataclass(frozen=True)
class Pair:
    """One artifact behind both."""

    path: Path
    torch: SiriusModel
    onnx: SiriusModel

    def agree(self, prompts: Rows | str, **options: Any) -> GenerationOutput:
        """What both generate, which is the same; and so is all that is counted of it."""
        options = {"max_new_tokens": 24} | options
        wanted = self.torch.generate(prompts, **options)
        found = self.onnx.generate(prompts, **options)
        assert found.tokens == wanted.tokens
        assert found.finish_reasons == wanted.finish_reasons
        ends = options.get("eos_token_id", True)  # by default, the model has some
        for name in counted_alike(COUNTED, ends):
            assert getattr(found.stats, name) == getattr(wanted.stats, name), name
        for name in counted_alike(MEASURED, ends):
            assert getattr(found.stats, name) == pytest.approx(getattr(wanted.stats, name), 1e-4)
        return found


class Pairs:
    """Makes a `Pair`, once for each set of arguments."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """options: of every CompileConfig."""
        self._folder, self._options = folder, options
        self._words = write_calibration(folder / "words.txt")
        self._problems = folder / "problems.txt"
        solved = islice(problems(Task.REASONING, "train", seed=1), 12)
        self._problems.write_text("\n\n".join(p.prompt + p.answer for p in solved))
        self._made: dict[object, Pair] = {}

    def __call__(
        self,
        method: str,
        width: int = 1,
        size: int = 4,
        model_type: str = "llama",
        *,
        dtype: str = "float32",
        **config: object,
    ) -> Pair:
        key = (method, width, size, model_type, dtype, *config.items())
        if key not in self._made:
            model: PreTrainedModel | str = model_type
            if model_type != "tally-3m":
                model = random_decoder(model_type, **config)
            options = CompileConfig(
                sparsity=method,
                period=size,
                tree_width=width,
                dtype=dtype,
                graphs="both",
                calibration=self._problems if model_type == "tally-3m" else self._words,
                **self._options,
            )
            tokenizer = None if isinstance(model, str) else word_tokenizer()
            compiled = compile_model(model, options, tokenizer=tokenizer)
            path = compiled.save(self._folder / f"{len(self._made)}.sirius")
            self._made[key] = Pair(path, load(path, device="cpu"), load_onnx(path))
        return self._made[key]


def load_onnx(path: Path, providers: Sequence[str] = CPU) -> SiriusModel:
    return load(
        path, backend="onnxruntime", providers=providers, threads=1, progress=lambda told: None
    )
