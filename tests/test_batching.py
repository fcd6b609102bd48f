"""Many questions on one image, conversations and scores: what one prompt at a time gives, for less work."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small import small_model

from llava_jax.config import LlavaConfig
from llava_jax.inference import text_requests
from llava_jax.inference.batch_shape import memory_bytes
from llava_jax.inference.batching import SHARE, plan
from llava_jax.inputs.anyres import num_image_tokens
from llava_jax.inputs.groups import (
    CacheLayout,
    Group,
    Prompt,
    common_length,
    group_prompts,
    pack_questions,
)
from llava_jax.inputs.tokenizer import tokenizer_image_token
from llava_jax.inputs.types import Batch, Questions
from llava_jax.models.llava_llama import param_bytes

OPTIONS = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture
def requests(pictures):
    return [
        (pictures["chelsea"], ["Is there a cat?", "Is there a dog?", "What colour is it? Be brief."]),
        (pictures["wide_1200x400"], ["Hi?"]),
        (None, ["Who are you?", "What can you do?"]),
        ([pictures["chelsea"], pictures["tiny_20x13"]], ["<image> or <image>?", "Is it <image> or <image>?"]),
        (pictures["astronaut"], ["Is there a cat?", ["Is there a cat?", "No.", "Why?"]]),
    ]


def given(programs, name, kind):
    """What of that kind each call of a program was given."""
    return [arg for called, args in programs if called == name for arg in args if isinstance(arg, kind)]


def one_by_one(llava, params, requests, **options):
    return [llava.generate(params, image, question, **options) for image, asked in requests for question in asked]


def test_a_batch_gives_the_answers_of_one_by_one(small, requests):
    llava, params = small
    assert llava.generate_batch(params, requests, **OPTIONS) == one_by_one(llava, params, requests, **OPTIONS)


@pytest.mark.long
def test_so_it_does_where_heads_share_their_keys(model, requests):
    llava, params = model("mistral")
    requests = requests[:1]
    assert llava.generate_batch(params, requests, **OPTIONS) == one_by_one(llava, params, requests, **OPTIONS)


def test_a_seed_gives_the_same_in_a_batch(small, requests):
    llava, params = small
    options = {**OPTIONS, "temperature": 1.0, "seed": 3}
    assert llava.generate_batch(params, requests[:1], **options) == one_by_one(llava, params, requests[:1], **options)


def test_each_image_is_prefilled_once_however_small_the_budget(small, requests, programs):
    llava, params = small

    def prefixes_and_questions():
        names = [name for name, _ in programs]
        return names.count("first chunk"), [one.active.size for one in given(programs, "admission", Questions)]

    wanted = llava.generate_batch(params, requests, **OPTIONS)  # of the shapes of the test above
    prefixes, questions = prefixes_and_questions()
    assert prefixes == 6 and sum(questions) >= 10 and len(questions) < 10
    programs.clear()
    assert llava.generate_batch(params, requests, memory_budget=1, **OPTIONS) == wanted
    assert prefixes_and_questions() == (6, [1] * 10)


def test_each_question_has_its_own_limit(small, requests):
    """Answers end at different times, and the next ones take their rows: more than there are rows for."""
    llava, params = small
    limits = [3, 7, 1, 8, 6, 5, 4, 2, 8, 6]  # room for 8, as in the test above
    answers = llava.generate_batch(params, requests, max_new_tokens=limits, memory_budget=1)
    asked = [(image, question) for image, questions in requests for question in questions]
    each = zip(asked, limits, strict=True)
    assert answers == [llava.generate(params, *one, max_new_tokens=limit) for one, limit in each]
    with pytest.raises(ValueError, match="max_new_tokens: 2 for 10 questions"):
        llava.generate_batch(params, requests, max_new_tokens=[3, 4])
    with pytest.raises(ValueError, match="max_new_tokens=0 must be"):
        llava.generate_batch(params, requests, max_new_tokens=[*limits[1:], 0])


def test_a_stop_string_ends_its_answer_in_a_batch(small, requests, programs):
    """And the row of that answer decodes no more."""
    llava, params = small
    requests, options = requests[:1], dict(max_new_tokens=100, temperature=1.0, seed=3)
    *others, whole = llava.generate_batch(params, requests, **options)
    pieces = (whole[i : i + 4] for i in range(5, len(whole)))
    stop = next(piece for piece in pieces if not any(piece in other for other in others))
    programs.clear()
    answers = llava.generate_batch(params, requests, stop=["not there", stop], **options)
    assert answers == [*others, whole[: whole.index(stop)].strip()]
    living = [args[5][0].tolist() for name, args in programs if name == "decoding"]
    assert living[0] == [[True] * 3] and living[-1] == [[True, True, False]]


def test_a_prompt_that_cannot_be_asked_is_an_error_of_its_row(small, pictures):
    llava, params = small
    asked = ["Is there a cat?", "word " * 5000, "<image> <image>?"]
    answers = llava.generate_batch(params, [(pictures["chelsea"], asked), (None, ["Hi"])], **OPTIONS)
    assert answers[0] == llava.generate(params, pictures["chelsea"], asked[0], **OPTIONS)
    assert answers[3] == llava.generate(params, None, "Hi", **OPTIONS)
    assert isinstance(answers[1], ValueError) and "question 1 (image 0, 'word word" in str(answers[1])
    assert "tokenizer_model_max_length=4096" in str(answers[1])
    assert isinstance(answers[2], ValueError) and "question 2" in str(answers[2])
    assert all(isinstance(x, ValueError) for x in llava.generate_batch(params, [(None, asked[1:])], **OPTIONS))


def test_a_picture_that_cannot_be_read_is_an_error_of_its_questions(small, pictures):
    llava, params = small
    lost = [("nowhere.png", ["A?", "B?"]), ([pictures["chelsea"], b"no picture"], ["C?"])]
    answers = llava.generate_batch(params, [lost[0], (None, ["Hi"]), lost[1]], **OPTIONS)
    assert answers[2] == llava.generate(params, None, "Hi", **OPTIONS)
    for answer, place, problem in (
        (answers[0], "question 0 (image 0, 'A?')", "image 'nowhere.png': no such file"),
        (answers[1], "question 1 (image 0, 'B?')", "image 'nowhere.png': no such file"),
        (answers[3], "question 3 (image 2, 'C?')", "image: 10 bytes is not a picture"),
    ):
        assert type(answer) is ValueError and str(answer).startswith(f"{place}: {problem}")
    assert all(isinstance(answer, ValueError) for answer in llava.generate_batch(params, lost, **OPTIONS))


def test_a_chat_is_the_conversation_asked_at_once(small, pictures, programs):
    llava, params = small
    chat = llava.chat(params, pictures["chelsea"], **OPTIONS)
    for question in ("Is there a cat?", "Where is it, and what does it do there?", "Why? " * 6):
        before = list(chat.turns)
        wanted = llava.generate(params, pictures["chelsea"], [*before, question], **OPTIONS)
        assert chat.send(question) == wanted
        assert chat.turns == [*before, question, wanted]
    asked = [int(questions.lengths[0, 0]) for questions in given(programs, "first token", Questions)]
    assert len(given(programs, "prefill", Batch)) == 1 and asked[0] == 1 and max(asked) < 60


def test_a_chat_goes_on_after_an_answer_that_was_not_read_to_its_end(small):
    llava, params = small
    chat = llava.chat(params, max_new_tokens=30)
    stream = chat.stream("Who are you?")
    cut = next(stream)
    stream.close()
    assert chat.turns == ["Who are you?", cut.strip()]
    assert chat.send("And now?", **OPTIONS) == llava.generate(params, None, [*chat.turns[:2], "And now?"], **OPTIONS)


def test_scores_are_the_log_likelihoods_of_the_forward_pass(small, pictures):
    llava, params = small
    candidates = ["Yes", "No", "Perhaps, but I doubt it"]
    scores = llava.score(params, pictures["chelsea"], "Is there a cat?", candidates)
    prompt = llava.conversation("Is there a cat?", 1).get_prompt()
    start = len(tokenizer_image_token(prompt, llava.tokenizer))
    for score, candidate in zip(scores, candidates, strict=True):
        ids = tokenizer_image_token(f"{prompt} {candidate}", llava.tokenizer)
        logprobs = jax.nn.log_softmax(llava.forward(params, [ids], pictures["chelsea"]).logits[0], axis=-1)
        answer = ids[start:]
        wanted = sum(logprobs[-1 - len(answer) + i, token] for i, token in enumerate(answer))
        assert score == pytest.approx(float(wanted), abs=1e-3)


def test_groups_share_what_the_ids_share():
    rows = [np.array(row) for row in ([1, -200, 5, 6, 7], [1, -200, 5, 9], [1, -200, 5])]
    assert common_length(rows) == 3
    config, size = LlavaConfig.preset("1.6-vicuna-7b"), (336, 672)
    (group,) = group_prompts(list(map(Prompt, "abc", rows)), "picture", [size], config)
    assert group.prefix.tolist() == [1, -200] and group.questions == ("a", "b", "c") and group.images == "picture"
    assert [q.tolist() for q in group.suffixes] == [[5, 6, 7], [5, 9], [5]]
    assert group.prefix_length == 1 + num_image_tokens(*size, config)
    two = [Prompt("a", np.array([1, 7, -200, 5])), Prompt("b", np.array([1, 8, -200, 5]))]
    apart = group_prompts(two, "picture", [size], config)
    assert [g.prefix.tolist() for g in apart] == [[1, 7, -200], [1, 8, -200]]
    packed = pack_questions([[np.array([5, 6, 7])], []], 2, 3)
    assert packed.ids.shape == (2, 3, 3) and packed.active.tolist() == [[True, False, False], [False] * 3]


def planned(config, layout, groups, output_capacity, budget, limit=lambda question: 1):
    """Phases, of an engine of which only its configuration and layout are asked."""
    engine = SimpleNamespace(config=config, cache_layout=lambda params: layout)
    return plan(engine, None, groups, output_capacity, budget, limit)


def test_phases_hold_every_group_once_within_the_budget():
    config, rng = LlavaConfig.preset("1.6-vicuna-7b"), np.random.default_rng(0)
    groups, lengths, layout = [], rng.integers(20, 2990, 40), CacheLayout(itemsize=2)
    for n in range(40):
        rows = [np.arange(rng.integers(2, 30)) for _ in range(rng.integers(1, 40))]
        prompts = [Prompt(row, np.concatenate([[1, 2, 50 + n], row])) for row in rows]
        (group,) = group_prompts(prompts, n, [], config)
        groups.append(replace(group, prefix_length=int(lengths[n])))
    for budget in (1, 4 << 30, 40 << 30):
        phases = planned(config, layout, groups, 32, budget)
        assert sorted(group.images for phase in phases for group in phase.groups) == list(range(40))
        for phase in phases:
            shape, lengths_from = phase.shape, 0
            assert memory_bytes(shape, config, layout) <= budget or (shape.per_shard, shape.admitted) == (1, 1)
            for pool in shape.pools:
                own = [group for group in phase.groups if lengths_from < group.prefix_length <= pool.capacity]
                assert all(pool.capacity / 3 < group.prefix_length for group in own)
                counts = [len(group.questions) for group in own]
                assert counts == sorted(counts, reverse=True)
                lengths_from = pool.capacity
    assert max(phase.shape.per_shard for phase in phases) > 1


def test_what_is_shorter_decodes_beside_the_rest_where_that_is_faster():
    """Texts and pictures; where there is no room for both; and where eight texts would give one picture seven slots
    that nobody needs, for as long as its answer takes."""
    config, layout = LlavaConfig.preset("1.6-vicuna-7b"), CacheLayout(itemsize=2)

    def group(name, length):
        return Group(np.zeros(1), (np.zeros(30),), (name,), name, length)

    texts, pictures = [group("text", 40)] * 32, [group("picture", 2928)] * 16
    (phase,) = planned(config, layout, [*texts, *pictures], 64, 1 << 50)
    assert [pool.capacity for pool in phase.shape.pools] == [64, 3072] and phase.shape.per_shard == 8
    begun = [group.images for group in phase.groups]
    assert sorted(begun) == ["picture"] * 16 + ["text"] * 32 and begun[:24].count("text") == 16
    tight = memory_bytes(phase.shape, config, layout) - 1
    apart = planned(config, layout, [*texts, *pictures], 64, tight)
    assert [[pool.capacity for pool in phase.shape.pools] for phase in apart] == [[3072], [64]]
    lengths = {"picture": 256, "text": 2}
    apart = planned(config, layout, [*texts[:8], pictures[0]], 256, 1 << 50, lengths.__getitem__)
    assert [phase.shape.per_shard for phase in apart] == [1, 8]


def test_rows_are_as_many_as_are_soonest_done():
    """As many as all have; where one has more than others, no more than keep it from being the last."""
    config, layout = LlavaConfig.preset("1.6-vicuna-7b"), CacheLayout(itemsize=2, keeps_scores=False)

    def rows(*counts):
        groups = [Group(np.zeros(1), (np.zeros(30),) * n, tuple(range(n)), "picture", 2928) for n in counts]
        (phase,) = planned(config, layout, groups, 128, 1 << 50)
        return phase.shape.per_shard, phase.shape.admitted

    assert rows(*[18] * 8) == (8, 20) and rows(1) == (1, 1) and rows(*[1] * 30) == (8, 1)
    per_shard, admitted = rows(100, *[1] * 100)
    assert per_shard == 8 and 1 < admitted < 20


def test_rows_are_as_many_as_the_answers_lengths_need():
    """One answer is so long that the others of its picture end before it in one more row."""
    config, layout, lengths = LlavaConfig.preset("1.6-vicuna-7b"), CacheLayout(itemsize=2), (256, 8, 16, 32, 64, 128)
    group = Group(np.zeros(1), (np.zeros(30),) * 6, tuple(range(6)), "picture", 2928)
    phases = [
        planned(config, layout, [group] * 8, 256, 1 << 50, limit) for limit in (lambda _: 256, lengths.__getitem__)
    ]
    assert [phase.shape.admitted for (phase,) in phases] == [6, 2]


def test_all_questions_of_a_pope_picture_go_at_once_on_an_h100():
    """A 7B in bfloat16, in the three quarters of 80 GB that JAX takes; 18 questions on each of 8 pictures."""
    config, layout = LlavaConfig.preset("1.6-vicuna-7b"), CacheLayout(itemsize=2, keeps_scores=False)
    group = Group(np.zeros(1), (np.zeros(30),) * 18, tuple(range(18)), "picture", 2928)
    budget = int(SHARE * (0.75 * 84.9e9 - param_bytes(config, 2)))
    (phase,) = planned(config, layout, [group] * 8, 128, budget)
    assert (phase.shape.per_shard, phase.shape.admitted) == (8, 20)


def test_one_text_is_one_where_a_list_is_meant(small, pictures):
    llava, params = small
    question = "Is there a cat?"
    wanted = llava.generate(params, pictures["chelsea"], question, **OPTIONS)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    for asked in (question, [question], message, [message]):
        assert llava.generate_batch(params, [(pictures["chelsea"], asked)], **OPTIONS) == [wanted]
    assert llava.score(params, None, question, "Yes") == llava.score(params, None, question, ["Yes"])
    assert llava.score(params, None, question, []).shape == (0,)


def test_half_a_character_costs_its_own_question(small):
    llava, params = small
    bad, answer = llava.generate_batch(params, [(None, ["a\udc80", "Hi"])], **OPTIONS)
    assert isinstance(bad, ValueError) and "prompt: has '\\udc80'" in str(bad) and str(bad).isprintable()
    assert answer == llava.generate(params, None, "Hi", **OPTIONS)
    with pytest.raises(ValueError, match=r"candidates\[1\]: has '\\ud800'"):
        llava.score(params, None, "Hi", ["Yes", "\ud800"])


def test_a_candidate_whose_first_letter_joins_the_prompts_last_counts_whole(small, monkeypatch):
    """Its tokens are another row's than the prompt's from the prompt's last on: those all count."""
    llava, params = small
    prompt = llava.prompt_ids("Hi", [])
    rows = {"joined": [*prompt[:-1], 77, 78], "apart": [*prompt, 79]}
    monkeypatch.setattr(text_requests, "prompt_ids", lambda *args: rows[args[-1]])
    scores = llava.score(params, None, "Hi", list(rows))
    for score, ids, answer in zip(scores, rows.values(), ([77, 78], [79]), strict=True):
        logprobs = jax.nn.log_softmax(llava.forward(params, [ids]).logits[0], axis=-1)
        first = len(ids) - len(answer)
        wanted = sum(logprobs[first - 1 + i, token] for i, token in enumerate(answer))
        assert score == pytest.approx(float(wanted), abs=1e-3)


def test_a_candidate_that_is_too_long_is_refused(small):
    llava, params = small
    with pytest.raises(ValueError, match=r"candidates\[1\] \('word word.*tokenizer_model_max_length=4096"):
        llava.score(params, None, "Hi", ["Yes", "word " * 5000])


def test_a_candidate_ends_where_it_ends(small):
    llava, params = small
    prompt = llava.conversation("Hi", 0).get_prompt()
    start = len(tokenizer_image_token(prompt, llava.tokenizer))
    (score,) = llava.score(params, None, "Hi", "#")  # the separator after it, ###, begins like it
    ids = tokenizer_image_token(f"{prompt} #", llava.tokenizer)
    logprobs = jax.nn.log_softmax(llava.forward(params, [ids]).logits[0], axis=-1)
    wanted = sum(logprobs[start - 1 + i, token] for i, token in enumerate(ids[start:]))
    assert score == pytest.approx(float(wanted), abs=1e-3)


def test_a_question_that_cannot_be_asked_leaves_the_conversation_as_it_was(small):
    llava, params = small
    chat, plain = llava.chat(params, None, **OPTIONS), llava.chat(params, None, **OPTIONS)
    assert chat.send("Hi") == plain.send("Hi")
    wrong = [("a\ud800", {}), ("word " * 5000, {}), ("<image>?", {}), (7, {}), (["a", "b"], {})]
    wrong += [("And?", {"temperature": -1}), ("And?", {"stop": 5}), ("And?", {"max_new_tokens": 0})]
    for question, options in wrong:
        before = list(chat.turns)
        with pytest.raises(ValueError):
            chat.send(question, **options)
        assert chat.turns == before
    assert chat.send({"role": "user", "content": "And?"}) == plain.send("And?")
    assert chat.turns == plain.turns


def test_an_image_that_the_model_speaks_of_does_not_move_the_picture(small, pictures):
    llava, params = small
    chat = llava.chat(params, pictures["chelsea"], **OPTIONS)
    chat.send("Is there a cat?")
    chat.turns[1] = "Yes, in <image>."
    prompt = llava.prompt_ids([*chat.turns, "Where?"], chat.sizes)
    assert prompt.count(-200) == 1 and prompt.index(-200) == llava.prompt_ids("Is there a cat?", chat.sizes).index(-200)
    assert chat.send("Where?") == llava.generate(params, pictures["chelsea"], chat.turns[:3], **OPTIONS)
