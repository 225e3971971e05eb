"""The long form of tests/test_families.py under ZeRO-3: each family samples, trains a step and is exported; the probes
of the run compare what it computes and what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import families
from tests.conftest import make_tokenizer
from tests.distributed.conftest import tree
from tests.distributed.launch import run_all

LAUNCHES = 8  # of two processes
# Their layers read the weight of another one, mostly that of a convolution, which ZeRO-3 has not gathered then.
REFUSED = (
    *("gemma3n_text", "jetmoe", "mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h", "bamba", "jamba"),
    *("granitemoehybrid", "zamba2", "qwen3_next", "qwen3_5_text", "olmo_hybrid"),
)


@pytest.mark.long
@pytest.mark.parametrize("share", range(LAUNCHES))
def test_families_train_under_zero3(
    share: int, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        monkeypatch.setitem(families.SIZES, name, len(tokenizer))
    runs = []
    for name, changes in list(families.FAMILIES.items())[share::LAUNCHES]:
        folder = families.save_tiny(tmp_path / name.replace(" ", "-"), name.partition(" ")[0], **changes)
        tokenizer.save_pretrained(folder)
        run = {"output_dir": f"{folder}-run", "total_steps": 1, "eval_samples": 0, "sample_every": 0}
        runs.append({"config": tree(folder, prompts_file, {"run": run})})
        if name in REFUSED:
            runs[-1]["refused"] = "or launch with ZeRO-2 or ddp"
    run_all(runs, tmp_path / "launch", "zero3", 2)
    for run in runs:
        folder = Path(run["config"]["run"]["output_dir"])
        assert (folder / "final").is_dir() == folder.exists() == ("refused" not in run), folder
