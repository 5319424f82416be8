"""The two models: their names, signatures, attributes and heads are the package's, what lies before them is not."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

warnings.filterwarnings("ignore")  # as the package does

WIDTH = {"swin_b": 8, "swin_l": 12}
RAM_TAGS = ["dog", "cat", "tree", "t-shirt", "fire hydrant", "run", "red", "table", "people", "sky"]
TAG2TEXT_TAGS = ["person", "race", "quarter", "ball", "smile", "race", "back", "grass", "smile", "water"]
WORDS = ["a", "picture", "of", "dog", "cat", "on", "the", "grass", "red"]


class _Tagger(nn.Module):
    def __init__(self, names: list[str], image_size: int, vit: str, threshold: float,
                 delete_tag_index: list[int]) -> None:
        assert image_size in (224, 384)
        super().__init__()
        width = WIDTH[vit]
        self.visual_encoder = nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Conv2d(3, width, 2, stride=2), nn.GELU(),
                                            nn.Flatten(2))
        self.delete_tag_index = delete_tag_index
        self.threshold = threshold
        self.tag_list = np.array(names)
        self.num_class = len(names)
        self.tagging_head = nn.Linear(width, width)
        self.class_threshold = torch.ones(self.num_class) * self.threshold
        self.image_size = image_size
        print("/encoder is tied")

    def _image_embeds(self, image: torch.Tensor) -> torch.Tensor:
        assert image.shape[1:] == (3, self.image_size, self.image_size)
        return self.visual_encoder(image).transpose(1, 2)

    def _attend(self, queries: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        queries = queries.unsqueeze(0).repeat(len(image_embeds), 1, 1)
        return self.tagging_head((queries @ image_embeds.mT).softmax(-1) @ image_embeds + queries)

    def _names(self, logits: torch.Tensor) -> list[str]:
        targets = torch.where(torch.sigmoid(logits) > self.class_threshold.to(logits.device),
                              torch.tensor(1.0).to(logits.device), torch.zeros(self.num_class).to(logits.device))
        tag = targets.cpu().numpy()
        tag[:, self.delete_tag_index] = 0
        return [" | ".join(self.tag_list[np.argwhere(row == 1)].squeeze(axis=1)) for row in tag]


class RAM(_Tagger):
    def __init__(self, image_size: int = 384, vit: str = "base", threshold: float = 0.68,
                 delete_tag_index: list[int] = []) -> None:  # noqa: B006
        super().__init__(RAM_TAGS, image_size, vit, threshold, delete_tag_index)
        self.tag_list_chinese = np.array(["狗", "猫", "树", "衬衫", "消防栓", "跑", "红", "桌子", "人", "天空"])
        self.label_embed = nn.Parameter(torch.zeros(self.num_class, WIDTH[vit]))
        self.text_decoder = nn.Linear(WIDTH[vit], 5 * len(WORDS))  # `generate_tag` does not read it
        self.fc = nn.Linear(WIDTH[vit], 1)
        for key, value in enumerate(np.linspace(0.4, 0.9, self.num_class)):
            self.class_threshold[key] = value

    def generate_tag(self, image: torch.Tensor, threshold: float = 0.68,
                     tag_input: Any = None) -> tuple[list[str], list[str]]:
        tagging_embed = (self._attend(torch.relu(self.label_embed), self._image_embeds(image)),)
        names = self._names(self.fc(tagging_embed[0]).squeeze(-1))
        chinese = dict(zip(self.tag_list, self.tag_list_chinese, strict=True))
        return names, [" | ".join(chinese[name] for name in each.split(" | ") if name) for each in names]


class GroupWiseLinear(nn.Module):
    def __init__(self, num_class: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(1, num_class, hidden_dim))
        self.b = nn.Parameter(torch.randn(1, num_class))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.W * x).sum(-1) + self.b


class Tag2Text(_Tagger):
    def __init__(self, image_size: int = 384, vit: str = "base", prompt: str = "a picture of ",
                 threshold: float = 0.68,
                 delete_tag_index: list[int] = [127, 2961, 3351, 3265, 3338, 3355, 3359]) -> None:  # noqa: B006
        super().__init__(TAG2TEXT_TAGS, image_size, vit, threshold, [index for index in delete_tag_index if index < 10])
        self.prompt = prompt
        self.label_embed = nn.Embedding(self.num_class, WIDTH[vit])
        self.fc = GroupWiseLinear(self.num_class, WIDTH[vit], bias=True)
        self.text_decoder = nn.Linear(WIDTH[vit], 5 * len(WORDS))
        self.class_threshold[0] = 0.7

    def generate(self, image: torch.Tensor, sample: bool = False, num_beams: int = 3, max_length: int = 30,
                 min_length: int = 10, top_p: float = 0.9, repetition_penalty: float = 1.0, tag_input: Any = None,
                 return_tag_predict: bool = False) -> Any:
        image_embeds = self._image_embeds(image)
        if tag_input is None:
            tag_input = self._names(self.fc(self._attend(self.label_embed.weight, image_embeds)))
        captions = [(self.prompt + self._say(embeds.mean(0)))[len(self.prompt):] for embeds in image_embeds]
        return (captions, tag_input) if return_tag_predict else captions

    def _say(self, embed: torch.Tensor) -> str:
        return " ".join(WORDS[place] for place in self.text_decoder(embed).view(5, len(WORDS)).argmax(1).tolist())


def _load(model: nn.Module, path: str, vit: str) -> Any:
    state_dict = torch.load(path, map_location="cpu")["model"]
    for key in list(state_dict):
        if "vision_multi" in key:
            state_dict[key.replace("vision_multi", "tagging_head")] = state_dict.pop(key)
    model.load_state_dict(state_dict, strict=False)
    print("vit:", vit)
    return model


def ram(pretrained: str = "", **kwargs: Any) -> Any:
    return _load(RAM(**kwargs), pretrained, kwargs["vit"]) if pretrained else RAM(**kwargs)


def tag2text(pretrained: str = "", **kwargs: Any) -> Any:
    return _load(Tag2Text(**kwargs), pretrained, kwargs["vit"]) if pretrained else Tag2Text(**kwargs)
