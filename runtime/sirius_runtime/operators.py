"""The table of the `sirius::` operators: a row says all of one.

Importing this module registers them with torch. CPU kernels are built when one is first called;
Triton is imported when an operator is first called on CUDA; nothing of ONNX is imported here.
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
"""Called with an operator's arguments one by one, as graphs do: see `ops.operands.grouped`."""


@dataclass(frozen=True)
class Operator:
    """One operator.

    schema: as torch has it, with the name. reference: in plain PyTorch, what kernels are tested
    against, and what runs where none serves. fake: the shapes of the results, for tracing.
    shares_choice: whether the tokens of a call share what they keep, so that calibration has to run
    token by token what generation runs so. dense: of an operator that skips, what it gives where
    nothing is skipped (the first of its results); None of the others. scores: what is compared, of
    each token, with the last argument, which is a `threshold` or a number to `keep`. cpu: the
    kernel on the CPU. cuda: the module of `kernels.cuda` that has the function of the operator's
    name. decomposition: the operator in PyTorch's own, for compilers, where the reference is no
    such. onnx: the module of `sirius_compile.onnx` that has its translation, by the operator's
    name. rule: what graphs of an artifact may pass, with `Array` in place of tensors; an operator
    without one is not for graphs. strings: by argument, all that it may say there.
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

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def overload(self) -> torch._ops.OpOverload:
        """What graphs call."""
        return getattr(torch.ops.sirius, self.name).default

    @property
    def has_threshold(self) -> bool:
        """Whether calibration chooses the last argument, and a step counts what it keeps."""
        return self.schema.partition(") ->")[0].endswith(" threshold")

    @property
    def mutates(self) -> bool:
        """Whether it writes to its arguments."""
        return "!" in self.schema

    def on_cuda(self, *args: Any) -> Any:
        """By the kernel where it serves, else by the reference."""
        assert self.cuda is not None
        launching = launchers(self.cuda, args[0].device)
        done = None if launching is None else getattr(launching, self.name)(*args)
        return self.reference(*args) if done is None else done


_KIND = "int layer, float scale, int? window, float? softcap, Tensor? sinks=None"
MLP_SCHEMA = (
    "Tensor x, Tensor gate, Tensor? up, Tensor down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str act, int layer"
)
"""Of an MLP's input and its `Mlp`, one by one."""
_MOE = MLP_SCHEMA.replace("Tensor x,", "Tensor x, Tensor experts, Tensor weights,")
_of_mlp = functools.partial(
    Operator, cuda="mlp", onnx="mlp", strings={"act": tuple(mlp.ACTIVATIONS)}
)
_of_experts = functools.partial(
    Operator, onnx="moe", strings={"act": tuple(moe.EXPERT_ACTIVATIONS)}
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
    _of_mlp(
        f"topk_mlp({MLP_SCHEMA}, int keep) -> Tensor",
        mlp.topk_mlp,
        mlp.like,
        shares_choice=True,
        dense=mlp.all_neurons,
        scores=mlp.neuron_scores,
        cpu=cpu_mlp.topk_mlp,
        rule=mlp.topk_mlp_rule,
    ),
    _of_mlp(
        f"cats_mlp({MLP_SCHEMA}, float threshold) -> (Tensor, Tensor)",
        mlp.cats_mlp,
        mlp.like_and_count,
        shares_choice=True,
        dense=mlp.all_neurons,
        scores=mlp.neuron_scores,
        cpu=cpu_mlp.cats_mlp,
        rule=mlp.cats_mlp_rule,
    ),
    _of_mlp(
        f"griffin_mlp({MLP_SCHEMA}, Tensor neurons) -> Tensor",
        mlp.griffin_mlp,
        mlp.like,
        shares_choice=False,  # a prompt's neurons are the same for all of its tokens
        dense=mlp.all_neurons,
        cpu=cpu_mlp.griffin_mlp,
        rule=mlp.griffin_mlp_rule,
    ),
    _of_mlp(
        f"griffin_cats_mlp({MLP_SCHEMA}, Tensor neurons, float threshold) -> (Tensor, Tensor)",
        mlp.griffin_cats_mlp,
        mlp.like_and_count,
        shares_choice=True,
        dense=mlp.all_neurons,
        scores=mlp.chosen_scores,
        cpu=cpu_mlp.griffin_cats_mlp,
        rule=mlp.griffin_cats_mlp_rule,
    ),
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

# Kept alive for the life of the process: a collected Library takes its operators with it.
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
