"""What the README says works: its commands exist, its Python runs, its links lead somewhere."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """The code blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_commands_exist():
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    dev = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dev)
    named = re.findall(r"python3 dev\.py (\S+?)\b", README)
    assert {"demo", "test"} <= set(named)
    assert {name for name in named if not name.startswith("-")} <= set(dev.COMMANDS)


def test_ci_runs_the_test_command():
    script = ROOT / ".ci" / "run"
    assert "\npython3 dev.py test " in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_quick_start_runs(monkeypatch, tmp_path):
    def tiny(*arguments):
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
        )

    (quick_start,) = blocks("python")
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", tiny)
    monkeypatch.chdir(tmp_path)
    names = {"noise_BCFHW": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor(7), "text": torch.randn(2, 5, 16)}
    exec(quick_start, names)
    assert names["video"].shape == (2, 4, 3, 8, 8)
    assert (tmp_path / "my-motion" / "config.json").exists()
    assert not any("temporal" in key for key in names["unet"].state_dict())


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?://)([^)#]+)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
