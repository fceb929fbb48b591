"""Accuracies with their intervals, and whether two classifiers differ."""

import math

from scipy.stats import binomtest


def mcnemar(first, second):
    """Two classifiers on the same images, by the images on which just one of them is right.  McNemar 1947.

    first, second: (N,) bool, right or not -> difference of the accuracies in points, its 95 % interval, the exact
    two-sided p-value of both being equally good
    """
    n = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    one = only_first + only_second
    difference = (only_first - only_second) / n
    half = 1.96 * math.sqrt(max(one / n - difference**2, 0) / n)
    p = binomtest(only_first, one).pvalue if one else 1.0
    return {
        "only_first_right": only_first,
        "only_second_right": only_second,
        "difference": 100 * difference,
        "interval": [100 * (difference - half), 100 * (difference + half)],
        "p_value": float(p),
    }


def wilson(right):
    """right (N,) bool -> the share of True, and its 95 % interval, two shares  (Wilson 1927)."""
    test = binomtest(int(right.sum()), len(right))
    low, high = test.proportion_ci(method="wilson")
    return test.statistic, low, high


def score(predicted, labels):
    """Predicted classes (N,) and true ones -> accuracy and its 95 % interval, in per cent."""
    share, low, high = wilson(predicted == labels.cpu())
    return {"accuracy": 100 * share, "interval": [100 * low, 100 * high]}
