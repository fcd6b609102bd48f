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
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from llava_jax.batch import Batch, Targets
from llava_jax.checkpoint import load_config, load_params
from llava_jax.config import LlavaConfig
from llava_jax.inference.compiling import Announced, enable_compilation_cache
from llava_jax.inputs.batch import next_tokens, pack, stack_shards
from llava_jax.inputs.conversation import pick_conv_mode
from llava_jax.inputs.tokenizer import load_tokenizer
from llava_jax.models.llava import LlavaLlamaForCausalLM
from llava_jax.sharding import make_mesh, param_shardings
from llava_jax.training.data import check_examples, load_examples
from llava_jax.training.loader import Loader
from llava_jax.training.lora import init_lora
from llava_jax.training.optimizer import make_optimizer, split_params, trainable_pattern
from llava_jax.training.options import TrainOptions
from llava_jax.training.output import Metrics, claim_output, read_projector, write_result
from llava_jax.training.preprocess import training_tokenizer
from llava_jax.training.step import LORA, TrainState, batch_shardings, loss_function, num_shards, train_step


def train(options: TrainOptions) -> Path:
    """One stage, from a converted checkpoint to another one, which `llava_jax.load` takes.

    Started again with the same options, it goes on from the last saved step, and gives what it would have given.

    Returns:
        the output directory.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: the options, data or checkpoint are not right; before any step.
        KeyboardInterrupt: SIGINT or SIGTERM; the state is saved first.
    """
    enable_compilation_cache()
    mesh = make_mesh(**dict(options.mesh)) if options.mesh else None
    config = training_config(options)
    template = options.version or ("plain" if options.stage == "pretrain" else pick_conv_mode(config.name))
    examples = load_examples(options.data_path)
    check_examples(examples, options.image_folder, template)
    claim_output(options)
    rows = options.per_device_train_batch_size * num_shards(mesh)
    micro_steps = count_micro_steps(len(examples), rows, options)
    state, frozen = initial_state(options, config, mesh, micro_steps)
    step = compiled_step(options, config, state, micro_steps, mesh)
    loader = partial(
        Loader,
        examples,
        options.image_folder,
        config,
        load_tokenizer(options.model_path, config.name, config.reading),
        template,
        batch_size=rows,
        seed=options.seed,
        group_by_modality_length=options.group_by_modality_length,
        num_devices=num_shards(mesh),
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_workers=options.dataloader_num_workers,
    )
    policy = ocp.training.preservation_policies.LatestN(options.save_total_limit)
    keeping = ocp.training.Checkpointer(
        options.checkpoints.absolute(), preservation_policy=policy, cleanup_tmp_directories=True
    )
    with keeping as saved:
        if saved.latest is not None:
            state = saved.load(saved.latest.step, abstract_state=state)
        state = _run(options, config, state, frozen, step, loader, saved, micro_steps, mesh)
    return write_result(options, config, state.trained, frozen)


def _run(options, config, state, frozen, step, loader, saved, micro_steps: int, mesh) -> TrainState:
    """The loop: what is on the device, what is being loaded, and what is being saved overlap."""
    done, every = int(state.step), options.save_steps * options.gradient_accumulation_steps
    metrics = Metrics(options, done)
    pad_id = training_tokenizer(load_tokenizer(options.model_path, config.name, config.reading)).pad_token_id
    with stop_signals() as stopped, loader(start_step=done) as batches, metrics:
        for number, samples in zip(
            tqdm(range(done, micro_steps), initial=done, total=micro_steps), batches, strict=False
        ):
            batch = make_batch(samples, config, options.per_device_train_batch_size, num_shards(mesh), pad_id)
            if mesh is not None:
                batch = jax.device_put(batch, batch_shardings(*batch, mesh))
            state, values = step(state, frozen, *batch)
            metrics.add(number + 1, values)
            last = number + 1 == micro_steps
            if stopped or last or (number + 1) % every == 0:
                metrics.write()
                saved.save_async(number + 1, state, force=True)
            if stopped:
                saved.wait()
                raise KeyboardInterrupt(f"stopped by a signal; saved after step {number + 1}, start again to go on")
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
    """How many batches of `rows` examples the run takes, as transformers' Trainer counts."""
    together = options.gradient_accumulation_steps
    updates = options.max_steps
    if updates < 0:
        updates = math.ceil(options.num_train_epochs * max(1, math.ceil(examples / rows) // together))
    return updates * together


def initial_state(options: TrainOptions, config: LlavaConfig, mesh: Mesh | None, micro_steps: int):
    """(TrainState before the first step, the frozen parameters)."""
    params = load_params(options.model_path, config, dtype="float32", mesh=mesh)
    if options.pretrain_mm_mlp_adapter is not None:
        params = read_projector(options.pretrain_mm_mlp_adapter, config, params)
    pattern = trainable_pattern(options.stage, config, options.unfreeze_mm_vision_tower)
    trained, frozen = split_params(params, pattern)
    frozen = jax.tree.map(lambda x: x.astype(options.dtype), frozen)
    if options.stage == "lora":
        trained[LORA] = init_lora(frozen, options.lora_r, jax.random.key(options.seed))
    optimizer = make_optimizer(options, micro_steps // options.gradient_accumulation_steps)

    def start(trained):
        return TrainState(trained, optimizer.init(trained), jnp.int32(0))

    shardings = None if mesh is None else param_shardings(jax.eval_shape(start, trained), mesh)
    return jax.jit(start, out_shardings=shardings)(trained), frozen


def compiled_step(options: TrainOptions, config: LlavaConfig, state, micro_steps: int, mesh: Mesh | None):
    """The jitted (state, frozen, batch, targets) → (state, metrics); the state given to it is used up."""
    model = LlavaLlamaForCausalLM(config, remat=options.gradient_checkpointing)
    loss = loss_function(model, options.dtype, options.lora_alpha / options.lora_r, options.lora_dropout, options.seed)
    optimizer = make_optimizer(options, micro_steps // options.gradient_accumulation_steps)
    shardings = None if mesh is None else (param_shardings(state, mesh), None)
    jitted = jax.jit(partial(train_step, loss, optimizer), donate_argnums=0, out_shardings=shardings)
    return Announced("the training step", jitted, mesh)


def make_batch(samples, config: LlavaConfig, rows: int, shards: int, pad_id: int) -> tuple[Batch, Targets]:
    """Up to rows x shards samples as one batch; rows that no sample fills have nothing to predict.

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
        tiles = [tile for sample in some for tile in sample.tiles]
        sizes = [size for sample in some for size in sample.sizes]
        batches.append(pack(ids, labels, tiles, sizes, config, max_length=config.tokenizer_model_max_length))
    batch = stack_shards(batches, config)
    return batch, next_tokens(batch.labels)


@contextlib.contextmanager
def stop_signals() -> Iterator[list]:
    """A list that is empty until SIGTERM or SIGINT comes; a second one is the usual interruption."""
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
