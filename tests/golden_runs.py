"""Do two versions of the code train the same numbers, bit for bit? For changes that must not change what is computed.

    python tests/golden_runs.py record before.json                # at the version to compare with
    python tests/golden_runs.py check before.json                # after the change, on the same machine
    python tests/golden_runs.py check before.json --only dense   # the runs whose names contain this

Each run is the trainer started from its command line on the CPU in fp32, over the layouts and kinds of layers that it
supports: ten updates of a small model on generated text. Recorded are the loss, the gradient norm and the learning rate
of each update, validation losses, and a SHA-256 of every weight and moment of the last checkpoint. Bits depend on the
processor and on the version of torch, so a record is for one machine.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tiny_run import SEQ, curve, flags, make_dataset, make_tokenizer, records, train

MOE: dict[str, Any] = {"num_experts": 4, "moe_train_capacity_factor": 1.0, "moe_min_capacity": 1}
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

# name -> processes, flags
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "dense": (1, DROPOUT),
    "dense, documents, recomputation": (
        1,
        {"reset_attention_mask": True, "reset_position_ids": True, "checkpoint_activations": True},
    ),
    "top-1, capacity, random token selection": (1, MOE | DROPOUT),
    "top-1, Jitter, first come": (1, MOE | {"moe_noise_policy": "Jitter", "no_moe_rts": True}),
    "top-1, dropless, z-loss": (1, MOE | {"disable_moe_token_dropping": True, "moe_z_loss_coeff": 0.001}),
    "top-2": (1, MOE | {"topk": 2}),
    "top-4, RSample, dropless": (
        1,
        MOE | {"topk": 4, "moe_noise_policy": "RSample", "disable_moe_token_dropping": True},
    ),
    "residual": (1, MOE | {"mlp_type": "residual"}),
    "TP 2, dense, sequence parallel": (2, DROPOUT | {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "TP 2, MoE": (2, MOE | {"tensor_model_parallel_size": 2}),
    "TP 2, MoE, sequence parallel, sharded experts": (
        2,
        MOE | {"tensor_model_parallel_size": 2, "sequence_parallel": True, "enable_expert_tensor_parallelism": True},
    ),
    "PP 2, MoE, recomputation": (
        2,
        MOE | DROPOUT | {"pipeline_model_parallel_size": 2, "checkpoint_activations": True},
    ),
    "PP 2, dense": (2, {"pipeline_model_parallel_size": 2}),
    "EP 2, capacity, chunks": (2, MOE | {"moe_expert_parallel_size": 2, "moe_overlap_chunks": 2}),
    "EP 2, dropless, top-2, residual": (
        2,
        MOE | {"moe_expert_parallel_size": 2, "disable_moe_token_dropping": True, "topk": 2, "mlp_type": "residual"},
    ),
    "TP 2, PP 2, MoE, dropless": (
        4,
        MOE
        | {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "disable_moe_token_dropping": True,
        },
    ),
    "TP 2, EP 2, MoE": (4, MOE | {"tensor_model_parallel_size": 2, "moe_expert_parallel_size": 2}),
    "PP 2, EP 2, MoE, bf16": (
        4,
        MOE | {"pipeline_model_parallel_size": 2, "moe_expert_parallel_size": 2, "fp32": None, "bf16": True},
    ),
    "dense, bf16": (1, {"fp32": None, "bf16": True}),
    "DP 2, MoE, bf16, moments in bf16": (
        2,
        MOE | {"fp32": None, "bf16": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "adam_beta2": 0.95},
    ),
}


def hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each piece of each tensor in a checkpoint's files."""
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                data = tensors.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                found[name] = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    if not found:
        raise RuntimeError(f"no tensors in {checkpoint}")
    return found


def run(name: str, folder: Path) -> dict[str, Any]:
    """The numbers of one run."""
    processes, changes = RUNS[name]
    save = folder / name.replace(" ", "_").replace(",", "")
    options = {"train_tokens": 16 * SEQ * 10, "save": save, "save_interval": None, "log_interval": 1} | changes
    done = train(processes, flags(folder, **options), timeout=600)
    if done.returncode:
        raise RuntimeError(f"{name}: status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return {
        "curve": {str(tokens): values for tokens, values in curve(save).items()},
        "lr": [record["lr"] for record in records(save, "train")],
        "valid": [record["loss"] for record in records(save, "valid")],
        "tensors": hashes(next(save.glob("step_*"))),
    }


def main(argv: list[str] | None = None) -> int:
    """Record or check; returns 1 if a number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path, help="JSON file of the record.")
    parser.add_argument("--only", default="", help="Only the runs whose names contain this text.")
    args = parser.parse_args(argv)
    before = json.loads(args.file.read_text()) if args.action == "check" else {}
    now, differing = {}, 0
    with tempfile.TemporaryDirectory(prefix="golden_runs_") as temporary:
        folder = Path(temporary)
        make_tokenizer(folder)
        make_dataset(folder)
        for name in (name for name in RUNS if args.only in name):
            now[name] = json.loads(json.dumps(run(name, folder)))
            if args.action == "record":
                print(f"recorded  {name}", flush=True)
                continue
            wrong = [key for key in before[name] if before[name][key] != now[name][key]]
            differing += bool(wrong)
            print(
                f"{'DIFFERS ' if wrong else 'same    '}  {name}{': ' + ', '.join(wrong) if wrong else ''}", flush=True
            )
    if args.action == "record":
        args.file.write_text(json.dumps(now, indent=1))
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
