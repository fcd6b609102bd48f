"""Published tensor names ↔ parameter paths: one declarative table for each layout, read in both directions."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.constants import DTYPES
from llava_jax.errors import listed

# What a `{field}` of a template stands for. Both sides of a rule have the same fields, so a rule can be reversed.
FIELDS = {
    "i": r"\d+",
    "clip_norm": "layer_norm1|layer_norm2",
    "clip_attn": "q_proj|k_proj|v_proj|out_proj",
    "fc": "fc1|fc2",
    "norm": "input_layernorm|post_attention_layernorm",
    "attn": "q_proj|k_proj|v_proj|o_proj",
    "mlp": "gate_proj|up_proj|down_proj",
    "any": r"(?:.*\.)?",  # any prefix: only in rules that are never reversed
}

# How a published tensor becomes a parameter: the axes' new order (None: as it is).
TRANSFORMS: dict[str, tuple[int, ...] | None] = {
    "identity": None,
    "transpose": (1, 0),
    "conv_oihw_to_hwio": (2, 3, 1, 0),
}


def apply_transform(name: str, array: np.ndarray) -> np.ndarray:
    """A published tensor as the parameter (a view)."""
    axes = TRANSFORMS[name]
    return array if axes is None else array.transpose(axes)


def invert_transform(name: str, array: np.ndarray) -> np.ndarray:
    """A parameter as the published tensor (a view)."""
    axes = TRANSFORMS[name]
    return array if axes is None else array.transpose(np.argsort(axes))


def check_dtype(dtype: str | None) -> None:
    """ValueError unless it is a dtype that parameters are stored in, or None."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not supported; supported: {', '.join(DTYPES)}")


def cast(array: np.ndarray, dtype: str | np.dtype, path: str) -> np.ndarray:
    """A parameter's array in another dtype.

    Raises:
        ValueError: float16 cannot hold it.
    """
    out = array.astype(dtype, copy=False)
    if out.dtype == np.float16 and not np.isfinite(out).all() and np.isfinite(array).all():
        raise ValueError(f"--dtype float16: {path} has values beyond float16's range; use bfloat16 or float32")
    return out


def transformed_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The parameter's shape for a published tensor's shape; None where the number of axes does not fit."""
    axes = TRANSFORMS[name]
    if axes is None:
        return tuple(shape)
    return tuple(shape[a] for a in axes) if len(shape) == len(axes) else None


@functools.cache
def _compile(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    literal, fields = map(re.escape, parts[::2]), [f"(?P<{f}>{FIELDS[f]})" for f in parts[1::2]] + [""]
    return re.compile("".join(a + b for a, b in zip(literal, fields, strict=True)))


@dataclass(frozen=True)
class Rule:
    """One line of the table: a template of published names, and of paths ("a/b/kernel"), or None for a key that is
    known and not needed."""

    published: str
    path: str | None
    transform: str = "identity"

    def path_of(self, name: str) -> str | None:
        """The path of a published name, or None where it is not needed, or this rule is not about it."""
        found = _compile(self.published).fullmatch(name)
        return self.path.format(**found.groupdict()) if self.path and found else None

    def matches(self, name: str) -> bool:
        return _compile(self.published).fullmatch(name) is not None

    def published_name_of(self, path: str) -> str | None:
        """The published name of a parameter path, or None where this rule is not about it."""
        found = self.path and _compile(self.path).fullmatch(path)
        return self.published.format(**found.groupdict()) if found else None


def _linear(published: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{published}.weight", f"{path}/kernel", "transpose"), Rule(f"{published}.bias", f"{path}/bias")


def _layer_norm(published: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{published}.weight", f"{path}/scale"), Rule(f"{published}.bias", f"{path}/bias")


def _tower_rules(prefix: str) -> tuple[Rule, ...]:
    layer, to = f"{prefix}encoder.layers.{{i}}", "vision_tower/layers_{i}"
    embeddings = f"{prefix}embeddings", "vision_tower/embeddings"
    return (
        Rule(f"{embeddings[0]}.class_embedding", f"{embeddings[1]}/class_embedding"),
        Rule(f"{embeddings[0]}.patch_embedding.weight", f"{embeddings[1]}/patch_embedding/kernel", "conv_oihw_to_hwio"),
        Rule(f"{embeddings[0]}.position_embedding.weight", f"{embeddings[1]}/position_embedding"),
        Rule(f"{embeddings[0]}.position_ids", None),
        *_layer_norm(f"{prefix}pre_layrnorm", "vision_tower/pre_layrnorm"),
        *_layer_norm(f"{layer}.{{clip_norm}}", f"{to}/{{clip_norm}}"),
        *_linear(f"{layer}.self_attn.{{clip_attn}}", f"{to}/self_attn/{{clip_attn}}"),
        *_linear(f"{layer}.mlp.{{fc}}", f"{to}/mlp/{{fc}}"),
        *_layer_norm(f"{prefix}post_layernorm", "vision_tower/post_layernorm"),
    )


def _decoder_rules(prefix: str) -> tuple[Rule, ...]:
    layer, to = f"{prefix}layers.{{i}}", "language_model/layers_{i}"
    return (
        Rule(f"{prefix}embed_tokens.weight", "language_model/embed_tokens/embedding"),
        Rule(f"{layer}.{{norm}}.weight", f"{to}/{{norm}}/scale"),
        *_linear(f"{layer}.self_attn.{{attn}}", f"{to}/self_attn/{{attn}}"),
        Rule(f"{layer}.mlp.{{mlp}}.weight", f"{to}/mlp/{{mlp}}/kernel", "transpose"),
        Rule(f"{prefix}norm.weight", "language_model/norm/scale"),
        Rule(f"{layer}.self_attn.rotary_emb.inv_freq", None),
        Rule(f"{prefix}rotary_emb.inv_freq", None),
    )


TOWER_INSIDE = "model.vision_tower.vision_tower.vision_model."  # a tower within a liuhaotian checkpoint


def _lm_head_rule(prefix: str, config: LlavaConfig) -> Rule:
    tied = config.text.tie_word_embeddings  # then it is the embedding once more
    return Rule(f"{prefix}lm_head.weight", None if tied else "language_model/lm_head/kernel", "transpose")


def _projector_rules(prefix: str, config: LlavaConfig) -> tuple[Rule, ...]:
    """`mm_projector.weight` for linear; for an MLP the linear layers of a Sequential: 0, 2, 4, …"""
    if config.mm_projector_type == "linear":
        return _linear(prefix, "mm_projector/linear_1")
    depth = range(1, config.projector_depth + 1)
    return sum((_linear(f"{prefix}.{2 * n - 2}", f"mm_projector/linear_{n}") for n in depth), ())


def liuhaotian_rules(config: LlavaConfig) -> tuple[Rule, ...]:
    """The original's names (liuhaotian/…, and a plain Llama that is a stage-1 base)."""
    return (
        *_tower_rules(TOWER_INSIDE),
        *_projector_rules("model.mm_projector", config),
        Rule("model.image_newline", "image_newline"),
        *_decoder_rules("model."),
        _lm_head_rule("", config),
    )


def llava_hf_rules(config: LlavaConfig) -> tuple[Rule, ...]:
    """llava-hf's names of every generation; the first of each kind is what the published checkpoints have."""
    towers = "vision_tower.vision_model.", "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."
    projectors = "multi_modal_projector.linear_{n}", "model.multi_modal_projector.linear_{n}"
    decoders = ("language_model.model.", "language_model."), ("model.language_model.", "")
    return (
        *(rule for prefix in towers for rule in _tower_rules(prefix)),
        *(
            rule
            for prefix in projectors
            for n in range(1, config.projector_depth + 1)
            for rule in _linear(prefix.format(n=n), f"mm_projector/linear_{n}")
        ),
        Rule("image_newline", "image_newline"),
        Rule("model.image_newline", "image_newline"),
        *(rule for decoder, head in decoders for rule in (*_decoder_rules(decoder), _lm_head_rule(head, config))),
    )


def clip_rules() -> tuple[Rule, ...]:
    """A CLIP directory (CLIPModel or CLIPVisionModel), of which only the vision tower is needed."""
    return (
        *_tower_rules("vision_model."),
        *_tower_rules(""),
        *(Rule(f"text_model.{{any}}{last}", None) for last in ("weight", "bias", "position_ids")),
        Rule("logit_scale", None),
        Rule("visual_projection.weight", None),
        Rule("text_projection.weight", None),
    )


def projector_file_rules(config: LlavaConfig) -> tuple[Rule, ...]:
    """Stage 1's `mm_projector.bin`: the projector under any prefix, and the embeddings if stage 1 grew them."""
    return (
        *_projector_rules("{any}mm_projector", config),
        Rule("{any}embed_tokens.weight", "language_model/embed_tokens/embedding"),
    )


RULES = {"liuhaotian": liuhaotian_rules, "llava-hf": llava_hf_rules}


def published_name(path: str, rules: Iterable[Rule], templates: Container[str] = ()) -> tuple[str, str]:
    """The published name of a parameter, and the transform to invert.

    Of the rules about it, the first whose template is one of `templates` (`used_templates`), or else the first.

    Raises:
        ValueError: no rule is about this path.
    """
    named = [(rule, name) for rule in rules if (name := rule.published_name_of(path)) is not None]
    if not named:
        raise ValueError(f"{path}: no rule gives this parameter a published name")
    rule, name = next((one for one in named if one[0].published in templates), named[0])
    return name, rule.transform


def used_templates(names: dict[str, str], rules: tuple[Rule, ...]) -> list[str]:
    """The templates that path → published name follow; none where `published_name` gives these names anyway."""
    if all(published_name(path, rules)[0] == name for path, name in names.items()):
        return []
    return sorted({rule.published for rule in rules if any(map(rule.matches, names.values()))})


def not_needed(names: Iterable[str], rules: tuple[Rule, ...]) -> list[str]:
    """The names that some rule knows and takes no parameter from: buffers, and the head of tied embeddings."""
    return [name for name in names if any(rule.path is None and rule.matches(name) for rule in rules)]


# ---- matching a whole checkpoint, from names and shapes alone


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one published tensor."""

    shape: tuple[int, ...]
    dtype: str  # NumPy's name: float32, bfloat16, …

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Placement:
    """Where one parameter comes from: tensor `name` of part number `part`, after `transform`."""

    part: int
    name: str
    transform: str


def match(
    shapes: dict[str, tuple[int, ...]],
    parts: Sequence[tuple[Mapping[str, TensorInfo], tuple[Rule, ...]]],
    what: str,
) -> dict[str, Placement]:
    """Every parameter's one source.

    Args:
        shapes: path → shape, of every parameter.
        parts: (tensors by name, rules) of each place that tensors come from; an earlier part wins over a later one.
        what: the checkpoint, as an error names it.

    Returns:
        path → Placement.

    Raises:
        ValueError: anything at all does not fit; all of it, together.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    placed: dict[str, Placement] = {}
    given: set[str] = set()
    for number, (tensors, rules) in enumerate(parts):
        found = _by_path(tensors, rules, problems)
        for path in [p for p in found if p not in given]:
            names = [name for name, _ in found[path]]
            if path not in shapes:
                problems["keys left over: this config has no such parameter"] += [f"{n} ({path})" for n in names]
            elif len(names) > 1:
                problems["parameters given by more than one key"].append(f"{path} ({', '.join(names)})")
            else:
                placed[path] = Placement(number, *found[path][0])
                _check_tensor(tensors[names[0]], placed[path], shapes[path], problems)
        given |= found.keys()
    problems["parameters that no key sets"] += [path for path in shapes if path not in given]
    _report(problems, what)
    return placed


def _by_path(tensors, rules, problems) -> dict[str, list[tuple[str, str]]]:
    """path → the (name, transform) pairs that give it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in tensors:
        hits = [rule for rule in rules if rule.matches(name)]
        if not hits:
            problems["keys left over: no rule knows them"].append(name)
        elif len(hits) > 1:
            templates = ", ".join(rule.published for rule in hits)
            problems["keys matched by more than one rule"].append(f"{name} ({templates})")
        elif (path := hits[0].path_of(name)) is not None:
            found.setdefault(path, []).append((name, hits[0].transform))
    return found


def _check_tensor(info: TensorInfo, placement: Placement, expected: tuple[int, ...], problems) -> None:
    shape = transformed_shape(placement.transform, info.shape)
    if shape != tuple(expected):
        back = [expected[a] for a in np.argsort(TRANSFORMS[placement.transform] or range(len(expected)))]
        told = f"{placement.name} {list(info.shape)} instead of {back}"
        problems["keys of another shape than the config says"].append(told)
    if info.dtype not in DTYPES:
        problems[f"keys of a dtype other than {', '.join(DTYPES)}"].append(f"{placement.name} {info.dtype}")


def _report(problems: dict[str, list[str]], what: str) -> None:
    """One ValueError for all problems, grouped, with counts and the first few names of each; none: nothing."""
    line_break = "\n    "
    lines = [
        f"  {len(names)} {kind}:{line_break}{listed(names, line_break)}" for kind, names in problems.items() if names
    ]
    if lines:
        raise ValueError(f"{what} does not fit its config.json:\n" + "\n".join(lines))
