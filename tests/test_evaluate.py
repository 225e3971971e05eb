"""The command that evaluates a run's folder: the run's own metrics again, and samples of its reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_accel import __main__ as command_line
from rlhf_accel.commands import evaluate, parsers
from rlhf_accel.commands.evaluate import FRONTIER_STEP, Judge
from rlhf_accel.config.loading import load
from rlhf_accel.config.schema import Config
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.runs.checkpoint import load_progress
from rlhf_accel.runs.progress_line import ProgressLine
from rlhf_accel.training.evaluation import EVALUATION_SEED, EVALUATION_STEP
from rlhf_accel.training.ppo_trainer import PPOTrainer

pytestmark = pytest.mark.usefixtures("exact_fp32")

QUIET = ProgressLine(1, enabled=False)
RUN = {"total_steps": 3, "eval_every": 1, "save_every": 1, "keep_checkpoints": 0, "eval_samples": 4, "sample_every": 0}
GOLD = {"calibrate": True, "calibrate_samples": 32, "gold": "tests.test_ppo_trainer:length"}


@pytest.fixture
def fitted(tiny):
    """A function that makes the folder of a trained run and returns its trainer."""

    def make(**sections) -> PPOTrainer:
        tree = {"reward": GOLD, "optim": {"lr": 0.02}, **sections, "run": {**RUN, **sections.get("run", {})}}
        trainer = PPOTrainer(tiny(**tree))
        trainer.fit()
        return trainer

    return make


def tree(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KINDS = {
    "full": {"rollout": {"stop": ["e"]}},
    "tied": {"model": {"name_or_path": "llama"}, "rollout": {"temperature": 0.7}},
    "separate critic": {"model": {"critic": "separate"}},
    "lora with a critic of its own": {"lora": {"r": 4}, "model": {"critic": "adapter"}},
    "dora with a whole layer": {"lora": {"r": 4, "use_dora": True, "modules_to_save": ["lm_head"]}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_reproduces_the_metrics_of_the_run(fitted, llama_folder, capsys, monkeypatch, kind) -> None:
    """Bit for bit: the same weights, prompts, random numbers and scale, read from the run's folder."""
    sections = {name: dict(values) for name, values in KINDS[kind].items()}
    if sections.get("model", {}).get("name_or_path") == "llama":
        sections["model"]["name_or_path"] = str(llama_folder)
    run = fitted(**sections).folder
    before = on_disk(run)
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    evaluate.main(
        parsers.evaluate([str(run), "--trust_code", "--which", "step-000001", "step-000002", "best", "final"])
    )
    told, summary, rows = tree(run / "evaluation.json"), tree(run / "summary.json"), rows_of(run)
    assert told["calibration"] == summary["calibration"]
    models = told["models"]
    assert models["base"] == {"step": 0, **summary["base"]}
    assert models["final"] == {"step": 3, **summary["trained"]}
    best = summary["best"]["step"]
    for name, step in (("step-000001", 1), ("step-000002", 2), ("best", best)):
        of_the_run = {key.removeprefix("eval/"): v for key, v in rows[step - 1].items() if key.startswith("eval/")}
        assert models[name]["step"] == step
        assert {key: models[name][key] for key in of_the_run} == of_the_run
    assert len({models[name]["kl"] for name in ("base", "step-000001", "step-000002", "final")}) == 4
    assert {path: data for path, data in on_disk(run).items() if "evaluation.json" not in path} == before
    output = capsys.readouterr().out
    assert "evaluation 5/5  final" in output and "length, not trained on" in output


def test_a_scaled_adapter_lies_between_the_base_and_the_policy(fitted) -> None:
    run = fitted(lora={"r": 4}).folder
    evaluate.main(parsers.evaluate([str(run), "--trust_code", "--which", "final", "final@0.5", "step-000003@0.5"]))
    models = tree(run / "evaluation.json")["models"]
    assert models["final@0.5"] == models["step-000003@0.5"] and models["final@0.5"]["step"] == 3
    assert len({models[name]["kl"] for name in ("base", "final", "final@0.5")}) == 3
    # The same as a file whose adapter adds half as much.
    file = run / "best" / "adapter_model.safetensors"
    weights = load_file(run / "final" / "adapter_model.safetensors")
    save_file({key: value / 2 if "lora_B" in key else value for key, value in weights.items()}, file, {"format": "pt"})
    evaluate.main(parsers.evaluate([str(run), "--trust_code", "--which", "best"]))
    by_hand = tree(run / "evaluation.json")["models"]["best"]
    assert {**by_hand, "step": 3} == models["final@0.5"]


def test_without_which_the_exported_models_are_evaluated(fitted) -> None:
    run = fitted().folder
    evaluate.main(parsers.evaluate([str(run), "--trust_code"]))
    assert list(tree(run / "evaluation.json")["models"]) == ["base", "best", "final"]
    assert not (run / "frontier.json").exists()
    evaluate.main(parsers.evaluate([str(run), "--trust_code", "--which", "base"]))
    assert list(tree(run / "evaluation.json")["models"]) == ["base"]


def test_more_samples_begin_with_the_usual_ones(fitted) -> None:
    run = fitted().folder
    judge = Judge.of(run, load(Config, run / "config.yaml"))
    one, three = judge.base(1, QUIET), judge.base(3, QUIET)
    assert three.scores.shape == (len(judge.prompts), 3)
    assert torch.equal(three.scores[:, :1], one.scores)
    assert len({tuple(column.tolist()) for column in three.kls.T}) <= 3
    assert not torch.equal(three.scores[:, 0], three.scores[:, 1])
    model = judge.model("final", three, 3, QUIET)
    wins = evaluate.mean_interval(((model.scores > three.scores) + 0.5 * (model.scores == three.scores)).mean(1))
    assert model.figures["win_rate"] == pytest.approx(wins[0])


def test_the_frontier_is_that_of_the_runs_reference_on_its_own_scale(fitted) -> None:
    trainer = fitted()
    run = trainer.folder
    rows = rows_of(run)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('12\n{"step": 4, "obj')  # torn rows, of which one is JSON
    evaluate.main(parsers.evaluate([str(run), "--trust_code", "--frontier", "6", "--which", "final"]))
    told = tree(run / "frontier.json")
    assert (told["prompts"], told["samples"]) == (len(trainer.setup.held_out.fixed(4)), 6)

    # Again, by the reference alone: the run's base, scored by hand.
    base = PPOTrainer(load(Config, run / "config.yaml", ["--run.output_dir", str(run / "x")]))
    scores = []
    for number in range(6):
        responses = base.collector.sample(base.setup.held_out.fixed(4), Seeds(EVALUATION_SEED, FRONTIER_STEP + number))
        raw = [text.count("o") / max(len(text), 1) for text in responses.texts]
        scores.append([(score - trainer.reward.mean) / trainer.reward.std for score in raw])
    expected = np.array(scores)
    assert told["reference"]["score"] == pytest.approx(expected.mean(), abs=1e-5)
    assert told["reference"]["score_std"] == pytest.approx(expected.std(), abs=1e-5)
    assert told["best_of_n"][-1]["gain"] == pytest.approx(expected.max(0).mean() - expected.mean(), abs=1e-5)
    # None of these random numbers serves an evaluation too.
    assert FRONTIER_STEP > EVALUATION_STEP + 10**9

    points = told["points"]
    assert [point["name"] for point in points] == ["step 1", "step 2", "step 3", "final"]
    assert [point["step"] for point in points] == [1, 2, 3, 3]
    for point, row in zip(points, rows, strict=False):
        assert point["gain"] == pytest.approx(row["eval/score"] - expected.mean(), abs=1e-5)
        assert point["high"] - point["gain"] == pytest.approx(row["eval/score_ci"])
        assert (point["kl"], point["kl_high"] - point["kl"]) == pytest.approx((row["eval/kl"], row["eval/kl_ci"]))
    # Of the last step and of final/, which are one model: one gain, and the paired interval of what was kept.
    assert points[3]["gain"] == pytest.approx(points[2]["gain"], abs=1e-5)
    final = trainer.run.evaluation.rollout.scores.numpy() - expected.mean(0)
    half = 1.96 * final.std(ddof=1) / len(final) ** 0.5
    assert points[3]["gain"] - points[3]["low"] == pytest.approx(half, abs=1e-5)


def test_another_sampling_distribution_is_allowed_and_named(fitted, capsys) -> None:
    """Also for a run that was trained with a truncated one, whose KL is not that of any policy."""
    run = fitted(rollout={"top_k": 3}).folder
    options = [str(run), "--trust_code", "--which", "final"]
    evaluate.main(parsers.evaluate([*options, "--frontier", "3"]))
    told, truncated = tree(run / "evaluation.json"), tree(run / "frontier.json")
    assert told["sampling"] == {"temperature": 1.0, "top_k": 3, "top_p": 1.0}
    assert "responses at temperature 1, top_k 3" in capsys.readouterr().out
    assert truncated["no_share"].startswith("rollout.top_k=3") and truncated["points"][-1]["share"] is None
    evaluate.main(parsers.evaluate([*options, "--frontier", "3", "--rollout.top_k", "0"]))
    plain, curves = tree(run / "evaluation.json"), tree(run / "frontier.json")
    assert plain["sampling"]["top_k"] == 0 and plain["models"]["final"]["kl"] != told["models"]["final"]["kl"]
    assert [point["name"] for point in curves["points"]] == ["final"]  # those of training were drawn otherwise
    assert "do not show their upper tail" in curves["no_share"]
    output = capsys.readouterr().out
    assert (
        "evaluations during training sampled with temperature 1, top_k 3" in output
        and "no share of the optimum" in output
    )


def test_evaluations_on_other_prompts_are_not_compared(fitted, capsys) -> None:
    run = fitted().folder
    evaluate.main(parsers.evaluate([str(run), "--trust_code", "--frontier", "3", "--prompts", "2"]))
    told = tree(run / "frontier.json")
    assert (told["prompts"], told["points"]) == (2, [])
    assert "evaluations during training used other prompts (run.eval_samples=4)" in capsys.readouterr().out


def test_a_run_in_progress_is_evaluated_by_its_checkpoint(fitted) -> None:
    """Before it ends there is no summary and no final/."""
    run = fitted().folder
    scale = tree(run / "summary.json")["calibration"]
    (run / "summary.json").unlink()
    shutil.rmtree(run / "final")
    judge = Judge.of(run, load(Config, run / "config.yaml"))
    assert (judge.reward.mean, judge.reward.std) == (scale["mean"], scale["std"])
    assert judge.reward.std == load_progress(run / "checkpoints" / "step-000003").reward_std != 1
    evaluate.main(parsers.evaluate([str(run), "--trust_code"]))
    models = tree(run / "evaluation.json")["models"]
    assert list(models) == ["base", "best"]
    assert models["best"]["step"] is None


def test_gold_rewards_can_be_added_afterwards(fitted) -> None:
    run = fitted(reward={"function": "tests.conftest:share_of_o"}).folder
    options = ["--which", "final", "--reward.gold", "tests.test_ppo_trainer:length", "--batch", "2"]
    evaluate.main(parsers.evaluate([str(run), "--trust_code", *options]))
    final = tree(run / "evaluation.json")["models"]["final"]
    assert final["gold/length"] > 0
    assert {key: final[key] for key in ("score", "kl")} == pytest.approx(
        {key: tree(run / "summary.json")["trained"][key] for key in ("score", "kl")}, abs=1e-6
    )


def broken(prompts, responses, **columns):
    if len(prompts) > 2:
        raise RuntimeError("gone")
    return [0.0] * len(prompts)


REFUSED = [
    (["no_such_run"], 2, "no_such_run is not a run's folder: it has no config.yaml"),
    (["RUN", "--which", "finale"], 2, "--which finale: expected base, best, final or step-NNNNNN"),
    (["RUN", "--which", "final@2"], 2, "MODEL@SCALE with a scale up to 1"),
    (["RUN", "--which", "final@half"], 2, "MODEL@SCALE with a scale up to 1"),
    (["RUN", "--which", "final@0.5"], 2, "--which final@0.5: only runs with lora.r above 0"),
    (["RUN", "--which", "step-000009"], 2, "holds no checkpoint step-000009; those kept: step-000003, step-000002"),
    (["RUN", "--which", "step-000002"], 2, "step-000002 is not a whole checkpoint: progress.json"),
    (["RUN", "--which", "step-000001"], 2, "step-000001 is sharded by rank"),
    (["RUN", "--rollout.max_new_tokens", "3"], 2, "rollout.max_new_tokens (was 8, is 3): a run is evaluated with"),
    (["RUN", "--reward.gould", "a:b"], 2, "unknown key reward.gould; did you mean reward.gold?"),
    (["RUN", "--reward.gold", "tests.test_evaluate:nobody"], 2, "has no nobody"),
    (["BEGUN"], 2, "has neither best/ nor final/ yet"),
    (["BEGUN", "--which", "base"], 2, "has neither summary.json nor a checkpoint yet, which record the scale"),
    (["BLIND"], 2, "run.eval_samples=0 in"),
    (["BROKEN", "--which", "base"], 1, "raised RuntimeError: gone (test_evaluate.py:227); nothing is written"),
    (["BROKEN", "--frontier", "2"], 1, "raised RuntimeError: gone (test_evaluate.py:227); nothing is written"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, gpt2_folder, prompts_file):
    """A run, one that has just started, one without held-out prompts, and one whose reward fails now."""
    made: dict[str, Path] = {}

    def make(tiny) -> dict[str, Path]:
        if made:
            return made
        root = tmp_path_factory.mktemp("runs")
        run = {**RUN, "output_dir": str(root / "run")}
        PPOTrainer(tiny(run=run, reward=GOLD)).fit()
        kept = root / "run" / "checkpoints"
        (kept / "step-000002" / "progress.json").write_text("{}")
        (kept / "step-000001" / "learned.safetensors").unlink()
        told = tree(kept / "step-000001" / "manifest.json")
        del told["files"]["learned.safetensors"], told["sha256"]
        from rlhf_accel.runs import checkpoint

        told["sha256"] = checkpoint._digest(told)
        (kept / "step-000001" / "manifest.json").write_text(json.dumps(told))
        (root / "begun").mkdir()
        shutil.copy(root / "run" / "config.yaml", root / "begun")
        for name, old, new in (
            ("blind", "eval_samples: 4", "eval_samples: 0"),
            ("broken", "tests.conftest:share_of_o", "tests.test_evaluate:broken"),
        ):
            shutil.copytree(root / "run", root / name)
            text = (root / name / "config.yaml").read_text()
            assert old in text
            (root / name / "config.yaml").write_text(text.replace(old, new).replace("retries: 2", "retries: 0"))
        made.update({name: root / name.lower() for name in ("RUN", "BEGUN", "BLIND", "BROKEN")})
        return made

    return make


@pytest.mark.parametrize(("options", "status", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_evaluated_ends_in_one_line(folders, tiny, capfd, options, status, words) -> None:
    named = folders(tiny)
    before = {name: on_disk(folder) for name, folder in named.items()}
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["evaluate", "--trust_code", *(str(named.get(option, option)) for option in options)])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == status
    assert len(lines) == 1
    assert words in lines[0]
    assert {name: on_disk(folder) for name, folder in named.items()} == before


def test_a_run_with_push_to_hub_is_evaluated_without_the_hub(folders, tiny) -> None:
    run = folders(tiny)["RUN"]
    config = load(Config, run / "config.yaml", ["--run.push_to_hub", "nobody/model"])
    assert len(Judge.of(run, config).prompts)


def test_ctrl_c_while_drawing_leaves_all_as_it_was(fitted, monkeypatch, capsys) -> None:
    run = fitted().folder
    evaluate.main(parsers.evaluate([str(run), "--trust_code", "--frontier", "2"]))
    before, draws = on_disk(run), []

    def interrupted(self, done, text):
        draws.append(done)
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "advance", interrupted)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["evaluate", str(run), "--trust_code", "--frontier", "5"])
    assert stopped.value.code == 130
    assert "stopped by Ctrl-C after 2 of 5 samples; nothing is written" in capsys.readouterr().err
    assert draws == [1, 2]
    assert on_disk(run) == before


@pytest.mark.parametrize("options", [["--frontier", "0"], ["--samples", "-1"], ["--prompts", "many"]])
def test_counts_are_whole_and_above_0(options, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["evaluate", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err
