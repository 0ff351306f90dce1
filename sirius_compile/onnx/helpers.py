"""Helper graphs for a program that runs the ONNX entries. The PyTorch runtime has code for these.

select   griffin's selection: the neurons with the largest statistic, and their rows of the MLPs'
         weights. Run once a prompt; sparse steps read these rows as their MLP weights
pick     the next token of each row, sampled from the full path's distribution
write    writes the K/V of a call's tokens to the slots after `length`; in place, if input and
         output are bound to one buffer
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sirius_compile.onnx import emit as e
from sirius_compile.onnx.lower import Lowering, make_model
from sirius_compile.onnx.mlp import topk
from sirius_compile.onnx.scope import Kept, Scope, Value, value_info
from sirius_runtime.graph import CAPTURE_DTYPE, INPUT, to_document
from sirius_runtime.onnx_files import SELECT
from sirius_runtime.policy import draw
from sirius_runtime.sampling import Sampling
from sirius_runtime.spec import EntrySpec, ProgramSpec, TensorSpec

PICK, WRITE = "pick", "write"

_PICK = EntrySpec(
    PICK,
    (
        TensorSpec("logits", "model", ("B", "V")),
        TensorSpec("temperature", "float32", ()),
        TensorSpec("top_k", "int64", ()),
        TensorSpec("top_p", "float32", ()),
        TensorSpec("uniform", "float64", ("B",)),
    ),
    (TensorSpec("tokens", "int64", ("B",)),),
)


def select(program: ProgramSpec, kept: Mapping[str, Kept], dtype: str) -> onnx.ModelProto:
    """The graph `select`, for entries that take the inputs `kept`."""
    s, state, sparsity = Scope(), program.state, program.sparsity
    statistic = s.input("statistic", "float32", (state.layers, "B", sparsity.neurons))
    _, index = topk(s, statistic, sparsity.kept_neurons)
    ascending, _ = topk(s, index, sparsity.kept_neurons, largest=False)
    shape = (state.layers, "B", sparsity.kept_neurons)
    outputs = [value_info(s.returned(ascending, "neurons"), shape)]
    for name, part in kept.items():
        neurons = e.gather(s, ascending, s.constant(part.layer, "int64"), 0)
        rows = s.returned(_rows(s, part, neurons), name)
        outputs.append(value_info(rows, ("B", *rows.shape[1:])))
    return make_model(s.graph(SELECT, outputs))


def _rows(s: Scope, part: Kept, neurons: Value) -> Value:
    """The rows of a weight for the prompt's neurons, in the layout of `Kept`."""
    whole, start = part.weight.weight, part.weight.start
    weight = s.weight(whole.name, whole.dtype, [n for n in whole.shape if isinstance(n, int)])
    if start:
        neurons = e.elementwise(s, "Add", neurons, start)
    rows = e.gather(s, weight, neurons, 0)
    if part.part.endswith("_bias"):
        return e.unsqueeze(s, rows, 1)
    return rows if part.part == "down" else e.swap(s, rows, 1, 2)


def pick(program: ProgramSpec, dtype: str) -> onnx.ModelProto:
    """The graph `pick`, traced from the functions that PyTorch's back ends call."""
    vocabulary = program.model.vocab_size

    def drawn(
        logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor
    ) -> Tensor:
        return draw(Sampling(temperature, top_k, top_p).distribution(logits), uniform)

    examples = (
        torch.zeros(3, vocabulary, dtype=CAPTURE_DTYPE),
        torch.ones(()),
        torch.zeros((), dtype=torch.int64),
        torch.ones(()),
        torch.zeros(3, dtype=torch.float64),
    )
    module = make_fx(drawn, tracing_mode="symbolic", pre_dispatch=True)(*examples)
    for node, spec in zip(module.graph.find_nodes(op="placeholder"), _PICK.inputs, strict=True):
        node.meta[INPUT] = spec.name
    return Lowering(program, dtype).entry(_PICK, to_document(module)).model


def write(program: ProgramSpec, dtype: str) -> onnx.ModelProto:
    """The graph `write`."""
    s, state, outputs = Scope(), program.state, []
    length = s.input("length", "int64", ("B",))
    for name, width in (("k", state.key_dim), ("v", state.value_dim)):
        shape = (state.layers, "B", state.kv_heads, "S", width)
        cache = s.input(f"{name}_cache", dtype, shape)
        new = s.input(f"{name}_new", dtype, (*shape[:3], "T", width))
        places = e.arange(s, e.size(s, new, 3))
        slots = e.elementwise(s, "Add", e.unsqueeze(s, length, 1), places)
        slots = e.expand_like(s, e.unsqueeze(s, slots, 0, 2, 4), new)
        written = s.op("ScatterElements", cache, slots, new, shape=cache.shape, axis=3)
        outputs.append(value_info(s.returned(written, f"{name}_written"), shape))
    return make_model(s.graph(WRITE, outputs))
