"""Times, and what is made of them: medians, ratios with an interval, exponents of growth."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Between contestants: threads of the one that ran last stop waiting for work in a loop, and sleep.
_PAUSE_S = 0.05


def summary(seconds: Sequence[float], per_call: float | int | None = None) -> dict[str, Any]:
    """Median and interquartile range of times, and how many they are; with `per_call` things a call, their rate.

    Returns:
      `seconds`, `seconds_iqr`, `calls`, `all_seconds`, and `per_s` where `per_call` is given.
    """
    low, median, high = (float(x) for x in np.percentile(seconds, [25, 50, 75]))
    rate = {} if per_call is None else {"per_s": per_call / median}
    found = {"seconds": median, "seconds_iqr": high - low, **rate}
    return {**found, "calls": len(seconds), "all_seconds": [float(x) for x in seconds]}


def timed(call: Callable[[], Any], calls: int, warmup: int = 1) -> list[float]:
    """Seconds of each of `calls` calls after `warmup` more; a call returns when its work is done."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def in_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, per_turn: int
) -> dict[str, list[list[float]]]:
    """Seconds of every contestant's turns: first to last, then last to first, `rounds` times.

    A turn is `per_turn` calls after one that is not counted, so that nobody pays for the caches,
    clock and threads that the one before left behind, and a machine that slows down slows all of
    them.
    """
    turns: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in [*calls, *reversed(calls)]:
            time.sleep(_PAUSE_S)
            turns[name].append(timed(calls[name], per_turn))
    return turns


def ratio(
    slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]], draws: int = 2_000
) -> dict[str, float]:
    """How many times as long `slow` takes as `fast`: the ratio of medians, its 95 % interval, the ratio of minima.

    The interval is a bootstrap's over turns and then over the times in them: times of one turn are
    alike. On a machine that others use too it is wide; the fastest calls of both are those that
    were disturbed least.

    Returns:
      `ratio`, `low`, `high`, `of_fastest`.
    """
    rng = np.random.default_rng(0)

    def median(turns):
        drawn = [turns[i] for i in rng.integers(len(turns), size=len(turns))]
        return np.median(np.concatenate([rng.choice(turn, len(turn)) for turn in drawn]))

    ratios = [median(slow) / median(fast) for _ in range(draws)]
    low, high = (float(x) for x in np.percentile(ratios, [2.5, 97.5]))
    slow, fast = np.concatenate(slow), np.concatenate(fast)
    of_all, of_fastest = float(np.median(slow) / np.median(fast)), float(slow.min() / fast.min())
    return {"ratio": of_all, "low": low, "high": high, "of_fastest": of_fastest}


def exponent(sizes: Sequence[float | int], values: Sequence[float | int]) -> float:
    """k of the least-squares fit `value = a * size ** k`: the slope in logarithms.

    Raises:
      ValueError: there are fewer than two different sizes, or a size or value is not positive.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values) or min(*sizes, *values) <= 0:
        raise ValueError(
            f"sizes {list(sizes)} with {list(values)} have no exponent, expected two sizes, all positive"
        )
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
