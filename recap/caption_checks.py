"""Checks of captions that a captioner wrote: of the text alone, and against the image by CLIP and a detector.

A check finds a fault and has a name; what then happens to the caption is the user's choice (`[relabel.checks]`).
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from PIL import Image

from recap.caption_text import (
    MAX_READ,
    is_chatter,
    is_refusal,
    is_wordless,
    length_faults,
    normal,
    repeats,
    unquoted,
    words_of,
)
from recap.config import Style
from recap.config.relabel import ANY_LENGTH, Action, Checks, ClipCheck, ObjectCheck
from recap.errors import UserError
from recap.experts import View
from recap.filters import ENGLISH, undetected
from recap.image_filters import middle
from recap.sample import INVISIBLE

if TYPE_CHECKING:
    from recap.captioners.text import Caption

WHERE = "relabel.checks"
SEVERITY: tuple[Action, ...] = ("drop", "alt", "resample", "flag")
"""The most severe first."""
FAULTS = ("empty", "too_short", "too_long", "not_ended", "repetition", "leaked_prompt", "non_text", "low_clip_score",
          "below_alt_text", "missing_objects")
"""All that checks find, in this order."""


@dataclass(frozen=True, slots=True)
class Found:
    """What checks say of one caption."""

    faults: list[str] = field(default_factory=list)
    """Of FAULTS, in their order."""
    scores: dict[str, float] = field(default_factory=dict)
    """`clip_score` of the caption and `alt_clip_score` of the alt-text, 0 to 100; the number of `missing_objects`."""

    def __add__(self, other: "Found") -> "Found":
        return Found(self.faults + other.faults, self.scores | other.scores)


class CaptionChecks:
    """All checks that are configured; where neither CLIP nor a detector is, no model is opened and torch not imported.

    Raises:
        UserError: a model can't be opened.
    """

    def __init__(self, config: Checks, styles: Mapping[str, Style], device: str) -> None:
        self.config, self.styles = config, styles
        self.models: list[ClipScores | Objects] = []
        """What looks at the images."""
        if config.clip_score:
            self.models.append(ClipScores(config.clip_score, device))
        if config.objects:
            self.models.append(Objects(config.objects, device))

    def check(self, images: list[Image.Image], alt_texts: list[str],
              captions: "list[dict[str, Caption]]") -> list[dict[str, Found]]:
        """What is found of each image's captions, by style.

        Args:
            images: RGB, of any size; each is seen once by each model, however many captions it has.
            alt_texts: of the images; empty where there is none.
            captions: of the images, by style; not every image need have all.
        """
        found = [{style: self._text(style, caption) for style, caption in each.items()} for each in captions]
        if not images or not self.models:
            return found
        shown = [middle(image) for image in images]
        texts = [[caption.text for caption in each.values()] for each in captions]
        for model in self.models:
            grounded = model.check(shown, alt_texts, texts)
            found = [{style: before + more for (style, before), more in zip(each.items(), new, strict=True)}
                     for each, new in zip(found, grounded, strict=True)]
        return found

    def _text(self, style: str, caption: "Caption") -> Found:
        return Found(faults(caption.text, caption.ended, style, self.styles[style].prompt, self.config))


# --- what then happens ---------------------------------------------------------------------------------------------


def action(faults: list[str], config: Checks, alt_text: str,
           drawn: bool = False) -> Literal["keep", "flag", "resample", "alt", "drop"]:
    """What happens to a caption: the most severe of what its faults ask for.

    Where the alt-text should take its place, and there is none with a word in it, the caption is flagged.

    Args:
        faults: of the caption.
        config: of the checks.
        alt_text: of the image; empty where there is none.
        drawn: whether it has been drawn anew as often as it may be, and every draw was at fault. `faults` are those of
            the first draw, and `config.otherwise` holds in place of `resample`.
    """
    wanted = {_action_of(fault, config) for fault in faults}
    chosen = next((each for each in SEVERITY if each in wanted), None)
    if chosen == "resample" and drawn:
        chosen = config.otherwise
    if chosen == "alt" and is_wordless(alt_text):
        return "flag"
    return chosen or "keep"


def _action_of(fault: str, config: Checks) -> Action:
    table = {"low_clip_score": config.clip_score, "below_alt_text": config.clip_score,
             "missing_objects": config.objects}.get(fault)
    found: Action = table.action if table else getattr(config, fault)
    return found


# --- the text alone ------------------------------------------------------------------------------------------------


def faults(caption: str, ended: bool, style_name: str, prompt: str, config: Checks) -> list[str]:
    """The checks that find fault with a caption's text; of a caption of any length, in linear time.

    Args:
        caption: any text.
        ended: whether the captioner ended it by itself.
        style_name: whose limits on the number of words hold.
        prompt: of the style.
        config: of the checks.
    """
    is_empty = is_wordless(caption)
    lengths = [] if is_empty else length_faults(caption, *config.words.get(style_name, ANY_LENGTH))
    ends = [normal(caption)] + [normal(caption[-MAX_READ:])] * (len(caption) > MAX_READ)  # a loop goes on to the end
    found = {"empty": is_empty, "too_short": "too_short" in lengths, "too_long": "too_long" in lengths,
             "not_ended": not ended, "repetition": any(map(repeats, ends)),
             "leaked_prompt": any(_is_leaked(text, prompt) for text in ends),
             "non_text": not is_empty and _is_non_text(caption[:MAX_READ])}
    return [fault for fault in FAULTS if found.get(fault)]


RUN = 5
"""Words in a row of a prompt that no caption may hold."""
PICTURES = """
background bottom center central centre corner corners depicts edge every foreground front frame how image images
middle main my natural of our part photo photograph photos picture pictures position right left scene show showing
shown shows side sides sign signs subject text top upper lower view visible was we what when your you i
"""
"""Words of where things are in a picture."""
PLAIN = ENGLISH.union(PICTURES.split())
"""What captions are full of: a run of a prompt must hold two words at least that are none of these."""
MARK = re.compile(r"\b(?:question|answer|user|assistant|human)\s?:")
"""What a prompt marks its parts with, and a language model goes on with."""
TO_A_MODEL = re.compile(r"""
    \b(?:ignore|disregard|forget|override|bypass)\ (?:\w+\ ){0,3}
      (?:previous|prior|preceding|earlier|above|instructions?|prompts?|guidelines)\b
  | \byou\ are\ (?:now\ )?an?\ (?:[\w-]+\ ){0,2}(?:ai|assistant|chatbot|captioner|language\ model)\b
  | (?:^|[.!?\[\]<>|#]\s*)(?:system|assistant|developer)(?:\ (?:prompt|message|note))?\s*[\]|>]*:
  | <\|?(?:im_start|im_end|system|image|/?facts)\b | \[/?inst\] | \#\#\#?\ ?(?:instructions?|system|response)
  | \b(?:system|your)\ prompt\b | \bprompt\s*: | \bcaptions?\ (?:must|should|shall|has\ to|have\ to|needs?\ to)\b
  | \b(?:reply|respond|answer|output)\ (?:\w+\ )?only\b | \bwhen\ (?:describing|captioning)\b
    """, re.VERBOSE)
"""What a caption does not say of an image, however it is written. Alt-text may be worse, see `addresses_a_model`."""
WRITING = re.compile(r"""
    \b(?:says?|saying|reads?|reading|titled|labell?ed|(?:words|letters|lettering|text)(?!\ (?:that|which|i)\b))
    \s[^.!?;"*`\#{}<>]{1,100}
    """, re.VERBOSE)
"""What can be read in an image, where a caption gives it without quotation marks."""


def _is_leaked(text: str, prompt: str) -> bool:
    """Whether a normal text holds its prompt, or a run of it, or what is said to a model or by one."""
    own = WRITING.sub("", unquoted(text))
    return (_holds(words_of(text), words_of(normal(prompt))) or is_chatter(own) or is_refusal(own)
            or MARK.search(own) is not None or TO_A_MODEL.search(own) is not None)


def _holds(words: list[str], prompt: list[str]) -> bool:
    """Whether a text begins with a prompt, or holds a run of it that no other caption would.

    A prompt of fewer than RUN words is a run, if one of them is not plain. One like `there is` says nothing.
    """
    size = min(len(prompt), RUN)
    if size < 2:
        return False
    said = f" {' '.join(words)} "
    if said.startswith(f" {' '.join(prompt)} ") and not ENGLISH.issuperset(prompt):
        return True
    needed = 2 if size == RUN else 1
    runs = (prompt[start:start + size] for start in range(len(prompt) - size + 1))
    return any(f" {' '.join(run)} " in said for run in runs if len(set(run) - PLAIN) >= needed)


IMAGE_FILE = r"\.(?:jpe?g|png|gif|webp|bmp|tiff?)\b"
ADDRESS = rf"https?: | www\. | \w@\w | \w\.(?:com|net|org|html?|php|aspx?|pdf)\b | {IMAGE_FILE}"
MARKUP = r"[<>{}\\|~^=*`\[\]] | &\#?\w+; | %[0-9a-f]{2} | (?<!\w)[@\#]\w | \w_ | _\w | \w/\w+/\w"
CODE = r"[a-z]\d{3} | \d{3}[a-z]\w | \d[-_x]\d+[-_x]\d | \d{2,}x\d | (?:\w+-){3}\w"
NO_WORD = re.compile(f"{ADDRESS} | {MARKUP} | {CODE}", re.IGNORECASE | re.VERBOSE)
"""What stands between two spaces and is no word: an address, a file's name, markup, an article's number, a slug."""
FILE_NAME = re.compile(rf"{IMAGE_FILE}\W*$", re.IGNORECASE)
MAX_TOKEN = 100
"""Letters of what stands between two spaces that are read."""
DEBRIS = re.compile(r"""
    [\[<](?:unk|pad|cls|sep|mask|bos|eos)[\]>] | <0x[0-9a-f]{2}> | ▁ | (?:^|\s)\#\#\w
  | (?:^|\s)ġ\w.{0,100}?\sġ\w
  | \[\s*-?\d[\d.]*(?:\s*,\s*-?\d[\d.]*){2,}\s*\] | \(\s*-?\d[\d.]*\s*,\s*-?\d[\d.]*\s*\)\s*,?\s*\(\s*-?\d[\d.]*\s*,
    """, re.IGNORECASE | re.VERBOSE)
"""What a tokenizer leaves of its tokens, and a detector of its boxes: once is enough."""
NOT_TEXT = ("Cc", "Cs", "Co", "Cn")
"""Unicode categories of characters that no text holds."""


def _is_non_text(caption: str) -> bool:
    """Whether more than half of a caption, by letters, is made of what is no word; it is an image file's name; or holds
    what only programs write.
    """
    tokens = [token.strip(INVISIBLE) for token in caption.split()]
    num_letters = sum(len(token) for token in tokens if _is_no_word(token[:MAX_TOKEN]))
    return (2 * num_letters > sum(map(len, tokens)) or FILE_NAME.search(tokens[-1][-MAX_TOKEN:]) is not None
            or DEBRIS.search(caption) is not None)


def _is_no_word(token: str) -> bool:
    if token.isalpha():
        return False
    is_broken = "\ufffd" in token or (not token.isprintable() and any(
        unicodedata.category(letter) in NOT_TEXT for letter in token))
    return is_broken or NO_WORD.search(token) is not None or not any(map(str.isalnum, token))


# --- against the image ---------------------------------------------------------------------------------------------

MAX_SCORED, MAX_SENTENCES = 2000, 32
"""Letters of a text that CLIP reads, and sentences: more than a caption of 300 words has; alt-text may have any number.
"""
CLIPS_SENTENCE = re.compile(r"""[.!?…]["'”’»)\]]*\s|[。！？\n]""")
"""The end of what CLIP reads at a time, of a text that it does not read whole."""


class ClipScores:
    """CLIP scores of captions and of the alt-text, by an open_clip model.

    Raises:
        UserError: it can't be opened.
    """

    def __init__(self, config: ClipCheck, device: str) -> None:
        from eval.clip_score import ClipScorer
        self.config = config
        try:
            self.scorer = ClipScorer(config.model, device, config.revision)
        except ValueError as error:
            raise UserError(f"{WHERE}.clip_score.model: {error}: check the id or the folder") from error

    def check(self, images: list[Image.Image], alt_texts: list[str], captions: list[list[str]]) -> list[list[Found]]:
        """Score the captions of each image; alt-text without a word has no score, and none is below it."""
        texts = [[*each, alt_text] for each, alt_text in zip(captions, alt_texts, strict=True)]
        owner = [place for place, each in enumerate(texts) for _ in each]
        scores, _ = self.scorer.score_embedded(self.scorer.embed_images(images)[owner],
                                               [_beginning(text) for each in texts for text in each])
        left = iter(scores.round(2).tolist())  # the last digits depend on the batch
        found = []
        for each in texts:
            *own, alt = (next(left) for _ in each)
            found.append([self._found(score, None if is_wordless(each[-1]) else alt) for score in own])
        return found

    def _found(self, score: float, alt: float | None) -> Found:
        is_low = self.config.threshold is not None and score < self.config.threshold
        is_below = self.config.above_alt and alt is not None and score < alt
        return Found(["low_clip_score"] * is_low + ["below_alt_text"] * is_below,
                     {"clip_score": score} | ({} if alt is None else {"alt_clip_score": alt}))


def _beginning(text: str) -> str:
    """What CLIP reads of a text; of `a. a. a. …` it would be hundreds."""
    text = text[:MAX_SCORED]
    ends = [found.end() for found in CLIPS_SENTENCE.finditer(text)]
    return text[:ends[MAX_SENTENCES - 1]] if len(ends) >= MAX_SENTENCES else text


class Objects:
    """The things that captions name and a DETR has a label for, and does not find.

    Raises:
        UserError: it can't be opened.
    """

    def __init__(self, config: ObjectCheck, device: str) -> None:
        from recap.config.stitch import Detr, Stitch
        from recap.experts import detr
        from recap.pretrained import checkpoint_folder
        where = f"{WHERE}.objects"
        folder = str(checkpoint_folder(config, where))
        try:
            self.detector = detr.DetrExpert(Stitch(detr=Detr(model=folder, threshold=config.threshold)), device)
        except UserError as error:
            raise UserError(str(error).replace(detr.WHERE, where)) from error
        self.labels = frozenset(self.detector.model.config.id2label.values())

    def check(self, images: list[Image.Image], _alt_texts: list[str], captions: list[list[str]]) -> list[list[Found]]:
        """Look at each image once, whatever the number of its captions."""
        seen = self.detector.look(self.detector.preprocess([View(image) for image in images]))
        return [[self._found(caption, [each.label for each in facts.objects]) for caption in several]
                for facts, several in zip(seen, captions, strict=True)]

    def _found(self, caption: str, labels: list[str]) -> Found:
        missing = undetected(caption, labels, self.labels)
        return Found(["missing_objects"] * bool(missing), {"missing_objects": len(missing)})
