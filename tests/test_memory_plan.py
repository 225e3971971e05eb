"""The memory plan: sizes against real passes, partitions against the ZeRO paper, and fits against sums by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from rlhf_accel.commands import memory_plan as plan
from rlhf_accel.commands import model_sizes
from rlhf_accel.commands.memory_plan import Launch
from rlhf_accel.commands.model_sizes import Sizes
from rlhf_accel.models import policy_with_value
from rlhf_accel.models.policy import load_policy
from rlhf_accel.system.errors import ConfigError

CPU = torch.device("cpu")
ALL = ("all-linear",)

# A model of 1000 numbers, of which all learn, with round figures elsewhere.
SIZES = Sizes(
    held=1000,
    trainable=1000,
    largest=100,
    weights=4000,
    reference=4000,
    packed=3000,
    reward=500,
    reward_own=500,
    fixed=0,
    activations_row=600,
    logits_row=80,
    layer_row=100,
    inputs_row=50,
    outside_row=20,
    cache_row=10,
    reward_row=5,
)


def real_pass(config, path, rows):
    """Bytes that autograd keeps of a real forward pass, each storage once, weights not counted."""
    policy = load_policy(config, path, CPU)
    module = policy_with_value.build(config, policy, path, None).eval()
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its place is not taken by another
        return tensor

    queries = torch.zeros(rows, 6, dtype=torch.int64)
    responses = torch.zeros(rows, 8, dtype=torch.int64)
    query_mask = torch.ones_like(queries).bool()
    query_mask[0, 0] = False  # without any padding the attention mask could be done without
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(queries, query_mask, responses, torch.ones_like(responses).bool())
    held = sum(p.numel() * p.element_size() for p in module.parameters())
    learned = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return sum(size for size, _ in kept.values()), held, learned


@pytest.mark.parametrize(
    ("model", "lora", "critic"),
    [
        ("gpt2_folder", {}, "head"),
        ("gpt2_folder", {"r": 4, "target_modules": ALL}, "adapter"),
        ("llama_folder", {}, "separate"),
        ("llama_folder", {"r": 4, "target_modules": ALL}, "head"),
    ],
)
def test_sizes_are_those_of_a_real_pass(tiny, request, model, lora, critic):
    """Fake tensors select the same kernels as real ones, so autograd keeps the same tensors, except masks."""
    path = str(request.getfixturevalue(model))
    config = tiny(model={"name_or_path": path, "critic": critic}, lora=lora)
    sizes = model_sizes.measure(config, path)
    kept, held, learned = real_pass(config, path, 16)
    assert (sizes.weights, sizes.trainable) == (held, learned)
    assert sizes.fixed + 16 * (sizes.activations_row + sizes.logits_row) == pytest.approx(kept, rel=0.02)
    assert (sizes.reference > 0) == (not lora)


def test_plain_attention_keeps_its_scores(tiny, gpt2_folder):
    """As many bytes as a real pass; kernels that fake tensors do not have count as the default."""
    of = {kind: tiny(model={"attention": kind}) for kind in ("auto", "sdpa", "flex_attention", "eager")}
    sizes = {kind: model_sizes.measure(config, str(gpt2_folder)) for kind, config in of.items()}
    assert sizes["auto"] == sizes["sdpa"] == sizes["flex_attention"]
    plain = sizes["eager"]
    assert plain.activations_row > sizes["auto"].activations_row
    kept, *_ = real_pass(of["eager"], str(gpt2_folder), 16)
    assert plain.fixed + 16 * (plain.activations_row + plain.logits_row) == pytest.approx(kept, rel=0.02)


def test_without_a_critic_none_is_planned(tiny, gpt2_folder):
    with_critic = model_sizes.measure(tiny(), str(gpt2_folder))
    config = tiny(ppo={"advantage": "rloo"}, rollout={"batch_size": 4, "samples_per_prompt": 2})
    without = model_sizes.measure(config, str(gpt2_folder))
    width = AutoConfig.from_pretrained(gpt2_folder).hidden_size
    assert with_critic.trainable - without.trainable == width + 1
    assert plan._Rows.of(config, 2, on_gpu=True) == plan._Rows.of(tiny(), 2, on_gpu=True), (
        "eight responses to four prompts"
    )


def test_autocast_keeps_rounded_weights(tiny, gpt2_folder):
    config = tiny(run={"precision": "bf16"})
    sizes, plain = model_sizes.measure(config, str(gpt2_folder)), model_sizes.measure(tiny(), str(gpt2_folder))
    # Each matrix in bf16 once, however many samples: 2 layers of 12 x 32 x 32 numbers, and the vocabulary's 32 a token.
    assert sizes.fixed - plain.fixed >= 2 * (2 * 12 * 32 * 32)
    assert sizes.activations_row < 0.8 * plain.activations_row
    assert (sizes.packed, plain.packed > 0) == (0, False)  # toy layers are not worth packing


def test_the_cache_is_that_of_the_grouped_heads(tiny, llama_folder):
    """2 layers, keys and values, 2 of 4 heads of width 8, 14 tokens, 4 bytes."""
    config = tiny(model={"name_or_path": str(llama_folder)})
    assert model_sizes.measure(config, str(llama_folder)).cache_row == 2 * 2 * 2 * 8 * 14 * 4


def test_a_frozen_base_in_four_bits(tiny, llama_folder):
    config = tiny(model={"name_or_path": str(llama_folder)}, lora={"r": 4, "target_modules": ALL})
    small = model_sizes.measure(replace(config, model=replace(config.model, load_in_4bit=True)), str(llama_folder))
    # Of each layer 32 x (32 + 16 + 16 + 32) and 3 x 32 x 64 numbers, from 4 bytes to 4.127 bits.
    numbers = 2 * (32 * 96 + 3 * 32 * 64)
    saved = model_sizes.measure(config, str(llama_folder)).weights - small.weights
    assert saved == pytest.approx(numbers * (4 - 4.127 / 8), rel=1e-3)


def test_parts_that_the_stages_partition(tiny):
    """Rajbhandari et al. 2020, figure 1, in fp32: of 4 + 4 + 8 bytes for each number ZeRO-1 cuts the 8, ZeRO-2 the
    gradients too, ZeRO-3 all; DeepSpeed's master copy of the part that a rank steps comes on top in the first two."""
    config = tiny()

    def parts(stage, processes=4):
        made = plan.plan(config, SIZES, Launch(processes=processes, zero_stage=stage), base=7)
        update = made.phases["update"]
        return [update.get(name, 0) for name in ("weights", "reference", "gradients", "optimizer", "master weights")]

    assert parts(0) == [4000, 4000, 4000, 8000, 0]
    assert parts(1) == [4000, 4000, 4000, 2000, 1000]
    assert parts(2) == [4000, 4000, 1000, 2000, 1000]
    assert parts(3) == [1000, 1000, 1000, 2000, 0]


def test_the_parts_of_each_phase(tiny):
    """Batch 8 in 2 minibatches, 14 tokens a sample, 64 a pass: 8 rows sampled, 4 in a pass."""
    made = plan.plan(tiny(), SIZES, Launch(), base=7)
    assert made.phases["load"] == {"process": 7, "weights": 4000, "reference": 4000, "reward model": 500}
    rollout, score, update = (made.phases[name] for name in ("rollout", "score", "update"))
    assert (rollout["packed weights"], rollout["KV cache"], rollout["logits"]) == (3000, 80, 4 * 8 * 10)
    assert (score["activations"], score["kept pages"]) == (8 * 5, 3000 + 80)
    held = {name: size for name, size in update.items() if size}
    assert held == {**made.phases["load"], "optimizer": 8000, "gradients": 4000, "kept pages": 3080}
    assert made.total("score") == 7 + 4000 + 4000 + 500 + 8000 + 40 + 3080
    assert made.peak == max(made.total(phase) for phase in plan.PHASES)


def test_a_single_pass_does_not_hold_all_activations_and_all_gradients(tiny):
    large = replace(SIZES, activations_row=6000)
    for sizes, held in ((SIZES, {"gradients": 4000}), (large, {"activations": 24000, "logits": 640, "gradients": 400})):
        update = plan.plan(tiny(), sizes, Launch(), base=0).phases["update"]
        assert {name: update[name] for name in ("activations", "logits", "gradients") if name in update} == held
    two = plan.plan(tiny(ppo={"micro_batch_tokens": 28}), SIZES, Launch(), base=0).phases["update"]
    assert (two["activations"], two["gradients"]) == (2 * 600, 4000)


def test_checkpointing_keeps_inputs_and_one_layer(tiny):
    large = replace(SIZES, activations_row=6000)
    config = tiny(model={"gradient_checkpointing": True}, ppo={"micro_batch_tokens": 28})
    assert plan.plan(config, large, Launch(), base=0).phases["update"]["activations"] == 2 * (50 + 20 + 100)


def test_on_a_gpu_nothing_is_packed_away_and_offload_is_elsewhere(tiny):
    made = plan.plan(tiny(), SIZES, Launch(device="cuda"), base=7)
    assert made.phases["update"]["process"] == plan.CUDA_CONTEXT
    for processes, stage, communicators in ((1, 0, 0), (1, 2, 0), (2, 0, 1), (8, 3, 2)):
        launch = Launch(processes=processes, zero_stage=stage, device="cuda")
        parts = plan.plan(tiny(), SIZES, launch, base=7).phases
        assert {parts[phase]["NCCL"] for phase in plan.PHASES} == {communicators * plan.NCCL_COMMUNICATOR}
    assert plan.plan(tiny(), SIZES, Launch(processes=8, zero_stage=3), base=7).phases["update"]["NCCL"] == 0
    assert [made.phases[phase]["kept pages"] for phase in ("score", "update")] == [0, 0]
    offloaded = plan.plan(tiny(), SIZES, Launch(zero_stage=3, offload=True, device="cuda"), base=7)
    assert [offloaded.phases["update"][name] for name in ("weights", "reference", "optimizer")] == [0, 0, 0]


def test_the_smallest_launch_that_fits(tiny):
    """Fewest processes first, then the lowest stage; a machine's processes share its memory, GPUs have their own."""
    config = tiny()

    def needs(processes, stage):
        launch = Launch(processes=processes, zero_stage=stage, device="cuda")
        return plan.plan(config, SIZES, launch, base=0).peak

    found = plan.smallest(config, SIZES, memory=needs(1, 0), base=0, device="cuda")
    assert found.launch == Launch(device="cuda")
    found = plan.smallest(config, SIZES, memory=needs(1, 0) - 1, base=0, device="cuda")
    assert found.launch == Launch(zero_stage=3, offload=True, device="cuda")
    wide = replace(SIZES, activations_row=10**9)  # 4 rows in a pass of one process, 2 of two
    room = plan.CUDA_CONTEXT + plan.NCCL_COMMUNICATOR + 2 * 10**9 + 10**5
    found = plan.smallest(config, wide, memory=room, base=0, device="cuda")
    assert found.launch == Launch(processes=2, device="cuda")
    assert plan.smallest(config, SIZES, memory=1000, base=0, device="cuda") is None
    alone = plan.plan(config, SIZES, Launch(), base=10).peak
    assert plan.smallest(config, SIZES, memory=alone, base=10).launch == Launch()
    assert plan.smallest(config, SIZES, memory=alone - 1, base=10) is None


def test_advice_comes_cheapest_first(tiny, gpt2_folder, monkeypatch):
    """In the order micro-batches, checkpointing, LoRA, stage and offload, without steps that save nothing."""
    monkeypatch.setattr(plan, "NCCL_COMMUNICATOR", 0)  # more than all of a tiny model
    config = tiny(ppo={"num_minibatches": 1, "micro_batch_tokens": 4096}, rollout={"batch_size": 256})
    launch = Launch(processes=2, device="cuda")
    paths = (str(gpt2_folder), None)
    order = [
        "--ppo.micro_batch_tokens",
        "--rollout.forward_batch_size",
        "--model.gradient_checkpointing",
        "--lora.r",
        "accelerate",
    ]
    whole = (
        plan.plan(config, model_sizes.measure(config, *paths, device="cuda"), launch, base=0).peak - plan.CUDA_CONTEXT
    )
    asked = []
    for share in (1.0, 0.8, 0.0):
        memory = plan.CUDA_CONTEXT + int(share * whole)
        steps, made = plan.advice(config, launch, memory=memory, base=0, paths=paths)
        assert plan.fits(made, memory) == (share > 0)
        asked.append([step.split()[0] for step in steps])
    assert asked[:2] == [[], order[:1]]
    assert asked[2] == [name for name in order if name in asked[2]]
    assert {"--ppo.micro_batch_tokens", "--lora.r", "accelerate"} <= set(asked[2])
    assert "zero3_offload" in steps[-1]


def test_a_gpu_samples_its_share_at_once_and_advice_lowers_what_is_sampled(tiny, monkeypatch):
    config = tiny(rollout={"batch_size": 256, "forward_batch_size": None})
    large = replace(SIZES, cache_row=10**6)
    rows = {"cpu": 64, "cuda": 128}
    for device, count in rows.items():
        made = plan.plan(config, large, Launch(processes=2, device=device), base=0)
        assert made.phases["rollout"]["KV cache"] == count * 10**6
    monkeypatch.setattr(plan, "measure", lambda *_, **__: large)
    memory, launch = plan.CUDA_CONTEXT + plan.NCCL_COMMUNICATOR + 50 * 10**6, Launch(processes=2, device="cuda")
    steps, made = plan.advice(config, launch, memory=memory, base=0, paths=("", None))
    assert steps == ["--rollout.forward_batch_size 32"] and plan.fits(made, memory)
    steps, made = plan.advice(config, Launch(processes=2), memory=100 * 10**6, base=0, paths=("", None))
    assert steps[-1] == "--rollout.forward_batch_size 32" and plan.fits(made, 100 * 10**6)


def test_tables_add_up(tiny):
    made = plan.plan(tiny(), replace(SIZES, weights=400 << 20), Launch(), base=100 << 20)
    lines = plan.table(made).splitlines()
    assert lines[0].split()[-4:] == list(plan.PHASES)
    assert lines[1].split() == ["process", "100", "100", "100", "100"]
    assert lines[-1].split() == ["total", *["500"] * 4]
    rows = plan.overview(tiny(), SIZES, Launch(processes=2, zero_stage=2), base=0).splitlines()
    assert [row.startswith("ZeRO-2 <") for row in rows] == [False, False, False, True, False]


@pytest.mark.parametrize("text", ["", "80", "GiB", "-1GiB", "nanGB", "eighty GiB", "infGB"])
def test_a_text_that_is_not_a_size(text):
    with pytest.raises(ConfigError, match="--gpu_memory"):
        plan.parse_memory(text)


def test_a_folder_without_a_model(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.name_or_path"):
        model_sizes.measure(tiny(), str(tmp_path))
