"""FGCNN (Liu et al., WWW 2019): new features that a convolution over the fields generates."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import MLP
from ctrdist.errors import UserError


@dataclass(frozen=True)
class Config:
    """FGCNN.

    Args:
        channels: kernels of each convolution; as many convolutions.
        kernel: fields that a kernel sees.
        pooling: fields that a maximum is taken over; each convolution's output is so many times shorter.
        new: features that are generated for each field of a pooled output.
        separate: generate from embeddings of their own, as the paper does: half of each field's columns (so `dim`
            should be the double). Otherwise all columns serve both.
        hidden: hidden units of the deep classifier.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    channels: tuple[int, ...] = (14, 16)
    kernel: int = 7
    pooling: int = 2
    new: int = 3
    separate: bool = False
    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class Generation(nn.Module):
    """One convolution C = tanh(W * x), pooling S = max C, recombination R = tanh(W S + b).

    [B, channels in, fields, k] -> S [B, channels, ceil(fields / pooling), k] and R [B, new features, d]. The fields are
    padded with zeros on both sides.
    """

    def __init__(self, inputs: int, channels: int, fields: int, widths: tuple[int, int], config: Config) -> None:
        super().__init__()
        self.height = -(-fields // config.pooling)
        self.out = (config.new * self.height, widths[1])
        self.convolution = nn.Conv2d(inputs, channels, (config.kernel, 1), padding="same")
        self.pool = nn.MaxPool2d((config.pooling, 1), ceil_mode=True)
        self.recombination = nn.Linear(channels * self.height * widths[0], self.out[0] * self.out[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(torch.tanh(self.convolution(x)))
        return pooled, torch.tanh(self.recombination(pooled.flatten(1))).unflatten(1, self.out)


class FGCNN(Backbone):
    """FGCNN: representation = MLP(fields and new features, the inner products of every two of them).

    The paper has two embedding tables a field, one to generate from and one to classify with, so that their gradients
    do not disturb each other. Here a field has one embedding for both, or one that is split in two (`separate`).
    """

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        fields = height = shape.fields + shape.history_fields
        self.split = shape.dim // 2 if config.separate else None
        if self.split == 0:
            raise UserError(f"fgcnn.separate: a width of {shape.dim} leaves no column to one of the halves")
        widths = (self.split or shape.dim, shape.dim - (self.split or 0))
        self.layers = nn.ModuleList()
        for before, channels in zip((1, *config.channels), config.channels, strict=False):
            self.layers.append(Generation(before, channels, height, widths, config))
            height, fields = self.layers[-1].height, fields + self.layers[-1].out[0]
        first, second = torch.triu_indices(fields, fields, 1)
        self.register_buffer("pairs", first * fields + second, persistent=False)
        width = fields * widths[1] + len(self.pairs)
        self.mlp = MLP(width, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.make_head(self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fields = all_fields(inputs)
        features = [fields if self.split is None else fields[:, :, self.split :]]
        x = fields[:, :, : self.split].unsqueeze(1)
        for layer in self.layers:
            x, new = layer(x)
            features.append(new)
        features = torch.cat(features, 1)
        products = (features @ features.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        x = torch.cat([features.flatten(1), products], 1)
        return self.mlp(x), x.new_zeros(x.shape[0]), {}


Network = FGCNN
