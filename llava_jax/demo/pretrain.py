"""The tower's own pretraining, as CLIP had one: it learns what each patch of a tile shows, which the scenes know."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llava_jax.config import LlavaConfig
from llava_jax.constants import IGNORE_INDEX
from llava_jax.demo.scenes import make_scene
from llava_jax.demo.truths import CLASSES, Truths, patch_truths, seen_tiles
from llava_jax.inputs.workers import Workers
from llava_jax.models.vision import CLIPVisionTower
from llava_jax.training.optimizer import learning_rate_schedule
from llava_jax.training.states import States

SCENES_PER_STEP, TILES_PER_STEP = 32, 160  # the scenes' tiles are cut off or repeated to that number
SHOWN_WEIGHT = 6.0  # of a patch that shows something, against one that shows nothing
LOSS_WEIGHTS = {"character": 2.0}  # the hardest to see
SIGN_SHARE = 0.8  # the share of the scenes that have a sign: more than elsewhere, to learn to read
LOG_EVERY, SAVE_EVERY, STEPS_AHEAD = 50, 250, 6  # steps


def make_tiles(config: LlavaConfig, seed: int, count: int, rows: int, step: int) -> tuple[np.ndarray, Truths]:
    """The tiles [rows, S, S, 3] of a step, drawn from those of `count` scenes, and what they show."""
    scenes = [make_scene((seed, step, i), signs=SIGN_SHARE) for i in range(count)]
    tiles = np.concatenate([seen_tiles(scene, config) for scene in scenes])
    truths = [patch_truths(scene, config) for scene in scenes]
    picked = np.resize(np.random.default_rng((seed, step)).permutation(len(tiles)), rows)
    return tiles[picked], Truths(*(np.concatenate(parts)[picked] for parts in zip(*truths, strict=True)))


def loss_function(config: LlavaConfig, params: dict, tiles, truths: Truths):
    """(loss, {name: the share of patches read right, of those that show something, or the error of a place})."""
    features = CLIPVisionTower(config).apply({"params": params["vision_tower"]}, tiles)
    loss: jax.Array | float = 0.0
    right: dict[str, jax.Array] = {}
    for name in CLASSES:
        head, labels = params["heads"][name], getattr(truths, name)
        logits = features @ head["kernel"] + head["bias"]
        weight = jnp.where(labels > 0, SHOWN_WEIGHT, 1.0) * (labels != IGNORE_INDEX)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        loss += LOSS_WEIGHTS.get(name, 1.0) * jnp.sum(weight * losses) / jnp.sum(weight)
        right[name] = jnp.sum((logits.argmax(-1) == labels) & (labels > 0)) / jnp.maximum(jnp.sum(labels > 0), 1)
    for name, weight in (("offset", truths.kind > 0), ("place", jnp.ones_like(truths.kind))):
        head = params["heads"][name]
        errors = optax.huber_loss(features @ head["kernel"] + head["bias"], getattr(truths, name)).sum(-1)
        right[name] = jnp.sum(errors * weight) / jnp.maximum(jnp.sum(weight), 1)
        loss += 2 * right[name]
    return loss, right


def train_step(config: LlavaConfig, optimizer, params: dict, opt_state, tiles, truths):
    """One update: (params, opt_state, metrics)."""
    grad = jax.value_and_grad(partial(loss_function, config), has_aux=True)
    (loss, metrics), gradients = grad(params, tiles, truths)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, {"loss": loss, **metrics}


def first_heads(width: int) -> dict:
    """One linear map for each label, from zero."""
    sizes = {**CLASSES, "offset": 2, "place": 2}
    return {name: {"kernel": jnp.zeros((width, n)), "bias": jnp.zeros(n)} for name, n in sizes.items()}


def pretrain_tower(tower: dict, config: LlavaConfig, output: Path, *, steps: int, learning_rate: float, seed: int):
    """The tower's parameters after `steps` steps; started again, it goes on from the last step saved in `output`."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate_schedule(learning_rate, steps, 0.05))
    )
    params = {"vision_tower": tower, "heads": first_heads(config.feature_size)}
    state = {"params": params, "opt_state": optimizer.init(params), "step": np.array(0)}
    step_function = jax.jit(partial(train_step, config, optimizer), donate_argnums=(0, 1))
    output.mkdir(parents=True, exist_ok=True)
    make = partial(make_tiles, config, seed, SCENES_PER_STEP, TILES_PER_STEP)
    with States(output / "checkpoints", keep=1) as states, Workers(make, 1) as workers:
        state = states.newest(state)
        with (output / "metrics.jsonl").open("a", encoding="utf-8") as log:
            left = range(int(state["step"]) + 1, steps + 1)
            for step, batch in zip(left, workers.map(((step,) for step in left), STEPS_AHEAD), strict=True):
                *new, metrics = step_function(state["params"], state["opt_state"], *batch)
                state = dict(zip(("params", "opt_state"), new, strict=True)) | {"step": np.array(step)}
                if step % LOG_EVERY == 0 or step == steps:
                    line = {"step": step, **{name: round(float(value), 4) for name, value in metrics.items()}}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    print(line, flush=True)
                if step % SAVE_EVERY == 0 or step == steps:
                    states.save(step, state)
    return state["params"]["vision_tower"]
