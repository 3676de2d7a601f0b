"""Write data/upop_part.npz, the reference search that travels with the repository: upop_a, its steps stacked.

Run it beside the shared folder: python tests/structured/make_upop_part.py.
"""

import json
from pathlib import Path

import numpy as np


HERE = Path(__file__).parent
SOURCE = HERE.parents[2] / "shared" / "golden"
TARGET = HERE / "data" / "upop_part.npz"


def main() -> None:
    about = json.loads((SOURCE / "upop_a.json").read_text())
    golden = np.load(SOURCE / "upop_a.npz")
    part: dict[str, np.ndarray] = {"about": np.array(json.dumps(about))}
    for name in sorted({key.split("/", 2)[2] for key in golden.files}):
        part[f"grad/{name}"] = np.stack([golden[f"grad/{step}/{name}"] for step in range(about["total_steps"])])
        part[f"alpha/{name}"] = np.stack([golden[f"alpha/{update['step']}/{name}"] for update in about["updates"]])
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **part)
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes, {len(part)} arrays")


if __name__ == "__main__":
    main()
