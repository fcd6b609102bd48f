"""Shared by all tests and all workers: exact arithmetic on the CPU, the recorded reference, its checkpoints."""

import fcntl
import functools
import gc
import inspect
import json
import os
import shutil
import signal
import tempfile

import jaxlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["LLAVA_JAX_CACHE_DIR"] = ""  # nothing comes from an earlier run, but where a test says so
if os.environ["JAX_PLATFORMS"] == "cpu" and "XLA_FLAGS" not in os.environ:
    # Compiling takes a third of the time. `XLA_FLAGS= pytest` compiles as users do.
    os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    if jaxlib.__version__.startswith("0.10."):  # later ones have no other emitters, and abort at a flag that they lack
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import numpy as np
import pytest
from golden import checkpoints, images

jax.config.update("jax_default_matmul_precision", "highest")
pytest.register_assert_rewrite("published")  # its asserts show their values, as those of the tests do

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "data")


def pytest_configure(config):
    """What this run compiles is kept for its workers and for every process that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and tests send it
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="llava_jax-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Tracing leaves little garbage: it is looked for seldom, and not in what earlier modules left."""
    gc.set_threshold(50_000, 50, 50)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """(name, make) → (a folder of that name, what `make(folder)` returned, as JSON has it).

    The first worker that asks makes it, the others wait. It is everybody's: no test changes it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def get(name, make):
        folder, done = root / name, root / f"{name}.json"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                done.write_text(json.dumps(make(folder)))
        return folder, json.loads(done.read_text())

    return get


@pytest.fixture(scope="session")
def golden():
    """part → the arrays that golden/record.py recorded from the reference."""

    @functools.cache
    def read(part):
        with np.load(os.path.join(DATA, part + ".npz")) as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def pictures(made_once):
    """{name: path} of the test pictures."""
    return made_once("pictures", lambda folder: images.write(str(folder)))[1]


@pytest.fixture(scope="session")
def checkpoint(made_once):
    """variant → (folder of the tiny checkpoint in its published layout, its weights' fingerprint)."""

    @functools.cache
    def write(variant):
        folder, fingerprint = made_once(f"llava-{variant}", lambda folder: checkpoints.write(variant, str(folder)))
        return str(folder), fingerprint

    return write


@pytest.fixture(scope="session")
def converted(checkpoint, made_once):
    """variant → the folder that the converter made of it."""
    from llava_jax.conversion.from_hf import convert

    @functools.cache
    def run(variant):
        published, _ = checkpoint(variant)
        folder, _ = made_once(f"llava-{variant}-jax", lambda folder: str(convert(published, output=str(folder))))
        return str(folder)

    return run


@pytest.fixture(scope="session")
def scenes_model(made_once):
    """The folder of the bundled model, converted."""
    from llava_jax.demo.model import BUNDLED, NAME, convert_published

    return made_once(NAME, lambda folder: str(convert_published(BUNDLED, folder)))[0]


@pytest.fixture(scope="session")
def small_training(made_once):
    """(a checkpoint that trains in seconds, the folder of its data.json and pictures)"""
    from small import write_training

    folder, model = made_once("small-training", write_training)
    return folder / model, folder


@pytest.fixture(scope="session")
def loads():
    """`llava_jax.load`, but what it has loaded once it gives again, with the programs that were compiled for it."""
    import llava_jax

    load = llava_jax.load
    kept = functools.cache(lambda arguments: load(**dict(arguments)))

    @functools.wraps(load)
    def loaded_once(path, *others, **options):
        bound = inspect.signature(load).bind(str(path), *others, **options)
        bound.apply_defaults()
        return kept(tuple(bound.arguments.items()))

    return loaded_once


@pytest.fixture(scope="session")
def bundled(scenes_model, loads):
    """(llava, params) of the bundled model."""
    return loads(scenes_model)


@pytest.fixture
def load_once(loads, monkeypatch):
    """For tests of what asks for a model by its path."""
    monkeypatch.setattr("llava_jax.load", loads)


@pytest.fixture(scope="session")
def model(converted, loads):
    """variant → (llava, params), in what the device computes in: float32 on a CPU."""
    return lambda variant: loads(converted(variant))


@pytest.fixture
def programs(monkeypatch):
    """(name, arguments) of each jitted function of a model that is called while the test runs."""
    from llava_jax.compiling import LoggedJit

    seen, call = [], LoggedJit.__call__

    def noted(program, *args):
        seen.append((program.name, args))
        return call(program, *args)

    monkeypatch.setattr(LoggedJit, "__call__", noted)
    return seen


@pytest.fixture
def optimized():
    """What is compiled while the test runs is compiled well."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def no_tpu(monkeypatch, optimized):
    """For programs compiled for TPUs that are not there: libtpu looks for none, and sees no flags that it lacks."""
    from llava_jax.capacity.report import NO_TPU

    jax.devices()  # XLA has read its flags
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for name, value in NO_TPU.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tiny(tmp_path):
    """A synthetic liuhaotian checkpoint, this test's own, to change and to damage."""
    from published import Checkpoint

    return Checkpoint(tmp_path)
