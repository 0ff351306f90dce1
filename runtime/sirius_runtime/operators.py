"""The table of the `sirius::` operators, with one row for each.

Importing this module registers them with torch. CPU kernels are built when one is first called.
Triton is imported when an operator is first called on CUDA. ONNX is not imported here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sirius_runtime.kernels import attention as cpu_attention
from sirius_runtime.kernels import linear as cpu_linear
from sirius_runtime.kernels import mlp as cpu_mlp
from sirius_runtime.kernels import moe as cpu_moe
from sirius_runtime.kernels.cuda.available import launchers
from sirius_runtime.ops import attention, linear, mlp, moe

Function = Callable[..., Any]
"""Takes an operator's arguments one by one, as graphs pass them: see `ops.operands.grouped`."""


@dataclass(frozen=True)
class Operator:
    """One operator.

    schema: torch's schema, which begins with the name. reference: the operator in plain PyTorch;
    kernels are tested against it, and it runs where no kernel does. fake: returns empty results,
    for tracing. shares_choice: whether the tokens of a call share the channels or neurons that they
    keep; calibration must then run one token at a time, as generation does. dense: for a sparse
    operator, its first result if nothing were skipped; None for the others. scores: for each token,
    the values that the operator compares with its last argument, which is `threshold` or `keep`.
    cpu: the CPU kernel. cuda: the module of `kernels.cuda` with the function of the operator's
    name. keeps: for an MLP that keeps some neurons, its last arguments, which say which ones;
    `keeping` of `kernels.mlp` and of `kernels.cuda.mlp` then makes the kernels. decomposition: the
    operator in PyTorch's operators, for compilers, where the reference can't be traced. onnx: the
    module of `sirius_compile.onnx` that translates the operator. rule: checks the arguments in an
    artifact's graphs, with `Array` for tensors (see `graph_rules`); an operator without a rule
    can't be in them. strings: the allowed values of each string argument.
    reads: whether Python reads values of its arguments, so that another call with the same shapes
    may run other kernels.
    """

    schema: str
    reference: Function
    fake: Function
    shares_choice: bool
    dense: Function | None
    scores: Function | None = None
    cpu: Function | None = None
    cuda: str | None = None
    decomposition: Function | None = None
    onnx: str | None = None
    rule: Function | None = None
    strings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads: bool = False
    keeps: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The overload that graphs call."""
        return getattr(torch.ops.sirius, self.name).default

    @property
    def has_threshold(self) -> bool:
        """Whether the last argument is a threshold, which calibration chooses; the operator then
        also returns the number of channels or neurons that it kept.
        """
        return self.schema.partition(") ->")[0].endswith(" threshold")

    @property
    def mutates(self) -> bool:
        """Whether it writes to its arguments."""
        return "!" in self.schema

    def kernel(self, launching: Any) -> Function:
        """The CUDA kernel, from the module that `cuda` names. It returns None if it does not take
        the arguments.
        """
        if self.keeps:
            return launching.keeping(*self.keeps)
        return getattr(launching, self.name)

    def on_cuda(self, *args: Any) -> Any:
        """Runs the CUDA kernel if it supports the call, else the reference."""
        assert self.cuda is not None
        launching = launchers(self.cuda, args[0].device)
        done = None if launching is None else self.kernel(launching)(*args)
        return self.reference(*args) if done is None else done


_KIND = "int layer, float scale, int? window, float? softcap, Tensor? sinks=None"
MLP_SCHEMA = (
    "Tensor x, Tensor gate, Tensor? up, Tensor down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str act, int layer"
)
"""The schema of an MLP's input and of the fields of its `Mlp`."""
_MOE = MLP_SCHEMA.replace("Tensor x,", "Tensor x, Tensor experts, Tensor weights,")
_of_mlp = functools.partial(
    Operator, cuda="mlp", onnx="mlp", strings={"act": tuple(mlp.ACTIVATIONS)}
)
_of_experts = functools.partial(
    Operator, onnx="moe", strings={"act": tuple(moe.EXPERT_ACTIVATIONS)}, reads=True
)


def _sparse_mlp(keeps: str, reference: Function, scores: Function | None = None) -> Operator:
    """An MLP that keeps some of its neurons. keeps: the schema of the arguments that say which; all
    but the prompt's neurons depend on the call's tokens, and then there are `scores`.
    """
    names = tuple(argument.split()[1] for argument in keeps.split(", "))
    counts = "threshold" in names
    results = "(Tensor, Tensor)" if counts else "Tensor"
    return _of_mlp(
        f"{reference.__name__}({MLP_SCHEMA}, {keeps}) -> {results}",
        reference,
        mlp.like_and_count if counts else mlp.like,
        shares_choice=scores is not None,
        dense=mlp.all_neurons,
        scores=scores,
        cpu=cpu_mlp.keeping(reference.__name__, names),
        keeps=names,
        rule=mlp.keeping_rule(*names),
    )


_ROWS = (
    Operator(
        f"attention(Tensor q, Tensor k, Tensor v, {_KIND}) -> Tensor",
        attention.attention,
        attention.like_q,
        shares_choice=False,
        dense=None,
        rule=attention.attention_rule,
    ),
    Operator(
        "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        f"Tensor positions, Tensor slots, Tensor length, Tensor tree_mask, {_KIND}) -> Tensor",
        attention.cached_attention,
        attention.like_q,
        shares_choice=False,
        dense=None,
        cpu=cpu_attention.cached_attention,
        cuda="attention",
        onnx="attention",
        rule=attention.cached_attention_rule,
    ),
    Operator(
        "block_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, "
        "Tensor k_block, Tensor v_block, Tensor positions, Tensor nodes, Tensor length, "
        f"Tensor tree_mask, {_KIND}) -> (Tensor, Tensor, Tensor)",
        attention.block_attention,
        attention.like_q_and_blocks,
        shares_choice=False,
        dense=None,
        cpu=cpu_attention.block_attention,
        cuda="attention",
        decomposition=attention.decomposed_block_attention,
        onnx="attention",
        rule=attention.block_attention_rule,
    ),
    Operator(
        "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        linear.linear,
        linear.fake_linear,
        shares_choice=False,
        dense=None,
        cpu=cpu_linear.linear,
        cuda="linear",
        onnx="nested",
        rule=linear.linear_rule,
    ),
    Operator(
        "linears(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
        linear.linears,
        linear.fake_linears,
        shares_choice=False,
        dense=None,
        cpu=cpu_linear.linears,
        cuda="linear",
    ),
    Operator(
        "embedding(Tensor weight, Tensor ids, ScalarType dtype) -> Tensor",
        linear.embedding,
        linear.fake_embedding,
        shares_choice=False,
        dense=None,
        cpu=cpu_linear.embedding,
        onnx="nested",
        rule=linear.embedding_rule,
    ),
    Operator(
        "sparse_linear(Tensor x, Tensor weight, Tensor? bias, float threshold) -> (Tensor, Tensor)",
        linear.sparse_linear,
        linear.fake_sparse_linear,
        shares_choice=True,
        dense=linear.all_channels,
        scores=linear.channel_scores,
        cpu=cpu_linear.sparse_linear,
        cuda="linear",
        onnx="mlp",
        rule=linear.sparse_linear_rule,
    ),
    _of_mlp(
        f"dense_mlp({MLP_SCHEMA}) -> Tensor",
        mlp.dense_mlp,
        mlp.like,
        shares_choice=False,
        dense=None,
        cpu=cpu_mlp.dense_mlp,
        rule=mlp.dense_mlp_rule,
    ),
    _of_mlp(
        f"dense_mlp_statistic({MLP_SCHEMA}, Tensor valid) -> (Tensor, Tensor)",
        mlp.dense_mlp_statistic,
        mlp.like_and_statistic,
        shares_choice=False,
        dense=None,
        cpu=cpu_mlp.dense_mlp_statistic,
        rule=mlp.dense_mlp_statistic_rule,
    ),
    _of_mlp(
        f"dense_mlp_activity({MLP_SCHEMA}) -> (Tensor, Tensor)",
        mlp.dense_mlp_activity,
        mlp.like_and_activity,
        shares_choice=False,
        dense=None,
        cpu=cpu_mlp.dense_mlp_activity,
        rule=mlp.dense_mlp_activity_rule,
    ),
    _sparse_mlp("int keep", mlp.topk_mlp, scores=mlp.neuron_scores),
    _sparse_mlp("float threshold", mlp.cats_mlp, scores=mlp.neuron_scores),
    _sparse_mlp("Tensor neurons", mlp.griffin_mlp),
    _sparse_mlp("Tensor neurons, float threshold", mlp.griffin_cats_mlp, scores=mlp.chosen_scores),
    _of_experts(
        f"dense_moe({_MOE}) -> Tensor",
        moe.dense_moe,
        mlp.like,
        shares_choice=False,
        dense=None,
        cpu=cpu_moe.dense_moe,
        decomposition=moe.decomposed_dense_moe,
        rule=moe.dense_moe_rule,
    ),
    _of_experts(
        f"topk_moe({_MOE}, int keep) -> Tensor",
        moe.topk_moe,
        mlp.like,
        shares_choice=False,
        dense=moe.all_experts,
        scores=moe.expert_scores,
        cpu=cpu_moe.topk_moe,
        decomposition=moe.decomposed_topk_moe,
        rule=moe.topk_moe_rule,
    ),
    _of_experts(
        f"experts_moe({_MOE}, int keep, bool normalised) -> Tensor",
        moe.experts_moe,
        mlp.like,
        shares_choice=False,
        dense=moe.all_experts,
        cpu=cpu_moe.experts_moe,
        decomposition=moe.decomposed_experts_moe,
        rule=moe.experts_moe_rule,
    ),
)

OPERATORS: dict[str, Operator] = {}
"""The rows by name."""

# Kept alive for the life of the process: collecting a Library removes its operators.
_LIBRARY = torch.library.Library("sirius", "FRAGMENT")


def add(row: Operator) -> None:
    """Adds a row to the table, and the operator to torch's."""
    OPERATORS[row.name] = row
    _LIBRARY.define(row.schema)
    _LIBRARY.impl(row.name, row.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sirius::{row.name}", row.fake, lib=_LIBRARY)
    if row.cpu is not None:
        _LIBRARY.impl(row.name, row.cpu, "CPU")
    if row.cuda is not None:
        _LIBRARY.impl(row.name, row.on_cuda, "CUDA")


for _row in _ROWS:
    add(_row)
