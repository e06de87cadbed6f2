"""Forward and backward pass of a micro-batch as one CUDA graph: the host launches it as a whole, not kernel by kernel.

A graph repeats what was recorded once, on the same memory. So a micro-batch is copied into fixed buffers before, and
its losses and gradients are found in fixed memory after:

    tokens, labels, mask, gradient of the loss -> [ graph ] -> losses, counts, parameters' gradients, samples of layers

What happens to a gradient next (it is added to fp32 sums, reduced over processes, used by the update) is not part of it
and happens as without graphs, on the same tensors.

Random numbers are the same too. A kernel in a graph takes the seed from memory that replaying fills, for each generator
that it was recorded with; within a graph a generator cannot be seeded. As each layer has a seed of its own, each has a
generator of its own here, which stands in for torch's default one while the layer is recorded; and a second one, seeded
alike, for when activation checkpointing runs the layer again.

Tokens travel between processes inside the graph. So all processes of an expert group record, and replay, together: they
do, as their micro-batches have the same shapes.

The first :data:`WARM_UP` micro-batches run as they are, on the stream of the graph: torch.compile and Triton compile
then, and libraries make their handles.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from megatron.model.gpt import GPTModel
from megatron.model.loss import LossSums
from megatron.model.monitors import LayerSamples, Sample
from megatron.model.randomness import layer_seed

WARM_UP = 3  # micro-batches


class CudaRecorder:
    """Records a function's kernels, once, and repeats them. All that concerns CUDA is in here.

    Args:
        device: where the kernels run.
        generators: how many of them the function draws from; see :meth:`draw_from`.
    """

    def __init__(self, device: torch.device, generators: int) -> None:
        self._stream = torch.cuda.Stream(device)
        self._default = torch.cuda.default_generators[self._stream.device_index]
        self._generators = [torch.Generator(device) for _ in range(generators)]
        self._graph: torch.cuda.CUDAGraph | None = None

    def seed(self, seeds: Sequence[int]) -> None:
        """Seed the generators, for the next run or replay."""
        for generator, seed in zip(self._generators, seeds, strict=True):
            generator.manual_seed(seed)

    def draw_from(self, number: int) -> None:
        """Inside the function: from here on torch's default generator draws what generator ``number`` would."""
        self._default.graphsafe_set_state(self._generators[number])

    def run(self, function: Callable[[], None]) -> None:
        """Call the function as it is, on the stream that records."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with self._default_kept(), torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> None:
        """Call the function to learn its kernels. Nothing is computed; what it makes is filled by :meth:`replay`.

        Raises:
            RuntimeError: it does something that cannot be repeated, such as waiting for the GPU.
        """
        gc.collect()  # nodes of an earlier backward pass would bring their stream into this one
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            # other threads (of the data loader, of NCCL) may go on meanwhile
            with (
                self._default_kept(),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                function()
        except RuntimeError as error:
            raise RuntimeError(f"--cuda-graphs: a micro-batch cannot be recorded ({error}); drop the flag") from error
        self._graph = graph

    def replay(self) -> None:
        """Repeat the recorded kernels, in the order of the current stream."""
        if self._graph is None:
            raise RuntimeError("there is nothing to replay yet; call record first")
        self._graph.replay()

    @contextlib.contextmanager
    def _default_kept(self) -> Iterator[None]:
        before = self._default.graphsafe_get_state()
        try:
            yield
        finally:
            self._default.graphsafe_set_state(before)


class GraphedMicroBatches:
    """Runs micro-batches of one shape, that of the first one.

    Args:
        module: maps ``tokens``, ``labels``, ``loss_mask`` and, where there are, ``position_ids`` to the total loss, an
            fp32 scalar, and its :class:`megatron.model.loss.LossSums`.
        model: the part of it that seeds layers. It is in training mode whenever :meth:`run` is called.
        device: of both.
        samples: of what goes into the layers, which every micro-batch fills.
    """

    def __init__(self, module: nn.Module, model: GPTModel, device: torch.device, samples: LayerSamples) -> None:
        self._module, self._model, self._device, self._samples = module, model, device, samples
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._times = 2 if model.checkpoint_activations else 1  # that a layer runs
        self._begun: set[int] = set()  # layers that have run in this micro-batch
        self._recorder = CudaRecorder(device, generators=1 + self._times * len(model.layers))
        self._inputs: dict[str, torch.Tensor] = {}
        self._loss_gradient = torch.empty((), device=device)
        self._runs = 0
        # what a run makes
        self._gradients: list[torch.Tensor | None] = []
        self._losses = self._counts = torch.empty(0)
        self._lengths: list[int] = []  # of the pieces of _counts
        self._sampled: dict[nn.Module, Sample] = {}

    def accepts(self, batch: Mapping[str, Any]) -> bool:
        """Whether a micro-batch is of the shape and kind of the first one. Others are for the caller, and so are all
        with ``cu_seqlens``, whose shape follows from the data."""
        if "cu_seqlens" in batch:
            return False
        return all(batch[name].shape == x.shape and batch[name].dtype == x.dtype for name, x in self._inputs.items())

    def run(self, batch: Mapping[str, Any], seed: int, count: int) -> LossSums:
        """Compute a micro-batch's losses, and the gradients of its loss / ``count``, into each parameter's ``grad``.

        Whatever was in ``grad`` is forgotten. Hooks that wait for a gradient are called when all are there.

        Args:
            batch: int64 ``tokens`` and ``labels``, fp32 ``loss_mask`` and, where documents restart positions, int64
                ``position_ids``, [B, S], of any device.
            seed: of all that is random in it.
            count: micro-batches of the update.

        Returns:
            What the module gives beside the total loss.
        """
        if not self._inputs:
            names = ("tokens", "labels", "loss_mask", "position_ids")
            self._inputs = {name: torch.empty_like(batch[name], device=self._device) for name in names if name in batch}
        for name, x in self._inputs.items():
            x.copy_(batch[name], non_blocking=True)
        self._loss_gradient.fill_(1.0 / count)
        layer_seeds = [layer_seed(seed, layer) for layer in range(len(self._model.layers))]
        self._recorder.seed([seed, *layer_seeds * self._times])
        if self._runs < WARM_UP:
            self._recorder.run(self._step)
        else:
            if self._runs == WARM_UP:
                self._forget()
                self._recorder.record(self._step)
            self._recorder.replay()
        self._runs += 1
        self._samples.kept.update(self._sampled)
        self._hand_over()
        *counts, dropped = self._counts.clone().split(self._lengths)
        return LossSums(self._losses.clone(), counts, dropped)

    def _step(self) -> None:
        """Forward and backward pass, as they are recorded."""
        self._forget()
        seed_layer, self._model.seed_layer = self._model.seed_layer, self._begin_layer
        self._begun.clear()
        try:
            self._recorder.draw_from(0)
            with self._samples.copied():
                # not the module itself: DeepSpeed has hung its timers on it
                total, sums = self._module.forward(self._inputs)
                with _hooks_aside(self._parameters):
                    total.backward(self._loss_gradient)
        finally:
            self._model.seed_layer = seed_layer
        self._sampled = dict(self._samples.kept)
        self._gradients.extend(parameter.grad for parameter in self._parameters)
        pieces = [*sums.counts, sums.dropped]
        self._losses, self._counts, self._lengths = sums.losses, torch.cat(pieces), [x.numel() for x in pieces]

    def _forget(self) -> None:
        self._gradients.clear()
        for parameter in self._parameters:
            parameter.grad = None

    def _begin_layer(self, seed: int, layer: int) -> None:
        self._recorder.draw_from(1 + layer + (len(self._model.layers) if layer in self._begun else 0))
        self._begun.add(layer)

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Let everybody else find the gradients where they look for them."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
            if gradient is not None:
                for hook in tuple(_hooks(parameter).values()):
                    hook(parameter)


def _hooks(parameter: nn.Parameter) -> dict[int, Callable[[torch.Tensor], None]]:
    """What ``register_post_accumulate_grad_hook`` has registered."""
    return parameter._post_accumulate_grad_hooks or {}


@contextlib.contextmanager
def _hooks_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, no hook is called when a gradient is there: Python does not run again when a graph is replayed."""
    aside = [(_hooks(parameter), dict(_hooks(parameter))) for parameter in parameters]
    for hooks, _ in aside:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in aside:
            hooks.update(kept)
