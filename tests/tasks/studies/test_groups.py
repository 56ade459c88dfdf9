"""Groups of OOD images are a partition."""

import numpy as np
import pandas as pd
import pytest

from diffguard.errors import DataError, SettingError
from tasks.config import project
from tasks.config.study import read_groups
from tasks.studies.groups import named_groups, quantile_groups


def test_quantiles_part_all_images_by_their_scores():
    scores = pd.Series(np.random.default_rng(0).integers(0, 9, 50).astype(float), [f"image {n:02d}" for n in range(50)])
    groups = quantile_groups(scores, 4)
    assert list(groups.index) == list(scores.index)
    assert groups.value_counts().to_dict() == {1: 12, 2: 13, 3: 12, 4: 13}
    for part in (1, 2, 3):  # ties may be on both sides
        assert scores[groups == part].max() <= scores[groups == part + 1].min()
    assert quantile_groups(scores[::-1], 4)[scores.index].tolist() == groups.tolist()
    with pytest.raises(SettingError, match="3 OOD images cannot make 4 parts"):
        quantile_groups(scores[:3], 4)


def rows(*origins):
    table = pd.DataFrame({"origin": origins, "class_name": "", "dataset": "places"})
    return table.assign(id=[f"places/test/{n}" for n in range(len(table))])


def test_given_groups_go_by_class_folder_then_dataset_and_leave_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(project, "ROOT", tmp_path)
    (tmp_path / "groups.yaml").write_text("near: [cat, dog]\nfar: [oven]\n")
    (tmp_path / "groups.csv").write_text("name,group\ncat,near\ndog,near\noven,far\n")
    groups = read_groups("groups.yaml", "study")
    assert read_groups("groups.csv", "study") == groups
    images = rows("/data/cat/1.png", "/data/oven/2.png", "/data/dog/3.png")
    assert named_groups(images, groups, "groups.yaml").to_dict() == {
        "places/test/0": "near",
        "places/test/1": "far",
        "places/test/2": "near",
    }
    with pytest.raises(DataError, match=r"groups.yaml: places/test/1 is in no group; name its class, 'tent'"):
        named_groups(rows("/data/cat/1.png", "/data/tent/2.png"), groups, "groups.yaml")
    assert set(named_groups(rows("/data/tent/2.png", "x 1"), {"all": ["places"]}, "groups.yaml")) == {"all"}
    (tmp_path / "groups.yaml").write_text("near: [cat]\nfar: [cat]\n")
    with pytest.raises(SettingError, match="cat is in two groups"):
        read_groups("groups.yaml", "study")
    with pytest.raises(DataError, match="no such file"):
        read_groups("none.csv", "study")
