"""Back ends that run a period as one graph: operator by operator, or compiled ahead of time."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.backends.eager import EagerBackend, blaming_the_graph
from sirius_runtime.backends.inductor_cache import check_name, keeps_code_in
from sirius_runtime.cache import CACHE_VARIABLE, cache_folder, is_own, private_folder
from sirius_runtime.errors import BackendError, ConfigError
from sirius_runtime.graph import write_code
from sirius_runtime.new_file import check_target, into_place
from sirius_runtime.plan import Limits
from sirius_runtime.sizes import cache_slots
from sirius_runtime.spec import JSON, ProgramSpec

PERIOD = "period"

Progress = Callable[[str], None]


class PeriodBackend(EagerBackend):
    """As `EagerBackend`, but a period is one call of the graph `period`, run node by node."""

    explains = False
    looks_up = False

    def __init__(
        self,
        program: ProgramSpec,
        documents: Mapping[str, JSON],
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(program, documents, weights, dtype=dtype, device=device)
        self.limits = Limits(program.period.period, program.period.tree_width)


class AotiBackend(PeriodBackend):
    """As `PeriodBackend`, with `period` compiled by AOTInductor for `rows` of `context` tokens.

    The machine code takes the weights as inputs, so memory holds one copy of them. It is built once
    and kept in the user's cache folder (``$SIRIUS_CACHE``, else ``~/.cache/sirius``). Its name is a
    hash of everything that it depends on.
    """

    def __init__(
        self,
        program: ProgramSpec,
        documents: Mapping[str, JSON],
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        context: int,
        progress: Progress,
    ) -> None:
        """Raises BackendError where the graph can't be compiled here."""
        super().__init__(program, documents, weights, dtype=dtype, device=device)
        own = program.period
        self.limits = Limits(own.period, own.tree_width, rows, context)
        try:
            folder = private_folder(cache_folder())
        except OSError as error:
            raise _not_kept(cache_folder(), error) from error
        path = folder / f"{_fingerprint(self, documents[PERIOD])}.pt2"
        if not is_own(path):
            _build(self, path, progress)
        try:
            self._compiled = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # a damaged file may raise any exception in the loader
            raise BackendError(
                f"the compiled period {path} can't be loaded ({error!r}); delete it, and it is "
                "built again"
            ) from error

    @torch.inference_mode()
    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if entry != PERIOD:
            return super().run(entry, inputs)
        with blaming_the_graph(entry):
            return self._named(entry, self._compiled(*self._entries[entry].arguments(inputs)))


def _fingerprint(backend: AotiBackend, document: JSON) -> str:
    """A hash of everything that the machine code depends on; the weights' values are not part of
    it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if backend.device.type == "cuda":
        capability = torch.cuda.get_device_name(backend.device)
    identity = {
        "document": document,
        "weights": [[w.name, list(w.shape), w.dtype, w.retype] for w in backend.program.weights],
        "rows": backend.limits and backend.limits.rows,
        "context": backend.limits and backend.limits.context,
        "dtype": str(backend.dtype),
        "device": backend.device.type,
        "machine": [platform.machine(), capability],
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _build(backend: AotiBackend, path: Path, progress: Progress) -> None:
    """Compiles the period to `path`: to a temporary name first, then renamed."""
    limits = backend.limits
    assert limits is not None
    progress(
        f"compiling the period of {limits.period} tokens, width {limits.tree_width}, for "
        f"{limits.rows} rows of {limits.context} tokens; this takes a minute or more, once "
        f"(kept in {path.parent})"
    )
    from sirius_runtime.lowering import decompositions

    entry = backend._entries[PERIOD]
    inputs = {spec.name: spec for spec in backend.program.entry(PERIOD).inputs}
    extents = _extents(backend)
    examples = {
        name: torch.zeros(
            [extents.get(str(extent), extent) for extent in spec.shape],
            dtype=backend.dtype if spec.dtype == "model" else getattr(torch, spec.dtype),
            device=backend.device,
        )
        for name, spec in inputs.items()
    }
    check_name(Path(tempfile.gettempdir()), "TMPDIR")
    try:
        check_target(path)
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory(dir=path.parent) as scratch,
            tempfile.TemporaryDirectory() as code,  # else a shared name in /tmp
            keeps_code_in(Path(code)),
        ):
            warnings.simplefilter("ignore")  # torch's, about its own code
            program = torch.export.export(
                write_code(entry.module), tuple(entry.arguments(examples)), strict=False
            ).run_decompositions(decompositions())
            package = Path(scratch) / path.name
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
            package.chmod(0o600)  # under any umask: a file that others may write is never loaded
            into_place(package, path)
    except (OSError, ConfigError) as error:
        raise _not_kept(path.parent, error) from error
    except Exception as error:  # inductor raises whatever its compilers and torch raise
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise BackendError(
            f"AOTInductor can't compile the period here ({reason:.300}); it "
            "needs a C++ compiler (g++ or clang++). Use backend period or eager"
        ) from error
    progress("compiled")


def _not_kept(folder: Path, error: OSError | ConfigError) -> BackendError:
    return BackendError(
        f"the compiled period can't be kept in {folder} ({error}); name another folder in the "
        f"environment variable {CACHE_VARIABLE}"
    )


def _extents(backend: AotiBackend) -> dict[str, Any]:
    """The sizes that the letters in the period's shapes stand for."""
    program, limits = backend.program, backend.limits
    assert limits is not None
    assert limits.context is not None
    state, sparsity = program.state, program.sparsity
    return {
        "B": limits.rows,
        "S": cache_slots(limits.context, limits.period, limits.tree_width),
        "K": limits.period,
        "layers": state.layers,
        "G": state.kv_heads,
        "D": state.key_dim,
        "Dv": state.value_dim,
        "I": sparsity.neurons,
        "kept": sparsity.kept_neurons,
    }
