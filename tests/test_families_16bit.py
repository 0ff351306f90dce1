"""Every family in bfloat16 and float16: from a checkpoint to an artifact to tokens, beside
transformers' model of the same checkpoint.

How far apart two programs of 16-bit numbers may be follows from how far such a program is from
exact: the distance of transformers' 16-bit model from the same weights in float32. Ours, which
rounds in other places, may be as far again on top of it. Distances are those of a token's logits,
relative, and of the median token: where rounding makes a router choose another expert, one token's
logits jump, in transformers' model as in ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sirius_compile import CompileConfig, compile_model
from sirius_compile.families import FAMILIES
from sirius_runtime import Mode, SiriusModel, load
from sirius_runtime.spec import Method
from tests.support.families import Caches, random_model, random_rows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MARKS = {("qwen2", "bfloat16"): (), ("gpt2", "float16"): pytest.mark.gate}
CASES = [
    pytest.param(
        (family.model_type, dtype),
        id=f"{family.model_type}-{dtype}",
        marks=MARKS.get((family.model_type, dtype), pytest.mark.slow),
    )
    for family in FAMILIES
    for dtype in DTYPES
]
(PROMPT,) = random_rows(21)
NEW_TOKENS = 6


@dataclass(frozen=True)
class Case:
    """A checkpoint: transformers' model in its dtype and in float32, and the artifact."""

    dtype: torch.dtype
    live: PreTrainedModel
    exact: PreTrainedModel
    model: SiriusModel


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model_type, name = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    random_model(model_type).to(DTYPES[name]).save_pretrained(folder)
    compiled = compile_model(
        folder, CompileConfig(sparsity=Method.TOPK, period=4, graphs="entries")
    )
    return Case(
        DTYPES[name],
        loaded(folder, DTYPES[name]),
        loaded(folder, torch.float32),
        load(compiled.save(folder / "model.sirius"), device="cpu"),
    )


def loaded(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def distance(actual: Tensor, expected: Tensor) -> Tensor:
    """Relative distance of each token's logits [T, V]."""
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)


def test_weights_have_the_dtypes_that_transformers_loads(case: Case) -> None:
    live = {
        name: str(tensor.dtype).removeprefix("torch.")
        for group in (case.live.named_parameters, case.live.named_buffers)
        for name, tensor in group(remove_duplicate=False)
    }
    weights = case.model.backend.program.weights
    assert {w.name: w.dtype for w in weights} == {w.name: live[w.name] for w in weights}


def test_logits_are_as_near_to_exact_as_transformers(case: Case) -> None:
    exact, live = logits(case.exact, PROMPT), logits(case.live, PROMPT)
    caches = Caches(case.model.backend, 1, dtype=case.dtype)
    ours = caches.feed(torch.tensor([PROMPT]), torch.tensor([len(PROMPT)]))[0].float()
    assert distance(ours, exact).median() <= 2 * distance(live, exact).median()


def test_exact_mode_writes_what_transformers_finds_likeliest(case: Case) -> None:
    output = case.model.generate(
        [PROMPT], mode=Mode.EXACT, max_new_tokens=NEW_TOKENS, eos_token_id=[]
    )
    tokens = list(output.tokens[0])
    assert len(tokens) == NEW_TOKENS
    read = [*PROMPT, *tokens]
    live, exact = (logits(m, read)[len(PROMPT) - 1 : -1] for m in (case.live, case.exact))
    behind = live.amax(-1) - live.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    # Two numbers, each as far off as any of transformers' own are, may change places.
    assert behind.max() <= 2 * (live - exact).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe"])
def test_onnx_graphs_keep_routers_in_float32(model_type: str, tmp_path: Path) -> None:
    random_model(model_type).to(torch.float16).save_pretrained(tmp_path)
    options = CompileConfig(sparsity=Method.TOPK, period=4, graphs="both")
    compiled = compile_model(tmp_path, options)
    routers = {w.name: w.dtype for w in compiled.spec.weights if w.name.endswith("gate.weight")}
    assert set(routers.values()) == {"float32"}
    path = compiled.save(tmp_path / "model.sirius")
    written = [
        load(path, backend=backend).generate(
            [PROMPT], mode=Mode.EXACT, max_new_tokens=NEW_TOKENS, eos_token_id=[]
        )
        for backend in ("eager", "onnxruntime")
    ]
    assert written[0].tokens == written[1].tokens
