"""Draw docs/explanation/gates.svg, the gates of SAPO and GRPO over the ratio: `python -m scripts.pictures`.

The curves are those of `sapo.objectives`. tests/docs/test_made_pages.py holds the picture current.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sapo.objectives import gate_weight

PICTURE = Path(__file__).parents[1] / "docs" / "explanation" / "gates.svg"

WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 150, 44, 52, 40
"""Of one panel in pixels, and the space around it."""

LARGEST = 3.0
"""The ratio at the right edge."""

CURVES = (("sapo", "SAPO", "#3f51b5", ""), ("grpo", "GRPO", "#c2410c", "6 4"))


def weights(name: str, sign: float) -> list[tuple[float, float]]:
    """Return (ratio, gate weight) of a token for an advantage of this sign, from ratio 0.01 to LARGEST."""
    ratios = torch.linspace(0.01, LARGEST, 300)[None]
    mask = torch.ones_like(ratios, dtype=torch.bool)
    gated = gate_weight(name, ratios.log(), torch.full((1,), sign), mask)
    return list(zip(ratios[0].tolist(), gated[0].tolist(), strict=True))


def panel(title: str, sign: float, top: int) -> list[str]:
    """Return the elements of one panel."""

    def x(ratio: float) -> float:
        return LEFT + WIDTH * ratio / LARGEST

    def y(weight: float) -> float:
        return top + HEIGHT * (1 - weight)

    parts = [f'<text x="{LEFT}" y="{top - 10}" font-weight="bold">{title}</text>']
    parts += [f'<text x="{x(n):.0f}" y="{top + HEIGHT + 16}" text-anchor="middle">{n}</text>' for n in (0, 1, 2, 3)]
    parts += [f'<text x="{LEFT - 8}" y="{y(n) + 4:.0f}" text-anchor="end">{n}</text>' for n in (0, 1)]
    parts.append(f'<path d="M{x(1):.0f} {top}V{top + HEIGHT}" stroke="#bbb"/>')
    parts.append(f'<path d="M{LEFT} {top}V{top + HEIGHT}H{LEFT + WIDTH}" stroke="#444" fill="none"/>')
    for name, _, colour, dash in CURVES:
        points = " ".join(f"{x(ratio):.1f},{y(weight):.1f}" for ratio, weight in weights(name, sign))
        line = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{points}" {line}/>')
    return parts


def picture() -> str:
    """Return the whole picture."""
    height = TOP + 2 * (HEIGHT + GAP) + 30
    below = TOP + HEIGHT + GAP + 14
    parts = panel("A &gt; 0: make the token likelier", 1.0, TOP) + panel("A &lt; 0: make it less likely", -1.0, below)
    for place, (_, label, colour, dash) in enumerate(CURVES):
        left = LEFT + WIDTH + 16
        parts.append(
            f'<path d="M{left} {TOP + 20 * place}h24" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
            f'<text x="{left + 30}" y="{TOP + 4 + 20 * place}">{label}</text>'
        )
    parts.append(f'<text x="{LEFT + WIDTH / 2:.0f}" y="{height - 6}" text-anchor="middle">ratio r = pi / pi_old</text>')
    parts.append(f'<text x="{LEFT}" y="14">weight of the token\'s gradient</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 450 {height}" width="450" height="{height}" role="img" '
        'aria-label="Gate weights of SAPO and GRPO over the ratio" font-family="sans-serif" font-size="13" '
        'fill="#222">\n'
        f'<rect width="450" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    """Draw the picture."""
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
