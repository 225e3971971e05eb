"""Counts of what a run reads and copies on the pretended device: per token, sampling pass, micro-batch and so on."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rlhf_accel.reward.classifier import Classifier
from rlhf_accel.rollout import drawing, engine
from rlhf_accel.rollout.collector import Collector
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.device import pretend

ROWS, SHORT, LONG = 4, 4, 8
SAMPLED: dict[str, dict[str, Any]] = {
    "token": {},
    "token, min_new_tokens": {"min_new_tokens": 8},
    "token, stop texts": {"stop": ("#+#",)},
    "token, top_k and top_p": {"top_k": 50, "top_p": 0.9},
    "token, static form": {"static_cache": "always"},
    "token, static form with stop texts": {"static_cache": "always", "stop": ("#+#",)},
}


def counts(bench: Any) -> dict[str, dict[str, Any]]:
    """By unit: how many of each kind there are for one of it, and where."""
    with pretend.Device() as device:
        trainer = PPOTrainer(bench.config("counted", run={"eval_samples": 0}, reward=_classifier(bench)))
        found = {name: _per_token(device, trainer, changes) for name, changes in SAMPLED.items()}
        found["sampling pass"] = _per_pass(device, trainer)
        device.counts.clear()
        units: Counter[str] = Counter()
        with _phases(device, units):
            trainer.progress = replace(trainer.progress, step=1)  # the first step has checks of its own
            trainer.step(trainer.setup.prompts.batch(2, 8))
        for unit in ("forward pass", "micro-batch", "minibatch", "classifier batch", "step"):
            found[unit] = _of(device, unit, units[unit])
    return found


def casts(bench: Any) -> dict[str, int]:
    """How many weights of a frozen fp32 base are cast for responses of two lengths: all of them once."""
    sections = {"run": {"eval_samples": 0, "precision": "bf16"}, "lora": {"r": 4}}
    with pretend.Device() as device:
        trainer = PPOTrainer(bench.config("cast", model={"name_or_path": "llama"}, **sections))
        found = {}
        for name, length in (("short", SHORT), ("long", LONG)):
            device.casts.clear()
            _sampled(device, trainer, {"max_new_tokens": length})
            found[name] = sum(device.casts.values())
    return found


def planted_read(bench: Any) -> dict[str, Any]:
    """The counts per token with an `.item()` planted in each."""
    whole = drawing.pick

    def reads(probabilities: Any, uniform: Any) -> Any:
        tokens = whole(probabilities, uniform)
        tokens[0].item()
        return tokens

    drawing.pick = reads
    try:
        with pretend.Device() as device:
            trainer = PPOTrainer(bench.config("counted again", run={"eval_samples": 0}))
            return _per_token(device, trainer, {})
    finally:
        drawing.pick = whole


def _classifier(bench: Any) -> dict[str, Any]:
    return {"function": [], "model": "classifier", "label": "POSITIVE", "batch_size": 4}


def _per_token(device: pretend.Device, trainer: PPOTrainer, changes: dict[str, Any]) -> dict[str, Any]:
    """Of a longer response less those of a shorter, for each token that it is longer; no response ends before."""
    short, long = (_sampled(device, trainer, {**changes, "max_new_tokens": length}) for length in (SHORT, LONG))
    more = {key: long[key] - short[key] for key in long | short}
    return _figures(Counter({key: number for key, number in more.items() if number}), LONG - SHORT)


def _per_pass(device: pretend.Device, trainer: PPOTrainer) -> dict[str, Any]:
    """What a pass takes beside its tokens."""
    short, long = (_sampled(device, trainer, {"max_new_tokens": length}) for length in (SHORT, LONG))
    once = {key: short[key] - (long[key] - short[key]) * SHORT // (LONG - SHORT) for key in long | short}
    return _figures(Counter({key: number for key, number in once.items() if number}), 1)


def _sampled(device: pretend.Device, trainer: PPOTrainer, changes: dict[str, Any]) -> Counter[Any]:
    plain = {"min_new_tokens": 0, "static_cache": "never"}
    settings = replace(trainer.config.rollout, forward_batch_size=ROWS, **{**plain, **changes})
    if settings.min_new_tokens:
        settings = replace(settings, min_new_tokens=settings.max_new_tokens)
    prompts = trainer.setup.prompts.batch(1, ROWS)
    device.counts.clear()
    generated = trainer.collector.engine.generate(prompts, settings, Seeds(0, 1))
    assert bool(generated.response_mask.all()), "a response ended: other prompts are needed"
    return Counter(device.counts)


def _of(device: pretend.Device, phase: str, units: int) -> dict[str, Any]:
    return _figures(Counter({key: n for key, n in device.counts.items() if key[0] == phase}), units)


def _figures(counted: Counter[Any], units: int) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    for (_, kind, _, _), number in counted.items():
        kinds[kind] += number
    where = [f"{number / units:.2f} {kind}: {name} at {place}" for (_, kind, name, place), number in counted.items()]
    return {"units": units, "each": {kind: n / units for kind, n in sorted(kinds.items())}, "where": sorted(where)}


@contextlib.contextmanager
def _phases(device: pretend.Device, units: Counter[str]) -> Iterator[None]:
    """Name what reads are counted for, and count its units."""
    with contextlib.ExitStack() as stack:

        def counted(phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                units[phase] += 1
                with device.counted_as(phase):
                    return work(*args, **kwargs)

            return run

        def patched(owner: Any, name: str, change: Callable[[Any], Any]) -> None:
            before = getattr(owner, name)
            setattr(owner, name, change(before))
            stack.callback(setattr, owner, name, before)

        def of_loss(make: Callable[..., Any]) -> Callable[..., Any]:
            """The copies when it is made, and its forward pass, whose units are not counted twice."""

            def run(*args: Any, **kwargs: Any) -> Any:
                with device.counted_as("micro-batch"):
                    return counted("micro-batch", make(*args, **kwargs))

            return run

        patched(PPOTrainer, "step", lambda work: counted("step", work))
        patched(PPOTrainer, "_update_minibatch", lambda work: counted("minibatch", work))
        patched(PPOTrainer, "_loss", of_loss)
        patched(engine.BuiltinEngine, "generate", lambda work: counted("sampling", work))
        patched(Collector, "_passes", lambda work: counted("forward pass", work))
        patched(Classifier, "logits", lambda work: counted("classifier batch", work))
        yield
