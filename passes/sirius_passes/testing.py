"""Checks one pass over one program: the promises of every pass, and that its meaning is kept.

    def test_my_pass() -> None:
        program = ...  # for instance sirius_compile.capture.capture(config).program
        check = check_pass(program, MyPass(), expect={"aten.silu": (2, 0), "my.op": (0, 2)})
        assert check.rewrites == 2
        assert snapshot(program.graphs["dense"]) == EXPECTED

Numbers are compared by running both programs, in float32 on the CPU, over the same random weights
and the same three calls: two ragged prompts, a chain of tokens after each, then a tree of tokens.
Shape letters as in `sirius_runtime.ops`.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sirius_passes.manager import Pass, run_passes
from sirius_passes.printer import print_graph, target_name
from sirius_passes.program import (
    DENSE,
    ORIGIN,
    OUTPUTS,
    PREFILL,
    Program,
    Stage,
    calls,
    copy_graph,
    fake_mode,
)
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import PassError, UnsupportedModelError
from sirius_runtime.graph import INPUT, WEIGHT, from_document, placeholders, to_document

Tensors = Mapping[str, Tensor]

Reference = Callable[[str, fx.GraphModule, Tensors, Tensors], Tensors]
"""Expected outputs of a graph: called with the graph's name, the graph before the pass, its named
inputs and weights. As the graph would, it writes the caches among the inputs in place."""

_KNOWN = "check_pass"  # key of a node's meta while a pass is watched: the node was there before


@dataclass(frozen=True)
class PassCheck:
    """What `check_pass` saw.

    `before` and `after`: how often each graph calls each operator, spelled as `snapshot` does.
    `differences`: the largest absolute difference of each output, by ``graph.output``.
    """

    rewrites: int
    before: dict[str, Counter[str]]
    after: dict[str, Counter[str]]
    differences: dict[str, float]


def check_pass(
    program: Program,
    step: Pass,
    *,
    reference: Reference | None = None,
    expect: Mapping[str, tuple[int, int]] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    seed: int = 0,
) -> PassCheck:
    """Runs `step` over `program`, in place, and checks it; raises AssertionError saying what failed.

    * Stage: the program is at the one that the pass takes, and what comes out passes the verifier.
    * Counts: `expect` maps an operator to its calls before and after, over all graphs
      (``"sirius.gated_mlp"``) or in one (``"sparse/sirius.gated_mlp"``).
    * Metadata: every node's ``meta["val"]`` agrees in shape and dtype with a recomputation; every
      new node has ``meta["origin"]``.
    * Numbers: an output that a graph had before, and has now, is equal within `rtol` and `atol`.
      A graph that is new is held against `dense` before. `reference` gives the expected outputs of
      every graph instead, for a pass that changes what is computed.
    * Count of rewrites: zero if and only if the program is unchanged.
    * Re-run: run again on its own output, the pass changes nothing, and returns 0 or refuses with
      UnsupportedModelError, whether or not the manager would let it run at that stage.

    A refusal (UserError) of the first run passes through.
    """
    old = _copy(program)
    old.drop_unused_weights()
    with_marks = [node for module in program.graphs.values() for node in module.graph.nodes]
    for node in with_marks:
        node.meta[_KNOWN] = True
    try:
        (record,) = run_passes(program, [step])
        _check_metadata(program)
    except PassError as error:
        raise AssertionError(str(error)) from error
    finally:
        for module in program.graphs.values():
            for node in module.graph.nodes:
                node.meta.pop(_KNOWN, None)
    before, after = _counts(old), _counts(program)
    _check_counts(before, after, expect or {})
    changed = _text(old) != _text(program)
    assert changed == (record.rewrites > 0), (
        f"{step.name} reports {record.rewrites} rewrites, "
        f"but the program is {'changed' if changed else 'as before'}"
    )
    differences = _compare(old, program, reference, rtol, atol, seed)
    _check_rerun(program, step)
    return PassCheck(record.rewrites, before, after, differences)


def snapshot(module: fx.GraphModule) -> str:
    """The graph as text, the same on every run and machine: for an inline snapshot in a test."""
    return print_graph(module)


def run_graph(
    module: fx.GraphModule,
    inputs: Tensors,
    weights: Tensors,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Runs one graph of a program on the CPU, computing in `dtype`; returns its named outputs.

    `inputs` and `weights` hold at least what the graph reads, in `dtype` where they follow the
    program's. Caches among the inputs are written in place.
    """
    return _runnable(module, dtype)(inputs, weights)


def random_weights(
    program: Program, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random values for the weight table, those that follow the program's dtype in `dtype`.

    A weight's values depend on its name, the seed and its shape in the checkpoint alone: however
    passes lay a weight out, it is the same matrix. Integer constants are zeros.
    """
    weights = {}
    for name, spec in program.weights.items():
        shape = spec.shape[::-1] if spec.transposed else spec.shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        value = torch.rand(shape, generator=generator)
        if len(shape) > 1:
            value = (2 * value - 1) * math.sqrt(3 / shape[-1])  # keeps the scale of what it maps
        else:
            value = value + 0.5
        value = value.t().contiguous() if spec.transposed else value
        stored = dtype if spec.retype else dtype_of(spec.dtype)
        weights[name] = (
            value.to(stored) if stored.is_floating_point else torch.zeros_like(value, dtype=stored)
        )
    return weights


def _copy(program: Program) -> Program:
    graphs = {name: copy_graph(module) for name, module in program.graphs.items()}
    return replace(program, graphs=graphs, weights=dict(program.weights))


def _text(program: Program) -> tuple[object, ...]:
    graphs = {name: print_graph(module) for name, module in program.graphs.items()}
    return graphs, program.weights, program.sparsity


def _counts(program: Program) -> dict[str, Counter[str]]:
    return {
        name: Counter(target_name(n) for n in module.graph.nodes if n.op == "call_function")
        for name, module in program.graphs.items()
    }


def _check_counts(
    before: Mapping[str, Counter[str]],
    after: Mapping[str, Counter[str]],
    expect: Mapping[str, tuple[int, int]],
) -> None:
    for key, expected in expect.items():
        graph, _, operator = key.rpartition("/")
        found = tuple(
            sum(count[operator] for name, count in counts.items() if graph in ("", name))
            for counts in (before, after)
        )
        assert found == expected, (
            f"{key}: {found[0]} calls before and {found[1]} after, "
            f"expected {expected[0]} and {expected[1]}"
        )


def _check_rerun(program: Program, step: Pass) -> None:
    text = _text(program)
    try:
        rewrites = step.run(program)
    except UnsupportedModelError:
        rewrites = 0
    assert rewrites == 0, f"{step.name}, run again on its own output, made {rewrites} rewrites"
    assert _text(program) == text, f"{step.name}, run again on its own output, changed it"


def _check_metadata(program: Program) -> None:
    for name, module in program.graphs.items():
        mode = fake_mode(module.graph)
        for node in module.graph.nodes:
            where = f"graph {name!r}, {node.format_node()}"
            if node.op == "output":
                continue
            assert _KNOWN in node.meta or ORIGIN in node.meta, (
                f"{where}: a new node without meta[{ORIGIN!r}]; make nodes with program.call"
            )
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                with mode:
                    value = node.target(*args, **kwargs)
                assert _alike(node.meta["val"], value), (
                    f"{where}: meta['val'] is {node.meta['val']}, recomputed it is {value}"
                )


def _alike(recorded: Any, value: Any) -> bool:
    """Whether two fake values have one structure, with equal shapes and dtypes."""
    if isinstance(recorded, Tensor):
        return (
            isinstance(value, Tensor)
            and recorded.dtype is value.dtype
            and len(recorded.shape) == len(value.shape)
            and all(map(_alike, recorded.shape, value.shape))
        )
    if isinstance(recorded, tuple | list):
        return (
            isinstance(value, tuple | list)
            and len(recorded) == len(value)
            and all(map(_alike, recorded, value))
        )
    return bool(statically_known_true(recorded == value))


@dataclass(frozen=True)
class _Call:
    """One call of a graph: a block of tokens [B, T] after the committed `history` of each row.

    `distance` [T, T]: a token's depth minus that of the tokens it sees, -1 for those it does not.
    `valid` [B, T]: the tokens that are no padding.
    """

    history: tuple[Tensor, ...]
    tokens: Tensor
    distance: Tensor
    valid: Tensor

    @property
    def last(self) -> Tensor:
        """The index [B] of each row's last valid token."""
        return self.valid.sum(1) - 1

    def inputs(self) -> dict[str, Tensor]:
        """The inputs that a cached graph may read, but for the state."""
        length = torch.tensor([len(tokens) for tokens in self.history])
        return {
            "input_ids": self.tokens,
            "positions": length[:, None] + self.distance[:, 0],
            "slots": length[:, None] + torch.arange(self.tokens.shape[1]),
            "length": length,
            "tree_mask": self.distance[None],
            "last": self.last,
            "valid": self.valid,
        }

    def path(self, row: int, token: int) -> Tensor:
        """The tokens that lead to one of the block, itself included."""
        seen = [int(i) for i in (self.distance[token] >= 0).nonzero()]
        seen.sort(key=lambda i: -int(self.distance[token, i]))
        return torch.cat([self.history[row], self.tokens[row, seen]])


_LENGTHS = (4, 2)  # tokens of the two prompts
_CHAIN = 3
_TREE = ((0, -1, -1, -1), (1, 0, -1, -1), (1, -1, 0, -1), (2, -1, 1, 0))  # 0 ── 1, 0 ── 2 ── 3
_CACHE_SLOTS = 16


def _calls(vocabulary: int, generator: torch.Generator) -> list[_Call]:
    rows, prompt = len(_LENGTHS), max(_LENGTHS)

    def tokens(count: int) -> Tensor:
        return torch.randint(vocabulary, (rows, count), generator=generator)

    def chain(count: int) -> Tensor:
        index = torch.arange(count)
        return (index[:, None] - index).clamp(min=-1)

    prompts, drafts, tree = tokens(prompt), tokens(_CHAIN), tokens(len(_TREE))
    after_prompt = tuple(prompts[row, :length] for row, length in enumerate(_LENGTHS))
    after_draft = tuple(map(torch.cat, zip(after_prompt, drafts, strict=True)))
    nothing = tuple(prompts[:, :0])
    valid = torch.arange(prompt) < torch.tensor(_LENGTHS)[:, None]
    return [
        _Call(nothing, prompts, chain(prompt), valid),
        _Call(after_prompt, drafts, chain(_CHAIN), torch.ones_like(drafts).bool()),
        _Call(after_draft, tree, torch.tensor(_TREE), torch.ones_like(tree).bool()),
    ]


class _Subject:
    """A graph with its weights and its own state, called as the runtime would call it."""

    def __init__(
        self,
        program: Program,
        module: fx.GraphModule,
        evaluate: Callable[[Tensors, Tensors], Tensors],
        seed: int,
    ) -> None:
        self._program, self._evaluate = program, evaluate
        self._wanted = set(placeholders(module.graph, INPUT))
        self._weights = random_weights(program, seed)
        self._state = _state(program, torch.Generator().manual_seed(seed))

    def __call__(self, call: _Call) -> Tensors:
        if self._program.stage < Stage.CACHED:
            return self._by_paths(call)
        known = call.inputs() | self._state
        assert self._wanted <= known.keys(), (
            f"check_pass has no values for the inputs {sorted(self._wanted - known.keys())}"
        )
        return self._evaluate({name: known[name] for name in self._wanted}, self._weights)

    def _by_paths(self, call: _Call) -> Tensors:
        """What a graph without a cache gives for each token: that of the path to it, run alone."""
        rows, tokens = call.tokens.shape
        logits = []
        for row in range(rows):
            for token in range(tokens):
                path = call.path(row, token)[None]
                inputs = {"input_ids": path, "positions": torch.arange(path.shape[1])[None]}
                logits.append(self._evaluate(inputs, self._weights)["logits"][0, -1])
        return {"logits": torch.stack(logits).unflatten(0, (rows, tokens))}


def _state(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Caches full of what no query may see, and the neurons that griffin chose."""
    state, rows = program.state, len(_LENGTHS)
    shape = (state.layers, rows, state.kv_heads, _CACHE_SLOTS)
    values = {
        "k_cache": 9 * torch.randn(*shape, state.key_dim, generator=generator),
        "v_cache": 9 * torch.randn(*shape, state.value_dim, generator=generator),
    }
    chosen = [
        torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(rows)])
        for n, k in zip(program.sparsity.neurons, program.sparsity.kept, strict=True)
    ]
    if len({len(row) for rows_of_layer in chosen for row in rows_of_layer}) == 1:
        values["neurons"] = torch.stack(chosen)
    return values


def _compare(
    old: Program,
    new: Program,
    reference: Reference | None,
    rtol: float,
    atol: float,
    seed: int,
) -> dict[str, float]:
    """Runs both programs; returns the largest difference of each output that both have."""
    differences: dict[str, float] = {}
    for name, module in new.graphs.items():
        source = old.graphs.get(name) or old.graphs.get(DENSE)
        if source is None:
            continue
        expected_of = (
            _runnable(source, torch.float32)
            if reference is None
            else partial(reference, name, source)
        )
        expect = _Subject(replace(old, sparsity=new.sparsity), source, expected_of, seed)
        actual = _Subject(new, module, _runnable(module, torch.float32), seed)
        for index, call in enumerate(
            _calls(_vocabulary(source), torch.Generator().manual_seed(seed))
        ):
            for output, value, wanted in _common(actual(call), expect(call), reference is not None):
                if name == PREFILL and output == "logits" and wanted.shape[1] != value.shape[1]:
                    wanted = wanted[torch.arange(len(wanted)), call.last][:, None]
                where = f"{name}.{output}"
                torch.testing.assert_close(
                    value,
                    wanted,
                    rtol=rtol,
                    atol=atol,
                    msg=lambda text, where=where, index=index: f"{where}, call {index}: {text}",
                )
                difference = float((value.double() - wanted.double()).abs().max())
                differences[where] = max(differences.get(where, 0.0), difference)
    assert differences, "no output is there before and after the pass: there is nothing to compare"
    return differences


def _common(
    actual: Tensors, expected: Tensors, all_wanted: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    missing = expected.keys() - actual.keys()
    assert not (all_wanted and missing), (
        f"the reference gives {sorted(missing)}, the graph does not"
    )
    for output in actual.keys() & expected.keys():
        yield output, actual[output], expected[output]


def _vocabulary(module: fx.GraphModule) -> int:
    """How many tokens the graph embeds; a few where it does not embed by a table."""
    tokens = placeholders(module.graph, INPUT).get("input_ids")
    tables = [
        n for n in calls(module.graph, torch.ops.aten.embedding.default) if n.args[1] is tokens
    ]
    return min((int(n.args[0].meta["val"].shape[0]) for n in tables), default=8)  # type: ignore[union-attr]


def _runnable(
    module: fx.GraphModule, dtype: torch.dtype
) -> Callable[[Tensors, Tensors], dict[str, Tensor]]:
    """The graph as the runtime reads it: by way of its document."""
    graph = from_document(to_document(module), dtype, torch.device("cpu"))
    bound = [node.meta for node in graph.graph.nodes if node.op == "placeholder"]
    names = module.graph.output_node().meta[OUTPUTS]

    def run(inputs: Tensors, weights: Tensors) -> dict[str, Tensor]:
        arguments = [weights[m[WEIGHT]] if WEIGHT in m else inputs[m[INPUT]] for m in bound]
        with torch.no_grad():
            return dict(zip(names, graph(*arguments), strict=True))

    return run
