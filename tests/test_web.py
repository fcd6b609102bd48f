"""`llava-jax web`: what is behind the page, and, where there is a Chromium, the page itself in it."""

import argparse
import contextlib
import gc
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from PIL import Image
from small import small_model

from llava_jax.cli import add_command
from llava_jax.cli.web import run
from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inference.batch_shape import BatchShape, PoolShape, RowClass
from llava_jax.inference.continuous_batch import ContinuousBatch
from llava_jax.inference.engine_loop import EngineLoop
from llava_jax.inference.requests import Finish, QueueFull, Token, Update
from llava_jax.web.app import example_scenes
from llava_jax.web.conversations import Conversations

SHAPE = BatchShape(1, 2, (PoolShape(512, (RowClass(1, 192),)),), 64, 1, 4, 128, 512)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # its use of pandas
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PATIENCE = 120_000  # ms; answers wait for the compiler


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_command(parser, "web")
    return parser.parse_args(["--model-path", "there-is-no-model", *flags])


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def soon(condition):
    """Whether it comes true within a time in which a busy machine gets round to it."""
    deadline = time.monotonic() + 30
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


# ---- before the model is loaded


def test_importing_it_imports_neither_gradio_nor_jax():
    code = "import sys, llava_jax.web; assert not {'gradio', 'jax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_gradio_is_named_with_its_remedy(port, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r'pip install "llava-jax\[web\]"'):
        run(parsed("--port", str(port)))


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {taken} is already in use"):
            run(parsed("--port", str(taken)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", "0"), "--port 0 must be from 1 to 65535"),
        (("--port", "70000"), "--port 70000 must be from 1 to 65535"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1 --port 7860: cannot listen there"),
    ],
)
def test_bad_addresses_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        run(parsed(*flags))


def test_a_conversation_too_long_for_the_model_is_named_before_it_is_loaded(scenes_model, port, monkeypatch):
    pytest.importorskip("gradio", reason='pip install "llava-jax[web]"')
    monkeypatch.setattr("llava_jax.load", lambda *args, **options: pytest.fail("it was loaded"))
    args = parsed("--port", str(port), "--max-model-len", "513", "--model-path", str(scenes_model))
    with pytest.raises(ValueError, match="--max-model-len 513 must be from 65 to this model's 512"):
        run(args)


# ---- conversations


class ParrotLoop:
    """What stands in for the engine's: it says the question at once, a letter at a time; at "|" it stalls, at "!" it
    fails."""

    max_question = 64

    def __init__(self, tokenizer):
        self.tokenizer, self.asked, self.cancelled = tokenizer, [], set()

    def submit(self, request):
        prompt = request.prompt
        question = self.tokenizer.decode(prompt.ids[prompt.shared :].tolist()).partition(" ASSISTANT")[0].strip()
        if question == "long":
            raise ValueError("prompt: too long")
        if question == "full":
            raise QueueFull("256 requests wait already")
        self.asked.append(request)
        for letter in question:
            if letter == "|":
                return
            if letter == "!":
                return request.emit(Update(finish=Finish.ERROR, error=RuntimeError("RESOURCE_EXHAUSTED")))
            request.emit(Update((Token(self.tokenizer.get_vocab()[letter]),)))
        request.emit(Update(finish=Finish.STOP))

    def cancel(self, request):
        self.cancelled.add(request)


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture
def conversations(small):
    llava, _ = small
    return Conversations(llava, ParrotLoop(llava.tokenizer))


def said(conversations, tab, question):
    return list(conversations.answer(tab, question))


def test_an_answer_comes_piece_by_piece_and_is_kept(conversations):
    assert said(conversations, "a", " ab ") == [["ab", ""], ["ab", "a"], ["ab", "ab"]]
    assert said(conversations, "a", "c")[-1] == ["ab", "ab", "c", "c"]
    assert conversations.of("a").turns == ["ab", "ab", "c", "c"] and conversations.of("b").turns == []


def test_a_stopped_answer_is_what_was_said(conversations):
    for turns in conversations.answer("a", "ab|cd"):
        if turns[-1] == "ab":
            conversations.stop("a")
    assert conversations.of("a").turns == ["ab|cd", "ab"]
    assert conversations.loop.cancelled == set(conversations.loop.asked)
    assert said(conversations, "a", "g")[-1] == ["ab|cd", "ab", "g", "g"]


def test_an_answer_that_nobody_reads_to_its_end_is_cancelled(conversations):
    answer = conversations.answer("a", "abcd")
    next(answer), next(answer)
    answer.close()
    assert conversations.of("a").turns == ["abcd", "a"] and not conversations.of("a").answering.locked()
    assert conversations.loop.cancelled == set(conversations.loop.asked)


def test_a_question_is_behind_a_prefix_that_the_next_turn_begins_with(conversations, picture):
    conversations.show("a", picture)
    for question in ("ab", "c"):
        said(conversations, "a", question)
    first, second = (request.prompt for request in conversations.loop.asked)
    assert first.ids[: first.shared].tolist() == second.ids[: first.shared].tolist()
    assert IMAGE_TOKEN_INDEX in first.ids[: first.shared] and first.shared < second.shared
    llava = conversations.llava
    assert second.ids.tolist() == llava.prompt_ids(["ab", "ab", "c"], [(1501, 901)])
    assert llava.tokenizer.decode(second.ids[second.shared :].tolist()) == "c ASSISTANT:"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (" ", "the question is empty"),
        ("long", "prompt: too long"),
        ("full", "no answer: 256 requests wait already"),
        ("ab!", "the answer failed: RuntimeError"),
    ],
)
def test_an_error_leaves_the_conversation_as_it_was(conversations, capfd, question, message):
    said(conversations, "a", "x")
    with pytest.raises(ValueError, match=message):
        said(conversations, "a", question)
    assert conversations.of("a").turns == ["x", "x"]
    assert ("RESOURCE_EXHAUSTED" in capfd.readouterr().err) == (question == "ab!")
    assert said(conversations, "a", "y")[-1] == ["x", "x", "y", "y"]


def test_regenerate_takes_the_last_answer_back(conversations):
    with pytest.raises(ValueError, match="the question is empty"):
        said(conversations, "a", None)
    said(conversations, "a", "x")
    said(conversations, "a", "y")
    assert said(conversations, "a", None)[0] == ["x", "x", "y", ""]
    assert conversations.of("a").turns == ["x", "x", "y", "y"]


def test_a_tab_asks_one_thing_at_a_time(conversations):
    first = conversations.answer("a", "ab")
    next(first)
    with pytest.raises(ValueError, match="still being answered"):
        said(conversations, "a", "c")
    assert said(conversations, "b", "c")[-1] == ["c", "c"]  # another tab's does not wait
    assert list(first)[-1] == ["ab", "ab"]


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (1501, 901), "red").save(tmp_path / "new.png")
    return str(tmp_path / "new.png")


def test_a_new_picture_stops_the_answer_about_the_old_one(conversations, picture):
    old = conversations.answer("a", "a|")
    next(old), next(old)
    conversations.show("a", picture)
    assert list(old) == []
    assert conversations.of("a").turns == [] and said(conversations, "a", "x")[-1] == ["x", "x"]
    shown = conversations.of("a").picture
    assert conversations.loop.asked[-1].prompt.images == [shown] and shown.size == (1501, 901)
    conversations.begin("a")
    assert conversations.of("a").picture is shown and conversations.of("a").file == picture
    conversations.show("a", None)
    assert conversations.of("a").picture is None
    conversations.forget("a")
    assert conversations.by_tab == {}


def test_a_picture_is_kept_as_its_tiles(conversations, picture):
    for tab in "abc":
        conversations.show(tab, picture)
    gc.collect()
    assert not [1 for kept in gc.get_objects() if isinstance(kept, Image.Image) and kept.size == (1501, 901)]
    assert sum(conversations.of(tab).picture.tiles.nbytes for tab in "abc") == 3 * 5 * 336 * 336 * 3


def test_what_is_no_picture_leaves_the_conversation_as_it_was(conversations, picture):
    conversations.show("a", picture)
    said(conversations, "a", "x")
    with pytest.raises(ValueError, match=r"test_web\.py' is not a picture"):
        conversations.show("a", __file__)
    assert conversations.of("a").file == picture and conversations.of("a").turns == ["x", "x"]


def test_only_uploads_are_read(tmp_path):
    pytest.importorskip("gradio", reason='pip install "llava-jax[web]"')
    from llava_jax.web.page import uploaded_file

    uploads = tmp_path / "uploads"
    uploads.mkdir()
    assert uploaded_file(None, str(uploads)) is None
    assert uploaded_file({"path": f"{uploads}/a.png"}, str(uploads)) == uploads / "a.png"
    for path in ("/etc/hostname", f"{uploads}/../a.png", "http://127.0.0.1/a.png", None):
        with pytest.raises(ValueError, match="not one that was uploaded"):
            uploaded_file({"path": path}, str(uploads))


# ---- conversations with the engine and the bundled model; 20 s, nearly all of which is compiling


@pytest.fixture(scope="module")
def batch(bundled):
    llava, params = bundled
    return ContinuousBatch(llava.engine, params, SHAPE)


@pytest.fixture(scope="module")
def loop(batch):
    loop = EngineLoop.start(batch)
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Files of pictures that the bundled model has not seen: one with a sign that says 44, one with YK."""
    from llava_jax.demo.held_out import held_out_scene
    from llava_jax.demo.scenes import draw

    folder = tmp_path_factory.mktemp("scenes")
    for number in (3, 6):
        draw(held_out_scene(0, number)).save(folder / f"{number}.png")
    return {"44": str(folder / "3.png"), "YK": str(folder / "6.png")}


@pytest.fixture
def visitors(bundled, loop, scenes):
    """The conversations of two tabs, named by the signs in their pictures."""
    conversations = Conversations(bundled[0], loop)
    for sign, file in scenes.items():
        conversations.show(sign, file)
    return conversations


DESCRIBE, READ = "Describe the image.", "What does the sign say?"
GREEDY = {"temperature": 0, "max_new_tokens": 64}


def test_two_at_once_do_not_wait_for_each_other_and_get_what_generate_gives(visitors, bundled, scenes, loop):
    llava, params = bundled
    seeds = {"44": 1, "YK": 2}
    options = {"temperature": 1.2, "top_p": 0.9, "max_new_tokens": 64}
    answers = {sign: visitors.answer(sign, DESCRIBE, seed=seed, **options) for sign, seed in seeds.items()}
    order = []
    with noted(loop, order):
        for answer in answers.values():
            next(answer)  # asked
        turns = {sign: list(answer)[-1] for sign, answer in answers.items()}
    for sign, seed in seeds.items():
        alone = llava.generate(params, scenes[sign], DESCRIBE, seed=seed, **options)
        assert turns[sign] == [DESCRIBE, alone] == visitors.of(sign).turns
    first, second = dict.fromkeys(order)
    assert order.index(second) < len(order) - 1 - order[::-1].index(first), "one waited for the other"

    for sign in seeds:
        said = list(visitors.answer(sign, READ, **GREEDY))[-1]
        assert said[2:] == [READ, llava.generate(params, scenes[sign], [*turns[sign], READ], **GREEDY)]
        assert list(visitors.answer(sign, None, **GREEDY))[-1] == said  # regenerated


@contextlib.contextmanager
def noted(loop, order):
    """Each time that something is said of a request, it is added to `order`."""
    submit = loop.submit

    def noting(request):
        emit = request.emit
        request.emit = lambda update: (order.append(request), emit(update))
        submit(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "submit", noting)
        yield


def test_a_stopped_answer_frees_its_row_and_the_conversation_goes_on(visitors, bundled, scenes, loop):
    llava, params = bundled
    whole = llava.generate(params, scenes["YK"], DESCRIBE, **GREEDY)
    for turns in visitors.answer("YK", DESCRIBE, **GREEDY):
        if turns[-1]:
            visitors.stop("YK")
    assert soon(lambda: loop.stats().running == 0) and loop.stats().prefix_slots_used == 0
    half = visitors.of("YK").turns[1]
    assert half and whole.startswith(half)
    wanted = llava.generate(params, scenes["YK"], [DESCRIBE, half, READ], **GREEDY)
    assert list(visitors.answer("YK", READ, **GREEDY))[-1] == [DESCRIBE, half, READ, wanted]


def test_a_fault_of_the_engine_leaves_the_conversation_as_it_was(visitors, batch, monkeypatch, capfd):
    def broken(*_):
        raise RuntimeError("broken on purpose")

    before = list(visitors.answer("44", READ, **GREEDY))[-1]
    with monkeypatch.context() as patch:
        patch.setattr(batch.programs, "decode", broken)
        with pytest.raises(ValueError, match="the answer failed: RuntimeError, of which the server's log says more"):
            list(visitors.answer("44", DESCRIBE, **GREEDY))
    assert visitors.of("44").turns == before == [READ, "44"] and "broken on purpose" in capfd.readouterr().err
    assert list(visitors.answer("44", READ, **GREEDY))[-1] == 2 * before


def test_while_the_engine_compiles_an_answer_waits_and_can_be_stopped(bundled):
    llava, params = bundled
    batch, compiled = ContinuousBatch(llava.engine, params, SHAPE), threading.Event()
    batch.to_compile = lambda: [("what takes long", compiled.wait)]
    loop = EngineLoop.start(batch)
    conversations = Conversations(llava, loop)
    stopped, waiting = (conversations.answer(tab, "Hello", **GREEDY) for tab in "ab")
    assert next(stopped) == next(waiting) == ["Hello", ""]
    conversations.stop("a")
    assert list(stopped) == [] and conversations.of("a").turns == ["Hello", ""] and not loop.ready
    compiled.set()
    assert list(waiting)[-1] == ["Hello", llava.generate(params, None, "Hello", **GREEDY)]
    loop.close()


def test_closing_ends_the_answers(bundled):
    llava, params = bundled
    loop = EngineLoop.start(ContinuousBatch(llava.engine, params, SHAPE))
    conversations = Conversations(llava, loop)
    answer = conversations.answer("a", DESCRIBE)
    next(answer)
    loop.close()
    with pytest.raises(ValueError, match="no answer: the server was closed"):
        list(answer)
    with pytest.raises(ValueError, match="no answer: the server is shutting down"):
        list(conversations.answer("a", DESCRIBE))
    assert conversations.of("a").turns == []


# ---- the server


SERVE = """
import signal, sys
from llava_jax.cli import main

def watch(event, args):
    host = {"socket.connect": lambda: args[1][0], "socket.getaddrinfo": lambda: args[0]}.get(event, lambda: None)()
    if host not in (None, "127.0.0.1", "localhost", "/"):
        print("elsewhere:", host, file=sys.stderr)

sys.addaudithook(watch)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


def upload(port, size):
    """(status, reply) of putting a file of `size` bytes there, as a browser does."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/gradio_api/upload", head + bytes(size) + b"\r\n--x--\r\n", headers)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


@pytest.mark.long
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_ended_and_sends_nothing_elsewhere(scenes_model, port, tmp_path, ending):
    pytest.importorskip("gradio", reason='pip install "llava-jax[web]"')
    command = [sys.executable, "-c", SERVE, "web", "--model-path", str(scenes_model), "--port", str(port)]
    # gradio reads these, and analytics and share links are on by default, or by such a variable
    environment = {**os.environ, "TMPDIR": str(tmp_path), "GRADIO_SHARE": "True", "GRADIO_ANALYTICS_ENABLED": "True"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            assert server.stdout.readline() == f"http://127.0.0.1:{port} (Ctrl-C ends)\n"
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/")
            assert b"llava-v1.6-scenes" in connection.getresponse().read()
            connection.close()
            assert upload(port, 1000)[0] == 200
            kept = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert sum(path.stat().st_size == 1000 for path in kept) == 1
            status, reply = upload(port, 65 * 2**20)
            assert status == 413 and "exceeded maximum allowed size" in reply
            assert [path for path in tmp_path.rglob("*") if path.is_file()] == kept
            server.send_signal(ending)
            _, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0 and "elsewhere" not in errors, errors
    assert not list(tmp_path.iterdir())  # uploads are gone


# ---- in a browser


@pytest.fixture(scope="module")
def gate():
    """While it is closed, answers stop after a few tokens, to be looked at."""
    opened = threading.Event()
    opened.set()
    return opened


class GatedLoop:
    """A loop whose answers are held at a gate, each on its own."""

    def __init__(self, loop, gate):
        self.loop, self.gate, self.max_question, self.cancel = loop, gate, loop.max_question, loop.cancel

    def submit(self, request):
        straight, deliverer, said = request.emit, ThreadPoolExecutor(1), []

        def deliver(update):
            if len(said) >= 5:
                self.gate.wait(PATIENCE / 1000)
            said.extend(update.tokens)
            straight(update)

        request.emit = partial(deliverer.submit, deliver)
        self.loop.submit(request)


@pytest.fixture(scope="module")
def served(bundled, loop, gate, tmp_path_factory):
    """(address, the conversations) of a server in this process."""
    pytest.importorskip("gradio", reason='pip install "llava-jax[web]"')
    from llava_jax.web.page import build_page, launch

    folder = str(tmp_path_factory.mktemp("uploads"))
    conversations = Conversations(bundled[0], GatedLoop(loop, gate))
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as free:
        patch.setenv("GRADIO_TEMP_DIR", folder)
        page = build_page(conversations, example_scenes(bundled[0].config.name, folder))
        port = free.getsockname()[1]
        free.close()
        launch(page, "127.0.0.1", port)
        yield f"http://127.0.0.1:{port}/", conversations
        page.close()


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS.split())
        yield browser
        browser.close()


class Tab:
    """The page as one person sees it, in a profile of their own; greedy, so that answers can be compared."""

    def __init__(self, browser, address, conversations):
        self.conversations = conversations
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.page, self.elsewhere = self.context.new_page(), []
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.goto(address)
        self.page.click("#parameters button")

    def _note(self, url, address):
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def _has_kept_parameters(self):
        """Whether the page has them; it gets those that are missing: a page that is still being built drops them."""
        wanted = {"Temperature": "0", "Max output tokens": "64"}
        numbers = {label: self.page.get_by_label(f"number input for {label}") for label in wanted}
        lost = [label for label, number in numbers.items() if number.input_value() != wanted[label]]
        for label in lost:
            numbers[label].fill(wanted[label])
            numbers[label].blur()
        return not lost

    def upload(self, file):
        self.page.set_input_files("#picture input[type=file]", file)
        self.wait_for_picture(os.path.basename(file))

    def wait_for_picture(self, name):
        """Until the server has it; a question before that would be about no picture."""
        assert soon(
            lambda: any(
                c.file and c.file.endswith(name) and not c.turns for c in list(self.conversations.by_tab.values())
            )
        )

    def ask(self, question):
        """Until the question is among what was said."""
        assert soon(self._has_kept_parameters)
        asked = self.page.locator("#chatbot [data-testid=user]")
        count = asked.count()
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")
        asked.nth(count).wait_for()

    def wait_for_part(self):
        """The part of an answer that is there, until the gate is opened."""
        self.page.wait_for_function("document.querySelector('#chatbot').innerText.match(/\\w▌/)")
        return self.turns()[-1].removesuffix("▌")

    def wait(self):
        """Until the answer is there; what has been said."""
        self.page.wait_for_function(
            "!document.querySelector('#chatbot').innerText.includes('▌')"
            " && !document.querySelector('#regenerate').disabled"
        )
        return self.turns()

    def turns(self):
        return [
            text.strip()
            for text in self.page.locator("#chatbot [data-testid=user], #chatbot [data-testid=bot]").all_inner_texts()
        ]

    def wait_for_message(self, text):
        self.page.locator(".toast-message-text", has_text=text).wait_for()


@pytest.fixture
def open_tab(chromium, served, gate):
    tabs = []

    def open_one():
        tabs.append(Tab(chromium, *served))
        return tabs[-1]

    yield open_one
    gate.set()
    for tab in tabs:
        tab.context.close()
        assert not tab.elsewhere


@pytest.mark.browser
def test_answers_are_streamed_and_those_of_generate(open_tab, gate, bundled, scenes):
    llava, params = bundled
    tab = open_tab()
    tab.upload(scenes["YK"])
    first, second = "Describe the image.", "What does the sign say?"
    gate.clear()
    tab.ask(first)
    part = tab.wait_for_part()
    gate.set()
    question, answer = tab.wait()
    assert question == first and answer == llava.generate(params, scenes["YK"], first, max_new_tokens=64)
    assert part != answer and answer.startswith(part)
    gate.clear()
    tab.page.click("#regenerate")
    assert answer.startswith(tab.wait_for_part())
    gate.set()
    assert tab.wait() == [first, answer]
    tab.ask(second)
    assert tab.wait() == [first, answer, second, "YK"]


@pytest.mark.browser
def test_errors_are_a_message_and_the_page_goes_on(open_tab, scenes, tmp_path):
    tab, bad = open_tab(), tmp_path / "bad.png"
    bad.write_text("no picture")
    tab.upload(scenes["44"])
    tab.ask("What does the sign say?")
    before = tab.wait()
    assert before == ["What does the sign say?", "44"]

    tab.page.set_input_files("#picture input[type=file]", bad)
    tab.wait_for_message("image 'bad.png' is not a picture that Pillow can read")
    assert tab.page.locator(".toast-message-text").count() == 1
    tab.page.click("#send")
    tab.wait_for_message("the question is empty")
    too_long = "<b>" + "no " * 600
    tab.page.fill("#question textarea", too_long)
    tab.page.click("#send")
    tab.wait_for_message("are more than this model's tokenizer_model_max_length=512")
    assert soon(lambda: tab.page.input_value("#question textarea") == too_long)

    tab.ask("What does the sign say?")
    assert tab.wait() == 2 * before  # about the picture of before
    tab.page.click("#new")
    tab.page.wait_for_function("!document.querySelector('#chatbot [data-testid=user]')")
    tab.ask("What does the sign say?")
    assert tab.wait() == before


@pytest.mark.browser
def test_two_people_at_once_get_their_own_answers(open_tab, served, gate, bundled, scenes):
    llava, params = bundled
    tabs = {sign: open_tab() for sign in scenes}
    for sign, tab in tabs.items():
        tab.upload(scenes[sign])
    gate.clear()
    for tab in tabs.values():
        tab.ask("Describe the image.")
    parts = [tab.wait_for_part() for tab in tabs.values()]
    gate.set()
    for sign, tab in tabs.items():
        alone = llava.generate(params, scenes[sign], "Describe the image.", max_new_tokens=64)
        assert tab.wait() == ["Describe the image.", alone] and f"says {sign}" in alone
        assert alone.startswith(parts.pop(0))
    for tab in tabs.values():
        tab.ask("What does the sign say?")
    for sign, tab in tabs.items():
        assert tab.wait()[2:] == ["What does the sign say?", sign]

    tabs["44"].context.close()
    assert soon(lambda: len(served[1].by_tab) == 1)
    tabs["YK"].ask("What does the sign say?")
    assert tabs["YK"].wait()[4:] == ["What does the sign say?", "YK"]


@pytest.mark.browser
def test_stop_keeps_what_was_said_and_a_new_picture_begins_anew(open_tab, served, gate, scenes):
    tab = open_tab()
    tab.page.locator("#left tbody td").first.click()  # the example that says 44
    tab.wait_for_picture("scene-3.png")
    assert soon(lambda: tab.page.input_value("#question textarea") == "What does the sign say?")
    (conversation,) = served[1].by_tab.values()
    gate.clear()
    tab.ask("Describe the image.")
    part = tab.wait_for_part()
    tab.page.click("#stop")
    _, half = tab.wait()  # it does not wait for the next token
    gate.set()
    assert half.startswith(part) and not half.endswith(".") and conversation.turns == ["Describe the image.", half]
    tab.ask("What does the sign say?")
    assert tab.wait() == ["Describe the image.", half, "What does the sign say?", "44"]

    gate.clear()
    tab.ask("Describe the image.")
    tab.wait_for_part()
    tab.upload(scenes["YK"])
    assert soon(lambda: tab.turns() == [])
    assert soon(lambda: not conversation.answering.locked()) and len(conversation.turns) == 6
    tab.ask("What does the sign say?")
    assert tab.wait() == ["What does the sign say?", "YK"]
    gate.set()
    assert tab.wait() == ["What does the sign say?", "YK"]


@pytest.mark.browser
def test_the_browser_fetches_nothing_from_elsewhere(open_tab):
    tab = open_tab()
    blocked = """() => new Promise(resolve => {
        document.addEventListener("securitypolicyviolation", event => resolve(event.blockedURI));
        setTimeout(resolve, 5000);
        document.body.append(Object.assign(new Image(), {src: "http://localhost:9/picture.png"}));
    })"""
    assert tab.page.evaluate(blocked) == "http://localhost:9/picture.png"
    tab.elsewhere.clear()  # asked for, and refused
