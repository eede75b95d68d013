//! Rotary positions as data, and the table that kernels turn by.

use std::f64::consts::TAU;

use crate::gpu::Gpu;
use crate::ops::{Pairs, Rotary};
use crate::{Error, Result};

/// Rotary positions (Su et al. 2021).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Pair i of n turns by base^(-i / n) radians a position.
    pub base: f64,
    /// Columns of a head that turn, the first ones; the others know no position.
    pub columns: u32,
    /// Which of them make a pair.
    pub pairs: Pairs,
    /// How far the frequencies are stretched.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for contexts longer than those trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency over `factor`. (Chen et al. 2023)
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// The base grows with the context, once that is longer than `original`. (NTK-aware, dynamic)
    Dynamic {
        /// At least 1.
        factor: f64,
        /// The longest context trained on.
        original: u32,
    },
    /// Slow pairs are stretched, fast ones are not. (Peng et al. 2023)
    Yarn {
        /// At least 1.
        factor: f64,
        /// The longest context trained on.
        original: u32,
        /// Pairs that turn more often in that context are left alone.
        beta_fast: f64,
        /// Pairs that turn less often are stretched by the whole factor.
        beta_slow: f64,
        /// Whether the ramp between the two begins and ends at whole pairs.
        truncate: bool,
        /// The factor of sines and cosines.
        attention_factor: f64,
    },
    /// As YaRN, with a ramp over turns instead of pairs. (Llama 3.1)
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Pairs that turn less often in the original context are stretched by the whole factor.
        low: f64,
        /// Pairs that turn more often are left alone.
        high: f64,
        /// The longest context trained on.
        original: u32,
    },
    /// The frequency of each pair over its own factor, by which GGUF files carry Llama 3's scaling.
    Factors(Vec<f64>),
}

impl Rope {
    pub(super) fn check(&self, head_dim: u32) -> Result<()> {
        let refuse = |what: &str, value: f64, bound: &str| {
            Err(Error::refused(
                format!("rotary positions' {what}"),
                value,
                bound,
            ))
        };
        if self.columns == 0 || self.columns > head_dim || !self.columns.is_multiple_of(2) {
            let bound = format!("even, 2 to the head's {head_dim}");
            return refuse("columns", self.columns.into(), &bound);
        }
        if !(self.base > 1.0 && self.base.is_finite()) {
            return refuse("base", self.base, "a finite number above 1");
        }
        let within = |factor: f64| (1.0..=1e6).contains(&factor);
        let (factor, original) = match self.scaling {
            RopeScaling::None => (1.0, 1),
            RopeScaling::Factors(ref factors) => {
                if factors.len() != self.columns as usize / 2 {
                    let bound = format!("one for each of {} pairs", self.columns / 2);
                    return refuse("factors", factors.len() as f64, &bound);
                }
                let wrong = factors.iter().find(|&&factor| !within(factor));
                (wrong.copied().unwrap_or(1.0), 1)
            }
            RopeScaling::Linear { factor } => (factor, 1),
            RopeScaling::Dynamic { factor, original } => {
                if self.columns < 4 {
                    let bound = "at least 4 with dynamic scaling";
                    return refuse("columns", self.columns.into(), bound);
                }
                (factor, original)
            }
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                attention_factor,
                ..
            } => {
                if !(beta_slow > 0.0 && beta_fast >= beta_slow && beta_fast.is_finite()) {
                    let bound = format!("finite, at least beta_slow, which is {beta_slow}");
                    return refuse("beta_fast", beta_fast, &bound);
                }
                if !(attention_factor > 0.0 && attention_factor <= 1e3) {
                    return refuse(
                        "attention factor",
                        attention_factor,
                        "above 0, at most 1000",
                    );
                }
                (factor, original)
            }
            RopeScaling::Llama3 {
                factor,
                low,
                high,
                original,
            } => {
                if !(low > 0.0 && high > low && high.is_finite()) {
                    let bound = format!("finite, above low_freq_factor, which is {low}");
                    return refuse("high_freq_factor", high, &bound);
                }
                (factor, original)
            }
        };
        if !within(factor) {
            return refuse("factor", factor, "1 to 1000000");
        }
        if original == 0 {
            return refuse("original context", 0.0, "1 at least");
        }
        Ok(())
    }

    /// Whether the frequencies of such a context are others than those of a short one.
    pub(super) fn grows_at(&self, context: u32) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { original, .. } if context > original)
    }

    /// Radians a position of each pair, in a context of that length.
    fn frequencies(&self, context: u32) -> Vec<f64> {
        let pairs = self.columns / 2;
        let n = f64::from(pairs);
        let base = match self.scaling {
            RopeScaling::Dynamic { factor, original } => {
                let times = f64::from(context.max(original)) / f64::from(original);
                self.base * (factor * times - (factor - 1.0)).powf(n / (n - 1.0))
            }
            _ => self.base,
        };
        // How much of a pair's frequency stays: 1 all of it, 0 what the factor leaves.
        let kept = |pair: f64, frequency: f64| match self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => 1.0,
            RopeScaling::Linear { .. } | RopeScaling::Factors(_) => 0.0,
            RopeScaling::Yarn {
                original,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                let pair_of =
                    |turns: f64| n * (f64::from(original) / (turns * TAU)).ln() / self.base.ln();
                let (low, high) = match truncate {
                    true => (pair_of(beta_fast).floor(), pair_of(beta_slow).ceil()),
                    false => (pair_of(beta_fast), pair_of(beta_slow)),
                };
                // As transformers has it: bounded by the last column, not by the last pair.
                let (low, high) = (low.max(0.0), high.min(2.0 * n - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                1.0 - ((pair - low) / width).clamp(0.0, 1.0)
            }
            RopeScaling::Llama3 {
                low,
                high,
                original,
                ..
            } => {
                let turns = f64::from(original) * frequency / TAU;
                ((turns - low) / (high - low)).clamp(0.0, 1.0)
            }
        };
        let factor = |pair: usize| match self.scaling {
            RopeScaling::Linear { factor }
            | RopeScaling::Yarn { factor, .. }
            | RopeScaling::Llama3 { factor, .. } => factor,
            RopeScaling::None | RopeScaling::Dynamic { .. } => 1.0,
            RopeScaling::Factors(ref factors) => factors[pair],
        };
        (0..pairs)
            .map(|ix| {
                let pair = f64::from(ix);
                let frequency = base.powf(-pair / n);
                let kept = kept(pair, frequency);
                frequency * (kept + (1.0 - kept) / factor(ix as usize))
            })
            .collect()
    }

    /// The table of a context of that length, on the device.
    pub fn rotary(&self, gpu: &Gpu, context: u32) -> Result<Rotary> {
        let turns: Vec<u32> = self
            .frequencies(context)
            .iter()
            .flat_map(|frequency| {
                let turns = (frequency / TAU).fract();
                let units = (turns * 2f64.powi(44)).round() as u64;
                [(units >> 12) as u32, (units & 0xfff) as u32]
            })
            .collect();
        Ok(Rotary {
            turns: gpu.upload_u32("turns", &[self.columns / 2, 2], &turns)?,
            pairs: self.pairs,
            attention_factor: match self.scaling {
                RopeScaling::Yarn {
                    attention_factor, ..
                } => attention_factor as f32,
                _ => 1.0,
            },
        })
    }
}

/// YaRN's factor of sines and cosines for a context stretched by `factor`. (Peng et al. 2023, section 3.4)
pub fn yarn_attention_factor(factor: f64, magnitude: f64) -> f64 {
    match factor > 1.0 {
        true => 0.1 * magnitude * factor.ln() + 1.0,
        false => 1.0,
    }
}
