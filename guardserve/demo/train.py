"""Train the demo's model and write the packaged weights: ``python -m guardserve.demo.train``.

Training is deterministic: the same torch on the same kind of processor writes the same file again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from guardserve.demo.digits import Digits, DigitSet, load_digits
from guardserve.demo.model import WEIGHTS, DigitsCNN

SEED = 0
_BATCH_SIZE = 64

logger = logging.getLogger(__name__)


def fit(digits: DigitSet, augmented_epochs: int = 30, clean_epochs: int = 10) -> DigitsCNN:
    """Train a model from scratch on one set of digits.

    The last epochs see the images as they are, so that the running statistics describe clean data.

    Returns:
        The model, in eval mode. Torch's random state is as it was before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DigitsCNN()
        batches = math.ceil(len(digits.labels) / _BATCH_SIZE)
        optimizer = torch.optim.AdamW(model.parameters())
        steps = (augmented_epochs + clean_epochs) * batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(augmented_epochs + clean_epochs):
            for chosen in torch.randperm(len(digits.labels)).chunk(batches):
                images = digits.images[chosen]
                if epoch < augmented_epochs:
                    images = _augment(images)
                loss = nn.functional.cross_entropy(model(images), digits.labels[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            logger.info("epoch %d: loss %.4f", epoch + 1, loss.item())
    return model.eval()


def _augment(images: torch.Tensor) -> torch.Tensor:
    """Turn each image by up to 10 degrees and move it by up to half a pixel."""
    count = len(images)
    angle = math.radians(10) * (2 * torch.rand(count) - 1)
    move = (2 * torch.rand(count, 2) - 1) / 8  # the grid spans [-1, 1] over 8 pixels
    cosine, sine = angle.cos(), angle.sin()
    rows = (torch.stack([cosine, -sine, move[:, 0]], dim=1), torch.stack([sine, cosine, move[:, 1]], dim=1))
    grid = nn.functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


@torch.inference_mode()
def accuracy(model: nn.Module, digits: DigitSet) -> float:
    """Return the share of the digits that the model, in the mode it is in, recognises as one batch."""
    hits = int((model(digits.images).argmax(dim=1) == digits.labels).sum())
    return hits / len(digits.labels)


def describe(model: DigitsCNN, digits: Digits) -> dict[str, str | int | float]:
    """Return what the weights file says of itself: measured accuracies, seed and versions."""
    return {
        "accuracy_reference": round(accuracy(model, digits.reference), 4),
        "accuracy_live": round(accuracy(model, digits.live), 4),
        "seed": SEED,
        "scikit-learn": importlib.metadata.version("scikit-learn"),
        "torch": str(torch.__version__),
    }


def main() -> None:
    """Train on the train part and write the weights."""
    parser = argparse.ArgumentParser(prog="python -m guardserve.demo.train", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name(WEIGHTS), help="file to write")
    output: Path = parser.parse_args().output
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # the order in which threads add up would change the last bits
    torch.use_deterministic_algorithms(True)
    digits = load_digits()
    model = fit(digits.train)
    training = json.dumps(describe(model, digits))
    # one entry: safetensors writes several in random order, and the file's bytes would differ from run to run
    output.write_bytes(safetensors.torch.save(model.state_dict(), {"training": training}))
    logger.info("%s: %s", output, training)


if __name__ == "__main__":
    main()
