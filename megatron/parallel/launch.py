"""Which process is this? Reads torchrun's, the deepspeed launcher's, or srun's environment."""

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping


class LaunchError(ValueError):
    """The environment does not describe a usable set of processes."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Rank of this process, and the rendezvous address. Processes with the same ``node`` share a machine."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    launcher: str
    node: int = 0

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> "Launch":
        """Read the environment that the launcher of this process has set.

        torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under srun
        the same follows from SLURM's variables: the rendezvous is on the first host of the step, and the port follows
        from the job's number, so that two jobs on one node use different ones. Anything else is a single process.

        The number of the node is torchrun's GROUP_RANK, the deepspeed launcher's CROSS_RANK or SLURM's SLURM_NODEID.
        Without any, ranks are taken to be numbered node by node, and the first rank of the node serves as its number.

        Raises:
            LaunchError: RANK without the other variables, or a host list that cannot be read.
        """
        env = os.environ if env is None else env
        if "RANK" in env:
            missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
            if missing:
                raise LaunchError(
                    f"RANK is set but {', '.join(missing)} is not; start with torchrun, deepspeed or srun"
                )
            rank, local_rank = _number(env, "RANK"), _number(env, "LOCAL_RANK")
            node = next((_number(env, name) for name in ("GROUP_RANK", "CROSS_RANK") if name in env), rank - local_rank)
            return cls(
                rank=rank,
                world_size=_number(env, "WORLD_SIZE"),
                local_rank=local_rank,
                master_addr=env["MASTER_ADDR"],
                master_port=_number(env, "MASTER_PORT"),
                launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "launcher",
                node=node,
            )
        if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
            return cls(
                rank=int(env["SLURM_PROCID"]),
                world_size=int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]),
                local_rank=int(env["SLURM_LOCALID"]),
                master_addr=env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
                master_port=int(env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000),
                launcher="srun",
                node=int(env.get("SLURM_NODEID") or int(env["SLURM_PROCID"]) - int(env["SLURM_LOCALID"])),
            )
        return cls(
            rank=0,
            world_size=1,
            local_rank=0,
            master_addr="127.0.0.1",
            master_port=int(env.get("MASTER_PORT", "0")),
            launcher="python",
        )

    def export(self, env: MutableMapping[str, str] | None = None) -> None:
        """Set the variables that torch.distributed and DeepSpeed read."""
        env = os.environ if env is None else env
        env["RANK"] = str(self.rank)
        env["WORLD_SIZE"] = str(self.world_size)
        env["LOCAL_RANK"] = str(self.local_rank)
        env["MASTER_ADDR"] = self.master_addr
        env["MASTER_PORT"] = str(self.master_port)


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(
            f"{name} is {env[name]!r}, expected a whole number; the launcher of processes sets it"
        ) from None


def _first_host(nodelist: str) -> str:
    """The first host of a SLURM node list such as ``node[001-004,7],gpu3``."""
    if shutil.which("scontrol"):
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    match = re.match(r"([^\[,]+)(?:\[([0-9]+)[^\]]*\])?([^\[,]*)", nodelist)
    if not match:
        raise LaunchError(f"cannot read the host list {nodelist!r}; set MASTER_ADDR to the first node's name")
    return match.group(1) + (match.group(2) or "") + (match.group(3) or "")
