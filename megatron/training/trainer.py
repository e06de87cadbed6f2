"""The training loop."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint import AsyncSaver, CheckpointError, CheckpointStatus, ContactLost, save
from megatron.checkpoint.folder import step_name
from megatron.config import RunConfig
from megatron.config.spans import merge, nth_outside
from megatron.data.gpt_dataset import Datasets, batches
from megatron.data.skipping import SkippingSamples
from megatron.data.tokenizer import Tokenizer
from megatron.engine.engine import Engine, LateNumber, StepResult
from megatron.parallel.initialize import Topology
from megatron.parallel.watchdog import Watchdog
from megatron.planning.flops import model_flops_per_token, peak_tflops
from megatron.training.clock import Clock, global_batch_size, last_samples, total_samples
from megatron.training.confirmation import Confirmation
from megatron.training.ending import record_end
from megatron.training.evaluation import evaluate
from megatron.training.metrics import StepWindow, mean_loss
from megatron.training.profiling import profiled
from megatron.training.report import Report
from megatron.training.resume import clock_from, describe, restore
from megatron.training.signals import StopRequest
from megatron.training.spikes import Detours, Spike, SpikeWatch, Update
from megatron.training.start import find_checkpoint_before, find_origin


class TrainingDiverged(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class Trainer:
    """Trains from where ``clock`` stands to the end of the run, or until it is asked to stop."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        engine: Engine,
        tokenizer: Tokenizer,
        datasets: Datasets,
        clock: Clock,
        report: Report,
        stop: StopRequest,
        watchdog: Watchdog,
        vocab_size: int,
        detours: Detours,
        resumed_from: tuple[Path, dict[str, Any]] | None = None,
        carried: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.topology, self.engine, self.clock, self.report = config, topology, engine, clock, report
        self._stop, self._tokenizer, self._vocab_size = stop, tokenizer, vocab_size
        self._watchdog = watchdog
        self._train_data, self._valid_data, self._test_data = datasets.train, datasets.valid, datasets.test
        self._data_state = datasets.state
        self._total = total_samples(config.training, config.model.seq_length, clock.samples)
        self._saver = AsyncSaver(topology.control_group) if config.checkpoint.async_save else None
        self._detours, self._spikes, self._spike = detours, SpikeWatch(config.guard), None
        self._first_step, self._carried = clock.steps, carried or {}
        origin = None
        if resumed_from is not None:
            origin = find_origin(resumed_from[0], topology)
            if self._same_blend(resumed_from[1]):  # the losses of other data are no measure
                self._spikes.load_state(resumed_from[1].get("spikes"))
        saving = config.checkpoint
        self._checkpoints = Confirmation(saving.save, saving.keep_last, topology.is_first, origin)
        self._save_due = False
        self._saving: Path | None = None  # what is being saved
        self._not_saved: CheckpointError | None = None  # why the last save failed
        self._skipped_in_a_row = 0
        self._unwatched: tuple[StepResult, Update, LateNumber] | None = None  # with its loss
        self._window = StepWindow(
            model_flops_per_token(config.model, config.moe, vocab_size),
            config.logging.peak_tflops or peak_tflops(_device_name(topology), config.optimizer.precision),
            topology.launch.world_size,
        )

    def run(self) -> None:
        """Train. Returns after the last update, or after a checkpoint when asked to stop early.

        A failed save, for instance on a full disk, is logged, and training continues.

        Raises:
            CheckpointError: the last save failed, or there was nothing good to save.
            TrainingDiverged: too many updates in a row were skipped.
        """
        reason = self._loop()
        self._checkpoints.wait()
        if self._not_saved:
            raise self._not_saved
        if self.topology.is_first:
            record_end(self.config, self.clock, reason)

    def _loop(self) -> str:
        limit, seq = self.config.checkpoint.exit_tokens, self.config.model.seq_length
        data, end = self._training_data(), self._end()
        batch = self.config.training.global_batch_size
        reason = self._stop.agreed() if self.clock.samples < end else None
        while self.clock.samples < end and reason is None:
            self._watchdog.begin(self.clock.steps + 1, f"update {self.clock.steps + 1}")
            size = global_batch_size(self.config.training, self.clock.samples)
            now = self.clock.samples + size
            with self._profile():
                result = self.engine.train_step(self._next(data, self._share(size)), now * seq)
            validate = self.clock.crosses(now, self.config.training.eval_interval, batch)
            keep = self.clock.crosses(now, self.config.checkpoint.save_interval, batch)
            first_try, self._save_due = not self._save_due, self._save_due or keep
            loss = mean_loss(result.sums)
            update = Update(self.clock.steps + 1, self.clock.samples, now)
            self.clock.samples = now
            self.clock.steps += 1
            self._watch()  # the update before this one: the device is busy with this one
            self._unwatched = result, update, loss
            self._compare_replicas()
            done = now >= end
            log = done or self.clock.steps % self.config.logging.log_interval == 0
            if log or validate or self._save_due:
                self._watch()
            if self._spike is not None and self._go_back():
                data, end = self._training_data(), self._end()
                continue
            if log:
                self._log("train", **self._window.take())
            if validate or now >= self._total:
                with self._watchdog.paused():
                    self._evaluate("valid", self._valid_data)
                    if now >= self._total:
                        self._evaluate("test", self._test_data)
            reason = None if done else self._stop.agreed()
            if self._saver and not self._saver.busy:
                self._end_of_saving()
            if self._save_due or done or reason:
                self._watch()
                if self._spike is None or not self._go_back():  # which saves
                    with self._watchdog.paused():
                        self._save_if_good(first_try, at_the_end=bool(done or reason))
        if reason is None:
            reason = "all tokens are trained on" if self.clock.samples >= self._total else f"--exit-tokens {limit}"
        self._log("stop", reason=reason)
        return reason

    def _end(self) -> int:
        """The samples after which training ends."""
        return last_samples(self.config, self.clock.samples)

    @contextlib.contextmanager
    def _profile(self) -> Iterator[None]:
        """Profiles the update that ``--profile`` asks for, on the first rank."""
        logging, number = self.config.logging, self.clock.steps - self._first_step + 1
        if logging.profile is None or number != logging.profile_step:
            yield
            return
        title, first = f"update {self.clock.steps + 1}", self.topology.is_first
        with (
            self._watchdog.paused(),
            profiled(Path(logging.profile), title, self.topology.device) if first else contextlib.nullcontext(),
        ):
            yield

    def _next(self, data: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        micro_batches = list(itertools.islice(data, count))
        if len(micro_batches) < count:
            raise RuntimeError(
                f"the data ended after {self.clock.samples} samples, before the {self._total} of the run"
            )
        return micro_batches

    def _share(self, size: int) -> int:
        """Micro-batches of this rank in a global batch of ``size`` sequences."""
        return size // (self.config.training.micro_batch_size * self.topology.data_parallel_size)

    def _training_data(self) -> Iterator[dict[str, Any]]:
        self._train_data = self._train_data.extended(nth_outside(self._detours.skipped, self._total - 1) + 1)
        dataset = SkippingSamples(self._train_data, self._detours.skipped, self._total)
        return self._micro_batches(dataset, self.clock.samples, self.config.data.num_workers)

    def _micro_batches(self, dataset: Any, consumed_samples: int, workers: int) -> Iterator[dict[str, Any]]:
        config = dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, num_workers=workers))
        rank, size = self.topology.data_parallel_rank, self.topology.data_parallel_size
        return iter(batches(dataset, config, rank, size, consumed_samples, self._tokenizer.eod))

    def _watch(self) -> None:
        """Take in what the last update was, unless that has happened; waits for the device to be through with it."""
        if self._unwatched is None:
            return
        (result, update, loss), self._unwatched = self._unwatched, None
        self._window.add(result, (update.after - update.before) * self.config.model.seq_length)
        value = float(loss)
        finite, outlier = math.isfinite(value), self._spikes.is_outlier(value)
        if not result.scale_fell:
            self._spike = self._spikes.add(update, value) or self._spike
        self.clock.skipped += result.skipped
        if result.scale_fell and not outlier:
            return  # says nothing of the weights
        finite = finite and (result.scale_fell or not result.skipped)
        self._checkpoints.judge(finite, outlier)
        if self._saving is None:
            self._checkpoints.settle()
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        most = self.config.training.max_skipped_updates
        if self._skipped_in_a_row > most:
            self._end_of_saving()
            raise TrainingDiverged(
                f"{self._skipped_in_a_row} updates in a row had a loss or gradient that is not finite "
                f"(--max-skipped-updates {most}), at {self.clock.tokens} tokens. {self._advice()}"
            )

    def _advice(self) -> str:
        good, what = self._checkpoints.last_good, "a lower --lr or a longer --lr-warmup-tokens"
        if good is None:
            return f"No checkpoint is known to be good. Start anew, in another --save, with {what}"
        return f"Last good checkpoint: {good}. Resume from it with {what}, or look at the data of these steps"

    def _go_back(self) -> bool:
        """Go on from a checkpoint before the spike without its data. False: there is none, or no more."""
        spike, self._spike = self._spike, None
        with self._watchdog.paused():
            self._end_of_saving()
            self._checkpoints.wait()
            found, why_not = None, f"--spike-restarts {self.config.guard.spike_restarts} are used up"
            if self._detours.restarts < self.config.guard.spike_restarts:
                found = find_checkpoint_before(self.config, spike.first, self.topology)
                why_not = f"there is no checkpoint from before update {spike.first.number}"
                if found is not None and not self._same_blend(found[1]):
                    found, why_not = None, f"the blend has changed since {found[0].name}"
            self._tell_spike(spike, found, why_not)
            if found is None:
                return False
            source, meta = found
            restore(self.engine, source, meta, self.topology)
            self._detours.skipped = merge([*self._detours.skipped, self._detours.span_of(spike)])
            self._detours.restarts += 1
            self.clock = clock_from(meta)
            self._spikes.load_state(meta.get("spikes"))
            self._skipped_in_a_row, self._unwatched = 0, None
            self._checkpoints.goes_back(source)
            self._total = total_samples(self.config.training, self.config.model.seq_length, self.clock.samples)
            self._save(CheckpointStatus.CONFIRMED)  # the checkpoint to go on from is now one that knows of the detour
            self._window.clear()
        return True

    def _same_blend(self, meta: dict[str, Any]) -> bool:
        """Whether a checkpoint of this run is from after the last change of its blend."""
        return meta.get("data", {}).get("position", 0) == self._data_state.position

    def _tell_spike(self, spike: Spike, found: tuple[Path, dict[str, Any]] | None, why_not: str) -> None:
        seq = self.config.model.seq_length
        first, end = self._detours.span_of(spike)
        reason = (
            f"{self.config.guard.spike_updates} losses in a row above {spike.limit:.4g}, up to {spike.loss:.4g}; the "
            f"median was {spike.median:.4g}"
        )
        resumed = None
        if found is None:
            reason += f". Training goes on: {why_not}"
        else:
            clock = clock_from(found[1])
            resumed = clock.tokens
            reason += (
                f". Going back to {found[0].name}, {clock.tokens} tokens, without samples {first}-{end} of the data "
                f"({(end - first) * seq} tokens); restart {self._detours.restarts + 1} of "
                f"{self.config.guard.spike_restarts}"
            )
        self._log("spike", reason=reason, resumed_at_tokens=resumed, samples=[first, end])

    def _compare_replicas(self) -> None:
        every = self.config.training.check_replicas
        if every and self.clock.steps % every == 0:
            self.engine.check_replicas()

    def _evaluate(self, kind: str, sets: Mapping[str, Any]) -> None:
        """Log the loss of each set; that of --split or a blend, which bears the name of its kind, without a name."""
        start = time.perf_counter()
        share = self.config.training.eval_iters * self._share(self.config.training.global_batch_size)
        for name, data in sets.items():
            record = evaluate(self.engine, itertools.islice(self._micro_batches(data, 0, 0), share))
            self._log(kind, **({} if name == kind else {"set": name}), **record)
        self._window.pause(time.perf_counter() - start)

    def _save_if_good(self, first_try: bool, at_the_end: bool) -> None:
        """Save after a good update; at an interval, what follows another one waits for the next that is."""
        checkpoints = self._checkpoints
        if checkpoints.good or (at_the_end and checkpoints.finite):
            self._save(checkpoints.stands(at_the_end), in_background=not at_the_end)
        elif self.config.checkpoint.save is not None and (at_the_end or first_try):
            why = "whose loss is far above the usual" if checkpoints.finite else "with a loss or gradient not finite"
            problem = f"the checkpoint of step {self.clock.steps} would follow an update {why}"
            if at_the_end:
                self._end_of_saving()
                self._not_saved = CheckpointError(f"{problem}, and was not saved. {self._advice()}")
            self._log("not_saved", reason=problem if at_the_end else f"{problem}; saving waits for a good one")

    def _save(self, stands: CheckpointStatus, in_background: bool = False) -> None:
        folder, self._save_due = self.config.checkpoint.save, False
        if folder is None:
            return
        start = time.perf_counter()
        world_size = self.topology.launch.world_size
        meta = describe(
            self.config, self.clock, self._detours, self._spikes, self._vocab_size, self._tokenizer,
            self.engine.scalar_state(), world_size, self._data_state,
        )  # fmt: skip
        meta |= self._carried
        self._end_of_saving()
        self._checkpoints.wait()
        background = self._saver if in_background else None
        self._saving = Path(folder) / step_name(self.clock.steps)
        if stands is not CheckpointStatus.CONFIRMED:
            self._checkpoints.begins(self._saving, stands)
        with self._told_if_not_saved():
            written = (background.save if background else save)(
                folder,
                self.clock.steps,
                self.engine.saved_tensors(),
                meta,
                group=self.topology.control_group,
                status=stands,
            )
            if not background:
                self._saving, self._not_saved = None, None
                if stands.good:
                    self._checkpoints.delete_older()
            seconds = time.perf_counter() - start
            in_background = background is not None
            self._log("save", folder=str(written), seconds=seconds, background=in_background, standing=stands.value)
        self._window.pause(time.perf_counter() - start)

    def _end_of_saving(self) -> None:
        """Wait for what is being saved in the background, and take note of how that ended."""
        if self._saver is None or self._saving is None:
            return
        with self._told_if_not_saved():
            self._saver.wait()
            self._saving, self._not_saved = None, None
            self._checkpoints.settle()

    @contextlib.contextmanager
    def _told_if_not_saved(self) -> Iterator[None]:
        try:
            yield
        except ContactLost:
            raise
        except CheckpointError as error:  # the same on all ranks, which go on together
            self._checkpoints.failed(self._saving)
            self._saving, self._not_saved = None, error
            self._log("not_saved", reason=str(error))

    def _log(self, kind: str, **values: Any) -> None:
        train_tokens = self._total * self.config.model.seq_length
        self.report.write(kind, step=self.clock.steps, tokens=self.clock.tokens, train_tokens=train_tokens, **values)


def _device_name(topology: Topology) -> str:
    if topology.device.type != "cuda":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(topology.device)
