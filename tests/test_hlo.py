"""The parser of compiled programs, on small programs written by hand with known costs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""

FUSED = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8]{0}}
%fused (p: f32[8,4], q: f32[8,4]) -> (f32[8], f32[8,4]) {
  %q = f32[8,4]{1,0} parameter(1)
  %p = f32[8,4]{1,0} parameter(0)
  %product = f32[8,4]{1,0} multiply(%p, %q), metadata={op_name="jit(f)/mul (a, %b)"}
  %zero = f32[] constant(0)
  %row = f32[8]{0} reduce(%product, %zero), dimensions={1}, to_apply=%add
  ROOT %both = (f32[8]{0}, f32[8,4]{1,0}) tuple(%row, %product)
}
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
ENTRY %main (x: f32[8,4]) -> f32[8] {
  %x = f32[8,4]{1,0} parameter(0), sharding={replicated}
  %pair = (f32[8]{0}, /*index=1*/f32[8,4]{1,0}) fusion(%x, %x), kind=kInput, calls=%fused
  %rows = f32[8]{0} get-tuple-element(%pair), index=0
  ROOT %negative = f32[8]{0} negate(%rows), metadata={op_name="jit(f)/neg"}
}
"""


def program(body, computations="", parameters="f32[8]"):
    """A program whose entry has these lines, after a parameter of 32 bytes."""
    lines = "\n".join(f"  {line}" for line in body)
    return hlo.parse(f"{computations}\nENTRY %main (x: {parameters}) -> f32[8] {{\n{lines}\n}}\n")


X = "%x = f32[8]{0} parameter(0)"


def test_computations_and_instructions():
    found = hlo.parse(FUSED)
    assert list(found.computations) == ["fused", "add", "main"]
    assert found.entry == "main"
    product, row = (next(i for i in found if i.name == name) for name in ("product", "row"))
    assert [operand.name for operand in product.operands] == ["p", "q"]
    assert (product.opcode, product.op_name) == ("multiply", "jit(f)/mul (a, %b)")
    assert (row.dimensions, row.called) == ((1,), ["add"])
    pair = next(i for i in found if i.name == "pair")
    assert pair.shapes == (hlo.Shape("f32", (8,)), hlo.Shape("f32", (8, 4)))
    assert [i.name for i in found][-4:] == ["x", "pair", "rows", "negative"]


def test_a_kernel_reads_each_operand_once_and_writes_all_results():
    # The fusion: x once, both results; then 8 numbers read and written. Nothing inside it counts.
    assert hlo.parse(FUSED).traffic() == (128 + 32 + 128) + (32 + 32)
    assert hlo.parse(FUSED).kernels() == 2


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("f32[8]", 32),
        ("f32[]", 4),
        ("f32[0,5]", 0),
        ("f32[<=8,2]", 64),
        ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", 30),
        ("pred[7]", 7),
        ("s4[3]", 2),
        ("f8e4m3fn[6]", 6),
        ("c128[2]", 32),
        ("token[]", 0),
        ("(f32[2], (s8[3], bf16[1]), u32[]{:S(2)})", 8 + 3 + 2 + 4),
    ],
)
def test_bytes_of_types(kind, size):
    # The value is written, and nothing is read.
    found = program([f'ROOT %y = {kind} custom-call(), custom_call_target="make"'])
    assert next(iter(found)).bytes == size
    assert found.traffic() == size


def test_the_cheapest_branch_of_a_conditional_counts():
    branches = """
%expensive (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"50"}
  ROOT %r = f32[8]{0} negate(%q), backend_config={"estimated_cycles":"50"}
}
%cheap (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %q = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"30"}
}
"""
    for taken in (
        "branch_computations={%expensive, %cheap}",
        "true_computation=%cheap, false_computation=%expensive",
    ):
        line = f"ROOT %y = f32[8]{{0}} conditional(%x, %x, %x), {taken}"
        found = program([X, line], branches)
        assert (found.traffic(), found.cycles(), found.kernels()) == (64, 30, 1)
        assert found.conditionals() == 1


def test_a_loop_counts_as_often_as_it_runs():
    parts = """
%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %q = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"10"}
}
%condition (p: f32[8]) -> pred[] {
  %p = f32[8]{0} parameter(0)
  ROOT %more = pred[] constant(true)
}
"""
    loop = "ROOT %y = f32[8]{0} while(%x), condition=%condition, body=%body"
    known = loop + ', backend_config={"known_trip_count":{"n":"6"},"estimated_cycles":"999"}'
    found = program([X, known], parts)
    assert (found.traffic(), found.cycles(), found.kernels()) == (6 * 64, 60, 6)
    assert program([X, loop], parts).traffic() == 64


def test_calls_are_followed():
    part = """
%part (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %q = f32[8]{0} negate(%p)
}
"""
    called = program([X, "ROOT %y = f32[8]{0} call(%x), to_apply=%part"], part)
    started = "%s = ((f32[8]), f32[8], s32[]) async-start(%x), calls=%part"
    beside = program([X, started, "ROOT %y = f32[8]{0} async-done(%s)"], part)
    assert called.traffic() == beside.traffic() == 64
    assert called.kernels() == beside.kernels() == 1


def test_slices_count_in_place_of_a_sliced_operand():
    fused = """
%window (p: f32[64], i: s32[]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %i = s32[] parameter(1)
  %part = f32[8]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={8}
  ROOT %y = f32[8]{0} negate(%part)
}
%all (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %part = f32[8]{0} slice(%p), slice={[0:8]}
  %zero = f32[] constant(0)
  %sum = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%add
  ROOT %y = f32[8]{0} map(%part, %sum)
}
"""
    big, index = "%x = f32[64]{0} parameter(0)", "%i = s32[] parameter(1)"
    window = "ROOT %y = f32[8]{0} fusion(%x, %i), kind=kLoop, calls=%window"
    assert program([big, index, window], fused).traffic() == 32 + 4 + 32
    whole = "ROOT %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%all"
    assert program([big, whole], fused + ADD).traffic() == 256 + 32
    alone = "ROOT %y = f32[8]{0} slice(%x), slice={[8:16]}"
    assert program([big, alone]).traffic() == 32 + 32


def test_an_asynchronous_copy_counts_its_bytes_once_and_is_no_kernel():
    start = "%s = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)"
    found = program([X, start, "ROOT %y = f32[8]{0:S(1)} copy-done(%s)"])
    assert (found.traffic(), found.kernels()) == (64, 0)
    start = "%s = ((f32[8]{0}), f32[4]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4]}"
    found = program([X, start, "ROOT %y = f32[4]{0:S(1)} slice-done(%s)"])
    assert found.kernels() == 0


def test_bitcasts_and_tuples_cost_nothing():
    lines = [
        X,
        "%b = f32[4,2]{1,0} bitcast(%x)",
        "%t = (f32[4,2]{1,0}, f32[8]{0}) tuple(%b, %x)",
        "%g = f32[8]{0} get-tuple-element(%t), index=1",
        "%c = f32[8]{0} constant({1, 2, 3, 4, 5, 6, 7, 8})",
        'ROOT %y = f32[16]{0} custom-call(%g, %g), custom_call_target="ConcatBitcast"',
    ]
    found = program(lines)
    assert (found.traffic(), found.kernels()) == (0, 0)


def test_cycles_inside_a_fusion_do_not_count():
    fused = """
%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"7"}
}
"""
    config = 'backend_config={"window_config":{"estimated_cycles":"41"}}'
    line = f"ROOT %y = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%inner, {config}"
    assert program([X, line], fused).cycles() == 41
    assert hlo.parse(FUSED).cycles() == 0


def test_synchronous_and_asynchronous_collectives():
    lines = [
        X,
        "%r = (f32[8]{0}, f32[2]{0}) all-reduce(%x, %x), channel_id=1, to_apply=%add",
        "%s = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}",
        "%g = f32[32]{0} all-gather-done(%s)",
        "%p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)",
        "ROOT %d = f32[8]{0} collective-permute-done(%p)",
    ]
    found = program(lines, ADD).collectives()
    kinds = [(collective.collective, collective.bytes) for collective in found]
    assert kinds == [("all-reduce", 40), ("all-gather", 128), ("collective-permute", 32)]


def test_collectives_of_all_branches_and_fusions():
    parts = """
%shares (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %q = f32[8]{0} all-reduce(%p), to_apply=%add
}
%keeps (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}
"""
    line = "ROOT %y = f32[8]{0} conditional(%x, %x, %x), branch_computations={%shares, %keeps}"
    assert len(program([X, line], ADD + parts).collectives()) == 1
    assert not program([X, line], ADD + parts).usual_collectives()
    line = "ROOT %y = f32[8]{0} fusion(%x), kind=kCustom, calls=%shares"
    assert len(program([X, line], ADD + parts).collectives()) == 1
    assert len(program([X, line], ADD + parts).usual_collectives()) == 1


def test_a_compiled_program_of_this_machine():
    x = jnp.ones((64, 32))
    compiled = jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile()
    found = hlo.parse(compiled.as_text())
    assert found.traffic() == 2 * x.nbytes
    assert found.kernels() == 1
    assert not found.collectives()


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match=r"no computation .* ENTRY, and there are 0\. Pass what"):
        hlo.parse("module @jit_f { func.func public @main() }")
