from __future__ import annotations

import json

import pytest
import torch
from model_checks import check_comes_back_from_disk, made, read_by

from regard.contract import Unsupported
from regard.models import from_pretrained, save_pretrained
from regard.models import pretrained as module

NARROW = [("softmax", {"feed_forward": 5})]
WORDS = {"features": None, "vocab_size": 7}
MODELS = [
    ("language model", {"plan": ["linear", *NARROW]}),
    ("language model", {"num_layers": 1, "tie_embeddings": True}),
    ("encoder", {"num_layers": 1, "positions": "learned", "max_length": 6, **WORDS}),
    ("encoder", {"num_layers": 1, "pool": "structured", "pool_options": {"slots": 3, "hidden": 5, "diversity": True}}),
    ("encoder-decoder", {"cross_plan": ["linear", *NARROW], "encoder_layers": 1}),
    ("forecaster", {"cross_plan": ["linear"], "patch": 3, "quantiles": (0.1, 0.9), "encoder_layers": 1}),
    ("funnel encoder", {"funnel": {"blocks": 1, "pool": "max", "feed_forward": 5}, "decoder_plan": NARROW, **WORDS}),
]


@pytest.mark.parametrize(("kind", "options"), MODELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_model_comes_back_bit_for_bit(kind, options, dtype, tmp_path):
    model = made(kind, **options).to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in read_by(model.config)]
    before = torch.random.get_rng_state()
    check_comes_back_from_disk(model, inputs, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1  # whoever may read one may read the other


def language_model(plan="softmax", **options):
    return made("language model", plan=[plan], **options)


def test_modules_in_two_places_are_stored_once():
    model = made("language model", num_layers=2)
    model.blocks[1].feed_forward = model.blocks[0].feed_forward
    names = module.distinct_tensors(model).keys()
    assert not any(name.startswith("blocks.1.feed_forward.") for name in names)


def test_a_save_interrupted_between_its_files_is_noticed(tmp_path, monkeypatch):
    save_pretrained(language_model(), tmp_path)

    def stop(path, text):
        assert path.name == "config.json"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_text_atomically", stop)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(language_model("linear"), tmp_path)
    with pytest.raises(Unsupported, match="different saves"):
        from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_a_reader_of_it_is_not_disturbed(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(Unsupported, match=r"file, which cannot be written \(disk full\)"):
        module.write_atomically(target, fail)
    assert list(tmp_path.iterdir()) == [target]
    with target.open() as reader:
        module.write_atomically(target, lambda path: path.write_text("new"))
        assert (reader.read(), target.read_text()) == ("old", "new")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(model="Languagemodel"), "try LanguageModel"),
        (lambda record: record["config"].update(dims=3), "try dim"),
        (lambda record: record["config"].update(vocab_size=12), "embedding.weight"),
        (lambda record: record["config"].update(tie_embeddings=False), "without head.weight"),
        (lambda record: record.pop("regard"), "other contents"),
        (lambda record: record.update(config=[1]), "other contents"),
        (lambda record: record.update(model=["LanguageModel"]), "other contents"),
        (lambda record: record["config"].pop("vocab_size"), "values do not make a valid LanguageModel .*vocab_size"),
        (lambda record: record["config"].update(dim="8"), "dim='8' of a LanguageModelConfig; supported: int"),
        (lambda record: record["config"].update(plan=3), "plan=3"),
        (
            lambda record: record["config"].update(positions="learned", max_length=2**60),
            "values do not make a valid LanguageModel",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, words, tmp_path):
    save_pretrained(language_model(tie_embeddings=True), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    change(record)
    (tmp_path / "config.json").write_text(json.dumps(record))
    tensors, metadata = module.read_tensors(tmp_path / "model.safetensors")
    module.save_file(tensors, tmp_path / "model.safetensors", metadata=metadata | {"record": json.dumps(record)})
    with pytest.raises(Unsupported, match=words):
        from_pretrained(tmp_path)


def test_files_that_are_missing_or_broken_are_refused(tmp_path):
    with pytest.raises(Unsupported, match=r"without config\.json"):
        from_pretrained(tmp_path)
    save_pretrained(language_model(), tmp_path)
    for name, text, message in (
        ("model.safetensors", "not tensors", "a safetensors file"),
        ("config.json", "{", "not JSON"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(Unsupported, match=message):
            from_pretrained(tmp_path)


def test_other_modules_and_options_beyond_json_are_refused(tmp_path):
    with pytest.raises(Unsupported, match="Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(Unsupported, match="JSON"):
        save_pretrained(language_model(loss_weights={"a": object()}), tmp_path)
