"""Help for tests of code that uses mammut: a tiny model, a batch for it, and the place of the shared data."""

import os
import pathlib


def shared_dir() -> pathlib.Path | None:
    """The folder with data sets, fixtures and vocabularies that the repository does not contain; None if absent.

    `MAMMUT_SHARED` names it; without that it is `shared` beside the checkout.
    """
    default = pathlib.Path(__file__).resolve().parents[2] / "shared"
    path = pathlib.Path(os.environ.get("MAMMUT_SHARED", default))
    return path if path.is_dir() else None
