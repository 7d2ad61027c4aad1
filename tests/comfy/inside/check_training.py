"""Training's own pieces inside ComfyUI: LoRA files, conditions, names, settings, identity."""

import inspect
import os
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch

import nodes as comfy_nodes

CPU = torch.device("cpu")


def test_importing_the_nodes_imports_no_library_that_comfyui_has_not(imported: set[str]) -> None:
    """That is what keeps ComfyUI's start short, on any machine: torch's own libraries take seconds to import."""
    own = {name for name in imported if name.endswith("_pack")}
    assert len(own) == 1
    assert imported - own <= {"pydantic", "annotated_types", "yaml"}


def test_a_refusal_is_reported_at_one_input(pack) -> None:
    """ComfyUI repeats what `validate_inputs` says at every input that it names."""
    for module in pack("nodes").MODULES:
        for node in module.NODES:
            own = vars(node).get("validate_inputs")
            names = [] if own is None else list(inspect.signature(own.__func__).parameters)[1:]
            assert len(names) <= 1, f"{node.__name__} names {names}"


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder and LoRA folders of this test's own."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "models")], folder_paths.supported_pt_extensions)
    )
    return tmp_path


@pytest.fixture
def trained(pack: object, output: Path) -> SimpleNamespace:
    """The embedded model with a LoRA of random weights, in the trainer, and the file that the trainer writes of it."""
    config = pack("trainer.config").parse_config({"prompts": {"texts": ["any"]}, "rewards": [{"name": "shapes"}]})
    model = pack("trainer.models").FAMILIES["sd3"].load(config.model, CPU)
    policy = pack("trainer.policy").Policy(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in pack("trainer.adapters.lora").parameters(model.module).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    file = output / "lora.safetensors"
    policy.save_lora(file, policy.result(), {"dancegrpo": '{"iteration": 7}'})
    return SimpleNamespace(model=model, file=file, policy=policy)


def velocity(model: object, x: torch.Tensor, sigma: torch.Tensor, cond: list) -> torch.Tensor:
    """What a ComfyUI model predicts: it gives x0, from which v = (x - x0) / sigma."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    embeds, extra = cond[0]
    rows = embeds.expand(len(x), -1, -1)
    pooled = extra["pooled_output"].expand(len(x), -1)
    x0 = model.model.apply_model(x, sigma, c_crossattn=rows, y=pooled)
    return (x - x0) / sigma[:, None, None, None]


@torch.no_grad()
def test_lora_file_gives_the_same_output_in_comfyui_and_the_trainer(pack, demo, trained, noise, caplog) -> None:
    name = pack("nodes.host.folders").publish_loras(trained.file, "equal")[0]
    patched = comfy_nodes.LoraLoaderModelOnly().load_lora_model_only(demo.model, name, 1.0)[0]
    assert "not loaded" not in caplog.text.lower()
    assert len(patched.patches) > 0
    cond, sigma = demo.encode("a red circle above a blue square"), torch.tensor([0.9, 0.7, 0.5, 0.2])
    conditions = pack("trainer.models").Conditions(
        {"embeds": cond[0][0].expand(4, -1, -1), "pooled": cond[0][1]["pooled_output"].expand(4, -1)}
    )
    expected = trained.model.predict(noise, sigma, conditions)
    with trained.policy.using("base"):
        base = trained.model.predict(noise, sigma, conditions)
    assert (velocity(patched, noise, sigma, cond) - expected).abs().max() < 1e-4
    assert (expected - base).abs().max() > 1e-2, "the LoRA does nothing, so this test would see nothing"


def test_prompts_of_the_graphs_clip_equal_the_trainers_own(pack, demo, tmp_path: Path) -> None:
    data = {
        "prompts": {"texts": ["a red circle", "two blue squares"], "negative": "grey"},
        "rewards": [{"name": "shapes"}],
        "rollout": {"guidance_scale": 2},
        "evaluation": {"texts": ["a green triangle"]},
    }
    config = pack("trainer.config").parse_config(data)
    texts, conditions = encoded(pack, tmp_path, demo.clip, config)
    assert texts == ["a red circle", "two blue squares", "a green triangle", "grey"]
    own = pack("trainer.models").FAMILIES["sd3"].encode(config.model, texts, CPU)
    assert conditions.tensors.keys() == own.tensors.keys()
    for name, value in own.tensors.items():
        assert (conditions.tensors[name] - value).abs().max() < 1e-4, name


def encoded(pack: object, folder: Path, clip: object, config: object) -> tuple[list[str], object]:
    """The texts that a clip encodes for a run, and their conditions."""
    pack("nodes.host.encoding").write(folder / "c.safetensors", clip, config)
    stored = pack("trainer.prompts.store").open_conditions(folder / "c.safetensors")
    return [text for text, _ in stored.keys], stored.rows(torch.arange(len(stored)))


def config_of(pack: object, **sections: object) -> object:
    data = {"prompts": {"texts": ["a red circle"]}, "rewards": [{"name": "shapes"}]} | sections
    return pack("trainer.config").parse_config(data)


def test_a_negative_prompt_that_is_not_used_is_not_encoded(pack, demo, tmp_path: Path) -> None:
    negative = "blurry, ugly, " * 40
    for guidance, texts in ((1.0, ["a red circle"]), (2.0, ["a red circle", negative.strip()])):
        config = config_of(
            pack,
            prompts={"texts": ["a red circle"], "negative": negative},
            rollout={"guidance_scale": guidance},
        )
        assert encoded(pack, tmp_path, demo.clip, config)[0] == texts


@torch.no_grad()
def test_long_prompts_beside_short_ones_keep_comfyuis_own_lengths(pack, demo, tmp_path: Path) -> None:
    texts = ["a red circle", "a red circle and a blue square, " * 8, "two triangles"]
    config = config_of(pack, prompts={"texts": texts})
    _, conditions = encoded(pack, tmp_path, demo.clip, config)
    alone = [demo.encode(text.strip())[0][0] for text in texts]
    lengths = [value.shape[1] for value in alone]
    assert lengths[1] > lengths[0] == lengths[2]
    assert conditions.lengths.tolist() == lengths
    for row, value in enumerate(alone):
        assert torch.equal(conditions.tensors["embeds"][row, : lengths[row]], value[0])


def test_weights_of_prompts_reach_the_clip_and_not_the_rewards(pack, demo, tmp_path: Path) -> None:
    encoding, sets = pack("nodes.host.encoding"), pack("trainer.prompts.sets")
    assert encoding.applies_weights(demo.clip)

    class LanguageModel:
        tokenize = staticmethod(lambda text: {"llm": [[(5, 1.0), (6, 1.0)]], "extra": [None, "x"]})

    assert not encoding.applies_weights(LanguageModel)
    prompts = {"texts": ["a (red:1.5) circle"], "weight_syntax": True}
    config = config_of(pack, prompts=prompts)
    texts, conditions = encoded(pack, tmp_path, demo.clip, config)
    assert texts == ["a (red:1.5) circle"]
    assert torch.equal(conditions.tensors["embeds"], demo.encode("a (red:1.5) circle")[0][0])
    assert not torch.equal(conditions.tensors["embeds"], demo.encode("a red circle")[0][0])
    training, _ = sets.read_prompts(config)
    assert training.scored == ["a red circle"]


@pytest.mark.parametrize(
    "text",
    [
        "a (red:1.5) fox", "((a)) b", "(a (b:1.2) c:0.5) d", "(a:b)", "(:1)", "()", "a) (b", "(a", "a)", ")(",
        r"\(a\) (b)",
        "((a:1.1) (b:2):3)", "(a: 2 )", "(a:nan)", "(a:1_0)", "(16:9)", "x(a)y(b)z", "(a)(b)", "(((a)", "a)))(((b",
    ],
)  # fmt: skip
def test_words_without_weights_are_those_comfyui_encodes(pack, text: str) -> None:
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    words = "".join(unescape_important(part) for part, _ in token_weights(escape_important(text), 1.0))
    assert pack("trainer.prompts.text").without_weights(text) == words


def test_a_clip_of_another_model_is_refused(pack, demo, tmp_path: Path) -> None:
    config = pack("trainer.config").parse_config({"prompts": {"texts": ["a"]}, "rewards": [{"name": "shapes"}]})

    class Other:
        tokenize = staticmethod(lambda text: text)
        encode_from_tokens_scheduled = staticmethod(
            lambda tokens: [[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 768)}]]
        )

    with pytest.raises(pack("trainer.utils.errors").BadInput, match="768 and 768 wide.*takes 128 and 128"):
        pack("nodes.host.encoding").write(tmp_path / "c.safetensors", Other, config)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- names

BAD_NAMES = [
    "", " ", ".", "..", "../x", "a/../b", "a/b", "a\\b", "/etc/x", "C:x", "C:\\x", "\\\\host\\x", "con", "NUL.txt",
    "Com1", "LPT³", "a\x00b", "a\nb", "a\x7fb", "a\u202eb", "x.", "x ", " x", ".x", "-x", "a..b", "x" * 65, "a:b",
    "a*b", "a?b", "~x", "$HOME", "a;b", "a|b", "a'b", 'a"b', "a%b", 5, None,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_bad_names_are_refused_and_no_file_is_touched(pack, output: Path, name: object) -> None:
    with pytest.raises(pack("trainer.utils.errors").BadInput, match="^name ") as error:
        pack("nodes.host.folders").run_folder(name)
    assert "\n" not in str(error.value)
    assert list(output.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "my_lora", "v1.2", "Red circles - 3", "形状", "console", "x" * 64])
def test_good_names_are_one_folder_inside(pack, output: Path, name: str) -> None:
    assert pack("nodes.host.folders").run_folder(name).parent == output.resolve() / "dancegrpo" / "runs"


# ----------------------------------------------------------------------------------------------------- LoRA files


def test_a_lora_is_never_written_over_another(pack, trained, output: Path) -> None:
    publish = pack("nodes.host.folders").publish_loras
    first = trained.file.read_bytes()
    assert publish(trained.file, "x") == [str(Path("dancegrpo") / "x_7.safetensors")]
    assert publish(trained.file, "x") == [str(Path("dancegrpo") / "x_7.safetensors")]
    other = first[:-4] + b"\x01\x02\x03\x04"
    trained.file.write_bytes(other)
    assert publish(trained.file, "x") == [str(Path("dancegrpo") / "x_7-2.safetensors")]
    folder = output / "loras" / "dancegrpo"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "x_7.safetensors": first,
        "x_7-2.safetensors": other,
    }
    assert str(Path("dancegrpo") / "x_7.safetensors") in folder_paths.get_filename_list("loras")


def test_the_lora_folder_is_listed_once(pack, output: Path) -> None:
    for _ in range(3):
        pack("nodes.host.folders").register_loras()
    assert folder_paths.get_folder_paths("loras").count(str(output / "loras")) == 1


# ------------------------------------------------------------------------------------------------------- settings


def test_the_settings_node_at_its_defaults_is_the_run_descriptions_defaults(pack) -> None:
    module, config = pack("nodes.settings"), pack("trainer.config")
    inputs = module.Settings.define_schema().inputs
    values = {i.id: i.default for i in inputs if i.id != "overrides"}
    given = module.Settings.execute(**values).args[0].sections
    plain = config.parse_config({"prompts": {"texts": ["any"]}, "rewards": [{"name": "any"}]})
    assert given == plain.model_dump(mode="json", include=set(module.SECTIONS))


def test_every_widget_takes_its_whole_range_and_nothing_else(pack) -> None:
    module, errors = pack("nodes.settings"), pack("trainer.utils.errors")
    checked = 0
    for setting in module.MAIN:
        widget = module.widget(setting)
        section, name = setting.split(".")
        accepts = lambda value: module.settings({section: {name: value}}, "")[section][name] == value  # noqa: B023, E731
        if not hasattr(widget, "min") or isinstance(widget.default, bool):
            continue
        checked += 1
        assert accepts(widget.default)
        for edge in (widget.min, widget.max):
            try:
                assert accepts(edge)
            except errors.BadInput as error:  # a rule about two settings at once
                assert setting in ("objective.updates", "rollout.eta"), error
    assert checked > 8


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("rollout.etta=1", "rollout.etta is not a setting"),
        ("rollout.eta=99", "rollout.eta is 99"),
        ("rollout.eta", "not of the form"),
        ("model.path=/etc", "are set by other nodes"),
        ("prompts.file=/etc/passwd", "are set by other nodes"),
        ("rewards=[]", "are set by other nodes"),
        ("evaluation.file=/etc/passwd", "evaluation.file cannot be set here: set it on GRPO Train LoRA"),
        ("evaluation={file: /etc/passwd}", "evaluation.file cannot be set here: set it on GRPO Train LoRA"),
        ("evaluation.rewards=[{name: shapes}]", "evaluation.rewards cannot be set here: set it on GRPO Train LoRA"),
        ("lora.start_from=//host/share/x.safetensors", "lora.start_from cannot be set here: set it on GRPO Train LoRA"),
        ("lora={start_from: /etc/x.safetensors}", "lora.start_from cannot be set here: set it on GRPO Train LoRA"),
        ("runtime.wandb_mode=online", "runtime.wandb_mode=online cannot be set here, because it sends prompts"),
        ("rollout.steps=!!python/object/apply:os.system [ls]", "uses a YAML tag"),
    ],
)
def test_bad_overrides_are_one_sentence(pack, overrides: str, says: str) -> None:
    with pytest.raises(pack("trainer.utils.errors").BadInput, match=says):
        pack("nodes.settings").settings({}, overrides)


def test_presets_are_settings_without_what_other_nodes_give(pack) -> None:
    module = pack("nodes.settings")
    for name in pack("trainer.config").preset_names():
        given = (
            module.Preset.execute(name, "# a note\n\nruntime.iterations=3\nrollout.window={size: 1}").args[0].sections
        )
        assert set(given) == set(module.SECTIONS)
        assert given["runtime"]["iterations"] == 3
        assert given["rollout"]["window"]["size"] == 1
        assert not any(given["evaluation"][field] for field in ("texts", "file", "shapes", "rewards"))


# ------------------------------------------------------------------------------------------------------- identity


def test_what_is_upstream_counts_and_node_numbers_do_not(pack) -> None:
    digest = pack("nodes.host.runs").upstream_digest

    def graph(numbers: str, file: str) -> dict:
        a, b = numbers
        return {
            a: {"class_type": "Loader", "inputs": {"file": file}},
            b: {"class_type": "Patch", "inputs": {"clip": [a, 1], "strength": 0.5}, "is_changed": 3},
        }

    known = digest(graph("12", "x").__getitem__, ["2", 0])
    assert digest(graph("79", "x").__getitem__, ["9", 0]) == known
    assert digest(graph("12", "y").__getitem__, ["2", 0]) != known
    assert digest(graph("12", "x").__getitem__, ["2", 1]) != known


@pytest.mark.parametrize(
    ("prompts", "held_out", "says"),
    [
        (" \n\n", "", "prompts is empty"),
        ("a\nb\n a ", "", "prompts contains 'a' more than once"),
        ("# a\n\ufeff\n", "", "prompts is empty"),
        ("a b\nc", "# d\na  b", "held_out_prompts: 'a b' is also in prompts"),
        ("a\nb \ud83e", "", "prompts contains 'b .ud83e', which has an unpaired Unicode surrogate"),
        ("a", "b\nb", "held_out_prompts contains 'b' more than once"),
        ('[\n "a",\n "b"\n]', "", "prompts contains JSON: enter one prompt per line"),
        ("a", "prompt,category\nb,c", "held_out_prompts begins with a CSV header: enter one prompt per line"),
        ("a\nb\0", "", "prompts contains NUL characters"),
        ("a\nb", "b", "held_out_prompts: 'b' is also in prompts"),
    ],
)
def test_bad_prompts_are_one_sentence(pack, prompts: str, held_out: str, says: str) -> None:
    rewards = pack("nodes.types").Rewards((pack("trainer.config").RewardConfig(name="shapes"),))
    with pytest.raises(pack("trainer.utils.errors").BadInput, match=says):
        pack("nodes.host.runs").describe({"family": "sd3"}, None, rewards, None, prompts, held_out, "")


@pytest.mark.parametrize(
    ("text", "processes", "says"),
    [("0,0", 2, "different"), ("0", 2, "list 2 different GPUs"), ("a", 1, "numbers"), ("-1", 1, "numbers")],
)
def test_bad_gpus_are_one_sentence(pack, text: str, processes: int, says: str) -> None:
    with pytest.raises(pack("trainer.utils.errors").BadInput, match=says):
        pack("nodes.host.devices").parse_gpus(text, processes)


def test_gpus_are_read(pack) -> None:
    assert pack("nodes.host.devices").parse_gpus(" 3, 1 ", 2) == [3, 1]
    assert pack("nodes.host.devices").parse_gpus("", 2) is None


# ------------------------------------------------------------------------------------------------------ the start


@pytest.fixture
def described(pack) -> dict:
    return {"prompts": {"texts": ["a red circle"]}, "rewards": [{"name": "shapes"}], "runtime": {"device": "cpu"}}


def test_one_that_another_comfyui_has_started_meanwhile_is_not_started_again(
    pack, output: Path, monkeypatch: pytest.MonkeyPatch, described: dict
) -> None:
    runs, launch, started = pack("nodes.host.runs"), pack("trainer.runs.launch"), []

    def start_elsewhere(run: object, processes: int, gpus: object) -> None:
        run.write_status("starting", launcher=launch.identity(os.getpid()), processes=1, gpus=[])
        started.append(run.path.name)

    monkeypatch.setattr(launch, "start_run", start_elsewhere)
    run = runs.begin("both", described, None, "", 1, None)
    answers = [False, True, False, True]  # as it was before the other one's start, and after it
    monkeypatch.setattr(launch, "is_running", lambda run: answers.pop(0))
    assert runs.begin("both", described, None, "", 1, None).path == run.path
    assert not runs.resume(run)
    assert started == ["both"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rewards": [{"name": "film"}]}, "reward 'film' scores videos, but model.frames is 1"),
        ({"evaluation": {"texts": ["a green circle"], "rewards": [{"name": "film"}]}}, "reward 'film' scores videos"),
        ({"rollout": {"kernel": "ddim"}}, "rollout.kernel is 'ddim': models of family sd3 take dance"),
        ({"rewards": [{"name": "pickscore"}]}, "reward 'pickscore': path .* does not exist"),
    ],
)
def test_what_the_trainer_would_refuse_is_said_before_it_starts(
    pack, output: Path, monkeypatch: pytest.MonkeyPatch, described: dict, changes: dict, says: str
) -> None:
    rewards = pack("trainer.rewards")

    class Film(rewards.Reward):
        name, typical_range, media = "film", (0.0, 1.0), "video"

        def score(self, images: object, prompts: list[str]) -> torch.Tensor:
            return torch.zeros(len(prompts))

    monkeypatch.setitem(rewards.REWARDS, "film", Film)
    with pytest.raises(pack("trainer.utils.errors").BadInput, match=says):
        pack("nodes.host.runs").begin("refused", described | changes, None, "", 1, None)
    assert list(output.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- memory


def test_too_little_memory_is_an_error_with_numbers(pack, monkeypatch: pytest.MonkeyPatch) -> None:
    host, model = pack("nodes.host.devices"), pack("trainer.config").ModelConfig()
    monkeypatch.setattr(host.memory, "get_free_memory", lambda device: 0.3 * 2**30)
    with pytest.raises(pack("trainer.utils.errors").BadInput, match=r"has 0\.3 GiB .* need 0\.6 GiB"):
        host.require_memory(model, None, 1, on_cpu=False)
    monkeypatch.setattr(host.memory, "get_free_memory", lambda device: 8 * 2**30)
    host.require_memory(model, None, 1, on_cpu=False)
    with pytest.raises(pack("trainer.utils.errors").BadInput, match=r"has 8\.0 GiB .* need 12\.3 GiB"):
        host.require_memory(model, None, 20, on_cpu=False)


def test_weights_of_a_connected_model_may_stay_in_ram(pack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host, graph = (
        pack("nodes.host.devices"),
        {"folder": "x", "file": str(tmp_path / "a"), "vae_file": str(tmp_path / "a")},
    )
    with (tmp_path / "a").open("wb") as file:
        file.truncate(12 * 2**30)  # a hole takes no space
    model = pack("trainer.config").ModelConfig(family="comfy", graph=graph)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(host.memory, "get_torch_device", lambda: gpu)
    monkeypatch.setattr(host.memory, "get_free_memory", lambda device: (8 if device == gpu else 6) * 2**30)
    host.require_memory(model, None, 1, on_cpu=False)
    monkeypatch.setattr(host.memory, "get_free_memory", lambda device: 6 * 2**30)
    with pytest.raises(pack("trainer.utils.errors").BadInput, match=r"RAM has 12\.0 GiB .* need 12\.5 GiB"):
        host.require_memory(model, None, 1, on_cpu=False)


def test_weights_are_counted_from_file_headers(pack) -> None:
    from safetensors.torch import load_file

    weights = pack("trainer.shapes").WEIGHTS
    numbers = {
        part: sum(t.numel() for t in load_file(weights / part / "diffusion_pytorch_model.safetensors").values())
        for part in ("transformer", "vae")
    }
    config = pack("trainer.config").ModelConfig(dtype="bfloat16")
    assert pack("trainer.models").weight_bytes(config) == 2 * numbers["transformer"] + 4 * numbers["vae"]


def test_a_folder_of_another_family_is_refused(pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(tmp_path)], ["folder"]))
    node, error = pack("nodes.base_model").BaseModel, pack("trainer.utils.errors").BadInput
    assert node.define_schema().inputs[0].options == ["thing"]
    values = {"family": "sd3", "width": 512, "height": 512, "dtype": "bfloat16"}
    with pytest.raises(error, match="sd3 folder: transformer/config.json is missing"):
        node.execute("thing", **values)
    with pytest.raises(error, match="not in models/diffusers; choose one of: thing"):
        node.execute("../thing", **values)


def test_a_preset_that_does_not_fit_the_model_is_named_with_those_that_do(pack) -> None:
    import comfy.model_sampling

    settings, types, bad = pack("nodes.settings"), pack("nodes.types"), pack("trainer.utils.errors").BadInput
    demo = settings.Preset.execute("demo").args[0]
    noise_model = types.Model({}, types.ModelSpec(object, None, object()))
    flow_model = types.Model({}, types.ModelSpec(object, None, comfy.model_sampling.CONST()))

    def said(given: object, model: object, words: str) -> str:
        with pytest.raises(bad) as caught, settings.preset_is_named(given, model):
            raise bad(words)
        return str(caught.value)

    fault = "lora.targets: 'attn.to_q' matches no linear layer"
    words = said(demo, noise_model, fault)
    assert words.startswith("preset 'demo' does not fit this model: choose one-gpu-sd14 in GRPO Preset")
    assert words.endswith(f"({fault})")
    assert "one-gpu-flux" in said(demo, flow_model, fault) and "one-gpu-sd14" not in said(demo, flow_model, fault)
    assert said(demo, flow_model, "the disk is full") == "the disk is full"
    assert said(types.Settings(demo.sections), flow_model, fault) == fault, "settings that come from no preset"
