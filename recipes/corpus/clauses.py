"""Clauses: subjects, predicates, and where German puts the verb."""

from dataclasses import dataclass

from corpus.inflection import DEFINITE, NOTHING, PRONOUNS, Noun, Phrase, Text, join
from corpus.words import PEOPLE, Verb


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
