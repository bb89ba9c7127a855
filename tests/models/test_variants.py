import json

import pytest
from model_checks import small

from regard import Unsupported, create_layer, get_mechanism
from regard.catalogue import unregister
from regard.contract import read_options, written_options
from regard.models.variants import known_name, read_variant, read_variants, written_layers
from regard.workbench.verification.verify import verify


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("softmax", [("softmax", {})]),
        ("gla", [("gated_linear", {})]),
        ("local:window=32", [("local", {"window": 32})]),
        ("local:form=block,block=64", [("local", {"form": "block", "block": 64})]),
        ("softmax:output_norm=null,positions=none", [("softmax", {"output_norm": None, "positions": "none"})]),
        ("gated_linear*2+softmax", [("gated_linear", {}), ("gated_linear", {}), ("softmax", {})]),
        ("local:window=8*2 + softmax", [("local", {"window": 8}), ("local", {"window": 8}), ("softmax", {})]),
        ("softmax*3", [("softmax", {})] * 3),
    ],
)
def test_a_variant_is_read_and_written_alike(text, layers):
    found = read_variant(text)
    assert list(found.layers) == layers
    assert read_variant(found.name).layers == found.layers


def test_an_option_after_a_comma_belongs_to_the_name_before_it():
    found = read_variants("softmax, local:form=block,block=64, lookback=2, gated_linear+softmax, linear")
    names = ["softmax", "local:form=block,block=64,lookback=2", "gated_linear+softmax", "linear"]
    assert [variant.name for variant in found] == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("softmx", "softmax"),
        ("local:windw=3", "window"),
        ("local:window", "window=1"),
        ("local:window=-3", "window"),
        ("gated_linear*0+softmax", "gated_linear"),
        ("+softmax", "softmax"),
        ("nothing_there.toml", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_nearest(text, words):
    with pytest.raises(Unsupported, match=words):
        read_variant(text)


def test_files_say_the_same_as_words(tmp_path):
    toml, js = tmp_path / "far.toml", tmp_path / "near.json"
    toml.write_text('layers = ["local:window=8*2", {mechanism = "softmax", options = {positions = "none"}}]')
    js.write_text(json.dumps({"name": "called so", "mechanism": "local", "options": {"window": 8}}))
    assert read_variant(str(toml)).layers == read_variant("local:window=8*2+softmax:positions=none").layers
    assert read_variant(str(toml)).name == "far"
    assert read_variant(str(js)).name == "called so" and read_variant(str(js)).options == {"window": 8}
    for bad in (
        "{}",
        '{"layers": []}',
        '{"mechanism": "softmax", "layers": ["softmax"]}',
        '{"layers": [3]}',
        "not json",
    ):
        js.write_text(bad)
        with pytest.raises(Unsupported, match=r"near\.json"):
            read_variant(str(js))


def test_a_pattern_fills_a_model_as_often_as_it_divides_its_layers():
    config = small("language model", plan="local:window=4+softmax", num_layers=4)
    assert [name for name, _ in config.plan] == ["local", "softmax"] * 2
    assert len(small("language model", plan=["linear*2", "softmax"]).plan) == 3
    with pytest.raises(Unsupported, match="multiple of 2 layers"):
        small("language model", plan="local:window=4+softmax", num_layers=3)


def test_a_variant_is_a_mechanism_wherever_one_is_named():
    name = known_name("local:window=3,output_norm=rms")
    assert known_name(name) == name and known_name("gla") == "gated_linear"
    card = get_mechanism(name)
    try:
        assert card.config().window == 3 and card.name == name
        assert create_layer(name, 8, 2).output_norm is not None
        cells = verify([name], patterns=["causal-self"], properties=["reference", "padding", "layer_decoding"])
        assert cells and all(cell.status == "pass" and cell.mechanism == name for cell in cells)
    finally:
        unregister(name)
    assert known_name("gated_delta_rule") == "delta_rule:gated=true"
    unregister("delta_rule:gated=true")
    for refused, words in (("linear+softmax", "hybrid"), ("local:feed_forward=8", "feed_forward")):
        with pytest.raises(Unsupported, match=words):
            known_name(refused)


def test_layers_are_written_as_they_are_read():
    layers = read_variant(
        "local:window=4,feed_forward=8*2+softmax:feed_forward=16+local:window=4,feed_forward=8"
    ).layers
    assert read_variant(written_layers(layers)).layers == layers
    assert written_layers(layers[:2]) == "local:window=4,feed_forward=8*2"


def test_a_file_names_the_layers_within_an_encoder_decoder(tmp_path):
    file = tmp_path / "both.json"
    file.write_text(json.dumps({"layers": ["linear*2"], "encoder": ["softmax:feed_forward=8*3"], "decoder": ["local"]}))
    found = read_variant(str(file))
    assert [len(found.layers), len(found.encoder), len(found.decoder)] == [2, 3, 1]
    assert not found.sized
    assert found.record()["encoder"] == [["softmax", {"feed_forward": 8}]] * 3
    assert set(read_variant("softmax").record()) == {"layers"}
    assert read_variant("softmax:feed_forward=8+linear:feed_forward=4").sized
    file.write_text(json.dumps({"layers": ["linear"], "encoder": []}))
    with pytest.raises(Unsupported, match="encoder"):
        read_variant(str(file))


def test_a_file_names_the_width_of_an_encoder_and_which_of_its_layers_are_read(tmp_path):
    file = tmp_path / "both.json"
    file.write_text(json.dumps({"layers": ["softmax:memory_layers=2"], "encoder": ["linear*2"], "encoder_dim": 48}))
    found = read_variant(str(file))
    assert (found.encoder_dim, found.layers[0][1]) == (48, {"memory_layers": 2})
    assert found.record()["encoder_dim"] == 48 and "encoder_dim" not in read_variant("softmax").record()
    for wrong in (0, "48", True, 1.5):
        file.write_text(json.dumps({"layers": ["linear"], "encoder_dim": wrong}))
        with pytest.raises(Unsupported, match="positive whole number"):
            read_variant(str(file))


@pytest.mark.parametrize(
    ("text", "value"),
    [(".7", 0.7), ("-.5", -0.5), ("7.", 7.0), (".5e-3", 5e-4), ("-1.e2", -100.0), ("[.7,.5]", [0.7, 0.5]), ("3", 3)]
    + [(name, name) for name in (".", "..", "./x", "x.7", "1.2.0", ".5.", "v1.", "photos.")],
)
def test_numbers_may_begin_or_end_with_the_point_and_names_stay_names(text: str, value: object) -> None:
    found = read_options(f"a={text}", "n")["a"]
    assert found == value and type(found) is type(value)


def test_lists_of_lists_are_one_value() -> None:
    found = read_options('strides=[1,[1,2,2],2],mixer={"sizes": [1, 2], "k": 3},n=4', "unet_nano_3d")
    assert found == {"strides": [1, [1, 2, 2], 2], "mixer": {"sizes": [1, 2], "k": 3}, "n": 4}


def test_options_are_read_as_they_were_written() -> None:
    """Also words that would be read as something else, commas, and lists of both."""
    options = {
        "none": None,
        "flag": False,
        "number": 0.1 + 0.2,
        "word": "a/b c.txt",
        "said": ["None", "2", ".5", "", " x", "a,b", 'a"b', "[a", "x=y", "ü"],
        "list": [8, 12.5, "a,b", None, ["[a", 1]],
        "table": {"a": 1, "b": "c"},
    }
    options |= {f"said {i}": word for i, word in enumerate(options.pop("said"))}
    written = written_options("name", options)
    assert written.startswith("name:none=null,flag=false,")
    found = read_options(written.removeprefix("name:"), "name")
    assert found == options and list(map(type, found.values())) == list(map(type, options.values()))
    assert written_options("name", {}) == "name"
