"""The page of `llava-jax web`: what is on it, and what its buttons do. Imports gradio, so `serve` imports it late."""

from __future__ import annotations

import html
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.helpers import Examples

from llava_jax.web.conversations import Conversations

SUGGESTED = (
    "Describe the image in detail.",
    "What is unusual about this image?",
    "What are the things I should be cautious about when I visit here?",
)
MOST_ANSWERS = 32  # that are made or wait; each takes one of gradio's 40 threads, and Stop needs one too
UPLOAD_LIMIT = "64mb"  # for one picture
CURSOR = "▌"
WELCOME = "Upload a picture and ask about it. The first answers wait for the compiler."
# Answers are shown as Markdown, which may name a picture elsewhere: the browser is told to fetch nothing from there.
HEAD = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'\">"
)
CSS = """
#title { padding: 0; }
#title h1 { margin: 0; font-size: 1.4rem; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
#left thead { display: none; }
#left td .container { width: 80px; height: 56px; }
#left td img { object-fit: contain; }
"""
UNCHANGED = gr.skip()
ON, OFF = gr.update(interactive=True), gr.update(interactive=False)


class Parts(NamedTuple):
    """What is on the page."""

    picture: gr.Image
    examples: Examples
    temperature: gr.Slider
    top_p: gr.Slider
    max_new_tokens: gr.Slider
    chatbot: gr.Chatbot
    question: gr.Textbox
    send: gr.Button
    stop: gr.Button
    regenerate: gr.Button
    new: gr.Button


def build_page(conversations: Conversations, examples: list[list[str]]) -> gr.Blocks:
    """The page, for `launch`. Examples are [picture's file, question]; without any, questions are suggested."""
    name = conversations.llava.config.name
    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# LLaVA in JAX\n{name}", elem_id="title")
        parts = _lay_out(examples)
        _connect(page, parts, Events(conversations, parts.picture.GRADIO_CACHE), bool(examples))
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve it, and return: nothing is sent elsewhere, nor fetched from there."""
    # Gradio's own choice is semi-bold, whose file has a few letters only
    font = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    look: dict[str, Any] = dict(theme=gr.themes.Default(font=(font, "system-ui", "sans-serif")), head=HEAD, css=CSS)
    unwanted = "inbrowser", "share", "ssr_mode", "pwa", "mcp_server", "enable_monitoring", "run_history"
    how: dict[str, Any] = dict(prevent_thread_lock=True, quiet=True, max_file_size=UPLOAD_LIMIT, footer_links=[])
    page.launch(server_name=host, server_port=port, **look, **how, **dict.fromkeys(unwanted, False))


def _lay_out(examples: list[list[str]]) -> Parts:
    """The picture and the parameters on the left, the conversation on the right."""
    bare: dict[str, Any] = dict(show_label=False, container=False, render=False)  # it is rendered where it belongs
    hint = "Ask about the picture, and press Enter"
    question = gr.Textbox(label="Question", placeholder=hint, scale=8, elem_id="question", **bare)
    with gr.Row():
        with gr.Column(scale=4, min_width=320, elem_id="left"):
            picture = gr.Image(
                label="Picture", height=300, sources=["upload", "clipboard"], buttons=["fullscreen"], elem_id="picture"
            )
            shown = (examples, [picture, question]) if examples else ([[text] for text in SUGGESTED], [question])
            given = gr.Examples(*shown, api_visibility="private")
            with gr.Accordion("Parameters", open=False, elem_id="parameters"):
                greedy = "0: the likeliest token each time"
                temperature = gr.Slider(0, 1, 0.2, step=0.1, label="Temperature", info=greedy)
                top_p = gr.Slider(0.1, 1, 0.7, step=0.1, label="Top P")
                max_new_tokens = gr.Slider(64, 1024, 512, step=64, precision=0, label="Max output tokens")
        with gr.Column(scale=8, min_width=480):
            talk: dict[str, Any] = dict(label="Conversation", placeholder=WELCOME, allow_tags=False)
            chatbot = gr.Chatbot(height=540, buttons=["copy_all"], elem_id="chatbot", **talk)
            with gr.Row():
                question.render()
                send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
            with gr.Row():
                stop = gr.Button("Stop", size="md", interactive=False, elem_id="stop")
                regenerate = gr.Button("Regenerate", size="md", interactive=False, elem_id="regenerate")
                new = gr.Button("New conversation", size="md", elem_id="new")
    sliders = temperature, top_p, max_new_tokens
    return Parts(picture, given, *sliders, chatbot, question, send, stop, regenerate, new)


def _connect(page: gr.Blocks, parts: Parts, events: Events, with_pictures: bool) -> None:
    """What happens when; the outputs are those of `Events`."""
    shown = [parts.chatbot, parts.question, parts.send, parts.stop, parts.regenerate]
    numbers = [parts.temperature, parts.top_p, parts.max_new_tokens]
    private: dict[str, Any] = {"api_visibility": "private"}
    answers: dict[str, Any] = {"concurrency_limit": MOST_ANSWERS, "concurrency_id": "answers", **private}
    answers["show_progress"] = "minimal"
    answers["trigger_mode"] = "multiple"  # a second question gets a message, and is not dropped by the browser
    gr.on([parts.question.submit, parts.send.click], events.ask, [parts.question, *numbers], shown, **answers)
    parts.regenerate.click(events.ask_again, numbers, shown, **answers)
    parts.stop.click(events.stop, queue=False, **private)
    gr.on([parts.new.click, parts.chatbot.clear], events.begin, None, shown, show_progress="hidden", **private)
    # As it comes: gradio would open the file itself, and say of a bad one what means nothing on the page
    put: dict[str, Any] = {"preprocess": False, "show_progress": "hidden", **private}
    outputs = [parts.picture, *shown]
    gr.on([parts.picture.upload, parts.picture.clear], events.show, parts.picture, outputs, **put)
    if with_pictures:
        parts.examples.load_input_event.then(events.show, parts.picture, outputs, **put)
    page.unload(events.close)


# ---- events


def messages(turns: list[str]) -> list[dict[str, str]]:
    """As gradio's Chatbot takes them."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def uploaded_file(payload: dict | None, folder: str) -> Path | None:
    """Where in the uploads' folder the browser says that a picture is stored; None where the picture was taken away.

    Raises:
        ValueError: the browser names another file.
    """
    if payload is None:
        return None
    path = Path(str(payload["path"])).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        raise ValueError("the picture is not one that was uploaded")
    return path


def _warn(error: Exception) -> None:
    gr.Warning(html.escape(str(error)))


@dataclass(frozen=True)
class Events:
    """What the page calls. Each gives new values of the chatbot, the question, Send, Stop and Regenerate."""

    conversations: Conversations
    uploads: str  # the folder

    def ask(
        self, question: str | None, temperature: float, top_p: float, max_new_tokens: int, request: gr.Request
    ) -> Iterator[tuple]:
        """The answer as it comes. A question of None is the last one again."""
        options = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        controls = UNCHANGED if question is None else "", OFF, ON, OFF
        tab, asked = _tab(request), None
        try:
            for turns in self.conversations.answer(tab, question, seed=random.getrandbits(32), **options):
                asked = asked or self.conversations.of(tab)
                if self.conversations.of(tab) is asked:  # or else another picture has taken its place
                    yield messages([*turns[:-1], turns[-1] + CURSOR]), *controls
                    controls = (UNCHANGED,) * 4
        except ValueError as error:
            _warn(error)
            yield self._at_rest(tab, UNCHANGED if question is None else question)
        else:
            yield self._at_rest(tab)

    def ask_again(self, temperature: float, top_p: float, max_new_tokens: int, request: gr.Request) -> Iterator[tuple]:
        yield from self.ask(None, temperature, top_p, max_new_tokens, request)

    def stop(self, request: gr.Request) -> None:
        self.conversations.stop(_tab(request))

    def begin(self, request: gr.Request) -> tuple:
        """Anew, with the same picture."""
        tab = _tab(request)
        self.conversations.begin(tab)
        return self._at_rest(tab)

    def show(self, payload: dict | None, request: gr.Request) -> tuple:
        """A picture was put there or taken away; the first value is that of the picture, put back if it is none."""
        tab, file = _tab(request), None
        try:
            file = uploaded_file(payload, self.uploads)
            self.conversations.show(tab, str(file) if file else None)
        except (ValueError, OSError) as error:
            _warn(ValueError(str(error).replace(f"{file.parent}{os.sep}", "")) if file else error)
            return self.conversations.of(tab).file, *[UNCHANGED] * 5
        return UNCHANGED, *self._at_rest(tab)

    def close(self, request: gr.Request) -> None:
        self.conversations.forget(_tab(request))

    def _at_rest(self, tab: str, question=UNCHANGED) -> tuple:
        """What the page shows when nothing is being answered; nothing new while something is."""
        conversation = self.conversations.of(tab)
        if conversation.answering.locked():
            return (UNCHANGED,) * 5
        turns = conversation.turns
        return messages(turns), question, ON, OFF, ON if turns else OFF


def _tab(request: gr.Request) -> str:
    return str(request.session_hash)
