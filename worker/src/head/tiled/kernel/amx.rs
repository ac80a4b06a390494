//! Products of bf16 pairs by AMX, whose instructions multiply whole tiles: 16 rows of 16 words by 16 rows of 16 words (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 1, chapter 18). Knows blocks of the result and their edges; lengths were checked by
//! [`multiply`](super::gemm::multiply).
//!
//! The words of both operands are those of tiles, so most of them are loaded from where they lie. Rows that fill no tile, and the turned left
//! operand, go through scratch memory.
//!
//! It needs `unsafe` for instructions that Rust has no names for, and for operands by pointer.
#![allow(unsafe_code)]

#[cfg(test)]
pub mod emulator;

use super::gemm::{Job, PANEL};
use nix::libc;
use std::arch::{
    asm,
    x86_64::{
        __cpuid, __cpuid_count, __m512i, _mm512_loadu_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    },
};

/// Rows of a tile, and words of its rows.
const TILE: usize = 16;
/// Rows and columns of a block of the result: two tiles each way, so that every tile of an operand is used twice.
const BLOCK: usize = 2 * TILE;
/// Words along the inner dimension that a pass over the result takes: two tiles' rows of them are most of a first-level cache.
const DEPTH: usize = 256;

const _: () = assert!(BLOCK == PANEL && DEPTH.is_multiple_of(TILE));

/// True if this processor has the instructions and the system lets this process use them.
pub fn available() -> bool {
    // Leaf 7 of CPUID, EDX.
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    let has = __cpuid(0).eax >= 7 && {
        let features = __cpuid_count(7, 0).edx;
        features & AMX_BF16 != 0 && features & AMX_TILE != 0
    };
    has && permitted()
}

/// Asks Linux for the tiles' registers, which it saves only for processes that did (its documentation, x86/xstate).
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call reads and writes no memory of this process.
    let answer = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
    answer == 0
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row, by register.
    row_bytes: [u16; 16],
    /// Rows, by register.
    rows: [u8; 16],
}

/// All eight registers hold whole tiles.
static CONFIGURATION: Configuration = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut register = 0;
    while register < 8 {
        row_bytes[register] = (TILE * size_of::<u32>()) as u16;
        rows[register] = TILE as u8;
        register += 1;
    }
    Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes,
        rows,
    }
};

/// Where edges are put together.
struct Scratch {
    /// Rows of the left operand.
    left: [[u32; DEPTH]; BLOCK],
    /// The last rows of the right operand.
    right: [[u32; BLOCK]; TILE],
    /// A block of the result.
    out: [[f32; BLOCK]; BLOCK],
}

/// A matrix in memory: where it begins, and the distance of its rows, in elements.
#[derive(Clone, Copy)]
struct Rows<T> {
    first: T,
    row: usize,
}

/// The product.
///
/// # Safety
/// As [`multiply`](super::gemm::multiply) checks; the machine has AMX, or emulates it, and may use it; and it has AVX-512 if `has_avx512` says so.
pub(super) unsafe fn bf16(job: &Job, has_avx512: bool) {
    let shape = job.shape;
    let turn: Turn = if has_avx512 { turn_avx512 } else { turn_portable };
    // SAFETY: the caller's: every pointer formed from the job is inside its slice, because m < rows, k < inner, n < columns.
    unsafe {
        if shape.inner == 0 {
            return if !job.add {
                zero(job)
            };
        }
        asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly, preserves_flags));
        let mut scratch = Scratch {
            left: [[0; DEPTH]; BLOCK],
            right: [[0; BLOCK]; TILE],
            out: [[0.0; BLOCK]; BLOCK],
        };
        for k in (0..shape.inner).step_by(DEPTH) {
            let depth = (shape.inner - k).min(DEPTH);
            let add = job.add || k > 0;
            for m in (0..shape.rows).step_by(BLOCK) {
                let rows = (shape.rows - m).min(BLOCK);
                let left = left(job, m..m + rows, k..k + depth, &mut scratch.left, turn);
                for n in (0..shape.columns).step_by(BLOCK) {
                    let out = job.out.add(m * job.out_row + n);
                    let whole = Rows {
                        first: out,
                        row: job.out_row,
                    };
                    if rows == BLOCK {
                        inner(job, left, n, k..k + depth, &mut scratch.right, whole, add);
                        continue;
                    }
                    let part = Rows {
                        first: scratch.out.as_mut_ptr().cast(),
                        row: BLOCK,
                    };
                    inner(job, left, n, k..k + depth, &mut scratch.right, part, false);
                    for (r, row) in scratch.out.iter().enumerate().take(rows) {
                        for (c, value) in row.iter().enumerate() {
                            let at = out.add(r * job.out_row + c);
                            *at = if add { *at + value } else { *value };
                        }
                    }
                }
            }
        }
        // The tiles are left as they are at rest: nothing to save when threads change.
        asm!("tilerelease", options(nostack, nomem, preserves_flags));
    }
}

/// A product with nothing to add up.
///
/// # Safety
/// As [`bf16`].
unsafe fn zero(job: &Job) {
    for m in 0..job.shape.rows {
        // SAFETY: the caller's.
        unsafe { job.out.add(m * job.out_row).write_bytes(0, job.shape.columns) };
    }
}

/// Rows of the left operand as tiles: where they lie, or, if they are turned or fill no tile, in `scratch` with zeros beyond.
///
/// # Safety
/// As [`bf16`].
unsafe fn left(
    job: &Job,
    rows: std::ops::Range<usize>,
    words: std::ops::Range<usize>,
    scratch: &mut [[u32; DEPTH]; BLOCK],
    turn: Turn,
) -> Rows<*const u32> {
    // SAFETY: the caller's; scratch holds as many rows and words as a pass takes.
    unsafe {
        let first = job
            .left
            .add(rows.start * job.left_row + words.start * job.left_step);
        let is_whole = rows.len() == BLOCK && words.len().is_multiple_of(TILE);
        if is_whole && job.left_step == 1 {
            return Rows {
                first,
                row: job.left_row,
            };
        }
        if is_whole {
            for m in (0..BLOCK).step_by(TILE) {
                for k in (0..words.len()).step_by(TILE) {
                    let from = Rows {
                        first: first.add(m + k * job.left_step),
                        row: job.left_step,
                    };
                    turn(
                        from,
                        Rows {
                            first: scratch.as_mut_ptr().cast::<u32>().add(m * DEPTH + k),
                            row: DEPTH,
                        },
                    );
                }
            }
        } else {
            for (m, row) in scratch.iter_mut().enumerate() {
                let padded = words.len().next_multiple_of(TILE);
                for (k, word) in row[..padded].iter_mut().enumerate() {
                    let inside = m < rows.len() && k < words.len();
                    *word = match inside {
                        true => *first.add(m * job.left_row + k * job.left_step),
                        false => 0,
                    };
                }
            }
        }
    }
    Rows {
        first: scratch.as_ptr().cast(),
        row: DEPTH,
    }
}

/// A block of the result, columns `n..n + BLOCK`, from some words along the inner dimension.
///
/// # Safety
/// As [`bf16`]; `left` and `out` have [`BLOCK`] rows.
unsafe fn inner(
    job: &Job,
    left: Rows<*const u32>,
    n: usize,
    words: std::ops::Range<usize>,
    scratch: &mut [[u32; BLOCK]; TILE],
    out: Rows<*mut f32>,
    add: bool,
) {
    let (steps, rest) = (words.len() / TILE, words.len() % TILE);
    // SAFETY: the caller's; the rest goes through scratch, since a tile of it would end outside.
    unsafe {
        let right = Rows {
            first: job
                .right
                .add(n / PANEL * job.right_panel + words.start * job.right_step),
            row: job.right_step,
        };
        if steps > 0 {
            tiles(left, right, steps, out, add);
        }
        if rest > 0 {
            for (k, row) in scratch.iter_mut().enumerate() {
                for (c, word) in row.iter_mut().enumerate() {
                    *word = match k < rest {
                        true => *right.first.add((steps * TILE + k) * right.row + c),
                        false => 0,
                    };
                }
            }
            let left = Rows {
                first: left.first.add(steps * TILE),
                ..left
            };
            let right = Rows {
                first: scratch.as_ptr().cast(),
                row: BLOCK,
            };
            tiles(left, right, 1, out, add || steps > 0);
        }
    }
}

/// `out (+)= left * right` for one block and `steps` tiles along the inner dimension.
///
/// # Safety
/// As [`inner`]; `steps` is at least 1, and so many whole tiles are there.
unsafe fn tiles(
    left: Rows<*const u32>,
    right: Rows<*const u32>,
    steps: usize,
    out: Rows<*mut f32>,
    add: bool,
) {
    const WORD: usize = size_of::<u32>();
    // SAFETY: the caller's. Sums are in tmm0 to tmm3, the left operand's tiles in tmm4 and tmm5, the right one's in tmm6 and tmm7.
    unsafe {
        asm!(
            "test {add:e}, {add:e}",
            "jz 2f",
            "tileloadd tmm0, [{out} + {out_row}*1]",
            "tileloadd tmm1, [{out} + {out_row}*1 + 64]",
            "tileloadd tmm2, [{out_below} + {out_row}*1]",
            "tileloadd tmm3, [{out_below} + {out_row}*1 + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{left} + {left_row}*1]",
            "tileloadd tmm6, [{right} + {right_row}*1]",
            "tileloadd tmm7, [{right} + {right_row}*1 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{left_below} + {left_row}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {left}, 64",
            "add {left_below}, 64",
            "add {right}, {right_step}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{out} + {out_row}*1], tmm0",
            "tilestored [{out} + {out_row}*1 + 64], tmm1",
            "tilestored [{out_below} + {out_row}*1], tmm2",
            "tilestored [{out_below} + {out_row}*1 + 64], tmm3",
            add = in(reg) u32::from(add),
            out = in(reg) out.first,
            out_below = in(reg) out.first.add(TILE * out.row),
            out_row = in(reg) out.row * WORD,
            left = inout(reg) left.first => _,
            left_below = inout(reg) left.first.add(TILE * left.row) => _,
            left_row = in(reg) left.row * WORD,
            right = inout(reg) right.first => _,
            right_row = in(reg) right.row * WORD,
            right_step = in(reg) TILE * right.row * WORD,
            steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Turns a tile: word (m, k) of the second becomes word (k, m) of the first.
///
/// Unsafe, because both must hold a tile, and the machine must have what it is compiled for.
type Turn = unsafe fn(Rows<*const u32>, Rows<*mut u32>);

/// On any machine.
///
/// # Safety
/// See [`Turn`].
unsafe fn turn_portable(from: Rows<*const u32>, to: Rows<*mut u32>) {
    for k in 0..TILE {
        for m in 0..TILE {
            // SAFETY: the caller's.
            unsafe { *to.first.add(m * to.row + k) = *from.first.add(k * from.row + m) };
        }
    }
}

/// In registers: words change places within pairs, pairs within lanes of four words, and lanes within rows.
///
/// # Safety
/// See [`Turn`].
#[target_feature(enable = "avx512f")]
unsafe fn turn_avx512(from: Rows<*const u32>, to: Rows<*mut u32>) {
    // SAFETY: the caller's.
    let rows: [__m512i; TILE] =
        std::array::from_fn(|k| unsafe { _mm512_loadu_si512(from.first.add(k * from.row).cast()) });
    let pairs: [__m512i; TILE] = std::array::from_fn(|i| match i % 2 {
        0 => _mm512_unpacklo_epi32(rows[i], rows[i + 1]),
        _ => _mm512_unpackhi_epi32(rows[i - 1], rows[i]),
    });
    // Lane l of fours[4 * i + j] is column 4 * l + j of rows 4 * i to 4 * i + 3.
    let fours: [__m512i; TILE] = std::array::from_fn(|i| {
        let at = i / 4 * 4 + i % 4 / 2;
        match i % 2 {
            0 => _mm512_unpacklo_epi64(pairs[at], pairs[at + 2]),
            _ => _mm512_unpackhi_epi64(pairs[at], pairs[at + 2]),
        }
    });
    for j in 0..4 {
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        let (even, even_below) = (
            _mm512_shuffle_i32x4::<0x88>(a, b),
            _mm512_shuffle_i32x4::<0x88>(c, d),
        );
        let (odd, odd_below) = (
            _mm512_shuffle_i32x4::<0xdd>(a, b),
            _mm512_shuffle_i32x4::<0xdd>(c, d),
        );
        let columns = [
            _mm512_shuffle_i32x4::<0x88>(even, even_below),
            _mm512_shuffle_i32x4::<0x88>(odd, odd_below),
            _mm512_shuffle_i32x4::<0xdd>(even, even_below),
            _mm512_shuffle_i32x4::<0xdd>(odd, odd_below),
        ];
        for (lane, column) in columns.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { _mm512_storeu_si512(to.first.add((4 * lane + j) * to.row).cast(), column) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_turned() {
        let from: Vec<u32> = (0..TILE as u32 * 20).collect();
        let mut turns: Vec<Turn> = vec![turn_portable];
        if is_x86_feature_detected!("avx512f") {
            turns.push(turn_avx512);
        }
        for turn in turns {
            let mut to = vec![0; TILE * 17];
            let rows = Rows {
                first: from.as_ptr(),
                row: 20,
            };
            // SAFETY: both hold 16 rows of 16 words; the features were looked for.
            unsafe {
                turn(
                    rows,
                    Rows {
                        first: to.as_mut_ptr(),
                        row: 17,
                    },
                );
            }
            for (m, row) in to.chunks(17).enumerate() {
                for (k, word) in row[..TILE].iter().enumerate() {
                    assert_eq!(*word, (k * 20 + m) as u32, "{m} {k}");
                }
            }
        }
    }
}
