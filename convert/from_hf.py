"""Convert a published LLaVA checkpoint: `python convert/from_hf.py liuhaotian/llava-v1.6-vicuna-7b`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, installed or not

from llava_jax.cli import script

if __name__ == "__main__":
    script("from_hf.py", "convert")
