"""For tests: the original modules of our ResNets, with random numbers in all that they hold."""

import sys
from typing import Any

import numpy as np
import pytest
from open_clip_models import original_package

from mammut.config import ResNetConfig


def original(config: ResNetConfig) -> Any:
    """Build open_clip's ModifiedResNet or timm's NormFreeNet for inference.

    Every parameter and statistic that starts as a constant is changed at random.
    """
    torch = pytest.importorskip("torch", reason="the originals are PyTorch modules")
    original_package()  # and with it timm, which needs the same care
    torch.manual_seed(0)
    if config.kind == "clip":
        build = sys.modules["open_clip.modified_resnet"].ModifiedResNet
        module = build(
            config.stages, 16, heads=4, image_size=config.image_size, width=config.stem_width
        )
    else:
        channels = tuple(4 * config.stem_width * 2**place for place in range(4))
        sizes = {"depths": config.stages, "channels": channels, "stem_chs": config.stem_width}
        module = sys.modules["timm"].create_model("nf_resnet50", num_classes=7, **sizes)
    for name, value in module.state_dict().items():
        if name.endswith(("running_var", "gain")):
            value.uniform_(0.5, 1.5)
        elif value.ndim == 1:
            value.add_(0.2 * torch.randn(value.shape))
    return module.eval()


def features(module: Any, image: np.ndarray) -> np.ndarray:
    """Return the last stage's features of normalised images.

    Shape: float32[B, down * across, D], one row for each place.
    """
    import torch

    x = torch.from_numpy(image).permute(0, 3, 1, 2)
    with torch.no_grad():
        if hasattr(module, "attnpool"):
            module.attnpool = torch.nn.Identity()
            x = module(x)
        else:
            x = module.forward_features(x)
    return x.flatten(2).transpose(1, 2).numpy()


def arrays(module: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The state dict of a module."""
    return {f"{prefix}{name}": value.numpy() for name, value in module.state_dict().items()}
