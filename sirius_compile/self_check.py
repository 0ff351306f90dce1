"""Compares a compiled program on the CPU kernels with the same program on reference operators.

A prompt runs through the entry `prefill`. Then tokens run through `sparse`, `full` and `observe`:
one token, as in a draft step, and as many tokens as a verification has. Each run is computed twice:
by the kernels, in the graphs of the eager back end, and by the reference operators.

The logits are compared token by token, by their cosine, and by the likeliest token if the
reference's margin is larger than rounding explains. If they differ, the run is repeated, and each
kernel is compared with its reference on the same inputs (`sirius_compile.operator_check`); the
first wrong kernel is an error. If none is wrong, rounding made the difference, for instance by
routing a token to another expert, and the check passes. The entry `period` has the same operators
except `block_attention`, which is compared on the inputs of `full`'s attention.

Measured on Qwen2.5-Coder-0.5B (24 layers), 1 minus the lowest cosine of a token's logits:

    bfloat16   dense 1.7e-4, topk 1.1e-3, teal 1.8e-3 (scores at the border were rounded across)
    float16    dense 8.8e-7, topk 6.1e-4
    float32    dense 1.0e-12, topk 2.0e-13
    injected bugs, bfloat16: the linears' last 32 columns zero 1.8e-2; 2,048 columns wrong 1.07

By operator on the same inputs, the largest relative error was 8.3e-3 in bfloat16 (attention; 3.1e-2
is allowed), 8.8e-4 in float16 (3.9e-3 allowed) and 2.1e-5 in float32 (1.5e-4 allowed). For topk it
was 6.3e-2 where scores at the border were rounded across. 32 of 896 columns set to zero are 1.9e-1.

All runs go through the layers together. A weight is loaded when the first run reads it and dropped
after the last one, so only about one layer's weights are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from sirius_compile.operator_check import Difference, compare, name_of
from sirius_passes.program import FULL, OBSERVE, PERIOD, PREFILL, SPARSE
from sirius_runtime import nested
from sirius_runtime.backends.rewrite import with_kernels
from sirius_runtime.errors import KernelError
from sirius_runtime.graph import INPUT, WEIGHT, from_document
from sirius_runtime.kernels.arguments import BFLOAT16_TOKENS
from sirius_runtime.kernels.attention import block_attention, cached_attention_by_tokens
from sirius_runtime.kernels.linear import unnest
from sirius_runtime.kernels.native import kernels, references
from sirius_runtime.nested import GROUP
from sirius_runtime.policy import select_neurons
from sirius_runtime.spec import JSON, ProgramSpec, WeightSpec

PROMPT_TOKENS = 40
COSINE = {torch.float32: 0.99999, torch.float16: 0.998, torch.bfloat16: 0.995}
"""The lowest cosine of a token's logits that passes without comparing operators."""
NESTED_COSINE = 0.998
"""The same for nested weights, if lower than COSINE: rounding may move an activation to the
neighbouring integer. Measured 1 minus the cosine on tally-3m in float32: 7.0e-5."""

Fetch = Callable[[WeightSpec], Tensor]
"""Gives the stored form of a weight."""
Look = Callable[[fx.Node, Any, Sequence[Any], Any], None]
"""Called after each call of a graph, with its node, target, arguments and result."""


def check_kernels(
    spec: ProgramSpec, document: Callable[[str], JSON], weights: Fetch, dtype: torch.dtype
) -> None:
    """Raises KernelError, with the kernel's name, if a kernel differs from its reference.

    `document`: gives an entry's graph document. `weights`: gives a weight's stored form. Computes
    in `dtype` on the CPU.
    """
    _Check(spec, document, weights, dtype).run()


@dataclass(frozen=True)
class _Run:
    """An entry and its inputs, without the caches."""

    entry: str
    inputs: Mapping[str, Tensor]

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]


class _Check:
    def __init__(
        self,
        spec: ProgramSpec,
        document: Callable[[str], JSON],
        weights: Fetch,
        dtype: torch.dtype,
    ) -> None:
        self._spec, self._dtype = spec, dtype
        self._weights = _Weights(spec, weights)
        self._cosine = min(COSINE[dtype], NESTED_COSINE if spec.nested else 1.0)
        names = [e.name for e in spec.entries if e.name in (PREFILL, SPARSE, FULL, OBSERVE)]
        self._plain = {
            name: from_document(document(name), dtype, torch.device("cpu")) for name in names
        }
        self._fast = {name: with_kernels(module) for name, module in self._plain.items()}
        self._unnested: set[tuple[int, torch.Size]] = set()
        self._prompt = max(1, min(PROMPT_TOKENS, spec.model.max_seq_len - 1))
        self._period = min(spec.period.period, BFLOAT16_TOKENS)
        self._ids = torch.randint(
            spec.model.vocab_size,
            (1, self._prompt + self._period),
            generator=torch.Generator().manual_seed(0),
        )

    @torch.inference_mode()
    def run(self) -> None:
        caches = self._caches(), self._caches()
        prompt = self._after(0, PREFILL, self._prompt)
        walk = self._walk(self._fast, prompt, caches[0])
        together([walk])
        result = self._named(prompt.entry, walk.outputs)
        extra: dict[str, Tensor] = {}
        if "statistic" in result:
            extra["neurons"] = select_neurons(result["statistic"], self._spec.sparsity.kept_neurons)
        sparse = self._after(self._prompt, SPARSE, 1, **extra)
        blocks = [self._after(self._prompt, FULL, count) for count in sorted({1, self._period})]
        if OBSERVE in self._plain:
            blocks.append(self._after(self._prompt, OBSERVE, self._period))
        # One reference run of the full path serves all runs, as a token's logits don't depend on
        # later tokens. It comes first in `plain`, so it writes a layer's K/V for the prompt before
        # `sparse` reads them.
        whole = self._after(0, FULL, self._prompt + self._period)
        runs = [sparse, *blocks]
        fast = [self._walk(self._fast, run, caches[0], look=self._look(run)) for run in runs]
        plain = [
            self._walk(self._plain, run, caches[1], self._references) for run in (whole, sparse)
        ]
        together([*fast, *plain])
        full, other = (
            self._logits(run.entry, walk) for run, walk in zip((whole, sparse), plain, strict=True)
        )
        self._compare(prompt, result["logits"][0], full[self._prompt - 1 : self._prompt], caches[0])
        for run, walk in zip(runs, fast, strict=True):
            wanted = other if run is sparse else full[self._prompt :][: run.tokens]
            self._compare(run, self._logits(run.entry, walk), wanted, caches[0])

    def _logits(self, entry: str, walk: Walk) -> Tensor:
        """The logits [T, V] of a finished walk."""
        return self._named(entry, walk.outputs)["logits"][0]

    def _compare(self, run: _Run, found: Tensor, wanted: Tensor, caches: dict[str, Tensor]) -> None:
        if not agree(found, wanted, self._cosine):
            self._find(run, caches)

    @contextmanager
    def _references(self) -> Iterator[None]:
        """A context in which operators run as references.

        A kernel converts nested weights to numbers, because the conversion in torch would take most
        of the time. For each weight and each block size, the first and the last rows of one block
        are compared with torch's conversion.
        """

        def numbers(weight: Tensor) -> Tensor:
            plain = unnest(weight, torch.float32, library=library)
            if plain is None:
                return nested.unnest(weight)
            block = weight.untyped_storage().data_ptr(), weight.shape
            if block not in self._unnested:
                self._unnested.add(block)
                _check_numbers(weight, plain)
            return plain

        library = kernels()
        by = partial(nested.by_numbers, unnest=numbers)
        with references(), nested.multiplying(by):
            yield

    def _look(self, run: _Run) -> Look | None:
        """Compares `block_attention` on the arguments of each layer's cached attention."""
        if run.entry != FULL or all(entry.name != PERIOD for entry in self._spec.entries):
            return None

        def look(node: fx.Node, target: Any, arguments: Sequence[Any], value: Any) -> None:
            if name_of(target) != cached_attention_by_tokens.__name__:
                return
            q, k, v, *caches = arguments[:5]
            positions, _slots, length, mask, *rest = arguments[5:]
            blocks = (c.new_zeros(*c.shape[:3], mask.shape[2], c.shape[4]) for c in caches)
            nodes = torch.arange(q.shape[2])
            block = (q, k, v, *caches, *blocks, positions, nodes, length, mask, *rest)
            if not (found := compare(block_attention, block)).right:
                raise KernelError(self._message(run, node, block_attention, found))

        return look

    def _find(self, run: _Run, caches: dict[str, Tensor]) -> None:
        """Repeats a run and raises KernelError for the first wrong kernel."""

        def look(node: fx.Node, target: Any, arguments: Sequence[Any], value: Any) -> None:
            if name_of(target) and not (found := compare(target, arguments, value)).right:
                raise KernelError(self._message(run, node, target, found))

        together([self._walk(self._fast, run, caches, look=look)])

    def _message(self, run: _Run, node: fx.Node, target: Any, found: Difference) -> str:
        weights = [n.meta[WEIGHT] for n in _leaves(node) if WEIGHT in n.meta]
        of = f" of {', '.join(weights[:3])}" if weights else ""
        dtype = str(self._dtype).removeprefix("torch.")
        return (
            f"the CPU kernel of {name_of(target)}{of} differs from its reference "
            f"({found}; entry {run.entry}, tokens {run.tokens}, {dtype}). No artifact is written, "
            "because it would generate wrong text. Set SIRIUS_KERNELS=0 to compile and to run "
            "without the kernels, and report this with the model's config.json"
        )

    def _walk(
        self,
        modules: Mapping[str, fx.GraphModule],
        run: _Run,
        caches: Mapping[str, Tensor],
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
        look: Look | None = None,
    ) -> Walk:
        inputs = {**run.inputs, **caches}
        return Walk(modules[run.entry], inputs, self._weights.get, within, look)

    def _named(self, entry: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
        names = [output.name for output in self._spec.entry(entry).outputs]
        return dict(zip(names, values, strict=True))

    def _caches(self) -> dict[str, Tensor]:
        state = self._spec.state
        shape = (state.layers, 1, state.kv_heads, self._prompt + self._period)
        return {
            "k_cache": torch.zeros(*shape, state.key_dim, dtype=self._dtype),
            "v_cache": torch.zeros(*shape, state.value_dim, dtype=self._dtype),
        }

    def _after(self, length: int, entry: str, tokens: int, **extra: Tensor) -> _Run:
        """A chain of `tokens` tokens after `length` committed ones."""
        index = torch.arange(tokens)
        slots = (length + index)[None]
        return _Run(
            entry,
            {
                "input_ids": self._ids[:, length : length + tokens],
                "positions": slots.clamp(max=self._spec.model.max_seq_len - 1),
                "slots": slots,
                "length": torch.tensor([length]),
                "tree_mask": (index[:, None] - index).clamp(min=-1)[None],
                "last": torch.tensor([tokens - 1]),
                "valid": torch.ones(1, tokens, dtype=torch.bool),
                **extra,
            },
        )


def _check_numbers(weight: Tensor, plain: Tensor) -> None:
    """Raises KernelError unless the first and last rows of `plain` equal the nested `weight`."""
    outputs = len(plain)
    for rows in (slice(0, min(GROUP, outputs)), slice((outputs - 1) // GROUP * GROUP, outputs)):
        if not torch.equal(plain[rows], nested.unnest(nested.cut(weight, rows))):
            raise KernelError(
                "the CPU kernel that converts nested weights to numbers is wrong. No artifact is "
                "written. Set SIRIUS_KERNELS=0 to compile and to run without the kernels, and "
                "report this with the model's config.json"
            )


def agree(found: Tensor, wanted: Tensor, cosine: float) -> bool:
    """Whether logits [T, V] agree up to rounding, token by token.

    `cosine`: the lowest cosine that passes. A cosine of c corresponds to a relative error of about
    √(2 (1 - c)), so the gap between two logits may shrink by that share of their root mean square.
    Tokens for which `wanted` is not finite are not compared.
    """
    found, wanted = found.double(), wanted.double()
    known = wanted.isfinite().all(-1)
    found, wanted = found[known], wanted[known]
    near = torch.cosine_similarity(found, wanted, dim=-1) >= cosine
    near |= (found == wanted).all(-1)  # also if all are zero
    best, second = wanted.topk(2, -1).values.unbind(-1)
    error = (2 * (1 - cosine)) ** 0.5 * wanted.square().mean(-1).sqrt()
    near &= (found.argmax(-1) == wanted.argmax(-1)) | (best - second <= 2 * error)
    return bool(near.all())


class _Weights:
    """Weights in their stored form, loaded on request and kept while something refers to them."""

    def __init__(self, spec: ProgramSpec, fetch: Fetch) -> None:
        self._specs = {weight.name: weight for weight in spec.weights}
        self._fetch = fetch
        self._live: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def get(self, name: str) -> Tensor:
        found = self._live.get(name)
        if found is None:
            # An alias, because the tensor itself of a model in memory would never be dropped.
            found = self._live[name] = self._fetch(self._specs[name]).detach()
        return found


class Walk:
    """One run of a graph without control flow, which loads each weight when a call first reads it.

    `within`: makes the context in which calls run. After the last step, `outputs` holds the graph's
    outputs.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Mapping[str, Tensor],
        weight: Callable[[str], Tensor],
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
        look: Look | None = None,
    ) -> None:
        self._graph, self._inputs, self._weight = module.graph, inputs, weight
        self._within, self._look = within, look
        self.outputs: Sequence[Any] = ()

    def steps(self) -> Iterator[int]:
        """Runs the graph. Yields the number of weights loaded so far after loading each weight,
        before a call reads it.
        """
        env: dict[fx.Node, Any] = {}
        dead, taken = _last_readers(self._graph), 0
        for node in self._graph.nodes:
            if node.op == "placeholder":
                continue
            for value in node.all_input_nodes:
                if value.op == "placeholder" and value not in env:
                    if WEIGHT in value.meta:
                        env[value] = self._weight(value.meta[WEIGHT])
                        taken += 1
                        yield taken
                    else:
                        env[value] = self._inputs[value.meta[INPUT]]
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            if node.op == "output":
                self.outputs = args[0]
                return
            with self._within():
                env[node] = node.target(*args, **kwargs)
            if self._look is not None and not kwargs:
                self._look(node, node.target, args, env[node])
            del args, kwargs
            for value in dead.get(node, ()):
                env.pop(value, None)


def together(walks: Sequence[Walk]) -> None:
    """Runs `walks` side by side: the walk that has loaded the fewest weights always runs next."""
    steps = [walk.steps() for walk in walks]
    taken = dict.fromkeys(range(len(walks)), 0)
    while taken:
        index = min(taken, key=lambda i: taken[i])
        try:
            taken[index] = next(steps[index])
        except StopIteration:
            del taken[index]


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node → the values that it reads last. A value without readers is listed under itself."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        last = max(node.users, key=lambda user: order[user], default=node)
        found.setdefault(last, []).append(node)
    return found


def _leaves(node: fx.Node) -> list[fx.Node]:
    """The placeholders that a call reads, directly or through a view of one."""
    found: list[fx.Node] = []
    for value in node.all_input_nodes:
        if value.op == "placeholder":
            found.append(value)
        elif len(value.all_input_nodes) == 1:
            found += [n for n in value.all_input_nodes if n.op == "placeholder"]
    return found
