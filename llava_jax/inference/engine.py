"""`Engine`: every jitted program of inference, for one model on one mesh. Arrays in, arrays out; it knows no text."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from llava_jax.compiling import LoggedJit, compiler_options
from llava_jax.config import LlavaConfig
from llava_jax.inference import cache, generate
from llava_jax.inference.batch_programs import BatchPrograms
from llava_jax.inference.cache import Prefix
from llava_jax.inference.generate import DecodeState
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.inputs.groups import CacheLayout, no_questions
from llava_jax.inputs.types import Batch, Questions
from llava_jax.models.cache_attention import keeps_scores
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM
from llava_jax.models.ops import causal_lm_loss
from llava_jax.parallel.sharding import batch_sharding, num_batch_shards

ATTENTION_ROWS = 16  # rows are asked for in multiples of it, so that answers of many lengths share a program


class ForwardArrays(NamedTuple):
    """What `Engine.forward` returns; None where it was not asked for."""

    logits: jax.Array  # float32 [B, L, V]
    loss: jax.Array | None
    hidden_states: tuple[jax.Array, ...] | None  # layers + 1 of [B, L, E], the last one normed
    attentions: tuple[jax.Array, ...] | None  # for each layer [B, H, L, L]


def _forward(model, output_hidden_states: bool, output_attentions: bool, params, batch: Batch) -> ForwardArrays:
    logits, hidden, attentions = model.apply({"params": params}, batch, output_attentions)
    loss = None if batch.labels is None else causal_lm_loss(logits, batch.labels)
    hidden_states = tuple(hidden) if output_hidden_states else None
    return ForwardArrays(logits, loss, hidden_states, tuple(attentions) if output_attentions else None)


def _call(method: str, model, params, *args):
    return model.apply({"params": params}, *args, method=method)


class Engine:
    """A model without its weights, which every method takes as `params`.

    Batches and questions come from `inputs.batch.pack` and `inputs.groups.pack_questions`, whose buckets let a handful
    of compiled programs serve every input. G prefixes have R rows each (see `inference.generate`).
    """

    def __init__(
        self,
        config: LlavaConfig,
        mesh: jax.sharding.Mesh | None = None,
        int8_prefix: bool = False,
        int8_activations: bool = False,
    ):
        self.config, self.mesh = config, mesh
        model = LlavaLlamaForCausalLM(config, int8_prefix=int8_prefix, int8_activations=int8_activations)
        self.model = model

        def program(name: str, function, updates_suffix: bool = False, **options) -> LoggedJit:
            compiler = compiler_options(mesh, updates_suffix)
            return LoggedJit(name, jax.jit(function, compiler_options=compiler, **options), mesh)

        def of_model(name: str, function, **options) -> LoggedJit:
            return program(name, partial(function, model), **options)

        self._generate = of_model("generate", generate.generate, updates_suffix=True, static_argnums=0)
        self._prefill_and_sample = of_model("start", generate.prefill_and_sample, static_argnums=0)
        self._decode = of_model("decode", generate.decode_loop, updates_suffix=True, donate_argnums=2)
        self._prefill = of_model("prefill", generate.prefill)
        self._first_token = of_model("first token", generate.sample_first_token, static_argnums=0)
        self._append_to_prefix = program("append", cache.append_to_prefix, static_argnums=(0, 1))
        self._forward = of_model("forward", _forward, static_argnums=(0, 1))
        self._encode_images = of_model("encode_images", partial(_call, "encode_images"))
        self._embed_multimodal = of_model("embed_multimodal", partial(_call, "embed_multimodal"))
        self._attention_rows = of_model("attention", partial(_call, "attention_rows"), static_argnums=3)
        self._tower_attention = of_model("tower attention", partial(_call, "tower_attention"), static_argnums=2)
        self.batch = BatchPrograms(program, model, mesh)

    # ---- tokens

    def generate(self, params, batch: Batch, options: GenerationOptions) -> np.ndarray:
        """Whole prompts to tokens, int32 [B, new tokens]; padding after a row's end-of-sequence token."""
        tokens, steps = self._run_generate(params, batch, options, options.max_new_tokens)
        return np.asarray(tokens)[:, 0, : int(steps)]

    def warmup(self, params, batch: Batch, options: GenerationOptions) -> None:
        """Compile what `generate` needs for batches of these shapes."""
        self._run_generate(params, batch, options, 1)

    def _run_generate(self, params, batch: Batch, options: GenerationOptions, max_new_tokens: int):
        questions, limit = no_questions(len(batch.lengths)), np.int32(max_new_tokens)
        return self._generate(options.output_capacity, params, batch, questions, options.sampling, limit)

    def prefill(self, params, batch: Batch) -> tuple[Prefix, jax.Array]:
        """(Prefix, G = B; last hidden states [G, E])"""
        return self._prefill(params, batch)

    def prefill_and_sample(self, params, batch: Batch, options: GenerationOptions) -> tuple[Prefix, DecodeState]:
        """Whole prompts to their cache and first tokens; `decode` goes on."""
        questions = no_questions(len(batch.lengths))
        return self._prefill_and_sample(options.output_capacity, params, batch, questions, options.sampling)

    def sample_first_token(
        self, params, prefix: Prefix, questions: Questions, options: GenerationOptions
    ) -> DecodeState:
        """Questions of one token or more to the state after their first tokens; `decode` goes on."""
        return self._first_token(options.output_capacity, params, prefix, None, questions, options.sampling)

    def decode(
        self, params, prefix: Prefix, state: DecodeState, options: GenerationOptions, max_new_tokens: int
    ) -> DecodeState:
        """Until every row is done or has `max_new_tokens`, at most those of the options. `state` is used up."""
        return self._decode(params, prefix, state, options.sampling, np.int32(max_new_tokens))

    # ---- the cache

    @property
    def num_shards(self) -> int:
        """How many devices divide prefixes, and the rows of a batch, among themselves."""
        return num_batch_shards(self.mesh)

    def cache_layout(self, params) -> CacheLayout:
        """How keys and values lie on this mesh, in the dtype of these parameters."""
        tensor = 1 if self.mesh is None else self.mesh.shape.get("tensor", 1)
        dtype = generate.activation_dtype(params)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            scores = keeps_scores(self.config.text.head_dim, dtype)
        return CacheLayout(dtype.itemsize, self.num_shards, tensor, self.model.int8_prefix, scores)

    def place(self, arrays):
        """A tree of arrays with a batch's rows, or G, in front: each shard's on the devices of that shard."""
        return arrays if self.mesh is None else jax.device_put(arrays, batch_sharding(self.mesh))

    def append_to_prefix(self, prefix: Prefix, state: DecodeState, question: Questions, capacity: int) -> Prefix:
        """The only row's question and answer behind its prefix; see `cache.append_to_prefix` for what is valid."""
        length = np.int32(question.lengths[0, 0])
        return self._append_to_prefix(capacity, question.ids.shape[-1], prefix, state.suffix, length)

    # ---- whole sequences

    def forward(
        self, params, batch: Batch, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> ForwardArrays:
        """Logits over whole rows, and the loss where the batch has labels."""
        return self._forward(bool(output_hidden_states), bool(output_attentions), params, batch)

    def encode_images(self, params, tiles) -> jax.Array:
        """uint8 tiles [T, S, S, 3] → projected features [T, tokens_per_tile, E]."""
        return self._encode_images(params, tiles)

    def embed_multimodal(self, params, batch: Batch) -> jax.Array:
        """The merged sequence, [B, L, E]."""
        return self._embed_multimodal(params, batch)

    def attention_rows(self, params, batch: Batch, positions, mean_heads: bool = False) -> np.ndarray:
        """What the positions, int [A], look at in every decoder layer: float32 [layers, B, H, A, L].

        The same positions in each row of the batch; `mean_heads` leaves H out.
        """
        padded = np.pad(np.asarray(positions, np.int32), (0, -len(positions) % ATTENTION_ROWS), mode="edge")
        weights = self._attention_rows(params, batch, padded, bool(mean_heads))
        return np.asarray(weights)[..., : len(positions), :]

    def tower_attention(self, params, tiles: np.ndarray, layer: int) -> np.ndarray:
        """uint8 tiles [T, S, S, 3] → the attention of one layer of the CLIP tower, float32 [T, H, 1 + N, 1 + N]."""
        return np.asarray(self._tower_attention(params, tiles, layer))
