"""Documentation that can be checked against the code."""

import re

from conftest import ROOT

from trainer import reference
from trainer.config import preset_names


def test_configuration_page_is_what_the_settings_say() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.markdown()


def test_requirements_and_pyproject_name_the_same_packages() -> None:
    listed = (ROOT / "requirements.txt").read_text().split()
    declared = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed == re.findall(r'"(.+?)"', declared[1])
    assert "torch" in listed, "torch carries no version, so that installing replaces nothing"
    assert not [line for line in listed if re.search(r"==|<|~=", line)], "lower bounds only"


def test_readme_links_and_pictures_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    assert targets
    assert not [t for t in targets if not (ROOT / t).exists()]


def test_readme_names_presets_that_exist() -> None:
    named = re.findall(r"trainer presets ([\w-]+)", (ROOT / "README.md").read_text())
    assert set(named) <= set(preset_names())
