"""Many streams against one, by guidellm on `llava-jax serve`: tokens a second and time to first token.

    python3 -m venv guidellm && guidellm/bin/pip install "guidellm[vision]==0.8.1"
    python tests/benchmarks/serve.py --guidellm guidellm/bin/guidellm
    python tests/benchmarks/serve.py --guidellm guidellm/bin/guidellm --model-path llava-v1.6-vicuna-7b --tokens 128

The bundled model unless told otherwise. Each request has a picture of its own, so that no prefix is shared, and an
answer of exactly so many tokens (guidellm asks for `ignore_eos`). Each number of streams is a run of its own. Every
request of every run must succeed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
from served import Server, scene_uri, served

from llava_jax.demo.model import BUNDLED, NAME, convert_published

QUESTION = "Describe the image."
LIMIT = 1200  # seconds that a run may take


@dataclass(frozen=True)
class Load:
    """What is asked for in a run."""

    requests: int
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guidellm", required=True, help="guidellm's command, in an environment of its own")
    parser.add_argument("--model-path", type=Path, help="a converted checkpoint (the bundled model)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="at once (1 16)")
    parser.add_argument("--requests", type=int, default=64, help="of each run (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (%(default)s)")
    args = parser.parse_args()
    load = Load(args.requests, args.tokens)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = args.model_path or convert_published(BUNDLED, folder / NAME)
        server = stack.enter_context(served(model))
        measure(server, args.guidellm, args.streams[0], Load(max(args.streams), args.tokens), folder)  # to warm up
        results = [measure(server, args.guidellm, streams, load, folder) for streams in args.streams]
        alone, beside = gaps(server, pictures=0), gaps(server, pictures=16)
    print(table(args.streams, results, load))
    print(
        "\nBetween the tokens of one stream, ms: median and longest, alone, and while 16 new pictures are asked about"
    )
    print(" | ".join(f"{statistics.median(some) * 1e3:.0f}, {max(some) * 1e3:.0f}" for some in (alone, beside)))


def measure(server: Server, guidellm: str, streams: int, load: Load, folder: Path) -> dict:
    """guidellm's metrics of one run.

    Raises:
        RuntimeError: guidellm failed, or one of its requests did.
    """
    data, report = folder / f"{streams}.jsonl", folder / f"{streams}.json"
    with open(data, "w") as file:
        for number in range(load.requests):
            row = {"prompt": QUESTION, "image": scene_uri(streams, number), "output_tokens_count": load.tokens}
            file.write(json.dumps(row) + "\n")
    command = [guidellm, "run", "--disable-console", "--profile", f"kind=concurrent,streams={streams}"]
    command += ["--backend", f"kind=openai_http,target={server.url},model={server.model}"]
    command += ["--constraint", f"kind=max_requests,count={load.requests}"]
    command += ["--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={report}"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # it looks for no tokenizer: the server counts
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=offline)
    if done.returncode or not report.exists():
        raise RuntimeError(f"guidellm failed:\n{(done.stdout + done.stderr)[-2000:]}")
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    if metrics["request_totals"]["successful"] != load.requests:
        raise RuntimeError(f"of {load.requests} requests at {streams} streams: {metrics['request_totals']}")
    return metrics


def gaps(server: Server, pictures: int) -> list[float]:
    """Seconds between the pieces that come of one stream, while others ask about so many pictures at once."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    endless = {"ignore_eos": True}

    def ask(number: int) -> None:
        image = {"type": "image_url", "image_url": {"url": scene_uri(1000, number)}}
        messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, image]}]
        client.chat.completions.create(model=server.model, messages=messages, max_tokens=16, extra_body=endless)

    said = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=200,
        stream=True,
        temperature=0,
        extra_body=endless | {"logprobs": True},  # so that each token is told of
    )
    times = []
    with ThreadPoolExecutor(max(1, pictures)) as threads:
        for chunk in said:
            times += [time.perf_counter()] * bool(chunk.choices)
            if len(times) == 20:
                asked = [threads.submit(ask, number) for number in range(pictures)]
        for each in asked:
            each.result()
    return np.diff(times[2:]).tolist()


def table(streams: list[int], results: list[dict], load: Load) -> str:
    """Markdown; guidellm's mean of tokens a second, its median and 95th percentile of times to the first token."""
    lines = [f"{load.requests} requests a run, each a picture of its own and {load.tokens} tokens", ""]
    lines += [
        "| streams | tokens/s | ratio | TTFT median, ms | TTFT 95 %, ms | ms between tokens |",
        "| ---: " * 6 + "|",
    ]
    rates = [metrics["output_tokens_per_second"]["successful"]["mean"] for metrics in results]
    for at_once, rate, metrics in zip(streams, rates, results, strict=True):
        first = metrics["time_to_first_token_ms"]["successful"]
        between = metrics["inter_token_latency_ms"]["successful"]["median"]
        times = f"{first['median']:.0f} | {first['percentiles']['p95']:.0f} | {between:.1f}"
        lines.append(f"| {at_once} | {rate:.1f} | {rate / rates[0]:.2f} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
