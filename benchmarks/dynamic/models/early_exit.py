"""Shallow-Deep networks (Kaya, Hong, Dumitras, ICML 2019): internal classifiers, and an end at the first sure one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from benchmarks.dynamic.models.dynamic import Exits

Layer = tuple[nn.Module, int, int]
"""A layer, its channels, and the height and width of its map."""


class InternalClassifier(nn.Module):
    """Scores from a map, pooled to 4 x 4 by a mixture of maxima and means, [batch, classes]."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        window = max(1, size // 4)
        self.highest, self.mean = nn.MaxPool2d(window), nn.AvgPool2d(window)
        self.linear = nn.Linear(channels * (size // window) ** 2, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear((0.5 * self.highest(features) + 0.5 * self.mean(features)).flatten(1))


class ShallowDeep(Exits):
    """A network with a classifier after some of its layers; ends where one is sure of every image of the batch."""

    def __init__(
        self, layers: Sequence[Layer], exits: Collection[int], head: nn.Module, *, classes: int, size: int
    ) -> None:
        super().__init__(len(exits), size)
        self.parts, self.classifiers = nn.ModuleList(), nn.ModuleList()
        part: list[nn.Module] = []
        for place, (layer, channels, edge) in enumerate(layers):
            part.append(layer)
            if place in exits:
                self.parts.append(nn.Sequential(*part))
                self.classifiers.append(InternalClassifier(channels, edge, classes))
                part = []
        self.head = nn.Sequential(*part, head)

    def forward(self, image: Tensor, thresholds: Tensor | None = None) -> Tensor:
        if thresholds is None:
            thresholds = self.thresholds
        features = image
        for exit, (part, classifier) in enumerate(zip(self.parts, self.classifiers, strict=True)):
            features = part(features)
            scores = classifier(features)
            if confidence(scores) >= thresholds[exit]:
                return scores
        return self.head(features)

    def judges(self) -> tuple[Sequence[nn.Module], Callable[[Tensor], Tensor]]:
        return list(self.classifiers), confidence


def confidence(scores: Tensor) -> Tensor:
    """The probability of the likeliest class; of several images, that of the least sure one."""
    return scores.softmax(1).amax(1).min()
