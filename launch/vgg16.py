"""A dense VGG16 and its images, for configs/recipes/vgg16-cifar10.yaml.

    python launch/vgg16.py --data cifar10 --output vgg16            # with a hub at hand
    python launch/vgg16.py --data digits --width 0.25 --output vgg16   # offline: scikit-learn's digits at 32 x 32
    tinygn compress --recipe configs/recipes/vgg16-cifar10.yaml

Writes OUTPUT/dense (a checkpoint with its code) and OUTPUT/{train,test}.parquet. With torchvision installed,
--pretrained starts the convolutions from its ImageNet weights (vgg16_bn). Needs pip install 'tinygn-dist[vision]'.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F

from tinygn_dist.models.vgg import VGG16, VggConfig, VggForImageClassification

SIDE, CLASSES = 32, 10
MEAN = STD = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--output", type=Path, default=Path("vgg16"))
    parser.add_argument("--width", type=float, default=1.0, help="filters relative to VGG16's 64 to 512")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.02, help="peak of a one-cycle schedule of SGD")
    parser.add_argument("--pretrained", action="store_true", help="start from torchvision's vgg16_bn")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    asked.output.mkdir(parents=True, exist_ok=True)
    splits = digits(asked.seed) if asked.data == "digits" else cifar10()
    for name, split in splits.items():
        split.to_parquet(str(asked.output / f"{name}.parquet"))
    filters = tuple(n and max(8, round(n * asked.width)) for n in VGG16)
    config = VggConfig(filters=filters, hidden=(max(8, round(512 * asked.width)),), num_labels=CLASSES)
    model = VggForImageClassification(config)
    if asked.pretrained:
        start_from_torchvision(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(model.to(device), *tensors(splits["train"], device), asked)
    images, labels = tensors(splits["test"], device)
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).logits.argmax(1) == y).sum())
            for x, y in zip(images.split(256), labels.split(256), strict=True)
        )
    print(f"test accuracy {right / len(labels):.4f} on {len(labels)} images")
    model.cpu().save_pretrained(asked.output / "dense")
    facts = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    facts |= {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, "do_resize": True, "do_normalize": True}
    (asked.output / "dense" / "preprocessor_config.json").write_text(json.dumps(facts))


def cifar10() -> dict[str, datasets.Dataset]:
    """50,000 and 10,000 images from the hub."""
    found = datasets.load_dataset("uoft-cs/cifar10").rename_column("img", "image")
    return {"train": found["train"], "test": found["test"]}


def digits(seed: int) -> dict[str, datasets.Dataset]:
    """1,797 handwritten digits of 8 x 8 (UCI), enlarged to 32 x 32; every fifth one is for testing."""
    from PIL import Image
    from sklearn.datasets import load_digits  # these two only for the offline stand-in

    found = load_digits()
    small = [Image.fromarray((image * 255 / 16).astype("uint8")) for image in found.images]
    images = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB") for image in small]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = {"test": [i for n, i in enumerate(order) if n % 5 == 0], "train": [i for n, i in enumerate(order) if n % 5]}
    return {
        name: datasets.Dataset.from_dict(
            {"image": [images[i] for i in part], "label": [int(found.target[i]) for i in part]}, features=features
        )
        for name, part in parts.items()
    }


def tensors(split: datasets.Dataset, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, 3, 32, 32) normalised as the image processor does, and (images,) labels."""
    import numpy

    pixels = torch.stack([torch.from_numpy(numpy.array(image.convert("RGB"))) for image in split["image"]])
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN).div(STD).to(device), torch.tensor(split["label"]).to(
        device
    )


def start_from_torchvision(model: VggForImageClassification) -> None:
    """Convolutions and norms of ImageNet's vgg16_bn, whose layers come in the same order."""
    from torchvision.models import VGG16_BN_Weights, vgg16_bn

    given = list(vgg16_bn(weights=VGG16_BN_Weights.DEFAULT).features)
    for ours, kind in ((model.convolutions, torch.nn.Conv2d), (model.norms, torch.nn.BatchNorm2d)):
        for own, other in zip(ours, [m for m in given if isinstance(m, kind)], strict=True):
            own.load_state_dict(other.state_dict())


def train(
    model: VggForImageClassification, images: torch.Tensor, labels: torch.Tensor, asked: argparse.Namespace
) -> None:
    """SGD with Nesterov momentum over one cycle; images are shifted by up to two pixels."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=asked.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = asked.epochs * -(-len(images) // asked.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, asked.learning_rate, total_steps=steps)
    for epoch in range(asked.epochs):
        model.train()
        total, start = 0.0, time.monotonic()
        for batch in torch.randperm(len(images), device=images.device).split(asked.batch_size):
            down, right = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images[batch].roll((down, right), (2, 3))).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss) * len(batch)
        print(f"epoch {epoch + 1}: loss {total / len(images):.4f}, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
