"""The model `llava_jax` of lmms-eval (`pip install "llava-jax[lmms-eval]"`), over `llava_jax.evaluation.harness`.

Source of the interface: `lmms_eval/api/model.py`, and `models/simple/llava.py` for what is asked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from llava_jax.errors import reason_of
from llava_jax.evaluation.harness import Harness, HarnessOptions
from llava_jax.evaluation.harness_prompts import Turns, from_context, from_messages, options_of
from llava_jax.evaluation.harness_requests import HarnessRequest
from llava_jax.inference.generation_options import GenerationOptions
from llava_jax.parallel.mesh_axes import parse_axes

KNOWN = "pretrained, conv_template, mesh, dtype, quantize, int8_prefix, int8_activations, seed, cache and distributed"


class LlavaJax(lmms):
    """Asked by chat messages, in lmms-eval's words.

    Args, as `--model_args name=value,…`:
        pretrained: a directory that `llava-jax convert` wrote.
        conv_template: the prompt template; by default, what lmms-eval's users give `llava` for this checkpoint.
        mesh: of each process's own devices, like data=2,tensor=4; by default all of them. A shell takes the quotes
            away that would keep its parts together, so they are also taken apart: mesh=data=2,tensor=4.
        dtype, quantize, int8_prefix, int8_activations: as `llava_jax.load` takes them.
        seed: of the first answer that is drawn to a question; each further one has the next.
        cache: a folder, local or gs://, of what was answered: a run that was killed goes on.
        distributed: one of a pod's processes: `jax.distributed.initialize()` first. Each answers its share.
        batch_size, max_batch_size, device: lmms-eval's own, of no use here.

    Raises:
        FileNotFoundError, ValueError, OSError: one of them is not right.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        conv_template: str | None = None,
        mesh: str | None = None,
        data: int | None = None,
        tensor: int | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        int8_prefix: bool = False,
        int8_activations: bool = False,
        seed: int = 0,
        cache: str | None = None,
        distributed: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown,
    ):
        super().__init__()
        if unknown or pretrained is None:
            wrong = f"no {', '.join(unknown)}" if unknown else "pretrained=DIR, which is missing"
            raise ValueError(f"--model_args: llava_jax takes {wrong}; it knows {KNOWN}")
        if distributed:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                others = f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that accelerate or torchrun divides the documents"
                raise ValueError(f"--model_args distributed=true: {others}; leave one of the two out")
            jax.distributed.initialize()
        self._seed = seed
        self.harness = Harness(
            HarnessOptions(
                str(pretrained),
                conv_template,
                _axes(mesh, data, tensor),
                dtype,
                quantize,
                int8_prefix,
                int8_activations,
                None if cache is None else str(cache),
            )
        )

    @property
    def device(self):
        """Where lmms-eval puts what its own processes tell each other."""
        return self.accelerator.device if hasattr(self, "accelerator") else "cpu"

    def clean(self) -> None:
        """Called when all is answered: a judge may need the device."""
        super().clean()
        self.harness.close()

    # ---- what lmms-eval calls

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers; an empty one where a request cannot be asked."""
        return self._answer([self._first_round(request) for request in requests])

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Each request's answers, round by round; a round of all requests is asked at once."""
        said: list[list[str]] = [[] for _ in requests]
        infos: list[Any] = [None] * len(requests)
        going = [(n, self._first_round(request)) for n, request in enumerate(requests)]
        while going:
            answers = self._answer([asked for _, asked in going])
            following = []
            for (n, asked), answer in zip(going, answers, strict=True):
                said[n].append(answer)
                try:
                    turns, infos[n] = self._next_turns(requests[n], asked.document(), said[n], infos[n])
                except Exception as error:  # of the task's own code
                    print(f"{asked.name}: round {len(said[n])}: {reason_of(error)}; it ends here", file=sys.stderr)
                    continue
                if turns is not None:
                    following.append((n, HarnessRequest(asked.name, asked.document, turns, asked.options)))
            going = following
        return said

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(loss, whether it is greedy) of each continuation: lmms-eval's tasks expect losses of its models.

        lmms-eval 0.7.3 makes a text of a pair, whichever model it is from, and then fails, but not of what is in a
        `GenerationResult`.
        """
        found = self.harness.score(list(map(self._continuation, requests)), divide=self.world_size == 1)
        return [GenerationResult((likelihood.loss, likelihood.greedy)) for likelihood in found]

    def _answer(self, requests: Sequence[HarnessRequest]) -> list[str]:
        return self.harness.answer(requests, divide=self.world_size == 1)

    # ---- its requests as ours

    def _first_round(self, request: Instance) -> HarnessRequest:
        if self.is_simple:
            context, gen_kwargs, doc_to_visual, *_, doc_id, task, split = request.args

            def turns(document) -> Turns:
                return from_context(context, _flat(doc_to_visual(document)))
        else:
            context, doc_to_messages, gen_kwargs, doc_id, task, split = request.args

            def turns(document) -> Turns:
                return from_messages(doc_to_messages(document), context)

        return HarnessRequest(
            f"{task}, document {doc_id}",
            lambda: self.task_dict[task][split][doc_id],
            turns,
            self._options(task, gen_kwargs),
        )

    def _next_turns(
        self, request: Instance, document, said: Sequence[str], info
    ) -> tuple[Callable[[Any], Turns] | None, Any]:
        """The turns of the next round, or None if there is none; and what the task wants to be told then."""
        arguments = dict(round_idx=len(said), previous_output=list(said), previous_round_info=info)
        if self.is_simple:
            doc_to_text = request.args[3]
            _, _, terminal, _, info = doc_to_text(document, **arguments)

            def turns(document) -> Turns:
                visuals, context, *_ = doc_to_text(document, **arguments)
                return from_context(context, visuals)
        else:
            doc_to_messages = request.args[1]
            _, terminal, _, info = doc_to_messages(document, **arguments)

            def turns(document) -> Turns:
                return from_messages(doc_to_messages(document, **arguments)[0])

        return (None if terminal else turns), info

    def _continuation(self, request: Instance) -> HarnessRequest:
        if len(request.args) == 2:  # the continuation alone, for what it adds to its context
            context, text = request.args
            return HarnessRequest(
                f"{request.task_name}, document {request.doc_id}",
                lambda: None,
                lambda document: from_context(context, None),
                continuation=lambda document: text,
            )
        context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
        context = context[0] if isinstance(context, list) else context
        return HarnessRequest(
            f"{task}, document {doc_id}",
            lambda: self.task_dict[task][split][doc_id],
            lambda document: from_context(context, _flat(doc_to_visual(document))),
            continuation=lambda document: doc_to_target if isinstance(doc_to_target, str) else doc_to_target(document),
        )

    def _options(self, task: str, gen_kwargs: Mapping[str, Any]) -> GenerationOptions:
        try:
            return options_of(self.harness.config, gen_kwargs, self._seed)
        except ValueError as error:
            raise ValueError(f"{task}: generation_kwargs: {reason_of(error)}") from None


class LlavaJaxSimple(LlavaJax):
    """Asked by contexts and pictures, as lmms-eval's simple models are."""

    is_simple = True


def _axes(mesh: str | None, data: int | None, tensor: int | None) -> tuple[tuple[str, int], ...]:
    parts = [] if mesh is None else [mesh.strip("\"'")]
    parts += [f"{name}={size}" for name, size in (("data", data), ("tensor", tensor)) if size is not None]
    try:
        return parse_axes(",".join(parts)) if parts else ()
    except ValueError as error:
        raise ValueError(f"--model_args mesh={error}") from None


def _flat(visuals: Sequence[Any] | None) -> list[Any]:
    """A document's pictures: none if one of them is missing, as `llava` has it."""
    visuals = list(visuals or ())
    return [] if any(visual is None for visual in visuals) else visuals
