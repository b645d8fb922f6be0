"""German phrases, by hand."""

import pytest

from corpus import inflection, words
from corpus.inflection import Phrase, Text


def phrase(names):
    """Return the phrase of a determiner, a noun and an adjective, which may be missing, by their names."""
    determiner, *others = names.split()
    return Phrase(getattr(inflection, determiner), *(getattr(words, name) for name in others))


@pytest.mark.parametrize(
    ("names", "en", "de"),  # nominative, accusative, dative
    [
        # Masculine, feminine, neuter after ein: mixed endings.
        ("A HAT RED", "a red hat", "ein roter Hut, einen roten Hut, einem roten Hut"),
        ("A LADY OLD", "an old lady", "eine alte Dame, eine alte Dame, einer alten Dame"),
        ("A HORSE WHITE", "a white horse", "ein weißes Pferd, ein weißes Pferd, einem weißen Pferd"),
        # After der: weak endings.
        ("THE COOK TALL", "the tall cook", "der große Koch, den großen Koch, dem großen Koch"),
        ("THE BRIDGE HIGH", "the high bridge", "die hohe Brücke, die hohe Brücke, der hohen Brücke"),
        ("THE GIRL LITTLE", "the little girl", "das kleine Mädchen, das kleine Mädchen, dem kleinen Mädchen"),
        ("THE_PLURAL CHILD YOUNG", "the young children", "die jungen Kinder, die jungen Kinder, den jungen Kindern"),
        # Plural without der: strong endings; the dative takes -n, but not after -n or -s.
        ("TWO MAN YOUNG", "two young men", "zwei junge Männer, zwei junge Männer, zwei jungen Männern"),
        (
            "SEVERAL WORKER OLD",
            "several old workers",
            "mehrere alte Arbeiter, mehrere alte Arbeiter, mehreren alten Arbeitern",
        ),
        ("BARE SHIRT BLUE", "blue shirts", "blaue Hemden, blaue Hemden, blauen Hemden"),
        ("THREE CAR", "three cars", "drei Autos, drei Autos, drei Autos"),
        ("TWO HOUSE", "two houses", "zwei Häuser, zwei Häuser, zwei Häusern"),
        # Weak nouns: -n or -en in every form but the nominative singular.
        ("A BOY LITTLE", "a little boy", "ein kleiner Junge, einen kleinen Jungen, einem kleinen Jungen"),
        ("THE POLICEMAN", "the policeman", "der Polizist, den Polizisten, dem Polizisten"),
        ("TWO TOURIST", "two tourists", "zwei Touristen, zwei Touristen, zwei Touristen"),
    ],
)
def test_phrase(names, en, de):
    assert phrase(names).english() == en
    assert ", ".join(phrase(names).german(case) for case in ("nom", "acc", "dat")) == de


@pytest.mark.parametrize(
    ("names", "en", "de"),
    [
        # Where: dative. Where to: accusative.
        ("IN A FOREST", "in a forest", "in einem Wald"),
        ("INTO A FOREST", "into a forest", "in einen Wald"),
        ("ON_TOP THE WALL", "on the wall", "auf der Mauer"),
        ("ONTO THE WALL", "onto the wall", "auf die Mauer"),
        ("OVER A BENCH", "over a bench", "über eine Bank"),
        ("BETWEEN TWO TREE TALL", "between two tall trees", "zwischen zwei großen Bäumen"),
        # Contractions.
        ("IN THE PARK", "in the park", "im Park"),
        ("BY THE LAKE SMALL", "by the small lake", "am kleinen See"),
        ("TO THE BEACH", "to the beach", "zum Strand"),
        ("TO THE CHURCH", "to the church", "zur Kirche"),
        ("INTO THE HOUSE OLD", "into the old house", "ins alte Haus"),
        # None where German writes both words.
        ("BEHIND THE TENT", "behind the tent", "hinter dem Zelt"),
        ("INTO THE GARDEN", "into the garden", "in den Garten"),
    ],
)
def test_preposition(names, en, de):
    preposition, rest = names.split(" ", 1)
    assert getattr(words, preposition).before(phrase(rest)) == Text(en, de)
