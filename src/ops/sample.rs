//! The next token by chance.

use super::{apart, extents, holds};
use crate::gpu::{DType, Recorder, Shader, Tensor};
use crate::{Error, Result};

/// By what a row's next token is drawn, in the order in which it applies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// What tokens that were read or written lose: a logit is divided by it, or below zero multiplied. 1: nothing.
    /// (Keskar et al. 2019)
    pub repeat_penalty: f32,
    /// Divides the logits. 0 takes the likeliest token.
    pub temperature: f32,
    /// Only so many of the likeliest tokens, and what is as likely as the last of them; 0 for all.
    pub top_k: u32,
    /// Only the fewest of the likeliest tokens whose probabilities reach this, and what is as likely as the last
    /// of them; 1 for all. (Holtzman et al. 2019)
    pub top_p: f32,
    /// Only tokens this many times as likely as the likeliest; 0 for all. (Nguyen et al. 2024)
    pub min_p: f32,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Sampling = Sampling {
        repeat_penalty: 1.0,
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
    };

    /// An error for what cannot be drawn by.
    ///
    /// # Errors
    /// [`Error::Refused`] with the name, the value and the bound.
    pub fn check(&self) -> Result<()> {
        let t = self.temperature;
        for (name, value, holds, bound) in [
            (
                "temperature",
                t,
                t == 0.0 || (1e-3..=1e3).contains(&t),
                "0, or 0.001 to 1000",
            ),
            (
                "top_p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0, at most 1",
            ),
            (
                "min_p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "0 to 1",
            ),
            (
                "repeat_penalty",
                self.repeat_penalty,
                (1e-2..=1e2).contains(&self.repeat_penalty),
                "0.01 to 100",
            ),
        ] {
            if !holds {
                return Err(Error::refused(name, value, bound));
            }
        }
        Ok(())
    }

    /// A row of [`Draw::rules`]: `seed` is the row's own.
    pub fn rules(&self, seed: u64) -> [u32; 8] {
        let least = match self.min_p {
            0.0 => f32::MIN,
            min_p => min_p.ln(),
        };
        [
            seed as u32,
            (seed >> 32) as u32,
            self.top_k,
            self.temperature.to_bits(),
            self.top_p.to_bits(),
            least.to_bits(),
            self.repeat_penalty.to_bits(),
            0,
        ]
    }
}

/// What `sample` reads and writes.
pub struct Draw<'a> {
    /// Afterwards the kept tokens' log-probabilities but for a constant, and -1e30 for all others. f32 `[R, V]`
    pub logits: &'a Tensor,
    /// Of [`Sampling::rules`]. u32 `[R, 8]`
    pub rules: &'a Tensor,
    /// A bit for each token that was read or written; that of the drawn one is set. u32 [R, V / 32 rounded up]
    pub seen: &'a Tensor,
    /// Positions filled so far, which the draw depends on; moved on by one. u32 `[R]`
    pub lengths: &'a Tensor,
    /// Token and bits of its log-probability, the model's own. u32 `[R, 1, 2]`
    pub chosen: &'a Tensor,
    /// Set to the token. u32 `[R]`
    pub ids: &'a Tensor,
    /// Whether a row's rules may have a top-k; without it, it is not looked at.
    pub top_k: bool,
    /// As much of top-p.
    pub top_p: bool,
}

/// Draws each row's next token, by its own seed, rules and length alone.
///
/// # Errors
/// [`Error::Refused`] for tensors that do not hold what is said of them, and for two in one buffer.
pub fn sample(recorder: &mut Recorder, draw: Draw) -> Result<()> {
    let [rows, vocab] = extents("logits", draw.logits)?;
    let words = vocab.div_ceil(32);
    let n = rows as u64;
    holds("logits", draw.logits, DType::F32, n * vocab as u64)?;
    holds("rules", draw.rules, DType::U32, 8 * n)?;
    holds("seen tokens", draw.seen, DType::U32, n * words as u64)?;
    holds("lengths", draw.lengths, DType::U32, n)?;
    holds("chosen tokens", draw.chosen, DType::U32, 2 * n)?;
    holds("ids", draw.ids, DType::U32, n)?;
    let written = [
        ("logits", draw.logits),
        ("seen tokens", draw.seen),
        ("lengths", draw.lengths),
        ("chosen tokens", draw.chosen),
        ("ids", draw.ids),
    ];
    apart(&written, &[draw.rules])?;
    let shader = Shader::new("sample")
        .with("TOP_K", draw.top_k)
        .with("TOP_P", draw.top_p);
    let bindings = [
        draw.logits,
        draw.rules,
        draw.seen,
        draw.lengths,
        draw.chosen,
        draw.ids,
    ];
    recorder.dispatch(&shader, [rows, vocab, words, 0], &bindings, n)
}
