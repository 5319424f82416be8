"""METEOR and SPICE, which need Java and the package pycocoevalcap; everything else about captions needs neither.

pycocoevalcap brings the two programs. They are started here and not by its classes, because those wait without end for
a process that hangs (and, once it has failed, for a lock that nobody gives back). SPICE is AGPL and needs CoreNLP: we
ship neither, and never download anything for it.
"""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from eval.caption_scores import Words

METEOR_COLUMNS = 23
# METEOR 1.5's parameters for English (Denkowski & Lavie 2014): exact, stem, synonym and paraphrase matches; alpha …
_STAGES = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def meteor_statistics(candidates: Sequence[Words], references: Sequence[Sequence[Words]],
                      timeout_s: float | None = None) -> np.ndarray:
    """What METEOR 1.5 needs of each caption: sums of rows are the statistics of the captions together.

    Args:
        candidates: words of N captions.
        references: of as many images.
        timeout_s: seconds until Java counts as hanging; by default two minutes and a tenth of a second a reference.

    Returns:
        (N, 23) float64, in METEOR's order: words and function words of caption and reference, matches by stage, chunks
        (0 where the two are the same word by word, as METEOR adds them up), matched words; of the reference that fits
        best.

    Raises:
        ValueError: Java or pycocoevalcap is missing, or METEOR fails, hangs, or answers something else.
    """
    folder = program("METEOR")
    lines = [" ||| ".join(["SCORE", *map(_joined, refs), _joined(words)])
             for words, refs in zip(candidates, references, strict=True)]
    wait = timeout_s if timeout_s is not None else 120 + 0.1 * sum(map(len, references))
    answer = _run("METEOR", ["-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"], folder,
                  "".join(f"{line}\n" for line in lines), wait)
    try:
        found = np.array([[float(number) for number in row.split()] for row in answer.splitlines()])
    except ValueError:
        found = np.zeros(0)
    if found.shape != (len(lines), METEOR_COLUMNS):
        raise ValueError(f"METEOR answered something else than statistics of {len(lines)} captions: "
                         f"{_last_line(answer)}; check that pycocoevalcap is installed whole")
    whole = (found[:, 20] == 1) & (found[:, 21:23] == found[:, :2]).all(axis=1)
    found[whole, 20] = 0
    return found


def meteor(statistics: np.ndarray) -> np.ndarray:
    """METEOR (Denkowski & Lavie 2014, equations 1 to 4), tuned for ranking English.

    Args:
        statistics: (…, 23), sums of rows of `meteor_statistics` for the METEOR of a corpus.

    Returns:
        (…) float64 in [0, 1]; 0 where nothing matches.
    """
    matches = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (
            (_DELTA * matches[..., side] + (1 - _DELTA) * matches[..., side + 2]) @ _STAGES
            / (_DELTA * (statistics[..., side] - statistics[..., side + 2]) + (1 - _DELTA) * statistics[..., side + 2])
            for side in (0, 1))  # of the caption, of the reference
        harmonic = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
        chunks, matched = statistics[..., 20], statistics[..., 21:23]
        fragmentation = chunks / matched.mean(axis=-1)
        score = harmonic * (1 - _GAMMA * fragmentation ** _BETA)
    return np.where(matched.min(axis=-1) > 0, score, 0)


def spice(candidates: Sequence[Words], references: Sequence[Sequence[Words]],
          timeout_s: float | None = None) -> np.ndarray:
    """SPICE (Anderson et al. 2016): F1 over the objects, attributes and relations that captions and references name.

    Args:
        candidates: words of N captions.
        references: of as many images.
        timeout_s: seconds until Java counts as hanging; by default ten minutes and half a second a reference.

    Returns:
        (N,) float64 in [0, 1]; the corpus score is the mean.

    Raises:
        ValueError: Java, pycocoevalcap or CoreNLP is missing, or SPICE fails or hangs (it fails on Java 16 to 20).
    """
    folder = program("SPICE")
    wait = timeout_s if timeout_s is not None else 600 + 0.5 * sum(map(len, references))
    cases = [{"image_id": place, "test": _joined(words), "refs": [*map(_joined, refs)]}
             for place, (words, refs) in enumerate(zip(candidates, references, strict=True))]
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        given.write_text(json.dumps(cases))
        _run("SPICE", ["-Xmx8G", "-jar", "spice-1.0.jar", str(given), "-out", str(out), "-subset", "-silent"], folder,
             "", wait)
        try:
            scores = {each["image_id"]: float(each["scores"]["All"]["f"]) for each in json.loads(out.read_bytes())}
            return np.array([scores[place] for place in range(len(cases))])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"SPICE left no scores of {len(cases)} captions ({type(error).__name__}): it works on "
                             "Java 8 to 15") from error


def _joined(words: Words) -> str:
    return " ".join(words).replace("|||", "")  # which would part METEOR's fields


def program(metric: Literal["METEOR", "SPICE"]) -> Path:
    """The folder of pycocoevalcap with a Java program.

    Raises:
        ValueError: Java, pycocoevalcap, or SPICE's CoreNLP is missing.
    """
    if shutil.which("java") is None:
        raise ValueError(f"{metric} needs Java, and there is no java on the PATH: install a Java runtime, or leave "
                         f"{metric} out")
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"{metric} needs the package pycocoevalcap: `pip install pycocoevalcap`, or leave "
                         f"{metric} out")
    folder = Path(found.submodule_search_locations[0], metric.lower())
    missing = [name for name in _CORENLP if metric == "SPICE" and not (folder / "lib" / name).is_file()]
    if missing:
        raise ValueError(f"SPICE needs {' and '.join(missing)} in {folder / 'lib'}: download CoreNLP 3.6.0 from "
                         "nlp.stanford.edu and put them there, or leave SPICE out")
    return folder


def _run(metric: str, arguments: list[str], folder: Path, given: str, timeout_s: float) -> str:
    """What a Java program prints, or one line that says why not."""
    command = [str(shutil.which("java")), "-Dfile.encoding=UTF-8", *arguments]  # else é is ? where the locale is C
    try:
        done = subprocess.run(command, cwd=folder, input=given, capture_output=True, encoding="utf-8",  # noqa: S603
                              errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{metric} did not end within {timeout_s:.0f} s and was stopped: score fewer captions at "
                         "once") from error
    except OSError as error:
        raise ValueError(f"cannot start Java for {metric}: {error.strerror}") from error
    if done.returncode:
        raise ValueError(f"{metric} failed in Java (exit status {done.returncode}): {_last_line(done.stderr)}")
    return done.stdout


def _last_line(text: str) -> str:
    """The line of a program's output that says most: the first that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Exception" in line or "Error" in line]
    return (named[:1] or lines[-1:] or ["no message"])[0][:300]
