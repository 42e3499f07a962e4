"""A small classifier of handwritten digits, trained in seconds on the images of scikit-learn."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install '.[examples]'")


def images_and_labels() -> tuple[Tensor, Tensor]:
    """Return 1,797 images of 1 × 8 × 8 numbers, 0 to 1, and their digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target)


def new_classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def train(images: Tensor, labels: Tensor, epochs: int = 10) -> nn.Module:
    model = new_classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).chunk(len(images) // 64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model


def classify(model: nn.Module, images: list[Tensor]) -> list[int]:
    """Return the digit in each image."""
    with torch.inference_mode():
        digits: list[int] = model(torch.stack(images)).argmax(dim=1).tolist()
    return digits
