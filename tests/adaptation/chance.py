"""The chi-square test for equally likely outcomes."""

from collections import Counter
from collections.abc import Collection, Hashable

NORMAL_QUANTILE = 3.09
"""Of the standard normal distribution, at 0.999."""


def excess(found: Counter[Hashable], outcomes: Collection[Hashable]) -> float:
    """Return chi-square of counts over its 0.999 quantile; above 1, the outcomes are not equally likely."""
    assert set(found) <= set(outcomes)
    expected = found.total() / len(outcomes)
    assert expected >= 20
    statistic = sum((found[outcome] - expected) ** 2 / expected for outcome in outcomes)
    # Wilson and Hilferty's approximation of the quantile, within 1% from 3 degrees of freedom on.
    freedom = len(outcomes) - 1
    width = 2 / (9 * freedom)
    return statistic / (freedom * (1 - width + NORMAL_QUANTILE * width**0.5) ** 3)
