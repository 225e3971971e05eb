"""The pages in docs/: names that exist, links that lead somewhere, and blocks that run, at toy size."""

import re
import shlex
import subprocess
import sys
import threading
from http.server import HTTPServer
from pathlib import Path

import pytest

from rlhf_accel import __main__ as command_line
from rlhf_accel.config.keys import key_names
from rlhf_accel.config.loading import load
from rlhf_accel.config.schema import Config, RewardTrainingConfig
from rlhf_accel.reward import RewardConfig, load_reward
from rlhf_accel.runs import metrics
from rlhf_accel.training.ppo_trainer import PPOTrainer
from scripts.reward_server import RewardServer
from tests.conftest import TEXTS
from tests.distributed.launch import environment
from tests.hub_cache import make_hub_cache_dataset, offline_environment, put_model

REPOSITORY = Path(__file__).parent.parent
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
KEYS = {*key_names(Config), *key_names(RewardTrainingConfig)}
SECTIONS = {key.partition(".")[0] for key in KEYS}
OWNERS = {name.partition("/")[0] for name in metrics.NAMES if "/" in name}
_BLOCK = re.compile(r"(?:<!-- (?P<marker>.*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


def unknown_names(text: str) -> list[str]:
    """Names in backticks outside of blocks that look like a key or a metric and are none: `section.key`,
    `section.key=value`, `owner/quantity`."""
    unknown = []
    for quoted in re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text)):
        key = re.match(r"-{0,2}([a-z_]+\.[a-z_0-9]+)(?![\w/.])", quoted)
        is_module = key and any((REPOSITORY / "rlhf_accel").rglob(key[1]))
        if key and key[1].partition(".")[0] in SECTIONS and key[1] not in KEYS and not is_module:
            unknown.append(key[1])
        metric = re.fullmatch(r"([a-z_]+)/[a-z_0-9]+", quoted)
        if metric and metric[1] in OWNERS and quoted not in metrics.NAMES:
            unknown.append(quoted)
    return unknown


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "README.md"], ids=lambda page: page.name)
def test_every_key_and_metric_on_a_page_exists(page):
    assert unknown_names(page.read_text(encoding="utf-8")) == []


def test_names_that_do_not_exist_are_found():
    said = "`ppo.kl_coef` `ppo.kl_coeff=0.1` `--optim.lr 1` `objective/kl` `objective/kl_k4` `run.py` `ppo.py`"
    assert unknown_names(said) == ["ppo.kl_coeff", "objective/kl_k4", "run.py"]


def test_the_page_on_metrics_speaks_of_every_one_that_says_how_a_run_goes():
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-zA-Z_/0-9]+)`", page))
    owners = ("objective/", "kl/", "loss/", "policy/", "value/", "rollout/", "optim/", "eval/", "perf/")
    assert {name for name in metrics.NAMES if name.startswith(owners)} - named == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.fixture
def toy(gpt2_folder, tmp_path, monkeypatch):
    """Overrides that make any run of a page a matter of a second, and a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return [
        *("--model.name_or_path", str(gpt2_folder), "--run.total_steps", "1", "--run.eval_samples", "2"),
        *("--rollout.batch_size", "8", "--rollout.max_new_tokens", "8", "--reward.calibrate", "false"),
        *("--ppo.num_minibatches", "2", "--run.trackers", "[]"),
    ]


def test_the_blocks_of_the_page_on_rewards_run(exact_fp32, toy, tmp_path, monkeypatch):
    """In their order: files are written, Python is run, lines for the shell are run in this process at toy size."""
    # What the page loads in Python is to be of toy size as well.
    monkeypatch.setattr("rlhf_accel.config.loading.load", lambda cls, source, own=(): load(cls, source, [*own, *toy]))
    address, ran, names = "", [], {}
    for block in _BLOCK.finditer((REPOSITORY / "docs" / "own_reward.md").read_text(encoding="utf-8")):
        marker, code = block["marker"] or "", block["code"]
        if marker.startswith("file: "):
            (tmp_path / marker.removeprefix("file: ")).write_text(code, encoding="utf-8")
        elif block["language"] == "python":
            exec(compile(code, "own_reward.md", "exec"), names)
        elif marker == "serve":
            options = shlex.split(code)
            assert options[:2] == ["python", "scripts/reward_server.py"]
            address = serve(options[options.index("--function") + 1])
        else:
            assert marker == "run", f"a block that no test runs: {code}"
            for line in code.splitlines():
                words = shlex.split(line.replace("http://127.0.0.1:8000/", address))
                assert words[:4] == ["python", "-m", "rlhf_accel", "train"]
                command_line.main([*words[3:], *toy])
                ran.append(words)
    assert len(ran) == 4
    assert sorted(path.parent.name for path in tmp_path.glob("saved_models/*/summary.json")) == [
        *("my_run", "partial", "served", "weighted")
    ]
    assert isinstance(names["trainer"], PPOTrainer)
    with HTTPServer(("127.0.0.1", 0), names["Handler"]) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        reward = load_reward(RewardConfig(url=f"http://127.0.0.1:{server.server_address[1]}/"), None, None)
        assert reward(["a"], ["bc"], {}).tolist() == pytest.approx([-0.02])


def serve(function: str) -> str:
    """The reward server on a free port, for as long as the tests last; its address."""
    server = RewardServer(("127.0.0.1", 0), load_reward(RewardConfig(function=(function,)), None, None), 1 << 20)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


GUIDES = ["sentiment", "lora", "zero2", "two_nodes", "own_preferences"]
HUB = ["lvwerra/gpt2-imdb", "gpt2", "gpt2-xl", "EleutherAI/gpt-j-6b"]
_PPO = (
    "--run.total_steps 2 --run.save_every 1 --run.eval_samples 2 --run.report false --rollout.batch_size 8 "
    "--rollout.max_new_tokens 8 --ppo.num_minibatches 2 --ppo.ppo_epochs 1 --data.max_samples 40"
)
TOY = {
    **dict.fromkeys(("train", "doctor", "scripts/train.py", "scripts/two_nodes.sh"), _PPO),
    "train-reward": "--optim.batch_size 8",
    "evaluate": "--prompts 4",
    "scripts/evaluate.py": "--prompts 4",
}


def commands(code: str) -> list[list[str]]:
    """The words of each command of a block for the shell, at toy size and on two processes of this machine."""
    programs = {"python": [sys.executable], "accelerate launch": [sys.executable, "-m", "accelerate.commands.launch"]}
    here = {"--num_processes": "2", "--main_process_ip": "127.0.0.1", "--gpu_memory": "80GiB"}
    made = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        words = [here.get(option, word) for option, word in zip(["", *words], words, strict=False)]
        toy = next((overrides for name, overrides in TOY.items() if name in words), "")
        length = 2 if words[0] == "accelerate" else 1
        program = programs.get(" ".join(words[:length]), words[:length])
        made.append([*program, *words[length:], *shlex.split(toy)])
    return made


def blocks(guide: str) -> list[re.Match[str]]:
    return list(_BLOCK.finditer((REPOSITORY / "docs" / f"{guide}.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_name_keys_that_exist(guide, tmp_path, monkeypatch):
    """Each config of a command resolves, as the command line reads it."""
    monkeypatch.chdir(tmp_path)
    found = 0
    for block in blocks(guide):
        if (block["marker"] or "").startswith("file: "):
            Path(block["marker"].removeprefix("file: ")).write_text(block["code"], encoding="utf-8")
        for words in commands(block["code"]) if block["marker"] in ("run", "nodes") else []:
            start = next(
                (i for i, word in enumerate(words) if word in ("train", "train-reward", "scripts/train.py")), None
            )
            if start is not None:
                command = words[start].removeprefix("scripts/").removesuffix(".py")
                with pytest.raises(SystemExit, match="0"):
                    command_line.main([command, *words[start + 1 :], "--print_config"])
                found += 1
    assert found >= 1 + (guide != "two_nodes")


@pytest.mark.long
@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_run(guide, gpt2_folder, classifier_folder, tmp_path):
    """In their order, each as a user starts it, with tiny models in the place of those of the hub."""
    cache, work = tmp_path / "hf_home" / "hub", tmp_path / "work"
    for name in HUB:
        put_model(cache, name, gpt2_folder)
    for name in ("siebert/sentiment-roberta-large-english", "distilroberta-base"):
        put_model(cache, name, classifier_folder)
    rows = [{"text": f"{text} <br />{text}", "label": i % 2} for i, text in enumerate(TEXTS * 20)]
    make_hub_cache_dataset(cache, "stanfordnlp/imdb", {"train": rows, "test": rows[:40]})
    work.mkdir()
    for name in ("scripts", "accelerate_configs", "ds_configs", "rlhf_accel"):
        (work / name).symlink_to(REPOSITORY / name)
    env = environment(**offline_environment(cache), PYTHON=sys.executable)

    def start(words: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(words, cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    ran = 0
    for block in blocks(guide):
        marker = block["marker"]
        if (marker or "").startswith("file: "):
            (work / marker.removeprefix("file: ")).write_text(block["code"], encoding="utf-8")
        elif block["language"] == "python":
            subprocess.run([sys.executable, "-c", block["code"]], cwd=work, env=env, check=True)
        elif marker in ("run", "nodes"):
            made = commands(block["code"])
            for together in [made] if marker == "nodes" else [[words] for words in made]:
                for words, process in zip(together, [start(words) for words in together], strict=True):
                    said, _ = process.communicate(timeout=400)
                    # The doctor of random models may rightly find a label that is the wrong one.
                    assert process.returncode == 0 or ("doctor" in words and "problem" in said), (
                        f"{words}\n{said[-6000:]}"
                    )
                    ran += 1
    assert ran >= 3
