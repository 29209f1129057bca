from __future__ import annotations

import pytest

from utune_deploy.deploy.bench.case import Case
from utune_deploy.deploy.bench.measure import Progress
from utune_deploy.deploy.bench.pace import Pace, duration, weight


def test_the_time_left_goes_by_rows_and_subjects():
    now = [100.0]
    pace = Pace([weight(Case(1), 2), weight(Case(8), 2), weight(Case(1), 3)], lambda: now[0])
    assert pace.seconds_left(1, 0.0) is None
    now[0] = 104.0
    assert pace.seconds_left(2, 0.0) == pytest.approx(4 / 2 * 19)
    assert pace.seconds_left(2, 0.5) == pytest.approx(4 / 10 * 11)
    assert pace.seconds_left(3, 1.0) == 0


def test_a_line_says_where_it_is_and_how_long_it_takes():
    now = [0.0]
    pace = Pace([1, 1], lambda: now[0])
    assert pace.line(Progress(Case(1), 1, 2, 0, 0.0)) == "1 of 2, batch 1, uniform: warming up, 0 %"
    now[0] = 30.0
    line = pace.line(Progress(Case(1), 1, 2, 9, 0.5))
    assert line == "1 of 2, batch 1, uniform: round 9, 50 %, about 2 min left"


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(4.4, "4 s"), (59.4, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (5400, "1 h 30 min")]
)  # fmt: skip
def test_durations_are_rough(seconds, wanted):
    assert duration(seconds) == wanted
