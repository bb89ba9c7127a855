from __future__ import annotations

import json

import pytest
import torch

from regard.contract import Unsupported
from regard.models import (
    Encoder,
    EncoderConfig,
    FunnelEncoder,
    FunnelEncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    from_pretrained,
    save_pretrained,
)
from regard.models import pretrained as module

MODELS = {
    "mixed": lambda: LanguageModel(
        LanguageModelConfig(7, dim=8, num_heads=2, plan=["linear", ("softmax", {"feed_forward": 5})])
    ),
    "tied": lambda: LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, num_layers=1, tie_embeddings=True)),
    "encoder": lambda: Encoder(
        EncoderConfig(3, vocab_size=7, dim=8, num_heads=2, num_layers=1, positions="learned", max_length=6)
    ),
    "pooled": lambda: Encoder(
        EncoderConfig(
            3,
            vocab_size=7,
            dim=8,
            num_heads=2,
            num_layers=1,
            pool="structured",
            pool_options={"slots": 3, "hidden": 5, "diversity": True},
        )
    ),
    "funnel": lambda: FunnelEncoder(
        FunnelEncoderConfig(
            3,
            vocab_size=7,
            dim=8,
            num_heads=2,
            plan=["linear"],
            funnel={"blocks": 1, "pool": "max", "feed_forward": 5},
            decoder_plan=[("softmax", {"feed_forward": 5})],
        )
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_model_comes_back_bit_for_bit(model, dtype, tmp_path):
    model.to(dtype).eval()
    save_pretrained(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    before = torch.random.get_rng_state()
    loaded = from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    ids = torch.randint(7, (2, 5))
    assert torch.equal(loaded(ids).output, model(ids).output)
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in model.parameters()]


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    model = LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, plan=["softmax"] * 2))
    model.blocks[1].feed_forward = model.blocks[0].feed_forward
    names = module.distinct_tensors(model).keys()
    assert not any(name.startswith("blocks.1.feed_forward.") for name in names)


def test_a_save_interrupted_between_its_files_is_noticed(tmp_path, monkeypatch):
    save_pretrained(LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, plan=["softmax"])), tmp_path)
    write = module.write_atomically

    def stop_at_config(path, function):
        if path.name == "config.json":
            raise KeyboardInterrupt
        write(path, function)

    monkeypatch.setattr(module, "write_atomically", stop_at_config)
    other = LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, plan=["linear"]))
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(other, tmp_path)
    with pytest.raises(Unsupported, match="different saves"):
        from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(Unsupported, match=r"file, which cannot be written \(disk full\)"):
        module.write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with target.open() as reader:
        module.write_atomically(target, lambda path: path.write_text("new"))
        assert (reader.read(), target.read_text()) == ("old", "new")


def _edit(folder, change):
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))
    tensors, metadata = module.read_tensors(folder / "model.safetensors")
    module.save_file(tensors, folder / "model.safetensors", metadata=metadata | {"record": json.dumps(record)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(model="Languagemodel"), "try LanguageModel"),
        (lambda record: record["config"].update(dims=3), "try dim"),
        (lambda record: record["config"].update(vocab_size=8), "embedding.weight"),
        (lambda record: record["config"].update(tie_embeddings=False), "without head.weight"),
        (lambda record: record.pop("regard"), "other contents"),
        (lambda record: record.update(config=[1]), "other contents"),
        (lambda record: record.update(model=["LanguageModel"]), "other contents"),
        (lambda record: record["config"].pop("vocab_size"), "values make no LanguageModel .*vocab_size"),
        (lambda record: record["config"].update(dim="8"), "values make no LanguageModel"),
        (lambda record: record["config"].update(plan=3), "values make no LanguageModel"),
        (lambda record: record["config"].update(positions="learned", max_length=2**60), "values make no LanguageModel"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, words, tmp_path):
    config = LanguageModelConfig(7, dim=8, num_heads=2, plan=["softmax"], tie_embeddings=True)
    save_pretrained(LanguageModel(config), tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(Unsupported, match=words):
        from_pretrained(tmp_path)


def test_files_that_are_missing_or_broken_are_refused(tmp_path):
    with pytest.raises(Unsupported, match=r"without config\.json"):
        from_pretrained(tmp_path)
    save_pretrained(LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, plan=["softmax"])), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(Unsupported, match="a safetensors file"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Unsupported, match="not JSON"):
        from_pretrained(tmp_path)


def test_other_modules_and_options_beyond_json_are_refused(tmp_path):
    with pytest.raises(Unsupported, match="Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    model = LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, plan=["softmax"], loss_weights={"a": object()}))
    with pytest.raises(Unsupported, match="JSON"):
        save_pretrained(model, tmp_path)
