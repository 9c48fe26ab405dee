//! Tile registers (AMX), whose instructions stable Rust has no intrinsics for.

use core::arch::asm;
use std::sync::OnceLock;

use super::{DOT_STEPS, DotState, DotTile, dots::Dots};

/// Tiles of 16 × 16 f32, by `tdpbf16ps`. The processor has AMX-TILE, AMX-BF16 and AVX-512 BF16, and the system lets this process use
/// them ([`is_available`]).
#[derive(Clone, Copy, Debug)]
pub struct Tiles;

/// Whether the processor has the tiles and the system grants them to this process.
pub fn is_available() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        #[allow(unused_unsafe, reason = "safe since Rust 1.92")]
        // SAFETY: every x86-64 processor has CPUID, and leaf 7 was checked for.
        let features = unsafe {
            use core::arch::x86_64::{__cpuid_count, __get_cpuid_max};
            if __get_cpuid_max(0).0 < 7 { 0 } else { __cpuid_count(7, 0).edx }
        };
        features & AMX_BF16 != 0 && features & AMX_TILE != 0 && request_permission()
    })
}

/// Linux saves the tiles' 8 KiB only for processes that ask for it.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// Operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Rows of a tile register.
const TILE: usize = 16;

/// Tiles 0 and 1 hold C of the first 16 rows, 2 and 3 of the rest; 4 and 5 hold A of both; 6 and 7 hold B.
#[inline(always)]
unsafe fn configure(rows: usize) {
    let (top, rest) = (rows.min(TILE) as u8, rows.saturating_sub(TILE).max(1) as u8);
    let full = TILE as u8;
    let config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [top, top, rest, rest, top, rest, full, full, 0, 0, 0, 0, 0, 0, 0, 0],
    };
    // SAFETY: the processor has AMX-TILE; the compiler itself uses no tile register.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
}

impl Dots for Tiles {
    type Int8 = super::int8_x86::Vnni;
    const ROWS: usize = 2 * TILE;

    #[inline(always)]
    unsafe fn dots(state: &mut DotState, t: &DotTile) {
        debug_assert!((1..=Self::ROWS).contains(&t.rows) && t.blocks > 0);
        // SAFETY: the caller's, as `Simd::dots`: A has `rows` rows of 64 bytes a block, B 16 pairs of 128 bytes a block, C `rows` rows.
        unsafe {
            if state.rows != t.rows {
                configure(t.rows);
                state.rows = t.rows;
            }
            const BLOCK: usize = DOT_STEPS / 2 * 128;
            let (c_stride, accumulate) = (t.c_stride * 4, usize::from(t.accumulate));
            if t.rows <= TILE {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "test {accumulate}, {accumulate}",
                    "jz 2f",
                    "tileloadd tmm0, [{c} + {cs}*1]",
                    "tileloadd tmm1, [{c} + {cs}*1 + 64]",
                    "2:",
                    "tileloadd tmm4, [{a} + {rows}*1]",
                    "tileloadd tmm6, [{b} + {pairs}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {pairs}*1 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {a}, {step}",
                    "add {b}, {block}",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{c} + {cs}*1], tmm0",
                    "tilestored [{c} + {cs}*1 + 64], tmm1",
                    a = inout(reg) t.a => _, b = inout(reg) t.b => _, n = inout(reg) t.blocks => _,
                    rows = in(reg) t.row_stride, step = in(reg) t.block_stride, pairs = in(reg) 128usize,
                    block = const BLOCK, c = in(reg) t.c, cs = in(reg) c_stride, accumulate = in(reg) accumulate,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _, options(nostack)
                );
                return;
            }
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {accumulate}, {accumulate}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {cs}*1]",
                "tileloadd tmm1, [{c} + {cs}*1 + 64]",
                "tileloadd tmm2, [{c2} + {cs}*1]",
                "tileloadd tmm3, [{c2} + {cs}*1 + 64]",
                "2:",
                "tileloadd tmm4, [{a} + {rows}*1]",
                "tileloadd tmm6, [{b} + {pairs}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {pairs}*1 + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a2} + {rows}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {step}",
                "add {a2}, {step}",
                "add {b}, {block}",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {cs}*1], tmm0",
                "tilestored [{c} + {cs}*1 + 64], tmm1",
                "tilestored [{c2} + {cs}*1], tmm2",
                "tilestored [{c2} + {cs}*1 + 64], tmm3",
                a = inout(reg) t.a => _, a2 = inout(reg) t.a.wrapping_add(TILE * t.row_stride) => _,
                b = inout(reg) t.b => _, n = inout(reg) t.blocks => _,
                rows = in(reg) t.row_stride, step = in(reg) t.block_stride, pairs = in(reg) 128usize,
                block = const BLOCK, c = in(reg) t.c, c2 = in(reg) t.c.wrapping_add(TILE * t.c_stride), cs = in(reg) c_stride,
                accumulate = in(reg) accumulate,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                out("tmm7") _, options(nostack)
            );
        }
    }

    #[inline(always)]
    fn end(state: DotState) {
        if state.rows > 0 {
            // SAFETY: the tiles were configured; nothing is kept in them between tiles.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
    const PROBE_FLOPS: usize = 4 * TILE * TILE * DOT_STEPS * 2;
    #[inline(always)]
    unsafe fn probe(rounds: usize) -> f32 {
        // SAFETY: the processor has AMX-BF16; configuring the tiles empties them.
        unsafe {
            configure(2 * TILE);
            for _ in 0..rounds {
                asm!(
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    options(nostack, nomem)
                );
            }
            asm!("tilerelease", options(nostack, nomem));
        }
        0.0
    }
}
