"""open_clip as a peer to measure against, in one process.

Sizes, weights and batch are the same.

The peer is a package `open_clip` that the user has: a released one, a checkout's `src`, or LAION's
fork with MaMMUT. Its model is made from a config that both sides read. Every weight is drawn at
random, written as open_clip writes weights, and read by `mammut.load`. Its losses are its own
`CoCaLoss`.
"""

import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import json
import math
import os
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from mammut.models.compute import Dtype
from mammut.weights.files.tensor_file import TensorSpec, write_safetensors

Family = Literal["coca", "mammut"]
Mode = Literal["eager", "compile"]
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.2
BETAS = (0.9, 0.98)
EPS = 1e-6
START = 1  # the id that a generated text starts with


class PeerError(ValueError):
    """The peer cannot run, or computes something else than mammut."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A model to compare: towers of one width and depth."""

    image_size: int
    depth: int
    width: int
    length: int  # text tokens
    batch: int
    patch_size: int = 16


SIZES = {
    "tiny": Size(image_size=64, depth=4, width=192, length=32, batch=32),
    "small": Size(image_size=112, depth=6, width=384, length=64, batch=16),
}


def peer_config(size: Size, family: Family, vocab_size: int) -> dict[str, Any]:
    """Makes open_clip's JSON of a model of this size.

    The model is CoCa, or MaMMUT as in LAION's fork.

    CoCa has as many text layers without attention to the image as with it, and one learned query
    more than patches.
    """
    patches = (size.image_size // size.patch_size) ** 2
    vision = {
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "layers": size.depth,
        "width": size.width,
        "head_width": 64,
        "output_tokens": True,
    }
    text = {
        "context_length": size.length,
        "vocab_size": vocab_size,
        "width": size.width,
        "heads": size.width // 64,
        "layers": size.depth,
    }
    shared = {"embed_dim": size.width, "custom_text": True}
    if family == "coca":
        pool = {
            "attentional_pool": True,
            "attn_pooler_heads": size.width // 64,
            "attn_pooler_queries": patches + 1,
        }
        return shared | {
            "vision_cfg": vision | pool,
            "text_cfg": text | {"embed_cls": True, "output_tokens": True},
            "multimodal_cfg": text | {"attn_pooler_heads": size.width // 64},
        }
    return shared | {
        "vision_cfg": vision | {"pool_type": "avg_all", "final_ln_after_pool": True},
        "text_cfg": text
        | {"output_tokens": True, "cross_attn_ratio": 2, "does_full_decoding": True},
    }


def noise_batch(model_cfg: dict[str, Any], batch: int) -> dict[str, np.ndarray]:
    """Makes a random batch of images and tokens.

    It has `image` uint8[B, height, width, 3] and `tokens` int[B, L], 0 for pads.
    """
    rng = np.random.default_rng(0)
    size = model_cfg["vision_cfg"]["image_size"]
    text = _text_cfg(model_cfg)
    length = text.get("context_length", 77)
    tokens = rng.integers(1, text.get("vocab_size", 49_408), (batch, length))
    real = rng.integers(max(length // 2, 2), length + 1, (batch, 1))
    image = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    return {"image": image, "tokens": np.where(np.arange(length) < real, tokens, 0)}


def _text_cfg(model_cfg: dict[str, Any]) -> dict[str, Any]:
    return model_cfg.get("text_cfg") or model_cfg["multimodal_cfg"]


class OpenClip:
    """A model of open_clip with random weights.

    It has a batch of noise on its device, and an optimizer.

    Args:
      package: the name or folder of the package; see `import_open_clip`.
      model_cfg: open_clip's JSON of a model, or its path, or the name of one that the package has.
      family: a word in the model's name, by which the fork chooses its class.
      rows: examples of the batch.

    Raises:
      PeerError: there is no such package, or it does not have this model.
    """

    def __init__(self, package: str, model_cfg: dict[str, Any] | str, family: Family, rows: int):
        self.package = import_open_clip(package)
        import torch

        self.torch = torch
        self.model_cfg = self._read(model_cfg) if isinstance(model_cfg, str) else model_cfg
        torch.set_num_threads(num_cores())
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, f"{family}_of_this_size.json")
            path.write_text(json.dumps(self.model_cfg), "utf-8")
            self.package.add_model_config(path)
            try:
                self.model = self.package.create_model(path.stem, output_dict=True)
            except (TypeError, RuntimeError, ValueError, KeyError, AssertionError) as error:
                raise PeerError(
                    f"{self.package.__file__} does not make this {family}: {error}"
                ) from error
        # All weights: some start as zeros, and CoCa's vocabulary head is not initialised at all.
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)
                else:
                    parameter.normal_(mean=float(name.endswith("weight")), std=0.02)
            self.model.logit_scale.fill_(math.log(1 / 0.07))
        self.model.to(self.device).train()
        self.batch = noise_batch(self.model_cfg, rows)
        mean, std = (
            np.float32(getattr(self.package, f"OPENAI_DATASET_{name}")) for name in ("MEAN", "STD")
        )
        image = (self.batch["image"].astype(np.float32) / 255 - mean) / std
        self.image = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()).to(self.device)
        self.tokens = torch.from_numpy(self.batch["tokens"].astype(np.int64)).to(self.device)
        self.loss = self.package.loss.CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=1.0)
        # Fused: the fastest of PyTorch's three forms.
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True
        )

    def _read(self, name: str) -> dict[str, Any]:
        """Reads a config by its path, or by its package name.

        The name is the name of a config in the package.
        """
        path = pathlib.Path(name).expanduser()
        if path.suffix == ".json":
            config = json.loads(path.read_text("utf-8"))
        else:
            config = self.package.get_model_config(name)
        if not isinstance(config, dict):
            raise PeerError(
                f"--peer-config is {name}, "
                "expected a .json file or a name of open_clip.list_models()"
            )
        return config.get("model_cfg", config)

    @property
    def version(self) -> str:
        """The versions of the package and of PyTorch."""
        return f"open_clip {self.package.__version__}, torch {self.torch.__version__}"

    def save(self, folder: pathlib.Path) -> None:
        """Writes weights and `open_clip_config.json` as open_clip does for the hub."""
        tensors = {name: np.array(x.detach().cpu()) for name, x in self.model.state_dict().items()}
        specs = {name: TensorSpec(array.shape, array.dtype) for name, array in tensors.items()}
        write_safetensors(folder / "open_clip_model.safetensors", specs, tensors.__getitem__)
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": self.model_cfg, "preprocess_cfg": {}}), "utf-8"
        )

    def losses_and_gradient(self) -> dict[str, float]:
        """Computes both losses and the norm of the gradient.

        They belong to the batch, as in a first step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(self.model)
        sum(losses.values()).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = self.torch.nn.utils.get_total_norm(gradients)
        return {**{name: x.item() for name, x in losses.items()}, "grad_norm": norm.item()}

    def stepper(self, mode: Mode, dtype: Dtype = "float32") -> Callable[[], float]:
        """Makes a training step: forward, both losses, backward, AdamW, logit scale clamped.

        The step returns its loss. `mode` "compile" runs the model through `torch.compile` with its
        defaults.
        """
        model = self.torch.compile(self.model) if mode == "compile" else self.model

        def step() -> float:
            self.optimizer.zero_grad(set_to_none=True)
            with self._computing(dtype):
                loss = sum(self._losses(model).values())
            loss.backward()
            self.optimizer.step()
            with self.torch.no_grad():
                self.model.logit_scale.clamp_(0, math.log(100))
            return loss.item()

        return step

    def generate(
        self, images: int, beams: int, new_tokens: int, dtype: Dtype = "float32"
    ) -> np.ndarray:
        """Generates texts of the first images, greedily or by beams.

        Returns int[images, 1 + new_tokens].

        A text begins with the start token. None ends early: the end, `end_id`, is forbidden up to
        the last position.

        Raises:
          PeerError: this version of the peer does not generate with what is installed.
        """
        length = 1 + new_tokens
        options = {"sot_token_id": START, "eos_token_id": self.end_id, "pad_token_id": self.end_id}
        options |= {"seq_len": length, "min_seq_len": length - 1}
        if beams > 1:
            options |= {"generation_type": "beam_search", "num_beams": beams, "num_beam_groups": 1}
        else:
            options |= {"generation_type": "top_k", "top_k": 1, "fixed_output_length": True}
        self.model.eval()
        try:
            with self.torch.inference_mode(), self._computing(dtype):
                texts = [
                    self.model.generate(image, **options)
                    for image in self.image[:images].split(self.at_once)
                ]
        # The versions of open_clip and transformers may not fit together, and any error may come.
        except Exception as error:
            raise PeerError(
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error
        finally:
            self.model.train()
        return self.torch.cat(texts).cpu().numpy()

    def try_generation(self, images: int, beams: int, new_tokens: int) -> np.ndarray:
        """Calls `generate` with all images at once.

        Where that fails, it calls it with one image after the other.

        Later calls of `generate` do the same.
        """
        self.at_once = images
        try:
            return self.generate(images, beams, new_tokens)
        except PeerError:
            self.at_once = 1  # the fork's greedy search takes one image
            return self.generate(images, beams, new_tokens)

    @property
    def end_id(self) -> int:
        """Id of the end of a text: the vocabulary's last.

        The model takes 0 for a pad.
        """
        return _text_cfg(self.model_cfg).get("vocab_size", 49_408) - 1

    def _computing(self, dtype: Dtype) -> Any:
        return self.torch.autocast(
            self.device.type, self.torch.bfloat16, enabled=dtype == "bfloat16"
        )

    def _losses(self, model: Any) -> dict[str, Any]:
        return self.loss(**model(self.image, self.tokens), output_dict=True)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_open_clip(package: str) -> types.ModuleType:
    """Imports open_clip.

    `package` is its name, or a folder that holds it or its `src`.

    Raises:
      PeerError: it does not exist, or something that it needs is missing.
    """
    if package != "open_clip":
        given = pathlib.Path(package).expanduser().resolve()
        folders = [path for path in (given, given / "src") if (path / "open_clip").is_dir()]
        if not folders:
            raise PeerError(
                f"--peer is {package}, "
                "expected open_clip or a folder that holds the package open_clip"
            )
        folder = folders[0]
        sys.path.insert(0, str(folder))
    with _without_torchvision():
        try:
            import open_clip
            import open_clip.loss
        except ImportError as error:
            raise PeerError(f"--peer {package} does not import: {error}") from error
    if package != "open_clip" and folder not in pathlib.Path(open_clip.__file__).resolve().parents:
        raise PeerError(
            f"--peer is {package}, but open_clip of {open_clip.__file__} was imported before"
        )
    return open_clip


class _Anything(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A stand-in for any module of torchvision.

    Every name in it is a class that does nothing.
    """

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)

        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            modes = {"BICUBIC": 0, "BILINEAR": 1, "NEAREST": 2}
            return type(name, (), {"__init__": lambda self, *_, **__: None, **modes})

        module.__getattr__ = attribute
        return module

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _without_torchvision():
    """Lets open_clip import where torchvision is missing or broken.

    It needs torchvision for its image transforms alone, which no model uses.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        before = set(sys.modules)
        sys.meta_path.insert(0, finder := _Anything())
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            for name in set(sys.modules) - before:
                if name.split(".")[0] == "torchvision":
                    del sys.modules[name]
    else:
        yield
