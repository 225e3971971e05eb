"""Warnings for a run about the texts that its classifiers get: too long for them, or in another form than in training.

Knows the classifiers of a reward; knows no run.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_accel.reward.classifier import Classifier
from rlhf_accel.reward.weighted import Reward


def cautions(reward: Reward, prompt_tokens: int, new_tokens: int) -> list[tuple[str, str]]:
    """One (name of the check, message) for each finding about the reward's classifiers.

    The policy's prompts have up to `prompt_tokens` tokens, its responses up to `new_tokens`.
    """
    found: list[tuple[str, str]] = []
    for name, _, term in reward.classifiers:
        found += (("reward window", message) for message in _cut(name, term, prompt_tokens, new_tokens))
        found += (("reward texts", message) for message in _other_format(name, term))
    return found


def _cut(name: str, term: Classifier, prompt_tokens: int, new_tokens: int) -> Iterator[str]:
    longest = term.tokens_read(prompt_tokens, new_tokens)
    if longest <= term.max_tokens:
        return
    training = " (data.max_tokens of its training)" if term.record else ""
    end = "beginning" if term.tokenizer.truncation_side == "left" else "end"
    whole = ""
    if prompt_tokens >= term.max_tokens:
        whole = ", and nothing is read of the responses to the longest prompts"
    fix = "lower rollout.max_prompt_tokens" + (", or train it again with more" if term.record else "")
    fix = f"set reward.text=response, {fix}" if term.config.text == "full" else fix
    yield (
        f"{name} reads {term.max_tokens} tokens{training}, and samples have up to {longest} of the policy's: the {end} "
        f"may go unread{whole}; {fix}"
    )


def _other_format(name: str, term: Classifier) -> Iterator[str]:
    if term.record is None and term.tokenizer.chat_template and term.config.format == "auto":
        yield (
            f"{name} has a chat template and no record of how its texts were formed in training: they are scored "
            "plain; if it was trained on conversations set reward.format=chat, else plain"
        )
    if term.conversations and term.format == "plain" and term.config.text == "full":
        yield (
            f"{name} reads plain text, and the prompts are conversations: it reads a transcript with the names of the "
            "roles; set reward.text=response to score responses alone"
        )
    if term.record is not None and term.record.format not in ("mixed", "marked", term.format):
        yield (
            f"reward.format={term.format}, but {name} was trained on {term.record.format} texts: its scores mean "
            "little; set auto"
        )
