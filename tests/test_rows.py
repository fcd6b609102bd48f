"""Rows that begin, go on, move and end at their own times: each has the tokens that its prompt has alone."""

from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace

import jax
import numpy as np
from test_pool import CHUNK, filled, images, model, prefilled, prompt

from llava_jax.inference import rows as device
from llava_jax.inference.generation_options import generation_options
from llava_jax.inference.requests import RowOptions
from llava_jax.inference.sampling import Greedy, Sample
from llava_jax.inputs.batch import pack
from llava_jax.inputs.groups import pack_questions

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

    def __init__(self, prefixes, shards=1, blocks=((3, 40), (2, 64)), int8=False):
        self.llava, self.params, _ = model()
        self.run, self.shards, config = programs(int8), shards, self.llava.config.text
        self.each = len(prefixes) // shards
        self.blocks = [device.empty_rows(config, len(prefixes), *block, np.float32) for block in blocks]
        self.pool, lengths = filled(len(prefixes), int8), []
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

    def admit(self, block, group, asked, rows, said=()):
        """`asked`, (question's ids, RowOptions, limit) each, as these rows."""
        questions = pack_questions([[ids for ids, _, _ in asked]], 1, len(asked))
        questions = type(questions)(*(self.lane(group, x[0], 0, x.dtype) for x in questions))
        settings = [device.row_settings(options, limit) for _, options, limit in asked]
        settings = jax.tree.map(lambda *x: np.stack([np.stack(x)] * self.shards), *settings)
        said_ids = np.broadcast_to(np.array([*said, -1], np.int32), (self.shards, len(asked), len(said) + 1))
        self.blocks[block], chosen = self.run.admit(
            self.params,
            self.pool,
            self.lane(group, self.lengths[group], 0),
            self.blocks[block],
            self.lane(group, group % self.each, self.each),
            self.lane(group, np.array(rows), 0),
            questions,
            settings,
            np.full((self.shards, len(asked)), len(said), np.int32),
            said_ids,
        )
        answers = [Answer() for _ in asked]
        self.answers |= {(block, group, row): answer for row, answer in zip(rows, answers, strict=True)}
        self.hear({(group // self.each, i): answer for i, answer in enumerate(answers)}, chosen)
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
        count = len(self.blocks)
        self.blocks, chosen, taken = self.run.decode(
            MAX_STEPS, self.params, [self.pool] * count, [self.lengths] * count, self.blocks, active, steps, leave_after
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


def run_of_answers(names, shards):
    """Answers of every kind, admitted while others are under way; rows are used again, and the cursors go round."""
    host = Host([(parts(name)[0], images(name)) for name in names], shards)
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
    check(run_of_answers(["two", "text"], 1))
