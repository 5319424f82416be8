"""`recap world …`: the embedded default, drawn and initialised where no hub can be reached."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL import Image

app = typer.Typer(help="The embedded default: a drawn world and tiny checkpoints.", no_args_is_help=True)

Out = Annotated[Path, typer.Argument(help="Folder to write to.")]
Size = Annotated[int, typer.Option(help="Side of the square images, in pixels.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn by lot.")]


@app.command()
def draw(
    out: Out,
    num_train: Annotated[int, typer.Option(help="Images to relabel, and to train the arms on.")] = 2000,
    num_tuning: Annotated[int, typer.Option(help="Images to stitch captions of.")] = 200,
    num_validation: Annotated[int, typer.Option(help="Held-out images to choose settings by.")] = 200,
    num_evaluation: Annotated[int, typer.Option(help="Held-out images to report on; as many prompts.")] = 2000,
    num_reference: Annotated[int, typer.Option(help="Held-out images that FID is measured against.")] = 4000,
    num_base: Annotated[int, typer.Option(help="Images that only the base model is trained on.")] = 0,
    size: Size = 32,
    seed: Seed = 0,
    shard_size: Annotated[int, typer.Option(help="Samples a shard.")] = 250,
) -> None:
    """Draw webdataset shards of scenes with bad alt-text and exact descriptions, and prompts."""
    from recap.world.draw import draw as run

    run(out, num_train, num_tuning, num_validation, num_evaluation, num_reference, num_base, size, seed, shard_size)


@app.command()
def init(
    out: Out,
    untrained: Annotated[bool, typer.Option("--untrained", help="Random weights: where training begins.")] = False,
    size: Annotated[int | None, typer.Option(help="Of untrained ones: side of the images, in pixels.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of untrained ones: of their weights.")] = None,
) -> None:
    """Write the tiny checkpoints: BLIP-2, Stable Diffusion, DETR, CLIP, a feature network, and the reader."""
    from recap.errors import UserError
    from recap.world.base import SIZE
    from recap.world.init import init as write_trained
    from recap.world.init import init_untrained

    if untrained:
        init_untrained(out, SIZE if size is None else size, seed or 0)
    elif (size, seed) == (None, None):
        write_trained(out)
    else:
        raise UserError(f"the trained checkpoints are of {SIZE} pixels: --size and --seed go with --untrained only")


@app.command()
def train_base(
    out: Out,
    part: Annotated[list[str] | None, typer.Option(help="Only this part; may be given again. By default all.")] = None,
    ship: Annotated[bool, typer.Option("--ship", help="Then copy all parts into this package.")] = False,
) -> None:
    """Train the tiny checkpoints, one part after another: hours on two cores. To resume, run the same again.

    Two commands on one folder, with different parts, keep two cores busy. The diffusion models are by far the longest:
    their UNets are trained on a GPU where there is one.
    """
    from recap.world import base

    base.train_base(out, part or base.PARTS)
    if ship:
        base.ship(out)


@app.command()
def check(
    models: Annotated[Path, typer.Option(help="What `recap world init` wrote.")] = Path("runs/world/models"),
    shards: Annotated[Path, typer.Option(help="What `recap world draw` wrote.")] = Path("runs/world/shards"),
    run: Annotated[Path, typer.Option(help="A finished run on them, whose captions are judged.")] = Path("runs/tiny"),
    claim: Annotated[Path, typer.Option(help="The result that has the alt arm's FID.")] = Path("configs/claim.json"),
) -> None:
    """Measure whether the instrument is sound: reader, VAE, expert, captioner, controls. Status 1 if a gate fails."""
    from eval.config import Features
    from eval.features import features, open_network
    from eval.fid import frechet_distance, statistics
    from recap.world.check import check as measure

    network = open_network(Features(model=f"local-dir:{models / 'features'}"), "features", "cpu")

    def fid(pictures: "list[Image.Image]", others: "list[Image.Image]") -> float:
        return frechet_distance(*(statistics(features(each, network, 64)) for each in (pictures, others)))

    gates = measure(models, shards, run, claim, fid)
    raise typer.Exit(0 if all(gate.holds for gate in gates) else 1)


@app.command()
def sheet(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, as `recap generate` fills it.")],
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    models: Annotated[Path, typer.Option(help="What `recap world init` wrote.")] = Path("runs/world/models"),
    num: Annotated[int, typer.Option(help="Pictures, spread evenly over the folder.")] = 100,
) -> None:
    """Show pictures with what the reader sees in each, for a person to check."""
    from recap.errors import UserError
    from recap.world.reader import Reader
    from recap.world.sheet import open_picture
    from recap.world.sheet import sheet as lay_out

    if out.suffix not in (".png", ".jpg") or not out.parent.is_dir():
        raise UserError(f"cannot write {out}: give a .png or .jpg in a folder that exists")
    paths = sorted(folder.glob("*.png"))
    num = min(num, len(paths))
    if num < 1:
        raise UserError(f"no picture to show from {folder}: give a folder of .png files, and --num 1 or more")
    pictures = [open_picture(paths[index * len(paths) // num]) for index in range(num)]
    lay_out(pictures, Reader.open(models / "reader", "cpu").read(pictures)).save(out)
