"""LLaVA-Bench (in the wild), whose answers GPT-4 judges, which is not done here."""

from llava_jax.evaluation.benchmarks.benchmark import Benchmark
from llava_jax.evaluation.questions import VQA

BENCHMARK = Benchmark(VQA, judged="hand {answers} itself to LLaVA's llava/eval/eval_gpt_review_bench.py")
