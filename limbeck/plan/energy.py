"""Energy of chip-hours: by measured power, not rated power, and with the building's overhead.

The overhead is the PUE (power usage effectiveness): the energy of the whole building over that of its
computers. Many published figures are no measurements: an energy that is chip-hours times the rated power, or
an amount of money that is hours times a rate. Comparing a forecast with such a figure tests nothing;
`circular` finds such energies.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """The measured power of a chip at work: `Measured("V100", 330, 300, "...")`.

    `watts` is measured and includes the chip's share of its host; `label` is the rated power in watts.
    """

    chip: str
    watts: float
    label: float
    source: str

    @property
    def fraction(self) -> float:
        """Measured power over rated power."""
        return self.watts / self.label


# Of the whole server at work, a chip. The TPU's label counts two cores; a DGX's 4,200 W and Fire-Flyer's
# 2,500 W are of 8 chips.
POWER = (
    Measured("V100", 330, 300, "GPT-3: 2104.10350, Table 4"),
    Measured("TPUv3", 310, 450, "T5-11B: 2104.10350, Table 4"),
    Measured("TPUv3", 289, 450, "Meena: 2104.10350, Table 4"),
    Measured("TPUv3", 288, 450, "GShard: 2104.10350, Table 4"),
    Measured("TPUv3", 245, 450, "Switch: 2104.10350, Table 4"),
    Measured("A100-PCIe", 2500 / 8, 250, "Fire-Flyer 2: 2408.14158, Table II"),
    Measured("A100", 4200 / 8, 400, "DGX-A100: 2408.14158, Table II"),
)

# Of the label's power, for a chip without a measurement: the best TPU's share, GPT-3's (the one GPU cluster
# with a meter), and a DGX's.
UNMEASURED = (0.69, 1.1, 1.31)

# Power usage effectiveness: metered 1.08 to 1.2 (OLMo-2's centres: 1.1, 1.12, 1.2; GPT-3's 1.10).
PUE = (1.08, 1.12, 1.2)
CIRCULAR_PUES = (1.0, 1.1, 1.2)  # values that publications multiply with
CIRCULAR_TOLERANCE = 0.005  # relative difference up to which an energy counts as circular


@dataclass(frozen=True)
class Energy:
    """Energy in kWh with its interval: `Energy(1_287_000, 1_200_000, 1_400_000, watts=330, pue=1.1)`.

    `low` and `high` are in kWh too. `watts` is the assumed power of one chip with its share of the host, and
    `pue` the assumed power usage effectiveness.
    """

    kwh: float
    low: float
    high: float
    watts: float
    pue: float


def spend(chip: str, label_watts: float, chip_hours: float, pue: float | None = None) -> Energy:
    """Return the energy of `chip_hours` hours of a chip, its share of host and building included.

    A chip in POWER takes its measured power, give or take a tenth; another chip takes the shares `UNMEASURED`
    of its rated power `label_watts`. `pue` is the power usage effectiveness; without it, the range PUE is
    used.
    """
    least, middle, most = _fractions(chip)
    low, mean, high = (pue, pue, pue) if pue else PUE
    kwh = label_watts * chip_hours / 1e3
    return Energy(
        kwh=kwh * middle * mean,
        low=kwh * least * low,
        high=kwh * most * high,
        watts=label_watts * middle,
        pue=mean,
    )


def _fractions(chip: str) -> tuple[float, float, float]:
    """Return the least, middle and greatest share of its rated power that a chip draws."""
    fractions = sorted(measured.fraction for measured in POWER if measured.chip == chip)
    if not fractions:
        return UNMEASURED
    middle = fractions[len(fractions) // 2]
    return 0.9 * fractions[0], middle, 1.1 * fractions[-1]


def circular(published_kwh: float, chip_hours: float, label_watts: float, pue: float | None = None) -> str:
    """Return a sentence if a published energy is only chip-hours times rated power (and a PUE), else "".

    Such an energy is arithmetic and not a measurement.
    """
    label_kwh = label_watts * chip_hours / 1e3
    for factor in [pue] if pue else CIRCULAR_PUES:
        ratio = published_kwh / (label_kwh * factor)
        if abs(ratio - 1) < CIRCULAR_TOLERANCE:
            label = f"{label_watts:g} W (PUE {factor:g})"
            return (
                f"this energy is {chip_hours:,.0f} chip-hours at the label's {label}: "
                "arithmetic, not a measurement, and no test of a forecast"
            )
    return ""
