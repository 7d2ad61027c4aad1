"""The reference of settings, rewards and kernels, from their own fields.

`python -m tools.reference [rewards|load-reward]` prints a page; `python -m tools.reference kernels` writes the tables
of the kernels into README.md and the help page of the sampler.
"""

import inspect
import re
import sys
import types
import typing
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config import RunConfig
from trainer.objectives import DEFAULT, OBJECTIVES
from trainer.rewards.files import file_rule
from trainer.utils.fields import choices, rules

HEAD = """# Settings of a run

Every setting of a run description (YAML or JSON), with its default. Unknown keys are errors. Any setting can be given
on the command line: `python -m trainer train run.yaml --set rollout.eta=0.5`. This page is made by `make docs`.
"""
OBJECTIVE_HEAD = f"""## objective

How scored images become an update. `name` chooses the objective, `{DEFAULT}` where it is left out, and with it the
other settings of this section.
"""
_SIGNS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}


REWARDS_HEAD = """# Rewards

Every reward: what it needs, and what it returns. Nothing is downloaded: put the files yourself where this page says. In
ComfyUI they belong in `models/rewards/`; on the command line `--files FOLDER` names such a folder, and in a run
description the paths stand in the reward's options. Weights in `.pt`, `.pth` and `.bin` files are read without
executing anything they hold; a file of another model is an error that says what differs. This page is made by
`make docs`.

```
python -m trainer score hps-v2.1 image.png --prompt "a red fox" --files ComfyUI/models/rewards
python -m trainer score clip image.png --prompt "a red fox" --set path=weights.bin --set architecture=ViT-L-14
```

## Several rewards

Scores of one reward are compared within the images of one prompt, so scale and offset do not matter there. Several
rewards are mixed by their normalized advantages unless `advantage.combine` says otherwise. The paper's authors advise
HPS-v2.1 and CLIP as 0.7 : 1.4, because HPS-v2.1 alone ends in glossy, over-saturated images:

```yaml
rewards:
  - {name: hps-v2.1, weight: 0.7, options: {path: models/rewards/hpsv2/HPS_v2.1_compressed.pt}}
  - {name: clip, weight: 1.4, options: {path: models/rewards/clip/DFN5B-CLIP-ViT-H-14-378}}
```

`combine: advantages` is not exactly the paper's mixing. The paper normalizes each reward's advantages within the group,
weights and adds them; here the sum is normalized once more, so that the learning rate and the clipping mean the same
with any weights. Only the ratio of the weights counts. At 0.7 and 1.4 the paper's advantages are larger by a factor of
1.46, measured on the same scores.

`threshold` turns any reward into 0 or 1, the paper's binary reward (HPS-v2.1 above 0.28). A group that is all 0 or
all 1 teaches nothing and is skipped.

## What a score is computed from

An image reward gives a video the mean of 8 evenly spaced frames. Pixels are rounded to the 256 values of an image file
first, because the models were trained on files; with a gradient (below) they are not. An image of one channel is grey,
a fourth channel is opacity, and the image is laid on white.

A sample that has no score (NaN) is dropped and counted; `max_dropped` limits how many a run accepts. That is the case
for pixels that are not finite, for `null` from an `external` server, and for an answer of a language model that does
not hold what was asked for, after further attempts with another seed. A server that is unreachable ends the run.

Weights are float32 unless `dtype` says otherwise. `bfloat16` halves their memory. How far it changes the order of
scores has not been measured with the published weights, so it is not the default (`hpsv3` and `videoalign` are
bfloat16 in their authors' code too).

Rewards marked *gradient* in the table are differentiable: the gradient of the score flows back to the pixels.

GenEval and VisionReward run in environments of their own: see [external scorers](external-scorers.md).

## Rewards of other packages

An installed Python package adds a reward by an entry point of the group `dancegrpo.rewards`. Its name is the reward's;
it points to a function that gets the module `trainer.rewards.base` and returns a subclass of its `Reward`:

```toml
[project.entry-points."dancegrpo.rewards"]
redness = "my_package.rewards:redness"
```

```python
def redness(base):
    class Redness(base.Reward):
        \"\"\"Mean of the red channel.\"\"\"

        name = "redness"
        typical_range = (0.0, 1.0)

        def score(self, images, prompts):  # [B, 3, H, W] in [0, 1]
            return images[:, 0].mean((1, 2))

    return Redness
```

It then appears in run descriptions, on the command line and in *Load Reward*. One that cannot be loaded is reported at
the start and left out. Import heavy libraries inside `score` or `load`, not at the top: ComfyUI loads the package when
it starts.

## All rewards
"""

NODE_HEAD = """# Load Reward

A reward for images or videos, for *Score Images* and for *GRPO Train LoRA*; both run the same code. The wire carries
its description; weights are read when it is used.

Reward models show the files they need as further widgets. Put the files yourself where this page says, below
`models/rewards` or a folder that `extra_model_paths.yaml` names `rewards`; nothing is ever downloaded. A missing file
is an error that names it, and a file of another model an error that says what differs. Rewards behind an address
(`external`, `mllm-...`) send images and prompts to the address in their widget and nowhere else.

Compare scores of one reward only, and only for images of one prompt. `docs/rewards.md` of this pack says more about
each and its options.
"""


def rewards_markdown() -> str:
    """The page docs/rewards.md; rewards of other packages are left out."""
    from trainer.rewards.registry import OWN

    rows = ["| reward | scores | typical | licence of the weights | what it is |", "|---|---|---|---|---|"]
    for reward in OWN:
        low, high = reward.typical_range
        kind = f"{reward.media}s, gradient" if reward.differentiable else f"{reward.media}s"
        link = f"[`{reward.name}`](#{_anchor(reward.name)})"
        rows.append(f"| {link} | {kind} | {low:g} to {high:g} | {reward.licence} | {_summary(reward)} |")
    return "\n".join([REWARDS_HEAD, *rows, "", *map(_reward_section, OWN)])


def _summary(reward: type) -> str:
    """The first paragraph of its docstring, in one line."""
    return inspect.getdoc(reward).split("\n\n")[0].replace("\n", " ")


def _reward_section(reward: type) -> str:
    parts = [f"## {reward.name}", "", inspect.getdoc(reward), ""]
    if reward.packages:
        names = " and ".join(f"`{package}`" for package in reward.packages)
        several = len(reward.packages) > 1
        word, is_ = ("packages", "are") if several else ("package", "is")
        parts += [f"Needs the {word} {names}, which {is_} not among this pack's requirements.", ""]
    parts += [*_facts(reward), ""]
    if not reward.Options.model_fields:
        return "\n".join(parts)
    rows = [
        f"| `{name}` | {_default(field)} | {_accepted(field)} | {field.description} |"
        for name, field in reward.Options.model_fields.items()
    ]
    return "\n".join([*parts, "| option | default | accepted | meaning |", "|---|---|---|---|", *rows, ""])


def _facts(reward: type) -> list[str]:
    """Its range, its licence and its files, a line each."""
    low, high = reward.typical_range
    files = {name: field for name, field in reward.Options.model_fields.items() if file_rule(field) is not None}
    gradient = "; differentiable" if reward.differentiable else ""
    lines = [f"- Scores {reward.media}s; typical scores {low:g} to {high:g}{gradient}."]
    if reward.licence:
        lines.append(f"- Licence of the weights: {reward.licence}.")
    lines += [f"- `{name}`: `models/rewards/{field.default}`. {field.description}" for name, field in files.items()]
    return lines


def node_markdown() -> str:
    """The help page of Load Reward, web/docs/DanceGRPO_LoadReward.md."""
    from trainer.rewards.registry import OWN

    parts = [NODE_HEAD]
    for reward in OWN:
        needs = [f"- Python packages: {', '.join(reward.packages)}."] if reward.packages else []
        parts += [f"## {reward.name}", "", _summary(reward), "", *_facts(reward), *needs, ""]
    return "\n".join(parts).rstrip() + "\n"


KERNEL_TABLES = {
    "README.md": lambda: kernel_table(_kernel_summary),
    "web/docs/DanceGRPO_SDESampler.md": lambda: kernel_table(_kernel_formulas),
}
"""Pages with a table of the kernels, and what the table is."""


def kernel_table(row: typing.Callable) -> str:
    """A line per kernel, by a function that gives a kernel's cells by their headings."""
    from trainer.diffusion.kernels import KERNELS

    rows = [row(kernel) for kernel in KERNELS.values()]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(cells.values()) for cells in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _kernel_summary(kernel: typing.Any) -> dict[str, str]:
    return {"kernel": f"`{kernel.name}`", "what it is": kernel.summary}


def _kernel_formulas(kernel: typing.Any) -> dict[str, str]:
    return {
        "kernel": f"`{kernel.name}`",
        "next latents, mean": kernel.mean,
        "std": kernel.std,
        "eta": "none" if kernel.deterministic else f"0 to {kernel.largest_eta:g}, usually {kernel.default_eta:g}",
        "source": kernel.source,
    }


def with_kernel_table(page: str, table: str) -> str:
    """A page with its table of the kernels, from the heading `| kernel |` to the last row, replaced."""
    return re.sub(r"^\| kernel \|.*\n(\|.*\n)*", lambda _: table, page, count=1, flags=re.MULTILINE)


def write_kernel_tables(root: Path) -> None:
    for name, table in KERNEL_TABLES.items():
        page = root / name
        page.write_text(with_kernel_table(page.read_text(encoding="utf-8"), table()), encoding="utf-8")


def _anchor(name: str) -> str:
    return name.replace(".", "")


def markdown() -> str:
    """The page docs/configuration.md."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        if name == "objective":
            parts += [OBJECTIVE_HEAD, *(_table(f"objective: {o.name}", o.Options) for o in OBJECTIVES.values())]
            continue
        section, many = _section(field.annotation)
        parts.append(_table(f"{name}{'[]' if many else ''}", section))
    return "\n".join(parts)


def _table(title: str, section: type[BaseModel]) -> str:
    rows = [
        f"## {title}",
        "",
        (section.__doc__ or "").strip(),
        "",
        "| setting | default | accepted | meaning |",
        "|---|---|---|---|",
    ]
    nested = []
    for name, field in section.model_fields.items():
        inner, many = _section(field.annotation)
        if inner:
            nested.append(_table(f"{title}.{name}{'[]' if many else ''}", inner))
        rows.append(
            f"| `{name}` | {_default(field)} | {_accepted(field)} | {field.description or _link(title, name)} |"
        )
    return "\n".join([*rows, "", *nested])


def _link(title: str, name: str) -> str:
    return f"see `{title}.{name}` below"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return ""
    text = "null" if value is None else list(value) if isinstance(value, tuple) else value
    return "`" + str(text).replace("|", "\\|").replace("\n", "\\n") + "`"


def _accepted(field: FieldInfo) -> str:
    options = choices(field)
    words = [_type(field.annotation) if options is None else ", ".join(f"`{option}`" for option in options)]
    for rule in rules(field):
        for kind, (word, attribute) in _SIGNS.items():
            if isinstance(rule, kind):
                words.append(f"{word} {getattr(rule, attribute):g}")
        if isinstance(rule, MultipleOf):
            words.append(f"multiple of {rule.multiple_of}")
        if isinstance(rule, MinLen):
            words.append("not empty")
        if isinstance(rule, MaxLen):
            words.append(f"at most {rule.max_length} {'characters' if field.annotation is str else 'entries'}")
    return ", ".join(words)


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type(a) for a in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {int: "whole number", float: "number", str: "text", bool: "true, false"}.get(annotation, str(annotation))


def _section(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """The section an annotation holds, if any, and whether in a list."""
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option, typing.get_origin(annotation) is list
        for inner in typing.get_args(option):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                return inner, typing.get_origin(option) is list
    return None, False


if __name__ == "__main__":
    page = sys.argv[1] if len(sys.argv) > 1 else ""
    if page == "kernels":
        write_kernel_tables(Path(__file__).resolve().parents[1])
    else:
        print({"rewards": rewards_markdown, "load-reward": node_markdown}.get(page, markdown)(), end="")
