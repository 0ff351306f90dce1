"""The benchmark's arithmetic from steps to tokens per second."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.advance import Measured, plot, table

MEASURED = Measured(dense=10.0, sparse={"half": 5.0, "all": 10.0}, verify={4: 10.0, 16: 20.0})


def test_a_token_s_time_is_its_period_s_over_the_advance() -> None:
    assert MEASURED.per_token("half", 4, 4) == (3 * 5 + 10) / 4
    assert MEASURED.per_token("half", 16, 8) == (15 * 5 + 20) / 8


def test_each_row_is_relative_to_the_dense_step_and_names_the_best_period() -> None:
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table(MEASURED).splitlines()]
    assert rows[0] == ["sparse step", "k 4", "k 16", "best", "dense / best"]
    small, large = 25 / 3.6 / 10, 95 / 14.4 / 10
    assert rows[2] == ["half", f"{small:.2f}", f"{large:.2f}", f"{large:.2f}", f"{1 / large:.2f}"]
    assert float(rows[3][3]) > 1  # what skips nothing can only lose


@pytest.mark.parametrize("sizes", [(4,), (4, 16)])
def test_the_plot_is_drawn(sizes: tuple[int, ...], tmp_path: Path) -> None:
    verify = {k: MEASURED.verify[k] for k in sizes}
    plot(Measured(10.0, MEASURED.sparse, verify), ["half"], "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
