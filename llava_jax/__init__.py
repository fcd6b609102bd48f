"""LLaVA-1.6 in pure JAX and Flax."""

from importlib import import_module

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
