"""All config classes of a model and of a run.

Recipes import them from here. Each class is defined beside the code that it configures.

`ModelConfig` is the architecture and travels with the weights; `TrainConfig` is one run and
contains it. Named architectures are in `mammut.presets`, named runs in `configs/`.
"""

from mammut.core.fields import from_dict, to_dict
from mammut.core.sharding import MeshConfig
from mammut.data.config import DataConfig, TokenizerConfig
from mammut.models.adapter_modules import AdapterConfig
from mammut.models.compute import AugmentConfig, ComputeConfig
from mammut.models.decoder import DecoderConfig
from mammut.models.mammut import ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.models.video import TubeConfig, VideoConfig
from mammut.models.vit import VisionConfig
from mammut.training.config import LossConfig, OptimizerConfig, TrainConfig

__all__ = [
    "AdapterConfig",
    "AugmentConfig",
    "ComputeConfig",
    "DataConfig",
    "DecoderConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ResNetConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TubeConfig",
    "VideoConfig",
    "VisionConfig",
    "from_dict",
    "to_dict",
]
