"""Files of the six zero-shot tasks for tests, in words of the test tokenizer."""

import json
from pathlib import Path


def write_data(folder: Path) -> Path:
    """Two samples of each task."""
    options = [["w1 w2", "w3", "w4 w5", "w6"], ["w9", "w8", "w7", "w1"]]
    lines = {
        "lambada_test_openai.jsonl": [{"text": "w1 w2 w3 w4"}, {"text": "w7 " * 90 + "w8"}],  # longer than the model
        "piqa_valid.jsonl": [{"goal": "w1", "sol1": "w2 w3", "sol2": "w4"}, {"goal": "w5", "sol1": "w6", "sol2": "w7"}],
        "boolq_val.jsonl": [
            {"query": f"Passage: w{n} w2\nQuestion: w3 w4?", "choices": ["no", "yes"], "gold": n} for n in (0, 1)
        ],
        "race_test_high.jsonl": [
            {"article": "w1 w2", "questions": ["w3  _  .", "w4 ?"], "answers": ["B", "C"], "options": options},
            {"article": "w5", "questions": ["w6 ?"], "answers": ["A"], "options": options[:1]},
        ],
        "triviaqa_dev.jsonl": [{"question": "w1 w2", "answers": ["w3", "w4"]}, {"question": "w5", "answers": ["w6"]}],
        "webqs_test.jsonl": [{"question": "w1", "answers": ["w3", "w2"]}, {"question": "w5 w6", "answers": ["w7 w8"]}],
    }
    folder.mkdir()
    for name, docs in lines.items():
        (folder / name).write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "piqa_valid-labels.lst").write_text("0\n1\n")
    return folder
