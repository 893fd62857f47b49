"""The processor of a fresh run.

It is the processor of a model to start from, or one with a given or a new vocabulary.
"""

import base64
import contextlib
import dataclasses
import json
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from mammut.core import distributed
from mammut.data import sources
from mammut.data.images import ImageTransform
from mammut.data.processor import Classes, Processor
from mammut.data.tokenizer import (
    MissingTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from mammut.data.video import VideoTransform
from mammut.evaluation.classification import class_names
from mammut.training.config import TrainConfig
from mammut.weights.opened import OpenedModel
from mammut.weights.warm_start import Start

_ALIVE_EVERY = 5.0  # seconds between signs of life where nothing can be counted
_TOLD_EVERY = 30.0  # seconds between lines on the screen


def shared_processor(
    config: TrainConfig,
    source: sources.Source,
    starts: dict[Start, OpenedModel],
    alive: Callable[[], None] = lambda: None,
) -> Processor:
    """Calls `make_processor` on process 0 and shares the result.

    The other processes of the run get its files. `alive` is called again and again meanwhile.
    """
    made = []

    def files() -> bytes:
        made.append(make_processor(config, source, starts, alive))
        with tempfile.TemporaryDirectory() as folder:
            made[0].save(folder)
            paths = pathlib.Path(folder).iterdir()
            return json.dumps(
                {path.name: base64.b64encode(path.read_bytes()).decode() for path in paths}
            ).encode()

    # The others wait for process 0, whose own watchdog sees whether it goes on.
    with contextlib.nullcontext() if distributed.first() else _repeated(alive):
        given = json.loads(distributed.broadcast_from_first("processor", files))
    if made:
        return made[0]
    with tempfile.TemporaryDirectory() as folder:
        for name, content in given.items():
            (pathlib.Path(folder) / name).write_bytes(base64.b64decode(content))
        return Processor.load(folder)


def make_processor(
    config: TrainConfig,
    source: sources.Source,
    starts: dict[Start, OpenedModel],
    alive: Callable[[], None] = lambda: None,
) -> Processor:
    """Makes the processor of a fresh run.

    It comes from the model that the run starts from, or has a given or a newly trained vocabulary.
    `alive` is called again and again while all texts are read, and a vocabulary is trained.
    """
    of = {name: opened.processor for name, opened in starts.items()}
    text, settings = config.model.text, config.tokenizer
    decoder = next((name for name in ("init_text", "init") if name in starts), None)
    tokenizer = missing = None
    if decoder and not settings.replace:
        tokenizer = of[decoder] and of[decoder].tokenizer
        if isinstance(tokenizer, MissingTokenizer):
            tokenizer, missing = None, tokenizer
        if tokenizer and settings.path and not config.makes_language_model:
            raise ValueError(
                f"tokenizer.path and {decoder} are given: tokenizer.replace True takes another "
                f"vocabulary"
            )
        if not (tokenizer or settings.path):
            raise ValueError(
                f"{decoder} {starts[decoder].where} comes without a tokenizer: tokenizer.path says "
                f"where it is, "
                "tokenizer.replace True takes another"
            )
    if tokenizer is None and settings.path:
        tokenizer = load_tokenizer(settings.path, settings.lowercase)
    elif tokenizer is None:
        tokenizer = _trained_vocabulary(source, text.vocab_size, settings.lowercase, alive)
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"tokenizer.path {settings.path} has {tokenizer.vocab_size} pieces, more than the "
            f"{text.vocab_size} of "
            "model.text.vocab_size"
        )
    size = config.model.vision.image_size
    image = next(
        (of[name].image for name in ("init_vision", "init") if of.get(name)), ImageTransform(size)
    )
    image = dataclasses.replace(
        image, image_size=size, max_image_pixels=config.data.max_image_pixels
    )
    form = of[decoder].text_form if of.get(decoder) else "start_end"
    frames = config.data.frames
    video = None if frames is None else VideoTransform(frames, config.data.frame_rate)
    classes = _classes(config, source, alive)
    processor = Processor(tokenizer, image, config.text_length, form, classes, video)
    if missing:
        missing.require_same_ids(tokenizer)
    if settings.replace and text.pad_id not in (None, processor.pad_id):
        raise ValueError(
            f"model.text.pad_id is {text.pad_id}, the pad of the new vocabulary is "
            f"{processor.pad_id}"
        )
    return processor


def _trained_vocabulary(
    source: sources.Source, vocab_size: int, lowercase: bool, alive: Callable[[], None]
) -> Tokenizer:
    """Trains a vocabulary on all texts of a set, which may take hours.

    It calls `alive` meanwhile, and prints how far it is now and then.
    """
    told = time.monotonic()

    def tell(doing: str) -> None:
        nonlocal told
        alive()
        if time.monotonic() - told >= _TOLD_EVERY:
            told = time.monotonic()
            distributed.say(f"making the vocabulary: {doing}")

    def begun(index: int) -> None:
        tell(f"read {index:,} of {len(source):,} examples")

    with contextlib.ExitStack() as training:

        def captions() -> Iterator[str]:
            yield from sources.texts(source, begun)
            # From here on SentencePiece works, which calls nothing.
            training.enter_context(_repeated(lambda: tell(f"training on {len(source):,} examples")))

        return train_sentencepiece(captions(), vocab_size, lowercase)


@contextlib.contextmanager
def _repeated(call: Callable[[], None]) -> Iterator[None]:
    """Repeats a call in a thread until the context ends."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(_ALIVE_EVERY):
            call()

    thread = threading.Thread(target=repeat, name="mammut-vocabulary", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _classes(
    config: TrainConfig, source: sources.Source, alive: Callable[[], None]
) -> Classes | None:
    """Finds the classes that a run trains its model to name; other tasks have none.

    They are those of the training set: a validation set may lack some of them.
    """
    names = class_names(source, alive) if config.task == "classify" else []
    if not names:
        return None
    return Classes(tuple(names), f"{config.data.prompt_of('')} {{}}".strip())
