"""Peak memory of tools/convert_checkpoint.py over models of several depths: whether it grows with the model.

    python -m benchmarks.checkpoint_memory --layers 4 8 16 --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt \\
        --json checkpoint_memory.json

The models are random, in fp32, every second layer with experts, under megatron.core's names: once as a file of
Megatron-LM's, once as a checkpoint of torch.distributed.checkpoint, as megatron.core writes. They are converted to the
other formats and back as a user does it. "peak" is the kernel's (VmHWM) and counts pages of mapped files, which it can
drop at any time; "private" is the peak without them. Needs Linux.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.corpus_memory import watched
from benchmarks.output import make_parser, markdown, number, write_json

CONVERSIONS = (  # in this order: each reads what another one wrote
    ("megatron-lm", "native"),
    ("torch_dist", "native"),
    ("native", "megatron-deepspeed"),
    ("megatron-deepspeed", "native"),
    ("native", "hf"),
    ("hf", "native"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; memory in bytes."""

    conversion: str
    layers: int
    model_bytes: int
    largest_tensor: int
    seconds: float
    peak: int
    private: int


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, device=False)
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[4, 8, 16], metavar="N", help="Depths of models (default: 4 8 16).")
    add("--hidden-size", type=int, default=1024, metavar="N", help="Width (default: 1024).")
    add("--num-experts", type=int, default=8, metavar="N", help="Of each second layer (default: 8).")
    add("--vocab-file", type=Path, required=True, metavar="FILE", help="GPT-2's vocab.json.")
    add("--merge-file", type=Path, required=True, metavar="FILE", help="GPT-2's merges.txt.")
    add("--folder", metavar="DIR", help="Where to work; seven times the largest model (a temporary one).")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(words)
    rows: list[Row] = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows += measure(args, layers, Path(folder))
        print(table(rows), file=sys.stderr, flush=True)
    order = [f"{source} to {target}" for source, target in CONVERSIONS]
    rows.sort(key=lambda row: order.index(row.conversion))
    print(table(rows))
    write_json(args.json, "cpu", rows, hidden_size=args.hidden_size, num_experts=args.num_experts)


def measure(args: argparse.Namespace, layers: int, folder: Path) -> list[Row]:
    """Make a model, convert it to and fro."""
    size, largest = write_model(folder, layers, args.hidden_size, args.num_experts)
    files = ["--vocab-file", str(args.vocab_file), "--merge-file", str(args.merge_file)]
    rows = []
    for source, target in CONVERSIONS:
        save = folder / (target if source == "megatron-lm" or target != "native" else f"native of {source}")
        words = ["convert_checkpoint.py", "--load", str(folder / source), "--to", target, "--save", str(save), *files]
        tokenizer = ["--tokenizer-type", "GPT2BPETokenizer"] if target == "native" else []
        seconds, peak, private, *_ = watched([*words, *tokenizer])
        rows.append(Row(f"{source} to {target}", layers, size, largest, seconds, peak, private))
    return rows


def write_model(folder: Path, layers: int, hidden: int, experts: int) -> tuple[int, int]:
    """A random model as ``folder/megatron-lm`` and ``folder/torch_dist``; bytes of it and of its largest tensor."""
    state = {name: 0.02 * torch.randn(shape) for name, shape in _shapes(layers, hidden, experts).items()}
    args = argparse.Namespace(
        num_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64, seq_length=1024,
        max_position_embeddings=1024, num_experts=experts, moe_router_topk=1, moe_router_pre_softmax=True,
    )  # fmt: skip
    common = {"args": args, "checkpoint_version": 3.0}
    own = folder / "megatron-lm" / "mp_rank_00"
    own.mkdir(parents=True)
    torch.save({"model": state, **common}, own / "model_optim_rng.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state, checkpoint_id=folder / "torch_dist", no_dist=True)
    torch.save(common, folder / "torch_dist" / "common.pt")
    kind = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "torch_dist" / "metadata.json").write_text(json.dumps(kind))
    sizes = [tensor.numel() * tensor.element_size() for tensor in state.values()]
    return sum(sizes), max(sizes)


def _shapes(layers: int, hidden: int, experts: int) -> dict[str, tuple[int, ...]]:
    def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}

    shapes = {
        "embedding.word_embeddings.weight": (50304, hidden),
        "embedding.position_embeddings.weight": (1024, hidden),
    }
    for layer in range(layers):
        before = f"decoder.layers.{layer}"
        shapes |= norm(f"{before}.input_layernorm") | norm(f"{before}.pre_mlp_layernorm")
        shapes |= linear(f"{before}.self_attention.linear_qkv", 3 * hidden, hidden)
        shapes |= linear(f"{before}.self_attention.linear_proj", hidden, hidden)
        feed_forwards = [f"{before}.mlp"]
        if layer % 2:
            shapes[f"{before}.mlp.router.weight"] = (experts, hidden)
            feed_forwards = [f"{before}.mlp.experts.local_experts.{expert}" for expert in range(experts)]
        for name in feed_forwards:
            shapes |= linear(f"{name}.linear_fc1", 4 * hidden, hidden) | linear(
                f"{name}.linear_fc2", hidden, 4 * hidden
            )
    return shapes | norm("decoder.final_layernorm")


def table(rows: list[Row]) -> str:
    """For people to read."""
    cells = [
        [
            row.conversion,
            str(row.layers),
            *(number(value / 1e6, 0) for value in (row.model_bytes, row.largest_tensor)),
            number(row.seconds, 0),
            *(number(value / 1e6, 0) for value in (row.peak, row.private)),
        ]
        for row in rows
    ]
    return markdown("<conversion | layers | model MB | largest tensor MB | seconds | peak MB | private MB", cells)


if __name__ == "__main__":
    main()
