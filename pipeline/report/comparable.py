"""What has to agree before one accuracy may be held against another."""

from __future__ import annotations

from dataclasses import dataclass, fields

TOP1 = "top-1"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How an accuracy was come by; None where that is not known.

    Attributes:
        trunk: its name, with its stem where that is not ImageNet's.
        px: side of a test image.
        epochs: of the fine-tuning.
        test_set: its images, and their classes.
        metric: what was counted.
    """

    trunk: str
    px: int | None
    epochs: float | None
    test_set: tuple[int, int]
    metric: str = TOP1


def differences(one: Setup, other: Setup) -> list[str]:
    """In what two accuracies differ, or may differ, beside what they are to show; empty if in nothing."""
    found = []
    for field in fields(Setup):
        name, here, there = field.name.replace("_", " "), getattr(one, field.name), getattr(other, field.name)
        if here is None or there is None:
            found.append(f"{name} not known")
        elif abs(here - there) >= 0.5 if name == "epochs" else here != there:
            found.append(name)
    return found
