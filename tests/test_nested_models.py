"""Models of nested weights: the laws hold of the model that they make, and one copy serves both
paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from sirius_runtime.artifact import Artifact
from sirius_runtime.errors import ArtifactError, BackendError, ConfigError
from sirius_runtime.loading import load, make_backend
from sirius_runtime.manifest_check import check_program
from sirius_runtime.model import SiriusModel
from sirius_runtime.nested import unnest
from sirius_runtime.safetensors_file import share_of_bfloat16, size_of
from sirius_runtime.self_test import Outcome
from sirius_runtime.spec import FORMAT_VERSION, NESTED_FORMAT_VERSION, AcceptanceSpec, Layout
from sirius_runtime.verification import verify
from tests.support.families import CONFIGS
from tests.support.fast import gate_but
from tests.support.models import bound_weights, random_decoder, word_tokenizer, write_calibration
from tests.support.paths import chooser, samples

PROMPTS = [[7, 8, 9], [50, 30, 11, 22, 60]]
CASES = [
    ("llama", "topk"),
    pytest.param("phi3", "teal", marks=pytest.mark.slow),
    pytest.param("llama", "griffin+teal", marks=pytest.mark.slow),
    pytest.param("gpt2", "cats", marks=pytest.mark.slow),
    pytest.param("gemma3_text", "griffin", marks=pytest.mark.slow),
    pytest.param("qwen2", "none", marks=pytest.mark.slow),
    pytest.param("mixtral", "topk", marks=pytest.mark.gate),
    pytest.param("qwen2_moe", "experts", marks=pytest.mark.slow),
    pytest.param("gpt_oss", "none", marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Nested:
    compiled: Compiled
    model: SiriusModel


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Nested]:
    """Tiny models with nested weights, each compiled once."""
    text = write_calibration(tmp_path_factory.mktemp("nested") / "words.txt")
    made: dict[object, Nested] = {}

    def make(family: str, method: str, **options: object) -> Nested:
        key = (family, method, repr(sorted(options.items())))
        if key not in made:
            config = CompileConfig(
                **{  # type: ignore[arg-type]
                    "sparsity": method,
                    "weights": "int8",
                    "calibration": text,
                    "graphs": "entries",
                    "period": 4,
                    **options,
                }
            )
            model = random_decoder(family, **CONFIGS.get(family, {}))
            compiled = compile_model(model, config, tokenizer=word_tokenizer())
            made[key] = Nested(compiled, compiled.to_runtime())
        return made[key]

    return make


def tokens(model: SiriusModel, mode: str, **options: object) -> list[tuple[int, ...]]:
    found = model.generate(PROMPTS, mode=mode, max_new_tokens=16, **options)  # type: ignore[arg-type]
    return list(found.tokens)


# laws


@pytest.mark.parametrize(("family", "method"), CASES)
def test_exact_mode_gives_the_nested_models_own_tokens(
    nested: Callable[..., Nested], family: str, method: str
) -> None:
    model = nested(family, method).model
    wanted = tokens(model, "full")
    assert tokens(model, "exact", period=4) == wanted
    assert tokens(model, "exact", period=3, tree_width=3) == wanted


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_threshold_of_zero_accepts_every_draft(
    nested: Callable[..., Nested], family: str, method: str
) -> None:
    options = {"threshold": 0.0, "period": 4, "max_new_tokens": 13, "eos_token_id": []}
    stats = nested(family, method).model.generate(PROMPTS, mode="sirius", **options).stats  # type: ignore[arg-type]
    assert stats.acceptance_rate == 1.0
    assert stats.corrections == 0


def test_a_draft_that_reads_all_is_the_full_path(nested: Callable[..., Nested]) -> None:
    model = nested("llama", "topk", keep=1.0, draft_bits=8).model
    stats = model.generate(
        PROMPTS, mode="exact", period=4, max_new_tokens=17, eos_token_id=[]
    ).stats
    assert stats.density == pytest.approx(1.0)
    assert set(stats.advances) == {4}


def test_the_draft_is_another_model_and_a_good_one(nested: Callable[..., Nested]) -> None:
    """With half of the bits, most tokens agree, and some logits differ."""
    model = nested("llama", "none").model
    ids = torch.tensor([PROMPTS[1]])
    inputs = {
        "input_ids": ids,
        "positions": torch.arange(5)[None],
        "slots": torch.arange(5)[None],
        "length": torch.zeros(1, dtype=torch.int64),
        "tree_mask": (torch.arange(5)[:, None] - torch.arange(5)).clamp(min=-1)[None],
    }
    state = model.program.state
    logits = []
    for entry in ("full", "sparse"):
        caches = {
            f"{name}_cache": torch.zeros(state.layers, 1, state.kv_heads, 64, dim)
            for name, dim in (("k", state.key_dim), ("v", state.value_dim))
        }
        logits.append(model.backend.run(entry, inputs | caches)["logits"])
    full, sparse = logits
    assert not torch.equal(full, sparse)
    assert torch.cosine_similarity(full, sparse, dim=-1).mean() > 0.9


@pytest.mark.parametrize("family", gate_but(("llama", "mixtral"), {"llama"}))
def test_the_nested_model_is_near_the_model(nested: Callable[..., Nested], family: str) -> None:
    compiled = nested(family, "topk").compiled
    reference = random_decoder(family, **CONFIGS.get(family, {}))
    for name, parameter in reference.named_parameters():
        (spec,) = (weight for weight in compiled.spec.weights if weight.name == name)
        router = name.endswith("mlp.gate.weight")
        assert (spec.nested is not None) == (parameter.ndim >= 2 and not router)
        if spec.nested is not None:
            planes = compiled.weights(spec)
            experts = planes.unbind(1) if spec.of_experts else [planes]
            values = torch.stack([unnest(expert) for expert in experts]).view_as(parameter)
            error = (values - parameter).abs().max() / parameter.abs().max()
            assert error < 1 / 254 + 1e-3


# storage


def test_both_paths_read_the_one_copy(nested: Callable[..., Nested]) -> None:
    model = nested("llama", "topk").model
    paths = [bound_weights(model, entry) for entry in ("sparse", "full", "prefill")]
    stored = {weight.untyped_storage().data_ptr() for weight in model.backend.weights.values()}  # type: ignore[attr-defined]
    for path in paths:
        read = [weight for weight in path.values() if weight.dtype is torch.uint8]
        assert len(read) >= 10
        assert {weight.untyped_storage().data_ptr() for weight in read} <= stored


def test_an_artifact_of_nested_weights(nested: Callable[..., Nested], tmp_path: Path) -> None:
    own = nested("llama", "topk")
    path = own.compiled.save(tmp_path / "nested.sirius")
    with Artifact.open(path) as artifact:
        assert artifact.manifest.format_version == NESTED_FORMAT_VERSION
        assert artifact.program.weights == own.compiled.spec.weights
        assert artifact.program.sparsity == own.compiled.spec.sparsity
        stored = sum(r.size for n, r in artifact.manifest.files.items() if n.startswith("weights/"))
    # 17 bytes for 16 numbers, where float32 has 64; vectors and headers are small.
    numbers = own.compiled.spec.model.parameters
    assert stored < 1.4 * numbers
    assert verify(path).outcome is Outcome.EQUAL
    model = load(path)
    assert tokens(model, "sirius") == tokens(own.model, "sirius")
    for dtype in ("bfloat16", "float16"):  # what is computed in; the weights stay
        other = load(path, dtype=dtype)
        assert len(tokens(other, "full")[0]) == len(tokens(own.model, "full")[0])
    plain = compile_model(random_decoder("llama"), CompileConfig(sparsity="none", graphs="entries"))
    with Artifact.open(plain.save(tmp_path / "plain.sirius")) as artifact:
        assert artifact.manifest.format_version == FORMAT_VERSION


def test_parameters_are_counted_as_numbers(nested: Callable[..., Nested]) -> None:
    spec = nested("llama", "topk").compiled.spec
    count = sum(p.numel() for p in random_decoder("llama").parameters())
    assert spec.model.parameters == count
    matrices = sum(weight.numbers for weight in spec.weights if weight.nested)
    assert spec.weight_bytes(4) == matrices * 17 // 16 + (count - matrices) * 4
    stats = nested("llama", "topk").model.generate([7, 8], max_new_tokens=4).stats
    assert stats.weight_bytes == spec.weight_bytes(4)


@pytest.mark.slow  # building the graph takes most of it
def test_a_period_is_one_graph_of_nested_weights(tmp_path: Path) -> None:
    config = CompileConfig(sparsity="topk", weights="int8", period=4, graphs="torch")
    compiled = compile_model(random_decoder("llama"), config, tokenizer=word_tokenizer())
    entries, whole = compiled.to_runtime(), compiled.to_runtime(backend="period")
    for mode in ("sirius", "exact"):
        assert tokens(whole, mode) == tokens(entries, mode)


def test_weights_that_stay_are_told(nested: Callable[..., Nested]) -> None:
    compiled = nested("mixtral", "topk").compiled
    (warning,) = (w for w in compiled.warnings if "--weights int8" in w)
    assert warning == (
        "--weights int8 leaves 2 of 16 matrices as they are: 2 "
        "(model.layers.0.mlp.gate.weight: it routes tokens to experts)"
    )


def test_experts_count_as_bytes(nested: Callable[..., Nested]) -> None:
    """A token reads three of six experts; its share of bfloat16's bytes is that of all weights."""
    spec = nested("mixtral", "topk").compiled.spec
    experts = sum(w.numbers for w in spec.weights if w.of_experts)
    others = sum(size_of(w) for w in spec.weights if w.parameter and not w.of_experts)
    assert spec.sparsity.step == others + experts // 2 * 17 // 16
    wide = sum(2 * w.numbers for w in spec.weights if w.parameter) - experts
    assert share_of_bfloat16(spec) == pytest.approx(spec.sparsity.step / wide)
    assert spec.sparsity.density < 0.45


# what the compiler measures


def measured(method: str, **options: object) -> AcceptanceSpec:
    """The measured drafts of a tiny model with nested weights."""
    own = chooser(method, text=samples(20, 48), measure=True, weights="int8", **options)
    found = own.choose().acceptance
    assert found is not None
    return found


@pytest.mark.gate
def test_drafts_of_half_of_the_bits_are_measured() -> None:
    """Also for a model whose sparse path skips nothing."""
    found = measured("none")
    assert found.density == pytest.approx(0.55, abs=0.05)  # embeddings are read in full
    assert 0.5 < found.agreement < 1.0
    assert 1.5 < found.best.aal < found.best.period


def test_drafts_are_judged_by_the_nested_full_path() -> None:
    """With all bits and all neurons, each draft token is the full path's."""
    found = measured("topk", keep=1.0, draft_bits=8)
    assert (found.density, found.agreement) == (1.0, 1.0)
    assert set(found.accepted) == {1.0}


@pytest.mark.gate
def test_calibration_and_measurement_go_together() -> None:
    found, whole = measured("teal"), measured("teal", draft_bits=8)
    assert found.density < 0.6 * whole.density
    assert found.agreement < whole.agreement


@pytest.mark.slow  # by hand in `test_passes_nest_weights`
def test_a_density_counts_the_bits(nested: Callable[..., Nested]) -> None:
    spec = nested("llama", "griffin", density=0.4).compiled.spec
    assert spec.sparsity.density == pytest.approx(0.4, abs=0.01)
    with pytest.raises(ConfigError, match=r"--density 0.1 can't be reached"):
        nested("llama", "griffin", density=0.1)


# what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"draft_bits": 4}, "--draft-bits 4 applies to nested weights only: add --weights int8"),
        ({"weights": "int8", "draft_bits": 5}, "--draft-bits must be 4 or 8, got 5"),
        ({"weights": "int4"}, "--weights must be one of dtype, int8, got 'int4'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CompileConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["inductor", "aoti", "cudagraph"])
def test_back_ends_that_read_no_nested_weights_say_so(
    nested: Callable[..., Nested], backend: str
) -> None:
    with pytest.raises(BackendError, match=f"backend {backend} does not read nested weights"):
        nested("llama", "topk").compiled.to_runtime(backend=backend)


def test_devices_that_read_no_nested_weights_say_so(nested: Callable[..., Nested]) -> None:
    with pytest.raises(BackendError, match="on the CPU and on CUDA GPUs, not on device meta"):
        make_backend(
            "eager",
            nested("llama", "topk").compiled.spec,
            lambda name: None,
            {},
            dtype=torch.float32,
            device=torch.device("meta"),
        )


def test_the_manifest_of_a_nested_weight_that_is_none_is_refused(
    nested: Callable[..., Nested],
) -> None:
    program = nested("llama", "topk").compiled.spec
    check_program(program)
    first = next(weight for weight in program.weights if weight.nested is Layout.BY_OUTPUTS)
    for wrong in (
        replace(first, dtype="int8"),
        replace(first, shape=first.shape[1:]),
        replace(first, shape=(1, *first.shape[1:])),
        replace(first, shape=(*first.shape[:2], 35)),
        replace(first, nested=Layout.BY_INPUTS),
        replace(first, retype=True),
    ):
        others = tuple(w for w in program.weights if w is not first)
        with pytest.raises(ArtifactError, match=f"weight {first.name!r} is nested by"):
            check_program(replace(program, weights=(wrong, *others)))
    bits = replace(program.sparsity, draft_bits=3)
    with pytest.raises(ArtifactError, match=r"sparsity\.draft_bits must be 4 or 8, found 3"):
        check_program(replace(program, sparsity=bits))
