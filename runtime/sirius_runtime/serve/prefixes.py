"""The prefix cache: the K/V of prompts' first blocks, for prompts with the same beginning.

Prompts are prefilled in blocks of equal size. A block's K/V is stored under a digest of all tokens
up to its end, so that it is only found after the same tokens. A prompt copies the blocks that it
finds instead of running them. Block boundaries do not depend on the cache, so that the result is
bit-equal with and without it.
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
    """The K/V of a block of P tokens: k, v [layers, 1, G, P, D], and the block's contribution to
    griffin's neuron statistic [layers, 1, I] (None for other sparse paths).
    """

    k: Tensor
    v: Tensor
    statistic: Tensor | None

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        statistic = 0 if self.statistic is None else self.statistic.nbytes
        return self.k.nbytes + self.v.nbytes + statistic


class PrefixCache:
    """Blocks by digest, of at most `bound` bytes in all; the least recently used are evicted.

    Not thread-safe.
    """

    def __init__(self, bound: int) -> None:
        self.bound, self.nbytes = bound, 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, digest: bytes) -> Block | None:
        """The block with that digest, if it is cached."""
        return self._blocks.get(digest)

    def put(self, digest: bytes, block: Block) -> None:
        """Adds a block as the most recently used one. A block larger than the bound is not kept."""
        if block.nbytes > self.bound or digest in self._blocks:
            return
        self._blocks[digest] = block
        self.nbytes += block.nbytes
        while self.nbytes > self.bound:
            _, oldest = self._blocks.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def used(self, digests: Sequence[bytes]) -> None:
        """Marks a prompt's blocks, given in order, as used; the first becomes the most recent. A
        block is useless without those before it, so that later blocks are evicted first.
        """
        for digest in reversed(digests):
            if digest in self._blocks:
                self._blocks.move_to_end(digest)


def digests(tokens: Sequence[int], size: int) -> list[bytes]:
    """For each whole block of `size` tokens, the SHA-256 digest of all tokens up to its end."""
    found, running = [], hashlib.sha256()
    for end in range(size, len(tokens) + 1, size):
        running.update(np.array(tokens[end - size : end], np.int64).tobytes())
        found.append(running.digest())
    return found
