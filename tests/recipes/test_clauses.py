"""German clauses, by hand."""

import pytest

from translation.corpus import clauses, grammar, inflection, words
from translation.corpus.clauses import Predicate, Subject
from translation.corpus.inflection import Phrase, Text

VERBS = {verb.en: verb for verb in words.VERBS}
BOYS = Phrase(inflection.TWO, words.BOY)
GIRL = Phrase(inflection.A, words.GIRL)
IN_THE_PARK = Text("in the park", "im Park")
A_DOG = Text("a dog", "einem Hund")
A_BALL = Text("a ball", "einen Ball")
WATCH = Predicate(VERBS["watching"], A_DOG, IN_THE_PARK)
PICK_UP = Predicate(VERBS["picking up"], A_BALL)
GUITAR = Predicate(VERBS["playing the guitar"], place=IN_THE_PARK)


@pytest.mark.parametrize(
    ("text", "en", "de"),
    [
        # The verb is second and its prefix last.
        (
            clauses.main_clause(Subject.of(GIRL), WATCH),
            "a girl is watching a dog in the park",
            "ein Mädchen sieht im Park einem Hund zu",
        ),
        (
            clauses.main_clause(Subject.of(BOYS), PICK_UP),
            "two boys are picking up a ball",
            "zwei Jungen heben einen Ball auf",
        ),
        # Something else first: the subject steps behind the verb.
        (
            clauses.fronted_clause(IN_THE_PARK, Subject.of(BOYS), Predicate(VERBS["playing the guitar"])),
            "in the park, two boys are playing the guitar",
            "im Park spielen zwei Jungen Gitarre",
        ),
        (
            clauses.fronted_clause(words.TIMES[0], Subject.of(GIRL), WATCH),
            "in the morning, a girl is watching a dog in the park",
            "am Morgen sieht ein Mädchen im Park einem Hund zu",
        ),
        # A subordinate clause ends in its verb, one word with the prefix.
        (
            clauses.subordinate_clause(grammar.WHILE, Subject.of(BOYS), WATCH),
            "while two boys are watching a dog in the park",
            "während zwei Jungen im Park einem Hund zusehen",
        ),
        (
            clauses.subordinate_clause(grammar.WHILE, Subject.of(GIRL), GUITAR),
            "while a girl is playing the guitar in the park",
            "während ein Mädchen im Park Gitarre spielt",
        ),
        (
            clauses.relative_clause(GIRL, PICK_UP),
            "who is picking up a ball",
            "das einen Ball aufhebt",
        ),
        (
            clauses.relative_clause(BOYS, GUITAR),
            "who are playing the guitar in the park",
            "die im Park Gitarre spielen",
        ),
        (
            clauses.relative_clause(Phrase(inflection.A, words.DOG), Predicate(VERBS["drinking water"])),
            "that is drinking water",
            "der Wasser trinkt",
        ),
        # The pronoun follows the German gender.
        (clauses.because_clause(GIRL, words.TIRED), "because she is tired", "weil es müde ist"),
        (
            clauses.because_clause(Phrase(inflection.THE, words.CAT), words.THIRSTY),
            "because it is thirsty",
            "weil sie durstig ist",
        ),
        (clauses.because_clause(BOYS, words.HAPPY), "because they are happy", "weil sie glücklich sind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_clause(text, en, de):
    assert text == Text(en, de)


@pytest.mark.parametrize(
    ("en", "singular", "plural"),
    [
        ("sleeping", "schläft", "schlafen"),
        ("reading", "liest", "lesen"),
        ("holding", "hält", "halten"),
        ("working", "arbeitet", "arbeiten"),
        ("helping", "hilft", "helfen"),
        ("eating", "isst", "essen"),
        ("cycling", "fährt", "fahren"),
    ],
)
def test_verb_agrees_in_number(en, singular, plural):
    predicate = Predicate(VERBS[en])
    assert [predicate.finite(plural=False), predicate.finite(plural=True)] == [singular, plural]
