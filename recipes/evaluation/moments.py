"""What is kept of a set while its clips stream by: moments of feature rows, and the rows themselves where needed.

Everything is in float64 and can be merged, so that shards of a set, on one machine or many, give what the whole would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Number, mean and scatter of rows.

    Attributes:
        count: Rows.
        mean: ``(features,)``, float64.
        scatter: Sum of the outer products of deviations from the mean, ``(features, features)``, float64.
    """

    count: int
    mean: Float[Tensor, " features"]
    scatter: Float[Tensor, "features features"]

    @classmethod
    def of(cls, rows: Float[Tensor, "rows features"]) -> Moments:
        """Of some rows.

        Raises:
            ValueError: If there are none.
        """
        if not len(rows):
            raise ValueError("Moments.of: expected at least one row, got none")
        rows = rows.double()
        mean = rows.mean(0)
        deviations = rows - mean
        return cls(len(rows), mean, deviations.T @ deviations)

    def merged(self, other: Moments) -> Moments:
        """Of the rows of both (Chan, Golub and LeVeque, 1979): no difference of large sums is ever taken.

        Raises:
            ValueError: If they have different numbers of features.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"Moments.merged: expected as many features on both sides, got {len(self.mean)} and "
                f"{len(other.mean)}; take the same network for all shards"
            )
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float[Tensor, "features features"]:
        """Unbiased covariance; NaN for a single row."""
        return self.scatter / (self.count - 1) if self.count > 1 else torch.full_like(self.scatter, torch.nan)

    @property
    def standard_error(self) -> Float[Tensor, " features"]:
        """Of the mean; NaN for a single row."""
        return (self.covariance.diagonal() / self.count).sqrt()


@dataclass(frozen=True)
class Rows:
    """Feature rows with the places that they have in the whole set.

    Attributes:
        places: Of each row; no two are equal.
        values: ``(rows, features)``, float64.
    """

    places: Int[Tensor, " rows"]
    values: Float[Tensor, "rows features"]

    def merged(self, other: Rows) -> Rows:
        """The rows of both, in order of their places."""
        places = torch.cat([self.places, other.places])
        order = places.argsort()
        return Rows(places[order], torch.cat([self.values, other.values])[order])


@dataclass(frozen=True)
class SetStatistics:
    """Everything that is kept of a set.

    Attributes:
        moments: By purpose; numbers per clip are rows of one feature.
        rows: By purpose.
    """

    moments: dict[str, Moments]
    rows: dict[str, Rows]

    def merged(self, other: SetStatistics) -> SetStatistics:
        """Of both shards; a purpose that one of them lacks is that of the other."""
        return SetStatistics(_merged(self.moments, other.moments), _merged(self.rows, other.rows))


def _merged(ours: dict, theirs: dict) -> dict:
    both = {name: ours[name].merged(theirs[name]) for name in ours.keys() & theirs.keys()}
    return ours | theirs | both
