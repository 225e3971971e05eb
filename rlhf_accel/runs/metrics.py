"""The metrics of a run, declared once: name, unit, meaning and reduction over ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    meaning: str
    reduction: str


METRICS = (
    Metric("step", "", "PPO step, from 1", "same on all ranks"),
    Metric("episodes", "responses", "responses sampled since the start", "sum over steps"),
    Metric("objective/score", "score", "score of a response (calibrated, if so configured)", "mean over responses"),
    Metric(
        "objective/score/NAME",
        "reward",
        "score by reward NAME of several, on its own scale: not weighted, calibrated or clipped",
        "mean over responses",
    ),
    Metric("objective/score_std", "score", "spread of those scores", "standard deviation over responses"),
    Metric(
        "objective/reward", "score", "sum of a response's token rewards: score less KL penalty", "mean over responses"
    ),
    Metric("objective/kl", "nats/response", "KL of the policy to the reference, k1", "mean over responses"),
    Metric(
        "objective/kl_k3",
        "nats/response",
        "the same, k3: never negative; less noisy near the reference, more noisy far from it",
        "mean over responses",
    ),
    Metric("objective/entropy", "nats/token", "entropy of the policy at sampled tokens", "mean over tokens"),
    Metric("kl/coef", "score/nat", "weight of the KL in the reward, or the loss, of this step", "same on all ranks"),
    Metric("loss/policy", "", "policy loss", "mean over tokens and updates"),
    Metric("loss/value", "", "clipped value loss", "mean over tokens and updates"),
    Metric("loss/kl", "nats/token", "KL to the reference, where ppo.kl_in=loss", "mean over tokens and updates"),
    Metric(
        "loss/total",
        "",
        "loss/policy + vf_coef x loss/value - entropy_coef x entropy + kl/coef x loss/kl",
        "mean over tokens and updates",
    ),
    Metric(
        "policy/approx_kl",
        "nats/token",
        "KL between the policy before and after the update, k3",
        "mean over tokens and updates",
    ),
    Metric("policy/clip_fraction", "", "tokens whose ratio was clipped", "mean over tokens and updates"),
    Metric("policy/ratio_max", "", "largest ratio of new to old probability", "max over tokens and updates"),
    Metric("policy/first_ratio_error", "", "|ratio - 1| before the first update: rounding only", "max over tokens"),
    Metric("value/clip_fraction", "", "tokens whose value was clipped", "mean over tokens and updates"),
    Metric(
        "value/explained_variance",
        "",
        "share of the returns' variance that values predicted, partial scores included",
        "over tokens",
    ),
    Metric("rollout/response_tokens", "tokens", "length of a response", "mean over responses"),
    Metric("rollout/eos_fraction", "", "responses that end with a stop token or text", "mean over responses"),
    Metric(
        "rollout/flat_groups",
        "",
        "prompts whose responses all score alike, where rollout.samples_per_prompt is above 1",
        "mean over prompts",
    ),
    Metric("optim/lr", "", "learning rate of the policy in this step", "same on all ranks"),
    Metric("optim/grad_norm", "", "norm of the gradient before clipping", "mean over updates"),
    Metric(
        "optim/skipped_steps",
        "",
        "optimizer steps, or whole steps, skipped because a number was not finite",
        "sum over steps",
    ),
    Metric("time/rollout", "s", "sampling, log-probabilities, values, reference", "main process"),
    Metric("time/score", "s", "rewards", "main process"),
    Metric("time/update", "s", "forward and backward passes and optimizer steps", "main process"),
    Metric("time/step", "s", "the whole step", "main process"),
    Metric("perf/samples_per_second", "responses/s", "responses of all ranks divided by time/step", "sum over ranks"),
    Metric(
        "perf/response_tokens_per_second",
        "tokens/s",
        "response tokens of all ranks divided by time/step",
        "sum over ranks",
    ),
    Metric("perf/peak_memory_mib", "MiB", "peak memory of a process so far: GPU if there is one", "max over ranks"),
    Metric("eval/score", "score", "score on held-out prompts; only at steps with an evaluation", "mean over responses"),
    Metric("eval/score_ci", "score", "half-width of its 95 % interval: 1.96 s / sqrt(prompts)", "over prompts"),
    Metric(
        "eval/score/NAME",
        "reward",
        "score by reward NAME of several, on its own scale, on held-out prompts",
        "mean over responses",
    ),
    Metric("eval/score_ci/NAME", "reward", "half-width of its 95 % interval", "over prompts"),
    Metric("eval/kl", "nats/response", "KL to the reference on held-out prompts, k1", "mean over responses"),
    Metric("eval/kl_ci", "nats/response", "half-width of its 95 % interval", "over prompts"),
    Metric("eval/length", "tokens", "length of a response to held-out prompts", "mean over responses"),
    Metric(
        "eval/eos_fraction",
        "",
        "responses to held-out prompts that end with a stop token or text",
        "mean over responses",
    ),
    Metric("eval/distinct_1", "", "distinct tokens divided by tokens", "over the tokens of all responses"),
    Metric("eval/distinct_2", "", "the same for pairs of tokens", "over the pairs of all responses"),
    Metric(
        "eval/self_repetition", "", "share of a response's 4-grams that occurred before in it", "mean over responses"
    ),
    Metric(
        "eval/reference_perplexity",
        "",
        "perplexity of the responses under the reference, at rollout.temperature",
        "over the tokens of all responses",
    ),
    Metric(
        "eval/win_rate",
        "",
        "responses with a score above the base's for the same prompt and random numbers; ties count half",
        "mean over responses",
    ),
    Metric("eval/win_rate_ci", "", "half-width of its 95 % interval", "over prompts"),
    Metric(
        "eval/gold/NAME",
        "gold score",
        "score by reward.gold's NAME on held-out prompts; null if it failed",
        "mean over responses",
    ),
    Metric("eval/gold_ci/NAME", "gold score", "half-width of its 95 % interval", "over prompts"),
)
NAMES = frozenset(metric.name for metric in METRICS)


def markdown_table() -> str:
    """The metrics as docs/reference.md lists them."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(m)) + " |" for m in METRICS]
    return "\n".join(["| key | unit | meaning | reduction |", "| --- | --- | --- | --- |", *rows])


def _cells(metric: Metric) -> tuple[str, ...]:
    return f"`{metric.name}`", metric.unit, metric.meaning, metric.reduction
