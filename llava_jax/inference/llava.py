"""`Llava`: a config, a tokenizer and the jitted functions of one model; what `llava_jax.load` returns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from llava_jax.checkpoint import load_config, load_params
from llava_jax.config import LlavaConfig
from llava_jax.inference import generate as device
from llava_jax.inference.batching import answer_requests, score_candidates
from llava_jax.inference.chat import Chat, fold
from llava_jax.inference.compiling import LoggedJit, enable_compilation_cache
from llava_jax.inference.generate import DecodeState
from llava_jax.inference.generation_options import plan_decode, stop_strings
from llava_jax.inputs.anyres import num_image_tokens
from llava_jax.inputs.batch import as_rows, bucket_length, pack, pack_text
from llava_jax.inputs.conversation import Conversation
from llava_jax.inputs.detokenizer import IncrementalDetokenizer
from llava_jax.inputs.groups import no_questions
from llava_jax.inputs.image import as_image_list, process_image
from llava_jax.inputs.numbers import whole_number
from llava_jax.inputs.prompt import build_conversation, prompt_ids
from llava_jax.inputs.tokenizer import load_tokenizer
from llava_jax.inputs.types import Batch
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM
from llava_jax.models.ops import causal_lm_loss
from llava_jax.models.vocabulary import initialize_vision_tokenizer

STOP_CHUNK = 16  # tokens decoded between two looks for a stop string


class ForwardOutput(NamedTuple):
    """What the reference's forward returns."""

    logits: jax.Array  # float32 [B, L, V]
    loss: jax.Array | None
    hidden_states: tuple[jax.Array, ...] | None  # layers + 1 of [B, L, E], the last one normed
    attentions: tuple[jax.Array, ...] | None  # for each layer [B, H, L, L]


def _forward(model, output_hidden_states, output_attentions, with_loss, params, batch: Batch):
    logits, hidden, attentions = model.apply({"params": params}, batch, output_attentions)
    loss = causal_lm_loss(logits, batch.labels) if with_loss else None
    return logits, loss, hidden if output_hidden_states else None, attentions if output_attentions else None


def _call(method, model, params, *args):
    return model.apply({"params": params}, *args, method=method)


class Llava:
    """A LLaVA model without its weights, which every method takes as `params`. All jitted functions are built here,
    once; shapes are bucketed, so images of any size share a handful of compiled programs.

    Images are given as a path, URL, data URI, bytes, PIL image, uint8 array, a list of those, or None.
    """

    def __init__(self, config: LlavaConfig, tokenizer, mesh=None, int8_prefix: bool = False):
        self.config = config
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.model = model = LlavaLlamaForCausalLM(config, int8_prefix=int8_prefix)

        def jitted(name: str, function, **options) -> LoggedJit:
            return LoggedJit(name, jax.jit(partial(function, model), **options), mesh)

        self._generate = jitted("generate", device.generate, static_argnums=0)
        self._start = jitted("start", device.start, static_argnums=0)
        self._run = jitted("decode", device.run, donate_argnums=2)
        self._prefill = jitted("prefill", device.prefill)
        self._first = jitted("first token", device.first, static_argnums=0)
        self._answer = jitted("answer", device.answer, static_argnums=0)
        self._score = jitted("score", device.score)
        self._forward = jitted("forward", _forward, static_argnums=(0, 1, 2))
        self._encode = jitted("encode_images", partial(_call, "encode_images"))
        self._embed = jitted("embed_multimodal", partial(_call, "embed_multimodal"))
        self._fold = LoggedJit("fold", jax.jit(fold, static_argnums=(0, 1)), mesh)
        self._join = LoggedJit("join", jax.jit(device.join, static_argnums=0), mesh)

    # ---- text

    def generate(self, params, image=None, prompt="", *, stop: str | Sequence[str] = (), **options) -> str:
        """Answer a prompt about a picture, several, or none.

        Args:
            params: from `llava_jax.load`.
            image: a picture in any form, a list, or None.
            prompt: the question; or turns, alternating user and assistant, the last one the user's, as texts or as
                messages like {"role": "user", "content": …} (see `llava_jax.inputs.prompt.as_turns`); or a
                Conversation, used as it stands. `<image>` may be placed by hand; otherwise it goes in front.
            stop: a string that ends the answer, or several; it is cut before them. The end-of-sequence token always
                does.
            options: `max_new_tokens` (512), `temperature` (0: greedy), `top_p` and `top_k` (where the checkpoint's
                generation_config says nothing: 1 and 50), `seed` (0), or instead `sampling`, a Greedy or Sample;
                `conv_mode` (picked from the checkpoint).

        Returns:
            the answer, without special tokens and outer white space.

        Raises:
            ValueError: the pictures do not fit the prompt, the prompt is too long, or an option is out of range.
        """
        if stop := stop_strings(stop):
            return "".join(self.stream(params, image, prompt, stop=stop, **options))
        batch, options = self._one_prompt(image, prompt, **options)
        tokens = self._tokens(params, batch, **options)
        return self.tokenizer.decode(tokens[0].tolist(), skip_special_tokens=True).strip()

    def stream(self, params, image=None, prompt="", *, stop: str | Sequence[str] = (), **options) -> Iterator[str]:
        """`generate`, yielding text as it comes: never half a character, nor what may still become a stop string.

        The pieces joined are exactly what `generate` returns.
        """
        batch, options = self._one_prompt(image, prompt, **options)
        slots, limit, sampling = self.plan_decode(**options)
        return self._stream(params, batch, slots, limit, sampling, stop_strings(stop))

    def _stream(self, params, batch, slots, limit, sampling, stop) -> Iterator[str]:
        prefix, state = self._start(slots, params, batch, no_questions(len(batch.index)), sampling)
        yield from (piece for piece, _ in self.decode(params, prefix, state, limit, sampling, stop) if piece)

    def decode(self, params, prefix, state, limit, sampling, stop=()) -> Iterator[tuple[str, DecodeState]]:
        """One row's text as it comes, each piece (some are empty) with the state of the loop after it."""
        text = IncrementalDetokenizer(self.tokenizer, stop)
        seen, chunk = 0, STOP_CHUNK if stop else 1
        while True:
            tokens, step = np.asarray(state.tokens)[0, 0], int(state.step)
            finished = step >= limit or bool(np.all(state.done))
            for token in tokens[seen:step].tolist():
                yield text.push(token), state
            if finished or text.stopped:
                break
            seen = step
            state = self._run(params, prefix, state, sampling, np.int32(min(limit, step + chunk)))
        yield text.flush(), state

    def _one_prompt(self, image, prompt, conv_mode: str | None = None, **options) -> tuple[Batch, dict]:
        """One prompt and its pictures, packed, and the other options."""
        tiles, sizes = self.load_images(image)
        return self._pack_prompts([self.prompt_ids(prompt, sizes, conv_mode)], tiles, sizes), options

    def conversation(self, prompt, num_images: int = 0, conv_mode: str | None = None) -> Conversation:
        """A question, or turns, in the template that the checkpoint picks (`conv_mode` overrides)."""
        return build_conversation(self.config, prompt, num_images, conv_mode)

    def prompt_ids(self, prompt, sizes, conv_mode: str | None = None) -> list[int]:
        """Token ids of one prompt, -200 where its images, of these (width, height), go.

        Raises:
            ValueError: the images do not fit the prompt, it is too long for the model, or it is no text.
        """
        return prompt_ids(self.config, self.tokenizer, prompt, sizes, conv_mode)

    def warmup(self, params, question: str = "What is in this picture?", max_new_tokens: int = 512, **options) -> None:
        """Compile what `generate` needs for one picture of any size and a question about this long, before it is asked.

        With the cache on disk (on by default) this costs seconds from the second time on.
        """
        slots, _, sampling = self.plan_decode(max_new_tokens, **options)
        sides = np.geomspace(8, 4000, 40).astype(int)
        text = len(self.prompt_ids(question, [(1, 1)])) - 1
        sizes: dict[int, tuple[int, int]] = {}  # of each length
        for height, width in itertools.product(sides.tolist(), repeat=2):
            length = bucket_length(text + int(num_image_tokens(width, height, self.config)), self.config)
            sizes.setdefault(length, (width, height))
        for size in sizes.values():
            batch, _ = self._one_prompt(Image.new("RGB", size), question)
            self._generate(slots, params, batch, no_questions(1), sampling, np.int32(1))

    # ---- many questions

    def generate_batch(self, params, requests, *, memory_budget: int | None = None, conv_mode=None, **options) -> list:
        """Answer many questions; each image is encoded and prefilled once for all of its own.

        Args:
            requests: (image, questions) pairs: a picture in any form, a list of them or None, and its prompts, or
                one prompt.
            memory_budget: bytes for the cache and the activations at any time; None is most of what the device has
                free (4 GiB on a CPU).
            options: as `generate` has them, without `stop`.

        Returns:
            the answers, in the order of the questions; a ValueError, not raised, where one cannot be asked, for
            its own sake or for its picture's.
        """
        return answer_requests(self, params, requests, memory_budget, conv_mode, self.plan_decode(**options))

    def chat(self, params, image=None, conv_mode: str | None = None, **options) -> Chat:
        """A conversation about a picture: `chat.send("…")`, again and again; each turn prefills only what is new."""
        return Chat(self, params, image, conv_mode, **options)

    def score(self, params, image, question, candidates, *, memory_budget=None, conv_mode=None) -> np.ndarray:
        """The log-likelihood of each candidate as the answer to a question: the sum over its tokens, its end excluded.

        Args:
            image, question: as `generate` takes them.
            candidates: answers, texts; or one.

        Returns:
            float32 [candidates]. The image and the question are prefilled once.

        Raises:
            ValueError: the question cannot be asked, or a candidate is no text or makes it too long for the model.
        """
        return score_candidates(self, params, image, question, candidates, memory_budget, conv_mode)

    # ---- tokens

    def generate_tokens(self, params, input_ids, images=None, *, attention_mask=None, **options) -> np.ndarray:
        """The token-level twin of `generate`.

        Args:
            input_ids: [B, L] (or rows of different lengths), -200 where an image goes.
            images: a flat list over all rows, in any form that `generate` takes.
            attention_mask: [B, L], 0 at padding on either side, or None.
            options: `max_new_tokens`, `temperature`, `top_p`, `top_k`, `seed`.

        Returns:
            int32 [B, new tokens]: no BOS, padding after a row's end-of-sequence token; each row's tokens are those it
            gives alone. As in the reference, a prompt over tokenizer_model_max_length is cut off on the right.
        """
        rows, _ = as_rows(input_ids, attention_mask)
        return self._tokens(
            params, self._pack_prompts(rows, *self.load_images(images), cut=images is not None), **options
        )

    def _tokens(self, params, batch: Batch, **options) -> np.ndarray:
        slots, limit, sampling = self.plan_decode(**options)
        tokens, steps = self._generate(slots, params, batch, no_questions(len(batch.index)), sampling, limit)
        return np.asarray(tokens)[:, 0, : int(steps)]

    def plan_decode(self, max_new_tokens: int = 512, sampling=None, **numbers):
        """See `llava_jax.inference.generation_options.plan_decode`."""
        return plan_decode(self.config.generation, max_new_tokens, sampling, **numbers)

    def _pack_prompts(self, rows, tiles, sizes, cut: bool = False) -> Batch:
        rows = [np.asarray(row, np.int64) for row in rows]
        if not all(map(len, rows)):
            raise ValueError("input_ids: a row is empty; a prompt has at least one token")
        max_length = self.config.tokenizer_model_max_length if cut else None
        return pack(rows, [np.full(len(row), -100) for row in rows], tiles, sizes, self.config, max_length=max_length)

    # ---- arrays, as the reference's methods give them

    def forward(
        self,
        params,
        input_ids,
        images=None,
        image_sizes=None,
        attention_mask=None,
        labels=None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ForwardOutput:
        """Logits over whole sequences (the reference's forward).

        Args:
            input_ids: int [B, L], -200 where an image goes.
            images: a flat list, in any form that `generate` takes.
            image_sizes: (width, height) of each image where it is not the image's own.
            attention_mask, labels: [B, L] or None. Without a mask, padding is attended to, as in the reference.

        Returns:
            ForwardOutput; L there is the longest merged row.
        """
        batch = self._pack_reference(input_ids, attention_mask, labels, images, image_sizes)
        counted = np.broadcast_to(np.arange(batch.index.shape[1], dtype=np.int32), batch.index.shape)
        batch = batch._replace(position_ids=counted)  # the reference counts left padding too
        wanted = bool(output_hidden_states), bool(output_attentions), labels is not None
        out = self._forward(*wanted, params, batch)
        logits, loss, hidden_states, attentions = jax.device_get(out)
        end = int(batch.lengths.max())
        return ForwardOutput(
            logits[:, :end],
            loss,
            tuple(x[:, :end] for x in hidden_states) if output_hidden_states else None,
            tuple(x[:, :, :end, :end] for x in attentions) if output_attentions else None,
        )

    def prepare_inputs_labels_for_multimodal(
        self, params, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """The reference's method: ids and images in; embeddings, and what belongs to them, out.

        Returns:
            (None, position_ids, attention_mask, past_key_values, inputs_embeds [B, L, E], labels), None where None
            went in; everything unchanged, with inputs_embeds None, where there are no images or rows of one token.
        """
        if images is None or len(input_ids[0]) == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        batch = self._pack_reference(input_ids, attention_mask, labels, images, image_sizes)
        end = int(batch.lengths.max())
        embeds = np.asarray(self._embed(params, batch))[:, :end]
        positions = None if position_ids is None else batch.position_ids[:, :end]
        mask = None if attention_mask is None else batch.attention_mask[:, :end]
        return None, positions, mask, past_key_values, embeds, None if labels is None else batch.labels[:, :end]

    def _pack_reference(self, input_ids, attention_mask, labels, images, image_sizes) -> Batch:
        if images is None:
            return pack_text(input_ids, attention_mask, labels, self.config)
        rows, targets = as_rows(input_ids, attention_mask, labels)
        tiles, sizes = self.load_images(images)
        if image_sizes is not None:
            sizes = _read_sizes(image_sizes, len(sizes))
        return pack(
            rows,
            targets,
            tiles,
            sizes,
            self.config,
            padding_side=self.config.tokenizer_padding_side,
            max_length=self.config.tokenizer_model_max_length,
            attend_to_padding=attention_mask is None,
        )

    def encode_images(self, params, images) -> list[np.ndarray]:
        """Each image's projected features, [tiles, tokens_per_tile, E], before merging."""
        tiles, _ = self.load_images(images)
        return [np.asarray(self._encode(params, tile)) for tile in tiles]

    def load_images(self, images) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
        """(tiles, sizes) of pictures in any form."""
        processed = [process_image(image, self.config) for image in as_image_list(images)]
        return [image.tiles for image in processed], [image.size for image in processed]


def _read_sizes(image_sizes, count: int) -> list[tuple[int, int]]:
    """The caller's (width, height) of each image."""
    if len(image_sizes) != count:
        raise ValueError(f"image_sizes: got {len(image_sizes)} for {count} images")
    if any(np.shape(size) != (2,) for size in image_sizes):
        raise ValueError("image_sizes: expected (width, height) of each image")
    width, height = ([whole_number("image_sizes", size[i], 1, 2**31 - 1) for size in image_sizes] for i in (0, 1))
    return list(zip(width, height, strict=True))


def load(
    directory,
    dtype=None,
    mesh=None,
    reading: str | None = None,
    quantize: str | None = None,
    quantize_also=(),
    int8_prefix: bool = False,
) -> tuple[Llava, dict]:
    """A converted checkpoint, ready to use.

    A small file that is not what the conversion wrote is warned about; the parameters' checksums are compared by
    `llava-jax verify DIR --quick` only, for that takes longer than this may.

    Args:
        directory: what `convert/from_hf.py` wrote.
        dtype: of the parameters, and so of the arithmetic; None is float32 on CPU and bfloat16 on a GPU or TPU.
        mesh: a `jax.sharding.Mesh` to shard the parameters over (see `llava_jax.make_mesh`); None is one device.
        reading: "llava-hf" for transformers' reading of the same weights (see `LlavaConfig`); None is the original's.
        quantize: "int8" to hold the kernels of the decoder's and the tower's layers so, whatever is stored; None is as
            stored. quantize_also: of "lm_head" and "mm_projector", those to be made int8 too.
        int8_prefix: cache the keys and values of prompts as int8.

    Returns:
        (Llava, params)

    Raises:
        FileNotFoundError, ValueError: the directory is missing, not ours, half-written or of another version.
    """
    enable_compilation_cache()
    config = load_config(directory)
    config = config if reading is None else config.replace(reading=reading)
    tokenizer = load_tokenizer(directory, config.name, config.reading)
    params = load_params(directory, config, dtype, mesh, quantize, quantize_also)
    if config.mm_use_im_start_end:  # in case its tokenizer files lack them, as the original's builder does
        params, config, tokenizer = initialize_vision_tokenizer(params, config, tokenizer)
    return Llava(config, tokenizer, mesh, int8_prefix), params
