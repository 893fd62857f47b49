"""The published figures of devices.

They limit a measurement or an estimate.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of one device, as JAX counts devices.

    Attributes:
      flops: FLOP/s of bfloat16 products, without sparsity.
      memory: bytes.
      memory_bandwidth: bytes a second.
      link: bytes a second, one way, to one neighbour; of a GPU, to all others in its box.
      network: bytes a second, one way, to devices of other slices; of a GPU, of other boxes.
      ring: an axis of a slice closes into a ring where its length is a multiple of this.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    ring: int | None = None


GIB = 2.0**30
# The key is `jax.Device.device_kind`, exactly: an A100 of 40 GB is not an A100 of 80 GB.
# TPU: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x. `link` is the "bidirectional ICI
# bandwidth per chip" divided by both ways and 4 or 6 ports; `network` is the bandwidth of a host's
# cards divided by its chips. A TPU7x chip is two devices.
# GPU: NVIDIA's data sheets of A100, H100 and H200, all SXM. `link` is NVLink one way; `network` is
# one 400 Gbit/s card for each GPU, 200 for an A100.
_V5E = Chip(197e12, 16 * GIB, 819e9, 50e9, 3.125e9, ring=16)
_V5P = Chip(459e12, 95 * GIB, 2765e9, 100e9, 6.25e9, ring=4)
_V6E = Chip(918e12, 32 * GIB, 1638e9, 100e9, 12.5e9, ring=16)
CHIPS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Chip(2307e12 / 2, 192 * GIB / 2, 7380e9 / 2, 100e9 / 2, 12.5e9 / 2, ring=4),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9, 25e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9, 50e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9, 50e9),
}


def find_chip(device_kind: str) -> Chip | None:
    """Looks up the figures of a device by `jax.Device.device_kind`.

    Returns None where the table has none.
    """
    return CHIPS.get(device_kind)
