"""Distances between two sets of feature rows, and scores of one set; each refuses a set that is too small for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.evaluation.moments import Moments
from temporal_layers.recipes.metrics import frechet_distance

KERNEL_BLOCK = 1000
"""Samples of a block of the kernel distance, as many as a subset of KID has (Binkowski et al. 2018)."""

INCEPTION_SPLITS = 10
"""Parts of a set for its inception score (Salimans et al. 2016)."""


@dataclass(frozen=True)
class Value:
    """A number with what is known of its spread.

    Attributes:
        value: The number.
        spread: Standard error of a mean, or for the inception score the standard deviation over its splits; None where
            neither is known.
    """

    value: float
    spread: float | None = None


def frechet(generated: Moments, real: Moments) -> Value:
    """Squared Frechet distance of two sets, each taken for a Gaussian: FID (Heusel et al. 2017) or FVD.

    It is biased: fewer samples give a larger number, for real samples too. Compare only numbers of one sample count.

    Args:
        generated: Of the features of generated samples.
        real: Of those of real samples.

    Raises:
        ValueError: If the sets have different features, or one has no more samples than features.
    """
    if generated.mean.shape != real.mean.shape:
        raise ValueError(
            f"frechet: expected as many features of both sets, got {len(generated.mean)} and {len(real.mean)}; "
            "take one network for both"
        )
    for name, one in (("generated", generated), ("real", real)):
        check_full_rank(name, one.count, len(one.mean))
    return Value(frechet_distance(generated.mean, generated.covariance, real.mean, real.covariance))


def check_full_rank(name: str, samples: int, features: int) -> None:
    """Raise a ValueError unless there are more samples than features."""
    if samples <= features:
        raise ValueError(
            f"frechet: {name}: expected more samples than the {features} features, got {samples}: with fewer the "
            "covariance has no full rank, and the distance says more about the number of samples than about them; "
            "take more samples, a network of fewer features, or the kernel distance"
        )


def kernel_distance(
    generated: Float[Tensor, "m features"],
    real: Float[Tensor, "n features"],
    *,
    block_size: int = KERNEL_BLOCK,
    seed: int = 0,
) -> Value:
    """Squared maximum mean discrepancy for the kernel ``(x.y / features + 1)^3``: KID (Binkowski et al. 2018) or KVD.

    Both sets are shuffled and cut into blocks; the result is the mean over blocks of the unbiased estimate. It is
    unbiased at any number of samples and may be below 0.

    Args:
        generated: Features of generated samples.
        real: Those of real samples.
        block_size: About how many samples of the smaller set a block has. A set of up to twice as many is one block,
            and there is no spread then.
        seed: Of the order.

    Returns:
        The distance, with the standard error over blocks.

    Raises:
        ValueError: If the sets have different features, or one has fewer than two samples.
    """
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"kernel_distance: expected as many features of both sets, got {generated.shape[1]} and {real.shape[1]}; "
            "take one network for both"
        )
    fewest = min(len(generated), len(real))
    if fewest < 2 or block_size < 2:
        raise ValueError(
            "kernel_distance: expected at least two samples of each set and in a block, got "
            f"{len(generated)} generated and {len(real)} real ones and block_size={block_size}: pairs of one set are "
            "compared; take more samples"
        )
    generator = torch.Generator().manual_seed(seed)
    count = max(1, fewest // block_size)
    blocks = []
    for rows in (generated.double(), real.double()):
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        blocks.append(rows[order].tensor_split(count))
    values = torch.stack([_unbiased_mmd(x, y) for x, y in zip(*blocks, strict=True)])
    spread = values.std().item() / count**0.5 if count > 1 else None
    return Value(values.mean().item(), spread)


def _unbiased_mmd(x: Float[Tensor, "m features"], y: Float[Tensor, "n features"]) -> Float[Tensor, ""]:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return within[0] + within[1] - 2 * kernel(x, y).mean()


def inception_score(logits: Float[Tensor, "samples classes"], *, splits: int = INCEPTION_SPLITS) -> Value:
    """Exponential of the mean divergence of ``p(class | sample)`` from ``p(class)`` (Salimans et al. 2016).

    It looks at one set only: clear and varied classes score high, up to the number of classes, whether or not a sample
    looks real.

    Args:
        logits: Of generated samples; logarithms of probabilities will do.
        splits: Parts, each with a score of its own.

    Returns:
        The mean over splits, with the standard deviation over them.

    Raises:
        ValueError: If a split has fewer samples than there are classes, so that it could not reach the full score.
    """
    check_enough_classes(*logits.shape, splits)
    scores = []
    for part in F.log_softmax(logits.double(), dim=1).tensor_split(splits):
        marginal = part.logsumexp(0) - torch.log(torch.tensor(len(part), dtype=torch.float64))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return Value(values.mean().item(), values.std(correction=0).item() if splits > 1 else None)


def check_enough_classes(samples: int, classes: int, splits: int) -> None:
    """Raise a ValueError unless every split can have a sample of each class."""
    if splits < 1 or samples // splits < classes:
        raise ValueError(
            f"inception_score: expected at least {classes} samples, one for each class, in each of {splits} splits, "
            f"got {samples} in all: a smaller split cannot reach the score of {classes}; take at least "
            f"{max(splits, 1) * classes} samples"
        )


def mean_of(numbers: Moments) -> Value:
    """The mean over clips of a number per clip, with its standard error."""
    spread = numbers.standard_error.item() if numbers.count > 1 else None
    return Value(numbers.mean.item(), spread)
