"""The error classes. Every message names the thing, the reason and the remedy.

`UserError` is for faults that the user can fix (a wrong flag, a bad file, an unsupported model).
The command lines print only its message and exit with its `exit_code`. Any other `SiriusError` is a
bug.
"""

from __future__ import annotations

_SHOWN = 60  # characters of a wrong value


class SiriusError(Exception):
    """Base class of all errors of this project; raised itself, it reports a bug (exit code 70)."""

    exit_code = 70


class UserError(SiriusError):
    """A fault that the user can fix (exit code 2)."""

    exit_code = 2


class ConfigError(UserError):
    """An option or argument that is out of range or contradicts another."""


class ArtifactError(UserError):
    """An artifact that is damaged, tampered with, of another version, or not an artifact."""


class GenerationError(UserError):
    """A request that the loaded model can't serve (too long, empty, unknown stop, …)."""


class BackendError(UserError):
    """A back end that can't run on this machine, with the reason."""


class OperandError(UserError, ValueError):
    """An operand that an operator refuses: its shape does not match the other operands."""


class OperandIndexError(OperandError, IndexError):
    """An operand that holds an index out of range."""


class UnsupportedModelError(UserError):
    """A model that the compiler refuses, with the module or node and the reason."""


class ModelNotFoundError(UserError):
    """A model name or path that does not exist, or a model that can't be fetched."""


class CalibrationError(UserError):
    """Calibration data or statistics that can't give thresholds."""


class GraphMismatchError(UserError):
    """Graphs that differ from the expected ones (`--expect-graphs`)."""

    exit_code = 1


class ReproductionError(UserError):
    """This machine's results for an artifact differ from those of the machine that compiled it."""

    exit_code = 1


class PassError(SiriusError):
    """A pass made the program invalid, as the verifier found: a bug of the compiler."""


def shown(value: object) -> str:
    """A value as messages show it: its repr, of which at most `_SHOWN` characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…")
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of an integer of thousands of digits, of a deep list
        return f"a {type(value).__name__} that is too large"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class KernelError(SiriusError):
    """A kernel's result differs from its reference's: a bug of the kernel."""
