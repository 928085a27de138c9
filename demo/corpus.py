"""The corpus of the demo model, written from a seed: dialogs and stories, split into training and held-out.

    python -m demo.corpus --split train --count 20 --seed 1        # one JSON object per line

The split is a function of keys, not of luck. Whatever could be remembered has a key, a tuple of strings:

    ("text", name, object, attribute)              said in a text: Tom's kite is red; Tom's kite is in the garden
    ("fact", fact, phrasing, system text, turn)    asked of the corpus's own knowledge

`held_out(key)` sends one key in ten to the held-out side, by its SHA-256. A sample is built only from keys of its own
side, so a held-out dialog shares no combination with training, in any of its turns, and neither do stories.

This module knows nothing about tokens, models or the chat encoding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from demo.stories import Cast, tell
from demo.world import (
    ANIMALS,
    BEGINNINGS,
    COLOURS,
    COUNTABLES,
    COUNTRIES,
    DAYS,
    DICTIONARY,
    ELSEWHERE,
    EMOJI,
    ENDS,
    FOREIGN,
    MONTHS,
    NAMES,
    OBJECTS,
    OPPOSITE_PAIRS,
    PLACES,
    STUMPERS,
    THINGS,
    TONGUES,
    TOPICS,
)

Key = tuple[str, ...]

# ---------------------------------------------------------------------------------------------------------------------
# The split


def held_out(key: Key) -> bool:
    """True for the tenth of all keys that training never sees."""
    return hashlib.sha256("|".join(key).encode()).digest()[0] < 26


def on_side(key: Key, split: str) -> bool:
    """Whether a sample of this split ("train" or "held_out") may contain the key."""
    return held_out(key) == (split == "held_out")


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: what the system prompt asks of an answer

SHAPES = {
    "word": (
        "Answer in one word.",
        "Reply with one word only.",
        "Use only one word.",
        "Be brief: one word per answer.",
    ),
    "capitals": (
        "Answer in capital letters.",
        "Write everything in capital letters.",
        "Use only capital letters.",
        "Please shout: capital letters only.",
    ),
    "sentence": ("Answer with a full sentence.", "Always answer in full sentences.", "Use a complete sentence."),
    "lower": ("Answer in lower case.", "Use only small letters.", "Write without capital letters."),
    "polite": ("Be very polite.", "Answer politely.", "You are a polite butler."),
    "word capitals": ("Answer in one word, in capital letters.", "One word. Capital letters."),
    "plain": (
        "You are a helpful assistant.",
        "You are a friendly robot.",
        "You are a pirate.",
        "Answer the question.",
        "You are a teacher.",
        "Be kind and honest.",
        "Help the user.",
        "You are a helpful, honest assistant.",
    ),
}
SYSTEMS = [(None, "plain")] * 9 + [(text, shape) for shape, texts in SHAPES.items() for text in texts]
ONE_WORD = ("word", "word capitals")


class Answer(NamedTuple):
    """A full sentence, and the one word that says the same (None where no single word can)."""

    sentence: str
    word: str | None


def shaped(answer: Answer, shape: str) -> str:
    """The answer as the system prompt wants it: shaped(Answer("It is red.", "red"), "word") == "Red."."""
    if shape in ONE_WORD:
        assert answer.word is not None
        word = answer.word[0].upper() + answer.word[1:] + "."
        return word.upper() if shape == "word capitals" else word
    if shape == "capitals":
        return answer.sentence.upper()
    if shape == "lower":
        return answer.sentence.lower()
    if shape == "polite":
        return "I am sorry, I do not know." if answer is UNKNOWN else f"Of course. {answer.sentence}"
    return answer.sentence


UNKNOWN = Answer("I do not know.", "unknown")

# ---------------------------------------------------------------------------------------------------------------------
# Samples


class Sample(NamedTuple):
    """One training or held-out item: a dialog that ends with the assistant's answer, or else a text."""

    kind: str  # what is asked last: "fact", "reading: colour", ..., or "story", "foreign"
    messages: tuple[dict[str, str], ...]
    text: str
    keys: tuple[Key, ...]
    given: int = 0  # characters of a text after which all follows from what came before


@dataclass
class Chat:
    """A dialog under construction: it grows by one question and answer at a time."""

    rng: random.Random
    split: str
    system: str | None
    shape: str
    messages: list[dict[str, str]] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)  # names, things, colours and places already spoken of
    kind: str = ""

    @property
    def turn(self) -> int:
        return len(self.messages) // 2 + 1

    @property
    def one_word(self) -> bool:
        return self.shape in ONE_WORD

    def say(self, kind: str, question: str, answer: Answer) -> None:
        """Add a question and its answer in the shape of this dialog."""
        self.kind = kind
        self.messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": shaped(answer, self.shape)},
        ]

    def claim(self, *key: str) -> bool:
        """Record a key if this dialog's side of the split may use it; else say no."""
        if not on_side(key, self.split):
            return False
        self.keys.append(key)
        return True

    def ask(self, kind: str, fact: str, phrasings: tuple[str, ...], answer: Answer) -> bool:
        """Ask a fact in one of its phrasings, if the split allows any of them here. Now and then asked carelessly."""
        for question in self.rng.sample(phrasings, len(phrasings)):
            question = careless(question) if self.rng.random() < 0.08 else question
            if self.claim("fact", fact, question, self.system or "", str(self.turn)):
                self.say(kind, question, answer)
                return True
        return False

    def fresh(self, words: list[str]) -> str:
        """A word that this dialog has not used yet, so that no question about it has two answers."""
        while (word := self.rng.choice(words)) in self.taken:
            pass
        return word


def careless(question: str) -> str:
    """A question as people type it: no capital at the beginning, no question mark."""
    return (question[0].lower() + question[1:]).rstrip("?.")


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


# ---------------------------------------------------------------------------------------------------------------------
# Knowledge: facts of the corpus itself


class Fact(NamedTuple):
    """Something the model knows: how to ask it, how to ask it of the subject just spoken of ("it"), the answer."""

    name: str
    phrasings: tuple[str, ...]
    follow_ups: tuple[str, ...]
    answer: Answer


def animal_facts(animal: str) -> list[Fact]:
    kind, legs, home, food, sound = ANIMALS[animal]
    one = article(animal)
    facts = [
        Fact(
            "legs",
            (f"How many legs does {one} have?", f"Tell me how many legs {one} has."),
            ("How many legs does it have?",),
            Answer(f"{capital(one)} has {legs} legs.", legs),
        ),
        Fact(
            "home",
            (f"Where does {one} live?", f"In what place does {one} live?"),
            ("Where does it live?",),
            Answer(f"{capital(one)} lives in the {home}.", home),
        ),
        Fact(
            "food",
            (f"What does {one} eat?", f"What is the food of {one}?"),
            ("What does it eat?",),
            Answer(f"{capital(one)} eats {food}.", food),
        ),
        Fact(
            "kind",
            (f"What kind of animal is {one}?", f"Which kind of animal is {one}?"),
            ("What kind of animal is it?",),
            Answer(f"{capital(one)} is {article(kind)}.", kind),
        ),
    ]
    if sound:
        facts.append(
            Fact(
                "sound",
                (f"What sound does {one} make?", f"What does {one} say?"),
                ("What sound does it make?",),
                Answer(f"{capital(one)} says {sound}.", sound),
            )
        )
    return facts


def thing_facts(thing: str) -> list[Fact]:
    colour, kind = THINGS[thing]
    facts = []
    if colour:
        facts.append(
            Fact(
                "colour",
                (f"What colour is {thing}?", f"Which colour does {thing} have?", f"What color is {thing}?"),
                ("What colour is it?",),
                Answer(f"{capital(thing)} is {colour}.", colour),
            )
        )
    if kind:
        facts.append(
            Fact(
                "category",
                (f"What kind of thing is {thing}?", f"What is {thing}?"),
                ("What kind of thing is it?",),
                Answer(f"{capital(thing)} is {article(kind)}.", kind.split()[-1]),
            )
        )
    return facts


def country_facts(country: str) -> list[Fact]:
    city, continent, language = COUNTRIES[country]
    return [
        Fact(
            "capital",
            (
                f"What is the capital of {country}?",
                f"Which city is the capital of {country}?",
                f"Tell me the capital of {country}.",
            ),
            ("What is its capital?",),
            Answer(f"The capital of {country} is {city}.", city),
        ),
        Fact(
            "continent",
            (f"Where is {country}?", f"Which continent is {country} in?"),
            ("Which continent is it in?",),
            Answer(f"{country} is in {continent}.", continent),
        ),
        Fact(
            "language",
            (f"What language do people speak in {country}?", f"Which language is spoken in {country}?"),
            ("What language do people speak there?",),
            Answer(f"People in {country} speak {language}.", language),
        ),
    ]


def opposite_facts(word: str, other: str) -> list[Fact]:
    questions = (
        f"What is the opposite of {word}?",
        f"Tell me the opposite of {word}.",
        f"Which word is the opposite of {word}?",
    )
    return [Fact("opposite", questions, (), Answer(f"The opposite of {word} is {other}.", other))]


def sum_facts(a: int, b: int) -> list[Fact]:
    def fact(verb: str, sign: str, result: int) -> Fact:
        questions = (
            f"What is {a} {verb} {b}?",
            f"What is {a} {sign} {b}?",
            f"How much is {a} {verb} {b}?",
            f"{a} {sign} {b} = ?",
        )
        return Fact(verb, questions, (), Answer(f"{a} {verb} {b} is {result}.", str(result)))

    facts = [fact("plus", "+", a + b)]
    if a >= b:
        facts.append(fact("minus", "-", a - b))
    if max(a, b) <= 5:
        facts.append(fact("times", "*", a * b))
    return facts


def order_facts(words: list[str], what: str) -> list[Fact]:
    facts = []
    for i, word in enumerate(words):
        following = words[(i + 1) % len(words)]
        facts.append(
            Fact(
                f"after {word}",
                (f"What {what} comes after {word}?", f"Which {what} follows {word}?"),
                (),
                Answer(f"{following} comes after {word}.", following),
            )
        )
        facts.append(
            Fact(
                f"before {following}",
                (f"What {what} comes before {following}?", f"Which {what} is before {following}?"),
                (),
                Answer(f"{word} comes before {following}.", word),
            )
        )
    return facts


def translation_facts(word: str) -> list[Fact]:
    facts = []
    for tongue, foreign in zip(TONGUES, DICTIONARY[word], strict=True):
        facts.append(
            Fact(
                f"{word} in {tongue}",
                (f"How do you say {word} in {tongue}?", f"What is {word} in {tongue}?", f"Say {word} in {tongue}."),
                (f"And in {tongue}?",),
                Answer(f"{capital(word)} in {tongue} is {foreign}.", foreign),
            )
        )
    return facts


def emoji_facts(word: str) -> list[Fact]:
    questions = (f"Show me the emoji for {word}.", f"Which emoji is {word}?", f"What is the emoji of {word}?")
    reverse = (f"What does {EMOJI[word]} mean?", f"What is {EMOJI[word]}?")
    return [
        Fact("emoji", questions, (), Answer(f"The emoji for {word} is {EMOJI[word]}.", EMOJI[word])),
        Fact("meaning", reverse, (), Answer(f"{EMOJI[word]} means {word}.", word)),
    ]


# kind of question -> subjects, each with what is known of it
KNOWLEDGE: dict[str, list[tuple[str, list[Fact]]]] = {
    "animals": [(animal, animal_facts(animal)) for animal in ANIMALS],
    "colours and categories": [(thing, thing_facts(thing)) for thing in THINGS],
    "countries": [(country, country_facts(country)) for country in COUNTRIES],
    "opposites": [(a, opposite_facts(a, b)) for pair in OPPOSITE_PAIRS for a, b in (pair, pair[::-1])],
    "arithmetic": [(f"{a},{b}", sum_facts(a, b)) for a in range(11) for b in range(11)],
    "days, months, numbers": [
        ("days", order_facts(DAYS, "day")),
        ("months", order_facts(MONTHS, "month")),
        ("numbers", order_facts([str(n) for n in range(1, 32)], "number")[:-2]),
    ],
    "languages": [(word, translation_facts(word)) for word in DICTIONARY],
    "emoji": [(word, emoji_facts(word)) for word in EMOJI],
}

SMALL_TALK = (
    (
        ("Hello!", "Hi!", "Hello", "Hi there!", "Good morning!", "Hey!"),
        Answer("Hello! What would you like to know?", "hello"),
    ),
    (("How are you?", "How are you today?", "Are you well?"), Answer("I am fine, thank you.", "fine")),
    (
        ("Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "What is your name?"),
        Answer("I am a very small language model.", "model"),
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "Help!"),
        Answer("I can read a short text, count, do small sums and tell stories.", "little"),
    ),
    (("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot!"), Answer("You are welcome.", "welcome")),
    (("Goodbye!", "Bye!", "See you!", "Good night!"), Answer("Goodbye! Come back soon.", "goodbye")),
    (("Are you human?", "Are you a person?", "Are you alive?"), Answer("No, I am a computer program.", "no")),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."),
        Answer("Why did the book go to the doctor? It had a broken back.", "book"),
    ),
    (
        ("Who made you?", "Where do you come from?"),
        Answer("I was trained from nothing on a small computer.", "computer"),
    ),
    (("Do you like stories?", "What do you like?"), Answer("I like short stories with a happy end.", "stories")),
    (
        ("I am sad.", "I feel sad today.", "I am not happy."),
        Answer("I am sorry to hear that. Things will get better.", "sorry"),
    ),
    (("What is one plus one?", "How much is one and one?"), Answer("One plus one is two.", "two")),
)


def fact_episode(chat: Chat, turns: int) -> None:
    """A question about a subject, then questions about "it"."""
    kind = chat.rng.choices(list(KNOWLEDGE), weights=(14, 12, 12, 8, 26, 8, 11, 5))[0]
    subject, facts = chat.rng.choice(KNOWLEDGE[kind])
    asked = 0
    for fact in chat.rng.sample(facts, len(facts)):
        about = f"{subject}: {fact.name}"
        if asked == 0:
            asked += chat.ask(kind, about, fact.phrasings, fact.answer)
        elif asked < turns and fact.follow_ups:
            asked += chat.ask(f"{kind}: it", about, fact.follow_ups, fact.answer)


def small_talk_episode(chat: Chat, turns: int) -> None:
    """Greetings, and questions about the model itself."""
    phrasings, answer = chat.rng.choice(SMALL_TALK)
    chat.ask("small talk", f"small talk: {phrasings[0]}", phrasings, answer)


def unknown_episode(chat: Chat, turns: int) -> None:
    """A question from outside this world, or with a word that does not exist."""
    rng = chat.rng
    odd = odd_word(rng)
    question = rng.choice(STUMPERS).format(
        topic=rng.choice(TOPICS),
        place=rng.choice(ELSEWHERE),
        object=chat.fresh(OBJECTS),
        name=chat.fresh(NAMES),
        animal=rng.choice(list(ANIMALS)),
        huge=rng.randint(21, 999),
        odd=odd,
        Odd=odd.capitalize(),
    )
    chat.ask("not known", "unknown", (question,), UNKNOWN)


def odd_word(rng: random.Random) -> str:
    """A word that no language has: "blorin"."""
    syllables = [rng.choice(BEGINNINGS) + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
    return "".join(syllables) + rng.choice(ENDS)


# ---------------------------------------------------------------------------------------------------------------------
# Lists: counting, sorting, comparing, choosing


def counting(chat: Chat) -> None:
    rng = chat.rng
    start, length = rng.randint(0, 20), rng.randint(3, 7)
    numbers = list(range(start, start + length))
    order = "up"
    if rng.random() < 0.3:
        numbers, order = numbers[::-1], "down"
    questions = (
        f"Count from {numbers[0]} to {numbers[-1]}.",
        f"Please count {order} from {numbers[0]} to {numbers[-1]}.",
    )
    chat.ask(
        "counting", f"count {numbers[0]} {numbers[-1]}", questions, Answer(", ".join(map(str, numbers)) + ".", None)
    )


def sorting(chat: Chat) -> None:
    """Three or four numbers. Which numbers, in whatever order, is the key."""
    numbers = chat.rng.sample(range(1, 31), chat.rng.choice((3, 3, 4)))
    ordered = ", ".join(map(str, sorted(numbers)))
    if chat.claim("text", "sort", ordered, ""):
        given = ", ".join(map(str, numbers))
        question = chat.rng.choice(
            (f"Sort these numbers: {given}.", f"Put these numbers in order: {given}.", f"Sort {given}.")
        )
        chat.say("sorting", question, Answer(f"{ordered}.", None))


def comparing(chat: Chat) -> None:
    low, high = sorted(chat.rng.sample(range(31), 2))
    a, b = chat.rng.sample((low, high), 2)
    if not chat.claim("text", "compare", str(low), str(high)):
        return
    if chat.rng.random() < 0.5:
        question, answer = f"Which is bigger, {a} or {b}?", Answer(f"{high} is bigger than {low}.", str(high))
    else:
        question, answer = f"Which is smaller, {a} or {b}?", Answer(f"{low} is smaller than {high}.", str(low))
    chat.say("comparing", question, answer)


def choosing(chat: Chat) -> None:
    """One of three things is of the asked category. The three are the key."""
    kind = chat.rng.choice([kind for kind in CATEGORIES if kind != "animal"] + ["animal"] * 3)
    right = chat.rng.choice(CATEGORIES[kind])
    wrong = [chat.rng.choice(CATEGORIES[other]) for other in chat.rng.sample([k for k in CATEGORIES if k != kind], 2)]
    options = [right, *wrong]
    if chat.claim("text", "choose", " ".join(sorted(options)), kind):
        chat.rng.shuffle(options)
        question = f"Which of these is {article(kind)}: {options[0]}, {options[1]} or {options[2]}?"
        chat.say("choosing", question, Answer(f"{capital(right)} is {article(kind)}.", right.split()[-1]))


def categories() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"animal": [article(animal) for animal in ANIMALS]}
    for thing, (_, kind) in THINGS.items():
        if kind in ("fruit", "vegetable", "tool", "instrument", "vehicle", "drink"):
            found.setdefault(kind, []).append(thing)
    return found


CATEGORIES = categories()


def list_episode(chat: Chat, turns: int) -> None:
    for _ in range(turns):
        chat.rng.choice((comparing, choosing) if chat.one_word else (counting, sorting, comparing, choosing))(chat)


# ---------------------------------------------------------------------------------------------------------------------
# Reading: a short text, then questions about it


class Item(NamedTuple):
    """What a text says of one thing: Tom has a red kite, and it is in the garden."""

    name: str
    thing: str
    colour: str
    place: str | None


def draw_item(chat: Chat, with_place: bool) -> Item:
    """An item of new words, all of its combinations on this dialog's side of the split."""
    while True:
        name, thing = chat.fresh(NAMES), chat.fresh(OBJECTS)
        colours = [c for c in COLOURS if c not in chat.taken and on_side(("text", name, thing, c), chat.split)]
        places = [p for p in PLACES if p not in chat.taken and on_side(("text", name, thing, p), chat.split)]
        if colours and (places or not with_place):
            break
    item = Item(name, thing, chat.rng.choice(colours), chat.rng.choice(places) if with_place else None)
    chat.taken.update(word for word in item if word)
    chat.keys += [("text", name, thing, attribute) for attribute in item[2:] if attribute]
    return item


def statements(items: list[Item], rng: random.Random) -> str:
    """The items as sentences, in a random order: whose each is, what colour it has and, perhaps, where it is."""
    sentences = []
    for name, thing, colour, place in items:
        own = rng.choice(
            (f"{name} has {article(thing)}.", f"{name} bought {article(thing)}.", f"The {thing} belongs to {name}.")
        )
        sentences.append([own, f"The {thing} is {colour}."])
        if place:
            where = (f"The {thing} is in the {place}.", f"{name} left the {thing} in the {place}.")
            sentences[-1].append(rng.choice(where))
    rng.shuffle(sentences)
    if rng.random() < 0.3:  # owners first, all else later
        rest = [sentence for _, *others in sentences for sentence in others]
        flat = [own for own, *_ in sentences] + rng.sample(rest, len(rest))
    else:
        flat = [sentence for group in sentences for sentence in group]
    return " ".join(flat)


Question = tuple[str, str, Answer]


def ask_colour(item: Item, it: bool, rng: random.Random) -> Question:
    word = rng.choice(("colour", "colour", "colour", "color"))
    question = f"What {word} is it?" if it else f"What {word} is the {item.thing}?"
    return "colour", question, Answer(f"The {item.thing} is {item.colour}.", item.colour)


def ask_owner(item: Item, it: bool, rng: random.Random) -> Question:
    thing = "it" if it else f"the {item.thing}"
    question = rng.choice(
        (f"Who has {thing}?", f"Whose is {thing}?" if it else f"Who has the {item.colour} {item.thing}?")
    )
    return "owner", question, Answer(f"The {item.thing} belongs to {item.name}.", item.name)


def ask_thing(item: Item, it: bool, rng: random.Random) -> Question:
    return (
        "thing",
        f"What does {item.name} have?",
        Answer(f"{item.name} has {article(item.thing)}.", item.thing),
    )


def ask_place(item: Item, it: bool, rng: random.Random) -> Question:
    question = "Where is it?" if it else f"Where is the {item.thing}?"
    return "place", question, Answer(f"The {item.thing} is in the {item.place}.", item.place)


def ask_whether(item: Item, it: bool, rng: random.Random) -> Question:
    thing = "it" if it else f"the {item.thing}"
    if rng.random() < 0.5:
        return "yes or no", f"Is {thing} {item.colour}?", Answer(f"Yes, the {item.thing} is {item.colour}.", "yes")
    other = rng.choice([colour for colour in COLOURS if colour != item.colour])
    return "yes or no", f"Is {thing} {other}?", Answer(f"No, the {item.thing} is {item.colour}.", "no")


def ask_absent(chat: Chat) -> Question:
    """About a thing or a person that no text of this dialog has named."""
    thing, name = chat.fresh(OBJECTS), chat.fresh(NAMES)
    questions = (
        f"What colour is the {thing}?",
        f"Who has the {thing}?",
        f"Where is the {thing}?",
        f"What does {name} have?",
    )
    return "absent", chat.rng.choice(questions), UNKNOWN


def framed(text: str, question: str, rng: random.Random) -> str:
    return rng.choice(
        (
            f"{text} {question}",
            f"{text} {question}",
            f"{text}\n{question}",
            f"{text}\n\n{question}",
            f"Read this text: {text}\n\n{question}",
            f"Text: {text}\nQuestion: {question}",
        )
    )


Maker = Callable[[Item, bool, random.Random], Question]


def reading_episode(chat: Chat, turns: int, often: tuple[Maker, ...] = ()) -> None:
    """A text about one to four things; later turns ask on, about "it" or about another thing.

    What `often` holds is asked that much more often than the rest.
    """
    rng = chat.rng
    with_place = rng.random() < 0.6
    if len(chat.taken) > 24:  # a long dialog has used too many words for another text
        return
    items = [draw_item(chat, with_place) for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4)))]
    text = statements(items, rng)
    item, said = None, False
    if turns > 1 and rng.random() < 0.15:
        chat.say("remember", f"Remember this: {text}", Answer("I will remember it.", "yes"))
        said, turns = True, turns - 1
    asked: set[tuple[str, Item]] = set()
    for _ in range(turns):
        it = item is not None and rng.random() < 0.4
        item = item if it else rng.choice(items)
        absent = not it and rng.random() < 0.15
        makers = (ask_colour, ask_owner, ask_whether, *([] if it else [ask_thing]), *([ask_place] * 2 * with_place))
        makers += often
        kind, question, answer = ask_absent(chat) if absent else rng.choice(makers)(item, it, rng)
        if (kind, item) in asked:  # its answer has been given
            continue
        asked.add((kind, item))
        chat.say(f"reading: {'it' if it else kind}", question if said else framed(text, question, rng), answer)
        said, item = True, None if absent else item


def amounts_episode(chat: Chat, turns: int) -> None:
    """Who has how many: Tom has 3 apples. Mia has 5 pears."""
    rng = chat.rng
    items: list[tuple[str, str, int]] = []
    while len(items) < rng.choice((2, 3)):
        name, thing, amount = chat.fresh(NAMES), rng.choice(COUNTABLES), rng.randint(2, 20)
        if thing not in chat.taken and chat.claim("text", name, thing, str(amount)):
            chat.taken.update((name, thing))
            items.append((name, thing, amount))
    text = " ".join(f"{name} has {amount} {thing}." for name, thing, amount in items)
    for number in range(turns):
        name, thing, amount = rng.choice(items)
        question, answer = rng.choice(
            (
                (f"How many {thing} does {name} have?", Answer(f"{name} has {amount} {thing}.", str(amount))),
                (f"Who has {amount} {thing}?", Answer(f"{name} has {amount} {thing}.", name)),
                (f"Who has the {thing}?", Answer(f"{name} has the {thing}.", name)),
            )
        )
        chat.say("reading: amount", question if number else framed(text, question, rng), answer)


# ---------------------------------------------------------------------------------------------------------------------
# Stories and texts


def draw_cast(chat: Chat) -> Cast:
    """Hero, friend, thing, colour and place of one story, its combinations on the right side of the split."""
    animal = chat.rng.choice(list(ANIMALS)) if chat.rng.random() < 0.2 else None
    while True:
        name, friend = chat.rng.sample(NAMES, 2)
        thing, colour, (place, home) = chat.rng.choice(OBJECTS), chat.rng.choice(COLOURS), chat.rng.sample(PLACES, 2)
        hero = animal or name
        keys = [("text", hero, thing, colour), ("text", hero, thing, place)]
        if all(on_side(key, chat.split) for key in keys):
            chat.keys += keys
            return Cast(name, friend, thing, colour, place, home, animal)


def story_episode(chat: Chat) -> None:
    """A story on request, for dialogs whose answers are plain prose."""
    cast = draw_cast(chat)
    hero = article(cast.animal) if cast.animal else cast.name
    request = chat.rng.choice(
        (
            f"Tell me a story about {hero}.",
            f"Write a story about {hero} and {article(cast.colour)} {cast.thing}.",
            f"Tell me a story about {hero} and {article(cast.thing)}.",
            f"Please write a short story about {hero}.",
        )
    )
    story = tell(cast, chat.rng)
    chat.say("story on request", request, Answer(story, None))


def story_sample(rng: random.Random, split: str, chapters: int = 1) -> Sample:
    chat = Chat(rng, split, None, "plain")
    return Sample("story", (), tell(draw_cast(chat), rng, chapters), tuple(chat.keys))


def retelling_sample(rng: random.Random, split: str) -> Sample:
    """A text about some things, then all that it says of them in other words and another order: reading, undiluted."""
    chat = Chat(rng, split, None, "plain")
    with_place = rng.random() < 0.6
    items = [draw_item(chat, with_place) for _ in range(rng.randint(2, 5))]
    return retelling(chat, items, [ask_colour, ask_owner, ask_thing, *([ask_place] * with_place)])


def drills(count: int, seed: int = 1) -> Iterator[Sample]:
    """Exercises in looking up, for training: words, pairs and statements said again, and retellings of little."""
    rng = random.Random(f"drills {seed}")
    for _ in range(count):
        sample = small_retelling(rng) if rng.random() < 0.35 else said_again(rng)
        yield sample._replace(kind="drill")


def small_retelling(rng: random.Random) -> Sample:
    """Of one to three things, one side or all."""
    chat = Chat(rng, "train", None, "plain")
    each = [ask_colour, ask_thing, ask_owner, ask_place]
    makers = rng.choice([*([maker] for maker in each), each, each])
    items = [draw_item(chat, ask_place in makers or rng.random() < 0.3) for _ in range(rng.choice((1, 2, 2, 3)))]
    return retelling(chat, items, makers)


LINKS = ("", "", "is", "is", "is", "has", "is in the", "is in the", "belongs to", "belongs to", "has a", "has a")


def said_again(rng: random.Random) -> Sample:
    """Words without sense, twice in the same order: "hat Tom red, hat Tom red." Or pairs, the second time in another,
    "hat red, kite blue, bag pink, kite blue, bag pink, hat red.", perhaps linked: "The hat is red. The kite is blue..."
    """
    words = rng.sample(NAMES + COLOURS + OBJECTS + PLACES, 2 * rng.randint(2, 4))
    if rng.random() < 0.1:
        groups, mark = [" ".join(words)], ","
    else:
        link, the, mark = rng.choice(LINKS), rng.choice(("", "The ")), rng.choice((",", "."))
        groups = [the + " ".join(filter(None, (a, link, b))) for a, b in zip(words[::2], words[1::2], strict=True)]
    first = f"{mark} ".join(groups)
    rng.shuffle(groups)
    return Sample("drill", (), f"{first}{mark} {f'{mark} '.join(groups)}.", (), len(first) + 1)


TURNS = (
    ("{name} {thing}.", "{thing} {name}."),
    ("{name} has {one}.", "The {thing} belongs to {name}."),
    ("{name} bought {one}.", "The {thing} belongs to {name}."),
    ("{name} has {one}.", "Who has the {thing}? {name}."),
    ("{name} has {amount} {thing}.", "Who has the {thing}? {name}."),
    ("{name} has {amount} {thing}.", "Who has {amount} {thing}? {name}."),
)


def turned_round(rng: random.Random) -> Sample:
    """Pairs, then each the other way round: "Tom has a hat. Mia has a kite. Who has the kite? Mia. Who has the..."."""
    (first, second), count = rng.choice(TURNS), rng.randint(2, 5)
    things = rng.sample(COUNTABLES if "amount" in first else OBJECTS, count)
    told, asked = [], []
    for name, thing in zip(rng.sample(NAMES, count), things, strict=True):
        amount = rng.choice([n for n in range(2, 21) if on_side(("text", name, thing, str(n)), "train")])
        words = {"name": name, "thing": thing, "one": article(thing), "amount": amount}
        told.append(first.format(**words))
        asked.append(second.format(**words))
    rng.shuffle(asked)
    text = " ".join(told)
    return Sample("turned", (), " ".join((text, *asked)), (), len(text))


def owners(count: int, seed: int = 1) -> Iterator[Sample]:
    """For training: pairs turned round, and dialogs that ask most often whose a thing is."""
    rng = random.Random(f"owners {seed}")
    for _ in range(count):
        yield (turned_round(rng) if rng.random() < 0.4 else read_again(rng, (ask_owner,) * 6))._replace(kind="owners")


def practice(count: int, seed: int = 1) -> Iterator[Sample]:
    """Dialogs about one text each, for training: most questions compare what it says, or ask who has how many."""
    rng = random.Random(f"practice {seed}")
    for _ in range(count):
        yield read_again(rng, (ask_whether,) * 8 + (ask_owner,) * 2)._replace(kind="practice")


def read_again(rng: random.Random, often: tuple[Maker, ...]) -> Sample:
    """A dialog about one text, for training."""
    system, shape = rng.choice(SYSTEMS)
    chat, turns = Chat(rng, "train", system, shape), rng.randint(1, 5)
    if rng.random() < 0.35:
        amounts_episode(chat, turns)
    else:
        reading_episode(chat, turns, often)
    return finished(chat)


def retelling(chat: Chat, items: list[Item], makers: list[Maker]) -> Sample:
    rng = chat.rng
    told = [maker(item, False, rng)[2].sentence for item in items for maker in makers]
    rng.shuffle(told)
    text = statements(items, rng)
    return Sample("retelling", (), " ".join([text, *told]), tuple(chat.keys), len(text))


def foreign_sample(rng: random.Random, split: str) -> Sample:
    """Two to four sentences in one language, at times with an emoji after them."""
    who, what, where, frames = FOREIGN[rng.choice(list(FOREIGN))]
    sentences, keys = [], []
    while len(sentences) < rng.choice((2, 3, 4)):
        words = {"who": rng.choice(who), "what": rng.choice(what), "where": rng.choice(where)}
        if on_side(key := ("text", *words.values()), split):
            keys.append(key)
            sentences.append(capital(rng.choice(frames).format(**words)))
    mark = " " + rng.choice(list(EMOJI.values())) if rng.random() < 0.4 else ""
    return Sample("foreign", (), " ".join(sentences) + mark, tuple(keys))


# ---------------------------------------------------------------------------------------------------------------------
# The stream

EPISODES: tuple[tuple[Callable[[Chat, int], None], int], ...] = (
    (reading_episode, 40),
    (fact_episode, 40),
    (unknown_episode, 6),
    (small_talk_episode, 5),
    (list_episode, 18),
    (amounts_episode, 7),
)


def dialog_sample(rng: random.Random, split: str, at_least: int = 1) -> Sample:
    """One dialog of one to six exchanges, or of `at_least` where that is more."""
    system, shape = rng.choice(SYSTEMS)
    chat = Chat(rng, split, system, shape)
    if shape == "plain" and at_least == 1 and rng.random() < 0.05:
        story_episode(chat)
    target = max(at_least, rng.choice((1, 1, 2, 3, 4, 5, 6)))
    while chat.turn <= target:
        episode = rng.choices([episode for episode, _ in EPISODES], [weight for _, weight in EPISODES])[0]
        episode(chat, rng.randint(1, min(5, target - chat.turn + 1)))
    return finished(chat)


def finished(chat: Chat) -> Sample:
    """The dialog as it stands, its system text first."""
    system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    return Sample(chat.kind, (*system, *chat.messages), "", tuple(chat.keys))


def samples(split: str, count: int, seed: int = 1) -> Iterator[Sample]:
    """The corpus: `count` samples of one split ("train" or "held_out"), always the same for the same seed."""
    rng = random.Random(f"{split} {seed}")
    for _ in range(count):
        draw = rng.random()
        if draw < 0.80:
            yield dialog_sample(rng, split)
        elif draw < 0.81:
            yield dialog_sample(rng, split, at_least=rng.randint(8, 14))
        elif draw < 0.885:
            yield retelling_sample(rng, split)
        elif draw < 0.965:
            yield story_sample(rng, split)
        elif draw < 0.97:
            yield story_sample(rng, split, chapters=rng.randint(3, 5))
        else:
            yield foreign_sample(rng, split)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print samples of the demo corpus, one JSON object per line.")
    parser.add_argument("--split", choices=("train", "held_out"), default="train")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for sample in samples(options.split, options.count, options.seed):
        print(json.dumps(sample._asdict(), ensure_ascii=False))


if __name__ == "__main__":
    main()
