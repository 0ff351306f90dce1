"""The Pareto line, and what `sirius tune` chooses: pure functions, against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation.ablate import Axis, read_axes, rows, settings
from sirius_runtime.evaluation.modes import Setting
from sirius_runtime.evaluation.pareto import Point, apart, pareto
from sirius_runtime.evaluation.summary import Interval, Summary
from sirius_runtime.evaluation.tune import Choice, choose, defaults, grid, loss
from sirius_runtime.spec import EntrySpec, Method, PeriodSpec, ProgramSpec
from tests.support.artifacts import program_of

points = st.lists(
    st.builds(Point, st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=12
)


@given(points)
def test_the_line_has_the_points_that_no_other_beats(given: list[Point]) -> None:
    def beaten(own: Point) -> bool:
        return any(p.gain >= own.gain and p.accuracy >= own.accuracy and p != own for p in given)

    line = pareto(given)
    assert sorted(line) == [index for index, own in enumerate(given) if not beaten(own)]
    gains = [given[index].gain for index in line]
    assert gains == sorted(gains, reverse=True)


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 1)), min_size=1, max_size=12))
def test_labels_have_room(places: list[tuple[float, float]]) -> None:
    width, height = (max(axis) - min(axis) or 1.0 for axis in zip(*places, strict=True))

    def near(a: int, b: int) -> bool:
        (x, y), (u, v) = places[a], places[b]
        return abs(x - u) < 0.03 * width and abs(y - v) < 0.06 * height

    labelled = apart(places)
    assert labelled[0] == 0
    for index in range(len(places)):
        before = [other for other in labelled if other < index]
        assert (index in labelled) == (not any(near(index, other) for other in before))


def summary(lost: float, width: float, speed: float | None) -> Summary:
    mean = -lost / 100
    interval = Interval(mean, mean - width / 100, mean + width / 100)
    blank = Interval(0.5, 0.4, 0.6)
    return Summary(
        *("x", 10, blank, None, interval, 0, 0, 100, 4.0, 5.0, 0.5, 0.6, 1.0, speed, speed)
    )


EXACT = Setting("exact", (("period", 8),))
settings_found = st.lists(
    st.tuples(
        st.sampled_from([0.05, 0.1, 0.3]).map(lambda t: Setting("sirius", (("threshold", t),))),
        st.builds(
            summary,
            st.integers(-3, 6).map(float),
            st.integers(0, 4).map(float),
            st.none() | st.integers(1, 8).map(lambda n: n / 4),
        ),
    ),
    max_size=8,
)


@given(
    settings_found,
    st.lists(st.integers(1, 8).map(lambda n: n / 4), min_size=1, max_size=3),
    st.integers(0, 4).map(float),
    st.booleans(),
)
def test_the_choice_is_the_fastest_within_the_loss(
    found: list[tuple[Setting, Summary]], exact: list[float], most: float, confident: bool
) -> None:
    pairs = [*found, *((EXACT, summary(0.0, 0.0, speed)) for speed in exact)]
    choice = choose(*zip(*pairs, strict=True), most, confident=confident)
    assert (choice.setting, choice.summary) in pairs
    if choice.setting.mode != "exact":
        assert loss(choice.summary, confident=confident) <= most + 1e-6
    within = [
        s.speed or 0.0
        for setting, s in pairs
        if setting == EXACT or loss(s, confident=confident) <= most + 1e-6
    ]
    if max(within) > 1:
        assert choice.pays
        assert choice.summary.speed == max(within)
    else:
        assert not choice.pays
        assert choice.setting == EXACT
        assert choice.summary.speed == max(exact)


def test_a_choice_that_needs_an_interval() -> None:
    fast = Setting("sirius", (("threshold", 0.05),))
    pairs = [(EXACT, summary(0.0, 0.0, 1.2)), (fast, summary(0.5, 2.0, 1.5))]
    assert choose(*zip(*pairs, strict=True), 1.0) == Choice(*pairs[1], True)
    assert choose(*zip(*pairs, strict=True), 1.0, confident=True) == Choice(*pairs[0], True)
    assert choose(*zip(*pairs, strict=True), 2.5, confident=True) == Choice(*pairs[1], True)


PROGRAM = program_of({})
OWN = PeriodSpec(period=8, confidence=0.5, threshold=0.2)


def program(own: PeriodSpec = OWN, method: Method = Method.CATS) -> ProgramSpec:
    return replace(PROGRAM, period=own, sparsity=replace(PROGRAM.sparsity, method=method))


def test_the_grid_is_every_combination() -> None:
    names = {setting.name for setting in grid(program())}
    assert len(names) == (1 + 3) * 3 * 2
    assert "exact:period=4:confidence=0" in names
    assert "sirius:0.05:period=16:confidence=0.5" in names
    own = [Axis("tree_width", (1, 2)), Axis("period", (6,)), Axis("threshold", (0.2,))]
    assert [setting.name for setting in grid(program(replace(OWN, confidence=0.0)), own)] == [
        f"{mode}:period=6:tree_width={width}:confidence={confidence}"
        for mode in ("exact", "sirius:0.2")
        for confidence in ("0", "0.3")
        for width in (1, 2)
    ]


def test_a_compiled_period_keeps_its_sizes() -> None:
    whole = replace(program(), entries=(EntrySpec("period", (), ()),))
    assert {setting.name for setting in grid(whole)} == {
        f"{mode}:confidence={confidence}"
        for mode in ("exact", "sirius:0.05", "sirius:0.1", "sirius:0.3")
        for confidence in ("0", "0.5")
    }
    for name in ("period", "tree_width"):
        with pytest.raises(ConfigError, match=rf"--vary {name}: .* compile it with --graphs"):
            grid(whole, [Axis(name, (4,))])
    with pytest.raises(ConfigError, match="no default of it"):
        grid(program(), [Axis("lookup", (2,))])


def test_the_defaults_of_a_setting() -> None:
    found = defaults(OWN, Setting("exact", (("period", 4), ("confidence", 0.0))))
    assert found == replace(OWN, mode="exact", period=4, confidence=0.0)


def test_an_ablation_varies_one_thing_at_a_time() -> None:
    table = rows(
        program(), read_axes(["threshold=.05,.2", "period=8,4", "rollback=minimal,period"])
    )
    assert [(row.axis, row.value, row.setting.name, row.default) for row in table] == [
        ("", "full", "full", False),
        ("", "exact", "exact", False),
        ("", "sirius", "sirius", True),
        ("threshold", "0.05", "sirius:0.05", False),
        ("threshold", "0.2", "sirius", True),
        ("period", "8", "sirius", True),
        ("period", "4", "sirius:period=4", False),
        ("rollback", "minimal", "sirius", True),
        ("rollback", "period", "sirius:rollback=period", False),
    ]
    assert [setting.name for setting in settings(table)] == [
        *("full", "exact", "sirius", "sirius:0.05", "sirius:period=4", "sirius:rollback=period")
    ]


def test_an_ablation_of_all_leaves_out_what_there_is_not() -> None:
    def axes(table: list) -> set[str]:  # type: ignore[type-arg]
        return {row.axis for row in table}

    griffin = axes(rows(program(method=Method.GRIFFIN), []))
    assert {"refresh", "threshold", "kv_rewriting"} <= griffin
    assert axes(rows(program(), [])) == griffin - {"refresh"}
    assert axes(rows(program(replace(OWN, mode="exact")), [])) == griffin - {"refresh", "threshold"}
    with pytest.raises(ConfigError, match="mode exact has no threshold"):
        rows(program(), [Axis("threshold", (0.1,))], "exact")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            ["colour=1"],
            "--vary takes NAME=VALUE,.* with a name of threshold, .*rollback; got 'colo",
        ),
        (["threshold"], "--vary takes NAME=VALUE"),
        (["threshold="], "threshold takes a number, got ''"),
        (["threshold=.1,x"], "threshold takes a number, got 'x'"),
        (["threshold=.1,0.10"], "threshold has the value 0.1 twice"),
        (["threshold=.1", "threshold=.2"], "has threshold twice; list"),
        (["threshold=-1"], "threshold must be >= 0"),
        (["threshold=nan"], "threshold must be >= 0"),
        (["verify_temperature=0"], "verify_temperature must be > 0"),
        (["period=0"], "period must be in 1..512"),
        (["period=1.5"], "period takes a whole number"),
        (["tree-width=0"], "tree_width must be in"),
        (["confidence=2"], "confidence must be in"),
        (["refresh=-1"], "refresh must be >= 0"),
        (["kv_rewriting=yes"], "kv_rewriting takes on or off, got 'yes'"),
        (["rollback=all"], "rollback takes minimal or period or token"),
    ],
)
def test_wrong_axes(given: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_axes(given)


def test_research_is_for_ablations() -> None:
    with pytest.raises(ConfigError, match="lookup; got 'rollback=period'"):
        read_axes(["rollback=period"], research=False)
