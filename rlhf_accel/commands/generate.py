"""Continue prompts with a trained model, optionally beside its base and with scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM
from rich.table import Table
from transformers import AutoModelForCausalLM

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.config.loading import load_run, parse
from rlhf_accel.config.schema import Config, DataConfig, RolloutConfig
from rlhf_accel.config.trust import require_trust
from rlhf_accel.data import wheels
from rlhf_accel.data.conversations import MESSAGES, Turns, answered, transcript, with_system
from rlhf_accel.data.loading import adapted, adapter_config, pretrained
from rlhf_accel.data.prompts import encode_conversations
from rlhf_accel.data.rows import text_lines
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models.policy import end_of_text_ids
from rlhf_accel.models.positions import check_prompts
from rlhf_accel.models.vocabulary import with_fp32_logits
from rlhf_accel.reward import Reward, RewardError, load_reward_here
from rlhf_accel.rollout import sampling as decoding
from rlhf_accel.rollout.engine import sampling_settings
from rlhf_accel.runs.progress_line import plain
from rlhf_accel.runs.run_folder import model_folder
from rlhf_accel.runs.summary import reward_scale
from rlhf_accel.system.arithmetic import has_gpu
from rlhf_accel.system.errors import ConfigError, as_config_error, why
from rlhf_accel.system.process import quiet_libraries, tune_process
from rlhf_accel.system.terminal import Terminal

BATCH = 32
_PLAIN = DataConfig()


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A causal language model with its tokenizer, which samples as a run does."""

    name: str
    model: Any
    tokens: Tokens
    rollout: RolloutConfig
    data: DataConfig = _PLAIN
    adapter_off: bool = False

    def write(self, prompts: Sequence[str | Turns], seed: int) -> tuple[str, ...]:
        """A response to each text, or with data.chat to each conversation. With the same seed, each row gets the same
        random numbers."""
        rows = self._encoded(prompts)
        new_tokens = self.rollout.max_new_tokens
        check_prompts(self.model, _shown(prompts), list(map(len, rows)), new_tokens, "--max_new_tokens")
        queries, query_mask = self.tokens.pad_left(rows)
        stop = self.tokens.stop_condition(self.rollout.stop, end_of_text_ids(self.model))
        device = self.model.device
        with self.model.disable_adapter() if self.adapter_off else nullcontext():
            sampled = decoding.sample(
                self.model,
                queries.to(device),
                query_mask.to(device),
                decoding.uniforms(seed, 0, range(len(prompts)), self.rollout.max_new_tokens).to(device),
                sampling_settings(self.rollout),
                pad_id=self.tokens.pad_id,
                stop_ids=stop.ids,
                ended=stop.after(queries, query_mask),
            )
        sequences = Sequences(
            queries=queries,
            query_mask=query_mask,
            responses=sampled.responses.cpu(),
            response_mask=sampled.response_mask.cpu(),
        )
        return self.tokens.decode(sequences)[1]

    def _encoded(self, prompts: Sequence[Any]) -> list[list[int]]:
        if self.data.chat:
            return encode_conversations(prompts, self.tokens, self.data)
        rows = self.tokens.encode(prompts)
        if [] in rows:
            text = prompts[rows.index([])]
            raise ConfigError(f"the tokenizer returns no tokens for the prompt {text!r:.40}; use another one")
        return rows


def main(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for a folder or a file that cannot be used."""
    tune_process()
    quiet_libraries()
    config, writers = _writers(options)
    if config is not None:
        tune_process(config.run.matmul_precision)
    data = writers[0].data
    reward = _reward(config, Path(options.model)) if options.score else None
    histories: dict[str, Turns] = {writer.name: [] for writer in writers}  # of the conversation that is typed
    for number, prompts in enumerate(_prompts(options)):
        asked = {name: [_asked(turns, text, data) for text in prompts] for name, turns in histories.items()}
        try:
            written = _show(prompts, writers, reward, options.seed + number, asked if data.chat else None)
        except RewardError as error:
            hint = "prompts given here have no columns: if the reward reads columns of data.source, use evaluate"
            raise ConfigError(f"--score: {error}; {hint}", key="--score") from error
        if _is_typed(options):
            histories = {name: answered(asked[name][0], texts[0]) for name, texts in written.items()}


def _asked(history: Turns, text: str, data: DataConfig) -> Turns:
    """The conversation so far with this turn of the user."""
    return with_system([*history, {"role": "user", "content": text}], data.system)


def _shown(prompts: Sequence[Any]) -> list[str]:
    return [prompt if isinstance(prompt, str) else transcript(prompt) for prompt in prompts]


def _writers(options: argparse.Namespace) -> tuple[Config | None, list[Writer]]:
    """The run's config, if the model is a run's folder, and the models to show, the base first."""
    folder, config = Path(options.model), None
    if (folder / "config.yaml").is_file():
        config = load_run(folder / "config.yaml")
        keys = ("reward.function", "reward.url") if options.score else ()
        require_trust(config, folder, options.trust_code, (*keys, "model.trust_remote_code"))
        folder = model_folder(folder, options.which)
    if options.score and config is not None and config.reward.chat_field is not None:
        raise ConfigError(
            f"--score: the run's reward reads the column reward.chat_field={config.reward.chat_field} of its data, "
            "which prompts given here do not have; use evaluate",
            key="--score",
        )
    if options.score and config is None:
        raise ConfigError("--score needs a run's folder, since its config.yaml names the reward", key="--score")
    if options.prompts and options.file is not None:
        raise ConfigError("prompts are given as arguments and with --file; keep one of them", key="--file")
    path = str(folder) if config is not None or folder.exists() else wheels.resolve_model(options.model)
    trust = options.trust_code if config is None else config.model.trust_remote_code
    rollout = (config or Config()).rollout
    changes = {key: getattr(options, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    rollout = parse(
        RolloutConfig, asdict(rollout) | {key: value for key, value in changes.items() if value is not None}
    )

    data = _data(options, config)
    adapter = (folder / "adapter_config.json").is_file()
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    tokens = Tokens.load(path, trust_remote_code=trust, data=data)
    # The run's config has the absolute path of the base; the adapter's has it as the user wrote it, perhaps relative.
    known = None if config is None or not adapter else wheels.resolve_model(config.model.name_or_path)
    trained = Writer(name="trained", model=_load(kind, path, trust, known), tokens=tokens, rollout=rollout, data=data)
    if not options.compare:
        return config, [trained]
    if adapter:
        return config, [replace(trained, name="base", adapter_off=True), trained]
    if config is None:
        raise ConfigError("--compare needs a run's folder or an adapter, since these name their base", key="--compare")
    base = _load(AutoModelForCausalLM, wheels.resolve_model(config.model.name_or_path), trust)
    return config, [replace(trained, name="base", model=base), trained]


def _data(options: argparse.Namespace, config: Config | None) -> DataConfig:
    """How prompts become conversations: as in the run, unless the options say otherwise."""
    data = _PLAIN if config is None else config.data
    if options.score and options.chat not in (None, data.chat):
        flag = "--chat" if options.chat else "--no-chat"
        raise ConfigError(f"--score: the run's reward scores prompts as in its training; remove {flag}", key=flag)
    data = replace(data, chat=data.chat if options.chat is None else options.chat)
    if options.system is None:
        return data
    if not data.chat:
        raise ConfigError("--system needs conversations, and the prompts are plain texts; add --chat", key="--system")
    return replace(data, system=options.system)


def _load(kind: Any, path: str, trust_remote_code: bool, base: str | None = None) -> Any:
    device = "cuda" if has_gpu() else "cpu"
    with as_config_error(f"{path}: the model cannot be loaded"):
        if base is not None:
            return adapted(_load(AutoModelForCausalLM, base, trust_remote_code), path).eval().to(device)
        if kind is AutoPeftModelForCausalLM:
            adapter_config(path)
        model = pretrained(kind, path, trust_remote_code=trust_remote_code).eval().to(device)
        with_fp32_logits(model)
        return model


def _reward(config: Config | None, run: Path) -> Reward:
    assert config is not None, "checked with the options"
    trusted = config.model.trust_remote_code
    reward = load_reward_here(config.reward, trust_remote_code=trusted, conversations=config.data.chat)
    if not config.reward.calibrate:
        return reward
    scale = reward_scale(run)
    if scale is None:
        raise ConfigError(
            f"--score: {run} has no summary.json with the scale of its scores, and no checkpoint", key="--score"
        )
    return replace(reward, **scale)


def _prompts(options: argparse.Namespace) -> Iterator[list[str]]:
    """Batches of prompts from the arguments, a file or stdin, or one at a time from the keyboard."""
    if options.prompts:
        lines = options.prompts
    elif options.file is not None:
        try:
            lines = text_lines(options.file.read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {options.file}: cannot be read ({why(error)})", key="--file") from error
    elif _is_typed(options):
        yield from ([line] for line in _typed(input))
        return
    else:
        try:
            lines = text_lines(sys.stdin.buffer.read())
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input cannot be read as UTF-8 ({error})") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ConfigError("no prompts; pass some as arguments, in --file or on stdin", key="--file")
    yield from (lines[start : start + BATCH] for start in range(0, len(lines), BATCH))


def _is_typed(options: argparse.Namespace) -> bool:
    return not options.prompts and options.file is None and sys.stdin.isatty()


def _typed(ask: Callable[[str], str]) -> Iterator[str]:
    while True:
        try:
            line = ask("prompt (empty to exit)> ")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def _show(
    prompts: list[str],
    writers: list[Writer],
    reward: Reward | None,
    seed: int,
    asked: Mapping[str, list[Turns]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Prints and returns the responses of each writer to the prompts, or to what it is `asked`: the conversations that
    end with them."""
    asked = asked or {}
    written = {writer.name: writer.write(asked.get(writer.name, prompts), seed) for writer in writers}
    scores: dict[str, list[float]] = {}
    for name, texts in written.items():
        if reward is None:
            continue
        columns = {MESSAGES: asked[name]} if asked else {}
        scores[name] = reward.try_out(_shown(asked.get(name, prompts)), texts, columns).tolist()
    table = Table(show_lines=True)
    table.add_column("prompt", overflow="fold")
    for name in written:
        table.add_column(name, overflow="fold")
        if reward:
            table.add_column("score", justify="right")
    for i, prompt in enumerate(prompts):
        cells = [prompt]
        for name, texts in written.items():
            cells += [texts[i], *([f"{scores[name][i]:+.2f}"] if reward else [])]
        table.add_row(*map(plain, cells))
    Terminal().print(table)
    return written
