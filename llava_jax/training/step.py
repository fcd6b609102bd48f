"""One training step as a pure function of its state, and where everything in it lies on a mesh."""

from __future__ import annotations

import contextlib
from typing import Any

import flax.struct
import jax
import optax

from llava_jax.inputs.types import Batch, Targets
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM
from llava_jax.parallel.sharding import constrain_params
from llava_jax.training.lora import adapters
from llava_jax.training.loss import next_token_loss
from llava_jax.training.optimizer import join_params

LORA = "lora"  # where the adapters stand among what is trained


@flax.struct.dataclass
class TrainState:
    """What a step changes. The frozen parameters are no part of it."""

    trained: dict  # float32 parameters; adapters, if any, under "lora"
    opt_state: optax.OptState
    step: jax.Array  # int32, micro-batches so far


def loss_function(model: LlavaLlamaForCausalLM, dtype, scale: float, dropout: float, seed: int):
    """(trained, frozen, batch, targets, step) → the loss.

    Args:
        dtype: of the arithmetic, and of the frozen parameters; the loss itself is float32.
        scale, dropout: of the adapters (lora_alpha / lora_r, lora_dropout), used where there are any.
        seed: of the dropout.
    """

    def loss(trained: dict, frozen: dict, batch: Batch[jax.Array], targets: Targets[jax.Array], step) -> jax.Array:
        compute = jax.tree.map(lambda x: x.astype(dtype), trained)
        lora = compute.pop(LORA, None)
        params = {"params": join_params(compute, frozen)}
        key = jax.random.fold_in(jax.random.key(seed), step) if lora and dropout else None
        with adapters(lora, scale, dropout, key) if lora else contextlib.nullcontext():
            hidden: Any = model.apply(params, batch, method="hidden")

        def logits_of(hidden):
            return model.apply(params, hidden, method="logits")

        return next_token_loss(hidden, targets, logits_of, model.config.text.vocab_size)

    return loss


def train_step(loss, optimizer: optax.GradientTransformation, state: TrainState, frozen, batch, targets):
    """One micro-batch.

    Returns:
        (the next state, {"loss", "grad_norm"}: float32 scalars, the norm before clipping)
    """
    value, gradients = jax.value_and_grad(loss)(state.trained, frozen, batch, targets, state.step)
    gradients = constrain_params(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients)}
    return TrainState(trained, opt_state, state.step + 1), metrics
