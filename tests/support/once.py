"""What takes most of a tiny model's compilation, done once for all compilations alike.

These are torch.export of the model and the trace of a whole period. What comes out is the same, to
the byte (`tests/test_once.py`). Tests of either call `capture` or `BuildPeriod` themselves.

The kernels are compared with their references once for each family, method and dtype, which takes
half of what is left. `tests/test_self_check.py`, of that comparison, asks for it each time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import pytest
import torch
import torch._dynamo.config
from torch import fx, nn
from transformers import PretrainedConfig

from sirius_compile.capture import Capture, capture
from sirius_compile.self_check import Fetch, check_kernels
from sirius_passes.build_period import BuildPeriod
from sirius_passes.program import PERIOD, Program, copy_graph
from sirius_runtime.graph import to_document
from sirius_runtime.rules import RULES
from sirius_runtime.spec import JSON, ProgramSpec

_captured: dict[Hashable, Capture] = {}
_periods: dict[Hashable, fx.GraphModule] = {}
_checked: set[Hashable] = set()
_anew: list[bool] = []


def quick_traces() -> AbstractContextManager[object]:
    """Within it, PyTorch does not look up what an operator gave for fake tensors alike: where sizes
    are symbolic and layers are few, the look-up takes longer than the operator. A capture and a
    period of two layers take a quarter less, and come out the same; of twelve, as long.
    """
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


def capture_once(
    config: PretrainedConfig,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    live: nn.Module | None = None,
) -> Capture:
    """As `capture`; every call gives a program of its own. Code of a checkpoint's own may change
    under the same name, and is captured anew.
    """
    if _anew or not type(config).__module__.startswith("transformers."):
        with quick_traces():
            return capture(config, trust_remote_code=trust_remote_code, dtype=dtype, live=live)
    said = json.loads(config.to_json_string(use_diff=False))
    said.pop("_name_or_path", None)  # the folder that it lies in
    key = (type(config), json.dumps(said, sort_keys=True), dtype, _outline(live))
    if key not in _captured:
        with quick_traces():
            _captured[key] = capture(
                config, trust_remote_code=trust_remote_code, dtype=dtype, live=live
            )
    made, program = _captured[key], _captured[key].program
    graphs = {name: copy_graph(module) for name, module in program.graphs.items()}
    program = replace(program, graphs=graphs, weights=dict(program.weights))
    return replace(made, program=program, constants=dict(made.constants))


class BuildPeriodOnce(BuildPeriod):
    """As `BuildPeriod`; programs of the same graphs share the period's, which nothing rewrites."""

    def run(self, program: Program) -> int:
        documents = [to_document(module) for module in program.graphs.values()]
        options = (self.period, self.width, self.max_seq_len, program.sparsity, list(RULES))
        key = (json.dumps(documents), repr(options))
        if _anew or key not in _periods:
            with quick_traces():
                rewrites = super().run(program)
            _periods[key] = program.graphs[PERIOD]
            return rewrites
        program.graphs[PERIOD] = _periods[key]
        return 1


def check_kernels_once(
    spec: ProgramSpec, document: Callable[[str], JSON], weights: Fetch, dtype: torch.dtype
) -> None:
    """As `check_kernels`; programs of one family, method and dtype have the same operators."""
    key = (spec.model.model_type, spec.sparsity.method, spec.nested, dtype)
    if _anew or key not in _checked:
        check_kernels(spec, document, weights, dtype)
        _checked.add(key)


@contextmanager
def compiling_once() -> Iterator[None]:
    """Within it, the compiler's modules use these three."""
    instead: dict[str, tuple[object, object]] = {
        "capture": (capture, capture_once),
        "BuildPeriod": (BuildPeriod, BuildPeriodOnce),
        "check_kernels": (check_kernels, check_kernels_once),
    }
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for n, m in sys.modules.items() if n.startswith("sirius_compile.")]:
            for name, (own, once) in instead.items():
                if vars(module).get(name) is own and module.__name__ != own.__module__:
                    patch.setattr(module, name, once)
        yield


@contextmanager
def compiling_anew() -> Iterator[None]:
    """Within it, nothing made before is used: for tests of how it is made."""
    _anew.append(True)
    try:
        yield
    finally:
        _anew.pop()


def _outline(live: nn.Module | None) -> Hashable:
    """All that capture reads of a model in memory: its modules, and the kinds of its tensors."""
    if live is None:
        return None
    modules = tuple((path, type(module)) for path, module in live.named_modules())
    tensors = (*live.named_parameters(remove_duplicate=False), *live.named_buffers())
    return modules, tuple((name, t.dtype, tuple(t.shape)) for name, t in tensors)
