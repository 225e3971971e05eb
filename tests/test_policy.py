"""Policy, value model and reference, compared with plain transformers on one unpadded sequence at a time."""

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
from rlhf_accel.models import calls, loading, policy_with_value
from rlhf_accel.models import policy as policy_module
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


def outputs_of(module, batch):
    with torch.no_grad():
        return module(*calls.model_inputs(batch), with_entropy=True)


def outputs_one_by_one(causal_lm, trunk, head, batch, temperature=1.0):
    """Logprobs, values and entropy of each row's own tokens, from forward passes without padding."""
    found = []
    for i in range(len(batch)):
        query, response = batch.queries[i][batch.query_mask[i]], batch.responses[i][batch.response_mask[i]]
        ids = torch.cat([query, response])[None]
        with torch.no_grad():
            logits = causal_lm(ids).logits[0].double() / temperature
            hidden = trunk(ids).last_hidden_state[0]
        # The state before response token t is that of the previous token.
        before = slice(len(query) - 1, len(ids[0]) - 1)
        logp = logits[before].log_softmax(-1)
        values = hidden[before] @ head.weight[0].detach() + head.bias[0].detach()
        found.append(
            (logp[torch.arange(len(response)), response].float(), values, -(logp.exp() * logp).sum(-1).float())
        )
    return found


def assert_outputs(outputs, expected, batch, tolerance=1e-5):
    for i, per_row in enumerate(expected):
        for ours, theirs in zip(outputs, per_row, strict=True):
            assert_close(ours[i][batch.response_mask[i]], theirs, atol=tolerance, rtol=tolerance)


def shake_head(module):
    """Give the head weights: values of a new one are 0, wherever they are read."""
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
    expected = outputs_one_by_one(lm, trunk, module.value_head, batch, temperature)
    assert_outputs(outputs_of(module, batch), expected, batch)


@pytest.mark.parametrize("family", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (5, 2)])
def test_padding_changes_nothing(family, left, right, request):
    module = built(request.getfixturevalue(family))
    shake_head(module)
    plain, padded = sequences(*RAGGED), sequences(*RAGGED, left=left, right=right)
    assert not torch.equal(plain.responses[:, -1], padded.responses[:, plain.responses.shape[1] - 1]) or right == 0
    for ours, theirs in zip(outputs_of(module, padded), outputs_of(module, plain), strict=True):
        length = plain.responses.shape[1]
        assert_close(ours[:, :length][plain.response_mask], theirs[plain.response_mask], atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_gives_the_outputs_of_the_whole_batch(gpt2_folder):
    module = built(gpt2_folder)
    shake_head(module)
    batch = sequences(*RAGGED)
    whole = outputs_of(module, batch)
    for i in range(len(batch)):
        alone = batch.select(torch.tensor([i])).trimmed()
        for ours, theirs in zip(outputs_of(module, alone), whole, strict=True):
            assert_close(ours[0][alone.response_mask[0]], theirs[i][batch.response_mask[i]], atol=1e-5, rtol=1e-5)


def test_entropy_is_computed_on_request(gpt2_folder):
    module, batch = built(gpt2_folder), sequences(*RAGGED)
    with torch.no_grad():
        outputs = module(*calls.model_inputs(batch))
    assert outputs.entropy is None
    assert torch.equal(outputs.logprobs, outputs_of(module, batch).logprobs)


def test_a_model_that_computes_all_logits_gives_the_same(gpt2_folder, monkeypatch):
    """Older models take no logits_to_keep."""
    module, batch = built(gpt2_folder), sequences(*RAGGED)
    shake_head(module)
    expected = outputs_of(module, batch)
    accepted = calls.accepted

    def without_logits_to_keep(model, **extras):
        return accepted(model, **{name: value for name, value in extras.items() if name != "logits_to_keep"})

    monkeypatch.setattr(calls, "accepted", without_logits_to_keep)
    for ours, theirs in zip(outputs_of(module, batch), expected, strict=True):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_values_are_read_before_the_token_is_chosen(gpt2_folder):
    module = built(gpt2_folder)
    shake_head(module)
    batch = sequences([3], [5])
    before = outputs_of(module, batch)
    batch.responses[0, 2] += 1
    after = outputs_of(module, batch)
    # Token 2 has another log-probability, but the states it was chosen from (up to index 2) are the same.
    assert_close(after.values[0, :3], before.values[0, :3])
    assert_close(after.entropy[0, :3], before.entropy[0, :3])
    assert_close(after.logprobs[0, :2], before.logprobs[0, :2])
    assert (after.values[0, 3:] - before.values[0, 3:]).abs().min() > 1e-4
    assert abs(after.logprobs[0, 2] - before.logprobs[0, 2]) > 1e-4


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_values_start_at_zero(gpt2_folder, critic):
    values = outputs_of(built(gpt2_folder, model={"critic": critic}), sequences(*RAGGED)).values
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.zeros_like(values))


def test_dropout_is_off_in_training_mode_but_stays_in_the_saved_config(gpt2_folder, tmp_path):
    assert GPT2Config.from_pretrained(gpt2_folder).attn_pdrop == 0.1
    module = built(gpt2_folder, model={"critic": "separate"})
    shake_head(module)
    batch = sequences(*RAGGED)
    calm = outputs_of(module.eval(), batch)
    for ours, theirs in zip(outputs_of(module.train(), batch), calm, strict=True):
        assert torch.equal(ours, theirs)
    module.policy.save_pretrained(tmp_path)
    saved = GPT2Config.from_pretrained(tmp_path)
    assert (saved.attn_pdrop, saved.embd_pdrop, saved.resid_pdrop) == (0.1, 0.1, 0.1)


def test_dropout_that_is_a_number_and_not_a_layer_is_off_too(llama_folder, tmp_path):
    config = LlamaConfig.from_pretrained(llama_folder, attention_dropout=0.5)
    LlamaForCausalLM.from_pretrained(llama_folder, config=config).save_pretrained(tmp_path)
    module, batch = built(tmp_path), sequences(*RAGGED)
    assert torch.equal(outputs_of(module.train(), batch).logprobs, outputs_of(module.eval(), batch).logprobs)


def test_separate_critic_starts_from_the_policy_and_shares_nothing(gpt2_folder):
    module = built(gpt2_folder, model={"critic": "separate"})
    shake_head(module)
    batch = sequences(*RAGGED)
    lm, trunk = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval(), AutoModel.from_pretrained(gpt2_folder).eval()
    assert_outputs(outputs_of(module, batch), outputs_one_by_one(lm, trunk, module.value_head, batch), batch)
    before = outputs_of(module, batch)
    with torch.no_grad():
        module.critic.wte.weight.add_(torch.randn_like(module.critic.wte.weight))
    after = outputs_of(module, batch)
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
    assert_outputs(outputs_of(module, batch), outputs_one_by_one(lm, trunk, module.value_head, batch), batch)


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


def test_without_a_critic_lr_all_parameters_have_one_rate(gpt2_folder):
    groups = parameter_groups(built(gpt2_folder), OptimConfig(lr=1e-3))
    assert {group["lr"] for group in groups} == {1e-3}


def test_the_frozen_copy_does_not_follow_the_policy(gpt2_folder):
    config, batch = config_of(gpt2_folder, rollout={"temperature": 0.7}), sequences(*RAGGED)
    policy = load_policy(config, str(gpt2_folder), CPU)
    reference = load_reference(config, policy)
    module = policy_with_value.build(config, policy, str(gpt2_folder), None)
    start = outputs_of(module, batch).logprobs
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        with reference_policy(module, reference) as logprobs:
            found = logprobs(batch)
    assert torch.equal(found, start)
    assert (outputs_of(module, batch).logprobs - start).abs().max() > 0.01


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
    outputs = outputs_of(module, batch)
    assert {tensor.dtype for tensor in outputs} == {torch.float32}
    exact = outputs_of(built(gpt2_folder), batch).logprobs
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
def test_a_classifier_is_not_a_policy(family, request):
    """transformers would give it a random vocabulary layer (or none of its own), with a warning at most."""
    refused(request.getfixturevalue(family), r"model\.name_or_path=")


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


def move_adapters(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                # Each another way: the policy's and the critic's start as the same.
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_policy_critic_and_reference_have_the_attention_of_the_config(kind, gpt2_folder):
    sections = {"model": {"critic": "separate", "attention": kind}}
    module = built(gpt2_folder, **sections)
    reference = load_reference(config_of(gpt2_folder, **sections), module.policy)
    models = (module.policy, module.critic, reference.policy)
    assert [model.config._attn_implementation for model in models] == [kind] * 3
    assert policy_module.loading_settings(config_of(gpt2_folder, **sections), CPU)["attn_implementation"] == kind


def test_attention_that_cannot_work_here_names_what_to_set(gpt2_folder, monkeypatch):
    fast = {"model": {"attention": "flash_attention_2"}}
    with pytest.raises(ConfigError, match=r"^model\.attention=flash_attention_2 needs a CUDA GPU; set") as found:
        built(gpt2_folder, **fast)
    assert found.value.key == "model.attention"
    config, gpu = config_of(gpt2_folder, **fast).model, torch.device("cuda")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the library flash-attn, which is not installed"):
        loading.check_attention(config, gpu)
    monkeypatch.setitem(loading._FLASH, "flash_attention_2", lambda: True)
    loading.check_attention(config, gpu)
    with pytest.raises(ConfigError, match=r"^model\.attention=flex_attention needs a CUDA GPU; set"):
        built(gpt2_folder, model={"attention": "flex_attention"})
    monkeypatch.setattr(policy_module, "check_attention", lambda *_: None)
    with pytest.raises(ConfigError, match=r"^model\.name_or_path=.* with model\.attention=flex_attention: .* not "):
        built(gpt2_folder, model={"attention": "flex_attention"})
