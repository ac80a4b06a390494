//! Matrix products on small blocks that lie in the cache: register-tiled kernels for f32, and for pairs of bf16 with
//! f32 sums. Knows no head.
//!
//! Operands are 4-byte *words*: an f32, or two bf16 that are neighbours along the inner dimension (low half first).
//! The order of every sum depends on the shapes alone.
//!
//! It needs `unsafe` for vector loads and stores by pointer; [`multiply`] checks all lengths first.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::isa::{Isa, Level};

/// Columns of a panel of the right operand.
pub const PANEL: usize = 32;

/// What a word is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One f32.
    F32,
    /// Two bf16.
    Bf16,
}

impl Format {
    /// Elements along the inner dimension in a word.
    pub const fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }
}

/// The left operand: word (m, k) is `words[m * row + k * step]`; one of the strides is 1.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    /// The words.
    pub words: &'a [u32],
    /// Distance of rows.
    pub row: usize,
    /// Distance of neighbours along the inner dimension.
    pub step: usize,
}

/// The right operand in panels of [`PANEL`] columns: word (k, n) is `words[n / 32 * panel + k * step + n % 32]`.
#[derive(Clone, Copy)]
pub struct Right<'a> {
    /// The words.
    pub words: &'a [u32],
    /// Distance of panels.
    pub panel: usize,
    /// Distance of neighbours along the inner dimension.
    pub step: usize,
}

/// The result: element (m, n) is `values[m * row + n]`.
pub struct Out<'a> {
    /// The elements.
    pub values: &'a mut [f32],
    /// Distance of rows.
    pub row: usize,
    /// Adds to what is there instead of replacing it.
    pub add: bool,
}

/// Which loop is outside: what it runs over stays in the nearest cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Blocks of rows of the left operand.
    RowsFirst,
    /// Panels of the right operand.
    PanelsFirst,
}

/// Rows, columns (a multiple of 32) and words along the inner dimension.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Words.
    pub inner: usize,
}

/// `out (+)= left * right`.
///
/// # Panics
/// If a slice is too short for the shape, the shape breaks [`Shape`]'s rules, or the machine has no instruction for
/// the format: bugs of the caller.
pub fn multiply(
    isa: Isa,
    format: Format,
    shape: Shape,
    left: Left<'_>,
    right: Right<'_>,
    out: Out<'_>,
    order: Order,
) {
    let Shape { rows, columns, inner } = shape;
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns.is_multiple_of(PANEL), "columns come in panels");
    assert!(
        left.row == 1 || left.step == 1,
        "one stride of the left operand is 1"
    );
    assert!(
        out.row >= columns && (out.values.len() >= (rows - 1) * out.row + columns),
        "result"
    );
    if inner > 0 {
        assert!(
            left.words.len() > (rows - 1) * left.row + (inner - 1) * left.step,
            "left operand"
        );
        let last = (columns / PANEL - 1) * right.panel + (inner - 1) * right.step + PANEL;
        assert!(right.words.len() >= last, "right operand");
    }
    let job = Job {
        shape,
        left: left.words.as_ptr(),
        left_row: left.row,
        left_step: left.step,
        right: right.words.as_ptr(),
        right_panel: right.panel,
        right_step: right.step,
        out: out.values.as_mut_ptr(),
        out_row: out.row,
        add: out.add,
        order,
    };
    // SAFETY: the lengths were checked above for every index that the kernels form: m < rows, k < inner, n < columns.
    // An `Isa` of a level exists only where the machine has its instructions.
    unsafe {
        match (format, isa.level()) {
            #[cfg(target_arch = "x86_64")]
            (Format::Bf16, level) if isa.has_tiles() => {
                amx::bf16(&job, matches!(level, Level::Avx512 | Level::Avx512Bf16));
            }
            (Format::F32, Level::Portable) => drive::<portable::F32, 4, 4>(&job),
            #[cfg(target_arch = "x86_64")]
            (Format::F32, Level::Avx2) => x86::f32_avx2(&job),
            #[cfg(target_arch = "x86_64")]
            (Format::F32, Level::Avx512 | Level::Avx512Bf16) => x86::f32_avx512(&job),
            #[cfg(target_arch = "x86_64")]
            (Format::Bf16, Level::Avx512Bf16) => x86::bf16_avx512(&job),
            (Format::Bf16, _) => panic!("{} multiplies no bf16", isa.name()),
        }
    }
}

/// True if a product of whole numbers, which are exact in any order, is what it should be: with rows and words that fill no block, and
/// the left operand either way round.
pub(super) fn is_right(isa: Isa, format: Format) -> bool {
    let shape = Shape {
        rows: 37,
        columns: 2 * PANEL,
        inner: 40,
    };
    let Shape { rows, columns, inner } = shape;
    let elements = inner * format.per_word();
    let left_at = |m: usize, e: usize| (m * 7 + e * 3) as i64 % 11 - 5;
    let right_at = |e: usize, n: usize| (e * 5 + n) as i64 % 7 - 3;
    let word = |element: &dyn Fn(usize) -> i64, k: usize| match format {
        Format::F32 => (element(k) as f32).to_bits(),
        Format::Bf16 => {
            let half = |e: usize| (element(e) as f32).to_bits() >> 16;
            half(2 * k) | half(2 * k + 1) << 16
        }
    };
    let (mut straight, mut turned) = (vec![0; rows * inner], vec![0; rows * inner]);
    for (m, k) in (0..rows).flat_map(|m| (0..inner).map(move |k| (m, k))) {
        let word = word(&|e| left_at(m, e), k);
        (straight[m * inner + k], turned[k * rows + m]) = (word, word);
    }
    let mut panels = vec![0; inner * columns];
    for (k, n) in (0..inner).flat_map(|k| (0..columns).map(move |n| (k, n))) {
        panels[n / PANEL * PANEL * inner + k * PANEL + n % PANEL] = word(&|e| right_at(e, n), k);
    }
    let right = Right {
        words: &panels,
        panel: PANEL * inner,
        step: PANEL,
    };
    let lefts = [
        (&straight, inner, 1, Order::RowsFirst),
        (&turned, 1, rows, Order::PanelsFirst),
    ];
    lefts.into_iter().all(|(words, row, step, order)| {
        let mut values = vec![f32::NAN; rows * columns];
        for add in [false, true] {
            let out = Out {
                values: &mut values,
                row: columns,
                add,
            };
            multiply(isa, format, shape, Left { words, row, step }, right, out, order);
        }
        values.iter().enumerate().all(|(at, value)| {
            let (m, n) = (at / columns, at % columns);
            let once: i64 = (0..elements).map(|e| left_at(m, e) * right_at(e, n)).sum();
            *value == (2 * once) as f32
        })
    })
}

/// A product whose lengths were checked.
pub(super) struct Job {
    pub shape: Shape,
    pub left: *const u32,
    pub left_row: usize,
    pub left_step: usize,
    pub right: *const u32,
    pub right_panel: usize,
    pub right_step: usize,
    pub out: *mut f32,
    pub out_row: usize,
    pub add: bool,
    pub order: Order,
}

/// Arithmetic on vectors of words.
///
/// # Safety
/// Pointers are valid for `LANES` words (`broadcast`: for one), and the machine has the instructions.
trait Vector: Copy {
    const LANES: usize;
    type Sum: Copy;
    unsafe fn load(at: *const u32) -> Self;
    unsafe fn broadcast(at: *const u32) -> Self;
    unsafe fn zero() -> Self::Sum;
    unsafe fn read(at: *const f32) -> Self::Sum;
    unsafe fn write(at: *mut f32, sum: Self::Sum);
    /// `sum + a * b`, lane by lane.
    unsafe fn add_product(sum: Self::Sum, a: Self, b: Self) -> Self::Sum;
}

/// All blocks of the result. `ROWS`: rows of a block; `VECTORS`: vectors of a block's row. The block's sums, one row
/// of the right operand and one word of the left one fill the registers.
///
/// # Safety
/// As [`multiply`] checks, and the machine has `V`'s instructions.
#[inline(always)]
unsafe fn drive<V: Vector, const ROWS: usize, const VECTORS: usize>(job: &Job) {
    let Shape { rows, columns, .. } = job.shape;
    let width = V::LANES * VECTORS;
    // SAFETY: the caller's.
    unsafe {
        match job.order {
            Order::RowsFirst => {
                for m in (0..rows).step_by(ROWS) {
                    for n in (0..columns).step_by(width) {
                        block::<V, ROWS, VECTORS>(job, m, n);
                    }
                }
            }
            Order::PanelsFirst => {
                for n in (0..columns).step_by(width) {
                    for m in (0..rows).step_by(ROWS) {
                        block::<V, ROWS, VECTORS>(job, m, n);
                    }
                }
            }
        }
    }
}

/// The block that begins at (m, n), smaller at the end of the rows.
///
/// # Safety
/// As [`drive`].
#[inline(always)]
unsafe fn block<V: Vector, const ROWS: usize, const VECTORS: usize>(job: &Job, m: usize, n: usize) {
    // SAFETY: the caller's; the rows of the blocks add up to what is left.
    unsafe {
        let mut m = m;
        let mut left = (job.shape.rows - m).min(ROWS);
        if left == ROWS {
            return micro::<V, ROWS, VECTORS>(job, m, n);
        }
        if left >= 8 {
            micro::<V, 8, VECTORS>(job, m, n);
            (m, left) = (m + 8, left - 8);
        }
        if left >= 4 {
            micro::<V, 4, VECTORS>(job, m, n);
            (m, left) = (m + 4, left - 4);
        }
        for m in m..m + left {
            micro::<V, 1, VECTORS>(job, m, n);
        }
    }
}

/// # Safety
/// As [`drive`]; the block lies inside the result.
#[inline(always)]
unsafe fn micro<V: Vector, const ROWS: usize, const VECTORS: usize>(job: &Job, m: usize, n: usize) {
    // SAFETY: the caller's: every pointer is inside its slice.
    unsafe {
        let left = job.left.add(m * job.left_row);
        let mut right = job.right.add(n / PANEL * job.right_panel + n % PANEL);
        let out = job.out.add(m * job.out_row + n);
        let mut sums = [[V::zero(); VECTORS]; ROWS];
        if job.add {
            for (r, row) in sums.iter_mut().enumerate() {
                for (v, sum) in row.iter_mut().enumerate() {
                    *sum = V::read(out.add(r * job.out_row + v * V::LANES));
                }
            }
        }
        // Two loops, so that in each one stride of the left operand is a constant of the addresses.
        if job.left_row == 1 {
            let mut left = left;
            for _ in 0..job.shape.inner {
                accumulate::<V, ROWS, VECTORS>(&mut sums, |r| left.add(r), right);
                left = left.add(job.left_step);
                right = right.add(job.right_step);
            }
        } else {
            // Every third row has a pointer of its own, the others are one or two strides from it, which is an address
            // mode: twelve pointers would not fit the registers.
            let mut thirds = [left; 4];
            for (third, at) in thirds.iter_mut().enumerate().take(ROWS.div_ceil(3)) {
                *at = left.add(third * 3 * job.left_row);
            }
            for _ in 0..job.shape.inner {
                accumulate::<V, ROWS, VECTORS>(&mut sums, |r| thirds[r / 3].add(r % 3 * job.left_row), right);
                for at in thirds.iter_mut().take(ROWS.div_ceil(3)) {
                    *at = at.add(1);
                }
                right = right.add(job.right_step);
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                V::write(out.add(r * job.out_row + v * V::LANES), *sum);
            }
        }
    }
}

/// One step along the inner dimension; `left` gives the place of a row's word.
///
/// # Safety
/// As [`micro`].
#[inline(always)]
unsafe fn accumulate<V: Vector, const ROWS: usize, const VECTORS: usize>(
    sums: &mut [[V::Sum; VECTORS]; ROWS],
    left: impl Fn(usize) -> *const u32,
    right: *const u32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut columns = [V::load(right); VECTORS];
        for (v, column) in columns.iter_mut().enumerate().skip(1) {
            *column = V::load(right.add(v * V::LANES));
        }
        for (r, row) in sums.iter_mut().enumerate() {
            let word = V::broadcast(left(r));
            for (sum, column) in row.iter_mut().zip(columns) {
                *sum = V::add_product(*sum, word, column);
            }
        }
    }
}

mod portable {
    //! Any machine: arrays that the compiler turns into what vectors there are.
    use super::Vector;

    #[derive(Clone, Copy)]
    pub(super) struct F32([f32; 4]);

    impl Vector for F32 {
        const LANES: usize = 4;
        type Sum = [f32; 4];

        #[inline(always)]
        unsafe fn load(at: *const u32) -> Self {
            // SAFETY: valid for 4 words by the trait's contract.
            Self(unsafe { at.cast::<[f32; 4]>().read_unaligned() })
        }

        #[inline(always)]
        unsafe fn broadcast(at: *const u32) -> Self {
            // SAFETY: valid for one word.
            Self([unsafe { at.cast::<f32>().read() }; 4])
        }

        #[inline(always)]
        unsafe fn zero() -> [f32; 4] {
            [0.0; 4]
        }

        #[inline(always)]
        unsafe fn read(at: *const f32) -> [f32; 4] {
            // SAFETY: valid for 4 elements.
            unsafe { at.cast::<[f32; 4]>().read_unaligned() }
        }

        #[inline(always)]
        unsafe fn write(at: *mut f32, sum: [f32; 4]) {
            // SAFETY: valid for 4 elements.
            unsafe { at.cast::<[f32; 4]>().write_unaligned(sum) }
        }

        #[inline(always)]
        unsafe fn add_product(sum: [f32; 4], a: Self, b: Self) -> [f32; 4] {
            let mut out = sum;
            for (i, out) in out.iter_mut().enumerate() {
                *out += a.0[i] * b.0[i];
            }
            out
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The kernels for x86: 12 x 32 results of 512 bits (24 of 32 registers), 6 x 16 of 256 bits (12 of 16).
    use super::{Job, Vector, drive};
    use std::arch::x86_64::{
        __m256, __m512, __m512bh, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_storeu_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    /// # Safety
    /// As [`drive`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn f32_avx2(job: &Job) {
        // SAFETY: the caller's; the features are this function's.
        unsafe { drive::<Avx2, 6, 2>(job) }
    }

    /// # Safety
    /// As [`drive`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn f32_avx512(job: &Job) {
        // SAFETY: as above.
        unsafe { drive::<Avx512<false>, 12, 2>(job) }
    }

    /// # Safety
    /// As [`drive`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn bf16_avx512(job: &Job) {
        // SAFETY: as above.
        unsafe { drive::<Avx512<true>, 12, 2>(job) }
    }

    #[derive(Clone, Copy)]
    struct Avx2(__m256);

    // Each method is inlined into a function above, which has its feature; pointers are valid by the trait's contract.
    impl Vector for Avx2 {
        const LANES: usize = 8;
        type Sum = __m256;

        #[inline(always)]
        unsafe fn load(at: *const u32) -> Self {
            // SAFETY: valid for 8 words.
            Self(unsafe { _mm256_loadu_ps(at.cast()) })
        }

        #[inline(always)]
        unsafe fn broadcast(at: *const u32) -> Self {
            // SAFETY: valid for one word.
            Self(unsafe { _mm256_set1_ps(*at.cast()) })
        }

        #[inline(always)]
        unsafe fn zero() -> __m256 {
            // SAFETY: the caller has AVX2.
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn read(at: *const f32) -> __m256 {
            // SAFETY: valid for 8 elements.
            unsafe { _mm256_loadu_ps(at) }
        }

        #[inline(always)]
        unsafe fn write(at: *mut f32, sum: __m256) {
            // SAFETY: valid for 8 elements.
            unsafe { _mm256_storeu_ps(at, sum) }
        }

        #[inline(always)]
        unsafe fn add_product(sum: __m256, a: Self, b: Self) -> __m256 {
            // SAFETY: the caller has FMA.
            unsafe { _mm256_fmadd_ps(a.0, b.0, sum) }
        }
    }

    /// Words of 512 bits: f32, or pairs of bf16 if `PAIRS`.
    #[derive(Clone, Copy)]
    struct Avx512<const PAIRS: bool>(__m512);

    impl<const PAIRS: bool> Vector for Avx512<PAIRS> {
        const LANES: usize = 16;
        type Sum = __m512;

        #[inline(always)]
        unsafe fn load(at: *const u32) -> Self {
            // SAFETY: valid for 16 words.
            Self(unsafe { _mm512_loadu_ps(at.cast()) })
        }

        #[inline(always)]
        unsafe fn broadcast(at: *const u32) -> Self {
            // SAFETY: valid for one word; any pattern of bits goes through f32 unchanged, because it is only copied.
            Self(unsafe { _mm512_set1_ps(*at.cast()) })
        }

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            // SAFETY: the caller has AVX-512.
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn read(at: *const f32) -> __m512 {
            // SAFETY: valid for 16 elements.
            unsafe { _mm512_loadu_ps(at) }
        }

        #[inline(always)]
        unsafe fn write(at: *mut f32, sum: __m512) {
            // SAFETY: valid for 16 elements.
            unsafe { _mm512_storeu_ps(at, sum) }
        }

        #[inline(always)]
        unsafe fn add_product(sum: __m512, a: Self, b: Self) -> __m512 {
            let pairs = |words: __m512| {
                // SAFETY: both types are 512 bits of any pattern.
                unsafe { std::mem::transmute::<__m512, __m512bh>(words) }
            };
            // SAFETY: the caller has AVX-512, and AVX512-BF16 where words are pairs.
            unsafe {
                match PAIRS {
                    true => _mm512_dpbf16_ps(sum, pairs(a.0), pairs(b.0)),
                    false => _mm512_fmadd_ps(a.0, b.0, sum),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
