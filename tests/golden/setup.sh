#!/usr/bin/env bash
# Makes the environment that the recorders run in: the original PyTorch LLaVA under transformers 4.37.2. Idempotent.
#   usage: setup.sh ENV      (a folder for the virtual environment; needs python3.11 and about 2 GB)
set -euo pipefail
env=${1:?usage: setup.sh ENV}
[ -x "$env/bin/python" ] || python3.11 -m venv "$env"
[ ! -f "$env/.complete" ] || exit 0
"$env/bin/pip" install -q torch==2.13.0
# Without its own pins (torch 2.0.1 and the like), which no longer install.
"$env/bin/pip" install -q --no-deps llava-torch==1.2.2.post1
# What its imports use. transformers 4.37.2 is what the repository's last pyproject.toml asks for. Pillow 12 still resizes
# across before it resizes down, as the Pillow that LLaVA was trained with.
"$env/bin/pip" install -q transformers==4.37.2 tokenizers==0.15.2 'numpy<2' pillow==12.0.0 \
    sentencepiece==0.1.99 accelerate==0.21.0 peft==0.7.1 einops requests protobuf safetensors \
    pandas==2.2.3 openpyxl==3.1.5
touch "$env/.complete"
