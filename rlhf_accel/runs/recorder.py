"""The recorder of a run, which writes to its folder and to the console, also when the disk fails.

All ranks call each public method, and the main process writes. Knows files and the runtime. Knows no step of PPO.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_accel.algorithm.batches import Experience
from rlhf_accel.config.keys import flatten
from rlhf_accel.config.schema import Config
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.distributed.liveness import Heartbeat
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.distributed.weights import each_once
from rlhf_accel.models.calls import logits_of
from rlhf_accel.models.probes import fp32_products
from rlhf_accel.runs import checkpoint, exports, hub, run_folder
from rlhf_accel.runs.cards import model_card
from rlhf_accel.runs.checkpoint import Progress, SaveError
from rlhf_accel.runs.dumps import Dump, write_dump
from rlhf_accel.runs.exports import ExportError, ExportProbe
from rlhf_accel.runs.journal import Journal
from rlhf_accel.runs.progress_line import ProgressLine
from rlhf_accel.runs.run_folder import Claim
from rlhf_accel.runs.summary import write_environment, write_summary
from rlhf_accel.system.arithmetic import product_arithmetic
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.files import failure
from rlhf_accel.system.lock import NEWER_RUN, Lock
from rlhf_accel.system.provenance import environment
from rlhf_accel.system.terminal import counted

_RETRY = 60.0  # seconds before final/ is written again, in which its user may free disk space


class Recorder:
    """Writes the folder of a run: metrics, samples, checkpoints, models, dumps, and the log of each process."""

    def __init__(self, config: Config, folder: Path, runtime: Runtime, line: ProgressLine, given: Config) -> None:
        """`given` is the config as the user wrote it. Trackers and adapters get its paths, not the absolute ones."""
        self.config = config
        self._given = given
        self.folder = folder
        self.runtime = runtime
        self.line = line
        self.journal = Journal(folder, line)
        self._claim = Claim(lock=None, state=())
        self._lock: Lock | None = None
        self.products = fp32_products(runtime.device)
        # Gloo raises an error at the time limit; NCCL aborts the process.
        by_nccl = runtime.world_size > 1 and runtime.device.type == "cuda"
        self.heartbeat = Heartbeat(limit=config.run.collective_timeout if by_nccl else math.inf)
        self.is_open = False
        self.left_out: str | None = None  # a message about parts of the policy's checkpoint that were not loaded
        self._failed = 0  # in a row
        self._saved: Progress | None = None  # by the last checkpoint in this folder
        self._started = time.perf_counter()

    def claim(self) -> None:
        """Claim the folder before anything in it is read; main process only.

        Raises `ConfigError` if another run holds it.
        """
        self._claim = run_folder.claim_folder(self.folder, self.config, self.line.say)

    def open(self, progress: Progress, place: Path | None) -> None:
        """Make the folder, or resume in it from the checkpoint at `place`. Raises `ConfigError` if that fails."""
        ours = place is not None and place.parent.parent == self.folder
        self.folder = self.runtime.from_main(lambda: self._open_files(progress, place if ours else None))
        self.is_open = True
        self._saved = progress if ours else None
        self.heartbeat.open(self.folder / "logs" / f"rank-{self.runtime.rank}.log")
        settings = flatten(asdict(self._given))
        logged = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
        # Metrics of a step whose evaluation was still due at the checkpoint were not logged before it.
        next_step = progress.step + (progress.unrecorded is None)
        first_step = next_step if self.config.run.resume is not None else None
        self.runtime.trackers.start(self.config.run, logged, self.folder, first_step)

    def _open_files(self, progress: Progress, place: Path | None) -> Path:
        chosen = self.folder
        self.folder, self._lock = run_folder.make_folder(chosen, self.config, self._claim, self.line.say)
        if self.folder != chosen:
            self.line.say(f"{chosen} was taken by another run since; the run folder is {self.folder}")
            self.journal = Journal(self.folder, self.line)
        self._write_environment()
        if self.config.run.resume is None:
            return self.folder
        try:
            if place is not None:  # first: `latest` must not name a step whose rows are removed
                checkpoint.rewind_to(place)
            self.journal.rewind(progress.step, recorded=progress.unrecorded is None)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"run.output_dir={self.folder} cannot be resumed: {error}", key="run.output_dir"
            ) from error
        return self.folder

    def _write_environment(self) -> None:
        error = self.products.difference
        products = {
            "arithmetic": product_arithmetic(error),
            "relative_error": error,
            "matmul_precision": self.config.run.matmul_precision,
        }
        facts = {**environment(self.runtime.world_size, self.runtime.device), "fp32_products": products}
        problem = failure(lambda: write_environment(self.folder, facts))
        if problem is not None:
            self.line.say(f"warning: {self.folder / 'environment.json'} could not be written ({problem})")

    def _check_lock(self) -> None:
        """Raises `RunFailed` on every rank if another run has taken over the folder, since this process seemed dead."""
        holder = self.runtime.from_main(lambda: self._lock.lost_to() if self._lock is not None else None)
        if holder is not None:
            still = "this process did not renew its lock for a while (a machine or a disk that stood still)"
            why = "" if holder == NEWER_RUN else f", for {still}"
            raise RunFailed(f"{self.folder} was taken over by {holder}{why}; this run ends and writes nothing more")

    def record(self, metrics: Mapping[str, float]) -> None:
        """Write metrics to all sinks; failures are printed. Raises `RunFailed` if another run holds the folder."""
        self._check_lock()
        tracked = {key: value for key, value in metrics.items() if key != "step"}
        self._warn(self.runtime.trackers.log(tracked, int(metrics["step"])))
        if self.runtime.is_main:
            self.journal.record(metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write samples to all sinks that take tables."""
        self._warn(self.runtime.trackers.log_table("samples", rows, step))
        if self.runtime.is_main:
            self.journal.samples(step, rows)

    def save(self, progress: Progress) -> bool:
        """Write a checkpoint, and return whether it was written.

        After a failure the run continues with a warning, until run.max_failed_saves have failed in a row: `RunFailed`.
        """
        if self._saved == progress:
            return True
        self._check_lock()
        self.heartbeat(f"saving after step {progress.step}")
        try:
            self._all_or_none(self.journal.flush)
            checkpoint.save_checkpoint(
                self.folder, replace(progress, seconds=self.seconds(progress)), self.runtime, self.config
            )
        except SaveError as error:
            self._failed += 1
            most = self.config.run.max_failed_saves
            message = f"the checkpoint of step {progress.step} could not be written: {error}"
            if self._failed >= most:
                raise RunFailed(
                    f"{message}; run.max_failed_saves={most} have failed in a row; free disk space, then: "
                    f"{self.how_to_resume()}"
                ) from error
            more = counted(most - self._failed, "more such failure ends", "more such failures end")
            self.line.say(f"warning: {message}; {more} the run; {self.how_to_resume()}")
            return False
        self._failed, self._saved = 0, progress
        keep = self.config.run.keep_checkpoints
        problem = failure(lambda: checkpoint.prune(self.folder, progress.step, keep)) if self.runtime.is_main else None
        if problem is not None:
            self.line.say(f"warning: an old checkpoint could not be removed: {problem}")
        return True

    def export(self, name: str, results: Mapping[str, Any], tokens: Tokens, probe: ExportProbe) -> None:
        """Write the policy as NAME/ in the run's folder, in a form that other libraries load.

        Raises on every rank: `SaveError` if it cannot be written, `ExportError` if the probe finds that it differs from
        the policy in memory. An earlier export then stays.
        """
        self._check_lock()
        self.heartbeat(f"writing {name}/")
        weights = self.runtime.trainable_weights(with_frozen=self.config.lora.r == 0)
        module, arithmetic = self.runtime.plain_module, self.products.message.partition(";")[0]
        card = model_card(self.config, results, checkpoint.versions(), arithmetic, self.left_out)
        memory = None
        if self.runtime.from_main(lambda: probe.loads):  # on all ranks: ZeRO-3 computes it together
            memory = logits_of(module.policy, probe.ids.to(self.runtime.device))
        given = self._given.model.name_or_path
        base = given if given != self.config.model.name_or_path else None
        faults: list[str | None] = []

        def fault(folder: Path) -> str | None:
            return probe.fault(folder, module.policy, memory, weights, f"{name}/")

        self._all_or_none(
            lambda: faults.append(exports.export(self.folder / name, module, weights, tokens, card, fault, base))
        )
        found = self.runtime.first_failure(faults[0] if faults else None)
        if found is not None:
            raise ExportError(f"{found}; {self.folder / name} is as it was before")
        if probe.skipped is not None:
            self.line.say(f"warning: {name}/ was not loaded again to compare its logits: {probe.skipped}")

    def finish(self, summary: Mapping[str, Any], tokens: Tokens, probe: ExportProbe) -> None:
        """Write final/ and, last of all, the summary; if the disk is full, try again for some minutes.

        Raises `RunFailed` if all tries fail.
        """
        self._insist(lambda: self.export("final", summary, tokens, probe), "final/")

        def write() -> None:
            self.journal.flush()
            write_summary(self.folder, summary)

        self._insist(lambda: self._all_or_none(write), "summary.json")
        self._warn(self.runtime.trackers.end())
        self.runtime.close()  # no collective call after this
        if self.runtime.is_main:
            self.journal.finish(summary)
            hub.push_final(self.config, self.folder, self.line.say)

    def dump(self, facts: Mapping[str, Any], experience: Experience | None) -> Path:
        """Write a dump of a failure to dumps/, with the weights if there is an experience; a write error is printed."""
        place = self.folder / "dumps" / f"step-{facts['step']:06d}"
        batches = () if experience is None else (experience, experience.sequences)
        tensors = {field.name: getattr(batch, field.name) for batch in batches for field in fields(batch)}
        dump = Dump(
            config=self.config,
            facts=dict(facts),
            experience={name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)},
            weights={} if experience is None else each_once(self.runtime.trainable_weights()),
        )
        problem = failure(lambda: write_dump(place, dump)) if self.runtime.is_main else None
        if problem is not None:
            self.line.say(f"warning: {place} could not be written ({problem})")
        return place

    def close(self) -> None:
        """Close the log, the trackers and the lock, also after a failure; each process for itself."""
        self.heartbeat.close()
        self._warn(self.runtime.trackers.end())
        for lock in (self._lock, self._claim.lock):
            if lock is not None:
                lock.release()

    def how_to_resume(self) -> str:
        """How to resume, for the message of a run that stops."""
        place = checkpoint.newest(self.folder)
        if place is not None:
            return f"the last checkpoint is {place}, resume with --run.output_dir {self.folder} --run.resume latest"
        if self.is_open and self.config.run.resume not in (None, "latest", "auto"):
            return f"no checkpoint was written, resume with --run.resume {self.config.run.resume} and another folder"
        if self.is_open:
            return f"no checkpoint was written, --run.output_dir {self.folder} --run.resume auto starts again"
        return "nothing was written"

    def seconds(self, progress: Progress) -> float:
        """Seconds of training so far, over all starts of the run."""
        return progress.seconds + time.perf_counter() - self._started

    def _warn(self, problems: Sequence[str]) -> None:
        """Print problems of trackers, which do not stop a run."""
        for problem in problems:
            self.line.say(f"warning: run.trackers: {problem}; printed once; all metrics are in {self.folder}/*.jsonl")

    def _all_or_none(self, write: Callable[[], None]) -> None:
        """Write on the main process; raises `SaveError` on every rank if that fails."""
        problem = self.runtime.from_main(lambda: failure(write))
        if problem is not None:
            raise SaveError(problem)

    def _insist(self, write: Callable[[], None], what: str) -> None:
        """Try to write up to run.max_failed_saves times. Raises `RunFailed` if all tries fail."""
        most = self.config.run.max_failed_saves
        for attempt in range(1, most + 1):
            try:
                return write()
            except SaveError as error:
                message = f"{what} could not be written: {error}"
            if attempt < most:
                self.line.say(f"warning: {message}; trying again in {_RETRY:.0f} s ({attempt} of {most})")
                time.sleep(_RETRY)
        raise RunFailed(f"{message}; {self.how_to_resume()}")
