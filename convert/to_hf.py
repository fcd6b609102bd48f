"""Export a converted or trained checkpoint: `python convert/to_hf.py DIR --output OUT --layout llava-hf`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, installed or not

from llava_jax.cli import script

if __name__ == "__main__":
    script("to_hf.py", "export")
