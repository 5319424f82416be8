"""What stands in for the package `ram` in tests: its interface, on models so small that they open at once."""

from typing import Any

from torchvision.transforms import Compose, Lambda, Normalize, Resize, ToTensor


def get_transform(image_size: int = 384) -> Any:
    return Compose([Lambda(lambda image: image.convert("RGB")), Resize((image_size, image_size)), ToTensor(),
                    Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])])
