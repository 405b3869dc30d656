"""What logs are told of long work."""

import io

import pytest
from rich.console import Console

from hireconvert import render
from hireconvert.render import PlainReporter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(render, "time", clock)
    return clock


def told(clock: Clock, *steps: tuple[float, str], total: int) -> list[str]:
    out = io.StringIO()
    with PlainReporter(Console(file=out, width=160)).stage("work", total) as advance:
        for seconds, detail in steps:
            clock.now += seconds
            advance(detail)
    return out.getvalue().splitlines()


def test_short_work_is_named_alone(clock: Clock) -> None:
    assert told(clock, *[(1.0, "")] * 20, total=20) == ["work"]


def test_silence_is_broken_with_what_is_left(clock: Clock) -> None:
    lines = told(clock, *[(12.0, "")] * 10, total=40)
    assert lines == [
        "work",
        "work: step 3 of 40, 7.4 minutes left",
        "work: step 6 of 40, 6.8 minutes left",
        "work: step 9 of 40, 6.2 minutes left",
    ]


def test_steps_of_an_earlier_run_do_not_count_into_the_pace(clock: Clock) -> None:
    done, fresh = [(0.0, "")] * 10, [(6.0, "loss 1")] * 3
    assert told(clock, *done, *fresh, total=20)[1:] == [
        "work: step 12 of 20, loss 1, 0.8 minutes left",
        "work: step 13 of 20, loss 1, 0.7 minutes left",
    ]
