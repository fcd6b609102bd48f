"""What lmms-eval finds by this package's entry point, whatever model it then runs: so this imports little."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """`--model llava_jax`; with `--force_simple`, which multiple choice by likelihood needs, the simple one."""
    module = "llava_jax.evaluation.lmms_eval"
    return ModelManifest("llava_jax", f"{module}.LlavaJaxSimple", f"{module}.LlavaJax")
