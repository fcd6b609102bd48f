"""Messages as the checkpoint's prompts: those of `generate`, in two parts, with `<image>` as text."""

import json

import numpy as np
import pytest
from small import small_model
from test_prompt import CONFIG, TOKENIZER

from llava_jax.inference.serving import shared_length
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.prompt import Dialogue, Turn, dialogue_ids, prompt_ids
from llava_jax.inputs.types import ProcessedImage
from llava_jax.serve.prompts import (
    MOST_CHARACTERS,
    Limits,
    Picture,
    answer_ids,
    chat_prompt,
    choices_after,
    read_messages,
    text_prompt,
)
from llava_jax.serve.protocol import MOST_PICTURES, ApiError, parse_chat

LIMITS = Limits(4096, 512)
IMAGE = ProcessedImage(np.zeros((1, 2, 2, 3), np.uint8), (336, 336))
PART = {"type": "image"}  # as `generate` takes it
URL = {"type": "image_url", "image_url": {"url": "data:,"}}
MODES = sorted(set(conv_templates) - {"plain", "v0_plain"})
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint 'llava-v1.6-random' has conv_mode")


def user(*content):
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def read(*messages):
    return read_messages(parse_chat(json.dumps({"messages": messages}).encode()).messages)


def asked(*messages, mode=None, limits=LIMITS, config=CONFIG):
    """The prompt of messages, each picture of which is 336 x 336."""
    chat = read(*messages)
    return chat_prompt(config, TOKENIZER, chat, [IMAGE] * len(chat.pictures), limits, mode).prompt


def parts(prompt):
    """What a prompt's two parts say, `@` where an image is."""

    def runs(ids):
        found = [[]]
        for i in ids.tolist():
            found.append([]) if i == -200 else found[-1].append(i)
        return "@".join(TOKENIZER.decode(run, False) for run in found)

    return runs(prompt.ids[: prompt.shared]), runs(prompt.ids[prompt.shared :])


# ---- the ids of `generate`


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_conversation_has_the_ids_that_generate_gives_it(mode, wrapped):
    config = CONFIG.replace(mm_use_im_start_end=wrapped)
    first, last = {"type": "text", "text": "And"}, {"type": "text", "text": "these two?"}
    turns = [system("Be brief."), user("What is it?"), assistant("A star.")]
    wanted = prompt_ids(
        config, TOKENIZER, [*turns, {"role": "user", "content": [first, PART, PART, last]}], [(336, 336)] * 2, mode
    )
    assert asked(*turns, user(first, URL, URL, last), mode=mode, config=config).ids.tolist() == wanted
    wanted = prompt_ids(config, TOKENIZER, ["What is it?", "A star.", "Where?"], [(336, 336)], mode)
    turns = user("What is it?", URL), assistant("A star."), user("Where?")
    assert asked(*turns, mode=mode, config=config).ids.tolist() == wanted


def test_one_question_has_the_ids_that_the_model_gives_it():
    llava, _ = small_model()
    wanted = llava.prompt_ids("What colour is the star?", [(336, 336)])
    assert asked(user("What colour is the star?", URL)).ids.tolist() == wanted
    developer = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    assert asked(developer, user("Hi")).ids.tolist() == llava.prompt_ids([system("Be brief."), user("Hi")], [])


# ---- `<image>` is text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("typed", ["<image>", "<image-placeholder>", "<image>\n<image>"])
def test_an_image_that_is_typed_is_text(typed, mode):
    messages = system(f"s {typed}"), user(f"a {typed} b", URL), assistant(f"c {typed}"), user(f"d {typed}")
    prompt = asked(*messages, mode=mode)
    assert np.sum(prompt.ids == -200) == 1
    first, second = parts(prompt)
    assert (first + second).count("<image") == 4 * typed.count("<image")
    assert first.index("@") < first.index("a <image")


def test_generate_still_lets_a_caller_place_images_by_hand():
    assert prompt_ids(CONFIG, TOKENIZER, "Is <image> a star?", [(336, 336)]).count(-200) == 1
    by_hand = dialogue_ids(CONFIG, TOKENIZER, Dialogue((Turn("Is <image> a star?", 1),)))
    assert by_hand.count(-200) == 1 and by_hand != prompt_ids(CONFIG, TOKENIZER, "Is <image> a star?", [(336, 336)])


# ---- the prefix


def test_a_question_shares_all_as_far_as_its_last_picture():
    one, other = asked(user("What is it?", URL, URL)), asked(user(URL, URL, "\n Where?"))
    assert one.ids[one.shared - 1] == -200 and parts(one)[1].startswith("\n")
    assert one.ids[: one.shared].tolist() == other.ids[: other.shared].tolist()


def test_a_chat_shares_the_conversation_so_far():
    first = [user("What is it?", URL), assistant("A star.")]
    for last, begins in (("Where?", "Where?"), (" \nWhy so", " \nWhy so")):
        so_far, rest = parts(asked(*first, user(last)))
        assert so_far.endswith("A star.</s>USER:") and so_far.count("@") == 1
        assert rest.strip().startswith(begins.strip()) and rest.endswith("ASSISTANT:")
    longer = asked(*first, user("Where?"), assistant("There."), user("Why?"))
    assert np.array_equal(longer.ids[:50], asked(*first, user("Where?")).ids[:50])
    assert parts(asked(*first, user("And it?", URL)))[1].startswith("\n")


@pytest.mark.parametrize("mode", MODES)
def test_a_text_alone_shares_the_templates_own_words(mode):
    one, other = asked(user("What is it?"), mode=mode), asked(user("  Where?\n"), mode=mode)
    assert one.shared == other.shared and one.ids[: one.shared].tolist() == other.ids[: other.shared].tolist()
    assert "What is it?" in parts(one)[1]


def test_the_prefix_is_never_too_short_nor_all():
    assert shared_length([1, 5, 6, 7], [1, 5], 9) == 2 and shared_length([1, 5, 6, 7], [1, 5], 1) == 3
    assert shared_length([1, 5], [1, 5, 6], 9) == 1 and shared_length([1], [], 9) == 0
    assert shared_length([1, -200, 3, 4], [1], 9) == 2  # all images are in it
    long = asked(user("word " * 600, URL), limits=Limits(4096, 100))
    assert len(long.ids) - long.shared == 100 and long.shared > np.argmax(long.ids == -200)


# ---- what is refused


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        ([user("a"), user("b")], "messages[1].role", "'assistant' is due and not 'user'"),
        ([assistant("a")], "messages[0].role", "'user' is due and not 'assistant'"),
        ([user("a"), assistant("b"), system("c")], "messages[2].role", "one system message may stand before"),
        ([system("a"), system("b"), user("c")], "messages[1].role", "'user' is due"),
        ([user("a"), assistant("b")], "messages", "the last one must be the user's"),
        ([system("a")], "messages", "the last one must be the user's"),
        ([{"role": "tool", "content": "a"}], "messages[0].role", "not 'tool'"),
        ([{"role": "user"}], "messages[0].content", "missing"),
        ([{"role": "user", "content": None}], "messages[0].content", "missing"),
        ([user({"type": "text"})], "messages[0].content[0].text", "missing"),
        ([user("a", {"type": "image_url"})], "messages[0].content[1].image_url", "missing"),
        ([user({"type": "input_audio"})], "messages[0].content[0].type", "'input_audio' is not taken here"),
        ([{"role": "system", "content": [URL]}, user("a")], "messages[0].content[0].type", "only a user's parts"),
        ([user("a"), assistant([URL]), user("b")], "messages[1].content[0].type", "only a user's parts"),
        ([user("a"), {"role": "assistant", "tool_calls": [{}]}, user("b")], "messages[1].tool_calls", "not supported"),
        ([user(*[URL] * (MOST_PICTURES + 1))], "messages", f"{MOST_PICTURES + 1} pictures are more than"),
    ],
)
def test_what_is_no_conversation_is_one_clear_error(messages, param, said):
    with pytest.raises(ApiError) as error:
        read(*messages)
    assert error.value.param == param and said in error.value.message and "\n" not in error.value.message


def test_pictures_are_known_by_their_place():
    assert read(system("s"), user("a", URL), assistant("b"), user(URL)).pictures == (
        Picture("data:,", "messages[1].content[1].image_url.url"),
        Picture("data:,", "messages[3].content[0].image_url.url"),
    )


def test_a_prompt_without_room_for_an_answer_is_too_long():
    positions = len(asked(user("Hi")).ids)
    assert asked(user("Hi"), limits=Limits(positions + 1, 9)).shared == positions - 9
    for messages, most in (([user("Hi")], positions), ([user("Hi", URL)], 1000)):
        with pytest.raises(ApiError, match=f"takes .* positions .*, and the context has {most} positions") as error:
            asked(*messages, limits=Limits(most, 512))
        assert error.value.code == "context_length_exceeded"
    with pytest.raises(ApiError, match="characters") as error:
        asked(user("a" * (MOST_CHARACTERS * 4096 + 1)))
    assert error.value.code == "context_length_exceeded"


def test_a_text_is_a_prompt_of_its_own():
    placed = text_prompt(CONFIG, TOKENIZER, "Hello <image> there", LIMITS)
    assert placed.prompt.ids.tolist() == TOKENIZER.encode("Hello <image> there")
    assert placed.prompt.shared == placed.positions - 1
    assert text_prompt(CONFIG, TOKENIZER, [1, 5, 9], LIMITS).prompt.ids.tolist() == [1, 5, 9]
    for wrong, said in (("", "empty"), ([1, 10**6], "1000000 is no token"), ([1] * 4096, "4096 positions")):
        with pytest.raises(ApiError, match=said) as error:
            text_prompt(CONFIG, TOKENIZER, wrong, LIMITS, "prompt[3]")
        assert error.value.param == "prompt[3]"


# ---- answers to choose from


@pytest.mark.parametrize("mode", MODES)
def test_choices_are_what_generate_scores(mode):
    chat, texts = read(user("Is it red?", URL)), ["Yes", "No, blue", "s <image>"]
    placed = chat_prompt(CONFIG, TOKENIZER, chat, [IMAGE], LIMITS, mode)
    chosen = choices_after(placed, answer_ids(CONFIG, TOKENIZER, chat.dialogue, texts, mode), LIMITS)
    for text, candidate in zip(texts, chosen.candidates, strict=True):
        whole = prompt_ids(CONFIG, TOKENIZER, "Is it red?", [(336, 336)], mode, text)
        assert [*chosen.prompt.ids, *candidate] == whole
    assert chosen.starts == (0, 0, 0)
    assert 0 < chosen.prompt.shared < len(chosen.prompt.ids)


def test_a_choice_that_cannot_be_scored_is_named():
    placed = text_prompt(CONFIG, TOKENIZER, "a b", LIMITS)
    ids = placed.prompt.ids.tolist()
    with pytest.raises(ApiError, match=r"structured_outputs.choice\[1\]: it adds nothing"):
        choices_after(placed, [[*ids, 5], ids], LIMITS)
    with pytest.raises(ApiError, match="the longest answer take"):
        choices_after(placed, [[*ids, *[5] * 10]], Limits(len(ids) + 9, 512))
    with pytest.raises(ApiError, match=r"choice\[0\]: it has 9 tokens, and 8 at most"):
        choices_after(placed, [[*ids, *[5] * 9]], Limits(4096, 9))
    merged = choices_after(placed, [[*ids[:-1], 9, 9], [*ids, 5]], LIMITS)  # one takes the prompt's end with it
    assert merged.prompt.ids.tolist() == ids[:-1] and merged.prompt.shared == len(ids) - 2
    assert [c.tolist() for c in merged.candidates] == [[9, 9], [ids[-1], 5]] and merged.starts == (0, 1)
