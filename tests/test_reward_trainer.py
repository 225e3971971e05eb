"""Reward-model training at toy size: a random BERT with a word tokenizer learns which words people like."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from rlhf_accel.algorithm import calibration
from rlhf_accel.commands import parsers
from rlhf_accel.config.loading import load, parse
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.schema import Config, RewardConfig
from rlhf_accel.data import feedback as preferences
from rlhf_accel.reward import Classifier
from rlhf_accel.runs import reward_card
from rlhf_accel.system import lock
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.training import feedback_trainer, reward_evaluation, reward_output, reward_trainer
from rlhf_accel.training.ppo_trainer import PPOTrainer
from rlhf_accel.training.reward_trainer import train_reward
from tests.test_lock import elsewhere

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
            "run": {"output_dir": str(tmp_path / "out" / "reward"), "precision": "fp32"},
            "model": {"name_or_path": str(bert_folder)},
            "data": {"source": str(source), "max_tokens": 16},
            "optim": {"lr": 3e-3, "epochs": 5, "batch_size": 16},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        return parse(RewardTrainingConfig, tree)

    return make


def test_what_is_learned_from_is_not_what_is_reported_on(config):
    with pytest.raises(ConfigError, match=r"data\.eval_split=train is the training data"):
        config(data={"eval_split": "train"})


def test_learns_which_words_are_liked_and_writes_what_reward_model_takes(config, tmp_path, capsys):
    # With rows of its own to tune by, all that is held out is reported on.
    told = config(data={"tuning_split": str(write(tmp_path / "tuning.jsonl", ratings(30, seed=2)))})
    metrics = train_reward(told)
    assert metrics["reward/pearson"] > 0.95
    assert metrics["reward/accuracy"] > 0.85  # a fifth of the rows is about 0 and has a random sign
    assert metrics["reward/pairwise_agreement"] > 0.97
    assert metrics["reward/mse"] < 0.5
    assert metrics["reward/train_rows"] + metrics["reward/eval_rows"] == 400
    assert metrics["reward/tuning_rows"] == 30 <= metrics["reward/eval_rows"] <= 60
    assert metrics["reward/pair_accuracy"] > 0.97
    assert metrics["time/train"] > 0

    folder = tmp_path / "out" / "reward"
    # No temperature is the likeliest where every pair is ordered right.
    told_metrics = {name: None if np.isnan(value) else value for name, value in metrics.items()}
    assert json.loads((folder / "reward_metrics.json").read_text()) == told_metrics
    assert load(RewardTrainingConfig, folder / "reward_config.yaml") == told
    card = (folder / "README.md").read_text()
    assert "squared error" in card and f"| figure on a tenth of `{told.data.source}`, kept back | value |" in card
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / "model.safetensors").values())
    assert list((tmp_path / "out").iterdir()) == [folder]  # no work folder is left
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "safetensors' own files are for nobody else"
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
    assert metrics["reward/tuning_rows"] == metrics["reward/eval_rows"] == 15


def test_a_tuning_split_leaves_all_held_out_rows_to_the_report(config, tmp_path):
    files = {
        f"{key}_split": str(write(tmp_path / f"{key}.jsonl", ratings(count, seed=count)))
        for key, count in (("eval", 30), ("tuning", 20))
    }
    metrics = train_reward(config(ratings(80), data=files, optim={"epochs": 0.2}))
    assert (metrics["reward/tuning_rows"], metrics["reward/eval_rows"]) == (20, 30)


def test_max_samples_cuts_the_rows(config):
    metrics = train_reward(config(data={"max_samples": 100}, optim={"epochs": 0.2}))
    assert metrics["reward/train_rows"] + metrics["reward/tuning_rows"] + metrics["reward/eval_rows"] == 100


def test_embedded_ratings_train_and_are_cited(config, tmp_path):
    metrics = train_reward(
        config(data={"source": "embedded:movie_reviews", "max_samples": 64}, optim={"epochs": 0.5, "batch_size": 32})
    )
    assert metrics["reward/train_rows"] == metrics["reward/tuning_rows"] + metrics["reward/eval_rows"] == 64
    assert "Hutto" in (tmp_path / "out" / "reward" / "README.md").read_text()


def test_a_figure_that_nothing_can_tell_is_null(config, tmp_path):
    held = write(tmp_path / "held.jsonl", [{"text": "a film", "rating": 0}])
    train_reward(config(ratings(40), data={"eval_split": str(held)}, optim={"epochs": 0.5}, run={"eval_every": 0}))
    text = (tmp_path / "out" / "reward" / "reward_metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["reward/accuracy"] is None
    assert json.loads(text)["reward/temperature"] is None


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
        (
            ratings(20),
            {},
            ["run.eval_every=0.25: one half of a tenth of", "no rows", "data.tuning_split", "run.eval_every=0"],
        ),
        (None, {"data": {"tuning_split": "none.csv"}}, ["data.tuning_split=none.csv"]),
        (None, {"lora": {"r": 4, "target_modules": "none"}}, ["lora.target_modules", "none"]),
        (None, {"data": {"source": "none.csv"}}, ["data.source=none.csv"]),
        (None, {"data": {"split": "test"}}, ["data.split=test: the file", "remove data.split"]),
        (None, {"data": {"eval_split": "none.csv"}}, ["none.csv"]),
        (None, {"data": {"source": "embedded:plays"}}, ["data.source=embedded:plays", "movie_reviews"]),
        (None, {"data": {"source": "embedded:movie_reviews", "split": "tests"}}, ["data.split=tests", "heldout"]),
        (None, {"model": {"name_or_path": "none/such"}}, ["model.name_or_path=none/such"]),
        (None, {"model": {"name_or_path": "wheel:none"}}, ["model.name_or_path=wheel:none", "all-MiniLM-L6-v2"]),
    ],
)
def test_bad_input_ends_in_one_line_that_names_the_key(config, tmp_path, rows, sections, words, monkeypatch):
    monkeypatch.setattr(reward_trainer, "FeedbackTrainer", None)  # nothing may train
    with pytest.raises(ConfigError) as error:
        train_reward(config(rows, **sections))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "reward").exists()


def torn(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:50])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: [path.unlink() for path in folder.glob("token*")], "no tokenizer could be loaded; save one"),
        (lambda folder: torn(folder, "tokenizer.json"), "no tokenizer could be loaded"),
        (lambda folder: torn(folder, "model.safetensors"), "neither a folder with a model"),
        (lambda folder: torn(folder, "config.json"), "neither a folder with a model"),
    ],
)
def test_a_model_with_a_missing_or_torn_file_is_named(config, bert_folder, tmp_path, spoil, words):
    """Without its tokenizer, transformers makes one up, to which all words are unknown."""
    folder = tmp_path / "spoilt"
    shutil.copytree(bert_folder, folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=rf"^model\.name_or_path={folder}: {words}"):
        train_reward(config(model={"name_or_path": str(folder)}))


def test_texts_are_cut_to_what_the_model_can_read(config):
    """The model has 32 positions."""
    rows = [{"text": "very " * 40 + row["text"], "rating": row["rating"]} for row in ratings(60)]
    train_reward(config(rows, data={"max_tokens": 100}, optim={"epochs": 0.5}, run={"eval_every": 0}))


def test_a_model_that_diverged_is_not_written(config, tmp_path):
    with pytest.raises(RunFailed, match=r"scores nan after training.*lower optim\.lr"):
        train_reward(config(ratings(60), optim={"lr": 1e30, "epochs": 1}, run={"eval_every": 0}))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_evaluation_that_never_comes_is_refused(config):
    """Sixteen rows a step: the training has four steps or fewer."""
    with pytest.raises(ConfigError, match=r"^run\.eval_every=5 is above the \d steps of this training"):
        train_reward(config(ratings(64), run={"eval_every": 5}, optim={"epochs": 1}))


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


def test_of_two_that_train_towards_one_folder_the_second_is_refused_before_a_model_loads(config, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "ELSEWHERE", 0.0)
    (tmp_path / "out").mkdir()
    elsewhere(tmp_path / "out" / ".reward.lock")
    monkeypatch.setattr(reward_trainer.classifiers, "load_tokenizer", None)
    with pytest.raises(ConfigError, match=r"^run\.output_dir=.*reward is in use by another run \(process \d+ on node7"):
        train_reward(config(ratings(40)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".reward.lock"]


def test_an_empty_output_folder_is_used(config, tmp_path):
    (tmp_path / "out" / "reward").mkdir(parents=True)
    train_reward(config(ratings(40), optim={"epochs": 0.5}))
    assert (tmp_path / "out" / "reward" / "config.json").is_file()


def test_a_run_that_fails_leaves_no_folder(config, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_trainer.reward_card, "describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_reward(config(ratings(40), optim={"epochs": 0.5}))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_scores_otherwise_than_the_model_in_memory_is_not_written(config, tmp_path, monkeypatch):
    """Here the merged adapters are not those that were trained."""
    merged = reward_trainer.classifiers.adapted

    def with_others(model, folder):
        adapted = merged(model, folder)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(1.0)
        return adapted

    monkeypatch.setattr(reward_trainer.classifiers, "adapted", with_others)
    lora = {"r": 2, "target_modules": "all-linear"}
    with pytest.raises(
        RunFailed, match=r"^the written model is not the trained one: .* training left .*kept in .*reward\.refused$"
    ):
        train_reward(config(ratings(40), optim={"epochs": 1}, lora=lora))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["reward.refused"]
    assert (tmp_path / "out" / "reward.refused" / "adapter_model.safetensors").is_file(), "as trained, not merged"


def test_rounding_far_from_zero_discards_no_model(config, tmp_path, monkeypatch):
    """Scores of bf16 about 20, of which the normalisation leaves small differences that are mostly rounding."""
    load = reward_trainer.classifiers.load

    def far(*given):
        model = load(*given)
        torch.nn.init.constant_(reward_trainer.classifiers.output_layer(model).bias, 20.0)
        return model

    monkeypatch.setattr(reward_trainer.classifiers, "load", far)
    train_reward(
        config(
            pairs(40),
            run={"precision": "bf16", "eval_every": 0},
            data={"objective": "pairs"},
            optim={"lr": 1e-6, "epochs": 0.5},
        )
    )
    assert (tmp_path / "out" / "reward" / "config.json").exists()


def test_what_fails_in_the_main_process_ends_the_others(monkeypatch):
    told = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda given: told.append(given[0]))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ZeroDivisionError):
        reward_output.on_main(lambda: 1 / 0)
    assert told == ["division by zero"]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda given: given.__setitem__(0, "division by zero")
    )
    with pytest.raises(RunFailed, match="could not write the model: division by zero"):
        reward_output.on_main(lambda: None)


def test_a_disk_that_is_full_is_said_in_a_line(config, tmp_path):
    """Here files may not grow beyond 20,000 bytes, which the weights do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunFailed, match=r"reward could not be written .*make room"):
            train_reward(config(ratings(40), optim={"epochs": 0.5}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_classifier_with_other_labels_gets_a_new_head(config, classifier_folder, tmp_path):
    train_reward(config(ratings(40), model={"name_or_path": str(classifier_folder)}, optim={"epochs": 0.5}))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "reward")
    assert model.config.num_labels == 1


def test_a_decoder_without_pad_can_be_a_reward_model(config, gpt2_folder, tmp_path):
    train_reward(config(ratings(40), model={"name_or_path": str(gpt2_folder)}, optim={"epochs": 0.5}))
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "reward").pad_token_id is not None


def test_precision(config, monkeypatch, tmp_path):
    def bf16(precision: str, native: bool) -> bool:
        monkeypatch.setattr(feedback_trainer, "computes_in_bf16", lambda device: native)
        return feedback_trainer.training_arguments(config(run={"precision": precision}), str(tmp_path)).bf16

    assert [bf16("auto", True), bf16("auto", False), bf16("bf16", False), bf16("fp32", True)] == [
        True,
        False,
        True,
        False,
    ]


def test_the_command_reads_overrides_and_prints_the_config(capsys, tmp_path):
    with pytest.raises(SystemExit) as leave:
        parsers.train_reward(["--print_config", "--optim.epochs", "3"])
    assert leave.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load(RewardTrainingConfig, printed).optim.epochs == 3
    with pytest.raises(ConfigError, match=r"optim\.epoch; did you mean optim\.epochs"):
        parsers.train_reward(["--optim.epoch", "3"])


def scorer(folder: Path):
    """Scores of texts as `reward.model` reads them from this folder."""
    classifier = Classifier(RewardConfig(model=str(folder), dtype="fp32"), str(folder), torch.device("cpu"))
    return lambda texts: np.array(classifier([""] * len(texts), texts))


def pairs(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        worse, better = sorted(rng.choice(list(WORDS), size=2, replace=False).tolist(), key=WORDS.__getitem__)
        rows.append({"chosen": f"a {better} film {2 * i}", "rejected": f"a {worse} film {2 * i + 1}"})
    return rows


@pytest.mark.parametrize("r", [0, 4])
def test_pairs_teach_which_words_are_liked_and_scores_are_normalised(config, tmp_path, r):
    rows = pairs(300)
    lora = {"r": r, "target_modules": "all-linear"}
    metrics = train_reward(config(rows, data={"objective": "pairs"}, lora=lora, optim={"lr": 3e-3 if r == 0 else 1e-2}))
    assert metrics["reward/pair_accuracy"] > 0.95
    folder = tmp_path / "out" / "reward"
    assert not (folder / "adapter_config.json").exists()
    score = scorer(folder)
    awful, dull, good, superb = score([f"a {word} film" for word in ("awful", "dull", "good", "superb")])
    assert awful < dull < good < superb
    # Over all that was learned from; those scores are of this folder too, for the held-out tenth is like the rest.
    scores = score([row[key] for row in rows for key in row])
    assert abs(scores.mean()) < 0.1 and abs(scores.std() - 1) < 0.1
    assert "likelihood of the preferences" in (folder / "README.md").read_text()
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_normalisation_none_and_mean_differ_by_a_shift_only(config, tmp_path):
    scores = {}
    for how in ("none", "mean", "standard"):
        output = tmp_path / how
        settings = {"run": {"output_dir": str(output)}, "model": {"normalize": how}, "optim": {"epochs": 2}}
        base = config(pairs(80), data={"objective": "pairs"})
        train_reward(
            replace(
                base,
                run=replace(base.run, **settings["run"]),
                model=replace(base.model, **settings["model"]),
                optim=replace(base.optim, **settings["optim"]),
            )
        )
        scores[how] = scorer(output)([row[key] for row in pairs(80) for key in row])
    difference = scores["none"] - scores["mean"]
    assert np.ptp(difference) < 1e-5 < abs(difference.mean())
    assert np.corrcoef(scores["mean"], scores["standard"])[0, 1] > 1 - 1e-9
    assert scores["mean"].std() != pytest.approx(scores["standard"].std(), rel=0.05)


def test_a_head_without_a_bias_is_scaled_only(config, gpt2_folder, tmp_path):
    """GPT-2's: the figures are those of the scores as written, and so is what PPO sees."""
    train_reward(
        config(
            pairs(80),
            model={"name_or_path": str(gpt2_folder)},
            data={"objective": "pairs"},
            optim={"epochs": 1},
            lora={"r": 4},
        )
    )
    scores = scorer(tmp_path / "out" / "reward")([row[key] for row in pairs(80) for key in row])
    assert scores.std() == pytest.approx(1, abs=0.15)


def test_labels_teach_classes_and_names(config, tmp_path):
    rows = [{"text": row["text"], "label": "liked" if row["rating"] > 0.5 else "not"} for row in ratings(400)]
    metrics = train_reward(config(rows, data={"objective": "labels", "target_field": "label"}))
    assert metrics["reward/accuracy"] > 0.95
    folder = tmp_path / "out" / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "liked", 1: "not"}
    liked = Classifier(
        RewardConfig(model=str(folder), label="liked", output="probability", dtype="fp32"),
        str(folder),
        torch.device("cpu"),
    )
    superb, awful = liked(["", ""], ["a superb film", "an awful film"])
    assert superb > 0.8 and awful < 0.2
    assert "`liked` or `not`" in (folder / "README.md").read_text()


def test_three_classes(config):
    def label(row: dict) -> int:
        return 2 if row["rating"] > 1 else 0 if row["rating"] < -1 else 1

    rows = [{"text": row["text"], "stars": label(row)} for row in ratings(400)]
    metrics = train_reward(config(rows, data={"objective": "labels", "target_field": "stars"}))
    assert metrics["reward/accuracy"] > 0.9


def test_a_classifier_for_these_labels_keeps_its_head_and_their_order(config, classifier_folder, tmp_path):
    """Its labels are NEGATIVE, POSITIVE; the rows' first label is the other, and nothing is learned to speak of."""
    rows = [{"text": f"film {i}", "label": ["POSITIVE", "NEGATIVE"][i % 2]} for i in range(60)]
    train_reward(
        config(
            rows,
            model={"name_or_path": str(classifier_folder)},
            data={"objective": "labels", "target_field": "label"},
            optim={"lr": 1e-12, "epochs": 0.1},
        )
    )
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder)
        for folder in (classifier_folder, tmp_path / "out" / "reward")
    )
    assert after.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    torch.testing.assert_close(after.classifier.out_proj.weight, before.classifier.out_proj.weight)


@pytest.mark.parametrize("r", [0, 4])
def test_the_best_checkpoint_is_written(config, monkeypatch, tmp_path, r):
    """The losses on the tuning rows are made up: the second evaluation of four is the best one."""
    losses = iter([3.0, 1.0, 2.0, 4.0])
    seen: list[dict[str, torch.Tensor]] = []

    def loss(*_: object) -> float:
        seen.append({name: weight.clone() for name, weight in trainers[0].model.named_parameters()})
        return next(losses)

    class Noted(feedback_trainer.FeedbackTrainer):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            trainers.append(self)

    trainers: list[feedback_trainer.FeedbackTrainer] = []
    monkeypatch.setattr(reward_trainer, "FeedbackTrainer", Noted)
    monkeypatch.setattr(feedback_trainer, "tuning_loss", loss)
    lora = {"r": r, "target_modules": "all-linear"}
    metrics = train_reward(config(ratings(200), run={"eval_every": 3}, optim={"epochs": 1}, lora=lora))
    assert metrics["reward/best_step"] == 6
    now = dict(trainers[0].model.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in seen[1].items())
    assert not all(torch.equal(now[name], weight) for name, weight in seen[3].items())
    assert len(seen) == 4


def test_without_evaluation_the_last_weights_are_written(config, monkeypatch):
    monkeypatch.setattr(feedback_trainer, "tuning_loss", lambda *_: 1 / 0)
    metrics = train_reward(config(ratings(100), run={"eval_every": 0}, optim={"epochs": 0.5}))
    assert "reward/best_step" not in metrics


def test_the_folder_is_a_reward_and_a_critics_start(config, gpt2_folder, tmp_path):
    folder = tmp_path / "out" / "reward"
    train_reward(
        config(pairs(60), model={"name_or_path": str(gpt2_folder)}, data={"objective": "pairs"}, optim={"epochs": 0.5})
    )
    run = parse(
        Config,
        {
            "run": {
                **{"output_dir": str(tmp_path / "run"), "total_steps": 1, "eval_samples": 0, "trackers": []},
                "precision": "fp32",
            },
            "model": {
                **{"name_or_path": str(gpt2_folder), "critic": "separate", "critic_init": "reward"},
                "dtype": "fp32",
            },
            "data": {"source": str(write(tmp_path / "prompts.jsonl", ratings(40))), "prompt_tokens": [2, 4]},
            "rollout": {"batch_size": 4, "max_prompt_tokens": 4, "max_new_tokens": 4},
            "reward": {"model": str(folder), "dtype": "fp32"},
        },
    )
    trainer = PPOTrainer(run)
    theirs = load_file(folder / "model.safetensors")
    ours = {f"transformer.{name}": p for name, p in trainer.runtime.plain_module.critic.named_parameters()}
    assert all(torch.equal(theirs[name], parameter) for name, parameter in ours.items())
    trainer.fit()


def test_pairs_that_are_the_same_once_cut_are_left_out(config, capsys):
    rows = pairs(60)
    rows[0] = {"chosen": "a film " * 10 + "good", "rejected": "a film " * 10 + "dull"}
    data = {"objective": "pairs", "max_tokens": 8}
    train_reward(config(rows, data=data, optim={"epochs": 0.2}))
    said = capsys.readouterr().out
    assert "1 of" in said and "data.max_tokens=8" in said
    same = [{"chosen": f"a film film good {i}", "rejected": f"a film film dull {i}"} for i in range(30)]
    with pytest.raises(ConfigError, match=r"data\.max_tokens=4: the two texts of every pair"):
        train_reward(config(same, data={"objective": "pairs", "max_tokens": 4}, run={"output_dir": "unused"}))


def test_without_matplotlib_a_line_says_that_the_plot_is_left_out(config, monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    monkeypatch.setattr(reward_trainer, "unused_device", lambda: "an idle device")
    train_reward(config(ratings(100), optim={"epochs": 0.5}))
    said = capsys.readouterr().out
    assert "no reliability.png: it needs matplotlib, pip install 'rlhf_accel[report]'" in said
    assert said.count("warning: an idle device") == 1
    folder = tmp_path / "out" / "reward"
    assert not (folder / "reliability.png").exists()
    assert "reliability.png" not in (folder / "README.md").read_text()


def test_tuning_loss_and_figures_by_hand():
    # Ratings: ((2 - 1)^2 + (0 - 0)^2) / 2.
    rated = preferences.of_targets(["a", "b"], np.array([1.0, 0.0]))
    scores = np.array([[2.0], [0.0]])
    assert reward_evaluation.tuning_loss("ratings", rated, scores) == pytest.approx(0.5)
    # Pairs: the scores differ by log 3, so the preferred text wins with probability 3/4.
    pair = replace(rated, targets=None, pairs=np.array([[0, 1]]), margins=np.zeros(1))
    apart = np.array([[np.log(3)], [0.0]])
    assert reward_evaluation.tuning_loss("pairs", pair, apart) == pytest.approx(-np.log(0.75))
    found, _ = reward_evaluation.figures("pairs", pair, apart, pair, apart)
    assert found["reward/pair_accuracy"] == 1
    assert found["reward/ece"] == pytest.approx(0.25)
    assert np.isnan(found["reward/temperature"]) and np.isnan(found["reward/ece_calibrated"])
    # Labels: class probabilities 3/4 (right) and 1/2 + 1/2 (a tie is wrong).
    labelled = preferences.of_targets(["a", "b"], np.array([0, 0]))
    logits = np.array([[np.log(3), 0.0], [0.0, 0.0]])
    found, _ = reward_evaluation.figures("labels", labelled, logits, labelled, logits)
    assert found["reward/accuracy"] == 0.5
    assert found["reward/nll"] == pytest.approx(-(np.log(0.75) + np.log(0.5)) / 2)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"objective": "labels"}, "model": {"normalize": "mean"}}, ["model.normalize=mean", "labels"]),
        ({"model": {"normalize": "standard"}}, ["model.normalize=standard", "ratings"]),
        ({"data": {"choice_field": "choice"}}, ["data.choice_field", "data.objective=pairs"]),
        ({"data": {"margin_field": "margin"}}, ["data.margin_field", "data.objective=pairs"]),
        (
            {"data": {"source": "embedded:movie_reviews", "objective": "pairs", "margin_field": "margin"}},
            ["data.margin_field", "embedded:movie_reviews"],
        ),
        ({"data": {"objective": "pairs", "pair_fields": ["a", "a"]}}, ["data.pair_fields=['a', 'a']", "two"]),
        ({"data": {"tuning_split": "heldout"}}, ["data.tuning_split=heldout", "evaluation data"]),
        ({"run": {"eval_every": 2.5}}, ["run.eval_every=2.5", "whole"]),
        ({"data": {"objective": "stars"}}, ["data.objective='stars'", "'pairs'"]),
    ],
)
def test_contradictions_name_their_keys(config, sections, words):
    with pytest.raises(ConfigError) as error:
        config(**sections)
    assert all(word in str(error.value) for word in words), str(error.value)


# Beside other runs in one process


def test_a_process_trains_a_reward_and_then_two_policies(config, tiny, gpt2_folder, tmp_path):
    """Each in a precision of its own: Accelerate keeps the first one for the whole process."""
    folder = tmp_path / "out" / "reward"
    brief = {"model": {"name_or_path": str(gpt2_folder)}, "data": {"objective": "pairs"}, "optim": {"epochs": 0.2}}
    train_reward(config(pairs(60), run={"precision": "bf16"}, **brief))
    run = {"total_steps": 1, "eval_samples": 0}
    reward = {"model": str(folder), "function": []}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        place = str(tmp_path / precision)
        trainer = PPOTrainer(tiny(run={**run, "precision": precision, "output_dir": place}, reward=reward))
        with trainer.runtime.autocast():
            assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype == dtype
        before = trainer.runtime.plain_module.value_head.weight.clone()
        trainer.fit()
        assert not torch.equal(before, trainer.runtime.plain_module.value_head.weight)
    train_reward(config(pairs(60), run={"output_dir": str(tmp_path / "again"), "precision": "bf16"}, **brief))


@pytest.mark.parametrize("temperature", [1.5, np.nan])
def test_a_temperature_of_nan_comes_with_its_reason(config, tmp_path, temperature):
    figures = {"reward/temperature": temperature, "reward/ece_calibrated": temperature}
    none = calibration.reliability(np.zeros((0, 2)), np.zeros(0, dtype=int))
    notes = reward_card.describe(tmp_path, config(ratings(10)), (), ("a", "b", "c"), figures, {"before": none})
    assert [note.partition(":")[0] for note in notes] == (
        ["reward/temperature and reward/ece_calibrated are nan"] if np.isnan(temperature) else []
    )
