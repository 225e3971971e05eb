"""Reward-model training at toy size: a random BERT with a word tokenizer learns which words people like."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from rlhf_accel import reward_trainer
from rlhf_accel.config import ConfigError, RewardTrainingConfig, load, parse
from rlhf_accel.reward_trainer import agreement, train_reward

WORDS = {"awful": -3.0, "dull": -1.5, "odd": 0.0, "good": 1.5, "superb": 3.0}


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "film", "very", *WORDS, *(f"##{c}" for c in "abc")]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]", max_input_chars_per_word=50)
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def ratings(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        word = str(rng.choice(list(WORDS)))
        text = f"a {'very ' * int(rng.integers(0, 6))}{word} film {i}"
        rows.append({"text": text, "rating": WORDS[word] + float(rng.normal(0, 0.1))})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(bert_folder: Path, tmp_path: Path):
    """A function that makes a config on a file with these rows, with changes to its sections."""

    def make(rows: list[dict] | None = None, **sections: dict) -> RewardTrainingConfig:
        source = write(tmp_path / "ratings.jsonl", ratings(400) if rows is None else rows)
        tree: dict[str, dict] = {
            "run": {"output_dir": str(tmp_path / "out" / "reward")},
            "model": {"name_or_path": str(bert_folder)},
            "data": {"source": str(source), "max_tokens": 16},
            "optim": {"lr": 3e-3, "epochs": 5, "batch_size": 16},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        return parse(RewardTrainingConfig, tree)

    return make


@pytest.mark.parametrize("name", ["ratings.jsonl", "RATINGS.JSONL"])
def test_a_file_keeps_a_tenth_back_however_its_name_is_spelt(config, tmp_path, name):
    path = write(tmp_path / name, ratings(400))
    learned, held = reward_trainer._ratings(config(data={"source": str(path)}))
    assert len(learned) + len(held) == 400 and len(held) > 20
    assert not {text for text, _ in learned} & {text for text, _ in held}


def test_what_is_learned_from_is_not_what_is_reported_on(config):
    with pytest.raises(ConfigError, match=r"data\.eval_split=train is what training reads"):
        config(data={"eval_split": "train"})


def test_learns_which_words_are_liked_and_writes_what_reward_model_takes(config, tmp_path, capsys):
    metrics = train_reward(config())
    assert metrics["reward/pearson"] > 0.95
    assert metrics["reward/accuracy"] > 0.85  # a fifth of the rows is about 0 and has a random sign
    assert metrics["reward/pairwise_agreement"] > 0.97
    assert metrics["reward/mse"] < 0.5
    assert metrics["reward/train_rows"] + metrics["reward/eval_rows"] == 400
    assert 20 <= metrics["reward/eval_rows"] <= 60
    assert metrics["time/train"] > 0

    folder = tmp_path / "out" / "reward"
    assert json.loads((folder / "reward_metrics.json").read_text()) == metrics
    assert load(RewardTrainingConfig, folder / "reward_config.yaml") == config()
    assert "squared error" in (folder / "README.md").read_text()
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / "model.safetensors").values())
    assert list((tmp_path / "out").iterdir()) == [folder]  # no work folder is left
    assert "reward/accuracy" in capsys.readouterr().out

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "rating"}
    score = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    liked, hated = score(["a superb film", "a very awful film"], function_to_apply="none")
    assert liked["score"] > 1 > -1 > hated["score"]


def test_same_seed_same_model_and_another_seed_another(config, tmp_path):
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        output = tmp_path / name
        train_reward(config(ratings(80), run={"output_dir": str(output), "seed": seed}, optim={"epochs": 1}))
        return load_file(output / "model.safetensors")

    first, again, other = weights("a", 1), weights("b", 1), weights("c", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_report_comes_from_the_other_file_when_eval_split_names_one(config, tmp_path):
    other = write(tmp_path / "held.jsonl", ratings(30, seed=1))
    metrics = train_reward(config(ratings(80), data={"eval_split": str(other)}, optim={"epochs": 0.2}))
    assert metrics["reward/train_rows"] == 80
    assert metrics["reward/eval_rows"] == 30


def test_max_samples_cuts_the_rows(config):
    metrics = train_reward(config(data={"max_samples": 100}, optim={"epochs": 0.2}))
    assert metrics["reward/train_rows"] + metrics["reward/eval_rows"] == 100


def test_embedded_ratings_train_and_are_cited(config, tmp_path):
    metrics = train_reward(
        config(data={"source": "embedded:movie_reviews", "max_samples": 64}, optim={"epochs": 0.5, "batch_size": 32})
    )
    assert metrics["reward/train_rows"] == metrics["reward/eval_rows"] == 64
    assert "Hutto" in (tmp_path / "out" / "reward" / "README.md").read_text()


def test_agreement_by_hand():
    # Signs: right, wrong, left out (rated 0), wrong: 1 of 3. Pairs more than 0.5 apart, as (higher, lower):
    # (2, 0.3) (2, 0) (2, -1) (0.3, -1) (0, -1); 0.3 and 0 are too close. Predicted 1 > -1, 1 > 0.5, 1 = 1 (a tie counts
    # as wrong), -1 < 1, 0.5 < 1: 2 of 5.
    targets = np.array([2.0, 0.3, 0.0, -1.0])
    found = agreement(np.array([1.0, -1.0, 0.5, 1.0]), targets)
    assert found["reward/accuracy"] == pytest.approx(1 / 3)
    assert found["reward/pairwise_agreement"] == pytest.approx(2 / 5)
    assert found["reward/mse"] == pytest.approx((1 + 1.69 + 0.25 + 4) / 4)


def test_agreement_against_scipy():
    rng = np.random.default_rng(0)
    # Ratings at least 1 apart: then every pair counts, and the share of ordered pairs is (tau + 1) / 2.
    targets = rng.permutation(40).astype(float) - 20.5
    predictions = targets + rng.normal(0, 10, size=40)
    found = agreement(predictions, targets)
    assert found["reward/pairwise_agreement"] == pytest.approx((stats.kendalltau(predictions, targets)[0] + 1) / 2)
    assert found["reward/pearson"] == pytest.approx(stats.pearsonr(predictions, targets)[0])


def test_agreement_is_nan_where_nothing_can_tell(config, tmp_path):
    found = agreement(np.array([1.0, 1.0]), np.array([0.0, 0.0]))
    assert [name for name, value in found.items() if math.isnan(value)] == [
        "reward/accuracy",
        "reward/pairwise_agreement",
        "reward/pearson",
    ]
    held = write(tmp_path / "held.jsonl", [{"text": "a film", "rating": 0}])
    train_reward(config(ratings(40), data={"eval_split": str(held)}, optim={"epochs": 0.5}))
    text = (tmp_path / "out" / "reward" / "reward_metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["reward/accuracy"] is None


@pytest.mark.parametrize(
    ("rows", "sections", "words"),
    [
        ([], {}, ["data.source", "no rows"]),
        ([*ratings(5), {"text": " ", "rating": 1.0}], {}, ["row 6", "text"]),
        (ratings(5), {"data": {"text_field": "review"}}, ["data.text_field=review", "text, rating"]),
        (ratings(5), {"data": {"target_field": "stars"}}, ["data.target_field=stars", "text, rating"]),
        ([*ratings(2), {"text": "a film", "rating": None}], {}, ["data.target_field=rating", "row 3", "None"]),
        ([{"text": "a film", "rating": "four"}] * 30, {}, ["data.target_field=rating", "row 1", "'four'"]),
        ([{"text": "a film", "rating": True}] * 30, {}, ["data.target_field=rating", "row 1", "True"]),
        (ratings(1), {}, ["data.source", "too few", "data.eval_split"]),
        (None, {"data": {"source": "none.csv"}}, ["data.source=none.csv"]),
        (None, {"data": {"eval_split": "none.csv"}}, ["none.csv"]),
        (None, {"data": {"source": "embedded:plays"}}, ["data.source=embedded:plays", "movie_reviews"]),
        (None, {"data": {"source": "embedded:movie_reviews", "split": "tests"}}, ["data.split=tests", "heldout"]),
        (None, {"model": {"name_or_path": "none/such"}}, ["model.name_or_path=none/such"]),
        (None, {"model": {"name_or_path": "wheel:none"}}, ["model.name_or_path=wheel:none", "all-MiniLM-L6-v2"]),
    ],
)
def test_bad_input_ends_in_one_line_that_names_the_key(config, tmp_path, rows, sections, words, monkeypatch):
    monkeypatch.setattr(reward_trainer, "Trainer", None)  # nothing may train
    with pytest.raises(ConfigError) as error:
        train_reward(config(rows, **sections))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "reward").exists()


def test_a_row_number_counts_the_rows_of_the_file(config):
    """The fixed tenth is taken out after the check, so that the number is the line to look at."""
    rows = ratings(60)
    rows[41]["rating"] = float("nan")
    with pytest.raises(ConfigError, match="row 42 "):
        train_reward(config(rows))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: (path.mkdir(parents=True), (path / "config.json").write_text("{}")), "already holds a model"),
        (lambda path: (path.mkdir(parents=True), (path / "notes.txt").write_text("mine")), "is not empty"),
        (lambda path: (path.parent.mkdir(parents=True), path.write_text("mine")), "is a file"),
    ],
)
def test_output_folder_in_use_is_left_alone(config, tmp_path, make, words):
    output = tmp_path / "out" / "reward"
    make(output)
    before = {path: path.read_bytes() for path in tmp_path.glob("out/**/*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"run\.output_dir=.*{words}"):
        train_reward(config())
    assert before == {path: path.read_bytes() for path in tmp_path.glob("out/**/*") if path.is_file()}


def test_an_empty_output_folder_is_used(config, tmp_path):
    (tmp_path / "out" / "reward").mkdir(parents=True)
    train_reward(config(ratings(40), optim={"epochs": 0.5}))
    assert (tmp_path / "out" / "reward" / "config.json").is_file()


def test_a_run_that_fails_leaves_no_folder(config, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_trainer, "_describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_reward(config(ratings(40), optim={"epochs": 0.5}))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_classifier_with_other_labels_gets_a_new_head(config, classifier_folder, tmp_path):
    train_reward(config(ratings(40), model={"name_or_path": str(classifier_folder)}, optim={"epochs": 0.5}))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "reward")
    assert model.config.num_labels == 1


def test_a_decoder_without_pad_can_be_a_reward_model(config, gpt2_folder, tmp_path):
    train_reward(config(ratings(40), model={"name_or_path": str(gpt2_folder)}, optim={"epochs": 0.5}))
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "reward").pad_token_id is not None


def test_dropout_is_off_while_learning(config, classifier_folder):
    model, _ = reward_trainer._load(config(model={"name_or_path": str(classifier_folder)}))
    assert model.config.hidden_dropout_prob > 0
    assert all(layer.p == 0 for layer in model.modules() if isinstance(layer, torch.nn.Dropout))


def test_precision(config, monkeypatch, tmp_path):
    def bf16(precision: str, native: bool) -> bool:
        monkeypatch.setattr(reward_trainer, "computes_in_bf16", lambda device: native)
        return reward_trainer._arguments(config(run={"precision": precision}), str(tmp_path)).bf16

    assert [bf16("auto", True), bf16("auto", False), bf16("bf16", False), bf16("fp32", True)] == [
        True,
        False,
        True,
        False,
    ]


def test_main_reads_overrides_and_prints_the_config(capsys, tmp_path):
    with pytest.raises(SystemExit) as leave:
        reward_trainer.main(["--print_config", "--optim.epochs", "3"])
    assert leave.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load(RewardTrainingConfig, printed).optim.epochs == 3
    with pytest.raises(ConfigError, match=r"optim\.epoch; did you mean optim\.epochs"):
        reward_trainer.main(["--optim.epoch", "3"])
