"""`train(options)`: LLaVA's stages from LLaVA's data files, to be killed and resumed at will."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from llava_jax.checkpoint import PARAMS, check_tree, load_config, load_params, stored_tree
from llava_jax.compiling import LoggedJit, compiler_options, enable_compilation_cache
from llava_jax.config import LlavaConfig
from llava_jax.inputs.batch import Room, next_tokens, pack, room_for, stack_shards
from llava_jax.inputs.conversation import pick_conv_mode
from llava_jax.inputs.tokenizer import load_tokenizer
from llava_jax.inputs.types import Batch, Targets
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM, param_shapes
from llava_jax.parallel import multihost
from llava_jax.parallel.sharding import make_mesh, num_batch_shards, param_shardings
from llava_jax.training.checks import check_examples, check_labels
from llava_jax.training.data import Loaded, load_examples
from llava_jax.training.loader import Loader
from llava_jax.training.lora import init_lora
from llava_jax.training.optimizer import make_optimizer, split_params, trainable_pattern
from llava_jax.training.output import Metrics, check_output, claim_output, read_projector, write_result
from llava_jax.training.preprocess import training_tokenizer
from llava_jax.training.states import States
from llava_jax.training.step import LORA, TrainState, loss_function, train_step
from llava_jax.training.train_options import INT32_MAX, TrainOptions


def train(options: TrainOptions) -> Path:
    """One stage, from a converted checkpoint to another one, which `llava_jax.load` takes.

    Started again with the same options, it goes on from the last saved step, and gives what it would have given.

    Returns:
        the output directory.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: the options, data or checkpoint are not right; before any step.
        ValueError, RuntimeError: later: a sample cannot be loaded after all, or a worker died; the state is saved
            first. Or a loss, or a parameter, is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM; the state is saved first.
    """
    enable_compilation_cache()
    mesh = make_mesh(**dict(options.mesh)) if options.mesh else None
    config = training_config(options)
    stored = stored_tree(Path(options.model_path).expanduser() / PARAMS, f"convert {options.model_path} again")
    check_tree(options.model_path, stored, param_shapes(config))
    template = options.version or ("plain" if options.stage == "pretrain" else pick_conv_mode(config))
    check_output(options)
    tokenizer = training_tokenizer(load_tokenizer(options.model_path, config.name, config.reading))
    examples = _checked_examples(options, config, tokenizer, template)
    rows = options.per_device_train_batch_size * num_batch_shards(mesh)
    micro_steps = count_micro_steps(len(examples), rows, options)
    optimizer = make_optimizer(options, micro_steps // options.gradient_accumulation_steps)
    state, frozen = initial_state(options, config, mesh, optimizer)
    step = compiled_step(options, config, state, optimizer, mesh)
    claim_output(options)
    with States(options.checkpoints, options.save_total_limit) as states:
        state = states.newest(state)
        loader = Loader(
            examples,
            options.image_folder,
            config,
            tokenizer,
            template,
            batch_size=rows,
            seed=options.seed,
            max_unlabelled_ratio=options.max_unlabelled_ratio,
            shards=None if mesh is None else multihost.local_shards(mesh),
            start_step=int(state.step),
            group_by_modality_length=options.group_by_modality_length,
            num_devices=num_batch_shards(mesh),
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            num_workers=options.dataloader_num_workers,
        )
        with stop_signals() as stopped, loader as loaded:
            batches = _batches(loaded, options, config, tokenizer.pad_token_id, mesh, stopped)
            state = _run(options, state, frozen, step, batches, states, micro_steps)
    return write_result(options, config, state.trained, frozen)


def _checked_examples(options: TrainOptions, config: LlavaConfig, tokenizer, template: str) -> list[dict]:
    examples = load_examples(options.data_path)
    sizes = check_examples(examples, options.image_folder, template)
    check_labels(
        examples,
        sizes,
        config,
        tokenizer,
        template,
        max_unlabelled_ratio=options.max_unlabelled_ratio,
        seed=options.seed,
    )
    return examples


def _batches(
    loaded, options: TrainOptions, config: LlavaConfig, pad_id: int | None, mesh: Mesh | None, stopped: list
) -> Iterator[tuple[Batch, Targets] | BaseException]:
    """The loader's samples as (Batch, Targets), each where it belongs on the mesh; or, in every process and last, why
    there are no more: a signal has come, or samples cannot be loaded."""
    shards, samples = 1 if mesh is None else len(multihost.local_shards(mesh)), iter(loaded)
    while True:
        some = _next(samples)
        failed, ended = multihost.allgather_max([isinstance(some, Exception), bool(stopped)])
        if isinstance(some, Exception):
            yield some
        elif failed:
            yield RuntimeError("another process cannot load its samples")
        elif ended:
            yield KeyboardInterrupt("stopped by a signal")
        else:
            batch = make_batch(some, config, options.per_device_train_batch_size, shards, pad_id)
            yield batch if mesh is None else multihost.place_rows(batch, mesh)


def _next(samples: Iterator[list[Loaded]]) -> list[Loaded] | Exception:
    """The next step's samples, or why there are none."""
    try:
        return next(samples)
    except (ValueError, OSError, RuntimeError) as error:
        return error


def _run(
    options: TrainOptions, state: TrainState, frozen: dict, step, batches, states: States, micro_steps: int
) -> TrainState:
    """The loop; loading, computing and saving overlap."""
    done, every = int(state.step), options.save_steps * options.gradient_accumulation_steps
    steps = range(done + 1, micro_steps + 1)
    progress = tqdm(steps, initial=done, total=micro_steps, disable=not multihost.is_primary())
    with Metrics(options, done) as metrics:
        for number, batch in zip(progress, batches, strict=False):
            if isinstance(batch, BaseException):
                metrics.write()
                states.save(number - 1, state)
                states.wait()
                raise type(batch)(f"{batch}; saved after step {number - 1}, start again to go on") from batch
            state, values = step(state, frozen, *batch)
            metrics.add(number, values)
            if number == micro_steps or number % every == 0:
                metrics.write()
                states.save(number, state)
    return state


def training_config(options: TrainOptions) -> LlavaConfig:
    """The checkpoint's config, as this run changes it."""
    config = load_config(options.model_path)
    tuned = options.unfreeze_mm_vision_tower or config.unfreeze_mm_vision_tower
    return config.replace(
        tokenizer_model_max_length=options.model_max_length,
        tokenizer_padding_side="right",
        unfreeze_mm_vision_tower=tuned,
    )


def count_micro_steps(examples: int, rows: int, options: TrainOptions) -> int:
    """How many batches of `rows` examples the run takes, as transformers' Trainer counts.

    Raises:
        ValueError: more than can be counted.
    """
    together = options.gradient_accumulation_steps
    updates = options.max_steps
    if updates < 0:
        updates = math.ceil(options.num_train_epochs * max(1, math.ceil(examples / rows) // together))
    if updates * together > INT32_MAX:
        raise ValueError(f"{updates * together:.3g} steps are too many; lower --num_train_epochs or --max_steps")
    return updates * together


def initial_state(options: TrainOptions, config: LlavaConfig, mesh: Mesh | None, optimizer):
    """(TrainState before the first step, the frozen parameters)."""
    params = load_params(options.model_path, config, dtype="float32", mesh=mesh)
    if options.pretrain_mm_mlp_adapter is not None:
        params = read_projector(options.pretrain_mm_mlp_adapter, config, params)
    pattern = trainable_pattern(options.stage, config, options.unfreeze_mm_vision_tower)
    trained, frozen = split_params(params, pattern)
    frozen = jax.tree.map(lambda x: x.astype(options.dtype), frozen)

    def start(trained):
        if options.stage == "lora":
            trained = {**trained, LORA: init_lora(frozen, options.lora_r, jax.random.key(options.seed))}
        return TrainState(trained, optimizer.init(trained), jnp.int32(0))

    shardings = None if mesh is None else param_shardings(jax.eval_shape(start, trained), mesh)
    return jax.jit(start, out_shardings=shardings)(trained), frozen


def compiled_step(options: TrainOptions, config: LlavaConfig, state, optimizer, mesh: Mesh | None):
    """The jitted (state, frozen, batch, targets) → (state, metrics); the state given to it is used up."""
    model = LlavaLlamaForCausalLM(config, remat=options.gradient_checkpointing)
    loss = loss_function(model, options.dtype, options.lora_alpha / options.lora_r, options.lora_dropout, options.seed)
    shardings = None if mesh is None else (param_shardings(state, mesh), None)
    step, compiler = partial(train_step, loss, optimizer), compiler_options(mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=compiler)
    return LoggedJit("the training step", jitted, mesh)


def make_batch(samples, config: LlavaConfig, rows: int, shards: int, pad_id: int | None) -> tuple[Batch, Targets]:
    """Up to rows x shards samples as one batch; rows that no sample fills have nothing to predict.

    Several processes, each with its own shards, agree on one shape.
    As in the reference's collator, tokens that look like padding are taken out wherever they stand.
    """
    batches = []
    for start in range(0, rows * shards, rows):
        some = samples[start : start + rows]
        empty = [np.array([pad_id])] * (rows - len(some))
        kept = [sample.ids != pad_id for sample in some]
        ids = [sample.ids[keep] for sample, keep in zip(some, kept, strict=True)] + empty
        labels = [sample.labels[keep] for sample, keep in zip(some, kept, strict=True)]
        labels += [np.array([-100])] * len(empty)
        images = [image for sample in some for image in sample.images]
        batches.append(pack(ids, images, config, labels=labels, max_length=config.tokenizer_model_max_length))
    room = Room(*multihost.allgather_max(room_for(batches)))
    batch = stack_shards(batches, room, config)
    assert batch.labels is not None
    return batch._replace(labels=None), next_tokens(batch.labels, room.targets)


@contextlib.contextmanager
def stop_signals() -> Iterator[list]:
    """A list that is empty until SIGTERM or SIGINT comes; a second one is the usual interruption.

    JAX's own preemption sync point knows SIGTERM alone, and exists only where there are several processes.
    """
    came: list[int] = []

    def note(number, _frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
