"""What may be asked, in which forms, and what is refused with one clear line: on the host, without a model."""

from pathlib import Path

import pytest

from llava_jax.config import PINPOINTS_336, LlavaConfig, RopeScaling, TextConfig
from llava_jax.inputs.conversation import conv_templates
from llava_jax.inputs.prompt import as_prompts, as_texts, as_turns, build_conversation, prompt_ids
from llava_jax.inputs.tokenizer import load_tokenizer, tokenizer_image_token

TOKENIZER = load_tokenizer(Path(__file__).parent / "golden" / "tokenizers" / "small")
CONFIG = LlavaConfig(
    text=TextConfig(vocab_size=len(TOKENIZER)),
    mm_patch_merge_type="spatial_unpad",
    image_aspect_ratio="anyres",
    image_grid_pinpoints=PINPOINTS_336,
    tokenizer_model_max_length=4096,
    name="llava-v1.6-random",
)
PICTURE = [(336, 336)]
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint 'llava-v1.6-random' has conv_mode")


def prompt(*args):
    return build_conversation(CONFIG, *args).get_prompt()


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text(words):
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}


def test_messages_are_turns():
    turns = ["Hi", "Yes?", "Why?"]
    assert prompt([user("Hi"), assistant("Yes?"), user("Why?")], 1) == prompt(turns, 1)
    assert prompt(user("Hi"), 0) == prompt("Hi", 0)
    assert prompt([user([text("Hi")])], 1) == prompt("Hi", 1)
    assert prompt([user([IMAGE, text("Hi")])], 1) == prompt([user([text("Hi"), IMAGE])], 1) == prompt("Hi", 1)
    assert prompt([user([IMAGE, IMAGE, text("Hi"), text("you")])], 2) == prompt("Hi you", 2)
    assert prompt(["Hi", assistant([text("Yes?")]), user([IMAGE, text("Why?")])], 2) == prompt(
        ["<image>\nHi", "Yes?", "<image>\nWhy?"], 2
    )
    wrapped = CONFIG.replace(mm_use_im_start_end=True)
    assert "<im_start><image><im_end>\nHi" in build_conversation(wrapped, [user([IMAGE, text("Hi")])], 1).get_prompt()


def test_a_system_message_is_the_system_prompt():
    said = [{"role": "system", "content": "Be brief."}, user("Hi")]
    assert prompt(said, 1) == "Be brief. USER: <image>\nHi ASSISTANT:"
    assert prompt([{"role": "system", "content": [text("Be brief.")]}, user("Hi")], 1) == prompt(said, 1)
    assert prompt(said, 0, "llava_v1_hf") == "Be brief. USER: Hi ASSISTANT:"
    assert prompt(said, 0, "chatml_direct").startswith("<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n")
    assert prompt(said, 0, "llava_llama_2").startswith("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "got 0 turns"),
        ([user("a"), assistant("b")], "got 2 turns"),
        ([{"role": "system", "content": "a"}], "got 0 turns"),
        ([assistant("a")], "prompt: its role is 'assistant', and 'user' is due"),
        ([user("a"), user("b"), user("c")], "prompt: turn 1: its role is 'user', and 'assistant' is due"),
        ([user("a"), {"role": "system", "content": "b"}, user("c")], "turn 1: its role is 'system'"),
        ([{"role": "human", "content": "a"}], "its role is 'human'"),
        ([{"from": "human", "value": "a"}], "its role is None"),
        ([{"role": "user"}], "prompt: content: expected a text, or a list of parts, got NoneType"),
        ([user([{"type": "video"}])], "a part of type 'video' is not taken here"),
        ([user([{"type": "image", "image": object()}])], "a part of type 'image' is not taken here"),
        ([user([{"type": "text", "text": 5}])], "prompt: expected a text, got int"),
        ([user("a"), assistant([IMAGE]), user("b")], "turn 1: a part of type 'image' is not taken here"),
        (user([IMAGE, text("<image>?")]), None),  # the one is placed by hand
        ([user([IMAGE, IMAGE, text("a")])], "but there are 1 images"),
        (None, "expected a text, turns, or messages with roles, got NoneType"),
        (b"Hi", "expected a text, turns, or messages with roles, got bytes"),
        (7, "expected a text, turns, or messages with roles, got int"),
        ([["Hi"]], "prompt: expected a text, got list"),
        (["a", None, "b"], "turn 1: expected a text, got NoneType"),
        ("a\udc80b", r"prompt: has '\\udc80', half of a surrogate pair or a byte that is not UTF-8, at 1"),
        (["a", "\ud83d", "b"], r"prompt: turn 1: has '\\ud83d'"),
        ([{"role": "system", "content": "\ud83d"}, user("a")], r"prompt: the system message: has '\\ud83d'"),
    ],
)
def test_what_is_no_prompt_is_one_clear_error(asked, message):
    if message is None:
        assert prompt_ids(CONFIG, TOKENIZER, asked, PICTURE)
        return
    with pytest.raises(ValueError, match=message) as error:
        prompt_ids(CONFIG, TOKENIZER, asked, PICTURE)
    assert "\n" not in str(error.value)


def test_a_conversation_with_half_a_character_is_refused():
    conversation = conv_templates["llava_v1"].append_message("USER", "a\ud800")
    with pytest.raises(ValueError, match=r"prompt: has '\\ud800'"):
        prompt_ids(CONFIG, TOKENIZER, conversation, [])


@pytest.mark.parametrize("said", ["\0", "a\0b", "\ufeff", "\u202e", "\U0010ffff", "👩‍👩‍👧", "\x7f\x1b[31m", ""])
def test_any_whole_character_may_be_asked(said):
    wanted = tokenizer_image_token(prompt(said, 1), TOKENIZER)
    assert prompt_ids(CONFIG, TOKENIZER, said, PICTURE) == wanted


def test_one_text_is_one_where_a_list_is_meant():
    assert as_prompts("Q?") == ["Q?"] and as_prompts(["Q?", "R?"]) == ["Q?", "R?"]
    assert as_prompts(user("Q?")) == [user("Q?")] and as_prompts([]) == []
    assert as_prompts([user("Q?"), assistant("A"), user("R?")]) == [[user("Q?"), assistant("A"), user("R?")]]
    assert as_prompts([["Q?", "A", "R?"]]) == [["Q?", "A", "R?"]]
    conversation = build_conversation(CONFIG, "Q?")
    assert as_prompts(conversation) == [conversation]
    assert as_texts("star", "stop") == ("star",) and as_texts(iter(["a", "b"]), "stop") == ("a", "b")
    for wrong, message in (
        (5, "got int"),
        (b"x", "got bytes"),
        ({"a": 1}, "got dict"),
        ([1], r"stop\[0\]: expected a text"),
    ):
        with pytest.raises(ValueError, match=message):
            as_texts(wrong, "stop")
    assert as_turns("a").texts == ("a",)


def test_an_image_in_the_models_own_words_is_text():
    asked = ["What is it?", "It says <image> here.", "And <image>?"]
    assert prompt(["What is it?", "It says <image> here.", "And?"], 1).count("USER: <image>\nWhat is it?") == 1
    ids = prompt_ids(CONFIG, TOKENIZER, asked, PICTURE)
    before, after = prompt(asked, 1).rsplit("<image>", 1)
    assert ids == [*TOKENIZER.encode(before), -200, *TOKENIZER.encode(after)[1:]]
    assert prompt_ids(CONFIG, TOKENIZER, ["a", "<image><image>", "b"], []).count(-200) == 0
    answered = prompt_ids(CONFIG, TOKENIZER, "What is it?", PICTURE, answer="An <image>.")
    assert answered.count(-200) == 1
    assert answered[-len(TOKENIZER.encode("An <image>.")) + 1 :] == TOKENIZER.encode("An <image>.")[1:]


@pytest.mark.parametrize("mode", sorted(set(conv_templates) - {"plain", "v0_plain"}))
def test_an_answer_is_written_in_to_its_end(mode):
    asked = prompt_ids(CONFIG, TOKENIZER, "Hi", [], mode)
    for answer in ("s", "</", "#", "Yes", "a </s> b"):  # also those that the separator after it holds
        written = build_conversation(CONFIG, "Hi", 0, mode)
        whole = written.replace_last(written.roles[1], answer + "§").get_prompt()
        wanted = TOKENIZER.encode(whole[: whole.rindex("§")])
        assert prompt_ids(CONFIG, TOKENIZER, "Hi", [], mode, answer) == wanted
    assert prompt_ids(CONFIG, TOKENIZER, "Hi", [], mode, "") == asked


def test_the_models_context_bounds_a_prompt():
    words = TOKENIZER.encode("word ")[1:]
    fits = "word " * ((4096 - 200) // len(words))
    assert len(prompt_ids(CONFIG, TOKENIZER, fits, [])) <= 4096
    with pytest.raises(
        ValueError, match=r"\(\d+ of them images\) are more than this model's tokenizer_model_max_length=4096"
    ):
        prompt_ids(CONFIG, TOKENIZER, fits, PICTURE)
    older = CONFIG.replace(tokenizer_model_max_length=None)  # as a 1.5 may have it
    assert older.context_length == 2048
    with pytest.raises(ValueError, match="max_position_embeddings=2048; shorten it"):
        prompt_ids(older, TOKENIZER, fits, [])
    with pytest.raises(ValueError, match="max_position_embeddings=2048"):
        prompt_ids(older, TOKENIZER, "Hi", [], answer=fits)
    for kind, length in (("linear", 8192), ("dynamic", 8192), ("llama3", 2048)):
        stretched = older.replace(text=TextConfig(vocab_size=len(TOKENIZER), rope_scaling=RopeScaling(kind, 4.0)))
        assert stretched.context_length == length


def test_a_token_without_a_row_is_named():
    small = CONFIG.replace(text=TextConfig(vocab_size=40))
    with pytest.raises(ValueError, match=r"prompt, position \d+: \d+ is not in the embedding table, which has 40 rows"):
        prompt_ids(small, TOKENIZER, "Hello", [])
