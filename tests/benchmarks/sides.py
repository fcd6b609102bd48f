"""The sides of a benchmark, `Ours` and `Theirs` or `Before`, with the same methods, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np

THREADS = 2
TICKS = os.sysconf("SC_CLK_TCK")


class Ours:
    """`llava_jax.load` and the public methods of `Llava`, in transformers' reading of the weights."""

    def __init__(self, directory: Path):
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["LLAVA_JAX_CACHE_DIR"] = ""  # the first call shows what compiling costs
        import llava_jax

        self.llava, self.params = llava_jax.load(directory, reading="llava-hf")

    def template(self) -> str:
        return self.llava.conversation("{}", 1).get_prompt()

    def answer(self, image, question: str, new: int) -> str:
        return self.llava.generate(self.params, image, question, max_new_tokens=new)

    def answer_all(self, asked, new: int) -> list[str]:
        return self.llava.generate_batch(self.params, asked, max_new_tokens=new)

    def answer_mixed(self, asked, limits: list[int]) -> list[str]:
        """Each question's answer has its own length."""
        return self.llava.generate_batch(self.params, asked, max_new_tokens=limits)

    def compile_mixed(self, asked, limits: list[int]) -> None:
        """What `answer_mixed` compiles: the same work by weights with which each answer ends at once."""
        import jax.numpy as jnp

        weights, decoder = self.params, self.params["language_model"]
        kernel = decoder["lm_head"]["kernel"].at[:, self.llava.config.generation.eos_token_ids[0]].set(jnp.nan)
        self.params = weights | {"language_model": decoder | {"lm_head": {"kernel": kernel}}}  # NaN is the largest
        self.answer_mixed(asked, limits)
        self.params = weights

    def programs_alone(self, asked, new: int) -> float:
        """Seconds that (image, questions) must take: each image's one prefill, no position padded, and all of its
        questions' tokens, in one batch. The host's work and the compilation are not in it."""

        from llava_jax.inference.generation_options import GenerationOptions
        from llava_jax.inference.sampling import Greedy
        from llava_jax.inputs.batch import pack
        from llava_jax.inputs.groups import Prompt, group_prompts, pack_questions

        llava, engine, total = self.llava, self.llava.engine, 0.0
        options = GenerationOptions(new, Greedy())
        for image, questions in asked:
            images = llava.load_images(image)
            sizes = [picture.size for picture in images]
            prompts = [Prompt(text, np.asarray(llava.prompt_ids(text, sizes))) for text in questions]
            (group,) = group_prompts(prompts, None, sizes, llava.config)
            batch = pack([group.prefix], images, llava.config)
            cut = ("gather_indices", "position_ids", "attention_mask")
            batch = batch._replace(**{name: getattr(batch, name)[:, : group.prefix_length] for name in cut})
            packed = pack_questions([group.suffixes], 1, len(prompts))
            longest = int(packed.lengths.max())
            packed = packed._replace(ids=packed.ids[..., :longest])

            def both(batch=batch, packed=packed):
                prefix, _ = engine.prefill(self.params, batch)
                state = engine.sample_first_token(self.params, prefix, packed, options)
                np.asarray(engine.decode(self.params, prefix, state, options, new).tokens)

            both()
            total += seconds(both)
        return total

    def host_share(self, pictures, new: int) -> tuple[float, float]:
        """(seconds in all, seconds inside compiled programs) of one question on each of many pictures. A call that
        compiles counts in neither: it is made once more."""
        import jax

        from llava_jax.compiling import LoggedJit

        inside = compiling = 0.0

        def timed(program: LoggedJit):
            def call(*args):
                nonlocal inside, compiling
                start, known = time.perf_counter(), len(program.compiled_for)
                out = jax.block_until_ready(program(*args))
                if len(program.compiled_for) > known:
                    compiling += time.perf_counter() - start
                    start = time.perf_counter()
                    out = jax.block_until_ready(program(*args))
                inside += time.perf_counter() - start
                return out

            return call

        batch = vars(self.llava.engine.batch)
        programs = {name: value for name, value in batch.items() if isinstance(value, LoggedJit)}
        batch.update({name: timed(program) for name, program in programs.items()})
        asked = [(picture, ["What is in this picture?"]) for picture in pictures]
        whole = seconds(self.answer_all, asked, new)
        batch.update(programs)
        return whole - compiling, inside


class Before(Ours):
    """`Ours`, of another checkout of this package. What is timed is called by names that both have."""

    def __init__(self, checkout: Path, directory: Path):
        sys.path.insert(0, str(checkout.resolve()))
        for name in [name for name in sys.modules if name.partition(".")[0] == "llava_jax"]:
            del sys.modules[name]  # a new process imports the script that started it, and what that imports
        super().__init__(directory)

    def fastest_rows(self, image, questions, new: int) -> dict[int, float]:
        """There is one way only: all of a picture's questions."""
        return {len(questions): seconds(self.answer_all, [(image, questions)], new) / len(questions)}

    def answer_mixed(self, asked, limits: list[int]) -> None:
        """One call, in which all answers are as long as the longest: what it does for answers that end by themselves,
        since each of its waves goes on until its longest has ended, and in `mixed_prompts` that is as long in all."""
        self.answer_all(asked, max(limits))


class Theirs:
    """transformers at its best here: sdpa, a KV cache, inference mode, left-padded batches of `rows` questions."""

    def __init__(self, directory: Path, template: str):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(THREADS)
        self.torch, self.template, self.rows = torch, template, 1
        self.model = transformers.LlavaNextForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.tokenizer = transformers.LlamaTokenizer.from_pretrained(directory, legacy=True, padding_side="left")
        self.processor = transformers.LlavaNextProcessor(
            transformers.AutoImageProcessor.from_pretrained(directory, backend="pil"),
            self.tokenizer,
            patch_size=self.model.config.vision_config.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )

    def answer(self, image, question: str, new: int) -> str:
        return self._generate([image], [question], new)[0]

    def answer_all(self, asked, new: int) -> list[str]:
        out = []
        for image, questions in asked:
            for start in range(0, len(questions), self.rows):
                some = questions[start : start + self.rows]
                out += self._generate([image] * len(some), some, new)
        return out

    def fastest_rows(self, image, questions, new: int) -> dict[int, float]:
        """Seconds a question for some batch sizes; the fastest is kept for `answer_all`."""
        took = {}
        for rows in {1, 4, 9, len(questions)}:
            some = (questions * rows)[:rows]
            took[rows] = seconds(self._generate, [image] * rows, some, new) / rows
        self.rows = min(took, key=took.get)
        return dict(sorted(took.items()))

    def compile_mixed(self, asked, limits: list[int]) -> None:
        """Nothing is compiled."""

    def answer_mixed(self, asked, limits: list[int]) -> None:
        """Batches of a picture's questions, or of text alone, each to its longest answer."""
        rows = [(image, text) for image, questions in asked for text in questions]
        together: dict[int, list] = {}
        for (image, text), limit in sorted(zip(rows, limits, strict=True), key=lambda row: row[1]):
            together.setdefault(id(image), []).append((image, text, limit))
        for same in together.values():
            for start in range(0, len(same), self.rows):
                images, questions, longest = zip(*same[start : start + self.rows], strict=True)
                self._generate(list(images), questions, max(longest))

    def keep_rows(self, rows: int) -> None:
        self.rows = rows

    def _generate(self, images, questions, new: int) -> list[str]:
        with self.torch.inference_mode():
            template = self.template if images[0] is not None else self.template.replace("<image>\n", "")
            text = [template.format(question) for question in questions]
            images = None if images[0] is None else images
            inputs = self.processor(images=images, text=text, padding=True, return_tensors="pt")
            tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=new, use_cache=True)
            new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
            return [t.strip() for t in self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def seconds(call, *args) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def _busy_seconds() -> float:
    """What all processes of the machine, and its host, have taken of its processors (Linux)."""
    user, nice, system, _idle, _wait, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + sum(rest[:3])) / TICKS


# ---- each in its process, so that neither's threads, memory or allocator is in the other's way


def _serve(pipe, side, args) -> None:
    try:
        served = side(*args)
        pipe.send((0.0, None, None))
        while (request := pipe.recv()) is not None:
            method, args = request
            start = time.perf_counter()
            value = getattr(served, method)(*args)
            pipe.send((time.perf_counter() - start, value, None))
    except Exception:
        pipe.send((0.0, None, traceback.format_exc()))


class Process:
    """A side in a new process: `call` and `time` its methods; a context manager."""

    def __init__(self, side: type, *args):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side, args), daemon=True)
        self._process.start()
        self.others = 0.0
        self._receive()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_) -> None:
        self._pipe.send(None)
        self._process.join()

    def _receive(self):
        took, value, error = self._pipe.recv()
        if error:
            raise RuntimeError(error)
        return took, value

    def time(self, method: str, *args) -> float:
        """Seconds that the call took over there; `others` is the part of the machine that was taken meanwhile."""
        busy, own, start = _busy_seconds(), self._own_seconds(), time.perf_counter()
        self._pipe.send((method, args))
        took = self._receive()[0]
        spent = _busy_seconds() - busy - (self._own_seconds() - own)
        self.others = max(0.0, spent / os.cpu_count() / (time.perf_counter() - start))
        return took

    def _own_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / TICKS

    def call(self, method: str, *args):
        """What the call returned."""
        self._pipe.send((method, args))
        return self._receive()[1]

    def peak_memory(self) -> int:
        """The largest resident set so far, in bytes (Linux)."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
