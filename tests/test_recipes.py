"""The recipes as shipped, with tiny models under the real names in an offline hub cache."""

import json
import sys
from pathlib import Path

import pytest

from rlhf_accel.config.loading import load
from rlhf_accel.config.recipes import RECIPES, recipe_names
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.schema import Config
from tests import forks
from tests.conftest import TEXTS
from tests.distributed.launch import environment
from tests.hub_cache import make_hub_cache_dataset, put_model

REPOSITORY = Path(__file__).parent.parent


def test_every_recipe_is_a_config():
    names = recipe_names()
    assert {"movie_reviews", "imdb_sentiment", "imdb_sentiment_lora"} <= set(names)
    assert len(names) == len(list(RECIPES.glob("*")))
    for name in names:
        load(RewardTrainingConfig if name.endswith("_reward") else Config, name)


def test_no_recipe_has_scores_that_values_cannot_reach():
    """A classifier's logits may lie anywhere, so they are calibrated."""
    for name in recipe_names():
        if not name.endswith("_reward"):
            config = load(Config, name)
            assert config.reward.calibrate or config.reward.output == "probability", name


def test_the_settings_of_the_reference_job():
    config = load(Config, "imdb_sentiment")
    assert config.model.name_or_path == "lvwerra/gpt2-imdb"
    assert config.reward.model == "siebert/sentiment-roberta-large-english"
    assert config.data.source == "stanfordnlp/imdb"
    assert config.data.prompt_tokens == (2, 8)
    assert config.rollout.batch_size == 256
    assert config.lora.r == 0
    lora = load(Config, "imdb_sentiment_lora")
    assert lora.lora.r > 0
    assert (lora.data, lora.rollout, lora.reward) == (config.data, config.rollout, config.reward)


@pytest.fixture(scope="module")
def hub(gpt2_folder, classifier_folder):
    """The models and the data set of the reference job in the cache of forks."""
    cache = forks.hub_cache()
    put_model(cache, "lvwerra/gpt2-imdb", gpt2_folder)
    put_model(cache, "siebert/sentiment-roberta-large-english", classifier_folder)
    rows = [{"text": f"{text} <br />{text}", "label": i % 2} for i, text in enumerate(TEXTS * 20)]
    make_hub_cache_dataset(cache, "stanfordnlp/imdb", {"train": rows, "test": rows[:40]})


JOBS = ("imdb_sentiment", "imdb_sentiment_lora")
TRAIN = "import sys; from rlhf_accel.__main__ import main; [main(words.split()) for words in sys.argv[1:]]"


@pytest.fixture(scope="module")
def reference_jobs(hub, tmp_path_factory):
    """The folder that holds a run of one step of each of the JOBS."""
    folder = tmp_path_factory.mktemp("jobs")
    commands = [f"train --config {name} --run.total_steps 1 --run.output_dir {folder / name}" for name in JOBS]
    done = forks.run([sys.executable, "-c", TRAIN, *commands], cwd=folder, env=environment())
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("recipe", JOBS)
def test_the_reference_job_runs(recipe, reference_jobs):
    run = reference_jobs / recipe
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["episodes"] for row in rows] == [256]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["policy/first_ratio_error"] < 1e-4
    assert rows[0]["objective/score_std"] > 0
    assert "eval/score" in rows[0]
    weights = "adapter_model.safetensors" if recipe.endswith("_lora") else "model.safetensors"
    assert (run / "final" / weights).is_file()
    assert (run / "final" / "value_head.safetensors").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["base"]["kl"] == pytest.approx(0, abs=1e-5)
    assert summary["samples"]
