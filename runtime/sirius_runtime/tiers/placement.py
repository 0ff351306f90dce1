"""Which weights stay in fast memory, and which are streamed from the slow tier at every use.

A block is a tensor, or a plane of a nested one: what is held or streamed as a whole. An entry's
calls read their blocks in a fixed order; those that are not held are copied into a ring, ahead of
the call that reads them. A block that is held saves as many bytes a byte as passes read it: the
high planes are read by every draft step and by verification, the low planes once a period.

Pure Python: `sirius inspect --placement` asks for a table without reading a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from sirius_runtime.errors import ConfigError

PAGE = 4096
"""Direct reads begin and end at multiples of it in the file, and in memory."""

_GOLDEN = 0.6180339887498949  # its multiples, less their whole part, are spread evenly


class Block(NamedTuple):
    """Bytes [start, end) of the file that hold a weight, or one plane of it."""

    weight: str
    plane: int
    start: int
    end: int

    @property
    def first(self) -> int:
        """The file's offset at which a direct read of it begins."""
        return self.start // PAGE * PAGE

    @property
    def room(self) -> int:
        """Bytes that its read takes in memory."""
        return -(-self.end // PAGE) * PAGE - self.first


Step = tuple[Block, ...]
"""What one call reads of its weights, or calls that read the same ones."""


@dataclass(frozen=True)
class Needs:
    """What the entries read: `steps` of each, in order; `pinned` blocks, which have to stay; and
    the `passes` of each entry in a period. `rows`: blocks of embeddings of which passes gather
    rows, which costs next to nothing.
    """

    steps: Mapping[str, tuple[Step, ...]]
    pinned: frozenset[Block]
    passes: Mapping[str, float]
    rows: frozenset[Block] = frozenset()

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
    """`held`: what stays; `steps`: by entry, what is streamed, with the steps that stream nothing
    left out; `ring`: bytes of the ring; `streamed`: bytes a period streams.
    """

    held: frozenset[Block]
    steps: Mapping[str, tuple[Step, ...]]
    ring: int
    streamed: float

    @property
    def memory(self) -> int:
        return room_of(self.held) + self.ring

    def bytes_of(self, entry: str) -> int:
        """What a pass of the entry streams."""
        return sum(block.end - block.start for step in self.steps[entry] for block in step)


def room_of(blocks: Iterable[Block]) -> int:
    return sum(block.room for block in blocks)


def least_room(needs: Needs) -> int:
    """The bytes that a placement takes at least: what has to stay, and the largest step."""
    return room_of(needs.pinned) + _Steps(needs).largest


def place(needs: Needs, room: int, *, name: str = "room", extra: int = 0) -> Placement:
    """The placement within `room` bytes that streams the fewest bytes a period.

    Raises ConfigError where nothing fits; the message names the least, to which `extra` is added.
    """
    least = least_room(needs)
    if room < least:
        raise ConfigError(
            f"{name} {room + extra:,} bytes is too small: this model needs {least + extra:,} bytes "
            "at least, for what has to stay and the largest call's weights"
            + (f", and {extra:,} of them for what is no weight" if extra else "")
            + "; raise it"
        )
    # Of equally frequent blocks, either those of large steps, so that the ring gets small, or the
    # small ones, which fill the room.
    whole = room // PAGE * PAGE
    found = [_greedy(needs, whole, first) for first in (-1, 1)]
    return min(found, key=lambda placement: placement.streamed)


def _greedy(needs: Needs, room: int, sign: int) -> Placement:
    """`sign`: -1 where blocks of large steps come first among those that are read as often."""
    reads, steps = needs.reads(), _Steps(needs)
    in_file = sorted(reads.keys() - needs.pinned, key=lambda one: one.start)
    # What streams is spread over the layers, so that the stream has work while held ones compute.
    spread = {one: index * _GOLDEN % 1.0 for index, one in enumerate(in_file)}
    candidates = sorted(
        in_file, key=lambda one: (-reads[one], sign * steps.size_of(one), one.plane, spread[one])
    )
    held, used = set(needs.pinned), room_of(needs.pinned)
    for block in [*candidates, *sorted(needs.rows - reads.keys() - needs.pinned)]:
        # Kernels take a low plane that lies after the high one: it stays only where that does.
        high = block.plane == 0 or any(
            one.weight == block.weight and one.plane < block.plane for one in held
        )
        steps.hold(block)
        if high and used + block.room + steps.ahead <= room:
            held.add(block)
            used += block.room
        else:
            steps.release(block)
    left = {
        entry: tuple(kept for step in all_of if (kept := tuple(b for b in step if b not in held)))
        for entry, all_of in needs.steps.items()
    }
    longest = max((sum(map(room_of, all_of)) for all_of in left.values()), default=0)
    placement = Placement(frozenset(held), left, min(room - used, longest), 0.0)
    streamed = sum(count * placement.bytes_of(entry) for entry, count in needs.passes.items())
    return replace(placement, streamed=streamed)


class _Steps:
    """The bytes that each step needs of the ring, as blocks become held."""

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
        """The largest step that reads the block."""
        return max(self._sizes[entry][index] for entry, index in self._places[block])

    @property
    def largest(self) -> int:
        return max((size for sizes in self._sizes.values() for size in sizes), default=0)

    @property
    def ahead(self) -> int:
        """The most that a step and the next one need: one is read while the other is computed."""
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
