"""The memory of a run, by process and phase: arithmetic over the sizes of its models, its config and its launch.

docs/memory.md explains the sums with their sources. Knows no model, no data and no process but this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rlhf_accel.commands.model_sizes import Sizes, longest_sample, measure
from rlhf_accel.config.schema import BatchSizes, Config, sampled_at_once
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.terminal import counted

MIB = 2**20
FP32 = 4  # bytes of a trainable parameter, of its gradient and of each of AdamW's two moments

# DeepSpeed's defaults, in parameters, which ds_configs/ leaves as they are: zero_optimization.reduce_bucket_size, which
# the runtime lowers to the number of trainable parameters, and .stage3_max_live_parameters.
REDUCE_BUCKET, MOST_GATHERED = 500_000_000, 1_000_000_000

# Memory of a GPU beside torch's tensors, as others measured it; not checked here. The CUDA context: 534 MiB on an H100
# (https://github.com/meta-pytorch/torchcomms/pull/777), and kernels that are loaded later. A communicator of NCCL:
# up to 688 MB on A100s (https://github.com/NVIDIA/nccl/issues/964). The launch makes one, and DeepSpeed another.
CUDA_CONTEXT, NCCL_COMMUNICATOR = 600 * MIB, 688 * MIB

PHASES = ("load", "rollout", "score", "update")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a run is launched. `offload` is the one of accelerate_configs/zero3_offload.yaml; `device` is cpu or cuda."""

    processes: int = 1
    zero_stage: int = 0
    offload: bool = False
    device: str = "cpu"

    def check(self) -> None:
        """Raises `ConfigError` if there is no such launch."""
        if self.processes < 1:
            raise ConfigError(f"--num_processes {self.processes}: expected at least 1", key="--num_processes")
        if self.zero_stage not in range(4):
            raise ConfigError(f"--zero_stage {self.zero_stage}: expected 0 (no ZeRO), 1, 2 or 3", key="--zero_stage")
        if self.offload and self.zero_stage != 3:
            raise ConfigError(f"--offload true needs --zero_stage 3, found {self.zero_stage}", key="--offload")

    def __str__(self) -> str:
        name = f"ZeRO-{self.zero_stage}" if self.zero_stage else "no ZeRO"
        return f"{counted(self.processes, 'process', 'processes')}, {name}{' with offload' if self.offload else ''}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of each part in each phase, on the process that needs most; `phases` has the names of PHASES."""

    launch: Launch
    phases: Mapping[str, Mapping[str, int]]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        return max(map(self.total, self.phases))


def plan(config: Config, sizes: Sizes, launch: Launch, *, base: int) -> Plan:
    """The memory of each phase, on the process that needs most. `base` is the memory of a process before it holds any
    model, in bytes: libraries, tokenizer, prompts.

    On a GPU, the plan is that of the GPU's memory, without `base`; host memory for loading, offloading and saving is
    not counted. Raises `ConfigError` if there is no such launch.
    """
    launch.check()
    n, stage, on_gpu = launch.processes, launch.zero_stage, launch.device == "cuda"
    away = launch.offload and on_gpu  # to the host's memory, which on a CPU is the same memory
    cut = n if stage == 3 else 1
    gradients, bucket = FP32 * sizes.trainable, FP32 * min(sizes.trainable, REDUCE_BUCKET)
    always = {
        "process": CUDA_CONTEXT if on_gpu else base,
        "NCCL": (2 if stage else 1) * NCCL_COMMUNICATOR if on_gpu and n > 1 else 0,
        "weights": 0 if away else -(-sizes.weights // cut),
        "reference": 0 if away else -(-sizes.reference // cut),
        "reward model": sizes.reward,
        "optimizer": 0 if away else -(-2 * gradients // (n if stage else 1)),
        "master weights": -(-gradients // n) if stage in (1, 2) else 0,
    }
    if stage == 3:  # DeepSpeed keeps both from one step to the next
        always |= {"gradients": 0 if away else -(-gradients // n), "buckets": bucket}

    rows = _Rows.of(config, n, on_gpu=on_gpu)
    vocabulary = sizes.logits_row // config.rollout.max_new_tokens
    # For one token at a time, sampling holds the logits, their softmax, its cumulative sum and one product of these.
    sampling = {
        "packed weights": sizes.packed,
        "rounded weights": sizes.fixed,  # autocast keeps them from token to token
        "KV cache": rows.sampled * sizes.cache_row,
        "logits": 4 * rows.sampled * vocabulary,
        "activations": rows.sampled * sizes.layer_row // longest_sample(config),
    }
    # The reference reads whole sequences without gradients: logits and softmax, and the activations of one layer.
    assessing = {"logits": 2 * rows.assessed * sizes.logits_row, "activations": rows.assessed * sizes.layer_row}
    gathers = stage == 3 and config.rollout.gather_parameters != "never"
    # A single process has all parts of ZeRO-3 and uses them in place.
    live = min(sizes.weights, MOST_GATHERED * sizes.weights // sizes.held) if stage == 3 and n > 1 else 0
    whole = {"gathered weights": sizes.weights if gathers else live}
    read_reference = {"gathered weights": whole["gathered weights"] + (sizes.reference if live else 0)}
    rollouts = (always | whole | sampling, always | read_reference | assessing)

    left = 0 if on_gpu else sizes.packed + rows.sampled * sizes.cache_row
    left_by_all = 0 if on_gpu else left + (sizes.weights if gathers else 0) + (sizes.reference if live else 0)
    return Plan(
        launch=launch,
        phases={
            "load": _loading(sizes, on_gpu, always),
            "rollout": max(rollouts, key=lambda parts: sum(parts.values())),
            "score": always | whole | {"activations": rows.read * sizes.reward_row, "kept pages": left},
            "update": always
            | _updating(config, sizes, launch, rows)
            | {"gathered weights": live, "kept pages": left_by_all},
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Samples in the largest pass of a process: sampling, reference, reward model, update; and passes of the update."""

    sampled: int
    assessed: int
    read: int
    updated: int
    passes: int

    @classmethod
    def of(cls, config: Config, processes: int, *, on_gpu: bool) -> _Rows:
        batch = BatchSizes.of(config)
        share, minibatch = -(-batch.rollout // processes), -(-batch.minibatch // processes)
        fitting = max(config.ppo.micro_batch_tokens // longest_sample(config), 1)
        return cls(
            sampled=min(sampled_at_once(config.rollout, processes, on_gpu=on_gpu), share),
            assessed=min(fitting, share),
            read=min(config.reward.batch_size, share),
            updated=min(fitting, minibatch),
            passes=-(-minibatch // fitting),
        )


def _updating(config: Config, sizes: Sizes, launch: Launch, rows: _Rows) -> dict[str, int]:
    """What the forward and backward passes and the optimizer step add."""
    n, stage, on_gpu = launch.processes, launch.zero_stage, launch.device == "cuda"
    gradients, bucket = FP32 * sizes.trainable, FP32 * min(sizes.trainable, REDUCE_BUCKET)
    activations = rows.updated * _activations_row(config, sizes) + sizes.fixed
    logits = 2 * rows.updated * sizes.logits_row  # and their softmax, which becomes their gradient
    passing = {"activations": activations, "logits": logits}
    if stage == 0:
        buckets = {"buckets": gradients if n > 1 else 0}  # those of DDP
        if rows.passes > 1 or n > 1:
            return passing | buckets | {"gradients": gradients}
        # In a single pass, activations are freed as gradients are made: the peak is either before or after.
        before = passing | {"gradients": FP32 * sizes.largest}
        return max(before, {"gradients": gradients}, key=lambda parts: sum(parts.values()))
    # To be summed over processes, the parts of a bucket are copied into one tensor. Gloo makes another copy of it in
    # ZeRO-3, and one of the whole weights when ZeRO-1 and ZeRO-2 gather them after the step.
    copies = bucket if n > 1 or stage == 3 else 0
    gloo = 0 if on_gpu else bucket if stage == 3 or n > 1 else 0
    collected = {"collectives": copies + gloo}
    if stage == 3:
        return passing | collected
    return passing | collected | {"buckets": bucket, "gradients": -(-gradients // (n if stage == 2 else 1))}


def _loading(sizes: Sizes, on_gpu: bool, always: Mapping[str, int]) -> dict[str, int]:
    """Each process reads all weights into its own memory, and copies them for the reference."""
    if on_gpu:
        return {name: always[name] for name in ("process", "NCCL")}
    whole = {"weights": sizes.weights, "reference": sizes.reference, "reward model": sizes.reward}
    return {"process": always["process"], **whole}


def _activations_row(config: Config, sizes: Sizes) -> int:
    if not config.model.gradient_checkpointing:
        return sizes.activations_row
    return sizes.inputs_row + sizes.outside_row + sizes.layer_row


def smallest(
    config: Config, sizes: Sizes, *, memory: int, base: int, device: str = "cpu", most: int = 64
) -> Plan | None:
    """The plan that fits with the fewest processes, and among those with the lowest stage; None if none of up to `most`
    processes fits. `memory` is in bytes: of each GPU, or of the machine, which its processes share."""
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    for processes in counts:
        for launch in _launches(processes, device):
            made = plan(config, sizes, launch, base=base)
            if _needs(made) <= memory:
                return made
    return None


def _launches(processes: int, device: str) -> Iterator[Launch]:
    """The simplest first. With a single process, a stage has nothing to partition."""
    for stage in (0, 1, 2, 3) if processes > 1 else (0,):
        yield Launch(processes=processes, zero_stage=stage, device=device)
    if device == "cuda":
        yield Launch(processes=processes, zero_stage=3, offload=True, device=device)


def _needs(made: Plan) -> int:
    """Memory of a GPU, which holds one process, or of a machine without GPUs, which holds all processes."""
    return made.peak if made.launch.device == "cuda" else made.peak * made.launch.processes


def fits(made: Plan, memory: int) -> bool:
    """Whether the plan needs at most `memory` bytes: of each GPU, or of the machine, which its processes share."""
    return _needs(made) <= memory


def advice(
    config: Config, launch: Launch, *, memory: int, base: int, paths: tuple[str, str | None]
) -> tuple[list[str], Plan]:
    """Changes by which this launch fits, the cheapest first, each on top of the ones before; and the plan with all of
    them, which may still not fit.

    `paths` are the folders of policy and reward model, as `measure` takes them.
    """
    steps: list[str] = []
    sizes = measure(config, *paths, device=launch.device)
    made = plan(config, sizes, launch, base=base)
    batch, longest = BatchSizes.of(config), longest_sample(config)
    least = max(longest, config.rollout.max_prompt_tokens + config.rollout.max_new_tokens)

    def fit() -> bool:
        return _needs(made) <= memory

    def improved(changed: Config) -> bool:
        """Take the change if it lowers the peak."""
        nonlocal config, made
        better = plan(changed, sizes, launch, base=base)
        if better.peak >= made.peak:
            return False
        config, made = changed, better
        return True

    rows = min(config.ppo.micro_batch_tokens // longest, -(-batch.rollout // launch.processes))
    while not fit() and rows > 1:
        rows //= 2
        tokens = max(rows * longest, least)
        if improved(replace(config, ppo=replace(config.ppo, micro_batch_tokens=tokens))):
            steps = [f"--ppo.micro_batch_tokens {tokens}"]
    at_once = sampled_at_once(config.rollout, launch.processes, on_gpu=launch.device == "cuda")
    before = steps
    while not fit() and at_once > 1:
        at_once //= 2
        if improved(replace(config, rollout=replace(config.rollout, forward_batch_size=at_once))):
            steps = [*before, f"--rollout.forward_batch_size {at_once}"]
    if not fit() and improved(replace(config, model=replace(config.model, gradient_checkpointing=True))):
        steps.append("--model.gradient_checkpointing true")
    if not fit() and config.lora.r == 0:
        config = replace(config, lora=replace(config.lora, r=16))
        sizes = measure(config, *paths, device=launch.device)
        made = plan(config, sizes, launch, base=base)
        steps.append("--lora.r 16")
    for wider in _launches(launch.processes, launch.device):
        if fit():
            break
        if (wider.zero_stage, wider.offload) > (launch.zero_stage, launch.offload):
            better = plan(config, sizes, wider, base=base)
            if better.peak < made.peak:
                made = better
                name = "zero3_offload" if wider.offload else f"zero{wider.zero_stage}"
                steps = [step for step in steps if "config_file" not in step]
                steps.append(f"accelerate launch --config_file accelerate_configs/{name}.yaml")
    return steps, made


def table(made: Plan) -> str:
    """Each part in each phase in MiB, and the sum of each phase. A phase is given by its peak."""
    names = list(dict.fromkeys(name for parts in made.phases.values() for name in parts))
    rows = [["MiB per process", *PHASES]]
    for name in names:
        figures = [made.phases[phase].get(name, 0) for phase in PHASES]
        if any(figures):
            rows.append([name, *(f"{figure / MIB:,.0f}" if figure else "" for figure in figures)])
    rows.append(["total", *(f"{made.total(phase) / MIB:,.0f}" for phase in PHASES)])
    return _aligned(rows)


def overview(config: Config, sizes: Sizes, launch: Launch, *, base: int) -> str:
    """The sum of each phase and the peak in MiB, for each ZeRO stage with these processes; this launch is marked."""
    rows = [["MiB per process", *PHASES, "peak"]]
    stages = [(0, False), (1, False), (2, False), (3, False), *([(3, True)] if launch.device == "cuda" else [])]
    for stage, offload in stages:
        other = replace(launch, zero_stage=stage, offload=offload)
        made = plan(config, sizes, other, base=base)
        name = ("no ZeRO" if stage == 0 else f"ZeRO-{stage}") + (", offload" if offload else "")
        name += " <" if other == launch else ""
        rows.append([name, *(f"{made.total(phase) / MIB:,.0f}" for phase in PHASES), f"{made.peak / MIB:,.0f}"])
    return _aligned(rows)


def parse_memory(text: str) -> int:
    """Bytes of a size such as `80GiB`, `24 GB`, `512MiB`. Raises `ConfigError` for any other text.

    >>> parse_memory("80GiB") // 2**30, parse_memory("24 GB")
    (80, 24000000000)
    """
    units = {"GIB": 2**30, "MIB": 2**20, "GB": 10**9, "MB": 10**6}
    amount = text.strip().upper()
    for unit, size in units.items():
        if amount.endswith(unit):
            try:
                number = float(amount.removesuffix(unit))
            except ValueError:
                break
            if 0 < number < float("inf"):
                return int(number * size)
    raise ConfigError(f"--gpu_memory {text}: expected a size above 0 such as 80GiB, 24GB or 512MiB", key="--gpu_memory")


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
