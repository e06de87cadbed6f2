"""A new run from old weights with the optimizers and precisions of GPUs: the weights come over, the optimizer starts
anew or goes on."""

import json

import pytest
import tiny_run

pytestmark = pytest.mark.gpu
DEVICE = {"device": None, "fp32": None, "num_experts": 4, "hidden_size": 64}
KINDS = {
    "fp16": {"fp16": True},
    "bf16": {"bf16": True},
    "8 bits": {"bf16": True, "optimizer": "adamw8bit"},
}
STILL = {"lr": 1e-30, "lr_warmup_tokens": 0, "weight_decay": 0}  # no update changes a weight


def train(folder, **options) -> dict:
    """A run to its end; the metadata of its last checkpoint."""
    done = tiny_run.train(1, tiny_run.flags(folder, **DEVICE, **options))
    assert done.returncode == 0, done.stdout + done.stderr
    save = options["save"]
    return json.loads((save / (save / "latest").read_text().strip() / "meta.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_over_and_the_optimizer_as_asked(tmp_path, kind):
    tiny_run.make_tokenizer(tmp_path)
    tiny_run.make_dataset(tmp_path)
    old, still, kept = (tmp_path / name for name in ("old", "still", "kept"))
    train(tmp_path, save=old, **KINDS[kind])
    fresh = train(tmp_path, save=still, load=old, finetune=True, **KINDS[kind], **STILL)
    expected, (first, *_) = tiny_run.records(old, "valid")[-1]["loss"], tiny_run.records(still, "valid")
    assert first["loss"] == pytest.approx(expected, abs=1e-3)
    more = train(tmp_path, save=kept, load=old, finetune=True, finetune_load_optim=True, **KINDS[kind])
    steps = (fresh["optimizer"]["adam_step"], more["optimizer"]["adam_step"])
    if kind == "fp16":  # updates that only lower the loss scale are not Adam's
        assert steps[0] <= 8 < steps[1]
    else:
        assert steps == (8, 16)
    assert all(record["loss"] is not None for record in tiny_run.records(kept, "train"))
