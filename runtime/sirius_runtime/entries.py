"""What the entries of a program take and give: names, dtypes and shapes.

Shape letters as in `sirius_runtime.ops`; `model` is the program's dtype.
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
"""Every input that a graph may have; shape letters as in `sirius_runtime.ops`."""

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
"""Every output that a graph may have. `prefill` gives the logits of one token a row (T = 1)."""

_TOKENS = ("input_ids", "positions", "slots", "length", "tree_mask", "k_cache", "v_cache")
_PLAN = ("confidence", "temperature", "top_k", "top_p", "noise")
_STATE = ("root", "active", "most", "length", "k_cache", "v_cache")
_OUTCOME = ("tokens", "advance", "drafted", "root", "length", "levels", "k_kept", "v_kept")


def plan_inputs(rules: Sequence[str]) -> tuple[str, ...]:
    """The inputs by which a graph of these rules gets a plan, by name."""
    return ("rule", *options_of(rules), *_PLAN)


def signature(
    entry: str, sparsity: SparsitySpec, rules: Sequence[str]
) -> tuple[frozenset[str], frozenset[str]] | None:
    """The inputs and outputs of an entry, by name; None for an unknown entry."""
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
    """The entries that decoding runs."""
    return (PREFILL, SPARSE, FULL, *(OBSERVE,) * sparsity.method.per_prompt)


def extents(program: ProgramSpec) -> dict[str, int]:
    """The values of the letters that are the same in every call."""
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
