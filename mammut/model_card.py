"""The model card: a README.md beside the weights that says what they are, how to load them, and what they scored."""

import json
import pathlib
from typing import Any

from mammut.config import ModelConfig
from mammut.model import num_params
from mammut.processor import Processor

_MARK = "library_name: mammut"


def write_card(folder: pathlib.Path, config: ModelConfig, processor: Processor) -> None:
    """Writes `README.md` into a model folder; a README.md that somebody else wrote is left alone.

    The numbers are those of the run in the same folder: its `run.json` and the score files under `eval/`.
    """
    path = folder / "README.md"
    if path.exists() and _MARK not in path.read_text("utf-8", errors="replace"):
        return
    vision, text, counts = config.vision, config.text, num_params(config)
    lines = [
        "---",
        _MARK,
        "tags: [vision-language, image-text-retrieval, image-captioning, jax]",
        "---",
        "",
        f"# {folder.resolve().name}",
        "",
        "A vision-language model of the MaMMUT family (arXiv 2303.16839): one image encoder, one text decoder.",
        "",
        "```python",
        "import mammut",
        f'model, processor = mammut.load("{folder.name}")',
        'batch = processor(images=["photo.jpg"], text=["a dog on grass"])',
        'image_embed = model.encode_image(batch["image"])',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {counts['total']:,} |",
        f"| image | {vision.image_size} x {vision.image_size} pixels ({processor.image.mode}), patches of "
        f"{vision.patch_size}; {vision.depth} layers of width {vision.width} |",
        f"| text | up to {text.max_length} tokens of {text.vocab_size:,} ({processor.tokenizer.kind}); "
        f"{text.text_only_depth + text.depth} layers of width {text.width}; {text.num_cross_layers} see the image |",
        f"| embedding | {config.embed_size} numbers |",
        f"| stored as | {config.param_dtype} |",
        *_training(folder / "run.json"),
        "",
        *_scores(folder),
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _training(path: pathlib.Path) -> list[str]:
    """The rows of the table that say how it was trained; none without a run."""
    run = _read(path)
    try:
        config = run["config"]
        data, optimizer = config["data"], config["optimizer"]
        return [
            f"| trained on | {data['train']}; {config['steps']:,} steps of {data['batch_size']:,}, "
            f"task {config['task']} |",
            *([f"| started from | {config['init']} |"] if config.get("init") else []),
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
                rows.append(f"| {scores.get('task')} | {scores.get('data')} | {name} | {value:.4g} |")
    head = ["| task | data | metric | value |", "|---|---|---|---|"]
    return [*head, *rows] if rows else ["No evaluation is recorded in this folder."]


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
