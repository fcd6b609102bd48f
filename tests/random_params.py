"""Random weights of any configuration, which need no program compiled."""

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models.llava_llama import param_shapes


def random_params(config, seed=0):
    """The tree that `init_params` would fill, in float32: normal values about as large, scales of 1, no biases."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.full(leaf.shape, name == "scale", jnp.float32)
        inputs = leaf.shape[-1] if name == "embedding" else np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.float32(inputs) ** 0.5)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(config))
