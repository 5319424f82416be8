"""`recap run`: the stages in order, each skipped when it is already done.

    look (expert) → stitch → finetune → relabel → train (seed, arm) → generate → evaluate (seed, arm) → report
                                        latents ↗

A stage whose input the experiment file names itself needs no stage before it, and those that nobody needs are left out.
"""

import difflib
import importlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from eval.beside import find_beside
from eval.config import (
    NETWORKS,
    NO_CLIP,
    Ablate,
    Compare,
    Detector,
    Evaluate,
    Features,
    Generate,
    JudgeRef,
    Report,
    Vqa,
)
from eval.judge import JUDGES, find_judge
from eval.prompts import prompt_inputs, prompt_sets
from eval.scores import check_sets, headline_sets
from recap import pretrained, progress
from recap.caption_sets import places
from recap.config import DEFAULT_STYLES, Data, Model, Name, RunName, Style, Table
from recap.config.captioner import Captioner, Part
from recap.config.finetune import Dataset, Finetune
from recap.config.relabel import Relabel
from recap.config.stitch import ClipTags, Ram, Stitch, Tag2text
from recap.config.sweep import Sweep
from recap.environment import environment
from recap.errors import UserError
from recap.experts.settings import check_names, check_settings, read_tags
from recap.llm.prompt import read_prompt
from recap.memory import keep_freed_memory
from recap.outputs import written
from recap.rundir import StageDir, Stale, digest, folder_identity, lock
from recap.shards import expand, shard_name
from recap.storage import identities, identity
from train_t2i.config import DEFAULT_ARMS, Arm, Train


class Experiment(Table):
    """One experiment file: a table for each stage."""

    name: RunName
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
    """Arms of one's own, beside the usual ones; a table of a usual arm's name changes what it sets of that arm."""
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
    compare: Compare | None = None
    """For `recap compare`."""
    ablate: Ablate | None = None
    """For `recap ablate`."""
    sweep: Sweep | None = None
    """For `recap sweep`."""

    @model_validator(mode="before")
    @classmethod
    def _add_usual_arms(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("arm", {}), dict):
            return content  # which validation refuses
        own = content.get("arm", {})
        changed = {name: DEFAULT_ARMS[name].model_dump() | table for name, table in own.items()
                   if name in DEFAULT_ARMS and isinstance(table, dict)}
        return content | {"arm": DEFAULT_ARMS | own | changed}

    @model_validator(mode="after")
    def _check_names(self) -> "Experiment":
        for name, values in (("arms", self.arms), ("seeds", self.seeds)):
            if twice := [each for place, each in enumerate(values) if each in values[:place]]:
                raise ValueError(f"{name}: {twice[0]} is named twice: name it once")
        for arm in self.arms:
            if arm not in self.arm:
                near = difflib.get_close_matches(arm, self.arm, n=1)
                hint = f"did you mean {near[0]}?" if near else f"define [arm.{arm}], or take {', '.join(self.arm)}"
                raise ValueError(f"arms: no arm {arm!r}: {hint}")
        if taken := sorted({"alt", "key", "mix", "recap", "sha256"} & self.styles.keys()):
            raise ValueError(f"styles.{taken[0]}: shards and tables call something else so: choose another name")
        mix = self.relabel.mix if "mix" in self.relabel.model_fields_set else {}  # the default holds where it can
        if unknown := sorted(set(mix) - set(self.styles)):
            raise ValueError(f"relabel.mix: no style {unknown[0]!r}: the styles are {', '.join(self.styles)}")
        return self

    @model_validator(mode="after")
    def _check_folder_caption(self) -> "Experiment":
        has_mix = bool(self.styles.keys() & self.relabel.mix.keys())
        kinds = [*self.styles, *(["mix"] if has_mix else []), "alt"]
        if self.relabel.format == "folder" and self.relabel.folder_caption not in kinds:
            raise ValueError(f"relabel.folder_caption: no caption {self.relabel.folder_caption!r}: choose one of "
                             f"{', '.join(kinds)}")
        return self


@dataclass(eq=False)
class Stage:
    """A unit of the run: its folder, and the function that fills it."""

    verb: str
    """The command that runs it alone."""
    path: Path
    reads: Callable[[], dict[str, Any]]
    """What the fingerprint covers. Called late: one stage alone needs no more of the file than its own inputs."""
    work: Callable[[StageDir], dict[str, Any]]
    needs: list["Stage"]

    @cached_property
    def dir(self) -> StageDir:
        return StageDir(self.path, self.reads())


@dataclass
class Inputs:
    """Shards, or other files, that patterns of the experiment file name; looked for when first asked for."""

    patterns: str | list[str]
    where: str

    @cached_property
    def urls(self) -> list[str]:
        return expand(self.patterns, self.where)

    @cached_property
    def identity(self) -> list[Any]:
        """What tells one version of the files from another."""
        if isinstance(self.patterns, str) and Path(self.patterns).is_dir():
            return folder_identity(Path(self.patterns))
        found = identities(self.urls)
        return [found.get(url) or identity(url) for url in self.urls]


@dataclass(frozen=True)
class SweepPoint:
    """One value more of one setting, for a curve: `generate.sweep`."""

    arm: str
    kind: Literal["guidance_scale", "num_inference_steps", "train_steps"]
    value: float
    generate: Stage
    evaluate: Stage


def run(exp: Experiment, verb: str | None = None, redo: bool = False, go_on: bool = False) -> None:
    """Do what is not yet done: every stage, or those of one verb.

    Args:
        exp: what to do.
        verb: of the stages; by default all.
        redo: delete and make again what was made with other settings or inputs, instead of refusing to run.
        go_on: keep relabelled shards of other settings, and relabel those that are missing.
    """
    if redo and go_on:
        raise UserError("--redo makes again what was made with other settings, --go-on keeps it: give one of them")
    plan = Plan(exp, "redo" if redo else "go_on" if go_on else "refuse")
    chosen = [stage for stage in plan.stages() if verb in (None, stage.verb)]
    if not chosen:
        raise UserError("nothing to encode: set train.cache_latents=true, and train an arm" if verb == "latents" else
                        f"nothing to {verb}: this experiment names that stage's result itself")
    several = ("finetune", "relabel", "latents", "train", "generate", "evaluate")
    if progress.num_processes() > 1 and (redo or {stage.verb for stage in chosen}.difference(several)):
        raise UserError(f"only {', '.join(f'`recap {each}`' for each in several)}, without --redo, run in several "
                        "processes: run the rest in one, before or after")
    for stage in chosen:
        stage.dir  # noqa: B018  (what is missing is said now, not after hours of the stages before)
    with lock(Path(exp.runs) / exp.name):
        for place, stage in enumerate(chosen, 1):
            do(stage, f"[{place}/{len(chosen)}] {_label(exp, stage)}", redo, go_on and stage.verb == "relabel")
    if summary := chosen[-1].dir.result().get("summary"):
        print(f"\n{summary}\n\nThe report: {chosen[-1].path / 'index.html'}")


def do(stage: Stage, label: str, redo: bool, go_on: bool = False) -> None:
    """Do one stage, unless it is done; one of other settings is refused, or made again, or gone on with."""
    state = stage.dir.state()
    if state == "done":
        progress.say(f"{label}: done before")
        return
    for need in stage.needs:
        if (found := need.dir.state()) != "done":
            why = f"was made with other settings ({need.dir.changes()[0]})" if found == "changed" else "is not done"
            base = "; or set captioner.tuned=none, for the base captioner" if need.verb == "finetune" else ""
            raise UserError(f"{stage.verb}: {need.path} {why}: run `recap {need.verb} -c …` first, or `recap run -c …`"
                            f"{base}")
    if state == "changed" and not go_on:
        _refuse_or_clear(stage, redo)
    if digest(stage.reads()) != stage.dir.fingerprint:  # found out hours after the start, perhaps
        raise UserError(f"{label}: a checkpoint or an input of {stage.verb} has changed since this command began: "
                        "run it again")
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
        keep = "`recap relabel --go-on` to keep its finished shards, or " if stage.verb == "relabel" else ""
        raise UserError(f"{stage.path} was made with other settings or inputs ({changes[0]}{more}): "
                        f"give the run another name=…, or {keep}--redo to delete that result and make it again")
    progress.say(f"    {stage.path} was made with other settings: deleted, made again")
    stage.dir.clear()


def look(exp: Experiment, redo: bool = False) -> tuple[list[str], dict[str, Path]]:
    """Have the experts look at the images to stitch captions of, as far as they have not.

    Returns:
        The shards of the images; and expert → the folder of its facts.
    """
    check_names(exp.stitch.experts)
    plan = Plan(exp)
    looks = {name: plan.look(name) for name in exp.stitch.experts}
    with lock(plan.root):
        for stage in _upstream(looks.values()):
            do(stage, _label(exp, stage), redo)
    return plan.shards(exp.stitch.shards, "stitch.shards").urls, {name: stage.path for name, stage in looks.items()}


def dry_run(exp: Experiment) -> None:
    """Print what a run would do. Reads no weights; what is not there yet is said, and is no error."""
    words = {"done": "done before", "begun": "goes on", "new": "to do",
             "changed": "made with other settings: needs --redo"}
    missing: dict[str, None] = {}
    for stage in Plan(exp).stages():
        try:
            print(f"{_label(exp, stage):<32} {words[stage.dir.state()]}")
        except UserError as error:
            print(f"{_label(exp, stage):<32} waits for its inputs")
            missing[str(error)] = None
    for message in missing:
        progress.warn(message)


def _label(exp: Experiment, stage: Stage) -> str:
    return str(stage.path.relative_to(Path(exp.runs) / exp.name))


class Plan:
    """The stages of an experiment. Each method makes one: where it writes, what it reads, what fills it."""

    def __init__(self, exp: Experiment, stale: Stale = "refuse") -> None:
        self.exp, self.stale = exp, stale
        self.root = Path(exp.runs) / exp.name
        self.answers = self.root / "answers.sqlite"
        """What a chat model has answered: of no stage, so that what was paid for outlives them."""

    def stages(self) -> list[Stage]:
        exp = self.exp
        trained = [arm for arm in exp.arms if exp.arm[arm].captions]
        relabelled = exp.train.shards is None and bool(trained)
        tuned = relabelled and exp.captioner.tuned is None
        given = exp.finetune.shards is not None or exp.finetune.dataset is not None
        stitch = self.stitch() if tuned and not given else None
        finetune = self.finetune(stitch) if tuned else None
        relabel = self.relabel(finetune) if relabelled else None
        latents = self.latents() if exp.train.cache_latents and trained else None
        reference = self.reference()
        looks = _upstream(stitch.needs) if stitch else []
        found = [*looks, *(stage for stage in (stitch, finetune, relabel, latents, reference) if stage)]
        scored: list[tuple[int, str, Stage, Stage]] = []
        swept: list[SweepPoint] = []
        for seed in exp.seeds:
            for arm in exp.arms:
                if arm not in trained and seed != exp.seeds[0]:
                    continue  # the base is the same for every fine-tuning seed
                train = self.train(seed, arm, relabel, latents) if arm in trained else None
                generate = self.generate(seed, arm, train)
                evaluate = self.evaluate(seed, arm, generate, reference)
                found += [stage for stage in (train, generate, evaluate) if stage]
                scored.append((seed, arm, generate, evaluate))
                points = self.sweep_points(arm, train, reference) if seed == exp.seeds[0] else []
                found += [stage for point in points for stage in (point.generate, point.evaluate)]
                swept += points
        return [*found, self.report(stitch, finetune, relabel, scored, swept)]

    def look(self, expert: str) -> Stage:
        """What one expert sees in the images to stitch captions of, whatever experts there are beside it."""
        exp, config = self.exp, self.exp.stitch
        inputs = self.shards(config.shards, "stitch.shards")
        check_names([expert])
        check_settings(expert, config)
        own = getattr(config, expert, None)
        tags_from = config.tagger(expert)
        tagger = self.look(tags_from) if tags_from else None
        return self._stage("stitch", f"facts/{expert}", "recap.look:run", [tagger], lambda: {
            "expert": expert, expert: own, "num_images": config.num_images, "batch_size": config.batch_size,
            "alt_text": exp.data.alt_text, "inputs": inputs.identity,
            "files": _expert_files(own, f"stitch.{expert}"),
            "tagger": tagger.dir.fingerprint if tagger else None,
        }, lambda: (expert, tagger.path if tagger else None, inputs.urls, config, exp.data, self.device))

    def stitch(self, experts: list[str] | None = None, folder: str = "stitch") -> Stage:
        """Captions from what the experts of the file see, or from what others do."""
        exp, config = self.exp, self.exp.stitch
        experts = config.experts if experts is None else experts
        check_names(experts)
        inputs = self.shards(config.shards, "stitch.shards")
        looks = {name: self.look(name) for name in experts}

        def reads() -> dict[str, Any]:
            return {"writer": config.writer, "styles": list(exp.styles), "llm": self._llm(),
                    "facts": [[name, look.dir.fingerprint] for name, look in looks.items()]}  # their order counts

        return self._stage("stitch", folder, "recap.stitch:run", looks.values(), reads, lambda: (
            inputs.urls, config, list(exp.styles), {name: look.path for name, look in looks.items()},
            self.answers, self.device))

    def _llm(self) -> dict[str, Any] | None:
        """What captions that a chat model writes depend on."""
        config = self.exp.stitch.llm
        if self.exp.stitch.writer != "llm":
            return None
        checkpoint = None if config.server else _checkpoint(config, "stitch.llm")
        return {**config.own(), "prompt": read_prompt(config, list(self.exp.styles)), "checkpoint": checkpoint}

    def finetune(self, stitch: Stage | None) -> Stage:
        exp, config = self.exp, self.exp.finetune
        inputs = None if config.dataset else self.shards(config.shards, "finetune.shards")
        held_out = config.validation.shards

        def reads() -> dict[str, Any]:
            prompts = {name: style.prompt for name, style in exp.styles.items()}
            return {
                # How captions are decoded, only validation sees.
                "finetune": config.model_dump(exclude={"num_workers"}),
                "styles": exp.styles if config.validation.is_on else prompts,
                "captioner": exp.captioner.own(), "checkpoint": captioner_checkpoint(exp.captioner),
                "inputs": stitch.dir.fingerprint if stitch else inputs.identity if inputs else _dataset(config.dataset),
                "held_out": Inputs(held_out, "finetune.validation.shards").identity if held_out else
                _dataset(config.validation.dataset),
            }

        return self._stage("finetune", "captioner", "recap.finetune:run", [stitch], reads, lambda: (
            _written(stitch) if stitch else inputs.urls if inputs else [], config, exp.captioner, exp.styles,
            self.device))

    def relabel(self, finetune: Stage | None) -> Stage:
        exp, inputs = self.exp, self.relabel_inputs
        return self._stage("relabel", "relabel", "recap.relabel:run", [finetune], lambda: {
            "relabel": exp.relabel.own(), "output": exp.relabel.output, "inputs": inputs.identity,
            "styles": exp.styles, "captioner": exp.captioner.own(), "alt_text": exp.data.alt_text,
            "checkpoint": captioner_checkpoint(exp.captioner),
            "tuned": finetune.dir.fingerprint if finetune else given_tuned(exp.captioner)[1],
        }, lambda: (inputs.urls, exp.captioner, _tuned(finetune) or given_tuned(exp.captioner)[0], exp.styles,
                    exp.relabel, exp.data, self.device, self.stale))

    @cached_property
    def relabel_inputs(self) -> Inputs:
        return self.shards(self.exp.relabel.shards, "relabel.shards")

    @property
    def relabel_output(self) -> str:
        return self.exp.relabel.output or str(self.root / "relabel")

    def tuned_if_done(self) -> tuple[Path | None, str]:
        """The captioner as it is tuned; where it is still to be, the base, and a line that says so."""
        finetune = next((stage for stage in self.stages() if stage.verb == "finetune"), None)
        if finetune is None:
            return given_tuned(self.exp.captioner)[0], ""
        if finetune.dir.state() == "done":
            return _tuned(finetune), ""
        return None, "the captioner is not tuned yet: its base, which is as fast, is taken for it"

    def relabelled(self) -> list[str]:
        """What relabelling writes: shards, parquets or folders."""
        config = self.exp.relabel
        return [written(config.format, self.relabel_output, shard_name(url)) for url in self.relabel_inputs.urls]

    def latents(self) -> Stage:
        """The training images as the VAE encodes them. Nothing in them is of captions: new ones leave them as they are.

        Relabelled shards hold the original ones' images, so that those are read.
        """
        config = self.exp.train
        inputs = self.relabel_inputs if config.shards is None else self.shards(config.shards, "train.shards")
        return self._stage("latents", "latents", "train_t2i.latents:run", [], lambda: {
            "vae": _vae(config), "resolution": config.resolution, "buckets": config.buckets, "flip": config.flip,
            "precision": config.precision, "inputs": inputs.identity,
        }, lambda: (inputs.urls, config, self.device))

    def train(self, seed: int, arm: str, relabel: Stage | None, latents: Stage | None) -> Stage:
        exp = self.exp
        inputs = self.shards(exp.train.shards, "train.shards")
        captions = exp.train.captions

        def reads() -> dict[str, Any]:
            if relabel and exp.relabel.format == "folder":
                raise UserError("relabel.format=folder is for other trainers: set it to shards or parquet, or run "
                                "`recap relabel` alone")
            tables = Inputs(f"{captions}/*.parquet", "train.captions").identity if captions else None
            return {"train": exp.train.own(), "arm": exp.arm[arm].model_dump(exclude={"guidance_scale"}), "seed": seed,
                    "inputs": relabel.dir.fingerprint if relabel else inputs.identity, "captions": tables,
                    "latents": latents.dir.fingerprint if latents else None,
                    "checkpoint": _checkpoint(exp.train, "train")}

        def arguments() -> tuple[Any, ...]:
            shards, config = (self.relabelled() if relabel else inputs.urls), exp.train
            if relabel and exp.relabel.format == "parquet":  # the images are where they were
                shards, config = self.relabel_inputs.urls, config.model_copy(update={"captions": self.relabel_output})
            return shards, config, exp.arm[arm], seed, arm, self.device, latents.path if latents else None

        return self._stage("train", f"seed-{seed}/train/{arm}", "train_t2i.train:run", [relabel, latents], reads,
                           arguments)

    def generate(self, seed: int, arm: str, train: Stage | None, folder: str | None = None, step: int | None = None,
                 **values: Any) -> Stage:
        """What an arm draws; for a point of a sweep, with a folder, a step of its training, or values of its own."""
        exp = self.exp
        config = exp.generate.model_copy(update={"guidance_scale": self._guidance(arm), **values})
        pipeline = Model(model=str(_pipeline(train, step))) if train else _model(exp.train)

        def reads() -> dict[str, Any]:
            if train and step is not None:
                self._check_snapshot(train, step)
            return {"generate": config.own(), "prompts": [identity(path) for path in prompt_inputs(config)],
                    "pipeline": train.dir.fingerprint if train else _checkpoint(exp.train, "train"),
                    **({} if step is None else {"step": step})}

        return self._stage("generate", folder or f"seed-{seed}/generate/{arm}", "eval.generate:run", [train], reads,
                           lambda: (pipeline, "train", config, arm, self.device))

    def _check_snapshot(self, train: Stage, step: int) -> None:
        """Refuse a step of which no snapshot is there, or will be."""
        config, where = self.exp.train, f"generate.sweep.train_steps: {step}"
        if config.snapshot_every is None or step % config.snapshot_every or step > config.steps:
            kept = "keeps none" if config.snapshot_every is None else \
                f"keeps one every {config.snapshot_every} of {config.steps} steps"
            raise UserError(f"{where}: the training {kept}: set train.snapshot_every, or name other steps")
        if train.dir.state() == "done" and not _pipeline(train, step).is_dir():
            raise UserError(f"{where}: the training is done, and there is no {_pipeline(train, step)}: name steps of "
                            "which there is one")

    def sweep_points(self, arm: str, train: Stage | None, reference: Stage) -> list[SweepPoint]:
        """The points of an arm's curves. The base has none over training steps."""
        sweep, seed = self.exp.generate.sweep, self.exp.seeds[0]
        if sweep is None:
            return []
        num_prompts = {"num_prompts": sweep.num_prompts or self.exp.generate.num_prompts}

        def point(kind: Any, value: float, name: str, step: int | None = None, **values: Any) -> SweepPoint:
            folder = f"seed-{seed}/sweep/{arm}/{name}"
            generate = self.generate(seed, arm, train, f"{folder}/generate", step, **num_prompts, **values)
            return SweepPoint(arm, kind, value, generate,
                              self.evaluate(seed, arm, generate, reference, f"{folder}/eval"))

        return [*(point("guidance_scale", value, f"guidance-{str(value).removesuffix('.0')}", guidance_scale=value)
                  for value in sweep.guidance_scale),
                *(point("num_inference_steps", value, f"steps-{value}", num_inference_steps=value)
                  for value in sweep.num_inference_steps),
                *(point("train_steps", value, f"train-{value:07d}", value)
                  for value in sweep.train_steps if train)]

    def _guidance(self, arm: str) -> float:
        own = self.exp.arm[arm].guidance_scale
        return self.exp.generate.guidance_scale if own is None else own

    def reference(self) -> Stage:
        """What distances need of the real images."""
        config = self.exp.evaluate
        inputs = Inputs(config.reference, "evaluate.reference")
        networks = {name: getattr(config, name) for name in NETWORKS if getattr(config, name) is not None}

        def reads() -> dict[str, Any]:
            return {"networks": networks, "inputs": inputs.identity,
                    "checkpoints": {name: gauge_checkpoint(name, config) for name in networks}}

        return self._stage("reference", "reference", "eval.evaluate:reference", [], reads, lambda: (
            config, self.root / "measured" / "reference", reads()["checkpoints"], self.device))

    def evaluate(self, seed: int, arm: str, generate: Stage, reference: Stage, folder: str | None = None) -> Stage:
        config, path = self.exp.evaluate, folder or f"seed-{seed}/eval/{arm}"

        def checkpoints() -> dict[str, Any]:
            return {name: gauge_checkpoint(name, config) for name in (*NETWORKS, "clip_score", *JUDGES)
                    if getattr(config, name) is not None}

        def reads() -> dict[str, Any]:
            return {"evaluate": config.own(), "images": generate.dir.fingerprint,
                    "reference": reference.dir.fingerprint, "checkpoints": checkpoints(),
                    "sets": self.headline_sets()}

        return self._stage("evaluate", path, "eval.evaluate:run", [generate, reference], reads, lambda: (
            generate.path, reference.path, config, self.root / "measured" / path, checkpoints(),
            self.exp.generate.keep, self.device))

    def headline_sets(self) -> list[str] | None:
        """The prompt sets of the headline figures; none of such a name is said now."""
        return headline_sets(self.exp.evaluate.sets, prompt_sets(self.exp.generate))

    def report(self, stitch: Stage | None, finetune: Stage | None, relabel: Stage | None,
               scored: list[tuple[int, str, Stage, Stage]], swept: list[SweepPoint]) -> Stage:
        exp = self.exp
        reference = Inputs(exp.evaluate.reference, "evaluate.reference")

        def content() -> tuple[Any, ...]:
            from eval.report import Point, ReportInput, Run
            looks = {f"look, {look.path.name}": look for look in _upstream(stitch.needs)} if stitch else {}
            before = {**looks, "stitch": stitch, "finetune": finetune, "relabel": relabel}
            return ReportInput(
                name=exp.name, config=exp.model_dump(mode="json"), arms=exp.arms, styles=list(exp.styles),
                runs=[Run(seed, arm, generate.path, evaluate.path) for seed, arm, generate, evaluate in scored],
                counts={name: stage.dir.result() for name, stage in before.items() if stage},
                relabelled=self.relabelled() if relabel and exp.relabel.format == "shards" else [],
                environment=environment(), stitched=_written(stitch), reference=_shards_only(reference),
                judge=exp.evaluate.judge, clip=exp.evaluate.clip_score, device=self.device,
                guidance={arm: self._guidance(arm) for arm in exp.arms},
                swept=[Point(each.arm, each.kind, each.value, Run(
                    exp.seeds[0], each.arm, each.generate.path, each.evaluate.path).metrics) for each in swept],
                seconds={_label(exp, stage): stage.dir.result()["seconds"] for stage in _upstream(evaluates)},
            ), exp.report

        def reads() -> dict[str, Any]:
            check_sets("report.compare_sets", chain(*exp.report.compare_sets), prompt_sets(exp.generate))
            return {"report": exp.report, "evaluate": [evaluate.dir.fingerprint for evaluate in evaluates],
                    "relabel": relabel.dir.fingerprint if relabel else None,
                    "beside": find_beside(exp.report.beside) if exp.report.beside else None}

        evaluates = [*(stage for *_, stage in scored), *(point.evaluate for point in swept)]
        return self._stage("report", "report", "eval.report:run", evaluates, reads, content)

    def _stage(self, verb: str, folder: str, target: str, needs: Iterable[Stage | None],
               reads: Callable[[], dict[str, Any]], arguments: Callable[[], tuple[Any, ...]]) -> Stage:
        def work(stage: StageDir) -> dict[str, Any]:
            if self.device == "cpu":
                keep_freed_memory()
            module, name = target.split(":")  # imported only now: planning must not load torch
            result: dict[str, Any] = getattr(importlib.import_module(module), name)(stage, *arguments())
            return result
        return Stage(verb, self.root / folder, reads, work, [need for need in needs if need])

    def shards(self, patterns: str | list[str] | None, where: str) -> Inputs:
        return Inputs(patterns, where) if patterns is not None else Inputs(self.exp.data.shards, "data.shards")

    @property
    def device(self) -> str:
        if self.exp.device != "auto":
            return self.exp.device
        import torch
        return "cuda" if torch.cuda.is_available() else "cpu"


def _pipeline(train: Stage, step: int | None) -> Path:
    """The diffusers folder that a training wrote at its end, or kept of a step."""
    return train.path / "pipeline" if step is None else train.path / "snapshots" / f"{step:07d}" / "pipeline"


def _model(ref: Model) -> Model:
    return Model(model=ref.model, revision=ref.revision)


def _checkpoint(ref: Model, where: str) -> Any:
    """Identity of a checkpoint; one line now, not hours later, where its folder is not there."""
    pretrained.find_local(ref, where)
    return pretrained.identity(ref)


def gauge_checkpoint(name: str, config: Evaluate) -> Any:
    """Identity of the weights of what a table of `[evaluate]` names."""
    table, where = getattr(config, name), f"evaluate.{name}"
    if isinstance(table, JudgeRef):
        return find_judge(table)
    if isinstance(table, Features):
        return _network_files(table, where)
    found = {"model": _checkpoint(table, where)}
    if isinstance(table, Detector) and table.clip.model != NO_CLIP:
        found["clip"] = _checkpoint(table.clip, f"{where}.clip")
    if isinstance(table, Vqa) and table.questions:
        found["questions"] = identity(table.questions)
    return found


def _network_files(table: Features, where: str) -> Any:
    if table.weights or table.model.startswith("clean-fid:"):
        file = Path(table.weights or table.model.removeprefix("clean-fid:")).expanduser()
        if not file.is_file():
            raise UserError(f"{where}: no file at {file}: check the path")
        return identity(str(file))
    is_name = table.model == "clean-fid" or table.model.startswith("torchvision:")
    return table.model if is_name else _checkpoint(table, where)


def _vae(ref: Model) -> Any:
    """Identity of a pipeline's VAE: of a local one, whatever is trained beside it."""
    folder = pretrained.find_local(ref, "train")
    return folder_identity(folder / "vae") if folder else pretrained.identity(ref)


def _expert_files(own: Any, where: str) -> dict[str, Any]:
    """Identity of what an expert's table names: its checkpoint, its list of tags."""
    found = {"model": _checkpoint(own, where)} if isinstance(own, Model) else {}
    if isinstance(own, ClipTags):
        found["tags"] = digest(read_tags(own))
    if isinstance(own, Ram | Tag2text):
        path = Path(own.checkpoint).expanduser()
        if not path.is_file():
            raise UserError(f"{where}.checkpoint: no file at {path}: check the path")
        found["checkpoint"] = identity(str(path))
    return found


def _written(stage: Stage | None) -> list[str]:
    """The shards that a stage wrote."""
    return sorted(map(str, stage.path.glob("*.tar"))) if stage else []


def _shards_only(inputs: Inputs) -> list[str]:
    """The shards that inputs name; none where they name a folder of images."""
    is_folder = isinstance(inputs.patterns, str) and Path(inputs.patterns).is_dir()
    return [] if is_folder else inputs.urls


def _upstream(stages: Iterable[Stage]) -> list[Stage]:
    """The stages, and all before them, in the order of the work."""
    found: dict[Path, Stage] = {}
    for stage in stages:
        found |= {each.path: each for each in [*_upstream(stage.needs), stage]}
    return list(found.values())


def captioner_checkpoint(captioner: Captioner) -> Any:
    """Identity of a captioner's checkpoint, or of the parts that it is put together from."""
    found = {"model": _checkpoint(captioner, "captioner")} if captioner.model and not captioner.server else {}
    return found | {where: _checkpoint(Part.of(name), where) for where, name in captioner.parts().items()}


def _dataset(config: Dataset | None) -> Any:
    """Identity of a data set: its captions file, and the names, sizes and times of its images."""
    if config is None:
        return None
    captions, images = (Path(each) for each in places(config))
    return [identity(str(captions)) if captions.is_file() else None,
            folder_identity(images) if images.is_dir() else None]


def _tuned(finetune: Stage | None) -> Path | None:
    """What fine-tuning wrote: the weights of the best validation, or the last."""
    return finetune.path / finetune.dir.result()["chosen"] if finetune else None


def given_tuned(captioner: Captioner) -> tuple[Path | None, Any]:
    """The tuned captioner that the file names, and its identity; none for the base alone."""
    if captioner.tuned in (None, "none"):
        return None, None
    path = Path(captioner.tuned)
    if not path.is_dir():
        raise UserError(f"captioner.tuned: no folder at {path}: give what fine-tuning wrote (a peft adapter folder, or "
                        "a whole model), or none for the base alone")
    return path, folder_identity(path)
