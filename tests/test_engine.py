"""The engine below the text: what it gives is what `Llava` gives, and a call costs no walk over the parameters."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small import small_model

from llava_jax.capacity.ahead import slice_mesh
from llava_jax.capacity.roofline import SLICES
from llava_jax.compiling import GPU_COMPILER_OPTIONS, TPU_SUFFIX_OPTIONS, LoggedJit, compiler_options
from llava_jax.inference.generation_options import GenerationOptions, generation_options
from llava_jax.inference.sampling import Greedy, Sample
from llava_jax.inputs.batch import merged_length, pack
from llava_jax.inputs.groups import pack_questions


def test_prefix_and_questions_give_what_a_prompt_gives():
    """Two questions after one prefix, the picture in it."""
    llava, params = small_model()
    images = llava.load_images(np.zeros((30, 50, 3), np.uint8))
    sizes = [image.size for image in images]
    prompts = [np.array(llava.prompt_ids(text, sizes)) for text in ("What is it?", "What is this here?")]
    options = generation_options(llava.config.generation, max_new_tokens=6)
    batch = pack([prompts[0][:-12]], images, llava.config)
    assert int(batch.lengths[0]) == merged_length(prompts[0][:-12], sizes, llava.config) and batch.labels is None
    shared = next(i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b)
    prefix, _ = llava.engine.prefill(params, pack([prompts[0][:shared]], images, llava.config))
    questions = pack_questions([[ids[shared:] for ids in prompts]], 1, 2)
    state = llava.engine.sample_first_token(params, prefix, questions, options)
    tokens = np.asarray(llava.engine.decode(params, prefix, state, options, 6).tokens)
    assert tokens.shape == (1, 2, options.output_capacity)
    for row, ids in zip(tokens[0], prompts, strict=True):
        (alone,) = llava.engine.generate(params, pack([ids], images, llava.config), options)
        assert row[: len(alone)].tolist() == alone.tolist() and len(alone) <= 6


class Parameters(dict):
    """A tree that nobody may walk through."""

    def keys(self):
        raise AssertionError("the parameters were looked at")

    __iter__ = values = items = keys


def test_a_call_looks_at_no_parameters(capsys):
    program = LoggedJit("double", lambda params, x: x)
    for length in (3, 3, 4):
        program(Parameters(a=1), np.zeros(length))
    assert capsys.readouterr().err.count("compiling double") == 2


def test_options_are_one_checked_value():
    defaults = small_model()[0].config.generation
    assert generation_options(defaults, 7, stop="x") == GenerationOptions(7, Greedy(), ("x",))
    assert isinstance(generation_options(defaults, temperature=0.5).sampling, Sample)
    assert [generation_options(defaults, n).output_capacity for n in (1, 32, 33, 512)] == [32, 32, 64, 512]
    with pytest.raises(ValueError, match="temperature, seed are two ways to say it; give one"):
        generation_options(defaults, temperature=1.0, seed=0, sampling=Greedy())


def test_only_accelerators_compilers_are_told_options(monkeypatch):
    """And nothing that this XLA does not know, which it would refuse."""
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    assert compiler_options() == compiler_options(jax.make_mesh((1,), ("data",)), updates_suffix=True) == {}
    assert compiler_options(gpu) == GPU_COMPILER_OPTIONS
    monkeypatch.setitem(GPU_COMPILER_OPTIONS, "xla_gpu_of_another_time", True)
    assert "xla_gpu_of_another_time" not in compiler_options(gpu)


def test_a_tpus_decode_loop_writes_no_suffix_back(monkeypatch, no_tpu):
    tpus = slice_mesh(SLICES["v5e-4"], data=1, tensor=4)
    assert compiler_options(tpus, updates_suffix=True) == TPU_SUFFIX_OPTIONS and compiler_options(tpus) == {}
    monkeypatch.setitem(TPU_SUFFIX_OPTIONS, "xla_msa_of_another_time", 0)
    assert "xla_msa_of_another_time" not in compiler_options(tpus, updates_suffix=True)
