"""What a harness asks of the bundled model: the answers of one at a time, for one prefill a picture; what cannot be
asked, what is asked again, what was answered before, and how likely continuations are.

It takes 30 seconds, most of it for compiling.
"""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from llava_jax.demo.held_out import held_out_scene, questions_about
from llava_jax.demo.scenes import draw
from llava_jax.evaluation import harness as harness_module
from llava_jax.evaluation.answer_cache import AnswerCache
from llava_jax.evaluation.harness import Harness, HarnessOptions, share_of_process
from llava_jax.evaluation.harness_prompts import Turns, from_context, options_of
from llava_jax.evaluation.harness_requests import HarnessRequest
from llava_jax.inference import batch_shape
from llava_jax.inputs.conversation import conv_templates
from llava_jax.parallel import multihost

SCENES = [held_out_scene(3, number) for number in range(3)]
PICTURES = [draw(scene) for scene in SCENES]
ASKED = [(n, q.text) for n, scene in enumerate(SCENES) for q in questions_about(scene, 3, n)[:4]]
SHORT = {"max_new_tokens": 12}


@pytest.fixture
def harness(scenes_model, load_once):
    return Harness(HarnessOptions(str(scenes_model)))


@pytest.fixture
def ask(harness):
    """(pictures, text, generation_kwargs) → a request. A picture is a number, or whatever a task may give."""

    def make(shown, text, continuation=None, **gen_kwargs):
        shown = shown if isinstance(shown, list) else [shown]

        def turns(document):
            return from_context(text, [PICTURES[n] if isinstance(n, int) else n for n in document])

        how = options_of(harness.config, SHORT | gen_kwargs, 0)
        if continuation is not None:
            return HarnessRequest(f"{text!r}", lambda: shown, turns, continuation=lambda document: continuation)
        return HarnessRequest(f"{text!r}", lambda: shown, turns, how)

    return make


def test_answers_are_those_of_a_batch(harness, ask, bundled, programs):
    """In whatever order they come, each picture prefilled once; several pictures, text alone, own limits and stops."""
    llava, params = bundled
    about = {shown: [text for n, text in ASKED if n == shown] for shown in range(3)}
    whole = "Describe the image."
    requests = [(PICTURES[0], [*about[0], *[whole] * 3]), (PICTURES[1], about[1]), (PICTURES[2], about[2])]
    requests += [([PICTURES[1], PICTURES[0]], ["<image> <image>\nIs it red?"]), (None, ["Who are you?"])]
    wanted = llava.generate_batch(params, requests, **SHORT)
    prefills = [name for name, _ in programs].count("first chunk")

    described = wanted[len(about[0])]
    stop = described[10:13]
    wanted[len(about[0]) + 2] = described[: described.index(stop)].strip()
    asked = [(0, text, {}) for text in about[0]]
    asked += [(0, whole, {}), (0, whole, {"max_new_tokens": 3}), (0, whole, {"until": ["nowhere", stop]})]
    asked += [(shown, text, {}) for shown in (1, 2) for text in about[shown]]
    asked += [([1, 0], "Is it red?", {}), ([], "Who are you?", {})]
    order = np.random.default_rng(0).permutation(len(asked))
    programs.clear()
    found = harness.answer([ask(shown, text, **how) for shown, text, how in (asked[n] for n in order)])
    assert [name for name, _ in programs].count("first chunk") == prefills == 5
    answers = [answer for _, answer in sorted(zip(order, found, strict=True))]
    short = answers[len(about[0]) + 1]
    wanted[len(about[0]) + 1] = short
    assert answers == wanted and all(answers) and described.startswith(short) and len(short) < len(described)


def test_the_same_is_asked_once_and_drawn_anew(harness, ask, bundled, programs):
    llava, params = bundled
    drawn = dict(temperature=5.0, top_k=0)
    greedy, first, second, third = (ask(0, "Describe the image.", **how) for how in ({}, drawn, drawn, drawn))
    answers = harness.answer([greedy, first, greedy, second, greedy, third])
    rows = [int(args[6].active.sum()) for name, args in programs if name == "admission"]
    assert sum(rows) == 4 and answers[0] == answers[2] == answers[4]
    how = dict(max_new_tokens=12, temperature=5.0, top_k=0, top_p=1.0)
    wanted = [llava.generate(params, PICTURES[0], "Describe the image.", seed=seed, **how) for seed in range(3)]
    assert answers[1::2] == wanted and len(set(wanted)) > 1


def test_what_cannot_be_asked_costs_nobody_else_his_answer(harness, ask, capsys, tmp_path):
    def broken():
        raise OSError("the file is truncated")

    def another(document):
        return Turns(("<image>\nHi",), (PICTURES[2 if document == 0 else 1],))

    reads, how = itertools.count(), options_of(harness.config, SHORT, 0)
    bad = [HarnessRequest("changing", lambda: next(reads), another, how)]
    bad += [HarnessRequest("damaged", broken, another, how)]
    PICTURES[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    bad += [HarnessRequest("cut", lambda: None, lambda _: from_context("?", [Image.open(tmp_path / "cut.png")]), how)]
    bad += [ask("a.mp4", "video"), ask(0, "long " * 300), ask([], "<image> of what?"), ask(0, "half \udc80")]
    asked = [ask(0, ASKED[0][1]), *bad, ask(0, ASKED[1][1])]
    first, *refused, last = harness.answer(asked)
    assert refused == [""] * 7 and [first, last] == harness.answer([asked[0], asked[-1]]) and first and last
    said = capsys.readouterr().err
    for reason in (
        "changing: its pictures are others than when it was read first",
        "damaged: the file is truncated",
        "cut: image file is truncated",
        "'video': image 'a.mp4': no such file",
        "are more than this model's",
        "1 <image>, but there are 0 images",
        "half of a surrogate pair",
        "7 requests could not be asked, and count as answered with nothing",
    ):
        assert reason in said, reason


def test_texts_alone_are_asked_a_few_together(harness, ask, capsys):
    """All of them share the system prompt, but one prefix keeps one device busy."""
    answers = harness.answer([ask([], f"How many are {n}?", max_new_tokens=1) for n in range(17)])
    assert len(answers) == 17 and "17 questions on 2 prefixes" in capsys.readouterr().err


def test_an_answer_ends_where_the_context_does(harness, ask, monkeypatch):
    """MathVista asks for 16,384 tokens."""
    taken = []
    plan = harness_module.batching.plan

    def noted(*args, **options):
        taken.append(args[3])
        return plan(*args, **options)

    monkeypatch.setattr(harness_module.batching, "plan", noted)
    harness.answer([ask(0, "Describe the image.", max_new_tokens=16384, until=".")])
    assert taken == [512]  # slots, for this model's 512 positions less its prompt's


@pytest.mark.long
def test_a_killed_run_goes_on(scenes_model, ask, load_once, tmp_path, monkeypatch, programs):
    """And what is in the cache is not asked again: not a question, nor even the parameters."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(batch_shape, "MAX_GROUPS", 1)  # a picture's answers at a time

    options = HarnessOptions(str(scenes_model), cache=str(tmp_path / "cache"))
    requests = [ask(shown, text) for shown, text in ASKED]
    add = AnswerCache.add
    calls = itertools.count()

    def add_and_die(cache, answers):
        add(cache, answers)
        if next(calls) == 0:
            raise Killed

    monkeypatch.setattr(AnswerCache, "add", add_and_die)
    with pytest.raises(Killed):
        Harness(options).answer(requests)
    (kept,) = [path for path in (tmp_path / "cache").iterdir() if path.stat().st_size]
    before = kept.read_text().splitlines()
    assert 0 < len(before) < len(requests)
    with open(kept, "a") as file:
        file.write('{"key": "torn')  # in the middle of a line

    programs.clear()
    wanted = Harness(HarnessOptions(str(scenes_model))).answer(requests)
    all_asked = sum(int(args[6].active.sum()) for name, args in programs if name == "admission")
    programs.clear()
    assert Harness(options).answer(requests) == wanted
    left = sum(int(args[6].active.sum()) for name, args in programs if name == "admission")
    assert all_asked == len(requests) and left == len(requests) - len(before)
    programs.clear()
    assert Harness(options).answer(requests) == wanted and programs == []
    other = HarnessOptions(str(scenes_model), conv_template="vicuna_v1", cache=options.cache)
    assert len(Harness(other).answer(requests[:1])) == 1 and programs != []  # another prompt is another question

    (tmp_path / "cache" / "answers-x.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(ValueError, match=r"answers-x\.jsonl, line 1: is no answer; name another folder"):
        Harness(options)


def test_losses_are_those_of_the_forward_pass(harness, ask, bundled):
    """The mean over a continuation's tokens, its end included; its picture is prefilled once for all."""
    llava, params = bundled
    question = questions_about(SCENES[0], 3, 0)[0]
    choices = [f" {word}" for word in (question.answer, "red", "a heart", "No")]
    pairs = [(0, question.text, choice) for choice in choices]
    pairs += [(1, question.text, choices[0]), (1, "Is <image> red?", choices[0]), ([], "Hi", choices[0])]
    found = harness.score([ask(shown, text, choice) for shown, text, choice in pairs])
    template = conv_templates[harness.config.conv_mode or "llava_v1"]
    for (shown, text, choice), likelihood in zip(pairs, found, strict=True):
        pictures = [] if shown == [] else [PICTURES[shown]]
        asked = template.with_turns(["<image>\n" * (bool(pictures) and "<image>" not in text) + text])
        said = asked.replace_last(asked.roles[1], choice)
        start, ids = (llava.prompt_ids(one, [p.size for p in pictures]) for one in (asked, said))
        own = np.array(ids[len(start) :])
        logits = llava.forward(params, [ids], pictures or None).logits[0][-len(own) - 1 : -1]
        losses = -np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(len(own)), own]
        assert likelihood.loss == pytest.approx(losses.mean(), abs=1e-4)
        assert likelihood.greedy == bool((logits.argmax(-1) == own).all())
    refused, other = harness.score([ask([], "<image>?", " a"), ask(0, question.text, choices[0])])
    assert refused == (np.inf, False) and other.loss == pytest.approx(found[0].loss, abs=1e-4)
    spoken = questions_about(SCENES[0], 3, 0)[0].answer  # as the model itself says it, without a second space
    (found,) = harness.score([ask(0, question.text, spoken)])
    assert found.greedy and found.loss < 0.1


def test_every_picture_has_one_process_though_one_reads_fewer(monkeypatch):
    def asked(*pictures):
        return {
            f"{name} {n}": SimpleNamespace(pictures=SimpleNamespace(digests=name)) for name in pictures for n in "12"
        }

    read = [asked((), ("a",), ("b",), ("c", "d")), asked((), ("b",), ("c", "d"))]
    told: list[bytes] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "allgather_bytes", lambda data: told.append(data) or [data])
    for each in read:
        share_of_process(each)
    monkeypatch.setattr(multihost, "allgather_bytes", lambda data: told)
    shares = []
    for process, each in enumerate(read):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(share_of_process(each))
    assert shares[0].keys() | shares[1].keys() | {"('a',) 1", "('a',) 2"} == read[0].keys()
    assert not shares[0].keys() & shares[1].keys() and all(shares)
    of_b = [share for share in shares if "('b',) 1" in share]
    assert len(of_b) == 1 and "('b',) 2" in of_b[0]


def test_options_are_checked_before_anything_is_loaded(scenes_model, tmp_path):
    with pytest.raises(ValueError, match="--mesh: fsdp is none of data, tensor"):
        HarnessOptions("x", mesh=(("fsdp", 2),))
    with pytest.raises(ValueError, match="conv_mode='v9' is not known"):
        Harness(HarnessOptions(str(scenes_model), conv_template="v9"))
    with pytest.raises(FileNotFoundError):
        Harness(HarnessOptions(str(tmp_path / "nothing")))
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(OSError, match="file"):
        Harness(HarnessOptions(str(scenes_model), cache=str(tmp_path / "file")))
