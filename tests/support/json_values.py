"""JSON for property tests: any value, and any place in one."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from sirius_runtime.spec import JSON

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value: JSON) -> list[tuple[Any, Any]]:
    """Every container in `value` with each of its keys or indices."""
    if isinstance(value, dict):
        keys = list(value)
    else:
        keys = list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [p for key in keys for p in places(value[key])]
