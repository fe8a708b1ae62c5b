"""Initial latents. Those of decoders that are fitted to their images come from the cache if the fit was done before."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from torch import Tensor, nn

from condense.cache import Cache, cache_folder
from condense.compute import machine
from condense.files import FORMAT, checksum, read_tensors, write_tensors
from condense.names import spelt
from condense.plugins import code_of
from condense.rng import Rng
from condense.synthetic.decode import Decode

WORTH_SECONDS = 5.0
"""A fit that takes less time is not written to the cache."""

_KIND, _FILE = "fit of a decoder", "fit.safetensors"


def encoded(decode: Decode, images: Tensor, classes: Tensor, decoder: nn.Module, rng: Rng) -> Tensor:
    """Return initial latents, and initialise the decoder in place, as ``decode.encode`` does.

    A run that is resumed, or another one with the same initial images, so does not repeat a long fit. An entry of the
    cache has the bits that the fit would have: its key holds everything on which they depend.

    Args:
        decode, images, classes, decoder: as for ``Decode.encode``.
        rng: draws under the name ``decoder``.

    Raises:
        ValueError: the fit diverged.
    """
    if not decode.fits:
        return decode.encode(images, classes, decoder, rng.generator("decoder"))
    cache = Cache(cache_folder(), "fits")
    fields = {name: value for name, value in dataclasses.asdict(decode).items() if name not in decode.used_later}
    key = {
        "decode": {"name": decode.name, **fields},
        "start": checksum({"images": images, "classes": classes, **decoder.state_dict()}),
        **rng.identity(),
        "machine": machine(images.device),
        "code": code_of(type(decode).__module__),
    }

    def read(folder: Path) -> Tensor:
        tensors, _ = read_tensors(folder / _FILE, _KIND)
        latents = tensors.pop("latents")
        decoder.load_state_dict({name.removeprefix("decoder."): tensor for name, tensor in tensors.items()})
        return latents.to(images.device)

    if (stored := cache.read(key, read)) is not None:
        return stored
    begun = time.perf_counter()
    latents = decode.encode(images, classes, decoder, rng.generator("decoder"))
    if not all(tensor.isfinite().all() for tensor in (latents, *decoder.state_dict().values())):
        raise ValueError(
            f"the fit of the decoder {decode.name} to the initial images diverged; give a smaller "
            f"{spelt('decode.fit_lr', kind=type(decode).__name__)}"
        )
    if time.perf_counter() - begun >= WORTH_SECONDS:
        tensors = {"latents": latents, **{f"decoder.{name}": t for name, t in decoder.state_dict().items()}}
        header = {"kind": _KIND, "format": FORMAT}
        about = f"{decode.name}, {len(images)} images"
        cache.write(key, lambda folder: write_tensors(folder / _FILE, tensors, header), about=about)
    return latents
