"""Tasks of the Comprehensive Attention Benchmark: what is hidden, and measures that are right in hand-computed cases."""

import itertools

import numpy as np
import pytest
import torch
from recordings import write_recordings
from task_data import refused, save_json, words

from regard.models import Encoder, config_for
from regard.tasks import IGNORED, Batch, create_task
from regard.tasks.completion import nearest
from regard.tasks.shapes import on_mesh, read_mesh, superquadrics
from regard.tasks.speech import cepstra, warped_distance
from regard.tasks.summarize import rouge_l, rouge_n
from regard.tasks.upscale import structural_similarity


@pytest.fixture
def text(tmp_path):
    return save_json(tmp_path / "a.jsonl", [{"text": f"{i} {words(80, i)}"} for i in range(40)])


def test_a_share_of_the_tokens_is_hidden_and_they_alone_have_targets(text):
    task = create_task("masked", data=text, length=200, share=0.3)
    plain = create_task("text", data=text, length=200)
    hidden, masked, kept = 0, 0, 0
    for step in range(20):
        batch, whole = task.training_batch(step, 3, 16), plain.training_batch(step, 3, 16).inputs
        told = batch.targets != IGNORED
        assert torch.equal(batch.inputs[~told], whole[~told])
        assert torch.equal(batch.targets[told], whole[told])
        hidden += int(told.sum())
        masked += int((batch.inputs == task.mask_token).sum())
        kept += int((batch.inputs[told] == whole[told]).sum())
    assert hidden / (20 * 16 * 200) == pytest.approx(0.3, abs=0.01)
    assert masked / hidden == pytest.approx(0.8, abs=0.02)
    assert kept / hidden == pytest.approx(0.1, abs=0.02)


def test_each_window_has_something_to_tell(text):
    task = create_task("masked", data=text, length=3, share=0.01)
    assert (task.training_batch(0, 0, 50).targets != IGNORED).any(1).all()


def test_the_rule_of_masked_text_knows_neighbours(tmp_path):
    data = save_json(tmp_path / "b.jsonl", [{"text": f"{i:02d}" + "abcdefgh" * 40} for i in range(20)])
    task = create_task("masked", data=data, length=64)
    assert task.baseline.score < 1.5  # 8 letters in order are easy unless neighbours are hidden too
    config = config_for(task, ["softmax"], dim=16, num_heads=2, max_length=64, positions="auto")
    model = Encoder(config)
    output = model(task.training_batch(0, 0, 2).inputs).output
    assert output.shape == (2, 64, task.vocab_size)


@pytest.mark.parametrize("data", [None, "shapes"])
def test_psnr_and_ssim_of_hand_cases(data):
    if data is None:
        pytest.importorskip("sklearn")
        pytest.importorskip("PIL")
    task = create_task("upscale", data=data, size=16, evaluation_items=4)
    batch = next(iter(task.evaluation_batches(4)))
    perfect = task.score(batch.targets, batch)[0]
    assert perfect.tolist() == [100.0] * 4
    assert task.figures(batch.targets, batch)["SSIM"][0].tolist() == pytest.approx([1.0] * 4)
    clear = Batch(torch.full((1, 256, 3), 0.5), torch.zeros(1, 256, 3), grid=(16, 16))
    assert float(task.score(torch.full((1, 256, 3), 0.1 / task.unit), clear)[0]) == pytest.approx(20, rel=1e-5)
    x = torch.rand(2, 3, 20, 20, dtype=torch.float64)
    assert structural_similarity(x, x).tolist() == pytest.approx([1, 1])
    assert (structural_similarity(x, 1 - x) < 0.2).all()
    inputs = batch.inputs.mT.unflatten(-1, (16, 16))
    whole = inputs + task.unit * batch.targets.mT.unflatten(-1, (16, 16))
    assert -1e-6 < whole.min() < 0.2 and 0.8 < whole.max() < 1 + 1e-6  # pictures again
    drawn = task.training_batch(0, 0, 256).targets
    assert 0.8 < drawn.square().mean().sqrt() < 1.25  # the unit is typical of what is trained on


def test_even_a_linear_filter_sharpens_drawn_shapes():
    task = create_task("upscale", data="shapes", size=16, factor=2, evaluation_items=64)

    def around(batch):
        pictures = batch.inputs.mT.unflatten(-1, task.grid).flatten(0, 1)[:, None]
        seen = torch.nn.functional.unfold(torch.nn.functional.pad(pictures, [2] * 4, "replicate"), 5).mT
        return (seen - seen[..., 12:13]).double()

    batch = task.training_batch(0, 0, 256)
    weights = torch.linalg.lstsq(
        around(batch).flatten(0, 1), batch.targets.mT.flatten()[:, None].double(), driver="gelsd"
    ).solution
    (held,) = task.evaluation_batches(64)
    found = (around(held) @ weights)[..., 0].unflatten(0, (64, 3)).mT
    assert task.score(found, held)[0].mean() > task.baseline.score + 0.2
    other = create_task("upscale", data="shapes", size=16, factor=2, evaluation_items=64, seed=1)
    assert not torch.equal(next(iter(other.evaluation_batches(64))).inputs, held.inputs)


def test_differences_have_a_unit_even_where_all_photos_are_of_one_colour(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name, colour in (("a.png", (10, 200, 30)), ("b.png", (200, 10, 30))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    task = create_task("upscale", size=16, data=tmp_path, evaluation_items=4)
    assert task.training_batch(0, 0, 2).targets.isfinite().all() and task.baseline.score > 40


def test_photos_and_meshes_that_are_there_twice_are_not_held_out_too(tmp_path):
    rng = np.random.default_rng()
    Image = pytest.importorskip("PIL.Image")
    photos, meshes = tmp_path / "photos", tmp_path / "meshes"
    photos.mkdir()
    meshes.mkdir()
    for at, name in enumerate("abcc"):
        if at < 3:
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            corners = "\n".join("v {} {} {}".format(*point) for point in rng.random((3, 3)))
        Image.fromarray(pixels).save(photos / f"{at}{name}.png")
        (meshes / f"{'z' if at < 3 else 'a'}{at}.obj").write_text(f"{corners}\nf 1 2 3\n")
    task = create_task("upscale", size=16, data=photos, evaluation_items=4)
    assert "1 repeated one left out" in task.describe()
    training, held_out = (torch.stack(list(each)) for each in (task._training, task._held_out))
    assert len(training) == 2 and not any(
        torch.equal(tile, photo[:, :16, :16]) for photo in training for tile in held_out
    )
    training, held_out = create_task("completion", length=16, seen=8, data=meshes, evaluation_items=4)._meshes
    assert (len(training), len(held_out)) == (2, 1)
    assert not any(np.array_equal(one, other) for one in training for other in held_out)
    for path in (photos / "0a.png", photos / "1b.png"):
        path.unlink()
    refused(lambda: create_task("upscale", size=16, data=photos), "with one photo")


def test_chamfer_distances_of_hand_cases():
    task = create_task("completion", length=32, seen=16, evaluation_items=3)
    batch = next(iter(task.evaluation_batches(3)))
    same = batch.targets[:, torch.randperm(32)]
    assert task.score(same, batch)[0].tolist() == pytest.approx([0] * 3, abs=1e-3)
    assert task.figures(same, batch)["F-score"][0].tolist() == [1.0] * 3
    one, other = torch.zeros(1, 2, 3), torch.zeros(1, 3, 3)
    one[0, 1, 0], other[0, 2, 0] = 3.0, 1.0
    there, back = nearest(one.double(), other.double())
    assert there.tolist()[0] == pytest.approx([0, 2], abs=1e-6)
    assert back.tolist()[0] == pytest.approx([0, 0, 1], abs=1e-6)


def test_the_gradient_of_the_chamfer_distance_is_that_of_the_distances():
    task = create_task("completion", length=12, seen=8, evaluation_items=2)
    batch = next(iter(task.evaluation_batches(2)))
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: task.loss(x, batch)[0], (x,))


def test_clouds_are_of_one_size_and_what_is_seen_is_one_side():
    task = create_task("completion", length=300, seen=100, evaluation_items=4)
    for batch in task.evaluation_batches(2):
        assert batch.targets.norm(dim=-1).max() <= 1 + 1e-6
        for seen in batch.memory:
            normal = torch.linalg.lstsq(seen, torch.ones(len(seen), 1)).solution
            assert (seen @ normal > 0).float().mean() > 0.9
        assert torch.cdist(batch.memory, batch.targets).min() > 1e-6  # copying what is seen is no answer
    cloud = superquadrics(np.random.default_rng(), 500)
    assert np.isfinite(cloud).all()
    assert cloud.shape == (500, 3)


def test_meshes_are_read_and_points_lie_on_their_triangles(tmp_path):
    corners = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    faces = [(1, 2, 3), (1, 2, 4), (1, 3, 4)]
    lines = [f"v {x} {y} {z}" for x, y, z in corners] + [f"f {a}/1 {b}/2 {c}/3" for a, b, c in faces]
    (tmp_path / "a.obj").write_text("\n".join(lines))
    triangles = np.array([[corners[i - 1] for i in face] for face in faces], dtype="<f4")
    rows = np.zeros(3, np.dtype([("n", "<f4", 12), ("m", "<u2")]))
    rows["n"][:, 3:] = triangles.reshape(3, 9)
    (tmp_path / "b.stl").write_bytes(bytes(80) + (3).to_bytes(4, "little") + rows.tobytes())
    for name in ("a.obj", "b.stl"):
        found = read_mesh(tmp_path / name)
        assert np.array_equal(found, triangles)
        points = on_mesh(found, np.random.default_rng(), 200)
        assert np.abs(points).min(1).max() < 1e-12  # each face is in a coordinate plane
        assert points.min() >= 0
        assert points.sum(1).max() <= 1 + 1e-9
    refused(lambda: create_task("completion", data=tmp_path), "two or more different shapes")
    (tmp_path / "c.obj").write_text("\n".join([*lines, "f 2 3 4"]))
    task = create_task("completion", data=tmp_path, length=16, seen=8, evaluation_items=2)
    assert task.training_batch(0, 0, 2).targets.shape == (2, 16, 3)
    (tmp_path / "b.stl").write_bytes(b"solid")
    refused(lambda: create_task("completion", data=tmp_path), "b.stl, which cannot be read as a mesh")
    for name in ("b.stl", "c.obj"):
        (tmp_path / name).unlink()
    refused(lambda: create_task("completion", data=tmp_path), "with 1 mesh file")


def test_warping_finds_the_cheapest_path():
    def brute(distance, i=0, j=0):
        ends = [(i + 1, j), (i, j + 1), (i + 1, j + 1)]
        steps = [(a, b) for a, b in ends if a < distance.shape[0] and b < distance.shape[1]]
        return distance[i, j] + (min(brute(distance, a, b) for a, b in steps) if steps else 0)

    rng = np.random.default_rng()
    for n, m in itertools.product((1, 2, 5), (1, 3, 4)):
        distance = rng.random((n, m))
        assert warped_distance(distance) == pytest.approx(brute(distance))


def test_what_was_said_itself_has_no_distance(tmp_path):
    write_recordings(tmp_path)
    task = create_task("speech", data=tmp_path, length=40, digits=2, evaluation_items=5)
    batch = next(iter(task.evaluation_batches(5)))
    said = batch.targets.nan_to_num(0)
    assert task.score(said, batch)[0].abs().max() < 1e-5
    assert task.figures(said, batch)["MSD"][0].abs().max() < 1e-5
    slower = said.clone()
    slower[:, 1:] = said[:, :-1]  # one frame late, which alignment mostly forgives
    straight = (said - slower).square().mean().sqrt()
    assert 0 < task.figures(slower, batch)["MSD"][0].mean() < straight * task._deviation.mean() * 2
    constant = torch.full((3, 40), 2.0, dtype=torch.float64)
    assert cepstra(constant).abs().max() < 1e-12


def test_phrases_of_training_are_not_held_out(tmp_path):
    write_recordings(tmp_path)
    task = create_task("speech", data=tmp_path, length=32, digits=2, evaluation_items=9)
    held_out = {batch.memory[i].numpy().tobytes() for batch in task.evaluation_batches(4) for i in range(batch.size)}
    for step in range(10):
        assert not held_out & {row.numpy().tobytes() for row in task.training_batch(step, 0, 16).memory}


def test_folders_without_recordings_are_refused(tmp_path):
    refused(lambda: create_task("speech", data=tmp_path), "without recordings", "DIGIT_SPEAKER_TAKE.wav")
    write_recordings(tmp_path)
    (tmp_path / "3_ann_0.wav").unlink()
    (tmp_path / "3_ann_1.wav").unlink()
    refused(lambda: create_task("speech", data=tmp_path), "without 3 of ann")


def test_recordings_that_cannot_be_read_are_refused_with_the_reason(tmp_path):
    write_recordings(tmp_path)
    file = tmp_path / "3_ann_0.wav"
    whole = file.read_bytes()
    samples = (len(whole) - 44) // 2
    for content, why in (
        (b"", "it ends within its header"),
        (whole[:30], "it ends within its header"),
        (whole[:-501], f"it ends after {samples - 251:,} of {samples:,} samples"),
        (whole[:40] + bytes(4), "no samples"),
        (b"OggS" + whole[4:], "file does not start with RIFF"),
        (whole[:22] + b"\2\0" + whole[24:32] + b"\4\0" + whole[34:], "16 bits and 2 channels"),
    ):
        file.write_bytes(content)
        refused(lambda: create_task("speech", data=tmp_path), f"{file}, which cannot be read ({why}", "WAV of 16 bits")


def test_rouge_of_hand_cases():
    said = "the cat sat on the mat"
    for n in (1, 2):
        assert rouge_n(said, said, n) == 100
    assert rouge_n("the the the", "the cat", 1) == pytest.approx(200 / 5)
    assert rouge_n("a b c d", "b c x", 2) == pytest.approx(200 / 5)
    assert rouge_n("", said, 1) == rouge_n("one", said, 2) == 0
    assert rouge_l("the cat the mat", said) == pytest.approx(200 * 4 / 10)


@pytest.mark.parametrize("name", ["upscale", "completion", "speech"])
def test_tasks_of_a_folder_refuse_anything_else(tmp_path, name):
    file = tmp_path / "a.txt"
    file.write_text("x")
    for data in (file, [str(tmp_path), str(tmp_path)], tmp_path / "none"):
        refused(lambda data=data: create_task(name, data=data), "which is not a folder", "one folder of")
