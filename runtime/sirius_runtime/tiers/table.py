"""Prints a placement as a table, with one line for the same weight of all layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sirius_runtime.entries import FULL
from sirius_runtime.tiers.budget import in_units
from sirius_runtime.tiers.placement import MOVING, Block, Needs, Placement, least_room, room_of

_COLUMNS = (
    *("weights", "blocks", "reads/period", "bytes", "held", "chosen rows"),
    *("draft step", "verification"),
)


def lines(needs: Needs, placement: Placement, budget: int, beside: int) -> Iterator[str]:
    """The lines of the table. `beside`: bytes that the process takes besides weights."""
    least = least_room(needs) + beside
    yield f"budget     {in_units(budget)}, the least that works {in_units(least)}"
    chosen = (
        f"{in_units(sum(placement.chosen.values()))} for the rows that a prompt chooses, "
        if placement.chosen
        else ""
    )
    yield (
        f"memory     {in_units(beside)} besides the weights, {in_units(room_of(placement.held))} "
        f"of held weights, {chosen}{in_units(placement.ring)} of ring buffer"
    )
    once = f", {in_units(placement.bytes_of(MOVING))} per prompt" if placement.chosen else ""
    yield (
        f"streams    {in_units(placement.bytes_of(placement.drafts))} per draft step, "
        f"{in_units(placement.bytes_of(FULL))} per verification, {in_units(placement.streamed)} "
        f"per period{once}"
    )
    yield ""
    rows = [_COLUMNS, *_rows(needs, placement)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


def _rows(needs: Needs, placement: Placement) -> Iterator[tuple[str, ...]]:
    reads = needs.reads()
    everything = {*reads, *needs.pinned, *needs.rows}
    nested = {block.weight for block in everything if block.plane}
    groups: dict[tuple[str, str], list[Block]] = {}
    for block in sorted(everything, key=lambda block: block.start):
        frequency = f"{reads[block]:g}" if block in reads else ""
        if block in needs.pinned:
            frequency = "must be held"
        elif block in needs.rows:
            frequency = f"{frequency}, rows" if frequency else "rows"
        groups.setdefault((_name(block, nested), frequency), []).append(block)
    for (name, frequency), blocks in groups.items():
        held = [block for block in blocks if block in placement.held]
        yield (
            name,
            str(len(blocks)),
            frequency,
            in_units(_bytes(blocks)),
            in_units(_bytes(held)),
            in_units(sum(placement.chosen.get(block, 0) for block in blocks)),
            *(in_units(_streamed(placement, entry, blocks)) for entry in (placement.drafts, FULL)),
        )


def _streamed(placement: Placement, entry: str, blocks: Sequence[Block]) -> int:
    own = set(blocks)
    return _bytes([one for step in placement.steps[entry] for one in step if one in own])


def _bytes(blocks: Sequence[Block]) -> int:
    return sum(block.end - block.start for block in blocks)


def _name(block: Block, nested: set[str]) -> str:
    name = re.sub(r"\.\d+\.", ".*.", block.weight)
    return name + ("", (", high plane", ", low plane")[block.plane])[block.weight in nested]
