"""Every recipe plans against stand-ins with the true shapes; specs print, resolve and list."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

import expo as door
from expo.checkpoint.headers import layout
from expo.errors import SpecError
from expo.planning.build import build_plan
from expo.planning.jobs import Blend
from expo.spec.read import read_spec
from expo.spec.recipes import recipes
from expo.spec.resolved import resolved, to_yaml

Shapes = dict[str, tuple[int, ...]]

# hidden, inner, layers, key-value width, rows, untied
SIZES = {
    "7b": (4096, 14336, 32, 1024, 32000),
    "openchat": (4096, 14336, 32, 1024, 32002),
    "llama3-8b": (4096, 14336, 32, 1024, 128256),
    "llama3-70b": (8192, 28672, 80, 1024, 128256),
    "llama2-7b": (4096, 11008, 32, 4096, 32000),
    "llama2-13b": (5120, 13824, 40, 5120, 32000),
    "llama2-70b": (8192, 28672, 80, 1024, 32000),
    "yi-34b": (7168, 20480, 60, 1024, 64000),
    "olmo2-7b": (4096, 11008, 32, 4096, 100352),
    "internlm2-1_8b": (2048, 8192, 24, 1024, 92544),
    "internlm2-7b": (4096, 14336, 32, 1024, 92544),
    "internlm2-20b": (6144, 16384, 48, 1024, 92544),
}

ARCHITECTURES = (
    (r"openchat|Starling|Storm", "openchat"),
    (r"internlm2-chat-1_8b", "internlm2-1_8b"),
    (r"internlm2-chat-7b", "internlm2-7b"),
    (r"internlm2-chat-20b", "internlm2-20b"),
    (r"tulu-2(-dpo)?-7b", "llama2-7b"),
    (r"tulu-2(-dpo)?-13b", "llama2-13b"),
    (r"tulu-2(-dpo)?-70b", "llama2-70b"),
    (r"34[bB]", "yi-34b"),
    (r"70B|large", "llama3-70b"),
    (r"OLMo-2", "olmo2-7b"),
    (r"[Ll]la[Mm][aA]-?3|LLaMA3|Tulu-3", "llama3-8b"),
    (r".*", "7b"),
)


def architecture(model: str) -> str:
    return next(name for pattern, name in ARCHITECTURES if re.search(pattern, model))


def shapes(name: str) -> Shapes:
    hidden, inner, layers, kv, rows = SIZES[name]
    if name.startswith("internlm2"):
        layer: Shapes = {
            "attention.wqkv": (hidden + 2 * kv, hidden), "attention.wo": (hidden, hidden),
            "feed_forward.w1": (inner, hidden), "feed_forward.w2": (hidden, inner), "feed_forward.w3": (inner, hidden),
            "attention_norm": (hidden,), "ffn_norm": (hidden,),
        }  # fmt: skip
        ends: Shapes = {
            "model.tok_embeddings": (rows, hidden),
            "model.norm": (hidden,),
            "output": (rows, hidden),
        }
    else:
        layer = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        olmo = {
            "self_attn.q_norm": (hidden,),
            "self_attn.k_norm": (kv,),
            "post_feedforward_layernorm": (hidden,),
        }
        layer |= olmo if name.startswith("olmo2") else {"input_layernorm": (hidden,)}
        ends = {
            "model.embed_tokens": (rows, hidden),
            "model.norm": (hidden,),
            "lm_head": (rows, hidden),
        }
    return {f"{key}.weight": shape for key, shape in ends.items()} | {
        f"model.layers.{number}.{key}.weight": shape
        for number in range(layers)
        for key, shape in layer.items()
    }


def stand_in(folder: Path, tensors: Shapes) -> Path:
    """A model of headers: the file has its full size, and holes for data."""
    folder.mkdir(parents=True)
    header, nbytes = layout(
        ((name, "BF16", shape) for name, shape in tensors.items()), {"format": "pt"}
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)
    (folder / "config.json").write_text('{"model_type": "stand-in"}')
    return folder


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": (8, 4096), f"{name}.lora_B.weight": (4096, 8)}
    header, nbytes = layout(((key, "F32", shape) for key, shape in tensors.items()), {})
    (folder / "adapter_model.safetensors").write_bytes(header + bytes(nbytes))
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for every model that a recipe names, at `places/org/name`."""
    root = tmp_path_factory.mktemp("hub")
    made: dict[str, Path] = {}
    for recipe in recipes():
        for name in re.findall(r"[\w.-]+/[\w.-]+", " ".join(models_of(recipe.path))):
            if (root / name).exists():
                continue
            (root / name).parent.mkdir(exist_ok=True)
            if "adapter" in name:
                adapter(root / name)
                continue
            kind = architecture(name)
            if kind not in made:
                made[kind] = stand_in(root / "made" / kind, shapes(kind))
            (root / name).symlink_to(made[kind])
    return root


def models_of(path: Path) -> list[str]:
    text = path.read_text()
    return re.findall(r"^(?:base_model|  - model|onto|donor): (\S+)$", text, flags=re.M)


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes()])
def test_a_recipe_plans(name: str, places: Path, tmp_path: Path) -> None:
    (recipe,) = [recipe for recipe in recipes() if recipe.name == name]
    text = recipe.path.read_text()
    for model in sorted(set(models_of(recipe.path)), key=len, reverse=True):
        local = "+".join(str(places / part) for part in model.split("+"))
        text = re.sub(rf"(: ){re.escape(model)}$", rf"\g<1>{local}", text, flags=re.M)
    (tmp_path / "spec.yml").write_text(text)
    plan = build_plan(read_spec(tmp_path / "spec.yml"))
    assert plan.refusals == ()
    assert plan.write_bytes > 3e9
    computed = [job.name for job in plan.jobs if isinstance(job.rule, Blend)]
    # Embeddings, head and norms stay as aligned.
    left_alone = name in ("template-lox", "template-depth-linear")
    assert len(computed) == len(plan.donor.weights) - (67 if left_alone else 0)


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes()])
def test_a_recipe_says_what_it_is(name: str) -> None:
    """What, sources, the exact command, the expected result; and it survives its resolved form."""
    (recipe,) = [recipe for recipe in recipes() if recipe.name == name]
    comment = "".join(re.findall(r"^#.*\n", recipe.path.read_text(), flags=re.M))
    assert "Sources:" in comment
    assert re.search(rf"#   expo (merge|plan) {re.escape(name)}", comment)
    assert "Expected:" in comment
    request = read_spec(recipe.path)
    assert resolved(read_spec(yaml.safe_load(to_yaml(resolved(request))))) == resolved(request)
    schema = door_schema()
    jsonschema.validate(yaml.safe_load(recipe.path.read_text()), schema)


def door_schema() -> dict:
    from expo.spec.schema import json_schema

    return dict(json_schema())


def test_the_sizes_in_the_comments_are_the_plans() -> None:
    for recipe in recipes():
        stated = re.search(r", (\d+(?:\.\d+)?) GB;", recipe.title)
        if stated is None:
            continue
        aligned = models_of(recipe.path)[1]
        count = sum(
            2 * int(__import__("math").prod(shape))
            for shape in shapes(architecture(aligned)).values()
        )
        assert count / 1e9 == pytest.approx(float(stated[1]), rel=0.02), recipe.name


def test_the_list_and_names(expo, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = expo("merge", "--list")
    assert listed.code == 0
    assert len(listed.out.splitlines()) == len(list(recipes())) >= 25
    assert "starling-lm-7b-beta-expo " in listed.out
    shown = expo("plan", "starling-lm-7b-beta-expo", "--resolved")
    assert yaml.safe_load(shown.out)["models"][0]["parameters"] == {"alpha": 1.5}
    monkeypatch.chdir(places)  # org/name is a path here
    storm = expo("plan", "storm-7b-collapse")
    assert storm.code == 0, storm.err
    assert "warning    Storm-7B collapses under extrapolation" in storm.out
    assert expo("plan", "no-such-recipe").code == 2


def test_the_schema_is_printed(expo) -> None:
    schema = json.loads(expo("plan", "--schema").out)
    assert schema["additionalProperties"] is False
    assert "merge_method" in schema["required"]


def test_print_spec_does_the_same(expo, pair, tmp_path: Path) -> None:
    flags = ("--paper-alpha", 0.5, "--rounding", "stochastic", "--seed", 7, "--dtype", "float16")
    out = tmp_path / "a"
    printed = expo("extrapolate", pair.sft, pair.aligned, out, *flags, "--print-spec")
    assert printed.code == 0, printed.err
    assert not out.exists()
    (tmp_path / "spec.yml").write_text(printed.out)
    assert expo("extrapolate", pair.sft, pair.aligned, out, *flags).code == 0
    assert expo("merge", tmp_path / "spec.yml", tmp_path / "b").code == 0
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_an_output_carries_mergekits_spec(pair, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration

    door.extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5, verify=False)
    spec = json.loads((tmp_path / "out" / "expo.json").read_text())["mergekit_spec"]
    config = MergeConfiguration.model_validate(spec)
    assert config.merge_method == "task_arithmetic"
    assert spec["models"][0]["parameters"] == {"weight": 1.5}
    assert (spec["dtype"], spec["out_dtype"]) == ("float32", "bfloat16")


@pytest.mark.slow
def test_a_spec_says_how_its_output_is_verified(pair, tmp_path: Path) -> None:
    """Published vectors that the demo's toy does not give, and from when on to fail."""
    from expo.demo.toy import MODELS

    spec = {
        "merge_method": "expo",
        "base_model": str(MODELS / "sft"),
        "models": [{"model": str(MODELS / "aligned"), "parameters": {"alpha": 1.5}}],
    }
    failed = door.merge(spec | {"verify": {"vectors": "openchat"}}, tmp_path / "a")
    assert failed.verified is False
    assert [c.name for c in failed.checks if c.status == "error"] == ["vectors"]
    assert door.merge(spec | {"verify": {"stop_at": "warning"}}, tmp_path / "b").verified is True
    with pytest.raises(SpecError, match=r"verify\.vectors: nowhere is neither a file nor golden"):
        door.plan(spec | {"verify": {"vectors": "nowhere"}})
