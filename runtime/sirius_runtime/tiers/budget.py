"""The part of a memory budget that is left for weights: the budget minus the process's resident
memory, the caches of a request, and the activations of a step.
"""

from __future__ import annotations

import re
from pathlib import Path

from sirius_runtime.errors import ConfigError, shown
from sirius_runtime.request import AUTO_PERIOD, AUTO_WIDTHS
from sirius_runtime.sizes import PREFILL_CHUNK, cache_slots
from sirius_runtime.spec import ProgramSpec

DEFAULT_CONTEXT = 2048
"""Default number of tokens, prompt and answer, whose caches a budget includes."""

_WORKING = 64 * 2**20
"""Bytes for everything else: threads' stacks, code that is loaded later, unused memory of the
allocator.
"""

_UNITS = {
    **{name: 1024**power for power, name in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))},
    **{name: 1000**power for power, name in enumerate(("kB", "MB", "GB", "TB"), 1)},
}
_SIZE = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})?\s*", re.IGNORECASE)


def read_size(size: int | str, name: str) -> int:
    """The bytes of ``6GiB``, ``500MB``, or a number of bytes. Raises ConfigError, naming `name`,
    for anything else.
    """
    if isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        units = {unit.lower(): factor for unit, factor in _UNITS.items()}
        size = int(float(match[1]) * units[(match[2] or "B").lower()])
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(
            f"{name} must be a size such as 6GiB, 500MB or a number of bytes, got "
            f"{shown(str(size))}"
        )
    return size


def in_units(size: float) -> str:
    """A number of bytes as text in KiB, MiB or GiB."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.2f} {unit}"
    return f"{size:.0f} B"


def resident() -> int:
    """Resident memory of the process, in bytes."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not Linux: the peak is the only number there is

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def caches(program: ProgramSpec, itemsize: int, context: int, rows: int = 1) -> int:
    """Bytes of KV cache for `rows` rows of `context` tokens and the largest period."""
    return cache_bytes(
        program, itemsize, rows * cache_slots(context, AUTO_PERIOD, max(AUTO_WIDTHS))
    )


def cache_bytes(program: ProgramSpec, itemsize: int, slots: int) -> int:
    """Bytes of KV cache for so many slots."""
    state = program.state
    width = state.key_dim + state.value_dim
    return state.layers * state.kv_heads * width * slots * itemsize


def reserve(program: ProgramSpec, itemsize: int, context: int, rows: int = 1) -> int:
    """Bytes for the caches of `rows` rows of `context` tokens and the activations of the largest
    step.

    A prompt chunk holds a few activations of the widest layer in float32. A period's logits are in
    float32.
    """
    nodes = rows * max(AUTO_PERIOD, program.period.period) * max(program.period.tree_width, 1)
    vocabulary = program.model.vocab_size
    matrices = [w for w in program.weights if w.parameter and len(w.shape) > 1]
    inner = [w for w in matrices if vocabulary not in w.shape]
    widest = max((max(w.shape[-2:]) for w in inner), default=0)
    chunk = min(PREFILL_CHUNK, context)
    return (
        caches(program, itemsize, context, rows)
        + 4 * chunk * widest * 4
        + 3 * nodes * vocabulary * 4
        + _WORKING
    )
