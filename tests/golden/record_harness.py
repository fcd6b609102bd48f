"""Records data/harness_prompts.json: the prompts that lmms-eval's own model `llava` makes of its benchmarks' documents.

Runs where lmms-eval is installed (lmms-eval[metrics]==0.7.3), with a checkout of github.com/haotian-liu/LLaVA, of which
two modules are imported, the templates and the constants:

    python tests/golden/record_harness.py --llava LLaVA

Tasks and model are lmms-eval's; the documents are made up, in the columns of each data set. The model has no
checkpoint, and what it gives `tokenizer_image_token` is its prompt. The file is a list of cases, each with

    task, doc              the document's name, here
    system_instruction     only where the evaluation was given one
    ctx                    the context in the document's request, the same for either kind of model
    messages               what a chat model gets for the document; a picture is its index among the document's own
    pictures               how many the document's `doc_to_visual` gives
    conv_template, prompt  the prompt, up to where the model is to answer
    continuations          only of multiple choice, which no chat model is asked: [[continuation, prompt with it], …]
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault("OPENAI_API_KEY", "none")  # a judge wants one when its task is loaded; none is asked

import datasets
import lmms_eval.tasks
import torch
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from lmms_eval.utils import load_yaml_config
from PIL import Image

OUTPUT = Path(__file__).parent / "data" / "harness_prompts.json"
TASKS = Path(lmms_eval.tasks.__file__).parent
ONE, TWO, THREE = (Image.new("RGB", (4 + k, 3), (30 * k, 90, 200 - 20 * k)) for k in range(3))


# ---- documents


def mmmu(question, options, *images):
    """Options and pictures as MMMU has them: a list as text, and seven columns."""
    columns = {f"image_{k + 1}": images[k] if k < len(images) else None for k in range(7)}
    kind = "multiple-choice" if options else "open"
    named = dict(id="validation_Art_1", question=question, options=str(options), question_type=kind, answer="A")
    return named | columns | dict(subject="Art", img_type="['Paintings']", explanation="")


def mathvista(question, question_type, answer_type, choices=None, unit="", precision=None):
    named = dict(pid="1", question=question, decoded_image=ONE, image="images/1.jpg", choices=choices, unit=unit)
    return named | dict(question_type=question_type, answer_type=answer_type, precision=precision, answer="1", query="")


def mmbench(question, hint, *options):
    named = dict(index=7, question=question, hint=hint, answer="A", image=ONE, category="x", source="y", split="dev")
    return named | {"L2-category": "z", "comment": "nan"} | dict(zip("ABCD", options, strict=True))


def science(question, hint, image):
    return dict(
        image=image, question=question, choices=["a solid", "a liquid"], answer=1, hint=hint, task="closed choice"
    )


def seed(question, choices, images, data_type="image"):
    named = dict(question=question, answer="B", data_type=data_type, question_id="1", image=images)
    named |= {"data_id": [f"{k}.jpg" for k in range(len(images))]}
    return named | {f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)}


def diagram(question, options):
    return dict(question=question, options=options, answer="1", image=ONE)


PETS = ["a cat", "a dog", "a bird", "a fish"]
FRUIT = ["<image 1>", "<image 2>"]
DOCUMENTS = {  # the file of the task: its documents by name
    "ai2d/ai2d.yaml": {"letters": diagram("What eats grass?", ["hawk", "rabbit"])},
    "ai2d/reasoning/ai2d_reasoning.yaml": {"system": diagram("What eats grass?", ["hawk", "rabbit"])},
    "arc/arc_easy.yaml": {
        "text": dict(
            question="Which is cold?", choices=dict(text=["ice", "fire"], label=["A", "B"]), answerKey="A", id="1"
        )
    },
    "blink/blink_jigsaw.yaml": {
        "two": dict(
            idx="val_1",
            question="Which?",
            prompt="Which one is missing?\n(A) the second image\n(B) the third image",
            choices=["a", "b"],
            answer="(A)",
            sub_task="Jigsaw",
            image_1=ONE,
            image_2=TWO,
            image_3=None,
            image_4=None,
        )
    },
    "chartqa/chartqa.yaml": {"number": dict(type="human_test", question="How many bars?", answer="3", image=ONE)},
    "coco_cap/coco2017_cap_val.yaml": {
        "caption": dict(question_id="1.jpg", image=ONE, question="Please describe.", answer=["A cat."], id=1)
    },
    "docvqa/docvqa_val.yaml": {
        "date": dict(
            questionId="1", question="What is the date mentioned in this letter? ", image=ONE, answers=["1/8/93"]
        )
    },
    "gqa/gqa.yaml": {"word": dict(id="1", imageId="n1", question="Is it overcast?", answer="no", image=ONE)},
    "gsm8k/gsm8k-cot.yaml": {
        f"shots_{k}": dict(question=f"What is {k} + 1?", answer=f"One more than {k}. #### {k + 1}") for k in range(9)
    },
    "illusionvqa/illusionvqa_comprehension.yaml": {
        "palette": dict(
            image=ONE.convert("P"), question="What is this?", options=["a duck", "a rabbit"], answer="a duck"
        )
    },
    "llava-in-the-wild/llava-in-the-wild.yaml": {
        "plain": dict(
            question_id=1, question="Describe this photo in detail.", image=ONE, category="detail", gpt_answer="."
        ),
        "placeholder": dict(
            question_id=2, question="What is in <image> here?", image=TWO, category="conv", gpt_answer="."
        ),
        "spaces": dict(
            question_id=3, question=" Qu'est-ce que c'est ?\n\n你好 🦙 \n", image=TWO, category="conv", gpt_answer="."
        ),
    },
    "mathvista/mathvista_testmini_format.yaml": {
        "choices": mathvista("Which is larger?", "multi_choice", "text", ["(A) 1", "2.5"]),
        "unit": mathvista("How much is it?", "free_form", "float", unit="$", precision=2.0),
    },
    "mmbench/mmbench_en_dev.yaml": {
        "hint": mmbench("Which animal is it?", "It barks.", *PETS),
        "two_options": mmbench("Is it a cat?", "nan", "yes", "no", "nan", "nan"),
    },
    "mme/mme.yaml": {
        "pair": dict(
            question_id="color/1.jpg",
            image=ONE,
            question="Is it red? Please answer yes or no.",
            answer="Yes",
            category="color",
        )
    },
    "mmmu/mmmu_val.yaml": {
        "in_options": mmmu("Which is the apple?", FRUIT, ONE, TWO),
        "middle": mmmu("In the picture <image 1> of a table, what is red?", ["apple", "pear"], ONE),
        "one": mmmu("<image 1> What is it?", ["apple", "pear"], ONE),
        "open": mmmu("What is the sum in <image 1>?\n", [], ONE),
        "repeated": mmmu("<image 1> Which part of <image 1> is red?", ["left", "right"], ONE),
        "reversed": mmmu("Was <image 2> made before <image 1>?", ["yes", "no"], ONE, TWO),
        "two": mmmu("Compare <image 1> with <image 2>. Which is older?", ["the first", "the second"], ONE, TWO),
    },
    "mmmu_pro/mmmu_pro_standard.yaml": {"two": mmmu("Compare <image 1> with <image 2>.", ["older", "newer"], ONE, TWO)},
    "pope/pope.yaml": {
        "yes_no": dict(
            id="1",
            question_id="1",
            question=" Is there a dog in the image? ",
            answer="yes",
            image=ONE,
            image_source="1",
            category="random",
        )
    },
    "scienceqa/scienceqa.yaml": {
        "picture": science("Is it a solid or a liquid?", "", ONE),
        "placeholder": science("What does <image> mean in a page's source?", "", None),
        "text": science("Is milk a solid or a liquid?", "Milk is poured.", None),
    },
    "scienceqa/scienceqa_img.yaml": {"hint": science("Is it a solid or a liquid?", "Look at the picture.", ONE)},
    "seedbench/seedbench.yaml": {
        "image": seed("What is it?", PETS, [ONE]),
        "video": seed("What happens next?", PETS, [ONE, TWO, THREE], "video"),
    },
    "seedbench/seedbench_ppl.yaml": {
        "image": seed("What is it?", PETS, [ONE]),
        "video": seed("What happens next?", PETS, [ONE, TWO], "video"),
    },
    "seedbench_2/seedbench_2.yaml": {
        "image_choices": seed("Which one is a dog?", ["0.jpg", "1.jpg", "none", "both"], [ONE, TWO], "Single Image")
    },
    "textvqa/textvqa_val.yaml": {
        "capital": dict(
            question_id=1, question="what does the SIGN say?", image=ONE, answers=["stop"] * 10, ocr_tokens=["STOP"]
        )
    },
    "vizwiz_vqa/vizwiz_vqa_val.yaml": {
        "capital": dict(
            question_id="VizWiz_1", image=ONE, question="what's the name of this?", answers=["x"], category="other"
        )
    },
}
OTHER_TEMPLATES = ("llava_v1", "mistral_instruct", "chatml_direct", "llava_llama_2")
UNDER_ALL = {  # templates; by task and document
    ("llava_in_the_wild", "spaces"),
    ("pope", "yes_no"),
    ("scienceqa", "text"),
    ("seedbench_ppl", "image"),
}
INSTRUCTED = {("mmmu_val", "two"), ("pope", "yes_no"), ("scienceqa", "text")}
INSTRUCTION = "You are an expert.\n"
ONLY_LLAVA = {"seedbench_2"}  # has prompts for models that it names, and does not load for others
RECORDED = {"gsm8k_cot": {"shots_8"}}  # the others are examples in its context


# ---- the model without a checkpoint


class Model(torch.nn.Module):
    config = SimpleNamespace(image_aspect_ratio="anyres")

    def tie_weights(self):
        pass

    def forward(self, input_ids, **_):
        return {"loss": torch.zeros(()), "logits": torch.zeros(*input_ids.shape, 2)}

    def generate(self, input_ids, **_):
        return input_ids


class Tokenizer:
    padding_side, pad_token_id, eos_token_id = "left", 0, 2

    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def decode(self, tokens):
        return "</s>"

    def batch_decode(self, rows, skip_special_tokens):
        return ["" for _ in rows]


def module(name, **names):
    sys.modules[name] = made = ModuleType(name)
    vars(made).update(names)


def imported(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)


def llava_without_checkpoint(checkout):
    """(lmms-eval's class, the prompts that its instances make, in their order)"""
    prompts = []

    def tokenizer_image_token(prompt, *_, return_tensors):
        prompts.append(prompt)
        return torch.tensor(list(prompt.encode()))

    module("llava")
    imported("llava.constants", checkout / "llava" / "constants.py")
    imported("llava.conversation", checkout / "llava" / "conversation.py")
    module(
        "llava.mm_utils",
        get_model_name_from_path=lambda path: path,
        process_images=lambda images, *_: torch.zeros(len(images), 1),
        tokenizer_image_token=tokenizer_image_token,
    )
    module("llava.model")
    module("llava.model.builder", load_pretrained_model=lambda *_, **__: (Tokenizer(), Model(), None, 2048))
    from lmms_eval.models.simple.llava import Llava

    return Llava, prompts


# ---- tasks without their data sets


def load_task(kind, file, documents, model_name, folder):
    config = load_yaml_config(TASKS / file, mode="full")
    splits = {config.get(f"{name}_split") for name in ("training", "validation", "test", "fewshot")} - {None}
    rows = datasets.Dataset.from_list(documents)
    path = str(Path(folder) / config["task"])
    datasets.DatasetDict(dict.fromkeys(sorted(splits), rows)).save_to_disk(path)
    config |= dict(dataset_path=path, dataset_kwargs={"load_from_disk": True})
    if file.startswith("gqa/"):
        del config["process_docs"]  # it downloads the pictures and adds them to the documents
    return kind(config=config, model_name=model_name)


def requests_by_document(task, system_instruction):
    task.build_all_requests(system_instruction=system_instruction)
    found = {}
    for request in task.instances:
        *_, document, _, _ = request.args
        found.setdefault(document, []).append(request)
    return found


def shown(messages, visuals):
    """The messages, with each picture as its index among the document's."""
    known = [pixels(image) for image in visuals]

    def part(content):
        return (
            content if content["type"] == "text" else {"type": "image", "picture": known.index(pixels(content["url"]))}
        )

    return [{"role": message["role"], "content": [part(p) for p in message["content"]]} for message in messages]


def pixels(image):
    return image.mode, image.size, image.tobytes()


def prompts_of(requests, model, prompts):
    prompts.clear()
    if requests[0].request_type == "generate_until":
        model.generate_until(requests)
        [prompt] = prompts
        return {"prompt": prompt}
    model.loglikelihood(requests)
    contexts, whole = prompts[::2], prompts[1::2]
    assert len(set(contexts)) == 1
    continuations = [[request.args[1], prompt] for request, prompt in zip(requests, whole, strict=True)]
    return {"prompt": contexts[0], "continuations": continuations}


def cases_of(file, Llava, prompts, folder):
    names, documents = list(DOCUMENTS[file]), list(DOCUMENTS[file].values())
    simple = load_task(ConfigurableTask, file, documents, "llava", folder)
    task, rows = simple.config.task, simple.dataset[simple.config.test_split]
    chat = load_task(ConfigurableMessagesTask, file, documents, "llava" if task in ONLY_LLAVA else "llava_jax", folder)
    for system_instruction in (None, INSTRUCTION):
        requests = requests_by_document(simple, system_instruction)
        asked = requests if "multiple_choice" in simple.OUTPUT_TYPE else requests_by_document(chat, system_instruction)
        for k, name in enumerate(names):
            if name not in RECORDED.get(task, names) or (system_instruction and (task, name) not in INSTRUCTED):
                continue
            visuals = simple.doc_to_visual(rows[k]) or []
            [ctx] = {request.args[0] for request in (*requests[k], *asked[k])}
            case = {"task": task, "doc": name, "ctx": ctx, "pictures": len(visuals)}
            case["messages"] = shown(chat.doc_to_messages(rows[k]), visuals)
            if system_instruction:
                case["system_instruction"] = system_instruction
            others = OTHER_TEMPLATES if (task, name) in UNDER_ALL and not system_instruction else ()
            for template in ("vicuna_v1", *others):
                model = Llava(pretrained="none", device="cpu", device_map="auto", conv_template=template)
                model.task_dict[task] = simple.dataset
                yield case | {"conv_template": template} | prompts_of(requests[k], model, prompts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llava", type=Path, required=True, help="a checkout of LLaVA")
    args = parser.parse_args()
    Llava, prompts = llava_without_checkpoint(args.llava)
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for file in sorted(DOCUMENTS) for case in cases_of(file, Llava, prompts, folder)]
    cases.sort(key=lambda case: (case["task"], case["doc"]))
    lines = [json.dumps(case, ensure_ascii=False, sort_keys=True) for case in cases]
    OUTPUT.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"{len(cases)} cases, {OUTPUT.stat().st_size / 1e3:.0f} kB -> {OUTPUT}")


if __name__ == "__main__":
    main()
