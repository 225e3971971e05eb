"""Models, configs, and runs of the GPU check, in two sizes: one for a GPU, and a tiny one by which the check itself is
tested on a CPU."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config
from rlhf_accel.training.ppo_trainer import PPOTrainer
from scripts import benchmark

ROOT = Path(__file__).parents[2]
Sections = dict[str, dict[str, Any]]
SMALL = {"gpt2": ("gpt2", 2, 64, 300), "llama": ("llama", 2, 64, 300)}  # layers, width, vocabulary
LARGE = {"gpt2": ("gpt2", 12, 768, 50257), "llama": ("llama", 22, 2048, 32000)}


class Skipped(Exception):
    """What a part needs is not here; the message says what."""


@dataclass(kw_only=True)
class Bench:
    """Where the check works, and at which size. Models are made once."""

    work: Path
    tiny: bool
    _made: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def model(self, kind: str, *, small: bool = False) -> str:
        shape = SMALL[kind] if small or self.tiny else LARGE[kind]
        if shape not in self._made:
            folder = self.work / f"{kind}-{shape[2]}"
            folder.mkdir(parents=True)
            made = benchmark.Workload(about="", batch=1, response=1, micro=1, shape=shape)
            self._made[shape] = _sharpened(benchmark.build_model(made, folder))
        return self._made[shape]

    def config(self, folder: str, *, small: bool = False, kind: str = "gpt2", **sections: dict[str, Any]) -> Config:
        little = small or self.tiny
        prompts = self.work / "prompts.jsonl"
        words = [" ".join(f"w{10 + (7 * row + 3 * place) % 200}" for place in range(12)) for row in range(256)]
        prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in words), encoding="utf-8")
        tree: Sections = {
            "run": {
                **{"output_dir": str(self.work / folder), "total_steps": 2, "eval_samples": 0, "trackers": []},
                "report": False,
            },
            "model": {"name_or_path": self.model(kind, small=small)},
            "data": {"source": str(prompts), "prompt_tokens": [2, 8]},
            "rollout": {
                "batch_size": 8 if little else 64,
                "max_prompt_tokens": 8,
                "max_new_tokens": 8 if little else 64,
            },
            "reward": {"function": "tests.gpu.bench:evenness"},
            "ppo": {"ppo_epochs": 1, "num_minibatches": 2, "micro_batch_tokens": 128 if little else 2048},
            "optim": {"lr": 1e-4},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        return parse(Config, tree)

    def trainer(self, folder: str, **settings: Any) -> PPOTrainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        return PPOTrainer(self.config(folder, **settings))


def _sharpened(folder: str) -> str:
    """A random model's states, made larger: as it is, all its tokens are about as likely, and nothing rounds much."""
    place = Path(folder) / "model.safetensors"
    weights = load_file(place)
    last = next(name for name in ("transformer.ln_f.weight", "model.norm.weight") if name in weights)
    save_file(weights | {last: 8 * weights[last]}, place, metadata={"format": "pt"})
    return folder


def evenness(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """The share of even words."""
    rows = [[word for word in response.split() if word[1:].isdigit()] for response in responses]
    return [sum(int(word[1:]) % 2 == 0 for word in row) / max(len(row), 1) for row in rows]


def steps(trainer: PPOTrainer, count: int) -> list[dict[str, float]]:
    """The metrics of so many steps."""
    size = trainer.config.rollout.batch_size
    return [trainer.step(trainer.setup.prompts.batch(number, size)) for number in range(1, count + 1)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def launched_for(device: str) -> Iterator[None]:
    """As `accelerate launch` leaves the environment for a CPU, or for whatever is here."""
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()
    try:
        yield
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
        if before is not None:
            os.environ["ACCELERATE_USE_CPU"] = before


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise Skipped("needs a GPU")
