//! Layers of decoder-only stacks: RMSNorm, rotary positions, grouped KV heads, a gated feed-forward.

use crate::Result;
use crate::attention::{self, Options, SharedKeys, Tensors, View};
use crate::gpu::{DType, Gpu, Recorder, Tensor};
use crate::ops::{self, Activation, Append, Epilogue, Linear, Norm, QkNorm, Rotary, Rows};

/// One decoder-only layer: x + attention(norm(x)), then x + feed_forward(norm(x)).
#[derive(Clone, Debug)]
pub struct CausalLayer {
    /// Before attention.
    pub attention_norm: Norm,
    /// Queries, keys and values, in that order. `[d, (H + 2 Hk) D]`
    pub qkv: Linear,
    /// Of each head of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Keys that a token sees, its own included; all before it if not given.
    pub window: Option<u32>,
    /// The output projection. `[H D, d]`
    pub out: Linear,
    /// Before the feed-forward block.
    pub feed_forward_norm: Norm,
    /// Pairs of columns, a gate and what it lets through. `[d, 2 ffn]`
    pub gate_up: Linear,
    /// Of the gate.
    pub activation: Activation,
    /// Back. `[ffn, d]`
    pub down: Linear,
}

/// The heads of a decoder-only stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, H.
    pub heads: u32,
    /// KV heads, Hk; they divide H.
    pub kv_heads: u32,
    /// Columns of a head, D.
    pub head_dim: u32,
}

/// The new tokens of a step: S sequences, T rows of each, the last of which may be padding.
#[derive(Clone, Copy)]
pub struct NewTokens<'a> {
    /// Sequences, S.
    pub sequences: u32,
    /// Rows of each, T.
    pub len: u32,
    /// Where each row belongs, u32 `[S T, 2]`; without it T is 1, and the token is each sequence's last.
    pub places: Option<&'a Tensor>,
    /// The position of each sequence's first new token; those of its last T if not given. i32 `[S]`
    pub starts: Option<&'a Tensor>,
    /// Positions that each sequence fills with them. u32 `[S]`
    pub lengths: &'a Tensor,
    /// The rows are those of sequences in pages, as many as each has.
    pub paged: Option<Paged<'a>>,
}

/// New tokens of S sequences in pages, one sequence's rows behind the other's: of [`NewTokens`], `sequences` is 1
/// and `len` all rows together. The results of a sequence are the same, bit for bit, whatever stands beside it.
#[derive(Clone, Copy)]
pub struct Paged<'a> {
    /// The page of each stretch of each sequence. u32 `[S, M]`
    pub pages: &'a Tensor,
    /// Where each sequence's rows begin, and where the last one's end. u32 `[S + 1]`
    pub cu_q: &'a Tensor,
    /// Where first keys that sequences share are read once. What is then the same whatever stands beside it is
    /// so but for rounding.
    pub cascade: Option<Cascade<'a>>,
}

/// Keys that sequences share, and those that each has behind them.
#[derive(Clone, Copy)]
pub struct Cascade<'a> {
    /// The former, by groups of sequences.
    pub shared: SharedKeys<'a>,
    /// The page of each stretch of each sequence's own. u32 `[S, M]`
    pub pages: &'a Tensor,
    /// How many keys those are. u32 `[S]`
    pub kv_len: &'a Tensor,
}

/// The residual stream of a step through a decoder-only stack, and the scratch that its layers share.
pub struct CausalStream<'r, 'g, 'a> {
    recorder: &'r mut Recorder<'g>,
    tokens: NewTokens<'a>,
    heads: Heads,
    rotary: &'a Rotary,
    x: Tensor,
    y: Tensor,
    normed: Tensor,
    projected: Tensor,
    q: Tensor,
    mixed: Tensor,
    hidden: Tensor,
}

impl<'r, 'g, 'a> CausalStream<'r, 'g, 'a> {
    /// Scratch for a step; `width` is d, `ffn` the inner width of the feed-forward blocks.
    pub fn new(
        recorder: &'r mut Recorder<'g>,
        dtype: DType,
        tokens: NewTokens<'a>,
        heads: Heads,
        rotary: &'a Rotary,
        [width, ffn]: [u32; 2],
    ) -> Result<Self> {
        let gpu: &Gpu = recorder.gpu();
        let rows = tokens.sequences * tokens.len;
        let scratch = |name: &str, columns: u32| gpu.empty(name, dtype, &[rows, columns]);
        let queries = heads.heads * heads.head_dim;
        let all = queries + 2 * heads.kv_heads * heads.head_dim;
        Ok(CausalStream {
            x: scratch("x", width)?,
            y: scratch("y", width)?,
            normed: scratch("normed", width)?,
            projected: scratch("projected", all)?,
            q: scratch("q", queries)?,
            mixed: scratch("mixed", queries)?,
            hidden: scratch("hidden", ffn)?,
            recorder,
            tokens,
            heads,
            rotary,
        })
    }

    /// The stream's state. `[S T, d]`
    pub fn state(&self) -> &Tensor {
        &self.x
    }

    /// The recording that the stream writes.
    pub fn recorder(&mut self) -> &mut Recorder<'g> {
        self.recorder
    }

    /// The norm at the stack's end: of every row, or of those that `rows` names, u32 `[N]`. `[N, d]`
    pub fn norm(&mut self, norm: &Norm, rows: Option<&Tensor>) -> Result<Tensor> {
        let Some(rows) = rows else {
            ops::norm(self.recorder, &self.x, norm, &self.normed)?;
            return Ok(self.normed.clone());
        };
        let shape = [rows.len() as u32, self.x.shape[1]];
        let gpu: &Gpu = self.recorder.gpu();
        let y = gpu.empty("last states", self.x.dtype, &shape)?;
        ops::norm_rows(self.recorder, &self.x, norm, rows, &y)?;
        Ok(y)
    }

    /// The state becomes x + `from` projected by `out`.
    fn add(&mut self, from: &Tensor, out: &Linear) -> Result<()> {
        let epilogue = Epilogue {
            residual: Some(&self.x),
            ..Default::default()
        };
        ops::matmul(self.recorder, from, out, &self.y, epilogue)?;
        std::mem::swap(&mut self.x, &mut self.y);
        Ok(())
    }

    /// One layer: appends the tokens' keys and values to `k` and `v`, `[S, Hk, L, D]` or pools of pages, and
    /// attends to what is there. `tap` takes the attention weights, f32 `[S, H, T, L]`.
    pub fn layer(
        &mut self,
        layer: &CausalLayer,
        k: &Tensor,
        v: &Tensor,
        tap: Option<&Tensor>,
    ) -> Result<()> {
        ops::norm(self.recorder, &self.x, &layer.attention_norm, &self.normed)?;
        ops::matmul(
            self.recorder,
            &self.normed,
            &layer.qkv,
            &self.projected,
            Epilogue::default(),
        )?;
        let NewTokens {
            sequences,
            len,
            paged,
            ..
        } = self.tokens;
        let Heads {
            heads, head_dim, ..
        } = self.heads;
        let step = Append {
            qkv: &self.projected,
            heads,
            rows: match self.tokens.places {
                Some(places) => Rows::Places(places),
                None => Rows::Lengths(self.tokens.lengths),
            },
            k_cache: k,
            v_cache: v,
            pages: paged.map(|paged| paged.pages),
            qk_norm: layer.qk_norm.as_ref(),
            rotary: Some(self.rotary),
            q: Some(&self.q),
        };
        ops::append(self.recorder, &step)?;
        let extents = [sequences, heads, len, head_dim];
        let cascade = paged.and_then(|paged| paged.cascade);
        let pages = paged.map(|paged| paged.pages);
        let tensors = Tensors {
            kv_len: Some(cascade.map_or(self.tokens.lengths, |own| own.kv_len)),
            q_offset: self.tokens.starts,
            weights: tap,
            pages: cascade.map(|own| own.pages).or(pages),
            cu_q: paged.map(|paged| paged.cu_q),
            ..Tensors::new(
                View::packed(&self.q, extents, heads * head_dim, 0)?,
                View::bhld(k)?,
                View::bhld(v)?,
                View::packed(&self.mixed, extents, heads * head_dim, 0)?,
            )
        };
        let options = Options {
            causal: true,
            window: [layer.window.map(|keys| keys - 1), None],
            batch_invariant: paged.is_some() && cascade.is_none(),
            ..Default::default()
        };
        match cascade {
            Some(Cascade { shared, .. }) => {
                attention::record_cascade(self.recorder, &tensors, &shared, &options)?;
            }
            None => {
                attention::record(self.recorder, &tensors, &options)?;
            }
        }
        let mixed = self.mixed.clone();
        self.add(&mixed, &layer.out)?;

        let norm = &layer.feed_forward_norm;
        ops::norm(self.recorder, &self.x, norm, &self.normed)?;
        let epilogue = Epilogue {
            activation: Some(layer.activation),
            gated: true,
            ..Default::default()
        };
        let hidden = self.hidden.clone();
        ops::matmul(
            self.recorder,
            &self.normed,
            &layer.gate_up,
            &hidden,
            epilogue,
        )?;
        self.add(&hidden, &layer.down)
    }
}
