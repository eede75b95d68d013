//! Steps of decoder-only models over sequences in pages, each with as many new tokens as it has.

use std::collections::HashSet;

use super::causal::Pass;
use super::{CausalModel, Chunk};
use crate::attention::SharedKeys;
use crate::cache::{PagedCache, PagedExtents, SequenceId, Tables};
use crate::gpu::{DType, Recorder, Tensor};
use crate::layers::{Cascade, Heads, Paged};
use crate::{Error, Result};

/// The new tokens of S sequences in pages, R in all, on the device.
pub struct PagedStep {
    chunk: Chunk,
    /// u32 `[S + 1]`
    cu_q: Tensor,
    tables: Tables,
    cascade: Option<CascadeStep>,
    /// As the caller orders the sequences. u32 `[S]`
    lengths: Tensor,
}

/// The tables of a step whose sequences share first keys.
struct CascadeStep {
    /// Of groups.
    shared: Tables,
    /// u32 `[G + 1]`
    cu_q: Tensor,
    /// Of each sequence's own keys.
    own: Tables,
}

impl CascadeStep {
    fn view(&self) -> Cascade<'_> {
        Cascade {
            shared: SharedKeys {
                pages: &self.shared.pages,
                kv_len: &self.shared.lengths,
                cu_q: &self.cu_q,
            },
            pages: &self.own.pages,
            kv_len: &self.own.lengths,
        }
    }
}

impl PagedStep {
    /// A [`CausalModel::paged_step`] with the logits of every new token instead of each sequence's last: `[R, V]`, one
    /// sequence's rows behind the other's.
    pub(crate) fn of_all(mut self) -> PagedStep {
        self.chunk.rows = None;
        self
    }

    /// Whether it reads shared keys once.
    pub fn is_cascade(&self) -> bool {
        self.cascade.is_some()
    }

    /// Positions that each sequence fills with the step. u32 `[S]`
    pub fn lengths(&self) -> &Tensor {
        &self.lengths
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
            lengths: tables.lengths.clone(),
            tables,
            cascade: None,
        })
    }

    /// As [`CausalModel::paged_step`], but pages that sequences have in common are read once for all of them, where
    /// that spares more bytes than merging costs. What a sequence gets is then the same but for rounding, whatever
    /// stands beside it. Layers with windows read each sequence's own: then it is `paged_step`.
    ///
    /// # Errors
    /// As [`CausalModel::paged_step`].
    pub fn cascade_step(&self, cache: &PagedCache, new: &[(SequenceId, u32)]) -> Result<PagedStep> {
        let spec = self.spec();
        let groups = cache.shared(new)?;
        let spared = groups
            .iter()
            .map(|(members, pages)| (members.len() - 1) * pages);
        let spared = spared.sum::<usize>() as u64 * cache.page_bytes() / u64::from(spec.layers);
        // Two parts of each row and head are written, and read again.
        let rows: u64 = new.iter().map(|&(_, n)| u64::from(n)).sum();
        let Heads {
            heads, head_dim, ..
        } = spec.heads;
        let parts = 2 * 2 * 4 * rows * u64::from(heads) * u64::from(head_dim + 1);
        if spared <= parts || spec.windows.iter().any(Option::is_some) {
            return self.paged_step(cache, new);
        }
        let order: Vec<usize> = groups
            .iter()
            .flat_map(|(members, _)| members.clone())
            .collect();
        let sorted: Vec<(SequenceId, u32)> = order.iter().map(|&at| new[at]).collect();
        let ids: Vec<SequenceId> = sorted.iter().map(|&(id, _)| id).collect();
        let first: Vec<SequenceId> = groups
            .iter()
            .map(|(members, _)| new[members[0]].0)
            .collect();
        let pages: Vec<usize> = groups.iter().map(|&(_, pages)| pages).collect();
        let skip: Vec<usize> = groups
            .iter()
            .flat_map(|(members, pages)| vec![*pages; members.len()])
            .collect();
        // Where each sequence's last row is, and each group's first.
        let (mut last, mut cu_q, mut end) = (vec![0; new.len()], vec![0], 0);
        for (members, _) in &groups {
            for &at in members {
                end += new[at].1;
                last[at] = end - 1;
            }
            cu_q.push(end);
        }
        let lengths = new
            .iter()
            .map(|&(id, _)| cache.len(id))
            .collect::<Result<Vec<u32>>>()?;
        let gpu = self.gpu();
        let n = new.len() as u32;
        let mut step = self.paged_step(cache, &sorted)?;
        step.chunk.rows = Some(gpu.upload_u32("last rows", &[n], &last)?);
        step.lengths = gpu.upload_u32("lengths", &[n], &lengths)?;
        step.cascade = Some(CascadeStep {
            shared: cache.tables_of_first(&first, &pages)?,
            cu_q: gpu.upload_u32("group cu_q", &[cu_q.len() as u32], &cu_q)?,
            own: cache.tables_behind(&ids, &skip)?,
        });
        Ok(step)
    }

    /// One ragged step: appends its tokens to the pages and writes the logits of each sequence's last one, f32
    /// `[S, V]`, or of all. But for a cascade they are the same bits whatever other sequences the step holds, however a
    /// text is cut into steps, and whatever the pages' size. Where the base of rotary positions grows with the context,
    /// it is that of the longest that the pool holds.
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
                cascade: step.cascade.as_ref().map(CascadeStep::view),
            }),
        };
        self.record(recorder, pass, |ix| cache.layer(ix))
    }
}
