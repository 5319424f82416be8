"""How likely a vision-language model finds each of some answers to a question about a picture.

    the answers' tokens → rows to read (answers that begin alike share one) → next-token probabilities → here

Nothing is generated: an answer's tokens are given to the model, and every one's log-probability is read, from the
softmax over the whole vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PretrainedConfig,
)
from transformers.utils import logging

from eval.config import Vqa
from recap.captioners.blip2 import Blip2
from recap.captioners.once import legible
from recap.captioners.text import pad
from recap.captioners.vlm import Seen, Vlm
from recap.config.captioner import Captioner
from recap.errors import UserError
from recap.pretrained import load_model, load_pretrained
from recap.progress import warn

WHERE = "evaluate.vqa"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a picture, and the answers to weigh."""

    image: int
    """Place of the picture in its batch."""
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """What a model reads at once."""

    image: int
    question: str
    begun: list[int]
    """Tokens of an answer that it is given."""
    answers: list[list[int]]
    """Tokens of the answers whose probabilities it tells: each is a beginning of `begun` and one token more."""


class Answerer(ABC):
    """A model that answers questions about pictures."""

    yes_no: tuple[str, str] = ("Yes", "No")
    """How it spells them."""

    @torch.no_grad()
    def log_probs(self, images: list[Image.Image], asked: list[Asked]) -> list[list[list[float]]]:
        """Of every question every answer's tokens' log-probabilities, the end of the answer not included."""
        rows, owners = [], []
        for number, each in enumerate(asked):
            tokens = [self.tokens(each.question, answer) for answer in each.answers]
            if [] in tokens:
                raise UserError(f"{WHERE}: no tokens are left of the answer {each.answers[tokens.index([])]!r} to "
                                f"{each.question[:80]!r}: give another")
            for begun, places in share(tokens).items():
                rows.append(Row(each.image, each.question, list(begun), [tokens[place] for place in places]))
                owners.append((number, places))
        found: list[list[list[float]]] = [[[] for _ in each.answers] for each in asked]
        for (number, places), values in zip(owners, self.read(images, rows), strict=True):
            for place, value in zip(places, values, strict=True):
                found[number][place] = value
        return found

    @abstractmethod
    def tokens(self, question: str, answer: str) -> list[int]:
        """Of an answer, as it follows its question."""

    @abstractmethod
    def read(self, images: list[Image.Image], rows: list[Row]) -> Iterator[list[list[float]]]:
        """For every row, in order, the log-probabilities of its answers' tokens."""


def share(answers: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Beginnings to give to a model → the answers (their places) that can be read from each.

    Answers of one token share an empty beginning, so that yes and no take one reading.
    """
    shared: dict[tuple[int, ...], list[int]] = {}
    for place in sorted(range(len(answers)), key=lambda place: -len(answers[place])):
        begun = tuple(answers[place][:-1])
        longer = next((other for other in shared if other[:len(begun)] == begun), begun)
        shared.setdefault(longer, []).append(place)
    return shared


def _told(logits: torch.Tensor, answers: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of answers' tokens.

    Args:
        logits: (N, V): after a question, and after each token of the answer that was begun.
        answers: of at most N tokens each.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    return [log_probs[list(range(len(tokens))), tokens].tolist() for tokens in answers]


def _check_room(num_tokens: int, positions: int | None, question: str, model: str) -> None:
    if positions is not None and num_tokens > positions:
        raise UserError(f"{WHERE}: {num_tokens} tokens of {question[:80]!r}, but {model} has positions for "
                        f"{positions}: shorten the prompt, or take another model")


# --- BLIP-2 and InstructBLIP ---------------------------------------------------------------------------------------


class BlipAnswerer(Answerer):
    """BLIP-2 (arXiv 2301.12597) on a decoder (OPT), or an encoder and a decoder (Flan-T5).

    As in our captioner, image features are put before the text by hand: with a wrong number of placeholders,
    transformers would ignore the picture without an error.
    """

    def __init__(self, model: Any, processor: Any, table: Vqa, device: str) -> None:
        self.captioner = Blip2(model, processor, table.model, device)
        self.base: Any = self.captioner.base
        self.text = self.captioner.text
        self.batch_size = table.batch_size
        self.fill = self.text.pad or 0  # Vicuna's configuration names no padding, and nothing attends to it

    def tokens(self, question: str, answer: str) -> list[int]:
        if self.captioner.is_seq2seq:
            return self._ids(answer)
        # A decoder's tokenizer may take the space for a part of the word, or put one there by itself.
        head, whole = self._ids(question), self._ids(f"{question} {answer}")
        return whole[len(head):] if whole[:len(head)] == head else self._ids(f" {answer}")

    def read(self, images: list[Image.Image], rows: list[Row]) -> Iterator[list[list[float]]]:
        seen = self._look(self.captioner.preprocess([legible(image) for image in images]))
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start:start + self.batch_size]
            features = self._features(seen[[row.image for row in batch]], batch)
            logits = self._seq2seq(features, batch) if self.captioner.is_seq2seq else self._decoder(features, batch)
            yield from (_told(each, row.answers) for each, row in zip(logits, batch, strict=True))

    def _look(self, pixels: torch.Tensor) -> torch.Tensor:
        """What is seen of each image, whatever is asked."""
        return self.captioner.encode(pixels)

    def _features(self, seen: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """(B, num_query_tokens, D): what the language model reads of the image of each row."""
        return seen

    def _decoder(self, features: torch.Tensor, rows: list[Row]) -> Iterator[torch.Tensor]:
        prompts = [self._prompt(row) for row in rows]
        batch = pad([(prompt, row.begun) for prompt, row in zip(prompts, rows, strict=True)], self.fill,
                    features.device)
        keep = batch.ids.shape[1] - min(map(len, prompts)) + 1  # a vocabulary's logits of every position would not fit
        logits = self.base.language_model(**self._after(features, batch.ids, batch.mask), logits_to_keep=keep).logits
        for prompt, row, each in zip(prompts, rows, logits, strict=True):
            start = len(prompt) - 1 - (batch.ids.shape[1] - keep)
            yield each[start:start + len(row.begun) + 1]

    def _seq2seq(self, features: torch.Tensor, rows: list[Row]) -> Iterator[torch.Tensor]:
        asked = pad([(self._prompt(row), []) for row in rows], self.fill, features.device)
        start = self.base.language_model.config.decoder_start_token_id
        begun = pad([([start, *row.begun], []) for row in rows], self.fill, features.device)
        yield from self.base.language_model(**self._after(features, asked.ids, asked.mask),
                                            decoder_input_ids=begun.ids).logits

    def _after(self, features: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Image features, all of which are attended to, and then a text."""
        embeds = self.base.get_input_embeddings()(ids).to(features.dtype)
        return {"inputs_embeds": torch.cat([features, embeds], dim=1),
                "attention_mask": torch.cat([mask.new_ones(features.shape[:2]), mask], dim=1)}

    def _prompt(self, row: Row) -> list[int]:
        ids = self.text.prompt_ids(self._plain(row.question))
        _check_room(len(ids) + len(row.begun), self.text.max_length, row.question, self.captioner.name)
        return ids

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.text.tokenizer(self._plain(text), add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _plain(self, text: str) -> str:
        """Without the texts of special tokens, which a prompt of somebody else's may hold."""
        return self.text.special.sub(" ", text)


class InstructBlipAnswerer(BlipAnswerer):
    """InstructBLIP (Dai et al. 2023, arXiv 2305.06500): a BLIP-2 whose Q-Former reads the question, too."""

    yes_no = ("yes", "no")

    def _look(self, pixels: torch.Tensor) -> torch.Tensor:
        """(I, P, D) of the vision model, which is run once however much is asked."""
        vision = self.base.vision_model
        features: torch.Tensor = vision(pixels.to(self.captioner.device, vision.dtype)).last_hidden_state
        return features

    def _features(self, seen: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        queries = self.base.query_tokens.expand(len(rows), -1, -1)
        read = self._qformer_text(rows).to(seen.device)
        mask = read["attention_mask"]
        out = self.base.qformer(
            input_ids=read["input_ids"], query_embeds=queries, encoder_hidden_states=seen,
            attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
            encoder_attention_mask=mask.new_ones(seen.shape[:2])).last_hidden_state[:, :queries.shape[1]]
        features: torch.Tensor = self.base.language_projection(out)
        return features.to(self.base.language_model.dtype)

    def _qformer_text(self, rows: list[Row]) -> Any:
        """The questions in the Q-Former's own tokens; one that it has no positions for is cut, and warned of."""
        positions = self.base.config.qformer_config.max_position_embeddings
        read = self.captioner.processor.qformer_tokenizer(
            [self._plain(row.question) for row in rows], padding=True, padding_side="right", truncation=True,
            max_length=positions, return_token_type_ids=False, return_tensors="pt")
        if read["input_ids"].shape[1] == positions:
            warn(f"{WHERE}: the Q-Former of {self.captioner.name} reads {positions} tokens of a longer question, "
                 "its language model the whole")
        return read


# --- any with a chat template --------------------------------------------------------------------------------------


class Conversation(Vlm):
    """A vision-language model, and what it would say next."""

    def next_tokens(self, seen: Seen, question: str, begun: list[int]) -> torch.Tensor:
        """Logits, (len(begun) + 1, V): after a question about one image, and after each token of the answer begun."""
        asked = self._ask(seen, [question])
        positions = getattr(self.base.config.get_text_config(decoder=True), "max_position_embeddings", None)
        _check_room(asked["input_ids"].shape[1] + len(begun), positions, question, self.name)
        if self.is_seq2seq:
            rows = asked | {"decoder_input_ids": torch.tensor([[*self.text.start, *begun]], device=self.device)}
        else:
            rows = self._with(asked, begun)
        keep = len(begun) + 1
        limits = {"logits_to_keep": keep} if "logits_to_keep" in signature(self.base.forward).parameters else {}
        with self.vision.seen(seen.inputs, seen.features):
            logits: torch.Tensor = self.base(**rows, **seen.inputs, **limits, use_cache=False).logits
        return logits[0, -keep:]

    def _with(self, asked: dict[str, torch.Tensor], begun: list[int]) -> dict[str, torch.Tensor]:
        """The same, going on with an answer in all that has a value for every token."""
        shape = asked["input_ids"].shape
        more = {"input_ids": begun, "attention_mask": [1] * len(begun),
                "token_type_ids": [self._suffix_type] * len(begun)}

        def longer(name: str, value: torch.Tensor) -> torch.Tensor:
            if value.shape[:2] != shape:
                return value
            if value.ndim > 2:  # which images a position sees: an answer, what the question's last one does
                added = value[:, -1:].expand(-1, len(begun), *value.shape[2:])
            else:
                added = torch.tensor([more.get(name, [0] * len(begun))], dtype=value.dtype, device=value.device)
            return torch.cat([value, added], dim=1)

        return {name: longer(name, value) for name, value in asked.items()}


class ChatAnswerer(Answerer):
    """Any model with a chat template. Questions are read one by one: nothing is padded, so no neighbour matters."""

    def __init__(self, model: Any, processor: Any, table: Vqa, device: str) -> None:
        try:
            self.conversation = Conversation(model, processor, table.model, device)
        except UserError as error:  # it speaks of the table that captioners are opened by
            raise UserError(str(error).replace("captioner.", f"{WHERE}.", 1)) from None
        self.text = replace(self.conversation.text, close="")

    def tokens(self, question: str, answer: str) -> list[int]:
        return self.text.caption_ids(answer)[:-1]  # without the end

    def read(self, images: list[Image.Image], rows: list[Row]) -> Iterator[list[list[float]]]:
        for image, group in groupby(rows, key=lambda row: row.image):
            seen = self.conversation.encode(self.conversation.preprocess([images[image]]))
            for row in group:
                question = self.text.special.sub(" ", row.question)  # a placeholder would ask for another image
                yield _told(self.conversation.next_tokens(seen, question, row.begun), row.answers)


# --- opening -------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[Any, Any, type[BlipAnswerer | ChatAnswerer]]] = {
    "blip-2": (Blip2ForConditionalGeneration, Blip2Processor, BlipAnswerer),
    "instructblip": (InstructBlipForConditionalGeneration, InstructBlipProcessor, InstructBlipAnswerer),
}
"""model_type → classes of model, processor and ours; all others are asked by their chat templates."""


def open_answerer(table: Vqa, device: str) -> Answerer:
    """Open a checkpoint by its model_type. No code that it brings along is run.

    Raises:
        UserError: it is not there, is not whole, or is no model that answers questions about pictures.
    """
    logging.disable_progress_bar()
    found, _ = load_pretrained(PretrainedConfig.get_config_dict, table, WHERE, weights=False)
    kind, processors, answerer = FAMILIES.get(
        str(found.get("model_type")), (AutoModelForImageTextToText, AutoProcessor, ChatAnswerer))
    ref = Captioner(model=table.model, revision=table.revision, dtype=table.dtype, quantization=table.quantization)
    model = load_model(kind, ref, device, WHERE)
    try:
        processor = load_pretrained(processors.from_pretrained, table, WHERE, trust_remote_code=False)
    except ImportError as error:  # SmolVLM2's needs num2words
        raise UserError(f"{WHERE}.model: the processor of {table.model} needs a package: "
                        f"{' '.join(str(error).split())[:200]}") from None
    return answerer(model.eval(), processor, table, device)
