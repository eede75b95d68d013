//! Judging an output: row by row against the oracle, and cell by cell where nothing may be written.
//!
//! A row is compared with its own largest value, so that one wrong row among thousands is seen.
//! tests/compare.rs feeds this harness wrong answers, and it must object to each.

#![allow(dead_code, reason = "every test file uses its own part of this")]

use std::ops::Range;

/// How far a value may be from the oracle's: `atol + rtol * max |the oracle's row|`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// For every value.
    pub atol: f64,
    /// Times the largest magnitude in the oracle's row.
    pub rtol: f64,
}

impl Tolerance {
    /// The same, `factor` times as wide: for values of another magnitude than about one.
    pub fn times(self, factor: f64) -> Self {
        Tolerance {
            atol: self.atol * factor,
            rtol: self.rtol * factor,
        }
    }
}

/// The one table of tolerances, by storage type: "f32", "f16" or "bf16". `reduction_len` is the
/// longest sum behind a value: K for attention, the inner width for a matmul.
///
/// It is meant for inputs of magnitude about one which were rounded to the storage type before the
/// oracle saw them (see [`round_to`]), and for f32 scores, state and accumulators. What is left of a
/// 16-bit type is then the rounding of the output, at most half a unit in the last place: 2^-11 of
/// the value for f16, 2^-8 for bf16. Twice that is allowed, beside the errors of f32 sums, which
/// grow with the square root of their length.
pub fn tolerance(storage: &str, reduction_len: usize) -> Tolerance {
    let growth = (reduction_len as f64 / 1024.0).sqrt().max(1.0);
    let output = match storage {
        "f32" => Tolerance {
            atol: 0.0,
            rtol: 0.0,
        },
        // Subnormals are 2^-24 apart.
        "f16" => Tolerance {
            atol: power_of_two(-24),
            rtol: power_of_two(-10),
        },
        "bf16" => Tolerance {
            atol: 0.0,
            rtol: power_of_two(-7),
        },
        other => panic!("no tolerance for storage {other}"),
    };
    Tolerance {
        atol: output.atol + 2e-6 * growth,
        rtol: output.rtol + 2e-5 * growth,
    }
}

/// Compares `got` with `want`, both `[rows, row_len]`, and answers with the worst ratio of error to
/// tolerance, at most 1.
///
/// It objects to an error beyond the tolerance, to a length that differs or is not whole rows, to
/// NaN on either side, and to an infinity unless the oracle has the same one (as an LSE has); it
/// then names the first and the worst row.
pub fn compare_rows(
    name: &str,
    got: &[f32],
    want: &[f64],
    row_len: usize,
    tol: Tolerance,
) -> Result<f64, String> {
    if got.len() != want.len() {
        return Err(format!(
            "{name}: {} values, the oracle has {}",
            got.len(),
            want.len()
        ));
    }
    if got.is_empty() {
        return Ok(0.0);
    }
    if row_len == 0 || !got.len().is_multiple_of(row_len) {
        return Err(format!(
            "{name}: {} values are not rows of {row_len}",
            got.len()
        ));
    }
    let rows = got.len() / row_len;
    let mut wrong = 0;
    let mut first = None;
    let mut worst: Option<Cell> = None;
    for (row, (g, w)) in got
        .chunks_exact(row_len)
        .zip(want.chunks_exact(row_len))
        .enumerate()
    {
        let cell = worst_of_row(row, g, w, tol);
        if cell.ratio > 1.0 {
            wrong += 1;
            first = first.or(Some(cell));
        }
        if worst.is_none_or(|worst| cell.ratio > worst.ratio) {
            worst = Some(cell);
        }
    }
    let worst = worst.expect("a row");
    match first {
        None => Ok(worst.ratio),
        Some(first) => Err(format!(
            "{name}: {wrong} of {rows} rows are wrong; first {first}; worst {worst}"
        )),
    }
}

/// Holds the errors of an output in a 16-bit type beside those of a plain computation in the same type: against
/// the oracle, at most twice those of `plain` in each row, beside one rounding of the row's largest value, as
/// `plain` may be exact by luck. A row in which `plain` overflows is not held. All are `[rows, row_len]`. The
/// answer is the root mean square of our errors over that of theirs, which has no such allowance.
pub fn beside_plain(
    name: &str,
    storage: &str,
    got: &[f32],
    plain: &[f64],
    want: &[f64],
    row_len: usize,
) -> Result<f64, String> {
    assert!(got.len() == want.len() && plain.len() == want.len());
    // The table allows two roundings, and what f32 sums are off by.
    let rounding = tolerance(storage, 1).times(0.5);
    let (mut ours, mut theirs) = (0.0, 0.0);
    for (row, want) in want.chunks_exact(row_len).enumerate() {
        let plain = &plain[row * row_len..][..row_len];
        if plain.iter().any(|x| !x.is_finite()) {
            continue;
        }
        let got = &got[row * row_len..][..row_len];
        let our: Vec<f64> = got
            .iter()
            .zip(want)
            .map(|(&x, w)| f64::from(x) - w)
            .collect();
        let their: Vec<f64> = plain.iter().zip(want).map(|(x, w)| x - w).collect();
        let largest = |row: &[f64]| row.iter().fold(0.0f64, |top, x| top.max(x.abs()));
        let square = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>();
        let allowed = 2.0 * largest(&their) + rounding.atol + rounding.rtol * largest(want);
        if let Some(error) = our.iter().find(|x| x.is_nan() || x.abs() > allowed) {
            return Err(format!(
                "{name}: row {row} is off by {error:.3e}, a plain computation in {storage} by {:.3e}",
                largest(&their)
            ));
        }
        (ours, theirs) = (ours + square(&our), theirs + square(&their));
    }
    match theirs {
        0.0 if ours == 0.0 => Ok(0.0),
        _ => Ok((ours / theirs).sqrt()),
    }
}

#[derive(Clone, Copy)]
struct Cell {
    row: usize,
    column: usize,
    got: f32,
    want: f64,
    allowed: f64,
    ratio: f64,
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "row {} column {}: {} for {}, off by {:.3} times the allowed {:.3e}",
            self.row, self.column, self.got, self.want, self.ratio, self.allowed
        )
    }
}

fn worst_of_row(row: usize, got: &[f32], want: &[f64], tol: Tolerance) -> Cell {
    let finite = want.iter().filter(|w| w.is_finite());
    let largest = finite.fold(0.0f64, |top, w| top.max(w.abs()));
    let allowed = tol.atol + tol.rtol * largest;
    let cell = |column: usize| {
        let (got, want) = (got[column], want[column]);
        let error = (f64::from(got) - want).abs();
        let ratio = if f64::from(got) == want {
            0.0
        } else if error.is_finite() && error <= allowed {
            error / allowed
        } else if error.is_finite() {
            // Beyond the allowed, also where that is zero.
            (error / allowed).max(1.0 + f64::EPSILON)
        } else {
            f64::INFINITY
        };
        Cell {
            row,
            column,
            got,
            want,
            allowed,
            ratio,
        }
    };
    let worse = |a: Cell, b: Cell| if b.ratio > a.ratio { b } else { a };
    (1..got.len()).map(cell).fold(cell(0), worse)
}

/// A bit pattern to put where nothing may be written, and where everything must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Canary<T>(pub T);

/// A quiet NaN that no arithmetic makes.
pub const NAN_32: Canary<u32> = Canary(0x7fc5_ca1a);
/// A finite f32 that no test computes, -1.7e31.
pub const FINITE_32: Canary<u32> = Canary(0xf356_5a5b);
/// A quiet NaN both as f16 and as bf16.
pub const NAN_16: Canary<u16> = Canary(0x7fdb);
/// A finite number both as f16 (-21,168) and as bf16 (-2.2e32).
pub const FINITE_16: Canary<u16> = Canary(0xf52b);

impl<T: Copy + PartialEq + std::fmt::LowerHex> Canary<T> {
    /// A buffer of nothing but canaries, `[before + body + after]`.
    pub fn frame(self, before: usize, body: usize, after: usize) -> Vec<T> {
        vec![self.0; before + body + after]
    }

    /// Objects where a cell outside `body` is no longer a canary.
    pub fn untouched_outside(
        self,
        name: &str,
        cells: &[T],
        body: Range<usize>,
    ) -> Result<(), String> {
        if body.start > body.end || body.end > cells.len() {
            return Err(format!("{name}: {body:?} is not in {} cells", cells.len()));
        }
        let changed = |&at: &usize| !body.contains(&at) && cells[at] != self.0;
        match (0..cells.len()).find(changed) {
            None => Ok(()),
            Some(at) => Err(format!(
                "{name}: cell {at}, outside {body:?}, was overwritten with {:#x}",
                cells[at]
            )),
        }
    }

    /// Objects where a cell inside `body` is still a canary.
    pub fn written_inside(self, name: &str, cells: &[T], body: Range<usize>) -> Result<(), String> {
        if body.start > body.end || body.end > cells.len() {
            return Err(format!("{name}: {body:?} is not in {} cells", cells.len()));
        }
        let left: Vec<usize> = body.clone().filter(|&at| cells[at] == self.0).collect();
        match left.first() {
            None => Ok(()),
            Some(first) => Err(format!(
                "{name}: {} cells of {body:?} were never written, the first is {first}",
                left.len()
            )),
        }
    }
}

impl Canary<u32> {
    /// The pattern as an f32.
    pub fn f32(self) -> f32 {
        f32::from_bits(self.0)
    }

    /// [`Canary::frame`] as f32, to be uploaded.
    pub fn frame_f32(self, before: usize, body: usize, after: usize) -> Vec<f32> {
        vec![self.f32(); before + body + after]
    }

    /// Both checks on f32 values read back; the answer is the body.
    pub fn check_f32<'a>(
        self,
        name: &str,
        cells: &'a [f32],
        body: Range<usize>,
    ) -> Result<&'a [f32], String> {
        let bits: Vec<u32> = cells.iter().map(|x| x.to_bits()).collect();
        self.untouched_outside(name, &bits, body.clone())?;
        self.written_inside(name, &bits, body.clone())?;
        Ok(&cells[body])
    }
}

/// The nearest f16 of `x`, ties to even, infinite from 65,520 on.
pub fn round_f16(x: f64) -> f64 {
    round_binary(x, 11, -14, 65504.0)
}

/// The nearest bf16 of `x`, ties to even. An f64 is rounded once, not through f32.
pub fn round_bf16(x: f64) -> f64 {
    round_binary(x, 8, -126, 255.0 * power_of_two(120))
}

/// The nearest value of a storage type: "f32", "f16" or "bf16".
pub fn round_to(storage: &str, x: f64) -> f64 {
    match storage {
        "f32" => f64::from(x as f32),
        "f16" => round_f16(x),
        "bf16" => round_bf16(x),
        other => panic!("no storage type {other}"),
    }
}

/// Rounds to `digits` binary digits, fewer below 2^`lowest`, where the type's subnormals begin.
fn round_binary(x: f64, digits: i32, lowest: i32, largest: f64) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    let step = power_of_two(exponent.max(lowest) - (digits - 1));
    let rounded = (x / step).round_ties_even() * step;
    if rounded.abs() > largest {
        f64::INFINITY.copysign(x)
    } else {
        rounded
    }
}

fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}
