"""`recap evaluate A B`: any folders of images and diffusers pipelines, from anywhere, drawn, measured and compared.

    pipeline ─▶ generate ─┐
    folder ───▶ take ─────┴▶ evaluate ─▶ report

The first named is what the others are compared with. Everything is skipped that is already done.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.comparisons import CONTROLS, baseline, claim
from eval.given import GivenFolder, by_hash
from eval.prompts import PROMPTS_FILE, load_prompts, prompt_inputs
from eval.report import ReportInput, Run
from eval.scoreboard import cautions
from recap import pipeline, progress
from recap.config import Model
from recap.environment import environment
from recap.errors import UserError
from recap.pipeline import Experiment, Plan, Stage
from recap.pretrained import find_local, identity
from recap.rundir import digest, folder_identity, lock
from recap.storage import identity as file_identity

WHERE = "evaluate"
SEED = 0


@dataclass(frozen=True)
class Source:
    """One of the things that are compared."""

    arm: str
    """How the report calls it."""
    place: str
    """Folder, or hub id."""
    is_pipeline: bool


def evaluate(exp: Experiment, places: list[str], redo: bool) -> None:
    """Do what is not yet done, and print the verdict.

    Args:
        exp: where to (`runs`, `name`), prompts, networks and judges, the real images.
        places: folders of images, folders of diffusers pipelines, or hub ids of these; at least two.
        redo: make again what was made of other images or with other settings.

    Raises:
        UserError: one of them is not there, or images and prompts do not fit.
    """
    if progress.num_processes() > 1:
        raise UserError(f"{WHERE}: folders are compared by one process: set evaluate.workers, and leave torchrun out")
    sources = [Source(arm, place, _is_pipeline(place)) for arm, place in zip(_arms(places), places, strict=True)]
    if not exp.generate.prompts and (drawing := [each.place for each in sources if each.is_pipeline]):
        raise UserError(f"{WHERE}: {drawing[0]} is a pipeline, and there is nothing to draw: give --prompts FILE")
    plan = Versus(exp, sources)
    stages = plan.stages()
    for stage in stages:
        stage.dir  # noqa: B018  (what is missing is said now, not after hours)
    with lock(plan.root):
        for number, stage in enumerate(stages, 1):
            pipeline.do(stage, f"[{number}/{len(stages)}] {stage.path.relative_to(plan.root)}", redo)
    print(f"\n{stages[-1].dir.result()['summary']}\n\nThe report: {stages[-1].path / 'index.html'}")


def keep_reference(exp: Experiment, redo: bool) -> None:
    """`recap reference DIR`: measure real images once, for any number of evaluations."""
    plan = Plan(exp)
    stage = plan.reference()
    with lock(plan.root):
        pipeline.do(stage, str(stage.path), redo)
    found = stage.dir.result()
    print(f"{found['num_images']:,} images by {found['features']}: {plan.root}")


class Versus(Plan):
    """The stages: for each source its images, its figures; then the report."""

    def __init__(self, exp: Experiment, sources: list[Source]) -> None:
        super().__init__(exp)
        self.sources = sources
        self.chosen = Chosen({}, True) if exp.generate.prompts else _chosen(sources)

    def stages(self) -> list[Stage]:
        reference, found, scored = self.reference(), [], []
        for source in self.sources:
            images = self._drawn(source) if source.is_pipeline else self._taken(source)
            figures = self.evaluate(SEED, source.arm, images, reference)
            found += [images, figures]
            scored.append((source.arm, images, figures))
        return [reference, *found, self._report(scored)]

    def headline_sets(self) -> list[str] | None:
        """Folders bring prompt sets of their own, which are known once they are listed."""
        return self.exp.evaluate.sets

    def _drawn(self, source: Source) -> Stage:
        config, ref = self.exp.generate, Model(model=source.place)
        return self._stage("generate", f"seed-{SEED}/generate/{source.arm}", "eval.generate:run", [], lambda: {
            "generate": config.own(), "prompts": self._prompt_files(), "pipeline": identity(ref),
        }, lambda: (ref, WHERE, config, source.arm, self.device))

    def _taken(self, source: Source) -> Stage:
        folder, only, prompts = Path(source.place), self.chosen.names.get(source.arm), self.exp.generate
        return self._stage("take", f"seed-{SEED}/generate/{source.arm}", "eval.given:take", [], lambda: {
            "images": folder_identity(folder), "prompts": self._prompt_files(), "only": digest(only),
            "paired": self.chosen.are_paired, "kind": prompts.kind, "num_prompts": prompts.num_prompts,
            "prompts_seed": prompts.prompts_seed,
        }, lambda: (folder, load_prompts(self.exp.generate) if self.exp.generate.prompts else None, only,
                    self.chosen.are_paired))

    def _prompt_files(self) -> list[Any]:
        return [file_identity(path) for path in prompt_inputs(self.exp.generate)] if self.exp.generate.prompts else []

    def _report(self, scored: list[tuple[str, Stage, Stage]]) -> Stage:
        evaluates = [stage for *_, stage in scored]

        def content() -> tuple[Any, ...]:
            runs = [Run(SEED, arm, images.path, figures.path) for arm, images, figures in scored]
            for caution in cautions(runs):
                progress.warn(caution)
            settings = self.exp.model_dump(mode="json", include={"generate", "evaluate"})
            return ReportInput(
                name=self.exp.name, config={"compared": {each.arm: each.place for each in self.sources}, **settings},
                arms=[each.arm for each in self.sources], styles=[], runs=runs, relabelled=[],
                environment=environment(), judge=self.exp.evaluate.judge, device=self.device,
                seconds={str(stage.path.relative_to(self.root)): stage.dir.result()["seconds"] for stage in evaluates},
            ), self.exp.report

        return self._stage("report", "report", "eval.report:run", evaluates, lambda: {
            "report": self.exp.report, "evaluate": [stage.dir.fingerprint for stage in evaluates]}, content)


def _is_pipeline(place: str) -> bool:
    path = Path(place)
    if path.is_dir():
        return (path / "model_index.json").is_file()
    find_local(Model(model=place), WHERE)  # a path with nothing there is refused, and all else is a hub id
    return True


def _arms(places: list[str]) -> list[str]:
    """A name each: the last parts of its path, as many as tell it from the others and from an experiment's arms."""
    if len(places) < 2:
        raise UserError(f"{WHERE}: {len(places)} folder was named: give two or more, the one to compare with first")
    if twice := [place for place, count in Counter(map(_resolved, places)).items() if count > 1]:
        raise UserError(f"{WHERE}: {twice[0]} is named twice: name it once")
    parts = [[part for part in Path(_resolved(place)).parts if part != "/"] for place in places]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(each[-depth:])).strip("-_") or "images" for each in parts]
        if len(set(names)) == len(names) and _mean_nothing_else(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names)]


def _mean_nothing_else(names: list[str]) -> bool:
    """Whether the first is what the others are held against, and the second what the headline speaks of.

    In an experiment `alt` and `mix` are these, and controls have names of their own, wherever they stand.
    """
    return (baseline(names), claim(names)) == (names[0], names[1]) and not set(names) & set(CONTROLS)


def _resolved(place: str) -> str:
    return str(Path(place).resolve()) if Path(place).exists() else place


@dataclass(frozen=True)
class Chosen:
    """Which images are compared where no prompts say which belong together."""

    names: dict[str, list[str]]
    """Arm → the names to take, of folders that are not taken whole."""
    are_paired: bool
    """Whether those of one name belong together."""


def _chosen(sources: list[Source]) -> Chosen:
    """Those of names that all have; else of each as many as the smallest has, as a distance falls with their number."""
    folders = {each.arm: GivenFolder.open(Path(each.place)) for each in sources
               if not each.is_pipeline and not (Path(each.place) / PROMPTS_FILE).is_file()}
    shared = set.intersection(*(set(folder.names) for folder in folders.values())) if folders else set()
    least = min((len(folder.names) for folder in folders.values()), default=0)
    are_paired = len(shared) > 1
    found = {arm: sorted(shared) if are_paired else by_hash(folder.names)[:least] for arm, folder in folders.items()}
    for arm, folder in folders.items():
        if left_out := len(folder.names) - len(found[arm]):
            progress.warn(f"{WHERE}: {left_out:,} of {len(folder.names):,} images of {folder.path} are left out: "
                          + ("the others have none of their names" if are_paired else
                             f"another has {least:,}, and FID falls with the number of images"))
    return Chosen({arm: names for arm, names in found.items() if len(names) < len(folders[arm].names)}, are_paired)
