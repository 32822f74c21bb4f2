"""Where arrays live: on one device, or rows spread over those of a mesh and all else on each of them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

#: The axis of a mesh over which rows are spread.
ROWS = "data"


class Layout(NamedTuple):
    """Hashable, so that it is static where programs are compiled.

    :ivar mesh: ``None`` is the default device.
    """

    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        """Into how many parts rows are split."""
        return 1 if self.mesh is None else int(self.mesh.shape[ROWS])

    @property
    def hosts(self) -> int:
        """How many processes hold a share of the rows each."""
        return 1 if self.mesh is None else len({device.process_index for device in self.mesh.devices.flat})

    def rows(self, tree: Any, axis: int = 0) -> Any:
        """This process's rows, as part of arrays over all processes', spread along ``axis``."""
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, tree)
        sharding = self._sharding(axis)
        return jax.tree.map(lambda a: _put(a, sharding), tree)

    def whole(self, tree: Any) -> Any:
        """The same arrays on every device."""
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda a: _put(a, sharding), tree)

    def keep_rows(self, tree: Any, axis: int = 0) -> Any:
        """Within a program: arrays that stay spread along ``axis``."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self._sharding(axis))

    def keep_whole(self, tree: Any) -> Any:
        """Within a program: arrays that stay the same on every device."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    def gather(self, tree: Any) -> Any:
        """Rows of all processes, on each of them; NumPy's."""
        if self.hosts == 1:
            return tree
        from jax.experimental.multihost_utils import process_allgather

        return jax.tree.map(lambda a: np.asarray(process_allgather(np.asarray(a), tiled=True)), tree)

    def share(self, name: str, count: int) -> None:
        """Refuses a number of things that the devices cannot share evenly.

        :raises ValueError: naming it.
        """
        if count % self.shards:
            raise ValueError(f"{name} must be a multiple of the mesh's {self.shards} devices; got {count}")

    def of_all(self, note: Any) -> list[Any]:
        """What each process notes, as JSON can say it; the same list on all of them."""
        if self.hosts == 1:
            return [note]
        own = np.frombuffer(json.dumps(note).encode(), np.uint8)
        (longest,) = self.agree(len(own))
        padded = np.pad(own, (0, longest - len(own)), constant_values=ord(" "))
        return [json.loads(row.tobytes()) for row in self.gather(padded[None])]

    def agree(self, *numbers: int) -> tuple[int, ...]:
        """The largest that any process has of each: all then do the same."""
        if self.hosts == 1:
            return numbers
        return tuple(map(int, self.gather(np.array([numbers])).max(0)))

    def _sharding(self, axis: int) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, ROWS))


def as_layout(mesh: Any) -> Layout:
    """The layout over the devices of ``mesh``.

    :raises TypeError, ValueError: naming ``mesh``.
    """
    if mesh is None:
        return Layout()
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh((n,), ('data',)); got {mesh!r}")
    if ROWS not in mesh.axis_names:
        raise ValueError(f"mesh must have an axis named {ROWS!r}, over which rows are spread; got {mesh.axis_names}")
    return Layout(Mesh(mesh.devices, mesh.axis_names))  # axes that the compiler may spread over, as plain jit does


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.make_array_from_process_local_data(sharding, np.asarray(jax.random.key_data(leaf)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))
