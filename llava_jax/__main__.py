"""`python -m llava_jax` is the `llava-jax` command."""

import sys

from llava_jax.cli import main

sys.exit(main())
