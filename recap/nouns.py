"""Everyday nouns for what can be seen: which mean the same thing, and which are more general than which."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = """
person, human, man, woman, boy, girl, child, kid, toddler, baby, infant, guy, lady, gentleman, male, female, adult
person, teenager, individual, pedestrian, passenger, bystander, spectator, ~couple, ~crowd, ~audience, ~family
person, player, athlete, batter, catcher, umpire, referee, goalie, jockey, swimmer, diver, runner, hiker, climber
person, surfer, skier, snowboarder, skateboarder, skater, cyclist, bicyclist, biker, rider, motorcyclist
person, dancer, singer, musician, guitarist, performer, worker, officer, policeman, firefighter, fireman, soldier
person, cowboy, farmer, fisherman, chef, waiter, waitress, vendor, doctor, nurse, teacher, student, businessman
person, bride, groom, tourist, traveler, customer, ~driver, ~drivers, ~pilot, ~guard, ~team, ~somebody, ~someone

animal, creature
pet < animal
dog, puppy, pup, doggy, hound | cat, kitten, kitty, feline | hamster, guinea pig | bunny, rabbit, hare < pet
horse, pony, foal, mare, stallion | sheep, lamb, ewe, ram | cow, cattle, bull, calf, ox, steer | goat < animal
pig, piglet, hog, boar | donkey, mule | camel | llama, alpaca | deer, fawn, elk, moose, antelope, reindeer < animal
elephant | giraffe | zebra | lion, lioness | tiger | leopard, cheetah, jaguar | wolf | fox | kangaroo < animal
bear, cub, grizzly | polar bear < animal
panda | polar bear < bear
monkey, ape, gorilla, chimpanzee, orangutan | koala | squirrel, chipmunk | rat | mouse | raccoon | otter < animal
dolphin | whale | shark | sea lion, ~seal, ~seals | turtle, tortoise | frog, toad | snake < animal
lizard, gecko, iguana | crocodile, alligator | rhino, rhinoceros | hippo, hippopotamus | hedgehog < animal
snail | crab | octopus | jellyfish | spider | dinosaur | fish, goldfish | insect, ~bug, ~bugs | bird < animal
duck, duckling, mallard | goose, gosling | swan | chicken, hen, rooster, chick | turkey < bird
pigeon, dove | seagull, gull | parrot, parakeet, macaw | owl | eagle, hawk, falcon | penguin | peacock < bird
ostrich | flamingo | heron, egret | stork | pelican | sparrow, finch | crow, raven | woodpecker | hummingbird < bird
butterfly, moth | bee, bumblebee, bumble bee, honeybee, wasp | ant | dragonfly | ladybug | beetle < insect

vehicle
car, automobile, sedan, suv, hatchback | train, locomotive, train car, passenger car, ~subway < vehicle
tram, trolley, streetcar < vehicle
bus, minibus, ~double decker, ~coach | van, minivan | tractor | ambulance | carriage, buggy, wagon, cart < vehicle
truck, pickup truck, lorry, semi-truck, fire truck, firetruck, ~pickup, ~semi | rv, camper, motorhome < vehicle
taxi, taxicab, cab | police car | race car < car
bicycle, bike, ~cycling, ~biking | motorcycle, motorbike, bike, motor bike, motor cycle | moped, vespa < vehicle
boat, ship, canoe, kayak, sailboat, yacht, ferry, rowboat, speedboat, raft, vessel, sail boat, ~ferries < vehicle
airplane, air plane, aeroplane, plane, aircraft, jet, jetliner, airliner, biplane | helicopter, ~chopper < vehicle
scooter, moped, motorcycle | wheelchair | stroller, pram

furniture
chair, armchair, rocking chair, ~seat, ~seats | couch, sofa, loveseat, settee | stool, barstool < furniture
bench, pew | bed, bunk bed, mattress, ~bedding | crib | dresser, chest of drawers, nightstand < furniture
table, desk, dining table, coffee table, tabletop, picnic table, ~counter, ~counters, ~countertop < furniture
counter, countertop, counter top, ~table, ~tables | cabinet, cupboard, wardrobe, cabinetry < furniture
bookshelf, bookcase, ~shelf, ~shelves | shelf, bookshelf, shelving < furniture

food, meal, ~dish, ~dishes, ~lunch, ~dinner, ~breakfast, ~dessert, ~snack, ~meat
fruit | vegetable, veggie, ~produce | pizza, pizza pie | sandwich, panini | hamburger, burger, cheeseburger < food
hot dog, hotdog | donut, doughnut | cake, cupcake | pie | cookie, biscuit | bread, loaf, baguette, bun, bagel < food
pasta, spaghetti, noodle | rice | soup, stew | salad | sushi | taco, burrito | french fry, fries, ~chips < food
cheese | egg, omelet, omelette | bacon | sausage | steak | chicken | fish | shrimp, prawn | candy, ~sweets < food
ice cream, gelato | pancake, waffle | pretzel | popcorn | croissant, ~pastry | peanut, ~nuts | cereal < food
apple | banana | orange, tangerine | lemon, lime | strawberry | grape | cherry | pear < fruit
blueberry, raspberry, blackberry, ~berry, ~berries | peach, apricot | pineapple | watermelon, melon < fruit
mango | kiwi | coconut | avocado | pomegranate < fruit
broccoli | carrot | potato | tomato | onion | cucumber, pickle | lettuce, cabbage, kale, spinach < vegetable
bell pepper, pepper | mushroom | pumpkin, squash, gourd | corn | cauliflower | garlic | eggplant < vegetable

clothing, clothes, ~outfit, ~outfits, ~attire
shirt, t-shirt, tee shirt, blouse, tank top, jersey, polo shirt | sweater, sweatshirt, hoodie, cardigan < clothing
jacket, coat, blazer | vest | dress, gown | skirt | apron | robe, kimono < clothing
pants, trousers, jeans, slacks, ~denim | shorts | suit, tuxedo | tie, necktie | bow tie < clothing
scarf, shawl | hat, sombrero, beanie, fedora, ~cap, ~caps | helmet, hard hat | glove, mitten | sock < clothing
shoe, sneaker, boot, sandal, slipper, ~heels | swimsuit, bikini, bathing suit | wetsuit, wet suit < clothing
uniform, ~jersey | pajamas < clothing

appliance
oven, stove, stovetop, stove top, ~range | microwave, microwave oven | refrigerator, fridge, freezer < appliance
toaster | dishwasher | washing machine, washer | blender | coffee maker, coffee machine, coffeemaker < appliance
vacuum cleaner | hair drier, hair dryer, hairdryer, blow dryer | air conditioner < appliance
microwave < oven
kettle, teapot | ceiling fan | radiator

tv, television, television set, tv set, ~screen, ~monitor | camera | headphones, headset
computer, desktop computer, ~monitor, ~pc, ~desktop | laptop, laptop computer, notebook computer, ~notebook
laptop < computer
computer monitor, ~monitor, ~screen, ~computer | keyboard, ~computer | computer mouse, ~mouse
remote, remote control, controller, game controller, wii remote, wiimote, ~wii | microphone | radio | printer
cell phone, cellphone, phone, smartphone, telephone, mobile phone, iphone, ~mobile | loudspeaker, ~speaker, ~speakers

plant, greenery, foliage, vegetation, shrubbery, ~leaf, ~leaves, ~leafy
tree, ~treetops, ~tree-lined, ~wooded, ~forest, ~woods | bush, shrub, shrubbery | hedge | cactus | ivy, vine < plant
potted plant, houseplant, house plant, flowerpot, flower pot, planter, ~potted, ~plant | moss | fern < plant
palm tree | pine tree, evergreen | christmas tree | forest, woodland, jungle, ~woods, ~wooded, ~trees < tree
flower, blossom, bouquet, ~floral, ~flowery, ~bloom, ~blooms, ~rose, ~roses, ~lily, ~lilies | daisy < plant
sunflower | tulip | orchid | daisy < flower
grass, lawn, ~grassy, ~field, ~meadow | seaweed < plant

building, skyscraper, ~structure
house, cottage, cabin, mansion, ~home, ~homes | church, cathedral, chapel | temple, mosque | castle < building
barn | shed, hut, shack | tower, ~steeple, ~skyscraper | hotel | school | restaurant, cafe, diner | stadium < building
skyscraper | warehouse | windmill | lighthouse, light house | greenhouse | train station, ~station < building
clock tower < tower
kitchen | bathroom, restroom, washroom | bedroom | living room | dining room | hallway, corridor
bridge, overpass | fountain | statue, sculpture, monument, figurine | gazebo

bottle | cup, mug, teacup, tumbler, ~glass, ~glasses | wine glass, wineglass, ~glass, ~glasses | bowl, ~dish, ~dishes
plate, platter, ~dish, ~dishes, ~saucer | frying pan, skillet, saucepan, ~pan, ~pans | vase, ~pot, ~urn | jar
jug, ~pitcher | box, carton, crate, ~cardboard | basket | bucket, pail, ~tub | barrel | tray
trash can, garbage can, dumpster, trash bin, ~trash, ~garbage, ~bin, ~bins
~bag, ~bags | backpack, rucksack, ~pack, ~packs | handbag, purse | suitcase, suit case, luggage, briefcase, ~baggage
shopping bag | plastic bag | paper bag

ball, sports ball, ~baseball, ~basketball, ~football, ~volleyball
soccer ball, tennis ball, beach ball, golf ball, ~soccer, ~tennis < ball
toy | doll
teddy bear, teddy, stuffed bear, ~stuffed, ~toy bear | stuffed animal, stuffed toy, plush toy, ~stuffed, ~plush < toy
teddy bear < stuffed animal
teddy bear < bear
stuffed animal < animal
frisbee, ~disc, ~disk | kite, ~kiting | balloon
skis, pair of skis, ~ski, ~skiing, ~skier, ~skiers | ski pole
snowboard, ~snowboarding, ~snowboarder, ~snowboarders
skateboard, skate board, ~skateboarding, ~skateboarder, ~skateboarders, ~board
surfboard, surf board, ~surfer, ~surfers, ~surfing, ~boogie board, ~board, ~boards
baseball bat, ~bat, ~bats | baseball glove, baseball mitt, catcher mitt, ~mitt, ~glove | glove, baseball glove
tennis racket, tennis racquet, racket, racquet | tennis court, ~court | golf club
baseball field, baseball diamond, ~baseball, ~ballpark | swing set | playground

hammer | screwdriver | shovel, spade | ladder | axe, hatchet | chainsaw | broom, mop | scissors | paintbrush
fork, ~silverware, ~cutlery, ~utensils | knife, ~silverware, ~cutlery, ~utensils | spoon, ladle, ~silverware, ~utensils
chopsticks, chopstick | spatula | cutting board | napkin | candle | lamp, chandelier | pillow, cushion
curtain | rug, carpet, ~mat | blanket, quilt, comforter | towel | mirror, ~mirrored | fireplace
clock, alarm clock | wristwatch, ~watch, ~watches
toilet, toilet bowl, urinal | sink, washbasin, ~basin | faucet | bathtub, bath tub, ~tub, ~bath
toilet paper | toothbrush | toothpaste | hairbrush | teapot | telephone booth, phone booth
book, novel, textbook, ~magazine | magazine | newspaper | pencil, ~pen, ~pens
umbrella, parasol | sunglasses | eyeglasses, ~glasses | necklace | earring | bracelet | mask | balloon
coffee, espresso, latte, cappuccino | wine | beer | guitar | piano | violin | drum | trumpet
gun, rifle, pistol | sword | saddle | bird cage, birdcage | bird feeder | bird house, birdhouse | nest | leash

water, ~watery, ~underwater
ocean, sea, ~waves, ~wave | lake, pond | river, stream, creek, canal | waterfall < water
swimming pool, pool, ~poolside < water
beach, shore, shoreline, coast, seashore, seaside, coastline, ~sand, ~sandy | sand, ~sandy, ~beach | desert
mountain, hill, hillside, mountainside, cliff, ~slope, ~slopes, ~mountainous, ~hilly | snow, ~snowy, ~snow-covered
meadow, pasture, field, ~grassy, ~grass, ~fields | island | rainbow | cloud, ~cloudy | sunset, sunrise
boulder, ~rock, ~rocks, ~rocky, ~stone, ~stones | campfire, bonfire
road, street, highway, avenue, roadway, alley, ~lane, ~intersection | sidewalk, pavement, walkway, ~path, ~pathway
railroad track, train track, railway track, railroad, railway, ~tracks, ~track, ~rails | runway, tarmac
parking lot, car park | fence, railing, ~fenced, ~rail, ~rails | dock, pier, wharf, marina, ~docked
traffic light, stoplight, traffic signal, stop light, street light, ~stop lights, ~signal
street light, streetlight, lamppost, lamp post, street lamp, light pole, traffic light
stop sign | street sign, road sign, traffic sign | billboard < sign
sign, ~signage
fire hydrant, hydrant | parking meter, ~meter, ~meters | mailbox | bus stop | flag | tent
staircase, stairs, stairway, ~steps | door, doorway | window, ~windowed
"""
"""A line of kinds, each with its words, and of what they are all special cases: `duck, duckling | goose < bird`.

The first word names a kind; a kind may stand in several lines, and a word in several kinds. A form after `~` may speak
of the kind or of something else: where it is found it bears the kind out, but it is no claim that the kind is there.
"""
AMBIGUOUS = """
bears taxis ties suits orange lime peach coat coats ram rams steer ski skis snowboards skateboards remote pepper
calf calves cub cabs streams dresses sinks trays counter counters controller controllers box mouse nest male female
adult individual individuals bun buns slacks vessel vessels
"""
"""Forms of the words above that are no claim either: adjectives, verbs, colours, parts of the body."""
IDIOMS = """
bears a, bears an, bears the, bears its, bears his, bears resemblance, the camera, camera angle, couple of, bed of,
flower bed, flower beds, truck bed, power plant, satellite dish, fork in the road, bird eye, bird's-eye, birds eye,
fish eye, worm eye, horse racing, tree line, rain forest, table tennis, zebra crossing, zebra print, leopard print,
fire escape, house number, house numbers, apple logo, mickey mouse, pine cone, pine cones, cat tails, dog tag, hot
plate, bean bag, egg shell, egg white, olive green, forest green, lime green, grass green, lemon yellow, salmon pink,
rose gold, cherry red, cherry wood, sea green, ocean blue, chocolate brown, coffee brown, wine red, water line, water
mark, shell fish, star fish, coat of arms, right hand man, snow white, license plate, license plates, licence plate,
number plate, home plate, water tower, water droplet, water droplets, body of water, bodies of water, cue ball, plant
matter, clock wise, table top, table tops, bus terminal, window sill, window sills, door knob, door frame, pool table,
pool tables, bird bath, side table, end table, baby blue, car seat, cup cake, key board, sea shell, sea shells, corn
dog, corn dogs, dirt road, dirt bike, dirt bikes, school bus, city bus, tour bus, fire place, wind mill, to sign,
volley ball, base ball, at the plate, men's, women's, children's, kids', girls', boys'
"""
"""Runs of words that say nothing for certain of the things their words name."""
COMPOUNDS = """
telephone pole, phone pole, telephone wire, phone wire, telephone line, phone line, telephone cable, phone number, phone
case, phone charger, truck stop, cup holder, bottle cap, bottle opener, pizza cutter, pizza box, banana peel, orange
peel, dog park, dog collar, dog bowl, dog leash, dog house, dog bed, dog food, dog toy, cat food, cat toy, cat tree,
fish bowl, fish tank, horse trailer, car wash, car dealership, train ticket, bus shelter, bus lane, bus ticket, boat
ramp, boat trailer, boat house, bike rack, bike lane, bike path, bike helmet, bicycle rack, bicycle lane, bed sheet, bed
frame, river bed, book store, book bag, mouse pad, knife block, cake pan, toilet brush, toilet seat, laptop
bag, couch potato, oven mitt, fork lift, bear claw, kite shield
"""
"""Things that bear another's name, and are there without it; so are their plurals, of which none is a verb."""
IRREGULAR = {
    "person": "people", "child": "children", "mouse": "mice", "goose": "geese", "ox": "oxen", "calf": "calves",
    "wolf": "wolves", "knife": "knives", "shelf": "shelves", "bookshelf": "bookshelves", "loaf": "loaves",
    "scarf": "scarves", "human": "humans", "sheep": "sheep", "deer": "deer", "fish": "fish", "goldfish": "goldfish",
    "aircraft": "aircraft", "cattle": "cattle", "potato": "potatoes", "tomato": "tomatoes"}
PLURAL_ONLY = {"scissors", "skis", "pants", "trousers", "jeans", "shorts", "slacks", "sunglasses", "eyeglasses",
               "headphones", "clothes", "pajamas", "stairs", "fries", "chopsticks"}
"""Words that are counted in pairs, or not at all."""


@dataclass(frozen=True, slots=True)
class Noun:
    """A form of a noun: singular or plural."""

    lemma: str
    """Its singular."""
    plural: bool = False
    sure: bool = False
    """Whether the form always speaks of one of the kinds."""
    kinds: frozenset[str] = frozenset()
    """What it may be a word for; empty of an idiom."""


@dataclass(frozen=True, slots=True)
class Mention:
    """Where a noun stands among words: from start on, before end."""

    noun: Noun
    start: int
    end: int


def mentions(words: list[str]) -> Iterator[Mention]:
    """The nouns among words in lower case, the longest where one is part of another; idioms are left out."""
    start = 0
    while start < len(words):
        runs = (tuple(words[start:end]) for end in range(min(start + LONGEST, len(words)), start, -1))
        found = next((run for run in runs if run in NOUNS), None)
        if found and NOUNS[found].kinds:
            yield Mention(NOUNS[found], start, start + len(found))
        start += len(found or "1")


def plural_of(lemma: str) -> str:
    """Of the last word: `wine glass` → `wine glasses`."""
    start, space, noun = lemma.rpartition(" ")
    if noun in PLURAL_ONLY:
        return lemma
    if noun in IRREGULAR:
        return f"{start}{space}{IRREGULAR[noun]}"
    if noun.endswith("man"):
        return f"{lemma[:-3]}men"
    if re.search(r"(?:s|x|z|ch|sh)$", noun):
        return f"{lemma}es"
    return f"{lemma[:-1]}ies" if re.search(r"[^aeiou]y$", noun) else f"{lemma}s"


# --- the lists above, to look things up in -------------------------------------------------------------------------


def _kinds() -> Iterator[tuple[list[str], list[str]]]:
    """The words of every kind, and what it is a special case of."""
    for line in KINDS.strip().splitlines():
        kinds, _, general = line.partition(" < ")
        yield from ((kind.split(", "), general.split(", ") if general else []) for kind in kinds.split(" | ") if kind)


def _nouns() -> dict[tuple[str, ...], Noun]:
    ambiguous = set(AMBIGUOUS.split())
    idioms, compounds = (text.replace("\n", " ").strip().split(", ") for text in (IDIOMS, COMPOUNDS))
    nouns = {idiom: Noun(idiom) for idiom in [*idioms, *compounds, *map(plural_of, compounds)]}
    for words, _ in _kinds():
        kind = words[0].removeprefix("~")
        for word in words:
            lemma, hint = word.removeprefix("~"), word.startswith("~")
            for form in {lemma} if hint else {lemma, plural_of(lemma)}:
                known = nouns.get(form, Noun(lemma))
                nouns[form] = Noun(
                    lemma=known.lemma if hint else lemma,
                    plural=known.plural or (not hint and form == plural_of(lemma)),
                    sure=form not in ambiguous and (known.sure or not hint),
                    kinds=known.kinds | {kind},
                )
    return {tuple(form.split()): noun for form, noun in nouns.items()}


def _wider() -> dict[str, frozenset[str]]:
    general: dict[str, set[str]] = {}
    for words, kinds in _kinds():
        general.setdefault(words[0].removeprefix("~"), set()).update(kinds)

    def closure(kind: str) -> frozenset[str]:
        return frozenset({kind}.union(*(closure(wider) for wider in general[kind])))

    return {kind: closure(kind) for kind in general}


NOUNS = _nouns()
"""Words, as a tuple → the form of a noun that they are, or an idiom."""
LONGEST = max(map(len, NOUNS))
WIDER = _wider()
"""Kind → itself and all that are more general: a duck is a bird, an animal."""
