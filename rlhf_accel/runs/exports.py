"""Whether what a run writes is the policy that it has in memory: the folder is loaded as others load it, and compared.

Knows the config and the folder of an export; knows no rank. The comparison itself is a probe.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from jaxtyping import Int
from peft import get_peft_model_state_dict, load_peft_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_accel.algorithm.batches import PromptBatch
from rlhf_accel.config.schema import Config
from rlhf_accel.models.calls import logits_of
from rlhf_accel.models.loading import LanguageModel, load_export, load_model
from rlhf_accel.models.lora import CRITIC, POLICY
from rlhf_accel.models.policy import loading_settings
from rlhf_accel.models.probes import Finding, export_is_memory, tensors_are_memory
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.memory import free_memory

_ROWS, _TOKENS = 2, 16  # of the sequences that both models read


class ExportError(RunFailed):
    """What was written is not what is in memory; the message names the tensors."""


class ExportProbe:
    """Export = memory, for the exports of one run.

    A full model is loaded as plain transformers loads it, each time; an adapter as peft loads it, the first time. Of
    later ones the tensors and adapter_config.json are compared, for the base is the same: to put adapters on a model
    takes peft longer than all else.
    """

    def __init__(self, config: Config, device: torch.device, prompts: PromptBatch) -> None:
        self.config = config
        self.device = device
        self.ids = held_out_ids(prompts)
        self._described: Any = None  # adapter_config.json of the adapter that was loaded
        self.skipped: str | None = None  # why the logits of the last export were not compared

    @property
    def loads(self) -> bool:
        """Whether the next export is loaded, for which the logits in memory are needed."""
        return self.config.lora.r == 0 or self._described is None

    def fault(
        self, folder: Path, policy: LanguageModel, memory: Tensor | None, weights: Mapping[str, Tensor], name: str
    ) -> str | None:
        """What is wrong with the export in `folder` of this policy, which gives `memory` for `ids` (None if not
        `loads`); None if nothing is. `weights` are the whole ones that it was written from, by their names in the run's
        module."""
        ours = {key.removeprefix("policy."): value for key, value in weights.items() if key.startswith("policy.")}
        ours = {key: value for key, value in ours.items() if CRITIC not in key.split(".")}
        self.skipped = None
        try:
            found = self._compare(folder, policy, memory, ours, name)
        except Exception as error:  # transformers, peft and code that comes with a model raise many kinds
            if _is_of_surroundings(error):
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
                if not _is_of_surroundings(error):
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
        """Where a second model like this one fits: on the device, else in the machine's memory, else nowhere."""
        size = 2 * sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in policy.parameters())
        if self.device.type == "cuda" and size <= torch.cuda.mem_get_info(self.device)[0]:
            return self.device
        if size <= free_memory() and not self.config.model.load_in_4bit:
            return torch.device("cpu")
        self.skipped = f"a second model takes {size / 2**31:.0f} GiB, more than half of the memory that is free"
        return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


def _is_of_surroundings(error: BaseException | None) -> bool:
    """Whether this comes from memory that ran out or from the network, and tells nothing about what was loaded."""
    if error is None:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, ConnectionError, TimeoutError)):
        return True
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__} - {"builtins"}
    # A name that is not one of the hub's is a fault of the export.
    if kinds & {"httpx", "httpx2", "requests", "urllib3"} or isinstance(error, EntryNotFoundError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "ALLOC_FAILED" in str(error)):
        return True  # of torch's allocator on a CPU, of cuBLAS
    return _is_of_surroundings(error.__cause__ or error.__context__)


def _settings(folder: Path) -> dict[str, Any]:
    """An adapter's, without the order of its lists, in which peft keeps sets."""
    tree = json.loads((folder / "adapter_config.json").read_bytes())
    return {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in tree.items()}


def held_out_ids(prompts: PromptBatch) -> Int[Tensor, "B L"]:
    """The tokens of these prompts, one after the other, as a few rows without padding."""
    tokens = prompts.queries[prompts.query_mask]
    length = max(min(_TOKENS, len(tokens) // _ROWS), 1)
    return tokens[: _ROWS * length].reshape(-1, length)


def exported_weights(policy: LanguageModel, config: Config, folder: str) -> dict[str, Tensor]:
    """The weights of a full model or an adapter that a run exported to `folder`, by the names that they have in this
    policy. Raises `ConfigError` if they are of another kind of policy or cannot be read."""
    if config.lora.r == 0:
        return dict(load_model(AutoModelForCausalLM, config.model, folder, torch.float32, "--which").state_dict())
    # peft's own names in files, found by what becomes of a mark for each tensor.
    marks = {name: torch.empty(0) for name in policy.state_dict()}
    in_files = get_peft_model_state_dict(policy, marks, POLICY, save_embedding_layers=False)
    names = {id(mark): name for name, mark in marks.items()}
    try:
        saved = load_peft_weights(folder, device="cpu")
        return {names[id(mark)]: saved[name] for name, mark in in_files.items()}
    except Exception as error:  # a missing, broken or foreign file raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{folder}: holds no adapter of this run ({reason})") from error
