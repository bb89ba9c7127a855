"""Attention as cascades of Einsums: traversals of the keys, counted runs, machines, and the mechanisms of the catalogue."""

import itertools
import math
import statistics
from pathlib import Path

import pytest
import torch
from command_line import answer, run
from torch.nn.functional import scaled_dot_product_attention

from regard import catalogue
from regard.contract import Unsupported
from regard.measurement.speeds import Speeds, caches, measured_speeds
from regard.studies import Chosen, get_study
from regard.studies.attention_passes import (
    cost,
    estimate,
    min_traffic,
    parse,
    passes,
    read_machine,
    run_cascade,
    schedule,
    shipped,
    this_processor,
)
from regard.studies.attention_passes.accelerator import (
    DESIGNS,
    LENGTHS,
    SIDES,
    WORKLOADS,
    interleaved_cycles,
    one_pass_bytes,
    recorded,
)
from regard.studies.attention_passes.cells import SHIPPED, costed, described
from regard.studies.attention_passes.machine import machine_of
from regard.studies.attention_passes.mechanisms import cascade_of, difference
from regard.studies.attention_passes.written import REASONS, WRITTEN

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "mechanisms"
HEAD = "inputs: Q[e, p], K[e, m], V[f, m]\n"
CAUSAL = shipped("one_pass").text.replace(
    "QK[m1, m0, p] = Q[e, p] * K[e, m1, m0]", "D[m, p] = Q[e, p] * K[e, m]\nQK[m, p] = where(m <= p, D[m, p], -inf)"
)


def random_inputs(keys=37, queries=7, lead=(2, 3), e=8, f=5):
    """Inputs of softmax's cascades, and the expected output."""
    q, k, v = (torch.randn(*lead, d, n, dtype=torch.float64) for d, n in ((e, queries), (e, keys), (f, keys)))
    return {"Q": q, "K": k, "V": v}, scaled_dot_product_attention(q.mT, k.mT, v.mT, scale=1.0).mT


def ratios(top, bottom, of=lambda row: row.seconds, projections=None):
    """Ratios of two designs over models and lengths, from the recorded tables."""
    found = []
    for model in WORKLOADS:
        for length in LENGTHS:
            numbers = [of(recorded()[design, model, length]) for design in (top, bottom)]
            if projections is not None:
                numbers = [
                    number + of(recorded()[f"projections {name}", model, length])
                    for number, name in zip(numbers, projections, strict=True)
                ]
            found.append(numbers[0] / numbers[1])
    return found


def test_traversals_of_the_papers_cascades_and_of_their_statements():
    counts = {name: passes(shipped(name)).count for name in SHIPPED}
    assert counts == {"three_pass": 3, "two_pass_deferred": 2, "two_pass": 2, "one_pass": 1, "naive": 1}
    assert passes(shipped("three_pass")).of == {"QK": 1, "GM": 1, "SN": 2, "SD": 2, "A": 3, "AV": 3}
    two = passes(shipped("two_pass"))
    assert {name for name, number in two.of.items() if number == 1} == {"QK", "LM", "SLN", "SLD", "GM", "PLM", "SD"}
    assert two.status["LM"] == "partial" and two.status["GM"] == "complete" and two.status["A"] == "full"
    assert passes(shipped("three_pass"), "p").count == 1
    with pytest.raises(Unsupported, match="rank 'z'"):
        passes(shipped("naive"), "z")


@pytest.mark.parametrize(
    ("name", "last"),
    [("three_pass", "A"), ("two_pass_deferred", "SN"), ("two_pass", "A"), ("one_pass", "SLN"), ("naive", "SN")],
)
def test_a_needless_reduction_of_all_keys_costs_a_traversal_more(name, last):
    text = f"{shipped(name).text}output: Y\nX[p] = {last}[m, p]\nY[m, p] = {last}[m, p] - X[p]\n"
    assert passes(parse(text)).count == passes(shipped(name)).count + 1


def test_a_correction_of_tiles_by_the_whole_is_read_in_the_traversal_after_it():
    text = shipped("two_pass").text.replace("A[m1, m0, p] = SLN[m1, m0, p] * PLM[m1, p] / SD[p]", "")
    text = text.replace("AV[f, p] = A[m1, m0, p] *", "AV[f, p] = SLN[m1, m0, p] * PLM[m1, p] *")
    found = parse(text)
    assert passes(found).count == run_cascade(found, random_inputs()[0], tile=8).traversals == 2


def test_what_an_iteration_ends_with_is_known_after_its_traversal():
    text = shipped("one_pass").text + "output: W\nW[m1, m0, p] = exp(QK[m1, m0, p] - RM[M1, p])\n"
    found = parse(text)
    inputs, _ = random_inputs()
    done = run_cascade(found, inputs, tile=8)
    assert passes(found).count == done.traversals == 2
    scores = inputs["K"].mT @ inputs["Q"]
    assert (done.output - (scores - scores.amax(-2, keepdim=True)).exp()).abs().max() < 1e-12


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_is_softmax_attention_for_any_tile_and_walks_no_less_than_it_has_to(name):
    cascade = shipped(name)
    for tile in (None, 1, 5, 8, 37, 50):
        inputs, expected = random_inputs()
        for keep in (True, False):
            found = run_cascade(cascade, inputs, tile=tile, keep=keep)
            assert (found.output - expected).abs().max() < 1e-12
            assert found.traversals == passes(cascade).count
            assert sum(found.reads[one] for one in "QKV") == sum(x.numel() for x in inputs.values())
    single, expected = random_inputs(lead=())
    assert (run_cascade(cascade, single, tile=5).output - expected).abs().max() < 1e-12


def test_one_pass_in_one_tile_is_two_passes_with_the_division_deferred():
    inputs, _ = random_inputs()
    one, two = (run_cascade(shipped(name), inputs).output for name in ("one_pass", "two_pass_deferred"))
    assert torch.equal(one, two) or (one - two).abs().max() < 1e-15


def test_a_causal_mask_is_a_condition_of_coordinates():
    inputs, _ = random_inputs(queries=37)
    q, k, v = (inputs[name].mT for name in "QKV")
    text = CAUSAL.replace("RM[0, p] = -inf", "RM[0, p] = -1e30")
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).mT
    assert (run_cascade(parse(text), inputs, tile=8).output - expected).abs().max() < 1e-12


def test_the_buffer_of_one_pass_stays_and_that_of_three_grows_with_the_keys():
    held = {
        name: [run_cascade(shipped(name), random_inputs(keys)[0], tile=8).high_water for keys in (64, 128, 256)]
        for name in ("one_pass", "three_pass")
    }
    assert len(set(held["one_pass"])) == 1
    first, second, third = held["three_pass"]
    assert third - second == 2 * (second - first) > 0


def test_fibers_that_are_not_kept_move_as_often_as_there_are_traversals():
    for name in ("three_pass", "two_pass_deferred", "one_pass"):
        keys, queries = 40, 6
        inputs, _ = random_inputs(keys, queries, lead=())
        kept, moved = (run_cascade(shipped(name), inputs, tile=8, keep=keep) for keep in (True, False))
        least = min_traffic(passes(shipped(name)).count, keys, queries, buffer=8)
        between = moved.traffic - kept.traffic
        assert kept.traffic == sum(x.numel() for x in inputs.values()) + 5 * queries
        assert between == 0 if least.kept == 0 else between >= least.reread
    assert min_traffic(3, 40, 6, buffer=40).least == 0 and min_traffic(3, 40, 6, buffer=39).least == 3 * 40 * 6


def test_all_rows_of_the_authors_tables():
    rows = [(design, model, length) for design in DESIGNS for model in WORKLOADS for length in LENGTHS]
    assert len(rows) == 5 * 24
    for design, model, length in rows:
        found, table = estimate(design, WORKLOADS[model], length), recorded()[design, model, length]
        for name in ("seconds", "bytes", "util_2d", "util_1d"):
            assert getattr(found, name) == pytest.approx(getattr(table, name), rel=1e-12), (design, model, length, name)
    spots = {"binding": 0.002013140425531915, "architecture": 0.005987131914893616, "cascade": 0.015333855319148937}
    for design, seconds in spots.items():
        assert estimate(design, WORKLOADS["BERT"], 1024).seconds == pytest.approx(seconds, rel=1e-12)
    for side in SIDES:
        for model, workload in WORKLOADS.items():
            table = recorded()[f"binding {side}", model, 2**18]
            assert estimate("binding", workload, 2**18, side).seconds == pytest.approx(table.seconds, rel=1e-12)
    with pytest.raises(Unsupported, match="a divisor of the tokens"):
        estimate("binding", WORKLOADS["BERT"], 1000)
    with pytest.raises(Unsupported, match="whose traffic was recorded"):
        estimate("flat", WORKLOADS["BERT"], 1024, side=64)
    with pytest.raises(Unsupported, match="whose traffic was not recorded"):
        estimate("flat", WORKLOADS["BERT"], 512)


def test_the_papers_means():
    mean, geometric = statistics.mean, statistics.geometric_mean
    assert mean(ratios("flat", "binding")) == pytest.approx(6.72, abs=0.005)
    assert geometric(ratios("flat", "binding")) == pytest.approx(6.46, abs=0.005)
    assert mean(ratios("unfused", "binding")) == pytest.approx(10.05, abs=0.005)
    assert mean(ratios("flat", "cascade")) == pytest.approx(0.91, abs=0.005)
    assert geometric(ratios("flat", "architecture")) == pytest.approx(2.2, abs=0.05)
    whole = ("flat", "fusemax")
    assert mean(ratios("flat", "binding", projections=whole)) == pytest.approx(5.30, abs=0.005)
    assert geometric(ratios("flat", "binding", projections=whole)) == pytest.approx(4.60, abs=0.005)
    assert mean(ratios("binding", "flat", lambda row: row.energy)) == pytest.approx(0.787, abs=0.0005)
    layer = ratios("binding", "flat", lambda row: row.energy, whole[::-1])
    assert mean(layer) == pytest.approx(0.833, abs=0.0005)


def test_the_cost_of_one_pass_is_the_papers_where_blocks_of_queries_divide():
    machine, workload = read_machine("fusemax"), WORKLOADS["BERT"]
    for length in LENGTHS[:4]:
        sizes = {"m": length, "p": length, "e": 64, "f": 64}
        found = cost(shipped("one_pass"), machine, sizes, workload.batch * workload.heads)
        assert found.bytes == one_pass_bytes(workload, length, 16 * 2**20, machine)
        assert found.on_cells == {"QK", "LM", "SLN", "SLD", "SLNV"}
        assert found.seconds <= estimate("binding", workload, length).seconds * (1 + 1e-12)


def test_a_block_of_queries_is_what_fits_beside_a_tile_of_keys_and_values():
    machine, width = read_machine("fusemax"), 128
    two_tiles = 2 * 256 * width + 2 * 256 * 2 * (width + 2)
    heads = 2 * 64 * 12
    for buffer, again in ((two_tiles, 4), (two_tiles - 1, 8)):
        moved = one_pass_bytes(WORKLOADS["BERT"], 2048, buffer, machine)
        assert moved == heads * (2048 * width + again * 2048 * width)


def test_products_of_matrices_are_for_cells_and_divisions_for_lanes():
    sizes = {"m": 1024, "p": 1024, "e": 64, "f": 64}
    for name, on_cells in (("linear", {"fq", "KV", "N", "fk", "Z"}), ("sigmoid", {"S", "o"})):
        found = cost(cascade_of(name).cascade, read_machine("fusemax"), sizes)
        assert found.on_cells == on_cells - ({"fq"} if name == "linear" else set())


def test_more_traversals_move_no_less_and_small_buffers_write_fibers():
    sizes = {"m": 65536, "p": 65536, "e": 64, "f": 64}
    edge = read_machine("edge")
    one, two, three = (cost(shipped(name), edge, sizes) for name in ("one_pass", "two_pass_deferred", "three_pass"))
    assert one.bytes < two.bytes < three.bytes
    assert one.kept and not three.kept


@pytest.mark.parametrize("count", [1, 3, 40])
def test_interleaved_tiles_reach_the_formula_within_a_tile(count):
    machine = read_machine("fusemax")
    sizes = {"m": 256 * count, "p": 256, "e": 64, "f": 64}
    cascade = shipped("one_pass")
    formula = interleaved_cycles(cost(cascade, machine, sizes))
    a_tile = schedule(cascade, machine, {**sizes, "m": 256}, ahead=0).cycles
    found, in_turn = schedule(cascade, machine, sizes), schedule(cascade, machine, sizes, ahead=0)
    assert formula <= found.cycles <= formula + a_tile
    last = cost(cascade, machine, sizes).cycles["AV"]
    assert in_turn.cycles == count * (a_tile - last) + last
    assert found.cycles < in_turn.cycles or count == 1
    for unit in (True, False):
        own = sorted((slot.start, slot.end) for slot in found.slots if slot.on_cells == unit)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(own))


PASSES = {"clipped_softmax": 2, "token_parameter": 2, "flow_attention": 2, "lara": 2}
"""Number of passes of the mechanisms that need more than one pass over their keys."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_mechanisms_cascade_is_its_definition(name):
    found = cascade_of(name)
    for tokens, tile, seed in ((11, 4, 0), (7, 3, 1)):
        assert difference(found, tokens, tile, seed) < 1e-12
    assert passes(found.cascade).count == PASSES.get(name, 1)


@pytest.mark.parametrize("name", [name for name in WRITTEN if "keys:" in WRITTEN[name].text])
def test_the_buffer_of_a_cascade_in_tiles_grows_only_with_a_second_traversal(name):
    found = described(cascade_of(name).cascade)
    assert found["passes"] == found["traversals"]
    assert (found["growth"] > 1.2) == (found["passes"] > 1)


def test_every_mechanism_has_a_cascade_or_a_reason():
    assert set(WRITTEN) | set(REASONS) == set(catalogue.list_mechanisms())
    assert not set(WRITTEN) & set(REASONS)
    with pytest.raises(Unsupported, match="sorting, hashing"):
        difference(cascade_of("reformer"))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "without inputs"),
        (HEAD, None, "without a statement"),
        ("inputs: X[n, d]\nY[d] = X[n, d]", None, "no tensor has the rank 'm' of keys"),
        (HEAD + "S[m, q] = Q[e, p] * K[e, m]", 2, "unknown rank 'q'"),
        (HEAD + "S[m, p] = Q[e, p] * L[e, m]", 2, "tensor 'L', which is never defined"),
        (HEAD + "A[m, p] = B[m, p] * Q[e, p]\nB[m, p] = A[m, p] * 2", 2, "a cycle"),
        (HEAD + "S[m, p] = Q[e, p] * K[m]", 2, r"K\[m\], of another shape than it has"),
        (HEAD + "S[m, p] = Q[e, p] * K[m, e]", 2, "of another shape"),
        (HEAD + "S[m, p] = Q[e, p] * K[e, m]\nS[m, p] = Q[e, p] * K[e, m]", 3, "'S' defined again"),
        (HEAD + "S[m, p, f] = Q[e, p] * K[e, m]", 2, "rank 'f' of S"),
        (HEAD + "S[m] = K[e, m] :: reduce(e: most)", 2, "reduction 'most'"),
        (HEAD + "S[m] = K[e, m] :: reduce(f: max)", 2, "'f', which is not on the right"),
        (HEAD + "S[p] = Q[e, p] * K[e, m] :: reduce(m: max)", 2, "reduce over m alone"),
        (HEAD + "S[m, p] = Q[e, p] * K[e, m", 2, "the end of the line"),
        (HEAD + "S[m, p] = expo(Q[e, p])", 2, "function 'expo'"),
        (HEAD + "S[m, p] = max(Q[e, p])", 2, "max of 1"),
        (HEAD + "S[m, p] = Q[e, p] & K[e, m]", 2, "'&'"),
        (HEAD + "S[m+1, p] = S[m, p] + Q[e, p]", 2, "without a first value"),
        (HEAD + "S[p+1] = S[p] + Q[e, p]\nS[0] = 0", 2, "iteration over 'p'"),
        (HEAD + "S[m, p] = Q[e, p] * K[e, M]", 2, "last coordinate"),
        (HEAD + "T[0, p] = X[p]\nT[m+1, p] = T[m, p] + Q[e, p]\nX[p] = T[M, p]", None, "a cycle"),
        (HEAD + "weight: 3", 2, "'weight:'"),
        (HEAD + "sizes: e = 0\nS[m] = K[e, m]", 2, "size 'e = 0'"),
        (HEAD + "output: T\nS[m] = K[e, m]", 2, "output 'T'"),
        ("keys: m = m1 * m0\n" + HEAD + "S[m0, p] = Q[e, p] * K[e, m1, m0]", 3, "rank 'm0' without 'm1'"),
        (HEAD + "sizes: q = zz\nS[m] = K[e, m]", 2, "unknown rank 'zz'"),
        (HEAD + "sizes: q = 4\nS[m] = K[e, m]", 2, "rank 'q', which no tensor has"),
        (HEAD + "sizes: c = a, a = c\nS[m, c] = K[e, m] * c * a", 2, r"a cycle of sizes \((c = a = c|a = c = a)\)"),
        (HEAD + "sizes: c = c\nS[m, c] = K[e, m] * c", 2, r"a cycle of sizes \(c = c\)"),
        (HEAD + "sizes: e = 4, e = 5\nS[m] = K[e, m]", 2, "a second size of rank 'e'"),
        ("keys: m = m1 * m0\n" + HEAD + "sizes: m0 = 16\nS[m] = K[e, m]", 3, "a size of rank 'm0'"),
        ("inputs:\nS[m] = m", 1, "no input"),
    ],
)
def test_errors_name_the_line_and_the_word(text, line, words):
    with pytest.raises(Unsupported, match=words) as error:
        parse(text)
    assert line is None or f"in line {line} (" in str(error.value)


def test_statements_may_stand_in_any_order():
    head, *statements = [line for line in shipped("one_pass").text.splitlines() if line and line[0] != "#"][2:]
    text = "keys: m = m1 * m0\noutput: AV\n" + "\n".join([head, *reversed(statements)])
    inputs, expected = random_inputs()
    assert (run_cascade(parse(text), inputs, tile=8).output - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"K": torch.zeros(9, 37)}, "9 for rank 'e' of K"),
        ({"K": torch.zeros(37)}, "an axis for each rank"),
        ({"K": torch.zeros(4, 8, 37)}, r"\(4,\) before its ranks"),
        ({"K": torch.zeros(8, 37, dtype=torch.int64)}, "floating-point"),
        ({"K": None}, "without K"),
        ({"k": torch.zeros(8, 37)}, "'k' as an input"),
        ({"K": torch.zeros(8, 0), "V": torch.zeros(5, 0)}, "size 0 of rank 'm'"),
        ({"Q": torch.zeros(2, 8, 7, dtype=torch.float64)}, "several dtypes .*Q of torch.float64, K of torch.float32"),
    ],
)
def test_wrong_inputs_are_refused(changed, words):
    inputs = {"Q": torch.zeros(2, 8, 7), "K": torch.zeros(8, 37), "V": torch.zeros(5, 37)} | changed
    with pytest.raises(Unsupported, match=words):
        run_cascade(shipped("naive"), {name: x for name, x in inputs.items() if x is not None})


@pytest.mark.parametrize("tile", [0, 2.5, "8"])
def test_a_tile_is_a_whole_number_of_keys(tile):
    with pytest.raises(Unsupported, match=r"tile=.*a whole number of keys, 1 or more"):
        run_cascade(shipped("naive"), random_inputs()[0], tile=tile)


def test_a_rank_that_no_input_has_needs_a_size():
    text = "inputs: X[m, d]\n{}Y[p, d] = cos(p * m) * X[m, d]"
    with pytest.raises(Unsupported, match="unknown rank 'p'"):
        parse(text.format(""))
    x = torch.randn(6, 3, dtype=torch.float64)
    n = torch.arange(6, dtype=torch.float64)
    for sizes in ("p = m", "p = 6", "p = q, q = r, r = m", "p = q, q = 6"):
        found = run_cascade(parse(text.format(f"sizes: {sizes}\n")), {"X": x}, tile=4).output
        assert torch.allclose(found, torch.outer(n, n).cos() @ x, atol=1e-12)


def test_a_size_alone_is_a_number_in_expressions():
    x = torch.randn(6, 3, dtype=torch.float64)
    found = run_cascade(parse("inputs: X[m, d]\nsizes: c = 4\nY[m, d] = X[m, d] / C"), {"X": x}).output
    assert torch.equal(found, x / 4)


def test_machines_are_read_and_what_is_wrong_is_said(tmp_path):
    good = (read_machine("fusemax").__dict__) | {"name": "mine"}
    assert machine_of(good) == machine_of(good | {"clock_hz": "940e6"})
    for change, words in (
        ({"cells": 0}, "cells of machine"),
        ({"speed": 3}, "field 'speed'"),
        ({"lane_costs": {"mac": 1}}, "lane_costs"),
        ({"cell_costs": {"fma": 1}}, "cell_costs"),
    ):
        with pytest.raises(Unsupported, match=words):
            machine_of(good | change)
    (tmp_path / "mine.yaml").write_text("cells: [")
    with pytest.raises(Unsupported, match="cannot be read"):
        read_machine(tmp_path / "mine.yaml")
    with pytest.raises(Unsupported, match="fusemax"):
        read_machine("fusemacs")


def test_speeds_of_this_machine_make_a_machine(capsys, monkeypatch):
    speeds = measured_speeds(0.01)
    assert min(speeds.products, speeds.additions, speeds.exponentials, speeds.divisions, speeds.bytes) > 0
    assert caches() == speeds.caches
    machine = this_processor(Speeds(8e9, 4e9, 1e9, 2e9, 1e10, {"L1": 2**15, "L2": 2**20}))
    found = cost(shipped("naive"), machine, {"m": 64, "p": 64, "e": 8, "f": 8})
    points = 64 * 64
    assert found.seconds == pytest.approx(
        (points * (8 + 8 + 8 + 1) + 64 * 8 * 4) / 8e9
    )  # e = 8, f = 8, an exp, a sum; divisions
    monkeypatch.setattr("regard.measurement.speeds.measured_speeds", lambda: speeds)
    assert answer(capsys, "doctor --speeds")["speeds"]["products"] == speeds.products
    assert answer(capsys, "doctor")["speeds"] is None


def test_the_command_gives_class_and_costs_of_a_users_cascade_on_a_users_machine_and_refuses_a_broken_one(
    capsys, tmp_path
):
    mine, broken, machine = tmp_path / "mine.txt", tmp_path / "broken.txt", tmp_path / "chip.yaml"
    mine.write_text(shipped("two_pass_deferred").text)
    broken.write_text(HEAD + "S[m, q] = Q[e, p] * K[e, m]")
    edge = read_machine("edge")
    slower = edge.__dict__ | {"clock_hz": edge.clock_hz / 2, "bytes_per_second": edge.bytes_per_second / 2}
    machine.write_text("\n".join(f"{k}: {v}" for k, v in slower.items() if k != "overlap"))
    line = f"study attention-passes {mine} {machine} edge --mechanisms softmax,reformer --no-timings --seeds 2 --output"
    record = answer(capsys, line, tmp_path / "runs")
    parts = {part["title"]: {row.get("cascade"): row for row in part["rows"]} for part in record["sections"]}
    everything = {"mine.txt", "softmax", *(f"softmax as {name}" for name in SHIPPED)}
    assert set(parts["Classes"]) == set(parts["Costs"]) == everything
    assert parts["Classes"]["mine.txt"]["passes"] == parts["Classes"]["mine.txt"]["in a run"] == 2
    assert parts["Classes"]["softmax"]["passes"] == 1
    assert list(parts["Costs"]["softmax"]) == [
        "cascade", *(f"{unit} on {name}" for unit in ("ms", "GB", "Mcycles") for name in ("chip.yaml", "edge"))
    ]  # fmt: skip
    for name, row in parts["Costs"].items():
        assert row["ms on chip.yaml"] == pytest.approx(2 * row["ms on edge"], rel=1e-12), name
        assert row["GB on chip.yaml"] == row["GB on edge"]
    numbers = [list(parts["Costs"][name].values())[1:] for name in ("mine.txt", "softmax as two_pass_deferred")]
    assert numbers[0] == numbers[1], "the same text costs the same, a user's or ours"
    assert record["outcome"] == "held"
    code, _, said = run(capsys, f"study attention-passes {broken} --output", tmp_path / "none")
    assert code == 2 and "line 2" in said and "'q'" in said and not (tmp_path / "none").exists()
    code, _, said = run(capsys, "study attention-passes --mechanisms local:window=7 --output", tmp_path / "none")
    assert code == 2 and "give the name alone" in said
    for given, words in (("edgy", "try edge"), ("edge edge", "'edge' twice"), (f"{mine} {mine}", "'mine.txt' twice")):
        code, _, said = run(capsys, f"study attention-passes {given} --output", tmp_path / "none")
        assert code == 2 and words in " ".join(said.split())


def test_errors_in_a_users_cascade_name_the_file_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("good.txt").write_text(shipped("naive").text)
    Path("mine/cycle.txt").write_text(HEAD + "A[m, p] = B[m, p] * Q[e, p]\nB[m, p] = A[m, p] * 2")
    for given, words in (
        ("mine/cycle.txt", r"mine/cycle\.txt: a cycle .* in line [23] \("),
        ("mine/nothing.txt", "'mine/nothing.txt', which does not exist"),
        ("mine", "'mine', which cannot be read as text"),
    ):
        with pytest.raises(Unsupported, match=words):
            get_study("attention-passes").make(Chosen("tiny", ("softmax",), ("good.txt", given)))


def test_a_byte_order_mark_is_no_part_of_a_users_cascade(tmp_path):
    text = HEAD + "S[m, p] = Q[e, p] * K[e, m]\n"
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8-sig")
    made = get_study("attention-passes").make(Chosen("tiny", ("softmax",), (str(tmp_path / "mine.txt"),)))
    assert made.settings["file mine.txt"]["text"] == text


def test_every_cascade_costs_what_its_heads_cost_together_on_the_designs_machines():
    workload = WORKLOADS["BERT"]
    sizes = {"m": 4096, "p": 4096, "e": workload.dim, "f": workload.dim_value}
    for name in SHIPPED:
        for machine in map(read_machine, ("fusemax", "flat", "edge")):
            found = costed(shipped(name), machine)
            expected = cost(shipped(name), machine, sizes, workload.batch * workload.heads)
            assert (found["seconds"], found["bytes"]) == (expected.seconds, expected.bytes)
            assert found["cycles"] == sum(expected.cycles.values())
    assert costed(shipped("one_pass"), read_machine("fusemax"))["bytes"] == estimate("binding", workload, 4096).bytes


def test_this_processor_is_a_machine_that_is_measured_when_its_costs_are_and_left_out_without_timings(
    capsys, tmp_path, monkeypatch
):
    speeds = Speeds(8e9, 4e9, 1e9, 2e9, 1e10, {"L2": 2**20})
    measured = []
    monkeypatch.setattr("regard.studies.attention_passes.cells.measured_speeds", lambda s: measured.append(s) or speeds)
    made = get_study("attention-passes").make(Chosen("tiny", ("softmax",), ("this-processor",)))
    assert not measured and "machine this-processor" in made.timings
    cell = made.run_cell(made.settings["machine this-processor"], 0)
    for name in SHIPPED:
        assert cell[f"cascade {name}"] == costed(shipped(name), this_processor(speeds))
    line = "study attention-passes this-processor --mechanisms softmax --no-timings --seeds 1 --output"
    titles = [part["title"] for part in answer(capsys, line, tmp_path)["sections"]]
    assert "Classes" in titles and "Costs" not in titles and len(measured) == 1


@pytest.mark.parametrize("without", [False, True])
def test_a_plugin_enters_with_its_cascade_and_without_one_by_name(capsys, tmp_path, without):
    file, text = tmp_path / "rectified.py", (EXAMPLES / "rectified.py").read_text()
    file.write_text(text.replace("CASCADE =", "SOMETHING =") if without else text)
    line = f"study attention-passes --plugin {file} --mechanisms rectified --no-timings --seeds 1 --output {tmp_path / 'runs'}"
    try:
        parts = {part["title"]: part["rows"] for part in answer(capsys, line)["sections"]}
        (row,) = [row for row in parts["Classes"] if row["cascade"] == "rectified"] or [None]
        if without:
            assert parts["Without a cascade"][0]["mechanism"] == "rectified" and row is None
        else:
            assert row["passes"] == 1 and row["off by"] < 1e-12
            assert "rectified" in {row["cascade"] for row in parts["Costs"]}
    finally:
        catalogue.unregister("rectified")


def test_a_module_without_a_card_enters_by_name(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n\nclass Sums(torch.nn.Module):\n    def forward(self, x):\n        return x.cumsum(1)\n"
    )
    try:
        told = answer(
            capsys, f"study attention-passes --plugin {file}:Sums --mechanisms Sums --table --output {tmp_path}"
        )
    finally:
        catalogue.unregister("Sums")
    (part,) = told["sections"]
    assert part["title"] == "Without a cascade"
    assert part["rows"][0]["mechanism"] == "Sums" and "no definition" in part["rows"][0]["why"]


def test_every_part_is_measured_and_shown():
    study = get_study("attention-passes")
    chosen = study.choose(mechanisms="clipped_softmax", data=["edge", "this-processor"])
    made = study.make(chosen)
    cells = {(name, 0): made.run_cell(setting, 0) for name, setting in made.smoke_settings().items()}
    timed = cells["this processor", 0]
    assert all(value > 0 and math.isfinite(value) for value in timed["softmax measured"] + timed["softmax predicted"])
    assert study.sections(chosen, {}) == []
    titles = [part.title for part in study.sections(chosen, cells)]
    assert titles == ["Classes", "Costs", "Remarks", "Designs", "Buffers", "Interleaving", "This processor"]
