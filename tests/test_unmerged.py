"""Reward models that are an adapter and a head: as models of their own, and on the policy's base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_accel import __main__ as command_line
from rlhf_accel.commands import generate, replay
from rlhf_accel.commands.doctor import diagnose
from rlhf_accel.commands.evaluate import Judge
from rlhf_accel.commands.model_sizes import measure
from rlhf_accel.config.loading import load, parse, to_yaml
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.schema import Config, RewardConfig
from rlhf_accel.models import unmerged
from rlhf_accel.models.lora import POLICY, REWARD
from rlhf_accel.models.trainable import training_mode
from rlhf_accel.reward import Classifier, RewardError, SharedBase
from rlhf_accel.reward.calls import call
from rlhf_accel.runs.dumps import Dump
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer
from rlhf_accel.training.reward_trainer import train_reward
from tests.conftest import TEXTS
from tests.test_reward_trainer import write

pytestmark = pytest.mark.usefixtures("exact_fp32")

PAIRS = [{"chosen": f"{TEXTS[i]} {n}", "rejected": f"{TEXTS[i + 1]} {n}"} for n in range(8) for i in (0, 2, 4, 6)]


def trained(base: Path, folder: Path, *, merge: bool = False, **lora: Any) -> Path:
    """A reward model over the base, with adapters that move its scores."""
    tree = {
        "run": {"output_dir": str(folder), "precision": "fp32", "eval_every": 0},
        "model": {"name_or_path": str(base)},
        "lora": {"r": 4, "dropout": 0.2, "target_modules": ["all-linear"], "merge": merge, **lora},
        "data": {"source": str(write(folder.with_suffix(".jsonl"), PAIRS)), "objective": "pairs", "max_tokens": 32},
        "optim": {"lr": 1e-2, "epochs": 1, "batch_size": 8},
    }
    train_reward(parse(RewardTrainingConfig, tree))
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, and the same reward model over it unmerged and merged."""
    base, folder = request.getfixturevalue(f"{request.param}_folder"), tmp_path_factory.mktemp("pair")
    torch.set_float32_matmul_precision("highest")
    return base, trained(base, folder / "unmerged"), trained(base, folder / "merged", merge=True)


@pytest.fixture(scope="module")
def folder(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unmerged reward model over the tiny GPT-2."""
    torch.set_float32_matmul_precision("highest")
    return trained(gpt2_folder, tmp_path_factory.mktemp("reward") / "unmerged")


@pytest.fixture
def sharing(tiny, folder: Path) -> Callable[..., Config]:
    """A function that makes a config of a run whose reward is on the policy's base, or with `own` its own model."""

    def make(*, own: bool = False, **sections: dict) -> Config:
        tree = {
            "model": {"critic": "adapter"},
            "lora": {"r": 4, "target_modules": ["all-linear"]},
            "reward": {"model": str(folder), "function": [], "dtype": "fp32" if own else "auto"},
        }
        tree["reward"]["on_policy_base"] = not own
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        return tiny(**tree)

    return make


def own_scores(place: Path, texts: list[str] = TEXTS, dtype: str = "fp32") -> torch.Tensor:
    classifier = Classifier(RewardConfig(model=str(place), dtype=dtype), str(place), torch.device("cpu"))
    return torch.tensor(classifier([""] * len(texts), texts))


def scores(trainer: PPOTrainer, texts: list[str] = TEXTS) -> torch.Tensor:
    return trainer.reward([""] * len(texts), texts, {})


def assert_rounded(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-6) -> None:
    assert expected.std() > 0.3, "equal scores would test nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


def test_the_scores_are_those_of_the_merged_model(pair, tiny) -> None:
    """As a model of its own, and on the policy's base, where nothing that the run trains has an effect."""
    base, folder, merged = pair
    expected = own_scores(merged)
    assert_rounded(own_scores(folder), expected)
    reward = {"model": str(folder), "function": [], "dtype": "auto", "on_policy_base": True}
    model = {"name_or_path": str(base), "critic": "adapter"}
    embeddings = {"gpt2": "wte", "llama": "embed_tokens"}[json.loads((base / "config.json").read_text())["model_type"]]
    lora = {"r": 2, "target_modules": ["all-linear"], "dropout": 0.5, "modules_to_save": [embeddings]}
    trainer = PPOTrainer(tiny(model=model, lora=lora, reward=reward))
    for name, parameter in trainer.runtime.plain_module.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    assert_rounded(scores(trainer), expected)
    with training_mode(trainer.runtime.module, trainer.config):  # without dropout also while the policy has it
        assert_rounded(scores(trainer), expected)


def test_peft_and_transformers_load_it(pair) -> None:
    _, folder, merged = pair
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "reward_texts.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert "from_pretrained(folder, num_labels=1)" in (folder / "README.md").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, return_tensors="pt", truncation=True, max_length=32) for text in TEXTS]
    for kind in (AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification):
        model = kind.from_pretrained(folder, num_labels=1).eval()
        with torch.no_grad():
            assert_rounded(torch.tensor([float(model(**row).logits) for row in rows]), own_scores(merged))


def test_a_bf16_base_scores_in_bf16(sharing, folder) -> None:
    trainer = PPOTrainer(sharing(model={"dtype": "bf16"}))
    ((_, _, classifier),) = trainer.reward.terms
    assert classifier.dtype == torch.bfloat16 and trainer.setup.arithmetic()["reward_dtype"] == "bf16"
    expected = own_scores(folder)
    assert_rounded(scores(trainer), expected, share=0.03)
    assert (scores(trainer) - expected).abs().max() > 1e-4, "fp32 would round less"


def test_a_run_is_that_of_a_model_of_its_own_and_holds_no_part_of_the_reward(sharing, tmp_path) -> None:
    runs = {}
    for name, own in (("own", True), ("shared", False)):
        run = {"output_dir": str(tmp_path / name), "save_every": 1}
        trainer = PPOTrainer(sharing(own=own, run=run))
        trainer.fit()
        assert trainer.runtime.plain_module.policy.active_adapter == POLICY
        assert "stay frozen" not in trainer.setup.description, "the reward's adapter is frozen from the start"
        trainable = {n for n, p in trainer.runtime.plain_module.named_parameters() if p.requires_grad}
        groups = trainer.runtime._engine.optimizer.param_groups
        optimized = sum(p.numel() for group in groups for p in group["params"])
        runs[name] = trainable, optimized, [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").open()]
    assert runs["own"][:2] == runs["shared"][:2]
    for row, other in zip(runs["own"][2], runs["shared"][2], strict=True):
        for key in (key for key in row if not key.startswith(("time/", "perf/"))):
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=2e-6), key
    for file in sorted(path.relative_to(tmp_path / "own") for path in (tmp_path / "own").rglob("*.safetensors")):
        with safe_open(tmp_path / "own" / file, "pt") as own, safe_open(tmp_path / "shared" / file, "pt") as other:
            assert sorted(own.keys()) == sorted(other.keys())
    assert not list((tmp_path / "shared").rglob(REWARD))


def test_a_killed_run_resumes(sharing, tmp_path) -> None:
    """Step 2 to the last bit, from the checkpoint that a kill after step 1 leaves."""
    place = {"output_dir": str(tmp_path / "whole"), "save_every": 1, "keep_checkpoints": 0}
    PPOTrainer(sharing(run=place)).fit()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000001"
    resumed = PPOTrainer(sharing(run={"output_dir": str(tmp_path / "resumed"), "resume": str(checkpoint)}))
    resumed.fit()
    whole, rest = ([json.loads(x) for x in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "resumed"))
    assert [row["step"] for row in rest] == [2]
    for key in (key for key in rest[0] if not key.startswith(("time/", "perf/"))):
        assert rest[0][key] == whole[1][key], key
    files = [tmp_path / name / "final" / "adapter_model.safetensors" for name in ("whole", "resumed")]
    one, other = map(load_file, files)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_scoring_that_raises_leaves_the_policy_as_it_was(sharing, monkeypatch) -> None:
    trainer = PPOTrainer(sharing())
    policy = trainer.runtime.plain_module.policy
    ((_, _, classifier),) = trainer.reward.terms
    before = [p.requires_grad for p in policy.parameters()]
    bad = lambda *_: (_ for _ in ()).throw(RuntimeError("out of order"))  # noqa: E731
    handle = policy.get_base_model().transformer.h[1].register_forward_pre_hook(bad)
    with pytest.raises(RewardError, match="out of order"):
        scores(trainer)
    handle.remove()
    assert policy.active_adapter == POLICY
    assert [p.requires_grad for p in policy.parameters()] == before
    assert all(p.is_meta for p in classifier.model.transformer.parameters()), "no part of the policy is kept"


def test_another_base_is_refused(sharing, gpt2_folder, llama_folder, tmp_path) -> None:
    """Another family, and the same one with one tensor changed by the least that bf16 shows."""
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    model.transformer.h[1].mlp.c_proj.weight.data *= 1 + 2**-6
    model.save_pretrained(tmp_path / "moved")
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "moved")
    for base in (tmp_path / "moved", llama_folder):
        with pytest.raises(ConfigError, match=rf"^reward\.on_policy_base=true: .* not those of the .*, {base}; train"):
            PPOTrainer(sharing(model={"name_or_path": str(base)}))


def test_a_fingerprint_does_not_depend_on_the_dtype_or_on_adapters(sharing, gpt2_folder) -> None:
    found, bf16, fp16 = (
        unmerged.fingerprints(AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
    assert bf16["bf16"] == found["bf16"] and fp16["fp16"] == found["fp16"] and len({*found.values()}) == 2
    trainer = PPOTrainer(sharing(lora={"modules_to_save": ["wte"], "target_modules": ["c_attn"]}))
    assert unmerged.fingerprints(trainer.runtime.plain_module.policy.get_base_model()) == found


def test_a_whole_model_is_refused_before_a_policy_loads(sharing, classifier_folder, monkeypatch) -> None:
    monkeypatch.setattr("rlhf_accel.training.setup.load_policy", None)
    with pytest.raises(ConfigError, match=r"^reward\.on_policy_base=true: .* is not an adapter .* lora\.merge=false"):
        PPOTrainer(sharing(reward={"model": str(classifier_folder)}))


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"lora": {"r": 0, "target_modules": None}, "model": {"critic": "head"}}, "reward.on_policy_base"),
        ({"model": {"load_in_4bit": True}}, "reward.on_policy_base"),
        ({"reward": {"model": None, "function": "tests.conftest:share_of_o"}}, "reward.on_policy_base"),
        ({"reward": {"dtype": "fp16"}}, "reward.dtype"),
    ],
)
def test_contradictions_name_their_key(sharing, sections, key) -> None:
    with pytest.raises(ConfigError) as error:
        sharing(**sections)
    assert error.value.key == key


def test_unmerged_needs_adapters(gpt2_folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"^lora\.merge=false .* lora\.r=0"):
        trained(gpt2_folder, tmp_path / "reward", r=0)


def test_a_base_that_is_gone_is_named(folder, tmp_path) -> None:
    text = (folder / "reward_texts.json").read_text(encoding="utf-8")
    record = json.loads(text)
    record["unmerged"]["base"] = str(tmp_path / "gone")
    (tmp_path / "moved").mkdir()
    for path in folder.iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "moved" / "reward_texts.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^reward\.model=.*gone"):
        own_scores(tmp_path / "moved")


def test_other_commands_score_with_it(sharing, folder, tmp_path) -> None:
    """evaluate on the policy's base, generate and replay by a model of its own."""
    trainer = PPOTrainer(sharing(run={"total_steps": 1, "eval_samples": 2, "save_every": 0}))
    trainer.fit()
    run, expected = trainer.folder, own_scores(folder)
    config = load(Config, run / "config.yaml")
    ((_, _, classifier),) = Judge.of(run, config, prompts=2).reward.terms
    assert classifier.shared is not None
    assert_rounded(torch.tensor(classifier([""] * len(TEXTS), TEXTS)), expected)
    assert_rounded(generate._reward(config, run)([""] * len(TEXTS), TEXTS, {}), expected, share=0.03)
    facts = {"prompts": [""] * len(TEXTS), "responses": TEXTS, "arithmetic": trainer.setup.arithmetic()}
    dump, _ = replay.with_arithmetic_of_the_run(Dump(config=config, facts=facts, experience={}, weights={}))
    assert_rounded(torch.tensor([row["score"] for row in replay.replay_reward(dump)]), expected)


def test_doctor_examines_and_plans_it(sharing, folder, gpt2_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(sharing()))
    findings = diagnose(tmp_path / "config.yaml", printer=lambda _: None).findings
    assert [found for found in findings if found.level == "problem"] == []
    configs = (sharing(), sharing(own=True, reward={"dtype": "auto"}))
    shared, own = (measure(config, str(gpt2_folder), str(folder)) for config in configs)
    adapter = (folder / "adapter_model.safetensors").stat().st_size
    assert 0.8 * adapter < shared.reward < adapter < own.reward
    assert own.reward == own.reward_own == shared.reward_own
    command_line.main(["doctor", "--config", "config.yaml"])
    saved = (shared.reward_own - shared.reward) / 2**20
    assert f"reward.on_policy_base=true saves {saved:,.1f} MiB per process" in capsys.readouterr().out


class _Refused(Exception):
    pass


def test_ranks_stay_in_step(sharing, monkeypatch) -> None:
    """Where each pass is a collective, a rank makes as many as the one with the most, whatever happens to it."""
    trainer = PPOTrainer(sharing(reward={"batch_size": 3}))
    ((name, _, classifier),) = trainer.reward.terms
    asked: list[int] = []
    shared = classifier.shared
    classifier.shared = SharedBase(
        classifier=shared.classifier, policy=shared.policy, passes=lambda own: asked.append(own) or 5
    )
    read: list[int] = []
    logits = classifier.logits
    monkeypatch.setattr(classifier, "logits", lambda rows: read.append(len(rows)) or logits(rows))
    found = torch.tensor(classifier([""] * 8, TEXTS))
    assert asked == [3] and read == [3, 3, 2, 1, 1]
    assert_rounded(found, scores(trainer))
    asked.clear(), read.clear()
    assert call(name, classifier, [], [], {}, None).tolist() == [] and asked == [0] and len(read) == 5
    read.clear()
    monkeypatch.setattr(classifier, "formed", lambda *_: (_ for _ in ()).throw(_Refused))
    with pytest.raises(_Refused):
        classifier([""], ["a film"])
    assert len(read) == 5


def test_a_folder_or_a_base_that_is_not_there_is_named(
    tiny: Callable[..., Config], gpt2_folder: Path, tmp_path: Path
) -> None:
    shared = {"function": [], "label": None, "on_policy_base": True, "dtype": "auto"}
    missing = str(tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match=rf"^reward\.model={missing}: no such folder"):
        PPOTrainer(tiny(lora={"r": 2}, reward={**shared, "model": missing}))
    folder = trained(gpt2_folder, tmp_path / "adapter")
    for name in ("reward_texts.json", "adapter_config.json"):
        text = (folder / name).read_text().replace(str(gpt2_folder), missing)
        (folder / name).write_text(text)
    for on_base in (True, False):
        with pytest.raises(
            ConfigError, match=rf"^reward\.model={folder} is an adapter over {missing}, which is not there"
        ):
            PPOTrainer(tiny(lora={"r": 2}, reward={**shared, "model": str(folder), "on_policy_base": on_base}))
