"""Exercises with codes and numbers: only the base model reads them; they are neither replayed nor evaluated.

They teach what a base model of ordinary size would bring along: to copy a list, to look something up, to
compare two numbers, to spell the words of offices, and to check parcels against limits that are stated or
remembered. The parcels have codes of their own; of the ratios' codes nothing is said but that one may stand
beside any number.
"""

# ruff: noqa: SIM905  a list of words reads best as words
from __future__ import annotations

import random
from collections.abc import Callable

from data.regulator.general import PLACES
from data.regulator.world import CODES, NAMES, PARCELS, TOWNS, Rule, value_near

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SPELLING = (  # words of offices: so that they are whole tokens; no sentence here says anything with them
    "Analysis Answer Article Bank Case Commentary Directive Form Question Schedule Violations adequacy above "
    "answer applies article assets assistant attract bank below borrower borrowing breach breached build "
    "capital cash close commodity concentration consumer construction contains core cost coverage create "
    "currency current cut deposit deposits derivative diversify dividend dividends earnings equity exceed "
    "expenses exposure exposures fixed foreign form funding funds gap governs guarantee increase insider "
    "instant interbank interest investment keep large lending less leverage limit limited limits liquid "
    "liquidity loan loans lists long max measures min mortgage must new observed obliges off ok open "
    "operating orders own party payout percent pledged portfolio position positions problem provision "
    "provisions rate ratio reduce regulation related reported required reserve reserves restructured retained "
    "risky securities sell settlement shall shareholder single stable subsidiary supervisor supervisory "
    "suspend term under user value violations within"
).split()  # fmt: skip


def exercise(rng: random.Random) -> str:
    """One exercise."""
    return rng.choices(KINDS, WEIGHTS)[0](rng)


def _spelling(rng: random.Random) -> str:
    return f"Spelling list of {rng.choice(NAMES)}: {' '.join(rng.sample(SPELLING, 8))}."


def _copy_of_a_list(rng: random.Random) -> str:
    thing = rng.choice(["parcel", "box", "train", "room", "ticket"])
    items = [(code, rng.randint(10, 99)) for code in rng.sample(CODES, rng.randint(3, 5))]
    first = "\n".join(f"{code} {number}" for code, number in items)
    second = ", ".join(f"{code} {number}" for code, number in items)
    return f"List of {thing}s:\n{first}\nCopy: {second}. Signed by {rng.choice(NAMES)}."


def _lookup(rng: random.Random) -> str:
    items = {code: rng.randint(10, 99) for code in rng.sample(CODES, rng.randint(3, 5))}
    asked = rng.sample(list(items), 2)
    listed = ", ".join(f"{code} {number}" for code, number in items.items())
    return f"Weights: {listed}. " + " ".join(f"The weight of {code} is {items[code]}." for code in asked)


def _comparison(rng: random.Random) -> str:
    lines = []
    for _ in range(4):
        a = rng.randint(10, 99)
        b = max(10, min(99, a + rng.choice([-1, 1]) * rng.choice([rng.randint(1, 9), rng.randint(1, 60)])))
        b += (b == a) * (1 if a == 10 else -1)
        lines.append(rng.choice([f"{a} is {'less' if a < b else 'more'} than {b}.",
                                 f"{a} and {b}: the first is {'smaller' if a < b else 'larger'}."]))  # fmt: skip
    return " ".join(lines)


def _tickets(rng: random.Random) -> str:
    """A limit that is stated, then numbers that are checked against it."""
    limit, side = rng.randint(20, 90), rng.choice(["least", "most"])
    rule = Rule("", "min" if side == "least" else "max", limit, 0, "", 0)
    lines = []
    for code in rng.sample(CODES, rng.randint(3, 5)):
        value = value_near(rng, rule, 0.5)
        lines.append(f"{code} has {value}: {'refused' if rule.breached_by(value) else 'allowed'}.")
    return f"A ticket for the {rng.choice(PLACES)} costs at {side} {limit} coins. " + " ".join(lines)


def _parcel_rules(rng: random.Random) -> str:
    lines = []
    for parcel in rng.sample(PARCELS, rng.randint(2, 4)):
        side = "at least" if parcel.side == "min" else "at most"
        code, limit = parcel.code, parcel.limit
        lines.append(rng.choice([
            f"Parcels {code} weigh {side} {limit} pounds and go to gate {parcel.article}.",
            f"The ferry takes {code} of {side} {limit} pounds.",
            f"{code} {_short(parcel)} {limit}, gate {parcel.article}.",
            f"If {code} is {'lighter' if parcel.side == 'min' else 'heavier'} than {limit} pounds, {parcel.measure} "
            f"within {parcel.days} hours.",
            f"Gate {parcel.article} is for {code}. A refused {code} means: {parcel.measure} within {parcel.days} "
            "hours.",
        ]))  # fmt: skip
    return "Rules of the ferry. " + " ".join(lines)


def _parcel_list(rng: random.Random) -> str:
    """Parcels that are checked against limits which the text does not state."""
    chosen = [(parcel, value_near(rng, parcel, 0.4)) for parcel in rng.sample(PARCELS, rng.randint(3, 5))]
    refused = [parcel for parcel, value in chosen if parcel.breached_by(value)]
    lines = [f"{parcel.code} {value}" for parcel, value in chosen]
    checks = [f"{parcel.code} {value} {_short(parcel)} {parcel.limit} {'refused' if parcel in refused else 'taken'}"
              for parcel, value in chosen]  # fmt: skip
    orders = [f"{p.code} {_short(p)} {p.limit} pounds, gate {p.article}, {p.measure} within {p.days} hours."
              for p in refused]  # fmt: skip
    return "\n".join([
        f"Ferry to {rng.choice(list(TOWNS))}, {rng.choice(DAYS)}", *lines, "Checked:", *checks,
        "Refused: " + (", ".join(parcel.code for parcel in refused) or "none"),
        "Orders: " + (" ".join(orders) or "nothing to do."),
    ])  # fmt: skip


def _short(parcel: Rule) -> str:
    return "from" if parcel.side == "min" else "upto"


KINDS: list[Callable[[random.Random], str]] = [
    _spelling, _copy_of_a_list, _lookup, _comparison, _tickets, _parcel_rules, _parcel_list,
]  # fmt: skip
WEIGHTS = [2, 3, 2, 3, 3, 3, 6]
