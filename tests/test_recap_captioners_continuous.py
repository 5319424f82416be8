"""Continuous decoding gives the captions that transformers' `generate` gives, whatever shares the slots."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import OPTConfig, OPTForCausalLM

from recap.captioners import continuous
from recap.captioners.blip2 import Blip2
from recap.captioners.continuous import Begun, Slots, decode, read_prompts
from recap.config import Style
from recap.config.captioner import Captioner

END, NUM_IMAGES, NUM_QUERIES = 3, 12, 4
PROMPTS = [[2, 7, 13, 5, 9], [2, 11, 7], [2]]


@pytest.fixture(scope="module")
def model() -> Any:
    """An OPT whose captions differ, and end by themselves at various lengths."""
    torch.manual_seed(2)
    config = OPTConfig(hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
                       vocab_size=16, max_position_embeddings=64, init_std=0.8)
    model = OPTForCausalLM(config).eval()
    model.generation_config.eos_token_id = END
    return model


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(NUM_IMAGES, NUM_QUERIES, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def generated(model: Any, features: torch.Tensor, prompt: list[int], max_new_tokens: int) -> list[list[int]]:
    """What transformers says, with the end where there is one, and nothing after."""
    embeds = model.get_input_embeddings()(torch.tensor([prompt])).expand(len(features), -1, -1)
    both = torch.cat([features, embeds], dim=1)
    rows = model.generate(inputs_embeds=both, attention_mask=torch.ones(both.shape[:2], dtype=torch.long),
                          eos_token_id=END, pad_token_id=1, max_new_tokens=max_new_tokens, do_sample=False).tolist()
    return [row[:row.index(END) + 1] if END in row else row for row in rows]


class AsRecorded(Slots):
    """Computes what a step that a GPU has recorded computes: all slots, and positions up to a bucket's end."""

    def step(self, num_rows: int, num_positions: int) -> list[int]:
        self._compute(self.num_slots, self.bucket(num_positions))
        return self.tokens[:num_rows].tolist()


@torch.no_grad()
def decoded(model: Any, features: torch.Tensor, max_new_tokens: list[int], batch: int, num_slots: int,
            asked: list[int], kind: type[Slots] = Slots) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Captions as they come; `asked` is told of the images that were asked for."""
    def begun() -> Iterator[Begun[tuple[int, int]]]:
        for start in range(0, len(features), batch):
            some = features[start:start + batch]
            asked.extend(range(start, start + len(some)))
            for style, (cache, first) in enumerate(read_prompts(model, some, PROMPTS)):
                names = [(start + row, style) for row in range(len(some))]
                yield Begun(names, cache, first, max_new_tokens[style])
    captions = begun()
    first = next(captions)
    length = NUM_QUERIES + max(map(len, PROMPTS)) + max(max_new_tokens)
    yield from decode(kind(model, num_slots, length, first.cache), chain([first], captions), END)


def test_the_model_ends_some_captions_at_once_some_later_and_some_never(model: Any, features: torch.Tensor) -> None:
    lengths = {len(row) for prompt in PROMPTS for row in generated(model, features, prompt, 20)}
    assert {1, 20} <= lengths and len(lengths) > 4


@pytest.mark.parametrize("kind", [Slots, AsRecorded])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, NUM_IMAGES), num_slots=st.integers(1, 40), bucket=st.sampled_from([1, 5, 64]),
       max_new_tokens=st.lists(st.integers(1, 20), min_size=3, max_size=3))
def test_every_caption_is_that_of_generate(model: Any, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch,
                                           kind: type[Slots], batch: int, num_slots: int, bucket: int,
                                           max_new_tokens: list[int]) -> None:
    monkeypatch.setattr(continuous, "BUCKET", bucket)
    found = dict(decoded(model, features, max_new_tokens, batch, num_slots, [], kind))
    assert found == {(image, style): row for style, prompt in enumerate(PROMPTS)
                     for image, row in enumerate(generated(model, features, prompt, max_new_tokens[style]))}


def test_images_are_asked_for_when_there_is_room_for_their_captions(model: Any, features: torch.Tensor) -> None:
    asked: list[int] = []
    for done, _ in enumerate(decoded(model, features, [20, 20, 20], 2, 6, asked)):
        assert len(asked) <= (done + 6 + 5) / 3 + 2  # those that are done or in slots, and at most two ended batches
    assert asked == list(range(NUM_IMAGES))


@pytest.mark.parametrize("num_slots", [2, 64])
def test_blip2_says_the_same_in_all_styles_at_once_as_in_one_by_one(world_models: Path, num_slots: int) -> None:
    captioner = Blip2.open(Captioner(model=str(world_models / "blip2"), dtype="float32"), "cpu", None)
    torch.manual_seed(3)
    for name, weight in captioner.model.named_parameters():  # else it says the same of every image
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3 if "language_model" in name else 0.1)
    styles = {"short": Style(prompt="A short caption:", max_new_tokens=5),
              "beams": Style(prompt="In detail:", max_new_tokens=6, num_beams=2),
              "long": Style(prompt="In detail:", max_new_tokens=12),
              "new": Style(prompt="In detail:", max_new_tokens=8, no_repeat_ngram_size=2)}
    size = captioner.base.config.vision_config.image_size
    batches = [torch.randn(rows, 3, size, size) for rows in (3, 1, 4)]
    expected = [dict(zip(styles, captions, strict=True))
                for pixels in batches
                for captions in zip(*(captioner.caption(captioner.encode(pixels), style)
                                      for style in styles.values()), strict=True)]
    found = dict(captioner.captions(batches, styles, num_slots))
    assert [found[place] for place in range(8)] == expected
    assert len({caption.text for caption in (each["long"] for each in expected)}) > 4


def test_a_step_stays_on_its_device_and_never_asks_for_a_value() -> None:
    """Else a GPU could not record it: a fake tensor has a device, and no value to give."""
    config = OPTConfig(hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
                       vocab_size=16, max_position_embeddings=64)
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model = OPTForCausalLM(config).eval()
        slots = Slots(model, 8, 40, torch.zeros(2, 2, 3, 2, 10, 16, device="cuda"))
        slots._compute(8, 32)
        assert slots.tokens.device.type == slots.lengths.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):  # as is `step`, which reads the tokens afterwards
            slots.tokens.tolist()
