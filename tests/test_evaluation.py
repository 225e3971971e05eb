"""What an evaluation says: each figure against numbers worked out by hand, and what depends on them in a run."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from rlhf_accel.algorithm.batches import Rollout, Sequences
from rlhf_accel.config.loading import parse
from rlhf_accel.config.rules import changed_keys
from rlhf_accel.config.schema import Config, RewardConfig
from rlhf_accel.reward import Reward, RewardError, functions, load_golds
from rlhf_accel.runs import checkpoint
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training import evaluation
from rlhf_accel.training.evaluation import measure
from rlhf_accel.training.ppo_trainer import PPOTrainer

pytestmark = pytest.mark.usefixtures("exact_fp32")

RANK = {"run": {"total_steps": 2, "eval_every": 1, "sample_every": 0}, "optim": {"lr": 0.02}}


def make(
    scores: list[float],
    responses: list[list[int]],
    *,
    logprob: float = -1.0,
    ref_logprob: float = -1.0,
    finished: list[bool] | None = None,
) -> Rollout:
    """A rollout with these responses (no token is 0), all tokens of which are as likely."""
    count, width = len(scores), max(map(len, responses))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in responses])
    mask = ids != 0
    zeros = torch.zeros(count, width)
    return Rollout(
        sequences=Sequences(
            queries=torch.ones(count, 1, dtype=torch.int64),
            query_mask=torch.ones(count, 1, dtype=torch.bool),
            responses=ids,
            response_mask=mask,
        ),
        groups=torch.arange(count),
        finished=torch.tensor(finished or [False] * count),
        scores=torch.tensor(scores),
        partial_scores=zeros,
        logprobs=zeros + logprob,  # also where nothing counts, which no figure may read
        ref_logprobs=zeros + ref_logprob,
        values=zeros,
        entropy=zeros,
        prompts=("p",) * count,
        texts=("t",) * count,
    )


def test_every_figure_by_hand() -> None:
    rollout = make(
        [1.0, 2.0, 3.0, 6.0],
        [[5, 6, 5, 6, 5, 6], [7], [5, 8], [5, 6, 7]],
        logprob=-1.0,
        ref_logprob=-3.0,
        finished=[False, True, True, True],
    )
    base = torch.tensor([[2.0], [2.0], [0.0], [5.0]])
    figures = measure([rollout], {"lexicon": torch.tensor([[0.0], [1.0], [0.0], [1.0]])}, base).figures
    assert figures.pop("score") == 3.0
    # Deviations -2 -1 0 3: the sum of squares is 14, over 3 and over 4.
    assert figures.pop("score_ci") == pytest.approx(1.96 * math.sqrt(14 / 3) / 2)
    assert figures.pop("score_std") == pytest.approx(math.sqrt(14 / 4))
    # 2 nats a token, for 6, 1, 2 and 3 tokens: 12, 2, 4, 6; deviations 6 -4 -2 0, squares 56.
    assert figures.pop("kl") == 6.0
    assert figures.pop("kl_ci") == pytest.approx(1.96 * math.sqrt(56 / 3) / 2)
    assert figures.pop("length") == 3.0
    assert figures.pop("eos_fraction") == 0.75
    assert figures.pop("distinct_1") == pytest.approx(4 / 12)
    # Pairs: 56 65 56 65 56, none, 58, 56 67; distinct are 56 65 58 67.
    assert figures.pop("distinct_2") == pytest.approx(4 / 8)
    # The first has the 4-grams 5656 6565 5656, of which a third repeats; the others have none.
    assert figures.pop("self_repetition") == pytest.approx((1 / 3) / 4)
    assert figures.pop("reference_perplexity") == pytest.approx(math.exp(3))
    # Lost, alike, won, won; deviations -0.625 -0.125 0.375 0.375.
    assert figures.pop("win_rate") == 0.625
    squares = 0.625**2 + 0.125**2 + 2 * 0.375**2
    assert figures.pop("win_rate_ci") == pytest.approx(1.96 * math.sqrt(squares / 3) / 2)
    assert figures.pop("gold/lexicon") == 0.5
    assert figures.pop("gold_ci/lexicon") == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    assert not figures


def test_of_several_responses_the_interval_is_that_of_prompts() -> None:
    """Two responses to a prompt are not two prompts: the interval comes from the means 1 and 4."""
    rollouts = [make([0.0, 3.0], [[5], [6]]), make([2.0, 5.0], [[7], [5]])]
    figures = measure(rollouts, {}, torch.zeros(2, 2)).figures
    assert figures["score"] == 2.5
    assert figures["score_ci"] == pytest.approx(1.96 * math.sqrt(4.5) / math.sqrt(2))
    assert figures["score_std"] == pytest.approx(math.sqrt((2.5**2 + 0.5**2 + 0.5**2 + 2.5**2) / 4))
    assert figures["distinct_1"] == 0.75
    # Alike and won: 0.75 for the first prompt, 1 for the second.
    assert figures["win_rate"] == 0.875


def test_where_there_is_nothing_to_measure_it_says_so() -> None:
    """One prompt, one token: no interval and no pair of tokens. No token at all: no perplexity either."""
    one = measure([make([2.0], [[5]])], {}, None).figures
    assert one["score"] == 2.0
    assert (one["distinct_1"], one["self_repetition"], one["length"]) == (1.0, 0.0, 1.0)
    assert one["reference_perplexity"] == pytest.approx(math.e)
    assert "win_rate" not in one
    assert {name for name, value in one.items() if math.isnan(value)} == {"score_ci", "kl_ci", "distinct_2"}
    empty = measure([make([2.0, 2.0], [[0], [0]])], {}, torch.full((2, 1), 2.0)).figures
    assert (empty["length"], empty["kl"], empty["win_rate"]) == (0.0, 0.0, 0.5)
    nothing = {"distinct_1", "distinct_2", "reference_perplexity"}
    assert {name for name, value in empty.items() if math.isnan(value)} == nothing


def test_figures_of_what_is_not_finite_are_not_finite() -> None:
    figures = measure([make([math.nan, 1.0], [[5], [6]])], {}, torch.zeros(2, 1)).figures
    assert math.isnan(figures["score"]) and math.isnan(figures["win_rate"])
    assert figures["length"] == 1.0


# In a run


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def learnt(rows: list[dict]) -> list[dict]:
    """Rows without what clocks and gold rewards say."""
    return [{key: v for key, v in row.items() if not key.startswith(("time/", "perf/", "eval/gold"))} for row in rows]


CALLS: list[int] = []


def row_by_length(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """A gold reward that reads the response and a column of the data, which has to be that of its own row."""
    return [100.0 + number * len(text) for number, text in zip(columns["number"], responses, strict=True)]


def fails_later(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    CALLS.append(len(prompts))
    if len(prompts) > 2:
        raise RuntimeError("gone")
    return [0.0] * len(prompts)


def nan_later(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    return [math.nan if len(prompts) > 2 else 0.0] * len(prompts)


def one_short(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    return [0.0] * (len(prompts) - 1)


def test_a_gold_reward_is_measured_and_never_learnt_from(tiny, tmp_path) -> None:
    plain = {**RANK["run"], "output_dir": str(tmp_path / "plain")}
    PPOTrainer(tiny(**{**RANK, "run": plain})).fit()
    gold = {"gold": "tests.test_evaluation:row_by_length", "calibrate": False, "clip": 50.0}
    trainer = PPOTrainer(tiny(**RANK, reward=gold))
    summary = trainer.fit()
    rows = read(trainer.folder)
    assert learnt(rows) == learnt(read(tmp_path / "plain"))
    texts, prompts = trainer.run.evaluation.rollout.texts, trainer.setup.held_out.fixed(4)
    # Neither clipped nor shifted.
    expected = row_by_length(prompts.texts, texts, number=prompts.columns["number"])
    assert rows[-1]["eval/gold/row_by_length"] == pytest.approx(sum(expected) / len(expected))
    assert rows[-1]["eval/gold_ci/row_by_length"] >= 0
    assert summary["base"]["gold/row_by_length"] >= 100
    assert summary["trained"]["gold/row_by_length"] == rows[-1]["eval/gold/row_by_length"]


@pytest.mark.parametrize(
    ("function", "said"),
    [("fails_later", "raised RuntimeError: gone"), ("nan_later", "returned nan for the response")],
)
def test_a_gold_reward_that_fails_leaves_its_figures_empty_and_the_run_alone(
    tiny, tmp_path, capsys, function, said
) -> None:
    plain = {**RANK["run"], "output_dir": str(tmp_path / "plain")}
    PPOTrainer(tiny(**{**RANK, "run": plain})).fit()
    CALLS.clear()
    golds = [f"tests.test_evaluation:{function}", "tests.test_evaluation:row_by_length"]
    trainer = PPOTrainer(tiny(**RANK, reward={"gold": golds, "retries": 1, "retry_wait": 0.001}))
    trainer.fit()
    rows = read(trainer.folder)
    assert learnt(rows) == learnt(read(tmp_path / "plain"))
    assert [row[f"eval/gold/{function}"] for row in rows] == [None, None]
    assert all(row["eval/gold/row_by_length"] >= 100 for row in rows)
    output = capsys.readouterr().out
    assert f"warning: reward.gold=tests.test_evaluation:{function} {said}" in output
    assert f"gold/{function} is left empty here" in output
    if function == "fails_later":
        held_out = len(trainer.setup.held_out.fixed(4))
        assert [2, *[held_out] * 6] == CALLS, "tried out on two, then twice in each of three evaluations"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tests.test_evaluation:one_short", "returned 1 scores for 2 responses"),
        ("tests.test_evaluation:missing", "has no missing"),
        ("no_such_module:f", "no_such_module cannot be imported"),
        ("no_colon", "expected package.module:callable"),
    ],
)
def test_a_gold_reward_that_cannot_work_is_refused_before_training(tiny, target, words) -> None:
    with pytest.raises(ConfigError, match=rf"^reward\.gold={target}.*{words}"):
        PPOTrainer(tiny(reward={"gold": target}))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"gold": ["a:f", "b:f"]}, "reward.gold names f twice"),
        ({"gold": ["a:f"], "function": ["a:f"]}, "reward.gold=a:f is also in reward.function"),
    ],
)
def test_gold_rewards_that_could_not_be_told_apart_are_refused(tree, words) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(Config, {"reward": tree})


def test_a_run_that_goes_on_may_change_what_only_evaluations_read() -> None:
    now = parse(Config, {"reward": {"gold": "a:f"}, "run": {"best_kl_budget": 3.0}})
    assert not changed_keys(Config(), now)
    assert changed_keys(Config(), parse(Config, {"reward": {"function": "a:f"}})) != []


def test_the_lexicon_reads_prompt_and_response() -> None:
    """Its own example: "VADER is smart, handsome, and funny." has the compound 0.8316 in its documentation."""
    config = RewardConfig(gold=("rlhf_accel.reward:vader",), clip=0.1)
    scores = load_golds(config)["vader"].finite(["VADER is smart,", ""], [" handsome, and funny.", ""], {})
    assert scores.tolist() == pytest.approx([0.8316, 0.0])


def test_without_its_package_the_lexicon_says_what_to_install(tiny, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    functions._vader_analyzer.cache_clear()
    with pytest.raises(ConfigError, match=r"^reward\.gold=rlhf_accel\.reward:vader .*pip install vaderSentiment, or"):
        PPOTrainer(tiny(reward={"gold": "rlhf_accel.reward:vader"}))


def test_finite_is_a_call_that_minds_what_is_not_finite() -> None:
    def bad(prompts: list[str], responses: list[str]) -> list[float]:
        return [1.0, math.inf]

    term = Reward(terms=(("mine", 1.0, bad),))
    assert term(["a", "b"], ["c", "d"], {}).tolist() == [1.0, math.inf]
    with pytest.raises(RewardError, match="mine returned inf for the response 'd'"):
        term.finite(["a", "b"], ["c", "d"], {})


# Wins over the base, and the best within a budget


def test_the_win_rate_outlives_a_resume(tiny, tmp_path, capsys) -> None:
    run = {**RANK["run"], "total_steps": 3, "save_every": 1, "keep_checkpoints": 0, "eval_samples": 4}
    trainer = PPOTrainer(tiny(run=run, optim={"lr": 0.05}))
    summary = trainer.fit()
    rows = read(trainer.folder)
    place = trainer.folder / "checkpoints" / "step-000002"
    base, last = torch.tensor(trainer.progress.base_scores), trainer.run.evaluation.rollout.scores
    assert rows[-1]["eval/win_rate"] == float(evaluation.wins(last, base).mean())
    assert rows[-1]["eval/win_rate"] != 0.5, "else a base that was evaluated anew would not be noticed"
    assert summary["trained"]["win_rate"] == rows[-1]["eval/win_rate"]

    go_on = {**run, "output_dir": str(tmp_path / "b"), "resume": str(place)}
    resumed = PPOTrainer(tiny(run=go_on, optim={"lr": 0.05}))
    resumed.fit()
    assert learnt(read(tmp_path / "b")) == learnt(rows[2:])

    # A checkpoint of a version that kept no scores of the base.
    told = json.loads((place / "progress.json").read_text())
    assert told.pop("base_scores") and told.pop("best_kl") and told.pop("best_step")
    old = tmp_path / "old"
    shutil.copytree(place, old)
    (old / "progress.json").write_text(json.dumps(told))
    (old / "manifest.json").unlink()
    checkpoint._write_manifest(old, resumed.runtime)
    capsys.readouterr()
    PPOTrainer(tiny(run={**go_on, "output_dir": str(tmp_path / "c"), "resume": str(old)}, optim={"lr": 0.05})).fit()
    assert "holds no scores of the base: evaluations are without eval/win_rate" in capsys.readouterr().out
    (row,) = learnt(read(tmp_path / "c"))
    (expected,) = learnt(rows[2:])
    assert {key for key in expected if key not in row} == {"eval/win_rate", "eval/win_rate_ci"}
    assert row == {key: value for key, value in expected.items() if key in row}


def stub_evaluations(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch, figures: list[tuple[float, float]]) -> None:
    """Let evaluations say these scores and KLs one after the other, the first before training."""
    queue = [(0.0, 0.0), *figures]
    true = trainer.run.evaluate

    def said() -> evaluation.Evaluation:
        score, kl = queue.pop(0)
        found = true()
        return replace(found, figures={**found.figures, "score": score, "kl": kl})

    monkeypatch.setattr(trainer.run, "evaluate", said)


def kept_by(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    steps: list[int] = []
    export = trainer.run.recorder.export

    def spy(name, *rest):
        if name == "best":
            steps.append(trainer.progress.step)
        export(name, *rest)

    monkeypatch.setattr(trainer.run.recorder, "export", spy)
    return steps


@pytest.mark.parametrize(
    ("budget", "figures", "steps"),
    [
        (None, [(1.0, 9.0), (2.0, 99.0), (1.5, 1.0)], [1, 2]),
        # At the budget is within it; above it not, however good; below again, better than what was kept.
        (2.0, [(1.0, 2.0), (9.0, 2.01), (1.5, 0.5)], [1, 3]),
        (2.0, [(1.0, 3.0), (2.0, math.nan), (3.0, 4.0)], []),
    ],
)
def test_best_is_the_best_within_the_budget(tiny, monkeypatch, capsys, budget, figures, steps) -> None:
    trainer = PPOTrainer(tiny(run={"total_steps": 3, "eval_every": 1, "best_kl_budget": budget}))
    stub_evaluations(trainer, monkeypatch, figures)
    kept = kept_by(trainer, monkeypatch)
    summary = trainer.fit()
    assert kept == steps
    assert (trainer.folder / "best").is_dir() == bool(steps)
    output = capsys.readouterr().out
    assert ("no evaluation was within run.best_kl_budget=2: best/ is not written" in output) == (not steps)
    if steps:
        score, kl = figures[steps[-1] - 1]
        card = (trainer.folder / "best" / "README.md").read_text(encoding="utf-8")
        assert f"for {steps[-1]} steps of" in card
        assert f"| score | 0.000 | {score:.3f} |" in card
        assert (
            f"| gain, in standard deviations of the score before | {score / summary['base']['score_std']:.3f} |" in card
        )
        assert summary["best"] == {"step": steps[-1], "score": score, "kl": kl}


def test_another_budget_takes_back_a_best_that_is_beyond_it(tiny, tmp_path, monkeypatch, capsys) -> None:
    run = {"total_steps": 1, "eval_every": 1, "save_every": 1, "output_dir": str(tmp_path / "a")}
    first = PPOTrainer(tiny(run=run))
    stub_evaluations(first, monkeypatch, [(5.0, 6.0)])
    first.fit()
    for budget, steps in ((7.0, []), (3.0, [2])):
        shutil.copytree(tmp_path / "a", tmp_path / str(budget))
        go_on = {"total_steps": 2, "output_dir": str(tmp_path / str(budget)), "resume": "latest"}
        trainer = PPOTrainer(tiny(run={**run, **go_on, "best_kl_budget": budget}))
        stub_evaluations(trainer, monkeypatch, [(1.0, 2.0)])
        monkeypatch.setattr(trainer.run, "evaluate", lambda true=trainer.run.evaluate: (true(), true())[1])
        kept = kept_by(trainer, monkeypatch)
        trainer.fit()
        assert kept == steps, budget
    assert "best/ has a KL of 6.00 nats, beyond run.best_kl_budget=3" in capsys.readouterr().out


def test_progress_of_older_versions_is_read(tmp_path) -> None:
    told = asdict(checkpoint.Progress(step=3, best_score=1.0))
    for name in ("base_scores", "best_kl", "best_step"):
        del told[name]
    (tmp_path / "progress.json").write_text(json.dumps(told))
    progress = checkpoint.load_progress(tmp_path)
    assert (progress.step, progress.base_scores, progress.best_kl) == (3, None, None)
