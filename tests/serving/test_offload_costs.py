"""Costs of offloading: counted as in the paper's cost model, matched by simulation, and planned from a sourced table."""

import json
import random

import pytest
import torch
from command_line import answer, run

from regard.models import LanguageModel, LanguageModelConfig
from regard.serving.offload.costs import (
    Device,
    Network,
    Sizes,
    Stages,
    attention_seconds,
    crossing,
    homogeneous,
    model_seconds,
    offloaded,
    plans,
    read_table,
    required_bandwidth,
    traffic_bytes,
)
from regard.serving.offload.simulator import simulate, step_stages

INSTANT = Network(bandwidth=1e30)
SIZES = Sizes(layers=8, heads=16, kv_heads=4, head_dim=64, parameters=1e8)


def device(name="a", flops=1e12, bandwidth=1e11, memory=1e9, price=1.0, available=1):
    return Device(name, flops, bandwidth, memory, price, "a test", available)


def random_stages(wire=True):
    draws = random.Random(torch.initial_seed())
    while True:
        sizes = [draws.random() for _ in range(5)]
        yield Stages(*(sizes if wire else [*sizes[:2], 0.0, 0.0, sizes[4]]))


def test_operations_and_bytes_are_those_of_the_cost_model():
    e, b, d, g = 2, 12, 16 * 64, 16 / 4
    assert sum(traffic_bytes(SIZES, b)) == e * 8 * b * d * (2 + 2 / g)
    sent, received = traffic_bytes(SIZES, b, owners=3)
    assert sent == e * 8 * b * (3 * d + 2 * d / g) and received == 8 * b * 3 * (e * d + 4 * 16)
    slow = device(flops=1e9)
    assert model_seconds(SIZES, slow, b) == 2 * 1e8 * b / 1e9 and model_seconds(SIZES, device(), 1) == e * 1e8 / 1e11
    assert attention_seconds(SIZES, device(), 5000) == 2 * e * 8 * 4 * 64 * 5000 / 1e11
    assert attention_seconds(SIZES, slow, 5000) == 4 * 8 * 16 * 64 * 5000 / 1e9
    wanted = required_bandwidth(SIZES, b, seconds=0.5, alpha=0.2)
    assert sum(traffic_bytes(SIZES, b)) / wanted == pytest.approx(0.2 * 0.5)


def test_more_queries_for_each_key_are_more_operations_for_each_byte_whatever_the_batch():
    for kv_heads in (16, 8, 4, 1):
        sizes = Sizes(8, 16, kv_heads, 64, 1e8)
        tokens = 777
        operations, count = 4 * 8 * 16 * 64 * tokens, sizes.token_bytes * tokens
        assert sizes.attention_intensity == operations / count == 2 * (16 / kv_heads) / 2


def test_two_micro_batches_take_half_where_both_sides_have_as_much_to_do_and_no_less_at_the_ends():
    at_ends = []
    for model, attention in ((1.0, 1.0), (1.0, 1e-6), (1e-6, 1.0)):
        serial = Stages(2 * model, 2 * attention).period()  # half the micro-batch takes half as long
        at_ends.append(serial / Stages(model, attention).period(2))
    assert at_ends[0] == 2 and at_ends[1:] == pytest.approx([1, 1], abs=1e-5)
    # no gain if weights are read again for each micro-batch, or if messages take longer than all else
    both = device(flops=1e15, memory=1e12)
    for network, context in ((INSTANT, 1), (Network(1e30, latency=1.0), 100)):
        assert offloaded(SIZES, both, device(memory=1e6), network, context).micro_batches == 1
    alone = offloaded(SIZES, both, device(memory=SIZES.token_bytes * 100 * 1.5), INSTANT, 100)
    assert (alone.batch, alone.micro_batches) == (1, 1)
    assert alone.seconds == pytest.approx(SIZES.layers * Stages.of(SIZES, both, both, INSTANT, 1, 100).period())


def test_latency_decides_on_a_slow_network():
    model, attention = device(memory=1e12), device("b")
    times = [offloaded(SIZES, model, attention, Network(1e10, latency), 1000).seconds for latency in (0, 1e-4, 1e-2)]
    assert times[0] == times[1]  # hidden by the other micro-batch
    assert times[2] == pytest.approx(2 * 8 * 1e-2, rel=0.2)


def test_one_kind_of_device_is_given_the_batch_that_its_memory_holds_and_falls_behind_as_contexts_grow():
    big, cheap = device(memory=4e8, flops=1e13), device("b", memory=4e8, price=0.1)
    gains = []
    for context in (25, 50, 100, 200):
        plan = homogeneous(SIZES, big, context)
        used = SIZES.weight_bytes + plan.batch * context * SIZES.token_bytes
        assert used <= big.memory < used + context * SIZES.token_bytes
        gains.append(offloaded(SIZES, big, cheap, INSTANT, context).tokens_per_unit / plan.tokens_per_unit)
    assert gains == sorted(gains) and gains[-1] > 1.2 * gains[0]
    assert homogeneous(SIZES, device(memory=1e8), 10) is None
    assert offloaded(SIZES, device(memory=1e8), cheap, INSTANT, 10) is None


def test_plans_take_no_more_devices_than_there_are_and_the_best_come_first():
    kinds = [device(available=3), device("b", memory=5e8, price=0.2, available=2)]
    alone, pairs = plans(kinds, INSTANT, SIZES, 500)
    assert {plan.model for plan in alone} == {"1 x a", "2 x a", "3 x a", "1 x b", "2 x b"}
    counts = [
        sum(int(name.split()[0]) for name in (p.model, p.attention)) for p in pairs if p.model[-1] == p.attention[-1]
    ]
    assert max(counts) == 3
    for found in (alone, pairs):
        assert found == sorted(found, key=lambda plan: -plan.tokens_per_unit)
        assert all(p.tokens_per_unit == pytest.approx(3600 * p.batch / p.seconds / p.price_per_hour) for p in found)


def test_the_crossing_is_where_all_longer_contexts_pay():
    assert crossing({1: 0.5, 2: 1.1, 4: 0.9, 8: 1.2, 16: 1.3}) == 8
    assert crossing({1: 0.5, 2: None}) is None and crossing({1: 1.0, 2: 3.0}) == 1


def test_simulated_schedules_take_as_long_as_the_closed_forms_say_and_as_much_work():
    for _, stages in zip(range(60), random_stages(), strict=False):
        for parts in (1, 2, 3):
            found = simulate([step_stages(stages, 4)] * parts, 40)
            # after a few steps the schedule is periodic, with a period of at most as many steps as micro-batches
            period = (found.steps[-1] - found.steps[-1 - 4 * parts]) / (4 * parts)
            assert period == pytest.approx(4 * stages.period(parts), rel=0.03)
            assert period <= parts * 4 * stages.period() * (1 + 1e-9)
            assert found.busy == pytest.approx({place: 160 * parts * seconds for place, seconds in stages.busy.items()})
    for _, stages in zip(range(60), random_stages(wire=False), strict=False):
        for parts in (1, 2):
            found = simulate([step_stages(stages, 5, last=True)] * parts, 3, together=True)
            expected = stages.step(5, parts)
            assert found.steps == pytest.approx([expected, 2 * expected, 3 * expected])
            one_after_the_other = simulate([step_stages(stages, 5, last=True) * parts])
            assert found.steps[0] <= one_after_the_other.seconds * (1 + 1e-9)


TABLE = {
    "devices": [
        {
            "name": "big",
            "flops": 1e15,
            "bandwidth": 3e12,
            "memory": 8e10,
            "price_per_hour": 4,
            "source": "x",
            "available": 2,
        },
        {"name": "small", "flops": 7e13, "bandwidth": 9e11, "memory": 2.4e10, "price_per_hour": 0.3, "source": "y"},
    ],
    "network": {"bandwidth": 2.5e10, "latency": 2e-5},
    "model": {"layers": 40, "heads": 40, "kv_heads": 8, "head_dim": 128, "parameters": 1.3e10},
}


def test_a_table_is_planned_on_a_command_line(capsys, tmp_path):
    table = tmp_path / "table.json"
    table.write_text(json.dumps(TABLE))
    found = answer(capsys, f"offload --devices {table} --context 1000,30000")
    for row in found["rows"]:
        best = row["offloaded"][0]["tokens_per_unit"] / row["one_kind"][0]["tokens_per_unit"]
        assert row["gain"] == best and row["required_bandwidth"] > 0
    assert found["attention_intensity"] == 5
    code, out, _ = run(capsys, f"offload --devices {table} --context 1000")
    assert (
        code == 0
        and found["rows"][0]["one_kind"][0]["model"] in out
        and "for the money" in out
        and "not measured" in out
    )
    rows = TABLE["devices"]
    for change, words in (
        ({"devices": [{**rows[0], "source": " "}]}, "without a source"),
        ({"devices": [{k: v for k, v in rows[0].items() if k != "flops"}]}, "without flops"),
        ({"devices": [{**rows[0], "watts": 3}]}, "'watts'"),
        ({"devices": [{**rows[0], "memory": -1}]}, "memory > 0"),
        ({"devices": [{**rows[0], "memory": "much"}]}, "memory > 0"),
        ({"devices": [rows[0], rows[0]]}, "of one name"),
        ({"devices": []}, "devices"),
        ({"network": {"latency": 1}}, "without bandwidth"),
        ({"model": {**TABLE["model"], "kv_heads": 7}}, "a multiple"),
        ({"model": None}, "without a model"),
        ({"more": 1}, "network:"),
    ):
        table.write_text(json.dumps(TABLE | change))
        code, _, said = run(capsys, f"offload --devices {table}")
        assert code == 2 and words in said, said
    table.write_text("{")
    for line, words in ((f"--devices {table}", "valid JSON"), (f"--devices {tmp_path}/none.json", "cannot be read")):
        code, _, said = run(capsys, f"offload {line}")
        assert code == 2 and words in said


def test_exponents_without_a_sign_are_numbers_in_a_table_too(tmp_path):
    table = tmp_path / "table.yaml"
    table.write_text(
        "devices: [{name: 8e10, flops: 9.9e14, bandwidth: 3e12, memory: 8e10, price_per_hour: 4, source: 1e3 guesses}]\n"
        "network: {bandwidth: 2.5e10, latency: 2e-5}\n"
    )
    found = read_table(table)
    device = Device("8e10", flops=9.9e14, bandwidth=3e12, memory=8e10, price_per_hour=4, source="1e3 guesses")
    assert found.devices == (device,) and found.network == Network(bandwidth=2.5e10, latency=2e-5)


def test_sizes_are_those_of_a_model_and_differing_layers_are_refused(tmp_path):
    config = LanguageModelConfig(30, dim=24, plan=["gated_linear", "softmax", "softmax"], num_heads=4, num_kv_heads=2)
    model = LanguageModel(config)
    assert Sizes.of(model) == Sizes(2, 4, 2, 6, sum(x.numel() for x in model.parameters()), 4)
    with pytest.raises(ValueError, match="of different sizes"):
        Sizes.of(LanguageModel(LanguageModelConfig(30, dim=24, plan=["softmax", ("softmax", {"num_heads": 2})])))


def test_a_measurement_on_a_command_line_tells_each_way_and_what_was_simulated(capsys):
    line = "offload --backend local --context 20 --batch 2 --seconds 0"
    (row,) = answer(capsys, line)["rows"]
    assert set(row["seconds_of"]) == {"serial", "early", "pipelined", "pipelined_early", "halves"}
    assert row["gain"] == row["seconds_of"]["serial"]["median"] / row["seconds_of"]["pipelined"]["median"]
    assert (row["sent_bytes"], row["received_bytes"]) == (4 * 2 * 4 * (256 + 256), 4 * 2 * 4 * 256)
    assert row["simulated_seconds"] > 0 and all(row["stages"][name] > 0 for name in ("model", "attention"))
    for words, message in {
        "--batch 1": "batch >= 2",
        "--cores 0": "the model's core",
        "--backend pigeon": "local, process, tcp",
        "--split column": "auto, head",
        "--workers 9 --split head": "at most 4 workers",
        "nowhere": "does not exist",
    }.items():
        code, _, said = run(capsys, f"offload --backend local --context 20 --seconds 0 {words}")
        assert code == 2 and message in said, said
