"""Compiles the CUDA kernels for GPUs that are not here.

The host's side of each operator runs on tensors without data, and what it would launch is recorded;
each launch can then be compiled as Triton would at run time, to machine code, by the ptxas that
comes with it.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sirius_runtime.kernels.cuda import attention, linear
from sirius_runtime.nested import Layout, nested_shape
from tests.support.cuda_kernels import mlp


@dataclass(frozen=True)
class Sizes:
    """Of a decoder's layer and its cache, and the neurons that are kept."""

    hidden: int
    neurons: int
    heads: int
    groups: int
    head: int
    slots: int
    kept: int


LLAMA_8B = Sizes(4096, 14336, 32, 8, 128, 4096, 7168)
ONES = Sizes(1, 1, 1, 1, 1, 1, 1)
"""What is 1 is a constant for the compiler, and constants are of other types."""
ODD = Sizes(37, 151, 6, 3, 80, 219, 67)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass
class Launch:
    """A kernel and its arguments by name, as a launch gives them."""

    kernel: JITFunction[Any]
    values: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """What is compiled: as at run time, ones and `tl.constexpr` are constants, and what 16
        divides is known to be so."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for parameter in self.kernel.params:
            name, value = parameter.name, self.values[parameter.name]
            if parameter.is_constexpr or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
                divides = value.storage_offset() * value.itemsize % 16 == 0
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                divides = isinstance(value, int) and value % 16 == 0
            if divides:
                attributes[parameter.num,] = CUDABackend.parse_attr("D")
        return ASTSource(self.kernel, signature, constants, attributes)

    def key(self) -> str:
        source = self.source()
        return str((self.kernel, source.signature, source.constants, source.attrs, self.options))


def recorded(call: Callable[[], object]) -> list[Launch]:
    """What `call` would launch."""
    launches: list[Launch] = []

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [parameter.name for parameter in self.params]
        values = dict(zip(names, args, strict=False))
        values |= {name: named.pop(name) for name in names if name in named}
        launches.append(Launch(self, values, named))

    before, JITFunction.run = JITFunction.run, record  # type: ignore[method-assign]
    try:
        call()
    finally:
        JITFunction.run = before  # type: ignore[method-assign]
    return launches


def calls(sizes: Sizes, dtype: torch.dtype, B: int, T: int) -> list[Callable[[], object]]:
    """Every operator, in every form that makes another kernel of it."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def index(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.int64)

    hidden, heads, groups, head = sizes.hidden, sizes.heads, sizes.groups, sizes.head
    x = empty(B, T, hidden)
    gate, up, down = (empty(sizes.neurons, hidden) for _ in range(3))
    bias, wide_bias = empty(hidden), empty(sizes.neurons)
    gated = x, gate, up, down, None, None, None, "silu", 0
    plain = x, gate, None, down, wide_bias, None, bias, "gelu_tanh", 0
    biased = x, gate, up, down, wide_bias, wide_bias, bias, "gelu", 0
    neurons = index(1, B, sizes.kept)
    q, k, v = (empty(B, n, T, head) for n in (heads, groups, groups))
    caches = [empty(1, B, groups, sizes.slots, head) for _ in range(2)]
    blocks = [empty(1, B, groups, T, head) for _ in range(2)]
    at, length, mask = index(B, T), index(B), index(1, T, T)
    square, few = empty(hidden, hidden), empty(groups * head, hidden)

    def run(function: Callable[..., object], *args: object) -> Callable[[], object]:
        def call() -> None:
            assert function(*args) is not None, f"{function.__name__} is left to the reference"

        return call

    return [
        run(linear.linear, x, square, None),
        run(linear.linear, x, square, bias),
        run(linear.linear, x, few, None),
        run(linear.linear, x, square.t(), bias),
        run(linear.linears, x, [square, few, few], [None] * 3),
        run(linear.linears, x, [square, few], [bias, None]),
        run(linear.linears, x, [few, gate, square, few], [None, wide_bias, bias, None]),
        run(linear.sparse_linear, x, square, None, 0.5),
        run(linear.sparse_linear, x, square, bias, 0.5),
        run(mlp.dense_mlp, *gated),
        run(mlp.dense_mlp, *plain),
        run(mlp.dense_mlp, *biased),
        run(mlp.dense_mlp, *gated[:7], "quick_gelu", 0),
        run(mlp.dense_mlp, *gated[:7], "relu2", 0),
        run(mlp.topk_mlp, *gated, sizes.kept),
        run(mlp.topk_mlp, *plain, sizes.kept),
        run(mlp.cats_mlp, *biased, 0.5),
        run(mlp.griffin_mlp, *gated, neurons),
        run(mlp.griffin_cats_mlp, *gated, neurons, 0.5),
        *(
            run(attention.cached_attention, q, k, v, *caches, at, at, length, mask, 0, 0.1, *kind)
            for kind in ((None, None, None), (256, 30.0, empty(heads)))
        ),
        run(
            attention.block_attention,
            *(q, k, v, *caches, *blocks, at, index(T), length, mask, 0, 0.1, None, None),
        ),
    ]


def nested_calls(sizes: Sizes, dtype: torch.dtype, B: int, T: int) -> list[Callable[[], object]]:
    """Linears and MLPs of nested weights, of both planes and of one."""
    x = torch.empty(B, T, sizes.hidden, dtype=dtype, device="meta")

    def planes(outputs: int, inputs: int, layout: Layout, count: int) -> Tensor:
        shape = nested_shape(outputs, inputs, layout)
        return torch.empty(shape, dtype=torch.uint8, device="meta")[:count]

    found: list[Callable[[], object]] = []
    for count in (1, 2):
        wide = planes(sizes.neurons, sizes.hidden, Layout.BY_OUTPUTS, count)
        back = planes(sizes.hidden, sizes.neurons, Layout.BY_INPUTS, count)
        args = x, wide, wide, back, None, None, None, "silu", 0
        found += [
            functools.partial(mlp.dense_mlp, *args),
            functools.partial(mlp.topk_mlp, *args, sizes.kept),
        ]
    return found


def all_launches(sizes: Sizes, dtype: torch.dtype, B: int, T: int) -> list[Launch]:
    """Those of every operator on B rows of T tokens that differ in what is compiled."""
    launches = [launch for call in calls(sizes, dtype, B, T) for launch in recorded(call)]
    return list({launch.key(): launch for launch in launches}.values())


def compile_launch(launch: Launch, capability: int) -> Any:
    """What Triton makes of it, down to machine code."""
    options = {k: v for k, v in launch.options.items() if k.startswith(("num_", "enable_"))}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(launch.source(), target=target, options=options)


@dataclass(frozen=True)
class Resources:
    """Of a kernel: registers and spilled bytes of a thread, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def resources(done: Any, capability: int) -> Resources:
    """What ptxas says of a compiled kernel."""
    architecture = re.search(r"\.target (\w+)", done.asm["ptx"])
    assert architecture is not None
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(done.asm["ptx"])
        said = subprocess.run(
            [
                *(get_ptxas(capability).path, "-v", f"--gpu-name={architecture[1]}"),
                *(str(ptx), "-o", str(ptx.with_suffix(".cubin"))),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return Resources(
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        shared=done.metadata.shared,
    )
