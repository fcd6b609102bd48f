"""Where tokens look from, what they look at, and that the drawings show it."""

import functools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax.config import LlavaConfig
from llava_jax.demo.held_out import held_out_scene
from llava_jax.demo.model import scenes_config
from llava_jax.demo.scenes import SIGN, draw
from llava_jax.inputs.anyres import num_image_tokens, unpad_window
from llava_jax.inputs.image import process_images
from llava_jax.plots import visualize
from llava_jax.plots.attention_maps import (
    AnswerAttention,
    answer_attention,
    by_word,
    patch_maps,
    picture_positions,
    tower_attention,
)
from llava_jax.plots.visualize import draw_answers, draw_attention, draw_tiles, draw_token_grid, image_tokens, pixel_map

SCENES = scenes_config(365)  # canvases of up to 2 x 2 or 3 tiles, of 4 x 4 patches each
SIZES = [(620, 246), (446, 472), (232, 682), (448, 448), (900, 310), (100, 700)]
SHAPES = [("anyres", merge) for merge in ("flat", "spatial", "spatial_unpad")] + [("pad", "flat"), ("square", "flat")]


@pytest.fixture(scope="module")
def demo(scenes_model):
    return llava_jax.load(scenes_model)


def shaped(aspect, merge):
    return SCENES.replace(image_aspect_ratio=aspect, mm_patch_merge_type=merge)


# ---- where each token looks from


@functools.cache
def painted(aspect, size, rectangle=(0, 0, 0, 0)):
    """The tiles, in signed integers, of a black picture with a white rectangle: the same for every merge type."""
    picture = np.zeros((*size[::-1], 3), np.uint8)
    x0, y0, x1, y1 = rectangle
    picture[y0:y1, x0:x1] = 255
    (tiles,) = process_images([Image.fromarray(picture)], shaped(aspect, "flat"))
    return tiles[..., 0].astype(int)


@pytest.mark.parametrize(("aspect", "merge"), SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_painted_rectangle_is_seen_by_its_token(aspect, merge, size):
    """White paint in a token's rectangle lights up its patch of its tile, and no other as much."""
    config = shaped(aspect, merge)
    tokens, side, patch = image_tokens(size, config), config.vision.num_patches_per_side, config.vision.patch_size
    width, height = size
    for tile, place, rectangle in zip(*tokens, strict=True):
        if np.isnan(rectangle).any():
            continue
        x0, y0, x1, y1 = np.round(rectangle).astype(int)
        if min(x1 - x0, y1 - y0) < 0.5 * min(width, height) / (4 * side):
            continue  # a sliver of it, beside the padding
        brighter = painted(aspect, size, (x0, y0, x1, y1))[tile] - painted(aspect, size)[tile]
        seen = brighter.reshape(side, patch, side, patch).mean((1, 3)).ravel()
        assert seen.argmax() == place and seen[place] > 2 * np.sort(seen)[-2], (tile, place, seen.round())


@pytest.mark.parametrize(("aspect", "merge"), SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_rectangles_tile_the_picture(aspect, merge, size):
    config = shaped(aspect, merge)
    tokens, (width, height) = image_tokens(size, config), size
    assert len(tokens.tile) == len(tokens.patch) == len(tokens.rectangles) == num_image_tokens(*size, config)
    visible = ~np.isnan(tokens.rectangles).any(1)
    for part, of_grid in ((tokens.tile == 0, False), (tokens.tile > 0, True)):
        boxes = tokens.rectangles[part & visible]
        if not len(boxes):
            assert aspect != "anyres"
            continue
        x0, y0, x1, y1 = boxes.T
        assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= width).all() and (y1 <= height).all()
        overlap_x = np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0)
        overlap_y = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)
        overlap = np.maximum(overlap_x, 0) * np.maximum(overlap_y, 0)
        np.testing.assert_allclose(overlap - np.diag(np.diag(overlap)), 0, atol=1e-6)
        covered = np.diag(overlap).sum() / (width * height)
        if aspect == "square":  # its corners are cut off
            np.testing.assert_allclose(covered, min(size) / max(size), rtol=0.03)
        elif merge == "spatial_unpad" and of_grid:  # unpad keeps whole cells only
            assert 0.8 < covered <= 1 + 1e-9
        else:
            np.testing.assert_allclose(covered, 1)


def test_newlines_and_padding_see_nothing():
    tokens = image_tokens((620, 246), SCENES)
    newlines = tokens.tile == -1
    top, bottom, left, right = unpad_window((620, 246), 4, 12)
    assert newlines.sum() == bottom - top and newlines[-1]
    assert np.isnan(tokens.rectangles[newlines]).all() and (tokens.patch[newlines] == -1).all()
    assert np.flatnonzero(newlines)[0] == 16 + right - left
    spatial = image_tokens((232, 682), shaped("anyres", "spatial"))
    assert np.isnan(spatial.rectangles).any(1).sum() == 0
    padded = image_tokens((100, 700), shaped("pad", "flat"))
    assert np.isnan(padded.rectangles).any(1).sum() == 8  # the left and the right column


def test_published_shapes():
    """A picture of every kind of size; a class token, which sees its tile; S2, whose tile is the large square."""
    anyres, pad = LlavaConfig.preset("1.6-vicuna-7b"), LlavaConfig.preset("1.5-7b")
    for size in [(640, 427), (4000, 20), (2000, 50), (50, 2000), (1, 1), (333, 500)]:
        tokens = image_tokens(size, anyres)
        assert len(tokens.tile) == num_image_tokens(*size, anyres)
        assert np.isfinite(tokens.rectangles[:576]).all(), size
    with_class = image_tokens((640, 427), pad.replace(mm_vision_select_feature="cls_patch"))
    assert with_class.patch[0] == -1 and with_class.rectangles[0].tolist() == [0, 0, 640, 427]
    assert with_class.patch[1:].tolist() == list(range(576))
    s2 = pad.replace(s2=True, mm_hidden_size=3072)
    np.testing.assert_allclose(image_tokens((640, 427), s2).rectangles, image_tokens((640, 427), pad).rectangles)


def test_pixel_map():
    size, weights = (223, 236), np.zeros(num_image_tokens(223, 236, SCENES))
    tokens = image_tokens(size, SCENES)
    weights[30] = 0.25  # a cell of the grid
    heat = pixel_map(weights, size, SCENES)
    x0, y0, x1, y1 = np.round(tokens.rectangles[30]).astype(int)
    assert heat.shape == (236, 223) and heat.dtype == np.float32
    np.testing.assert_allclose(heat[y0:y1, x0:x1], 0.25 / ((x1 - x0) * (y1 - y0)), rtol=1e-6)
    np.testing.assert_allclose(heat.sum(), 0.25, rtol=1e-5)
    everything = np.ones(len(weights))
    np.testing.assert_allclose(pixel_map(everything, size, SCENES).sum(), (tokens.tile >= 0).sum(), rtol=1e-4)
    with pytest.raises(ValueError, match=rf"weights: got shape \(3,\) for the {len(weights)} positions"):
        pixel_map(np.ones(3), size, SCENES)


# ---- attention


@pytest.mark.long
@pytest.mark.parametrize("variant", ["mistral", "vicuna"])
def test_rows_are_those_of_forward(model, pictures, variant):
    """The rows of an answer against the whole matrices of every layer, with and without grouped queries."""
    llava, params = model(variant)
    picture, question, options = pictures["sliver_2000x50"], "Name it.", dict(max_new_tokens=5)
    looks = answer_attention(llava, params, picture, question, **options)
    ids = llava.prompt_ids(question, [(2000, 50)])
    answer = llava.generate_tokens(params, [ids], [picture], **options)[0].tolist()
    whole = llava.forward(params, [[*ids, *answer[:-1]]], [picture], output_attentions=True).attentions
    assert looks.weights.shape == (len(whole), whole[0].shape[1], len(answer), whole[0].shape[-1])
    for layer, weights in enumerate(whole):
        np.testing.assert_allclose(looks.weights[layer], weights[0, :, -len(answer) :], atol=5e-6)
    np.testing.assert_allclose(looks.weights.sum(-1), 1, atol=1e-5)
    assert (looks.weights[..., -1].sum((0, 1)) > 0).tolist() == [False] * (len(answer) - 1) + [True]
    start, count = ids.index(-200), int(num_image_tokens(2000, 50, llava.config))
    assert looks.pictures == (slice(start, start + count),)
    assert "".join(looks.pieces) == llava.generate(params, picture, question, **options)
    if variant == "mistral":
        mean = answer_attention(llava, params, picture, question, mean_heads=True, **options)
        np.testing.assert_allclose(mean.weights, looks.weights.mean(1), atol=5e-6)


def test_where_two_pictures_are():
    sizes = [(223, 236), (620, 246)]
    first, second = picture_positions([1, 7, -200, 8, 9, 9, -200, 5], sizes, SCENES)
    lengths = [int(num_image_tokens(*size, SCENES)) for size in sizes]
    assert [where.stop - where.start for where in (first, second)] == lengths
    assert first.start == 2 and second.start == first.stop + 3
    assert picture_positions([1, 7], [], SCENES) == ()


def test_words_are_means_of_their_tokens():
    weights = np.random.default_rng(0).random((2, 3, 4, 7)).astype(np.float32)
    words = by_word(AnswerAttention(("The", " st", "ar", " is"), weights, (slice(1, 5),)))
    assert words.pieces == ("The", " star", " is") and words.pictures == (slice(1, 5),)
    np.testing.assert_allclose(words.weights[..., 1, :], weights[..., 1:3, :].mean(-2), rtol=1e-6)
    np.testing.assert_allclose(words.weights[..., [0, 2], :], weights[..., [0, 3], :], rtol=1e-6)


def test_tower_attention_gives_what_the_tower_computes(demo):
    """The weights times the values, projected, are what each layer's attention adds."""
    llava, params = demo
    (image,) = llava.load_images(draw(held_out_scene(0, 27)))
    tiles = image.tiles
    kept = dict(capture_intermediates=lambda module, _: True, mutable=["intermediates"])
    _, state = llava.engine.model.apply({"params": params}, tiles, method="vision_features", **kept)
    for layer in (0, 3):
        inside = state["intermediates"]["vision_tower"][f"layers_{layer}"]
        own = params["vision_tower"][f"layers_{layer}"]["self_attn"]
        (normed,), (added,) = inside["layer_norm1"]["__call__"], inside["self_attn"]["__call__"]
        weights = tower_attention(llava, params, tiles, layer)
        values = normed @ own["v_proj"]["kernel"] + own["v_proj"]["bias"]
        mixed = np.einsum("thqk,tkhd->tqhd", weights, values.reshape(*values.shape[:2], weights.shape[1], -1))
        ours = mixed.reshape(values.shape) @ own["out_proj"]["kernel"] + own["out_proj"]["bias"]
        np.testing.assert_allclose(ours, added, atol=1e-4)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    one, mean = patch_maps(weights, 5), patch_maps(weights)
    assert one.shape == mean.shape == (len(tiles), 4, 4)
    np.testing.assert_allclose(one[2].ravel(), weights[2, :, 6, 1:].mean(0), rtol=1e-5)
    np.testing.assert_allclose(mean[2].ravel(), weights[2, :, 1:, 1:].mean((0, 1)), rtol=1e-5)


def test_wrong_layers_and_tiles_are_refused(demo):
    llava, params = demo
    (image,) = llava.load_images(draw(held_out_scene(0, 27)))
    tiles = image.tiles
    with pytest.raises(ValueError, match="layer=4 is not one of those that this model runs: 0 to 3"):
        tower_attention(llava, params, tiles, 4)  # the fifth block, which LLaVA leaves out
    with pytest.raises(ValueError, match=r"tiles: expected uint8 \[T, 56, 56, 3\], got uint8 \(5, 55, 56, 3\)"):
        tower_attention(llava, params, tiles[:, 1:], 0)
    scales = dict(s2=True, s2_scales=(56, 112, 168), mm_hidden_size=3 * 128)
    several = llava_jax.Llava(shaped("pad", "flat").replace(**scales), llava.tokenizer)
    with pytest.raises(ValueError, match="s2=True"):
        tower_attention(several, params, tiles, 0)


@pytest.mark.parametrize("number", [3, 16, 27])
def test_reading_a_sign_looks_at_it(demo, number):
    """Wide, tall and square: from the words through anyres to the pixels, the brightest place is on the sign."""
    llava, params = demo
    scene = held_out_scene(0, number)
    (sign,) = [item for item in scene.items if item.kind == SIGN]
    looks = answer_attention(llava, params, draw(scene), "What does the sign say?", mean_heads=True)
    assert "".join(looks.pieces) == sign.text
    on_picture = looks.weights[..., looks.pictures[0]]
    layer = on_picture.sum(-1).mean(1).argmax()
    for weights in on_picture[layer]:
        heat = pixel_map(weights, (scene.width, scene.height), llava.config)
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        cell = 14 * max(scene.width, scene.height) / 112
        assert abs(x - sign.x) <= sign.width / 2 + cell and abs(y - sign.y) <= sign.height / 2 + cell


# ---- drawings


def pixels(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize("aspect", ["anyres", "pad", "square"])
def test_tiles_are_drawn(aspect):
    config, image = shaped(aspect, "spatial_unpad"), draw(held_out_scene(0, 3))
    figure = draw_tiles(image, config)
    (tiles,) = process_images([image], config)
    shown = [np.asarray(drawn.get_array()) for axes in figure.axes[1:] for drawn in axes.images]
    assert len(shown) == len(tiles) and all(np.array_equal(a, b) for a, b in zip(shown, tiles, strict=True))
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == (["1", "2", "3"] if aspect == "anyres" else ["0"])
    assert np.mean(pixels(figure) < 250) > 0.2


def test_token_grid_is_drawn():
    image = draw(held_out_scene(0, 3))
    figure = draw_token_grid(image, SCENES)
    count = int(num_image_tokens(*image.size, SCENES))
    first, grid = figure.axes[:2]
    assert [text.get_text() for text in (*first.texts, *grid.texts)] == [str(i) for i in range(count)]
    colors = [patch.get_facecolor()[:3] for patch in (*first.patches, *grid.patches)]
    assert len(set(colors)) == count and colors[-1][0] > 0.9 > colors[0][0]  # violet to yellow
    right_of = [patch.get_x() >= image.width for patch in grid.patches]
    assert sum(right_of) == (image_tokens(image.size, SCENES).tile == -1).sum()
    assert np.mean(pixels(figure) < 250) > 0.2


@pytest.mark.parametrize("size", [(4000, 20), (50, 2000), (1, 1)])
def test_pictures_of_any_shape_are_drawn(size):
    config, image = LlavaConfig.preset("1.6-vicuna-7b"), Image.new("RGB", size, "red")
    figures = draw_tiles(image, config), draw_token_grid(image, config)
    weights = np.full((1, num_image_tokens(*size, config)), 1e-4)
    for figure in (*figures, draw_attention(image, config, weights, ["it"])):
        assert np.mean(pixels(figure) < 250) > 0.001


def test_attention_is_bright_where_it_looks():
    image = Image.new("RGB", (223, 236), "white")
    weights = np.zeros((5, int(num_image_tokens(*image.size, SCENES))))
    weights[np.arange(5), [0, 20, 30, 40, 50]] = 0.2, 0.5, 0.4, 0.3, 0.1
    figure = draw_attention(image, SCENES, weights, ["a", " b", "c", "$\\d$", "e"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["the picture", "a  20%", "b  50%", "c  40%", "$\\d$  30%", "e  10%", "", ""]
    pixels(figure)  # dollar signs are not mathematics
    panel = np.asarray(figure.axes[2].images[0].get_array())[..., 0]
    x0, y0, x1, y1 = np.round(image_tokens(image.size, SCENES).rectangles[20]).astype(int)
    assert (panel[y0:y1, x0:x1] == 1).all() and np.isclose(panel, 0.2).mean() > 0.9
    with pytest.raises(ValueError, match="weights: got 5 rows for 2 words"):
        draw_attention(image, SCENES, weights, ["a", "b"])


def test_sheet_of_answers():
    small, large = Image.new("RGB", (100, 60), "black"), Image.new("RGB", (800, 400), "black")
    asked = [("A question that is long enough to need a second line in so narrow a column?", "right", True)]
    sheet = np.asarray(
        draw_answers([(small, asked), (large, [("Q?", "wrong", False)]), (small, [("Q?", "so", None)])], 2)
    )
    assert sheet.shape[1] == 2 * 380 + 3 * 20
    assert (sheet[20:80, 20:120] == 0).all() and (sheet[20:210, 420:800] == 0).all()  # the second one is reduced
    for color in visualize.SHEET_COLORS.values():
        assert (np.abs(sheet.astype(int) - color).sum(-1) < 20).sum() > 10
    with pytest.raises(ValueError, match="no pictures"):
        draw_answers([])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    image = Image.new("RGB", (80, 60))
    for figure in (draw_tiles, draw_token_grid):
        with pytest.raises(ImportError, match=r'pip install "llava-jax\[plot\]"'):
            figure(image, SCENES)


def test_importing_it_imports_neither_jax_nor_matplotlib():
    show = "print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
    code = f"import sys; from llava_jax.plots import visualize; {show}"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
