"""The scores that LLaVA's authors published for LLaVA-1.6-vicuna-7b, to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "llava-v1.6-vicuna-7b"
SOURCE = "docs/MODEL_ZOO.md of github.com/haotian-liu/LLaVA"


@dataclass(frozen=True)
class Published:
    """One published figure, in the unit of ours, and what it was measured on."""

    score: float
    measured_on: str


# benchmark → name of the figure among ours → what was published
PUBLISHED = {
    "pope": {"mean_f1": Published(86.5, "coco, the mean F1 of its three categories")},
    "textvqa": {"accuracy": Published(64.9, "val")},
    "vqav2": {"accuracy": Published(81.8, "test-dev, by its server")},
    "gqa": {"accuracy": Published(64.2, "testdev_balanced")},
    "vizwiz": {"accuracy": Published(57.6, "test, by its server")},
    "scienceqa": {"img_accuracy": Published(70.1, "test, questions with an image")},
    "mmbench": {"circular": Published(67.4, "dev, by its server")},
    "mmbench-cn": {"circular": Published(60.6, "dev, by its server")},
    "mme": {"perception": Published(1519, "the whole benchmark"), "cognition": Published(332, "the whole benchmark")},
    "seed": {"image": Published(70.2, "its image questions")},
}
