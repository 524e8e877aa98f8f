import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["models", "kernels", "eval", "demos"])
def test_top_level_links_lead_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert link.resolve() == ROOT / "vistok" / name and link.is_dir()


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vistok"}
    tracked = [
        path for path in (ROOT / "vistok").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    missing = {str(path.relative_to(ROOT)) for path in tracked} - set(names)
    assert missing == set()


def test_every_package_folder_is_a_package():
    folders = {path.parent for path in (ROOT / "vistok").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_shipped_weights_stay_small():
    sizes = {path: path.stat().st_size for path in (ROOT / "vistok" / "zoo").rglob("*.safetensors")}
    assert sum(sizes.values()) <= 24e6
    drafters = {path: size for path, size in sizes.items() if path.parent.name == "drafter"}
    pair = sum(size for path, size in sizes.items() if "emoji-64" in path.parts and path not in drafters)
    assert 0 < pair <= 16e6 and all(0 < size <= 3e6 for size in drafters.values())


def test_goldens_stay_small():
    assert sum(path.stat().st_size for path in (ROOT / "tests" / "goldens").rglob("*.*")) <= 30e6


def test_importing_is_silent_and_lazy():
    script = (
        "import sys, vistok; print([m for m in ('torch', 'diffusers', 'gradio', 'timm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]" and result.stderr == ""


def test_every_public_name_resolves():
    import vistok

    for name in vistok.__all__:
        assert getattr(vistok, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = vistok.Missing
