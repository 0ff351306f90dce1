"""The files of an artifact's `onnx/`: all graphs of a program, with weights bound by offset.

The files hold no weights. An initializer gives its offset in `weights.safetensors`, which `sirius
export-onnx` writes beside the graphs. A runtime that loads the artifact binds the artifact's own
bytes by name instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import onnx

from sirius_compile.onnx.helpers import PICK, WRITE, pick, select, write
from sirius_compile.onnx.lower import IR_VERSION, OPSET, Lowering, every_node
from sirius_compile.onnx.mlp import CHANNELS_GATHERED_BELOW, NEURONS_GATHERED_BELOW, kept_share
from sirius_compile.onnx.nested import OPERATOR
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from sirius_runtime.onnx_files import (
    PROGRAM,
    SELECT,
    GraphSpec,
    OnnxProgram,
    Place,
    gathered_bytes,
    graph_file,
    places,
)
from sirius_runtime.spec import JSON, DType, Method, ProgramSpec, to_json

DTYPES = (DType.FLOAT32, DType.FLOAT16)
"""Dtypes that ONNX Runtime supports everywhere; its CPU kernels have no bfloat16."""
_STREAMING = {"Gemm", "MatMul", "Gather", OPERATOR}
"""Operators that read a stored weight in place. Weights of other operators may be folded into
constants, which copies them."""


def onnx_dtype(asked: DType | str | None, stored: DType) -> DType:
    """The dtype of an artifact with ONNX graphs: `asked`, or else `stored` if it is in `DTYPES`, or
    else float32.

    Raises ConfigError if `asked` is not in `DTYPES`.
    """
    if asked is not None:
        _check_dtype(asked)
        return DType(asked)
    return stored if stored in DTYPES else DType.FLOAT32


def onnx_summary(program: ProgramSpec) -> str:
    """A line for the user about the graphs' opset, dtype and speed."""
    text = f"opset {OPSET}, {program.model.dtype} (ONNX Runtime's CPU kernels have no bfloat16)"
    if program.sparsity.method.per_prompt:
        extra = gathered_bytes(program)
        return (
            f"{text}; a prompt's neurons are gathered once, which takes {extra:,} bytes a row, and "
            "sparse steps read only these"
        )
    method, sites = program.sparsity.method, program.sparsity.sites
    if program.nested:
        bits = program.sparsity.draft_bits
        text = f"{text}; nested weights by {OPERATOR}, drafts read {bits} bits of them"
        if method in (Method.NONE, Method.EXPERTS):
            return text
        return f"{text}; {method} masks skipped units, which saves no time"
    if method is Method.NONE:
        return text
    if not method.for_dense_models:
        return f"{text}; a sparse step reads only the experts that it keeps"
    if any(weight.of_experts for weight in program.weights):
        return f"{text}; a step reads all neurons of its tokens' experts: {method} saves no time"
    channels, varies = method.skips_channels, method.has_thresholds
    below = CHANNELS_GATHERED_BELOW if channels else NEURONS_GATHERED_BELOW
    few = sum((kept_share(sites, s.weight) if varies else s.kept / s.units) <= below for s in sites)
    if not few:
        return f"{text}; {method} computes everything and masks: sparse steps save no time"
    what = "input channels" if channels else "neurons (their rows of up and down)"
    return (
        f"{text}; at {few} of {len(sites)} sites a sparse step gathers the {what} that it keeps, "
        "which saves time; at the others it computes everything and masks"
    )


def check_nested(nested: bool, method: Method) -> None:
    """Raises UnsupportedModelError for nested weights with a method that selects neurons once per
    prompt: single rows of down can't be gathered, because 32 neurons share scales.
    """
    if nested and method.per_prompt:
        raise UnsupportedModelError(
            f"--sparsity {method} with nested weights (--weights int8) has no translation to ONNX: "
            "use --sparsity topk, cats, teal, experts or none, or compile without --weights int8"
        )


def _check_dtype(dtype: DType | str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(
            f"--graphs onnx needs weights in {' or '.join(DTYPES)}, which ONNX Runtime supports "
            f"everywhere, got {dtype}; pass --dtype float32 (or --dtype float16)"
        )


def onnx_files(program: ProgramSpec, document: Callable[[str], JSON]) -> dict[str, bytes]:
    """Each file of `onnx/` by its name in the artifact. `document` gives an entry's graph.

    Raises ConfigError for an unsupported dtype, and UnsupportedModelError for an operator without a
    translation and for nested weights that `check_nested` refuses.
    """
    _check_dtype(program.model.dtype)
    check_nested(program.nested, program.sparsity.method)
    dtype = str(program.model.dtype)
    lowered = {e.name: Lowering(program, dtype).entry(e, document(e.name)) for e in program.entries}
    models = {name: entry.model for name, entry in lowered.items()}
    kept = lowered["sparse"].kept
    if lowered["period"].kept.keys() != kept.keys():
        raise UnsupportedModelError("onnx: period and sparse keep different weights; report this")
    if kept:
        models[SELECT] = select(program, kept, dtype)
    models |= {PICK: pick(program, dtype), WRITE: write(program, dtype)}
    where = places(program)
    graphs = {name: _bind(model, where) for name, model in models.items()}
    summary = OnnxProgram(
        opset=OPSET,
        ir_version=IR_VERSION,
        onnx=onnx.__version__,
        graphs=graphs,
        model=program.model,
        state=program.state,
        method=program.sparsity.method,
        kept=tuple(kept),
        period=program.period,
        eos_token_ids=program.eos_token_ids,
    )
    files = {graph_file(name): model.SerializeToString() for name, model in models.items()}
    return {PROGRAM: json.dumps(to_json(summary), indent=1).encode(), **files}


def _bind(model: onnx.ModelProto, where: dict[str, Place]) -> GraphSpec:
    """Sets each initializer's offset in the weights file; returns which are read in place."""
    readers: dict[str, set[str]] = {}
    for node in every_node(model.graph):
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    in_place: list[str] = []
    folded: list[str] = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = where[tensor.name]
            for key, value in place.entries():
                tensor.external_data.add(key=key, value=value)
            streams = len(tensor.dims) > 1 and readers[tensor.name] <= _STREAMING
            (in_place if streams else folded).append(tensor.name)
    return GraphSpec(tuple(in_place), tuple(folded))
