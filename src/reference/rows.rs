//! What stands around attention: linear maps, norms, activations, softmax, top-k, positions.
//! Everything here works on rows, the last axis of a tensor.

use std::f64::consts::{FRAC_2_SQRT_PI, PI, SQRT_2};

/// `y = x W^T + b`. `x` `[rows, in]`, `weight` `[out, in]`, `bias` `[out]`; the answer is `[rows, out]`.
pub fn linear(x: &[f64], n_in: usize, weight: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
    assert!(
        n_in > 0 && x.len().is_multiple_of(n_in) && weight.len().is_multiple_of(n_in),
        "rows of {n_in}: x has {}, the weight {}",
        x.len(),
        weight.len()
    );
    let n_out = weight.len() / n_in;
    assert!(bias.is_none_or(|b| b.len() == n_out), "bias is not {n_out}");
    let mut y = Vec::with_capacity(x.len() / n_in * n_out);
    for row in x.chunks_exact(n_in) {
        for (o, w) in weight.chunks_exact(n_in).enumerate() {
            let product: f64 = row.iter().zip(w).map(|(a, b)| a * b).sum();
            y.push(product + bias.map_or(0.0, |b| b[o]));
        }
    }
    y
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias`, the variance being the biased one.
/// `x` `[rows, n]`, `weight` `[n]`, `bias` `[n]`; the answer is `[rows, n]`.
pub fn layer_norm(x: &[f64], weight: &[f64], bias: &[f64], eps: f64) -> Vec<f64> {
    let n = weight.len();
    assert!(
        n > 0 && x.len().is_multiple_of(n) && bias.len() == n,
        "rows of {n}"
    );
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(n) {
        let mean = row.iter().sum::<f64>() / n as f64;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        let over = 1.0 / (variance + eps).sqrt();
        y.extend((0..n).map(|i| (row[i] - mean) * over * weight[i] + bias[i]));
    }
    y
}

/// `x / sqrt(mean(x²) + eps) * weight`. `x` `[rows, n]`, `weight` `[n]`; the answer is `[rows, n]`.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let n = weight.len();
    assert!(n > 0 && x.len().is_multiple_of(n), "rows of {n}");
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(n) {
        let square = row.iter().map(|v| v * v).sum::<f64>() / n as f64;
        let over = 1.0 / (square + eps).sqrt();
        y.extend((0..n).map(|i| row[i] * over * weight[i]));
    }
    y
}

/// What stands between the two halves of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x Φ(x)`, with the error function.
    Gelu,
    /// The approximation of GELU by tanh, Hugging Face's `gelu_new`.
    GeluTanh,
    /// `x / (1 + e^-x)`, also called swish.
    Silu,
}

impl Activation {
    /// The function at one point.
    pub fn at(self, x: f64) -> f64 {
        match self {
            Activation::Relu => x.max(0.0),
            Activation::Gelu => 0.5 * x * erfc(-x / SQRT_2),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            }
            Activation::Silu => x / (1.0 + (-x).exp()),
        }
    }
}

/// The error function, to about 1e-15.
///
/// Near zero by NIST DLMF 7.6.2, `erf z = 2/√π e^(-z²) Σ 2ⁿ z^(2n+1) / (1·3···(2n+1))`, whose terms
/// all have one sign, so that nothing cancels; further out as `1 - erfc z`.
pub fn erf(x: f64) -> f64 {
    if x.abs() >= 2.5 {
        return x.signum() * (1.0 - erfc(x.abs()));
    }
    let (mut term, mut sum) = (x, x);
    let mut n = 1.0;
    while term.abs() > sum.abs() * 1e-18 {
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
        n += 1.0;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// `1 - erf x`, without its cancellation where x is large.
///
/// From 2.5 on by the continued fraction NIST DLMF 7.9.1 in its equivalent form
/// `√π e^(z²) erfc z = 1/(z + (1/2)/(z + (2/2)/(z + (3/2)/(z + ...))))`.
pub fn erfc(x: f64) -> f64 {
    if x < 2.5 {
        return 1.0 - erf(x);
    }
    let mut below = x;
    for n in (1..=100).rev() {
        below = x + 0.5 * f64::from(n) / below;
    }
    0.5 * FRAC_2_SQRT_PI * (-x * x).exp() / below
}

/// Softmax of every row; zeros for a row of -inf. `x` `[rows, n]`; the answer is `[rows, n]`.
pub fn softmax(x: &[f64], n: usize) -> Vec<f64> {
    let log = log_softmax(x, n);
    log.iter().map(|v| v.exp()).collect()
}

/// The logarithm of softmax of every row; -inf for a row of -inf. `x` `[rows, n]`; the answer is
/// `[rows, n]`.
pub fn log_softmax(x: &[f64], n: usize) -> Vec<f64> {
    assert!(n > 0 && x.len().is_multiple_of(n), "rows of {n}");
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(n) {
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if top == f64::NEG_INFINITY {
            y.extend_from_slice(row);
            continue;
        }
        let log_sum = row.iter().map(|v| (v - top).exp()).sum::<f64>().ln();
        y.extend(row.iter().map(|v| v - top - log_sum));
    }
    y
}

/// The `k` largest values of one row with their indices, largest first, of equals the lowest index
/// first; all of them where the row is shorter. `row` `[n]`; panics on NaN.
pub fn top_k(row: &[f64], k: usize) -> Vec<(usize, f64)> {
    let mut all: Vec<(usize, f64)> = row.iter().copied().enumerate().collect();
    // The sort is stable, so equals stay in the order of their indices.
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("a number"));
    all.truncate(k);
    all
}

/// The table of positions of a Hugging Face Marian model, `[positions, dim]`: the first
/// `ceil(dim / 2)` columns are `sin(p / 10000^(2j / dim))`, the others the cosines of the same
/// angles from `j = 0` (one fewer where `dim` is odd).
pub fn sinusoids(positions: usize, dim: usize) -> Vec<f64> {
    let mut table = Vec::with_capacity(positions * dim);
    for position in 0..positions {
        let angle = |j: usize| position as f64 / 10000f64.powf(2.0 * j as f64 / dim as f64);
        table.extend((0..dim.div_ceil(2)).map(|j| angle(j).sin()));
        table.extend((0..dim / 2).map(|j| angle(j).cos()));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, noise};
    use super::*;

    #[test]
    fn erf_to_fourteen_digits() {
        // From a computation with 40 digits: x, erf x, erfc x.
        let known = [
            (0.1, 0.112_462_916_018_284_9, 0.887_537_083_981_715),
            (0.5, 0.520_499_877_813_046_5, 0.479_500_122_186_953_5),
            (1.0, 0.842_700_792_949_714_9, 0.157_299_207_050_285_13),
            (1.5, 0.966_105_146_475_310_7, 0.033_894_853_524_689_27),
            (2.0, 0.995_322_265_018_952_7, 0.004_677_734_981_047_266),
            (2.4, 0.999_311_486_103_354_9, 6.885_138_966_450_786e-4),
            (2.6, 0.999_763_965_583_470_7, 2.360_344_165_293_491e-4),
            (3.0, 0.999_977_909_503_001_4, 2.209_049_699_858_544e-5),
            (4.0, 0.999_999_984_582_742_1, 1.541_725_790_028_002e-8),
            (5.0, 0.999_999_999_998_462_5, 1.537_459_794_428_034_8e-12),
        ];
        for (x, plus, minus) in known {
            assert!((erf(x) - plus).abs() < 1e-15, "erf {x}: {}", erf(x));
            assert!((erf(-x) + plus).abs() < 1e-15, "erf -{x}");
            assert!((erfc(x) - minus).abs() < 1e-15, "erfc {x}: {}", erfc(x));
            assert!((erfc(-x) - 1.0 - plus).abs() < 1e-15, "erfc -{x}");
        }
        assert!((erfc(5.0) / known[9].2 - 1.0).abs() < 1e-14);
        assert_eq!((erf(0.0), erf(40.0), erfc(40.0)), (0.0, 1.0, 0.0));
    }

    #[test]
    fn activations_at_known_points() {
        use Activation::{Gelu, GeluTanh, Relu, Silu};
        let points = [-3.0, -1.0, 0.5, 2.0];
        let known = [
            (Relu, [0.0, 0.0, 0.5, 2.0]),
            (
                Gelu,
                [
                    -0.004_049_694_094_890_284,
                    -0.158_655_253_931_457_05,
                    0.345_731_230_637_006_55,
                    1.954_499_736_103_641_6,
                ],
            ),
            (
                GeluTanh,
                [
                    -0.003_637_392_081_773_019,
                    -0.158_808_009_391_723_3,
                    0.345_714_009_825_143_9,
                    1.954_597_694_087_775,
                ],
            ),
            (
                Silu,
                [
                    -0.142_277_619_532_700_34,
                    -0.268_941_421_369_995_1,
                    0.311_229_665_600_927_3,
                    1.761_594_155_955_764_9,
                ],
            ),
        ];
        for (activation, want) in known {
            assert_close(&points.map(|x| activation.at(x)), &want);
            assert_eq!(activation.at(0.0), 0.0);
            assert_eq!(activation.at(100.0), 100.0);
        }
    }

    #[test]
    fn linear_by_hand() {
        let weight = [1.0, 0.0, -1.0, 2.0, 0.5, 0.0];
        let x = [3.0, 4.0, 5.0, 1.0, 2.0, 1.0];
        assert_eq!(linear(&x, 3, &weight, None), [-2.0, 8.0, 0.0, 3.0]);
        assert_eq!(
            linear(&x, 3, &weight, Some(&[10.0, 20.0])),
            [8.0, 28.0, 10.0, 23.0]
        );
    }

    #[test]
    fn norms_by_hand() {
        // Mean 2, variance 1; mean square 5.
        let (x, weight, bias) = ([1.0, 3.0], [2.0, 10.0], [0.5, 0.0]);
        assert_close(&layer_norm(&x, &weight, &bias, 0.0), &[-1.5, 10.0]);
        assert_close(&layer_norm(&x, &weight, &bias, 3.0), &[-0.5, 5.0]);
        let over = 1.0 / 9f64.sqrt();
        assert_close(&rms_norm(&x, &weight, 4.0), &[2.0 * over, 30.0 * over]);
        assert_close(&layer_norm(&[7.0, 7.0], &weight, &bias, 1e-5), &bias);
    }

    #[test]
    fn softmax_by_hand() {
        let x = [0.0, 3f64.ln(), 1e4, 1e4];
        assert_close(&softmax(&x, 2), &[0.25, 0.75, 0.5, 0.5]);
        assert_close(
            &log_softmax(&x, 2),
            &[0.25f64.ln(), 0.75f64.ln(), 0.5f64.ln(), 0.5f64.ln()],
        );
        assert_eq!(softmax(&[f64::NEG_INFINITY; 3], 3), [0.0; 3]);
        let sums: Vec<f64> = softmax(&noise(1, 60), 6)
            .chunks(6)
            .map(|row| row.iter().sum())
            .collect();
        assert_close(&sums, &[1.0; 10]);
    }

    #[test]
    fn top_k_prefers_the_lowest_index() {
        let row = [1.0, 5.0, -2.0, 5.0, f64::NEG_INFINITY, 5.0];
        assert_eq!(top_k(&row, 2), [(1, 5.0), (3, 5.0)]);
        assert_eq!(top_k(&row, 4), [(1, 5.0), (3, 5.0), (5, 5.0), (0, 1.0)]);
        assert_eq!(top_k(&row, 9).len(), 6);
        assert!(top_k(&[], 3).is_empty());
    }

    #[test]
    fn sinusoids_sine_half_then_cosine_half() {
        let table = sinusoids(3, 4);
        assert_eq!(table[..4], [0.0, 0.0, 1.0, 1.0]);
        assert_close(
            &table[8..],
            &[2f64.sin(), 0.02f64.sin(), 2f64.cos(), 0.02f64.cos()],
        );
        let odd = sinusoids(2, 3);
        let slow = 1.0 / 10000f64.powf(2.0 / 3.0);
        assert_close(&odd[3..], &[1f64.sin(), slow.sin(), 1f64.cos()]);
    }
}
