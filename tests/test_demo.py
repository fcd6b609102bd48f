"""The bundled model's scenes, questions and training: the answers are right, and balanced, and every phase runs."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small import random_params

from llava_jax.demo import dataset, pretrain, recipe, truths
from llava_jax.demo.held_out import is_right, questions_about, score, table
from llava_jax.demo.model import scenes_config, write_tokenizer
from llava_jax.demo.scene_questions import KINDS, NUMBERS, PLURALS, ask, conversation, describe, described, is_detail
from llava_jax.demo.scenes import COLORS, SIGN, draw, make_scene, outline_of
from llava_jax.inputs.anyres import num_image_tokens
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.image import process_images
from llava_jax.inputs.tokenizer import load_tokenizer
from llava_jax.models.llava_llama import param_bytes
from llava_jax.training.preprocess import preprocess, preprocess_multimodal, training_tokenizer

SCENES = [make_scene((99, i)) for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def config(tokenizer):
    return scenes_config(len(tokenizer))


# ---- scenes


def test_a_seed_is_a_picture():
    again = make_scene((99, 3))
    assert again == SCENES[3] and again != SCENES[4]
    assert np.array_equal(np.asarray(draw(again)), np.asarray(draw(SCENES[3])))


def test_items_neither_touch_nor_leave_the_picture():
    for scene in SCENES:
        for i, a in enumerate(scene.items):
            assert (
                a.width / 2 <= a.x <= scene.width - a.width / 2 and a.height / 2 <= a.y <= scene.height - a.height / 2
            )
            for b in scene.items[i + 1 :]:
                assert abs(a.x - b.x) > (a.width + b.width) / 2 or abs(a.y - b.y) > (a.height + b.height) / 2


def test_the_pixels_are_those_of_the_items():
    for scene in SCENES[:40]:
        pixels = np.asarray(draw(scene)).astype(int)
        assert np.array_equal(pixels[0, 0], scene.background)
        for item in scene.items:
            if item.kind == SIGN:
                box = pixels[int(item.y - item.size / 2) : int(item.y + item.size / 2) + 1]
                box = box[:, int(item.x - item.width / 2 + 4) : int(item.x + item.width / 2 - 3)].sum(-1)
                dark = 0.05 < np.mean(box < 200) < 0.6  # there is ink on the plate
                assert dark and np.mean(box > 720) > 0.3
            else:
                middle = pixels[int(item.y), int(item.x)]
                nearest = min(COLORS, key=lambda name: np.abs(middle - COLORS[name]).sum())
                assert nearest == item.color, item


def test_every_shape_fills_about_its_square():
    for shape in PLURALS:
        corners = np.array(outline_of(shape))
        assert np.all(np.abs(corners) <= 0.55) and np.all(np.ptp(corners, axis=0) > 0.85), shape


# ---- questions


def answer_from_items(scene, question):
    """The answer worked out again, from the words of the question."""
    words = question.text.rstrip("?.").split()
    shapes = [item for item in scene.items if item.kind != SIGN]
    if question.kind == "colour":
        (item,) = [item for item in shapes if item.kind == words[-1]]
        return item.color
    if question.kind == "shape":
        (item,) = [item for item in shapes if item.color == words[-1]]
        return item.kind
    if question.kind == "count":
        kinds = {plural: kind for kind, plural in PLURALS.items()}
        found = [item for item in shapes if item.color == words[2] or item.kind == kinds.get(words[2])]
        return NUMBERS[len(found) - 1]
    if question.kind == "yes_no":
        name = " ".join(words[3 : words.index("in")])
        return "Yes" if any(name in (item.name, item.kind) for item in scene.items) else "No"
    if question.kind == "place":
        (item,) = [
            item for item in scene.items if item.name == question.text[len("In which part of the image is the ") : -1]
        ]
        assert min(abs(item.x / scene.width - 0.5), abs(item.y / scene.height - 0.5)) > 0.05
        row, column = item.y > scene.height / 2, item.x > scene.width / 2
        return f"{('top', 'bottom')[row]} {('left', 'right')[column]}"
    if question.kind == "position":
        name, other = question.text[len("Where is the ") : -1].split(" relative to the ")
        (a,), (b,) = ([item for item in scene.items if item.name == it] for it in (name, other))
        across, down = abs(a.x - b.x), abs(a.y - b.y)
        assert max(across, down) > 1.5 * min(across, down)
        return ("left" if a.x < b.x else "right") if across > down else ("above" if a.y < b.y else "below")
    if question.kind == "reading":
        (sign,) = [item for item in scene.items if item.kind == SIGN]
        return sign.text
    return describe(scene)


def test_answers_are_right():
    asked = Counter()
    for i, scene in enumerate(SCENES):
        rng = np.random.default_rng(i)
        for kind in KINDS:
            if question := ask(scene, kind, rng):
                assert question.answer == answer_from_items(scene, question), (question, scene)
                asked[kind] += 1
    assert min(asked[kind] for kind in KINDS) > 100


def test_answers_are_balanced():
    answers = {kind: Counter() for kind in KINDS}
    for i in range(2000):
        scene, rng = make_scene((5, i)), np.random.default_rng((6, i))
        for kind in KINDS:
            if question := ask(scene, kind, rng):
                answers[kind][question.answer] += 1
    most = {kind: counts.most_common(1)[0][1] / counts.total() for kind, counts in answers.items()}
    assert abs(answers["yes_no"]["Yes"] / answers["yes_no"].total() - 0.5) < 0.04
    assert most["colour"] < 0.22 and most["shape"] < 0.22 and most["reading"] < 0.03
    assert most["place"] < 0.31
    assert most["count"] < 0.35 and most["position"] < 0.31


def test_most_things_that_are_not_there_could_be():
    hard = total = 0
    for i, scene in enumerate(SCENES):
        question = ask(scene, "yes_no", np.random.default_rng(i))
        name = question.text.split()[3:-3] if question and question.answer == "No" else ()
        if len(name) == 2:
            total += 1
            hard += name[0] in {item.color for item in scene.items} and name[1] in {item.kind for item in scene.items}
    assert total > 40 and hard / total > 0.3


def test_a_conversation_does_not_give_its_answers_away():
    for i, scene in enumerate(SCENES):
        said = set()
        for question in conversation(scene, np.random.default_rng(i)):
            assert not question.needs & said
            said |= question.gives
        texts = [question.text for question in conversation(scene, np.random.default_rng(i))]
        assert len(set(texts)) == len(texts) > 0


def test_a_description_is_compared_without_its_order():
    assert described("A red star, an orange cross and a sign that says K7.") == described(
        "A sign that says K7, a red star and an orange cross."
    )
    assert described("A red star and a red star.") != described("A red star.")


# ---- the tokenizer and the data


def test_the_vocabulary_has_every_word(tokenizer):
    for i, scene in enumerate(SCENES[:100]):
        for question in conversation(scene, np.random.default_rng(i)):
            for text in (question.text, question.answer):
                ids = tokenizer.encode(text)
                assert min(ids[1:]) > 258, text  # no bytes, no unknown
                assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(tokenizer.encode(describe(scene))) < 48
    assert tokenizer.decode(tokenizer.encode("Straße?"), skip_special_tokens=True) == "Straße?"


@pytest.mark.parametrize(
    "style, aspect, length", [("questions", "anyres", 256), ("questions", "pad", 128), ("captions", "pad", 128)]
)
def test_samples_fit_and_have_their_labels(tmp_path, tokenizer, config, style, aspect, length):
    config = config.replace(image_aspect_ratio=aspect)
    template = conv_templates["plain" if style == "captions" else "llava_v1"]
    (tmp_path / "000").mkdir()
    longest = 0
    for i in range(60):
        pictures = "all" if aspect == "anyres" else "square"
        example = dataset.make_sample(style, pictures, length, config, str(tmp_path), 3, i)
        turns = preprocess_multimodal(example["conversations"], template)
        size = Image.open(tmp_path / example["image"]).size
        text = preprocess(turns, training_tokenizer(tokenizer), template, has_image=True, max_length=None)
        assert text.mismatch is None
        assert np.sum(text.labels >= 0) >= len(turns)  # an answer and its end for each pair of turns
        longest = max(longest, len(text.ids) + int(num_image_tokens(*size, config)) - 1)
    assert 0.7 * length < longest <= length


def test_a_data_set_is_written_once(tmp_path, config):
    settings = dict(style="captions", pictures="all", length=64, config=config, seed=1)
    directory = dataset.write_dataset(tmp_path / "data", 3, **settings)
    before = (directory / dataset.DATA).read_text()
    assert len(list((directory / dataset.IMAGES).rglob("*.png"))) == 3
    dataset.write_dataset(tmp_path / "data", 5, **settings)
    assert (directory / dataset.DATA).read_text() == before


# ---- the tower's truths


def test_truths_say_what_the_tiles_show(config):
    """Where a patch is said to hold an item's middle, the tile has the item's color there."""
    seen = Counter()
    for scene in SCENES[:40]:
        tiles, labels = truths.seen_tiles(scene, config), truths.patch_truths(scene, config)
        assert len(tiles) == len(labels.kind)
        patches = tiles.reshape(len(tiles), 4, 14, 4, 14, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(tiles), 16, 196, 3)
        for tile, patch in zip(*np.nonzero(labels.middle_color > 0), strict=True):
            wanted = np.array(list(COLORS.values())[labels.middle_color[tile, patch] - 1])
            distance = np.abs(patches[tile, patch].astype(int) - wanted).sum(-1).min()
            seen[bool(distance < 90)] += 1
    assert seen[True] > 300 and seen[False] <= 0.01 * seen[True]


def test_every_character_is_seen_in_the_grid(config):
    for scene in SCENES[:60]:
        labels = truths.patch_truths(scene, config)
        text = "".join(item.text for item in scene.items)
        in_grid = labels.character[1:-1]
        assert np.sum(in_grid > 0) + 2 * np.sum(in_grid == -100) >= len(text)


# ---- training and the score


def test_a_step_of_the_towers_pretraining_and_one_more(tmp_path, config, monkeypatch):
    monkeypatch.setattr(pretrain, "SCENES_PER_STEP", 2)
    monkeypatch.setattr(pretrain, "TILES_PER_STEP", 6)
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 1)
    config = config.replace(vision=replace(config.vision, num_hidden_layers=2))
    tower = random_params(config)["vision_tower"]
    settings = dict(learning_rate=1e-3, seed=0)
    whole = pretrain.pretrain_tower(tower, config, tmp_path / "whole", steps=2, **settings)
    kernel = whole["embeddings"]["patch_embedding"]["kernel"]
    assert not np.array_equal(kernel, tower["embeddings"]["patch_embedding"]["kernel"])
    again = pretrain.pretrain_tower(tower, config, tmp_path / "whole", steps=2, **settings)  # nothing left to do
    assert np.array_equal(kernel, again["embeddings"]["patch_embedding"]["kernel"])


@pytest.mark.long
def test_every_kind_of_phase_runs_and_what_comes_out_can_be_scored(tmp_path, monkeypatch, config):
    """Of fewer layers than the bundled model has."""
    import llava_jax
    from llava_jax.conversion.checksums import check
    from llava_jax.conversion.from_hf import convert

    monkeypatch.setattr(pretrain, "SCENES_PER_STEP", 2)
    monkeypatch.setattr(pretrain, "TILES_PER_STEP", 6)
    assert {(phase.stage, phase.style) for phase in recipe.PHASES} == {
        ("finetune", "captions"), ("pretrain", "captions"), ("finetune", "questions")
    }  # fmt: skip
    shallow = config.replace(
        vision=replace(config.vision, num_hidden_layers=2), text=replace(config.text, num_hidden_layers=1)
    )
    monkeypatch.setattr(recipe, "scenes_config", lambda words: shallow)
    phases = [replace(phase, scenes=2, steps=1, rows=2, length=128) for phase in (recipe.PHASES[1], recipe.PHASES[-1])]
    published = recipe.train_demo(tmp_path, phases=tuple(phases), tower_steps=1)
    assert (published / "model.safetensors").stat().st_size < param_bytes(config, 2) < 12 << 20
    assert [check(tmp_path / directory) for directory in ("start", *(phase.name for phase in phases))] == [[], [], []]
    convert(published, output=tmp_path / "model", vision_tower=str(published / "tower"), progress=False)
    llava, params = llava_jax.load(tmp_path / "model")
    assert llava.config.name == "llava-v1.6-scenes" and llava.config.image_aspect_ratio == "anyres"
    scores = score(llava, params, scenes=2)
    assert set(scores) <= {*KINDS, "detail"} and all(0 <= value <= 1 for value in scores.values())
    assert "description" in table(scores)


def test_right_is_what_was_drawn():
    for number, scene in enumerate(SCENES[:5]):
        assert all(is_right(question, question.answer) for question in questions_about(scene, 0, number))


def test_details_are_small_signs_in_long_pictures(config):
    details = [
        scene for scene in SCENES if is_detail(scene, ask(scene, "reading", None) or ask(scene, "description", None))
    ]
    assert details
    for scene in details:
        (sign,) = [item for item in scene.items if item.kind == SIGN]
        padded = config.tile_size / max(scene.width, scene.height)
        assert sign.size * padded < 7  # pixels
        assert len(process_images([draw(scene)], config)[0]) >= 3
