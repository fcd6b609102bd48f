"""`llava-jax web`: what is behind the page, and, where there is a Chromium, the page itself in it."""

import argparse
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

import pytest
from PIL import Image

from llava_jax.cli import add_command
from llava_jax.cli.web import run
from llava_jax.config import LlavaConfig
from llava_jax.web.app import example_scenes
from llava_jax.web.conversations import MAX_CACHED_CONVERSATIONS, Conversations

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


# ---- conversations


class ParrotChat:
    """Says the question, a letter at a time, and remembers as `Chat` does."""

    def __init__(self, params, picture, conv_mode):
        self.picture, self.turns = picture, []

    def stream(self, question, **options):
        if question == "long":
            raise ValueError("prompt: too long")
        return self._stream(question)

    def _stream(self, question):
        said = ""
        try:
            for letter in question:
                if letter == "!":
                    raise RuntimeError("RESOURCE_EXHAUSTED")
                said += letter
                yield letter
        finally:
            self.turns += [question, said]


class Parrot:
    config = LlavaConfig.preset("1.6-vicuna-7b")

    def chat(self, params, picture, conv_mode):
        return ParrotChat(params, picture, conv_mode)


@pytest.fixture
def conversations():
    return Conversations(Parrot(), {})


def said(conversations, tab, question):
    return list(conversations.answer(tab, question))


def test_an_answer_comes_piece_by_piece_and_is_kept(conversations):
    assert said(conversations, "a", " ab ") == [["ab", ""], ["ab", "a"], ["ab", "ab"]]
    assert said(conversations, "a", "c")[-1] == ["ab", "ab", "c", "c"]
    assert conversations.of("a").turns == ["ab", "ab", "c", "c"] and conversations.of("b").turns == []


def test_a_stopped_answer_is_what_was_said(conversations):
    for turns in conversations.answer("a", "abcdef"):
        if turns[-1] == "ab":
            conversations.stop("a")
    assert conversations.of("a").turns == ["abcdef", "ab"]
    assert said(conversations, "a", "g")[-1] == ["abcdef", "ab", "g", "g"]


@pytest.mark.parametrize(
    ("question", "message"),
    [(" ", "the question is empty"), ("long", "prompt: too long"), ("ab!", "the answer failed: RuntimeError")],
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
    old = conversations.answer("a", "abcdef")
    next(old), next(old)
    conversations.show("a", picture)
    assert len(list(old)) < 2
    assert conversations.of("a").turns == [] and said(conversations, "a", "x")[-1] == ["x", "x"]
    shown = conversations.of("a").picture
    assert conversations.of("a").chat.picture is shown and shown.size == (1501, 901)
    conversations.begin("a")
    assert conversations.of("a").picture is shown and conversations.of("a").file == picture
    conversations.show("a", None)
    assert conversations.of("a").picture is None


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


def test_only_the_last_conversations_keep_their_caches(conversations):
    tabs = [f"tab {i}" for i in range(MAX_CACHED_CONVERSATIONS + 1)]
    for tab in tabs:
        said(conversations, tab, "x")
    assert [conversations.of(tab).chat is None for tab in tabs] == [True] + [False] * MAX_CACHED_CONVERSATIONS
    assert said(conversations, tabs[0], "y")[-1] == ["x", "x", "y", "y"]  # made anew, from what was said
    assert conversations.of(tabs[0]).chat and conversations.of(tabs[1]).chat is None
    conversations.forget(tabs[0])
    assert conversations.of(tabs[0]).turns == [] and len(conversations.by_tab) == MAX_CACHED_CONVERSATIONS


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


def test_closing_waits_for_the_answers(conversations):
    answer = conversations.answer("a", "abc")
    next(answer)
    conversations.forget("a")  # its tab may be gone by then
    reader = threading.Thread(target=lambda: [time.sleep(0.05) for _ in answer])
    reader.start()
    conversations.close()
    assert not conversations.answering
    reader.join()


# ---- the server


SERVE = """
import argparse, signal, sys
from llava_jax.cli import add_command

def watch(event, args):
    host = {"socket.connect": lambda: args[1][0], "socket.getaddrinfo": lambda: args[0]}.get(event, lambda: None)()
    if host not in (None, "127.0.0.1", "localhost", "/"):
        print("elsewhere:", host, file=sys.stderr)

sys.addaudithook(watch)
signal.signal(signal.SIGINT, signal.default_int_handler)
parser = argparse.ArgumentParser()
add_command(parser, "web")
args = parser.parse_args()
args.run(args)
"""


def upload(port, size):
    """(status, reply) of putting a file of `size` bytes there, as a browser does."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/gradio_api/upload", head + bytes(size) + b"\r\n--x--\r\n", headers)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


@pytest.mark.parametrize("ending", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_it_serves_until_it_is_ended_and_sends_nothing_elsewhere(scenes_model, port, tmp_path, ending):
    pytest.importorskip("gradio", reason='pip install "llava-jax[web]"')
    command = [sys.executable, "-c", SERVE, "--model-path", str(scenes_model), "--port", str(port)]
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


@pytest.fixture(scope="module")
def bundled(scenes_model, gate):
    """(llava, params) of the bundled model."""
    import llava_jax

    llava, params = llava_jax.load(scenes_model)
    straight = llava.engine.decode

    def decode(params, prefix, state, options, max_new_tokens):
        if max_new_tokens == 5:
            gate.wait(PATIENCE / 1000)
        return straight(params, prefix, state, options, max_new_tokens)

    llava.engine.decode = decode
    return llava, params


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Files of pictures that the bundled model has not seen: one with a sign that says 44, one with YK."""
    from llava_jax.demo.held_out import held_out_scene
    from llava_jax.demo.scenes import draw

    folder = tmp_path_factory.mktemp("scenes")
    for number in (3, 6):
        draw(held_out_scene(0, number)).save(folder / f"{number}.png")
    return {"44": str(folder / "3.png"), "YK": str(folder / "6.png")}


@pytest.fixture(scope="module")
def served(bundled, tmp_path_factory):
    """(address, the conversations) of a server in this process."""
    pytest.importorskip("gradio", reason='pip install "llava-jax[web]"')
    from llava_jax.web.page import build_page, launch

    folder = str(tmp_path_factory.mktemp("uploads"))
    conversations = Conversations(*bundled)
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
        for label, value in (("Temperature", "0"), ("Max output tokens", "64")):
            number = self.page.get_by_label(f"number input for {label}")
            number.fill(value)
            number.blur()

    def _note(self, url, address):
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

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
        asked = self.page.locator("#chatbot [data-testid=user]")
        count = asked.count()
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")
        asked.nth(count).wait_for()

    def wait_for_part(self):
        """The part of an answer that is there, until the gate is opened."""
        self.page.wait_for_function("document.querySelector('#chatbot').innerText.match(/[a-z]▌/)")
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


def soon(condition):
    """Whether it comes true within a time in which a busy machine gets round to it."""
    deadline = time.monotonic() + 30
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


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
    assert soon(lambda: len(served[1].by_tab) == 1)  # the cache of who has left is free
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
    assert soon(lambda: conversation.stopped)
    gate.set()
    _, half = tab.wait()
    assert half.startswith(part) and not half.endswith(".") and conversation.turns == ["Describe the image.", half]
    tab.ask("What does the sign say?")
    assert tab.wait() == ["Describe the image.", half, "What does the sign say?", "44"]

    gate.clear()
    tab.ask("Describe the image.")
    tab.wait_for_part()
    tab.upload(scenes["YK"])
    assert soon(lambda: tab.turns() == [])
    tab.ask("What does the sign say?")  # while the other answer is still at the gate
    assert tab.wait() == ["What does the sign say?", "YK"]
    gate.set()
    assert soon(lambda: not conversation.answering.locked()) and len(conversation.turns) == 6
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
