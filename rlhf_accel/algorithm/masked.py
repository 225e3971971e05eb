"""Sums, means and whitening over the tokens that count.

Shapes: B rollouts, R response tokens. Results are fp32. A mask is True where a token counts; the other
positions may hold anything, including NaN.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float32[Tensor, ""]:
    """Sum of `x` where `mask` is True.

    Args:
        x: any shape, any float dtype; any unit, which the result keeps.
        mask: bool of the same shape.

    Returns:
        0-dim fp32; 0 for an all-False mask, still attached to the graph, so that an empty micro-batch has a backward.

    Raises:
        ValueError: the shapes differ.
    """
    return where_counted(x, mask).sum()


def weighted_sum(
    x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], weights: Float[Tensor, " B"] | None
) -> Float32[Tensor, ""]:
    """`masked_sum` with a weight for each row's tokens; without weights each counts once."""
    counted = where_counted(x, mask)
    return counted.sum() if weights is None else (counted * weights[:, None]).sum()


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float32[Tensor, ""]:
    """Mean of `x` where `mask` is True: a statistic of a whole batch, not a loss that is split (see `policy_loss`).

    Args:
        x: any shape, any float dtype; any unit, which the result keeps.
        mask: bool of the same shape.

    Returns:
        0-dim fp32.

    Raises:
        ValueError: the shapes differ, or `mask` is all False, when the mean is undefined.
    """
    total = masked_sum(x, mask)
    count = mask.sum()
    if count == 0:
        raise ValueError(f"masked_mean: the mask of shape {tuple(mask.shape)} has no True entry; expected at least 1")
    return total / count


def masked_row_sum(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float32[Tensor, " B"]:
    """Sum of `x` over each row's tokens where `mask` is True, as in the KL of a whole response.

    Args:
        x: (B, R), any float dtype; any unit, which the result keeps (nats per token become nats per response).
        mask: (B, R) bool.

    Returns:
        (B,) fp32; 0 for a row without a True entry.

    Raises:
        ValueError: the shapes differ.
    """
    return where_counted(x, mask).sum(dim=1)


def where_counted(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in fp32 where `mask` is True and 0 elsewhere, in value and in gradient, whatever `x` holds there."""
    if x.shape != mask.shape:
        # Without this, a (B, 1) or (R,) tensor would broadcast against the mask and be counted many times.
        raise ValueError(f"a tensor of shape {tuple(x.shape)} meets a mask of {tuple(mask.shape)}; expected the same")
    return torch.where(mask, x.float(), 0.0)  # fp32: sums run over thousands of tokens


def largest(x: Tensor, mask: Tensor) -> Tensor:
    """Largest of the non-negative `x` where `mask` is True; 0, the identity of such a maximum, if there is none."""
    return torch.cat((x.new_zeros(1), where_counted(x, mask).flatten())).amax()


def mean_and_variance(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance where `mask` is True: (0, 0) if it never is, and exactly 0 variance for a constant."""
    count = mask.sum().clamp(min=1)
    mean = masked_sum(x, mask) / count
    # A mean is rounded, so a constant x would seem to vary by an ulp; the mean of the remainder corrects that.
    mean = mean + masked_sum(x.float() - mean, mask) / count
    return mean, masked_sum((x.float() - mean).square(), mask) / count


def standardize(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], eps: float = 1e-8) -> Float32[Tensor, "B R"]:
    """Shift and scale to mean 0 and variance 1 over the entries where `mask` is True.

    The mean and the variance are those of all rows together, so pass the whole batch, never one rank's share. The
    variance is the biased one (divided by n, not n - 1), as in OpenAI's code, which keeps n = 1 finite.

    Args:
        x: (B, R), any unit; typically advantages.
        mask: (B, R) bool.
        eps: added to the variance before the root, in the squared unit of `x`.

    Returns:
        (B, R) fp32 without unit, 0 where masked out. One entry, equal entries or none give 0 everywhere.

    Raises:
        ValueError: the shapes differ.

    Source: Huang et al. 2024, "N+ Implementation Details", whitening; Ziegler et al. 2019's code, `whiten`.

    >>> standardize(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    x = where_counted(x, mask)  # before the product, in whose gradient a padding's NaN would reach all entries
    mean, variance = mean_and_variance(x, mask)
    return where_counted((x - mean) * (variance + eps).rsqrt(), mask)


def rescale(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], eps: float = 1e-8) -> Float32[Tensor, "B R"]:
    """Divide by the standard deviation over the entries where `mask` is True; nothing is shifted.

    Signs and zeros survive, and so does the ranking of responses by their sum, which a shift per token would tilt
    towards long or short ones. (OpenAI's `whiten(shift_mean=False)` differs: it scales the deviations and adds the old
    mean back, which moves the zeros.) The variance is that of all rows together, biased, as in `standardize`.

    Args:
        x: (B, R), any unit; typically rewards.
        mask: (B, R) bool.
        eps: a variance up to this is taken for rounding noise, in the squared unit of `x`.

    Returns:
        (B, R) fp32, 0 where masked out. If the variance is at most `eps` (one entry, or all equal) there is no scale to
        divide by, and `x` is returned unscaled rather than blown up by eps**-0.5.

    Raises:
        ValueError: the shapes differ.

    >>> rescale(torch.tensor([[1.0, 5.0, 99.0]]), torch.tensor([[True, True, False]]))  # mean 3, standard deviation 2
    tensor([[0.5000, 2.5000, 0.0000]])
    """
    x = where_counted(x, mask)  # before the product, in whose gradient a padding's NaN would reach all entries
    _, variance = mean_and_variance(x, mask)
    return x * torch.where(variance > eps, variance + eps, 1.0).rsqrt()
