"""One launch for each way of spreading a run, shared by the tests that look at its results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.distributed.launch import run_all

LORA = {"lora": {"r": 4, "target_modules": ["c_attn", "c_fc"]}, "model": {"critic": "adapter"}}
CHECKPOINTED = {**LORA, "model": {"critic": "adapter", "gradient_checkpointing": True}, "run": {"total_steps": 2}}
SAVED = {"total_steps": 3, "save_every": 2}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "uneven": {"rollout": {"batch_size": 7}, "ppo": {"num_minibatches": 1}, "reward": {"partial_every": 5}},
    # Fewer samples than ranks, in training and in evaluation.
    "few": {
        **{"rollout": {"batch_size": 2}, "ppo": {"num_minibatches": 1}, "reward": {"partial_every": 2}},
        "run": {"total_steps": 2, "eval_samples": 1},
    },
    "in_step": {"rollout": {"gather_parameters": "never"}},
    # Without any of the fast paths, beside one process with all of them.
    "plain": {"run": {"fast_kernels": False}, "rollout": {"logprobs": "recomputed"}},
    "separate": {"model": {"critic": "separate"}, "run": {"total_steps": 2}},
    "classifier": {"reward": {"function": [], "model": "{classifier}", "label": "1"}, "run": {"total_steps": 2}},
    "lora": LORA,
    "checkpointed": CHECKPOINTED,
    "stopped": {"ppo": {"target_kl_stop": 2e-5}, "run": {"total_steps": 3}},
    "saved": {"run": SAVED},
    "saved_lora": {**LORA, "run": SAVED},
    "saved_portable": {"run": {**SAVED, "checkpoint": "portable"}},
    "saved_lora_portable": {**LORA, "run": {**SAVED, "checkpoint": "portable"}},
    # Goes on from the checkpoint of one process.
    "from_one": {"run": SAVED},
    "from_one_lora": {**LORA, "run": SAVED},
}
# The worker makes these not finite, once, on the last rank; and sends SIGTERM there in these phases of step 2.
POISONS = ("gradient", "reward", "logits")
PHASES = ("rollout", "score", "update", "saving")
RUNS["no_room"] = {"run": {**SAVED, "save_every": 1, "keep_checkpoints": 0}}
RUNS |= {f"poisoned_{what}": {"run": {"total_steps": 2}} for what in POISONS}
RUNS |= {f"stopped_in_{phase}": {"run": SAVED} for phase in PHASES}
# These round to 8 bits, differently in each batch: they only have to run and to stay close. Llama's layers are
# nn.Linear, which DeepSpeed treats in a way of its own under autocast.
BF16_BASE = {**LORA, "model": {"critic": "adapter", "dtype": "bf16"}, "run": {"total_steps": 2}}
ROUNDED: dict[str, dict[str, dict[str, Any]]] = {
    "bf16_base": BF16_BASE,
    "bf16_base_in_step": {**BF16_BASE, "rollout": {"gather_parameters": "never"}},
    "autocast": {"model": {"name_or_path": "{llama}"}, "run": {"total_steps": 2, "precision": "bf16"}},
}
RUNS |= ROUNDED
BUDGETS = (36, 90, 100_000)  # of micro-batches; the smallest holds one sample
# Seven responses of 1 to 30 tokens: micro-batches of every size, and a rank with one row less.
GRADIENT: dict[str, dict[str, Any]] = {
    "run": {"eval_samples": 0},
    "rollout": {"batch_size": 7, "max_new_tokens": 30, "stop": ["e"]},
    "reward": {"weights": [300.0]},
    "ppo": {"num_minibatches": 1, "entropy_coef": 0.01, "whiten_advantages": False},
    "optim": {"max_grad_norm": None},
}
# What each launch runs; None is one process.
POISONED = [f"poisoned_{what}" for what in POISONS]
BOTH = ("full", "uneven", "lora", "checkpointed", "stopped", *POISONED, "gradient", "autocast")
LAUNCHES: dict[tuple[str | None, int], list[str]] = {
    (None, 1): [*BOTH, "few", "separate", "classifier", "bf16_base", "saved", "saved_lora"],
    ("ddp", 2): [*BOTH, "plain", "saved", "from_one", *(f"stopped_in_{phase}" for phase in PHASES)],
    ("cpu", 3): ["uneven", "few"],
    ("zero1", 2): ["full", "poisoned_gradient"],
    ("zero2", 2): [*BOTH, "saved_lora", "saved_portable", "from_one_lora", "no_room", "bf16_base"],
    ("zero3", 2): [
        *BOTH,
        *("few", "in_step", "plain", "separate", "classifier", "saved_lora", "bf16_base", "bf16_base_in_step"),
        *("saved_portable", "saved_lora_portable", "from_one", "stopped_in_update"),
    ],
    ("zero3_offload", 2): ["full", "saved_portable"],
}


def tree(gpt2: Path, prompts: Path, *changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The config of a tiny run whose responses end early at very different lengths, with all samples logged."""
    config: dict[str, dict[str, Any]] = {
        "run": {
            **{"total_steps": 4, "eval_samples": 5, "eval_every": 3, "trackers": [], "report": False},
            **{"sample_every": 1, "sample_count": 8, "precision": "fp32"},
        },
        "model": {"name_or_path": str(gpt2), "critic": "head", "dtype": "fp32"},
        "data": {"source": str(prompts), "prompt_tokens": [2, 6]},
        "rollout": {"batch_size": 8, "max_prompt_tokens": 6, "max_new_tokens": 12, "stop": ["e", "a"]},
        "reward": {"function": "tests.conftest:share_of_o", "dtype": "fp32"},
        "ppo": {"ppo_epochs": 2, "num_minibatches": 2, "micro_batch_tokens": 48},
        # With the usual eps AdamW walks at full speed on gradients that are 0 but for rounding, as those of key biases.
        "optim": {"lr": 1e-3, "eps": 1e-5},
    }
    for sections in changes:
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values}
    return config


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of pytest-xdist: a launch is made by the first that needs it."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def once(folder: Path, make: Callable[[], object]) -> Path:
    """The folder, which `make` fills unless it, or another process, has done so. A failure is not tried again."""
    with FileLock(f"{folder}.lock"):
        done, failed = folder.with_suffix(".done"), folder.with_suffix(".failed")
        if failed.exists():
            pytest.fail(f"an earlier test made this launch, and it failed: {failed.read_text(encoding='utf-8')}")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                make()
            except BaseException as error:
                failed.write_text(str(error)[-2000:], encoding="utf-8")
                raise
            done.touch()
    return folder


# Checkpoints name the files they were trained on, so these too are the same for all processes.
@pytest.fixture(scope="session")
def gpt2_folder(gpt2_folder: Path, shared: Path) -> Path:
    return once(shared / "gpt2", lambda: shutil.copytree(gpt2_folder, shared / "gpt2"))


@pytest.fixture(scope="session")
def prompts_file(prompts_file: Path, shared: Path) -> Path:
    folder = shared / "prompts"
    return once(folder, lambda: shutil.copytree(prompts_file.parent, folder)) / prompts_file.name


@pytest.fixture(scope="session")
def launched_runs(
    gpt2_folder: Path, llama_folder: Path, classifier_folder: Path, prompts_file: Path, shared: Path
) -> Callable[[str | None, int], Path]:
    """A function that gives the folder of a launch's results, launching at the first call."""

    def runs_of(name: str, folder: Path) -> list[dict[str, Any]]:
        if name != "gradient":
            out = {"run": {"output_dir": str(folder / name)}}
            if name.startswith("from_one"):
                resume = launched(None, 1) / name.replace("from_one", "saved") / "checkpoints" / "step-000002"
                out["run"]["resume"] = str(resume)
            kind, _, what = name.partition("_")
            runs: list[dict[str, Any]] = [{"config": tree(gpt2_folder, prompts_file, RUNS[name], out)}]
            if name == "no_room":
                runs[0]["no_room"] = True
            if kind == "poisoned":
                runs[0]["poison"] = what
            if what.startswith("in_") and kind == "stopped":
                runs[0]["stop"] = what.removeprefix("in_")
                out["run"]["resume"] = "latest"
                runs.append({"config": tree(gpt2_folder, prompts_file, RUNS[name], out)})
            if kind == "saved":  # and on from its checkpoint, in a folder of its own
                resume = str(folder / name / "checkpoints" / "step-000002")
                out = {"run": {"output_dir": str(folder / f"{name}_resumed"), "resume": resume}}
                runs.append({"config": tree(gpt2_folder, prompts_file, RUNS[name], out)})
            return runs
        changes = [
            {"ppo": {"micro_batch_tokens": budget}, "run": {"output_dir": str(folder / f"{budget}")}}
            for budget in BUDGETS
        ]
        return [
            {
                "config": tree(gpt2_folder, prompts_file, GRADIENT, change),
                "gradient": str(folder / f"{change['ppo']['micro_batch_tokens']}.pt"),
            }
            for change in changes
        ]

    def launched(config: str | None, processes: int) -> Path:
        folder = shared / f"{config}{processes}"

        def launch() -> None:
            text = json.dumps([run for name in LAUNCHES[config, processes] for run in runs_of(name, folder)])
            text = text.replace("{llama}", str(llama_folder)).replace("{classifier}", str(classifier_folder))
            run_all(json.loads(text), folder, config, processes)

        return once(folder, launch)

    return launched
