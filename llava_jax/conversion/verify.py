"""Is a converted checkpoint the published model? Both are run on the same picture and compared, stage by stage.

Both sides are float32 on the CPU. The relative difference is the largest one over the reference's root mean square. Two
implementations in float32 differ by rounding, which a layer adds to: 1e-5 for each layer run so far, at least 5e-5
(for the small test models 1e-4 in logits of about 2; random ones of 24 + 32 layers differ by 1e-5 in all, and trained
ones have larger activations). A weight rounded once to bfloat16 differs by 4e-3. Pixels, ids and counts are equal;
so are greedy tokens, unless the reference's best two are closer than logits may differ.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from llava_jax.conversion.reference import NEW_TOKENS, Record, record_llava_hf, record_original

QUESTION = "What is shown in this image?"
PIXEL_BOUND, LEAST_BOUND, BOUND_PER_LAYER = 1e-6, 5e-5, 1e-5  # the bounds


@dataclass(frozen=True)
class Stage:
    """One row of the table: the largest difference over all pictures."""

    stage: str
    absolute: float  # for counts, ids and tokens: how many there are more, or are different
    relative: float  # over the root mean square of the reference's values, or over their number
    bound: float  # of `relative`
    ok: bool
    note: str = ""


def verify(
    directory: str,
    reference: str,
    images: Sequence[str] | None = None,
    against: str | None = None,
    prompt: str = QUESTION,
    python: str | None = None,
    vision_tower: str | None = None,
) -> tuple[str, list[Stage]]:
    """Compare a converted checkpoint with the published one.

    One side after the other is in memory, in float32.

    Args:
        directory: what convert/from_hf.py wrote.
        reference: the published checkpoint, a local directory or a hub id.
        images: paths or URLs, each asked about alone; none: text alone; None: one wide picture that is made here.
        against: `original` or `llava-hf`; None: llava-hf for a checkpoint of that layout, else the original if it is
            installed (or `python` is given), else llava-hf.
        prompt: the question; `<image>` may be placed by hand.
        python: the interpreter of the original's environment; None is this one.
        vision_tower: as it was given to the conversion.

    Returns:
        (what it was compared with, the stages in order)

    Raises:
        FileNotFoundError, ValueError: one clear reason.
    """
    from llava_jax import checkpoint
    from llava_jax.conversion.from_hf import read_published
    from llava_jax.inference.llava import Llava, load
    from llava_jax.inputs.image import load_image

    config = checkpoint.load_config(directory)
    pictures: list = [synthetic_picture()] if images is None else [load_image(image) for image in images] or [None]
    text = Llava(config, None).conversation(prompt, pictures[0] is not None).get_prompt()
    published = read_published(reference, vision_tower=vision_tower)
    against = against or default_against(published.layout, python)
    if against == "original":
        theirs = record_original(published, text, pictures, python or sys.executable, vision_tower)
    else:
        theirs = record_llava_hf(published, text, pictures)
    llava, params = load(directory, dtype="float32", reading="llava-hf" if against == "llava-hf" else "original")
    ours = [record_ours(llava, params, text, *pair) for pair in zip(pictures, theirs, strict=True)]
    return against, compare(ours, theirs, config.vision.num_hidden_layers, config.text.num_hidden_layers)


def default_against(layout: str, python: str | None) -> str:
    """What a checkpoint of this layout is compared with, if nobody says it."""
    original = layout == "liuhaotian" and (python is not None or importlib.util.find_spec("llava") is not None)
    return "original" if original else "llava-hf"


def synthetic_picture():
    """1000 x 300, smooth: under anyres a row of tiles, rows of padding to take out, and newlines."""
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (5, 13, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((1000, 300), Image.Resampling.BICUBIC)


# ---- ours


def record_ours(llava, params, text: str, picture, theirs: Record) -> Record:
    """What our model computes. Its own ids are recorded, and the reference's go in, so that each stage speaks for
    itself."""
    import jax

    from llava_jax.inputs.tokenizer import tokenizer_image_token
    from llava_jax.models.vision import normalize_tiles

    images, given = [] if picture is None else [picture], [theirs["ids"].tolist()]
    out = {"ids": np.array(tokenizer_image_token(text, llava.tokenizer))}
    if images:
        (shown,) = llava.load_images(images)
        tower = jax.jit(_vision_features, static_argnums=0)
        out["pixels"] = np.asarray(normalize_tiles(shown.tiles, llava.config.vision)).transpose(0, 3, 1, 2)
        out["tower"] = np.asarray(tower(llava.engine.model, params, shown.tiles))
        out["projector"] = llava.encode_images(params, images)[0]
    out["embeds"] = llava.prepare_inputs_labels_for_multimodal(params, given, None, None, None, None, images)[4][0]
    out["logits"] = np.asarray(llava.forward(params, given, images or None).logits[0])
    out["tokens"] = llava.generate_tokens(params, given, images or None, max_new_tokens=NEW_TOKENS)[0]
    return out


def _vision_features(model, params, tiles):
    return model.apply({"params": params}, tiles, method="vision_features")


# ---- the comparison


def compare(ours: list[Record], theirs: list[Record], tower_layers: int, decoder_layers: int) -> list[Stage]:
    """The stages in order, each the worst over the pictures; arrays of different shapes are infinitely far apart."""
    tower, last = (max(LEAST_BOUND, BOUND_PER_LAYER * n) for n in (tower_layers, tower_layers + decoder_layers))
    pictures = []
    for mine, other in zip(ours, theirs, strict=True):
        stages = [
            _array_stage("pixels", "pixels", mine, other, PIXEL_BOUND),
            _ids_stage(mine["ids"], other["ids"]),
            _count_stage(len(mine["embeds"]), len(other["embeds"])),
            _array_stage("tower features", "tower", mine, other, tower),
            _array_stage("projector", "projector", mine, other, tower),
            _array_stage("merged embeddings", "embeds", mine, other, tower),
            _logits_stage(mine["logits"], other["logits"], last),
            _tokens_stage(mine["tokens"], other["tokens"], other["gaps"], 2 * last * _rms(other["logits"])),
        ]
        pictures.append([stage for stage in stages if stage is not None])
    return [max(rows, key=lambda row: (not row.ok, row.relative)) for rows in zip(*pictures, strict=True)]


def _rms(array: np.ndarray) -> float:
    return math.sqrt(np.mean([np.mean(np.square(row, dtype=np.float64)) for row in array]))


def _array_stage(name: str, key: str, ours: Record, theirs: Record, bound: float) -> Stage | None:
    return _difference(name, ours[key], theirs[key], bound) if key in theirs else None  # absent: text alone


def _logits_stage(ours: np.ndarray, theirs: np.ndarray, bound: float) -> Stage:
    """The vocabulary that both sides have: an export's table may be padded with rows that no token has."""
    size, most = sorted((ours.shape[-1], theirs.shape[-1]))
    stage = _difference("logits", ours[..., :size], theirs[..., :size], bound)
    return stage if size == most or stage.note else replace(stage, note=f"the first {size} of {most} rows")


def _difference(name: str, a: np.ndarray, b: np.ndarray, bound: float) -> Stage:
    if a.shape != b.shape:
        return Stage(name, math.inf, math.inf, bound, False, f"shape {list(a.shape)} instead of {list(b.shape)}")
    absolute = float(np.max([np.max(np.abs(x - y)) for x, y in zip(a, b, strict=True)]))  # NaN, if there is one
    relative = absolute / max(_rms(b), 1e-30)
    return Stage(name, absolute, relative, bound, relative <= bound)


def _ids_stage(ours: np.ndarray, theirs: np.ndarray) -> Stage:
    count = min(len(ours), len(theirs))
    where = np.flatnonzero(ours[:count] != theirs[:count])
    wrong = len(where) + abs(len(ours) - len(theirs))
    note = f"the first at {where[0] if len(where) else count}" if wrong else f"{count} ids"
    return Stage("token ids", wrong, wrong / len(theirs), 0.0, not wrong, note)


def _count_stage(ours: int, theirs: int) -> Stage:
    wrong = abs(ours - theirs)
    note = f"{ours} instead of {theirs}" if wrong else f"{ours} positions"
    return Stage("token count", wrong, wrong / theirs, 0.0, not wrong, note)


def _tokens_stage(ours: np.ndarray, theirs: np.ndarray, gaps: np.ndarray, slack: float) -> Stage:
    """Greedy tokens up to the end of ours: theirs go on after an end-of-sequence token."""
    count = min(len(ours), len(theirs))
    where = np.flatnonzero(ours[:count] != theirs[:count])
    if not len(where):
        return Stage("greedy tokens", 0, 0.0, 0.0, True, f"{count} tokens")
    at = int(where[0])
    note = f"the first that differs is number {at}: {ours[at]} instead of {theirs[at]}, {gaps[at]:.2g} ahead there"
    return Stage("greedy tokens", len(where), len(where) / count, 0.0, float(gaps[at]) <= slack, note)


# ---- what is said of it


def as_json(stages: list[Stage]) -> list[dict]:
    """The stages for `--json`, with null for infinities and NaN."""
    return [{k: None if v != v or v == math.inf else v for k, v in asdict(stage).items()} for stage in stages]


def table(stages: list[Stage]) -> str:
    """The stages as lines of text."""
    lines = [f"{'stage':<18}{'largest difference':>20}{'relative':>12}{'bound':>10}  ok"]
    for s in stages:
        line = f"{s.stage:<18}{s.absolute:>20.3g}{s.relative:>12.2g}{s.bound:>10.2g}  {'yes' if s.ok else 'NO '}"
        lines.append(f"{line}  {s.note}".rstrip())
    return "\n".join(lines)
