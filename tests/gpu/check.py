"""All that a CPU cannot show, in one call: python -m tests.gpu.check FOLDER [--tiny] [--parts NAME ...]

Writes `gpu_check.json` and `gpu_check.md` to the folder after each part, so that what was found is kept whatever stops
the call. `--tiny` takes models of two layers, by which the check itself is tested on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from rlhf_accel.system.process import quiet_libraries
from tests.gpu.bench import Bench, Skipped, quiet
from tests.gpu.parts import PARTS


def main(arguments: Sequence[str] | None = None) -> int:
    """The number of parts that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=540.0, help="no part starts later (default: 540)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    start, found = time.monotonic(), {"machine": machine()}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(work=Path(work), tiny=options.tiny)
        for name in options.parts:
            late = time.monotonic() - start > options.seconds
            found[name] = {"status": "skipped", "why": "no time was left"} if late else outcome(name, bench)
            (options.folder / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (options.folder / "gpu_check.md").write_text(table(found), encoding="utf-8")
            print(line(name, found[name]), flush=True)
    return sum(part.get("status") == "failed" for part in found.values())


def outcome(name: str, bench: Bench) -> dict[str, Any]:
    """Status, seconds, and the figures of a part, or why there are none."""
    start = time.monotonic()
    try:
        with quiet():
            figures = PARTS[name](bench)
        found = {"status": "passed", "figures": figures}
    except Skipped as missing:
        found = {"status": "skipped", "why": str(missing)}
    except Exception as error:  # whatever a part meets, the others are still of use
        traceback.print_exc()
        found = {"status": "failed", "why": f"{type(error).__name__}: {error}"[:800]}
    gc.collect()  # a trainer refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if cuda else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }


def table(found: dict[str, Any]) -> str:
    about = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    rows = [line(name, part) for name, part in found.items() if name != "machine"]
    return "\n".join([about, "", "| part | status | seconds | found |", "| --- | --- | --- | --- |", *rows]) + "\n"


def line(name: str, part: dict[str, Any]) -> str:
    figures = part.get("figures", {})
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()]
    text = part.get("why") or ", ".join(shown)
    return f"| {name} | {part['status']} | {part.get('seconds', 0)} | {' '.join(text.split())} |"


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
