"""Continuing prompts with the model of a run: sources of prompts, the base beside it, scores, bad input."""

import io
import re
import shutil
from dataclasses import replace

import pytest
import torch

from rlhf_accel import __main__ as command_line
from rlhf_accel.commands import generate, parsers
from rlhf_accel.config.schema import RolloutConfig
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.conftest import share_of_o

pytestmark = pytest.mark.usefixtures("exact_fp32")


@pytest.fixture
def wide(monkeypatch):
    """A console on which no cell is folded."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def run_folder(tiny, wide):
    """A function that makes the folder of a trained run."""

    def make(**sections):
        run = {"total_steps": 1, "eval_samples": 4, **sections.pop("run", {})}
        trainer = PPOTrainer(tiny(run=run, optim={"lr": 0.05}, **sections))
        trainer.fit()
        return trainer

    return make


def cells(capsys):
    """The table's rows of cells, header first."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line and line[0] in "┃│"]
    return [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines]


def test_prompts_as_arguments_with_base_and_scores(run_folder, capsys):
    folder = run_folder().folder
    capsys.readouterr()
    generate.main(
        parsers.generate([str(folder), "The film", "A dull", "--compare", "--score", "--seed", "3", "--trust_code"])
    )
    header, *rows = cells(capsys)
    assert header == ["prompt", "base", "score", "trained", "score"]
    assert [row[0] for row in rows] == ["The film", "A dull"]
    for _, base, base_score, trained, trained_score in rows:
        assert base != trained
        for text, score in ((base, base_score), (trained, trained_score)):
            if text.isprintable() and "⏎" not in text:
                # Spaces at the ends of a response are lost in the table, and share_of_o counts them.
                assert float(score) == pytest.approx(share_of_o([], [text])[0], abs=0.2)


def test_the_same_seed_writes_the_same_and_another_does_not(run_folder, capsys):
    folder = run_folder().folder
    tables = []
    for seed in ("0", "0", "1"):
        capsys.readouterr()
        generate.main(parsers.generate([str(folder), "The film", "--seed", seed]))
        tables.append(cells(capsys))
    assert tables[0] == tables[1] != tables[2]
    assert tables[0][0] == ["prompt", "trained"]


@pytest.mark.parametrize("lora", [{"r": 0}, {"r": 4}])
def test_the_trained_model_and_its_base_are_the_runs(run_folder, lora, gpt2_folder):
    trainer = run_folder(lora=lora)
    options = parsers.generate([str(trainer.folder), "--compare"])
    _, (base, trained) = generate._writers(options)
    assert (base.name, trained.name) == ("base", "trained")
    ids = torch.tensor(trainer.setup.tokens.encode(["The film"]))
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    with torch.no_grad():
        expected = trainer.runtime.plain_module.policy(ids).logits
        torch.testing.assert_close(trained.model(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert (expected - start(ids).logits).abs().max() > 1e-2
    same = generate.Writer(name="start", model=start, tokens=trainer.setup.tokens, rollout=trainer.config.rollout)
    assert base.write(["The film", "A dull"], 0) == same.write(["The film", "A dull"], 0)
    # An adapter that was switched off for the base is back for the trained model.
    assert trained.write(["The film", "A dull"], 0) != base.write(["The film", "A dull"], 0)


def test_lines_of_a_file_and_of_stdin(run_folder, capsys, tmp_path, monkeypatch):
    folder = run_folder().folder
    (tmp_path / "prompts.txt").write_text("The film\n\nA dull\n")
    capsys.readouterr()
    generate.main(parsers.generate([str(folder), "--file", str(tmp_path / "prompts.txt")]))
    from_file = cells(capsys)
    assert [row[0] for row in from_file] == ["prompt", "The film", "A dull"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The film\nA dull\n")))
    generate.main(parsers.generate([str(folder)]))
    assert cells(capsys) == from_file


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_prompts_end_where_their_lines_end(gpt2_folder, tmp_path, monkeypatch, where):
    content = "\ufeffone\u2028two\x0cthree\r\n\r\nfour\x85five\n".encode()
    options = parsers.generate(["a model", *(["--file", str(tmp_path / "a.txt")] if where == "file" else [])])
    (tmp_path / "a.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert list(generate._prompts(options)) == [["one\u2028two\x0cthree", "four\x85five"]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfea")))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(ConfigError, match=r"cannot be read.*utf-8"):
        list(generate._prompts(options))


def test_a_prompt_longer_than_the_model(gpt2_folder, capfd):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["generate", str(gpt2_folder), "A good film " * 20, "--max_new_tokens", "4"])
    (line,) = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert "tokens, which with --max_new_tokens=4 is above the policy's 64 positions" in line


def test_prompts_one_at_a_time(run_folder, capsys, monkeypatch):
    folder = run_folder().folder
    typed = iter(["The film", "A [dull] one", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    capsys.readouterr()
    generate.main(parsers.generate([str(folder)]))
    assert [row[0] for row in cells(capsys)] == ["prompt", "The film", "prompt", "A [dull] one"]


def test_typing_ends_with_the_input():
    def ask(prompt):
        raise EOFError

    assert list(generate._typed(ask)) == []


def test_more_prompts_than_a_batch(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(generate, "BATCH", 2)
    folder = run_folder().folder
    capsys.readouterr()
    generate.main(parsers.generate([str(folder), "A", "B", "C"]))
    assert [row[0] for row in cells(capsys)] == ["prompt", "A", "B", "prompt", "C"]


def test_best_and_final(run_folder):
    folder = run_folder().folder
    shutil.rmtree(folder / "final")
    generate._writers(parsers.generate([str(folder), "--which", "best"]))
    with pytest.raises(ConfigError, match=r"holds no final/; the run has not finished"):
        generate._writers(parsers.generate([str(folder)]))


def test_a_model_without_a_run(gpt2_folder, wide, capsys):
    generate.main(parsers.generate([str(gpt2_folder), "The film", "--max_new_tokens", "3"]))
    assert [row[0] for row in cells(capsys)] == ["prompt", "The film"]


def test_options_override_those_of_the_run(run_folder):
    folder = run_folder(rollout={"temperature": 0.7}).folder
    _, (writer,) = generate._writers(parsers.generate([str(folder), "--top_k", "1", "--max_new_tokens", "3"]))
    assert writer.rollout.temperature == 0.7
    assert (writer.rollout.top_k, writer.rollout.max_new_tokens) == (1, 3)


def test_scores_are_on_the_scale_of_the_run(run_folder):
    trainer = run_folder(reward={"calibrate": True})
    config, _ = generate._writers(parsers.generate([str(trainer.folder), "--score", "--trust_code"]))
    reward = generate._reward(config, trainer.folder)
    assert (reward.mean, reward.std) == (trainer.reward.mean, trainer.reward.std)
    assert reward.std != 1


def test_a_response_does_not_depend_on_how_its_prompt_is_padded(gpt2_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    writer = generate.Writer(
        name="x", model=model, tokens=Tokens.load(str(gpt2_folder)), rollout=RolloutConfig(max_new_tokens=8)
    )
    alone = writer.write(["The film"], 0)
    assert writer.write(["The film", "A dull, tired and bad story that goes nowhere"], 0)[:1] == alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["MODEL", "A", "--score"], "--score needs a run's folder"),
        (["MODEL", "A", "--compare"], "--compare needs a run's folder or an adapter"),
        (["MODEL", "--file", "no_such_file.txt"], "--file no_such_file.txt: cannot be read"),
        (["no/such_model", "A"], "no/such_model"),
        (["MODEL", "A", "--file", "a.txt"], "prompts are given as arguments and with --file"),
        (["MODEL", " "], "no prompts"),
        (["MODEL", "A", "--temperature", "0"], "temperature"),
        (["MODEL", "A", "--max_new_tokens", "0"], "max_new_tokens"),
        (["MODEL", "A", "--top_p", "2"], "top_p"),
    ],
)
def test_bad_options_end_in_one_line(options, words, gpt2_folder, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["generate", *(str(gpt2_folder) if option == "MODEL" else option for option in options)])
    lines = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_a_folder_without_a_model_ends_in_one_line(tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["generate", str(tmp_path), "A"])
    assert stopped.value.code == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_texts_are_shown_as_they_are(wide, capsys):
    """Square brackets and backslashes would be markup to the library that draws the table."""
    rollout = RolloutConfig()
    writer = generate.Writer(name="trained", model=None, tokens=None, rollout=rollout)  # type: ignore[arg-type]
    object.__setattr__(writer, "write", lambda prompts, seed: tuple(r"\[/x] a \[b] [red]" for _ in prompts))
    generate._show([r"\[/p] [bold]"], [writer], None, 0)
    assert cells(capsys)[1] == [r"\[/p] [bold]", r"\[/x] a \[b] [red]"]


def test_scores_need_no_column_of_the_data(run_folder, monkeypatch):
    trainer = run_folder(reward={"calibrate": True})
    chat = replace(trainer.config.reward, model="chats", function=(), chat_field="messages")
    monkeypatch.setattr(generate, "load_run", lambda path: replace(trainer.config, reward=chat))
    with pytest.raises(ConfigError, match=r"^--score: .*chat_field=messages"):
        generate._writers(parsers.generate([str(trainer.folder), "--score", "--trust_code"]))


def test_a_reward_model_that_is_gone_is_named(run_folder, tmp_path):
    trainer = run_folder()
    gone = replace(trainer.config.reward, model=str(tmp_path / "gone"), function=())
    with pytest.raises(ConfigError, match=r"^reward\.model=.*/gone: no such folder") as error:
        generate._reward(replace(trainer.config, reward=gone), trainer.folder)
    assert error.value.key == "reward.model"


def test_scores_of_a_run_that_did_not_end_have_no_scale(run_folder):
    trainer = run_folder(reward={"calibrate": True})
    (trainer.folder / "summary.json").unlink()
    config, _ = generate._writers(parsers.generate([str(trainer.folder), "--score", "--trust_code"]))
    with pytest.raises(ConfigError, match=r"^--score: .* has no summary\.json"):
        generate._reward(config, trainer.folder)


def test_a_reward_that_needs_a_column_points_to_evaluate(run_folder, monkeypatch):
    trainer = run_folder()

    def by_topic(prompts, responses, *, topic):
        return [0.0 for _ in topic]

    reward = replace(trainer.reward, terms=(("by_topic", 1.0, by_topic),))
    monkeypatch.setattr(generate, "_reward", lambda config, run: reward)
    with pytest.raises(ConfigError, match=r"^--score: by_topic.* if the reward reads columns .*, use evaluate$"):
        generate.main(parsers.generate([str(trainer.folder), "The film", "--score", "--trust_code"]))
