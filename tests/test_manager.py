"""The manager runs passes in order, verifies their output, and records what each did."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import Pass, run_passes
from sirius_passes.pair_paths import PairPaths
from sirius_passes.printer import print_graph
from sirius_passes.program import (
    DENSE,
    FULL,
    OBSERVE,
    ORIGIN,
    OUTPUTS,
    PERIOD,
    SPARSE,
    Program,
    Stage,
    call,
    calls,
    set_outputs,
    subgraphs,
)
from sirius_passes.recognise_mlps import RecogniseMlps
from sirius_passes.sparsify_griffin import SparsifyGriffin
from sirius_runtime.errors import PassError
from sirius_runtime.graph import INPUT, WEIGHT, placeholders
from sirius_runtime.spec import PassRecord, WeightSpec
from tests.support.graphs import (
    POSITIONS,
    Attention,
    Decoder,
    Mlp,
    after,
    copied,
    trace,
    two_layers,
)
from tests.support.once import BuildPeriodOnce

aten, sirius = torch.ops.aten, torch.ops.sirius

PASSES: list[Pass] = [
    Canonicalize(),
    RecogniseMlps(),
    InsertKvCache(),
    PairPaths(),
    LayOutWeights(),
    BuildPeriodOnce(3, 2, POSITIONS),
]


def one_layer() -> Decoder:
    return Decoder(Attention(0), Mlp())


# order and stages


@pytest.mark.gate
def test_passes_move_a_program_through_the_stages() -> None:
    program = trace(one_layer)
    stages = []
    run_passes(program, PASSES, progress=lambda record: stages.append(program.stage))
    assert stages == [
        Stage.CANONICAL,
        Stage.CANONICAL,
        Stage.CACHED,
        Stage.PAIRED,
        Stage.LAID_OUT,
        Stage.FINAL,
    ]


@pytest.mark.parametrize("step", PASSES[1:], ids=lambda step: step.name)
def test_a_pass_is_refused_before_the_stage_it_takes(step: Pass) -> None:
    program = trace(one_layer)
    text = print_graph(program.graphs[DENSE])
    message = f"{step.name} takes stage {step.takes.name}, but the program is at CAPTURED"
    with pytest.raises(PassError, match=message):
        run_passes(program, [step])
    assert program.stage is Stage.CAPTURED
    assert print_graph(program.graphs[DENSE]) == text


def test_a_pass_is_refused_after_the_stage_it_takes() -> None:
    with pytest.raises(PassError, match=r"canonicalize takes stage CAPTURED, but .* at CANONICAL"):
        run_passes(trace(one_layer), [Canonicalize(), Canonicalize()])


# records and dumps


def test_records_say_what_each_pass_did() -> None:
    program = trace(one_layer)
    nodes = program.nodes()
    seen: list[PassRecord] = []
    records = run_passes(program, PASSES, progress=seen.append)
    assert records == tuple(seen)
    assert [r.name for r in records] == [step.name for step in PASSES]
    assert [r.rewrites for r in records] == [0, 1, 1, 3, 1, 1]
    assert [r.nodes_before for r in records] == [nodes, *(r.nodes_after for r in records[:-1])]
    assert records[-1].nodes_after == program.nodes()
    assert (
        records[1].nodes_after == records[1].nodes_before - 5 + 2
    )  # an MLP: one op, one transpose
    assert records[2].nodes_after == records[2].nodes_before + 5  # inputs
    assert all(r.seconds > 0 for r in records)


def test_graphs_are_dumped_before_the_first_and_after_each_pass(tmp_path: Path) -> None:
    program = trace(one_layer)
    captured = print_graph(program.graphs[DENSE])
    run_passes(program, PASSES[:4], dump=tmp_path / "new" / "folder")
    run_passes(program, PASSES[4:], dump=tmp_path / "new" / "folder", first=4)
    files = {path.name: path.read_text() for path in (tmp_path / "new" / "folder").iterdir()}
    assert sorted(files) == [
        "00_capture.dense.txt",
        "01_canonicalize.dense.txt",
        "02_recognise_mlps.dense.txt",
        "03_insert_kv_cache.dense.txt",
        *(f"04_pair_paths.{graph}.txt" for graph in ("full", "prefill", "sparse")),
        *(f"05_lay_out_weights.{graph}.txt" for graph in ("full", "prefill", "sparse")),
        *(f"06_build_period.{graph}.txt" for graph in ("full", "period", "prefill", "sparse")),
    ]
    assert files["00_capture.dense.txt"] == captured
    assert files["05_lay_out_weights.full.txt"] == print_graph(program.graphs[FULL])
    assert files["06_build_period.period.txt"] == print_graph(program.graphs[PERIOD])


def test_no_dump_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_passes(trace(one_layer), PASSES[:4])
    assert not list(tmp_path.iterdir())


def test_weights_that_a_pass_leaves_unread_go(tmp_path: Path) -> None:
    program = after(one_layer, Canonicalize())

    def bypass_the_mlp(program: Program) -> None:
        graph = program.graphs[DENSE].graph
        head = calls(graph, aten.linear.default)[-1]
        residual = head.args[0]
        head.replace_input_with(residual, residual.args[0])
        graph.eliminate_dead_code()

    run_passes(program, [Broken(bypass_the_mlp, Stage.CANONICAL)])
    assert not [name for name in program.weights if name.startswith("layers.1.")]
    assert list(placeholders(program.graphs[DENSE].graph, WEIGHT)) == list(program.weights)


# what the verifier finds: one broken program for each of its invariants


class Broken(Pass):
    """A pass that breaks an invariant of the program at its stage."""

    name = "broken"

    def __init__(self, do: Callable[[Program], None], stage: Stage) -> None:
        self.do, self.takes, self.gives = do, stage, stage

    def run(self, program: Program) -> int:
        self.do(program)
        return 1


@dataclass
class Finding:
    """A fault, the stage at which it is one, and the verifier's message."""

    stage: Stage
    do: Callable[[Program], None]
    message: str
    build: Callable[[], Decoder] = one_layer


def program_at(stage: Stage, build: Callable[[], Decoder] = one_layer) -> Program:
    return copied(_program_at(stage, build))


@functools.cache
def _program_at(stage: Stage, build: Callable[[], Decoder]) -> Program:
    program = trace(build)
    run_passes(program, [step for step in PASSES if step.gives <= stage])
    return program


def last_call(program: Program, graph: str = DENSE) -> torch.fx.Node:
    """The logits' node; nodes inserted before it follow all others."""
    return program.graphs[graph].graph.output_node().args[0][0]


def insert(program: Program, target: Callable[..., object], graph: str = DENSE) -> torch.fx.Node:
    """Makes a call of `target` on the logits the new logits; returns the call's node."""
    logits = last_call(program, graph)
    with logits.graph.inserting_after(logits):
        node = call(logits.graph, target, (logits,), origin="test")
    set_outputs(logits.graph, {"logits": node})
    return node


def add_dead_node(program: Program) -> None:
    logits = last_call(program)
    with logits.graph.inserting_before(logits):
        call(logits.graph, aten.neg.default, (logits.args[0],), origin="test")


def drop_value(program: Program) -> None:
    del last_call(program).meta["val"]


def drop_value_of_input(program: Program) -> None:
    del placeholders(program.graphs[DENSE].graph, INPUT)["positions"].meta["val"]


def drop_binding(program: Program) -> None:
    del placeholders(program.graphs[DENSE].graph, INPUT)["positions"].meta[INPUT]


def bind_to_unknown_input(program: Program) -> None:
    placeholders(program.graphs[DENSE].graph, INPUT)["positions"].meta[INPUT] = "colour"


def forget_weight(program: Program) -> None:
    del program.weights["head.weight"]


def reshape_weight(program: Program) -> None:
    program.update_weight("head.weight", shape=(6, 11))


def call_python(program: Program) -> None:
    insert(program, aten.neg.default).target = len


def use_before_definition(program: Program) -> None:
    logits = last_call(program)
    logits.append(logits.args[0])


def name_no_output(program: Program) -> None:
    del program.graphs[DENSE].graph.output_node().meta[OUTPUTS]


def name_unknown_output(program: Program) -> None:
    program.graphs[DENSE].graph.output_node().meta[OUTPUTS] = ("hidden",)


def leave_noise(program: Program) -> None:
    insert(program, aten.alias.default)


def attentions(program: Program, graph: str = DENSE) -> list[torch.fx.Node]:
    targets = sirius.attention.default, sirius.cached_attention.default
    return calls(program.graphs[graph].graph, *targets)


def drop_attention(program: Program) -> None:
    (node,) = attentions(program)
    node.replace_all_uses_with(node.args[0])
    node.graph.eliminate_dead_code()


def renumber_attention(program: Program) -> None:
    (node,) = attentions(program)
    node.update_arg(3, 1)


def stray_cacheless_attention(program: Program) -> None:
    (node,) = attentions(program)
    with node.graph.inserting_after(node):
        kind = node.args[9:]
        stray = call(node.graph, sirius.attention.default, (*node.args[:3], *kind), origin="test")
    with node.graph.inserting_after(stray):
        both = call(node.graph, aten.add.Tensor, (node, stray), origin="test")
    node.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)


def cached_attention_too_early(program: Program) -> None:
    cached = program_at(Stage.CACHED)
    program.graphs = cached.graphs


def drop_sparse(program: Program) -> None:
    del program.graphs[SPARSE]


def keep_dense(program: Program) -> None:
    program.graphs[DENSE] = program.graphs[FULL]


def read_transposed(program: Program) -> None:
    logits = last_call(program, FULL)
    with logits.graph.inserting_before(logits):
        turned = call(logits.graph, aten.t.default, (logits.args[1],), origin="test")
        back = call(logits.graph, aten.permute.default, (turned, [1, 0]), origin="test")
    logits.update_arg(1, back)


def read_another_weight(program: Program) -> None:
    """The sparse path gets a head of its own."""
    logits = last_call(program, SPARSE)
    head = logits.args[1]
    with logits.graph.inserting_after(head):
        own = logits.graph.placeholder("own_head")
    own.meta |= {"val": head.meta["val"], WEIGHT: "own_head", ORIGIN: "test"}
    logits.update_arg(1, own)
    program.weights["own_head"] = WeightSpec("own_head", "bfloat16", (11, 6))


def drop_period(program: Program) -> None:
    del program.graphs[PERIOD]


def drop_observe(program: Program) -> None:
    SparsifyGriffin(0.5).run(program)
    del program.graphs[OBSERVE]


def loop_body(program: Program) -> torch.fx.Graph:
    """The graph of one draft step, within the period's loop."""
    steps = [
        part.graph
        for part in subgraphs(program.graphs[PERIOD])
        if calls(part.graph, sirius.block_attention.default)
    ]
    return steps[0]


def add_dead_node_to_the_loop(program: Program) -> None:
    (attention, *_) = calls(loop_body(program), sirius.block_attention.default)
    with attention.graph.inserting_before(attention):
        call(attention.graph, aten.neg.default, (attention.args[0],), origin="test")


def write_a_cache_in_the_loop(program: Program) -> None:
    (attention, *_) = calls(loop_body(program), sirius.block_attention.default)
    cache = attention.args[3]
    with attention.graph.inserting_before(attention):
        written = call(attention.graph, aten.mul_.Scalar, (cache, 1), origin="test")
    attention.update_arg(3, written)


def repeat_a_layer_in_the_loop(program: Program) -> None:
    """A layer's attention over the K/V of the layer below."""
    attention = calls(loop_body(program), sirius.block_attention.default)[1]
    attention.update_arg(11, 0)


CANONICAL, CACHED, PAIRED, LAID_OUT, FINAL = list(Stage)[1:]
FINDINGS = [
    Finding(CANONICAL, add_dead_node, r"node neg_default is dead"),
    Finding(CANONICAL, drop_value, r"node linear_\d+ has no meta\['val'\]"),
    Finding(CANONICAL, drop_value_of_input, r"node positions has no meta\['val'\]"),
    Finding(CANONICAL, drop_binding, "placeholder positions is bound to no weight and no input"),
    Finding(CANONICAL, bind_to_unknown_input, "positions is bound to neither a weight nor a known"),
    Finding(CANONICAL, forget_weight, "bound to 'head.weight', which is not in the weight table"),
    Finding(CANONICAL, reshape_weight, "differs in shape from weight 'head.weight' in the table"),
    Finding(CANONICAL, call_python, r"a call of <built-in function len> can't be stored"),
    Finding(CANONICAL, use_before_definition, "used before it has been defined"),
    Finding(CANONICAL, name_no_output, r"outputs are named \(\)"),
    Finding(CANONICAL, name_unknown_output, r"outputs are named \('hidden',\), but only \['act"),
    Finding(CANONICAL, leave_noise, r"an export operator is left: alias"),
    Finding(CANONICAL, drop_attention, r"attention.* has layers \[\], expected 0..0"),
    Finding(CANONICAL, renumber_attention, r"attention.* has layers \[1\], expected 0..0"),
    Finding(CANONICAL, cached_attention_too_early, r"sirius.attention.* has layers \[\]"),
    Finding(CACHED, stray_cacheless_attention, r"sirius.attention.* does not belong at this stage"),
    Finding(PAIRED, drop_sparse, r"graphs are \['full', 'prefill'\], expected"),
    Finding(PAIRED, keep_dense, r"graphs are \['dense', 'full', 'prefill', 'sparse'\], expected"),
    Finding(PAIRED, read_another_weight, r"reads weights that the full path does not: \['own_he"),
    Finding(
        LAID_OUT,
        read_transposed,
        r"weight head.weight is read transposed by permute_default \(aten.pe",
    ),
    Finding(PAIRED, drop_observe, r"graphs are .*, expected \['full', 'observe', 'prefill', 'sp"),
    Finding(FINAL, drop_period, r"graphs are .*, expected \['full', 'period', 'prefill', 'sparse"),
    Finding(FINAL, add_dead_node_to_the_loop, r"'period' .* node neg_default is dead"),
    Finding(FINAL, write_a_cache_in_the_loop, r"aten.mul_.Scalar\) mutates; this graph has"),
    pytest.param(
        Finding(
            FINAL,
            repeat_a_layer_in_the_loop,
            r"block_attention has layers \[.*\], expected each layer equally often",
            two_layers,
        ),
        marks=pytest.mark.gate,
    ),
]


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.do.__name__)
def test_the_verifier_finds(finding: Finding) -> None:
    program = program_at(finding.stage, finding.build)
    with pytest.raises(PassError, match=finding.message) as error:
        run_passes(program, [Broken(finding.do, finding.stage)])
    assert "after broken: graph" in str(error.value)
    assert f"at stage {finding.stage.name}" in str(error.value)


@pytest.mark.parametrize("stage", list(Stage)[1:])
def test_the_verifier_finds_nothing_in_a_sound_program(stage: Stage) -> None:
    program = program_at(stage)
    run_passes(program, [Broken(lambda program: None, stage)])


def test_size_arithmetic_is_no_stray_python() -> None:
    """Functions on sizes, which export emits, are allowed; other Python functions are not."""
    program = after(one_layer, Canonicalize())
    graph = program.graphs[DENSE].graph
    logits = last_call(program)
    with graph.inserting_before(logits):
        size = call(graph, aten.sym_size.int, (logits.args[0], 1), origin="test")
        size = call(graph, operator.mul, (size, 1), origin="test")
    with graph.inserting_after(logits):
        view = call(graph, aten.view.default, (logits, [-1, size, 11]), origin="test")
    set_outputs(graph, {"logits": view})
    run_passes(program, [Broken(lambda program: None, Stage.CANONICAL)])


def test_an_operator_that_writes_its_inputs_is_not_dead_when_unread() -> None:
    def leave_unread(program: Program) -> None:
        (node,) = attentions(program)
        node.replace_all_uses_with(node.args[0])

    run_passes(program_at(Stage.CACHED), [Broken(leave_unread, Stage.CACHED)])
