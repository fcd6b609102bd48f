"""`evaluate(options)`: questions to answers, in files as the reference's model_vqa_* programs read and write them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import jax
from etils import epath
from tqdm import tqdm

import llava_jax
from llava_jax.checkpoint import check_int8_kernels, fingerprint, load_config
from llava_jax.config import LlavaConfig
from llava_jax.evaluation.answers import AnswerFile, AnswerShard, answer_id, answer_line, failure_of
from llava_jax.evaluation.evaluate_options import EvaluateOptions
from llava_jax.evaluation.pictures import (
    LoadedOrLost,
    Picture,
    by_pictures,
    find_pictures,
    load_ahead_in_processes,
    without_lost,
)
from llava_jax.evaluation.questions import Question, get_chunk, read_questions, user_turn
from llava_jax.inference import batching
from llava_jax.inference.batching import Phase
from llava_jax.inference.generation_options import GenerationOptions, generation_options
from llava_jax.inference.llava import Llava
from llava_jax.inference.text_requests import generate_texts, group_questions
from llava_jax.inputs.conversation import Conversation, conv_templates, pick_conv_mode
from llava_jax.inputs.groups import Group
from llava_jax.inputs.sources import stands_alone
from llava_jax.parallel import multihost

MOST_NAMED_ROWS = 20  # of which something is not asked


@dataclass(frozen=True)
class Job:
    """What every process knows before any work."""

    options: EvaluateOptions
    config: LlavaConfig
    conv_mode: str  # the template's name
    generation: GenerationOptions
    file: AnswerFile  # all questions, and where their answers go

    def failure(self, question: Question, error: str) -> str:
        """The line of a question that cannot be asked; a ValueError if options are `strict`."""
        if self.options.strict:
            raise ValueError(described(question, error))
        return answer_line(question, "", self.config.name, error)

    def prompt(self, question: Question) -> Conversation:
        """A question in its template, to the letter of the reference's programs."""
        return conv_templates[self.conv_mode].with_turns([user_turn(question, self.config.mm_use_im_start_end)])


def evaluate(options: EvaluateOptions) -> list[str]:
    """Answer a file of questions; started again, it goes on where it was stopped.

    Each process takes its share of the images (`jax.distributed.initialize()` first, where there are several), and the
    first one merges the answers into one file, in the order of the questions.

    Returns:
        for each question that could not be asked, its id and why; its answer is an empty text.

    Raises:
        ValueError, FileNotFoundError: the options, files or checkpoint are not right; before any device works. With
            `strict`, also the first question that cannot be asked.
        KeyboardInterrupt: SIGINT; what is answered stays answered.
    """
    kept = f"what was answered is kept beside {options.answers_file}: start it again, everywhere, to go on"
    with multihost.abort_on_peer_failure(kept):
        job = prepare(options)
        _say_what_is_not_asked(job.file.questions)
        answered = job.file.answered()
        shard = AnswerShard(job.file.part(jax.process_index()))
        multihost.barrier("every process has its part")
        job.file.check_shared(jax.process_index(), jax.process_count())
        done = {answer_id for answer_id, line in answered.items() if not failure_of(line)}
        try:
            if len(done) < len(job.file.questions):
                _answer_share(job, shard, done)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {kept}") from None
        multihost.barrier("every question is answered")
        if multihost.is_primary():
            job.file.merge()
        multihost.barrier("the answers are merged")
        failures = {answer_id: failure_of(line) for answer_id, line in job.file.answered().items()}
        return [described(q, why) for q in job.file.questions if (why := failures.get(q.answer_id))]


def _say_what_is_not_asked(questions: Sequence[Question]) -> None:
    notes = list(dict.fromkeys(question.note for question in questions if question.note))
    if notes and multihost.is_primary():
        more = f"; and {len(notes) - MOST_NAMED_ROWS} more rows" if len(notes) > MOST_NAMED_ROWS else ""
        print("\n".join(notes[:MOST_NAMED_ROWS]) + more, file=sys.stderr)


def prepare(options: EvaluateOptions) -> Job:
    """Read and check what can be, before any device is used."""
    config = load_config(options.model_path)
    questions = read_questions(options.question_file, options.layout, options.prompt_flags)
    questions = get_chunk(questions, options.num_chunks, options.chunk_idx)
    in_folder = any(isinstance(q.image, str) and not stands_alone(q.image) for q in questions)
    if in_folder and not epath.Path(options.image_folder).expanduser().is_dir():
        raise FileNotFoundError(f"--image-folder {options.image_folder!r}: no such directory")
    generation = generation_options(
        config.generation, options.new_tokens, options.temperature, options.top_p, seed=options.seed
    )
    path = epath.Path(options.answers_file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    conv_mode = _conv_mode(options.conv_mode, config)
    of_options = [options.temperature, options.top_p, options.seed, options.quantize, options.int8_prefix]
    if options.int8_activations:  # without it, ids are those of earlier runs
        check_int8_kernels(options.model_path, options.quantize)
        of_options.append("int8_activations")
    settings = (config.name, config.digest, conv_mode, options.new_tokens, *of_options)
    weights = fingerprint(options.model_path)
    questions = [replace(q, answer_id=answer_id(weights, settings, n, q)) for n, q in enumerate(questions)]
    return Job(options, config, conv_mode, generation, AnswerFile(path, questions))


def _conv_mode(asked: str | None, config: LlavaConfig) -> str:
    """As asked, or the checkpoint's; and, as in the reference, the mmtag one for a model called plain."""
    name, mode = config.name, pick_conv_mode(config, asked)
    if "plain" in name and "finetune" not in name.lower() and "mmtag" not in mode:
        mode += "_mmtag"
        if mode not in conv_templates:
            raise ValueError(f"--conv-mode: {name} is a plain model, and there is no {mode}; use v0, v1 or plain")
    return mode


def _answer_share(job: Job, shard: AnswerShard, done: Collection[str]) -> None:
    """Answer those questions of this process's share whose answers are not done yet."""
    shares = by_image(job.file.questions)[jax.process_index() :: jax.process_count()]
    shares = [left for share in shares if (left := [q for q in share if q.answer_id not in done])]
    asked: dict[Picture, list[Question]] = {}
    lines: list[str] = []
    pictures = find_pictures([share[0].image for share in shares], job.options.image_folder)
    for picture, share in zip(pictures, shares, strict=True):
        lines += [job.failure(q, error) for q in share if (error := q.error or picture.error)]
        asked[picture] = [q for q in share if not (q.error or picture.error)]
    shard.append(lines)
    if jax.process_count() == 1 and not any(asked.values()):  # of several, all load the model together
        return

    options, lines = job.options, []
    groups: list[Group] = []
    mesh = batching.local_mesh(dict(options.mesh), job.config, options.dtype, options.quantize)
    llava, params = llava_jax.load(
        options.model_path,
        options.dtype,
        mesh,
        quantize=options.quantize,
        int8_prefix=options.int8_prefix,
        int8_activations=options.int8_activations,
    )
    for picture, questions in asked.items():
        grouped = group_questions(llava, [(q, job.prompt(q)) for q in questions], picture, picture.sizes)
        groups += grouped.groups
        lines += [job.failure(q, str(error)) for q, error in grouped.refused]
    shard.append(lines)
    phases = batching.plan(llava.engine, params, groups, job.generation.output_capacity)
    count = sum(len(group.questions) for group in groups)
    progress = tqdm(total=count, unit="question", disable=not multihost.is_primary(), dynamic_ncols=True)
    in_order = [group for phase in phases for group in phase.groups]
    with load_ahead_in_processes(job.config, options.layout.rgb, in_order) as ahead, progress:
        for phase in phases:
            for lines in _answer_phase(job, llava, params, phase, islice(ahead, len(phase.groups))):
                shard.append(lines)
                progress.update(len(lines))


def _answer_phase(job: Job, llava: Llava, params, phase: Phase, loaded: Iterable[LoadedOrLost]) -> Iterator[list[str]]:
    """The lines of a phase's questions as they come; a picture that turned out to be damaged takes its own questions
    along only."""
    lines: list[str] = []

    def lost(questions: Sequence[Question], error: ValueError) -> None:
        lines.extend(job.failure(question, str(error)) for question in questions)

    whole = without_lost(loaded, lost)
    for ended in generate_texts(llava, params, phase, whole, lambda question: job.generation):
        lines += [answer_line(question, text, job.config.name) for question, text in ended]
        yield lines.copy()
        lines.clear()
    yield lines


def by_image(questions: Sequence[Question]) -> list[list[Question]]:
    """Those on one image together; of those without an image, a few together."""
    return by_pictures(questions, lambda question: question.image)


def described(question: Question, why: str) -> str:
    """One line about a question, whatever its id is."""
    name = str(question.question_id)
    return f"question {name if name.isprintable() else repr(name)}: {why}"
