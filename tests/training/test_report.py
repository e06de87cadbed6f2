import json
import resource
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from megatron.config import LoggingConfig
from megatron.training.report import Report, duration, human, scalars

TRAIN = {
    "loss": 5.0,
    "aux_loss": 1.1,
    "z_loss": 0.0,
    "experts": {"load": [1.5, 2.0], "dropped": [0.1, 0.25], "dead": [0, 3]},
    "monitors": {"max_attention_logit": [3.5, 21.25], "max_router_logit": [7.0, 6.0], "grad_norm": {"router": 0.25}},
    "grad_norm": 0.5,
    "lr": 1e-3,
    "skipped": 1,
    "seconds_per_step": 0.5,
    "tokens_per_second": 12_345.0,
    "tflops_per_device": 1.5,
    "mfu": 0.421,
    "memory_gb": 3.2,
}
RUN = {
    "name": "moe",
    "parameters": 13_000_000_000,
    "active_parameters": 350_000_000,
    "vocab_size": 50257,
    "world_size": 64,
    "pipeline_parallel": 1,
    "expert_parallel": [32, 64],
    "tensor_parallel": 1,
    "device": "GPU",
    "precision": "bf16",
    "resumed_at_tokens": None,
    "config": {},
}


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.9, "9s"), (250, "4m10s"), (3900, "1h05m"), (2 * 86400 + 3 * 3600, "2d03h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999"), (2_400_000, "2.4M"), (3e11, "300B"), (12_345, "12.3k")])
def test_counts(count, text):
    assert human(count) == text


def test_one_line_says_all_that_matters(capsys):
    report = Report(LoggingConfig(), "moe", None, is_first=True)
    report.write("run", step=0, tokens=0, train_tokens=1000, **RUN)
    report.write("train", step=10, tokens=250, train_tokens=1000, **TRAIN)
    lines = capsys.readouterr().out.splitlines()
    assert "13B parameters, 350M active" in lines[0]
    for figure in (
        "loss 5.0000",
        "12.3k tok/s",
        "MFU 42.1%",
        "max/mean 2.00",
        "drop 25.0%",
        "dead 3",
        "max logits: attention 21.2 router 7",
        "skipped 1",
        "eta",
    ):
        assert figure in lines[1]


def test_a_warning_says_why(capsys):
    report = Report(LoggingConfig(), "moe", None, is_first=True)
    report.write("warning", step=10, tokens=250, train_tokens=1000, reason="it grows", figure="x", value=9.0)
    assert capsys.readouterr().out == "step     10 | 250/1k tokens | WARNING: it grows\n"


def test_losses_of_sets_are_told_apart(capsys):
    report = Report(LoggingConfig(), "moe", None, is_first=True)
    at = {"step": 4, "tokens": 400, "train_tokens": 1000}
    for kind, more in (("valid", {}), ("valid", {"set": "books"}), ("test", {"set": "books"}), ("test", {})):
        report.write(kind, **at, **more, loss=2.5, perplexity=12.18)
    lines = [line.split(" | ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "validation loss 2.5000", "validation loss of books 2.5000", "test loss of books 2.5000", "test loss 2.5000",
    ]  # fmt: skip


def test_a_run_from_old_weights_names_them(capsys):
    report = Report(LoggingConfig(), "moe", None, is_first=True)
    report.write("run", step=0, tokens=0, train_tokens=1000, **RUN, started_from="old/step_00000008")
    assert capsys.readouterr().out.endswith("; starting from the weights of old/step_00000008\n")


def test_only_the_first_rank_writes(capsys, tmp_path):
    report = Report(LoggingConfig(), "moe", str(tmp_path), is_first=False)
    report.write("run", step=0, tokens=0, train_tokens=1000, **RUN)
    report.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_json_lines_are_json_even_when_a_norm_is_not_finite(tmp_path):
    report = Report(LoggingConfig(), "moe", str(tmp_path), is_first=True)
    report.write("run", step=0, tokens=0, train_tokens=1000, **RUN)
    report.write("train", step=1, tokens=100, train_tokens=1000, **(TRAIN | {"loss": None, "grad_norm": float("inf")}))
    report.close()

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    run, train = (json.loads(line, parse_constant=refuse) for line in lines)
    assert run["kind"] == "run"
    assert train["grad_norm"] is None


def test_eta_is_what_is_left_at_the_speed_so_far(tmp_path, monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("megatron.training.report.time.perf_counter", lambda: next(clock))
    report = Report(LoggingConfig(), "moe", str(tmp_path), is_first=True)
    report.write("run", step=5, tokens=500, train_tokens=1000, **RUN)
    report.write("train", step=6, tokens=600, train_tokens=1000, **TRAIN)
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["eta_seconds"] == pytest.approx(40.0)


def test_tensorboard_names(tmp_path):
    found = scalars({"kind": "train", "step": 1, "tokens": 5, "train_tokens": 9, **TRAIN})
    assert found["train/loss"] == 5.0
    assert found["train/experts/load/moe1"] == 2.0
    assert found["train/monitors/max_attention_logit/layer1"] == 21.25
    assert found["train/monitors/max_router_logit/moe1"] == 6.0
    assert found["train/monitors/grad_norm/router"] == 0.25
    books = {"kind": "valid", "set": "books", "step": 1, "tokens": 5, "train_tokens": 9, "loss": 4.0}
    assert scalars(books) == {"valid/books/step": 1.0, "valid/books/loss": 4.0}
    assert scalars(books | {"kind": "test"})["test/books/loss"] == 4.0
    assert scalars({"kind": "save", "step": 1, "tokens": 5, "seconds": 1.0}) == {}


def test_tensorboard_files_hold_the_numbers_over_tokens(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = Report(LoggingConfig(tensorboard_dir=str(tmp_path)), "moe", None, is_first=True)
    report.write("valid", step=3, tokens=300, train_tokens=1000, loss=4.0, perplexity=54.6)
    report.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("valid/loss")] == [(300, 4.0)]


def crashed_twice(report):
    """What a run with ``report(save)`` logs that dies, goes on, goes back for a spike, dies and goes on."""

    def write(*records: tuple) -> None:
        run = report()
        for kind, tokens, value in records:
            values = {
                "run": RUN | {"resumed_at_tokens": value},
                "train": TRAIN | {"loss": value},
                "valid": {"loss": value, "perplexity": 1.0},
                "spike": {"reason": "high", "resumed_at_tokens": value, "samples": [0, 1]},
            }[kind]
            run.write(kind, step=tokens, tokens=tokens, train_tokens=1000, **values)
        run.close()

    write(("run", 0, None), ("train", 100, 9.0), ("train", 200, 8.0), ("valid", 200, 8.1), ("train", 300, 7.0))
    write(("run", 200, 200), ("train", 300, 7.0), ("train", 400, 99.0), ("valid", 400, 98.0),
          ("spike", 400, 200), ("train", 300, 7.5))  # fmt: skip
    write(("run", 200, 200), ("train", 300, 7.5), ("train", 400, 6.5), ("valid", 400, 6.6), ("train", 500, 6.0))


AFTER_ALL = [(100, 9.0), (200, 8.0), (300, 7.5), (400, 6.5), (500, 6.0)]


def test_curves_of_a_run_that_went_on_from_an_earlier_point_do_not_go_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tools.plot_runs import read_run

    logging = LoggingConfig(tensorboard_dir=str(tmp_path / "events"))
    crashed_twice(lambda: Report(logging, "moe", str(tmp_path), is_first=True))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == AFTER_ALL
    assert [e.step for e in events.Scalars("valid/loss")] == [200, 400]
    assert events.Scalars("valid/loss")[1].value == pytest.approx(6.6)
    for logged in (tmp_path, tmp_path / "events"):
        run = read_run(logged)
        assert [(line["tokens"], line["loss"]) for line in run.train] == AFTER_ALL
        assert [line["tokens"] for line in run.lines("valid")] == [200, 400]


class StandIn:
    """Of wandb, what is used: runs by id, each with its rows."""

    def __init__(self) -> None:
        self.runs: dict[str, list[dict]] = {}
        self.metrics: set[tuple[str, str]] = set()

    def init(self, project: str, name: str, id: str | None, resume: str) -> SimpleNamespace:
        assert resume == "allow"
        id = id or f"id-{len(self.runs)}"
        return SimpleNamespace(
            id=id,
            log=self.runs.setdefault(id, []).append,
            define_metric=lambda name, step_metric: self.metrics.add((name, step_metric)),
            config=SimpleNamespace(update=lambda *args, **options: None),
            finish=lambda: None,
        )


ON_WANDB = [(100, 9.0), (200, 8.0), (300, 7.0), (400, 99.0), (500, 6.0)]  # what is there stays as it is


def test_all_starts_of_a_run_are_one_on_weights_and_biases(tmp_path, monkeypatch, capsys):
    wandb = StandIn()
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    (tmp_path / "fork").mkdir()

    def report(project: str = "p", save=tmp_path) -> Report:
        return Report(LoggingConfig(wandb_project=project), "moe", str(save), is_first=True)

    crashed_twice(report)
    (rows,) = wandb.runs.values()
    assert [(row["tokens"], row["train/loss"]) for row in rows if "train/loss" in row] == ON_WANDB
    assert [(row["tokens"], row["valid/loss"]) for row in rows if "valid/loss" in row] == [(200, 8.1), (400, 98.0)]
    assert wandb.metrics == {("train/*", "tokens"), ("valid/*", "tokens"), ("test/*", "tokens")}
    assert "keeps what it has of this run, up to 400 tokens" in capsys.readouterr().out
    for other in (report(save=tmp_path / "fork"), report(project="q")):
        other.write("run", step=200, tokens=200, train_tokens=1000, **RUN | {"resumed_at_tokens": 200})
        other.write("train", step=300, tokens=300, train_tokens=1000, **TRAIN)
    assert [[row["tokens"] for row in rows] for rows in wandb.runs.values()][1:] == [[300], [300]]


def test_a_crash_between_two_sets_loses_neither_on_weights_and_biases(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    for sets in (("books",), ("books", "code")):  # killed after the first, then the same validation once more
        report = Report(LoggingConfig(wandb_project="p"), "moe", str(tmp_path), is_first=True)
        report.write("run", step=0, tokens=0, train_tokens=1000, **RUN)
        for name in sets:
            report.write("valid", step=4, tokens=400, train_tokens=1000, set=name, loss=2.5, perplexity=12.18)
    (rows,) = wandb.runs.values()
    assert [[key for key in row if key.endswith("/loss")] for row in rows] == [
        ["valid/books/loss"],
        ["valid/code/loss"],
    ]


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a file of wandb: 7 bytes, then LevelDB's log format (github.com/google/leveldb)."""
    at, data = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:  # a block ends in fewer bytes than a header has
            at += 32768 - at % 32768
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        data += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield data
            data = b""


def test_what_wandb_itself_writes_is_one_run_over_tokens(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    logging = LoggingConfig(wandb_project="p")
    crashed_twice(lambda: Report(logging, "moe", str(tmp_path), is_first=True))
    wandb.teardown()
    rows, ids, metrics = [], set(), set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in leveldb_records(file.read_bytes()):
            record = Record.FromString(data)
            ids |= {record.run.run_id} - {""}
            metrics |= {(record.metric.glob_name or record.metric.name, record.metric.step_metric)} - {("", "")}
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    assert len(ids) == 1
    assert [(row["tokens"], row["train/loss"]) for row in rows if "train/loss" in row] == ON_WANDB
    assert {("train/*", "tokens"), ("valid/*", "tokens")} <= metrics


def test_what_a_full_disk_does_not_take_is_kept_and_told_once(tmp_path, capsys):
    report = Report(LoggingConfig(log_file=str(tmp_path / "metrics.jsonl")), "moe", None, is_first=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = {"step": 1, "train_tokens": 9}
    report.write("stop", tokens=1, reason="x" * 50, **place)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
        for tokens in (2, 3):
            report.write("stop", tokens=tokens, reason="y", **place)
        assert (tmp_path / "metrics.jsonl").stat().st_size == 150
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == "warning: JsonLines cannot log: [Errno 27] File too large\n"
    report.write("stop", tokens=4, reason="z", **place)
    report.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["gradient_noise", "progress", "other"])
def test_records_of_a_users_hook_are_logged_as_they_are(tmp_path, capsys, kind):
    report = Report(LoggingConfig(), "moe", str(tmp_path), is_first=True)
    report.write(kind, step=3, tokens=1000, train_tokens=2000, scale=1.5, layers=[1, 2])
    report.close()
    assert capsys.readouterr().out == f"step      3 | 1k/2k tokens | {kind}: scale 1.5, layers [1, 2]\n"
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record == {
        "kind": kind, "step": 3, "tokens": 1000, "train_tokens": 2000, "scale": 1.5, "layers": [1, 2],
    }  # fmt: skip
