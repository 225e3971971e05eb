"""The doctor's memory plan beside measured peaks: python scripts/check_plan.py [--cases full-zero2-1 lora-zero3-2 ...]

Two PPO steps of SmolLM2-135M in fp32 for each case, full fine-tuning and LoRA on all linear layers, as one and two CPU
processes under ZeRO-2 and ZeRO-3 over gloo (needs `rlhf_accel[quickstart,deepspeed]`); some minutes each. Measured is
perf/peak_memory_mib of the last step, the largest of all ranks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_accel.commands import memory_plan as plan
from rlhf_accel.commands.checks.data_checks import check_data
from rlhf_accel.commands.checks.findings import Findings
from rlhf_accel.commands.model_sizes import measure
from rlhf_accel.config.loading import parse, to_yaml
from rlhf_accel.config.schema import Config

REPOSITORY = Path(__file__).parent.parent
CASES = [f"{kind}-{launch}" for kind in ("full", "lora") for launch in ("zero2-1", "zero2-2", "zero3-1", "zero3-2")]
TREE: dict[str, dict[str, Any]] = {
    "run": {"total_steps": 2, "eval_samples": 0, "sample_every": 0, "save_every": 0, "trackers": []},
    "model": {"name_or_path": "wheel:SmolLM2-135M-Instruct"},
    "data": {"prompt_tokens": [8, 8]},
    # All responses as long as they may be, which is what the plan counts with.
    "rollout": {"batch_size": 16, "max_prompt_tokens": 8, "max_new_tokens": 24, "min_new_tokens": 24},
    "reward": {"function": "check_plan:brevity"},
    "ppo": {"ppo_epochs": 1, "micro_batch_tokens": 512},
}


def brevity(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """A reward that takes no memory."""
    return [-len(response) / 100 for response in responses]


def config_of(kind: str, folder: Path) -> Config:
    lora = {"r": 16, "target_modules": ["all-linear"]} if kind == "lora" else {}
    return parse(Config, {**TREE, "lora": lora, "run": {**TREE["run"], "output_dir": str(folder)}})


def measured(config: Config, stage: str, processes: str, work: Path) -> float:
    """MiB at the peak of a real run."""
    (work / "config.yaml").write_text(to_yaml(config))
    paths = [str(REPOSITORY), str(REPOSITORY / "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(paths)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{stage}.yaml"]
    command += ["--num_processes", processes, "scripts/train.py", "--config", str(work / "config.yaml")]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert config.run.output_dir is not None
    rows = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(rows[-1])["perf/peak_memory_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    print("| case | planned MiB | measured MiB | planned / measured |\n| --- | --- | --- | --- |")
    base = None
    for case in parser.parse_args().cases:
        kind, stage, processes = case.split("-")
        with tempfile.TemporaryDirectory() as work:
            config = config_of(kind, Path(work) / "run")
            policy, now = check_data(Findings(lambda _: None), config)
            assert policy is not None
            base = base or now  # of the first case, before anything else takes memory here
            launch = plan.Launch(processes=int(processes), zero_stage=int(stage[-1]))
            planned = plan.plan(config, measure(config, policy), launch, base=base).peak / plan.MIB
            peak = measured(config, stage, processes, Path(work))
        print(f"| {case} | {planned:,.0f} | {peak:,.0f} | {planned / peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
