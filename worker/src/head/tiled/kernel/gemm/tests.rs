//! Every kernel that this machine has, and AMX's emulated where it has none, against whole numbers and sums in f64.

use super::*;
use crate::random::{Purpose, Stream};
use half::bf16;

/// Random values and their words, `rows` x `inner` elements, words along the inner dimension.
fn words(format: Format, rows: usize, inner: usize, seed: u64) -> (Vec<f32>, Vec<u32>) {
    let mut draws = Stream::new(seed, Purpose::Synthetic, 0, 0);
    let values: Vec<f32> = (0..rows * inner)
        .map(|_| bf16::from_f64(draws.next_normal()).to_f32())
        .collect();
    let packed = match format {
        Format::F32 => values.iter().map(|v| v.to_bits()).collect(),
        Format::Bf16 => values
            .chunks_exact(2)
            .map(|p| {
                u32::from(bf16::from_f32(p[0]).to_bits()) | u32::from(bf16::from_f32(p[1]).to_bits()) << 16
            })
            .collect(),
    };
    (values, packed)
}

/// What this machine has, and AMX.
fn every() -> Vec<Isa> {
    let mut all = Isa::all();
    #[cfg(target_arch = "x86_64")]
    all.push(Isa::with_tiles());
    all
}

#[test]
fn whole_numbers_are_exact() {
    for isa in every() {
        assert!(is_right(isa, Format::F32), "{isa:?}");
        assert!(!isa.multiplies_bf16() || is_right(isa, Format::Bf16), "{isa:?}");
    }
}

/// Nothing to add up is 0, or leaves what was there.
#[test]
fn no_words_along_the_inner_dimension() {
    for isa in every().into_iter().filter(|isa| isa.multiplies_bf16()) {
        for (add, expected) in [(false, 0.0), (true, 7.0)] {
            let mut values = vec![7.0; 3 * PANEL];
            let out = Out {
                values: &mut values,
                row: PANEL,
                add,
            };
            let shape = Shape {
                rows: 3,
                columns: PANEL,
                inner: 0,
            };
            let left = Left {
                words: &[],
                row: 1,
                step: 1,
            };
            let right = Right {
                words: &[],
                panel: 0,
                step: PANEL,
            };
            multiply(isa, Format::Bf16, shape, left, right, out, Order::RowsFirst);
            assert_eq!(values, vec![expected; 3 * PANEL], "{isa:?}");
        }
    }
}

/// Every kernel against sums in f64, both layouts of the left operand, both orders, rows that fill no block, and more words than one
/// pass of tiles takes.
#[test]
fn kernels_multiply() {
    for isa in every() {
        for format in [Format::F32, Format::Bf16] {
            if format == Format::Bf16 && !isa.multiplies_bf16() {
                continue;
            }
            for (rows, columns, inner) in [
                (1, 32, 8),
                (7, 64, 40),
                (12, 32, 64),
                (29, 96, 16),
                (64, 64, 64),
                (40, 32, 600),
            ] {
                let (a, a_words) = words(format, rows, inner, 1);
                let (b, b_words) = words(format, columns, inner, 2);
                let steps = inner / format.per_word();
                let mut panels = vec![0u32; columns * steps];
                for n in 0..columns {
                    for k in 0..steps {
                        panels[n / 32 * 32 * steps + k * 32 + n % 32] = b_words[n * steps + k];
                    }
                }
                let mut turned = vec![0u32; rows * steps];
                for m in 0..rows {
                    for k in 0..steps {
                        turned[k * rows + m] = a_words[m * steps + k];
                    }
                }
                let lefts = [
                    (
                        Left {
                            words: &a_words,
                            row: steps,
                            step: 1,
                        },
                        Order::RowsFirst,
                    ),
                    (
                        Left {
                            words: &turned,
                            row: 1,
                            step: rows,
                        },
                        Order::PanelsFirst,
                    ),
                ];
                for (left, order) in lefts {
                    let right = Right {
                        words: &panels,
                        panel: 32 * steps,
                        step: 32,
                    };
                    let mut out = vec![1f32; rows * columns];
                    let shape = Shape {
                        rows,
                        columns,
                        inner: steps,
                    };
                    for add in [false, true] {
                        let out = Out {
                            values: &mut out,
                            row: columns,
                            add,
                        };
                        multiply(isa, format, shape, left, right, out, order);
                    }
                    for m in 0..rows {
                        for n in 0..columns {
                            let products =
                                (0..inner).map(|k| f64::from(a[m * inner + k]) * f64::from(b[n * inner + k]));
                            let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| {
                                (sum + product, size + product.abs())
                            });
                            let expected = 2.0 * sum;
                            let got = f64::from(out[m * columns + n]);
                            assert!(
                                (got - expected).abs() < 1e-6 * size,
                                "{isa:?} {format:?} {m} {n}: {got} {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
}
