"""Reading disassembly: instructions, labels, and which backward jumps are loops."""

from offline.counting import count, matrix_name, zones
from offline.listing import read_amdgcn, read_sass

SASS = """
        .size           kernel,(.L_x_9 - kernel)
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_5:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/              @P2 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   BRA.U !UP0, `(.L_x_3) ;
.L_x_4:
        /*0040*/                   LDL.64 R4, [R1] ;
        /*0050*/              @!P0 BRA P1, `(.L_x_1) ;
        /*0060*/              @!P0 CALL.REL.NOINC `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_5) ;
.L_x_2:
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*00b0*/                   STL.64 [R1], R4 ;
        /*00c0*/              @!P0 BRA `(.L_x_2) ;
        /*00d0*/              @P1 EXIT ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R5 ;
        /*0100*/              @!P0 BRA `(.L_x_3) ;
        /*0110*/                   BRA `(.L_x_4) ;
.L_x_8:
        /*0120*/                   BRA `(.L_x_8);
.L_x_9:
"""


def test_instructions_and_labels_are_read():
    listing = read_sass(SASS)
    assert len(listing.instructions) == 19
    assert listing.instructions[2].opcode == "HGMMA.64x64x16.F32.BF16"
    assert listing.labels[".L_x_1"] == 2
    assert listing.instructions[3].target == ".L_x_3"


def test_a_branch_falls_through_when_any_condition_guards_it():
    falls = {i: one.falls_through for i, one in enumerate(read_sass(SASS).instructions) if one.target}
    assert falls == {3: True, 5: True, 6: True, 7: False, 12: True, 16: True, 17: False, 18: False}
    ends = [one.falls_through for one in read_sass(SASS).instructions if one.opcode == "EXIT"]
    assert ends == [True, False]


def test_loops_are_those_of_the_flow_not_of_the_page():
    loops = {loop.first: len(loop.indices) for loop in read_sass(SASS).loops}
    # 1: the outer loop; 2: inside it, with the wait written behind the end of the kernel; 8: left to by a call; 15: the
    # wait itself. The trap at 18 is not reached. The jump from 17 back to 4 is no loop.
    assert loops == {1: 10, 2: 7, 8: 5, 15: 2}


def test_zones_are_the_innermost_loops_that_multiply():
    near, far = zones(read_sass(SASS))
    assert (near.matrix, near.instructions, near.local) == (3, 5, 1)
    assert (far.matrix, far.instructions, far.local) == (1, 7, 1)


def test_the_shortest_pass_leaves_rarer_branches_out():
    listing = read_sass(SASS)
    outer = next(loop for loop in listing.loops if loop.first == 1)
    # Straight on from the first branch, without the wait that is written behind the end.
    assert listing.shortest_pass(outer) == (1, 2, 3, 4, 5, 6, 7)
    _, far = zones(listing, shortest=True)
    assert (far.instructions, far.matrix) == (4, 1)


def test_one_kind_of_loop_is_near_and_no_loop_is_nothing():
    one = SASS.replace("        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;\n", "")
    one = one.replace("        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;\n", "")
    near, far = zones(read_sass(one))
    assert near.matrix == 1
    assert far is None
    assert zones(read_sass("        /*0000*/                   EXIT ;\n")) == (None, None)


def test_opcodes_are_counted_by_kind():
    counts = count(["LDS.U.128", "LDSM.16.M88", "LDL", "STL.64", "STS", "SHFL.BFLY", "MUFU.EX2", "UTCHMMA.2CTA", "LDG"])
    assert counts.instructions == 9
    assert (counts.shared_loads, counts.shared_stores, counts.local, counts.shuffles) == (2, 1, 2, 1)
    assert counts.wavefronts == 4 + 1 + 1
    assert (counts.special, counts.matrix) == (1, 1)
    assert matrix_name(["MOV", "HMMA.16816.F32.BF16"]) == "HMMA"
    assert matrix_name(["v_mfma_f32_32x32x8_bf16"]) == "mfma"
    assert matrix_name(["MOV"]) == ""


AMD = """
kernel:
\ts_load_dwordx4 s[0:3], s[0:1], 0x0
\ts_cbranch_scc1 .LBB0_3
; %bb.1:
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tv_add_f32_dpp v0, v0, v0 row_shr:8 row_mask:0xf bank_mask:0xf
\tv_add_f32_e32 v0, v1, v0 row_shr:4
\tscratch_load_dword v5, off, off ; 4-byte Folded Reload
\ts_cbranch_scc0 .LBB0_2
.LBB0_3:
\ts_endpgm
\t.section\t.AMDGPU.csdata
\t.vgpr_count: 12
"""


def test_amd_assembly_is_read_the_same_way():
    listing = read_amdgcn(AMD)
    assert len(listing.instructions) == 8
    near, far = zones(listing)
    assert (near.instructions, near.matrix, near.shuffles, near.local) == (5, 1, 2, 1)
    assert far is None
