"""Small runs on the pretended device, beside the same runs on the plain CPU: `python -m tests.device.runs ORDER.json`.

ORDER.json names the folders of models and data, a working folder, and the JSON file for what was found. It is a process
of its own, see `pretend.py`.
"""

from __future__ import annotations

from tests.device import pretend  # before torch

# isort: split
import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_accel import __main__ as command_line
from rlhf_accel.algorithm import ppo
from rlhf_accel.config.loading import parse
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.schema import Config
from rlhf_accel.rollout import drawing, sampling
from rlhf_accel.training import feedback_trainer
from rlhf_accel.training.ppo_trainer import PPOTrainer
from rlhf_accel.training.reward_trainer import train_reward
from tests.conftest import TEXTS
from tests.device import counting
from tests.device.plans import ROUNDED, SAME, SAVED, TOKENS, Sections


class Bench:
    """Makes configs from the folders of an order, and trains on the CPU or on the device."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.folders: dict[str, str] = order["folders"]
        self.work = Path(order["work"])
        self.folders["low"] = str(self._with_low_logits())

    def _with_low_logits(self) -> Path:
        """The GPT-2 with logits of about -100, as those of the real one are, where bf16 rounds them to halves."""
        tied = AutoModelForCausalLM.from_pretrained(self.folders["gpt2"])
        tied.config.tie_word_embeddings = False
        model = type(tied)(tied.config)
        model.load_state_dict(tied.state_dict())
        with torch.no_grad():
            model.lm_head.weight[:, 0] -= 10
            model.transformer.ln_f.bias[0] += 10
        folder = self.work / "low"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.folders["gpt2"]).save_pretrained(folder)
        return folder

    def config(self, folder: str, **sections: dict[str, Any]) -> Config:
        tree: Sections = {
            "run": {
                **{"output_dir": str(self.work / folder), "total_steps": 2, "eval_samples": 0, "trackers": []},
                **{"report": False, "precision": "fp32", "fast_kernels": False, "checkpoint": "portable"},
            },
            "model": {"name_or_path": "gpt2", "dtype": "fp32"},
            "data": {"source": self.folders["prompts"], "prompt_tokens": [2, 6]},
            "rollout": {"batch_size": 8, "max_prompt_tokens": 6, "max_new_tokens": TOKENS, "logprobs": "sampled"},
            "reward": {"function": "tests.conftest:share_of_o"},
            "ppo": {"ppo_epochs": 1, "num_minibatches": 2, "micro_batch_tokens": 64},
            "optim": {"lr": 1e-3, "schedule": "constant"},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        for section, key in (("model", "name_or_path"), ("reward", "model")):
            name = tree[section].get(key)
            tree[section] |= {key: self.folders[name]} if name in self.folders else {}
        return parse(Config, tree)

    def trained(self, folder: str, **sections: dict[str, Any]) -> PPOTrainer:
        with _fresh_process():
            trainer = PPOTrainer(self.config(folder, **sections))
            trainer.fit()
        return trainer

    def metrics(self, folder: str) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in (self.work / folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


@contextlib.contextmanager
def _fresh_process() -> Iterator[None]:
    """Without the settings that Accelerate keeps for a process, and quiet unless something is raised."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            yield
        except BaseException:
            sys.stderr.write(output.getvalue())
            raise


def same(bench: Bench, name: str) -> dict[str, Any]:
    """The largest difference between the metrics of a run on the device and on the CPU, as a share, and its name.

    A run that saves is stopped and resumed on the device, and goes through on the CPU.
    """
    sections, on_cpu = SAME[name], f"{name} cpu"
    resumed = {"total_steps": 2, "resume": "latest", "changes": ["run.total_steps"]}
    saves = sections["run"] == SAVED
    bench.trained(on_cpu, **{**sections, "run": {"total_steps": 2} if saves else sections["run"]})
    with pretend.Device():
        trainer = bench.trained(name, **sections)
        assert trainer.runtime.device.type == "cuda"
        assert all(p.device.type == "cuda" for p in trainer.runtime.plain_module.parameters())
        if saves:
            bench.trained(name, **{**sections, "run": resumed})
    rows = list(zip(bench.metrics(on_cpu), bench.metrics(name), strict=True))
    shared = [(a[key], b[key], key) for a, b in rows for key in a.keys() & b.keys() if isinstance(a[key], float)]
    difference, metric = max((abs(a - b) / (1 + abs(a)), key) for a, b, key in shared)
    return {"difference": difference, "metric": metric, "steps": len(rows), "figures": len(shared)}


def rounded(bench: Bench, name: str) -> dict[str, Any]:
    sections, noise = ROUNDED[name]
    with pretend.Device(noise=noise):
        bench.trained(name, **sections)
    first = bench.metrics(name)[0]
    return {key: first[key] for key in ("objective/kl_k3", "policy/first_ratio_error", "policy/ratio_max")}


def commands(bench: Bench) -> dict[str, Any]:
    """Each command on the device, of the run with an adapter; what it raised, or None."""
    run, dumped = str(bench.work / "lora, adapter"), "dumped"
    with pretend.Device(), contextlib.suppress(RuntimeError):
        reward = {"function": "tests.device.rewards:nan_after_the_first_calls"}
        bench.trained(dumped, reward=reward, run={"total_steps": 2, "eval_samples": 0, "max_skipped_steps": 1})
    dump = str(next((bench.work / dumped / "dumps").iterdir()))
    lines = {
        "generate": ["generate", run, "The film", "--compare", "--score", "--trust_code", "--max_new_tokens", "4"],
        "evaluate": ["evaluate", run, "--which", "final", "--prompts", "2", "--trust_code"],
        "merge": ["merge", run, str(bench.work / "merged")],
        "replay": ["replay", dump, "--trust_code"],
    }
    return {name: _raised(lambda line=line: command_line.main(line)) for name, line in lines.items()}


def _raised(work: Callable[[], Any]) -> str | None:
    with pretend.Device():
        try:
            with _fresh_process():
                work()
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
    return None


def reward_training(bench: Bench) -> dict[str, str]:
    """The device of a reward model in its training, as launched for a GPU and for the CPU of a machine with one."""
    rows = [{"text": f"{text} ({i})", "rating": float(i % 5)} for i, text in enumerate(TEXTS * 5)]
    source = bench.work / "ratings.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: Sections = {
        "run": {"precision": "fp32", "eval_every": 0},
        "model": {"name_or_path": bench.folders["classifier"]},
        "data": {"source": str(source), "max_tokens": 16},
        "optim": {"lr": 1e-3, "epochs": 1, "batch_size": 64},
    }
    found, seen = {}, []
    step = feedback_trainer.FeedbackTrainer.training_step

    def noted(trainer: Any, model: Any, *rest: Any) -> Any:
        seen.append(model.device.type)
        return step(trainer, model, *rest)

    for launched, variable in (("gpu", "false"), ("cpu", "true")):
        tree["run"]["output_dir"] = str(bench.work / f"reward {launched}")
        seen.clear()
        with (
            pretend.Device(),
            _fresh_process(),
            mock.patch.dict(os.environ, ACCELERATE_USE_CPU=variable),
            mock.patch.object(feedback_trainer.FeedbackTrainer, "training_step", noted),
        ):
            train_reward(parse(RewardTrainingConfig, tree))
        found[launched] = " ".join(sorted(set(seen)))
    return found


def planted(bench: Bench) -> dict[str, str | None]:
    """What the device says of bugs planted in the package, which a plain CPU does not mind."""
    bugs: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
        "a factory without a device": (
            *(ppo, "masked_sum"),
            lambda f: lambda x, mask: f(x * torch.ones(x.shape[-1]), mask),
        ),
        "numpy of a tensor": (drawing, "pick", lambda f: lambda p, u: (p.numpy(), f(p, u))[1]),
        "a gradient on the CPU": (ppo, "weighted_sum", lambda f: lambda x, *more: f(_GradOnCPU.apply(x), *more)),
        "two devices joined": (
            *(sampling, "position_ids"),
            lambda f: lambda mask, first: torch.cat([f(mask, first)[:, :0], f(mask.cpu(), first)], 1),
        ),
    }
    settings = {"run": {"total_steps": 1, "eval_samples": 0}}
    with contextlib.ExitStack() as all_of_them:
        for bug in bugs.values():
            all_of_them.enter_context(_changed(*bug))
        bench.trained("planted cpu", **settings)
    found = {}
    for number, (name, bug) in enumerate(bugs.items()):
        with _changed(*bug):
            found[name] = _raised(lambda n=number: bench.trained(f"planted {n}", **settings))
    return found


class _GradOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.cpu()


@contextlib.contextmanager
def _changed(module: Any, attribute: str, change: Callable[[Any], Any]) -> Iterator[None]:
    whole = getattr(module, attribute)
    setattr(module, attribute, change(whole))
    try:
        yield
    finally:
        setattr(module, attribute, whole)


def main(order: dict[str, Any]) -> dict[str, Any]:
    """What was found, by its kind and name: an error's last line where something was raised."""
    bench = Bench(order)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    torch.set_float32_matmul_precision = lambda _: None  # as the fixture exact_fp32
    found: dict[str, Any] = {}
    with sdpa_kernel(SDPBackend.MATH):  # the only kind of attention that the device has
        for work, names in ((same, SAME), (rounded, ROUNDED)):
            for name in names:
                found[name] = _or_error(lambda work=work, name=name: work(bench, name))
        wholes: dict[str, Callable[[Bench], Any]] = {"reward training": reward_training}
        wholes |= {"commands": commands, "planted": planted, "counts": counting.counts, "casts": counting.casts}
        for name, whole in {**wholes, "a planted read": counting.planted_read}.items():
            found[name] = _or_error(lambda whole=whole: whole(bench))
    return found


def _or_error(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except BaseException as error:
        traceback.print_exc()
        return {"raised": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["found"]).write_text(json.dumps(main(given)))
