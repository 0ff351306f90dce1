"""Computes tokens per second for every possible advance of a period, from measured steps.

A period of k takes k - 1 sparse steps and one verification of k tokens. The tokens that it commits
depend on the model, so random weights can't show them; the paper's averages are marked (arXiv
2409.03856, table 2: k 16 on GSM8K with Llama-3-8B-Instruct; at other k, the same share of k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sirius_runtime.new_file import NewFile

PAPER_AAL = {"griffin": 15.22, "topk": 15.37}
PAPER_PERIOD = 16
SHARE = 0.9
"""The AAL as a share of k that the goal is stated for."""


@dataclass(frozen=True)
class Measured:
    """Seconds of a dense step, of sparse steps by name, and of verifying k tokens by k."""

    dense: float
    sparse: Mapping[str, float]
    verify: Mapping[int, float]

    def per_token(self, name: str, k: int, advance: float) -> float:
        """Seconds per token if periods of k advance by `advance` tokens."""
        return ((k - 1) * self.sparse[name] + self.verify[k]) / advance


def table(measured: Measured, share: float = SHARE) -> str:
    """For each sparse step, the time per token over the dense step's, by k, at that AAL / k."""
    sizes = sorted(measured.verify)
    header = ("sparse step", *(f"k {k}" for k in sizes), "best", "dense / best")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in measured.sparse:
        ratios = [measured.per_token(name, k, share * k) / measured.dense for k in sizes]
        best = min(ratios)
        cells = (name, *(f"{r:.2f}" for r in ratios), f"{best:.2f}", f"{1 / best:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(measured: Measured, names: Sequence[str], title: str, path: Path) -> None:
    """Tokens per second over the advance: a panel for each k, a line for each sparse step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted(measured.verify)
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(4.6 * len(sizes), 4.4), sharey=True, squeeze=False
    )
    for axis, k in zip(axes[0], sizes, strict=True):
        axis.axhline(1 / measured.dense, color="0.3", linewidth=1.2, label="dense")
        for name in names:
            advances = [1 + (k - 1) * step / 40 for step in range(41)]
            speeds = [1 / measured.per_token(name, k, advance) for advance in advances]
            axis.plot(advances, speeds, label=name)
        for (method, aal), style in zip(PAPER_AAL.items(), ("--", ":"), strict=True):
            at = aal / PAPER_PERIOD * k
            axis.axvline(at, color="0.5", linewidth=1, linestyle=style, label=f"paper, {method}")
        axis.set(title=f"k {k}", xlabel="tokens that a period commits", xlim=(1, k))
    axes[0][0].set_ylim(bottom=0)  # of all, once their lines are drawn
    axes[0][0].set_ylabel("tokens/s (computed)")
    axes[0][0].legend(fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with NewFile(path) as new:
        figure.savefig(new.file, format="png", dpi=110)
        new.finish()
