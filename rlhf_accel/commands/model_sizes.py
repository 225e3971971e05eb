"""Sizes of a run's models, for its memory plan: weights, and what forward and backward passes keep.

They are read off the models' own code, which runs on tensors with shapes and no memory. Knows no data, no tokenizer and
no launch.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations import moe
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_accel.config.schema import Config
from rlhf_accel.data.loading import adapter_config, from_config, pretrained
from rlhf_accel.models import cpu_kernels as kernels
from rlhf_accel.models import policy_with_value, trainable
from rlhf_accel.models.loading import attention_settings
from rlhf_accel.models.policy import fitted, resolve_dtype
from rlhf_accel.models.unmerged import classifier_config, shared_bytes
from rlhf_accel.reward import reward_dtype
from rlhf_accel.system.errors import ConfigError, as_config_error

# NF4 with block scales quantised again, 8 bits for 64 weights and 32 for 64 x 256 (Dettmers et al. 2023, section 3).
BYTES_OF_NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """In bytes, except for `held`, `trainable` and `largest`, which count parameters.

    `row` sizes are those of one sample with the longest prompt and response, in a pass with gradients. `fixed` is what
    such a pass keeps independently of the number of samples: under autocast, the rounded weights.
    """

    held: int  # parameters of policy and critic
    trainable: int  # of these, trainable ones
    largest: int  # parameters of the largest trainable matrix
    weights: int
    reference: int
    packed: int  # the policy's linear layers in the layout for sampling on a CPU
    reward: int
    reward_own: int  # the reward model as a model of its own, which `reward` is unless it is on the policy's base
    fixed: int
    activations_row: int
    logits_row: int
    layer_row: int  # part of activations_row: the layer that keeps most
    inputs_row: int  # inputs of all layers, which gradient checkpointing keeps
    outside_row: int  # part of activations_row: everything outside the layers
    cache_row: int
    reward_row: int  # a pass of the reward model without gradients, at its widest layer


def measure(config: Config, policy_path: str, reward_path: str | None = None, *, device: str = "cpu") -> Sizes:
    """Sizes of the config's models. Only the models' configs are read; no weights are loaded or created.

    Policy and critic are built by the code that builds them for a run, on torch's fake tensors, and run once with one
    and once with two samples, while the tensors that autograd keeps are counted. Raises `ConfigError` if there is no
    such model.
    """
    settings = _model_config(policy_path, "model.name_or_path", config.model.trust_remote_code)
    autocast = config.run.precision == "bf16" or (config.run.precision == "auto" and device == "cuda")
    dtype = _weights_dtype(config, device)
    policy, outline = _outline(config, settings, reward_path, dtype)
    with FakeTensorMode(), _experts_as_shapes():
        module = _on_cpu(outline)
        try:
            head = policy_with_value.ValueHead(module.states_width()) if config.ppo.has_critic else None
            module.value_head = head
            trainable.freeze_unreached(module)
            one, two = (_kept(module, config, rows, autocast) for rows in (1, 2))
        except DataDependentOutputException as error:
            raise ConfigError(
                f"model.name_or_path={config.model.name_or_path}: tensor sizes of {settings.model_type} depend on the "
                "values of other tensors, so its memory cannot be planned; run it for a step and look at "
                "perf/peak_memory_mib",
                key="model.name_or_path",
            ) from error
        packs = config.run.fast_kernels and device == "cpu" and not autocast
        packed = kernels.packed_bytes(module.policy) if packs else 0
    counts = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    row = {name: two[name] - one[name] for name in one}
    reward_own, reward_row = _reward_sizes(config, reward_path, device)
    shares_base = config.reward.on_policy_base and reward_path is not None
    return Sizes(
        held=sum(parameter.numel() for parameter in module.parameters()),
        trainable=sum(counts),
        largest=max(counts),
        weights=_bytes(module) - (_saved_by_four_bits(policy) if config.model.load_in_4bit else 0),
        reference=0 if config.lora.r else _bytes(policy),
        packed=packed,
        reward=shared_bytes(str(reward_path)) if shares_base else reward_own,
        reward_own=reward_own,
        fixed=one["all"] + one["logits"] - row["all"] - row["logits"],
        activations_row=row["all"],
        logits_row=row["logits"],
        layer_row=row["layer"],
        inputs_row=row["inputs"],
        outside_row=row["outside"],
        cache_row=_cache_bytes(settings.get_text_config(), dtype) * longest_sample(config),
        reward_row=reward_row,
    )


def longest_sample(config: Config) -> int:
    """Tokens of the longest prompt and response, without a BOS that the tokenizer adds."""
    prompt = config.data.prompt_tokens[1] if config.data.prompt_tokens else config.rollout.max_prompt_tokens
    return prompt + config.rollout.max_new_tokens


def _weights_dtype(config: Config, device: str) -> torch.dtype:
    if config.model.dtype == "auto" and device == "cuda" and config.lora.r and not config.lora.modules_to_save:
        return torch.bfloat16  # as on any current GPU, even if the plan is made on a machine without one
    here = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    return resolve_dtype(config, torch.device(here))


def _outline(config: Config, settings: Any, reward_path: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """The policy, and the module of policy and critic, on the meta device."""
    plain = replace(config, model=replace(config.model, gradient_checkpointing=False))
    if config.lora.adapter is not None:  # only its shape matters, not its weights
        targets = adapter_config(config.lora.adapter, f"lora.adapter={config.lora.adapter}").target_modules
        targets = (targets,) if isinstance(targets, str) else tuple(sorted(targets or ()))
        plain = replace(plain, lora=replace(config.lora, adapter=None, target_modules=targets))
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", FutureWarning)  # of peft and transformers about each other
        trusted = config.model.trust_remote_code
        chosen = _attention(config)
        whole = from_config(AutoModelForCausalLM, settings, trust_remote_code=trusted, dtype=dtype, **chosen)
        policy = fitted(whole, plain)
        separate = _critic(plain, settings, reward_path, policy) if config.model.critic == "separate" else None
        return policy, policy_with_value.with_critic(plain, policy, separate, width=1).eval()


def _model_config(path: str, key: str, trusted: bool) -> Any:
    with as_config_error(f"{key}={path}: the model's config could not be read", key=key):
        if key == "reward.model":
            return classifier_config(path, f"{key}={path}", trust_remote_code=trusted)
        return pretrained(AutoConfig, path, trust_remote_code=trusted, subject=f"{key}={path}")


def _critic(config: Config, settings: Any, reward_path: str | None, policy: Any) -> Any:
    dtype = policy.get_base_model().dtype if config.lora.r else torch.float32
    trusted = config.model.trust_remote_code
    if config.model.critic_init == "reward" and reward_path is not None:
        settings = _model_config(reward_path, "reward.model", trusted)
    return from_config(AutoModel, settings, trust_remote_code=trusted, dtype=dtype, **_attention(config))


def _attention(config: Config) -> dict[str, str]:
    """Only the plain form keeps the scores of attention; the others, which fake tensors do not have, keep what the
    default keeps."""
    return attention_settings(config.model) if config.model.attention == "eager" else {}


@contextlib.contextmanager
def _experts_as_shapes() -> Iterator[None]:
    """Let grouped products of experts use the operator of transformers, which handles shapes in every dtype. That of
    torch refuses fp32 for fake tensors."""
    before = getattr(moe, "_can_use_grouped_mm", None)
    if before is not None:
        moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        if before is not None:
            moe._can_use_grouped_mm = before


def _on_cpu(outline: Any) -> Any:
    """The module with fake tensors of the CPU, since tensors of the meta device select other kernels."""
    tensors = [*outline.parameters(), *outline.buffers()]
    filled: dict[int, Any] = {id(x): torch.empty(x.shape, dtype=x.dtype) for x in tensors}
    for x in outline.parameters():
        filled[id(x)] = nn.Parameter(filled[id(x)], requires_grad=x.requires_grad)
    return copy.deepcopy(outline, filled)


def _saved_by_four_bits(policy: Any) -> int:
    """Bytes that NF4 saves in the frozen matrices; the vocabulary layer is not quantised."""
    head = policy.get_output_embeddings()
    layers = [x for x in policy.modules() if isinstance(x, nn.Linear) and x is not head]
    frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
    return sum(int(weight.numel() * (weight.element_size() - BYTES_OF_NF4)) for weight in frozen)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _cache_bytes(settings: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token of one sample; the state of a state-space model does not grow with the tokens."""
    if getattr(settings, "num_attention_heads", None) is None:
        return 0
    heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    return int(2 * settings.num_hidden_layers * heads * width * dtype.itemsize)


def _reward_sizes(config: Config, path: str | None, device: str) -> tuple[int, int]:
    """Weights of the reward model as a model of its own, and the working memory of a pass for each text: inputs,
    outputs and the wide middle of one layer, and the attention scores."""
    if path is None:
        return 0, 0
    trusted = config.model.trust_remote_code
    settings = _model_config(path, "reward.model", trusted)
    with torch.device("meta"):
        model = from_config(AutoModelForSequenceClassification, settings, trust_remote_code=trusted)
    count = sum(parameter.numel() for parameter in model.parameters())
    auto = torch.float16 if device == "cuda" and config.reward.dtype == "auto" else None
    size = (auto or reward_dtype(config.reward, torch.device("cpu"))).itemsize
    row_size = _weights_dtype(config, device).itemsize if config.reward.on_policy_base else size
    text = settings.get_text_config()
    middle = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    tokens = longest_sample(config)
    return count * size, row_size * tokens * (4 * text.hidden_size + 2 * middle + text.num_attention_heads * tokens)


def _kept(module: policy_with_value.PolicyWithValue, config: Config, rows: int, autocast: bool) -> dict[str, int]:
    """Bytes that autograd keeps of a forward pass with this many samples of full length, without the weights.

    `logits` are those of the vocabulary layer and `all` the rest; of this rest, `layer` is the layer that keeps most,
    `outside` is outside of all layers, and `inputs` are the inputs of all layers.
    """
    known = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    seen: set[int] = set()
    held: list[Tensor] = []  # so that no later tensor reuses the address of a freed one
    where: list[int] = []  # ids of the layers that the pass is inside of
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
    queries = torch.zeros(rows, longest_sample(config) - length, dtype=torch.int64)
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
