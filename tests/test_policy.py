"""Policy, critic and reference, against plain transformers on one unpadded sequence at a time."""

import shutil
import zlib

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config, OptimConfig
from rlhf_accel.models import calls, policy_with_value
from rlhf_accel.models import policy as policy_module
from rlhf_accel.models.lora import CRITIC, POLICY, REFERENCE, adapter
from rlhf_accel.models.policy import end_of_text_ids, load_policy, resolve_dtype
from rlhf_accel.models.reference import load_reference, reference_policy
from rlhf_accel.models.trainable import parameter_groups
from rlhf_accel.system.errors import ConfigError

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("exact_fp32")


def config_of(folder, **sections):
    tree = {"model": {"name_or_path": str(folder), "dtype": "fp32"}}
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse(Config, tree)


def built(folder, reward_path=None, **sections):
    config = config_of(folder, **sections)
    policy = load_policy(config, str(folder), CPU)
    return policy_with_value.build(config, policy, str(folder), None if reward_path is None else str(reward_path))


def sequences(query_lengths, response_lengths, *, vocab=200, left=0, right=0, seed=0):
    """Rows of random tokens with `left` and `right` extra columns of padding, which holds random tokens too."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(5, vocab, (q + r,), generator=generator)
        for q, r in zip(query_lengths, response_lengths, strict=True)
    ]
    width, length = max(query_lengths) + left, max(response_lengths) + right
    noise = torch.Generator().manual_seed(seed + left + 100 * right + 1)
    queries = torch.randint(5, vocab, (len(rows), width), generator=noise)
    responses = torch.randint(5, vocab, (len(rows), length), generator=noise)
    query_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    response_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (row, q, r) in enumerate(zip(rows, query_lengths, response_lengths, strict=True)):
        queries[i, width - q :], query_mask[i, width - q :] = row[:q], True
        responses[i, :r], response_mask[i, :r] = row[q:], True
    return Sequences(queries=queries, query_mask=query_mask, responses=responses, response_mask=response_mask)


RAGGED = ([1, 5, 3], [4, 2, 6])


def say(module, batch):
    with torch.no_grad():
        return module(*calls.model_inputs(batch), with_entropy=True)


def say_one_by_one(causal_lm, trunk, head, batch, temperature=1.0):
    """Logprobs, values and entropy of each row's own tokens, from forwards without any padding."""
    said = []
    for i in range(len(batch)):
        query, response = batch.queries[i][batch.query_mask[i]], batch.responses[i][batch.response_mask[i]]
        ids = torch.cat([query, response])[None]
        with torch.no_grad():
            logits = causal_lm(ids).logits[0].double() / temperature
            hidden = trunk(ids).last_hidden_state[0]
        # The state before response token t is that of the token in front of it.
        before = slice(len(query) - 1, len(ids[0]) - 1)
        logp = logits[before].log_softmax(-1)
        values = hidden[before] @ head.weight[0].detach() + head.bias[0].detach()
        said.append((logp[torch.arange(len(response)), response].float(), values, -(logp.exp() * logp).sum(-1).float()))
    return said


def assert_says(outputs, expected, batch, tolerance=1e-5):
    for i, per_row in enumerate(expected):
        for ours, theirs in zip(outputs, per_row, strict=True):
            assert_close(ours[i][batch.response_mask[i]], theirs, atol=tolerance, rtol=tolerance)


def shake_head(module):
    """Values of a fresh head are 0, which says nothing about where they are read."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        module.value_head.weight.copy_(torch.randn(module.value_head.weight.shape, generator=generator))
        module.value_head.bias.fill_(0.5)


@pytest.mark.cpu_kinds
@pytest.mark.parametrize("family", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_agrees_with_plain_transformers(family, temperature, request):
    folder = request.getfixturevalue(family)
    module = built(folder, rollout={"temperature": temperature})
    shake_head(module)
    batch = sequences(*RAGGED)
    lm, trunk = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoModel.from_pretrained(folder).eval()
    expected = say_one_by_one(lm, trunk, module.value_head, batch, temperature)
    assert_says(say(module, batch), expected, batch)


@pytest.mark.parametrize("family", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (5, 2)])
def test_padding_changes_nothing(family, left, right, request):
    module = built(request.getfixturevalue(family))
    shake_head(module)
    plain, padded = sequences(*RAGGED), sequences(*RAGGED, left=left, right=right)
    assert not torch.equal(plain.responses[:, -1], padded.responses[:, plain.responses.shape[1] - 1]) or right == 0
    for ours, theirs in zip(say(module, padded), say(module, plain), strict=True):
        length = plain.responses.shape[1]
        assert_close(ours[:, :length][plain.response_mask], theirs[plain.response_mask], atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_says_what_the_whole_batch_says(gpt2_folder):
    module = built(gpt2_folder)
    shake_head(module)
    batch = sequences(*RAGGED)
    whole = say(module, batch)
    for i in range(len(batch)):
        alone = batch.select(torch.tensor([i])).trimmed()
        for ours, theirs in zip(say(module, alone), whole, strict=True):
            assert_close(ours[0][alone.response_mask[0]], theirs[i][batch.response_mask[i]], atol=1e-5, rtol=1e-5)


def test_entropy_is_for_those_who_ask(gpt2_folder):
    module, batch = built(gpt2_folder), sequences(*RAGGED)
    with torch.no_grad():
        outputs = module(*calls.model_inputs(batch))
    assert outputs.entropy is None
    assert torch.equal(outputs.logprobs, say(module, batch).logprobs)


def test_a_model_that_computes_all_logits_says_the_same(gpt2_folder, monkeypatch):
    """Older models take no logits_to_keep."""
    module, batch = built(gpt2_folder), sequences(*RAGGED)
    shake_head(module)
    expected = say(module, batch)
    accepted = calls.accepted

    def without_logits_to_keep(model, **extras):
        return accepted(model, **{name: value for name, value in extras.items() if name != "logits_to_keep"})

    monkeypatch.setattr(calls, "accepted", without_logits_to_keep)
    for ours, theirs in zip(say(module, batch), expected, strict=True):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_values_are_read_before_the_token_is_chosen(gpt2_folder):
    module = built(gpt2_folder)
    shake_head(module)
    batch = sequences([3], [5])
    before = say(module, batch)
    batch.responses[0, 2] += 1
    after = say(module, batch)
    # Token 2 itself is judged otherwise, but the states it was chosen from (up to and with index 2) are the same.
    assert_close(after.values[0, :3], before.values[0, :3])
    assert_close(after.entropy[0, :3], before.entropy[0, :3])
    assert_close(after.logprobs[0, :2], before.logprobs[0, :2])
    assert (after.values[0, 3:] - before.values[0, 3:]).abs().min() > 1e-4
    assert abs(after.logprobs[0, 2] - before.logprobs[0, 2]) > 1e-4


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_values_start_at_zero(gpt2_folder, critic):
    values = say(built(gpt2_folder, model={"critic": critic}), sequences(*RAGGED)).values
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.zeros_like(values))


def test_dropout_is_off_in_training_mode_but_stays_in_the_saved_config(gpt2_folder, tmp_path):
    assert GPT2Config.from_pretrained(gpt2_folder).attn_pdrop == 0.1
    module = built(gpt2_folder, model={"critic": "separate"})
    shake_head(module)
    batch = sequences(*RAGGED)
    calm = say(module.eval(), batch)
    for ours, theirs in zip(say(module.train(), batch), calm, strict=True):
        assert torch.equal(ours, theirs)
    module.policy.save_pretrained(tmp_path)
    saved = GPT2Config.from_pretrained(tmp_path)
    assert (saved.attn_pdrop, saved.embd_pdrop, saved.resid_pdrop) == (0.1, 0.1, 0.1)


def test_dropout_that_is_a_number_and_not_a_layer_is_off_too(llama_folder, tmp_path):
    config = LlamaConfig.from_pretrained(llama_folder, attention_dropout=0.5)
    LlamaForCausalLM.from_pretrained(llama_folder, config=config).save_pretrained(tmp_path)
    module, batch = built(tmp_path), sequences(*RAGGED)
    assert torch.equal(say(module.train(), batch).logprobs, say(module.eval(), batch).logprobs)


def test_separate_critic_starts_from_the_policy_and_shares_nothing(gpt2_folder):
    module = built(gpt2_folder, model={"critic": "separate"})
    shake_head(module)
    batch = sequences(*RAGGED)
    lm, trunk = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval(), AutoModel.from_pretrained(gpt2_folder).eval()
    assert_says(say(module, batch), say_one_by_one(lm, trunk, module.value_head, batch), batch)
    before = say(module, batch)
    with torch.no_grad():
        module.critic.wte.weight.add_(torch.randn_like(module.critic.wte.weight))
    after = say(module, batch)
    assert torch.equal(after.logprobs, before.logprobs)
    assert not torch.allclose(after.values, before.values)


def test_separate_critic_starts_from_the_reward_model(gpt2_folder, gpt2_classifier_folder):
    module = built(
        gpt2_folder,
        gpt2_classifier_folder,
        model={"critic": "separate", "critic_init": "reward"},
        reward={"model": str(gpt2_classifier_folder)},
    )
    shake_head(module)
    batch = sequences(*RAGGED)
    lm = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    trunk = AutoModelForSequenceClassification.from_pretrained(gpt2_classifier_folder).eval().transformer
    assert_says(say(module, batch), say_one_by_one(lm, trunk, module.value_head, batch), batch)


def test_a_critic_cannot_start_from_a_reward_model_that_reads_other_tokens(gpt2_folder, classifier_folder):
    with pytest.raises(ConfigError, match=r"model\.critic_init=reward: the reward model \(roberta.*\(gpt2"):
        built(
            gpt2_folder,
            classifier_folder,
            model={"critic": "separate", "critic_init": "reward"},
            reward={"model": str(classifier_folder), "label": "POSITIVE"},
        )


def test_parameter_groups(gpt2_folder):
    module = built(gpt2_folder, model={"critic": "separate"})
    groups = parameter_groups(module, OptimConfig(lr=1e-3, critic_lr=5e-3, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    seen = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["lr"] == (1e-3 if name.startswith("policy.") else 5e-3), name
            is_matrix = name.endswith("weight") and "ln_" not in name
            assert group["weight_decay"] == (0.1 if is_matrix else 0.0), name
    assert sorted(seen) == sorted(names.values())
    assert {"policy.transformer.ln_f.weight", "critic.h.0.mlp.c_fc.weight", "value_head.bias"} <= set(seen)


def test_without_a_critic_lr_all_learn_at_one_rate(gpt2_folder):
    groups = parameter_groups(built(gpt2_folder), OptimConfig(lr=1e-3))
    assert {group["lr"] for group in groups} == {1e-3}


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


def move_adapters(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                # Each another way: the policy's and the critic's start as the same.
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", ["gpt2_folder", "llama_folder"])
def test_the_reference_of_lora_is_the_base_bit_for_bit(family, request):
    folder = request.getfixturevalue(family)
    module, batch = built(folder, lora={"r": 4}), sequences(*RAGGED)
    base = say(built(folder), batch).logprobs
    move_adapters(module)
    with torch.no_grad(), reference_policy(module, None) as reference:
        said = reference(batch)
    assert torch.equal(said, base)
    assert (say(module, batch).logprobs - base).abs().max() > 0.01


def test_the_adapter_is_back_on_after_an_exception(gpt2_folder):
    module, batch = built(gpt2_folder, lora={"r": 4}), sequences(*RAGGED)
    move_adapters(module)
    adapted = say(module, batch).logprobs
    with pytest.raises(ZeroDivisionError), reference_policy(module, None) as reference:
        assert not torch.allclose(reference(batch), adapted)
        raise ZeroDivisionError
    assert torch.equal(say(module, batch).logprobs, adapted)
    assert all(p.requires_grad for name, p in module.named_parameters() if "lora_" in name)


def test_the_frozen_copy_does_not_follow_the_policy(gpt2_folder):
    config, batch = config_of(gpt2_folder, rollout={"temperature": 0.7}), sequences(*RAGGED)
    policy = load_policy(config, str(gpt2_folder), CPU)
    reference = load_reference(config, policy)
    module = policy_with_value.build(config, policy, str(gpt2_folder), None)
    start = say(module, batch).logprobs
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        with reference_policy(module, reference) as logprobs:
            said = logprobs(batch)
    assert torch.equal(said, start)
    assert (say(module, batch).logprobs - start).abs().max() > 0.01


def test_adapters_start_as_the_seed_of_the_run_says(gpt2_folder):
    def adapters(seed):
        module = built(gpt2_folder, lora={"r": 4}, run={"seed": seed})
        return torch.cat([p.detach().flatten() for name, p in module.named_parameters() if "lora_A" in name])

    first = adapters(0)
    torch.rand(5)
    assert torch.equal(adapters(0), first)
    assert not torch.equal(adapters(1), first)


ADAPTER_CRITIC = {"lora": {"r": 4}, "model": {"critic": "adapter"}}


def test_an_adapter_critic_reads_the_base_with_its_own_adapter(gpt2_folder):
    """Values come from the critic's adapter, log-probabilities from the policy's, whatever the other one does."""
    module, batch = built(gpt2_folder, **ADAPTER_CRITIC), sequences(*RAGGED)
    shake_head(module)
    start = say(module, batch)

    def moved(name):
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if f"lora_B.{name}" in key:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return say(module, batch)

    critic = moved(CRITIC)
    assert torch.equal(critic.logprobs, start.logprobs)
    assert (critic.values - start.values).abs().max() > 0.01
    both = moved(POLICY)
    assert torch.equal(both.values, critic.values)
    assert (both.logprobs - critic.logprobs).abs().max() > 0.01


def test_switching_adapters_changes_nothing_of_what_learns(gpt2_folder):
    module = built(gpt2_folder, **ADAPTER_CRITIC)
    learns = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    for name in (CRITIC, POLICY, None):
        with adapter(module.policy, name):
            assert {key: parameter.requires_grad for key, parameter in module.named_parameters()} == learns
        assert {key: parameter.requires_grad for key, parameter in module.named_parameters()} == learns
        assert module.policy.active_adapter == POLICY


def test_an_adapter_critic_starts_as_the_trunk_of_the_base(gpt2_folder):
    module, batch = built(gpt2_folder, **ADAPTER_CRITIC), sequences(*RAGGED)
    shake_head(module)
    trunk = AutoModel.from_pretrained(gpt2_folder).eval()
    policy = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    assert_says(say(module, batch), say_one_by_one(policy, trunk, module.value_head, batch), batch)


def test_the_loss_reaches_both_adapters_and_nothing_of_the_base(gpt2_folder):
    module, batch = built(gpt2_folder, **ADAPTER_CRITIC), sequences(*RAGGED)
    shake_head(module)
    move_adapters(module)
    for _ in range(2):  # once more after the reference was asked, which switches adapters
        module.zero_grad()
        outputs = module(*calls.model_inputs(batch))
        (outputs.logprobs.sum() + outputs.values.sum()).backward()
        for name, parameter in module.named_parameters():
            learns = "lora_" in name or name.startswith("value_head")
            assert parameter.requires_grad == learns, name
            assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == learns, name
        with torch.no_grad(), reference_policy(module, None) as reference:
            reference(batch)


@pytest.mark.parametrize("critic", ["head", "adapter", "separate"])
def test_the_base_is_untouched_by_learning_and_by_an_exception_in_the_reference(gpt2_folder, critic):
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
    learning = [name for name, parameter in module.critic.named_parameters() if parameter.requires_grad]
    assert learning and all("lora_" in name for name in learning)


def test_the_critics_adapter_learns_at_the_critics_rate(gpt2_folder):
    config = config_of(gpt2_folder, **ADAPTER_CRITIC, optim={"lr": 1e-4, "critic_lr": 1e-3})
    module = built(gpt2_folder, **ADAPTER_CRITIC)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in parameter_groups(module, config.optim):
        for parameter in group["params"]:
            of_critic = CRITIC in names[id(parameter)] or "value_head" in names[id(parameter)]
            assert group["lr"] == (1e-3 if of_critic else 1e-4), names[id(parameter)]


def test_a_critics_adapter_on_embeddings_learns_at_the_critics_rate_too(gpt2_folder):
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
    learning = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert any("ln_f.modules_to_save" in name for name in learning)
    assert any("lora_magnitude_vector" in name for name in learning)
    layer = module.policy.get_base_model().transformer.h[0].attn.c_attn
    assert layer.scaling[POLICY] == pytest.approx(8 / 4**0.5)


def test_layers_that_learn_in_full_are_not_part_of_the_reference(gpt2_folder):
    module, batch = built(gpt2_folder, lora={"r": 4, "modules_to_save": ["ln_f"]}), sequences(*RAGGED)
    base = say(built(gpt2_folder), batch).logprobs
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        with reference_policy(module, None) as reference:
            assert torch.equal(reference(batch), base)
    assert (say(module, batch).logprobs - base).abs().max() > 0.01


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
    expected = say(before, batch).logprobs
    assert_close(say(module, batch).logprobs, expected)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if f"lora_B.{POLICY}" in name:
                assert parameter.requires_grad
                parameter.add_(0.1)
            elif f".{REFERENCE}." in name:
                assert not parameter.requires_grad
        with reference_policy(module, None) as reference:
            assert_close(reference(batch), expected)
    assert (say(module, batch).logprobs - expected).abs().max() > 0.01


def test_an_adapter_that_does_not_fit_is_refused(gpt2_folder, llama_folder, adapter_folder, tmp_path):
    folder, _ = adapter_folder
    refused(gpt2_folder, r"^lora\.r=8, but .* has rank 4$", lora={"r": 8, "adapter": str(folder)})
    refused(gpt2_folder, r"^lora\.adapter=.*no LoRA adapter", lora={"r": 4, "adapter": str(tmp_path)})
    refused(llama_folder, r"^lora\.adapter=.*no LoRA adapter", lora={"r": 4, "adapter": str(folder)})


def test_lora_needs_no_copy(gpt2_folder):
    config = config_of(gpt2_folder, lora={"r": 4})
    assert load_reference(config, load_policy(config, str(gpt2_folder), CPU)) is None


@pytest.mark.parametrize(
    ("has_bf16", "r", "asked", "expected"),
    [
        (True, 0, "auto", torch.float32),
        (True, 8, "auto", torch.bfloat16),
        (False, 8, "auto", torch.float32),
        (True, 8, "fp32", torch.float32),
        (False, 8, "bf16", torch.bfloat16),
    ],
)
def test_dtype_of_the_weights(monkeypatch, has_bf16, r, asked, expected):
    monkeypatch.setattr(policy_module, "computes_in_bf16", lambda device: has_bf16)
    config = parse(Config, {"lora": {"r": r}, "model": {"dtype": asked}})
    assert resolve_dtype(config, CPU) == expected


def test_a_bf16_base_has_fp32_adapters_head_and_outputs(gpt2_folder):
    module, batch = built(gpt2_folder, lora={"r": 4}, model={"dtype": "bf16"}), sequences(*RAGGED)
    dtypes = {parameter.dtype for parameter in module.parameters() if not parameter.requires_grad}
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in module.parameters() if parameter.requires_grad} == {torch.float32}
    outputs = say(module, batch)
    assert {tensor.dtype for tensor in outputs} == {torch.float32}
    exact = say(built(gpt2_folder), batch).logprobs
    assert_close(outputs.logprobs, exact, atol=0.3, rtol=0.05)


def refused(folder, match, **sections):
    with pytest.raises(ConfigError, match=match) as caught:
        built(folder, **sections)
    assert "\n" not in str(caught.value)


def test_an_absent_model_is_refused(tmp_path):
    refused(tmp_path / "nowhere", r"model\.name_or_path=.*nowhere")


def test_a_folder_without_weights_is_refused(gpt2_folder, tmp_path):
    shutil.copy(gpt2_folder / "config.json", tmp_path)
    refused(tmp_path, r"model\.name_or_path=")


def test_a_folder_with_broken_weights_is_refused(gpt2_folder, tmp_path):
    shutil.copy(gpt2_folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((gpt2_folder / "model.safetensors").read_bytes()[:1000])
    refused(tmp_path, r"model\.name_or_path=")


@pytest.mark.parametrize("family", ["classifier_folder", "gpt2_classifier_folder"])
def test_a_classifier_is_no_policy(family, request):
    """transformers would give it a random vocabulary layer (or none of its own), with a warning at most."""
    refused(request.getfixturevalue(family), r"model\.name_or_path=")


def test_lora_targets_that_the_model_does_not_have_are_refused(gpt2_folder):
    refused(gpt2_folder, r"lora\.target_modules", lora={"r": 4, "target_modules": ["q_proj"]})


@pytest.mark.parametrize(("targets", "layers"), [(["c_fc"], {"c_fc"}), ("all-linear", {"c_attn", "c_proj", "c_fc"})])
def test_lora_targets(gpt2_folder, targets, layers):
    module = built(gpt2_folder, lora={"r": 4, "target_modules": targets})
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in module.named_parameters() if ".lora_A" in name}
    assert adapted == layers


@pytest.mark.parametrize(
    ("lora", "critic"), [({"r": 0}, "head"), ({"r": 4}, "head"), ({"r": 4}, "adapter"), ({"r": 4}, "separate")]
)
def test_gradient_checkpointing_gives_the_same_gradient(gpt2_folder, lora, critic):
    batch, gradients = sequences(*RAGGED), []
    for checkpointing in (False, True):
        model = {"gradient_checkpointing": checkpointing, "critic": critic}
        module = built(gpt2_folder, lora=lora, model=model).train()
        shake_head(module)
        move_adapters(module)
        outputs = module(*calls.model_inputs(batch))
        (outputs.logprobs + outputs.values)[batch.response_mask].sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
        checkpointed = getattr(module.policy, "is_gradient_checkpointing", False)
        assert checkpointed == checkpointing
    assert all(gradient is not None for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_end_of_text_ids(gpt2_folder, llama_folder):
    policy = load_policy(config_of(gpt2_folder), str(gpt2_folder), CPU)
    assert end_of_text_ids(policy) == [policy.config.eos_token_id]
    policy.generation_config.eos_token_id = [3, 7]
    assert end_of_text_ids(policy) == [3, 7]
    policy.generation_config.eos_token_id = None
    assert end_of_text_ids(policy) == []
