"""LLaVA's constants, under their names."""

IGNORE_INDEX = -100  # a position without a label
IMAGE_TOKEN_INDEX = -200  # where an image goes in input_ids

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

ENGINE_THREAD = "llava-jax engine"  # its name, by which one that still works is found when a process ends
ENGINE_CLOSING = 1.0  # seconds that a server gives it to end; it may be compiling, which nothing can stop

DTYPES = ("float32", "bfloat16", "float16")  # of stored parameters and of the arithmetic
