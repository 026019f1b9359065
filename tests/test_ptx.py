"""The interpreter of PTX (tests/helpers/ptx): what it computes, and what it does not let pass."""

import numpy as np
import pytest
from helpers import ptx
from helpers.ptx.block import Block, Launch
from helpers.ptx.memory import PtxError

HEADER = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 128 .b8 global_smem[];
.visible .entry kernel(
  .param .u64 kernel_param_0
)
{
  .reg .pred %p<9>;
  .reg .b32 %r<30>;
  .reg .b64 %rd<9>;
  ld.param.u64 %rd0, [kernel_param_0];
  mov.u32 %r0, %tid.x;
  mul.wide.u32 %rd1, %r0, 4;
  add.s64 %rd2, %rd0, %rd1;
  mov.u32 %r1, global_smem;
  shl.b32 %r2, %r0, 2;
  add.s32 %r3, %r1, %r2;
"""


def run(body, threads=64, late=True, shared=1024):
    """What a block of threads leaves in memory, a word for each, which is its number before."""
    (kernel,) = ptx.read(HEADER + body + "\nret;\n}\n").values()
    words = np.arange(threads, dtype=np.uint32)
    parameter = np.array([words.ctypes.data], np.uint64)
    launch = Launch((1, 1, 1), threads, shared, (parameter.ctypes.data,), late)
    executed = set()
    Block(kernel, launch, executed).run((0, 0, 0))
    return words


def of_neighbour(distance, between):
    """Every thread puts twice its number into shared memory and takes that of the one ``distance`` further on."""
    return f"""
  add.s32 %r4, %r0, %r0;
  st.shared.u32 [%r3], %r4;
  {between}
  add.s32 %r5, %r0, {distance};
  and.b32 %r5, %r5, 63;
  shl.b32 %r5, %r5, 2;
  add.s32 %r6, %r1, %r5;
  ld.shared.u32 %r7, [%r6];
  st.global.u32 [%rd2], %r7;
"""


def test_threads_exchange_through_shared_memory():
    assert run(of_neighbour(40, "bar.sync 0;")).tolist() == [2 * ((i + 40) % 64) for i in range(64)]
    assert run(of_neighbour(0, "")).tolist() == [2 * i for i in range(64)]


def test_what_no_barrier_orders_is_found():
    """However the threads happened to be executed here: all wrote before any read."""
    with pytest.raises(PtxError, match="two warps access one place and the other one writes"):
        run(of_neighbour(40, ""))


def test_threads_part_and_meet():
    body = """
  setp.lt.u32 %p1, %r0, 5;
  @%p1 bra FEW;
  mov.u32 %r4, 7;
  bra.uni JOIN;
FEW:
  mov.u32 %r4, 3;
JOIN:
  mov.u32 %r5, 31;
  shfl.sync.idx.b32 %r6, %r4, 0, %r5, -1;
  add.s32 %r6, %r6, %r4;
  st.global.u32 [%rd2], %r6;
"""
    assert run(body).tolist() == [6] * 5 + [10] * 27 + [14] * 32


@pytest.mark.parametrize("late", [False, True])
def test_copies_of_threads(late):
    body = """
  cp.async.ca.shared.global [%r3], [%rd2], 8, %r8;
  cp.async.commit_group;
  {}
  ld.shared.u32 %r4, [%r3];
  add.s32 %r4, %r4, 1;
  st.global.u32 [%rd2], %r4;
"""
    few = "mov.u32 %r8, 8; shl.b32 %r2, %r0, 3; add.s32 %r3, %r1, %r2; cvt.u64.u32 %rd1, %r2; add.s64 %rd2, %rd0, %rd1;"
    few += "setp.ge.u32 %p1, %r0, 32; @%p1 bra DONE;" + body
    waited = run(few.format("cp.async.wait_group 0;") + "DONE:", late=late)
    assert waited[:64:2].tolist() == [i + 1 for i in range(0, 64, 2)]
    if late:  # what has not landed is not there, and is still under way at the end
        with pytest.raises(PtxError, match="ends before what it has begun"):
            run(few.format("") + "DONE:", late=late)


BULK = """
  setp.ne.u32 %p1, %r0, 0;
  @%p1 bra WAIT;
  mbarrier.init.shared::cta.b64 [%r1+512], 1;
  fence.proxy.async.shared::cta;
  mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1+512], 256;
  cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 256, [%r1+512];
  mbarrier.arrive.release.cta.shared::cta.b64 _, [%r1+512];
WAIT:
  bar.sync 0;
  {}
  ld.shared.u32 %r4, [%r3];
  add.s32 %r4, %r4, 5;
  bar.sync 0;
  st.global.u32 [%rd2], %r4;
"""
WAIT = """
AGAIN:
  mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p2, [%r1+512], 0;
  @!%p2 bra AGAIN;
"""


@pytest.mark.parametrize("late", [False, True])
def test_bulk_copies(late):
    assert run(BULK.format(WAIT), late=late).tolist() == [i + 5 for i in range(64)]
    with pytest.raises(PtxError, match="where a bulk copy may still be under way"):
        run(BULK.format(""), late=late)  # also where it has landed, which this run does not show


def test_bulk_copies_want_a_fence_after_ordinary_accesses():
    """And a barrier, unless the warp itself made them."""
    before = "st.shared.u32 [%r3], %r0; {} bar.sync 0;" + BULK.format(WAIT)
    assert run(before.format("fence.proxy.async.shared::cta;")).tolist() == [i + 5 for i in range(64)]
    with pytest.raises(PtxError, match="where a warp has been without fence.proxy.async since"):
        run(before.format(""))
    with pytest.raises(PtxError, match="where another warp has been since the last barrier"):
        run("st.shared.u32 [%r3], %r0; fence.proxy.async.shared::cta;" + BULK.format(WAIT))
    with pytest.raises(PtxError, match="whose barrier was made without fence.proxy.async since"):
        run(BULK.format(WAIT).replace("fence.proxy.async.shared::cta;", ""))


@pytest.mark.parametrize(
    "body, error",
    [
        ("ld.shared.u32 %r4, [%r3+2];", "not aligned"),
        ("st.shared.u32 [%r3+1000], %r0;", "outside of the memory"),
        ("ex2.approx.f32 %r4, %r4;", "ex2.approx.f32"),
        (
            "setp.lt.u32 %p1, %r0, 9; @%p1 bra OUT; bar.sync 0; OUT: shfl.sync.idx.b32 %r6, %r4, 0, 31, -1;",
            "never come",
        ),
        ("mov.u32 %r5, 15; shfl.sync.idx.b32 %r6, %r4, 0, %r5, -1;", "part of a warp"),
    ],
    ids=["alignment", "bounds", "opcode", "barrier", "shuffle"],
)
def test_errors(body, error):
    with pytest.raises(PtxError, match=error):
        run(body)
