//! An encoder-decoder stack from plain data, as Hugging Face's Marian and BART compute it.

use super::attention::{Attention, Offset, attention, expand};
use super::rows::{Activation, layer_norm, linear, rms_norm};

/// A linear map.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    /// Width of the rows that it takes.
    pub n_in: usize,
    /// `[out, in]`.
    pub weight: Vec<f64>,
    /// `[out]`.
    pub bias: Option<Vec<f64>>,
}

impl Linear {
    /// `x W^T + b`. `x` `[rows, in]`; the answer is `[rows, out]`.
    pub fn apply(&self, x: &[f64]) -> Vec<f64> {
        linear(x, self.n_in, &self.weight, self.bias.as_deref())
    }
}

/// A normalisation of rows.
#[derive(Debug, Clone, PartialEq)]
pub enum Norm {
    /// See [`layer_norm`].
    Layer {
        /// `[d]`.
        weight: Vec<f64>,
        /// `[d]`.
        bias: Vec<f64>,
        /// Added to the variance.
        eps: f64,
    },
    /// See [`rms_norm`].
    Rms {
        /// `[d]`.
        weight: Vec<f64>,
        /// Added to the mean square.
        eps: f64,
    },
}

impl Norm {
    /// Normalises every row. `x` `[rows, d]`; the answer is `[rows, d]`.
    pub fn apply(&self, x: &[f64]) -> Vec<f64> {
        match self {
            Norm::Layer { weight, bias, eps } => layer_norm(x, weight, bias, *eps),
            Norm::Rms { weight, eps } => rms_norm(x, weight, *eps),
        }
    }
}

/// Where a layer's norms stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlace {
    /// `x + f(norm(x))`.
    Pre,
    /// `norm(x + f(x))`.
    Post,
}

impl NormPlace {
    /// One residual block: `f` with its norm and the way around it. `x` `[rows, d]`.
    fn around(self, norm: &Norm, x: &[f64], f: impl FnOnce(&[f64]) -> Vec<f64>) -> Vec<f64> {
        match self {
            NormPlace::Pre => add(x, &f(&norm.apply(x))),
            NormPlace::Post => norm.apply(&add(x, &f(x))),
        }
    }
}

/// The four maps of an attention block.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionWeights {
    /// H, query heads; the head dim is the width of `q` over H.
    pub heads: usize,
    /// Hk, key and value heads.
    pub kv_heads: usize,
    /// To queries, d to H * D.
    pub q: Linear,
    /// To keys, d to Hk * D.
    pub k: Linear,
    /// To values, d to Hk * D.
    pub v: Linear,
    /// Back to states, H * D to d.
    pub o: Linear,
}

impl AttentionWeights {
    /// The block, with the weights it attended by. `x` `[B, Q, d]`, `memory` `[B, K, d]`, `mask` `[B, K]`
    /// (true attends). The answers are `[B, Q, d]` and `[B, H, Q, K]`.
    pub fn apply(
        &self,
        x: &[f64],
        memory: &[f64],
        batch: usize,
        mask: Option<&[bool]>,
        causal: bool,
    ) -> (Vec<f64>, Vec<f64>) {
        let (q, k, v) = (self.q.apply(x), self.k.apply(memory), self.v.apply(memory));
        let q_len = x.len() / (batch * self.q.n_in);
        let k_len = memory.len() / (batch * self.k.n_in);
        let head_dim = q.len() / (batch * q_len * self.heads);
        let value_dim = v.len() / (batch * k_len * self.kv_heads);
        let q = split_heads(&q, batch, q_len, self.heads);
        let k = split_heads(&k, batch, k_len, self.kv_heads);
        let v = split_heads(&v, batch, k_len, self.kv_heads);
        let mask = mask.map(|mask| {
            expand([batch, self.heads, q_len, k_len], |b, _, _, j| {
                mask[b * k_len + j]
            })
        });
        let answer = attention(&Attention {
            mask: mask.as_deref(),
            causal,
            offset: Offset::TopLeft,
            ..Attention::new(
                [batch, self.heads, q_len, head_dim],
                [batch, self.kv_heads, k_len, value_dim],
                &q,
                &k,
                &v,
            )
        });
        let joined = join_heads(&answer.out, batch, q_len, self.heads);
        (self.o.apply(&joined), answer.weights)
    }
}

/// `[B, L, H * D]` to `[B, H, L, D]`.
fn split_heads(x: &[f64], batch: usize, len: usize, heads: usize) -> Vec<f64> {
    let dim = x.len() / (batch * len * heads);
    expand([batch, heads, len, dim], |b, h, i, d| {
        x[((b * len + i) * heads + h) * dim + d]
    })
}

/// `[B, H, L, D]` to `[B, L, H * D]`.
fn join_heads(x: &[f64], batch: usize, len: usize, heads: usize) -> Vec<f64> {
    let dim = x.len() / (batch * len * heads);
    expand([batch, len, heads, dim], |b, i, h, d| {
        x[((b * heads + h) * len + i) * dim + d]
    })
}

/// Two linear maps and what stands between them.
#[derive(Debug, Clone, PartialEq)]
pub struct FeedForward {
    /// d to the inner width.
    pub up: Linear,
    /// Between the two.
    pub activation: Activation,
    /// The inner width to d.
    pub down: Linear,
}

impl FeedForward {
    /// `down(activation(up(x)))`. `x` `[rows, d]`; the answer is `[rows, d]`.
    pub fn apply(&self, x: &[f64]) -> Vec<f64> {
        let mut inner = self.up.apply(x);
        for value in &mut inner {
            *value = self.activation.at(*value);
        }
        self.down.apply(&inner)
    }
}

/// One layer of the encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderLayer {
    /// Over the source.
    pub self_attention: AttentionWeights,
    /// Its norm.
    pub self_norm: Norm,
    /// The second block.
    pub feed_forward: FeedForward,
    /// Its norm.
    pub feed_forward_norm: Norm,
}

/// One layer of the decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderLayer {
    /// Over the target so far, causal.
    pub self_attention: AttentionWeights,
    /// Its norm.
    pub self_norm: Norm,
    /// Over the encoder's states.
    pub cross_attention: AttentionWeights,
    /// Its norm.
    pub cross_norm: Norm,
    /// The third block.
    pub feed_forward: FeedForward,
    /// Its norm.
    pub feed_forward_norm: Norm,
}

/// A whole encoder-decoder. Its sizes are those of its parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Stack {
    /// d, the width of a state.
    pub d_model: usize,
    /// Where every layer's norms stand.
    pub norm_place: NormPlace,
    /// What embeddings are multiplied by: sqrt(d) or 1.
    pub embedding_scale: f64,
    /// Rows added to the embeddings by position, sinusoidal or learned, for both sides, `[P, d]`.
    pub positions: Vec<f64>,
    /// The source's embeddings, `[V, d]`.
    pub source_embedding: Vec<f64>,
    /// The target's embeddings; the source's where absent, `[V, d]`.
    pub target_embedding: Option<Vec<f64>>,
    /// From states to logits; the target's embeddings where absent, `[V, d]`.
    pub output: Option<Vec<f64>>,
    /// Added to the logits, `[V]`.
    pub logits_bias: Option<Vec<f64>>,
    /// After the source's embedding (BART has it, Marian has not).
    pub encoder_embedding_norm: Option<Norm>,
    /// After the target's embedding.
    pub decoder_embedding_norm: Option<Norm>,
    /// The encoder.
    pub encoder: Vec<EncoderLayer>,
    /// The decoder.
    pub decoder: Vec<DecoderLayer>,
    /// After the last layer of the encoder: pre-norm stacks have it.
    pub encoder_norm: Option<Norm>,
    /// After the last layer of the decoder.
    pub decoder_norm: Option<Norm>,
}

/// What [`Stack::encode`] answers.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderOut {
    /// `[B, S, d]`.
    pub states: Vec<f64>,
    /// The weights of every layer, each `[B, H, S, S]`.
    pub attentions: Vec<Vec<f64>>,
}

/// What [`Stack::decode`] answers.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderOut {
    /// `[B, T, V]`.
    pub logits: Vec<f64>,
    /// The weights of every layer over the target, each `[B, H, T, T]`.
    pub self_attentions: Vec<Vec<f64>>,
    /// The weights of every layer over the source, each `[B, H, T, S]`.
    pub cross_attentions: Vec<Vec<f64>>,
}

/// The mask of rows padded at their ends: true below each row's length, `[B, width]`.
pub fn mask_of_lengths(lengths: &[usize], width: usize) -> Vec<bool> {
    let row = |&length: &usize| (0..width).map(move |j| j < length);
    lengths.iter().flat_map(row).collect()
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| x + y).collect()
}

impl Stack {
    /// The source's states. `ids` `[B, S]`; `mask` `[B, S]`, true for tokens and false for padding.
    pub fn encode(&self, ids: &[u32], batch: usize, mask: Option<&[bool]>) -> EncoderOut {
        assert!(mask.is_none_or(|mask| mask.len() == ids.len()), "mask");
        let norm = &self.encoder_embedding_norm;
        let mut x = self.embed(ids, batch, &self.source_embedding, norm);
        let mut attentions = Vec::new();
        for layer in &self.encoder {
            x = self.norm_place.around(&layer.self_norm, &x, |x| {
                let (y, weights) = layer.self_attention.apply(x, x, batch, mask, false);
                attentions.push(weights);
                y
            });
            x = self.norm_place.around(&layer.feed_forward_norm, &x, |x| {
                layer.feed_forward.apply(x)
            });
        }
        if let Some(norm) = &self.encoder_norm {
            x = norm.apply(&x);
        }
        EncoderOut {
            states: x,
            attentions,
        }
    }

    /// The logits of every position of the target in one pass. `ids` `[B, T]`, `states` `[B, S, d]`,
    /// `mask` `[B, S]` over the source, true for tokens.
    pub fn decode(
        &self,
        ids: &[u32],
        batch: usize,
        states: &[f64],
        mask: Option<&[bool]>,
    ) -> DecoderOut {
        let source = states.len() / self.d_model;
        assert!(mask.is_none_or(|mask| mask.len() == source), "mask");
        let table = self
            .target_embedding
            .as_deref()
            .unwrap_or(&self.source_embedding);
        let mut x = self.embed(ids, batch, table, &self.decoder_embedding_norm);
        let (mut self_attentions, mut cross_attentions) = (Vec::new(), Vec::new());
        for layer in &self.decoder {
            x = self.norm_place.around(&layer.self_norm, &x, |x| {
                let (y, weights) = layer.self_attention.apply(x, x, batch, None, true);
                self_attentions.push(weights);
                y
            });
            x = self.norm_place.around(&layer.cross_norm, &x, |x| {
                let cross = &layer.cross_attention;
                let (y, weights) = cross.apply(x, states, batch, mask, false);
                cross_attentions.push(weights);
                y
            });
            x = self.norm_place.around(&layer.feed_forward_norm, &x, |x| {
                layer.feed_forward.apply(x)
            });
        }
        if let Some(norm) = &self.decoder_norm {
            x = norm.apply(&x);
        }
        let output = self.output.as_deref().unwrap_or(table);
        DecoderOut {
            logits: linear(&x, self.d_model, output, self.logits_bias.as_deref()),
            self_attentions,
            cross_attentions,
        }
    }

    /// `ids` `[B, L]`, `table` `[V, d]`; the answer is `[B, L, d]`.
    fn embed(&self, ids: &[u32], batch: usize, table: &[f64], norm: &Option<Norm>) -> Vec<f64> {
        assert!(
            batch > 0 && !ids.is_empty() && ids.len().is_multiple_of(batch),
            "{} ids in {batch} rows",
            ids.len()
        );
        let (len, d) = (ids.len() / batch, self.d_model);
        let mut x = Vec::with_capacity(ids.len() * d);
        for (at, &id) in ids.iter().enumerate() {
            let row = &table[id as usize * d..][..d];
            let position = &self.positions[at % len * d..][..d];
            x.extend((0..d).map(|i| row[i] * self.embedding_scale + position[i]));
        }
        match norm {
            Some(norm) => norm.apply(&x),
            None => x,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, erfc, noise, sinusoids};
    use super::*;

    const D: usize = 6;
    const VOCABULARY: usize = 11;

    /// Makes weights, each from its own seed.
    struct Maker(u64);

    impl Maker {
        fn values(&mut self, len: usize) -> Vec<f64> {
            self.0 += 1;
            noise(self.0, len)
        }

        fn linear(&mut self, n_in: usize, n_out: usize) -> Linear {
            Linear {
                n_in,
                weight: self.values(n_in * n_out),
                bias: Some(self.values(n_out)),
            }
        }

        fn norm(&mut self) -> Norm {
            Norm::Layer {
                weight: self.values(D),
                bias: self.values(D),
                eps: 1e-5,
            }
        }

        fn attention(&mut self) -> AttentionWeights {
            AttentionWeights {
                heads: 2,
                kv_heads: 1,
                q: self.linear(D, 8),
                k: self.linear(D, 4),
                v: self.linear(D, 4),
                o: self.linear(8, D),
            }
        }

        fn feed_forward(&mut self) -> FeedForward {
            FeedForward {
                up: self.linear(D, 9),
                activation: Activation::Gelu,
                down: self.linear(9, D),
            }
        }

        fn stack(mut self, norm_place: NormPlace) -> Stack {
            let pre = norm_place == NormPlace::Pre;
            let encoder = (0..2).map(|_| EncoderLayer {
                self_attention: self.attention(),
                self_norm: self.norm(),
                feed_forward: self.feed_forward(),
                feed_forward_norm: self.norm(),
            });
            let encoder = encoder.collect();
            let decoder = (0..3).map(|_| DecoderLayer {
                self_attention: self.attention(),
                self_norm: self.norm(),
                cross_attention: self.attention(),
                cross_norm: self.norm(),
                feed_forward: self.feed_forward(),
                feed_forward_norm: self.norm(),
            });
            let decoder = decoder.collect();
            Stack {
                d_model: D,
                norm_place,
                embedding_scale: (D as f64).sqrt(),
                positions: sinusoids(16, D),
                source_embedding: self.values(VOCABULARY * D),
                target_embedding: None,
                output: None,
                logits_bias: Some(self.values(VOCABULARY)),
                encoder_embedding_norm: None,
                decoder_embedding_norm: None,
                encoder,
                decoder,
                encoder_norm: pre.then(|| self.norm()),
                decoder_norm: pre.then(|| self.norm()),
            }
        }
    }

    fn stacks() -> [Stack; 2] {
        [NormPlace::Pre, NormPlace::Post].map(|place| Maker(100).stack(place))
    }

    #[test]
    fn a_padded_batch_equals_its_singles() {
        for stack in stacks() {
            let (long, short) = ([3, 1, 4, 1, 5], [9, 2, 6]);
            let mask = mask_of_lengths(&[5, 3], 5);
            let source = [3, 1, 4, 1, 5, 9, 2, 6, 0, 10];
            let target = [7, 8, 2, 0, 4, 6];
            let encoded = stack.encode(&source, 2, Some(&mask));
            let decoded = stack.decode(&target, 2, &encoded.states, Some(&mask));
            for (b, ids) in [&long[..], &short[..]].into_iter().enumerate() {
                let single = stack.encode(ids, 1, None);
                assert_close(
                    &encoded.states[b * 5 * D..][..ids.len() * D],
                    &single.states,
                );
                let alone = stack.decode(&target[b * 3..][..3], 1, &single.states, None);
                let n = 3 * VOCABULARY;
                assert_close(&decoded.logits[b * n..][..n], &alone.logits);
            }
        }
    }

    #[test]
    fn a_prefix_of_the_target_has_the_same_logits() {
        for stack in stacks() {
            let states = stack.encode(&[1, 2, 3], 1, None).states;
            let target = [4, 9, 1, 7];
            let whole = stack.decode(&target, 1, &states, None);
            for len in 1..4 {
                let part = stack.decode(&target[..len], 1, &states, None);
                assert_close(&part.logits, &whole.logits[..len * VOCABULARY]);
            }
        }
    }

    #[test]
    fn attentions_have_their_shapes_and_sum_to_one() {
        for stack in stacks() {
            let mask = mask_of_lengths(&[2, 4], 4);
            let encoded = stack.encode(&[1, 2, 0, 0, 5, 6, 7, 8], 2, Some(&mask));
            let decoded = stack.decode(&[1, 2, 3, 4, 5, 6], 2, &encoded.states, Some(&mask));
            let sets = [
                (&encoded.attentions, 2, [4, 4]),
                (&decoded.self_attentions, 3, [3, 3]),
                (&decoded.cross_attentions, 3, [3, 4]),
            ];
            for (attentions, layers, [q_len, k_len]) in sets {
                assert_eq!(attentions.len(), layers);
                for weights in attentions {
                    assert_eq!(weights.len(), 2 * 2 * q_len * k_len);
                    for row in weights.chunks(k_len) {
                        assert_close(&[row.iter().sum()], &[1.0]);
                    }
                }
            }
            // The padding of the first source, and the future of the target.
            assert_eq!(decoded.cross_attentions[0][2..4], [0.0, 0.0]);
            assert_eq!(decoded.self_attentions[0][1..3], [0.0, 0.0]);
        }
    }

    /// One layer without attention (its output map is zero), with every number worked out here.
    #[test]
    fn one_layer_by_hand() {
        let constant = |n_in: usize, weight: Vec<f64>| Linear {
            n_in,
            weight,
            bias: None,
        };
        let none = AttentionWeights {
            heads: 1,
            kv_heads: 1,
            q: constant(2, vec![0.0; 4]),
            k: constant(2, vec![0.0; 4]),
            v: constant(2, vec![0.0; 4]),
            o: constant(2, vec![0.0; 4]),
        };
        let plain = Norm::Layer {
            weight: vec![1.0, 1.0],
            bias: vec![0.0, 0.0],
            eps: 0.0,
        };
        let feed_forward = FeedForward {
            up: constant(2, vec![1.0, 0.0]),
            activation: Activation::Gelu,
            down: constant(1, vec![0.0, 10.0]),
        };
        let mut stack = Stack {
            d_model: 2,
            norm_place: NormPlace::Pre,
            embedding_scale: 2.0,
            positions: vec![0.5, 0.0],
            source_embedding: vec![0.0, 0.0, 1.0, 0.25],
            target_embedding: None,
            output: None,
            logits_bias: None,
            encoder_embedding_norm: None,
            decoder_embedding_norm: None,
            encoder: vec![EncoderLayer {
                self_attention: none,
                self_norm: plain.clone(),
                feed_forward,
                feed_forward_norm: plain,
            }],
            decoder: Vec::new(),
            encoder_norm: None,
            decoder_norm: None,
        };
        // The embedding is (2.5, 0.5), its norm (1, -1).
        let gelu = |x: f64| 0.5 * x * erfc(-x / 2f64.sqrt());
        let got = stack.encode(&[1], 1, None).states;
        assert_close(&got, &[2.5, 0.5 + 10.0 * gelu(1.0)]);
        // Norm (1, -1), then (1, -1 + 10 gelu(1)), whose second value is the larger.
        stack.norm_place = NormPlace::Post;
        assert_close(&stack.encode(&[1], 1, None).states, &[-1.0, 1.0]);
        // No decoder layers: the logits are products with the embeddings.
        let decoded = stack.decode(&[1], 1, &got, None);
        assert_close(&decoded.logits, &[0.0, 2.5 + 0.125]);
    }

    #[test]
    fn separate_tables_are_used() {
        let mut stack = Maker(100).stack(NormPlace::Post);
        let source = stack.encode(&[1, 2], 1, None).states;
        let tied = stack.decode(&[3, 4], 1, &source, None);
        stack.target_embedding = Some(stack.source_embedding.clone());
        stack.output = Some(stack.source_embedding.clone());
        assert_eq!(stack.decode(&[3, 4], 1, &source, None), tied);
        stack.target_embedding = Some(noise(7, 5 * D));
        stack.output = Some(noise(8, 4 * D));
        stack.logits_bias = Some(vec![0.0; 4]);
        assert_eq!(stack.decode(&[3, 4], 1, &source, None).logits.len(), 8);
    }
}
