"""Rebuild rlhf_accel/movie_reviews/movie_reviews.parquet: `python scripts/prepare_movie_reviews.py SOURCE_FOLDER`.

SOURCE_FOLDER holds movieReviewSnippets_GroundTruth.txt and movieReviewSnippets_anonDataRatings.txt, from
additional_resources/hutto_ICWSM_2014.tar.gz in the source distribution of vaderSentiment 3.3.2. Needs `ftfy`, which
the package itself does not.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = "movieReviewSnippets_GroundTruth.txt"
RATINGS = "movieReviewSnippets_anonDataRatings.txt"
OUTPUT = Path(__file__).parent.parent / "rlhf_accel" / "movie_reviews" / "movie_reviews.parquet"

SCHEMA = pa.schema(
    {
        "id": pa.int32(),
        "text": pa.string(),
        "rating": pa.float64(),
        "ratings": pa.list_(pa.int8()),
        "split": pa.string(),
    }
)


def repair(text: str) -> str:
    """The snippet as its author typed it, as far as that is certain.

    The source wrote every hyphen as a space. Runs of three and four spaces were dashes with spaces around them (` - `
    and ` -- `) and become a dash again; a single space may have been the hyphen of `co-writer`, or a space, and stays.

    >>> repair("art    when done right    can ''heal'' S&amp;M")
    'art – when done right – can "heal" S&M'
    """
    text = _ftfy().fix_text(text)
    text = text.replace("''", '"').replace("`", "'")
    text = re.sub(r" {3,4}", " – ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r" (?=,)|(?<=\() ", "", text)


def split_of(text: str) -> str:
    """90 % train, 5 % validation, 5 % heldout; texts that differ only in case or punctuation share a split.

    >>> split_of("...a pretentious mess...") == split_of("A pretentious mess")
    True
    """
    words = " ".join(re.findall(r"\w+", text.casefold()))
    bucket = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % 20
    return {0: "heldout", 1: "validation"}.get(bucket, "train")


def build(folder: Path) -> pa.Table:
    """The 10,605 snippets in the order of the source."""
    rows = []
    for (number, _, text), (same_number, _, _, ratings) in zip(
        _read(folder / TEXTS), _read(folder / RATINGS), strict=True
    ):
        if number != same_number:
            sys.exit(f"{RATINGS}: expected id {number}, found {same_number}; both files must list the same ids")
        raw = json.loads(ratings)
        clean = repair(text)
        rows.append(
            {"id": int(number), "text": clean, "rating": sum(raw) / len(raw), "ratings": raw, "split": split_of(clean)}
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _read(path: Path) -> list[list[str]]:
    # bytes and a split on line feeds: str.splitlines would also cut at characters inside a text.
    return [line.rstrip("\r").split("\t") for line in path.read_bytes().decode("utf-8").split("\n") if line.strip()]


def _ftfy():  # type: ignore[no-untyped-def]
    try:
        import ftfy
    except ModuleNotFoundError:
        sys.exit("this script needs ftfy, which repairs the texts: pip install ftfy")
    return ftfy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source_folder", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    for name in (TEXTS, RATINGS):
        if not (arguments.source_folder / name).is_file():
            sys.exit(f"{arguments.source_folder / name}: no such file; SOURCE_FOLDER must hold {TEXTS} and {RATINGS}")
    table = build(arguments.source_folder)
    pq.write_table(table, arguments.output, compression="zstd", compression_level=19)
    counts = {split: table["split"].to_pylist().count(split) for split in ("train", "validation", "heldout")}
    print(f"{arguments.output}: {len(table)} rows, {counts}, {arguments.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
