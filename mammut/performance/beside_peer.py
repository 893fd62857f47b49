"""Times mammut and a peer in turn, on the same weights.

Both run in one process.
"""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mammut.generation.search import GenerateConfig
from mammut.models.mammut import MaMMUT
from mammut.performance.generation_time import cached, compiled_loop, rates
from mammut.performance.peers import (
    BETAS,
    EPS,
    LEARNING_RATE,
    START,
    WEIGHT_DECAY,
    Mode,
    OpenClip,
    PeerError,
)
from mammut.performance.step_time import RunSettings, computed, exact_float32, make_step
from mammut.performance.timing import in_turns, ratio, summary
from mammut.training.config import OptimizerConfig
from mammut.weights.model_folder import load

# Relative differences in float32; sums in another order differ by about 1e-6.
TOLERANCES = {"contrastive_loss": 1e-4, "caption_loss": 1e-4, "grad_norm": 1e-3}


def load_ours(peer: OpenClip) -> MaMMUT:
    """Loads our model with the peer's weights.

    The weights go through the files that the peer would publish.
    """
    with tempfile.TemporaryDirectory() as folder:
        peer.save(pathlib.Path(folder))
        return load(folder)[0]


def require_equal(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """Computes the relative differences of both losses and of the gradient's norm.

    Raises:
      PeerError: one is above its tolerance: the two do not compute the same, so their times mean
        nothing.
    """
    differences = {name: abs(ours[name] - theirs[name]) / abs(theirs[name]) for name in TOLERANCES}
    # `not <=`: a NaN loss differs from every other loss.
    wrong = [
        f"{name} is {ours[name]:.6g} here and {theirs[name]:.6g} there"
        for name, limit in TOLERANCES.items()
        if not differences[name] <= limit
    ]
    if wrong:
        raise PeerError(
            f"on the same weights and batch {'; '.join(wrong)}: "
            "only sides that compute the same are timed"
        )
    return differences


def as_peer(settings: RunSettings) -> RunSettings:
    """Fills in how our side is computed beside a peer.

    Unless given, it is float32 as the peer's, and keeps every intermediate result as PyTorch does.
    """
    return dataclasses.replace(
        settings, dtype=settings.dtype or "float32", remat=settings.remat or "none"
    )


def train(
    peer: OpenClip,
    ours: MaMMUT,
    settings: RunSettings,
    *,
    rounds: int,
    per_turn: int,
    modes: tuple[Mode, ...] = ("eager",),
) -> dict[str, Any]:
    """Times full training steps of both: forward, both losses, backward, AdamW.

    Losses are compared in float32. In bfloat16, where every order of sums rounds differently, steps
    are only timed; the peer's bfloat16 comes from `torch.autocast`, open_clip's own `amp_bf16`.

    Args:
      peer: the peer, with its batch.
      ours: our model with the same weights.
      settings: how our step is computed.
      rounds: rounds of turns; see `in_turns`.
      per_turn: steps of a turn.
      modes: PyTorch's modes.

    Raises:
      PeerError: the losses or gradients differ.
    """
    settings = as_peer(settings)
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        b1=BETAS[0],
        b2=BETAS[1],
        eps=EPS,
        clip_norm=0.0,
    )
    tokens = peer.batch["tokens"]
    batch = {
        "image": peer.batch["image"],
        "tokens": tokens.astype(np.int32),
        "text_valid": tokens != 0,
    }

    def our_step(dtype):
        timed = dataclasses.replace(settings, dtype=dtype)
        config = timed.train_config(ours.config, len(tokens), optimizer=optimizer, steps=10**6)
        with exact_float32(dtype):
            return make_step(config, ours, batch)

    step = our_step("float32")
    names = {
        "contrastive_loss": "loss_contrastive",
        "caption_loss": "loss_caption",
        "grad_norm": "grad_norm",
    }
    mine = {name: step.metrics[own] for name, own in names.items()}
    theirs = peer.losses_and_gradient()
    differences = require_equal(mine, theirs)
    dtype = settings.dtype
    if dtype != "float32":
        step = our_step(dtype)
    calls = {"mammut": step, **{mode: peer.stepper(mode, dtype) for mode in modes}}
    with jax.set_mesh(step.trainer.mesh):
        turns = in_turns(calls, rounds, per_turn)
    return {
        "batch": len(tokens),
        "dtype": dtype,
        "losses": {"mammut": mine, "peer": theirs, "relative_difference": differences},
        "times": {name: summary(sum(times, []), len(tokens)) for name, times in turns.items()},
        "speedup": {mode: ratio(turns[mode], turns["mammut"]) for mode in modes},
    }


def generation(
    peer: OpenClip,
    ours: MaMMUT,
    settings: RunSettings,
    images: int,
    beams: int,
    new_tokens: int,
    *,
    rounds: int,
    per_turn: int = 1,
) -> dict[str, Any]:
    """Times generation of exactly `new_tokens` tokens.

    The images are the first ones of the batch.

    No text ends early: the peer forbids the end token up to the last position, and here no token is
    the end. Greedy texts are compared, in float32. Beams are not: released open_clip ranks them by
    sums of logits that are no log-probabilities.

    Args:
      peer: the peer, with its batch.
      ours: our model with the same weights.
      settings: how our model is computed.
      images: how many images.
      beams: how many beams; 1: greedy.
      new_tokens: tokens of each text.
      rounds: rounds of turns; see `in_turns`.
      per_turn: batches of a turn.

    Returns:
      The row; where the peer cannot generate, with `not_run` in place of times.

    Raises:
      PeerError: greedy texts differ.
    """
    settings = as_peer(settings)
    dtype = settings.dtype
    row: dict[str, Any] = {
        "batch": images,
        "beams": beams,
        "new_tokens": new_tokens,
        "dtype": dtype,
    }
    try:
        theirs = peer.try_generation(images, beams, new_tokens)
    except PeerError as error:
        return row | {"not_run": str(error)}
    row["peer_images_at_once"] = peer.at_once
    start = jnp.full((images, 1), START, jnp.int32)
    image = jnp.asarray(peer.batch["image"][:images])
    config = GenerateConfig(max_new_tokens=new_tokens, num_beams=beams)

    def our_loop(dtype):
        model = computed(ours, dataclasses.replace(settings, dtype=dtype))
        loop = functools.partial(cached, vocab_size=peer.end_id)
        return compiled_loop(loop, model, image, start, config)

    if beams == 1:  # the last token of the peer's texts is the end
        mine = np.asarray(our_loop("float32")[0]().tokens)[:, 0]
        row["texts_equal"] = int((mine[:, :new_tokens] == theirs[:, :new_tokens]).all(1).sum())
        if row["texts_equal"] < images:
            raise PeerError(
                f"greedy texts of {images - row['texts_equal']} of {images} images differ on the "
                "same weights: only sides that compute the same are timed"
            )
    call, row["compile_s"] = our_loop(dtype)
    calls = {"mammut": call, "peer": lambda: peer.generate(images, beams, new_tokens, dtype)}
    turns = in_turns(calls, rounds, per_turn)
    times = {name: rates(own, images, new_tokens) for name, own in turns.items()}
    return row | {"times": times, "speedup": ratio(turns["peer"], turns["mammut"])}
