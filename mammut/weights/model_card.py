"""The model card: a README.md beside the weights that says what they are, how to load them, and what they scored."""

import pathlib
from typing import Any

from mammut.core.files import read_json_object, replacing_file
from mammut.core.mapped_file import CheckpointError
from mammut.data.processor import Processor
from mammut.models.compute import ComputeConfig
from mammut.models.flops import num_params
from mammut.models.mammut import ModelConfig

_MARK = "library_name: mammut"


def write_card(
    folder: pathlib.Path,
    config: ModelConfig,
    processor: Processor,
    compute: ComputeConfig = ComputeConfig(),
) -> None:
    """Writes `README.md` into a model folder; a README.md that somebody else wrote is left alone.

    The numbers are those of the run in the same folder: its `run.json` and the score files under
    `eval/`.
    """
    path = folder / "README.md"
    if path.exists() and _MARK not in path.read_text("utf-8", errors="replace"):
        return
    vision, text, counts, name = (
        config.vision,
        config.text,
        num_params(config),
        folder.resolve().name,
    )
    retrieves, captions = text.pooling != "none", text.depth > 0
    if retrieves and captions:
        kind = "A vision-language model of the MaMMUT family (arXiv 2303.16839): one image encoder, one text decoder."
    else:
        kind = f"A vision-language model: an image encoder, a text {'decoder' if captions else 'encoder'}."
    use = 'image_embed = model.encode_image(processor(images=["photo.jpg"])["image"])'
    if not retrieves:
        use = 'captions = mammut.caption(model, processor, ["photo.jpg"])'
    sight = f"{text.num_cross_layers} see the image"
    if config.num_prefix_tokens:
        sight = f"an image is {config.num_prefix_tokens} positions before the text"
    tags = ["image-text-retrieval"] * retrieves + ["image-captioning"] * captions
    lines = [
        "---",
        _MARK,
        f"tags: [{', '.join(['vision-language', *tags, 'jax'])}]",
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
        f"| parameters | {counts['total']:,} |",
        f"| image | {vision.image_size} x {vision.image_size} pixels ({processor.image.mode}), {vision.summary} |",
        f"| text | up to {processor.max_length} tokens of {text.vocab_size:,} ({processor.tokenizer.kind}); "
        f"{text.text_only_depth + text.depth} layers of width {text.width}; {sight} |",
        f"| embedding | {config.embed_size} numbers |",
        f"| stored as | {compute.param_dtype} |",
        *_training(folder / "run.json"),
        "",
        *_scores(folder),
    ]
    with replacing_file(path) as new:
        new.write_text("\n".join(lines) + "\n", "utf-8")


def _training(path: pathlib.Path) -> list[str]:
    """The rows of the table that say how it was trained; none without a run."""
    run = _read(path)
    try:
        config = run["config"]
        data, optimizer = config["data"], config["optimizer"]
        return [
            f"| trained on | {data['train']}; {config['steps']:,} steps of {data['batch_size']:,}, "
            f"task {config['task']} |",
            *(
                f"| {what} started from | {config[name]} |"
                for name, what in (
                    ("init", "model"),
                    ("init_vision", "image encoder"),
                    ("init_text", "text decoder"),
                )
                if config.get(name)
            ),
            f"| optimizer | {optimizer['name']}, peak rate {optimizer['learning_rate']:g}, "
            f"weight decay {optimizer['weight_decay']:g}, seed {config['seed']} |",
        ]
    except (KeyError, TypeError):
        return []


def _scores(folder: pathlib.Path) -> list[str]:
    """A table of every score file of the run."""
    rows = []
    for path in sorted(folder.glob("eval/*.json")):
        scores = _read(path)
        metrics = scores.get("metrics")
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            if isinstance(value, int | float):
                rows.append(
                    f"| {scores.get('task')} | {scores.get('data')} | {name} | {value:.4g} |"
                )
    head = ["| task | data | metric | value |", "|---|---|---|---|"]
    return [*head, *rows] if rows else ["No evaluation is recorded in this folder."]


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except CheckpointError:
        return {}
