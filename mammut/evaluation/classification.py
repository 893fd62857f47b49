"""The classes of a set's images: by embedding, or by the likelihood of their names."""

from typing import Literal

from mammut.data.examples import BadExample, Source

Method = Literal["contrastive", "likelihood"]


def class_names(source: Source) -> list[str]:
    """The names that occur in a set, sorted; those of examples that cannot be read are left out."""
    names = set()
    for index in range(len(source)):
        try:
            names.update(text for _, text in source.pairs(index))
        except BadExample:
            continue
    return sorted(names)
