"""Measures how many drafted tokens the full path accepts, by teacher forcing on held-out text.

A draft starts every `STRIDE` tokens. The KV cache holds the full path's K/V for the draft's prefix,
and the sparse path's for its own tokens. The inputs are the text's tokens. At each position the
sparse path proposes its likeliest token, and the full path's logits decide whether the proposal is
accepted (arXiv 2409.03856, section 4).

The average advance length (AAL) of a generation differs somewhat: there, periods start after
corrections, which are harder positions, and continue from accepted tokens rather than from a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sirius_compile.texts import Sample
from sirius_compile.tokenwise import Tokenwise
from sirius_compile.watch import Watch, each, unwatched
from sirius_compile.writing import Text, run
from sirius_runtime.spec import AcceptanceSpec, DraftingSpec, SparsitySpec
from sirius_runtime.stats import measured_density

LONGEST = 16
"""Tokens of the longest period that is measured; the paper's period."""
STRIDE = 8  # tokens from one root to the next
LEAST_DRAFTS = 8  # fewer are not reported
MOST_DRAFTS = 48  # that a compilation measures: 700 tokens through the sparse path
BLOCKS = 24  # drafts in one call
CONFIDENCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PAYS = 0.97
"""Effective density below which drafting is worth its overhead."""


@dataclass(frozen=True)
class Drafts:
    """The measured drafts, [N, K - 1] proposals.

    `accepted`: whether the full path accepts the proposal. `exact`: whether the proposal is the
    full path's likeliest token. `confidence`: the sparse path's joint probability of the draft's
    proposals up to this one. `texts` [N]: the index of each draft's text. `density`: the density of
    the sparse steps.
    """

    accepted: Tensor
    exact: Tensor
    confidence: Tensor
    texts: Tensor
    density: float

    @property
    def longest(self) -> int:
        """The longest period that the drafts cover."""
        return self.accepted.shape[1] + 1

    def only(self, rows: Tensor) -> Drafts:
        """The drafts with the indices `rows`."""
        return replace(
            self,
            accepted=self.accepted[rows],
            exact=self.exact[rows],
            confidence=self.confidence[rows],
            texts=self.texts[rows],
        )

    def period(self, period: int, confidence: float = 0.0) -> Drafting:
        """The drafts as periods of `period` tokens that stop drafting below `confidence`."""
        accepted, joint = self.accepted[:, : period - 1], self.confidence[:, : period - 1]
        # The first token below `confidence` still counts, as in `sirius_runtime.drafting.extend`.
        steps = ((joint >= confidence).long().cumprod(1).sum(1) + 1).clamp(max=period - 1)
        kept = accepted.long().cumprod(1).sum(1).minimum(steps)
        return Drafting(period, confidence, kept.double() + 1, steps.double(), self.density)


@dataclass(frozen=True)
class Drafting:
    """Periods of one setting. `advances` [N]: the tokens that each commits; `steps` [N]: its sparse
    steps.
    """

    period: int
    confidence: float
    advances: Tensor
    steps: Tensor
    density: float

    @property
    def aal(self) -> float:
        """Average advance length: committed tokens per period."""
        return float(self.advances.mean())

    @property
    def effective(self) -> float:
        """Effective density: weight bytes read per committed token, over the dense model's."""
        reads = float(self.steps.sum()) * self.density + len(self.steps)
        return reads / float(self.advances.sum())

    def spec(self) -> DraftingSpec:
        return DraftingSpec(
            self.period, self.confidence, self.aal, float(self.steps.mean()), self.effective
        )


def measure_drafts(
    path: Tokenwise,
    text: Text,
    *,
    threshold: float,
    temperature: float,
    most: int | None = None,
    watch: Watch = unwatched,
) -> Drafts | None:
    """Measures drafts of `path` on `text`, as described in the module's docstring.

    If the text has more than `most` drafts, only every second (or third, …) is measured. Returns
    None if no sample has two tokens after its prompt.
    """
    size = min(LONGEST - 1, max((len(s) - s.prompt for s in text.samples), default=0))
    if size < 2:
        return None
    counts, known = _Counts(path.spec.sparsity), dict[Sample, int]()
    found: list[tuple[Tensor, ...]] = []
    step = 1 if most is None else -(-sum(map(len, _roots(text.samples, size))) // most) or 1
    parts = [
        (part, chunk) for part in run(path, text) for chunk in _roots(part.samples, size, step)
    ]
    for part, chunk in each(watch, "measure drafts", parts):
        rows, firsts = zip(*chunk, strict=True)
        roots = [part.samples[row].prompt - 1 + first for row, first in chunk]
        ids, history = part.after(rows, roots, size)
        neurons = part.neurons_for(path, rows)
        sparse = path.sparse(ids, neurons, counts.look, history)
        counts.tokens += ids.numel()
        assert part.logits is not None
        places = torch.tensor(firsts)[:, None] + torch.arange(size)
        full = part.logits[torch.tensor(rows)[:, None], places]
        texts = torch.tensor([known.setdefault(part.samples[row], len(known)) for row in rows])
        pairs = zip(full.split(4), sparse.split(4), strict=True)  # to bound the logits' memory
        judged = [_judged(*pair, threshold, temperature) for pair in pairs]
        found.append((*map(torch.cat, zip(*judged, strict=True)), texts))
    accepted, exact, confidence, texts = map(torch.cat, zip(*found, strict=True))
    return Drafts(accepted, exact, confidence, texts, counts.density)


def _roots(samples: Sequence[Sample], size: int, step: int = 1) -> Iterator[list[tuple[int, int]]]:
    """Every `step`-th draft, `BLOCKS` at a time: its row, and the index of its first logits."""
    every = [
        (row, first)
        for row, sample in enumerate(samples)
        for first in range(0, len(sample) - sample.prompt - size + 1, STRIDE)
    ][::step]
    for start in range(0, len(every), BLOCKS):
        yield every[start : start + BLOCKS]


def _judged(
    full: Tensor, sparse: Tensor, threshold: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`accepted`, `exact` and `confidence` of `Drafts`, [N, T], from logits [N, T, V]."""
    full, sparse = full.float(), sparse.float()
    best, proposed = sparse.max(-1)
    chosen = full.gather(-1, proposed[..., None])[..., 0] / temperature
    probability = (chosen - (full / temperature).logsumexp(-1)).exp()
    log_proposed = best / temperature - (sparse / temperature).logsumexp(-1)
    return probability >= threshold, proposed == full.argmax(-1), log_proposed.cumsum(-1).exp()


class _Counts:
    """Counts the units that the counted sites keep."""

    def __init__(self, sparsity: SparsitySpec) -> None:
        self._sparsity, self.tokens = sparsity, 0
        self._kept = [0] * len(sparsity.counted)

    def look(self, site: int, scores: Tensor) -> None:
        threshold = self._sparsity.counted[site].threshold
        assert threshold is not None
        self._kept[site] += int((scores > threshold).sum())

    @property
    def density(self) -> float:
        return measured_density(self._sparsity, self._kept, self.tokens)


def best_drafting(
    drafts: Drafts, periods: Sequence[int] | None = None, confidences: Sequence[float] | None = None
) -> Drafting:
    """The setting with the lowest effective density.

    `periods` and `confidences`: the settings to compare, by default all. A period longer than the
    measured drafts is cut to their length.
    """
    sizes = periods or range(2, drafts.longest + 1)
    every = [
        drafts.period(min(size, drafts.longest), confidence)
        for size in sizes
        for confidence in confidences or CONFIDENCES
    ]
    return min(every, key=lambda drafting: drafting.effective)


def joined(parts: Sequence[Drafts]) -> Drafts:
    """The drafts of all parts together. No text may be in two parts."""
    first, texts = 0, list[Tensor]()
    for part in parts:
        texts.append(part.texts + first)
        first += int(part.texts.max()) + 1
    size = min(part.accepted.shape[1] for part in parts)
    tokens = [part.accepted.numel() for part in parts]
    return Drafts(
        torch.cat([part.accepted[:, :size] for part in parts]),
        torch.cat([part.exact[:, :size] for part in parts]),
        torch.cat([part.confidence[:, :size] for part in parts]),
        torch.cat(texts),
        sum(n * part.density for n, part in zip(tokens, parts, strict=True)) / sum(tokens),
    )


def interval(
    drafts: Drafts, of: Callable[[Drafts], float], draws: int = 500
) -> tuple[float, float]:
    """The 95% confidence interval (low, high) of the figure `of`, by bootstrap over texts."""
    generator = torch.Generator().manual_seed(0)
    texts, index = drafts.texts.unique(return_inverse=True)
    rows = [(index == text).nonzero()[:, 0] for text in range(len(texts))]
    found = []
    for _ in range(draws):
        drawn = torch.randint(len(rows), (len(rows),), generator=generator).tolist()
        found.append(of(drafts.only(torch.cat([rows[text] for text in drawn]))))
    low, high = (
        torch.tensor(found).double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    )
    return low, high


def acceptance_spec(
    drafts: Drafts,
    *,
    threshold: float,
    temperature: float,
    periods: Sequence[int] | None = None,
    confidences: Sequence[float] | None = None,
) -> AcceptanceSpec:
    """The artifact's record of the drafts. `periods` and `confidences`: as for `best_drafting`."""
    passed = drafts.accepted.long().cumprod(1).double().mean(0)
    return AcceptanceSpec(
        texts=len(drafts.texts.unique()),
        drafts=len(drafts.texts),
        threshold=threshold,
        verify_temperature=temperature,
        density=drafts.density,
        agreement=float(drafts.exact.double().mean()),
        accepted=tuple(passed.tolist()),
        periods=tuple(drafts.period(size).spec() for size in range(2, drafts.longest + 1)),
        best=best_drafting(drafts, periods, confidences).spec(),
    )
