"""What reconstruction minimizes, and how errors are summed so that threads and shards cannot change them."""

# B samples, T tokens of a sample, H hidden (or outputs of a linear)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from raysweep.reconstruction.measures import TextError

EPSILON = 1e-6  # of normalized_mse: keeps tokens whose target is zero from dividing by it


@dataclass(frozen=True)
class Loss:
    """mean: float32 scalar, what is minimized;  per_token: (B, T) float32, whose sum over tokens is what `mean` divides
    by_hidden: whether `mean` also divides by the hidden units of a token
    """

    mean: Callable[[Tensor, Tensor], Tensor]
    per_token: Callable[[Tensor, Tensor], Tensor]
    by_hidden: bool = False

    def elements(self, target_STH: Tensor) -> int:
        """What the sum over a whole text is divided by."""
        return target_STH.numel() if self.by_hidden else target_STH.shape[0] * target_STH.shape[1]


def mean_squared_error(output_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """Mean over tokens and hidden units of (y' - y)^2, float32 scalar."""
    return (output_BTH.float() - target_BTH.float()).square().mean()


def token_squared_error(output_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """||y' - y||^2 of every token, float32 (B, T)."""
    return (output_BTH.float() - target_BTH.float()).square().sum(-1)


def token_normalized_error(output_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """||y' - y||^2 / (||y||^2 + 1e-6) of every token, float32 (B, T)."""
    return token_squared_error(output_BTH, target_BTH) / (target_BTH.float().square().sum(-1) + EPSILON)


def token_cosine_distance(output_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """1 - cos(y', y) of every token, float32 (B, T)."""
    return 1.0 - functional.cosine_similarity(output_BTH.float(), target_BTH.float(), dim=-1)


LOSSES: dict[str, Loss] = {
    "mse": Loss(mean_squared_error, token_squared_error, by_hidden=True),
    "normalized_mse": Loss(
        lambda output, target: token_normalized_error(output, target).mean(), token_normalized_error
    ),
    "cosine": Loss(
        lambda output, target: token_cosine_distance(output, target).mean(), token_cosine_distance
    ),
}


def batch_error(loss: Loss, output_BTH: Tensor, target_BTH: Tensor) -> TextError:
    """The error of a batch, sample by sample."""
    return TextError(
        errors=tuple(squared_sums(output_BTH.float() - target_BTH.float())),
        targets=tuple(squared_sums(target_BTH)),
        losses=tuple(sample_sums(loss.per_token(output_BTH, target_BTH))),
        elements=loss.elements(target_BTH),
    )


def squared_sums(x_BTH: Tensor) -> list[float]:
    """Sum of squares of every sample, float64, as numbers, for which a GPU is waited for."""
    return _numbers(squared_sums_B(x_BTH))


def squared_sums_B(x_BTH: Tensor) -> Tensor:
    """The same as a tensor where the samples are, float64 (B,).

    A fixed tree: every token's hidden units in float32 (one thread sums one token), then tokens in float64.
    How many threads there are, and which samples share a batch, changes nothing.
    """
    return _sample_sums_B(x_BTH.float().square().sum(-1))


def sample_sums(x_BT: Tensor) -> list[float]:
    """Sum over the tokens of every sample, float64."""
    return _numbers(_sample_sums_B(x_BT))


def _sample_sums_B(x_BT: Tensor) -> Tensor:
    return x_BT.double().sum(-1)


def _numbers(x_B: Tensor) -> list[float]:
    return [float(x) for x in x_B.tolist()]
