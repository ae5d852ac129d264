"""bench.sass on SASS written by hand: instructions, loops, branches, and what it refuses to count."""

import pytest

from bench import sass

STRAIGHT = """module {
  tt.func public @kernel(%p: !tt.ptr<f32>) {
    %x = tt.load %p : tensor<128x!tt.ptr<f32>>
    tt.store %p, %x : tensor<128x!tt.ptr<f32>>
    tt.return
  }
}"""

LOOP = """module {
  tt.func public @kernel(%p: !tt.ptr<f32>) {
    %sum = scf.for %i = %a to %b step %c : i32 {
      %x = tt.load %p : tensor<128x!tt.ptr<f32>>
      scf.yield %x
    }
    tt.store %p, %sum : tensor<128x!tt.ptr<f32>>
    tt.return
  }
}"""

PRODUCTS = LOOP.replace(
    "tt.load %p : tensor<128x!tt.ptr<f32>>", "tt.dot %l, %r, %s : tensor<64x16xbf16> * tensor<16x8xbf16>"
)

NESTED = """module {
  tt.func public @kernel(%p: !tt.ptr<f32>) {
    scf.for %i = %a to %b step %c : i32 {
      %sum = scf.for %j = %a to %b step %c : i32 {
        %x = tt.load %p : tensor<128x!tt.ptr<f32>>
        scf.yield %x
      }
      tt.store %p, %sum : tensor<128x!tt.ptr<f32>>
    }
    tt.return
  }
}"""

BRANCH = """module {
  tt.func public @kernel(%p: !tt.ptr<f32>) {
    scf.if %c {
      tt.store %p, %x : tensor<128x!tt.ptr<f32>>
    } else {
      %y = math.exp2 %x
      %z = math.exp2 %y
    }
    tt.return
  }
}"""

BLOCKED = "#blocked = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>\n"
MMA = "#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8, 16]}>\n"
LOADS = '%x = tt.load %p : tensor<128x!tt.ptr<f32>, #blocked> loc("k.ttir":{}:7)\n'
STORES = 'tt.store %p, %x : tensor<128x!tt.ptr<f32>, #blocked> loc("k.ttir":{}:7)\n'
DOTS = '%x = ttng.warp_group_dot %l, %r : !m<64x16xbf16> * !m<16x8xbf16> -> tensor<64x8xf32, #mma> loc("k.ttir":{}:7)\n'


def assemble(text):
    """ "LINE: INSTRUCTION" or ".L_x_N:" a line -> as nvdisasm prints it."""
    out = []
    for address, row in enumerate(row.strip() for row in text.strip().splitlines()):
        if row.startswith("."):
            out.append(row)
        else:
            line, _, code = row.partition(": ")
            out += [f'\t//## File "/k.ttir", line {line}', f"        /*{16 * address:04x}*/                   {code} ;"]
    return "\n".join(out)


def count(text, ttir, ttgir="", trips=(), shares=()):
    return sass.count(assemble(text), ttir, BLOCKED + MMA + ttgir, trips, shares)


def test_straight_code_by_kind():
    counted = count(
        """
        2: S2R R0, SR_TID.X
        3: @!P0 LDG.E.128 R4, desc[UR4][R2.64]
        3: HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], RZ
        3: MUFU.EX2 R4, R4
        4: LDSM.16.M88.4 R4, [R2]
        4: STS [R2], R4
        4: @P0 EXIT
        4: STG.E desc[UR4][R2.64], R4
        5: EXIT
        .L_x_0:
        0: BRA `(.L_x_0)
        0: NOP
        """,
        STRAIGHT,
    )
    assert counted.total == 9  # the predicated ones too, the padding not
    assert counted.kinds == {"tensor": 1, "memory": 4, "mufu": 1, "other": 3}


LOOPED = """
    2: MOV R0, RZ
    .L_x_1:
    4: LDG.E R4, desc[UR4][R2.64]
    4: FADD R0, R0, R4
    3: ISETP.NE.AND P0, PT, R1, RZ, PT
    3: @P0 BRA `(.L_x_1)
    7: STG.E desc[UR4][R2.64], R0
    8: EXIT
"""


def test_loop():
    assert count(LOOPED, LOOP, LOADS.format(4), trips=(10,)).total == 1 + 10 * 4 + 2
    assert count(LOOPED, LOOP, LOADS.format(4), trips=(2.5,)).total == 1 + 2.5 * 4 + 2


@pytest.mark.parametrize(("trips", "passes"), ((11, (2, 3)), (12, (3, 0)), (3, (0, 3))))
def test_unrolled_loop_with_its_rest(trips, passes):
    counted = count(
        """
        2: MOV R0, RZ
        2: @P1 BRA `(.L_x_2)
        .L_x_1:
        4: LDG.E R4, desc[UR4][R2.64]
        4: LDG.E.64 R6, desc[UR4][R2.64]
        4: LDG.E R5, desc[UR4][R2.64]
        3: @P0 BRA `(.L_x_1)
        .L_x_2:
        4: LDG.E R4, desc[UR4][R2.64]
        3: @P0 BRA `(.L_x_2)
        8: EXIT
        """,
        LOOP,
        LOADS.format(4),
        trips=(trips,),
    )
    assert counted.total == 2 + passes[0] * 4 + passes[1] * 2 + 1


def test_unrolled_loop_that_comes_out_even():
    text = LOOPED.replace("LDG.E R4", "LDG.E.128 R4")
    assert count(text, LOOP, LOADS.format(4), trips=(12,)).total == 1 + 12 / 4 * 4 + 2


def test_peeled_trip():
    """One of the loop's products stands before it, with the loop's line."""
    counted = count(
        """
        2: MOV R0, RZ
        4: HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], RZ
        .L_x_1:
        4: HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24
        3: @P0 BRA `(.L_x_1)
        8: EXIT
        """,
        PRODUCTS,
        DOTS.format(4),
        trips=(10,),
    )
    assert counted.total == 2 + 9 * 2 + 1
    assert counted.kinds["tensor"] == 10


def test_loop_written_out():
    """What the products add up to; lines that a product has from its neighbour do not matter."""
    product = "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24"
    text = "\n".join([*(f"{line}: {product}" for line in (4, 4, 7)), "8: EXIT"])
    assert count(text, PRODUCTS, DOTS.format(4), trips=(3,)).total == 4
    with pytest.raises(sass.CountError, match="written out"):
        count(text, PRODUCTS, DOTS.format(4), trips=(4,))


def test_nested_loops():
    counted = count(
        """
        2: MOV R0, RZ
        .L_x_1:
        3: MOV R1, RZ
        .L_x_2:
        5: LDG.E R4, desc[UR4][R2.64]
        4: @P0 BRA `(.L_x_2)
        8: STG.E desc[UR4][R2.64], R0
        3: @P1 BRA `(.L_x_1)
        10: EXIT
        """,
        NESTED,
        LOADS.format(5) + STORES.format(8),
        trips=(5, 7),
    )
    assert counted.total == 1 + 5 * (3 + 7 * 2) + 1


def test_inner_loop_written_out():
    counted = count(
        """
        .L_x_1:
        5: LDG.E R4, desc[UR4][R2.64]
        5: LDG.E R5, desc[UR4][R2.64]
        8: STG.E desc[UR4][R2.64], R0
        3: @P1 BRA `(.L_x_1)
        10: EXIT
        """,
        NESTED,
        LOADS.format(5) + STORES.format(8),
        trips=(5, 2),
    )
    assert counted.total == 5 * 4 + 1


def test_flattened_loops():
    """One loop of SASS for two of the source: what only the outer has is a branch in it."""
    counted = count(
        """
        .L_x_1:
        5: LDG.E R4, desc[UR4][R2.64]
        5: FADD R0, R0, R4
        4: IADD3 R1, R1, 0x1, RZ
        4: @P0 BRA `(.L_x_2)
        8: STG.E desc[UR4][R2.64], R0
        .L_x_2:
        4: @P1 BRA `(.L_x_1)
        10: EXIT
        """,
        NESTED,
        LOADS.format(5) + STORES.format(8),
        trips=(5, 7),
    )
    assert counted.total == 35 * 5 + 5 + 1


ARMS = """
    2: ISETP.NE.AND P0, PT, R1, RZ, PT
    3: @P0 BRA `(.L_x_1)
    4: STG.E desc[UR4][R2.64], R0
    4: IADD3 R1, R1, 0x1, RZ
    4: BRA `(.L_x_2)
    .L_x_1:
    6: MUFU.EX2 R0, R0
    7: MUFU.EX2 R0, R0
    .L_x_2:
    4: MOV R1, R1
    9: EXIT
"""


def test_arms_of_an_if():
    """The last block, which every program runs, counts in full though its first line is an arm's."""
    counted = count(ARMS, BRANCH, shares=(0.25,))
    assert counted.total == 2 + 0.25 * 3 + 0.75 * 2 + 2
    assert counted.kinds["mufu"] == 1.5


def test_an_if_that_ends_the_program():
    text = """
        2: MOV R0, RZ
        3: @P0 EXIT
        4: STG.E desc[UR4][R2.64], R0
        4: STG.E desc[UR4][R2.64], R0
        4: EXIT
    """
    assert count(text, BRANCH, shares=(0.25,)).total == 2 + 0.25 * 3


def test_slow_ways_and_waiting():
    counted = count(
        """
        2: MOV R0, RZ
        2: @P0 BRA `(.L_x_1)
        3: MOV R4, 0x10
        3: CALL.REL.NOINC `(.L_x_3)
        .L_x_1:
        3: SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3
        3: @!P0 BRA `(.L_x_1)
        5: EXIT
        .L_x_3:
        3: MUFU.RCP64H R0, R0
        3: RET.REL.NODEC R4
        """,
        STRAIGHT,
    )
    assert counted.total == 2 + 2 + 1


@pytest.mark.parametrize(
    ("text", "ttir", "trips", "shares", "message"),
    (
        (LOOPED, LOOP, (), (), "1 loops and 0 ifs, the case states 0 trips"),
        (LOOPED, LOOP, (3, 3), (), "1 loops and 0 ifs, the case states 2 trips"),
        (ARMS, BRANCH, (), (), "0 loops and 1 ifs"),
        (LOOPED, STRAIGHT, (), (), "a loop of 4 instructions that the source does not have"),
        (LOOPED.replace("LDG", "LDS"), LOOP, (3,), (), "unrolled"),
        ("2: BRX R4 -0x10", STRAIGHT, (), (), "jump table"),
        (LOOPED, LOOP.replace("tt.store", "cf.cond_br"), (3,), (), "early return"),
    ),
)
def test_refuses(text, ttir, trips, shares, message):
    with pytest.raises(sass.CountError, match=message):
        count(text, ttir, LOADS.format(4), trips, shares)


def test_refuses_a_loop_with_nothing_to_count_by():
    with pytest.raises(sass.CountError, match="no product, store or load"):
        count(LOOPED, LOOP, "", trips=(3,))


@pytest.mark.parametrize(
    ("load", "loads"),
    (
        ("tensor<256x!tt.ptr<f32>, #blocked>", "LDG.E.64 R4, desc[UR4][R2.64]"),
        ("tensor<32x!tt.ptr<f32>, #blocked>", "LDG.E R4, desc[UR4][R2.64]"),
        ("tensor<64x!tt.ptr<bf16>, #ttg.slice<{dim = 0, parent = #rows}>>", "LDG.E.128 R4, desc[UR4][R2.64]"),
        ("tensor<4x64x!tt.ptr<bf16>, #rows>", "LDG.E.128 R4, desc[UR4][R2.64]"),
        ("tensor<16x!tt.ptr<f32>, #linear>", "LDG.E.64 R4, desc[UR4][R2.64]"),
        ("!tt.ptr<i32>", "LDG.E R4, desc[UR4][R2.64]"),
    ),
)
def test_loads_of_a_trip_by_layout(load, loads):
    """Each is one trip's, so that the loop is not unrolled."""
    rows = "{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}"
    linear = "{register = [[0], [8]], lane = [[0], [0], [1], [2], [4]], warp = [[0]], block = []}"
    ttgir = f"#rows = #ttg.blocked<{rows}>\n#linear = #ttg.linear<{linear}>\n"
    ttgir += f'%x = tt.load %p, %m {{contiguity = 8 : i32}} : {load} loc("k.ttir":4:7)\n'
    counted = count(LOOPED.replace("LDG.E R4, desc[UR4][R2.64]", loads), LOOP, ttgir, trips=(10,))
    assert counted.total == 1 + 10 * 4 + 2


def test_refuses_a_call_that_is_always_made():
    with pytest.raises(sass.CountError, match="a call"):
        count("2: CALL.REL.NOINC `(.L_x_1)\n3: EXIT\n.L_x_1:\n3: RET.REL.NODEC R4", STRAIGHT)


KEPT = """
        /*0010*/                   USGXT.U32 UR6, UR6, 0xe ;
        /*0020*/                   UIADD3 UR10, UP0, UR6, 0x80, URZ ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR12], R56 ;
        /*0040*/                   UMOV UR6, URZ ;
        /*0050*/                   UIADD3.X UR11, UR6, 0x40000040, URZ, UP0, !UPT ;
"""


def test_bases_that_are_lost():
    """What ptxas 12.8 made of attention over 257 tokens, and what it makes elsewhere."""
    assert sass.lost_bases(KEPT) == []
    both = [row for row in KEPT.splitlines() if "UMOV" not in row]
    assert sass.lost_bases("\n".join(both)) == [
        "UIADD3 UR10, UP0, UR6, 0x80, URZ ; UIADD3.X UR11, UR6, 0x40000040, URZ, UP0, !UPT ;"
    ]
    assert len(sass.lost_bases(KEPT.replace("UMOV UR6, URZ", "ULDC UR6, c[0x0][0x268]"))) == 1
    assert sass.lost_bases(KEPT.replace("UMOV UR6, URZ", "UIADD3.64 UR6, UR14, 0x4, URZ")) == []
    assert sass.lost_bases(KEPT.replace("UMOV UR6, URZ", "UIMAD.WIDE.U32 UR5, UR14, 0x4, URZ")) == []
