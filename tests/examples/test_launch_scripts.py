"""The launch scripts: the published hyperparameters, and the ways to start them, with SLURM's commands played."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import make_dataset, make_tokenizer, records

from megatron.config import RunConfig
from megatron.config.errors import ConfigError
from megatron.config.flags import parse_args
from megatron.config.validation import validate
from megatron.planning.plan import aligned, experiment

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples_moe"
SCRIPTS = sorted(FOLDER.glob("pretrain_gpt_*.sh"))

# layers, hidden, heads, initial std | global batch, micro-batch | learning rate, least, decay in 10^9 tokens | experts,
# EP | TP | GPUs | ramp-up. Published, but for the last line.
TABLE = {
    "125M_dense": (12, 768, 12, 0.02, 256, 4, 6e-4, 6e-5, 260, 1, 1, 1, 64, None),
    "125M_MoE64": (12, 768, 12, 0.014, 256, 4, 4.5e-4, 4.5e-6, 300, 64, 64, 1, 64, None),
    "350M_dense": (24, 1024, 16, 0.014, 256, 4, 3e-4, 3e-5, 260, 1, 1, 1, 64, None),
    "350M_MoE128": (24, 1024, 16, 0.014, 256, 4, 2e-4, 2e-6, 300, 128, 64, 1, 64, None),
    "1.3B_dense": (24, 2048, 16, 0.014, 512, 2, 2e-4, 2e-5, 260, 1, 1, 4, 64, (32, 32, 1_953_125)),
    "1.3B_MoE128": (24, 2048, 16, 0.014, 512, 8, 1.2e-4, 1e-6, 300, 128, 64, 1, 64, None),
    "6.7B_dense": (32, 4096, 32, 0.01, 1024, 4, 1.2e-4, 1.2e-5, 260, 1, 1, 8, 64, (32, 32, 4_882_812)),
    "6.7B_MoE128": (32, 4096, 32, 0.01, 1024, 4, 1.2e-4, 1.2e-5, 300, 128, 16, 8, 128, None),
}
MOE = FOLDER / "pretrain_gpt_350M_MoE128.sh"
LARGE = FOLDER / "pretrain_gpt_6.7B_MoE128.sh"


def start(script: Path, *words: str, path: Path | None = None, cwd: Path = ROOT, **variables: object):
    """Run a script with these variables and no others that it knows."""
    known = {*documented(), "PYTHONPATH"}
    inherited = {k: v for k, v in os.environ.items() if k not in known and not k.startswith("SLURM_")}
    if path is not None:
        inherited["PATH"] = f"{path}:{inherited['PATH']}"
    given = {"PYTHON": sys.executable} | {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        ["bash", str(script), *words], env=inherited | given, cwd=cwd, capture_output=True, text=True, timeout=300
    )


def documented() -> list[str]:
    """The variables in the table of ``--help``."""
    text = (FOLDER / "common.sh").read_text()
    table = text[text.index("  variable ") : text.index("A dry run outside")]
    names = [re.match(r"  ((?:[A-Z_]+(?:, )?)+)", line) for line in table.splitlines()]
    return [name for match in names if match for name in match.group(1).split(", ")]


def command(*arguments, **variables) -> list[str]:
    """The words of the command that a script would start."""
    done = start(*arguments, **variables | {"DRY_RUN": "command"})
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def parts(words: list[str]) -> tuple[list[str], RunConfig]:
    """The starter's words, and the configuration that the trainer reads from its own."""
    at = next(place for place, word in enumerate(words) if word.endswith("pretrain_gpt_moe.py"))
    assert Path(words[at]) == ROOT / "pretrain_gpt_moe.py"
    return words[:at], parse_args(words[at + 1 :])


def test_there_is_a_script_for_every_run():
    assert [script.stem.removeprefix("pretrain_gpt_") for script in SCRIPTS] == sorted(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_hyperparameters_are_the_published_ones(name):
    starter, run = parts(command(FOLDER / f"pretrain_gpt_{name}.sh", RECIPE="published"))
    model, moe, optimizer, training, parallel = run.model, run.moe, run.optimizer, run.training, run.parallel
    gpus = int(starter[starter.index("--nodes") + 1]) * int(starter[starter.index("--ntasks-per-node") + 1])
    assert TABLE[name] == (
        *(model.num_layers, model.hidden_size, model.num_attention_heads, model.init_method_std),
        *(training.global_batch_size, training.micro_batch_size),
        *(optimizer.lr, optimizer.min_lr, optimizer.lr_decay_tokens // 10**9),
        *(moe.num_experts[0], *parallel.moe_expert_parallel_size),
        *(parallel.tensor_model_parallel_size, gpus, training.rampup_batch_size),
    )
    assert (training.train_tokens, optimizer.lr_warmup_tokens) == (300 * 10**9, 375 * 10**6)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.lr_decay_style) == (0.1, 1.0, "cosine")
    assert (model.seq_length, model.hidden_dropout, model.attention_dropout) == (2048, 0.1, 0.1)
    assert (run.data.split, run.data.tokenizer_type, run.logging.log_interval) == ("98,2,0", "GPT2BPETokenizer", 10)
    assert (training.eval_interval, training.eval_iters, training.checkpoint_activations) == (100, 10, True)
    assert parallel.pipeline_model_parallel_size == 1
    if moe.enabled:
        assert (moe.expert_interval, moe.topk, moe.aux_loss_coeff, moe.moe_min_capacity) == (2, 1, 0.01, 4)
        assert (moe.moe_train_capacity_factor, moe.moe_token_dropping) == (1.0, True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_at_its_top_what_it_trains(script):
    starter, run = parts(command(script))
    world = int(starter[starter.index("--nodes") + 1]) * int(starter[starter.index("--ntasks-per-node") + 1])
    lines = [f"#   {line}" for line in aligned(experiment(run, world), indent="").splitlines()]
    assert "\n".join(lines) in script.read_text(), "\n".join(lines)


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no shellcheck; it is in the [dev] extra")
    files = [str(file) for folder in ("examples_moe", "tools", "tests") for file in (ROOT / folder).rglob("*.sh")]
    done = subprocess.run([program, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_variable_is_documented_and_every_documented_one_is_read():
    text = (FOLDER / "common.sh").read_text()
    code = text[text.index("fail() {") :]
    read = {name for name in re.findall(r"\$\{?([A-Z][A-Z_]+)\b", code) if not name.startswith("SLURM_")}
    read -= {"VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "OMP_NUM_THREADS", "PWD"}
    assert read == set(documented())
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    usage = text[text.index("  variable ") : text.index("A dry run outside")]
    assert usage in page, "docs/planning.md shows the table as --help does"


def test_help():
    done = start(MOE, "--help")
    assert done.returncode == 0
    assert "DRY_RUN=1" in done.stdout
    assert "MASTER_ADDR" in done.stdout


def test_everything_can_be_changed_from_the_environment():
    variables = {
        **{"NNODES": 2, "GPUS_PER_NODE": 4, "TP": 2, "PP": 2, "EP": 2, "MICRO_BATCH": 1, "GLOBAL_BATCH": 32},
        **{"DATA_PATH": "0.3 a 0.7 b", "TOKENIZER_TYPE": "HFTokenizer", "TOKENIZER_MODEL": "t.json"},
        **{
            "SAVE": "here",
            "LOAD": "there",
            "RUN_NAME": "mine",
            "TRAIN_TOKENS": "1B",
            "EXTRA_ARGS": "--lr 1e-3 --no-compile",
        },
        **{"SRUN_ARGS": "--container-image=x", "MASTER_PORT": 1234},
    }
    starter, run = parts(command(MOE, "--seed", "7", **variables))
    assert starter[:3] == ["srun", "--nodes", "2"]
    assert starter[starter.index("--ntasks-per-node") + 1] == "4"
    assert "--container-image=x" in starter
    parallel, training, data = run.parallel, run.training, run.data
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    assert (*sizes, parallel.moe_expert_parallel_size) == (2, 2, (2,))
    assert (training.micro_batch_size, training.global_batch_size, training.train_tokens) == (1, 32, 10**9)
    assert (data.data_path, data.tokenizer_type, data.tokenizer_model) == (
        ("0.3", "a", "0.7", "b"),
        "HFTokenizer",
        "t.json",
    )
    assert (run.checkpoint.save, run.checkpoint.load, run.logging.run_name) == ("here", "there", "mine")
    assert (run.optimizer.lr, training.compile, training.seed) == (1e-3, False, 7)


@pytest.mark.parametrize(
    ("variables", "words", "recipe"),
    [
        ({}, "", "published"),
        ({}, "--num-experts 32", "recommended"),
        ({"EXTRA_ARGS": "--num-experts 32"}, "", "recommended"),
        ({"RECIPE": "recommended"}, "", "recommended"),
        ({"RECIPE": "published"}, "--num-experts 32", "published"),
        ({"RECIPE": "published"}, "--recipe recommended", "recommended"),
    ],
)
def test_the_recipe_follows_from_the_model_or_is_given(variables, words, recipe):
    _, run = parts(command(MOE, *words.split(), **variables))
    assert run.training.recipe == recipe


@pytest.mark.parametrize("name", TABLE)
def test_scripts_have_the_published_recipe_but_for_the_model_that_was_not_published(name):
    _, run = parts(command(FOLDER / f"pretrain_gpt_{name}.sh"))
    assert run.training.recipe == ("recommended" if name == "6.7B_MoE128" else "published")


def test_a_container_has_the_checkout_the_working_directory_and_what_is_named(tmp_path):
    image = {"CONTAINER_IMAGE": "/images/moe.sqsh", "CONTAINER_MOUNTS": "/data:/data:ro", "PYTHON": "/opt/bin/python"}
    for launcher in ("srun", "torchrun"):
        starter, _ = parts(command(MOE, cwd=tmp_path, NNODES=2, GPUS_PER_NODE=8, LAUNCHER=launcher, **image))
        assert starter[0] == "srun"
        assert starter[starter.index("--container-image") + 1] == "/images/moe.sqsh"
        assert starter[starter.index("--container-workdir") + 1] == str(tmp_path)
        mounts = starter[starter.index("--container-mounts") + 1].split(",")
        assert mounts == [f"{ROOT}:{ROOT}", f"{tmp_path}:{tmp_path}", "/data:/data:ro"]
        assert "/opt/bin/python" in starter
        assert sys.executable not in starter
    done = start(MOE, DRY_RUN=1, **image)
    assert done.returncode == 0, done.stderr
    assert "--container-image /images/moe.sqsh" in done.stdout


def test_checkpoints_are_continued_where_they_are_saved():
    _, run = parts(command(MOE, SAVE="runs/x"))
    assert run.checkpoint.save == run.checkpoint.load == "runs/x"
    _, run = parts(command(MOE))
    assert run.checkpoint.save == run.checkpoint.load == "checkpoints/350M_MoE128"


@pytest.mark.parametrize(
    ("script", "processes", "sizes"),
    [(MOE, 8, (1, (8,))), (MOE, 1, (1, (1,))), (MOE, 12, (1, (4,))), (LARGE, 8, (8, (1,))), (LARGE, 2, (2, (1,)))],
)
def test_a_layout_shrinks_to_the_processes_there_are(script, processes, sizes):
    done = start(script, GPUS_PER_NODE=processes, DRY_RUN="command")
    assert "not as published" in done.stderr
    starter, run = parts(shlex.split(done.stdout))
    assert (run.parallel.tensor_model_parallel_size, run.parallel.moe_expert_parallel_size) == sizes
    assert "--standalone" in starter
    assert starter[starter.index("--nproc-per-node") + 1] == str(processes)
    assert "SIGUSR1" in starter[starter.index("--signals-to-handle") + 1]


def test_without_tensor_parallelism_nothing_that_needs_it():
    _, run = parts(command(LARGE, GPUS_PER_NODE=1))
    assert not run.parallel.sequence_parallel
    assert not run.parallel.enable_expert_tensor_parallelism


def test_several_nodes_without_slurm():
    starter, _ = parts(command(MOE, NNODES=2, GPUS_PER_NODE=8, NODE_RANK=1, MASTER_ADDR="first"))
    assert starter[:2] == [sys.executable, str(ROOT / "tools" / "torchrun.py")]
    options = dict(zip(starter[2::2], starter[3::2], strict=False))
    assert options["--nnodes"] == "2"
    assert (options["--node-rank"], options["--master-addr"], options["--master-port"]) == ("1", "first", "29500")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DATA_PATH": "x", "NNODES": "two"}, "NNODES is 'two'; give a whole number"),
        ({"DATA_PATH": "x", "TP": "0"}, "TP is '0'"),
        ({"DATA_PATH": "x", "NNODES": "2"}, "give NODE_RANK, from 0, and MASTER_ADDR"),
        ({"DATA_PATH": "x", "LAUNCHER": "mpirun"}, "expected srun, torchrun or deepspeed"),
        ({"DATA_PATH": "x", "LAUNCHER": "srun"}, "submit with: sbatch"),
        ({"DATA_PATH": "x", "LAUNCHER": "deepspeed"}, "submit with: sbatch"),
        ({"DATA_PATH": "x", "DRY_RUN": "yes"}, "expected 1 or command"),
        ({"DATA_PATH": "x", "CONTAINER_IMAGE": "x"}, "CONTAINER_IMAGE is for jobs of SLURM"),
        ({"DATA_PATH": "x", "CONTAINER_MOUNTS": "x"}, "CONTAINER_IMAGE is not"),
        ({"DATA_PATH": "x", "NNODES": "99999999999999999999"}, "a whole number from 1 to 999999"),
        ({"DATA_PATH": "x", "NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "a"}, "a whole number from 0 to 1, one less"),
        ({"DATA_PATH": "x", "NNODES": 2, "NODE_RANK": -1, "MASTER_ADDR": "a"}, "NODE_RANK is '-1'"),
        ({"DATA_PATH": "x", "MASTER_PORT": "free"}, "MASTER_PORT is 'free'; give the number of a free port"),
        ({"DATA_PATH": "x", "MASTER_PORT": 65536}, "from 1 to 65535"),
        ({"DATA_PATH": "x", "PYTHON": "/none/python"}, "PYTHON is '/none/python', which is no program here"),
        ({"DATA_PATH": "x", "PYTHON": "false"}, "which has no torch; activate the environment that has it"),
        ({"DATA_PATH": "x", "SLURM_JOB_ID": 7}, "SLURM_JOB_ID is '7' and SLURM_JOB_NODELIST ''"),
        ({"DATA_PATH": "x", "SLURM_JOB_ID": "seven", "SLURM_JOB_NODELIST": "a"}, "SLURM_JOB_ID is 'seven'"),
    ],
)
def test_mistakes_are_named_before_anything_starts(variables, said):
    done = start(MOE, **variables)
    assert done.returncode != 0
    assert said in done.stderr
    assert done.stdout == ""


def test_sets_of_their_own_for_training_validation_and_test():
    _, run = parts(command(MOE, TRAIN_DATA_PATH="2 a 1 b", VALID_DATA_PATH="books=c d", TEST_DATA_PATH="e"))
    data = run.data
    paths = (data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path)
    assert paths == ((), ("2", "a", "1", "b"), ("books=c", "d"), ("e",))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DATA_PATH": "0.7 a b"}, "--data-path 0.7 a b: weights and prefixes must alternate"),
        ({"VALID_DATA_PATH": "a"}, "--valid-data-path requires --train-data-path; add it"),
        ({"DATA_PATH": "a", "TRAIN_DATA_PATH": "b"}, "--data-path and --train-data-path exclude each other"),
    ],
)
def test_a_dry_run_tells_what_is_wrong_with_the_data(variables, said):
    done = start(MOE, DRY_RUN=1, **variables)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_dry_run_tells_the_recipes_that_there_are():
    done = start(MOE, DRY_RUN=1, RECIPE="best")
    assert done.returncode == 2
    assert "argument --recipe: got 'best'; choose from published, recommended, auto" in done.stderr


def test_a_link_to_a_script_is_the_script(tmp_path):
    link = tmp_path / "run.sh"
    link.symlink_to(MOE)
    assert command(link, cwd=tmp_path) == command(MOE, cwd=tmp_path)


def test_the_quickstart_has_no_dry_run_and_says_so():
    done = start(FOLDER / "quickstart.sh", DRY_RUN=1)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: DRY_RUN is for the other launch scripts")


def test_a_dry_run_for_other_nodes_has_the_gpus_of_the_header():
    starter, _ = parts(command(MOE, NNODES=2))
    assert starter[starter.index("--ntasks") + 1] == "16"
    starter, _ = parts(command(MOE, GPUS_PER_NODE=2))
    assert starter[starter.index("--nproc-per-node") + 1] == "2"
    assert "srun" not in starter


def test_what_is_missing_is_the_trainers_to_say():
    _, run = parts(command(MOE, TOKENIZER_TYPE="HFTokenizer"))
    with pytest.raises(ConfigError) as error:
        validate(run, 64)
    first, second = error.value.problems
    assert first.startswith("--data-path is missing (launch scripts: DATA_PATH); make a dataset with tools/prepro")
    assert second.startswith("--tokenizer-type HFTokenizer needs --tokenizer-model, which is missing")


def test_a_dry_run_prints_the_plan_and_the_command():
    done = start(MOE, DRY_RUN=1, GPU="H100", PLAN_ARGS="--price-per-gpu-hour 2")
    assert done.returncode == 0, done.stderr
    assert "350M_MoE128 on 64 x NVIDIA H100" in done.stdout
    assert "at 2 an hour" in done.stdout
    assert "\n  recipe     published; recommended would set --" in done.stdout
    assert "data: not looked at, since there is no DATA_PATH.idx, DATA_PATH.bin\n" in done.stdout
    starter, _ = parts(shlex.split(done.stdout.split("The command:\n")[1]))
    assert starter[0] == "srun"


# ------------------------------------------------------------------------------------------------ SLURM's part, played


@pytest.fixture
def slurm(tmp_path):
    """A folder with commands named as SLURM's: scontrol knows the job and its hosts, srun prints its words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scontrol = f"""#!/usr/bin/env bash
if [[ "$2" == hostnames ]]; then printf 'node7\\nnode8\\n'; else
echo "JobId=$3 JobName=x"
echo "   Command=${{SUBMITTED:-{MOE}}} --seed 3"
fi
"""
    for name, text in (("scontrol", scontrol), ("srun", '#!/usr/bin/env bash\nprintf "%q " srun "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


JOB = {
    **{"SLURM_JOB_ID": 77, "SLURM_JOB_NUM_NODES": 2, "SLURM_NTASKS_PER_NODE": 4, "SLURM_JOB_NODELIST": "node[7-8]"},
    **{"SLURM_CPUS_PER_TASK": 6, "DATA_PATH": "corpus"},
}


def test_sbatch_runs_a_copy_that_finds_the_rest(slurm, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    copy = shutil.copy(MOE, spool / "slurm_script")
    done = start(Path(copy), "--seed", "3", path=slurm, cwd=tmp_path, **JOB)
    assert done.returncode == 0, done.stderr
    starter, run = parts(shlex.split(done.stdout))
    assert starter[:3] == ["srun", "--nodes", "2"]
    assert {"--kill-on-bad-exit=1", "--distribution=block"} <= set(starter)
    assert starter[starter.index("--ntasks") + 1] == "8"
    assert starter[starter.index("--ntasks-per-node") + 1] == "4"
    assert starter[starter.index("--cpus-per-task") + 1] == "6"
    assert starter[-1] == sys.executable
    assert (run.training.seed, run.logging.run_name) == (3, "350M_MoE128")
    assert run.parallel.moe_expert_parallel_size == (8,)


@pytest.mark.parametrize("name", ["run.sh", "a run.sh of mine.sh --seed"])
def test_sbatch_of_a_link_of_any_name_finds_the_rest(slurm, tmp_path, name):
    (tmp_path / name).symlink_to(MOE)
    spool = tmp_path / "spool"
    spool.mkdir()
    copy = shutil.copy(MOE, spool / "slurm_script")
    done = start(Path(copy), path=slurm, cwd=tmp_path, SUBMITTED=f"{tmp_path / name} x.sh", **JOB)
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "pretrain_gpt_moe.py") in shlex.split(done.stdout)


def test_a_copy_elsewhere_says_so(slurm, tmp_path):
    copy = Path(shutil.copy(MOE, tmp_path / "mine.sh"))
    said = f"error: {copy} is a copy; start the script of a checkout's examples_moe/, or a link to it\n"
    for job in ({}, JOB | {"SUBMITTED": copy}):
        done = start(copy, path=slurm, cwd=tmp_path, **job)
        assert (done.returncode, done.stderr) == (2, said)


def test_srun_can_start_torchrun(slurm, tmp_path):
    done = start(MOE, path=slurm, cwd=tmp_path, LAUNCHER="torchrun", **JOB)
    starter, _ = parts(shlex.split(done.stdout))
    assert starter[starter.index("--ntasks") + 1] == "2"
    assert starter[starter.index("--ntasks-per-node") + 1] == "1"
    assert starter[starter.index("--nproc-per-node") + 1] == "4"
    assert starter[starter.index("--nnodes") + 1] == "2"
    assert starter[starter.index("--rdzv-endpoint") + 1] == "node7:20077"


def test_the_header_asks_for_what_the_layout_needs():
    for script in SCRIPTS:
        header = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script.read_text(), re.MULTILINE))
        assert int(header["nodes"]) * int(header["ntasks-per-node"]) == TABLE[header["job-name"]][-2]
        assert header["gres"] == f"gpu:{header['ntasks-per-node']}"


# ------------------------------------------------------------------------------------------------------- for real, tiny


@pytest.mark.slow
@pytest.mark.distributed
def test_a_script_trains_on_the_cpu_with_a_tiny_override(tmp_path):
    data = make_dataset(tmp_path)
    tiny = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --num-experts 4 --fp32 --device cpu"
    tiny += " --lr-warmup-tokens 32 --lr-decay-tokens 1024 --eval-interval 2 --eval-iters 1 --log-interval 1"
    variables = {
        **{"DATA_PATH": data, "TOKENIZER_TYPE": "HFTokenizer", "TOKENIZER_MODEL": make_tokenizer(tmp_path)},
        **{"GPUS_PER_NODE": 2, "MICRO_BATCH": 2, "GLOBAL_BATCH": 8, "TRAIN_TOKENS": 1024, "SAVE": tmp_path / "run"},
        "EXTRA_ARGS": tiny + " --split 90,10,0 --num-workers 0",
    }
    done = start(MOE, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert records(tmp_path / "run", "train")[-1]["tokens"] == 1024
    assert records(tmp_path / "run", "run")[0]["expert_parallel"] == [2]
    assert "plan, from what was measured" in done.stdout
    assert "\nrecipe: recommended; published would set --" in f"\n{done.stdout}"
    assert records(tmp_path / "run", "run")[0]["config"]["training"]["recipe"] == "recommended"
