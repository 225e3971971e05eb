"""Metrics are declared once."""

from __future__ import annotations

from rlhf_accel.runs.metrics import METRICS, NAMES, markdown_table

# The keys that design.md promises to readers of metrics.jsonl.
PROMISED = """
step episodes objective/score objective/score_std objective/reward objective/kl objective/kl_k3
objective/entropy kl/coef loss/policy loss/value loss/total policy/approx_kl policy/clip_fraction policy/ratio_max
policy/first_ratio_error value/clip_fraction value/explained_variance rollout/response_tokens rollout/eos_fraction
optim/lr optim/grad_norm optim/skipped_steps time/rollout time/score time/update time/step perf/samples_per_second
perf/response_tokens_per_second perf/peak_memory_mib eval/score eval/kl
"""


def test_every_metric_is_declared_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names)) == len(NAMES)
    assert set(PROMISED.split()) <= NAMES
    for metric in METRICS:
        assert metric.meaning and metric.reduction, metric.name
        levels = 2 if metric.name.endswith("/NAME") else 1  # of a family of metrics
        assert metric.name in ("step", "episodes") or metric.name.count("/") == levels, metric.name


def test_the_table_has_a_row_for_every_metric() -> None:
    head, rule, *rows = markdown_table().splitlines()
    assert head.count("|") == rule.count("|") == 5
    assert [row.split("`")[1] for row in rows] == [metric.name for metric in METRICS]
    for row in rows:
        assert row.replace("\\|", "").count("|") == 5, f"a bar inside a cell is not escaped: {row}"
