"""The pages in docs/: names that exist, links that lead somewhere, and blocks that run, at toy size."""

import re
import shlex
import threading
from http.server import HTTPServer
from pathlib import Path

import pytest

from rlhf_accel import __main__ as command_line
from rlhf_accel import metrics
from rlhf_accel.config import Config, RewardTrainingConfig, key_names, load
from rlhf_accel.reward import RewardConfig, load_reward
from rlhf_accel.trainer import PPOTrainer
from scripts.reward_server import RewardServer

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
        is_module = key and (REPOSITORY / "rlhf_accel" / key[1]).is_file()
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
    monkeypatch.setattr("rlhf_accel.config.load", lambda cls, source, own=(): load(cls, source, [*own, *toy]))
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
    assert len(ran) == 3
    assert sorted(path.parent.name for path in tmp_path.glob("saved_models/*/summary.json")) == [
        *("my_run", "served", "weighted")
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
