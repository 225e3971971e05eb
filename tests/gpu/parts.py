"""The parts of the GPU check. Each returns figures, raises `Skipped` for what is not here, or fails."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_accel.commands import memory_plan, replay
from rlhf_accel.commands.model_sizes import measure
from rlhf_accel.config.loading import to_yaml
from rlhf_accel.models.calls import model_inputs
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.runs.dumps import read_dump
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.transfer import to_device, to_host
from tests.gpu.bench import ROOT, Bench, Skipped, launched_for, need_gpu, quiet, steps

Figures = dict[str, Any]
LORA = {"r": 16, "alpha": 32.0}
SHOWN = ("objective/kl_k3", "policy/first_ratio_error", "time/rollout", "time/update", "perf/peak_memory_mib")
COMPARED = ("objective/score", "objective/kl", "objective/entropy", "loss/policy", "loss/value", "optim/grad_norm")
OPTIONS: dict[str, dict[str, Any]] = {
    "critic separate": {"model": {"critic": "separate"}},
    "critic adapter": {"model": {"critic": "adapter"}, "lora": LORA},
    "checkpointing": {"model": {"gradient_checkpointing": True}, "lora": LORA},
    "top_k and top_p": {"rollout": {"top_k": 50, "top_p": 0.9, "min_new_tokens": 2}},
    "stop texts": {"rollout": {"stop": ["7", "3"]}},
    "dora": {"lora": {**LORA, "use_dora": True}},
}
STAGES = ("zero1", "zero2", "zero3", "zero3_offload")


def full(bench: Bench) -> Figures:
    """Two steps of full fine-tuning in auto precision."""
    return _two_steps(bench, "full", {})


def lora(bench: Bench) -> Figures:
    """Two steps of LoRA over a frozen base in auto precision."""
    return _two_steps(bench, "lora", {"kind": "llama", "lora": LORA})


def first_ratios(bench: Bench) -> Figures:
    """How far log-probabilities of sampling are from those of one pass, by token."""
    trainer = bench.trainer("ratios", rollout={"max_new_tokens": 8 if bench.tiny else 64})
    runtime, size = trainer.runtime, 8 if bench.tiny else 64
    off = []
    for number in (1, 2):
        drawn = trainer.collector.sample(trainer.setup.prompts.batch(number, size), Seeds(0, number))
        with torch.no_grad(), runtime.autocast():
            passed = runtime.plain_module(*model_inputs(drawn.sequences.to(runtime.device)))
        off.append((passed.logprobs.float().cpu() - drawn.logprobs)[drawn.sequences.response_mask].abs())
    errors = torch.cat(off).double()
    assert bool(errors.isfinite().all()), "a log-probability is not finite"
    quantiles = {f"p{share:g}": float(errors.quantile(share / 100)) for share in (50, 99, 99.9)}
    return {"tokens": len(errors), "rms": float(errors.square().mean().sqrt()), **quantiles, "max": float(errors.max())}


def against_cpu(bench: Bench) -> Figures:
    """A step in fp32 here and on the CPU."""
    exact = {"precision": "fp32", "matmul_precision": "highest"}
    found = {}
    for device in ("cpu", "here"):
        with launched_for(device):
            trainer = bench.trainer(f"fp32 {device}", small=True, run=exact, model={"dtype": "fp32"})
            (found[device],) = steps(trainer, 1)
    off = {name: abs(found["here"][name] - found["cpu"][name]) for name in COMPARED}
    assert max(off.values()) < 1e-2, off
    return off


def options(bench: Bench) -> Figures:
    """A step with each critic and option, which passes the checks of step 1."""
    return {name: _one_step(bench, name, sections) for name, sections in OPTIONS.items()}


def resume(bench: Bench) -> Figures:
    """The second step of a run that was stopped and resumed, and of one that was not."""
    run = {"precision": "fp32", "matmul_precision": "highest"}
    settings: dict[str, Any] = {"small": True, "model": {"dtype": "fp32"}, "optim": {"schedule": "constant"}}
    bench.trainer("through", run=run, **settings).fit()
    bench.trainer("stopped", run={**run, "total_steps": 1, "save_every": 1}, **settings).fit()
    bench.trainer("stopped", run={**run, "resume": "latest", "changes": ["run.total_steps"]}, **settings).fit()
    rows = [
        json.loads((bench.work / name / "metrics.jsonl").read_text().splitlines()[1]) for name in ("through", "stopped")
    ]
    off = {name: abs(rows[0][name] - rows[1][name]) for name in COMPARED}
    assert max(off.values()) < 1e-3, off
    return off


def copies(bench: Bench) -> Figures:
    """Copies that do not wait arrive whole, behind a long queue of work."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 64 if bench.tiny else 8192
    sent = [torch.full((1000,), float(number)) for number in range(50)]
    load = torch.ones(size, size, device=device)
    arrived = []
    for tensor in sent:
        load = load @ load / size
        arrived.append(to_device(tensor, device) + load[0, 0])
    back = to_host(arrived)
    assert all(torch.equal(one, other + 1) for one, other in zip(back, sent, strict=True))
    return {"copies": len(back)}


def overflow(bench: Bench) -> Figures:
    """A classifier whose scores overflow fp16 is refused before the first step."""
    folder, base = bench.work / "overflowing", bench.model("gpt2", small=True)
    settings = AutoConfig.from_pretrained(base, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(settings)
    with torch.no_grad():
        model.score.weight.fill_(6e4)
        model.transformer.ln_f.bias.fill_(1e2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    reward = {"function": [], "model": str(folder), "dtype": "fp16"}
    try:
        bench.trainer("overflow", small=True, reward=reward)
    except ConfigError as error:
        assert "finite" in str(error), error
        return {"message": str(error)[:120]}
    raise AssertionError("scores beyond fp16 were accepted")


def overflow_replayed(bench: Bench) -> Figures:
    """A run that ends as some scores overflow fp16, and `replay` of its dump, which finds these samples again."""
    folder, base = bench.work / "sometimes overflowing", bench.model("gpt2", small=True)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    embeddings = model.transformer
    with torch.no_grad():
        embeddings.wpe.weight[:, 0] += 1e4
        embeddings.wte.weight[3:10, 0] = 6e4  # of w3 to w9, which no prompt has
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    reward, run = {"function": [], "model": str(folder), "dtype": "fp16"}, {"max_skipped_steps": 1}
    trainer = bench.trainer("overflow replayed", small=True, run=run, rollout={"batch_size": 32}, reward=reward)
    try:
        trainer.fit()
    except RunFailed as stopped:
        assert "scores are not finite" in str(stopped), stopped
    else:
        raise AssertionError("scores beyond fp16 did not end the run")
    dump, where = replay.with_arithmetic_of_the_run(read_dump(trainer.folder / "dumps" / "step-000001"))
    scores = [row["score"] for row in replay.replay_reward(dump)]
    again = {sample for sample, score in enumerate(scores) if not math.isfinite(score)}
    # A kernel for a padded batch may hide an infinity that the one for a single text shows.
    assert set(dump.facts["rows"]) <= again and len(again) < len(scores), (again, dump.facts["rows"])
    return {"samples": len(scores), "not finite": len(dump.facts["rows"]), "alone": len(again), "replayed": where}


def plan(bench: Bench) -> Figures:
    """The plan of `doctor` and the peak of the full fine-tuning, in MiB."""
    need_gpu()
    others = torch.cuda.memory_allocated()
    longest = {"min_new_tokens": 8 if bench.tiny else 64}
    trainer = bench.trainer("plan", ppo={"num_minibatches": 1}, rollout=longest)
    torch.cuda.reset_peak_memory_stats()
    steps(trainer, 2)
    peak = (torch.cuda.max_memory_allocated() - others) / 2**20
    sizes = measure(trainer.config, bench.model("gpt2"), device="cuda")
    made = memory_plan.plan(trainer.config, sizes, memory_plan.Launch(processes=1, device="cuda"), base=0)
    planned = (made.peak - memory_plan.CUDA_CONTEXT) / 2**20
    return {"planned": planned, "peak": peak, "ratio": planned / peak}


def four_bits(bench: Bench) -> Figures:
    """A step of LoRA over a base in 4 bits."""
    need_gpu()
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("needs bitsandbytes")
    sections = {"kind": "llama", "lora": LORA, "model": {"load_in_4bit": True}}
    return {"first_ratio_error": _one_step(bench, "4 bits", sections, small=False)}


_COLLECTIVES = """
import torch, torch.distributed as dist
backend = "nccl" if torch.cuda.is_available() else "gloo"
dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
one = torch.ones(4, device=device); dist.all_reduce(one)
rows = [torch.empty(4, device=device)]; dist.all_gather(rows, one)
assert rows[0].sum().item() == 4; print(backend)
dist.destroy_process_group()
"""


def collectives(bench: Bench) -> Figures:
    """NCCL's collectives with one process; gloo's where there is no GPU."""
    return {"backend": _run([sys.executable, "-c", _COLLECTIVES]).split()[-1]}


def zero(bench: Bench) -> Figures:
    """A run of two steps under each stage of ZeRO, with one process."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Skipped("needs deepspeed")
    found = {}
    for stage in STAGES:
        config = bench.config(stage, small=True, run={"precision": "fp32"}, model={"dtype": "fp32"})
        place = bench.work / f"{stage}.yaml"
        place.write_text(to_yaml(config), encoding="utf-8")
        launch = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{stage}.yaml"]
        _run([sys.executable, *launch, "--num_processes", "1", "scripts/train.py", "--config", str(place)])
        rows = (bench.work / stage / "metrics.jsonl").read_text().splitlines()
        found[stage] = json.loads(rows[-1])["objective/score"]
    assert max(found.values()) - min(found.values()) < 1e-2, found
    return found


def speed(bench: Bench) -> Figures:
    """Seconds by phase of the benchmark's workloads for a GPU, W7 and W8."""
    found = {}
    for name in ("W6",) if bench.tiny else ("W7", "W8"):
        output = _run([sys.executable, "scripts/benchmark.py", name, "--steps", "1" if bench.tiny else "3"])
        found[name] = " ".join(line for line in output.splitlines() if re.search(r"\d s\b|seconds", line))[:300]
    return found


def trl(bench: Bench) -> Figures:
    """W7 and W8 beside trl's trainer, in this environment."""
    if importlib.util.find_spec("trl") is None:
        raise Skipped("needs trl 1.12.0 here; or scripts/benchmark.py W7 W8 --against trl [--wheels FOLDER]")
    found = {}
    for name in ("W6",) if bench.tiny else ("W7", "W8"):
        options = ["--against", "trl", "--peer-python", sys.executable, "--steps", "2"]
        output = _run([sys.executable, "scripts/benchmark.py", name, *options])
        found[name] = " ".join(line for line in output.splitlines() if "faster than" in line)[:300]
    return found


def graphs(bench: Bench) -> Figures:
    """Sampling by captured graphs, or on a CPU in the same form without them, beside the plain loop."""
    on_gpu, length = torch.cuda.is_available(), 8 if bench.tiny else 128
    if not on_gpu and not bench.tiny:
        raise Skipped("needs a GPU")
    exact = {"precision": "fp32", "matmul_precision": "highest"}
    rollout = {"max_new_tokens": length, "min_new_tokens": length // 4, "static_cache": "always"}
    trainer = bench.trainer("graphs", kind="llama", run=exact, model={"dtype": "fp32"}, rollout=rollout)
    engine, prompts = trainer.collector.engine, trainer.setup.prompts.batch(1, trainer.config.rollout.batch_size)
    found, seconds = {}, {}
    for kind in ("never", "always"):
        settings = replace(trainer.config.rollout, static_cache=kind)
        for seed in (0, 1):  # the first warms up
            began = time.perf_counter()
            found[kind] = engine.generate(prompts, settings, Seeds(seed, 1))
            seconds[kind] = time.perf_counter() - began
    assert engine.static.refused is None and engine.static.graphs == on_gpu, engine.static
    plain, static = found["never"], found["always"]
    same = (plain.responses == static.responses).all(1)
    off = (plain.logprobs - static.logprobs)[same].abs().max()
    share = float(same.double().mean())
    assert share >= (0.9 if on_gpu else 1.0) and float(off) < 1e-3, (share, float(off))
    return {"same rows": share, "logprob error": float(off), "plain s": seconds["never"], "static s": seconds["always"]}


PARTS: dict[str, Callable[[Bench], Figures]] = {
    part.__name__: part
    for part in (
        *(full, lora, first_ratios, against_cpu, options, resume, copies, overflow, overflow_replayed, plan),
        *(four_bits, collectives, zero, speed, trl, graphs),
    )
}


def _two_steps(bench: Bench, name: str, sections: dict[str, Any]) -> Figures:
    trainer = bench.trainer(name, **sections)
    first, second = steps(trainer, 2)
    return {"device": trainer.runtime.device.type, "precision": trainer.runtime.precision} | {
        key: (first if key.startswith(("objective", "policy")) else second)[key] for key in SHOWN
    }


def _one_step(bench: Bench, name: str, sections: dict[str, Any], *, small: bool = True) -> float:
    with quiet():
        return steps(bench.trainer(f"option {name}", small=small, **sections), 1)[0]["policy/first_ratio_error"]


def _run(command: list[str]) -> str:
    """What a process printed; fails with the end of its errors."""
    paths = [str(ROOT), str(Path(ROOT, "scripts")), *filter(None, [os.environ.get("PYTHONPATH")])]
    here = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    settings = {**os.environ, **here, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout
