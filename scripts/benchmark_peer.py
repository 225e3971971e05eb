"""PPO steps of trl 1.12.0, one for each line on standard input; `scripts/benchmark.py --against trl` starts it.

Runs in an environment of its own, without this package but for its process settings. Its argument is a workload in
JSON; each step's seconds and the peak memory come as JSON lines on standard output. trl is used as its example
`examples/scripts/ppo/ppo.py` uses it: a critic of the policy's size, a frozen copy as the reference (none with LoRA).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Flat(nn.Module):
    """A reward model that costs nothing: 1 for every token."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = self.score = self._pass

    def _pass(self, hidden: Tensor | None = None, input_ids: Tensor | None = None, **_: Any) -> Any:
        if hidden is not None:
            return hidden
        assert input_ids is not None
        return type("Output", (), {"hidden_states": (torch.ones(*input_ids.shape, 1, device=input_ids.device),)})


class Pace(TrainerCallback):
    """Waits for a line before each step, and says what the step took."""

    def __init__(self, say: Any) -> None:
        self.say = say
        self.began = self.sampled = self.scored = 0.0

    def wait(self) -> None:
        self.say({"ready": True})
        if not sys.stdin.readline().strip():
            os._exit(0)  # told to stop: there is nothing to save
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.say(
            {
                "sampling": self.sampled - self.began,
                "scoring": self.scored - self.sampled,
                "update": now - self.scored,
                "total": now - self.began,
                "peak_memory_mib": peak_memory_mib(),
            }
        )
        self.wait()

    def note(self, what: str, function: Any) -> Any:
        """The function, after each call of which the time is noted as the end of `what`."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            setattr(self, what, time.perf_counter())
            return result

        return noted


def peak_memory_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return ours("memory").peak_resident_mib()


@functools.cache
def ours(name: str) -> Any:
    """A file of rlhf_accel/system that imports nothing else of the package: the same settings and the same measure."""
    file = Path(__file__).parents[1] / "rlhf_accel" / "system" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the figures

    def say(figures: dict[str, Any]) -> None:
        out.write(json.dumps(figures) + "\n")

    work = json.loads(sys.argv[1])
    if work["precision"] == "bf16":
        # As `accelerate launch --mixed_precision bf16` does; PPOConfig's bf16 alone does nothing.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if work["tuned"]:
        ours("process").tune_process()
    if torch.cuda.is_available():  # TF32 on both sides, or on none
        torch.set_float32_matmul_precision(work["matmul_precision"])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(work["path"], padding_side="left")
    dtype = torch.bfloat16 if work["base_dtype"] == "bf16" else torch.float32
    policy = AutoModelForCausalLM.from_pretrained(work["path"], dtype=dtype)
    value = AutoModelForSequenceClassification.from_pretrained(work["path"], dtype=dtype, num_labels=1)
    lora = None
    if work["lora_r"]:
        lora = LoraConfig(r=work["lora_r"], lora_alpha=work["lora_alpha"], task_type="CAUSAL_LM")
    reference = None if lora else AutoModelForCausalLM.from_pretrained(work["path"], dtype=dtype)
    pace = Pace(say)
    ppo_trainer.batch_generation = pace.note("sampled", ppo_trainer.batch_generation)
    ppo_trainer.masked_whiten = pace.note("scored", ppo_trainer.masked_whiten)  # of the advantages, the last thing
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=work["micro"],
            gradient_accumulation_steps=work["batch"] // work["micro"],
            num_mini_batches=1,
            num_ppo_epochs=work["epochs"],
            response_length=work["response"],
            local_rollout_forward_batch_size=64,
            total_episodes=10_000 * work["batch"],
            temperature=1.0,
            learning_rate=work["lr"],
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=work["precision"] == "bf16",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=Flat(),
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": work["prompts"]}),
            eval_dataset=Dataset.from_dict({"input_ids": work["prompts"][: work["batch"]]}),
            peft_config=lora,
            callbacks=[pace],
        )
        trainer.train()


if __name__ == "__main__":
    main()
