"""The Sirius runtime: loads a compiled artifact and generates from it.

    import sirius_runtime
    model = sirius_runtime.load("model.sirius")
    print(model.generate("Q: ...").texts[0])

Names are imported when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sirius_runtime.errors import SiriusError, UserError
    from sirius_runtime.loading import load
    from sirius_runtime.model import FinishReason, GenerationOutput, Mode, SiriusModel
    from sirius_runtime.stats import GenerationStats
    from sirius_runtime.text import TextStream

_HOMES = {
    "FinishReason": "model",
    "GenerationOutput": "model",
    "GenerationStats": "stats",
    "Mode": "model",
    "SiriusError": "errors",
    "SiriusModel": "model",
    "TextStream": "text",
    "UserError": "errors",
    "load": "loading",
}

__all__ = [
    "FinishReason",
    "GenerationOutput",
    "GenerationStats",
    "Mode",
    "SiriusError",
    "SiriusModel",
    "TextStream",
    "UserError",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
