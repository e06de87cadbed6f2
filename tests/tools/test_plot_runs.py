"""Reading runs with resumes, the table, and the picture."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("plot_runs", ROOT / "tools" / "plot_runs.py")
plot_runs = importlib.util.module_from_spec(spec)
sys.modules["plot_runs"] = plot_runs
spec.loader.exec_module(plot_runs)


def header(name: str, resumed_at: int | None = None) -> dict:
    sizes = {"parameters": 2_900_000, "active_parameters": 1_070_000, "world_size": 2, "config": {}}
    return {"kind": "run", "name": name, "resumed_at_tokens": resumed_at} | sizes


def lines_of(start: int, end: int, offset: float = 0.0) -> list[dict]:
    """A training line each 1000 tokens, a validation each 5000."""
    lines = []
    for thousand in range(start + 1, end + 1):
        at = {"step": thousand, "tokens": 1000 * thousand, "loss": 4 + 4 / thousand + offset}
        lines.append({"kind": "train", "tokens_per_second": 100.0 + thousand % 3, **at})
        if thousand % 5 == 0:
            lines.append({"kind": "valid", "perplexity": math.exp(at["loss"]), **at})
    return lines


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_plain_run(tmp_path):
    run = plot_runs.read_run(write(tmp_path / "a", [header("dense"), *lines_of(0, 20)]))
    assert (run.name, run.tokens, run.resumed_at) == ("dense", 20_000, [])
    assert run.last_loss("valid") == 4.2
    assert run.tokens_per_second == 101.0
    assert [line["tokens"] for line in run.valid[""]] == [5000, 10_000, 15_000, 20_000]


def test_lines_beyond_the_resume_point_are_superseded(tmp_path):
    lines = [header("moe"), *lines_of(0, 13, offset=9.0), header("moe", 8000), *lines_of(8, 15)]
    run = plot_runs.read_run(write(tmp_path / "a", lines))
    assert [line["tokens"] for line in run.train] == [1000 * n for n in range(1, 16)]
    assert [line["loss"] > 9 for line in run.train] == [True] * 8 + [False] * 7
    assert [line["loss"] > 9 for line in run.valid[""]] == [True, False, False]
    assert run.resumed_at == [8000]


def test_resumed_from_before_an_earlier_resume(tmp_path):
    lines = [header("moe"), *lines_of(0, 10), header("moe", 10_000), *lines_of(10, 12), header("moe", 4000)]
    run = plot_runs.read_run(write(tmp_path / "a", lines + lines_of(4, 6)))
    assert (run.tokens, run.resumed_at) == (6000, [4000])


def test_a_run_started_anew_in_the_same_folder_replaces_the_old_one(tmp_path):
    run = plot_runs.read_run(write(tmp_path / "a", [header("old"), *lines_of(0, 20), header("new"), *lines_of(0, 3)]))
    assert (run.name, run.tokens, run.valid) == ("new", 3000, {"": []})


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path, capsys):
    folder = write(tmp_path / "a", [header("a"), *lines_of(0, 5)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "tok')
    assert plot_runs.read_run(folder).tokens == 5000
    assert "left out, not JSON" in capsys.readouterr().err


def test_other_kinds_of_lines_are_ignored_and_a_loss_of_null_is_drawn_as_a_gap(tmp_path):
    skipped = {"kind": "train", "step": 6, "tokens": 6000, "loss": None}
    folder = write(tmp_path / "a", [header("a"), *lines_of(0, 5), skipped, {"kind": "save", "tokens": 6000}])
    run = plot_runs.read_run(folder)
    assert math.isnan(run.train[-1]["loss"])
    plot_runs.draw([run], [tmp_path / "a.svg"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([header("a")], "no training or validation line"),
        ([{"kind": "train", "step": 1, "loss": 2.0}], "'tokens'"),
        ([["a", "list"]], "expected"),
        ([{"kind": "train", "tokens": "many", "loss": 2.0}], "tokens is 'many', no number"),
        ([{"kind": "train", "tokens": -1, "loss": 2.0}], "tokens is -1, no count"),
        ([{"kind": "train", "tokens": math.inf, "loss": 2.0}], "tokens is inf, no count"),
        ([{"kind": "valid", "tokens": None, "loss": 2.0}], "tokens is None, no count"),
        ([{"kind": "train", "tokens": 1, "loss": "low"}], "loss is 'low', no number"),
        ([{"kind": "train", "tokens": 1, "loss": 2.0, "tokens_per_second": "fast"}], "tokens_per_second is 'fast'"),
        ([{"kind": "run", "parameters": "few"}], "parameters is 'few'"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, lines, said):
    with pytest.raises(plot_runs.RunError, match=said):
        plot_runs.read_run(write(tmp_path / "a", lines))


def test_missing_file_and_wrong_picture_name(tmp_path, capsys):
    assert plot_runs.main([str(tmp_path), "--table"]) == 1
    assert "no metrics.jsonl in this folder" in capsys.readouterr().err
    run = write(tmp_path / "a", [header("a"), *lines_of(0, 5)])
    assert plot_runs.main([str(run), "--output", str(tmp_path / "a.txt")]) == 1
    assert "ends in .png, .svg or .pdf" in capsys.readouterr().err


def test_table_compares_with_the_first_run(tmp_path, capsys):
    dense = write(tmp_path / "dense", [header("dense"), *lines_of(0, 10)])
    moe = write(tmp_path / "moe", [header("moe"), *lines_of(0, 10, offset=-0.125)])
    assert plot_runs.main([str(dense), str(moe), "--table"]) == 0
    table = capsys.readouterr().out
    assert "| moe   |      2.90M |  1.07M |  10.0K |          4.2750 |      101 |" in table.splitlines()
    assert "The validation loss of moe is 0.1250 lower than that of dense, after the same 10.0K tokens." in table
    plot_runs.main([str(moe), str(dense), "--table"])
    assert "dense is 0.1250 higher than that of moe" in capsys.readouterr().out


def test_what_was_logged_in_a_spike_that_a_run_went_back_for_is_left_out(tmp_path):
    spike = {"kind": "spike", "tokens": 12_000, "resumed_at_tokens": 8000}
    through = {"kind": "spike", "tokens": 15_000, "resumed_at_tokens": None}
    lines = [header("a"), *lines_of(0, 12, offset=9.0), spike, *lines_of(8, 15), through, *lines_of(15, 16)]
    run = plot_runs.read_run(write(tmp_path / "a", lines))
    assert [line["loss"] > 9 for line in run.train] == [True] * 8 + [False] * 8
    assert run.resumed_at == [8000]


def test_event_files_say_what_the_log_says(tmp_path, capsys):
    from megatron.config import LoggingConfig
    from megatron.training.report import Report

    for part, (start, end) in enumerate(((0, 13), (8, 15))):  # resumed at 8000
        config = LoggingConfig(
            tensorboard_dir=str(tmp_path / "board"), log_file=str(tmp_path / "log" / "metrics.jsonl")
        )
        report = Report(config, "moe", None, True)
        resumed = {"name": "moe", "resumed_at_tokens": 1000 * start or None, "parameters": 1, "active_parameters": 1}
        rest = {"world_size": 1, "device": "cpu", "precision": "fp32", "expert_parallel": [1]}
        rest |= {"tensor_parallel": 1, "pipeline_parallel": 1, "config": {}}
        report.write("run", step=start, tokens=1000 * start, train_tokens=15_000, **resumed, **rest)
        for line in lines_of(start, end, offset=0.5 * part):
            more = {"grad_norm": 1.0, "lr": 1.0, "tflops_per_device": 1.0, "mfu": None, "memory_gb": 1.0, "skipped": 0}
            report.write(train_tokens=15_000, **line, **(more if line["kind"] == "train" else {}))
            if line["kind"] == "valid":
                report.write(train_tokens=15_000, **(line | {"set": "books", "loss": line["loss"] + 1}))
        report.close()
    logged = plot_runs.read_run(tmp_path / "log")
    for place in (tmp_path / "board", next((tmp_path / "board").glob("events*"))):
        run = plot_runs.read_run(place)
        assert run.name == "board"
    run = plot_runs.read_run(tmp_path / "board")
    for kind, name in (("train", ""), ("valid", ""), ("valid", "books")):
        ours, theirs = run.lines(kind, name), logged.lines(kind, name)
        assert len(ours) >= 3
        assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs])
    assert run.tokens_per_second == logged.tokens_per_second
    last = sorted((tmp_path / "board").glob("events*"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[:700] + b"garbage" + content[707:])
    capsys.readouterr()
    assert plot_runs.main([str(tmp_path / "board"), "--table"]) == 0
    assert f"{last}: the rest is left out from event " in capsys.readouterr().err


def test_every_run_that_cannot_be_read_is_named(tmp_path, capsys):
    good = write(tmp_path / "good", [header("good"), *lines_of(0, 5)])
    (tmp_path / "noise.jsonl").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "empty").mkdir()
    names = [str(tmp_path / name) for name in ("noise.jsonl", "empty", "missing")]
    assert plot_runs.main([str(good), *names, "--output", str(tmp_path / "a.png")]) == 1
    said = capsys.readouterr().err
    assert all(f"error: {name}: " in said for name in names)
    assert not (tmp_path / "a.png").exists()


def test_several_pictures_of_the_validation_alone_under_given_names(tmp_path):
    run = write(tmp_path / "a", [header("dense"), *lines_of(0, 60)])
    pictures = [tmp_path / "figure.svg", tmp_path / "figure.png"]
    words = [f"one = two={run}", "--validation-only", "--output", *map(str, pictures)]
    assert plot_runs.main(words) == 0
    text = pictures[0].read_text()
    assert "<!-- one = two  (" in text
    assert "validation loss (nats per token)" in text
    assert "training" not in text
    assert pictures[1].read_bytes().startswith(b"\x89PNG")


def test_smooth_is_a_centred_mean_of_finite_values():
    assert plot_runs.smooth([1.0, 2.0, 6.0, math.nan, 2.0], 3) == [1.5, 3.0, 4.0, 4.0, 2.0]
    assert plot_runs.smooth([1.0, 5.0], 1) == [1.0, 5.0]
    assert plot_runs.smooth([1.0, 5.0], 9) == [3.0, 3.0]
    assert math.isnan(plot_runs.smooth([math.nan], 1)[0])
    assert plot_runs.smooth([], 1) == []


@pytest.mark.filterwarnings("error")
def test_a_log_without_steps_and_one_of_the_first_validation_alone(tmp_path, capsys):
    run = write(tmp_path / "a", [{"kind": "valid", "tokens": 0, "loss": 2.0}])
    assert plot_runs.main([str(run), "--output", str(tmp_path / "a.png")]) == 0
    assert plot_runs.main([str(run), "--x", "steps", "--output", str(tmp_path / "a.png")]) == 1
    assert "no 'step'; give --x tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "text"), [(None, "-"), (999, "999"), (1234, "1.23K"), (2.4e6, "2.40M"), (52e9, "52.0B"), (300e9, "300B")]
)
def test_count(number, text):
    assert plot_runs.count(number) == text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_is_written_with_the_names_of_the_runs(tmp_path, suffix):
    resumed = [header("moe-8"), *lines_of(0, 30), header("moe-8", 20_000), *lines_of(20, 60, -0.1)]
    runs = [write(tmp_path / "a", [header("dense"), *lines_of(0, 60)]), write(tmp_path / "b", resumed)]
    picture = tmp_path / "new" / f"curves.{suffix}"
    for axis in ("tokens", "steps"):
        assert plot_runs.main([*map(str, runs), "--output", str(picture), "--title", "Two runs", "--x", axis]) == 0
        if suffix == "png":
            from PIL import Image

            pixels = Image.open(picture).convert("RGB")
            assert pixels.size == (1350, 825)
            drawn = {color for _, color in pixels.getcolors(maxcolors=1350 * 825)}
            assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= drawn, "one bold line a run"
        else:
            text = picture.read_text()
            assert all(f"<!-- {name}" in text for name in ("dense  (", "moe-8  (", "Two runs")), "texts of the picture"


def test_named_sets_have_columns_sentences_and_curves(tmp_path, capsys):
    def with_sets(offset: float) -> list[dict]:
        lines = []
        for line in lines_of(0, 10):
            lines += [line] if line["kind"] == "train" else []
            for number, name in enumerate(("books", "code")) if line["kind"] == "valid" else ():
                lines.append(line | {"set": name, "loss": line["loss"] + offset + number})
        return [*lines, {"kind": "test", "set": "late", "step": 10, "tokens": 10_000, "loss": 3.5 + offset}]

    a = write(tmp_path / "a", [header("dense"), *with_sets(0.0)])
    b = write(tmp_path / "b", [header("moe"), *with_sets(0.25)])
    old = write(tmp_path / "old", [header("old"), *lines_of(0, 10)])
    assert plot_runs.main([str(a), str(b), "--table"]) == 0
    header_row, _, first, second, *sentences = capsys.readouterr().out.splitlines()
    titles = [cell.strip() for cell in header_row.strip("|").split("|")]
    assert titles[4:7] == ["validation loss of books", "validation loss of code", "test loss of late"]
    assert [cell.strip() for cell in first.strip("|").split("|")][4:7] == ["4.4000", "5.4000", "3.5000"]
    assert [cell.strip() for cell in second.strip("|").split("|")][4:7] == ["4.6500", "5.6500", "3.7500"]
    assert sentences[0] == (
        "The validation loss of moe on books is 0.2500 higher than that of dense, after the same 10.0K tokens."
    )
    assert "on code is 0.2500 higher" in sentences[1]
    assert plot_runs.main([str(old), str(a), "--table", "--output", str(tmp_path / "a.svg")]) == 0
    assert "dense and old cannot be compared on books" in capsys.readouterr().out
    picture = (tmp_path / "a.svg").read_text()
    assert all(
        f"<!-- {label} -->" in picture for label in ("dense, books  (4.400)", "dense, code  (5.400)", "old  (4.400)")
    )
