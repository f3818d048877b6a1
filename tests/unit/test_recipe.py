"""The recipe as a user meets it: the paper's defaults, a label on every field, and refusals that name the fields.

The walk over the models is generic, so a new field without description, unit or range fails here.
"""

import json
import typing
from pathlib import Path

import annotated_types
import pytest
import yaml
from jsonschema import Draft202012Validator

from catid2_ray.catalog.sources.esci import GAINS
from catid2_ray.config import NOT_STATED, GeneratorRecipe, QuantizerRecipe, Recipe, Section, schema
from catid2_ray.errors import RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes").glob("*.yaml"))
DATA = Path(__file__).parents[1] / "data"
MINIMAL = {"catalog": {"synthetic": {}}}


def leaves_of(annotation):
    """The scalar types inside unions and tuples, each with the constraints that Annotated puts on it."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *metadata = typing.get_args(annotation)
        limits = [limit for item in metadata for limit in getattr(item, "metadata", [item])]
        return [(scalar, below + limits) for scalar, below in leaves_of(inner)]
    if typing.get_origin(annotation) is typing.Literal:
        return [(typing.Literal, [])]
    inside = [leaf for argument in typing.get_args(annotation) for leaf in leaves_of(argument)]
    return inside or [(annotation, [])]


def fields_of(model, path=""):
    for name, field in model.model_fields.items():
        scalars = leaves_of(field.annotation)
        sections = [scalar for scalar, _ in scalars if isinstance(scalar, type) and issubclass(scalar, Section)]
        yield f"{path}{name}", field, scalars
        for section in sections:
            yield from fields_of(section, f"{path}{name}.")


FIELDS = {path: (field, scalars) for path, field, scalars in fields_of(Recipe)}


def refused(values, *words):
    """The recipe is refused and the message holds all words."""
    with pytest.raises(RecipeError) as caught:
        Recipe.build(values)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


def test_the_defaults_are_the_papers():
    quantizer = Recipe.build(MINIMAL | {"quantizer": {"kind": "cat_id2_paper"}}).quantizer
    assert (quantizer.dispersion, quantizer.hierarchical, quantizer.cluster_scale) == (0.1, 1e-4, 1.0)
    assert quantizer.codes_per_level == (256,) * 4 and quantizer.space.capacity == 256**4
    assert (quantizer.encoder, quantizer.latent_of(768), quantizer.category_on) == ("mlp", 32, "residual")
    assert QuantizerRecipe().latent_of(768) == 768
    recipe = Recipe.build(MINIMAL)
    assert recipe.catalog.max_category_depth == 3 and recipe.catalog.min_category_depth == 0
    assert recipe.embedding.text == ("title", "category_path", "description")
    assert (recipe.generator.min_relevance, recipe.evaluation.min_relevance) == (2.33, 2.67)


def test_the_walk_finds_the_sections():
    assert (
        len(FIELDS) > 70
        and {"catalog.synthetic.seed", "quantizer.temperature", "cluster.logical_cpus"} <= FIELDS.keys()
    )


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_has_description_unit_range_and_source(path):
    field, scalars = FIELDS[path]
    extra = field.json_schema_extra
    assert field.description and extra["unit"]
    if not extra.get("operational") and extra["unit"] != "section":
        assert extra["paper"], "a source, or the mark that the paper is silent"
    bounds = (annotated_types.Ge, annotated_types.Gt)
    for scalar, limits in scalars:
        if scalar in (int, float):
            assert any(isinstance(limit, bounds) for limit in [*limits, *field.metadata]), f"{path} has no lower bound"


@pytest.mark.parametrize(
    "path",
    [
        "quantizer.temperature", "quantizer.commitment", "quantizer.hidden", "quantizer.latent", "quantizer.learning_rate",
        "quantizer.weight_decay", "quantizer.warmup_share", "generator.epochs", "generator.batch", "generator.dropout",
        "generator.label_smoothing", "evaluation.beam_width",
    ],
)  # fmt: skip
def test_what_the_paper_leaves_out_is_marked(path):
    assert FIELDS[path][0].json_schema_extra["paper"] == NOT_STATED == "not stated in the paper"


@pytest.mark.parametrize(
    "path",
    [
        "quantizer.dispersion",
        "quantizer.hierarchical",
        "quantizer.cluster_scale",
        "quantizer.batch",
        "quantizer.epochs",
    ],
)
def test_what_the_paper_states_names_its_section(path):
    assert FIELDS[path][0].json_schema_extra["paper"].startswith("4.1")


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"sed": 1}, ["sed: ", "unknown key; `catid2 recipe --schema` lists all", "found 1"]),
        ({"quantizer": {"epoch": 3}}, ["quantizer.epoch: ", "unknown key"]),
        ({"catalog": {"synthetic": {"product": 60}}}, ["catalog.synthetic.product: ", "unknown key"]),
        ({"quantizer": {"epochs": 0}}, ["quantizer.epochs: ", "greater than or equal to 1", "found 0"]),
        ({"quantizer": {"epochs": "many"}}, ["quantizer.epochs: ", "found 'many'"]),
        ({"quantizer": {"temperature": 0}}, ["quantizer.temperature: ", "greater than 0"]),
        ({"quantizer": {"learning_rate": float("nan")}}, ["quantizer.learning_rate: ", "finite"]),
        ({"quantizer": {"learning_rate": float("inf")}}, ["quantizer.learning_rate: ", "finite"]),
        ({"quantizer": {"codes_per_level": [256, 1, 256, 256]}}, ["quantizer.codes_per_level.1: ", "found 1"]),
        ({"quantizer": {"codes_per_level": []}}, ["quantizer.codes_per_level: "]),
        ({"quantizer": {"hidden": []}}, ["quantizer.hidden: "]),
        ({"quantizer": {"zero_stage": 4}}, ["quantizer.zero_stage: ", "found 4"]),
        ({"quantizer": {"precision": "fp8"}}, ["quantizer.precision: ", "'fp8'"]),
        (
            {"generator": {"zero_stage": 3}},
            ["generator: zero_stage 3 is not offered: it splits the weights", "use zero_stage 2"],
        ),
        ({"generator": {"precision": "fp16"}}, ["generator: precision fp16 is not offered: T5's activations overflow"]),
        ({"generator": {"decay": "linear"}}, ["generator.decay: ", "'inverse_sqrt'"]),
        ({"generator": {"dropout": 1}}, ["generator.dropout: ", "less than 1"]),
        ({"generator": {"level_weights": [1, 1, -1, 1]}}, ["generator.level_weights.2: ", "found -1"]),
        ({"embedding": {"text": ["name"]}}, ["embedding.text.0: ", "'name'"]),
        ({"embedding": {"text": []}}, ["embedding.text: "]),
        ({"evaluation": {"methods": ["tiger"]}}, ["evaluation.methods.0: ", "'tiger'"]),
        ({"evaluation": {"min_relevance": -1}}, ["evaluation.min_relevance: "]),
        ({"catalog": {"synthetic": {"products": 3}}}, ["catalog.synthetic.products: ", "found 3"]),
        ({"store": ""}, ["store: "]),
        ({"catalog": {"root": ""}}, ["catalog.root: "]),
        ({"quantizer": 5}, ["quantizer: "]),
    ],
)
def test_unknown_keys_and_wrong_values_are_named(extra, words):
    refused(MINIMAL | extra, "the recipe is not valid", *words)


def test_all_faults_are_named_at_once():
    refused({"seed": -1, "quantizer": {"epochs": 0}, "generator": {"who": 1}},
            "seed: ", "quantizer.epochs: ", "generator.who: ", "catalog: Field required")  # fmt: skip


@pytest.mark.parametrize("catalog", [{}, {"root": "somewhere", "synthetic": {}}])
def test_a_catalogue_has_exactly_one_source(catalog):
    refused({"catalog": catalog}, "set exactly one of catalog.root", "and catalog.synthetic")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"catalog": {"synthetic": {}, "max_category_depth": 4}, "quantizer": {"kind": "cat_id2_paper"}},
         ["catalog.max_category_depth 4", "4 (quantizer.codes_per_level)", "section 3.1"]),
        ({"catalog": {"synthetic": {}, "max_category_depth": 3},
          "quantizer": {"kind": "cat_id2_paper", "codes_per_level": [64, 64, 64]}},
         ["catalog.max_category_depth 3", "3 (quantizer.codes_per_level)", "degenerates to the category tree"]),
        ({"catalog": {"synthetic": {}, "min_category_depth": 3, "max_category_depth": 2}},
         ["catalog.min_category_depth 3 exceeds catalog.max_category_depth 2", "every product would be set aside"]),
        (MINIMAL | {"generator": {"patience": 3, "validate_queries": 0}},
         ["generator: ", "patience 3 counts validations", "set validate_queries"]),
        (MINIMAL | {"quantizer": {"workers": 3, "batch": 1024}}, ["quantizer: ", "batch 1024 does not divide by workers 3"]),
        (MINIMAL | {"alignment": {"group_form": "fixed", "injected": 8}},
         ["alignment: ", "injected 8 fills a fixed group of 8: at least one rollout must stay"]),
        (MINIMAL | {"alignment": {"steps": 30, "report_every": 20}}, ["steps 30 does not divide by report_every 20"]),
        (MINIMAL | {"alignment": {"report_every": 50, "updates": 4}}, ["report_every 50 does not divide by updates 4"]),
        (MINIMAL | {"alignment": {"ranker": "a:b", "ranker_scores": "s.parquet"}}, ["ranker and ranker_scores are both"]),
        (MINIMAL | {"alignment": {"updates": 2, "checkpoint_every_steps": 3}},
         ["checkpoint_every_steps 3 does not divide by updates 2"]),
        (MINIMAL | {"alignment": {"ranker": "a.b"}}, ["ranker 'a.b' is not of the form module:function"]),
        (MINIMAL | {"alignment": {"grades": [[2, 1], [1, 0]]}}, ["grades must rise in relevance"]),
        (MINIMAL | {"alignment": {"batch": 9, "workers": 2}}, ["alignment: ", "batch 9 does not divide by workers 2"]),
        (MINIMAL | {"generator": {"batch": 9, "workers": 2}}, ["generator: ", "batch 9 does not divide by workers 2"]),
        (MINIMAL | {"generator": {"level_weights": [1, 1, 1]}},
         ["generator.level_weights has 3 entries, quantizer.codes_per_level 4"]),
        (MINIMAL | {"generator": {"mix": {"query": 1, "synthetic": 1}}}, ["mix asks for synthetic queries, but doc2query"]),
        (MINIMAL | {"generator": {"mix": {"title": 0}}}, ["generator: ", "leaves no example to train on"]),
        (MINIMAL | {"generator": {"mix": {"titel": 1}}}, ["generator.mix.titel", "found 'titel'"]),
        (MINIMAL | {"generator": {"stages": [{"mix": {"title": 0}}]}}, ["generator.stages.0: ", "leaves stage 'train' without"]),
        (MINIMAL | {"generator": {"stages": [{"name": "a"}, {"name": "a"}]}}, ["stages are named ['a', 'a']", "its own name"]),
        (MINIMAL | {"generator": {"span_tokens": 24, "query_tokens": 24}}, ["span_tokens 24 exceeds query_tokens 24"]),
        (MINIMAL | {"generator": {"relevance_weights": {3: 1.0}}}, ["relevance_weights begin at 3.0, above min_relevance 2.33"]),
        (MINIMAL | {"generator": {"relevance_weights": {1: 0}}}, ["leave no pair that teaches"]),
        (MINIMAL | {"quantizer": {"precision": "bf16"}}, ["quantizer: ", "precision bf16 is not offered for the quantizer"]),
        (MINIMAL | {"generator": {"precision": "bf16", "zero_stage": 0}}, ["generator: ", "found zero_stage 0"]),
        (
            MINIMAL | {"generator": {"batch": 256, "workers": 2, "micro_batch": 48}},
            ["micro_batch 48 x accumulation x workers 2 = batch 256", "(2.667)", "share of the batch is 128 rows", "32 or 64"],
        ),
        (MINIMAL | {"quantizer": {"batch": 64, "micro_batch": 32}}, ["quantizer: micro_batch 32 is not offered", "batch 64"]),
        (MINIMAL | {"generator": {"width": 100, "heads": 3}}, ["generator: ", "width 100 does not divide by heads 3"]),
        (MINIMAL | {"serving": {"stop_level": 2}}, ["serving: ", "stop_level 2 finds prefixes, not products", "serving.expansion"]),
        (MINIMAL | {"serving": {"stop_level": 5, "expansion": {}}}, ["serving.stop_level 5 is beyond the 4 levels"]),
        (MINIMAL | {"serving": {"beam_width": [20, 50]}}, ["serving.beam_width has 2 entries, quantizer.codes_per_level 4"]),
        (
            MINIMAL | {"quantizer": {"category_confidence": {"sure": 0.5}}},
            ["quantizer.category_confidence names sure", "as int or float", "{sure: float}"],
        ),
        (MINIMAL | {"reproduce": {"confidence": {"sure": 0.5}}}, ["reproduce.confidence names sure", "{sure: float}"]),
        (MINIMAL | {"serving": {"filters": ["brand"]}}, ["serving.filters names brand", "catalog.filter_columns", "category_path"]),
        (MINIMAL | {"serving": {"expansion": {"dense": "none"}}}, ["order is 'dense', but dense is 'none'"]),
        ({"catalog": {"root": "x", "filter_columns": {"value": "float"}}},
         ["catalog.filter_columns names value", "is a column of every catalogue"]),
        (MINIMAL | {"quantizer": {"codes_per_level": [65535] * 4}}, ["quantizer: codes_per_level (65535, ", "more than an int64"]),
    ],
)  # fmt: skip
def test_contradictions_name_both_fields(values, words):
    refused(values, *words)


@pytest.mark.parametrize("gpus", [0.5, 1.5])
@pytest.mark.parametrize("section", ["quantizer", "generator"])
def test_workers_that_meet_by_nccl_need_whole_gpus(gpus, section):
    values = MINIMAL | {"cluster": {"gpus_per_worker": gpus}, section: {"workers": 2}}
    with pytest.raises(
        RecipeError, match=rf"cluster.gpus_per_worker {gpus} does not go with {section}.workers 2.*nccl"
    ):
        Recipe.build(values)
    assert Recipe.build(values | {section: {"workers": 1}}).cluster.gpus_per_worker == gpus
    assert Recipe.build(values | {"cluster": {"gpus_per_worker": 2}}).most_workers == 2
    aligned = MINIMAL | {"cluster": {"gpus_per_worker": gpus}, "alignment": {"workers": 2}}
    Recipe.build(aligned)
    with pytest.raises(RecipeError, match="alignment.workers 2"):
        Recipe.build(aligned | {"alignment": {"workers": 2, "enabled": True}})


def test_what_is_near_a_contradiction_is_fine():
    Recipe.build({"catalog": {"synthetic": {}, "max_category_depth": 2}, "quantizer": {"codes_per_level": [64] * 3}})
    Recipe.build(
        MINIMAL | {"quantizer": {"workers": 4}, "generator": {"precision": "bf16", "level_weights": [2, 1, 1, 0.5]}}
    )
    Recipe.build(MINIMAL | {"generator": {"model": "some/t5", "width": 100, "heads": 3}})
    Recipe.build({"catalog": {"root": "s3://bucket/catalogue", "synthetic": None}})


def test_a_generator_without_stages_has_one_and_kinds_are_those_of_any_stage():
    flat = Recipe.build(MINIMAL | {"generator": {"epochs": 7, "mix": {"title": 2}}}).generator
    assert [(stage.name, stage.mix, stage.epochs) for stage in flat.plan] == [("train", {"title": 2.0}, 7)]
    assert flat.kinds == ("query", "title")
    stages = [
        {"name": "titles", "mix": {"span": 1}},
        {"name": "users", "mix": {"user": 1, "title": 0}, "learning_rate": 4e-5},
    ]
    recipe = Recipe.build(MINIMAL | {"generator": {"stages": stages, "relevance_weights": {2: 0.5, 3: 1}}})
    assert recipe.generator.kinds == ("query", "span", "user")
    assert [stage.learning_rate for stage in recipe.generator.plan] == [None, 4e-5]
    assert Recipe.build(yaml.safe_load(recipe.to_yaml())) == recipe


def test_what_is_served_is_as_wide_as_what_is_evaluated_unless_told():
    assert Recipe.build(MINIMAL | {"evaluation": {"beam_width": 7}}).beam_width == 7
    assert Recipe.build(MINIMAL | {"serving": {"beam_width": [2, 3, 4, 5]}}).beam_width == (2, 3, 4, 5)


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe.build(MINIMAL).quantizer.epochs = 3


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3\ncatalog:\n  synthetic: {products: 80}\n")
    return path


@pytest.mark.parametrize(
    "override, found",
    [
        ("seed=5", lambda r: r.seed == 5),
        ("quantizer.learning_rate=1e-4", lambda r: r.quantizer.learning_rate == 1e-4),
        ("quantizer.hierarchical=1.5e-05", lambda r: r.quantizer.hierarchical == 1.5e-5),
        ("quantizer.codes_per_level=[8, 8, 8, 8]", lambda r: r.quantizer.codes_per_level == (8,) * 4),
        ("catalog.synthetic.seed=11", lambda r: r.catalog.synthetic.seed == 11 and r.catalog.synthetic.products == 80),
        ("catalog.synthetic={queries: 30}", lambda r: r.catalog.synthetic.queries == 30 and r.catalog.synthetic.products == 6000),
        ("quantizer.latent_radius=null", lambda r: r.quantizer.latent_radius is None),
        ("store=s3://bucket/a=b", lambda r: r.store == "s3://bucket/a=b"),
        (" embedding.encoder = folder/of model", lambda r: r.embedding.encoder == "folder/of model"),
        ("embedding.text=[title]", lambda r: r.embedding.text == ("title",)),
    ],
)  # fmt: skip
def test_overrides(recipe_file, override, found):
    recipe = Recipe.load(recipe_file, [override])
    assert found(recipe) and (recipe.seed == 3 or override.startswith("seed"))


def test_later_overrides_win_and_may_change_the_source(recipe_file):
    recipe = Recipe.load(recipe_file, ["catalog.synthetic=null", "catalog.root=a", "catalog.root=b"])
    assert recipe.catalog.root == "b" and recipe.catalog.synthetic is None


@pytest.mark.parametrize("override", ["seed", "=3", "", ".seed=1", "quantizer..epochs=3", "quantizer.=3"])
def test_malformed_overrides_show_the_form(recipe_file, override):
    with pytest.raises(RecipeError, match="is not of the form a.b=value, such as quantizer.epochs=50") as caught:
        Recipe.load(recipe_file, [override])
    assert repr(override) in str(caught.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("quantizer.epochs=[1", r"--set 'quantizer.epochs=\[1': the value is not YAML"),
        ("quantizer.epoch=1", "quantizer.epoch: .*unknown key"),
        ("quantizer.epochs.x=1", "quantizer.epochs: "),
        ("quantizer.epochs=", "quantizer.epochs: .*found None"),
        ("catalog.root=here", "set exactly one of catalog.root"),
    ],
)
def test_overrides_are_checked_like_the_recipe(recipe_file, override, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe_file, [override])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a: [1", "is not YAML"),
        (b"- 1\n", "must be a mapping of recipe fields, found list"),
        (b"", "must be a mapping of recipe fields, found NoneType"),
        (b"name: \xff\n", "is not YAML"),
        (b"1: 2\n", "the recipe is not valid"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(tmp_path / "r.yaml")


def test_a_recipe_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*gone\.yaml: No such file"):
        Recipe.load(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe .*: Is a directory"):
        Recipe.load(tmp_path)


def test_the_schema_is_valid_and_describes_what_is_accepted():
    document = json.loads(schema())
    Draft202012Validator.check_schema(document)
    validator = Draft202012Validator(document)
    assert validator.is_valid(json.loads(Recipe.build(MINIMAL).model_dump_json()))
    assert not validator.is_valid(MINIMAL | {"sed": 1}) and not validator.is_valid(MINIMAL | {"seed": -1})
    temperature = document["$defs"]["QuantizerRecipe"]["properties"]["temperature"]
    assert (
        temperature["unit"] == "cosine" and temperature["paper"] == NOT_STATED and temperature["exclusiveMinimum"] == 0
    )


def test_a_setting_that_came_later_leaves_the_keys_of_before_alone():
    known = set(json.loads(DATA.joinpath("settings_in_keys.json").read_text()))
    sections = {name.split(".")[0] for name in known}  # a new section is in keys of its own stages alone
    identity = Recipe.build(MINIMAL).identity()
    names = {f"{section}.{name}" for section in sections for name in identity[section]}
    assert names == known, (
        "a setting that enters every key makes an upgrade remake every catalogue: give it later=True and the default that "
        "means what was done before; or raise the stage's version, and write the file anew"
    )
    later: dict = {"hierarchical_over": "batch", "scale_distance": "plain", "category_from": "clusters",
                   "category_confidence": {"sure": 0.5}}  # fmt: skip
    plain = Recipe.build(MINIMAL).quantizer
    assert plain.identity() == {name: value for name, value in plain.decided().items() if name not in later}
    values = MINIMAL | {"quantizer": later, "catalog": MINIMAL["catalog"] | {"filter_columns": {"sure": "float"}}}
    changed = Recipe.build(values).quantizer
    assert changed.identity() == plain.identity() | later == changed.decided()


def test_identity_leaves_out_what_cannot_change_the_result():
    full = MINIMAL | {"serving": {"expansion": {}}}
    recipe = Recipe.build(full)
    identity = recipe.identity()
    operational = [path for path, (field, _) in FIELDS.items() if field.json_schema_extra.get("operational")]
    assert {"store", "name", "cluster", "catalog.root", "embedding.workers", "ids.workers"} <= set(operational)
    for path in FIELDS:
        node, inside = identity, not any(path == name or path.startswith(f"{name}.") for name in operational)
        for key in path.split("."):
            if isinstance(node, list):  # sections in a list, such as stages, are there when the recipe names some
                break
            node = node.get(key, "absent") if isinstance(node, dict) else "absent"
        assert (node != "absent") == (inside and not FIELDS[path][0].json_schema_extra.get("later")), path
    elsewhere = Recipe.build(
        full
        | {
            "store": "s3://b",
            "name": "n",
            "ids": {"workers": 9},
            "cluster": {"logical_cpus": 8},
            "sample_queries": ["q"],
        }
    )
    assert elsewhere.identity() == identity and json.loads(json.dumps(identity)) == identity
    assert Recipe.build(full | {"seed": 1}).identity() != identity
    assert Recipe.build(full | {"quantizer": {"workers": 2}}).identity() != identity


def test_yaml_and_back():
    recipe = Recipe.build(MINIMAL | {"quantizer": {"learning_rate": 1e-5}, "name": "Schraubenschlüssel"})
    assert Recipe.build(yaml.safe_load(recipe.to_yaml())) == recipe and "Schraubenschlüssel" in recipe.to_yaml()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_loads(path):
    source = yaml.safe_load(path.read_text(encoding="utf-8"))["catalog"]
    needs_root = "synthetic" not in source and "root" not in source
    recipe = Recipe.load(path, ["catalog.root=elsewhere"] if needs_root else [])
    assert recipe.catalog.max_category_depth < recipe.quantizer.space.levels
    if needs_root:
        with pytest.raises(RecipeError, match="catalog.root"):
            Recipe.load(path)


@pytest.mark.parametrize("locale, codes", [("us", 512), ("es", 256), ("jp", 512)])
def test_the_esci_recipes_are_as_the_paper_prints_them(locale, codes):
    recipe = Recipe.load(RECIPES[0].with_name(f"esci_{locale}.yaml"), ["catalog.root=elsewhere"])
    quantizer = recipe.quantizer
    assert (quantizer.dispersion, quantizer.hierarchical, quantizer.cluster_scale) == (0.1, 1e-4, 1.0)
    assert quantizer.codes_per_level == (codes,) * 4 and (quantizer.batch, quantizer.epochs) == (4096, 300)
    assert not quantizer.refit and quantizer.revive_every_epochs == 0
    assert (recipe.catalog.min_category_depth, recipe.catalog.max_category_depth) == (3, 3)
    assert recipe.generator.model.endswith("t5-base") and recipe.ids.method == "sinkhorn"
    for section in (recipe.generator, recipe.evaluation):
        assert [label for label, gain in GAINS.items() if gain >= section.min_relevance] == ["E", "S"]


def test_the_recipes_that_the_readme_runs_are_there():
    assert {"quickstart", "home_depot"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "encoder_decoder"}, "model encoder_decoder needs encoder, an id or folder"),
        ({"model": "causal"}, "model causal needs causal, an id or folder"),
        ({"encoder": "e"}, "encoder 'e' is set, but model is 'small': set model to encoder_decoder"),
        ({"encoder_mode": "tuned"}, "encoder_mode tuned belongs to model encoder_decoder, found model 'small'"),
        ({"model": "causal", "causal": "c", "head": "pawa"}, "head pawa needs a T5 or an encoder_decoder"),
        (
            {"head": "experts", "model": "encoder_decoder", "encoder": "e", "consistency": 0.1},
            "head experts teaches decoder and perceptron by themselves",
        ),
        (
            {"head": "dense"},
            "head dense compares codewords with the text encoder.s vectors of queries, found model .small.",
        ),
        ({"model": "t5-base", "decoder_layers": 3}, "decoder_layers 3 is set, but model 't5-base' brings its own"),
        ({"consistency": 0.1, "dropout": 0}, "consistency 0.1 compares passes under unlike dropout, but dropout is 0"),
        ({"smoothing": "near"}, "smoothing near spreads the mass label_smoothing, which is 0"),
        (
            {"model": "encoder_decoder", "encoder": "e", "mix": {"query": 1, "user": 1}},
            "user_recent 3 puts ID tokens before a query, which the text encoder",
        ),
    ],
)
def test_generators_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GeneratorRecipe(**settings)


def test_a_generators_kind_and_source_follow_from_its_model():
    found = [
        GeneratorRecipe(**settings)
        for settings in (
            {},
            {"model": "t5-base"},
            {"model": "encoder_decoder", "encoder": "e"},
            {"model": "causal", "causal": "c"},
        )
    ]
    assert [(recipe.kind, recipe.pretrained) for recipe in found] == [
        ("small", None), ("t5", "t5-base"), ("encoder_decoder", "e"), ("causal", "c"),
    ]  # fmt: skip
    assert [GeneratorRecipe(head=head, dropout=d).passes_weight for head, d in (("plain", 0.1), ("pawa", 0.1), ("pawa", 0))] == [
        0.0, 0.15, 0.0,
    ]  # fmt: skip


STORED = Recipe.build(
    {"catalog": {"root": "/then", "rows_per_part": 60, "filter_columns": {"price": "float"}, "workers": 7},
     "quantizer": {"kind": "tiger", "epochs": 5, "reconstruction": 0.5}, "embedding": {"width": 16}}
).model_dump(mode="json")  # fmt: skip


def test_what_a_recipe_leaves_out_is_taken_from_a_stored_one():
    today = Recipe.build({"catalog": {"root": "/now"}, "quantizer": {"batch": 64}})
    sections = {name: STORED for name in ("catalog", "quantizer", "embedding")}
    continued = today.continued(sections)
    assert continued.catalog.root == "/now" and continued.catalog.rows_per_part == 60
    assert continued.catalog.filter_columns == {"price": "float"}
    assert continued.catalog.workers == Recipe.build({"catalog": {"root": "/now"}}).catalog.workers, (
        "a machine's setting"
    )
    assert continued.quantizer.kind == "tiger" and continued.quantizer.reconstruction == 0.5
    assert continued.quantizer.epochs == 5 and continued.quantizer.batch == 64 and continued.embedding.width == 16
    assert continued.generator == today.generator, "no section was given to take it from"


def test_an_append_runs_on_another_number_of_training_workers():
    """It trains nothing, so 250 rows need not divide by 3."""
    stored = Recipe.build({"catalog": {"root": "/r"}, "quantizer": {"batch": 250, "workers": 2}}).model_dump(
        mode="json"
    )
    today = Recipe.build({"catalog": {"root": "/r"}, "quantizer": {"workers": 3}})
    assert today.continued({"quantizer": stored}).quantizer.batch == 250


DENSE = {"embedding": {"encoder": "e"}, "generator": {"model": "encoder_decoder", "encoder": "e", "head": "dense"}}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"embedding": {"encoder": "f"}}, "generator.head dense compares codewords of embedding.encoder 'f'"),
        ({"quantizer": {"encoder": "mlp"}}, "needs codewords in the space of embedding.encoder"),
        ({"quantizer": {"latent": 64}}, "needs codewords in the space of embedding.encoder"),
        ({"quantizer": {"kind": "cat_id2_paper"}}, "needs codewords in the space of embedding.encoder"),
        ({"serving": {"normalize": "vocabulary"}}, "serving.normalize is 'vocabulary'"),
    ],
)
@pytest.mark.parametrize("head", ["dense", "experts"])
def test_a_head_that_could_not_be_trained_or_searched_is_refused(change, words, head):
    base = {"catalog": {"root": "/r"}, **DENSE, "generator": DENSE["generator"] | {"head": head}}
    assert Recipe.build(base).generator.head == head
    assert Recipe.build(base | {"quantizer": {"kind": "rq_kmeans"}}).generator.head == head
    with pytest.raises(RecipeError, match=words.replace("dense", head)):
        Recipe.build(base | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generator": {"loss": "trie"}}, "loss trie does not go with serving.normalize level"),
        ({"serving": {"normalize": "trie"}}, "loss level does not go with serving.normalize trie"),
        ({"generator": {"loss": "trie"}, "serving": {"normalize": "vocabulary"}}, "serving.normalize vocabulary"),
        ({"generator": {"loss": "trie", "label_smoothing": 0.1}, "serving": {"normalize": "trie"}}, "codes that loss trie"),
        ({"generator": {"loss": "trie"}, "serving": {"normalize": "trie"}, "alignment": {"enabled": True}}, "alignment compares"),
    ],
)  # fmt: skip
def test_what_is_searched_is_what_was_taught(change, words):
    pair = {"generator": {"loss": "trie"}, "serving": {"normalize": "trie"}}
    assert Recipe.build(MINIMAL | pair).generator.loss == "trie"
    with pytest.raises(RecipeError, match=words):
        Recipe.build(MINIMAL | change)


def test_what_a_recipe_gives_stays_also_where_it_is_the_default():
    today = Recipe.build({"catalog": {"root": "/now"}, "quantizer": {"kind": "cat_id2", "epochs": 300}})
    continued = today.continued({"quantizer": STORED})
    assert continued.quantizer.kind == "cat_id2" and continued.quantizer.epochs == 300


def test_a_stored_recipe_means_what_it_meant(monkeypatch):
    from catid2_ray.config import older

    monkeypatch.setattr(older, "MEANT", {"quantizer.epochs": 3, "ids.id_quarantine": 1})
    monkeypatch.setattr(older, "GONE", frozenset({"quantizer.forgotten"}))
    values = {"catalog": {"root": "/then"}, "quantizer": {"forgotten": 1}, "ids": {"id_quarantine": 4}}
    recipe = Recipe.stored(values)
    assert recipe.quantizer.epochs == 3, "it came later, and this is what was done before"
    assert recipe.ids.id_quarantine == 4 and values["quantizer"] == {"forgotten": 1}


def test_every_setting_that_came_after_the_stored_release_says_what_was_done_before():
    """A new setting either has a default that changes nothing (`later`, or named here), or a line in config/older.py."""
    from catid2_ray.config.older import GONE, MEANT

    harmless = {
        "evaluation.min_to_release",
        "serving.lookahead",
        "cluster.data_pool",
        "cluster.training_pool",
        "ids.turn_rows",
    }
    harmless |= {"evaluation.canary_recall", "evaluation.canary_empty", "evaluation.canary_slower"}
    harmless |= {path for path, (field, _) in FIELDS.items() if field.json_schema_extra.get("later")}
    stored = json.loads((Path(__file__).parents[1] / "data" / "recipe_format_6.json").read_text())
    today = Recipe.build({"catalog": {"root": "/now"}}).model_dump(mode="json")
    for name, values in today.items():
        if isinstance(values, dict) and name in stored:  # a new section says nothing of what a stored recipe made
            came = {f"{name}.{field}" for field in values.keys() - stored[name].keys()}
            assert came <= MEANT.keys() | harmless
            assert {f"{name}.{field}" for field in stored[name].keys() - values.keys()} <= GONE


def test_an_evaluation_may_be_left_out_and_a_leak_allowed_without_another_catalogue():
    recipe = Recipe.build(MINIMAL | {"evaluation": {"methods": []}})
    assert recipe.evaluation.methods == ()
    with_leak = Recipe.build({"catalog": {"synthetic": {}, "allow_leak": True}})
    assert with_leak.catalog.identity() == recipe.catalog.identity()
    refused({"catalog": {"synthetic": {}, "category_separator": ""}}, "category_separator")
