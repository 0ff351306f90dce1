"""Chooses which weights are held in fast memory; the others are streamed at every use.

A block is a tensor, or one plane of a nested weight. It is held or streamed as a whole. An entry's
calls read their blocks in a fixed order. Blocks that are not held are copied into a ring buffer
ahead of the call that reads them. Holding a block saves its bytes times the number of passes that
read it in a period: the high planes are read by every draft step and by verification, the low
planes once per period.

Of an MLP whose neurons a prompt chooses (griffin), a third way is to hold only the chosen rows of a
block. They are moved in once per prompt, and drafts read them; verification streams the block. For
a kept share of 0.5 and a period of 16, the rows save 15 / 0.5 bytes per byte held, and the whole
block 16.

This module is pure Python: `sirius inspect --placement` prints a table without reading weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sirius_runtime.entries import SPARSE
from sirius_runtime.errors import ConfigError

PAGE = 4096
"""Direct reads begin and end at multiples of this, in the file and in memory."""

CHOSEN = "sparse, chosen"
"""The sparse entry where the prompt's rows are held."""

MOVING = "moving in"
"""The pass that moves the prompt's rows in."""

_GOLDEN = 0.6180339887498949  # the fractional parts of its multiples are spread evenly


class Block(NamedTuple):
    """Bytes [start, end) of the file that hold a weight, or one plane of it."""

    weight: str
    plane: int
    start: int
    end: int

    @property
    def first(self) -> int:
        """The file offset at which a direct read of the block begins."""
        return self.start // PAGE * PAGE

    @property
    def room(self) -> int:
        """Bytes in memory for a direct read of the block."""
        return -(-self.end // PAGE) * PAGE - self.first


Step = tuple[Block, ...]
"""The blocks that one call reads, or several successive calls that share blocks."""


@dataclass(frozen=True)
class Needs:
    """The blocks that the entries read. `steps`: each entry's steps, in order. `pinned`: blocks
    that must be held. `passes`: the passes of each entry in a period. `rows`: blocks of embeddings,
    of which a pass reads only single rows, at almost no cost. `chosen`: the bytes of a prompt's
    rows of a block, for blocks of which drafts read only these.
    """

    steps: Mapping[str, tuple[Step, ...]]
    pinned: frozenset[Block]
    passes: Mapping[str, float]
    rows: frozenset[Block] = frozenset()
    chosen: Mapping[Block, int] = field(default_factory=dict)

    def reads(self) -> dict[Block, float]:
        """How often a period reads each block that may be streamed."""
        found: dict[Block, float] = {}
        for entry, steps in self.steps.items():
            for step in steps:
                for block in step:
                    found[block] = found.get(block, 0.0) + self.passes[entry]
        return found


@dataclass(frozen=True)
class Placement:
    """A placement. `held`: the held blocks. `steps`: each entry's streamed blocks, without steps
    that stream nothing. `ring`: bytes of the ring buffer. `streamed`: bytes streamed per period.
    `chosen`: the blocks of which a prompt's rows are held, and the memory for these.
    """

    held: frozenset[Block]
    steps: Mapping[str, tuple[Step, ...]]
    ring: int
    streamed: float
    chosen: Mapping[Block, int] = field(default_factory=dict)

    @property
    def memory(self) -> int:
        return room_of(self.held) + sum(self.chosen.values()) + self.ring

    @property
    def drafts(self) -> str:
        """The entry that drafts of a single prompt run."""
        return CHOSEN if self.chosen else SPARSE

    def bytes_of(self, entry: str) -> int:
        """Bytes that a pass of the entry streams."""
        return sum(block.end - block.start for step in self.steps[entry] for block in step)


def room_of(blocks: Iterable[Block]) -> int:
    return sum(block.room for block in blocks)


def least_room(needs: Needs) -> int:
    """The least bytes of a placement: those of the pinned blocks and of the largest step."""
    return room_of(needs.pinned) + _Steps(needs).largest


def place(needs: Needs, room: int, *, name: str = "room", extra: int = 0) -> Placement:
    """The placement within `room` bytes that streams the fewest bytes per period.

    Raises ConfigError where `room` is too small. The message names the least that works; `extra`:
    bytes that it adds to both numbers, for memory other than weights.
    """
    least = least_room(needs)
    if room < least:
        raise ConfigError(
            f"{name} {room + extra:,} bytes is too small: this model needs at least "
            f"{least + extra:,} bytes, for the weights that must be held and those of the largest "
            "call"
            + (f"; {extra:,} of these bytes are for memory other than weights" if extra else "")
            + "; raise it"
        )
    # Among blocks that are read equally often, tries both: those of large steps first, so that the
    # ring gets small; and small ones first, which fill the room.
    whole = room // PAGE * PAGE
    found = [_greedy(needs, whole, first) for first in (-1, 1)]
    return min(found, key=lambda placement: placement.streamed)


def _greedy(needs: Needs, room: int, sign: int) -> Placement:
    """Holds blocks, or a prompt's rows of them, in the order of bytes saved per byte while they
    fit. `sign`: -1 to prefer blocks of large steps among those that save equally many, 1 to prefer
    those of small steps.
    """
    reads, steps = needs.reads(), _Steps(needs)
    in_file = sorted(reads.keys() - needs.pinned, key=lambda one: one.start)
    # Streamed blocks are spread over the layers, so that they are read while others compute.
    spread = {one: index * _GOLDEN % 1.0 for index, one in enumerate(in_file)}
    offers = sorted(
        (offer for block in in_file for offer in _offers(needs, block, reads[block])),
        key=lambda one: (
            *(-one.saves, sign * steps.size_of(one.block), one.block.plane),
            *(spread[one.block], one.whole),
        ),
    )
    rest = sorted(needs.rows - reads.keys() - needs.pinned)
    held, used = set(needs.pinned), room_of(needs.pinned)
    chosen: dict[Block, int] = {}
    for _, block, whole in [*offers, *(_Offer(0.0, one, True) for one in rest)]:
        if not whole:
            if used + needs.chosen[block] + steps.ahead <= room:
                chosen[block] = needs.chosen[block]
                used += chosen[block]
            continue
        # Kernels need the low plane behind the high one, so it is held only if that is held.
        high = block.plane == 0 or any(
            one.weight == block.weight and one.plane < block.plane for one in held
        )
        more = block.room - chosen.get(block, 0)
        steps.hold(block)
        if high and used + more + steps.ahead <= room:
            held.add(block)
            chosen.pop(block, None)
            used += more
        else:
            steps.release(block)
    left = {
        entry: tuple(
            kept
            for step in all_of
            if (kept := tuple(b for b in step if b not in held and _streams(entry, b in chosen)))
        )
        for entry, all_of in needs.steps.items()
    }
    longest = max((sum(map(room_of, all_of)) for all_of in left.values()), default=0)
    placement = Placement(frozenset(held), left, min(room - used, longest), 0.0, chosen)
    streamed = sum(count * placement.bytes_of(entry) for entry, count in needs.passes.items())
    return replace(placement, streamed=streamed)


def _streams(entry: str, chosen: bool) -> bool:
    """Whether an entry streams a block that is not held; chosen: whether a prompt's rows are."""
    return chosen if entry == MOVING else not (chosen and entry == CHOSEN)


class _Offer(NamedTuple):
    """A block that may be held, `whole` or the rows that a prompt chooses. `saves`: bytes that this
    saves per period and byte held.
    """

    saves: float
    block: Block
    whole: bool


def _offers(needs: Needs, block: Block, reads: float) -> tuple[_Offer, ...]:
    """`reads`: how often a period reads the block."""
    size, rows = block.room, needs.chosen.get(block, 0)
    drafts = needs.passes[CHOSEN] if rows else 0.0
    if not rows < size or drafts * size <= reads * rows:
        return (_Offer(reads, block, True),)
    # If the whole block is held after all, its rows need not be.
    rest = (reads - drafts) * size / (size - rows)
    return (_Offer(drafts * size / rows, block, False), _Offer(rest, block, True))


class _Steps:
    """The ring bytes that each step needs, updated as blocks become held."""

    def __init__(self, needs: Needs) -> None:
        self._sizes = {entry: [0] * len(steps) for entry, steps in needs.steps.items()}
        self._places: dict[Block, list[tuple[str, int]]] = {}
        for entry, steps in needs.steps.items():
            for index, step in enumerate(steps):
                for block in step:
                    if block not in needs.pinned:
                        self._places.setdefault(block, []).append((entry, index))
                        self._sizes[entry][index] += block.room

    def hold(self, block: Block) -> None:
        self._add(block, -block.room)

    def release(self, block: Block) -> None:
        self._add(block, block.room)

    def size_of(self, block: Block) -> int:
        """Ring bytes of the largest step that reads the block."""
        return max(self._sizes[entry][index] for entry, index in self._places[block])

    @property
    def largest(self) -> int:
        return max((size for sizes in self._sizes.values() for size in sizes), default=0)

    @property
    def ahead(self) -> int:
        """The most ring bytes of two successive steps: one is read while the other computes."""
        most = 0
        for sizes in self._sizes.values():
            before = 0
            for size in sizes:
                if size:
                    most = max(most, before + size)
                    before = size
        return most

    def _add(self, block: Block, size: int) -> None:
        for entry, index in self._places.get(block, ()):
            self._sizes[entry][index] += size
