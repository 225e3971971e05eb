"""Scores: the classifier against plain transformers, functions by import path, sums, calibration, what is refused."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_accel.config.schema import RewardConfig
from rlhf_accel.reward import Classifier, Reward, RewardError, classifier, import_function, load_reward
from rlhf_accel.system.errors import ConfigError
from tests.conftest import TEXTS, make_tokenizer

CPU = torch.device("cpu")
PROMPTS = [text[: 6 + i] for i, text in enumerate(TEXTS)]
RESPONSES = [text[6 + i :] * (1 + i % 3) for i, text in enumerate(TEXTS)]

pytestmark = pytest.mark.usefixtures("exact_fp32")


def judge_of(folder, **settings):
    settings = {"model": str(folder), "label": "POSITIVE", "dtype": "fp32", **settings}
    return Classifier(RewardConfig(**settings), str(folder), CPU)


def logits_one_by_one(folder, texts, max_tokens=64):
    """(N, labels), each text read alone by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat(
            [
                model(**tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")).logits
                for text in texts
            ]
        )


@pytest.mark.cpu_kinds
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_classifier_agrees_with_plain_transformers_one_by_one(classifier_folder, batch_size):
    expected = logits_one_by_one(classifier_folder, [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])[:, 1]
    assert expected.std() > 0.01, "scores that are all alike would not show a wrong order"
    scores = judge_of(classifier_folder, batch_size=batch_size)(PROMPTS, RESPONSES)
    assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=1e-5)


def test_classifier_may_read_the_response_alone(classifier_folder):
    scores = judge_of(classifier_folder, text="response")(PROMPTS, RESPONSES)
    expected = logits_one_by_one(classifier_folder, RESPONSES)[:, 1]
    assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("label", "column"), [("POSITIVE", 1), ("NEGATIVE", 0), ("1", 1), ("0", 0)])
def test_a_label_is_chosen_by_name_or_number(classifier_folder, label, column):
    scores = judge_of(classifier_folder, label=label, output="probability")(PROMPTS, RESPONSES)
    logits = logits_one_by_one(classifier_folder, [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    assert_close(torch.tensor(scores), logits.softmax(1)[:, column], atol=1e-5, rtol=1e-5)


def test_a_text_longer_than_the_model_reads_is_cut(classifier_folder):
    """RoBERTa has 66 positions, of which its padding offset takes two: 64 tokens, special ones included."""
    judge = judge_of(classifier_folder)
    assert judge.max_tokens == 64
    long = " ".join(TEXTS * 4)
    assert len(AutoTokenizer.from_pretrained(classifier_folder)(long)["input_ids"]) > 200
    expected = logits_one_by_one(classifier_folder, [long, "short"])[:, 1]
    assert_close(torch.tensor(judge(["", ""], [long, "short"])), expected, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_that_knows_no_limit_is_held_to_the_models(classifier_folder, tmp_path):
    shutil.copytree(classifier_folder, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(classifier_folder)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path / "copy")
    judge = judge_of(tmp_path / "copy")
    assert judge.max_tokens == 64
    assert len(judge([""], [" ".join(TEXTS * 4)])) == 1


def test_one_label_needs_no_name(gpt2_classifier_folder):
    judge = judge_of(gpt2_classifier_folder, label=None)
    texts = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    expected = logits_one_by_one(gpt2_classifier_folder, texts)[:, 0]
    assert expected.std() > 0.01
    assert_close(torch.tensor(judge(PROMPTS, RESPONSES)), expected, atol=1e-5, rtol=1e-5)
    chances = judge_of(gpt2_classifier_folder, label=None, output="probability")(PROMPTS, RESPONSES)
    assert_close(torch.tensor(chances), expected.sigmoid(), atol=1e-5, rtol=1e-5)


def test_a_decoder_without_a_pad_token_scores_each_text_at_its_own_end(tmp_path):
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, num_labels=1)
    torch.manual_seed(0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = logits_one_by_one(tmp_path, RESPONSES)[:, 0]
    scores = judge_of(tmp_path, label=None, text="response")(PROMPTS, RESPONSES)
    assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=1e-5)


def refused(folder, match, **settings):
    with pytest.raises(ConfigError, match=match) as caught:
        judge_of(folder, **settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_label_lists_the_labels(classifier_folder):
    refused(classifier_folder, r"reward\.label=GOOD .*NEGATIVE, POSITIVE", label="GOOD")


def test_no_label_where_there_are_two_lists_them(classifier_folder):
    refused(classifier_folder, r"reward\.label is not set.*2 labels: NEGATIVE, POSITIVE", label=None)


def test_a_classifier_without_a_tokenizer_is_refused(classifier_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(classifier_folder / name, tmp_path)
    refused(tmp_path, r"reward\.model=.*tokenizer")


def test_a_tokenizer_that_can_pad_with_nothing_is_refused(classifier_folder, tmp_path):
    """Scoring would fail at the first batch of unequal lengths."""
    shutil.copytree(classifier_folder, tmp_path / "reward")
    make_tokenizer(280, cls_token="<s>").save_pretrained(tmp_path / "reward")
    refused(tmp_path / "reward", "neither a PAD nor an EOS token")


def test_an_absent_reward_model_is_refused(tmp_path):
    refused(tmp_path / "nowhere", r"reward\.model=.*nowhere")


def test_a_model_without_a_classification_head_is_refused(gpt2_folder):
    """transformers would give it a random one, with a warning."""
    refused(gpt2_folder, r"reward\.model=.*score\.weight", label=None)


@pytest.mark.parametrize(
    ("device", "has_bf16", "asked", "expected"),
    [
        ("cuda", True, "auto", torch.float16),
        ("cpu", True, "auto", torch.bfloat16),
        ("cpu", False, "auto", torch.float32),
        ("cpu", True, "fp32", torch.float32),
        ("cuda", True, "bf16", torch.bfloat16),
    ],
)
def test_dtype_of_the_classifier(monkeypatch, device, has_bf16, asked, expected):
    monkeypatch.setattr(classifier, "computes_in_bf16", lambda _: has_bf16)
    assert classifier.reward_dtype(RewardConfig(dtype=asked), torch.device(device)) == expected


def test_half_precision_is_half_precision(classifier_folder):
    judge = judge_of(classifier_folder, dtype="bf16")
    assert {p.dtype for p in judge.model.parameters()} == {torch.bfloat16}
    exact = judge_of(classifier_folder)(PROMPTS, RESPONSES)
    assert_close(torch.tensor(judge(PROMPTS, RESPONSES)), torch.tensor(exact), atol=0.05, rtol=0.05)


def test_the_classifier_is_frozen_and_without_dropout(classifier_folder):
    judge = judge_of(classifier_folder)
    assert not judge.model.training
    assert not any(p.requires_grad for p in judge.model.parameters())


# Functions and sums


def length_of(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def number_of(prompts, responses, number):
    return number


def length_of_prompt(prompts, responses, **columns):
    return torch.tensor([len(prompt) for prompt in prompts])


def rewarding(function, **settings):
    return Reward(terms=(("reward.function=f", 1.0, function),), **settings)


def test_scores_of_terms_have_the_names_of_their_functions():
    terms = (("reward.function=a:number", 2.0, number_of), ("reward.function=b:number", 1.0, length_of_prompt))
    reward = Reward(terms=terms, mean=1.0, std=4.0, clip=0.5)
    found = reward.term_scores(["a", "ab"], ["c", "d"], {"number": [3.0, 4.0]})
    assert found.tolist() == [[3.0, 1.0], [4.0, 2.0]] and found.dtype == torch.float64
    assert {name: column.tolist() for name, column in reward.by_name(found).items()} == {
        "a:number": [3.0, 4.0],
        "b:number": [1.0, 2.0],
    }
    assert reward.total(found).tolist() == [0.5, 0.5]  # (7 - 1) / 4 and (10 - 1) / 4, clipped
    alone = rewarding(number_of)
    assert alone.by_name(alone.term_scores(["a"], ["c"], {"number": [3.0]})) == {}


def test_functions_are_found_by_import_path():
    assert import_function("os.path:join") is __import__("os").path.join


def test_the_working_folder_is_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "a_reward_of_mine.py").write_text("def f(prompts, responses): return [1.0] * len(prompts)\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    assert import_function("a_reward_of_mine:f")(["a"], ["b"]) == [1.0]


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("os.path.join", "expected package.module:callable"),
        (":join", "expected package.module:callable"),
        ("os.path:", "expected package.module:callable"),
        ("no_such_module:f", "cannot be imported .*no_such_module"),
        ("os.path:no_such_name", "os.path has no no_such_name"),
        ("os:name", "name is not callable"),
        ("broken_reward:f", "cannot be imported .*ZeroDivisionError"),
        ("torn_reward:f", "cannot be imported .*SyntaxError"),
        ("tangled_reward:f", "cannot be imported .*AttributeError"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused(target, match, tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("1 / 0\n\ndef f(prompts, responses): return []\n")
    (tmp_path / "torn_reward.py").write_text("def f(:\n")
    (tmp_path / "tangled_reward.py").write_text("import os\nos.no_such_thing\n\ndef f(prompts, responses): return []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=rf"^reward\.function={target}.*{match}") as caught:
        import_function(target)
    assert "\n" not in str(caught.value)


def test_nothing_to_reward_with_is_refused():
    with pytest.raises(ConfigError, match=r"reward\.model, reward\.url or reward\.function"):
        load_reward(RewardConfig(), None, CPU)


def test_prompts_responses_and_columns_reach_the_function():
    seen = []

    def spy(prompts, responses, **columns):
        seen.append((prompts, responses, columns))
        return [0.0] * len(prompts)

    rewarding(spy)(("a", "b"), ("c", "d"), {"number": (1, 2), "source": ("x", "y")})
    assert seen == [(["a", "b"], ["c", "d"], {"number": [1, 2], "source": ["x", "y"]})]


def test_the_score_is_the_weighted_sum_of_model_and_functions(classifier_folder):
    functions = (f"{__name__}:length_of", f"{__name__}:length_of_prompt")
    config = RewardConfig(
        model=str(classifier_folder), label="POSITIVE", dtype="fp32", function=functions, weights=(2.0, 0.5, -0.25)
    )
    scores = load_reward(config, str(classifier_folder), CPU)(PROMPTS, RESPONSES, {})
    logits = logits_one_by_one(classifier_folder, [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])[:, 1]
    lengths = torch.tensor([[len(p), len(r)] for p, r in zip(PROMPTS, RESPONSES, strict=True)]).float()
    assert scores.dtype == torch.float32
    assert_close(scores, 2 * logits + 0.5 * lengths[:, 1] - 0.25 * lengths[:, 0], atol=1e-4, rtol=1e-5)
    unweighted = load_reward(replace(config, weights=None), str(classifier_folder), CPU)(PROMPTS, RESPONSES, {})
    assert_close(unweighted, logits + lengths.sum(1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_lists_arrays_and_tensors_are_taken(convert):
    scores = rewarding(lambda prompts, responses, number: convert(number))(["a", "b"], ["c", "d"], {"number": [1, 2]})
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 2.0]


def test_the_scores_keep_no_graph():
    weight = torch.nn.Parameter(torch.ones(2))
    assert not rewarding(lambda p, r: weight * 2)(["a", "b"], ["c", "d"], {}).requires_grad


def test_calibration_gives_mean_0_and_variance_1():
    plain = rewarding(length_of)
    raw = plain(PROMPTS, RESPONSES, {})
    calibrated = plain.calibrated(raw)
    scores = calibrated(PROMPTS, RESPONSES, {})
    assert_close(scores.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(scores.var(), torch.tensor(1.0), atol=1e-6, rtol=0)
    assert torch.equal(scores.argsort(), raw.argsort())
    # Scores of a reward that is calibrated already lead to the same scale.
    again = calibrated.calibrated(scores)
    assert_close(torch.tensor([again.mean, again.std]), torch.tensor([calibrated.mean, calibrated.std]))


def test_the_clip_comes_after_the_calibration():
    plain = rewarding(length_of, clip=0.5)
    calibrated = plain.calibrated(replace(plain, clip=None)(PROMPTS, RESPONSES, {}))
    scores, unclipped = calibrated(PROMPTS, RESPONSES, {}), replace(calibrated, clip=None)(PROMPTS, RESPONSES, {})
    assert (unclipped.abs() > 0.5).any()
    assert torch.equal(scores, unclipped.clamp(-0.5, 0.5))


def test_a_reward_that_does_not_vary_cannot_be_calibrated():
    with pytest.raises(ConfigError, match=r"reward\.calibrate=true.*all 3 reference samples score 2"):
        rewarding(length_of).calibrated(torch.full((3,), 2.0))


def raising(prompts, responses):
    raise KeyError("rating")


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (raising, "raised KeyError: 'rating'"),
        (lambda p, r: [1.0], "1 scores for 2 responses"),
        (lambda p, r: [1.0, 2.0, 3.0], "3 scores for 2 responses"),
        (lambda p, r: [0.0, float("nan")], "nan for the response 'second'"),
        (lambda p, r: [float("inf"), 0.0], "inf for the response 'first'"),
        (lambda p, r: [[1.0], [2.0]], r"shape \(2, 1\)"),
        (lambda p, r: 1.0, r"shape \(\)"),
        (lambda p, r: ["good", "bad"], "returned \\['good', 'bad'\\]; return one number"),
        (lambda p, r: None, "returned None; return one number"),
        (lambda p, r: [1.0, None], "returned .*None.*; return one number"),
    ],
)
def test_what_is_not_one_finite_number_for_each_response_is_an_error(function, match):
    with pytest.raises(RewardError, match=match) as caught:
        rewarding(function).try_out(["a", "b"], ["first", "second"], {})
    assert "reward.function=f" in str(caught.value)


def test_while_training_a_score_that_is_not_finite_is_for_the_trainer_to_find():
    assert rewarding(lambda p, r: [0.0, float("nan")])(["a", "b"], ["first", "second"], {}).isnan().tolist() == [
        False,
        True,
    ]


def test_a_missing_column_is_said():
    with pytest.raises(RewardError, match="number"):
        rewarding(number_of)(["a"], ["b"], {})


def test_roberta_positions_are_counted_from_the_padding_id(tmp_path):
    """The offset is the padding id plus one, and not always two."""
    tokenizer = make_tokenizer(280, bos_token="<s>", eos_token="</s>", pad_token="<zpad>")
    assert tokenizer.pad_token_id == 2
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=35,
        pad_token_id=2,
        num_labels=1,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = judge_of(tmp_path, label=None)
    assert judge.max_tokens == 32
    assert len(judge([""], [" ".join(TEXTS)])) == 1


def test_no_responses_are_no_call():
    """A rank may have no share of a batch, and a user's function need not know what to make of nothing."""

    def highest(prompts, responses, **columns):
        return [max(len(response) for response in responses)] * len(responses)

    scored = Reward(terms=(("highest", 1.0, highest),), clip=None)
    assert scored([], [], {}).shape == (0,)


def test_an_empty_response_is_scored(classifier_folder):
    (score,) = judge_of(classifier_folder, text="response")(["A film"], [""])
    assert np.isfinite(score)
