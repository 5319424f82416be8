"""What is said of a drawn scene: alt-text as bad as the web's, exact descriptions, and references as people write them.

Nothing here shares a sentence with the template that stitches captions: a model must not score by having learnt it.
`recap.world.facts` reads all of it back but `describe_at_length`, which only a language model learns from.
"""

from random import Random

from recap.world.scene import BACKGROUNDS, COLOURS, KINDS, PATTERNS, PLACES, Background, Scene, Shape

ALT_SHARES = {"nothing": 0.40, "one fact": 0.35, "false": 0.15, "whole": 0.10}
"""How often alt-text is of which kind: nothing true of the scene, one true fact, a false one, the whole.

The dial of the embedded experiment: set before any model is trained, and kept. The form (file names, shop talk, site
names, capitals) is that of real web alt-text; the text says as little of a scene as alt-text says of a photo.
"""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MAX_NAMED = 3
"""Shapes that a short reference names; of a fuller scene it says that there are more."""

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
AT = ("at", "in", "near", "on", "to", "towards", "by")
PAUSES = ("", "", ",", ".", ";", ":", " and", " with", " on", " against")
ENGLISH = """
a about above add added after again all alone along already also although an and another any anything anywhere apart
are area around art as at away back be bears because been before behind below beneath beside best between beyond blank
board border both bound bright but by called can canvas card carefully careless cast centre cheerful child clean
cleanly clear close closely cloth colour coloured colours complete corner cover covers crisp cut dark deep design
detail display down draw drawing drawn each edge edges either else empty end even evenly every everything extra faint
far few field figure fill filled filling fills finally find finds fine finish first flat flatly floor form found frame
framed free fresh from front full further geometric give given glossy gone good graphic ground half hand handmade has
have he heavy her here his hold home house how however if image in inside instead is it item its itself just keep kept
kind known last later layer lettering lie lies light like line lines lit look looks lying made make makes many mark
marks matt may middle modern more most motif much name near nearly neat neither never new next nice no nobody none nor
not nothing now object objects of off old on once only onto open or other others our out outline outlines outside over
own page paint painted painting paper part parts pattern people person photo picture piece place placed plainly please
poster print put quiet quite rather really rest rests room row same scene see seems seen set shade shadow shadows
shape shaped shapes sharp sharply sheet show showing shown shows side sides sign simple simply single sit sits sky
slightly smooth so soft solid some somebody someone something space stand stands stay stays still strong style subject
such surface table take taken tall than that the their them then there these they thin thing things this those through
to together tone too touch towards under uneven unlike until up upon us used very view viewer visible wall was we well
were what where which while whole whose wide with within without words work world writing written you your
"""
OTHER_WORDS = ENGLISH.split()
"""They say nothing of a scene: no numbers are among them, and no words for what a shape or a background is like."""


# --- alt-text ------------------------------------------------------------------------------------------------------


def alt_text(scene: Scene, rng: Random) -> tuple[str, str]:
    """Draw a kind of alt-text by ALT_SHARES, and a text of that kind: `("one fact", "Red circle vector | iStok")`."""
    kind = rng.choices(list(ALT_SHARES), list(ALT_SHARES.values()))[0]
    if kind == "nothing":
        return kind, _shop_talk(rng)
    if kind == "whole":
        return kind, clean_alt_text(scene)
    fact = _true_fact(scene, rng) if kind == "one fact" else _false_fact(scene, rng)
    return kind, _dressed(fact, rng)


def clean_alt_text(scene: Scene) -> str:
    """Alt-text with the dial at `whole`: everything, as terse as a careful webmaster's.

    `small red circle top left, large blue bar bottom, striped grey background`.
    """
    return ", ".join([f"{shape.full_name} {shape.place}" for shape in scene.shapes] + [scene.background.name])


def careful_alt_text(scene: Scene, rng: Random) -> str:
    """The same in one of the ways in which careful people write it."""
    background = scene.background
    ground = f"{background.pattern} {background.colour}"
    named = [(shape.full_name, shape.place) for shape in rng.sample(scene.shapes, len(scene.shapes))]
    return rng.choice((
        clean_alt_text(scene),
        f"{background.name} with {', '.join(f'{name} ({place})' for name, place in named)}",
        f"{', '.join(f'{place}: {name}' for name, place in named)}; {background.name}",
        f"{_joined([f'a {name} on the {place}' for name, place in named])}, {background.name}",
        f"shapes on {ground}: {' + '.join(f'{name} {place}' for name, place in named)}",
        f"Drawing: {'; '.join(f'one {name}, {place} part' for name, place in named)}. Paper: {ground}.",
        f"{_capital(_article(ground))} page shows "
        f"{_joined([f'a {name} in its {place} part' for name, place in named])}.",
        f"{' '.join(f'There is a {name} to the {place}.' for name, place in named)} They are drawn on {ground}.",
    ))


def careful_prose(scene: Scene, rng: Random) -> str:
    """The same among other words that say nothing of the scene, as most sentences have them; in no sentence's form."""
    first = rng.random() < 0.4
    placed = [(_phrase(shape, rng), f"{rng.choice(AT)} the {shape.place}")
              for shape in rng.sample(scene.shapes, len(scene.shapes))]
    shapes = [f"{place} {phrase}" if first else f"{phrase} {place}" for phrase, place in placed]
    ground = rng.choice((scene.background.name, f"{scene.background.pattern} {scene.background.colour}"))
    said = [_article(ground), *shapes] if rng.random() < 0.5 else [*shapes, _article(ground)]
    return "".join(f"{part}{rng.choice(PAUSES)} {_other_words(rng)}" for part in ["", *said]).strip(" ,;")


def _other_words(rng: Random) -> str:
    """None to nine words in no order."""
    return "".join(f"{word} " for word in rng.sample(OTHER_WORDS, rng.choice((0, 0, 1, 2, 3, 5, 9))))


def _shop_talk(rng: Random) -> str:
    return rng.choice((*TALK, *FILES)).format(
        item=rng.choice(ITEMS), seller=rng.choice(SELLERS), size=rng.choice("SML"), year=rng.randint(2009, 2023),
        count=rng.randint(1, 9), number=rng.randint(1000, 9999))


def _true_fact(scene: Scene, rng: Random) -> str:
    shape = rng.choice(scene.shapes)
    return rng.choice((shape.kind, shape.name, scene.background.name))


def _false_fact(scene: Scene, rng: Random) -> str:
    """Something that can be seen to be wrong: a kind, a name or a background that the scene does not have."""
    kinds, colours = {s.kind for s in scene.shapes}, {s.colour for s in scene.shapes}
    kind = rng.choice([kind for kind in KINDS if kind not in kinds] or list(KINDS))
    names, shown = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS], {s.name for s in scene.shapes}
    name = rng.choice([name for name in names if not set(name.split()) <= colours | kinds]
                      or [name for name in names if name not in shown])  # six shapes may show all colours and kinds
    background = Background(rng.choice([name for name in BACKGROUNDS if name != scene.background.colour]),
                            rng.choice([name for name in PATTERNS if name != scene.background.pattern]))
    return rng.choice((kind if kind not in kinds else name, name, background.name))


def _dressed(fact: str, rng: Random) -> str:
    """A fact as the web would give it: alone, in capitals, or with a seller's name."""
    forms = (fact, fact.title(), f"{fact.title()} {rng.choice(ITEMS)}", f"{fact} | {rng.choice(SELLERS)}",
             f"{fact.replace(' ', '-')}-{rng.randint(10, 99)}", f"{fact.capitalize()} vector icon")
    return rng.choice(forms)


# --- exact descriptions --------------------------------------------------------------------------------------------


def describe(scene: Scene, rng: Random) -> str:
    """An exact description: size, colour, kind and place of every shape, and the background."""
    background, first = _article(scene.background.name), _phrase(scene.shapes[0])
    placed = [f"{_phrase(shape)} at the {shape.place}" for shape in scene.shapes]
    if len(placed) == 1:
        return rng.choice((
            f"{_capital(first)} sits at the {scene.shapes[0].place} of {background}.",
            f"On {background}, {first} has been drawn at the {scene.shapes[0].place}.",
            f"{_capital(placed[0])} stands alone on {background}.",
        ))
    return rng.choice((
        f"{_capital(_joined(placed))} share {background}.",
        f"On {background} stand {NUMBERS[len(placed)]} shapes: {_joined(placed)}.",
        f"{_capital(_joined(placed))} have been drawn on {background}.",
    ))


def describe_at_length(scene: Scene, rng: Random) -> str:
    """An exact description, then more that is true: how two shapes lie, how many there are of each kind, the ground.

    What a language model has read that knows plain English; in sentences that no caption is stitched of.
    """
    background = scene.background
    number = len(scene.shapes)
    more = [f"In this image are {_joined(_counted_kinds(scene))}, {NUMBERS[number]} objects in all." if number > 1
            else f"In this image is one object only, a {scene.shapes[0].kind}.",
            f"Most of the picture, in the centre and on several sides, shows a {background.pattern} ground filling it.",
            *(_how_they_lie(rng.sample(scene.shapes, 2), rng) for _ in range(3) if number > 1)]
    return " ".join([describe(scene, rng), *rng.sample(more, min(len(more), rng.randint(1, 3)))])


def _counted_kinds(scene: Scene) -> list[str]:
    """`two red circles` is not said, but `two circles, a bar`."""
    kinds = [shape.kind for shape in scene.shapes]
    return [f"{NUMBERS[number]} {kind}{'es' if kind.endswith('s') else 's'}" if (number := kinds.count(kind)) > 1
            else f"a {kind}" for kind in dict.fromkeys(kinds)]


def _how_they_lie(two: list[Shape], rng: Random) -> str:
    """`To the left of the large blue bar lies the small red ring.` Of two ways that both hold, either."""
    one, other = two
    (x, y), (other_x, other_y) = PLACES[one.place], PLACES[other.place]
    ways = [way for way, holds in (("to the left of", x < other_x), ("to the right of", x > other_x),
                                   ("above", y < other_y), ("below", y > other_y)) if holds]
    way = rng.choice(ways)
    return rng.choice((f"{_capital(way)} the {other.full_name} lies the {one.full_name}.",
                       f"Here the {one.full_name} lies {way} the {other.full_name}.",
                       f"It is {way} the {other.full_name} that the {one.full_name} is seen."))


# --- references ----------------------------------------------------------------------------------------------------


def reference_short(scene: Scene, rng: Random) -> str:
    """A few words, as a person would caption it: colours and kinds, sometimes the background, never places."""
    shapes = rng.sample(scene.shapes, min(len(scene.shapes), MAX_NAMED))
    named = [_article(shape.name) for shape in shapes]
    text = _joined([*named, "more shapes"] if len(shapes) < len(scene.shapes) else named)
    background = scene.background
    return rng.choice((f"picture with {text}", f"{text} on {background.colour}",
                       f"{text} over {_article(background.name)}", f"{_capital(text)}, drawn flat"))


def reference_long(scene: Scene, rng: Random) -> str:
    """One or two sentences with every shape and its place, in one of several voices."""
    background = scene.background
    ground = rng.choice((_article(background.name), f"a canvas that is {background.pattern} and {background.colour}",
                         f"{background.pattern} {background.colour}"))
    phrases = [(_phrase(shape, rng), shape.place) for shape in scene.shapes]
    after = _joined([f"{phrase} {rng.choice(('in', 'near'))} the {place}" for phrase, place in phrases])
    before = "; ".join(f"{rng.choice(('in the', 'up in the' if 'top' in place else 'down in the'))} {place}, {phrase}"
                       for phrase, place in phrases)
    return rng.choice((
        f"{_capital(after)}, all against {ground}.",
        f"{_capital(before)}. Behind it all lies {ground}.",
        f"Somebody drew {after}. The ground is {ground}.",
        f"We see {ground} here, and on it {after}.",
    ))


RICH_OPENINGS = (
    "{ground} covers this small drawing from edge to edge, and {count} drawn on top, without outlines or shadows.",
    "In this flat, evenly lit drawing {count} placed on {ground_lower}, with nothing written on it and no frame.",
    "Someone filled the whole sheet with {ground_lower} first, and then {count} added in strong, even colours.",
)
RICH_SHAPES = (
    "In the {place} there is {phrase}, painted in one even tone with crisp edges.",
    "The {place} belongs to {phrase}, cleanly cut and of a single flat colour.",
    "Near the {place} one finds {phrase}, smooth inside and sharp at its border.",
    "Look to the {place} for {phrase}, which has neither an outline nor a shadow of its own.",
)
RICH_CLOSINGS = (
    "Nothing else can be found anywhere in it.",
    "That is all there is; the rest stays empty.",
    "Apart from that, the drawing is left bare.",
)


def reference_rich(scene: Scene, rng: Random) -> str:
    """A paragraph: a sentence on the ground, one on every shape, one to end."""
    number = len(scene.shapes)
    ground = _article(scene.background.name)
    opening = rng.choice(RICH_OPENINGS).format(
        ground=_capital(ground), ground_lower=ground,
        count=f"{NUMBERS[number]} shapes are" if number > 1 else "one shape is")
    shapes = [rng.choice(RICH_SHAPES).format(place=shape.place, phrase=_phrase(shape, rng))
              for shape in rng.sample(scene.shapes, number)]
    return " ".join([opening, *shapes, rng.choice(RICH_CLOSINGS)])


# --- English -------------------------------------------------------------------------------------------------------


def _phrase(shape: Shape, rng: Random | None = None) -> str:
    """`a small red circle`; of several who write, one in four says little or big."""
    size = shape.size
    if rng and rng.random() < 0.25:
        size = {"small": "little", "large": "big"}[size]
    return f"a {size} {shape.name}"


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _joined(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
