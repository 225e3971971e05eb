"""Merge a trained adapter into its base, as one full model that plain transformers loads."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf_accel.config.loading import load_run
from rlhf_accel.config.trust import require_trust
from rlhf_accel.data import wheels
from rlhf_accel.data.loading import adapted, adapter_config
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models.calls import logits_of
from rlhf_accel.models.loading import DTYPES, load_export, load_pretrained
from rlhf_accel.models.lora import CRITIC, scaled_adapter
from rlhf_accel.models.probes import Finding, export_is_memory
from rlhf_accel.runs.exports import VALUE_HEAD, ExportError
from rlhf_accel.runs.run_folder import model_folder
from rlhf_accel.system import console, files
from rlhf_accel.system.errors import ConfigError, as_config_error
from rlhf_accel.system.files import failure
from rlhf_accel.system.process import quiet_libraries
from rlhf_accel.system.terminal import say

# On this text, the merged model is compared with the base and its adapter.
_PROBE = "A dull film about a brilliant idea, which nobody who has seen it would call wrong."


def main(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for a folder that holds no adapter, or an output folder that exists."""
    console.may_fail()
    quiet_libraries()
    folder, base, trust = options.model, options.base, options.trust_code
    if (folder / "config.yaml").is_file():
        config = load_run(folder / "config.yaml")
        require_trust(config, folder, options.trust_code, ("model.trust_remote_code",))
        model = config.model
        base, trust = base or model.name_or_path, model.trust_remote_code
        folder = model_folder(folder, options.which)
    merge(folder, options.output, base=base, dtype=options.dtype, trust_remote_code=trust, scale=options.scale)
    say(f"merged into {options.output}")


def merge(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str = "fp32",
    trust_remote_code: bool = False,
    scale: float = 1.0,
) -> None:
    """Write base and adapter as one model to `output`, with the tokenizer and the value head of the adapter's folder.

    The sum is computed in fp32 and rounded once; `scale` is the scale of the adapter in it. Tied embeddings become
    untied if the adapter changes one of them. Raises `ConfigError` if there is no adapter, if it cannot be scaled, or
    if `output` exists or cannot be written, and `ExportError` if the result would not equal the base with the adapter.
    """
    _check(adapter, output, scale)
    name = base or _settings(adapter).base_model_name_or_path
    if not isinstance(name, str):
        raise ConfigError(f"{adapter}: adapter_config.json names no base; name it with --base", key="--base")
    model = load_pretrained(
        AutoModelForCausalLM,
        wheels.resolve_model(name, "--base"),
        f"--base {name}",
        trust_remote_code=trust_remote_code,
        dtype=DTYPES["fp32"],
    )
    with as_config_error(f"{adapter} does not fit the base {name}"):
        both = adapted(model, str(adapter))
        if scale != 1:
            both.load_state_dict(scaled_adapter(both.state_dict(), scale))
        _untie(both)
        both.eval()
        tokens = Tokens.load(str(adapter), trust_remote_code=trust_remote_code)
        ids = torch.tensor(tokens.encode([_PROBE]))
        before = logits_of(both, ids)
        merged = both.merge_and_unload(safe_merge=True)
    found = export_is_memory(before, logits_of(merged, ids), dtype=DTYPES["fp32"])
    if not found.passed:
        raise ExportError(
            f"{adapter} merged into {name} is not the base with the adapter: logits differ by {found.difference:.2g} "
            f"(limit {found.limit:.2g}); nothing is written"
        )
    merged = merged.to(DTYPES[dtype])
    problem = failure(lambda: _write(merged, tokens, adapter, output, ids, trust_remote_code))
    if problem is not None:
        raise ConfigError(f"{output} cannot be written ({problem}); name another folder")


def _check(adapter: Path, output: Path, scale: float) -> None:
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale {scale:g}: expected a number above 0 and up to 1", key="--scale")
    if not adapter.is_dir():
        raise ConfigError(f"{adapter}: no such folder; name the folder of a run or of an adapter")
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"{adapter} holds no adapter; only runs with lora.r above 0 have something to merge")
    if output.exists():
        raise ConfigError(f"{output} already exists; name another folder")
    settings = _settings(adapter)
    if scale != 1 and (settings.use_dora or settings.modules_to_save):
        raise ConfigError(
            f"--scale {scale:g}: {adapter} has DoRA or fully trainable layers, which cannot be scaled",
            key="--scale",
        )


def _write(merged: Any, tokens: Tokens, adapter: Path, output: Path, ids: Tensor, trust_remote_code: bool) -> None:
    """Write the model to a folder beside `output`, load it back, compare, and only then rename it to `output`."""
    with files.work_folder(output) as beside:
        merged.save_pretrained(beside)
        tokens.save(beside)
        if (adapter / VALUE_HEAD).is_file():
            shutil.copy(adapter / VALUE_HEAD, beside)
        if (adapter / CRITIC).is_dir():  # the critic's own adapter, on the original base
            shutil.copytree(adapter / CRITIC, beside / CRITIC)
        files.flush_all(beside, like=beside / "config.json")
        found = _as_loaded(beside, merged, ids, trust_remote_code, str(output))
        if not found.passed:
            raise ExportError(f"{found.message}; nothing is written")
        beside.rename(output)


def _untie(both: Any) -> None:
    """Give the vocabulary layer its own matrix if it shares that of the embedding and the adapter changes one of the
    two. With a shared matrix, the change of one would change the other as well."""
    base = both.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    plain = [getattr(end, "base_layer", getattr(end, "original_module", end)) for end in ends]
    changed = any(end is not layer for end, layer in zip(ends, plain, strict=True))
    if not changed or plain[0].weight is not plain[1].weight:
        return
    plain[1].weight = nn.Parameter(plain[1].weight.detach().clone())
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


def _as_loaded(folder: Path, merged: Any, ids: Tensor, trust_remote_code: bool, what: str) -> Finding:
    """Compares the model as transformers loads it from the folder with the one in memory."""
    loaded, lacking = load_export(str(folder), dtype=merged.dtype, trust_remote_code=trust_remote_code)
    return export_is_memory(
        logits_of(merged, ids),
        logits_of(loaded, ids),
        dtype=merged.dtype,
        ours=merged.state_dict(),
        theirs=loaded.state_dict(),
        lacking=lacking,
        what=what,
    )


def _settings(adapter: Path) -> PeftConfig:
    with as_config_error(f"{adapter / 'adapter_config.json'} does not have the form that peft writes"):
        return adapter_config(str(adapter))
