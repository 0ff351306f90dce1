"""Programs of real models' shapes over random weights, created on the device. No model is loaded or
calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, fx
from transformers import LlamaConfig

from benchmarks.memory import in_large_pages
from sirius_compile.capture import capture
from sirius_compile.pipeline import front, sparsify
from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import run_passes
from sirius_passes.nest_weights import NestWeights
from sirius_passes.program import FULL, SPARSE, Program, copy_program
from sirius_passes.sparsify import parameters
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.graph import to_document
from sirius_runtime.nested import GROUP, matrix_shape
from sirius_runtime.operators import OPERATORS
from sirius_runtime.sizes import cache_slots
from sirius_runtime.spec import (
    JSON,
    DType,
    Layout,
    Method,
    ModelSpec,
    PeriodSpec,
    ProgramSpec,
    ToolVersions,
    WeightSpec,
)
from sirius_runtime.tensor_state import TensorState

METHODS = (Method.GRIFFIN, Method.TOPK, Method.CATS, Method.TEAL, Method.GRIFFIN_TEAL)
sirius = torch.ops.sirius


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. `layers`: the number timed by default."""

    name: str
    hidden: int
    neurons: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    layers: int
    tied: bool = False

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
            dtype=torch.bfloat16,
        )

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)

    @property
    def attention(self) -> int:
        """Parameters of one layer's linears of attention."""
        return 2 * self.hidden * self.head * (self.heads + self.groups)

    @property
    def mlp(self) -> int:
        """Parameters of one layer's MLP."""
        return 3 * self.hidden * self.neurons

    def read(self, method: Method = Method.NONE, skipped: float = 0.0) -> float:
        """Parameters that a step of one token reads, without norms and the row of the embedding.

        `griffin+teal` skips that share three times: of all neurons for the prompt, of the prompt's
        neurons for the token, and of the input channels of attention.
        """
        kept = 1 - skipped
        attention, mlp = {
            Method.NONE: (1.0, 1.0),
            Method.GRIFFIN: (1.0, kept),
            Method.TOPK: (1.0, (1 + 2 * kept) / 3),
            Method.CATS: (1.0, (1 + 2 * kept) / 3),
            Method.TEAL: (kept, kept),
            Method.GRIFFIN_TEAL: (kept, (kept + 2 * kept * kept) / 3),
        }[method]
        layer = self.attention * attention + self.mlp * mlp
        return self.layers * layer + self.hidden * self.vocabulary


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 192, 4, 2, 16, 256, 2),
        Shape("1b", 2048, 8192, 32, 8, 64, 128_256, 16, tied=True),  # Llama-3.2-1B
        Shape("1.5b", 1536, 8960, 12, 2, 128, 151_936, 28, tied=True),  # Qwen2.5-1.5B
        Shape("8b", 4096, 14_336, 32, 8, 128, 128_256, 32),  # Llama-3-8B
        Shape("32b", 5120, 27_648, 40, 8, 128, 152_064, 64),  # Qwen2.5-32B
        Shape("70b", 8192, 28_672, 64, 8, 128, 128_256, 4),  # Llama-3-70B, four of 80 layers
    )
}


class RandomPrograms:
    """Sparse paths of one shape over the same storage.

    A weight that methods store in different layouts is one buffer used in both layouts, as its
    values are random anyway. `draft_bits`: 4 or 8, for nested weights.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        draft_bits: int | None = None,
    ) -> None:
        self.shape, self.device, self.dtype, self.draft_bits = shape, device, dtype, draft_bits
        self._captured = capture(shape.config())
        self._made: dict[Method, Program] = {}
        self._pool: dict[str, Tensor] = {}

    def backend(
        self,
        method: Method = Method.NONE,
        skipped: float = 0.0,
        make: Callable[..., EagerBackend] = EagerBackend,
    ) -> EagerBackend:
        """The entries of a sparse path that skips the share `skipped`: by count, or by thresholds
        at the quantiles of one step's values.
        """
        program = self._program(method)
        spec = _spec(program, self.shape.vocabulary)
        graph = program.graphs[SPARSE].graph
        for node in graph.find_nodes(op="call_function", target=sirius.topk_mlp.default):
            node.args = (*node.args[:-1], round(self.shape.neurons * (1 - skipped)))
        documents = self._documents(program)
        weights = {name: self._weight(weight) for name, weight in program.weights.items()}
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        if method in (Method.CATS, Method.TEAL, Method.GRIFFIN_TEAL):
            learner = EagerBackend(spec, documents, weights, **options)
            found = self._thresholds(learner, skipped)
            for node, value in zip(_counted(graph), found, strict=True):
                node.args = (*node.args[:-1], value)
            documents = self._documents(program)
        return make(spec, documents, weights, **options)

    def state(self, backend: EagerBackend, context: int, skipped: float = 0.0) -> TensorState:
        """One row after `context` random tokens, with random neurons."""
        state = TensorState(backend, 1, cache_slots(context, 64, 4))
        for cache in (state.k_cache, state.v_cache):
            cache.normal_()
        if any(i.name == "neurons" for i in backend.program.entry(SPARSE).inputs):
            state.neurons = self._neurons(skipped)
        state.length.fill_(context)
        state.root.fill_(7)
        return state

    def _program(self, method: Method) -> Program:
        if method not in self._made:
            program = copy_program(self._captured.program)
            constants = self._captured.constants
            for name, weight in program.weights.items():
                if not weight.retype:
                    dtype = str(constants[name].dtype).removeprefix("torch.")
                    program.update_weight(name, dtype=dtype)
            passes = [*front(method), *sparsify(method, 0.5, None), LayOutWeights()]
            if self.draft_bits is not None:
                passes.append(NestWeights(self.draft_bits))
            run_passes(program, passes)
            self._made[method] = program
        return self._made[method]

    def _documents(self, program: Program) -> Mapping[str, JSON]:
        return {name: to_document(program.graphs[name]) for name in (SPARSE, FULL)}

    def _weight(self, spec: WeightSpec) -> Tensor:
        constant = self._captured.constants.get(spec.name)
        if constant is not None:
            return constant.to(self.device, dtype_of(spec.dtype))
        if spec.nested:
            return self._nested(spec)
        if spec.name not in self._pool:
            count = math.prod(spec.shape)
            if self.device.type == "cpu":
                values = in_large_pages(count, self.dtype)
            else:
                values = torch.empty(count, dtype=self.dtype, device=self.device)
            self._pool[spec.name] = (
                values.fill_(1) if len(spec.shape) == 1 else values.normal_(std=0.02)
            )
        return self._pool[spec.name].view(spec.shape)

    def _nested(self, spec: WeightSpec) -> Tensor:
        """Random nibbles, and scales about 0.0003 that make weights about 0.02."""
        key = f"{spec.name} {spec.nested}"
        if key not in self._pool:
            planes = in_large_pages(math.prod(spec.shape), torch.uint8).view(spec.shape)
            planes.random_()
            inputs = matrix_shape(spec.shape)[1]
            by_outputs = spec.nested is Layout.BY_OUTPUTS
            scales = planes[..., inputs // 2 :] if by_outputs else planes[:, :, GROUP:]
            scales[0].random_(0x1A, 0x1D)
            self._pool[key] = planes
        return self._pool[key]

    def _neurons(self, skipped: float) -> Tensor:
        count = round(self.shape.neurons * (1 - skipped))
        order = torch.rand(self.shape.layers, 1, self.shape.neurons, device=self.device).argsort(-1)
        return order[..., :count].sort().values

    def _thresholds(self, backend: EagerBackend, skipped: float) -> list[float]:
        state = self.state(backend, 8, skipped)
        entry = backend._entries[SPARSE]
        learner = Thresholds(entry.module, skipped)
        entry.runs = learner.run  # type: ignore[assignment]
        state.step(SPARSE)
        return learner.found


_COUNTED = {row.overload: row for row in OPERATORS.values() if row.has_threshold}


class Thresholds(fx.Interpreter):
    """Runs a sparse step, and sets each site's threshold to skip a share of its scores. Later sites
    see the output with that threshold.
    """

    def __init__(self, module: fx.GraphModule, skipped: float) -> None:
        super().__init__(module)
        self._skipped = skipped
        self.found: list[float] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _COUNTED:
            scores = _COUNTED[target].scores
            assert scores is not None
            score = scores(*args).mean(1).float()
            self.found.append(score.quantile(self._skipped).item())
            args = (*args[:-1], self.found[-1])
        return super().call_function(target, args, kwargs)


def _counted(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in _COUNTED]


def _spec(program: Program, vocabulary: int) -> ProgramSpec:
    weights = program.weights.values()
    return ProgramSpec(
        model=ModelSpec(
            "random", None, "llama", DType.BFLOAT16, vocabulary, 8192, parameters(program)
        ),
        entries=program.entries(),
        weights=tuple(replace(w, dtype="bfloat16" if w.retype else w.dtype) for w in weights),
        state=program.state,
        sparsity=program.sparsity,
        period=PeriodSpec(),
        eos_token_ids=(),
        pad_token_id=None,
        passes=(),
        tools=ToolVersions("0", torch.__version__, transformers.__version__),
    )
