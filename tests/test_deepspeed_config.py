"""The DeepSpeed file of a launch: completed with the settings of the run, or refused where it disagrees."""

import json

import pytest

from rlhf_accel.distributed.deepspeed_config import deepspeed_plugin
from rlhf_accel.system.errors import ConfigError


@pytest.fixture
def deepspeed_file(tmp_path, monkeypatch):
    """A function that writes a file and returns the config of a launch of two processes with it."""

    def filled(changes, *, precision="fp32", max_grad_norm=1.0, minibatch=7):
        tree = {"zero_optimization": {"stage": 2}, **changes}
        (tmp_path / "ds.json").write_text(json.dumps(tree))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
        monkeypatch.setenv("WORLD_SIZE", "2")
        return deepspeed_plugin(precision, max_grad_norm, minibatch).deepspeed_config

    return filled


AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)


@pytest.mark.parametrize("sizes", [AUTO, {}], ids=["auto", "absent"])
def test_deepspeed_sizes_come_from_the_run(deepspeed_file, sizes):
    config = deepspeed_file(sizes)
    # Seven samples on two ranks are four at most; DeepSpeed wants the product.
    assert [config[key] for key in AUTO] == [8, 4, 1, 1.0]
    assert not config["torch_autocast"]["enabled"]
    assert deepspeed_file(sizes, max_grad_norm=None)["gradient_clipping"] == 0.0
    autocast = {"dtype": "bfloat16", "enabled": True, "lower_precision_safe_modules": []}
    assert deepspeed_file(sizes, precision="bf16")["torch_autocast"] == autocast


def test_a_deepspeed_file_that_agrees_is_accepted(deepspeed_file):
    config = deepspeed_file({"train_batch_size": 7, "gradient_clipping": 1.0, "bf16": {"enabled": False}})
    assert (config["train_batch_size"], config["gradient_clipping"]) == (8, 1.0)


def test_buckets_of_size_auto_have_the_default_of_deepspeed(deepspeed_file):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": 1000}
    config = deepspeed_file({"zero_optimization": zero})["zero_optimization"]
    assert "reduce_bucket_size" not in config and config["stage3_prefetch_bucket_size"] == 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_batch_size": 8}, ["train_batch_size=8", "rollout.batch_size / ppo.num_minibatches = 7"]),
        ({"train_micro_batch_size_per_gpu": 2}, ["train_micro_batch_size_per_gpu=2", "over 2 processes"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps=4", "ppo.micro_batch_tokens"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping=0.5", "optim.max_grad_norm=1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=True", "run.precision=fp32"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled=True", "run.precision"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled=True", "run.precision=fp32"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage", "ddp.yaml"]),
        ({"optimizer": {"type": "AdamW"}}, ["optimizer in ", "optim.*"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler in ", "optim.*"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_deepspeed_file_that_disagrees_is_refused(deepspeed_file, changes, words):
    with pytest.raises(ConfigError) as caught:
        deepspeed_file(changes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "ds.json" in str(caught.value)


def test_a_deepspeed_file_that_cannot_be_read_is_refused(deepspeed_file, tmp_path, monkeypatch):
    deepspeed_file({})
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^deepspeed_config_file: .*ds\.json is not a JSON file"):
        deepspeed_plugin("fp32", 1.0, 8)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match=r"^deepspeed_config_file: .*other\.json cannot be read"):
        deepspeed_plugin("fp32", 1.0, 8)


def test_without_a_deepspeed_launch_there_is_no_plugin():
    assert deepspeed_plugin("fp32", 1.0, 8) is None
