"""What the kernels are compiled to keeps them fast: read from the machine code for every architecture."""

import functools

import pytest

from bitnet.ops.build import BuildError
from bitnet.ops.cuda.census import ARCHITECTURES, Census, census, disassembler, innermost_loops, instructions_of
from bitnet.ops.cuda.nvrtc import architecture_for, library, machine_code, supported_architectures
from bitnet.ops.cuda.plan import MULTIPLICATIONS

LISTING = """
		Function : kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x000ff00000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R6.64] ;  /* 0x1 */
        /*0020*/                   IDP.4A.S8.S8 R9, R4, R5, R9 ;  /* 0x1 */
        /*0030*/              @!P0 BRA 0x10 ;                   /* 0x1 */
        /*0040*/               @P1 BRA 0x0 ;                    /* 0x1 */
        /*0050*/                   EXIT ;                       /* 0x1 */
"""


def test_the_loop_of_a_listing_is_found():
    body = instructions_of(LISTING)["kernel"]
    assert len(body) == 6
    [loop] = innermost_loops(body)
    assert [address for address, _ in loop] == [0x10, 0x20, 0x30]


@functools.cache
def found(capability: tuple[int, int]) -> dict[str, Census] | str:
    """The kernels by name, or why there are none here."""
    try:
        disassembler()
        architecture_for(capability, supported_architectures(library()))
    except BuildError as error:
        return str(error)
    return census(machine_code(capability))


@pytest.fixture(params=ARCHITECTURES, ids=lambda capability: "sm_{}{}".format(*capability))
def kernels(request) -> dict[str, Census]:
    result = found(request.param)
    if isinstance(result, str):
        pytest.skip(result)
    return result


def test_no_kernel_spills_and_every_one_fits_its_registers(kernels):
    assert set(kernels) == {"quantize_rows", *MULTIPLICATIONS}
    assert {each.kernel: each.spills for each in kernels.values() if each.spills} == {}
    assert {each.kernel: each.registers for each in kernels.values() if each.registers > 168} == {}


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_kernels_for_few_tokens_read_wide_and_waste_no_instruction(kernels, tokens):
    kernel = kernels[f"multiply_{tokens}"]
    assert kernel.registers <= 64
    assert set(kernel.loads) == {128}
    assert kernel.loop["IDP"] > 0
    assert kernel.instructions_a_weight <= {1: 0.7, 2: 1.0}[tokens]  # 0.25 for each token are the products


@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_the_kernels_for_a_few_tokens_more_multiply_on_tensor_cores(kernels, tokens):
    kernel = kernels[f"multiply_{tokens}"]
    assert kernel.registers <= {8: 64, 16: 64, 32: 80}[tokens]
    assert set(kernel.loads) == {128}
    weights = 16 * kernel.loop["IMMA"] * 8 / tokens  # mma takes 512 weights for 32 lanes, again for every 8 tokens
    assert kernel.loop["IMMA"] > 0
    assert kernel.loop.total() / weights <= {8: 0.6, 16: 0.7, 32: 1.0}[tokens]


@pytest.mark.parametrize(("name", "others"), [("multiply_tiles_64x32", 5), ("multiply_tiles_128x64", 2.5)])
def test_the_kernels_for_many_tokens_multiply_on_tensor_cores(kernels, name, others):
    kernel = kernels[name]
    assert kernel.loop["IMMA"] > 0
    assert kernel.loop["IDP"] == 0
    assert set(kernel.loads) == {128}
    assert kernel.loop["LDGSTS"] > 0  # activations go past the registers
    assert kernel.others_a_product <= others
