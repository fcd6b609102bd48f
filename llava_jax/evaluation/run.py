"""`evaluate(options)`: questions to answers, in files as the reference's model_vqa_* programs read and write them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
from etils import epath
from tqdm import tqdm

import llava_jax
from llava_jax.checkpoint import fingerprint, load_config
from llava_jax.config import LlavaConfig
from llava_jax.evaluation.answers import AnswerFile, AnswerShard, answer_id, answer_line, failure_of
from llava_jax.evaluation.evaluate_options import EvaluateOptions
from llava_jax.evaluation.pictures import Pictures, picture_sizes
from llava_jax.evaluation.questions import Question, get_chunk, read_questions, user_turn
from llava_jax.inference import batching
from llava_jax.inference.generation_options import GenerationOptions, generation_options
from llava_jax.inference.text_requests import group_questions
from llava_jax.inputs.conversation import Conversation, conv_templates, pick_conv_mode
from llava_jax.inputs.sources import stands_alone
from llava_jax.parallel import multihost
from llava_jax.parallel.sharding import default_axes, make_mesh

MOST_NAMED_ROWS = 20  # of which something is not asked
TEXT_ONLY = 16  # questions without a picture that share a prefix


@dataclass(frozen=True)
class Job:
    """What every process knows before any work.

    Attributes:
        questions: all of them, in the file's order.
        conv_mode: the template's name.
        file: where the answers go.
    """

    options: EvaluateOptions
    config: LlavaConfig
    questions: Sequence[Question]
    conv_mode: str
    generation: GenerationOptions
    file: AnswerFile

    def line(self, number: int, text: str, error: str | None = None) -> str:
        return answer_line(self.questions[number], text, self.file.ids[number], self.config.name, error)

    def failure(self, number: int, error: str) -> str:
        """The line of a question that cannot be asked.

        Raises:
            ValueError: `strict` asks for it.
        """
        if self.options.strict:
            raise ValueError(described(self.questions[number], error))
        return self.line(number, "", error)

    def prompt(self, number: int) -> Conversation:
        """A question in its template, to the letter of the reference's programs."""
        template = conv_templates[self.conv_mode]
        turn = user_turn(self.questions[number], self.config.mm_use_im_start_end)
        return template.append_message(template.roles[0], turn).append_message(template.roles[1], None)


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
        _say_what_is_not_asked(job.questions)
        answered = job.file.answered()
        part = AnswerShard(job.file.part(jax.process_index()))
        multihost.barrier("every process has its part")
        _check_shared(job.file)
        left = {n for n in range(len(job.questions)) if n not in answered or failure_of(answered[n])}
        try:
            if left:
                _answer_share(job, part, left)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {kept}") from None
        multihost.barrier("every question is answered")
        if multihost.is_primary():
            job.file.merge()
        multihost.barrier("the answers are merged")
        return _failures(job)


def _say_what_is_not_asked(questions: Sequence[Question]) -> None:
    notes = list(dict.fromkeys(question.note for question in questions if question.note))
    if notes and multihost.is_primary():
        more = f"; and {len(notes) - MOST_NAMED_ROWS} more rows" if len(notes) > MOST_NAMED_ROWS else ""
        print("\n".join(notes[:MOST_NAMED_ROWS]) + more, file=sys.stderr)


def prepare(options: EvaluateOptions) -> Job:
    """Read and check what can be, before any device is used."""
    config = load_config(options.model_path)
    questions = get_chunk(
        read_questions(
            options.question_file,
            options.layout,
            single_pred_prompt=options.asks_for_the_letter,
            all_rounds=options.all_rounds,
            lang=options.lang,
        ),
        options.num_chunks,
        options.chunk_idx,
    )
    in_folder = any(isinstance(q.image, str) and not stands_alone(q.image) for q in questions)
    if in_folder and not epath.Path(options.image_folder).expanduser().is_dir():
        raise FileNotFoundError(f"--image-folder {options.image_folder!r}: no such directory")
    generation = generation_options(
        config.generation, options.new_tokens, options.temperature, options.top_p, seed=options.seed
    )
    path = epath.Path(options.answers_file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    conv_mode = _conv_mode(options.conv_mode, config)
    of_options = options.temperature, options.top_p, options.seed, options.quantize, options.int8_prefix
    settings = (config.name, _digest(config), conv_mode, options.new_tokens, *of_options)
    weights = fingerprint(options.model_path)
    ids = tuple(answer_id(weights, settings, number, question) for number, question in enumerate(questions))
    return Job(options, config, questions, conv_mode, generation, AnswerFile(path, ids))


def _digest(config: LlavaConfig) -> str:
    """What tells this config from others, of the same weights: how pictures are cut, where answers end."""
    return hashlib.sha256(repr(config).encode(errors="backslashreplace")).hexdigest()


def _conv_mode(asked: str | None, config: LlavaConfig) -> str:
    """As asked, or the checkpoint's; and, as in the reference, the mmtag one for a model called plain."""
    name, mode = config.name, pick_conv_mode(config, asked)
    if "plain" in name and "finetune" not in name.lower() and "mmtag" not in mode:
        mode += "_mmtag"
        if mode not in conv_templates:
            raise ValueError(f"--conv-mode: {name} is a plain model, and there is no {mode}; use v0, v1 or plain")
    return mode


def _check_shared(file: AnswerFile) -> None:
    seen = {path.name.removeprefix(f"{file.path.name}.part-").split("-")[0] for path in file.parts()}
    if missing := {str(process) for process in range(jax.process_count())} - seen:
        raise ValueError(
            f"--answers-file {file.path}: process {jax.process_index()} does not see what process {min(missing)} "
            "writes; name a place that all hosts share, such as gs://…"
        )


def _answer_share(job: Job, part: AnswerShard, left: set[int]) -> None:
    """Answer this process's share of the questions that are left."""
    shares = by_image(job.questions)[jax.process_index() :: jax.process_count()]
    shares = [kept for numbers in shares if (kept := [n for n in numbers if n in left])]
    images, folder = [job.questions[numbers[0]].image for numbers in shares], job.options.image_folder
    sizes, lines = picture_sizes(images, folder), []
    for i, (numbers, size) in enumerate(zip(shares, sizes, strict=True)):
        unreadable = str(size) if isinstance(size, ValueError) else None
        errors = {n: job.questions[n].error or unreadable for n in numbers}
        lines += [job.failure(n, error) for n, error in errors.items() if error]
        shares[i] = [n for n, error in errors.items() if not error]
    part.append(lines)
    if jax.process_count() == 1 and not any(shares):  # of several, all load the model together
        return

    llava, params = _load(job)
    groups, lines = [], []
    for i, numbers in enumerate(shares):
        grouped = group_questions(llava, [(n, job.prompt(n)) for n in numbers], i, sizes[i])
        groups += grouped.groups
        lines += [job.failure(n, str(error)) for n, error in grouped.refused]
    part.append(lines)
    waves = batching.plan(llava.engine, params, groups, job.generation.output_capacity)
    numbers = [n for numbers in shares for n in numbers]
    progress = tqdm(
        total=len(numbers) - len(lines), unit="question", disable=not multihost.is_primary(), dynamic_ncols=True
    )
    rgb = job.options.layout.rgb
    with Pictures(job.config, rgb, images, folder, sizes) as pictures, progress:
        for wave, loaded in pictures.of_waves(waves):
            lines = _answer_wave(job, llava, params, wave, loaded)
            part.append(lines)
            progress.update(len(lines))


def _load(job: Job):
    options = job.options
    mesh, quantize, int8_prefix = mesh_for(options, job.config), options.quantize, options.int8_prefix
    return llava_jax.load(options.model_path, options.dtype, mesh, quantize=quantize, int8_prefix=int8_prefix)


def _answer_wave(job: Job, llava, params, wave, loaded) -> list[str]:
    """The lines of a wave's questions; a picture that turned out to be damaged takes its own questions along only."""
    lines, good = [], []
    for group in wave.groups:
        picture = loaded[group.images]
        if isinstance(picture, ValueError):
            lines += [job.failure(n, str(picture)) for n in group.questions]
        else:
            good.append(group)
    if good:
        batch = replace(wave, groups=tuple(good))
        for n, tokens in batching.generate(llava.engine, params, batch, loaded, job.generation):
            lines.append(job.line(n, llava.decode(tokens)))
    return lines


def by_image(questions: Sequence[Question]) -> list[list[int]]:
    """The numbers of the questions, those on one image together; of those without an image, a few together."""
    together: dict[object, list[int]] = {}
    for number, question in enumerate(questions):
        together.setdefault(question.image, []).append(number)
    without = together.pop(None, [])
    return [*together.values(), *(without[i : i + TEXT_ONLY] for i in range(0, len(without), TEXT_ONLY))]


def mesh_for(options: EvaluateOptions, config: LlavaConfig):
    """Over this process's own devices: as asked, or all of them, dividing the heads as far as they can be divided."""
    devices, axes = jax.local_devices(), dict(options.mesh)
    if not axes and len(devices) > 1:
        axes = default_axes(len(devices), config.text.num_key_value_heads)
    return make_mesh(devices, **axes) if axes else None


def _failures(job: Job) -> list[str]:
    lines = sorted(job.file.answered().items())
    return [described(job.questions[n], why) for n, line in lines if (why := failure_of(line))]


def described(question: Question, why: str) -> str:
    """One line about a question, whatever its id is."""
    name = str(question.question_id)
    return f"question {name if name.isprintable() else repr(name)}: {why}"
