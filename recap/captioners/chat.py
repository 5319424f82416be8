"""How a vision-language model is asked about an image, and which tokens are the caption: by its chat template."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from recap.captioners.text import Caption, Text, specials
from recap.errors import UserError
from recap.sample import visible

PROMPT, REPLY = "Zq prompt", "Zq reply"
"""Stand for the texts of both turns where a template is looked into: words that none has, or changes."""


class Chat:
    """Prompts, as a processor's chat template renders them; or, without one, with its own image placeholder.

    Raises:
        UserError: a prompt with an image, put together like this, is nothing that the processor takes.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.has_template = bool(getattr(processor, "chat_template", None))
        token = getattr(processor, "image_token", None) or ""
        # Without a template, some processors are given a placeholder for the image, and others add it by themselves.
        ways = [""] if self.has_template else [token, ""]
        found = next((way for way in ways if self._takes(way)), None)
        if found is None:
            raise UserError(f"captioner.model: its {type(processor).__name__} takes no prompt with an image, or its "
                            "chat template has no place for one: take another model")
        self.placeholder: str = found

    def ask(self, prompt: str) -> str:
        """A user's turn with the image and a prompt, up to where the assistant's reply begins."""
        if not self.has_template:
            return self.placeholder + prompt
        return str(self.processor.apply_chat_template([_user(prompt)], add_generation_prompt=True))

    def answered(self, prompt: str, reply: str) -> str:
        """The same with the reply, and whatever ends it. Some templates take an assistant's text as a plain string."""
        for content in ([{"type": "text", "text": reply}], reply):
            turns = [_user(prompt), {"role": "assistant", "content": content}]
            try:
                text = str(self.processor.apply_chat_template(turns))
            except (TypeError, TemplateError):
                continue
            if reply in text and f"'{reply}'" not in text:  # in quotes: the list was printed as it is
                return text
        raise UserError("captioner.model: its chat template does not render an assistant's turn: take another model")

    def _takes(self, placeholder: str) -> bool:
        self.placeholder = placeholder
        try:
            self.processor(text=[self.ask(PROMPT)], images=[[Image.new("RGB", (64, 64))]], return_tensors="pt")
        except (ValueError, TypeError, LookupError, StopIteration, TemplateError):  # too many placeholders, or too few
            return False
        return True


def _user(prompt: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}


@dataclass(frozen=True)
class Reply(Text):
    """The tokens of an assistant's turn, or of a decoder's output."""

    header: str = ""
    """What the template puts between prompt and caption. A caption's first token can depend on what is before it."""
    close: str = ""
    """What the template puts between caption and end: nothing, mostly."""
    ends: tuple[int, ...] = ()
    """All that the model stops at: the end of a turn, and its own EOS."""
    positions: int | None = None
    """Of a decoder that counts them, start and end not included."""

    def caption_ids(self, caption: str) -> list[int]:
        """A caption with its end, as the rendered conversation has it; without the texts of special tokens: an image
        placeholder, say, would ask for another image.
        """
        head, caption = self._ids(self.header), self.special.sub(" ", caption)
        ids = self._ids(self.header + self.space + caption + self.close)
        if ids[:len(head)] != head:  # a token that spans both can't follow a prompt that has been read
            head, ids = [], self._ids(self.space + caption + self.close)
        return [*ids[len(head):], self.end]

    def room(self, prompt: str) -> int | None:
        """Of a decoder with a table of positions; a prompt is the encoder's. None where they are computed."""
        return self.positions

    def read(self, ids: list[int]) -> Caption:
        """New tokens → caption: up to the first of the ends, without special tokens, one line."""
        place = next((place for place, token in enumerate(ids) if token in self.ends), None)
        return Caption(visible(self.tokenizer.decode(ids[:place], skip_special_tokens=True)), place is not None)

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found


def turn(chat: Chat, eos: list[int], pad: int) -> Reply:
    """The assistant's turn of a template; what comes after a prompt where there is none.

    Args:
        chat: of the model.
        eos: what the model's generation stops at. Ends a caption where the template doesn't say (LLaVA's).
        pad: token id.
    """
    tokenizer = chat.processor.tokenizer
    own = tokenizer.eos_token_id if tokenizer.eos_token_id in eos or not eos else eos[0]
    if own is None:
        raise UserError("captioner.model: neither its generation config nor its tokenizer has an EOS: take another")
    if not chat.has_template:
        return Reply(tokenizer, (), own, pad, space="", ends=tuple({own, *eos}))
    asked, answered = chat.ask(PROMPT), chat.answered(PROMPT, REPLY)
    before, _, after = answered.rpartition(REPLY)
    # A generation prompt may say more than the turn of a finished reply does: the thoughts of a model that thinks.
    space = before.removeprefix(asked) if before.startswith(asked) else ""
    known = [*specials(tokenizer), *(token for token in tokenizer.convert_ids_to_tokens(eos) if token)]
    ends = {token: after.find(token) for token in known if token in after}
    first = min(ends, key=lambda token: ends[token], default=None)
    end = own if first is None else tokenizer.convert_tokens_to_ids(first)
    return Reply(tokenizer, (), end, pad, space=space, header=asked.rpartition(PROMPT)[2],
                 close="" if first is None else after[:ends[first]], ends=tuple({end, own, *eos}))


def decoder_output(tokenizer: Any, start: int, eos: list[int], pad: int, positions: int | None) -> Reply:
    """A caption as the decoder of an encoder–decoder model gives it.

    Args:
        tokenizer: what it puts before a text (BART's BOS) is given to the decoder, and is not learned.
        start: the decoder's first token.
        eos: what the model's generation stops at.
        pad: token id.
        positions: that the decoder has; None where they are computed.
    """
    ids, bare = tokenizer(REPLY)["input_ids"], tokenizer(REPLY, add_special_tokens=False)["input_ids"]
    place = next(place for place in range(len(ids)) if ids[place:place + len(bare)] == bare)
    end = [*ids[place + len(bare):], *eos, tokenizer.eos_token_id][0]
    begin = (start, *(token for token in ids[:place] if token != start))
    return Reply(tokenizer, begin, end, pad, space="", ends=tuple({end, *eos}),
                 positions=None if positions is None else positions - len(begin) - 1)
