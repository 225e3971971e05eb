"""One launch for each way of spreading a run, shared by the tests that look at its results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from tests.distributed.launch import run_all
from tests.test_unmerged import trained

LORA = {"lora": {"r": 4, "target_modules": ["c_attn", "c_fc"]}, "model": {"critic": "adapter"}}
SHARED = {"function": [], "model": "{unmerged}", "dtype": "auto", "on_policy_base": True}
SAVED = {"total_steps": 2, "save_every": 1}
ON_BASE = {
    **{**LORA, "reward": {**SHARED, "partial_every": 5, "batch_size": 2}},
    **{"ppo": {"num_minibatches": 1}, "run": SAVED},
}
SUM = {"function": ["tests.conftest:share_of_o", "tests.conftest:mean_code"], "weights": [1.0, 0.01]}
LONGER = {"total_steps": 3, "save_every": 2}
CHECKPOINTED = {**LORA, "model": {"critic": "adapter", "gradient_checkpointing": True}, "run": SAVED}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"run": SAVED},
    "longer": {"run": LONGER},
    "uneven": {
        **{"rollout": {"batch_size": 7}, "ppo": {"num_minibatches": 1}, "reward": {"partial_every": 5, **SUM}},
        "run": SAVED,
    },
    # Fewer samples than ranks, in training and in evaluation.
    "few": {
        **{"rollout": {"batch_size": 2}, "ppo": {"num_minibatches": 1}, "reward": {"partial_every": 2, **SUM}},
        "run": {"total_steps": 2, "eval_samples": 1},
    },
    "in_step": {"rollout": {"gather_parameters": "never"}, "run": SAVED},
    # Without any of the fast paths, beside one process with all of them.
    "plain": {"run": {**SAVED, "fast_kernels": False}, "rollout": {"logprobs": "recomputed"}},
    "separate": {"model": {"critic": "separate"}, "run": SAVED},
    "classifier": {"reward": {"function": [], "model": "{classifier}", "label": "1"}, "run": SAVED},
    "lora": {**LORA, "run": SAVED},
    # The reward on the policy's base: ranks have shares of different sizes, and each pass is a collective of ZeRO-3.
    "shared_base": {**ON_BASE, "rollout": {"batch_size": 7}},
    "shared_base_in_step": {**ON_BASE, "rollout": {"batch_size": 7, "gather_parameters": "never"}},
    # Groups of three, of which a rank's share and a minibatch hold parts.
    "grpo": {
        **{"rollout": {"batch_size": 3, "samples_per_prompt": 3}},
        "ppo": {
            **{"advantage": "grpo", "num_minibatches": 1, "policy_loss": "gspo", "loss_reduction": "sequence"},
            **{"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 1.0},
        },
        # Where a group scores alike, rounding alone would decide on which side of 0 its advantages are.
        **{"reward": {"function": "tests.conftest:mean_code"}, "run": SAVED},
    },
    "lora_portable": {**LORA, "run": SAVED},
    "checkpointed": CHECKPOINTED,
    "stopped": {"ppo": {"target_kl_stop": 2e-5}, "run": SAVED},
    # Goes on from the checkpoint of one process.
    "from_one": {"run": SAVED},
    "from_one_lora": {**LORA, "run": SAVED},
}
# On the last rank the worker makes something not finite in each of steps 1 to 3, or sends SIGTERM in a phase of step 2.
POISONED = {"run": {"total_steps": 4, "eval_samples": 0}}
PHASES = ("rollout", "score", "update", "saving")
RUNS["no_room"] = {"run": {**SAVED, "keep_checkpoints": 0}}
RUNS["poisoned"] = POISONED
RUNS |= {f"stopped_in_{phase}": {"run": LONGER} for phase in PHASES}
# These round to 8 bits, differently in each batch: they only have to run and to stay close. Llama's layers are
# nn.Linear, which DeepSpeed treats in a way of its own under autocast.
BF16_BASE = {**LORA, "model": {"critic": "adapter", "dtype": "bf16"}, "run": {"total_steps": 2}}
ROUNDED: dict[str, dict[str, dict[str, Any]]] = {
    "bf16_base": BF16_BASE,
    "bf16_base_in_step": {
        **BF16_BASE,
        "rollout": {"gather_parameters": "never"},
        "run": {"total_steps": 1, "eval_samples": 0},
    },
    "autocast": {"model": {"name_or_path": "{llama}"}, "run": {"total_steps": 2, "precision": "bf16"}},
}
RUNS |= ROUNDED
RUNS["buffers"] = {"model": {"name_or_path": "{gemma4}"}, "run": {"total_steps": 1, "eval_samples": 0}}
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
BOTH = ("full", "uneven", "grpo", "lora", "checkpointed", "stopped", "poisoned", "gradient", "autocast")
LAUNCHES: dict[tuple[str | None, int], list[str]] = {
    (None, 1): [*BOTH, "longer", "few", "separate", "classifier", "bf16_base", "shared_base"],
    ("ddp", 2): [*BOTH, "plain", "from_one", "shared_base", *(f"stopped_in_{phase}" for phase in PHASES)],
    ("cpu", 3): ["uneven", "few"],
    ("zero1", 2): ["full", "poisoned"],
    ("zero2", 2): [*BOTH, "from_one_lora", "no_room", "bf16_base", "shared_base"],
    ("zero3", 2): [
        *BOTH,
        *("few", "in_step", "plain", "separate", "classifier", "bf16_base", "bf16_base_in_step"),
        *("lora_portable", "from_one", "stopped_in_update", "buffers", "shared_base", "shared_base_in_step"),
    ],
    ("zero3_offload", 2): ["full"],
}
# Runs that are resumed from their checkpoint, in a folder of their own; with DeepSpeed some checkpoints are portable.
RESUMED: dict[tuple[str | None, int], list[str]] = {
    (None, 1): ["full", "lora", "grpo"],
    ("ddp", 2): ["full"],
    ("zero2", 2): ["full", "lora", "grpo"],
    ("zero3", 2): ["full", "lora", "lora_portable", "shared_base"],
    ("zero3_offload", 2): ["full"],
}
PORTABLE = {(config, name) for config in ("zero2", "zero3", "zero3_offload") for name in ("full", "lora_portable")}


def tree(gpt2: Path, prompts: Path, *changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The config of a tiny run whose responses end early at very different lengths, with all samples logged."""
    config: dict[str, dict[str, Any]] = {
        "run": {
            **{"total_steps": 2, "eval_samples": 5, "eval_every": 3, "trackers": [], "report": False},
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
    """The tiny GPT-2, with one layer of its two: under ZeRO-3 a run takes time by its layers. Llama keeps two."""

    def make() -> None:
        shutil.copytree(gpt2_folder, shared / "gpt2")
        model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
        model.transformer.h = model.transformer.h[:1]
        model.config.n_layer = 1
        model.save_pretrained(shared / "gpt2")

    return once(shared / "gpt2", make)


@pytest.fixture(scope="session")
def prompts_file(prompts_file: Path, shared: Path) -> Path:
    folder = shared / "prompts"
    return once(folder, lambda: shutil.copytree(prompts_file.parent, folder)) / prompts_file.name


@pytest.fixture(scope="session")
def unmerged_folder(gpt2_folder: Path, shared: Path) -> Path:
    """An unmerged reward model over the tiny GPT-2."""
    torch.set_float32_matmul_precision("highest")
    return once(shared / "unmerged", lambda: trained(gpt2_folder, shared / "unmerged"))


@pytest.fixture(scope="session")
def launched_runs(
    gpt2_folder: Path,
    unmerged_folder: Path,
    llama_folder: Path,
    gemma4_folder: Path,
    classifier_folder: Path,
    prompts_file: Path,
    shared: Path,
) -> Callable[[str | None, int], Path]:
    """A function that gives the folder of a launch's results, launching at the first call."""

    def runs_of(name: str, config: str | None, processes: int, folder: Path) -> list[dict[str, Any]]:
        if name != "gradient":
            own = {"checkpoint": "portable"} if (config, name) in PORTABLE else {}

            def run(**changes: object) -> dict[str, Any]:
                given = {**RUNS[name].get("run", {}), **own, **changes}
                return {"config": tree(gpt2_folder, prompts_file, RUNS[name], {"run": given})}

            place = folder / name
            runs = [run(output_dir=str(place))]
            kind, _, what = name.partition("_")
            if kind == "from":
                saved = launched(None, 1) / name.replace("from_one_lora", "lora").replace("from_one", "full")
                runs = [run(output_dir=str(place), resume=str(saved / "checkpoints" / "step-000001"))]
            if name == "no_room":
                runs[0]["no_room"] = True
            if name == "poisoned":
                runs[0]["poison"] = True
            if what.startswith("in_") and kind == "stopped":
                runs[0]["stop"] = what.removeprefix("in_")
                runs.append(run(output_dir=str(place), resume="latest"))
            if name in RESUMED.get((config, processes), ()):
                resume = str(place / "checkpoints" / "step-000001")
                runs.append(run(output_dir=str(folder / f"{name}_resumed"), resume=resume))
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
            text = json.dumps(
                [run for name in LAUNCHES[config, processes] for run in runs_of(name, config, processes, folder)]
            )
            folders = {"llama": llama_folder, "gemma4": gemma4_folder, "classifier": classifier_folder}
            folders["unmerged"] = unmerged_folder
            for name, model in folders.items():
                text = text.replace(f"{{{name}}}", str(model))
            run_all(json.loads(text), folder, config, processes)

        return once(folder, launch)

    return launched
