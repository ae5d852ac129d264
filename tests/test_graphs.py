"""Graphs of what a tower computes, recorded at few sizes and replayed: the same results, padded, split and packed."""

import pytest
import torch

import lbfast
from lbfast import testing
from lbfast.model import graphs
from tests.counted import launches
from tests.test_model import inputs, load

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Replayed(graphs.Graphs):
    """Records by keeping the function: what a CUDA graph does with its fixed addresses, without one."""

    def _record(self, given):
        result = self.function(given)
        return graphs._Recording(lambda: result.copy_(self.function(given)), given, result)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 9])
def test_graphs_pad_split_and_keep_results(batch):
    calls = []

    def function(x):
        calls.append(len(x))
        return x * 2

    run = Replayed(function, (4, 2, 2))
    x, y = torch.randn(batch, 3), torch.randn(batch, 3)
    device = torch.device("cpu")
    with torch.inference_mode():
        first = run(x, device)
    second = run(y, device)
    torch.testing.assert_close(first, x * 2)  # not overwritten by the second
    torch.testing.assert_close(second, y * 2)
    assert set(calls) <= {2, 4}
    wider = torch.randn(batch, 5)
    torch.testing.assert_close(run(wider, device), wider * 2)


def captions(lengths, columns=77, end=40):
    """ids (B, columns) of these lengths, their last the largest id, and what a tokenizer pads them with."""
    ids = torch.randint(1, end, (len(lengths), columns), generator=torch.Generator().manual_seed(0))
    for row, length in zip(ids, lengths):
        row[length - 1] = end
        row[length:] = 0
    return ids


class Recorded(Replayed):
    """Which says the shapes of what it recorded and of what it was given."""

    def __init__(self, tower, batch_sizes):
        super().__init__(tower.pooled_padded, batch_sizes)
        self.recorded, self.given = [], []

    def __call__(self, batch, device):
        self.given.append(tuple(batch.shape))
        return super().__call__(batch, device)

    def _record(self, given):
        self.recorded.append(tuple(given.shape))
        return super()._record(given)


def recorded_text(batch_sizes=(1, 2, 4)):
    """A text tower without graphs and, of the same weights, one with."""
    plain = load("image").text_model
    ready = lbfast.optimize_for_inference(load("image"), dtype=None, pack_weights=False).text_model
    ready.graphs = Recorded(ready, batch_sizes)
    return plain, ready


def test_captions_are_replayed_by_their_batch_and_length():
    plain, ready = recorded_text()
    batches = [[5], [16, 3], [1, 77, 2, 9], [17, 4, 1], [2, 2], [30, 65], [6, 6, 6, 6]]
    mask = (captions([5]) > 0).long()
    with torch.no_grad():
        for lengths in 2 * batches:
            ids = captions(lengths)
            assert testing.relative_error(ready.pooled(ids), plain(ids)[1]) <= 2e-6, lengths
        narrow = captions([3, 10], columns=10)  # fewer columns than a recording has
        assert testing.relative_error(ready.pooled(narrow), plain(narrow)[1]) <= 2e-6
        assert testing.relative_error(ready.pooled(captions([5]), mask), plain(captions([5]))[1]) <= 2e-6
    shapes = [(1, 16), (2, 16), (4, 77), (4, 24), (2, 77), (4, 16)]
    assert ready.graphs.recorded == shapes
    assert len(ready.graphs.given) == 2 * len(batches) + 2


def test_captions_that_no_graph_takes_are_computed_as_before():
    """More than it has room for, own positions, a mask that hides a token, gradients asked for."""
    plain, ready = recorded_text()
    ids, positions = captions([7, 3]), torch.arange(76, -1, -1)[None]
    hidden = (ids > 0).long()
    hidden[0, 2] = 0
    with torch.no_grad():
        for given in ((captions([4] * 5),), (ids, None, positions), (ids, hidden)):
            assert testing.relative_error(ready.pooled(*given), plain(*given)[1]) <= 2e-6
    assert testing.relative_error(ready.pooled(ids), plain(ids)[1]) <= 2e-6
    assert not ready.graphs.given


@pytest.mark.parametrize(
    ("width", "lengths", "columns"),
    [
        (768, [10] * 64, 16),
        (768, [10] * 63 + [77], 77),  # launching takes longer than computing all the padding
        (1024, [10] * 63 + [77], None),
        (1024, [10] * 31 + [77], 77),  # at a batch of 32 it does there too
        (1024, [77] * 64, 77),  # nothing to gain from packing
        (768, [10] * 65, None),
    ],
)
def test_captions_are_packed_where_computing_takes_longer_than_launching(width, lengths, columns):
    tower = load("image").text_model
    tower.config.hidden_size, tower.config.intermediate_size = width, 4 * width
    tower.graphs = graphs.Graphs(tower.pooled_padded, (1, 2, 4, 8, 16, 32, 64))
    assert tower._columns_to_replay(torch.tensor(lengths)) == columns


@pytest.mark.parametrize("lengths", [[5, 9], [3] * 5])
@pytest.mark.parametrize("masked", [False, True])
def test_captions_in_cpu_memory_wait_for_no_device(lengths, masked):
    """The device is "meta", which has no values to wait for: shapes alone, whether replayed or packed."""
    model = lbfast.optimize_for_inference(load("image").to("meta"), dtype=None, pack_weights=False)
    tower, ids, seen = model.text_model, captions(lengths), []

    class OnMeta(graphs.Graphs):
        def _run(self, batch, device):
            seen.append(batch.device.type)
            return self.function(batch.to(device))

    tower.graphs = OnMeta(tower.pooled_padded, (1, 2, 4))
    mask = (captions(lengths) > 0).long() if masked else None
    with torch.no_grad():
        got = model.get_text_features(ids, mask)
    assert got.device.type == "meta" and got.shape == (len(lengths), model.config.projection_dim)
    assert seen == (["cpu"] if len(lengths) <= 4 else [])


def test_64_captions_are_one_replay(monkeypatch):
    """And copies, of ids on their way in and of what comes out: nothing else is asked of the device."""
    model = lbfast.optimize_for_inference(load("image").to("meta"), dtype=None, pack_weights=False)
    tower = model.text_model

    class Named(graphs.Graphs):
        def _record(self, given):
            return graphs._Recording(lambda: names.append("replay"), given, self.function(given))

    monkeypatch.setattr(graphs, "_Upload", lambda shape, dtype, device: lambda batch: batch.to(device))
    tower.graphs = Named(tower.pooled_padded, (1, 2, 4, 8, 16, 32, 64))
    with launches(monkeypatch, "meta") as names:
        tower.pooled(captions([3, 70] * 32))
        assert len(names) > 20  # recorded
        names.clear()
        tower.pooled(captions([77, 5] * 32))
    assert names == ["_to_copy", "copy_", "replay", "clone"]


@pytest.mark.gpu
def test_cuda_graphs_of_captions_give_the_same():
    model = load("image").cuda()
    batches = [captions(lengths) for lengths in ([5], [16, 3], [1, 77, 2, 9], [17, 4, 1], [6] * 5)]
    with torch.inference_mode():
        want = [model.get_text_features(ids.cuda()) for ids in batches]
        lbfast.optimize_for_inference(model, dtype=None, batch_sizes=(1, 2, 4))
        got = [model.get_text_features(ids.to(where)) for where in ("cpu", "cuda", "cpu") for ids in batches]
    assert len(model.text_model.graphs._recordings) == 4
    for a, b in zip(got, want * 3):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["image", "video_ft"])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_cuda_graphs_give_the_same(case, where):
    model = load(case).cuda()
    pixels = torch.cat([inputs(case)["pixel_values"]] * 3)[:5]
    raw = torch.randint(0, 256, pixels.shape, dtype=torch.uint8)
    batches = [pixels, pixels[:1], pixels.flip(0), pixels[:3], raw, raw[:2]]
    with torch.inference_mode():
        want = [model.get_image_features(batch.cuda()) for batch in batches]
        lbfast.optimize_for_inference(model, dtype=None, batch_sizes=(1, 2, 4))
        got = [model.get_image_features(batch.to(where)) for batch in batches]
    with torch.no_grad():  # buffers of the other mode
        got += [model.get_image_features(batch.to(where)) for batch in batches]
    for a, b in zip(got, want * 2):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
