"""German clauses, by hand."""

import pytest

from corpus import clauses, grammar, inflection, words
from corpus.clauses import Predicate, Subject
from corpus.inflection import Phrase, Text

VERBS = {verb.en: verb for verb in words.VERBS}
TWO_BOYS = Phrase(inflection.TWO, words.BOY)
A_GIRL = Phrase(inflection.A, words.GIRL)
THE_CAT = Phrase(inflection.THE, words.CAT)
BOYS, GIRL = Subject.of(TWO_BOYS), Subject.of(A_GIRL)
IN_THE_PARK = Text("in the park", "im Park")
A_DOG = Text("a dog", "einem Hund")
A_BALL = Text("a ball", "einen Ball")
WATCH = Predicate(VERBS["watching"], A_DOG, IN_THE_PARK)
PICK_UP = Predicate(VERBS["picking up"], A_BALL)
GUITAR = Predicate(VERBS["playing the guitar"], place=IN_THE_PARK)


CLAUSES = {
    # The verb is second and its prefix last.
    "a girl is watching a dog in the park | ein Mädchen sieht im Park einem Hund zu": clauses.main_clause(GIRL, WATCH),
    "two boys are picking up a ball | zwei Jungen heben einen Ball auf": clauses.main_clause(BOYS, PICK_UP),
    # Something else first: the subject steps behind the verb.
    "in the park, two boys are playing the guitar | im Park spielen zwei Jungen Gitarre": clauses.fronted_clause(
        IN_THE_PARK, BOYS, Predicate(VERBS["playing the guitar"])
    ),
    "in the morning, a girl is watching a dog in the park | am Morgen sieht ein Mädchen im Park einem Hund zu": (
        clauses.fronted_clause(words.TIMES[0], GIRL, WATCH)
    ),
    # A subordinate clause ends in its verb, one word with the prefix.
    "while two boys are watching a dog in the park | während zwei Jungen im Park einem Hund zusehen": (
        clauses.subordinate_clause(grammar.WHILE, BOYS, WATCH)
    ),
    "while a girl is playing the guitar in the park | während ein Mädchen im Park Gitarre spielt": (
        clauses.subordinate_clause(grammar.WHILE, GIRL, GUITAR)
    ),
    "who is picking up a ball | das einen Ball aufhebt": clauses.relative_clause(A_GIRL, PICK_UP),
    "who are playing the guitar in the park | die im Park Gitarre spielen": clauses.relative_clause(TWO_BOYS, GUITAR),
    "that is drinking water | der Wasser trinkt": clauses.relative_clause(
        Phrase(inflection.A, words.DOG), Predicate(VERBS["drinking water"])
    ),
    # The pronoun follows the German gender.
    "because she is tired | weil es müde ist": clauses.because_clause(A_GIRL, words.TIRED),
    "because it is thirsty | weil sie durstig ist": clauses.because_clause(THE_CAT, words.THIRSTY),
    "because they are happy | weil sie glücklich sind": clauses.because_clause(TWO_BOYS, words.HAPPY),
}


@pytest.mark.parametrize("text", CLAUSES)
def test_clause(text):
    assert CLAUSES[text] == Text(*text.split(" | "))


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
