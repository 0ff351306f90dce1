"""Models of which a part stays in memory."""

from __future__ import annotations

from mmap import mmap
from pathlib import Path

import torch

from sirius_runtime.artifact import Artifact
from sirius_runtime.backends.tiered import TieredBackend, analyse, settle_from_host
from sirius_runtime.loading import TOKENIZER
from sirius_runtime.model import SiriusModel
from sirius_runtime.text import read_tokenizer
from sirius_runtime.tiers.direct_file import DirectFile
from sirius_runtime.tiers.placement import PAGE, least_room, place, room_of

CPU = torch.device("cpu")


def tiered(path: Path, share: float = 0.0, *, host: bool = False) -> tuple[SiriusModel, DirectFile]:
    """The model of a file of whose streamable bytes `share` fits, beyond the least that works.

    The mapping is spoiled once the model is there: what runs may not read it. host: from the host's
    memory, as for a GPU, which is that mapping.
    """
    with Artifact.open(path) as artifact:
        backend = analyse(artifact, CPU)
        assert artifact.file is not None
        least = least_room(backend.needs)
        rest = room_of(backend.needs.reads().keys() - backend.needs.pinned)
        placement = place(backend.needs, least + round(share * rest))
        memory = mmap(-1, max(placement.memory, PAGE))
        arena, file = torch.frombuffer(memory, dtype=torch.uint8), DirectFile(artifact.file, memory)
        tokenizer = None
        if artifact.names(TOKENIZER):
            tokenizer = read_tokenizer(artifact.read_bytes(TOKENIZER))
        if host:
            settle_from_host(backend, artifact, placement)
            return SiriusModel(backend, tokenizer, artifact.file), file
        backend.settle(placement, arena, file)
        for tensor in artifact.weights().values():
            tensor.view(-1).view(torch.uint8).fill_(0x55)
        return SiriusModel(backend, tokenizer, artifact.file), file


def streamed(model: SiriusModel) -> float:
    """Bytes a period streams."""
    assert isinstance(model.backend, TieredBackend)
    return model.backend.placement.streamed
