"""What a stage does while its device computes must not make the device wait."""

from __future__ import annotations

import pytest

from pipespec.runners.meanwhile import Meanwhile


class Device:
    """Told of a step it is done so many seconds later; the clock moves while someone waits."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.given_s: list[float] = []
        self.meanwhile = Meanwhile(lambda: self.now_s)

    def work(self, seconds: float) -> None:
        self.given_s.append(seconds)
        self.now_s += seconds

    def step(self, num_tokens: int, launch_s: float, end_s: float) -> float:
        """Returns how much later than the device the step was done."""
        done_s = self.now_s + end_s
        with self.meanwhile.step(num_tokens):
            self.now_s += launch_s
            self.meanwhile.launched()
            late_s = max(0.0, self.now_s - done_s)
            self.now_s = max(self.now_s, done_s)
        return late_s


def test_most_of_a_step_is_given_away_once_its_length_is_known() -> None:
    device = Device()
    device.meanwhile.do = device.work
    assert [device.step(4, 0.1, 1.0) for _ in range(3)] == [0.0] * 3
    assert device.given_s == [pytest.approx(0.7)] * 2, "80 % of a second but for the launch"


def test_steps_of_other_lengths_are_known_by_themselves() -> None:
    device = Device()
    device.meanwhile.do = device.work
    for num_tokens, seconds in ((1, 1.0), (8, 2.0), (1, 1.0), (8, 2.0)):
        assert device.step(num_tokens, 0.0, seconds) == 0.0
    assert device.given_s == [pytest.approx(0.8), pytest.approx(1.6)]


def test_a_step_that_is_shorter_than_before_is_late_once() -> None:
    device = Device()
    device.meanwhile.do = device.work
    device.step(1, 0.0, 2.0)
    late_s = [device.step(1, 0.0, 1.0) for _ in range(20)]
    assert late_s[0] == pytest.approx(0.6)
    # What was late has been taken for the step's time until shorter ones have been seen.
    assert sum(lateness > 0.01 for lateness in late_s) <= 3
    assert late_s[-1] == 0.0


def test_a_device_that_has_become_slower_is_given_its_time_again() -> None:
    device = Device()
    device.meanwhile.do = device.work
    for _ in range(200):
        assert device.step(1, 0.0, 1.0 if device.now_s < 3.0 else 2.0) == 0.0
    assert device.given_s[-1] == pytest.approx(1.6)


def test_nothing_is_given_where_the_launch_took_it_all_or_nobody_asks() -> None:
    device = Device()
    device.step(1, 0.1, 1.0)
    device.step(1, 0.1, 1.0)
    device.meanwhile.do = device.work
    device.step(1, 0.9, 1.0)
    assert device.given_s == []
