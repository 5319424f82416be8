"""What a prompt asks of the objects in a picture: by its words, or by the fields that came with it."""

from collections import defaultdict
from dataclasses import dataclass, field

from eval.judges.geneval import Row, read_row
from eval.judges.positions import Relation, places
from eval.judges.vocabulary import Named, Vocabulary, words_of
from eval.prompts import Prompt

Labels = frozenset[str]
"""What a detector calls a class: several labels for a word that may mean several (`bike`)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What must be in a picture, as far as a detector has labels for it."""

    classes: tuple[Labels, ...] = ()
    """Named, each once."""
    counts: dict[Labels, int] = field(default_factory=dict)
    """Of those that are named with a number, how many."""
    relations: tuple[tuple[tuple[Labels, int], Relation, tuple[Labels, int]], ...] = ()
    """So many of one class lie so from so many of another."""
    row: Row | None = None
    """What GenEval asks; None as well where it asks for a class that the detector lacks."""
    unknown: tuple[str, ...] = ()
    """Classes that GenEval asks for and the detector lacks."""


def read_asked(prompt: Prompt, vocabulary: Vocabulary) -> Asked:
    """What a prompt asks.

    Raises:
        UserError: the prompt carries a malformed row of GenEval.
    """
    row = read_row(prompt.about, f"evaluate.detector: the prompt {prompt.text!r:.80}")
    return _by_row(row, vocabulary) if row else _by_words(prompt.text, vocabulary)


def _by_row(row: Row, vocabulary: Vocabulary) -> Asked:
    labels = {name: vocabulary.labels_of(name) for name in row.names}
    unknown = tuple(name for name in row.names if not labels[name])
    counted = {each.name for each in row.exclude}
    classes = [labels[each.name] for each in row.include if labels[each.name]]
    parts = [(labels[each.name], each.count) for each in row.include]
    relations = [(parts[place], each.position[0], parts[each.position[1]])
                 for place, each in enumerate(row.include) if each.position]
    return Asked(
        tuple(dict.fromkeys(classes)),
        {labels[each.name]: each.count for each in row.include
         if labels[each.name] and (each.count > 1 or each.name in counted)},
        tuple(each for each in relations if each[0][0] and each[2][0]),
        None if unknown else row,
        unknown,
    )


def _by_words(text: str, vocabulary: Vocabulary) -> Asked:
    words = words_of(text)
    things = vocabulary.find(words)
    known = [each for each in things if each.labels]
    relations = [((place.first.labels, place.first.number or 1), place.relation,
                  (place.second.labels, place.second.number or 1)) for place in places(words, things)
                 if place.first.labels and place.second.labels and not place.first.labels & place.second.labels]
    return Asked(tuple(dict.fromkeys(each.labels for each in known)), _counts(known), tuple(relations))


def _counts(things: list[Named]) -> dict[Labels, int]:
    """How many there are of each class that has a number: of `two men and a woman` three. Left out is what is brought
    in without any number (`people and two men`), or with two by one name, which may be the same things (`two dogs,
    one of them brown`), or shares labels with another (`a bike and two bicycles`).
    """
    by_class: dict[Labels, list[Named]] = defaultdict(list)
    for each in things:
        by_class[each.labels].append(each)
    counts = {}
    for labels, several in by_class.items():
        new = [each for each in several if each.is_new]
        names = [each.mention.noun.lemma for each in new]
        is_clear = (any(each.number for each in new) and len(set(names)) == len(names)
                    and all(each.is_new or each.is_again for each in several)
                    and not any(labels & other for other in by_class if other != labels))
        if is_clear:
            counts[labels] = sum(each.number or 1 for each in new)
    return counts
