"""VGG with any number of filters per convolution, as a transformers model.

The file stands alone (torch and transformers only): `save_pretrained` copies it into the folder, so that a pruned
network loads anywhere with `from_pretrained(folder, trust_remote_code=True)`. Architecture: Simonyan & Zisserman 2014,
configuration D with BatchNorm; the classifier for small images is one hidden layer (torchvision's for 224 x 224 has
two).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

POOL = 0
"""stands in `filters` for a 2 x 2 max pooling"""
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)


class VggConfig(PretrainedConfig):
    """filters: of each convolution, 0 for a pooling. hidden: widths of the classifier's hidden layers. pooled: side of
    the feature map that the classifier reads (adaptive average pooling; 1 for 32 x 32 images, 7 for 224 x 224)."""

    model_type = "tinygn_vgg"

    def __init__(
        self,
        filters: tuple[int, ...] = VGG16,
        hidden: tuple[int, ...] = (512,),
        pooled: int = 1,
        num_channels: int = 3,
        image_size: int = 32,
        dropout: float = 0.5,
        **others: Any,
    ) -> None:
        self.filters, self.hidden, self.pooled = list(filters), list(hidden), pooled
        self.num_channels, self.image_size, self.dropout = num_channels, image_size, dropout
        super().__init__(**others)


class VggForImageClassification(PreTrainedModel):
    config_class = VggConfig
    main_input_name = "pixel_values"

    def __init__(self, config: VggConfig) -> None:
        super().__init__(config)
        widths = [config.num_channels, *(n for n in config.filters if n != POOL)]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _, out in pairs)
        features = [widths[-1] * config.pooled**2, *config.hidden, config.num_labels]
        self.classifier = nn.ModuleList(nn.Linear(i, o) for i, o in zip(features, features[1:], strict=False))
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        """pixel_values (batch, channels, height, width) -> logits (batch, labels)."""
        hidden, number = pixel_values, 0
        for width in self.config.filters:
            if width == POOL:
                hidden = nn.functional.max_pool2d(hidden, 2)
            else:
                hidden = nn.functional.relu(self.norms[number](self.convolutions[number](hidden)))
                number += 1
        hidden = nn.functional.adaptive_avg_pool2d(hidden, self.config.pooled).flatten(1)
        for layer in self.classifier[:-1]:
            hidden = self.dropout(nn.functional.relu(layer(hidden)))
        logits = self.classifier[-1](hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


VggConfig.register_for_auto_class()
VggForImageClassification.register_for_auto_class("AutoModelForImageClassification")
