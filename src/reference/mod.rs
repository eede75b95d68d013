//! The oracle: attention, norms, layers and whole stacks in plain f64 loops.
//!
//! It is what the kernels are judged by, so it shares no code with them: it imports nothing from
//! the rest of the crate, and clarity comes before speed everywhere. Tests and benches import it, and
//! `qkv attend --verify` and the tuner, which have their shapes checked before. A wrong shape is a bug in the test that
//! made it, so it panics.
//!
//! - [`attention`] is the operator with every option, and its weights and scores; [`attention_eager`] the same
//!   as PyTorch computes it in a 16-bit type.
//! - [`linear`], [`layer_norm`], [`Activation`], [`softmax`], [`top_k`], ... stand around it.
//! - [`warp`] and [`draw`] are sampling.
//! - [`Stack`] is an encoder-decoder made of them, [`CausalStack`] a decoder alone, both plain data.
//!
//! Feed it what the device sees: inputs already rounded to the storage type.

mod attention;
mod causal;
mod eager;
mod rope;
mod rows;
mod sample;
mod stack;

pub use attention::{Attention, AttentionOut, Offset, attention, expand};
pub use causal::{CausalLayer, CausalStack};
pub use eager::attention_eager;
pub use rope::{Rope, RopeScaling, rope_frequencies, yarn_attention_factor};
pub use rows::{
    Activation, erf, erfc, layer_norm, linear, log_softmax, rms_norm, sinusoids, softmax, top_k,
};
pub use sample::{Warpers, draw, uniform, warp};
pub use stack::{
    AttentionWeights, DecoderLayer, DecoderOut, EncoderLayer, EncoderOut, FeedForward, Linear,
    Norm, NormPlace, Stack, mask_of_lengths,
};

/// Numbers for the tests below: deterministic, in -1 .. 1.
#[cfg(test)]
pub(crate) fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..len).map(next).collect()
}

/// Panics where two slices differ by more than 1e-12 anywhere.
#[cfg(test)]
#[track_caller]
pub(crate) fn assert_close(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (at, (a, b)) in got.iter().zip(want).enumerate() {
        assert!(
            a == b || (a - b).abs() <= 1e-12 * (1.0 + b.abs()),
            "[{at}]: {a} is not {b}"
        );
    }
}
