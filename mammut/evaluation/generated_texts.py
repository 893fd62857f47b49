"""Captions and answers of a whole set: what a model says of its images."""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

from mammut.generation.search import GenerateConfig

# what is said of what does not fit the context
_TOO_LONG = {"prediction": "", "logprob": 0.0, "too_long": True}


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """The fields of a GenerateConfig that are not at their default."""
    defaults = GenerateConfig()
    return {name: value for name, value in vars(config).items() if value != getattr(defaults, name)}


def _ahead(items: Iterable) -> Iterator:
    """`items`, the next of which is started before the one before is used."""
    started = collections.deque()
    for item in items:
        started.append(item)
        if len(started) > 1:
            yield started.popleft()
    yield from started
