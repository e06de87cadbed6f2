"""An exported model with experts in Hugging Face's transformers: tokens a second of a prompt, and of what follows it.

    python -m benchmarks.hf_export --dtype fp32 --hidden-size 512 --layers 8 --experts 32
    python -m benchmarks.hf_export --hidden-size 1024 --layers 24 --experts 32       # 350M+MoE-32, on a GPU

The model has random weights and experts in every second layer. On a CPU, seconds are those that the process itself
computed, all threads together, so that other processes hardly count. Logits of each experts implementation are first
compared with those of the loop over experts.
"""

import argparse
import dataclasses
import time

import torch
import transformers
from transformers import GenerationConfig

from benchmarks.output import DTYPES, device_name, make_parser, markdown, number, write_json
from megatron.conversion.hf_moe.configuration_gpt_moe import GPTMoEConfig
from megatron.conversion.hf_moe.modeling_gpt_moe import GPTMoEForCausalLM


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    experts: str
    batch: int
    prompt: int
    prompt_tokens_per_s: float
    new_tokens_per_s: float


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, dtype=True, repeats=(3, "Timed runs"))
    parser.add_argument("--hidden-size", type=int, default=1024, metavar="H", help="Hidden size (default: 1024).")
    parser.add_argument("--layers", type=int, default=24, metavar="N", help="Layers (default: 24).")
    parser.add_argument("--experts", type=int, default=32, metavar="E", help="Experts of a layer (default: 32).")
    parser.add_argument("--topk", type=int, default=1, metavar="K", help="Experts of a token (default: 1).")
    parser.add_argument("--prompt", type=int, default=1024, metavar="N", help="Tokens of a prompt (default: 1024).")
    parser.add_argument("--new", type=int, default=64, metavar="N", help="Tokens that follow it (default: 64).")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="B", help="Prompts at a time.")
    parser.add_argument(
        "--implementations", nargs="+", default=["eager", "grouped_mm"], metavar="NAME",
        help="transformers' experts_implementation; eager is the loop over experts. batched_mm copies an expert for "
        "each token, also of the prompt; on GPUs transformers itself takes it for new tokens in place of grouped_mm.",
    )  # fmt: skip
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Check, measure, print."""
    args = parse_args(words)
    model = make_model(args)
    rows = [row for kind in args.implementations for row in measure(args, model, kind)]
    print(
        f"{device_name(args.device)}, torch {torch.__version__}, transformers {transformers.__version__}, {args.dtype}"
    )
    print(table(rows), flush=True)
    write_json(args.json, args.device, rows, dtype=args.dtype, transformers=transformers.__version__)


def make_model(args: argparse.Namespace) -> GPTMoEForCausalLM:
    """A model with random weights."""
    torch.manual_seed(0)
    config = GPTMoEConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=args.prompt + args.new,
        experts_per_layer=[args.experts if layer % 2 else 1 for layer in range(args.layers)],
        num_experts_per_tok=args.topk,
    )
    with torch.device(args.device):
        return GPTMoEForCausalLM(config).to(DTYPES[args.dtype]).eval()


@torch.no_grad()
def measure(args: argparse.Namespace, model: GPTMoEForCausalLM, kind: str) -> list[Row]:
    """A row for each batch size.

    Raises:
        SystemExit: logits are not those of the loop over experts.
    """
    check = torch.randint(model.config.vocab_size, (2, min(64, args.prompt)), device=args.device)
    choose(model, "eager")
    expected = model(check).logits.float()
    choose(model, kind)
    difference = (model(check).logits.float() - expected).abs().amax(-1) / expected.abs().max()
    # In bf16, rounding sends a few tokens to another expert.
    differ = float((difference > (1e-4 if args.dtype == "fp32" else 0.05)).float().mean())
    if differ > (0 if args.dtype == "fp32" else 0.1):
        raise SystemExit(f"{kind}: the logits of {differ:.0%} of the tokens are not the loop's")
    rows = []
    for batch in args.batches:
        prompt = torch.randint(model.config.vocab_size, (batch, args.prompt), device=args.device)
        first, whole = (best_s(args, model, prompt, new) for new in (1, 1 + args.new))
        rows.append(Row(kind, batch, args.prompt, prompt.numel() / first, batch * args.new / (whole - first)))
    return rows


def choose(model: GPTMoEForCausalLM, kind: str) -> None:
    """Take an experts implementation, where the release of transformers has several."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(kind)
    elif kind != "eager":
        raise SystemExit(f"transformers {transformers.__version__} has no experts implementations; give eager alone")


def best_s(args: argparse.Namespace, model: GPTMoEForCausalLM, prompt: torch.Tensor, new: int) -> float:
    """Least seconds of generating ``new`` tokens."""
    options = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    times = []
    for _ in range(1 + args.repeats):
        synchronize(args.device)
        begin = clock()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options)
        synchronize(args.device)
        times.append(clock() - begin)
    return min(times[1:])


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def table(rows: list[Row]) -> str:
    """Markdown."""
    cells = [
        (r.experts, str(r.batch), number(r.prompt_tokens_per_s, 0), number(r.new_tokens_per_s, 1)) for r in rows
    ]  # fmt: skip
    return markdown("<experts | batch | prompt tokens/s | new tokens/s", cells)


if __name__ == "__main__":
    main()
