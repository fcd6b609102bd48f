"""What is read from optimised HLO: bytes of HBM, arrays written whole, collectives; on texts written by hand."""

import re

import pytest

from llava_jax.capacity import traffic
from llava_jax.capacity.hlo import parse
from llava_jax.capacity.traffic import Collectives, Traffic, Watched

FUSED = """HloModule fused

%sliced (p: f32[8,100], i: s32[]) -> f32[8,10] {
  %p = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %doubled = f32[8,100]{1,0} add(%p, %p)
  ROOT %slice = f32[8,10]{1,0} dynamic-slice(%doubled, %i, %i), dynamic_slice_sizes={8,10}
}

%summed_in_part (p: f32[8,100]) -> f32[2] {
  %p = f32[8,100]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %sum = f32[8]{0} reduce(%p, %zero), dimensions={1}, to_apply=%add
  ROOT %slice = f32[2]{0} slice(%sum), slice={[0:2]}
}

%summed (p: f32[8,100]) -> f32[8] {
  %p = f32[8,100]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %sum = f32[8]{0} reduce(%p, %zero), dimensions={1}, to_apply=%add
}

%updated (p: f32[8,100], x: f32[8,1], i: s32[]) -> f32[8,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %x = f32[8,1]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %one = f32[8,100]{1,0} dynamic-update-slice(%p, %x, %i, %i)
  %two = f32[8,100]{1,0} dynamic-update-slice(%one, %x, %i, %i)
  ROOT %flat = f32[800]{0} bitcast(%two)
}

%updated_and_read (p: f32[8,100], x: f32[8,1], i: s32[]) -> (f32[8,100], f32[8]) {
  %p = f32[8,100]{1,0} parameter(0)
  %x = f32[8,1]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = f32[] constant(0)
  %new = f32[8,100]{1,0} dynamic-update-slice(%p, %x, %i, %i)
  %sum = f32[8]{0} reduce(%p, %zero), dimensions={1}, to_apply=%add
  ROOT %both = (f32[8,100]{1,0}, f32[8]{0}) tuple(%new, %sum)
}

%updated_only_to_be_read (p: f32[8,100], x: f32[8,1], i: s32[]) -> f32[8] {
  %p = f32[8,100]{1,0} parameter(0)
  %x = f32[8,1]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = f32[] constant(0)
  %new = f32[8,100]{1,0} dynamic-update-slice(%p, %x, %i, %i)
  ROOT %sum = f32[8]{0} reduce(%new, %zero), dimensions={1}, to_apply=%add
}

%padded (x: f32[8,1], i: s32[]) -> f32[8,100] {
  %x = f32[8,1]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = f32[] constant(0)
  %zeros = f32[8,100]{1,0} broadcast(%zero), dimensions={}
  ROOT %new = f32[8,100]{1,0} dynamic-update-slice(%zeros, %x, %i, %i)
}

%nested (p: f32[8,100], x: f32[8,1], i: s32[]) -> f32[800] {
  %p = f32[8,100]{1,0} parameter(0)
  %x = f32[8,1]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %inner = f32[800]{0} fusion(%p, %x, %i), kind=kLoop, calls=%updated
}

ENTRY %main (a: f32[8,100], x: f32[8,1], i: s32[]) -> f32[8] {
  %a = f32[8,100]{1,0} parameter(0)
  %x = f32[8,1]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %held = f32[8,100]{1,0:S(1)} parameter(3)
  %INSTRUCTION
}
"""


@pytest.mark.parametrize(
    "instruction, read, written",
    [
        ("f = f32[8,10]{1,0} fusion(%a, %i), kind=kLoop, calls=%sliced", 320 + 4, 320),
        ("f = f32[8]{0} fusion(%a), kind=kInput, calls=%summed", 3200, 32),
        ("f = f32[2]{0} fusion(%a), kind=kLoop, calls=%summed_in_part", 800, 8),
        ("f = f32[800]{0} fusion(%a, %x, %i), kind=kLoop, calls=%updated", 32 + 4, 64),
        ("f = f32[800]{0} fusion(%a, %x, %i), kind=kLoop, calls=%nested", 32 + 4, 64),
        ("f = (f32[8,100]{1,0}, f32[8]{0}) fusion(%a, %x, %i), calls=%updated_and_read", 3200 + 32 + 4, 32 + 32),
        ("f = f32[8]{0} fusion(%a, %x, %i), kind=kInput, calls=%updated_only_to_be_read", 3200 + 32 + 4, 32),
        ("f = f32[8,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%padded", 32 + 4, 3200),
        ("f = f32[8,100]{1,0} dynamic-update-slice(%a, %x, %i, %i)", 32 + 4, 32),
        ("f = f32[8,4]{1,0} slice(%a), slice={[0:8], [0:4]}", 128, 128),
        ("f = f32[100,8]{1,0} transpose(%a), dimensions={1,0}", 3200, 3200),
        ("f = f32[8,100]{1,0} multiply(%a, %a)", 3200, 3200),
        ("f = f32[800]{0} bitcast(%a)", 0, 0),
        ('f = f32[8,8]{1,0} custom-call(%a, %x, %a), custom_call_target="kernel"', 3200 + 32, 256),
        ('f = (f32[8,8]{1,0}, s8[4096]{0}) custom-call(%a, %x), custom_call_target="__cublas$lt$matmul"', 3232, 256),
        (
            'f = (f32[8,100]{1,0}, f32[8]{0}) custom-call(%a, %x), custom_call_target="tpu_custom_call", '
            "output_to_operand_aliasing={{0}: (0, {})}",
            3232,
            32,
        ),
        ("f = (f32[8,100]{1,0:S(1)}, f32[8,100]{1,0}, u32[]{:S(2)}) copy-start(%a)", 3200, 0),
        ("f = f32[8,100]{1,0:S(1)} copy-done(%f)", 0, 0),
        ("f = f32[8,100]{0,1} copy(%held)", 0, 3200),
        ("f = ((f32[8,100]{1,0}), f32[8,10]{1,0:S(1)}, s32[]{:S(2)}) async-start(%a, %i), calls=%sliced", 320 + 4, 0),
        ("f = (f32[8,100]{1,0}, f32[16,100]{1,0}) all-gather-start(%a), dimensions={0}", 3200, 6400),
        ("f = f32[8,100]{1,0} all-reduce(%a), to_apply=%add", 3200, 3200),
        ("f = f32[8,100]{1,0:T(8,128)} copy(%a)", 3200, 8 * 128 * 4),  # with its tile's padding
        ("f = bf16[4,100,1]{0,1,2:T(4,128)(2,1)} convert(%a)", 3200, 100 * 128 * 2),
    ],
)
def test_bytes_of_an_instruction(instruction, read, written):
    module = parse(FUSED.replace("INSTRUCTION", instruction))
    entry = module[module.entry]
    assert traffic.instruction_traffic(module, entry, entry["f"]) == Traffic(read, written)


UNKNOWN = """%c (t: pred[]) -> pred[] {
  ROOT %t = pred[] parameter(0)
}

"""
LOOPS = f"""HloModule loops

{UNKNOWN}
%counting (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{{0}} get-tuple-element(%t), index=1
  %y = f32[8]{{0}} negate(%x)
  %two = s32[] constant(2), metadata={{op_name="step"}}
  %next = s32[] add(%i, %two)
  ROOT %both = (s32[], f32[8]{{0}}) tuple(%next, %y)
}}

%below_8 (t: (s32[], f32[8])) -> pred[] {{
  %t = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(8)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t = (s32[], f32[8]{{0}}) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%t), index=1
  ROOT %y = f32[8]{{0}} negate(%x), backend_config={{"window_config":{{"estimated_cycles":"7"}}}}
}}

%called (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} negate(%x)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %thrice = (s32[], f32[8]{{0}}) while(%x), body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %counted = (s32[], f32[8]{{0}}) while(%x), condition=%below_8, body=%counting
  %call = f32[8]{{0}} call(%x), to_apply=%called
  %decode = (s32[], f32[8]{{0}}) while(%call), condition=%c, body=%body
  ROOT %out = f32[8]{{0}} negate(%call), backend_config={{"window_config":{{"estimated_cycles":"5"}}}}
}}
"""


def test_loops_and_calls_count_as_often_as_they_run():
    module = parse(LOOPS)
    assert traffic.computation_traffic(module, "main") == Traffic(32 * 5 + 4 * 40, 32 * 5 + 4 * 36)
    assert traffic.estimated_cycles(module, "main") == 3 * 7 + 5
    assert module.loops == ["body"]
    assert traffic.computation_traffic(module, "body") == Traffic(32, 32)


DECODING = f"""HloModule decoding

{UNKNOWN}

%updates (p: bf16[4,8], q: bf16[1,8], i: s32[]) -> bf16[4,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  %q = bf16[1,8]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  ROOT %dus = bf16[4,8]{{1,0:T(8,128)(2,1)}} dynamic-update-slice(%p, %q, %i, %i)
}}

%body (t: (bf16[4,8], bf16[2,3])) -> (bf16[4,8], bf16[2,3]) {{
  %t = (bf16[4,8]{{1,0:T(8,128)(2,1)}}, bf16[2,3]{{1,0}}) parameter(0)
  %whole = bf16[4,8]{{1,0:T(8,128)(2,1)}} get-tuple-element(%t), index=0
  %other = bf16[2,3]{{1,0}} get-tuple-element(%t), index=1
  %one = bf16[1,8]{{1,0}} slice(%whole), slice={{[0:1], [0:8]}}
  %i = s32[] constant(0)
  %fetched = bf16[4,8]{{1,0:T(8,128)(2,1)S(1)}} copy(%whole)
  %in_place = bf16[4,8]{{1,0:T(8,128)(2,1)}} fusion(%whole, %one, %i), kind=kLoop, calls=%updates
  %turned = bf16[8,4]{{1,0:T(8,128)(2,1)}} transpose(%in_place), dimensions={{1,0}}
  %flat = (f32[3]{{0}}, bf16[6]{{0:T(128)}}) fusion(%other), kind=kLoop, calls=%adds
  ROOT %out = (bf16[4,8]{{1,0}}, bf16[2,3]{{1,0}}) tuple(%whole, %other)
}}

%adds (p: bf16[2,3]) -> (f32[3], bf16[6]) {{
  %p = bf16[2,3]{{1,0}} parameter(0)
  ROOT %sum = (f32[3]{{0}}, bf16[6]{{0}}) reduce(%p)
}}

%products (x: bf16[7,4], w: bf16[4,7]) -> bf16[7,7] {{
  %x = bf16[7,4]{{1,0}} parameter(0)
  %w = bf16[4,7]{{1,0}} parameter(1)
  ROOT %dot = bf16[7,7]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

ENTRY %main (p: bf16[4,8], k: s8[3,7], v: s8[4,7]) -> bf16[4,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  %k = s8[3,7]{{1,0}} parameter(1)
  %v = s8[4,7]{{1,0}} parameter(2)
  %merged = s8[7,7]{{1,0}} concatenate(%k, %v), dimensions={{0}}
  %product = bf16[7,7]{{1,0}} fusion(%p, %k), kind=kOutput, calls=%products
  %of_library = (bf16[5,3]{{1,0}}, s8[64]{{0}}) custom-call(%p, %k), custom_call_target="__cublas$gemm"
  %activation = bf16[7,7]{{1,0}} add(%product, %product)
  %started = (bf16[4,8]{{0,1}}, bf16[4,8]{{1,0}}, u32[]) copy-start(%p)
  %copied = bf16[4,8]{{0,1}} copy-done(%started)
  %while.1 = (bf16[4,8]{{1,0}}, bf16[2,3]{{1,0}}) while(%copied), condition=%c, body=%body
  ROOT %back = bf16[2,3]{{1,0}} copy(%while.1)
}}
"""


def in_place(text):
    """The text as JAX 0.12 has it: an element of a tuple is named where it is used, `%t#1`."""
    computations = []
    for computation in text.split("\n}\n"):
        for name, of, index in re.findall(r"\n  (%\S+) = .* get-tuple-element\((%\S+)\), index=(\d+)", computation):
            computation = re.sub(rf"\n  {name} = .*", "", computation)
            computation = re.sub(rf"{name}(?![\w.])", f"{of}#{index}", computation)
        computations.append(computation)
    return "\n}\n".join(computations)


@pytest.mark.parametrize("text, loop", [(LOOPS, "counting"), (DECODING, "body")])
def test_elements_of_tuples_that_are_named_where_they_are_used(text, loop):
    older, newer = parse(text), parse(in_place(text))
    assert "get-tuple-element" not in in_place(text)
    assert traffic.computation_traffic(newer, "main") == traffic.computation_traffic(older, "main")
    assert traffic.computation_traffic(newer, loop) == traffic.computation_traffic(older, loop)
    assert newer.loops == older.loops


def test_only_what_reaches_hbm_whole_counts():
    watched = Watched({(7, 7), (3, 5)}, {"prefix": (4, 1, 8), "suffix": (2, 3)})
    assert traffic.whole_writes(parse(DECODING), watched) == {
        "before": {"prefix": 1, "suffix": 0, "kernel": 1},
        "step": {"prefix": 1, "suffix": 1, "kernel": 0},
        "after": {"prefix": 0, "suffix": 1, "kernel": 0},
    }
    twice = parse(LOOPS.replace("condition=%c,", 'condition=%c, backend_config={"known_trip_count":{"n":"2"}},'))
    assert traffic.whole_writes(twice, Watched(set(), {"x": (8,)})) == {
        "program": {"x": 3 + 4 + 1 + 2 + 1, "kernel": 0}
    }


def test_collectives_by_layer():
    def lines(*instructions):
        return "".join(
            f'  %x.{n} = {array} {kind}(%y), metadata={{op_name="jit(run)/while/body/{path}/dot_general"}}\n'
            for n, (array, kind, path) in enumerate(instructions)
        )

    body = lines(
        ("bf16[4]{0}", "all-reduce-start", "language_model/layers_0/self_attn/o_proj"),
        ("bf16[4]{0}", "all-reduce-done", "language_model/layers_0/self_attn/o_proj"),
        ("(bf16[4]{0}, bf16[2]{0})", "all-reduce", "language_model/layers_0/mlp/down_proj"),
        ("bf16[4]{0}", "all-gather", "language_model/layers_0/mlp/gate_proj"),
        ("bf16[4]{0}", "all-reduce", "language_model/layers_11/mlp/down_proj"),
        ("bf16[4]{0}", "collective-permute", "vision_tower/layers_0/fc1"),
        ("bf16[4]{0}", "all-gather", "reduce"),
    )
    of_one = 'channel_id=7, metadata={op_name="jit(run)/while/body/language_model/layers_0/mlp/up_proj/dot_general"}'
    body += "".join(f"  %g.{n} = bf16[4]{{0}} all-gather(%y), {of_one}\n" for n in range(3))
    scattered = lines(("bf16[4]{0}", "all-reduce", "vision_tower/layers_1/fc1"))
    before = lines(("bf16[4]{0}", "all-reduce", "language_model/layers_0/mlp/down_proj"))
    before += "".join(f"  %f.{n} = bf16[4]{{0}} fusion(%y), kind=kCustom, calls=%scatter\n" for n in range(2))
    before += "  %loop = bf16[4]{0} while(%y), condition=%c, body=%body\n"
    text = (
        f"{UNKNOWN}%body (p: bf16[4]) -> bf16[4] {{\n{body}}}\n\n%scatter (p: bf16[4]) -> bf16[2] {{\n{scattered}}}\n"
    )
    text += f"\nENTRY %main (p: bf16[4]) -> bf16[4] {{\n{before}}}\n"
    assert traffic.collectives(parse(text)) == Collectives(4, 2, {"all-gather of token choice": 1})
