"""`recap world …`: the embedded default, drawn and initialised where no hub can be reached."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The embedded default: a drawn world and tiny checkpoints.", no_args_is_help=True)

Out = Annotated[Path, typer.Argument(help="Folder to write to.")]
Size = Annotated[int, typer.Option(help="Side of the square images, in pixels.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn by lot.")]


@app.command()
def draw(
    out: Out,
    num_images: Annotated[int, typer.Option(help="Images to train on, 64 a shard.")] = 256,
    num_eval: Annotated[int, typer.Option(help="Held-out images.")] = 64,
    size: Size = 64,
    seed: Seed = 0,
) -> None:
    """Draw webdataset shards of scenes with bad alt-text and exact descriptions, and prompts."""
    from recap.world.draw import draw as run

    run(out, num_images, size, seed, num_eval)


@app.command()
def init(out: Out, size: Size = 64, seed: Seed = 0) -> None:
    """Write tiny, randomly initialised checkpoints: BLIP-2, Stable Diffusion, DETR, CLIP and a feature network."""
    from recap.world.init import init as run

    run(out, size, seed)
