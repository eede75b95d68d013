//! How far from the oracle an answer may be.

use crate::gpu::DType;

/// `atol + rtol * max |the oracle's row|`, for inputs of magnitude about one that were rounded to their
/// storage type before the oracle saw them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// For every value.
    pub atol: f64,
    /// Times the largest magnitude in the oracle's row.
    pub rtol: f64,
}

impl Tolerance {
    /// Of results stored as `dtype` after sums over `k_len` keys: the rounding of the output, twice, and the
    /// errors of f32 sums, which grow with the square root of their length.
    pub fn new(dtype: DType, k_len: u32) -> Self {
        let growth = (f64::from(k_len) / 1024.0).sqrt().max(1.0);
        let (atol, rtol) = match dtype {
            // Subnormals are 2^-24 apart.
            DType::F16 => (2f64.powi(-24), 2f64.powi(-10)),
            DType::BF16 => (0.0, 2f64.powi(-7)),
            _ => (0.0, 0.0),
        };
        Tolerance {
            atol: atol + 2e-6 * growth,
            rtol: rtol + 2e-5 * growth,
        }
    }

    /// The largest error in a row, in units of what is allowed: above 1 it is wrong. Infinite for a NaN on
    /// either side, and for an infinity unless the oracle has the same one.
    pub fn worst(&self, got: &[f32], want: &[f64]) -> f64 {
        self.errors(got, want).fold(0.0, f64::max)
    }

    /// The same for each value of a row.
    pub fn errors(&self, got: &[f32], want: &[f64]) -> impl Iterator<Item = f64> {
        let finite = want.iter().filter(|w| w.is_finite());
        let largest = finite.fold(0.0f64, |top, w| top.max(w.abs()));
        let allowed = self.atol + self.rtol * largest;
        got.iter().zip(want).map(move |(&got, &want)| {
            let error = (f64::from(got) - want).abs();
            match f64::from(got) == want {
                true => 0.0,
                false if error.is_finite() => error / allowed,
                false => f64::INFINITY,
            }
        })
    }
}
