"""LoRA: adapters of the policy and of the value model, and the reference without them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM

from rlhf_accel.config.schema import OptimConfig
from rlhf_accel.models import calls
from rlhf_accel.models.lora import CRITIC, POLICY, REFERENCE, adapter
from rlhf_accel.models.policy import load_policy
from rlhf_accel.models.reference import load_reference, reference_policy
from rlhf_accel.models.trainable import parameter_groups
from tests.test_policy import (
    CPU,
    RAGGED,
    assert_outputs,
    built,
    config_of,
    move_adapters,
    outputs_of,
    outputs_one_by_one,
    refused,
    sequences,
    shake_head,
)

pytestmark = pytest.mark.usefixtures("exact_fp32")


def test_lora_trains_adapters_and_value_head_only(gpt2_folder):
    module = built(gpt2_folder, lora={"r": 4})
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {"value_head.weight", "value_head.bias"} <= trainable
    adapters = trainable - {"value_head.weight", "value_head.bias"}
    assert len(adapters) == 4  # A and B of the attention projection in each of two layers
    assert all("lora_" in name for name in adapters)
    in_groups = [p for group in parameter_groups(module, OptimConfig()) for p in group["params"]]
    assert len(in_groups) == len(trainable)
    assert hasattr(module.policy, "disable_adapter")
    assert not hasattr(built(gpt2_folder).policy, "disable_adapter")


@pytest.mark.parametrize("family", ["gpt2_folder", "llama_folder"])
def test_the_reference_of_lora_is_the_base_bit_for_bit(family, request):
    folder = request.getfixturevalue(family)
    module, batch = built(folder, lora={"r": 4}), sequences(*RAGGED)
    base = outputs_of(built(folder), batch).logprobs
    move_adapters(module)
    with torch.no_grad(), reference_policy(module, None) as reference:
        found = reference(batch)
    assert torch.equal(found, base)
    assert (outputs_of(module, batch).logprobs - base).abs().max() > 0.01


def test_the_adapter_is_back_on_after_an_exception(gpt2_folder):
    module, batch = built(gpt2_folder, lora={"r": 4}), sequences(*RAGGED)
    move_adapters(module)
    adapted = outputs_of(module, batch).logprobs
    with pytest.raises(ZeroDivisionError), reference_policy(module, None) as reference:
        assert not torch.allclose(reference(batch), adapted)
        raise ZeroDivisionError
    assert torch.equal(outputs_of(module, batch).logprobs, adapted)
    assert all(p.requires_grad for name, p in module.named_parameters() if "lora_" in name)


def test_adapters_follow_the_seed_of_the_run(gpt2_folder):
    def adapters(seed):
        module = built(gpt2_folder, lora={"r": 4}, run={"seed": seed})
        return torch.cat([p.detach().flatten() for name, p in module.named_parameters() if "lora_A" in name])

    first = adapters(0)
    torch.rand(5)
    assert torch.equal(adapters(0), first)
    assert not torch.equal(adapters(1), first)


ADAPTER_CRITIC = {"lora": {"r": 4}, "model": {"critic": "adapter"}}


def test_an_adapter_critic_reads_the_base_with_its_own_adapter(gpt2_folder):
    """Values come from the critic's adapter, log-probabilities from the policy's; neither depends on the other."""
    module, batch = built(gpt2_folder, **ADAPTER_CRITIC), sequences(*RAGGED)
    shake_head(module)
    start = outputs_of(module, batch)

    def moved(name):
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if f"lora_B.{name}" in key:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return outputs_of(module, batch)

    critic = moved(CRITIC)
    assert torch.equal(critic.logprobs, start.logprobs)
    assert (critic.values - start.values).abs().max() > 0.01
    both = moved(POLICY)
    assert torch.equal(both.values, critic.values)
    assert (both.logprobs - critic.logprobs).abs().max() > 0.01


def test_switching_adapters_keeps_parameters_trainable_or_frozen(gpt2_folder):
    module = built(gpt2_folder, **ADAPTER_CRITIC)
    is_trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    for name in (CRITIC, POLICY, None):
        with adapter(module.policy, name):
            assert {key: parameter.requires_grad for key, parameter in module.named_parameters()} == is_trainable
        assert {key: parameter.requires_grad for key, parameter in module.named_parameters()} == is_trainable
        assert module.policy.active_adapter == POLICY


def test_an_adapter_critic_starts_as_the_trunk_of_the_base(gpt2_folder):
    module, batch = built(gpt2_folder, **ADAPTER_CRITIC), sequences(*RAGGED)
    shake_head(module)
    trunk = AutoModel.from_pretrained(gpt2_folder).eval()
    policy = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    assert_outputs(outputs_of(module, batch), outputs_one_by_one(policy, trunk, module.value_head, batch), batch)


def test_the_loss_reaches_both_adapters_and_nothing_of_the_base(gpt2_folder):
    module, batch = built(gpt2_folder, **ADAPTER_CRITIC), sequences(*RAGGED)
    shake_head(module)
    move_adapters(module)
    for _ in range(2):  # again after the reference, which switches adapters
        module.zero_grad()
        outputs = module(*calls.model_inputs(batch))
        (outputs.logprobs.sum() + outputs.values.sum()).backward()
        for name, parameter in module.named_parameters():
            is_trainable = "lora_" in name or name.startswith("value_head")
            assert parameter.requires_grad == is_trainable, name
            assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == is_trainable, name
        with torch.no_grad(), reference_policy(module, None) as reference:
            reference(batch)


@pytest.mark.parametrize("critic", ["head", "adapter", "separate"])
def test_the_base_is_untouched_by_training_and_by_an_exception_in_the_reference(gpt2_folder, critic):
    optim = OptimConfig(lr=1e-2)
    module, batch = built(gpt2_folder, lora={"r": 4}, model={"critic": critic}), sequences(*RAGGED)
    base = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    b_before = torch.cat([p.detach().flatten() for name, p in module.named_parameters() if "lora_B" in name])
    optimizer = torch.optim.AdamW(parameter_groups(module, optim))
    for _ in range(3):
        outputs = module(*calls.model_inputs(batch))
        (outputs.logprobs.sum() + (outputs.values - 1).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(ZeroDivisionError), reference_policy(module, None):
            raise ZeroDivisionError
    after = dict(module.named_parameters())
    assert all(torch.equal(weights, after[name]) for name, weights in base.items()) and base
    b_after = torch.cat([p.detach().flatten() for name, p in after.items() if "lora_B" in name])
    assert (b_after - b_before).abs().max() > 1e-3


def test_a_separate_critic_beside_lora_has_an_adapter_of_its_own(gpt2_folder):
    module = built(gpt2_folder, lora={"r": 4}, model={"critic": "separate"})
    trainable = [name for name, parameter in module.critic.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_the_critics_adapter_has_the_critics_rate(gpt2_folder):
    config = config_of(gpt2_folder, **ADAPTER_CRITIC, optim={"lr": 1e-4, "critic_lr": 1e-3})
    module = built(gpt2_folder, **ADAPTER_CRITIC)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in parameter_groups(module, config.optim):
        for parameter in group["params"]:
            of_critic = CRITIC in names[id(parameter)] or "value_head" in names[id(parameter)]
            assert group["lr"] == (1e-3 if of_critic else 1e-4), names[id(parameter)]


def test_a_critics_adapter_on_embeddings_has_the_critics_rate_too(gpt2_folder):
    sections = {"lora": {"r": 4, "target_modules": ["wte"]}, "model": {"critic": "adapter"}}
    config = config_of(gpt2_folder, **sections, optim={"lr": 1e-4, "critic_lr": 1e-3})
    module = built(gpt2_folder, **sections)
    of_critic = {id(p) for name, p in module.named_parameters() if name.endswith(f".{CRITIC}")}
    assert of_critic
    for group in parameter_groups(module, config.optim):
        assert all((group["lr"] == 1e-3) or id(parameter) not in of_critic for parameter in group["params"])


def test_four_bits_need_a_gpu(gpt2_folder):
    refused(gpt2_folder, r"^model\.load_in_4bit=true needs a CUDA GPU", lora={"r": 4}, model={"load_in_4bit": True})


def test_peft_options_pass_through(gpt2_folder):
    lora = {"r": 4, "alpha": 8, "use_rslora": True, "use_dora": True, "modules_to_save": ["ln_f"]}
    module = built(gpt2_folder, lora=lora)
    settings = module.policy.peft_config[POLICY]
    assert (settings.use_rslora, settings.use_dora, settings.modules_to_save) == (True, True, ["ln_f"])
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert any("ln_f.modules_to_save" in name for name in trainable)
    assert any("lora_magnitude_vector" in name for name in trainable)
    layer = module.policy.get_base_model().transformer.h[0].attn.c_attn
    assert layer.scaling[POLICY] == pytest.approx(8 / 4**0.5)


def test_layers_that_are_trained_in_full_are_not_part_of_the_reference(gpt2_folder):
    module, batch = built(gpt2_folder, lora={"r": 4, "modules_to_save": ["ln_f"]}), sequences(*RAGGED)
    base = outputs_of(built(gpt2_folder), batch).logprobs
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        with reference_policy(module, None) as reference:
            assert torch.equal(reference(batch), base)
    assert (outputs_of(module, batch).logprobs - base).abs().max() > 0.01


@pytest.fixture
def adapter_folder(gpt2_folder, tmp_path):
    module = built(gpt2_folder, lora={"r": 4, "target_modules": ["c_fc"]})
    move_adapters(module)
    module.policy.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", module


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_an_adapter_is_continued_from_and_is_the_reference(gpt2_folder, adapter_folder, critic):
    folder, before = adapter_folder
    batch = sequences(*RAGGED)
    module = built(gpt2_folder, lora={"r": 4, "adapter": str(folder)}, model={"critic": critic})
    expected = outputs_of(before, batch).logprobs
    assert_close(outputs_of(module, batch).logprobs, expected)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if f"lora_B.{POLICY}" in name:
                assert parameter.requires_grad
                parameter.add_(0.1)
            elif f".{REFERENCE}." in name:
                assert not parameter.requires_grad
        with reference_policy(module, None) as reference:
            assert_close(reference(batch), expected)
    assert (outputs_of(module, batch).logprobs - expected).abs().max() > 0.01


def test_an_adapter_that_does_not_fit_is_refused(gpt2_folder, llama_folder, adapter_folder, tmp_path):
    folder, _ = adapter_folder
    refused(gpt2_folder, r"^lora\.r=8, but .* has rank 4$", lora={"r": 8, "adapter": str(folder)})
    refused(gpt2_folder, r"^lora\.adapter=.*is not a LoRA adapter", lora={"r": 4, "adapter": str(tmp_path)})
    refused(llama_folder, r"^lora\.adapter=.*is not a LoRA adapter", lora={"r": 4, "adapter": str(folder)})


def test_lora_needs_no_copy(gpt2_folder):
    config = config_of(gpt2_folder, lora={"r": 4})
    assert load_reference(config, load_policy(config, str(gpt2_folder), CPU)) is None


def test_lora_targets_that_the_model_does_not_have_are_refused(gpt2_folder):
    refused(gpt2_folder, r"lora\.target_modules", lora={"r": 4, "target_modules": ["q_proj"]})


@pytest.mark.parametrize(("targets", "layers"), [(["c_fc"], {"c_fc"}), ("all-linear", {"c_attn", "c_proj", "c_fc"})])
def test_lora_targets(gpt2_folder, targets, layers):
    module = built(gpt2_folder, lora={"r": 4, "target_modules": targets})
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in module.named_parameters() if ".lora_A" in name}
    assert adapted == layers
