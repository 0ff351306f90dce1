"""The back end that runs a graph operator by operator, in PyTorch.

On the CPU the `sirius::` operators have kernels, and the graph is rewritten before it runs so that
more of it uses kernels (`sirius_runtime.backends.rewrite`). Graphs on disk, and graphs that are
passed to a compiler, are not rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from sirius_runtime.backends.rewrite import with_kernels
from sirius_runtime.backends.tape import Spare, Tapes
from sirius_runtime.by_entries import ByEntries, chooser
from sirius_runtime.decoder import Decoder, Way, steps
from sirius_runtime.errors import ArtifactError, SiriusError
from sirius_runtime.graph import INPUT, WEIGHT, from_document, write_code
from sirius_runtime.graph_check import check_graph
from sirius_runtime.one_graph import OneGraph
from sirius_runtime.operators import OPERATORS
from sirius_runtime.plan import Limits
from sirius_runtime.request import Request
from sirius_runtime.scorer import Scorer
from sirius_runtime.sizes import cache_slots
from sirius_runtime.spec import JSON, ProgramSpec
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tensor_state import TensorState


class EagerBackend:
    """Runs the graphs node by node over one copy of each weight."""

    limits: Limits | None = None
    explains = True
    looks_up = True
    stream_seconds = 0.0
    repeats = True
    """Whether equal calls do equal work, so that tapes may replay them."""

    def __init__(
        self,
        program: ProgramSpec,
        documents: Mapping[str, JSON],
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`documents`: each entry's graph; `weights`: the stored tensors, used in place where dtype
        and device are already those asked for.

        Raises ArtifactError where a graph does not fit the inputs and weights that the program
        declares.
        """
        self.program, self.dtype, self.device = program, dtype, device
        modules = {name: from_document(graph, dtype, device) for name, graph in documents.items()}
        for name, module in modules.items():
            check_graph(program, program.entry(name), module, dtype)
        self.weights = self._own(weights)
        self._entries = {name: Entry(module, self.weights) for name, module in modules.items()}
        self._outputs = {e.name: [o.name for o in e.outputs] for e in program.entries}
        self._tapes, self._spare = Tapes(), Spare()

    def _own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights with the dtype and device that the graphs take; stored tensors are used in
        place where they have these already.
        """
        return {
            spec.name: weights[spec.name].to(
                device=self.device, dtype=self.dtype if spec.retype else weights[spec.name].dtype
            )
            for spec in self.program.weights
        }

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def open(self, request: Request, rows: int, tokens: int, clock: PhaseClock) -> Decoder:
        period, limits = request.period, self.limits
        graph = OneGraph(limits) if limits is not None and request.whole_periods else None
        if graph is not None and limits is not None:
            period, tokens = limits.period, limits.context or tokens  # the compiled sizes
        slots = cache_slots(tokens, period, max(request.widths))
        scorer = None
        if request.scoring is not None:
            scorer = Scorer(request, rows, slots, self.program.model.vocab_size, self.device)
        choose = chooser(request.plan.sampling, scorer)
        again = self.repeats and self.device.type == "cpu" and rows == 1 and graph is None
        with torch.inference_mode():
            state = self._spare.state(self, slots) if again else TensorState(self, rows, slots)
        return Decoder(
            state,
            {Way.DRAFT: graph or ByEntries(scorer), **steps(choose)},
            choose,
            clock,
            refresh=request.refresh,
            rows=graph.limits.rows if graph else None,
            resizable=graph is None,
            scorer=scorer,
        )

    @torch.inference_mode()
    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bound, on_cpu = self._entries[entry], self.device.type == "cpu"
        with blaming_the_graph(entry):
            if bound.runs is None:
                bound.runs = with_kernels(bound.module) if on_cpu else write_code(bound.module)
            if on_cpu and self.repeats and not bound.reads:
                return self._named(entry, self._tapes.run(entry, bound.run, inputs))
            return self._named(entry, bound.run(inputs))

    def _named(self, entry: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._outputs[entry], values, strict=True))


_FAULTS = (
    *(RuntimeError, ValueError, TypeError, LookupError, ArithmeticError),
    *(AttributeError, AssertionError),
)


@contextmanager
def blaming_the_graph(entry: str) -> Iterator[None]:
    """Turns an error of a running graph into an ArtifactError. Such errors depend on the values in
    tensors (an index out of range), so no check finds them before. Running out of memory is not the
    graph's fault; that error is raised as it is.
    """
    try:
        yield
    except (SiriusError, torch.OutOfMemoryError, MemoryError):
        raise
    except _FAULTS as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        if "allocate memory" in reason:
            raise
        raise ArtifactError(
            f"graph {entry!r} failed as it ran ({reason:.300}); the artifact may be damaged: "
            "compile the model again"
        ) from error


aten = torch.ops.aten


class Entry:
    """A graph whose weights, and slices of weights, are bound to its arguments once."""

    def __init__(self, module: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
        self.module = module
        self.runs: fx.GraphModule | None = None  # `module` rewritten for the device, at first use
        self.bound: list[Tensor | None] = []  # the graph's arguments; None for inputs
        self._inputs: list[tuple[int, str]] = []
        called = {getattr(node.target, "_opname", "") for node in module.graph.nodes}
        self.reads = any(row.reads for name, row in OPERATORS.items() if name in called)
        """Whether Python reads values of its tensors: its runs are not replayed."""
        for index, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
            if WEIGHT in node.meta:
                name = node.meta[WEIGHT]
                if name not in weights:
                    raise ArtifactError(f"a graph reads weight {name!r}, which is not stored")
                self.bound.append(weights[name])
            else:
                self.bound.append(None)
                self._inputs.append((index, node.meta[INPUT]))
        self._bind_views()

    def _bind_views(self) -> None:
        """Makes each slice of a weight an argument of its own: slicing at every step takes longer
        than a small linear. Transposes stay in the graph: linears with a transposed weight have
        their own kernel, and are not joined.
        """
        graph = self.module.graph
        placed = graph.find_nodes(op="placeholder")
        bound = {
            node: value for node, value in zip(placed, self.bound, strict=True) if value is not None
        }
        last = placed[-1] if placed else None
        for node in list(graph.nodes):
            if node.target is not aten.slice.Tensor or node.kwargs or node.args[0] not in bound:
                continue
            if node.all_input_nodes != [node.args[0]]:
                continue
            value = node.target(bound[node.args[0]], *node.args[1:])
            with graph.inserting_after(last):
                last = graph.placeholder(node.name)
            last.meta.update(node.meta)
            bound[last] = value
            self.bound.append(value)
            node.replace_all_uses_with(last)
            graph.erase_node(node)

    def run(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Runs the graph; returns its outputs."""
        assert self.runs is not None
        outputs: Sequence[Tensor] = self.runs(*self.arguments(inputs))
        return outputs

    def arguments(self, inputs: Mapping[str, Tensor]) -> list[Tensor | None]:
        """The graph's positional arguments: weights, and `inputs` by name."""
        arguments = self.bound.copy()
        for index, name in self._inputs:
            arguments[index] = inputs[name]
        return arguments
