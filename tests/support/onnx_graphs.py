"""Functions of tensors as ONNX graphs, by way of the documents that entries are stored as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from sirius_compile.onnx.lower import Lowering
from sirius_runtime.graph import INPUT, WEIGHT, to_document
from sirius_runtime.spec import JSON, EntrySpec, SiteSpec, TensorSpec
from tests.support.artifacts import program_of


def documented(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[EntrySpec, JSON]:
    """A function as the document of an entry; dimensions other than of size 1 are dynamic."""
    module = make_fx(function, tracing_mode="symbolic", pre_dispatch=True)(*inputs)
    wanted = function(*inputs)
    return described(module, inputs, wanted if isinstance(wanted, tuple | list) else [wanted])


def described(
    module: fx.GraphModule, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[EntrySpec, JSON]:
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        node.meta[INPUT] = f"x{index}"
    entry = EntrySpec("test", specs("x", inputs), specs("y", outputs))
    return entry, to_document(module)


def specs(letter: str, tensors: Sequence[Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(f"{letter}{i}", str(x.dtype).removeprefix("torch."), tuple(x.shape))
        for i, x in enumerate(tensors)
    )


def lowered(spec: EntrySpec, document: JSON) -> onnx.ModelProto:
    model = Lowering(program_of({}), "float32").entry(spec, document).model
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, inputs: Sequence[Tensor]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    reads = {i.name for i in session.get_inputs()}
    given = {f"x{i}": x.numpy() for i, x in enumerate(inputs) if f"x{i}" in reads}
    return [torch.from_numpy(np.asarray(y)) for y in session.run(None, given)]


def agree(
    function: Callable[..., Any], *inputs: Tensor, atol: float = 1e-5, again: Sequence[Tensor] = ()
) -> None:
    """ONNX Runtime computes what `function` computes, of the same dtypes and shapes; and so the
    same graph does of other inputs, `again`, of the same shapes.
    """
    model = lowered(*documented(function, inputs))
    for given in (inputs, again) if again else (inputs,):
        wanted = function(*given)
        wanted = list(wanted) if isinstance(wanted, tuple | list) else [wanted]
        for w, f in zip(wanted, run(model, given), strict=True):
            assert f.dtype == w.dtype
            torch.testing.assert_close(f, w, atol=atol, rtol=1e-4)


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, most: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(-most, most, shape, generator=torch.Generator().manual_seed(seed))


def over_weights(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    sites: Sequence[SiteSpec] = (),
) -> onnx.ModelProto:
    """`function` of inputs x0, x1, … and of stored weights by name, as a graph that holds the
    weights' values, for any number of tokens (the first dimension of inputs and output)."""
    names = list(weights)

    def whole(*given: Tensor) -> Tensor:
        own = dict(zip(names, given[len(inputs) :], strict=True))
        return function(*given[: len(inputs)], **own)

    module = make_fx(whole, tracing_mode="symbolic", pre_dispatch=True)(*inputs, *weights.values())
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        if index < len(inputs):
            node.meta[INPUT] = f"x{index}"
        else:
            node.meta[WEIGHT] = names[index - len(inputs)]
    found = function(*inputs, **weights)
    wanted = list(found) if isinstance(found, tuple | list) else [found]
    shapes = [
        TensorSpec(s.name, s.dtype, ("N", *s.shape[1:]))
        for s in (*specs("x", inputs), *specs("y", wanted))
    ]
    entry = EntrySpec("test", tuple(shapes[: len(inputs)]), tuple(shapes[len(inputs) :]))
    program = program_of(weights)
    program = replace(program, sparsity=replace(program.sparsity, sites=tuple(sites)))
    model = Lowering(program, "float32").entry(entry, to_document(module)).model
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            name, _, index = tensor.name.rstrip("]").partition("[")
            value = weights[name][int(index)] if index else weights[name]
            tensor.CopyFrom(onnx.numpy_helper.from_array(value.numpy(), tensor.name))
    onnx.checker.check_model(model, full_check=True)
    return model
