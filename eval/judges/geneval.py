"""GenEval's checks of a picture (Ghosh et al. 2023, arXiv 2310.11513): objects, their number, colours and places."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from eval.judges.positions import Relation, relations
from eval.judges.vocabulary import Colour
from recap.config import Table, validate
from recap.errors import UserError
from recap.facts import Object

TAGS = {"single_object": "one object", "two_object": "two objects", "counting": "numbers", "colors": "a colour",
        "position": "a place", "color_attr": "two colours"}
"""Its kinds of prompts, and what they ask for."""
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
"""What CLIP compares a colour by."""


class _Part(Table):
    model_config = ConfigDict(extra="ignore")


class Excluded(_Part):
    name: str = Field(alias="class", min_length=1)
    count: int = Field(ge=1, strict=True)


class Included(Excluded):
    color: Colour | None = None
    position: tuple[Relation, Annotated[int, Field(ge=0, strict=True)]] | None = None
    """How it lies from the object of that number in `include`."""


class Row(_Part):
    """What a row of its prompt file says must appear."""

    include: list[Included] = Field(min_length=1)
    exclude: list[Excluded] = []
    """So many and more are wrong."""
    tag: str | None = None

    @property
    def names(self) -> list[str]:
        """The classes it is about, each once."""
        return list(dict.fromkeys(each.name for each in [*self.include, *self.exclude]))

    @property
    def is_counting(self) -> bool:
        """Whether it asks for an exact number, so that the detector must be surer of what it counts."""
        return bool({each.name for each in self.include} & {each.name for each in self.exclude})

    @property
    def has_colours(self) -> bool:
        return any(each.color for each in self.include)


def read_row(about: dict[str, Any], where: str) -> Row | None:
    """What must appear by the fields that came with a prompt; None where they are none of GenEval's.

    Raises:
        UserError: `include` is there, and it or `exclude` isn't as GenEval writes them; the line begins with `where`.
    """
    if "include" not in about:
        return None
    row = validate({name: about[name] for name in Row.model_fields if name in about}, Row, where)
    for place, each in enumerate(row.include):
        if each.position and each.position[1] >= place:
            raise UserError(f"{where}: include.{place}.position: refers to object {each.position[1]}: name one that "
                            f"stands before it, below {place}")
    return row


Found = Mapping[str, Sequence[Object]]
"""Class → the objects found of it, the surest first."""
Colours = Mapping[tuple[str, Object], str]
"""Class and object → its colour."""


def to_colour(row: Row, found: Found) -> list[tuple[str, Object]]:
    """The objects, with their class, whose colours `is_correct` may ask for."""
    return [(each.name, seen) for each in row.include if each.color and len(found[each.name]) >= each.count
            for seen in found[each.name][:each.count]]


def is_correct(row: Row, found: Found, colours: Colours, margin: float) -> bool:
    """Whether everything is there that must be, and nothing that must not. Of each class the surest count.

    Args:
        row: what is asked.
        found: of every class of the row.
        colours: of the objects that `to_colour` names.
        margin: see `positions.relations`.
    """
    chosen = [found[each.name][:each.count] for each in row.include]
    return (all(_is_there(each, own, chosen, colours, margin) for each, own in zip(row.include, chosen, strict=True))
            and all(len(found[each.name]) < each.count for each in row.exclude))


def _is_there(asked: Included, own: Sequence[Object], chosen: list[Sequence[Object]], colours: Colours,
              margin: float) -> bool:
    if len(own) < asked.count:
        return False
    if asked.color and any(colours[asked.name, seen] != asked.color for seen in own):
        return False
    if asked.position is None:
        return True
    relation, other = asked.position
    return all(relation in relations(seen.box, target.box, margin) for seen in own for target in chosen[other])
