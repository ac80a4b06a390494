"""In place of the reference's package of this name: the same function, one small network under every name."""

import torch


def get_model(name, *, dropout, fp16, num_features):
    assert name and dropout == 0.0 and not fp16
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=8),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 14 * 14, num_features),
    )
