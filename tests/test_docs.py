"""Documentation that can be checked against the code."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from tools import reference
from trainer.config import AUTO, RewardConfig, preset_names
from trainer.diffusion.kernels import KERNELS
from trainer.rewards import REWARDS, reward_options
from trainer.rewards.files import file_rule


def test_configuration_page_is_what_the_settings_say() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.markdown()


def test_rewards_page_is_what_the_rewards_say() -> None:
    assert (ROOT / "docs" / "rewards.md").read_text() == reference.rewards_markdown()


def test_help_page_of_load_reward_says_what_each_needs() -> None:
    page = (ROOT / "web" / "docs" / "DanceGRPO_LoadReward.md").read_text()
    assert page == reference.node_markdown()
    for name, kind in REWARDS.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert "typical scores" in section
        assert kind.licence in section
        for field in kind.Options.model_fields.values():
            assert not file_rule(field) or f"models/rewards/{field.default}" in section


@pytest.mark.parametrize("name", reference.KERNEL_TABLES)
def test_tables_of_the_kernels_are_what_the_registry_says(name: str) -> None:
    page, table = (ROOT / name).read_text(encoding="utf-8"), reference.KERNEL_TABLES[name]()
    assert table in page
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == list(KERNELS)
    stale = page.replace("`dance-exact`", "`dance-old`")
    assert reference.with_kernel_table(stale.replace(table.splitlines()[-1] + "\n", ""), table).count(table) == 1


def test_rewards_page_has_a_line_and_a_section_for_each_and_an_example_that_is_accepted() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text()
    for name, kind in REWARDS.items():
        assert f"| [`{name}`](#{name.replace('.', '')}) |" in text
        assert f"\n## {name}\n" in text
        needs_weights = any(file_rule(field) for field in kind.Options.model_fields.values())
        assert bool(kind.licence) == needs_weights, f"{name} must say under which licence its weights are"
    example = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    for entry in example["rewards"]:
        reward_options(RewardConfig(**entry))


def test_requirements_and_pyproject_name_the_same_packages() -> None:
    listed = (ROOT / "requirements.txt").read_text().split()
    declared = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed == re.findall(r'"(.+?)"', declared[1])
    assert "torch" in listed, "torch carries no version, so that installing replaces nothing"
    assert not [line for line in listed if re.search(r"==|<|~=", line)], "lower bounds only"


def test_readme_links_and_images_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    assert targets
    assert not [t for t in targets if not (ROOT / t).exists()]


def test_readme_names_presets_that_exist() -> None:
    named = re.findall(r"trainer presets ([\w-]+)", (ROOT / "README.md").read_text())
    assert set(named) <= {AUTO, *preset_names()}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()) if "://" not in t]
    assert not [t for t in targets if not (page.parent / t).exists()]


def test_page_of_the_http_api_has_every_route_and_no_other() -> None:
    registered = re.compile(r"\broutes\.(get|post)\(\s*\"([^\"]+)\"")
    code = "\n".join(path.read_text() for path in (ROOT / "nodes").rglob("*.py"))
    routes = [f"{method.upper()} /dancegrpo{path}" for method, path in registered.findall(code)]
    page = (ROOT / "docs" / "http-api.md").read_text()
    assert sorted(re.findall(r"^### `(.+)`$", page, re.MULTILINE)) == sorted(routes)
    assert len(routes) == len(set(routes)) == code.count("routes.get(") + code.count("routes.post(")


def messages() -> str:
    """Every string of the code, one a line, with `...` for what is filled in."""
    found = []
    for path in [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def test_troubleshooting_quotes_messages_that_the_program_prints() -> None:
    text, printed = (ROOT / "docs" / "troubleshooting.md").read_text(), messages()
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    quoted = [quote for line in headings for quote in re.findall(r"`([^`]+)`", line)]
    assert len(quoted) > 15
    for quote in quoted:
        parts = [re.escape(part.strip()) for part in quote.split("...") if part.strip()]
        assert any(re.search(".*".join(parts), line) for line in printed.split("\n")), f"no message is {quote!r}"


def test_glossary_names_each_term_once_and_settings_that_exist() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = [term for line in re.findall(r"^- \*\*([^*]+)\*\*:", text, re.M) for term in line.split(", ")]
    assert len(terms) == len(set(terms)) > 50
    settings = (ROOT / "docs" / "configuration.md").read_text()
    for setting in re.findall(r"`((?:rollout|objective|advantage|lora|evaluation)\.\w+)`", text):
        assert f"`{setting.split('.')[1]}`" in settings, setting
