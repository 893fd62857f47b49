"""The parts of a training step, compiled and timed separately.

Each part is timed forward and backward. It takes the outputs of the parts before it, and computes
the gradients of its parameters and of its inputs. Separate parts cannot overlap or be fused with
each other, so their sum is near the step's time, not equal to it. `rest` is the step less its
parts; it includes the norm and the sums of the gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var

from mammut.models.compute import Augment
from mammut.models.flops import forward_flops
from mammut.models.fused_passes import both_passes
from mammut.models.layers import unit
from mammut.models.losses import caption_sum
from mammut.performance.step_time import Step
from mammut.performance.timing import in_turns, summary
from mammut.training.optimizer import make_optimizer
from mammut.training.tasks import ImageTextTask

# The parts of `forward_flops` that each part of a step has.
_COUNTED = {
    "image encoder": ("vision",),
    "contrastive pass": ("contrastive_pass",),
    "caption pass": ("caption_pass",),
    "both passes": ("contrastive_pass", "caption_pass"),
    "vocabulary and caption loss": ("vocabulary",),
}


def make_parts(step: Step) -> dict[str, Callable[[], Any]]:
    """Makes the parts of a step as calls.

    Each call waits for its end. The first calls compile.
    """
    config = step.config
    merge = step.trainer.model
    batch = step.batch
    tokens = batch["tokens"]
    valid = batch["text_valid"]
    task = ImageTextTask(config.loss)
    # the arrays of the step itself are donated
    params = jax.tree.map(jnp.copy, step.state.all_params)

    def loss_of_captions(model, features):
        head = model.text.vocab_kernel, model.text.vocab_bias
        return caption_sum(
            features, *head, *model.caption_labels(tokens, valid), **config.loss.caption_options
        )

    augment = Augment(jax.random.key(0), config.augment)
    encode = jax.jit(lambda params: merge(params).image_tokens(batch["image"], augment))
    encoded = encode(params)
    features = jax.jit(lambda params, x: merge(params).decoder.caption_pass(tokens, valid, x))(
        params, encoded.tokens
    )
    vector = jax.jit(lambda params: unit(merge(params).text_vector(tokens, valid)))(params)

    def image(model):
        encoded = model.image_tokens(batch["image"], augment)
        return encoded.tokens, encoded.vector

    functions = {"image encoder": (image, ())}
    if config.compute.passes == "fused":
        functions["both passes"] = (
            lambda model, x: both_passes(model.decoder, tokens, valid, x),
            (encoded.tokens,),
        )
    else:
        functions["contrastive pass"] = lambda model: model.text_vector(tokens, valid), ()
        functions["caption pass"] = (
            lambda model, x: model.decoder.caption_pass(tokens, valid, x),
            (encoded.tokens,),
        )
    functions["vocabulary and caption loss"] = loss_of_captions, (features,)
    functions["contrastive loss"] = task.contrastive, (unit(encoded.vector), vector)
    parts = {name: _gradients(merge, params, *function) for name, function in functions.items()}
    return parts | {"optimizer": _update(step, params)}


def _gradients(merge: Callable, params: Any, function: Callable, given: tuple) -> Callable[[], Any]:
    """Makes a call of the gradients of `function(model, *given)`.

    They are taken in `given` and in the parameters that the function uses.
    """
    leaves, tree = jax.tree.flatten(params)

    def value(leaves, given):
        outputs = function(merge(jax.tree.unflatten(tree, leaves)), *given)
        # A loss is summed as it is, an array by its squares: with a constant cotangent XLA would
        # leave out products.
        return sum(
            (x.astype(jnp.float32) ** 2).sum() if x.ndim else x for x in jax.tree.leaves(outputs)
        )

    jaxpr = jax.make_jaxpr(value)(leaves, given).jaxpr
    read = {var for equation in jaxpr.eqns for var in equation.invars if isinstance(var, Var)}
    used = [var in read for var in jaxpr.invars[: len(leaves)]]
    others = [None if use else leaf for use, leaf in zip(used, leaves, strict=True)]
    chosen = [leaf if use else None for use, leaf in zip(used, leaves, strict=True)]

    def value_of_used(chosen, given, others):
        pairs = zip(chosen, others, strict=True)
        return value([other if leaf is None else leaf for leaf, other in pairs], given)

    gradients = jax.jit(jax.grad(value_of_used, argnums=(0, 1)))
    return lambda: jax.block_until_ready(gradients(chosen, given, others))


def _update(step: Step, params: Any) -> Callable[[], Any]:
    """Makes a call of the optimizer on gradients that exist already."""
    optimizer = make_optimizer(step.config.optimizer, step.config.steps)

    def update(params, opt_state, gradients):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    gradients = jax.tree.map(lambda x: 1e-3 * jnp.ones_like(x), params)
    kept = [jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params)]

    def call():
        kept[:] = compiled(*kept, gradients)
        jax.block_until_ready(kept)

    return call


def measure_parts(step: Step, rounds: int = 3, per_turn: int = 3) -> dict[str, Any]:
    """Measures the time of every part of a step.

    Returns its `seconds`, its `share` of the step and, where counted, of the FLOPs.
    """
    with jax.set_mesh(step.trainer.mesh):
        calls = {"step": step, **make_parts(step)}
        turns = in_turns(calls, rounds, per_turn)
    times = {name: summary(sum(turn, []))["seconds"] for name, turn in turns.items()}
    whole = times.pop("step")
    config = step.config
    frames = config.data.frames or 1
    flops = forward_flops(config.model, config.augment.patch_drop, frames=frames)
    rows = {}
    for name, seconds in times.items():
        rows[name] = {"seconds": seconds, "share": seconds / whole}
        if name in _COUNTED:
            own = sum(flops[part] for part in _COUNTED[name])
            rows[name]["flops_share"] = own / sum(flops.values())
    rest = whole - sum(times.values())
    return {
        "step": {"seconds": whole, "share": 1.0},
        **rows,
        "rest": {"seconds": rest, "share": rest / whole},
    }
