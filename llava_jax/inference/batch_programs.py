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
    """Those of one model on one mesh. `program(name, function, **options)` makes one."""

    def __init__(self, program: Callable[..., LoggedJit], model: LlavaLlamaForCausalLM, mesh: Mesh | None):
        self._model, self._mesh = model, mesh

        def of_model(name: str, function, **options) -> LoggedJit:
            return program(name, partial(function, model), **options)

        self.embed_text = of_model("text", pool.embed_text)
        self.place_image = of_model("image", pool.place_image, donate_argnums=1)
        self.prefill_first = of_model("first chunk", pool.prefill_first, static_argnums=0, donate_argnums=2)
        self.prefill_next = of_model("next chunk", pool.prefill_next, static_argnums=0, donate_argnums=2)
        self.copy_slot = program("copy", pool.copy_slot, static_argnums=1, donate_argnums=0)
        self.admit = of_model("admission", rows.admit, donate_argnums=3)
        self.decode = of_model("decoding", rows.decode, decodes=True, static_argnums=0, donate_argnums=4)
        self.move = program("move", rows.move, static_argnums=2, donate_argnums=(0, 1))
        self.score = of_model("scores", rows.score, static_argnums=2)

    @property
    def compiled(self) -> int:
        """How many programs there are by now."""
        programs = (value for value in vars(self).values() if isinstance(value, LoggedJit))
        return sum(len(program.compiled_for) for program in programs)

    def empty_pool(self, groups: int, capacity: int, dtype) -> Pool:
        """`pool.empty_pool`, on the mesh."""
        text, int8 = self._model.config.text, self._model.int8_prefix
        make = partial(pool.empty_pool, text, groups, capacity, dtype, int8)
        by_head = self._spec(groups, text.num_key_value_heads)
        return self._made(make, lambda shapes: jax.tree.map(lambda _: by_head, shapes))

    def empty_rows(self, groups: int, count: int, slots: int, dtype) -> Rows:
        """`rows.empty_rows`, on the mesh."""
        text = self._model.config.text
        by_head, by_group = self._spec(groups, text.num_key_value_heads), self._spec(groups)

        def specs(shapes: Rows) -> Rows:
            everywhere = jax.tree.map(lambda x: by_group if x.ndim else PartitionSpec(), shapes)
            keys_values = jax.tree.map(lambda _: by_head, shapes.suffix.keys_values)
            return replace(everywhere, suffix=replace(everywhere.suffix, keys_values=keys_values))

        return self._made(partial(rows.empty_rows, text, groups, count, slots, dtype), specs)

    def _spec(self, groups: int, kv_heads: int | None = None) -> PartitionSpec:
        if self._mesh is None:
            return PartitionSpec()
        heads = () if kv_heads is None else (dividing_axes(self._mesh, ("tensor",), kv_heads),)
        return PartitionSpec(dividing_axes(self._mesh, BATCH_AXES, groups), *heads)

    def _made(self, make: Callable, specs: Callable):
        if self._mesh is None:
            return jax.jit(make)()
        shardings = jax.tree.map(partial(NamedSharding, self._mesh), specs(jax.eval_shape(make)))
        return jax.jit(make, out_shardings=shardings)()
