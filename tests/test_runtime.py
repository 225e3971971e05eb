"""The runtime of one process. What several processes do together is in tests/distributed/."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState

from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config
from rlhf_accel.distributed import collectives
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.system.errors import ConfigError, RunFailed


def test_an_accelerator_of_another_precision_is_refused() -> None:
    Accelerator(mixed_precision="bf16", cpu=True)
    with pytest.raises(ConfigError, match=r"already has an Accelerator\(mixed_precision='bf16'\)") as found:
        Runtime(parse(Config, {}).run)
    assert found.value.facts == {"mixed_precision": "bf16"} and "run.trackers" not in str(found.value)


def test_a_gradient_is_applied_after_another_accelerator_accumulated() -> None:
    """Accelerate skips optimizer steps while gradients accumulate, and has one flag for the whole process."""
    runtime = Runtime(parse(Config, {}).run)
    module = torch.nn.Linear(2, 1)
    runtime.prepare(module, torch.optim.SGD(module.parameters(), lr=1.0))
    before = module.weight.clone()
    runtime.backward([lambda: module(torch.ones(2)).sum()])
    GradientState()._set_sync_gradients(False)
    assert runtime.optimizer_step()[1]
    torch.testing.assert_close(module.weight, before - 1)
    assert module.weight.grad is None


@pytest.mark.parametrize("error", [ConfigError("no.key: is wrong"), OSError("stale file handle")])
def test_an_error_of_the_main_process_reaches_the_others(monkeypatch, error) -> None:
    """Otherwise they would wait for its result until run.collective_timeout."""
    sent = []
    main, other = (SimpleNamespace(num_processes=2, is_main_process=is_main) for is_main in (True, False))
    monkeypatch.setattr(collectives, "broadcast_object_list", lambda outcome: sent.append(outcome[0]))

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        collectives.from_main(main, fail)
    monkeypatch.setattr(collectives, "broadcast_object_list", lambda outcome: outcome.__setitem__(0, sent[0]))
    with pytest.raises((ConfigError, RunFailed), match=str(error)):
        collectives.from_main(other, fail)


def test_only_the_main_process_copies_the_state_of_adamw() -> None:
    runtime = Runtime(parse(Config, {}).run)
    module = torch.nn.Linear(2, 1)
    runtime.prepare(module, torch.optim.AdamW(module.parameters()))
    runtime.backward([lambda: module(torch.ones(2)).sum()])
    runtime.optimizer_step()
    engine = runtime._engine
    assert set(engine.whole_moments()) == {
        f"{name}.{key}" for name in ("weight", "bias") for key in ("exp_avg", "exp_avg_sq", "step")
    }
    engine._accelerator = SimpleNamespace(is_main_process=False)
    assert engine.whole_moments() == {}
