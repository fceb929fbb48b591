"""Accuracies with their intervals, and whether two classifiers differ."""

import math

from scipy.stats import binomtest


def wilson(right, n, z=1.96):
    """The 95 % interval of a share of which `right` of n were seen, in per cent.  Wilson 1927."""
    p, denominator = right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))  # rounding must not leave -0.00


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


def score(predicted, labels):
    right = int((predicted == labels.cpu()).sum())
    return {"accuracy": 100 * right / len(labels), "interval": wilson(right, len(labels))}
