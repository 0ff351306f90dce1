"""`--keep auto` and `--sparsity auto`: measures the drafts of several settings, and takes the one
with the lowest effective density among those that agree with the full path as asked.

A setting is a method with a kept share. All settings are measured on the same held-out text. A
method's shares are tried from the largest down, until `PATIENCE` in a row are no better than an
earlier one: the agreement falls with the share, and the longer drafts that it costs are soon worth
more than the bytes saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from sirius_compile.acceptance import Drafts, interval
from sirius_compile.config import AUTO, CompileConfig
from sirius_compile.sparse_path import Chooser, acceptance_of
from sirius_compile.writing import Text
from sirius_passes.mixtures import check_method
from sirius_passes.program import Program
from sirius_runtime.errors import CalibrationError, ConfigError, UnsupportedModelError, UserError
from sirius_runtime.spec import Method, SearchSpec, SettingSpec

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
PATIENCE = 2


def with_setting(config: CompileConfig, method: Method, keep: float) -> CompileConfig:
    """The options that compile one setting directly."""
    if method is Method.NONE:
        return replace(config, sparsity=method, keep=None, dense_layers=(), agreement=None)
    return replace(config, sparsity=method, keep=keep, agreement=None)


def shares_of(config: CompileConfig, program: Program) -> dict[Method, Sequence[float]]:
    """The kept shares to try of each method that the options and the captured program allow.

    Raises ConfigError or UnsupportedModelError if there is no such method.
    """
    given = config.keep
    every = SHARES if given is None or isinstance(given, str) else (float(given),)
    if config.sparsity != AUTO:
        check_method(program, Method(config.sparsity))
        return {Method(config.sparsity): every}
    found: dict[Method, Sequence[float]] = {}
    for method in Method:
        shares = every if method is not Method.NONE else (1.0,)
        if method is Method.NONE and every is not SHARES:  # the share was given
            continue
        try:
            check_method(program, method)
            allowed = with_setting(config, method, shares[0]).drafts
        except (ConfigError, UnsupportedModelError):
            continue
        if allowed:
            found[method] = shares
    if not found:
        raise ConfigError(
            "--sparsity auto: no method applies to this model with these options. Give a "
            "--sparsity to see why"
        )
    return found


def rank(setting: SettingSpec, agreement: float | None) -> tuple[float, ...]:
    """Sorts settings, the best first: by effective density; after all of these those that agree
    less than asked, by agreement.
    """
    reads = setting.best.effective_density
    if agreement is not None and setting.agreement < agreement:
        return 1.0, -setting.agreement, reads
    return 0.0, reads, -setting.agreement


def choose(settings: Sequence[SettingSpec], agreement: float | None) -> int:
    """The index of the best setting. Of equal ones, the first.

    Raises CalibrationError, with the nearest setting, if none agrees as asked.
    """
    best = min(range(len(settings)), key=lambda index: rank(settings[index], agreement))
    nearest = settings[best]
    if agreement is not None and nearest.agreement < agreement:
        raise CalibrationError(
            f"--agreement {agreement:g}: none of the {len(settings)} settings measured reaches it. "
            f"The nearest is {named(nearest.method, nearest.keep)}: {nearest.agreement:.1%} of "
            f"tokens agree, effective density {nearest.best.effective_density:.3f}. Give a lower "
            "--agreement, or a larger --keep"
        )
    return best


def is_past_best(settings: Sequence[SettingSpec], agreement: float | None) -> bool:
    """Whether the last `PATIENCE` of a method's settings are no better than an earlier one."""
    ranks = [rank(setting, agreement) for setting in settings]
    return len(ranks) > PATIENCE and min(ranks[-PATIENCE:]) >= min(ranks[:-PATIENCE])


def named(method: Method, keep: float) -> str:
    """A setting in a line of text."""
    return str(method) if method is Method.NONE else f"{method}, keep {keep:g}"


def measured(method: Method, keep: float, drafts: Drafts, config: CompileConfig) -> SettingSpec:
    """The record of a setting's drafts."""
    found = acceptance_of(drafts, config)
    best = found.best
    return SettingSpec(
        method=method,
        keep=keep,
        texts=found.texts,
        drafts=found.drafts,
        density=found.density,
        agreement=found.agreement,
        best=best,
        interval=interval(drafts, lambda d: d.period(best.period, best.confidence).effective),
    )


class Search:
    """One search over the settings of a model."""

    def __init__(
        self,
        config: CompileConfig,
        shares: Mapping[Method, Sequence[float]],
        chooser: Callable[[Method], Chooser],
        stage: Callable[[str], AbstractContextManager[None]],
        *,
        known: Sequence[SettingSpec] = (),
        keep: Callable[[Sequence[SettingSpec]], None] = lambda settings: None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`shares`: the shares to try of each method. `chooser`: gives the trial programs of a
        method. `stage`: the context of a stage. `known`: the settings that a killed search has
        measured. `keep`: called with all settings after each new one. `warn`: called with a message
        for each method that can't be compiled.
        """
        self._config, self._shares, self._chooser = config, shares, chooser
        self._stage, self._keep, self._warn = stage, keep, warn
        self._known = {(one.method, one.keep): one for one in known}
        self._texts: tuple[Text, Text] | None = None
        self._choosers: dict[Method, Chooser] = {}
        self._writer: tuple[Method, Chooser] | None = None  # of the texts, until they are written
        self._refused: dict[Method, UserError] = {}

    def run(self) -> SearchSpec:
        """Measures the settings, and chooses one.

        Raises CalibrationError if none agrees as asked, or if the text is too short to measure; and
        the error of the first method if none can be compiled.
        """
        agreement = self._config.agreement
        for method in self._shares:
            try:
                self._choosers[method] = self._chooser(method)
            except UnsupportedModelError as error:
                self._refused[method] = error
        settings: list[SettingSpec] = []
        methods = list(self._choosers)
        if methods:
            # Only programs that select neurons by prompt have the statistic for it.
            writer = next((method for method in methods if method.per_prompt), methods[0])
            self._writer = writer, self._choosers[writer]
        for method in methods:
            before = len(settings)
            for keep in self._distinct(method):
                if (setting := self._setting(method, keep)) is not None:
                    settings.append(setting)
                    self._keep(settings)
                    if is_past_best(settings[before:], agreement):
                        break
            if len(settings) > before:
                self._refused.pop(method, None)
            del self._choosers[method]  # and its weights
        if not settings:
            raise next(iter(self._refused.values()))
        for method, reason in self._refused.items():
            self._warn(f"--sparsity {method} could not be measured: {reason}")
        return SearchSpec(agreement, tuple(settings), choose(settings, agreement))

    def _distinct(self, method: Method) -> list[float]:
        """The method's shares that keep different numbers of units. (Some of a few experts round
        to the same number, or to all of them.)
        """
        found: dict[tuple[float, ...], float] = {}
        for keep in self._shares[method]:
            try:
                found.setdefault(self._choosers[method].kept(keep), keep)
            except ConfigError as error:
                self._refused.setdefault(method, error)
        return list(found.values())

    def _setting(self, method: Method, keep: float) -> SettingSpec | None:
        """The setting, measured. None if no thresholds keep this share."""
        if (method, keep) in self._known:
            return self._known[method, keep]
        used, held = self._text()
        with self._stage(f"measure {named(method, keep)}"):
            try:
                drafts = self._choosers[method].drafts(keep, used, held)
            except CalibrationError as error:
                self._refused.setdefault(method, error)
                return None
            if drafts is None:
                raise CalibrationError(
                    "the held-out text is too short to measure drafts on, as a search does. Give "
                    "more text with --calibration, or give --sparsity and --keep"
                )
            return measured(method, keep, drafts, self._config)

    def _text(self) -> tuple[Text, Text]:
        """The calibration text and the held-out text of all settings."""
        if self._texts is None:
            assert self._writer is not None
            method, chooser = self._writer
            held_only = not any(method.has_thresholds for method in self._shares)
            with self._stage("write text"):
                self._texts = chooser.texts(self._shares[method][0], held_only)
            self._writer = None
        return self._texts
