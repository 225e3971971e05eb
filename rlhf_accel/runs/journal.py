"""Metrics and samples of a run, to metrics.jsonl, samples.jsonl and the console; for the main process only.

Values are reduced over ranks before they come here. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_accel.runs.json_lines import JsonLines
from rlhf_accel.runs.progress_line import ProgressLine


class Journal:
    """Metrics and samples of a run, written to its folder and to the console by the main process."""

    def __init__(self, folder: Path, line: ProgressLine) -> None:
        self.folder = folder
        self.line = line
        self._files = {name: JsonLines(folder / f"{name}.jsonl") for name in ("metrics", "samples")}

    def record(self, metrics: Mapping[str, float]) -> None:
        self.line.show(metrics)
        self._write("metrics", metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._write("samples", {"step": step, **row})
        self.line.table(f"samples of step {step}", rows)

    def flush(self) -> None:
        """Write all rows to disk. Raises `OSError` if that fails."""
        for file in self._files.values():
            file.flush()

    def rewind(self, step: int, *, recorded: bool = True) -> None:
        """Drop the rows after `step`, which a resumed run writes again; unless `recorded`, also its metrics."""
        self._files["metrics"].rewind(step if recorded else step - 1)
        self._files["samples"].rewind(step)

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        """Write a row. One that the disk does not take is kept; it goes to disk before the next checkpoint."""
        try:
            self._files[name].write(row)
        except OSError as error:
            self.line.say(f"warning: {self._files[name].path} could not be written ({error.strerror}); rows are kept")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the results of a finished run."""
        if summary.get("samples"):
            self.line.table("held-out prompts, before and after", summary["samples"])
        if "gain" in summary:
            base, trained = summary["base"], summary["trained"]
            self.line.say(
                f"held-out score {base['score']:+.3f} (std {base['score_std']:.3f}) before, {trained['score']:+.3f} "
                f"after: a gain of {summary['gain']:.2f} standard deviations at a KL of {trained['kl']:.2f} nats"
            )
        for key in summary.get("trained", ()):
            kind, _, reward = key.partition("/")
            if kind in ("score", "gold") and reward and key in summary["base"]:
                before, after = summary["base"][key], summary["trained"][key]
                note = ", not trained on" if kind == "gold" else ""
                self.line.say(f"{reward}{note}: {before:+.3f} before, {after:+.3f} after")
        self.line.say(f"{summary['steps']} steps in {summary['seconds']:.0f} s; the model: {self.folder / 'final'}")
