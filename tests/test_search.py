"""`--keep auto` and `--sparsity auto`: the choice among measured settings, and what is tried."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sirius_compile import CompileConfig, compile_model
from sirius_compile.acceptance import Drafts
from sirius_compile.product import Compiled
from sirius_compile.search import (
    PATIENCE,
    SHARES,
    Search,
    choose,
    is_past_best,
    shares_of,
    with_setting,
)
from sirius_compile.workspace import Workspace
from sirius_compile.writing import Text
from sirius_runtime.artifact import Artifact
from sirius_runtime.cli.inspect import describe
from sirius_runtime.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    UnsupportedModelError,
)
from sirius_runtime.manifest_check import check_program
from sirius_runtime.search_table import search_table
from sirius_runtime.spec import (
    DraftingSpec,
    Manifest,
    Method,
    ProgramSpec,
    SearchSpec,
    SettingSpec,
    from_json,
    to_json,
)
from tests.support.models import random_decoder, word_tokenizer, write_calibration
from tests.support.once import capture_once
from tests.test_spec import PROGRAM


def setting(
    effective: float, agreement: float = 0.9, method: Method = Method.TOPK, keep: float = 0.5
) -> SettingSpec:
    best = DraftingSpec(8, 0.1, 6.0, 7.0, effective)
    return SettingSpec(method, keep, 8, 40, 0.5, agreement, best, (effective, effective))


# the choice

shares = st.floats(0.0, 1.0)
some_settings = st.lists(st.builds(setting, shares, shares), min_size=1, max_size=9)


@given(some_settings, st.none() | shares)
def test_the_fewest_reads_of_those_that_agree_as_asked(
    settings: list[SettingSpec], agreement: float | None
) -> None:
    allowed = [s for s in settings if agreement is None or s.agreement >= agreement]
    if not allowed:
        nearest = max(s.agreement for s in settings)
        with pytest.raises(CalibrationError, match=f"none of the {len(settings)} settings") as it:
            choose(settings, agreement)
        assert f"{nearest:.1%} of tokens agree" in str(it.value)
        return
    chosen = settings[choose(settings, agreement)]
    assert chosen in allowed
    least = min(s.best.effective_density for s in allowed)
    assert chosen.best.effective_density == least
    equal = [s.agreement for s in allowed if s.best.effective_density == least]
    assert chosen.agreement == max(equal)


def test_of_equal_settings_the_one_that_agrees_more_then_the_first() -> None:
    assert choose([setting(0.6, 0.8), setting(0.6, 0.9), setting(0.6, 0.9)], None) == 1


def test_if_none_agrees_as_asked_the_nearest_is_named() -> None:
    settings = [setting(0.5, 0.7), setting(0.9, 0.93, Method.CATS, 0.8), setting(0.6, 0.8)]
    with pytest.raises(CalibrationError) as caught:
        choose(settings, 0.95)
    assert str(caught.value) == (
        "--agreement 0.95: none of the 3 settings measured reaches it. The nearest is cats, keep "
        "0.8: 93.0% of tokens agree, effective density 0.900. Give a lower --agreement, or a "
        "larger --keep"
    )


@given(some_settings, st.none() | shares)
def test_a_method_is_left_only_when_the_last_ones_are_no_better(
    settings: list[SettingSpec], agreement: float | None
) -> None:
    """What is left out if the shares end there can be the best only of a method that gets better
    again; and a method whose effective density falls all the way is tried to its end.
    """
    if is_past_best(settings, agreement):
        with contextlib.suppress(CalibrationError):
            assert choose(settings, agreement) < len(settings) - PATIENCE
    falling = [setting(1.0 - 0.1 * place) for place in range(len(settings))]
    assert not is_past_best(falling, None)


def test_one_worse_share_does_not_end_a_method() -> None:
    assert not is_past_best([setting(0.7), setting(0.8)], None)
    assert not is_past_best([setting(0.7), setting(0.8), setting(0.6)], None)
    assert is_past_best([setting(0.7), setting(0.8), setting(0.9)], None)
    # Below the agreement, nothing counts.
    assert is_past_best([setting(0.7, 0.95), setting(0.6, 0.8), setting(0.5, 0.7)], 0.9)


# what is tried


def program(model_type: str = "llama", **config: object) -> Any:
    return capture_once(random_decoder(model_type, **config).config).program


def tried(model: Any, **options: Any) -> dict[str, Sequence[float]]:
    config = CompileConfig(measure=True, **{"sparsity": "auto", **options})
    return {str(method): shares for method, shares in shares_of(config, model).items()}


def test_every_method_that_the_options_allow_is_tried() -> None:
    dense = program()
    every = ["griffin", "topk", "cats", "teal", "griffin+teal"]
    assert tried(dense) == dict.fromkeys(every, SHARES)
    assert tried(dense, weights="int8") == {**dict.fromkeys(every, SHARES), "none": (1.0,)}
    assert list(tried(dense, weights="int8", draft_bits=8)) == every
    assert tried(dense, keep=0.4, weights="int8") == dict.fromkeys(every, (0.4,))
    assert list(tried(dense, refresh=4)) == ["griffin", "griffin+teal"]
    assert list(tried(dense, weights="int8", graphs="onnx")) == ["topk", "cats", "teal", "none"]
    assert tried(dense, sparsity="teal", keep="auto") == {"teal": SHARES}


def test_mixtures_have_their_own_methods() -> None:
    assert list(tried(program("mixtral", num_local_experts=6, num_experts_per_tok=3))) == [
        "topk",
        "experts",
    ]


# the search, with drafts made by hand


class Trials:
    """The trial programs of a method: a share `keep` passes that many of ten drafted tokens."""

    def __init__(self, method: Method, log: list[str]) -> None:
        self._method, self._log = method, log

    def kept(self, keep: float) -> tuple[float, ...]:
        if self._method is Method.EXPERTS and keep > 0.8:
            raise ConfigError("rounds up to all of them")
        return (max(1, round(4 * keep)) if self._method is Method.EXPERTS else keep,)

    def texts(self, keep: float, held_only: bool) -> tuple[Text, Text]:
        self._log.append(f"{self._method} writes{', held out only' if held_only else ''}")
        return Text(()), Text(())

    def drafts(self, keep: float, used: Text, held: Text) -> Drafts:
        self._log.append(f"{self._method} {keep:g}")
        if self._method is Method.CATS:
            raise CalibrationError("constant")
        passes = (torch.rand(40, 10, generator=torch.Generator().manual_seed(0)) < keep) | (
            torch.arange(40)[:, None] % 2 == 0
        )
        return Drafts(passes, passes, torch.ones(40, 10), torch.arange(40) // 4, keep * 0.5)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    yield


def search(
    methods: str, log: list[str], shares: Sequence[float] = SHARES, **options: Any
) -> Search:
    def chooser(method: Method) -> Any:
        if method is Method.TEAL:
            raise UnsupportedModelError("no such MLPs")
        return Trials(method, log)

    agreement = options.pop("agreement", None)
    config = CompileConfig(sparsity="auto", measure=True, agreement=agreement)
    given = dict.fromkeys(map(Method, methods.split()), shares)
    return Search(config, given, chooser, stage, **options)


def test_texts_are_written_once_and_by_the_method_that_selects_by_prompt() -> None:
    log: list[str] = []
    found = search("topk griffin", log).run()
    assert [line for line in log if "writes" in line] == ["griffin writes, held out only"]
    assert {one.method for one in found.settings} == {Method.TOPK, Method.GRIFFIN}
    assert found.chosen == choose(found.settings, None)
    for one in found.settings:
        low, high = one.interval
        assert low <= one.best.effective_density <= high


def test_a_method_that_can_t_be_compiled_is_left_out_with_its_reason() -> None:
    log: list[str] = []
    warnings: list[str] = []
    found = search("cats teal experts", log, warn=warnings.append).run()
    assert [one.keep for one in found.settings] == [0.8, 0.6, 0.3]  # of four experts: 3, 2, 1
    assert warnings == [
        "--sparsity teal could not be measured: no such MLPs",
        "--sparsity cats could not be measured: constant",
    ]
    with pytest.raises(CalibrationError, match="constant"):
        search("cats", log).run()
    with pytest.raises(UnsupportedModelError, match="no such MLPs"):
        search("teal", log).run()


def test_known_settings_are_not_measured_again() -> None:
    log: list[str] = []
    stored: list[SettingSpec] = []

    def keep(settings: Sequence[SettingSpec]) -> None:
        stored[:] = settings

    whole = search("griffin topk", log, (0.8, 0.4), keep=keep).run()
    assert tuple(stored) == whole.settings
    measured = [line for line in log if "writes" not in line]
    for done in (0, 1, len(stored) - 1, len(stored)):
        log.clear()
        assert search("griffin topk", log, (0.8, 0.4), known=stored[:done]).run() == whole
        assert [line for line in log if "writes" not in line] == measured[done:]
        assert ("griffin writes, held out only" in log) == (done < len(stored))


def test_an_agreement_that_none_reaches() -> None:
    with pytest.raises(CalibrationError, match=r"The nearest is topk, keep 0\.9"):
        search("topk", [], agreement=0.999).run()


# the table


FOUND = SearchSpec(
    0.85,
    (setting(0.6, 0.9), setting(0.655, 1.0, Method.NONE, 1.0)),
    1,
)


def test_the_table_marks_the_chosen_setting() -> None:
    about, head, *rows = search_table(FOUND)
    assert about == "40 drafts of each setting on 8 held-out texts; asked: 85.0% or more agree"
    assert [row[0] for row in rows] == [" ", "*"]
    assert rows[0].split()[:4] == ["topk", "0.5", "0.500", "90.0%"]
    assert rows[1].split()[1:4] == ["none", "0.500", "100.0%"]
    assert max(map(len, (head, *rows))) <= 80


def test_inspect_shows_it_and_nonsense_is_refused() -> None:
    written = to_json(PROGRAM)
    written["period"]["refresh"], written["sparsity"]["sites"][1]["layer"] = 0, 1
    written["search"] = to_json(FOUND)
    found = from_json(ProgramSpec, written)
    check_program(found)
    lines = describe(Manifest((1, 1), found, {}))
    assert [line for line in lines if line.startswith(" " * 11 + "* none")]
    for key, value in (("chosen", 2), ("chosen", -1), ("agreement", 1.5)):
        wrong = {**written, "search": {**written["search"], key: value}}
        with pytest.raises(ArtifactError, match=f"search.{key}"):
            check_program(from_json(ProgramSpec, wrong))


# whole compilations


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("text") / "words.txt", 1024)


def compiled(words: Path, workspace: Workspace | None = None, **options: Any) -> Compiled:
    config = CompileConfig(
        measure=True, graphs="entries", calibration=words, **{"sparsity": "auto", **options}
    )
    return compile_model(
        random_decoder("llama"), config, tokenizer=word_tokenizer(), workspace=workspace
    )


def content(program: Compiled, path: Path) -> tuple[dict[str, Any], Any, SearchSpec | None]:
    """The records of the artifact's files, the manifest without the search, and the search."""
    with Artifact.open(program.save(path)) as artifact:
        manifest = to_json(artifact.manifest)
        found = artifact.manifest.program.search
    del manifest["program"]["search"]
    return manifest["files"], manifest, found


def same_as_direct(words: Path, folder: Path, **options: Any) -> SearchSpec:
    *auto, found = content(compiled(words, **options), folder / "auto.sirius")
    assert found is not None
    chosen = found.settings[found.chosen]
    direct = with_setting(
        CompileConfig(**{"sparsity": "auto", **options, "measure": True}),
        chosen.method,
        chosen.keep,
    )
    del options["sparsity"], options["keep"]
    program = compiled(words, sparsity=direct.sparsity, keep=direct.keep, **options)
    *expected, nothing = content(program, folder / "direct.sirius")
    assert auto == expected
    assert nothing is None
    return found


def test_the_artifact_is_that_of_the_chosen_setting(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sirius_compile.search.SHARES", (0.8, 0.4))
    found = same_as_direct(words, tmp_path, sparsity="cats", keep="auto")
    assert [(one.method, one.keep) for one in found.settings] == [("cats", 0.8), ("cats", 0.4)]
    assert len({one.texts for one in found.settings}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["dtype", "int8"])
def test_the_artifact_is_that_of_the_chosen_method(
    words: Path, tmp_path: Path, weights: str
) -> None:
    found = same_as_direct(words, tmp_path, sparsity="auto", keep=None, weights=weights)
    methods = {one.method for one in found.settings}
    assert len(methods) == (6 if weights == "int8" else 5)


@pytest.mark.slow
def test_a_killed_search_continues(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    options = {"sparsity": "topk", "keep": "auto"}
    whole = content(compiled(words, **options), tmp_path / "whole.sirius")
    write, rows = Workspace._write, list[int]()

    def counting(self: Workspace, name: str, text: Any) -> None:
        write(self, name, text)
        if name == "settings.json":
            rows.append(len(json.loads(bytes(text))))
            if rows == [1, 2]:
                raise Killed

    monkeypatch.setattr(Workspace, "_write", counting)
    out = tmp_path / "m.sirius"
    with pytest.raises(Killed), Workspace(out) as workspace:
        compiled(words, workspace, **options)
    with Workspace(out, resume=True) as workspace:
        again = content(compiled(words, workspace, **options), out)
    assert rows[2] == 3  # the first two were known
    assert again == whole
