"""The package as others get it: a wheel that runs the demo from outside the checkout, quick to import, nothing private in it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_importing_singreg_loads_no_heavy_package() -> None:
    code = "import sys, singreg; print([m for m in ('torch', 'timm', 'open_clip', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported_and_is_documented() -> None:
    import singreg

    assert len(singreg.__all__) == len(set(singreg.__all__)) > 25
    for name in singreg.__all__:
        assert (getattr(singreg, name).__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="no attribute 'SingLos'"):
        _ = singreg.SingLos


@pytest.mark.slow
def test_a_wheel_runs_the_demo_from_outside_the_checkout(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("singreg-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    for wanted in ("configs/demo.yaml", "recipes/finetune.py", "assets/demo_vlm/open_clip_model.safetensors", "py.typed"):
        assert f"singreg/{wanted}" in names
    assert not [name for name in names if name.startswith(("tests", "recipes", "configs"))]
    code = (
        f"import sys; sys.path = [{str(tmp_path / 'site')!r}] + [p for p in sys.path if p and {str(ROOT)!r} not in p]; import singreg; "
        f"assert singreg.__file__.startswith({str(tmp_path)!r}), singreg.__file__; from singreg.recipes.finetune import main; "
        "main(['--config', 'demo', '--dry_run', 'true', '--cache', 'cache', '--data.scenes_train', '64', '--data.scenes_audit', '20', "
        "'--data.scenes_test', '20', '--data.scenes_bank', '0'])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", f"import site; site.main(); {code}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nullity 246" in done.stdout
