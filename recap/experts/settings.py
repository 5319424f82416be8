"""What can be said of experts' settings before any of them is opened: planning imports no torch."""

import difflib
from pathlib import Path

from recap.config.stitch import ClipTags, Owlvit, Stitch
from recap.errors import UserError
from recap.experts import REGISTRY
from recap.sample import visible

RAM_PACKAGE = "https://github.com/xinyu1205/recognize-anything"
WITHOUT_TAGS = ("blip2", "alt_text")
"""Experts that state sentences alone."""
OUR_TAGS = Path(__file__).with_name("tags.txt")
MAX_LIST = 20_000
"""Tags in a list. The words of English that name something visible are fewer."""


def check_names(names: list[str]) -> None:
    """Raises UserError where no expert is named, one is named twice, or one is not known."""
    if not names:
        raise UserError(f"stitch.experts is empty: name at least one of {', '.join(REGISTRY)}")
    for place, name in enumerate(names):
        if name not in REGISTRY:
            raise UserError(f"stitch.experts: there is no expert {name!r}: {_hint(name)}")
        if name in names[:place]:
            raise UserError(f"stitch.experts: {name!r} is named twice: name it once")


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(REGISTRY)}"


def check_settings(name: str, config: Stitch) -> None:
    """Raises UserError where what an expert is set to can't be right, whatever its checkpoint says."""
    if name in ("ram", "tag2text") and not getattr(config, name).checkpoint:
        raise UserError(f"stitch.{name}.checkpoint is not set: name the .pth file, which {RAM_PACKAGE} says where to "
                        "get")
    if name == "owlvit":
        _check_owlvit(config.owlvit)


def _check_owlvit(config: Owlvit) -> None:
    tagger = config.tags_from
    if not tagger and not any(map(visible, config.queries)):
        raise UserError("stitch.owlvit: nothing says what to look for: set queries or tags_from")
    if tagger is None:
        return
    if tagger not in REGISTRY:
        raise UserError(f"stitch.owlvit.tags_from: there is no expert {tagger!r}: {_hint(tagger)}")
    if tagger in WITHOUT_TAGS:
        raise UserError(f"stitch.owlvit.tags_from: {tagger} names nothing that could be looked for: take one "
                        "that finds objects or tags")


def read_tags(config: ClipTags) -> list[str]:
    """The tags in the file that is named, or in ours: one on each line, each once; what follows a # is a comment.

    Raises:
        UserError: the file is not there or not text, or it has fewer than two tags or more than MAX_LIST.
    """
    path = Path(config.tags).expanduser() if config.tags else OUR_TAGS
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"stitch.clip_tags.tags: cannot read {path}: give a text file in UTF-8, a tag on each line "
                        f"({error})") from error
    tags = list(dict.fromkeys(tag for line in lines if (tag := line.partition("#")[0].strip())))
    if not 2 <= len(tags) <= MAX_LIST:
        raise UserError(f"stitch.clip_tags.tags: {path} has {len(tags)} tags: write 2 to {MAX_LIST}, one on each line")
    return tags
