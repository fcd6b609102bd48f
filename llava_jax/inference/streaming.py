"""One row's tokens as text, as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llava_jax.inference.cache import Prefix
from llava_jax.inference.engine import Engine
from llava_jax.inference.generate import DecodeState
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.inputs.detokenizer import IncrementalDetokenizer

STOP_CHUNK = 16  # tokens decoded between two looks for a stop string


class Piece(NamedTuple):
    """Some text that is final, perhaps empty, and the decode loop's state, which the next piece uses up."""

    text: str
    state: DecodeState


def stream_text(
    engine: Engine, tokenizer, params, prefix: Prefix, state: DecodeState, options: GenerationOptions
) -> Iterator[Piece]:
    """Decode one row (G = R = 1) to its end, or to a stop string."""
    text = IncrementalDetokenizer(tokenizer, options.stop)
    seen, chunk = 0, STOP_CHUNK if options.stop else 1
    while True:
        tokens, step = np.asarray(state.tokens)[0, 0], int(state.step)
        finished = step >= options.max_new_tokens or bool(np.all(state.done))
        for token in tokens[seen:step].tolist():
            yield Piece(text.push(token), state)
        if finished or text.stopped:
            break
        seen = step
        state = engine.decode(params, prefix, state, options, min(options.max_new_tokens, step + chunk))
    yield Piece(text.flush(), state)
