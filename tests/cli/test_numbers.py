"""Numbers for people: short, with the digits that matter, never rounded into another unit."""

from __future__ import annotations

import pytest

from raysweep.cli.numbers import clock, count, decimals_for, duration, fixed, large


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (3.14, "3.1 s"),
        (9.96, "10 s"),
        (12.4, "12 s"),
        (59.7, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.8, "1 h 0 min"),
        (7384, "2 h 3 min"),
        (100_000, "27 h 47 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (42.9, "0:42"), (725, "12:05"), (3725, "1:02:05")]
)
def test_clocks(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (128, "128"),
        (999, "999"),
        (1000, "1 K"),
        (999_999, "1 M"),
        (5_180_416, "5.18 M"),
        (69_500_000_000, "69.5 B"),
        (2_000_000_000_000, "2 T"),
    ],
)
def test_large_numbers(number, text):
    assert large(number) == text


def test_counts_agree_with_their_noun():
    assert [count(n, "trial") for n in (0, 1, 2, 12_000)] == [
        "0 trials",
        "1 trial",
        "2 trials",
        "12,000 trials",
    ]


def test_the_smallest_number_keeps_its_digits():
    assert decimals_for([0.00123, 5.0], digits=2, at_most=6) == 4
    assert decimals_for([123.0], digits=2, at_most=6) == 0
    assert decimals_for([1e-12], digits=2, at_most=6) == 6
    assert decimals_for([0.0, float("inf")], digits=2, at_most=6) == 0


def test_very_large_perplexities_stay_short():
    assert fixed(311.9, 2) == "311.90"
    assert fixed(1234567.0, 2) == "1.23e+06"
