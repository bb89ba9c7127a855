"""Retrofits as in their papers: mixed layers, cores as a cache, and landmarks that are inserted, read and chosen."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from small_llama import SIZES, WORK, llama, tokens, transformers
from support import read_in_pieces

import regard
from regard import Unsupported
from regard.catalogue import get_mechanism
from regard.contract import Context, Pattern
from regard.functional import landmark_attention
from regard.integrations.transformers import AutoModelForCausalLM, RegardForCausalLM
from regard.mechanisms.stochastic_subsampling import ensemble_predict, forms, subsampled
from regard.models.variants import read_variant
from regard.retrofit.best import Best
from regard.retrofit.hosts import open_host
from regard.retrofit.inserting import rebuilt
from regard.retrofit.run import planned, read_settings
from regard.retrofit.settings import RetrofitSettings, as_papers_begin
from regard.retrofit.stage import relative_groups
from regard.workbench.reports.retrofit_report import write_retrofit_report

SHORT = {**WORK, "lengths": (64,), "evaluation_blocks": 1}
LANDMARK = "landmark:block=3,top_k=2,chunk=8"


@pytest.mark.parametrize(
    ("mechanism", "keep", "budget"),
    [("core_context:group=4,window=8", "none", "28 steps"), ("local:form=block,block=8", "0", "28 steps")],
)
def test_cores_and_blocks_are_what_generation_goes_on_from(tmp_path, mechanism, keep, budget):
    made = regard.retrofit(
        llama(2),
        mechanism,
        keep_layers=keep,
        data=tokens(),
        budget=budget,
        distil=0.0,
        output=tmp_path / "out",
        **SHORT,
    )
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    ids, settings = tokens(50)[None], {"max_new_tokens": 12, "do_sample": False}
    found = model.generate(ids, **settings)
    assert torch.equal(found, model.generate(ids, **settings, use_cache=False))
    decoding = made.results["decoding"]["64"]
    assert decoding["retrofit"]["from"] == "cache" and decoding["retrofit"]["held"] < decoding["original"]["held"]


@pytest.mark.parametrize(
    ("mechanism", "distil", "told"),
    [
        ("local:form=block,block=32", 0.0, "in blocks of 32 tokens new layers .*use a longer --length"),
        ("stochastic_subsampling", 0.0, "in all that is read here, .* no attention transfer$"),
        ("stochastic_subsampling", 1.0, "no attention transfer; use --distil 0 to learn from the data$"),
        ("local:form=block,block=8", 0.0, None),
    ],
)
def test_new_layers_that_do_what_the_old_ones_did_learn_nothing_from_them_and_say_so(tmp_path, mechanism, distil, told):
    said, asked = [], read_settings(mechanism, "0", "60 steps", {**SHORT, "distil": distil})
    (run,) = planned(
        open_host(llama(2)), [asked], [tmp_path / "out"], data=tokens(), watch=lambda _: None, say=said.append
    )
    found = [sentence for sentence in said if "the same as the old ones" in sentence]
    if told is None:
        assert not found and (run.plan.transfer, run.plan.tune) == (17, 42)
    else:
        assert len(found) == 1 and re.search(told, found[0]) and (run.plan.transfer, run.plan.tune) == (0, 60)


def test_mamba2_is_its_recurrence_on_the_queries_keys_and_values_that_are_there(tmp_path):
    said = []
    settings = {"keep_layers": "0", "data": tokens(), "budget": "28 steps", "output": tmp_path / "out", **SHORT}
    made = regard.retrofit(llama(2), "mamba2", say=said.append, **settings)
    assert made.record["settings"]["mechanism"] == "gated_linear:gate=step" and "without its convolution" in said[0]
    model, ids = AutoModelForCausalLM.from_pretrained(made.folder), tokens(50)[None]
    found = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))
    decoding = made.results["decoding"]["64"]
    assert decoding["retrofit"]["held"] < decoding["original"]["held"] and decoding["softmax"]["from"] == "cache"


@torch.no_grad()
def test_the_original_with_the_softmax_of_regard_says_the_same_and_is_no_second_set_of_weights():
    host, ids = open_host(llama(2)), tokens(40).view(2, 20)
    plain, made = host.model(ids).logits, host.by_regard
    torch.testing.assert_close(made(ids).logits, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    assert {id(p) for p in made.parameters()} == {id(p) for p in host.model.parameters()}
    assert torch.equal(host.model(ids).logits, plain) and made.config is not host.model.config


@pytest.mark.parametrize(
    ("mechanism", "apart"),
    [("gated_softmax", 1e-2), ("selective_temperature", 3e-2), ("mixture_of_heads:active_heads=2", 1e-5)],
)
@torch.no_grad()
def test_what_is_added_to_softmax_begins_near_the_model(mechanism, apart):
    model, ids = llama(2), tokens(40).view(2, 20)
    begun, plain = as_papers_begin(mechanism, 32, 4), model(ids).logits
    regard.swap(model, begun)
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=apart * float(plain.abs().max()))
    if begun != "mixture_of_heads:router=query_norm,shared_heads=2,active_heads=2":
        assert not torch.equal(model(ids).logits, plain)


def test_options_that_are_given_stay_as_they_begin():
    assert as_papers_begin("sigmoid", 128, 4) == "sigmoid:length=128"
    assert (
        as_papers_begin("sigmoid:sigmoid_bias=-3", 128, 4) == "sigmoid:sigmoid_bias=-3"
    )  # leaves no room for a length
    nine = as_papers_begin("moh", 128, 9)
    assert nine == "mixture_of_heads:router=query_norm,shared_heads=4,active_heads=3"
    assert "position_start=-2" in as_papers_begin("selective_temperature:position_start=-2", 128, 4)
    assert as_papers_begin("local:window=8", 128, 4) == "local:window=8"
    assert as_papers_begin("masformer", 128, 4) == "masformer"
    assert as_papers_begin("core_context:group=8", 4096, 4) == "core_context:group=8,window=1024"
    assert as_papers_begin("sea:top_k=9", 512, 4) == "sea:top_k=9,feature_divisor=8"


def test_a_name_alone_begins_with_what_a_trained_model_can_learn_from():
    assert as_papers_begin("local", 512, 4) == "local:window=256"
    assert as_papers_begin("local", 512, 4, Pattern.NONCAUSAL_SELF) == "local:window=128"  # on each side
    assert as_papers_begin("block_local", 512, 4) == "local:block=128,form=block"
    assert as_papers_begin("longformer", 512, 4) == "longformer:window=252,global_tokens=4,separate_projections=false"
    assert "global_tokens=2" in as_papers_begin("longformer:global_tokens=2", 512, 4)
    assert (
        as_papers_begin("longformer", 4, 4, Pattern.NONCAUSAL_SELF) == "longformer:window=2,separate_projections=false"
    )
    assert as_papers_begin("core_context", 2048, 4) == "core_context:group=16,window=1024"
    assert as_papers_begin("sea", 512, 4, longest=2060) == "sea:top_k=64,feature_divisor=8,length=2060"
    assert as_papers_begin("linformer", 512, 4, Pattern.NONCAUSAL_SELF, 1500) == "linformer:length=1500"


@pytest.mark.parametrize(
    "name",
    [
        "gated_linear",
        "landmark",
        "core_context",
        "sea",
        "local",
        "longformer",
        "mixture_of_heads",
        "selective_temperature",
    ],
)
def test_a_name_alone_is_enough(tmp_path, name):
    host = open_host(llama(2))
    settings = {**SHORT, "lengths": (220,)}
    asked = read_settings(name, None, "60 steps", settings)
    (run,) = planned(host, [asked], [tmp_path / "out"], data=tokens(), watch=lambda _: None, say=lambda _: None)
    assert run.plan.tune and run.settings.keep_layers == ("none" if name == "landmark" else "auto:0.5")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [20, 40])  # shorter than a block, shorter than a text of the evaluation
def test_advice_about_the_length_of_a_mechanism_names_the_mechanism(tmp_path, length):
    with pytest.raises(Unsupported, match=r"sequence of .* keys.*try sea:top_k=4,feature_divisor=8,length=76$"):
        regard.retrofit(
            llama(2), f"sea:length={length}", data=tokens(), budget="60 steps", output=tmp_path / "out", **SHORT
        )


@pytest.mark.parametrize("given", ["", ":block=7", ":top_k=2", ":block=3,chunk=20", ":top_k=1,chunk=3"])
@pytest.mark.parametrize("length", [16, 32, 100, 512, 2048])
def test_retrieval_stays_within_the_positions_of_training(given, length):
    try:
        written = as_papers_begin(f"landmark{given}", length, 4)
    except Unsupported as error:
        written = error.nearest.partition(" or ")[0]
    options = dict(read_variant(written).options)
    block, top_k, chunk = (options[name] for name in ("block", "top_k", "chunk"))
    assert (top_k + 1) * (block + 1) + block + chunk <= length


def test_positions_beyond_those_of_training_are_refused(tmp_path):
    with pytest.raises(Unsupported, match=r"positions up to 87.*try landmark:block=7,top_k=1,chunk=9 or length=87"):
        regard.retrofit(
            llama(2), "landmark:block=7,top_k=8", data=tokens(), budget="12 steps", output=tmp_path / "out", **SHORT
        )
    assert as_papers_begin("landmark:top_k=null", 32, 4) == "landmark:top_k=null"  # reads everything where it is


def test_temperatures_of_positions_learn_at_the_rate_of_their_paper(tmp_path, monkeypatch):
    monkeypatch.setattr(Best, "put_back", lambda self: None)  # random text teaches nothing about held-out text
    made = regard.retrofit(
        llama(2), "selective_temperature", keep_layers="0", data=tokens(), budget="28 steps", output=tmp_path, **SHORT
    )
    assert made.record["settings"]["mechanism"] == "selective_temperature:position_start=-7.0"
    moved = {name: p for name, p in made.model.named_parameters() if name.endswith("alpha")}
    ((alpha),) = moved.values()
    assert float((alpha.detach() + 7).abs().max()) > 0.01
    rates = {id(group["params"][0]): group["lr"] for group in relative_groups(made.model.requires_grad_(), (), 1e-3)}
    assert rates.pop(id(alpha)) == 0.01 and max(rates.values()) < 0.01


@pytest.mark.parametrize(("keep", "budget"), [("none", 30), ("auto:1", 54)])
def test_a_schedule_of_subsampling_counts_the_steps_of_all_stages(tmp_path, monkeypatch, keep, budget):
    steps, ratio = set(), forms._ratio

    def counted(call):
        found = ratio(call)
        if call.training and torch.is_grad_enabled():
            steps.add((call.progress, found))
        return found

    monkeypatch.setattr(forms, "_ratio", counted)
    made = regard.retrofit(
        llama(2),
        f"stochastic_subsampling:ratio=0.5,steps={budget},finetune=0.3",
        keep_layers=keep,
        data=tokens(),
        budget=f"{budget} steps",
        output=tmp_path / "out",
        **SHORT,
    )
    taken = sorted(steps)
    assert len(taken) == len({step for step, _ in taken}) and 0 <= budget - len(taken) <= 2  # shares are rounded down
    assert [step for step, _ in taken] == list(range(len(taken)))
    assert all(found == (0.5 if step < 0.7 * budget else 1.0) for step, found in taken)
    assert made.record["losses"]["transfer"] == [] and max((made.record["sensitivity"] or {"0": 0}).values()) < 1e-6
    assert "began with the outputs of the old ones" in write_retrofit_report(made.folder).read_text()


def test_what_cannot_be_trained_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    def refuse(call):
        if call.training:
            raise Unsupported("such a training")
        return 1.0

    monkeypatch.setattr(forms, "_ratio", refuse)
    monkeypatch.setattr("regard.retrofit.run.transfer", None)
    with pytest.raises(Unsupported, match="such a training"):
        regard.retrofit(
            llama(2), "stochastic_subsampling", data=tokens(), budget="60 steps", output=tmp_path / "out", **SHORT
        )
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_swapped_model_is_an_ensemble_of_its_subsampled_passes():
    model, ids = llama(2), tokens(40).view(2, 20)
    plain = model(ids).logits.double().softmax(-1)
    regard.swap(model, "stochastic_subsampling:ratio=0.3")
    with subsampled(model):
        torch.manual_seed(3)
        passes = [model(ids).logits.softmax(-1) for _ in range(2)]
    torch.manual_seed(3)
    torch.testing.assert_close(ensemble_predict(model, ids, passes=2), sum(passes) / 2)
    assert not torch.allclose(passes[0], passes[1], atol=1e-4)
    close = {"rtol": 1e-3, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(ensemble_predict(model, ids, passes=1, ratio=1.0), plain, **close)
    with pytest.raises(Unsupported, match="a context for a LlamaForCausalLM"):
        ensemble_predict(model, ids, context=Context())


def test_a_llama_of_regard_gives_the_same_logits_and_begins_a_landmark_at_the_mean():
    host, ids = open_host(llama(2)), tokens(40).view(2, 20)
    same, new = rebuilt(host, (), LANDMARK)
    torch.testing.assert_close(same(ids).logits, host.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert new == [] and same.model.insertion.extra_tokens == 0
    table = rebuilt(host, (0, 1), LANDMARK)[0].get_input_embeddings().weight
    torch.testing.assert_close(table[48], table[:48].mean(0))
    assert torch.equal(table[:48], host.model.get_input_embeddings().weight)


def test_landmarks_are_inserted_trained_and_retrieved(tmp_path):
    settings = {**SHORT, "lengths": (64, 256)}
    model, output = llama(2, max_position_embeddings=32), tmp_path / "out"
    made = regard.retrofit(
        model, LANDMARK, keep_layers="none", data=tokens(), budget="12 steps", output=output, **settings
    )
    losses = made.record["losses"]
    assert losses["transfer"] == [] and len(losses["tune"]) == 12
    results = made.results  # at twice and eight times the trained length, which is all the positions that there are
    assert all(list(results[what]) == ["64", "256"] for what in ("needles", "pairs", "prefill", "decoding"))
    assert not results["left_out"] and {"32", "2048", "32768"} <= results["state"].keys()
    (judged,) = results["perplexity"].values()
    assert judged["length"] == 64 and [part["last"] for part in judged["by_position"]] == [16, 32, 63]
    assert any("the original has 32 positions" in note for note in made.record["recommendation"]["notes"])
    loaded = AutoModelForCausalLM.from_pretrained(made.folder)
    assert isinstance(loaded, RegardForCausalLM)
    assert {layer[0] for layer in loaded.model.config.plan} == {"landmark"}
    ids = tokens(60)[None]
    with torch.no_grad():
        chosen, whole = (loaded(ids, use_cache=keeps).logits for keeps in (True, False))
        torch.testing.assert_close(chosen, made.model(ids, use_cache=True).logits)
    assert torch.allclose(chosen[:, :12], whole[:, :12], atol=1e-4) and not torch.allclose(chosen, whole, atol=1e-4)
    assert loaded.generate(ids, max_new_tokens=9, do_sample=False).shape == (1, 69)
    assert "learns at once" in write_retrofit_report(output).read_text()


@pytest.mark.parametrize("mechanism", ["local:window=8", "landmark:top_k=null", LANDMARK])
def test_what_reads_tokens_where_they_are_is_measured_within_the_positions(mechanism):
    host = open_host(llama(2, max_position_embeddings=32))
    keep = (0,) if mechanism == LANDMARK else ()
    asked = RetrofitSettings(mechanism, keep_layers=keep, length=32, lengths=(32, 64))
    begun = host.begun(asked)
    assert host.within(begun.spans, begun) == [32] and host.evaluation_length(tokens(), 32, host.reach(begun)) == 32
    with pytest.raises(Unsupported, match=r"lengths=\(64, 256\) of a model of 32 positions.*try lengths=\(32,\)"):
        host.begun(replace(asked, lengths=(64, 256)))
    with pytest.raises(Unsupported, match="blocks of 64 tokens for a model of 32 positions"):
        host.begun(replace(asked, length=64))


STRETCHED = {"factor": 8.0, "rope_theta": 10.0, "original_max_position_embeddings": 16}
OTHERS = {
    "llama 3.1": {
        "rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **STRETCHED}
    },
    "llama, interpolated": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10.0}},
    "mistral": {"sliding_window": None},
    "mistral with a window": {"sliding_window": 12},
    "qwen2": {},
}


def other(kind, **options):
    name = {"l": "Llama", "m": "Mistral", "q": "Qwen2"}[kind[0]]
    options = {**SIZES, "eos_token_id": None, **OTHERS[kind], **options}
    config = getattr(transformers, f"{name}Config")(**options, num_hidden_layers=2)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_landmarks_attend_by_the_heads_and_the_rotation_of_the_model(kind):
    """The mixer of the first layer is the definition on the heads that the model's own projections and rotation make."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    host = open_host(other(kind))
    made, _ = rebuilt(host, (0, 1), "landmark:block=3")
    x, roles, old = torch.randn(2, 21, 32).double(), (torch.arange(21) % 4 == 3).long().expand(2, -1), host.attention(0)
    projected = [project(x).unflatten(-1, (-1, 8)).transpose(1, 2) for project in (old.q_proj, old.k_proj, old.v_proj)]
    q, k = apply_rotary_pos_emb(*projected[:2], *host.model.model.rotary_emb(x, torch.arange(21)[None]))
    heads = landmark_attention(q, k, projected[2], pattern="causal-self", roles=roles, block=3, form="reference")
    expected = old.o_proj(heads.transpose(1, 2).flatten(2))
    found = made.model.blocks[0].mixer(x, context=Context(roles=roles)).output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # their angles are in float32


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_landmarks_in_other_models_read_in_pieces_what_they_read_whole(kind):
    host, ids = open_host(other(kind, max_position_embeddings=32)), tokens(50).view(2, 25)
    for mechanism in ("landmark:block=3", "landmark:block=3,top_k=9,chunk=8"):  # retrieves all of the blocks
        model = rebuilt(host, (0, 1), mechanism)[0].model
        torch.testing.assert_close(read_in_pieces(model, ids, [7, *[1] * 12, 6])[0], model(ids).output)
    same = rebuilt(host, (), LANDMARK)[0]
    torch.testing.assert_close(same(ids).logits, host.model(ids).logits, rtol=1e-4, atol=1e-4)
    retrieving, text = rebuilt(host, (0, 1), LANDMARK)[0], tokens(60)[None]  # more than the model has positions
    assert retrieving.generate(text, max_new_tokens=5, do_sample=False).shape == (1, 65)


@pytest.mark.parametrize("options", ["", ",selection=max_over_heads", ",offload=memory", ",offload=disk"])
@torch.no_grad()
def test_a_text_with_landmarks_is_answered_in_a_batch_as_alone(options):
    """All landmarks of the first layer have the same key, so blocks tie: neither rounding nor padding may decide."""
    model = rebuilt(open_host(other("llama, interpolated")), (0, 1), LANDMARK + options)[0].eval()
    ids, mask = tokens(140).view(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[1, :27] = 0

    def answered(ids, mask):
        settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        found = model.generate(ids, attention_mask=mask, max_new_tokens=12, **settings)
        return found.sequences[:, -12:], torch.stack(found.logits, 1)

    together = answered(ids, mask)
    for r, row in enumerate(mask.bool()):
        for found, alone in zip(together, answered(ids[r : r + 1, row], mask[r : r + 1, row]), strict=True):
            torch.testing.assert_close(found[r : r + 1], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "begun"),
    [
        ("offload=disk", "selection=max_over_tokens"),
        ("offload=memory", "selection=max_over_tokens"),
        ("offload=disk,selection=max_over_tokens", "selection=max_over_tokens"),
        ("selection=max_over_heads", "selection=max_over_heads"),
        ("selection=max_over_tokens", "selection=max_over_tokens"),
    ],
)
def test_options_of_retrieval_need_no_others(given, begun, tmp_path):
    asked = read_settings(f"landmark:{given}", None, "60 steps", {**SHORT, "lengths": (220,)})
    host, quiet = open_host(llama(2)), {"watch": lambda _: None, "say": lambda _: None}
    (run,) = planned(host, [asked], [tmp_path / "out"], data=tokens(), **quiet)
    config = get_mechanism("landmark").options(**read_variant(run.settings.mechanism).options)
    assert f"selection={config.selection}" == begun and config.top_k and config.chunk
    with pytest.raises(Unsupported, match=r"with top_k=None.*try top_k=4"):
        read_settings(f"landmark:top_k=null,{given}", None, "60 steps", {})


def test_models_that_cannot_be_rebuilt_for_landmarks_are_refused_at_once(tmp_path):
    config = transformers.GPT2Config(vocab_size=48, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(
        Unsupported, match=r"landmark in a GPT2LMHeadModel: it inserts tokens.*llama, mistral, qwen2; try"
    ) as told:
        regard.retrofit(
            transformers.GPT2LMHeadModel(config), "landmark", data=tokens(), budget="12 steps", output=tmp_path / "out"
        )
    assert "mamba" not in str(told.value)


def test_blocks_of_landmarks_are_no_longer_than_the_window_of_the_old_layers():
    host = open_host(other("mistral with a window", sliding_window=40))
    settings = RetrofitSettings("landmark", keep_layers=(), lengths=(64, 512))
    begun = host.begun(settings)
    assert begun.length == 40 and host.within(begun.spans, begun) == [64, 512]
    whole = host.begun(replace(settings, mechanism="landmark:top_k=null", lengths=(32, 64)))
    assert host.within(whole.spans, whole) == [32]
    with pytest.raises(Unsupported, match=r"blocks of 41 tokens with landmark.*window of 40.*try length=40"):
        host.begun(replace(settings, length=41))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep_layers": "auto:0.5"}, r"keep_layers='auto:0.5' with landmark.*try none"),
        ({"keep_layers": "none", "train": "lora:2"}, "train='lora:2' with landmark"),
    ],
)
def test_what_inserted_tokens_do_not_allow_is_refused_at_once(tmp_path, options, told):
    with pytest.raises(Unsupported, match=told):
        regard.retrofit(llama(2), LANDMARK, data=tokens(), budget="12 steps", output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_regard_cannot_stand_for_is_refused(tmp_path):
    model = llama(2, hidden_act="gelu")
    with pytest.raises(Unsupported, match="hidden_act='gelu'"):
        regard.retrofit(
            model, LANDMARK, keep_layers="none", data=tokens(), budget="12 steps", output=tmp_path / "out", **SHORT
        )
