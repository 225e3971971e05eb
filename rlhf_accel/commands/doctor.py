"""Check a run before it costs anything: each check prints one line, ok, a warning or a problem with the key to change.

The run is built as training would build it, in one process, and samples from the policy. Then all of it is discarded:
no folder is made and nothing is trained. Knows the order of the checks; `memory_plan` knows the memory of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rlhf_accel.algorithm.batches import Rollout
from rlhf_accel.commands import memory_plan as plan
from rlhf_accel.commands.checks import model_checks, reward_checks
from rlhf_accel.commands.checks.building import build, in_a_free_folder
from rlhf_accel.commands.checks.config_checks import check_config, read
from rlhf_accel.commands.checks.data_checks import check_data
from rlhf_accel.commands.checks.findings import Findings
from rlhf_accel.commands.model_sizes import measure
from rlhf_accel.config.schema import Config
from rlhf_accel.data import wheels
from rlhf_accel.models import probes
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.system.arithmetic import has_gpu, unused_device
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.terminal import counted, say
from rlhf_accel.training.setup import Setup

_SAMPLES = 64  # responses of the reference, for the checks of reward and stops


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The findings, and the inputs of a memory plan, None where they are not known."""

    findings: Findings
    config: Config | None = None
    paths: tuple[str, str | None] | None = None
    """Folders of policy and reward model."""
    base: int = 0
    """Bytes of this process before it holds any model."""


def main(options: argparse.Namespace) -> None:
    """Prints findings and plan, and exits with status 2 if there is a problem."""
    started = time.perf_counter()
    size = options.gpu_memory
    device = "cuda" if size is not None or has_gpu() else "cpu"
    if size is not None:
        memory = plan.parse_memory(size)
    elif device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = psutil.virtual_memory().total
    launch = plan.Launch(
        processes=options.processes, zero_stage=options.zero_stage, offload=options.offload, device=device
    )
    launch.check()
    diagnosis = diagnose(options.source, options.overrides, processes=options.processes)
    with diagnosis.findings.checking("memory"):
        show_plan(diagnosis, launch=launch, memory=memory)
    levels = [finding.level for finding in diagnosis.findings]
    problems, warnings = levels.count("problem"), levels.count("warning")
    found = f"{counted(problems, 'problem')}, {counted(warnings, 'warning')}"
    say(f"\n{found} in {time.perf_counter() - started:.0f} s")
    if problems:
        sys.exit(2)


def diagnose(
    source: str | Path, overrides: Sequence[str] = (), *, printer: Callable[[str], None] = say, processes: int = 1
) -> Diagnosis:
    """All checks of a run's config."""
    findings = Findings(printer)
    config = read(findings, source, overrides)
    if config is None:
        return Diagnosis(findings=findings)
    if config.run.resume is not None:
        findings.note("ok", "resume", f"run.resume={config.run.resume} is ignored: the run is checked as a new one")
        config = in_a_free_folder(config)
    policy, base = check_data(findings, config)
    check_config(findings, config, processes)
    reward = None
    if config.reward.model is not None and policy is not None:
        with contextlib.suppress(ConfigError):  # building the run reports it
            reward = wheels.resolve_model(config.reward.model, "reward.model")
    printer("        building the run …")
    setup = build(findings, config)
    if setup is not None:
        examine(findings, setup)
    return Diagnosis(findings=findings, config=config, paths=None if policy is None else (policy, reward), base=base)


def examine(findings: Findings, setup: Setup) -> None:
    """The checks of a run that is built: samples, scores, KL, ratio, gradient, all before any training."""
    config = setup.config
    findings.note("ok", "fp32 products", probes.fp32_products(setup.runtime.device).message)
    unused = unused_device()
    if unused is not None:
        findings.note("warning", "device", unused)
    if setup.left_out is not None:
        findings.note("warning", "text only", setup.left_out)
    with findings.checking("vocabulary"):
        model_checks.check_vocabulary(findings, setup)
    if config.lora.r > 0:
        findings.check("adapters", model_checks.check_adapters, setup)
    findings.printer(f"        sampling {_SAMPLES} responses of the reference …")
    rollout: Rollout | None = None
    with findings.checking("sampling"):
        rollout = _sampled(findings, setup)
    with findings.checking("reward label"):
        reward_checks.check_label(findings, setup)
    if rollout is None:
        return
    with findings.checking("reference"):
        model_checks.check_reference(findings, setup, rollout)
    with findings.checking("ratio"):
        model_checks.check_ratio(findings, setup, rollout)
    if not config.reward.calibrate:  # calibration will put the scores on another scale
        with findings.checking("values"):
            model_checks.check_values(findings, setup, rollout)
    findings.check("gradient", model_checks.check_gradient, setup, rollout)


def _sampled(findings: Findings, setup: Setup) -> Rollout:
    """Responses of the reference with their scores, which are checked."""
    prompts = setup.prompts.batch(1, _SAMPLES)
    with setup.runtime.gathered():
        responses = setup.collector.sample(prompts, Seeds(setup.config.run.seed, 0))
    scores = torch.zeros(len(responses))
    with findings.checking("reward"):
        scores = reward_checks.check_scores(findings, setup, responses)
    partial_scores = torch.zeros(responses.sequences.responses.shape)
    if setup.config.reward.partial_every:
        with findings.checking("partial scores"):
            partial_scores = reward_checks.check_partial_scores(findings, setup, responses, scores)
    findings.check("stops", model_checks.check_ends, setup, responses)
    with torch.no_grad():
        return setup.collector.forward(prompts, responses, scores, partial_scores)


def show_plan(diagnosis: Diagnosis, *, launch: plan.Launch, memory: int) -> None:
    """Print the memory plan of this launch and of each ZeRO stage, and what fits `memory` bytes of each GPU or of this
    machine. A launch that does not fit is a problem."""
    config, paths, base, findings = diagnosis.config, diagnosis.paths, diagnosis.base, diagnosis.findings
    if config is None or paths is None:
        return
    sizes = measure(config, *paths, device=launch.device)
    made = plan.plan(config, sizes, launch, base=base)
    of = "of each GPU" if launch.device == "cuda" else "of this machine"
    say(f"\nmemory of {launch} on {launch.device}, {sizes.trainable:,} of {sizes.held:,} parameters are trainable\n")
    say(plan.table(made))
    say("\n" + plan.overview(config, sizes, launch, base=base) + "\n")
    if config.reward.on_policy_base:
        saved = (sizes.reward_own - sizes.reward) / plan.MIB
        say(f"reward.on_policy_base=true saves {saved:,.1f} MiB per process, those of a reward model of its own")
    limit = f"{memory / plan.MIB:,.0f} MiB {of}"
    if plan.fits(made, memory):
        peak = f"{made.peak / plan.MIB:,.0f} MiB per process"
        findings.note("ok", "memory", f"{launch} peaks at {peak} and fits {limit}")
    else:
        steps, changed = plan.advice(config, launch, memory=memory, base=base, paths=paths)
        effect = f"{' '.join(steps)} brings it to {changed.peak / plan.MIB:,.0f} MiB"
        fix = effect if plan.fits(changed, memory) else f"nothing fits ({effect})" if steps else "nothing helps"
        need = f"{made.peak / plan.MIB:,.0f} MiB per process"
        findings.note("problem", "memory", f"{launch} needs {need}, which exceeds {limit}: {fix}")
    least = plan.smallest(config, sizes, memory=memory, base=base, device=launch.device)
    if least is not None:
        say(f"smallest that fits as configured: {least.launch}, {least.peak / plan.MIB:,.0f} MiB per process")
    else:
        say("no launch of up to 64 processes fits as configured")
