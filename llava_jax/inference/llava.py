"""`Llava`: a model as text and pictures, over an `Engine`; what `llava_jax.load` returns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from llava_jax.checkpoint import check_int8_kernels, load_config, load_params
from llava_jax.compiling import enable_compilation_cache
from llava_jax.config import LlavaConfig
from llava_jax.inference import text_requests
from llava_jax.inference.chat import Chat
from llava_jax.inference.engine import Engine, ForwardArrays
from llava_jax.inference.generation_options import GenerationOptions, generation_options
from llava_jax.inference.sampling import Sampling
from llava_jax.inference.streaming import stream_text
from llava_jax.inputs.anyres import image_length
from llava_jax.inputs.batch import as_rows, bucket_length, pack, pack_text
from llava_jax.inputs.conversation import Conversation
from llava_jax.inputs.image import as_image_list, process_image
from llava_jax.inputs.numbers import whole_number
from llava_jax.inputs.prompt import build_conversation, prompt_ids
from llava_jax.inputs.tokenizer import load_tokenizer
from llava_jax.inputs.types import Batch, ProcessedImage
from llava_jax.models.vocabulary import initialize_vision_tokenizer


class Llava:
    """A LLaVA model without its weights, which every method takes as `params`. Shapes are bucketed, so images of any
    size share a handful of compiled programs.

    Images are given as a path, URL, data URI, bytes, PIL image, uint8 array, a list of those, or None.

    Attributes:
        engine: the same model for token ids and arrays.
    """

    def __init__(
        self,
        config: LlavaConfig,
        tokenizer,
        mesh: Mesh | None = None,
        int8_prefix: bool = False,
        int8_activations: bool = False,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.engine = Engine(config, mesh, int8_prefix, int8_activations)

    # ---- one prompt

    def generate(
        self,
        params,
        image=None,
        prompt="",
        *,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] | None = None,
        conv_mode: str | None = None,
    ) -> str:
        """Answer a prompt about a picture, several, or none.

        Args:
            params: from `llava_jax.load`.
            image: a picture in any form, a list, or None.
            prompt: the question; or turns, alternating user and assistant, the last one the user's, as texts or as
                messages like {"role": "user", "content": …} (see `llava_jax.inputs.prompt.as_turns`); or a
                Conversation, used as it stands. `<image>` may be placed by hand; otherwise it goes in front.
            temperature: None is 0, greedy.
            top_p, top_k: None is as the checkpoint's generation_config has them, or 1 and 50.
            seed: None is 0.
            sampling: a Greedy or Sample in place of these four.
            stop: a string that ends the answer, or several; it is cut before them. The end-of-sequence token always
                does.
            conv_mode: the template; None is the checkpoint's.

        Returns:
            the answer, without special tokens and outer white space.

        Raises:
            ValueError: the pictures do not fit the prompt, the prompt is too long, or an option is out of range.
        """
        options = self._options(max_new_tokens, temperature, top_p, top_k, seed, sampling, stop)
        batch = self._pack_prompt(image, prompt, conv_mode)
        if options.stop:
            return "".join(self._stream(params, batch, options))
        return self.decode(self.engine.generate(params, batch, options)[0])

    def stream(
        self,
        params,
        image=None,
        prompt="",
        *,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] | None = None,
        conv_mode: str | None = None,
    ) -> Iterator[str]:
        """What `generate` returns, as it comes: never half a character, nor what may still become a stop string."""
        options = self._options(max_new_tokens, temperature, top_p, top_k, seed, sampling, stop)
        return self._stream(params, self._pack_prompt(image, prompt, conv_mode), options)

    def _stream(self, params, batch: Batch, options: GenerationOptions) -> Iterator[str]:
        started = self.engine.prefill_and_sample(params, batch, options)
        pieces = stream_text(self.engine, self.tokenizer, params, *started, options)
        yield from (piece.text for piece in pieces if piece.text)

    def _options(self, max_new_tokens, temperature, top_p, top_k, seed, sampling, stop=None) -> GenerationOptions:
        defaults = self.config.generation
        return generation_options(defaults, max_new_tokens, temperature, top_p, top_k, seed, sampling, stop)

    def _pack_prompt(self, image, prompt, conv_mode: str | None = None) -> Batch:
        images = self.load_images(image)
        ids = self.prompt_ids(prompt, [image.size for image in images], conv_mode)
        return pack([np.asarray(ids, np.int64)], images, self.config)

    def conversation(self, prompt, num_images: int = 0, conv_mode: str | None = None) -> Conversation:
        """A question, or turns, in the template that the checkpoint picks (`conv_mode` overrides)."""
        return build_conversation(self.config, prompt, num_images, conv_mode)

    def prompt_ids(self, prompt, sizes, conv_mode: str | None = None) -> list[int]:
        """Token ids of one prompt, -200 where its images, of these (width, height), go; see `inputs.prompt`."""
        return prompt_ids(self.config, self.tokenizer, prompt, sizes, conv_mode)

    def decode(self, tokens: np.ndarray) -> str:
        """An answer's tokens as the original decodes them: without special tokens and outer white space."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()

    def warmup(
        self,
        params,
        question: str = "What is in this picture?",
        max_new_tokens: int = 512,
        temperature: float | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        """Compile what `generate` needs for one picture of any size and a question about this long, before it is asked.

        With the cache on disk (on by default) this costs seconds from the second time on. Greedy decoding and sampling
        are two programs; the values of a Sample make no difference.
        """
        options = generation_options(self.config.generation, max_new_tokens, temperature, sampling=sampling)
        sides = np.geomspace(8, 4000, 40).astype(int)
        text = len(self.prompt_ids(question, [(1, 1)])) - 1
        sizes: dict[int, tuple[int, int]] = {}  # of each length
        for height, width in itertools.product(sides.tolist(), repeat=2):
            length = bucket_length(text + image_length(width, height, self.config), self.config)
            sizes.setdefault(length, (width, height))
        for size in sizes.values():
            self.engine.warmup(params, self._pack_prompt(Image.new("RGB", size), question), options)

    # ---- many questions

    def generate_batch(
        self,
        params,
        requests,
        *,
        memory_budget: int | None = None,
        max_new_tokens: int | Sequence[int] = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] | None = None,
        conv_mode: str | None = None,
    ) -> list:
        """Answer many questions; each image is encoded and prefilled once for all of its own.

        Args:
            requests: (image, questions) pairs: a picture in any form, a list of them or None; and its prompts, or one.
            memory_budget: bytes for the cache and the activations at any time; None is most of what the device has
                free (4 GiB on a CPU).
            max_new_tokens: of each answer; or one for each question, in their order: short answers make room for
                others at once. Other options are as `generate` has them.

        Returns:
            the answers, in the questions' order; a ValueError, not raised, where one, or its picture, cannot be asked.
        """
        limits = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else None
        asked: Sequence[int] = [max_new_tokens] if not isinstance(max_new_tokens, Sequence) else limits or [1]
        each = [self._options(limit, temperature, top_p, top_k, seed, sampling, stop) for limit in asked]
        options = max(each, key=lambda one: one.max_new_tokens)
        return text_requests.generate_batch(self, params, requests, memory_budget, conv_mode, options, limits)

    def chat(
        self,
        params,
        image=None,
        conv_mode: str | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Chat:
        """A conversation about a picture: `chat.send("…")`, again and again; each turn prefills only what is new."""
        options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        return Chat(self, params, image, conv_mode, options | dict(sampling=sampling, stop=stop))

    def score(
        self, params, image, question, candidates, *, memory_budget: int | None = None, conv_mode: str | None = None
    ) -> np.ndarray:
        """The log-likelihood of each candidate as the answer to a question, float32 [candidates]: the sum over its
        tokens, its end excluded. The image and the question, as `generate` takes them, are prefilled once.

        Raises:
            ValueError: the question cannot be asked, or a candidate is no text or makes it too long for the model.
        """
        return text_requests.score_candidates(self, params, image, question, candidates, memory_budget, conv_mode)

    # ---- tokens and arrays, as the reference's methods give them

    def generate_tokens(
        self,
        params,
        input_ids,
        images=None,
        *,
        attention_mask=None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
    ) -> np.ndarray:
        """The token-level twin of `generate`, whose options it has.

        Args:
            input_ids: [B, L] (or rows of different lengths), -200 where an image goes.
            images: a flat list over all rows, in any form that `generate` takes.
            attention_mask: [B, L], 0 at padding on either side, or None.

        Returns:
            int32 [B, new tokens]: no BOS, padding after a row's end-of-sequence token; each row's tokens are those it
            gives alone. As in the reference, a prompt over tokenizer_model_max_length is cut off on the right.
        """
        options = self._options(max_new_tokens, temperature, top_p, top_k, seed, sampling)
        rows, _ = as_rows(input_ids, attention_mask)
        if not all(map(len, rows)):
            raise ValueError("input_ids: a row is empty; a prompt has at least one token")
        max_length = None if images is None else self.config.tokenizer_model_max_length
        batch = pack(rows, self.load_images(images), self.config, max_length=max_length)
        return self.engine.generate(params, batch, options)

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
    ) -> ForwardArrays:
        """Logits over whole sequences (the reference's forward), as host arrays; L there is the longest merged row.

        Args:
            input_ids, images: as `generate_tokens` takes them.
            image_sizes: (width, height) of each image where it is not the image's own.
            attention_mask, labels: [B, L] or None. Without a mask, padding is attended to, as in the reference.
        """
        batch = self._pack_reference(input_ids, attention_mask, labels, images, image_sizes)
        batch.position_ids[:] = np.arange(batch.position_ids.shape[1])  # the reference counts left padding too
        out = jax.device_get(self.engine.forward(params, batch, output_hidden_states, output_attentions))
        end = int(batch.lengths.max())
        hidden_states = out.hidden_states and tuple(x[:, :end] for x in out.hidden_states)
        attentions = out.attentions and tuple(x[:, :, :end, :end] for x in out.attentions)
        return ForwardArrays(out.logits[:, :end], out.loss, hidden_states, attentions)

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
        embeds = np.asarray(self.engine.embed_multimodal(params, batch))[:, :end]
        positions = None if position_ids is None else batch.position_ids[:, :end]
        mask = None if attention_mask is None else batch.attention_mask[:, :end]
        labels = None if batch.labels is None else batch.labels[:, :end]
        return None, positions, mask, past_key_values, embeds, labels

    def _pack_reference(self, input_ids, attention_mask, labels, images, image_sizes) -> Batch:
        if images is None:
            return pack_text(input_ids, attention_mask, labels, self.config)
        rows, targets = as_rows(input_ids, attention_mask, labels)
        shown = self.load_images(images)
        if image_sizes is not None:
            sizes = _read_sizes(image_sizes, len(shown))
            shown = [replace(image, size=size) for image, size in zip(shown, sizes, strict=True)]
        side, most = self.config.tokenizer_padding_side, self.config.tokenizer_model_max_length
        layout: dict[str, Any] = dict(padding_side=side, max_length=most, attend_to_padding=attention_mask is None)
        return pack(rows, shown, self.config, labels=targets, **layout)

    def encode_images(self, params, images) -> list[np.ndarray]:
        """Each image's projected features, [T, tokens_per_tile, E], before merging."""
        return [np.asarray(self.engine.encode_images(params, image.tiles)) for image in self.load_images(images)]

    def load_images(self, images) -> list[ProcessedImage]:
        """Pictures in any form, a list of them, or None."""
        return [process_image(image, self.config) for image in as_image_list(images)]


def _read_sizes(image_sizes, count: int) -> list[tuple[int, int]]:
    if len(image_sizes) != count:
        raise ValueError(f"image_sizes: got {len(image_sizes)} for {count} images")
    if any(np.shape(size) != (2,) for size in image_sizes):
        raise ValueError("image_sizes: expected (width, height) of each image")
    checked = partial(whole_number, "image_sizes", least=1, most=2**31 - 1)
    return [(checked(width), checked(height)) for width, height in image_sizes]


def load(
    directory,
    dtype=None,
    mesh=None,
    reading: str | None = None,
    quantize: str | None = None,
    quantize_also=(),
    int8_prefix: bool = False,
    int8_activations: bool = False,
) -> tuple[Llava, dict]:
    """A converted checkpoint, ready to use.

    A small file that is not what the conversion wrote is warned about; the parameters' checksums are compared by
    `llava-jax verify DIR --quick` only, for that takes longer than this may.

    Args:
        directory: what `convert/from_hf.py` wrote.
        dtype: of the parameters, and so of the arithmetic; None is float32 on CPU and bfloat16 on a GPU or TPU (float16
            on a GPU before Ampere, which has no bfloat16).
        mesh: a `jax.sharding.Mesh` to shard the parameters over (see `llava_jax.make_mesh`); None is one device.
        reading: "llava-hf" for transformers' reading of the same weights (see `LlavaConfig`); None is the original's.
        quantize: "int8" to hold the kernels of the decoder's and the tower's layers so, whatever is stored; None is as
            stored. quantize_also: of "lm_head" and "mm_projector", those to be made int8 too.
        int8_prefix: cache the keys and values of prompts as int8.
        int8_activations: prefill prompts and questions by products of int8 by int8, with a scale for each token; the
            kernels must be int8.

    Returns:
        (Llava, params)

    Raises:
        FileNotFoundError, ValueError: the directory is missing, not ours, half-written or of another version.
    """
    enable_compilation_cache()
    config = load_config(directory)
    config = config if reading is None else config.replace(reading=reading)
    if int8_activations:
        check_int8_kernels(directory, quantize)
    tokenizer = load_tokenizer(directory, config.name, config.reading)
    params = load_params(directory, config, dtype, mesh, quantize, quantize_also)
    if config.mm_use_im_start_end:  # in case its tokenizer files lack them, as the original's builder does
        params, config, tokenizer = initialize_vision_tokenizer(params, config, tokenizer)
    return Llava(config, tokenizer, mesh, int8_prefix, int8_activations), params
