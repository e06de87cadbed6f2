"""The six published tasks, as lm-evaluation-harness defines them, with data from the hub or from files.

Prompts, metrics and filters are lm-eval's own task files; for local data only the source is replaced.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

Doc = dict[str, Any]


class LocalData(NamedTuple):
    """Files of a task, the first that is there is read; and what makes a line lm-eval's document."""

    definition: str  # lm-eval's task file
    files: tuple[str, ...]
    convert: Callable[[Doc], Doc]
    labels: bool = False  # the answers are in FILE-labels.lst


def _lambada(line: Doc) -> Doc:
    return {"text": line["text"]}


def _piqa(line: Doc) -> Doc:
    return {
        "goal": line["goal"],
        "sol1": line["sol1"],
        "sol2": line["sol2"],
        "label": _one_of((0, 1), int(line["label"])),
    }


def _boolq(line: Doc) -> Doc:
    if "query" not in line:
        label = line["label"] if "label" in line else line["answer"]
        return {"passage": line["passage"], "question": line["question"], "label": _one_of((0, 1), int(label))}
    passage, question = line["query"].rsplit("\nQuestion: ", 1)
    answer = line["choices"][line["gold"]]
    return {
        "passage": passage.removeprefix("Passage: "),
        "question": question.removesuffix("?"),
        "label": ("no", "yes").index(answer),
    }


def _race(line: Doc) -> Doc:
    keys = ("question", "answer", "options")
    problems = list(zip(line["questions"], line["answers"], line["options"], strict=True))
    for _, answer, options in problems:
        _one_of("ABCD"[: len(options)], answer)
    return {
        "article": line["article"],
        "problems": repr([dict(zip(keys, problem, strict=True)) for problem in problems]),
    }


def _triviaqa(line: Doc) -> Doc:
    return {"question": line["question"], "answer": {"aliases": _texts(line["answers"])}}


def _webqs(line: Doc) -> Doc:
    return {"question": line["question"], "answers": _texts(line["answers"])}


def _one_of(expected: Sequence[Any], found: Any) -> Any:
    if found not in expected:
        raise ValueError(f"expected one of {', '.join(map(str, expected))}, got {found!r}")
    return found


def _texts(answers: Any) -> list[str]:
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers are {answers!r}; expected a list of texts")
    return answers


LOCAL = {
    "lambada_openai": LocalData("lambada/lambada_openai.yaml", ("lambada_test_openai.jsonl",), _lambada),
    "piqa": LocalData("piqa/piqa.yaml", ("piqa_valid.jsonl",), _piqa, labels=True),
    "boolq": LocalData("super_glue/boolq/default.yaml", ("boolq_val.jsonl",), _boolq),
    "race": LocalData("race/race.yaml", ("race_test_high.jsonl", "race_dev_high.jsonl"), _race),
    "triviaqa": LocalData("triviaqa/default.yaml", ("triviaqa_dev.jsonl",), _triviaqa),
    "webqs": LocalData("webqs/webqs.yaml", ("webqs_test.jsonl",), _webqs),
}


def read_local(task: str, folder: Path) -> list[Doc]:
    """lm-eval's documents of a task.

    Raises:
        ValueError: the task has no local form, or a file is missing or damaged; it is named, with its line.
    """
    if task not in LOCAL:
        raise ValueError(f"--data-dir has no form for the task {task}; known: {', '.join(LOCAL)}. Leave it to the hub")
    data = LOCAL[task]
    path = next((folder / name for name in data.files if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{task}: {folder} holds no {' or '.join(data.files)}; add it, or leave {task} out of --tasks")
    labels = _labels(path) if data.labels else None
    docs = []
    with path.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                if labels is not None:
                    line["label"] = labels[len(docs)]
                docs.append(data.convert(line))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
                what = f"{type(error).__name__}: {error}"
                raise ValueError(f"{path}, line {number}, is no line of {task} ({what}); restore the file") from None
    if not docs or (labels is not None and len(labels) != len(docs)):
        raise ValueError(f"{path} has {len(docs)} lines, its labels {len(labels or [])}; restore the files")
    return docs


def _labels(path: Path) -> list[str]:
    labels = path.with_name(path.stem + "-labels.lst")
    if not labels.is_file():
        raise ValueError(f"{labels} is missing; it holds the answers of {path.name}, one number a line")
    return labels.read_text().split()


def build_tasks(names: Sequence[str], data_dir: Path | None = None) -> list[Task]:
    """Tasks by lm-eval's names.

    Args:
        names: of tasks, groups or tags; with ``data_dir``, of ``LOCAL``.
        data_dir: where the files are; by default lm-eval gets the data from the hub.

    Raises:
        ValueError: an unknown task, or of :func:`read_local`.
    """
    if data_dir is not None:
        read = {name: read_local(name, data_dir) for name in names}  # all of it, before anything else takes time
        return [_local_task(name, docs) for name, docs in read.items()]
    manager = TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    try:
        return list(manager.load(list(names))["tasks"].values())
    except OSError as error:
        raise ValueError(
            f"the tasks' data is not to be had: {error}. On a machine without a network, fill the cache of Hugging "
            "Face's datasets on one that has it (HF_HOME names its folder), or give the files by --data-dir"
        ) from error


def _local_task(name: str, docs: list[Doc]) -> Task:
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / LOCAL[name].definition, resolve_func=True)
    split = config.get("test_split") or config["validation_split"]
    data = datasets.DatasetDict({split: datasets.Dataset.from_list(docs)})
    for other in ("training_split", "validation_split", "fewshot_split"):
        if config.get(other) != split:
            config[other] = None
    config.pop("tag", None)
    config["custom_dataset"] = lambda **_: data
    return ConfigurableTask(config=config)
