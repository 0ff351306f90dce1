"""Sparse paths of tiny random models, before they are compiled: what calibration works on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sirius_compile.config import CompileConfig
from sirius_compile.pipeline import Thresholds, front
from sirius_compile.product import Compiled
from sirius_compile.sparse_path import Chooser
from sirius_compile.texts import Sample, hold_out
from sirius_compile.tokenwise import Tokenwise
from sirius_compile.writing import Text
from sirius_passes.manager import run_passes
from sirius_passes.program import Program
from sirius_passes.sparsify import parameters
from sirius_passes.stored_form import stored_form
from sirius_runtime.spec import (
    DType,
    Method,
    ModelSpec,
    PeriodSpec,
    ProgramSpec,
    ToolVersions,
    WeightSpec,
)
from tests.support.models import MAX_SEQ_LEN, VOCABULARY, random_decoder
from tests.support.once import capture_once


def samples(count: int = 5, tokens: int = 40, seed: int = 0) -> list[Sample]:
    """Random tokens, the first 12 of each the prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, (count, tokens), generator=generator)
    return [Sample(tuple(row), 12) for row in ids.tolist()]


def held_out(text: Sequence[Sample]) -> tuple[Text, Text]:
    """What calibration reads of a text: that to calibrate on, and that held out."""
    used, held = hold_out(text)
    return Text(tuple(used)), Text(tuple(held))


def chooser(
    method: Method | str,
    *,
    model: PreTrainedModel | None = None,
    text: Sequence[Sample] = (),
    **options: object,
) -> Chooser:
    """What `compile_model` asks for a tiny model's sparse path, in float32."""
    model = random_decoder("llama") if model is None else model
    config = CompileConfig(sparsity=method, **options)  # type: ignore[arg-type]
    captured = capture_once(model.config)
    program = captured.program
    for name in program.weights:
        program.update_weight(name, dtype="float32")
    run_passes(program, front(Method(method)))
    tensors = dict(model.named_parameters(remove_duplicate=False))

    def weights(spec: WeightSpec) -> torch.Tensor:
        tensor = captured.constants.get(spec.name)
        tensor = tensors[spec.name].detach() if tensor is None else tensor
        return stored_form(spec, tensor)

    dense = Compiled(spec_of(program), program, None, {}, {}, weights)
    return Chooser(config, dense, lambda path, held_only: held_out(text), torch.device("cpu"))


def tokenwise(
    method: Method | str,
    keep: float = 0.5,
    thresholds: Thresholds | None = None,
    model: PreTrainedModel | None = None,
) -> Tokenwise:
    """The sparse path with these thresholds; None: all that thresholds decide is kept."""
    own = chooser(method, model=model)
    return own._path(own._try(keep, (), thresholds))


def spec_of(program: Program) -> ProgramSpec:
    return ProgramSpec(
        model=ModelSpec(
            "tiny", None, "llama", DType.FLOAT32, VOCABULARY, MAX_SEQ_LEN, parameters(program)
        ),
        entries=program.entries(),
        weights=tuple(program.weights.values()),
        state=program.state,
        sparsity=program.sparsity,
        period=PeriodSpec(),
        eos_token_ids=(),
        pad_token_id=None,
        passes=(),
        tools=ToolVersions("0", "0", "0"),
    )
