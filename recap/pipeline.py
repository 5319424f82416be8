"""`recap run`: the stages in order, each skipped when it is already done.

    stitch → finetune → relabel → train (seed, arm) → generate → evaluate (seed, arm) → report

A stage whose input the experiment file names itself needs no stage before it, and those that nobody needs are left out.
"""

import difflib
import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from eval.config import Evaluate, Generate, Report
from recap import pretrained, progress
from recap.config import DEFAULT_STYLES, Captioner, Data, Finetune, Model, Name, Relabel, Stitch, Style, Table
from recap.errors import UserError
from recap.rundir import StageDir, folder_identity
from recap.shards import expand, identity
from train_t2i.config import DEFAULT_ARMS, Arm, Train

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "webdataset", "open_clip_torch", "clean-fid")


class Experiment(Table):
    """One experiment file: a table for each stage."""

    name: Name
    """Of the run; by default the file's name."""
    runs: str = "runs"
    """Where runs are kept."""
    device: str = "auto"
    """A torch device; `auto` takes the GPU where there is one."""
    seeds: list[int] = Field([0], min_length=1)
    """Every arm is trained once for each."""
    arms: list[Name] = Field(["base", "alt", "short", "long", "mix"], min_length=1)
    """Which arms to compare, in the order of the report."""
    arm: dict[Name, Arm] = {}
    """Arms of one's own, beside the usual ones."""
    data: Data = Data()
    styles: dict[Name, Style] = DEFAULT_STYLES
    """The captions that stitching writes, the captioner learns and relabelling adds."""
    stitch: Stitch = Stitch()
    captioner: Captioner = Captioner()
    finetune: Finetune = Finetune()
    relabel: Relabel = Relabel()
    train: Train = Train()
    generate: Generate = Generate()
    evaluate: Evaluate = Evaluate()
    report: Report = Report()

    @model_validator(mode="before")
    @classmethod
    def _add_usual_arms(cls, content: Any) -> Any:
        return content | {"arm": DEFAULT_ARMS | content.get("arm", {})} if isinstance(content, dict) else content

    @model_validator(mode="after")
    def _check_names(self) -> "Experiment":
        for arm in self.arms:
            if arm not in self.arm:
                near = difflib.get_close_matches(arm, self.arm, n=1)
                raise ValueError(f"arms: no arm {arm!r}" + (f": did you mean {near[0]}?" if near else
                                                             f": define it as [arm.{arm}], or choose of {', '.join(self.arm)}"))
        if unknown := sorted(set(self.relabel.mix) - set(self.styles)):
            raise ValueError(f"relabel.mix: no style {unknown[0]!r}: the styles are {', '.join(self.styles)}")
        return self


@dataclass(frozen=True)
class Stage:
    """A unit of the run: its folder, and the function that fills it."""

    verb: str
    """The command that runs it alone."""
    dir: StageDir
    work: Callable[[StageDir], dict[str, Any]]
    needs: list["Stage"] = field(default_factory=list)


def run(exp: Experiment, verb: str | None = None, redo: bool = False) -> None:
    """Do what is not yet done: every stage, or those of one verb."""
    plan = Plan(exp)
    chosen = [stage for stage in plan.stages() if verb in (None, stage.verb)]
    if not chosen:
        raise UserError(f"nothing to {verb}: this experiment names that stage's result itself")
    for place, stage in enumerate(chosen, 1):
        _do(stage, f"[{place}/{len(chosen)}] {_label(exp, stage)}", verb, redo)
    table = chosen[-1].dir.result().get("table")
    if table:
        print(table)
        print(f"\nThe report: {chosen[-1].dir.path / 'index.html'}")


def _do(stage: Stage, label: str, verb: str | None, redo: bool) -> None:
    state = stage.dir.state()
    if state == "done":
        progress.say(f"{label}: done before")
        return
    for need in stage.needs:
        if need.dir.state() != "done":
            raise UserError(f"{verb}: {need.dir.path} is not done: run `recap {need.verb} -c …` first, or `recap run -c …`")
    if state == "changed":
        _refuse_or_clear(stage, redo)
    progress.say(label)
    started = time.time()
    if progress.is_main():
        stage.dir.begin()
    result = stage.work(stage.dir)
    if progress.is_main():
        stage.dir.finish({**result, "seconds": round(time.time() - started, 1)})


def _refuse_or_clear(stage: Stage, redo: bool) -> None:
    if not redo:
        changes = stage.dir.changes()
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        raise UserError(f"{stage.dir.path} was made with other settings or inputs ({changes[0]}{more}): "
                        "give the run another name=…, or --redo to delete that result and make it again")
    progress.say(f"    {stage.dir.path} was made with other settings: deleted, made again")
    stage.dir.clear()


def dry_run(exp: Experiment) -> None:
    """Print what a run would do. Reads no weights; what is not there yet is said, and is no error."""
    plan = Plan(exp, tolerant=True)
    words = {"done": "done before", "begun": "goes on", "new": "to do", "changed": "made with other settings: needs --redo"}
    for stage in plan.stages():
        print(f"{_label(exp, stage):<32} {words[stage.dir.state()]}")
    for missing in dict.fromkeys(plan.missing):
        progress.warn(missing)


def _label(exp: Experiment, stage: Stage) -> str:
    return str(stage.dir.path.relative_to(Path(exp.runs) / exp.name))


class Plan:
    """The stages of an experiment. Each method makes one and says what it reads."""

    def __init__(self, exp: Experiment, tolerant: bool = False) -> None:
        self.exp, self.tolerant = exp, tolerant
        self.root = Path(exp.runs) / exp.name
        self.missing: list[str] = []

    def stages(self) -> list[Stage]:
        exp = self.exp
        trained = [arm for arm in exp.arms if exp.arm[arm].captions]
        relabelled = exp.train.shards is None and bool(trained)
        tuned = relabelled and exp.captioner.adapter is None
        stitch = self.stitch() if tuned and exp.finetune.shards is None else None
        finetune = self.finetune(stitch) if tuned else None
        relabel = self.relabel(finetune) if relabelled else None
        reference = self.reference()
        found = [stage for stage in (stitch, finetune, relabel, reference) if stage]
        scored: list[tuple[int, str, Stage, Stage]] = []
        for seed in exp.seeds:
            for arm in exp.arms:
                if arm not in trained and seed != exp.seeds[0]:
                    continue  # the base is the same for every fine-tuning seed
                train = self.train(seed, arm, relabel) if arm in trained else None
                generate = self.generate(seed, arm, train)
                evaluate = self.evaluate(seed, arm, generate, reference)
                found += [stage for stage in (train, generate, evaluate) if stage]
                scored.append((seed, arm, generate, evaluate))
        return [*found, self.report(stitch, finetune, relabel, scored)]

    # Each of these: which folder, what it reads, what fills it.

    def stitch(self) -> Stage:
        config = self.exp.stitch
        shards, inputs = self._shards(config.shards or self.exp.data.shards, "stitch.shards" if config.shards else "data.shards")
        reads = {"stitch": config, "styles": list(self.exp.styles), "alt_text": self.exp.data.alt_text, "inputs": inputs,
                 "checkpoint": self._checkpoint(config.detr, "stitch.detr") if "detr" in config.experts else None}
        return self._stage("stitch", "stitch", reads, [], "recap.stitch:run",
                           lambda: (shards, config, self.exp.styles, self.exp.data, self.device))

    def finetune(self, stitch: Stage | None) -> Stage:
        exp = self.exp
        given, inputs = self._shards(exp.finetune.shards, "finetune.shards") if stitch is None else ([], stitch.dir.fingerprint)
        reads = {"finetune": exp.finetune, "styles": exp.styles, "captioner": exp.captioner, "inputs": inputs,
                 "checkpoint": self._checkpoint(exp.captioner, "captioner")}
        return self._stage("finetune", "captioner", reads, [stitch], "recap.finetune:run",
                           lambda: (given or _written(stitch), exp.finetune, exp.captioner, exp.styles, self.device))

    def relabel(self, finetune: Stage | None) -> Stage:
        exp = self.exp
        shards, inputs = self._shards(exp.relabel.shards or exp.data.shards, "relabel.shards" if exp.relabel.shards else "data.shards")
        adapter = finetune.dir.path / "adapter" if finetune else _given_adapter(exp.captioner)
        reads = {"relabel": exp.relabel, "styles": exp.styles, "captioner": exp.captioner, "alt_text": exp.data.alt_text,
                 "inputs": inputs, "checkpoint": self._checkpoint(exp.captioner, "captioner"),
                 "adapter": finetune.dir.fingerprint if finetune else folder_identity(adapter) if adapter else None}
        return self._stage("relabel", "relabel", reads, [finetune], "recap.relabel:run",
                           lambda: (shards, exp.captioner, adapter, exp.styles, exp.relabel, exp.data, self.device))

    def train(self, seed: int, arm: str, relabel: Stage | None) -> Stage:
        exp = self.exp
        given, inputs = self._shards(exp.train.shards, "train.shards") if relabel is None else ([], relabel.dir.fingerprint)
        reads = {"train": exp.train, "arm": exp.arm[arm], "seed": seed, "inputs": inputs,
                 "checkpoint": self._checkpoint(exp.train, "train")}
        return self._stage("train", f"seed-{seed}/train/{arm}", reads, [relabel], "train_t2i.train:run",
                           lambda: (given or _written(relabel), exp.train, exp.arm[arm], seed, arm, self.device))

    def generate(self, seed: int, arm: str, train: Stage | None) -> Stage:
        exp = self.exp
        pipeline = Model(model=str(train.dir.path / "pipeline")) if train else Model(model=exp.train.model,
                                                                                     revision=exp.train.revision)
        reads = {"generate": exp.generate, "prompts": self._prompts(),
                 "pipeline": train.dir.fingerprint if train else self._checkpoint(exp.train, "train")}
        return self._stage("generate", f"seed-{seed}/generate/{arm}", reads, [train], "eval.generate:run",
                           lambda: (pipeline, "train", exp.generate, arm, self.device))

    def reference(self) -> Stage:
        config = self.exp.evaluate
        reads = {"features": config.features, "inputs": self._images(config.reference, "evaluate.reference"),
                 "checkpoint": self._checkpoint(config.features, "evaluate.features")}
        return self._stage("reference", "reference", reads, [], "eval.evaluate:reference", lambda: (config, self.device))

    def evaluate(self, seed: int, arm: str, generate: Stage, reference: Stage) -> Stage:
        config = self.exp.evaluate
        reads = {"evaluate": config, "images": generate.dir.fingerprint, "reference": reference.dir.fingerprint,
                 "checkpoint": self._checkpoint(config.clip_score, "evaluate.clip_score")}
        return self._stage("evaluate", f"seed-{seed}/eval/{arm}", reads, [generate, reference], "eval.evaluate:run",
                           lambda: (generate.dir.path, reference.dir.path / "reference.npz", config, self.device))

    def report(self, stitch: Stage | None, finetune: Stage | None, relabel: Stage | None,
               scored: list[tuple[int, str, Stage, Stage]]) -> Stage:
        exp = self.exp
        reads = {"report": exp.report, "evaluate": [evaluate.dir.fingerprint for *_, evaluate in scored],
                 "relabel": relabel.dir.fingerprint if relabel else None}
        before = {"stitch": stitch, "finetune": finetune, "relabel": relabel}

        def content() -> tuple[Any, ...]:
            from eval.report import ReportInput, Run
            runs = [Run(seed, arm, evaluate.dir.path, generate.dir.path) for seed, arm, generate, evaluate in scored]
            counts = {name: stage.dir.result() for name, stage in before.items() if stage}
            given = ReportInput(name=exp.name, config=exp.model_dump(mode="json", exclude_defaults=False), arms=exp.arms,
                                styles=list(exp.styles), runs=runs, counts=counts,
                                relabelled=[Path(shard) for shard in _written(relabel)] if relabel else [],
                                environment=environment(), seconds=self._seconds())
            return given, exp.report

        return self._stage("report", "report", reads, [stage for *_, stage in scored], "eval.report:run", content)

    # What they share.

    def _stage(self, verb: str, folder: str, reads: dict[str, Any], needs: Iterable[Stage | None], target: str,
               arguments: Callable[[], tuple[Any, ...]]) -> Stage:
        def work(stage: StageDir) -> dict[str, Any]:
            module, name = target.split(":")  # imported only now: planning must not load torch
            result: dict[str, Any] = getattr(importlib.import_module(module), name)(stage, *arguments())
            return result
        return Stage(verb, StageDir(self.root / folder, reads), work, [need for need in needs if need])

    def _shards(self, patterns: str | list[str] | None, where: str) -> tuple[list[str], list[Any]]:
        """The shards that patterns name, and what tells their versions apart."""
        try:
            urls = expand(patterns or [], where)
            return urls, [identity(url) for url in urls]
        except UserError as error:
            return self._tolerate(error), []

    def _images(self, source: str | list[str], where: str) -> Any:
        """Identity of a folder of images, or of shards."""
        if isinstance(source, str) and Path(source).is_dir():
            return folder_identity(Path(source))
        return self._shards(source, where)[1]

    def _prompts(self) -> list[Any]:
        return self._shards(self.exp.generate.prompts, "generate.prompts")[1]

    def _checkpoint(self, ref: Model, where: str) -> Any:
        """Identity of a checkpoint, and one line now, not hours later, where a folder is not there."""
        try:
            pretrained.find_local(ref, where)
        except UserError as error:
            self._tolerate(error)
        return pretrained.identity(ref)

    def _tolerate(self, error: UserError) -> list[str]:
        if not self.tolerant:
            raise error
        self.missing.append(str(error))
        return []

    @property
    def device(self) -> str:
        if self.exp.device != "auto":
            return self.exp.device
        import torch
        return "cuda" if torch.cuda.is_available() else "cpu"


def _written(stage: Stage | None) -> list[str]:
    """The shards that a stage wrote."""
    return sorted(map(str, stage.dir.path.glob("*.tar"))) if stage else []


def _given_adapter(captioner: Captioner) -> Path | None:
    if captioner.adapter in (None, "none"):
        return None
    path = Path(captioner.adapter)
    if not path.is_dir():
        raise UserError(f"captioner.adapter: no folder at {path}: give a peft adapter folder, or none for the base alone")
    return path


def environment() -> dict[str, str]:
    """Versions and hardware, for the report."""
    import torch
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions,
            "hardware": gpus or f"{os.cpu_count()} CPU cores ({platform.machine()})"}
