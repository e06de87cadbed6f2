"""What test_hf_releases.py does in an environment with another release of transformers, which this package is not in.

``python hf_release_job.py CHECK FOLDER [FOLDER ...]`` prints a JSON object as its last line.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

WORDS, END = 120, 121  # of the tests' tokenizer: w0 to w119, and the end of a document
NEW = 10  # tokens that are generated
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8]]


def load(folder: str, **options: Any) -> torch.nn.Module:
    """The model in fp32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options).eval()


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random words."""
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generation(folder: str, *_: str) -> dict[str, Any]:
    """The tokens that ``generate`` adds to the prompts, by way."""
    model, helper = load(folder), load(folder)
    length = max(map(len, PROMPTS))
    batch = torch.tensor([[END] * (length - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [*range(END, model.config.vocab_size)]}

    def together(**more: Any) -> list[list[int]]:
        return model.generate(batch, attention_mask=mask, **options, **more)[:, length:].tolist()

    def alone(**more: Any) -> list[list[int]]:
        rows = [torch.tensor([prompt]) for prompt in PROMPTS]
        texts = [model.generate(row, attention_mask=torch.ones_like(row), **options, **more)[0] for row in rows]
        return [text[len(prompt) :].tolist() for text, prompt in zip(texts, PROMPTS, strict=True)]

    static = {"cache_implementation": "static"}
    out = {
        "padded": together(),
        "padded, no cache": together(use_cache=False),
        "padded, static cache": together(**static, disable_compile=True),
        "padded, static cache, compiled": together(**static),
        "greedy": alone(),
        "assisted": alone(assistant_model=helper),
        "prompt lookup": alone(prompt_lookup_num_tokens=2),
    }
    for kind in ("eager", "grouped_mm", "batched_mm") if getattr(model.config, "_experts_implementation", None) else ():
        model.set_experts_implementation(kind)
        out[f"experts {kind}"] = together()
    model.set_attn_implementation("eager")
    out["attention eager"] = together()
    beams = {"beams": together(num_beams=3), "beams, no cache": together(num_beams=3, use_cache=False)}
    return {"version": transformers.__version__, "greedy": out, "beams": beams}


@torch.no_grad()
def biases(folder: str, *_: str) -> dict[str, Any]:
    """What routers have learned, fp32, by how the model was loaded; and what layers on a disk come to.

    That is biases of experts, [MoE layers, E], and means of routers' inputs, [MoE layers, H].
    """

    def of(model: torch.nn.Module) -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {"expert_bias": [], "input_mean": []}
        for name, buffer in model.named_buffers():
            assert buffer.dtype == torch.float32
            found[name.rpartition(".")[2]].append(buffer.tolist())
        return found

    def loaded(where: str, dtype: Any, **options: Any) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, dtype=dtype, **options).eval()

    out: dict[str, Any] = {str(dtype): of(loaded(folder, dtype)) for dtype in ("auto", torch.bfloat16, torch.float16)}
    out["cast"] = of(loaded(folder, torch.float32).bfloat16())
    with tempfile.TemporaryDirectory() as place:
        loaded(folder, torch.bfloat16).save_pretrained(place)
        out["saved"] = of(loaded(place, "auto"))
    layers = ["wte", "wpe", "drop", "h.0", "h.1", "h.2", "h.3", "ln_f"]
    places = {f"transformer.{name}": "disk" if name in ("h.1", "h.3") else "cpu" for name in layers} | {
        "lm_head": "cpu"
    }
    tokens = seeded(2, 16)
    for dtype in (torch.float32, torch.bfloat16):
        way = f"on a disk, {str(dtype).removeprefix('torch.')}"
        with tempfile.TemporaryDirectory() as place:
            placed = loaded(folder, dtype, device_map=places, offload_folder=place)
            try:
                difference = (placed(tokens).logits - loaded(folder, dtype)(tokens).logits).abs().max()
                out[way] = "as in memory" if difference < 1e-5 else str(difference)
            except ValueError as error:
                out[way] = str(error).split(":")[0]
    return out


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that a trainer takes as they are."""
    tokens = [seeded(16, seed=i) for i in range(count)]
    # the first label predicts nothing, but version 4 counts it
    return [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in tokens]


def training(folder: str, *_: str) -> dict[str, Any]:
    """Trainer: train, evaluate, save; what was saved is loaded again."""
    model = load(folder)
    model.config.use_cache = True
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=2, per_device_eval_batch_size=4, max_steps=3, learning_rate=1e-3,
            gradient_checkpointing=True, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=examples(8), eval_dataset=examples(8))
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        trainer.save_model(out)
        again = load(out)
        tokens = seeded(2, 16, seed=5)
        with torch.no_grad():
            expected = model.eval()(tokens).logits
            same = torch.equal(again(tokens).logits, expected)
            batch = torch.stack([example["input_ids"] for example in examples(8)])
            by_hand = float(load(folder)(batch, labels=batch).loss)
        saved = sorted(path.name for path in Path(out).glob("*.py"))
    return {"before": before, "after": after, "by hand": by_hand, "same": same, "saved": saved}


@torch.no_grad()
def packing(*folders: str) -> dict[str, Any]:
    """The largest difference of logits between a packed row and its documents alone, by folder and way."""
    documents = [seeded(length, seed=length) for length in (5, 9, 2, 7)]
    row = torch.cat(documents)[None]
    position_ids = torch.cat([torch.arange(len(document)) for document in documents])[None]
    out = {}
    for folder in folders:
        for attention in ("sdpa", "eager"):
            model = load(folder, attn_implementation=attention)
            alone = torch.cat([model(document[None]).logits for document in documents], dim=1)
            packed = model(row, position_ids=position_ids, use_cache=False).logits
            out[f"{Path(folder).parent.name} {attention}"] = float((packed - alone).abs().max())
            out[f"{Path(folder).parent.name} {attention} apart"] = float((model(row).logits - alone).abs().max())
    return out


def tuning(folder: str, *_: str) -> dict[str, Any]:
    """TRL's SFTTrainer, packed and not, and peft's LoRA."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.pad_token = tokenizer.eos_token
    lengths = (6, 11, 4, 9, 3, 12, 8, 5)
    data = Dataset.from_list([{"input_ids": seeded(n, seed=n).tolist()} for n in lengths])
    out: dict[str, Any] = {}
    for name, packed in (("packed", True), ("padded", False)):
        model = load(folder)
        with tempfile.TemporaryDirectory() as place:
            arguments = SFTConfig(
                place, packing=packed, max_length=24, per_device_train_batch_size=2, per_device_eval_batch_size=2,
                max_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
                logging_steps=1, eval_packing=packed, gradient_checkpointing=False,
            )  # fmt: skip
            trainer = SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
            out[name] = {"eval": trainer.evaluate()["eval_loss"]}
            batch = {key: value for key, value in next(iter(trainer.get_train_dataloader())).items() if key != "labels"}
            out[name]["keys"] = sorted(batch)
            if packed:
                with torch.no_grad():
                    logits = model.eval()(**batch).logits[0]
                    starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), len(logits)]
                    alone = [model(batch["input_ids"][:, a:b]).logits[0] for a, b in itertools.pairwise(starts)]
                    out[name]["documents"] = len(alone)
                    out[name]["difference"] = float((torch.cat(alone) - logits).abs().max())
            trainer.train()
            out[name]["losses"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    model = load(folder)
    with tempfile.TemporaryDirectory() as place:
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"], init_lora_weights=False)
        arguments = SFTConfig(
            place, max_steps=2, report_to=[], use_cpu=True, bf16=False, save_strategy="no", max_length=24,
            learning_rate=1e-3,
        )  # fmt: skip
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora)
        trainer.train()
        trainer.save_model(place)
        tokens = seeded(2, 12, seed=3)
        with torch.no_grad():
            tuned = trainer.model.eval()(input_ids=tokens).logits
            again = PeftModel.from_pretrained(load(folder), place).eval()
            out["lora"] = {
                "changed": float((tuned - load(folder)(tokens).logits).abs().max()),
                "loaded": float((again(input_ids=tokens).logits - tuned).abs().max()),
                "merged": float((again.merge_and_unload()(tokens).logits - tuned).abs().max()),
            }
    return out


class Logits(torch.nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits


@torch.no_grad()
def tracing(folder: str, *_: str) -> dict[str, Any]:
    """The largest difference to the model itself on other inputs than the example, by way; or the error."""
    example, other, longer = (seeded(2, length, seed=length) for length in (8, 8, 13))
    other = seeded(2, 8, seed=77)
    out: dict[str, Any] = {}
    ways = {"jit.trace": jit_trace, "export": export, "export, any length": export_any_length, "onnx": onnx}
    for experts in ("eager", "grouped_mm", "batched_mm"):
        model = load(folder)
        if getattr(model.config, "_experts_implementation", None):
            model.set_experts_implementation(experts)
        elif experts != "eager":
            continue
        wrapped = Logits(model).eval()
        for name, way in ways.items():
            try:
                traced = way(wrapped, example)
            except Exception as error:  # what a release cannot trace it must refuse
                out[f"{experts} {name}"] = f"{type(error).__name__}: {error}"[:300]
                continue
            for case, tokens in (("other", other), ("longer", longer)):
                if case == "longer" and name == "export":
                    continue
                try:
                    difference = float((traced(tokens) - wrapped(tokens)).abs().max())
                except Exception as error:
                    difference = f"{type(error).__name__}: {error}"[:300]
                out[f"{experts} {name} {case}"] = difference
    return out


def jit_trace(model: torch.nn.Module, example: torch.Tensor) -> Any:
    return torch.jit.trace(model, (example,), check_trace=False)


def export(model: torch.nn.Module, example: torch.Tensor) -> Any:
    return torch.export.export(model, (example,)).module()


def export_any_length(model: torch.nn.Module, example: torch.Tensor) -> Any:
    length = torch.export.Dim("length", min=2, max=32)
    return torch.export.export(model, (example,), dynamic_shapes={"input_ids": {1: length}}).module()


def onnx(model: torch.nn.Module, example: torch.Tensor) -> Any:
    import onnxruntime

    length = torch.export.Dim("length", min=2, max=32)
    with tempfile.TemporaryDirectory() as folder:
        program = torch.onnx.export(
            model, (example,), dynamo=True, dynamic_shapes={"input_ids": {1: length}}, verbose=False
        )
        program.save(f"{folder}/model.onnx")
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda tokens: torch.from_numpy(session.run(None, {name: tokens.numpy()})[0])


CHECKS = {check.__name__: check for check in (generation, biases, training, packing, tuning, tracing)}

if __name__ == "__main__":
    print(json.dumps(CHECKS[sys.argv[1]](*sys.argv[2:])))
