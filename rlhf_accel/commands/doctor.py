"""Checks a run before it costs anything: each check says one line, ok, a warning or a problem with the key to change.

Builds the run as training would, in one process, samples from the policy before training, and throws all of it away:
no folder is made and nothing is learnt. Knows what a setup is made of; what memory is needed, plan.py says.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from rlhf_accel.algorithm.advantages import make_experience
from rlhf_accel.algorithm.batches import Experience, Responses, Rollout
from rlhf_accel.algorithm.kl import kl_estimate
from rlhf_accel.algorithm.masked import masked_row_sum
from rlhf_accel.commands import memory_plan as plan
from rlhf_accel.config import places
from rlhf_accel.config.distribution import truncated
from rlhf_accel.config.loading import DEFAULT_RECIPE, describe, parse, read_tree, take_option
from rlhf_accel.config.rules import check_trainable
from rlhf_accel.config.schema import Config
from rlhf_accel.data import prompts as data
from rlhf_accel.data import wheels
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models import probes
from rlhf_accel.models.calls import model_inputs
from rlhf_accel.models.lora import CRITIC
from rlhf_accel.models.reference import reference_policy
from rlhf_accel.models.trainable import learning
from rlhf_accel.reward import TOKEN_VARIABLE, Classifier, RewardError, RewardFunction
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.rollout.scoring import WITHOUT_PARTS, score, score_parts
from rlhf_accel.system.arithmetic import has_gpu
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.terminal import say
from rlhf_accel.training.first_step import ratio_limits, values_in_reach
from rlhf_accel.training.losses import loss_of
from rlhf_accel.training.run import check_folder
from rlhf_accel.training.setup import Setup, check_prompt_tokens, start

Level = Literal["ok", "warning", "problem"]
Verdict = tuple[Level, str]  # of one check, with what it says

SAMPLES = 64  # of the reference, that reward and stops are judged by
_FEW = 8  # of them, that a gradient is taken of, if ppo.micro_batch_tokens holds so many
_FORESEEN = 0.3  # by chance alone, a correlation over 64 samples is above that once in a hundred times
_MOST_FAULTS = 20  # of the config, after which the doctor stops mending

# What chat formats write around turns. Where a prompt has one, its tokenizer should know it.
_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|start_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<|start_of_role|>", "<|endofprompt|>"),
)
_GOOD = {"positive", "pos", "good", "nice", "favorable", "favourable", "label_positive"}
_BAD = {"negative", "neg", "bad", "toxic", "hate", "unfavorable", "unfavourable", "label_negative"}
_PROBES = (
    ("This film is wonderful, I loved every minute of it.", "This film is terrible, I hated every minute of it."),
    ("A brilliant story with superb acting.", "A stupid story with awful acting."),
    ("It was great fun and I recommend it warmly.", "It was a boring mess and I warn everyone off it."),
    ("The best movie of the year.", "The worst movie of the year."),
    ("Beautiful, moving and very funny.", "Ugly, dull and not funny at all."),
    ("An excellent cast makes this a delight.", "A poor cast makes this a disaster."),
)
# Peak learning rates of AdamW beyond which runs of published recipes do not go: full fine-tuning 1e-6 to 1.4e-5 (Huang
# et al. 2024; Ziegler et al. 2019), LoRA 1e-5 to 1e-3 (Hu et al. 2021), with room on both sides.
_PLAUSIBLE = {False: (1e-7, 1e-4), True: (1e-6, 3e-3)}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found; `check` is its name."""

    level: Level
    check: str
    said: str

    def __str__(self) -> str:
        return f"{self.level:8}{self.check}: {self.said}"


class Doctor:
    """Examines a config; `findings` has one line for each check so far, and `say` gets each as it is found."""

    def __init__(self, say: Callable[[str], None] = say, *, processes: int = 1) -> None:
        self.findings: list[Finding] = []
        self.processes = processes
        self.base: int | None = None  # bytes of the process before there are any models
        self.paths: tuple[str, str | None] | None = None  # of policy and reward model
        self._say = say

    def note(self, level: Level, check: str, said: str) -> None:
        finding = Finding(level=level, check=check, said=" ".join(said.split()))
        if not any(finding.said == other.said for other in self.findings):
            self.findings.append(finding)
            self._say(str(finding))

    @property
    def healthy(self) -> bool:
        """Whether nothing is a problem; warnings do not count."""
        return not any(finding.level == "problem" for finding in self.findings)

    @contextlib.contextmanager
    def _checking(self, check: str) -> Iterator[None]:
        """What the block raises is a problem of this check, and the others go on."""
        try:
            yield
        except (ConfigError, RewardError, RunFailed) as error:
            self.note("problem", check, str(error))
        except Exception as error:  # a check is a look at something unknown: what it meets is a finding, not a crash
            self.note("problem", check, f"{type(error).__name__}: {error}")

    def _check(self, check: str, look: Callable[..., Verdict], *args: Any) -> None:
        with self._checking(check):
            level, said = look(*args)
            self.note(level, check, said)

    # The config

    def read(self, source: str | Path, overrides: Sequence[str] = ()) -> Config | None:
        """The config, with the keys that cannot stay put back to their defaults, each of them a problem.

        None where there is nothing to go on with.
        """
        try:
            tree = read_tree(Config, source, overrides)
        except ConfigError as error:
            self.note("problem", "config", str(error))
            return None
        for _ in range(_MOST_FAULTS):
            try:
                config = parse(Config, tree)
            except ConfigError as error:
                key = self._drop(tree, error)
                self.note("problem", "config", str(error) + (f" (checking on with {key}'s default)" if key else ""))
                if key is None:
                    return None
            else:
                if self.healthy:
                    self.note("ok", "config", f"{source} is read, and its keys agree")
                return config
        return None

    @staticmethod
    def _drop(tree: dict[str, Any], error: ConfigError) -> str | None:
        """Take the first of the error's keys that is set out of the tree; its name."""
        keys: list[str | None] = [error.key, *error.facts.get("others", ())]
        for key in filter(None, keys):
            *sections, name = key.split(".")
            place: Any = tree
            for section in sections:
                place = place.get(section) if isinstance(place, dict) else None
            if isinstance(place, dict) and name in place:
                del place[name]
                return key
        return None

    # Before there are models

    def look(self, config: Config) -> None:
        """What needs no model: data, tokenizer, prompts, batch sizes, learning rates."""
        rows: Any = None
        tokens: Tokens | None = None
        with self._checking("data"):
            rows, held = data.split_rows(config.data)
            self.note("ok", "data", f"{len(rows)} texts to train on, {len(held)} held out, of {config.data.source}")
            self._check("columns", _look_at_columns, rows, config.data.text_field)
        with self._checking("tokenizer"):
            path = wheels.resolve_model(config.model.name_or_path)
            self.paths = (path, None)
            tokens = Tokens.load(path, trust_remote_code=config.model.trust_remote_code)
        if rows is not None and tokens is not None:
            with self._checking("prompts"):
                self._look_at_prompts(config, rows, tokens)
            self._check("chat template", _look_at_format, config, rows, tokens)
        if tokens is not None and config.rollout.stop:
            self._check("stop texts", _look_at_stops, config.rollout.stop, tokens)
        self.base = psutil.Process().memory_info().rss
        self._check("batch sizes", _look_at_sizes, config, self.processes)
        self._check("learning rate", _look_at_rates, config)
        said = truncated(config.rollout)
        if said is not None:
            self.note("warning", "sampling", f"{said}, in the penalty, ppo.kl_target and evaluations; sample plainly")

    def _look_at_prompts(self, config: Config, rows: Any, tokens: Tokens) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prompts = data.Prompts.of(rows, tokens, config.data, config.rollout.max_prompt_tokens, config.run.seed)
        self.note("ok", "prompt tokens", check_prompt_tokens(prompts))
        dropped = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
        for said in dropped:
            many = len(prompts) < 0.9 * len(rows)
            self.note("warning" if many else "ok", "prompts", f"{said}; raise it or set data.prompt_tokens")
        if not dropped:
            self.note("ok", "prompts", f"all {len(prompts)} fit rollout.max_prompt_tokens")
        if len(prompts) < config.rollout.batch_size:
            self.note(
                "warning",
                "prompts",
                f"rollout.batch_size={config.rollout.batch_size} is above the {len(prompts)} prompts, which repeat "
                "within a step; lower it or bring more",
            )

    # With models

    def build(self, config: Config) -> Setup | None:
        """The run as training would build it, with what cannot work left out, each such thing a problem; None where too
        much is wrong."""
        stands_in = False
        for _ in range(_MOST_FAULTS):
            try:
                with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return set_up(config, _stand_in if stands_in else None)
            except ConfigError as error:
                found = error
            except Exception as error:  # whatever a library raises is what training would meet too
                found = ConfigError(f"building the run raised {type(error).__name__}: {error}")
            mended, check = self._mend(config, found)
            said = str(found)
            if found.facts.get("raised") == "IndexError" and config.reward.model:
                said += "; the tokenizer beside it may be another model's, with more ids than it has embeddings"
            self.note("problem", check, said)
            stands_in = stands_in or check == "reward"
            if mended is None:
                return None
            config = mended
        return None

    def _mend(self, config: Config, found: ConfigError) -> tuple[Config | None, str]:
        """The config without what the error is about, and the check that it belongs to."""
        rollout, reward, key = config.rollout, config.reward, found.key or ""
        if "positions" in found.facts:
            window = found.facts["positions"]
            new = max(window // 4, 1)
            prompt = min(rollout.max_prompt_tokens, window - new - 1)
            tree = asdict(config)
            tree["rollout"] |= {"max_new_tokens": new, "max_prompt_tokens": prompt, "min_new_tokens": 0}
            if tree["data"]["prompt_tokens"] is None:
                tree["data"]["prompt_tokens"] = (1, prompt)
            low, high = tree["data"]["prompt_tokens"]
            tree["data"]["prompt_tokens"] = (min(low, prompt), min(high, prompt))
            return parse(Config, tree), "context window"
        if key == "reward.partial_every" and reward.partial_every:
            return replace(config, reward=replace(reward, partial_every=0)), "partial scores"
        if key.startswith("reward.") or key == TOKEN_VARIABLE:
            # A classifier that overflows is found when it is loaded, or on the prompts that it is tried on.
            if found.facts.get("dtype") == "float16" or (reward.dtype == "fp16" and "score" in found.facts):
                return replace(config, reward=replace(reward, dtype="fp32")), "reward in fp16"
            tree = asdict(config)
            tree["reward"] = {"clip": reward.clip, "missing_eos_penalty": reward.missing_eos_penalty}
            tree["model"]["critic_init"] = "policy"
            return parse(Config, tree), "reward"
        if key == "run.output_dir":
            return _elsewhere(config), "run folder"
        if key == "run.push_to_hub":
            return replace(config, run=replace(config.run, push_to_hub=None)), "hub"
        if key == "run.trackers" and config.run.trackers:
            return replace(config, run=replace(config.run, trackers=())), "trackers"
        if key == "lora.target_modules" and config.lora.target_modules:
            return replace(config, lora=replace(config.lora, target_modules=None)), "lora"
        return None, "model"

    def examine(self, setup: Setup) -> None:
        """What a run does before it has learnt anything: samples, scores, KL, ratio, gradient."""
        self.note("ok", "fp32 products", probes.fp32_products(setup.runtime.device).message)
        if setup.left_out is not None:
            self.note("warning", "text only", setup.left_out)
        with self._checking("vocabulary"):
            self._look_at_vocabulary(setup)
        if setup.config.lora.r > 0:
            self._check("adapters", _look_at_adapters, setup)
        self._say(f"        sampling {SAMPLES} responses of the reference …")
        rollout: Rollout | None = None
        with self._checking("sampling"):
            responses = self._sample(setup)
            scores = torch.zeros(len(responses))
            with self._checking("reward"):
                scores = self._look_at_scores(setup, responses)
            partial_scores = torch.zeros(responses.sequences.responses.shape)
            if setup.config.reward.partial_every:
                with self._checking("partial scores"):
                    partial_scores = self._look_at_parts(setup, responses, scores)
            self._check("stops", _look_at_ends, setup, responses)
            with torch.no_grad():
                rollout = setup.collector.forward(setup.prompts.batch(1, SAMPLES), responses, scores, partial_scores)
        with self._checking("reward label"):
            self._look_at_label(setup)
        if rollout is not None:
            with self._checking("reference"):
                self._look_at_reference(setup, rollout)
            with self._checking("ratio"):
                self._look_at_ratio(setup, rollout)
            if not setup.config.reward.calibrate:  # else scores will be on another scale
                with self._checking("values"):
                    self._look_at_values(setup, rollout)
            self._check("gradient", _look_at_gradient, setup, rollout)

    def _sample(self, setup: Setup) -> Responses:
        with setup.runtime.gathered():
            return setup.collector.sample(setup.prompts.batch(1, SAMPLES), Seeds(setup.config.run.seed, 0))

    def _look_at_vocabulary(self, setup: Setup) -> None:
        policy = setup.runtime.plain_module.policy
        rows = policy.get_input_embeddings().weight.shape[0]
        if len(setup.tokens) > rows:
            self.note(
                "problem",
                "tokenizer",
                f"model.name_or_path={setup.config.model.name_or_path}: the tokenizer has {len(setup.tokens)} ids "
                f"and the model {rows} embeddings; they do not belong together",
            )
        else:
            self.note("ok", "tokenizer", f"{len(setup.tokens)} ids for {rows} embeddings")
        for name, _, term in setup.reward.terms:
            if isinstance(term, Classifier):
                rows = term.model.get_input_embeddings().weight.shape[0]
                level: Level = "problem" if len(term.tokenizer) > rows else "ok"
                said = f"{name}: the tokenizer has {len(term.tokenizer)} ids for {rows} embeddings"
                mend = "; it is not this model's, save the right one beside it" if level == "problem" else ""
                self.note(level, "reward tokenizer", said + mend)
        for check, said in setup.cautions():
            self.note("warning", check, said)

    def _look_at_scores(self, setup: Setup, responses: Responses) -> Tensor:
        reward = replace(setup.reward, clip=None)
        scores = score(setup.runtime, responses, reward)
        names = " and ".join(name for name, _, _ in reward.terms)
        if any(term is _stand_in for _, _, term in reward.terms):
            return torch.randn(len(responses), generator=torch.Generator().manual_seed(0))
        finite = scores.isfinite()
        dtypes = {term.dtype for _, _, term in reward.terms if isinstance(term, Classifier)}
        if not finite.all():
            self.note(
                "problem",
                "reward",
                f"{names}: {int((~finite).sum())} of {len(scores)} reference samples score no finite number"
                + ("; fp16 overflows, set reward.dtype to fp32 or bf16" if torch.float16 in dtypes else ""),
            )
            return scores.nan_to_num(0.0, 0.0, 0.0)
        std, mean = torch.std_mean(scores, correction=0)
        kinds, counts = scores.unique(return_counts=True)
        tied = int(counts[counts > 1].sum())
        said = f"{names}: {len(scores)} reference samples score {mean:.4g} with a spread of {std:.3g}"
        if std <= 1e-6 * max(float(scores.abs().max()), 1e-3):
            self.note("problem", "reward", f"{said}: it is constant, and nothing can be learnt; look at the reward")
        elif 2 * int(counts.max()) > len(scores):
            self.note(
                "warning",
                "reward",
                f"{said}, but {int(counts.max())} of them the same {float(kinds[counts.argmax()]):.4g}: few tell the "
                "policy anything; a finer reward learns faster",
            )
        else:
            self.note("ok", "reward", f"{said}, {tied} of them tied")
        if setup.config.reward.clip is not None and float(std) > setup.config.reward.clip:
            self.note(
                "warning",
                "reward clip",
                f"reward.clip={setup.config.reward.clip:g} is below the spread of {float(std):.3g}; raise it or set "
                "reward.calibrate",
            )
        return scores

    def _look_at_parts(self, setup: Setup, responses: Responses, scores: Tensor) -> Tensor:
        every, lengths = setup.config.reward.partial_every, responses.sequences.response_mask.sum(1)
        parts = score_parts(setup.runtime, setup.tokens, responses, replace(setup.reward, clip=None), every)
        halfway = parts.gather(1, (lengths // 2)[:, None])[:, 0]
        # Where neither varies there is no correlation, and nothing said.
        foreseen = float(torch.corrcoef(torch.stack([halfway, scores]))[0, 1].nan_to_num(0.0))
        said = (
            f"reward.partial_every={every}: scores halfway through have a correlation of {foreseen:.2f} with the last"
        )
        if foreseen >= _FORESEEN:
            self.note("ok", "partial scores", said)
        else:
            self.note("warning", "partial scores", f"{said}, so they say little; {WITHOUT_PARTS}")
        return parts

    def _look_at_label(self, setup: Setup) -> None:
        config = setup.config
        for name, weight, term in setup.reward.terms:
            if isinstance(term, Classifier):
                self._check("reward label", _look_at_classifier, name, weight, term)
        stands_in = any(term is _stand_in for _, _, term in setup.reward.terms)
        if config.data.source == "embedded:movie_reviews" and not stands_in:
            rows = data.load_rows(config.data.source, "heldout").select(range(200))
            scores = setup.reward.try_out([""] * len(rows), list(rows["text"]), {"rating": list(rows["rating"])})
            ratings = torch.tensor(rows["rating"])
            correlation = float(torch.corrcoef(torch.stack([scores, ratings.float()]))[0, 1])
            said = f"on {len(rows)} human-rated snippets the reward correlates with the ratings by {correlation:.2f}"
            # With 200 snippets chance alone stays above -0.2. A function may mean something else than people do.
            meant = all(isinstance(term, Classifier) for _, _, term in setup.reward.terms)
            if math.isnan(correlation):
                self.note("warning", "reward label", f"all {len(rows)} human-rated snippets score {scores[0]:.4g}")
            elif correlation < -0.2:
                level: Level = "problem" if meant else "warning"
                self.note(level, "reward label", f"{said}: it likes what people do not; look at the label or the sign")
            else:
                self.note("ok", "reward label", said)

    def _look_at_reference(self, setup: Setup, rollout: Rollout) -> None:
        few = _few(setup, rollout).sequences.trimmed().to(setup.runtime.device)
        module = setup.runtime.plain_module
        with torch.no_grad(), setup.runtime.autocast():
            ours = module(*model_inputs(few)).logprobs
            with reference_policy(module, setup.collector.reference) as reference:
                theirs = reference(few)
        mask = few.response_mask
        if not ours[mask].isfinite().all():
            self.note(
                "problem",
                "logits",
                f"the policy's log-probabilities are not finite in {_arithmetic(setup)}: they overflow; set "
                "model.dtype to fp32 or bf16",
            )
            return
        difference = float((ours - theirs)[mask].abs().max())
        if difference == 0:
            self.note("ok", "reference", "the same as the policy, bit for bit")
        elif difference < 1e-3:
            self.note("warning", "reference", f"the policy differs from it by up to {difference:.2g} nats a token")
        else:
            self.note(
                "problem",
                "reference",
                f"the policy differs from it by up to {difference:.3g} nats a token before anything is learnt: other "
                "weights, dropout or adapter; look at lora.adapter and model.name_or_path",
            )
        mask = rollout.sequences.response_mask
        kl = masked_row_sum(kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k3"), mask)
        limits = ratio_limits(setup, rollout, of_one_pass=setup.collector.recompute)
        finding = probes.reference_is_policy(float(kl.mean()), float(mask.sum(1).float().mean()), limits)
        self.note("ok" if finding.passed else "problem", "KL", finding.message)

    def _look_at_values(self, setup: Setup, rollout: Rollout) -> None:
        config = setup.config
        experience = make_experience(rollout, config.ppo, config.reward, config.ppo.kl_coef)
        finding = values_in_reach(experience, config.ppo.cliprange_value)
        if finding is None:
            return
        self.note("ok" if finding.passed else "warning", "values", finding.message)

    def _look_at_ratio(self, setup: Setup, rollout: Rollout) -> None:
        config = setup.config
        module = setup.runtime.plain_module
        left_on = _dropout(module)
        some = _few(setup, rollout)
        sequences = some.sequences.trimmed()
        few, length = sequences.to(setup.runtime.device), sequences.response_mask.shape[1]
        with torch.no_grad(), setup.runtime.autocast(), learning(module, config):
            new = module(*model_inputs(few)).logprobs.cpu()
        log_ratios = (new - some.logprobs[:, :length])[sequences.response_mask]
        ratio = float(log_ratios.exp().sub(1).abs().max())
        if config.lora.dropout > 0:
            self.note(
                "warning",
                "dropout",
                f"lora.dropout={config.lora.dropout:g} stays on while learning: the first ratio is off by {ratio:.2g}, "
                "and what is learnt depends on the number of processes; 0 is safer",
            )
        elif left_on:
            self.note(
                "warning",
                "dropout",
                f"left on in {len(left_on)} places of the model ({left_on[0]}, …), which are not asked while learning; "
                "set it to 0 in the config of model.name_or_path",
            )
        else:
            self.note("ok", "dropout", "off everywhere")
        if config.lora.dropout == 0:
            rms, largest = float(log_ratios.square().mean().sqrt()), float(log_ratios.abs().max())
            limits, recomputed = ratio_limits(setup, rollout), setup.collector.recompute
            finding = probes.sampled_is_learnt(rms, largest, limits, recomputed=recomputed)
            self.note("ok" if finding.passed else "problem", "ratio", finding.message)


def _look_at_columns(rows: Any, text_field: str) -> Verdict:
    """The types of the first rows' values are what a reward function gets, and may not be what its author thinks."""
    first = rows[list(range(min(len(rows), SAMPLES)))]
    found = {name: " or ".join(sorted({type(value).__name__ for value in first[name]})) for name in first}
    others = [f"{name} ({kinds})" for name, kinds in found.items() if name != text_field]
    return "ok", f"prompts are {text_field}; reward functions get {', '.join(others) or 'no other column'}"


def _look_at_stops(stop: Sequence[str], tokens: Tokens) -> Verdict:
    condition = tokens.stop_condition(stop)
    as_tokens = [f"{text!r} (token {tokens.added[text]})" for text in stop if text in tokens.added]
    as_texts = [repr(text) for text in condition.texts if text not in tokens.added]
    unknown = [text for text in condition.texts if text in _MARKERS and text not in tokens.added]
    said = f"a response ends at {' and '.join(as_tokens + as_texts)}"
    if unknown:
        return "warning", (
            f"{said}, but this tokenizer has no token for {unknown[0]}, so the policy may never write it; name the "
            "end of a turn of model.name_or_path in rollout.stop"
        )
    return "ok", said


def _look_at_format(config: Config, rows: Any, tokens: Tokens) -> Verdict:
    texts = data.checked_texts(rows, config.data.source, config.data.text_field)
    template = str(tokens.tokenizer.chat_template or "")
    foreign: list[tuple[int, int, str]] = []
    for marker in _MARKERS:
        count = sum(marker in text for text in texts)
        pieces = len(tokens.encode([marker])[0]) - len(tokens.prefix)
        if count and pieces > 1 and marker not in tokens.added and marker not in template:
            foreign.append((count, pieces, marker))
    if foreign:
        count, pieces, marker = max(foreign)
        said = (
            f"{count} of {len(texts)} prompts hold {marker}, which this policy's tokenizer reads as {pieces} tokens "
            "and its chat template does not use: they were written for another model; format data.source for "
            "model.name_or_path"
        )
        return "problem" if 2 * count > len(texts) else "warning", said
    if template and not any(marker in text for marker in _MARKERS for text in texts[:SAMPLES]):
        return "ok", "the policy has one, and prompts are plain text, which it continues as is"
    return "ok", "no marker in the prompts that the tokenizer does not know"


def _look_at_sizes(config: Config, ranks: int) -> Verdict:
    size, parts = config.rollout.batch_size, config.ppo.num_minibatches
    minibatch = size // parts
    if minibatch < ranks:
        return "warning", (
            f"rollout.batch_size={size} / ppo.num_minibatches={parts} gives {minibatch} samples for {ranks} processes, "
            f"and {ranks - minibatch} of them learn nothing from it; raise rollout.batch_size"
        )
    if minibatch % ranks:
        return "warning", (
            f"a minibatch of {minibatch} (rollout.batch_size={size} / ppo.num_minibatches={parts}) is uneven over "
            f"{ranks} processes: nothing is lost, but some wait; a multiple of {ranks} is faster"
        )
    return "ok", f"{size} responses a step, {parts} minibatches, {minibatch // ranks} a rank"


def _look_at_rates(config: Config) -> Verdict:
    low, high = _PLAUSIBLE[config.lora.r > 0]
    kind = "LoRA" if config.lora.r else "full fine-tuning"
    rate = config.optim.lr
    if low <= rate <= high:
        return "ok", f"optim.lr={rate:g} is usual for {kind}"
    where = "above" if rate > high else "below"
    return "warning", f"optim.lr={rate:g} is {where} what runs with {kind} use ({low:g} to {high:g}); change it"


def _look_at_adapters(setup: Setup) -> Verdict:
    policy = setup.runtime.plain_module.policy
    names = [name for name, p in policy.named_parameters() if p.requires_grad and "lora_" in name]
    names = [name for name in names if CRITIC not in name.split(".")]
    layers = int(getattr(policy.config.get_text_config(), "num_hidden_layers", 0))
    found = {int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)[:1]}
    where = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in names})
    targets = _listed(setup.config.lora.target_modules)
    said = f"lora.target_modules={targets} puts adapters on {', '.join(where) or 'nothing'}"
    if layers and not found:
        return "problem", f"{said}, in none of the {layers} layers; name layers of attention or MLP"
    if layers and len(found) < layers / 2:
        return "warning", f"{said}, in {len(found)} of {layers} layers only"
    return "ok", f"{said}, in {len(found)} of {layers} layers"


def _look_at_ends(setup: Setup, responses: Responses) -> Verdict:
    config, tokens = setup.config, setup.tokens
    rollout = config.rollout
    share = float(responses.finished.float().mean())
    pad = "PAD = EOS" if tokens.pad_id == tokens.eos_id else f"PAD {tokens.pad_id}"
    ends = f"rollout.stop={_listed(rollout.stop)}" if rollout.stop else "no rollout.stop"
    if tokens.eos_id is None and not rollout.stop:
        ends = "a tokenizer without EOS and no rollout.stop"
    said = f"{share:.0%} of {len(responses)} responses end before rollout.max_new_tokens={rollout.max_new_tokens}"
    if share > 0:
        return "ok", f"{said} ({pad}, {ends})"
    if config.reward.missing_eos_penalty > 0:
        return "problem", (
            f"{said} ({pad}, {ends}), so reward.missing_eos_penalty={config.reward.missing_eos_penalty:g} is taken "
            "from all alike; set rollout.stop, or raise rollout.max_new_tokens"
        )
    why = ", as rollout.min_new_tokens forbids it" if rollout.min_new_tokens >= rollout.max_new_tokens else ""
    return "warning", (
        f"{said}{why} ({pad}, {ends}): all are cut off; if they should end, set rollout.stop, or raise "
        "rollout.max_new_tokens"
    )


def _look_at_classifier(name: str, weight: float, term: Classifier) -> Verdict:
    names = term.model.config.id2label
    labels = {int(i): str(said).strip().lower() for i, said in names.items()}
    chosen = labels[term.label]
    by = f"{names[term.label]} (output {term.label}, {term.label_found})"
    if not (set(labels.values()) & _GOOD and set(labels.values()) & _BAD):
        return "ok", f"{name} scores by {by}"
    if chosen in _GOOD | _BAD and (chosen in _GOOD) != (weight > 0):
        better = next(said for i, said in names.items() if labels[int(i)] in _GOOD)
        return "problem", (
            f"reward.label={term.config.label} of {name} with weight {weight:g} rewards what is not {better}; swap it "
            f"if the policy should write what the model calls {better}"
        )
    empty = [""] * len(_PROBES)
    columns = {} if term.config.chat_field is None else {term.config.chat_field: empty}
    good, bad = (term(empty, side, **columns) for side in zip(*_PROBES, strict=True))
    right = sum(weight * (one - other) > 0 for one, other in zip(good, bad, strict=True))
    said = f"{name} by {by} puts {right} of {len(_PROBES)} plainly good texts above bad"
    if right == 0:
        return "problem", f"{said}: its labels are swapped; look at reward.label and id2label"
    if 2 * right <= len(_PROBES):
        return "warning", f"{said}: it hardly tells them apart"
    return "ok", said


def _look_at_gradient(setup: Setup, rollout: Rollout) -> Verdict:
    """With made-up advantages, so that a constant reward does not hide a gradient; where weights start at zero and
    keep gradients from others (LoRA's second matrices, the value head), with small numbers in their place."""
    module = setup.runtime.plain_module
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not learned:
        return "problem", "nothing learns; set lora.r or lora.target_modules"
    zeros = [p for p in learned.values() if not p.detach().any()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zeros:
                parameter.copy_(1e-2 * torch.randn(parameter.shape, generator=generator))
        experience = _made_up(setup, _few(setup, rollout), generator)
        with setup.runtime.autocast(), learning(module, setup.config):
            loss_of(setup.runtime.module, experience, setup.config.ppo).backward()
        lost = [name for name, p in learned.items() if p.grad is None or not p.grad.any()]
        lost = [name for name in lost if "expert" not in name]  # of a mixture not all are asked
        wild = [name for name, p in learned.items() if p.grad is not None and not p.grad.isfinite().all()]
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
        for parameter in learned.values():
            parameter.grad = None
    if wild:
        return "problem", (
            f"not finite in {len(wild)} of {len(learned)} tensors ({wild[0]}, …): they overflow in "
            f"{_arithmetic(setup)}; set model.dtype to fp32 or bf16"
        )
    if lost:
        mend = "look at lora.target_modules and lora.modules_to_save"
        if setup.config.lora.r == 0:
            mend = "part of the model of model.name_or_path has no way to the loss, as behind a router or a ReLU"
        return (
            "problem",
            f"does not reach {len(lost)} of {len(learned)} tensors that should learn ({lost[0]}, …); {mend}",
        )
    return "ok", f"reaches all {len(learned)} tensors that learn"


def _arithmetic(setup: Setup) -> str:
    """The dtype of the weights and the precision of the passes, of which the config may say auto."""
    did = setup.arithmetic()
    return f"{did['model_dtype']} weights and {did['precision']} passes"


def _elsewhere(config: Config) -> Config:
    """The config as a new run, in a folder that is free and stays unmade."""
    free = str(Path(tempfile.gettempdir()) / f"doctor-{time.time_ns()}")
    return replace(config, run=replace(config.run, output_dir=free, resume=None))


def _few(setup: Setup, rollout: Rollout) -> Rollout:
    """As many samples as one pass may hold, and no more than `_FEW`."""
    longest = int(rollout.sequences.lengths.max())
    return rollout.select(torch.arange(max(min(_FEW, setup.config.ppo.micro_batch_tokens // longest), 1)))


def _made_up(setup: Setup, rollout: Rollout, generator: torch.Generator) -> Experience:
    """An experience whose ratios are 1 and whose advantages and returns are drawn."""
    module, sequences = setup.runtime.plain_module, rollout.sequences
    with torch.no_grad(), setup.runtime.autocast():
        now = module(*model_inputs(sequences.to(setup.runtime.device)))
    assert now.values is not None, "training has a critic"
    values = now.values.float().cpu()
    drawn = [torch.randn(values.shape, generator=generator) for _ in range(2)]
    return Experience(
        sequences=sequences,
        old_logprobs=now.logprobs.float().cpu(),
        old_values=values,
        rewards=torch.zeros_like(values),
        advantages=drawn[0],
        returns=values + drawn[1],
    )


def _dropout(module: nn.Module) -> list[str]:
    """Places where a pass in training mode would drop something."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Dropout) and layer.p > 0:
            found.append(name)
        found += [f"{name}.{key}" for key, p in vars(layer).items() if "drop" in key and isinstance(p, float) and p > 0]
    return found


def set_up(config: Config, reward: RewardFunction | None) -> Setup:
    """The run as training would set it up, after the same checks. Raises `ConfigError`."""
    check_trainable(config)
    config = places.absolute(config)
    runtime = start(config)
    check_folder(config, runtime)
    return Setup.of(config, runtime, reward)


def _stand_in(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """In place of a reward that cannot be had, so that the rest can be looked at."""
    return [float(len(response)) for response in responses]


def _listed(values: Sequence[str] | None) -> str:
    return "null" if values is None else f"[{', '.join(map(repr, values))}]"


def diagnose(
    source: str | Path, overrides: Sequence[str] = (), *, say: Callable[[str], None] = say, processes: int = 1
) -> tuple[Doctor, Config | None]:
    """All checks of a run's config; the doctor with its findings, and the config that the plan may be made from."""
    doctor = Doctor(say, processes=processes)
    config = doctor.read(source, overrides)
    if config is None:
        return doctor, None
    if config.run.resume is not None:
        doctor.note("ok", "resume", f"run.resume={config.run.resume} is not read: this looks at the run as a new one")
        config = _elsewhere(config)
    doctor.look(config)
    if config.reward.model is not None and doctor.paths is not None:
        with contextlib.suppress(ConfigError):  # the setup says it
            doctor.paths = (doctor.paths[0], wheels.resolve_model(config.reward.model, "reward.model"))
    say("        building the run …")
    setup = doctor.build(config)
    if setup is not None:
        doctor.examine(setup)
    return doctor, config


def show_plan(
    config: Config,
    doctor: Doctor,
    *,
    launch: plan.Launch,
    memory: int,
    say: Callable[[str], None] = say,
) -> None:
    """The memory plan of this launch, of each stage beside it, and what fits `memory` bytes of each GPU, or of this
    machine; a launch that does not fit is a problem."""
    assert doctor.paths is not None and doctor.base is not None, "look() comes first"
    sizes = plan.measure(config, *doctor.paths, device=launch.device)
    made = plan.plan(config, sizes, launch, base=doctor.base)
    of = "of each GPU" if launch.device == "cuda" else "of this machine"
    say(f"\nmemory of {launch} on {launch.device}, {sizes.learned:,} of {sizes.held:,} parameters learn\n")
    say(plan.table(made))
    say("\n" + plan.overview(config, sizes, launch, base=doctor.base) + "\n")
    limit = f"{memory / plan.MIB:,.0f} MiB {of}"
    if plan.fits(made, memory):
        doctor.note("ok", "memory", f"{launch} peaks at {made.peak / plan.MIB:,.0f} MiB a rank and fits {limit}")
    else:
        steps, mended = plan.advice(config, launch, memory=memory, base=doctor.base, paths=doctor.paths)
        works = f"{' '.join(steps)} brings it to {mended.peak / plan.MIB:,.0f} MiB"
        mend = works if plan.fits(mended, memory) else f"nothing in reach fits ({works})" if steps else "nothing helps"
        doctor.note("problem", "memory", f"{launch} needs {made.peak / plan.MIB:,.0f} MiB a rank, {limit}: {mend}")
    least = plan.smallest(config, sizes, memory=memory, base=doctor.base, device=launch.device)
    if least is not None:
        say(f"smallest that fits as configured: {least.launch}, {least.peak / plan.MIB:,.0f} MiB a rank")
    else:
        say("no launch of up to 64 processes fits as configured")


USAGE = """usage: python -m rlhf_accel doctor [--config RECIPE_OR_FILE] [--section.key value ...]
       [--num_processes N] [--zero_stage 0|1|2|3] [--offload true] [--gpu_memory 80GiB]

Checks a run before it costs anything and plans its memory; writes nothing. The status is 0 if nothing is a problem,
else 2. --gpu_memory plans for GPUs of that size, also on a machine without one."""


def main(arguments: list[str]) -> None:
    """The command: prints findings and plan, and leaves with status 2 if anything is a problem."""
    if "-h" in arguments or "--help" in arguments:
        say(f"{USAGE}\n\n{describe(Config)}")
        return
    started = time.perf_counter()
    rest = list(arguments)
    source = take_option(rest, "config", "RECIPE_OR_FILE") or DEFAULT_RECIPE
    processes = _count(take_option(rest, "num_processes", "N"), "--num_processes", 1)
    stage = _count(take_option(rest, "zero_stage", "0|1|2|3"), "--zero_stage", 0)
    offload = take_option(rest, "offload", "true|false") or "false"
    if offload not in ("true", "false"):
        raise ConfigError(f"--offload {offload}: expected true or false", key="--offload")
    said = take_option(rest, "gpu_memory", "80GiB")
    device = "cuda" if said is not None or has_gpu() else "cpu"
    if said is not None:
        memory = plan.parse_memory(said)
    elif device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = psutil.virtual_memory().total
    launch = plan.Launch(processes=processes, zero_stage=stage, offload=offload == "true", device=device)
    launch.check()
    doctor, config = diagnose(source, rest, processes=processes)
    if config is not None and doctor.paths is not None:
        with doctor._checking("memory"):
            show_plan(config, doctor, launch=launch, memory=memory)
    problems = sum(finding.level == "problem" for finding in doctor.findings)
    cautions = sum(finding.level == "warning" for finding in doctor.findings)
    say(f"\n{problems} problem(s), {cautions} warning(s) in {time.perf_counter() - started:.0f} s")
    if problems:
        sys.exit(2)


def _count(said: str | None, key: str, default: int) -> int:
    if said is None:
        return default
    if not said.isdecimal():
        raise ConfigError(f"{key} {said}: expected a whole number", key=key)
    return int(said)
