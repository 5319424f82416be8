"""The built-in judge of objects: what a detector finds in a picture of what its prompt names.

Semantic object accuracy (Hinz et al. 2020, arXiv 1910.13321), counting and positional alignment (TISE, Dinh et al.
2022, arXiv 2112.01398) and GenEval (Ghosh et al. 2023, arXiv 2310.11513), by a detector and a CLIP of one's choice. The
papers have others, so compare arms by these figures, and no published ones.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from PIL import Image

from eval.clip_score import ClipScorer
from eval.config import Detector
from eval.judge import Metric
from eval.judges.asked import Asked, Labels, read_asked
from eval.judges.clip_answers import ClipAnswers
from eval.judges.geneval import TAGS, Found, is_correct, read_row, to_colour
from eval.judges.objects import WHERE, ObjectDetector
from eval.judges.positions import relations
from eval.judges.vocabulary import Vocabulary
from eval.prompts import Prompt
from recap.facts import Object
from recap.pretrained import load_pretrained

Values = dict[str, float | None]
NO_CLIP = "none"
BY_CLIP = ("positions_clip", "geneval_colors", "geneval_color_attr")
METRICS = {
    "soa": Metric("semantic object accuracy: of the classes that the prompt names, the share found"),
    "count_error": Metric("counting alignment: root mean square error of how many things there are, of those that the "
                          "prompt gives a number of", lower_is_better=True, is_share=False),
    "positions": Metric("of what the prompt says to be left of, right of, above or below another thing, the share "
                        "whose boxes lie so"),
    "positions_clip": Metric("positional alignment: share of pictures for which CLIP prefers the prompt to the same "
                             "with its positions swapped"),
    "geneval": Metric("share of pictures that show all that a row of GenEval asks for; its own figure is the mean of "
                      "the six kinds of rows"),
} | {f"geneval_{tag}": Metric(f"the same share, of rows that ask for {what}") for tag, what in TAGS.items()}


def check(table: Detector, prompts: list[Prompt]) -> None:
    """Read the rows of GenEval that came with prompts, before hours of work. `UserError` for a faulty one."""
    for prompt in prompts:
        read_row(prompt.about, f"{WHERE}: the prompt {prompt.text[:80]!r}")


class DetectorJudge:
    """Looks for what prompts name: `[evaluate.detector]`."""

    def __init__(self, table: Detector, detector: ObjectDetector, clip: ClipAnswers | None) -> None:
        self._table, self._detector, self._clip = table, detector, clip
        self._vocabulary = Vocabulary(detector.labels)
        self._tally = _Tally(detector.name)
        self.metrics: Mapping[str, Metric | str] = {
            name: metric for name, metric in METRICS.items() if clip or name not in BY_CLIP}
        self.name = (f"object detector {detector.name} (score over {table.threshold:g}, where numbers are asked for "
                     f"over {table.counting_threshold:g}; at most {table.max_objects} of a class; boxes apart by "
                     f"{table.position_margin:g}), "
                     + (f"{clip.name} (preferring over {table.clip_preference:g})" if clip else "no CLIP"))

    @classmethod
    def open(cls, table: Detector, device: str) -> "DetectorJudge":
        """Open the detector and, unless it is left out, CLIP.

        Raises:
            UserError: one of them can't be opened.
        """
        detector = ObjectDetector(table, device, min(table.threshold, table.counting_threshold))
        if table.clip.model == NO_CLIP:
            return cls(table, detector, None)
        scorer = load_pretrained(lambda folder: ClipScorer(folder, device), table.clip, f"{WHERE}.clip")
        return cls(table, detector, ClipAnswers(scorer))

    def images(self, images: list[Image.Image], prompts: list[Prompt]) -> list[Values]:
        """Every metric of every picture; None where its prompt asks nothing of that kind, or nothing that the detector
        has a label for.

        Raises:
            UserError: a prompt carries a malformed row of GenEval.
        """
        asked = [read_asked(prompt, self._vocabulary) for prompt in prompts]
        seen = [Seen(objects, self._table) for objects in self._detector.look(images)]
        answers: list[float | None] = [None] * len(images)
        if self._clip:
            answers = self._clip.preferences(images, [prompt.text for prompt in prompts])
        values = []
        for each, found, answer, correct in zip(asked, seen, answers, self._correct(images, asked, seen), strict=True):
            self._tally.add(each, correct)
            all_values = {
                "soa": _mean([float(bool(found.of(labels))) for labels in each.classes]),
                "count_error": count_error(each, found),
                "positions": self._positions(each, found),
                "positions_clip": None if answer is None else float(answer > self._table.clip_preference),
                "geneval": correct,
            } | {f"geneval_{tag}": correct if each.row and each.row.tag == tag else None for tag in TAGS}
            values.append({name: all_values[name] for name in self.metrics})
        return values

    def remarks(self) -> list[str]:
        """What was left out of the pictures judged so far, a line each."""
        return self._tally.remarks()

    def _positions(self, asked: Asked, seen: "Seen") -> float | None:
        verdicts = []
        for (first, num_first), relation, (second, num_second) in asked.relations:
            firsts, seconds = seen.of(first)[:num_first], seen.of(second)[:num_second]
            are_there = len(firsts) == num_first and len(seconds) == num_second
            verdicts.append(float(are_there and all(
                relation in relations(one.box, other.box, self._table.position_margin)
                for one in firsts for other in seconds)))
        return _mean(verdicts)

    def _correct(self, images: list[Image.Image], asked: list[Asked], seen: "list[Seen]") -> list[float | None]:
        """GenEval's verdicts; None without a row, or where it asks for colours and there is no CLIP."""
        rows = {index: each.row for index, each in enumerate(asked)
                if each.row and (self._clip or not each.row.has_colours)}
        found: dict[int, Found] = {
            index: {name: seen[index].of(self._vocabulary.labels_of(name), row.is_counting) for name in row.names}
            for index, row in rows.items()}
        wanted = [(index, name, thing) for index, row in rows.items() for name, thing in to_colour(row, found[index])]
        colours: dict[tuple[int, str, Object], str] = {}
        if self._clip:
            crops = [images[index].crop(_pixels(thing)) for index, _, thing in wanted]
            colours = dict(zip(wanted, self._clip.colours(crops, [name for _, name, _ in wanted]), strict=True))
        verdicts: list[float | None] = [None] * len(images)
        for index, row in rows.items():
            of_this = {(name, thing): colour for (other, name, thing), colour in colours.items() if other == index}
            verdicts[index] = float(is_correct(row, found[index], of_this, self._table.position_margin))
        return verdicts


class Seen:
    """What was found in one picture, the surest first."""

    def __init__(self, objects: list[Object], table: Detector) -> None:
        self._objects, self._table = objects, table

    def of(self, labels: Labels, counting: bool = False) -> list[Object]:
        """Those of a class; to count them, only those that are surely there."""
        least = self._table.counting_threshold if counting else self._table.threshold
        return [each for each in self._objects if each.label in labels and each.score > least][:self._table.max_objects]


def count_error(asked: Asked, seen: Seen) -> float | None:
    """Root mean square error over the classes that are given a number (TISE's CA); None where none is."""
    errors = [len(seen.of(labels, counting=True)) - number for labels, number in asked.counts.items()]
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _pixels(thing: Object) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches, one at least."""
    left, top, right, bottom = thing.box
    return int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom))


class _Tally:
    """Counts what `images` was given, over all its calls."""

    def __init__(self, detector: str) -> None:
        self._detector = detector
        self._num = 0
        self._left_out: Counter[tuple[str, str]] = Counter()
        self._unknown: Counter[str] = Counter()

    def add(self, asked: Asked, correct: float | None) -> None:
        self._num += 1
        self._unknown.update(asked.unknown)
        if asked.unknown:
            self._left_out["geneval", "ask for a class that it has no label for"] += 1
        elif asked.row and correct is None:
            self._left_out["geneval", "ask for a colour, which only CLIP can tell"] += 1
        if not asked.classes:
            self._left_out["soa", "name nothing that it has a label for"] += 1

    def remarks(self) -> list[str]:
        lines = [f"{WHERE}: of {self._num:,} pictures just judged, {count:,} are left out of {metric}: for "
                 f"{self._detector}, their prompts {why}" for (metric, why), count in self._left_out.items()]
        if self._unknown:
            lines.append(f"{WHERE}: without a label: {', '.join(name for name, _ in self._unknown.most_common(20))}")
        return lines
