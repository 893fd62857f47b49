"""The model card: a README.md beside the weights.

It describes the model, how to load it, its training and its scores.
"""

import pathlib
from typing import Any

from mammut.core.files import read_json_object, replacing_file
from mammut.core.mapped_file import CheckpointError
from mammut.data.processor import Processor
from mammut.models.compute import ComputeConfig
from mammut.models.flops import num_params
from mammut.models.mammut import ModelConfig
from mammut.models.video import VideoConfig
from mammut.weights.formats.mammut_run import RUN_FILE

_MARK = "library_name: mammut"


def write_card(
    folder: pathlib.Path,
    config: ModelConfig,
    processor: Processor,
    compute: ComputeConfig = ComputeConfig(),
) -> None:
    """Writes `README.md` into a model folder.

    A README.md of another author is not changed. The training and the scores come from
    the run in the same folder: its `run.json` and the score files under `eval/`.
    """
    path = folder / "README.md"
    if path.exists() and _MARK not in path.read_text("utf-8", errors="replace"):
        return
    vision = config.vision
    text = config.text
    name = folder.resolve().name
    retrieves = text.pooling != "none"
    captions = text.depth > 0

    kind = "A vision-language model: an image encoder, a text encoder."
    if captions:
        kind = "A vision-language model: an image encoder, a text decoder."
    if retrieves and captions:
        kind = (
            "A vision-language model of the MaMMUT family (arXiv 2303.16839): "
            "one image encoder, one text decoder."
        )
    seen, file = ("image", "photo.jpg") if processor.video is None else ("video", "clip.mp4")
    use = f'{seen}_embed = model.encode_{seen}(processor(images=["{file}"])["image"])'
    if not retrieves:
        use = f'captions = mammut.caption(model, processor, ["{file}"])'
    sight = f"{text.num_cross_layers} see the image"
    if config.num_prefix_tokens:
        sight = f"an image is {config.num_prefix_tokens} positions before the text"
    tags = ["vision-language"]
    if retrieves:
        tags.append("image-text-retrieval")
    if captions:
        tags.append("image-captioning")

    lines = [
        "---",
        _MARK,
        f"tags: [{', '.join([*tags, 'jax'])}]",
        "---",
        "",
        f"# {name}",
        "",
        kind,
        "",
        "```python",
        "import mammut",
        f'model, processor = mammut.load("{name}")',
        use,
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {num_params(config)['total']:,} |",
        f"| image | {vision.image_size} x {vision.image_size} pixels ({processor.image.mode}), "
        f"{vision.summary} |",
        *_video(config, processor),
        f"| text | up to {processor.max_length} tokens of {text.vocab_size:,} "
        f"({processor.tokenizer.kind}); {text.text_only_depth + text.depth} layers "
        f"of width {text.width}; {sight} |",
        f"| embedding | {config.embed_size} numbers |",
        f"| stored as | {compute.param_dtype} |",
        *_training(folder / RUN_FILE),
        "",
        *_scores(folder),
    ]
    with replacing_file(path) as new:
        new.write_text("\n".join(lines) + "\n", "utf-8")


def _video(config: ModelConfig, processor: Processor) -> list[str]:
    """Makes the table row that says how videos are read.

    There is none for a model that is about images alone.
    """
    settings = config.vision.video
    transform = processor.video
    if settings is None and transform is None:
        return []
    parts = [(settings or VideoConfig(mode="frames")).summary]
    if transform is not None:
        of = "from its whole length" if transform.fps is None else f"{transform.fps:g} a second"
        parts.insert(0, f"{transform.frames} frames of each, {of}")
    return [f"| video | {'; '.join(parts)} |"]


def _training(path: pathlib.Path) -> list[str]:
    """Makes the table rows that say how the model was trained.

    There are none without a run.
    """
    starts = {"init": "model", "init_vision": "image encoder", "init_text": "text decoder"}
    try:
        config = _read(path)["config"]
        data = config["data"]
        optimizer = config["optimizer"]
        rows = [
            f"| trained on | {data['train']}; {config['steps']:,} steps of {data['batch_size']:,}, "
            f"task {config['task']} |"
        ]
        for field, part in starts.items():
            if config.get(field):
                rows.append(f"| {part} started from | {config[field]} |")
        rows.append(
            f"| optimizer | {optimizer['name']}, peak rate {optimizer['learning_rate']:g}, "
            f"weight decay {optimizer['weight_decay']:g}, seed {config['seed']} |"
        )
    except (KeyError, TypeError):  # there is no run, or it is of another version
        return []
    return rows


def _scores(folder: pathlib.Path) -> list[str]:
    """Makes a table of every score file of the run."""
    rows = []
    for path in sorted(folder.glob("eval/*.json")):
        scores = _read(path)
        metrics = scores.get("metrics")
        chance = scores.get("chance")
        if not isinstance(metrics, dict):
            continue
        if not isinstance(chance, dict):  # the file is of an older version
            chance = {}
        for name, value in metrics.items():
            if _is_number(value):
                cells = f"{scores.get('task')} | {scores.get('data')} | {name} | {value:.4g}"
                if _is_number(chance.get(name)):
                    cells += f" (chance {chance[name]:.4g})"
                rows.append(f"| {cells} |")
    if not rows:
        return ["No evaluation is recorded in this folder."]
    return ["| task | data | metric | value |", "|---|---|---|---|", *rows]


def _is_number(value: Any) -> bool:
    # A file that was edited by hand may have a whole number that no float can hold.
    return isinstance(value, int | float) and abs(value) < 2**53


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    The object is empty where there is no file.
    """
    try:
        return read_json_object(path)
    except CheckpointError:
        return {}
