//! A decoder-only stack from plain data, as Hugging Face's Llama, Mistral and Qwen compute it.

use super::attention::{Attention, Offset, attention, expand};
use super::rope::Rope;
use super::rows::{Activation, linear, rms_norm};
use super::stack::Linear;

/// One layer: `x + attention(norm(x))`, then `x + down(activation(gate) * up)` alike.
#[derive(Debug, Clone, PartialEq)]
pub struct CausalLayer {
    /// Before attention, `[d]`.
    pub attention_norm: Vec<f64>,
    /// To queries, d to H * D.
    pub q: Linear,
    /// To keys, d to Hk * D.
    pub k: Linear,
    /// To values, d to Hk * D.
    pub v: Linear,
    /// Back to states, H * D to d.
    pub o: Linear,
    /// RMSNorm of each head of queries and of keys, `[D]` each.
    pub qk_norm: Option<[Vec<f64>; 2]>,
    /// Keys that a query sees, its own included.
    pub window: Option<usize>,
    /// Before the feed-forward block, `[d]`.
    pub feed_forward_norm: Vec<f64>,
    /// d to the inner width.
    pub gate: Linear,
    /// d to the inner width.
    pub up: Linear,
    /// Of the gate.
    pub activation: Activation,
    /// The inner width to d.
    pub down: Linear,
}

/// A whole decoder-only stack.
#[derive(Debug, Clone, PartialEq)]
pub struct CausalStack {
    /// d, the width of a state.
    pub d_model: usize,
    /// H, query heads.
    pub heads: usize,
    /// Hk, key and value heads.
    pub kv_heads: usize,
    /// Added to every mean square.
    pub eps: f64,
    /// How queries and keys are turned.
    pub rope: Rope,
    /// `[V, d]`.
    pub embedding: Vec<f64>,
    /// The layers.
    pub layers: Vec<CausalLayer>,
    /// After the last layer, `[d]`.
    pub norm: Vec<f64>,
    /// From states to logits; the embeddings where absent, `[V, d]`.
    pub output: Option<Vec<f64>>,
}

impl CausalLayer {
    /// Attention's part and its weights, of normed states. `x` `[B, L, d]`.
    fn attend(&self, stack: &CausalStack, x: &[f64], batch: usize) -> (Vec<f64>, Vec<f64>) {
        let len = x.len() / (batch * stack.d_model);
        let heads_of = |linear: &Linear, heads: usize, norm: Option<&[f64]>, turns: bool| {
            let flat = linear.apply(x);
            let dim = flat.len() / (batch * len * heads);
            let mut all = Vec::new();
            for b in 0..batch {
                for h in 0..heads {
                    for i in 0..len {
                        let mut head = flat[((b * len + i) * heads + h) * dim..][..dim].to_vec();
                        if let Some(gamma) = norm {
                            head = rms_norm(&head, gamma, stack.eps);
                        }
                        if turns {
                            stack.rope.turn(&mut head, i);
                        }
                        all.extend(head);
                    }
                }
            }
            all
        };
        let norm = |ix: usize| self.qk_norm.as_ref().map(|both| both[ix].as_slice());
        let q = heads_of(&self.q, stack.heads, norm(0), true);
        let k = heads_of(&self.k, stack.kv_heads, norm(1), true);
        let v = heads_of(&self.v, stack.kv_heads, None, false);
        let dim = q.len() / (batch * stack.heads * len);
        let answer = attention(&Attention {
            causal: true,
            window: (self.window.map_or(-1, |keys| keys as i64 - 1), -1),
            offset: Offset::TopLeft,
            ..Attention::new(
                [batch, stack.heads, len, dim],
                [batch, stack.kv_heads, len, dim],
                &q,
                &k,
                &v,
            )
        });
        let joined = expand([batch, len, stack.heads, dim], |b, i, h, c| {
            answer.out[((b * stack.heads + h) * len + i) * dim + c]
        });
        (self.o.apply(&joined), answer.weights)
    }

    /// The feed-forward part, of normed states. `x` `[rows, d]`.
    fn feed(&self, x: &[f64]) -> Vec<f64> {
        let up = self.up.apply(x);
        let gate = self.gate.apply(x).into_iter();
        let inner: Vec<f64> = gate
            .zip(up)
            .map(|(gate, up)| self.activation.at(gate) * up)
            .collect();
        self.down.apply(&inner)
    }
}

impl CausalStack {
    /// The logits of every position, `[B, L, V]`, and the weights of every layer, each `[B, H, L, L]`.
    /// `ids` `[B, L]`.
    pub fn forward(&self, ids: &[u32], batch: usize) -> (Vec<f64>, Vec<Vec<f64>>) {
        assert!(
            batch > 0 && !ids.is_empty() && ids.len().is_multiple_of(batch),
            "{} ids in {batch} rows",
            ids.len()
        );
        let d = self.d_model;
        let rows = ids
            .iter()
            .map(|&id| &self.embedding[id as usize * d..][..d]);
        let mut x: Vec<f64> = rows.flatten().copied().collect();
        let mut attentions = Vec::new();
        let add = |x: &mut Vec<f64>, y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        for layer in &self.layers {
            let normed = rms_norm(&x, &layer.attention_norm, self.eps);
            let (y, weights) = layer.attend(self, &normed, batch);
            add(&mut x, y);
            attentions.push(weights);
            let normed = rms_norm(&x, &layer.feed_forward_norm, self.eps);
            add(&mut x, layer.feed(&normed));
        }
        let output = self.output.as_deref().unwrap_or(&self.embedding);
        let logits = linear(&rms_norm(&x, &self.norm, self.eps), d, output, None);
        (logits, attentions)
    }
}
