"""What a pipeline needs of the rest of a configuration."""

from collections.abc import Iterator

from megatron.config.run import RunConfig


def pipeline_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the pipeline's stages and their layers."""
    stages = config.parallel.pipeline_model_parallel_size
    layers, split = config.model.num_layers, config.parallel.pipeline_layer_split
    flag = f"--pipeline-model-parallel-size {stages}"
    if stages > layers:
        yield f"{flag} must not exceed --num-layers {layers}: every stage needs a layer; use {layers} or fewer"
    if split is not None:
        yield from _split_problems(split, stages, layers)


def _split_problems(split: str, stages: int, layers: int) -> Iterator[str]:
    flag, even = f"--pipeline-layer-split {split}", ",".join(map(str, _even(layers, stages)))
    words = split.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() and int(word) > 0 for word in words):
        yield f"{flag} must be positive whole numbers with commas between them; use {even}, or leave it out"
        return
    numbers = [int(word) for word in words]
    if len(numbers) != stages:
        yield (
            f"{flag} has {len(numbers)} numbers, and --pipeline-model-parallel-size is {stages}; give one number for"
            f" each stage, such as {even}, or leave it out"
        )
    elif sum(numbers) != layers:
        sum_ = " + ".join(map(str, numbers))
        yield f"{flag}: {sum_} = {sum(numbers)} must be --num-layers {layers}; use {even}, or leave it out"


def _even(layers: int, stages: int) -> list[int]:
    """As even a split as there is."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]
