"""Tiles against the whole run: random sizes, tiles and kinds of network, both directions; and the memory they take."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana.models.autoencoder import streaming
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS, DCAEConfig
from sana.models.autoencoder.dc_ae_layers import RMSNorm2d
from sana.models.autoencoder.halo import halo
from sana.models.autoencoder.loading import load_autoencoder
from sana.models.autoencoder.streaming import Convolutions, Piece, pieces, stream
from sana.models.autoencoder.tiling import Tiling
from sana.models.layers.residency import slots_below
from sana.models.layers.schedule import Residency
from sana.pipelines.offload_units import units_of
from tests.models.autoencoder.test_dc_ae import RES, SMALL, VIT, VIT5, randomise
from tests.models.autoencoder.test_halo import at_the_image, reduced
from tests.models.layers.stand_in import StandIn

BUNDLED = Path(__file__).parents[3] / "asset" / "models" / "sana_tiny"
RMS, MOST = 1e-6, 1e-5  # of the whole run's RMS, and of its range
DEPTHS = {"encoder_depth_list": (0, 2, 1, 2, 1, 1), "decoder_depth_list": (0, 1, 6, 1, 1, 1)}
KINDS = {
    **SMALL,
    "f32c32 of Sana": reduced(DCAE_PRESETS["dc-ae-f32c32-sana-1.0"]),
    "f32c32": reduced(DCAE_PRESETS["dc-ae-f32c32-in-1.0"], **DEPTHS),
    "f64c128": reduced(
        DCAE_PRESETS["dc-ae-f64c128-in-1.0"], **{name: (*depths, 1) for name, depths in DEPTHS.items()}
    ),
    "f128c512": reduced(
        DCAE_PRESETS["dc-ae-f128c512-in-1.0"], **{name: (*depths, 1, 1) for name, depths in DEPTHS.items()}
    ),
    "attention everywhere": DCAEConfig(
        latent_channels=4, encoder_width_list=(8, 8), encoder_depth_list=(1, 2), encoder_block_type=VIT5, head_dim=4,
        encoder_act="gelu", decoder_width_list=(8, 8), decoder_depth_list=(2, 1), decoder_block_type="EViTS3S7_GLU",
    ),
    "convolutions between attention": DCAEConfig(
        latent_channels=4, encoder_width_list=(8, 8, 8, 8), encoder_depth_list=(1, 1, 1, 1), head_dim=4,
        encoder_block_type=(RES, VIT, RES, VIT5), decoder_width_list=(8, 8, 8, 8), decoder_depth_list=(1, 1, 2, 1),
        decoder_block_type=(VIT5, RES, VIT, RES), decoder_norm="bn2d", encoder_norm="bn2d",
        downsample_block_type="Conv", upsample_block_type="InterpolateConv",
    ),
}  # fmt: skip
MADE_UP = ("attention everywhere", "convolutions between attention")  # which multiply float32's own rounding
NETWORKS: dict[str, DCAE] = {}


def network(kind: str) -> DCAE:
    """One network of a kind, with random weights, frozen."""
    if kind not in NETWORKS:
        NETWORKS[kind] = DCAE(KINDS[kind]).eval().requires_grad_(False)
        randomise(NETWORKS[kind])
    return copy.deepcopy(NETWORKS[kind])


def both(model: DCAE, x: Tensor, tiling: Tiling, *, encodes: bool) -> tuple[Tensor, Tensor]:
    """What tiles make of images or latents, and what the network makes of them whole, by `encode` or `decode`."""
    run = model.encode if encodes else model.decode
    model.disable_tiling()
    with torch.no_grad():
        whole = run(x)
        model.tiling = tiling
        return run(x), whole


def assert_exact(actual: Tensor, expected: Tensor, rms: float = RMS, most: float = MOST) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert actual.is_contiguous()
    error, expected = (actual - expected).double(), expected.double()
    ratio = float(error.square().mean().sqrt() / expected.square().mean().sqrt())
    assert ratio <= rms, f"RMS ratio {ratio:.1e} exceeds {rms:.0e}"
    ratio = float(error.abs().max() / (expected.max() - expected.min()))
    assert ratio <= most, f"greatest difference {ratio:.1e} of the range exceeds {most:.0e}"


def random_input(model: DCAE, batch: int, height: int, width: int, *, encodes: bool) -> Tensor:
    """Random images, or latents, of a size given in pixels of the latents."""
    factor = model.downsample_factor
    shape = (3, height * factor, width * factor) if encodes else (model.latent_channels, height, width)
    return torch.randn(batch, *shape)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_make_what_the_whole_makes(kind: str, encodes: bool, data: st.DataObject) -> None:
    model = network(kind)
    most = max(2, 128 // model.downsample_factor)
    height, width, tall, wide = (data.draw(st.integers(1, most)) for _ in range(4))
    if data.draw(st.booleans()):  # a strip
        height = 1
    layout = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    factor, batch = model.downsample_factor, data.draw(st.sampled_from([1, 1, 2]))
    tiling = Tiling(factor, factor, tall * factor, wide * factor)
    x = random_input(model, batch, height, width, encodes=encodes)
    model.to(memory_format=layout)
    if kind in MADE_UP:
        assert_exact(*both(model.double(), x.double(), tiling, encodes=encodes), rms=1e-12, most=1e-12)
    else:
        assert_exact(*both(model, x, tiling, encodes=encodes))


@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("kind", ["f32c32 of Sana", "imagenet", "convolutions between attention"])
def test_as_on_other_devices(kind: str, encodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the forms that a CPU has for inference, in the layout of a GPU, several images at once."""
    monkeypatch.setattr("sana.ops.backend._is_cpu_inference", lambda x: False)
    model = network(kind).double()
    size = model.downsample_factor
    x = random_input(model, 2, 3, 5, encodes=encodes).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        assert_exact(*both(model, x, Tiling(size, size, 2 * size, size), encodes=encodes), rms=1e-12, most=1e-12)
        units, run = (model.encoder.units(), model.encoder) if encodes else (model.decoder.units(), model.decoder)
        batch = stream(units, x, Tiling(1, 1, size, size), factor=1 if encodes else size)
        assert_exact(batch, run(x), rms=1e-12, most=1e-12)


@pytest.mark.parametrize("encodes", [False, True])
def test_under_autocast_and_in_16_bits(encodes: bool) -> None:
    model = network("f32c32 of Sana")
    x, tiling = random_input(model, 1, 3, 4, encodes=encodes), Tiling(32, 32, 64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = both(model, x, tiling, encodes=encodes)
    assert_exact(actual, expected, rms=2e-2, most=5e-2)
    actual, expected = both(model.bfloat16(), x, tiling, encodes=encodes)
    assert actual.dtype == torch.bfloat16
    assert_exact(actual, expected, rms=2e-2, most=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("encodes", [False, True])
def test_at_the_width_of_the_released_one(encodes: bool) -> None:
    """Where sums are so long that other sizes of maps have other kernels; every preset has layers of this width."""
    model = DCAE(DCAE_PRESETS["dc-ae-f32c32-sana-1.0"]).eval().requires_grad_(False)
    x = random_input(model, 1, 5, 6, encodes=encodes)
    for tile in (64, 128):
        assert_exact(*both(model, x, Tiling(32, 32, tile, tile), encodes=encodes))


@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize(("height", "width", "tile"), [(9, 7, 96), (2, 20, 160), (8, 8, 32)])
def test_the_bundled_autoencoder(encodes: bool, height: int, width: int, tile: int) -> None:
    model = load_autoencoder(BUNDLED).eval().requires_grad_(False)
    assert isinstance(model, DCAE)
    images = torch.nn.functional.interpolate(torch.rand(1, 3, height, width) * 2 - 1, scale_factor=32, mode="bicubic")
    with torch.no_grad():
        x = images if encodes else model.encode(images)
    assert_exact(*both(model, x, Tiling(32, 32, tile, tile), encodes=encodes))


def leftward(model: DCAE, run: Convolutions) -> None:
    """Weights that read the column on the left alone, and ever larger: what is farthest away counts like the rest."""
    randomise(model)
    scale = 1.0
    for unit in run.units:
        scale *= 4
        for module in unit.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight[..., 1:] = 0
                module.weight *= 4
            elif isinstance(module, RMSNorm2d):
                module.weight.copy_(module.weight.sign() * scale)
                module.bias *= scale


def test_a_picture_read_as_height_width_colour_is_rounded_alike() -> None:
    autoencoder = load_autoencoder(BUNDLED / "vae").requires_grad_(False)
    picture = torch.rand(512, 512, 3).permute(2, 0, 1)[None] * 2 - 1  # (1, 3, H, W) with the strides of (H, W, 3)
    with torch.no_grad():
        whole = autoencoder.encode(picture)
        assert torch.equal(autoencoder.encode(picture.contiguous()), whole)
        autoencoder.enable_tiling(256, 256, 256, 256)
        assert torch.equal(autoencoder.encode(picture), whole)


def test_one_pixel_less_of_halo_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("f32c32 of Sana")
    run, needed = at_the_image(model, encodes=False), Piece.needed
    leftward(model, run)
    x, tiling = random_input(model, 1, 4, 8, encodes=False), Tiling(32, 32, 128, 128)  # two tiles, side by side
    around, first = halo(run.reach), run.pieces[0].units[0]
    assert around == 7

    def shortened(by: int) -> tuple[Tensor, Tensor]:
        def short(piece: Piece, span: tuple[int, int], size: int) -> tuple[int, int]:
            start, stop = needed(piece, span, size)
            return (size // 2 - around + by if start and piece.units[0] is first else start), stop

        monkeypatch.setattr(Piece, "needed", short)
        return both(model, x, tiling, encodes=False)

    assert_exact(*shortened(0))
    with pytest.raises(AssertionError, match="RMS"):
        assert_exact(*shortened(1))


def test_runs_are_cut_where_the_resolution_changes_and_where_they_are_long() -> None:
    model = DCAE(reduced(DCAE_PRESETS["dc-ae-f32c32-in-1.0"]))
    decoded, encoded = (at_the_image(model, encodes=encodes).units for encodes in (False, True))
    assert [len(piece) for piece in pieces(decoded)] == [3, 4, 4, 3, 3, 1]
    assert [len(piece) for piece in pieces(encoded)] == [1, 5, 4, 5]
    assert [unit for piece in pieces(decoded) for unit in piece] == list(decoded)


class Live(TorchDispatchMode):
    """The most bytes that storages made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @staticmethod
    def storages(values: object) -> list[torch.UntypedStorage]:
        """Of all tensors in `values` but oneDNN's own."""
        found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
        return [tensor.untyped_storage() for tensor in found]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {storage._cdata for storage in self.storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for storage in self.storages(out):
            if storage._cdata not in known | self.live.keys():
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def peak(model: DCAE, x: Tensor, tile: int | None, *, encodes: bool) -> int:
    model.tiling, model._tiles_large = None if tile is None else Tiling(tile, tile, tile, tile), False
    with Live() as live, torch.no_grad():
        (model.encode if encodes else model.decode)(x)
    return live.peak


@pytest.mark.parametrize("encodes", [False, True])
def test_memory_is_that_of_the_maps_at_the_eighth_and_of_one_tile(encodes: bool) -> None:
    """16 channels at /8 grow with the image, and the image that is decoded; the rest is as large as a tile."""
    config = reduced(DCAE_PRESETS["dc-ae-f32c32-sana-1.0"])
    widths = {"encoder_width_list": (8, 8, 16, 16, 16, 16), "decoder_width_list": (8, 8, 16, 16, 16, 16)}
    model = DCAE(dataclasses.replace(config, **widths)).eval().requires_grad_(False)
    sides = (384, 512)  # pixels; cut into three tiles a side or more, so that some have a halo all around
    inputs = [random_input(model, 1, side // 32, side // 32, encodes=encodes) for side in sides]
    for x in inputs:
        peak(model, x, 128, encodes=encodes)  # weights are packed at the first use
    resident = [side**2 * (16 * 4 / 64 + (0 if encodes else 3 * 4)) for side in sides]
    around = 72 if encodes else 16  # pixels of the image that a tile is larger where its maps are largest
    for tile in (64, 128):
        before, after = (peak(model, x, tile, encodes=encodes) for x in inputs)
        assert after - before <= 1.01 * (resident[1] - resident[0])
        assert after - resident[1] <= 3.3 * 8 * 4 * (tile + around) ** 2, "three maps of a tile of 8 channels"
    whole = peak(model, inputs[1], None, encodes=encodes) - resident[1]
    assert whole > 2.5 * 8 * 4 * sides[1] ** 2


class Bar:
    """Stands in for tqdm."""

    made: list["Bar"] = []  # noqa: RUF012  emptied by the test

    def __init__(self, **options: object) -> None:
        self.options, self.count = options, 0
        Bar.made.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, count: int = 1) -> None:
        self.count += count


@pytest.mark.parametrize(
    ("tile", "progress", "disable"), [(32, None, None), (32, True, False), (32, False, True), (256, True, True)]
)
def test_a_bar_counts_tiles_where_there_are_many(
    tile: int, progress: bool | None, disable: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bar.made.clear()
    monkeypatch.setattr(streaming, "tqdm", Bar)
    model = network("f32c32 of Sana")
    model.tiling, model.progress = Tiling(32, 32, tile, tile), progress
    model.decode(torch.randn(1, 8, 4, 4))
    (bar,) = Bar.made
    assert bar.options["disable"] is disable and bar.options["desc"] == "Decoding"
    assert bar.count == bar.options["total"]


@pytest.mark.parametrize("kind", ["f32c32 of Sana", "f64c128"])
@pytest.mark.parametrize("encodes", [False, True])
def test_shapes_are_enough(kind: str, encodes: bool) -> None:
    """A memory model runs it without storage, on devices that are not there."""
    model = network(kind)
    tiling = Tiling(64, 64, 64, 64)
    expected = both(model, random_input(model, 1, 3, 4, encodes=encodes), tiling, encodes=encodes)[0].shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        for device in ("cpu", "cuda"):
            with torch.device(device):
                fake = DCAE(KINDS[kind]).eval().requires_grad_(False)
                x = random_input(fake, 1, 3, 4, encodes=encodes)
            out = both(fake, x, tiling, encodes=encodes)[0]
            assert (out.shape, out.device.type) == (expected, device)


def test_a_compiler_takes_every_piece_as_one_graph_for_all_tiles() -> None:
    model = network("f32c32 of Sana")
    latents = torch.randn(1, 8, 5, 7)
    tiling = Tiling(32, 32, 64, 64)
    _, expected = both(model, latents, tiling, encodes=False)
    torch.compiler.reset()
    graphs, functions = [], {}

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compiled(number, piece):
        if number not in functions:
            functions[number] = torch.compile(piece, backend=backend, dynamic=True, fullgraph=True)
        return functions[number]

    with torch.no_grad():
        raw = latents / model.scaling_factor
        actual = stream(model.decoder.units(), raw, tiling, factor=32, compiler=compiled)
    assert_exact(actual, expected, rms=5e-6)
    assert len(functions) == 3
    assert len(graphs) <= 2 * len(functions), "not one for every size of a tile"


@pytest.mark.parametrize("encodes", [False, True])
def test_weights_that_come_and_go_make_the_same(encodes: bool) -> None:
    """Offloaded, little more is there than the run that is in work."""
    model = network("f32c32 of Sana")
    x, tiling = random_input(model, 1, 3, 4, encodes=encodes), Tiling(32, 32, 64, 64)
    expected, _ = both(model, x, tiling, encodes=encodes)
    residency = Residency(model, units_of("autoencoder", model))
    mover = StandIn()
    residency.offload(mover, group=1)
    model.tiling, run = tiling, model.encode if encodes else model.decode
    with torch.no_grad(), residency.use():
        assert_exact(run(x), expected)  # other kernels: copies that live so short are not packed
    run_at_the_image = sum(
        tensor.nbytes for unit in at_the_image(model, encodes=encodes).units for tensor in unit.state_dict().values()
    )
    assert 0 < mover.peak < 2 * run_at_the_image
    assert not any(slot.resident for slot in slots_below(model))
    residency.close()


@pytest.mark.gpu
@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu_tiles_make_the_same_with_less_memory(encodes: bool, layout: torch.memory_format) -> None:
    model = network("f32c32 of Sana").cuda().to(memory_format=layout)
    x, tiling = random_input(model, 2, 32, 48, encodes=encodes).cuda(), Tiling(256, 256, 256, 256)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_exact(*both(model, x, tiling, encodes=encodes), rms=1e-5, most=1e-4)
    peaks = []
    for chosen in (None, tiling):
        model.tiling, model._tiles_large = chosen, False
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            (model.encode if encodes else model.decode)(x)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] / 2


@pytest.mark.gpu
def test_on_a_gpu_pieces_are_compiled() -> None:
    model = network("f32c32 of Sana").cuda()
    latents = torch.randn(1, 8, 5, 7, device="cuda")
    _, expected = both(model, latents, Tiling(32, 32, 64, 64), encodes=False)
    model.prepare_for_decoding(torch.bfloat16, compile=True)
    model.tiling = Tiling(32, 32, 64, 64)
    with torch.inference_mode():
        actual = model.decode(latents).float()
    assert_exact(actual, expected, rms=5e-2, most=1e-1)
