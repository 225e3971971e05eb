"""Each planted fault is found at toy size, a healthy run has no problem, and nothing is written."""

import json
import re
import shutil
import zlib
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_accel import __main__ as command_line
from rlhf_accel.commands import doctor
from rlhf_accel.commands.checks.config_checks import read
from rlhf_accel.commands.checks.data_checks import check_format, check_stops
from rlhf_accel.commands.checks.findings import Findings
from rlhf_accel.commands.checks.reward_checks import check_scores
from rlhf_accel.commands.doctor import diagnose
from rlhf_accel.config.loading import to_yaml
from rlhf_accel.data.prompts import load_rows
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models import calls, loading
from rlhf_accel.models.reference import Reference
from rlhf_accel.reward import Classifier, Reward
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.conftest import TEXTS
from tests.test_tokenizer import llama2_tokens

pytestmark = pytest.mark.usefixtures("exact_fp32")


def always_one(prompts, responses, **columns):
    return [1.0] * len(prompts)


def nearly_always_one(prompts, responses, **columns):
    return [1.0 + (number == 0) for number in range(len(prompts))]


def sometimes_nan(prompts, responses, **columns):
    return [float("nan") if number == 5 else float(number) for number in range(len(prompts))]


def uninformed(prompts, responses, **columns):
    raise RuntimeError("no information")


def dislikes_what_people_like(prompts, responses, **columns):
    return [-float(rating) for rating in columns.get("rating", [0.0] * len(prompts))]


def anything(prompts, responses, **columns):
    """Scores that vary and are independent of each other."""
    return [zlib.crc32(response.encode()) / 2**32 for response in responses]


def constant_until_long(prompts, responses, **columns):
    return [float(len(response)) if len(response) > 12 else 0.1 for response in responses]


def per_character_of_the_longest(prompts, responses, **columns):
    return [response.count("o") / max(map(len, responses)) for response in responses]


@pytest.fixture
def examined(tiny, tmp_path, monkeypatch):
    """A function that examines a toy run with these changes and overrides; returns the messages by (level, check),
    and checks that nothing was written."""
    monkeypatch.chdir(tmp_path)

    def examine(*overrides, processes=1, **sections):
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(tiny(**sections)))
        before = sorted(tmp_path.rglob("*"))
        findings = diagnose(path, overrides, printer=lambda _: None, processes=processes).findings
        assert sorted(tmp_path.rglob("*")) == before
        return {(found.level, found.check): found.message for found in findings}

    return examine


def problems(findings):
    return {check for level, check in findings if level == "problem"}


def test_a_healthy_run_has_no_problem(examined):
    findings = examined()
    assert problems(findings) == set()
    checked = {check for _, check in findings}
    assert {"config", "data", "prompts", "tokenizer", "chat template", "batch sizes", "reward", "stops"} <= checked
    assert {"reference", "KL", "dropout", "ratio", "gradient", "prompt tokens"} <= checked
    assert findings["ok", "columns"] == "prompts are text; reward functions get number (int)"
    assert "bit for bit" in findings["ok", "reference"]


@pytest.mark.parametrize("critic", ["head", "adapter", "separate"])
def test_a_healthy_run_with_lora_has_no_problem(examined, llama_folder, critic):
    findings = examined(model={"name_or_path": str(llama_folder), "critic": critic}, lora={"r": 4})
    assert problems(findings) == set()
    assert "in 2 of 2 layers" in findings["ok", "adapters"]


# The ten planted faults


def test_swapped_label(examined, classifier_folder):
    reward = {"model": str(classifier_folder), "label": "NEGATIVE", "function": []}
    assert "POSITIVE" in examined(reward=reward)["problem", "reward label"]


def test_pad_is_eos_and_nothing_stops(examined):
    """With the five most likely tokens only, this model never samples EOS."""
    findings = examined(rollout={"top_k": 5})
    assert problems(findings) == set()
    assert "0% of 64 responses end" in findings["warning", "stops"]
    assert "PAD = EOS, no rollout.stop" in findings["warning", "stops"]
    assert "rollout.top_k=5" in findings["warning", "sampling"]
    punished = examined(rollout={"top_k": 5}, reward={"missing_eos_penalty": 1.0})
    assert "reward.missing_eos_penalty=1" in punished["problem", "stops"]


def test_constant_reward(examined):
    assert "constant" in examined(reward={"function": "tests.test_doctor:always_one"})["problem", "reward"]
    findings = examined(reward={"function": "tests.test_doctor:nearly_always_one"})
    assert "63 of them the same" in findings["warning", "reward"]


def hundreds(prompts, responses, **columns):
    return [1000.0 * response.count("o") / max(len(response), 1) for response in responses]


def test_scores_that_values_cannot_reach(examined):
    reward = {"function": "tests.test_doctor:hundreds"}
    assert "ppo.cliprange_value=0.2" in examined(reward=reward)["warning", "values"]
    # Calibrated scores are not there yet; on their scale nothing is out of reach.
    assert not {"values"} & {check for _, check in examined(reward={**reward, "calibrate": True})}
    assert ("ok", "values") in examined()


def test_adapter_on_the_head_only(examined, monkeypatch):
    monkeypatch.setattr(doctor, "unused_device", lambda: "an idle device")
    findings = examined(lora={"r": 4, "target_modules": ["lm_head"]})
    assert "none of the 2 layers" in findings["problem", "adapters"]
    assert findings["warning", "device"] == "an idle device"


def test_batch_that_does_not_divide(examined):
    findings = examined("--ppo.num_minibatches", "3")
    assert "ppo.num_minibatches=3 does not divide" in findings["problem", "config"]
    assert ("ok", "gradient") in findings  # the other checks ran nevertheless


@pytest.mark.parametrize(
    ("tree", "dropped"),
    [
        ({"ppo": {"kl_coeff": 1.0}}, ["ppo.kl_coeff"]),
        ({"lr": 1.0, "optim": {"lr": 1e-5}}, ["lr"]),
        ({"ppo": 3}, ["ppo"]),
        ({"rollout": {"max_new_tokens": 4}, "ppo": {"micro_batch_tokens": 8}}, ["ppo.micro_batch_tokens"]),
        ({"rollout": {"max_prompt_tokens": 9000}}, ["rollout.max_prompt_tokens"]),  # not ppo.micro_batch_tokens, unset
        ({"ppo": {"num_minibatches": 3, "gamma": 2}}, ["ppo.gamma", "ppo.num_minibatches"]),
    ],
)
def test_a_wrong_key_is_reset_to_its_default(tmp_path, tree, dropped):
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    findings = Findings(lambda _: None)
    assert read(findings, tmp_path / "config.yaml") is not None
    messages = [found.message for found in findings]
    assert [line.partition("continuing with the default of ")[2] for line in messages] == [f"{key})" for key in dropped]


def test_dropout_left_on(examined, monkeypatch):
    findings = examined(lora={"r": 4, "dropout": 0.3})
    assert "lora.dropout=0.3" in findings["warning", "dropout"]
    monkeypatch.setattr(loading, "without_dropout", lambda model: model)
    findings = examined()
    assert "left on" in findings["warning", "dropout"]
    findings = examined(model={"gradient_checkpointing": True})
    assert "left on" in findings["warning", "dropout"] and not {"dropout", "ratio"} & problems(findings)


def test_wrong_chat_template(examined, tmp_path):
    rows = [{"text": f"<|im_start|>user\n{text}<|im_end|>"} for text in TEXTS * 5]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = examined(data={"source": str(path)})["problem", "chat template"]
    assert "<|im_start|>" in message
    assert "40 of 40 prompts" in message


def test_stop_texts_are_tokens_or_texts(gpt2_folder):
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True)])
    tokens = Tokens(tokenizer)
    message = f"a response ends at '<|eot_id|>' (token {len(tokens) - 1}) and '.'"
    assert check_stops([".", "<|eot_id|>"], tokens) == ("ok", message)
    level, message = check_stops(["<|im_end|>"], tokens)
    assert level == "warning" and "no token for <|im_end|>, so the policy may never write it" in message
    with pytest.raises(ConfigError, match=r"^rollout\.stop contains '<\|eot_id\|> '"):
        check_stops(["<|eot_id|> "], tokens)


def test_a_marker_that_is_an_added_token_is_not_foreign(tiny, tmp_path):
    """Even if a tokenizer adds a space before every text and so splits the marker into two tokens."""
    tokens = llama2_tokens()
    (tmp_path / "a.jsonl").write_text('{"text": "<|im_start|>good"}')
    rows = load_rows(str(tmp_path / "a.jsonl"), "train")
    assert check_format(tiny(data={"source": "a.jsonl"}), rows, tokens)[0] == "problem"
    tokens.tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    tokens = Tokens(tokens.tokenizer)
    assert check_format(tiny(data={"source": "a.jsonl"}), rows, tokens)[0] == "ok"


def test_prompt_longer_than_the_context(examined):
    findings = examined(rollout={"max_prompt_tokens": 60}, ppo={"micro_batch_tokens": 128})
    assert "64 positions" in findings["problem", "context window"]
    assert ("ok", "gradient") in findings


@pytest.fixture
def overflowing(classifier_folder, tmp_path_factory):
    """A reward model with values that fp16 cannot represent and fp32 can."""
    folder = tmp_path_factory.mktemp("overflowing")
    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    with torch.no_grad():
        model.roberta.encoder.layer[0].output.dense.weight.mul_(1e5)
        model.roberta.encoder.layer[0].output.dense.bias.fill_(1e5)
    model.save_pretrained(folder)
    for path in classifier_folder.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def test_fp16_overflow(examined, overflowing):
    reward = {"model": str(overflowing), "label": "POSITIVE", "function": [], "dtype": "fp16"}
    findings = examined(reward=reward)
    assert "not finite in float16" in findings["problem", "reward in fp16"]
    assert "reward" not in problems(findings)  # it works in fp32, so the other checks run
    assert ("ok", "gradient") in findings


def test_fp16_that_auto_means_overflows(examined, overflowing, monkeypatch):
    """As on a GPU: what counts is the dtype in use, not the key."""
    monkeypatch.setattr(
        "rlhf_accel.reward.classifier.reward_dtype",
        lambda config, *_: torch.float16 if config.dtype == "auto" else torch.float32,
    )
    findings = examined(reward={"model": str(overflowing), "label": "POSITIVE", "function": [], "dtype": "auto"})
    assert "not finite in float16" in findings["problem", "reward in fp16"]
    assert ("ok", "gradient") in findings, "the other checks run in fp32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp16_is_blamed_for_scores_that_are_not_finite_if_it_is_used(tiny, dtype):
    """Texts of the policy may overflow where those of the checks did not."""

    class Overflows(Classifier):
        def __init__(self):
            self.dtype, self.shared = dtype, None

        def __call__(self, prompts, responses, **columns):
            return [float("inf")] * len(responses)

    setup = PPOTrainer(tiny()).setup
    responses = setup.collector.sample(setup.prompts.batch(1, 4), Seeds(0, 1))
    findings = Findings(lambda line: None)
    reward = Reward(terms=(("reward.model=x", 1.0, Overflows()),))
    check_scores(findings, replace(setup, reward=reward), responses)
    (found,) = findings
    assert "the scores of 4 of 4 reference samples are not finite" in found.message
    assert ("fp16 overflows, set reward.dtype" in found.message) == (dtype == torch.float16)


def test_fp16_overflow_of_the_policy(examined, gpt2_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("overflowing_policy")
    shutil.copytree(gpt2_folder, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1e6)
    model.save_pretrained(folder)
    findings = examined(model={"name_or_path": str(folder), "dtype": "fp16"}, lora={"r": 4})
    assert "not finite in fp16 weights and fp32 passes" in findings["problem", "logits"]


def test_reward_model_without_its_tokenizer(examined, classifier_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(classifier_folder, folder, ignore=shutil.ignore_patterns("*token*"))
    findings = examined(reward={"model": str(folder), "label": "POSITIVE", "function": []})
    assert "no tokenizer could be loaded" in findings["problem", "reward"]
    assert ("ok", "gradient") in findings


# Other checks


def test_a_tokenizer_of_another_model(examined, classifier_folder, gpt2_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(classifier_folder, folder, dirs_exist_ok=True)
    for path in folder.glob("*token*"):
        path.unlink()
    for path in gpt2_folder.glob("*token*"):
        shutil.copy(path, folder)
    findings = examined(reward={"model": str(folder), "label": "POSITIVE", "function": []})
    assert "another model's" in findings["problem", "reward"]


def test_all_problems_show_at_once(examined, tmp_path):
    findings = examined(
        *("--ppo.num_minibatches", "3", "--optim.lr", "-1", "--reward.function", "no.such:module"),
        *("--data.source", str(tmp_path / "absent.jsonl")),
    )
    assert {"config", "data"} <= problems(findings)
    message = " ".join(findings.values())
    assert "optim.lr=-1" in message or "does not divide" in message


def test_labels_that_the_ratings_contradict(examined):
    findings = examined(
        data={"source": "embedded:movie_reviews", "prompt_tokens": [2, 6]},
        reward={"function": "tests.test_doctor:dislikes_what_people_like"},
    )
    assert "-1.00" in findings["warning", "reward label"]  # a function may intend this


def test_no_reward_at_all(examined):
    findings = examined(reward={"function": []})
    assert "no reward is given" in findings["problem", "reward"]
    assert ("ok", "gradient") in findings


def test_a_folder_that_holds_a_run(examined, tmp_path, tiny):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.yaml").write_text(to_yaml(tiny()))
    findings = examined(run={"output_dir": str(taken)})
    assert "already holds a run" in findings["problem", "run folder"]
    assert ("ok", "gradient") in findings
    assert problems(examined(run={"output_dir": str(taken), "resume": "latest"})) == set()


def test_a_folder_that_cannot_be_made(examined, tmp_path):
    """For a run without run.output_dir."""
    (tmp_path / "saved_models").write_text("")
    findings = examined(run={"output_dir": None})
    assert "saved_models is a file" in findings["problem", "run folder"]
    assert ("ok", "gradient") in findings


def test_a_hub_that_cannot_be_written_to(examined):
    findings = examined(run={"push_to_hub": "ada/m"})
    assert "run.push_to_hub=ada/m" in findings["problem", "hub"]
    assert ("ok", "gradient") in findings


def test_a_reward_that_raises_is_not_an_overflow(examined):
    findings = examined(reward={"function": "tests.test_doctor:uninformed", "dtype": "fp16"})
    assert "no information" in findings["problem", "reward"]
    assert ("problem", "reward in fp16") not in findings


def test_a_constant_reward_is_not_compared_with_the_ratings(examined):
    findings = examined(
        data={"source": "embedded:movie_reviews", "prompt_tokens": [2, 6]},
        reward={"function": "tests.test_doctor:always_one"},
    )
    assert ("problem", "reward") in findings
    assert ("ok", "reward label") not in findings


def test_partial_scores(examined):
    findings = examined(reward={"function": "tests.conftest:share_of_o", "partial_every": 2})
    assert re.search(r"by 0\.[3-9]", findings["ok", "partial scores"])
    assert problems(findings) == set()


@pytest.mark.parametrize("every", [1, 64])
@pytest.mark.parametrize("function", ["anything", "constant_until_long", "always_one"])
def test_partial_scores_that_predict_nothing(examined, function, every):
    findings = examined(reward={"function": f"tests.test_doctor:{function}", "partial_every": every})
    assert f"reward.partial_every={every}" in findings["warning", "partial scores"]
    assert "ppo.lam" in findings["warning", "partial scores"]


def test_a_reward_that_cannot_read_an_empty_response(examined):
    findings = examined(reward={"function": "tests.test_doctor:per_character_of_the_longest", "partial_every": 2})
    assert "empty response" in findings["problem", "partial scores"]
    assert "64 reference samples" in findings["warning", "reward"], "complete responses are checked nevertheless"


def test_scores_that_are_not_finite(examined):
    findings = examined(reward={"function": "tests.test_doctor:sometimes_nan"})
    assert "1 of 64 reference samples" in findings["problem", "reward"]


def test_a_reference_that_is_not_the_policy(examined, monkeypatch):
    made = Reference.__init__

    def disturbed(reference, policy, temperature):
        made(reference, policy, temperature)
        with torch.no_grad():
            next(reference.parameters()).mul_(2.0)

    monkeypatch.setattr(Reference, "__init__", disturbed)
    assert {"reference", "KL"} <= problems(examined())


def test_a_gradient_that_is_cut(examined, monkeypatch):
    whole = calls.response_logits

    def cut(*args):
        logits, hidden = whole(*args)
        return logits.detach(), hidden.detach()

    monkeypatch.setattr(calls, "response_logits", cut)
    assert "does not reach" in examined()["problem", "gradient"]


def test_prompts_left_out_and_uneven_batches(examined):
    findings = examined(data={"prompt_tokens": None}, rollout={"max_prompt_tokens": 34}, optim={"lr": 1.0}, processes=3)
    assert "longer than rollout.max_prompt_tokens=34" in findings["warning", "prompts"]
    assert "uneven over 3 processes" in findings["warning", "batch sizes"]
    assert "optim.lr=1" in findings["warning", "learning rate"]


# The command


def test_the_command_prints_problems_and_plans_memory(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(tiny()))
    command_line.main(["doctor", "--config", "config.yaml", "--num_processes", "2", "--zero_stage", "2"])
    output = capsys.readouterr().out
    assert "ok      memory: 2 processes, ZeRO-2" in output
    assert "smallest that fits as configured: 1 process, no ZeRO" in output
    assert "\n0 problems, " in output
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["doctor", "--config", "config.yaml", "--gpu_memory", "100MiB"])
    assert stopped.value.code == 2
    assert "problem memory" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "options",
    [
        ["--gpu_memory", "much"],
        ["--zero_stage", "4"],
        ["--num_processes", "0"],
        ["--offload", "true"],
        ["--offload", "yes", "--zero_stage", "3"],
        ["--zero_stage"],
    ],
)
def test_options_that_make_no_sense(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["doctor", *options])
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err
