"""What `llava-jax evaluate` is told, in the names of LLaVA's own programs."""

from __future__ import annotations

from dataclasses import dataclass

from llava_jax.evaluation.benchmarks import BENCHMARKS, layout_for
from llava_jax.evaluation.questions import Layout, PromptFlags
from llava_jax.parallel.mesh_axes import check_axes


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of a run. Paths may be local or gs://; `dtype` and what follows it are those of `llava_jax.load`."""

    model_path: str
    question_file: str
    answers_file: str
    image_folder: str = ""
    task: str | None = None  # a name in `benchmarks.BENCHMARKS`; None goes by the question file's ending
    conv_mode: str | None = None  # None is the checkpoint's
    temperature: float = 0.0  # 0 is greedy
    top_p: float | None = None  # None is the checkpoint's
    seed: int = 0
    max_new_tokens: int | None = None  # None is what the reference's program for this task takes
    num_chunks: int = 1
    chunk_idx: int = 0
    single_pred_prompt: bool = False  # the tasks whose scripts pass it have it anyway
    all_rounds: bool = False
    lang: str = "en"
    strict: bool = False  # stop at the first question that cannot be asked
    mesh: tuple[tuple[str, int], ...] = ()  # of each process's own devices; empty is all of them
    dtype: str | None = None
    quantize: str | None = None
    int8_prefix: bool = False
    int8_activations: bool = False

    def __post_init__(self):
        if self.new_tokens < 1:
            raise ValueError(f"--max_new_tokens {self.new_tokens} must be at least 1")
        if self.task is not None and self.lang not in BENCHMARKS[self.task].langs:
            raise ValueError(f"--lang {self.lang}: {self.task} has {', '.join(BENCHMARKS[self.task].langs)}")
        check_axes(self.mesh, "data", "tensor")

    @property
    def layout(self) -> Layout:
        return layout_for(self.task, self.question_file)

    @property
    def new_tokens(self) -> int:
        """How many an answer has at most."""
        return self.layout.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens

    @property
    def prompt_flags(self) -> PromptFlags:
        of_task = self.task is not None and BENCHMARKS[self.task].single_pred_prompt
        return PromptFlags(self.single_pred_prompt or of_task, self.all_rounds, self.lang)
