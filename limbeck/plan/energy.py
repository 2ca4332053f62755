"""Energy of chip-hours: measured power, not the label's, and the building's share (PUE).

Much that is published is no measurement: chip-hours times the label's power, and money that is hours times a rate.
`circular` finds such figures, which test nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Power drawn at work for each chip, its share of the host included: `Measured("V100", 330, 300, "...")`, in watts."""

    chip: str
    watts: float
    label: float
    source: str

    @property
    def fraction(self) -> float:
        return self.watts / self.label


# Of the whole server at work, a chip. The TPU's label counts two cores; a DGX's 4,200 W and Fire-Flyer's 2,500 W are of 8 chips.
POWER = (
    Measured("V100", 330, 300, "GPT-3: 2104.10350, Table 4"),
    Measured("TPUv3", 310, 450, "T5-11B: 2104.10350, Table 4"),
    Measured("TPUv3", 289, 450, "Meena: 2104.10350, Table 4"),
    Measured("TPUv3", 288, 450, "GShard: 2104.10350, Table 4"),
    Measured("TPUv3", 245, 450, "Switch: 2104.10350, Table 4"),
    Measured("A100-PCIe", 2500 / 8, 250, "Fire-Flyer 2: 2408.14158, Table II"),
    Measured("A100", 4200 / 8, 400, "DGX-A100: 2408.14158, Table II"),
)

# Of the label, for a chip without a line above: as little as the best TPU and as much as a DGX; between them GPT-3's, the one
# GPU cluster whose meter was read.
UNMEASURED = (0.69, 1.1, 1.31)

# Power usage effectiveness: metered 1.08 to 1.2 (OLMo-2's centres: 1.1, 1.12, 1.2; GPT-3's 1.10).
PUE = (1.08, 1.12, 1.2)


@dataclass(frozen=True)
class Energy:
    """Kilowatt-hours with their interval: `Energy(1_287_000, 1_200_000, 1_400_000, watts=330, pue=1.1)`."""

    kwh: float
    low: float
    high: float
    watts: float
    pue: float


def spend(chip: str, label_watts: float, chip_hours: float, pue: float | None = None) -> Energy:
    """Energy of so many hours of one chip with its share of the host, in kWh.

    A chip that was measured takes what it took then, give or take a tenth; another one `UNMEASURED` of its label.
    """
    found = sorted(m.fraction for m in POWER if m.chip == chip)
    least, middle, most = (0.9 * found[0], found[len(found) // 2], 1.1 * found[-1]) if found else UNMEASURED
    low, mean, high = (pue, pue, pue) if pue else PUE
    kwh = label_watts * chip_hours / 1e3
    return Energy(kwh * middle * mean, kwh * least * low, kwh * most * high, label_watts * middle, mean)


def circular(published_kwh: float, chip_hours: float, label_watts: float, pue: float | None = None) -> str:
    """A sentence where a published energy is hours times the label's power (times a PUE), and so no measurement; else ''."""
    tried = {f"PUE {p:g}": p for p in ([pue] if pue else [1.0, 1.1, 1.2])}
    for name, factor in tried.items():
        if abs(published_kwh / (label_watts * chip_hours / 1e3 * factor) - 1) < 0.005:
            return (
                f"this energy is {chip_hours:,.0f} chip-hours at the label's {label_watts:g} W ({name}): "
                "arithmetic, not a measurement, and no test of a forecast"
            )
    return ""
