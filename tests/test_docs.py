"""README and docs/: keys and metrics exist, links resolve, tables match the code, and blocks run at toy size."""

import json
import re
import shlex
import subprocess
import sys
import threading
from http.server import HTTPServer
from pathlib import Path

import pytest
import yaml

from rlhf_accel import __main__ as command_line
from rlhf_accel.commands.reward_server import RewardServer
from rlhf_accel.config.keys import key_names
from rlhf_accel.config.loading import load, to_yaml
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.schema import Config, RewardConfig
from rlhf_accel.reward import load_reward
from rlhf_accel.runs import metrics
from rlhf_accel.training.ppo_trainer import PPOTrainer
from scripts import write_reference
from tests.conftest import TEXTS
from tests.distributed.launch import environment
from tests.forks import offline_environment
from tests.hub_cache import make_hub_cache_dataset, put_model

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
LINKED = [*PAGES, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
KEYS = {*key_names(Config), *key_names(RewardTrainingConfig)}
SECTIONS = {key.partition(".")[0] for key in KEYS}
OWNERS = {name.partition("/")[0] for name in metrics.NAMES if "/" in name}
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"(?:<!-- (?P<marker>.*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


def unknown_names(text: str) -> list[str]:
    """Names in backticks outside of blocks that look like a key or a metric but do not exist: `section.key`,
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


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if n == 0 else f"{slug}-{n}" for slug, count in found.items() for n in range(count + 1)}


def broken_links(page: Path) -> list[str]:
    """Relative links and images of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_and_metric_on_a_page_exists(page):
    assert unknown_names(page.read_text(encoding="utf-8")) == []


def test_names_that_do_not_exist_are_found():
    text = "`ppo.kl_coef` `ppo.kl_coeff=0.1` `--optim.lr 1` `objective/kl` `objective/kl_k4` `run.nothing` `ppo.py`"
    assert unknown_names(text) == ["ppo.kl_coeff", "objective/kl_k4", "run.nothing"]


def test_metrics_page_covers_every_metric_of_a_run():
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-zA-Z_/0-9]+)`", page))
    owners = ("objective/", "kl/", "loss/", "policy/", "value/", "rollout/", "optim/", "eval/", "perf/")
    assert {name for name in metrics.NAMES if name.startswith(owners)} - named == set()


def test_reference_matches_the_code():
    page = write_reference.REFERENCE.read_text(encoding="utf-8")
    assert metrics.markdown_table() in page and all(f"| `{key}` |" in page for key in KEYS)
    assert write_reference.updated(page) == page, "run: python scripts/write_reference.py"


def absent_paths(text: str) -> list[str]:
    """Paths of the checkout in backticks that do not exist."""
    paths = re.findall(r"`((?:tests|scripts|docs|accelerate_configs|ds_configs|rlhf_accel)/[\w/.-]*)`", text)
    return [path for path in paths if not (REPOSITORY / path).exists()]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_anchors_and_paths_resolve(page):
    assert broken_links(page) == []
    if page.name != "CHANGELOG.md":  # which names former files
        assert absent_paths(page.read_text(encoding="utf-8")) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page's title\n## Part\n## Part\n[a](#a-pages-title) [b](#part-1) [c](page.md#part) [d](https://a.b/c)\n"
        "[e](#part-2) [f](absent.md) ![g](absent.svg) [h](page.md#other)\n```text\n[i](absent.md)\n```\n"
    )
    assert broken_links(page) == ["#part-2", "absent.md", "absent.svg", "page.md#other"]
    assert absent_paths("`scripts/train.py` `tests/` `scripts/absent.py`") == ["scripts/absent.py"]


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name != "index.md" and f"({page.name})" not in index] == []


def test_pre_commit_hooks_are_checks_of_the_test_script():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    script = (REPOSITORY / "scripts" / "test.sh").read_text(encoding="utf-8").replace('"$bin/', "").replace('"', "")
    entries = [hook["entry"].partition(" --")[0] for hook in hooks]
    assert entries == ["ruff check", "ruff format", "mypy", "lint-imports"]
    assert [entry for entry in entries if not re.search(rf"\n(start \w+ )?{entry}", script)] == []


@pytest.fixture
def toy(gpt2_folder, tmp_path, monkeypatch):
    """Overrides that make any run of a page take about a second, and a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return [
        *("--model.name_or_path", str(gpt2_folder), "--run.total_steps", "1", "--run.eval_samples", "2"),
        *("--rollout.batch_size", "8", "--rollout.max_new_tokens", "8", "--reward.calibrate", "false"),
        *("--ppo.num_minibatches", "2", "--run.trackers", "[]", "--run.report", "false"),
    ]


def write_file(block: re.Match[str], toy: list[str]) -> bool:
    """Write a block's file into the working folder, a config with the toy's overrides; False if it holds none."""
    marker = block["marker"] or ""
    if not marker.startswith("file: "):
        return False
    path = Path(marker.removeprefix("file: "))
    path.write_text(block["code"], encoding="utf-8")
    if path.suffix == ".yaml":
        path.write_text(to_yaml(load(Config, path, toy)), encoding="utf-8")
    return True


def test_the_readme_trains(exact_fp32, toy):
    """Its reward function, its config and its lines of Python."""
    Path("prompts.jsonl").write_text('{"text": "The film is"}\n' * 40, encoding="utf-8")
    names = {}
    for block in _BLOCK.finditer((REPOSITORY / "README.md").read_text(encoding="utf-8")):
        if not write_file(block, toy) and block["language"] == "python":
            exec(compile(block["code"], "README.md", "exec"), names)
    assert Path("saved_models/my_run/summary.json").is_file() and names["trainer"].progress.step == 1


def test_the_blocks_of_the_page_on_conversations_run(exact_fp32, toy, capsys):
    """As those of the page on rewards; the tiny policy gets a chat template."""
    Path("short.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    toy = [*toy, "--data.chat_template", "short.jinja", "--rollout.max_prompt_tokens", "40"]
    for block in blocks("conversations"):
        if write_file(block, toy):
            continue
        if block["language"] == "python":
            exec(compile(block["code"], "conversations.md", "exec"), {})
        else:
            words = shlex.split(block["code"])
            assert block["marker"] == "run" and words[:3] == ["python", "-m", "rlhf_accel"]
            command_line.main(words[3:])
    row = json.loads(Path("saved_models/my_chat/samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert re.fullmatch(r"system: Be brief\.\nuser: \d+\+1\?\nassistant: ", row["prompt"])
    assert "What is 3+4?" in capsys.readouterr().out


def test_the_blocks_of_the_page_on_rewards_run(exact_fp32, toy, tmp_path):
    """In their order: files are written, Python is executed, shell commands run in this process at toy size."""
    address, ran, names = "", [], {}
    for block in blocks("rewards"):
        marker, code = block["marker"] or "", block["code"]
        if write_file(block, toy):
            continue
        if block["language"] == "python":
            exec(compile(code, "rewards.md", "exec"), names)
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
    assert len(ran) == 5
    assert sorted(path.parent.name for path in tmp_path.glob("saved_models/*/summary.json")) == [
        *("arithmetic", "my_run", "partial", "served", "weighted")
    ]
    assert isinstance(names["trainer"], PPOTrainer)
    with HTTPServer(("127.0.0.1", 0), names["Handler"]) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        reward = load_reward(RewardConfig(url=f"http://127.0.0.1:{server.server_address[1]}/"), None, None)
        assert reward(["a"], ["bc"], {}).tolist() == pytest.approx([-0.02])


def serve(function: str) -> str:
    """Start the reward server on a free port, for as long as the tests run; returns its address."""
    server = RewardServer(("127.0.0.1", 0), load_reward(RewardConfig(function=(function,)), None, None), 1 << 20)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


GUIDES = ["sentiment", "lora", "distributed", "reward_models"]
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
    """The words of each command in a shell block, at toy size and on two processes of this machine."""
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
    return list(_BLOCK.finditer((DOCS / f"{guide}.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_name_keys_that_exist(guide, tmp_path, monkeypatch):
    """Each command's config resolves, as the command line reads it."""
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
    assert found >= 2


@pytest.mark.long
@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_run(guide, gpt2_folder, classifier_folder, tmp_path):
    """In their order, each as a user starts it, with tiny models in place of the hub's."""
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
                    output, _ = process.communicate(timeout=400)
                    # The doctor may rightly find that a random model has the wrong label.
                    assert process.returncode == 0 or ("doctor" in words and "problem" in output), (
                        f"{words}\n{output[-6000:]}"
                    )
                    ran += 1
    assert ran >= 3
