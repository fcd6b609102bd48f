"""Samples in the order of the steps, loaded by worker processes ahead of them. Imports neither JAX nor torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice, starmap, tee
from pathlib import Path

from tqdm import tqdm

from llava_jax.config import LlavaConfig
from llava_jax.inputs.tokenizer import LlamaTokenizer
from llava_jax.inputs.workers import Workers
from llava_jax.training.checks import MAX_NAMED_SAMPLES
from llava_jax.training.data import (
    Loaded,
    load_example,
    modality_lengths,
    name_of,
    sample_order,
    why_unlabelled,
)
from llava_jax.training.preprocess import training_tokenizer


class Loader:
    """Batches of loaded samples, epoch after epoch without end, from step `start_step` on; a context manager.

    Each item is a list of `batch_size` samples in `sample_order`; the last of an epoch may be shorter, as with the
    reference's `dataloader_drop_last=False`. The samples are the same with any number of workers, resumed or not.

    Args:
        examples: from `load_examples`, checked by `check_examples`.
        tokenizer: as `load_tokenizer` gives it; it is made the one that the reference trains with.
        template: a name in `conv_templates`.
        batch_size: samples of one step, over all devices.
        group_by_modality_length: the order of `get_modality_length_grouped_indices`, for `num_devices` that share a
            step's samples and `gradient_accumulation_steps` that make an update; else a plain shuffle.
        max_unlabelled_ratio: the share of samples without any label that is let pass.
        shards: which of the `num_devices` parts of a step are loaded here, in this order; None is all of them.
        num_workers: processes that load at least two steps ahead; with 0, each step is loaded when it is asked for.
            They are spawned, so a script that makes a Loader needs `if __name__ == "__main__":`.

    Raises (while iterating):
        ValueError: a sample cannot be loaded; or too many of the samples seen, or all of the first ones, have no label.
        RuntimeError: a worker died.
    """

    def __init__(
        self,
        examples: Sequence[dict],
        image_folder: str | Path,
        config: LlavaConfig,
        tokenizer: LlamaTokenizer,
        template: str,
        *,
        batch_size: int,
        seed: int,
        max_unlabelled_ratio: float = 0.01,
        shards: Sequence[int] | None = None,
        start_step: int = 0,
        group_by_modality_length: bool = False,
        num_devices: int = 1,
        gradient_accumulation_steps: int = 1,
        num_workers: int = 0,
    ):
        tokenizer = training_tokenizer(tokenizer)
        self._rows, self._shards = batch_size // num_devices, shards
        load = partial(load_example, image_folder=image_folder, config=config, tokenizer=tokenizer, template=template)
        self.examples, self.batch_size, self.start_step = examples, batch_size, start_step
        self._load = partial(_load_named, load)
        self._order = partial(sample_order, len(examples), seed=seed)
        if group_by_modality_length:
            sizes = dict(batch_size=batch_size // num_devices, world_size=num_devices * gradient_accumulation_steps)
            self._order = partial(self._order, lengths=modality_lengths(examples), **sizes)
        fit = f"template {template!r} and legacy={tokenizer.legacy}"
        self._unlabelled = _Unlabelled(config, fit, max_unlabelled_ratio)
        rows = batch_size if shards is None else self._rows * len(shards)
        self._ahead = rows * max(2, -(-2 * num_workers // batch_size))  # samples
        self.workers = Workers(self._load, num_workers) if num_workers else None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        """End the workers; what they were loading is dropped."""
        if self.workers is not None:
            self.workers.close()

    def __iter__(self) -> Iterator[list[Loaded]]:
        steps, again = tee(self._numbers())
        tasks = ((self.examples[number], number) for step in again for number in step)
        if self.workers is None:
            loaded: Iterator[Loaded] = starmap(self._load, tasks)
        else:
            loaded = self.workers.map(tasks, self._ahead)
        for step in steps:
            samples = list(islice(loaded, len(step)))
            self._unlabelled.add([name_of(self.examples[number], number) for number in step], samples)
            yield samples

    def _numbers(self) -> Iterator[list[int]]:
        """The numbers of each step's samples."""
        first_epoch, done = divmod(self.start_step, -(-len(self.examples) // self.batch_size))
        for epoch in count(first_epoch):
            order = self._order(epoch=epoch)
            for start in range(done * self.batch_size, len(order), self.batch_size):
                step = order[start : start + self.batch_size]
                if self._shards is None:
                    yield step
                else:
                    parts = (step[shard * self._rows : (shard + 1) * self._rows] for shard in self._shards)
                    yield [number for part in parts for number in part]
            done = 0


# ---- too many samples without labels


class _Unlabelled:
    """Counts the samples that the reference would silently train on without labels, and stops at too many.

    The first of each kind is named on stderr.
    """

    def __init__(self, config: LlavaConfig, fit: str, most: float):
        self.config, self.fit, self.most = config, fit, most
        self.seen = 0
        self.found: dict[str, list[str]] = {}

    def add(self, names: list[str], samples: list[Loaded]) -> None:
        self.seen += len(samples)
        for name, sample in zip(names, samples, strict=True):
            if kind := why_unlabelled(sample, [image.size for image in sample.images], self.config):
                lengths = "" if sample.mismatch is None else ": {} vs. {}".format(*sample.mismatch)
                self._note(kind, f"{name}{lengths}")
        share = sum(map(len, self.found.values())) / self.seen
        if share > self.most and (self.seen >= 200 or (share == 1 and self.seen >= 4)):
            counts = ", ".join(f"{kind} in {len(named)}" for kind, named in self.found.items())
            examples = [name for named in self.found.values() for name in named][:MAX_NAMED_SAMPLES]
            raise ValueError(
                f"{counts} of the first {self.seen} samples, so that they have no labels ({'; '.join(examples)}): "
                f"{self.fit} do not fit each other, or the texts contain the template's own separators, or are too "
                "long; look at --version, tokenizer_config.json, --model_max_length and these samples"
            )

    def _note(self, kind: str, name: str) -> None:
        if kind not in self.found:
            tqdm.write(f"nothing to learn: {kind}: sample {name}; others like it are not named", file=sys.stderr)
        self.found.setdefault(kind, []).append(name)


def _load_named(load: Callable[[dict], Loaded], example: dict, number: int) -> Loaded:
    try:
        return load(example)
    except Exception as error:
        raise ValueError(f"sample {name_of(example, number)}: {type(error).__name__}: {error}") from error
