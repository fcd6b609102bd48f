"""What a request says about decoding → the engine's options, one for each of its answers."""

from __future__ import annotations

import secrets

from llava_jax.config import GenerationDefaults
from llava_jax.inference.requests import MOST_END_IDS, RowOptions
from llava_jax.inference.sampling import LEAST_TEMPERATURE, Greedy, Sample, Sampling, validate
from llava_jax.serve.protocol import AnyRequest, wrong

SEEDS = 2**32
LEAST_TOP_P = 1e-9  # with it only the likeliest token is left, which is what 0 asks for


def row_options(request: AnyRequest, defaults: GenerationDefaults, room: int) -> list[RowOptions]:
    """The options of each of a prompt's `n` answers: answer i has the seed `seed + i`, or one drawn by chance.

    Args:
        defaults: the checkpoint's, for what the request leaves out.
        room: tokens that the context has left; more than that is never asked for.

    Raises:
        ApiError: too many tokens end an answer.
    """
    own = () if request.ignore_eos else defaults.eos_token_ids
    end_ids = tuple(dict.fromkeys([*own, *request.stop_token_ids]))
    if len(end_ids) > MOST_END_IDS:
        raise wrong("stop_token_ids", f"with the model's own they are more than {MOST_END_IDS}", "invalid_value")
    most = min(room, room if request.most_tokens is None else request.most_tokens)
    seeds = [secrets.randbelow(SEEDS) if request.seed is None else (request.seed + i) % SEEDS for i in range(request.n)]
    return [
        RowOptions(
            max_new_tokens=most,
            end_ids=end_ids,
            sampling=_sampling(request, defaults, seed),
            min_new_tokens=min(request.min_tokens, most),
            top_logprobs=request.most_likely,
        )
        for seed in seeds
    ]


def _sampling(request: AnyRequest, defaults: GenerationDefaults, seed: int) -> Sampling:
    top_k = defaults.top_k if request.top_k is None else max(request.top_k, 0)  # vLLM's -1 is off, as 0 is
    top_p = defaults.top_p if request.top_p is None else request.top_p
    temperature, penalty = request.temperature, request.repetition_penalty
    if temperature < LEAST_TEMPERATURE:
        if penalty == 1:
            return Greedy()
        temperature, top_k = 1.0, 1
    return validate(Sample(temperature, top_k, max(top_p, LEAST_TOP_P), request.min_p, penalty, seed))
