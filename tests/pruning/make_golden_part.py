"""Write data/golden_part.npz, the part of the reference masks that travels with the repository.

Run it beside the shared folder: python tests/pruning/make_golden_part.py. It takes the text layers of golden_a: their
weights, the input norms (summed here in float64), the masks of the methods whose budget does not reach beyond a
modality, and the raw inputs of two layers (one padded, one reading image tokens) for the collection of norms.
"""

import json
from pathlib import Path

import numpy as np


HERE = Path(__file__).parent
SOURCE = HERE.parents[2] / "shared" / "golden"
TARGET = HERE / "data" / "golden_part.npz"
METHODS = ("multiflow", "local_magnitude", "modal_magnitude")
RAW_INPUTS = (
    "text_encoder.encoder.layer.0.attention.query",
    "text_encoder.encoder.layer.0.crossattention.key",
)


def main() -> None:
    about = json.loads((SOURCE / "golden_a.json").read_text())
    golden = np.load(SOURCE / "golden_a.npz")
    part: dict[str, np.ndarray] = {}
    layers = [layer for layer in about["layers"] if layer["modality"] == "text"]
    for layer in layers:
        name = layer["name"]
        part[f"weight/{name}"] = golden[f"weight/{name}"]
        total = 0.0
        for batch in range(about["batches"]):
            x = golden[f"input/{name}/{batch}"].astype(np.float64)
            mask = golden[f"attention_mask/{batch}"]
            rows = x[mask == 1] if x.shape[1] == mask.shape[1] else x.reshape(-1, x.shape[-1])
            total = total + (rows**2).sum(0)
            if name in RAW_INPUTS:
                part[f"input/{name}/{batch}"] = golden[f"input/{name}/{batch}"]
                part[f"attention_mask/{batch}"] = mask
        part[f"input_norm/{name}"] = np.sqrt(total)
        for method in METHODS:
            for ratio in about["sparsities"]:
                part[f"mask/{method}/{ratio}/{name}"] = golden[f"mask/{method}/{ratio}/{name}"]
    part["about"] = np.array(json.dumps({**about, "layers": layers}))
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **part)
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes, {len(part)} arrays")


if __name__ == "__main__":
    main()
