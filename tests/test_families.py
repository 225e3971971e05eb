"""Each family through the probes, full and with LoRA: padded = alone, sampled = recomputed, export = memory, and a
gradient in all trainable parameters. Families that are refused are listed with the reason."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from rlhf_accel.commands import model_sizes
from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config
from rlhf_accel.models import calls, lora, policy_with_value, positions, probes, trainable
from rlhf_accel.models.lora import POLICY
from rlhf_accel.models.policy import load_policy
from rlhf_accel.reward import Reward
from rlhf_accel.rollout import padding
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training import setup
from tests.families import FAMILIES, PAD, REFUSED, save_tiny, tiny_config, tiny_model

CPU = torch.device("cpu")
IDS = torch.tensor([23, 7, 41, 12, 58, 30, 9, 17, 50, 26, 33, 45])
HELD_OUT = torch.tensor([[11, 40, 29, 6, 52, 19], [37, 14, 44, 21, 8, 55]])

pytestmark = pytest.mark.usefixtures("exact_fp32")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the folder with the tiny model of a family, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            family, _, _ = name.partition(" ")
            changes = {**FAMILIES, **REFUSED}[name]
            changes = changes[0] if isinstance(changes, tuple) else changes
            made[name] = save_tiny(tmp_path_factory.mktemp("family"), family, **changes)
        return made[name]

    return folder


def config_of(folder: Path, lora: bool, **model: Any) -> Config:
    tree = {
        "model": {"name_or_path": str(folder), "dtype": "fp32", "critic": "adapter" if lora else "separate", **model},
        "lora": {"r": 4 if lora else 0},
    }
    return parse(Config, tree)


def built(config: Config) -> policy_with_value.PolicyWithValue:
    path = config.model.name_or_path
    module = policy_with_value.build(config, load_policy(config, path, CPU), path, None).eval()
    trainable.freeze_unreached(module)
    return module


def passed(*findings: probes.Finding) -> None:
    assert [finding.message for finding in findings if not finding.passed] == []


def look(module: policy_with_value.PolicyWithValue) -> None:
    batch = padding.made_up(IDS, PAD)
    passed(
        padding.policy_alone(module.policy, batch, torch.float32),
        padding.sampled_is_recomputed(module.policy, batch, PAD, torch.float32),
        padding.critic_alone(module, batch, torch.float32),
    )


def gradient_reaches_all(module: policy_with_value.PolicyWithValue, config: Config) -> None:
    """Replace zeros by small numbers, since zeros block gradients, and take a training step."""
    trainable_parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    shake_zeros(module)
    batch = padding.made_up(IDS, PAD)
    with trainable.training_mode(module, config):
        outputs = module(*calls.model_inputs(batch))
        (outputs.logprobs.sum() + outputs.values.square().sum()).backward()
    lost = [name for name, p in trainable_parameters.items() if p.grad is None]
    silent = [name for name, p in trainable_parameters.items() if p.grad is not None and not p.grad.any()]
    # Experts that no token chose; a router whose choice is certain.
    silent = [name for name in silent if "expert" not in name and "router" not in name]
    assert (lost, silent) == ([], [])
    with torch.no_grad():
        for parameter in trainable_parameters.values():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad / parameter.grad.norm().clamp(min=1e-6))
                parameter.grad = None


@torch.no_grad()
def shake_zeros(module: policy_with_value.PolicyWithValue) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def export_is_memory(module: policy_with_value.PolicyWithValue, folder: Path, lora: bool) -> None:
    module.policy.save_pretrained(folder, **({"selected_adapters": [POLICY]} if lora else {}))
    kind = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    loaded = kind.from_pretrained(folder, dtype=torch.float32).eval()
    memory, again = (model(input_ids=HELD_OUT, use_cache=False).logits for model in (module.policy, loaded))
    ours, theirs = dict(module.policy.named_parameters()), loaded.state_dict()
    ours = {} if lora else {name: tensor for name, tensor in ours.items() if name in theirs}
    passed(probes.export_is_memory(memory, again, dtype=torch.float32, ours=ours, theirs=theirs))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, lora: bool, folder_of: Any, tmp_path: Path) -> None:
    config = config_of(folder_of(name), lora)
    module = built(config)
    look(module)
    gradient_reaches_all(module, config)
    export_is_memory(module, tmp_path, lora)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str, folder_of: Any) -> None:
    config = config_of(folder_of(name), lora=False, critic="head")
    policy = load_policy(config, config.model.name_or_path, CPU)
    batch = padding.made_up(IDS, PAD)
    looks = (
        lambda: padding.policy_alone(policy, batch, torch.float32),
        lambda: padding.sampled_is_recomputed(policy, batch, PAD, torch.float32),
    )
    problems = [problem for problem in map(padding.problem, looks) if problem is not None]
    assert problems and REFUSED[name][1] in problems[0] and name.split()[0] in problems[0]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "llama4_text", "phimoe"])
def test_all_linear_leaves_routers_out(name: str, folder_of: Any) -> None:
    """By default also the experts, which peft wraps tensor by tensor: ZeRO-3 partitions those."""
    config = config_of(folder_of(name), lora=True)
    for targets, experts in ((["all-linear"], name == "mixtral"), (None, False)):
        adapters = {"r": 2, "target_modules": targets}
        asked = parse(Config, {"model": {"name_or_path": config.model.name_or_path, "dtype": "fp32"}, "lora": adapters})
        policy = load_policy(asked, asked.model.name_or_path, CPU)
        adapted = {name.partition(".lora_")[0] for name, _ in policy.named_parameters() if ".lora_" in name}
        assert any("q_proj" in layer for layer in adapted)
        assert not [layer for layer in adapted if "router" in layer or layer.endswith(".gate")]
        assert (lora.on_tensors(policy) is not None) == experts
        passed(padding.policy_alone(policy, padding.made_up(IDS, PAD), torch.float32))


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # of peft, of layers without an adapter
def test_adapters_on_experts_are_refused_where_zero3_cuts_them(folder_of: Any) -> None:
    path = str(folder_of("mixtral"))
    launch: Any = SimpleNamespace(zero_stage=3)

    def build(targets: list[str] | None) -> None:
        lora = {"r": 2, "target_modules": targets}
        config = parse(Config, {"model": {"name_or_path": path, "dtype": "fp32"}, "lora": lora})
        setup._build(config, launch, load_policy(config, path, CPU), path, None, critic=False)

    build(None)
    with pytest.raises(ConfigError, match=r"on the experts' tensors \(.*; name layers of attention") as refused:
        build(["all-linear"])
    assert refused.value.key == "lora.target_modules"


def described(config: Config) -> str:
    """The lines with which a run starts."""
    path = config.model.name_or_path
    module = policy_with_value.build(config, load_policy(config, path, CPU), path, None)
    launch: Any = SimpleNamespace(launch="1 process", device=CPU, precision="fp32")
    return setup._describe(config, launch, module, trainable.freeze_unreached(module), 8, Reward(terms=()))


def test_frozen_parts_and_chosen_layers_are_said(folder_of: Any) -> None:
    said = described(config_of(folder_of("gemma3"), lora=False, critic="head"))
    assert "tensors stay frozen, since no text reaches them (" in said and "vision_tower" in said
    unknown, known = (described(config_of(folder_of(name), lora=True)) for name in ("olmo2", "gpt2"))
    assert "adapters on all linear layers but experts and routers: peft has no default for olmo2" in unknown
    assert "peft has no default" not in known and "stay frozen" not in known


def test_what_no_text_reaches_is_frozen(folder_of: Any) -> None:
    """A vision tower, a bias that balances experts, the pooler of a critic: data parallelism would wait for them."""
    for name, part in (("gemma3", "vision_tower"), ("ernie4_5_moe", "e_score_correction_bias"), ("bert", "pooler")):
        config = config_of(folder_of(name), lora=False)
        path = config.model.name_or_path
        module = policy_with_value.build(config, load_policy(config, path, CPU), path, None).eval()
        frozen = trainable.freeze_unreached(module)
        assert any(part in name for name in frozen)
        assert frozen == [name for name, p in module.named_parameters() if not p.requires_grad]
        assert not any("layers.0.self_attn" in name and "vision" not in name for name in frozen)


def test_training_mode_is_for_layers_that_are_checkpointed(folder_of: Any) -> None:
    """Mixtral's routers add noise in it, the streams of Gemma 3n are clipped."""
    for name in ("mixtral", "gemma3n_text", "phimoe"):
        config = config_of(folder_of(name), lora=False, critic="head", gradient_checkpointing=True)
        module = built(config)
        with trainable.training_mode(module, config):
            in_training_mode = {type(layer).__name__ for layer in module.modules() if layer.training}
        assert len(in_training_mode) == 1 and in_training_mode.pop().endswith("DecoderLayer")
        assert not any(layer.training for layer in module.modules())


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "jamba"])
def test_state_spaces_continue_from_their_state(name: str, folder_of: Any) -> None:
    """They call it cache_params; without it each token would cost a reading of the whole text."""
    config = config_of(folder_of(name), lora=False)
    policy, widths = load_policy(config, config.model.name_or_path, CPU), []
    policy.register_forward_pre_hook(
        lambda model, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    passed(padding.sampled_is_recomputed(policy, padding.made_up(IDS, PAD), PAD, torch.float32))
    assert widths == [6, 1, 1, 9]


@pytest.mark.parametrize(
    ("name", "changes", "most"),
    [
        ("gpt2", {"n_positions": 16}, 16),
        ("mpt", {"max_seq_len": 16}, 16),
        ("whisper", {"max_target_positions": 16}, 16),
        ("gemma3", {"text_config": {"max_position_embeddings": 16}}, 16),
        ("roberta", {"is_decoder": True, "max_position_embeddings": 17}, 16),  # positions begin after the padding id
        ("bloom", {}, None),
        ("mamba", {}, None),
    ],
)
def test_window(name: str, changes: dict[str, Any], most: int | None) -> None:
    policy = tiny_model(tiny_config(name, **changes))
    assert positions.window(policy) == most
    config = parse(
        Config, {"rollout": {"max_prompt_tokens": 9, "max_new_tokens": 8}, "data": {"prompt_tokens": [2, 9]}}
    )
    with contextlib.nullcontext() if most is None else pytest.raises(ConfigError, match="has 16 positions"):
        positions.check_window(config, policy, 0)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoehybrid", "mamba2", "opt projected", "gemma3"])
def test_memory_is_planned(name: str, folder_of: Any) -> None:
    config = config_of(folder_of(name), lora=False)
    sizes = model_sizes.measure(config, config.model.name_or_path)
    module = built(config)
    assert sizes.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sizes.activations_row > 0


def test_memory_that_cannot_be_planned_is_refused_by_name(folder_of: Any) -> None:
    config = config_of(folder_of("jetmoe"), lora=False)
    with pytest.raises(ConfigError, match=r"jetmoe.*cannot be planned"):
        model_sizes.measure(config, config.model.name_or_path)


NOT_CHECKPOINTED = ("ctrl", "openai-gpt", "jetmoe")
SHARED_LAYERS = ("zamba2",)  # which share weights, each with an adapter of its own: the command refuses the sum


@pytest.mark.parametrize("name", NOT_CHECKPOINTED)
def test_checkpointing_that_a_family_does_not_have_is_refused(name: str, folder_of: Any) -> None:
    with pytest.raises(ConfigError, match=rf"no checkpointing for {name}; set it to false") as refused:
        built(config_of(folder_of(name), lora=False, gradient_checkpointing=True))
    assert refused.value.key == "model.gradient_checkpointing"


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_CHECKPOINTED])
def test_checkpointed_layers_give_the_gradient_of_plain_ones(name: str, folder_of: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        config = config_of(folder_of(name), lora=True, gradient_checkpointing=checkpointing)
        module = built(config)
        shake_zeros(module)
        with trainable.training_mode(module, config):
            outputs = module(*calls.model_inputs(padding.made_up(IDS, PAD)))
            (outputs.logprobs.sum() + outputs.values.square().sum()).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_adapter_gives_the_same_logits(name: str, folder_of: Any) -> None:
    module = built(config_of(folder_of(name), lora=True))
    shake_zeros(module)
    memory = calls.logits_of(module.policy, HELD_OUT)
    merged = module.policy.merge_and_unload(adapter_names=[POLICY], safe_merge=True)
    found = probes.export_is_memory(memory, calls.logits_of(merged, HELD_OUT), dtype=torch.float32)
    assert found.passed == (name not in SHARED_LAYERS), found.message
