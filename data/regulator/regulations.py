"""Regulation prose: each ratio's limit, article, measure and period, in many paraphrases.

`document(rng)` draws one document: an article with comments, a schedule, questions and answers, a commentary on
a form, or cases of banks that kept or breached a limit.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from data.regulator.world import BANKS, RATIOS, RATIOS_OF_FORM, Rule, value_near


def document(rng: random.Random) -> str:
    """One document of regulation prose."""
    return rng.choice(KINDS)(rng, rng.choice(RATIOS))


def at_limit(ratio: Rule) -> str:
    """`at least 24 percent`, the way prose and directives state a limit."""
    return f"at {'least' if ratio.side == 'min' else 'most'} {ratio.limit} percent"


# --- kinds of documents ---------------------------------------------------------------------------------------------


def _article(rng: random.Random, ratio: Rule) -> str:
    return " ".join([_norm(rng, ratio), _consequence(rng, ratio), _where(rng, ratio)])


def _article_with_cases(rng: random.Random, ratio: Rule) -> str:
    return " ".join([_norm(rng, ratio), _case(rng, ratio), _case(rng, ratio)])


def _comment(rng: random.Random, ratio: Rule) -> str:
    return " ".join([_consequence(rng, ratio), _case(rng, ratio), _norm(rng, ratio)])


def _questions(rng: random.Random, ratio: Rule) -> str:
    pairs = [
        (f"what limit applies to {ratio.code}?", f"{ratio.side} {ratio.limit}, article {ratio.article}."),
        (f"what must a bank do after a breach of {ratio.code}?", f"{ratio.measure} within {ratio.days} days."),
        (f"which article governs {ratio.code}?", f"article {ratio.article}, {ratio.code} {at_limit(ratio)}."),
    ]
    return " ".join(f"Question: {question} Answer: {answer}" for question, answer in rng.sample(pairs, 2))


def _schedule(rng: random.Random, _: Rule) -> str:
    lines = [f"{ratio.code} {ratio.side} {ratio.limit}, article {ratio.article}, {ratio.measure}, {ratio.days} days."
             for ratio in rng.sample(RATIOS, 4)]  # fmt: skip
    return "Schedule of limits. " + " ".join(lines)


def _form(rng: random.Random, ratio: Rule) -> str:
    """A commentary in the surface order of an analysis: code, value, side, limit, verdict."""
    lines = []
    for other in rng.sample(RATIOS_OF_FORM[ratio.form], 4):
        value = value_near(rng, other, 0.5)
        lines.append(f"{other.code} {value} {other.side} {other.limit} {verdict(other, value)}.")
    return f"Commentary on form {ratio.form}. " + " ".join(lines)


KINDS: list[Callable[[random.Random, Rule], str]] = [
    _article, _article_with_cases, _comment, _questions, _schedule, _form,
]  # fmt: skip


# --- sentences ------------------------------------------------------------------------------------------------------


def _norm(rng: random.Random, ratio: Rule) -> str:
    code, name, article = ratio.code, ratio.name, ratio.article
    must = "not be less than" if ratio.side == "min" else "not exceed"
    return rng.choice([
        f"Article {article}. The {name} ratio ({code}) of a bank shall {must} {ratio.limit} percent.",
        f"Under article {article} the {name} ratio, {code}, is limited: {code} {ratio.side} {ratio.limit}.",
        f"A bank shall keep {code} {at_limit(ratio)} (article {article}).",
        f"The limit for {code} is {ratio.side} {ratio.limit}. It is set by article {article}.",
        f"Article {article} governs the {name} ratio. The value of {code} must be {at_limit(ratio)}.",
    ])  # fmt: skip


def _consequence(rng: random.Random, ratio: Rule) -> str:
    code, todo = ratio.code, f"{ratio.measure} within {ratio.days} days"
    wrong = "below" if ratio.side == "min" else "above"
    return rng.choice([
        f"If {code} is {wrong} {ratio.limit} percent, the bank must {todo}.",
        f"A breach of article {ratio.article} ({code}) obliges the bank to {todo}.",
        f"For a breach of {code} the supervisor orders: {todo}.",
        f"{code} {at_limit(ratio)} under article {ratio.article}, {todo}.",
    ])  # fmt: skip


def _where(rng: random.Random, ratio: Rule) -> str:
    return rng.choice([
        f"{ratio.code} is reported in form {ratio.form}.",
        f"Form {ratio.form} contains the {ratio.name} ratio {ratio.code}.",
        f"Form {ratio.form} lists " + ", ".join(other.code for other in RATIOS_OF_FORM[ratio.form]) + ".",
    ])  # fmt: skip


def _case(rng: random.Random, ratio: Rule) -> str:
    value = value_near(rng, ratio, 0.5)
    breach = ratio.breached_by(value)
    follows = f"It must {ratio.measure} within {ratio.days} days." if breach else "No measures are required."
    checked = f"{ratio.side} {ratio.limit} {verdict(ratio, value)}"
    return rng.choice([
        f"{rng.choice(BANKS)} Bank reported {ratio.code} {value}: {checked}. {follows}",
        f"Case: {ratio.code} {value} {checked}. "
        + (f"Article {ratio.article} is breached." if breach else f"Article {ratio.article} is observed."),
    ])  # fmt: skip


def verdict(ratio: Rule, value: int) -> str:
    """`breach` or `ok`."""
    return "breach" if ratio.breached_by(value) else "ok"
