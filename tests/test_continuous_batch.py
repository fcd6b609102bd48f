"""A continuous batch, and the thread that runs one: everyone gets what `Engine.generate` gives alone. 25 s, of which
nearly all is compiling."""

import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image
from small import small_model

from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.batch_shape import ONE_ROW, BatchShape, PoolShape, RowClass, memory_bytes, serving_shape
from llava_jax.inference.continuous_batch import ContinuousBatch, run
from llava_jax.inference.engine_loop import EngineLoop
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.inference.requests import (
    Finish,
    Greedy,
    QueueFull,
    Request,
    RowOptions,
    ScoreRequest,
    SplitPrompt,
    Stopped,
    Update,
)
from llava_jax.inference.sampling import Sample, validate
from llava_jax.inputs.batch import merged_length, pack
from llava_jax.inputs.groups import pack_questions

CLASSES = RowClass(2, 96), RowClass(1, 160)
SHAPE = BatchShape(1, 2, (PoolShape(512, CLASSES), PoolShape(2048, CLASSES)), 64, 1, 8, 512, 2048)
END = 3


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture(scope="module")
def loop(small):
    llava, params = small
    loop = EngineLoop.start(ContinuousBatch(llava.engine, params, SHAPE), max_waiting=64)
    assert loop.wait_until_ready(300)
    yield loop
    loop.close()


class Heard:
    """What is said of a request."""

    def __init__(self):
        self.tokens, self.updates, self.last, self.ended, self.first = [], 0, None, threading.Event(), threading.Event()

    def __call__(self, update):
        self.updates += 1
        if isinstance(update, Update):
            self.tokens += update.tokens
            if update.tokens:
                self.first.set()
            if update.finish is None:
                return
        self.last = update
        self.ended.set()

    def ids(self):
        assert self.ended.wait(120)
        return [token.id for token in self.tokens]


def requests_for(llava, count, seed=0):
    """Mixed ones: texts, and pictures that several ask about."""
    rng = np.random.default_rng(seed)
    shown = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((300, 500), (336, 336))]
    pictures = llava.load_images(shown)
    asked = []
    for n in range(count):
        images = [pictures[n % 2]] if n % 3 == 0 else []
        beginning = [1, 7, 8, 9, *[IMAGE_TOKEN_INDEX] * len(images), *range(20, 20 + n % 4)]
        ids = [*beginning, *rng.integers(5, 250, rng.integers(1, 60)).tolist()]
        sampling = validate(Sample(seed=n, temperature=0.7, repetition_penalty=1.3)) if n % 2 else Greedy()
        options = RowOptions(int(rng.integers(1, 130)), (END,), sampling, top_logprobs=0)
        asked.append(Request(SplitPrompt(np.array(ids), len(beginning), images), options, Heard()))
    return asked


def alone(llava, params, request):
    """Its tokens from `Engine.generate`'s parts, as far as its own end."""
    prompt, options = request.prompt, request.options
    batch = pack([prompt.ids[: prompt.shared]], list(prompt.images), llava.config)
    prefix, _ = llava.engine.prefill(params, batch)
    questions = pack_questions([[prompt.ids[prompt.shared :]]], 1, 1)
    options = GenerationOptions(options.max_new_tokens, options.sampling)
    state = llava.engine.sample_first_token(params, prefix, questions, options)
    state = llava.engine.decode(params, prefix, state, options, options.max_new_tokens)
    tokens = np.asarray(state.tokens)[0, 0, : options.max_new_tokens].tolist()
    ends = [i for i, token in enumerate(tokens) if token in (END, *llava.config.generation.eos_token_ids)]
    return tokens[: ends[0] + 1] if ends else tokens


def told(llava, params, request):
    """Its tokens' log-probabilities by `Engine.forward`, and what is chosen by those logits at each place."""
    ids = request.emit.ids()
    batch = pack([np.concatenate([request.prompt.ids, ids])], list(request.prompt.images), llava.config)
    logits = np.asarray(llava.engine.forward(params, batch).logits)[0]
    logits = logits[int(batch.lengths[0]) - len(ids) - 1 :][: len(ids)]
    said, chosen = np.zeros(logits.shape[-1], bool), []
    for step, token in enumerate(ids):
        chosen.append(int(request.options.sampling.choose(logits[step], said, step)))
        said[token] = True
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.array(ids)[:, None], 1)[:, 0], chosen


def test_many_at_once_get_what_each_gets_alone(small, loop):
    """Rows end and begin at all times, short rows become long ones, prefixes are shared, made from others and prefilled
    in chunks."""
    llava, params = small
    asked = requests_for(llava, 24)
    before = loop.stats()
    for request in asked:
        loop.submit(request)
    for request in asked:
        logprobs, chosen = told(llava, params, request)
        assert request.emit.ids() == chosen
        assert np.array([token.logprob for token in request.emit.tokens]) == pytest.approx(logprobs, abs=1e-5)
        ended = chosen[-1] == END
        assert request.emit.last.finish == (Finish.STOP if ended else Finish.LENGTH)
        assert ended or len(chosen) == request.options.max_new_tokens
    for request in asked[:4]:
        wanted = alone(llava, params, request)
        assert request.emit.ids()[: len(wanted)] == wanted
    after = loop.stats()
    assert after.running == after.waiting == after.prefix_slots_used == 0
    assert after.prefix_hits > before.prefix_hits


def test_what_comes_behind_a_prefix_is_prefilled_in_a_chunk_of_its_size(small, loop, programs):
    llava, params = small
    rng = np.random.default_rng(5)
    ids = np.concatenate([[1], rng.integers(70, 200, 1500)])
    for length, chunks in ((600, [512, 128]), (640, [128]), (1400, [512, 512])):
        programs.clear()
        request = Request(SplitPrompt(ids[:length], length - 1), RowOptions(5), Heard())
        loop.submit(request)
        assert request.emit.ids() == alone(llava, params, request)
        assert [args[0] for name, args in programs if name in ("first chunk", "next chunk")] == chunks


def test_a_picture_that_is_in_the_cache_is_not_encoded_again(small, loop, programs):
    """Even close to the capacity's end, where a longer chunk would begin before the picture does."""
    llava, params = small
    (picture,) = llava.load_images([Image.new("RGB", (336, 336), "red")])
    room = 1880 - merged_length([IMAGE_TOKEN_INDEX], [picture.size], llava.config)
    ids = np.array([1, *range(70, 68 + room), IMAGE_TOKEN_INDEX, *range(70, 100)])
    for behind, encoded in ((5, 1), (30, 0)):
        programs.clear()
        request = Request(SplitPrompt(ids[: room + behind], room + behind - 1, [picture]), RowOptions(5), Heard())
        loop.submit(request)
        assert request.emit.ids() == alone(llava, params, request)
        assert sum(name == "image" for name, _ in programs) == encoded


def test_nothing_is_compiled_once_it_is_ready(small, loop):
    llava, _ = small
    assert loop.compiled == 18
    for request in requests_for(llava, 6, seed=1):
        loop.submit(request)
        request.emit.ids()
    loop.submit(ScoreRequest(SplitPrompt(np.array([1, 5, 6]), 2), [np.array([7])] * 3, heard := Heard()))
    assert heard.ended.wait(60)
    assert llava.engine.batch.compiled == loop.compiled


def test_an_answer_longer_than_any_row_is_put_back_and_goes_on(small, loop):
    llava, params = small
    before = loop.stats().preemptions
    for sampling in (Greedy(), validate(Sample(seed=5, repetition_penalty=1.2))):
        request = Request(SplitPrompt(np.array([1, 30, 31, 32]), 2), RowOptions(400, (), sampling), Heard())
        loop.submit(request)
        wanted = alone(llava, params, request)
        assert request.emit.ids()[: len(wanted)] == wanted and len(request.emit.tokens) == 400
    assert loop.stats().preemptions >= before + 2


def test_cancelled_answers_end_and_free_their_rows(small, loop):
    asked = [Request(SplitPrompt(np.array([1, 40 + n, 41]), 2), RowOptions(1900), Heard()) for n in range(20)]
    for request in asked:
        loop.submit(request)
    assert asked[0].emit.first.wait(60)
    for request in asked:
        loop.cancel(request)
    for request in asked:
        request.emit.ids()
        assert request.emit.last.finish == Finish.CANCELLED
    said = [request.emit.updates for request in asked]
    time.sleep(0.2)
    assert said == [request.emit.updates for request in asked]
    stats = loop.stats()
    assert (stats.running, stats.waiting, stats.prefix_slots_used) == (0, 0, 0)


def test_a_full_queue_refuses(small, loop):
    asked = [Request(SplitPrompt(np.array([1, 50, 51]), 2), RowOptions(1500), Heard()) for _ in range(100)]
    taken = []
    with pytest.raises(QueueFull, match="64 requests wait already"):
        for request in asked:
            loop.submit(request)
            taken.append(request)
    for request in taken:
        loop.cancel(request)
    for request in taken:
        request.emit.ids()


def test_one_that_does_not_fit_is_refused_at_once(loop):
    with pytest.raises(ValueError, match="2048 positions leave no room"):
        loop.submit(Request(SplitPrompt(np.full(2048, 5), 2047), RowOptions(5), print))


def test_scores_are_those_of_the_engine(small, loop):
    llava, params = small
    ids, candidates = np.array([1, 60, 61, 62]), [np.array([7, 8]), np.array([9])]
    loop.submit(ScoreRequest(SplitPrompt(ids, 2), candidates, heard := Heard()))
    assert heard.ended.wait(60)
    for logprob, candidate in zip(heard.last.logprobs, candidates, strict=True):
        logits = llava.forward(params, [np.concatenate([ids, candidate])]).logits[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = sum(logprobs[len(ids) - 1 + i, token] for i, token in enumerate(candidate))
        assert logprob == pytest.approx(wanted, abs=1e-4)  # float32 sums in another order


def test_a_fault_fails_what_runs_and_the_next_is_answered(small):
    llava, params = small
    batch = ContinuousBatch(llava.engine, params, SHAPE)
    loop = EngineLoop.start(batch)
    assert loop.wait_until_ready(300)
    decode, batch.programs = batch.programs, _Broken(batch.programs)
    request = Request(SplitPrompt(np.array([1, 70, 71]), 2), RowOptions(50), Heard())
    loop.submit(request)
    request.emit.ids()
    assert request.emit.last.finish == Finish.ERROR and "broken on purpose" in str(request.emit.last.error)
    batch.programs = decode
    again = Request(SplitPrompt(np.array([1, 70, 71]), 2), RowOptions(20), Heard())
    loop.submit(again)
    assert len(again.emit.ids()) == 20 and loop.ready
    assert loop.drain(10)
    with pytest.raises(Stopped):
        loop.submit(again)
    loop.close()


class _Broken:
    """Programs of which one raises."""

    def __init__(self, programs):
        self._programs = programs

    def __getattr__(self, name):
        return getattr(self._programs, name)

    def decode(self, *_):
        raise RuntimeError("broken on purpose")


def test_draining_finishes_what_runs(small):
    llava, params = small
    loop = EngineLoop.start(ContinuousBatch(llava.engine, params, SHAPE))
    assert loop.wait_until_ready(300)
    request = Request(SplitPrompt(np.array([1, 80, 81]), 2), RowOptions(300), Heard())
    loop.submit(request)
    assert loop.drain(60) and len(request.emit.ids()) == 300
    late = Request(SplitPrompt(np.array([1, 80, 81]), 2), RowOptions(3), Heard())
    with pytest.raises(Stopped, match="shutting down"):
        loop.submit(late)
    loop.close()


def test_closing_does_not_wait_for_the_compiler(small):
    llava, params = small
    batch, compiled = ContinuousBatch(llava.engine, params, SHAPE), threading.Event()
    batch.to_compile = lambda: [("what takes long", compiled.wait)]
    loop, began = EngineLoop.start(batch), time.monotonic()
    loop.close(0.05)
    assert time.monotonic() - began < 5 and not loop.ready
    compiled.set()
    loop.close()


@pytest.mark.long
def test_whole_prefixes_and_many_questions_at_once_too(small):
    """As evaluation has it: no chunks, and all questions on a picture admitted together."""
    llava, params = small
    shape = BatchShape(1, 2, (PoolShape(2048, CLASSES),), 64, 3, 16, None, 2048)
    asked = requests_for(llava, 24, seed=2)
    for _ in run(ContinuousBatch(llava.engine, params, shape), asked):
        pass
    for request in asked:
        logprobs, chosen = told(llava, params, request)
        assert request.emit.ids() == chosen
        assert np.array([token.logprob for token in request.emit.tokens]) == pytest.approx(logprobs, abs=1e-5)


def test_slots_that_are_free_together_are_filled_together(small, programs):
    """Or else one of them decodes alone meanwhile. 4 s."""
    llava, params = small
    shape = BatchShape(1, 2, (PoolShape(256, (RowClass(1, 64),)),), 32, 1, 16, None, 256)
    shared = SplitPrompt(np.array([1, 7, 8, 9, 20]), 3)
    asked = [Request(shared._replace(ids=shared.ids + n), RowOptions(17), Heard()) for n in range(6)]
    for _ in run(ContinuousBatch(llava.engine, params, shape), asked):
        pass
    assert all(len(request.emit.ids()) == 17 for request in asked)
    assert sum(name == "decoding" for name, _ in programs) == 4  # the last is asked for ahead, and takes no step


def test_a_server_takes_the_largest_batch_that_fits(small):
    llava, params = small
    layout = llava.engine.cache_layout(params)
    roomy = serving_shape(llava.config, layout, 8 << 30, None, 256)
    assert [pool.capacity for pool in roomy.pools] == [512, 4096] and roomy.per_shard == 16
    tight = memory_bytes(roomy, llava.config, layout) // 2
    smaller = serving_shape(llava.config, layout, tight, None, 256)
    assert memory_bytes(smaller, llava.config, layout) <= tight and smaller.groups < roomy.groups
    assert serving_shape(llava.config, layout, 8 << 30, 300, 8).pools[-1].capacity == 512
    own = serving_shape(llava.config, layout, 8 << 30, None, 8, ONE_ROW)
    assert own.per_shard == 8 and [row_class.rows for row_class in own.pools[0].classes] == [1, 1]
    assert serving_shape(llava.config, layout, 0, None, 8, one_prefix_fits=True).per_shard == 1
    for wrong, problem in (((1 << 20, None, 8), "takes 0"), ((8 << 30, 5000, 8), "4096"), ((8 << 30, None, 0), "seqs")):
        with pytest.raises(ValueError, match=problem):
            serving_shape(llava.config, layout, *wrong)
