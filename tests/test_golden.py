"""Every stage against the original PyTorch LLaVA's recorded outputs (golden/README.md lists the keys), in float32."""

import copy
import hashlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import checkpoints, images
from golden.checkpoints import RECORDED
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.inference.llava import Llava
from llava_jax.inputs.image import load_image, process_images
from llava_jax.models.vision import normalize_tiles

ATOL = 1e-4  # the reference's own two attention kernels differ by up to 3e-5
TIE = 1e-3  # below this gap between the two best words, either is right
BATCH_IMAGES = ("wide_1200x200", "sliver_2000x50", "sliver_4000x20")
CASES = ("right", "left", "left_left", "right_left", "trunc1000", "trunc1000_left", "trunc30", "nomaxlen")
CASES += ("nomask", "nomask_left", "posids")
FEW_CASES = {"mistral": ("right", "left_left", "trunc1000"), "llava15": ("right", "left_left"), "s2": ("right",)}
FEW_CASES |= {"clspatch": ("trunc1000",), "spatial": ("trunc1000_left",)}
BATCHES = [("vicuna", case) for case in CASES] + [(v, case) for v, cases in FEW_CASES.items() for case in cases]
# Batches of which only the embeddings are compared daily, and the logits of others of their kind.
SELDOM = [("vicuna", case) for case in ("left", "left_left", "right_left", "trunc1000_left")]
SELDOM += [("vicuna", case) for case in ("nomaxlen", "nomask_left")]
SELDOM += [batch for batch in BATCHES if batch[0] != "vicuna"]
WITH_DUMMY = ("right", "left_left", "trunc1000")
FULL = ("vicuna", "mistral", "llava15")  # the others run the decoder on their first picture only
DAILY = {"vicuna": 3}  # of the pictures that the decoder sees; of the other variants 1
DECODED = [pytest.param(v, False, marks=pytest.mark.long if v != "vicuna" else ()) for v in RECORDED]
DECODED += [pytest.param(variant, True, marks=pytest.mark.long) for variant in FULL]
FEW_SEEN = ("mistral", "llava15", "s2")  # one of the tower's pictures at first, and then the others
SEEN = [pytest.param(v, False, marks=pytest.mark.long if v in ("mistral", "s2") else ()) for v in RECORDED]
SEEN += [pytest.param(variant, True, marks=pytest.mark.long) for variant in FEW_SEEN]
IMAGE = -200

logsumexp = jax.jit(partial(jax.nn.logsumexp, axis=-1))


def recorded_images(golden, variant):
    return [key.split("/")[1] for key in golden(variant) if key.startswith("image/") and key.endswith("/merged/shape")]


def decoded_images(golden, variant, others):
    """The decoder's pictures: some daily, of every shape, and the others behind `long`."""
    names, daily = recorded_images(golden, variant), DAILY.get(variant, 1)
    return names[daily:] if others else names[:daily]


def probe(x):
    """One number for every row [..., E] (rows_digest in golden/record.py)."""
    x = np.asarray(x, np.float64)
    return x @ np.cos(np.arange(1, x.shape[-1] + 1))


def assert_features(recorded, key, x):
    x = np.asarray(x)
    assert x.shape == tuple(recorded[key + "/shape"]), key
    values = x.ravel()[:: max(1, x.size // 1000) | 1]
    np.testing.assert_allclose(values, recorded[key + "/values"], atol=ATOL, rtol=0, err_msg=key)
    np.testing.assert_allclose(probe(x), recorded[key + "/rows"], atol=3 * ATOL, rtol=0, err_msg=key)


def assert_tokens(recorded, key, tokens):
    """Equal tokens, in each row up to the first near-tie."""
    expected, near = recorded[key + "/generated"], recorded[key + "/generated_gap"] < TIE
    for row, (ours, theirs, tie) in enumerate(zip(tokens, expected, near, strict=True)):
        stop = int(np.argmax(tie)) if tie.any() else len(theirs)
        assert stop > 0 and ours[:stop].tolist() == theirs[:stop].tolist(), f"{key} row {row}"
    if not near.any():
        assert tokens.shape == expected.shape, key


def with_settings(llava, **changes):
    """The same model under other settings; with the programs that it has where only the host makes a difference."""
    other = copy.copy(llava)
    other.config = llava.config.replace(**changes)
    on_the_host = all(name.startswith("tokenizer_") for name in changes)
    return other if on_the_host else Llava(other.config, llava.tokenizer)


# ---- pictures


@pytest.mark.parametrize("name", images.NAMES)
def test_tiles(golden, pictures, name):
    """uint8 tiles, bit for bit, of every picture in every mode."""
    recorded, image = golden("tiles"), load_image(pictures[name], exif=False)
    assert image.mode == "RGB" and image.size == tuple(recorded[f"{name}/size"])
    assert hashlib.sha256(image.tobytes()).hexdigest() == str(recorded[f"{name}/rgb"]), "read or decoded differently"
    modes = {
        "anyres": LlavaConfig.preset("1.6-vicuna-7b"),
        "pad": LlavaConfig.preset("1.5-7b"),
        "square": LlavaConfig.preset("1.5-7b").replace(image_aspect_ratio="square"),
        "s2": LlavaConfig.preset("1.5-7b").replace(s2=True, mm_hidden_size=3072),
    }
    for mode, config in modes.items():
        (tiles,) = process_images([image], config)
        assert tiles.dtype == np.uint8, mode
        if f"{name}/{mode}/error" in recorded:  # the reference refuses a 1x1 picture here; ours does not
            assert name == "tiny_1x1" and tiles.shape == (1, config.tile_size, config.tile_size, 3)
            assert (tiles == np.asarray(image)[0, 0]).all(), mode
            continue
        np.testing.assert_allclose(tiles.mean((1, 2)), recorded[f"{name}/{mode}/means"], atol=1e-3, err_msg=mode)
        assert hashlib.sha256(tiles.tobytes()).hexdigest() == str(recorded[f"{name}/{mode}/sha256"]), mode


def test_exif_orientation_is_optional(pictures):
    path = pictures["exif_rotated_400x240"]
    assert load_image(path, exif=False).size == (400, 240)
    upright = load_image(path)
    assert upright.size == (240, 400)
    turned = Image.open(path).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(upright), np.asarray(turned))


def test_pixel_values(golden):
    """All 256 levels of each channel, to the last bit of the reference's float32, jitted."""
    levels = golden("tiles")["levels"]
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (1, 1, 256, 3))
    ours = np.asarray(jax.jit(lambda x: normalize_tiles(x, LlavaConfig().vision, jnp.float32))(ramp))[0, 0].T
    np.testing.assert_array_equal(ours, levels)


# ---- one picture


@pytest.mark.parametrize("variant", RECORDED)
def test_checkpoint_is_the_recorded_one(golden, checkpoint, variant):
    assert checkpoint(variant)[1] == str(golden(variant)["weights_sha256"])


@pytest.mark.parametrize(("variant", "others"), SEEN)
def test_features(golden, pictures, model, variant, others):
    """The tower's features, projected, and merged."""
    llava, params = model(variant)
    recorded = golden(variant)
    tower = jax.jit(lambda params, tiles: llava.engine.model.apply({"params": params}, tiles, method="vision_features"))
    names = recorded_images(golden, variant)
    if variant in FEW_SEEN:
        names = names[1:] if others else names[:1]
    for name in names:
        key, picture = f"image/{name}", load_image(pictures[name])
        (tiles,) = process_images([picture], llava.config)
        assert_features(recorded, key + "/selected", tower(params, tiles))
        (projected,) = llava.encode_images(params, [picture])
        assert_features(recorded, key + "/projected", projected)
        embeds = llava.prepare_inputs_labels_for_multimodal(params, [[1, IMAGE]], None, None, None, None, [picture])[4]
        assert_features(recorded, key + "/merged", embeds[0, 1:])


@pytest.mark.parametrize(("variant", "others"), DECODED)
def test_logits(golden, pictures, model, variant, others):
    llava, params = model(variant)
    recorded = golden(variant)
    for name in decoded_images(golden, variant, others):
        key = f"image/{name}"
        logits = llava.forward(params, recorded["image/input_ids"], [pictures[name]]).logits[0]
        near = {"atol": ATOL, "rtol": 0, "err_msg": key}
        np.testing.assert_allclose(logits[-1, ::11], recorded[key + "/logits_last"], **near)
        np.testing.assert_allclose(logits[::101, ::131], recorded[key + "/logits_grid"], **near)
        np.testing.assert_allclose(logsumexp(logits), recorded[key + "/logits_lse"], **near)
        differs = logits.argmax(-1) != recorded[key + "/logits_argmax"]
        assert not (differs & (recorded[key + "/logits_gap"] > TIE)).any(), key


@pytest.mark.parametrize(("variant", "others"), DECODED)
def test_greedy_tokens(golden, pictures, model, variant, others):
    llava, params = model(variant)
    recorded = golden(variant)
    for name in decoded_images(golden, variant, others):
        ids = recorded["image/input_ids"]
        tokens = llava.generate_tokens(params, ids, [pictures[name]], max_new_tokens=16)
        assert tokens.dtype == np.int32
        assert_tokens(recorded, f"image/{name}", tokens)


def test_hidden_states_and_attentions(golden, pictures, model, optimized):
    """Optimized: a sum that is not vectorized is off by up to 3.1e-4 here."""
    llava, params = model("vicuna")
    llava = Llava(llava.config, llava.tokenizer)  # with programs of its own
    recorded = golden("vicuna")
    path = [pictures["sliver_4000x20"]]
    more = {"output_hidden_states": True, "output_attentions": True}
    out = llava.forward(params, recorded["image/input_ids"], path, **more)
    layers = llava.config.text.num_hidden_layers
    assert len(out.hidden_states) == layers + 1 and len(out.attentions) == layers
    for i, x in enumerate(out.hidden_states):
        assert_features(recorded, f"states/hidden/{i}", x)
    for i, x in enumerate(out.attentions):
        assert_features(recorded, f"states/attention/{i}", x)
    plain = llava.forward(params, recorded["image/input_ids"], path)
    assert plain.hidden_states is None and plain.attentions is None and plain.loss is None
    np.testing.assert_allclose(out.logits, plain.logits, atol=ATOL)


@pytest.mark.parametrize("aspect", ["anyres", "pad", "square"])
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_merge_types(golden, pictures, model, aspect, merge):
    """The same weights under other settings. One tile is one tile, whatever the merge type, as the reference's tools
    give it (a stacked tensor); in a list, which they never pass for pad or square, the reference adds a newline."""
    llava, params = model("vicuna")
    llava = with_settings(llava, image_aspect_ratio=aspect, mm_patch_merge_type=merge)
    inputs = [[1, IMAGE]], None, None, None, None, [pictures["chelsea"]]
    embeds = llava.prepare_inputs_labels_for_multimodal(params, *inputs)[4]
    assert_features(golden("vicuna"), f"merge/{aspect}/{merge}", embeds[0, 1:])


# ---- batches


def batch_inputs(recorded, case):
    return {k: recorded.get(f"batch/{case}/in_{k}") for k in ("input_ids", "attention_mask", "labels", "position_ids")}


@pytest.mark.parametrize(
    ("variant", "case"),
    [pytest.param(*batch, marks=pytest.mark.long if batch[0] == "s2" else ()) for batch in BATCHES],
)
def test_prepared_batch(golden, pictures, model, variant, case):
    """Embeddings, labels, mask and positions of a text-only, a one-image and a two-image row."""
    llava, params = model(variant)
    recorded, key = golden(variant), f"batch/{case}"
    llava = with_settings(llava, **json.loads(str(recorded[key + "/config"])))
    given = batch_inputs(recorded, case)
    paths, dummy = [pictures[name] for name in BATCH_IMAGES], Image.new("RGB", (336, 336))
    outputs = []
    dummies = [[dummy, *paths]] if case in WITH_DUMMY else []
    for shown in (paths, *dummies):  # the dummy that the reference needs changes nothing
        none, positions, mask, cache, embeds, labels = llava.prepare_inputs_labels_for_multimodal(
            params, given["input_ids"], given["position_ids"], given["attention_mask"], None, given["labels"], shown
        )
        assert none is None and cache is None
        outputs.append(embeds)
        assert_features(recorded, key + "/embeds", embeds)
        for name, ours in (("position_ids", positions), ("attention_mask", mask), ("labels", labels)):
            theirs = recorded.get(f"{key}/out_{name}")
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                np.testing.assert_array_equal(ours, theirs, err_msg=name)
    np.testing.assert_allclose(outputs[0], outputs[-1], atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        pytest.param(*batch, marks=pytest.mark.long if batch in SELDOM else ())
        for batch in BATCHES
        if batch[1] != "posids"
    ],
)
def test_batch_logits_and_loss(golden, pictures, model, variant, case):
    llava, params = model(variant)
    recorded, key = golden(variant), f"batch/{case}"
    llava = with_settings(llava, **json.loads(str(recorded[key + "/config"])))
    given = batch_inputs(recorded, case)
    del given["position_ids"]  # None in all of these: the reference counts columns, padding and all
    out = llava.forward(params, images=[pictures[name] for name in BATCH_IMAGES], **given)
    row, position = recorded[key + "/where"].T
    near = {"atol": ATOL, "rtol": 0}
    assert out.logits.shape[:2] == tuple(recorded[key + "/embeds/shape"][:2])
    np.testing.assert_allclose(out.logits[row, position, ::311], recorded[key + "/logits_grid"], **near)
    ends = recorded[key + "/ends"]
    last = out.logits[np.arange(len(ends)), ends, ::31]
    np.testing.assert_allclose(last, recorded[key + "/logits_last"], **near)
    assert (out.loss is None) == (key + "/loss" not in recorded)
    if out.loss is not None:  # NaN where truncation leaves no label, as in the reference
        np.testing.assert_allclose(out.loss, recorded[key + "/loss"], equal_nan=True, **near)


@pytest.mark.parametrize(
    "variant", ["vicuna", *(pytest.param(name, marks=pytest.mark.long) for name in ("llava15", "mistral"))]
)
def test_batch_greedy_tokens(golden, pictures, model, variant):
    llava, params = model(variant)
    recorded = golden(variant)
    ids, mask = recorded["generate/input_ids"], recorded["generate/attention_mask"]
    paths = [pictures[name] for name in BATCH_IMAGES]
    tokens = llava.generate_tokens(params, ids, paths, attention_mask=mask, max_new_tokens=16)
    assert_tokens(recorded, "generate/batch", tokens)
    text, two = ids[:1, : mask[0].sum()], ids[2:, : mask[2].sum()]
    assert_tokens(recorded, "generate/text", llava.generate_tokens(params, text, max_new_tokens=16))
    assert_tokens(recorded, "generate/two", llava.generate_tokens(params, two, paths[1:], max_new_tokens=16))
    logits = llava.forward(params, text).logits
    np.testing.assert_allclose(logits[0, -1, ::11], recorded["generate/text/logits_last"], atol=ATOL, rtol=0)


# ---- corners


def test_corner_embeddings(golden, pictures, model):
    llava, params = model("vicuna")
    recorded, paths = golden("vicuna"), [pictures[name] for name in BATCH_IMAGES]

    def embeds(rows, shown):
        return llava.prepare_inputs_labels_for_multimodal(params, rows, None, None, None, None, shown)[4]

    both_ends = embeds([[IMAGE, 5, IMAGE]], paths[1:])
    assert_features(recorded, "edge/image_first_and_last", both_ends)
    assert_features(recorded, "edge/three_images_side_by_side", embeds([[1, IMAGE, IMAGE, IMAGE, 7]], paths))
    assert str(recorded["edge/single_token_row/text"]) == "None"
    assert embeds([[IMAGE]], paths[:1]) is None
    # the reference gives the text-only row the image, and runs out of images for the next; here it needs none
    assert "IndexError" in str(recorded["edge/text_row_without_dummy/text"])
    mixed, alone = (
        embeds([[1, 100, 101, 102], [1, 100, IMAGE, 200]], paths[:1]),
        embeds([[1, 100, IMAGE, 200]], paths[:1]),
    )
    np.testing.assert_allclose(mixed[1], alone[0], atol=1e-5)


def test_wrong_number_of_images_is_refused(golden, pictures, model):
    """The reference ignores an image too many, and fails with IndexError on one too few."""
    llava, params = model("vicuna")
    recorded, path = golden("vicuna"), pictures["sliver_4000x20"]
    assert "edge/more_images_than_placeholders/rows" in recorded
    assert "IndexError" in str(recorded["edge/fewer_images_than_placeholders/text"])
    for ids, shown in (([[1, 100, IMAGE, 200]], [path] * 2), ([[1, IMAGE, 5, IMAGE]], [path])):
        with pytest.raises(ValueError, match=f"images: got {len(shown)} for"):
            llava.generate_tokens(params, ids, shown, max_new_tokens=1)


# ---- other layouts of the same weights


def test_bin_shards_give_the_same_parameters(model, checkpoint):
    assert checkpoint("bin")[1] == checkpoint("vicuna")[1]
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), model("bin")[1], model("vicuna")[1])
    assert jax.tree.all(same), same


def test_llava_hf_layout_gives_the_same_logits(golden, pictures, model):
    """64 more words, everything else as in the original's layout."""
    llava, params = model("hf-next")
    recorded = golden("vicuna")
    assert llava.config.image_grid_pinpoints == tuple(map(tuple, checkpoints.PINPOINTS))
    logits = llava.forward(params, recorded["image/input_ids"], [pictures["tiny_20x13"]]).logits[0]
    assert logits.shape[-1] == checkpoints.VOCAB + 64
    last = logits[-1, : checkpoints.VOCAB : 11]
    np.testing.assert_allclose(last, recorded["image/tiny_20x13/logits_last"], atol=ATOL, rtol=0)
