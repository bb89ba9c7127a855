"""Retrofits of models with random weights: stages learn, a kill changes nothing, and the result can be loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from contextlib import suppress

import pytest
import torch
from kills import Killed, undisturbed_and_killed
from small_llama import SIZES, WORK, llama, tokens

import regard
from regard import Unsupported
from regard.integrations.transformers import CACHE, AutoModelForCausalLM
from regard.layers.linear import Linear
from regard.measurement.budget import Budget
from regard.models import from_pretrained, from_transformers, masformer_plan
from regard.retrofit import hosts, pace
from regard.retrofit.best import Best
from regard.retrofit.corpus import Corpus, even_blocks, read_corpus
from regard.retrofit.folder import Folder
from regard.retrofit.measures.language import perplexity, state_bytes, token_losses
from regard.retrofit.run import planned, read_settings
from regard.retrofit.sensitivity import choose
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Stage
from regard.retrofit.transfer import begin_at_scale, held_out_losses, transfer, transfer_losses
from regard.workbench.reports.retrofit_report import render_retrofit
from regard.workbench.retrofits import rows


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished retrofit, the model it was made from, and that model's previous weights."""
    model, folder = llama(), tmp_path_factory.mktemp("hybrid")
    before = copy.deepcopy(model.state_dict())
    made = regard.retrofit(
        model,
        "gated_linear",
        keep_layers="auto:0.5",
        data=tokens(),
        validation=tokens(400),
        budget="60 steps",
        output=folder,
        **WORK,
    )
    return made, model, before


def test_the_layers_that_matter_keep_their_attention(done):
    made, _, _ = done
    assert made.record["kept"] == [1, 2]
    assert made.swapped == [0, 3]


def test_needles_and_pairs_are_told_with_their_standard_errors(done):
    made, _, _ = done
    needles, pairs = made.results["needles"]["32"], made.results["pairs"]["32"]
    for its in (needles, pairs["first"], pairs["rank"]):
        assert len(its["original"]) == len(its["retrofit"]) == 2
        assert set(its["standard_error"]) == {"original", "retrofit"}
    page = render_retrofit(made.record)
    for words in ("needles in 32 tokens", "pairs in 32 tokens, right values", "(50% by chance)"):
        assert words in page and words in (made.folder / "README.md").read_text()
    own = pairs["rank"]["mean"]["retrofit"], pairs["rank"]["standard_error"]["retrofit"]
    assert f"{own[0]:.1%} (± {100 * own[1]:.1f})" in page


def as_earlier_versions_measured(found):
    """Results without what this version added."""
    for its in found.values():
        its.pop("standard_errors", None)
        for part in its.get("by_position", []):
            part.pop("standard_errors")
    return found


def test_a_record_of_an_earlier_version_is_shown_without_what_it_lacks(done):
    made, _, _ = done
    record = json.loads((made.folder / "retrofit.json").read_text())
    results = record["results"]
    as_earlier_versions_measured(results["perplexity"])
    del results["needles"], results["pairs"]
    results["recall"] = {"32": {"depths": [0.1, 0.5, 0.9], "original": [1.0, 0.5, 0.0], "retrofit": [0.0, 0.0, 0.0]}}
    page = render_retrofit(record)
    assert "needles in 32 tokens, said" in page and "50.0% (± 28.9)" in page and "pairs in" not in page
    (first, second) = rows({"now": made.record, "before": record})[1:]
    assert {name for name in first if first[name] and not second[name]} == {"pairs in 32"}


def test_a_folder_that_an_earlier_version_began_is_evaluated_in_full(tmp_path):
    settings = {"keep_layers": [0], "data": tokens(), "budget": "28 steps", **WORK}
    model, output = llama(2), tmp_path / "out"

    def kill(progress):
        if progress.doing.startswith("evaluation: perplexity"):
            raise Killed

    with pytest.raises(Killed):
        regard.retrofit(model, "gated_linear", output=output, watch=kill, **settings)
    work = output / ".retrofit"
    plan, measured = (json.loads((work / f"{name}.json").read_text()) for name in ("plan", "evaluation"))
    del plan["probes"]
    (work / "plan.json").write_text(json.dumps(plan))
    before = {**as_earlier_versions_measured(measured), "recall at 32": {"original": [1.0], "retrofit": [1.0]}}
    (work / "evaluation.json").write_text(json.dumps(before))
    done = []
    made = regard.retrofit(model, "gated_linear", output=output, watch=done.append, **settings)
    assert all(progress.done <= progress.total for progress in done)
    assert len(made.results["needles"]["32"]["retrofit"]) == len(made.results["pairs"]["32"]["rank"]["original"]) == 3
    assert "recall" not in made.results and "standard_errors" not in made.results["perplexity"]["the data, held out"]
    assert "pairs in 32 tokens" in render_retrofit(made.record)


def test_every_stage_lowers_its_loss(tmp_path):
    settings = {**WORK, "batch_size": 8, "transfer_rate": 0.01}
    made = regard.retrofit(
        llama(2, loud=(0, 1)),
        "lolcats:window=4",
        keep_layers="none",
        data=tokens(),
        budget="60 steps",
        output=tmp_path / "out",
        **settings,
    )
    losses = made.record["losses"]
    for layer in ("0", "1"):
        curve = [row[layer] for row in losses["transfer"]]
        assert sum(curve[-3:]) < 0.97 * sum(curve[:3])
    assert sum(losses["tune"][-3:]) < 0.85 * sum(losses["tune"][:3])


def test_the_model_that_is_given_stays_as_it_is(done):
    _, model, before = done
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "regard")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_read_as_float32(dtype):
    model, said = llama(2).to(dtype), []
    host = hosts.open_host(model, say=said.append)
    assert {p.dtype for p in model.parameters()} == {dtype} and {p.dtype for p in host.model.parameters()} == {
        torch.float32
    }
    assert len(said) == 1 and f"weights in {dtype}".replace("torch.", "") in said[0]
    assert host.check(hosts.Batch(tokens(32)[None]), "softmax", [0, 1]) < 1e-5
    assert hosts.open_host(llama(2), say=said.append).model.dtype == torch.float32 and len(said) == 1


def test_the_folder_loads_gives_the_same_and_generates(done):
    made, _, _ = done
    loaded = AutoModelForCausalLM.from_pretrained(made.folder)
    ids = tokens(20)[None]
    assert torch.equal(loaded(ids).logits, made.model(ids).logits)
    assert loaded.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 23)


@pytest.mark.parametrize("open_folder", [from_pretrained, from_transformers])
@pytest.mark.parametrize("mechanism", ["local:window=4", "gated_linear", "landmark"])
def test_loaders_of_other_folders_name_the_call_that_loads_it(tmp_path, open_folder, mechanism):
    host = hosts.open_host(llama(2))
    made, _ = host.copy_with([0, 1], mechanism, 0)
    host.with_model(made).save(tmp_path / "out")
    with pytest.raises(Unsupported, match=r"after import regard\.integrations\.transformers$") as refused:
        open_folder(tmp_path / "out")
    call, _, first = refused.value.nearest.partition(" after ")
    ids, names = tokens(20)[None], {"transformers": pytest.importorskip("transformers")}
    exec(first, names)
    loaded = eval(call, names)
    assert torch.equal(loaded(ids).logits, made(ids).logits)


def test_the_folder_says_where_it_comes_from(done):
    made, model, _ = done
    record = json.loads((made.folder / "retrofit.json").read_text())
    assert record == json.loads(json.dumps(made.record))
    assert record["from"]["fingerprint"] == hosts.open_host(model).fingerprint()
    assert record["trained_tokens"] == {"all layers": 9 * 64, "transfer": 15 * 64, "tune": 36 * 64}
    readme = (made.folder / "README.md").read_text()
    assert made.recommendation in readme and "gated_linear in 2 of 4 layers" in readme
    assert not list((made.folder / ".retrofit").glob("*.safetensors"))


def test_a_finished_retrofit_is_given_again_and_another_is_refused(done):
    made, model, _ = done
    with pytest.raises(Unsupported, match=r"holds another retrofit .*mechanism 'gated_linear', now 'delta_rule'"):
        regard.retrofit(model, "delta_rule", data=tokens(), budget="60 steps", output=made.folder, **WORK)
    assert (made.folder / "retrofit.json").is_file()


def test_two_at_once_in_a_folder_are_refused(done):
    fcntl = pytest.importorskip("fcntl")
    made, _, _ = done
    with open(made.folder / ".retrofit" / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Unsupported, match="another process is at work"), folder_of(made).alone():
            pass
    with folder_of(made).alone():
        pass


def folder_of(made):
    return Folder(made.folder, json.loads((made.folder / ".retrofit" / "identity.json").read_text()))


@pytest.mark.parametrize(("mechanism", "train"), [("gated_softmax", "all"), ("gated_linear", "lora:2")])
def test_killed_at_any_stage_and_resumed_it_equals_one_that_was_not(tmp_path, monkeypatch, mechanism, train):
    if train != "all":
        pytest.importorskip("peft")
    model, data = llama(3, loud=(1,)), tokens()
    settings = {"keep_layers": "auto:1", "data": data, "budget": "54 steps", "train": train, **WORK}
    undisturbed_and_killed(monkeypatch, tmp_path, model, mechanism, **settings)


@pytest.mark.parametrize("mechanism", ["selective_temperature", "gated_softmax", "gated_linear"])
def test_first_steps_leave_no_layer_worse_than_it_began(tmp_path, monkeypatch, mechanism):
    judged = {}

    def judge(host, modules, *_):
        judged.update(modules)
        raise Killed

    monkeypatch.setattr("regard.retrofit.run.measure_sensitivity", judge)
    asked, nothing = read_settings(mechanism, "auto:1", "54 steps", WORK), lambda _: None
    (run,) = planned(hosts.open_host(llama(3)), [asked], [tmp_path], data=tokens(), watch=nothing, say=nothing)
    with pytest.raises(Killed):
        run.finish()
    host, settings = run.host, run.settings
    begun = modules(host, [0, 1, 2], settings.mechanism)
    begin_at_scale(host, begun, host.batch(run.data, 0, settings.seed, settings, rows=1).inputs)
    held_out = [part.inputs for part in host.parts(host.held_out(run.data, 4, settings))]
    before, after = (held_out_losses(host, its, held_out) for its in (begun, judged))
    assert all(its <= start for its, start in zip(after, before, strict=True))
    assert mechanism != "gated_linear" or sum(after) < sum(before)


def test_training_the_new_layers_alone_leaves_the_others(tmp_path):
    model = llama(2, loud=())
    made = regard.retrofit(
        model,
        "local:window=4",
        keep_layers=[0],
        data=tokens(),
        budget="30 steps",
        train="new",
        distil=0.5,
        output=tmp_path / "new",
        **WORK,
    )
    before, changed = model.state_dict(), set()
    for name, tensor in made.model.state_dict().items():
        changed |= set() if torch.equal(tensor, before[name]) else {name}
    assert changed and all(name.startswith("model.layers.1.self_attn.") for name in changed)


def gpt2():
    import transformers

    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def test_low_rank_updates_of_gpt2_measured_up_to_its_last_position(tmp_path):
    pytest.importorskip("peft")
    settings = {**WORK, "lengths": (64,), "train": "lora:2", "keep_layers": "0", "distil": 0.0}
    model, data = gpt2(), torch.arange(3000) % 48
    made = regard.retrofit(model, "linear", data=data, budget="30 steps", output=tmp_path / "out", **settings)
    before, after = model.state_dict(), made.model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {f"transformer.h.{n}.mlp.c_fc.weight" for n in (0, 1)} <= changed
    assert not changed & {"transformer.wpe.weight", "transformer.h.0.ln_1.weight"}
    assert made.results["decoding"]["64"]["original"]["held"] == 2 * 2 * 64 * 32 * 4


def mixed_windows(size=16):
    import transformers

    kinds = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": size}
    return transformers.Olmo3ForCausalLM(transformers.Olmo3Config(**SIZES, **kinds)).eval()


@pytest.mark.parametrize(("keep", "told"), [((0, 2), 0), ("auto:0.25", 1)])
def test_layers_with_a_window_that_the_mechanism_lacks_are_kept(tmp_path, keep, told):
    said, settings = [], {**WORK, "data": tokens(), "budget": "60 steps", "output": tmp_path / "out"}
    made = regard.retrofit(mixed_windows(), "gated_linear", keep_layers=keep, say=said.append, **settings)
    assert made.swapped == [1, 3]
    assert sum("cannot replace their attention: layers 0, 2" in sentence for sentence in said) == told


@pytest.mark.parametrize(("size", "said"), [(16, "mask of pairs.*softmax"), (48, r"window of 48.*lengths=\(36,\)")])
def test_the_layers_to_keep_are_named_where_a_window_is_refused(tmp_path, size, said):
    settings = {**WORK, "data": tokens(), "budget": "60 steps", "output": tmp_path / "out"}
    with pytest.raises(Unsupported, match=said + r" or keep_layers=\(0, 2\)"):
        regard.retrofit(mixed_windows(size), "gated_linear", keep_layers="none", **settings)


@pytest.mark.parametrize(("make", "checks"), [(lambda: llama(6), 2), (mixed_windows, 4)])
def test_of_layers_that_are_alike_one_is_tried_where_all_are_refused(tmp_path, monkeypatch, make, checks):
    tried, check = [], hosts.LanguageHost.check
    monkeypatch.setattr(
        hosts.LanguageHost, "check", lambda host, *given: tried.append(given[-1]) or check(host, *given)
    )
    mechanism = "gated_linear" if checks == 4 else "sea:length=32,top_k=2,estimate_length=8"
    settings = {**WORK, "data": tokens(), "budget": "60 steps", "output": tmp_path / "out"}
    with suppress(Unsupported, AssertionError):
        regard.retrofit(make(), mechanism, keep_layers="auto:1", watch=unexpected, **settings)
    assert len(tried) == checks and [len(numbers) for numbers in tried[1:3]] == [1] * min(checks - 1, 2)


def test_a_model_of_any_source_is_trained_with_regards_linear_layers_and_is_not_changed_itself(tmp_path):
    model = llama(2)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        opened = hosts.open_host(source).model
        assert {type(part) for part in opened.modules() if isinstance(part, torch.nn.Linear)} == {Linear}
    assert not any(isinstance(part, Linear) for part in model.modules())


def test_low_rank_updates_without_peft_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    settings = {**WORK, "train": "lora:2", "budget": "60 steps"}
    with pytest.raises(Unsupported, match="without peft"):
        regard.retrofit(llama(2), "linear", data=tokens(), output=tmp_path / "out", watch=unexpected, **settings)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def host():
    return hosts.open_host(llama(3))


def modules(host, numbers, mechanism):
    made, _ = host.copy_with(numbers, mechanism, 0)
    return {number: made.get_submodule(host.layers[number].path) for number in numbers}


def test_no_layer_of_a_transfer_knows_of_another(host):
    ids = tokens(64).view(2, 32)
    both, alone = modules(host, [0, 2], "local:window=4"), modules(host, [2], "local:window=4")
    assert transfer_losses(host, both, ids)[1] == transfer_losses(host, alone, ids)[0]
    for one, other in zip(both[2].parameters(), alone[2].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_transfer_to_softmax_has_nothing_to_learn(host):
    assert max(transfer_losses(host, modules(host, [0, 1, 2], "softmax"), tokens(64).view(2, 32))) < 1e-10


def test_a_transfer_learns_without_the_dropout_of_models_that_keep_it_as_a_number(tmp_path):
    host = hosts.open_host(llama(2, attention_dropout=0.5))
    new = modules(host, [1], "softmax")
    stage, settings = Stage("transfer", "attention transfer", 2, 0.001, 1), RetrofitSettings("softmax", length=32)
    settings = host.begun(settings)
    curve = transfer(
        host, new, [], Corpus(tokens(), tokens(99), None, "", None), settings, stage, Folder(tmp_path, {}), print
    )
    assert max(max(losses) for losses in curve) < 1e-4 and new[1].attention_dropout == 0.5


def test_a_start_that_is_nearly_exact_is_kept_where_a_transfer_makes_it_no_better(host, tmp_path):
    both = {**modules(host, [0], "local:window=64"), **modules(host, [1], "linear")}
    corpus = Corpus(tokens(), tokens(200), None, "drawn", None)
    held_out = [block[None] for block in even_blocks(corpus.held_out, 4, 32)]
    begin_at_scale(host, both, corpus.blocks(0, 0, 1, 32))
    start = copy.deepcopy(both[0].state_dict())
    settings = RetrofitSettings("linear", budget=Budget.parse("20 steps"), length=32, lengths=(32,), batch_size=4)
    work, folder = Stage("transfer", "attention transfer", 20, 0.02, 1), Folder(tmp_path, {})
    for _ in range(2):  # the second time the stage is already finished
        best = Best(list(both.values()), lambda: held_out_losses(host, both, held_out), folder, "transfer")
        transfer(host, both, [], corpus, settings, work, folder, lambda progress: None, best)
        assert all(torch.allclose(x, start[name], rtol=1e-5) for name, x in both[0].state_dict().items())
        (_, before), after = best.looks[0], held_out_losses(host, both, held_out)
        assert before[0] < 1e-10 and after[1] < 0.99 * before[1]
        assert best.steps() == [0, 20]


def test_softmax_is_tried_in_kept_layers_too_since_the_original_is_timed_with_it(host, monkeypatch):
    tried, copy_with = [], type(host).copy_with
    monkeypatch.setattr(
        type(host),
        "copy_with",
        lambda self, numbers, *of: (tried.append((*numbers,)), copy_with(self, numbers, *of))[1],
    )
    host.check(hosts.Batch(tokens(32)[None]), "linear", [1])
    assert tried == [(0, 1, 2), (1,)]


def test_new_layers_begin_at_the_scale_of_the_old_ones(host):
    ids = tokens(64).view(2, 32)
    new = modules(host, [0, 1, 2], "linear:normalize=False")
    raw = transfer_losses(host, new, ids)
    begin_at_scale(host, new, ids)
    assert all(
        after < 1.1 and after < before / 5 for after, before in zip(transfer_losses(host, new, ids), raw, strict=True)
    )


def test_layers_to_keep_are_named_by_their_place_as_in_a_plan_of_masformer():
    for keep in ("bottom:2", "top:3", "middle:2", "spread:4", "bottom:0"):
        plan = masformer_plan(9, keep)
        settings = RetrofitSettings("local", keep)
        assert settings.kept(9) == tuple(layer for layer, (name, _) in enumerate(plan) if name == "softmax")
        assert not settings.chosen and settings.spelled_keep() == keep
        assert settings.changeable(9) == [layer for layer, (name, _) in enumerate(plan) if name == "local"]


def test_the_most_sensitive_layers_are_kept():
    assert choose({0: 0.1, 1: 3.0, 2: float("nan"), 3: -0.1}, 2) == (1, 2)
    assert choose({0: 0.1, 1: 0.1, 2: 0.1}, 1) == (0,)


def test_standard_errors_of_perplexity_are_those_over_blocks(host):
    models = {"original": host.model, "retrofit": hosts.open_host(llama(2)).model}
    blocks = tokens(6 * 64).view(6, 64)
    found = perplexity(models, blocks)
    for name, model in models.items():
        whole, last = (token_losses(model, blocks)[:, a:].mean(1) for a in (0, 32))
        for its, losses in ((found, whole), (found["by_position"][-1], last)):
            error = losses.mean().exp() * losses.std() / 6**0.5
            assert its[name] == pytest.approx(float(losses.mean().exp()))
            assert its["standard_errors"][name] == pytest.approx(float(error))
    assert perplexity(models, blocks[:1])["standard_errors"] == {"original": None, "retrofit": None}


def test_the_same_model_has_the_same_perplexity_at_every_position(host):
    found = perplexity({"original": host.model, "retrofit": host.model}, tokens(4 * 64).view(4, 64))
    assert found["change"] == found["standard_error"] == 0
    assert [(b["first"], b["last"]) for b in found["by_position"]] == [(1, 16), (17, 32), (33, 63)]
    assert all(b["original"] == b["retrofit"] for b in found["by_position"])


def test_a_state_is_that_of_every_layer(host):
    made, _ = host.copy_with([0, 1], "gated_linear", 0)
    cache = 2 * 2 * 8 * 4  # keys and values, two heads, width 8, 4 bytes
    assert state_bytes(host, host.model, 1000) == 3 * 1000 * cache
    assert state_bytes(host, made, 1000) == 1000 * cache + 2 * 4 * 8 * 8 * 4


def bart(_):
    import transformers

    sizes = {"vocab_size": 48, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    return {"model": transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))}


def folder_of_bart(tmp_path):
    bart(tmp_path)["model"].save_pretrained(tmp_path / "bart")
    return {"model": tmp_path / "bart"}


def swapped(_):
    regard.swap(model := llama(2), "gated_linear")
    return {"model": model}


def shared(_):
    model = llama(2)
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return {"model": model}


def quantized(_):
    model = llama(2)
    model.quantization_method = "int4"
    return {"model": model}


def sliding(_):
    import transformers

    config = transformers.MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=8)
    return {"model": transformers.MistralForCausalLM(config)}


def window_of(size):
    import transformers

    config = transformers.MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=size)
    return {"model": transformers.MistralForCausalLM(config)}


def without_state(_):
    import transformers

    class Forgetful(transformers.LlamaForCausalLM):
        def forward(self, *args, **options):
            if options.get(CACHE) is not None:
                raise Unsupported("a cache")
            return super().forward(*args, **options)

    return {"model": Forgetful(llama(2).config)}


def something_else(_):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def odd(module, q, k, v, *args, **options):
        output, weights = sdpa_attention_forward(module, q, 2 * k, v, *args, **options)
        return output, weights

    AttentionInterface.register("odd", odd)
    AttentionMaskInterface.register("odd", sdpa_mask)
    return {"model": llama(2, loud=(0, 1), attn_implementation="odd")}


def full(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    return {}


BAD = {
    "another kind of model": (bart, "an encoder and a decoder.*supported: causal language models"),
    "a folder of another kind of model": (folder_of_bart, "BartForConditionalGeneration in .*, an encoder-decoder"),
    "swapped before": (swapped, "swapped before.*unswap"),
    "shared weights": (shared, "shared weights"),
    "quantized weights": (quantized, "quantized"),
    "a window that the mechanism lacks": (sliding, "mask of pairs"),
    "a window shorter than the evaluation's blocks": (
        lambda _: window_of(48),
        "texts of 64 tokens .* window of 48.*36",
    ),
    "a window shorter than the lengths": (
        lambda _: {**window_of(64), "lengths": (64,)},
        r"texts of 76 tokens .* window of 64.*try lengths=\(52,\)",
    ),
    "a state that does not work": (without_state, "could not generate with it: a cache"),
    "another attention than it says": (something_else, "not softmax of its queries and keys"),
    "a folder with other files": (full, "holds other files"),
    "a missing folder": (lambda _: {"model": "nowhere/at/all"}, "does not exist"),
    "a short text": (lambda _: {"data": tokens(40)}, "8 training tokens, shorter than a block of 32"),
    "unknown tokens": (lambda _: {"data": tokens() + 40}, "token ids up to"),
    "text without a tokenizer": (lambda _: {"data": __file__}, "without a tokenizer"),
    "a small budget": (lambda _: {"budget": "20 steps"}, "3 steps of the first steps of all layers.*try 54 steps"),
    "a short time": (lambda _: {"budget": "0.01s"}, "leaves only"),
    "too many layers at a place": (
        lambda _: {"keep_layers": "bottom:2"},
        "bottom:2' of a model of 2 layers.*leaves no",
    ),
    "an unknown place": (lambda _: {"keep_layers": "left:1"}, "'left:1'.*bottom:NUMBER"),
    "a layer out of range": (lambda _: {"keep_layers": [0, 7]}, "layer 7 of a model of 2 layers"),
    "all layers kept": (lambda _: {"keep_layers": "auto:1.0"}, "leaves no layer"),
    "no number of layers": (lambda _: {"keep_layers": "auto:"}, "auto, auto:SHARE"),
    "a layer of its own": (lambda _: {"mechanism": "mamba2:d_state=16"}, "a layer of its own.*gated_linear:gate=step"),
    "another setting": (lambda _: {"epochs": 3}, "setting 'epochs'"),
    "long lengths": (lambda _: {"lengths": (512,)}, "512,.* of a model of 256 positions.*try lengths"),
    "long blocks": (lambda _: {"length": 512}, "512 tokens for a model of 256 positions"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_will_not_do_is_refused_before_anything_is_trained(tmp_path, what):
    make, message = BAD[what]
    there = {"mechanism": "gated_linear", "data": tokens(), "budget": "60 steps", "output": tmp_path / "out", **WORK}
    given = {"model": llama(2), **there, **make(tmp_path)}
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(Unsupported, match=message):
        regard.retrofit(given.pop("model"), given.pop("mechanism"), **given, watch=unexpected)
    assert sorted(tmp_path.rglob("*")) == files


def unexpected(progress):
    assert progress.doing == "looking at the model"


def test_a_model_of_few_positions_is_measured_at_the_length_of_a_block(host):
    assert host.settled(RetrofitSettings("linear")).spans == (256,)
    assert host.settled(RetrofitSettings("linear", lengths=(64, 512))).spans == (64, 512)


def test_a_time_is_planned_from_the_pace_that_is_measured(host, monkeypatch):
    data = tokens()
    corpus = read_corpus(data, None, None, length=32, vocabulary=48, seed=0)
    seconds = {"probe": 1.0, "block": 0.1, "warm": 0.5, "transfer": 0.5, "tune": 2.0}
    monkeypatch.setattr(pace, "measure_pace", lambda *_: seconds)
    settings = host.begun(RetrofitSettings("linear", budget=Budget.parse("5m"), length=32, lengths=(32,)))
    found = pace.plan(host, corpus, settings)
    spent = sum(getattr(found, name) * seconds[name] for name in ("warm", "transfer", "tune"))
    assert 0.6 * 300 < spent < 0.8 * 300
    assert found.tune > 0 and found.windows == 32
    alone = pace.plan(host, corpus, settings, stages=("tune",))
    assert alone.warm == alone.transfer == 0 and alone.tried and alone.tune > 1.3 * found.tune
    with pytest.raises(Unsupported, match=r"budget of 10s, which leaves only .* for"):
        pace.plan(host, corpus, dataclasses.replace(settings, budget=Budget.parse("10s")))


@pytest.mark.parametrize("lengths", [(32,), (64, 256), (256,)])
@pytest.mark.parametrize("budget", ["5m", "30m", "5h", "100 steps", "2000 steps", "200000 tokens"])
def test_texts_of_probes_are_few_and_take_a_small_part_of_the_budget(host, monkeypatch, budget, lengths):
    seconds = {"probe": 1.0, "block": 0.1, "warm": 0.5, "transfer": 0.5, "tune": 2.0}
    monkeypatch.setattr(pace, "measure_pace", lambda *_: seconds)
    corpus = Corpus(tokens(), tokens(400), None, "drawn", None)
    settings = RetrofitSettings("linear", budget=Budget.parse(budget), length=32, batch_size=2, lengths=lengths)
    found = pace.plan(host, corpus, host.begun(settings))
    read = 2 * 2 * sum(lengths) / 32  # blocks, of a text of both probes by both models
    amount = settings.budget.amount
    whole = amount / 0.1 if "s" not in budget else 4 * amount / (32 if "tokens" in budget else 1 / 2)
    assert 3 <= found.probes <= 8 and (found.probes == 3 or found.probes * read <= 0.05 * whole)
    assert found.probes == 8 or (found.probes + 1) * read > 0.05 * whole
    fewer = pace.plan(host, corpus, host.begun(dataclasses.replace(settings, evaluation_blocks=2)))
    assert fewer.probes == 2


def test_an_encoder_that_transformers_loads_as_a_causal_model_is_refused(tmp_path):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    transformers = pytest.importorskip("transformers")
    model = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, num_hidden_layers=2)).eval()
    with pytest.raises(Unsupported, match="BertLMHeadModel whose tokens attend to later tokens"):
        regard.retrofit(model, "linear", data=tokens(), budget="60 steps", output=tmp_path / "out", **WORK)
    assert not (tmp_path / "out").exists()
