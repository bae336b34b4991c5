"""The guide's example of calibration runs as it is printed."""

import re
from pathlib import Path

import torch

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "quantization.md"


def test_the_example_of_calibration_runs(tmp_path, monkeypatch, capsys):
    section = GUIDE.read_text().split("## Calibration\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, str(GUIDE), "exec"), names)
    assert (tmp_path / "digits.safetensors").is_file()
    assert "in w4a8-g64-r16-smooth of DiTTransformer2DModel" in capsys.readouterr().out
    assert len(names["images"]) == 10
    assert not [m for m in names["pipe"].transformer.modules() if hasattr(m, "smooth")]
    assert isinstance(names["calibration"].inputs, dict)
    assert torch.is_grad_enabled()
