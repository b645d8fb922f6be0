"""German phrases, by hand."""

import pytest

from translation.corpus import inflection, words
from translation.corpus.inflection import Phrase, Text


@pytest.mark.parametrize(
    ("phrase", "en", "nom", "acc", "dat"),
    [
        # Masculine, feminine, neuter after ein: mixed endings.
        (
            Phrase(inflection.A, words.HAT, words.RED),
            "a red hat",
            "ein roter Hut",
            "einen roten Hut",
            "einem roten Hut",
        ),
        (
            Phrase(inflection.A, words.LADY, words.OLD),
            "an old lady",
            "eine alte Dame",
            "eine alte Dame",
            "einer alten Dame",
        ),
        (
            Phrase(inflection.A, words.HORSE, words.WHITE),
            "a white horse",
            "ein weißes Pferd",
            "ein weißes Pferd",
            "einem weißen Pferd",
        ),
        # After der: weak endings.
        (
            Phrase(inflection.THE, words.COOK, words.TALL),
            "the tall cook",
            "der große Koch",
            "den großen Koch",
            "dem großen Koch",
        ),
        (
            Phrase(inflection.THE, words.BRIDGE, words.HIGH),
            "the high bridge",
            "die hohe Brücke",
            "die hohe Brücke",
            "der hohen Brücke",
        ),
        (
            Phrase(inflection.THE, words.GIRL, words.LITTLE),
            "the little girl",
            "das kleine Mädchen",
            "das kleine Mädchen",
            "dem kleinen Mädchen",
        ),
        (
            Phrase(inflection.THE_PLURAL, words.CHILD, words.YOUNG),
            "the young children",
            "die jungen Kinder",
            "die jungen Kinder",
            "den jungen Kindern",
        ),
        # Plural without der: strong endings; the dative takes -n, but not after -n or -s.
        (
            Phrase(inflection.TWO, words.MAN, words.YOUNG),
            "two young men",
            "zwei junge Männer",
            "zwei junge Männer",
            "zwei jungen Männern",
        ),
        (
            Phrase(inflection.SEVERAL, words.WORKER, words.OLD),
            "several old workers",
            "mehrere alte Arbeiter",
            "mehrere alte Arbeiter",
            "mehreren alten Arbeitern",
        ),
        (
            Phrase(inflection.BARE, words.SHIRT, words.BLUE),
            "blue shirts",
            "blaue Hemden",
            "blaue Hemden",
            "blauen Hemden",
        ),
        (Phrase(inflection.THREE, words.CAR), "three cars", "drei Autos", "drei Autos", "drei Autos"),
        (Phrase(inflection.TWO, words.HOUSE), "two houses", "zwei Häuser", "zwei Häuser", "zwei Häusern"),
        # Weak nouns: -n or -en in every form but the nominative singular.
        (
            Phrase(inflection.A, words.BOY, words.LITTLE),
            "a little boy",
            "ein kleiner Junge",
            "einen kleinen Jungen",
            "einem kleinen Jungen",
        ),
        (
            Phrase(inflection.THE, words.POLICEMAN),
            "the policeman",
            "der Polizist",
            "den Polizisten",
            "dem Polizisten",
        ),
        (
            Phrase(inflection.TWO, words.TOURIST),
            "two tourists",
            "zwei Touristen",
            "zwei Touristen",
            "zwei Touristen",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_phrase(phrase, en, nom, acc, dat):
    assert phrase.english() == en
    assert [phrase.german(case) for case in ("nom", "acc", "dat")] == [nom, acc, dat]


@pytest.mark.parametrize(
    ("preposition", "phrase", "en", "de"),
    [
        # Where: dative. Where to: accusative.
        (words.IN, Phrase(inflection.A, words.FOREST), "in a forest", "in einem Wald"),
        (words.INTO, Phrase(inflection.A, words.FOREST), "into a forest", "in einen Wald"),
        (words.ON_TOP, Phrase(inflection.THE, words.WALL), "on the wall", "auf der Mauer"),
        (words.ONTO, Phrase(inflection.THE, words.WALL), "onto the wall", "auf die Mauer"),
        (words.OVER, Phrase(inflection.A, words.BENCH), "over a bench", "über eine Bank"),
        (
            words.BETWEEN,
            Phrase(inflection.TWO, words.TREE, words.TALL),
            "between two tall trees",
            "zwischen zwei großen Bäumen",
        ),
        # Contractions.
        (words.IN, Phrase(inflection.THE, words.PARK), "in the park", "im Park"),
        (words.BY, Phrase(inflection.THE, words.LAKE, words.SMALL), "by the small lake", "am kleinen See"),
        (words.TO, Phrase(inflection.THE, words.BEACH), "to the beach", "zum Strand"),
        (words.TO, Phrase(inflection.THE, words.CHURCH), "to the church", "zur Kirche"),
        (words.INTO, Phrase(inflection.THE, words.HOUSE, words.OLD), "into the old house", "ins alte Haus"),
        # None where German writes both words.
        (words.BEHIND, Phrase(inflection.THE, words.TENT), "behind the tent", "hinter dem Zelt"),
        (words.INTO, Phrase(inflection.THE, words.GARDEN), "into the garden", "in den Garten"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_preposition(preposition, phrase, en, de):
    assert preposition.before(phrase) == Text(en, de)
