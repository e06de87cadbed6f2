"""Which models a scaling ladder trains, and how.

Dense models of growing width, all trained on the same tokens in the same order, say what loss a dense model of any
size between them would have: they are the *ladder*. Models with experts are compared with it.

All have the same depth, so that width is the only difference. Their learning rate follows from the width by one rule;
the ``rates`` step trains each model with several multiples of it, and each model takes the best.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron.config import RunConfig
from megatron.config.flags import parse_args
from megatron.config.option import parse_count
from megatron.data import manifest
from tools.plot_runs import Run, RunError, read_run

BASE_WIDTH, BASE_RATE = 128, 3e-3
SEEDS = (1, 2)
RATES = "rates.json"  # in the output folder: the learning rate of each model, by name


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the comparison; dense with 1 expert. ``flags`` are what makes it another than its recipe's."""

    width: int
    experts: int = 1
    recipe: str = "recommended"
    change: str = ""
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Such as ``recommended-128`` and ``recommended-128x32-top2``."""
        size = f"{self.width}x{self.experts}" if self.experts > 1 else str(self.width)
        return "-".join(filter(None, (self.recipe, size, self.change)))

    def rate(self) -> float:
        """The rule's learning rate: proportional to 1 / sqrt(width)."""
        return BASE_RATE * (BASE_WIDTH / self.width) ** 0.5


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    layers: int
    head_size: int
    sequence: int
    batch: int  # sequences of an update
    vocabulary: int
    tokens: int  # of each run
    rate_tokens: int  # of each run that looks for a learning rate
    timed_updates: int
    validation_batches: int
    recipes: tuple[str, ...]
    widths: tuple[int, ...]
    experts: dict[int, tuple[int, ...]]  # numbers of experts, by width
    multiples: tuple[float, ...] = ()  # of the rule's learning rate, in the step that looks for rates
    ablations: tuple[tuple[str, str], ...] = ()  # name and flags, each a change of the first model with experts


SCALES = {
    "trial": Scale(
        layers=2, head_size=8, sequence=64, batch=16, vocabulary=512, tokens=131_072, rate_tokens=32_768,
        timed_updates=8, validation_batches=8, recipes=("recommended",), widths=(16, 32), experts={16: (4,)},
        multiples=(1.0, 2.0),
    ),
    "pair": Scale(
        layers=8, head_size=64, sequence=512, batch=256, vocabulary=4096, tokens=460_000_000, rate_tokens=92_000_000,
        timed_updates=60, validation_batches=16, recipes=("recommended",), widths=(128, 192, 256, 384),
        experts={128: (32,)},
    ),
    "full": Scale(
        layers=8, head_size=64, sequence=512, batch=256, vocabulary=4096, tokens=460_000_000, rate_tokens=92_000_000,
        timed_updates=60, validation_batches=16, recipes=("published", "recommended"),
        widths=(128, 192, 256, 384, 512), experts={128: (32, 64, 128), 192: (32,)}, multiples=(0.5, 1.0, 2.0),
        ablations=(
            ("8-experts", "--num-experts 8"),
            ("16-experts", "--num-experts 16"),
            ("capacity-1", "--moe-train-capacity-factor 1.0 --moe-token-dropping"),
            ("capacity-1.25", "--moe-train-capacity-factor 1.25 --moe-token-dropping"),
            ("first-tokens", "--moe-train-capacity-factor 1.0 --moe-token-dropping --no-moe-rts"),
            ("aux-loss", "--moe-router-load-balancing-type aux_loss"),
            ("no-qk-norm", "--no-qk-layernorm"),
            ("z-loss", "--moe-z-loss-coeff 0.001"),
            ("every-layer", "--expert-interval 1"),
            ("top-2", "--topk 2"),
            ("residual", "--mlp-type residual"),
            ("pyramid-residual", "--mlp-type residual --num-experts 16 16 32 32"),
        ),
    ),
}  # fmt: skip
"""``pair`` is the deciding comparison: half an hour of one H200. ``trial`` takes minutes on a CPU and shows nothing."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of the trainer: its name, the folder of its checkpoints and metrics, and its flags."""

    name: str
    model: Model
    folder: Path
    flags: tuple[str, ...]

    @functools.cached_property
    def config(self) -> RunConfig:
        """The whole configuration."""
        return parse_args(list(self.flags))


class Ladder:
    """The jobs of a scale, on a corpus.

    Args:
        out: the folder for everything that is made.
        scale: of :data:`SCALES`.
        tokens: of each run, in place of the scale's.
        data: flags that name the data and its tokenizer.
        device: flags that say where and in which precision.
        rates: the learning rate of each model, by name, where one was looked for.
    """

    def __init__(
        self,
        out: Path,
        scale: Scale,
        tokens: int | None = None,
        data: Sequence[str] = (),
        device: Sequence[str] = (),
        rates: dict[str, float] | None = None,
    ) -> None:
        self.out, self.scale, self.tokens = out, scale, tokens or scale.tokens
        self._data, self._device, self._rates = tuple(data), tuple(device), rates or {}

    @property
    def dense(self) -> list[Model]:
        """The ladder, from small to large, of each recipe."""
        return [Model(width, recipe=recipe) for recipe in self.scale.recipes for width in self.scale.widths]

    @property
    def with_experts(self) -> list[Model]:
        """The models with experts, without ablations."""
        return [
            Model(width, experts, recipe)
            for recipe in self.scale.recipes
            for width, numbers in self.scale.experts.items()
            for experts in numbers
        ]

    @property
    def ablations(self) -> list[Model]:
        """The first recommended model with experts, changed in one way each."""
        width, numbers = next(iter(self.scale.experts.items()))
        return [
            Model(width, numbers[0], change=change, flags=tuple(words.split()))
            for change, words in self.scale.ablations
        ]

    def main_jobs(self) -> Iterator[Job]:
        """The runs that the comparison rests on: those that decide with two seeds, and ablations."""
        for seed in SEEDS:
            for model in [*self.with_experts, *self.dense]:
                yield self._main_job(model, seed)
        for model in self.ablations:
            yield self._main_job(model, SEEDS[0])

    def rate_jobs(self) -> Iterator[Job]:
        """Short runs, each a whole schedule, that look for learning rates."""
        for model in [*self.dense, *self.with_experts]:
            for multiple in self.scale.multiples:
                rate = multiple * model.rate()
                yield self._job(f"rates/{model.name}-{multiple:g}", model, rate, SEEDS[0], self.scale.rate_tokens)

    def time_jobs(self) -> Iterator[Job]:
        """The first updates of each model, to be run alone on the device."""
        updates = self.scale.timed_updates
        stop = ("--exit-tokens", str(updates * self.scale.batch * self.scale.sequence))
        quiet = ("--log-interval", str(max(1, updates // 6)), "--eval-interval", str(10 * updates))
        for model in [*self.dense, *self.with_experts]:
            yield self._job(f"time/{model.name}", model, self._rate(model), SEEDS[0], more=(*stop, *quiet))

    def _main_job(self, model: Model, seed: int) -> Job:
        rate = self._rate(model)
        return self._job(f"{model.name}-lr{rate:.3g}-seed{seed}", model, rate, seed)

    def _rate(self, model: Model) -> float:
        unchanged = dataclasses.replace(model, change="", flags=())
        return self._rates.get(unchanged.name, model.rate())

    def _job(
        self, name: str, model: Model, rate: float, seed: int, tokens: int | None = None, more: tuple[str, ...] = ()
    ) -> Job:
        scale, tokens = self.scale, tokens or self.tokens
        updates = tokens // (scale.batch * scale.sequence)
        folder = self.out / "runs" / str(tokens) / name
        words = {
            "--recipe": model.recipe,
            "--num-layers": scale.layers,
            "--hidden-size": model.width,
            "--num-attention-heads": model.width // scale.head_size,
            "--num-experts": model.experts,
            "--seq-length": scale.sequence,
            "--hidden-dropout": 0,
            "--attention-dropout": 0,
            "--global-batch-size": scale.batch,
            "--micro-batch-size": scale.batch,
            "--train-tokens": tokens,
            "--lr": f"{rate:.6g}",
            "--min-lr": f"{rate / 10:.6g}",
            "--lr-warmup-tokens": tokens // 40,
            "--eval-interval": max(1, updates // 10),
            "--eval-iters": scale.validation_batches,
            "--log-interval": max(1, updates // 100),
            "--save-interval": max(1, updates // 3),
            "--keep-last": 1,
            "--save": folder,
            "--load": folder,
            "--seed": seed,
            "--run-name": name.replace("/", "-"),
        }
        given = tuple(str(each) for pair in words.items() for each in pair)
        return Job(name, model, folder, (*given, *self._data, *self._device, *model.flags, *more))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`load_ladder`."""
    parser.add_argument("--out", type=Path, required=True, help="Folder for everything that is made.")
    parser.add_argument("--scale", choices=SCALES, default="pair")
    parser.add_argument("--tokens", type=parse_count, help="Of each run (default: the scale's).")


def load_ladder(out: Path, scale: Scale, tokens: int | None = None) -> Ladder:
    """The ladder of what has been prepared in ``out``: the datasets, and rates if they have been looked for.

    Raises:
        ValueError: the datasets have fewer tokens than one pass of each run reads.
    """
    gpu = torch.cuda.is_available()
    device = ("--bf16", "--num-workers", "2") if gpu else ("--fp32", "--device", "cpu", "--num-workers", "0")
    file = out / RATES
    rates = json.loads(file.read_text()) if file.exists() else {}
    data = _data_flags(out / "data", scale, tokens or scale.tokens)
    return Ladder(out, scale, tokens, data, device, rates)


def _data_flags(folder: Path, scale: Scale, tokens: int) -> tuple[str, ...]:
    """Each file of the corpus as often as it has tokens; as much of it held out as validation reads."""
    prefixes = sorted(path.with_suffix("") for path in folder.glob("*_document.idx"))
    manifests = [manifest.read(str(prefix)) for prefix in prefixes]
    counts = [0 if each is None else each.tokens for each in manifests]
    total, validation = sum(counts), scale.validation_batches * scale.batch * scale.sequence
    held_out = 1.2 * validation  # files do not end where a batch does
    needed = math.ceil(1.02 * tokens + held_out)
    if total < needed:
        raise ValueError(
            f"the corpus has {total:,} tokens; a run on {tokens:,} and its validation need {needed:,}, none of them "
            "twice: give more text (--corpus), or fewer tokens (--tokens)"
        )
    share = 1000 * held_out / total
    paths: list[str] = []
    for prefix, count in zip(prefixes, counts, strict=True):
        paths += [f"{count / total:.6f}"] * (len(prefixes) > 1) + [str(prefix)]
    return (
        "--data-path", *paths, "--split", f"{1000 - share:.3f},{share:.3f},0",
        "--tokenizer-type", "GPT2BPETokenizer",
        "--vocab-file", str(folder / "tokenizer-vocab.json"), "--merge-file", str(folder / "tokenizer-merges.txt"),
    )  # fmt: skip


def metrics(folder: Path) -> Run:
    """What a run logged; nothing where it has logged nothing yet."""
    try:
        return read_run(folder)
    except RunError:
        return Run(folder.name)


def validation_losses(folder: Path) -> dict[int, float]:
    """The validation loss of a run by the tokens that it had been trained on."""
    return {line["tokens"]: line["loss"] for line in metrics(folder).lines("valid")}
