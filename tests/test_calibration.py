"""Calibration: thresholds as quantiles, checked on held-out text; shares and ranking of layers."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sirius_compile.allocation import LEAST_KEPT, _allocate_layer
from sirius_compile.calibration import Calibration, calibrate
from sirius_compile.pipeline import Thresholds
from sirius_compile.quantiles import QuantileSketch
from sirius_compile.ranking import texts_of
from sirius_compile.texts import Sample, hold_out, windows
from sirius_compile.tokenwise import Tokenwise
from sirius_compile.writing import write
from sirius_passes.sparsify import KEEP_ALL, Threshold
from sirius_runtime.errors import CalibrationError
from sirius_runtime.operators import OPERATORS
from sirius_runtime.spec import Method, SiteSpec
from tests.support.fast import slow_but
from tests.support.models import MAX_SEQ_LEN, METHODS, random_decoder, word_tokenizer
from tests.support.paths import chooser, held_out, samples, tokenwise

ALL = Thresholds((Threshold(0.3, 0.5),) * 2, (Threshold(0.4, 0.5),) * 14)
OF = {
    Method.TOPK: None,
    Method.GRIFFIN: None,
    Method.CATS: Thresholds(ALL.neurons),
    Method.TEAL: Thresholds((), ALL.channels),
    Method.GRIFFIN_TEAL: Thresholds(ALL.neurons, ALL.channels[:8]),
}


# quantiles


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_a_quantile_is_within_a_bin_of_the_sorted_one(values: list[float], share: float) -> None:
    sketch = QuantileSketch()
    for part in (values[::2], values[1::2]):
        sketch.add(0, torch.tensor(part))
    found = sketch.quantile(0, share)
    wanted = sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
    assert wanted * (1 - 2**-20) <= found <= wanted * (1 + 2**-8) + 1e-38
    above = sum(value > found for value in values) / len(values)
    assert sketch.share_above(0, found) == pytest.approx(above)
    assert sketch.share_above(0, KEEP_ALL) == 1.0


# the tokenwise path


@pytest.mark.parametrize("method", OF)
def test_a_text_at_once_equals_token_by_token(method: Method) -> None:
    path = tokenwise(method, thresholds=OF[method])
    ids = torch.tensor([sample.tokens for sample in samples(2, 14)])
    neurons = path.neurons(ids[:, :6].tolist())
    assert (neurons is not None) == method.per_prompt
    found = path.sparse(ids, neurons)
    torch.testing.assert_close(found, stepwise(path, ids, neurons), rtol=1e-4, atol=1e-4)
    # It is sparse: the full path says otherwise.
    assert (found - path.full(ids)).abs().max() > 0.1


def stepwise(path: Tokenwise, ids: Tensor, neurons: Tensor | None) -> Tensor:
    """The sparse entry's logits, with one token in each call."""
    rows, tokens = ids.shape
    inputs = path._inputs(ids, neurons)
    logits = []
    for index in range(tokens):
        now = {
            "input_ids": ids[:, index : index + 1],
            "positions": torch.full((rows, 1), index),
            "slots": torch.full((rows, 1), index),
            "length": torch.full((rows,), index),
            "tree_mask": torch.zeros(1, 1, 1, dtype=torch.int64),
        }
        entry = path.backend._entries["sparse"]
        logits.append(entry.module(*entry.arguments(inputs | now))[0])
    return torch.cat(logits, 1)


def test_an_operator_without_a_row_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether its tokens share a selection is unknown; a guess could silently change results."""
    monkeypatch.delitem(OPERATORS, "topk_mlp")
    with pytest.raises(CalibrationError, match=r"does not know sirius\.topk_mlp, which \w+ calls"):
        tokenwise(Method.TOPK)


def test_scores_are_what_a_threshold_is_compared_with() -> None:
    """The counts from the scores equal the operators' counts."""
    for method in (Method.CATS, Method.TEAL, Method.GRIFFIN_TEAL):
        path = tokenwise(method, thresholds=OF[method])
        (sample,) = samples(1, 20)
        ids = torch.tensor([sample.tokens])
        neurons = path.neurons(ids[:, :8].tolist())
        counts: dict[int, int] = {}
        thresholds = [site.threshold for site in path.spec.sparsity.counted]

        def look(site: int, scores: Tensor, counts: dict[int, int] = counts) -> None:
            counts[site] = int((scores > thresholds[site]).sum())  # noqa: B023

        entry = path.backend._entries["sparse"]
        path.sparse(ids, neurons, look)
        inputs = path._inputs(ids, neurons)
        kept = torch.zeros(len(thresholds), dtype=torch.int64)
        for index in range(20):
            now = {
                "input_ids": ids[:, index : index + 1],
                "positions": torch.full((1, 1), index),
                "slots": torch.full((1, 1), index),
                "length": torch.full((1,), index),
                "tree_mask": torch.zeros(1, 1, 1, dtype=torch.int64),
            }
            kept += entry.module(*entry.arguments(inputs | now))[-1][:, 0]
        assert [counts[site] for site in range(len(thresholds))] == kept.tolist(), method


# thresholds

RELU = {"mlp_bias": True, "hidden_act": "relu"}


@pytest.mark.parametrize(
    ("method", "keep"),
    slow_but(
        product((Method.CATS, Method.TEAL, Method.GRIFFIN_TEAL), (0.5, 0.2)),
        {(Method.CATS, 0.5)},
        {(Method.GRIFFIN_TEAL, 0.5)},
    ),
)
def test_what_is_asked_for_is_kept_of_text_held_out(method: Method, keep: float) -> None:
    text = samples(64, 64)  # random tokens: a quarter of few is not like the rest
    found = calibrate(tokenwise(method, keep), *held_out(text), keep)
    assert (found.tokens, found.held_out) == (48 * 64, 16 * 64)
    for site in found.sites:
        assert site.reached == pytest.approx(site.target, abs=0.05)
    for layer in (0, 1):
        assert kept_of(found, tokenwise(method, keep), layer) == pytest.approx(keep, abs=1e-6)


def kept_of(found: Calibration, path: Tokenwise, layer: int) -> float:
    """The share of a layer's weights that its sites should keep."""
    sites = path.spec.sparsity.counted
    pairs = [(s, f) for s, f in zip(sites, found.sites, strict=True) if s.layer == layer]
    weights = [site.units * site.params for site, _ in pairs]
    return sum(w * f.target for w, (_, f) in zip(weights, pairs, strict=True)) / sum(weights)


def test_a_calibration_of_some_layers() -> None:
    found = calibrate(tokenwise(Method.GRIFFIN_TEAL), *held_out(samples()), 0.5)
    first = found.only([0])
    assert {site.layer for site in first.sites} == {0}
    assert (len(first.thresholds.neurons), len(first.thresholds.channels)) == (1, 4)
    assert (len(found.thresholds.neurons), len(found.thresholds.channels)) == (2, 8)


def test_too_little_text_is_refused() -> None:
    for text in ([], samples(1, 1), samples(1, 63)):
        tokens = sum(map(len, text))
        with pytest.raises(CalibrationError, match=rf"has {tokens} tokens, but at least 64"):
            calibrate(tokenwise(Method.CATS), *held_out(text), 0.5)


def test_activations_that_are_not_finite_are_refused() -> None:
    model = random_decoder("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 4] = float("nan")
    with pytest.raises(CalibrationError, match="activations are not finite"):
        calibrate(tokenwise(Method.CATS, model=model), *held_out(samples()), 0.5)


@pytest.mark.gate
def test_constant_activations_are_refused_by_name() -> None:
    model = random_decoder("llama", **RELU)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight.zero_()
        mlp.gate_proj.bias.fill_(2.0)
    message = r"layer 1, model.layers.1.mlp.gate_proj.weight: no threshold keeps 50% .* keeps 0%"
    with pytest.raises(CalibrationError, match=message):
        calibrate(tokenwise(Method.CATS, model=model), *held_out(samples()), 0.5)


def test_zeros_of_relu_are_dropped_whatever_their_share() -> None:
    model = random_decoder("llama", **RELU)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
    path = tokenwise(Method.CATS, 0.9, model=model)
    found = calibrate(path, *held_out(samples()), 0.9)
    assert all(0.3 < site.reached < 0.7 for site in found.sites)
    # Nothing is lost by it.
    ids = torch.tensor([samples(1)[0].tokens])
    sparse = tokenwise(Method.CATS, 0.9, found.thresholds, model).sparse(ids, None)
    torch.testing.assert_close(sparse, path.full(ids), rtol=1e-4, atol=1e-4)


def test_a_quarter_of_the_text_is_held_out() -> None:
    used, held = hold_out(samples(8, 40))
    assert (len(used), len(held)) == (6, 2)
    (one,), (rest,) = hold_out([Sample(tuple(range(100)), 90)])
    assert (one, rest) == (Sample(tuple(range(75)), 75), Sample(tuple(range(75, 100)), 12))


# shares of a layer's linears


class Layer:
    """A layer in which each site adds an error of its `cost` times its sparsity."""

    def __init__(self, costs: list[float]) -> None:
        self.costs, self.sites = costs, list(range(len(costs)))
        self.output = torch.zeros(len(costs))

    def run(self, site: int, threshold: float) -> Tensor:
        # A sketch of the numbers 0..1: a threshold is the sparsity.
        output = self.output.clone()
        output[site] = self.costs[site] * threshold
        return output

    def set(self, site: int, threshold: float) -> None:
        self.output = self.run(site, threshold)


def allocate(costs: list[float], units: list[int], keep: float) -> dict[int, float]:
    sketch = QuantileSketch()
    sites = []
    for index, count in enumerate(units):
        sketch.add(index, torch.linspace(0, 1, 5001))
        sites.append(SiteSpec(0, f"w{index}", count, count, 3, -1.0, counted=True))
    return _allocate_layer(Layer(costs), sites, sketch, keep)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=5),
    st.floats(LEAST_KEPT, 1.0),
)
def test_a_layer_keeps_what_was_asked(sites: list[tuple[float, int]], keep: float) -> None:
    costs, units = map(list, zip(*sites, strict=True))
    found = allocate(costs, units, keep)
    kept = sum(found[i] * units[i] for i in found) / sum(units)
    assert kept == pytest.approx(keep, abs=1e-6)
    assert all(LEAST_KEPT - 1e-9 <= share <= 1.0 for share in found.values())


def test_the_harmless_linear_is_made_sparse_first() -> None:
    found = allocate([1.0, 0.0, 1.0], [10, 10, 10], keep=0.7)
    assert found == {0: 1.0, 1: pytest.approx(0.1), 2: 1.0}


def test_equals_share_alike() -> None:
    found = allocate([1.0, 1.0], [10, 10], keep=0.5)
    assert found[0] == pytest.approx(0.5, abs=0.051)


def test_a_step_is_the_same_number_of_weights() -> None:
    """One step takes a larger share of the small linear's channels, so it costs more there."""
    found = allocate([1.0, 1.0], [30, 10], keep=0.8)
    assert found[1] == pytest.approx(1.0)
    assert found[0] == pytest.approx(1 - 0.2 * 40 / 30)


# layers


@pytest.mark.parametrize(
    "method", slow_but((Method.TOPK, Method.GRIFFIN, Method.CATS), (), {Method.GRIFFIN})
)
def test_the_layer_that_costs_nothing_ranks_last(method: Method) -> None:
    model = random_decoder("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    own = chooser(method, model=model, text=samples(), keep=0.3, dense_layers="auto:1")
    chosen = own.choose()
    assert chosen.ranking[-1].layer == 1
    assert chosen.ranking[-1].agreement == pytest.approx(1.0, abs=1e-6)
    assert chosen.ranking[0].agreement < 0.99
    assert chosen.dense_layers == (chosen.ranking[0].layer,)
    agreements = [one.agreement for one in chosen.ranking]
    assert agreements == sorted(agreements)
    if chosen.calibration is not None:
        assert chosen.dense_layers[0] not in {s.layer for s in chosen.calibration.sites}


@pytest.mark.parametrize("method", slow_but((*METHODS[:-1], "experts"), {"griffin+teal"}))
def test_a_ranking_is_that_of_programs_with_one_sparse_layer(method: str) -> None:
    """The reference: one program for each layer, and both paths run in full."""
    family = "mixtral" if method == "experts" else "llama"
    text = samples()
    own = chooser(method, model=random_decoder(family, num_hidden_layers=3), text=text)
    calibration = None
    if own._method.has_thresholds:
        calibration = calibrate(own._path(own._try(0.3, (), None)), *held_out(text), 0.3)
    agreements = {}
    for layer in range(3):
        thresholds = None if calibration is None else calibration.only([layer]).thresholds
        others = [other for other in range(3) if other != layer]
        path = own._path(own._try(0.3, others, thresholds))
        overlaps = []
        for sample in text:
            ids = torch.tensor([sample.tokens])
            neurons = path.neurons([sample.tokens[: sample.prompt]])
            both = [
                logits[0, sample.prompt :].softmax(-1)
                for logits in (path.full(ids), path.sparse(ids, neurons))
            ]
            overlaps.append(torch.minimum(*both).sum(-1))
        agreements[layer] = float(torch.cat(overlaps).mean())
    found = own._rank(0.3, calibration, text)
    # Dense layers of the reference store weights by outputs: float32 sums in another order.
    assert {one.layer: one.agreement for one in found} == pytest.approx(agreements, rel=1e-6)
    assert min(agreements.values()) < 0.99


def test_deep_models_are_ranked_on_fewer_texts() -> None:
    assert [texts_of(layers) for layers in (1, 32, 33, 80, 1000)] == [8, 8, 7, 3, 2]


@pytest.mark.gate
def test_a_density_with_layers_chosen() -> None:
    own = chooser(
        Method.TEAL, text=samples(), density=0.75, dense_layers="auto:1",
        model=random_decoder("llama", num_hidden_layers=3),
    )  # fmt: skip
    chosen = own.choose()
    program = own._try(chosen.keep, chosen.dense_layers, chosen.calibration.thresholds)
    assert program.sparsity.density == pytest.approx(0.75, abs=1e-3)


@pytest.mark.gate
def test_no_text_is_longer_than_the_model_s_longest_sequence() -> None:
    """GPT-2 has a table of positions, which has no entry beyond its end."""
    tokenizer = word_tokenizer().backend_tokenizer
    text = " ".join(f"w{6 + i % 90}" for i in range(300))
    assert {len(sample) for sample in windows([text], tokenizer, MAX_SEQ_LEN)} == {128, 44}
    path = tokenwise(Method.CATS, model=random_decoder("gpt2", n_inner=96))
    used, held = write(path, [range(6, 90), [7, 8]] * 2)
    assert max(len(sample) for sample in (*used.samples, *held.samples)) <= MAX_SEQ_LEN
