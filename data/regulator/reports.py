"""Chats: a bank's report form goes in; the analysis, the violations and a directive come out.

Training reports are mostly about the common forms; held-out reports are about the rare ones only. So a model
that never read the regulations has hardly seen the limits that it is asked about.
"""

from __future__ import annotations

import random

from data.regulator.regulations import at_limit, verdict
from data.regulator.world import BANKS, COMMON_FORMS, RARE_FORMS, RATIOS_OF_FORM, Rule, value_near

ROWS_PER_REPORT = 4
BREACH_SHARE = 0.3
NO_DIRECTIVE = "no supervisory measures are required."


def training_report(rng: random.Random, rare_share: float) -> dict[str, object]:
    """A report on a common form, or with probability `rare_share` on a rare one."""
    return report(rng, rng.choice(RARE_FORMS if rng.random() < rare_share else COMMON_FORMS))


def report(rng: random.Random, form: str) -> dict[str, object]:
    """One report with its answer, as `messages` and, for scoring, as the violations and the directive alone."""
    ratios = rng.sample(RATIOS_OF_FORM[form], ROWS_PER_REPORT)
    rows = [(ratio, value_near(rng, ratio, BREACH_SHARE)) for ratio in ratios]
    breached = [ratio for ratio, value in rows if ratio.breached_by(value)]
    violations = [ratio.code for ratio in breached]
    orders = " ".join(_order(ratio) for ratio in breached) or NO_DIRECTIVE
    head = f"Form {form}, {rng.choice(BANKS)} Bank, {rng.randint(2019, 2025)}Q{rng.randint(1, 4)}"
    question = "\n".join([head, *(f"{ratio.code} {value}" for ratio, value in rows)])
    answer = "\n".join([
        "Analysis:",
        *(f"{ratio.code} {value} {ratio.side} {ratio.limit} {verdict(ratio, value)}" for ratio, value in rows),
        "Violations: " + (", ".join(violations) or "none"),
        "Directive: " + orders,
    ])  # fmt: skip
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "form": form, "violations": violations, "directive": orders}


def _order(ratio: Rule) -> str:
    return f"{ratio.code} {at_limit(ratio)} under article {ratio.article}, {ratio.measure} within {ratio.days} days."
