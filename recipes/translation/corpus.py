"""English-German caption pairs from a small grammar: translation data without a download.

A sentence is drawn as a structure (subject, verb, object, place, a second clause) and written out twice, once
by the rules of each language. The German side has what makes the pair hard: three genders, three cases, the
three adjective declensions, weak nouns, verb-second order with inversion, verb-final subordinate clauses and
separable verbs. Every sentence describes a picture, in the present, in the manner of Multi30K.

Held-out rule: each clause pairs a subject noun with a verb, and `split_of` assigns that pair to one split by
the CRC-32 of its name. A split draws only pairs of its own, so no subject and verb that meet in a validation
or test sentence ever meet in training, while every noun and every verb occurs there with other partners.
"""

import random
import zlib
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import datasets

Split = Literal["train", "validation", "test"]
Case = Literal["nom", "acc", "dat"]
Gender = Literal["m", "f", "n"]
Kind = Literal["posture", "calm", "attribute", "active"]  # of a verb, see Verb

SHORTEST, LONGEST = 5, 20  # words of a sentence, on either side
HELD_OUT = 10  # one pair in so many goes to each of validation and test


class Text(NamedTuple):
    """The same words in English and in German."""

    en: str
    de: str


NOTHING = Text("", "")


def join(*parts: str) -> str:
    """Join the parts that are not empty with single blanks."""
    return " ".join(part for part in parts if part)


# --- Inflection -----------------------------------------------------------------------------------

# Columns: masculine, feminine, neuter, plural.
DEFINITE: dict[Case, tuple[str, str, str, str]] = {
    "nom": ("der", "die", "das", "die"),
    "acc": ("den", "die", "das", "die"),
    "dat": ("dem", "der", "dem", "den"),
}
INDEFINITE: dict[Case, tuple[str, str, str]] = {
    "nom": ("ein", "eine", "ein"),
    "acc": ("einen", "eine", "ein"),
    "dat": ("einem", "einer", "einem"),
}
WEAK_ENDINGS: dict[Case, tuple[str, str, str, str]] = {
    "nom": ("e", "e", "e", "en"),
    "acc": ("en", "e", "e", "en"),
    "dat": ("en", "en", "en", "en"),
}
# Mixed after ein, eine, ein; the plural has no such article, so its column is the strong one.
MIXED_ENDINGS: dict[Case, tuple[str, str, str, str]] = {
    "nom": ("er", "e", "es", "e"),
    "acc": ("en", "e", "es", "e"),
    "dat": ("en", "en", "en", "en"),
}
PRONOUNS = ("er", "sie", "es", "sie")
CONTRACTIONS = {"in dem": "im", "in das": "ins", "an dem": "am", "zu dem": "zum", "zu der": "zur"}


# Words are compared as entries of the tables below, by identity: fast, and no two entries are the same word.
@dataclass(frozen=True, eq=False)
class Adjective:
    """An attributive adjective.

    Attributes:
        en: The English word.
        stem: The German word before its ending.
    """

    en: str
    stem: str


@dataclass(frozen=True, eq=False)
class Noun:
    """A noun of both languages.

    Attributes:
        en: English singular, also the name of the noun.
        en_plural: English plural.
        de: German nominative singular.
        de_plural: German nominative plural.
        gender: German gender.
        adjectives: The adjectives that suit it.
        weak: Whether it is a weak masculine (der Junge, den Jungen, dem Jungen).
        pronoun: English personal pronoun, of the nouns that can be a subject.
    """

    en: str
    en_plural: str
    de: str
    de_plural: str
    gender: Gender
    adjectives: tuple[Adjective, ...] = ()
    weak: bool = False
    pronoun: str = "it"

    def german(self, case: Case, plural: bool) -> str:
        """Return the German form in a case and number."""
        if plural:
            # The dative plural takes -n, except after -n and after the foreign plural -s (den Autos).
            return self.de_plural + "n" * (case == "dat" and self.de_plural[-1] not in "ns")
        return self.de_plural if self.weak and case != "nom" else self.de


@dataclass(frozen=True, eq=False)
class Determiner:
    """What opens a noun phrase.

    Attributes:
        en: The English word; "a" becomes "an" before a vowel, "" leaves the phrase bare.
        de: The German word, of those that do not decline for gender.
        plural: Whether the noun is in the plural.
        declines: Whether the German word takes -n in the dative (mehrere, mehreren).
    """

    en: str
    de: str = ""
    plural: bool = False
    declines: bool = False


A = Determiner("a")
THE = Determiner("the")
THE_PLURAL = Determiner("the", plural=True)
BARE = Determiner("", plural=True)
TWO = Determiner("two", "zwei", plural=True)
THREE = Determiner("three", "drei", plural=True)
SEVERAL = Determiner("several", "mehrere", plural=True, declines=True)
OPENERS = (A, A, A, THE, THE, TWO, TWO, THREE, SEVERAL, THE_PLURAL)  # of a subject, by frequency
COUNTS = (A, A, A, TWO, THREE, SEVERAL)  # of people and animals as objects


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: determiner, at most one adjective, noun."""

    determiner: Determiner
    noun: Noun
    adjective: Adjective | None = None

    @property
    def plural(self) -> bool:
        """Whether the phrase is in the plural."""
        return self.determiner.plural

    @property
    def column(self) -> int:
        """Column of the inflection tables."""
        return 3 if self.plural else "mfn".index(self.noun.gender)

    def english(self) -> str:
        """Return the English words."""
        words = [self.adjective.en] if self.adjective else []
        words.append(self.noun.en_plural if self.plural else self.noun.en)
        article = "an" if self.determiner is A and words[0][0] in "aeiou" else self.determiner.en
        return join(article, *words)

    def german(self, case: Case) -> str:
        """Return the German words in a case."""
        column = self.column
        definite = self.determiner.en == "the"
        if definite:
            article = DEFINITE[case][column]
        elif self.determiner is A:
            article = INDEFINITE[case][column]
        else:
            article = self.determiner.de + "n" * (self.determiner.declines and case == "dat")
        endings = WEAK_ENDINGS if definite else MIXED_ENDINGS
        adjective = self.adjective.stem + endings[case][column] if self.adjective else ""
        return join(article, adjective, self.noun.german(case, self.plural))


@dataclass(frozen=True, eq=False)
class Preposition:
    """A preposition of both languages with the German case it takes here.

    The two-way prepositions (in, auf, über, ...) are listed twice: dative where something is, accusative
    where it goes.
    """

    en: str
    de: str
    case: Case

    def before(self, phrase: Phrase) -> Text:
        """Return the prepositional phrase, with the usual German contraction (in dem: im)."""
        head, *rest = phrase.german(self.case).split()
        opening = CONTRACTIONS.get(f"{self.de} {head}", f"{self.de} {head}")
        return Text(join(self.en, phrase.english()), join(opening, *rest))


# --- Words ----------------------------------------------------------------------------------------

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
SOFT_GROUND: tuple[Place, ...] = (
    *((IN, noun) for noun in (PARK, GARDEN, FOREST)),
    (OUT_ON, MEADOW),
    (ON_SHORE, BEACH),
)
AREAS: tuple[Place, ...] = (
    *SOFT_GROUND,
    *((ON_TOP, noun) for noun in (STREET, BRIDGE)),
    *((BY, noun) for noun in (LAKE, RIVER)),
)
OPEN_PLACES: tuple[Place, ...] = (
    *AREAS,
    *((preposition, noun) for preposition in (IN_FRONT, BEHIND) for noun in (HOUSE, SHOP, CHURCH, TENT)),
    *((NEXT_TO, noun) for noun in (TREE, CAR, TENT)),
    *((UNDER, noun) for noun in (TREE, BRIDGE)),
    *((BETWEEN, noun) for noun in (TREE, HOUSE, CAR)),
)
SEATS: tuple[Place, ...] = tuple((ON_TOP, noun) for noun in (BENCH, ROCK, WALL))
BEDS: tuple[Place, ...] = (*SOFT_GROUND, (IN, TENT), (UNDER, TREE))
WATERS: tuple[Place, ...] = ((IN, LAKE), (IN, RIVER))
WAYS: tuple[Place, ...] = (
    *((THROUGH, noun) for noun in (PARK, GARDEN, FOREST)),
    *((INTO, noun) for noun in (PARK, GARDEN, FOREST, HOUSE, SHOP, CHURCH, TENT)),
    *((ACROSS, noun) for noun in (STREET, BRIDGE, MEADOW)),
    *((AROUND, noun) for noun in (TREE, HOUSE, LAKE)),
    *((TO, noun) for noun in (BEACH, RIVER, LAKE, HOUSE, CHURCH, CAR, TREE)),
)
LEAPS: tuple[Place, ...] = (
    *((OVER, noun) for noun in (WALL, BENCH)),
    *((ONTO, noun) for noun in (WALL, BENCH, ROCK)),
)
WORN: tuple[Place, ...] = (
    *((IN, noun) for noun in (SHIRT, JACKET, COAT)),
    *((WITH, noun) for noun in (HAT, CAP, SCARF)),
)
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


# --- Clauses --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """The subject of a clause.

    Attributes:
        nouns: The nouns that do what the verb says; two when joined by "and".
        text: The words, German in the nominative.
        plural: Number of the verb, the same in both languages.
        many: Whether several are meant, though the verb be singular (a group of men).
    """

    nouns: tuple[Noun, ...]
    text: Text
    plural: bool
    many: bool

    @classmethod
    def of(cls, phrase: Phrase) -> "Subject":
        """Return the subject that consists of one noun phrase."""
        text = Text(phrase.english(), phrase.german("nom"))
        return cls((phrase.noun,), text, phrase.plural, phrase.plural)


@dataclass(frozen=True)
class Predicate:
    """A verb with its object and its place, in the order of each language.

    German puts the place before an object that is new to the listener, and all objects here are.
    """

    verb: Verb
    object: Text = NOTHING
    place: Text = NOTHING

    def english(self, plural: bool) -> str:
        """Return the English words, in the present progressive."""
        return join("are" if plural else "is", self.participle())

    def participle(self) -> str:
        """Return the English words from the participle on."""
        return join(self.verb.en, self.object.en, self.place.en)

    def finite(self, plural: bool) -> str:
        """Return the German finite verb of a main clause, without its prefix."""
        return self.verb.de_plural if plural else self.verb.de

    def field(self) -> str:
        """Return what German puts between the finite verb and its prefix."""
        return join(self.place.de, self.object.de, self.verb.complement)

    def verb_second(self, plural: bool) -> str:
        """Return the German words of a main clause that follow its first constituent."""
        return join(self.finite(plural), self.field(), self.verb.prefix)

    def verb_final(self, plural: bool) -> str:
        """Return the German words of a subordinate clause that follow its subject."""
        return join(self.field(), self.verb.prefix + self.finite(plural))


def main_clause(subject: Subject, predicate: Predicate) -> Text:
    """Return the clause that opens with its subject."""
    return Text(
        join(subject.text.en, predicate.english(subject.plural)),
        join(subject.text.de, predicate.verb_second(subject.plural)),
    )


def fronted_clause(front: Text, subject: Subject, predicate: Predicate) -> Text:
    """Return the clause that opens with `front`; in German the verb then precedes the subject."""
    return Text(
        join(f"{front.en},", subject.text.en, predicate.english(subject.plural)),
        join(
            front.de,
            predicate.finite(subject.plural),
            subject.text.de,
            predicate.field(),
            predicate.verb.prefix,
        ),
    )


def subordinate_clause(conjunction: Text, subject: Subject, predicate: Predicate) -> Text:
    """Return the clause after a conjunction; in German its verb comes last."""
    return Text(
        join(conjunction.en, subject.text.en, predicate.english(subject.plural)),
        join(conjunction.de, subject.text.de, predicate.verb_final(subject.plural)),
    )


def relative_clause(phrase: Phrase, predicate: Predicate) -> Text:
    """Return the relative clause about a phrase, without the commas around the German one."""
    pronoun = "who" if phrase.noun in PEOPLE else "that"
    return Text(
        join(pronoun, predicate.english(phrase.plural)),
        join(DEFINITE["nom"][phrase.column], predicate.verb_final(phrase.plural)),
    )


def because_clause(phrase: Phrase, reason: Text) -> Text:
    """Return the clause that says in what state the phrase is, with a pronoun for it."""
    pronoun = "they" if phrase.plural else phrase.noun.pronoun
    return Text(
        join("because", pronoun, "are" if phrase.plural else "is", reason.en),
        join("weil", PRONOUNS[phrase.column], reason.de, "sind" if phrase.plural else "ist"),
    )


# --- Drawing --------------------------------------------------------------------------------------

# What the same subject can do as well: sitting and reading, but not sleeping and reading.
SECOND_KINDS: dict[Kind, tuple[Kind, ...]] = {
    "posture": ("calm",),
    "calm": ("posture",),
    "attribute": ("posture", "calm", "active"),
}
WHILE = Text("while", "während")

Pair = tuple[Noun, Verb]
Draft = tuple[Text, list[Pair]]  # the words and the (subject noun, verb) pairs they hold


class Sentence(NamedTuple):
    """A finished pair of sentences and the (subject noun, verb) pairs in it, by their English names."""

    en: str
    de: str
    pairs: frozenset[tuple[str, str]]


def split_of(noun: str, verb: str) -> Split:
    """Return the only split in which a subject noun meets a verb, both given by their English names."""
    # CRC-32 and not hash(), which Python salts anew in every process.
    remainder = zlib.crc32(f"{noun} {verb}".encode()) % HELD_OUT
    return "test" if remainder == 0 else "validation" if remainder == 1 else "train"


class Grammar:
    """Draws sentences of one split.

    Args:
        split: The split; its (subject noun, verb) pairs alone are used.
        rng: Source of all choices.
    """

    def __init__(self, split: Split, rng: random.Random) -> None:
        self.rng = rng
        self.pairs: list[Pair] = [
            (noun, verb) for verb in VERBS for noun in verb.subjects if split_of(noun.en, verb.en) == split
        ]

    def sentence(self) -> Sentence | None:
        """Draw one sentence; None where the draw led nowhere (no fitting second verb, or a bad length)."""
        # The main clause twice: it has the most verbs and places to show.
        templates = (
            self.plain,
            self.plain,
            self.joined,
            self.related,
            self.pointed,
            self.meanwhile,
            self.caused,
        )
        draft = self.rng.choice(templates)()
        if draft is None:
            return None
        text, pairs = draft
        if not all(SHORTEST <= len(side.split()) <= LONGEST for side in text):
            return None
        en, de = (side[0].upper() + side[1:] + "." for side in text)
        return Sentence(en, de, frozenset((noun.en, verb.en) for noun, verb in pairs))

    def plain(self) -> Draft:
        """Draw a main clause: In the park, two boys are playing football."""
        noun, verb = self.rng.choice(self.pairs)
        subject = self.subject(noun, verb)
        clause = self.opened(subject, self.predicate(verb, subject))
        return clause, [(each, verb) for each in subject.nouns]

    def joined(self) -> Draft | None:
        """Draw one subject with two verbs: A man is sitting on a bench and reading a book."""
        noun, first = self.rng.choice([pair for pair in self.pairs if pair[1].kind == "posture"])
        second = self.second_verb(noun, first)
        if second is None:
            return None
        subject = self.dressed(Subject.of(self.phrase(noun)))
        main = main_clause(subject, self.predicate(first, subject))
        other = self.predicate(second, subject, place=0.0)
        en = join(main.en, "and", other.participle())
        de = join(main.de, "und", other.verb_second(subject.plural))
        return Text(en, de), [(noun, first), (noun, second)]

    def related(self) -> Draft | None:
        """Draw a relative clause about the subject: A man who is wearing a red hat is reading a book."""
        noun, inner = self.rng.choice([pair for pair in self.pairs if pair[1].kind in SECOND_KINDS])
        outer = self.second_verb(noun, inner)
        if outer is None:
            return None
        phrase = self.phrase(noun)
        subject = Subject.of(phrase)
        aside = relative_clause(phrase, self.predicate(inner, subject, place=0.0))
        text = Text(join(subject.text.en, aside.en), f"{subject.text.de}, {aside.de},")
        # One place at most: nobody stands in a park and sings in front of a house.
        place = 0.0 if inner.needs_place else 0.6
        clause = main_clause(replace(subject, text=text), self.predicate(outer, subject, place))
        return clause, [(noun, inner), (noun, outer)]

    def pointed(self) -> Draft | None:
        """Draw a relative clause about the object: A woman is watching a dog that is following a cat."""
        noun, verb = self.rng.choice([pair for pair in self.pairs if set(pair[1].objects) & set(SUBJECTS)])
        targets = [pair for pair in self.pairs if pair[0] in verb.objects and pair[0] != noun]
        if not targets:
            return None
        target, inner = self.rng.choice(targets)
        subject = self.dressed(Subject.of(self.phrase(noun)))
        phrase = self.phrase(target, self.rng.choice(COUNTS))
        clause = self.opened(subject, Predicate(verb, Text(phrase.english(), phrase.german(verb.case))))
        aside = relative_clause(phrase, self.predicate(inner, Subject.of(phrase)))
        return Text(join(clause.en, aside.en), f"{clause.de}, {aside.de}"), [(noun, verb), (target, inner)]

    def meanwhile(self) -> Draft | None:
        """Draw two clauses at one time: While a woman is sleeping, a man is reading a book."""
        (noun, verb), (other, inner) = self.rng.choice(self.pairs), self.rng.choice(self.pairs)
        subject, second = self.subject(noun, verb), Subject.of(self.phrase(other))
        if other in subject.nouns:
            return None
        predicate = self.predicate(verb, subject)
        aside = subordinate_clause(WHILE, second, self.predicate(inner, second, place=0.2))
        if self.rng.random() < 0.5:
            text = fronted_clause(Text(aside.en, f"{aside.de},"), subject, predicate)
        else:
            main = main_clause(subject, predicate)
            text = Text(join(main.en, aside.en), f"{main.de}, {aside.de}")
        return text, [*((each, verb) for each in subject.nouns), (other, inner)]

    def caused(self) -> Draft:
        """Draw a clause with its reason: A dog is sleeping under a tree because it is tired."""
        noun, verb = self.rng.choice([pair for pair in self.pairs if pair[1].reason != NOTHING])
        phrase = self.phrase(noun)
        subject = self.dressed(Subject.of(phrase))
        clause = self.opened(subject, self.predicate(verb, subject))
        aside = because_clause(phrase, verb.reason)
        return Text(join(clause.en, aside.en), f"{clause.de}, {aside.de}"), [(noun, verb)]

    def second_verb(self, noun: Noun, first: Verb) -> Verb | None:
        """Draw what the noun does while it does `first`; None where the split has no such pair."""
        kinds = SECOND_KINDS[first.kind]
        verbs = [verb for each, verb in self.pairs if each == noun and verb.kind in kinds]
        return self.rng.choice(verbs) if verbs else None

    def subject(self, noun: Noun, verb: Verb) -> Subject:
        """Draw a subject of any form; a second noun in it suits the verb and the split as well."""
        draw = self.rng.random()
        others = [each for each, same in self.pairs if same == verb and each != noun]
        if draw < 0.15 and others:
            nouns = (noun, self.rng.choice(others))
            one, two = (self.phrase(each, A) for each in nouns)
            en = join(one.english(), "and", two.english())
            de = join(one.german("nom"), "und", two.german("nom"))
            return Subject(nouns, Text(en, de), plural=True, many=True)
        subject = Subject.of(self.phrase(noun))
        if draw > 0.9 and noun in PEOPLE:
            members = OF.before(self.phrase(noun, BARE))
            text = Text(join("a group", members.en), join("eine Gruppe", members.de))
            subject = Subject((noun,), text, plural=False, many=True)
        # Beside a verb of wearing, the same garment could be named twice.
        return subject if verb.kind == "attribute" else self.dressed(subject)

    def dressed(self, subject: Subject) -> Subject:
        """Return the subject, a person sometimes with clothes, hair or a dog."""
        draw = self.rng.random()
        if subject.nouns[0] not in PEOPLE or draw < 0.55:
            return subject
        if draw < 0.85:
            preposition, garment = self.rng.choice(WORN)
            modifier = preposition.before(self.phrase(garment, BARE if subject.many else A, adjective=0.8))
        elif draw < 0.93:
            modifier = WITH.before(self.phrase(HAIR, BARE, adjective=1.0))
        else:
            modifier = WITH.before(self.phrase(DOG, A))
        text = Text(join(subject.text.en, modifier.en), join(subject.text.de, modifier.de))
        return replace(subject, text=text)

    def phrase(self, noun: Noun, determiner: Determiner | None = None, adjective: float = 0.5) -> Phrase:
        """Draw a noun phrase.

        Args:
            noun: The noun.
            determiner: The determiner; None draws one that opens a subject.
            adjective: Probability of an adjective.
        """
        determiner = determiner or self.rng.choice(OPENERS)
        given = self.rng.random() < adjective
        return Phrase(determiner, noun, self.rng.choice(noun.adjectives) if given else None)

    def predicate(self, verb: Verb, subject: Subject, place: float = 0.6) -> Predicate:
        """Draw the object and the place of a verb.

        Args:
            verb: The verb.
            subject: Its subject, which is no object too and decides the number of things.
            place: Probability of a place where the verb can have one and does not need it.
        """
        target = NOTHING
        nouns = [noun for noun in verb.objects if noun not in subject.nouns]
        if nouns:
            noun = self.rng.choice(nouns)
            # Each of several people wears, reads or eats something of their own.
            thing = BARE if subject.many else A
            determiner = self.rng.choice(COUNTS) if noun in SUBJECTS else thing
            phrase = self.phrase(noun, determiner)
            target = Text(phrase.english(), phrase.german(verb.case))
        if not verb.places or not (verb.needs_place or self.rng.random() < place):
            return Predicate(verb, target)
        return Predicate(verb, target, self.place(self.rng.choice(verb.places)))

    def place(self, place: Place) -> Text:
        """Draw the words of a place."""
        preposition, noun = place
        determiner = TWO if preposition is BETWEEN else self.rng.choice((A, THE))
        return preposition.before(self.phrase(noun, determiner, adjective=0.3))

    def opened(self, subject: Subject, predicate: Predicate) -> Text:
        """Draw the first constituent of a main clause: mostly the subject, else its place or a time."""
        draw = self.rng.random()
        if draw < 0.3 and predicate.place != NOTHING and not predicate.verb.leads:
            return fronted_clause(predicate.place, subject, replace(predicate, place=NOTHING))
        if draw > 0.85:
            return fronted_clause(self.rng.choice(TIMES), subject, predicate)
        return main_clause(subject, predicate)


# --- Splits ---------------------------------------------------------------------------------------


def sentences(split: Split, size: int, seed: int = 0) -> list[Sentence]:
    """Draw distinct sentences of one split, with the (subject noun, verb) pairs they hold.

    Args:
        split: "train", "validation" or "test".
        size: Number of sentences, at least 1. A smaller size gives the first sentences of a larger one.
        seed: Seed of the choices; the same arguments give the same sentences everywhere.

    Returns:
        The sentences in the order drawn; no two share their English or their German side.

    Raises:
        ValueError: Unknown split, size below 1, or more sentences than the split is found to hold.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; choose one of {', '.join(get_args(Split))}")
    if size < 1:
        raise ValueError(f"size is {size}; ask for at least 1 sentence")
    grammar = Grammar(split, random.Random(f"{split} {seed}"))
    found: list[Sentence] = []
    seen: set[str] = set()
    misses = 0
    while len(found) < size:
        sentence = grammar.sentence()
        if sentence is None or sentence.en in seen or sentence.de in seen:
            misses += 1
            if misses > 1000 + 20 * size:
                raise ValueError(f"split {split!r} gave only {len(found)} of {size} sentences; lower the size")
            continue
        seen.update((sentence.en, sentence.de))
        found.append(sentence)
    return found


def generate(split: Split, size: int, seed: int = 0) -> list[dict[str, str]]:
    """Generate distinct English-German pairs of one split.

    Args:
        split: "train", "validation" or "test". The three share no sentence and no (subject noun, verb) pair.
        size: Number of pairs, at least 1. A smaller size gives the first pairs of a larger one.
        seed: Seed of the choices; the same arguments give the same pairs everywhere.

    Returns:
        One {"en": ..., "de": ...} per pair, sentences of 5 to 20 words.

    Raises:
        ValueError: Unknown split, size below 1, or more pairs than the split is found to hold.
    """
    return [{"en": sentence.en, "de": sentence.de} for sentence in sentences(split, size, seed)]


def load(
    train_size: int = 10_000, validation_size: int = 500, test_size: int = 500, seed: int = 0
) -> datasets.DatasetDict:
    """Return the corpus as a dataset with the splits "train", "validation" and "test".

    Args:
        train_size: Number of training pairs.
        validation_size: Number of validation pairs.
        test_size: Number of test pairs.
        seed: Seed of all splits.

    Returns:
        A `DatasetDict` with the string columns "en" and "de".

    Raises:
        ValueError: As `generate`.
    """
    sizes: dict[Split, int] = {"train": train_size, "validation": validation_size, "test": test_size}
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(generate(split, size, seed)) for split, size in sizes.items()}
    )
