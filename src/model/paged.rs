//! Steps of decoder-only models over sequences in pages, each with as many new tokens as it has.

use std::collections::HashSet;

use super::causal::Pass;
use super::{CausalModel, Chunk};
use crate::cache::{PagedCache, PagedExtents, SequenceId, Tables};
use crate::gpu::{DType, Recorder, Tensor};
use crate::layers::{Heads, Paged};
use crate::{Error, Result};

/// The new tokens of S sequences in pages, R in all, on the device.
pub struct PagedStep {
    chunk: Chunk,
    /// u32 `[S + 1]`
    cu_q: Tensor,
    tables: Tables,
}

impl PagedStep {
    /// A [`CausalModel::paged_step`] with the logits of every new token instead of each sequence's last: `[R, V]`, one
    /// sequence's rows behind the other's.
    pub(crate) fn of_all(mut self) -> PagedStep {
        self.chunk.rows = None;
        self
    }

    /// Positions that each sequence fills with the step. u32 `[S]`
    pub fn lengths(&self) -> &Tensor {
        &self.tables.lengths
    }
}

impl CausalModel {
    /// An empty cache in pages for as many sequences as they hold; keys and values are stored as `types` says.
    ///
    /// # Errors
    /// As [`PagedCache::new`].
    pub fn paged_cache(&self, types: [DType; 2], pages: u32, page_len: u32) -> Result<PagedCache> {
        let spec = self.spec();
        let extents = PagedExtents {
            layers: spec.layers,
            pages,
            page_len,
            kv_heads: spec.heads.kv_heads,
            head_dim: spec.heads.head_dim,
        };
        PagedCache::new(self.gpu(), types, extents)
    }

    /// A step that computes the last tokens of sequences, of each as many as `new` says, which the cache has made
    /// room for already: prompts' chunks and single tokens, in any mixture.
    ///
    /// # Errors
    /// [`Error::Refused`] for no sequences, one that comes twice or is removed, no new tokens or more than it
    /// has, ids outside the vocabulary, and texts longer than the model's positions.
    pub fn paged_step(&self, cache: &PagedCache, new: &[(SequenceId, u32)]) -> Result<PagedStep> {
        let (gpu, spec) = (self.gpu(), self.spec());
        let mut seen = HashSet::new();
        let (mut ids, mut places, mut cu_q) = (Vec::new(), Vec::new(), vec![0]);
        for (s, &(id, n)) in (0..).zip(new) {
            let tokens = cache.tokens(id)?;
            let len = tokens.len() as u32;
            if !seen.insert(id) {
                let bound = "each sequence once";
                return Err(Error::refused(
                    "a step",
                    format_args!("{id:?} twice"),
                    bound,
                ));
            }
            if n == 0 || n > len {
                let bound = format!("1 to the sequence's {len}");
                return Err(Error::refused("new tokens", n, bound));
            }
            if len > spec.max_positions {
                let bound = format!("the model has {} positions", spec.max_positions);
                return Err(Error::refused("a sequence's end", len, bound));
            }
            for position in len - n..len {
                let token = tokens[position as usize];
                if token >= spec.vocab {
                    let bound = format!("the vocabulary has {} tokens", spec.vocab);
                    return Err(Error::refused("a token", token, bound));
                }
                ids.push(token);
                places.extend([s, position]);
            }
            cu_q.push(ids.len() as u32);
        }
        let last: Vec<u32> = cu_q[1..].iter().map(|end| end - 1).collect();
        let sequences: Vec<SequenceId> = new.iter().map(|&(id, _)| id).collect();
        let tables = cache.tables(&sequences)?;
        let rows = ids.len() as u32;
        Ok(PagedStep {
            chunk: Chunk {
                ids: gpu.upload_u32("ids", &[1, rows], &ids)?,
                places: Some(gpu.upload_u32("places", &[rows, 2], &places)?),
                starts: None,
                rows: Some(gpu.upload_u32("last rows", &[last.len() as u32], &last)?),
            },
            cu_q: gpu.upload_u32("cu_q", &[cu_q.len() as u32], &cu_q)?,
            tables,
        })
    }

    /// One ragged step: appends its tokens to the pages and writes the logits of each sequence's last one, f32
    /// `[S, V]`, or of all. They are the same bits whatever other sequences the step holds, however a text is cut
    /// into steps, and whatever the pages' size. Where the base of rotary positions grows with the context, it is
    /// that of the longest that the pool holds.
    ///
    /// # Errors
    /// [`Error::Refused`] for a cache of another model's shape, and for logits that do not hold what is written.
    pub fn record_paged_step(
        &self,
        recorder: &mut Recorder,
        cache: &PagedCache,
        step: &PagedStep,
        logits: &Tensor,
    ) -> Result<()> {
        let spec = self.spec();
        let Heads {
            kv_heads, head_dim, ..
        } = spec.heads;
        let is = cache.extents();
        if [is.layers, is.kv_heads, is.head_dim] != [spec.layers, kv_heads, head_dim] {
            let (layers, is) = (is.layers, [is.kv_heads, is.head_dim]);
            return Err(Error::refused(
                "the cache",
                format_args!("{layers} layers of {is:?}"),
                format!("{} layers of {:?}", spec.layers, [kv_heads, head_dim]),
            ));
        }
        let pass = Pass {
            chunk: &step.chunk,
            lengths: &step.tables.lengths,
            context: is.pages.saturating_mul(is.page_len).min(spec.max_positions),
            logits,
            attentions: &[],
            paged: Some(Paged {
                pages: &step.tables.pages,
                cu_q: &step.cu_q,
            }),
        };
        self.record(recorder, pass, |ix| cache.layer(ix))
    }
}
