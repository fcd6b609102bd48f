"""The host's side of a continuous batch, with a device that only counts: who gets what, and that all comes back."""

import random
from collections import Counter

import numpy as np
import pytest
from small import small_model

from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.batch_shape import BatchShape, Block, PoolShape, RowClass
from llava_jax.inference.prefix_table import PrefixTable, prefix_key
from llava_jax.inference.requests import Finish, Request, RowOptions, ScoreRequest, SplitPrompt, Token
from llava_jax.inference.scheduler import Admission, Scheduler, Scoring
from llava_jax.inputs.types import ProcessedImage

END = 2


@pytest.fixture(scope="module")
def config():
    return small_model()[0].config


@pytest.fixture(scope="module")
def pictures(config):
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 256, (3, config.tile_size, config.tile_size, 3), np.uint8) for _ in range(3)]
    return [ProcessedImage(some, (336, 672)) for some in tiles]


def shape(shards=1, per_shard=2, chunk=512, rows=2, question=8):
    classes = RowClass(rows, 16), RowClass(1, 64)
    pools = PoolShape(512, classes), PoolShape(2560, classes)
    return BatchShape(shards, per_shard, pools, question, 4, 8, chunk, max_model_len=2560)


def prompt(ids, shared, images=()):
    return SplitPrompt(np.array(ids, np.int64), shared, images)


def key(config, count, first=100, images=()):
    ids = [first + i for i in range(count)] + [IMAGE_TOKEN_INDEX] * len(images)
    return prefix_key(prompt([*ids, 5], len(ids), images), config)


def test_a_prefix_is_known_by_its_ids_and_pixels(config, pictures):
    one, same, other = (key(config, 3, images=[picture]) for picture in (pictures[0], pictures[0], pictures[1]))
    assert one.shared_with(same) == len(one.elements) == 5
    assert other.shared_with(one) in (3, 4)
    assert other.positions_of(other.shared_with(one)) == 3
    assert one.length > 3 + 576


def test_slots_are_shared_counted_and_given_up_by_age(config):
    table = PrefixTable(1, 2, [2, 1], grows=True)
    a, b, c = (key(config, 200, first) for first in (1000, 2000, 3000))
    first = table.take(a)
    assert (first.start, first.complete, first.slot.ready) == (0, False, False)
    again = table.take(a)
    assert again.slot is first.slot and again.complete and first.slot.users == 2
    second = table.take(b)
    assert second.slot is not first.slot and table.take(c) is None and table.used() == 2
    first.slot.ready = second.slot.ready = True
    table.release(second.slot)
    table.release(first.slot)
    table.release(first.slot)
    assert table.take(b).complete and table.take(a).complete  # what nobody uses stays
    table.release(second.slot)
    table.release(first.slot)
    assert table.take(c).slot is second.slot  # released first


def test_a_prefix_goes_on_from_another(config):
    table = PrefixTable(1, 2, [1], grows=True)
    short, long = key(config, 200), key(config, 300)
    slot = table.take(short).slot
    assert table.take(long) is None  # what it could go on from is not there yet
    slot.ready = True
    copied = table.take(long)
    assert (copied.source, copied.start) == (slot, 200) and copied.slot is not slot
    table.release(copied.slot)
    copied.slot.ready = True
    table.release(slot)
    longest = table.take(key(config, 400))
    assert (longest.slot, longest.start, longest.source) == (copied.slot, 300, None)  # in place
    table.release(longest.slot)
    longest.slot.ready = True
    assert table.take(short).slot is slot


def test_a_prefix_is_cut_down_to_a_shorter_one(config):
    for grows in (True, False):
        table = PrefixTable(1, 1, [1], grows)
        slot = table.take(key(config, 300)).slot
        slot.ready = True
        table.release(slot)
        found = table.take(key(config, 200))
        assert found.complete and found.slot.ready and found.slot.length == 200


def test_a_small_pool_does_not_copy(config):
    table = PrefixTable(1, 2, [1], grows=False)
    slot = table.take(key(config, 200)).slot
    slot.ready = True
    found = table.take(key(config, 300))
    assert (found.start, found.source) == (0, None) and found.slot is not slot
    other = PrefixTable(1, 2, [1], grows=False)
    other.take(key(config, 200)).slot.ready = True
    assert other.take(key(config, 200)).source is None  # its only row is taken: once more, from the start


def test_where_all_is_known_a_prefix_is_prefilled_once(config):
    """Its users wait for its rows, however many they are."""
    table = PrefixTable(1, 2, [1], grows=False, once=True)
    slot = table.take(key(config, 200)).slot
    assert all(table.take(key(config, 200)).slot is slot for _ in range(5)) and slot.users == 6


class Device:
    """Does at once what it is told, and checks that it may."""

    def __init__(self, scheduler):
        self.scheduler, self.rows, self.log = scheduler, {}, Counter()

    def step(self, answer):
        """One round; `answer(active, n)` is its nth token."""
        scheduler = self.scheduler
        while (fill := scheduler.next_fill()) is not None:
            for lane in filter(None, fill.lanes):
                assert (not lane.slot.ready and lane.start < lane.slot.length) or lane.source
                self.log["filled"] += 1
            scheduler.filled(fill)
        for found in scheduler.admissions():
            if isinstance(found, Scoring):
                for active in filter(None, found.lanes):
                    count = len(active.request.candidates)
                    scheduler.scored(active, np.zeros(count, np.float32), np.zeros(count, bool))
                continue
            assert isinstance(found, Admission)
            for lane in found.lanes:
                assert len({id(active.slot) for active in lane}) <= 1 and len(lane) <= scheduler.shape.admitted
                for active in lane:
                    place = found.block, id(active.slot), active.row
                    assert self.rows.get(place) is None, "two in one row"
                    self.rows[place] = active
                    scheduler.said(active, active.epoch, [Token(answer(active, len(active.tokens)))])
        for move in scheduler.moves():
            self.log["moved"] += 1
            following = Block(move.source.pool, move.source.row_class + 1)
            assert move.active.block == following
        self.rows = {}
        for row in scheduler.living():
            place = row.block, id(row.active.slot), row.row
            assert place not in self.rows
            self.rows[place] = row.active
        for row in scheduler.living():
            said = len(row.active.tokens)
            scheduler.said(row.active, row.epoch, [Token(answer(row.active, n)) for n in range(said, said + 3)])
        self.rows = {(row.block, id(row.active.slot), row.row): row.active for row in scheduler.living()}


@pytest.mark.parametrize("shards, chunk", [(1, 512), (2, None)])
def test_every_request_gets_its_answer(config, pictures, shards, chunk):
    """Hundreds at random: texts and pictures, short and long answers, cancelled ones; nothing is left at the end."""

    def answer(active, n):
        return END if n + 1 == active.request.length else 7

    scheduler = Scheduler(config, shape(shards, chunk=chunk))
    device, rng, heard, wanted = Device(scheduler), random.Random(0), {}, {}
    for n in range(300):
        images = rng.sample(pictures, rng.randrange(2))
        beginning = [*range(100, 100 + rng.choice([3, 40, 200])), *[IMAGE_TOKEN_INDEX] * len(images)]
        ids, length = beginning + [rng.randrange(3, 90) for _ in range(rng.randrange(1, 8))], rng.randrange(1, 200)
        heard[n], wanted[n] = [], length
        options = RowOptions(length if n % 2 else 300, (END,))
        request = Request(prompt(ids, len(beginning), images), options, heard[n].append)
        request.length = length
        scheduler.add(scheduler.check(request))
        if n % 10 == 0:
            scores = ScoreRequest(prompt(ids, len(beginning), images), [np.array([5])] * 3, heard[n].append)
            scheduler.add(scheduler.check(scores))
        if n % 7 == 0:
            scheduler.cancel(request)
        for _ in range(rng.randrange(3)):
            device.step(answer)
    for _ in range(20_000):
        if scheduler.idle:
            break
        device.step(answer)
    assert scheduler.idle
    for n, said in heard.items():
        updates = [update for update in said if hasattr(update, "finish")]
        assert len(said) - len(updates) == (n % 10 == 0)
        finishes = [update.finish for update in updates if update.finish]
        if n % 7 == 0:
            assert finishes == [Finish.CANCELLED]
            continue
        assert finishes == [Finish.STOP]
        tokens = [token.id for update in updates for token in update.tokens]
        assert tokens == [7] * (wanted[n] - 1) + [END]
    assert device.log["moved"] > 20 and scheduler.preemptions > 20 and scheduler.hit > 0
    for table in scheduler.tables:
        for slot in table.slots:
            assert slot.users == 0 and [sorted(rows) for rows in slot.free_rows] == [[0, 1], [0]]


def test_a_request_that_does_not_fit_is_refused(config):
    scheduler = Scheduler(config, shape())
    fits = prompt(range(1, 20), 12)
    scheduler.check(Request(fits, RowOptions(5), print))
    with pytest.raises(ValueError, match="9 ids behind its prefix are more than 8"):
        scheduler.check(Request(fits._replace(shared=10), RowOptions(5), print))
    with pytest.raises(ValueError, match="2560 positions leave no room"):
        scheduler.check(Request(prompt([5] * 2560, 2557), RowOptions(5), print))
    limit = scheduler.check(Request(prompt([5] * 2552, 2547), RowOptions(500), print)).limit
    assert limit == 8


def test_nobody_is_overtaken_for_ever(config):
    """One that needs a slot of its own, while others go on asking for what is there."""
    scheduler = Scheduler(config, shape(per_shard=1, rows=1))
    device, heard = Device(scheduler), []

    def ask(first, emit):
        request = Request(prompt([*range(first, first + 50), 5], 50), RowOptions(30, (END,)), emit)
        scheduler.add(scheduler.check(request))

    for _ in range(3):
        ask(100, lambda update: None)
    device.step(lambda active, n: 7)
    ask(500, heard.append)
    for _ in range(600):
        ask(100, lambda update: None)
        device.step(lambda active, n: 7)
    assert any(update.finish for update in heard)
