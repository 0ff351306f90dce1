"""The K/V of prompts' beginnings, kept for prompts that begin alike.

Prompts are run in blocks of equal size from their start. A block's K/V is kept under a digest of
all tokens up to its end, so that it is only found behind the same tokens. Where a prompt finds it,
it is copied, and not run; a prompt runs in the same blocks either way, and its numbers are the
same to the bit.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """What a block of P tokens leaves: k, v [layers, 1, G, P, D], and its terms of the statistic of
    griffin's neurons [layers, 1, I], None for other sparse paths.
    """

    k: Tensor
    v: Tensor
    statistic: Tensor | None

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        statistic = 0 if self.statistic is None else self.statistic.nbytes
        return self.k.nbytes + self.v.nbytes + statistic


class PrefixCache:
    """Blocks by digest; the least recently used leave where all would take more than `bound` bytes.

    Not for several threads at once.
    """

    def __init__(self, bound: int) -> None:
        self.bound, self.nbytes = bound, 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, digest: bytes) -> Block | None:
        """The block of that digest."""
        return self._blocks.get(digest)

    def put(self, digest: bytes, block: Block) -> None:
        """Keeps a block, as the one that was used last. One larger than the bound is not kept."""
        if block.nbytes > self.bound or digest in self._blocks:
            return
        self._blocks[digest] = block
        self.nbytes += block.nbytes
        while self.nbytes > self.bound:
            _, oldest = self._blocks.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def used(self, digests: Sequence[bytes]) -> None:
        """Notes that a prompt used these blocks, its first one first. That becomes the latest: a
        block is of no use without those before it, so the last ones leave first.
        """
        for digest in reversed(digests):
            if digest in self._blocks:
                self._blocks.move_to_end(digest)


def digests(tokens: Sequence[int], size: int) -> list[bytes]:
    """Of each whole block of `size` tokens, one that stands for all tokens up to its end."""
    found, running = [], hashlib.sha256()
    for end in range(size, len(tokens) + 1, size):
        running.update(np.array(tokens[end - size : end], np.int64).tobytes())
        found.append(running.digest())
    return found
