"""What a chat model is given: instructions, from a file, and the facts of an image, as data that can't end itself."""

import json
from pathlib import Path
from typing import Any

from recap.config.stitch import Llm
from recap.errors import UserError
from recap.llm import Scene
from recap.sample import visible

DEFAULT = Path(__file__).parent / "prompt.txt"
MAX_OBJECTS, MAX_TAGS, MAX_SENTENCES = 60, 60, 12
MAX_CHARACTERS = 400
"""Of a sentence or a line of writing that is shown to the model."""
HIDDEN = {"<": "\ue000", ">": "\ue001", "[": "\ue002", "]": "\ue003"}
"""What tags and control tokens are made of (`</facts>`, `<|im_start|>`, `[INST]`): escaped where facts hold it. What
stands for it meanwhile is in no visible text.
"""


def read_prompt(config: Llm, styles: list[str]) -> str:
    """The instructions, from the user's file or our own.

    Raises:
        UserError: the file is not there, is not text, or says nothing of a style.
    """
    path = Path(config.prompt) if config.prompt else DEFAULT
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"stitch.llm.prompt: cannot read {path} ({error}): give a text file, or leave it out") from None
    if missing := [style for style in styles if style not in text]:
        raise UserError(f"stitch.llm.prompt: {path} says nothing of the style {missing[0]!r}: copy {DEFAULT}, "
                        "and describe it there")
    return text.strip().replace("{styles}", ", ".join(json.dumps(style) for style in styles))


def shown(scene: Scene) -> str:
    """Facts as JSON that nothing in them can end. What is too much is left out, and said to be."""
    facts = scene.facts
    objects = [{"label": _short(each.label), "score": round(each.score, 2), "box": _percent(each.box, scene)}
               for each in facts.objects[:MAX_OBJECTS]]
    tags = [{"label": _short(tag.label), "score": round(tag.score, 2)} for tag in facts.tags[:MAX_TAGS]]
    left_out = {"objects": len(facts.objects) - len(objects), "tags": len(facts.tags) - len(tags)}
    content: dict[str, Any] = {
        "image": {"width": scene.width, "height": scene.height}, "objects": objects, "tags": tags,
        "sentences": [_short(each.text) for each in facts.sentences if each.reliable][:MAX_SENTENCES],
        "writing": [_short(line) for line in facts.text[:MAX_SENTENCES]],
        "alt_text": [_short(each.text) for each in facts.sentences if not each.reliable][:MAX_SENTENCES],
        "left_out": left_out if any(left_out.values()) else {},
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items() if value]
    text = "{" + ",\n ".join(lines) + "}"
    for mark, hidden in HIDDEN.items():
        text = text.replace(hidden, f"\\u{ord(mark):04x}")
    return text


def _short(text: str) -> str:
    text = visible(text)
    text = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS - 1]}…"
    return text.translate(str.maketrans("".join(HIDDEN), "".join(HIDDEN.values())))


def _percent(box: tuple[float, float, float, float], scene: Scene) -> list[int]:
    return [round(100 * edge / (scene.height if place % 2 else scene.width)) for place, edge in enumerate(box)]
