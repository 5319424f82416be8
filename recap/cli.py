"""The `recap` command. Nothing heavy is imported before a command needs it, so that `recap --help` answers at once."""

import errno
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from recap import __version__
from recap.errors import Stopped, UserError
from recap.progress import is_main
from recap.world.cli import app as world

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Relabel web image shards with good captions, fine-tune text-to-image models on them, "
                       "and show in one report whether it helped.")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The experiment, a TOML file; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[TABLE.KEY=VALUE]…", help="Values that override the file's.")]
Redo = Annotated[
    bool, typer.Option("--redo", help="Delete and make again what was made with other settings or inputs.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the file and print the stages; read no weights, write nothing.")]


@app.command("run")
def run_all(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, redo: Redo = False) -> None:
    """Every stage of an experiment, skipping what is done. To resume, run the same command again."""
    _run(None, config, overrides, dry_run, redo)


app.add_typer(world, name="world")
captioner = typer.Typer(help="What an experiment's captioner is.", no_args_is_help=True)
app.add_typer(captioner, name="captioner")


@captioner.command()
def info(config: ConfigFile, overrides: Overrides = None) -> None:
    """Parameters, and how many of them fine-tuning trains: from the configuration alone, no weights are read."""
    from recap import pipeline
    from recap.captioners.info import info as count
    from recap.captioners.info import table
    from recap.config import load
    exp = load(config, overrides or [], pipeline.Experiment)
    print(f"{exp.captioner.family} {exp.captioner.model}".strip())
    print(table(count(exp.captioner, exp.finetune)))


batch = typer.Typer(help="A chat model's requests as files, for services that answer later and cheaper.",
                    no_args_is_help=True)
app.add_typer(batch, name="batch")


@batch.command("export")
def batch_export(
    config: ConfigFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write requests-000.jsonl and so on to.")],
    overrides: Overrides = None,
) -> None:
    """Write the requests that stitching would send, in the format of OpenAI's batches."""
    from recap import pipeline
    from recap.batch import export
    from recap.config import load
    found = export(load(config, overrides or [], pipeline.Experiment), out)
    cost = f", which can cost {found.most:.2f}" if found.most else ""
    print(f"{found.num_requests} requests{cost}; {found.num_complete} images need none any more")
    for file in found.files:
        print(file)


@batch.command("import")
def batch_import(
    config: ConfigFile,
    answers: Annotated[list[Path], typer.Option("--answers", "-a", help="A file that the service wrote.")],
    overrides: Overrides = None,
) -> None:
    """Keep a service's answers, for `recap stitch` to go on with."""
    from recap import pipeline
    from recap.batch import read
    from recap.config import load
    found = read(load(config, overrides or [], pipeline.Experiment), answers)
    print(", ".join(f"{found.counts[name]} {name}" for name in ("kept", "failed", "unknown", "malformed")))
    if found.why:
        print(f"the first that failed: {found.why}")


def _add_stage(verb: str, summary: str) -> None:
    def command(config: ConfigFile, overrides: Overrides = None, redo: Redo = False) -> None:
        _run(verb, config, overrides, False, redo)
    app.command(verb, help=summary)(command)


_add_stage("stitch", "Write captions from what vision models see in the images.")
_add_stage("finetune", "Tune the captioner on stitched captions.")


@app.command()
def relabel(
    config: ConfigFile, overrides: Overrides = None, redo: Redo = False,
    go_on: Annotated[bool, typer.Option("--go-on", help="Keep finished shards of other settings; relabel the rest.")]
    = False,
    plan: Annotated[bool, typer.Option("--plan", help="Relabel a little, and say what all would take.")] = False,
    price: Annotated[float | None, typer.Option(help="With --plan: of a device for an hour.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="With --plan: how many share the work.")] = 1,
) -> None:
    """Add the captioner's captions to shards."""
    if not plan:
        _run("relabel", config, overrides, False, redo, go_on)
        return
    from recap import pipeline
    from recap.config import load
    from recap.relabel_plan import plan as probe
    print(probe(load(config, overrides or [], pipeline.Experiment), price, devices))


@app.command()
def status(config: ConfigFile, overrides: Overrides = None) -> None:
    """How far a relabelling has got that goes on elsewhere."""
    from recap import pipeline
    from recap.config import load
    from recap.status import status as read
    print(read(pipeline.Plan(load(config, overrides or [], pipeline.Experiment)).root / "relabel"))


@app.command()
def verify(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a relabelled set against its input: keys, bytes, captions, stats."""
    from recap import pipeline
    from recap.config import load
    from recap.verify import run
    exp = load(config, overrides or [], pipeline.Experiment)
    plan = pipeline.Plan(exp)
    print(run(plan.relabel_inputs.urls, plan.relabel_output, exp.relabel, list(exp.styles)))


@app.command()
def caption(
    arguments: Annotated[list[str], typer.Argument(metavar="IMAGE… [TABLE.KEY=VALUE]…",
                                                   help="Paths or URLs; and values that override the file's.")],
    config: ConfigFile,
) -> None:
    """Captions of single images, in every style."""
    from recap import pipeline
    from recap.caption import caption as run
    from recap.caption import tell_apart
    from recap.config import load
    images, overrides = tell_apart(arguments)
    for line in run(load(config, overrides, pipeline.Experiment), images):
        print(line, flush=True)


@app.command()
def show(
    shards: Annotated[list[str], typer.Argument(help="Shards, relabelled or not, or parquets of captions only.")],
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="How many samples.")] = 5,
    key: Annotated[list[str] | None, typer.Option(help="Show the samples of these keys.")] = None,
    only_flagged: Annotated[bool, typer.Option("--only-flagged", help="Those with a caption at fault.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw of samples.")] = 0,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page with the images to this file.")] = None,
) -> None:
    """Captions before and after, and what is said of them."""
    from recap.show import show as run
    print(run(shards, num, key, only_flagged, seed, page, sys.stdout.isatty() and "NO_COLOR" not in os.environ))


@app.command()
def card(
    folder: Annotated[str, typer.Argument(help="Folder or URL that `recap relabel` wrote to.")],
    reference: Annotated[str | None, typer.Option(help="Captions to compare with: a .txt, or shards.")] = None,
    kind: Annotated[str | None, typer.Option(help="Of the reference's captions, e.g. alt.")] = None,
    clip: Annotated[str | None, typer.Option(help="The open_clip model that compares them.")] = None,
    device: Annotated[str, typer.Option(help="Of that model.")] = "cpu",
) -> None:
    """Write the data card of a relabelled set anew."""
    from recap.data_card import make_card
    print(make_card(folder, reference, kind, clip, device))


_add_stage("latents", "Encode the training images once, where train.cache_latents is set.")
_add_stage("train", "Fine-tune Stable Diffusion, once for every seed and arm.")
_add_stage("generate", "Draw the prompts with every arm.")


@app.command()
def reference(
    arguments: Annotated[list[str] | None, typer.Argument(
        metavar="[IMAGES] [TABLE.KEY=VALUE]…", help="A folder of real images, or shards; and values that override the "
                                                    "file's, or the defaults.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The experiment, a TOML file.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to keep what is computed of IMAGES.")]
    = Path("runs/reference"),
    redo: Redo = False,
) -> None:
    """What FID and its like need of real images, computed once: of an experiment's, or of IMAGES."""
    from recap.config import load, tell_apart
    images, overrides = tell_apart(arguments or [])
    if not images:
        _run_file("reference", config, overrides, redo, "a folder of real images")
        return
    from eval.versus import keep_reference
    from recap import pipeline
    if len(images) > 1:
        raise UserError(f"reference: {len(images)} folders were named: give one, or quote a pattern of shards")
    given = [*overrides, f"evaluate.reference={json.dumps(images[0])}"]
    keep_reference(load(config, given, pipeline.Experiment, runs=str(out.parent), name=out.name), redo)


@app.command()
def evaluate(
    arguments: Annotated[list[str] | None, typer.Argument(
        metavar="[A B…] [TABLE.KEY=VALUE]…", help="Folders of images, or diffusers pipelines, the one to compare with "
                                                  "first; and values that override the file's.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The experiment, a TOML file.")] = None,
    reference: Annotated[str | None, typer.Option(help="Real images: a folder, shards, or what `recap reference` "
                                                       "kept.")] = None,
    prompts: Annotated[list[str] | None, typer.Option(help="A file of prompts; once for each.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where figures and report of A, B… go.")]
    = Path("runs/evaluation"),
    redo: Redo = False,
) -> None:
    """Score an experiment's arms; or any images and pipelines, and compare them."""
    from recap.config import load, tell_apart
    places, overrides = tell_apart(arguments or [])
    named = [f"evaluate.reference={json.dumps(reference)}"] if reference else []
    named += [f"generate.prompts={json.dumps(prompts)}"] if prompts else []
    if not places:
        _run_file("evaluate", config, overrides + named, redo, "two folders or more to compare")
        return
    from eval.versus import evaluate as run
    from recap import pipeline
    run(load(config, overrides + named, pipeline.Experiment, runs=str(out.parent), name=out.name), places, redo)


def _run_file(verb: str, config: Path | None, overrides: list[str], redo: bool, instead: str) -> None:
    if config is None:
        raise UserError(f"{verb}: of what? give -c FILE for an experiment, or {instead}")
    _run(verb, config, overrides, False, redo)


@app.command()
def report(
    arguments: Annotated[list[str] | None, typer.Argument(
        metavar="[TABLE.KEY=VALUE]… | RUN…", help="With -c, values that override the file's; else folders of finished "
                                                  "runs, runs/NAME, to compare with the first.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The experiment, a TOML file.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to compare runs; by default in "
                                                                 "runs/compared-NAME-NAME.")] = None,
    redo: Redo = False,
) -> None:
    """Write the report of an experiment, or compare finished runs."""
    runs, overrides = _runs_and_overrides(arguments or [], config, out, redo)
    if config is not None:
        _run("report", config, overrides, False, redo)
        return
    from eval.runs_compared import compare_runs
    print(compare_runs(runs, out))


def _runs_and_overrides(arguments: list[str], config: Path | None, out: Path | None, redo: bool
                        ) -> tuple[list[Path], list[str]]:
    """What `recap report` was given: folders hold no `=`. `UserError` where it is for neither of its two uses."""
    runs, overrides = [Path(each) for each in arguments if "=" not in each], [each for each in arguments if "=" in each]
    if config is None and not arguments:
        raise UserError("report: of what? give -c FILE for one experiment, or folders of finished runs to compare")
    if config is None and overrides:
        raise UserError(f"report: {overrides[0]} overrides a file's value, and no file was named: give -c FILE, or "
                        "folders of finished runs alone")
    if config is not None and runs:
        raise UserError(f"report: {runs[0]} is a folder of a run to compare, and -c {config} writes one experiment's "
                        "report: give one of them")
    if config is not None and out is not None:
        raise UserError("report: --out is for compared runs, and -c writes into its run's own folder: leave --out away")
    if config is None and redo:
        raise UserError("report: --redo is for an experiment's own report: give -c FILE, or leave it away")
    return runs, overrides


def _run(verb: str | None, config: Path, overrides: list[str] | None, dry_run: bool, redo: bool,
         go_on: bool = False) -> None:
    from recap import pipeline
    from recap.config import load
    exp = load(config, overrides or [], pipeline.Experiment)
    if dry_run:
        pipeline.dry_run(exp)
    else:
        pipeline.run(exp, verb, redo, go_on)


@app.command()
def compare(
    config: ConfigFile, overrides: Overrides = None, redo: Redo = False,
    downstream: Annotated[bool, typer.Option("--downstream", help="Train arms on each one's captions, too.")] = False,
) -> None:
    """Tune captioners of several families on the same images, and score them on the same others."""
    from eval.captioners import compare as run
    from recap import pipeline
    from recap.config import load
    run(load(config, overrides or [], pipeline.Experiment), downstream, redo)


@app.command()
def ablate(config: ConfigFile, overrides: Overrides = None, redo: Redo = False) -> None:
    """What each expert is worth: captions stitched without it and from it alone, and captioners tuned on them."""
    from eval.ablation import ablate as run
    from recap import pipeline
    from recap.config import load
    run(load(config, overrides or [], pipeline.Experiment), redo)


@app.command()
def sweep(config: ConfigFile, overrides: Overrides = None, redo: Redo = False) -> None:
    """Search settings of captioner fine-tuning, by grid or TPE. To resume, run the same command again."""
    from recap import pipeline
    from recap.config import load
    from recap.sweep import sweep as run
    run(load(config, overrides or [], pipeline.Experiment), redo)


@app.command()
def config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved configuration: defaults, file and overrides."""
    from recap import pipeline
    from recap.config import load
    print(load(config, overrides or [], pipeline.Experiment).model_dump_json(indent=2))


@app.command()
def pool(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, runs/NAME, of one experiment.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")],
    title: Annotated[str, typer.Option(help="For its readers.")],
    command: Annotated[str, typer.Option(help="How the runs were made, for its readers.")],
) -> None:
    """Pool runs, as on several base models, into one result that `report.beside` shows."""
    from eval.pool import pool as write
    from eval.verdict import for_terminal
    print(for_terminal(write(runs, out, title, command)))


@app.command()
def version() -> None:
    """Print the version."""
    print(f"recap {__version__}")


def fail(message: str) -> NoReturn:
    print(f"recap: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. What the user can mend is one line and status 2; a traceback is a bug."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' plans, which no user can act on
    try:
        app(arguments)
    except UserError as error:
        fail(str(error))
    except Stopped:
        _say_stopped()
        sys.exit(128 + signal.SIGTERM)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # what typer makes of Ctrl-C
            _say_stopped()
        raise
    except Exception as error:
        if not _is_of_the_machine(error):
            raise
        fail(f"{error}: make room or choose another runs=…, and run the same command again")


def _say_stopped() -> None:
    if is_main():
        print("\nrecap: stopped; run the same command again to go on", file=sys.stderr)


def _is_of_the_machine(error: Exception) -> bool:
    """A full disk, or a folder that may not be written; libraries written in Rust say so in their words only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


if __name__ == "__main__":
    main()
