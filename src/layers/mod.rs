//! Encoder and decoder layers, recorded from weights. Which family they come from is not known here.

mod causal;

pub use causal::{Cascade, CausalLayer, CausalStream, Heads, NewTokens, Paged};

use crate::Result;
use crate::attention::{self, Options, Tensors, View};
use crate::cache::Cache;
use crate::gpu::{DType, Gpu, Recorder, Tensor};
use crate::ops::{self, Activation, Append, Epilogue, Linear, Norm, Rows};

/// Where a layer's norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormOrder {
    /// x = norm(x + f(x)), as in the first transformer.
    Post,
    /// x = x + f(norm(x)).
    Pre,
}

/// Self-attention's weights: the three projections as one. q, k, v: `[d, 3 d]`; out: `[d, d]`
#[derive(Clone, Debug)]
pub struct SelfAttention {
    /// Queries, keys and values, in that order.
    pub qkv: Linear,
    /// The output projection.
    pub out: Linear,
    /// The sublayer's norm.
    pub norm: Norm,
}

/// Cross-attention's weights. q, out: `[d, d]`; kv: `[d, 2 d]`
#[derive(Clone, Debug)]
pub struct CrossAttention {
    /// Queries, from the decoder.
    pub q: Linear,
    /// Keys and values, from the encoder's states.
    pub kv: Linear,
    /// The output projection.
    pub out: Linear,
    /// The sublayer's norm.
    pub norm: Norm,
}

/// A feed-forward layer's weights. up: `[d, ffn]`; down: `[ffn, d]`
#[derive(Clone, Debug)]
pub struct FeedForward {
    /// Into the wide space.
    pub up: Linear,
    /// Back.
    pub down: Linear,
    /// Between the two.
    pub activation: Activation,
    /// The sublayer's norm.
    pub norm: Norm,
}

/// One encoder layer.
#[derive(Clone, Debug)]
pub struct EncoderLayer {
    /// The sequence attends to itself.
    pub attention: SelfAttention,
    /// Position by position.
    pub feed_forward: FeedForward,
}

/// One decoder layer.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    /// The target attends to what is written.
    pub attention: SelfAttention,
    /// The target attends to the source.
    pub cross: CrossAttention,
    /// Position by position.
    pub feed_forward: FeedForward,
}

/// A batch of sequences: B of them, L positions each, H heads of D columns.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// Sequences, B.
    pub sequences: u32,
    /// Positions of each, L.
    pub len: u32,
    /// Heads, H.
    pub heads: u32,
    /// Columns of a head, D.
    pub head_dim: u32,
}

impl Batch {
    fn rows(&self) -> u32 {
        self.sequences * self.len
    }

    fn width(&self) -> u32 {
        self.heads * self.head_dim
    }

    fn extents(&self) -> [u32; 4] {
        [self.sequences, self.heads, self.len, self.head_dim]
    }

    /// The heads of a projection `parts` times as wide as the model, those of part `part`.
    fn part<'t>(&self, tensor: &'t Tensor, parts: u32, part: u32) -> Result<View<'t>> {
        View::packed(
            tensor,
            self.extents(),
            parts * self.width(),
            part * self.width(),
        )
    }
}

/// The source that a decoder attends to: a layer's keys and values and their lengths.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// Keys, then values. `[B' S, 2 d]`
    pub kv: &'a Tensor,
    /// Valid positions. u32 `[B']`
    pub lengths: &'a Tensor,
    /// Sequences, B'; it divides the decoder's batch.
    pub sequences: u32,
    /// Positions, S.
    pub len: u32,
}

/// What a decoder's self-attention reads.
pub enum Past<'a> {
    /// The whole target at once, causally.
    None,
    /// The cache of one layer, to which this step's token is appended.
    Cached(&'a Cache, usize),
}

/// The residual stream through a stack, and the scratch that its sublayers share.
pub struct Stream<'r, 'g> {
    recorder: &'r mut Recorder<'g>,
    batch: Batch,
    order: NormOrder,
    x: Tensor,
    y: Tensor,
    normed: Tensor,
    projected: Tensor,
    mixed: Tensor,
    hidden: Tensor,
}

impl<'r, 'g> Stream<'r, 'g> {
    /// Scratch for a batch; `ffn` is the widest feed-forward space.
    pub fn new(
        recorder: &'r mut Recorder<'g>,
        dtype: DType,
        batch: Batch,
        order: NormOrder,
        ffn: u32,
    ) -> Result<Self> {
        let gpu: &Gpu = recorder.gpu();
        let (rows, d) = (batch.rows(), batch.width());
        Ok(Stream {
            x: gpu.empty("x", dtype, &[rows, d])?,
            y: gpu.empty("y", dtype, &[rows, d])?,
            normed: gpu.empty("normed", dtype, &[rows, d])?,
            projected: gpu.empty("projected", dtype, &[rows, 3 * d])?,
            mixed: gpu.empty("mixed", dtype, &[rows, d])?,
            hidden: gpu.empty("hidden", dtype, &[rows, ffn])?,
            recorder,
            batch,
            order,
        })
    }

    /// The stream's state. `[B L, d]`
    pub fn state(&self) -> &Tensor {
        &self.x
    }

    /// The recording that the stream writes.
    pub fn recorder(&mut self) -> &mut Recorder<'g> {
        self.recorder
    }

    /// A norm on the state itself: after the embedding, or at a stack's end.
    pub fn norm(&mut self, norm: &Norm) -> Result<()> {
        ops::norm(self.recorder, &self.x, norm, &self.y)?;
        std::mem::swap(&mut self.x, &mut self.y);
        Ok(())
    }

    /// `f`'s input: the state, or its norm.
    fn enter(&mut self, norm: &Norm) -> Result<Tensor> {
        match self.order {
            NormOrder::Post => Ok(self.x.clone()),
            NormOrder::Pre => {
                ops::norm(self.recorder, &self.x, norm, &self.normed)?;
                Ok(self.normed.clone())
            }
        }
    }

    /// The state becomes x + `from` projected by `out`, and its norm where that comes last.
    fn leave(&mut self, norm: &Norm, from: &Tensor, out: &Linear) -> Result<()> {
        let epilogue = Epilogue {
            residual: Some(&self.x),
            ..Default::default()
        };
        ops::matmul(self.recorder, from, out, &self.y, epilogue)?;
        match self.order {
            NormOrder::Post => ops::norm(self.recorder, &self.y, norm, &self.x),
            NormOrder::Pre => {
                std::mem::swap(&mut self.x, &mut self.y);
                Ok(())
            }
        }
    }

    fn feed_forward(&mut self, weights: &FeedForward) -> Result<()> {
        let input = self.enter(&weights.norm)?;
        let hidden = self
            .hidden
            .reshape_prefix(&[self.batch.rows(), weights.up.n]);
        let epilogue = Epilogue {
            activation: Some(weights.activation),
            ..Default::default()
        };
        ops::matmul(self.recorder, &input, &weights.up, &hidden, epilogue)?;
        self.leave(&weights.norm, &hidden, &weights.down)
    }

    /// Self-attention over the whole sequence at once.
    fn whole_attention(
        &mut self,
        weights: &SelfAttention,
        kv_len: Option<&Tensor>,
        causal: bool,
        tap: Option<&Tensor>,
    ) -> Result<()> {
        let input = self.enter(&weights.norm)?;
        ops::matmul(
            self.recorder,
            &input,
            &weights.qkv,
            &self.projected,
            Epilogue::default(),
        )?;
        let tensors = Tensors {
            kv_len,
            weights: tap,
            ..Tensors::new(
                self.batch.part(&self.projected, 3, 0)?,
                self.batch.part(&self.projected, 3, 1)?,
                self.batch.part(&self.projected, 3, 2)?,
                self.batch.part(&self.mixed, 1, 0)?,
            )
        };
        let options = Options {
            causal,
            ..Default::default()
        };
        attention::record(self.recorder, &tensors, &options)?;
        let mixed = self.mixed.clone();
        self.leave(&weights.norm, &mixed, &weights.out)
    }

    /// Self-attention of one token a sequence over the cache, to which it is appended.
    fn cached_attention(
        &mut self,
        weights: &SelfAttention,
        cache: &Cache,
        layer: usize,
    ) -> Result<()> {
        let input = self.enter(&weights.norm)?;
        ops::matmul(
            self.recorder,
            &input,
            &weights.qkv,
            &self.projected,
            Epilogue::default(),
        )?;
        let (k, v) = (&cache.k[layer], &cache.v[layer]);
        let step = Append {
            qkv: &self.projected,
            heads: self.batch.heads,
            rows: Rows::Lengths(&cache.lengths),
            k_cache: k,
            v_cache: v,
            pages: None,
            qk_norm: None,
            rotary: None,
            q: None,
        };
        ops::append(self.recorder, &step)?;
        let tensors = Tensors {
            kv_len: Some(&cache.lengths),
            rows: cache.rows.as_ref(),
            ..Tensors::new(
                self.batch.part(&self.projected, 3, 0)?,
                View::bhld(k)?,
                View::bhld(v)?,
                self.batch.part(&self.mixed, 1, 0)?,
            )
        };
        attention::record(self.recorder, &tensors, &Options::default())?;
        let mixed = self.mixed.clone();
        self.leave(&weights.norm, &mixed, &weights.out)
    }

    fn cross_attention(
        &mut self,
        weights: &CrossAttention,
        source: Source,
        tap: Option<&Tensor>,
    ) -> Result<()> {
        let input = self.enter(&weights.norm)?;
        let q = self
            .projected
            .reshape_prefix(&[self.batch.rows(), self.batch.width()]);
        ops::matmul(self.recorder, &input, &weights.q, &q, Epilogue::default())?;
        let kv = Batch {
            sequences: source.sequences,
            len: source.len,
            ..self.batch
        };
        let tensors = Tensors {
            kv_len: Some(source.lengths),
            weights: tap,
            ..Tensors::new(
                self.batch.part(&q, 1, 0)?,
                kv.part(source.kv, 2, 0)?,
                kv.part(source.kv, 2, 1)?,
                self.batch.part(&self.mixed, 1, 0)?,
            )
        };
        attention::record(self.recorder, &tensors, &Options::default())?;
        let mixed = self.mixed.clone();
        self.leave(&weights.norm, &mixed, &weights.out)
    }

    /// One encoder layer. `lengths` are the valid positions of each sequence, u32 `[B]`; `tap` takes the
    /// attention weights, f32 `[B, H, L, L]`.
    pub fn encoder_layer(
        &mut self,
        layer: &EncoderLayer,
        lengths: &Tensor,
        tap: Option<&Tensor>,
    ) -> Result<()> {
        self.whole_attention(&layer.attention, Some(lengths), false, tap)?;
        self.feed_forward(&layer.feed_forward)
    }

    /// One decoder layer. `taps` take the weights of self- and cross-attention, f32 `[B, H, L, L]` and
    /// `[B, H, L, S]`; a cached step has none of the former.
    pub fn decoder_layer(
        &mut self,
        layer: &DecoderLayer,
        past: Past,
        source: Source,
        taps: [Option<&Tensor>; 2],
    ) -> Result<()> {
        match past {
            Past::None => self.whole_attention(&layer.attention, None, true, taps[0])?,
            Past::Cached(cache, ix) => self.cached_attention(&layer.attention, cache, ix)?,
        }
        self.cross_attention(&layer.cross, source, taps[1])?;
        self.feed_forward(&layer.feed_forward)
    }
}
