"""LLaVA-1.6 in pure JAX and Flax."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_jax.config import LlavaConfig as LlavaConfig
    from llava_jax.config import TextConfig as TextConfig
    from llava_jax.config import VisionConfig as VisionConfig
    from llava_jax.inference.llava import Llava as Llava
    from llava_jax.inference.llava import load as load
    from llava_jax.inference.sampling import Greedy as Greedy
    from llava_jax.inference.sampling import Sample as Sample
    from llava_jax.models.llava_llama import init_params as init_params
    from llava_jax.models.vocabulary import initialize_vision_tokenizer as initialize_vision_tokenizer
    from llava_jax.parallel.sharding import make_mesh as make_mesh

_PUBLIC = {
    "load": "llava_jax.inference.llava",
    "Llava": "llava_jax.inference.llava",
    "LlavaConfig": "llava_jax.config",
    "TextConfig": "llava_jax.config",
    "VisionConfig": "llava_jax.config",
    "init_params": "llava_jax.models.llava_llama",
    "initialize_vision_tokenizer": "llava_jax.models.vocabulary",
    "make_mesh": "llava_jax.parallel.sharding",
    "Greedy": "llava_jax.inference.sampling",
    "Sample": "llava_jax.inference.sampling",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    """Public names are imported when first used, so that host-side workers never import JAX."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
