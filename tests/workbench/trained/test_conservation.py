"""What gradient flow conserves in attention layers: which laws hold, and how training drifts from them."""

import copy
import json

import pytest
import torch
from command_line import answer, run
from support import refused

from regard import create_layer, list_mechanisms
from regard.contract import Context, Pattern
from regard.layers.attention import AttentionLayer
from regard.measurement.budget import Budget
from regard.models import LanguageModel, LanguageModelConfig
from regard.tasks import create_task
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.trained import conservation
from regard.workbench.trained.conservation import FORMS, GRID, ConservationMonitor, Laws, laws_of, pairs_of
from regard.workbench.trained.run import train_model

QK, VO = "queries and keys", "values and output"
RECALL = {"pairs": 3, "queries": 4, "length": 14, "vocab_size": 8, "evaluation_items": 16}


def layer_of(name="softmax", **options):
    """A layer in float64 in which nothing is still at its start."""
    layer = create_layer(name, 12, 2, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def output_of(layer, x):
    memory = torch.randn(len(x), 13, layer.spec.memory_dim, dtype=x.dtype) if layer.pattern.cross else None
    context = Context(grid=GRID) if layer.card.keeps_places and memory is None else Context()
    return layer(x, memory, context=context)


def changes(layer):
    """d/dt of the products W W^T on both sides of each pair, under gradient flow of a random loss."""
    result = output_of(layer.eval(), torch.randn(2, 16, 12, dtype=torch.float64))
    losses = [total for total, _ in result.losses.values()]
    ((result.output * torch.randn_like(result.output)).sum() + result.output.square().sum() + sum(losses)).backward()
    slopes = copy.deepcopy(layer)
    with torch.no_grad():
        for slope, parameter in zip(slopes.parameters(), layer.parameters(), strict=True):
            slope.copy_(torch.zeros_like(slope) if parameter.grad is None else -parameter.grad)
        found = {}
        for pair, sides in pairs_of(layer).items():
            groups = min((len(side[0]) for side in sides if side), default=0)
            half = [
                torch.cat(w, 2) @ torch.cat(s, 2).mT for w, s in zip(sides, pairs_of(slopes)[pair], strict=True) if w
            ]
            found[pair] = [(one + one.mT).unflatten(0, (groups, -1)).sum(1) for one in half]
    return found


def in_form(products, form):
    diagonal = products.diagonal(dim1=1, dim2=2)
    return {"matrix": products, "diagonal": diagonal, "trace": diagonal.sum(1)}[form]


@pytest.mark.parametrize("pattern", Pattern)
def test_gradient_flow_conserves_what_is_said_and_no_more(pattern):
    """In every mechanism in causal-self, in some of them in the other patterns."""
    some = ("softmax", "sigmoid", "differential", "linear", "gated_linear", "aaren")
    met = 0
    for name in list_mechanisms(kind="attention", pattern=pattern) if pattern is Pattern.CAUSAL_SELF else some:
        layer = layer_of(name, pattern=pattern)
        if not isinstance(layer, AttentionLayer):
            continue
        laws, found = laws_of(layer, 16), changes(layer)
        for pair, law in laws.items():
            if not found[pair]:
                assert law not in FORMS, (name, pair)
                continue
            first, second = found[pair]
            size = max(float(first.norm()), float(second.norm()))
            held = [float(in_form(first - second, form).norm()) <= 1e-11 * size for form in FORMS]
            expected = [law in FORMS and FORMS.index(law) <= at for at in range(len(FORMS))]
            assert held == expected, (name, pair, law, held)
            met += law in FORMS
    assert met > 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {QK: "matrix", VO: "matrix"}),
        ({"bias": True}, {QK: "matrix", VO: "matrix"}),
        ({"num_kv_heads": 1, "bias": True}, {QK: "matrix", VO: "matrix"}),
        ({"pattern": "noncausal-cross", "memory_dim": 5}, {QK: "matrix", VO: "matrix"}),
        ({"positions": "alibi"}, {QK: "matrix", VO: "matrix"}),
        ({"positions": "rotary"}, {QK: "trace", VO: "matrix"}),
        ({"positions": "rotary", "num_kv_heads": 1}, {QK: "trace", VO: "matrix"}),
        ({"query_key_norm": "rms"}, {QK: None, VO: "matrix"}),
        ({"output_gate": "swish"}, {QK: "matrix", VO: "diagonal"}),
        ({"output_norm": "layer"}, {QK: "matrix", VO: None, "norm and output": "diagonal"}),
        ({"linear": "token_parameter"}, {QK: None, VO: None}),
        (
            {"short_convolution": 3, "bias": True},
            {
                QK: None,
                VO: None,
                **dict.fromkeys([f"{one} and filters" for one in ("queries", "keys", "values")], "diagonal"),
            },
        ),
    ],
    ids=str,
)
def test_what_stands_between_decides_what_is_conserved(options, expected):
    found = laws_of(layer_of(**options), 16)
    assert {pair: law if law in FORMS else None for pair, law in found.items()} == expected
    assert all(len(law.split()) > 2 for law in found.values() if law not in FORMS), "a reason"


def test_of_frozen_weights_and_of_half_frozen_pairs_nothing_is_followed():
    layer = layer_of()
    layer.key.weight.requires_grad_(False)
    assert laws_of(layer, 16) == {QK: "not both are trained", VO: "matrix"}


def test_a_window_over_all_tokens_obeys_the_laws_of_softmax_and_a_smaller_one_its_own():
    layer = layer_of("lolcats", window=20)
    assert [laws_of(layer, tokens)[QK] in FORMS for tokens in (16, 24)] == [True, False]


def test_finding_the_laws_changes_neither_the_layer_nor_later_draws():
    layer = layer_of(positions="rotary", short_convolution=2)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = torch.get_rng_state()
    laws_of(layer, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def drift_after(start, rate, steps, optimizer=torch.optim.SGD, **options):
    """The largest drift of each law after descent on a random regression, and how far its parts moved."""
    layer = copy.deepcopy(start)
    x, y = (torch.randn(2, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(at)) for at in (0, 1))
    laws, descent = Laws({0: layer}, 16), optimizer(layer.parameters(), rate, **options)
    for _ in range(steps):
        descent.zero_grad()
        (layer(x).output - y).square().mean().backward()
        descent.step()
    return laws.drifts({0: layer})


LAYERS = (
    {"bias": True, "num_kv_heads": 1},
    {"positions": "rotary", "output_gate": "swish"},
    {"short_convolution": 3, "output_norm": "rms"},
)


def falls(start, options=None, rate=0.04, steps=10):
    """How many times smaller the drift is at a quarter of the rate, after the same time."""
    coarse, fine = (drift_after(start, rate / at, steps * at, **(options or {})) for at in (1, 4))
    return {name: max(coarse[name]["drift"]) / max(fine[name]["drift"]) for name in coarse}


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_the_drift_of_gradient_descent_goes_with_its_rate(options):
    start = layer_of(**options)
    found = falls(start)
    assert found and all(fall == pytest.approx(4, rel=0.25) for fall in found.values()), found
    for law in drift_after(start, 0.01, 20).values():
        assert max(law["drift"]) < 0.1 * max(law["moved"])


def test_adam_and_weight_decay_and_a_wrong_law_drift_at_any_rate(monkeypatch):
    start = layer_of(bias=True)
    adam = falls(start, {"optimizer": torch.optim.Adam}, rate=0.004)
    decay = falls(start, {"weight_decay": 0.3})
    parts = conservation.parts
    monkeypatch.setattr(conservation, "parts", lambda *given: (parts(*given)[0], -parts(*given)[1]))
    wrong = falls(start)
    for found in (adam, decay, wrong):
        assert all(fall < 2 for fall in found.values()), found


def test_a_step_changes_what_is_conserved_by_the_square_of_its_rate():
    layer, rate = layer_of(bias=True), 0.1
    x = torch.randn(2, 16, 12, dtype=torch.float64)
    layer(x).output.square().sum().backward()
    first, second = conservation.parts(layer, QK, "matrix")
    slopes = copy.deepcopy(layer)
    with torch.no_grad():
        for slope, parameter in zip(slopes.parameters(), layer.parameters(), strict=True):
            slope.copy_(parameter.grad)
            parameter.sub_(rate * parameter.grad)
    one, other = conservation.parts(layer, QK, "matrix")
    of_slopes = conservation.parts(slopes, QK, "matrix")
    torch.testing.assert_close((one - other) - (first - second), rate**2 * (of_slopes[0] - of_slopes[1]))


def settings(**changed):
    small = {"mechanisms": ("softmax",), "budget": Budget.parse("24 steps"), "dim": 16, "layers": 1, "heads": 2}
    small |= {"seeds": 1, "frames": ("bare",), "rates": (1e-2,), "lengths": (14,), "batch_tokens": 56}
    return CompareSettings(**(small | changed))


def test_a_resumed_run_measures_the_drift_from_where_the_whole_run_began(tmp_path):
    recall = create_task("recall", **RECALL)

    def watched(folder, **options):
        monitor = ConservationMonitor(recall, path=folder / "conservation.json")
        train_model(recall, settings(), folder, best_of=0, monitor=monitor, **options)
        return monitor

    def stop(point, total, left):
        if point.step == 9:
            raise KeyboardInterrupt

    whole = watched(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        watched(tmp_path / "broken", on_step=stop)
    resumed = watched(tmp_path / "broken")
    assert resumed.as_record() == whole.as_record()
    assert json.loads((tmp_path / "broken" / "conservation.json").read_text()) == whole.as_record()
    looks = whole.as_record()["looks"]
    assert (
        max(looks[0]["laws"]["0 queries and keys"]["drift"]) == 0 < looks[-1]["laws"]["0 queries and keys"]["drift"][0]
    )
    assert whole.says().startswith("By step 24 ") and "so what is shown is the drift" in whole.says()


def test_models_without_a_law_are_refused_with_the_reason():
    recall = create_task("recall", **RECALL)

    def model_of(plan):
        return LanguageModel(LanguageModelConfig(8, dim=16, plan=plan, num_heads=2, positions="none"))

    normed = ("softmax", {"query_key_norm": "rms", "output_norm": "rms_nonparametric"})
    refused("conserves nothing .*more than their product", ConservationMonitor(recall).check, model_of([normed]))
    refused("conserves nothing; supported: attention layers", ConservationMonitor(recall).check, model_of(["mamba2"]))
    monitor = ConservationMonitor(recall)
    monitor.check(model_of([normed, "softmax"]))
    monitor.look(model_of([normed, "softmax"]), 0)
    rows = {(row["layer"], row["of"]): row["conserved"] for row in monitor.summary()["laws"]}
    assert rows[0, QK].startswith("nothing: ") and rows[1, QK] == conservation.FORMULAS[QK]


def test_the_command_tells_the_drift_of_any_model_with_attention_layers(capsys, tmp_path):
    task = "--task recall:pairs=3,queries=4,length=14,vocab_size=8,evaluation_items=16"
    sizes = '--dim 16 --layers 1 --heads 2 --batch-tokens 56 --budget "24 steps" --best-of 0'
    line = f"train {task} {sizes} --mechanism linear --monitor conservation --output {tmp_path / 'a'}"
    told = answer(capsys, line)
    measured = [row for row in told["conservation"]["laws"] if row["drift"] is not None]
    assert measured and all(0 < row["drift"] <= row["largest of a head"] for row in measured)
    assert all(row["drift"] <= row["parts moved"] * (1 + 1e-9) for row in measured)
    page = (tmp_path / "a" / "conservation.html").read_text()
    assert "What gradient flow would conserve" in page and page.count("<svg") == 2
    code, out, said = run(capsys, line)
    assert code == 0 and "so what is shown is the drift" in " ".join(out.split()), said
