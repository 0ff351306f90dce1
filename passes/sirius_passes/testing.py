"""Checks one pass over one program: the rules that every pass must keep, and the numerics.

    def test_my_pass() -> None:
        program = ...  # for instance sirius_compile.capture.capture(config).program
        check = check_pass(program, MyPass(), expect={"aten.silu": (2, 0), "my.op": (0, 2)})
        assert check.rewrites == 2
        assert snapshot(program.graphs["dense"]) == EXPECTED

Numbers are compared by running both programs, in float32 on the CPU, over the same random weights
and calls (`sirius_passes.testing_runs`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
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
    FULL,
    OBSERVE,
    ORIGIN,
    PREFILL,
    Program,
    copy_program,
    fake_mode,
)
from sirius_passes.testing_runs import (
    Reference,
    Subject,
    make_calls,
    random_weights,
    run_graph,
    runnable,
)
from sirius_runtime.errors import PassError, UnsupportedModelError

__all__ = ["PassCheck", "Reference", "check_pass", "random_weights", "run_graph", "snapshot"]

_KNOWN = "check_pass"  # key of a node's meta during a check: the node existed before the pass


@dataclass(frozen=True)
class PassCheck:
    """What `check_pass` measured.

    `before` and `after`: how often each graph calls each operator, named as in `snapshot`.
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
    """Runs `step` over `program`, in place, and checks it; raises AssertionError on a failure.

    * Stage: the program is at the stage the pass takes, and the output passes the verifier.
    * Metadata: every node's ``meta["val"]`` agrees in shape and dtype with a recomputation; every
      new node has ``meta["origin"]``.
    * Counts: `expect` maps an operator to its calls before and after, over all graphs
      (``"sirius.dense_mlp"``) or in one (``"sparse/sirius.dense_mlp"``).
    * Rewrites: 0 is reported if and only if the program is unchanged.
    * Numbers: an output that a graph has before and after is equal within `rtol` and `atol`. A new
      graph is compared with the old `dense`. For a pass that changes what is computed, `reference`
      gives the expected outputs of every graph instead.
    * Re-run: run again on its own output, the pass changes nothing, and returns 0 or raises
      UnsupportedModelError. This calls `run` directly, because the manager refuses a program that
      is already past the stage that the pass takes.

    A UserError of the first run propagates.
    """
    old = copy_program(program)
    old.drop_unused_weights()
    _mark(program)
    try:
        (record,) = run_passes(program, [step])
    except PassError as error:
        raise AssertionError(str(error)) from error
    _check_metadata(program)
    before, after = _counts(old), _counts(program)
    _check_counts(before, after, expect or {})
    changed = _text(old) != _text(program)
    assert changed == (record.rewrites > 0), (
        f"{step.name} reports {record.rewrites} rewrites, "
        f"but the program is {'changed' if changed else 'as before'}"
    )
    differences = _check_numbers(old, program, reference, rtol, atol, seed)
    _check_rerun(program, step)
    return PassCheck(record.rewrites, before, after, differences)


def snapshot(module: fx.GraphModule) -> str:
    """The graph as text, the same on every run and machine, for inline snapshots in tests."""
    return print_graph(module)


def _text(program: Program) -> tuple[object, ...]:
    """Everything that a pass may change, in a comparable form."""
    graphs = {name: print_graph(module) for name, module in program.graphs.items()}
    return graphs, program.weights, program.state, program.sparsity


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


def _mark(program: Program) -> None:
    for module in program.graphs.values():
        for node in module.graph.nodes:
            node.meta[_KNOWN] = True


def _check_metadata(program: Program) -> None:
    for name, module in program.graphs.items():
        mode = fake_mode(module.graph)
        for node in module.graph.nodes:
            known = node.meta.pop(_KNOWN, False)  # a copied node carries the mark along
            where = f"graph {name!r}, {node.format_node()}"
            assert known or node.op == "output" or ORIGIN in node.meta, (
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
    """Whether two fake values have the same structure, shapes and dtypes."""
    if isinstance(recorded, Tensor):
        return (
            isinstance(value, Tensor)
            and recorded.dtype is value.dtype
            and _alike(tuple(recorded.shape), tuple(value.shape))
        )
    if isinstance(recorded, tuple | list):
        return (
            isinstance(value, tuple | list)
            and len(recorded) == len(value)
            and all(map(_alike, recorded, value))
        )
    return bool(statically_known_true(recorded == value))


def _check_numbers(
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
        # A new graph is compared with its source: `observe` with `full`, the paths with `dense`.
        source = old.graphs.get(name) or old.graphs.get(FULL if name == OBSERVE else DENSE)
        if source is None:
            continue
        run = partial(reference, name, source) if reference else runnable(source, torch.float32)
        # The reference of griffin's sparse path needs the neurons that the pass keeps.
        expect = Subject(replace(old, sparsity=new.sparsity), source, run, seed)
        actual = Subject(new, module, runnable(module, torch.float32), seed)
        for call in make_calls(source, seed):
            wanted, found = dict(expect(call)), actual(call)
            missing = wanted.keys() - found.keys()
            assert reference is None or not missing, f"{name} has no outputs {sorted(missing)}"
            if name == PREFILL and name not in old.graphs:
                wanted["logits"] = wanted["logits"][torch.arange(call.rows), call.last][:, None]
            for output in wanted.keys() & found.keys():
                where = f"{name}.{output}"
                difference = _difference(
                    f"{where} of {call.what}", found[output], wanted[output], rtol, atol
                )
                differences[where] = max(differences.get(where, 0.0), difference)
    assert differences, "nothing to compare: no output exists both before and after the pass"
    return differences


def _difference(what: str, found: Tensor, wanted: Tensor, rtol: float, atol: float) -> float:
    torch.testing.assert_close(
        found, wanted, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )
    return float((found.double() - wanted.double()).abs().max())


def _check_rerun(program: Program, step: Pass) -> None:
    text = _text(program)
    try:
        rewrites = step.run(program)
    except UnsupportedModelError:
        rewrites = 0
    assert rewrites == 0, f"{step.name}, run again on its own output, made {rewrites} rewrites"
    assert _text(program) == text, f"{step.name}, run again on its own output, changed it"
