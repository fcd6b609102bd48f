"""A question and its choices, for scenes_choice.yaml and scenes_likelihood.yaml."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    """Right if the answer is the choice, to the letter; the model was taught to answer so."""
    return {"exact": float(results[0].strip() == doc["choices"][doc["answer"]])}
