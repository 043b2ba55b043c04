"""What a finished stage was made from."""

from __future__ import annotations

from pathlib import Path

from pipeline.dag.stage import Input, Receipt, read_receipt


def origin(receipt: Receipt, role: str, root: Path) -> Input | None:
    """What filled a role of a stage; None if nothing did, or it is gone.

    Args:
        root: the folder that holds the graph's stages.

    Raises:
        UserError: if its receipt is damaged.
    """
    key, _, path = receipt.inputs.get(role, "").partition("/")
    for folder in root.glob(f"*-{key[:12]}") if key else ():
        file = folder / "receipt.json"
        if file.is_file() and (found := read_receipt(file)).key == key:
            return Input(path=folder / path, receipt=found)
    return None
