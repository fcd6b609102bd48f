"""Which parameters a stage trains, and the optimizer of the reference's trainer."""

from __future__ import annotations

import math
import re

import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.config import LlavaConfig
from llava_jax.training.train_options import STAGES, TrainOptions

NO_DECAY = r".*/bias|.*norm\d?/scale"  # as transformers' Trainer has it: biases and norms


def trainable_pattern(stage: str, config: LlavaConfig, tune_tower: bool = False) -> str:
    """The regex of the paths that a stage trains.

    Args:
        tune_tower: unfreeze_mm_vision_tower. What of the tower comes after mm_vision_select_layer is left alone: torch
            gives it no gradient, and so no weight decay.
    """
    if not tune_tower:
        return STAGES[stage]
    layers = config.vision.num_hidden_layers
    used = range(config.mm_vision_select_layer % (layers + 1))
    return STAGES[stage] + rf"|vision_tower/(embeddings|pre_layrnorm|{'|'.join(f'layers_{i}' for i in used)})/.*"


def split_params(params: dict, pattern: str) -> tuple[dict, dict]:
    """(trained, frozen): the parameters whose path the regex matches, and the others."""
    flat = flatten_dict(params, sep="/")
    trained = {path: x for path, x in flat.items() if re.fullmatch(pattern, path)}
    frozen = {path: x for path, x in flat.items() if path not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def join_params(trained: dict, frozen: dict) -> dict:
    """`split_params` undone."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained))


def learning_rate_schedule(peak: float, total_steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear from 0 to `peak`, then half a cosine to 0 (transformers' get_cosine_schedule_with_warmup)."""
    warmup = math.ceil(total_steps * warmup_ratio)
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, max(1, total_steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(warmup + 1, total_steps))


def make_optimizer(options: TrainOptions, total_steps: int) -> optax.GradientTransformation:
    """AdamW on gradients clipped together, with the reference trainer's parameter groups.

    Args:
        total_steps: updates of the whole run, after accumulation.
    """
    own = {"base": None, "projector": options.mm_projector_lr, "tower": options.mm_vision_tower_lr}
    rates = {name: options.learning_rate if rate is None else rate for name, rate in own.items()}
    schedules = {
        name: optax.scale_by_learning_rate(learning_rate_schedule(peak, total_steps, options.warmup_ratio))
        for name, peak in rates.items()
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.scale_by_adam(options.adam_beta1, options.adam_beta2, options.adam_epsilon),
        optax.add_decayed_weights(options.weight_decay, mask=_decayed),
        optax.partition(schedules, _group),
    )
    if options.gradient_accumulation_steps == 1:
        return optimizer
    return optax.MultiSteps(optimizer, options.gradient_accumulation_steps).gradient_transformation()


def _decayed(params: dict) -> dict:
    return _by_path(params, lambda path: not re.fullmatch(NO_DECAY, path))


def _group(params: dict) -> dict:
    """Which learning rate: mm_projector_lr is for the projector's own weights, image_newline is not among them."""

    def name(path: str) -> str:
        return "projector" if path.startswith("mm_projector/") else "tower" if "vision_tower/" in path else "base"

    return _by_path(params, name)


def _by_path(params: dict, function) -> dict:
    return unflatten_dict({path: function(path) for path in flatten_dict(params, sep="/")}, sep="/")
