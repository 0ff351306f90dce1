"""Nested weights with ONNX Runtime: their bytes, products and tokens, and one copy of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from sirius_compile import CompileConfig
from sirius_compile.onnx.lower import make_model
from sirius_compile.onnx.nested import DOMAIN, Nested, embedding, product
from sirius_compile.onnx.package import check_nested
from sirius_compile.onnx.scope import Scope, Value, value_info
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from sirius_runtime.nested import Layout, integers, nest, nested_shape
from sirius_runtime.onnx_files import WEIGHTS_FILE, export_onnx
from sirius_runtime.onnx_nested import DRAFT_SCALE, HIGH, LOW, SCALE, part_name, part_of
from sirius_runtime.ops.linear import embedding as rows_of
from sirius_runtime.ops.linear import linear
from sirius_runtime.spec import Method, WeightSpec
from tests.support.families import CONFIGS
from tests.support.onnx import Pairs
from tests.support.operators import randn

O, C = 64, 608  # noqa: E741  (19 groups: not all of them lie in whole blocks of 16)
PARTS = (HIGH, LOW, SCALE, DRAFT_SCALE)


def spec_of(outputs: int, layout: Layout, experts: tuple[int, ...] = ()) -> WeightSpec:
    shape = nested_shape(outputs, C, layout, experts)
    return WeightSpec("w", "uint8", shape, retype=False, nested=layout)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("planes", [1, 2])
def test_parts_are_the_planes_in_another_order(layout: Layout, planes: int) -> None:
    """As ONNX Runtime documents it: an even input is in a byte's low half, for experts too."""
    matrices = [nest(randn(O, C, seed=seed) / 9, layout) for seed in (0, 1)]
    spec, bytes_of = spec_of(O, layout, (2,)), torch.stack(matrices, 1).numpy()
    high, low, scale, draft = (part_of(spec, bytes_of, part) for part in PARTS)
    for e, matrix in enumerate(matrices):
        q, step = (value.numpy() for value in integers(matrix[:planes]))
        code = np.stack([high[e] & 15, high[e] >> 4], -1).reshape(O, C).astype(int) * 16
        nibble = np.stack([low[e] & 15, low[e] >> 4], -1).reshape(O, C)
        assert np.array_equal(code + (nibble if planes == 2 else 8) - 128, q)
        assert np.array_equal((scale if planes == 2 else draft)[e].astype(np.float32), step)


def graph_of(value: Value, s: Scope) -> onnx.ModelProto:
    return make_model(s.graph("g", [value_info(s.returned(value, "y"))]))


def bound(model: onnx.ModelProto, spec: WeightSpec, planes: torch.Tensor) -> onnx.ModelProto:
    """The model with the weight's bytes in it."""
    arrays = {part_name("w", part): part_of(spec, planes.numpy(), part) for part in PARTS}
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name in arrays:
            own = onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name)
            model.graph.initializer[index].CopyFrom(own)
    onnx.checker.check_model(model, full_check=True)
    return model


def by_onnxruntime(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, inputs)[0])


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("high", [False, True])
def test_products(layout: Layout, high: bool) -> None:
    """With ONNX Runtime's kernel, and with the function for runtimes without the kernel."""
    planes, bias = nest(randn(O, C, seed=0) / 9, layout), randn(O, seed=2)
    s, spec = Scope(), spec_of(O, layout)
    weight = Nested.of(spec)
    if high:
        weight = weight.sliced(0, 0, 1)
    x = s.input("x", "float32", ("B", "T", C))
    model = bound(graph_of(product(s, x, weight), s), spec, planes)
    assert {f.domain for f in model.functions} == {DOMAIN}
    for tokens in (1, 3, 20):
        given = randn(2, tokens, C, seed=tokens)
        wanted = linear(given, planes[: 2 - high]).numpy()
        size = np.abs(wanted).max()
        assert np.abs(by_onnxruntime(model, x=given.numpy()) - wanted).max() <= 1e-5 * size
        if tokens == 3:
            (plain,) = ReferenceEvaluator(model).run(None, {"x": given.numpy()})
            assert np.abs(plain - wanted).max() <= 1e-5 * size
    biased = Scope()
    x = biased.input("x", "float32", ("B", "T", C))
    b = biased.input("b", "float32", (O,))
    model = bound(graph_of(product(biased, x, weight, b), biased), spec, planes)
    found = by_onnxruntime(model, x=given.numpy(), b=bias.numpy())
    assert np.abs(found - wanted - bias.numpy()).max() <= 1e-5 * size


@pytest.mark.parametrize("layout", Layout)
def test_parts_of_a_weights_outputs(layout: Layout) -> None:
    planes, s, spec = nest(randn(O, C, seed=0) / 9, layout), Scope(), spec_of(O, layout)
    by_outputs = layout is Layout.BY_OUTPUTS
    cut = (1, 32, 64) if by_outputs else (3, 16, 32)
    x = s.input("x", "float32", ("T", C))
    model = graph_of(product(s, x, Nested.of(spec).sliced(*cut)), s)
    given = randn(2, C, seed=1)
    wanted = linear(given, planes)[:, 32:].numpy()
    found = by_onnxruntime(bound(model, spec, planes), x=given.numpy())
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    with pytest.raises(
        NotImplementedError, match="w is sliced along other dimensions than outputs"
    ):
        Nested.of(spec).sliced(2 if by_outputs else 1, 0, 1)


def test_embeddings_are_equal_to_the_bit() -> None:
    planes, s = nest(randn(O, C, seed=0) / 9, Layout.BY_OUTPUTS), Scope()
    spec = spec_of(O, Layout.BY_OUTPUTS)
    ids = s.input("ids", "int64", ("B", "T"))
    model = bound(graph_of(embedding(s, Nested.of(spec), ids, "float32"), s), spec, planes)
    given = torch.tensor([[0, 63, 7], [7, 7, 31]])
    wanted = rows_of(planes, given, torch.float32).numpy()
    assert np.array_equal(by_onnxruntime(model, ids=given.numpy()), wanted)


# models


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("onnx-nested"), weights="int8")


MODELS = [
    pytest.param("llama", "topk", marks=pytest.mark.gate),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (
            ("phi3", "teal"),
            ("gpt2", "cats"),
            ("qwen2", "none"),
            ("mixtral", "none"),
            ("mixtral", "topk"),
            ("gpt_oss", "experts"),
        )
    ),
]


@pytest.mark.parametrize(("family", "method"), MODELS)
def test_tokens_are_eager_s(pairs: Pairs, family: str, method: str) -> None:
    pair = pairs(method, model_type=family, **CONFIGS.get(family, {}))
    for mode in ("exact", "sirius"):
        pair.agree([[7, 8, 9], [50, 30, 11]], mode=mode, period=4)
    full, exact = (
        pair.onnx.generate([[7, 8, 9]], mode=mode, max_new_tokens=24).tokens
        for mode in ("full", "exact")
    )
    assert full == exact


@pytest.mark.gate
def test_an_export_holds_one_copy(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("topk", model_type="llama")
    export_onnx(pair.path, tmp_path / "onnx")
    program = pair.torch.program
    nested = sum(w.numbers for w in program.weights if w.nested)
    plain = sum(4 * w.numbers for w in program.weights if not w.nested)
    size = (tmp_path / "onnx" / WEIGHTS_FILE).stat().st_size
    # 8 bits of a number, and two scales of 16 for 32 of them; the header.
    assert nested * 9 // 8 + plain < size < nested * 9 // 8 + plain + 2**14
    onnx.checker.check_model(str(tmp_path / "onnx" / "period.onnx"), full_check=False)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "full.onnx")
    assert {i.name for i in session.get_inputs()} >= {"input_ids", "k_cache"}


# what is refused


@pytest.mark.parametrize("method", [Method.GRIFFIN, Method.GRIFFIN_TEAL])
def test_a_prompts_neurons_are_refused_by_name(method: Method) -> None:
    with pytest.raises(
        ConfigError, match=r"--weights int8 with --sparsity .* have no ONNX translation"
    ):
        CompileConfig(weights="int8", graphs="both", sparsity=method)
    with pytest.raises(
        UnsupportedModelError,
        match=r"--sparsity .* with nested weights .* has no translation to ONNX",
    ):
        check_nested(True, method)
    check_nested(False, method)
