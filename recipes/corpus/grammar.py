"""Drawing sentences at random, each split its own."""

import random
import zlib
from dataclasses import replace
from typing import Literal, NamedTuple

from corpus.clauses import (
    Predicate,
    Subject,
    because_clause,
    fronted_clause,
    main_clause,
    relative_clause,
    subordinate_clause,
)
from corpus.inflection import (
    BARE,
    COUNTS,
    NOTHING,
    OPENERS,
    THE,
    TWO,
    A,
    Determiner,
    Noun,
    Phrase,
    Text,
    join,
)
from corpus.words import (
    BETWEEN,
    DOG,
    HAIR,
    OF,
    PEOPLE,
    SUBJECTS,
    TIMES,
    VERBS,
    WITH,
    WORN,
    Kind,
    Place,
    Verb,
)

Split = Literal["train", "validation", "test"]

SHORTEST, LONGEST = 5, 20  # words of a sentence, on either side
HELD_OUT = 10  # one pair in so many goes to each of validation and test

# What the same subject can do as well: sitting and reading, but not sleeping and reading.
SECOND_KINDS: dict[Kind, tuple[Kind, ...]] = {
    "posture": ("calm",),
    "calm": ("posture",),
    "attribute": ("posture", "calm", "active"),
}
WHILE = Text("while", "während")

Pair = tuple[Noun, Verb]
Draft = tuple[Text, list[Pair]]  # the words and the (subject noun, verb) pairs they hold, the main clause's first


class Sentence(NamedTuple):
    """A finished pair of sentences and the (subject noun, verb) pairs in it, by their English names.

    Attributes:
        en: The English sentence.
        de: The German sentence.
        pairs: The pairs.
        subject: The subject noun of the main clause, the first one where there are two.
    """

    en: str
    de: str
    pairs: frozenset[tuple[str, str]]
    subject: str


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
        return Sentence(en, de, frozenset((noun.en, verb.en) for noun, verb in pairs), pairs[0][0].en)

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
