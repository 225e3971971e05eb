"""What the device check runs, and the kinds of what it counts: data for the process that runs it and for its tests."""

from __future__ import annotations

from typing import Any

# Kinds of what is counted. The first three may hold the host up, the others are left to the device.
READ, FROM_DEVICE, TO_DEVICE = "read", "copy from the device", "copy to the device"
FROM_LATER, TO_LATER = "copy from the device, later", "copy to the device, pinned"
WAITING = (READ, FROM_DEVICE, TO_DEVICE)

TOLERANCE = 2e-5  # between a CPU's kernels and those that the device's autocast and attention choose
TOKENS = 6
LORA = {"r": 4, "alpha": 8.0}
SAVED = {"total_steps": 1, "save_every": 1}
CLASSIFIER = {"function": [], "model": "classifier", "label": "POSITIVE"}
AUTO = {"precision": "auto", "fast_kernels": True}

Sections = dict[str, dict[str, Any]]

# fp32: the figures of each have to be those of the plain CPU.
SAME: dict[str, Sections] = {
    "full": {"run": SAVED, "ppo": {"ppo_epochs": 2}},
    "full, every option": {
        "model": {"critic": "separate", "gradient_checkpointing": True},
        "rollout": {
            **{"stop": [".", "e", "<|endoftext|>"], "max_new_tokens": 12, "min_new_tokens": 2, "forward_batch_size": 6},
            **{"top_k": 50, "top_p": 0.95, "temperature": 0.7, "logprobs": "recomputed"},
        },
        "ppo": {"entropy_coef": 0.01, "target_kl_stop": 5.0, "kl_target": 1.0},
        "reward": {"gold": ["tests.device.rewards:length"], "timeout": 20.0},
        "run": {"total_steps": 1, "eval_samples": 2},
    },
    "lora, adapter": {
        "model": {"name_or_path": "llama", "critic": "adapter", "gradient_checkpointing": True},
        "lora": {**LORA, "dropout": 0.1},
        "run": SAVED,
    },
    "lora, separate, classifier": {
        "model": {"name_or_path": "llama", "critic": "separate"},
        "lora": LORA,
        "reward": {**CLASSIFIER, "dtype": "fp32", "calibrate": True, "calibrate_samples": 8, "partial_every": 4},
        "run": {"total_steps": 1},
    },
    "dora, head": {
        "model": {"name_or_path": "llama"},
        "lora": {**LORA, "use_dora": True, "modules_to_save": ["lm_head"]},
        "run": {"total_steps": 1},
    },
}
# In half precision or with rounding of their own: they have to run, and to pass the checks of step 1.
ROUNDED: dict[str, tuple[Sections, float]] = {
    "auto, low logits": (
        {
            "run": {**AUTO, "total_steps": 1},
            "model": {"name_or_path": "low", "dtype": "auto"},
            "rollout": {"batch_size": 16, "logprobs": "auto"},
        },
        2**-20,
    ),
    "auto, dora": (
        {
            "run": {**AUTO, "total_steps": 1},
            "model": {"name_or_path": "llama", "dtype": "auto"},
            "lora": {**LORA, "use_dora": True},
            "rollout": {"logprobs": "auto", "max_new_tokens": 12},
        },
        2**-27,
    ),
    "auto, lora, classifier": (
        {
            "run": {**AUTO, "total_steps": 1},
            "model": {"name_or_path": "llama", "dtype": "auto", "critic": "adapter"},
            "lora": LORA,
            "rollout": {"logprobs": "auto"},
            "reward": CLASSIFIER,
        },
        0.0,
    ),
}
