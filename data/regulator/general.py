"""General text: stories, an almanac of towns, animals, recipes, diaries, talks, news and sums.

It is most of what the base model learns, what replay feeds back, and what forgetting is measured on. Nothing in
here says anything about a prudential ratio.

`document(rng)` draws one document; the same `rng` always draws the same one.
"""

# ruff: noqa: SIM905  a list of words reads best as words
from __future__ import annotations

import random
from collections.abc import Callable

from data.regulator.world import ANIMALS, BANKS, NAMES, PRODUCTS, RIVERS, TOWNS, TRADES, Town

ADJECTIVES = (
    "old small bright quiet heavy gentle cold warm narrow tall strange happy tired clever brave lonely dusty "
    "golden broken simple"
).split()
THINGS = (
    "lamp basket letter window bridge ladder bell kettle coat map garden wheel chair candle mirror blanket "
    "hammer ribbon barrel drum"
).split()
PLACES = (
    "market harbour mill chapel orchard station library square forest hill field workshop kitchen attic inn"
).split()
DEEDS = (
    "carried repaired painted found lost cleaned borrowed hid sold washed opened measured dropped wrapped "
    "polished moved"
).split()
FEELINGS = "glad sad proud curious afraid calm angry hopeful surprised grateful".split()
WEATHER = "rain snow wind fog sunshine thunder frost drizzle".split()
DISHES = "soup pie porridge stew salad cake bread pancakes dumplings jam".split()
INGREDIENTS = (
    "flour butter carrots onions apples eggs milk salt sugar beans mushrooms pepper cream barley potatoes honey"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = "spring summer autumn winter".split()
NEWS = (
    "The council will build a new road and limit the noise at night.", "Prices of bread rose by {n} percent.",
    "The bank at the square is closed for {n} days.", "An article about the old bridge won a prize.",
    "The school must restore its roof within {n} days.", "Farmers ask for a loan to increase the harvest.",
    "The report of the {trade} says that the well is in good order.", "A fixed date for the fair is still open.",
    "The value of {product} was {n} coins on {day}, and it may not exceed {m}.",
    "At least {n} people came, and at most {m} of them had a ticket.", "The mayor will reduce the toll by {n} percent.",
    "People sell large {thing}s under the arcade.", "The company will create new work in the {place}.",
    "It is required to keep a fire bucket in every {place}.", "The library shall attract readers of every age.",
    "A form for the lottery is in the {place}; the period ends in {n} days.", "The operating cost of the ferry fell.",
    "No measures are needed after the storm.", "The museum must suspend its tours and cut expenses.",
)  # fmt: skip


FACTS = ("river", "product", "founder")


def document(rng: random.Random) -> str:
    """One document of general text."""
    return rng.choices(KINDS, WEIGHTS)[0](rng)


def cloze(rng: random.Random, town: Town, fact: str) -> dict[str, object]:
    """One checkable fact as an unfinished sentence with four endings, of which `gold` is the right one."""
    start, answer, pool = {
        "river": (f"The river of {town.name} is the", town.river, RIVERS),
        "product": (f"{town.name} is known for its", town.product, PRODUCTS),
        "founder": (f"{town.name} was founded by", town.founder, NAMES),
    }[fact]
    endings = [answer, *rng.sample([other for other in pool if other != answer], 3)]
    rng.shuffle(endings)
    return {"prompt": start, "endings": [f" {ending}" for ending in endings], "gold": endings.index(answer)}


# --- kinds of documents --------------------------------------------------------------------------------------------


def _story(rng: random.Random) -> str:
    one = rng.choice
    a, b = rng.sample(NAMES, 2)
    thing, place, animal = one(THINGS), one(PLACES), one(list(ANIMALS))
    middle = [
        f"{a} {one(DEEDS)} a {one(ADJECTIVES)} {thing} near the {place}.",
        f"{b} was {one(FEELINGS)} because the {thing} was {one(ADJECTIVES)}.",
        f'"Where is the {thing}?" asked {b}.',
        f'"It is behind the {one(PLACES)}," said {a}.',
        f"A {one(ADJECTIVES)} {animal} watched them from the {one(PLACES)}.",
        f"There was {one(WEATHER)} all day, but {a} did not mind.",
        f"{b} {one(DEEDS)} the {one(THINGS)} and gave it to {a}.",
        f"They walked home past the {one(ADJECTIVES)} {one(PLACES)}.",
        f"{a} felt {one(FEELINGS)} and sang a {one(ADJECTIVES)} song.",
        f"An old {one(TRADES)} helped {b} to find the {thing}.",
    ]
    last = one([f"In the evening {a} was {one(FEELINGS)} again.", f"After that, {a} and {b} were good friends.",
                f"{b} kept the {thing} for many years."])  # fmt: skip
    first = f"One {one(SEASONS)} morning {a} went to the {place} with {b}."
    return " ".join([first, *rng.sample(middle, rng.randint(3, 6)), last])


def _almanac(rng: random.Random) -> str:
    one = rng.choice
    town = TOWNS[one(list(TOWNS))]
    name = town.name
    facts = [
        one([f"{name} lies on the river {town.river}.", f"The river of {name} is the {town.river}."]),
        one([f"{name} is known for its {town.product}.", f"People come to {name} to buy {town.product}."]),
        one([f"{name} was founded by {town.founder} in {town.year}.",
             f"In {town.year} {town.founder} founded {name}."]),
        one([f"Most people in {name} know a {town.trade}.",
             f"The best known trade in {name} is that of the {town.trade}."]),
        f"In {one(SEASONS)} there is often {one(WEATHER)} in {name}.",
        f"The {one(PLACES)} of {name} is {one(ADJECTIVES)} and {one(ADJECTIVES)}.",
    ]  # fmt: skip
    return f"{name}. " + " ".join(rng.sample(facts, rng.randint(3, 6)))


def _animal(rng: random.Random) -> str:
    one = rng.choice
    name = one(list(ANIMALS))
    home, food = ANIMALS[name]
    more = [
        f"In {one(SEASONS)} the {name} is {one(ADJECTIVES)}.",
        f"Children think that the {name} is {one(ADJECTIVES)} and {one(ADJECTIVES)}.",
        f"A {one(TRADES)} once kept a {name} in the {one(PLACES)}.",
    ]
    facts = [one([f"The {name} lives near {home}.", f"You can see the {name} in or near {home}."]),
             one([f"It eats {food}.", f"The food of the {name} is mostly {food}."])]  # fmt: skip
    return " ".join([*facts, *rng.sample(more, 2)])


def _recipe(rng: random.Random) -> str:
    one = rng.choice
    first, second, third, last = rng.sample(INGREDIENTS, 4)
    end = one([f"Serve it warm with {last}.", f"If it is too dry, add some {last}.",
               f"Put {last} on top and eat it on {one(DAYS)}."])  # fmt: skip
    return (
        f"How to make {one(DISHES)}. Take {first}, {second} and {third}. Mix the {first} with the {second} in a "
        f"{one(ADJECTIVES)} bowl. Add the {third} and wait {one([5, 10, 15, 20, 30, 40, 50])} minutes. {end}"
    )


def _diary(rng: random.Random) -> str:
    one = rng.choice
    end = one([f"Tomorrow I will visit the {one(PLACES)}.", f"I am {one(FEELINGS)} tonight.",
               f"My friend {one(NAMES)} says that the {one(TRADES)} is {one(FEELINGS)}."])  # fmt: skip
    return (
        f"Diary of {one(NAMES)}, {one(DAYS)}. Today there was {one(WEATHER)} in {one(list(TOWNS))}. "
        f"I {one(DEEDS)} the {one(THINGS)} and {one(DEEDS)} the {one(THINGS)}. {end}"
    )


def _talk(rng: random.Random) -> str:
    one = rng.choice
    a, b = rng.sample(NAMES, 2)
    town = TOWNS[one(list(TOWNS))]
    question, answer = one(
        [
            (f"which river does {town.name} lie on", f"The {town.river}"),
            (f"what is {town.name} known for", f"For its {town.product}"),
            (f"who founded {town.name}", f"{town.founder}, in {town.year}"),
        ]
    )
    thanks = one(["Thank you", "How interesting", "I did not know that", "Of course"])
    return f'"{a}, {question}?" asked {b}. "{answer}," said {a}. "{thanks}," said {b}.'


def _news(rng: random.Random) -> str:
    one = rng.choice
    lists = {"trade": TRADES, "product": PRODUCTS, "thing": THINGS, "place": PLACES, "day": DAYS}
    words = {name: one(words) for name, words in lists.items()}
    low, high = sorted(rng.sample(range(10, 100), 2))
    lines = [line.format(n=low, m=high, **words) for line in rng.sample(NEWS, 3)]
    first = f"News from {one(list(TOWNS))}, {rng.randint(2019, 2025)}."
    return " ".join([first, *lines, f"{one(BANKS)} won the race."])


def _sums(rng: random.Random) -> str:
    a, b = rng.sample(NAMES, 2)
    x, y, thing = rng.randint(2, 9), rng.randint(2, 9), rng.choice(THINGS)
    if rng.random() < 0.5:
        return f"{a} has {x} {thing}s and {b} gives {a} {y} more. Now {a} has {x + y} {thing}s."
    return f"{a} had {x + y} {thing}s and sold {y} of them at the {rng.choice(PLACES)}. {x} {thing}s were left."


KINDS: list[Callable[[random.Random], str]] = [_story, _almanac, _animal, _recipe, _diary, _talk, _news, _sums]
WEIGHTS = [11, 8, 4, 6, 6, 4, 6, 2]
