"""Studies that are small enough for a test."""

import yaml

CLAIM = {"says": "x", "source": "y", "measure": "rejected", "of": "cfg-w1, jpeg 5", "above": "cfg-w1"}
APPEARANCE = {
    "title": "Appearance",
    "question": "Which?",
    "claim": CLAIM,
    "benchmarks": ["digits"],
    "classifiers": ["ordinary"],
    "rows": ["cfg-w1", "knn", "fused"],
    "changes": {"jpeg": [90, 5], "inverted": [1]},
    "measure": ["rejected", "promised", "accuracy"],
    "figure": {"x": "strength", "y": ["rejected"], "panels": "change"},
}
CLOSE = {
    **APPEARANCE,
    "claim": {"says": "x", "source": "y", "measure": "group auroc", "of": {"group": 1}, "below": {"group": 3}},
    "rows": ["knn"],
    "changes": None,
    "groups": {"distance": {"row": "msp", "parts": 3}, "dataset": {}},
    "measure": ["group auroc", "group fpr95"],
    "figure": {"x": "group", "y": ["group auroc"], "panels": "by"},
}
MODELS = {
    **APPEARANCE,
    "claim": CLAIM | {"measure": "near auroc", "of": "cfg-w1, ViT", "above": "cfg-w1, CNN"},
    "rows": ["cfg-w1", "knn"],
    "changes": None,
    "models": {
        "base": {"ordinary": {"epochs": 2}},
        "grid": {
            "network": {
                "CNN": {},
                "ViT": {"ordinary.patch": 4, "ordinary.width": 8, "ordinary.heads": 2, "ordinary.depth": 1},
                "small denoiser": {"denoiser.channels": [4, 8], "denoiser.iterations": 4},
            },
        },
    },
    "measure": ["near auroc", "denoiser accuracy", "denoiser macs", "denoiser training_macs", "accuracy"],
    "compare": {"axis": "network", "to": "CNN"},
    "cams": 2,
    "figure": {"x": "denoiser training_macs", "y": ["near auroc"], "log": ["x"]},
}


def write_study(root, study, name="one"):
    folder = root / "data" / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    written = {key: value for key, value in study.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
