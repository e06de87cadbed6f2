"""Which files a checkpoint of Megatron-LM has, and the shards of tensors in them.

FOLDER/latest_checkpointed_iteration.txt            the newest iteration, or "release"
FOLDER/iter_0000500/mp_rank_XX/model_optim_rng.pt   of tensor-parallel rank XX
FOLDER/iter_0000500/mp_rank_XX_PPP/...              and of pipeline stage PPP
FOLDER/iter_0000500/mp_rank_XX_EEE/...              and of expert-parallel rank EEE, or mp_rank_XX_PPP_EEE
FOLDER/release/...                                  in the place of iter_0000500
FOLDER/iter_0000500/.metadata                       distributed: see torch_dist.py

Before 2023 the distributed optimizer had model_rng.pt there, and folders of its own for itself.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CheckpointError, some
from megatron.conversion.contents import Lazy
from megatron.conversion.megatron_deepspeed.core_names import from_core
from megatron.conversion.megatron_deepspeed.layouts import (
    MegatronCheckpoint,
    check_same_run,
    flat,
    lazy_of,
    named,
    tensor_ranks,
)
from megatron.conversion.megatron_deepspeed.names import EXPERTS
from megatron.conversion.megatron_deepspeed.torch_dist import METADATA, find_distributed
from megatron.conversion.pickles import load_pickle

_TRACKER = "latest_checkpointed_iteration.txt"
_MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def is_megatron_lm(folder: Path) -> bool:
    """Whether a folder looks like one of these, or one of its iterations does."""
    return (folder / _TRACKER).is_file() or (folder / METADATA).is_file() or bool(_rank_files(folder))


def find_megatron_lm(folder: Path) -> MegatronCheckpoint:
    """The tensors of ``folder``, with ``latest_checkpointed_iteration.txt`` or of one iteration; they stay on the disk
    until they are read.

    Raises:
        CheckpointError: a file is missing, damaged or holds other objects than tensors.
    """
    where = _iteration(folder)
    return find_distributed(where) if (where / METADATA).is_file() else _find_ranks(where)


def _iteration(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; give the folder of Megatron-LM's --save")
    if not (folder / _TRACKER).is_file():
        return folder
    text = (folder / _TRACKER).read_text(errors="replace").strip()
    name = f"iter_{int(text):07d}" if text.isdecimal() else text
    if not (text.isdecimal() or text == "release") or not (folder / name).is_dir():
        raise CheckpointError(
            f"{folder / _TRACKER} says {text!r}, and there is no {name} in {folder}; expected an iteration's number or "
            "'release'. Give the iteration's folder"
        )
    return folder / name


def _rank_files(where: Path) -> list[Path]:
    return sorted(path for name in _MODEL_FILES for path in where.glob(f"mp_rank_[0-9]*/{name}"))


def _find_ranks(where: Path) -> MegatronCheckpoint:
    files = _rank_files(where)
    if not files:
        raise CheckpointError(
            f"{where} holds no mp_rank_XX/{_MODEL_FILES[0]} and no {METADATA}; give the folder of Megatron-LM's --save"
        )
    first, model_file = load_pickle(files[0]), files[0].name
    args = first.get("args")
    tensor, stages, shares = _sizes(args, where)
    contents = {}
    for t, p, e in itertools.product(range(tensor), range(stages), range(shares)):
        name = f"mp_rank_{t:02d}" + f"_{p:03d}" * (stages > 1) + f"_{e:03d}" * (shares > 1)
        path = where / name / model_file
        if not path.is_file():
            raise CheckpointError(
                f"{where} lacks {name}/{path.name} of {tensor} tensor-parallel ranks, {stages} stages and {shares} "
                "expert-parallel ranks; copy it from where it was saved"
            )
        contents[t, p, e] = load_pickle(path)
        files.remove(path)
    if files:
        raise CheckpointError(
            f"{files[0]} is of none of the {tensor} tensor-parallel ranks, {stages} stages and {shares} "
            "expert-parallel ranks that saved this checkpoint; remove files of another one"
        )
    check_same_run({f"rank {rank}": content for rank, content in contents.items()}, where)
    found: dict[str, dict[int, Lazy]] = {}
    core, layers = False, 0
    for number, stage in itertools.product(range(len(_chunks(first, where))), range(stages)):
        here = 0
        for (t, p, e), content in contents.items():
            if p != stage:
                continue
            for name, lazy in _tensors(_chunks(content, where)[number]):
                here = max([here, *(int(layer) + 1 for layer in _LAYER.findall(name))])
                core = core or name.startswith("decoder.")
                for new, part in _renamed(name, lazy, layers, e, shares, args):
                    if e == 0 or EXPERTS in new:  # other tensors are alike
                        found.setdefault(new, {})[t] = part
        layers += here
    if lost := [f"{name} has {len(of)} of {tensor}" for name, of in found.items() if len(of) != tensor]:
        raise CheckpointError(f"{where} lacks shards: {some(lost)}; copy the files of all ranks")
    shards = {name: [of[t] for t in range(tensor)] for name, of in found.items()}
    return MegatronCheckpoint(where, args, float(first.get("checkpoint_version") or 0), shards, core)


def _sizes(args: Any, where: Path) -> tuple[int, int, int]:
    """Tensor-parallel ranks, pipeline stages and expert-parallel ranks of the run that saved."""
    tensor = tensor_ranks(args) or 1
    stages = getattr(args, "pipeline_model_parallel_size", None) or 1
    shares = getattr(args, "expert_model_parallel_size", None) or 1
    cut = getattr(args, "expert_tensor_parallel_size", None)
    if getattr(args, "num_experts", None) and cut not in (None, tensor):
        raise CheckpointError(
            f"{where}: experts shared by {cut} tensor-parallel ranks and other layers by {tensor} are not read here "
            "(--expert-tensor-parallel-size); save as torch_dist, which is"
        )
    return tensor, stages, shares


def _chunks(content: dict[str, Any], where: Path) -> list[dict[str, Any]]:
    """The parts of a stage: one; or with interleaved stages several, and those of a number follow each other."""
    if isinstance(content.get("model"), dict):
        return [content["model"]]
    names = itertools.takewhile(content.__contains__, (f"model{number}" for number in itertools.count()))
    if not (chunks := [content[name] for name in names]):
        raise CheckpointError(f"{where} holds no model; expected one under 'model'")
    return chunks


def _tensors(chunk: dict[str, Any]) -> Iterator[tuple[str, Lazy]]:
    for name, tensor in flat(chunk):
        if not name.endswith("_extra_state"):
            yield named(name), lazy_of(tensor)


def _renamed(name: str, lazy: Lazy, first_layer: int, share: int, shares: int, args: Any) -> Iterator[tuple[str, Lazy]]:
    """A tensor by the name that it has without a pipeline; experts by their numbers in the layer."""
    if name.startswith("encoder."):
        yield _LAYER.sub(lambda match: f"layers.{int(match[1]) + first_layer}.", name), lazy
    else:
        experts = (getattr(args, "num_experts", None) or shares) // shares
        yield from from_core(name, lazy, first_layer=first_layer, first_expert=share * experts, experts=experts)
