"""Measures times and computes their statistics.

These are medians, ratios with an interval, and exponents of growth.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Seconds between two contestants: the threads of the last one stop spinning and go to sleep.
_PAUSE_S = 0.05


def summary(seconds: Sequence[float], per_call: float | int | None = None) -> dict[str, Any]:
    """Summarises times: the median, the interquartile range, and a rate.

    Args:
      seconds: the times of single calls.
      per_call: how many things, such as examples, a call processes; None: no rate.

    Returns:
      `seconds`, `seconds_iqr`, `per_s` where `per_call` is given, `calls`, `all_seconds`.
    """
    low, median, high = (float(x) for x in np.percentile(seconds, [25, 50, 75]))
    values = {"seconds": median, "seconds_iqr": high - low}
    if per_call is not None:
        values["per_s"] = per_call / median
    return {**values, "calls": len(seconds), "all_seconds": [float(x) for x in seconds]}


def timed(call: Callable[[], Any], calls: int, warmup: int = 1) -> list[float]:
    """Times `calls` calls after `warmup` others.

    A call must return when its work is done.
    """
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
    """Times several contestants in turns, `rounds` times.

    A round goes from first to last, the next one from last to first.

    A turn is `per_turn` calls after one that is not counted. So none pays for the caches, clock and
    threads of the contestant before, and a machine that slows down slows all of them.

    Returns:
      The seconds of each contestant's turns.
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
    """Computes how many times as long `slow` takes as `fast`.

    The ratio has a 95 % interval.

    The interval comes from a bootstrap over turns, then over the times in a turn, which are alike.
    It is wide on a machine that others use too; there, the fastest calls were disturbed least.

    Returns:
      `ratio` of the medians, its interval `low` to `high`, and the ratio `of_fastest` calls.
    """
    rng = np.random.default_rng(0)

    def median(turns):
        drawn = [turns[i] for i in rng.integers(len(turns), size=len(turns))]
        return np.median(np.concatenate([rng.choice(turn, len(turn)) for turn in drawn]))

    ratios = [median(slow) / median(fast) for _ in range(draws)]
    low, high = (float(x) for x in np.percentile(ratios, [2.5, 97.5]))
    all_slow = np.concatenate(slow)
    all_fast = np.concatenate(fast)
    return {
        "ratio": float(np.median(all_slow) / np.median(all_fast)),
        "low": low,
        "high": high,
        "of_fastest": float(all_slow.min() / all_fast.min()),
    }


def exponent(sizes: Sequence[float | int], values: Sequence[float | int]) -> float:
    """Fits the exponent k of `value = a * size ** k`.

    It takes the least squares of the logarithms.

    Raises:
      ValueError: there are fewer than two different sizes, or a size or value is not positive.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values) or min(*sizes, *values) <= 0:
        raise ValueError(
            f"sizes {list(sizes)} with {list(values)} have no exponent, "
            "expected two sizes, all positive"
        )
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
