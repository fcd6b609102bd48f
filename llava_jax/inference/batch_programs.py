"""The jitted programs of a continuous batch, each built once for an engine; `pool` and `rows` say what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.compiling import LoggedJit
from llava_jax.inference import pool, rows
from llava_jax.inference.pool import Pool
from llava_jax.inference.rows import Rows
from llava_jax.models.llava_llama import LlavaLlamaForCausalLM
from llava_jax.parallel.sharding import BATCH_AXES, dividing_axes


class BatchPrograms:
    """Those of one model on one mesh. `program(name, function, **options)` makes one.

    What a program gives is placed as what the next one is compiled for, whoever made it.
    """

    def __init__(self, program: Callable[..., LoggedJit], model: LlavaLlamaForCausalLM, mesh: Mesh | None):
        self._model, self._mesh = model, mesh
        self._makers: dict[tuple, Callable] = {}  # of empty pools and rows

        def of_model(name: str, function, place: Callable, **options) -> LoggedJit:
            return program(name, _then(place, partial(function, model)), **options)

        by_shard, pools, rows_in = self._place_by_shard, self._place_pool, self._place_rows
        self.embed_text = of_model("text", pool.embed_text, by_shard)
        self.place_image = of_model("image", pool.place_image, by_shard, donate_argnums=1)
        self.prefill_first = of_model("first chunk", pool.prefill_first, pools, static_argnums=0, donate_argnums=2)
        self.prefill_next = of_model("next chunk", pool.prefill_next, pools, static_argnums=0, donate_argnums=2)
        self.copy_slot = program("copy", _then(pools, pool.copy_slot), static_argnums=1, donate_argnums=0)
        self.admit = of_model("admission", rows.admit, rows_in, updates_suffix=True, donate_argnums=3)
        self.decode = of_model(
            "decoding", rows.decode, rows_in, updates_suffix=True, static_argnums=0, donate_argnums=4
        )
        move = _then(rows_in, rows.move)
        self.move = program("move", move, updates_suffix=True, static_argnums=2, donate_argnums=(0, 1))
        self.score = of_model("scores", rows.score, by_shard, static_argnums=2)

    @property
    def compiled(self) -> int:
        """How many programs there are by now."""
        programs = (value for value in vars(self).values() if isinstance(value, LoggedJit))
        return sum(len(program.compiled_for) for program in programs)

    def pool_shapes(self, groups: int, capacity: int, dtype) -> Pool:
        """What `empty_pool` gives, as `ShapeDtypeStruct`s on the mesh."""
        return self._shapes(self._make_pool(groups, capacity, dtype), self._pool_specs)

    def rows_shapes(self, groups: int, count: int, slots: int, dtype) -> Rows:
        """What `empty_rows` gives, as `ShapeDtypeStruct`s on the mesh."""
        return self._shapes(self._make_rows(groups, count, slots, dtype), self._rows_specs)

    def empty_pool(self, groups: int, capacity: int, dtype) -> Pool:
        """`pool.empty_pool`, on the mesh."""
        size = groups, capacity, dtype
        return self._made(("pool", *size), self._make_pool(*size), self._pool_specs)

    def empty_rows(self, groups: int, count: int, slots: int, dtype) -> Rows:
        """`rows.empty_rows`, on the mesh."""
        size = groups, count, slots, dtype
        return self._made(("rows", *size), self._make_rows(*size), self._rows_specs)

    def _make_pool(self, groups: int, capacity: int, dtype) -> Callable[[], Pool]:
        return partial(pool.empty_pool, self._model.config.text, groups, capacity, dtype, self._model.int8_prefix)

    def _make_rows(self, groups: int, count: int, slots: int, dtype) -> Callable[[], Rows]:
        return partial(rows.empty_rows, self._model.config.text, groups, count, slots, dtype)

    # ---- where arrays are on the mesh

    def _by_shard_specs(self, tree):
        """Of arrays with G, or shards, in front."""
        return jax.tree.map(lambda x: self._spec(x.shape[0]) if x.ndim else PartitionSpec(), tree)

    def _pool_specs(self, shapes: Pool):
        return jax.tree.map(lambda x: self._spec(*x.shape[:2]), shapes)

    def _rows_specs(self, shapes: Rows):
        suffix = replace(self._by_shard_specs(shapes.suffix), keys_values=self._pool_specs(shapes.suffix.keys_values))
        groups, _, words = shapes.said.shape
        by_group, by_word = self._spec(groups, words)
        said = PartitionSpec(by_group, None, by_word)  # as logits are
        return replace(self._by_shard_specs(shapes), suffix=suffix, said=said)

    def _spec(self, groups: int, by_tensor: int | None = None) -> PartitionSpec:
        """Of arrays [G], or [G, what `tensor` divides]."""
        assert self._mesh is not None
        second = () if by_tensor is None else (dividing_axes(self._mesh, ("tensor",), by_tensor),)
        return PartitionSpec(dividing_axes(self._mesh, BATCH_AXES, groups), *second)

    def _place_by_shard(self, tree):
        return self._place(tree, self._by_shard_specs)

    def _place_pool(self, pool: Pool) -> Pool:
        return self._place(pool, self._pool_specs)

    def _place_rows(self, out):
        """All rows that are in what a program gives; the rest is the host's."""

        def place(x):
            return self._place(x, self._rows_specs) if isinstance(x, Rows) else x

        return jax.tree.map(place, out, is_leaf=lambda x: isinstance(x, Rows))

    def _place(self, tree, specs: Callable):
        if self._mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, jax.tree.map(partial(NamedSharding, self._mesh), specs(tree)))

    def _shapes(self, make: Callable, specs: Callable):
        shapes = jax.eval_shape(make)
        if self._mesh is None:
            return shapes
        place = partial(NamedSharding, self._mesh)
        return jax.tree.map(lambda x, spec: x.update(sharding=place(spec)), shapes, specs(shapes))

    def _made(self, key: tuple, make: Callable, specs: Callable):
        """What `make` makes, on the mesh, by a program that is kept for the next batch of that shape."""
        if key not in self._makers:
            shapes = self._shapes(make, specs)
            shardings = None if self._mesh is None else jax.tree.map(lambda x: x.sharding, shapes)
            self._makers[key] = jax.jit(make, out_shardings=shardings)
        return self._makers[key]()


def _then(place: Callable, function: Callable) -> Callable:
    return lambda *args: place(function(*args))
