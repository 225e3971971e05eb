"""A trained adapter and its base as one full model, which plain transformers loads."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM

from rlhf_accel import assets, files
from rlhf_accel.checkpoint import VALUE_HEAD, model_folder
from rlhf_accel.config import ConfigError, load_run
from rlhf_accel.distributed import failure
from rlhf_accel.loading import adapted, adapter_config
from rlhf_accel.models import CRITIC, DTYPES, load_pretrained, scaled_adapter
from rlhf_accel.runtime import quiet_libraries
from rlhf_accel.terminal import say
from rlhf_accel.tokens import Tokens
from rlhf_accel.trust import add_flag, require_trust


def main(arguments: list[str]) -> None:
    """The command; raises `ConfigError` for a folder that holds no adapter, or one that is taken."""
    parser = argparse.ArgumentParser(prog="rlhf_accel merge", description=__doc__)
    parser.add_argument("model", type=Path, help="a run's folder, or an adapter's")
    parser.add_argument("output", type=Path, help="folder of the merged model, not there yet")
    parser.add_argument("--which", choices=("final", "best"), default="final", help="which adapter of a run's folder")
    parser.add_argument("--base", help="the base instead of the one that the run or the adapter names")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the merged weights (default fp32)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="of what the adapter adds, up to 1: less gain for much less KL (default 1)",
    )
    add_flag(parser)
    options = parser.parse_args(arguments)
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
    """Write base and adapter as one model to `output`, with the tokenizer and the value head that lie beside it.

    The sum is taken in fp32 and rounded once; `scale` is that of the adapter in it. Raises `ConfigError` if there is no
    adapter, if it has no scale, or if `output` is taken or cannot be written.
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale {scale:g}: expected a number above 0 and up to 1", key="--scale")
    if not adapter.is_dir():
        raise ConfigError(f"{adapter}: no such folder; name a run's, or that of an adapter")
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"{adapter} holds no adapter; only runs with lora.r above 0 have something to merge")
    if output.exists():
        raise ConfigError(f"{output} is there already; name another folder")
    about = adapter_config(str(adapter))
    if scale != 1 and (about.use_dora or about.modules_to_save):
        raise ConfigError(
            f"--scale {scale:g}: {adapter} has DoRA or layers that learnt in full, which no scale leads back",
            key="--scale",
        )
    name = base or about.base_model_name_or_path
    path = assets.resolve_model(name, "--base")
    model = load_pretrained(
        AutoModelForCausalLM, path, f"--base {name}", trust_remote_code=trust_remote_code, dtype=DTYPES["fp32"]
    )
    try:
        both = adapted(model, str(adapter))
        if scale != 1:
            both.load_state_dict(scaled_adapter(both.state_dict(), scale))
        merged = both.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{adapter} does not fit the base {name} ({str(error).splitlines()[0]})") from error
    tokens = Tokens.load(str(adapter), trust_remote_code=trust_remote_code)
    beside = output.with_name(f".{output.name}")
    shutil.rmtree(beside, ignore_errors=True)

    def write() -> None:
        beside.mkdir(parents=True)
        merged.to(DTYPES[dtype]).save_pretrained(beside)
        tokens.save(beside)
        if (adapter / VALUE_HEAD).is_file():
            shutil.copy(adapter / VALUE_HEAD, beside)
        if (adapter / CRITIC).is_dir():  # an adapter of the critic's own, on the base as it was
            shutil.copytree(adapter / CRITIC, beside / CRITIC)
        files.flush_all(beside, like=beside / "config.json")
        beside.rename(output)

    problem = failure(write)
    if problem is not None:
        shutil.rmtree(beside, ignore_errors=True)
        raise ConfigError(f"{output} cannot be written ({problem}); name another folder")
