"""Model files as Hugging Face's libraries keep them: safetensors or PyTorch files, and an index of the shards."""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron.checkpoint.errors import CheckpointError, some
from megatron.checkpoint.folder import FileRecord, write_file
from megatron.checkpoint.storage import write_safetensors
from megatron.checkpoint.tensors import DTYPES, Deferred
from megatron.conversion.contents import Lazy
from megatron.conversion.pickles import nothing_run

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH_SINGLE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``500MB`` or ``1.5GB`` (powers of 1000).

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", text.strip().upper())
    size = match and int(float(match[1]) * 1000 ** ("KB", "MB", "GB", "TB").index(match[2]) * 1000)
    if not size:
        raise ValueError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return size


def write_shards(folder: Path, tensors: Sequence[tuple[str, Deferred]], most: int) -> dict[str, FileRecord]:
    """Write tensors into files of at most ``most`` bytes each (more only where a single tensor has more).

    Memory holds one tensor at a time.

    Returns:
        The files written, by name.
    """
    shards: list[list[tuple[str, Deferred]]] = [[]]
    sizes = [0]
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and sizes[-1] + size > most:
            shards.append([])
            sizes.append(0)
        shards[-1].append((name, tensor))
        sizes[-1] += size
    count = len(shards)
    names = [_SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    records = {
        name: write_safetensors(folder / name, shard, {"format": "pt"})
        for name, shard in zip(names, shards, strict=True)
    }
    if count > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        records[_INDEX] = write_file(folder / _INDEX, json.dumps(index, indent=1).encode())
    return records


def read_shards(folder: Path) -> dict[str, Lazy]:
    """Every tensor of a folder's model files, by name; each is read when it is wanted. No pickled code is run.

    Raises:
        CheckpointError: there are no model files, or one is missing, damaged, or not what the index says.
    """
    for single, index, shards, read_file in (
        (_SINGLE, _INDEX, "model-*-of-*.safetensors", _safetensors_file),
        (_TORCH_SINGLE, _TORCH_INDEX, "pytorch_model-*-of-*.bin", _torch_file),
    ):
        whole, indexed = (folder / single).exists(), (folder / index).exists()
        if whole and indexed:
            raise CheckpointError(f"{folder} holds both {single} and {index}; remove what is not of this model")
        if whole or indexed:
            files = _shard_map(folder, index) if indexed else {single: []}
            if unknown := sorted({path.name for path in folder.glob(shards)} - set(files)):
                raise CheckpointError(
                    f"{folder} holds shards that are none of its model's: {some(unknown)}; remove them, or restore the "
                    "index that names them"
                )
            return _indexed(folder, index, files, read_file) if indexed else read_file(folder / single)
    raise CheckpointError(
        f"{folder} holds no model: looked for {_SINGLE}, {_INDEX}, {_TORCH_SINGLE} and {_TORCH_INDEX}; give the folder "
        "that save_pretrained wrote or the hub's snapshot"
    )


def _shard_map(folder: Path, index: str) -> dict[str, list[str]]:
    """Shards, and the tensors in each."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / index} has no weight_map that names a file for each tensor; restore the file")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, []).append(name)
    if outside := [file for file in sorted(files) if Path(file).name != file]:
        raise CheckpointError(f"{folder / index} names files of other folders: {some(outside)}; this is refused")
    missing = [file for file in sorted(files) if not (folder / file).is_file()]
    if missing:
        lost = sum(len(files[file]) for file in missing)
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its {len(files)} shards, with {lost} tensors: {some(missing)}; "
            "fetch them again"
        )
    return files


def _indexed(folder: Path, index: str, files: dict[str, list[str]], read_file: Any) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    problems = []
    for file, names in sorted(files.items()):
        found = read_file(folder / file)
        problems += [f"{name} is in {file}, where the index has another place" for name in found.keys() - set(names)]
        problems += [f"{name} is not in {file}" for name in names if name not in found]
        tensors |= found
    if problems:
        raise CheckpointError(f"{folder / index} and the shards disagree: {some(problems)}; fetch the folder again")
    return tensors


def _safetensors_file(path: Path) -> dict[str, Lazy]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch or convert it again") from None

    def reader(name: str) -> Any:
        def read(row: int | None) -> torch.Tensor:
            with safe_open(path, framework="pt", device="cpu") as file:
                return file.get_tensor(name) if row is None else file.get_slice(name)[row]

        return read

    if unknown := [f"{name} is {kind}" for name, (_, kind) in found.items() if kind not in _DTYPES]:
        raise CheckpointError(f"{path} has tensors in a format that is not read here: {some(unknown)}")
    return {name: Lazy(shape, _DTYPES[kind], reader(name)) for name, (shape, kind) in found.items()}


def _torch_file(path: Path) -> dict[str, Lazy]:
    with nothing_run(path):  # files of torch before 1.6 are no archives, and come into memory as a whole
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path} holds something else than named tensors; expected a PyTorch state dict")

    def reader(tensor: torch.Tensor) -> Any:
        return lambda row: tensor.detach() if row is None else tensor.detach()[row]

    return {name: Lazy(tuple(tensor.shape), tensor.dtype, reader(tensor)) for name, tensor in content.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: there is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected a JSON object")
    return content
