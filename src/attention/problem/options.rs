//! What is asked of the operator.

use std::sync::Arc;

use super::View;
use crate::gpu::Tensor;

/// Where query row 0 stands among the keys, for the causal mask, the window, ALiBi and T5's bias.
/// [`Tensors::q_offset`] takes its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Align {
    /// The last query stands at the last valid key: query i at key position i + kv_len - Q.
    #[default]
    BottomRight,
    /// Query i stands at key position i.
    TopLeft,
}

/// Which scores go to [`Tensors::weights`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The scaled product of every valid key; -inf past the last.
    Raw,
    /// The same after the softcap.
    Softcap,
    /// After bias, ALiBi and mask: -inf where masked.
    Biased,
    /// The weights; 0 where masked.
    #[default]
    Softmax,
}

/// How T5's table is looked up (Raffel et al. 2020, section 2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct T5 {
    /// Whether keys after the query have buckets of their own, as in encoders.
    pub bidirectional: bool,
    /// The distance from which on all keys share the last bucket.
    pub max_distance: u32,
}

/// What is computed, the same on every route. The law of scores: scale, softcap, bias, ALiBi and T5's
/// bias, `score_mod`, the masks, then the sinks in the denominator. A row that sees no key gives zeros, and
/// as its LSE the sink, or -inf without one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// The scores' factor; 1 / sqrt(D) if not given.
    pub scale: Option<f32>,
    /// Scores become `softcap * tanh(score / softcap)`.
    pub softcap: Option<f32>,
    /// Queries see keys up to their own position.
    pub causal: bool,
    /// How many keys before and after its own position a query sees; `None` is without bound.
    pub window: [Option<u32>; 2],
    /// Where the queries stand.
    pub align: Align,
    /// The look-up of [`Tensors::t5`].
    pub t5: Option<T5>,
    /// The caller's own WGSL: `fn score_mod(score: f32, b: u32, h: u32, q: u32, k: u32) -> f32`, on the
    /// score after the biases. -inf masks.
    pub score_mod: Option<Arc<str>>,
    /// The caller's own WGSL: `fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool`; true attends.
    pub mask_mod: Option<Arc<str>>,
    /// What [`Tensors::weights`] receives.
    pub stage: Stage,
    /// Weights and values may be multiplied, and four keys at a time summed, in f16, everything else staying in
    /// f32; or on cooperative matrices, where an output in f32 is not otherwise. For Q, K and V in f16, on the
    /// prefill route, which is taken unless a measurement on the device found another one faster. Over the rows of
    /// a head, errors stay within twice those of eager PyTorch in f16.
    pub f16_math: bool,
    /// A row's result does not change with the rest of the batch: nothing of the plan depends on it. The prefill
    /// route is refused.
    pub batch_invariant: bool,
    /// The route to take; chosen by the plan if not given.
    pub route: Option<crate::attention::Route>,
    /// Parts of the key axis on the `decode` route; chosen by the plan if not given.
    pub splits: Option<u32>,
}

/// The tensors of one attention: `O = softmax(score(Q K^T)) V`.
///
/// With `cu_q`, sequences of different lengths lie one behind the other: q is `[1, H, T, D]`, out
/// `[1, H, T, Dv]`, LSE `[1, H, T]`, weights `[1, H, T, K]`, and B is the number of sequences; rows that
/// belong to none are left as they are. With `cu_k`, k and v are `[1, Hk, T, ...]` alike.
#[derive(Clone, Debug)]
pub struct Tensors<'a> {
    /// Queries. `[B, H, Q, D]`
    pub q: View<'a>,
    /// Keys; Bk divides B, and consecutive batch rows of Q share one of K. `[Bk, Hk, K, D]`, or with `pages`
    /// a pool of N pages of S keys `[N, Hk, S, D]`
    pub k: View<'a>,
    /// Values. `[Bk, Hk, K, Dv]`, or `[N, Hk, S, Dv]`
    pub v: View<'a>,
    /// The result. `[B, H, Q, Dv]`
    pub out: View<'a>,
    /// Valid keys of each batch row of K, the first ones; all of them if not given. u32 `[Bk]`
    pub kv_len: Option<&'a Tensor>,
    /// Where query 0 of each batch row stands among the keys, within 2^29 either way. i32 `[B]`
    pub q_offset: Option<&'a Tensor>,
    /// The first keys of each batch row that every query sees, whatever its position. u32 `[B]`
    pub prefix_len: Option<&'a Tensor>,
    /// Where each sequence's queries begin, and where the last one's end; rising. u32 `[B + 1]`
    pub cu_q: Option<&'a Tensor>,
    /// Where each sequence's keys begin, and where the last one's end; rising. u32 `[B + 1]`
    pub cu_k: Option<&'a Tensor>,
    /// For each batch row and key position, the batch row of K and V that holds it: histories that
    /// share a past (beams). u32 `[Bk, K]`
    pub rows: Option<&'a Tensor>,
    /// Where the keys of each batch row lie: key j in place j mod S of page `pages[b, j / S]`, and K is M S.
    /// u32 `[Bk, M]`
    pub pages: Option<&'a Tensor>,
    /// Added to the scores; at or below -1e30 it masks. Floats `[B, H, Q, K]`
    pub bias: Option<View<'a>>,
    /// Whether each query attends to each key. Bool `[B, H, Q, K]`
    pub mask: Option<View<'a>>,
    /// `-slope * |position of the query - key|` is added to the scores. f32 `[H]`
    pub alibi: Option<&'a Tensor>,
    /// T5's relative position bias, looked up by [`Options::t5`]. f32 `[buckets, H]`
    pub t5: Option<&'a Tensor>,
    /// One more logit in each row's denominator, without a value. f32 `[H]`
    pub sinks: Option<&'a Tensor>,
    /// What the caller's WGSL reads, by name: at most two. f32, u32 or i32, any shape
    pub extra: Vec<(&'a str, &'a Tensor)>,
    /// Where the scores of [`Options::stage`] go; only the three-pass route has them. f32 `[B, H, Q, K]`
    pub weights: Option<&'a Tensor>,
    /// The natural logarithm of each row's denominator. f32 `[B, H, Q]`
    pub lse: Option<&'a Tensor>,
}

impl<'a> Tensors<'a> {
    /// Plain attention: all keys valid, no mask, no bias, only the result asked for.
    pub fn new(q: View<'a>, k: View<'a>, v: View<'a>, out: View<'a>) -> Self {
        Tensors {
            q,
            k,
            v,
            out,
            kv_len: None,
            q_offset: None,
            prefix_len: None,
            cu_q: None,
            cu_k: None,
            rows: None,
            pages: None,
            bias: None,
            mask: None,
            alibi: None,
            t5: None,
            sinks: None,
            extra: Vec::new(),
            weights: None,
            lse: None,
        }
    }
}
