"""Sizes at which kernels are tested: published models' layers, and what crosses the code's borders.

The borders are read from the constants of ``csrc``: who changes one changes the shapes with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sirius_runtime.kernels import build

TOKENS = (1, 2, 3, 8, 16, 33, 47)
THREADS = (1, 2, 3, 5)


@dataclass(frozen=True)
class Model:
    """The sizes of a published decoder's layers, from its config.json."""

    name: str
    hidden: int
    neurons: int
    heads: int
    groups: int
    head: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the projections, of the MLP's linears and of the head."""
        wide, narrow = self.heads * self.head, self.groups * self.head
        return [
            (self.hidden, wide),
            (self.hidden, narrow),
            (wide, self.hidden),
            (self.hidden, self.neurons),
            (self.neurons, self.hidden),
            (self.hidden, self.vocabulary),
        ]


MODELS = (
    Model("Qwen2.5-0.5B", 896, 4864, 14, 2, 64, 151_936),
    Model("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128_256),
    Model("Qwen2.5-1.5B", 1536, 8960, 12, 2, 128, 151_936),
    Model("gpt2-xl", 1600, 6400, 25, 25, 64, 50_257),
    Model("gemma-2-2b", 2304, 9216, 8, 4, 256, 256_000),
    Model("phi-2", 2560, 10_240, 32, 32, 80, 51_200),
    Model("Mistral-7B-v0.1", 4096, 14_336, 32, 8, 128, 32_000),
    Model("falcon-7b", 4544, 18_176, 71, 1, 64, 65_024),
    Model("Llama-2-13b", 5120, 13_824, 40, 40, 128, 32_000),
    Model("Llama-3.1-70B", 8192, 28_672, 64, 8, 128, 128_256),
)

MIXTURES = {
    "Qwen3-30B-A3B": (2048, 768),
    "DeepSeek-V2-Lite": (2048, 1408),
    "Mixtral-8x7B": (4096, 14_336),
}
"""Hidden size, and neurons of an expert."""


def _constant(header: str, name: str) -> int:
    """What ``constexpr size_t NAME = …`` says in that header, of numbers alone."""
    text = (build._SOURCES / header).read_text()
    found = re.search(rf"constexpr size_t [^;]*\b{name} = (\d+)[,; ]", text)
    assert found is not None, f"{header} has no constant {name}"
    return int(found[1])


_OUTPUTS = _constant("linear.h", "BLOCK")  # outputs of a task of linears by outputs
_CHANNELS = _constant("linear.h", "CHUNK")  # channels of a unit of linears by inputs
_NEURONS = _constant("mlp.h", "CHUNK")
_WIDEST = _constant("products.h", "WIDEST")  # columns of a block of sums
_PAD = _constant("products.h", "PAD")
_LIVE = _constant("products.h", "LIVE")
_SLOTS = _constant("attention.h", "BLOCK")
_COLUMNS = 256  # of a block of activations

PARTS = 8 * max(THREADS)  # that sums are made in

LINEARS = (
    (1, 2 * _WIDEST + 1),
    (7, 1),
    (4 * _CHANNELS + _LIVE + 1, _WIDEST + _PAD + 1),
    (2 * _COLUMNS + _PAD + 3, 3 * _OUTPUTS + 1),
    (_CHANNELS * PARTS + 3, _PAD + 1),
)
"""Inputs and outputs: the last, the next and the first of a block, a task, a thread, alone and
several, in both directions."""

MLPS = ((2 * _COLUMNS + _PAD + 3, _NEURONS * PARTS // 2 + 5), (_WIDEST + _PAD + 1, _NEURONS + 1))
"""Channels and neurons, likewise."""

HISTORIES = (0, _SLOTS - 1, _SLOTS, 3 * _SLOTS + 5)
"""Tokens before a call of attention."""
