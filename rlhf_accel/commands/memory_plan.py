"""How much memory a run takes, by rank and phase: arithmetic over the sizes of its models, its config and a launch.

`measure` reads the sizes off the models' own code, run on tensors that have shapes and no memory; the rest is sums over
them, written out with their sources in docs/memory.md. Knows no data, no tokenizer and no process but this one.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations import moe
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_accel.config.schema import BatchSizes, Config
from rlhf_accel.data.loading import adapter_config, from_config, pretrained
from rlhf_accel.models import cpu_kernels as kernels
from rlhf_accel.models import policy_with_value, trainable
from rlhf_accel.models.policy import fitted, resolve_dtype
from rlhf_accel.reward import reward_dtype
from rlhf_accel.system.errors import ConfigError

MIB = 2**20
FP32 = 4  # bytes; of all that learns, of its gradient, of each of AdamW's two moments

# DeepSpeed's defaults, in numbers, of which ds_configs/ changes none: zero_optimization.reduce_bucket_size (which
# distributed.py lowers to what learns) and .stage3_max_live_parameters.
REDUCE_BUCKET, MOST_GATHERED = 500_000_000, 1_000_000_000

# NF4 with block scales quantised again, 8 bits for 64 weights and 32 for 64 x 256 (Dettmers et al. 2023, section 3).
BYTES_OF_NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8

# What a CUDA context takes of a GPU beside torch's tensors: an assumption, which no GPU was at hand to check.
CUDA_CONTEXT = 600 * MIB

PHASES = ("load", "rollout", "score", "update")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a run is started: `offload` is that of accelerate_configs/zero3_offload.yaml; `device` is cpu or cuda."""

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
            raise ConfigError(f"--offload true goes with --zero_stage 3, not with {self.zero_stage}", key="--offload")

    def __str__(self) -> str:
        name = f"ZeRO-{self.zero_stage}" if self.zero_stage else "no ZeRO"
        return f"{self.processes} process(es), {name}{' with offload' if self.offload else ''}"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a run's models, in bytes but for `learned`, `held` and `largest`, which count numbers.

    `row` figures are of one sample of the longest prompt and response, in a pass with gradients; `fixed` is what such a
    pass keeps however many samples it has (under autocast the rounded weights).
    """

    held: int  # numbers in policy and critic
    learned: int  # those of them that learn
    largest: int  # numbers in the largest matrix that learns
    weights: int
    reference: int
    packed: int  # of the policy's linear layers laid out for sampling on a CPU
    reward: int
    fixed: int
    activations_row: int
    logits_row: int
    layer_row: int  # of activations_row, what the layer that keeps most keeps
    inputs_row: int  # inputs of all layers, which gradient checkpointing keeps
    outside_row: int  # of activations_row, what lies outside of the layers
    cache_row: int
    reward_row: int  # of a pass of the reward model without gradients, by its widest layer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of each part in each phase, on the rank that has most; `phases` by the names in PHASES."""

    launch: Launch
    phases: Mapping[str, Mapping[str, int]]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        return max(map(self.total, self.phases))


def measure(config: Config, policy_path: str, reward_path: str | None = None, *, device: str = "cpu") -> Sizes:
    """Sizes of the config's models, of which only the configs are read: no weights are loaded and none are made.

    Policy and critic are built by the code that builds them for a run, on torch's fake tensors, and run once with one
    and once with two samples, while what autograd keeps is counted. Raises `ConfigError` if there is no such model.
    """
    trusted = config.model.trust_remote_code
    settings = _model_config(policy_path, "model.name_or_path", trusted)
    precision = config.run.precision
    autocast = precision == "bf16" or (precision == "auto" and device == "cuda")
    dtype = resolve_dtype(config, torch.device(device if device == "cpu" or torch.cuda.is_available() else "cpu"))
    if config.model.dtype == "auto" and device == "cuda" and config.lora.r and not config.lora.modules_to_save:
        dtype = torch.bfloat16  # as on any GPU of today, also where the plan is made without one
    plain = replace(config, model=replace(config.model, gradient_checkpointing=False))
    if config.lora.adapter is not None:  # its shape, without its weights
        targets = adapter_config(config.lora.adapter, f"lora.adapter={config.lora.adapter}").target_modules
        targets = (targets,) if isinstance(targets, str) else tuple(sorted(targets or ()))
        plain = replace(plain, lora=replace(config.lora, adapter=None, target_modules=targets))
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", FutureWarning)  # what peft and transformers say to each other
        whole = from_config(AutoModelForCausalLM, settings, trust_remote_code=trusted, dtype=dtype)
        policy = fitted(whole, plain)
        separate = _critic(plain, settings, reward_path, policy) if config.model.critic == "separate" else None
        outline = policy_with_value.with_critic(plain, policy, separate, width=1).eval()
    with FakeTensorMode(), _experts_as_shapes():
        module = _on_cpu(outline)
        try:
            module.value_head = policy_with_value.ValueHead(module.states_width())
            trainable.freeze_unreached(module)
            one, two = (_kept(module, config, rows, autocast) for rows in (1, 2))
        except DataDependentOutputException as error:
            raise ConfigError(
                f"model.name_or_path={config.model.name_or_path}: how large the tensors of {settings.model_type} are "
                "depends on their numbers, so its memory cannot be planned; run it for a step and look at "
                "perf/peak_memory_mib",
                key="model.name_or_path",
            ) from error
        packs = config.run.fast_kernels and device == "cpu" and not autocast
        packed = kernels.packed_bytes(module.policy) if packs else 0
    learned = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    weights = _bytes(module)
    if config.model.load_in_4bit:
        weights -= _spared_by_four_bits(policy)
    row = {name: two[name] - one[name] for name in one}
    reward, reward_row = _reward_sizes(config, reward_path, device)
    return Sizes(
        held=sum(parameter.numel() for parameter in module.parameters()),
        learned=sum(learned),
        largest=max(learned),
        weights=weights,
        reference=0 if config.lora.r else _bytes(policy),
        packed=packed,
        reward=reward,
        fixed=one["all"] + one["logits"] - row["all"] - row["logits"],
        activations_row=row["all"],
        logits_row=row["logits"],
        layer_row=row["layer"],
        inputs_row=row["inputs"],
        outside_row=row["outside"],
        cache_row=_cache_bytes(settings.get_text_config(), dtype) * _tokens(config),
        reward_row=reward_row,
    )


def plan(config: Config, sizes: Sizes, launch: Launch, *, base: int) -> Plan:
    """What each phase holds on the rank that has most. `base` is what a process has before there are any models, in
    bytes: libraries, tokenizer, prompts.

    On a GPU it is the GPU's memory, and of `base` nothing; host memory that loading, offloading and saving take there
    is not counted. Raises `ConfigError` if there is no such launch.
    """
    launch.check()
    n, stage, on_gpu = launch.processes, launch.zero_stage, launch.device == "cuda"
    away = launch.offload and on_gpu  # what is offloaded lies in the host's memory, which on a CPU is the same
    cut = n if stage == 3 else 1
    gradients, bucket = FP32 * sizes.learned, FP32 * min(sizes.learned, REDUCE_BUCKET)
    always = {
        "process": CUDA_CONTEXT if on_gpu else base,
        "weights": 0 if away else -(-sizes.weights // cut),
        "reference": 0 if away else -(-sizes.reference // cut),
        "reward model": sizes.reward,
        "optimizer": 0 if away else -(-2 * gradients // (n if stage else 1)),
        "master weights": -(-gradients // n) if stage in (1, 2) else 0,
    }
    if stage == 3:  # DeepSpeed keeps both from one step to the next
        always |= {"gradients": 0 if away else -(-gradients // n), "buckets": bucket}

    rows = _Rows.of(config, n)
    vocabulary = sizes.logits_row // config.rollout.max_new_tokens
    # Sampling holds the logits, their softmax, its cumulated sum and one product of these, of one token at a time.
    sampling = {
        "packed weights": sizes.packed,
        "KV cache": rows.sampled * sizes.cache_row,
        "logits": 4 * rows.sampled * vocabulary,
        "activations": rows.sampled * sizes.layer_row // _tokens(config),
    }
    # The reference reads whole sequences without gradients: logits and softmax, and of one layer what it has in work.
    assessing = {"logits": 2 * rows.assessed * sizes.logits_row, "activations": rows.assessed * sizes.layer_row}
    gathers = stage == 3 and config.rollout.gather_parameters != "never"
    # One process has all parts of ZeRO-3's, and uses them where they lie.
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
            | _learning(config, sizes, launch, rows)
            | {"gathered weights": live, "kept pages": left_by_all},
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Samples of the largest pass of a rank: sampling, reference, reward model, update; and the update's passes."""

    sampled: int
    assessed: int
    read: int
    learnt: int
    passes: int

    @classmethod
    def of(cls, config: Config, processes: int) -> _Rows:
        batch = BatchSizes.of(config)
        share, minibatch = -(-batch.rollout // processes), -(-batch.minibatch // processes)
        fitting = max(config.ppo.micro_batch_tokens // _tokens(config), 1)
        return cls(
            sampled=min(config.rollout.forward_batch_size, share),
            assessed=min(fitting, share),
            read=min(config.reward.batch_size, share),
            learnt=min(fitting, minibatch),
            passes=-(-minibatch // fitting),
        )


def _learning(config: Config, sizes: Sizes, launch: Launch, rows: _Rows) -> dict[str, int]:
    """What forward and backward passes and the optimizer's step add."""
    n, stage, on_gpu = launch.processes, launch.zero_stage, launch.device == "cuda"
    gradients, bucket = FP32 * sizes.learned, FP32 * min(sizes.learned, REDUCE_BUCKET)
    activations = rows.learnt * _activations_row(config, sizes) + sizes.fixed
    logits = 2 * rows.learnt * sizes.logits_row  # and their softmax, which becomes their gradient
    passing = {"activations": activations, "logits": logits}
    if stage == 0:
        buckets = {"buckets": gradients if n > 1 else 0}  # those of DDP
        if rows.passes > 1 or n > 1:
            return passing | buckets | {"gradients": gradients}
        # Of a single pass the activations go as the gradients come: it holds most before, or after.
        before = passing | {"gradients": FP32 * sizes.largest}
        return max(before, {"gradients": gradients}, key=lambda parts: sum(parts.values()))
    # To be summed over ranks, parts of a bucket are laid together in a copy; of which gloo takes another in ZeRO-3, and
    # one of the whole weights when ZeRO-1 and -2 gather them after the step.
    copies = bucket if n > 1 or stage == 3 else 0
    gloo = 0 if on_gpu else bucket if stage == 3 or n > 1 else 0
    collected = {"collectives": copies + gloo}
    if stage == 3:
        return passing | collected
    return passing | collected | {"buckets": bucket, "gradients": -(-gradients // (n if stage == 2 else 1))}


def _loading(sizes: Sizes, on_gpu: bool, always: Mapping[str, int]) -> dict[str, int]:
    """Each process reads the weights whole, and copies them for the reference, into its own memory."""
    if on_gpu:
        return {"process": always["process"]}
    whole = {"weights": sizes.weights, "reference": sizes.reference, "reward model": sizes.reward}
    return {"process": always["process"], **whole}


def _activations_row(config: Config, sizes: Sizes) -> int:
    if not config.model.gradient_checkpointing:
        return sizes.activations_row
    return sizes.inputs_row + sizes.outside_row + sizes.layer_row


def smallest(
    config: Config, sizes: Sizes, *, memory: int, base: int, device: str = "cpu", most: int = 64
) -> Plan | None:
    """The plan with the fewest processes, and among those the lowest stage, that fits; None if none of up to `most`
    processes does. `memory` is that of each GPU, or of the machine, which its processes share; bytes."""
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    for processes in counts:
        for launch in _launches(processes, device):
            made = plan(config, sizes, launch, base=base)
            if _needs(made) <= memory:
                return made
    return None


def _launches(processes: int, device: str) -> Iterator[Launch]:
    """From the plainest on. With one process there is nothing that a stage could cut."""
    for stage in (0, 1, 2, 3) if processes > 1 else (0,):
        yield Launch(processes=processes, zero_stage=stage, device=device)
    if device == "cuda":
        yield Launch(processes=processes, zero_stage=3, offload=True, device=device)


def _needs(made: Plan) -> int:
    """Of the memory that is given: each GPU holds one process, a machine without GPUs all of them."""
    return made.peak if made.launch.device == "cuda" else made.peak * made.launch.processes


def fits(made: Plan, memory: int) -> bool:
    """Whether the plan stays within `memory` bytes: of each GPU, or of the machine, which its processes share."""
    return _needs(made) <= memory


def advice(
    config: Config, launch: Launch, *, memory: int, base: int, paths: tuple[str, str | None]
) -> tuple[list[str], Plan]:
    """What to change so that this launch fits, each on top of those before, cheapest first; and the plan with all of
    them, which does not fit either if nothing helps.

    `paths` are where policy and reward model lie, as `measure` takes them.
    """
    steps: list[str] = []
    sizes = measure(config, *paths, device=launch.device)
    made = plan(config, sizes, launch, base=base)
    batch, longest = BatchSizes.of(config), _tokens(config)
    least = max(longest, config.rollout.max_prompt_tokens + config.rollout.max_new_tokens)

    def fit() -> bool:
        return _needs(made) <= memory

    rows = min(config.ppo.micro_batch_tokens // longest, -(-batch.rollout // launch.processes))
    while not fit() and rows > 1:
        rows //= 2
        smaller = replace(config, ppo=replace(config.ppo, micro_batch_tokens=max(rows * longest, least)))
        better = plan(smaller, sizes, launch, base=base)
        if better.peak < made.peak:
            config, made = smaller, better
            steps = [f"--ppo.micro_batch_tokens {config.ppo.micro_batch_tokens}"]
    if not fit() and not config.model.gradient_checkpointing:
        smaller = replace(config, model=replace(config.model, gradient_checkpointing=True))
        better = plan(smaller, sizes, launch, base=base)
        if better.peak < made.peak:
            config, made = smaller, better
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
    """Parts down, phases across, in MiB, with the sum of each phase; a phase's own peak, not a mean."""
    names = list(dict.fromkeys(name for parts in made.phases.values() for name in parts))
    rows = [["MiB of a rank", *PHASES]]
    for name in names:
        figures = [made.phases[phase].get(name, 0) for phase in PHASES]
        if any(figures):
            rows.append([name, *(f"{figure / MIB:,.0f}" if figure else "" for figure in figures)])
    rows.append(["together", *(f"{made.total(phase) / MIB:,.0f}" for phase in PHASES)])
    return _aligned(rows)


def overview(config: Config, sizes: Sizes, launch: Launch, *, base: int) -> str:
    """The phases' sums and the peak of this many processes with each stage of ZeRO, in MiB; this launch is marked."""
    rows = [["MiB of a rank", *PHASES, "peak"]]
    stages = [(0, False), (1, False), (2, False), (3, False), *([(3, True)] if launch.device == "cuda" else [])]
    for stage, offload in stages:
        other = replace(launch, zero_stage=stage, offload=offload)
        made = plan(config, sizes, other, base=base)
        name = ("no ZeRO" if stage == 0 else f"ZeRO-{stage}") + (", offload" if offload else "")
        name += " <" if other == launch else ""
        rows.append([name, *(f"{made.total(phase) / MIB:,.0f}" for phase in PHASES), f"{made.peak / MIB:,.0f}"])
    return _aligned(rows)


def parse_memory(text: str) -> int:
    """Bytes in a text such as `80GiB`, `24 GB`, `512MiB`; raises `ConfigError` for any other.

    >>> parse_memory("80GiB") // 2**30, parse_memory("24 GB")
    (80, 24000000000)
    """
    units = {"GIB": 2**30, "MIB": 2**20, "GB": 10**9, "MB": 10**6}
    said = text.strip().upper()
    for unit, size in units.items():
        if said.endswith(unit):
            try:
                amount = float(said.removesuffix(unit))
            except ValueError:
                break
            if 0 < amount < float("inf"):
                return int(amount * size)
    raise ConfigError(f"--gpu_memory {text}: expected a size above 0 such as 80GiB, 24GB or 512MiB", key="--gpu_memory")


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _tokens(config: Config) -> int:
    """Of the longest sample, but for a tokenizer's BOS."""
    prompt = config.data.prompt_tokens[1] if config.data.prompt_tokens else config.rollout.max_prompt_tokens
    return prompt + config.rollout.max_new_tokens


def _model_config(path: str, key: str, trusted: bool) -> Any:
    try:
        return pretrained(AutoConfig, path, trust_remote_code=trusted, said=f"{key}={path}")
    except ConfigError:
        raise
    except Exception as error:  # a missing, broken or foreign file raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}={path}: no model's config could be read ({reason})", key=key) from error


def _critic(config: Config, settings: Any, reward_path: str | None, policy: Any) -> Any:
    dtype = policy.get_base_model().dtype if config.lora.r else torch.float32
    trusted = config.model.trust_remote_code
    if config.model.critic_init == "reward" and reward_path is not None:
        settings = _model_config(reward_path, "reward.model", trusted)
    return from_config(AutoModel, settings, trust_remote_code=trusted, dtype=dtype)


@contextlib.contextmanager
def _experts_as_shapes() -> Iterator[None]:
    """Grouped products of experts by the operator of transformers' that knows what comes of shapes in every dtype:
    torch's own refuses fp32 there, and takes it elsewhere."""
    before = getattr(moe, "_can_use_grouped_mm", None)
    if before is not None:
        moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        if before is not None:
            moe._can_use_grouped_mm = before


def _on_cpu(outline: Any) -> Any:
    """The module with fake tensors of the CPU in place of those of the meta device, which choose other kernels."""
    tensors = [*outline.parameters(), *outline.buffers()]
    filled: dict[int, Any] = {id(x): torch.empty(x.shape, dtype=x.dtype) for x in tensors}
    for x in outline.parameters():
        filled[id(x)] = nn.Parameter(filled[id(x)], requires_grad=x.requires_grad)
    return copy.deepcopy(outline, filled)


def _spared_by_four_bits(policy: Any) -> int:
    """Bytes that the frozen matrices take less in NF4; the vocabulary's stays as it is."""
    head = policy.get_output_embeddings()
    layers = [x for x in policy.modules() if isinstance(x, nn.Linear) and x is not head]
    frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
    return sum(int(weight.numel() * (weight.element_size() - BYTES_OF_NF4)) for weight in frozen)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _cache_bytes(settings: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token of one sample; a state space keeps a state that does not grow with them."""
    if getattr(settings, "num_attention_heads", None) is None:
        return 0
    heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    return int(2 * settings.num_hidden_layers * heads * width * dtype.itemsize)


def _reward_sizes(config: Config, path: str | None, device: str) -> tuple[int, int]:
    """Weights of the reward model, and what a pass has in work for each text: states in and out and the wide middle of
    one layer, and the attention's scores."""
    if path is None:
        return 0, 0
    trusted = config.model.trust_remote_code
    settings = _model_config(path, "reward.model", trusted)
    with torch.device("meta"):
        model = from_config(AutoModelForSequenceClassification, settings, trust_remote_code=trusted)
    count = sum(parameter.numel() for parameter in model.parameters())
    auto = torch.float16 if device == "cuda" and config.reward.dtype == "auto" else None
    size = (auto or reward_dtype(config.reward, torch.device("cpu"))).itemsize
    text = settings.get_text_config()
    middle = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    tokens = _tokens(config)
    return count * size, size * tokens * (4 * text.hidden_size + 2 * middle + text.num_attention_heads * tokens)


def _kept(module: policy_with_value.PolicyWithValue, config: Config, rows: int, autocast: bool) -> dict[str, int]:
    """Bytes that autograd keeps of a forward pass of this many samples of full length, weights not counted: `all` but
    the vocabulary's, those (`logits`), the most that a `layer` keeps, what lies `outside` of layers, and the `inputs`
    of layers."""
    known = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    seen: set[int] = set()
    held: list[Tensor] = []  # so that no later tensor gets the number of one that is gone
    where: list[int] = []  # the layers that a pass is in, by id
    sums = {"all": 0, "logits": 0, "outside": 0, "inputs": 0}
    layers: dict[int, int] = {}
    vocabulary = module.policy.get_output_embeddings().out_features
    length = config.rollout.max_new_tokens

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata in known or storage._cdata in seen:
            return tensor
        seen.add(storage._cdata)
        held.append(tensor)
        if tensor.shape[-2:] == (length, vocabulary):
            sums["logits"] += storage.nbytes()
            return tensor
        sums["all"] += storage.nbytes()
        if where:
            layers[where[-1]] = layers.get(where[-1], 0) + storage.nbytes()
        else:
            sums["outside"] += storage.nbytes()
        return tensor

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        where.append(id(layer))
        state = args[0] if args else kwargs["hidden_states"]
        sums["inputs"] += state.numel() * state.element_size()

    def leave(*_: Any) -> None:
        where.pop()

    checkpointed = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in checkpointed]
    hooks += [layer.register_forward_hook(leave) for layer in checkpointed]
    queries = torch.zeros(rows, _tokens(config) - length, dtype=torch.int64)
    responses = torch.zeros(rows, length, dtype=torch.int64)
    try:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            module(
                queries,
                torch.ones_like(queries, dtype=torch.bool),
                responses,
                torch.ones_like(responses, dtype=torch.bool),
                with_entropy=config.ppo.entropy_coef > 0,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return {**sums, "layer": max(layers.values(), default=0)}
