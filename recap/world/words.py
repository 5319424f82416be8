"""What is said of a drawn scene: the exact description, alt-text as bad as the web's, and prompts."""

from random import Random

from recap.world.scene import BACKGROUNDS, COLOURS, KINDS, NUMBERS, PLACES, Scene, Shape, draw_scene

ALT_SHARES = {"nothing": 0.40, "one fact": 0.35, "false": 0.15, "whole": 0.10}
"""How often alt-text is of which kind: nothing true of the scene, one true fact, a false one, the whole.

The dial of the demo's experiment: set before any model is trained, and kept. The form (file names, shop talk, site
names, capitals) is that of real web alt-text; the text says as little of a scene as alt-text says of a photo.
"""

ITEMS = ("Wall Art Print", "Phone Case", "Throw Pillow", "Coffee Mug", "Vinyl Decal", "Tote Bag", "Greeting Card",
         "Clip Art Bundle", "Canvas Poster", "Mouse Pad", "Notebook", "Enamel Pin", "Shower Curtain")
SELLERS = ("ArtMart", "PosterHub", "Etzy", "StockPixels", "DesignBay", "PrintYard", "Wayfair.com", "iStok")
TALK = (
    "{item} | {seller}", "{item} - Free Shipping", "Buy {item} Online", "NEW {item} {number} / IN STOCK",
    "{item} by {seller}", "Best {item} Deals {year}", "{seller} {item} Size {size}", "Modern {item}, Set of {count}",
    "{number} PowerPoint Templates - Slide {count}", "Royalty Free Stock Images", "Abstract Geometric {item} vector",
    "{item}&amp;more from {seller}", "How to choose a {item} ({year})", "{item} image {count}",
)
FILES = (
    "IMG_{number}.JPG", "DSC{number}.jpg", "{year}-{number}_thumb.png", "image{count}.png", "untitled-{count}",
    "{number}_0{count}_l.jpg", "Screenshot {year}-0{count}-1{count} at 1{count}.2{count}.png",
    "banner_{number}_final.png", "https://cdn.{seller}.example/{number}.png",
)


def alt_text(scene: Scene, rng: Random) -> tuple[str, str]:
    """Draw a kind of alt-text by ALT_SHARES, and a text of that kind: `("one fact", "Red circle vector | iStok")`."""
    kind = rng.choices(list(ALT_SHARES), list(ALT_SHARES.values()))[0]
    if kind == "nothing":
        return kind, _shop_talk(rng)
    if kind == "whole":
        return kind, _whole(scene)
    fact = _true_fact(scene, rng) if kind == "one fact" else _false_fact(scene, rng)
    return kind, _dressed(fact, rng)


def _shop_talk(rng: Random) -> str:
    return rng.choice((*TALK, *FILES)).format(
        item=rng.choice(ITEMS), seller=rng.choice(SELLERS), size=rng.choice("SML"), year=rng.randint(2009, 2023),
        count=rng.randint(1, 9), number=rng.randint(1000, 9999))


def _whole(scene: Scene) -> str:
    """Everything, as terse as a careful webmaster's: `small red circle top left, large blue star centre, grey`."""
    objects = ", ".join(f"{s.size} {s.name} {s.place}" for s in scene.shapes)
    return f"{objects}, {scene.background} background"


def _true_fact(scene: Scene, rng: Random) -> str:
    shape = rng.choice(scene.shapes)
    return rng.choice((shape.kind, shape.name, f"{scene.background} background"))


def _false_fact(scene: Scene, rng: Random) -> str:
    """Something that can be seen to be wrong: a kind, a name or a background that the scene does not have."""
    kinds, colours = {s.kind for s in scene.shapes}, {s.colour for s in scene.shapes}
    kind = rng.choice([kind for kind in KINDS if kind not in kinds])
    colour = rng.choice([colour for colour in COLOURS if colour not in colours])
    background = rng.choice([name for name in BACKGROUNDS if name != scene.background])
    return rng.choice((kind, f"{colour} {kind}", f"{background} background"))


def _dressed(fact: str, rng: Random) -> str:
    """A fact as the web would give it: alone, in capitals, or with a seller's name."""
    forms = (fact, fact.title(), f"{fact.title()} {rng.choice(ITEMS)}", f"{fact} | {rng.choice(SELLERS)}",
             f"{fact.replace(' ', '-')}-{rng.randint(10, 99)}", f"{fact.capitalize()} vector icon")
    return rng.choice(forms)


# --- exact descriptions --------------------------------------------------------------------------------------------


def describe(scene: Scene, rng: Random) -> str:
    """An exact description in one to three sentences: size, colour, kind and place of every shape, and the background.

    Its sentences are drawn from several forms, none of which the stitched captions use: it is a reference, and a model
    must not score by having learnt its template.
    """
    background, shapes = scene.background, [_phrase(shape) for shape in scene.shapes]
    where = [_where(shape, rng) for shape in scene.shapes]
    if len(shapes) == 1:
        return rng.choice((
            f"{shapes[0].capitalize()} sits {where[0]} of a plain {background} canvas.",
            f"Against {background}, {shapes[0]} has been drawn {where[0]}.",
            f"{shapes[0].capitalize()} stands alone {where[0]}. Everything around it is {background}.",
        ))
    placed = [f"{shape} {place}" for shape, place in zip(shapes, where, strict=True)]
    return rng.choice((
        f"{_joined(placed).capitalize()} share a plain {background} canvas.",
        f"Against {background} stand {NUMBERS[len(shapes)]} shapes. {_sentence(placed[:1])} {_sentence(placed[1:])}",
        f"{_sentence(placed)} All around them the canvas is {background}.",
    ))


def _phrase(shape: Shape) -> str:
    return f"{'an' if shape.size[0] in 'aeiou' else 'a'} {shape.size} {shape.name}"


def _where(shape: Shape, rng: Random) -> str:
    if shape.place == "centre":
        return rng.choice(("at the centre", "in the very middle"))
    return rng.choice((f"at the {shape.place}", f"in the {shape.place} corner"))


def _joined(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _sentence(placed: list[str]) -> str:
    verb = "is" if len(placed) == 1 else "are"
    return f"There {verb} {_joined(placed)}."


# --- prompts -------------------------------------------------------------------------------------------------------


def prompts(rng: Random, number: int) -> list[str]:
    """Prompts for generation: by turns short, exact, and dense ones of more than 75 CLIP tokens. All differ."""
    forms = (_short_prompt, lambda rng: describe(draw_scene(rng), rng), _dense_prompt)
    found: dict[str, None] = {}
    while len(found) < number:
        found[forms[len(found) % len(forms)](rng)] = None
    return list(found)


def _short_prompt(rng: Random) -> str:
    scene = draw_scene(rng, num_shapes=rng.choice((1, 2)))
    names = _joined([f"{'an' if s.name[0] in 'aeiou' else 'a'} {s.name}" for s in scene.shapes])
    return rng.choice((names, f"{names} on {scene.background}"))


def _dense_prompt(rng: Random) -> str:
    scene = draw_scene(rng, num_shapes=3)
    lines = [f"A plain, evenly lit {scene.background} canvas holds exactly three flat shapes with sharp edges and no "
             f"outlines, and nothing else."]
    for ordinal, shape in zip(("first", "second", "third"), scene.shapes, strict=True):
        x, y = (round(100 * share) for share in PLACES[shape.place])
        lines.append(f"The {ordinal} is {_phrase(shape)} at the {shape.place}: its middle lies {x} percent of the way "
                     f"from the left edge to the right, and {y} percent of the way down from the top.")
    return " ".join(lines)
