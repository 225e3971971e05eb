"""Exports of a run's policy, best/ and final/: written, and compared with the policy in memory.

An export is loaded as its users load it; the comparison itself is a probe. Knows the config and the folder of an
export. Knows no rank.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from jaxtyping import Int
from peft import get_peft_model_state_dict, load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_accel.algorithm.batches import PromptBatch
from rlhf_accel.config.schema import Config
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models.calls import logits_of
from rlhf_accel.models.loading import LanguageModel, load_export, load_model
from rlhf_accel.models.lora import CRITIC, POLICY
from rlhf_accel.models.policy import loading_settings
from rlhf_accel.models.policy_with_value import PolicyWithValue
from rlhf_accel.models.probes import Finding, export_is_memory, tensors_are_memory
from rlhf_accel.system.errors import ConfigError, RunFailed, first_line
from rlhf_accel.system.files import flush_all, remove_work_folders, replace_folder, work_folder
from rlhf_accel.system.memory import free_memory

_ROWS, _TOKENS = 2, 16  # of the sequences that both models read


class ExportError(RunFailed):
    """An export differs from the policy in memory; the message names the tensors."""


class ExportProbe:
    """The probe export = memory, for the exports of one run.

    A full model is loaded with plain transformers each time, an adapter with peft the first time. For later adapters
    only the tensors and adapter_config.json are compared, since the base is the same and adding adapters to a model is
    the slowest part.
    """

    def __init__(self, config: Config, device: torch.device, prompts: PromptBatch) -> None:
        self.config = config
        self.device = device
        self.ids = held_out_ids(prompts)
        self._described: Any = None  # adapter_config.json of the adapter that was loaded
        self.skipped: str | None = None  # why the logits of the last export were not compared

    @property
    def loads(self) -> bool:
        """Whether the next export will be loaded, which needs the logits of the policy in memory."""
        return self.config.lora.r == 0 or self._described is None

    def fault(
        self, folder: Path, policy: LanguageModel, memory: Tensor | None, weights: Mapping[str, Tensor], name: str
    ) -> str | None:
        """A message if the export in `folder` is faulty, else None.

        `memory` are the policy's logits for `ids`, None if not `loads`. `weights` are the full weights that were
        written, by their names in the run's module.
        """
        ours = {key.removeprefix("policy."): value for key, value in weights.items() if key.startswith("policy.")}
        ours = {key: value for key, value in ours.items() if CRITIC not in key.split(".")}
        self.skipped = None
        try:
            found = self._compare(folder, policy, memory, ours, name)
        except Exception as error:  # transformers, peft and the code of a model raise errors of many types
            if _is_environmental(error):
                self.skipped = _line(error)
                return None
            return f"{name} cannot be loaded again: {_line(error)}"
        return None if found.passed else found.message

    def _compare(
        self, folder: Path, policy: LanguageModel, memory: Tensor | None, ours: Mapping[str, Tensor], name: str
    ) -> Finding:
        lora = self.config.lora.r > 0
        described = _settings(folder) if lora else None
        device = None if memory is None else self._room(policy)
        if memory is not None and device is not None:
            try:
                found = self._compare_logits(folder, memory, device, ours, name)
            except Exception as error:
                if not _is_environmental(error):
                    raise
                self.skipped = _line(error)
            else:
                self._described = described if found.passed else None
                return found
        if self._described is not None and described != self._described:
            raise ValueError("its adapter_config.json is not that of the adapter that was compared before")
        in_files = exported_weights(policy, self.config, str(folder)) if lora else {}
        return tensors_are_memory({key: ours[key] for key in in_files}, in_files, what=name)

    def _compare_logits(
        self, folder: Path, memory: Tensor, device: torch.device, ours: Mapping[str, Tensor], name: str
    ) -> Finding:
        settings = loading_settings(self.config, self.device)
        with torch.random.fork_rng(devices=[]):  # new adapters are drawn at random before they are filled
            loaded, lacking = load_export(str(folder), device=device, **settings)
        return export_is_memory(
            memory,
            logits_of(loaded, self.ids.to(device)),
            dtype=settings["dtype"],
            ours=ours,
            theirs=loaded.state_dict(),
            lacking=lacking,
            what=name,
        )

    def _room(self, policy: LanguageModel) -> torch.device | None:
        """The device with room for a second model like this one: the run's own, else the CPU, else None."""
        size = 2 * sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in policy.parameters())
        if self.device.type == "cuda" and size <= torch.cuda.mem_get_info(self.device)[0]:
            return self.device
        if size <= free_memory() and not self.config.model.load_in_4bit:
            return torch.device("cpu")
        self.skipped = f"a second model takes {size / 2**31:.0f} GiB, more than half of the free memory"
        return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _is_environmental(error: BaseException | None) -> bool:
    """Whether the error comes from a lack of memory or from the network, and not from the export."""
    if error is None:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, ConnectionError, TimeoutError)):
        return True
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__} - {"builtins"}
    # A base that the hub does not have is a fault of the export.
    if kinds & {"httpx", "httpx2", "requests", "urllib3"} or isinstance(error, EntryNotFoundError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "ALLOC_FAILED" in str(error)):
        return True  # from torch's allocator on a CPU, from cuBLAS
    return _is_environmental(error.__cause__ or error.__context__)


def _settings(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder, with sorted lists: peft writes sets, in any order."""
    tree = json.loads((folder / "adapter_config.json").read_bytes())
    return {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in tree.items()}


def held_out_ids(prompts: PromptBatch) -> Int[Tensor, "B L"]:
    """The tokens of these prompts, concatenated and cut into a few rows without padding."""
    tokens = prompts.queries[prompts.query_mask]
    length = max(min(_TOKENS, len(tokens) // _ROWS), 1)
    return tokens[: _ROWS * length].reshape(-1, length)


def exported_weights(policy: LanguageModel, config: Config, folder: str) -> dict[str, Tensor]:
    """The weights of the full model or adapter that a run exported to `folder`, by their names in this policy.

    Raises `ConfigError` if they belong to another kind of policy or cannot be read.
    """
    if config.lora.r == 0:
        return dict(load_model(AutoModelForCausalLM, config.model, folder, torch.float32, "--which").state_dict())
    # A marker for each tensor shows the name that peft gives it in files.
    marks = {name: torch.empty(0) for name in policy.state_dict()}
    in_files = get_peft_model_state_dict(policy, marks, POLICY, save_embedding_layers=False)
    names = {id(mark): name for name, mark in marks.items()}
    try:
        saved = load_peft_weights(folder, device="cpu")
        return {names[id(mark)]: saved[name] for name, mark in in_files.items()}
    except Exception as error:  # a missing, broken or foreign file raises errors of many types
        raise ConfigError(f"{folder}: holds no adapter of this run ({first_line(error)})") from error


VALUE_HEAD = "value_head.safetensors"


def export(
    folder: Path,
    module: PolicyWithValue,
    weights: Mapping[str, Tensor],
    tokens: Tokens,
    card: str,
    fault: Callable[[Path], str | None] = lambda _: None,
    base: str | None = None,
) -> str | None:
    """Write the policy in Hugging Face form (full model, or peft adapter), its value head and a model card.

    Called by the main process only. `weights` are the full weights of the module. `fault` checks the new folder before
    it replaces `folder`; a message from it is returned, and `folder` stays as it was. `base` is the name of the base in
    an adapter's config, where it is not the path that was loaded. Raises `OSError` or `SafetensorError` if the folder
    cannot be written.
    """
    policy = {name.removeprefix("policy."): value for name, value in weights.items() if name.startswith("policy.")}
    policy_model: Any = module.policy
    adapters = [name for name in (POLICY, CRITIC) if name in getattr(policy_model, "peft_config", ())]
    remove_work_folders(folder.parent, folder.name)
    with work_folder(folder) as beside:
        policy_model.save_pretrained(beside, state_dict=policy, **({"selected_adapters": adapters} if adapters else {}))
        tokens.save(beside)
        # The value head, and the trained weights of the transformer under it if that is a separate one. peft writes
        # the adapter of a value model into critic/.
        critic = {name: value.contiguous() for name, value in weights.items() if not name.startswith("policy.")}
        if critic:
            save_file(critic, beside / VALUE_HEAD)
        (beside / "README.md").write_text(card, encoding="utf-8")
        found = fault(beside)
        if found is None:
            for settings in beside.rglob("adapter_config.json") if base is not None else ():
                tree = json.loads(settings.read_bytes())
                settings.write_text(json.dumps({**tree, "base_model_name_or_path": base}, indent=2), encoding="utf-8")
            flush_all(beside, like=beside / "README.md")
            replace_folder(beside, folder)
    return found


def load_value_head(folder: Path) -> dict[str, Tensor]:
    """The value model's weights in an export: `value_head.weight`, `value_head.bias`, and `critic.…` if separate."""
    return load_file(folder / VALUE_HEAD)
