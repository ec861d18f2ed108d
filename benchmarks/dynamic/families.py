"""The nine families, and how DyCL's compilation of each compared with eager torch on its two boards."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from benchmarks.dynamic.models.dynamic import Dynamic

SMALL: dict[str, dict[str, Any]] = {
    "mobilenet": {"size": 64, "width": 1 / 8, "classes": 10},
    "vgg": {"size": 64, "width": 1 / 8, "classes": 10},
    "resnet": {"size": 64, "width": 1 / 4, "classes": 10},
    "wideresnet": {"size": 64, "width": 1 / 8, "classes": 10},
    "skipnet_recurrent": {"width": 1 / 4},
    "skipnet_feedforward": {"width": 1 / 4},
    "captioner_resnext": {"size": 64, "width": 1 / 4, "hidden": 16, "words": 30},
    "captioner_googlenet": {"size": 128, "width": 1 / 4, "hidden": 16, "words": 30},
    "blockdrop": {"width": 1 / 4, "blocks": 2},
}
"""The same code in sizes for tests."""


@dataclass(frozen=True)
class Family:
    """One of the nine.

    Attributes:
        name: Of its module in `benchmarks.dynamic.models`.
        title: For readers.
        dycl: How many times as fast as eager torch DyCL was with ONNX Runtime, on Jetson TX2 and on AGX Xavier; from
            the bars of its Figure 6.
    """

    name: str
    title: str
    dycl: tuple[float, float]

    def network(self, *, small: bool = False) -> Dynamic:
        """The network with seeded weights and thresholds."""
        module = importlib.import_module(f"benchmarks.dynamic.models.{self.name}")
        network: Dynamic = module.network(**(SMALL[self.name] if small else {}))
        return network


FAMILIES = (
    Family("mobilenet", "MobileNet", (2.12, 2.17)),
    Family("vgg", "VGG-16", (1.46, 1.37)),
    Family("resnet", "ResNet-56", (4.61, 3.06)),
    Family("wideresnet", "WideResNet", (1.21, 1.17)),
    Family("skipnet_recurrent", "SkipNet, LSTM", (15.9, 10.6)),
    Family("skipnet_feedforward", "SkipNet, conv", (20.2, 16.5)),
    Family("captioner_resnext", "ResNeXt", (2.67, 3.38)),
    Family("captioner_googlenet", "GoogLeNet", (1.90, 2.52)),
    Family("blockdrop", "BlockDrop", (10.2, 8.89)),
)
