"""The inputs and outputs of a program's entries: names, dtypes and shapes.

Shape letters are those of `sirius_runtime.ops`; `model` is the program's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

from sirius_runtime.rules import OPTIONS, options_of
from sirius_runtime.spec import ProgramSpec, SparsitySpec, TensorSpec

PREFILL, SPARSE, FULL = "prefill", "sparse", "full"
OBSERVE, PERIOD = "observe", "period"

INPUTS: dict[str, TensorSpec] = {
    spec.name: spec
    for spec in (
        TensorSpec("input_ids", "int64", ("B", "T")),
        TensorSpec("positions", "int64", ("B", "T")),
        TensorSpec("slots", "int64", ("B", "T")),
        TensorSpec("length", "int64", ("B",)),
        TensorSpec("tree_mask", "int64", ("R", "T", "M")),  # R: 1 or B
        TensorSpec("k_cache", "model", ("layers", "B", "G", "S", "D")),
        TensorSpec("v_cache", "model", ("layers", "B", "G", "S", "Dv")),
        TensorSpec("last", "int64", ("B",)),
        TensorSpec("valid", "bool", ("B", "T")),
        TensorSpec("neurons", "int64", ("layers", "B", "kept")),
        # of the functional forms
        TensorSpec("k_block", "model", ("layers", "B", "G", "M", "D")),
        TensorSpec("v_block", "model", ("layers", "B", "G", "M", "Dv")),
        TensorSpec("nodes", "int64", ("T",)),
        # of the period
        TensorSpec("root", "int64", ("B",)),
        TensorSpec("active", "bool", ("B",)),
        TensorSpec("most", "int64", ("B",)),
        TensorSpec("rule", "int64", ()),
        *(TensorSpec(name, "float32", ()) for name in OPTIONS),
        TensorSpec("confidence", "float32", ()),
        TensorSpec("temperature", "float32", ()),
        TensorSpec("top_k", "int64", ()),
        TensorSpec("top_p", "float32", ()),
        TensorSpec("noise", "float64", ("B", 2, "K")),
        TensorSpec("statistic", "float32", ("layers", "B", "I")),
        TensorSpec("refresh", "bool", ()),
    )
}
"""Every input that a graph may have."""

RESULTS: dict[str, TensorSpec] = {
    spec.name: spec
    for spec in (
        TensorSpec("logits", "model", ("B", "T", "V")),
        TensorSpec("statistic", "float32", ("layers", "B", "I")),
        TensorSpec("activity", "float32", ("layers", "B", "T", "I")),
        TensorSpec("kept", "int64", ("sites", "B")),
        # of the functional forms
        TensorSpec("k_block", "model", ("layers", "B", "G", "M", "D")),
        TensorSpec("v_block", "model", ("layers", "B", "G", "M", "Dv")),
        # of the period
        TensorSpec("tokens", "int64", ("B", "K")),
        TensorSpec("advance", "int64", ("B",)),
        TensorSpec("drafted", "int64", ("B",)),
        TensorSpec("root", "int64", ("B",)),
        TensorSpec("length", "int64", ("B",)),
        TensorSpec("levels", "int64", ()),
        TensorSpec("k_kept", "model", ("layers", "B", "G", "K", "D")),
        TensorSpec("v_kept", "model", ("layers", "B", "G", "K", "Dv")),
        TensorSpec("neurons", "int64", ("layers", "B", "kept")),
    )
}
"""Every output that a graph may have. `prefill` returns the logits of one token per row (T = 1)."""

_TOKENS = ("input_ids", "positions", "slots", "length", "tree_mask", "k_cache", "v_cache")
_PLAN = ("confidence", "temperature", "top_k", "top_p", "noise")
_STATE = ("root", "active", "most", "length", "k_cache", "v_cache")
_OUTCOME = ("tokens", "advance", "drafted", "root", "length", "levels", "k_kept", "v_kept")


def plan_inputs(rules: Sequence[str]) -> tuple[str, ...]:
    """Names of the inputs that pass a plan to a period graph with these rules."""
    return ("rule", *options_of(rules), *_PLAN)


def signature(
    entry: str, sparsity: SparsitySpec, rules: Sequence[str]
) -> tuple[frozenset[str], frozenset[str]] | None:
    """The names of an entry's inputs and outputs; None for an unknown entry."""
    chooses, counts = sparsity.method.per_prompt, bool(sparsity.counted)
    kept = ("kept",) * counts
    known: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        PREFILL: (
            (*_TOKENS, "last", *("valid",) * chooses),
            ("logits", *("statistic",) * chooses),
        ),
        SPARSE: ((*_TOKENS, *("neurons",) * chooses), ("logits", *kept)),
        FULL: (_TOKENS, ("logits",)),
        OBSERVE: (_TOKENS, ("logits", "activity")),
        PERIOD: (
            (*_STATE, *plan_inputs(rules), *("neurons", "statistic", "refresh") * chooses),
            (*_OUTCOME, *kept, *("statistic", "neurons") * chooses),
        ),
    }
    if entry not in known:
        return None
    inputs, outputs = known[entry]
    return frozenset(inputs), frozenset(outputs)


def needed(sparsity: SparsitySpec) -> tuple[str, ...]:
    """The entries that decoding needs."""
    return (PREFILL, SPARSE, FULL, *(OBSERVE,) * sparsity.method.per_prompt)


def extents(program: ProgramSpec) -> dict[str, int]:
    """The sizes of the shape letters that are the same in every call."""
    state, sparsity = program.state, program.sparsity
    return {
        "K": program.period.period,
        "V": program.model.vocab_size,
        "layers": state.layers,
        "G": state.kv_heads,
        "D": state.key_dim,
        "Dv": state.value_dim,
        "I": sparsity.neurons,
        "kept": sparsity.kept_neurons,
        "sites": len(sparsity.counted),
    }
