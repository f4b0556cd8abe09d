"""Peak rates of GPUs: what a measured speed is scaled by.

Dense bf16 matrix products with float32 sums, TFLOP/s, as the makers' data sheets say. What a card reaches of it differs
less between cards than the peaks do: an H200 reached 790 of its 989, which is the rate that MFU counts against here.
"""

from __future__ import annotations

from tasks.errors import UserError
from tasks.yaml_file import nearest

# name -> (dense bf16 TFLOP/s of the data sheet, words of nvidia-smi's name for it)
CARDS: dict[str, tuple[float, tuple[str, ...]]] = {
    "b200": (2250.0, ("B200",)),
    "h200": (989.0, ("H200",)),
    "h100": (989.0, ("H100",)),
    "a100": (312.0, ("A100",)),
    "l40s": (362.0, ("L40S",)),
    "rtx-4090": (165.2, ("RTX 4090",)),
    "rtx-3090": (71.0, ("RTX 3090",)),
    "a10g": (70.0, ("A10G",)),
    "l4": (121.0, ("L4",)),
}
REACHED_SHARE = 790 / 989  # measured on an H200: large bf16 matrix products against the data sheet


def matrix_flops(card: str) -> float:
    """The rate that large matrix products reach on a card, FLOP/s: what MFU is a share of."""
    if card not in CARDS:
        raise UserError(f"unknown card '{card}'{nearest(card, CARDS)}", where="hardware.yaml, key card",
                        allowed=", ".join(CARDS), todo="a new card is one line in tasks/cards.py")  # fmt: skip
    return CARDS[card][0] * 1e12 * REACHED_SHARE


def card_of(product_name: str) -> str | None:
    """Our name of the card that nvidia-smi calls so; None for one that is not in the table."""
    words = product_name.replace("-", " ").upper().split()
    for card, (_, names) in CARDS.items():
        if any(all(word in words for word in name.upper().split()) for name in names):
            return card
    return None
