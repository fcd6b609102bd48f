"""Shared by all tests: exact arithmetic on the CPU, the recorded reference, its checkpoints, each converted once."""

import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["LLAVA_JAX_CACHE_DIR"] = ""  # what a test compiles is counted, and does not come from an earlier run

import jax
import numpy as np
import pytest
from golden import checkpoints, images

jax.config.update("jax_default_matmul_precision", "highest")
pytest.register_assert_rewrite("published")  # its asserts show their values, as those of the tests do

# Where the time goes. A worker takes a file at a time, and none is to be left with one of these at the end.
LONGEST = ("test_training.py", "test_notebooks.py", "test_evaluate_pod.py", "test_ahead.py", "test_demo.py")
DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "data")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def golden():
    """part → the arrays that golden/record.py recorded from the reference."""

    @functools.cache
    def read(part):
        with np.load(os.path.join(DATA, part + ".npz")) as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """{name: path} of the test pictures."""
    return images.write(str(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """variant → (folder of the tiny checkpoint in its published layout, its weights' fingerprint)."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def write(variant):
        folder = str(root / f"llava-{variant}")
        return folder, checkpoints.write(variant, folder)

    return write


@pytest.fixture(scope="session")
def converted(checkpoint):
    """variant → the folder that the converter made of it."""
    from llava_jax.conversion.from_hf import convert

    @functools.cache
    def run(variant):
        folder, _ = checkpoint(variant)
        convert(folder, output=folder + "-jax")
        return folder + "-jax"

    return run


@pytest.fixture(scope="session")
def model(converted):
    """variant → (llava, params) in float32."""
    import llava_jax

    @functools.cache
    def load(variant):
        return llava_jax.load(converted(variant))

    return load


@pytest.fixture
def tiny(tmp_path):
    """A synthetic liuhaotian checkpoint, this test's own, to change and to damage."""
    from published import Checkpoint

    return Checkpoint(tmp_path)
