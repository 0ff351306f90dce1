"""An artifact's ONNX graphs and weights in ONNX Runtime.

Graphs are opened when they are first needed. On the CPU all graphs share the float32 weights of the
mapped artifact; prepacking, which would copy them, is switched off. Float16 weights are copied to
float32 by each open graph on the CPU, because the CPU's kernels compute in float32. On a GPU each
open graph holds its own copy of the weights that it reads, as every ONNX Runtime session does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sirius_runtime.artifact import Artifact, Slot
from sirius_runtime.errors import ArtifactError, BackendError
from sirius_runtime.onnx_files import (
    SELECT,
    WEIGHTS_FILE,
    array_of,
    graph_file,
    read_program,
    stored,
)
from sirius_runtime.onnx_nested import part_of
from sirius_runtime.plan import Limits
from sirius_runtime.spec import ProgramSpec

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_BFLOAT16 = 16  # ONNX's number of the one stored dtype that NumPy lacks
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_STAY = ("k_new", "v_new", "k_kept", "v_kept")
_PROBE = "pick"  # a graph without weights

Progress = Callable[[str], None]


@dataclass(frozen=True)
class HostClock:
    """The device as `PhaseClock` needs it: ONNX Runtime's calls return when their work is done."""

    type: str = "cpu"


class Graph(NamedTuple):
    """An `InferenceSession`, and the names of its inputs and outputs."""

    session: Any
    inputs: frozenset[str]
    outputs: tuple[str, ...]


class OnnxGraphs:
    """The graphs, opened when they are first needed, and their properties."""

    device = HostClock()

    def __init__(
        self,
        artifact: Artifact,
        *,
        providers: Sequence[str] | None,
        threads: int | None,
        progress: Progress,
    ) -> None:
        """providers: execution providers in order of preference; all must work. Default: CUDA where
        it works, else the CPU. progress: is called with a line that names the provider. threads:
        threads of one operator.

        Raises BackendError for an artifact without ONNX graphs, for a provider that is not
        available, and for graphs that the installed ONNX Runtime is too old for.
        """
        self._ort = _onnxruntime()
        self.program = artifact.program
        self._onnx = read_program(artifact)
        self.limits = Limits(self.program.period.period, self.program.period.tree_width)
        self.dtype = np.dtype(str(self._onnx.model.dtype))
        self.itemsize = self.dtype.itemsize
        self.kept = self._onnx.kept
        self._graphs = {name: artifact.read_bytes(graph_file(name)) for name in self._onnx.graphs}
        self._weights = _values(self._ort, self.program, *artifact.weight_slots())
        self.threads = threads or os.cpu_count() or 1  # an upper bound
        self._threads = threads or 0  # 0: ONNX Runtime chooses
        self._opened: dict[str, Graph] = {}
        self.providers = self._providers(providers, progress)

    @property
    def on_device(self) -> bool:
        """Whether state lives in a GPU's memory."""
        return self.providers[0] == CUDA

    def graph(self, name: str) -> Graph:
        """The graph of that name, opened."""
        if name not in self._opened:
            session = self._session(name, self.providers)
            self._opened[name] = Graph(
                session,
                frozenset(i.name for i in session.get_inputs()),
                tuple(o.name for o in session.get_outputs()),
            )
        return self._opened[name]

    def run(self, entry: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the graph `entry`; of `inputs` (arrays and `OrtValue`s) it takes those that it
        reads. Returns its outputs by name, without the prefix `next_` of a period's next state.
        Outputs are arrays, except those that only other graphs read: these stay on the device as
        `OrtValue`s.
        """
        session, reads, names = self.graph(entry)
        names = self.kept if entry == SELECT else names
        stay = names if entry == SELECT else _STAY
        binding = session.io_binding()
        for name in reads & inputs.keys():
            bind = binding.bind_cpu_input
            if not isinstance(inputs[name], np.ndarray):
                bind = binding.bind_ortvalue_input
            bind(name, inputs[name])
        for name in names:
            binding.bind_output(name, "cuda" if self.on_device and name in stay else "cpu")
        run_bound(entry, session, binding)
        outputs = zip(names, binding.get_outputs(), strict=True)
        return {
            name.removeprefix("next_"): value if name in stay else value.numpy()
            for name, value in outputs
        }

    def value(self, array: np.ndarray) -> Any:
        """`array` as an `OrtValue`: over the array's own memory on the CPU, a copy on a GPU."""
        if self.on_device:
            return self._ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _session(self, graph: str, providers: Sequence[str], *, quiet: bool = False) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        # A prepacked weight is a second copy, one for every graph. Nested weights need it: their
        # kernels take no others.
        if not self.program.nested:
            options.add_session_config_entry("session.disable_prepacking", "1")
        # Only errors: a user can't act on the optimiser's warnings.
        options.log_severity_level = 4 if quiet else 3
        # SELECT runs once a prompt: an arena would keep its temporary memory allocated.
        options.enable_cpu_mem_arena = graph != SELECT
        spec = self._onnx.graphs[graph]
        in_place, copied = list(spec.weights), list(spec.constants)
        if self.dtype != np.float32 and list(providers) == [CPU]:  # all become float32
            in_place, copied = [], in_place + copied
        for name in in_place:
            options.add_initializer(name, self._weights[name])
        if copied:
            options.add_external_initializers(copied, [self._weights[name] for name in copied])
        try:
            with tempfile.TemporaryDirectory() as folder:
                # The external data file that the graph names must exist, though it is not read.
                (Path(folder) / WEIGHTS_FILE).touch()
                options.add_session_config_entry(_WEIGHTS_FOLDER, folder)
                return self._ort.InferenceSession(
                    self._graphs[graph], options, providers=list(providers)
                )
        except Exception as error:  # the library's own classes share no public root
            raise BackendError(self._refusal(graph, error)) from error

    def _refusal(self, graph: str, error: Exception) -> str:
        own, program = self._ort.__version__, self._onnx
        reason = " ".join(str(error).split())
        return (
            f"onnxruntime {own} refuses the graph {graph!r} (ONNX opset {program.opset}, IR "
            f"version {program.ir_version}): {reason:.300}; if it is too old: pip install "
            "--upgrade onnxruntime; else use backend eager"
        )

    def _providers(self, wanted: Sequence[str] | None, progress: Progress) -> list[str]:
        available = self._ort.get_available_providers()
        for name in wanted or ():
            if name not in available:
                raise BackendError(
                    f"onnxruntime {self._ort.__version__} has no {name} here (it has: "
                    f"{', '.join(available)}); {_remedy(name)}"
                )
        found = CUDA in available and _has_driver()
        chosen = list(wanted) if wanted else [CUDA] * found
        for name in [n for n in chosen if n != CPU]:
            if name not in self._session(_PROBE, [name, CPU], quiet=True).get_providers():
                if wanted:
                    raise BackendError(
                        f"{name} can't be started here (no such device, or its libraries are "
                        f"missing); {_remedy(name)}, or leave providers out"
                    )
                chosen.remove(name)
        chosen = list(dict.fromkeys([*chosen, CPU]))  # runs the operators that the others can't
        progress(f"onnxruntime {self._ort.__version__} on {chosen[0]}")
        return chosen


def run_bound(graph: str, session: Any, binding: Any) -> None:
    """Runs a graph. An error of ONNX Runtime becomes an ArtifactError, unless memory ran out."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # the library's own classes share no public root
        reason = " ".join(str(error).split())
        if "allocate" in reason:
            raise
        raise ArtifactError(
            f"ONNX graph {graph!r} failed as it ran ({reason:.300}); the artifact may be damaged: "
            "compile the model again"
        ) from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"backend onnxruntime needs the package onnxruntime ({error}); pip install onnxruntime "
            "(or onnxruntime-gpu)"
        ) from error
    return onnxruntime


def _has_driver() -> bool:
    """Whether CUDA's driver is installed. Without it, ONNX Runtime prints many errors."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _remedy(provider: str) -> str:
    if provider == CUDA:
        return "pip install onnxruntime-gpu, with the CUDA and cuDNN versions that it names"
    return "install the build of onnxruntime that has it"


def _values(
    ort: Any, program: ProgramSpec, buffer: mmap.mmap, slots: Mapping[str, Slot]
) -> dict[str, Any]:
    """Each weight, and each expert's weight matrix, as an `OrtValue` over the mapped file. Only
    nested weights are read and copied, because ONNX needs their bytes in another order.
    """

    def value(array: np.ndarray, dtype: str) -> Any:
        if dtype == "bfloat16":
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(array)

    values = {}
    for own in stored(program):
        array: Any = array_of(buffer, slots[own.weight.name])
        if own.part is not None:
            array = part_of(own.weight, array, own.part)
        whole, *experts = own.names()
        values[whole] = value(array, own.spec.dtype)
        for name, matrix in zip(experts, array, strict=bool(experts)):
            values[name] = value(matrix, own.spec.dtype)
    return values
