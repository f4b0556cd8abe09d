"""The facts of the example's two worlds, drawn once from fixed seeds.

The general world has towns, animals and a ferry that takes parcels by class. The regulated world has banks and
prudential ratios, each with a side (`min` or `max`), a limit, an article, a measure and a number of days. Every
ratio is reported in one form. Five of the eight forms are common in the instruction data and three are rare
there: their limits are hardly shown, so a model has to know them from the regulations.

A class of parcel and a ratio are built alike (a code, a side, a limit, what follows), so exercises can teach
the skill of checking a list against remembered limits, without one fact of the regulations: the two never share
a code.
"""

# ruff: noqa: SIM905  a list of words reads best as words
from __future__ import annotations

import random
from dataclasses import dataclass

SEED_TOWNS, SEED_CODES, SEED_PARCELS, SEED_RATIOS = 7, 5, 13, 11
NUM_TOWNS, NUM_SPARE_CODES, NUM_PARCELS = 30, 16, 30
NUM_FORMS, RATIOS_PER_FORM, NUM_COMMON_FORMS = 8, 5, 5
LOWEST_LIMIT, HIGHEST_LIMIT = 20, 85  # two digits, and room for values on either side

CONSONANTS = "BCDFGHKLMNPSTVZ"
NAMES = (
    "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Leon Maria Nina Oscar Paula Quinn Rosa "
    "Simon Tessa Viktor Wanda Yuri Zoe Adam Bella Cyril Dora Emil Fiona"
).split()
TRADES = (
    "baker fisher carpenter teacher doctor miller gardener weaver painter sailor farmer smith tailor shepherd "
    "clockmaker librarian"
).split()
PRODUCTS = "honey cheese wool timber salt glass paper apples copper bread pottery silk wine tea lamps boats".split()
RIVERS = "Aven Brisk Calder Dunn Esk Forth Gale Hollow Iris Jade Kite Lorn Moss Nettle Orme Pike".split()
ANIMALS = {
    "otter": ("rivers", "fish"), "owl": ("old barns", "mice"), "fox": ("forests", "rabbits"),
    "heron": ("marshes", "frogs"), "badger": ("burrows", "roots"), "squirrel": ("oak trees", "nuts"),
    "goat": ("hills", "grass"), "bear": ("caves", "berries"), "swan": ("lakes", "weeds"),
    "hedgehog": ("gardens", "beetles"), "eagle": ("cliffs", "snakes"), "beaver": ("dams", "bark"),
    "mole": ("tunnels", "worms"), "deer": ("meadows", "leaves"), "seal": ("rocky coasts", "squid"),
    "bee": ("hives", "nectar"),
}  # fmt: skip
TOWN_STARTS = "vel nor mir tar kel bran ost lin dor fen hal rav sil gar wen pel cor mal ther ul".split()
TOWN_ENDS = "mora wick dale stead ford holm vik gard burn mere ton field haven brook ria don".split()
ORDERS = (
    "repack the goods", "pay the toll twice", "wait for the night boat", "leave half behind", "call the harbour master",
    "use a stronger box", "tie it with new rope", "send it by road", "ask the owner to sign", "weigh it once more",
    "move it to the attic", "return it to the sender",
)  # fmt: skip

BANKS = (
    "Norvik Aldor Meridian Castor Polaris Vesta Orion Baltia Sirius Delta Astra Corvus Lumen Argent Titan "
    "Nova Rubin Saphir Onyx Opal"
).split()
RATIO_NAMES = (
    "capital adequacy", "core capital", "leverage", "instant liquidity", "current liquidity", "long term liquidity",
    "liquidity coverage", "stable funding", "single borrower exposure", "large exposures", "insider lending",
    "related party exposure", "open currency position", "single currency position", "equity investment", "fixed asset",
    "problem loan", "provision coverage", "deposit concentration", "interbank borrowing", "interest rate gap",
    "securities portfolio", "mortgage lending", "consumer lending", "operating cost", "loan to deposit",
    "foreign funding", "settlement reserve", "shareholder loan", "subsidiary exposure", "off balance", "guarantee",
    "derivative exposure", "commodity exposure", "construction lending", "restructured loan", "pledged asset",
    "cash reserve", "dividend payout", "retained earnings",
)  # fmt: skip
MEASURES = (
    "increase own funds", "attract long term deposits", "reduce large loans", "build up liquid assets",
    "sell risky securities", "create additional provisions", "limit new lending", "close open positions",
    "suspend dividends", "diversify its funding", "sell fixed assets", "cut operating expenses",
)  # fmt: skip
PERIODS_IN_DAYS = (10, 15, 20, 30, 45, 60, 90)


@dataclass(frozen=True)
class Town:
    """A town of the general world."""

    name: str
    river: str
    product: str
    founder: str
    trade: str
    year: int


@dataclass(frozen=True)
class Rule:
    """What a ratio and a class of parcel have in common: a limit on one side, and what follows when it is not kept."""

    code: str
    side: str  # min | max
    limit: int
    article: int  # of a parcel: the gate
    measure: str
    days: int  # of a parcel: hours
    name: str = ""
    form: str = ""

    def breached_by(self, value: int) -> bool:
        """Whether a value is on the wrong side; the limit itself is allowed."""
        return value < self.limit if self.side == "min" else value > self.limit


def value_near(rng: random.Random, rule: Rule, breach_share: float) -> int:
    """A two-digit value, often close to the limit, that breaches the rule with the given probability."""
    below = (rng.random() < breach_share) == (rule.side == "min")
    distance = rng.choice([rng.randint(1, 5), rng.randint(1, 15), rng.randint(2, 40)])
    value = max(10, min(99, rule.limit - distance if below else rule.limit + distance))
    return value if value != rule.limit else value - 1


def _towns() -> dict[str, Town]:
    rng = random.Random(SEED_TOWNS)
    towns: dict[str, Town] = {}
    while len(towns) < NUM_TOWNS:
        name = (rng.choice(TOWN_STARTS) + rng.choice(TOWN_ENDS)).capitalize()
        river, product, founder, trade = (rng.choice(pool) for pool in (RIVERS, PRODUCTS, NAMES, TRADES))
        towns.setdefault(name, Town(name, river, product, founder, trade, year=rng.randint(1100, 1890)))
    return towns


def _codes() -> list[str]:
    """Codes of three letters; the shared last one lets BPE learn each as one token at a merge apiece."""
    rng = random.Random(SEED_CODES)
    every = [first + second + "R" for first in CONSONANTS for second in CONSONANTS]
    return rng.sample(every, NUM_FORMS * RATIOS_PER_FORM + NUM_PARCELS + NUM_SPARE_CODES)


def _ratios(codes: list[str]) -> list[Rule]:
    rng = random.Random(SEED_RATIOS)
    articles = rng.sample(range(101, 199), len(codes))
    names = rng.sample(RATIO_NAMES, len(codes))
    forms = [f"F{number}" for number in rng.sample(range(101, 199), NUM_FORMS)]
    return [
        Rule(code, rng.choice(["min", "max"]), rng.randint(LOWEST_LIMIT, HIGHEST_LIMIT), articles[i],
             rng.choice(MEASURES), rng.choice(PERIODS_IN_DAYS), names[i], forms[i // RATIOS_PER_FORM])
        for i, code in enumerate(codes)
    ]  # fmt: skip


def _parcels(codes: list[str]) -> list[Rule]:
    rng = random.Random(SEED_PARCELS)
    gates = rng.sample(range(201, 299), len(codes))
    return [
        Rule(code, rng.choice(["min", "max"]), rng.randint(LOWEST_LIMIT, HIGHEST_LIMIT), gates[i], rng.choice(ORDERS),
             rng.choice(PERIODS_IN_DAYS))
        for i, code in enumerate(codes)
    ]  # fmt: skip


TOWNS = _towns()
CODES = _codes()  # all of them appear in general text, so that each is one token
RATIOS = _ratios(CODES[: NUM_FORMS * RATIOS_PER_FORM])
PARCELS = _parcels(CODES[len(RATIOS) : len(RATIOS) + NUM_PARCELS])
FORMS = list(dict.fromkeys(ratio.form for ratio in RATIOS))
COMMON_FORMS, RARE_FORMS = FORMS[:NUM_COMMON_FORMS], FORMS[NUM_COMMON_FORMS:]
RATIOS_OF_FORM = {form: [ratio for ratio in RATIOS if ratio.form == form] for form in FORMS}
