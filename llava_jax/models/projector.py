"""From the tower's features to the decoder's embeddings."""

from __future__ import annotations

import flax.linen as nn
import jax

from llava_jax.config import LlavaConfig
from llava_jax.models.linear import Linear


class VisionProjector(nn.Module):
    """`depth` linear layers with exact (erf) GELU between: depth 1 is `linear`, depth 2 is `mlp2x_gelu`."""

    hidden_size: int
    depth: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """features [..., mm_hidden_size] → [..., E]."""
        for i in range(1, self.depth + 1):
            features = Linear(self.hidden_size, name=f"linear_{i}")(features)
            if i < self.depth:
                features = jax.nn.gelu(features, approximate=False)
        return features


def build_vision_projector(config: LlavaConfig) -> VisionProjector:
    """The projector that `mm_projector_type` names; `identity` is depth 0 (llava's build_vision_projector)."""
    return VisionProjector(config.text.hidden_size, config.projector_depth)
