"""Uploads to the hub, with a fake client and with a small server that answers like the hub."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from rlhf_accel import __main__ as command_line
from rlhf_accel.commands import parsers, push
from rlhf_accel.runs import hub
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer

pytestmark = pytest.mark.usefixtures("exact_fp32")

ME = {"name": "ada", "orgs": [{"name": "engine"}], "auth": {"accessToken": {"role": "write"}}}


class Hub:
    """Calls of the client and its answers; `files` are those of the last upload, by path."""

    def __init__(self):
        self.who = ME
        self.error = None
        self.calls = []
        self.files = {}


@pytest.fixture
def client(monkeypatch):
    """A fake for every call of the hub's client."""
    fake = Hub()

    def answer(what):
        if isinstance(what, Exception):
            raise what
        return what

    def upload(self, *, repo_id, folder_path, repo_type, commit_message):
        answer(fake.error)
        fake.files = {
            path.relative_to(folder_path).as_posix(): path.read_bytes()
            for path in folder_path.rglob("*")
            if path.is_file()
        }
        fake.calls.append(("upload", repo_id, repo_type))

    def create(self, repo_id, *, private, exist_ok, repo_type):
        fake.calls.append(("create", repo_id, private, exist_ok, repo_type))
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(HfApi, "whoami", lambda self: answer(fake.who))
    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return fake


@pytest.fixture
def exported(tmp_path):
    """An adapter's folder as a run writes it, with its base in a local folder."""
    folder = tmp_path / "run" / "final"
    (folder / "critic").mkdir(parents=True)
    for place in (folder, folder / "critic"):
        (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 4}))
        (place / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "value_head.safetensors").write_bytes(b"head")
    (folder / "README.md").write_text('name = "."  # this folder\n')
    return folder


def test_a_run_uploads_its_model(tiny, client, capsys):
    trainer = PPOTrainer(tiny(run={"total_steps": 1, "eval_samples": 0, "push_to_hub": "ada/m", "hub_private": True}))
    assert client.calls == [], "nothing is created before there is a model to upload"
    trainer.fit()
    assert client.calls == [("create", "ada/m", True, True, "model"), ("upload", "ada/m", "model")]
    here = {path.name for path in (trainer.folder / "final").iterdir()}
    assert set(client.files) == here >= {"model.safetensors", "value_head.safetensors", "tokenizer.json", "README.md"}
    assert b'name = "ada/m"' in client.files["README.md"]
    assert "the model is on the hub: https://huggingface.co/ada/m" in capsys.readouterr().out


def test_an_upload_that_fails_loses_nothing_and_prints_how_to_try_again(tiny, client, capsys):
    client.error = ConnectionError("no route")
    trainer = PPOTrainer(tiny(run={"total_steps": 1, "eval_samples": 0, "push_to_hub": "ada/m", "hub_private": True}))
    trainer.fit()
    printed = " ".join(capsys.readouterr().out.split())
    assert "could not be uploaded to ada/m (ConnectionError: no route)" in printed
    again = f"python -m rlhf_accel push {trainer.folder} ada/m --private"
    assert f"try again with {again}" in printed
    assert (trainer.folder / "summary.json").is_file()
    client.error = None
    command_line.main(again.split()[3:])
    assert client.calls[-1] == ("upload", "ada/m", "model")
    assert "model.safetensors" in client.files


@pytest.mark.parametrize(
    ("who", "name", "words"),
    [
        (LocalTokenNotFoundError("none"), "ada/m", ["no hub token", "hf auth login", "HF_TOKEN"]),
        (OfflineModeIsEnabled("offline"), "ada/m", ["HF_HUB_OFFLINE"]),
        (TimeoutError("slow"), "ada/m", ["cannot be reached", "slow"]),
        (ME, "bob/m", ["may write to ada, engine, not to bob"]),
        ({**ME, "auth": {"accessToken": {"role": "read"}}}, "ada/m", ["may only read"]),
        (ME, "m", ["USER/NAME"]),
        (ME, "ada/m/n", ["USER/NAME"]),
    ],
)
def test_a_model_that_cannot_be_uploaded_is_refused_before_training(tiny, client, who, name, words):
    client.who = who
    with pytest.raises(ConfigError) as refused:
        PPOTrainer(tiny(run={"push_to_hub": name}, model={"name_or_path": "/no/such/model"}))
    for word in (f"run.push_to_hub={name}", *words):
        assert word in str(refused.value)
    assert client.calls == []


def test_an_organisation_of_the_tokens_user_is_accepted(tiny, client):
    hub.check(tiny(run={"push_to_hub": "Engine/m"}))


def test_an_adapter_on_a_folder_of_this_machine_is_refused(tiny, client):
    with pytest.raises(ConfigError, match=r"run\.push_to_hub=ada/m: the base of the adapter, model\.name_or_path="):
        PPOTrainer(tiny(run={"push_to_hub": "ada/m"}, lora={"r": 2}))


def test_an_adapter_is_uploaded_with_the_hub_id_of_its_base(client, exported, tmp_path):
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="--base"):
        push.main(parsers.push([str(exported), "ada/m"]))
    push.main(parsers.push([str(exported), "ada/m", "--base", "openai-community/gpt2"]))
    for name in ("adapter_config.json", "critic/adapter_config.json"):
        assert json.loads(client.files[name]) == {"base_model_name_or_path": "openai-community/gpt2", "r": 4}
    assert client.files["critic/adapter_model.safetensors"] == b"weights"
    assert not any(str(tmp_path).encode() in content for content in client.files.values())
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("base", ["/no/longer/here", "../models/base", None])
def test_an_adapter_whose_base_is_not_a_hub_id_is_refused(client, exported, base):
    """Also a folder that does not exist on this machine."""
    (exported / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ConfigError, match=r"--base"):
        push.main(parsers.push([str(exported), "ada/m"]))
    assert client.calls == []


def test_a_runs_model_is_uploaded_with_the_base_of_its_config(client, exported):
    run = exported.parent
    shutil.copytree(exported, run / "best")
    (run / "best" / "value_head.safetensors").write_bytes(b"best head")
    (run / "config.yaml").write_text("model: {name_or_path: 'wheel:SmolLM2-135M-Instruct'}\nlora: {r: 4}\n")
    for options, head in (([], b"head"), (["--which", "best"], b"best head")):
        push.main(parsers.push([str(run), "ada/m", *options]))
        assert client.files["value_head.safetensors"] == head
        named = json.loads(client.files["adapter_config.json"])["base_model_name_or_path"]
        assert named == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_an_adapter_whose_config_is_torn_is_refused(client, exported, content):
    (exported / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"adapter_config\.json does not have the form that peft writes"):
        push.main(parsers.push([str(exported), "ada/m"]))


def test_an_adapter_whose_base_is_on_the_hub_needs_no_option(client, exported):
    (exported / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "openai-community/gpt2"}))
    push.main(parsers.push([str(exported), "ada/m"]))
    assert json.loads(client.files["adapter_config.json"])["base_model_name_or_path"] == "openai-community/gpt2"


def test_a_link_out_of_the_folder_is_not_followed(client, exported, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("secret", encoding="utf-8")
    (exported / "vocab.txt").symlink_to(secret)
    with pytest.raises(hub.PushError, match=r"vocab\.txt is a link to a file outside"):
        hub.push(exported, "ada/model")
    assert not client.files


def test_a_folder_without_a_model_is_refused(client, tmp_path):
    with pytest.raises(ConfigError, match="holds no model"):
        push.main(parsers.push([str(tmp_path), "ada/m"]))
    assert client.calls == []


class _HubHandler(BaseHTTPRequestHandler):
    """The addresses of the hub that an upload of small text files needs."""

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid user token."})
        return self.answer(200, ME)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, body))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            return self.answer(200, {"url": f"https://huggingface.co/ada/{name}", "name": f"ada/{name}", "id": "1"})
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        return self.answer(
            200,
            {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"https://huggingface.co/ada/m/commit/{0:040}",
                "hookOutput": "",
            },
        )

    def answer(self, status, tree):
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local server that the client uses as the hub."""
    with HTTPServer(("127.0.0.1", 0), _HubHandler) as served:
        served.asked = []
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{served.server_address[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=address))
        huggingface_hub.close_session()
        yield served
        served.shutdown()
    huggingface_hub.close_session()


def test_the_real_client_sends_the_files_to_a_server(server, exported, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    push.main(parsers.push([str(exported), "ada/m", "--base", "openai-community/gpt2", "--private"]))
    created = next(json.loads(body) for path, body in server.asked if path == "/api/repos/create")
    assert created.get("visibility") == "private" or created.get("private") is True
    commit = next(body for path, body in server.asked if "/commit/" in path)
    files = {line["value"]["path"] for line in map(json.loads, commit.splitlines()) if line["key"] == "file"}
    assert files == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"),
        *("critic/adapter_config.json", "critic/adapter_model.safetensors"),
    }
    assert "ada/m" in capsys.readouterr().out


def test_a_token_that_the_hub_refuses(server, exported, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="refuses the token of this machine; log in with `hf auth login`"):
        push.main(parsers.push([str(exported), "ada/m", "--base", "openai-community/gpt2"]))
