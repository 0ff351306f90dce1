"""The `sirius::` operators as everything runs them: references, and the kernels behind them.

Importing this module registers both with torch; CPU kernels are built when one is first called.
"""

from __future__ import annotations

from sirius_runtime import ops
from sirius_runtime.kernels.register import register

__all__ = ["ops"]

register()
