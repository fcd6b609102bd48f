"""Rows that begin, go on, move and end at their own times: each has the tokens that its prompt has alone."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pool import CHUNK, filled, images, model, prefilled, prompt

from llava_jax.inference import rows as device
from llava_jax.inference.cache import Prefix
from llava_jax.inference.generation_options import generation_options
from llava_jax.inference.requests import RowOptions
from llava_jax.inference.sampling import Greedy, Sample
from llava_jax.inputs.batch import pack
from llava_jax.inputs.groups import pack_questions
from llava_jax.inputs.types import Questions

ROOT = Path(__file__).resolve().parents[1]
NEVER = 1 << 20
MAX_STEPS = 6


@cache
def programs(int8=False):
    llava, _, int8_engine = model()
    of = (int8_engine if int8 else llava.engine).model
    return SimpleNamespace(
        admit=jax.jit(partial(device.admit, of), donate_argnums=3),
        decode=jax.jit(partial(device.decode, of), static_argnums=0, donate_argnums=4),
        move=jax.jit(device.move, static_argnums=2, donate_argnums=(0, 1)),
        score=jax.jit(partial(device.score, of), static_argnums=2),
    )


@dataclass
class Answer:
    """Tokens that a row has said, and what was told of them."""

    tokens: list = field(default_factory=list)
    told: list = field(default_factory=list)


class Host:
    """The least that a host does: one prefix a slot, and it knows which answer a row gives."""

    def __init__(self, prefixes, shards=1, blocks=((3, 40), (2, 64)), int8=False, place=lambda tree: tree):
        self.llava, self.params, _ = model()
        self.run, self.shards, config = programs(int8), shards, self.llava.config.text
        self.each = len(prefixes) // shards
        self.blocks = [place(device.empty_rows(config, len(prefixes), *block, np.float32)) for block in blocks]
        self.pool, lengths = place(filled(len(prefixes), int8)), []
        for g, prefix in enumerate(prefixes):
            lanes, slots = [None] * shards, [self.each] * shards
            lanes[g // self.each], slots[g // self.each] = prefix, g % self.each
            self.pool, of_lanes = prefilled(self.pool, self.params, lanes, slots, CHUNK, int8)
            lengths.append(of_lanes[g // self.each])
        self.lengths = np.array(lengths, np.int32)
        self.answers = {}  # (block, group, row) → Answer

    def lane(self, group, value, other, dtype=np.int32):
        """[B, ...]: `value` in the group's shard, `other` in the rest."""
        out = np.stack([np.full_like(value, other, dtype=dtype)] * self.shards)
        out[group // self.each] = value
        return out

    def admit(self, block, group, asked, rows, said=(), active=True, slot=None):
        """`asked`, (question's ids, RowOptions, limit) each, as these rows."""
        questions = pack_questions([[ids for ids, _, _ in asked]], 1, len(asked))
        questions = Questions(*(self.lane(group, x[0], 0, x.dtype) for x in questions))
        questions = questions._replace(active=questions.active & active)
        settings = [device.row_settings(options, limit) for _, options, limit in asked]
        settings = jax.tree.map(lambda *x: np.stack([np.stack(x)] * self.shards), *settings)
        said_ids = np.broadcast_to(np.array([*said, -1], np.int32), (self.shards, len(asked), len(said) + 1))
        self.blocks[block], chosen = self.run.admit(
            self.params,
            self.pool,
            self.lane(group, self.lengths[group], 0),
            self.blocks[block],
            self.lane(group, group % self.each if slot is None else slot, self.each),
            self.lane(group, np.array(rows), 0),
            questions,
            settings,
            np.full((self.shards, len(asked)), len(said), np.int32),
            said_ids,
        )
        answers = [Answer() for _ in asked]
        self.hear({(group // self.each, i): answer for i, answer in enumerate(answers)}, chosen)
        began = (pair for pair in zip(rows, answers, strict=True) if pair[1].tokens)
        self.answers |= {(block, group, row): answer for row, answer in began}
        assert (np.delete(chosen.tokens, group // self.each, axis=0) == device.NOT_LIVING).all()
        return answers

    def hear(self, answers, chosen):
        for place, answer in answers.items():
            told = jax.tree.map(lambda x, place=place: np.asarray(x)[place], chosen)
            if told.tokens != device.NOT_LIVING:
                answer.tokens.append(int(told.tokens))
                answer.told.append(told)

    def decode(self, steps, leave_after=NEVER, active=None):
        active = active or [np.ones(block.done.shape, bool) for block in self.blocks]
        self.blocks, chosen, taken = self.run.decode(
            MAX_STEPS, self.params, [self.pool], [self.lengths], [self.blocks], active, steps, leave_after
        )
        ends = [0, *np.cumsum([block.done.shape[1] for block in self.blocks])]
        for step in range(int(taken)):
            places = {(g, ends[block] + row): answer for (block, g, row), answer in self.answers.items()}
            self.hear(places, jax.tree.map(lambda x, step=step: x[step], chosen))
        assert (np.asarray(chosen.tokens)[int(taken) :] == device.NOT_LIVING).all()
        return int(taken)

    def move(self, group, source, target, limit):
        self.blocks = list(
            self.run.move(
                *self.blocks,
                self.shards,
                self.lane(group, group % self.each, self.each),
                self.lane(group, source, 0),
                self.lane(group, target, 0),
                self.lane(group, limit, 1),
            )
        )
        self.answers[1, group, target] = self.answers.pop((0, group, source))

    def living(self):
        return [np.argwhere(~np.asarray(block.done)).tolist() for block in self.blocks]


TEXTS = ("What is it?", "What is this here, do you think?", "Who is this?")


@cache
def parts(name):
    """(shared ids of the prompts, each TEXT's own ids)"""
    prompts = [prompt(name, text) for text in TEXTS]
    shared = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    return prompts[0][:shared], [ids[shared:] for ids in prompts]


@cache
def alone(name, text, sampling, count):
    llava, params, _ = model()
    options = generation_options(llava.config.generation, count, sampling=sampling)
    return llava.engine.generate(params, pack([prompt(name, TEXTS[text])], images(name), llava.config), options)[0]


def wanted(name, text, options):
    """What the prompt says alone, up to where it ends."""
    tokens = alone(name, text, options.sampling, 48)[: options.max_new_tokens].tolist()
    ends = (i for i, token in enumerate(tokens) if token in options.end_ids)
    return tokens[: next(ends, len(tokens)) + 1]


def options(count=30, sampling=None, **others):
    ends = tuple(model()[0].config.generation.eos_token_ids)
    return RowOptions(count, others.pop("end_ids", ends), sampling or Greedy(), **others)


def check(said):
    """[(answer, name, text, options)]"""
    for answer, name, text, asked in said:
        assert answer.tokens == wanted(name, text, asked), (name, text, asked)


WARM = Sample(temperature=1.3, top_k=0, seed=7)
PENALIZED = Sample(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.7, seed=3)


def run_of_answers(names, shards, **others):
    """Answers of every kind, admitted while others are under way; rows are used again, and the cursors go round."""
    host = Host([(parts(name)[0], images(name)) for name in names], shards, **others)
    said = []

    def ask(block, group, row, text, asked, limit=NEVER):
        name = names[group]
        (answer,) = host.admit(block, group, [(parts(name)[1][text], asked, min(limit, asked.max_new_tokens))], [row])
        said.append((answer, name, text, asked))
        return answer

    ask(0, 0, 0, 0, options(20))
    ask(0, 1, 1, 1, options(25, WARM))
    host.decode(4)
    outgrown = ask(0, 1, 2, 2, options(45), limit=12)
    ask(1, 0, 1, 1, options(40, PENALIZED))
    host.decode(5)
    ask(0, 0, 2, 2, options(3))
    while len(outgrown.tokens) < 12:
        host.decode(MAX_STEPS, leave_after=1)
    host.move(1, 2, 0, 45)
    ask(0, 0, 2, 1, options(22, PENALIZED))  # the place of one that ended
    ask(0, 1, 2, 0, options(26))  # the place of the one that moved
    for _ in range(4):
        host.decode(MAX_STEPS)
    ask(0, 0, 0, 2, options(28, WARM))
    while any(host.living()):
        host.decode(MAX_STEPS)
    assert [int(block.cursor) for block in host.blocks] != [0, 0]
    return said


def test_answers_at_different_times():
    check(run_of_answers(["five tiles", "text"], 1))


@pytest.mark.long
def test_prefixes_divided_among_shards():
    check(run_of_answers(["two", "five tiles", "text", "five tiles"], 2))


MESH = """
import sys
sys.path.insert(0, "tests")
import conftest, jax, test_rows
from llava_jax.parallel.sharding import batch_sharding, make_mesh
mesh = make_mesh(data=2)
with jax.set_mesh(mesh):
    place = lambda tree: jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)) if x.ndim else x, tree)
    test_rows.check(test_rows.run_of_answers(["two", "text"], 2, place=place))
"""


@pytest.mark.long
def test_shards_on_devices_of_their_own():
    flags = {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", MESH], env={**os.environ, **flags}, cwd=ROOT, check=True)


def text_host():
    return Host([(parts("text")[0], [])])


def next_logits(ids, tokens):
    """float32 [len(tokens), V]: the logits that each token was chosen from."""
    llava, params, _ = model()
    batch = pack([np.concatenate([ids, tokens])], [], llava.config)
    logits = np.asarray(llava.engine.forward(params, batch).logits[0])
    return logits[len(ids) - 1 : len(ids) - 1 + len(tokens)]


def test_log_probabilities_are_of_the_raw_logits():
    host, (_, questions) = text_host(), parts("text")
    likeliest = wanted("text", 1, options(1))  # it may not end the answer yet, and is told of all the same
    asked = [options(9, PENALIZED, top_logprobs=3), options(9, end_ids=(*likeliest,), min_new_tokens=9, top_logprobs=0)]
    quiet = host.admit(1, 0, [(questions[2], options(9), 9)], [1])
    while any(host.living()):
        host.decode(MAX_STEPS)
    answers = host.admit(0, 0, [(questions[i], asked[i], 9) for i in (0, 1)], [2, 0])
    while any(host.living()):
        host.decode(MAX_STEPS)
    for text, answer in enumerate(answers):
        logits = next_logits(prompt("text", TEXTS[text]), answer.tokens)
        expected = np.asarray(jax.nn.log_softmax(logits))
        for token, told, row in zip(answer.tokens, answer.told, expected, strict=True):
            np.testing.assert_allclose(told.logprobs, row[token], atol=2e-5)
            np.testing.assert_allclose(told.top_logprobs, np.sort(row)[::-1][: len(told.top_ids)], atol=2e-5)
            np.testing.assert_allclose(row[told.top_ids], told.top_logprobs, atol=2e-5)
    assert answers[0].tokens == wanted("text", 0, asked[0]) and answers[1].tokens[0] != likeliest[0]
    assert quiet[0].tokens == wanted("text", 2, options(9)) and not any(told.logprobs for told in quiet[0].told)


def test_the_tokens_that_end_an_answer_are_not_among_its_first():
    host, (_, questions) = text_host(), parts("text")
    plain = wanted("text", 0, options(20))
    ends = tuple(plain[i] for i in (0, 3))
    cases = [options(20, end_ids=ends), options(20, end_ids=ends[1:]), options(20, end_ids=ends, min_new_tokens=5)]
    answers = host.admit(0, 0, [(questions[0], asked, 20) for asked in cases], [0, 1, 2])
    while any(host.living()):
        host.decode(MAX_STEPS)
    assert answers[0].tokens == plain[:1] and answers[1].tokens == plain[: plain.index(ends[1]) + 1]
    tokens = answers[2].tokens
    logits = next_logits(prompt("text", TEXTS[0]), tokens).copy()
    logits[:5, ends] = -np.inf
    assert np.argmax(logits, -1).tolist() == tokens
    assert not set(tokens[:5]) & set(ends) and (tokens[-1] in ends or len(tokens) == 20)


@pytest.mark.parametrize("sampling", [Greedy(), PENALIZED])
def test_an_answer_goes_on_where_it_was_left(sampling):
    host, (_, questions) = text_host(), parts("text")
    asked = options(12, sampling, end_ids=())
    before = wanted("text", 0, asked)[:5]
    (answer,) = host.admit(0, 0, [(np.concatenate([questions[0], before]), asked, 12)], [1], said=before)
    host.decode(MAX_STEPS)
    host.decode(MAX_STEPS)
    assert before + answer.tokens == wanted("text", 0, asked)


def test_the_loop_leaves_when_it_is_told_to():
    host, (_, questions) = text_host(), parts("text")
    asked = [(questions[i], options(end_ids=()), limit) for i, limit in enumerate((4, 6, 20))]
    host.admit(0, 0, asked, [0, 1, 2])
    assert host.decode(2) == 2
    assert host.decode(MAX_STEPS, leave_after=1) == 1 and host.living()[0] == [[0, 1], [0, 2]]
    assert host.decode(MAX_STEPS, leave_after=2) == MAX_STEPS
    assert host.decode(MAX_STEPS, leave_after=2) == MAX_STEPS
    assert host.decode(MAX_STEPS) == 4 and host.decode(MAX_STEPS) == 0


def test_what_has_nothing_to_do_stays_as_it_is():
    """A question that is not active, a slot out of range, a row that is not active."""
    host, (_, questions) = text_host(), parts("text")
    (answer,) = host.admit(0, 0, [(questions[0], options(end_ids=()), 20)], [1])
    host.decode(3)
    before = [jax.tree.map(np.array, block) for block in host.blocks]
    nothing = [(ids, options(), 5) for ids in questions[:2]]
    for slot, rows, active in ((1, [0, 1], True), (0, [0, 1], False), (0, [3, 4], True)):
        assert not any(answer.tokens for answer in host.admit(0, 0, nothing, rows, active=active, slot=slot))
    for old, block in zip(before, host.blocks, strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, old, jax.tree.map(np.array, block)))
    (other,) = host.admit(1, 0, [(questions[1], options(end_ids=()), 20)], [0])
    old = jax.tree.map(np.array, host.blocks[0])
    host.decode(2, active=[np.zeros((1, 3), bool), np.ones((1, 2), bool)])
    assert len(answer.tokens) == 4 and len(other.tokens) == 3
    new = jax.tree.map(np.array, host.blocks[0])
    for name in ("token", "position", "step", "done", "said"):
        assert np.array_equal(getattr(new, name), getattr(old, name))
    assert np.array_equal(new.suffix.valid, old.suffix.valid)
    host.decode(MAX_STEPS)
    assert answer.tokens == wanted("text", 0, options(10, end_ids=()))


def test_questions_end_at_the_cursor():
    """Wherever it is: a ring may go round within a question. Several rows of several lengths, in any order."""
    host, (_, questions) = text_host(), parts("text")
    slots, rows, asked = 40, [2, 0], [(questions[i], options(5), 5) for i in (1, 0)]
    first = {}
    for cursor in (slots - 1, len(questions[1]), 3, 0):
        host.blocks[0] = replace(host.blocks[0], cursor=jnp.int32(cursor))
        before = jax.tree.map(np.array, host.blocks[0])
        host.admit(0, 0, asked, rows)
        after = jax.tree.map(np.array, host.blocks[0])
        assert np.array_equal(after.suffix.valid[:, 1], before.suffix.valid[:, 1])
        for row, (ids, _, _) in zip(rows, asked, strict=True):
            at = np.arange(cursor - len(ids), cursor) % slots
            assert sorted(at) == np.flatnonzero(after.suffix.valid[0, row]).tolist()
            keys_values = [x[0, :, row, at] for x in jax.tree.leaves(after.suffix.keys_values)]
            assert all(map(np.array_equal, keys_values, first.setdefault(row, keys_values)))
        for old, new in zip(*map(jax.tree.leaves, (before.suffix.keys_values, after.suffix.keys_values)), strict=True):
            assert np.array_equal(old[:, :, 1], new[:, :, 1])


@pytest.mark.parametrize(("groups", "rows"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_cpu_copies_no_suffix(groups, rows):
    """Neither at each step nor around the loop, where an axis of it has one element or none has. 1 s each."""
    slots, config, (_, params, _) = 29, model()[0].config.text, model()
    block, pool = device.empty_rows(config, groups, rows, slots, np.float32), filled(groups)
    arguments = [pool], [np.ones(groups, np.int32)], [[block]], [np.ones((groups, rows), bool)], 1, 1
    compiled = programs().decode.lower(MAX_STEPS, params, *arguments).compile()
    copied = re.findall(r"= f32\[([0-9,]*)\]\S* copy\(", compiled.as_text())
    assert copied and not [shape for shape in copied if f",{slots},{config.head_dim}" in shape]


@pytest.mark.long
def test_an_int8_prefix():
    """As the engine has it, from the same prefix."""
    llava, params, engine = model()
    shared, questions = parts("five tiles")
    host = Host([(shared, images("five tiles"))], int8=True)
    answers = host.admit(0, 0, [(ids, options(16, end_ids=()), 16) for ids in questions], [0, 1, 2])
    while any(host.living()):
        host.decode(MAX_STEPS)
    prefix = Prefix(host.pool, host.lengths)
    packed, asked = pack_questions([questions], 1, 3), generation_options(llava.config.generation, 16)
    state = engine.sample_first_token(params, prefix, packed, asked)
    expected = np.asarray(engine.decode(params, prefix, state, asked, 16).tokens)[0, :, :16]
    for answer, row in zip(answers, expected, strict=True):
        ends = np.flatnonzero(row == model()[0].config.generation.eos_token_ids[0])
        count = ends[0] + 1 if len(ends) else 16
        assert answer.tokens[:count] == row[:count].tolist()


def test_scores():
    host, (shared, questions) = text_host(), parts("text")
    packed = pack_questions([questions], 1, 3)
    got = host.run.score(host.params, host.pool, 1, host.lengths, np.zeros(1, np.int32), packed)
    for row, likeliest, ids in zip(got.logprobs[0], got.likeliest[0], questions, strict=True):
        logits = next_logits(np.concatenate([shared, ids[:1]]), ids[1:])
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(row[: len(ids) - 1], expected, atol=2e-5)
        assert likeliest[: len(ids) - 1].tolist() == (np.argmax(logits, axis=-1) == ids[1:]).tolist()
