"""Videos in the image encoder: kinds of tubes, and which tokens a video has, and where.

It follows section 3.3 of the paper, which takes the tubes from TubeViT (arXiv 2212.03229).
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mammut.core.fields import (
    require,
    require_at_most,
    require_choices,
    require_positive,
    require_types,
)

# The table of TubeViT, for 32 frames and patches of 16 pixels.
_PAPER_FRAMES = 32
_PAPER_PATCH = 16
_PAPER_TUBES = (  # size, stride, offset
    ((8, 8, 8), (16, 32, 32), (0, 0, 0)),
    ((16, 4, 4), (6, 32, 32), (4, 8, 8)),
    ((4, 12, 12), (16, 32, 32), (0, 16, 16)),
)


@dataclasses.dataclass(frozen=True)
class TubeConfig:
    """One kind of tube: a box of frames and pixels, at even distances in the video.

    Along an axis of N frames or pixels there are (N - offset - size) // stride + 1 of them; none
    where one does not fit.

    Example:
      >>> TubeConfig(size=(8, 8, 8), stride=(16, 32, 32)).counts(frames=32, image_size=224)
      (2, 7, 7)
    """

    # Size of a tube: frames, height and width in pixels.
    size: tuple[int, int, int]
    # Distance from one token to the next, in frames and pixels.
    stride: tuple[int, int, int]
    # Where the first tube begins, in frames and pixels.
    offset: tuple[int, int, int] = (0, 0, 0)
    # Tubes along each axis that are joined to one token (space-to-depth): they are as many times
    # nearer to each other than `stride`, and each gives as many times fewer channels.
    join: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self):
        require_types(self)
        limits = {"size": 1, "stride": 1, "offset": 0, "join": 1}
        for name, low in limits.items():
            values = getattr(self, name)
            require(
                all(low <= value <= 2**14 for value in values),
                f"TubeConfig.{name} is {values}, expected whole numbers from {low} to {2**14}",
            )
        require(
            all(stride % join == 0 for stride, join in zip(self.stride, self.join)),
            f"TubeConfig.stride is {self.stride}, expected multiples of TubeConfig.join "
            f"{self.join}",
        )

    @property
    def parts(self) -> int:
        """Tubes that are joined to one token."""
        return math.prod(self.join)

    def counts(self, frames: int, image_size: int) -> tuple[int, int, int]:
        """Counts the tokens of a video along frames, height and width."""
        return tuple(
            len(starts) // join for starts, join in zip(self.starts(frames, image_size), self.join)
        )

    def starts(self, frames: int, image_size: int) -> tuple[range, range, range]:
        """Gives the first frame, row and column of every tube, along each axis.

        Tubes that are left over when they are joined are not among them.
        """
        all_starts = []
        extents = frames, image_size, image_size
        settings = zip(extents, self.size, self.stride, self.offset, self.join)
        for extent, size, stride, offset, join in settings:
            starts = range(offset, extent - size + 1, stride // join)
            all_starts.append(starts[: len(starts) // join * join])
        return tuple(all_starts)

    def centres(self, frames: int, image_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gives the centres of the tokens along each axis, as indices of frames and pixels.

        The centre of pixels 0 to 7 is 3.5. Joined tubes have the mean of their centres.
        """
        all_centres = []
        for starts, size, join in zip(self.starts(frames, image_size), self.size, self.join):
            centres = np.array(starts, float) + (size - 1) / 2
            all_centres.append(centres.reshape(-1, join).mean(1))
        return tuple(all_centres)


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """How an image encoder reads videos.

    In mode "tubes" a video is one sequence of tokens: patches of some of its frames, and tubes. An
    image is a video of one frame, which has no tubes.

    Example:
      >>> video = VideoConfig(frames=16, patch_stride=16, tubes=paper_tubes(16, patch_size=8))
      >>> vision = VisionConfig(image_size=32, patch_size=8, video=video)
      >>> count_patches(vision, frames=16)
      44
    """

    # How frames become tokens. tubes: one sequence for all frames, seen by all layers at once.
    # frames: each frame is encoded as an image; the decoder attends to the tokens of all frames,
    # and the embedding is the mean of the frames' unit embeddings.
    mode: Literal["tubes", "frames"] = "tubes"
    # Number of frames of a video that these settings are made for; there may be more or fewer.
    frames: int = 32
    # Frames from one frame that is cut into the image's patches to the next, in mode tubes.
    patch_stride: int = 32
    # Kinds of tubes beside the patches, in mode tubes. `paper_tubes` makes those of the paper.
    tubes: tuple[TubeConfig, ...] = ()
    # Fixed sine and cosine code of time and place, in mode tubes, that is added to the learned
    # positions. gated: times a learned number. plain: as it is. none: no code.
    fixed_code: Literal["gated", "plain", "none"] = "gated"
    # Whether a learned vector for each frame is added to the frame's tokens for the decoder, in
    # mode frames.
    frame_embed: bool = False

    def __post_init__(self):
        require_types(self)
        require_choices(self)
        require_positive(self, "frames", "patch_stride")
        require_at_most(self, {"frames": 2**12, "patch_stride": 2**14})
        require(
            self.mode == "tubes" or not self.tubes,
            "VideoConfig.tubes are set, which VideoConfig.mode 'frames' does not have",
        )
        for name in ("patch_stride", "fixed_code"):
            value = getattr(self, name)
            require(
                self.mode == "tubes" or value == getattr(VideoConfig, name),
                f"VideoConfig.{name} is {value!r}, which VideoConfig.mode 'frames' does not have",
            )
        require(
            self.mode == "frames" or not self.frame_embed,
            "VideoConfig.frame_embed is True, which goes with VideoConfig.mode 'frames'",
        )
        for tube in self.tubes:
            require(
                tube.offset[0] + tube.size[0] > 1,
                f"VideoConfig.tubes has a tube of size {tube.size}, which fits in one frame: "
                "expected tubes of more frames, so that an image has patches alone",
            )

    @property
    def summary(self) -> str:
        """The settings in words, for reports and model cards."""
        if self.mode == "frames":
            return "frames one by one"
        kinds = f", and {len(self.tubes)} kinds of tubes" if self.tubes else ""
        return f"{self.frames} frames at once: patches, {self.patch_stride} frames apart{kinds}"


def paper_tubes(
    frames: int = _PAPER_FRAMES, patch_size: int = _PAPER_PATCH
) -> tuple[TubeConfig, ...]:
    """Makes the three kinds of tubes of the paper, for videos and patches of other sizes.

    TubeViT gives them for 32 frames and patches of 16 pixels. Their numbers of frames are scaled by
    `frames` / 32, their pixels by `patch_size` / 16, and rounded. The fourth kind of the paper, the
    image's patches of every 32nd frame, is `VideoConfig.patch_stride`, to be scaled alike.

    Example:
      >>> paper_tubes(frames=16, patch_size=8)[0]
      TubeConfig(size=(4, 4, 4), stride=(8, 16, 16), offset=(0, 0, 0), join=(1, 1, 1))
    """
    scales = frames / _PAPER_FRAMES, patch_size / _PAPER_PATCH, patch_size / _PAPER_PATCH

    def scaled(numbers: tuple[int, int, int], least: tuple[int, int, int]) -> tuple[int, ...]:
        rounded = (int(number * scale + 0.5) for number, scale in zip(numbers, scales))
        return tuple(map(max, rounded, least))

    return tuple(
        TubeConfig(
            size=scaled(size, (2, 1, 1)),
            stride=scaled(stride, (1, 1, 1)),
            offset=scaled(offset, (0, 0, 0)),
        )
        for size, stride, offset in _PAPER_TUBES
    )


# Which tokens a video has, and where


def reads_tubes(vision: Any) -> bool:
    """Whether an image encoder reads all frames of a video at once, not one by one."""
    return vision.video is not None and vision.video.mode == "tubes"


def token_kinds(vision: Any) -> tuple[TubeConfig, ...]:
    """Lists the kinds of tubes that an encoder cuts a video into.

    The first are the image's patches, or the image tokens of a ResNet: tubes of one frame.

    Args:
      vision: a `VisionConfig` or `ResNetConfig`.
    """
    pixels = vision.covered_size // vision.grid[0]
    patch = (1, pixels, pixels)
    if not reads_tubes(vision):
        return (TubeConfig(patch, stride=patch),)
    patches = TubeConfig(patch, stride=(vision.video.patch_stride, pixels, pixels))
    return patches, *vision.video.tubes


def token_centres(vision: Any, frames: int = 1) -> Float[np.ndarray, "P 3"]:
    """Tells where each token of an image or a video lies: float[P, 3].

    A row is the centre of a token: frame, y and x, as indices of frames and pixels. They are the
    tokens of the patches and tubes, without a class token, in their order.

    Args:
      vision: a `VisionConfig` or `ResNetConfig`.
      frames: T; 1: an image.

    Example:
      >>> token_centres(VisionConfig(image_size=32, patch_size=16))
      array([[ 0. ,  7.5,  7.5],
             [ 0. ,  7.5, 23.5],
             [ 0. , 23.5,  7.5],
             [ 0. , 23.5, 23.5]])
    """
    centres = []
    for kind in token_kinds(vision):
        axes = np.meshgrid(*kind.centres(frames, vision.image_size), indexing="ij")
        centres.append(np.stack(axes, axis=-1).reshape(-1, 3))
    return np.concatenate(centres)


def count_patches(vision: Any, frames: int = 1) -> int:
    """Counts the patches and tubes of a video; `frames` 1 is an image."""
    counts = (kind.counts(frames, vision.image_size) for kind in token_kinds(vision))
    return sum(map(math.prod, counts))


def count_tokens(vision: Any, frames: int = 1) -> int:
    """Counts the tokens of a video that the decoder attends to; `frames` 1 is an image."""
    if not reads_tubes(vision):
        return frames * vision.num_tokens
    if vision.pooling == "queries":
        return vision.num_tokens
    return vision.num_tokens - count_patches(vision) + count_patches(vision, frames)


def count_left_out(vision: Any, frames: int) -> int:
    """Counts the kinds of tubes that have no token in a video of so many frames.

    An image, `frames` 1, has patches alone, by design.
    """
    counts = (kind.counts(frames, vision.image_size) for kind in token_kinds(vision))
    return sum(math.prod(count) == 0 for count in counts)


def is_of_tubes(path: str) -> bool:
    """Whether a parameter of a model is one of its tubes, which an image does not have."""
    return path.startswith("vision.video_embed.tubes.")


def require_video_sizes(vision: Any) -> None:
    """Raises ValueError where `VisionConfig.video` does not fit the rest of the encoder."""
    video = vision.video
    name = type(vision).__name__
    require(
        vision.low_image_size is None,
        f"{name}.low_image_size is {vision.low_image_size}, expected None: with {name}.video there "
        "is one size of images",
    )
    for tube in video.tubes:
        require(
            all(len(starts) for starts in tube.starts(frames=1, image_size=vision.image_size)[1:]),
            f"VideoConfig.tubes has a tube of size {tube.size}, offset {tube.offset} and join "
            f"{tube.join}, which does not fit in images of {name}.image_size {vision.image_size}",
        )
        require(
            vision.width % tube.parts == 0,
            f"{name}.width {vision.width} is not a multiple of the {tube.parts} tubes of "
            f"TubeConfig.join {tube.join}",
        )
