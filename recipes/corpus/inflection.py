"""Nouns, adjectives, determiners and prepositions, and how German inflects them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Case = Literal["nom", "acc", "dat"]
Gender = Literal["m", "f", "n"]


class Text(NamedTuple):
    """The same words in English and in German."""

    en: str
    de: str


NOTHING = Text("", "")


def join(*parts: str) -> str:
    """Join the parts that are not empty with single blanks."""
    return " ".join(part for part in parts if part)


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
