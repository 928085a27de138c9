"""A grammar of short stories: a hero, a thing, something that goes wrong, how it ends.

Knows words and their order; which (name, object, attribute) combinations may be told is decided by the caller.
"""
# ruff: noqa: SIM905 (a long list of words reads best as one text)

from __future__ import annotations

import random
from dataclasses import dataclass

from demo.world import ANIMALS, GIRLS

OPENINGS = (
    "Once upon a time, there was a {trait} {kind} named {N}. ",
    "Once upon a time, a {trait} {kind} named {N} lived near the {home}. ",
    "There once was a {kind} called {N}, who was very {trait}. ",
    "One {weather} morning, {N} woke up early. {He} was a {trait} {kind}. ",
    "{N} was a {trait} {kind} who lived in a small house by the {home}. ",
    "Long ago, in a house behind the {home}, lived a {trait} {kind}. {His} name was {N}. ",
    "It was a {weather} day, and {N} was playing near the {home}. ",
)
ANIMAL_OPENINGS = (
    "{N} was very {trait}. It lived in the {home} with its friend {F}. ",
    "{N} lived near the {home}. Everyone said that it was {trait}. ",
    "Once upon a time, {N} lived in the {home}. It was {trait} and had a friend called {F}. ",
    "One {weather} morning, {N} left its home in the {home}. It was very {trait}. ",
)
TREASURES = (
    "{He} had a {c} {o} that {he} loved more than anything. ",
    "{His} favourite thing was a {c} {o}. ",
    "For {his} birthday, {he} got a {c} {o}. ",
    "{His} {elder} had given {him} a {c} {o}. ",
    "Every day {he} played with {his} {c} {o}. ",
    "{He} always carried a {c} {o}. ",
)
ENDINGS = (
    "That night, {N} slept very well.",
    "{N} never forgot that day.",
    "From then on, {N} and {F} were the best of friends.",
    "And they all went home and ate warm soup.",
    "{N} smiled all the way home.",
    "{He} had learned that it is good to ask for help.",
    "{He} had learned that sharing makes everyone happy.",
    "{He} had learned to be careful with the things {he} loved.",
    "And from that day on, {N} was never sad again.",
    "They laughed until the sun went down.",
    '"What a day!" said {N}. "Tomorrow we will play again."',
    "The end.",
)

# Each plot: steps in order; of each step one sentence is told.
PLOTS = (
    (  # lost and found
        (
            "One day the {o} was gone. ",
            "One morning {N} could not find the {o}. ",
            "But after lunch, the {o} was not there. ",
        ),
        (
            "{N} looked under the bed and behind the door. ",
            "{He} looked everywhere, but it was no use. ",
            "{He} began to cry. ",
        ),
        (
            '"Do not cry," said {F}. "I will help you." ',
            "{F} heard {him} and came to help. ",
            '"Let us look together," said {F}. ',
        ),
        (
            "A {a} had carried it to the {p}. ",
            "The wind had blown it to the {p}. ",
            "{N} had left it in the {p} the day before. ",
        ),
        (
            "At last they found it there. ",
            "There they found it, wet but safe. ",
            "They ran to the {p}, and there it was! ",
        ),
    ),
    (  # broken and mended
        (
            "One day {he} ran too fast and the {o} broke. ",
            "One day the {o} fell down and broke. ",
            "But then a {a} jumped on the {o}, and it broke. ",
        ),
        ("{N} was very sad. ", '"Oh no!" said {N}. ', "{He} did not know what to do. "),
        (
            "{F} had a box of tools in the {p}. ",
            "{He} took it to {F}, who worked in the {p}. ",
            "So {he} went to the {p} to ask {F} for help. ",
        ),
        (
            "They worked all day. ",
            "{F} used a little glue and a lot of time. ",
            '"This is easy," said {F}, and went to work. ',
        ),
        ("In the evening the {o} was as good as new. ", "Soon the {o} was even better than before. "),
    ),
    (  # sharing
        (
            "One day {N} met {F} in the {p}. ",
            "In the {p} {he} saw {F}, who looked sad. ",
            "{F} was sitting alone in the {p}. ",
        ),
        (
            '"I have nothing to play with," said {F}. ',
            '"May I play with your {o}?" asked {F}. ',
            "{F} looked at the {o} for a long time. ",
        ),
        ("At first {N} said no. ", "{N} did not want to share. ", "{N} thought about it. "),
        (
            "But then {he} felt sorry for {F}. ",
            "But playing alone was no fun. ",
            "Then {he} remembered how kind {F} had been. ",
        ),
        (
            "So they played with the {o} together. ",
            '"Here, we can share it," said {N}. ',
            "{N} gave the {o} to {F} for a day. ",
        ),
    ),
    (  # storm
        (
            "Suddenly dark clouds came, and it began to rain. ",
            "Then a big storm came over the {p}. ",
            "In the afternoon the sky turned black. ",
        ),
        (
            "{N} was afraid of the thunder. ",
            "The wind was so strong that {N} could hardly stand. ",
            "{N} had no coat and was soon wet. ",
        ),
        (
            "{He} hid in the {p} with the {o}. ",
            "{He} ran to the {p} and held the {o} tight. ",
        ),
        ("{F} was there too. ", "There {he} met {F}, who was also hiding. ", '"Come in, it is dry here," said {F}. '),
        (
            "They told each other stories until the sun came back. ",
            "Together they were not afraid. ",
            "When the rain stopped, they saw a rainbow. ",
        ),
    ),
    (  # a hungry animal
        (
            "On the way to the {p}, {he} met a little {a}. ",
            "One day a {a} sat in front of the {p}. ",
            "In the {p} {he} heard a sound. It was a {a}. ",
        ),
        ("The {a} was hungry. ", "The {a} was cold and had no home. ", "The {a} had hurt its foot. "),
        ("{N} gave it some bread and water. ", "{N} sat down and spoke to it softly. ", "{N} asked {F} what to do. "),
        (
            "{He} made a warm bed for it, next to the {o}. ",
            "{F} brought a warm blanket. ",
            "Soon the {a} felt better. ",
        ),
        (
            "The next day, the {a} followed {N} everywhere. ",
            "The {a} became {his} friend. ",
            "The {a} was so happy that it danced. ",
        ),
    ),
    (  # a race
        ("One day there was a race from the {p} to the {home}. ", '"Let us race to the {p}!" said {F}. '),
        ("{F} was fast, but {N} was clever. ", "{F} ran like the wind. ", "{N} wanted to win more than anything. "),
        ("Halfway there, {F} fell down. ", "Then {F} stepped on a stone and fell. ", "But {F} saw a {a} and stopped. "),
        ("{N} stopped to help. ", "{N} turned around and helped {him2} up. ", '"Are you hurt?" asked {N}. '),
        (
            "So nobody won the race, and nobody minded. ",
            "They reached the end hand in hand. ",
            "Everyone gave {N} a prize for being kind. ",
        ),
    ),
    (  # a gift
        ("{N} wanted to make {F} happy. ", "Soon it would be the birthday of {F}. ", "{F} had been ill for a week. "),
        (
            "So {he} went to the {p} to look for a present. ",
            "But {he} had no money for a present. ",
            "{He} asked everyone in the {p} for an idea. ",
        ),
        (
            "Then {he} thought of the {o}. ",
            '"I will give away my {o}," {he} said. ',
            "{He} put the {o} in a box with a ribbon. ",
        ),
        (
            "When {F} opened the box, there was a big smile. ",
            '"For me? Thank you!" said {F}. ',
            "{F} was so happy that {N} was happy too. ",
        ),
    ),
    (  # afraid of the dark
        (
            "One night {N} heard a noise in the {p}. ",
            "It was dark, and something moved in the {p}. ",
            "At night there was a strange light in the {p}. ",
        ),
        (
            "{He} was afraid and hid under the blanket. ",
            "{His} heart beat fast. ",
            '"Is it a monster?" whispered {N}. ',
        ),
        (
            "But {he} took the {o} and was brave. ",
            "With the {o} in {his} hand, {he} went to look. ",
            "{F} took {his} hand, and they went to look. ",
        ),
        ("It was only a {a}! ", "And what was it? A little {a}! ", "There sat a {a}, as afraid as {N}. "),
        (
            "They laughed and laughed. ",
            "{N} gave it some milk and went back to bed. ",
            "After that, {N} was not afraid of the dark. ",
        ),
    ),
    (  # the trade
        ("One day {he} went to the market in front of the {p}. ", "A man came to the {p} with a cart full of things. "),
        (
            "There {he} saw a toy that {he} wanted very much. ",
            "He had sweets in every colour. ",
            "There was a bird that could sing. ",
        ),
        (
            '"Give me your {o} and it is yours," said the man. ',
            "But it was too expensive. ",
            "{He} almost traded the {o} for it. ",
        ),
        ('"Think about it," said {F}. ', "{F} did not like the man. ", "Then {he} thought of {his} {elder}. "),
        (
            "So {N} kept the {o}, and was glad. ",
            '"No, thank you," said {N}, and kept the {o}. ',
            "{N} went home with the {o}, proud and happy. ",
        ),
    ),
    (  # growing something
        (
            "One spring, {N} found a seed in the {p}. ",
            "{F} gave {him} a tiny seed. ",
            "One day {he} planted a seed behind the {p}. ",
        ),
        (
            "{He} gave it water every day. ",
            "{He} waited and waited, but nothing happened. ",
            "A {a} wanted to eat it, but {N} was watching. ",
        ),
        (
            '"You must be patient," said {F}. ',
            "Then the sun came, and a green leaf came out. ",
            "{He} put the {o} next to it to keep it safe. ",
        ),
        (
            "In summer there was a big flower. ",
            "Soon it was a tree, taller than {N}. ",
            "In the end it was full of sweet apples. ",
        ),
    ),
    (  # over the water
        (
            "{N} wanted to cross the river to see the {p}. ",
            "The way to the {p} went over a river, and the bridge was gone. ",
        ),
        ("The water was cold and deep. ", "{He} could not swim. ", "The {o} almost fell into the water. "),
        ("{F} came by in a little boat. ", "{F} built a raft from old wood. ", "A {a} showed {him} a safe way. "),
        ("Together they reached the other side. ", '"Hold on!" said {F}, and they went across. '),
        ("In the {p} they ate bread and honey. ", "The {p} was even more beautiful than {he} had thought. "),
    ),
    (  # snow
        ("In the night it had snowed. ", "It was winter, and everything was white. "),
        (
            "{N} and {F} built a snowman in front of the {p}. ",
            "{N} went to the {p} with {F}, and they slid down the hill. ",
        ),
        (
            "The snowman got the {o} as a present. ",
            "The {o} fell into the deep snow. ",
            "{N} lost the {o} in the snow. ",
        ),
        ("A {a} dug it out again. ", "When the sun came, there it was. ", "{F} found it with cold hands. "),
        ("Then they drank hot chocolate. ", "They went inside to get warm. "),
    ),
)

CONNECTIONS = (
    "The next day, there was more to come. ",
    "But that was not all. ",
    "A week later, something else happened. ",
    "Some days are like that, and others are not. ",
    "Then came another day. ",
)
TRAITS = (
    "kind shy brave curious cheerful quiet clever lazy happy lonely careful funny hungry proud friendly gentle".split()
)
WEATHERS = "sunny cold rainy windy warm foggy bright snowy".split()
ELDERS = "mother father aunt uncle grandmother grandfather".split()
FEMALE = frozenset(GIRLS)


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about. With `animal` the hero is "the little dog" and not the child `name`."""

    name: str
    friend: str
    thing: str
    colour: str
    place: str
    home: str
    animal: str | None = None


def words_for(cast: Cast, rng: random.Random) -> dict[str, str]:
    """The substitutions of one story: pronouns follow the hero, everything else is drawn."""
    if cast.animal:
        he, his, him = "it", "its", "it"
    elif cast.name in FEMALE:
        he, his, him = "she", "her", "her"
    else:
        he, his, him = "he", "his", "him"
    return {
        "N": f"the little {cast.animal}" if cast.animal else cast.name,
        "F": cast.friend,
        "o": cast.thing,
        "c": cast.colour,
        "p": cast.place,
        "home": cast.home,
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "His": his.capitalize(),
        "him": him,
        "him2": "her" if cast.friend in FEMALE else "him",
        "kind": "girl" if cast.name in FEMALE else "boy",
        "trait": rng.choice(TRAITS),
        "weather": rng.choice(WEATHERS),
        "elder": rng.choice(ELDERS),
        "a": rng.choice([word for word in ANIMALS if word != cast.animal]),
    }


def tell(cast: Cast, rng: random.Random, chapters: int = 1) -> str:
    """One story. Every chapter is another plot with the same cast, about 70 words each."""
    words = words_for(cast, rng)
    story = rng.choice(ANIMAL_OPENINGS if cast.animal else OPENINGS)
    story += rng.choice(TREASURES)
    for number, plot in enumerate(rng.sample(PLOTS, chapters)):
        story += rng.choice(CONNECTIONS) if number else ""
        story += "".join(rng.choice(step) for step in plot)
    story += rng.choice(ENDINGS)
    return capitalize_sentences(story.format_map(words))


def capitalize_sentences(text: str) -> str:
    """Raise the first letter after a full stop: "the little dog" may begin a sentence."""
    for stop in ".!?":
        text = text.replace(f"{stop} the little", f"{stop} The little")
    return text[0].upper() + text[1:]
