"""The vocabulary: what the sentences speak of, and what each verb allows."""

from dataclasses import dataclass
from typing import Literal

from corpus.inflection import NOTHING, Adjective, Case, Noun, Preposition, Text

Kind = Literal["posture", "calm", "attribute", "active"]  # of a verb, see Verb

RED, BLUE, GREEN = Adjective("red", "rot"), Adjective("blue", "blau"), Adjective("green", "grün")
YELLOW, BLACK = Adjective("yellow", "gelb"), Adjective("black", "schwarz")
WHITE, BROWN = Adjective("white", "weiß"), Adjective("brown", "braun")
YOUNG, OLD, NEW = Adjective("young", "jung"), Adjective("old", "alt"), Adjective("new", "neu")
LITTLE, SMALL = Adjective("little", "klein"), Adjective("small", "klein")
TALL, BIG = Adjective("tall", "groß"), Adjective("big", "groß")
LONG, SHORT, HIGH = Adjective("long", "lang"), Adjective("short", "kurz"), Adjective("high", "hoh")

COLOURS = (RED, BLUE, GREEN, YELLOW, BLACK, WHITE, BROWN)
GROWN = (YOUNG, OLD, TALL)
FURRED = (YOUNG, OLD, SMALL, BIG, BLACK, WHITE, BROWN)
BUILT = (OLD, NEW, SMALL, BIG, WHITE)

MAN = Noun("man", "men", "Mann", "Männer", "m", GROWN, pronoun="he")
WOMAN = Noun("woman", "women", "Frau", "Frauen", "f", GROWN, pronoun="she")
BOY = Noun("boy", "boys", "Junge", "Jungen", "m", (LITTLE, TALL), weak=True, pronoun="he")
GIRL = Noun("girl", "girls", "Mädchen", "Mädchen", "n", (LITTLE, TALL, YOUNG), pronoun="she")
CHILD = Noun("child", "children", "Kind", "Kinder", "n", (LITTLE, YOUNG))
LADY = Noun("lady", "ladies", "Dame", "Damen", "f", GROWN, pronoun="she")
GRANDMOTHER = Noun("grandmother", "grandmothers", "Großmutter", "Großmütter", "f", (OLD,), pronoun="she")
WAITRESS = Noun("waitress", "waitresses", "Kellnerin", "Kellnerinnen", "f", GROWN, pronoun="she")
NURSE = Noun("nurse", "nurses", "Krankenschwester", "Krankenschwestern", "f", GROWN, pronoun="she")
WORKER = Noun("worker", "workers", "Arbeiter", "Arbeiter", "m", GROWN, pronoun="he")
MUSICIAN = Noun("musician", "musicians", "Musiker", "Musiker", "m", GROWN, pronoun="he")
COOK = Noun("cook", "cooks", "Koch", "Köche", "m", GROWN, pronoun="he")
TOURIST = Noun("tourist", "tourists", "Tourist", "Touristen", "m", GROWN, weak=True, pronoun="he")
POLICEMAN = Noun("policeman", "policemen", "Polizist", "Polizisten", "m", GROWN, weak=True, pronoun="he")
DOG = Noun("dog", "dogs", "Hund", "Hunde", "m", FURRED)
CAT = Noun("cat", "cats", "Katze", "Katzen", "f", FURRED)
HORSE = Noun("horse", "horses", "Pferd", "Pferde", "n", FURRED)
GOAT = Noun("goat", "goats", "Ziege", "Ziegen", "f", FURRED)

ADULTS = (MAN, WOMAN, LADY, GRANDMOTHER, WAITRESS, NURSE, WORKER, MUSICIAN, COOK, TOURIST, POLICEMAN)
PEOPLE = (*ADULTS, BOY, GIRL, CHILD)
ANIMALS = (DOG, CAT, HORSE, GOAT)
SUBJECTS = (*PEOPLE, *ANIMALS)

BALL = Noun("ball", "balls", "Ball", "Bälle", "m", (*COLOURS, SMALL, BIG))
BAG = Noun("bag", "bags", "Tasche", "Taschen", "f", (*COLOURS, SMALL, BIG))
BOX = Noun("box", "boxes", "Kiste", "Kisten", "f", (SMALL, BIG, OLD, BROWN))
BOOK = Noun("book", "books", "Buch", "Bücher", "n", (OLD, NEW, SMALL, BIG))
NEWSPAPER = Noun("newspaper", "newspapers", "Zeitung", "Zeitungen", "f", (OLD, NEW))
PICTURE = Noun("picture", "pictures", "Bild", "Bilder", "n", (OLD, NEW, SMALL, BIG))
APPLE = Noun("apple", "apples", "Apfel", "Äpfel", "m", (RED, GREEN, YELLOW, SMALL, BIG))
CAKE = Noun("cake", "cakes", "Kuchen", "Kuchen", "m", (SMALL, BIG))
FLOWER = Noun("flower", "flowers", "Blume", "Blumen", "f", (RED, BLUE, YELLOW, WHITE))
UMBRELLA = Noun("umbrella", "umbrellas", "Regenschirm", "Regenschirme", "m", (*COLOURS, BIG))
BIKE = Noun("bike", "bikes", "Fahrrad", "Fahrräder", "n", (*COLOURS, OLD, NEW))
CAR = Noun("car", "cars", "Auto", "Autos", "n", (*COLOURS, OLD, NEW))

SHIRT = Noun("shirt", "shirts", "Hemd", "Hemden", "n", COLOURS)
JACKET = Noun("jacket", "jackets", "Jacke", "Jacken", "f", COLOURS)
COAT = Noun("coat", "coats", "Mantel", "Mäntel", "m", COLOURS)
HAT = Noun("hat", "hats", "Hut", "Hüte", "m", COLOURS)
CAP = Noun("cap", "caps", "Mütze", "Mützen", "f", COLOURS)
SCARF = Noun("scarf", "scarves", "Schal", "Schals", "m", COLOURS)
HAIR = Noun("hair", "hair", "Haar", "Haare", "n", (LONG, SHORT, BROWN, BLACK))
CLOTHES = (SHIRT, JACKET, COAT, HAT, CAP, SCARF)

PARK = Noun("park", "parks", "Park", "Parks", "m", (OLD, SMALL, BIG))
GARDEN = Noun("garden", "gardens", "Garten", "Gärten", "m", (OLD, SMALL, BIG))
FOREST = Noun("forest", "forests", "Wald", "Wälder", "m", (OLD, SMALL, BIG))
MEADOW = Noun("meadow", "meadows", "Wiese", "Wiesen", "f", (GREEN, SMALL, BIG))
BEACH = Noun("beach", "beaches", "Strand", "Strände", "m", (LONG, WHITE))
STREET = Noun("street", "streets", "Straße", "Straßen", "f", (LONG, OLD))
BRIDGE = Noun("bridge", "bridges", "Brücke", "Brücken", "f", (LONG, OLD, HIGH))
LAKE = Noun("lake", "lakes", "See", "Seen", "m", (SMALL, BIG, BLUE))
RIVER = Noun("river", "rivers", "Fluss", "Flüsse", "m", (LONG, SMALL, BIG))
HOUSE = Noun("house", "houses", "Haus", "Häuser", "n", (*BUILT, YELLOW))
SHOP = Noun("shop", "shops", "Geschäft", "Geschäfte", "n", BUILT)
CHURCH = Noun("church", "churches", "Kirche", "Kirchen", "f", BUILT)
TENT = Noun("tent", "tents", "Zelt", "Zelte", "n", (GREEN, BLUE, YELLOW, SMALL, BIG))
TREE = Noun("tree", "trees", "Baum", "Bäume", "m", (OLD, TALL, SMALL))
BENCH = Noun("bench", "benches", "Bank", "Bänke", "f", (GREEN, BROWN, LONG, OLD))
ROCK = Noun("rock", "rocks", "Felsen", "Felsen", "m", (BIG, HIGH, BLACK))
WALL = Noun("wall", "walls", "Mauer", "Mauern", "f", (OLD, HIGH, WHITE))

IN, ON_TOP = Preposition("in", "in", "dat"), Preposition("on", "auf", "dat")
ON_SHORE, BY = Preposition("on", "an", "dat"), Preposition("by", "an", "dat")
OUT_ON = Preposition("in", "auf", "dat")
IN_FRONT, BEHIND = Preposition("in front of", "vor", "dat"), Preposition("behind", "hinter", "dat")
NEXT_TO, UNDER = Preposition("next to", "neben", "dat"), Preposition("under", "unter", "dat")
BETWEEN = Preposition("between", "zwischen", "dat")
WITH = Preposition("with", "mit", "dat")
INTO, ONTO = Preposition("into", "in", "acc"), Preposition("onto", "auf", "acc")
THROUGH, AROUND = Preposition("through", "durch", "acc"), Preposition("around", "um", "acc")
OVER, ACROSS = Preposition("over", "über", "acc"), Preposition("across", "über", "acc")
TO = Preposition("to", "zu", "dat")
OF = Preposition("of", "von", "dat")  # a group of

Place = tuple[Preposition, Noun]


def places(preposition: Preposition, *nouns: Noun) -> tuple[Place, ...]:
    """Return the places that a preposition makes of nouns."""
    return tuple((preposition, noun) for noun in nouns)


SOFT_GROUND = (*places(IN, PARK, GARDEN, FOREST), (OUT_ON, MEADOW), (ON_SHORE, BEACH))
AREAS = (*SOFT_GROUND, *places(ON_TOP, STREET, BRIDGE), *places(BY, LAKE, RIVER))
OPEN_PLACES = (
    *AREAS,
    *places(IN_FRONT, HOUSE, SHOP, CHURCH, TENT),
    *places(BEHIND, HOUSE, SHOP, CHURCH, TENT),
    *places(NEXT_TO, TREE, CAR, TENT),
    *places(UNDER, TREE, BRIDGE),
    *places(BETWEEN, TREE, HOUSE, CAR),
)
SEATS = places(ON_TOP, BENCH, ROCK, WALL)
BEDS = (*SOFT_GROUND, (IN, TENT), (UNDER, TREE))
WATERS = places(IN, LAKE, RIVER)
WAYS = (
    *places(THROUGH, PARK, GARDEN, FOREST),
    *places(INTO, PARK, GARDEN, FOREST, HOUSE, SHOP, CHURCH, TENT),
    *places(ACROSS, STREET, BRIDGE, MEADOW),
    *places(AROUND, TREE, HOUSE, LAKE),
    *places(TO, BEACH, RIVER, LAKE, HOUSE, CHURCH, CAR, TREE),
)
LEAPS = (*places(OVER, WALL, BENCH), *places(ONTO, WALL, BENCH, ROCK))
WORN = (*places(IN, SHIRT, JACKET, COAT), *places(WITH, HAT, CAP, SCARF))
TIMES = (
    Text("in the morning", "am Morgen"),
    Text("in the evening", "am Abend"),
    Text("in the summer", "im Sommer"),
    Text("in the winter", "im Winter"),
    Text("on a sunny day", "an einem sonnigen Tag"),
)


@dataclass(frozen=True, eq=False)
class Verb:
    """A verb with what may stand around it.

    Attributes:
        en: English present participle, also the name of the verb.
        de: German third person singular.
        de_plural: German third person plural.
        subjects: The nouns that may be its subject.
        kind: How it combines with a second verb of the same subject: a posture (sitting) with a calm
            action (reading), an attribute (wearing) with either and with the active ones (running).
        places: Where it happens or, for a verb of motion, where it leads; none for what goes unlocated.
        needs_place: Whether the place cannot be left out.
        leads: Whether the places are goals or ways; these are not put first.
        objects: The nouns that may be its object.
        case: The case of that object.
        prefix: Separable prefix: last in a main clause, one word with a verb at the end of its clause.
        complement: German noun without an article that forms one notion with the verb (Gitarre spielen); the
            English half is part of `en`.
        reason: The state that explains it in a "because" clause, if one does.
    """

    en: str
    de: str
    de_plural: str
    subjects: tuple[Noun, ...]
    kind: Kind = "active"
    places: tuple[Place, ...] = OPEN_PLACES
    needs_place: bool = False
    leads: bool = False
    objects: tuple[Noun, ...] = ()
    case: Case = "acc"
    prefix: str = ""
    complement: str = ""
    reason: Text = NOTHING


TIRED, HAPPY, SAD = Text("tired", "müde"), Text("happy", "glücklich"), Text("sad", "traurig")
HUNGRY, THIRSTY = Text("hungry", "hungrig"), Text("thirsty", "durstig")
PETS = (*PEOPLE, DOG, CAT)

VERBS = (
    Verb("sitting", "sitzt", "sitzen", PETS, "posture", OPEN_PLACES + SEATS, True, reason=TIRED),
    Verb("standing", "steht", "stehen", SUBJECTS, "posture", needs_place=True),
    Verb("lying", "liegt", "liegen", PETS, "posture", BEDS, True, reason=TIRED),
    Verb("sleeping", "schläft", "schlafen", SUBJECTS, places=BEDS, reason=TIRED),
    Verb("waiting", "wartet", "warten", PETS, "calm"),
    Verb("singing", "singt", "singen", PEOPLE, "calm", reason=HAPPY),
    Verb("laughing", "lacht", "lachen", PEOPLE, "calm", reason=HAPPY),
    Verb("crying", "weint", "weinen", PEOPLE, "calm", reason=SAD),
    Verb("dancing", "tanzt", "tanzen", PEOPLE, reason=HAPPY),
    Verb("working", "arbeitet", "arbeiten", ADULTS),
    Verb("swimming", "schwimmt", "schwimmen", (*PEOPLE, DOG, HORSE), places=WATERS),
    Verb("walking", "geht", "gehen", SUBJECTS, places=WAYS, needs_place=True, leads=True),
    Verb("running", "rennt", "rennen", SUBJECTS, places=WAYS, needs_place=True, leads=True),
    Verb("jumping", "springt", "springen", SUBJECTS, places=LEAPS, needs_place=True, leads=True),
    Verb("climbing", "klettert", "klettern", (*PEOPLE, CAT, GOAT), places=LEAPS, needs_place=True, leads=True),
    Verb("playing the guitar", "spielt", "spielen", PEOPLE, "calm", complement="Gitarre"),
    Verb("playing football", "spielt", "spielen", PEOPLE, complement="Fußball"),
    Verb("cycling", "fährt", "fahren", PEOPLE, complement="Fahrrad", places=AREAS),
    Verb("drinking water", "trinkt", "trinken", SUBJECTS, "calm", complement="Wasser", reason=THIRSTY),
    Verb("wearing", "trägt", "tragen", PEOPLE, "attribute", places=(), objects=CLOTHES),
    Verb("carrying", "trägt", "tragen", PEOPLE, objects=(BAG, BOX, FLOWER, UMBRELLA)),
    Verb("holding", "hält", "halten", PEOPLE, "calm", objects=(BALL, BAG, BOOK, FLOWER, UMBRELLA)),
    Verb("reading", "liest", "lesen", PEOPLE, "calm", objects=(BOOK, NEWSPAPER)),
    Verb("eating", "isst", "essen", PEOPLE, "calm", objects=(APPLE, CAKE), reason=HUNGRY),
    Verb("pushing", "schiebt", "schieben", PEOPLE, objects=(BIKE, CAR, BOX)),
    Verb("washing", "wäscht", "waschen", PEOPLE, objects=(BIKE, CAR, DOG, HORSE)),
    Verb("repairing", "repariert", "reparieren", ADULTS, objects=(BIKE, CAR, UMBRELLA)),
    Verb("feeding", "füttert", "füttern", PEOPLE, objects=ANIMALS),
    Verb("photographing", "fotografiert", "fotografieren", PEOPLE, objects=(*SUBJECTS, CHURCH, BRIDGE, FLOWER)),
    Verb("helping", "hilft", "helfen", PEOPLE, objects=PEOPLE, case="dat"),
    Verb("following", "folgt", "folgen", SUBJECTS, objects=SUBJECTS, case="dat"),
    Verb("watching", "sieht", "sehen", PETS, "calm", objects=SUBJECTS, case="dat", prefix="zu"),
    Verb("listening to", "hört", "hören", PETS, "calm", objects=PEOPLE, case="dat", prefix="zu"),
    Verb("waving at", "winkt", "winken", PEOPLE, "calm", objects=PEOPLE, case="dat", prefix="zu"),
    Verb("picking up", "hebt", "heben", PEOPLE, objects=(BALL, BAG, BOX, APPLE, FLOWER), prefix="auf"),
    Verb("looking at", "schaut", "schauen", PEOPLE, "calm", objects=(PICTURE, BOOK, CAR, CHURCH), prefix="an"),
)
