"""The learning rate of every step, in exact values."""

from __future__ import annotations

import math

import pytest

from tasks.training.schedule import lr_factor, warmup_steps


def factors(num_steps: int, warmup_ratio: float, floor: float = 0.1) -> list[float]:
    return [lr_factor(step, num_steps, warmup_ratio, floor) for step in range(num_steps)]


def test_warmup_peak_cosine_and_floor_have_exact_values() -> None:
    half = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    three_quarters = 0.1 + 0.9 * 0.5 * (1 + math.cos(3 * math.pi / 4))
    assert factors(8, 0.5) == [0.25, 0.5, 0.75, 1.0, quarter, half, three_quarters, 0.1]


def test_last_step_is_exactly_the_floor_whatever_the_length() -> None:
    for num_steps in (1, 2, 3, 7, 20, 99, 1000):
        for floor in (0.0, 0.1, 1.0):
            assert factors(num_steps, 0.05, floor)[-1] == floor


@pytest.mark.parametrize("num_steps", [2, 11, 100])
def test_first_step_learns_and_peak_is_reached_once(num_steps: int) -> None:
    values = factors(num_steps, 0.05)
    assert values[0] > 0
    assert values.count(1.0) == 1
    peak = values.index(1.0)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


def test_warmup_rounds_up_and_leaves_a_step_for_the_descent() -> None:
    assert warmup_steps(100, 0.05) == 5
    assert warmup_steps(30, 0.05) == 2
    assert warmup_steps(100, 0.0) == 0
    assert warmup_steps(3, 0.99) == 2
    assert warmup_steps(1, 0.5) == 0
