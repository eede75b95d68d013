//! Rotary positions: frequencies under each scaling, and the turning itself.

use std::f64::consts::TAU;

/// How the frequencies of a model are stretched to contexts longer than it was trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// The base grows with the context ("NTK-aware", dynamic).
    Dynamic {
        /// At least 1.
        factor: f64,
        /// The context that the model was trained on.
        original: f64,
        /// The context now.
        context: f64,
    },
    /// Peng et al. 2023: slow pairs are stretched, fast ones are not.
    Yarn {
        /// At least 1.
        factor: f64,
        /// The context that the model was trained on.
        original: f64,
        /// Pairs that turn more often over that context are left alone.
        fast: f64,
        /// Pairs that turn less often are stretched by the whole factor.
        slow: f64,
        /// Whether the two bounds are moved apart to whole pairs.
        truncate: bool,
    },
    /// Llama 3.1: as YaRN, but the blend is even in turns, not in pairs.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Pairs that turn less often over the original context are stretched by the whole factor.
        low: f64,
        /// Pairs that turn more often are left alone.
        high: f64,
        /// The context that the model was trained on.
        original: f64,
    },
}

/// Radians that each pair turns from one position to the next. `dims` columns turn; the answer is
/// `[dims / 2]`.
pub fn rope_frequencies(dims: usize, base: f64, scaling: RopeScaling) -> Vec<f64> {
    let n = dims as f64;
    let plain = |base: f64| move |pair: usize| base.powf(-2.0 * pair as f64 / n);
    let pairs = 0..dims / 2;
    let blend = |whole: f64, factor: f64, kept: f64| whole * (kept + (1.0 - kept) / factor);
    match scaling {
        RopeScaling::None => pairs.map(plain(base)).collect(),
        RopeScaling::Linear { factor } => pairs.map(|p| plain(base)(p) / factor).collect(),
        RopeScaling::Dynamic {
            factor,
            original,
            context,
        } => {
            let stretch = 1.0 + factor * (context.max(original) / original - 1.0);
            pairs
                .map(plain(base * stretch.powf(n / (n - 2.0))))
                .collect()
        }
        RopeScaling::Yarn {
            factor,
            original,
            fast,
            slow,
            truncate,
        } => {
            // The pair, as a real number, that turns so often over the original context.
            let pair_of = |turns: f64| n / 2.0 * (original / (TAU * turns)).ln() / base.ln();
            let (mut from, mut to) = (pair_of(fast), pair_of(slow));
            if truncate {
                (from, to) = (from.floor(), to.ceil());
            }
            (from, to) = (from.max(0.0), to.min(n - 1.0));
            if from == to {
                to += 0.001;
            }
            let stretched = |p: usize| ((p as f64 - from) / (to - from)).clamp(0.0, 1.0);
            pairs
                .map(|p| blend(plain(base)(p), factor, 1.0 - stretched(p)))
                .collect()
        }
        RopeScaling::Llama3 {
            factor,
            low,
            high,
            original,
        } => pairs
            .map(|p| {
                let frequency = plain(base)(p);
                let turns = original * frequency / TAU;
                blend(
                    frequency,
                    factor,
                    ((turns - low) / (high - low)).clamp(0.0, 1.0),
                )
            })
            .collect(),
    }
}

/// What YaRN multiplies sines and cosines by, where a model does not say otherwise.
pub fn yarn_attention_factor(factor: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        1.0 + factor.ln() / 10.0
    }
}

/// How heads are turned.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians a position, `[pairs]`; columns behind the pairs stay.
    pub frequencies: Vec<f64>,
    /// Columns 2 i and 2 i + 1 make a pair; else columns i and i + pairs.
    pub neighbours: bool,
    /// The factor of the columns that turn.
    pub attention_factor: f64,
}

impl Rope {
    /// Turns one head, `[D]`, in its place.
    pub fn turn(&self, head: &mut [f64], position: usize) {
        let pairs = self.frequencies.len();
        assert!(2 * pairs <= head.len(), "{pairs} pairs of {}", head.len());
        for (pair, frequency) in self.frequencies.iter().enumerate() {
            let (a, b) = match self.neighbours {
                true => (2 * pair, 2 * pair + 1),
                false => (pair, pair + pairs),
            };
            let (sine, cosine) = (position as f64 * frequency).sin_cos();
            let (x, y) = (head[a], head[b]);
            head[a] = self.attention_factor * (x * cosine - y * sine);
            head[b] = self.attention_factor * (x * sine + y * cosine);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, noise};
    use super::*;

    #[test]
    fn products_depend_on_distances_alone() {
        for neighbours in [false, true] {
            let rope = Rope {
                frequencies: rope_frequencies(6, 100.0, RopeScaling::None),
                neighbours,
                attention_factor: 1.0,
            };
            let dot = |m: usize, n: usize| -> f64 {
                let (mut q, mut k) = (noise(1, 8), noise(2, 8));
                rope.turn(&mut q, m);
                rope.turn(&mut k, n);
                q.iter().zip(&k).map(|(a, b)| a * b).sum()
            };
            assert_close(&[dot(9, 4), dot(7, 7)], &[dot(5, 0), dot(0, 0)]);
            assert!((dot(9, 4) - dot(4, 9)).abs() > 1e-3);
        }
    }

    #[test]
    fn a_quarter_turn_by_hand() {
        let turn = |neighbours| {
            let rope = Rope {
                frequencies: vec![TAU / 4.0, 0.0],
                neighbours,
                attention_factor: 2.0,
            };
            let mut head = [1.0, 2.0, 3.0, 4.0, 5.0];
            rope.turn(&mut head, 1);
            head
        };
        assert_close(&turn(false), &[-6.0, 4.0, 2.0, 8.0, 5.0]);
        assert_close(&turn(true), &[-4.0, 2.0, 6.0, 8.0, 5.0]);
    }

    #[test]
    fn scalings_at_their_ends() {
        let (dims, base) = (16, 1e4);
        let plain = rope_frequencies(dims, base, RopeScaling::None);
        assert_close(&plain[..2], &[1.0, base.powf(-0.125)]);
        let dynamic = |context| RopeScaling::Dynamic {
            factor: 4.0,
            original: 64.0,
            context,
        };
        // Within the context it was trained on, nothing changes; at its double, the slowest pair is slowed
        // down by exactly 1 + factor.
        assert_close(&rope_frequencies(dims, base, dynamic(50.0)), &plain);
        let double = rope_frequencies(dims, base, dynamic(128.0));
        assert_close(&[double[0], double[7]], &[1.0, plain[7] / 5.0]);
        let yarn = RopeScaling::Yarn {
            factor: 8.0,
            original: 256.0,
            fast: 32.0,
            slow: 1.0,
            truncate: true,
        };
        let llama = RopeScaling::Llama3 {
            factor: 8.0,
            low: 1.0,
            high: 4.0,
            original: 256.0,
        };
        for scaling in [yarn, llama] {
            let got = rope_frequencies(dims, base, scaling);
            assert_close(&[got[0], got[7]], &[plain[0], plain[7] / 8.0]);
            assert!(
                (1..7).any(|p| got[p] < plain[p] * 0.999 && got[p] > plain[p] / 7.99),
                "{got:?}"
            );
        }
    }
}
