"""Questions about one picture, each asked after the answer to the one before, for scenes_rounds.yaml."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    """The first question; of later rounds (pictures, question, whether it ends, answers, what to be told next)."""
    if round_idx is None:
        return doc["question"]
    said = previous_output[-1]
    ends = round_idx == (3 if previous_output[0] in doc["choices"][:2] else 2)
    info = [*(previous_round_info or []), said]
    return doc_to_visual(doc), f"Is there a {said} in the image?", ends, previous_output, info


def process_results(doc, results):
    return {"rounds": float(len(results[0]))}
