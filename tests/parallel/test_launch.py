import pytest

from megatron.parallel.launch import Launch, LaunchError


def test_torchrun():
    env = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "x",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NODELIST": "n[1-2]",
    }
    launch = Launch.from_environment(env)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.launcher) == (5, 8, 1, "torchrun")


def test_the_rendezvous_of_srun_is_the_first_host_of_the_step():
    env = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[003-004],big7",
        "SLURM_JOB_ID": "41",
    }
    launch = Launch.from_environment(env)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.launcher) == (3, 4, 1, "srun")
    assert launch.master_addr == "gpu003"
    other = Launch.from_environment(env | {"SLURM_JOB_ID": "42"})
    assert launch.master_port != other.master_port


def test_a_batch_script_that_starts_python_directly_is_one_process():
    launch = Launch.from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"})
    assert launch.world_size == 1


@pytest.mark.parametrize(
    ("extra", "node"),
    [
        ({"GROUP_RANK": "2", "TORCHELASTIC_RUN_ID": "x"}, 2),  # torchrun
        ({"CROSS_RANK": "1"}, 1),  # deepspeed
        ({}, 8),  # the first rank of its node
    ],
)
def test_node_of_torchrun_deepspeed_and_others(extra, node):
    env = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
    assert Launch.from_environment(env | extra).node == node


def test_node_of_srun_with_cyclic_distribution():
    env = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[1-2]"}
    assert Launch.from_environment(env | {"SLURM_NODEID": "1"}).node == 1


def test_missing_variables_are_named():
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        Launch.from_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"})


def test_export_is_read_back():
    env: dict[str, str] = {}
    launch = Launch(1, 2, 1, "host", 1234, "srun")
    launch.export(env)
    again = Launch.from_environment(env)
    assert (again.rank, again.world_size, again.master_addr, again.master_port) == (1, 2, "host", 1234)
