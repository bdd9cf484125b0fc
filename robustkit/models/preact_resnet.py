"""Pre-activation residual networks for 32 x 32 images."""

from __future__ import annotations

from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Two BatchNorm-SiLU-convolution stages around a shortcut.

    Source: He et al. 2016 (arXiv 1603.05027), figure 4(e).
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.act = nn.SiLU()
        same = stride == 1 and channels_in == channels
        self.shortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        residual: Tensor = self.conv2(self.act(self.norm2(out)))
        return residual + skip


class PreActResNet(nn.Module):
    """A stem, stages of blocks that double the width and halve the resolution, a linear head.

    Shapes: (n, 3, 32, 32) -> (n, classes).
    """

    def __init__(self, blocks: tuple[int, ...], width: int, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                out = width * 2**stage
                layers.append(PreActBlock(channels, out, stride=2 if stage > 0 and block == 0 else 1))
                channels = out
        self.features = nn.Sequential(
            *layers, nn.BatchNorm2d(channels), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits
