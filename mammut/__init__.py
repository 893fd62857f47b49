"""MaMMUT-style vision-language models in JAX: one ViT, one text decoder, two passes.

Importing this pulls in jax, flax and NumPy; image and tokenizer libraries are imported when they
are first used, and TensorFlow and PyTorch never.
"""

from mammut import presets
from mammut.core.sharding import MeshConfig, make_mesh
from mammut.core.version import VERSION
from mammut.data.config import DataConfig, TokenizerConfig
from mammut.data.images import BadImage, ImageTransform
from mammut.data.processor import Processor
from mammut.data.video import BadVideo, Clip, VideoTransform
from mammut.generation.interleaved import generate_prompts
from mammut.generation.search import GenerateConfig
from mammut.generation.text import Text, answer, caption, generate_text
from mammut.models.adapter_modules import AdapterConfig
from mammut.models.adapters import (
    add_adapter,
    merge_adapter,
    num_adapter_params,
    remove_adapter,
    set_active_adapters,
)
from mammut.models.compute import AugmentConfig, ComputeConfig
from mammut.models.decoder import DecoderConfig
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.models.video import TubeConfig, VideoConfig
from mammut.models.vit import VisionConfig
from mammut.training.config import LossConfig, OptimizerConfig, TrainConfig
from mammut.weights.adapter_folder import load_adapter, save_adapter
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.model_folder import load, load_language_model, save

__all__ = [
    # a model and its processor
    "load",
    "load_language_model",
    "save",
    "MaMMUT",
    "Processor",
    "ImageTransform",
    "VideoTransform",
    "Clip",
    # texts from images
    "caption",
    "answer",
    "generate_text",
    "generate_prompts",
    "Text",
    "GenerateConfig",
    # adapters
    "add_adapter",
    "remove_adapter",
    "set_active_adapters",
    "merge_adapter",
    "num_adapter_params",
    "save_adapter",
    "load_adapter",
    # the configuration of a model
    "presets",
    "ModelConfig",
    "VisionConfig",
    "ResNetConfig",
    "VideoConfig",
    "TubeConfig",
    "DecoderConfig",
    "AdapterConfig",
    "ComputeConfig",
    # the configuration of a run
    "TrainConfig",
    "DataConfig",
    "TokenizerConfig",
    "LossConfig",
    "OptimizerConfig",
    "AugmentConfig",
    "MeshConfig",
    "make_mesh",
    # errors
    "BadImage",
    "BadVideo",
    "CheckpointError",
]

__version__ = VERSION
