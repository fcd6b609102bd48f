"""Is a converted checkpoint the published model? `python convert/verify.py DIR --reference liuhaotian/llava-v1.6-…`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, installed or not

from llava_jax.cli import script

if __name__ == "__main__":
    script("verify.py", "verify")
